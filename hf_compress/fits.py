"""The best approximations of a trained weight by a smaller form. Pure functions of tensors."""

from __future__ import annotations

import torch


def best_rank(weight: torch.Tensor, rank: int, gram: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The factors U (out, rank) and V (rank, in) that lose least.

    Without `gram`, the truncated SVD: U V minimises \|W - U V\|_F (Eckart and Young 1936). With the Gram matrix
    G = X^T X of the layer's inputs it minimises the error of the outputs, \|X (W - U V)^T\|_F: with G = S S^T, truncate
    the SVD of W S and undo S (the whitening of SVD-LLM, Wang et al. 2024).

    Args:
        weight: (out, in).
        rank: number of singular triplets that stay.
        gram: (in, in), *optional*. Directions that no input has count 1e-6 of the mean one.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.fits import best_rank
    >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> u, v = best_rank(weight, 1)
    >>> (u @ v).round(decimals=4).abs()
    tensor([[3., 0.],
            [0., 0.]])

    ```
    """
    kind = weight.dtype
    weight = weight.double()
    if gram is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        spread, axes = torch.linalg.eigh(gram.to(weight))
        spread = spread.clamp_min(1e-6 * float(spread.mean()) + torch.finfo(torch.float32).tiny).sqrt()
        left, values, right = torch.linalg.svd(weight @ (axes * spread), full_matrices=False)
        right = (right / spread) @ axes.T
    root = values[:rank].sqrt()  # split evenly, so that both factors train at one learning rate
    out, inner = left[:, :rank] * root, root[:, None] * right[:rank]
    if gram is not None:  # whitened factors differ in scale: make them equally large
        scale = (inner.norm(dim=1) / out.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
        out, inner = out * scale, inner / scale[:, None]
    return out.to(kind), inner.to(kind)


def best_kernels(weight: torch.Tensor, groups: int, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A depthwise and a pointwise weight that together are closest to a convolution's.

    For each input channel i, the matrix W[:, i, :] (outputs of its group x kernel positions) is replaced by its
    `multiplier` largest singular triplets. Channels do not interact in the squared error, so this is the best fit.

    Args:
        weight: (out, in / groups, *kernel).
        groups: of the convolution.
        multiplier: kernels per input channel.

    Returns:
        depthwise (in * multiplier, 1, *kernel) and pointwise (out, in / groups * multiplier, 1, ...).
    """
    out, per_group, *kernel = weight.shape
    # (groups, out of a group, in of a group, positions) -> one matrix per input channel
    matrices = weight.double().reshape(groups, out // groups, per_group, -1).permute(0, 2, 1, 3)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    root = values[..., :multiplier].sqrt()
    depth = (root[..., None] * right[..., :multiplier, :]).reshape(groups * per_group * multiplier, 1, *kernel)
    point = (left[..., :multiplier] * root[..., None, :]).permute(0, 2, 1, 3)  # groups, out, in, multiplier
    return depth.to(weight.dtype), point.reshape(out, per_group * multiplier, *(1 for _ in kernel)).to(weight.dtype)


def compose_kernels(depth: torch.Tensor, point: torch.Tensor, groups: int, multiplier: int) -> torch.Tensor:
    """The weight (out, in / groups, *kernel) of the one convolution that a depthwise and a pointwise one make together."""
    out, columns = point.shape[:2]
    kernels = depth.reshape(groups, columns // multiplier, multiplier, -1)
    mixing = point.reshape(groups, out // groups, columns // multiplier, multiplier)
    return torch.einsum("goim,gimk->goik", mixing, kernels).reshape(out, columns // multiplier, *depth.shape[2:])
