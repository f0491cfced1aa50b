"""The options of early exits: checked as data, and found for a model."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..discover import Layer, discover
from ..edits import CompressionError
from ..modules import width
from ..probe import NoInputs, example_inputs, quiet_run
from .criteria import CRITERIA, check_criterion, check_threshold
from .heads import POOLS

logger = logging.get_logger(__name__)

KEYS = ("stack", "after", "num_labels", "hidden_size", "pool", "criterion", "threshold", "distil", "temperature", "weights")


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `attach_exits_` takes them, complete and meaningful by themselves; a copy.

    Raises:
        CompressionError: one is missing, unknown, or means nothing.
    """
    if not isinstance(options, Mapping):
        raise CompressionError(f"The options of exits are a dict, got {type(options).__name__}.")
    options = {"distil": 0.0, "temperature": 2.0, "weights": "depth", **options}
    if set(options) != set(KEYS):
        wrong = sorted(map(str, set(options) ^ set(KEYS)))
        raise CompressionError(f"The options of exits are {', '.join(KEYS)}; missing or unknown: {', '.join(wrong)}.")
    if not isinstance(options["stack"], str) or not options["stack"]:
        raise CompressionError(f"'stack' is the path of a list of layers, got {options['stack']!r}.")
    after = check_after(options["after"])
    for name in ("num_labels", "hidden_size"):
        least = 2 if name == "num_labels" else 1
        if type(options[name]) is not int or not least <= options[name] <= 10_000_000:
            raise CompressionError(f"{name!r} is a whole number from {least}, got {options[name]!r}.")
    if options["pool"] not in POOLS:
        raise CompressionError(f"'pool' is one of {', '.join(POOLS)}, got {options['pool']!r}.")
    criterion = check_criterion(options["criterion"])
    threshold = check_threshold(criterion, options["threshold"], options["num_labels"], len(after))
    check_training(options["distil"], options["temperature"], options["weights"], len(after))
    weights = options["weights"] if isinstance(options["weights"], str) else [float(w) for w in options["weights"]]
    return {**options, "after": after, "threshold": threshold, "weights": weights}


def check_after(after: Any) -> list[int]:
    """Sorted indices of layers, each once."""
    if isinstance(after, str | bytes | Mapping) or not isinstance(after, Sequence | range):
        raise CompressionError(f"'after' is a list of layers that an exit sits after, got {after!r}.")
    found = []
    for value in after:
        try:
            found.append(operator.index(value) if not isinstance(value, bool) else None)
        except TypeError:
            found.append(None)
    if not found or any(i is None or i < 0 for i in found) or len(set(found)) != len(found):
        raise CompressionError(
            f"'after' names each layer that an exit sits after once, as a whole number from 0 to the number of layers minus 2, "
            f"got {list(after)!r}."
        )
    return sorted(found)  # type: ignore[type-var]


def check_training(distil: Any, temperature: Any, weights: Any, exits: int) -> None:
    if isinstance(distil, bool) or not isinstance(distil, int | float) or not 0 <= distil <= 1:
        raise CompressionError(f"'distil' is the weight of self-distillation against the labels, in [0, 1], got {distil!r}.")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise CompressionError(f"'temperature' of self-distillation is a number above 0, got {temperature!r}.")
    if weights in ("depth", "equal"):
        return
    numbers = isinstance(weights, list | tuple) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < math.inf for w in weights
    )
    if not numbers or len(weights) != exits + 1 or sum(weights) <= 0:
        raise CompressionError(
            f"'weights' of the losses are 'depth', 'equal', or {exits + 1} numbers from 0 (one for each exit and, last, one "
            f"for the final layer), got {weights!r}."
        )


