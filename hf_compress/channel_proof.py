"""`KeepChannels` on a model: proved on a copy with weights drawn anew, made, and proved on the model itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .channels import Removal
from .cutting import Undo
from .edits import CompressionError, KeepChannels
from .masking import Mask
from .modules import is_gated
from .probe import difference, map_tensors, probing, tensors_in, tolerance
from .resolve import Resolved
from .structural import randomize

DRAWS = 3  # few weights drawn anew may leave all that goes dead (behind a ReLU, say)


def channels_(
    model: nn.Module, edits: Sequence[KeepChannels], inputs: Mapping[str, Any] | None, undo: Undo
) -> dict[str, dict[str, Any]]:
    """Cut channels, in place, and show that it is exact.

    1. `channels.Removal` follows the channels through one forward pass, and finds what goes with them or why they cannot go.
    2. *Structure.* On a copy in float32 with all weights drawn anew (norms and their statistics too), the cut equals the mask,
       and the mask changes something.
    3. *This model.* It is cut, and its outputs are those of the mask. If they are not, the caller takes back what is in `undo`.

    Memory: the model and one copy in float32.

    Returns:
        what was changed, as `cutting.cut_` records it.

    Raises:
        CompressionError: the plan does not fit, a channel cannot go, or cut and mask differ.
    """
    what = f"the cut of channels ({edits[0].conv!r}" + (f" and {len(edits) - 1} more)" if len(edits) > 1 else ")")
    with torch.inference_mode(False), torch.no_grad(), probing(model, inputs) as run:
        removal = Removal(model, edits, run)
        if not removal.slices:
            return {}
        masked = [name for name in removal.slices if is_gated(model.get_submodule(name))]
        if masked:
            raise CompressionError(f"{masked[0]!r} is masked; remove that mask first (Mask.remove()), then cut channels.")
        gates = removal.gates
        try:
            _prove_structure(model, removal, gates, inputs, what, randomize, 10 * tolerance(torch.float32))
        except CompressionError:  # under which nothing may show: drawn at full size, at which VITS would speak for hours
            _prove_structure(model, removal, gates, inputs, what, _draw_anew, 0.0)
        with _masked(model, gates):
            expected = tensors_in(run())
        record = removal.cut_(model, undo)
        _compare(expected, _run(run, model, what), what)
    return record


def channel_gates(
    model: nn.Module, edits: Sequence[KeepChannels], inputs: Mapping[str, Any] | None, resolved: Resolved
) -> dict[str, torch.Tensor]:
    """What a mask multiplies by, for edits that stand in one plan with cuts of layers (names are as those leave them)."""
    if not edits:
        return {}
    with probing(model, inputs) as run:
        return Removal(model, edits, run, resolved.original).gates


def _masked(model: nn.Module, gates: Mapping[str, torch.Tensor]) -> Mask:
    return Mask(model, Resolved(None, gates=dict(gates)))  # type: ignore[arg-type]


def _prove_structure(
    model: nn.Module,
    removal: Removal,
    gates: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any] | None,
    what: str,
    draw: Callable[[nn.Module, int], None],
    least: float,
) -> None:
    """`least`: how much of an output the mask must change, so that a wrong cut would show."""
    if inputs is not None:
        inputs = map_tensors(dict(inputs), lambda t: t.float() if t.is_floating_point() else t)
    double = copy.deepcopy(model).float().requires_grad_(False)
    with probing(double, inputs) as run:
        for seed in range(DRAWS):
            draw(double, seed)
            plain = tensors_in(run())
            with _masked(double, gates):
                expected = tensors_in(run())
            if any(difference(a, b) > least for (_, a), (_, b) in zip(plain, expected, strict=True)):
                break
        else:
            raise CompressionError(
                f"Nothing was changed: the mask of {what} changes no output, so it cannot be proved. Pass inputs=... with a "
                "batch that they matter for, or leave them out of the plan."
            )
        removal.cut_(double, [])
        _compare(expected, _run(run, double, what), what)


def _run(run: Callable[[], Any], model: nn.Module, what: str) -> list[tuple[str, torch.Tensor]]:
    try:
        return tensors_in(run())
    except Exception as error:  # a model whose code keeps the old width may fail in any way
        raise CompressionError(
            f"Nothing was changed: after {what}, {type(model).__name__} fails with {type(error).__name__}: {error}. Something "
            "in it keeps the old width (heads that are views of these channels, say); leave them out of the plan."
        ) from error


def _draw_anew(model: nn.Module, seed: int) -> None:
    """Every weight from a normal distribution, scaled so that signals neither vanish nor explode (He et al. 2015)."""
    draw = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=draw).to(like.device, like.dtype)

    for module in model.modules():
        tensors = [(key, p) for key, p in module._parameters.items() if p is not None]
        if "running_var" in module._buffers:  # frozen batch norms have their weights as buffers
            tensors += [(key, b) for key, b in module._buffers.items() if b is not None]
        for key, tensor in tensors:
            if not tensor.is_floating_point():
                continue
            if key == "running_var":
                tensor.copy_(1 + 0.2 * noise(tensor).tanh())
            elif tensor.ndim >= 2:
                tensor.copy_(noise(tensor) * max(0.02, math.sqrt(2 * tensor.shape[0] / tensor.numel())))
            else:
                tensor.copy_(0.2 * noise(tensor) + (1.0 if key == "weight" else 0.0))


def _compare(expected: list[tuple[str, torch.Tensor]], got: list[tuple[str, torch.Tensor]], what: str) -> None:
    for (name, a), (_, b) in zip(expected, got, strict=True):
        worst = difference(a, b)
        if worst > tolerance(a.dtype):
            raise CompressionError(
                f"Nothing was changed: {what} differs from its mask by {worst:.1e} of the largest value"
                f"{f' in {name!r}' if name else ''}, more than {tolerance(a.dtype):.0e}. They are tied to something that is "
                "not known here; leave them out of the plan."
            )
