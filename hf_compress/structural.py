"""The structural proof: what belongs to each unit of one block, and how its cut copy runs, whatever the weights are."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .coupling import ARGUMENT, SHARED, coupled
from .cutting import INDEX, Block, Cut, Variant, cut_, unit_columns, variants
from .discover import Attention, Part
from .edits import CompressionError
from .lean import Lean, held, held_weights
from .memory import give_back, slabs
from .modules import gate_, plain_kind, ungate_
from .probe import difference, map_tensors, tensors_in, tolerance
from .refusals import Unreached, check_part, check_read, check_sharing
from .unreached import Fresh


def copy_of(module: nn.Module, instead: Mapping[int, nn.Parameter] | None = None) -> nn.Module:
    """A copy that no gradient and no hook of ours reaches. `instead`: what stands for a parameter there, by its id."""
    double = copy.deepcopy(module, dict(instead or {}))
    for part in double.modules():
        if "attention_bias_cache" in part.__dict__:
            part.attention_bias_cache = _Forgetful()  # type: ignore[assignment]
        for hooks, more in (
            (part._forward_hooks, part._forward_hooks_with_kwargs),
            (part._forward_pre_hooks, part._forward_pre_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                # nor one of transformers' that notes hidden states: it would note them twice
                if getattr(hook, "hfc_stand_in", False) or getattr(hook, "__name__", "") == "output_capturing_hook":
                    hooks.pop(key)
                    more.pop(key, None)
    return double.requires_grad_(False)


def shared(module: nn.Module) -> dict[int, nn.Parameter]:
    """For `copy_of`: parameters of the copy that lie where those of the module lie, for a copy that is cut and only run."""
    plain = [p for p in module.parameters() if type(p) is nn.Parameter and not p.is_inference()]
    return {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in plain}


class _Forgetful(dict):
    """In the place of what LeViT remembers in eval mode: whatever is asked for is made anew, with its gradient."""

    def __contains__(self, key: object) -> bool:
        return False


class Dropped(list[Callable[[], None]]):
    """An undo list of a copy that nobody takes back: what it would hold is as large as the copy."""

    def append(self, undone: Callable[[], None]) -> None:
        pass


def finder_in(double: nn.Module, scope: str) -> Callable[[str], nn.Module]:
    def find(name: str) -> nn.Module:
        return double.get_submodule(name[len(scope) :].lstrip(".") if scope else name)

    return find


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every weight drawn anew around its mean, at its own spread but never less than 0.02."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.is_floating_point():
                mean, spread = _moments(tensor)
                for _, slab in slabs(tensor):
                    noise = torch.randn(slab.shape, generator=draw)
                    slab.copy_(noise.mul_(max(spread, 0.02)).add_(mean))
        for part in module.modules():
            if (
                isinstance(part, nn.modules.batchnorm._BatchNorm)
                and part.running_mean is not None
                and part.running_var is not None
            ):
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=draw))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=draw))
    give_back()


def _moments(tensor: torch.Tensor) -> tuple[float, float]:
    """The mean of a tensor, and its standard deviation."""
    count = max(tensor.numel(), 1)
    mean = sum(slab.sum(dtype=torch.float32).item() for _, slab in slabs(tensor)) / count
    squares = sum((slab.float() - mean).square_().sum().item() for _, slab in slabs(tensor))
    return mean, math.sqrt(squares / max(count - 1, 1))


def prove_structure(
    modules: dict[str, nn.Module],
    scope: str,
    group: list[Cut],
    cut: Cut,
    args: Any,
    kwargs: Any,
    known: dict,
    every: bool = False,
) -> tuple[Variant, bool]:
    """What belongs to the units of one block, and the first guess under which cut and mask agree whatever the weights are.

    The copy is a lean one where it can be (`lean.Lean`): half the memory or less, and the same products in float32. What
    does not hold there, or does not run, is tried in float32 altogether, and that decides.

    Returns:
        that guess, and whether it was proved on another block that is built alike.
    """
    if held_weights(modules[scope]):
        before = dict(known)
        try:
            return _prove_structure(modules, scope, group, cut, args, kwargs, known, every, lean=True)
        except Unreached:
            raise
        except Exception:  # a forward may do anything with its weights: float32 decides
            known.clear()
            known.update(before)
    return _prove_structure(modules, scope, group, cut, args, kwargs, known, every, lean=False)


def _prove_structure(
    modules: dict[str, nn.Module],
    scope: str,
    group: list[Cut],
    cut: Cut,
    args: Any,
    kwargs: Any,
    known: dict,
    every: bool,
    lean: bool,
) -> tuple[Variant, bool]:
    module = modules[scope]

    def to_float(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float() if tensor.is_floating_point() else tensor

    args, kwargs = map_tensors(args, to_float), map_tensors(kwargs, to_float)
    args, kwargs = Fresh(args), Fresh(kwargs)
    block = cut.block

    def drawn() -> tuple[nn.Module, torch.Tensor]:
        kept = {id(p): held(p) for p in held_weights(module)} if lean else {}
        free = copy_of(module, kept)
        give_back()
        as_they_are = {id(p) for p in kept.values()}
        free._apply(lambda t: t.float() if t.is_floating_point() and id(t) not in as_they_are else t)
        for other in group:
            ungate_(finder_in(free, scope)(other.block.out))
        randomize(free)
        return free, gate_(finder_in(free, scope)(block.out), consumer=block.consumer, by_input=lean)

    broken = [name for name, tensor in module.named_parameters() if not _is_finite(tensor)]
    if broken:
        raise CompressionError(
            f"Cannot prove a cut of {block.name!r}: {f'{scope}.{broken[0]}'.lstrip('.')} holds NaN or infinities. If a "
            "training diverged, go back to a checkpoint from before (a lower learning rate, max_grad_norm or bf16 may help)."
        )
    key = built_alike(modules, replace(block, scope=scope))
    whole = len(cut.kept) == len(cut.kept_kv) * block.groups if isinstance(block, Attention) else True
    if (key, whole) in known:
        variant = named_in(known[key, whole], scope)
        for part in variant.parts:
            if part.argument is None:
                check_part(modules, part)
        check_sharing(modules, block, variant.parts)
        return variant, True
    free, gate = drawn()

    def run(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
        torch.default_generator.manual_seed(0)
        with Lean() if lean else nullcontext():
            return outputs_of(part(*args(), **kwargs()), every)

    if key not in known:
        check_read(finder_in(free, scope)(block.out), block, lambda: run(free))
        known[key] = _find_parts(free, block, gate, args(), kwargs(), every, lean)

    plain = run(free)
    gate.copy_(cut.gate())
    masked = run(free)
    for seed in range(1, 4):  # a ReLU may be silent just where this draw hides it
        if plain and _worst(plain, masked) == 0.0:
            randomize(free, seed)
            gate.fill_(1.0)
            plain = run(free)
            gate.copy_(cut.gate())
            masked = run(free)
    if not plain or (len(cut.kept) < block.size and _worst(plain, masked) == 0.0):
        raise CompressionError(
            f"Cannot prove a cut of {block.name!r}: masking its output projection {block.out!r} changes nothing, "
            "so what `discover` took for heads or neurons is something else. Leave it out of the plan."
        )
    parts = named_in(Variant(known[key]), scope).parts
    for part in parts:
        if part.argument is None:
            check_part(modules, part)
    check_sharing(modules, block, parts)
    _check_separable(free, block, parts, scope)
    norms = tuple(
        part.module
        for part in parts
        if part.parameter == "weight"
        and part.owner is not None
        and modules[part.module]._parameters["weight"].ndim == 1  # type: ignore[union-attr]
        and "Norm" in type(modules[part.module]).__name__
    )
    reason = ""
    for guess, variant in enumerate(variants(block, parts, norms)):
        if guess:  # the copy was cut as the guess before said
            del free, gate
            free, gate = drawn()
            gate.copy_(cut.gate())
            masked = run(free)
        try:
            give_back()
            cut_(finder_in(free, scope), cut, variant, Dropped())
            give_back()
            worst = _worst(masked, run(free))
        except Exception as error:  # a wrong guess may break a forward in any way; the next one is tried
            what = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
            reason = reason or f"its forward does not run with fewer ({what})"
            continue
        reason = f"cut and mask differ by {worst:.1e} of the largest output"
        if worst <= tolerance(torch.float32):
            after = tuple(name[len(scope) :].lstrip(".") for name in variant.after)
            known[key, whole] = replace(variant, parts=known[key], after=after)
            return variant, False
    mixed = sorted({part.module for part in block.parts if part.dim == 0} - {part.module for part in parts})
    units = "heads" if isinstance(block, Attention) else "neurons"
    if mixed:
        reason = f"every row of {', '.join(map(repr, mixed))} serves several of its {units} at once; {reason}"
    raise CompressionError(
        f"Cannot cut {block.name!r} ({type(module).__name__}) exactly, so nothing was changed: {reason}. "
        f"Its {units} are tied to something that is not known here; leave it out of the plan."
    )


def named_in(variant: Variant, scope: str) -> Variant:
    """What was found in a module, with the paths that its parts have in the model."""
    parts = tuple(replace(part, module=f"{scope}.{part.module}".strip(".")) for part in variant.parts)
    return replace(variant, parts=parts, after=tuple(f"{scope}.{name}".strip(".") for name in variant.after))


MAKERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def _check_separable(free: nn.Module, block: Block, parts: tuple[Part, ...], scope: str) -> None:
    """Refuse units that nothing makes alone, with the norm that mixes them if there is one."""
    for part in parts:
        module = finder_in(free, scope)(part.module)
        weight = None if part.argument else module._parameters.get(part.parameter or "weight")
        reads = part.module == block.out and (block.consumer is None or part.parameter == block.consumer[0])
        if not reads and weight is not None and (isinstance(module, MAKERS) or weight.numel() > max(weight.shape)):
            return  # something makes this unit and no other
    out = finder_in(free, scope)(block.out)
    size = out.hfc_gate.numel()  # type: ignore[union-attr,operator]
    mixers = [
        name
        for name, module in free.named_modules()
        if any(p is not None and p.numel() == size and max(p.shape) == size for p in module._parameters.values())
        and not isinstance(module, MAKERS)
    ]
    units = "head" if isinstance(block, Attention) else "neuron"
    what = f"a norm over all ({mixers[0]!r})" if mixers else "something that mixes them"
    raise CompressionError(
        f"Cannot cut {block.name!r}: between its {units}s and its output projection {block.out!r} lies {what}, so no "
        f"{units} can be removed without changing the others. Leave it out of the plan."
    )


def built_alike(modules: dict[str, nn.Module], block: Block) -> tuple:
    scope = block.scope
    return (signature(modules[scope]), block.size, block.name[len(scope) :], block.out[len(scope) :])


def signature(module: nn.Module) -> tuple:
    """What two modules must have in common for the same rows of them to belong together."""
    rows = []
    for name, part in module.named_modules():
        numbers = tuple(sorted((k, v) for k, v in vars(part).items() if isinstance(v, int | float | str) and k not in INDEX))
        numbers += (str(vars(part).get("hfc_heads")),)
        shapes = tuple((k, tuple(p.shape)) for k, p in part._parameters.items() if p is not None)
        rows.append((name, plain_kind(part).__name__, numbers, shapes))
    return tuple(rows)


def outputs_of(value: Any, every: bool) -> list[tuple[str, torch.Tensor]]:
    """The first tensor that a module gives; with `every`, all that have a vector where it has one (attention maps have not)."""
    found = tensors_in(value)
    return [(n, t) for n, t in found if every and t.shape[:-1] == found[0][1].shape[:-1]] or found[:1]


def _worst(some: list[tuple[str, torch.Tensor]], others: list[tuple[str, torch.Tensor]]) -> float:
    return max(difference(one, other) for (_, one), (_, other) in zip(some, others, strict=True))


def _find_parts(
    free: nn.Module, block: Block, gate: torch.Tensor, args: Any, kwargs: Any, every: bool = False, lean: bool = False
) -> tuple[Part, ...]:
    """The parts of a block, with the units that their rows belong to; modules are named from `free`."""
    names = list(inspect.signature(free.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    floats = {k: v.clone().requires_grad_() for k, v in given.items() if _is_float(v)} if isinstance(block, Attention) else {}
    positions = [floats.get(name, value) for name, value in zip(names, args, strict=False)]
    named = {name: floats.get(name, value) for name, value in kwargs.items()}

    def run() -> Any:
        with Lean() if lean else nullcontext():
            return [t for _, t in outputs_of(free(*Fresh(tuple(positions))(), *args[len(names) :], **Fresh(named)()), every)]

    def find(units: torch.Tensor) -> dict:
        return coupled(free, gate, units, run, functools.partial(randomize, free), floats)

    columns = unit_columns(block)
    owners = find(columns)
    if isinstance(block, Attention) and 1 < block.num_key_value_heads < block.num_heads:
        for place, group in find(columns // block.groups).items():
            head = owners.get(place, torch.full_like(group, SHARED))
            owners[place] = torch.where((head < 0) & (group >= 0), block.num_heads + group, head)
    shared = isinstance(block, Attention) and block.shared_bias
    whole = {name for name, part in free.named_modules() if shared and isinstance(part, nn.Embedding)}
    if shared == "function":  # everything but the projections is as all heads need it
        whole = {name for name, _ in free.named_modules()} - {
            part.module[len(block.name) :].lstrip(".") for part in block.parts
        }
    parts = []
    for (name, key, dim), owner in owners.items():
        if name == ARGUMENT:
            here = key in [name for name, _, _ in getattr(free, "hfc_arguments", [])]  # type: ignore[union-attr]
            if here or (not shared and torch.equal(owner, torch.arange(len(owner)) % block.size)):
                parts.append(Part("", dim, None, None, owner, key))
        elif name not in whole:
            parts.append(Part(name, dim, None, key, owner))
    return tuple(parts)


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(slab).all()) for _, slab in slabs(tensor.detach()))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
