"""Small integers in bytes: four bits two a byte, two bits four, three bits as two and one."""

from __future__ import annotations

import torch
from torch.nn import functional as F

FIELDS = {4: (4,), 3: (2, 1), 2: (2,)}  # by bits: widths that divide a byte, from the lowest bit up


def packed_size(size: int, bits: int) -> int:
    """Bytes for a row of `size` integers.

    ```python
    >>> packed_size(5, 4), packed_size(8, 3), packed_size(9, 2)
    (3, 3, 3)

    ```
    """
    return sum(-(-size * width // 8) for width in FIELDS[bits])


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack whole numbers in [0, 2^bits) along the last dimension; the first of a byte is in its lowest bits.

    A row ends with a whole byte. Three bits are stored as all the lower two, then all the upper ones.

    Args:
        integers (`torch.Tensor` of shape `(..., size)`): any integer dtype.
        bits (`int`): 4, 3 or 2.

    Returns:
        an int8 tensor of shape `(..., packed_size(size, bits))`.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.quantization.packing import pack, unpack
    >>> pack(torch.tensor([[1, 2, 15]]), 4)
    tensor([[33, 15]], dtype=torch.int8)
    >>> unpack(pack(torch.tensor([[1, 2, 15]]), 4), 4, 3)
    tensor([[ 1,  2, 15]], dtype=torch.uint8)

    ```
    """
    rest, planes = integers.to(torch.uint8), []
    for width in FIELDS[bits]:
        count = 8 // width
        field = rest & (2**width - 1)
        field = F.pad(field, (0, -field.shape[-1] % count)).unflatten(-1, (-1, count))
        planes.append((field << _shifts(width, field.device)).sum(-1, dtype=torch.uint8))
        rest = rest >> width
    return torch.cat(planes, -1).view(torch.int8)


def unpack(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The `size` integers of each row that `pack` stored, as uint8."""
    widths = FIELDS[bits]
    planes = packed.view(torch.uint8).split([-(-size * width // 8) for width in widths], -1)
    fields = [
        (plane.unsqueeze(-1) >> _shifts(width, plane.device) & (2**width - 1)).flatten(-2)[..., :size]
        for plane, width in zip(planes, widths, strict=True)
    ]
    return fields[0] if len(fields) == 1 else fields[0] | fields[1] << widths[0]


def _shifts(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)
