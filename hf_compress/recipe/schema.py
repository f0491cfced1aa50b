"""A recipe as data: every word known, of the right type, in an order that makes sense. No model or data is opened here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..discover import nearest
from .data import DataOptions
from .metrics import SAME
from .reading import Key, RecipeError, Source, noting, refuse
from .steps import STEPS, Step, check_step
from .tasks import TASKS
from .values import LARGEST, checked, shown

PUSH = {"repo": str, "private": bool, "revision": str, "create_pr": bool, "commit_message": str}


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and found whole.

    Attributes:
        model (`str`), revision (`str`, *optional*): a Hub id or a folder.
        task (`str`): one of `tasks.TASKS`, the Hub's names.
        data (`DataOptions`): where the data is.
        steps (`tuple[Step, ...]`): in order.
        metric (`tuple[str, ...]`): the main one first; empty: the usual one of the task.
        output (`str`): the folder.
        seed (`int`): of everything that is drawn.
        push (`dict`, *optional*): `repo` and options of the push.
        source (`Source`): its text and lines.
    """

    model: str
    task: str
    data: DataOptions
    steps: tuple[Step, ...]
    output: str
    metric: tuple[str, ...] = ()
    seed: int = 0
    revision: str | None = None
    push: dict[str, Any] | None = None
    source: Source = field(default_factory=lambda: Source("recipe", ""), compare=False)

    def as_data(self) -> dict[str, Any]:
        """What decides the outcome, as plain data."""
        data = {f.name: getattr(self.data, f.name) for f in fields(self.data)}
        steps = [{step.name: step.options} for step in self.steps]
        return {"model": self.model, "revision": self.revision, "task": self.task, "data": data, "seed": self.seed,
                "metric": list(self.metric), "steps": steps}  # fmt: skip


TOP = {f.name: None for f in fields(Recipe) if f.name not in ("source", "revision")}


def parse(values: Mapping[str, Any], source: Source, output: str | None = None) -> Recipe:
    """A recipe from its values, or every mistake in it.

    Args:
        values (`dict`), source (`Source`): as `read_source` gives them.
        output (`str`, *optional*): instead of the recipe's own.

    Raises:
        RecipeError: an unknown word, a wrong type, a value out of range, something missing, a word that would do nothing, an
            order that makes no sense. Several mistakes are told one a line, each with its place.
    """
    mistakes: list[RecipeError] = []
    values = dict(values)
    if output is not None:
        values["output"] = output
    _check_words(values, TOP, (), source, "a recipe", mistakes)
    meant = " ".join(map(str, mistakes))  # a word that is misspelt is not missing too
    needed = [
        name for name in ("model", "task", "data", "steps") if name not in values and f"did you mean {name!r}" not in meant
    ]
    if needed:
        mistakes.append(source.error((), f"a recipe needs {', '.join(needed)}."))
    if values.get("output") is None and "did you mean 'output'" not in meant:
        mistakes.append(source.error((), "a recipe needs output: (a folder), or give one when it is run."))
    found: dict[str, Any] = {}
    for name, read in PARTS.items():
        if name in values and (name, values[name]) not in (("push", None), ("output", None)):
            with noting(mistakes):
                found[name] = read(values[name], source, mistakes)
    if found.get("task") and isinstance(values.get("data"), Mapping):
        _check_reads(values["data"], found["task"], source, mistakes)
    refuse(mistakes)
    model, revision = found.pop("model")
    return Recipe(model, revision=revision, source=source, **found)


def _model(value: Any, source: Source, mistakes: list[RecipeError]) -> tuple[str, str | None]:
    if isinstance(value, Mapping):
        before = len(mistakes)
        _check_words(value, {"id": str, "revision": str}, ("model",), source, "model", mistakes)
        revision = value.get("revision")
        if revision is not None:
            with noting(mistakes):
                _filled(revision, ("model", "revision"), source)
        if "id" not in value:
            if len(mistakes) == before:  # else the unknown word stands where id should
                mistakes.append(source.error(("model",), "model needs id: (a Hub id or a folder)."))
            return "", revision
        return _filled(value["id"], ("model", "id"), source), revision
    return _filled(value, ("model",), source), None


def _filled(value: Any, key: Key, source: Source) -> str:
    text = checked(value, str, key, source)
    if not text.strip():
        raise source.error(key, f"{key[-1]} is empty.")
    return text


def _task(value: Any, source: Source, mistakes: list[RecipeError]) -> str:
    task = checked(value, str, ("task",), source)
    if task not in TASKS:
        raise source.error(("task",), f"unknown task {task!r}{nearest(task, list(TASKS))} Tasks: {', '.join(TASKS)}.")
    return task


