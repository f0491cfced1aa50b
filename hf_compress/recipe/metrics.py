"""Metrics that need no Hub: numpy alone. Any other name is asked of `evaluate`, where that is installed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..discover import nearest
from ..edits import CompressionError


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """The fraction of predictions that are right; of rows of several labels, those that are right altogether.

    ```python
    >>> import numpy as np
    >>> from hf_compress.recipe.metrics import accuracy
    >>> accuracy(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]))
    0.75

    ```
    """
    same = np.asarray(predictions) == np.asarray(references)
    return float(same.reshape(len(same), -1).all(1).mean())


def f1(predictions: np.ndarray, references: np.ndarray, classes: int | None = None) -> float:
    """F1 = 2 tp / (2 tp + fp + fn): of class 1 where there are two, else the mean over classes (macro, as scikit-learn's).

    The mean is over the classes that occur. How many there are is `classes`, whichever occur in these rows; if it is left
    out, two if none above 1 occurs.

    ```python
    >>> import numpy as np
    >>> from hf_compress.recipe.metrics import f1
    >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
    0.5
    >>> f1(np.array([1, 1, 0, 0]), np.array([1, 1, 1, 0]), classes=3)  # (4 / 5 + 2 / 3) / 2
    0.7333333333333334

    ```
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.ndim == 2:  # several labels a row: the mean over labels
        return float(np.mean([_f1(predictions[:, i] == 1, references[:, i] == 1) for i in range(predictions.shape[1])]))
    found = np.unique(np.concatenate([predictions, references]))
    if classes == 2 or (classes is None and found.max(initial=0) <= 1):
        return _f1(predictions == 1, references == 1)
    return float(np.mean([_f1(predictions == c, references == c) for c in found]))


def _f1(found: np.ndarray, there: np.ndarray) -> float:
    hits = int((found & there).sum())
    total = int(found.sum() + there.sum())
    return 2 * hits / total if total else 0.0


def matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews' correlation of classes, for any number of them (Gorodkin 2004); 0 where one side is constant.

    ```python
    >>> import numpy as np
    >>> from hf_compress.recipe.metrics import matthews
    >>> round(matthews(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])), 4)
    0.5774

    ```
    """
    classes = np.unique(np.concatenate([predictions, references]))
    found = (np.asarray(predictions)[:, None] == classes).astype(float)
    there = (np.asarray(references)[:, None] == classes).astype(float)
    found, there = found - found.mean(0), there - there.mean(0)
    scale = math.sqrt((found**2).sum() * (there**2).sum())
    return float((found * there).sum() / scale) if scale else 0.0


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant.

    ```python
    >>> import numpy as np
    >>> from hf_compress.recipe.metrics import pearson
    >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0

    ```
    """
    a, b = np.asarray(predictions, float).ravel(), np.asarray(references, float).ravel()
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values having the mean of their ranks.

    ```python
    >>> import numpy as np
    >>> from hf_compress.recipe.metrics import spearman
    >>> spearman(np.array([1.0, 2.0, 30.0]), np.array([0.1, 0.2, 0.3]))
    1.0

    ```
    """
    return pearson(_ranks(predictions), _ranks(references))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values).ravel(), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def span_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """F1 of whole spans, micro-averaged, as seqeval's default mode counts them (CoNLL-2000's conlleval).

    ```python
    >>> from hf_compress.recipe.metrics import span_f1
    >>> span_f1([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "O"]])
    0.6666666666666666

    ```
    """
    found = {(row, *span) for row, tags in enumerate(predictions) for span in spans(tags)}
    there = {(row, *span) for row, tags in enumerate(references) for span in spans(tags)}
    total = len(found) + len(there)
    return 2 * len(found & there) / total if total else 0.0


def tag_accuracy(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """The fraction of tags that are right, over all rows together."""
    pairs = zip(chain.from_iterable(predictions), chain.from_iterable(references), strict=True)
    return float(np.mean([found == there for found, there in pairs]))


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, last) of the spans in tags such as `B-PER`, `I-PER`, `O`; a tag without a prefix is its own type.

    ```python
    >>> from hf_compress.recipe.metrics import spans
    >>> spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 1), ('LOC', 3, 3), ('LOC', 4, 4)]

    ```
    """
    found: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") else ("I", "", tag)
        inside = tag != "O"
        if kind and (not inside or prefix in ("B", "S", "U") or name != kind):
            found.append((kind, start, i - 1))
            kind = ""
        if inside and not kind:
            kind, start = name, i
        if inside and prefix in ("E", "S", "L", "U"):
            found.append((kind, start, i))
            kind = ""
    return found


