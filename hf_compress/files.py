"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .edits import CompressionError


def replace_files(folder: str | os.PathLike, files: Mapping[str, bytes], remove: Iterable[str] = ()) -> None:
    """Write files into a folder so that a failure leaves what was there before."""
    with staged(folder, remove) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)


@contextmanager
def staged(folder: str | os.PathLike, remove: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder beside the files of `folder`; what is written there replaces them when all of it is on disk.

    Each file moves by a rename on the same file system, so no reader sees half of one. `remove` names files of
    `folder` that go when the new ones are in.
    """
    folder = Path(folder)
    stage: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".hf_compress_", dir=folder))
        yield stage
        for path in sorted(p for p in stage.rglob("*") if p.is_file()):
            with path.open("rb") as written:
                os.fsync(written.fileno())
        _move_in(stage, folder, set(remove))
    except OSError as error:
        raise CompressionError(
            f"Could not write into {folder}: {error.strerror or error}. What was there before is untouched; "
            "free some space or choose a folder that can be written."
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _move_in(stage: Path, folder: Path, remove: set[str]) -> None:
    """Rename the staged files into place; if one cannot be, put back those that were."""
    names = sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file())
    kept = Path(tempfile.mkdtemp(prefix=".hf_compress_", dir=folder))
    done: list[str] = []
    try:
        for name in [*names, *(remove - set(names))]:
            done.append(name)
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                os.replace(folder / name, kept / name)
            if name in names:
                os.replace(stage / name, folder / name)
    except BaseException:
        for name in done:
            (folder / name).unlink(missing_ok=True)
            if (kept / name).exists():
                os.replace(kept / name, folder / name)
        raise
    finally:
        shutil.rmtree(kept, ignore_errors=True)
