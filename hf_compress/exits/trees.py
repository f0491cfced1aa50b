"""Tensors inside what modules take and give: tuples, lists, dicts and the outputs of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils.generic import ModelOutput


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a value, with the path to it.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.exits.trees import tensors_in
    >>> [path for path, _ in tensors_in(((torch.ones(2), None), {"mask": [torch.ones(1)]}))]
    ['0.0', '1.mask.0']

    ```
    """
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for key, inner in _entries(value):
        yield from tensors_in(inner, f"{path}.{key}" if path else str(key))


def mapped(
    value: Any,
    tensor: Callable[[str, torch.Tensor], Any],
    other: Callable[[str, Any], Any] = lambda path, value: value,
    path: str = "",
) -> Any:
    """The same value with every tensor, and everything else that holds none, replaced."""
    if isinstance(value, torch.Tensor):
        return tensor(path, value)
    if not isinstance(value, tuple | list | ModelOutput) and type(value) is not dict:
        return other(path, value)
    inner = {key: mapped(v, tensor, other, f"{path}.{key}" if path else str(key)) for key, v in _entries(value)}
    if isinstance(value, dict):
        return type(value)(**inner) if isinstance(value, ModelOutput) else inner
    return type(value)(*inner.values()) if hasattr(value, "_fields") else type(value)(inner.values())  # type: ignore[arg-type]


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, tuple | list):
        yield from enumerate(value)
    elif type(value) is dict or isinstance(value, ModelOutput):
        yield from value.items()
