"""`prune_to`: as much as a target needs, as little lost as can be: second-order pruning to a measured speed-up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checks import shown
from ..discover import discover
from ..edits import CompressionError
from ..grams import check_inputs, checked_batches, unlabelled
from ..pictures import save_pruned
from ..plan import Plan
from ..probe import NoInputs
from ..refusals import check_foreign, check_gradients
from ..surgery import apply_, prove_variants
from .calibrate import Calibration
from .choose import choose
from .compensate import DAMPING, losses_of
from .latency import LatencyTable, grid
from .prices import Prices, blocks_for
from .search import TRIES, Database, is_small
from .select import count_units, trial_plan, unit_of


@dataclass(frozen=True)
class Pruned:
    """What `prune_to` did.

    Args:
        plan (`Plan`): the cuts, with the weights that belong to them.
        target (`str`): `"speedup"`, `"macs"`, `"parameters"` or `"bytes"`.
        asked (`float`): how many times faster or smaller.
        achieved (`float`): what came out: for a speed-up, the median over pairs of runs that took turns.
        interval (`tuple[float, float]`, *optional*): 95%, of a measured speed-up.
        sizes (`dict[str, list[int]]`): by block, units that stay, and that there were.
        losses (`dict[str, float]`): by block that is cut, the share that is lost, after compensation, of what its output should
            vary by for the model to go on as the dense one does: with what could not be made up for of earlier blocks.
        conditions (`dict`): hardware, threads, dtype, shapes and versions.
        seconds (`float`): that it took.
        units (`dict[str, str]`): by block, what is counted: `"heads"`, `"kv groups"` or `"neurons"`.
        curves (`dict[str, list[list]]`): by block, what the sizes were chosen from: pairs of units that stay and the share of
            what the block's output varies by that is then lost, of the dense model, after compensation. Outputs are weighed by
            how much the predictions depend on them.
    """

    plan: Plan
    target: str
    asked: float
    achieved: float
    interval: tuple[float, float] | None
    sizes: dict[str, list[int]]
    losses: dict[str, float]
    conditions: dict[str, Any]
    seconds: float
    units: dict[str, str] = field(default_factory=dict, repr=False)
    curves: dict[str, list[list[float]]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the plan without its tensors."""
        data = {key: value for key, value in vars(self).items() if key != "plan"}
        return {
            **data,
            "interval": None if self.interval is None else list(self.interval),
            "plan": self.plan.to_dict(spans=True),
        }

    def save(self, folder: str | os.PathLike) -> None:
        """The plan (`Plan.save`) and `pruned.json`, into a folder, and where matplotlib is installed what they tell.

        `kept.png`: what stays of every block. `error.png`: what every block loses at every size, and the size that was chosen.
        """
        self.plan.save(folder)
        save_pruned(folder, self.to_dict())

    def __str__(self) -> str:
        got = f"{self.achieved:.2f}" + ("" if self.interval is None else f" ({self.interval[0]:.2f}-{self.interval[1]:.2f})")
        lines = [f"{self.target}: asked {self.asked:.2f}, achieved {got}, in {self.seconds:.0f} s"]
        width = max((len(name) for name in self.sizes), default=0)
        for name, (left, there) in self.sizes.items():
            lines.append(f"  {name:<{width}}  {left:>5} of {there:<5}  {self.losses.get(name, 0.0):6.1%} lost")
        return "\n".join(lines)


def prune_to(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    speedup: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    bytes: float | None = None,
    inputs: Mapping[str, Any] | None = None,
    heads: bool = True,
    neurons: bool = True,
    damping: float = DAMPING,
    tries: int = TRIES,
    table: LatencyTable | None = None,
) -> Pruned:
    """Prune a model, in place and without training, until it is so many times faster (or smaller), and lose little.

    1. What every block loses at every size, from second moments of what enters its output projection (`pruning.surgeon`),
       weighed by how much the model's predictions depend on it (`pruning.sensitivity`).
    2. What every block costs at every size: measured on `inputs`, on this machine (`pruning.latency`).
    3. The sizes that lose least for the cost (`pruning.solver`), with weights of the blocks tuned on what a model of such
       sizes loses on the batches (`pruning.search`); a model of these sizes is timed beside the dense one, and others are
       chosen until what is achieved is what was asked, within 2%.
    4. Layer by layer, the units that go, and new weights for those that stay (`pruning.compensate`).

    Args:
        model (`nn.Module`): a transformers model, float.
        batches (`Iterable[dict]`): calibration batches, as for `model(**batch)`; labels are not needed. 512 sentences do.
        speedup (`float`, *optional*): how many times faster, above 1. Give this or one of the next three.
        macs, parameters, bytes (`float`, *optional*): how many times fewer.
        inputs (`dict`, *optional*): a batch of the size and length that will be run; the first calibration batch by default.
        heads, neurons (`bool`, default to `True`): what may go.
        damping (`float`, defaults to 0.01): how strongly new weights are held to the old ones; see `surgeon.Regression`.
        tries (`int`, defaults to 100): choices of sizes that are run on about 256 rows of the batches (whole batches), each for
            about a forward pass of the dense model; 0 takes the first. Not where projections for all sizes would need more than
            2 GiB.
        table (`LatencyTable`, *optional*): times of another device, made there; the speed-up is then what the table predicts.

    Returns:
        `Pruned`: the plan and what was measured; `print` it, or `.save(folder)`.

    Raises:
        CompressionError: not exactly one target, a target that nothing meets, a model that nothing can be cut from, batches
            that it does not run on. Nothing has changed then.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import prune_to
    >>> _ = torch.manual_seed(0)
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> batch = {"input_ids": torch.randint(5, 99, (8, 16))}
    >>> pruned = prune_to(model, [batch], parameters=1.5)
    >>> pruned.achieved >= 1.5
    True

    ```
    """
    wanted = {"speedup": speedup, "macs": macs, "parameters": parameters, "bytes": bytes}
    target, ratio = one_target(wanted)
    [pruned], inputs = _family(model, batches, target, [ratio], inputs, heads, neurons, damping, tries, table)
    try:
        apply_(model, pruned.plan)
    except NoInputs:  # none can be made for it
        apply_(model, pruned.plan, inputs=inputs)
    return pruned


