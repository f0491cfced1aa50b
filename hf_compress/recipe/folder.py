"""The folder that a recipe runs in: used by one run at a time, without leftovers, and whole, or what is damaged in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..edits import CompressionError

STEP_FILE, RUN_FILE, LOCK_FILE = "step.json", "run.json", "run.lock"


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Refuse a second run in a folder: each would remove what the other is making."""
    with open(output / "steps" / LOCK_FILE, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except ImportError:  # not on Windows
            pass
        except OSError:
            raise CompressionError(f"Another run is at work in {output}; wait for it, or name another output.") from None
        yield


def clear(output: Path, steps: Iterable[str]) -> None:
    """Remove what a killed process left half made: drafts, and steps begun (`.NN-name`) that are none of `steps`."""
    names = {f".{name}" for name in steps}
    left = [*output.glob(".hf_compress_*"), *(output / "steps").glob("*.part"), *(output / "steps").glob(".hf_compress_*")]
    left += [path for path in (output / "steps").glob(".[0-9][0-9]-*") if path.name not in names]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sizes_of(folder: Path) -> dict[str, int]:
    """The files of a folder, without `step.json`, and their sizes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / STEP_FILE)
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def damage(folder: Path, known: Mapping[str, Any]) -> str | None:
    """What is wrong with the folder of a finished step, or None.

    Args:
        folder (`Path`): of the step.
        known (`dict`): what its `step.json` says.
    """
    if not all(isinstance(known.get(name), dict) for name in ("plan", "metrics", "files")):
        return f"{STEP_FILE} is not what a run writes"
    there = sizes_of(folder)
    for name, size in known["files"].items():
        if there.get(name) != size:
            return f"{name} is missing" if name not in there else f"{name} has {there[name]:,} bytes, and had {size:,}"
    return damage_of_model(folder)


def damage_of_model(folder: Path) -> str | None:
    """What is wrong with a saved model, as far as its config and the headers of its weights tell; or None."""
    if not read_json(folder / "config.json"):
        return "config.json is missing or no JSON"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is truncated or damaged ({error})"
    return None


def files_of(names: Iterable[str], folder: Path) -> list[str]:
    """Files that an earlier run left, none outside the folder."""
    return [
        name for name in names if (folder / name).is_file() and not Path(name).is_absolute() and ".." not in Path(name).parts
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A file's dict; an empty one where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(values, indent=1))
    os.replace(draft, path)
