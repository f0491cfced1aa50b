"""Labels for the channels of a model, and which of them are one: the bookkeeping behind `channel_trace`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

# A field says, for every element of a tensor, which channel it belongs to (-1: none), along some of its dimensions: as many
# dimensions as the tensor, of size 1 where nothing changes along them. A weight has two (outputs, inputs), an activation one.
Field = torch.Tensor


@dataclass(frozen=True)
class Block:
    """The labels of one dimension of one parameter or buffer: `start`, `start + 1`, ... of them `size`."""

    module: str
    key: str
    dim: int
    start: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.key}".lstrip(".")


@dataclass(frozen=True)
class Grouped:
    """A convolution in groups of more than one channel, and the labels of its inputs and outputs, in order."""

    module: str
    groups: int
    inputs: np.ndarray
    outputs: np.ndarray


class Labels:
    """Whole numbers, one per index of every dimension of every parameter and buffer, and which of them are one channel.

    A union-find: two labels are joined where a computation holds only if both stay or both go; a label is *frozen*, with
    a reason, where nothing that belongs to it may go.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parent = np.arange(0)  # made when all labels are known
        self.count = 0
        self.frozen: dict[int, str] = {}
        self.blocks: list[Block] = []
        self.shared: dict[int, str] = {}  # by the number of a block: who else holds its tensor
        self.fields: Any = WeakTensorKeyDictionary()  # tensor -> list[Field]; weak, so that activations can go
        self.used: set[int] = set()  # blocks that an operation has met
        self.reads: dict[int, Block] = {}  # by the start of a block: the inputs of a projection or convolution
        self.grouped: list[Grouped] = []
        self._inputs: dict[str, Block] = {}
        seen: dict[int, tuple[str, str, int, int]] = {}
        for path, module in model.named_modules(remove_duplicate=True):
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or key.startswith("hfc_"):  # gates of a mask
                    continue
                if id(tensor) in seen:
                    other, other_key, first, last = seen[id(tensor)]
                    for number in range(first, last):
                        self.shared[number] = f"{path}.{key}".lstrip(".")
                    continue
                first = len(self.blocks)
                self.fields[tensor] = [
                    self._block(path, key, dim, size).view([size if d == dim else 1 for d in range(tensor.ndim)])
                    for dim, size in enumerate(tensor.shape)
                    if size > 1
                ]
                seen[id(tensor)] = (path, key, first, len(self.blocks))
        self._grow()

    def _grow(self) -> None:
        self.parent = np.concatenate([self.parent, np.arange(len(self.parent), self.count)])
        self._starts = np.array([block.start for block in self.blocks] or [0])

    def _block(self, module: str, key: str, dim: int, size: int) -> Field:
        start, self.count = self.count, self.count + size
        self.blocks.append(Block(module, key, dim, start, size))
        return torch.arange(start, start + size)

    def inputs_of(self, module: str, size: int) -> Field:
        """Labels for the inputs of a grouped convolution, whose weight has no dimension for them."""
        if module not in self._inputs:
            self._block(module, "", 1, size)
            self._inputs[module] = self.blocks[-1]
            self._grow()
        block = self._inputs[module]
        self.used.add(block.start)
        return torch.arange(block.start, block.start + block.size)

    def block_of(self, label: int) -> Block:
        return self.blocks[int(np.searchsorted(self._starts, label, side="right")) - 1]

    def whole(self, labels: Field) -> Block | None:
        """The dimension of a parameter that these labels are, in order; None where they are a part or a mixture."""
        flat = labels.flatten()
        if int(flat[0]) < 0:
            return None
        block = self.block_of(int(flat[0]))
        same = len(flat) == block.size and torch.equal(flat, torch.arange(block.start, block.start + block.size))
        return block if same else None

    def range_of(self, module: str, key: str, dim: int) -> np.ndarray | None:
        """The labels of one dimension of a parameter or buffer; None where it has none (it has size 1)."""
        found = next((b for b in self.blocks if (b.module, b.key, b.dim) == (module, key, dim)), None)
        return None if found is None else np.arange(found.start, found.start + found.size)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The representative of each label's channel."""
        roots = self.parent[labels]
        while True:
            further = self.parent[roots]
            if np.array_equal(further, roots):
                break
            roots = further
        self.parent[labels] = roots
        return roots

    def join(self, one: Field, other: Field) -> None:
        """Element by element the same channel; what meets something that is none is frozen."""
        pairs = torch.stack([t.flatten() for t in torch.broadcast_tensors(one, other)])
        if pairs.shape[1] > 4096:
            pairs = torch.unique(pairs, dim=1)
        a, b = pairs.numpy()
        lonely = (a < 0) != (b < 0)
        if lonely.any():
            self.freeze(np.maximum(a, b)[lonely], "they meet values that belong to no channel")
        both = (a >= 0) & (b >= 0)
        a, b = self.find(a[both]), self.find(b[both])
        for x, y in zip(a[a != b].tolist(), b[a != b].tolist(), strict=True):
            x, y = self._root(x), self._root(y)
            if x != y:
                self.parent[max(x, y)] = min(x, y)

    def _root(self, label: int) -> int:
        while self.parent[label] != label:
            label = int(self.parent[label])
        return label

    def freeze(self, labels: Field | np.ndarray, reason: str) -> None:
        flat = labels.flatten().numpy() if isinstance(labels, torch.Tensor) else labels
        for label in np.unique(flat[flat >= 0]).tolist():
            self.frozen.setdefault(label, reason)

    def reasons(self) -> dict[int, str]:
        """Why a channel cannot go, by representative: the first reason that was met in a forward pass."""
        found: dict[int, str] = {}
        keys = np.array(list(self.frozen), dtype=np.int64)
        for root, reason in zip(self.find(keys).tolist() if len(keys) else [], self.frozen.values(), strict=True):
            found.setdefault(root, reason)
        return found


def support(field: Field) -> set[int]:
    return {d for d, size in enumerate(field.shape) if size > 1}


def narrowed(field: Field) -> Field | None:
    """A field without what repeats; None where nothing is labelled."""
    for d, size in enumerate(field.shape):
        if size > 1 and bool((field == field.narrow(d, 0, 1)).all()):
            field = field.narrow(d, 0, 1)
    return None if not support(field) or not bool((field >= 0).any()) else field


def present(fields: Iterable[Field | None]) -> list[Field]:
    return [field for field in fields if field is not None]
