"""A 3-layer student of the SST-2 model: {cut out of its teacher, random} x {distilled, cross-entropy}, and the cost of a step.

    python scripts/benchmark_text.py            # makes the teacher, runs/text/dense
    python scripts/benchmark_distillation.py    # writes runs/distillation/benchmark_distillation.json

`--quick` takes a few rows and steps, to see that it runs. Conditions are in the JSON beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import sst2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

import hf_compress as hc
from hf_compress.distillation import DistillationArguments, DistillationTrainer, init_student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--teacher", default=sst2.DENSE)
    parser.add_argument("--output", default="runs/distillation")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alpha-task", type=float, default=0.5)
    parser.add_argument("--alpha-kd", type=float, default=0.5)
    parser.add_argument("--alpha-cos", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=40, help="timed steps of each kind, in turn")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sst2.need(args.data, args.teacher)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    splits = sst2.splits(args.data, tokenizer, 128 if args.quick else None)
    if args.quick:
        args.seeds, args.epochs, args.repeats = args.seeds[:1], 1, 5
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher)
    output = Path(args.output)

    def trainer_for(student, distilled, seed=0):
        arguments = DistillationArguments(
            str(output / "scratch"),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0 if args.quick else 50,
            seed=seed,
            alpha_task=args.alpha_task,
            alpha_kd=args.alpha_kd,
            alpha_cos=args.alpha_cos,
            temperature=args.temperature,
            save_strategy="no",
            report_to=[],
            logging_steps=100,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        options = {
            "train_dataset": splits["train"],
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": sst2.compute_metrics,
        }
        if distilled:
            return DistillationTrainer(student, arguments, teacher_model=teacher, **options)
        return hc.CompressionTrainer(student, arguments, **options)

    def accuracies(trainer):
        return {f"{split}_accuracy": trainer.evaluate(splits[split])["eval_accuracy"] for split in ("dev", "test")}

    of_teacher = accuracies(trainer_for(teacher, False))
    print("teacher", of_teacher, flush=True)
    runs = []
    for seed in args.seeds:
        for start in ("init_student", "random"):
            for distilled in (True, False):
                set_seed(seed)
                student = init_student(teacher, args.layers)
                if start == "random":
                    student = type(student)(student.config)
                trainer = trainer_for(student, distilled, seed)
                begun = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - begun
                metrics = accuracies(trainer)
                retention = metrics["test_accuracy"] / of_teacher["test_accuracy"]
                runs.append(
                    {
                        "seed": seed,
                        "start": start,
                        "distilled": distilled,
                        "seconds": seconds,
                        **metrics,
                        "retention": retention,
                    }
                )
                print(runs[-1], flush=True)
    table = {}
    for start in ("init_student", "random"):
        for distilled in (True, False):
            some = [run for run in runs if run["start"] == start and run["distilled"] == distilled]
            means = {key: statistics.mean(run[key] for run in some) for key in ("dev_accuracy", "test_accuracy", "retention")}
            table[f"{start}, {'distilled' if distilled else 'cross-entropy'}"] = means
            print(f"{start:>12} {'distilled' if distilled else 'cross-entropy':>13}: test {100 * means['test_accuracy']:.2f}%, "
                  f"{100 * means['retention']:.1f}% of the teacher")  # fmt: skip
    batch = {
        **sst2.timing_batch(splits["test"], tokenizer),
        "labels": torch.tensor([row["labels"] for row in splits["test"][:32]]),
    }
    cost = step_cost(trainer_for, teacher, args.layers, batch, args.repeats)
    print(f"a step against (student's step + teacher's forward): {cost['ratio']['median']:.3f} "
          f"(quartiles {cost['ratio']['quartiles'][0]:.3f}-{cost['ratio']['quartiles'][1]:.3f})")  # fmt: skip
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    result = {"arguments": vars(args), "machine": machine, "teacher": of_teacher, "table": table, "runs": runs, "step": cost}
    output.mkdir(parents=True, exist_ok=True)
    path = output / ("benchmark_distillation_quick.json" if args.quick else "benchmark_distillation.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def step_cost(trainer_for, teacher, layers: int, batch: dict[str, torch.Tensor], repeats: int) -> dict:
    """A distilling step (count, forward, backward, update) over the same without a teacher plus its forward, all in turn."""
    trainers = {
        "distilled": trainer_for(init_student(teacher, layers), True),
        "alone": trainer_for(init_student(teacher, layers), False),
    }
    for trainer in trainers.values():
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
    batch = {name: value.to(teacher.device) for name, value in batch.items()}
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}

    def step(trainer):
        batches, count = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        trainer.training_step(trainer.model, batches[0], count)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def forward():
        with torch.no_grad():
            teacher(**unlabelled)

    kinds = {"distilled": lambda: step(trainers["distilled"]), "alone": lambda: step(trainers["alone"]), "teacher": forward}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for i in range(repeats + 3):
        for name, run in kinds.items():
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 3:  # the first warm up
                seconds[name].append(time.perf_counter() - begun)
    ratios = [d / (a + t) for d, a, t in zip(*seconds.values(), strict=True)]

    def spread(values):
        quarters = statistics.quantiles(values, n=4)
        return {"median": statistics.median(values), "quartiles": [quarters[0], quarters[2]]}

    return {"ratio": spread(ratios), "seconds": {name: spread(values) for name, values in seconds.items()}, "repeats": repeats}


if __name__ == "__main__":
    main()
