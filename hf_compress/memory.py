"""Memory: what is free given back to the system, large tensors worked on a slab at a time."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

SLAB = 1 << 18  # numbers: what is worked on at a time, small enough for a processor's cache


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's; other systems give back what is freed, or have no such function
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Return the pages of freed tensors to the system.

    glibc keeps what was freed, and cannot use all of it again where pieces are as large as weights and aligned as torch asks
    for: work that makes and drops tensors of several megabytes many times grows to a multiple of what it ever holds.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def slabs(tensor: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Views of a tensor along its first dimension, of about `SLAB` numbers each, and which rows they are.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.memory import slabs
    >>> [(rows.start, rows.stop, tuple(slab.shape)) for rows, slab in slabs(torch.zeros(3, 1 << 17))]
    [(0, 2, (2, 131072)), (2, 3, (1, 131072))]

    ```
    """
    if not tensor.ndim or tensor.numel() <= SLAB:
        yield slice(None), tensor
        return
    step = max(1, SLAB * len(tensor) // tensor.numel())
    for start in range(0, len(tensor), step):
        rows = slice(start, min(start + step, len(tensor)))
        yield rows, tensor[rows]
