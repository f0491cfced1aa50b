"""Prune attention heads and FFN neurons of a classifier, of texts or of images, while it is fine-tuned.

    python scripts/prune.py --model_name_or_path distilbert/distilbert-base-uncased-finetuned-sst-2-english \\
        --dataset_name stanfordnlp/sst2 --heads 0.5 --neurons 0.5 --max_train_samples 2000 --output_dir out
    torchrun --nproc_per_node 2 scripts/prune.py ...
    accelerate launch scripts/prune.py ...

Models are Hub ids or folders; data are Hub ids, folders, or files (CSV, TSV, JSON, Parquet). All of `TrainingArguments` is
taken too, and `python scripts/prune.py options.json` reads the same names from a file.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

import hf_compress as hc


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder, best of a model that knows the task already."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})


@dataclass
class PruningArguments:
    """What is removed, and when: see `hc.PruningCallback`."""

    heads: float = field(default=0.5, metadata={"help": "Fraction of all attention heads to remove."})
    neurons: float = field(default=0.5, metadata={"help": "Fraction of all FFN neurons to remove."})
    score: str = field(default="taylor", metadata={"help": f"How units are ranked: {', '.join(hc.pruning.TRAINED)}."})
    schedule: str = field(default="cubic", metadata={"help": "How sparsity grows: cubic, linear or one_shot."})
    start: float = field(default=0.1, metadata={"help": "When masking begins, as a fraction of the training."})
    end: float = field(default=0.5, metadata={"help": "When all that goes is masked; the rest heals."})
    scope: str = field(default="global", metadata={"help": "Rank all layers together (global) or each alone (layer)."})
    uniform: bool = field(default=False, metadata={"help": "The same width everywhere, where it loads without the plugin."})
    round_to: int | None = field(default=None, metadata={"help": "Round kept neurons to a multiple of this."})


# --- the same in prune.py, distill.py, quantize.py and early_exit.py, until the next such line ------------------------

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
)
ABOVE_0 = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)


@dataclass
class DataArguments:
    """Which data, and which of their columns. Columns that are not named are told by what they hold."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder; of images: a folder per class."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration, where there are several."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV, JSON, JSON lines or Parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; validation, test, or a fifth of the training rows."}
    )
    task: str | None = field(default=None, metadata={"help": "text or image; told by the columns if left out."})
    text_column: str | None = field(default=None, metadata={"help": "Column of texts."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of second texts, for pairs."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images, or of paths to them."})
    label_column: str | None = field(default=None, metadata={"help": "Column of classes."})
    max_length: int = field(default=128, metadata={"help": "Tokens to cut texts at."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows only."})
    measure_repeats: int = field(default=20, metadata={"help": "Timed passes of each model."})

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_file is None):
            raise hc.CompressionError("Give --dataset_name (Hub id or folder) or --train_file, one of the two.")
        if self.validation_file is not None and self.train_file is None:
            raise hc.CompressionError("--validation_file goes with --train_file; of a data set, name the --validation_split.")
        if self.task not in (None, "text", "image"):
            raise hc.CompressionError(f"--task is text or image, got {self.task!r}.")
        for name in ("max_length", "max_train_samples", "max_eval_samples", "measure_repeats"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise hc.CompressionError(f"--{name} is a number from 1, got {getattr(self, name)}.")


def parse(*kinds: Any) -> tuple[Any, ...]:
    """The arguments of the command line, or of the one JSON file that is named there."""
    parser: Any = HfArgumentParser(kinds, description=(__doc__ or "").partition("\n")[0])

    def refuse(message: str) -> None:  # argparse would print all of its options first
        raise hc.CompressionError(f"{message}; --help shows all.")

    parser.error = refuse
    if not sys.stderr.isatty():  # bars are for people
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    try:
        alone = len(sys.argv) == 2 and sys.argv[1].endswith(".json")
        found = parser.parse_json_file(sys.argv[1]) if alone else parser.parse_args_into_dataclasses()
    except (OSError, TypeError, ValueError, AttributeError) as error:  # the last two: a JSON file of something else
        raise hc.CompressionError(" ".join(str(error).split())) from error
    output = str(found[-1].output_dir)
    if os.path.exists(output) and not os.path.isdir(output):
        raise hc.CompressionError(f"--output_dir {output!r} is a file; name a folder.")
    for name in ABOVE_0:
        if not getattr(found[-1], name) > 0:
            raise hc.CompressionError(f"--{name} must be above 0, got {getattr(found[-1], name)}.")
    return found


@cache
def note(text: str) -> None:
    """Say it once."""
    print(f"note: {text}", file=sys.stderr)


def load_data(args: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train and to evaluate on, with the columns as they came."""
    try:
        if args.train_file is None:
            data: Any = datasets.load_dataset(str(args.dataset_name), args.dataset_config_name)
        else:
            files = {"train": args.train_file, "validation": args.validation_file}
            suffix = os.path.splitext(args.train_file)[1]
            kind = {".tsv": "csv", ".jsonl": "json"}.get(suffix, suffix[1:])
            if kind not in ("csv", "json", "parquet"):
                raise ValueError(f"{args.train_file} is no CSV, TSV, JSON, JSON lines or Parquet file")
            more: Any = {"sep": "\t", "quoting": 3} if suffix == ".tsv" else {}  # 3: a quote is an ordinary character
            data = datasets.load_dataset(kind, data_files={k: v for k, v in files.items() if v}, **more)
    except Exception as error:  # parsers fail in their own ways
        raise hc.CompressionError(f"Cannot load the data: {' '.join(str(error).split())}") from error
    held_out = args.validation_split or next((name for name in ("validation", "test") if name in data), None)
    for option, name in (("train_split", args.train_split), ("validation_split", held_out)):
        if name is not None and name not in data:
            raise hc.CompressionError(f"No split {name!r} (--{option}); there are {', '.join(data)}.")
    args.validation_split = held_out or f"{args.train_split}, 20% held out"  # the report says which rows it is about
    if held_out is None:
        if len(data[args.train_split]) < 2:
            raise hc.CompressionError("One row is too few to hold some out to evaluate on; give more, or --validation_file.")
        data = data[args.train_split].train_test_split(0.2, seed=seed)
        return data["train"], data["test"]
    return data[args.train_split], data[held_out]


def find_columns(args: DataArguments, features: datasets.Features) -> None:
    """Fill in the task and the columns that were not named."""
    for name in ("text_column", "text_pair_column", "image_column", "label_column"):
        if getattr(args, name) is not None and getattr(args, name) not in features:
            raise hc.CompressionError(f"No column {getattr(args, name)!r} (--{name}); there are {', '.join(features)}.")
    args.label_column = args.label_column or next((n for n in ("label", "labels", "target") if n in features), None)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    texts = [n for n, f in features.items() if getattr(f, "dtype", "") in ("string", "large_string")]
    texts = [name for name in texts if name != args.label_column]
    if args.task is None:
        args.task = "image" if args.image_column or (images and not args.text_column) else "text"
    if args.task == "image":
        args.image_column = args.image_column or (images[0] if len(images) == 1 else None)
    elif args.text_column is None:
        pair = next((pair for pair in TEXT_PAIRS if set(pair) <= set(texts)), None)
        alone = texts if len(texts) == 1 else [name for name in ("text", "sentence") if name in texts]
        args.text_column, args.text_pair_column = pair or (next(iter(alone), None), args.text_pair_column)
    for what, column in (("label", args.label_column), (args.task, getattr(args, f"{args.task}_column"))):
        if column is None:
            raise hc.CompressionError(f"Which column is the {what}'s? Say --{what}_column; there are {', '.join(features)}.")


def class_names(rows: datasets.Dataset, column: str) -> list[Any]:
    """The classes, in the order of their indices."""
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if getattr(feature, "dtype", None) not in ("string", "large_string", "bool", "int8", "int16", "int32", "int64"):
        raise hc.CompressionError(
            f"--label_column {column!r} must hold one class a row, words or whole numbers; got {feature}."
        )
    found = rows.unique(column)
    if None in found or len(found) < 2:
        raise hc.CompressionError(f"--label_column {column!r} must hold two or more classes and no gaps; got {found[:5]}.")
    return sorted(found)


def load_model(name: str, revision: str, task: str | None, names: list[Any]) -> tuple[Any, Any, bool]:
    """A classifier, its tokenizer or image processor, and whether its head is new."""
    kind: Any = AutoModelForImageClassification if task == "image" else AutoModelForSequenceClassification
    reader: Any = AutoImageProcessor if task == "image" else AutoTokenizer
    options = {"revision": revision, "num_labels": len(names), "ignore_mismatched_sizes": True}
    try:
        processor = reader.from_pretrained(name, revision=revision)
        model, info = kind.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        path = name.startswith(("/", ".", "~")) or name.count("/") > 1
        reason = "there is no such folder." if path and not os.path.isdir(name) else " ".join(str(error).split())
        raise hc.CompressionError(f"Cannot load {name!r} as a classifier of {task}s: {reason}") from error
    known = [str(label) for label in model.config.id2label.values()]
    unnamed = all(label.startswith("LABEL_") for label in known)
    words = not all(str(label).isdigit() for label in names)  # classes that are numbers keep the names of the head
    other = words and {label.lower() for label in known} != {str(label).lower() for label in names}
    if unnamed or other:  # as run_glue.py does
        if not unnamed:
            here = ", ".join(map(str, names[:5]))
            note(f"{name!r} was trained for {', '.join(known[:5])}; here they are {here}, in that order.")
        model.config.id2label = {i: str(label) for i, label in enumerate(names)}
        model.config.label2id = {str(label): i for i, label in enumerate(names)}
    if task == "text" and model.config.pad_token_id is None:  # decoders
        processor.pad_token = processor.pad_token or processor.eos_token
        model.config.pad_token_id = processor.pad_token_id
    return model, processor, bool(info["missing_keys"] or info["mismatched_keys"])


def encode(
    rows: datasets.Dataset, most: int | None, args: DataArguments, names: list[Any], model: Any, processor: Any, seed: int
) -> datasets.Dataset:
    """At most so many rows, as the model takes them: texts now, images when they are asked for."""
    if most is not None:
        rows = rows.shuffle(seed=seed).select(range(min(most, len(rows))))
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    known = {str(label).lower(): i for i, label in model.config.id2label.items()}
    if set(known) == {str(name).lower() for name in names}:  # a model of these classes: in its order
        index = {name: known[str(name).lower()] for name in names}
    label: Any = args.label_column
    if isinstance(rows.features[label], datasets.ClassLabel):
        index = {i: index[name] for i, name in enumerate(names)}
    unknown = set(rows.unique(label)) - set(index)
    if unknown:
        raise hc.CompressionError(
            f"--label_column {label!r} holds {', '.join(map(str, unknown))}, no class of the training rows. Name another split "
            "(--validation_split) or clean the data."
        )

    image, max_length = str(args.image_column), min(args.max_length, getattr(processor, "model_max_length", args.max_length))
    if args.task == "text" and max_length < args.max_length:
        note(f"texts are cut at {max_length} tokens, the most that this tokenizer allows (--max_length {args.max_length}).")
    texts = [name for name in (args.text_column, args.text_pair_column) if name and args.task == "text"]
    for column in texts:
        if not all(isinstance(text, str) for text in rows[column]):
            raise hc.CompressionError(f"Column {column!r} has rows without a text; clean the data or name another one.")

    def read(batch: dict[str, list]) -> dict[str, Any]:
        encoded = processor(*(batch[name] for name in texts), truncation=True, max_length=max_length)
        return {**encoded, "labels": [index[value] for value in batch[label]]}

    def see(batch: dict[str, list]) -> dict[str, Any]:
        pixels = [np.asarray(picture).reshape(picture.height, picture.width, -1) for picture in batch[image]]
        return {**processor(pixels, return_tensors="pt"), "labels": [index[value] for value in batch[label]]}

    if args.task == "text":
        return rows.map(read, batched=True, remove_columns=rows.column_names)
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    try:
        seen = rows.cast_column(image, datasets.Image(mode=mode)).with_transform(see)
        seen[0]  # the rest are opened as they are needed
    except Exception as error:  # what is no image fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise hc.CompressionError(f"Column {image!r} (--image_column) holds no images that can be opened: {reason}") from error
    return seen


def accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, -1) == prediction.label_ids).mean())}


def score(model: Any, args: TrainingArguments, rows: datasets.Dataset, collator: Any) -> float:
    """The accuracy of a model that is not trained here, in a Trainer of its own: in several processes, transformers 5.23
    and accelerate 1.15 average no gradients of a model that was evaluated before it is trained."""
    trainer = hc.CompressionTrainer(model, args, data_collator=collator, eval_dataset=rows, compute_metrics=accuracy)
    return trainer.evaluate(metric_key_prefix="dense")["dense_accuracy"]


def report_on(trainer: Any, dense: Any, scores: tuple[float, float | None], args: DataArguments) -> hc.Report:
    """What was saved, loaded again and measured beside the dense model, on the first rows of the evaluation."""
    rows = [trainer.eval_dataset[i] for i in range(min(32, len(trainer.eval_dataset)))]
    batch = {k: v.to(trainer.args.device) for k, v in trainer.data_collator(rows).items() if k != "labels"}
    loaded = type(trainer.model).from_pretrained(trainer.args.output_dir).to(trainer.args.device).eval()
    with torch.no_grad():
        off = (loaded(**batch).logits - trainer.model.eval()(**batch).logits).abs().max().item()
    print(f"\nSaved to {trainer.args.output_dir} and loaded again: logits differ by at most {off:.1e}\n")
    name = args.dataset_name or args.validation_file or str(args.train_file)
    data = {
        "name": f"./{os.path.basename(os.path.abspath(name))}" if os.path.exists(name) else name,
        "config": args.dataset_config_name,
        "split": args.validation_split,
        "rows": len(trainer.eval_dataset),
        "metric_name": "accuracy",
    }
    data = {key: value for key, value in data.items() if value is not None}
    return hc.measure(
        loaded,
        batch,
        against=dense.to(trainer.args.device).eval(),
        metrics={"accuracy": scores[0]},
        metrics_against=None if scores[1] is None else {"accuracy": scores[1]},
        repeats=args.measure_repeats,
        batch_sizes=(1, 32),
        about={"dataset": data, "metric": "accuracy", "seed": trainer.args.seed},
    )


# --- until here -------------------------------------------------------------------------------------------------------


def main() -> None:
    model_args, data_args, pruning_args, args = parse(ModelArguments, DataArguments, PruningArguments, TrainingArguments)
    callback = hc.PruningCallback(**vars(pruning_args), seed=args.seed)
    args.remove_unused_columns = False  # images are read out of theirs
    push, args.push_to_hub = args.push_to_hub, False  # once, when all is there
    set_seed(args.seed)

    # Data and model
    with args.main_process_first():
        train, test = load_data(data_args, args.seed)
    find_columns(data_args, train.features)
    names = class_names(train, str(data_args.label_column))
    source = (model_args.model_name_or_path, model_args.revision, data_args.task, names)
    model, processor, new_head = load_model(*source)
    with args.main_process_first():
        train = encode(train, data_args.max_train_samples, data_args, names, model, processor, args.seed)
        test = encode(test, data_args.max_eval_samples, data_args, names, model, processor, args.seed)

    collator = DataCollatorWithPadding(processor) if data_args.task == "text" else default_data_collator
    dense = load_model(*source)[0]
    if new_head:
        note(f"{source[0]!r} has no head for these {len(names)} classes: a new one is trained.")
    before = None if new_head else score(dense, args, test, collator)  # a new head's would say nothing

    # Training: masks while it runs, small when it ends
    trainer = hc.CompressionTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    for split, found in (("train", trained.metrics), ("eval", metrics)):
        trainer.log_metrics(split, found)
        trainer.save_metrics(split, found)

    # What it cost and gained
    if trainer.is_world_process_zero():
        print(f"\n{callback.plan}")
        report = report_on(trainer, dense, (metrics["eval_accuracy"], before), data_args)
        print(report)
        report.save(str(args.output_dir))
        if push:
            kind = {"tokenizer" if data_args.task == "text" else "processor": processor}
            name = args.hub_model_id or os.path.basename(os.path.abspath(str(args.output_dir)))
            hub = {"token": args.hub_token, "private": args.hub_private_repo, "revision": args.hub_revision}
            hc.push_to_hub(trainer.model, name, report=report, **kind, **hub)


if __name__ == "__main__":
    try:
        main()
    except hc.CompressionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
