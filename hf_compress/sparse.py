"""Sparse modules: what a Linear, a Conv1D, a convolution or an Embedding becomes when single weights of it are zero.

In memory, `weight` is an ordinary dense parameter with zeros: dense kernels multiply it, any Trainer trains it, any other
edit reads it. Beside it, the buffer `weight_mask` says in bits which weights stay (and ends with the CRC-32 of those bits: a
loader that found no mask would take whatever lies in memory for one). Where gradients are made, the weight is
multiplied by them, so that what is masked has a gradient of exactly zero and stays zero through any optimizer, weight decay
included; where none are, it is used as it is, and costs nothing.

On disk, `weight` holds the weights that stay, in one dimension, row-major: no dense model has such a shape, so plain
transformers fails on the checkpoint instead of loading something else. While one is read, a module holds that vector too; it
becomes dense when all is read (`settle_`), or, where weights are fetched from disk one by one, at every use.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .checks import CompressionError, shown
from .sparsity import matrix_of, pack_bits, read_pattern, unpack_bits

MASK = "weight_mask"
SEAL = 4  # bytes


def sealed(bits: torch.Tensor) -> torch.Tensor:
    """Bits with their CRC-32 behind them, lowest byte first."""
    check = zlib.crc32(bits.cpu().numpy().tobytes()).to_bytes(SEAL, "little")
    return torch.cat([bits, torch.tensor(list(check), dtype=torch.uint8, device=bits.device)])


class _Sparse:
    """A dense weight, and which of its places stay."""

    hfc_shape: tuple[int, ...]  # of the dense weight
    hfc_kept: int
    hfc_pattern: str | None
    weight_mask: torch.Tensor
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def mask(self) -> torch.Tensor:
        """Which weights stay, in the weight's shape."""
        return unpack_bits(self._buffers[MASK][:-SEAL], self.hfc_shape)

    def _held(self) -> torch.Tensor:
        """The weight to compute with."""
        weight = self._parameters["weight"]
        if weight.ndim == 1 and len(self.hfc_shape) > 1:
            return self._expanded(weight)
        return weight * self.mask() if torch.is_grad_enabled() and weight.requires_grad else weight

    def _expanded(self, values: torch.Tensor) -> torch.Tensor:
        mask = self.mask()
        if int(mask.sum()) != len(values) or not torch.equal(sealed(self._buffers[MASK][:-SEAL]), self._buffers[MASK]):
            raise CompressionError(
                f"The checkpoint's weight_mask of a {type(self).__name__} {self.hfc_shape} that keeps {len(values):,} weights "
                "is missing or damaged. Download or save it again."
            )
        return torch.zeros(self.hfc_shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    def settle_(self) -> None:
        """Make the weight dense, where it is as a checkpoint holds it."""
        old = self._parameters["weight"]
        if old.ndim != 1 or old.is_meta:
            return
        with torch.inference_mode(False), torch.no_grad():
            new = nn.Parameter(self._expanded(old.detach()), requires_grad=old.requires_grad)
        vars(new).update(vars(old))  # transformers marks what it has loaded
        self._parameters["weight"] = new

    def blank_(self) -> None:
        """A dense weight of zeros in the place of a vector that nothing has filled."""
        old = self._parameters["weight"]
        if old.ndim == 1:
            zeros = torch.zeros(self.hfc_shape, dtype=old.dtype, device=old.device)
            self._parameters["weight"] = nn.Parameter(zeros, requires_grad=old.requires_grad)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        weight = destination[prefix + "weight"]
        if keep_vars or weight.ndim == 1:
            return
        if weight.is_meta:
            destination[prefix + "weight"] = weight.new_empty(self.hfc_kept)
            return
        if tuple(weight.shape) != self.hfc_shape:
            raise CompressionError(
                f"The weight of {prefix.rstrip('.') or 'a module'!r} was replaced by one of another shape than its mask: "
                f"{tuple(weight.shape)}, not {self.hfc_shape}."
            )
        mask = self.mask().to(weight.device)
        grown = int((weight.masked_fill(mask, 0) != 0).sum())
        if grown:
            raise CompressionError(
                f"{grown:,} weights of {prefix.rstrip('.') or 'a module'!r} that its mask makes zero have been written to, and "
                "would not be saved. Zero them (module.weight.data.mul_(module.mask())), or choose a new mask: apply_ with "
                "another Sparsify."
            )
        destination[prefix + "weight"] = weight[mask]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        key, bits = prefix + "weight", prefix + MASK
        values, mine = state_dict.get(key), self._parameters["weight"]
        if values is not None and values.ndim == 1 and mine.ndim != 1 and bits in state_dict:
            mask = (
                unpack_bits(state_dict[bits][:-SEAL], self.hfc_shape)
                if len(state_dict[bits]) == len(self._buffers[MASK])
                else None
            )
            if mask is not None and int(mask.sum()) == len(values) == self.hfc_kept:
                full = torch.zeros(self.hfc_shape, dtype=values.dtype, device=values.device)
                state_dict = {**state_dict, key: full.masked_scatter(mask.to(values.device), values)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]
        if values is not None and values.ndim == 1 and bits in state_dict and mine.ndim == 1:
            self.settle_()

    def extra_repr(self) -> str:
        sparsity = 1 - self.hfc_kept / torch.Size(self.hfc_shape).numel()
        pattern = f", pattern={self.hfc_pattern}" if self.hfc_pattern else ""
        return f"{super().extra_repr()}, sparsity={sparsity:.4g}{pattern}"  # type: ignore[misc]


class SparseLinear(_Sparse, nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self._held(), self.bias)


class SparseConv1D(_Sparse, Conv1D):
    """GPT-2's, whose weight is (in, out)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self._held()).view(*x.shape[:-1], self.nf)

    def __repr__(self) -> str:
        return f"SparseConv1D(nf={self.nf}, nx={self.nx}{self.extra_repr()})"


class _SparseConvolution(_Sparse):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self._held(), self.bias)  # type: ignore[attr-defined]


class SparseConvolution1d(_SparseConvolution, nn.Conv1d):
    pass


class SparseConvolution2d(_SparseConvolution, nn.Conv2d):
    pass


class SparseEmbedding(_Sparse, nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(input, self._held(), self.padding_idx, sparse=self.sparse)


SPARSE: dict[type, type] = {
    nn.Linear: SparseLinear,
    Conv1D: SparseConv1D,
    nn.Conv1d: SparseConvolution1d,
    nn.Conv2d: SparseConvolution2d,
    nn.Embedding: SparseEmbedding,
}
DENSE = {sparse: dense for dense, sparse in SPARSE.items()}


def is_sparse(module: nn.Module) -> bool:
    """Whether single weights of a module are held at zero."""
    return isinstance(module, _Sparse)


def not_sparsifiable(module: Any) -> str | None:
    """Why single weights of a module cannot be held at zero; None where they can."""
    if type(module) not in SPARSE and type(module) not in DENSE:
        return (
            f"it is a {type(module).__module__}.{type(module).__name__}, not a plain Linear, Conv1D, convolution or Embedding"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it is an Embedding with max_norm, which rescales its rows as they are used"
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.sparse):
        return "it is an Embedding with gradients of its own kind (sparse, or scaled by frequency)"
    return None


def sparse_(module: Any, kept: int, shape: str, pattern: str | None = None) -> None:
    """Give a module the class and the tensors of a sparse one, empty, as a checkpoint holds them. Works on the meta device.

    Args:
        module (`nn.Module`): changed in place.
        kept (`int`): how many weights stay.
        shape (`str`): of the dense weight, as `"16 32"`, which may be smaller than the module's is.
        pattern (`str`, *optional*): which N of every M stay; said, not checked here.

    Raises:
        CompressionError: another kind of module, or a shape or number that does not fit it.
    """
    reason = not_sparsifiable(module)
    sizes = tuple(int(n) for n in shape.split()) if isinstance(shape, str) and shape.replace(" ", "").isdecimal() else ()
    weight: Any = module._parameters.get("weight")
    if reason is None and (
        weight is None
        or len(sizes) != weight.ndim
        or not all(0 < n <= m for n, m in zip(sizes, weight.shape, strict=True))
        or type(kept) is not int
        or not 0 < kept <= torch.Size(sizes).numel()
    ):
        reason = f"its weight cannot have {shown(kept)} of the weights of a shape of {shown(shape)}"
    if reason is not None:
        raise CompressionError(f"No weights of a {type(module).__name__} can be held at zero: {reason}.")
    assert weight is not None
    read_pattern(pattern)
    new = nn.Parameter(torch.empty(kept, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad)
    bits = torch.empty(-(-torch.Size(sizes).numel() // 8) + SEAL, dtype=torch.uint8, device=weight.device)
    _become(module, new, bits, sizes, kept, pattern)


def sparsify_(module: Any, mask: torch.Tensor, values: torch.Tensor | None = None, pattern: str | None = None) -> None:
    """Hold at zero what a mask (True stays) removes from one module's weight, in place; the weight is a new parameter.

    Args:
        module (`nn.Module`): a Linear, Conv1D, Conv1d, Conv2d or Embedding, sparse already or not.
        mask (`torch.Tensor`): bool, of the weight's shape.
        values (`torch.Tensor`, *optional*): what the weights that stay become, row-major in one dimension.
        pattern (`str`, *optional*): the N:M that the mask follows, for people.

    Raises:
        CompressionError: another kind of module; a mask of another shape, or one that keeps nothing; other than finite values.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.sparse import sparsify_
    >>> layer = torch.nn.Linear(4, 1)
    >>> sparsify_(layer, torch.tensor([[True, False, False, True]]), torch.tensor([2.0, 3.0]))
    >>> layer.weight.tolist(), {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    ([[2.0, 0.0, 0.0, 3.0]], {'weight': (2,), 'bias': (1,), 'weight_mask': (5,)})

    ```
    """
    reason = not_sparsifiable(module)
    weight: Any = module._parameters.get("weight")
    if reason is None and (weight is None or mask.shape != weight.shape or mask.dtype != torch.bool):
        reason = (
            f"the mask is {mask.dtype} {tuple(mask.shape)}, and the weight {None if weight is None else tuple(weight.shape)}"
        )
    kept = int(mask.sum())
    if reason is None and (not kept or (values is not None and tuple(values.shape) != (kept,))):
        reason = f"the mask keeps {kept} weights" + ("" if values is None else f" for {tuple(values.shape)} values")
    if reason is not None:
        raise CompressionError(f"No weights of this {type(module).__name__} can be held at zero: {reason}.")
    assert weight is not None
    mask = mask.to(weight.device)
    with torch.inference_mode(False), torch.no_grad():
        dense = weight.detach().masked_fill(~mask, 0)
        if values is not None:
            dense = torch.zeros_like(dense).masked_scatter(mask, values.to(dense))
        if not bool(dense.isfinite().all()):
            raise CompressionError(f"The weights that stay do not fit into {dense.dtype}; make the plan again.")
        new = nn.Parameter(dense, requires_grad=weight.requires_grad)
    _become(module, new, sealed(pack_bits(mask)), tuple(weight.shape), kept, pattern)


def _become(module: Any, weight: nn.Parameter, bits: torch.Tensor, shape: Any, kept: int, pattern: str | None) -> None:
    module.__class__ = SPARSE.get(type(module), type(module))
    module._parameters["weight"] = weight
    vars(module)["_buffers"] = {**module._buffers, MASK: bits}  # another dict: what takes a change back holds the old one
    module.hfc_shape, module.hfc_kept, module.hfc_pattern = shape, kept, pattern


def unsparse_(module: Any) -> None:
    """Make a sparse module an ordinary one again; its zeros are weights like any."""
    module.__class__ = DENSE[type(module)]
    vars(module)["_buffers"] = {key: value for key, value in module._buffers.items() if key != MASK}
    for key in ("hfc_shape", "hfc_kept", "hfc_pattern"):
        vars(module).pop(key, None)
    kinds = [kind for kind in vars(module).pop("hfc_kinds", []) if kind[0] != "sparse"]
    if kinds:
        vars(module)["hfc_kinds"] = kinds


def options_of_sparse(module: Any) -> dict[str, Any]:
    """What `sparse_` must be told to make this module again."""
    return {"kept": module.hfc_kept, "shape": " ".join(map(str, module.hfc_shape)), "pattern": module.hfc_pattern}


def follows(module: nn.Module, mask: torch.Tensor, kept: int, of: int) -> bool:
    """Whether at most `kept` of every `of` neighbours stay, along what each output sums over."""
    matrix = matrix_of(module, mask)
    return matrix.shape[1] % of == 0 and int(matrix.reshape(-1, of).sum(1).max()) <= kept
