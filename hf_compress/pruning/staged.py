"""One training that prunes to a target in stages: second-order, with new weights for what stays, healed in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..compensation import Compensation, name_of
from ..cutting import Block
from ..discover import Attention, discover
from ..edits import CompressionError
from ..grams import checked_batches, unlabelled
from ..host import calibration_batches
from ..modules import ungate_
from ..pictures import save_pruned
from ..plan import Plan
from ..probe import NoInputs
from ..structural import copy_of
from .calibrate import Calibration
from .choose import choose
from .compensate import DAMPING, losses_of
from .latency import cut_copy
from .prices import Prices, blocks_for
from .run import PruningRun
from .schedules import ratio_at
from .scores import Score
from .search import Database, is_small
from .select import count_units, trial_plan, unit_of, units_of

logger = logging.get_logger(__name__)

TARGETS = ("speedup", "macs", "parameters", "bytes")
OFF = 0.03  # between what was asked and what is achieved, before it is said


class StagedRun(PruningRun):
    """Gates while training; at every stage a cut copy of the model is calibrated, sized and timed.

    What a stage finds is put into the gated model: new zeros in the gates, and the weights that make up for them.
    """

    STAGES = 4

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, Any],
        max_steps: int,
        trainer: Trainer | None,
        inputs: Mapping[str, Any] | None,
        batches: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        super().__init__(model, options, max_steps, trainer, None)  # proofs make small inputs where they can
        self.target = next(name for name in TARGETS if options[name] is not None)
        self.ratio = float(options[self.target])
        self.typical, self.batches = inputs, batches
        self.stages: list[dict[str, Any]] = []

    def _score(self) -> Score:
        return Score("second order", lambda scores: scores)

    def _multiples(self) -> dict[str, int]:
        return {}  # its grids of sizes say it (`latency.grid`)

    def _blocks(self) -> list[Block]:
        return blocks_for(self.model, self.structure, True, True)

    def _likely(self) -> Plan:
        return trial_plan(self.model, self.structure, self.blocks)

    def check(self) -> None:
        if self.batches is None:
            self.batches = None if self.trainer is None else calibration_batches(self.trainer, self.options["rows"])
            if self.batches is None:
                raise CompressionError(
                    "Second-order pruning looks at data, and rows of the training data cannot be taken by number: give some to "
                    "the callback, PruningCallback(batches=[...])."
                )
        self.batches = checked_batches(self.batches)
        try:
            super().check()
        except NoInputs:
            if self.typical is None:
                raise
            self.inputs = self.typical
            super().check()
        double = self._copy()
        calibration = Calibration(double, self.structure, self.blocks, self.batches)
        self.batches = calibration.batches
        given = self.batches[0] if self.typical is None else unlabelled(self.model, self.typical)
        self.prices = Prices(double, calibration.placed(given), self.blocks, self.proved, self.target, None)
        self.prices.check(self.ratio)
        self.prices.model = self.model  # the copy may go

    def restarts(self) -> list[int]:
        """At every stage that removes something."""
        wide = max(1, self.last - self.first)
        steps = range(self.first, self.last, self.every)
        schedule = self.options["schedule"]
        return [*(s for s in steps if ratio_at(schedule, (s - self.first) / wide, self.ratio) > 1), self.last]

    def _copy(self) -> nn.Module:
        """The model without gates, and without what a Trainer puts around its forward."""
        double = copy_of(self.model)
        for part in double.modules():  # accelerate's autocast calls the forward of the model that was copied
            if hasattr(vars(part).get("forward"), "__wrapped__"):
                vars(part).pop("forward")
                vars(part).pop("_original_forward", None)
        for block in self.blocks:
            ungate_(double.get_submodule(block.out))
        return double

    @torch.no_grad()
    def _mask(self, progress: float) -> None:
        asked = ratio_at(self.options["schedule"], progress, self.ratio)
        if asked <= 1:
            return
        dense = self.prices.model = self._copy()
        alive = {block.name: self.alive[block.name].nonzero().flatten() for block in self.blocks}
        small = cut_copy(dense, "", [(block, alive[block.name].tolist()) for block in self.blocks], self.proved)
        structure = discover(small)
        own = {block.name: block for block in (*structure.attentions, *structure.own_ffns)}
        assert self.batches is not None
        # of a block with one unit left nothing can go, and that the unit was a group of heads could not be told any more
        some = [own[block.name] for block in self.blocks if len(alive[block.name]) > 1]
        calibration = Calibration(small, structure, some, self.batches)
        # stages on the way are not the last word: a quarter of the tries
        tries = self.options["tries"] if progress >= 1 else self.options["tries"] // 4
        grids = {name: sorted(of) for name, of in self.prices.costs.items()}
        database: Database | None = {} if tries and is_small(calibration, grids) else None
        with torch.enable_grad():
            found = losses_of(calibration, DAMPING, grids, database) if some else {}
        there = {name: len(units) for name, units in alive.items()}
        losses = {name: found[name].at(self.prices.costs[name]) if name in found else {n: 0.0} for name, n in there.items()}
        chosen = choose(calibration, self.prices, losses, database, asked, tries, DAMPING, rough=progress < 1)
        self.prices.model = self.model  # the copy may go
        tensors = chosen.plan.tensors or {}
        for block in self.blocks:
            if block.name in chosen.lost:
                kept = self._kept(chosen.plan, block.name, own[block.name])
                self._put(block, alive[block.name][kept], tensors)
        self._write_gates()
        self.stages.append({
            "asked": asked,
            "achieved": chosen.achieved,
            "interval": None if chosen.interval is None else list(chosen.interval),
            "sizes": {block.name: [chosen.sizes[block.name], count_units(block)] for block in self.blocks},
            "losses": chosen.lost,
            "curves": {
                name: found[name].shares(self.prices.costs[name]) if name in found else [[1, 0.0]]
                for name, n in there.items() if name in found or n == 1
            },
        })  # fmt: skip
        self._log({**self._shares(), self.target: round(chosen.achieved, 4)})

    @staticmethod
    def _kept(plan: Any, name: str, block: Block) -> torch.Tensor:
        """The units of a cut block that an edit keeps."""
        edit = next(edit for edit in plan if name_of(edit) == name)
        if not isinstance(block, Attention):
            return torch.tensor(edit.neurons)
        heads = torch.tensor(edit.heads)
        return heads if block.num_key_value_heads == 1 else (heads // block.groups).unique()

    def _put(self, block: Block, kept: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let these units stay, with the weights that make up for the others."""
        self.alive[block.name] = torch.zeros_like(self.alive[block.name])
        self.alive[block.name][kept] = True
        columns = self.alive[block.name][units_of(block)].nonzero().flatten()
        weight, bias = (tensors.get(f"{block.name}.{name}") for name in ("out_weight", "out_bias"))
        assert weight is not None
        Compensation(block, columns, weight, bias).simulate(self.outs[block.name])

    def save(self, folder: str, plan: Plan) -> None:
        """What was cut in the end and what it was chosen from, as `Pruned.save` writes it but the plan, into a folder."""
        if not self.stages:
            return
        last = {"losses": {}, "curves": {}, **self.stages[-1]}
        data = {**last, "target": self.target, "conditions": self.prices.conditions, "stages": self.stages}
        units = {block.name: unit_of(block) for block in self.blocks}
        save_pruned(folder, {**data, "units": units, "plan": plan.to_dict(spans=True)})

    def warn_if_off(self) -> None:
        achieved = self.stages[-1]["achieved"] if self.stages else 1.0
        if abs(achieved / self.ratio - 1) > OFF:
            logger.warning(f"{self.target}={self.ratio:g} was asked, and {achieved:.2f} is achieved.")

    def state(self) -> dict[str, Any]:
        return {**super().state(), "stages": self.stages}

    def _resume(self, saved: dict[str, Any]) -> None:
        super()._resume(saved)
        self.stages = list(saved.get("stages", []))
