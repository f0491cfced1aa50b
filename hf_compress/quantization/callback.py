"""`QuantizationCallback`: train with rounded weights, end with quantized ones, in anybody's Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..edits import CompressionError, Quantize
from ..host import (
    calling_trainer,
    guard,
    refuse_drifting,
    refuse_sharded,
    restore_best,
    restore_what_stock_lost,
    resumed_from,
    unguard,
)
from ..modules import is_gated
from ..plan import Plan
from ..planners import HEADS, check_choice, plan_quantization
from ..pruning.callback import PruningCallback
from ..pruning.sparsity_callback import SparsityCallback
from ..publish import card_in_
from ..refusals import check_adapters
from ..sparse import is_sparse
from ..substitute import sharers, weights_in
from ..surgery import apply_
from .fake import fake_, is_fake, observe_, scales_of, unfake_

logger = logging.get_logger(__name__)

SCALES_FILE = "quantization_scales.safetensors"


class QuantizationCallback(TrainerCallback):
    """Quantization-aware training: weights are rounded in every forward, gradients go straight through (Jacob et al. 2018).

    The model computes what the quantized one will compute (weights, and with 8 bits activations), while the optimizer
    trains the float weights underneath. Scales follow the weights every `every` steps and are frozen after `freeze` of
    the training, so that the last steps train for the very grid that is kept. When training ends the modules are
    quantized for real, by the same scales. In a `DistillationTrainer` this is quantization-aware distillation.

    Checkpoints in the middle hold the float weights, and beside them the scales: resuming goes on exactly. `Trainer`'s
    evaluations see the rounded model.

    Args:
        bits (`int`): 8, 4, 3 or 2; see `Quantize`.
        embeddings (`bool`, defaults to `True`): embeddings too.
        skip, modules (`str`, *optional*): regular expressions on names: what stays in full precision, and the only modules
            that are quantized; see `plan_quantization`.
        group_size, activations, decode: see `Quantize`.
        start (`float`, defaults to 0.0): the fraction of the training after which rounding begins.
        freeze (`float`, defaults to 0.9): the fraction after which scales stay.
        every (`int`, defaults to 16): steps between two choices of the scales.
        inputs (`dict`, *optional*): a small batch, where none can be made from the config.

    Raises:
        CompressionError: at construction, options that mean nothing; when training begins, a model that is quantized
            already, sharded weights, or a `PruningCallback` beside this one (prune in one training, quantize in the next).

    Example:

    ```python
    >>> from hf_compress import QuantizationCallback
    >>> QuantizationCallback(bits=4, freeze=0.8)
    QuantizationCallback(bits=4, start=0.0, freeze=0.8)

    ```
    """

    def __init__(
        self,
        bits: int,
        *,
        embeddings: bool = True,
        skip: str | None = HEADS,
        modules: str | None = None,
        group_size: int | None = None,
        activations: str | None = None,
        decode: str = "load",
        start: float = 0.0,
        freeze: float = 0.9,
        every: int = 16,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        Quantize("any", bits, group_size, activations, decode)  # refuses what it would
        check_choice(embeddings, skip, modules, inputs)
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (start, freeze))
        if not numbers or not 0 <= start <= freeze <= 1:
            raise CompressionError(
                f"start and freeze are fractions of the training, 0 <= start <= freeze <= 1, got {start!r} and {freeze!r}."
            )
        if type(every) is not int or every < 1:
            raise CompressionError(f"every is a number of optimizer steps >= 1, got {every!r}.")
        self.options: dict[str, Any] = {
            "bits": bits,
            "embeddings": embeddings,
            "skip": skip,
            "modules": modules,
            "group_size": group_size,
            "activations": activations,
            "decode": decode,
            "inputs": inputs,
        }
        self.start, self.freeze, self.every = start, freeze, every
        self.plan: Plan | None = None  # what was quantized, once training has ended
        self._model: Any = None
        self._trainer: Trainer | None = None
        self._planned: list[Any] = []
        self._modules: dict[str, nn.Module] = {}  # by name, those that round now
        self._frozen = False

    def __repr__(self) -> str:
        return f"QuantizationCallback(bits={self.options['bits']}, start={self.start}, freeze={self.freeze})"

    # --- events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model is None:
            raise CompressionError("QuantizationCallback was given no model: add it to a Trainer.")
        trainer = calling_trainer()
        refuse_sharded(trainer, model, type(self).__name__)
        check_adapters(model)
        refuse_drifting(trainer, type(self).__name__)
        for other in [] if trainer is None else trainer.callback_handler.callbacks:
            if other is not self and isinstance(other, PruningCallback | QuantizationCallback | SparsityCallback):
                raise CompressionError(
                    f"A QuantizationCallback cannot share a training with a {type(other).__name__}: both change what the same "
                    "modules compute. Train twice: prune first, then quantize what is left."
                )
        if trainer is not None:
            restore_what_stock_lost(trainer, model)
        gated = next((name for name, module in model.named_modules() if is_gated(module)), None)
        if gated is not None:
            raise CompressionError(f"{gated!r} is masked; cut it first (apply_ with the plan of the mask), then quantize.")
        sparse = next((name for name, module in model.named_modules() if is_sparse(module)), None)
        if sparse is not None:
            raise CompressionError(
                f"{sparse!r} is sparse, and rounding while training would let its zeros grow. Quantize it after training: "
                "apply_(model, plan_quantization(model, bits=8)) keeps them at zero."
            )
        self._planned = list(plan_quantization(model, **self.options))
        self._model, self._trainer, self.plan = model, trainer, None
        self._modules, self._frozen = {}, False
        checkpoint: Any = None if trainer is None else resumed_from(trainer)
        if checkpoint is not None:
            self._check_resumed(checkpoint)

        def enter() -> None:
            if not self._modules and state.global_step >= round(self.start * state.max_steps):
                self._round(checkpoint)

        if trainer is None:
            enter()
        else:
            guard(trainer, enter, self._abandon)

    def on_step_end(self, args, state, control, **kwargs):
        if self._model is None:
            return
        if not self._modules:
            if state.global_step >= round(self.start * state.max_steps):
                self._round(None)
                # whatever was best so far was never rounded
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        elif not self._frozen and (state.global_step % self.every == 0 or self._is_late(state)):
            self._observe()
            self._frozen = self._is_late(state)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if self._modules and state.is_world_process_zero and folder.is_dir():
            how = {name: str(value) for name, value in self._grid().items()}
            tensors = {**self._tensors(), "frozen": torch.tensor(self._frozen)}
            save_file(tensors, os.fspath(folder / SCALES_FILE), metadata=how)

    def on_push_begin(self, args, state, control, **kwargs):
        card_in_(calling_trainer(), self.plan)

    def on_train_end(self, args, state, control, **kwargs):
        if self._model is None:
            return
        if not self._modules:
            logger.warning(
                f"Training ended before rounding began (start={self.start} of {state.max_steps} steps): the model is quantized "
                "as after training, without having felt it. Set `start` lower, or train longer."
            )
            self._round(None)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None:
            restore_best(args, state, self._model)
            if not self._load(best):
                self._observe()
        model, planned, trainer = self._model, self._planned, self._trainer
        tensors = self._tensors()
        self._stop()
        self.plan = Plan([replace(edit, given=True) for edit in planned], tensors)
        apply_(model, self.plan, inputs=self.options["inputs"])
        if trainer is not None:
            unguard(trainer)
            trainer.model_wrapped = trainer.model  # a wrapper around it holds weights that are gone
            trainer.optimizer = trainer.lr_scheduler = None  # and so does the optimizer

    # --- rounding ----------------------------------------------------------------------------------------------

    def _round(self, checkpoint: Any) -> None:
        holders = weights_in(dict(self._model.named_modules()))
        for edit in self._planned:
            module = self._model.get_submodule(edit.module)
            for name, sharer in [(edit.module, module), *sharers(module, holders)]:
                # of what is tied (a head to an embedding), only the weights are rounded: both hold the same integers
                floats = edit.activations == "none" or sharer is not module or isinstance(module, nn.Embedding)
                fake_(sharer, edit.bits, edit.group_size, None if floats else edit.activations)
                self._modules[name] = sharer
        if checkpoint is None or not self._load(checkpoint):
            self._observe()

    def _observe(self) -> None:
        for module in self._modules.values():
            observe_(module)

    def _is_late(self, state: Any) -> bool:
        return state.global_step >= round(self.freeze * state.max_steps)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The scales of the plan's modules, as `Quantize(given=True)` takes them."""
        found: dict[str, torch.Tensor] = {}
        for edit in self._planned:
            for key, (scale, zero) in scales_of(self._modules[edit.module]).items():
                found[f"{edit.module}.{key}_scale"] = scale.cpu().contiguous()
                if zero is not None:
                    found[f"{edit.module}.{key}_zero"] = zero.cpu().contiguous()
        return found

    def _grid(self) -> dict[str, Any]:
        """The options that say what scales mean."""
        first = self._planned[0]
        return {"bits": first.bits, "group_size": first.group_size, "activations": first.activations}

    def _check_resumed(self, checkpoint: Any) -> None:
        """Refuse scales of other options now, and not when training ends."""
        path = Path(checkpoint) / SCALES_FILE
        if not path.is_file():
            return
        with safe_open(os.fspath(path), "pt") as file:
            found, names = file.metadata() or {}, set(file.keys())
        mine = {name: str(value) for name, value in self._grid().items()}
        differ = sorted(name for name in mine if found.get(name) != mine[name])
        if differ:
            raise CompressionError(
                f"The checkpoint was trained with {differ[0]}={found.get(differ[0])}, this callback has {mine[differ[0]]}: "
                "resume with the options that the run began with."
            )
        missing = [edit.module for edit in self._planned if f"{edit.module}.weight_scale" not in names]
        if missing:
            raise CompressionError(
                f"The checkpoint has no scale for {missing[0]!r} (of {len(missing)}): it was trained with another skip=, "
                "modules= or embeddings=. Resume with the options that the run began with."
            )

    def _load(self, checkpoint: Any) -> bool:
        """The scales that were saved with a checkpoint; False where it was saved before rounding began."""
        path = Path(checkpoint) / SCALES_FILE
        if not path.is_file():
            return False
        tensors = load_file(os.fspath(path))
        self._frozen = bool(tensors.pop("frozen"))
        holders = weights_in(dict(self._model.named_modules()))
        for edit in self._planned:
            module = self._modules[edit.module]
            device = next(module.parameters()).device
            for sharer in [module, *(m for _, m in sharers(module, holders))]:
                for key in ("weight", "weight_in"):
                    scale = tensors.get(f"{edit.module}.{key}_scale")
                    zero = tensors.get(f"{edit.module}.{key}_zero")
                    if scale is not None:
                        scales_of(sharer)[key] = (scale.to(device), None if zero is None else zero.to(device))
        return True

    def _stop(self) -> None:
        for module in self._modules.values():
            if is_fake(module):
                unfake_(module)
        self._modules, self._model = {}, None

    def _abandon(self) -> None:
        """Training failed: leave no rounding behind."""
        trainer = self._trainer
        self._stop()
        if trainer is not None:
            unguard(trainer)
