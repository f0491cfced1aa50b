"""What commands print: aligned tables; and what libraries print, kept out of it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns, the first row their names.

    Args:
        rows (`Sequence[Sequence[str]]`): all of one length.
        right (`Sequence[int]`): columns of numbers.

    Example:

    ```python
    >>> from hf_compress.cli.output import table
    >>> print(table([("part", "count"), ("attention", "8"), ("ffn", "1,024")], right=[1]))
    part       count
    attention      8
    ffn        1,024

    ```
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in rows
    )  # fmt: skip


def say(stream: TextIO, text: str = "") -> None:
    """Write and flush. Where nobody reads any more (`hf-compress inspect MODEL | head`), that is no error, at exit neither."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Quiet(contextlib.ExitStack):
    """No warnings and no chatter of libraries, no progress bars where nobody sees them; our own notes after success.

    Args:
        live (`bool`): our notes at once, and what is being done too: for what takes long.
    """

    def __init__(self, live: bool = False) -> None:
        super().__init__()
        self.live = live
        self.notes: list[str] = []

    def __enter__(self) -> Quiet:
        super().__enter__()
        self.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("transformers", "huggingface_hub", "datasets", "torch", "accelerate"):
            logger = logging.getLogger(name)
            self.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        ours = logging.getLogger("hf_compress")
        handler = logging.Handler()
        handler.emit = self._note  # type: ignore[method-assign]
        self.callback(ours.removeHandler, handler)
        self.callback(setattr, ours, "propagate", ours.propagate)
        self.callback(ours.setLevel, ours.level)
        ours.addHandler(handler)
        ours.propagate = False
        ours.setLevel(logging.INFO if self.live else logging.WARNING)
        if not sys.stderr.isatty():
            self._no_bars()
        return self

    def _no_bars(self) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from transformers.utils import logging as of_transformers

        if not are_progress_bars_disabled():
            disable_progress_bars()
            self.callback(enable_progress_bars)
        if of_transformers.is_progress_bar_enabled():
            of_transformers.disable_progress_bar()
            self.callback(of_transformers.enable_progress_bar)

    def _note(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        line = f"note: {line}" if record.levelno >= logging.WARNING else line
        if self.live:
            say(sys.stderr, f"{line}\n")
        else:
            self.notes.append(line)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool | None:
        if kind is None:
            say(sys.stderr, "".join(f"{line}\n" for line in self.notes))
        return super().__exit__(kind, *rest)  # type: ignore[arg-type]
