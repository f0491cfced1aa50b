"""Post-training and trained quantization of a fine-tuned encoder on SST-2: accuracy, bytes, latency. Writes JSON.

    python scripts/benchmark_quantization.py --model runs/text/dense --output runs/quantization
    python scripts/benchmark_quantization.py --parts train --bits 4 3 2       # QAT and QAT with a teacher, equal steps

Accuracy over dev + test rows, each variant compared with the dense model row by row: 95% bootstrap interval of the
difference. torchao, torch's own dynamic quantization and ONNX Runtime take part in the timing where they are installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
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
    parser.add_argument("--data", default=sst2.DATA)
    parser.add_argument("--model", default=sst2.DENSE, help="what benchmark_text.py fine-tuned")
    parser.add_argument("--output", default="runs/quantization")
    parser.add_argument("--parts", nargs="+", default=["post", "latency", "train"], choices=["post", "latency", "train"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="of the training part")
    parser.add_argument("--epochs", type=float, default=1, help="of the training part, for each variant")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a smoke run on few rows and steps")
    args = parser.parse_args()
    sst2.need(args.data, args.model)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = sst2.splits(args.data, tokenizer, 96 if args.quick else None)
    held_out = splits["dev"] + splits["test"]
    collate = DataCollatorWithPadding(tokenizer)
    dense = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    load = partial(AutoModelForSequenceClassification.from_pretrained, args.model)
    result_file = output / "benchmark_quantization.json"
    result = json.loads(result_file.read_text()) if result_file.is_file() else {}
    result["arguments"] = vars(args)

    def correct(model) -> torch.Tensor:
        """1 for each row that is right, in the order of the data."""
        order = sorted(range(len(held_out)), key=lambda i: len(held_out[i]["input_ids"]))
        found = torch.zeros(len(held_out))
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                rows = order[start : start + 64]
                batch = collate([held_out[i] for i in rows])
                labels = batch.pop("labels")
                found[rows] = (model.eval()(**batch).logits.argmax(-1) == labels).float()
        return found

    reference = correct(dense)
    print(f"dense: {reference.mean():.2%} of {len(held_out)} rows", flush=True)

    def compare(model, name) -> dict:
        found = correct(model)
        lost = 100 * (reference - found)
        draws = lost[torch.randint(len(lost), (2000, len(lost)), generator=torch.Generator().manual_seed(0))].mean(1)
        low, high = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
        folder = output / name.replace(" ", "-").replace(",", "")
        model.save_pretrained(folder)
        size, before = ((p / "model.safetensors").stat().st_size for p in (folder, Path(args.model)))
        row = {"accuracy": found.mean().item(), "lost": lost.mean().item(), "interval": [low, high], "smaller": before / size}
        print(f"{name}: lost {row['lost']:+.2f} points [{low:+.2f}, {high:+.2f}], {row['smaller']:.2f}x smaller", flush=True)
        return row

    if "post" in args.parts:
        result["post"] = {}
        for bits in (8, 4, 3, 2):
            for embeddings in (True, False):
                model = load()
                hc.apply_(model, hc.plan_quantization(model, bits=bits, embeddings=embeddings))
                name = f"{bits} bit{'' if embeddings else ', embeddings in fp32'}"
                result["post"][name] = compare(model, name)
    if "latency" in args.parts:
        result["latency"] = latency(dense, load, splits["test"], tokenizer, args.repeats, output)
    if "train" in args.parts:
        result["train"] = {}

        def train(callbacks, teacher, seed=0):
            set_seed(seed)
            model = load()
            kind = TrainingArguments if teacher is None else hc.DistillationArguments
            arguments = kind(
                str(output / "scratch"),
                num_train_epochs=args.epochs,
                max_steps=4 if args.quick else -1,
                per_device_train_batch_size=32,
                learning_rate=args.learning_rate,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                **({} if teacher is None else {"alpha_task": 0.0, "alpha_kd": 1.0}),
            )
            trainer = Trainer if teacher is None else partial(hc.DistillationTrainer, teacher_model=teacher)
            trainer(model, arguments, train_dataset=splits["train"], data_collator=collate, callbacks=callbacks).train()
            return model

        result["train"]["float, same steps"] = compare(train([], None), "float, same steps")
        for bits in args.bits:
            model = load()
            hc.apply_(model, hc.plan_quantization(model, bits=bits))
            rows = {"post-training": compare(model, f"{bits} bit post-training")}
            rows["QAT"] = compare(train([hc.QuantizationCallback(bits)], None), f"{bits} bit QAT")
            rows["QAT with teacher"] = compare(train([hc.QuantizationCallback(bits)], dense), f"{bits} bit QAT with teacher")
            # of a loss that may be none, no fraction can be recovered
            gap = rows["post-training"]["lost"] if rows["post-training"]["interval"][0] > 0 else 0.0
            for name in ("QAT", "QAT with teacher"):
                rows[name]["recovered"] = (gap - rows[name]["lost"]) / gap if gap else None
                print(f"{bits} bit {name}: recovered {rows[name]['recovered']}", flush=True)
            result["train"][f"{bits} bit"] = rows
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {result_file}")


def latency(dense, load, rows, tokenizer, repeats: int, output: Path) -> dict:
    """Each variant against the dense model, in turn in one run, at two shapes."""
    variants = {}
    for name, options in {
        "ours, per token": {"bits": 8},
        "ours, per tensor": {"bits": 8, "activations": "tensor"},
        "ours, weights only": {"bits": 8, "activations": "none"},
        "ours, 4 bit": {"bits": 4},
        "ours, 4 bit, decoded at each use": {"bits": 4, "decode": "call"},
    }.items():
        model = load().eval()
        hc.apply_(model, hc.plan_quantization(model, **options))
        variants[name] = model
    variants |= others(dense, output)
    found: dict = {}
    for size, length in ((32, 64), (1, 16)):
        batch = sst2.timing_batch(rows, tokenizer, size, length)
        for name, model in variants.items():
            report = hc.measure(model, batch, against=dense, repeats=repeats)
            found[f"{name}, batch {size} x {length}"] = [report.speedup, *(report.speedup_interval or ())]
            print(f"{name}, batch {size} x {length}: {found[f'{name}, batch {size} x {length}']}", flush=True)
    return found


def others(dense, output: Path) -> dict:
    """The libraries that are there: per token (torchao), per tensor (torch, ONNX Runtime)."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["torch dynamic, per tensor"] = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(dense), {torch.nn.Linear}, dtype=torch.qint8
        )
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        print("torchao is not installed; left out")
    else:
        model = copy.deepcopy(dense)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        found["torchao, per token"] = model
    try:
        import onnxruntime
        from onnxruntime.quantization import quantize_dynamic
    except ImportError:
        print("onnxruntime is not installed; left out")
    else:
        found["ONNX Runtime, per tensor"] = _Onnx(dense, output, onnxruntime, quantize_dynamic)
    return found


class _Onnx(torch.nn.Module):
    """An exported, dynamically quantized model behind the interface of a module."""

    def __init__(self, dense, output: Path, onnxruntime, quantize_dynamic) -> None:
        super().__init__()
        path, small = str(output / "dense.onnx"), str(output / "int8.onnx")
        names = ["input_ids", "attention_mask", "token_type_ids"]
        ids = torch.ones(2, 16, dtype=torch.long)

        class Logits(torch.nn.Module):
            def __init__(self, model) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask, token_type_ids):
                return self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits

        axes = {name: {0: "rows", 1: "tokens"} for name in names}
        torch.onnx.export(
            Logits(dense),
            (ids, ids, ids * 0),
            path,
            input_names=names,
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
        )
        quantize_dynamic(path, small)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(small, options)

    def forward(self, **batch):
        (logits,) = self.session.run(None, {k: v.numpy() for k, v in batch.items()})
        return {"logits": torch.from_numpy(logits)}


if __name__ == "__main__":
    main()
