"""Weights of a checkpoint, put back exactly: what stock `Trainer` 5.23 gets wrong for renamed and for resized weights."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .edits import CompressionError
from .layout import replay_
from .loader import compression_of
from .modules import LockedLinear, lock_
from .quantization import is_quantized
from .sparse import MASK, is_sparse


def restore_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Load a checkpoint's weights into a model, through `from_pretrained`, so that no key is left behind in silence.

    `Trainer` loads with `load_state_dict(..., strict=False)`, which skips every weight that is saved under another name
    than it has in memory (ViT, DINOv2, Swin, GPT-NeoX: transformers issue 43701). A model that is still dense takes the
    shapes of the checkpoint first.

    Raises:
        CompressionError: the checkpoint's weights do not fit this model.
    """
    loaded: Any = type(model).from_pretrained(checkpoint, dtype=model.dtype, output_loading_info=True)
    fresh, info = loaded
    if info["missing_keys"]:
        raise CompressionError(
            f"The checkpoint at {checkpoint} has no {min(info['missing_keys'])!r} (of {len(info['missing_keys'])} missing "
            f"weights); it does not belong to this {type(model).__name__}, or is not whole."
        )
    if _shapes(model) != _shapes(fresh):
        _take_shapes(model, fresh)
    mine, theirs = _shapes(model), _shapes(fresh)
    if mine != theirs:
        name = next(iter(sorted(set(mine.items()) ^ set(theirs.items()))))[0]
        raise CompressionError(
            f"The checkpoint at {checkpoint} does not fit this {type(model).__name__}: {name} is {theirs.get(name, 'absent')} "
            f"there and {mine.get(name, 'absent')} here. Build the model with from_pretrained({str(checkpoint)!r})."
        )
    with torch.no_grad():
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, tensor in fresh.named_parameters(remove_duplicate=False):
            target = own[name]
            target.copy_(tensor.to(target.device))
        ours = dict(model.named_buffers())
        for name, tensor in fresh.named_buffers():
            if name in ours and not name.rpartition(".")[2].startswith("hfc_"):
                ours[name].copy_(tensor.to(ours[name].device))


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    masks = {f"{name}.{MASK}": (module.hfc_kept,) for name, module in model.named_modules() if is_sparse(module)}
    return {**{name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}, **masks}  # type: ignore[dict-item]


def _take_shapes(model: PreTrainedModel, small: PreTrainedModel) -> None:
    """Give a model the narrower shapes, the sizes and the config of one with the same modules; no weights yet."""
    modules = dict(small.named_modules())
    before = compression_of(small.config)
    recorded = before.layout["modules"] if before else {}
    exits = (before.layout if before else {}).get("exits")
    theirs = {name for name in modules if not name.startswith("exit_heads")} if exits else modules.keys()
    if theirs != {name for name in dict(model.named_modules()) if not exits or not name.startswith("exit_heads")}:
        return  # other layers: the caller says so
    kinds = {name: entry["kinds"] for name, entry in recorded.items() if "kinds" in entry}
    if any(model.get_submodule(n).__dict__.get("hfc_kinds", k) != k for n, k in kinds.items()):
        return
    layout: dict = {"modules": {name: dict(entry) for name, entry in recorded.items()}}
    for name, module in model.named_modules():
        if name in kinds or name not in modules:
            if "hfc_kinds" in module.__dict__:  # what it became it is already
                layout["modules"].pop(name, None)
            continue
        other = modules[name]
        shapes = {
            key: list(p.shape)
            for key, p in other._parameters.items()
            if p is not None and (mine := module._parameters.get(key)) is not None and p.shape != mine.shape
        }
        sizes = {k: v for k, v in vars(other).items() if type(v) is int and k[0] != "_" and vars(module).get(k) != v}
        entry = layout["modules"].get(name, {})
        layout["modules"][name] = {
            **{k: v for k, v in entry.items() if k not in ("shapes", "attributes", "lock")},
            **({"shapes": shapes} if shapes else {}),
            **({"attributes": sizes} if sizes else {}),
        }
    if exits and "exit_heads" not in model._modules:
        layout["exits"] = exits
    replay_(model, layout)
    for name, module in model.named_modules():  # locks as the record has them
        locked = recorded.get(name, {}).get("lock", False)
        if type(module) is LockedLinear and not locked:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif type(module) is nn.Linear and locked:
            lock_(module)
    for module in model.modules():
        if is_quantized(module):
            module.settle_()  # type: ignore[operator]
        elif is_sparse(module):
            module.blank_()  # type: ignore[operator]
    for name in kinds:
        model.get_submodule(name).__dict__["hfc_kinds"] = kinds[name]
    model.config.__dict__.update({k: v for k, v in small.config.__dict__.items() if not k.startswith("_")})


def keys_differ(model: torch.nn.Module, checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint names its weights otherwise than the model does in memory, from the file headers alone."""
    names: set[str] = set()
    for path in Path(checkpoint).glob("*.safetensors"):
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            names |= json.loads(file.read(size)).keys() - {"__metadata__"}
    return bool(names) and not names <= model.state_dict().keys()
