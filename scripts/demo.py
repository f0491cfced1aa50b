"""Prune, distil, quantize and early-exit a real model on real data, in the Trainer, and draw what each stage gained.

    python scripts/demo.py                                   # no Hub: a small ViT on scikit-learn's handwritten digits
    python scripts/demo.py --model distilbert/distilbert-base-uncased-finetuned-sst-2-english \\
        --dataset stanfordnlp/sst2 --train-rows 2000         # any classification model and data set of the Hub

`--model` and `--dataset` take Hub ids or local folders; a data set may also be a CSV, JSON or Parquet file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a model; default: a small ViT, trained here")
    parser.add_argument("--dataset", help="Hub id, folder or file of a data set; default: scikit-learn's digits")
    parser.add_argument("--config", help="configuration of the data set, where it has several")
    parser.add_argument("--train-rows", type=int, help="use this many training rows")
    parser.add_argument("--heads", type=float, default=0.5, help="fraction of heads to remove")
    parser.add_argument("--neurons", type=float, default=0.5, help="fraction of FFN neurons to remove")
    parser.add_argument("--score", default="taylor")
    parser.add_argument("--epochs", type=float, help="of pruning; default: 8 for the digits, 1 otherwise")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--output", default="runs/demo")
    args = parser.parse_args()
    if (args.model is None) != (args.dataset is None):
        parser.error("give both --model and --dataset, or neither")
    set_seed(0)
    logging.set_verbosity_error()
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    try:
        task = digits(args) if args.dataset is None else from_hub(args)
        run(args, task)
    except hc.CompressionError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace, task: dict[str, Any]) -> None:
    model, output = task["model"], Path(args.output)
    epochs, learning_rate = args.epochs or task["epochs"], args.learning_rate or task["learning_rate"]

    def trainer_for(model, epochs: float, learning_rate: float, callbacks=(), teacher=None):
        options = dict(
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_strategy="no",
            warmup_steps=10,
            remove_unused_columns=task.get("remove_unused_columns", True),
        )
        common = dict(
            train_dataset=task["train"],
            eval_dataset=task["test"],
            data_collator=task.get("collator"),
            compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
            callbacks=list(callbacks),
        )
        folder = str(output / "checkpoints")
        if teacher is None:
            return Trainer(model, TrainingArguments(folder, **options), **common)
        return hc.DistillationTrainer(model, hc.DistillationArguments(folder, **options), teacher_model=teacher, **common)

    def accuracy(model) -> dict[str, float]:
        scorer = trainer_for(model, 1, 1e-4)
        for printer in (ProgressCallback, PrinterCallback):
            scorer.remove_callback(printer)
        return {"accuracy": scorer.evaluate()["eval_accuracy"]}

    reports: dict[str, hc.Report] = {}

    def stage(name: str) -> None:
        """Save, load back, compare to the bit, measure against the dense model."""
        model.save_pretrained(output / name)
        loaded = type(model).from_pretrained(output / name)
        with torch.no_grad():
            if not torch.equal(loaded.eval()(**task["batch"]).logits, model.eval()(**task["batch"]).logits):
                sys.exit(f"error: the loaded model is not the saved one ({output / name})")
        reports[name] = hc.measure(loaded, task["batch"], against=dense, metrics=accuracy)
        print(f"{reports[name]}\nSaved to {output / name} and loaded back with from_pretrained; logits equal to the bit\n")

    print("What can be cut\n" + str(hc.discover(model)) + "\n")
    if task.get("dense_epochs"):
        print(f"Training the dense model ({task['dense_epochs']} epochs)")
        trainer_for(model, task["dense_epochs"], 1e-3).train()
    model.save_pretrained(output / "dense")
    dense = type(model).from_pretrained(output / "dense")

    print(f"1. Pruning {args.heads:.0%} of the heads and {args.neurons:.0%} of the neurons while training")
    callback = hc.PruningCallback(heads=args.heads, neurons=args.neurons, score=args.score)
    trainer_for(model, epochs, learning_rate, [callback]).train()
    print(f"\n{callback.plan}\n")
    stage("pruned")

    print("2. Distilling the dense model into it, and training early exits on the way")
    layers = len(hc.discover(model).layers)
    exits = hc.EarlyExitCallback(after=range(layers // 3, layers - 1), distil=0.5)
    trainer_for(model, epochs, learning_rate / 2, [exits], teacher=dense).train()
    hc.set_exits_(model, threshold=1.0)
    stage("distilled")

    print("3. Quantizing to 8 bits, embeddings too")
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    stage("int8")

    print("4. Letting sure rows leave early: the threshold that costs at most half a point on validation rows")
    found = hc.tune_exits_(model, task["validation"], max_drop=0.005)
    print(f"{found['mean_depth']:.2f} of {layers} layers a row, at a threshold of {found['threshold']:.3f}")
    stage("exits")

    print(f"{'stage':<10} accuracy  speed-up  of the bytes")
    points = {"dense": (1.0, reports["pruned"].against.metrics["accuracy"], 1.0)}  # type: ignore[union-attr]
    for name, report in reports.items():
        share = report.model.bytes / report.against.bytes  # type: ignore[union-attr]
        points[name] = (report.speedup or 1.0, report.model.metrics["accuracy"], share)
    for name, (speed, score, share) in points.items():
        print(f"{name:<10} {score:>8.2%}  {speed:>7.2f}x  {share:>12.1%}")
    draw({name: (1 / speed, score) for name, (speed, score, _) in points.items()}, output / "stages.png")


def draw(points: dict[str, tuple[float, float]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    x, y = zip(*points.values(), strict=True)
    axes.plot([100 * v for v in x], [100 * v for v in y], "o--", color="tab:blue")
    for name, (time, score) in points.items():
        axes.annotate(name, (100 * time, 100 * score), textcoords="offset points", xytext=(6, 6))
    axes.set_xlabel("latency, % of the dense model's")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(0, 110)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"Drawn: {path}")


def digits(args: argparse.Namespace) -> dict[str, Any]:
    """1,797 real handwritten digits of 8x8 pixels (UCI, Alpaydin & Kaynak 1998), and a ViT to learn them."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    rows = [{"pixel_values": p, "labels": int(y)} for p, y in zip(pictures, data.target, strict=True)]
    train, test = train_test_split(rows, test_size=0.25, random_state=0, stratify=data.target)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=1,
            num_channels=1,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            intermediate_size=512,
            num_labels=10,
        )
    )
    validation, test = test[:150], test[150:]
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in test[:32]])}
    return {
        "model": model,
        "train": train[: args.train_rows],
        "validation": [default_data_collator(validation)],
        "test": test,
        "batch": batch,
        "dense_epochs": 20,
        "epochs": 8,
        "learning_rate": 1e-3,
    }


