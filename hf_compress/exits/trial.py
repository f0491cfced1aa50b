"""Exits, tried before they are kept: a row is sent out at the first one, and the others must not notice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..edits import CompressionError
from ..probe import difference, example_inputs, quiet_run, tolerance
from .runtime import exit_layers, exits_off


def try_exits(model: nn.Module, options: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> None:
    """Refuse a model whose layers cannot run on fewer rows: they hand on more than hidden states, say.

    On a small batch, the first exit is made sure of the first row alone. It must leave there, and the other rows must come out
    as if it had stayed.
    """
    name = type(model).__name__
    batch: dict[str, Any] = dict(example_inputs(model) if inputs is None else inputs)
    batch.pop("labels", None)
    batch = {k: torch.cat([v, v[:1]]) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
    head: Any = model.exit_heads[str(options["after"][0])]  # type: ignore[index]
    later: list[Any] = [model.exit_heads[str(i)] for i in options["after"][1:]]  # type: ignore[index]
    undecided = torch.zeros(options["num_labels"])

    def sure_of_one(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        found = undecided.to(logits).repeat(len(logits), 1)
        found[0, 0] = 1e4
        return found

    def unsure(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return undecided.to(logits).repeat(len(logits), 1)

    state = model.__dict__["_exits"]
    before = state.options, state.enabled
    hooks = [head.register_forward_hook(sure_of_one), *(h.register_forward_hook(unsure) for h in later)]
    state.options = {**state.options, "criterion": "confidence", "threshold": 0.999}
    state.enabled = True
    try:
        with quiet_run(model, exits=True) as run:
            with exits_off(model):
                expected = run(batch).logits
            got = run(batch).logits
            left = exit_layers(model).tolist()
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
    worst = difference(expected[1:], got[1:])
    if left[0] != options["after"][0] or any(i == left[0] for i in left[1:]) or worst > 10 * tolerance(expected.dtype):
        raise CompressionError(
            f"Exits cannot work in this {name}, so none were added: when one row leaves, the others come out otherwise (by "
            f"{worst:.1e} of the largest value)."
        )
