"""Fake quantization: the values that a quantized module will have, in floating point, with gradients for training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..modules import LowRankLinear
from .grids import fake_quantize, fake_quantize_rows, find_grid
from .modules import quantize_

Scales = dict[str, tuple[torch.Tensor, torch.Tensor | None]]  # by parameter: scale, zero point

QUANTIZED = ("weight", "weight_in")


class _Fake:
    """A module that computes with rounded weights (and activations); its parameters stay the float ones that are trained.

    `weight` is a property of the class here: every forward that says `self.weight` gets the rounded one, with a
    straight-through gradient (Bengio et al. 2013), while optimizers and checkpoints see the parameter itself.
    """

    _parameters: dict[str, Any]
    hfc_fake: dict[str, Any]

    @property
    def weight(self) -> torch.Tensor:
        return _rounded(self, "weight")

    @property
    def weight_in(self) -> torch.Tensor:
        return _rounded(self, "weight_in")

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        how = self.hfc_fake["activations"]
        if how is None:
            return super().forward(input, *args, **kwargs)  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return _twin(self)(input)  # the kernel itself: through many layers, float noise would flip other roundings
        input = fake_quantize_rows(input, how)
        if isinstance(self, LowRankLinear):
            inner = fake_quantize_rows(F.linear(input, self.weight_in), how)
            return F.linear(inner, self.weight, self.bias)
        return super().forward(input)  # type: ignore[misc]


FAKE: dict[type, type] = {}  # a module's class -> its subclass that rounds
PLAIN: dict[type, type] = {}


def fake_(module: nn.Module, bits: int, group_size: int | None, activations: str | None) -> None:
    """Let a Linear, Conv1D, low-rank Linear or Embedding compute as if it were quantized. In place, by its class."""
    cls = type(module)
    if cls not in FAKE:
        FAKE[cls] = type(cls.__name__, (_Fake, cls), {"__module__": cls.__module__})
        PLAIN[FAKE[cls]] = cls
    module.__dict__["hfc_fake"] = {"bits": bits, "group_size": group_size, "activations": activations, "scales": {}}
    module.__class__ = FAKE[cls]


def unfake_(module: nn.Module) -> None:
    if type(module) in PLAIN:
        module.__class__ = PLAIN[type(module)]
        del module.__dict__["hfc_fake"]


@torch.no_grad()
def _twin(module: Any) -> nn.Module:
    """The quantized module that this one stands for, kept until a weight or a scale is another one."""
    fake = module.hfc_fake
    weights = {name: module._parameters[name] for name in QUANTIZED if name in module._parameters}
    seen = [(id(w), w._version, id(fake["scales"][name][0])) for name, w in weights.items()]
    if fake.get("seen") != seen:
        twin = copy.copy(module)  # shares its parameters, until it is given its own
        twin.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters)}
        unfake_(twin)
        given = {}
        for name in weights:
            scale, zero = fake["scales"][name]
            given |= {f"{name}_scale": scale} if zero is None else {f"{name}_scale": scale, f"{name}_zero": zero}
        options = {key: fake[key] for key in ("bits", "group_size", "activations")}
        quantize_(twin, **options, given=given)
        fake["seen"], fake["twin"] = seen, twin
    return fake["twin"]


def is_fake(module: nn.Module) -> bool:
    return type(module) in PLAIN


@torch.no_grad()
def observe_(module: nn.Module) -> None:
    """Choose the scales (and zero points) anew, for the weights as they are."""
    fake = module.__dict__["hfc_fake"]
    for name in QUANTIZED:
        weight = module._parameters.get(name)
        if weight is not None:
            fake["scales"][name] = find_grid(_matrix(module, weight), fake["bits"], fake["group_size"])


def scales_of(module: nn.Module) -> Scales:
    return module.__dict__["hfc_fake"]["scales"]


def _matrix(module: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if isinstance(module, Conv1D) else weight


def _rounded(module: Any, name: str) -> torch.Tensor:
    fake = module.hfc_fake
    weight = module._parameters[name]
    scale, zero = fake["scales"][name]
    rounded = fake_quantize(_matrix(module, weight), fake["bits"], fake["group_size"], scale, zero)
    return rounded.T if isinstance(module, Conv1D) else rounded
