"""`DistillationTrainer`: a Trainer whose loss also asks a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from ..host import first_rows
from ..plan import CompressionError
from ..probe import NoInputs, example_inputs
from ..structural import copy_of
from ..trainer import CompressionTrainer
from .arguments import DistillationArguments
from .compatible import as_teachers, changes_weights, check_pair, has_labels, hidden_states, match_layers, plain
from .losses import binary_kl_divergence, cosine_distance, kl_divergence, squared_error
from .projection import ProjectedStudent, load_projections, make_projections, save_projections
from .tasks import count_labels, count_rows, distilled_tokens, real_tokens
from .teacher import Teacher

Base = Trainer if TYPE_CHECKING else object
TERMS = ("task", "kd", "cos")


class DistillationMixin(Base):
    """Adds teachers to the loss of any `Trainer` class; write it first among the bases.

    What it does is said at `DistillationTrainer`. With `Seq2SeqTrainer`:

    ```python
    >>> from transformers import Seq2SeqTrainer
    >>> from hf_compress import CompressionTrainer
    >>> from hf_compress.distillation import DistillationMixin, Seq2SeqDistillationArguments
    >>> class Seq2SeqDistillationTrainer(DistillationMixin, CompressionTrainer, Seq2SeqTrainer):
    ...     pass  # args: Seq2SeqDistillationArguments

    ```
    """

    args: Any
    model: Any
    # every term is divided by its own count over the whole accumulated batch, of all processes
    loss_is_scaled_for_ga = True

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, teacher_model: Any = None, **kwargs: Any) -> None:
        args = DistillationArguments() if args is None else args
        if not isinstance(args, DistillationArguments):
            raise CompressionError(
                "args must be DistillationArguments (for Seq2SeqTrainer: Seq2SeqDistillationArguments), "
                f"got {type(args).__name__}."
            )
        if args.n_gpu > 1:
            raise CompressionError(
                f"One process sees {args.n_gpu} GPUs, where Trainer would use nn.DataParallel, which is not supported. "
                "Start one process per GPU (torchrun --nproc_per_node), or set CUDA_VISIBLE_DEVICES to one of them."
            )
        if getattr(args, "use_liger_kernel", False) and args.alpha_kd:
            raise CompressionError("use_liger_kernel computes the loss without logits, which distillation needs; turn it off.")
        if teacher_model is None and model is not None and any(changes_weights(c) for c in kwargs.get("callbacks") or ()):
            teacher_model = copy_of(model)  # as it is now: what it is compressed from
        teachers = as_teachers(teacher_model)
        self.distillation_task = None if model is None else check_pair(model, teachers, args)
        super().__init__(model, args, *positional, **kwargs)
        if model is None:  # made by model_init
            self.distillation_task = check_pair(self.model, teachers, args)
        # without a count every head takes the mean of its batch, and this class knows how many it was taken over
        self.model_accepts_loss_kwargs = False
        weights = self.args.teacher_weights or [1.0] * len(teachers)
        self._weights = [weight / sum(weights) for weight in weights]
        self._meet(self.model, teachers)
        self._sums: torch.Tensor | None = None  # of the terms since they were logged
        self._summed_since = 0

    # --- before training ---------------------------------------------------------------------------------------

    def _meet(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """What is made for one student and its teachers."""
        self.teachers = [Teacher(teacher, student, self.args.device) for teacher in teachers]
        self._teacher_only = frozenset().union(*(teacher.only for teacher in self.teachers)) - {*self.label_names}
        self._has_decoder = bool(getattr(plain(student).config, "is_encoder_decoder", False))
        self.layer_map, self.projections = self._match_layers(student) if self.args.alpha_cos else ({}, nn.ModuleDict())

    def call_model_init(self, trial: Any = None) -> Any:
        student = super().call_model_init(trial)
        if "teachers" in vars(self):  # `train` begins anew; while the Trainer itself is made there are none yet
            teachers = [teacher.model for teacher in self.teachers]
            self.distillation_task = check_pair(student, teachers, self.args)
            if self.place_model_on_device:
                self._move_model_to_device(student, self.args.device)
            self._meet(student, teachers)
        return student

    def _match_layers(self, student: Any) -> tuple[dict[int, int], nn.ModuleDict]:
        teacher = self.teachers[0]

        def match(batch: Mapping[str, Any]) -> Any:
            batches = self._for_student(batch), teacher.inputs(batch)
            return match_layers(student, teacher.model, self.args.layer_map, batches)

        try:
            found, widths = match(example_inputs(plain(student)))
        except NoInputs:
            rows = first_rows(self) if self.train_dataset is not None else None
            if rows is None:
                raise
            found, widths = match(rows)
        if widths and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise CompressionError(
                "Hidden states of other widths need learned projections, which do not work with FSDP or DeepSpeed yet. Use "
                "DistributedDataParallel (torchrun without them), or set alpha_cos=0."
            )
        if widths and self.optimizer is not None and self.model_init is None:  # then it is that of the training before
            raise CompressionError(
                "Hidden states of other widths need learned projections, which the optimizer that was given does not hold. "
                "Leave optimizers= out (optimizer_cls_and_kwargs= chooses a class), or set alpha_cos=0."
            )
        return found, make_projections(widths, student, self.args.seed)

    def create_optimizer(self, model: Any = None) -> Any:
        if len(self.projections) and model is None:
            model = ProjectedStudent(self.model, self.projections)
        return super().create_optimizer(model)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        if not training or not len(self.projections):
            return super()._wrap_model(model, training, dataloader)
        return self.accelerator.prepare_model(ProjectedStudent(self.model, self.projections))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # accelerate casts in the forward of what it prepared; with projections that is not the model that is evaluated
        if len(self.projections) and not self.model.training:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._signature_columns is not None:
            self._signature_columns += sorted(self._teacher_only)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if len(self.projections) and self.args.should_save:
            save_projections(self.projections, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if len(self.projections) and checkpoint is not None:
            load_projections(self.projections, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._sums = None
        return super().train(*args, **kwargs)

    # --- every step --------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step, and what they hold on all processes (see `_counts`)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(len(TERMS), dtype=torch.long, device=device)
        for batch in batches:
            counts += self._counts(batch).to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            counts = torch.as_tensor(self.accelerator.gather(counts)).view(-1, len(TERMS)).sum(0)
        return batches, counts

    def _counts(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """How many labels, predictions to compare and hidden states to compare a batch has: what each mean is over."""
        task = self.distillation_task or "rows"
        masks = (distilled_tokens(task, inputs), real_tokens(inputs, self._has_decoder))
        rows = count_rows(inputs)
        items = [count_labels(task, inputs) if self._is_labelled(inputs) else torch.zeros_like(rows)]
        items += [rows if mask is None else mask.sum() for mask in masks]
        return torch.stack(items)

    def _is_labelled(self, inputs: Mapping[str, Any]) -> bool:
        return any(inputs.get(name) is not None for name in self.label_names)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        if not model.training:  # evaluation knows no teacher
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        counts = self._counts(inputs)
        totals = counts if num_items_in_batch is None else num_items_in_batch.to(counts.device)
        # DistributedDataParallel will take the mean over processes, and each count is of all of them
        together = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = (self.accelerator.num_processes if together else 1) / totals.clamp_min(1)

        taught, states = self._teach(inputs)
        given = self._for_student(inputs)
        if self.layer_map:
            given["output_hidden_states"] = True
        terms: dict[str, torch.Tensor] = {}
        if self._is_labelled(inputs):
            mean, outputs = super().compute_loss(model, given, return_outputs=True)
            mean = torch.where(counts[0] > 0, mean, 0.0)  # over no labels it is not a number
            terms["task"] = mean.float() * counts[0]
        else:
            outputs = model(**given)
        if self.args.alpha_kd:
            terms["kd"] = self._distance(outputs, taught, inputs).sum()
        if self.layer_map:
            terms["cos"] = self._hidden_distance(outputs, states, inputs).sum()
        terms = {name: term * scale[TERMS.index(name)] for name, term in terms.items()}
        self._remember(terms)

        alphas = {name: getattr(self.args, f"alpha_{name}") for name in TERMS}
        weighted = [alphas[name] * term for name, term in terms.items() if alphas[name]]
        if not weighted:
            raise CompressionError(
                "Nothing is left of the loss: the batch has no labels, and alpha_kd and alpha_cos are 0. Set one above 0."
            )
        loss = torch.stack(weighted).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._for_student(inputs), *args, **kwargs)

    def _for_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch without the columns that only a teacher takes (token types for a DistilBERT, say)."""
        return {name: value for name, value in inputs.items() if name not in self._teacher_only}

    def _teach(self, inputs: Mapping[str, Any]) -> tuple[list[dict[str, torch.Tensor]], dict[int, torch.Tensor]]:
        """What all teachers predict, and the hidden states of the first."""
        if not self.args.alpha_kd and not self.layer_map:
            return [], {}
        first, states = self.teachers[0](inputs, tuple(self.layer_map.values()))
        others = self.teachers[1:] if self.args.alpha_kd else []
        return [first, *(teacher(inputs)[0] for teacher in others)], states

    def _distance(self, outputs: Any, taught: list[dict[str, torch.Tensor]], inputs: Mapping[str, Any]) -> torch.Tensor:
        """The distance to the teachers' predictions, of every row or token that counts."""
        temperature, mse = self.args.temperature, self.args.kd_loss == "mse"
        if self.distillation_task == "spans":
            exists = real_tokens(inputs)
            start, end = (
                squared_error(outputs[name], [t[name] for t in taught], self._weights, exists)
                if mse
                else kl_divergence(outputs[name], [t[name] for t in taught], self._weights, temperature, exists)
                for name in ("start_logits", "end_logits")
            )
            return (start + end) / 2
        student, teachers = outputs["logits"], [t["logits"] for t in taught]
        problem = self._problem_type() if self.distillation_task == "rows" else None
        if mse or problem == "regression":
            distances = squared_error(student, teachers, self._weights)
        elif problem == "multi_label_classification":
            distances = binary_kl_divergence(student, teachers, self._weights, temperature)
        else:
            distances = kl_divergence(student, teachers, self._weights, temperature)
        mask = distilled_tokens(self.distillation_task or "rows", inputs)
        return distances if mask is None else torch.where(mask, distances, 0.0)

    def _problem_type(self) -> str | None:
        """What the config says (the head has filled it in by now if there were labels), or else what one label means."""
        configs = [plain(self.model).config, *(plain(teacher.model).config for teacher in self.teachers)]
        known = next((found for c in configs if (found := getattr(c, "problem_type", None)) is not None), None)
        alone = getattr(configs[0], "num_labels", 2) == 1 and has_labels(plain(self.model))
        return known or ("regression" if alone else None)

    def _hidden_distance(self, outputs: Any, states: dict[int, torch.Tensor], inputs: Mapping[str, Any]) -> torch.Tensor:
        """The cosine distance of hidden states, of every real token (or every row, its mean over patches or frames)."""
        mine = hidden_states(outputs, self.model)
        pairs = [cosine_distance(mine[student], states[teacher]) for student, teacher in self.layer_map.items()]
        distances = torch.stack(pairs).mean(0)
        mask = real_tokens(inputs, self._has_decoder)
        return distances.mean(-1) if mask is None else torch.where(mask, distances, 0.0)

    # --- logs --------------------------------------------------------------------------------------------------

    def _remember(self, terms: dict[str, torch.Tensor]) -> None:
        """Add up the terms where they are, and how many there were: to read them would make the device wait every step."""
        if self._sums is None:
            self._sums, self._summed_since = torch.zeros(2, len(TERMS), device=self.args.device), self.state.global_step
        for i, name in enumerate(TERMS):
            if name in terms:
                self._sums[0, i] += terms[name].detach()
                self._sums[1, i] += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums is not None:
            steps = max(1, self.state.global_step - self._summed_since)
            everywhere = torch.as_tensor(self.accelerator.gather(self._sums)).view(-1, 2, len(TERMS)).mean(0)
            for name, total, count in zip(TERMS, *everywhere.tolist(), strict=True):
                if count:
                    logs[f"loss_{name}"] = total / steps
            self._sums = None
        super().log(logs, *args, **kwargs)


