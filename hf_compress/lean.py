"""Copies of blocks that take half the memory or less: weights held in bfloat16, multiplied in float32 a slab at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from .memory import slabs
from .modules import GATED, plain_kind

LARGE = 1 << 16  # numbers: weights with fewer are held in float32
HELD = torch.bfloat16
# what a forward may ask of a weight and get without its numbers
_ASKED = {"shape", "size", "dim", "ndim", "numel", "device", "layout", "requires_grad", "is_meta", "is_cuda", "is_leaf"}


class NotLean(Exception):
    """A forward does something else with a weight than multiply by it."""


def held_weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights that a lean copy holds in bfloat16: those of large plain Linears, and of GPT-2's Conv1D."""
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        weight = part._parameters.get("weight")
        if plain_kind(part) in (nn.Linear, Conv1D) and plain_kind(part) in GATED and type(weight) is nn.Parameter:
            if weight.ndim == 2 and weight.numel() >= LARGE and weight.is_floating_point():
                found[id(weight)] = weight
    return list(found.values())


def held(weight: nn.Parameter) -> nn.Parameter:
    """A weight as a lean copy holds it."""
    kept = torch.empty(weight.shape, dtype=HELD, device=weight.device)
    return nn.Parameter(kept.copy_(weight.detach()), requires_grad=False)


class Lean(TorchFunctionMode):
    """While it is on, weights in bfloat16 count as float32: they are multiplied by in float32, and say that they are.

    What is computed is what a copy in float32 with the same numbers computes, up to the order of sums: bfloat16 says which
    numbers can be drawn, not how they are multiplied. No weight is ever whole in float32, and none gets a gradient. That
    would be, for inputs `x` and the gradient `g` of the outputs, over all tokens `t`,

        dL/dw_ij = sum_t g_ti x_tj

    and its row `i` is zero, but for terms that happen to cancel, where no `t` has `g_ti` and some `x_tj` that are not; a column
    likewise. Which are is told to `weight.hfc_silent`, if the weight has one.

    Whatever else is asked of such a weight raises `NotLean`; the copy is then made in float32.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from hf_compress.lean import Lean, held
    >>> layer, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 1 / 3]])
    >>> layer.weight = held(nn.Parameter(torch.eye(2)))
    >>> with Lean():
    ...     print(layer(x), layer.weight.dtype)
    tensor([[1.0000, 0.3333]]) torch.float32

    ```
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_is_held(value) for value in _values((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        name = getattr(func.__self__, "__name__", "") if func.__name__ == "__get__" else func.__name__
        if name == "dtype":
            return torch.float32
        if name == "is_floating_point":
            return True
        if name in _ASKED:
            return func(*args, **kwargs)
        if func is F.linear:
            x, weight, bias = _three(*args, **kwargs)
        elif func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
        else:
            raise NotLean(name)
        if _is_held(x) or _is_held(bias) or not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            raise NotLean(name)
        product = _Product.apply(x, weight, func is torch.addmm)
        return product if bias is None else product + bias


def _three(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _is_held(value: Any) -> bool:
    return type(value) is nn.Parameter and value.dtype == HELD


def _values(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _values(value)
        else:
            yield value


class _Product(torch.autograd.Function):
    """`x @ weight.T`, or `x @ weight` if `last` (outputs last, as a Conv1D has them)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, last: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.last, ctx.note = last, getattr(weight, "hfc_silent", None)
        flat = x.reshape(-1, x.shape[-1])
        out = _down(flat, weight) if last else _across(flat, weight)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        flat, above = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.needs_input_grad[1] and ctx.note is not None:
            ins, outs = _silent(flat, above), _silent(above, flat)
            ctx.note([ins, outs] if ctx.last else [outs, ins])
        if not ctx.needs_input_grad[0]:
            return None, None, None
        below = _across(above, weight) if ctx.last else _down(above, weight)
        return below.view(x.shape), None, None


def _across(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`"""
    out = x.new_empty(len(weight), len(x))
    for rows, slab in _in_float(weight):
        torch.mm(slab, x.T, out=out[rows])
    return out.T.contiguous()


def _down(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight`"""
    out = x.new_zeros(len(x), weight.shape[1])
    for rows, slab in _in_float(weight):
        out.addmm_(x[:, rows], slab)
    return out


def _in_float(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The slabs of a weight in float32, each in the place of the one before."""
    place: torch.Tensor | None = None
    for rows, slab in slabs(weight.detach()):
        place = torch.empty(slab.shape, device=slab.device) if place is None else place
        yield rows, place[: len(slab)].copy_(slab)


def _silent(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The columns `i` of `some` for which `some[t, i] * others[t, j] == 0`, whatever `t` and `j`."""
    met = (others != 0).any(1)
    return ~(some[met] != 0).any(0)
