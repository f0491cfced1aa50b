"""The pictures of a card and of a run: what each block kept, what its sizes cost, the metric against the latency."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .about import LARGEST
from .drawing import Bar, Line, can_draw, error_figure, kept_figure, save, stages_figure
from .edits import CompressionError, Edit, KeepChannels, KeepHeads, KeepLayers, KeepNeurons
from .files import staged
from .plan import Plan, edit_from_dict
from .report import Report
from .words import stage_batch

logger = logging.get_logger(__name__)

KEPT, STAGES, ERROR = "kept.png", "stages.png", "error.png"
PRUNED_FILE = "pruned.json"
UNITS = {KeepHeads: ("heads", "attention"), KeepNeurons: ("neurons", "ffn"), KeepChannels: ("channels", "conv")}
MOST_LAYERS = 1000  # that are drawn; no model has so many
UNSURE = "layers, up to the last that is known"
FEW, LONGEST = 16, 24  # blocks whose names are written out, and how long a name may be
PANELS = 4  # of blocks of one kind that are named alike; beyond, one for all

Sizes = dict[str, tuple[int, int | None]]  # by block: units now, and before


def draw_(
    folder: str | os.PathLike,
    plan: Plan,
    report: Report | None,
    about: Mapping[str, Any] | None = None,
    pruned: Mapping[str, Any] | None = None,
) -> list[str]:
    """Draw what there is to draw into a folder, and name it in `report.about["pictures"]`, so that the card shows it.

    - `kept.png`: what stays of every block and which layers, what the baseline had behind it in grey: see `kept_units`.
    - `error.png`: what every block loses at every size, where `prune_to` noted that (`pruned`).
    - `stages.png`: the main metric against the latency, a point for each of `report.about["stages"]` that has both.

    Draw before `render_card` and before the report is saved: both read the names.

    Args:
        folder (`str` or `os.PathLike`): where the card goes.
        plan (`Plan`): what was done.
        report (`Report`, *optional*): what was measured.
        about (`dict`, *optional*): facts over those of the report, or where there is none.
        pruned (`dict`, *optional*): what `pruned_in` gives for this plan.

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
    facts = {**({} if report is None else report.about), **(about or {})}
    labels = [", ".join(filter(None, ["latency (ms)", stage_batch(report, facts)])), _metric(facts)]
    kept, points = kept_units(plan, facts, pruned), stage_points(facts)
    lines = {} if pruned is None else error_lines(pruned["units"], pruned["sizes"], pruned["curves"])
    drawn: dict[str, Any] = {}
    if can_draw():
        drawn |= {KEPT: kept_figure(bars_of(kept))} if kept else {}
        drawn |= {ERROR: error_figure(lines)} if lines else {}
        drawn |= {STAGES: stages_figure(points, labels)} if points else {}
    if drawn:
        with staged(folder) as stage:
            for name, figure in drawn.items():
                save(figure, stage / name)
    if report is not None:
        report.about.pop("pictures", None)
        report.about.update({"pictures": list(drawn)} if drawn else {})
    return list(drawn)


# --- what stays ------------------------------------------------------------------------------------------------------


