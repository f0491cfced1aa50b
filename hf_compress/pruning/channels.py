"""Which channels to keep: by the weights that go with each, by what a gate on each would do, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..channel_labels import Labels
from ..channels import SEPARABLES, ChannelGroup, groups_of, trace_channels
from ..edits import CompressionError, KeepChannels
from ..modules import can_gate
from ..probe import probing
from .measured import Gated, LossFn, activations, derivatives
from .scores import PLANNED, SCORES
from .select import select, warn_if_off


def plan_channels(
    model: nn.Module,
    fraction: float,
    *,
    score: str = "magnitude",
    scope: str = "global",
    uniform: bool = False,
    round_to: int = 1,
    seed: int = 0,
    inputs: Mapping[str, Any] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    loss_fn: LossFn | None = None,
) -> list[KeepChannels]:
    """The channels that stay when a fraction of all that can go does, the lowest scores first.

    Magnitude is that of `scores.magnitude`, `sqrt(sum of w^2)`, over all weights that would be cut with a channel: rows of
    what writes it, columns of what reads it (Li et al. 2017, for whole streams). For `taylor`, `gradient` and `activation` a
    channel has a gate where a mask has one (`channels.Removal.gates`), over the inputs of everything that sums over it, and
    what they say is added up (of activations: averaged). Sets of channels of which some cannot go are left alone. Under a
    convolution in groups, as many stay in each group.

    Raises:
        CompressionError: `"fisher"` (a stream has many readers, so there is no one layer to arrange and to scale), no batches
            for a score that needs them, or no channel can go.
    """
    how = SCORES[score]
    if how.arrange is not None:
        known = ", ".join(name for name in PLANNED if SCORES[name].arrange is None)
        raise CompressionError(
            f"Channels are scored by {known}, not by {score!r}. Plan heads and neurons by {score!r} and channels by 'taylor', "
            "and add the plans up."
        )
    if how.needs in ("gradient", "activation") and batches is None:
        raise CompressionError(f"score={score!r} is measured on data: pass batches, or use 'magnitude' or 'random'.")
    with probing(model, inputs) as run:
        labels = trace_channels(model, run)
    squares = _squares(model, labels) if how.needs == "weight" else None
    numbers: dict[str, int] = {}
    scores: dict[str, torch.Tensor] = {}
    units: dict[str, np.ndarray] = {}  # the roots of a set, each once
    rows: dict[str, np.ndarray] = {}
    cells: dict[str, np.ndarray] = {}
    for number, group in enumerate(groups_of(model, labels)):
        roots = labels.find(group.rows)
        found, first = np.unique(roots, return_index=True)
        found = found[np.argsort(first)]
        cell = _cells(labels, found)
        if not _can_go(group, found, cell) or any(np.isin(found, other).any() for other in units.values()):
            continue
        units[group.name], rows[group.name], cells[group.name], numbers[group.name] = found, roots, cell, number
    if not units:
        raise CompressionError(f"{type(model).__name__} has no channels that can be cut; see channel_groups(model).")
    measured = _measured(model, labels, units, batches, score, loss_fn) if how.needs in ("gradient", "activation") else {}
    for name, found in units.items():
        if how.needs == "seed":
            values = how.reduce(len(found), seed=seed * 100_003 + numbers[name])
        else:
            values = how.reduce(measured[name] if squares is None else squares[torch.from_numpy(found)])
        if not bool(torch.isfinite(values).all()):
            raise CompressionError(f"The scores of {name!r} are not finite; the weights or the batches hold NaN or infinity.")
        scores[name] = how.per_layer(values)
    kept = select(scores, fraction, scope=scope, uniform=uniform, round_to=round_to)
    for name, chosen in kept.items():
        kept[name] = _as_many_in_each(scores[name], cells[name], len(chosen)) if cells[name].max() else chosen
    warn_if_off("channels", fraction, kept, {name: len(s) for name, s in scores.items()})
    return [
        KeepChannels(name, tuple(np.flatnonzero(np.isin(rows[name], units[name][kept[name]])).tolist()))
        for name in scores
        if len(kept[name]) < len(units[name])
    ]


def _measured(
    model: nn.Module,
    labels: Labels,
    units: Mapping[str, np.ndarray],
    batches: Any,
    score: str,
    loss_fn: LossFn | None,
) -> dict[str, torch.Tensor]:
    """What gates on the channels of each set say: `measured.derivatives` or `measured.activations`, (..., units)."""
    place = {root: i for i, root in enumerate(np.concatenate(list(units.values())).tolist())}
    gates = []
    for block in labels.reads.values():
        module: Any = model.get_submodule(block.module)
        reads = np.arange(block.start, block.start + block.size)
        if isinstance(module, SEPARABLES):  # what it sums over are kernels of its own, several an input
            reads = labels.range_of(block.module, "weight_depth", 0)[:: module.multiplier]  # type: ignore[index]
        owner = torch.tensor([place.get(root, -1) for root in labels.find(reads).tolist()])
        if bool((owner >= 0).any()):
            if not can_gate(module):
                raise CompressionError(
                    f"{block.module!r} ({type(module).__name__}) reads channels and is no plain convolution or Linear, so "
                    f"score={score!r} cannot be seen there. Use 'magnitude' or 'random'."
                )
            gates.append(Gated(block.module, owner, len(place), "channels", 1 if isinstance(module, _ConvNd) else -1))
    found = derivatives(model, gates, batches, loss_fn, score) if SCORES[score].needs == "gradient" else None
    found = activations(model, gates, batches) if found is None else found
    parts = found["channels"].split([len(roots) for roots in units.values()], dim=-1)
    return dict(zip(units, parts, strict=True))


def _can_go(group: ChannelGroup, units: np.ndarray, cell: np.ndarray) -> bool:
    sizes = np.bincount(cell)
    return not group.fixed and len(units) > 1 and len(set(sizes.tolist())) == 1 and int(sizes[0]) > 1


def _cells(labels: Labels, units: np.ndarray) -> np.ndarray:
    """Which group of the convolutions in groups each channel lies in: every cell must keep as many."""
    keys = [() for _ in units]
    for conv in labels.grouped:
        for side in (conv.inputs, conv.outputs):
            sides = labels.find(side).reshape(conv.groups, -1)
            place = {root: i for i, part in enumerate(sides.tolist()) for root in part}
            if any(unit in place for unit in units.tolist()):
                keys = [(*key, place.get(unit, -1)) for key, unit in zip(keys, units.tolist(), strict=True)]
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys])


def _as_many_in_each(scores: torch.Tensor, cell: np.ndarray, count: int) -> list[int]:
    parts = int(cell.max()) + 1
    each = max(1, round(count / parts))
    kept: list[int] = []
    for part in range(parts):
        own = torch.from_numpy(np.flatnonzero(cell == part))
        kept += own[scores[own].argsort(descending=True, stable=True)[:each]].tolist()
    return sorted(kept)


def _squares(model: nn.Module, labels: Labels) -> torch.Tensor:
    """Sum of the squares of all weights (of two dimensions or more) that belong to each label's channel, by root."""
    total = np.zeros(labels.count)
    for block in labels.blocks:
        module: Any = model.get_submodule(block.module)
        roots = labels.find(np.arange(block.start, block.start + block.size))
        if block.key == "":  # the inputs of a convolution in groups
            weight = module.weight.detach().double().cpu()
            values = weight.view(module.groups, -1, *weight.shape[1:]).flatten(3).square().sum((1, 3)).flatten()
        else:
            tensor = module._parameters.get(block.key)
            if tensor is None or tensor.ndim < 2 or not tensor.is_floating_point():
                continue
            values = tensor.detach().double().cpu().square().sum([d for d in range(tensor.ndim) if d != block.dim])
        np.add.at(total, roots, values.numpy())
    return torch.from_numpy(total).float()
