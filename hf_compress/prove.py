"""Proof before the cut: every block is cut on a copy, run beside its mask on the same inputs, and compared."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .candidates import parent_of
from .cutting import Block, Cut, Variant, cut_
from .discover import FeedForward
from .edits import CompressionError
from .memory import give_back
from .probe import difference, tensors_in, tolerance
from .refusals import Unreached
from .structural import Dropped, built_alike, copy_of, finder_in, named_in, outputs_of, prove_structure, shared, signature
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

    Memory: the model, and one copy of one block whose large Linears are in bfloat16 (`lean.Lean`; what is not lean in
    float32, with one of its tensors once more); then what stays of the block. Where the inputs come from is `apply_`'s
    affair.

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
        except Exception:  # then the first reason is the one to tell
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
        more.extend([scope] if len(outputs_of(output, True)) > 1 else [])
        for cut in group:
            if cut.block.name not in proved:
                give_back()
                with suppress(Unreached):  # a part of the module that these inputs do not reach
                    proved[cut.block.name], alike = prove_structure(modules, scope, group, cut, args, kwargs, known, every)
                    taken.update([cut.block.name] if alike else [])
                    progress.update()
        give_back()  # what the masked module has made
        group = [cut for cut in group if cut.block.name in proved]

        def replaced() -> Any:
            double = copy_of(module, shared(module))  # slicing makes new weights, as many as stay
            for cut in group:
                cut_(finder_in(double, scope), cut, proved[cut.block.name], Dropped())
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
                proved[cut.block.name], _ = prove_structure(modules, scope, group, cut, args, kwargs, {}, every)
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
        if cut.block.name in twins - proved.keys() and (built_alike(modules, cut.block), True) in known:
            proved[cut.block.name] = named_in(known[built_alike(modules, cut.block), True], cut.block.scope)
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
    return re.sub(r"\d+", "", scope.rpartition(".")[2]), signature(module)


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
