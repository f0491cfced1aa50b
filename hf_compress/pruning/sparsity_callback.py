"""`SparsityCallback`: make single weights zero while anybody's Trainer fine-tunes, and keep them so."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..edits import CompressionError
from ..grams import check_inputs
from ..host import (
    calling_trainer,
    first_rows,
    guard,
    log_beside,
    loss_scale,
    refuse_drifting,
    refuse_sharded,
    restore_best,
    restore_what_stock_lost,
    resumed_from,
    unguard,
)
from ..plan import Plan
from ..planners import name_pattern
from ..probe import NoInputs, probing
from ..publish import card_in_
from ..refusals import check_adapters, check_foreign
from ..sparse import MASK, is_sparse
from ..sparsity import Masks, matrix_of, pack_bits, read_pattern, unpack_bits
from ..surgery import apply_
from .callback import PruningCallback
from .held import Held, hold_, masks_by
from .schedules import SCHEDULES, check_schedule
from .weights import check_sparsity_options, edit_of, sparsifiable

logger = logging.get_logger(__name__)

MASKS_FILE = "sparsity_masks.safetensors"
SCORES = ("magnitude", "movement")


class SparsityCallback(TrainerCallback):
    """Prune single weights during fine-tuning, in a plain `Trainer`, `Seq2SeqTrainer` or any subclass.

    From `start` to `end` the sparsity follows a schedule: at each step of it the weights that score lowest become zero. They
    get no gradient any more, are zeroed again after every optimizer step (weight decay and momentum do not move them), and
    never come back. When training ends, after the best model is loaded, the modules become sparse (`Sparsify`):
    `trainer.save_model` then writes bits and the weights that stay. Dense kernels multiply zeros, so nothing gets faster.

    Scores: `"magnitude"` is \\|w\\| as it is at that step (Zhu & Gupta 2017). `"movement"` is `S = -sum over steps of lr * w *
    dL/dw`, how far a weight has moved away from zero (Sanh et al. 2020, arXiv:2005.07683), from the gradients that training
    makes anyway, once per optimizer step, after clipping; so gradient accumulation and distributed averaging are in it.
    (There, masked weights go on being scored by a straight-through gradient and may return; here what is zero moves nowhere.)

    Checkpoints from the middle hold zeros in dense weights, which any transformers loads, and beside them the masks and
    scores: resuming goes on exactly. An exception in `train()` leaves the model with the zeros that it had, held no more.
    Only evaluations at full sparsity count for `load_best_model_at_end`.

    Args:
        sparsity (`float`, defaults to 0.5): the fraction of these modules' weights that goes, in (0, 1).
        pattern (`str`, *optional*): `"2:4"`, `"4:8"`, ...: so many of every group of neighbours stay at the end; `sparsity` is
            not looked at then.
        score (`str`, defaults to `"magnitude"`): or `"movement"`.
        schedule (`str`, defaults to `"cubic"`): `"cubic"`, `"linear"` or `"one_shot"`, as for `PruningCallback`.
        start (`float`, defaults to 0.1): when masking begins, as a fraction of all steps (movement is scored before).
        end (`float`, defaults to 0.5): when full sparsity is reached; the rest heals. `"one_shot"` masks all at `start`.
        scope (`str`, defaults to `"layer"`): weights compete within each module, within each output (`"row"`), or all together
            (`"global"`; a module always keeps its best weight).
        every (`int`, *optional*): optimizer steps between two steps of the schedule; a twentieth of it by default.
        modules (`str`, *optional*): a regular expression on module names; see `plan_sparsity`.
        inputs (`dict`, *optional*): a small batch for the proof of the edit (see `apply_`); by default inputs are made, or the
            first two rows of the training data are taken where they cannot be.

    Raises:
        CompressionError: at construction, options that mean nothing; when training begins, nothing to make sparse, frozen
            weights under `"movement"`, adapters (PEFT), sharded weights, several processes without averaged gradients, or
            another callback that changes the same weights.

    Example:

    ```python
    >>> from hf_compress import SparsityCallback
    >>> SparsityCallback(sparsity=0.8, score="movement")
    SparsityCallback(sparsity=0.8, pattern=None, score='movement', schedule='cubic')

    ```
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: str | None = None,
        score: str = "magnitude",
        schedule: str = "cubic",
        *,
        start: float = 0.1,
        end: float = 0.5,
        scope: str = "layer",
        every: int | None = None,
        modules: str | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        check_sparsity_options(sparsity, pattern, score, scope, SCORES)
        check_schedule(schedule, start, end, every)
        if modules is not None:
            name_pattern(modules, "modules")
        check_inputs(inputs)
        self.inputs = inputs
        self.options: dict[str, Any] = {
            "sparsity": sparsity if pattern is None else None,
            "pattern": pattern,
            "score": score,
            "schedule": schedule,
            "start": start,
            "end": end,
            "scope": scope,
            "every": every,
            "modules": modules,
        }
        group = read_pattern(pattern)
        self.sparsity = float(sparsity) if group is None else 1 - group[0] / group[1]
        self.plan: Plan | None = None  # what was made sparse, once training has ended
        self._run: _Run | None = None

    def __repr__(self) -> str:
        shown = ("sparsity", "pattern", "score", "schedule")
        return f"SparsityCallback({', '.join(f'{name}={self.options[name]!r}' for name in shown)})"

    # --- events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model is None:
            raise CompressionError("SparsityCallback was given no model: add it to a Trainer.")
        trainer = calling_trainer()
        refuse_sharded(trainer, model, type(self).__name__)
        check_adapters(model)
        refuse_drifting(trainer, type(self).__name__)
        self._refuse_others(trainer)
        if trainer is not None:
            restore_what_stock_lost(trainer, model)
        self.plan, self._run = None, None
        run = _Run(model, self.options, self.sparsity, state.max_steps, trainer, self.inputs)
        checkpoint = None if trainer is None else resumed_from(trainer)
        saved = None if checkpoint is None else run.read(Path(checkpoint) / MASKS_FILE)

        def enter() -> None:
            if self._run is None:
                self._run = run
                run.begin(saved)

        if trainer is None:
            enter()
        else:
            guard(trainer, enter, self._abandon)

    def _refuse_others(self, trainer: Trainer | None) -> None:
        from ..quantization.callback import QuantizationCallback  # which looks for callbacks of this package too

        for other in [] if trainer is None else trainer.callback_handler.callbacks:
            if other is not self and isinstance(other, SparsityCallback | PruningCallback | QuantizationCallback):
                raise CompressionError(
                    f"A SparsityCallback cannot share a training with a {type(other).__name__}: both change the same weights. "
                    "Train twice: cut first, then make what is left sparse, then quantize."
                )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._run is not None:
            self._run.observe(optimizer)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._run is not None and self._run.held is not None:
            self._run.held.zero_()

    def on_step_end(self, args, state, control, **kwargs):
        if self._run is not None and self._run.advance(state.global_step):
            # whatever was best so far never felt the final mask
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if self._run is not None and state.is_world_process_zero and folder.is_dir():
            self._run.write(folder / MASKS_FILE)

    def on_push_begin(self, args, state, control, **kwargs):
        card_in_(calling_trainer(), self.plan)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        run = self._run
        if run is None:
            return
        restore_best(args, state, run.model)
        if not run.is_full:
            logger.warning(
                "Training ended before the schedule reached full sparsity; the rest is zeroed now, without healing. "
                "Set `end` lower, or train longer."
            )
            run.mask(1.0)
        self.plan = run.finish()
        self._run = None
        if run.trainer is not None:
            unguard(run.trainer)
            run.trainer.model_wrapped = run.trainer.model  # a wrapper around it holds weights that are gone
            run.trainer.optimizer = run.trainer.lr_scheduler = None  # and so does the optimizer
        if getattr(args, "torch_compile", False):
            torch.compiler.reset()

    def _abandon(self) -> None:
        """Training failed: hold no more; the zeros stay, and the model is one like any."""
        run, self._run = self._run, None
        if run is not None:
            if run.trainer is not None:
                unguard(run.trainer)
            if run.held is not None:
                run.held.release()


