"""The options of early exits: checked as data, and found for a model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..edits import CompressionError, shown
from .criteria import CRITERIA, MOST_LABELS, check_criterion, check_threshold, is_number
from .heads import POOLS
from .places import find_places, what_heads_read

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
    stack = options["stack"]
    lists = isinstance(stack, list) and all(isinstance(layer, list) and layer for layer in stack)
    named = [name for layer in stack for name in layer] if lists else [stack]
    if not named or not all(isinstance(name, str) and name for name in named):
        raise CompressionError(
            f"'stack' is the path of a list of layers, or of each layer the paths of the modules it runs, got {shown(stack)}."
        )
    after = check_after(options["after"])
    for name in ("num_labels", "hidden_size"):
        least = 2 if name == "num_labels" else 1
        values = options[name] if name == "hidden_size" and isinstance(options[name], list) else [options[name]]
        if not values or not all(type(value) is int and least <= value <= MOST_LABELS for value in values):
            raise CompressionError(f"{name!r} is a whole number from {least}, got {shown(options[name])}.")
    for pool in options["pool"] if isinstance(options["pool"], list) and options["pool"] else [options["pool"]]:
        check_pool(pool)
    for name in ("hidden_size", "pool"):
        if len(each_exit({**options, "after": after}, name)) != len(after):
            raise CompressionError(
                f"A list of {name!r} needs one for each of the {len(after)} exits, got {shown(options[name])}."
            )
    criterion = check_criterion(options["criterion"])
    threshold = check_threshold(criterion, options["threshold"], options["num_labels"], len(after))
    check_training(options["distil"], options["temperature"], options["weights"], len(after))
    weights = options["weights"] if isinstance(options["weights"], str) else [float(w) for w in options["weights"]]
    return {**options, "after": after, "threshold": threshold, "weights": weights}


def stack_names(stack: str | list[list[str]]) -> list[str]:
    """The names of modules in the option `stack`."""
    return [stack] if isinstance(stack, str) else [name for layer in stack for name in layer]


def renamed_stack(stack: str | list[list[str]], name: Callable[[str], Any]) -> Any:
    """The option `stack` under other names; None where one has none."""
    if isinstance(stack, str):
        return name(stack)
    found = [[name(step) for step in layer] for layer in stack]
    return found if all(step is not None for layer in found for step in layer) else None


def each_exit(options: Mapping[str, Any], name: str) -> list[Any]:
    """An option that may be given for all exits, or for each: one for each."""
    value = options[name]
    return value if isinstance(value, list) else [value] * len(options["after"])


def check_after(after: Any) -> list[int]:
    """Sorted indices of layers, each once."""
    return sorted(_as_given(after))


def _as_given(after: Any) -> list[int]:
    no_list = isinstance(after, str | bytes | Mapping) or not isinstance(after, Iterable)
    if no_list or getattr(after, "ndim", 1) != 1:
        raise CompressionError(f"'after' is a list of layers that an exit sits after, got {shown(after)}.")
    values: list[Any] = list(after)
    found: list[int] = []
    for value in values:
        try:
            no_number = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
            found.append(-1 if no_number else operator.index(value))
        except TypeError:
            found.append(-1)
    if not found or min(found) < 0 or len(set(found)) != len(found):
        raise CompressionError(
            f"'after' names each layer that an exit sits after once, as a whole number from 0 to the number of layers minus 2, "
            f"got {shown(values)}."
        )
    return found


def check_pool(pool: Any) -> None:
    if not isinstance(pool, str) or pool not in POOLS:
        raise CompressionError(f"'pool' is one of {', '.join(POOLS)}, got {shown(pool)}.")


def check_training(distil: Any, temperature: Any, weights: Any, exits: int) -> None:
    if not is_number(distil) or not 0 <= distil <= 1:
        raise CompressionError(
            f"'distil' is the weight of self-distillation against the labels, in [0, 1], got {shown(distil)}."
        )
    if not is_number(temperature) or temperature <= 0:
        raise CompressionError(f"'temperature' of self-distillation is a number above 0, got {shown(temperature)}.")
    if isinstance(weights, str) and weights in ("depth", "equal"):
        return
    numbers = list(weights) if isinstance(weights, list | tuple) else []
    if len(numbers) != exits + 1 or not all(is_number(w) and w >= 0 for w in numbers) or sum(numbers) <= 0:
        raise CompressionError(
            f"'weights' of the losses are 'depth', 'equal', or {exits + 1} numbers from 0 (one for each exit and, last, one "
            f"for the final layer), got {shown(weights)}."
        )


def check_edit(after: Any, criterion: Any, threshold: Any, pool: Any, distil: Any, temperature: Any, weights: Any) -> list[int]:
    """Refuse options that mean nothing to any model, and give the layers sorted; `resolve_exits` knows the model.

    Whether the last layer is named, which has the model's own head and gets no exit, only the model tells. So a list may
    hold a number for every layer in `after`, or one fewer.
    """
    given = _as_given(after)
    check_criterion(criterion)
    lists = [name for name, value in (("threshold", threshold), ("weights", weights)) if isinstance(value, list | tuple)]
    if lists and given != sorted(given):
        raise CompressionError(
            f"'after' counts upwards where {lists[0]!r} is given for each exit, so that it is clear which is whose; got "
            f"{shown(given)}."
        )
    count = len(given)
    if threshold is not None:
        fewer = isinstance(threshold, list | tuple) and 0 < len(threshold) == count - 1
        check_threshold(criterion, threshold, None, count - fewer)
    if pool is not None:
        check_pool(pool)
    fewer = isinstance(weights, list | tuple) and 1 < len(weights) == count
    check_training(distil, temperature, weights, count - fewer)
    return sorted(given)


def without_last(after: list[int], depth: int, threshold: Any, weights: Any) -> tuple[list[int], Any, Any]:
    """`after`, thresholds and weights without those of the last layer, where the model's own head is."""
    if after[-1] != depth - 1:
        return after, threshold, weights
    if isinstance(threshold, list | tuple) and len(threshold) == len(after):
        threshold = list(threshold)[:-1]
    if isinstance(weights, list | tuple) and len(weights) == len(after) + 1:
        weights = [*weights[:-2], weights[-1]]
    return after[:-1], threshold, weights


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
        model (`PreTrainedModel`): a classifier of sequences, images or sounds.
        after (`Sequence[int]`): layers that an exit sits after, from 0. The last has the model's own head and gets none.
        criterion (`str`, defaults to `"confidence"`): see `CRITERIA`.
        threshold (`float` or `list`, *optional*): for all exits, or one for each layer in `after`. By default
            probability 0.9, entropy `0.2 ln(num_labels)`, or 2 agreeing exits: only a start, `tune_exits_` finds one that fits.
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
    chosen = check_edit(after, criterion, threshold, pool, distil, temperature, weights)
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        what = config.problem_type or f"num_labels={config.num_labels}"
        raise CompressionError(f"Exits need one class a row to be sure of; this {name} has {what}. Regression is not offered.")
    places = find_places(model, inputs)
    depth = places.depth
    if chosen[-1] >= depth or chosen == [depth - 1]:
        raise CompressionError(
            f"Exits after layers {chosen}: this {name} has {depth} layers, so one can sit after layer 0 to {depth - 2} (the "
            "last layer has the model's own head)."
        )
    if chosen[-1] == depth - 1:
        chosen, threshold, weights = without_last(chosen, depth, threshold, weights)
        logger.warning(f"No exit is added after layer {depth - 1}, the last: the model's own head is there.")
    pools, sizes = what_heads_read(places, chosen, pool)
    options = {
        "stack": places.stack,
        "after": chosen,
        "num_labels": config.num_labels,
        "hidden_size": sizes if len(set(sizes)) > 1 else sizes[0],
        "pool": pools if len(set(pools)) > 1 else pools[0],
        "criterion": criterion,
        "threshold": CRITERIA[criterion].default(config.num_labels, len(chosen)) if threshold is None else threshold,
        "distil": distil,
        "temperature": temperature,
        "weights": weights if isinstance(weights, str) else list(weights),
    }
    return check_options(options)