@dataclass(frozen=True)
class Metric:
    """A metric, what it is computed from, and which way is better.

    `of`: `"classes"` (indices), `"labels"` (rows of 0 and 1), `"numbers"`, `"tags"` (lists of names) or `"loss"` (mean negative
    log-likelihood of a token).
    """

    name: str
    of: tuple[str, ...]
    compute: Callable[[Any, Any], float]
    greater_is_better: bool = True


def _exp(loss: Any, _: Any) -> float:
    return math.exp(min(float(loss), 700.0))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("classes", "labels"), accuracy),
        Metric("f1", ("classes", "labels"), f1),
        Metric("matthews", ("classes",), matthews),
        Metric("pearson", ("numbers",), pearson),
        Metric("spearman", ("numbers",), spearman),
        Metric("mse", ("numbers",), lambda p, r: float(((np.asarray(p) - np.asarray(r)) ** 2).mean()), False),
        Metric("perplexity", ("loss",), _exp, False),
    )
}
# of tags there are two: spans that are right, and tags that are
TAGS = {"f1": Metric("f1", ("tags",), span_f1), "accuracy": Metric("accuracy", ("tags",), tag_accuracy)}
SAME = {
    "matthews_correlation": "matthews",
    "pearsonr": "pearson",
    "spearmanr": "spearman",
    "seqeval": "f1",
    "ppl": "perplexity",
}
DEFAULTS = {"classes": "accuracy", "labels": "f1", "numbers": "spearman", "tags": "f1", "loss": "perplexity"}


def find_metric(name: str, kind: str, task: str, classes: int | None = None) -> Metric:
    """The metric of a name, for what a task predicts.

    Args:
        name (`str`): one of `METRICS`, or any that `evaluate.load` finds.
        kind (`str`): what there is to compare; see `Metric`.
        task (`str`): for the message.
        classes (`int`, *optional*): how many classes there are; `f1` is that of class 1 where there are two.

    Raises:
        CompressionError: the metric does not fit what is predicted, or nobody knows it.
    """
    known = TAGS if kind == "tags" else METRICS
    short = SAME.get(name, name)
    if short in known and kind in known[short].of:
        metric = known[short]
        return replace(metric, compute=partial(f1, classes=classes)) if (short, kind) == ("f1", "classes") else metric
    fit = [m.name for m in known.values() if kind in m.of]
    if short in METRICS or short in TAGS:
        raise CompressionError(
            f"{name!r} is no metric for {task} that predicts {WORDS[kind]}. Metrics that fit: {', '.join(fit)}."
        )
    if kind not in ("classes", "numbers"):
        raise CompressionError(f"Unknown metric {name!r}{nearest(name, fit)} For {task}: {', '.join(fit)}.")
    metric = _evaluate(name, kind, fit)
    some = np.arange(max(2, classes or 2)) if kind == "classes" else np.array([0.0, 0.5, 1.0])
    try:
        metric.compute(some, some)
    except Exception as error:  # it may want probabilities, or an average=, which a recipe cannot say
        raise CompressionError(
            f"The metric {name!r} cannot be computed of {WORDS[kind]} ({error}). Built in: {', '.join(fit)}."
        ) from error
    return metric


WORDS = {
    "classes": "one class a row",
    "labels": "several labels a row",
    "numbers": "numbers",
    "tags": "a tag for every token",
    "loss": "text",
}


def _evaluate(name: str, kind: str, fit: list[str]) -> Metric:
    advice = f"Built in: {', '.join(fit)}. Any other needs the package `evaluate` and, the first time, the Hub"
    if not re.fullmatch(r"[A-Za-z]\w*", name) or Path(name).exists():
        raise CompressionError(  # `evaluate` runs the script that such a name leads to
            f"Unknown metric {name!r}{nearest(name, fit)} {advice}, and goes by its plain name: scripts of others are not run."
        )
    try:
        import evaluate  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CompressionError(f"Unknown metric {name!r}{nearest(name, fit)} {advice}; `evaluate` is not installed.") from None
    try:
        module = evaluate.load(f"evaluate-metric/{name}")
    except Exception as error:  # whatever a download or somebody's script raises: the metric cannot be had
        reason = str(error).strip().splitlines()
        raise CompressionError(
            f"Unknown metric {name!r}{nearest(name, fit)} {advice} ({type(error).__name__}: {reason[0] if reason else ''})."
        ) from error

    def compute(predictions: Any, references: Any) -> float:
        found = module.compute(predictions=predictions, references=references) or {}
        value = found.get(name, next((v for v in found.values() if isinstance(v, int | float | np.number)), None))
        if value is None:
            raise CompressionError(f"The metric {name!r} gave no number, but {found!r}; take one of {', '.join(fit)}.")
        return float(value)

    return Metric(name, (kind,), compute)
