"""The maths of quantization: which grid, which point of it, and back. Pure functions on tensors.

A grid is `scale * (integer - zero / ZERO_UNIT)`. With 8 bits each row (output channel) has one, symmetric, its scale in
the weight's own dtype. Below, each group of `group_size` weights along a row has one: a float16 scale, and a zero point
in sixteenths of a step, which fits a byte and comes within 1% of the error of a float one.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional as F

from ..edits import BITS, CompressionError

GROUP_SIZE = 64
ACTIVATIONS = ("token", "tensor", None)
DECODE = ("load", "call")
ZERO_UNIT = 16  # zero points are stored in 1/16 of a step
CHUNK = 2**21  # weights that are searched at once: some tens of megabytes
TINY = 2.0**-24  # the smallest float16 above zero

_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6)
_FITS = 4  # least-squares rounds after the search


def check_options(
    bits: Any, group_size: Any = None, activations: Any = "token", decode: Any = "load"
) -> tuple[int, int | None, str | None, str]:
    """The options of a quantized module, with defaults filled in.

    Raises:
        CompressionError: bits that are not offered, a group size that is none or comes with 8 bits, an unknown word.
    """
    if type(bits) is not int or bits not in BITS:
        raise CompressionError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}.")
    if bits == 8 and group_size is not None:
        raise CompressionError(
            f"8 bits have one scale per output channel, got group_size={group_size!r}; leave it out, or use fewer bits."
        )
    if bits < 8 and group_size is None:
        group_size = GROUP_SIZE
    if bits < 8 and (type(group_size) is not int or group_size < 2):
        raise CompressionError(f"group_size must be a whole number >= 2 (or None, for {GROUP_SIZE}), got {group_size!r}.")
    if activations not in ACTIVATIONS:
        raise CompressionError(f'activations must be "token", "tensor" or None, got {activations!r}.')
    if bits < 8 and activations == "tensor":
        raise CompressionError(f"{bits} bits are for weights alone, got activations='tensor'; use 8 bits, or leave it out.")
    if decode not in DECODE:
        raise CompressionError(f'decode must be "load" or "call", got {decode!r}.')
    return bits, group_size, activations if bits == 8 else None, decode


def quantize(
    weight: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round a matrix to integers on the grids that `find_grid` chooses.

    `integer = clamp(round(w / scale + zero / 16))`, in [-127, 127] with 8 bits and [0, 2^bits) below.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): floating point.
        bits (`int`): 8, 4, 3 or 2.
        group_size (`int`, *optional*): weights of a row that share a grid, below 8 bits; 64 if left out. The last group
            of a row is shorter where it does not divide `in`.

    Returns:
        integers (out, in), int8 or uint8; scale (out, groups); zero (out, groups), or None with 8 bits.

    Raises:
        CompressionError: bits or a group size that are not offered, a weight that is not a finite float matrix.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.quantization import dequantize, quantize
    >>> integers, scale, zero = quantize(torch.tensor([[-1.5, 0.0, 0.25, 2.25]]), bits=4, group_size=4)
    >>> integers, scale, zero
    (tensor([[ 0,  6,  7, 15]], dtype=torch.uint8), tensor([[0.2500]], dtype=torch.float16), tensor([[96]], dtype=torch.uint8))
    >>> dequantize(integers, scale, zero, group_size=4)
    tensor([[-1.5000,  0.0000,  0.2500,  2.2500]])

    ```
    """
    scale, zero = find_grid(weight, bits, group_size)
    return to_grid(weight, bits, group_size, scale, zero), scale, zero


