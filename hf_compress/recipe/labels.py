"""What the label column of a recipe's data holds, and how a model takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .data import Data, DataOptions
from .reading import Source


@dataclass(frozen=True)
class Labels:
    """What is to be predicted: `kind` as in `metrics.Metric.of`, and the names of classes.

    `scale` divides scores of pairs that go beyond 1 (STS-B's go to 5).
    """

    kind: str
    names: tuple[str, ...] = ()
    scale: float = 1.0
    numbered: bool = True  # the data holds indices, not names

    def encode(self, value: Any) -> Any:
        """A value of the data as a model takes it."""
        if self.kind == "numbers":
            return float(value) / self.scale
        if self.kind == "labels":
            on = {v if self.numbered else self.names.index(str(v)) for v in value}
            return [float(i in on) for i in range(len(self.names))]
        if isinstance(value, list):
            return [self.encode(v) for v in value]
        return int(value) if self.numbered else self.names.index(_word(value))


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_labels(data: Data, options: DataOptions, wanted: str, known: Sequence[str], source: Source) -> Labels:
    """What the label column holds.

    Args:
        data (`Data`): opened.
        options (`DataOptions`): its `labels` name the classes.
        wanted (`str`): `"numbers"`, `"tags"`, or `"any"` (classes, several labels a row, numbers).
        known (`Sequence[str]`): names that the model's own trained head has: their order is kept if they fit.
        source (`Source`): for lines.

    Raises:
        RecipeError: a column that cannot be that; a value in one split that training has not.
    """
    column, rows = data.columns["label"], data.splits["train"]
    key = ("data", "label") if options.label is not None else ("data",)
    if isinstance(column, list):
        return Labels("labels", tuple(column))
    kind = rows.features[column]
    inner = getattr(kind, "feature", None)
    leaf, several = (kind, False) if inner is None else (inner, True)
    dtype = getattr(leaf, "dtype", "")
    if wanted == "numbers" or (wanted == "any" and not several and dtype.startswith(("float", "double"))):
        if several or not dtype.startswith(("int", "float", "uint", "double")):
            raise source.error(key, f"the column {column!r} must hold numbers, it holds {dtype or type(kind).__name__}.")
        most = max(abs(float(v)) for v in rows.unique(column))
        return Labels("numbers", scale=most if most > 1 and wanted == "numbers" else 1.0)
    if (wanted == "tags") != several and wanted == "tags":
        raise source.error(key, f"the column {column!r} must hold a list of tags for every row, it holds {dtype}.")
    kind_of = "tags" if wanted == "tags" else "labels" if several else "classes"
    names = getattr(leaf, "names", None)
    values = {split: set(_each(part, column, several)) for split, part in data.splits.items()}
    if names is None and dtype.startswith(("int", "uint")):
        least, most = min(map(min, values.values())), max(map(max, values.values()))
        if least < 0 or most > 10_000:
            raise source.error(key, f"the column {column!r} must hold classes from 0, it holds {least} to {most}.")
        names = list(options.labels or (known if len(known) > most else [str(i) for i in range(most + 1)]))
        if len(names) <= most:
            raise source.error(("data", "labels"), f"{len(names)} names for {most + 1} classes (0 to {most}).")
    elif names is None:
        words = {split: {_word(v) for v in part} for split, part in values.items()}
        names = list(options.labels or sorted(words["train"]))
        if set(names) == set(known):
            names = list(known)
        if len(names) > 10_000:
            raise source.error(key, f"{len(names):,} different values in {column!r} are no classes.")
        for split, part in words.items():
            strange = sorted(part - set(names))
            if strange:
                raise source.error(
                    ("data", "labels") if options.labels else key,
                    f"the {split} rows have the label {strange[0]!r}, which is not among {', '.join(names[:12])}.",
                )
        return Labels(kind_of, tuple(names), numbered=False)
    elif options.labels is not None and len(options.labels) != len(names):
        raise source.error(("data", "labels"), f"{len(options.labels)} names for {len(names)} classes ({', '.join(names)}).")
    names = list(options.labels or names)
    if kind_of == "classes" and len(names) < 2:
        raise source.error(key, f"the column {column!r} holds one class alone; there is nothing to learn.")
    return Labels(kind_of, tuple(map(str, names)))


def _each(rows: Any, column: str, several: bool) -> Iterator[Any]:
    for value in rows.unique(column) if not several else rows[column]:
        yield from value if several else [value]
