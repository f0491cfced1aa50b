"""`EarlyExitCallback`: train a model's early exits jointly, in anybody's Trainer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..edits import AddExits, CompressionError, shown
from ..host import calling_trainer, guard, log_beside, refuse_drifting, restore_best, restore_what_stock_lost, unguard
from ..plan import Plan
from ..probe import owners_in
from ..publish import card_in_
from ..refusals import check_adapters
from ..surgery import apply_
from .options import check_edit, resolve_exits, without_last
from .runtime import exit_options, replace_options_, set_exits_, take_exit_losses


class EarlyExitCallback(TrainerCallback):
    """Give a classifier early exits and train them with it, in a plain `Trainer` or any subclass.

    The heads are attached when the Trainer is made, before its optimizer and its DistributedDataParallel wrapper. While
    training, every row goes through every layer, and the model's loss is the weighted mean of all exits' and its own (see
    `attach_exits_`). Each exit's mean cross-entropy is logged beside the loss (`exit_loss_1`, ..., `final_loss`).

    Evaluations during training are the full model's unless `evaluate=True`, so that `load_best_model_at_end` chooses by
    what the model can do and not by a threshold that is not tuned yet. When training ends the exits are on, after an
    exception (Ctrl-C too) they are as they were before; `tune_exits_` picks a threshold.

    Every `evaluate` (and `predict`) tells how many layers its rows ran through, `mean(i + 1)` over rows that left after layer
    `i`, as `eval_mean_exit_depth`: the number of layers where no row leaves. It is among the metrics, so that it can choose
    the best model, and goes to `report_to`; it costs no second pass.

    Args:
        after (`Sequence[int]`): layers that an exit sits after, from 0. The last has the model's own head and gets none.
        criterion (`str`, defaults to `"confidence"`): `"entropy"`, `"confidence"` or `"patience"`.
        threshold (`float` or `list`, *optional*): when a row leaves, for all exits or one for each layer in `after`; see
            `resolve_exits`.
        pool (`str`, *optional*): what heads read: `"first"`, `"mean"` or `"last"` token; see `resolve_exits`.
        distil (`float`, defaults to 0.0): weight of self-distillation from the last layer, in [0, 1].
        temperature (`float`, defaults to 2.0): of self-distillation.
        weights (`str` or `Sequence[float]`, defaults to `"depth"`): of the exits' losses, see `attach_exits_`.
        evaluate (`bool`, defaults to `False`): whether rows leave in evaluations during training.
        inputs (`dict`, *optional*): a small batch, where none can be made from the config.

    Raises:
        CompressionError: at construction, options that mean nothing; when the Trainer is made, a model that cannot have such
            exits, a second `EarlyExitCallback`, `model_init`, an optimizer that was made before, FSDP or DeepSpeed; when
            training begins, a callback that was added later, or a loss that the model does not compute itself (label
            smoothing, `compute_loss_func`).

    Example:

    ```python
    >>> from hf_compress.exits.callback import EarlyExitCallback
    >>> EarlyExitCallback(after=[1, 3], criterion="entropy", threshold=0.2)
    EarlyExitCallback(after=[1, 3], criterion='entropy', threshold=0.2)

    ```
    """

    def __init__(
        self,
        after: Sequence[int],
        criterion: str = "confidence",
        threshold: float | list[float] | None = None,
        *,
        pool: str | None = None,
        distil: float = 0.0,
        temperature: float = 2.0,
        weights: str | Sequence[float] = "depth",
        evaluate: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.after = check_edit(after, criterion, threshold, pool, distil, temperature, weights)
        if not isinstance(evaluate, bool):
            raise CompressionError(f"evaluate is True or False, got {shown(evaluate)}.")
        if inputs is not None and (not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs)):
            raise CompressionError(f"inputs must be a batch as for model(**inputs), got {shown(inputs)}.")
        self.criterion, self.threshold, self.evaluate, self.inputs = criterion, threshold, evaluate, inputs
        self.options = {"pool": pool, "distil": distil, "temperature": temperature, "weights": weights}
        self.model: PreTrainedModel | None = None  # the one that has our exits
        self._trainer: Trainer | None = None
        self._joined = False
        self._enabled: bool | None = None  # whether rows left before we took over; None while we have not
        self._ran: tuple[Any, torch.Tensor, int] | None = None  # of an evaluation: its loader, the rows' depths summed, rows

    def __repr__(self) -> str:
        return f"EarlyExitCallback(after={self.after}, criterion={self.criterion!r}, threshold={self.threshold!r})"

    # --- events ------------------------------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs):
        trainer = calling_trainer()
        owner = _owner(model)
        check_adapters(model)  # type: ignore[arg-type]
        if trainer is not None:
            _check_trainer(trainer, owner, self)
        known = exit_options(owner)
        if known is None:
            options = resolve_exits(owner, self.after, self.criterion, self.threshold, inputs=self.inputs, **self.options)
            if isinstance(options["pool"], list):  # a plan says what was asked; what suits each layer follows from it
                options["pool"] = self.options["pool"]
            attach_and_record(owner, options, self.inputs)
        else:  # loaded from a checkpoint: it trains on
            depth = owner.__dict__["_exits"].depth
            wanted, threshold, weights = without_last(self.after, depth, self.threshold, self.options["weights"])
            if known["after"] != wanted or not _reads(self.options["pool"], known["pool"]):
                raise CompressionError(
                    f"This model has exits after {known['after']} already (pool={known['pool']!r}), and the callback asks for "
                    f"{self.after}; ask for the same, or detach_exits_(model) first."
                )
            set_exits_(owner, criterion=self.criterion, threshold=threshold)
            replace_options_(owner, {**{k: v for k, v in self.options.items() if k != "pool"}, "weights": weights})
        self.model, self._trainer, self._enabled = owner, trainer, None
        self._take_over()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.model is None:
            raise CompressionError(
                "EarlyExitCallback was added to a Trainer that was made already; the exits' weights must exist before the "
                "optimizer does. Pass it when the Trainer is made: Trainer(..., callbacks=[EarlyExitCallback(...)])."
            )
        if exit_options(self.model) is None or not any(m is self.model for m in _modules(model)):
            raise CompressionError("The Trainer trains another model than the one that this EarlyExitCallback gave exits to.")
        smoothing = getattr(args, "label_smoothing_factor", 0)
        trainer = self._trainer
        if smoothing or (trainer is not None and trainer.compute_loss_func is not None):
            what = f"label_smoothing_factor={smoothing}" if smoothing else "compute_loss_func"
            raise CompressionError(
                f"{what} computes the loss outside the model, so the exits would get none. Leave it out, or train the exits "
                "without it."
            )
        if getattr(args, "n_gpu", 0) > 1:
            raise CompressionError(
                "Exits do not work in DataParallel, whose copies share state; start one process a GPU (torchrun)."
            )
        refuse_drifting(trainer, type(self).__name__)
        if trainer is not None:
            restore_what_stock_lost(trainer, model)
        take_exit_losses(self.model)
        self._joined = False
        if trainer is None:
            self._take_over()
        else:
            guard(trainer, self._take_over, self._abandon)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._joined or self.model is None:
            return
        heads: Any = self.model.exit_heads
        reached = self.model.__dict__["_exits"].reached  # a model may drop layers at random
        expected = heads.values() if reached is None else [heads[str(index)] for index in reached]
        if any(p.requires_grad and p.grad is None for head in expected for p in head.parameters()):
            raise CompressionError(
                "No loss reached the exits; nothing was trained yet. The model must be given labels, and its own loss must be "
                "in what is minimised: a Trainer whose compute_loss leaves it out (or weighs it with 0) cannot train exits."
            )
        self._joined = bool(expected)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.model is None or "loss" not in (logs or {}):
            return
        losses = take_exit_losses(self.model)
        if losses:
            means = {name: _mean_over_processes(loss).item() for name, loss in losses.items()}
            log_beside(self._trainer, means)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        exits = None if self.model is None else self.model.__dict__.get("_exits")
        if exits is None or exits.left is None:
            return
        left: Any = exits.left + 1
        if self._trainer is not None:
            left = self._trainer.accelerator.gather_for_metrics(left)  # without rows that only fill up the last batch
        total, rows = left.sum(), len(left)
        if self._ran is not None and self._ran[0]() is eval_dataloader:  # else that evaluation broke off
            total, rows = total + self._ran[1], rows + self._ran[2]
        self._ran = (lambda: None) if eval_dataloader is None else weakref.ref(eval_dataloader), total, rows

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        depth = self._add_mean_depth(metrics)
        if depth:
            log_beside(self._trainer, depth)  # the Trainer has logged its metrics by now

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._add_mean_depth(metrics)

    def _add_mean_depth(self, metrics: dict[str, float] | None) -> dict[str, float]:
        """How many layers the rows of an evaluation ran through, put beside its other metrics."""
        ran, self._ran = self._ran, None
        if ran is None or metrics is None:
            return {}
        prefix = min((name for name in metrics if name.endswith("_runtime")), key=len, default="eval_runtime")
        depth = {f"{prefix.removesuffix('_runtime')}_mean_exit_depth": ran[1].item() / ran[2]}
        metrics.update(depth)
        return depth

    def on_push_begin(self, args, state, control, **kwargs):
        card_in_(calling_trainer(), None)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.model is None:
            return
        restore_best(args, state, model)
        self._hand_back(True)
        if self._trainer is not None:
            unguard(self._trainer)

    # --- who decides whether rows leave ------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Evaluations while training are the full model's, unless `evaluate`."""
        if self.model is not None and self._enabled is None:
            self._enabled = self.model.__dict__["_exits"].enabled
            set_exits_(self.model, enabled=self.evaluate)

    def _hand_back(self, enabled: bool) -> None:
        if self.model is not None and exit_options(self.model) is not None:
            set_exits_(self.model, enabled=enabled)
        self._enabled = None

    def _abandon(self) -> None:
        """Training failed: rows leave as they did before it."""
        self._ran = None
        if self._enabled is None:
            return
        if self.model is not None and exit_options(self.model) is not None:
            self.model.__dict__["_exits"].now = None  # hooks do not run after a Ctrl-C inside forward
        self._hand_back(self._enabled)
        if self._trainer is not None:
            unguard(self._trainer)


