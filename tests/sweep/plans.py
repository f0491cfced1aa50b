"""The edits that the sweep tries, and a random plan for each: a new edit is one line in `EDITS`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import hf_compress as hc
from hf_compress.examples import Asked, ids_in
from hf_compress.vocabularies import vocabularies


def heads(model: Any, draw: random.Random) -> list[Any]:
    """Other heads in every attention; whole key/value groups."""
    chosen = []
    for i, a in enumerate(hc.discover(model).attentions):
        if a.num_heads == 1:
            continue
        if any(isinstance(child, torch.nn.Conv2d) for child in model.get_submodule(a.name).children()) and a.groups == 1:
            # Nystromformer's convolution over time, longer than the text: with one channel torch 2.13's backward writes past its end
            chosen.append(hc.KeepHeads(a.name, tuple(sorted(draw.sample(range(a.num_heads), max(2, a.num_heads - 1 - i % 2))))))
            continue
        if a.num_key_value_heads == 1:
            kept = sorted(draw.sample(range(a.num_heads), 1 + i % (a.num_heads - 1)))
        else:
            most = max(2, a.num_key_value_heads - 1)  # of two, every other layer keeps both
            groups = sorted(draw.sample(range(a.num_key_value_heads), 1 + i % most))
            kept = [g * a.groups + j for g in groups for j in range(a.groups)]
        chosen.append(hc.KeepHeads(a.name, tuple(kept)))
    return chosen


def neurons(model: Any, draw: random.Random) -> list[Any]:
    """Other neurons in every feed-forward block, and other counts."""
    chosen = []
    for f in hc.discover(model).ffns:
        if f.size > 3:
            count = draw.randint(max(1, f.size // 4), f.size - 2)
            if not hasattr(model.get_submodule(f.out), "weight"):  # experts in one tensor: their kernels take whole eights
                count = max(8, count // 8 * 8)
            chosen.append(hc.KeepNeurons(f.name, tuple(draw.sample(range(f.size), count))))
    return chosen


def layers(model: Any, draw: random.Random) -> list[Any]:
    """One layer goes from every stack, never the first, which others may depend on."""
    chosen = []
    for name, stack in hc.discover(model).stacks.items():
        if len(stack) > 1:
            gone = draw.randrange(1, len(stack))
            chosen.append(hc.KeepLayers(tuple(i for i in range(len(stack)) if i != gone), name))
    return chosen


def three(model: Any, draw: random.Random) -> list[Any]:
    return [*heads(model, draw), *neurons(model, draw), *layers(model, draw)]


def channels(model: Any, draw: random.Random) -> list[Any]:
    """Two thirds of every set of channels that go together; as many of every group where a convolution works in groups."""
    chosen = []
    for group in hc.channel_groups(model):  # type: ignore[attr-defined]
        count = getattr(model.get_submodule(group.name), "groups", 1)
        each = group.size // (1 if count == group.size else count)
        offsets = draw.sample(range(each), max(1, 2 * each // 3))
        kept = {i for i in range(group.size) if i % each in offsets} | set(group.fixed)
        if len(kept) < group.size:
            chosen.append(hc.KeepChannels(group.name, sorted(kept)))  # type: ignore[attr-defined]
    return chosen


def experts(model: Any, draw: random.Random) -> list[Any]:
    """Some experts of every mixture, no fewer than a token goes through."""
    chosen = []
    for i, m in enumerate(hc.discover(model).experts):  # type: ignore[attr-defined]
        size = m.num_experts // m.groups  # of which a router first chooses some: equally many stay in each
        least = max(2 if m.biases and m.groups > 1 else 1, -(-(m.top_k or 1) // m.groups_chosen), size - 1 - i % 2)
        if least < size:
            kept = [g * size + e for g in range(m.groups) for e in draw.sample(range(size), least)]
            chosen.append(hc.KeepExperts(m.name, sorted(kept)))  # type: ignore[attr-defined]
    return chosen


def special_ids(model: Any, size: int) -> set[int]:
    """The tokens that the config names: an image's place, a text's end."""
    asked = Asked(model, 2, 12)
    return {v for _, c in asked.configs for name, value in vars(c).items() for v in ids_in(name, value) if 0 <= v < size}


def vocabulary(model: Any, draw: random.Random) -> list[Any]:
    """Two thirds of the tokens, all that the config names among them."""
    try:
        size = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return []
    # rows past the last token (prompts, an image) are no tokens
    size = min([size, *(one.size for one in vocabularies(model))])
    special = special_ids(model, size)
    return [hc.KeepVocabulary(sorted(set(draw.sample(range(size), 2 * size // 3)) | special))]  # type: ignore[attr-defined]


def low_rank(model: Any, draw: random.Random) -> Any:
    return hc.plan_low_rank(model, ratio=0.5)


def separable(model: Any, draw: random.Random) -> Any:
    return hc.plan_depthwise(model)


def sparse(model: Any, draw: random.Random) -> Any:
    return hc.plan_sparsity(model, sparsity=0.6)


def eight_bit(model: Any, draw: random.Random) -> Any:
    return hc.plan_quantization(model, bits=8)


def four_bit(model: Any, draw: random.Random) -> Any:
    return hc.plan_quantization(model, bits=4)


def exits(model: Any, draw: random.Random) -> list[Any]:
    return [hc.AddExits((0,))]


CLASSIFIERS = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")
# name -> (plan, kind, the mappings of which it needs a class; any does if there are none): "cut" is compared with masks, "vocabulary" with the logits of what is kept, "kind" with the
# float form, "exits" with the model itself
EDITS: dict[str, tuple[Callable[[Any, random.Random], Any], str, tuple[str, ...]]] = {
    "KeepHeads": (heads, "cut", ()),
    "KeepNeurons": (neurons, "cut", ()),
    "KeepLayers": (layers, "cut", ()),
    "all three": (three, "cut", ()),
    "KeepChannels": (channels, "cut", ()),
    "KeepExperts": (experts, "cut", ()),
    "KeepVocabulary": (vocabulary, "vocabulary", ()),
    "LowRank": (low_rank, "kind", ()),
    "DepthwiseSeparable": (separable, "kind", ()),
    "Sparsify": (sparse, "kind", ()),
    "Quantize 8 bit": (eight_bit, "kind", ()),
    "Quantize 4 bit": (four_bit, "kind", ()),
    "AddExits": (exits, "exits", CLASSIFIERS),
}


def plan_for(edit: str, model: Any, seed: int = 0) -> hc.Plan:
    made = EDITS[edit][0](model, random.Random(seed))
    return made if isinstance(made, hc.Plan) else hc.Plan(made)
