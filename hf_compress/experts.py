"""Whole experts, removed with their rows of the router, and the record of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .cutting import Undo
from .edits import CompressionError
from .expert_cuts import cut_mixture_
from .expert_proof import proved, said
from .layout import joined
from .loader import HfCompressConfig, compression_of
from .masking import Mask
from .mixtures import Mixture, is_closed, settle_counts_
from .plan import Plan
from .probe import difference, owners_in, probing, tensors_in, tolerance
from .refusals import check_dense, check_weights
from .resolve import resolve


def experts_(
    model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None, undo: Undo
) -> tuple[dict[str, dict[str, Any]], dict[str, str | None]]:
    """Keep the experts that a plan keeps, in place, and show that this is the model whose router never picks the others.

    For each mixture, on a copy in float32 with all weights drawn anew and `TOKENS_PER_EXPERT` random tokens or more for
    an expert, on average:

    1. *What follows the experts* is computed: with the router's scores of the experts that go at minus infinity, a row of
       a parameter that belongs to one of them has no gradient, and without that it has one. Rows that stay must keep theirs.
       What has no gradient at all and one value per expert is added to the scores (DeepSeek-V3's bias): it follows too.
    2. *Structure*: the copy, cut so, must give what the masked copy gives, with every implementation of experts that
       transformers has for it (`batched_mm` only where experts are small); and the mask must matter.

    Then the real weights are cut, and the whole model must give what it gave under its mask. In half precision tokens whose
    scores are equal after rounding may fall to another expert when a matrix has fewer rows; there most tokens must agree.

    It cannot see what a router does only in training (noise, dropped tokens): that is not part of the proof.

    Returns:
        what was changed, as `cutting.cut_` records it, and the paths that changed or went (None) with a list of experts.

    Raises:
        CompressionError: the plan does not fit, a mixture does not run on the proof's inputs, or a cut cannot be proved. `undo`
            then holds what to take back.
    """
    resolved = resolve(model, plan)
    cuts = resolved.mixtures
    record: dict[str, dict[str, Any]] = {}
    moved: dict[str, str | None] = {}
    if not cuts:
        return record, moved
    for mixture, _ in cuts:
        _check(model, mixture)
    with probing(model, inputs) as run:
        given = _calls(model, [mixture for mixture, _ in cuts], run)
        with Mask(model, resolved):
            expected = tensors_in(run())
        for mixture, kept in tqdm(cuts, desc="prove", unit="mixture", leave=False, disable=None, delay=3):
            with torch.inference_mode(False):
                coupling = proved(model, mixture, kept, *given[mixture.name])
                with torch.no_grad():
                    entries, names = cut_mixture_(model.get_submodule, mixture, kept, coupling, undo)
            for name, entry in entries.items():
                record[name] = joined(record.get(name), entry)
            moved.update(names)
        for _, owner in owners_in(model):
            settle_counts_(owner, undo)
        try:
            got = tensors_in(run())
        except CompressionError:
            raise
        except Exception as error:  # whatever in the model still counts on the experts that went
            raise CompressionError(
                f"Nothing was changed: without these experts {type(model).__name__} fails with {said(error)}"
            ) from error
    for (name, a), (_, b) in zip(expected, got, strict=True):
        if not _agree(a, b):
            raise CompressionError(
                f"Nothing was changed: the model without these experts differs from the one that never picks them by "
                f"{difference(a, b):.1e} of the largest value{f' in {name!r}' if name else ''}, more than "
                f"{tolerance(a.dtype):.0e}."
            )
    return record, moved


def move_entries_(owner: nn.Module, moved: Mapping[str, str | None], undo: Undo) -> None:
    """Let the record of earlier edits follow experts that are modules and have other places in their list now."""
    found = compression_of(owner.config)
    if found is None or not moved:
        return
    modules: dict[str, Any] = {}
    for name, entry in found.layout["modules"].items():
        place = next((old for old in moved if name == old or name.startswith(f"{old}.")), None)
        if place is None:
            modules[name] = entry
        elif moved[place] is not None:
            modules[f"{moved[place]}{name[len(place) :]}"] = entry
    undo.append(partial(setattr, owner.config, "quantization_config", found))
    layout = {**found.layout, "modules": modules}
    owner.config.quantization_config = HfCompressConfig(found.plan_dict, layout, found.masks_dict)  # type: ignore[union-attr]


def _check(model: nn.Module, mixture: Mixture) -> None:
    """Refuse a mixture whose weights are not simply its own, or whose experts are masked."""
    top = model.get_submodule(mixture.name)
    if is_closed(top):
        raise CompressionError(f"{mixture.name!r} is masked; remove that mask first (Mask.remove()), then cut.")
    inside = {name: module for name, module in top.named_modules()}
    for name, module in inside.items():
        check_weights(f"{mixture.name}.{name}".strip("."), module)
        check_dense(f"{mixture.name}.{name}".strip("."), module)
        packed = [key for key, p in module._parameters.items() if p is not None and not p.is_floating_point()]
        if packed:
            raise CompressionError(
                f"{f'{mixture.name}.{name}'.strip('.')!r} holds its {packed[0]} in {module._parameters[packed[0]].dtype}; "  # type: ignore[union-attr]
                "quantized experts cannot be removed. Remove them first, then quantize."
            )
        for key, buffer in module._buffers.items():
            if buffer is not None and key in module._non_persistent_buffers_set and mixture.num_experts in buffer.shape:
                raise CompressionError(
                    f"{name}.{key} of {mixture.name!r} may follow its experts and is not saved; nothing was changed."
                )
    mine = {id(module) for module in inside.values()}
    own = {id(p) for p in top.parameters()}
    for name, module in model.named_modules():
        shared = [key for key, p in module._parameters.items() if id(p) in own] if id(module) not in mine else []
        if shared:
            raise CompressionError(
                f"{name}.{shared[0]} is a weight of {mixture.name!r} as well; untie them, or leave the mixture out of the plan."
            )


def _calls(model: nn.Module, mixtures: list[Mixture], run: Callable[[], Any]) -> dict[str, tuple[str, Any, Any]]:
    """The deepest module around each mixture that the model calls, by path, and what it is called with."""
    calls: dict[str, tuple[Any, Any]] = {}

    def remember(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(name, (args, kwargs))

    places = {".".join(words[:i]) for m in mixtures for words in [m.name.split(".")] for i in range(len(words) + 1)}
    handles = [
        model.get_submodule(place).register_forward_pre_hook(partial(remember, place), prepend=True, with_kwargs=True)
        for place in places
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[str, Any, Any]] = {}
    for mixture in mixtures:
        scope = mixture.name
        while scope not in calls and scope:
            scope = scope.rpartition(".")[0]
        if scope not in calls or scope == "" != mixture.name:
            raise CompressionError(
                f"Cannot prove a cut of {mixture.name!r}: it did not run on the proof's inputs. Pass inputs=... with a batch "
                "that uses it, or leave it out of the plan."
            )
        found[mixture.name] = (scope, *calls[scope])
    return found


def _agree(expected: torch.Tensor, got: torch.Tensor) -> bool:
    if difference(expected, got) <= tolerance(expected.dtype):
        return True
    if expected.dtype not in (torch.float16, torch.bfloat16) or expected.shape != got.shape:
        return False
    size = expected.float().abs().max().clamp_min(1e-6)
    rows = ((expected.float() - got.float()).abs() / size).reshape(-1, expected.shape[-1]).amax(-1)
    return bool((rows <= tolerance(expected.dtype)).float().mean() > 0.5)
