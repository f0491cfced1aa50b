"""Figures from plain data. Whoever calls says what is drawn; nothing is measured or worked out here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .words import one_line

FULL, LEFT, OTHER = "#d9d9d9", "#2a6f97", "#c77d2e"  # told apart in print and by the colour-blind
MARKS = "s^Dvp*Xh"  # of peers
LEAST_SPAN = 0.05  # of the axis of a metric in [0, 1]
SLOT = 0.17  # inches a bar, where there are many
WIDEST = 30.0  # inches
FLOOR = 1e-3  # of a share that is lost: below it the axis is linear, so that zero has a place


class Bar(NamedTuple):
    """One block: how many units it has now, and had before (None where that is not known)."""

    label: str
    now: int
    was: int | None


class Line(NamedTuple):
    """What one block loses: the share that stays and the share that is lost, by size, and the point that was chosen."""

    label: str
    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float] | None


class Point(NamedTuple):
    """A model: its speed-up and what it scores, each with its interval where one is known."""

    x: float
    y: float
    across: tuple[float, float] | None = None
    along: tuple[float, float] | None = None


def can_draw() -> bool:
    """Whether matplotlib is installed: pictures are made where it is."""
    return find_spec("matplotlib") is not None


def save(figure: Any, path: Path) -> None:
    """As PNG, without what differs from one day to another."""
    figure.savefig(path, format="png", metadata={"Software": None})


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found]  # pyplot keeps state
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def kept_figure(panels: Mapping[str, Sequence[Bar]]) -> Any:
    """What stays of every block, a panel for each kind of unit: shares of what there was, with the counts written in.

    What there was lies behind, in grey. Where that is not known of every block of a panel, its bars are counts.
    """
    many = max(len(bars) for bars in panels.values())
    width = min(max(6.0, SLOT * many + 1.2), WIDEST)
    tall = [1.2 if what.startswith("layers") else 2.4 for what in panels]
    figure, axes = _figure(width, 0.3 + sum(tall), len(panels), heights=tall)
    for axis, (what, bars) in zip(axes, panels.items(), strict=True):
        shares = all(bar.was for bar in bars)
        places = range(len(bars))
        heights = [bar.now / bar.was if shares and bar.was else float(bar.now) for bar in bars]
        before = [(x, 1.0 if shares else float(bar.was)) for x, bar in zip(places, bars, strict=True) if bar.was]
        if before:
            axis.bar(*zip(*before, strict=True), color=FULL, label="before")
        axis.bar(places, heights, color=LEFT, label="kept")
        top = max([*heights, *(height for _, height in before), 1e-9])
        room = (width - 1.0) / len(bars)  # inches
        longest = max(len(f"{bar.now:,}") for bar in bars)
        upright = 0.07 * longest > room
        layers = what.startswith("layers")
        for x, height, bar in zip(places, heights, bars, strict=True) if not layers else ():
            axis.annotate(
                f"{bar.now:,}", (x, height), textcoords="offset points", xytext=(0, 1.5), ha="center", va="bottom",
                fontsize=7 if room > 0.14 else 5, rotation=90 if upright else 0,
            )  # fmt: skip
        axis.set_ylim(0, top * (1.12 + upright * 0.055 * longest))
        step = -(-len(bars) // 150)
        turned = max(len(bar.label) for bar in bars) * 0.075 > room * step
        axis.set_xticks(list(places)[::step], [bar.label for bar in bars][::step], fontsize=7, rotation=90 if turned else 0)
        axis.set_xlim(-0.7, len(bars) - 0.3)
        axis.set_xlabel("layer" if layers else "block")
        axis.set_ylabel("kept" if layers else f"{what.split(':')[0]} kept", parse_math=False)
        axis.set_title(one_line(what) if ":" in what or layers else "", fontsize=9, loc="left", parse_math=False)
        if layers:
            axis.set_yticks([])
        elif shares:
            axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        else:
            axis.yaxis.get_major_locator().set_params(integer=True)
        if before:
            axis.legend(frameon=False, ncols=2, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return figure


def error_figure(panels: Mapping[str, Sequence[Line]]) -> Any:
    """What is lost against what stays, a line for every block (the deeper, the lighter) and a mark where it was cut."""
    from matplotlib import colormaps  # type: ignore[import-not-found]
    from matplotlib.cm import ScalarMappable  # type: ignore[import-not-found]
    from matplotlib.colors import Normalize  # type: ignore[import-not-found]

    figure, axes = _figure(5.4 * len(panels), 3.6, 1, len(panels))
    colours = colormaps["viridis"]
    for axis, (what, lines) in zip(axes, panels.items(), strict=True):
        scale = Normalize(0, max(1, len(lines) - 1) / 0.9)  # the last tenth is too light for paper
        thin = len(lines) > 24
        for i, line in enumerate(lines):
            colour = colours(scale(i))
            axis.plot(*zip(*line.points, strict=True), color=colour, linewidth=0.7 if thin else 1.2, label=one_line(line.label))
            if line.chosen is not None:
                axis.plot(
                    *line.chosen, color=colour, marker="o", markersize=3 if thin else 5, markeredgecolor="black",
                    markeredgewidth=0.5, linestyle="none", zorder=3, label="_chosen",
                )  # fmt: skip
        axis.set_yscale("symlog", linthresh=FLOOR, linscale=0.4)
        axis.set_ylim(0, 1.05)
        axis.set_yticks([0, 1e-3, 1e-2, 1e-1, 1], ["0%", "0.1%", "1%", "10%", "100%"])
        axis.set_yticks([], minor=True)
        axis.set_xlim(0, 1.02)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axis.set_xlabel(f"{what.split(':')[0]} that stay", parse_math=False)
        axis.set_ylabel("share of the output lost")
        axis.set_title(one_line(what) if ":" in what else "", fontsize=9, loc="left", parse_math=False)
        if len(lines) > 1:
            ticks = sorted({0, (len(lines) - 1) // 2, len(lines) - 1})
            bar = figure.colorbar(ScalarMappable(scale, colours), ax=axis, label="block", ticks=ticks)
            bar.ax.set_ylim(0, len(lines) - 1)
            bar.ax.set_yticklabels([one_line(lines[i].label) for i in ticks], parse_math=False)
    return figure


def stages_figure(points: Sequence[tuple[str, float, float]], labels: Sequence[str]) -> Any:
    """The metric against the latency, a point for every stage."""
    figure, (axis,) = _figure(5.0, 3.4)
    _, latencies, metrics = zip(*points, strict=True)
    axis.plot(latencies, metrics, color=FULL, zorder=1)
    axis.scatter(latencies, metrics, color=LEFT, zorder=2)
    for name, x, y in points:
        axis.annotate(one_line(name), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8, parse_math=False)
    axis.margins(x=0.25, y=0.15)
    axis.set_xlim(left=0)
    axis.set_ylim(*metric_limits(metrics, axis.get_ylim()))
    for label, set_label in zip(labels, (axis.set_xlabel, axis.set_ylabel), strict=True):
        set_label(one_line(label), parse_math=False)  # a dollar sign in a name begins no formula
    return figure


def family_figure(
    dense: Point, family: Sequence[Point], peers: Mapping[str, Sequence[Point]], labels: Sequence[str], percent: bool = False
) -> Any:
    """A family of models against their speed-up, the dense one at 1, others as other marks; intervals as bars."""
    from matplotlib.ticker import PercentFormatter  # type: ignore[import-not-found]

    figure, (axis,) = _figure(5.8, 3.8)
    axis.axhline(dense.y, color=FULL, linestyle="--", zorder=0, label="_dense")
    _points(axis, [dense], "dense", color="black", marker="o", linestyle="none")
    _points(axis, sorted(family, key=lambda p: p.x), "pruned", color=LEFT, marker="o", linestyle="-")
    for i, (name, points) in enumerate(peers.items()):
        colour = OTHER if i % 2 == 0 else "#7a7a7a"
        _points(
            axis, sorted(points, key=lambda p: p.x), one_line(name), color=colour, marker=MARKS[i % len(MARKS)], linestyle=":"
        )
    axis.margins(x=0.08, y=0.12)
    axis.set_ylim(*metric_limits([p.y for p in (dense, *family, *(p for of in peers.values() for p in of))], axis.get_ylim()))
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    for label, set_label in zip(labels, (axis.set_xlabel, axis.set_ylabel), strict=True):
        set_label(one_line(label), parse_math=False)
    for text in axis.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    return figure


def _points(axis: Any, points: Sequence[Point], label: str, **looks: Any) -> None:
    def reach(values: Sequence[float], ends: Sequence[tuple[float, float] | None]) -> Any:
        if not any(ends):
            return None
        pairs = [(v, v) if end is None else end for v, end in zip(values, ends, strict=True)]
        low = [max(0.0, v - a) for v, (a, _) in zip(values, pairs, strict=True)]
        return [low, [max(0.0, b - v) for v, (_, b) in zip(values, pairs, strict=True)]]

    xs, ys = [p.x for p in points], [p.y for p in points]
    across, along = reach(xs, [p.across for p in points]), reach(ys, [p.along for p in points])
    axis.errorbar(xs, ys, xerr=across, yerr=along, label=label, markersize=5, capsize=2, linewidth=1.2, **looks)


def metric_limits(metrics: Sequence[float], found: tuple[float, float]) -> tuple[float, float]:
    """The limits of the metric's axis: of scores in [0, 1], five points at least, or noise would look like a cliff.

    ```python
    >>> from hf_compress.drawing import metric_limits
    >>> [round(x, 3) for x in metric_limits([0.878, 0.882], (0.877, 0.883))], metric_limits([3.0, 20.0], (0.5, 22.0))
    ([0.855, 0.905], (0.5, 22.0))

    ```
    """
    low, high = found
    if not all(0 <= metric <= 1 for metric in metrics) or high - low >= LEAST_SPAN:
        return found
    middle = (min(metrics) + max(metrics)) / 2
    return middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2
