"""How long each block takes at each size on this machine: measured, kept on disk with its conditions, used by a solver."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checks import check_count, check_name, shown
from ..cutting import Block, Cut, Variant, cut_
from ..discover import Attention
from ..edits import CompressionError
from ..files import replace_files
from ..measure import conditions_of
from ..probe import quiet_run
from ..structural import Dropped, copy_of, finder_in, signature
from ..timing import take_turns
from .select import count_units, heads_of

logger = logging.get_logger(__name__)

FOLDER = Path(HF_HOME) / "hf_compress" / "latency"
FORMAT = 1
STEP = 0.9  # of neurons, from one size to the next (ZipLM)
MULTIPLE = 32  # of neurons: rows of 32 floats fill a cache line twice, and what kernels multiply at a time
MOST_HEADS = 16  # sizes of an attention
DRIFT = 0.2  # of the time of the whole model, between a table that was kept and now


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every block of a model at every size on a grid.

    Args:
        conditions (`dict`): hardware, threads, dtype, versions and the shapes of the inputs: what the times hold for.
        total (`float`): seconds of the whole model, uncut.
        times (`dict[str, dict[int, float]]`): block -> units that stay (heads, kv groups or neurons) -> seconds of the module
            that holds it. Modules may overlap (BERT's feed-forward block is timed with the attention beside it): differences
            within a block count, not the times themselves.

    Raises:
        CompressionError: a time that is no positive number, or a size that is no whole number of 1 or more.

    Example:

    ```python
    >>> from hf_compress.pruning.latency import LatencyTable
    >>> table = LatencyTable({}, 1.0, {"a": {4: 0.5, 2: 0.3}, "b": {4: 0.4, 2: 0.3}})
    >>> round(table.predict({"a": 2, "b": 4}), 2)
    0.8

    ```
    """

    conditions: dict[str, Any]
    total: float
    times: dict[str, dict[int, float]]

    def __post_init__(self) -> None:
        if not isinstance(self.conditions, Mapping):
            raise CompressionError(f"conditions of a LatencyTable must be a dict, got {shown(self.conditions)}.")
        _check_time(self.total, "the whole model")
        if not isinstance(self.times, Mapping) or not self.times:
            raise CompressionError(f"times of a LatencyTable must be a dict of at least one block, got {shown(self.times)}.")
        for name, times in self.times.items():
            check_name(name, "A block of a LatencyTable")
            if not isinstance(times, Mapping) or not times:
                raise CompressionError(f"The times of {name!r} must be a dict of seconds by size, got {shown(times)}.")
            for size, seconds in times.items():
                check_count(size, f"A size of {name!r}")
                _check_time(seconds, f"{name!r} at size {size}")

    def predict(self, sizes: Mapping[str, int]) -> float:
        """Seconds of the model with these sizes; blocks that are not named are whole."""
        return self.total - sum(times[max(times)] - times[sizes.get(name, max(times))] for name, times in self.times.items())

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, to be used elsewhere (`LatencyTable.load`).

        Raises:
            CompressionError: it cannot be written there.
        """
        path = Path(path)
        data = {"format": FORMAT, **asdict(self)}
        replace_files(path.parent, {path.name: (json.dumps(data, indent=1) + "\n").encode()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """The table that `save` wrote.

        Raises:
            CompressionError: there is none, or it is not whole.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            times = {str(n): {int(k): float(v) for k, v in of.items()} for n, of in data["times"].items()}
            if data["format"] != FORMAT or not times or not all(times.values()):
                raise ValueError("it has another format")
            return cls(dict(data["conditions"]), float(data["total"]), times)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressionError(
                f"{path} is no latency table ({type(error).__name__}: {error}); `LatencyTable.save` writes one."
            ) from error


def _check_time(seconds: Any, what: str) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise CompressionError(f"The time of {what} in a LatencyTable must be seconds above 0, got {shown(seconds)}.")


