"""The modules and small in-place operations that surgery, masks and the loader share. Torch and transformers only."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

# --- widths ------------------------------------------------------------------------------------------------------


def width(linear: nn.Module, dim: int) -> int:
    """Outputs (`dim=0`) or inputs (`dim=1`) of a Linear, of GPT-2's transposed Conv1D, or of what replaced one."""
    if isinstance(linear, _ConvNd):
        return getattr(linear, ("out_channels", "in_channels")[dim])
    if "weight_scale" in linear._parameters:  # packed: its shape says nothing
        return getattr(linear, ("out_features", "in_features")[dim])
    name, where = factor(linear, dim)
    weight = linear._parameters.get(name)
    if weight is None:  # parametrized: what it is computed from lies elsewhere
        return getattr(linear, width_attribute(linear, dim))
    return weight.shape[where]


def factor(linear: nn.Module, dim: int) -> tuple[str, int]:
    """The parameter that holds outputs (`dim=0`) or inputs (`dim=1`) of a projection, and in which of its dimensions."""
    if dim == 1 and "weight_in" in linear._parameters:
        return "weight_in", 1
    return "weight", 1 - dim if isinstance(linear, Conv1D) else dim


def dense_weight(linear: nn.Module) -> torch.Tensor:
    """The (out, in) matrix that a projection multiplies by."""
    weight = linear._parameters["weight"]
    assert isinstance(weight, torch.Tensor)
    if "weight_in" in linear._parameters:
        return weight @ linear._parameters["weight_in"]  # type: ignore[operator]
    return weight.T if isinstance(linear, Conv1D) else weight


def width_attribute(linear: nn.Module, dim: int) -> str:
    return (("nf", "nx") if isinstance(linear, Conv1D) else ("out_features", "in_features"))[dim]


# --- gates -------------------------------------------------------------------------------------------------------


class _Gated:
    """A projection whose input columns are multiplied by `hfc_gate` (0 or 1): a mask that training cannot undo.

    The gate multiplies the weight, which is the same function as multiplying the input and, with many tokens, far
    cheaper. What is saved is the gated weight, so a checkpoint holds the masked function for every reader. A module
    becomes gated by its class, in place: names, hooks, parameters and the optimizer's references stay as they are.
    """

    hfc_gate: torch.Tensor
    hfc_active: torch.Tensor | None
    weight: nn.Parameter

    def _gated_weight(self) -> torch.Tensor:
        """The factor that meets the inputs, gated."""
        weight = getattr(self, factor(self, 1)[0])  # type: ignore[arg-type]
        gate = self.hfc_gate.to(weight.dtype)
        return weight * (gate[:, None] if isinstance(self, Conv1D) else gate)

    def _track(self, inputs: torch.Tensor) -> None:
        """Adds up, per input column: how often it was not zero, its mean absolute value, and 1 (training only)."""
        if self.hfc_active is not None and self.training:  # type: ignore[attr-defined]
            flat = inputs.detach().reshape(-1, inputs.shape[-1])
            self.hfc_active[0] += (flat != 0).float().mean(0)
            self.hfc_active[1] += flat.float().abs().mean(0)
            self.hfc_active[2] += 1.0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not keep_vars:
            destination[prefix + factor(self, 1)[0]] = self._gated_weight().detach()  # type: ignore[arg-type]