def kept_units(plan: Plan, about: Mapping[str, Any], pruned: Mapping[str, Any] | None = None) -> dict[str, Sizes]:
    """For each kind of unit that a plan cuts: how many every block has now, and had before (None where it is not known).

    The sizes of all blocks, and of those of the baseline, are those that `measure` noted (`about["blocks"]`), or that
    `prune_to` did (`pruned`); where there is neither, the plan tells what stays of the blocks that it names. Where it removes
    layers, blocks are named as they were before; those of layers that went have 0, and `layers` tells which stay (1 of 1)
    and which went (0 of 1), as far as it is known how many there were.

    Example:

    ```python
    >>> from hf_compress import KeepHeads, KeepLayers, Plan
    >>> from hf_compress.pictures import kept_units
    >>> blocks = {"model": {"heads": {"a.0": 2, "a.1": 4}}, "against": {"heads": {"a.0": 4, "a.1": 4}}}
    >>> kept_units(Plan([KeepHeads("a.0", [0, 1])]), {"blocks": blocks})
    {'heads': {'a.0': (2, 4), 'a.1': (4, 4)}}
    >>> kept_units(Plan([KeepHeads("a.2", [0, 1]), KeepLayers([0, 2], "a"), KeepHeads("a.1", [0])]), {})
    {'heads': {'a.2': (1, None)}, 'layers, up to the last that is known: a': {'0': (1, 1), '1': (0, 1), '2': (1, 1)}}

    ```
    """
    blocks = about.get("blocks", {})
    now, was = (blocks.get(which, {}) for which in ("model", "against"))
    has_layers = any(type(edit) is KeepLayers for edit in plan)
    if not was and pruned is not None and not has_layers:
        now, was = ({}, {})
        for name, (left, there) in pruned["sizes"].items():
            now.setdefault(pruned["units"][name], {})[name] = left
            was.setdefault(pruned["units"][name], {})[name] = there
    listed = [name for sizes in (was, now) for what, of in sizes.items() if what != "layers" for name in of]
    named = [getattr(edit, UNITS[type(edit)][1]) for edit in plan if type(edit) in UNITS]
    stacks = _Stacks(listed or named, was.get("layers", {}))
    cut: dict[str, dict[str, int]] = {}
    for edit in plan:
        if type(edit) is KeepLayers:
            stacks.keep(edit)
            cut = {what: {n: size for n, size in of.items() if stacks.now(n) is not None} for what, of in cut.items()}
        elif type(edit) in UNITS:
            what, name = UNITS[type(edit)]
            cut.setdefault(what, {})[stacks.before(getattr(edit, name))] = len(getattr(edit, what))
    if "kv groups" in now:  # what `prune_to` counts where several heads share a key
        cut = {"kv groups": {}, **{what: of for what, of in cut.items() if what != "heads" or what in now}}
    found = {what: _sizes(now.get(what, {}), was.get(what, {}), of, stacks) for what, of in cut.items()}
    for what in ("heads", "neurons") if has_layers else ():  # of removed layers, where blocks are known by name
        sizes = _sizes(now.get(what, {}), was.get(what, {}), {}, stacks)
        if what not in found and any(size == 0 for size, _ in sizes.values()):
            found[what] = sizes
    return {**{what: sizes for what, sizes in found.items() if sizes}, **stacks.layers(listed if was else [])}


def _sizes(now: Mapping[str, int], was: Mapping[str, int], cut: Mapping[str, int], stacks: _Stacks) -> Sizes:
    if not now:  # the plan alone tells, of what it names
        return {name: (size, was.get(name)) for name, size in cut.items()}
    by_name = {stacks.before(name): size for name, size in now.items()}
    if was and by_name.keys() <= was.keys():
        return {name: (by_name.get(name, 0), size) for name, size in was.items() if name in by_name or stacks.went(name)}
    if len(was) == len(now) and not stacks.kept:  # the baseline has other names: the block in the same place
        return dict(zip(now, zip(now.values(), was.values(), strict=True), strict=True))
    same = next(iter(was.values())) if len(set(was.values())) == 1 else None
    return {name: (size, same) for name, size in by_name.items()}


