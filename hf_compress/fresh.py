"""A model of a compressed architecture with weights that have not been trained: what `AutoModel.from_config` cannot build."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .caches import host_caches_
from .conversions import name_
from .edits import CompressionError
from .kinds import SEPARABLE
from .layout import OWN, finish_replayed, replay_, with_numbers
from .loader import HfCompressConfig, host_quantized_, of_a_part, of_the_whole, record_in
from .modules import LowRankLinear
from .parts import stamp_parts_
from .quantization import is_quantized, options_of, quantize_
from .sparse import is_sparse, sparsify_
from .sparsity import choose_masks, from_matrix, matrix_of


def from_config(config: PreTrainedConfig, auto_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Build the model that a compressed checkpoint's config describes, with fresh weights: the control of every pruning.

    `AutoModel.from_config(config)` of a compressed config gives the model at full size, since transformers does not read
    records there. This function lets transformers build and initialise that model, then takes of every weight as many
    rows and columns as the record says: weights drawn one by one from a distribution keep it, and what was not compressed
    is, from the same seed, what `AutoModel.from_config` gives. Modules that became something else are drawn so that the
    weight that they stand for has the standard deviation `s` of the one that stock would have drawn: a low-rank `U V`
    with entries of `s^(1/2) r^(-1/4)` each (a sum of `r` products of variance `s^2 / r`), a separable convolution
    likewise with the multiplier for `r`; integers are those of a drawn float weight. Exits, locks, selected heads and masks
    are there too, so the model trains, is saved and loads as one that was cut.

    Args:
        config (`PreTrainedConfig`): of a checkpoint that `apply_` led to. Without a record in it (a stock checkpoint, say)
            this is `auto_class.from_config(config, **kwargs)`.
        auto_class (*optional*): an Auto class (`AutoModelForSequenceClassification`) or a model class. By default the class
            that saved the checkpoint (`config.architectures`), else `AutoModel`.
        **kwargs: for transformers' `from_config` (`dtype`, `attn_implementation`, ...).

    Returns:
        the model, in training mode as transformers gives it.

    Raises:
        CompressionError: not a config; a record of another architecture; weights that another method quantized.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> import hf_compress as hc
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> _ = hc.apply_(model, hc.Plan([hc.KeepNeurons("encoder.layer.1", range(40))]))
    >>> fresh = hc.from_config(model.config, BertModel)
    >>> fresh.encoder.layer[1].intermediate.dense, fresh.num_parameters() == model.num_parameters()
    (Linear(in_features=32, out_features=40, bias=True), True)

    ```
    """
    if not isinstance(config, PreTrainedConfig):
        raise CompressionError(
            f"from_config takes the config of a model, got {type(config).__name__}: AutoConfig.from_pretrained(folder)."
        )
    config = copy.deepcopy(config)
    build = _builder(config, auto_class, kwargs)
    record = record_in(config) or of_a_part(config)
    if record is None:
        return build(config)
    if record.inner is not None:
        raise CompressionError(
            f"This checkpoint's weights are quantized with {record.inner['quant_method']}, which converts weights that are "
            "there. Build from the config of the pruned checkpoint in float."
        )
    model = build(config)
    record = of_the_whole(model, record)
    layout = record.layout
    base = build(with_numbers(config, layout.get("numbers"))) if layout.get("layers") else None
    with torch.no_grad():
        replay_(model, layout, draw_, base)
    finish_replayed(model, layout)
    model.tie_weights(recompute_mapping=False)  # `replay_` has told it where scales go
    model.config.quantization_config = HfCompressConfig(record.plan_dict, record.layout_text, record.masks_dict)
    stamp_parts_(model, model.config.quantization_config, [])
    host_quantized_(model)
    host_caches_(model, record)
    if layout.get("names") == OWN:
        name_(model, [])
    return model


def _builder(config: Any, auto_class: Any, kwargs: dict[str, Any]) -> Any:
    names = [name for name in getattr(config, "architectures", None) or [] if hasattr(transformers, name)]
    kind = auto_class if auto_class is not None else getattr(transformers, names[0]) if names else AutoModel
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        return lambda config: kind._from_config(config, **kwargs)
    if not hasattr(kind, "from_config"):
        raise CompressionError(f"auto_class is a class such as AutoModelForSequenceClassification or BertModel, got {kind!r}.")
    return lambda config: kind.from_config(config, **kwargs)


def draw_(module: Any, dense: torch.Tensor) -> None:
    """Fill a module that became something else, where `dense` is the weight (out, in) that stock would have drawn."""
    spread = dense.float().std().nan_to_num().item()
    if is_quantized(module):
        module.settle_()
        drawn = _drawn(module._shapes(), dense, spread)
        plain = _plain(module, drawn)
        quantize_(plain, **options_of(module))
        for key, tensor in plain._parameters.items():
            if key != "bias":
                module._parameters[key].copy_(tensor)
    elif isinstance(module, LowRankLinear):
        _product(module.weight, module.weight_in, module.rank, spread)
    elif is_sparse(module):
        _draw_sparse(module, dense)
    elif type(module) in SEPARABLE.values():
        _product(module.weight, module.weight_depth, module.multiplier, spread)


def _draw_sparse(module: Any, dense: torch.Tensor) -> None:
    """As many weights as stay, of those that stock would have drawn, at random places: which stay is in a checkpoint alone."""
    shape, kept, pattern = module.hfc_shape, module.hfc_kept, module.hfc_pattern
    dense = dense.T if isinstance(module, Conv1D) else dense
    weight = dense[tuple(slice(n) for n in shape)].clone()
    scores = matrix_of(module, torch.rand(shape, device=weight.device))
    sparsity = 1 - kept / weight.numel()
    mask = choose_masks({"weight": scores}, sparsity, "layer", pattern)["weight"]
    requires_grad = module.weight.requires_grad
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=requires_grad)
    sparsify_(module, from_matrix(module, mask, torch.Size(shape)).contiguous(), pattern=pattern)


def _product(one: torch.Tensor, other: torch.Tensor, terms: int, spread: float) -> None:
    for tensor in (one, other):
        tensor.normal_(0.0, spread**0.5 * terms**-0.25)


def _drawn(shapes: dict[str, tuple[int, int]], dense: torch.Tensor, spread: float) -> dict[str, torch.Tensor]:
    if "weight_in" not in shapes:
        out, size = shapes["weight"]
        return {"weight": dense[:out, :size].clone()}
    drawn = {name: torch.empty(shape, dtype=dense.dtype, device=dense.device) for name, shape in shapes.items()}
    _product(drawn["weight"], drawn["weight_in"], shapes["weight"][1], spread)
    return drawn


def _plain(module: Any, drawn: dict[str, torch.Tensor]) -> Any:
    """A float module of the kind that is quantized to this one, with these weights."""
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in drawn.items()}
    if isinstance(module, nn.Embedding):
        return nn.Embedding.from_pretrained(drawn["weight"])
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    if "weight_in" in parameters:
        plain.__class__ = LowRankLinear
    plain._parameters.update(parameters)
    return plain
