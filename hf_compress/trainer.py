"""`CompressionTrainer`: transformers' Trainer, with what stock 5.23 gets wrong for us put right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from .files import staged
from .probe import quiet_run
from .resume import restore_weights


class CompressionTrainer(Trainer):
    """A `Trainer` for models that change their shape, and the base of the trainers to come.

    Use it like `Trainer`; callbacks such as `PruningCallback` work in both. It differs in four things:

    - *Resume and best model* load through `from_pretrained`: weights that are saved under other names than they have in
      memory are restored (stock leaves 32 of ViT's 40 parameters as they were, transformers issue 43701), and a dense
      model resumes from a pruned checkpoint.
    - *Loss scaling.* Many heads (BERT's, DistilBERT's, ModernBERT's) average over their micro-batch although their
      signature takes `num_items_in_batch`; stock then trains them at the loss times `gradient_accumulation_steps`
      (issue 47688). The first training batch is used to find out which kind a model is, and the loss is divided where
      it must be.
    - *Saving* is whole or not at all: a full disk leaves the checkpoint that was there.
    - A model whose forward does use `num_items_in_batch` is left alone.

    Example:

    ```python
    >>> from hf_compress import CompressionTrainer
    >>> from transformers import Trainer
    >>> issubclass(CompressionTrainer, Trainer)
    True

    ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_scaling_known = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not self._loss_scaling_known:
            self._loss_scaling_known = True
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None and self.compute_loss_func is None:
                self.model_accepts_loss_kwargs = self._uses_num_items(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _uses_num_items(self, inputs: dict[str, Any]) -> bool:
        """Whether the model's own loss depends on `num_items_in_batch`: one forward pass with 1 and one with 2."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            return self.model_accepts_loss_kwargs
        inputs = self._prepare_inputs(inputs)
        with quiet_run(self.model) as run, self.compute_loss_context_manager():
            losses = [run({**inputs, "num_items_in_batch": torch.tensor(n, device=self.args.device)}) for n in (1, 2)]
        values = [getattr(output, "loss", None) for output in losses]
        if not all(isinstance(value, torch.Tensor) for value in values):
            return self.model_accepts_loss_kwargs
        one, two = (torch.as_tensor(value).float() for value in values)
        return not torch.allclose(one, two)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model or self.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(target, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_weights(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            return super()._load_best_model()
        restore_weights(self.model, best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir or ".")
        with staged(folder, remove=_stale_weights(folder)) as stage:
            super()._save(os.fspath(stage), state_dict)


def _stale_weights(folder: Path) -> list[str]:
    """Weight files that a save with another sharding would leave beside the new ones."""
    return [path.name for path in folder.glob("model*.safetensors*")] if folder.is_dir() else []
