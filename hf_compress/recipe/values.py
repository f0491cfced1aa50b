"""Values of a recipe: whether one is of a type, and how types and values are said to people."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from .reading import Key, Source

LARGEST = 2**32 - 1  # of all numbers of a recipe: what a seed can be


def checked(value: Any, hint: Any, key: Key, source: Source) -> Any:
    """The value, if it is of a type and holds no number beyond `LARGEST`.

    Raises:
        RecipeError: at `key`, whose last part is the word.
    """
    if not fits(value, hint):
        raise source.error(key, f"{key[-1]} must be {in_words(hint)}, got {shown(value)}.")
    huge = next((number for number in _numbers(value) if abs(number) > LARGEST), None)
    if huge is not None:
        raise source.error(key, f"{key[-1]} is too large: {shown(huge)}; the most is {LARGEST:,}.")
    return value


def _numbers(value: Any) -> Iterator[float]:
    """The finite numbers in a value, however deep in lists and mappings."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        yield value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a type; a whole number is a number, true is not.

    ```python
    >>> from hf_compress.recipe.values import fits
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
    >>> from hf_compress.recipe.values import in_words
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


def shown(value: Any) -> str:
    """What was got, for a message."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}..."
