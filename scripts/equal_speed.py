"""Models brought to the same measured speed, so that what they lose can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_compress.timing import speedup_of, take_turns

WITHIN = 0.03  # of the speed-up that was asked
TRIES = 9


def timed(dense: Any, small: Any, inputs: Mapping[str, Any], pairs: int = 15) -> tuple[float, tuple[float, float]]:
    """How many times faster, with a 95% interval: the median over pairs of passes that took turns."""
    with torch.inference_mode():
        speedup, interval = speedup_of(take_turns([lambda: small(**inputs), lambda: dense(**inputs)], pairs, 2))
    assert speedup is not None and interval is not None
    return speedup, interval


@dataclass
class Found:
    """The model nearest to what was asked, the share at which it was made, and the largest one tried that is too slow."""

    model: Any
    share: float
    speedup: float
    below: float

    def is_near(self, asked: float) -> bool:
        return abs(self.speedup / asked - 1) <= WITHIN


def reach(build: Callable[[float], Any], time: Callable[[Any], float], asked: float, low: float = 0.0) -> Found:
    """Search the share that is removed until the model is as fast as was asked, within 3%.

    The time that is left falls about linearly with what is removed, so the next share is where the line through both ends meets
    the target, kept away from the ends; where sizes are coarse, nothing may be near, and the nearest is returned.

    Args:
        build: a model from a share in [0, 1): more removed, faster.
        time: how many times faster than the dense one a model is.
        asked: the speed-up.
        low: a share at which the model is too slow.
    """
    left, right = (low, 1.0), (1.0, 0.0)  # shares, and the time that is left there
    best: Found | None = None
    for _ in range(TRIES):
        part = (left[1] - 1 / asked) / max(left[1] - right[1], 1e-9)
        share = left[0] + min(max(part, 0.15), 0.85) * (right[0] - left[0])
        model = build(share)
        speedup = time(model)
        if speedup < asked:
            left = share, 1 / speedup
        else:
            right = share, 1 / speedup
        if best is None or abs(speedup / asked - 1) < abs(best.speedup / asked - 1):
            best = Found(model, share, speedup, low)
        if best.is_near(asked) or right[0] - left[0] < 1e-3:
            break
    assert best is not None
    best.below = left[0]
    return best
