"""Proof before the cut: every block is cut on a copy, run beside its mask on the same inputs, and compared."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .candidates import parent_of
from .coupling import ARGUMENT, SHARED, coupled
from .cutting import INDEX, Block, Cut, Variant, cut_, unit_columns, variants
from .discover import Attention, FeedForward, Part
from .edits import CompressionError
from .memory import give_back
from .modules import gate_, plain_kind, ungate_
from .probe import difference, map_tensors, tensors_in, tolerance
from .refusals import Unreached, check_part, check_read, check_sharing
from .unreached import Call, Fresh, empty, reached, ways


def prove(model: nn.Module, cuts: list[Cut], run: Callable[[], list[Any]], masked: Callable[[], Any]) -> dict[str, Variant]:
    """Show that each cut equals its mask on this model, or refuse; the model is as before when this returns.

    One pass of the masked model over the proof's inputs, in which every block's place is taken, when its turn comes, by a copy
    that has been cut. Twice over, per block:

    1. *Structure.* On a copy in float32 with all weights drawn anew (so that zero biases, dead units or untrained
       norms hide nothing), the rows that belong to each unit are found from gradients (`coupling.coupled`; once for all
       blocks that are built alike), the cut must equal the mask, and the mask must matter. What is left to guess, where
       the forward reads its sizes, is tried in turn (`cutting.variants`); the first that passes is taken.
    2. *This model.* A copy with the real weights is cut and its output goes on to the next block in place of the
       masked one, so that what a block hands to later ones (a shared position bias, keys and values) is proved too;
       at the end the model's outputs must agree.

    A block that the run does not reach (a tower without its images, an expert that no token is sent to, a head that only
    training uses) is proved in the same two steps by itself, as much around it as runs on inputs made for it
    (`unreached.ways`): the transformers model that holds it, or the block alone. What is around it is then not compared.

    Memory: the model, and one copy of one block in float32 with one of its tensors once more. Where the inputs come from is
    `apply_`'s affair.

    Args:
        model: the model, dense where it will be cut.
        cuts: what stays in each block.
        run: runs the model on a small batch and gives its outputs (`probe.probing`).
        masked: enters the mask of the whole plan; called with no arguments, gives a context manager.

    Returns:
        the proved variant of each block, by name.

    Raises:
        CompressionError: a block ran nowhere, or no guess about it holds.
    """
    more: list[str] = []  # scopes that give more than one tensor to what comes after: LiLT's layers, of words and of boxes
    try:
        return _prove(model, cuts, run, masked, more, {}, False)
    except CompressionError as error:
        if not more:
            raise
        try:
            return _prove(model, cuts, run, masked, [], {}, True)
        except Exception:
            raise error from None


def _prove(
    model: nn.Module,
    cuts: list[Cut],
    run: Callable[[], list[Any]],
    masked: Callable[[], Any],
    more: list[str],
    proved: dict[str, Variant],
    every: bool,
    again: bool = True,
) -> dict[str, Variant]:
    """One pass. `every`: each tensor that a module gives counts, not the first alone. `again`: another one may follow.

    `proved`: what is known already; more is noted there. `more`: gets the scopes that give several tensors.
    """
    modules = dict(model.named_modules())
    groups = _groups(cuts)
    progress = tqdm(total=len(cuts), desc="prove", unit="block", leave=False, disable=None, delay=3)

    given: list[tuple[Call, torch.Tensor]] = []  # to the modules that run now, and the state of random numbers then
    seen: dict[Any, Call] = {}  # what one of the blocks that are built alike was given
    known: dict[Any, Any] = {}  # what was found, and proved, for blocks that are built alike
    taken: set[str] = set()  # blocks whose variant was proved on another one

    anew: set[str] = set()  # blocks that were proved on a later call than their first
    calls: Counter[str] = Counter()

    def remember(scope: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        # as they are before a hook or the forward itself changes them (and Informer draws keys)
        given.append(((Fresh(args)(), Fresh(kwargs)()), torch.get_rng_state()))

    def stand_in(scope: str, group: list[Cut], retry: bool, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        call, state = given.pop()
        if empty(*call):
            return output
        args, kwargs = call
        seen.setdefault(_role(scope, module), call)
        calls[scope] += 1
        more.extend([scope] if len(_outputs(output, True)) > 1 else [])
        for cut in group:
            if cut.block.name not in proved:
                with suppress(Unreached):  # a part of the module that these inputs do not reach
                    proved[cut.block.name], alike = _prove_structure(modules, scope, group, cut, args, kwargs, known, every)
                    taken.update([cut.block.name] if alike else [])
                    progress.update()
                give_back()
        group = [cut for cut in group if cut.block.name in proved]

        def replaced() -> Any:
            double = _copy(module)
            for cut in group:
                cut_(_finder(double, scope), cut, proved[cut.block.name], _Dropped())
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            try:
                return double(*Fresh(args)(), **Fresh(kwargs)())
            finally:
                torch.set_rng_state(after)

        what = f"the cut of {_names(group)}"
        try:
            result = replaced()
            _compare(output, result, what, first_only=True)
        except Exception:  # what was proved on another block, or another call (one without masks), may not be true of this one
            mine = [cut for cut in group if cut.block.name in taken] or (group if retry else [])
            if not mine:
                raise
            for cut in mine:
                proved[cut.block.name], _ = _prove_structure(modules, scope, group, cut, args, kwargs, {}, every)
                anew.update([cut.block.name] if calls[scope] > 1 else [])
                taken.discard(cut.block.name)
            result = replaced()
            _compare(output, result, what, first_only=True)
        return result

    def through(run: Callable[[], list[Any]], groups: dict[str, list[Cut]], retry: bool) -> list[Any]:
        with ExitStack() as hooks:
            for scope, group in groups.items():
                before = _ours(functools.partial(remember, scope))
                after = _ours(functools.partial(stand_in, scope, group, retry))
                for handle in (
                    modules[scope].register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                    modules[scope].register_forward_hook(after, with_kwargs=True),
                ):
                    hooks.callback(handle.remove)
            return run()

    def left() -> list[Block]:
        return [cut.block for cut in cuts if cut.block.name not in proved]

    with masked(), progress:
        ran: set[str] = set()

        def note(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
            ran.update([] if empty(args, kwargs) else [name])

        with ExitStack() as hooks:
            for cut in cuts:
                hook = _ours(functools.partial(note, cut.block.name))
                hooks.callback(modules[cut.block.out].register_forward_pre_hook(hook, with_kwargs=True).remove)
            reference = run()
        result = through(run, groups, again)
    twins = {twin.name for cut in cuts if isinstance(cut.block, FeedForward) for twin in cut.block.twins}
    for cut in cuts:  # the same weights elsewhere, in a module that is built alike and does not run on these inputs
        if cut.block.name in twins - proved.keys() and (_key(modules, cut.block), True) in known:
            proved[cut.block.name] = _named(known[_key(modules, cut.block), True], cut.block.scope)
    missed = ran.intersection(block.name for block in left() if parent_of(block.scope))
    if missed:  # SqueezeBERT says layer.forward(...), which no hook sees: what is above its layers runs them
        cuts = [replace(cut, block=_wider(cut.block)) if cut.block.name in missed else cut for cut in cuts]
        return _prove(model, cuts, run, masked, more, proved, every)
    if anew:  # what was proved on a later call must be true of the earlier ones
        return _prove(model, cuts, run, masked, more, proved, every, again=False)
    _compare(reference, result, "the cut model as a whole")
    with masked():
        for other in ways(model, left, lambda scope: seen.get(_role(scope, modules[scope]))) if left() else ():
            blocks = left()
            reference = reached(other, modules, blocks)
            if reference is not None:
                inner = _groups([cut for cut in cuts if cut.block.name not in proved])
                what = f"the cut of {blocks[0].name!r}, run without the rest,"
                _compare(reference, through(other, {**inner, **groups}, False), what)
    if left():
        raise CompressionError(
            f"Cannot prove a cut of {left()[0].name!r}: it did not run on the proof's inputs, and none are known for it alone. "
            "Pass inputs=... with a batch that uses it, or leave it out of the plan."
        )
    return proved


def _role(scope: str, module: nn.Module) -> tuple:
    """What two modules have in common that are given the same kind of inputs."""
    return re.sub(r"\d+", "", scope.rpartition(".")[2]), _signature(module)


def _wider(block: Block) -> Block:
    """The block, with the module above the one that runs its parts."""
    scope = parent_of(block.scope)
    return replace(block, scope=scope) if scope else block


def _groups(cuts: list[Cut]) -> dict[str, list[Cut]]:
    """Cuts by the outermost scope that holds them: BERT's FFN lies around its attention, so both go together."""
    scopes = {cut.block.scope for cut in cuts}
    outer = {s: min((o for o in scopes if s == o or s.startswith(f"{o}.") or o == ""), key=len) for s in scopes}
    groups: dict[str, list[Cut]] = {}
    for cut in cuts:
        groups.setdefault(outer[cut.block.scope], []).append(cut)
    return groups


