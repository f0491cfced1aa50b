"""Depthwise separable layers in a ResNet trained on MNIST: what the fitted start is worth. Writes JSON.

    python scripts/benchmark_depthwise.py --data ../shared/data/mnist-10k --output runs/depthwise

Per seed: the dense network; its 3x3 convolutions replaced, before any training; after one epoch; and the same network from
random weights after one epoch. Rows 0-7,999 train, 8,000-9,999 test.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import statistics
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

import hf_compress as hc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/mnist-10k")
    parser.add_argument("--output", default="runs/depthwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=float, default=3)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, a few steps")
    args = parser.parse_args()
    if not Path(args.data).is_dir():
        sys.exit(f"No MNIST at {args.data}. Skipped.")
    images, labels = mnist(Path(args.data))
    steps = {"max_steps": 3} if args.quick else {}
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    train, test = rows[:8000], rows[8000:8200] if args.quick else rows[8000:]

    def fit(model, epochs, seed):
        arguments = TrainingArguments(
            f"{args.output}/scratch",
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            logging_strategy="no",
            **steps,
        )
        Trainer(model, arguments, train_dataset=train).train()
        return model

    def accuracy(model):
        x, y = torch.stack([r["pixel_values"] for r in test]), torch.tensor([r["labels"] for r in test])
        with torch.inference_mode():
            return (torch.cat([model.eval()(b).logits for b in x.split(500)]).argmax(-1) == y).double().mean().item()

    runs = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        set_seed(seed)
        config = ResNetConfig(
            num_channels=1, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=10
        )
        dense = fit(ResNetForImageClassification(config), args.dense_epochs, seed)
        run = {"seed": seed, "dense": accuracy(dense), "multipliers": {}}
        for multiplier in args.multipliers:
            fitted = copy.deepcopy(dense)
            hc.apply_(fitted, hc.plan_depthwise(fitted, multiplier=multiplier))
            before = accuracy(fitted)
            fit(fitted, 1, seed)
            set_seed(seed)
            random = ResNetForImageClassification(config)
            hc.apply_(random, hc.plan_depthwise(random, multiplier=multiplier))
            for module in random.modules():
                if hasattr(module, "weight_depth"):  # not the fit of random weights: PyTorch's own start for each factor
                    torch.nn.init.kaiming_uniform_(module.weight_depth, a=5**0.5)
                    torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            fit(random, 1, seed)
            batch = {"pixel_values": torch.stack([r["pixel_values"] for r in test[:32]])}
            report = hc.measure(fitted.eval(), batch, against=dense.eval(), repeats=args.repeats)
            run["multipliers"][multiplier] = {
                "before_healing": before,
                "after_one_epoch": accuracy(fitted),
                "random_after_one_epoch": accuracy(random),
                "report": report.to_dict(),
            }
            print(seed, multiplier, {k: v for k, v in run["multipliers"][multiplier].items() if k != "report"}, flush=True)
            print(report, flush=True)
        runs.append(run)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "benchmark_depthwise.json").write_text(json.dumps({"arguments": vars(args), "runs": runs}, indent=1))
    print("| start | " + " | ".join(f"multiplier {m}" for m in args.multipliers) + " |")
    for key in ("before_healing", "after_one_epoch", "random_after_one_epoch"):
        cells = [statistics.mean(r["multipliers"][m][key] for r in runs) for m in args.multipliers]
        print(f"| {key} | " + " | ".join(f"{c:.2%}" for c in cells) + " |")
    print(f"dense: {statistics.mean(r['dense'] for r in runs):.2%}")


def mnist(folder: Path) -> tuple[torch.Tensor, np.ndarray]:
    files = {("images" if "images" in p.name else "labels"): p for p in sorted(folder.glob("*ubyte*"))}
    arrays = {}
    for name, path in files.items():
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        dims = raw[3]
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        arrays[name] = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    images = torch.tensor(arrays["images"]).float().div(255).sub(0.1307).div(0.3081)[:, None]
    return images, arrays["labels"]


if __name__ == "__main__":
    main()
