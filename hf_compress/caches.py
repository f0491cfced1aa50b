"""Caches whose sizes come from the config, for models whose layers have different numbers of heads."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .cutting import Undo
from .discover import discover
from .edits import CompressionError, KeepHeads

logger = logging.get_logger(__name__)


def host_caches_(model: nn.Module, record: Any, undo: Undo | None = None) -> None:
    """Keep transformers from taking the number of heads of every layer's cache from the config, where heads were cut.

    Most caches take their shape from the first keys that they are given, which is right for any model. Two do not: a static
    cache with `prefill_chunk_size`, which is told here to do as the others; and the paged cache of continuous batching,
    one shape for all layers, which is refused.

    Args:
        model: the model; changed in place, by attributes of the instance.
        record: its record (an `HfCompressConfig`); None where plain transformers builds it, whose config is right then.
    """
    uneven = record is not None and any(edit["edit"] == KeepHeads.__name__ for edit in record.plan_dict["edits"])
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        values = vars(module)
        for name, ours in INSTEAD.items():
            if uneven and hasattr(type(module), name) and name not in values:
                values[name] = ours
                if undo is not None:
                    undo.append(lambda v=values, n=name: v.pop(n, None))
            elif not uneven and values.get(name) is ours:
                del values[name]
                if undo is not None:
                    undo.append(lambda v=values, n=name, f=ours: v.__setitem__(n, f))


def warn_of_short_cache(model: PreTrainedModel) -> None:
    """Say that `generate` will fail where it makes fewer layers of cache than the decoder has: T5 and its like.

    Their config counts the encoder's layers where `generate` looks; a stock model with a deeper decoder fails alike.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        return
    depth = max((len(s) for s in discover(model).stacks.values() if "decoder" in s[0].path.split(".")), default=0)
    found = getattr(config.get_text_config(decoder=True), "num_hidden_layers", depth)
    if isinstance(found, int) and found < depth:
        logger.warning(
            f"generate() of this {type(model).__name__} will fail with an IndexError: transformers makes its cache as deep as "
            f"the encoder, {found}, and the decoder has {depth} layers. A stock model with such depths fails alike. "
            "Forward, training and loading are not affected, and generate(use_cache=False) runs. Keep as many layers in the "
            "encoder as in the decoder to generate with a cache."
        )


def _no_shape_yet() -> None:
    """In the place of `_get_static_cache_init_shape`: a cache that knows no shape takes that of the first keys."""
    return None


def _refuse_paged(*_: Any, **__: Any) -> Any:
    raise CompressionError(
        "Continuous batching keeps one cache, of one shape for all layers, and the layers of this model have different "
        "numbers of key/value heads. Use generate(); or cut every layer alike (plan_pruning(..., uniform=True)), which leaves "
        "a stock model."
    )


INSTEAD = {
    "_get_static_cache_init_shape": _no_shape_yet,
    "generate_batch": _refuse_paged,
    "init_continuous_batching": _refuse_paged,
}
