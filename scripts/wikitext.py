"""What a benchmark on WikiText-2 needs: the data, a tokenizer and a small Llama trained on it, and perplexity."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

DATA = "../shared/data/wikitext-2"  # a folder with valid.txt, to train and calibrate on, and test.txt
END = "<|end|>"
Rows = list[dict[str, torch.Tensor]]


def need(data: str | Path) -> None:
    """Leave with a reason where the data is not there."""
    if missing := [name for name in ("valid.txt", "test.txt") if not (Path(data) / name).is_file()]:
        sys.exit(f"No WikiText-2 at {data} ({', '.join(missing)} missing); this benchmark trains and measures on it. Skipped.")


def tokenizer_of(folder: Path, data: str | Path, words: int) -> Any:
    """A byte-level BPE tokenizer of so many tokens, made from the training text once and kept."""
    if not (folder / "tokenizer.json").is_file():
        made = ByteLevelBPETokenizer()
        made.train(str(Path(data) / "valid.txt"), vocab_size=words, special_tokens=[END], show_progress=False)
        PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rows_of(path: Path, tokenizer: Any, length: int) -> Rows:
    """The whole text as one stream of tokens, cut into rows of `length`; what is left at its end is dropped."""
    tokens = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def spread(rows: Rows, count: int | None) -> Rows:
    """So many rows from the whole text, not from its first articles; all where no number is given."""
    return rows if count is None else rows[:: max(1, len(rows) // count)][:count]


def batches(rows: Rows, size: int) -> list[dict[str, torch.Tensor]]:
    return [
        {name: torch.stack([row[name] for row in rows[i : i + size]]) for name in rows[0]} for i in range(0, len(rows), size)
    ]


def llama(folder: Path, rows: Rows, tokenizer: Any, args: Any, seed: int) -> LlamaForCausalLM:
    """The Llama that an earlier run trained with this seed and kept, or a new one."""
    if not (folder / "config.json").is_file():
        set_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
            num_key_value_heads=args.groups, intermediate_size=args.neurons, max_position_embeddings=args.length,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        arguments = TrainingArguments(
            str(folder.with_suffix(".run")), num_train_epochs=args.epochs, per_device_train_batch_size=8, learning_rate=2e-3,
            lr_scheduler_type="cosine", warmup_steps=50, weight_decay=0.1, save_strategy="no", report_to=[], seed=seed,
            use_cpu=not torch.cuda.is_available(), logging_steps=100,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()  # type: ignore[arg-type]
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def perplexity(model: Any, rows: Rows) -> float:
    """`exp` of the mean cross-entropy of every token but the first of its row."""
    losses = [(model(**batch).loss.item(), len(batch["input_ids"])) for batch in batches(rows, 32)]  # rows are of one length
    return math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
