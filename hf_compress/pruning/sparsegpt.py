r"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): which single weights go, and what the others become.

A row `w` of a projection should, with some of its weights zero, give what it gave: least `|X (v - w)|^2` over calibration
rows. With `H = X' X + damping`, taking weight `j` out of the best solution there is costs `v_j^2 / [H^-1]_jj`, and moves the
others by `-v_j / [H^-1]_jj * [H^-1]_:j` (optimal brain surgeon, Hassibi and Stork 1993). Done column by column, with only the
columns to the right free to move, the inverses for all rows are those of one matrix: row `j` of the upper Cholesky factor of
`H^-1` is what elimination has left of it. So all rows share it, and a projection takes one factorisation.
"""

from __future__ import annotations

import torch

from ..checks import CompressionError
from ..sparsity import choose_masks, read_pattern

DAMPING = 0.01
BLOCK = 128
TRIES = 8  # with ten times the damping each


def sparsegpt(
    weight: torch.Tensor,
    gram: torch.Tensor,
    sparsity: float,
    pattern: str | None = None,
    scope: str = "row",
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a matrix column by column, each block of columns by its own choice, while those to the right make up for it.

    Args:
        weight (`torch.Tensor`): (out, in).
        gram (`torch.Tensor`): `X' X` of what it multiplies, (in, in); its scale does not matter.
        sparsity (`float`): the fraction that goes; each block takes its share, so that the count is exact at the end.
        pattern (`str`, *optional*): `"2:4"`, ...: chosen in each group when its turn comes.
        scope (`str`, defaults to `"row"`): every row loses as many, or rows of a block compete (`"layer"`, as in the paper).
        damping (`float`, defaults to 0.01): added to the diagonal, as a fraction of its mean.
        block (`int`, defaults to 128): columns whose weights are chosen together.

    Returns:
        (the new weight with zeros, the mask: True stays). Both of the weight's shape, the first of its dtype.

    Raises:
        CompressionError: a Gram matrix that no damping makes invertible, or columns that a pattern does not divide.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.sparsegpt import sparsegpt
    >>> same = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are always equal
    >>> new, mask = sparsegpt(torch.tensor([[1.0, 2.0]]), same, 0.5, damping=1e-6)
    >>> new.round(decimals=3), mask
    (tensor([[0., 3.]]), tensor([[False,  True]]))

    ```
    """
    group = read_pattern(pattern)
    rows, columns = weight.shape
    if group is not None:
        if columns % group[1]:
            raise CompressionError(
                f"{pattern} needs rows that divide into groups of {group[1]}, and these have {columns} columns."
            )
        block = max(group[1], block // group[1] * group[1])
    upper = _inverse_factor(gram, damping)
    new, mask = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, factor = new[:, first:last].clone(), upper[first:last, first:last]
        diagonal = factor.diagonal()
        stays = torch.ones_like(part, dtype=torch.bool)
        if group is None:
            stays = _share(part.square() / diagonal.square(), sparsity, scope, first, last, rows, columns)
        off = torch.zeros_like(part)
        for j in range(last - first):
            if group is not None and j % group[1] == 0:
                here = slice(j, j + group[1])
                stays[:, here] = choose_masks({"": part[:, here].square() / diagonal[here].square()}, 0.0, "row", pattern)[""]
            off[:, j] = part[:, j].masked_fill(stays[:, j], 0) / diagonal[j]
            part[:, j:] -= off[:, j, None] * factor[j, j:]
            part[:, j].masked_fill_(~stays[:, j], 0)
        new[:, first:last], mask[:, first:last] = part, stays
        new[:, last:] -= off @ upper[first:last, last:]
    return new.masked_fill(~mask, 0).to(weight.dtype), mask


def _share(scores: torch.Tensor, sparsity: float, scope: str, first: int, last: int, rows: int, columns: int) -> torch.Tensor:
    """The mask of one block: what lies before it has lost its share, rounded, so this one makes the sum right."""
    each = rows if scope == "row" else 1
    total = round(sparsity * columns * rows / each)  # of a row, or of the matrix
    gone = round(total * last / columns) - round(total * first / columns)
    table = scores if scope == "row" else scores.reshape(1, -1)
    lowest = table.argsort(dim=1, stable=True)[:, :gone]
    return torch.ones_like(table, dtype=torch.bool).scatter_(1, lowest, False).reshape(scores.shape)


def _inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of (gram + damping)^-1."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    for attempt in range(TRIES):
        damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * mean * damping * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
    raise CompressionError("The inputs' Gram matrix cannot be inverted, whatever is added to its diagonal; give other batches.")
