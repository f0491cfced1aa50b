"""Memory that is free, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