class DistillationTrainer(DistillationMixin, CompressionTrainer):
    """A `CompressionTrainer` whose student also learns from one teacher or several.

    `loss = α_task · L_task + α_kd · T² · KL(teacher ‖ student) + α_cos · (1 − cos(h_student, h_teacher))`
    (Hinton et al. 2015; Sanh et al. 2019, "DistilBERT"). L_task is the student's own loss, from the same forward pass. The
    mean is over rows (classification of texts and images, regression, start and end of answers) or over real tokens (see
    `tasks.distilled_tokens` for what -100 and padding leave out). What the logits are is read from the student's class and
    config: regression takes the squared error to the teacher, many labels one binary divergence each (their mean).

    - *Means over the whole batch.* Every term is divided by its own count over all rows or tokens of an optimizer step, over
      accumulation and processes, so the gradient depends on neither. Heads get no `num_items_in_batch` for that.
    - *Teachers* run in eval mode without gradients, in their own dtype, on the student's batch without labels (columns that
      only a teacher takes are kept for it). They are no part of the student, its checkpoints or an evaluation: `eval_loss` is
      the task's. Several are averaged as distributions; hidden states come from the first.
    - *Hidden states* of other widths meet in a learned projection, which is trained and checkpointed beside the student
      (`distillation_projections.safetensors`), never in it.
    - *Logs*: `loss_task`, `loss_kd` (with T²) and `loss_cos` beside `loss`, before their weights.

    Callbacks that prune work on the student while it learns; the teacher is not touched.

    Args:
        model (`PreTrainedModel`): the student; see `init_student`.
        args (`DistillationArguments`): a Trainer's arguments, and the weights of the terms.
        teacher_model (`PreTrainedModel` or a list of them): already loaded, with the student's vocabulary and labels. May be
            left out where `callbacks` holds a `PruningCallback`, `SparsityCallback` or `QuantizationCallback`: a copy of the
            student as it is then teaches it.
        **kwargs: what `Trainer` takes.

    Raises:
        CompressionError: at construction, a teacher that the student cannot learn from (`compatible.check_pair`), a layer map
            that does not fit, several GPUs in one process, projections under FSDP or DeepSpeed or with an optimizer of yours.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_compress.distillation import DistillationArguments, DistillationTrainer, init_student
    >>> teacher = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> rows = [{"input_ids": torch.tensor([5, 6, i]), "labels": i % 2} for i in range(8)]
    >>> arguments = DistillationArguments(
    ...     tempfile.mkdtemp(), temperature=2.0, alpha_cos=1.0, max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
    ...     logging_steps=2, disable_tqdm=True,
    ... )
    >>> trainer = DistillationTrainer(init_student(teacher, 1), arguments, teacher_model=teacher, train_dataset=rows)
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'loss': ...}
    >>> sorted(name for name in trainer.state.log_history[0] if name.startswith("loss"))
    ['loss', 'loss_cos', 'loss_kd', 'loss_task']

    ```
    """
