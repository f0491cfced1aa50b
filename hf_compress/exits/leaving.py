"""One forward pass in which rows leave: which rows are still there, what later layers see, and how rows come back.

A layer is one module, or a few that run one after the other (its steps). Every step is given, and gives, the full batch, so
that whatever a model does between its layers or after them stays right; only inside a step are there fewer rows. Which
tensors that a step is given or gives have entries of rows is not guessed from shapes (a batch may be as large as a sequence is
long): the model is run once more, with one row more, and what grew has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..edits import CompressionError
from .criteria import Criterion
from .rows import GIVEN, GIVES, Probe, alike, all_equal, more_rows, orders
from .trees import mapped, tensors_in

PLAIN = str | int | float | torch.dtype | torch.device | None
MOST_SIZES = 1000  # of inputs, of which it is remembered what a step makes of them

Call = Callable[..., Any]


class Steps:
    """The modules that the layers of a model run, one after the other, and where among them a layer ends.

    Args:
        names: of each step; "" where all are alike, so that what is learned of one holds for all.
        ends: position of a layer's last step -> the layer.
    """

    def __init__(self, names: list[str], ends: dict[int, int]) -> None:
        self.names, self.ends = names, ends
        self.alike = not any(names)
        self.by_row: dict[tuple, int] = {}  # how many entries a tensor has for each row, 0 if it has none (see `Pass._learn`)
        self.made: dict[tuple, Any] = {}  # what a step makes of inputs of some shapes: it says what to hand on for no rows

    def following(self, places: tuple[int, ...], last: int) -> int:
        """The next of a module's positions."""
        at = next((place for place in places if place > last), None)
        if at is None:
            raise CompressionError(
                f"Layer {self.layer_of(places[-1])} ran twice in one forward pass; exits need layers that run in the order "
                "that was found when they were added."
            )
        return at

    def layer_of(self, at: int) -> int:
        return next(layer for end, layer in self.ends.items() if end >= at)


