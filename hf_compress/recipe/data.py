"""The data of a recipe: opened with `datasets`, its columns found, its splits named."""

from __future__ import annotations

import csv
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..discover import nearest
from .reading import Source

SPLITS = {  # our name -> what others call it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val", "validation_matched"),
    "test": ("test", "testing", "eval"),
}
WORDS_AS_THEY_ARE: dict[str, Any] = {
    "keep_default_na": False,
    "na_values": [""],
}  # "None" and "NA" are words; nothing is nothing
# the builder of `datasets` that reads files of an ending, and what it must be told. In TSV a quote is an ordinary character:
# that is how GLUE's files and most others are written, and a stray one would otherwise swallow rows
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", WORDS_AS_THEY_ARE),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, **WORDS_AS_THEY_ARE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
HELD_OUT = 0.1  # of the training rows, where there is no other split to measure or tune on
MOST_HASHED = 256 << 20


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
            columns: several labels a row.
        labels (`list[str]`, *optional*): names of the classes, in order, where the data holds numbers.
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
        splits (`dict`): `datasets.Dataset` of `train`, `validation` and `measured`.
        columns (`dict`): the column, by what it holds.
        measured (`str`): the name of the split that is measured.
        folders (`dict`): what relative paths of images and sounds begin at, by split.
        digest (`str`): of the files, or of the Hub id.
    """

    splits: dict[str, Any]
    columns: dict[str, Any]
    measured: str
    folders: dict[str, str]
    digest: str
    notes: list[str] = field(default_factory=list)


def open_data(options: DataOptions, roles: dict[str, tuple[str, ...]], source: Source, seed: int) -> Data:
    """Open the data of a recipe, find its columns, and give it its splits.

    Args:
        options (`DataOptions`): what the recipe says.
        roles (`dict`): what the task needs, by the usual names of the columns: `{"text": ("text", "sentence")}`. A role whose
            name ends in `?` may be missing.
        source (`Source`): the recipe, for its lines.
        seed (`int`): draws the rows, where only some are wanted.

    Raises:
        RecipeError: nothing there, not readable, no such split or column, empty.
    """
    found, folders, digest = _load(options, source)
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
    return _splits(found, columns, folders, digest, notes, options, seed, source)


def _splits(
    found: dict[str, Any],
    columns: dict,
    folders: dict,
    digest: str,
    notes: list,
    options: DataOptions,
    seed: int,
    source: Source,
) -> Data:
    """`train`, `validation` (thresholds are tuned on it) and `measured`; a tenth of the training rows where one is missing."""
    measured = next((name for name in ("test", "validation") if name in found), None)
    if measured is None or "validation" not in found:
        if len(found["train"]) < 10:
            raise source.error(("data",), f"{len(found['train'])} training rows are too few to hold some out for measuring.")
        halves = found["train"].train_test_split(HELD_OUT, seed=0)
        held = f"{len(halves['test']):,} rows ({HELD_OUT:.0%}) were held out of the training rows"
        if measured is None:
            notes.append(f"There is no validation or test split: {held}, and are measured.")
            measured = f"train, {HELD_OUT:.0%} held out"
            found = {"train": halves["train"], "validation": halves["test"], measured: halves["test"]}
            folders[measured] = folders["validation"] = folders["train"]
        else:
            notes.append(f"There is no validation split: {held} to tune on.")
            found = {**found, "train": halves["train"], "validation": halves["test"]}
            folders["validation"] = folders["train"]
    elif measured == "validation":
        notes.append("There is no test split: the validation split is measured.")

    def some(rows: Any, most: int | None) -> Any:
        return rows if most is None or len(rows) <= most else rows.shuffle(seed=seed).select(range(most))

    splits = {
        "train": some(found["train"], options.max_train_samples),
        "validation": some(found["validation"], options.max_eval_samples),
        "measured": some(found[measured], options.max_eval_samples),
    }
    places = {"train": folders["train"], "validation": folders["validation"], "measured": folders[measured]}
    return Data(splits, columns, measured, places, digest, notes)


# --- opening -----------------------------------------------------------------------------------------------------


def _load(options: DataOptions, source: Source) -> tuple[dict[str, Any], dict[str, str], str]:
    given = {name: getattr(options, name) for name in SPLITS if getattr(options, name) is not None}
    if options.path is None:
        if "train" not in given:
            raise source.error(("data",), "say where the data is: path: (Hub id, folder or file), or train: (a file).")
        files = {name: _existing(value, ("data", name), source) for name, value in given.items()}
        return _read(files, options, source)
    path = locate(options.path, source)
    if path.is_file():
        return _read({"train": path, **{n: _existing(v, ("data", n), source) for n, v in given.items()}}, options, source)
    if not path.is_dir():
        if _is_path(options.path):
            raise source.error(("data", "path"), f"there is no file or folder {options.path!r}.")
        return _from_hub(options, given, source)
    inside = {n: path / v for n, v in given.items() if (path / v).is_file()}
    tables = {n: p for n, p in _tables_in(path).items() if n not in given}
    if inside.keys() == given.keys() and ({**tables, **inside}):
        return _read({**tables, **inside}, options, source)
    return _from_folder(path, options, given, source)


def _read(files: dict[str, Path], options: DataOptions, source: Source) -> tuple[dict[str, Any], dict[str, str], str]:
    from datasets import load_dataset

    found, folders = {}, {}
    for name, path in files.items():
        key = ("data", name) if getattr(options, name) else ("data", "path")
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise source.error(key, f"cannot read {path.name!r}; files end in {', '.join(READERS)}.")
        kind, more = reader
        if options.columns is not None:
            if kind != "csv":
                raise source.error(("data", "columns"), f"{path.name!r} names its columns itself; leave columns: out.")
            more = {**more, "column_names": options.columns}
        try:
            found[name] = load_dataset(kind, data_files={name: [os.fspath(path)]}, split=name, **more)
        except Exception as error:  # a parser fails in its own ways
            if "corresponds to no data" in str(error):
                raise source.error(key, f"{os.fspath(path)!r} has no rows.") from error
            raise source.error(key, f"cannot read {os.fspath(path)!r} as {kind}: {_reason(error)}.") from error
        folders[name] = os.fspath(path.parent.resolve())
    return found, folders, digest_of(files.values())


def _from_folder(
    path: Path, options: DataOptions, given: dict[str, str], source: Source
) -> tuple[dict[str, Any], dict[str, str], str]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            loaded: Any = load_from_disk(os.fspath(path))
            loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        else:
            loaded = load_dataset(os.fspath(path.resolve()), options.config)
    except Exception as error:
        raise source.error(
            ("data", "path"), f"no data can be read from the folder {options.path!r}: {_reason(error)}."
        ) from error
    return _named(loaded, given, source), dict.fromkeys(SPLITS, os.fspath(path.resolve())), digest_of([path])


def _from_hub(options: DataOptions, given: dict[str, str], source: Source) -> tuple[dict[str, Any], dict[str, str], str]:
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(options.path, options.config, revision=options.revision)  # type: ignore[arg-type]
    except Exception as error:
        key = ("data", "config") if options.config and "onfig" in str(error) else ("data", "path")
        raise source.error(
            key, f"the data set {options.path!r} is no folder here and cannot be had from the Hub: {_reason(error)}."
        ) from error
    first = next(iter(loaded.values()))
    digest = f"{options.path} {options.config} {options.revision} {getattr(first, '_fingerprint', '')}"
    return _named(loaded, given, source), {}, hashlib.sha256(digest.encode()).hexdigest()


def _named(loaded: Any, given: dict[str, str], source: Source) -> dict[str, Any]:
    """The splits that a recipe names, or those with usual names."""
    found = {}
    for name, usual in SPLITS.items():
        if name in given:
            if given[name] not in loaded:
                raise source.error(
                    ("data", name),
                    f"there is no split {given[name]!r}{nearest(given[name], list(loaded))} There are {', '.join(loaded)}.",
                )
            found[name] = loaded[given[name]]
        else:
            there = next((u for u in usual if u in loaded), None)
            if there is not None:
                found[name] = loaded[there]
    return found


def _tables_in(folder: Path) -> dict[str, Path]:
    """Files such as train.tsv and dev.tsv, by our names of the splits."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in READERS and path.is_file():
            name = next((name for name, usual in SPLITS.items() if path.stem.lower() in usual), None)
            if name is not None:
                found.setdefault(name, path)
    return found if "train" in found else {}


def locate(text: str, source: Source) -> Path:
    """A path of a recipe: as it is from the working directory, else beside the recipe."""
    path = Path(text).expanduser()
    beside = source.folder / path if source.folder is not None else path
    return beside if not path.exists() and beside.exists() else path


def _is_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or Path(text).suffix.lower() in READERS


def _existing(text: str, key: tuple, source: Source) -> Path:
    path = locate(text, source)
    if not path.is_file():
        raise source.error(key, f"there is no file {text!r} (looked in {Path.cwd()} and beside the recipe).")
    return path


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].rstrip('.') if lines else 'no reason given'}"[:300]


def digest_of(paths: Any) -> str:
    """sha256 of files: their contents, up to a size where that takes seconds; their names, sizes and times of change beyond."""
    digest, left = hashlib.sha256(), MOST_HASHED
    for root in sorted(map(Path, paths)):
        for path in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root.parent)} {size}".encode())
            if size <= left:
                left -= size
                digest.update(path.read_bytes())
            else:
                digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


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
        return None if optional else found
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
