"""One block, cut: the only code that slices weights. Works on the model as on a copy of a part of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .candidates import join, parent_of
from .checks import CompressionError, spans_of
from .discover import Attention, FeedForward, Part, owners
from .heads import ConfigView, HeadCount, narrow_, select_heads_
from .later import Later, sliced
from .modules import (
    GATED,
    GatedParameter,
    LockedLinear,
    factor,
    gate_,
    is_gated,
    is_own_linear,
    is_projection,
    plain_kind,
    ungate_,
    width_attribute,
)

Block = Attention | FeedForward
Undo = list[Callable[[], None]]

# what a module calls its place in the stack
INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
# module attributes that say how many heads there are: they follow if they hold the old value
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
GROUPS = ("num_key_value_groups", "n_rep")
INNER = ("all_head_size", "inner_dim", "split_size", "embed_dim")
NEURONS = ("intermediate_size", "inner_dim")


@dataclass(frozen=True)
class Cut:
    """One block and the units that stay: query heads (`kept`) with their kv heads (`kept_kv`), or neurons."""

    block: Block
    kept: tuple[int, ...]
    kept_kv: tuple[int, ...] = ()

    @property
    def units(self) -> torch.Tensor:
        """The owners (see `discover.owners`) that stay."""
        offset = self.block.num_heads if isinstance(self.block, Attention) else 0
        return torch.tensor([*self.kept, *(offset + g for g in self.kept_kv)])

    def rows(self, part: Part) -> torch.Tensor:
        """The indices along a part's dimension that stay."""
        owner = owners(part.layout, self.block) if part.owner is None else part.owner  # type: ignore[arg-type]
        return (torch.isin(owner, self.units) | (owner < 0)).nonzero().flatten()

    def gate(self) -> torch.Tensor:
        """0 and 1 over the inputs of the block's output projection: what a mask multiplies."""
        return torch.isin(unit_columns(self.block), self.units).float()


def unit_columns(block: Block) -> torch.Tensor:
    """The head or neuron of each input column of a block's output projection."""
    part = next(part for part in reversed(block.parts) if part.module == block.out)  # experts have others in the same module
    return owners(part.layout, block)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Variant:
    """What was found, or is guessed, about a block: which rows belong to its units, and where its forward reads sizes."""

    parts: tuple[Part, ...]
    config: bool = False  # from a config
    wide: bool = False  # from attributes whose names say nothing
    divides: bool = False  # from the width of what comes in, divided by the number of heads
    narrow: bool = False  # from a width that it names
    spread: bool = False  # nowhere: its projections alone are cut, and it computes with zeros for what is gone
    after: tuple[str, ...] = ()  # norms over all heads: what goes in stays whole, and the heads are chosen from what comes out


def variants(block: Block, parts: tuple[Part, ...], norms: tuple[str, ...] = ()) -> list[Variant]:
    """Every guess about how a block's forward takes its sizes, the likeliest first. A proof picks the first that holds."""
    if not isinstance(block, Attention):
        return [Variant(parts), Variant(parts, wide=True), Variant(parts, spread=True)]
    chosen = ((), norms) if norms else ((),)
    views: list[dict[str, bool]] = [{}, {"config": True}, {"divides": True}, {"wide": True}, {"wide": True, "config": True}]
    views += [{"narrow": True}, {"narrow": True, "divides": True}]
    return [Variant(parts, after=after, **view) for view in views for after in chosen] + [Variant(parts, spread=True)]


