"""`KeepChannels`: which channels go together, the gates that simulate a cut, and the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from .channel_labels import Block, Labels
from .channel_trace import Trace
from .cutting import Undo
from .edits import CompressionError, KeepChannels
from .kinds import SEPARABLE
from .modules import can_gate, is_gated, plain_kind
from .probe import probing, tensors_in
from .refusals import check_dense, check_weights
from .substitute import find

SEPARABLES = tuple(SEPARABLE.values())
NUMBERS = ("num_features", "num_channels", "num_groups")  # of norms; followed where they hold the old width


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together. `name` is the first convolution that writes them, which `KeepChannels` takes."""

    name: str
    size: int
    writers: tuple[str, ...]  # all convolutions (and Linears before a batch norm) whose outputs they are
    readers: tuple[str, ...]  # what sums over them
    fixed: tuple[int, ...]  # those that cannot go
    reason: str | None  # why, for the first of them
    rows: np.ndarray = field(repr=False, compare=False)  # their labels in the trace


def channel_groups(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[ChannelGroup]:
    """The sets of channels of a model that go together, found by running it once on a small batch.

    `discover` lists convolutions and runs nothing; which of them share channels (through additions, depthwise convolutions,
    squeeze-excite) only the computation tells, see `channel_trace.Trace`. The model is not changed.

    Args:
        model (`nn.Module`): a transformers model, or a module around one.
        inputs (`dict`, *optional*): a small batch, where none can be made from the config.

    Returns:
        `list[ChannelGroup]`: `.name`, `.size`, `.writers`, `.readers`, and `.fixed` with a `.reason` where some cannot go.

    Raises:
        CompressionError: the model does not run on the inputs.

    Example:

    ```python
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from hf_compress import channel_groups
    >>> model = ResNetForImageClassification(ResNetConfig(
    ...     embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
    ... ))
    >>> for group in channel_groups(model)[:2]:
    ...     print(group.name, group.size, len(group.writers), group.reason)
    resnet.embedder.embedder.convolution 8 2 None
    resnet.encoder.stages.0.layers.0.layer.0.convolution 8 1 None

    ```
    """
    if not isinstance(model, nn.Module):
        raise CompressionError(f"channel_groups takes a model (a torch.nn.Module), got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)
    with probing(model, inputs) as run:
        return groups_of(model, trace_channels(model, run))


def groups_of(model: nn.Module, labels: Labels) -> list[ChannelGroup]:
    """The sets of channels of a model whose forward pass was traced, in the order of the modules that write them."""
    reasons = labels.reasons()
    readers: dict[int, list[str]] = {}
    for block in labels.reads.values():
        for root in np.unique(labels.find(np.arange(block.start, block.start + block.size))).tolist():
            readers.setdefault(root, []).append(block.module)
    normed = {
        root
        for block in labels.blocks
        if block.key == "running_mean"
        for root in labels.find(np.arange(block.start, block.start + block.size)).tolist()
    }
    found: dict[frozenset[int], dict[str, Any]] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        rows = _rows(labels, name, module)
        if rows is None or not _ran(labels, rows):
            continue
        roots = labels.find(rows)
        key = frozenset(roots.tolist())
        if not isinstance(module, _ConvNd) and not key <= normed:
            continue
        if key in found:
            found[key]["writers"].append(name)
        elif not key <= covered:
            covered |= key
            fixed = tuple(i for i, root in enumerate(roots.tolist()) if root in reasons)
            reason = reasons[int(roots[fixed[0]])] if fixed else None
            read = dict.fromkeys(reader for root in roots.tolist() for reader in readers.get(root, ()))
            found[key] = {
                "name": name, "size": len(rows), "writers": [name], "readers": tuple(read), "fixed": fixed, "reason": reason,
                "rows": rows,
            }  # fmt: skip
    return [ChannelGroup(**{**group, "writers": tuple(group["writers"])}) for group in found.values()]


def trace_channels(model: nn.Module, run: Callable[[], Any]) -> Labels:
    """The labels of a model's channels after one forward pass (`probe.probing`); those of its outputs are frozen."""
    with torch.inference_mode(False), torch.no_grad():
        with _unmasked(model), Trace(model) as trace:
            outputs = run()
        for name, tensor in tensors_in(outputs):
            where = name.partition(".")[2] or name
            trace.freeze(tensor, f"they are the model's output {where.strip('[]0.')!r}")
    return trace.labels


@contextmanager
def _unmasked(model: nn.Module) -> Iterator[None]:
    """Without masks, which are no part of the structure."""
    gated = [(module, type(module)) for module in model.modules() if is_gated(module)]
    try:
        for module, _ in gated:
            module.__class__ = plain_kind(module)
        yield
    finally:
        for module, kind in gated:
            module.__class__ = kind


def _rows(labels: Labels, name: str, module: nn.Module) -> np.ndarray | None:
    """The labels of the outputs of a convolution or Linear."""
    if not isinstance(module, _ConvNd | nn.Linear | Conv1D):
        return None
    return labels.range_of(name, "weight", 1 if isinstance(module, _ConvTransposeNd | Conv1D) else 0)


def _ran(labels: Labels, rows: np.ndarray) -> bool:
    return int(rows[0]) in labels.used


# --- what goes ---------------------------------------------------------------------------------------------------


class Removal:
    """What a run of `KeepChannels` takes away, in the coordinates of the model as it is: one bool per label.

    Where a convolution in groups loses all inputs or all outputs of a group, it loses the group; what is left must be
    equally many in every group, since its weight is one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Iterable[KeepChannels],
        run: Callable[[], Any],
        original: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        self.model = model
        self.labels = labels = trace_channels(model, run)
        self.roots = labels.find(np.arange(labels.count))
        self.gone = np.zeros(labels.count, dtype=bool)  # by root
        reasons = labels.reasons()
        modules = dict(model.named_modules())
        for edit in edits:
            name, module = find(model, original(edit.conv) or edit.conv, modules)
            rows = _rows(labels, name, module)
            self._check_writer(edit, name, module, rows)
            roots = self.roots[rows]
            now = roots[~self.gone[roots]]
            if edit.channels[-1] >= len(now):
                raise CompressionError(
                    f"KeepChannels({edit.conv!r}) names {edit.channels[-1]}, but there are {len(now)} channels at that point "
                    f"(0-{len(now) - 1})."
                )
            kept = now[list(edit.channels)]
            leaving = np.setdiff1d(now, kept)
            half = [i for i, root in enumerate(now.tolist()) if root in set(kept.tolist()) and i not in edit.channels]
            if half:
                raise CompressionError(
                    f"KeepChannels({edit.conv!r}) drops channel {half[0]} and keeps one that is the same channel further on; "
                    "keep both or neither."
                )
            self.gone[leaving] = True
            self._close(edit)
            for root in np.flatnonzero(self.gone).tolist():
                if root in reasons:
                    number = np.flatnonzero(now == root)
                    which = f"channel {int(number[0])}" if len(number) else "a channel that goes with them"
                    raise CompressionError(
                        f"Cannot cut channels of {edit.conv!r} exactly, so nothing was changed: {which} cannot go, since "
                        f"{reasons[root]}. channel_groups(model) lists what can."
                    )
        self.slices = self._slices()

    def _check_writer(self, edit: KeepChannels, name: str, module: nn.Module, rows: np.ndarray | None) -> None:
        if rows is None:
            raise CompressionError(
                f"KeepChannels takes a convolution (or Linear) with two channels or more, and {name!r} is a "
                f"{type(module).__name__}. discover(model).convs lists them."
            )
        if not _ran(self.labels, rows):
            raise CompressionError(
                f"Cannot cut channels of {edit.conv!r}: it did not run on the proof's inputs, or its weight is computed from "
                "others. Pass inputs=... with a batch that uses it, or leave it out of the plan."
            )

    def _close(self, edit: KeepChannels) -> None:
        """Whole groups of convolutions in groups go with all that is theirs."""
        moved = True
        while moved:
            moved = False
            for conv in self.labels.grouped:
                sides = [self.roots[s].reshape(conv.groups, -1) for s in (conv.inputs, conv.outputs)]
                empty = [self.gone[side].all(1) for side in sides]
                for side, other in ((0, 1), (1, 0)):
                    more = empty[side] & ~empty[other]
                    if more.any():
                        self.gone[sides[other][more]] = True
                        moved = True
        for conv in self.labels.grouped:
            for side, what in ((conv.inputs, "inputs"), (conv.outputs, "outputs")):
                counts = (~self.gone[self.roots[side]]).reshape(conv.groups, -1).sum(1)
                if len({*counts[counts > 0].tolist()}) > 1:
                    raise CompressionError(
                        f"Cannot cut channels of {edit.conv!r} exactly, so nothing was changed: the convolution "
                        f"{conv.module!r} has {conv.groups} groups of {len(side) // conv.groups} {what}, of which "
                        f"{', '.join(map(str, counts.tolist()))} would be left. Keep whole groups, or equally many in every "
                        "group that stays."
                    )

    def _of(self, block: Block) -> np.ndarray:
        """Which indices of a dimension stay."""
        return ~self.gone[self.roots[block.start : block.start + block.size]]

    def _slices(self) -> dict[str, dict[str, dict[int, np.ndarray]]]:
        """What stays, by module, key of the tensor ("" for the inputs of a convolution in groups) and dimension."""
        found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
        for number, block in enumerate(self.labels.blocks):
            kept = self._of(block)
            if kept.all():
                continue
            module = self.model.get_submodule(block.module)
            if number in self.labels.shared:
                raise CompressionError(
                    f"{block.name!r} is shared with {self.labels.shared[number]!r}; cutting it would change both. Untie them "
                    "first, or leave its channels out of the plan."
                )
            if not kept.any():
                raise CompressionError(f"Nothing would be left of {block.name!r}; keep at least one channel of it.")
            check_weights(block.module, module)
            check_dense(block.module, module)
            if block.key in module._non_persistent_buffers_set:
                raise CompressionError(
                    f"{block.name!r} has one value a channel and is not saved, so a loader could not cut it. Leave its "
                    "channels out of the plan."
                )
            found.setdefault(block.module, {}).setdefault(block.key, {})[block.dim] = kept
        return found

    # --- the mask

    @property
    def gates(self) -> dict[str, torch.Tensor]:
        """0 and 1 over the inputs of every module that sums over a channel which goes: what a mask multiplies."""
        found: dict[str, torch.Tensor] = {}
        for block in self.labels.reads.values():
            module = self.model.get_submodule(block.module)
            if isinstance(module, SEPARABLES):  # what it sums over are kernels of its own, several an input
                kernels = self.labels.range_of(block.module, "weight_depth", 0)
                kept = ~self.gone[self.roots[kernels[:: module.multiplier]]] if kernels is not None else np.ones(1, bool)
            else:
                kept = self._of(block)
            if kept.all():
                continue
            if not can_gate(module):
                raise CompressionError(
                    f"{block.module!r} ({type(module).__module__}.{type(module).__name__}) reads these channels and is no "
                    "plain convolution or Linear, so they can be neither masked nor cut there. Leave them out of the plan."
                )
            found[block.module] = torch.from_numpy(kept).float()
        return found

    # --- the cut

    def cut_(self, model: nn.Module, undo: Undo) -> dict[str, dict[str, Any]]:
        """Slice a model, in place, and say what was changed, as `cutting.cut_` does. `model`: the traced one or a copy."""
        record: dict[str, dict[str, Any]] = {}
        grouped = {conv.module: conv for conv in self.labels.grouped}
        for name, keys in self.slices.items():
            module = model.get_submodule(name)
            entry = record.setdefault(name, {})
            before = {key: t for key, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}
            weight = before["weight"] if name in grouped else None
            for key, dims in keys.items():
                if key == "" or (key == "weight" and weight is not None):
                    continue
                tensor = before[key]
                for dim, kept in dims.items():
                    tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(kept)).to(tensor.device))
                _replace(module, key, tensor, entry, undo)
            if weight is not None:
                conv = grouped[name]
                inputs, outputs = (~self.gone[self.roots[s]].reshape(conv.groups, -1) for s in (conv.inputs, conv.outputs))
                _replace(module, "weight", _sliced(weight, inputs, outputs), entry, undo)
                groups, width = int(inputs.any(1).sum()), int(inputs.sum())
            else:
                groups, width = None, None
            for attribute, value in _sizes(module, before, groups, width).items():
                _set(module, attribute, value, entry, undo)
        return {name: entry for name, entry in record.items() if entry}


def _sliced(weight: torch.Tensor, inputs: np.ndarray, outputs: np.ndarray) -> torch.Tensor:
    """The weight of a convolution in groups with these inputs and outputs (groups, in each): its columns differ by group."""
    rows, columns = [], []
    for group in np.flatnonzero(outputs.any(1)).tolist():
        own = np.flatnonzero(outputs[group]) + group * outputs.shape[1]
        rows += own.tolist()
        columns += [np.flatnonzero(inputs[group]).tolist()] * len(own)
    return weight[torch.tensor(rows, device=weight.device)[:, None], torch.tensor(columns, device=weight.device)]


def _sizes(module: Any, before: Mapping[str, torch.Tensor], groups: int | None, width: int | None) -> dict[str, int]:
    """The attributes of a module that say how wide its tensors are, as they must be now."""
    if isinstance(module, _ConvNd):
        weight = module.weight
        if isinstance(module, SEPARABLES):
            depth = before["weight_depth"].shape[0] // module.in_channels
            sizes = {"out_channels": weight.shape[0], "in_channels": module.weight_depth.shape[0] // depth}  # type: ignore
            return sizes if groups is None else {**sizes, "groups": groups}
        if isinstance(module, _ConvTransposeNd):
            return {"in_channels": weight.shape[0], "out_channels": weight.shape[1]}
        if groups is not None and width is not None:
            return {"out_channels": weight.shape[0], "in_channels": width, "groups": groups}
        if module.groups > 1:  # depthwise
            inputs = weight.shape[0] // (module.out_channels // module.groups)
            return {"out_channels": weight.shape[0], "in_channels": inputs, "groups": inputs}
        return {"out_channels": weight.shape[0], "in_channels": weight.shape[1]}
    if isinstance(module, nn.Linear):
        inner = module._parameters.get("weight_in", module.weight)
        return {"out_features": module.weight.shape[0], "in_features": inner.shape[1]}  # type: ignore[union-attr]
    if isinstance(module, Conv1D):
        return {"nx": module.weight.shape[0], "nf": module.weight.shape[1]}
    widths = {
        tensor.shape[0]: now.shape[0]
        for key, tensor in before.items()
        for now in [module._parameters.get(key, module._buffers.get(key))]
        if now is not None and now.shape != tensor.shape and tensor.ndim
    }
    found = {name: getattr(module, name, None) for name in NUMBERS}
    return {name: widths[value] for name, value in found.items() if type(value) is int and value in widths}


def _replace(module: nn.Module, key: str, tensor: torch.Tensor, entry: dict, undo: Undo) -> None:
    place: Any = module._parameters if key in module._parameters else module._buffers
    old: Any = place[key]
    new = tensor.detach().clone().contiguous()
    undo.append(lambda: place.__setitem__(key, old))
    place[key] = nn.Parameter(new, requires_grad=old.requires_grad) if place is module._parameters else new
    entry.setdefault("shapes", {})[key] = list(new.shape)


def _set(module: nn.Module, name: str, value: int, entry: dict, undo: Undo) -> None:
    old = getattr(module, name)
    if old != value:
        undo.append(lambda: setattr(module, name, old))
        setattr(module, name, value)
        entry.setdefault("attributes", {})[name] = value
