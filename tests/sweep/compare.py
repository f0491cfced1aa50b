"""What two models give, compared; and a masked model that hf_compress has no part in."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.probe import quiet_run

from .load import doubled, far, flat, outputs_of


class Wrong(Exception):
    """The edit is not exact; the message says what is not."""


def line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:400]


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and (torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in zip(one, other, strict=True)
    )


def other_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the same shapes, unlike those of `apply_`'s own proof; padded where that is possible."""
    draw = torch.Generator().manual_seed(7)
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "mask" not in name and value.numel() > 4:
            found[name] = (torch.randn(value.shape, generator=draw) * value.std() + value.mean()).to(value.dtype)
        elif name in ("input_ids", "decoder_input_ids") and value.ndim == 2 and len(inputs) < 4:
            found[name] = value.flip(0)
            if "pixel_values" not in inputs:
                found[name] = value[:, torch.randperm(value.shape[1], generator=draw)]
        else:
            found[name] = value
    try:
        with quiet_run(model) as run:
            if set(inputs) == {"input_ids"} and "attention_mask" in inspect.signature(model.forward).parameters:
                masked = {**found, "attention_mask": torch.ones_like(found["input_ids"])}
                masked["attention_mask"][0, -3:] = 0
                try:
                    if all(torch.isfinite(t).all() for t in flat(run(masked))):
                        return masked
                except Exception:
                    pass
            run(found)
        return found
    except Exception:
        return inputs


def in_double(cut: Any, dense: Any, plan: hc.Plan, hand: Any, batch: dict) -> float:
    """What rounding alone may not explain: the difference in float64, from what was masked by hand if that can be done."""
    batch = doubled(batch)
    try:
        found = outputs_of(copy.deepcopy(cut).double(), batch)
        if hand is not None:
            return far(found, outputs_of(hand.double(), batch))
        masked = copy.deepcopy(dense).double()
        with hc.mask_(masked, plan):
            return far(found, outputs_of(masked, batch))
    except Exception:
        return float("inf")


def by_hand(model: Any, plan: hc.Plan) -> Any:
    """The masked model without hf_compress: the weights that read what goes are set to zero. None where a plan removes layers."""
    structure = hc.discover(model)
    blocks = {b.name: b for b in (*structure.attentions, *structure.ffns)}
    with torch.no_grad():
        for edit in plan:
            if not isinstance(edit, hc.KeepHeads | hc.KeepNeurons):
                return None
            block = blocks[edit.attention if isinstance(edit, hc.KeepHeads) else edit.ffn]
            out = model.get_submodule(block.out)
            weight = getattr(out, "weight", None)
            if weight is None or (weight.ndim != 2 and getattr(out, "groups", 2) != 1):
                return None
            transposed = isinstance(out, Conv1D)
            kept = set(edit.heads if isinstance(edit, hc.KeepHeads) else edit.neurons)
            each = weight.shape[0 if transposed else 1] // block.size
            for unit in set(range(block.size)) - kept:
                where = slice(unit * each, (unit + 1) * each)
                weight[where if transposed else (slice(None), where)] = 0
    return model
