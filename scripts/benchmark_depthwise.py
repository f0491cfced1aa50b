"""Depthwise separable layers in a ResNet trained on MNIST: what the fitted start is worth. Writes JSON.

    python scripts/benchmark_depthwise.py --data ../shared/data/mnist-10k --output runs/depthwise

Per seed: the dense network; its 3x3 convolutions replaced, before any training, and after an eighth, a quarter and all of one
epoch; and the same network from random weights, likewise. Rows 0-7,999 train, 8,000-9,999 test.
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
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

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

    def fit(model, epochs, seed, curve=None):
        """Train; `curve` gets the test accuracy after an eighth and a quarter of an epoch, and at the end."""
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
        callbacks = [] if curve is None else [Curve(curve, accuracy, (len(train) // 64 // 8, len(train) // 64 // 4))]
        Trainer(model, arguments, train_dataset=train, callbacks=callbacks).train()
        if curve is not None:
            curve["epoch"] = accuracy(model)
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
            fitted_curve: dict = {"before": accuracy(fitted)}
            fit(fitted, 1, seed, fitted_curve)
            set_seed(seed)
            random = ResNetForImageClassification(config)
            hc.apply_(random, hc.plan_depthwise(random, multiplier=multiplier))
            for module in random.modules():
                if hasattr(module, "weight_depth"):  # not the fit of random weights: PyTorch's own start for each factor
                    torch.nn.init.kaiming_uniform_(module.weight_depth, a=5**0.5)
                    torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            random_curve: dict = {"before": accuracy(random)}
            fit(random, 1, seed, random_curve)
            batch = {"pixel_values": torch.stack([r["pixel_values"] for r in test[:32]])}
            report = hc.measure(fitted.eval(), batch, against=dense.eval(), repeats=args.repeats)
            found = {"fitted": fitted_curve, "random": random_curve, "report": report.to_dict()}
            run["multipliers"][multiplier] = found
            print(seed, multiplier, {k: v for k, v in run["multipliers"][multiplier].items() if k != "report"}, flush=True)
            print(report, flush=True)
        runs.append(run)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "benchmark_depthwise.json").write_text(json.dumps({"arguments": vars(args), "runs": runs}, indent=1))
    print("| start | " + " | ".join(f"multiplier {m}" for m in args.multipliers) + " |")
    for start in ("fitted", "random"):
        for when in runs[0]["multipliers"][args.multipliers[0]][start]:
            cells = [[r["multipliers"][m][start][when] for r in runs] for m in args.multipliers]
            shown = (f"{statistics.mean(c):.2%} [{min(c):.2%}-{max(c):.2%}]" for c in cells)
            print(f"| {start}, {when} | " + " | ".join(shown) + " |")
    print(f"dense: {statistics.mean(r['dense'] for r in runs):.2%}")


class Curve(TrainerCallback):
    def __init__(self, curve: dict, accuracy, steps: tuple[int, int]) -> None:
        self.curve, self.accuracy, self.steps = curve, accuracy, dict(zip(steps, ("1/8 epoch", "1/4 epoch"), strict=True))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.curve[self.steps[state.global_step]] = self.accuracy(model)
            model.train()


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
