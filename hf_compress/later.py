"""Slices of weights that wait for the end of a change, and are then made one by one, each in the place of its whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def sliced(tensor: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.detach().index_select(dim, rows.to(tensor.device)).contiguous()


class Later(list[Callable[[], None]]):
    """The functions that take changes back (an `Undo`), and the slices of weights that are still to be made.

    A weight that is to be sliced is a shape on the meta device at first. What can refuse a change asks for shapes alone; so
    when all of it is planned and nothing can refuse any more, `make` slices tensor by tensor and lets each whole one go: the
    memory that a change needs is that of one tensor, and not of all that stay.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from hf_compress.later import Later
    >>> layer, undo = nn.Linear(2, 3, bias=False), Later()
    >>> whole = layer.weight
    >>> layer.weight = nn.Parameter(undo.put_off(layer, "weight", whole, torch.tensor([2]), 0))
    >>> layer.weight.device.type
    'meta'
    >>> undo.make()
    >>> torch.equal(layer.weight, whole[2:])
    True

    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = False  # whether slices wait; else they are made at once
        self._whole: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self._rows: dict[tuple[nn.Module, str], list[tuple[torch.Tensor, int]]] = {}
        self._made: dict[tuple, nn.Parameter] = {}

    def put_off(self, module: nn.Module, name: str, tensor: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """The shape that these rows will have."""
        place = (module, name)
        if not tensor.is_meta:
            self._whole[place], self._rows[place] = tensor, []
        self._rows[place].append((rows, dim))
        shape = list(tensor.shape)
        shape[dim] = len(rows)
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    def same(self, old: torch.Tensor, rows: torch.Tensor, dim: int, make: Callable[[], nn.Parameter]) -> nn.Parameter:
        """What these rows became: one parameter, though several modules hold the old one (which the list of undoing keeps)."""
        return self._made.setdefault((id(old), tuple(rows.tolist()), dim), make())

    def forgotten(self, model: nn.Module) -> str | None:
        """A weight that is nothing but a shape and is not waiting here: something has sliced it past this list."""
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta and (module, key) not in self._whole:
                    return f"{name}.{key}"
        return None

    def make(self) -> None:
        """Slice what waits; after that there is no way back. An interrupt waits until all of it is done."""
        places = sorted(
            self._whole, key=lambda place: -self._whole[place].nbytes
        )  # where there is room for one, there is for all
        whole = [id(tensor) for tensor in self._whole.values()]
        names = {place: id(self._whole[place]) for place in places if whole.count(id(self._whole[place])) > 1}
        made: dict[tuple, nn.Parameter] = {}  # of weights that several modules hold: they still will
        with _uninterrupted(), torch.inference_mode(False), torch.no_grad():
            for place in places:
                module, name = place
                kept = self._whole[place]
                which = (names.get(place), *((tuple(rows.tolist()), dim) for rows, dim in self._rows[place] if place in names))
                if which not in made:
                    for rows, dim in self._rows[place]:
                        kept = sliced(kept, rows, dim)
                before = module._parameters[name]
                assert before is not None
                self.clear()  # it holds the whole ones
                new = made[which] if which in made else nn.Parameter(kept, requires_grad=before.requires_grad)
                module._parameters[name] = new
                made.update({which: new} if place in names else {})
                del self._whole[place], kept
            self.clear()
            self._whole, self._rows, self._made = {}, {}, {}


@contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield  # no interrupt comes here
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt("The model was cut when the interrupt came, and is whole.")
