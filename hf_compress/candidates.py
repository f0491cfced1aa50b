"""Where attention and feed-forward blocks may be, by classes, names and widths: hints. `coupling` finds what is theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .heads import spread_width
from .modules import is_own_linear, is_projection, width
from .structure import Attention, FeedForward, Part

# One attention is a module with Linear children of these names, or with a class of this name; its output projection is one
# more child, or lies in a sibling.
QUERY = re.compile(
    r"^(q|query|wq|to_q|to_query|q_head)(_?(lin|proj|layer))?$|^(linear|project|projection)_(q|query)$|^q_b_proj$", re.I
)
KEY = re.compile(r"^(k|key|wk|to_k|to_key|k_head)(_?(lin|proj|layer))?$|^(linear|project|projection)_(k|key)$", re.I)
VALUE = re.compile(r"^(v|value|wv|to_v|to_value|v_head)(_?(lin|proj|layer))?$|^(linear|project|projection)_(v|value)$", re.I)
FUSED = re.compile(
    r"^(c_attn|Wqkv|query_key_value|qkv(_proj|_linear)?|in_proj|in_proj_qkv|att_proj|to_kv|kv_proj|kv_b_proj|linear_kv|"
    r"queries_keys_values|keys_values)$"
)
LEVIT = re.compile("queries_keys_values|keys_values")  # values are wider than keys, so the widths do not say how many there are
OUT = re.compile(
    r"^(o|out|dense|c_proj|Wo|out_lin|o_proj|out_proj|proj|to_out|linear_out|linear_o|attention_out|projection|"
    r"projection_layer|output|output_proj|post|post_proj|o_b_proj)$"
)
ATTENTION = re.compile(r"Attention|Attn")
# what has such names and is neither: state-space and recurrent mixers, poolers with one query, maps without values
NO_ATTENTION = re.compile(
    r"Mamba|SSM|Recurrent(?!Gemma(Sdpa)?Attention)|DeltaNet|DeformableAttention|AttentionMap|AttentionOutput|AttnAdapter|AttentionGRU|Rwkv"
)
HEAD_DIM = (
    "v_head_dim",
    "value_head_dim",
    "attention_head_size",
    "head_dim",
    "head_size",
    "key_value_proj_dim",
    "attention_head_dim",
)
NUM_HEADS = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "heads",
    "num_local_heads",
    "num_head",
    "nheads",
    "num_attn_heads",
)
NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_local_key_value_heads")

# One feed-forward block is a pair of an up and a down projection, the second as wide inside as the first is outside.
UP = re.compile(
    r"^(dense|lin1|linear1|linear_1|fc1|c_fc|wi|wi_0|wi_1|Wi|gate_proj|up_proj|gate_up_proj|weights_in|in_proj|"
    r"intermediate_dense|dense_h_to_4h|ffn|pwconv1|w1|w3|w12|fc_in|dense1|intermediate|linear_in|up_gate_proj|input_linear|gate|up)$"
)
DOWN = re.compile(
    r"^(dense|lin2|linear2|linear_2|fc2|c_proj|wo|Wo|down_proj|weights_out|output_dense|dense_4h_to_h|ffn_output|pwconv2|w2|"
    r"fc_out|dense2|output|out_proj|linear_out|output_linear|down)$"
)
NESTED = re.compile(r"intermediate|output|ffn|mlp|feed")
FEED_FORWARD = re.compile(r"MLP|Mlp|FeedForward|FFN|Ffn|FFLayer|SwiGLU|GLU|Projector")
# neurons with a memory between the projections: not feed-forward
MIXER = re.compile(r"Mamba|SSM|Recurrent|DeltaNet|Rwkv|ShortConv|LinearAttention|ConvolutionModule|ConformerConv")
# whatever an `up` of a later sibling is called: registered after the projection that it feeds
LATE_UP = ("w3", "up_proj", "gate_proj", "up", "gate")

# Attentions that share one position bias among the layers of a stack: the bias stays whole, each selects its heads.
SHARED_BIAS: tuple[tuple[str, str], ...] = (
    (r"(T5|MT5|LongT5|SwitchTransformers|Pop2Piano|Pix2StructText)Attention", "interface"),
    (r"LongT5(Local|TransientGlobal)Attention", "added"),
    (r"MPNetSelfAttention", "argument"),
    (r"WavLMAttention", "function"),
)
# Attentions that hand the weights of their output projection to a function of torch instead of calling it
OPAQUE = re.compile(r"MultiheadAttention")


def attentions_in(modules: dict[str, nn.Module]) -> Iterator[Attention]:
    """Every module that looks like an attention whose heads can be told apart where its output projection reads them."""
    seen: set[str] = set()
    for name, module in modules.items():
        kind = type(module).__name__
        bare = [module._parameters.get(key) for key in "qkvo"]
        if all(p is not None and p.ndim == 3 for p in bare):  # XLNet: (width, heads, size of a head), and einsum
            heads = bare[0].shape[1]  # type: ignore[union-attr]
            parts = [Part(name, 1, "q", key) for key in "qkvo"]
            yield Attention(name, heads, heads, 1, name, tuple(parts), name, None, ("o", 1))
            continue
        if kind == "JetMoeAttention":
            yield _attention_of_experts(name, module)
            continue
        linears = projections(module, convolutions=bool(ATTENTION.search(kind)))
        q, k, v = ([n for n in linears if pattern.match(n)] for pattern in (QUERY, KEY, VALUE))
        fused = [n for n in linears if FUSED.match(n)]
        mixer = next((n for n, child in module.named_children() if "CCAProjection" in type(child).__name__), None)
        inside = (
            {}
            if mixer is None
            else {f"{mixer}.{n}": f"{mixer}.{path}" for n, path in projections(modules[join(name, mixer)]).items()}
        )
        linears, within = {**linears, **inside}, list(inside)  # Zaya: a module of its own makes queries, keys and values
        named = bool(q and k and v) or bool(fused or within)
        by_class = bool(ATTENTION.search(kind)) and bool(q or k or v or fused)
        if any(isinstance(child, nn.Conv1d) and not is_pointwise(child) for child in module.children()):
            continue  # linear attention with a convolution over time, whose state a cache keeps: its heads are not offered
        if not (named or by_class) or NO_ATTENTION.search(kind) or OPAQUE.fullmatch(kind):
            continue
        if not ATTENTION.search(kind) and not (q and k and v) and "in_proj" in fused:  # a mixer, or a gated block
            continue
        ins = [n for n in linears if n in {*q, *k, *v, *fused}] + within
        out = next((join(name, linears[n]) for n in linears if OUT.match(n) and n not in ins), None)
        if "o_a_proj" in linears:  # DeepSeek-V4: one small projection for each group of heads; a unit is a head of every group
            out, _ = join(name, linears["o_a_proj"]), seen.add(join(name, "o_b_proj"))
        if out is None and name:
            out = _out_beside(modules, name, module)
        if out is None or out in seen:
            continue
        if not {out, *(join(name, linears[n]) for n in ins)} <= modules.keys():
            continue  # it runs a projection of another attention (a user's sharing), which is listed there alone
        inner = width(modules[out], 1)
        whole = spread_width(modules[out]) or inner
        config = getattr(module, "config", None)
        heads = _integer(module, NUM_HEADS) or (_integer(config, NUM_HEADS) if named else None)
        head_dim = _integer(module, HEAD_DIM)
        if head_dim is None or inner % head_dim or (heads and whole % heads == 0 and _mla(linears)):
            head_dim = whole // heads if heads and whole % heads == 0 else None
        if head_dim is not None and _is_differential(module):
            head_dim *= 2
        if head_dim is None or inner % head_dim:
            continue
        num_heads = inner // head_dim
        kv, parts = _inputs(modules, name, module, linears, ins, num_heads, head_dim)
        seen.add(out)
        parts.append(Part(out, 1, "q"))
        shared = next((how for pattern, how in SHARED_BIAS if re.fullmatch(pattern, kind)), None)
        scope = _scope(modules, [part.module for part in parts])
        consumer = ("weight", 1) if is_own_linear(modules[out]) or shared == "function" else None
        yield Attention(name, num_heads, kv, head_dim, out, tuple(parts), scope, shared, consumer)


def _attention_of_experts(name: str, module: nn.Module) -> Attention:
    """JetMoE: every expert has queries and an output projection of its own, over keys and values that all share."""
    heads, dim = _integer(module, NUM_KV_HEADS) or 1, _integer(module, HEAD_DIM) or 1
    first, last = join(name, "experts.input_linear"), join(name, "experts.output_linear")
    parts = (Part(first, 1, "q", "weight"), Part(join(name, "kv_proj"), 0, None), Part(last, 2, "q", "weight"))
    heads = module.get_submodule("experts.output_linear")._parameters["weight"].shape[2] // dim or heads  # type: ignore[union-attr]
    return Attention(name, heads, heads, dim, last, parts, name, None, ("weight", 2))


def _is_differential(module: nn.Module) -> bool:
    """Whether a head is the difference of two attentions over values twice as wide (Ye et al. 2024): DiffLlama."""
    return {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"} <= module._parameters.keys()


def _mla(linears: dict[str, str]) -> bool:
    return "kv_b_proj" in linears


def _inputs(
    modules: dict[str, nn.Module], name: str, module: nn.Module, linears: dict[str, str], ins: list[str], heads: int, dim: int
) -> tuple[int, list[Part]]:
    """How many key/value heads there are, and what the names say of the projections that make heads."""
    widths = {n: width(modules[join(name, linears[n])], 0) for n in ins}
    inner = heads * dim
    said = _integer(module, NUM_KV_HEADS) or _integer(getattr(module, "config", None), NUM_KV_HEADS)
    q, k, v = ([n for n in ins if pattern.match(n)] for pattern in (QUERY, KEY, VALUE))
    layouts: dict[str, str] = {}
    plain = len(ins) == 3 and bool(q and k and v)
    if plain and widths[q[0]] == inner and widths[k[0]] == widths[v[0]] and _divides(widths[k[0]], dim, heads):
        kv = widths[k[0]] // dim
        layouts = {q[0]: "q", k[0]: "kv", v[0]: "kv"}
    elif (
        len(ins) == 1
        and not LEVIT.match(ins[0])
        and (widths[ins[0]] - inner) % (2 * dim) == 0
        and _divides((widths[ins[0]] - inner) // 2, dim, heads)
    ):
        kv = (widths[ins[0]] - inner) // (2 * dim)
    else:
        if _mla(linears) or (plain and len({*widths.values()}) == 1 and widths[q[0]] < inner):  # ConvBERT: convolutions beside
            kv = heads
        elif any(_divides(widths[n], dim, heads) for n in (*k, *v)):  # keys may be shared where values are not
            kv = min(widths[n] // dim for n in (*k, *v) if _divides(widths[n], dim, heads))
        else:
            kv = said if said and heads % said == 0 else heads
    parts = [Part(join(name, linears[n]), 0, layouts.get(n)) for n in ins]
    others = [n for n in linears if n not in ins and not OUT.match(n)]
    return kv, parts + [Part(join(name, linears[n]), 0, None) for n in others]


def _divides(total: int, dim: int, heads: int) -> bool:
    return total > 0 and total % dim == 0 and heads % (total // dim) == 0


def _out_beside(modules: dict[str, nn.Module], name: str, module: nn.Module) -> str | None:
    """BERT: attention.self.{query,key,value} beside attention.output.dense."""
    parent = parent_of(name)
    if isinstance(modules[parent], nn.ModuleList | nn.ModuleDict):
        return None
    beside = [(sibling, child) for sibling, child in modules[parent].named_children() if child is not module]
    for sibling, child in sorted(
        beside, key=lambda pair: bool(ATTENTION.search(type(pair[1]).__name__.removesuffix("Output")))
    ):
        for n, path in projections(child, convolutions=all(isinstance(c, nn.Conv1d) for c in _made(module))).items():
            if (OUT.match(n) or n == "conv1d") and not _is_pair(child):
                return join(parent, sibling, path)
    direct = projections(modules[parent])
    return next((join(parent, path) for n, path in direct.items() if OUT.match(n)), None)


def _made(module: nn.Module) -> list[nn.Module]:
    """The modules that an attention makes its queries, keys and values with."""
    names = (QUERY, KEY, VALUE)
    return [child for name, child in module.named_children() if any(pattern.match(name) for pattern in names)]


def _is_plain_sequence(module: nn.Module) -> bool:
    """Linear layers in a row, with nothing between them that looks at all neurons."""
    return type(module) is nn.Sequential and not any("LayerNorm" in type(m).__name__ for m in module.children())


def _is_pair(module: nn.Module) -> bool:
    """Whether a module is a feed-forward block by itself."""
    names = projections(module)
    return any(UP.match(n) and not OUT.match(n) for n in names)


def ffns_in(modules: dict[str, nn.Module], taken: set[str]) -> Iterator[FeedForward]:
    """Every pair of projections with neurons between them, and every set of experts that keeps its weights in one tensor."""
    seen: set[str] = set()
    names: set[str] = set()
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or (MIXER.search(kind) and not FEED_FORWARD.search(kind)):
            continue
        experts = _experts(name, module)
        if experts is not None:
            yield experts
            continue
        convolved = _convolved(name, module)
        if convolved is not None:
            yield convolved
            continue
        in_a_row = _is_plain_sequence(module)
        by_class = bool(FEED_FORWARD.search(type(module).__name__)) or in_a_row
        direct = _deep(module) if by_class and not in_a_row else projections(module)
        nested = {
            join(child_name, path): n
            for child_name, child in module.named_children()
            if NESTED.search(child_name) and not isinstance(child, nn.ModuleList | nn.ModuleDict)
            for n, path in projections(child).items()
        }
        for group in (
            {path: n for n, path in direct.items()},
            nested,
        ):  # BERT: intermediate.dense, output.dense, one level down
            # a module of another block that runs here too (a user's sharing) is listed there alone, and makes no block here
            linears = {full: n for path, n in group.items() if (full := join(name, path)) in modules and full not in taken}
            found = [(down, ups) for down, ups in _pairs(modules, linears, by_class) if down not in seen]
            for down, ups in found:
                seen.add(down)
                inner = width(modules[down], 1)
                parts = [Part(up, 0, "n" if width(modules[up], 0) == inner else None) for up in ups]
                scope = _scope(modules, [*ups, down])
                meet = _meet([*ups, down]) or down
                if meet in names:  # LiLT: two blocks in one layer
                    meet = down
                names.add(meet)
                consumer = ("weight", 1) if is_own_linear(modules[down]) else None
                yield FeedForward(meet, inner, down, (*parts, Part(down, 1, "n")), scope, consumer)
            if found:
                break


def _convolved(name: str, module: nn.Module) -> FeedForward | None:
    """A feed-forward block of two convolutions: VITS, SwiftFormer."""
    convs = [(n, c) for n, c in module.named_children() if isinstance(c, nn.Conv1d | nn.Conv2d)]
    if not FEED_FORWARD.search(type(module).__name__) or len(convs) != 2 or any(c.groups != 1 for _, c in convs):
        return None
    (up, first), (down, last) = convs
    if first.out_channels != last.in_channels or first.in_channels != last.out_channels or projections(module):
        return None
    parts = (Part(join(name, up), 0, "n"), Part(join(name, down), 1, "n"))
    return FeedForward(name, last.in_channels, join(name, down), parts, name, ("weight", 1))


def _pairs(modules: dict[str, nn.Module], linears: dict[str, str], by_class: bool) -> Iterator[tuple[str, list[str]]]:
    """(down projection, its up projections) among these, in order; `by_class`: whatever they are called."""
    order, used, downs = list(linears), set[str](), set[str]()
    # what is called like a down projection first; in a chain of layers each is the down projection of the one before
    named = [name for name in order if DOWN.match(linears[name])]
    others = [name for name in order if by_class and name not in named and not UP.match(linears[name])]
    for down in (*named, *others):
        inner, hidden = width(modules[down], 1), width(modules[down], 0)
        ups = [
            up
            for up in order
            if up != down
            and (UP.match(linears[up]) or by_class)
            and (width(modules[up], 1) == hidden or by_class)
            and width(modules[up], 0) in (inner, 2 * inner)
            and (order.index(up) < order.index(down) or (linears[up] in LATE_UP and down in named))
            and up not in used
            and (by_class or up not in downs)
        ]
        beside = [up for up in ups if parent_of(up) == parent_of(down)]
        if beside and not by_class:  # of two blocks in one layer, each has its own
            ups = beside
        if by_class and ups:  # an MLP of several layers: what feeds this one, not what came before
            nearest = width(modules[ups[-1]], 1)
            ups = [up for up in ups if width(modules[up], 1) == nearest]
            if not any(UP.match(linears[up]) for up in ups):
                ups = ups[-1:]
        if ups:
            used |= {*ups}
            downs.add(down)
            yield down, ups


# Experts in one tensor are multiplied by torch's grouped_mm, if a model is set to it (most are), whose rows are whole 16 bytes:
# 8 numbers in half precision, 4 in float32. A checkpoint says neither the dtype nor the kernel that it will run with.
ROW = 8
# (up projections, down projection) of experts whose weights are one tensor
EXPERTS = (
    (("gate_up_proj", "up_proj", "gate_proj"), "down_proj"),
    (("w1", "w3", "v1", "wi", "wi_0", "wi_1"), "w2"),
    (("w1", "w3", "v1", "wi", "wi_0", "wi_1"), "wo"),
)


def _experts(name: str, module: nn.Module) -> FeedForward | None:
    """Experts in three-dimensional parameters (or two, one expert after the other); the same neurons go from each."""
    weights = {key: p for key, p in module._parameters.items() if p is not None}
    for ups, down in EXPERTS:
        ups = tuple(key for key in ups if key in weights)
        if not ups or down not in weights or weights[down].ndim != weights[ups[0]].ndim:
            continue
        out, up = weights[down].shape, weights[ups[0]].shape
        if len(out) == 3:
            standard = up[2] == out[1] and up[1] in (out[2], 2 * out[2])
            if getattr(module, "is_transposed", False) or not standard:  # gpt_oss: (E, I, H) after (E, H, 2I)
                if up[1] != out[2] or up[2] not in (out[1], 2 * out[1]):
                    continue
                inside, dim = 1, 2
            else:
                inside, dim = 2, 1
            size, layout = out[inside], "n"
            of_ups = "n" if up[dim] == size else None
        elif len(out) == 2 and out == up and _integer(module, ("ffn_hidden_size",)):  # DBRX
            size = _integer(module, ("ffn_hidden_size",)) or 0
            if out[0] % size:
                continue
            inside, dim, layout = 0, 0, f"n*{out[0] // size}"
            of_ups = layout
        else:
            continue
        parts = tuple(Part(name, dim, of_ups, key) for key in ups)
        # DBRX hands the weights of one expert after the other to the forward of the module that holds them
        scope = parent_of(name) if len(out) == 2 else name
        multiple = ROW if is_dispatched(module) else 1
        return FeedForward(
            name, size, name, (*parts, Part(name, inside, layout, down)), scope, (down, inside), multiple=multiple
        )
    children = dict(module.named_children())
    if type(module).__name__ == "JetMoeMoA":  # experts of an attention
        return None
    one, two = children.get("input_linear"), children.get("output_linear")
    if one is not None and two is not None:  # Granite: ParallelExperts, each (E, out, in)
        up, out = one._parameters.get("weight"), two._parameters.get("weight")
        if up is not None and out is not None and up.ndim == out.ndim == 3 and up.shape[1] in (out.shape[2], 2 * out.shape[2]):
            first, last = join(name, "input_linear"), join(name, "output_linear")
            of_up = "n" if up.shape[1] == out.shape[2] else None
            parts = (Part(first, 1, of_up, "weight"), Part(last, 2, "n", "weight"))
            return FeedForward(name, out.shape[2], last, parts, name, ("weight", 2))
    return None


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers lets the config choose what multiplies these experts (`use_experts_implementation`)."""
    return hasattr(module, "is_transposed") and hasattr(getattr(module, "config", None), "_experts_implementation")