class GatedLinear(_Gated, nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._track(input)
        return F.linear(input, self._gated_weight(), self.bias)


class GatedConv1D(_Gated, Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._track(x)
        out = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self._gated_weight())
        return out.view(*x.shape[:-1], self.nf)


class LowRankLinear(nn.Linear):
    """`y = U (V x) + b`: `weight` is U (out, rank), `weight_in` is V (rank, in).

    U keeps the name `weight`, whose shape no dense model has (the rank is less than `in`), so plain transformers fails
    on such a checkpoint instead of leaving random weights.
    """

    weight_in: nn.Parameter

    @property
    def rank(self) -> int:
        return self.weight_in.shape[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(input, self.weight_in), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class GatedLowRankLinear(_Gated, LowRankLinear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._track(input)
        return F.linear(F.linear(input, self._gated_weight()), self.weight, self.bias)


GATED: dict[type, type] = {nn.Linear: GatedLinear, Conv1D: GatedConv1D, LowRankLinear: GatedLowRankLinear}
PLAIN = {gated: plain for plain, gated in GATED.items()}


class GatedParameter:
    """A module that reads its units from a bare parameter (experts, three-dimensional), which is multiplied by `hfc_gate`.

    The parameter is read through a property of the same name, so whatever the forward does with it sees it gated.
    """

    hfc_consumer: tuple[str, int]  # the parameter and the dimension along which its units lie

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not keep_vars:
            destination[prefix + self.hfc_consumer[0]] = _gated_parameter(self, *self.hfc_consumer).detach()


def _gated_parameter(module: Any, name: str, dim: int) -> torch.Tensor:
    weight = module._parameters[name]
    shape = [-1 if d == dim else 1 for d in range(weight.ndim)]
    return weight * module._buffers["hfc_gate"].to(weight.dtype).view(shape)


@functools.cache
def _gated_class(kind: type, name: str, dim: int) -> type:
    members = {
        name: property(lambda self: _gated_parameter(self, name, dim)),
        "hfc_consumer": (name, dim),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": _reduce_gated,
    }
    return type(kind.__name__, (GatedParameter, kind), members)


def _reduce_gated(self: Any, protocol: int) -> Any:
    """Copied and pickled by the class below, which importers know."""
    return _rebuild_gated, (type(self).__mro__[2], *self.hfc_consumer, self.__dict__)


def _rebuild_gated(kind: type, name: str, dim: int, state: dict[str, Any]) -> Any:
    module = object.__new__(_gated_class(kind, name, dim))
    module.__dict__.update(state)
    return module


class GatedInput:
    """A convolution, or a Linear of a class that is not torch's, whose input channels are multiplied by `hfc_gate` (0 or 1).

    The gate multiplies the input, so that it does not matter what the class makes of its weight; what is saved is the
    weight with zeros. What the inputs are is not tracked.
    """

    hfc_gate: torch.Tensor

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ones = (1,) * len(getattr(self, "kernel_size", ()))
        return super().forward(input * self.hfc_gate.to(input.dtype).view(-1, *ones), *args, **kwargs)  # type: ignore[misc]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if keep_vars:
            return
        name = prefix + ("weight_depth" if "weight_depth" in self._parameters else "weight")  # type: ignore[attr-defined]
        weight, gate = destination[name], self.hfc_gate.to(destination[name].dtype)
        if name.endswith("weight_depth"):  # several kernels an input
            gate = gate.repeat_interleave(weight.shape[0] // len(gate)).view(-1, 1)
        elif isinstance(self, _ConvTransposeNd):
            gate = gate.view(-1, 1)
        elif not isinstance(self, _ConvNd):
            gate = gate.view(*(1,) * (weight.ndim - 1), -1)
        else:
            gate = gate.view(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, 0)
        destination[name] = (weight * gate.view(*gate.shape, *(1,) * (weight.ndim - gate.ndim))).detach()


@functools.cache
def _gated_by_input(kind: type) -> type:
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": _reduce_by_input}
    return type(kind.__name__, (GatedInput, kind), members)


def _reduce_by_input(self: Any, protocol: int) -> Any:
    return _rebuild_by_input, (type(self).__mro__[2], self.__dict__)


def _rebuild_by_input(kind: type, state: dict[str, Any]) -> Any:
    module = object.__new__(_gated_by_input(kind))
    module.__dict__.update(state)
    return module


def can_gate(module: nn.Module) -> bool:
    """Whether `gate_` can give a module a gate over its inputs (or it has one)."""
    return isinstance(module, _ConvNd | nn.Linear) or type(module) in GATED or is_gated(module)


def gate_(
    linear: nn.Module, track: bool = False, consumer: tuple[str, int] | None = None, by_input: bool = False
) -> torch.Tensor:
    """Give a projection a gate of ones over its inputs (or return the one it has), to be changed in place.

    `consumer`: of a module that is no projection, the parameter that reads the units and the dimension along which they lie.
    `by_input`: the gate multiplies what comes in, whatever the class: no second weight is made.
    """
    if consumer is not None and not is_gated(linear):
        name, dim = consumer
        weight = linear._parameters[name]
        assert weight is not None
        linear.__class__ = _gated_class(type(linear), name, dim)
        linear.register_buffer("hfc_gate", torch.ones(weight.shape[dim], device=weight.device), persistent=False)
        linear.register_buffer("hfc_active", None, persistent=False)
    if can_gate(linear) and not is_gated(linear):
        linear.__class__ = (None if by_input else GATED.get(type(linear))) or _gated_by_input(type(linear))
        assert isinstance(linear.weight, torch.Tensor)
        ones = torch.ones(width(linear, 1), dtype=torch.float32, device=linear.weight.device)
        linear.register_buffer("hfc_gate", ones, persistent=False)
        linear.register_buffer("hfc_active", None, persistent=False)
    if track and consumer is None and linear.hfc_active is None:
        assert isinstance(linear.weight, torch.Tensor)
        linear.hfc_active = torch.zeros(3, width(linear, 1), device=linear.weight.device)
    gate = linear.hfc_gate
    assert isinstance(gate, torch.Tensor)
    return gate


def ungate_(linear: nn.Module) -> None:
    if is_gated(linear):
        linear.__class__ = plain_kind(linear)
        del linear._buffers["hfc_gate"], linear._buffers["hfc_active"]
        linear._non_persistent_buffers_set -= {"hfc_gate", "hfc_active"}


def is_own_linear(module: nn.Module) -> bool:
    """Whether a module is a model's own kind of Linear (Falcon's, say), with an ordinary weight."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)  # I-BERT's is no nn.Linear
    own = plain_kind(module).__module__.startswith("transformers.models.")
    return own and (isinstance(module, nn.Linear) or sizes == tuple(weight.shape))


def is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies vectors by its weight: a Linear, a Conv1D, or a model's own kind of one."""
    return isinstance(module, nn.Linear | Conv1D) or is_own_linear(module)


def is_gated(module: nn.Module) -> bool:
    return type(module) in PLAIN or isinstance(module, GatedParameter | GatedInput)


def plain_kind(module: nn.Module) -> type:
    """The class of a module without its gate."""
    if isinstance(module, GatedParameter | GatedInput):
        return type(module).__mro__[2]
    return PLAIN.get(type(module), getattr(type(module), "hfc_plain", type(module)))


# --- locks -------------------------------------------------------------------------------------------------------


class LockedLinear(nn.Linear):
    """A Linear that saves its weight with a leading axis, so that plain transformers cannot load it.

    For checkpoints whose difference from the stock model is not in any shape: which layers stayed, say. Loading one
    without this package must fail, not give a model that looks right.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"][None]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.ndim == 3:
            state_dict = {**state_dict, prefix + "weight": weight[0]}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def lock_(linear: nn.Linear) -> None:
    linear.__class__ = LockedLinear
