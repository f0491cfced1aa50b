"""What was measured, as data: prints as a table, goes to JSON and back. A card is rendered from it and a plan alone."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .about import LARGEST, as_json, check_about, check_conditions
from .edits import CompressionError
from .files import replace_files

FORMAT = 1
REPORT_FILE = "report.json"
EVAL_FILE = ".eval_results/hf_compress.yaml"  # where the Hub reads results of its benchmarks


@dataclass(frozen=True)
class Latency:
    """Seconds per forward pass."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    repeats: int

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms [{self.low * 1e3:.2f}-{self.high * 1e3:.2f}]"


@dataclass(frozen=True)
class Cost:
    """What one model costs on one batch.

    `nonzero`: the parameters less those that a mask holds at zero; none where no weights are held so.
    """

    parameters: int
    parameters_encoder: int
    bytes: int
    macs: int
    latency: Latency
    metrics: dict[str, float] = field(default_factory=dict)
    nonzero: int | None = None


@dataclass(frozen=True)
class Timing:
    """Latency at one batch size, the baseline's beside it.

    Attributes:
        batch (`int`): rows.
        length (`int`, *optional*): tokens (or samples of sound) a row; none for images.
        model (`Latency`), against (`Latency`, *optional*): of the model and the baseline, timed in turn.
        speedup (`float`, *optional*): median over pairs of runs of (baseline time / model time).
        speedup_interval (`tuple[float, float]`, *optional*): its 95% bootstrap interval.
    """

    batch: int
    length: int | None
    model: Latency
    against: Latency | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Report:
    """What `measure` found. Prints as a table.

    Attributes:
        model (`Cost`): of the model.
        against (`Cost`, *optional*): of the baseline, timed in turn with it.
        speedup (`float`, *optional*): median over pairs of runs of (baseline time / model time).
        speedup_interval (`tuple[float, float]`, *optional*): its 95% bootstrap interval.
        speedup_allowed (`float`, *optional*): what Amdahl's law allows: see `measure`.
        conditions (`dict`): hardware, threads, dtype, shapes and versions.
        timings (`tuple[Timing, ...]`): latency at other batch sizes.
        about (`dict`): what the numbers are about, for the card: `base_model`, `base_revision`, `base_card`, `task` (the
            Hub's pipeline tag), `dataset` (`name`, `config`, `split`, `rows`, `metric_name`), `metric`, `seed`, `versions`,
            `tier` (`"stock"` or `"plugin"`), `stages` (dicts of `name`, `metric`, `latency` in seconds, `parameters`, `bytes`),
            `against` (what the baseline is called), `notes` (sentences for the limits), `architecture` (a class), `auto_model`
            (the one that loads it), `library_name`, `recipe`, `name`, `repo_id`; all optional. `measure` fills in what it
            can see.

    Raises:
        CompressionError: something in `about` or `conditions` that JSON cannot hold, of a wrong type or shape, or misspelt.

    Example:

    ```python
    >>> from hf_compress.report import Cost, Latency, Report
    >>> cost = Cost(1000, 400, 4000, 8000, Latency(0.002, 0.001, 0.003, 5), {"accuracy": 0.5})
    >>> report = Report(cost, None, None, None, None, {"threads": 1, "shapes": {"input_ids": [2, 8]}})
    >>> print(report)
                                     model
    parameters                       1,000
      encoder only                     400
    bytes on disk                    4,000
    MACs                             8,000
    latency         2.00 ms [1.00-3.00]
    accuracy                        0.5000
    threads 1; input_ids 2x8
    >>> Report.from_dict(report.to_dict()) == report
    True

    ```
    """

    model: Cost
    against: Cost | None
    speedup: float | None
    speedup_interval: tuple[float, float] | None
    speedup_allowed: float | None
    conditions: dict[str, Any]
    timings: tuple[Timing, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "timings", tuple(self.timings))
        object.__setattr__(self, "conditions", check_conditions(self.conditions))
        object.__setattr__(self, "about", check_about(self.about))

    @property
    def ratios(self) -> dict[str, float]:
        """Model over baseline, of whatever both have; empty without a baseline."""
        if self.against is None:
            return {}
        pairs = {key: (getattr(self.model, key), getattr(self.against, key)) for key in COUNTS}
        return {key: one / other for key, (one, other) in pairs.items() if other and one is not None}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with the ratios. `Report.from_dict` is its inverse."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self), "ratios": self.ratios}))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote, by this version or an earlier one.

        Raises:
            CompressionError: the dict is not a report, or comes from a later format.
        """
        if not isinstance(data, Mapping) or "model" not in data:
            raise CompressionError(f"Not a report: expected what Report.to_dict() gives, got {str(data)[:80]!r}.")
        data = as_json(dict(data), "The report")
        if data.get("format", FORMAT) != FORMAT:
            raise CompressionError(
                f"This report has format {data['format']!r}; this hf_compress reads format {FORMAT}. Upgrade hf_compress."
            )
        return _read(cls, {k: v for k, v in data.items() if k not in ("format", "ratios")}, "report")

    def save(self, path: str | os.PathLike) -> None:
        """Write `report.json` into a folder (or to a file whose name ends in `.json`), whole or not at all.

        Raises:
            CompressionError: it cannot be written; a report that was there before stays whole.
        """
        target = _file(path, "save")
        replace_files(target.parent, {target.name: (json.dumps(self.to_dict(), indent=1) + "\n").encode()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Report:
        """The report that `save` wrote into a folder, or that a file holds.

        Raises:
            CompressionError: there is none, it is truncated or something else, or holds a value of a wrong type or that cannot
                be (a metric may be nan: that of a training that diverged).
        """
        target = _file(path, "load")
        try:
            return cls.from_dict(json.loads(target.read_text(encoding="utf-8")))
        except CompressionError as error:
            raise CompressionError(f"{target}: {error}") from None
        except OSError as error:
            raise CompressionError(
                f"No report to read at {target}: {error.strerror}. measure(...).save(folder) writes one."
            ) from error
        except (ValueError, RecursionError) as error:
            raise CompressionError(f"{target} is not a whole report ({error}); save it again.") from error

    def __str__(self) -> str:
        a, b = self.model, self.against
        rows: list[tuple[str, ...]] = [("", "model", "against" if b else "", "change" if b else "")]
        for key, name in COUNTS.items():
            change = f"{self.ratios[key]:.3f}x" if key in self.ratios else ""
            values = ["" if cost is None or getattr(cost, key) is None else f"{getattr(cost, key):,}" for cost in (a, b)]
            if any(values):  # few models have weights that are held at zero
                rows.append((name, *values, change))
        rows.append(("latency", str(a.latency), str(b.latency) if b else "", ""))
        for name, value in a.metrics.items():  # a ratio of correlations, or of losses, means nothing
            other = b.metrics.get(name) if b else None
            rows.append((name, f"{value:.4f}", *(("", "") if other is None else (f"{other:.4f}", f"{value - other:+.4f}"))))
        lines = _table(rows)
        if self.speedup is not None and self.speedup_interval is not None:
            low, high = self.speedup_interval
            line = f"speed-up {self.speedup:.2f}x (95% interval {low:.2f}-{high:.2f})"
            if self.speedup_allowed is not None:
                line += f"; Amdahl's law allows {self.speedup_allowed:.2f}x"
            lines.append(line)
        if self.timings:
            lines += _table(_timing_rows(self.timings))
        shown = {k: v for k, v in self.conditions.items() if k not in ("shapes", "platform")}
        shapes = (f"{k} {'x'.join(map(str, v))}" for k, v in self.conditions.get("shapes", {}).items())
        lines.append("; ".join([*(f"{k} {v}" for k, v in shown.items()), *filter(None, [", ".join(shapes)])]))
        return "\n".join(lines)


COUNTS = {
    "parameters": "parameters",
    "parameters_encoder": "  encoder only",
    "nonzero": "  not zero",
    "bytes": "bytes on disk",
    "macs": "MACs",
}


def _timing_rows(timings: tuple[Timing, ...]) -> list[tuple[str, ...]]:
    beside = any(t.against for t in timings)
    rows: list[tuple[str, ...]] = [("latency at batch", "model", "against" if beside else "", "speed-up" if beside else "")]
    for t in timings:
        speed = "" if t.speedup is None else f"{t.speedup:.2f}x"
        if t.speedup_interval is not None:
            speed += f" ({t.speedup_interval[0]:.2f}-{t.speedup_interval[1]:.2f})"
        size = f"  {t.batch}" + ("" if t.length is None else f" x {t.length}")
        rows.append((size, str(t.model), "" if t.against is None else str(t.against), speed))
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (f"{r[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(r[1:], widths[1:], strict=True))).rstrip()
        for r in rows
    ]


def _file(path: Any, verb: str) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise CompressionError(f"Report.{verb} takes the path of a folder or a .json file, got {path!r}.")
    path = Path(path)
    return path if path.suffix == ".json" and not path.is_dir() else path / REPORT_FILE


def _read(kind: Any, data: Any, where: str) -> Any:
    """A value of this type from JSON, or a refusal that names the place."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if data is None else _read(next(a for a in arguments if a is not type(None)), data, where)
    if is_dataclass(kind):
        if not isinstance(data, Mapping):
            raise CompressionError(f"{where} must be a dict, got {str(data)[:80]!r}.")
        hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
        needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        if not needed <= data.keys() <= known.keys():
            raise CompressionError(f"{where} takes {', '.join(known)}; got {', '.join(map(str, data)) or 'nothing'}.")
        return kind(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in data.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds = arguments[:1] * len(data) if arguments[-1] is Ellipsis and isinstance(data, list) else arguments
        if not isinstance(data, list | tuple) or len(data) != len(kinds):
            raise CompressionError(f"{where} must be a list of {len(kinds)}, got {str(data)[:80]!r}.")
        return tuple(_read(k, value, f"{where}[{i}]") for i, (k, value) in enumerate(zip(kinds, data, strict=True)))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise CompressionError(f"{where} must be a dict, got {str(data)[:80]!r}.")
        return {k: v if arguments[1] is Any else _number(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    value = _number(kind, data, where)
    if not 0 <= value < LARGEST:
        raise CompressionError(f"{where} must be a number from 0 to {LARGEST:.0e}, got {str(data)[:80]!r}.")
    return value


def _number(kind: type, data: Any, where: str) -> Any:
    if type(data) is not kind and not (kind is float and type(data) is int and abs(data) < LARGEST):
        raise CompressionError(f"{where} must be a {'whole ' * (kind is int)}number, got {str(data)[:80]!r}.")
    return kind(data)
