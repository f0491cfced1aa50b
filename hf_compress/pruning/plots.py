"""`plot_family`: what a family of pruned models costs in accuracy, against how fast each was measured to be."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import shown
from ..drawing import Point, can_draw, family_figure, save
from ..edits import CompressionError
from ..files import staged
from .target import Pruned

FEWER = {"macs": "multiply-accumulates", "parameters": "parameters", "bytes": "bytes"}
Score = float | tuple[float, float, float]


def plot_family(
    family: Sequence[Pruned],
    path: str | os.PathLike,
    *,
    accuracies: Sequence[Score] | None = None,
    dense: Score | None = None,
    peers: Mapping[str, Sequence[tuple[float, Score]]] | None = None,
    label: str = "accuracy",
) -> None:
    """Draw a family of pruned models, as PNG: accuracy against the speed-up that was measured, beside the dense model.

    Speed-ups are `Pruned.achieved`, their 95% intervals horizontal bars; the dense model stands at 1. Without accuracies the
    picture shows what was lost: the mean over blocks of `Pruned.losses` (blocks that stayed whole lose nothing). What
    the numbers hold for (batch, threads, dtype) is written below, as far as the family notes it. A file `family.png`
    in the folder of a model is shown on its card.

    Args:
        family (`Sequence[Pruned]`): what `prune_family` or several `prune_to` gave, of one kind of target.
        path (`str` or `os.PathLike`): a `.png` file; its folder is made where there is none.
        accuracies (`Sequence`, *optional*): of each of the family, in its order: a number, or (number, low, high).
        dense (`float` or `tuple`, *optional*): the dense model's accuracy, like one of those; needed with `accuracies`.
        peers (`dict[str, Sequence]`, *optional*): other methods by name: pairs of (speed-up, accuracy), as measured.
        label (`str`, defaults to `"accuracy"`): what is measured.

    Raises:
        CompressionError: no family, other targets within it, accuracies that do not belong to it, numbers that are none, or
            matplotlib is not installed. Nothing is written then.

    Example:

    ```python
    >>> from hf_compress import Plan, Pruned, plot_family
    >>> family = [Pruned(Plan(), "speedup", x, x, (x - 0.02, x + 0.02), {}, {}, {"threads": 1}, 1.0) for x in (1.5, 2.0)]
    >>> plot_family(family, "family.png", accuracies=[0.88], dense=0.89)
    Traceback (most recent call last):
    ...
    hf_compress.checks.CompressionError: accuracies must be one for each of the family, in its order: got 1, for 2 models.

    ```
    """
    points, ground, others = family_points(family, accuracies, dense, peers)
    if not isinstance(path, str | os.PathLike) or Path(path).suffix.lower() != ".png" or Path(path).is_dir():
        raise CompressionError(f"path must be that of a .png file, got {path!r}.")
    if not isinstance(label, str) or not label.strip():
        raise CompressionError(f"label is what accuracies measure, a text; got {label!r}.")
    if not can_draw():
        raise CompressionError("plot_family draws with matplotlib, which is not installed: pip install matplotlib.")
    what = label if accuracies is not None else "lost of the blocks' outputs (mean)"
    figure = family_figure(ground, points, others, [_cost(family), what], percent=accuracies is None)
    with staged(Path(path).parent) as stage:
        save(figure, stage / Path(path).name)


def family_points(
    family: Sequence[Pruned],
    accuracies: Sequence[Score] | None = None,
    dense: Score | None = None,
    peers: Mapping[str, Sequence[tuple[float, Score]]] | None = None,
) -> tuple[list[Point], Point, dict[str, list[Point]]]:
    """What `plot_family` draws: the family, the dense model, and the peers by name.

    Example:

    ```python
    >>> from hf_compress import Plan, Pruned
    >>> from hf_compress.pruning.plots import family_points
    >>> sizes, losses = {"a": [2, 4], "b": [8, 8]}, {"a": 0.5}
    >>> points, dense, _ = family_points([Pruned(Plan(), "speedup", 2.0, 1.9, (1.8, 2.0), sizes, losses, {}, 1.0)])
    >>> points, dense[:2]
    ([Point(x=1.9, y=0.25, across=(1.8, 2.0), along=None)], (1.0, 0.0))

    ```
    """
    if not isinstance(family, Sequence) or not family or not all(isinstance(pruned, Pruned) for pruned in family):
        raise CompressionError(f"family must be a sequence of what prune_to gives (Pruned), got {shown(family)}.")
    targets = sorted({pruned.target for pruned in family})
    if len(targets) > 1 or len({pruned.interval is None for pruned in family}) > 1:
        kinds = ", ".join(targets) if len(targets) > 1 else "speed-ups that were measured and others that a table predicted"
        raise CompressionError(f"A family has one target and one way to reach it, got {kinds}: draw each by itself.")
    if accuracies is None:
        if dense is not None or peers:
            raise CompressionError("dense and peers are accuracies: give those of the family as well (accuracies=).")
        lost = [sum(p.losses.get(name, 0.0) for name in p.sizes) / max(1, len(p.sizes)) for p in family]
        return [Point(p.achieved, y, p.interval) for p, y in zip(family, lost, strict=True)], Point(1.0, 0.0), {}
    if isinstance(accuracies, str | bytes) or not isinstance(accuracies, Sequence) or len(accuracies) != len(family):
        got = len(accuracies) if isinstance(accuracies, Sequence) else type(accuracies).__name__
        raise CompressionError(
            f"accuracies must be one for each of the family, in its order: got {got}, for {len(family)} models."
        )
    if dense is None:
        raise CompressionError("dense must be the accuracy of the dense model, measured as those of the family were.")
    if peers is not None and not isinstance(peers, Mapping):
        raise CompressionError(f"peers must be a dict of names and pairs (speed-up, accuracy), got {shown(peers)}.")
    points = [_point(p.achieved, y, p.interval, "accuracies") for p, y in zip(family, accuracies, strict=True)]
    others: dict[str, list[Point]] = {}
    for name, pairs in (peers or {}).items():
        where = f"peers[{name!r}]"
        if not isinstance(name, str) or not isinstance(pairs, Sequence) or not pairs:
            raise CompressionError(f"{where} must be a sequence of pairs (speed-up, accuracy), got {shown(pairs)}.")
        if not all(isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in pairs):
            raise CompressionError(f"{where} must be a sequence of pairs (speed-up, accuracy), got {shown(pairs)}.")
        others[name] = [_point(x, y, None, where) for x, y in pairs]
    return points, _point(1.0, dense, None, "dense"), others


def _point(x: Any, y: Any, across: tuple[float, float] | None, where: str) -> Point:
    values = list(y) if isinstance(y, Sequence) and not isinstance(y, str) else [y]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in (x, *values))
    if not numbers or len(values) not in (1, 3) or x <= 0 or (len(values) == 3 and not values[1] <= values[0] <= values[2]):
        raise CompressionError(
            f"{where} holds {y!r} at {x!r}: a speed-up is a number above 0, an accuracy a number, or (number, low, high)."
        )
    return Point(float(x), float(values[0]), across, (float(values[1]), float(values[2])) if len(values) == 3 else None)


def _cost(family: Sequence[Pruned]) -> str:
    """The label of what is gained, and where it was measured where all of the family say the same."""
    first = family[0]
    if first.target != "speedup":
        return f"times fewer {FEWER[first.target]}"
    name = "speed-up" if first.interval is not None else "speed-up, predicted from a table of times"
    known = first.conditions if all(pruned.conditions == first.conditions for pruned in family) else {}
    shape = next((" x ".join(map(str, shape)) for shape in known.get("shapes", {}).values() if shape), None)
    threads = known.get("threads")
    said = [f"batch {shape}" if shape else "", f"{threads} thread{'s' * (threads != 1)}" if threads else ""]
    said += [known["dtype"] if known.get("dtype", "none") != "none" else ""]
    return ", ".join([name, *filter(None, said)])
