"""How sparsity grows while a model trains: one pure function a schedule, from progress in [0, 1] to a share in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable


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


SCHEDULES: dict[str, Callable[[float], float]] = {"one_shot": one_shot, "linear": linear, "cubic": cubic}
