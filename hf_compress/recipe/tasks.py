"""What a recipe's task is: which model class, which columns, how rows become a batch, what is predicted."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..edits import CompressionError
from ..probe import NoInputs, example_inputs
from .sounds import read_sound

if TYPE_CHECKING:
    from .data import Data, DataOptions
    from .labels import Labels

TEXT = ("text", "sentence", "sentence1", "content", "review", "premise", "question1")
PAIR = ("text_pair", "sentence2", "hypothesis", "question2")
LABEL = ("label", "labels", "target", "class")
HALF = "The model given is in half precision; it was trained, measured and saved in float32."


@dataclass(frozen=True)
class Task:
    """A task of the Hub.

    Args:
        auto (`str`): the Auto class of transformers.
        endings (`tuple[str, ...]`): how classes end that have a trained head for it.
        columns (`dict`): what it reads, by the usual names of the columns; a `?` marks what may be missing.
        wanted (`str`): what the label column must hold; see `find_labels`. Empty: there is none.
        reads (`str`): `"text"`, `"image"` or `"audio"`.
        collate (`Callable`): from `(setup, rows, folder)` to a batch.
    """

    auto: str
    endings: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    wanted: str
    reads: str
    collate: Callable[[Setup, Sequence[dict[str, Any]], str], dict[str, torch.Tensor]]


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """No warnings of transformers and ours."""
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_compress")] if on else []
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass
class Setup:
    """A recipe's model and data, opened: everything that its steps need.

    Attributes:
        kind (`str`): what is predicted, as in `metrics.Metric.of`.
        processor: the tokenizer, image processor or feature extractor.
    """

    name: str
    task: Task
    data: Data
    options: DataOptions
    labels: Labels | None
    processor: Any
    kind: str
    model: str  # as `from_pretrained` takes it
    revision: str | None
    changes: dict[str, Any]  # what the config is told: labels
    fresh: bool  # the head is new
    seed: int
    pooling: str = "mean"
    blocks: dict[str, Any] = field(default_factory=dict)

    def load(self, folder: str | os.PathLike | None = None) -> Any:
        """The model as given, or as a step left it."""
        import transformers

        auto: Any = getattr(transformers, self.task.auto)
        if folder is not None:
            return auto.from_pretrained(folder)
        transformers.set_seed(self.seed)  # a new head begins the same whenever it is made
        more = {"ignore_mismatched_sizes": True} if self.fresh else {}
        with quiet(self.fresh):  # a report of what is missing: the head, which is to be
            model = auto.from_pretrained(self.model, revision=self.revision, trust_remote_code=False, **self.changes, **more)
        if model.dtype in (torch.float16, torch.bfloat16):  # cannot be trained without scaling the loss
            model = model.float()
            if HALF not in self.data.notes:  # its config may not say so
                self.data.notes.append(HALF)
        pad = getattr(self.processor, "pad_token_id", None)
        if self.task.reads == "text" and getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = pad
        return model

    def rows(self, split: str) -> Any:
        """The rows of a split, by index; of a causal LM, its blocks of tokens."""
        if self.kind != "loss":
            return self.data.splits[split]
        if split not in self.blocks:
            self.blocks[split] = list(blocks_of(self, split))
        return self.blocks[split]

    def collator(self, split: str) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
        folder = self.data.folders[split]
        return lambda rows: self.task.collate(self, rows, folder)

    def batches(self, split: str, most: int | None = None, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of the first `most` rows of a split, in order."""
        rows, collate = self.rows(split), self.collator(split)
        count = len(rows) if most is None else min(most, len(rows))
        for at in range(0, count, size):
            yield collate([rows[i] for i in range(at, min(at + size, count))])

    def inputs(self, model: nn.Module) -> dict[str, Any] | None:
        """Two rows for proofs where none can be made from the config; None where they can."""
        # the classifiers of encoder-decoders read at the end-of-text token, which made-up inputs need not have
        if not getattr(model.config, "is_encoder_decoder", False):
            try:
                example_inputs(model)
                return None
            except NoInputs:
                pass
        batch = next(self.batches("train", 2))
        return {name: value for name, value in batch.items() if name != "labels"}

    def timing_batch(self, size: int, length: int | None) -> dict[str, torch.Tensor]:
        """A batch for latency: measured rows, repeated where they are too few; texts padded or cut to `length` tokens."""
        setup = self
        if (
            self.task.reads == "text" and self.kind != "loss" and length is not None
        ):  # cut by the tokenizer, which keeps the ends
            setup = replace(self, options=replace(self.options, max_length=min(length, self.options.max_length or length)))
        rows, collate = self.rows("measured"), setup.collator("measured")
        batch = collate([rows[i % len(rows)] for i in range(size)])
        batch.pop("labels", None)
        if self.name == "sentence-similarity":
            batch = {name: value[:size] for name, value in batch.items()}
        if self.task.reads != "text" or length is None:
            return batch
        pads = {"input_ids": getattr(self.processor, "pad_token_id", 0) or 0}
        return {
            name: torch.nn.functional.pad(value[:, :length], (0, max(0, length - value.shape[1])), value=pads.get(name, 0))
            for name, value in batch.items()
        }