def attach_and_record(model: PreTrainedModel, options: dict[str, Any], inputs: Mapping[str, Any] | None) -> None:
    """Attach exits so that a checkpoint loads with them: the one place where the callback changes a model's structure."""
    edit = AddExits(**{field.name: options[field.name] for field in fields(AddExits)})
    apply_(model, Plan([edit]), inputs=inputs)


def _reads(asked: str | None, known: str | list[str]) -> bool:
    """Whether exits that are there pool as asked; of feature maps the mean is called so too."""
    given = known if isinstance(known, list) else [known]
    return asked is None or all(how in (asked, "maps") and (how == asked or asked == "mean") for how in given)


def _owner(model: Any) -> PreTrainedModel:
    owners = owners_in(model) if isinstance(model, nn.Module) else []
    if len(owners) != 1:
        raise CompressionError(
            f"EarlyExitCallback needs one transformers model in its Trainer, got {type(model).__name__} with {len(owners)}."
        )
    return owners[0][1]


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _check_trainer(trainer: Trainer, model: nn.Module, me: EarlyExitCallback) -> None:
    if any(isinstance(c, EarlyExitCallback) and c is not me for c in trainer.callback_handler.callbacks):
        raise CompressionError("Two EarlyExitCallbacks in one Trainer; use one, with all layers in `after`.")
    if trainer.model_init is not None:
        raise CompressionError(
            "model_init makes a new model for every training, which would have no exits. Pass model=... instead."
        )
    if trainer.optimizer is not None:
        raise CompressionError(
            "The Trainer was given an optimizer that was made before the exits and would not train them. Let the Trainer make "
            "it."
        )
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CompressionError(
            "EarlyExitCallback was not tried with weights that are sharded over processes (FSDP, DeepSpeed, tensor parallel), "
            "so it refuses them. Use DistributedDataParallel (torchrun without fsdp)."
        )


def _mean_over_processes(value: Any) -> Any:
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
