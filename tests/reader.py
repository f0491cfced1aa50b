"""A process that loads checkpoints which another process saved: `python -m tests.reader [--plain]`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


class Reader:
    """Starts the process once and asks it many times."""

    def __init__(self, plugin: bool) -> None:
        command = [sys.executable, "-m", "tests.reader", *([] if plugin else ["--plain"])]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def outputs(self, kind: str, folder, inputs, **options) -> dict[str, torch.Tensor]:
        """What `kind.from_pretrained(folder, **options)(**inputs)` gives there; RuntimeError with its message if it fails."""
        with tempfile.TemporaryDirectory() as scratch:
            torch.save(inputs, f"{scratch}/inputs.pt")
            request = {"kind": kind, "folder": str(folder), "scratch": scratch, "options": options}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            while True:
                line = self.process.stdout.readline()
                if not line:
                    raise AssertionError("the reading process died")
                if line.startswith("{"):
                    break
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(answer["error"])
            return torch.load(f"{scratch}/outputs.pt", weights_only=True)


def serve(plain: bool) -> None:
    import transformers

    if not plain:
        import hf_compress  # noqa: F401
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            inputs = torch.load(f"{request['scratch']}/inputs.pt", weights_only=True)
            options = {k: getattr(torch, v) if k == "dtype" else v for k, v in request["options"].items()}
            model = getattr(transformers, request["kind"]).from_pretrained(request["folder"], **options)
            with torch.no_grad():
                outputs = model.eval()(**inputs)
            found = {k: v for k, v in outputs.items() if isinstance(v, torch.Tensor)}
            torch.save(found, f"{request['scratch']}/outputs.pt")
            answer = {"ok": True}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    serve("--plain" in sys.argv)
