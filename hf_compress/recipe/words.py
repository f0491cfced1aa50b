"""The words of steps, read off the functions and classes that they stand for."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

from transformers import TrainingArguments

from ..distillation import DistillationArguments
from .training import TRAINING, WORDS

HERE = {"teacher": str, "calibration_samples": int, "length": int | None, "layers": int | list[int] | dict}
NOT_IN_A_FILE = ("self", "model", "inputs", "batches", "loss_fn", "metric", "metrics", "metrics_against", "against", "about")


def words_of(*sources: Any) -> dict[str, Any]:
    """The keyword arguments of functions and classes, with their types, without what a file cannot say.

    ```python
    >>> from hf_compress import plan_depthwise
    >>> from hf_compress.recipe.words import words_of
    >>> words_of(plan_depthwise)
    {'modules': str | None, 'multiplier': <class 'int'>}

    ```
    """
    found: dict[str, Any] = {}
    for source in sources:
        function = source.__init__ if inspect.isclass(source) else source
        hints = get_type_hints(function)
        found |= {name: hints.get(name, Any) for name in inspect.signature(function).parameters if name not in NOT_IN_A_FILE}
    return found


def training_words() -> dict[str, Any]:
    hints = get_type_hints(TrainingArguments)
    return {word: hints[WORDS.get(word, word)] for word in TRAINING}


def distillation_words() -> dict[str, Any]:
    hints = get_type_hints(DistillationArguments)
    common = {f.name for f in fields(TrainingArguments)}
    return {
        f.name: hints[f.name] for f in fields(DistillationArguments) if f.name not in common and f.name != "teacher_weights"
    }
