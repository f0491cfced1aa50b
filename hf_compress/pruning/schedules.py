"""How sparsity grows while a model trains: one pure function a schedule, from progress in [0, 1] to a share in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..discover import nearest
from ..edits import CompressionError


def one_shot(progress: float) -> float:
    """Everything at once, at the start of the schedule."""
    return 1.0


def linear(progress: float) -> float:
    """`progress`.

    Example:

    ```python
    >>> from hf_compress.pruning.schedules import linear
    >>> linear(0.25)
    0.25

    ```
    """
    return progress


def cubic(progress: float) -> float:
    """`1 - (1 - progress)^3`: fast while there is much to remove, slow towards the end.

    Zhu & Gupta 2017, *To prune, or not to prune* (arXiv:1710.01878), eq. 1 from a dense start.

    Example:

    ```python
    >>> from hf_compress.pruning.schedules import cubic
    >>> cubic(0.5)
    0.875

    ```
    """
    return 1 - (1 - progress) ** 3


def ratio_at(schedule: str, progress: float, ratio: float) -> float:
    """How many times faster (smaller) a model that ends `ratio` times faster is at a point of its training.

    `"gradual"` makes it faster by the same factor at every stage, `ratio ** progress` (Kurtic et al. 2023, *ZipLM*, prune one
    target after the other); the schedules above give the share of what goes, `1 / (1 - share (1 - 1 / ratio))`.

    Example:

    ```python
    >>> from hf_compress.pruning.schedules import ratio_at
    >>> [ratio_at("gradual", progress, 4.0) for progress in (0.0, 0.5, 1.0)], ratio_at("linear", 0.5, 4.0)
    ([1.0, 2.0, 4.0], 1.6)

    ```
    """
    if schedule == "gradual":
        return ratio**progress
    return 1 / (1 - SCHEDULES[schedule](progress) * (1 - 1 / ratio))


SCHEDULES: dict[str, Callable[[float], float]] = {"one_shot": one_shot, "linear": linear, "cubic": cubic}


def check_schedule(
    schedule: Any, start: Any, end: Any, every: Any, known: Sequence[str] = tuple(SCHEDULES), why: str = ""
) -> None:
    """Refuse what says no schedule, with what is allowed. `why`: of one that is known elsewhere."""
    if not isinstance(schedule, str) or schedule not in known:
        raise CompressionError(
            f"Unknown schedule {schedule!r}{why or nearest(str(schedule), list(known))} Known: {', '.join(known)}."
        )
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (start, end))
    if not numbers or not 0 <= start <= end <= 1:
        raise CompressionError(
            f"start and end are fractions of the training, 0 <= start <= end <= 1, got {start!r} and {end!r}."
        )
    if every is not None and (type(every) is not int or every < 1):
        raise CompressionError(f"every is a number of optimizer steps >= 1, got {every!r}.")
