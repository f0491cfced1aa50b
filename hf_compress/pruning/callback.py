"""`PruningCallback`: prune heads and neurons while anybody's Trainer fine-tunes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..edits import CompressionError
from ..grams import check_inputs, checked_batches
from ..host import (
    calling_trainer,
    guard,
    refuse_drifting,
    refuse_sharded,
    restore_best,
    restore_what_stock_lost,
    resumed_from,
    saved_in,
    unguard,
)
from ..plan import Plan
from ..publish import card_in_
from ..refusals import check_adapters
from .rate import check_restarts, restart_
from .run import PruningRun
from .schedules import SCHEDULES, check_schedule
from .search import TRIES
from .select import check_options, check_seed
from .staged import TARGETS, StagedRun
from .target import one_target

logger = logging.get_logger(__name__)


class PruningCallback(TrainerCallback, ExportableState):
    """Prune heads and neurons during fine-tuning, in a plain `Trainer`, `Seq2SeqTrainer` or any subclass.

    Masks while training, small when it ends. From `start` to `end` the sparsity follows a schedule: at each step of it
    the units that score lowest are masked by zero gates on what goes into the output and down projections, and never
    come back. The rest of the training heals. When training ends, after the best model is loaded, what is masked is
    cut out; `trainer.save_model` then writes a small checkpoint.

    Scores come from the backward passes that training makes anyway: at a gate of one, the derivative of the loss by the
    gate of a unit is the sum of `w * dL/dw` over the weights that the gate multiplies. It is read once per optimizer
    step, after clipping (so gradient accumulation and distributed averaging are in it, and a step weighs as much as its
    update), reduced as the score says, and averaged exponentially (`smoothing`). `"activation"` averages what enters the
    projections while training.

    With a target (`speedup=3.0`), pruning is second-order and in stages (`start` to `end`, four by default): at each, a cut
    copy of the model is calibrated on rows of the training data, the sizes that lose least for the cost are found, timed
    beside the model as it began, and corrected until they are as fast as this stage asks; what is masked then is made up
    for by new weights in what stays, and training heals the rest. See `prune_to`; `stages` holds what each achieved. When
    training ends, the first process writes `pruned.json`, `kept.png` and `error.png` (of the last stage) into `output_dir`.

    Only evaluations at full sparsity count for `load_best_model_at_end`: a best model from before never felt the final
    mask. A checkpoint from the middle holds its masks: it loads as the masked model, and resuming from it (also after a
    kill) ends as the uninterrupted run would have. An exception in `train()` takes every gate off again.

    What will be cut is tried before the first step, on sizes as they will be, so that what cannot be cut or saved is refused
    then. Where the cut is refused at the end all the same (weights that are not finite), the masked model is saved in
    `output_dir/masked` before that is raised.

    Args:
        heads (`float`, defaults to 0.0): the fraction of all heads to remove, in [0, 1).
        neurons (`float`, defaults to 0.0): the fraction of all FFN neurons to remove, in [0, 1).
        score (`str`, defaults to `"taylor"`): see `plan_pruning`, or `"movement"` (Sanh 2020): the sum over all steps so far of
            `-w * dL/dw`, which `smoothing` does not touch. Not `"fisher"`.
        schedule (`str`, *optional*): `"cubic"` (Zhu & Gupta 2017, the default without a target), `"linear"`, `"one_shot"`, or
            with a target `"gradual"` (the default there): each stage makes the model faster by the same factor.
        start (`float`, defaults to 0.1): when masking begins, as a fraction of all steps (scores are collected before).
        end (`float`, defaults to 0.5): when full sparsity is reached; the rest heals. `"one_shot"` masks all at `start`.
        every (`int`, *optional*): optimizer steps between two steps of the schedule; a twentieth of it by default, with a
            target a quarter.
        scope (`str`, defaults to `"global"`): rank all layers together, or each alone (`"layer"`).
        uniform (`bool`, defaults to `False`): give every layer the same width.
        round_to (`int`, *optional*): round kept neurons to a multiple of this; see `plan_pruning` for experts.
        smoothing (`float`, defaults to 0.98): weight of the past in the running average of scores.
        seed (`int`, defaults to 0): of `"random"`.
        inputs (`dict`, *optional*): a small batch for the proof of the cut (see `apply_`); by default inputs are made, or
            the first two rows of the training data are taken where they cannot be. With a target, a batch of the size and
            length that will be run, which is timed; by default the first batch that is calibrated on.
        speedup, macs, parameters, bytes (`float`, *optional*): a target, how many times faster (fewer), above 1, in the place
            of `heads` and `neurons`; see above.
        method (`str`, *optional*): `"obs"` with a target, `"score"` without: said for the reader, there is no choice yet.
        batches (`Iterable[dict]`, *optional*): what a target is calibrated on, in each process its share; by default rows of
            the training data.
        rows (`int`, defaults to 512): how many of them.
        tries (`int`, defaults to 100): choices of sizes that the last stage of a target runs, and a quarter as many before; 0
            takes the first. See `prune_to`.
        restart_rate (`bool`, defaults to `False`): let the learning-rate schedule begin anew over the steps that are left, when
            full sparsity is reached; with a target, at every stage (Renda, Frankle and Carbin 2020, *Comparing rewinding and
            fine-tuning*, arXiv:2003.02389). A rate that has almost run out heals little. For schedules that are a `LambdaLR`,
            as those of transformers are.

    Raises:
        CompressionError: at construction, options that mean nothing; when training begins, a model that cannot be cut
            exactly, adapters (PEFT), FSDP or DeepSpeed (which shard the weights that are scored), several processes without
            averaged gradients, a frozen projection under a gradient score, or a second `PruningCallback`.

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
        schedule: str | None = None,
        *,
        start: float = 0.1,
        end: float = 0.5,
        every: int | None = None,
        scope: str = "global",
        uniform: bool = False,
        round_to: int | None = None,
        smoothing: float = 0.98,
        seed: int = 0,
        inputs: Mapping[str, Any] | None = None,
        speedup: float | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        bytes: float | None = None,
        method: str | None = None,
        batches: Iterable[Mapping[str, Any]] | None = None,
        rows: int = 512,
        tries: int = TRIES,
        restart_rate: bool = False,
    ) -> None:
        check_options(heads, neurons, score, scope, round_to, uniform, training=True)
        targets = {"speedup": speedup, "macs": macs, "parameters": parameters, "bytes": bytes}
        aims = any(value is not None for value in targets.values())
        if aims:
            one_target(targets)
            if heads or neurons:
                raise CompressionError(
                    f"Give a target ({', '.join(n for n, v in targets.items() if v is not None)}) or the fractions heads and "
                    "neurons, not both: a target finds what goes of each."
                )
        methods = ("obs",) if aims else ("score",)
        if method is not None and method not in methods:
            raise CompressionError(
                f"method must be {methods[0]!r} {'with' if aims else 'without'} a target (speedup, macs, parameters or bytes), "
                f"got {method!r}."
            )
        schedule = schedule or ("gradual" if aims else "cubic")
        known = [*SCHEDULES, *(("gradual",) if aims else ())]
        why = " (which takes a target: speedup=...)" if schedule == "gradual" and not aims else ""
        check_schedule(schedule, start, end, every, known, why)
        if not heads and not neurons and not aims:
            raise CompressionError(
                "PruningCallback removes nothing: set heads or neurons to a fraction above 0, or a target such as speedup=2.0."
            )
        if type(rows) is not int or rows < 1:
            raise CompressionError(f"rows is a number of training rows >= 1 to calibrate on, got {rows!r}.")
        if type(tries) is not int or tries < 0:
            raise CompressionError(f"tries is how many choices of sizes are run, 0 or more, got {tries!r}.")
        if not isinstance(restart_rate, bool):
            raise CompressionError(f"restart_rate must be True or False, got {restart_rate!r}.")
        if batches is not None and not aims:
            raise CompressionError("batches are for second-order pruning; give them with a target (speedup=).")
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise CompressionError(f"smoothing must lie in [0, 1), got {smoothing!r}.")
        check_seed(seed)
        check_inputs(inputs)
        self.inputs, self.batches = inputs, None if batches is None else checked_batches(batches)
        self.stages: list[dict[str, Any]] = []  # of a target: what was asked, achieved, left and lost each time
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
            **targets,
            "rows": rows,
            "tries": tries,
            "restart_rate": restart_rate,
        }
        self.saved: dict[str, Any] | None = None  # what a checkpoint gave back, until training begins
        self.plan: Plan | None = None  # what was cut, once training has ended
        self._run: PruningRun | None = None

    def __repr__(self) -> str:
        aims = [name for name in TARGETS if self.options[name] is not None]
        shown = (*aims, "schedule") if aims else ("heads", "neurons", "score", "schedule")
        return f"PruningCallback({', '.join(f'{name}={self.options[name]!r}' for name in shown)})"

    def state(self) -> dict[str, Any]:
        """What travels in the Trainer's own `trainer_state.json`."""
        return {"args": self.options, "attributes": {"saved": self._run.state() if self._run else None}}

    # --- events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        if model is None:
            raise CompressionError("PruningCallback was given no model: add it to a Trainer.")
        trainer = calling_trainer()
        refuse_sharded(trainer, model, type(self).__name__)
        check_adapters(model)
        refuse_drifting(trainer, type(self).__name__)
        others = [] if trainer is None else [c for c in trainer.callback_handler.callbacks if c is not self]
        if any(isinstance(other, PruningCallback) for other in others):
            raise CompressionError("Two PruningCallbacks in one Trainer would gate the same weights; use one.")
        saved = self.saved or saved_in(state, type(self).__name__)
        if self.plan is not None and trainer is not None and not resumed_from(trainer):
            logger.warning(
                f"{self!r} has cut a model already; this training removes the same fractions of what is left. Take it out of "
                "the Trainer (trainer.remove_callback) to train on without pruning."
            )
        self.saved, self.plan, self._run = None, None, None
        if trainer is not None:
            restore_what_stock_lost(trainer, model)
        # a run that began without us has no place for our state, and Trainer assumes one
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if any(self.options[name] is not None for name in TARGETS):
            run = StagedRun(model, self.options, state.max_steps, trainer, self.inputs, self.batches)
        else:
            run = PruningRun(model, self.options, state.max_steps, trainer, self.inputs)
        if self.options["restart_rate"]:
            check_restarts(lr_scheduler)
        run.check()
        if getattr(args, "torch_compile", False):
            torch.compiler.reset()  # graphs of an evaluation before training know no gates

        def enter() -> None:
            if self._run is None:
                self._run = run
                if self.options["restart_rate"]:
                    run.undo = restart_(lr_scheduler, run.restarts(), state.max_steps)
                run.begin(saved)

        if trainer is None:
            enter()
        else:
            guard(trainer, enter, self._abandon)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._run is not None:
            self._run.observe()

    def on_step_end(self, args, state, control, **kwargs):
        if self._run is not None and self._run.advance(state.global_step):
            # whatever was best so far never felt the final mask
            state.best_metric = None
            state.best_model_checkpoint = None
            state.best_global_step = None

    def on_push_begin(self, args, state, control, **kwargs):
        card_in_(calling_trainer(), self.plan)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        run, trainer = self._run, self._run.trainer if self._run else None
        if run is None:
            return
        restore_best(args, state, run.model)
        if not run.is_full:
            logger.warning(
                "Training ended before the schedule reached full sparsity; the rest is cut now, without healing. "
                "Set `end` lower, or train longer."
            )
            run.finish()
        run.undo()
        run.warn_if_off()
        self.stages = run.stages
        try:
            self.plan = run.cut(optimizer)
        except CompressionError as error:
            raise self._kept(run, args, error) from error
        self._run = None
        if isinstance(run, StagedRun) and state.is_world_process_zero and args.output_dir:
            try:
                run.save(args.output_dir, self.plan)
            except CompressionError as error:  # the training is not lost for a picture
                logger.warning(str(error))
        if trainer is not None:
            unguard(trainer)
            trainer.model_wrapped = trainer.model  # a wrapper around it holds weights that are gone
        if getattr(args, "torch_compile", False):
            torch.compiler.reset()

    def _kept(self, run: PruningRun, args: Any, error: CompressionError) -> CompressionError:
        """What to say where the cut is refused after all (a training that diverged, say): the training is kept, masked."""
        self._run = None
        if run.trainer is None:
            return CompressionError(f"{error} The model is trained, and its masks are on: it can be saved.")
        unguard(run.trainer)
        folder = os.path.join(args.output_dir or ".", "masked")
        run.trainer.save_model(folder)
        return CompressionError(
            f"{error} The training is not lost: the model is saved under its masks in {folder!r}, at its full size. Load it, "
            "and cut what can be cut: apply_(model, model.config.quantization_config.masks)."
        )

    def _abandon(self) -> None:
        """Training failed: leave no gate behind."""
        run, self._run = self._run, None
        if run is not None:
            if run.trainer is not None:
                unguard(run.trainer)
            run.undo()
            run.abandon()
