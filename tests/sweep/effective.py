"""The float form of a model whose modules became something else, computed here from what they store."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

import hf_compress as hc


def float_form(dense: Any, model: Any, plan: hc.Plan) -> Any:
    """`dense`, changed to hold the weights that the new modules of `model` stand for."""
    new = dict(model.named_modules())
    done: set[int] = set()
    with torch.no_grad():
        for name, module in dense.named_modules():
            other = new[name]
            if type(other) is type(module) or not hasattr(module, "weight") or id(module.weight) in done:
                continue
            if type(other).__name__ in ("GatedLinear", "LockedLinear"):
                continue
            if "weight_mask" in other._buffers:
                bits = other._buffers["weight_mask"]
                mask = torch.stack([bits >> i & 1 for i in range(8)], -1).flatten()[: other.weight.numel()]
                done.add(id(module.weight))
                module.weight.mul_(mask.view_as(module.weight))  # the weights that stay are those that were there
                continue
            weight = stands_for(other)
            done.add(id(module.weight))
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    return dense


def stands_for(module: Any) -> torch.Tensor:
    """A module's weight as the formulas in the documentation say: U V; kernels times mixing; scale (integer - zero)."""
    stored = dict(module._parameters)
    if "weight_depth" in stored:
        return _composed(stored["weight"], stored["weight_depth"], module)
    if "weight_scale" not in stored:
        return stored["weight"] @ stored["weight_in"]
    integers, scale = stored["weight"], stored["weight_scale"]
    if integers.ndim == 3:
        integers = integers[0]
    if module.bits == 8:
        return integers.float() * scale.float()
    assert module.bits == 4
    size = module.embedding_dim if hasattr(module, "embedding_dim") else module.in_features
    packed = integers.view(torch.uint8)
    numbers = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :size].float()
    step = scale.view(torch.float16).float().repeat_interleave(module.group_size, 1)[:, :size]
    zero = stored["weight_zero"].view(torch.uint8).float().repeat_interleave(module.group_size, 1)[:, :size]
    return step * (numbers - zero / 16)


def _composed(point: torch.Tensor, depth: torch.Tensor, module: Any) -> torch.Tensor:
    """w[o, i] = sum over m of point[o, i m] depth[i m]; i counts the inputs of the group that o lies in."""
    groups, times = module.groups, depth.shape[0] // module.in_channels
    each = module.in_channels // groups
    mixing = point.reshape(groups, module.out_channels // groups, each, times)
    kernels = depth.reshape(groups, each, times, *depth.shape[2:])
    return torch.einsum("goim,gim...->goi...", mixing, kernels).flatten(0, 1)


def without_rounding(model: Any) -> Any:
    """A copy of a quantized model that does not round what enters its layers."""
    double = copy.deepcopy(model)
    for module in double.modules():
        if getattr(module, "activations", None) in ("token", "tensor") and hasattr(module, "bits"):
            module.activations = None
    return double
