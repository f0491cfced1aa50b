"""Runs that reach what a model's inputs do not: a tower without its images, an expert that no token is sent to."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .cutting import Block
from .discover import Attention
from .examples import Batch, candidates
from .modules import width
from .probe import quiet_run, tensors_in

Run = Callable[[], list[Any]]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# what a forward calls the rows that it works on, and what it attends to beside them
ROWS = re.compile(r"^(x|inputs?|quer(y|ies)|target|tgt|src|hidden\w*|features?)$|(_states?|_input|_feats|_features|_embeds)$")
OTHERS = re.compile(r"^(keys?|values?|memory|context)$|^(encoder|key_value|cross_attention)_(hidden_)?states$")
# what else it may take that has nothing to do with heads or neurons; what is not listed here could tell them apart
LEFT_OUT = re.compile(r"^past_key_values?$|^cache_position$|^position_ids$|^output_|^use_cache$|^layer_idx$|dropout|^training$")
MASK = re.compile(r"mask$")  # may hold a bias of every head (ALiBi, Phi-4's sounds)


def ways(model: nn.Module, left: Callable[[], list[Block]], alike: Callable[[str], Call | None]) -> Iterator[Run]:
    """Runs that may reach blocks which have not run; the caller sees which do (`reached`), and stops asking when none is left.

    1. Every transformers model that holds one, the outermost first, on batches that are made for it (`examples.candidates`).
    2. The block by itself, on what one that is built alike, in the same place of its layer, was given.
    3. The block by itself, on random rows of its width, if its forward asks for nothing that could tell heads or neurons
       apart: a position bias, say, or a mask, which may hold one.

    Args:
        model: the model.
        left: the blocks that have not run yet.
        alike: what the double of a module was given, if one has run.
    """
    for name, part in list(model.named_modules()):
        if isinstance(part, PreTrainedModel):
            ran: set[frozenset[str]] = set()
            for batch in _batches(part):
                if not any(not name or block.scope == name or block.scope.startswith(f"{name}.") for block in left()):
                    break
                if frozenset(batch) not in ran:
                    yield partial(_run_model, part, batch, ran)
    modules = dict(model.named_modules())
    for scope in dict.fromkeys(block.scope for block in left()):
        call = alike(scope)
        if call is not None:
            yield partial(_run_module, modules[scope], [call])
        inside = [block for block in left() if block.scope == scope or block.scope.startswith(f"{scope}.")]
        for calls in _made(modules, scope, inside):
            if any(block.scope == scope for block in left()):
                yield partial(_run_module, modules[scope], calls)


class Fresh:
    """Arguments of a call that is made many times: a cache, which every call fills, is copied each time."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        if isinstance(self.value, dict):
            return {k: copy.deepcopy(v) if isinstance(v, Cache) else v for k, v in self.value.items()}
        return type(self.value)(copy.deepcopy(v) if isinstance(v, Cache) else v for v in self.value)


def _batches(part: nn.Module) -> Iterator[Batch]:
    try:
        yield from candidates(part)
        yield from (batch for batch in candidates(part, length=4) if "input_ids" in batch)  # CSM: a token of each book
    except Exception:  # no batch is known for a part, or what the config names is not there
        return


def _run_model(part: nn.Module, batch: Batch, ran: set[frozenset[str]]) -> list[Any]:
    with quiet_run(part) as run:
        given = [run(batch)]
    ran.add(frozenset(batch))
    return given


def _run_module(module: nn.Module, calls: list[Call]) -> list[Any]:
    given = []
    with quiet_run(module):
        for args, kwargs in calls:
            torch.default_generator.manual_seed(0)
            given.append(module(*Fresh(args)(), **Fresh(kwargs)()))
    return given


def reached(run: Run, modules: Mapping[str, nn.Module], blocks: list[Block]) -> list[Any] | None:
    """What a run gives, if it works and one of the blocks runs in it."""
    found: list[str] = []

    def note(scope: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not empty(args, kwargs):
            found.append(scope)

    with ExitStack() as hooks:
        for scope in {block.scope for block in blocks}:
            hooks.callback(modules[scope].register_forward_pre_hook(partial(note, scope), with_kwargs=True).remove)
        try:
            given = run()
        except Exception:  # a module may refuse what was made for it in any way
            return None
    return given if found else None


def empty(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module is called without a single row: the expert of no token."""
    rows = tensors_in((*args, *kwargs.values()))
    return bool(rows) and not rows[0][1].numel()


def _made(modules: Mapping[str, nn.Module], scope: str, blocks: list[Block]) -> Iterator[list[Call]]:
    """Random rows for a module that takes little else, with and without what it may attend to beside them."""
    own = [block for block in blocks if block.scope == scope]
    ins = [modules[part.module] for block in own[:1] for part in block.parts if part.dim == 0 and part.parameter is None]
    if not ins:
        return
    parameters = inspect.signature(modules[scope].forward).parameters.values()
    taken = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    others = [p for p in taken if OTHERS.search(p.name)]
    rows = [p for p in taken if ROWS.search(p.name) and p not in others]
    heads = any(isinstance(block, Attention) for block in blocks)
    for p in taken:
        known = LEFT_OUT.search(p.name) or (MASK.search(p.name) and not heads)
        if p not in (*rows, *others) and (p.default is p.empty or not known):
            return
    draw = torch.Generator().manual_seed(0)
    weight = next(modules[scope].parameters())
    for shape in ((2, 5), (6,)):  # experts take rows without a batch
        calls: list[Call] = []
        for chosen in ([*rows, *others], [p for p in (*rows, *others) if p.default is p.empty or p is rows[0]]):
            sizes = {p.name: (*shape, width(ins[-1 if p in others else 0], 1)) for p in chosen}
            made = {name: torch.randn(size, generator=draw).to(weight.device, weight.dtype) for name, size in sizes.items()}
            if not calls or made.keys() != calls[0][1].keys():
                calls.append(((), made))
        if rows:
            yield calls