def _metric(value: Any, source: Source, mistakes: list[RecipeError]) -> tuple[str, ...]:
    checked(value, str | list[str], ("metric",), source)
    names = [value] if isinstance(value, str) else value
    if not names or not all(name.strip() for name in names):
        raise source.error(("metric",), "metric is empty; name one, or leave it out for the usual one of the task.")
    plain = [SAME.get(name, name) for name in names]
    twice = next((i for i, name in enumerate(plain) if name in plain[:i]), None)
    if twice is not None:
        raise source.error(("metric", twice), f"metric must hold each name once, got {names[twice]!r} again.")
    return tuple(names)


def _seed(value: Any, source: Source, mistakes: list[RecipeError]) -> int:
    seed = checked(value, int, ("seed",), source)
    if not 0 <= seed <= LARGEST:
        raise source.error(("seed",), f"seed must lie between 0 and {LARGEST}, got {seed}.")
    return seed


def _output(value: Any, source: Source, mistakes: list[RecipeError]) -> str:
    folder = checked(value, str, ("output",), source)
    if not folder.strip():
        raise source.error(("output",), "output is empty; name a folder.")
    return folder


def _data(value: Any, source: Source, mistakes: list[RecipeError]) -> DataOptions:
    if isinstance(value, str):
        value = {"path": _filled(value, ("data",), source)}
    if not isinstance(value, Mapping):
        raise source.error(("data",), f"data is a Hub id, a path, or a mapping with path: and columns, got {shown(value)}.")
    hints = get_type_hints(DataOptions)
    _check_words(value, hints, ("data",), source, "data", mistakes)
    known = {name: item for name, item in value.items() if name in hints}
    for name, item in known.items():
        with noting(mistakes):
            _data_word(name, item, hints[name], source)
    return DataOptions(**known)


def _data_word(name: str, item: Any, hint: Any, source: Source) -> None:
    key = ("data", name)
    checked(item, hint, key, source)
    if isinstance(item, str) and not item.strip():
        raise source.error(key, f"{name} is empty.")
    if isinstance(item, list) and (not item or len(set(item)) != len(item)):
        raise source.error(key, f"{name} must hold each name once, got {shown(item)}.")
    if isinstance(item, float) and not math.isfinite(item):
        raise source.error(key, f"{name} must be a finite number, got {item!r}.")
    if isinstance(item, int | float) and item < (2 if name == "max_length" else 1e-3):
        raise source.error(key, f"{name} is too small: {item}.")


def _check_reads(data: Mapping[str, Any], name: str, source: Source, mistakes: list[RecipeError]) -> None:
    """Refuse words of data that this task would not look at."""
    task = TASKS[name]
    columns = [role.rstrip("?") for role in task.columns]
    every = {role.rstrip("?") for one in TASKS.values() for role in one.columns}
    cuts = {"max_length": "text", "max_seconds": "audio"}
    many = {"text": "texts", "image": "images", "audio": "sounds"}
    for word in [word for word, value in data.items() if value is not None]:
        if word in every and word not in columns:
            why = f"{name} does not read it; its columns are {', '.join(columns)}."
        elif word in cuts and task.reads != cuts[word]:
            why = f"it cuts {many[cuts[word]]}, and {name} reads {many[task.reads]}."
        elif word == "labels" and task.wanted in ("", "scores"):
            why = f"{name} has no classes that could be named."
        elif word == "label" and isinstance(data[word], list) and task.wanted in ("tags", "scores"):
            mistakes.append(source.error(("data", word), f"label is one column in {name}, got {shown(data[word])}."))
            continue
        else:
            continue
        mistakes.append(source.error(("data", word), f"{word} would do nothing here: {why} Leave it out."))


def check_push(value: Any, source: Source) -> dict[str, Any]:
    """Where to push, as a dict.

    Raises:
        RecipeError: an unknown word, or a name that the Hub cannot have.
    """
    mistakes: list[RecipeError] = []
    found: dict[str, Any] = {}
    with noting(mistakes):
        found = _push(value, source, mistakes)
    refuse(mistakes)
    return found


def _push(value: Any, source: Source, mistakes: list[RecipeError]) -> dict[str, Any]:
    if isinstance(value, str):
        value = {"repo": value}
    if not isinstance(value, Mapping):
        raise source.error(("push",), f"push is a repository (me/name), or a mapping with repo:, got {shown(value)}.")
    before = len(mistakes)
    _check_words(value, PUSH, ("push",), source, "push", mistakes)
    for name in [name for name in value if name in PUSH and name != "repo"]:
        with noting(mistakes):
            checked(value[name], PUSH[name], ("push", name), source)
    key = ("push", "repo") if ("push", "repo") in source.lines else ("push",)
    if "repo" not in value:
        if len(mistakes) == before:
            mistakes.append(source.error(("push",), "push needs repo: (such as me/minilm-small)."))
        return {}
    try:
        validate_repo_id(checked(value["repo"], str, ("push", "repo"), source))
    except HFValidationError as error:
        raise source.error(key, f"{value['repo']!r} is no name of a repository: {str(error).splitlines()[0]}") from None
    return dict(value)


