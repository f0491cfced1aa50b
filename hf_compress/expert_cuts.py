"""One mixture, cut to the experts that stay. Works on the model as on a copy of a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .cutting import Undo, _keep, _set
from .heads import ConfigView
from .mixtures import COUNTS, GROUPS, Mixture, experts_of

Get = Callable[[str], nn.Module]


@dataclass(frozen=True)
class Coupling:
    """What goes when experts go: per tensor the dimension along which it follows them, and the rows that stay."""

    rows: tuple[tuple[str, str, int, torch.Tensor], ...]  # (module, parameter or buffer, dimension, indices)
    config: bool = False  # forward reads the number of experts from the config


def cut_mixture_(
    get: Get, mixture: Mixture, kept: tuple[int, ...], coupling: Coupling, undo: Undo
) -> tuple[dict[str, dict[str, Any]], dict[str, str | None]]:
    """Slice one mixture to the experts that stay, in place. `get` finds a module by its path in the model, or on a copy."""
    record: dict[str, dict[str, Any]] = {}
    moved: dict[str, str | None] = {}
    for path, key, dim, rows in coupling.rows:
        module, entry = get(path), record.setdefault(path, {})
        if key in module._buffers:
            old = module._buffers[key]
            assert old is not None
            undo.append(partial(module._buffers.__setitem__, key, old))
            module._buffers[key] = old.index_select(dim, rows.to(old.device)).contiguous()
            entry.setdefault("shapes", {})[key] = list(module._buffers[key].shape)  # type: ignore[union-attr]
        else:
            _keep(module, key, rows, dim, entry, undo)
        if type(getattr(module, "out_features", None)) is int and key == "weight":
            _set(module, "out_features", len(rows), entry, undo)
    if mixture.children is not None:
        experts = get(mixture.children)
        before = dict(experts._modules)
        names = list(experts_of(experts))
        undo.append(partial(_replace, experts, before))
        others = {name: child for name, child in before.items() if name not in names}
        _replace(experts, {**{names[new]: before[names[old]] for new, old in enumerate(kept)}, **others})
        record.setdefault(mixture.children, {})["children"] = len(kept)
        for old, name in enumerate(names):
            new = names[kept.index(old)] if old in kept else None
            if new != name:
                moved[f"{mixture.children}.{name}"] = None if new is None else f"{mixture.children}.{new}"
    groups = mixture.groups_kept(kept)
    sizes = [(name, mixture.num_experts, len(kept)) for name in COUNTS]
    sizes += [(name, mixture.groups, groups) for name in GROUPS if groups != mixture.groups]
    for local, module in get(mixture.name).named_modules():
        path = ".".join(part for part in (mixture.name, local) if part)
        if mixture.children is not None and path.startswith(f"{mixture.children}."):
            continue
        entry = record.setdefault(path, {})
        for name, old, new in sizes:
            if type(vars(module).get(name)) is int and vars(module)[name] == old:
                _set(module, name, new, entry, undo)
        config: Any = vars(module).get("config")
        if coupling.config and config is not None:
            values = {name: new for name, old, new in sizes if getattr(config, name, None) == old}
            if values:
                undo.append(partial(setattr, module, "config", config))
                module.config = ConfigView(config, **values)  # type: ignore[assignment]
                entry["config"] = values
    return {name: entry for name, entry in record.items() if entry}, moved


def _replace(experts: nn.Module, children: dict[str, Any]) -> None:
    experts._modules.clear()
    experts._modules.update(children)
