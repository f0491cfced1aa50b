"""Which entries of a tensor belong to which row of a batch: seen from a run with one row more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .trees import tensors_in

if TYPE_CHECKING:
    from .leaving import Steps

NOT_ROWS = ("cache_position",)  # inputs of a model whose first dimension is never the batch
GIVEN, GIVES = "given", "gives"


class Probe:
    """Stands in for a `Pass`: runs every step as it is, and keeps the shapes of what it is given and gives."""

    def __init__(self, steps: Steps, rows: int, count: int) -> None:
        self.steps, self.rows, self.count, self.last = steps, rows, count, -1  # the row `count` is the first once more
        self.shapes: dict[tuple, tuple[int, ...]] = {}
        self.blocks: set[tuple] = set()  # tensors with several entries a row that may lie side by side
        # those of them whose entries may as well lie in another order; None for all where all entries are equal
        self.unsure: dict[tuple, torch.Tensor | None] = {}

    def step(self, places: tuple[int, ...], call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        at = self.last = self.steps.following(places, self.last)
        self._see(at, GIVEN, (args, kwargs))
        outputs = call(*args, **kwargs)
        self._see(at, GIVES, outputs)
        return outputs

    def _see(self, at: int, side: str, value: Any) -> None:
        for path, tensor in tensors_in(value):
            self.shapes[at, side, path] = tuple(tensor.shape)
            many, over = divmod(len(tensor), self.rows) if tensor.ndim else (0, 0)
            if many > 1 and not over:
                fits = (alike(rows[0], rows[self.count]) for rows in orders(tensor, self.rows))
                if not next(fits):
                    continue
                self.blocks.add((at, side, path))
                if any(fits):
                    self.unsure[at, side, path] = None if all_equal(tensor) else tensor.detach().clone()


def more_rows(inputs: Mapping[str, Any], count: int) -> Iterator[tuple[dict[str, Any], int]]:
    """A batch with its first row once more at the end; for models that pack pictures of all rows, the whole batch twice."""

    def longer(name: str, value: Any, rows: int) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim or name in NOT_ROWS:
            return value
        if rows > count + 1:
            return torch.cat([value, value])
        return torch.cat([value, value[:1]]) if len(value) == count else value

    for rows in (count + 1, 2 * count):
        yield {name: longer(name, value, rows) for name, value in inputs.items()}, rows


def orders(tensor: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """A tensor with several entries a row as (rows, ...), for each order that they may lie in; side by side is the first."""
    many = len(tensor) // rows
    for outer in range(1, many + 1):
        if many % outer == 0:
            yield tensor.reshape(outer, rows, many // outer, *tensor.shape[1:]).transpose(0, 1)


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), 1e-3, equal_nan=True)


def all_equal(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor, tensor[:1].expand_as(tensor))
