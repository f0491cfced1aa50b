"""What happens around one forward of a model with exits: who may leave, logits put in place, losses joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import logging

from ..edits import CompressionError
from .criteria import CRITERIA
from .heads import tokens_to_read
from .leaving import Pass, Steps
from .losses import IGNORED, class_labels, cross_entropies, reached_weights, self_distillation, uses_num_items

logger = logging.get_logger(__name__)

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # several sequences in one row: a row is no example


class Exits:
    """What a model and its layers share: the options, and what the last forward pass left behind."""

    def __init__(
        self, options: dict[str, Any], depth: int, steps: Steps, names: tuple[str, ...], around: tuple[str, ...]
    ) -> None:
        self.options, self.depth, self.steps, self.names = options, depth, steps, names  # names: of forward's arguments
        self.around = around  # modules that gradient checkpointing may run again as a whole, with steps inside
        self.enabled = True
        self.muted = False  # while a cut is proved: neither rows that leave nor joined losses
        self.now: Pass | None = None  # only during a forward of the model
        self.left: torch.Tensor | None = None
        self.collected: list[torch.Tensor] | None = None
        self.uses_num_items: bool | None = None
        self.loss_checked = False
        self.reached: set[int] | None = None  # layers whose exits were in a joint loss; None where there was none
        self.loss_sum: torch.Tensor | None = None
        self.loss_count: Any = 0  # of each exit, batches that had labels; a tensor, to wait for no device


def _named(state: Exits, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(state.names, args, strict=False)), **kwargs}


def _wants_all(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward asks for something that rows which left would not have."""
    config = model.config
    flags = ("output_hidden_states", "output_attentions")
    asked = any(inputs.get(f) if inputs.get(f) is not None else getattr(config, f, False) for f in flags)
    return bool(asked) or inputs.get("past_key_values") is not None or bool(inputs.get("use_cache"))


def _refuse_checkpoints(model: nn.Module, state: Exits) -> None:
    """Exits inside what gradient checkpointing runs again would run again too, or have no gradient."""
    for name in state.around:
        module: Any = model.get_submodule(name)
        if module.training and module.gradient_checkpointing:
            raise CompressionError(
                f"Gradient checkpointing runs {name!r} again in the backward pass, and layers that exits sit after are inside "
                f"of it: they cannot be trained so in {type(model).__name__}. Train without (gradient_checkpointing=False; "
                "model.gradient_checkpointing_disable())."
            )


def begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    state: Exits = model.__dict__["_exits"]
    state.now = state.left = None
    if state.muted:
        return None
    inputs = _named(state, args, kwargs)
    collecting = state.collected is not None
    if model.training and not collecting:
        if inputs.get("labels") is None:
            return None
    elif not collecting and not state.enabled:
        return None
    elif not collecting and _wants_all(model, inputs):
        logger.warning_once(
            f"No row leaves this {type(model).__name__} early in a forward that asks for hidden states, attentions or a cache: "
            "rows that left would have none from the later layers. All rows go through all layers there."
        )
        return None
    for name in PACKED:
        if inputs.get(name) is not None:
            raise CompressionError(
                f"{name} packs several sequences into a row; exits need one a row. Pad instead, or set_exits_(model, "
                "enabled=False)."
            )
    leaves = not model.training and not collecting
    if leaves and "use_cache" in state.names:
        kwargs = {**kwargs, "use_cache": False}  # layers that rows skip would have nothing to cache
        args = args[: state.names.index("use_cache")]
        inputs = _named(state, args, kwargs)
    if model.training:
        _refuse_checkpoints(model, state)
    options: dict[str, Any] = state.options
    thresholds = (
        options["threshold"] if isinstance(options["threshold"], list) else [options["threshold"]] * len(options["after"])
    )
    heads: dict[str, Any] = dict(model.exit_heads.items())  # type: ignore[operator]
    state.now = Pass(
        heads=heads,
        tokens={how: tokens_to_read(model.config, how, inputs) for how in {head.pool for head in heads.values()}},
        criterion=CRITERIA[options["criterion"]],
        thresholds=dict(zip(options["after"], thresholds, strict=True)),
        leaves=leaves,
        steps=state.steps,
        attention=str(getattr(model.config, "_attn_implementation", None)),
        run=lambda probe, changed: _run_as(model, state, probe, changed),
        inputs=inputs,
    )
    return args, kwargs


def _run_as(model: nn.Module, state: Exits, probe: Any, inputs: dict[str, Any]) -> None:
    """Run the model's own forward on other inputs, with `probe` in place of the pass of the moment."""
    now, state.now = state.now, probe
    try:
        with torch.no_grad():
            model.forward(**inputs)
    finally:
        state.now = now


