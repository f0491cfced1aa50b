"""What a module can become: the kinds that surgery makes and the loader makes again, by name, empty.

Each function here changes one module in place, by its class, so that its identity, its name and its hooks stay. It
looks at nothing but the module's own sizes, works on the meta device, and leaves tensors whose values are anybody's.
Under the original key `weight`, each kind has a shape that the original cannot have: without this package, plain
transformers fails on such a checkpoint instead of loading something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .edits import CompressionError
from .modules import LockedLinear, LowRankLinear, width
from .quantization import is_quantized, options_of, quantized_
from .sparse import sparse_

# --- low rank ----------------------------------------------------------------------------------------------------


def low_rank_(module: Any, rank: int) -> None:
    """Turn a Linear or a Conv1D into a `LowRankLinear`."""
    if type(module) not in (nn.Linear, Conv1D):
        raise CompressionError(f"Only a Linear or Conv1D can be made low-rank, got {type(module).__name__}.")
    weight, bias = module.weight, module.bias
    module.out_features, module.in_features = width(module, 0), width(module, 1)
    if type(rank) is not int or not 0 < rank * (module.out_features + module.in_features) < weight.numel():
        raise CompressionError(
            f"Rank {rank!r} of a {module.out_features} x {module.in_features} weight saves nothing: the largest that does is "
            f"{largest_rank(module.out_features, module.in_features)}."
        )
    module.__class__ = LowRankLinear
    module._parameters.clear()
    module.register_parameter("weight", _empty(weight, (module.out_features, rank)))
    module.register_parameter("bias", bias)
    module.register_parameter("weight_in", _empty(weight, (rank, module.in_features)))


def largest_rank(out: int, inner: int) -> int:
    """The largest rank at which two factors are smaller than the matrix."""
    return (out * inner - 1) // (out + inner)


def _empty(like: torch.Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=like.requires_grad)


# --- depthwise separable -----------------------------------------------------------------------------------------


class _Separable:
    """Kernels of each input channel, `weight_depth` (in * multiplier, 1, *kernel), then a 1x1 convolution, `weight`."""

    weight: nn.Parameter
    weight_depth: nn.Parameter

    @property
    def multiplier(self) -> int:
        return self.weight_depth.shape[0] // self.in_channels  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self_: Any = self
        convolve = F.conv1d if isinstance(self, nn.Conv1d) else F.conv2d
        padding = self_.padding
        if self_.padding_mode != "zeros":
            input = F.pad(input, self_._reversed_padding_repeated_twice, mode=self_.padding_mode)
            padding = 0
        hidden = convolve(input, self.weight_depth, None, self_.stride, padding, self_.dilation, self_.in_channels)
        return convolve(hidden, self.weight, self_.bias, groups=self_.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multiplier={self.multiplier}"  # type: ignore[misc]


class SeparableConv1d(_Separable, nn.Conv1d):
    pass


class SeparableConv2d(_Separable, nn.Conv2d):
    pass


SEPARABLE: dict[type, type] = {nn.Conv1d: SeparableConv1d, nn.Conv2d: SeparableConv2d}


def separable_(module: Any, multiplier: int) -> None:
    """Turn a Conv1d or Conv2d into a depthwise separable one."""
    reason = not_separable(module, multiplier)
    if reason:
        raise CompressionError(f"{type(module).__name__} cannot be made depthwise separable: {reason}.")
    weight, bias = module.weight, module.bias
    ones = (1,) * len(module.kernel_size)
    module.__class__ = SEPARABLE[type(module)]
    module._parameters.clear()
    module.register_parameter("weight", _empty(weight, (module.out_channels, weight.shape[1] * multiplier, *ones)))
    module.register_parameter("bias", bias)
    module.register_parameter("weight_depth", _empty(weight, (module.in_channels * multiplier, 1, *module.kernel_size)))


def not_separable(module: Any, multiplier: int = 1) -> str | None:
    """Why a convolution cannot be replaced; None where it can."""
    if type(module) not in SEPARABLE:
        return f"only a plain Conv1d or Conv2d can, and this is a {type(module).__name__}"
    positions = module.weight[0, 0].numel()
    if positions == 1:
        return "its kernel has one position, so there is nothing to separate"
    if module.groups == module.in_channels > 1:
        return "it is depthwise already"
    most = min(positions, module.out_channels // module.groups)
    if type(multiplier) is not int or not 0 < multiplier <= most:
        return f"the multiplier must lie between 1 and {most} (at which the fit is exact), got {multiplier!r}"
    smaller = multiplier * (module.in_channels * positions + module.weight.numel() // positions)
    if smaller >= module.weight.numel():
        return f"{smaller:,} weights would take the place of {module.weight.numel():,}"
    return None


# --- all of them -------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., None]] = {
    "low_rank": low_rank_,
    "separable": separable_,
    "quantized": quantized_,
    "sparse": sparse_,
}


def make_(module: nn.Module, kinds: list[list[Any]]) -> None:
    """Make a module what it became, one change after the other, as `["low_rank", {"rank": 8}]`.

    Raises:
        CompressionError: a change is not known, or does not fit this module.
    """
    if kinds:
        module.__dict__["hfc_kinds"] = kinds
        if type(module) is LockedLinear:  # what it becomes is lock enough
            module.__class__ = nn.Linear  # type: ignore[assignment]
    for name, options in kinds:
        try:
            KINDS[name](module, **options)
        except (TypeError, AttributeError) as error:
            raise CompressionError(f"A {type(module).__name__} cannot become {name} with {options!r}: {error}.") from error


def follow_ties_(model: Any) -> None:
    """transformers ties parameters by name: scales and zero points go where their integers go."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    modules = dict(model.named_modules())
    for target, source in list(ties.items()):
        one, other = (modules.get(name.rpartition(".")[0]) for name in (target, source))
        if one is None or other is None or not target.endswith(".weight"):
            continue
        if is_quantized(other) and type(one) is nn.Linear:  # a head that the checkpoint did not have
            make_(one, [["quantized", {**options_of(other), "activations": None}]])
        if is_quantized(one):
            one.settle_()  # type: ignore[operator]  # no checkpoint fills it, and transformers counts its rows before it ties it
        for key in ("weight_scale", "weight_zero"):
            if key in one._parameters and key in other._parameters:
                ties[f"{target.removesuffix('weight')}{key}"] = f"{source.removesuffix('weight')}{key}"


def check_kinds(kinds: Any, where: str) -> None:
    """Refuse what no `make_` takes; from a file, anything may come."""
    for kind in kinds:
        if (
            not isinstance(kind, list)
            or len(kind) != 2
            or not isinstance(kind[0], str)
            or kind[0] not in KINDS
            or not isinstance(kind[1], Mapping)
            or not all(isinstance(v, str | int | None) for v in kind[1].values())
        ):
            raise CompressionError(
                f"The layout says that {where!r} became {str(kind)[:80]!r}; this hf_compress knows {', '.join(KINDS)}. "
                "Upgrade hf_compress."
            )
