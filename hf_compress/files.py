"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .edits import CompressionError

STAGED, KEPT, NEW = ".hf_compress_", ".hf_compress_kept_", ".hfc_new_"


def replace_files(folder: str | os.PathLike, files: Mapping[str, bytes], remove: Iterable[str] = ()) -> None:
    """Write files into a folder so that a failure leaves what was there before."""
    with staged(folder, remove) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)


@contextmanager
def staged(folder: str | os.PathLike, remove: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder beside the files of `folder`; what is written there replaces them when all of it is on disk.

    Each file moves by a rename on the same file system, so no reader sees half of one. `remove` names files of
    `folder` that go when the new ones are in. What a save that was killed has left there goes too.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            stage = _scratch(folder, STAGED, stack)
            yield stage
            for path in sorted(p for p in stage.rglob("*") if p.is_file()):
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            _move_in(stage, folder, set(remove), _scratch(folder, KEPT, stack))
        except OSError as error:
            raise CompressionError(
                f"Could not write into {folder}: {error.strerror or error}. What was there before is untouched; "
                "free some space or choose a folder that can be written."
            ) from error


def _scratch(folder: Path, prefix: str, stack: ExitStack) -> Path:
    """A temporary folder that is locked, and so told from one that was left, until the stack ends."""
    new = Path(tempfile.mkdtemp(prefix=NEW, dir=folder))
    lock = _locked(new)
    made = folder / (prefix + new.name.removeprefix(NEW))
    os.rename(new, made)  # only now can others take it for one that was left
    if lock is not None:
        stack.callback(os.close, lock)
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    return made


def _locked(folder: Path) -> int | None:
    """A lock on a folder that ends with the process; None where another process has it, or the system has none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _sweep(folder: Path) -> None:
    """Remove what saves that were killed have left, and put back what one of them had moved away and not replaced."""
    for left in folder.glob(f"{STAGED}*"):
        lock = _locked(left) if left.is_dir() else None
        if lock is None:  # another process is at work in it
            continue
        for path in left.rglob("*") if left.name.startswith(KEPT) else ():
            target = folder / path.relative_to(left)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _move_in(stage: Path, folder: Path, remove: set[str], kept: Path) -> None:
    """Rename the staged files into place; if one cannot be, put back those that were."""
    names = sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file())
    done: dict[str, bool] = {}  # whether there was a file before
    try:
        for name in [*names, *(remove - set(names))]:
            done[name] = (folder / name).exists()
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).exists():
                os.replace(folder / name, kept / name)
            if name in names:
                os.replace(stage / name, folder / name)
    except BaseException:
        for name, was_there in done.items():
            if (kept / name).exists():
                os.replace(kept / name, folder / name)
            elif not was_there:
                (folder / name).unlink(missing_ok=True)
        raise
