"""What follows the experts of a mixture: computed from gradients on a copy, and proved there, before anything is cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .edits import CompressionError
from .expert_cuts import Coupling, Get, cut_mixture_
from .mixtures import Mixture, close_, experts_of
from .probe import difference, map_tensors, tensors_in, tolerance

# all that transformers computes experts with; a model's own way is proved first
IMPLEMENTATIONS = ("batched_mm", "grouped_mm")
TOKENS_PER_EXPERT = 16
MOST_COPIED = 1 << 25  # numbers: "batched_mm" copies the weights of an expert for every token that it gets


def proved(model: nn.Module, mixture: Mixture, kept: tuple[int, ...], scope: str, args: Any, kwargs: Any) -> Coupling:
    """What follows the experts of one mixture, computed and proved on a copy of the module that runs it."""
    free = copy.deepcopy(model.get_submodule(scope)).float().eval()
    get = _finder(free, scope)
    _draw_(free, get(mixture.name), mixture)
    _implement(free, "eager")
    what = f"Cannot remove experts from {mixture.name!r} ({type(get(mixture.name)).__name__}) exactly, so nothing was changed: "
    try:
        for times in (1, 4, 16):
            args_, kwargs_ = _many(args, kwargs, times * TOKENS_PER_EXPERT * mixture.num_experts // (mixture.top_k or 1))
            plain, masked, alive, still = _gradients(free, get, mixture, kept, args_, kwargs_)
            coupling = _couple(get, mixture, kept, alive, still)
            if isinstance(coupling, Coupling):
                break
    except CompressionError:
        raise
    except Exception as error:  # a model may do anything on a copy of its part: no proof, so no cut
        raise CompressionError(f"{what}on other tokens it fails with {said(error)}") from error
    if not isinstance(coupling, Coupling):
        raise CompressionError(f"{what}{coupling}. Leave it out of the plan.")
    if difference(plain, masked) == 0.0:
        raise CompressionError(f"{what}a router that never picks them gives the same, so they are not experts of it.")
    reason = ""
    for variant in (coupling, replace(coupling, config=True)):
        double = copy.deepcopy(free)
        try:
            with torch.no_grad():
                cut_mixture_(_finder(double, scope), mixture, kept, variant, [])
                worst = difference(masked, _first(double(*args_, **kwargs_)))
                if worst <= tolerance(torch.float32):
                    reason = _implementations(free, get, double, mixture, kept, args_, kwargs_)
                    if not reason:
                        return variant
                    break
            reason = (
                reason or f"without them it differs from a router that never picks them by {worst:.1e} of the largest value"
            )
        except Exception as error:  # a wrong guess may break a forward in any way; the next one is tried
            reason = reason or f"without them it fails with {said(error)}"
    raise CompressionError(f"{what}{reason}. Leave it out of the plan.")


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _finder(double: nn.Module, scope: str) -> Get:
    def find(name: str) -> nn.Module:
        return double.get_submodule(name[len(scope) :].lstrip(".") if scope else name)

    return find


def _first(output: Any) -> torch.Tensor:
    return tensors_in(output)[0][1]


def _draw_(free: nn.Module, top: nn.Module, mixture: Mixture) -> None:
    """Weights drawn anew, at their own spread or more; a router that uses all its experts; biases that decide some choices."""
    draw = torch.Generator().manual_seed(0)
    local = mixture.router[len(mixture.name) :].lstrip(".")
    biases = [name[len(mixture.name) :].lstrip(".") for name in mixture.biases]
    tensors = {**dict(top.named_parameters()), **dict(top.named_buffers())}
    router = tensors[local]
    chosen = {id(tensors[name]) for name in biases}
    with torch.no_grad():
        for tensor in [*free.parameters(), *(tensors[name] for name in biases)]:
            noise = torch.randn(tensor.shape, generator=draw).to(tensor.device, tensor.dtype)
            if tensor is router:
                tensor.copy_(noise / tensor.shape[1] ** 0.5)
            elif id(tensor) in chosen:
                tensor.copy_(noise * 0.1)
            elif tensor.is_floating_point():
                spread = tensor.std().nan_to_num().item() if tensor.numel() > 1 else 0.0
                tensor.copy_(tensor.mean().nan_to_num() + noise * max(spread, 0.02))
    free.requires_grad_(True)


def _implement(free: nn.Module, how: str) -> bool:
    """Let the experts in a copy be computed in one way; whether there are any that can be."""
    configs = {id(m.config): m.config for m in free.modules() if hasattr(m, "_apply_gate") and hasattr(m, "config")}
    for config in configs.values():
        config._experts_implementation = how  # type: ignore[union-attr]
    return bool(configs)


def _many(args: Any, kwargs: Any, tokens: int) -> tuple[Any, Any]:
    """A call with the same arguments for many more tokens: rows repeated, the first floating tensor drawn anew."""
    found: list[torch.Tensor] = []
    map_tensors([list(args), dict(kwargs)], lambda t: (found.append(t), t)[1])
    hidden = next(t for t in found if t.is_floating_point())
    rows, own = hidden.shape[0], hidden[..., 0].numel()
    times = -(-tokens // own)
    draw = torch.Generator().manual_seed(1)

    def enlarged(tensor: torch.Tensor) -> torch.Tensor:
        many = tensor
        if tensor.ndim and tensor.shape[0] == rows and (rows > 1 or tensor is hidden):
            many = torch.cat([tensor] * times)
        if tensor is hidden:
            many = torch.randn(many.shape, generator=draw).to(tensor.device)
        return many.float() if many.is_floating_point() else many

    return map_tensors(args, enlarged), map_tensors(dict(kwargs), enlarged)


class _Unbinding(TorchFunctionMode):
    """Experts that are read one by one from a stacked weight: one gradient for all, not one of its whole size for each."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[int, tuple[torch.Tensor, ...]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__name__ == "__getitem__" and isinstance(args[0], nn.Parameter) and args[0].ndim > 1:
            index = args[1]
            if (
                isinstance(index, torch.Tensor)
                and index.ndim == 0
                and not index.is_floating_point()
                and index.dtype != torch.bool
            ):
                if id(args[0]) not in self.parts:
                    self.parts[id(args[0])] = args[0].unbind(0)
                return self.parts[id(args[0])][int(index)]
        return func(*args, **(kwargs or {}))


