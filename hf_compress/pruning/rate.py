"""Learning rates that begin anew where something was removed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..edits import CompressionError


def restarted(schedule: Callable[[Any], float], steps: Sequence[int], total: int) -> Callable[[int], float]:
    """The schedule run whole again from each of some steps, over the steps that are left.

        f'(t) = f((t - s) / (T - s) * T),    s the last of the steps that is not after t

    (Renda, Frankle and Carbin 2020, *Comparing rewinding and fine-tuning*, arXiv:2003.02389: learning-rate rewinding, here over
    what is left of one training.)

    Args:
        schedule (`Callable`): step -> factor of the learning rate.
        steps (`Sequence[int]`): after which it begins anew.
        total (`int`): T, the steps of the whole training.

    Example:

    ```python
    >>> from hf_compress.pruning.rate import restarted
    >>> rate = restarted(lambda step: 1 - step / 100, [60], 100)
    >>> [round(rate(step), 2) for step in (0, 59, 60, 80, 100)]
    [1.0, 0.41, 1.0, 0.5, 0.0]

    ```
    """
    begins = sorted({0, *(step for step in steps if 0 < step < total)})

    def factor(step: int) -> float:
        begin = begins[bisect_right(begins, step) - 1] if step > 0 else 0
        return schedule((step - begin) / (total - begin) * total if begin else step)

    return factor


def restart_(scheduler: Any, steps: Sequence[int], total: int) -> Callable[[], None]:
    """Let a Trainer's schedule begin anew at some steps; what undoes it.

    Raises:
        CompressionError: it is no `LambdaLR`.
    """
    inner = check_restarts(scheduler)
    before = inner.lr_lambdas
    inner.lr_lambdas = [restarted(schedule, steps, total) for schedule in before]

    def undo() -> None:
        inner.lr_lambdas = before

    return undo


def check_restarts(scheduler: Any) -> LambdaLR:
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not isinstance(inner, LambdaLR):
        raise CompressionError(
            f"restart_rate=True takes a schedule that is a function of the step (a LambdaLR: linear, cosine, ...), got "
            f"{type(inner).__name__}. Choose another lr_scheduler_type, or leave restart_rate out."
        )
    return inner
