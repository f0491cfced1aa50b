"""How long second-order pruning takes as models grow, and what that comes to for larger ones. Writes JSON.

    python scripts/benchmark_scaling.py --widths 256 384 512 768 --depths 3 6 --rows 512 --length 32

Encoders with random weights (how long it takes does not depend on them) are calibrated on random tokens, each in a process of
its own: sensitivities, what every block loses at every size with the projections for all sizes on the grid (the database), and
one plan that halves everything, layer by layer. What is timed is fitted, in relative error and with no share below 0, by

    seconds = a sum n^3 + b tokens sum n (n + out) + c tokens parameters

over the inputs `n` and outputs of all output projections: removals, second moments, and forward passes. The models left out by
`--check` are not fitted, only predicted, so that the fit is seen to hold beyond what it was made from. Predictions for other
shapes are extrapolations, and are called so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_compress as hc
from hf_compress.measure import conditions_of
from hf_compress.pruning.calibrate import Calibration
from hf_compress.pruning.compensate import compensated, losses_of, unit_counts
from hf_compress.pruning.latency import grid
from hf_compress.pruning.prices import blocks_for
from hf_compress.pruning.search import Database

WHAT = ("all sizes", "one plan")
# name -> width, inputs of the down projection, layers, parameters without embeddings
LARGER = {
    "110M (BERT base)": (768, 3072, 12, 85e6),
    "1B (Llama 3.2)": (2048, 8192, 16, 973e6),
    "8B (Llama 3.1)": (4096, 14336, 32, 6.98e9),
}


def work(width: int, inner: int, layers: int, parameters: float, tokens: int) -> list[float]:
    """What the time is fitted by: the three sums of the module's docstring."""
    inputs = (width, inner)
    return [
        layers * float(sum(n**3 for n in inputs)),
        tokens * layers * float(sum(n * (n + width) for n in inputs)),
        tokens * parameters,
    ]


def fit(works: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Shares of the kinds of work, none below 0, with the least squares of the relative error.

    Every choice of kinds is tried; there are seven.
    """
    best: tuple[float, np.ndarray] = (float("inf"), np.zeros(works.shape[1]))
    scaled = works / seconds[:, None]
    kinds = range(works.shape[1])
    for some in itertools.chain.from_iterable(itertools.combinations(kinds, n + 1) for n in kinds):
        shares = np.zeros(works.shape[1])
        unit = scaled[:, some].max(0)  # sums of cubes and of products differ by many orders
        shares[list(some)] = np.linalg.lstsq(scaled[:, some] / unit, np.ones(len(works)), rcond=None)[0] / unit
        off = float(((scaled @ shares - 1) ** 2).sum())
        if shares.min() >= 0 and off < best[0]:
            best = off, shares
    return best[1]


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(width: int, layers: int, rows: int, length: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    batches = [{"input_ids": torch.randint(5, 1000, (min(64, rows - i), length))} for i in range(0, rows, 64)]
    with torch.no_grad():
        model(**batches[0])  # what a first run allocates is not ours
    before, start = peak(), time.perf_counter()
    structure = hc.discover(model)
    calibration = Calibration(model, structure, blocks_for(model, structure, True, True), batches)
    database: Database = {}
    losses_of(calibration, grids={block.name: grid(block) for block in calibration.blocks}, database=database)
    middle = time.perf_counter()
    compensated(calibration, {name: max(1, count // 2) for name, count in unit_counts(calibration.blocks).items()})
    end = time.perf_counter()
    parameters = sum(p.numel() for p in model.bert.encoder.parameters())
    return {
        "width": width,
        "layers": layers,
        "parameters": parameters,
        "tokens": rows * length,
        "all sizes": middle - start,
        "one plan": end - middle,
        "peak MiB beyond a forward pass": round(peak() - before),
        "database MiB": round(sum(w.nbytes for _, w, _ in database.values()) / 2**20, 3),
        "model MiB": round(sum(p.nbytes for p in model.parameters()) / 2**20),
        "conditions": conditions_of(model, batches[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 384, 512, 768], help="multiples of 64")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--check", nargs="*", default=["768x6"], metavar="WIDTHxDEPTH", help="predicted from the others alone")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="runs/scaling")
    parser.add_argument("--one", nargs=2, type=int, metavar=("WIDTH", "DEPTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(width % 64 or width < 64 for width in args.widths):
        parser.error(f"widths are multiples of 64 (the width of a head), got {args.widths}")
    if args.one:
        print(json.dumps(one(*args.one, args.rows, args.length, args.threads)))
        return
    found = []
    for width, depth in itertools.product(args.widths, args.depths):
        options = ["--rows", str(args.rows), "--length", str(args.length), "--threads", str(args.threads)]
        run = [sys.executable, os.fspath(Path(__file__)), "--one", str(width), str(depth), *options]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{width}x{depth} failed: {done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps({k: v for k, v in found[-1].items() if k != "conditions"}), flush=True)
    fitted = [row for row in found if f"{row['width']}x{row['layers']}" not in args.check]
    if len(fitted) < 3:
        parser.error(f"three models at least to fit three numbers to, got {len(fitted)}: give more --widths or --depths.")
    tokens = args.rows * args.length
    works = {id(row): work(row["width"], 4 * row["width"], row["layers"], row["parameters"], tokens) for row in found}
    shares = {what: fit(np.array([works[id(r)] for r in fitted]), np.array([r[what] for r in fitted])) for what in WHAT}
    for row in found:
        row["fitted"] = {what: float(np.dot(shares[what], works[id(row)])) for what in WHAT}
        row["is checked"] = row not in fitted
    larger = {
        name: {what: float(np.dot(shares[what], work(*shape, tokens))) for what in WHAT} for name, shape in LARGER.items()
    }
    for row in found:
        said = ", ".join(f"{what} {row[what]:.1f} s (fit {row['fitted'][what]:.1f})" for what in WHAT)
        print(f"{row['width']} wide, {row['layers']} layers{', not fitted' * row['is checked']}: {said}")
    for name, seconds in larger.items():
        print(f"{name}, extrapolated: " + ", ".join(f"{what} {seconds[what] / 60:.1f} min" for what in WHAT))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = {"models": found, "larger, extrapolated": larger, "shares": {k: v.tolist() for k, v in shares.items()}}
    (folder / "scaling.json").write_text(json.dumps({**data, "arguments": vars(args)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
