"""Whether the names that transformers gives weights on disk come back as the model's own: it knows stock models only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )
except ImportError:  # another transformers: what it converts is not known
    get_model_conversion_mapping = None  # type: ignore[assignment]


def come_back(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` and `from_pretrained` give every weight its name and shape back.

    Transformers writes some models under the names, and fused as, their first authors had them (`conversion_mapping`). It does
    so by the names of stock weights: two matrices in the place of one may lose one of them, and what it concatenates must
    have as many dimensions. Tried here on tensors without memory.
    """
    if get_model_conversion_mapping is None:
        return True
    here = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
    try:
        there = revert_weight_conversion(model, dict(here))
        if list(there) == list(here) and all(there[name] is tensor for name, tensor in here.items()):
            return True
        back = _loaded(model, there, here)
    except Exception:  # whatever it stumbles over when it saves
        return False
    # of weights that are tied one is saved
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    return all(name in back or name in tied for name in here) and all(
        back[name].shape == tensor.shape for name, tensor in here.items() if name in back
    )


def name_(model: PreTrainedModel, conversions: list | None, undo: list[Callable[[], None]] | None = None) -> None:
    """Let a model and those inside of it be saved with these conversions: none (`[]`), or transformers' own (`None`)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            before = vars(module).get("_weight_conversions")
            if undo is not None:
                undo.append(lambda m=module, b=before: setattr(m, "_weight_conversions", b))
            module._weight_conversions = conversions  # type: ignore[assignment]


def _loaded(
    model: PreTrainedModel, there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights under the names, and in the shapes, that `from_pretrained` gives them."""
    assert get_model_conversion_mapping is not None
    mapping: list[Any] = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
    renamings = [copy.deepcopy(entry) for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, torch.Tensor] = {}
    collected: dict[str, Any] = {}
    for key, tensor in sorted(there.items()):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(here))
        if name not in here and key in here:
            name, pattern = key, None
        if pattern is None:
            found[name] = tensor
        else:
            collected.setdefault(name, copy.deepcopy(by_pattern[pattern])).add_tensor(name, key, pattern, tensor)
    for name, converter in collected.items():
        for target, value in converter.convert(name, model=model, config=model.config).items():
            found[target] = value[0] if isinstance(value, list) else value
    return found