def grid(block: Block) -> list[int]:
    """The sizes at which a block is timed: all its heads or kv groups (16 of them at most); neurons in steps of 10%.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import discover
    >>> from hf_compress.pruning.latency import grid
    >>> structure = discover(BertModel(BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1,
    ...                                           intermediate_size=256, vocab_size=9)))
    >>> grid(structure.attentions[0]), grid(structure.ffns[0])
    ([1, 2, 3, 4], [32, 64, 96, 128, 160, 192, 224, 256])

    ```
    """
    units = count_units(block)
    if isinstance(block, Attention):
        many = min(units, MOST_HEADS)
        return sorted({max(1, round(units * (i + 1) / many)) for i in range(many)})
    multiple = math.lcm(block.multiple, MULTIPLE if units > 2 * MULTIPLE else max(1, units // 8))
    sizes, size = {units}, float(units)
    while size > multiple:
        size = min(size * STEP, size - multiple)
        sizes.add(max(multiple, int(size) // multiple * multiple))
        size = max(size, multiple)
    return sorted(sizes)


def cut_of(block: Block, units: Sequence[int]) -> Cut:
    """The cut that leaves these units (heads, kv groups or neurons)."""
    if not isinstance(block, Attention):
        return Cut(block, tuple(units))
    heads = tuple(heads_of(block, units))
    return Cut(block, heads, tuple(sorted({head // block.groups for head in heads})))


def latency_table(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: Sequence[Block],
    proved: Mapping[str, Variant],
    *,
    repeats: int = 9,
    cache: bool = True,
) -> LatencyTable:
    """Time every block at every size of its grid, on what the model gives it for these inputs.

    Blocks that are built alike and are given the same shapes are timed once. Sizes take turns in random order; medians.
    What was measured is kept in the cache of the Hub's client, under the conditions and the blocks that it holds for; it is
    measured again where the whole model takes a fifth more or less time than it did.

    Args:
        model (`nn.Module`): the model.
        inputs (`dict`): a batch like those that will be run.
        blocks (`Sequence`): what is timed.
        proved (`dict[str, Variant]`): how each is cut (`surgery.prove_variants`).
        repeats (`int`, defaults to 9): timed passes of each size, after two that are not.
        cache (`bool`, defaults to `True`): look for a table of the same conditions first, and keep this one.
    """
    modules = dict(model.named_modules())
    calls = _calls(model, inputs, {block.scope for block in blocks})
    alike: dict[tuple, list[Block]] = {}
    for block in blocks:
        place = (block.name[len(block.scope) :], block.out[len(block.scope) :], _shapes(calls[block.scope]))
        alike.setdefault((signature(modules[block.scope]), count_units(block), *place), []).append(block)
    conditions = conditions_of(model, inputs)
    digest = hashlib.sha256(json.dumps([conditions, repeats, [str(k) for k in alike]], default=str).encode()).hexdigest()[:24]
    path = FOLDER / f"{digest}.json"
    times: dict[str, dict[int, float]] = {}
    with quiet_run(model) as run:
        total = statistics.median(take_turns([lambda: run(inputs)], repeats, 2)[0])
        if cache and os.path.isfile(path):
            try:
                table = LatencyTable.load(path)
                # one that was made while something else ran says nothing of this machine now
                if set(table.times) == {block.name for block in blocks} and abs(table.total / total - 1) < DRIFT:
                    return table
            except CompressionError:  # torn or of another version: it is made anew
                pass
        progress = tqdm(alike.values(), desc="latency", unit="block", leave=False, disable=None, delay=3)
        for group in progress:
            found = _times(modules[group[0].scope], group[0], proved[group[0].name], calls[group[0].scope], repeats)
            times.update({block.name: found for block in group})
    table = LatencyTable(conditions, total, times)
    if cache:
        try:
            table.save(path)
        except CompressionError as error:  # nothing that was asked for depends on it
            logger.warning(f"The times are not kept for another run. {error}")
    return table


def _times(scope: nn.Module, block: Block, variant: Variant, call: Any, repeats: int) -> dict[int, float]:
    sizes = grid(block)
    doubles = [shrunk(scope, block.scope, [(block, size)], {block.name: variant}) for size in sizes]
    args, kwargs = call
    runs: list[Callable[[], Any]] = [lambda m=m: m(*copy.copy(args), **kwargs) for m in doubles]
    times = take_turns(runs, repeats, 2)
    return {size: statistics.median(own) for size, own in zip(sizes, times, strict=True)}


def shrunk(module: nn.Module, path: str, sizes: Iterable[tuple[Block, int]], proved: Mapping[str, Variant]) -> nn.Module:
    """A copy of a module (at `path` in its model) with blocks of these sizes, whichever units stay: to be timed."""
    return cut_copy(module, path, ((block, range(size)) for block, size in sizes), proved).eval()


def cut_copy(
    module: nn.Module, path: str, kept: Iterable[tuple[Block, Sequence[int]]], proved: Mapping[str, Variant]
) -> nn.Module:
    """A copy of a module (at `path` in its model) with these units of its blocks; `proved` says how they are cut."""
    double = copy_of(module)
    for block, units in kept:
        if len(units) < count_units(block):
            cut_(finder_in(double, path), cut_of(block, units), proved[block.name], Dropped())
    return double


def _calls(model: nn.Module, inputs: Mapping[str, Any], scopes: set[str]) -> dict[str, tuple[Any, Any]]:
    """What the modules are given in a forward pass, the first time."""
    found: dict[str, tuple[Any, Any]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, a, k, n=name: found.setdefault(n, (a, k)) and None, with_kwargs=True
        )
        for name in scopes
    ]
    try:
        with quiet_run(model) as run:
            run(inputs)
    except Exception as error:  # a model may refuse a batch in any way
        raise CompressionError(
            f"{type(model).__name__} does not run on inputs ({', '.join(inputs)}): {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(scopes - found.keys())
    if missing:
        raise CompressionError(f"{missing[0]!r} does not run on these inputs, so it cannot be timed; pass inputs that use it.")
    return found


def _shapes(call: tuple[Any, Any]) -> tuple:
    def shape(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, tuple | list):
            return tuple(shape(v) for v in value)
        return type(value).__name__

    return tuple(shape(v) for v in call[0]), tuple((k, shape(v)) for k, v in sorted(call[1].items()))
