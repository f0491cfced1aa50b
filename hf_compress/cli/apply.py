"""`hf-compress apply`: change a saved model as a plan says, from folder to folder, without loading it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .arguments import Wrong, add_common, filled
from .models import find
from .output import table

DESCRIPTION = "Change a saved model as a plan says, from folder to folder, without ever holding it in memory."
EXAMPLES = """\
examples:
  hf-compress apply models/llama plans/half runs/llama-half
  hf-compress apply models/llama plans/half/compression_plan.json runs/llama-half --max-shard-size 500MB

PLAN is what Plan.save wrote. What OUT then holds is, to the bit, what apply_ and save_pretrained would write. Memory: a copy of
one layer in float32, or one shard, whichever is more. OUT's disk holds what is made anew a second time while it is written.
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "apply", help="cut a folder by a plan, tensor by tensor", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="the folder of a saved model (safetensors, in shards or not)")
    parser.add_argument("plan", metavar="PLAN", help="the folder of a saved plan, or its compression_plan.json")
    parser.add_argument("out", metavar="OUT", type=filled, help="the folder to write, another one")
    parser.add_argument("--max-shard-size", metavar="SIZE", type=filled, default="1GB", help="of the files (default: 1GB)")
    add_common(parser)
    parser.set_defaults(run=run, path=("apply",))


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `apply`."""
    from ..streaming import apply_to_folder

    folder = find(args.model, "MODEL")
    if not Path(folder).is_dir():
        raise Wrong(
            f"MODEL: there is no folder {args.model!r}; download it first (hf download {args.model} --local-dir FOLDER)."
        )
    plan = _plan(args.plan)
    try:
        out = apply_to_folder(folder, plan, args.out, max_shard_size=args.max_shard_size)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{args.out} is as it was.") from error
    before, after = _weights(Path(folder)), _weights(out)
    data = {"out": os.fspath(out), "before": before, "after": after}
    rows = [("", "before", "after")] + [(key, f"{before[key]:,}", f"{after[key]:,}") for key in before]
    return table(rows, right=[1, 2]), data


def _plan(text: str) -> Any:
    from ..edits import CompressionError
    from ..plan import PLAN_FILE, Plan

    path = Path(text).expanduser()
    try:
        if path.is_file() and path.name != PLAN_FILE:
            return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
        return Plan.load(path.parent if path.is_file() else path)
    except CompressionError as error:
        raise Wrong(f"PLAN: {error}") from error
    except ValueError as error:
        raise Wrong(f"PLAN: {text!r} is no JSON ({error}); a plan is what Plan.save wrote.") from error


def _weights(folder: Path) -> dict[str, int]:
    from math import prod

    from safetensors import safe_open

    count = size = 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  no dict
    return {"numbers": count, "bytes": size}
