"""The proof of removed layers: they are taken out, the model runs, and gives what it gives when they are skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .cutting import Undo
from .edits import CompressionError
from .masking import Mask, why_not_skipped
from .probe import difference, tensors_in, tolerance
from .resolve import Resolved
from .stacks import config_parts, remove_layers_


def try_layers(model: nn.Module, resolved: Resolved, run: Callable[..., list[Any]]) -> None:
    """Remove the layers, run, put them back: it must be the function in which they are skipped, with a cache and without.

    What the module around each stack gives is compared as well as the model's outputs: a choice of the largest in between
    (CLVP reads tokens) would hide a difference.
    """
    skipped = Resolved(resolved.structure, layers=resolved.layers)
    reason, advice, cache = "", OTHERS_DEPEND, False
    undo: Undo = []
    seen: list[tuple[str, torch.Tensor]] = []

    def everything(cache: bool = False) -> list[tuple[str, torch.Tensor]]:
        seen.clear()
        return tensors_in(run(cache)) + seen

    around = [model.get_submodule(path.rpartition(".")[0]) for path in resolved.removed]
    hooks = [m.register_forward_hook(lambda _m, _a, out: seen.extend(tensors_in(out)[:1])) for m in around if m is not model]
    try:
        with Mask(model, skipped):
            expected = everything()
        remove_layers_(model, resolved.removed, undo)
        for cache in (False, True):
            got = everything(cache)
            if len(got) != len(expected) or any(
                difference(a, b) > tolerance(a.dtype) for (_, a), (_, b) in zip(expected, got, strict=True)
            ):
                reason = "removing them gives another function than skipping them"
    except Exception as error:  # layers that others depend on break a forward in any way
        reason, advice = why_layers_stay(model, resolved, error, cache)
    finally:
        for hook in hooks:
            hook.remove()
        while undo:
            undo.pop()()
    if reason:
        what = f"Cannot remove these layers of {', '.join(resolved.removed)} exactly, so nothing was changed"
        raise CompressionError(f"{what}: {reason}. {advice}".rstrip())


OTHERS_DEPEND = "Keep the layers that others depend on (usually the first)."


def why_layers_stay(model: nn.Module, resolved: Resolved, error: Exception, cache: bool) -> tuple[str, str]:
    """Why a model does not run without some of its layers, and what to do; `cache`: it ran as long as it had no cache."""
    if isinstance(error, CompressionError):
        return str(error).rstrip("."), ""
    reason = f"without them it fails with {type(error).__name__}: {str(error).rstrip('.')}"
    if "can only be called on Attention layers" in str(error):  # the length of a text is counted by an attention's cache
        gone = [
            a.name
            for a in resolved.structure.attentions
            if resolved.is_gone(a.name) and a.name.startswith(tuple(resolved.removed))
        ]
        return (
            "its cache counts tokens in a layer with attention, and none would be left",
            f"Keep at least one of the layers that hold {', '.join(gone[:8])}{', ...' * (len(gone) > 8)}.",
        )
    if cache and isinstance(error, IndexError) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return (
            f"the forward makes its cache as deep as the config says of the encoder, and the decoder is deeper ({reason})",
            "Keep at least as many layers in the encoder as in the decoder (remove some of both in one plan), or set "
            "model.config.use_cache=False first, where nothing is generated.",
        )
    if any(getattr(getattr(m, "config", None), "hidden_size_per_layer_input", 0) for m in model.modules()):
        return (
            f"every layer has an input of its own (config.hidden_size_per_layer_input), made for all layers at once ({reason})",
            "Leave KeepLayers out for this model; KeepHeads and KeepNeurons make its layers smaller.",
        )
    periods = [
        f"{key}={value}" for part in {id(c): c for _, c in config_parts(model)}.values()
        for key, value in vars(part).items() if "layer" in key and key.endswith(("_period", "_offset", "_interval", "_pattern"))
        and type(value) is int
    ]  # fmt: skip
    if periods:
        return (
            f"what a layer is follows from its number in the config ({', '.join(periods)}), and the numbers change ({reason})",
            "Keep layers that are of the kind that this rule gives their new numbers (whole periods, say).",
        )
    return reason, OTHERS_DEPEND


def uneven_layers(model: nn.Module, resolved: Resolved) -> list[str]:
    """The layers to be removed from stacks whose layers have weights of different shapes."""
    return [
        layer.name
        for path, kept in resolved.removed.items()
        if len({tuple(tuple(p.shape) for p in child.parameters()) for child in model.get_submodule(path).children()}) > 1
        for layer in resolved.structure.layers
        if layer.path == path and layer.index not in kept
    ]


def check_skipped(model: nn.Module, gone: Sequence[str], run: Callable[[], Any]) -> None:
    """Refuse to remove layers that change the shape of what they pass on: seen in one run of the model as it is."""
    found: dict[str, str] = {}

    def look(name: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        changed = why_not_skipped(args[0] if args else kwargs.get("hidden_states"), output)
        found.update({name: changed} if changed else {})

    hooks = [model.get_submodule(name).register_forward_hook(partial(look, name), with_kwargs=True) for name in gone]
    try:
        if gone:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, changed in found.items():
        raise CompressionError(f"The layer {name!r} cannot be removed, so nothing was changed: {changed}. Keep it.")
