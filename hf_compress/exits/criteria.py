"""When a row is sure enough to leave: pure functions from the logits of the exits so far to one number a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..edits import CompressionError, shown

MOST_LABELS = 10_000_000


def entropy(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Entropy of the newest exit's distribution, in nats: `-sum_c p_c ln p_c`, in [0, ln C). Low is sure.

    [DeeBERT](https://aclanthology.org/2020.acl-main.204/) (Xin et al. 2020): a row leaves if it is below a threshold. So
    nobody leaves at 0. All leave at ln C: a uniform row is given the largest number below it.

    Args:
        logits: of every exit so far, newest last, each (rows, C). Only the newest is read.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.exits.criteria import entropy
    >>> entropy([torch.tensor([[0.0, 0.0], [0.0, 1.0]])])  # ln 2, and less
    tensor([0.6931, 0.5822])

    ```
    """
    log_p = torch.log_softmax(logits[-1].float(), -1)
    below_most = float(np.nextafter(np.float32(math.log(log_p.shape[-1])), np.float32(0)))
    return (log_p.exp() * log_p).sum(-1).neg().clamp_max(below_most)


def confidence(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Probability of the newest exit's most probable class: `max_c p_c`, in [1/C, 1]. High is sure.

    A row leaves if it is above a threshold. So nobody leaves at 1, which the softmax of a very sure row does reach, and all
    leave below 1/C.

    Args:
        logits: of every exit so far, newest last, each (rows, C). Only the newest is read.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.exits.criteria import confidence
    >>> confidence([torch.tensor([[0.0, 0.0], [0.0, 1.0]])])
    tensor([0.5000, 0.7311])

    ```
    """
    return torch.softmax(logits[-1].float(), -1).amax(-1)


def patience(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """How many exits in a row, the newest included, have predicted the same class: 1, 2, ... High is sure.

    [PABEE](https://arxiv.org/abs/2006.04152) (Zhou et al. 2020) counts how often the prediction stayed the same, so its
    patience is this number minus one. A row leaves if it is at least a threshold: all leave at 1, and nobody at one more than
    there are exits.

    Args:
        logits: of every exit so far, newest last, each (rows, C).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.exits.criteria import patience
    >>> first, second = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> patience([first, second])
    tensor([2, 1])

    ```
    """
    classes = torch.stack(list(logits)).argmax(-1).flip(0)
    return (classes == classes[0]).long().cumprod(0).sum(0)


class Criterion(NamedTuple):
    score: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    leaves: Callable[[torch.Tensor, Any], torch.Tensor]  # (scores, threshold) -> which rows leave
    history: bool  # whether it reads more than the newest exit
    default: Callable[[int, int], float]  # (labels, exits) -> a threshold to start from


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion(entropy, torch.lt, False, lambda labels, exits: 0.2 * math.log(labels)),
    "confidence": Criterion(confidence, torch.gt, False, lambda labels, exits: 0.9),
    "patience": Criterion(patience, torch.ge, True, lambda labels, exits: min(2, exits)),
}


def check_criterion(name: Any) -> str:
    if not isinstance(name, str) or name not in CRITERIA:
        raise CompressionError(f"Unknown exit criterion {shown(name)}. Known: {', '.join(CRITERIA)}.")
    return name


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float holds, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def check_threshold(criterion: str, threshold: Any, num_labels: int | None, num_exits: int) -> float | int | list[float]:
    """A threshold that means something, or a refusal. A list holds one number for every exit (not for patience).

    `num_labels` may be None, where the model is not known yet: then only the most that any model allows is refused.
    """
    if isinstance(threshold, list | tuple) and criterion != "patience":
        if len(threshold) != num_exits:
            raise CompressionError(f"A list of thresholds needs one for each of the {num_exits} exits, got {shown(threshold)}.")
        return [float(_one(criterion, value, num_labels, num_exits)) for value in threshold]
    return _one(criterion, threshold, num_labels, num_exits)


def _one(criterion: str, value: Any, num_labels: int | None, num_exits: int) -> float | int:
    number = is_number(value)
    if criterion == "patience":
        if not number or not 1 <= value <= num_exits + 1 or value != int(value):
            raise CompressionError(
                "The threshold of 'patience' is how many exits in a row must agree: one whole number from 1 to the number of "
                f"exits plus 1 ({num_exits + 1}: nobody leaves), got {shown(value)}."
            )
        return int(value)
    if criterion == "confidence":
        if not number or not 0 <= value <= 1:
            raise CompressionError(
                "The threshold of 'confidence' is the probability above which a row leaves, from 0 (all leave) to 1 (nobody "
                f"does), got {shown(value)}."
            )
        return float(value)
    most = math.log(num_labels or MOST_LABELS)
    if not number or not 0 <= value <= most + 1e-6:
        raise CompressionError(
            "The threshold of 'entropy' is the entropy in nats below which a row leaves, from 0 (nobody leaves) to "
            f"ln(num_labels){f' = {most:.4f}' * bool(num_labels)} (all leave), got {shown(value)}."
        )
    return float(value)
