"""The rows of a recipe, read from where they are: files, a folder, or the Hub."""

from __future__ import annotations

import csv
import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..discover import nearest
from .reading import Key, Source

if TYPE_CHECKING:
    from .data import DataOptions

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
MOST_HASHED = 256 << 20
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aif", ".aiff")


def load_rows(
    options: DataOptions, roles: dict[str, tuple[str, ...]], source: Source
) -> tuple[dict[str, Any], dict[str, str], str]:
    """The splits of a recipe's data by our names, the folders that relative paths in them begin at, and a digest.

    Args:
        options (`DataOptions`): what the recipe says.
        roles (`dict`): what the task reads; see `open_data`.
        source (`Source`): the recipe, for its lines.

    Raises:
        RecipeError: nothing there, not readable, no such split, a word that would do nothing.
    """
    given = {name: getattr(options, name) for name in SPLITS if getattr(options, name) is not None}
    if options.path is None:
        if "train" not in given:
            raise source.error(("data",), "say where the data is: path: (Hub id, folder or file), or train: (a file).")
        files = {name: _existing(value, ("data", name), source) for name, value in given.items()}
        return _read(files, options, source)
    path = locate(options.path, source)
    if path.is_file():
        if "train" in given:
            raise source.error(
                ("data", "train"), "path is a file and names the training rows already; leave one of the two out."
            )
        return _read({"train": path, **{n: _existing(v, ("data", n), source) for n, v in given.items()}}, options, source)
    if not path.is_dir():
        if _is_path(options.path):
            raise source.error(("data", "path"), f"there is no file or folder {options.path!r}.")
        _refuse_words(options, ("columns",), "it names those of CSV and TSV files without a header", source)
        return _from_hub(options, given, source)
    inside = {n: path / v for n, v in given.items() if (path / v).is_file()}
    tables = {n: p for n, p in _tables_in(path).items() if n not in given}
    if inside.keys() == given.keys() and ({**tables, **inside}):
        return _read({**tables, **inside}, options, source)
    _refuse_words(options, ("columns",), "it names those of CSV and TSV files without a header", source)
    return _from_folder(path, options, given, "audio" in roles, source)


def _refuse_words(options: DataOptions, words: tuple[str, ...], why: str, source: Source) -> None:
    for word in words:
        if getattr(options, word) is not None:
            raise source.error(("data", word), f"{word} would do nothing here: {why}. Leave it out.")


def _read(files: dict[str, Path], options: DataOptions, source: Source) -> tuple[dict[str, Any], dict[str, str], str]:
    from datasets import load_dataset

    _refuse_words(options, ("config", "revision"), "it is a word of data sets of the Hub, and these are files", source)
    found, folders = {}, {}
    for name, path in files.items():
        key: Key = ("data", name) if getattr(options, name) else ("data", "path")
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise source.error(key, f"cannot read {path.name!r}; files end in {', '.join(READERS)}.")
        kind, more = reader
        if options.columns is not None and kind != "csv":
            raise source.error(("data", "columns"), f"{path.name!r} names its columns itself; leave columns: out.")
        if kind == "csv":
            _check_fields(path, more, options.columns, key, source)
            more = more if options.columns is None else {**more, "column_names": options.columns}
        try:
            found[name] = load_dataset(kind, data_files={name: [os.fspath(path)]}, split=name, **more)
        except Exception as error:  # a parser fails in its own ways
            if "corresponds to no data" in str(error):
                raise source.error(key, f"{os.fspath(path)!r} has no rows.") from error
            raise source.error(key, f"cannot read {os.fspath(path)!r} as {kind}: {_reason(error)}.") from error
        folders[name] = os.fspath(path.parent.resolve())
    return found, folders, digest_of(files.values())


def _check_fields(path: Path, more: dict[str, Any], columns: list[str] | None, key: Key, source: Source) -> None:
    """Refuse a first row that has other fields than there are names: the parser takes what is left over for row numbers."""
    lines: list[list[str]] = []
    quoting = more.get("quoting", csv.QUOTE_MINIMAL)
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            for line in csv.reader(file, delimiter=more.get("sep", ","), quoting=quoting):
                if len(line) > 1 or "".join(line).strip():
                    lines.append(line)
                if len(lines) == 2:
                    break
    except (OSError, csv.Error):  # the parser that reads all of it says what is wrong
        return
    if columns is not None and lines and lines[0] == columns:
        raise source.error(("data", "columns"), f"{path.name!r} has these names in its first line already; leave columns: out.")
    if columns is not None and lines and len(lines[0]) != len(columns):
        raise source.error(
            ("data", "columns"),
            f"columns has {len(columns)} names and {path.name!r} has {len(lines[0])} fields in a row; name every "
            "field, in order.",
        )
    if columns is None and len(lines) == 2 and len(lines[1]) > len(lines[0]):
        raise source.error(
            key, f"{path.name!r} has {len(lines[0])} names in its first line and {len(lines[1])} fields in the row below it."
        )


def _from_folder(
    path: Path, options: DataOptions, given: dict[str, str], sounds: bool, source: Source
) -> tuple[dict[str, Any], dict[str, str], str]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    card = path / "README.md"
    configs = card.is_file() and "config_name:" in card.read_text(encoding="utf-8", errors="replace")
    words = ("revision",) if configs else ("config", "revision")
    _refuse_words(options, words, "it is a word of data sets of the Hub, and this is a folder", source)
    loaded: Any = _sounds_in(path, given, source) if sounds else None
    try:
        if loaded is not None:
            pass
        elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            loaded = load_from_disk(os.fspath(path))
            loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        else:
            loaded = load_dataset(os.fspath(path.resolve()), options.config)
    except Exception as error:
        raise source.error(
            ("data", "path"), f"no data can be read from the folder {options.path!r}: {_reason(error)}."
        ) from error
    return _named(loaded, given, source), dict.fromkeys(SPLITS, os.fspath(path.resolve())), digest_of([path])


def _sounds_in(folder: Path, given: dict[str, str], source: Source) -> dict[str, Any] | None:
    """Splits of paths and labels from sounds that lie in folders named after their labels; None where there are none such.

    As `datasets` reads such a folder, but without opening the sounds: its decoder is a package of its own.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix.lower() in SOUNDS and p.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    if not files or any(folder.rglob("metadata.*")):
        return None
    other = next((file for file in files if file.suffix.lower() != ".wav"), None)
    if other is not None and find_spec("soundfile") is None:
        raise source.error(
            ("data", "path"), f"{str(other)!r} is no WAV file; reading it needs the package soundfile, which is not installed."
        )
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    names = {*given.values(), *(name for usual in SPLITS.values() for name in usual)}
    split = bool(tops & {given.get("train", ""), *SPLITS["train"]})
    strange = sorted(tops - names) if split and "train" not in given else []
    if strange:
        raise source.error(("data", "path"), f"there are sounds in the folder {strange[0]!r}, which is no name of a split.")
    labelled = all(len(file.parts) > 1 + split for file in files)
    labels = sorted({file.parent.name for file in files})
    loaded = {}
    for top in sorted(tops) if split else ["train"]:
        part = [file for file in files if not split or file.parts[0] == top]
        columns: dict[str, Any] = {"audio": [os.fspath(file) for file in part]}
        features: dict[str, Any] = {"audio": Value("string")}
        if labelled:
            columns["label"] = [labels.index(file.parent.name) for file in part]
            features["label"] = ClassLabel(names=labels)
        loaded[top] = Dataset.from_dict(columns, features=Features(features))
    return loaded


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
