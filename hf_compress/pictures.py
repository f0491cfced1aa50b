"""The pictures of a card: what each layer kept, and the metric against the latency after every stage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .about import LARGEST
from .edits import KeepHeads, KeepNeurons
from .files import staged
from .plan import Plan
from .report import Report
from .words import one_line, stage_batch

KEPT, STAGES = "kept.png", "stages.png"
LEAST_SPAN = 0.05  # of the axis of a metric in [0, 1]
FULL, LEFT = "#d9d9d9", "#2a6f97"  # told apart in print and by the colour-blind


def draw_(folder: str | os.PathLike, plan: Plan, report: Report | None) -> list[str]:
    """Draw what there is to draw into a folder, and name it in `report.about["pictures"]`, so that the card shows it.

    - `kept.png`: heads and neurons of every layer, those of the baseline behind them in grey, from the sizes that `measure`
      noted (`report.about["blocks"]`), or from the plan where there are none.
    - `stages.png`: the main metric against the latency, a point for each of `report.about["stages"]` that has both.

    Draw before `render_card` and before the report is saved: both read the names.

    Args:
        folder (`str` or `os.PathLike`): where the card goes.
        plan (`Plan`): what was done.
        report (`Report`, *optional*): what was measured.

    Returns:
        `list[str]`: the names of the files; empty where nothing can be drawn or matplotlib is not installed.

    Raises:
        CompressionError: the folder cannot be written.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_compress import Plan
    >>> from hf_compress.pictures import draw_
    >>> draw_(tempfile.mkdtemp(), Plan(), None)
    []

    ```
    """
    about = {} if report is None else report.about
    figures = {KEPT: kept_sizes(plan, about), STAGES: stage_points(about)}
    labels = [", ".join(filter(None, ["latency (ms)", stage_batch(report, about)])), _metric(about)]
    drawn = [name for name, data in figures.items() if data] if find_spec("matplotlib") else []
    if drawn:
        with staged(folder) as stage:
            for name in drawn:
                DRAW[name](stage / name, figures[name], labels)
    if report is not None:
        report.about.pop("pictures", None)
        report.about.update({"pictures": drawn} if drawn else {})
    return drawn


def kept_sizes(plan: Plan, about: Mapping[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """For heads and neurons: how many every block has now, and had before (empty where that is not known).

    A block's size before is that of the baseline's block in the same place; where layers were removed, only if all were
    of one size. Nothing is given where nothing was pruned.

    Example:

    ```python
    >>> from hf_compress import KeepHeads, Plan
    >>> from hf_compress.pictures import kept_sizes
    >>> blocks = {"model": {"heads": {"a": 2, "b": 4}}, "against": {"heads": {"a": 4, "b": 4}}}
    >>> kept_sizes(Plan([KeepHeads("a", [0, 1])]), {"blocks": blocks})
    {'heads': ([2, 4], [4, 4])}

    ```
    """
    found = {}
    for what, kind in (("heads", KeepHeads), ("neurons", KeepNeurons)):
        cut = {vars(e)["attention" if kind is KeepHeads else "ffn"]: len(vars(e)[what]) for e in plan if type(e) is kind}
        blocks = about.get("blocks", {})
        now = list(blocks.get("model", {}).get(what, {}).values()) or list(cut.values())
        was = list(blocks.get("against", {}).get(what, {}).values())
        if len(was) != len(now):
            was = was[:1] * len(now) if len(set(was)) == 1 else []
        if cut:
            found[what] = (now, was)
    return found


def stage_points(about: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, milliseconds, metric) of every stage that has both; none where there are fewer than two."""
    points = []
    for stage in about.get("stages", ()):
        latency, metric = stage.get("latency"), stage.get("metric")
        seconds = latency["median"] if isinstance(latency, Mapping) else latency
        if seconds is not None and metric is not None and abs(metric) < LARGEST:  # a metric may be nan
            points.append((stage["name"], seconds * 1e3, metric))
    return points if len(points) > 1 else []


def _metric(about: Mapping[str, Any]) -> str:
    return about.get("dataset", {}).get("metric_name") or about.get("metric") or "metric"


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found]  # pyplot keeps state
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    figure = Figure(figsize=(5.0 * count, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _kept(path: Path, data: Mapping[str, tuple[list[int], list[int]]], labels: list[str]) -> None:
    figure, axes = _axes(len(data))
    for axis, (what, (now, was)) in zip(axes, data.items(), strict=True):
        if was:
            axis.bar(range(len(was)), [float(n) for n in was], color=FULL, label="before")
        axis.bar(range(len(now)), [float(n) for n in now], color=LEFT, label="kept")
        axis.set(xlabel="block", ylabel=what, ylim=(0, None))
        axis.locator_params(integer=True)
        if was:
            axis.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, metadata={"Software": None})


def _stages(path: Path, points: list[tuple[str, float, float]], labels: list[str]) -> None:
    figure, (axis,) = _axes(1)
    names, latencies, metrics = zip(*points, strict=True)
    axis.plot(latencies, metrics, color=FULL, zorder=1)
    axis.scatter(latencies, metrics, color=LEFT, zorder=2)
    for name, x, y in points:
        axis.annotate(one_line(name), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, parse_math=False)
    axis.margins(x=0.25, y=0.15)
    axis.set_xlim(left=0)
    axis.set_ylim(*metric_limits(metrics, axis.get_ylim()))
    for label, set_label in zip(labels, (axis.set_xlabel, axis.set_ylabel), strict=True):
        set_label(one_line(label), parse_math=False)  # a dollar sign in a name begins no formula
    figure.savefig(path, metadata={"Software": None})


def metric_limits(metrics: Sequence[float], found: tuple[float, float]) -> tuple[float, float]:
    """The limits of the metric's axis: of scores in [0, 1], five points at least, or noise would look like a cliff.

    ```python
    >>> from hf_compress.pictures import metric_limits
    >>> [round(x, 3) for x in metric_limits([0.878, 0.882], (0.877, 0.883))], metric_limits([3.0, 20.0], (0.5, 22.0))
    ([0.855, 0.905], (0.5, 22.0))

    ```
    """
    low, high = found
    if not all(0 <= metric <= 1 for metric in metrics) or high - low >= LEAST_SPAN:
        return found
    middle = (min(metrics) + max(metrics)) / 2
    return middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2


DRAW = {KEPT: _kept, STAGES: _stages}
