"""The joint loss of all exits, on the scale of the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..edits import CompressionError

IGNORED = -100


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each exit over the rows that have a label: (exits, rows, C), (rows,) -> (exits,); 0 over none."""
    count = len(logits)
    per_row = F.cross_entropy(logits.float().flatten(0, 1), labels.repeat(count), ignore_index=IGNORED, reduction="none")
    return per_row.view(count, -1).sum(1) / (labels != IGNORED).sum().clamp_min(1)


def self_distillation(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(exit / T))`, mean over rows: (exits, rows, C), (rows, C) -> (exits,).

    The teacher is the last layer, detached: [Zhang et al. 2019](https://arxiv.org/abs/1905.08094), whose formula is that of
    Hinton 2015; [FastBERT](https://aclanthology.org/2020.acl-main.537/) uses it with T = 1.
    """
    log_p = F.log_softmax(logits.float() / temperature, -1)
    log_t = F.log_softmax(teacher.detach().float() / temperature, -1)
    return temperature**2 * (log_t.exp() * (log_t - log_p)).sum(-1).mean(1)


def exit_weights(how: str | list[float], after: list[int], depth: int) -> list[float]:
    """Weights of the exits and, last, of the final layer; they sum to one.

    `"depth"`: proportional to the number of layers below, `j / sum j` ([PABEE](https://arxiv.org/abs/2006.04152), eq. 5);
    `"equal"`; or numbers of your own.
    """
    raw = [i + 1.0 for i in [*after, depth - 1]] if how == "depth" else [1.0] * (len(after) + 1) if how == "equal" else how
    return [float(w) / sum(raw) for w in raw]  # type: ignore[arg-type]


def reached_weights(how: str | list[float], after: list[int], depth: int, reached: list[int]) -> list[float]:
    """`exit_weights` of the exits after the layers `reached` and of the final layer, for a forward that ran no others.

    They sum to one again; to zero where all weight lies on exits that were not reached.
    """
    of = dict(zip([*after, None], exit_weights(how, after, depth), strict=True))
    found = [of[index] for index in [*reached, None]]
    return [weight / (sum(found) or 1.0) for weight in found]


def class_labels(labels: Any, rows: int) -> torch.Tensor:
    """Labels as (rows,) class indices; anything else is refused."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.numel() != rows:
        shape = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise CompressionError(
            f"Exits need one whole-number class label a row (a tensor of shape ({rows},)), got {shape}. Regression and many "
            "labels a row are not offered; detach_exits_(model) gives the plain model back."
        )
    return labels.view(-1)


def uses_num_items(loss: torch.Tensor, mean: torch.Tensor, ratio: torch.Tensor | float | None) -> bool | None:
    """Whether a model's loss is its mean cross-entropy (False) or that times `ratio` (True); None where they are too close.

    `ratio`: labelled rows in this batch over `num_items_in_batch`. transformers' newer heads divide the sum by that number,
    BERT's and others' average over their batch whatever it is. Costs a synchronisation: ask once.

    Raises:
        CompressionError: it is neither, so the exits' losses could not be put on its scale.
    """
    loss, mean = loss.detach().float(), mean.detach().float()
    room = 0.02 * mean + 1e-2  # a head may compute in bfloat16
    plain = bool((loss - mean).abs() <= room)
    if ratio is None:
        scaled = False
    else:
        scaled = bool((loss - mean * ratio).abs() <= 0.02 * mean * ratio + 1e-2)
    if not plain and not scaled:
        raise CompressionError(
            f"The model's loss ({loss.item():.4f}) is not the mean cross-entropy of its logits ({mean.item():.4f}): class "
            "weights, smoothing or a loss of its own. Joint training of exits would change what it means; it is not offered."
        )
    return None if plain and scaled and ratio is not None else scaled
