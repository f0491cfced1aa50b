"""`PruningCallback`: prune heads and neurons while anybody's Trainer fine-tunes."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..cutting import Block
from ..discover import Attention, Structure, discover, nearest
from ..loader import HfCompressConfig, compression_of
from ..modules import gate_, is_gated, ungate_, weight_dim
from ..plan import CompressionError, Plan
from ..probe import example_inputs, map_tensors
from ..resume import keys_differ, restore_weights
from ..surgery import apply_, prove_plan
from .schedules import SCHEDULES
from .scores import SCORES
from .select import check_options, count_units, fold, fold_mean, plan_of, select, units_of, weight_squares

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback, ExportableState):
    """Prune heads and neurons during fine-tuning, in a plain `Trainer`, `Seq2SeqTrainer` or any subclass.

    Masks while training, small when it ends. From `start` to `end` the sparsity follows a schedule: at each step of it
    the units that score lowest are masked by zero gates on what goes into the output and down projections, and never
    come back. The rest of the training heals. When training ends, after the best model is loaded, what is masked is
    cut out; `trainer.save_model` then writes a small checkpoint.

    Scores come from the backward passes that training makes anyway: at a gate of one, the derivative of the loss by the
    gate of a unit is the sum of `w * dL/dw` over the weights that the gate multiplies. It is read once per optimizer
    step (so gradient accumulation and distributed averaging are in it), reduced as the score says, and averaged
    exponentially (`smoothing`). `"activation"` averages what enters the projections while training.

    Only evaluations at full sparsity count for `load_best_model_at_end`: a best model from before never felt the final
    mask. A checkpoint from the middle holds its masks: it loads as the masked model, and resuming from it (also after a
    kill) ends as the uninterrupted run would have. An exception in `train()` takes every gate off again.

    Args:
        heads (`float`, defaults to 0.0): the fraction of all heads to remove, in [0, 1).
        neurons (`float`, defaults to 0.0): the fraction of all FFN neurons to remove, in [0, 1).
        score (`str`, defaults to `"taylor"`): see `plan_pruning`.
        schedule (`str`, defaults to `"cubic"`): `"cubic"` (Zhu & Gupta 2017), `"linear"` or `"one_shot"`.
        start (`float`, defaults to 0.1): when masking begins, as a fraction of all steps (scores are collected before).
        end (`float`, defaults to 0.5): when full sparsity is reached; the rest heals. `"one_shot"` masks all at `start`.
        every (`int`, *optional*): optimizer steps between two steps of the schedule; a twentieth of it by default.
        scope (`str`, defaults to `"global"`): rank all layers together, or each alone (`"layer"`).
        uniform (`bool`, defaults to `False`): give every layer the same width.
        round_to (`int`, defaults to 1): round kept neurons to a multiple of this.
        smoothing (`float`, defaults to 0.98): weight of the past in the running average of scores.
        seed (`int`, defaults to 0): of `"random"`.

    Raises:
        CompressionError: at construction, options that mean nothing; when training begins, a model that cannot be cut
            exactly, FSDP or DeepSpeed (which shard the weights that are scored), a frozen projection under a gradient
            score, or a second `PruningCallback`.

    Example:

    ```python
    >>> from hf_compress import PruningCallback
    >>> PruningCallback(heads=0.5, neurons=0.5, score="taylor", schedule="cubic")
    PruningCallback(heads=0.5, neurons=0.5, score='taylor', schedule='cubic')

    ```
    """

    def __init__(
        self,
        heads: float = 0.0,
        neurons: float = 0.0,
        score: str = "taylor",
        schedule: str = "cubic",
        *,
        start: float = 0.1,
        end: float = 0.5,
        every: int | None = None,
        scope: str = "global",
        uniform: bool = False,
        round_to: int = 1,
        smoothing: float = 0.98,
        seed: int = 0,
    ) -> None:
        check_options(heads, neurons, score, scope, round_to)
        if schedule not in SCHEDULES:
            raise CompressionError(
                f"Unknown schedule {schedule!r}{nearest(str(schedule), list(SCHEDULES))} Known: {', '.join(SCHEDULES)}."
            )
        if not heads and not neurons:
            raise CompressionError("PruningCallback removes nothing: set heads or neurons to a fraction above 0.")
        if not 0 <= start <= end <= 1:
            raise CompressionError(
                f"start and end are fractions of the training, 0 <= start <= end <= 1, got {start} and {end}."
            )
        if every is not None and (not isinstance(every, int) or every < 1):
            raise CompressionError(f"every is a number of optimizer steps >= 1, got {every!r}.")
        if not 0 <= smoothing < 1:
            raise CompressionError(f"smoothing must lie in [0, 1), got {smoothing!r}.")
        self.options: dict[str, Any] = {
            "heads": heads,
            "neurons": neurons,
            "score": score,
            "schedule": schedule,
            "start": start,
            "end": end,
            "every": every,
            "scope": scope,
            "uniform": uniform,
            "round_to": round_to,
            "smoothing": smoothing,
            "seed": seed,
        }
        self.saved: dict[str, Any] | None = None  # what a checkpoint gave back, until training begins
        self.plan: Plan | None = None  # what was cut, once training has ended
        self._run: _Run | None = None

    def __repr__(self) -> str:
        shown = ("heads", "neurons", "score", "schedule")
        return f"PruningCallback({', '.join(f'{name}={self.options[name]!r}' for name in shown)})"

    def state(self) -> dict[str, Any]:
        """What travels in the Trainer's own `trainer_state.json`."""
        return {"args": self.options, "attributes": {"saved": self._run.state() if self._run else None}}

    # --- events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trainer = _calling_trainer()
        _check_environment(trainer, model, self)
        saved = self.saved or _saved_in(state, type(self).__name__)
        self.saved, self.plan = None, None
        if trainer is not None:
            _restore_what_stock_lost(trainer, model)
        # a run that began without us has no place for our state, and Trainer assumes one
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        run = _Run(model, self.options, state.max_steps, trainer)
        run.begin(saved)
        if getattr(args, "torch_compile", False):
            torch.compiler.reset()  # graphs of an evaluation before training know no gates
        self._run = run
        if trainer is not None:
            _guard(trainer, self._abandon)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._run is not None:
            self._run.observe()

    def on_step_end(self, args, state, control, **kwargs):
        if self._run is not None and self._run.advance(state.global_step):
            # whatever was best so far never felt the final mask
            state.best_metric = None
            state.best_model_checkpoint = None
            state.best_global_step = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        run, trainer = self._run, self._run.trainer if self._run else None
        if run is None:
            return
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and isinstance(run.model, PreTrainedModel):
            if keys_differ(run.model, best):
                restore_weights(run.model, best)
        if not run.is_full:
            logger.warning(
                "Training ended before the schedule reached full sparsity; the rest is cut now, without healing. "
                "Set `end` lower, or train longer."
            )
            run.finish()
        self.plan = run.cut()
        self._run = None
        if trainer is not None:
            _unguard(trainer)
            # the optimizer, the scheduler and any wrapper hold weights that are gone
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
            trainer.model_wrapped = trainer.model
        if getattr(args, "torch_compile", False):
            torch.compiler.reset()

    def _abandon(self) -> None:
        """Training failed: leave no gate behind."""
        if self._run is not None:
            if self._run.trainer is not None:
                _unguard(self._run.trainer)
            self._run.abandon()
            self._run = None


