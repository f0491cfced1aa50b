"""The way back: quantized modules become float ones again, holding the weights that their integers stand for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..cutting import Undo
from ..edits import CompressionError, Quantize
from ..exits.runtime import exit_options
from ..layout import finder, replay_, skeleton, unrecorded
from ..loader import compression_of, host_quantized_
from ..modules import LowRankLinear
from ..plan import Plan
from ..probe import owners_in
from ..record import write_record
from ..substitute import _State
from .modules import QuantizedEmbedding, QuantizedLowRank, is_quantized

OWN = ("bits", "group_size", "activations", "decode", "float_dtype", "_derived", "rank")  # what quantizing put on a module
WAS: dict[type, type] = {QuantizedEmbedding: nn.Embedding, QuantizedLowRank: LowRankLinear}


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized module of a model back into a float one, in place: `w = scale * (q - zero)` per group.

    The rounding of the weights stays in them; what is gained is a model that any code can read, train, resize, cut and
    quantize again. Below 8 bits it computes what the quantized one did; with 8, activations are no longer rounded. Other
    edits (cuts, low rank, exits) stay, in the model and in its record; where none is left, what `save_pretrained` writes is
    a stock checkpoint. `model.dequantize()`, as transformers has it, is the same.

    Args:
        model (`nn.Module`): a transformers model, or a module around one, changed in place. All of its weights get gradients
            again; an optimizer that was made before does not know them.
        dtype (`torch.dtype`, *optional*): a floating-point dtype for the whole model. By default each weight gets the one it
            had when it was quantized (or that the model was cast to since), and nothing else changes.

    Returns:
        the same model.

    Raises:
        CompressionError: nothing is quantized (or not by hf_compress), a dtype that is not floating-point, a model on the meta
            device. Nothing has changed then.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import apply_, plan_quantization
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... )).eval()
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> before = apply_(model, plan_quantization(model, bits=4))(ids).last_hidden_state
    >>> torch.equal(model.dequantize()(ids).last_hidden_state, before), model.pooler.dense
    (True, Linear(in_features=32, out_features=32, bias=True))

    ```
    """
    outer, model = model, getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise CompressionError(f"Expected a model, got {type(model).__name__}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CompressionError(f"dtype must be a floating-point torch.dtype, got {dtype!r}.")
    owners = owners_in(model)
    for _, owner in owners:
        compression_of(owner.config)
    modules = [module for module in model.modules() if is_quantized(module)]
    if not modules:
        raise CompressionError(f"No module of this {type(model).__name__} is quantized, so there is nothing to dequantize.")
    if any(p.is_meta for p in model.parameters()):
        raise CompressionError("The model is on the meta device and has no weights to decode; load it first.")
    undo: Undo = []
    try:
        shared: dict[int, nn.Parameter] = {}  # float weights by the integers that tied modules share
        for module in sorted(modules, key=lambda m: not isinstance(m, QuantizedEmbedding)):
            undo.append(_State(module).restore)
            _to_float(module, shared)
        for _, owner in owners:
            _forget_scales(owner, undo)
            _record(owner, undo)
    except BaseException:
        while undo:
            undo.pop()()
        raise
    for _, owner in owners:
        host_quantized_(owner)
    if dtype is not None:
        model.to(dtype)
    return outer


@torch.no_grad()
def _to_float(module: Any, shared: dict[int, nn.Parameter]) -> None:
    integers = {name: module._parameters[name] for name in module._shapes()}
    bias = module._parameters.get("bias")
    kind: Any = WAS.get(type(module)) or (Conv1D if "nx" in vars(module) else nn.Linear)
    found: dict[str, nn.Parameter] = {}
    for name, tensor in integers.items():
        if id(tensor) not in shared:
            with torch.inference_mode(False):
                weight = module._decode(name, module.float_dtype)
                weight = weight.T if kind is Conv1D else weight
                shared[id(tensor)] = nn.Parameter(weight.contiguous().clone())
        found[name] = shared[id(tensor)]
    for key in (*OWN, *(("in_features", "out_features") if kind is Conv1D else ())):
        vars(module).pop(key, None)
    kinds = [made for made in vars(module).pop("hfc_kinds", []) if made[0] != "quantized"]
    if kinds:
        vars(module)["hfc_kinds"] = kinds
    module.__class__ = kind
    module._parameters.clear()
    module._parameters["weight"] = found.pop("weight")
    if kind is not nn.Embedding:
        module._parameters["bias"] = bias
    module._parameters.update(found)


def _forget_scales(owner: PreTrainedModel, undo: Undo) -> None:
    """Tied scales and zero points, which `kinds.follow_ties_` told transformers about."""
    for model in (m for m in owner.modules() if isinstance(m, PreTrainedModel)):
        ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        kept = {key: value for key, value in ties.items() if not key.endswith((".weight_scale", ".weight_zero"))}
        if kept != ties:
            undo.append(lambda model=model, ties=ties: setattr(model, "all_tied_weights_keys", ties))
            model.all_tied_weights_keys = kept


def _record(owner: PreTrainedModel, undo: Undo) -> None:
    """The record without what quantizing wrote: its edits, and the kinds and shapes of its modules."""
    before = compression_of(owner.config)
    if before is None:
        return
    state = dict(vars(owner.config))

    def restore() -> None:
        vars(owner.config).clear()
        vars(owner.config).update(state)

    undo.append(restore)
    layout = copy.deepcopy(before.layout)
    stock = skeleton(owner)
    if stock is not None:
        replay_(stock, {**{key: value for key, value in layout.items() if key in ("layers", "numbers")}, "modules": {}})
    find, find_stock = finder(owner), finder(stock)
    for name, entry in list(layout["modules"].items()):
        kinds = [kind for kind in entry.get("kinds", []) if kind[0] != "quantized"]
        if kinds == entry.get("kinds", []):
            continue
        module = find(name)
        kept = {} if module is None else _entry(module, entry, kinds, find_stock(name))
        if kept:
            layout["modules"][name] = kept
        else:  # as the config builds it; or a head that this class does not carry, whose integers are gone
            del layout["modules"][name]
    if "exits" in layout:  # thresholds may have been tuned since
        layout["exits"] = exit_options(owner)
    edits = Plan([edit for edit in before.plan if not isinstance(edit, Quantize)])
    written, built = write_record(owner, layout, edits.to_dict(spans=True), before.masks_dict, undo)
    place = unrecorded(owner, written, built)
    if place is not None:
        raise CompressionError(
            f"Nothing was changed: the dequantized {type(owner).__name__} could not be saved so that it loads again ({place} "
            "would differ). Start from the float model."
        )


def _entry(module: nn.Module, entry: Mapping[str, Any], kinds: list[Any], stock: nn.Module | None) -> dict[str, Any]:
    """What the loader must be told about a module that is in float again: where it is not what the config builds."""
    shapes = {key: list(p.shape) for key, p in module.state_dict().items()}
    rest = {key: value for key, value in entry.items() if key not in ("kinds", "shapes", "attributes")}
    attributes = entry.get("attributes", {})
    if kinds:
        rest["kinds"] = kinds
    elif stock is not None:
        shapes = {key: shape for key, shape in shapes.items() if shape != list(getattr(stock, key).shape)}
        attributes = {
            key: value
            for key, value in attributes.items()
            if type(getattr(stock, key, None)) is int and getattr(stock, key) != value
        }
    return {**rest, **({"shapes": shapes} if shapes else {}), **({"attributes": attributes} if attributes else {})}
