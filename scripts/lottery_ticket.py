"""Lottery tickets in a small ViT or CNN: the winning ticket, its mask with new weights, random masks, and the dense model.

    python scripts/lottery_ticket.py --model cnn                          # MNIST in ../shared/data/mnist-10k
    python scripts/lottery_ticket.py --model vit --dataset images         # a folder per class, or train/ and test/; or a Hub id
    python scripts/lottery_ticket.py --model cnn --seeds 0 --sparsities 0.8 0.95 --rewind_to 100

Iterative magnitude pruning (`hc.find_ticket`), one round a sparsity, with both controls in every round. What is finished is
kept in `--output` and not trained again, so the same command goes on after an interruption. Writes, after each training,
`lottery_ticket_MODEL.json`, and at the end a table and `lottery_ticket_MODEL.png`. Masks come from the training rows alone;
the test rows are only measured on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T

import hf_compress as hc
from hf_compress.files import replace_files

TRAIN_ROWS, TEST_FROM = 7000, 8000  # of MNIST-10k; the rows between chose the learning rates and sizes below
DEFAULTS = {"vit": {"epochs": 4.0, "learning_rate": 4e-3}, "cnn": {"epochs": 2.0, "learning_rate": 5e-3}}
ARMS = {"ticket": "winning ticket", "reinit": "its mask, new weights", "random_mask": "random mask"}


def make_model(kind: str, classes: int, size: int) -> T.PreTrainedModel:
    if kind == "vit":
        config = T.ViTConfig(
            image_size=size, patch_size=size // 4, num_channels=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, num_labels=classes, initializer_range=0.1,
        )  # fmt: skip
        return T.ViTForImageClassification(config)
    config = T.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=classes
    )
    return T.ResNetForImageClassification(config)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    T.utils.logging.set_verbosity_error()
    train, test, classes = load(args)
    output = Path(args.output)
    about = {
        "model": args.model, "data": args.dataset or args.mnist, "train_rows": len(train), "test_rows": len(test),
        "epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.learning_rate, "threads": args.threads,
        "rewind_to": args.rewind_to, "scope": args.scope,
        "versions": {"torch": torch.__version__, "transformers": T.__version__},
    }  # fmt: skip
    runs = output / args.model
    check_same_run(runs / "about.json", about)

    def make_trainer(seed: int) -> T.Trainer:
        T.set_seed(seed)
        arguments = T.TrainingArguments(
            str(runs / f"seed-{seed}"), num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=500, learning_rate=args.learning_rate, warmup_steps=20, save_strategy="no",
            logging_strategy="no", report_to=[], seed=seed, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        model = make_model(args.model, classes, args.image_size)
        trainer = T.Trainer(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        trainer.remove_callback(T.PrinterCallback)
        return trainer

    rows: list[dict[str, Any]] = []
    for seed in args.seeds:

        def show(row: dict[str, Any], seed: int = seed) -> None:
            name = f"{args.model} seed {seed}  {row['weights_removed']:6.2%} removed  {row['arm']:<11}"
            print(f"{name}  {row['metrics']['eval_accuracy']:.2%}  {row['steps']} steps", flush=True)
            write(output, args.model, about, gather(runs))

        hc.find_ticket(
            lambda seed=seed: make_trainer(seed), args.sparsities, rewind_to=args.rewind_to, scope=args.scope,
            controls=args.controls, seed=seed, on_row=show,
        )  # fmt: skip
        rows = [row for row in gather(runs) if row["seed"] in args.seeds]
    write(output, args.model, about, gather(runs))
    print(f"\n{table(rows)}\n\nWrote {output / f'lottery_ticket_{args.model}.json'}")
    if find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed.")
    else:
        draw(output / f"lottery_ticket_{args.model}.png", rows)
        print(f"Drew {output / f'lottery_ticket_{args.model}.png'}")


# --- arguments and data ----------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(DEFAULTS), default="cnn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95, 0.98], help="one a round")
    parser.add_argument("--controls", nargs="*", default=["reinit", "random_mask"], choices=["reinit", "random_mask"])
    parser.add_argument("--rewind_to", type=int, default=0, help="step of the dense training that tickets start from")
    parser.add_argument("--scope", choices=["global", "layer"], default="global")
    parser.add_argument("--mnist", default="../shared/data/mnist-10k", help="folder of IDX files")
    parser.add_argument("--dataset", help="instead: an image classification data set, Hub id or folder")
    parser.add_argument("--image_size", type=int, default=28, help="images of --dataset are made grey and of this size")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_train_rows", type=int, help="train on this many rows only")
    parser.add_argument("--output", default="runs/lottery_ticket")

    def refuse(message: str) -> None:  # argparse would print all of its options first
        raise hc.CompressionError(f"{message}; --help shows all.")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    args = parser.parse_args()
    for name, value in DEFAULTS[args.model].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name in ("epochs", "learning_rate", "batch_size", "threads", "max_train_rows"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise hc.CompressionError(f"--{name} must be above 0, got {getattr(args, name)}.")
    if args.image_size < 16 or args.image_size % 4:
        raise hc.CompressionError(f"--image_size is a multiple of 4 from 16, got {args.image_size}.")
    if any(not 0 < level < 1 for level in args.sparsities):
        raise hc.CompressionError(f"--sparsities are fractions between 0 and 1, got {args.sparsities}.")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise hc.CompressionError(f"--seeds are different whole numbers from 0, got {args.seeds}.")
    args.sparsities = sorted(set(args.sparsities))
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise hc.CompressionError(f"--output {args.output!r} is a file; name a folder.")
    return args


def load(args: argparse.Namespace) -> tuple[list[dict], list[dict], int]:
    """Rows to train on, rows to test on, and the number of classes."""
    if args.dataset is None:
        if args.image_size != 28:
            raise hc.CompressionError("--image_size goes with --dataset; MNIST's images are 28 x 28.")
        folder = Path(args.mnist)
        if not folder.is_dir():
            raise hc.CompressionError(f"No MNIST at {folder}. Skipped; give --dataset, or --mnist with a folder of IDX files.")
        images, labels = mnist(folder)
        rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
        train, test, classes = rows[:TRAIN_ROWS], rows[TEST_FROM:], 10
    else:
        train, test, classes = images_of(args.dataset, args.image_size)
    return train[: args.max_train_rows], test, classes


def images_of(name: str, size: int) -> tuple[list[dict], list[dict], int]:
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # of many kinds, for as many reasons
        raise hc.CompressionError(f"Cannot load the data set {name!r}: {' '.join(str(error).split())[:200]}") from error
    splits = list(found)
    held = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits:
        raise hc.CompressionError(f"{name!r} has no split 'train'; there are {', '.join(map(str, splits))}.")
    pair = found if held else found["train"].train_test_split(0.2, seed=0)
    train, test = pair["train"], pair[held or "test"]
    image = next((n for n, f in train.features.items() if isinstance(f, datasets.Image)), None)
    label = next((n for n, f in train.features.items() if isinstance(f, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise hc.CompressionError(
            f"{name!r} has no column of images with a column of classes beside it; there are {', '.join(train.features)}."
        )

    def read(rows: Any) -> list[dict]:
        out = []
        for row in rows:
            pixels = np.asarray(row[image].convert("L").resize((size, size)), dtype=np.float32)
            out.append({"pixel_values": torch.from_numpy(pixels / 255 - 0.5)[None] * 2, "labels": int(row[label])})
        return out

    return read(train), read(test), train.features[label].num_classes


def mnist(folder: Path) -> tuple[torch.Tensor, np.ndarray]:
    arrays = {}
    for path in sorted(folder.glob("*ubyte*")):
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
        arrays["images" if "images" in path.name else "labels"] = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(
            shape
        )
    if set(arrays) != {"images", "labels"} or len(arrays["images"]) <= TEST_FROM:
        raise hc.CompressionError(f"{folder} has no IDX files of 10,000 images and labels.")
    return torch.tensor(arrays["images"]).float().div(255).sub(0.1307).div(0.3081)[:, None], arrays["labels"]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


# --- what came out ---------------------------------------------------------------------------------------------------


def check_same_run(path: Path, about: dict[str, Any]) -> None:
    """Rows of other conditions must not meet in one table."""
    if path.exists():
        before = json.loads(path.read_text())
        differ = next((name for name, value in about.items() if before.get(name) != value), None)
        if differ is not None:
            raise hc.CompressionError(
                f"{path.parent} holds runs with {differ} {before.get(differ)!r}, and now it is {about[differ]!r}; name another "
                "--output."
            )
    replace_files(path.parent, {path.name: (json.dumps(about, indent=1) + "\n").encode()})


def gather(runs: Path) -> list[dict[str, Any]]:
    """The rows of all seeds, as `find_ticket` keeps them."""
    rows = []
    for path in sorted(runs.glob("seed-*/lottery.json")):
        for row in json.loads(path.read_text())["rows"]:
            seed, test = int(path.parent.name.removeprefix("seed-")), row["metrics"]["eval_accuracy"]
            found = {"seed": seed, "sparsity": row["asked"], "arm": row["arm"], "accuracy": test, "steps": row["steps"]}
            rows.append({**found, "weights_removed": row["weights_removed"], "train_loss": row["metrics"]["train_loss"]})
    return rows


def write(output: Path, model: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    text = json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    replace_files(output, {f"lottery_ticket_{model}.json": text.encode()})


def of(rows: list[dict[str, Any]], arm: str, sparsity: float) -> list[float]:
    return [row["accuracy"] for row in rows if row["arm"] == arm and row["sparsity"] == sparsity]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean test accuracy over the seeds, and from the least to the most."""

    def cell(found: list[float]) -> str:
        return f"{statistics.mean(found):.2%} ({min(found):.2%} - {max(found):.2%})" if found else ""

    dense = of(rows, "dense", 0.0)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    lines = [f"dense: {cell(dense)}, {len(dense)} seed{'s' * (len(dense) != 1)}", ""]
    lines += [f"| removed | {' | '.join(ARMS[arm] for arm in arms)} |", "|---" * (len(arms) + 1) + "|"]
    for level in sorted({row["sparsity"] for row in rows if row["arm"] != "dense"}):
        lines.append(f"| {level:.1%} | {' | '.join(cell(of(rows, arm, level)) for arm in arms)} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Test accuracy against sparsity: means, and bars from the least to the most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    levels = sorted({row["sparsity"] for row in rows if row["arm"] != "dense"})
    left = [1 - level for level in levels]
    looks = {"ticket": ("#2a6f97", "o", "-"), "reinit": ("#c77d2e", "s", "--"), "random_mask": ("#7a7a7a", "^", ":")}
    for arm, (colour, marker, line) in looks.items():
        found = [of(rows, arm, level) for level in levels]
        if all(found):
            means = [statistics.mean(f) for f in found]
            spread = [
                [m - min(f) for m, f in zip(means, found, strict=True)],
                [max(f) - m for m, f in zip(means, found, strict=True)],
            ]
            axis.errorbar(
                left, means, spread, color=colour, marker=marker, linestyle=line, capsize=2, markersize=4, label=ARMS[arm]
            )
    dense = of(rows, "dense", 0.0)
    axis.axhline(statistics.mean(dense), color="#d9d9d9", zorder=0, label="dense")
    axis.axhspan(min(dense), max(dense), color="#d9d9d9", alpha=0.4, zorder=0)
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.set_xticks(left, [f"{level:.0%}" for level in levels])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="weights removed", ylabel="test accuracy")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    try:
        main()
    except hc.CompressionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