def resolve_exits(
    model: nn.Module,
    after: Sequence[int],
    criterion: str = "confidence",
    threshold: float | list[float] | None = None,
    *,
    pool: str | None = None,
    distil: float = 0.0,
    temperature: float = 2.0,
    weights: str | Sequence[float] = "depth",
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Options for `attach_exits_`, for this model; everything that cannot work is refused here. The model is not changed.

    Args:
        model (`PreTrainedModel`): a classifier of sequences or images whose layers lie in one stack.
        after (`Sequence[int]`): layers that an exit sits after, from 0. The last has the model's own head and gets none.
        criterion (`str`, defaults to `"confidence"`): see `CRITERIA`.
        threshold (`float` or `list`, *optional*): probability 0.9, entropy `0.2 ln(num_labels)`, or 2 agreeing exits. Only a
            start: `tune_exits_` finds one that fits.
        pool (`str`, *optional*): `"first"`, `"mean"` or `"last"`. By default the last real token where the model's own head
            reads that (found by running it: the only token on which the logits have a gradient), and the mean of the real
            tokens otherwise: the first token of an early layer knows little yet. Linear probes after the six layers of MiniLM
            on SST-2 (2,000 rows): 51, 67, 65, 82, 88, 87% on the first token; 78, 78, 81, 86, 86, 88% on the mean.
        distil (`float`, defaults to 0.0): weight of self-distillation from the last layer against the labels, in [0, 1].
        temperature (`float`, defaults to 2.0): of self-distillation.
        weights (`str` or `Sequence[float]`, defaults to `"depth"`): how losses are weighted, see `losses.exit_weights`.
        inputs (`dict`, *optional*): a small batch to run the model on, where none can be made from its config.

    Returns:
        `dict`: JSON-ready options.

    Raises:
        CompressionError: a layer is not there or is the last one; the model has no stack, several, or layers that share
            weights; it does not give one row of class logits for each input; an option means nothing.
    """
    if not isinstance(model, PreTrainedModel):
        raise CompressionError(f"Exits go into a transformers model, got {type(model).__name__}.")
    config: Any = model.config
    name = type(model).__name__
    if "_exits" in model.__dict__:
        raise CompressionError(f"This {name} has exits already; detach_exits_(model) takes them off.")
    chosen = check_after(after)
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        what = config.problem_type or f"num_labels={config.num_labels}"
        raise CompressionError(f"Exits need one class a row to be sure of; this {name} has {what}. Regression is not offered.")
    stacks = discover(model).stacks
    if len(stacks) != 1:
        found = f"{len(stacks)} ({', '.join(stacks)})" if stacks else "none"
        raise CompressionError(
            f"Exits need one stack of layers of the same width; this {name} has {found}. Encoder-decoders and models with "
            "stages (Swin, ConvNeXt) are not offered."
        )
    layers = next(iter(stacks.values()))
    depth = len(layers)
    told = getattr(config, "num_hidden_layers", depth)
    if isinstance(told, int) and told > depth:
        raise CompressionError(
            f"{name} runs {depth} shared layer(s) {told} times (as ALBERT does); exits need layers of their own."
        )
    if chosen[-1] >= depth or chosen == [depth - 1]:
        raise CompressionError(
            f"Exits after layers {chosen}: this {name} has {depth} layers, so one can sit after layer 0 to {depth - 2} (the "
            "last layer has the model's own head)."
        )
    if chosen[-1] == depth - 1:
        chosen.pop()
        if isinstance(threshold, list | tuple) and len(threshold) == len(chosen) + 1:
            threshold = list(threshold)[:-1]
        logger.warning(f"No exit is added after layer {depth - 1}, the last: the model's own head is there.")
    criterion = check_criterion(criterion)
    options = {
        "stack": layers[0].path,
        "after": chosen,
        "num_labels": config.num_labels,
        "hidden_size": _hidden_size(model, layers[0]),
        "pool": POOLS[0] if pool is None else pool,
        "criterion": criterion,
        "threshold": CRITERIA[criterion].default(config.num_labels, len(chosen)) if threshold is None else threshold,
        "distil": distil,
        "temperature": temperature,
        "weights": weights if isinstance(weights, str) else list(weights),
    }
    options = check_options(options)
    return {**options, "pool": _run_once(model, layers, pool is None, inputs) or options["pool"]}


def _hidden_size(model: nn.Module, layer: Layer) -> int:
    structure = discover(model)
    outs = [b.out for b in (*structure.attentions, *structure.ffns) if b.out.startswith(f"{layer.name}.")]
    return width(model.get_submodule(outs[-1]), 0)


def _run_once(
    model: PreTrainedModel, layers: tuple[Layer, ...], find_pool: bool, inputs: Mapping[str, Any] | None
) -> str | None:
    """Refuse a model that is no classifier of rows; tell what exits should read."""
    given: dict[str, torch.Tensor] = {}

    def tap(module: nn.Module, args: Any, outputs: Any) -> Any:
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        given["hidden"] = hidden = hidden.detach().requires_grad_(find_pool)
        return (hidden, *outputs[1:]) if isinstance(outputs, tuple) else hidden

    name = type(model).__name__
    handle = model.get_submodule(layers[-1].name).register_forward_hook(tap)
    try:
        batch = {k: v for k, v in (example_inputs(model) if inputs is None else inputs).items() if k != "labels"}
        with quiet_run(model) as run, torch.inference_mode(False), torch.set_grad_enabled(find_pool):
            outputs = run(batch)
    except NoInputs:
        raise
    except Exception as error:  # a model may refuse an input in any way
        raise NoInputs(
            f"{name} does not run on small inputs ({type(error).__name__}: {error}); pass inputs=... (a batch that it runs on)."
        ) from error
    finally:
        handle.remove()
    hidden, logits = given.get("hidden"), getattr(outputs, "logits", None)
    rows = next(v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim)
    right = isinstance(logits, torch.Tensor) and logits.shape == (rows, model.config.num_labels)  # type: ignore[union-attr]
    if not right or hidden is None or hidden.ndim != 3 or hidden.shape[0] != rows:
        got = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else "no logits"
        raise CompressionError(
            f"Exits need a model that gives one row of {model.config.num_labels} class logits for each input, from layers that "
            f"see (rows, tokens, width); {name} gives {got} for {rows} rows. Sequence and image classification are offered; "
            "token classification, question answering, multiple choice and generation are not."
        )
    if not find_pool:
        return None
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), hidden)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise CompressionError(
            f"Which token {name}'s head reads could not be found ({error}); say pool='first', 'mean' or 'last'."
        ) from error
    read = gradient.abs().sum(-1) > 0
    return "last" if bool(read[:, -1].all()) and not bool(read[:, :-1].any()) else "mean"
