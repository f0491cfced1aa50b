"""Exits, tried before they are kept: a row is sent out at the first one, and the others must not notice."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..edits import CompressionError
from ..probe import difference, quiet_run, tolerance
from .places import longer_batch, rows_of, small_batch
from .runtime import exit_layers, exits_off


def try_exits(model: nn.Module, options: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> None:
    """Refuse a model whose layers cannot run on fewer rows: they hand on more than hidden states, say.

    On a small batch exits are made sure of some rows: the first of one row, then the last of another too, then the first of
    all. These must leave there, with what the exit says, and the other rows must come out as if they had stayed. So again with
    a mask that hides another number of tokens in each row, where the model takes one: rows without padding have equal masks,
    and do not tell whether each keeps its own.
    """
    name = type(model).__name__
    batch = small_batch(model, inputs)
    batch = longer_batch(model, batch)
    rows = rows_of(model, batch)
    after, state = options["after"], model.__dict__["_exits"]
    sure: dict[int, set[int]] = {}  # which rows each exit is sure of

    def say(index: int) -> Any:
        def hook(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
            there = range(len(logits)) if state.now.rows is None else state.now.rows.tolist()
            found = torch.zeros_like(logits)
            found[:, 0] = torch.tensor([1e4 * (row in sure.get(index, ())) for row in there]).to(logits)
            return found

        return hook

    heads: Any = model.exit_heads
    before = state.options, state.enabled
    hooks = [heads[str(index)].register_forward_hook(say(index)) for index in after]
    state.options = {**state.options, "criterion": "confidence", "threshold": 0.999}
    state.enabled = True
    # one row leaves at the first exit; one at each end; all at the first
    cases = [{after[0]: {0}}, {after[0]: {0}, after[-1]: {1}}, {after[0]: set(range(rows))}]
    try:
        with quiet_run(model, exits=True) as run:
            with exits_off(model):
                wanted = [(batch, run(batch).logits)]
                padded = _padded(model, batch, rows)
                if padded is not None:
                    with suppress(Exception):  # where the model takes no such mask, there is none to try
                        wanted.append((padded, run(padded).logits))
            for one, expected in wanted:
                for case in cases if rows > 2 else (cases[0], cases[2]):
                    sure = case
                    got = run(one).logits
                    _compare(name, expected, got, case, exit_layers(model).tolist())
    except CompressionError as error:
        raise CompressionError(f"Exits cannot work in this {name}, so none were added: {error}") from error
    except Exception as error:  # whatever a model does when rows are missing
        raise CompressionError(
            f"Exits cannot work in this {name}, so none were added: when a row leaves, it fails with "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        state.options, state.enabled = before
        for hook in hooks:
            hook.remove()


def _padded(model: nn.Module, batch: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """The same tokens with another number of the last ones hidden in each row."""
    ids = batch.get("input_ids")
    takes = "attention_mask" in inspect.signature(model.forward).parameters and "attention_mask" not in batch
    if not takes or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    length = ids.shape[1]
    hidden = [min(max(row, row * (length - 1) // rows), length - 1) for row in range(rows)]
    real = torch.arange(length)[None] < length - torch.tensor(hidden)[:, None]
    return {**batch, "attention_mask": real.to(ids)}


def _compare(name: str, expected: torch.Tensor, got: torch.Tensor, sure: Mapping[int, set[int]], left: list[int]) -> None:
    """Rows left where they were to, with what the exit said; the others came out as if none had."""
    where = {row: index for index, leaving in sure.items() for row in leaving}
    stay = [row for row in range(len(left)) if row not in where]
    worst = difference(expected[stay], got[stay])
    if worst > 10 * tolerance(expected.dtype):
        raise CompressionError(
            f"when {len(where)} of {len(left)} rows leave, the others come out otherwise (by {worst:.1e} of the largest value)."
        )
    said = all(got[row, 0] > 1e3 and not got[row, 1:].any() for row in where)
    if not said or any(left[row] != index for row, index in where.items()) or any(left[row] in sure for row in stay):
        raise CompressionError(f"rows leave elsewhere than where an exit is sure of them (after layers {left}).")