def dequantize(
    integers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`scale * (integer - zero / 16)`, computed in float32.

    Args:
        integers (`torch.Tensor` of shape `(rows, in)`): as `quantize` gives them.
        scale (`torch.Tensor` of shape `(rows, groups)`): any float dtype.
        zero (`torch.Tensor` of shape `(rows, groups)`, *optional*): sixteenths of a step.
        group_size (`int`, *optional*): 64 if left out where there is a zero point.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the result.
    """
    values, scale = integers.float(), scale.float()
    if zero is None:
        return values.mul_(scale).to(dtype)
    groups, size = _grouped(values, group_size or GROUP_SIZE), values.shape[-1]
    decoded = (groups - (zero.float() / ZERO_UNIT).unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return decoded.flatten(-2)[..., :size].to(dtype)


def fake_quantize(
    weight: torch.Tensor,
    bits: int,
    group_size: int | None = None,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """The matrix that quantizing would leave, with a straight-through gradient (Bengio et al. 2013): `dy/dw = 1`.

    Weights beyond the grid's ends have that gradient too, so that they can come back.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): what is trained.
        bits, group_size: as in `quantize`.
        scale, zero (*optional*): the grid; chosen for these weights if left out.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.quantization import fake_quantize
    >>> w = torch.tensor([[0.1, -0.26, 1.27]], requires_grad=True)
    >>> rounded = fake_quantize(w, bits=8)
    >>> rounded.sum().backward()
    >>> w.grad
    tensor([[1., 1., 1.]])

    ```
    """
    with torch.no_grad():
        if scale is None:
            scale, zero = find_grid(weight, bits, group_size)
        rounded = dequantize(to_grid(weight, bits, group_size, scale, zero), scale, zero, group_size, weight.dtype)
    return weight + (rounded - weight.detach())


def to_grid(
    weight: torch.Tensor, bits: int, group_size: int | None, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """The nearest integers on given grids."""
    values, scale = weight.detach().float(), scale.float()
    if zero is None:
        return (values / scale).round_().clamp_(-127, 127).to(torch.int8)
    groups, size = _grouped(values, group_size or GROUP_SIZE), values.shape[-1]
    steps = (groups / scale.unsqueeze(-1)).add_((zero.float() / ZERO_UNIT).unsqueeze(-1))
    return steps.round_().clamp_(0, 2**bits - 1).flatten(-2)[..., :size].to(torch.uint8)


@torch.no_grad()
def find_grid(weight: torch.Tensor, bits: int, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points for a matrix.

    8 bits: `scale = max|w| / 127` per row. Below, per group, the pair of least squared error among

    - the symmetric grid of the largest weight (so it is never worse than that),
    - grids from `a * min` to `b * max`, a and b in {1, 0.9, 0.8, 0.7, 0.6} each,
    - four times the least-squares line through the best one's integers (as in alternating minimisation, Lloyd 1982),

    each with scale and zero point already rounded as they are stored.

    Raises:
        CompressionError: as `quantize`.
    """
    bits, group_size, _, _ = check_options(bits, group_size)
    _check_weight(weight)
    if group_size is None:
        largest = weight.detach().abs().amax(1, keepdim=True)
        least = TINY if weight.dtype == torch.float16 else torch.finfo(weight.dtype).tiny
        return (largest.float() / 127).clamp_(min=least).to(weight.dtype), None
    whole = weight.shape[1] // group_size * group_size
    parts = [weight[:, :whole].unflatten(1, (-1, group_size))] if whole else []
    if whole < weight.shape[1]:
        parts.append(weight[:, whole:].unsqueeze(1))
    found = [_search(part, bits) for part in parts]
    scale, zero = (torch.cat([pair[i] for pair in found], 1) for i in (0, 1))
    return scale.to(torch.float16), (zero * ZERO_UNIT).to(torch.uint8)


def fake_quantize_rows(x: torch.Tensor, activations: str = "token") -> torch.Tensor:
    """Activations as the int8 kernels see them, with a straight-through gradient.

    `scale = (max - min) / 255`, `integer = round((x - min) / scale)`, `x' = min + scale * integer`, with one minimum and
    maximum for each token (the last dimension) or for the whole tensor.

    Args:
        x (`torch.Tensor` of shape `(..., in)`): floating point.
        activations (`str`, defaults to `"token"`): or `"tensor"`.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.quantization import fake_quantize_rows
    >>> fake_quantize_rows(torch.tensor([[0.0, 0.1004, 1.0], [0.0, 10.04, 100.0]]))
    tensor([[  0.0000,   0.1020,   1.0000],
            [  0.0000,  10.1961, 100.0000]])

    ```
    """
    if not x.numel():
        return x
    with torch.no_grad():
        integers, scale, low = quantize_rows(x.reshape(1, -1) if activations == "tensor" else x.reshape(-1, x.shape[-1]))
        rounded = (integers * scale + low).view(x.shape).to(x.dtype)
    return x + (rounded - x.detach())


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers 0 to 255 (as float32), scale and minimum of each row of a matrix.

    The arithmetic is FBGEMM's, operation by operation, so that the fused kernel gives the same integers.
    """
    x = x.float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = high - low
    return ((x - low) * (255.0 / (span + 1e-8))).round_(), span / 255, low


# --- the search --------------------------------------------------------------------------------------------------


def _search(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (in steps) of each group of a (rows, groups, size) tensor."""
    rows = max(1, CHUNK // (groups.shape[1] * groups.shape[2]))
    found = [_search_rows(chunk.float(), 2**bits - 1) for chunk in groups.split(rows)]
    scale, zero = (torch.cat([pair[i] for pair in found]).squeeze(-1) for i in (0, 1))
    return scale, zero


def _search_rows(w: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    scale = _stored_scale(torch.maximum(-low, high) * 2 / (top - 1))
    zero = torch.full_like(scale, (top + 1) / 2)
    error = _error(w, scale, zero, top)

    def keep_better(other: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        other_error = _error(w, other, point, top)
        better = other_error < error
        return torch.where(better, other, scale), torch.where(better, point, zero), torch.where(better, other_error, error)

    for a, b in itertools.product(_SHRINK, _SHRINK):
        candidate = _stored_scale((high * b - low * a) / top)
        scale, zero, error = keep_better(candidate, _stored_zero(-low * a / candidate))
    for _ in range(_FITS):
        integers = (w / scale + zero).round_().clamp_(0, top)
        mean_w, mean = w.mean(-1, keepdim=True), integers.mean(-1, keepdim=True)
        centred = integers - mean
        slope = (centred * (w - mean_w)).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_(min=TINY)
        candidate = _stored_scale(slope)
        scale, zero, error = keep_better(candidate, _stored_zero(mean - mean_w / candidate))
    return scale, zero


def _error(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    integers = (w / scale).add_(zero).round_().clamp_(0, top)
    return integers.sub_(zero).mul_(scale).sub_(w).square_().sum(-1, keepdim=True)


def _stored_scale(scale: torch.Tensor) -> torch.Tensor:
    return scale.to(torch.float16).float().clamp_(TINY, torch.finfo(torch.float16).max)


def _stored_zero(zero: torch.Tensor) -> torch.Tensor:
    return (zero * ZERO_UNIT).round_().clamp_(0, 255).div_(ZERO_UNIT)


def _grouped(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """(rows, in) as (rows, groups, group_size), zeros after the end of a row."""
    short = -values.shape[-1] % group_size
    return (F.pad(values, (0, short)) if short else values).unflatten(-1, (-1, group_size))


def _check_weight(weight: torch.Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise CompressionError(
            f"Only a matrix of floating-point weights is quantized, got {weight.dtype} of shape {tuple(weight.shape)}."
        )
    if not bool(weight.detach().isfinite().all()):
        raise CompressionError("A weight holds infinities or NaN, which no grid can hold; the model is broken. Load it again.")
