"""What the label column of a recipe's data holds, and how a model takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .data import Data, DataOptions
from .reading import Key, Source

MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Labels:
    """What is to be predicted, and which class is which in the data.

    Args:
        kind (`str`): as in `metrics.Metric.of`.
        names (`tuple[str, ...]`): of the classes, in the model's order.
        scale (`float`, defaults to 1): divides scores of pairs that go beyond 1 (STS-B's go to 5).
        index (`dict`): the model's class, by the word or number that the data has for it.
        hot (`bool`, defaults to `False`): a row of several labels has 1 or 0 for every class, not the names of some.

    Example:

    ```python
    >>> from hf_compress.recipe.labels import Labels
    >>> Labels("classes", ("POSITIVE", "NEGATIVE"), index={"negative": 1, "positive": 0}).encode("negative")
    1
    >>> Labels("labels", ("a", "b", "c"), index={"0": 0, "1": 1, "2": 2}, hot=True).encode([0, 1, 1])
    [0.0, 1.0, 1.0]

    ```
    """

    kind: str
    names: tuple[str, ...] = ()
    scale: float = 1.0
    index: Mapping[str, int] = field(default_factory=dict)
    hot: bool = False

    def encode(self, value: Any) -> Any:
        """A value of the data as a model takes it."""
        if self.kind == "numbers":
            return float(value) / self.scale
        if self.kind == "labels":
            found = [0.0] * len(self.names)
            for place, v in enumerate(value):
                found[self.index[str(place) if self.hot else _word(v)]] = float(v) if self.hot else 1.0
            return found
        return [self.encode(v) for v in value] if isinstance(value, list) else self.index[_word(value)]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_labels(data: Data, options: DataOptions, wanted: str, known: Sequence[str], source: Source) -> Labels:
    """What the label column holds; what was assumed about it is added to `data.notes`.

    Args:
        data (`Data`): opened.
        options (`DataOptions`): its `labels` name the classes.
        wanted (`str`): `"numbers"`, `"scores"` (numbers that a cosine is to meet), `"tags"`, or `"any"` (classes, several
            labels a row, numbers).
        known (`Sequence[str]`): names of the model's own trained head, in its order, which is kept if they are the data's.
        source (`Source`): for lines.

    Raises:
        RecipeError: a column that cannot be that; a value in one split that training has not; nothing to learn.
    """
    column, rows = data.columns["label"], data.splits["train"]
    key: Key = ("data", "label") if options.label is not None else ("data",)
    if isinstance(column, list):
        _refuse_names(options, "the columns of the labels are their names", source)
        rows_of = {name: list(zip(*(part[c] for c in column), strict=True)) for name, part in data.splits.items()}
        return _places(data, rows_of, tuple(column), known, key, source)
    kind = rows.features[column]
    inner = getattr(kind, "feature", None)
    leaf, several = (kind, False) if inner is None else (inner, True)
    dtype = getattr(leaf, "dtype", "")
    if isinstance(leaf, dict) or hasattr(leaf, "feature"):
        raise source.error(key, f"the column {column!r} must hold labels or lists of labels, it holds {kind}.")
    if wanted in ("numbers", "scores") or (wanted == "any" and not several and dtype.startswith(("float", "double"))):
        if several or not dtype.startswith(("int", "float", "uint", "double")):
            raise source.error(key, f"the column {column!r} must hold numbers, it holds {dtype or type(kind).__name__}.")
        _refuse_names(options, f"the column {column!r} holds numbers, not classes", source)
        every = rows.unique(column)
        if len(every) < 2:
            raise source.error(key, f"the training rows all have {every[0]} in {column!r}; there is nothing to learn.")
        most = max(abs(float(v)) for v in every)
        return Labels("numbers", scale=most if most > 1 and wanted == "scores" else 1.0)
    if (wanted == "tags") != several and wanted == "tags":
        raise source.error(key, f"the column {column!r} must hold a list of tags for every row, it holds {dtype}.")
    if several and wanted == "any" and getattr(leaf, "names", None) is None:
        rows_of = {name: list(part[column]) for name, part in data.splits.items()}
        if _is_hot(rows_of, dtype):
            return _of_places(data, rows_of, options, known, key, source)
    return _classes(data, options, "tags" if wanted == "tags" else "labels" if several else "classes", leaf, known, key, source)


def _classes(data: Data, options: DataOptions, kind: str, leaf: Any, known: Sequence[str], key: Key, source: Source) -> Labels:
    """One class a row, or a list of them: as names, as numbers, or as numbers whose names the data holds."""
    column = data.columns["label"]
    several, dtype = kind != "classes", getattr(leaf, "dtype", "")
    values: dict[str, set[str]] = {}
    for split, part in data.splits.items():
        found = set(_each(part, column, several))
        if None in found:
            raise source.error(key, f"a list in {column!r} has a hole in the rows of {data.name(split)!r}; fill or remove it.")
        values[split] = set(map(_word, found))
    if not values["train"]:
        raise source.error(key, f"no training row has a label in {column!r}; there is nothing to learn.")
    names = getattr(leaf, "names", None)
    if names is not None or dtype.startswith(("int", "uint")):
        numbers = [int(v) for part in values.values() for v in part]
        least, most = min(numbers), max(numbers)
        count = MOST_CLASSES if names is None else len(names)
        if least < 0 or most >= count:
            to = "" if names is None else f" to {count - 1}"
            raise source.error(key, f"the column {column!r} must hold classes from 0{to}, it holds {least} to {most}.")
        if names is None and options.labels is None and len(known) <= most:
            absent = sorted(set(range(most + 1)) - set(numbers))
            if len(absent) > len(set(numbers)):
                raise source.error(
                    key,
                    f"the column {column!r} holds {len(set(numbers))} classes numbered up to {most}; they are counted from 0 "
                    "without gaps. Renumber them, or hold names instead of numbers.",
                )
            if absent:
                some = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
                data.notes.append(f"Classes are counted from 0; of {some} there are no rows.")
        if names is None:
            if len(known) > most + 1 and options.labels is None and not _unnamed(known):
                raise source.error(
                    key,
                    f"the column {column!r} holds 0 to {most}, and the model's head has {len(known)} classes "
                    f"({_numbered(known)}); say labels: what the numbers mean.",
                )
            ours = known if len(known) > most else [str(i) for i in range(most + 1)]
            if options.labels is None and ours is known and not _unnamed(known):
                data.notes.append(f"The labels are numbers, taken for the classes of the model's head: {_numbered(known)}.")
            names = list(options.labels or ours)
            if len(names) <= most:
                raise source.error(("data", "labels"), f"{len(names)} names for {most + 1} classes (0 to {most}).")
        elif options.labels is not None and len(options.labels) != len(names):
            raise source.error(
                ("data", "labels"), f"{len(options.labels)} names for {len(names)} classes ({', '.join(names)})."
            )
        words, names = [str(i) for i in range(len(names))], list(options.labels or names)
    elif dtype == "bool":
        words = ["false", "true"]
        names = list(options.labels or words)
        if len(names) != 2:
            raise source.error(("data", "labels"), f"{len(names)} names for 2 classes (false, true).")
    else:
        ours = {word for split, part in values.items() if data.name(split).startswith("train") for word in part}  # held out too
        ours |= set(map(_word, _each(data.every, column, several)))
        words = names = list(options.labels or sorted(ours))
        if len(names) > MOST_CLASSES:
            raise source.error(key, f"{len(names):,} different values in {column!r} are no classes.")
        for split, part in values.items():
            strange = sorted(part - set(names))
            if strange:
                raise source.error(
                    ("data", "labels") if options.labels else key,
                    f"the rows of {data.name(split)!r} have the label {strange[0]!r}, which is not among "
                    f"{', '.join(names[:12])}.",
                )
    if kind == "labels" and len({frozenset(map(_word, row)) for row in data.splits["train"][column]}) < 2:
        hint = " If they are 1 or 0 for every label, write 1.0 and 0.0." if max(values["train"]) == "1" else ""
        raise source.error(key, f"the training rows all have the same labels in {column!r}; there is nothing to learn.{hint}")
    if kind != "labels" and len(values["train"]) < 2:
        alone = min(values["train"])
        raise source.error(key, f"the training rows hold one class alone in {column!r} ({alone}); there is nothing to learn.")
    if options.labels is not None:
        unused = [name for word, name in zip(words, names, strict=True) if all(word not in part for part in values.values())]
        if unused:
            data.notes.append(
                f"{len(names)} classes are named and the rows hold {len(names) - len(unused)}: no row has "
                f"{', '.join(unused[:12])}."
            )
    names, places = _as_head([str(name) for name in names], known, data)
    return Labels(kind, names, index=dict(zip(words, places, strict=True)))


# --- several labels a row, a number for each ---------------------------------------------------------------------


def _is_hot(rows_of: Mapping[str, Sequence[Sequence[Any]]], dtype: str) -> bool:
    """Whether lists hold a number for every class, such as [0, 1, 1], and not the numbers of the classes that a row has.

    Fractions and truth values always do. Whole numbers do if all lists have one length, hold 0 and 1 alone, and one of them
    repeats a value, which a set of classes never does.
    """
    if dtype.startswith(("float", "double", "bool")):
        return True
    if not dtype.startswith(("int", "uint")):
        return False
    rows = [row for part in rows_of.values() for row in part]
    width = len(rows[0])
    if width < 2 or any(len(row) != width or not set(row) <= {0, 1} for row in rows):
        return False
    return any(len(set(row)) < width for row in rows)


def _of_places(
    data: Data,
    rows_of: Mapping[str, Sequence[Sequence[Any]]],
    options: DataOptions,
    known: Sequence[str],
    key: Key,
    source: Source,
) -> Labels:
    width = len(rows_of["train"][0])
    ours = list(known) if len(known) == width else [str(i) for i in range(width)]
    if options.labels is None and not _unnamed(ours):
        data.notes.append(f"The labels have places, taken for the classes of the model's head: {_numbered(ours)}.")
    names = options.labels or ours
    if len(names) != width:
        raise source.error(("data", "labels"), f"{len(names)} names for the {width} numbers of each row.")
    return _places(data, rows_of, tuple(map(str, names)), known, key, source)


def _places(
    data: Data,
    rows_of: Mapping[str, Sequence[Sequence[Any]]],
    names: tuple[str, ...],
    known: Sequence[str],
    key: Key,
    source: Source,
) -> Labels:
    """Labels of rows that hold 1 or 0 for each name."""
    column = data.columns["label"]
    for split, rows in rows_of.items():
        for row in rows:
            if len(row) != len(names):
                raise source.error(
                    key,
                    f"a row of {data.name(split)!r} has {len(row)} numbers in {column!r}, not {len(names)}; each row "
                    "needs one number for every label, 0 or 1.",
                )
            strange = [v for v in row if v not in (0, 1)]
            if strange:
                raise source.error(
                    key, f"labels in {column!r} are 0 or 1 each; a row of {data.name(split)!r} has {strange[0]!r}."
                )
    if len(set(map(tuple, rows_of["train"]))) < 2:
        raise source.error(key, f"the training rows all have the same labels in {column!r}; there is nothing to learn.")
    names, places = _as_head(names, known, data)
    return Labels("labels", names, index={str(i): place for i, place in enumerate(places)}, hot=True)


# --- names -------------------------------------------------------------------------------------------------------


def _as_head(names: Sequence[str], known: Sequence[str], data: Data) -> tuple[tuple[str, ...], list[int]]:
    """The names as the model's trained head has them, if it has the same, and the place of each of ours among them."""
    if len(known) == len(names) and _unnamed(known) and not _unnamed(names):
        data.notes.append(
            f"The model's head calls its classes {known[0]} to {known[-1]}. They are taken to be, in this order: "
            f"{_numbered(names)}."
        )
    for same in (str, str.casefold):
        ours, theirs = [same(name) for name in names], [same(name) for name in known]
        if len(set(ours)) == len(ours) and sorted(ours) == sorted(theirs):
            return tuple(known), [theirs.index(name) for name in ours]
    return tuple(names), list(range(len(names)))


def _unnamed(names: Iterable[str]) -> bool:
    """Whether names say nothing: `LABEL_0`, `1`."""
    return all(re.fullmatch(r"LABEL_\d+|\d+", str(name)) for name in names)


def _numbered(names: Sequence[str]) -> str:
    few = ", ".join(f"{i}: {name}" for i, name in enumerate(names[:12]))
    return few if len(names) <= 12 else f"{few}, and so on up to {len(names) - 1}: {names[-1]}"


def _refuse_names(options: DataOptions, why: str, source: Source) -> None:
    if options.labels is not None:
        raise source.error(("data", "labels"), f"labels would do nothing here: {why}. Leave it out.")


def _each(rows: Any, column: str, several: bool) -> Iterator[Any]:
    for value in rows.unique(column) if not several else rows[column]:
        yield from value if several else [value]
