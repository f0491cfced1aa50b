"""What the sizes of blocks cost, and the sizes that meet a target: chosen, timed beside the dense model, corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.utils import logging

from ..cutting import Block, Variant
from ..edits import CompressionError
from ..measure import macs_of, numbers_of
from ..probe import quiet_run
from ..timing import steady_speedup
from .calibrate import of_the_first
from .compensate import has_own_weights
from .latency import LatencyTable, grid, latency_table, shrunk
from .select import count_units, nothing_to_choose
from .solver import solve

logger = logging.get_logger(__name__)

WITHIN = 0.02  # of what was asked: then no other sizes are tried
WIDTH = 0.01  # of the interval, to either side
PAIRS = 15  # of runs, before it is asked whether they are enough
LONGEST = 30.0  # seconds that a model of some sizes is timed
SHORT = 8.0  # of one on the way to another
TRIES = 6  # of sizes


def blocks_for(model: nn.Module, structure: Any, heads: bool, neurons: bool) -> list[Block]:
    """What can be cut and compensated."""
    blocks: list[Block] = [*(structure.attentions if heads else ()), *(structure.own_ffns if neurons else ())]
    if not blocks:
        raise CompressionError(nothing_to_choose(model, structure, "heads or neurons"))
    able = [block for block in blocks if has_own_weights(model, structure, block)]
    if not able:
        raise CompressionError(
            f"No block of this {type(model).__name__} has a Linear of its own as output projection, which second-order pruning "
            "needs; plan_pruning takes the others."
        )
    if len(able) < len(blocks):
        logger.warning(
            f"{len(blocks) - len(able)} blocks stay whole: experts, or blocks without a Linear of their own at their end."
        )
    found = [block for block in able if count_units(block) > 1]
    if not found:
        raise CompressionError(
            f"Every block of this {type(model).__name__} that could be cut has a single head, kv group or neuron, which stays. "
            "Let both heads and neurons go, or remove layers (KeepLayers)."
        )
    return found


class Prices:
    """What sizes cost, and the model of some sizes beside the dense one."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        blocks: Sequence[Block],
        proved: Mapping[str, Variant],
        target: str,
        table: LatencyTable | None,
    ) -> None:
        self.model, self.inputs, self.blocks, self.proved, self.target = model, inputs, blocks, proved, target
        self.is_predicted = table is not None
        self.bias = 1.0  # of the table: the share that is asked of it, of the share that is to go
        if target == "speedup":
            known: LatencyTable = of_the_first(lambda: table or latency_table(model, inputs, blocks, proved))
            unknown = [block.name for block in blocks if block.name not in known.times]
            wrong = [b.name for b in blocks if b.name in known.times and max(known.times[b.name]) != count_units(b)]
            if unknown or wrong:
                raise CompressionError(f"The latency table is of another model: it does not fit {(unknown + wrong)[0]!r}.")
            self.costs, self.total, self.conditions = known.times, known.total, known.conditions
        else:
            self.costs = {block.name: self._counts(block) for block in blocks}
            self.total, self.conditions = self._count(model), {}
        self.fixed = self.total - sum(self.costs[block.name][count_units(block)] for block in blocks)
        if self.is_predicted and self._least() <= 0:
            raise CompressionError(
                f"The latency table cannot be right: with the smallest sizes it predicts {self._least():.4g} seconds, of "
                f"{self.total:.4g}. A block cannot save more than the whole model takes."
            )

    def only(self, blocks: Sequence[Block]) -> None:
        """Leave all but these blocks whole."""
        self.blocks = blocks
        self.costs = {block.name: self.costs[block.name] for block in blocks}
        self.fixed = self.total - sum(self.costs[block.name][count_units(block)] for block in blocks)

    def _counts(self, block: Block) -> dict[int, float]:
        """Parameters, bytes or MACs of the module around a block, by size: they change linearly, so two sizes say all."""
        units = count_units(block)
        ends = []
        for size in (1, units):
            ends.append(
                self._count(shrunk(self.model, "", [(block, size)], self.proved)) if size < units else self._count(self.model)
            )
        slope = (ends[1] - ends[0]) / (units - 1)
        return {size: ends[1] - slope * (units - size) for size in grid(block)}

    def _count(self, model: nn.Module) -> float:
        if self.target == "macs":
            try:
                with quiet_run(model) as run:
                    return float(macs_of(model, lambda: run(self.inputs)))
            except Exception as error:  # a model may refuse a batch in any way
                raise CompressionError(
                    f"{type(model).__name__} does not run on inputs ({', '.join(self.inputs)}): {type(error).__name__}: {error}"
                ) from error
        unique = {id(p): (n, p.nbytes) for module in model.modules() for p, n in numbers_of(module)}
        return float(sum(pair[self.target == "bytes"] for pair in unique.values()))

    def check(self, ratio: float) -> None:
        """Refuse a target that the smallest sizes do not meet; a speed-up, where a model of these sizes is not so fast."""
        most = self._most()
        if most < ratio and self._is_timed():  # the table may be off: it was made of parts
            most = of_the_first(lambda: self._achieved(self._smallest(), ratio, SHORT)[0])
        if most < ratio * (1 - WITHIN * self._is_timed()):
            raise CompressionError(self._cannot(ratio, most))

    def _smallest(self, losses: Mapping[str, Mapping[int, float]] | None = None) -> dict[str, int]:
        """Of every block the size that costs least."""
        return {
            name: min(of if losses is None else losses[name], key=of.__getitem__)
            for name, of in self.costs.items()
            if losses is None or name in losses
        }

    def _most(self) -> float:
        """What the costs promise of the smallest sizes; times of parts overlap, so it may be anything."""
        least = self._least()
        return self.total / least if least > 0 else float("inf")

    def _least(self) -> float:
        return self.fixed + sum(min(of.values()) for of in self.costs.values())

    def _is_timed(self) -> bool:
        return self.target == "speedup" and not self.is_predicted

    def falls_short(self, sizes: Mapping[str, int], achieved: float, ratio: float) -> str | None:
        """Why a target was not reached: of one that is timed, if nothing is left to remove."""
        if not self._is_timed():
            return None if achieved >= ratio * (1 - 1e-9) else self._cannot(ratio, achieved)
        smallest = self._smallest({name: self.costs[name] for name in sizes})
        return self._cannot(ratio, achieved) if achieved < ratio * (1 - WITHIN) and dict(sizes) == smallest else None

    def fit(
        self, losses: Mapping[str, Mapping[int, float]], ratio: float, rough: bool = False
    ) -> tuple[dict[str, int], float, Any]:
        """Sizes that meet a target: (sizes, what is achieved, its interval); of the first process, for all.

        `rough`: time one model, and not for long: a target on the way to another.
        """
        sizes, achieved, interval, self.bias = of_the_first(lambda: self._fit(losses, ratio, rough))
        return sizes, achieved, interval

    def sizes(self, losses: Mapping[str, Mapping[int, float]], ratio: float) -> dict[str, int] | None:
        """Sizes that should meet a target, by the costs as far as they were corrected; None where none do."""
        aim = _ratio(self.bias * _share(ratio))
        try:
            return solve(losses, {name: self.costs[name] for name in losses}, self.total / aim, self.fixed)
        except CompressionError:
            return None

    def _fit(
        self, losses: Mapping[str, Mapping[int, float]], ratio: float, rough: bool
    ) -> tuple[dict[str, int], float, Any, float]:
        aim, best = _ratio(self.bias * _share(ratio)), None
        timed = self._is_timed()
        for _ in range(1 if rough and timed else TRIES):
            try:
                sizes = solve(losses, {name: self.costs[name] for name in losses}, self.total / aim, self.fixed)
            except CompressionError:
                if best is not None:
                    break
                if not timed:
                    raise CompressionError(self._cannot(ratio, self._most())) from None
                sizes = self._smallest(losses)  # the table may be off: it was made of parts, at another time
                aim = self.total / (self.fixed + sum(self.costs[name][size] for name, size in sizes.items()))
            achieved, interval = self._achieved(sizes, ratio, SHORT if rough else LONGEST)
            if timed:
                off, enough = abs(achieved / ratio - 1), WITHIN
            else:
                off, enough = max(0.0, 1 - achieved / ratio), 0.0
            if best is None or off < best[0]:
                bias = _share(aim) / _share(achieved) if timed and min(aim, achieved) > 1 else self.bias
                best = off, sizes, achieved, interval, bias
            if off <= enough or self.is_predicted:
                break
            aim = _ratio(_share(aim) * _share(ratio) / _share(achieved)) if min(aim, achieved) > 1 else aim * ratio / achieved
        assert best is not None
        return best[1], best[2], best[3], best[4]

    def _achieved(self, sizes: Mapping[str, int], ratio: float, longest: float) -> tuple[float, tuple[float, float] | None]:
        if self.is_predicted:
            spent = self.fixed + sum(self.costs[block.name][sizes[block.name]] for block in self.blocks)
            return self.total / spent, None
        small = shrunk(self.model, "", [(block, sizes[block.name]) for block in self.blocks], self.proved)
        if self.target != "speedup":
            return self.total / self._count(small), None
        with quiet_run(self.model) as dense, quiet_run(small) as run:
            speedup, interval, _ = steady_speedup(
                lambda: run(self.inputs),
                lambda: dense(self.inputs),
                pairs=PAIRS,
                width=WIDTH,
                longest=longest,
                # how far off is known well enough: other sizes are tried before these are timed for long
                is_enough=lambda speedup, wide: abs(speedup / ratio - 1) > WITHIN + wide,
            )
            return speedup, interval

    def _cannot(self, ratio: float, most: float) -> str:
        return (
            f"{self.target}={ratio:g} is more than cutting heads and neurons can give here: about {most:.2f} at most, with one "
            "head and a few neurons left in every block. Ask for less, remove layers first (KeepLayers), or quantize as well."
        )


def _share(ratio: float) -> float:
    """The share of the cost that goes where so many times less is left."""
    return 1 - 1 / ratio


def _ratio(share: float) -> float:
    return 1 / (1 - min(share, 0.999))
