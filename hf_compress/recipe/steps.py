"""The steps of a recipe: which words each takes (those of the classes it stands for), whether they make sense, what they do.

A step is one entry of `STEPS`. `check` looks at the words alone, `rehearse` changes a model's structure as the step will, with
nothing trained and nothing scored, and `run` does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..discover import discover
from ..distillation import init_student
from ..distillation.compatible import check_pair
from ..edits import AddExits, CompressionError, KeepLayers
from ..exits import exit_options
from ..exits.callback import EarlyExitCallback
from ..exits.tune import tune_exits_
from ..measure import measure
from ..pictures import save_pruned
from ..plan import Plan
from ..planners import plan_depthwise, plan_low_rank, plan_quantization
from ..pruning import plan_pruning
from ..pruning.callback import PruningCallback
from ..pruning.prices import blocks_for
from ..pruning.select import check_options, check_seed, trial_plan
from ..pruning.staged import TARGETS
from ..pruning.target import prune_to
from ..quantization.callback import QuantizationCallback
from ..surgery import apply_
from .shares import check_share
from .tasks import Setup
from .training import TRAINING, arguments_for, check_range, check_training, similarity_loss, train_
from .words import HERE, distillation_words, training_words, words_of

logger = logging.get_logger(__name__)

MOST_ROWS = 65_536  # of a batch that is timed

CALLBACK_ONLY = {
    "prune": set(words_of(PruningCallback)) - set(words_of(plan_pruning)) - set(TARGETS),
    "quantize": set(words_of(QuantizationCallback)) - set(words_of(plan_quantization)),
}


@dataclass(frozen=True)
class Step:
    """One step of a recipe: its name, and the words under it as they were written."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def own(self, *sources: Any) -> dict[str, Any]:
        """The words that these functions take."""
        names = words_of(*sources)
        return {name: value for name, value in self.options.items() if name in names}

    @property
    def training(self) -> dict[str, Any]:
        """The words of the training; those of the distillation too where there is a teacher."""
        names = set(TRAINING)
        if self.teacher is not None:
            names |= set(distillation_words()) - (set(words_of(EarlyExitCallback)) if self.name == "exits" else set())
        return {name: value for name, value in self.options.items() if name in names}

    @property
    def trains(self) -> bool:
        given = self.options.get("epochs") is not None or self.options.get("max_steps", -1) > 0
        return STEPS[self.name].always_trains or given

    @property
    def teacher(self) -> str | None:
        """`"finetuned"`, `"previous"`, a path or Hub id; None: there is none."""
        given = self.options.get("teacher", "finetuned" if self.name == "distill" else None)
        return None if given == "none" else given


@dataclass(frozen=True)
class Stage:
    """What a running step has at hand.

    Attributes:
        folder (`Path`): for the checkpoints of its training.
        teacher (`Callable`): gives the teacher's model.
        greater_is_better, metric: of the recipe, for thresholds.
    """

    setup: Setup
    folder: Path
    teacher: Callable[[str], Any]
    metric: Any


@dataclass(frozen=True)
class StepKind:
    """What a step is.

    Args:
        words (`dict`): what it takes, with types.
        check (`Callable`): refuses words that mean nothing (raises `ValueError`s).
        rehearse (`Callable`): `(step, model, setup) -> model`.
        run (`Callable`): `(step, model, stage) -> (model, Plan)`.
        always_trains (`bool`): also without `epochs`.
    """

    words: dict[str, Any]
    check: Callable[[Step], None]
    rehearse: Callable[[Step, Any, Setup], Any]
    run: Callable[[Step, Any, Stage], tuple[Any, Plan]]
    always_trains: bool = False


def check_step(step: Step) -> None:
    """Refuse words that mean nothing, before any model is looked at.

    Raises:
        ValueError: with the reason (a `CompressionError`, or what transformers' own arguments raise).
    """
    options = step.options
    for word in ("length", "calibration_samples"):
        value = options.get(word)
        if value is not None and not value > 0:
            raise CompressionError(f"{word} must be above 0, got {value!r}.")
    for word, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CompressionError(f"{word} must be a finite number, got {value!r}.")
        if word in TRAINING and isinstance(value, int | float) and not isinstance(value, bool):
            check_range(word, value)
    for word, least in (("max_drop", 0), ("mean_depth", 1)):
        if isinstance(options.get(word), int | float) and options[word] < least:
            raise CompressionError(f"{word} must be {least} or more, got {options[word]!r}.")
    words = [w for w in (*TRAINING, "teacher", *distillation_words()) if w in options and w not in _own_words(step)]
    if words and step.name != "measure" and not step.trains:
        raise CompressionError(f"{words[0]} is a word of training, and this step does not train: add epochs: or max_steps:.")
    if step.trains and step.teacher is None:
        alone = [w for w in distillation_words() if w in options and w not in _own_words(step)]
        if alone:
            raise CompressionError(f"{alone[0]} weighs a teacher, and this step has none: add teacher: previous.")
    if step.trains:
        check_training(step.training, step.teacher is not None)
    STEPS[step.name].check(step)


