"""Where exits can sit in a model that is no single list of like layers: found from one run of it, not from names.

An exit needs a place where all that the model has made of its input so far passes in one tensor. In the graph that autograd
records, that tensor lies on every path from the input to the logits (it dominates the input: Lengauer and Tarjan 1979). So
inside a residual block, or beside one branch of two, there is none; after a block of a ResNet, a layer of a stage of a Swin,
each run of ALBERT's one layer there is. Of those places the ones are taken where an entry of a list of modules ends, the
innermost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..discover import discover
from ..probe import quiet_run
from .leaving import main_of
from .trees import mapped, tensors_in


@dataclass
class Ran:
    """One run of one module."""

    name: str
    start: int  # when it began and ended, counted in calls and returns
    stop: int
    takes: torch.Size | None  # the first floating-point tensor that it is given
    gives: torch.Size | None  # the first tensor
    node: Any  # where that was made, in autograd's graph

    def holds(self, other: Ran) -> bool:
        return self.start < other.start and other.stop < self.stop


@dataclass
class Chain:
    """The layers of a model as a chain of runs."""

    layers: list[list[str]]  # of each layer the modules that it runs, one after the other; the last gives the hidden states
    shapes: list[torch.Size]  # of the hidden states after each layer
    sides: list[int]  # 0, or 1 for the decoder of two
    passed_by: str | None = None  # an entry of a list that is not called, though what it holds is


def find_chain(model: Any, batch: Mapping[str, Any], longer: Mapping[str, Any]) -> Chain:
    """The layers of a classifier that runs on `batch`, and on `longer` with more rows; none where no exit could sit.

    Example:

    ```python
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from hf_compress.exits.chain import find_chain
    >>> from hf_compress.probe import example_inputs
    >>> model = ResNetForImageClassification(ResNetConfig(
    ...     embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_channels=3,
    ... )).eval()
    >>> find_chain(model, example_inputs(model), example_inputs(model, 3)).layers
    [['resnet.encoder.stages.0.layers.0'], ['resnet.encoder.stages.0.layers.1'], ['resnet.encoder.stages.1.layers.0']]

    ```
    """
    modules = dict(model.named_modules())
    ran, logits, leaves = _trace(model, modules, batch, True)
    if logits is None or logits.grad_fn is None or not leaves:
        return Chain([], [], [])
    rows = len(logits)
    entries = [run for run in ran if _is_entry(run.name, modules) and run.node is not None and _has_rows(run.gives, rows)]
    through = list(_through(logits.grad_fn, [run.node for run in entries], leaves))
    entries = [(run, side) for run, side in zip(entries, through, strict=True) if side is not None]
    whole = [(run, side) for run, side in entries if next(modules[run.name].children(), None) is not None]
    ends = sorted(whole if len(whole) > 1 else entries, key=lambda end: end[0].stop)
    ends = _last_of_each(_of_one_size(ends, modules, {layer.name for layer in discover(model).layers}))
    if len(ends) < 2:
        return Chain([], [], [], _passed_by(modules, {run.name for run in ran}))
    return _chain(model, modules, longer, ran, ends)


def _is_entry(name: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, last = name.rpartition(".")
    return last.isdigit() and isinstance(modules[parent], nn.ModuleList | nn.Sequential)


def _has_rows(shape: torch.Size | None, rows: int) -> bool:
    return shape is not None and len(shape) > 2 and shape[0] == rows


def _of_one_size(ends: list[tuple[Ran, int]], modules: Mapping[str, nn.Module], layers: set[str]) -> list[tuple[Ran, int]]:
    """The innermost, but no parts of what `discover` calls a layer, or of a module whose like is one of the innermost."""
    inner = [end for end in ends if not any(end[0].holds(other) for other, _ in ends)]
    kinds = {type(modules[run.name]) for run, _ in inner} - {nn.Sequential}
    wholes = [
        end for end in ends if end not in inner and (end[0].name in layers or type(modules[end[0].name]) in kinds)
    ]  # fmt: skip
    wholes = [end for end in wholes if not any(end[0].holds(other) for other, _ in wholes)]
    return [end for end in ends if end in wholes or (end in inner and not any(other.holds(end[0]) for other, _ in wholes))]


def _passed_by(modules: Mapping[str, nn.Module], ran: set[str]) -> str | None:
    lists = nn.ModuleList | nn.Sequential | nn.ModuleDict
    return next(
        (
            name for name, module in modules.items()
            if name not in ran and not isinstance(module, lists) and _is_entry(name, modules)
            and any(other.startswith(f"{name}.") for other in ran)
        ),
        None,
    )  # fmt: skip


def _last_of_each(ends: list[tuple[Ran, int]]) -> list[tuple[Ran, int]]:
    """One end a layer, where a layer is entries of several lists that run in turn (XLM: `layer_norm1[i]`, `layer_norm2[i]`)."""

    def layer(end: tuple[Ran, int]) -> tuple[str, str]:
        parent, _, index = end[0].name.rpartition(".")
        return parent.rpartition(".")[0], index

    def is_last(i: int) -> bool:
        return i + 1 == len(ends) or layer(ends[i]) != layer(ends[i + 1]) or ends[i][0].name == ends[i + 1][0].name

    return [end for i, end in enumerate(ends) if is_last(i)]


def _chain(
    model: Any, modules: Mapping[str, nn.Module], longer: Mapping[str, Any], ran: list[Ran], ends: list[tuple[Ran, int]]
) -> Chain:
    """The ends, and what else of some size runs between them on tensors that have rows: the layer's other steps."""
    again, logits, _ = _trace(model, modules, longer, False)
    same = logits is not None and [run.name for run in again] == [run.name for run in ran]
    grows = [_grows(one, two) for one, two in zip(ran, again, strict=True)] if same else [False] * len(ran)
    layers, before = [], -1
    for end, _ in ends:
        steps: list[Ran] = []
        for run, grew in sorted(zip(ran, grows, strict=True), key=lambda pair: pair[0].start):
            inside = before < run.start and run.stop <= end.stop and not run.holds(end)
            sized = (
                grew and any(True for _ in modules[run.name].children()) and any(True for _ in modules[run.name].parameters())
            )
            if run is end or (before >= 0 and inside and sized and not any(step.holds(run) for step in steps)):
                steps.append(run)
        layers.append([step.name for step in sorted(steps, key=lambda step: step.start)])
        before = end.stop
    shapes: list[Any] = [end.gives for end, _ in ends]
    return Chain(layers, shapes, [side for _, side in ends])


