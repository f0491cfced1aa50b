"""A recipe's model and data, opened and tried: what would fail after hours of training fails here, with its line."""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..edits import CompressionError, Quantize
from ..probe import longest_text
from ..publish import plan_of_config
from .data import open_data
from .digests import OWN_TEACHERS
from .labels import find_labels
from .metrics import DEFAULTS, Metric, find_metric
from .reading import Key, RecipeError, noting, refuse
from .rows import locate
from .schema import Recipe, guess, one_line
from .sentences import pooling_of
from .steps import STEPS, check_teacher
from .tasks import HALF, TASKS, Setup, first_block, quiet


def open_recipe(recipe: Recipe) -> tuple[Setup, tuple[Metric, ...]]:
    """What a recipe's steps need: model, data, processor, metrics, all known to be there and to fit each other.

    Raises:
        RecipeError: a model, file, split or column that is not there; a metric that does not fit the task. What is wrong with
            the model and what is wrong with the data are told together.
    """
    source, task, options = recipe.source, TASKS[recipe.task], recipe.data
    key: Key = ("model", "id") if ("model", "id") in source.lines else ("model",)
    mistakes: list[RecipeError] = []
    name = config = processor = data = None
    with noting(mistakes):
        name, config = _config(recipe, key)
        processor = _processor(name, recipe, task.reads, key)
        if task.reads == "text":
            options = replace(options, max_length=_length(recipe, config, processor))
    with noting(mistakes):
        data = open_data(options, task.columns, source, recipe.seed, tunes=_tunes(recipe))
    refuse(mistakes)
    assert name is not None and data is not None  # nothing was refused
    if task.reads == "audio":
        data = _undecoded(data)
    if str(getattr(config, "dtype", None)).removeprefix("torch.") in ("float16", "bfloat16"):
        data.notes.append(HALF)
    trained = _has_head(config, task)
    labels, kind, changes = None, "loss", {}
    if task.wanted:
        known = _classes_of(config) if trained else []
        labels = find_labels(data, options, _wanted(recipe, task.wanted), known, source)
        kind = labels.kind
        if recipe.task != "sentence-similarity":
            changes, trained = _head(labels, config, trained)
    try:
        pooling = pooling_of(name, recipe.revision) if recipe.task == "sentence-similarity" else "mean"
    except CompressionError as error:
        raise source.error(key, one_line(error)) from error
    setup = Setup(
        recipe.task, task, data, options, labels, processor, kind, name, recipe.revision, changes,
        bool(task.wanted) and not trained and recipe.task != "sentence-similarity", recipe.seed, pooling,
    )  # fmt: skip
    if kind == "loss":
        for split in ("train", "measured"):
            if not first_block(setup, split) and len(list(setup.rows(split))) == 0:
                raise source.error(("data",), f"the rows of {data.name(split)!r} hold no text.")
    classes = None if labels is None else len(labels.names)
    metrics = []
    for i, wanted in enumerate(recipe.metric or (DEFAULTS[kind],)):
        place: Key = ("metric", i) if ("metric", i) in source.lines else ("metric",)
        with noting(mistakes):
            try:
                metrics.append(find_metric(wanted, kind, recipe.task, classes))
            except CompressionError as error:
                raise source.error(place, one_line(error)) from error
    refuse(mistakes)
    if classes == 2 and kind == "classes" and any(metric.name == "f1" for metric in metrics):
        data.notes.append(f"F1 is that of the class {labels.names[1]!r}.")  # type: ignore[union-attr]
    if setup.fresh and not (recipe.steps[0].trains and recipe.steps[0].name in ("finetune", "distill")):
        raise source.error(
            ("steps", 0),
            f"{recipe.model!r} has no trained head for {recipe.task} with these labels, so what this step does to it would "
            "mean nothing: begin with finetune.",
        )
    try:
        next(iter(setup.batches("train", 2)))
        next(iter(setup.batches("measured", 2)))
    except CompressionError as error:
        raise source.error(("data",), one_line(error)) from error
    except Exception as error:  # a tokenizer or image processor fails in its own ways
        raise source.error(("data",), f"the first rows make no batch: {first_line(error)}") from error
    return setup, tuple(metrics)