def end(model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
    state: Exits = model.__dict__["_exits"]
    now, state.now = state.now, None
    if outputs is None:  # forward raised
        return None
    labels = _named(state, args, kwargs).get("labels")
    # (loss, logits, ...) where labels were given, (logits, ...) where not
    bare = isinstance(outputs, tuple)
    loss_at: Any = 0 if bare else "loss"
    logits_at: Any = int(labels is not None) if bare else "logits"
    logits = outputs[logits_at]
    state.left = torch.full((logits.shape[0],), state.depth - 1, device=logits.device)
    if now is None:
        return None
    if not now.leaves:
        # some may not have been reached: layers that are dropped at random, an encoder whose outputs are given
        reached = [*now.logits.values()]
        every = torch.stack([*reached, logits.to(reached[0].dtype if reached else logits.dtype)])
        if state.collected is not None:
            missed = [index for index in state.options["after"] if index not in now.logits]
            if missed:
                raise CompressionError(
                    f"The logits of all exits were asked for, and layers {missed} did not run in this forward: encoder_outputs "
                    "were given, or layers were dropped at random (model.eval() runs all)."
                )
            state.collected.append(every.detach())
        if labels is None or not model.training:
            return None
        return _with(outputs, loss_at, _joint_loss(state, list(now.logits), every, outputs[loss_at], labels, kwargs))
    if not now.gone:
        return None
    outputs = _without_cache(outputs)
    rows, chosen, layers = (torch.cat(parts) for parts in zip(*now.gone, strict=True))
    state.left = state.left.index_copy(0, rows, layers)
    mixed = logits.index_copy(0, rows, chosen.to(logits.dtype))
    if labels is not None:
        # what the model computed from the rows that left means nothing
        labels = class_labels(labels, len(mixed))
        before, after = cross_entropies(torch.stack([logits, mixed]), labels)
        scale = _scale(state, outputs[loss_at], before, labels, kwargs.get("num_items_in_batch"))
        labelled = (labels != IGNORED).any()
        outputs = _with(outputs, loss_at, torch.where(labelled, after * scale, outputs[loss_at]))
    return _with(outputs, logits_at, mixed)


def _without_cache(outputs: Any) -> Any:
    """No cache that lacks rows is handed on; a forward that asks for one lets nobody leave."""
    if isinstance(outputs, tuple):
        return tuple(value for value in outputs if not isinstance(value, Cache))
    for name in [name for name, value in outputs.items() if isinstance(value, Cache)]:
        outputs[name] = None
    return outputs


def _with(outputs: Any, place: Any, value: torch.Tensor) -> Any:
    if isinstance(outputs, tuple):
        return (*outputs[:place], value, *outputs[place + 1 :])
    outputs[place] = value
    return outputs


def _joint_loss(
    state: Exits, reached: list[int], every: torch.Tensor, loss: torch.Tensor, labels: Any, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """The weighted mean over the exits after the layers `reached` and the final layer; `every`: (reached + 1, rows, C)."""
    labels = class_labels(labels, every.shape[1])
    losses = cross_entropies(every, labels)
    scale = _scale(state, loss, losses[-1], labels, kwargs.get("num_items_in_batch"))
    options = state.options
    weights = torch.tensor(reached_weights(options["weights"], options["after"], state.depth, reached), device=losses.device)
    exits, distil = losses[:-1], options["distil"]
    if distil:
        exits = (1 - distil) * exits + distil * self_distillation(every[:-1], every[-1], options["temperature"])
    labelled = (labels != IGNORED).any()  # a batch without labels teaches nothing, and its means are over nothing
    where = [*(options["after"].index(index) for index in reached), len(options["after"])]
    state.reached = (state.reached or set()) | set(reached)
    seen = losses.new_zeros(2, len(options["after"]) + 1)
    seen[0, where], seen[1, where] = losses.detach(), labelled.to(losses.dtype)
    state.loss_sum = seen[0] if state.loss_sum is None else state.loss_sum + seen[0]
    state.loss_count = state.loss_count + seen[1]
    return weights[-1] * loss + scale * torch.where(labelled, (weights[:-1] * exits).sum(), 0.0)


def _scale(state: Exits, loss: torch.Tensor, mean: torch.Tensor, labels: torch.Tensor, num_items: Any) -> Any:
    """What a mean cross-entropy is multiplied by in this model: 1, or labelled rows over `num_items_in_batch`."""
    count = (labels != IGNORED).sum()
    if num_items is None:
        if not state.loss_checked and bool(count):
            uses_num_items(loss, mean, None)
            state.loss_checked = True
        return 1.0
    ratio = count / num_items
    if state.uses_num_items is None and not bool(count):
        return 1.0  # a mean over nothing tells nothing
    if state.uses_num_items is None:
        state.uses_num_items = uses_num_items(loss, mean, ratio)
    if state.uses_num_items is None:  # they agree on this batch
        return torch.where((loss - mean).abs() <= (loss - mean * ratio).abs(), 1.0, ratio).detach()
    return ratio if state.uses_num_items else 1.0