def blocks_of(setup: Setup, split: str) -> Iterator[dict[str, list[int]]]:
    """A split's text as blocks of tokens without a gap; texts end with the end-of-text token, empty ones are left out.

    What does not fill the last block is left out, unless there is no other.
    """
    rows, column, length = setup.data.splits[split], setup.data.columns["text"], setup.options.max_length or 128
    end = setup.processor.eos_token_id
    ids: list[int] = []
    full = False
    for at in range(0, len(rows), 1000):
        texts = [text for text in rows[at : at + 1000][column] if text and text.strip()]
        for found in setup.processor(texts, add_special_tokens=False)["input_ids"] if texts else []:
            ids += [*found, *([] if end is None else [end])]
        while len(ids) >= length:
            yield {"input_ids": ids[:length]}
            ids, full = ids[length:], True
    if not full and len(ids) > 1:
        yield {"input_ids": ids}


def first_block(setup: Setup, split: str) -> bool:
    return next(itertools.islice(blocks_of(setup, split), 1), None) is not None


# --- rows to batches ---------------------------------------------------------------------------------------------


def _encoded(setup: Setup, *texts: Any, **more: Any) -> dict[str, torch.Tensor]:
    options = {"truncation": True, "max_length": setup.options.max_length, "padding": True, "return_tensors": "pt"}
    return dict(setup.processor(*texts, **options, **more))


