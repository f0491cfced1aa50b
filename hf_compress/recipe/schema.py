"""A recipe as data: every word known, of the right type, in an order that makes sense. No model or data is opened here."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..discover import nearest
from .data import DataOptions
from .reading import Key, RecipeError, Source
from .steps import STEPS, Step, check_step
from .tasks import TASKS

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
    """A recipe from its values, or the first mistake in it.

    Args:
        values (`dict`), source (`Source`): as `read_source` gives them.
        output (`str`, *optional*): instead of the recipe's own.

    Raises:
        RecipeError: an unknown word, a wrong type, a value out of range, something missing, an order that makes no sense.
    """
    _check_words(values, TOP, (), source, "a recipe")
    needed = [name for name in ("model", "task", "data", "steps") if name not in values]
    if needed:
        raise source.error((), f"a recipe needs {', '.join(needed)}.")
    model, revision = _model(values["model"], source)
    task = _checked(values["task"], str, ("task",), source)
    if task not in TASKS:
        raise source.error(("task",), f"unknown task {task!r}{nearest(task, list(TASKS))} Tasks: {', '.join(TASKS)}.")
    data = _data(values["data"], source)
    metric = _checked(values.get("metric", []), str | list[str], ("metric",), source)
    seed = _checked(values.get("seed", 0), int, ("seed",), source)
    if not 0 <= seed < 2**32:
        raise source.error(("seed",), f"seed must lie between 0 and {2**32 - 1}, got {seed}.")
    given = values.get("output") if output is None else output
    if given is None:
        raise source.error((), "a recipe needs output: (a folder), or give one when it is run.")
    folder = _checked(given, str, ("output",), source)
    if not folder.strip():
        raise source.error(("output",), "output is empty; name a folder.")
    steps = _steps(values["steps"], source)
    push = values.get("push")
    return Recipe(
        model,
        task,
        data,
        steps,
        folder,
        (metric,) if isinstance(metric, str) else tuple(metric),
        seed,
        revision,
        None if push is None else check_push(push, source),
        source,
    )


def _model(value: Any, source: Source) -> tuple[str, str | None]:
    if isinstance(value, Mapping):
        _check_words(value, {"id": str, "revision": str}, ("model",), source, "model")
        if "id" not in value:
            raise source.error(("model",), "model needs id: (a Hub id or a folder).")
        revision = value.get("revision")
        if revision is not None:
            _checked(revision, str, ("model", "revision"), source)
        return _filled(value["id"], ("model", "id"), source), revision
    return _filled(value, ("model",), source), None


def _filled(value: Any, key: Key, source: Source) -> str:
    text = _checked(value, str, key, source)
    if not text.strip():
        raise source.error(key, f"{key[-1]} is empty.")
    return text


def _data(value: Any, source: Source) -> DataOptions:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, Mapping):
        raise source.error(("data",), f"data is a Hub id, a path, or a mapping with path: and columns, got {_shown(value)}.")
    hints = get_type_hints(DataOptions)
    _check_words(value, hints, ("data",), source, "data")
    for name, item in value.items():
        _checked(item, hints[name], ("data", name), source)
        if isinstance(item, str) and not item.strip():
            raise source.error(("data", name), f"{name} is empty.")
        if isinstance(item, list) and (not item or len(set(item)) != len(item)):
            raise source.error(("data", name), f"{name} must hold each name once, got {_shown(item)}.")
        if isinstance(item, int | float) and item < (2 if name == "max_length" else 1e-3):
            raise source.error(("data", name), f"{name} is too small: {item}.")
    return DataOptions(**value)


def check_push(value: Any, source: Source) -> dict[str, Any]:
    """Where to push, as a dict.

    Raises:
        RecipeError: an unknown word, or a name that the Hub cannot have.
    """
    if isinstance(value, str):
        value = {"repo": value}
    if not isinstance(value, Mapping):
        raise source.error(("push",), f"push is a repository (me/name), or a mapping with repo:, got {_shown(value)}.")
    _check_words(value, PUSH, ("push",), source, "push")
    for name, item in value.items():
        _checked(item, PUSH[name], ("push", name), source)
    key = ("push", "repo") if ("push", "repo") in source.lines else ("push",)
    if "repo" not in value:
        raise source.error(("push",), "push needs repo: (such as me/minilm-small).")
    try:
        validate_repo_id(value["repo"])
    except HFValidationError as error:
        raise source.error(key, f"{value['repo']!r} is no name of a repository: {str(error).splitlines()[0]}") from None
    return dict(value)


# --- steps -------------------------------------------------------------------------------------------------------


def _steps(value: Any, source: Source) -> tuple[Step, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise source.error(("steps",), f"steps is a list, such as '- prune: {{heads: 0.5}}', got {_shown(value)}.")
    if not value:
        raise source.error(("steps",), f"steps is empty; a step is one of {', '.join(STEPS)}.")
    steps = []
    for i, item in enumerate(value):
        key: Key = ("steps", i)
        if isinstance(item, str):
            item = {item: None}
        if not isinstance(item, Mapping) or len(item) != 1:
            got = f"{', '.join(item)} at once" if isinstance(item, Mapping) and item else _shown(item)
            raise source.error(
                key, f"each step is one word with its options below it, such as '- quantize: {{bits: 8}}'; got {got}."
            )
        ((name, options),) = item.items()
        if name not in STEPS:
            raise source.error(key, f"unknown step {name!r}{nearest(name, list(STEPS))} Steps: {', '.join(STEPS)}.")
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise source.error((*key, name), f"the options of {name} are a mapping, got {_shown(options)}.")
        words = STEPS[name].words
        _check_words(options, words, (*key, name), source, name)
        for word, given in options.items():
            _checked(given, words[word], (*key, name, word), source)
        step = Step(name, dict(options))
        try:
            check_step(step)
        except (ValueError, ImportError) as error:
            raise source.error(guess((*key, name), options, str(error)), f"{name}: {one_line(error)}") from None
        steps.append(step)
    _check_order(steps, source)
    return tuple(steps)


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


# --- words and types ---------------------------------------------------------------------------------------------


def _check_words(values: Any, known: Mapping[str, Any], key: Key, source: Source, what: str) -> None:
    if not isinstance(values, Mapping):
        raise source.error(key, f"{what} is a mapping, got {_shown(values)}.")
    for word in values:
        if word not in known:
            near = nearest(word, list(known))
            more = "" if "did you mean" in near and len(known) > 12 else f" Known: {', '.join(known)}."
            raise source.error((*key, word), f"{what} has no {word!r}{near}{more}")


def _checked(value: Any, hint: Any, key: Key, source: Source) -> Any:
    if not fits(value, hint):
        raise source.error(key, f"{key[-1]} must be {in_words(hint)}, got {_shown(value)}.")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a type; a whole number is a number, true is not.

    ```python
    >>> from hf_compress.recipe.schema import fits
    >>> fits(1, float), fits(True, int), fits([1, 2], list[int]), fits("a", list[str] | None)
    (True, False, True, False)

    ```
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if issubclass(kind, str):  # also the enums of transformers
        return isinstance(value, str)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Iterable):
        items = [one for one in inner if one is not Ellipsis]
        return isinstance(value, list) and all(fits(v, items[0]) for v in value) if items else isinstance(value, list)
    return isinstance(value, kind)


NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "a mapping"}


def in_words(hint: Any) -> str:
    """A type for people.

    ```python
    >>> from hf_compress.recipe.schema import in_words
    >>> in_words(float | None), in_words(int | list[int])
    ('a number', 'a whole number or a list of whole numbers')

    ```
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(one) for one in inner if one is not type(None)))
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Iterable) and not issubclass(kind, str | Mapping) and inner:
        one = in_words(inner[0]).removeprefix("a ")
        return f"a list of {one}s"
    if isinstance(kind, type):
        return next((text for base, text in NAMES.items() if kind is base), None) or next(
            (
                text
                for base, text in {str: "a text", Mapping: "a mapping", Iterable: "a list"}.items()
                if issubclass(kind, base)
            ),
            kind.__name__,
        )
    return str(hint)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}..."
