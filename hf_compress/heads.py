"""How an attention computes with some of its heads, where slices alone do not do: what it reads, is given, and gives."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ConfigView:
    """A config seen by one module: some values of its own, everything else from the config that it looks at.

    A copy would not follow later changes (`set_attn_implementation`, say); a view does.
    """

    def __init__(self, base: Any, **values: Any) -> None:
        while isinstance(base, ConfigView):
            values = {**base.hfc_values(), **values}
            base = base._hfc_base
        self._hfc_base = base
        self.__dict__.update(values)

    def hfc_values(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hfc_base"}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_hfc_base":  # copy and pickle ask before there is a base
            raise AttributeError(name)
        return getattr(self._hfc_base, name)


class HeadCount(int):
    """A number of heads that divides a width as the full number did: for forwards that say `width // self.num_heads`.

    The heads that were cut away do not make those that stay larger, but a model whose forward takes the size of a head from
    the width of what comes in (BLIP) would say so.

    Example:

    ```python
    >>> from hf_compress.heads import HeadCount
    >>> heads = HeadCount(2, width=64, head_dim=16)
    >>> heads, 64 // heads, 2 * heads, 6 // heads
    (2, 16, 4, 3)

    ```
    """

    width: int
    head_dim: int

    def __new__(cls, heads: int, width: int, head_dim: int) -> HeadCount:
        self = super().__new__(cls, heads)
        self.width, self.head_dim = width, head_dim
        return self

    def __rfloordiv__(self, other: int) -> int:
        return self.head_dim if other == self.width else int(other) // int(self)

    def __reduce__(self):
        return HeadCount, (int(self), self.width, self.head_dim)


class _Fewer(TorchFunctionMode):
    """What a forward says of all heads, understood of those that there are.

    `width`: (old, new): where a tensor is brought into a shape that it does not fill, `old` in that shape means `new`.
    `heads`: those that there are, where torch's own attention is called as if there were all (WavLM), and where scores get
    a bias of all heads added in place (LongT5).
    """

    def __init__(self, width: list[int] | None, heads: list[int] | None) -> None:
        super().__init__()
        self.width, self.heads = width, heads

    def __torch_function__(self, func, types, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if self.width and func in (torch.Tensor.reshape, torch.Tensor.view, torch.reshape) and len(args) > 1:
            old, new = self.width
            given: Any = args[1:] if isinstance(args[1], int) else args[1]
            if isinstance(given, tuple | list) and -1 not in given and old in given:
                there = list(given)
                if math.prod(there) != args[0].numel():
                    there[len(there) - 1 - there[::-1].index(old)] = new
                    args = (args[0], there)
        if self.heads and func is F.multi_head_attention_forward:
            return _attend(self.heads, *args, **kwargs)
        if self.heads and func in (torch.Tensor.__iadd__, torch.Tensor.add_) and args[0].ndim == args[1].ndim > 3:
            if args[0].shape[-3] == len(self.heads) != args[1].shape[-3] > max(self.heads):
                args = (args[0], args[1].index_select(-3, torch.tensor(self.heads, device=args[1].device)))
        return func(*args, **kwargs)


def _attend(
    heads: list[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, embed_dim: int, num_heads: int,
    in_weight: Any, in_bias: torch.Tensor, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float,
    out_weight: torch.Tensor, out_bias: torch.Tensor | None, training: bool = True,
    key_padding_mask: torch.Tensor | None = None, need_weights: bool = True, attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False, **weights: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`torch.nn.functional.multi_head_attention_forward` (length first) with some of its heads: for WavLM's way of calling it.

    `attn_mask` (batch * num_heads, length, length) is of all heads, the projections' weights are those of `heads` alone.
    """
    if bias_k is not None or bias_v is not None or add_zero_attn or not use_separate_proj_weight:
        raise NotImplementedError("torch's attention with fused weights or with keys of its own")
    length, rows, _ = query.shape
    projected = [
        F.linear(x, weights[f"{name}_proj_weight"], bias).view(len(x), rows * len(heads), -1).transpose(0, 1)
        for x, name, bias in zip((query, key, value), "qkv", in_bias.chunk(3), strict=True)
    ]
    q, k, v = projected
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if attn_mask is not None:
        chosen = torch.tensor(heads, device=q.device)
        scores = scores + attn_mask.view(rows, num_heads, *attn_mask.shape[1:]).index_select(1, chosen).flatten(0, 1)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, None, :].expand(-1, len(heads), -1, -1).flatten(0, 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    shares = scores.softmax(-1)
    context = torch.bmm(F.dropout(shares, dropout_p, training), v).transpose(0, 1).reshape(length, rows, -1)
    output = F.linear(context, out_weight, out_bias)
    return output, shares.view(rows, len(heads), *shares.shape[1:]).mean(1) if need_weights else None


@functools.cache
def _narrow_class(kind: type) -> type:
    @functools.wraps(kind.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Fewer(self.__dict__.get("hfc_width"), self.__dict__.get("hfc_heads")):
            return kind.forward(self, *args, **kwargs)

    members = {"forward": forward, "hfc_plain": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**members, "__reduce_ex__": _reduce_narrow})


def _reduce_narrow(self: Any, protocol: int) -> Any:
    return _rebuild_narrow, (type(self).hfc_plain, self.__dict__)


def _rebuild_narrow(kind: type, state: dict[str, Any]) -> Any:
    module = object.__new__(_narrow_class(kind))
    module.__dict__.update(state)
    return module


def _tell_(module: Any) -> None:
    """Let the forward of an attention run where what it says of all heads is understood of those that there are."""
    if not hasattr(type(module), "hfc_plain"):
        module.__class__ = _narrow_class(type(module))


def narrow_(module: Any, old: int, new: int) -> None:
    """Let an attention whose forward names its full width when it puts the heads together (Longformer) name what is left."""
    _tell_(module)
    module.__dict__["hfc_width"] = [old, new]


HOW = ("interface", "argument", "output", "function", "added", "spread", "input")  # see `select_heads_`
SELECT = "hf_compress_select_heads"


def _attention_with_selected_bias(module, query, key, value, attention_mask, position_bias=None, **kwargs):
    """The attention that the model's config asks for, with the columns of a shared bias that belong to our heads."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._hfc_base._attn_implementation, eager)
    if position_bias is not None:
        position_bias = position_bias[:, module.hfc_heads]
    return attend(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)


AttentionInterface.register(SELECT, _attention_with_selected_bias)
AttentionMaskInterface.register(SELECT, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _select_bias_argument(module, args, kwargs):
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": kwargs["position_bias"][:, module.hfc_heads]}
    elif len(args) > 2 and args[2] is not None:
        args = (*args[:2], args[2][:, module.hfc_heads], *args[3:])
    return args, kwargs


def _select_named_argument(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    names = list(inspect.signature(module.forward).parameters)
    for name, dim, full in module.hfc_arguments:
        position = names.index(name)
        if kwargs.get(name) is not None:
            kwargs = {**kwargs, name: _chosen(kwargs[name], dim, full, module.hfc_heads)}
        elif len(args) > position and args[position] is not None:
            args = (*args[:position], _chosen(args[position], dim, full, module.hfc_heads), *args[position + 1 :])
    return args, kwargs


def _chosen(tensor: torch.Tensor, dim: int, full: int, heads: list[int]) -> torch.Tensor:
    """The rows of these heads, of a dimension that holds all heads once or once a sample (BLOOM)."""
    if tensor.shape[dim] == full:
        return tensor.index_select(dim, torch.tensor(heads, device=tensor.device))
    by_head = tensor.unflatten(dim, (-1, full))
    return by_head.index_select(dim + 1, torch.tensor(heads, device=tensor.device)).flatten(dim, dim + 1)


def _select_output(module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output[..., module.hfc_heads]


def _spread_output(module: Any, _args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    (_, _, full), rows = module.hfc_arguments[0], torch.tensor(module.hfc_heads, device=first.device)
    spread = first.new_zeros(*first.shape[:-1], full).index_copy(-1, rows, first)
    return (spread, *output[1:]) if isinstance(output, tuple) else spread


def _choose_input(module: Any, args: tuple) -> tuple:
    dim = module.hfc_arguments[0][1] or -1
    return (args[0].index_select(dim, torch.tensor(module.hfc_heads, device=args[0].device)), *args[1:])


def spread_width(module: Any) -> int | None:
    """How many inputs a projection is given where it chooses from them (`select_heads_`, "input"); None where it takes all."""
    named = getattr(module, "hfc_arguments", None) if hasattr(module, "hfc_heads") else None
    named = named or [("", 0, 0)]
    return named[0][2] if named[0][0] == "input" else None


def select_heads_(module: nn.Module, how: str, heads: list[int], arguments: list[Any] | None = None) -> None:
    """Let an attention use only these heads of a position bias that is computed once for a whole stack.

    `how`: `"interface"` where the bias travels through the attention function (T5), `"argument"` where it arrives as
    an argument of the module (MPNet), `"output"` where the module is a norm over all heads, of whose output these columns
    are used (OLMo 2), `"function"` where all that a forward knows is all heads, and torch's own function attends (WavLM),
    `"added"` where it is added to the scores in place (LongT5). `"spread"` and `"input"` where a forward cannot be told that
    there are fewer (CodeGen, which works in four groups): a projection's outputs are set among zeros, and the last projection
    chooses its inputs.

    `arguments`: which arguments: (name, dimension, heads that there are); MPNet's if left out. For `"spread"` and `"input"`
    that word, the dimension (0: the last) and its full width.
    """
    if not hasattr(module, "hfc_heads"):
        if how == "interface":
            module.config = ConfigView(module.config, _attn_implementation=SELECT)  # type: ignore[assignment]
        elif how in ("function", "added"):
            _tell_(module)
        elif how in ("spread", "input"):
            module.hfc_arguments = arguments  # type: ignore[assignment]
            if how == "spread":
                module.register_forward_hook(_spread_output)
            else:
                module.register_forward_pre_hook(_choose_input)
        elif arguments is not None:
            module.hfc_arguments = arguments  # type: ignore[assignment]
            module.register_forward_pre_hook(_select_named_argument, with_kwargs=True)
        elif how == "output":
            module.register_forward_hook(_select_output)
        else:
            module.register_forward_pre_hook(_select_bias_argument, with_kwargs=True)
    module.hfc_heads = list(heads)  # type: ignore[assignment]