def cut_(get: Callable[[str], nn.Module], cut: Cut, variant: Variant, undo: Undo | None = None) -> dict[str, dict[str, Any]]:
    """Slice one block to what stays, in place, and say what was changed, by module.

    Args:
        get: finds a module by its path in the model; on a copy it looks there.
        cut: what stays.
        variant: the guess that was proved.
        undo: gets one function per change that puts it back.

    Returns:
        `{module: {"shapes": {parameter: shape}, "attributes": {name: value}, "config": {...}, "heads": [...], ...}}`.
    """
    undo = [] if undo is None else undo
    block, record = cut.block, {}
    _ungate(get(block.out), block, undo)  # a mask on the same columns has done its work
    if variant.spread:
        return _spread(get, cut, variant, undo)
    sizes: dict[int, int] = {}  # what a dimension had and has, for attributes that say it
    for part in variant.parts:
        module, rows = get(part.module), cut.rows(part)
        entry = record.setdefault(part.module, {})
        if part.argument is not None:
            continue
        if part.module in variant.after:
            _select(module, "output", rows.tolist(), entry, undo)
            continue
        if part.parameter is None:  # a Linear, by its names
            name, dim = factor(module, part.dim)
            keys = ((name, dim), ("bias", 0)) if part.dim == 0 else ((name, dim),)
        else:
            keys = ((part.parameter, part.dim),)
        for key, dim in keys:
            tensor = module._parameters.get(key)
            if tensor is None:
                continue
            sizes.setdefault(tensor.shape[dim], len(rows))
            _keep(module, key, rows, dim, entry, undo)
            for statistic, of in _followers(module, key, dim):
                _keep_buffer(module, statistic, rows, of, entry, undo)
            if isinstance(module, nn.Conv1d) and dim == 0 and key == "weight":
                _regroup(module, rows, entry, undo)
            for attribute in size_attributes(module, key, dim):
                if getattr(module, attribute) != len(rows):
                    _set(module, attribute, len(rows), entry, undo)
    _select_arguments(get, cut, variant, record, undo)
    owner = get(block.name)
    _forget(owner, undo)
    entry = record.setdefault(block.name, {})
    how = block.shared_bias if isinstance(block, Attention) else None
    named = [size for size in _sizes(cut) if how != "function" and not (variant.narrow and size[0] in INNER)]
    for name, old, new in named:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value == old and old != new:
            _set(owner, name, new, entry, undo)
            full = (value.width, value.head_dim) if isinstance(value, HeadCount) else (old * _dim(block), _dim(block))
            if isinstance(value, HeadCount) or (variant.divides and name in HEADS):
                owner.__dict__[name] = HeadCount(new, *full)
                entry.setdefault("divides", {})[name] = list(full)
    holder = get(parent_of(block.out)) if block.consumer is not None else owner
    inner = block.size * _dim(block)
    if holder is not owner and getattr(holder, "hidden_size", None) == inner:  # JetMoE: experts with an output projection each
        _set(holder, "hidden_size", len(cut.kept) * _dim(block), record.setdefault(parent_of(block.out), {}), undo)
    if variant.narrow and isinstance(block, Attention):
        _narrow(owner, block.size * block.head_dim, len(cut.kept) * block.head_dim, entry, undo)
    if variant.wide:
        if isinstance(block, Attention):  # the width of all keys
            sizes[block.num_key_value_heads * block.head_dim] = len(cut.kept_kv) * block.head_dim
        _set_wide(get, cut, variant, {**sizes, **{old: new for _, old, new in reversed(named)}}, record, undo)
    if isinstance(block, Attention):
        _adapt(owner, block, cut, variant, entry, undo)
    return {name: entry for name, entry in record.items() if entry}


