"""What each edit makes of a module: in place, filled with the best values there are, or with those that a plan brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from . import compensation
from .edits import CompressionError, DepthwiseSeparable, KeepHeads, KeepNeurons, LowRank, Quantize, Sparsify
from .fits import best_kernels, best_rank
from .kinds import low_rank_, separable_
from .modules import dense_weight
from .quantization import quantize_, quantized_
from .sparse import MASK, follows, options_of_sparse, sparsify_
from .sparsity import choose_masks, from_matrix, matrix_of, read_pattern, unpack_bits

Substitution = LowRank | DepthwiseSeparable | Quantize | Sparsify
Tensors = Mapping[str, torch.Tensor]


def _become_low_rank(module: Any, edit: LowRank, given: dict[str, torch.Tensor] | None) -> list[Any]:
    dense = dense_weight(module)
    if given is None:
        out, inner = best_rank(dense, edit.rank)
    else:
        out, inner = given["weight"], given["weight_in"]
        shapes = (dense.shape[0], edit.rank), (edit.rank, dense.shape[1])
        if (tuple(out.shape), tuple(inner.shape)) != shapes:
            raise CompressionError(
                f"The plan's factors of {edit.module!r} are {tuple(out.shape)} and {tuple(inner.shape)}; here they must be "
                f"{shapes[0]} and {shapes[1]}. Make the plan on the model as the edits before it leave it: apply those first."
            )
    try:
        low_rank_(module, edit.rank)
    except CompressionError as error:  # which does not know the name
        raise CompressionError(f"{edit.module!r}: {error} Lower the rank, or leave it out of the plan.") from None
    module.weight.copy_(out)
    module.weight_in.copy_(inner)
    if not bool(module.weight.isfinite().all() and module.weight_in.isfinite().all()):
        raise CompressionError(f"The factors of {edit.module!r} do not fit into {module.weight.dtype}; make the plan again.")
    return ["low_rank", {"rank": edit.rank}]


def _become_separable(module: Any, edit: DepthwiseSeparable, given: None) -> list[Any]:
    depth, point = best_kernels(module.weight, module.groups, edit.multiplier)
    separable_(module, edit.multiplier)
    module.weight.copy_(point)
    module.weight_depth.copy_(depth)
    return ["separable", {"multiplier": edit.multiplier}]


def _options(module: nn.Module, edit: Quantize) -> dict[str, Any]:
    floats = edit.activations == "none" or isinstance(module, nn.Embedding)
    activations = None if floats else edit.activations
    return {"bits": edit.bits, "group_size": edit.group_size, "activations": activations, "decode": edit.decode}


def _become_quantized(module: Any, edit: Quantize, given: dict[str, torch.Tensor] | None) -> list[Any]:
    options = _options(module, edit)
    quantize_(module, **options, given=given)
    return ["quantized", options]


def share_quantized(module: Any, sharer: Any, edit: Quantize) -> list[Any]:
    """A head that is tied to an embedding stays tied: both hold the same integers, and only its weights are rounded."""
    options = {**_options(sharer, edit), "activations": None}
    quantized_(sharer, **options)
    sharer.settle_()
    for name, parameter in module._parameters.items():
        if name != "bias":
            sharer._parameters[name] = parameter
    return ["quantized", options]


def _become_sparse(module: Any, edit: Sparsify, given: dict[str, torch.Tensor] | None) -> list[Any]:
    weight, group = module.weight, read_pattern(edit.pattern)
    rows = matrix_of(module, weight.detach())
    if given is None:
        assert edit.sparsity is not None
        chosen = choose_masks({edit.module: rows.abs()}, edit.sparsity, "row", edit.pattern)[edit.module]
        mask = from_matrix(module, chosen, weight.shape)
    else:
        bits = given[MASK]
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-weight.numel() // 8),):
            raise CompressionError(
                f"The plan's mask of {edit.module!r} is {bits.dtype} {tuple(bits.shape)}, and its {weight.numel():,} weights "
                f"take uint8 ({-(-weight.numel() // 8)},). Make the plan on the model as the edits before it leave it: apply "
                "those first."
            )
        mask = unpack_bits(bits, weight.shape)
    found = 1 - int(mask.sum()) / mask.numel()
    if group is not None and not follows(module, mask, *group):
        raise CompressionError(f"The plan's mask of {edit.module!r} is not {edit.pattern}; make the plan again.")
    if group is None and abs(found - edit.sparsity) > max(1e-3, 1 / rows.shape[1]):  # type: ignore[operator]
        raise CompressionError(
            f"The plan's mask of {edit.module!r} removes {found:.4g} of its weights, and the plan says {edit.sparsity:.4g}."
        )
    sparsify_(module, mask.contiguous(), None if given is None else given.get("weight"), edit.pattern)
    return ["sparse", options_of_sparse(module)]


BECOME: dict[type, Callable[..., list[Any]]] = {
    LowRank: _become_low_rank,
    DepthwiseSeparable: _become_separable,
    Quantize: _become_quantized,
    Sparsify: _become_sparse,
}


def given_for(edit: Substitution, name: str, module: nn.Module, tensors: Tensors | None) -> dict[str, torch.Tensor] | None:
    if not getattr(edit, "given", False):
        return None
    wanted = names_given(edit)
    found = {key.rpartition(".")[2]: value for key, value in (tensors or {}).items() if key in wanted}
    if not found or (isinstance(edit, LowRank) and len(found) < 2) or (isinstance(edit, Sparsify) and MASK not in found):
        raise CompressionError(
            f"{type(edit).__name__}({edit.module!r}) was planned with tensors ({', '.join(sorted(wanted))}), which this plan "
            "does not carry. Use the plan that its planner returned, or Plan.load(folder)."
        )
    broken = [key for key, value in found.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise CompressionError(
            f"The plan's tensor {edit.module}.{broken[0]} holds NaN or infinite values; make the plan again."
        )
    device = next(module.parameters()).device
    return {key: value.to(device) for key, value in found.items()}


def names_given(edit: Any) -> set[str]:
    """The tensors of a plan that an edit uses."""
    if not getattr(edit, "given", False):
        return set()
    if isinstance(edit, KeepHeads | KeepNeurons):
        return set(compensation.names_given(edit))
    keys = KEYS_GIVEN[type(edit)]
    return {f"{edit.module}.{key}" for key in keys}


KEYS_GIVEN: dict[type, tuple[str, ...]] = {
    LowRank: ("weight", "weight_in"),
    Quantize: ("weight_scale", "weight_zero", "weight_in_scale", "weight_in_zero"),
    Sparsify: (MASK, "weight"),
}


def entry_of(module: Any, kinds: list[Any]) -> dict[str, Any]:
    shapes = {key: list(p.shape) for key, p in module.state_dict().items()}  # as on disk: quantized weights have one axis more
    entry: dict[str, Any] = {"kinds": kinds, "shapes": shapes}
    if isinstance(module, nn.Linear):
        entry["attributes"] = {"out_features": module.out_features, "in_features": module.in_features}
    return entry
