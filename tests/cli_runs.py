"""The command line, called in another process (see `tests.hub.process`)."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch

from hf_compress.cli import main

torch.set_num_threads(1)


def cli(words: list[str]) -> dict[str, Any]:
    """Exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
