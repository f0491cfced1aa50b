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


def latency_of(times: list[float]) -> Latency:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Latency(statistics.median(times), quartiles[0], quartiles[2], len(times))