Alive = dict[str, torch.Tensor | None]


def _gradients(
    free: nn.Module, get: Get, mixture: Mixture, kept: tuple[int, ...], args: Any, kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, Alive, Alive]:
    """What a mixture gives with all experts and with those that stay, and which of its weights have a gradient then."""
    outputs, alive = [], []
    top = get(mixture.name)
    for closed in (False, True):
        handles = close_(mixture, top, kept) if closed else []
        try:
            free.zero_grad(set_to_none=True)
            with torch.enable_grad():
                with _Unbinding():
                    out = _first(free(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone)))
                draw = torch.Generator().manual_seed(2)
                (out * torch.randn(out.shape, generator=draw).to(out.device)).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        outputs.append(out.detach())
        alive.append({name: None if p.grad is None else p.grad != 0 for name, p in top.named_parameters()})
    free.zero_grad(set_to_none=True)
    return outputs[0], outputs[1], alive[0], alive[1]


def _couple(get: Get, mixture: Mixture, kept: tuple[int, ...], alive: Alive, still: Alive) -> Coupling | str:
    """The rows that lose their gradient with the experts that go: exactly those of these experts, or why not."""
    gone, count = mixture.gone(kept), mixture.num_experts
    top = get(mixture.name)
    prefix = f"{mixture.name}." if mixture.name else ""
    children = None if mixture.children is None else mixture.children[len(prefix) :]
    rows: list[tuple[str, str, int, torch.Tensor]] = []
    for name, tensor in [*top.named_parameters(), *top.named_buffers()]:
        if children is not None and name.startswith(f"{children}."):
            continue
        place, _, key = name.rpartition(".")
        path = ".".join(part for part in (mixture.name, place) if part)
        before, after = alive.get(name), still.get(name)
        if before is None or not bool(before.any()):
            if tensor.numel() == count and max(tensor.shape) == count:
                dim = tensor.shape.index(count)
                rows.append((path, key, dim, (~gone).nonzero().flatten()))
            continue
        after = torch.zeros_like(before) if after is None else after
        dims: list[tuple[int, torch.Tensor]] = []
        for dim, size in enumerate(tensor.shape):
            others = [d for d in range(tensor.ndim) if d != dim]
            one, two = (a.any(others) if others else a for a in (before, after))  # type: ignore[call-overload]
            dead = (one & ~two).cpu()
            if not bool(dead.any()) or size % count:
                continue
            if not bool(one.all()):
                return f"some rows of {name!r} are never used, whatever the tokens"
            unit = torch.arange(size)
            for follows in (gone[unit // (size // count)], gone[unit % count]):
                if torch.equal(dead, follows):
                    dims.append((dim, (~follows).nonzero().flatten()))
                    break
        dead = bool((before & ~after).any())
        if len(dims) > 1 or (not dims and dead and _loses_rows(before, after)):
            return f"which rows of {name!r} belong to which expert cannot be told from the computation"
        if dims:
            rows.append((path, key, *dims[0]))
    if children is not None:
        experts = list(experts_of(top.get_submodule(children)))
        for index, child in enumerate(experts):
            mine = [n for n in alive if n.startswith(f"{children}.{child}.")]
            used, left = (any(a[n] is not None and bool(a[n].any()) for n in mine) for a in (alive, still))  # type: ignore[union-attr]
            if not used:
                return f"the expert {child!r} is never used, whatever the tokens"
            if left == bool(gone[index]):
                return f"the expert {child!r} does not follow its row of the router"
    followers = {f"{path}.{key}" for path, key, _, _ in rows}
    if mixture.router not in followers:
        return f"the rows of {mixture.router!r} do not follow the experts"
    if mixture.children is None and len(followers - {mixture.router, *mixture.biases}) < 1:
        return "no weight but the router's follows the experts"
    return Coupling(tuple(rows))


def _loses_rows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether some row along some dimension has no gradient left."""
    for dim in range(before.ndim):
        others = [d for d in range(before.ndim) if d != dim]
        one, two = (a.any(others) if others else a for a in (before, after))  # type: ignore[call-overload]
        if bool((one & ~two).any()):
            return True
    return False


def _implementations(
    free: nn.Module, get: Get, double: nn.Module, mixture: Mixture, kept: tuple[int, ...], args: Any, kwargs: Any
) -> str:
    """Why the cut is not the mask under one of the ways in which transformers computes experts; empty where it is."""
    top = get(mixture.name)
    stacked = [p for _, p in top.named_parameters() if p.ndim == 3 and p.shape[0] == mixture.num_experts]
    for how in IMPLEMENTATIONS:
        if not _implement(free, how) or not _implement(double, how):
            break
        if how == "batched_mm":
            rows = TOKENS_PER_EXPERT * mixture.num_experts
            if rows * max((p[0].numel() for p in stacked), default=0) > MOST_COPIED:
                continue
        handles = close_(mixture, top, kept)
        try:
            expected = _first(free(*args, **kwargs))
        except Exception:  # not every model, device or number of bytes can be computed so
            continue
        finally:
            for handle in handles:
                handle.remove()
        worst = difference(expected, _first(double(*args, **kwargs)))
        if worst > tolerance(torch.float32):
            return f"computed by {how!r} it differs from a router that never picks them by {worst:.1e} of the largest value"
    _implement(free, "eager")
    return ""
