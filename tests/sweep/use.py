"""A cut model in use: it generates what the masked one does, and it trains."""

from __future__ import annotations

import copy
from typing import Any

import torch

import hf_compress as hc

from .compare import Wrong, line


def generates(model: Any, dense: Any, plan: hc.Plan, inputs: dict, details: dict) -> None:
    if not getattr(model, "can_generate", lambda: False)():
        return
    batch = {k: v for k, v in inputs.items() if not k.startswith("decoder") and k != "attention_mask"}
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)
    masked = copy.deepcopy(dense)
    try:
        torch.manual_seed(0)
        with hc.mask_(masked, plan):
            expected = masked.generate(**batch, **options)
    except Exception as error:
        details["generate"] = f"not even the whole model: {type(error).__name__}"
        return
    torch.manual_seed(0)
    got = model.generate(**batch, **options)
    one, other = (x if isinstance(x, torch.Tensor) else x[0] for x in (expected, got))
    if not torch.equal(one, other):
        raise Wrong("greedy generation is not that of the masked model")
    details["generate"] = "equal"


def trains(model: Any, dense: Any, plan: hc.Plan, batch: dict, details: dict) -> None:
    """Two steps; what was cut moves, if it moves in the whole model."""
    try:
        moved = _two_steps(model, batch)
    except Exception as error:
        try:
            _two_steps(copy.deepcopy(dense), batch)
        except Exception:
            details["train"] = f"not even the whole model: {type(error).__name__}"
            return
        raise Wrong(f"does not train: {type(error).__name__}: {line(error)}") from None
    if moved is None:
        details["train"] = "the loss is not finite"
        if _two_steps(copy.deepcopy(dense), batch) is not None:
            raise Wrong("the loss is not finite when it trains")
        return
    structure = hc.discover(model)
    still = [b.out for b in (*structure.attentions, *structure.ffns) if not moved.get(f"{b.out}.weight", True)]
    if still and len(moved) == sum(1 for _ in model.parameters()):
        whole = _two_steps(copy.deepcopy(dense), batch) or {}
        if not any(isinstance(e, hc.KeepLayers) for e in plan) and any(whole.get(f"{name}.weight", False) for name in still):
            raise Wrong(f"{still[0]} does not move when it trains")
    details["train"] = "ok"


def _two_steps(model: Any, batch: dict) -> dict[str, bool] | None:
    model.train()
    torch.manual_seed(0)
    moved = {name: False for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss: Any = sum(t.float().square().mean() for t in _with_grad(model(**batch)))
        loss.backward()
        if not torch.isfinite(loss):
            return None
        for name, p in model.named_parameters():
            moved[name] |= p.grad is not None and bool(p.grad.any())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return moved


def _with_grad(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() and value.requires_grad and torch.isfinite(value).all() else []
    if hasattr(value, "items"):
        return [t for key, v in value.items() if key != "past_key_values" for t in _with_grad(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _with_grad(v)]
    return []