def _grows(one: Ran, two: Ran) -> bool:
    """Whether what a module takes and gives has entries of rows: both are longer, and nothing else, with one row more."""
    pairs = ((one.takes, two.takes), (one.gives, two.gives))
    return all(a and b and b[0] > a[0] and a[1:] == b[1:] for a, b in pairs)


def _trace(
    model: Any, modules: Mapping[str, nn.Module], batch: Mapping[str, Any], graph: bool
) -> tuple[list[Ran], Any, list[Any]]:
    """Every run of every module, the logits, and where in autograd's graph the model's inputs enter it."""
    ran: list[Ran] = []
    begun: list[Ran] = []
    leaves: list[torch.Tensor] = []
    clock = iter(range(10**9))

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            takes = next((t.shape for _, t in tensors_in((args, kwargs)) if t.is_floating_point() and t.ndim), None)
            begun.append(Ran(name, next(clock), -1, takes, None, None))

        return hook

    def leave(module: nn.Module, args: Any, outputs: Any) -> None:
        run = begun.pop()
        found = next((t for _, t in tensors_in(outputs)), None)
        run.stop = next(clock)
        run.gives, run.node = (None, None) if found is None else (found.shape, found.grad_fn)
        ran.append(run)

    def embed(module: nn.Module, args: Any, outputs: Any) -> Any:
        made = main_of(outputs)
        leaves.append(made.detach().requires_grad_())
        given = leaves[-1].clone()
        return mapped(outputs, lambda path, tensor: given if tensor is made else tensor)

    main = batch.get("input_ids", batch.get(getattr(model, "main_input_name", "input_ids")))
    batch = dict(batch)
    with ExitStack() as hooks:
        if graph and isinstance(main, torch.Tensor) and main.is_floating_point():
            leaves.append(main.detach().requires_grad_())
            batch[model.main_input_name] = leaves[0].clone()
        elif graph:
            for module in _embeddings(model, modules):
                hooks.callback(module.register_forward_hook(embed).remove)
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        with quiet_run(model) as run, torch.inference_mode(False), torch.set_grad_enabled(graph):
            outputs = run(batch)
    return ran, getattr(outputs, "logits", None), leaves


def _embeddings(model: Any, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules that turn token ids into vectors: of an encoder-decoder two may share one table."""
    tables: list[nn.Module] = [m for m in modules.values() if isinstance(m, nn.Embedding)]
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return tables[:1]
    return [m for m in modules.values() if m._parameters.get("weight") is weight and _takes_ids(m)] or tables[:1]


def _takes_ids(module: nn.Module) -> bool:
    return "mbedding" in type(module).__name__ or isinstance(module, nn.Embedding)


def _through(root: Any, nodes: list[Any], leaves: list[torch.Tensor]) -> Iterator[int | None]:
    """For each node, the last of the leaves from which every path to the root passes through it; None where there is none.

    By counting paths: the paths to the node times those from it are all that there are.
    """
    order = _ordered(root)
    to = {root: 1}
    for node in order:
        for follower, _ in node.next_functions:
            if follower is not None:
                to[follower] = to.get(follower, 0) + to[node]
    found: dict[Any, int] = {}
    for side, leaf in enumerate(leaves):
        since: dict[Any, int] = {}
        for node in reversed(order):
            own = int(getattr(node, "variable", None) is leaf)
            since[node] = own + sum(since[follower] for follower, _ in node.next_functions if follower is not None)
        for node in nodes:
            if node in since and since[root] and to[node] * since[node] == since[root]:
                found[node] = side
    for node in nodes:
        yield found.get(node)


def _ordered(root: Any) -> list[Any]:
    """All nodes of a graph, each before those that it was made from."""
    done: set[Any] = set()
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend(
                (follower, False) for follower, _ in node.next_functions if follower is not None and follower not in done
            )
    return order[::-1]
