"""Fake quantization: the values that a quantized module will have, in floating point, with gradients for training.

A module is faked in place, by its class. `weight` stays the float parameter that optimizers, checkpoints and other
callbacks know; forward multiplies by its rounded values, with a straight-through gradient (Bengio et al. 2013).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..modules import LockedLinear, LowRankLinear
from .grids import fake_quantize, fake_quantize_rows, find_grid
from .modules import quantize_

Scales = dict[str, tuple[torch.Tensor, torch.Tensor | None]]  # by parameter: scale, zero point

QUANTIZED = ("weight", "weight_in")


class _Fake:
    """A projection that computes with rounded weights, and activations where those are rounded."""

    hfc_fake: dict[str, Any]
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        how = self.hfc_fake["activations"]
        if how is None:
            return self._multiply(input)
        if not torch.is_grad_enabled():
            return _twin(self)(input)  # the kernel itself: through many layers, float noise would flip other roundings
        return self._multiply(fake_quantize_rows(input, how))

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _rounded(self, "weight"), self.bias)


class FakeLinear(_Fake, nn.Linear):
    pass


class FakeLockedLinear(_Fake, LockedLinear):
    pass


class FakeConv1D(_Fake, Conv1D):
    pass


class FakeLowRankLinear(_Fake, LowRankLinear):
    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.linear(x, _rounded(self, "weight_in"))
        how = self.hfc_fake["activations"]
        return super()._multiply(inner if how is None else fake_quantize_rows(inner, how))


class FakeEmbedding(nn.Embedding):
    hfc_fake: dict[str, Any]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = super().forward(input)  # only what is looked up is rounded
        scale, zero = (None if t is None else t[input.reshape(-1)] for t in self.hfc_fake["scales"]["weight"])
        fake = self.hfc_fake
        return fake_quantize(rows.reshape(-1, rows.shape[-1]), fake["bits"], fake["group_size"], scale, zero).view_as(rows)


FAKE: dict[type, type] = {
    nn.Linear: FakeLinear,
    LockedLinear: FakeLockedLinear,
    Conv1D: FakeConv1D,
    LowRankLinear: FakeLowRankLinear,
    nn.Embedding: FakeEmbedding,
}
PLAIN = {fake: plain for plain, fake in FAKE.items()}


def fake_(module: nn.Module, bits: int, group_size: int | None, activations: str | None) -> None:
    """Let a Linear, Conv1D, low-rank Linear or Embedding compute as if it were quantized. In place, by its class."""
    module.__dict__["hfc_fake"] = {"bits": bits, "group_size": group_size, "activations": activations, "scales": {}}
    module.__class__ = FAKE[type(module)]


def unfake_(module: nn.Module) -> None:
    if type(module) in PLAIN:
        module.__class__ = PLAIN[type(module)]
        del module.__dict__["hfc_fake"]


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
    """The (out, in) weight on its grid."""
    fake = module.hfc_fake
    return fake_quantize(_matrix(module, module._parameters[name]), fake["bits"], fake["group_size"], *fake["scales"][name])


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
        if type(twin) is LockedLinear:
            twin.__class__ = nn.Linear  # type: ignore[assignment]
        given = {}
        for name in weights:
            scale, zero = fake["scales"][name]
            given |= {f"{name}_scale": scale} if zero is None else {f"{name}_scale": scale, f"{name}_zero": zero}
        options = {key: fake[key] for key in ("bits", "group_size", "activations")}
        quantize_(twin, **options, given=given)
        fake["seen"], fake["twin"] = seen, twin
    return fake["twin"]
