"""Which single weights stay: pure functions from scores to masks. True stays, and every count is exact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .checks import CompressionError, shown

SCOPES = ("row", "layer", "global")
Masks = dict[str, torch.Tensor]


# --- a weight as a matrix ----------------------------------------------------------------------------------------


def matrix_of(module: nn.Module | None, weight: torch.Tensor) -> torch.Tensor:
    """A weight as (outputs, what each output sums over): the rows and the groups of N:M are those of this matrix.

    GPT-2's Conv1D is turned round. A convolution's inputs are innermost, position after position, as in the sparse kernels
    that want N:M. A vector is one row.

    Args:
        module (`nn.Module`, *optional*): what the weight belongs to; only its class is looked at.
        weight (`torch.Tensor`): its weight, or anything of the same shape.
    """
    if weight.ndim < 2:
        return weight.reshape(1, -1)
    if isinstance(module, Conv1D):
        return weight.T
    if isinstance(module, _ConvNd):
        return weight.movedim(1, -1).flatten(1)
    return weight.flatten(1)


def from_matrix(module: nn.Module | None, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `matrix_of`: a matrix in the shape of the weight."""
    if isinstance(module, Conv1D) and len(shape) == 2:
        return matrix.T
    if isinstance(module, _ConvNd) and len(shape) > 2:
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return matrix.reshape(shape)


# --- N of M ------------------------------------------------------------------------------------------------------


def read_pattern(pattern: Any, where: str = "pattern") -> tuple[int, int] | None:
    """`"2:4"` -> (2, 4): at most 2 of every 4 neighbours stay. None stays None.

    Raises:
        CompressionError: something else than whole numbers N:M with 0 < N < M <= 64.

    Example:

    ```python
    >>> from hf_compress.sparsity import read_pattern
    >>> read_pattern("2:4")
    (2, 4)

    ```
    """
    if pattern is None:
        return None
    found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", pattern) if isinstance(pattern, str) else None
    kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < kept < of <= 64:
        raise CompressionError(
            f"{where} must be 'N:M' with 0 < N < M <= 64, as '2:4' (2 of every 4 neighbours stay) or '4:8', or None; got "
            f"{shown(pattern)}."
        )
    return kept, of


def n_of_m(scores: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """The mask (rows, columns) in which exactly `kept` of every `of` neighbours in a row stay, those that score highest.

    Of equal scores the first goes.

    Raises:
        CompressionError: the columns do not divide into groups.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.sparsity import n_of_m
    >>> n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])

    ```
    """
    if scores.shape[1] % of:
        raise CompressionError(
            f"{kept}:{of} needs rows that divide into groups of {of}, and these have {scores.shape[1]} columns."
        )
    return _highest(scores.reshape(-1, of), of - kept).reshape(scores.shape)


def _highest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """Of each row, all but the `removed` lowest; of equal ones the first goes."""
    lowest = scores.argsort(dim=1, stable=True)[:, :removed]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


# --- by sparsity -------------------------------------------------------------------------------------------------


def choose_masks(scores: Mapping[str, torch.Tensor], sparsity: float, scope: str = "row", pattern: str | None = None) -> Masks:
    """Masks that remove exactly `round(sparsity * n)` weights, those that score lowest: of each row, layer, or of all.

    Args:
        scores (`Mapping[str, torch.Tensor]`): by name, (rows, columns); see `matrix_of`. `-inf` goes first.
        sparsity (`float`): the fraction that goes, in [0, 1). Not looked at with a pattern.
        scope (`str`, defaults to `"row"`): `"row"` (each output alone), `"layer"` (each matrix alone) or `"global"`. All scores
            are never sorted at once: the threshold is found from two histograms of their bits, and is exact.
        pattern (`str`, *optional*): `"2:4"`, say: exactly 2 of every 4 neighbours stay.

    Returns:
        by name, a mask of the shape of the scores: True stays.

    Raises:
        CompressionError: an option that means nothing, a score that is not a number, or rows that a pattern does not divide.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.sparsity import choose_masks
    >>> scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[0.1, 0.2]])}
    >>> {name: mask.tolist() for name, mask in choose_masks(scores, 0.5, "global").items()}
    {'a': [[False, True], [True, True]], 'b': [[False, False]]}

    ```
    """
    check_sparsity(sparsity, pattern, scope)
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise CompressionError(f"The scores of {name!r} hold NaN, so nothing can be chosen by them.")
    group = read_pattern(pattern)
    if group is not None:
        return {name: _named(name, n_of_m, score, *group) for name, score in scores.items()}
    if scope == "row":
        return {name: _highest(score, round(sparsity * score.shape[1])) for name, score in scores.items()}
    if scope == "layer":
        return {name: m for name in scores for m in _above({name: scores[name]}, sparsity).values()}
    return _above(scores, sparsity)


def check_sparsity(sparsity: Any, pattern: Any, scope: Any = "row") -> None:
    """Refuse options that mean nothing to any weight."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise CompressionError(f"sparsity is the fraction of weights that goes, in [0, 1), got {shown(sparsity)}.")
    if not isinstance(scope, str) or scope not in SCOPES:
        raise CompressionError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {shown(scope)}.")
    read_pattern(pattern)


def _named(name: str, function: Any, *args: Any) -> torch.Tensor:
    try:
        return function(*args)
    except CompressionError as error:
        raise CompressionError(f"{name!r}: {error}") from None


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 32 bits that are ordered as the floats are."""
    bits = (scores.float().flatten() + 0.0).view(torch.int32)  # + 0.0: there is one zero
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _above(scores: Mapping[str, torch.Tensor], sparsity: float) -> Masks:
    """All but the `round(sparsity * n)` lowest of several tensors; of equal ones, the first go."""
    removed = round(sparsity * sum(score.numel() for score in scores.values()))
    if not removed:
        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    upper = torch.zeros(1 << 16, dtype=torch.long)
    for score in scores.values():
        upper += torch.bincount((_keys(score) >> 16) + (1 << 15), minlength=1 << 16).cpu()
    bucket = int(torch.searchsorted(upper.cumsum(0), removed))  # where the last that goes lies
    left = removed - int(upper[:bucket].sum())
    lower = torch.zeros(1 << 16, dtype=torch.long)
    for score in scores.values():
        keys = _keys(score)
        lower += torch.bincount(keys[(keys >> 16) == bucket - (1 << 15)] & 0xFFFF, minlength=1 << 16).cpu()
    place = int(torch.searchsorted(lower.cumsum(0), left))
    threshold = ((bucket - (1 << 15)) << 16) | place
    equal = left - int(lower[:place].sum())  # of those at the threshold, so many go
    masks = {}
    for name, score in scores.items():
        keys = _keys(score)
        mask = keys >= threshold
        ties = (keys == threshold).nonzero().flatten()[:equal]
        mask[ties] = False
        equal -= len(ties)
        masks[name] = mask.reshape(score.shape)
    return masks


# --- masks in bits -----------------------------------------------------------------------------------------------


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bytes: eight weights a byte, the first in its lowest bit, row-major over the whole tensor.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.sparsity import pack_bits, unpack_bits
    >>> pack_bits(torch.tensor([[True, False, True], [False, True, True]]))
    tensor([53], dtype=torch.uint8)
    >>> unpack_bits(torch.tensor([53], dtype=torch.uint8), (2, 3))
    tensor([[ True, False,  True],
            [False,  True,  True]])

    ```
    """
    flat = mask.flatten().to(torch.uint8)
    eights = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """The inverse of `pack_bits`."""
    size = torch.Size(shape).numel()
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:size].bool().reshape(shape)
