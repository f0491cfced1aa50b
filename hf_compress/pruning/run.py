"""One training that prunes: the gates, the running scores, and what stays."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..cutting import Block
from ..discover import Attention, Structure, discover
from ..loader import HfCompressConfig, compression_of
from ..modules import gate_, is_gated, ungate_, weight_dim
from ..plan import CompressionError, Plan
from ..probe import example_inputs, map_tensors
from ..surgery import apply_, prove_plan
from .schedules import SCHEDULES
from .scores import SCORES
from .select import count_units, fold, fold_mean, plan_of, select, units_of, weight_squares


class PruningRun:
    """One `train()` of one model. The callback tells it when; it knows what."""

    def __init__(self, model: nn.Module, options: dict[str, Any], max_steps: int, trainer: Trainer | None) -> None:
        self.model, self.options, self.trainer = model, options, trainer
        self.how = SCORES[options["score"]]
        self.structure: Structure = discover(model)
        self.blocks: list[Block] = [
            *(self.structure.attentions if options["heads"] else ()),
            *(self.structure.ffns if options["neurons"] else ()),
        ]
        for what, blocks in (("heads", self.structure.attentions), ("neurons", self.structure.ffns)):
            if options[what] and not blocks:
                raise CompressionError(f"{type(model).__name__} has no {what} that can be cut; see discover(model).")
        self.outs = {block.name: model.get_submodule(block.out) for block in self.blocks}
        self.first = max(1, round(options["start"] * max_steps))
        self.last = self.first if options["schedule"] == "one_shot" else max(self.first, round(options["end"] * max_steps))
        self.every = options["every"] or max(1, (self.last - self.first) // 20)
        self.scores: dict[str, torch.Tensor] = {}
        self.alive: dict[str, torch.Tensor] = {}
        self.is_full = False
        self.config_before: Any = None
        self.gated_before: dict[str, torch.Tensor | None] = {}
        self.batch: dict[str, Any] | None = None
        self._hook: Any = None

    # --- begin and end -----------------------------------------------------------------------------------------

    def begin(self, saved: dict[str, Any] | None) -> None:
        if self.how.needs == "gradient":
            for block in self.blocks:
                if not self.outs[block.name].weight.requires_grad:
                    raise CompressionError(
                        f"score={self.options['score']!r} reads the gradient of {block.out!r}, which is frozen. Train it, or "
                        "use score='magnitude' or 'activation'."
                    )
        self._prove_early()
        config = getattr(self.model, "config", None)
        self.config_before = getattr(config, "quantization_config", None)
        for block in self.blocks:
            out = self.outs[block.name]
            self.gated_before[block.name] = out.hfc_gate.clone() if is_gated(out) else None  # type: ignore
            gate = gate_(out, track=self.how.needs == "activation")
            units = torch.ones(count_units(block), dtype=torch.bool)
            units[units_of(block)[gate.cpu() == 0]] = False
            self.alive[block.name] = units
        if saved is not None:
            self._resume(saved)
            self._write_gates()

    def _prove_early(self) -> None:
        """Prove a cut of every block now, not after hours of training; where no inputs can be made, keep a batch for it."""
        half = {b.name: list(range(0, count_units(b), 2)) for b in self.blocks}
        heads = {b.name: half[b.name] for b in self.blocks if isinstance(b, Attention)}
        plan = plan_of(self.structure, heads, {b.name: half[b.name] for b in self.blocks if b.name not in heads})
        try:
            example_inputs(self.model)
        except CompressionError:

            def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                self.batch = map_tensors(
                    {k: v for k, v in kwargs.items() if "label" not in k}, lambda t: t[:2].detach().clone()
                )
                self._hook.remove()

            self._hook = self.model.register_forward_pre_hook(keep, with_kwargs=True)
            return
        if plan.edits:
            prove_plan(self.model, plan)

    def cut(self) -> Plan:
        plan = self._plan()
        self._ungate(keep=plan)
        self._set_config(self.config_before)
        apply_(self.model, plan, inputs=self.batch)
        return plan

    def abandon(self) -> None:
        self._ungate(keep=None)
        self._set_config(self.config_before)
        if self._hook is not None:
            self._hook.remove()

    def _ungate(self, keep: Plan | None) -> None:
        """Take off our gates; a model that was masked before training keeps that mask unless it is cut now."""
        for block in self.blocks:
            before = self.gated_before.get(block.name)
            ungate_(self.outs[block.name])
            if before is not None and keep is None:
                gate_(self.outs[block.name]).copy_(before)

    # --- every step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Add this step's gradients (or activations) to the running scores."""
        if self.is_full or self.how.needs not in ("gradient", "activation"):
            return
        past = self.options["smoothing"]
        for block in self.blocks:
            out = self.outs[block.name]
            if self.how.needs == "gradient":
                grad = out.weight.grad
                if grad is None:
                    continue
                columns = (out.weight.float() * grad.float()).sum(1 - weight_dim(out, 1))  # type: ignore[operator]
                units = fold(columns, block)
                now = self.how.reduce(units[None])
            else:
                now = fold_mean(out.hfc_active, block)  # type: ignore[arg-type]
                out.hfc_active.zero_()  # type: ignore[operator,union-attr]
            if not bool(torch.isfinite(now).all()):
                continue  # a skipped step of mixed precision
            old = self.scores.get(block.name)
            self.scores[block.name] = now if old is None else old.mul_(past).add_(now, alpha=1 - past)

    def advance(self, step: int) -> bool:
        """Move the masks to where the schedule says they are; whether full sparsity was reached at this step."""
        if self.is_full or step < self.first or (step < self.last and (step - self.first) % self.every):
            return False
        progress = 1.0 if step >= self.last else (step - self.first) / (self.last - self.first)
        self._mask(SCHEDULES[self.options["schedule"]](progress))
        self.is_full = progress >= 1.0
        return self.is_full

    def finish(self) -> None:
        self._mask(1.0)
        self.is_full = True

    @torch.no_grad()
    def _mask(self, share: float) -> None:
        ranking = self._ranking()
        for kind, what in ((True, "heads"), (False, "neurons")):
            scores = {b.name: ranking[b.name] for b in self.blocks if isinstance(b, Attention) is kind}
            if not scores:
                continue
            kept = select(
                scores,
                self.options[what] * share,
                scope=self.options["scope"],
                uniform=self.options["uniform"],
                round_to=self.options["round_to"] if what == "neurons" and share >= 1 else 1,
                alive={name: self.alive[name] for name in scores},
            )
            for name, units in kept.items():
                self.alive[name] = torch.zeros_like(self.alive[name])
                self.alive[name][units] = True
        self._write_gates()
        if self.trainer is not None:
            self.trainer.log(self._shares())

    def _ranking(self) -> dict[str, torch.Tensor]:
        """The scores by block, the same on every rank."""
        if self.how.needs == "weight":
            raw = {b.name: self.how.reduce(weight_squares(self.model, b)) for b in self.blocks}
        elif self.how.needs == "seed":
            raw = {b.name: self.how.reduce(count_units(b), seed=self.options["seed"] + i) for i, b in enumerate(self.blocks)}
        else:
            missing = [b.name for b in self.blocks if b.name not in self.scores]
            if missing:
                raise CompressionError(
                    f"No score was collected for {missing[0]!r} (of {len(missing)} blocks) before masking began: training does "
                    "not reach it. Leave it out (heads or neurons = 0), or use score='magnitude'."
                )
            raw = {name: s.clone() for name, s in self.scores.items()}
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                for tensor in raw.values():  # gradients are averaged already; this also evens out what is not
                    dist.all_reduce(tensor)
            if self.how.needs == "activation":
                raw = {name: self.how.reduce(s / _ranks()) for name, s in raw.items()}
        return {name: self.how.per_layer(s.float().cpu()) for name, s in raw.items()}

    def _write_gates(self) -> None:
        for block in self.blocks:
            gate = gate_(self.outs[block.name])
            gate.copy_(self.alive[block.name][units_of(block)].to(gate))
        plan = self._plan()
        if plan.edits:
            before = compression_of(self.model.config) if isinstance(self.model, PreTrainedModel) else None
            if isinstance(self.model, PreTrainedModel):
                self._set_config(
                    HfCompressConfig(
                        plan=before.plan_dict if before else None,
                        layout=before.layout if before else None,
                        masks=plan.to_dict(spans=True),
                    )
                )

    def _set_config(self, value: Any) -> None:
        config = getattr(self.model, "config", None)
        if config is None:
            return
        if value is None:
            config.__dict__.pop("quantization_config", None)
        else:
            config.quantization_config = value

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
        }

    def _resume(self, saved: dict[str, Any]) -> None:
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
        self.is_full = saved["is_full"]


def _encode(tensor: torch.Tensor) -> str:
    """Float32, exactly: JSON numbers of a whole model's scores would be three times as long."""
    return base64.b64encode(tensor.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
