"""The data of a recipe: opened with `datasets`, its columns found, its splits named."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..discover import nearest
from .reading import Source
from .rows import digest_of, load_rows

HELD_OUT = 0.1  # of the training rows, where there is no other split to measure or tune on


@dataclass(frozen=True)
class DataOptions:
    """What a recipe says about its data.

    Args:
        path (`str`, *optional*): a Hub id, a folder, or a file of training rows.
        config (`str`, *optional*): which configuration of a Hub data set.
        revision (`str`, *optional*): of a Hub data set.
        train, validation, test (`str`, *optional*): files; with a Hub id in `path`, names of splits.
        columns (`list[str]`, *optional*): names of the columns, for CSV and TSV files without a header.
        text, text_pair, label, tokens, image, audio (`str`, *optional*): which columns hold what. `label` may be a list of
            columns of 0 and 1: several labels a row. So are lists in one column: names or numbers of the labels that a row has,
            or 1 and 0 for every label (`[0.0, 1.0, 1.0]`).
        labels (`list[str]`, *optional*): names of the classes, in order, where the data holds numbers or places.
        max_length (`int`, *optional*): tokens a text is cut to; of a causal LM, tokens a block has. 128 if left out, or as many
            as the model reads.
        max_seconds (`float`, *optional*): sounds are cut to this length.
        max_train_samples, max_eval_samples (`int`, *optional*): use this many rows, drawn by the seed.
    """

    path: str | None = None
    config: str | None = None
    revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: list[str] | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | list[str] | None = None
    tokens: str | None = None
    image: str | None = None
    audio: str | None = None
    labels: list[str] | None = None
    max_length: int | None = None
    max_seconds: float | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass
class Data:
    """Opened data.

    Attributes:
        splits (`dict`): `datasets.Dataset` of `train`, `measured` and, where thresholds are tuned, `validation`: the rows that
            they are tuned on, which are never those that are measured.
        columns (`dict`): the column, by what it holds.
        measured (`str`): the name of the split that is measured.
        folders (`dict`): what relative paths of images and sounds begin at, by split.
        digest (`str`): of the files and what they name, or of the Hub id; and of how rows were held out.
        notes (`list[str]`): what was assumed or left out, in whole sentences.
        tuned (`str`): the name of the split that thresholds are tuned on; empty where there is none.
    """

    splits: dict[str, Any]
    columns: dict[str, Any]
    measured: str
    folders: dict[str, str]
    digest: str
    notes: list[str] = field(default_factory=list)
    tuned: str = ""
    every: Any = None  # all training rows, of which `train` may be some

    def name(self, split: str) -> str:
        """What people call the rows of one of `splits`."""
        return {"measured": self.measured, "validation": self.tuned}.get(split, split)


def open_data(
    options: DataOptions, roles: dict[str, tuple[str, ...]], source: Source, seed: int, *, tunes: bool = False
) -> Data:
    """Open the data of a recipe, find its columns, and give it its splits.

    What is measured is the test split, else the validation split, else a tenth of the training rows. Where a step tunes
    thresholds (`tunes`), it does so on the validation split if that is not measured, else on another tenth.

    Args:
        options (`DataOptions`): what the recipe says.
        roles (`dict`): what the task needs, by the usual names of the columns: `{"text": ("text", "sentence")}`. A role whose
            name ends in `?` may be missing.
        source (`Source`): the recipe, for its lines.
        seed (`int`): draws the rows, where only some are wanted.
        tunes (`bool`, defaults to `False`): whether a step tunes thresholds on rows.

    Raises:
        RecipeError: nothing there, not readable, no such split, column, image or sound, empty, a word that would do nothing.
    """
    found, folders, digest = load_rows(options, roles, source)
    if "train" not in found:
        raise source.error(("data",), f"the data has no training rows; it has the splits {', '.join(found) or 'none'}.")
    columns: dict[str, Any] = {}
    for role, usual in roles.items():
        column = _column(role, usual, options, found["train"], source)
        if column is not None:
            columns[role.rstrip("?")] = column
    notes: list[str] = []
    labelled = [c for role, c in columns.items() if role == "label"]
    for name in [n for n in ("validation", "test") if n in found]:
        missing = [c for c in _flat(columns.values()) if c not in found[name].column_names]
        if missing and set(missing) <= set(_flat(labelled)) or _unlabelled(found[name], labelled):
            notes.append(f"The {name} split has no labels and is not used.")
            del found[name]
        elif missing:
            raise source.error(
                ("data", name) if getattr(options, name) else ("data",),
                f"the {name} split has no column {missing[0]!r}; it has {', '.join(found[name].column_names)}.",
            )
    for name, rows in found.items():
        if not len(rows):
            raise source.error(("data",), f"the {name} split has no rows.")
        for role, column in columns.items():
            for part in _flat([column]):
                empty = rows.data.column(part).null_count
                if empty:
                    raise source.error(
                        ("data", role) if getattr(options, role, None) else ("data",),
                        f"{empty:,} of {len(rows):,} {name} rows have nothing in the column {part!r}; remove or fill them.",
                    )
    folders = {name: folders.get(name, "") for name in ("train", "validation", "test")}
    named = _files_named(found, columns, folders, options, source)
    if named:
        digest = hashlib.sha256(f"{digest} {digest_of(named)}".encode()).hexdigest()
    return _splits(Data(found, columns, "", folders, digest, notes), options, seed, tunes, source)


def _splits(data: Data, options: DataOptions, seed: int, tunes: bool, source: Source) -> Data:
    """`train`, `measured` and, where thresholds are tuned, `validation`; a tenth of the training rows where one is missing."""
    found, folders = dict(data.splits), dict(data.folders)
    if tunes and "test" in found and options.validation is not None and options.validation == options.test:
        data.notes.append("The validation and the test rows are the same: they are measured, and not tuned on.")
        del found["validation"]
    measured = next((name for name in ("test", "validation") if name in found), "")
    tuned = "validation" if tunes and "validation" in found and measured != "validation" else ""
    if measured == "validation":
        data.notes.append("There is no test split: the validation split is measured.")
    wanted = [what for what, name in (("measured", measured), ("tuned", tuned or not tunes)) if not name]
    if wanted and len(found["train"]) < 10:
        raise source.error(("data",), f"{len(found['train'])} training rows are too few to hold some out for measuring.")
    count: float = HELD_OUT
    for what in wanted:
        more = "more " if isinstance(count, int) else ""
        halves = found["train"].train_test_split(count, seed=0)
        count = len(halves["test"])
        held = f"{count:,} {more}rows ({HELD_OUT:.0%}) were held out of the training rows"
        if what == "measured":
            name = measured = f"train, {HELD_OUT:.0%} held out"
            data.notes.append(f"There is no validation or test split: {held}, and are measured.")
        else:
            name = tuned = f"train, {'another ' if len(wanted) > 1 else ''}{HELD_OUT:.0%} held out"
            data.notes.append(f"To tune thresholds on rows that are not measured, {held}.")
        found |= {"train": halves["train"], name: halves["test"]}
        folders[name] = folders["train"]

    def some(rows: Any, most: int | None) -> Any:
        return rows if most is None or len(rows) <= most else rows.shuffle(seed=seed).select(range(most))

    every = found["train"]
    names = {"train": "train", "measured": measured, **({"validation": tuned} if tuned else {})}
    most = {"train": options.max_train_samples}
    splits = {split: some(found[name], most.get(split, options.max_eval_samples)) for split, name in names.items()}
    places = {split: folders[name] for split, name in names.items()}
    digest = data.digest
    if wanted:
        digest = hashlib.sha256(f"{digest} without {' '.join(wanted)}".encode()).hexdigest()
    return Data(splits, data.columns, measured, places, digest, data.notes, tuned, every)


def _files_named(
    found: dict[str, Any], columns: dict[str, Any], folders: dict[str, str], options: DataOptions, source: Source
) -> list[Path]:
    """The images and sounds that rows name by path: they are data too, and one that is missing would show late."""
    named: set[Path] = set()
    for role in [role for role in ("image", "audio") if role in columns]:
        for split, rows in found.items():
            if getattr(rows.features[columns[role]], "dtype", "") not in ("string", "large_string"):
                continue
            paths = {Path(folders[split]) / name for name in rows.unique(columns[role])}
            missing = sorted(str(path) for path in paths if not os.path.isfile(path))
            if missing:
                raise source.error(
                    ("data", role) if getattr(options, role) else ("data",),
                    f"{len(missing):,} of {len(paths):,} files that the {split} rows name in {columns[role]!r} are not there, "
                    f"{missing[0][:200]!r} first.",
                )
            named |= paths
    return sorted(named)


# --- columns -----------------------------------------------------------------------------------------------------


def _flat(columns: Any) -> list[str]:
    return [name for column in columns for name in (column if isinstance(column, list) else [column])]


def _column(role: str, usual: tuple[str, ...], options: DataOptions, rows: Any, source: Source) -> Any:
    names = rows.column_names
    optional, role = role.endswith("?"), role.rstrip("?")
    given = getattr(options, role)
    if given is None:
        found = next((name for name in usual if name in names), None)
        if found is None and not optional:
            raise source.error(
                ("data",), f"which column holds the {role}? Say {role}: one of {', '.join(names)} (usual: {', '.join(usual)})."
            )
        return None if optional and options.text is not None else found  # a pair by its usual names, or what was named
    for i, name in enumerate(_flat([given])):
        if name not in names:
            key = ("data", role, i) if isinstance(given, list) else ("data", role)
            raise source.error(key, f"there is no column {name!r}{nearest(name, names)} The data has {', '.join(names)}.")
    return given


def _unlabelled(rows: Any, labels: list) -> bool:
    """Hidden labels, as the test splits of GLUE have them: -1 in every row."""
    for column in _flat(labels):
        if column in rows.column_names and len(rows):
            kind = rows.features[column]
            if getattr(kind, "dtype", "").startswith("int") and set(rows.unique(column)) == {-1}:
                return True
    return False