# --- steps -------------------------------------------------------------------------------------------------------


def _steps(value: Any, source: Source, mistakes: list[RecipeError]) -> tuple[Step, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise source.error(("steps",), f"steps is a list, such as '- prune: {{heads: 0.5}}', got {shown(value)}.")
    if not value:
        raise source.error(("steps",), f"steps is empty; a step is one of {', '.join(STEPS)}.")
    steps = []
    for i, item in enumerate(value):
        with noting(mistakes):
            steps.append(_step(i, item, source, mistakes))
    if len(steps) == len(value):  # the order of a list with a hole says nothing
        _check_order(steps, source)
    return tuple(steps)


def _step(i: int, item: Any, source: Source, mistakes: list[RecipeError]) -> Step:
    key: Key = ("steps", i)
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or len(item) != 1:
        got = f"{', '.join(item)} at once" if isinstance(item, Mapping) and item else shown(item)
        raise source.error(
            key, f"each step is one word with its options below it, such as '- quantize: {{bits: 8}}'; got {got}."
        )
    ((name, options),) = item.items()
    if name not in STEPS:
        raise source.error(key, f"unknown step {name!r}{nearest(name, list(STEPS))} Steps: {', '.join(STEPS)}.")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise source.error((*key, name), f"the options of {name} are a mapping, got {shown(options)}.")
    words, before = STEPS[name].words, len(mistakes)
    _check_words(options, words, (*key, name), source, name, mistakes)
    for word in [word for word in options if word in words]:
        with noting(mistakes):
            checked(options[word], words[word], (*key, name, word), source)
    step = Step(name, dict(options))
    if len(mistakes) == before:
        try:
            check_step(step)
        except (ValueError, ImportError) as error:
            mistakes.append(source.error(guess((*key, name), options, str(error)), f"{name}: {one_line(error)}"))
    return step


PARTS: dict[str, Callable[[Any, Source, list[RecipeError]], Any]] = {
    "model": _model,
    "task": _task,
    "data": _data,
    "metric": _metric,
    "seed": _seed,
    "output": _output,
    "steps": _steps,
    "push": _push,
}


def guess(key: Key, options: Mapping[str, Any], message: str) -> Key:
    """The word that a refusal is about: the first that it names."""
    places = {word: found.start() for word in options if (found := re.search(rf"(?<![\w/]){re.escape(word)}\b", message))}
    return (*key, min(places, key=lambda word: places[word])) if places else key


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


AFTER_QUANTIZE = "its weights are integers then, which can neither be trained nor cut"


def _check_order(steps: Sequence[Step], source: Source) -> None:
    seen: dict[str, int] = {}
    for i, step in enumerate(steps):
        key: Key = ("steps", i, step.name)

        def refuse(why: str, key: Key = key, i: int = i, step: Step = step) -> RecipeError:
            return source.error(key, f"step {i + 1}, {step.name}, {why}")

        if "measure" in seen:
            raise refuse(f"comes after measure (step {seen['measure'] + 1}); measure is the last step.")
        if "quantize" in seen and step.name != "measure":
            what = (
                "quantizes what is quantized already" if step.name == "quantize" else f"comes after quantize: {AFTER_QUANTIZE}"
            )
            raise refuse(f"{what} (step {seen['quantize'] + 1}). Put quantize last, once.")
        if "exits" in seen and step.name == "exits":
            raise refuse(f"adds exits to a model that has some (step {seen['exits'] + 1}); name all layers in one step.")
        if "exits" in seen and "layers" in step.options:
            raise refuse(
                f"removes layers, and exits (step {seen['exits'] + 1}) sit after layers by number; put exits after it."
            )
        if step.teacher == "finetuned" and step.options.get("teacher") and "finetune" not in seen:
            raise source.error(
                (*key, "teacher"), f"{step.name} wants the finetuned model as teacher, and no finetune comes before it."
            )
        seen.setdefault(step.name, i)


# --- words ------------------------------------------------------------------------------------------------------


def _check_words(
    values: Mapping[str, Any], known: Mapping[str, Any], key: Key, source: Source, what: str, mistakes: list[RecipeError]
) -> None:
    for word in [word for word in values if word not in known]:
        near = nearest(word, list(known))
        more = "" if "did you mean" in near and len(known) > 12 else f" Known: {', '.join(known)}."
        mistakes.append(source.error((*key, word), f"{what} has no {word!r}{near}{more}"))
