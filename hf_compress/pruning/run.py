"""One training that prunes: the gates, the running scores, and what stays."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..compensation import name_of
from ..cutting import Block, Variant
from ..discover import Attention, Structure, discover
from ..edits import CompressionError
from ..host import first_rows, log_beside, loss_scale
from ..layout import gates_of
from ..loader import HfCompressConfig, compression_of
from ..masking import masks_in
from ..modules import factor, gate_, is_gated, ungate_
from ..plan import Plan
from ..probe import NoInputs, owners_in
from ..record import own_configs_
from ..refusals import check_foreign
from ..surgery import apply_, prove_variants, rehearse
from .schedules import SCHEDULES
from .scores import SCORES, Score
from .select import (
    alive_units,
    check_measurable,
    count_units,
    fold,
    fold_mean,
    multiples_of,
    nothing_to_choose,
    plan_of,
    select,
    trial_plan,
    units_of,
    warn_if_off,
    weight_squares,
)


class PruningRun:
    """One `train()` of one model. The callback tells it when; it knows what."""

    STAGES = 20  # steps of the schedule

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, Any],
        max_steps: int,
        trainer: Trainer | None,
        inputs: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.options, self.trainer = model, options, trainer
        check_foreign(model)
        self.how = self._score()
        self.structure: Structure = discover(model)
        self.blocks = self._blocks()
        self.multiples = self._multiples()
        self.outs = {block.name: model.get_submodule(block.out) for block in self.blocks}
        self.consumers = {block.name: block.consumer for block in self.blocks}
        self.first = max(1, round(options["start"] * max_steps))
        self.last = self.first if options["schedule"] == "one_shot" else max(self.first, round(options["end"] * max_steps))
        self.every = options["every"] or max(1, (self.last - self.first) // self.STAGES)
        self.scores: dict[str, torch.Tensor] = {}
        self.alive: dict[str, torch.Tensor] = {}
        self.is_full = False
        self.stages: list[dict[str, Any]] = []  # of a run that has a target
        self.inputs = inputs
        self.proved: dict[str, Variant] = {}
        self.records: list[tuple[PreTrainedModel, Any]] = []
        self.gated_before: dict[str, torch.Tensor | None] = {}
        self.undo: Callable[[], None] = lambda: None  # what was done to the learning rate

    def _score(self) -> Score:
        return SCORES[self.options["score"]]

    def _multiples(self) -> dict[str, int]:
        """Of what each block's neurons are kept a multiple."""
        return multiples_of(self.blocks, self.options["round_to"])

    def _blocks(self) -> list[Block]:
        """What is pruned; refused where there is none, or none that can be scored."""
        model, options = self.model, self.options
        for what, blocks in (("heads", self.structure.attentions), ("neurons", self.structure.own_ffns)):
            if options[what] and not blocks:
                raise CompressionError(nothing_to_choose(model, self.structure, what))
        found: list[Block] = [
            *(self.structure.attentions if options["heads"] else ()),
            *(self.structure.own_ffns if options["neurons"] else ()),
        ]
        check_measurable(model, found, options["score"])
        own = next((block for block in found if block.consumer is not None), None)
        if own is not None and self.how.needs == "activation":
            raise CompressionError(
                f"score={options['score']!r} is counted by our own Linear, and {own.out!r} is a "
                f"{type(model.get_submodule(own.out)).__name__}. Use score='taylor' or 'magnitude'."
            )
        return found

    # --- begin and end -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse now what would fail after hours of training."""
        if self.how.needs == "gradient":
            for block in self.blocks:
                out = self.outs[block.name]
                if not out.get_parameter(factor(out, 1)[0]).requires_grad:
                    raise CompressionError(
                        f"score={self.options['score']!r} reads the gradient of {block.out!r}, which is frozen. Train it, or "
                        "use score='magnitude' or 'activation'."
                    )
        likely = self._likely()
        # what the end may leave whole is proved too: by its scores it may not
        whole = [block for block in self.blocks if block.name not in {name_of(edit) for edit in likely}]
        plan = likely + trial_plan(self.model, self.structure, whole)
        try:
            self.proved = prove_variants(self.model, plan, self.inputs)
        except NoInputs as error:
            if self.inputs is not None:
                raise
            self.inputs = None if self.trainer is None else first_rows(self.trainer)
            if self.inputs is None:
                raise NoInputs(f"{error} Give them to the callback: PruningCallback(inputs=...).") from error
            try:
                self.proved = prove_variants(self.model, plan, self.inputs)
            except NoInputs as again:
                raise NoInputs(f"{again} Give them to the callback: PruningCallback(inputs=...).") from again
        rehearse(self.model, likely, self.proved)

    def _likely(self) -> Plan:
        """A plan as the one at the end will be, by random scores: with one fraction for all blocks, of the same sizes."""
        draw = torch.Generator().manual_seed(0)
        scores = {block.name: torch.rand(count_units(block), generator=draw) for block in self.blocks}
        alive = {block.name: alive_units(self.model, block) for block in self.blocks}
        kept = self._selected(scores, 1.0, alive)
        heads = {b.name: kept[b.name] for b in self.blocks if isinstance(b, Attention)}
        return plan_of(self.structure, heads, {b.name: kept[b.name] for b in self.blocks if b.name not in heads})

    def begin(self, saved: dict[str, Any] | None) -> None:
        """Put the gates on, all ones or as a checkpoint left them."""
        own_configs_(self.model, [])  # a teacher made from the same config is not masked
        self.records = [(owner, getattr(owner.config, "quantization_config", None)) for _, owner in owners_in(self.model)]
        for block in self.blocks:
            out = self.outs[block.name]
            self.gated_before[block.name] = out.hfc_gate.clone() if is_gated(out) else None  # type: ignore
            gate_(out, track=self.how.needs == "activation", consumer=block.consumer)
            self.alive[block.name] = alive_units(self.model, block)
        if saved is not None:
            self._resume(saved)
            self._write_gates()

    def cut(self, optimizer: Any) -> Plan:
        """Make what is masked small, and let the optimizer hold the new weights."""
        plan = self._plan()
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._ungate(restore=False)
        self._restore_records()
        try:
            apply_(self.model, plan, inputs=self.inputs)
        except CompressionError:
            self._write_gates()  # the model that was trained is the masked one
            raise
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not None:
            now = dict(self.model.named_parameters())
            for group in inner.param_groups:
                for p in group["params"]:
                    if id(p) in names and now[names[id(p)]] is not p:
                        inner.state.pop(p, None)  # moments of another shape; they start anew
                group["params"] = [now[names[id(p)]] if id(p) in names else p for p in group["params"]]
        return plan

    def abandon(self) -> None:
        self._ungate(restore=True)
        self._restore_records()

    def _ungate(self, restore: bool) -> None:
        """Take off our gates; where training failed, a mask that was there before it comes back."""
        for name, before in self.gated_before.items():
            ungate_(self.outs[name])
            if before is not None and restore:
                gate_(self.outs[name], consumer=self.consumers[name]).copy_(before)

    def _restore_records(self) -> None:
        for owner, record in self.records:
            if record is None:
                vars(owner.config).pop("quantization_config", None)
            else:
                owner.config.quantization_config = record

    # --- every step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Add this step's gradients (or activations) to the running scores."""
        if self.is_full or self.how.needs not in ("gradient", "activation"):
            return
        past, scale = self.options["smoothing"], loss_scale(self.trainer)
        for block in self.blocks:
            out = self.outs[block.name]
            if self.how.needs == "gradient":
                name, dim = factor(out, 1)
                weight = out.get_parameter(name)
                if weight.grad is None:
                    continue
                columns = (weight.float() * weight.grad.float()).sum(1 - dim) / scale
                units = fold(columns, block)
                now = self.how.reduce(units[None])
            else:
                active = self._summed(out.hfc_active)  # type: ignore[arg-type]
                out.hfc_active.zero_()  # type: ignore[operator,union-attr]
                if not bool(active[2].any()):
                    continue
                now = fold_mean(active[:2] / active[2], block)  # the mean over forward passes, of all ranks
            if not bool(torch.isfinite(now).all()):
                continue  # a skipped step of mixed precision
            old = self.scores.get(block.name)
            if old is None:
                self.scores[block.name] = now
            elif self.how.sums:
                old.add_(now)
            else:
                old.mul_(past).add_(now, alpha=1 - past)

    @staticmethod
    def _summed(statistics: torch.Tensor) -> torch.Tensor:
        """Over ranks; gradients need no such sum, DistributedDataParallel has averaged them."""
        statistics = statistics.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(statistics)
        return statistics

    def advance(self, step: int) -> bool:
        """Move the masks to where the schedule says they are; whether full sparsity was reached at this step."""
        if self.is_full or step < self.first or (step < self.last and (step - self.first) % self.every):
            return False
        progress = 1.0 if step >= self.last else (step - self.first) / (self.last - self.first)
        self._mask(progress)
        self.is_full = progress >= 1.0
        return self.is_full

    def restarts(self) -> list[int]:
        """The steps after which a learning rate begins anew: when all has been removed."""
        return [self.last]

    def finish(self) -> None:
        self._mask(1.0)
        self.is_full = True

    def warn_if_off(self) -> None:
        for kind, what in ((True, "heads"), (False, "neurons")):
            alive = {b.name: self.alive[b.name] for b in self.blocks if isinstance(b, Attention) is kind}
            kept = {name: a.nonzero().flatten().tolist() for name, a in alive.items()}
            if kept:
                sizes = {name: len(a) for name, a in alive.items()}
                warn_if_off(what, self.options[what], kept, sizes, self.multiples)

    @torch.no_grad()
    def _mask(self, progress: float) -> None:
        kept = self._selected(self._ranking(), SCHEDULES[self.options["schedule"]](progress), self.alive)
        for name, units in kept.items():
            self.alive[name] = torch.zeros_like(self.alive[name])
            self.alive[name][units] = True
        self._write_gates()
        self._log(self._shares())

    def _selected(
        self, ranking: Mapping[str, torch.Tensor], share: float, alive: Mapping[str, torch.Tensor]
    ) -> dict[str, list[int]]:
        """The units that stay where a share of all that is to go has gone, by block.

        Rounded at every step, not at the last alone: what is masked does not come back, so a count that lies between two
        multiples could only be rounded down then.
        """
        kept: dict[str, list[int]] = {}
        for kind, what in ((True, "heads"), (False, "neurons")):
            scores = {b.name: ranking[b.name] for b in self.blocks if isinstance(b, Attention) is kind}
            if scores:
                kept |= select(
                    scores,
                    self.options[what] * share,
                    scope=self.options["scope"],
                    uniform=self.options["uniform"],
                    round_to=self.multiples,
                    alive={name: alive[name] for name in scores},
                )
        return kept

    def _log(self, numbers: dict[str, float]) -> None:
        log_beside(self.trainer, numbers)

    def _ranking(self) -> dict[str, torch.Tensor]:
        """The scores by block, the same on every rank."""
        if self.how.needs == "weight":
            found = {name: variant.parts for name, variant in self.proved.items()}
            raw = {b.name: self.how.reduce(weight_squares(self.model, b, found)) for b in self.blocks}
        elif self.how.needs == "seed":
            raw = {b.name: self.how.reduce(count_units(b), seed=self.options["seed"] + i) for i, b in enumerate(self.blocks)}
        else:
            missing = [b.name for b in self.blocks if b.name not in self.scores]
            if missing:
                raise CompressionError(
                    f"No score was collected for {missing[0]!r} (of {len(missing)} blocks) before masking began: training does "
                    "not reach it. Leave it out (heads or neurons = 0), or use score='magnitude'."
                )
            reduce = self.how.reduce if self.how.needs == "activation" else lambda s: s
            raw = {name: reduce(s) for name, s in self.scores.items()}
        return {name: self.how.per_layer(s.float().cpu()) for name, s in raw.items()}

    def _write_gates(self) -> None:
        """Set the gates, and record them in the config of every model that a checkpoint may be made of."""
        for block in self.blocks:
            gate = gate_(self.outs[block.name], consumer=block.consumer)
            gate.copy_(self.alive[block.name][units_of(block)].to(gate))
        for owner, _ in self.records:
            masks = masks_in(owner)
            if masks.edits:
                before = compression_of(owner.config)
                layout = {**(before.layout if before else {"modules": {}}), "gates": gates_of(owner)}
                plan = before.plan_dict if before else None
                owner.config.quantization_config = HfCompressConfig(plan, layout, masks.to_dict(spans=True))

    def _plan(self) -> Plan:
        kept = {name: alive.nonzero().flatten().tolist() for name, alive in self.alive.items()}
        heads = {b.name: kept[b.name] for b in self.blocks if isinstance(b, Attention)}
        return plan_of(self.structure, heads, {b.name: kept[b.name] for b in self.blocks if b.name not in heads})

    def _shares(self) -> dict[str, float]:
        shares = {}
        for kind, what in ((True, "heads"), (False, "neurons")):
            alive = [self.alive[b.name] for b in self.blocks if isinstance(b, Attention) is kind]
            if alive:
                shares[f"{what}_removed"] = round(1 - sum(int(a.sum()) for a in alive) / sum(len(a) for a in alive), 4)
        return shares

    # --- across checkpoints ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "alive": {name: alive.nonzero().flatten().tolist() for name, alive in self.alive.items()},
            "scores": {name: _encode(s) for name, s in self.scores.items()},
            "is_full": self.is_full,
            "options": self.options,
        }

    def _resume(self, saved: dict[str, Any]) -> None:
        before = dict(saved.get("options", {}))
        if self.options["round_to"] is None and before.get("round_to") == 1:
            before["round_to"] = None  # what nothing said in earlier versions
        differ = sorted(k for k, v in self.options.items() if before.get(k, v) != v)
        if differ:
            name = differ[0]
            raise CompressionError(
                f"The checkpoint was pruned with {name}={saved['options'][name]!r}, this callback has {self.options[name]!r}: "
                "resume with the options that the run began with."
            )
        if set(saved["alive"]) != set(self.alive):
            raise CompressionError(
                "The checkpoint was pruned with other blocks than this run prunes; resume with the same heads= and neurons=."
            )
        for name, units in saved["alive"].items():
            if units and max(units) >= len(self.alive[name]):
                raise CompressionError(
                    f"The checkpoint keeps unit {max(units)} of {name!r}, which has {len(self.alive[name])}."
                )
            self.alive[name] = torch.zeros_like(self.alive[name])
            self.alive[name][units] = True
        for name, text in saved["scores"].items():
            self.scores[name] = _decode(text).to(self.outs[name].weight.device)  # type: ignore[arg-type]
            if self.how.needs == "activation":
                self.scores[name] = self.scores[name].view(2, -1)
        # masks of an earlier version may lie between two multiples: the next step of the schedule rounds them
        self.is_full = saved["is_full"] and not any(
            int(self.alive[name].sum()) % multiple for name, multiple in self.multiples.items() if self._is_masked(name)
        )

    def _is_masked(self, name: str) -> bool:
        return not bool(self.alive[name].all())


def _encode(tensor: torch.Tensor) -> str:
    """Float32, exactly: JSON numbers of a whole model's scores would be three times as long."""
    return base64.b64encode(tensor.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