class _Stacks:
    """What stacks of layers a plan has cut so far, and what their blocks were called before."""

    def __init__(self, names: Iterable[str], counts: Mapping[str, int]) -> None:
        parts = [name.split(".") for name in names]
        self.counts = counts  # of layers before, by the path of their stack
        self.paths = list(counts) or list(
            dict.fromkeys(".".join(of[:i]) for of in parts for i, part in enumerate(of) if part.isdigit())
        )
        self.kept: dict[str, tuple[int, ...]] = {}  # of a stack (its path, or as the plan calls it): layers, as numbered before

    def keep(self, edit: KeepLayers) -> None:
        fits = [p for p in self.paths if edit.stack is None or p == edit.stack or f".{edit.stack}." in f".{p}."]
        outer = [p for p in fits if not any(p.startswith(f"{other}.") for other in fits)]
        path = outer[0] if len(outer) == 1 else edit.stack or ""
        left = self.kept.get(path)
        self.kept[path] = edit.layers if left is None else tuple(left[i] for i in edit.layers if i < len(left))

    def _split(self, name: str) -> tuple[str, int, str] | None:
        for path in self.kept:
            head, _, rest = name[len(path) + 1 :].partition(".")
            if path and name.startswith(f"{path}.") and head.isdigit():
                return path, int(head), f".{rest}" if rest else ""
        return None

    def before(self, name: str) -> str:
        """What a block of the model as it is now was called."""
        found = self._split(name)
        if found is None or found[1] >= len(self.kept[found[0]]):
            return name
        return f"{found[0]}.{self.kept[found[0]][found[1]]}{found[2]}"

    def now(self, name: str) -> str | None:
        """What a block, named as before, is called now; None where its layer is gone."""
        found = self._split(name)
        if found is None:
            return name
        kept = self.kept[found[0]]
        return f"{found[0]}.{kept.index(found[1])}{found[2]}" if found[1] in kept else None

    def went(self, name: str) -> bool:
        return self.now(name) is None

    def layers(self, names: Sequence[str]) -> dict[str, Sizes]:
        """Which layers stay, of as many as there were; else of those up to the last that stays or holds one of these blocks."""
        found: dict[str, Sizes] = {}
        for path, kept in self.kept.items():
            inside = [name[len(path) + 1 :].split(".")[0] for name in names if path and name.startswith(f"{path}.")]
            last = max([*kept, *(int(index) for index in inside if index.isdigit())])
            count, sure = self.counts.get(path, last + 1), path in self.counts
            if last < count <= MOST_LAYERS:
                title = ("layers" if sure else UNSURE) + (f": {path}" if path else "")
                found[title] = {str(i): (int(i in kept), 1) for i in range(count)}
        return found


def bars_of(kept: Mapping[str, Sizes]) -> dict[str, list[Bar]]:
    """A panel for each kind of unit, or several where its blocks are named in a few ways; labels are layers' numbers."""
    found = {}
    for what, sizes in kept.items():
        for title, names in panels_of(what, sizes).items():
            found[title] = [Bar(label, *sizes[name]) for name, label in names.items()]
    return found


