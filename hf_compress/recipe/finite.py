"""Numbers that are none: a training that diverged, a model whose outputs mean nothing; neither is measured and published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..edits import CompressionError

logger = logging.get_logger(__name__)


class NotFinite(CompressionError):
    """A weight, a loss, an output or a metric is NaN or infinite. What led there is nothing to go on from."""


class FiniteCallback(TrainerCallback):
    """Stop a training that has diverged, before more time goes into it and before its checkpoint is marked as whole."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in (logs or {}).items():
            if "loss" in name and isinstance(value, int | float) and not math.isfinite(value):
                raise NotFinite(told(f"{name} was {value} at step {state.global_step} of {state.max_steps}", args))

    def on_save(self, args, state, control, model=None, **kwargs):
        check_weights(model, args, f"at step {state.global_step} of {state.max_steps}")


def check_weights(model: Any, args: TrainingArguments, when: str) -> None:
    """Refuse weights that are no numbers any more.

    Args:
        model (`nn.Module`): after some training.
        args (`TrainingArguments`): of that training.
        when (`str`): for the message.

    Raises:
        NotFinite: a `CompressionError`: the first such weight, the learning rate, and what to do.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise NotFinite(told(f"the weight {name} is not finite {when}", args))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):  # infinite ones are masks
            raise NotFinite(told(f"{name} holds NaN {when}", args))


def check_losses(state: TrainerState, args: TrainingArguments, kind: str) -> None:
    """Refuse a training whose loss ended a hundred times above where it began, and above 100: its weights mean nothing.

    Args:
        state (`TrainerState`): after the training; its first logged loss is of the model as it was given.
        args (`TrainingArguments`): of that training.
        kind (`str`): what is predicted. Of numbers, whose first errors may be small by chance, it is a warning.

    Raises:
        NotFinite: a `CompressionError`: both losses, the learning rate, and what to do.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    losses += [entry["train_loss"] for entry in state.log_history if "train_loss" in entry] if len(losses) == 1 else []
    if len(losses) < 2 or losses[-1] <= 100 * max(1.0, losses[0]):
        return
    message = told(f"its loss rose from {losses[0]:.3g} to {losses[-1]:.3g}", args)
    if kind != "numbers":
        raise NotFinite(message)
    logger.warning(message[:1].upper() + message[1:])


def told(what: str, args: TrainingArguments) -> str:
    """What is said of a training that diverged."""
    half = f"leave {'fp16' if args.fp16 else 'bf16'} out, " if args.fp16 or args.bf16 else ""
    return (
        f"the training diverged: {what}; learning_rate is {args.learning_rate:g}, max_grad_norm {args.max_grad_norm:g}. "
        f"What to do: {half}take a smaller learning_rate (1e-5 to 1e-4 suits most pretrained models) or a smaller "
        "max_grad_norm. (A batch in which nothing has a label also has a loss of NaN.)"
    )


@contextmanager
def finite_outputs(model: nn.Module, who: str) -> Iterator[None]:
    """Refuse outputs that are no numbers: the class that scores highest among NaN is an accuracy like any other.

    Args:
        model (`nn.Module`): its forwards are looked at until this ends.
        who (`str`): for the message.

    Raises:
        NotFinite: a `CompressionError`: the first output (logits, or hidden states of real tokens) is NaN or infinite.
    """

    def check(_: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        values, mask = outputs[0], kwargs.get("attention_mask")
        if bool(torch.isfinite(values.sum())):  # of all at once: of a language model's logits a mask is large
            return
        broken = ~torch.isfinite(values)
        if mask is not None and values.ndim == 3 and mask.shape == values.shape[:2]:
            broken &= mask.bool().unsqueeze(-1)  # what stands at padding is nobody's
        if bool(broken.any()):
            raise NotFinite(f"{who} gives NaN or infinite outputs on the rows that are measured.")

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
