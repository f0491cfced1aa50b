"""Quantized modules: what a Linear, a Conv1D, a low-rank Linear or an Embedding becomes, in place, by its class.

Stored are parameters without gradient, so that tied modules can share them and every tool carries them along:

- `weight`: int8, (out, in) with 8 bits, (out, bytes) packed below. On disk it has a leading axis, which no dense model has:
  plain transformers fails on the checkpoint instead of reading integers as weights. In memory it has not: models ask a
  weight for its number of rows.
- `weight_scale`: (out, 1) in the dtype of the float weight with 8 bits; (out, groups) below, float16 *as int16 bits*, so
  that no cast of the model touches it and `model.dtype` does not see it.
- `weight_zero`: (out, groups), below 8 bits: sixteenths of a step, bytes as int8.

A low-rank Linear has the three for `weight_in` as well. What is derived from them (decoded weights, the layout that the
integer kernel wants) is made at the first forward, follows them when they change, and is never saved or copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..edits import CompressionError
from ..modules import LowRankLinear
from .grids import check_options, dequantize, fake_quantize_rows, find_grid, to_grid
from .kernels import MOST_INPUTS, has_integer_kernels, int8_linear, int8_linear_traced, prepare
from .packing import pack, packed_size, unpack


class _Quantized:
    """Integer tensors by the names of the float ones they stand for."""

    bits: int
    group_size: int | None
    activations: str | None
    decode: str
    float_dtype: torch.dtype  # of the weight that was: what an embedding gives, and follows casts as it would have
    _parameters: dict[str, Any]
    _derived: dict[Any, Any]

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """The float tensors, in the order in which they multiply."""
        raise NotImplementedError

    def _decoded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A float tensor; kept with `decode="load"`."""
        if self.decode == "call":
            return self._decode(name, dtype)
        return self._derive(name, dtype, lambda: self._decode(name, dtype))

    def _decode(self, name: str, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
        stored = [self._parameters.get(name + suffix) for suffix in ("", "_scale", "_zero")]
        integers, scale, zero = (None if p is None else p.detach() for p in stored)
        assert integers is not None and scale is not None
        if rows is not None:
            integers, scale, zero = integers[rows], scale[rows], None if zero is None else zero[rows]
        if zero is None:
            return dequantize(integers, scale, dtype=dtype)
        integers = unpack(integers, self.bits, self._shapes()[name][1])
        return dequantize(integers, scale.view(torch.float16), zero.view(torch.uint8), self.group_size, dtype)

    def _derive(self, name: str, kind: Any, make: Any) -> Any:
        """What `make()` gives, kept until a tensor of this name is another one or has been written to."""
        compiling = torch.compiler.is_compiling()
        found = self._derived.get((name, kind))
        if found is not None and (compiling or all(self._parameters[key] is p and _version(p) == v for key, p, v in found[0])):
            return found[1]
        if compiling:
            return make()
        with torch.inference_mode(False), torch.no_grad():  # kept for forwards with gradients too
            value = make()
        keys = [key for key in (name, f"{name}_scale", f"{name}_zero") if key in self._parameters]
        self._derived[name, kind] = [(key, self._parameters[key], _version(self._parameters[key])) for key in keys], value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.ndim == 3 and name in self._shapes():  # as a checkpoint has it
            flat = nn.Parameter(value.detach()[0], requires_grad=False)
            vars(flat).update(vars(value))  # transformers marks what it has loaded
            value = flat
        super().__setattr__(name, value)

    def settle_(self) -> None:
        """Give the weights the shape that they have in memory, where a loader has not filled them."""
        for name in self._shapes():
            setattr(self, name, self._parameters[name])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in self._shapes():
            if destination[prefix + name].ndim == 2:
                destination[prefix + name] = destination[prefix + name][None]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self.settle_()
        flat = {prefix + name: state_dict[prefix + name] for name in self._shapes() if prefix + name in state_dict}
        flat = {key: value[0] if value.ndim == 3 else value for key, value in flat.items()}
        super()._load_from_state_dict({**state_dict, **flat}, prefix, *args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=self.float_dtype, device=self._parameters["weight"].device)
        self.float_dtype = fn(probe).dtype
        self._derived = {}
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}

    def extra_repr(self) -> str:
        shown = {key: value for key, value in options_of(self).items() if value is not None}  # type: ignore[arg-type]
        return f"{super().extra_repr()}, " + ", ".join(f"{key}={value}" for key, value in shown.items())  # type: ignore[misc]


