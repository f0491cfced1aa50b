"""The error of this package, and the checks that every edit is made with."""

from __future__ import annotations

import operator
import reprlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

MOST_UNITS = 1_000_000  # no layer is that wide; a hostile plan is


class CompressionError(ValueError):
    """A refusal: what was got, what is allowed, what to do. Raised before anything has changed."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: Any) -> str:
    """What was got, for a message: short, however long or deeply nested it is.

    Example:

    ```python
    >>> from hf_compress.checks import shown
    >>> shown([[[[[]]]], "x"]), len(shown("x" * 1000))
    ("[[[[...]]], 'x']", 80)

    ```
    """
    return _SHORT.repr(value)


def check_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise CompressionError(f"{where} must be a module name as `discover` prints it, got {shown(value)}.")
    return value


def check_indices(values: Any, where: str) -> tuple[int, ...]:
    """Sorted unique indices >= 0. Order has no meaning in what is kept, so two plans that keep the same compare equal."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise CompressionError(f"{where} must be a sequence of indices of what stays, got {shown(values)}.")
    indices = []
    for value in values:
        try:
            if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
                raise TypeError
            indices.append(operator.index(value))
        except TypeError:
            raise CompressionError(f"{where} must hold whole numbers, got {shown(value)}.") from None
    if not indices:
        raise CompressionError(f"{where} is empty: name at least one. (To remove a whole layer, use KeepLayers.)")
    if len(set(indices)) != len(indices):
        twice = sorted(index for index, count in Counter(indices).items() if count > 1)[:8]
        raise CompressionError(f"{where} names {twice} more than once; name each index that stays once.")
    if min(indices) < 0:
        raise CompressionError(f"{where} holds {min(indices)}; indices count from 0.")
    return tuple(sorted(indices))


def check_count(value: Any, where: str, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= MOST_UNITS:
        raise CompressionError(f"{where} must be a whole number >= {least} and at most {MOST_UNITS:,}, got {shown(value)}.")
    return value


def check_choice(value: Any, allowed: tuple, where: str) -> Any:
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise CompressionError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.")
    return value


def spans_of(indices: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` -> `"0-2 5"`."""
    parts, start = [], 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            first, last = indices[start], indices[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return " ".join(parts)


def from_spans(text: str) -> list[int]:
    """The inverse of `spans_of`."""
    indices: list[int] = []
    for part in text.split():
        first, dash, last = part.partition("-")
        if (
            dash
            and not last
            or not first.isdecimal()
            or not (last or first).isdecimal()
            or int(last or first) - int(first) > MOST_UNITS
        ):
            raise CompressionError(f"{part!r} is no span of indices such as '3' or '0-7'.")
        indices.extend(range(int(first), int(last or first) + 1))
        if len(indices) > MOST_UNITS:
            raise CompressionError(f"More than {MOST_UNITS:,} indices in one edit; no layer is that wide.")
    return indices