class Pass:
    """The state of one forward pass of a model with exits; see `runtime` for who makes one."""

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        tokens: dict[str, torch.Tensor | None],
        criterion: Criterion,
        thresholds: Mapping[int, Any],
        leaves: bool,
        steps: Steps,
        attention: str,
        run: Callable[[Probe, dict[str, Any]], None],
        inputs: Mapping[str, Any],
    ) -> None:
        self.heads, self.tokens, self.criterion, self.thresholds = heads, tokens, criterion, thresholds
        self.leaves, self.steps, self.attention = leaves, steps, attention
        self.run, self.inputs = run, inputs
        self.learns = not leaves and torch.is_grad_enabled()
        self.logits: dict[int, torch.Tensor] = {}  # layer -> of its exit, of the rows that are still there; in order
        self.gone: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (rows, their logits, the layer)
        self.rows: torch.Tensor | None = None  # those still there, once some have left
        self.count = 0  # of rows in the batch, known once some have left
        self.compact: torch.Tensor | None = None  # what the last step gave, for the rows that are still there
        self.full: torch.Tensor | None = None  # the same, for the batch
        self.version: int | None = None  # of `full` when `compact` was made: a model may write into it after that
        self.ours = False  # whether `full` is a copy that later layers may write into
        self.handed: Any = None  # all that the last step gave, for the batch
        self.many: dict[str, int] = {}  # how many entries for each row, of what it gave
        self.last = -1
        self.probe: Probe | None = None
        self.picked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.by_row: dict[tuple, int] = {}  # as `Steps.by_row`, of tensors whose entries are all equal in this batch

    def step(self, places: tuple[int, ...], call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        at = self.last = self.steps.following(places, self.last)
        if self.learns and not torch.is_grad_enabled():  # a model's own reentrant checkpoint
            raise CompressionError(
                f"Layer {self.steps.layer_of(at)} runs without gradients (inside of what gradient checkpointing runs again, or "
                "of torch.no_grad), so an exit in it cannot be trained. Train without gradient checkpointing."
            )
        if self.rows is None:
            outputs = self.handed = call(*args, **kwargs)
            self.full = main_of(outputs)
            self.version = _version(self.full)
            self._ask(at, self.full)
            return outputs
        if not self.rows.numel():
            return self._nobody(at, call, args, kwargs)
        outputs = self._some(at, call, args, kwargs)
        self._ask(at, self.compact)  # type: ignore[arg-type]
        return outputs

    def _some(self, at: int, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a step on the rows that are still there; what it gives, for the batch."""
        given = dict(tensors_in((args, kwargs)))
        self._learn(at, GIVEN, given, self.count)
        hidden = _hidden(given)
        if hidden is None or not self._entries_of(at, GIVEN, *hidden, self.count):
            raise CompressionError(
                f"The first dimension of what layer {self.steps.layer_of(at)} is given is not the batch; exits are not offered."
            )
        some, more = mapped((args, kwargs), lambda path, tensor: self._pick(at, path, tensor), self._other)
        try:
            outputs = call(*some, **more)
        except (CompressionError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a setting that belongs to rows which left, say
            raise CompressionError(
                f"Layer {self.steps.layer_of(at)} does not run on {len(self.rows)} of {self.count} rows "  # type: ignore[arg-type]
                f"without the others ({type(error).__name__}: {error}); set_exits_(model, enabled=False) runs all."
            ) from error
        return self._spread(at, outputs, hidden[1])

    def _spread(self, at: int, outputs: Any, hidden: torch.Tensor) -> Any:
        """What a step gave for some rows, for the batch: of the rows that left anything, since nothing reads it."""
        assert self.rows is not None
        rows, found = self.rows, dict(tensors_in(outputs))
        self._learn(at, GIVES, found, len(rows))
        first = next(iter(found))
        self.compact = found[first]

        self.many = {path: self._entries_of(at, GIVES, path, tensor, len(rows)) for path, tensor in found.items()}

        def back(path: str, tensor: torch.Tensor) -> torch.Tensor:
            many = self.many[path]
            if path == first and many == 1 and self.steps.alike and hidden.shape[1:] == tensor.shape[1:]:
                written = tensor.to(hidden.dtype)
                if self.ours and hidden is self.full:
                    return hidden.index_copy_(0, rows, written)
                self.ours = not torch.is_grad_enabled()
                return hidden.index_copy(0, rows, written)
            if not many:
                return tensor
            # of the rows that left: those of one that is still there, which are sure to be numbers
            where = torch.zeros(self.count, dtype=rows.dtype, device=rows.device)
            where[rows] = torch.arange(len(rows), device=rows.device)
            return tensor.index_select(0, _entries(where, many).to(tensor.device))

        self.handed = mapped(outputs, back)
        self.full = main_of(self.handed)
        self.version = _version(self.full)
        return self.handed

    def _nobody(self, at: int, call: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a step hands on where no row is left: anything of the right shapes, since nothing reads it."""
        given = dict(tensors_in((args, kwargs)))
        hidden = _hidden(given)
        if self.steps.alike and hidden is not None:
            first = next(path for path, _ in tensors_in(self.handed))
            return mapped(self.handed, lambda path, tensor: hidden[1] if path == first else tensor)
        key = (self.steps.names[at], *((tuple(tensor.shape[1:]), tensor.dtype) for tensor in given.values() if tensor.ndim))
        if key not in self.steps.made:
            # seen for the first time: it runs on a row that has left
            rows, self.rows = self.rows, self.gone[0][0][:1]
            self.picked.clear()
            try:
                outputs = self._some(at, call, args, kwargs)
            finally:
                self.rows = rows
                self.picked.clear()
            if len(self.steps.made) >= MOST_SIZES:
                self.steps.made.clear()
            # shapes alone: a zero that is seen in every place
            shapes = mapped(outputs, lambda path, t: t.new_zeros(()).expand(t.shape) if self.many[path] else t.detach().clone())
            self.steps.made[key] = shapes, self.many
        shapes, entries = self.steps.made[key]
        device, count = self.gone[0][0].device, self.count

        def fill(path: str, tensor: torch.Tensor) -> torch.Tensor:
            if not entries[path]:
                return tensor.to(device)
            return torch.zeros((entries[path] * count, *tensor.shape[1:]), dtype=tensor.dtype, device=device)

        return mapped(shapes, fill)

    def _ask(self, at: int, hidden: torch.Tensor) -> None:
        """Ask the exit after this layer, if it ends here and there is one, which rows are sure, and let them leave."""
        index = self.steps.ends.get(at, -1)
        head = self.heads.get(str(index))
        if head is None:
            return
        logits = head(hidden, self.tokens[head.pool])  # type: ignore[index]
        if self.rows is not None and len(logits) != len(self.rows):
            raise CompressionError(
                f"Layer {index} gives {len(logits)} entries for {len(self.rows)} rows; exits are not offered."
            )
        self.logits[index] = logits
        if not self.leaves:
            return
        scores = self.criterion.score(list(self.logits.values()))
        sure = self.criterion.leaves(scores, self.thresholds[index])
        count = int(sure.sum())  # the only synchronisation of this exit
        if not self.criterion.history:
            self.logits.clear()
        if not count:
            return
        order = sure.to(torch.uint8).argsort(stable=True)
        stay, leave = order[: len(order) - count], order[len(order) - count :]
        if self.rows is None:
            self.count, self.rows = len(order), torch.arange(len(order), device=hidden.device)
        self.gone.append((self.rows[leave], logits[leave], torch.full_like(leave, index)))
        self.rows, self.compact = self.rows[stay], hidden.index_select(0, stay)
        self.logits = {layer: past[stay] for layer, past in self.logits.items()}
        self.tokens = {pool: None if tokens is None else tokens[stay.to(tokens.device)] for pool, tokens in self.tokens.items()}
        self.picked.clear()

    def _pick(self, at: int, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """The rows that are still there, of a tensor that a step is given."""
        many = self._entries_of(at, GIVEN, path, tensor, self.count)
        if not many:
            return tensor
        if tensor is self.full and self.compact is not None and len(self.compact) == many * len(self.rows):  # type: ignore[arg-type]
            if self.version is not None and _version(tensor) == self.version:
                return self.compact
        if id(tensor) not in self.picked:  # layers share masks and positions
            entries = _entries(self.rows, many).to(tensor.device)  # type: ignore[arg-type]
            self.picked[id(tensor)] = tensor, tensor.index_select(0, entries)
        return self.picked[id(tensor)][1]

    def _other(self, path: str, value: Any) -> Any:
        if isinstance(value, Cache):  # made by this forward, which nobody asked for one: layers compute the same without
            return None
        if not isinstance(value, PLAIN):
            raise CompressionError(
                f"A layer takes a {type(value).__name__} ({path.partition('.')[2]}), which cannot be split into rows. Use "
                "attn_implementation='sdpa' or 'eager', or set_exits_(model, enabled=False)."
            )
        return value

    def _key(self, at: int, side: str, path: str, tensor: torch.Tensor, rows: int) -> tuple:
        # a tensor that has one entry for all rows in one batch may have one for each in another
        return self.steps.names[at], self.attention, side, path, tensor.ndim, len(tensor) == 1, rows == 1

    def _entries_of(self, at: int, side: str, path: str, tensor: torch.Tensor, rows: int) -> int:
        if not tensor.ndim:
            return 0
        key = self._key(at, side, path, tensor, rows)
        return self.by_row[key] if key in self.by_row else self.steps.by_row[key]

    def _learn(self, at: int, side: str, found: Mapping[str, torch.Tensor], rows: int) -> None:
        """Find out how many entries tensors have for each of `rows` rows, where it is not known yet."""
        keys = {path: self._key(at, side, path, tensor, rows) for path, tensor in found.items() if tensor.ndim}
        for key in keys.values():  # it may be another tensor in this step
            self.by_row.pop(key, None)
        unknown = {}
        for path, key in keys.items():
            many = self.steps.by_row.get(key)
            if many is None or (many and len(found[path]) != many * rows):  # as many as tokens, in a batch of other lengths
                unknown[key] = path, found[path]
        if not unknown:
            return
        if self.probe is None:
            self.probe = self._one_row_more()
        learned = {}
        for key, (path, tensor) in unknown.items():
            now, then = tuple(tensor.shape), self.probe.shapes.get((at, side, path))
            many, over = divmod(now[0], rows)
            if not over and many and then == (many * self.probe.rows, *now[1:]):
                sure = many == 1 or self._side_by_side(at, side, path, tensor, rows)
                if sure is False:
                    raise CompressionError(self._cannot_tell(at, path, now, rows, then))
                (self.by_row if sure is None else learned)[key] = many
            elif then == now:
                learned[key] = 0
            else:
                raise CompressionError(self._cannot_tell(at, path, now, rows, then))
        self.steps.by_row.update(learned)

    def _side_by_side(self, at: int, side: str, path: str, tensor: torch.Tensor, rows: int) -> bool | None:
        """Whether the entries of each row lie side by side; None where all are equal, as in a mask of rows without padding.

        The probe's extra row alone may be where it must be by chance: if its entries also fit another order, those of all rows
        are compared with those that it has.
        """
        assert self.probe is not None
        key = at, side, path
        if key not in self.probe.blocks or key not in self.probe.unsure:
            return key in self.probe.blocks
        if all_equal(tensor):
            return None
        seen = self.probe.unsure[key]
        if seen is None:
            return False
        there = self.rows if side == GIVES else slice(rows)
        first, *others = (
            alike(one, other[there]) for one, other in zip(orders(tensor, rows), orders(seen, self.probe.rows), strict=True)
        )
        return first and not any(others)

    def _cannot_tell(self, at: int, path: str, now: tuple[int, ...], rows: int, then: tuple[int, ...] | None) -> str:
        more = self.probe.rows if self.probe else 0
        return (
            f"{path.partition('.')[2] or 'what it gives'!r}, a tensor of layer {self.steps.layer_of(at)}, is {now} for {rows} "
            f"rows and {then} for {more}: its rows cannot be told apart, so none can leave. set_exits_(model, enabled=False) "
            "runs all."
        )

    def _one_row_more(self) -> Probe:
        inputs = {name: value for name, value in self.inputs.items() if name not in ("labels", "num_items_in_batch")}
        failed: Exception | None = None
        for more, rows in more_rows(inputs, self.count):
            probe = Probe(self.steps, rows, self.count)
            try:
                self.run(probe, more)
            except CompressionError:
                raise
            except Exception as error:  # whatever a model does with inputs that do not fit together
                failed = error
                continue
            return probe
        raise CompressionError(
            "Which tensors have entries of rows is found by running the model with more rows, and it does not run so "
            f"({type(failed).__name__}: {failed}): some of its inputs ({', '.join(inputs)}) belong to rows without having one "
            "entry for each. set_exits_(model, enabled=False) runs all."
        ) from failed


def _entries(rows: torch.Tensor, many: int) -> torch.Tensor:
    """Where the entries of rows lie, of which each has `many` side by side."""
    return rows if many == 1 else (rows[:, None] * many + torch.arange(many, device=rows.device)).flatten()


def _hidden(given: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor] | None:
    """The hidden states, of all that a step is given."""
    path = next((path for path in ("0.0", "1.hidden_states") if path in given), next(iter(given), None))
    return None if path is None else (path, given[path])


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written into; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def main_of(outputs: Any) -> torch.Tensor:
    """The hidden states, of all that a layer gives: the first tensor."""
    found = next((tensor for _, tensor in tensors_in(outputs)), None)
    if found is None:
        raise CompressionError(f"A layer gives {type(outputs).__name__} without a tensor; exits are not offered.")
    return found
