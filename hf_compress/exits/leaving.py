"""One forward pass in which rows leave: which rows are still there, what later layers see, and how rows come back.

Every layer is given, and gives, the full batch, so that whatever a model does between its layers or after them stays
right; only inside a layer are there fewer rows. Which of a layer's arguments have one entry a row is not guessed from
shapes (a batch may be as large as a sequence is long): the model is run once more, up to that layer, with one row more,
and what grew has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..edits import CompressionError
from .criteria import Criterion

NOT_ROWS = ("cache_position",)  # inputs of a model whose first dimension is never the batch
PLAIN = str | int | float | torch.dtype | torch.device | None


class _Seen(Exception):
    """Raised where a probe has reached its layer."""


class Probe:
    """Stands in for a `Pass`: runs layers as they are up to one, and keeps the shapes of what that one is given."""

    def __init__(self, index: int) -> None:
        self.index, self.shapes = index, {}

    def layer(self, index: int, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if index == self.index:
            self.shapes = {path: tuple(tensor.shape) for path, tensor in _tensors((args, kwargs))}
            raise _Seen
        return call(*args, **kwargs)


class Pass:
    """The state of one forward pass of a model with exits; see `runtime` for who makes one."""

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        tokens: torch.Tensor | None,
        criterion: Criterion,
        thresholds: Mapping[int, Any],
        leaves: bool,
        by_row: dict[tuple, bool],
        attention: str,
        run: Callable[[Probe, dict[str, Any]], None],
        inputs: Mapping[str, Any],
        main_input: str,
    ) -> None:
        self.heads, self.tokens, self.criterion, self.thresholds = heads, tokens, criterion, thresholds
        self.leaves, self.by_row, self.attention = leaves, by_row, attention
        self.run, self.inputs, self.main_input = run, inputs, main_input
        self.logits: list[torch.Tensor] = []  # of the exits so far, of the rows that are still there
        self.gone: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (rows, their logits, the layer)
        self.rows: torch.Tensor | None = None  # those still there, once some have left
        self.compact: torch.Tensor | None = None  # their hidden states
        self.full: torch.Tensor | None = None  # the batch as the last layer handed it on
        self.ours = False  # whether `full` is a copy that later layers may write into
        self.rest: tuple | None = None  # what a layer gives beside hidden states
        self.last = -1
        self.picked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if index <= self.last:
            raise CompressionError(f"Layer {index} ran twice in one forward pass; exits need layers that run once, in order.")
        self.last = index
        if self.rows is None:
            outputs = call(*args, **kwargs)
            self.full, self.rest = _split(outputs)
            self._ask(index, self.full)
            return outputs
        hidden = args[0] if args else kwargs["hidden_states"]
        if not self.rows.numel():
            return hidden if self.rest is None else (hidden, *self.rest)
        self._learn(index, args, kwargs)
        compact = self.compact if hidden is self.full else hidden.index_select(0, self.rows)
        if args:
            args = (compact, *(self._pick(value, f"0.{i}") for i, value in enumerate(args[1:], 1)))
        else:
            kwargs = {"hidden_states": compact, **{k: v for k, v in kwargs.items() if k != "hidden_states"}}
        kwargs = {k: v if v is compact else self._pick(v, f"1.{k}") for k, v in kwargs.items()}
        self.compact, self.rest = _split(call(*args, **kwargs))
        if self.rest is not None and next(_tensors(self.rest), None) is not None:
            raise CompressionError(
                f"Layer {index} hands on more than hidden states, for only the rows that are still there; exits are not "
                "offered for this model: set_exits_(model, enabled=False)."
            )
        written = self.compact.to(hidden.dtype)
        if self.ours and hidden is self.full:
            self.full = hidden.index_copy_(0, self.rows, written)
        else:
            self.full, self.ours = hidden.index_copy(0, self.rows, written), not torch.is_grad_enabled()
        outputs = self.full if self.rest is None else (self.full, *self.rest)
        self._ask(index, self.compact)
        return outputs

    def _ask(self, index: int, hidden: torch.Tensor) -> None:
        """Ask the exit after this layer, if there is one, which rows are sure, and let them leave."""
        head = self.heads.get(str(index))
        if head is None:
            return
        logits = head(hidden, self.tokens)
        self.logits.append(logits)
        if not self.leaves:
            return
        scores = self.criterion.score(self.logits)
        sure = self.criterion.leaves(scores, self.thresholds[index])
        count = int(sure.sum())  # the only synchronisation of this exit
        if not self.criterion.history:
            self.logits.clear()
        if not count:
            return
        order = sure.to(torch.uint8).argsort(stable=True)
        stay, leave = order[: len(order) - count], order[len(order) - count :]
        rows = self.rows if self.rows is not None else torch.arange(len(order), device=hidden.device)
        self.gone.append((rows[leave], logits[leave], torch.full_like(leave, index)))
        self.rows, self.compact = rows[stay], hidden.index_select(0, stay)
        self.logits = [past[stay] for past in self.logits]
        self.tokens = None if self.tokens is None else self.tokens[stay]
        self.picked.clear()

    def _pick(self, value: Any, path: str) -> Any:
        """The rows that are still there, of an argument of a layer."""
        if isinstance(value, torch.Tensor):
            if not value.ndim or not self.by_row[self._key(path, value)]:
                return value
            if id(value) not in self.picked:  # layers share masks and positions
                self.picked[id(value)] = value, value.index_select(0, self.rows)  # type: ignore[arg-type]
            return self.picked[id(value)][1]
        if isinstance(value, tuple | list):
            parts = [self._pick(v, f"{path}.{i}") for i, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # type: ignore[arg-type]
        if type(value) is dict:
            return {key: self._pick(v, f"{path}.{key}") for key, v in value.items()}
        if not isinstance(value, PLAIN):
            raise CompressionError(
                f"A layer takes a {type(value).__name__} ({path.partition('.')[2]}), which cannot be split into rows. Use "
                "attn_implementation='sdpa' or 'eager', or set_exits_(model, enabled=False)."
            )
        return value

    def _key(self, path: str, tensor: torch.Tensor) -> tuple:
        return self.attention, path, tensor.ndim, tensor.shape[0] == 1

    def _learn(self, index: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find out which arguments of a layer have one entry a row, where it is not known yet."""
        found = {path: tensor for path, tensor in _tensors((args, kwargs)) if tensor.ndim}
        if all(self._key(path, tensor) in self.by_row for path, tensor in found.items()):
            return
        probe = Probe(index)
        main = self.inputs.get(self.main_input)
        if not isinstance(main, torch.Tensor):
            main = next(value for value in self.inputs.values() if isinstance(value, torch.Tensor) and value.ndim)
        count = main.shape[0]
        again = torch.arange(count + 1, device=main.device) % count  # the first row twice: nothing else changes
        inputs = {
            name: value.index_select(0, again.to(value.device)) if _has_rows(name, value, count) else value
            for name, value in self.inputs.items()
            if name not in ("labels", "num_items_in_batch")
        }
        try:
            self.run(probe, inputs)
        except _Seen:
            pass
        learned = {}
        for path, tensor in found.items():
            before, after = tuple(tensor.shape), probe.shapes.get(path)
            if after == (count + 1, *before[1:]) and before[0] == count:
                learned[self._key(path, tensor)] = True
            elif after == before:
                learned[self._key(path, tensor)] = False
            else:
                raise CompressionError(
                    f"{path.partition('.')[2]!r}, an argument of layer {index}, is {before} for {count} rows and {after} for "
                    f"{count + 1}: its rows cannot be told apart, so none can leave. set_exits_(model, enabled=False) runs all."
                )
        hidden = "0.0" if args else "1.hidden_states"
        if not learned[self._key(hidden, found[hidden])]:
            raise CompressionError(
                f"The first dimension of what layer {index} is given is not the batch; exits are not offered."
            )
        self.by_row.update(learned)


def _has_rows(name: str, value: Any, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == count and name not in NOT_ROWS


def _split(outputs: Any) -> tuple[torch.Tensor, tuple | None]:
    """Hidden states, and what a layer gives beside them (None where it gives a bare tensor)."""
    return (outputs[0], tuple(outputs[1:])) if isinstance(outputs, tuple | list) else (outputs, None)  # a list: OpenAI-GPT


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for i, v in enumerate(value):
            yield from _tensors(v, f"{path}.{i}" if path else str(i))
    elif type(value) is dict:
        for key, v in value.items():
            yield from _tensors(v, f"{path}.{key}" if path else str(key))
