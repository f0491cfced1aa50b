"""What can be cut: where structure is looked for in a model. Names are hints; `apply_` proves what they say."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from .candidates import MIXER, attentions_in, ffns_in
from .edits import CompressionError
from .mixtures import find_mixtures
from .structure import (
    Attention,
    Convolution,
    Embedding,
    FeedForward,
    Layer,
    Part,
    Structure,
    nearest,
    owners,
)

# of what a list holds one for each layer or each output, with nothing passed from one to the next: boxes' and masks' heads
NO_LAYER = re.compile(r"(FeedForward|MLP|Mlp|Head)$|LQE$")

__all__ = [
    "Attention",
    "Convolution",
    "Embedding",
    "FeedForward",
    "Layer",
    "Part",
    "Structure",
    "discover",
    "nearest",
    "owners",
]


def discover(model: nn.Module) -> Structure:
    """What can be cut in a model: attentions, feed-forward blocks, layers, and what else holds weights.

    Found from the modules themselves (names of projections and matching widths); the model is not run and never
    changed. A name that misleads is no danger: `apply_` proves every cut before it makes one.

    Args:
        model (`nn.Module`): a transformers model, or any module that contains one.

    Returns:
        `Structure`: `.attentions` (`.name`, `.num_heads`, `.num_key_value_heads`, `.head_dim`), `.ffns` (`.name`,
        `.size`), `.experts` (`.name`, `.num_experts`, `.top_k`, `.size`), `.layers`, `.convs`, `.embeddings`.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import discover
    >>> config = BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ...     max_position_embeddings=16,
    ... )
    >>> print(discover(BertModel(config)))
    what       name                              size
    attention  encoder.layer.0.attention.self    4 heads x 8
    ffn        encoder.layer.0                   64 neurons
    layers     encoder                           1 in encoder.layer
    embedding  embeddings.word_embeddings        99 x 32
    embedding  embeddings.position_embeddings    16 x 32
    embedding  embeddings.token_type_embeddings  2 x 32

    ```
    """
    if not isinstance(model, nn.Module):
        raise CompressionError(f"discover takes a model (a torch.nn.Module), got {type(model).__name__}.")
    inner = getattr(model, "_orig_mod", model)  # torch.compile: names are those of the model inside
    modules = dict(inner.named_modules())
    attentions = tuple(attentions_in(modules))
    taken = {part.module for a in attentions for part in a.parts}
    ffns = _with_twins(modules, list(ffns_in(modules, taken)))
    blocks = [block.out for block in (*attentions, *ffns)]
    return Structure(
        attentions,
        ffns,
        _layers(modules, blocks + [name for name, m in modules.items() if MIXER.search(type(m).__name__)]),
        tuple(
            Convolution(name, m.in_channels, m.out_channels, tuple(m.kernel_size), m.groups)
            for name, m in modules.items()
            if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ),
        tuple(Embedding(name, m.num_embeddings, m.embedding_dim) for name, m in modules.items() if isinstance(m, nn.Embedding)),
        tuple(find_mixtures(modules)),
    )


def _with_twins(modules: dict[str, nn.Module], ffns: list[FeedForward]) -> tuple[FeedForward, ...]:
    """One block for all whose weights are the very same: the first, with the others as its twins."""
    same: dict[tuple, list[FeedForward]] = {}
    for ffn in ffns:
        weights = [modules[part.module]._parameters.get(part.parameter or "weight") for part in ffn.parts]
        same.setdefault(tuple(id(weight) if weight is not None else (ffn.name,) for weight in weights), []).append(ffn)
    return tuple(_first_of(alike) for alike in same.values())


def _first_of(alike: list[FeedForward]) -> FeedForward:
    def others(ffn: FeedForward) -> tuple[FeedForward, ...]:
        return tuple(other for other in alike if other is not ffn)

    return replace(alike[0], twins=tuple(replace(twin, twins=others(twin)) for twin in alike[1:]))


def _layers(modules: dict[str, nn.Module], outs: list[str]) -> tuple[Layer, ...]:
    """Every ModuleList each of whose entries holds an attention, a feed-forward block or a mixer (Mamba) of its own."""
    paths = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not all(NO_LAYER.search(type(child).__name__) for child in module)
        and all(any(out.startswith(f"{path}.{i}.") for out in outs) for i in range(len(module)))
    ]

    def parts_of_a_layer(path: str) -> bool:
        """Whether a list lies in an entry of another one that has blocks outside it, or holds different things."""
        for other in paths:
            if path.startswith(f"{other}."):
                entry = f"{other}.{path[len(other) + 1 :].split('.')[0]}."
                inside = [out for out in outs if out.startswith(entry)]
                if len({type(m) for m in modules[path].children()}) > 1:  # T5: block.0.layer holds attention and FFN
                    return True
                if not all(any(out.startswith(f"{p}.") for p in paths if p.startswith(entry)) for out in inside):
                    return True  # MobileBERT: layer.0.ffn, beside the layer's attention
        return False

    paths = [path for path in paths if not parts_of_a_layer(path)]
    # Swin: the list of stages is no stack, since widths change between them; the blocks of each stage are
    paths = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    short = _short_names(paths)
    return tuple(
        Layer(f"{path}.{i}", short[path], i, path) for path in paths for i in range(len(list(modules[path].children())))
    )


def _short_names(paths: list[str]) -> dict[str, str]:
    """The first path component that only this stack has; the whole path where there is none."""
    split = {path: path.split(".") for path in paths}
    if len(paths) == 1:
        words = [w for w in split[paths[0]] if not w.isdigit()]
        return {paths[0]: next((w for w in words if w in ("encoder", "decoder")), paths[0])}
    names = {}
    for path, words in split.items():
        others = [set(w) for p, w in split.items() if p != path]
        own = [w for w in words if not w.isdigit() and not any(w in other for other in others)]
        names[path] = next((w for w in own if w in ("encoder", "decoder")), own[0] if own else path)
    return names
