"""Masks: the function that a cut model will have, at full shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .compensation import Compensation
from .cutting import unit_columns
from .discover import Attention, discover
from .edits import CompressionError, KeepHeads, KeepNeurons
from .mixtures import close_
from .modules import gate_, is_gated, ungate_
from .plan import Plan
from .resolve import Resolved


class Mask:
    """What `mask_` returns: the mask is on until `.remove()`, or until the end of a `with` block."""

    def __init__(self, model: nn.Module, resolved: Resolved, new: Sequence[Compensation] = ()) -> None:
        if not isinstance(model, nn.Module) or not isinstance(resolved, Resolved):
            raise CompressionError(
                f"A Mask is made by mask_(model, plan), got {type(model).__name__}, {type(resolved).__name__}."
            )
        self._gated: list[nn.Module] = []
        self._hooks: list[Any] = []
        gates = [(cut.block.out, cut.gate(), cut.block.consumer) for cut in resolved.cuts]
        gates += [(name, gate, None) for name, gate in resolved.gates.items()]
        for name, hidden, consumer in gates:
            module = model.get_submodule(name)
            if "hfc_masks" not in module.__dict__:
                base = gate_(module).clone() if is_gated(module) else None  # a mask of a checkpoint or a training
                masks: dict[int | None, torch.Tensor | None] = {None: base}
                module.__dict__["hfc_masks"] = masks
            gate = gate_(module, consumer=consumer)
            masks = module.__dict__["hfc_masks"]
            before = masks.get(id(self))  # neurons and channels may meet in one projection
            masks[id(self)] = hidden.to(gate.device) if before is None else hidden.to(gate.device) * before
            _combine(module)
            self._gated.append(module)
        self._back = [one.simulate(model.get_submodule(one.block.out)) for one in new]
        for mixture, kept in resolved.mixtures:
            self._hooks += close_(mixture, model.get_submodule(mixture.name), kept)
        for path, kept in resolved.removed.items():
            for index, layer in enumerate(model.get_submodule(path).children()):
                if index not in kept:
                    self._hooks.append(layer.register_forward_hook(skip_layer, with_kwargs=True))

    def remove(self) -> None:
        """Take this mask off; what other masks hide stays hidden. A second call does nothing."""
        while self._back:
            self._back.pop()()
        while self._gated:
            module = self._gated.pop()
            module.__dict__.get("hfc_masks", {}).pop(id(self), None)
            _combine(module)
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Mask:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _combine(module: nn.Module) -> None:
    """A gate is the product of all masks on it; without any, there is none."""
    masks = module.__dict__.get("hfc_masks")
    if masks is None or not is_gated(module):
        module.__dict__.pop("hfc_masks", None)
        return
    base = masks[None]
    others = [mask for key, mask in masks.items() if key is not None]
    if base is None and not others:
        ungate_(module)
    else:
        gate = gate_(module).fill_(1.0)
        for mask in ([] if base is None else [base]) + others:
            gate.mul_(mask.to(gate.device))
    if not others:
        del module.__dict__["hfc_masks"]


def skip_layer(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """A layer that is as if it were not there: its first output is its first input."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    changed = why_not_skipped(hidden, output)
    if changed:
        raise CompressionError(f"A {type(module).__name__} cannot be left out: {changed}. Keep these layers.")
    return type(output)([hidden, *output[1:]]) if type(output) in (tuple, list) else hidden


def why_not_skipped(hidden: Any, output: Any) -> str:
    """Why a layer that is given this and gives that cannot be left out; "" where it can."""
    first = output[0] if type(output) in (tuple, list) and output else output
    if hidden is None:
        return "it is called with neither a first argument nor hidden_states=, so what it would pass on is not known"
    both = isinstance(hidden, torch.Tensor) and isinstance(first, torch.Tensor)
    if not both or hidden.shape == first.shape:
        return ""
    return f"it turns {tuple(hidden.shape)} into {tuple(first.shape)}, which what comes after it needs"


def masks_in(owner: nn.Module) -> Plan:
    """What the gates of a model hide, as a plan in the model's own numbering."""
    edits: list[KeepHeads | KeepNeurons] = []
    structure = discover(owner)
    for block in (*structure.attentions, *structure.ffns):
        module = owner.get_submodule(block.out)
        if is_gated(module) and bool((module.hfc_gate == 0).any()):  # type: ignore[union-attr]
            columns = module.hfc_gate.nonzero().flatten()  # type: ignore[operator]
            if isinstance(block, Attention):
                edits.append(KeepHeads(block.name, tuple((columns // block.head_dim).unique().tolist())))
            else:
                edits.append(KeepNeurons(block.name, tuple(unit_columns(block)[columns.cpu()].unique().tolist())))
    return Plan(edits)