class _Run:
    """One `train()` of one model: which weights are held, and how they score."""

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, Any],
        sparsity: float,
        max_steps: int,
        trainer: Trainer | None,
        inputs: Mapping[str, Any] | None,
    ) -> None:
        check_foreign(model)
        self.model, self.options, self.sparsity, self.trainer = model, options, sparsity, trainer
        self.inputs = self._inputs(inputs)
        self.modules = sparsifiable(model, options["pattern"], options["modules"], self.inputs)
        for name, module in self.modules.items():
            weight: Any = module.weight
            columns = matrix_of(module, weight).shape[1]
            if options["scope"] != "global" and round(
                sparsity * (columns if options["scope"] == "row" else weight.numel())
            ) >= (columns if options["scope"] == "row" else weight.numel()):
                raise CompressionError(f"sparsity={sparsity:g} leaves nothing of {name!r}; lower it, or choose modules=...")
            if options["score"] == "movement" and not weight.requires_grad:
                raise CompressionError(
                    f"score='movement' reads the gradient of {name!r}, which is frozen. Train it, or use score='magnitude'."
                )
        self.first = max(1, round(options["start"] * max_steps))
        self.last = self.first if options["schedule"] == "one_shot" else max(self.first, round(options["end"] * max_steps))
        self.every = options["every"] or max(1, (self.last - self.first) // 20)
        self.moved: dict[str, torch.Tensor] = {}  # by module: S
        self.held: Held | None = None
        self.is_full = False

    def _inputs(self, inputs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """What the proof at the end will run on: found out now, not after hours of training."""
        try:
            with probing(self.model, inputs):
                return inputs
        except NoInputs as error:
            found = None if inputs is not None or self.trainer is None else first_rows(self.trainer)
            if found is None:
                raise NoInputs(f"{error} Give them to the callback: SparsityCallback(inputs=...).") from error
            return found

    def begin(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """Hold nothing, what is sparse already, or what a checkpoint held."""
        masks: Masks = {}
        for name, module in self.modules.items():
            weight: Any = module.weight
            bits = None if saved is None else saved.get(f"{name}.{MASK}")
            if bits is not None:
                masks[f"{name}.weight"] = unpack_bits(bits.to(weight.device), weight.shape)
            else:
                whole = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
                masks[f"{name}.weight"] = module.mask().to(weight.device) if is_sparse(module) else whole  # type: ignore[operator]
            if saved is not None and f"{name}.moved" in saved:
                self.moved[name] = saved[f"{name}.moved"].to(weight.device)
        self.is_full = saved is not None and bool(saved["is_full"])
        self.held = hold_(self.model, masks)

    # --- every step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, optimizer: Any) -> None:
        """Add this step's movement, of the weights and gradients as the optimizer is about to see them."""
        if self.is_full or self.options["score"] != "movement" or optimizer is None:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        scale = loss_scale(self.trainer)
        for name, module in self.modules.items():
            weight: Any = module.weight
            if weight.grad is None or id(weight) not in rates:
                continue
            now = weight.float() * weight.grad.float() * (float(rates[id(weight)]) / scale)
            if not bool(now.isfinite().all()):
                continue  # a skipped step of mixed precision
            old = self.moved.get(name)
            self.moved[name] = -now if old is None else old.sub_(now)

    def advance(self, step: int) -> bool:
        """Move the masks to where the schedule says they are; whether full sparsity was reached at this step."""
        if self.is_full or step < self.first or (step < self.last and (step - self.first) % self.every):
            return False
        progress = 1.0 if step >= self.last else (step - self.first) / (self.last - self.first)
        self.mask(SCHEDULES[self.options["schedule"]](progress))
        self.is_full = progress >= 1.0
        return self.is_full

    @torch.no_grad()
    def mask(self, share: float) -> None:
        """Zero the weights that score lowest, this share of all that will go; what is gone stays gone."""
        assert self.held is not None
        alive, pattern, scope = self.held.masks, self.options["pattern"], self.options["scope"]
        scores = {f"{name}.weight": self._score(name, module) for name, module in self.modules.items()}
        if pattern is not None:
            final = masks_by(self.model, scores, 0.0, scope, pattern, alive)
            if share >= 1:
                return self._hold(final, scores)
            scores = {name: score.masked_fill(final[name], torch.inf) for name, score in scores.items()}
        self._hold(masks_by(self.model, scores, self.sparsity * share, scope, None, alive), scores)

    def _score(self, name: str, module: Any) -> torch.Tensor:
        if self.options["score"] == "magnitude":
            return module.weight.detach().float().abs()
        if name not in self.moved:
            raise CompressionError(
                f"No movement of {name!r} was seen before masking began: training does not reach it. Leave it out with "
                "modules=..., begin later (start=), or use score='magnitude'."
            )
        return self.moved[name]

    def _hold(self, masks: Masks, scores: Mapping[str, torch.Tensor]) -> None:
        assert self.held is not None
        for name, mask in masks.items():
            if not bool(mask.any()):  # a checkpoint holds at least one weight of a module
                mask.view(-1)[scores[name].flatten().argmax()] = True
        self.held.set_(masks)
        log_beside(self.trainer, {"weights_removed": round(self.held.sparsity, 4)})

    def finish(self) -> Plan:
        """The modules that hold their masks themselves."""
        assert self.held is not None
        masks = self.held.masks
        self.held.release()
        exact = self.sparsity if self.options["scope"] == "row" else None
        edits, tensors = [], {}
        for name in self.modules:
            edit, bits = edit_of(name, masks[f"{name}.weight"], self.options["pattern"], exact)
            if edit is not None:
                edits.append(edit)
                tensors[f"{name}.{MASK}"] = bits
        plan = Plan(edits, tensors)
        apply_(self.model, plan, inputs=self.inputs)
        return plan

    # --- across checkpoints ------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """The masks and the scores, beside a checkpoint."""
        assert self.held is not None
        tensors = {name.removesuffix("weight") + MASK: pack_bits(mask).cpu() for name, mask in self.held.masks.items()}
        tensors |= {f"{name}.moved": score.cpu() for name, score in self.moved.items() if not self.is_full}
        tensors["is_full"] = torch.tensor(self.is_full)
        save_file(tensors, os.fspath(path), metadata={"options": json.dumps(self.options)})

    def read(self, path: Path) -> dict[str, torch.Tensor] | None:
        """What `write` wrote; None where this run began without us. Other options are refused now."""
        if not path.is_file():
            return None
        with safe_open(os.fspath(path), "pt") as file:
            options = json.loads((file.metadata() or {}).get("options", "{}"))
        differ = sorted(key for key, value in self.options.items() if options.get(key, value) != value)
        if differ:
            raise CompressionError(
                f"The checkpoint was pruned with {differ[0]}={options[differ[0]]!r}, this callback has "
                f"{self.options[differ[0]]!r}: resume with the options that the run began with."
            )
        tensors = load_file(os.fspath(path))
        for name, module in self.modules.items():
            weight: Any = module.weight
            bits = tensors.get(f"{name}.{MASK}")
            if bits is None or tuple(bits.shape) != (-(-weight.numel() // 8),):
                raise CompressionError(f"The checkpoint's masks ({path.name}) have none that fits {name!r}: another model.")
        return tensors
