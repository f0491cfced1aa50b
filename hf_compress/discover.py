"""What can be cut: the only file that looks for structure in a model. Names are hints; `apply_` proves what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .edits import CompressionError
from .modules import width

# One attention is a module with these Linear children; its output projection is one more child, or lies in a sibling.
QUERY = re.compile(r"^(q|query)(_?(lin|proj|layer))?$")
KEY = re.compile(r"^(k|key)(_?(lin|proj|layer))?$")
VALUE = re.compile(r"^(v|value)(_?(lin|proj|layer))?$")
FUSED = re.compile(r"^(c_attn|Wqkv|query_key_value|qkv(_proj)?|in_proj)$")
OUT = re.compile(r"^(o|out|dense|c_proj|Wo|out_lin|o_proj|out_proj|proj)$")
HEAD_DIM = ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim")
NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")

# One feed-forward block is a pair of an up and a down projection, the second as wide inside as the first is outside.
UP = re.compile(
    r"^(dense|lin1|linear1|fc1|c_fc|wi|wi_0|wi_1|Wi|gate_proj|up_proj|gate_up_proj|weights_in|"
    r"intermediate_dense|dense_h_to_4h|ffn|pwconv1|w1|w3|fc_in|dense1|intermediate)$"
)
DOWN = re.compile(
    r"^(dense|lin2|linear2|fc2|c_proj|wo|Wo|down_proj|weights_out|output_dense|dense_4h_to_h|ffn_output|pwconv2|w2|fc_out|dense2|output)$"
)
NESTED = re.compile(r"intermediate|output|ffn|mlp|feed")

# How the units of a block lie along one dimension of a tensor, in the order in which a guess is tried.
FUSED_LAYOUTS = ("q|k|v", "(qkv)")
FUSED_UP_LAYOUTS = ("n|n", "(nn)")

# What a family has beside that. A new family is usually nothing; otherwise one row here and one line in tests/zoo.py.
# (attention class, tensors under the attention: (module, parameter or None for a Linear, dimension, layout))
EXTRA_PARTS: tuple[tuple[str, tuple[tuple[str, str | None, int, str], ...]], ...] = (
    (
        r"DisentangledSelfAttention",
        (
            ("pos_key_proj", None, 0, "q"),
            ("pos_query_proj", None, 0, "q"),
            ("pos_proj", None, 0, "q"),  # these four: DeBERTa v1
            ("pos_q_proj", None, 0, "q"),
            ("", "q_bias", 0, "q"),
            ("", "v_bias", 0, "q"),
        ),
    ),
    (r"Swin\w*Attention", (("relative_position_bias", "relative_position_bias_table", 1, "h"),)),
    (r"UMT5Attention", (("relative_attention_bias", "weight", 1, "h"),)),
)
# Attentions that share one position bias among the layers of a stack: the bias stays whole, each selects its heads.
SHARED_BIAS: tuple[tuple[str, str], ...] = (
    (r"(T5|MT5|LongT5|SwitchTransformers|Pop2Piano)Attention", "interface"),
    (r"MPNetSelfAttention", "argument"),
)


# Attentions that hand the weights of their output projection to a function of torch instead of calling it: no mask on the
# projection would be seen, so no head is offered.
OPAQUE = re.compile(r"WavLMAttention|MultiheadAttention")


@dataclass(frozen=True)
class Part:
    """One tensor dimension that follows the units (heads or neurons) of a block."""

    module: str
    dim: int  # of a Linear: 0 outputs, 1 inputs; of a bare parameter: its dimension
    layouts: tuple[str, ...]  # how the units lie along it, first guess first
    parameter: str | None = None  # None: weight and bias of a Linear
    # the unit of each index, where it was found from the computation (`coupling.coupled`); -1 stays in any case
    owner: torch.Tensor | None = field(default=None, compare=False, repr=False)


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

    @property
    def gated(self) -> bool:
        return sum(part.module != self.out for part in self.parts) > 1 or "n|n" in self.parts[0].layouts


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

    @property
    def stacks(self) -> dict[str, tuple[Layer, ...]]:
        """The layers by the short name of their stack."""
        names = dict.fromkeys(layer.stack for layer in self.layers)
        return {name: tuple(layer for layer in self.layers if layer.stack == name) for name in names}

    def __str__(self) -> str:
        rows = [("what", "name", "size")]
        for a in self.attentions:
            kv = f" on {a.num_key_value_heads} kv" if a.num_key_value_heads != a.num_heads else ""
            rows.append(("attention", a.name, f"{a.num_heads} heads{kv} x {a.head_dim}"))
        rows += [("ffn", f.name, f"{f.size} neurons{' (gated)' if f.gated else ''}") for f in self.ffns]
        rows += [("layers", name, f"{len(stack)} in {stack[0].path}") for name, stack in self.stacks.items()]
        for c in self.convs:
            kernel = "x".join(map(str, c.kernel_size)) + (f", {c.groups} groups" if c.groups > 1 else "")
            rows.append(("conv", c.name, f"{c.in_channels} -> {c.out_channels}, {kernel}"))
        rows += [("embedding", e.name, f"{e.num_embeddings} x {e.dim}") for e in self.embeddings]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def discover(model: nn.Module) -> Structure:
    """What can be cut in a model: attentions, feed-forward blocks, layers, and what else holds weights.

    Found from the modules themselves (names of projections and matching widths); the model is not run and never
    changed. A name that misleads is no danger: `apply_` proves every cut before it makes one.

    Args:
        model (`nn.Module`): a transformers model, or any module that contains one.

    Returns:
        `Structure`: `.attentions` (`.name`, `.num_heads`, `.num_key_value_heads`, `.head_dim`), `.ffns` (`.name`,
        `.size`), `.layers`, `.convs`, `.embeddings`.

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
    attentions = tuple(_attentions(modules))
    taken = {part.module for a in attentions for part in a.parts}
    ffns = tuple(_ffns(modules, taken))
    return Structure(
        attentions,
        ffns,
        _layers(modules, [block.out for block in (*attentions, *ffns)]),
        tuple(
            Convolution(name, m.in_channels, m.out_channels, tuple(m.kernel_size), m.groups)
            for name, m in modules.items()
            if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ),
        tuple(Embedding(name, m.num_embeddings, m.embedding_dim) for name, m in modules.items() if isinstance(m, nn.Embedding)),
    )


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}


