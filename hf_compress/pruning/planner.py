"""`plan_pruning`: scores from a few batches, and the plan that keeps what scores highest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..cutting import Block
from ..discover import Structure, discover
from ..edits import CompressionError, KeepChannels
from ..grams import checked_batches
from ..plan import Plan
from ..refusals import check_foreign
from ..surgery import prove_plan
from .channels import plan_channels
from .measured import LossFn, activations, derivatives, gates_of_blocks
from .scores import SCORES
from .select import (
    check_measurable,
    check_options,
    check_seed,
    count_units,
    multiples_of,
    nothing_to_choose,
    plan_of,
    select,
    trial_plan,
    warn_if_off,
    weight_squares,
)
from .tuning import tuned


def plan_pruning(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    heads: float = 0.0,
    neurons: float = 0.0,
    channels: float = 0.0,
    score: str = "taylor",
    scope: str = "global",
    uniform: bool = False,
    round_to: int | None = None,
    tune: bool | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Plan:
    """A plan that removes the least important heads and neurons, measured on a few batches. The model is not changed.

    Scores that need a loss see one forward and one backward pass per batch, in eval mode, through the activations only
    (no weight gets a gradient). Under grouped-query attention a whole kv group goes at a time; under multi-query
    attention, query heads do.

    Args:
        model (`nn.Module`): a transformers model.
        batches (`Iterable[dict]`, *optional*): calibration batches, as for `model(**batch)`; a few hundred rows are
            enough. Not read by `"magnitude"` and `"random"`.
        heads (`float`, defaults to 0.0): the fraction of all heads to *remove*, in [0, 1).
        neurons (`float`, defaults to 0.0): the fraction of all FFN neurons to *remove*, in [0, 1).
        channels (`float`, defaults to 0.0): the fraction of all channels that can go to *remove*, in [0, 1); by any score
            but `"fisher"`. The model runs once more, on the first batch if there is one (see `channel_groups`).
        score (`str`, defaults to `"taylor"`): `"taylor"` (Molchanov 2019), `"gradient"` (Michel 2019), `"magnitude"`,
            `"activation"` (how often a neuron is not zero; for smooth activations and for heads the mean magnitude), `"fisher"`
            (Kwon 2022: as many of each block as by `"taylor"`, chosen together by the block's whole Fisher matrix, and
            tuned) or `"random"`; formulas in `hf_compress.pruning.scores`. `"movement"` is learned in a `PruningCallback`.
        scope (`str`, defaults to `"global"`): rank all layers together, or (`"layer"`) remove the same fraction of each.
        uniform (`bool`, defaults to `False`): give every layer the same width, so that the result stays a stock
            checkpoint where the architecture's config can say it.
        round_to (`int`, *optional*): round kept neurons to a multiple of this (32 suits most kernels). By default experts that
            transformers multiplies by `grouped_mm` keep a multiple of 8, which that needs, and nothing else is rounded.
        tune (`bool`, *optional*): scale each head and neuron that stays so that every layer gives what it gave, by least
            squares (Kwon 2022; see `hf_compress.pruning.tuning`). By default with `"fisher"` alone. The scales are in the
            plan's tensors.
        loss_fn (`Callable`, *optional*): `loss_fn(outputs, batch)`, a scalar, where the model computes no loss of its own
            from `labels`.
        seed (`int`, defaults to 0): of `"random"`.

    Returns:
        `Plan`: `KeepHeads` and `KeepNeurons` for every block that loses something.

    Raises:
        CompressionError: a fraction outside [0, 1), an unknown score or scope, nothing to cut, a `round_to` that the experts
            cannot have, no batches or no loss for a score that needs them, or no batches to tune on.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_compress import plan_pruning
    >>> _ = torch.manual_seed(0)
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> batch = {"input_ids": torch.arange(5, 29).view(4, 6), "labels": torch.tensor([0, 1, 0, 1])}
    >>> plan = plan_pruning(model, [batch], heads=0.5, neurons=0.75, score="taylor", uniform=True)
    >>> [len(edit.heads) for edit in plan.edits[:2]], [len(edit.neurons) for edit in plan.edits[2:]]
    ([2, 2], [16, 16])

    ```
    """
    check_options(heads, neurons, score, scope, round_to, uniform, channels)
    check_seed(seed)
    if tune is not None and not isinstance(tune, bool):
        raise CompressionError(f"tune must be True or False, got {tune!r}.")
    tune = SCORES[score].tunes if tune is None else tune
    if loss_fn is not None and not callable(loss_fn):
        raise CompressionError(f"loss_fn must be a function of (outputs, batch), got {loss_fn!r}.")
    if batches is not None and (isinstance(batches, str | Mapping | torch.Tensor) or not isinstance(batches, Iterable)):
        raise CompressionError(f"batches must be a sequence of dicts, as for model(**batch), got {type(batches).__name__}.")
    if not isinstance(model, nn.Module):
        raise CompressionError(f"model must be a model (a torch.nn.Module), got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)  # torch.compile
    check_foreign(model)
    structure = discover(model)
    if any(p.is_meta for p in model.parameters()):
        raise CompressionError("The model is on the meta device and has no weights to score; load it first.")
    for fraction, blocks, what in ((heads, structure.attentions, "heads"), (neurons, structure.own_ffns, "neurons")):
        if fraction and not blocks:
            raise CompressionError(nothing_to_choose(model, structure, what))
    multiples = multiples_of(structure.own_ffns if neurons else (), round_to)
    if tune and batches is not None:
        batches = checked_batches(batches)  # they are read twice
    elif tune and score in ("magnitude", "random"):
        raise CompressionError("tune=True fits scales on data: pass batches.")
    wanted: list[Block] = [*(structure.attentions if heads else ()), *(structure.own_ffns if neurons else ())]
    cut_channels: list[KeepChannels] = []
    if channels:
        if batches is not None and not isinstance(batches, Sequence):
            batches = list(batches)
        first = batches[0] if batches else None
        options: dict[str, Any] = dict(
            score=score, scope=scope, uniform=uniform, round_to=round_to or 1, seed=seed, inputs=first
        )
        cut_channels = plan_channels(model, channels, **options, batches=batches, loss_fn=loss_fn)
    if not wanted:
        return Plan(cut_channels)
    measured, rows = _measure(model, structure, wanted, batches, score, loss_fn, seed)
    arrange = SCORES[score].arrange
    kept: dict[str, dict[str, list[int]]] = {}
    for what, fraction, blocks in (("heads", heads, structure.attentions), ("neurons", neurons, structure.own_ffns)):
        scores = {block.name: SCORES[score].per_layer(measured[block.name]) for block in blocks if block in wanted}
        unfit = [name for name, s in scores.items() if not bool(torch.isfinite(s).all())]
        if unfit:
            raise CompressionError(
                f"The scores of {unfit[0]!r} are not finite; the model's weights or the batches hold NaN or infinite values."
            )
        kept[what] = select(scores, fraction, scope=scope, uniform=uniform, round_to=multiples)
        if scores:
            warn_if_off(what, fraction, kept[what], {name: len(s) for name, s in scores.items()}, multiples)
        if arrange is not None:
            kept[what] = {name: arrange(rows[name], units) for name, units in kept[what].items()}
    plan = plan_of(structure, kept["heads"], kept["neurons"])
    if tune and batches is not None and len(plan):
        plan = tuned(model, structure, plan, {**kept["heads"], **kept["neurons"]}, batches)  # type: ignore[arg-type]
    return plan + Plan(cut_channels)


def _measure(
    model: nn.Module,
    structure: Structure,
    wanted: list[Block],
    batches: Iterable[Mapping[str, Any]] | None,
    score: str,
    loss_fn: LossFn | None,
    seed: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One number per unit, by block; and the derivatives (samples, units) that it comes from, if it does."""
    how = SCORES[score]
    if how.needs == "weight":
        fused = [block for block in wanted if any(part.layout is None for part in block.parts)]
        first = batches[0] if isinstance(batches, Sequence) and batches else None
        found = prove_plan(model, trial_plan(model, structure, fused), first) if fused else {}
        return {block.name: how.reduce(weight_squares(model, block, found)) for block in wanted}, {}
    if how.needs == "seed":
        order = {b.name: i for i, b in enumerate((*structure.attentions, *structure.ffns))}
        return {b.name: how.reduce(count_units(b), seed=seed * 100_003 + order[b.name]) for b in wanted}, {}
    if batches is None:
        raise CompressionError(f"score={score!r} is measured on data: pass batches, or use 'magnitude' or 'random'.")
    check_measurable(model, wanted, score)
    gates = gates_of_blocks(wanted)
    if how.needs == "gradient":
        rows = derivatives(model, gates, batches, loss_fn, score)
        return {name: how.reduce(parts) for name, parts in rows.items()}, rows
    return {name: how.reduce(statistics) for name, statistics in activations(model, gates, batches).items()}, {}
