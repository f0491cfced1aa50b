"""Thresholds from validation data: one pass, and every threshold is simulated from the logits of all exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..edits import CompressionError, shown
from ..probe import map_tensors, quiet_run
from .criteria import CRITERIA, is_number
from .losses import IGNORED, class_labels
from .runtime import collect_exits, exit_options, exiting, set_exits_

POINTS = 100  # thresholds tried: quantiles of what the criterion gives on the data


def tune_exits_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    mean_depth: float | None = None,
    max_drop: float | None = None,
    metric: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
) -> dict[str, Any]:
    """Choose the threshold of a model's exits on validation data, and set it.

    One pass over the data with all rows through all layers gives the logits of every exit; what a threshold would do is
    read from them, exactly, so no threshold costs another pass. With `max_drop`, the shallowest threshold whose metric
    lies at most that far below the full model's is taken; with `mean_depth` alone, the most cautious one within that
    depth. Both are measured on these rows: on others they hold as far as these stand for them.

    Args:
        model (`nn.Module`): a model with exits.
        batches (`Iterable[dict]`): batches as for `model(**batch)`, with `labels`. Rows whose label is -100 are left out.
        mean_depth (`float`, *optional*): layers that a row may run through, in the mean (a row that leaves after layer `i`
            has run `i + 1`).
        max_drop (`float`, *optional*): how much of the metric may be lost, in its units (0.01: one point of accuracy).
        metric (`Callable`, *optional*): `metric(logits (rows, C), labels (rows,)) -> float`, higher is better; accuracy by
            default.

    Returns:
        `dict`: `threshold`, `mean_depth` and `metric` as chosen, `full_metric`, and `table`: those three of every threshold
        tried, from cautious to bold.

    Raises:
        CompressionError: neither bound is given or one means nothing, no batch or no labels, a batch or a metric that fails,
            or no threshold meets the bounds (the message tells what can be met). Nothing has changed then.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_compress.exits import attach_exits_, resolve_exits
    >>> from hf_compress.exits.tune import tune_exits_
    >>> _ = torch.manual_seed(0)
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    ... )).eval()
    >>> attach_exits_(model, resolve_exits(model, after=[0, 1]))
    >>> ids = torch.arange(5, 85).view(16, 5)
    >>> found = tune_exits_(model, [{"input_ids": ids, "labels": ids[:, 0] % 2}], mean_depth=2.0)
    >>> found["mean_depth"] <= 2.0, found["threshold"] == model._exits.options["threshold"]
    (True, True)

    ```
    """
    model = exiting(model)
    options = exit_options(model)
    if options is None:
        raise CompressionError(f"This {type(model).__name__} has no exits to tune.")
    if mean_depth is None and max_drop is None:
        raise CompressionError("Say what may be lost: mean_depth=... (layers a row), max_drop=... (of the metric), or both.")
    for name, value, least in (("mean_depth", mean_depth, 1), ("max_drop", max_drop, 0)):
        if value is not None and (not is_number(value) or value < least):
            raise CompressionError(f"{name} is a number from {least}, got {shown(value)}.")
    if metric is not None and not callable(metric):
        raise CompressionError(f"metric is a function of (logits, labels) that gives a number, got {shown(metric)}.")
    logits, labels = collect_logits(model, batches)
    depths = torch.tensor([i + 1 for i in options["after"]] + [model.__dict__["_exits"].depth])
    scores = exit_scores(logits, options["criterion"])
    table = []
    for threshold in candidates(scores, options["criterion"], options["num_labels"]):
        taken = simulate(scores, options["criterion"], threshold)
        chosen = logits[taken, torch.arange(len(taken))]
        table.append(
            {
                "threshold": threshold,
                "mean_depth": depths[taken].double().mean().item(),
                "metric": _measure(metric, chosen, labels),
            }
        )
    full = _measure(metric, logits[-1], labels)
    fits = [
        row
        for row in table
        if (mean_depth is None or row["mean_depth"] <= mean_depth + 1e-9)
        and (max_drop is None or row["metric"] >= full - max_drop - 1e-9)
    ]
    if not fits:
        shallow = min(table, key=lambda row: row["mean_depth"])
        near = max(table, key=lambda row: row["metric"])
        raise CompressionError(
            f"No threshold meets mean_depth={mean_depth} and max_drop={max_drop} on these rows. The full model's metric is "
            f"{full:.4f}; the shallowest is {shallow['mean_depth']:.2f} layers at {shallow['metric']:.4f}, the best "
            f"{near['metric']:.4f} at {near['mean_depth']:.2f} layers. Allow more, train the exits longer, or move them."
        )
    depth = [row["mean_depth"] for row in fits]
    best = fits[depth.index(min(depth) if max_drop is not None else max(depth))]
    set_exits_(model, threshold=best["threshold"])
    return {**best, "full_metric": full, "table": table}


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction of rows whose most probable class is the label."""
    return (logits.argmax(-1) == labels).double().mean().item()


def _measure(metric: Callable[..., float] | None, logits: torch.Tensor, labels: torch.Tensor) -> float:
    if metric is None:
        return accuracy(logits, labels)
    try:
        found = float(metric(logits, labels))
    except Exception as error:  # whatever somebody's function does
        raise CompressionError(
            f"metric(logits {tuple(logits.shape)}, labels {tuple(labels.shape)}) gives no number: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(found):
        raise CompressionError(f"metric gives {found} on these rows; thresholds are compared by finite numbers.")
    return found


def collect_logits(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every exit and of the final layer (exits + 1, rows, C), and labels (rows,), of labelled rows, on the CPU."""
    if isinstance(batches, Mapping):
        raise CompressionError("batches is an iterable of batches; put a single one into a list.")
    if isinstance(batches, str | bytes | torch.Tensor) or not isinstance(batches, Iterable):
        raise CompressionError(f"batches must be a sequence of dicts, as for model(**batch), got {shown(batches)}.")
    device = next(model.parameters()).device
    labels = []
    with collect_exits(model) as found, quiet_run(model, exits=True) as run:
        for batch in batches:
            given = batch.get("labels") if isinstance(batch, Mapping) else None
            if given is None:
                raise CompressionError(
                    f"Each batch of batches is a dict as for model(**batch), with 'labels', got {shown(batch)}."
                )
            try:
                run(map_tensors({k: v for k, v in batch.items() if k != "labels"}, lambda t: t.to(device)))
            except Exception as error:  # a model may refuse a batch in any way
                raise CompressionError(
                    f"{type(model).__name__} does not run on one of batches ({', '.join(map(str, batch))}): "
                    f"{type(error).__name__}: {error}"
                ) from error
            found[-1] = found[-1].float().cpu()
            labels.append(class_labels(given, found[-1].shape[1]).cpu().long())
    if not found:
        raise CompressionError("No batch to tune on; an iterator can be used up only once.")
    logits, every = torch.cat(found, 1), torch.cat(labels)
    wrong = every[(every != IGNORED) & ((every < 0) | (every >= logits.shape[-1]))]
    if len(wrong):
        raise CompressionError(
            f"labels are classes from 0 to {logits.shape[-1] - 1}, or {IGNORED} for rows that are left out, got "
            f"{wrong[0].item()}."
        )
    labelled = every != IGNORED
    if not bool(labelled.any()):
        raise CompressionError(f"No row of batches has a label: all labels are {IGNORED}.")
    return logits[:, labelled], every[labelled]


def exit_scores(logits: torch.Tensor, criterion: str) -> torch.Tensor:
    """What the criterion gives at each exit: (exits + 1, rows, C) -> (exits, rows)."""
    score = CRITERIA[criterion].score
    return torch.stack([score(list(logits[: k + 1])) for k in range(len(logits) - 1)])


def simulate(scores: torch.Tensor, criterion: str, threshold: float | list[float]) -> torch.Tensor:
    """The exit at which each row leaves, `len(scores)` for the final layer: (exits, rows) -> (rows,).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.exits.tune import simulate
    >>> simulate(torch.tensor([[0.6, 0.9, 0.5], [0.8, 0.5, 0.6]]), "confidence", 0.7)
    tensor([1, 0, 2])

    ```
    """
    each = threshold if isinstance(threshold, list) else [threshold] * len(scores)
    leaves = torch.stack([CRITERIA[criterion].leaves(s, t) for s, t in zip(scores, each, strict=True)])
    last = torch.ones_like(leaves[:1])
    return torch.cat([leaves, last]).int().argmax(0)  # argmax: the first of equals


def candidates(scores: torch.Tensor, criterion: str, num_labels: int) -> list[float]:
    """Thresholds from "nobody leaves" to "all leave at the first exit", in the widest gaps between scores."""
    if criterion == "patience":
        return [float(n) for n in range(len(scores) + 1, 0, -1)]
    values = scores.flatten().double().unique()
    if len(values) > POINTS:
        # a threshold in a gap wider than rounding does the same whatever the batch; the widest of each quantile
        edges = torch.linspace(0, len(values) - 1, POINTS + 1).long()
        gaps = values.diff()
        at = [int(a + gaps[a:b].argmax()) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    else:
        at = list(range(len(values) - 1))
    middles = [((values[i] + values[i + 1]) / 2).item() for i in at]
    if criterion == "confidence":
        return [1.0, *reversed(middles), 0.0]
    return [0.0, *middles, math.log(num_labels)]
