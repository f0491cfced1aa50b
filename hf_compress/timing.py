"""Times, taken in turns, and what they say: medians, quartiles, ratios with intervals."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from .report import Latency


def take_turns(runs: list[Callable[[], Any]], repeats: int, warmup: int) -> list[list[float]]:
    """Times of each, one after the other in every round, in random order."""
    for _ in range(warmup):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    order = random.Random(0)
    for _ in tqdm(range(repeats), desc="time", leave=False, disable=None, delay=3):
        for i in order.sample(range(len(runs)), len(runs)):
            wait()
            start = time.perf_counter()
            runs[i]()
            wait()
            times[i].append(time.perf_counter() - start)
    return times


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95% interval of the median."""
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def speedup_of(times: list[list[float]]) -> tuple[float | None, tuple[float, float] | None]:
    if len(times) < 2:
        return None, None
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return statistics.median(ratios), bootstrap(ratios)


def steady_speedup(
    fast: Callable[[], Any],
    slow: Callable[[], Any],
    *,
    pairs: int,
    width: float,
    longest: float,
    is_enough: Callable[[float, float], bool] | None = None,
) -> tuple[float, tuple[float, float], int]:
    """Time two in turn until it is known well how many times faster one is.

    Args:
        fast, slow: what is run.
        pairs: of runs, before it is asked whether they are enough.
        width: of the 95% interval to either side, as a share, at which they are.
        longest: seconds, after which they are in any case.
        is_enough (*optional*): (speed-up, width) -> whether no more needs to be known.

    Returns:
        (the median of the ratios, its interval, how many pairs).
    """
    times: list[list[float]] = [[], []]
    start = time.perf_counter()
    while True:
        for own, more in zip(times, take_turns([fast, slow], pairs, 0 if times[0] else 2), strict=True):
            own += more
        speedup, interval = speedup_of(times)
        assert speedup is not None and interval is not None
        wide = max(interval[1] - speedup, speedup - interval[0]) / speedup
        if wide <= width or time.perf_counter() - start > longest or (is_enough is not None and is_enough(speedup, wide)):
            return speedup, interval, len(times[0])


def latency_of(times: list[float]) -> Latency:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Latency(statistics.median(times), quartiles[0], quartiles[2], len(times))