def _names(group: list[Cut]) -> str:
    return ", ".join(repr(cut.block.name) for cut in group)


def _ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that copies of the module will not keep."""

    def hook(*args: Any) -> Any:
        return function(*args)

    hook.hfc_stand_in = True  # type: ignore[attr-defined]
    return hook


def _copy(module: nn.Module) -> nn.Module:
    """A copy that no gradient and no hook of ours reaches."""
    double = copy.deepcopy(module)
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


class _Forgetful(dict):
    """In the place of what LeViT remembers in eval mode: whatever is asked for is made anew, with its gradient."""

    def __contains__(self, key: object) -> bool:
        return False


class _Dropped(list[Callable[[], None]]):
    """An undo list of a copy that nobody takes back: what it would hold is as large as the copy."""

    def append(self, undone: Callable[[], None]) -> None:
        pass


def _finder(double: nn.Module, scope: str) -> Callable[[str], nn.Module]:
    def find(name: str) -> nn.Module:
        return double.get_submodule(name[len(scope) :].lstrip(".") if scope else name)

    return find


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every weight drawn anew around its mean, at its own spread but never less than 0.02."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.is_floating_point():
                spread = tensor.std().nan_to_num().item() if tensor.numel() > 1 else 0.0
                noise = torch.randn(tensor.shape, generator=draw).to(tensor.device, tensor.dtype)
                tensor.copy_(noise.mul_(max(spread, 0.02)).add_(tensor.mean()))  # in place: these are as large as the block
                del noise
        for part in module.modules():
            if (
                isinstance(part, nn.modules.batchnorm._BatchNorm)
                and part.running_mean is not None
                and part.running_var is not None
            ):
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=draw))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=draw))
    give_back()


def _prove_structure(
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

    Returns:
        that guess, and whether it was proved on another block that is built alike.
    """
    module = modules[scope]

    def to_float(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float() if tensor.is_floating_point() else tensor

    args, kwargs = map_tensors(args, to_float), map_tensors(kwargs, to_float)
    args, kwargs = Fresh(args), Fresh(kwargs)
    block = cut.block

    def drawn() -> tuple[nn.Module, torch.Tensor]:
        free = _copy(module).float()
        for other in group:
            ungate_(_finder(free, scope)(other.block.out))
        randomize(free)
        return free, gate_(_finder(free, scope)(block.out), consumer=block.consumer)

    broken = [name for name, tensor in module.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CompressionError(
            f"Cannot prove a cut of {block.name!r}: {f'{scope}.{broken[0]}'.lstrip('.')} holds NaN or infinities. If a "
            "training diverged, go back to a checkpoint from before (a lower learning rate, max_grad_norm or bf16 may help)."
        )
    key = _key(modules, replace(block, scope=scope))
    whole = len(cut.kept) == len(cut.kept_kv) * block.groups if isinstance(block, Attention) else True
    if (key, whole) in known:
        variant = _named(known[key, whole], scope)
        for part in variant.parts:
            if part.argument is None:
                check_part(modules, part)
        check_sharing(modules, block, variant.parts)
        return variant, True
    free, gate = drawn()

    def run(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
        torch.default_generator.manual_seed(0)
        return _outputs(part(*args(), **kwargs()), every)

    if key not in known:
        check_read(_finder(free, scope)(block.out), block, lambda: run(free))
        known[key] = _find_parts(free, block, gate, args(), kwargs(), every)

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
    parts = _named(Variant(known[key]), scope).parts
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
            cut_(_finder(free, scope), cut, variant, _Dropped())
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


def _named(variant: Variant, scope: str) -> Variant:
    """What was found in a module, with the paths that its parts have in the model."""
    parts = tuple(replace(part, module=f"{scope}.{part.module}".strip(".")) for part in variant.parts)
    return replace(variant, parts=parts, after=tuple(f"{scope}.{name}".strip(".") for name in variant.after))


MAKERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def _check_separable(free: nn.Module, block: Block, parts: tuple[Part, ...], scope: str) -> None:
    """Refuse units that nothing makes alone, with the norm that mixes them if there is one."""
    for part in parts:
        module = _finder(free, scope)(part.module)
        weight = None if part.argument else module._parameters.get(part.parameter or "weight")
        reads = part.module == block.out and (block.consumer is None or part.parameter == block.consumer[0])
        if not reads and weight is not None and (isinstance(module, MAKERS) or weight.numel() > max(weight.shape)):
            return  # something makes this unit and no other
    out = _finder(free, scope)(block.out)
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


def _key(modules: dict[str, nn.Module], block: Block) -> tuple:
    scope = block.scope
    return (_signature(modules[scope]), block.size, block.name[len(scope) :], block.out[len(scope) :])


def _signature(module: nn.Module) -> tuple:
    """What two modules must have in common for the same rows of them to belong together."""
    rows = []
    for name, part in module.named_modules():
        numbers = tuple(sorted((k, v) for k, v in vars(part).items() if isinstance(v, int | float | str) and k not in INDEX))
        numbers += (str(vars(part).get("hfc_heads")),)
        shapes = tuple((k, tuple(p.shape)) for k, p in part._parameters.items() if p is not None)
        rows.append((name, plain_kind(part).__name__, numbers, shapes))
    return tuple(rows)


def _outputs(value: Any, every: bool) -> list[tuple[str, torch.Tensor]]:
    """The first tensor that a module gives; with `every`, all that have a vector where it has one (attention maps have not)."""
    found = tensors_in(value)
    return [(n, t) for n, t in found if every and t.shape[:-1] == found[0][1].shape[:-1]] or found[:1]


def _worst(some: list[tuple[str, torch.Tensor]], others: list[tuple[str, torch.Tensor]]) -> float:
    return max(difference(one, other) for (_, one), (_, other) in zip(some, others, strict=True))


def _find_parts(
    free: nn.Module, block: Block, gate: torch.Tensor, args: Any, kwargs: Any, every: bool = False
) -> tuple[Part, ...]:
    """The parts of a block, with the units that their rows belong to; modules are named from `free`."""
    names = list(inspect.signature(free.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    floats = {k: v.clone().requires_grad_() for k, v in given.items() if _is_float(v)} if isinstance(block, Attention) else {}
    positions = [floats.get(name, value) for name, value in zip(names, args, strict=False)]
    named = {name: floats.get(name, value) for name, value in kwargs.items()}

    def run() -> Any:
        return [t for _, t in _outputs(free(*Fresh(tuple(positions))(), *args[len(names) :], **Fresh(named)()), every)]

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


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _compare(expected: Any, got: Any, what: str, first_only: bool = False) -> None:
    one, other = tensors_in(expected), tensors_in(got)
    if first_only:
        one, other = one[:1], other[:1]
    for (name, a), (_, b) in zip(one, other, strict=True):
        worst = difference(a, b)
        if worst > tolerance(a.dtype):
            raise CompressionError(
                f"Nothing was changed: {what} differs from its mask by {worst:.1e} of the largest value"
                f"{f' in {name!r}' if name else ''}, more than {tolerance(a.dtype):.0e}."
            )
