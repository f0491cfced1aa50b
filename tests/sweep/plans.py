"""The edits that the sweep tries, and a random plan for each: a new edit is one line in `EDITS`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import hf_compress as hc


def heads(model: Any, draw: random.Random) -> list[Any]:
    """Other heads in every attention; whole key/value groups."""
    chosen = []
    for i, a in enumerate(hc.discover(model).attentions):
        if a.num_heads == 1:
            continue
        if a.num_key_value_heads == 1:
            kept = sorted(draw.sample(range(a.num_heads), 1 + i % (a.num_heads - 1)))
        else:
            most = max(2, a.num_key_value_heads - 1)  # of two, every other layer keeps both
            groups = sorted(draw.sample(range(a.num_key_value_heads), 1 + i % most))
            kept = [g * a.groups + j for g in groups for j in range(a.groups)]
        chosen.append(hc.KeepHeads(a.name, kept))
    return chosen


def neurons(model: Any, draw: random.Random) -> list[Any]:
    """Other neurons in every feed-forward block, and other counts."""
    chosen = []
    for f in hc.discover(model).ffns:
        if f.size > 3:
            count = draw.randint(max(1, f.size // 4), f.size - 2)
            if not hasattr(model.get_submodule(f.out), "weight"):  # experts in one tensor: their kernels take whole eights
                count = max(8, count // 8 * 8)
            chosen.append(hc.KeepNeurons(f.name, sorted(draw.sample(range(f.size), count))))
    return chosen


def layers(model: Any, draw: random.Random) -> list[Any]:
    """One layer goes from every stack, never the first, which others may depend on."""
    chosen = []
    for name, stack in hc.discover(model).stacks.items():
        if len(stack) > 1:
            gone = draw.randrange(1, len(stack))
            chosen.append(hc.KeepLayers([i for i in range(len(stack)) if i != gone], name))
    return chosen


def three(model: Any, draw: random.Random) -> list[Any]:
    return [*heads(model, draw), *neurons(model, draw), *layers(model, draw)]


def low_rank(model: Any, draw: random.Random) -> Any:
    return hc.plan_low_rank(model, ratio=0.5)


def separable(model: Any, draw: random.Random) -> Any:
    return hc.plan_depthwise(model)


def eight_bit(model: Any, draw: random.Random) -> Any:
    return hc.plan_quantization(model, bits=8)


def four_bit(model: Any, draw: random.Random) -> Any:
    return hc.plan_quantization(model, bits=4)


def exits(model: Any, draw: random.Random) -> list[Any]:
    return [hc.AddExits([0])]


CLASSIFIERS = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")
# name -> (plan, kind, the mappings of which it needs a class; any does if there are none): "cut" is compared with masks, "kind" with the
# float form, "exits" with the model itself
EDITS: dict[str, tuple[Callable[[Any, random.Random], Any], str, tuple[str, ...]]] = {
    "KeepHeads": (heads, "cut", ()),
    "KeepNeurons": (neurons, "cut", ()),
    "KeepLayers": (layers, "cut", ()),
    "all three": (three, "cut", ()),
    "LowRank": (low_rank, "kind", ()),
    "DepthwiseSeparable": (separable, "kind", ()),
    "Quantize 8 bit": (eight_bit, "kind", ()),
    "Quantize 4 bit": (four_bit, "kind", ()),
    "AddExits": (exits, "exits", CLASSIFIERS),
}


def plan_for(edit: str, model: Any, seed: int = 0) -> hc.Plan:
    made = EDITS[edit][0](model, random.Random(seed))
    return made if isinstance(made, hc.Plan) else hc.Plan(made)
