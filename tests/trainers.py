"""Small trainings that tests, and processes started by tests, share. `python -m tests.trainers ACTION FOLDER ...`."""

from __future__ import annotations

import json
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as T

import hf_compress as hc
from tests.zoo import build


def rows(count: int = 64, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """A task that a tiny model can learn: is the first token above 50?"""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 99, (count, length), generator=draw)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": (row[0] > 50).long()} for row in ids]


def pictures(count: int = 64) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(count, 3, 32, 32, generator=draw)
    return [{"pixel_values": x, "labels": (x.mean() > 0).long()} for x in data]


def trainer(folder, callbacks=(), family="bert", kind=T.Trainer, model=None, arguments=T.TrainingArguments, **options):
    torch.manual_seed(0)
    model = model if model is not None else build(family)[0]
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }
    data = pictures() if family in ("vit",) else rows()
    return kind(
        model,
        arguments(str(folder), **options),
        train_dataset=data,
        eval_dataset=data[:16],
        callbacks=list(callbacks),
    )


class Killer(T.TrainerCallback):
    def __init__(self, step: int, how=lambda: os.kill(os.getpid(), signal.SIGKILL)) -> None:
        self.step, self.how = step, how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def fingerprint(model) -> dict[str, float]:
    return {name: [*p.shape, p.double().sum().item(), p.double().square().sum().item()] for name, p in model.named_parameters()}


def main(action: str, folder: str, family: str = "bert", kind: str = "Trainer") -> None:
    torch.set_num_threads(1)
    cls = {"Trainer": T.Trainer, "CompressionTrainer": hc.CompressionTrainer}[kind]
    callback = hc.PruningCallback(heads=0.5, neurons=0.5, every=1)
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    if action == "killed":
        trainer(folder, [callback, Killer(6)], family, cls, **saving).train()
    elif action == "resumed":
        t = trainer(folder, [callback], family, cls, **saving)
        t.train(resume_from_checkpoint=True)
        report(folder, callback, t.model)
    elif action == "whole":
        t = trainer(folder, [callback], family, cls, **saving)
        t.train()
        report(folder, callback, t.model)
    elif action == "distributed":
        t = trainer(folder, [callback], family, cls, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        t.train()
        report(f"{folder}/rank{os.environ['RANK']}", callback, t.model)
        t.save_model(f"{folder}/model")
    elif action == "quantized":
        callback = hc.QuantizationCallback(4, every=3)
        t = trainer(folder, [callback], family, cls, per_device_train_batch_size=4)
        t.train()
        report(f"{folder}/rank{os.environ['RANK']}", callback, t.model)
    elif action == "fsdp":
        from transformers.distributed import DistributedConfig

        build(family)[0].save_pretrained(f"{folder}/dense{os.environ['RANK']}")
        plan = {"bert.encoder.layer.*": "free_full_weight", "bert.embeddings": "free_full_weight"}
        model = T.BertForSequenceClassification.from_pretrained(
            f"{folder}/dense{os.environ['RANK']}", distributed_config=DistributedConfig(fsdp_size=2, fsdp_plan=plan)
        )
        try:
            trainer(folder, [callback], model=model, save_only_model=True).train()
        except hc.CompressionError as error:
            print("REFUSED", error)


def report(folder: str, callback: hc.PruningCallback, model: torch.nn.Module) -> None:
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/result.json", "w") as file:
        json.dump({"plan": callback.plan.to_dict(), "weights": fingerprint(model)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