def prune_family(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    speedups: Sequence[float],
    *,
    inputs: Mapping[str, Any] | None = None,
    heads: bool = True,
    neurons: bool = True,
    damping: float = DAMPING,
    tries: int = TRIES,
    table: LatencyTable | None = None,
) -> list[Pruned]:
    """Plans for several speed-ups from one calibration; the model is not changed. See `prune_to`.

    Whether the smallest sizes meet every speed-up is looked at first, before anything is calibrated: one that cannot be met is
    refused before there are plans for the others.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import apply_, prune_family
    >>> from hf_compress.pruning.latency import LatencyTable
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> name = "encoder.layer.0"
    >>> table = LatencyTable({}, 2.0, {name: {64: 1.5, 32: 1.0, 8: 0.5}})  # of another device
    >>> family = prune_family(model, [{"input_ids": torch.randint(5, 99, (4, 8))}], [1.2, 1.9], heads=False, table=table)
    >>> [pruned.sizes[name] for pruned in family], model.config.intermediate_size
    ([[32, 64], [8, 64]], 64)

    ```
    """
    if isinstance(speedups, str | bytes) or not isinstance(speedups, Sequence) or not speedups:
        raise CompressionError(f"speedups must be a sequence of numbers above 1, got {speedups!r}.")
    ratios = [one_target({"speedup": value})[1] for value in speedups]
    return _family(model, batches, "speedup", ratios, inputs, heads, neurons, damping, tries, table)[0]


def one_target(wanted: Mapping[str, Any]) -> tuple[str, float]:
    given = {name: value for name, value in wanted.items() if value is not None}
    if len(given) != 1:
        raise CompressionError(f"Give exactly one of {', '.join(wanted)}, got {', '.join(given) or 'none'}.")
    name, value = next(iter(given.items()))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value < float("inf"):
        raise CompressionError(f"{name} is how many times faster or smaller, and must be a number above 1, got {value!r}.")
    return name, float(value)


def _family(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    target: str,
    ratios: Sequence[float],
    inputs: Mapping[str, Any] | None,
    heads: bool,
    neurons: bool,
    damping: float,
    tries: int,
    table: LatencyTable | None,
) -> tuple[list[Pruned], dict[str, Any]]:
    """What was pruned, and the batch that was timed."""
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise CompressionError(f"model must be a model (a torch.nn.Module), got {type(model).__name__}.")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise CompressionError(f"damping must be a number above 0, got {damping!r}.")
    if isinstance(tries, bool) or not isinstance(tries, int) or tries < 0:
        raise CompressionError(f"tries is how many choices of sizes are run, 0 or more, got {tries!r}.")
    if table is not None and (not isinstance(table, LatencyTable) or target != "speedup"):
        raise CompressionError(f"table is a LatencyTable, for a speed-up; got {type(table).__name__} for {target}.")
    for name, value in (("heads", heads), ("neurons", neurons)):
        if not isinstance(value, bool):
            raise CompressionError(f"{name} must be True or False (whether {name} may go), got {shown(value)}.")
    model = getattr(model, "_orig_mod", model)  # torch.compile
    check_foreign(model)
    check_gradients(model, "prune_to" if len(ratios) == 1 else "prune_family")
    batches = checked_batches(batches)
    check_inputs(inputs)
    structure = discover(model)
    blocks = blocks_for(model, structure, heads, neurons)
    calibration = Calibration(model, structure, blocks, batches)
    inputs = calibration.placed(calibration.batches[0] if inputs is None else unlabelled(model, inputs))
    trial = trial_plan(model, structure, blocks)
    try:
        proved = prove_variants(model, trial)
    except NoInputs:  # slower: this is a whole batch
        proved = prove_variants(model, trial, inputs)
    grids = {block.name: sorted(grid(block) if table is None else table.times.get(block.name, ())) for block in blocks}
    database: Database | None = {} if tries and is_small(calibration, grids) else None
    prices = Prices(model, inputs, blocks, proved, target, table)
    for ratio in ratios:  # what cannot be met is refused before the long work
        prices.check(ratio)
    found = losses_of(calibration, damping, grids, database)
    blocks = calibration.blocks
    prices.only(blocks)
    losses = {block.name: found[block.name].at(prices.costs[block.name]) for block in blocks}
    units = {block.name: unit_of(block) for block in blocks}
    known = {block.name: found[block.name].shares(prices.costs[block.name]) for block in blocks}
    family = []
    for ratio in ratios:
        chosen = choose(calibration, prices, losses, database, ratio, tries, damping)
        short = prices.falls_short(chosen.sizes, chosen.achieved, ratio)
        if short is not None:
            raise CompressionError(short)
        family.append(
            Pruned(
                chosen.plan,
                target,
                ratio,
                chosen.achieved,
                chosen.interval,
                {block.name: [chosen.sizes[block.name], count_units(block)] for block in blocks},
                chosen.lost,
                prices.conditions,
                time.perf_counter() - start,
                units,
                known,
            )
        )
    return family, inputs
