"""What can be cut, as data: what `discover` finds. Nothing here looks at a model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch

from .mixtures import Mixture


@dataclass(frozen=True)
class Part:
    """One tensor dimension that follows the units (heads or neurons) of a block."""

    module: str
    dim: int  # of a Linear: 0 outputs, 1 inputs; of a bare parameter: its dimension
    layout: str | None  # how the units lie along it, by `owners`; None where only the computation can tell
    parameter: str | None = None  # None: weight and bias of a Linear
    # the unit of each index, where it was found from the computation (`coupling.coupled`); -1 stays in any case
    owner: torch.Tensor | None = field(default=None, compare=False, repr=False)
    argument: str | None = None  # not a tensor of the module but one that its forward is given, by name


@dataclass(frozen=True)
class Attention:
    """Heads that can be cut. `name` is the path of the module that holds the query, key and value projections."""

    name: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    out: str = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)
    scope: str = field(repr=False)  # the smallest module that runs all parts
    shared_bias: str | None = field(default=None, repr=False)
    # where the heads are read from a bare parameter and not by a Linear: (parameter of `out`, its dimension)
    consumer: tuple[str, int] | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return self.num_heads

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_key_value_heads


@dataclass(frozen=True)
class FeedForward:
    """Neurons that can be cut. `name` is the path of the smallest module that holds both projections."""

    name: str
    size: int
    out: str = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)
    scope: str = field(repr=False)
    # where the neurons are read from a bare parameter and not by a Linear: (parameter of `out`, its dimension)
    consumer: tuple[str, int] | None = field(default=None, repr=False)
    # the same block under other names: other modules with the very same weights, which are cut with it (RT-DETR's boxes)
    twins: tuple[FeedForward, ...] = field(default=(), repr=False)
    multiple: int = field(default=1, repr=False)  # what stays is a multiple of this, or all: `candidates.ROW`

    @property
    def gated(self) -> bool:
        return len(self.parts) > 2 or any(part.layout is None for part in self.parts)  # two up projections, or both in one


@dataclass(frozen=True)
class Layer:
    """One entry of a stack. `path` is the ModuleList; `stack` the short name that KeepLayers takes."""

    name: str
    stack: str
    index: int
    path: str = field(repr=False)


@dataclass(frozen=True)
class Convolution:
    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Embedding:
    name: str
    num_embeddings: int
    dim: int


@dataclass(frozen=True)
class Structure:
    """What `discover` found. Prints as a table."""

    attentions: tuple[Attention, ...]
    ffns: tuple[FeedForward, ...]
    layers: tuple[Layer, ...]
    convs: tuple[Convolution, ...]
    embeddings: tuple[Embedding, ...]
    experts: tuple[Mixture, ...] = ()

    @property
    def stacks(self) -> dict[str, tuple[Layer, ...]]:
        """The layers by the short name of their stack."""
        names = dict.fromkeys(layer.stack for layer in self.layers)
        return {name: tuple(layer for layer in self.layers if layer.stack == name) for name in names}

    @property
    def own_ffns(self) -> tuple[FeedForward, ...]:
        """The feed-forward blocks that planners choose from: nothing else uses their weights, and some neurons can go."""
        return tuple(ffn for ffn in self.ffns if not ffn.twins and (ffn.multiple == 1 or ffn.size > ffn.multiple))

    @property
    def channels(self) -> tuple[Convolution, ...]:
        """Convolutions that write channels of their own, which `KeepChannels` takes; depthwise ones pass on what they read.

        Which of them share channels is seen when a model runs: `channel_groups`.
        """
        return tuple(c for c in self.convs if c.out_channels > 1 and not 1 < c.in_channels == c.groups)

    def __str__(self) -> str:
        rows = [("what", "name", "size")]
        for a in self.attentions:
            kv = f" on {a.num_key_value_heads} kv" if a.num_key_value_heads != a.num_heads else ""
            rows.append(("attention", a.name, f"{a.num_heads} heads{kv} x {a.head_dim}"))
        rows += [("ffn", f.name, f"{f.size} neurons{' (gated)' if f.gated else ''}") for f in self.ffns]
        rows += [
            ("experts", e.name, f"{e.num_experts} experts, {e.top_k or '?'} a token, {e.size} neurons") for e in self.experts
        ]
        rows += [("layers", name, f"{len(stack)} in {stack[0].path}") for name, stack in self.stacks.items()]
        for c in self.convs:
            kernel = "x".join(map(str, c.kernel_size)) + (f", {c.groups} groups" if c.groups > 1 else "")
            rows.append(("conv", c.name, f"{c.in_channels} -> {c.out_channels}, {kernel}"))
        rows += [("embedding", e.name, f"{e.num_embeddings} x {e.dim}") for e in self.embeddings]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def owners(layout: str, block: Attention | FeedForward) -> torch.Tensor:
    """For each index along a dimension, the unit that it belongs to: query head `h`, or `num_heads + g` for kv head `g`."""
    if isinstance(block, FeedForward):
        neurons = torch.arange(block.size)
        if layout.startswith("n*"):  # the experts' neurons in one dimension, one expert after the other
            return neurons.repeat(int(layout[2:]))
        return {"n": neurons}[layout]
    heads = torch.arange(block.num_heads)
    return {"q": heads, "kv": block.num_heads + torch.arange(block.num_key_value_heads)}[layout].repeat_interleave(
        block.head_dim
    )


def nearest(name: Any, names: list[str]) -> str:
    """`; did you mean 'x'?` for an error about a name that is not there."""
    if not isinstance(name, str):
        return "."

    close: list[Any] = difflib.get_close_matches(name, names, 1, 0.3)
    return f"; did you mean {close[0]!r}?" if close else "."
