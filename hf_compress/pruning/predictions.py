"""What a model predicts, among what it puts out: logits, over classes, or else the values that others go on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..probe import tensors_in


class Prediction(NamedTuple):
    """One of a model's outputs: `values` of shape (..., classes) if they are logits, (..., features) if not."""

    values: torch.Tensor
    is_logits: bool

    def rows(self, mask: torch.Tensor | None) -> torch.Tensor:
        """As (rows, classes), without those of padding where there is a mask (batch, tokens) of real ones."""
        values = self.values if self.values.ndim > 1 else self.values[:, None]
        if mask is not None and values.ndim == 3 and mask.shape == values.shape[:2]:
            return values[mask.to(values.device).bool()]
        return values.flatten(0, -2)


def predictions_of(outputs: Any) -> list[Prediction]:
    """What counts of a model's outputs.

    All that is called logits (`logits`, `start_logits`, `logits_per_image`, ...) and has several classes: the last dimension,
    or the second where they are maps (batch, classes, height, width); and what is called `pred_...` beside them (boxes). Where
    there are no logits, the first output.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.predictions import predictions_of
    >>> spans = {"start_logits": torch.zeros(2, 7), "end_logits": torch.zeros(2, 7), "hidden": torch.zeros(2, 7, 4)}
    >>> [(tuple(p.values.shape), p.is_logits) for p in predictions_of(spans)]
    [((2, 7), True), ((2, 7), True)]
    >>> [(tuple(p.values.shape), p.is_logits) for p in predictions_of({"last_hidden_state": torch.zeros(2, 7, 4)})]
    [((2, 7, 4), False)]

    ```
    """
    named = [(k, v) for k, v in outputs.items() if isinstance(v, torch.Tensor)] if isinstance(outputs, Mapping) else []
    found = []
    for name, value in named:
        if not value.is_floating_point() or not (name.endswith("logits") or name.startswith("logits_per_")):
            continue
        classes = value.movedim(1, -1) if value.ndim > 3 else value
        if classes.ndim > 1 and classes.shape[-1] > 1:
            found.append(Prediction(classes, True))
    if found:
        return found + [Prediction(v, False) for name, v in named if name.startswith("pred_") and v.is_floating_point()]
    return [Prediction(value, False) for _, value in tensors_in(outputs)[:1]]