def panels_of(what: str, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Blocks by panel, with a short label each: the numbers in their names that differ.

    Example:

    ```python
    >>> from hf_compress.pictures import panels_of
    >>> panels_of("heads", ["up.0.self", "up.1.self", "down.0.self", "down.1.self"])
    {'heads: up.*.self': {'up.0.self': '0', 'up.1.self': '1'}, 'heads: down.*.self': {'down.0.self': '0', 'down.1.self': '1'}}

    ```
    """
    names = list(names)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    if len(alike) == 1:
        return {what: _labels(names)}
    if len(alike) > PANELS or min(map(len, alike.values())) < 2:
        return {what: _short(names) if len(names) <= FEW else {name: str(i) for i, name in enumerate(names)}}
    return {f"{what}: {pattern}": _labels(group) for pattern, group in alike.items()}


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(of) > same + 1 and of[same] == parts[0][same] for of in parts):
        same += 1
    shown = {name: ".".join(of[same:]) for name, of in zip(names, parts, strict=True)}
    return {name: text if len(text) <= LONGEST else f"...{text[-LONGEST:]}" for name, text in shown.items()}


def _labels(names: Sequence[str]) -> dict[str, str]:
    numbers = {name: [part for part in name.split(".") if part.isdigit()] for name in names}
    columns = [i for i, values in enumerate(zip(*numbers.values(), strict=True)) if len(set(values)) > 1 or len(names) == 1]
    return {name: ".".join(parts[i] for i in columns) or "0" for name, parts in numbers.items()}


# --- what is lost ----------------------------------------------------------------------------------------------------


def error_lines(
    units: Mapping[str, str], sizes: Mapping[str, Sequence[int]], curves: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, list[Line]]:
    """For each kind of unit: of every block, the share that stays and what is then lost, and where it was cut.

    Args:
        units (`dict[str, str]`): by block, the kind of its units.
        sizes (`dict[str, Sequence[int]]`): by block, units that stay, and that there were.
        curves (`dict`): by block, pairs of units that stay and the share that is lost.

    Example:

    ```python
    >>> from hf_compress.pictures import error_lines
    >>> error_lines({"a.0": "heads"}, {"a.0": [2, 4]}, {"a.0": [[1, 0.5], [2, 0.125], [4, 0.0]]})
    {'heads': [Line(label='0', points=[(0.25, 0.5), (0.5, 0.125), (1.0, 0.0)], chosen=(0.5, 0.125))]}

    ```
    """
    kinds: dict[str, list[str]] = {}
    for name in sizes:
        if curves.get(name):
            kinds.setdefault(units[name], []).append(name)
    found = {}
    for what, names in kinds.items():
        for title, labels in panels_of(what, names).items():
            lines = []
            for name, label in labels.items():
                left, there = sizes[name]
                points = [(size / there, share) for size, share in curves[name]]
                chosen = next(((size / there, share) for size, share in curves[name] if size == left), None)
                lines.append(Line(label, points, chosen))
            found[title] = lines
    return found


def save_pruned(folder: str | os.PathLike, data: Mapping[str, Any]) -> None:
    """Write `pruned.json` and, where matplotlib is installed, `kept.png` and `error.png` into a folder, or nothing at all.

    Args:
        folder (`str` or `os.PathLike`): it is made where there is none.
        data (`dict`): JSON-ready, with the `units`, `sizes` and `curves` of `Pruned`.

    Raises:
        CompressionError: the folder cannot be written.
    """
    kinds: dict[str, Sizes] = {}
    for name, (left, there) in data["sizes"].items():
        kinds.setdefault(data["units"][name], {})[name] = (left, there)
    lines = error_lines(data["units"], data["sizes"], data["curves"])
    figures = {KEPT: kept_figure(bars_of(kinds))} if kinds and can_draw() else {}
    figures |= {ERROR: error_figure(lines)} if lines and can_draw() else {}
    if not can_draw():
        logger.warning_once(f"matplotlib is not installed: {PRUNED_FILE} is written without its pictures ({KEPT}, {ERROR}).")
    with staged(folder, remove=[name for name in (KEPT, ERROR) if name not in figures]) as stage:  # of an earlier run
        (stage / PRUNED_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        for name, figure in figures.items():
            save(figure, stage / name)


def pruned_in(folder: str | os.PathLike, plan: Plan) -> dict[str, Any] | None:
    """What `pruned.json` in a folder tells of a model with this plan; None where there is none, or it is of another model.

    Raises:
        CompressionError: the file cannot be read, or is damaged.
    """
    path = Path(folder) / PRUNED_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not {"plan", "units", "sizes", "curves"} <= data.keys():
            return None  # of somebody else, or from before there were curves
        mine = _cuts(edit_from_dict(edit) for edit in data["plan"]["edits"])
        for name, (left, there) in data["sizes"].items():
            if not (type(left) is type(there) is int and 0 < left <= there < LARGEST and isinstance(data["units"][name], str)):
                raise ValueError(f"the sizes of {name}")
        for name, points in data["curves"].items():
            if not all(0 < size <= data["sizes"][name][1] and 0 <= share <= 2 for size, share in points):
                raise ValueError(f"the curve of {name}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, CompressionError) as error:
        raise CompressionError(
            f"{path} is not what Pruned.save writes ({type(error).__name__}: {error}): remove it, or save it again."
        ) from error
    return data if mine and mine == _cuts(plan) else None


def _cuts(edits: Iterable[Edit]) -> list[tuple[str, tuple[int, ...]]]:
    """What heads and neurons stay, whether or not weights were brought along."""
    kinds = KeepHeads, KeepNeurons
    return sorted((getattr(e, UNITS[type(e)][1]), getattr(e, UNITS[type(e)][0])) for e in edits if isinstance(e, kinds))


# --- stages ----------------------------------------------------------------------------------------------------------


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
