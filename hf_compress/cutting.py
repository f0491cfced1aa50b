"""One block, cut: the only code that slices weights. Works on the model as on a copy of a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from .discover import Attention, FeedForward, Part, owners
from .modules import GATED, ConfigView, LockedLinear, factor, gate_, is_gated, select_heads_, ungate_, width_attribute

Block = Attention | FeedForward
Undo = list[Callable[[], None]]

# module attributes that say how many heads there are: they follow if they hold the old value
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
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

    def rows(self, part: Part, variant: Variant) -> torch.Tensor:
        layout = variant.layouts.get(part.module, part.layouts[0])
        return torch.isin(owners(layout, self.block), self.units).nonzero().flatten()

    def gate(self) -> torch.Tensor:
        """0 and 1 over the inputs of the block's output projection: what a mask multiplies."""
        return torch.isin(owners(self.block.parts[_out(self.block)].layouts[0], self.block), self.units).float()


@dataclass(frozen=True)
class Variant:
    """A guess about what names cannot tell: the layout of fused projections, and whether sizes are read from a config."""

    layouts: dict[str, str]
    config: bool = False


def _out(block: Block) -> int:
    return next(i for i, part in enumerate(block.parts) if part.module == block.out)


def variants(block: Block) -> list[Variant]:
    """Every guess about a block, the likeliest first. A proof picks the first one that holds."""
    open_parts = [part for part in block.parts if len(part.layouts) > 1]
    layouts = [dict(zip([p.module for p in open_parts], c, strict=True)) for c in product(*(p.layouts for p in open_parts))]
    views = (False, True) if isinstance(block, Attention) else (False,)
    return [Variant(layout, config) for layout in layouts for config in views]


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
    for part in block.parts:
        module, rows = get(part.module), cut.rows(part, variant)
        entry = record.setdefault(part.module, {})
        if part.parameter is not None:
            _keep(module, part.parameter, rows, part.dim, entry, undo)
            if isinstance(module, nn.Embedding) and part.dim == 1:  # UMT5's bias, one column a head
                _set(module, "embedding_dim", len(rows), entry, undo)
            continue
        _ungate(module, undo)  # a mask on the same columns has done its work
        name, dim = factor(module, part.dim)
        _keep(module, name, rows, dim, entry, undo)
        if part.dim == 0 and module.bias is not None:
            _keep(module, "bias", rows, 0, entry, undo)
        _set(module, width_attribute(module, part.dim), len(rows), entry, undo)
    owner = get(block.name)
    entry = record.setdefault(block.name, {})
    for name, old, new in _sizes(cut):
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value == old and old != new:
            _set(owner, name, new, entry, undo)
    if isinstance(block, Attention):
        _adapt(owner, block, cut, variant, entry, undo)
    return {name: entry for name, entry in record.items() if entry}


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
        hooks = dict(owner._forward_pre_hooks), dict(owner._forward_pre_hooks_with_kwargs)

        def restore() -> None:
            if config is not None:
                owner.config = config  # type: ignore[assignment]
            owner._forward_pre_hooks.clear()
            owner._forward_pre_hooks.update(hooks[0])
            owner._forward_pre_hooks_with_kwargs.clear()
            owner._forward_pre_hooks_with_kwargs.update(hooks[1])
            if before is None:
                del owner.hfc_heads
            else:
                owner.hfc_heads = before

        undo.append(restore)
        select_heads_(owner, block.shared_bias, chosen)
        entry["heads"] = {"how": block.shared_bias, "keep": chosen}


def _ungate(module: nn.Module, undo: Undo) -> None:
    if is_gated(module):
        before = gate_(module).clone()

        def restore() -> None:
            gate_(module).copy_(before)

        undo.append(restore)
        ungate_(module)


def _keep(module: nn.Module, name: str, rows: torch.Tensor, dim: int, entry: dict, undo: Undo) -> None:
    old = module._parameters[name]
    assert old is not None
    kept = old.detach().index_select(dim, rows.to(old.device)).contiguous()
    new = nn.Parameter(kept, requires_grad=old.requires_grad)
    undo.append(lambda: module._parameters.__setitem__(name, old))
    module._parameters[name] = new
    entry.setdefault("shapes", {})[name] = list(new.shape)


def _set(module: nn.Module, name: str, value: int, entry: dict, undo: Undo) -> None:
    old = getattr(module, name)
    undo.append(lambda: setattr(module, name, old))
    setattr(module, name, value)
    entry.setdefault("attributes", {})[name] = value


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a projection is what it seems, and not a quantized or adapted subclass."""
    return type(module) in GATED or type(module) in GATED.values() or type(module) is LockedLinear