# --- names -------------------------------------------------------------------------------------------------------


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def projections(module: nn.Module, convolutions: bool = False) -> dict[str, str]:
    """The Linear (or Conv1D) children of a module by name, with their paths in it: also those in a wrapper of one or a list.

    `convolutions`: also convolutions that look at one place (SqueezeBERT).
    """
    found: dict[str, str] = {}
    for name, child in module.named_children():
        if is_projection(child) or (convolutions and is_pointwise(child)):
            found[name] = name
        elif isinstance(child, nn.Sequential) or name == "to_out":
            inner = [(n, c) for n, c in child.named_children() if is_projection(c)]
            if len(inner) == 1:
                found[name] = f"{name}.{inner[0][0]}"
        elif isinstance(getattr(child, "linear", None), nn.Linear):
            beside = [c for n, c in child.named_children() if n != "linear"]
            if all(isinstance(c, nn.modules.batchnorm._BatchNorm) for c in beside):  # LeViT has one after each
                found[name] = f"{name}.linear"
    return found


def is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and tuple(module.kernel_size) == (1,)


def _deep(module: nn.Module, prefix: str = "", depth: int = 0) -> dict[str, str]:
    """All projections inside of a feed-forward block, through lists and small wrappers, by path."""
    found: dict[str, str] = {}
    for name, child in module.named_children():
        path = join(prefix, name)
        if is_projection(child):
            found[path] = path
        elif isinstance(child, nn.ModuleDict) or re.search(r"Expert|DenseAct|Router", type(child).__name__):
            continue  # blocks of their own
        elif depth < 3 and not ATTENTION.search(type(child).__name__):
            inner = _deep(child, path, depth + 1)
            if len(inner) < 2 or not FEED_FORWARD.search(type(child).__name__):  # else a block of its own
                found |= inner
    return found


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
        scope = parent_of(scope)
    return scope


def _integer(owner: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
