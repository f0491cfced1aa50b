"""Weights that cuts bring along: what an output projection becomes so that what stays does the work of what goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .cutting import Block, unit_columns
from .discover import Attention
from .edits import CompressionError, KeepHeads, KeepNeurons
from .plan import Plan
from .quantization import is_quantized
from .resolve import Resolved
from .sparse import is_sparse


def is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies by one float matrix of its own, which can become another."""
    own = "weight_in" not in module._parameters and not is_quantized(module) and not is_sparse(module)
    return isinstance(module, nn.Linear | Conv1D) and own


def name_of(edit: Any) -> str | None:
    """The block that an edit cuts; None for an edit of another kind."""
    return edit.attention if isinstance(edit, KeepHeads) else edit.ffn if isinstance(edit, KeepNeurons) else None


def names_given(edit: KeepHeads | KeepNeurons) -> tuple[str, str]:
    """The tensors that belong to an edit with `given=True`: the output projection's weight (out, columns that stay), bias."""
    return f"{name_of(edit)}.out_weight", f"{name_of(edit)}.out_bias"


@dataclass(frozen=True)
class Compensation:
    """New weights for one block's output projection: `weight` (out, columns) for the input columns that stay."""

    block: Block
    columns: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def put(self, module: Any, undo: list[Callable[[], None]]) -> None:
        """Into the projection before it is cut, so that whatever is cut of it (another block's rows, too) is cut of these."""
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().clone()
        weight[:, self.columns.to(weight.device)] = self.weight.to(weight)
        for key, value in (("weight", weight.T if isinstance(module, Conv1D) else weight), ("bias", self.bias)):
            before = module._parameters[key] if value is not None else None
            if before is not None and value is not None:
                new = nn.Parameter(value.to(before.device, before.dtype).contiguous(), requires_grad=before.requires_grad)
                undo.append(partial(module._parameters.__setitem__, key, before))
                module._parameters[key] = new

    def simulate(self, module: Any) -> Callable[[], None]:
        """Into the projection at its full width, under a mask; gives the function that takes it back."""
        before = {
            key: p.detach().clone() for key, p in module._parameters.items() if p is not None and key in ("weight", "bias")
        }
        with torch.no_grad():
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            weight[:, self.columns.to(weight.device)] = self.weight.to(weight)
            if self.bias is not None:
                module.bias.copy_(self.bias)

        def back() -> None:
            with torch.no_grad():
                for key, value in before.items():
                    getattr(module, key).copy_(value)

        return back


def compensations(model: nn.Module, plan: Plan, resolved: Resolved) -> list[Compensation]:
    """What the cuts of a plan bring along, checked against the model; nothing is changed.

    Raises:
        CompressionError: a tensor is missing, has another shape or holds NaN; the block has no output projection of its own.
    """
    blocks = {block.name: block for block in (*resolved.structure.attentions, *resolved.structure.ffns)}
    return [
        _checked(model, blocks[name], edit, plan.tensors or {}, resolved, f"{type(edit).__name__}({name!r})")
        for name, edit in resolved.given.items()
        if not resolved.is_gone(name)
    ]


def _checked(
    model: nn.Module, block: Block, edit: Any, tensors: Mapping[str, torch.Tensor], resolved: Resolved, what: str
) -> Compensation:
    module = model.get_submodule(block.out)
    if block.consumer is not None or not is_plain(module) or getattr(block, "twins", ()):
        raise CompressionError(
            f"{what} was planned with weights, and {block.out!r} ({type(module).__name__}) is no Linear of this block alone. "
            "Plan it without compensation."
        )
    weight, bias = (tensors.get(name) for name in names_given(edit))
    if weight is None:
        raise CompressionError(
            f"{what} was planned with tensors ({names_given(edit)[0]}), which this plan does not carry; without them it would "
            "be cut uncompensated. Use the plan that its planner returned, or Plan.load(folder)."
        )
    kept = resolved.heads[block.name] if isinstance(block, Attention) else resolved.neurons[block.name]
    columns = torch.isin(unit_columns(block), torch.tensor(kept)).nonzero().flatten()
    outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]  # type: ignore[union-attr,index]
    if tuple(weight.shape) != (outputs, len(columns)):
        raise CompressionError(
            f"{what} brings weights of shape {tuple(weight.shape)} for {block.out!r}; with what stays, ({outputs}, "
            f"{len(columns)}) were expected. The plan belongs to another model."
        )
    if bias is not None and (module._parameters.get("bias") is None or tuple(bias.shape) != (outputs,)):
        raise CompressionError(f"{what} brings a bias of shape {tuple(bias.shape)} for {block.out!r}, which takes none such.")
    for tensor in (weight, bias):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise CompressionError(f"The weights that {what} brings hold NaN or infinite values; make the plan again.")
    return Compensation(block, columns, weight, bias)
