"""The Trainer inside a step: checkpoints that a kill leaves behind are gone on from, and end the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from ..distillation import DistillationArguments, DistillationTrainer
from ..edits import CompressionError
from ..trainer import CompressionTrainer
from .tasks import Setup, embeddings, similarities

# the words of a recipe for TrainingArguments; other names of it that a step takes are its own
WORDS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
}
TRAINING = (
    *WORDS,
    "max_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "lr_scheduler_type",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "torch_compile",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "report_to",
    "use_cpu",
    "seed",
)
WHOLE = "whole.json"  # in a checkpoint: everything of it is on disk


class _Whole(TrainerCallback):
    """Mark a checkpoint once every callback has written its part: a kill may leave half of one."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / WHOLE).write_text(json.dumps({"step": state.global_step, "of": state.max_steps}))


class SimilarityTrainer(CompressionTrainer):
    """Mean squared error between the cosine of two sentences' embeddings and their score.

    As `CosineSimilarityLoss` of sentence-transformers. With a teacher, `alpha_task` times that and `alpha_kd` times
    `1 - cos(student's embedding, teacher's)`.
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, pooling: str, teacher: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is not the model's
        self.pooling, self.teacher = pooling, teacher
        if teacher is not None:
            width, other = (getattr(m.config, "hidden_size", None) for m in (self.model, teacher))
            if width != other:
                raise CompressionError(f"The teacher's embeddings have {other} numbers and the student's {width}.")
            teacher.eval().to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        mine = embeddings(model, inputs, self.pooling)
        left, right = mine.chunk(2)
        loss = nn.functional.mse_loss(nn.functional.cosine_similarity(left, right), inputs["labels"].to(mine.dtype))
        if self.teacher is not None:
            with torch.no_grad():
                theirs = embeddings(self.teacher, inputs, self.pooling)
            distance = (1 - nn.functional.cosine_similarity(mine, theirs)).mean()
            loss = self.args.alpha_task * loss + self.args.alpha_kd * distance
        return (loss, {"logits": nn.functional.cosine_similarity(left, right)}) if return_outputs else loss


def similarity_loss(setup: Setup, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(similarities(model, dict(batch), setup.pooling), batch["labels"])


def arguments_for(options: Mapping[str, Any], folder: str, seed: int, teacher: bool) -> TrainingArguments:
    """The arguments of a step's training.

    Raises:
        ValueError: whatever the arguments themselves refuse.
    """
    given = {WORDS.get(name, name): value for name, value in options.items()}
    known: dict[str, Any] = {
        "seed": seed,
        "save_strategy": "steps",
        "save_steps": 0.25,
        "save_total_limit": 2,
        "logging_steps": 50,
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not sys.stderr.isatty(),
        **given,
    }
    return (DistillationArguments if teacher else TrainingArguments)(folder, **known)


def train_(
    setup: Setup,
    model: Any,
    options: Mapping[str, Any],
    folder: Path,
    callbacks: list[TrainerCallback],
    teacher: Any = None,
) -> Any:
    """Train a model in place, going on from the last whole checkpoint in `folder` if there is one.

    Args:
        options (`dict`): of `TRAINING` and, with a teacher, of `DistillationArguments`.
        folder (`Path`): of this training's checkpoints, and of nothing else.
    """
    arguments = arguments_for(options, str(folder), options.get("seed", setup.seed), teacher is not None)
    set_seed(arguments.seed)
    common: dict[str, Any] = {
        "args": arguments,
        "train_dataset": setup.rows("train"),
        "data_collator": setup.collator("train"),
        "callbacks": [*callbacks, _Whole()],
    }
    if setup.name == "sentence-similarity":
        trainer: Any = SimilarityTrainer(model, **common, pooling=setup.pooling, teacher=teacher)
    elif teacher is not None:
        trainer = DistillationTrainer(model, **common, teacher_model=teacher)
    else:
        trainer = CompressionTrainer(model, **common)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return trainer.model


def last_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that is whole and not the end: resuming from the end would train one step more."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        try:
            mark = json.loads((path / WHOLE).read_text())
        except (OSError, ValueError):  # the kill came while it was written
            shutil.rmtree(path, ignore_errors=True)
            continue
        if mark["step"] < mark["of"]:
            found[mark["step"]] = path
    return str(found[max(found)]) if found else None