def _config(recipe: Recipe, key: Key) -> tuple[str, Any]:
    """The model as `from_pretrained` takes it, and its config."""
    from transformers import AutoConfig

    source = recipe.source
    path = locate(recipe.model, source)
    name = os.fspath(path) if path.is_dir() else recipe.model
    if path.is_dir() and not (path / "config.json").is_file():
        raise source.error(key, f"the folder {recipe.model!r} holds no model: it has no config.json.")
    if path.is_dir() and recipe.revision is not None:
        raise source.error(
            ("model", "revision"),
            f"revision would do nothing here: it is of a model of the Hub, and {recipe.model!r} is a folder.",
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=recipe.revision, trust_remote_code=False)
    except CompressionError as error:
        raise source.error(key, one_line(error)) from error
    except Exception as error:  # what a download, a parser or a config's own checks raise
        raise source.error(key, f"cannot load the model {recipe.model!r}: {first_line(error)}") from error
    if recipe.steps[0].trains and any(isinstance(edit, Quantize) for edit in plan_of_config(config) or ()):
        raise source.error(
            key,
            f"{recipe.model!r} is quantized: its weights are integers and cannot be trained. Begin with the float model, "
            "or save `model.dequantize()` first.",
        )
    # a decoder says so in its config, or has no way to say it
    if recipe.task == "text-generation" and getattr(config, "is_decoder", None) is False and _is_encoder(config):
        raise source.error(
            key, f"{recipe.model!r} ({config.model_type}) reads a text from both sides, so it cannot continue one."
        )
    return name, config


def _tunes(recipe: Recipe) -> bool:
    """Whether a step chooses exit thresholds on rows."""
    return any(step.options.get(word) is not None for step in recipe.steps for word in ("mean_depth", "max_drop"))


def rehearse(recipe: Recipe, setup: Setup) -> None:
    """Change the model as the steps will, without training or scoring: an order that `apply_` would refuse shows here.

    Raises:
        RecipeError: the first step that does not fit what the ones before it leave, with its line.
    """
    with quiet():
        _rehearse(recipe, setup)


def _rehearse(recipe: Recipe, setup: Setup) -> None:
    source = recipe.source
    try:
        model = setup.load()
    except Exception as error:
        raise source.error(("model",), f"cannot load the model {recipe.model!r}: {first_line(error)}") from error
    for i, step in enumerate(recipe.steps):
        key: Key = ("steps", i, step.name)
        try:
            before = model
            if step.name == "distill" and "layers" in step.options:
                model = STEPS[step.name].rehearse(step, model, setup)
            if step.trains and step.teacher is not None:
                own = step.teacher in OWN_TEACHERS
                place: Key = (*key, "teacher")
                teacher = copy.deepcopy(before) if own else load_teacher(step.teacher, setup, recipe, place)
                check_teacher(step, model, teacher, setup)
            if not (step.name == "distill" and "layers" in step.options):
                model = STEPS[step.name].rehearse(step, model, setup)
        except CompressionError as error:
            if str(error).startswith(f"{source.name}:"):
                raise
            raise source.error(guess(key, step.options, str(error)), f"step {i + 1}, {step.name}: {one_line(error)}") from error


def load_teacher(name: str, setup: Setup, recipe: Recipe, key: Key) -> Any:
    """A teacher that a recipe names: a folder or a Hub id."""
    import transformers

    path = locate(name, recipe.source)
    auto: Any = getattr(transformers, setup.task.auto)
    try:
        teacher = auto.from_pretrained(path if path.is_dir() else name, trust_remote_code=False).float()
        if setup.task.reads == "text" and getattr(teacher.config, "pad_token_id", None) is None:
            teacher.config.pad_token_id = getattr(setup.processor, "pad_token_id", None)
        return teacher
    except Exception as error:
        raise recipe.source.error(key, f"cannot load the teacher {name!r}: {first_line(error)}") from error


@contextmanager
def bars_where_seen() -> Iterator[None]:
    """No progress bars of the libraries below where the output is not a terminal."""
    from datasets.utils import logging as of_datasets
    from transformers.utils import logging as of_transformers

    libraries = [of_datasets, of_transformers] if not sys.stderr.isatty() else []
    libraries = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of what went wrong, with its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]