def _spread(get: Callable[[str], nn.Module], cut: Cut, variant: Variant, undo: Undo) -> dict[str, dict[str, Any]]:
    """Cut the projections around a computation that stays as wide as it is: zeros stand for what is gone.

    That changes nothing: what belongs to a unit alone does not reach the output once the unit is hidden.
    """
    record: dict[str, dict[str, Any]] = {}
    out = get(cut.block.out)
    if not isinstance(out, nn.Linear | Conv1D):
        raise CompressionError(f"{cut.block.out!r} is no projection whose inputs could be chosen.")
    for part in variant.parts:
        module = get(part.module)
        if part.argument is not None or not isinstance(module, nn.Linear | Conv1D):
            continue
        for dim, how in ((0, "spread"), (1, "input")):
            if (part.parameter, part.dim) != factor(module, dim) or (module is out) != (how == "input"):
                continue
            before, rows = getattr(module, "hfc_heads", None), cut.rows(part)
            rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)  # one, that of nobody: a module without any is none
            weight = module._parameters[factor(module, dim)[0]]
            assert weight is not None
            if len(rows) == weight.shape[part.dim]:
                continue
            full = weight.shape[part.dim] if before is None else module.hfc_arguments[0][2]  # type: ignore[index,union-attr]
            entry = record.setdefault(part.module, {})
            name = factor(module, dim)[0]
            for key, along in ((name, part.dim), ("bias", 0)) if how == "spread" else ((name, part.dim),):
                if module._parameters.get(key) is not None:
                    _keep(module, key, rows, along, entry, undo)
            _set(module, width_attribute(module, dim), len(rows), entry, undo)
            chosen = rows.tolist() if before is None else [before[row] for row in rows.tolist()]  # type: ignore[index]
            _select(module, how, chosen, entry, undo, [[how, 0, full]])
    return record


def _forget(module: Any, undo: Undo) -> None:
    """What an attention remembers of its position bias (LeViT) is of all heads."""
    before = module.__dict__.get("attention_bias_cache")
    if before:
        undo.append(lambda: setattr(module, "attention_bias_cache", before))
        module.attention_bias_cache = {}


def _dim(block: Block) -> int:
    return block.head_dim if isinstance(block, Attention) else 1


def size_attributes(module: nn.Module, key: str, dim: int) -> tuple[str, ...]:
    """The attributes of a module that say how large this dimension of this parameter is."""
    if is_projection(module) and key in ("weight", "weight_in"):
        return (width_attribute(module, 1 - dim if isinstance(module, Conv1D) else dim),)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ("num_features",)
    if isinstance(module, nn.Embedding):
        return (("num_embeddings", "embedding_dim")[dim],)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and dim == 1 and module.groups == 1:
        return ("in_channels",)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and dim == 0:
        depthwise = module.weight.shape[1] == 1 and module.groups == module.out_channels
        return ("out_channels", "in_channels", "groups") if depthwise else ("out_channels",)
    return ()


# what an attribute of a module never is: a size that heads or neurons change
_NEVER = re.compile("len_|resolution|stride|window|kernel|patch|position|index|vocab")
_OTHER = {*INDEX, "head_dim", "head_size", "training", "padding_idx", "attention_head_size"}


def _set_wide(
    get: Callable[[str], nn.Module], cut: Cut, variant: Variant, sizes: dict[int, int], record: dict, undo: Undo
) -> None:
    """Let every whole number that a module of the block holds, and that was one of its sizes, follow. A guess; it is proved."""
    owner = cut.block.name
    paths = [join(owner, name) for name, _ in get(owner).named_modules()]
    paths += [path for part in variant.parts for path in (part.module, part.module.rpartition(".")[0])]
    for path in dict.fromkeys(paths):
        module = get(path)
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for name, value in list(vars(module).items()):
            if _NEVER.search(name):
                continue
            if type(value) is int and name not in _OTHER and not name.startswith("_") and sizes.get(value, value) != value:
                if path != owner and "head" not in name and name != "ffn_hidden_size":
                    continue  # what computes positions, say, makes its tables from its own sizes when the model is loaded
                if name not in record.get(path, {}).get("attributes", {}):
                    _set(module, name, sizes[value], record.setdefault(path, {}), undo)


