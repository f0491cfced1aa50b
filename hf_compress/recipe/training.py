"""The Trainer inside a step: checkpoints that a kill leaves behind are gone on from, and end the same."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler, set_seed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..discover import nearest
from ..distillation import DistillationArguments, DistillationTrainer
from ..edits import CompressionError
from ..trainer import CompressionTrainer
from .finite import FiniteCallback, NotFinite, check_losses, check_weights
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
ABOVE_0 = (
    "epochs",
    "learning_rate",
    "batch_size",
    "eval_batch_size",
    "gradient_accumulation_steps",
    "adam_epsilon",
    "logging_steps",
    "save_steps",
)
FROM_0 = ("weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers", "seed")
BELOW_1 = ("label_smoothing_factor", "adam_beta1", "adam_beta2")
UNLISTED = ("flyte", "azure_ml")  # trackers that work also where transformers does not list them as installed
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


def check_training(options: Mapping[str, Any], teacher: bool) -> None:
    """Refuse words of a training that mean nothing, or ask for what is not here.

    Args:
        options (`dict`): words of `TRAINING` and, with a teacher, of `DistillationArguments`.
        teacher (`bool`): whether there is one.

    Raises:
        CompressionError: a number out of range, an unknown schedule, a tracker or optimizer that is unknown or not
            installed, half precision that this machine does not have.
        ValueError: whatever transformers' own arguments refuse.

    Example:

    ```python
    >>> from hf_compress.recipe.training import check_training
    >>> check_training({"label_smoothing_factor": 1.5}, teacher=False)
    Traceback (most recent call last):
    ...
    hf_compress.checks.CompressionError: label_smoothing_factor must lie in [0, 1), got 1.5.

    ```
    """
    for word, value in options.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_range(word, value)
    for word, known in (
        ("lr_scheduler_type", [kind.value for kind in SchedulerType]),
        ("optim", [kind.value for kind in OptimizerNames]),
    ):
        if options.get(word) is not None and options[word] not in known:
            some = (
                f"Known: {', '.join(known)}."
                if len(known) < 16
                else f"Known: {', '.join(known[:9])} and more of transformers'."
            )
            raise CompressionError(f"{word} has no {options[word]!r}{nearest(options[word], known)} {some}")
    _check_trackers(options.get("report_to"))
    _check_precision(options)
    try:
        arguments = arguments_for(options, "unused", 0, teacher)
    except TypeError as error:
        raise CompressionError(str(error)) from error
    _check_optimizer(arguments)


def check_range(word: str, value: float) -> None:
    if not math.isfinite(value):
        raise CompressionError(f"{word} must be a finite number, got {value!r}.")
    if word == "max_steps" and value < 1:
        raise CompressionError(f"max_steps must be 1 or more, got {value!r}; leave it out to train by epochs.")
    if word in ABOVE_0 and value <= 0:
        raise CompressionError(f"{word} must be above 0, got {value!r}.")
    if word in FROM_0 and value < 0:
        raise CompressionError(f"{word} must be 0 or more, got {value!r}.")
    if word in BELOW_1 and not 0 <= value < 1:
        raise CompressionError(f"{word} must lie in [0, 1), got {value!r}.")


def _check_trackers(given: Any) -> None:
    names = [given] if isinstance(given, str) else given or []
    if names in ([], ["all"], ["none"]):
        return
    here = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", "all", *INTEGRATION_TO_CALLBACK])
            raise CompressionError(
                f"report_to has no {name!r}{nearest(name, list(INTEGRATION_TO_CALLBACK))} Known: {known} (the first two alone)."
            )
        if name not in here and name not in UNLISTED:
            raise CompressionError(
                f"report_to: {name} is not installed here; there is {', '.join(here) or 'none'}. Install it, or leave it out."
            )


def _check_precision(options: Mapping[str, Any]) -> None:
    cpu = bool(options.get("use_cpu")) or not torch.accelerator.is_available()
    if cpu and options.get("fp16"):
        raise CompressionError("fp16 needs a GPU, and this training runs on the CPU: leave fp16 out.")
    if cpu and options.get("bf16") and not options.get("use_cpu"):
        raise CompressionError("bf16 finds no GPU here: leave it out, or add use_cpu: true (which is slow).")


def _check_optimizer(arguments: TrainingArguments) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:  # not installed, or it needs words that a recipe has not
        name = getattr(arguments.optim, "value", arguments.optim)
        raise CompressionError(f"optim: {name} cannot be used here: {error}") from error
    try:
        get_scheduler(arguments.lr_scheduler_type, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), 1, 2)
    except (TypeError, ValueError) as error:  # some need numbers of their own
        name = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise CompressionError(f"lr_scheduler_type: {name} cannot be used in a recipe: {error}") from error


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
        "logging_first_step": True,  # the loss before any update, which the last one is compared with
        "logging_nan_inf_filter": False,  # it writes other numbers where a loss is none
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

    Raises:
        NotFinite: a `CompressionError`: a weight or loss is not finite; the checkpoints are removed.
    """
    arguments = arguments_for(options, str(folder), options.get("seed", setup.seed), teacher is not None)
    set_seed(arguments.seed)
    common: dict[str, Any] = {
        "args": arguments,
        "train_dataset": setup.rows("train"),
        "data_collator": setup.collator("train"),
        "callbacks": [*callbacks, FiniteCallback(), _Whole()],
    }
    if setup.name == "sentence-similarity":
        trainer: Any = SimilarityTrainer(model, **common, pooling=setup.pooling, teacher=teacher)
    elif teacher is not None:
        trainer = DistillationTrainer(model, **common, teacher_model=teacher)
    else:
        trainer = CompressionTrainer(model, **common)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        check_weights(trainer.model, arguments, "after the training")
        check_losses(trainer.state, arguments, setup.kind)
    except NotFinite:
        shutil.rmtree(folder, ignore_errors=True)  # a checkpoint on the way there is nothing to go on from
        raise
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