def _meet(names: list[str]) -> str:
    """The deepest path above all names."""
    common: list[str] = []
    for level in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _scope(modules: dict[str, nn.Module], names: list[str]) -> str:
    """The deepest module above all names that has a forward of its own to run."""
    scope = _meet(names)
    while scope and isinstance(modules[scope], nn.ModuleList | nn.ModuleDict):
        scope = _parent(scope)
    return scope


def _integer(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _attentions(modules: dict[str, nn.Module]) -> Iterator[Attention]:
    for name, module in modules.items():
        linears = _linears(module)
        q, k, v = ([n for n in linears if pattern.match(n)] for pattern in (QUERY, KEY, VALUE))
        fused = [n for n in linears if FUSED.match(n)]
        if not (q and k and v) and not fused or OPAQUE.fullmatch(type(module).__name__):
            continue
        ins = fused[:1] if not (q and k and v) else [q[0], k[0], v[0]]
        out = next((_join(name, n) for n in linears if OUT.match(n) and n not in ins), None)
        if out is None and name:  # BERT: attention.self.{query,key,value} beside attention.output.dense
            parent = modules[_parent(name)]
            out = next(
                (
                    _join(_parent(name), sibling, n)
                    for sibling, child in parent.named_children()
                    if child is not module
                    for n in _linears(child)
                    if OUT.match(n)
                ),
                None,
            )
        if out is None:
            continue
        inner = width(modules[out], 1)
        heads = _integer(module, NUM_HEADS)
        head_dim = _integer(module, HEAD_DIM) or (inner // heads if heads else None)
        if head_dim is None or inner % head_dim:
            continue
        num_heads = inner // head_dim
        if len(ins) == 3:
            kv, rest = divmod(width(linears[ins[1]], 0), head_dim)
            parts = [Part(_join(name, n), 0, (layout,)) for n, layout in zip(ins, ("q", "kv", "kv"), strict=True)]
        else:
            both, rest = divmod(width(linears[ins[0]], 0) - inner, 2 * head_dim)
            kv = both
            parts = [Part(_join(name, ins[0]), 0, FUSED_LAYOUTS)]
        if rest or kv < 1 or num_heads % kv:
            continue
        parts.append(Part(out, 1, ("q",)))
        kind = type(module).__name__
        for pattern, extras in EXTRA_PARTS:
            if re.fullmatch(pattern, kind):
                parts += [
                    Part(_join(name, child), dim, (layout,), parameter)
                    for child, parameter, dim, layout in extras
                    if _has(modules, _join(name, child), parameter)
                ]
        shared = next((how for pattern, how in SHARED_BIAS if re.fullmatch(pattern, kind)), None)
        scope = _scope(modules, [part.module for part in parts])
        yield Attention(name, num_heads, kv, head_dim, out, tuple(parts), scope, shared)


def _has(modules: dict[str, nn.Module], name: str, parameter: str | None) -> bool:
    return name in modules and (parameter is None or modules[name]._parameters.get(parameter) is not None)


def _ffns(modules: dict[str, nn.Module], taken: set[str]) -> Iterator[FeedForward]:
    seen: set[str] = set()
    names: set[str] = set()
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        linears = {_join(name, n): child for n, child in _linears(module).items()}
        linears = {n: child for n, child in linears.items() if n not in taken}
        if not linears:  # BERT: intermediate.dense and output.dense, one level down
            linears = {
                _join(name, child_name, n): linear
                for child_name, child in module.named_children()
                if NESTED.search(child_name) and not isinstance(child, nn.ModuleList | nn.ModuleDict)
                for n, linear in _linears(child).items()
                if _join(name, child_name, n) not in taken
            }
        order = list(linears)
        for position, down in enumerate(order):
            if not DOWN.match(down.rpartition(".")[2]) or down in seen:
                continue
            inner, hidden = width(linears[down], 1), width(linears[down], 0)
            ups = [
                up
                for up in order
                if up != down
                and UP.match(up.rpartition(".")[2])
                and width(linears[up], 1) == hidden
                and width(linears[up], 0) in (inner, 2 * inner)
                and (order.index(up) < position or up.rpartition(".")[2] in ("w3", "up_proj", "gate_proj"))
            ]
            if not ups:
                continue
            seen.add(down)
            parts = [Part(up, 0, ("n",) if width(linears[up], 0) == inner else FUSED_UP_LAYOUTS) for up in ups]
            scope = _scope(modules, [*ups, down])
            meet = _meet([*ups, down]) or down
            if meet in names:  # LiLT: two blocks in one layer
                meet = down
            names.add(meet)
            yield FeedForward(meet, inner, down, (*parts, Part(down, 1, ("n",))), scope)


def _layers(modules: dict[str, nn.Module], outs: list[str]) -> tuple[Layer, ...]:
    """Every ModuleList each of whose entries holds an attention or a feed-forward block of its own."""
    paths = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and len(module)
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


def owners(layout: str, block: Attention | FeedForward) -> torch.Tensor:
    """For each index along a dimension, the unit that it belongs to: query head `h`, or `num_heads + g` for kv head `g`."""
    if isinstance(block, FeedForward):
        neurons = torch.arange(block.size)
        return {"n": neurons, "n|n": neurons.repeat(2), "(nn)": neurons.repeat_interleave(2)}[layout]
    heads, kv_heads, dim = block.num_heads, block.num_key_value_heads, block.head_dim
    q, kv = torch.arange(heads), heads + torch.arange(kv_heads)
    if layout == "h":
        return q
    if layout == "(qkv)":  # GPT-NeoX: the query heads of a group, then its key, then its value
        return torch.cat([q.view(kv_heads, -1), kv[:, None], kv[:, None]], 1).flatten().repeat_interleave(dim)
    q, kv = q.repeat_interleave(dim), kv.repeat_interleave(dim)
    return {"q": q, "kv": kv, "q|k|v": torch.cat([q, kv, kv])}[layout]


def nearest(name: Any, names: list[str]) -> str:
    """`; did you mean 'x'?` for an error about a name that is not there."""
    import difflib

    if not isinstance(name, str):
        return "."

    close: list[Any] = difflib.get_close_matches(name, names, 1, 0.3)
    return f"; did you mean {close[0]!r}?" if close else "."