def _processor(name: str, recipe: Recipe, reads: str, key: Key) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    kind: Any = {"text": AutoTokenizer, "image": AutoImageProcessor, "audio": AutoFeatureExtractor}[reads]
    try:
        found = kind.from_pretrained(name, revision=recipe.revision, trust_remote_code=False)
    except Exception as error:
        what = {"text": "tokenizer", "image": "image processor", "audio": "feature extractor"}[reads]
        raise recipe.source.error(key, f"the model {recipe.model!r} has no {what} that loads: {first_line(error)}") from error
    if reads == "text":
        if found.pad_token is None and found.eos_token is not None:
            found.pad_token = found.eos_token
        if found.pad_token is None and recipe.task != "text-generation":
            raise recipe.source.error(
                key, "its tokenizer has neither a padding nor an end-of-text token, so texts of several lengths make no batch."
            )
        if recipe.task == "token-classification" and getattr(found, "add_prefix_space", None) is False:
            found = kind.from_pretrained(name, revision=recipe.revision, add_prefix_space=True)  # words stand behind a space
        if recipe.task == "token-classification" and not found.is_fast:
            raise recipe.source.error(key, "token-classification needs a fast tokenizer, which knows where words begin.")
    return found


def _length(recipe: Recipe, config: Any, processor: Any) -> int:
    """Tokens a text is cut to, all lengths of the recipe being within what the model reads."""
    with quiet():
        most = min(processor.model_max_length, longest_text(config))
    asked: list[tuple[Key, Any]] = [(("data", "max_length"), recipe.data.max_length)]
    asked += [(("steps", i, step.name, "length"), step.options.get("length")) for i, step in enumerate(recipe.steps)]
    for key, length in asked:
        if length is not None and length > most:
            raise recipe.source.error(key, f"{key[-1]} is {length}, and this model reads at most {most} tokens.")
    return recipe.data.max_length or min(128, most)


def _undecoded(data: Any) -> Any:
    """Sounds as bytes and paths: decoding them in `datasets` needs a package of its own."""
    from datasets import Audio

    column = data.columns["audio"]
    for name, rows in data.splits.items():
        if isinstance(rows.features[column], Audio):
            data.splits[name] = rows.cast_column(column, Audio(decode=False))
    return data


def _wanted(recipe: Recipe, wanted: str) -> str:
    """A metric of numbers says that whole numbers are no classes."""
    numbers = ("pearson", "spearman", "mse", "pearsonr", "spearmanr")
    return "numbers" if wanted == "any" and recipe.metric and recipe.metric[0] in numbers else wanted


def _is_encoder(config: Any) -> bool:
    """Whether this kind of model is trained as a masked language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_encoder_decoder", False)


def _has_head(config: Any, task: Any) -> bool:
    found = getattr(config, "architectures", None) or [""]
    return found[0].endswith(task.endings)


def _classes_of(config: Any) -> list[str]:
    """The names of a head's classes, in its order."""
    names = getattr(config, "id2label", None) or {}
    return [str(names[i]) for i in sorted(names)]


def _head(labels: Any, config: Any, trained: bool) -> tuple[dict[str, Any], bool]:
    """What the config must be told, and whether the head that the model has fits the labels."""
    problems = {"classes": "single_label_classification", "labels": "multi_label_classification", "numbers": "regression"}
    count = 1 if labels.kind == "numbers" else len(labels.names)
    changes: dict[str, Any] = {"problem_type": problems[labels.kind]} if labels.kind in problems else {}
    named = _classes_of(config)
    # `find_labels` took the head's order where the classes are the same; a head for other classes is new here
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in named) or all(name.isdigit() for name in labels.names)
    same = unnamed or [n.lower() for n in named] == [n.lower() for n in labels.names]
    trained = trained and getattr(config, "num_labels", None) == count and (labels.kind == "numbers" or same)
    if labels.kind == "numbers":
        return ({**changes, "num_labels": 1} if not trained else changes), trained
    if not trained or named != list(labels.names):
        changes |= {"id2label": dict(enumerate(labels.names)), "label2id": {n: i for i, n in enumerate(labels.names)}}
    if not trained:
        changes["num_labels"] = count
    return changes, trained