class QuantizedLinear(_Quantized, nn.Linear):
    """`y = x W^T + b` from integers.

    With quantized activations, on a CPU that can, the product itself is of integers; elsewhere the decoded weight and the
    same rounded activations are multiplied in floating point. Gradients to `x` are those of the decoded weight, straight
    through the rounding of activations, and go through `b`; the integers have none.
    """

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.out_features, self.in_features)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._multiply(input, "weight", self.bias)

    def _multiply(self, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        differentiable = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if not differentiable:
            return self._value(x, name, bias)
        if torch.compiler.is_compiling():  # compilers cannot see through the function below
            return self._float_value(x, name, bias)
        return _StraightThrough.apply(x, bias, self, name)

    def _value(self, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        out, size = self._shapes()[name]
        how = self.activations
        if how is None or not x.is_cpu or not x.numel() or size > MOST_INPUTS or not has_integer_kernels():
            return self._float_value(x, name, bias)
        flat = x if x.ndim == 2 else x.reshape(-1, size)
        weight, scale = self._parameters[name], self._parameters[f"{name}_scale"]
        if torch.compiler.is_compiling():
            y = int8_linear_traced(flat, weight, scale, bias, how)
        else:
            prepared = self._derive(name, "prepared", lambda: prepare(weight.detach(), scale.detach(), how))
            y = int8_linear(flat, prepared, bias, how)
        y = y if y.dtype is x.dtype else y.to(x.dtype)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], out)

    def _float_value(self, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        x = x if self.activations is None else fake_quantize_rows(x, self.activations)
        return F.linear(x, self._decoded(name, x.dtype), bias)


class _StraightThrough(torch.autograd.Function):
    """The value of a quantized product, with the gradients of the float one; the weight is decoded again, not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: QuantizedLinear, name: str) -> torch.Tensor:
        ctx.module, ctx.name = module, name
        value = module._value(x, name, bias)
        return value.clone() if value._is_view() else value  # activations may be written over it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_x, to_bias = ctx.needs_input_grad[:2]
        x = grad @ ctx.module._decoded(ctx.name, grad.dtype) if to_x else None
        return x, grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None, None, None


class QuantizedLowRank(QuantizedLinear):
    """`y = U (V x) + b` from integers; what enters U is rounded as what enters V is."""

    rank: int

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight_in": (self.rank, self.in_features), "weight": (self.out_features, self.rank)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._multiply(self._multiply(input, "weight_in", None), "weight", self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """Rows of integers, looked up, then decoded; with `decode="load"` below 8 bits, decoded once and looked up."""

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.bits < 8 and self.decode == "load":
            return F.embedding(input, self._decoded("weight", self.float_dtype))
        rows = self._decode("weight", self.float_dtype, input.reshape(-1))
        return rows.view(*input.shape, self.embedding_dim)


BECOMES: dict[type, type] = {
    nn.Linear: QuantizedLinear,
    Conv1D: QuantizedLinear,
    LowRankLinear: QuantizedLowRank,
    nn.Embedding: QuantizedEmbedding,
}


def quantized_(
    module: nn.Module,
    *,
    bits: int,
    group_size: int | None = None,
    activations: str | None = "token",
    decode: str = "load",
) -> None:
    """Give a module the class and the tensors of a quantized one, empty, for a loader to fill. Works on the meta device.

    Weights have the leading axis that they have on disk, until something is assigned to them (or `settle_`).

    Args:
        module (`nn.Module`): a Linear, Conv1D, `LowRankLinear` or Embedding; changed in place.
        bits (`int`): 8, 4, 3 or 2.
        group_size (`int`, *optional*): weights that share a scale below 8 bits; 64 if left out.
        activations (`str`, *optional*, defaults to `"token"`): how an 8-bit Linear rounds what enters it: each token by
            its own range, all by one (`"tensor"`), or not at all (`None`). Below 8 bits, and in embeddings, nothing is
            rounded.
        decode (`str`, defaults to `"load"`): decode float weights at the first use and keep them, or at every use
            (`"call"`).

    Raises:
        CompressionError: options that are not offered, another kind of module, one that is quantized already.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.quantization import quantized_
    >>> layer = torch.nn.Linear(100, 8, device="meta")
    >>> quantized_(layer, bits=4)
    >>> {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()}  # doctest: +NORMALIZE_WHITESPACE
    {'bias': ((8,), torch.float32), 'weight': ((1, 8, 50), torch.int8),
     'weight_scale': ((8, 2), torch.int16), 'weight_zero': ((8, 2), torch.int8)}

    ```
    """
    bits, group_size, activations, decode = check_options(bits, group_size, activations, decode)
    check_module(module)
    owner: Any = module
    weight = owner.weight
    if isinstance(module, Conv1D):
        owner.in_features, owner.out_features = weight.shape
    elif isinstance(module, LowRankLinear):
        owner.__dict__["rank"] = module.rank
    module.__class__ = BECOMES[type(module)]
    owner.bits, owner.group_size, owner.decode = bits, group_size, decode
    owner.activations = activations if isinstance(module, QuantizedLinear) else None
    owner.float_dtype, owner._derived = weight.dtype, {}
    bias = owner._parameters.pop("bias", None)
    owner._parameters.clear()
    if not isinstance(module, nn.Embedding):
        owner._parameters["bias"] = bias  # first: some models take the dtype of a part's first parameter for its own
    for name, (out, size) in owner._shapes().items():
        groups = 1 if group_size is None else -(-size // group_size)
        put: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if bits == 8:
            put[f"{name}_scale"] = (out, groups), weight.dtype
        put[name] = (1, out, size if bits == 8 else packed_size(size, bits)), torch.int8
        if bits < 8:
            put[f"{name}_scale"] = (out, groups), torch.int16
        if bits < 8:
            put[f"{name}_zero"] = (out, groups), torch.int8
        for key, (shape, dtype) in put.items():
            empty = torch.empty(shape, dtype=dtype, device=weight.device)
            owner._parameters[key] = nn.Parameter(empty, requires_grad=False)


@torch.no_grad()
def quantize_(
    module: nn.Module,
    *,
    bits: int,
    group_size: int | None = None,
    activations: str | None = "token",
    decode: str = "load",
    given: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Quantize one module in place, from its own float weights.

    Args:
        module, bits, group_size, activations, decode: as in `quantized_`.
        given (*optional*): `"weight_scale"` and, below 8 bits, `"weight_zero"` (sixteenths of a step), as `find_grid`
            gives them; `"weight_in_scale"`, ... too for a low-rank Linear. Chosen here if left out.

    Raises:
        CompressionError: as `quantized_`; a weight with infinities or NaN; given tensors that are missing or have
            another shape.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.quantization import dequantized, quantize_
    >>> layer = torch.nn.Linear(64, 8)
    >>> before = layer.weight.detach().clone()
    >>> quantize_(layer, bits=8)
    >>> layer
    QuantizedLinear(in_features=64, out_features=8, bias=True, bits=8, activations=token, decode=load)
    >>> bool((dequantized(layer)["weight"] - before).abs().max() <= before.abs().max() / 127)
    True

    ```
    """
    bits, group_size, activations, decode = check_options(bits, group_size, activations, decode)
    check_module(module)
    names = ("weight_in", "weight") if isinstance(module, LowRankLinear) else ("weight",)
    filled: dict[str, torch.Tensor] = {}
    for name in names:
        weight = module._parameters[name]
        assert weight is not None
        weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
        scale, zero = find_grid(weight, bits, group_size) if given is None else _given(given, name, weight, bits, group_size)
        integers = to_grid(weight, bits, group_size, scale, zero)
        filled[name] = integers if bits == 8 else pack(integers, bits)
        filled[f"{name}_scale"] = scale if zero is None else scale.view(torch.int16)
        if zero is not None:
            filled[f"{name}_zero"] = zero.view(torch.int8)
    quantized_(module, bits=bits, group_size=group_size, activations=activations, decode=decode)
    owner: Any = module
    owner.settle_()
    for key, value in filled.items():
        module._parameters[key].copy_(value)  # type: ignore[union-attr]


def dequantized(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The float tensors that a quantized module stands for: `weight` (out, in), and `weight_in` of a low-rank one."""
    if not isinstance(module, _Quantized):
        raise CompressionError(f"{type(module).__name__} is not quantized; only quantized modules have integers to decode.")
    return {name: module._decode(name, dtype or module.float_dtype) for name in module._shapes()}


def is_quantized(module: nn.Module) -> bool:
    """Whether `quantize_` or `quantized_` made this module what it is."""
    return isinstance(module, _Quantized)


def options_of(module: nn.Module) -> dict[str, Any]:
    """What `quantized_` must be told to make this module again."""
    assert isinstance(module, _Quantized)
    return {name: getattr(module, name) for name in ("bits", "group_size", "activations", "decode")}


def check_module(module: nn.Module) -> None:
    """Refuse what cannot be quantized, before anything changes."""
    if is_quantized(module):
        raise CompressionError(
            f"This {type(module).__name__} is quantized already; quantizing twice loses more than once. Start from the "
            "float model."
        )
    if type(module) not in BECOMES:
        kinds = ", ".join(kind.__name__ for kind in BECOMES)
        raise CompressionError(f"Only {kinds} can be quantized (not subclasses), got {type(module).__name__}; leave it out.")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise CompressionError("An Embedding with max_norm rescales its rows as they are used; integers cannot. Leave it out.")


def _given(
    given: Mapping[str, torch.Tensor], name: str, weight: torch.Tensor, bits: int, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (weight.shape[0], 1 if group_size is None else -(-weight.shape[1] // group_size))
    for key in (f"{name}_scale",) if bits == 8 else (f"{name}_scale", f"{name}_zero"):
        found = given.get(key)
        if found is None or tuple(found.shape) != shape:
            got = "nothing" if found is None else tuple(found.shape)
            raise CompressionError(f"{key} must have shape {shape} (rows, groups), got {got}; make the plan on this model.")
    scale = given[f"{name}_scale"].to(weight.device)
    if not bool((scale.float() > 0).all()) or not bool(scale.isfinite().all()):
        raise CompressionError(f"{name}_scale must hold finite numbers above 0; make the plan again.")
    stored = scale.to(weight.dtype if bits == 8 else torch.float16)
    if not bool(stored.isfinite().all()):
        raise CompressionError(f"{name}_scale holds values that {stored.dtype} cannot; make the plan again.")
    if bits == 8:
        return stored, None
    return stored, given[f"{name}_zero"].to(weight.device, torch.uint8)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
