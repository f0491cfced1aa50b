"""`python -m tests.sweep`: every model type that transformers can build, every edit; rows go to .sweep/rows.jsonl.

python -m tests.sweep                          # all types, all edits; what is there for this code is not done again
python -m tests.sweep --types bert llama --edits KeepHeads
python -m tests.sweep --fresh                  # do everything again
python -m tests.sweep --render                 # docs/families.md from docs/families.json, without a run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent.parent
ROWS = ROOT / ".sweep" / "rows.jsonl"


def state() -> str:
    """What a verdict hangs on: the code of hf_compress and of the sweep, and the versions of what they stand on."""
    import torch
    import transformers

    digest = hashlib.sha256()
    for folder in ("hf_compress", "tests/sweep"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:12]} transformers {transformers.__version__} torch {torch.__version__}"


def main() -> None:
    import torch  # noqa: F401  (imported here once, for all processes that are forked from this one)
    import transformers.trainer  # noqa: F401

    from .pool import sweep
    from .render import JSON, PAGE, compact, read, render, summary, table, write
    from .types import EDITS, types

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", metavar="TYPE", help="only these model types")
    parser.add_argument("--edits", nargs="*", metavar="EDIT", help=f"only these edits: {', '.join(EDITS)}")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    # one more than there are cores: a judge waits while another process loads what it saved
    parser.add_argument("--processes", type=int, default=(os.cpu_count() or 1) + 1)
    parser.add_argument("--rows", type=Path, default=ROWS, help="where rows are added, one JSON a line (%(default)s)")
    parser.add_argument("--render", action="store_true", help="only render docs/families.md")
    parser.add_argument("--keep", action="store_true", help="count rows of other states of the code as done")
    args = parser.parse_args()
    if args.render:
        PAGE.write_text(render(read()))
        return
    now, done = state(), set()
    args.rows.parent.mkdir(exist_ok=True)
    if args.rows.exists() and not args.fresh:
        rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
        done = {(row["type"], row["edit"]) for row in rows if args.keep or row["state"] == now}
    jobs = []
    for kind in args.types or types():
        edits = [edit for edit in args.edits or EDITS if (kind, edit) not in done]
        if edits:
            jobs.append((kind, edits))
    start = time.monotonic()
    total = [0, 0.0]
    with args.rows.open("w" if args.fresh else "a") as file:

        def report(row: dict[str, Any]) -> None:
            file.write(json.dumps({**row, "state": now}) + "\n")
            file.flush()
            total[0] += 1
            total[1] += row["seconds"]
            if args.types:
                print(f"{row['type']:28} {row['edit']:16} {row['seconds']:6.1f} s  {row['verdict'][:200]}", flush=True)

        if jobs:
            sweep(jobs, args.processes, report)
    latest = {(row["type"], row["edit"]): row for row in map(json.loads, args.rows.read_text().splitlines())}
    if args.rows == ROWS and total[0]:
        write(compact(list(latest.values()), read() if JSON.exists() else None))
        PAGE.write_text(render(read()))
        print(table(summary(read())))
    print(f"{total[0]} rows in {time.monotonic() - start:.0f} s; {total[1]:.0f} s of work")


if __name__ == "__main__":
    main()
