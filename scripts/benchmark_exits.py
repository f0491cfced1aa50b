"""Early exits on SST-2: train them on the fine-tuned 6-layer model, tune on dev, and time the whole test split. Writes JSON.

    python scripts/benchmark_exits.py --data ../shared/data/sst2 --dense runs/text/dense --output runs/exits

`--dense` is what `scripts/benchmark_text.py` keeps. Each batch is run by the full model and by the one with exits in turn, so
that both feel the same machine; the full model is the same weights with exits off. `--quick` tries everything on few rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path

import numpy as np
import sst2
import torch
from sst2 import accuracy, batches
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_compress as hc
from hf_compress.exits import exits_off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--dense", default=sst2.DENSE, help="a fine-tuned classifier")
    parser.add_argument("--output", default="runs/exits")
    parser.add_argument("--after", type=int, nargs="+", default=None, help="layers with an exit; default: all but the last")
    parser.add_argument("--criteria", nargs="+", default=["confidence", "entropy", "patience"])
    parser.add_argument("--distil", type=float, default=0.0)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--max-drop", type=float, default=0.01, help="of dev accuracy, against the model that was there before")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--repeats", type=int, default=3, help="passes over the test split that are timed")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--train-rows", type=int, default=None, help="train on the first so many sentences only")
    parser.add_argument(
        "--reuse", action="store_true", help="tune and time the models of an earlier run again, without training"
    )
    parser.add_argument("--quick", action="store_true", help="few rows, one pass: does it run?")
    args = parser.parse_args()
    sst2.need(args.data, args.dense)
    if args.reuse and not all((Path(args.output) / f"exits-{seed}" / "config.json").is_file() for seed in args.seeds):
        sys.exit(f"--reuse: {args.output} has no model for every seed of {args.seeds}; run without it first.")
    logging.basicConfig(level=logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    splits = sst2.splits(args.data, tokenizer)
    splits["train"] = splits["train"][: args.train_rows]
    if args.quick:
        splits = {"train": splits["train"][: args.train_rows or 256], "dev": splits["dev"][:128], "test": splits["test"][:96]}
        args.repeats, args.epochs = 1, 1
    collate = DataCollatorWithPadding(tokenizer)
    dense = AutoModelForSequenceClassification.from_pretrained(args.dense).eval()
    dense_accuracy = {split: accuracy(dense, splits[split], collate) for split in ("dev", "test")}
    print("before", dense_accuracy, flush=True)
    depth = dense.config.num_hidden_layers
    runs = []
    for seed in args.seeds:
        set_seed(seed)
        start = time.perf_counter()
        folder = output / f"exits-{seed}"
        model = AutoModelForSequenceClassification.from_pretrained(folder) if args.reuse else train(args, splits, collate, seed)
        seconds = None if args.reuse else time.perf_counter() - start
        model.eval()
        with exits_off(model):
            full = {split: accuracy(model, splits[split], collate) for split in ("dev", "test")}
        run = {"seed": seed, "train_seconds": seconds, "full_accuracy": full, "criteria": {}}
        print(f"seed {seed}: trained in {seconds} s; all layers: {full}", flush=True)
        # one point of the model that was there before may be lost, not one of the jointly trained one's
        allowed = max(0.0, full["dev"] - dense_accuracy["dev"] + args.max_drop)
        dev = list(batches(splits["dev"], 64, collate))
        for criterion in args.criteria:
            hc.set_exits_(model, criterion=criterion, threshold={"patience": 1}.get(criterion, 0.5))
            try:
                tuned = hc.tune_exits_(model, dev, max_drop=allowed)
            except hc.CompressionError as error:
                print(f"  {criterion}: {error}", flush=True)
                run["criteria"][criterion] = {"refused": str(error)}
                continue
            found = {k: tuned[k] for k in ("threshold", "mean_depth", "metric", "table")}
            found["test"] = {f"batch_{size}": timed(model, splits["test"], size, collate, args.repeats) for size in (1, 32)}
            run["criteria"][criterion] = found
            for size, row in found["test"].items():
                lost = 100 * (dense_accuracy["test"] - row["accuracy"])
                print(
                    f"  {criterion} {found['threshold']:.4g} {size}: {row['accuracy']:.4f} ({lost:+.2f} points lost), "
                    f"{row['mean_depth']:.2f} of {depth} layers, {row['seconds']:.2f} s against {row['full_seconds']:.2f} s "
                    f"({row['speedup']:.2f}x, passes {min(row['speedups']):.2f}-{max(row['speedups']):.2f}; "
                    f"layers alone would allow {depth / row['mean_depth']:.2f}x)",
                    flush=True,
                )
        model.save_pretrained(folder)  # with the threshold that was found last
        loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch = {k: v for k, v in dev[0].items() if k != "labels"}
        with torch.no_grad():
            run["reload_equal"] = torch.equal(loaded(**batch).logits, model(**batch).logits)
        print(f"  reloaded equal to the bit: {run['reload_equal']}", flush=True)
        runs.append(run)
    result = {
        "arguments": vars(args),
        "machine": {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "rows": {name: len(rows) for name, rows in splits.items()},
        "dense_accuracy": dense_accuracy,
        "runs": runs,
    }
    (output / "benchmark_exits.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {output / 'benchmark_exits.json'}")


def train(args, splits, collate, seed: int):
    """The dense model with exits, both trained for `--epochs`; kept in the output folder."""
    model = AutoModelForSequenceClassification.from_pretrained(args.dense)
    depth = model.config.num_hidden_layers
    trainer = Trainer(
        model,
        TrainingArguments(
            str(Path(args.output) / "scratch"),
            per_device_train_batch_size=32,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=10,
            seed=seed,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=splits["train"],  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[hc.EarlyExitCallback(args.after or range(depth - 1), distil=args.distil)],
    )
    trainer.train()
    trainer.save_model(str(Path(args.output) / f"exits-{seed}"))
    return model


@torch.no_grad()
def timed(model, rows: list[dict], size: int, collate, repeats: int) -> dict:
    """Accuracy, depth and seconds for the whole split; each batch is run with exits and without in turn."""
    passes, right, layers = [], 0, []
    prepared = list(batches(rows, size, collate))
    labels = [batch.pop("labels") for batch in prepared]
    for batch in prepared[:3]:
        model(**batch)
    for number in range(repeats):
        seconds = {"exits": 0.0, "full": 0.0}
        for i, batch in enumerate(prepared):
            for kind in ("exits", "full") if (i + number) % 2 else ("full", "exits"):
                hc.set_exits_(model, enabled=kind == "exits")
                start = time.perf_counter()
                logits = model(**batch).logits
                seconds[kind] += time.perf_counter() - start
                if kind == "exits" and not number:
                    right += int((logits.argmax(-1) == labels[i]).sum())
                    layers.append(hc.exit_layers(model))
        passes.append(seconds)
    depth = torch.cat(layers) + 1
    seconds, full = (float(np.median([p[kind] for p in passes])) for kind in ("exits", "full"))
    return {
        "accuracy": right / len(rows),
        "mean_depth": depth.double().mean().item(),
        "rows_by_depth": depth.bincount().tolist()[1:],
        "seconds": seconds,
        "full_seconds": full,
        "speedup": full / seconds,
        "speedups": [p["full"] / p["exits"] for p in passes],
    }


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
