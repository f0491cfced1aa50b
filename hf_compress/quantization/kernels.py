"""Linear layers in integers on the CPU: int8 weights, activations rounded to 8 bits a row (or all together) on the fly.

`y = s * (q W^T) * w + m * c + b`, with q the row's integers, s and m its scale and minimum, w the weights' scales and
`c = w * sum(W)` the columns' sums. `docs/int8.md` holds the measurements that chose this kernel: oneDNN's unsigned x signed
product (VNNI) with float output, after FBGEMM's row quantization in one pass over memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .grids import quantize_rows

MOST_INPUTS = 2**31 // (255 * 127) - 8  # more would overflow the 32-bit sums
TAIL = 8  # bytes that FBGEMM puts after each row: its scale and minimum, as floats


class Prepared(NamedTuple):
    """An int8 weight as the kernel wants it."""

    blocks: torch.Tensor  # in oneDNN's layout; for rows that keep their tail, `TAIL` inputs of zero weight are appended
    scale: torch.Tensor  # (out,) float32
    sums: torch.Tensor  # (out,) float32, of the decoded rows
    points: torch.Tensor  # (out,) int32 zeros


def prepare(weight: torch.Tensor, scale: torch.Tensor, activations: str = "token") -> Prepared:
    """Lay out an (out, in) int8 weight with its (out, 1) scales for `int8_linear`."""
    scale = scale.float().flatten().contiguous()
    wide = F.pad(weight, (0, TAIL)) if activations == "token" else weight.contiguous()
    blocks = torch.ops.onednn.qlinear_prepack(wide, None)
    return Prepared(blocks, scale, _sums(weight, scale), torch.zeros_like(scale, dtype=torch.int32))


def int8_linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None, activations: str = "token") -> torch.Tensor:
    """The product of a prepared weight with `(rows, in)` activations, in float32."""
    rows, size = x.shape
    if x.dtype is not torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
    if activations == "tensor":
        integers, scale, low = _rounded(x.view(1, -1))
        integers = integers[:, :-TAIL].view(rows, size)
    else:
        integers, scale, low = _rounded(x)
    y = _product(integers, prepared)
    y = y.mul_(scale) if bias is None else torch.addcmul(bias if bias.dtype is y.dtype else bias.float(), y, scale, out=y)
    return y.addcmul_(low, prepared.sums)


def int8_linear_traced(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: str = "token"
) -> torch.Tensor:
    """The same in operations that compilers know and fuse (`torch.compile`, `torch.export`): the integers are the same."""
    rows, size = x.shape
    integers, step, low = quantize_rows(x.reshape(1, -1) if activations == "tensor" else x)
    integers = (integers - 128).to(torch.int8).view(rows, size)
    scale = scale.float().flatten()
    product = torch._int_mm(integers, weight.t())  # type: ignore[reportPrivateImportUsage]
    y = product.float() * scale * step + (low + 128 * step) * _sums(weight, scale)
    return y if bias is None else y + bias.float()


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`grids.quantize_rows` in one pass: (rows, in + TAIL) uint8, and the (rows, 1) scales and minima out of its tail."""
    integers = torch.ops.quantized.embedding_bag_byte_prepack(x)
    if x.shape[1] % 4:  # floats that do not lie at multiples of their size
        tail = integers[:, -TAIL:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    else:
        tail = integers.view(torch.float32)
    return integers, tail[:, -2:-1], tail[:, -1:]


def _product(integers: torch.Tensor, to: Prepared) -> torch.Tensor:
    kernel: Any = torch.ops.onednn.qlinear_pointwise
    return kernel(integers, 1.0, 0, to.blocks, to.scale, to.points, None, 1.0, 0, torch.float32, "none", [], "")


def _sums(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.sum(1, dtype=torch.int32).float() * scale


def has_integer_kernels() -> bool:
    """Whether this CPU and build have the kernel and it adds in 32 bits, as the kernel itself showed.

    Without VNNI, unsigned x signed products may be added in 16 bits, and saturate (`ONEDNN_MAX_CPU_ISA` can bring that
    about on any CPU). Linear layers then compute in floating point with the same rounded values.
    """
    return _EXACT


def _try_kernels() -> bool:
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            weight = torch.full((16, 64), 127, dtype=torch.int8)
            prepared = prepare(weight, torch.ones(16, 1), "tensor")
            _rounded(torch.zeros(1, 64))
            product = _product(torch.full((16, 64), 255, dtype=torch.uint8), prepared)
            return bool((product == 64 * 255 * 127).all())
    except (AttributeError, RuntimeError):  # no such operation in this build, or not for this CPU
        return False


_EXACT = _try_kernels()  # at import: compilers trace forwards with tensors that have no values
