"""The Trainer that a callback runs in: found, checked, guarded. For every callback that changes weights."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import OptState
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer

from .edits import CompressionError
from .resume import keys_differ, restore_weights


def calling_trainer() -> Trainer | None:
    """The Trainer whose `train` is running. Callbacks are told everything but this, so the stack is asked."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def saved_in(state: Any, name: str) -> dict[str, Any] | None:
    """Our state in a resumed `TrainerState`, whether or not `restore_callback_states_from_checkpoint` is on."""
    found = (state.stateful_callbacks or {}).get(name)
    return (found or {}).get("attributes", {}).get("saved") if isinstance(found, dict) else None


def refuse_sharded(trainer: Trainer | None, model: nn.Module, who: str) -> None:
    """Refuse weights that no process holds whole."""
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if sharded or (trainer is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)):
        raise CompressionError(
            f"{who} does not work with weights that are sharded over processes (FSDP, DeepSpeed, tensor parallel): heads and "
            "neurons are scored and gated on whole weights. Use DistributedDataParallel (torchrun without fsdp), or prune "
            "first with plan_pruning and apply_, then train sharded."
        )


def refuse_drifting(trainer: Trainer | None, who: str) -> None:
    """Refuse several processes whose gradients nobody averages: each would end with a plan and weights of its own.

    transformers 5.23 with accelerate 1.15 leaves the DistributedDataParallel wrapper off where the same model was evaluated
    before it is trained (`prepare_model(evaluation_mode=True)` marks it as prepared).
    """
    if trainer is None or trainer.args.world_size < 2 or isinstance(trainer.model_wrapped, DistributedDataParallel):
        return
    marked = vars(trainer.model).get("_is_accelerate_prepared", False)
    if marked and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise CompressionError(
            f"{who} runs in {trainer.args.world_size} processes whose gradients are not averaged: this model was evaluated "
            "before its training, and transformers then leaves out DistributedDataParallel. Evaluate after training, evaluate "
            "another copy of the model, or `del model._is_accelerate_prepared` before train()."
        )


def resumed_from(trainer: Trainer) -> str | None:
    """The checkpoint that the running `train()` resumes from; None where it begins anew."""
    frame = sys._getframe(1)
    while frame is not None:
        checkpoint = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(checkpoint, str | os.PathLike):
            return os.fspath(checkpoint)
        frame = frame.f_back
    return None


def restore_what_stock_lost(trainer: Trainer, model: Any) -> None:
    """Stock `Trainer` skips weights that are saved under other names (ViT, Swin, ...); read them again, all of them."""
    checkpoint = resumed_from(trainer)
    if checkpoint is not None and isinstance(model, PreTrainedModel) and keys_differ(model, checkpoint):
        restore_weights(model, checkpoint)


def restore_best(args: Any, state: Any, model: Any) -> None:
    """Put the best model's weights in where stock `Trainer` skipped those that are saved under other names (ViT, Swin, ...).

    For `on_train_end`, before anything changes. Only the first callback that asks does it: another may have cut or quantized
    the model by then, which the checkpoint would not fit any more. Does nothing where no best model was loaded, or where
    weights are saved as they are named.
    """
    best = state.best_model_checkpoint
    if not args.load_best_model_at_end or best is None or vars(state).get("_hfc_restored") == best:
        return
    vars(state)["_hfc_restored"] = best  # no field of the dataclass, so it is not saved
    if isinstance(model, PreTrainedModel) and keys_differ(model, best):
        restore_weights(model, best)


def first_rows(trainer: Trainer, rows: int = 2) -> dict[str, Any] | None:
    """A small batch of the training data, collated as the Trainer would, without labels; None where rows have no index.

    No data loader is made, so training sees what it would have seen.
    """
    batches = _collated(trainer, [range(rows)])
    if not batches:
        return None
    return {name: value for name, value in trainer._prepare_inputs(batches[0]).items() if "label" not in name}


def calibration_batches(trainer: Trainer, rows: int) -> list[dict[str, Any]] | None:
    """So many rows of the training data, evenly spread, in batches as for training; of several processes, this one's share.

    None where rows have no index. Training sees what it would have seen.
    """
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__len__") or not len(dataset):
        return None
    args = trainer.args
    count = min(rows, len(dataset))
    mine = [i * len(dataset) // count for i in range(count)][args.process_index :: args.world_size]
    size = max(1, args.per_device_train_batch_size)
    return _collated(trainer, [mine[i : i + size] for i in range(0, len(mine), size)])


def _collated(trainer: Trainer, rows: Iterable[Sequence[int]]) -> list[dict[str, Any]] | None:
    """Batches of these rows of the training data, collated as the Trainer would, with all random states put back."""
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator)  # type: ignore[arg-type]
            return [dict(collate([dataset[i] for i in chosen if i < len(dataset)])) for chosen in rows]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def log_beside(trainer: Trainer | None, numbers: dict[str, float]) -> None:
    """Log numbers of our own in the middle of a step: the loss of this step is told as it would have been.

    Not with the `log` of a subclass, which may empty averages of its own (TRL).
    """
    if trainer is not None:
        due = trainer.control.should_log  # which `log` takes back
        Trainer.log(trainer, numbers)
        trainer.control.should_log = due


def loss_scale(trainer: Trainer | None) -> float:
    """What gradients are multiplied by now, between the backward pass and the optimizer's step.

    Float16 training multiplies its loss, and the scaler divides gradients by as much before they are clipped, before their
    norm is logged (transformers 5.23 does that without clipping too), or in the optimizer's step: it alone knows if it has.
    """
    scaler: Any = None if trainer is None else getattr(trainer.accelerator, "scaler", None)
    if trainer is None or scaler is None:
        return 1.0
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    known = scaler._per_optimizer_states.get(id(optimizer))
    return float(scaler.get_scale()) if known is None or known["stage"] is OptState.READY else 1.0


GUARDED = ("_run_epoch", "_evaluate", "_finalize_training")


def guard(trainer: Trainer, enter: Callable[[], None], abandon: Callable[[], None]) -> None:
    """Call `enter` when this `train()` gets to work, and `abandon` when an exception (Ctrl-C too) leaves it.

    `on_train_begin` is too early to change a model: another callback may still refuse to train. So `enter` runs with the
    first thing that a training does. Several callbacks may guard one training; the first `unguard` ends it for all, since
    it comes with the end of the training.
    """
    state = trainer.state
    waiting = trainer.__dict__.get("_hfc_guards")
    if waiting is not None and waiting[0] is state:
        waiting[1].append((enter, abandon))
        return
    unguard(trainer)
    guards = [(enter, abandon)]
    trainer.__dict__["_hfc_guards"] = (state, guards)

    def guarded(function: Callable[..., Any], enters: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if trainer.state is not state:  # a later train() without us
                return function(*args, **kwargs)
            try:
                for begin, _ in guards if enters else ():
                    begin()
                return function(*args, **kwargs)
            except BaseException:
                for _, leave in guards:
                    leave()
                raise

        return call

    for name in GUARDED:
        trainer.__dict__[name] = guarded(getattr(trainer, name), True)
    handler = trainer.callback_handler
    handler.__dict__["call_event"] = guarded(handler.call_event, False)


def unguard(trainer: Trainer) -> None:
    for name in (*GUARDED, "_hfc_guards"):
        trainer.__dict__.pop(name, None)
    trainer.callback_handler.__dict__.pop("call_event", None)
