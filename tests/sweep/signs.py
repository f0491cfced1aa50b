"""An independent sign of attention and feed-forward blocks: the names of classes."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

import hf_compress as hc

ATTENTION = re.compile(r"Attention|Attn")
# attention by name, with nothing that could be cut as a head: RWKV's channels are weighed one by one over time; SwiftFormer has
# one query for all places and one weight a channel, MobileViTV2 one score a place
NO_HEADS = re.compile(r"RwkvSelfAttention|EfficientAdditiveAttention|MobileViTV2LinearSelfAttention")
FEED_FORWARD = re.compile(r"MLP|Mlp|FeedForward|FFN|Intermediate|Experts$|MoE$|MoeBlock|SparseMoe")


def unseen(model: Any) -> dict[str, dict[str, int]]:
    """Classes in which a person sees attention or a feed-forward block and `discover` does not: the innermost modules."""
    structure = hc.discover(model)
    found: dict[str, dict[str, int]] = {}
    for what, pattern, blocks in (
        ("attention", ATTENTION, structure.attentions),
        ("feed-forward", FEED_FORWARD, [block for ffn in structure.ffns for block in (ffn, *ffn.twins)]),
    ):
        names = {part.module for b in (*blocks, *structure.attentions) for part in b.parts} | {b.name for b in blocks}
        classes: dict[str, int] = {}
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if (
                not pattern.search(type(module).__name__)
                or NO_HEADS.search(type(module).__name__)
                or name == ""
                or isinstance(module, nn.ModuleList)
            ):
                continue
            weights = [p for p in module.parameters() if p.ndim >= 2]
            if len(weights) < (2 if what == "attention" else 1):
                continue
            inner = any(
                n.startswith(f"{name}.") and pattern.search(type(m).__name__) and sum(p.ndim >= 2 for p in m.parameters()) >= 2
                for n, m in modules.items()
            )
            if inner or any(n == name or n.startswith(f"{name}.") or name.startswith(f"{n}.") for n in names):
                continue
            classes[type(module).__name__] = classes.get(type(module).__name__, 0) + 1
        if classes:
            found[what] = classes
    return found
