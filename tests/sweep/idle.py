"""What a plan cuts and a batch does not run: found, and run by itself, so that there too cut and mask can be compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import hf_compress as hc
from hf_compress.probe import example_inputs

from .load import flat

Call = Callable[[Any], list[torch.Tensor]]


def idle_calls(model: Any, plan: hc.Plan, run: Callable[[], Any]) -> tuple[dict[str, Call], list[str]]:
    """(a call for every part of the model that has cut blocks which `run` does not use, by its name; blocks without one).

    The widest part that runs on inputs of its own: a transformers model inside, or the module around the block on random rows.
    """
    structure = hc.discover(model)
    blocks = {b.name: b for b in (*structure.attentions, *structure.ffns)}
    wanted = [blocks[n] for e in plan if (n := getattr(e, "attention", getattr(e, "ffn", None))) in blocks]
    left = {b.name: b for b in wanted if b.name not in _ran(model, wanted, run)}
    calls: dict[str, Call] = {}
    renumbered = any(isinstance(edit, hc.KeepLayers) for edit in plan)  # what is in a layer has another name then, or is gone
    for name, module in model.named_modules():
        inside = [b for b in left.values() if b.scope == name or b.scope.startswith(f"{name}.")]
        if renumbered and any(word.isdigit() for word in name.split(".")):
            continue
        if not inside or not (isinstance(module, PreTrainedModel) or any(b.scope == name for b in inside)) or not name:
            continue
        for inputs in _inputs(module):
            call = partial(_call, name=name, inputs=inputs)
            try:
                reached = _ran(model, inside, partial(call, model))
            except Exception:  # it takes something else
                continue
            if reached:
                calls[name] = call
                left = {key: b for key, b in left.items() if key not in reached}
                break
    return calls, sorted(left)


def _ran(model: Any, blocks: list[Any], run: Callable[[], Any]) -> set[str]:
    """The blocks whose output projection reads at least one row."""
    found: set[str] = set()

    def note(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if any(t.numel() for t in flat([*args, *kwargs.values()])):
            found.add(name)

    hooks = [
        model.get_submodule(b.out).register_forward_pre_hook(partial(note, b.name), with_kwargs=True)
        for b in blocks
    ]  # fmt: skip
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _inputs(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    for length in (12, 4) if isinstance(module, PreTrainedModel) else ():
        with suppress(Exception):  # then as any other module
            yield example_inputs(module, length=length)
    width = next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), 1)
    draw = torch.Generator().manual_seed(17)
    named = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in named if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    yield {name: torch.randn(2, 5, width, generator=draw) for name in needed}


def _call(model: Any, name: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return flat(model.get_submodule(name)(**inputs))
