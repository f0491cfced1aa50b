"""Every score on one fine-tuned encoder: points lost without training when a fraction of heads and neurons goes. Writes JSON.

    python scripts/benchmark_scores.py --data ../shared/data/sst2 --model runs/prune_to/dense-0

The same fraction of all heads and of all neurons goes, over all layers together; whole layers by their own scores. Models are
masked, which gives what the cut ones give. Accuracy is on the first rows of dev and of test; the interval is of the paired
difference over these rows (bootstrap), for one teacher and one set of calibration sentences. `movement` is learned in a
training: `--steps` trains so long by each of the scores that a `PruningCallback` takes, and cuts half-way.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sst2
import torch
import torch.nn.functional as F
import transformers
from benchmark_prune_to import interval, logits_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import hf_compress as hc
from hf_compress.pruning import LAYER_SCORES, PLANNED, TRAINED
from hf_compress.pruning.calibrate import Calibration
from hf_compress.pruning.compensate import compensated
from hf_compress.pruning.select import count_units

SEEDS = 3  # of "random"


def as_second_order(model: Any, batches: list[dict[str, torch.Tensor]], fraction: float) -> hc.Plan:
    """As many units of each block as by Taylor, chosen one at a time while new weights make up for them (`prune_to`'s way)."""
    structure = hc.discover(model)
    blocks = [*structure.attentions, *structure.own_ffns]
    taylor = hc.plan_pruning(model, batches, heads=fraction, neurons=fraction)
    cut = {edit.attention: len(edit.heads) for edit in taylor if isinstance(edit, hc.KeepHeads)}  # one head, one unit
    cut |= {edit.ffn: len(edit.neurons) for edit in taylor if isinstance(edit, hc.KeepNeurons)}
    sizes = {block.name: cut[block.name] for block in blocks if cut.get(block.name, count_units(block)) < count_units(block)}
    return compensated(Calibration(model, structure, blocks, batches), sizes)[0]


def ways(model: Any, batches: list[dict[str, torch.Tensor]], fraction: float) -> dict[str, list[Callable[[], hc.Plan]]]:
    """What is compared at one fraction: by name, plans (several of `random`)."""

    def plan(**options: Any) -> Callable[[], hc.Plan]:
        return lambda: hc.plan_pruning(model, batches, heads=fraction, neurons=fraction, **options)

    found = {score: [plan(score=score)] for score in PLANNED if score != "random"}
    found["random"] = [plan(score="random", seed=seed) for seed in range(SEEDS)]
    found["taylor, tuned"] = [plan(score="taylor", tune=True)]
    found["fisher, not tuned"] = [plan(score="fisher", tune=False)]
    found["second order, sizes of taylor"] = [lambda: as_second_order(model, batches, fraction)]
    return found


def layer_ways(model: Any, batches: list[dict[str, torch.Tensor]], number: int) -> dict[str, list[Callable[[], hc.Plan]]]:
    def plan(**options: Any) -> Callable[[], hc.Plan]:
        return lambda: hc.plan_layers(model, batches, layers=number, **options)

    return {
        score: [plan(score=score, seed=seed) for seed in range(SEEDS if score == "random" else 1)] for score in LAYER_SCORES
    }


def trained(dense: Any, rows: sst2.Rows, collate: Any, score: str, fraction: float, steps: int, output: Path) -> Any:
    transformers.set_seed(0)
    model = copy.deepcopy(dense)
    prune = hc.PruningCallback(heads=fraction, neurons=fraction, score=score)
    arguments = transformers.TrainingArguments(
        str(output / f"run-{score}"), max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-5, save_strategy="no",
        report_to=[], seed=0, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[prune]).train()  # type: ignore[arg-type]
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--model", default="runs/prune_to/dense-0", help="a fine-tuned classifier")
    parser.add_argument("--output", default="runs/scores")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--sentences", type=int, default=256, help="to calibrate on, with labels")
    parser.add_argument("--rows", type=int, default=None, help="of dev and of test, each; all by default")
    parser.add_argument("--steps", type=int, default=0, help="also prune half while training so many steps, by each score")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    sst2.need(args.data, args.model)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = sst2.splits(args.data, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    rows = sorted(splits["dev"][: args.rows] + splits["test"][: args.rows], key=lambda row: len(row["input_ids"]))
    labels = torch.tensor([row["labels"] for row in rows])
    chosen = sorted(splits["train"][: args.sentences], key=lambda row: len(row["input_ids"]))
    batches = list(sst2.batches(chosen, 32, collate))
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    meant = logits_of(dense, rows, collate)
    right = (meant.argmax(-1) == labels).float()
    found: list[dict[str, Any]] = []

    def note(what: str, asked: float, score: str, logits: list[torch.Tensor], seconds: float) -> None:
        now = torch.stack([(one.argmax(-1) == labels).float() for one in logits])
        lost = (right - now).mean(0, keepdim=True).numpy()
        kl = [F.kl_div(x.log_softmax(-1), meant.log_softmax(-1), log_target=True, reduction="batchmean").item() for x in logits]
        found.append({
            "what": what, "removed": asked, "score": score, "points lost": float(lost.mean() * 100),
            "95% interval": [round(100 * bound, 2) for bound in interval(lost)],
            "each": [round(float((right - one).mean()) * 100, 2) for one in now],
            "kl": sum(kl) / len(kl), "seconds to plan": round(seconds, 1),
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)

    def compare(what: str, asked: float, plans: dict[str, list[Callable[[], hc.Plan]]]) -> None:
        for score, several in plans.items():
            logits, seconds = [], 0.0
            for make in several:
                start = time.perf_counter()
                plan = make()
                seconds += time.perf_counter() - start
                with hc.mask_(dense, plan):
                    logits.append(logits_of(dense, rows, collate))
            note(what, asked, score, logits, seconds / len(several))

    for fraction in args.fractions:
        compare("heads and neurons", fraction, ways(dense, batches, fraction))
    for number in args.layers:
        compare("layers", number, layer_ways(dense, batches, number))
    for score in TRAINED if args.steps else ():
        start = time.perf_counter()
        model = trained(dense, splits["train"], collate, score, 0.5, args.steps, output)
        seconds = time.perf_counter() - start
        note(f"heads and neurons, {args.steps} steps of training", 0.5, score, [logits_of(model, rows, collate)], seconds)
    conditions = {
        "dense": right.mean().item() * 100, "rows": len(rows), "calibration sentences": len(chosen), "threads": args.threads,
        "torch": torch.__version__, "transformers": transformers.__version__, "hf_compress": hc.__version__,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    result = {"conditions": conditions, "runs": found, "arguments": vars(args)}
    (output / "scores.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
