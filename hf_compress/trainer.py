"""`CompressionTrainer`: transformers' Trainer, with what stock 5.23 gets wrong for us put right."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, Trainer

from .edits import CompressionError
from .files import staged
from .plan import Plan
from .probe import quiet_run
from .publish import is_refusal_of_hub, push_failed, reason, trainer_card_
from .report import Report
from .resume import restore_weights

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class CompressionTrainer(Trainer):
    """A `Trainer` for models that change their shape, and the base of the trainers to come.

    Use it like `Trainer`; callbacks such as `PruningCallback` work in both. It differs in five things:

    - *Resume and best model* load through `from_pretrained`: weights that are saved under other names than they have in
      memory are restored (stock leaves 32 of ViT's 40 parameters as they were, transformers issue 43701), and a dense
      model resumes from a pruned checkpoint.
    - *Loss scaling.* Many heads (BERT's, DistilBERT's, ModernBERT's) average over their micro-batch although their
      signature takes `num_items_in_batch`; stock then trains them at the loss times `gradient_accumulation_steps`
      (issue 47688). The first training batch is used to find out which kind a model is, and the loss is divided where
      it must be.
    - *Saving* is whole or not at all: a full disk leaves the checkpoint that was there.
    - *Publishing* (`push_to_hub`) writes our card, with the numbers of `push_to_hub(report=...)`; what was edited by hand on
      the Hub stays. What fails says why and how to go on.
    - A model whose forward does use `num_items_in_batch` is left alone.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
    >>> from hf_compress import CompressionTrainer
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> rows = [{"input_ids": torch.tensor([5, 6, i]), "labels": i % 2} for i in range(8)]
    >>> arguments = TrainingArguments(
    ...     tempfile.mkdtemp(), max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, use_cpu=True,
    ...     report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    ... )
    >>> trainer = CompressionTrainer(model, arguments, train_dataset=rows)
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    >>> trainer.model_accepts_loss_kwargs  # BERT's head takes num_items_in_batch and ignores it
    False

    ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_scaling_known = False
        self._push: dict[str, Any] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1:
            # an evaluation before training marks the model as prepared, and stock then leaves DistributedDataParallel off
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not self._loss_scaling_known:
            uses = self._uses_num_items(inputs) if num_items_in_batch is not None else None
            if uses is not None:
                self._loss_scaling_known = True
                self.model_accepts_loss_kwargs = uses
        return super().training_step(model, inputs, num_items_in_batch)

    def _uses_num_items(self, inputs: dict[str, Any]) -> bool | None:
        """Whether the model's own loss depends on `num_items_in_batch`: one forward pass with 1 and one with 2.

        None where this batch cannot tell (all its labels are ignored): the next one is asked. Ranks agree.
        """
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled) and isinstance(self.model, PreTrainedModel)
        if not plain or not self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return self.model_accepts_loss_kwargs
        inputs = self._prepare_inputs(inputs)
        model: Any = self.model
        with quiet_run(model) as run, self.compute_loss_context_manager():
            outputs = [run({**inputs, "num_items_in_batch": torch.tensor(n, device=self.args.device)}) for n in (1, 2)]
        one, two = (torch.as_tensor(getattr(o, "loss", None) or 0.0).float().cpu() for o in outputs)
        answer = -1 if not torch.isfinite(one) or one == 0 else int(not torch.allclose(one, two))
        if dist.is_initialized():
            agreed = torch.tensor(answer, device=self.args.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            answer = int(agreed)
        return None if answer < 0 else bool(answer)

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
        whole = isinstance(self.accelerator.unwrap_model(self.model), PreTrainedModel)  # adapters replace no weights
        writes = whole and self.args.should_save  # another process would remove what the first has just put there
        with staged(folder, remove=_stale_weights(folder) if writes else ()) as stage:
            super()._save(os.fspath(stage), state_dict)

    def create_model_card(self, *args: Any, report: Report | None = None, **kwargs: Any) -> None:
        """Our card of a compressed model (see `card.render_card`), stock's of another; takes stock's arguments.

        Args:
            report (`Report`, *optional*): what `measure` found. Without one the card has no numbers.
        """
        plans = [plan for callback in self.callback_handler.callbacks if isinstance(plan := vars(callback).get("plan"), Plan)]
        given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        if not trainer_card_(self, given, report, plans[-1] if plans else None, **self._push):
            super().create_model_card(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token=token, **({} if private is None else {"private": private}))  # transformers 5.20 has none
        except Exception as error:
            if not is_refusal_of_hub(error):
                raise
            repo_id = self.args.hub_model_id or Path(self.args.output_dir or ".").absolute().name
            raise CompressionError(f"Could not make the repository {repo_id}: {reason(error, repo_id)}.") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`, with our card; `report=` gives it numbers.

        Raises:
            PushError: a `CompressionError`: the Hub or the way to it refused; the model is saved in the output folder.
        """
        if not self.args.push_to_hub:  # stock makes the repository before it saves, and that may be refused
            self.save_model(_internal_call=True)
        self._push = {"token": token, "revision": revision}
        try:
            if private is not None:
                kwargs["private"] = private
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        except Exception as error:
            if not is_refusal_of_hub(error):
                raise
            folder = Path(self.args.output_dir or ".")
            repo_id = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
            raise push_failed(f"push to {repo_id}", error, folder, repo_id, private, revision) from error
        finally:
            self._push = {}


def _stale_weights(folder: Path) -> list[str]:
    """Weight files that a save with another sharding would leave beside the new ones."""
    return [path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)] if folder.is_dir() else []