def _own_words(step: Step) -> set[str]:
    """Words that mean something else in this step than in training."""
    return set(words_of(EarlyExitCallback)) if step.name == "exits" else {"seed"} if step.name == "prune" else set()


def _train(step: Step, model: Any, stage: Stage, callbacks: list[Any]) -> Any:
    teacher = None if step.teacher is None else stage.teacher(step.teacher)
    return train_(stage.setup, model, step.training, stage.folder, callbacks, teacher)


def _nothing(step: Step, *_: Any) -> None:
    return None


def _as_it_is(step: Step, model: Any, setup: Setup) -> Any:
    return model


def _applied(model: Any, plan: Plan, setup: Setup) -> Any:
    return apply_(model, plan, inputs=setup.inputs(model))


def calibration(step: Step, setup: Setup) -> list[dict[str, torch.Tensor]]:
    return list(setup.batches("train", step.options.get("calibration_samples", 256), size=16))


# --- finetune ----------------------------------------------------------------------------------------------------


def _finetune(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    return _train(step, model, stage, []), Plan()


# --- prune -------------------------------------------------------------------------------------------------------


def _check_prune(step: Step) -> None:
    aims = _targets(step)
    if not aims and not step.options.get("heads") and not step.options.get("neurons"):
        raise CompressionError("prune removes nothing: set heads: or neurons: to a fraction above 0, or speedup: above 1.")
    if "length" in step.options and "speedup" not in aims:
        raise CompressionError("length is that of the texts that are timed; give it with speedup:, or leave it out.")
    if step.trains:
        if "calibration_samples" in step.options:
            raise CompressionError("calibration_samples scores without training, and this step trains; leave one of them out.")
        early = [word for word in ("channels", "tune") if step.options.get(word)]
        if early:
            raise CompressionError(
                f"{early[0]} is a word of pruning without training: leave it, or epochs: and max_steps:, out."
            )
        PruningCallback(**step.own(PruningCallback))
        return
    late = sorted((CALLBACK_ONLY["prune"] & step.options.keys()) - ({"tries"} if aims else set()))
    if late:
        raise CompressionError(f"{late[0]} is a word of pruning while training: add epochs: or max_steps:, or leave it out.")
    if aims:
        idle = sorted(step.own(plan_pruning).keys() - {"heads", "neurons"})
        if idle:
            raise CompressionError(f"{idle[0]} would do nothing with {next(iter(aims))}: leave it out.")
        PruningCallback(**aims, **step.own(plan_pruning), **_tries(step))
        return
    check_options(
        **{
            "heads": 0.0, "neurons": 0.0, "score": "taylor", "scope": "global", "round_to": None, "uniform": False,
            **{k: v for k, v in step.own(plan_pruning).items() if k not in ("seed", "tune")},
        }
    )  # fmt: skip
    check_seed(step.options.get("seed", 0))


def _targets(step: Step) -> dict[str, Any]:
    """What is asked for, where it is no share: a speed-up, or so many times fewer of something."""
    return {name: step.options[name] for name in TARGETS if step.options.get(name) is not None}


def _tries(step: Step) -> dict[str, Any]:
    return {"tries": step.options["tries"]} if "tries" in step.options else {}


def _typical(step: Step, setup: Setup) -> dict[str, torch.Tensor]:
    """The batch that a speed-up is meant for: of 32 rows, as long as the run measures if nothing else is said."""
    return setup.timing_batch(32, step.options.get("length") or min(64, setup.options.max_length or 64))


def _rehearse_prune(step: Step, model: Any, setup: Setup) -> Any:
    if _targets(step):
        structure = discover(model)
        return _applied(model, trial_plan(model, structure, blocks_for(model, structure, True, True)), setup)
    options = {k: v for k, v in step.own(PruningCallback).items() if k in words_of(plan_pruning)}
    plan = plan_pruning(model, **{**options, "score": "random", "seed": 0})
    check_share(discover(model), options)
    return _applied(model, plan, setup)


def _prune(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    setup = stage.setup
    if step.trains:
        inputs = _typical(step, setup) if _targets(step) else setup.inputs(model)
        callback = PruningCallback(**step.own(PruningCallback), inputs=inputs)
        model = _train(step, model, stage, [callback])
        return model, callback.plan or Plan()
    if _targets(step):
        rows = list(setup.batches("train", step.options.get("calibration_samples", 512), size=32))
        pruned = prune_to(model, rows, **_targets(step), **_tries(step), inputs=_typical(step, setup))
        logger.info(f"{step.name}: {pruned}")
        save_pruned(stage.folder, pruned.to_dict())
        return model, pruned.plan
    batches: Any = calibration(step, setup)
    options = step.own(plan_pruning)
    if setup.name == "sentence-similarity":  # the loss is not the model's own
        labels = [batch.pop("labels") for batch in batches]
        following = cycle(labels)  # channels and heads take a pass each

        def loss_fn(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
            given = {**batch, "labels": next(following)}
            return similarity_loss(setup, lambda **_: outputs, given)  # type: ignore[arg-type]

        options["loss_fn"] = loss_fn
    plan = plan_pruning(model, batches, **options)
    if not len(plan):  # with round_to, what goes can round to nothing in every block
        logger.warning(f"{step.name} removed nothing: what was to go is less than round_to in every block.")
    return _applied(model, plan, setup), plan


# --- distill -----------------------------------------------------------------------------------------------------


def _rehearse_distill(step: Step, model: Any, setup: Setup) -> Any:
    layers = step.options.get("layers")
    if layers is None:
        return model
    if exit_options(model) is not None:
        raise CompressionError("layers: of a model with exits cannot be chosen; distil first, then add exits.")
    return init_student(model, layers, inputs=setup.inputs(model))


def _distill(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    layers = step.options.get("layers")
    plan = Plan()
    if layers is not None:
        before = {name: len(stack) for name, stack in discover(model).stacks.items()}
        student = init_student(model, layers, inputs=stage.setup.inputs(model))
        chosen = layers if isinstance(layers, dict) else dict.fromkeys(before, layers)
        kept: dict[str, Any] = {
            s: [i * before[s] // n for i in range(n)] if isinstance(n, int) else n for s, n in chosen.items()
        }
        only = len(before) == 1
        plan = Plan([KeepLayers(tuple(k), None if only else s) for s, k in kept.items() if len(k) < before[s]])
        model = student
    return _train(step, model, stage, []), plan


# --- quantize ----------------------------------------------------------------------------------------------------


def _check_quantize(step: Step) -> None:
    if "bits" not in step.options:
        raise CompressionError("quantize needs bits: 8, 4, 3 or 2.")
    late = sorted(CALLBACK_ONLY["quantize"] & step.options.keys())
    if late and not step.trains:
        raise CompressionError(f"{late[0]} is a word of quantizing while training: add epochs: or max_steps:, or leave it out.")
    QuantizationCallback(**step.own(QuantizationCallback))


def _plan_quantize(step: Step, model: Any, setup: Setup) -> Plan:
    return plan_quantization(model, **step.own(plan_quantization), inputs=setup.inputs(model))


def _rehearse_quantize(step: Step, model: Any, setup: Setup) -> Any:
    return _applied(model, _plan_quantize(step, model, setup), setup)


def _quantize(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    if not step.trains:
        plan = _plan_quantize(step, model, stage.setup)
        return _applied(model, plan, stage.setup), plan
    callback = QuantizationCallback(**step.own(QuantizationCallback), inputs=stage.setup.inputs(model))
    model = _train(step, model, stage, [callback])
    return model, callback.plan or Plan()


# --- low_rank and depthwise --------------------------------------------------------------------------------------


def _check_low_rank(step: Step) -> None:
    if ("ratio" in step.options) == ("rank" in step.options):
        raise CompressionError("low_rank needs one of ratio: (the share of the weights that stays) and rank:.")
    ratio, rank = step.options.get("ratio"), step.options.get("rank")
    if ratio is not None and not 0 < ratio < 1:
        raise CompressionError(f"ratio is the fraction of a module's weights that stays, in (0, 1), got {ratio!r}.")
    if rank is not None and rank < 1:
        raise CompressionError(f"rank must be 1 or more, got {rank!r}.")


def _rehearse_low_rank(step: Step, model: Any, setup: Setup) -> Any:
    return _applied(model, plan_low_rank(model, **step.own(plan_low_rank)), setup)


def _low_rank(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in calibration(step, stage.setup)]
    plan = plan_low_rank(model, batches, **step.own(plan_low_rank))
    model = _applied(model, plan, stage.setup)
    return _train(step, model, stage, []) if step.trains else model, plan


def _rehearse_depthwise(step: Step, model: Any, setup: Setup) -> Any:
    return _applied(model, plan_depthwise(model, **step.own(plan_depthwise)), setup)


def _depthwise(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    plan = plan_depthwise(model, **step.own(plan_depthwise))
    model = _applied(model, plan, stage.setup)
    return _train(step, model, stage, []) if step.trains else model, plan


# --- exits -------------------------------------------------------------------------------------------------------


def _check_exits(step: Step) -> None:
    if "after" not in step.options:
        raise CompressionError("exits needs after: a list of the layers that an exit sits after, from 0.")
    EarlyExitCallback(**step.own(EarlyExitCallback))
    if "threshold" in step.options and {"mean_depth", "max_drop"} & step.options.keys():
        raise CompressionError("threshold is found where max_drop: or mean_depth: is given; leave one of them out.")


def _edit_exits(step: Step) -> AddExits:
    names = {f.name for f in fields(AddExits)}
    return AddExits(**{k: v for k, v in step.own(EarlyExitCallback).items() if k in names})


def _rehearse_exits(step: Step, model: Any, setup: Setup) -> Any:
    if setup.kind != "classes":
        raise CompressionError(f"Early exits need one class a row; {setup.name} here predicts {setup.kind}.")
    if exit_options(model) is not None:
        raise CompressionError("This model has exits already; one step of exits, with all layers in after:, is enough.")
    return _applied(model, Plan([_edit_exits(step)]), setup)


def _exits(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    setup = stage.setup
    callback = EarlyExitCallback(**step.own(EarlyExitCallback), inputs=setup.inputs(model))
    model = _train(step, model, stage, [callback])
    bounds = {name: step.options[name] for name in ("mean_depth", "max_drop") if step.options.get(name) is not None}
    if bounds:
        sign = 1 if stage.metric.greater_is_better else -1
        metric = stage.metric.compute

        def score(logits: torch.Tensor, labels: torch.Tensor) -> float:
            return sign * metric(logits.argmax(-1).numpy(), labels.numpy())

        tune_exits_(model, list(setup.batches("validation")), **bounds, metric=score)
        found: Any = exit_options(model)
        logger.info(f"{step.name}: rows leave by {found['criterion']} at the threshold {found['threshold']:.4g}.")
        return model, Plan([replace(_edit_exits(step), threshold=found["threshold"])])
    return model, Plan([_edit_exits(step)])


# --- measure -----------------------------------------------------------------------------------------------------


def _check_measure(step: Step) -> None:
    sizes = step.options.get("batch_sizes")
    if sizes is not None and (not sizes or not all(type(s) is int and 0 < s <= MOST_ROWS for s in sizes)):
        raise CompressionError(f"batch_sizes is a list of numbers of rows up to {MOST_ROWS:,}, such as [1, 32], got {sizes!r}.")
    if step.options.get("repeats", 1) < 1 or step.options.get("warmup", 0) < 0:
        raise CompressionError("repeats must be 1 or more and warmup 0 or more.")


def _measure(step: Step, model: Any, stage: Stage) -> tuple[Any, Plan]:
    return model, Plan()  # the run measures at its end, as this step says


def _words(*sources: Any, also: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {**training_words(), **distillation_words(), "teacher": str}
    return {**found, **words_of(*sources), **{word: HERE[word] for word in also}}


STEPS: dict[str, StepKind] = {
    "finetune": StepKind(training_words(), _nothing, _as_it_is, _finetune, True),
    "prune": StepKind(
        _words(PruningCallback, plan_pruning, also=("calibration_samples", "length")), _check_prune, _rehearse_prune, _prune
    ),
    "distill": StepKind(_words(also=("layers",)), _nothing, _rehearse_distill, _distill, True),
    "quantize": StepKind(_words(QuantizationCallback), _check_quantize, _rehearse_quantize, _quantize),
    "low_rank": StepKind(
        _words(plan_low_rank, also=("calibration_samples",)), _check_low_rank, _rehearse_low_rank, _low_rank
    ),
    "depthwise": StepKind(_words(plan_depthwise), _nothing, _rehearse_depthwise, _depthwise),
    "exits": StepKind(
        {**_words(EarlyExitCallback), **{w: float | None for w in ("mean_depth", "max_drop")}},
        _check_exits,
        _rehearse_exits,
        _exits,
        True,
    ),
    "measure": StepKind(
        {**words_of(measure), **{w: HERE[w] for w in ("length",)}}, _check_measure, _as_it_is, _measure
    ),
}  # fmt: skip


def check_teacher(step: Step, student: Any, teacher: Any, setup: Setup) -> None:
    """Refuse a teacher that this student cannot learn from."""
    if setup.name == "sentence-similarity":
        for what in ("hidden_size", "vocab_size"):
            mine, theirs = (getattr(model.config, what, None) for model in (student, teacher))
            if mine != theirs:
                raise CompressionError(f"The teacher has a {what} of {theirs} and the student one of {mine}.")
        late = [w for w in distillation_words() if w in step.options and w not in ("alpha_task", "alpha_kd")]
        if late:
            raise CompressionError(f"{late[0]} would do nothing in {setup.name}: leave it out.")
    else:
        check_pair(student, [teacher], arguments_for(step.training, "unused", 0, True))  # type: ignore[arg-type]
