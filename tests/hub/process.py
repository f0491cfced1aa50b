"""A user of the Hub: another process with its own HF_HOME, endpoint and token (huggingface_hub reads them when imported)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "\x1eanswer "


class Failed(RuntimeError):
    """What was called raised; `kind` is the class of it, `trace` where."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace


class Process:
    """Starts once and is asked many times: `process.call("tests.hub.actions", "push", repo_id="me/x")`.

    Arguments and what comes back are JSON.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        root = Path(__file__).parent.parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.hub.process import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=dict(environment),
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # an interpreter with torch in it takes seconds to leave
        self.process.wait()

    def call(self, module: str, function: str, **arguments: Any) -> Any:
        self.process.stdin.write(json.dumps([module, function, arguments]) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if "kind" in answer:
                    raise Failed(**answer)
                return answer["value"]
        raise AssertionError("the process died")


def environment(endpoint: str, home: str | os.PathLike, token: str | None) -> dict[str, str]:
    """The environment of a user of the Hub at `endpoint` who has this token and nothing in the cache that is `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    found = {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": os.fspath(home),
        "HF_HUB_DISABLE_XET": "1",  # with it, the client uploads large files to another service than the Hub
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": tempfile.gettempdir(),
    }
    if token is not None:
        found["HF_TOKEN"] = token
    return found


class _Clock:
    """The client waits up to 23 seconds before it gives a request up; tests do not."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        pass


def main() -> None:
    from huggingface_hub.utils import _http

    _http.time = _Clock()  # type: ignore[assignment]
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        try:
            answer = {"value": getattr(importlib.import_module(module), function)(**arguments)}
        except Exception as error:
            answer = {"kind": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)