def batches(rows: Any, collate: Any, size: int = 64) -> list[Any]:
    return [collate([rows[i] for i in range(at, min(at + size, len(rows)))]) for at in range(0, len(rows), size)]


def from_hub(args: argparse.Namespace) -> dict[str, Any]:
    """Any classification data set with a text or an image column, and a model for it."""
    from datasets import ClassLabel, Image, Value, load_dataset

    path = Path(args.dataset)
    if path.suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        kind = {".tsv": "csv", ".jsonl": "json"}.get(path.suffix, path.suffix[1:])
        more = {"sep": "\t"} if path.suffix == ".tsv" else {}
        data = load_dataset(kind, data_files=str(path), **more)
    else:
        data = load_dataset(args.dataset, args.config)
    held_out = next((name for name in ("validation", "test") if name in data), None)
    if held_out is None:
        data = data["train"].train_test_split(0.2, seed=0)
        held_out = "test"
    train = data["train"]
    halves = data[held_out].train_test_split(0.5, seed=0)  # one half picks the thresholds of exits, the other measures
    validation, test = halves["train"], halves["test"]
    if args.train_rows:
        train = train.shuffle(seed=0).select(range(min(args.train_rows, len(train))))
    features = train.features
    label = next((n for n in ("label", "labels", "target", "coarse_label") if n in features), None)
    images = [n for n, f in features.items() if isinstance(f, Image)]
    texts = [n for n, f in features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string") and n != label]
    if label is None or not (images or texts):
        raise hc.CompressionError(
            f"{args.dataset} needs a column 'label' and one of text or images; it has {sorted(features)}."
        )
    if isinstance(features[label], ClassLabel):
        names = features[label].names
        index: dict[Any, int] = {i: i for i in range(len(names))}
    else:
        names = sorted({str(v) for v in train.unique(label)})
        index = {value: names.index(str(value)) for value in train.unique(label)}
    options = dict(num_labels=len(names), ignore_mismatched_sizes=True)
    if images:
        processor = AutoImageProcessor.from_pretrained(args.model)
        model = AutoModelForImageClassification.from_pretrained(args.model, **options)

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            pixels = processor([row[images[0]].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([index[row[label]] for row in rows])}

        batch = collate([test[i] for i in range(min(32, len(test)))])
        batch.pop("labels")
        return {
            "model": model,
            "train": train,
            "validation": batches(validation, collate),
            "test": test,
            "collator": collate,
            "remove_unused_columns": False,
            "batch": batch,
            "epochs": 1,
            "learning_rate": 5e-5,
        }
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, **options)
    if model.config.pad_token_id is None:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer(*(rows[name] for name in texts[:2]), truncation=True, max_length=128)
        return {**encoded, "labels": [index[value] for value in rows[label]]}

    train, validation, test = (
        part.map(encode, batched=True, remove_columns=list(features)) for part in (train, validation, test)
    )
    collator = DataCollatorWithPadding(tokenizer)
    rows = [{k: v for k, v in test[i].items() if k != "labels"} for i in range(min(32, len(test)))]
    return {
        "model": model,
        "train": train,
        "validation": batches(validation, collator),
        "test": test,
        "collator": collator,
        "batch": dict(tokenizer.pad(rows, return_tensors="pt")),
        "epochs": 1,
        "learning_rate": 5e-5,
    }


if __name__ == "__main__":
    main()
