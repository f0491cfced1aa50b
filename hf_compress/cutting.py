"""One block, cut: the only code that slices weights. Works on the model as on a copy of a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .candidates import join
from .discover import Attention, FeedForward, Part, owners
from .heads import ConfigView, HeadCount, narrow_, select_heads_
from .later import Later, sliced
from .modules import GATED, LockedLinear, factor, gate_, is_gated, is_own_linear, ungate_, width_attribute

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
    after: tuple[str, ...] = ()  # norms over all heads: what goes in stays whole, and the heads are chosen from what comes out


def variants(block: Block, parts: tuple[Part, ...], norms: tuple[str, ...] = ()) -> list[Variant]:
    """Every guess about how a block's forward takes its sizes, the likeliest first. A proof picks the first that holds."""
    if not isinstance(block, Attention):
        return [Variant(parts, wide=wide) for wide in (False, True)]
    chosen = ((), norms) if norms else ((),)
    views: list[dict[str, bool]] = [{}, {"config": True}, {"divides": True}, {"wide": True}, {"wide": True, "config": True}]
    views += [{"narrow": True}, {"narrow": True, "divides": True}]
    return [Variant(parts, after=after, **view) for view in views for after in chosen]


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
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and key == "weight":
                for statistic in ("running_mean", "running_var"):
                    _keep_buffer(module, statistic, rows, entry, undo)
            for attribute in size_attributes(module, key, dim):
                if getattr(module, attribute) != len(rows):
                    _set(module, attribute, len(rows), entry, undo)
    _select_arguments(get, cut, variant, record, undo)
    owner = get(block.name)
    entry = record.setdefault(block.name, {})
    named = [size for size in _sizes(cut) if not (variant.narrow and size[0] in INNER)]
    for name, old, new in named:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value == old and old != new:
            _set(owner, name, new, entry, undo)
            full = (value.width, value.head_dim) if isinstance(value, HeadCount) else (old * _dim(block), _dim(block))
            if isinstance(value, HeadCount) or (variant.divides and name in HEADS):
                owner.__dict__[name] = HeadCount(new, *full)
                entry.setdefault("divides", {})[name] = list(full)
    if variant.narrow and isinstance(block, Attention):
        _narrow(owner, block.size * block.head_dim, len(cut.kept) * block.head_dim, entry, undo)
    if variant.wide:
        if isinstance(block, Attention):  # the width of all keys
            sizes[block.num_key_value_heads * block.head_dim] = len(cut.kept_kv) * block.head_dim
        _set_wide(get, cut, variant, {**sizes, **{old: new for _, old, new in reversed(named)}}, record, undo)
    if isinstance(block, Attention):
        _adapt(owner, block, cut, variant, entry, undo)
    return {name: entry for name, entry in record.items() if entry}


def _dim(block: Block) -> int:
    return block.head_dim if isinstance(block, Attention) else 1


def size_attributes(module: nn.Module, key: str, dim: int) -> tuple[str, ...]:
    """The attributes of a module that say how large this dimension of this parameter is."""
    if isinstance(module, nn.Linear | Conv1D) and key in ("weight", "weight_in"):
        return (width_attribute(module, 1 - dim if isinstance(module, Conv1D) else dim),)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ("num_features",)
    if isinstance(module, nn.Embedding):
        return (("num_embeddings", "embedding_dim")[dim],)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and dim == 0:
        depthwise = module.weight.shape[1] == 1 and module.groups == module.out_channels
        return ("out_channels", "in_channels", "groups") if depthwise else ("out_channels",)
    return ()


# what an attribute of a module never is: a size that heads or neurons change
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
            if type(value) is int and name not in _OTHER and not name.startswith("_") and sizes.get(value, value) != value:
                if path != owner and "head" not in name:
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
    before, config = getattr(module, "hfc_heads", None), getattr(module, "config", None)
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
        for kept, was in hooks:
            kept.clear()
            kept.update(was)
        if before is None:
            del module.hfc_heads
        else:
            module.hfc_heads = before

    undo.append(restore)
    if how == "output" and before is not None:  # what an earlier cut left out stays out
        chosen = [row for row in chosen if row in set(before)]  # type: ignore[arg-type]
    select_heads_(module, how, chosen, arguments)
    entry["heads"] = {"how": how, "keep": chosen, **({} if arguments is None else {"arguments": arguments})}


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
    kept = sliced(old, rows, dim) if waits is None else waits.put_off(module, name, old, rows, dim)
    new = nn.Parameter(kept, requires_grad=old.requires_grad)
    undo.append(lambda: module._parameters.__setitem__(name, old))
    module._parameters[name] = new
    entry.setdefault("shapes", {})[name] = list(new.shape)


def _keep_buffer(module: nn.Module, name: str, rows: torch.Tensor, entry: dict, undo: Undo) -> None:
    old = module._buffers.get(name)
    if old is None:
        return
    undo.append(lambda: module._buffers.__setitem__(name, old))
    module._buffers[name] = old.detach().index_select(0, rows.to(old.device)).contiguous()
    entry.setdefault("shapes", {})[name] = list(module._buffers[name].shape)  # type: ignore[union-attr]


def _set(module: nn.Module, name: str, value: int, entry: dict, undo: Undo) -> None:
    old = getattr(module, name)
    undo.append(lambda: setattr(module, name, old))
    setattr(module, name, value)
    entry.setdefault("attributes", {})[name] = value


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a projection is what it seems, and not a quantized or adapted subclass."""
    return type(module) in GATED or type(module) in GATED.values() or type(module) is LockedLinear or is_own_linear(module)