def _sizes(cut: Cut) -> list[tuple[str, int, int]]:
    """(attribute, old value, new value)."""
    block = cut.block
    if isinstance(block, FeedForward):
        return [(name, block.size, len(cut.kept)) for name in NEURONS]
    heads, kv_heads = len(cut.kept), len(cut.kept_kv)
    inner = (block.num_heads * block.head_dim, heads * block.head_dim)
    sizes = [(name, block.num_key_value_heads, kv_heads) for name in KV_HEADS]
    sizes += [(name, block.groups, heads // kv_heads) for name in GROUPS]
    sizes += [(name, *inner) for name in INNER]
    if block.shared_bias != "interface":  # T5 builds its bias, of which each layer selects, from n_heads
        sizes += [(name, block.num_heads, heads) for name in HEADS]
    return sizes


def _adapt(owner: nn.Module, block: Attention, cut: Cut, variant: Variant, entry: dict, undo: Undo) -> None:
    """What only some families need: sizes that forward reads from the config, and a bias shared among layers."""
    config = getattr(owner, "config", None)
    if variant.config and config is not None:
        values = {}
        for name, old, new in [
            *((name, block.num_key_value_heads, len(cut.kept_kv)) for name in KV_HEADS),
            *((name, block.num_heads, len(cut.kept)) for name in HEADS),
        ]:
            if getattr(config, name, None) == old:
                values[name] = new
        if values:
            undo.append(lambda: setattr(owner, "config", config))
            owner.config = ConfigView(config, **values)  # type: ignore[assignment]
            entry["config"] = values
    if block.shared_bias:
        before = getattr(owner, "hfc_heads", None)
        chosen = list(cut.kept) if before is None else [before[h] for h in cut.kept]  # type: ignore[index]
        _select(owner, block.shared_bias, chosen, entry, undo)


def _select_arguments(get: Callable[[str], nn.Module], cut: Cut, variant: Variant, record: dict, undo: Undo) -> None:
    """What is computed outside, once for all heads, and arrives as arguments: each attention takes what its heads need."""
    given = [part for part in variant.parts if part.argument is not None]
    if not given:
        return
    module: Any = get(given[0].module)
    before = getattr(module, "hfc_heads", None)
    arguments = [[part.argument, part.dim, cut.block.size] for part in given] if before is None else module.hfc_arguments
    chosen = list(cut.kept) if before is None else [before[h] for h in cut.kept]
    _select(module, "argument", chosen, record.setdefault(given[0].module, {}), undo, arguments)


def _select(
    module: nn.Module,
    how: str,
    chosen: list[int],
    entry: dict,
    undo: Undo,
    arguments: list[Any] | None = None,
) -> None:
    """Let a module use, or give, only what belongs to the heads that stay (`heads.select_heads_`)."""
    before, config, kind = getattr(module, "hfc_heads", None), getattr(module, "config", None), type(module)
    named = getattr(module, "hfc_arguments", None)
    hooks: list[tuple[Any, dict[Any, Any]]] = [
        (kept, dict(kept))
        for kept in (
            module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs,
            module._forward_hooks, module._forward_hooks_with_kwargs,
        )
    ]  # fmt: skip

    def restore() -> None:
        if config is not None:
            module.config = config
        module.__class__ = kind
        for kept, was in hooks:
            kept.clear()
            kept.update(was)
        for attribute, value in (("hfc_heads", before), ("hfc_arguments", named)):
            module.__dict__.pop(attribute, None)
            if value is not None:
                setattr(module, attribute, value)

    undo.append(restore)
    if how == "output" and before is not None:  # what an earlier cut left out stays out
        chosen = [row for row in chosen if row in set(before)]  # type: ignore[arg-type]
    select_heads_(module, how, chosen, arguments)
    kept = spans_of(tuple(chosen)) if how in ("spread", "input") else chosen  # columns, many
    entry["heads"] = {"how": how, "keep": kept, **({} if arguments is None else {"arguments": arguments})}


def _narrow(module: Any, old: int, new: int, entry: dict, undo: Undo) -> None:
    kind, before = type(module), module.__dict__.get("hfc_width")

    def restore() -> None:
        module.__class__ = kind
        if before is None:
            module.__dict__.pop("hfc_width", None)
        else:
            module.__dict__["hfc_width"] = before

    undo.append(restore)
    full = old if before is None else before[0]
    narrow_(module, full, new)
    entry["narrow"] = [full, new]


def _ungate(module: nn.Module, block: Block, undo: Undo) -> None:
    if is_gated(module):
        before = gate_(module).clone()

        def restore() -> None:
            gate_(module, consumer=block.consumer).copy_(before)

        undo.append(restore)
        ungate_(module)


def _keep(module: nn.Module, name: str, rows: torch.Tensor, dim: int, entry: dict, undo: Undo) -> None:
    old = module._parameters[name]
    assert old is not None
    waits = undo if isinstance(undo, Later) and undo.waits else None
    whole = old

    def make() -> nn.Parameter:
        kept = sliced(whole, rows, dim) if waits is None else waits.put_off(module, name, whole, rows, dim)
        return nn.Parameter(kept, requires_grad=whole.requires_grad)

    new = undo.same(old, rows, dim, make) if isinstance(undo, Later) and waits is None else make()
    undo.append(lambda: module._parameters.__setitem__(name, old))
    module._parameters[name] = new
    entry.setdefault("shapes", {})[name] = list(new.shape)


def _followers(module: nn.Module, key: str, dim: int) -> list[tuple[str, int]]:
    """Buffers that go with a dimension of a parameter, which no gradient reaches: (name, dimension)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and key == "weight":
        return [("running_mean", 0), ("running_var", 0)]
    if f"{key}_integer" in module._buffers:  # I-BERT: what its weights are rounded to, and the scale of each row
        return [(f"{key}_integer", dim)] + ([("fc_scaling_factor", 0)] if (key, dim) == ("weight", 0) else [])
    return []


def _regroup(module: nn.Conv1d, rows: torch.Tensor, entry: dict, undo: Undo) -> None:
    """A convolution in groups that loses outputs: as many groups as outputs need, each with the inputs that it had."""
    if module.groups == 1 or module.groups == module.out_channels:
        return
    each, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    counts = torch.bincount(rows // each, minlength=module.groups).tolist()
    size = math.gcd(*counts)
    groups = [group for group, count in enumerate(counts) for _ in range(count // size)]
    if groups != list(range(module.groups)):
        before, full = getattr(module, "hfc_heads", None), getattr(module, "hfc_arguments", [["", 1, module.in_channels]])[0][2]  # type: ignore
        chosen = [group * inputs + i for group in groups for i in range(inputs)]
        chosen = chosen if before is None else [before[i] for i in chosen]  # type: ignore[index]
        _select(module, "input", chosen, entry, undo, [["input", 1, full]])
        _set(module, "in_channels", len(chosen), entry, undo)
        _set(module, "groups", len(groups), entry, undo)


def _keep_buffer(module: nn.Module, name: str, rows: torch.Tensor, dim: int, entry: dict, undo: Undo) -> None:
    old = module._buffers.get(name)
    if old is None:
        return
    undo.append(lambda: module._buffers.__setitem__(name, old))
    module._buffers[name] = old.detach().index_select(dim, rows.to(old.device)).contiguous()
    entry.setdefault("shapes", {})[name] = list(module._buffers[name].shape)  # type: ignore[union-attr]


def _set(module: nn.Module, name: str, value: int, entry: dict, undo: Undo) -> None:
    old = getattr(module, name)
    undo.append(lambda: setattr(module, name, old))
    setattr(module, name, value)
    entry.setdefault("attributes", {})[name] = value


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a projection is what it seems, and not a quantized or adapted subclass."""
    kind = plain_kind(module) if isinstance(module, GatedParameter) else type(module)
    return kind in GATED or kind in GATED.values() or kind is LockedLinear or is_own_linear(module)