def _labels(setup: Setup, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    labels: Any = setup.labels
    column = setup.data.columns["label"]
    values = [[row[name] for name in column] if isinstance(column, list) else row[column] for row in rows]
    return torch.tensor([labels.encode(value) for value in values])


def _texts(setup: Setup, rows: Sequence[dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    columns = setup.data.columns
    sides = [[str(row[columns[role]]) for row in rows] for role in ("text", "text_pair") if role in columns]
    return {**_encoded(setup, *sides), "labels": _labels(setup, rows)}


def _pairs(setup: Setup, rows: Sequence[dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    """(2 rows, tokens): first all left sides, then all right ones."""
    columns = setup.data.columns
    both = [str(row[columns[role]]) for role in ("text", "text_pair") for row in rows]
    return {**_encoded(setup, both), "labels": _labels(setup, rows)}


def _tokens(setup: Setup, rows: Sequence[dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    """The label of a word is that of its first piece; other pieces and special tokens have none (-100)."""
    labels: Any = setup.labels
    columns = setup.data.columns
    words = [[str(word) for word in row[columns["tokens"]]] for row in rows]
    options = {"truncation": True, "max_length": setup.options.max_length, "padding": True, "return_tensors": "pt"}
    encoded = setup.processor(words, is_split_into_words=True, **options)
    targets = torch.full(encoded["input_ids"].shape, -100)
    for i, row in enumerate(rows):
        tags, before = labels.encode(row[columns["label"]]), None
        if len(tags) != len(words[i]):
            raise CompressionError(f"A row has {len(words[i])} tokens and {len(tags)} labels: {' '.join(words[i])[:60]!r}.")
        for j, word in enumerate(encoded.word_ids(i)):
            if word is not None and word != before:
                targets[i, j] = tags[word]
            before = word
    return {**dict(encoded), "labels": targets}


def _blocks(setup: Setup, rows: Sequence[dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _images(setup: Setup, rows: Sequence[dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    from PIL import Image

    column = setup.data.columns["image"]
    pictures = []
    for row in rows:
        value = row[column]
        try:
            picture = Image.open(Path(folder) / value) if isinstance(value, str) else value
            pictures.append(picture.convert("RGB"))
        except OSError as error:
            raise CompressionError(f"Cannot read the image {value!r}: {error}.") from error
    pixels = setup.processor(pictures, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": _labels(setup, rows)}


def _sounds(setup: Setup, rows: Sequence[dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    rate = setup.processor.sampling_rate
    column, seconds = setup.data.columns["audio"], setup.options.max_seconds
    waves = [read_sound(row[column], folder, rate, seconds) for row in rows]
    encoded = dict(setup.processor(waves, sampling_rate=rate, padding=True, return_tensors="pt"))
    return {**encoded, "labels": _labels(setup, rows)}


TASKS: dict[str, Task] = {
    "text-classification": Task(
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        {"text": TEXT, "text_pair?": PAIR, "label": LABEL},
        "any",
        "text",
        _texts,
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification",
        ("ForTokenClassification",),
        {"tokens": ("tokens", "words"), "label": ("ner_tags", "tags", "labels", "pos_tags", "label")},
        "tags",
        "text",
        _tokens,
    ),
    "image-classification": Task(
        "AutoModelForImageClassification",
        ("ForImageClassification", "ForImageClassificationWithTeacher"),
        {"image": ("image", "img", "file", "path"), "label": (*LABEL, "fine_label")},
        "any",
        "image",
        _images,
    ),
    "text-generation": Task(
        "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), {"text": ("text", "content")}, "", "text", _blocks
    ),
    "sentence-similarity": Task(
        "AutoModel",
        ("Model",),
        {"text": TEXT, "text_pair": PAIR, "label": ("score", "similarity", *LABEL)},
        "scores",
        "text",
        _pairs,
    ),
    "audio-classification": Task(
        "AutoModelForAudioClassification",
        ("ForSequenceClassification", "ForAudioClassification"),
        {"audio": ("audio", "file", "path"), "label": (*LABEL, "intent_class")},
        "any",
        "audio",
        _sounds,
    ),
}


# --- predictions -------------------------------------------------------------------------------------------------


def embeddings(model: Any, batch: dict[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """(rows, tokens) -> (rows, width): the mean of the real tokens' last hidden states, or the first token's."""
    states = model(**{name: value for name, value in batch.items() if name != "labels"})[0]
    if pooling == "cls":
        return states[:, 0]
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp_min(1e-9)


def similarities(model: Any, batch: dict[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """The cosine of each pair: (2 rows, tokens) -> (rows,)."""
    left, right = embeddings(model, batch, pooling).chunk(2)
    return nn.functional.cosine_similarity(left, right)


def predict(setup: Setup, model: nn.Module, split: str, size: int = 32) -> tuple[Any, Any]:
    """Predictions and references of a split, as `Metric.compute` takes them."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    found: list[Any] = []
    wanted: list[Any] = []
    rows = setup.rows(split)
    model.eval()
    bar = tqdm(total=len(rows), desc=f"score {split}", leave=False, disable=None, delay=3)
    with bar, torch.no_grad():
        for batch in setup.batches(split, size=size):
            labels = batch.pop("labels")
            batch = {name: value.to(device) for name, value in batch.items()}
            if setup.name == "sentence-similarity":
                output = similarities(model, batch, setup.pooling)
            else:
                output = model(**batch).logits
            output = output.float().cpu()
            _collect(setup, output, labels, found, wanted)
            bar.update(len(labels))
    if setup.kind == "tags":
        return found, wanted
    if setup.kind == "loss":
        return sum(found) / max(1, sum(wanted)), None
    return torch.cat(found).numpy(), torch.cat(wanted).numpy()


def _collect(setup: Setup, output: torch.Tensor, labels: torch.Tensor, found: list[Any], wanted: list[Any]) -> None:
    kind = setup.kind
    if kind == "loss":
        targets = labels[:, 1:].reshape(-1)
        loss = nn.functional.cross_entropy(
            output[:, :-1].reshape(-1, output.shape[-1]).double(), targets, ignore_index=-100, reduction="sum"
        )
        found.append(loss.item())
        wanted.append(int((targets != -100).sum()))
    elif kind == "tags":
        names: Any = setup.labels.names  # type: ignore[union-attr]
        for guess, truth in zip(output.argmax(-1), labels, strict=True):
            real = truth != -100
            found.append([names[i] for i in guess[real].tolist()])
            wanted.append([names[i] for i in truth[real].tolist()])
    else:
        found.append(
            {"classes": lambda: output.argmax(-1), "labels": lambda: (output > 0).long()}.get(kind, lambda: output.view(-1))()
        )
        wanted.append(labels.long() if kind in ("classes", "labels") else labels)