class _Run:
    """One `train()`: the gates, the running scores, and what stays."""

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
                        masks=plan.to_dict(),
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


# --- the Trainer around us -----------------------------------------------------------------------------------------


def _calling_trainer() -> Trainer | None:
    """The Trainer whose `train` is running. Callbacks are told everything but this, so the stack is asked."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _saved_in(state: Any, name: str) -> dict[str, Any] | None:
    """Our state in a resumed `TrainerState`, whether or not `restore_callback_states_from_checkpoint` is on."""
    found = (state.stateful_callbacks or {}).get(name)
    return (found or {}).get("attributes", {}).get("saved") if isinstance(found, dict) else None


def _check_environment(trainer: Trainer | None, model: Any, callback: PruningCallback) -> None:
    if model is None:
        raise CompressionError("PruningCallback was given no model: add it to a Trainer.")
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if sharded or (trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)):
        raise CompressionError(
            "PruningCallback does not work with weights that are sharded over processes (FSDP, DeepSpeed, tensor parallel): "
            "heads and neurons are scored and gated on whole weights. Use DistributedDataParallel (torchrun without fsdp), or "
            "prune first with plan_pruning and apply_, then train sharded."
        )
    if trainer is not None:
        others = [c for c in trainer.callback_handler.callbacks if isinstance(c, PruningCallback) and c is not callback]
        if others:
            raise CompressionError("Two PruningCallbacks in one Trainer would gate the same weights; use one.")


def _restore_what_stock_lost(trainer: Trainer, model: Any) -> None:
    """Stock `Trainer` skips weights that are saved under other names (ViT, Swin, ...); read them again, all of them."""
    frame = sys._getframe(1)
    while frame is not None:
        checkpoint = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(checkpoint, str):
            if isinstance(model, PreTrainedModel) and keys_differ(model, checkpoint):
                restore_weights(model, checkpoint)
            return
        frame = frame.f_back


GUARDED = ("_run_epoch", "_evaluate", "_finalize_training")


def _guard(trainer: Trainer, abandon: Callable[[], None]) -> None:
    """From here to the end of `train()`, let an exception (Ctrl-C too) take our gates off on its way out."""

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BaseException:
                abandon()
                raise

        return call

    for name in GUARDED:
        trainer.__dict__[name] = guarded(getattr(trainer, name))
    handler = trainer.callback_handler
    handler.__dict__["call_event"] = guarded(handler.call_event)


def _unguard(trainer: Trainer) -> None:
    for name in GUARDED:
        trainer.__dict__.pop(name, None)
    trainer.callback_handler.__dict__.pop("call_event", None)
