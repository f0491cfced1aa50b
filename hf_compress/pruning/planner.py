"""`plan_pruning`: scores from a few batches, and the plan that keeps what scores highest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..cutting import Block
from ..discover import Structure, discover
from ..edits import CompressionError, KeepChannels
from ..plan import Plan
from ..refusals import check_foreign
from ..surgery import prove_plan
from .channels import plan_channels
from .scores import SCORES
from .select import (
    check_measurable,
    check_options,
    check_seed,
    count_units,
    fold,
    fold_mean,
    nothing_to_choose,
    plan_of,
    select,
    trial_plan,
    warn_if_off,
    weight_squares,
)


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
    round_to: int = 1,
    loss_fn: Callable[[Any, Mapping[str, Any]], torch.Tensor] | None = None,
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
        channels (`float`, defaults to 0.0): the fraction of all channels that can go to *remove*, in [0, 1); by `"magnitude"`
            or `"random"`. The model runs once, on the first batch if there is one (see `channel_groups`).
        score (`str`, defaults to `"taylor"`): `"taylor"` (Molchanov 2019), `"gradient"` (Michel 2019), `"magnitude"`,
            `"activation"` (how often a neuron is not zero; for smooth activations and for heads the mean magnitude) or
            `"random"`; formulas in `hf_compress.pruning.scores`.
        scope (`str`, defaults to `"global"`): rank all layers together, or (`"layer"`) remove the same fraction of each.
        uniform (`bool`, defaults to `False`): give every layer the same width, so that the result stays a stock
            checkpoint where the architecture's config can say it.
        round_to (`int`, defaults to 1): round kept neurons to a multiple of this (32 suits most kernels).
        loss_fn (`Callable`, *optional*): `loss_fn(outputs, batch)`, a scalar, where the model computes no loss of its own
            from `labels`.
        seed (`int`, defaults to 0): of `"random"`.

    Returns:
        `Plan`: `KeepHeads` and `KeepNeurons` for every block that loses something.

    Raises:
        CompressionError: a fraction outside [0, 1), an unknown score or scope, nothing to cut, no batches or no loss for a
            score that needs them.

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
    wanted: list[Block] = [*(structure.attentions if heads else ()), *(structure.own_ffns if neurons else ())]
    cut_channels: list[KeepChannels] = []
    if channels:
        first = batches[0] if isinstance(batches, Sequence) and batches else None
        options: dict[str, Any] = dict(score=score, scope=scope, uniform=uniform, round_to=round_to, seed=seed, inputs=first)
        cut_channels = plan_channels(model, channels, **options)
    if not wanted:
        return Plan(cut_channels)
    measured = _measure(model, structure, wanted, batches, score, loss_fn, seed)
    kept: dict[str, dict[str, list[int]]] = {}
    for what, fraction, blocks in (("heads", heads, structure.attentions), ("neurons", neurons, structure.own_ffns)):
        scores = {block.name: SCORES[score].per_layer(measured[block.name]) for block in blocks if block in wanted}
        unfit = [name for name, s in scores.items() if not bool(torch.isfinite(s).all())]
        if unfit:
            raise CompressionError(
                f"The scores of {unfit[0]!r} are not finite; the model's weights or the batches hold NaN or infinite values."
            )
        rounded = round_to if what == "neurons" else 1
        kept[what] = select(scores, fraction, scope=scope, uniform=uniform, round_to=rounded)
        if scores:
            warn_if_off(what, fraction, kept[what], {name: len(s) for name, s in scores.items()})
    return plan_of(structure, kept["heads"], kept["neurons"]) + Plan(cut_channels)


def _measure(
    model: nn.Module,
    structure: Structure,
    wanted: list[Block],
    batches: Iterable[Mapping[str, Any]] | None,
    score: str,
    loss_fn: Callable[[Any, Mapping[str, Any]], torch.Tensor] | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    """One number per unit, by block."""
    how = SCORES[score]
    if how.needs == "weight":
        fused = [block for block in wanted if any(part.layout is None for part in block.parts)]
        first = batches[0] if isinstance(batches, Sequence) and batches else None
        found = prove_plan(model, trial_plan(model, structure, fused), first) if fused else {}
        return {block.name: how.reduce(weight_squares(model, block, found)) for block in wanted}
    if how.needs == "seed":
        order = {b.name: i for i, b in enumerate((*structure.attentions, *structure.ffns))}
        return {b.name: how.reduce(count_units(b), seed=seed * 100_003 + order[b.name]) for b in wanted}
    if batches is None:
        raise CompressionError(f"score={score!r} is measured on data: pass batches, or use 'magnitude' or 'random'.")
    check_measurable(model, wanted, score)
    outs = {block.out: block for block in wanted}
    if how.needs == "gradient":
        rows = _derivatives(model, outs, batches, loss_fn, score)
        return {name: how.reduce(torch.cat(parts)) for name, parts in rows.items()}
    return {name: how.reduce(statistics) for name, statistics in _activations(model, outs, batches).items()}


def _derivatives(
    model: nn.Module,
    outs: dict[str, Block],
    batches: Iterable[Mapping[str, Any]],
    loss_fn: Callable[[Any, Mapping[str, Any]], torch.Tensor] | None,
    score: str,
) -> dict[str, list[torch.Tensor]]:
    """`dL/dg` of every unit, one row a sample (a row of the projection's input), for the loss summed over the batch."""
    rows: dict[str, list[torch.Tensor]] = {block.name: [] for block in outs.values()}
    now: dict[str, torch.Tensor] = {}

    def gate(out: str, inputs: torch.Tensor) -> torch.Tensor:
        # with all weights frozen, the graph starts at the first gate
        inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        block = outs[out]

        def collect(grad: torch.Tensor) -> None:
            flat = (grad.detach() * inputs.detach()).float()
            flat = flat.flatten(1, -2).sum(1) if flat.ndim > 2 else flat.sum(0, keepdim=True)
            units = fold(flat, block).cpu() * len(flat)
            now[block.name] = now[block.name] + units if block.name in now else units  # a shared module runs many times

        inputs.register_hook(collect)
        return inputs

    with _frozen(model, outs, gate), torch.enable_grad():
        for batch in tqdm(batches, desc="score", unit="batch", leave=False, disable=None, delay=3):
            batch = _on_device(model, batch)
            loss = _loss(_forward(model, batch), batch, loss_fn, score)
            now.clear()
            loss.backward()
            for name, units in now.items():
                rows[name].append(units)
    idle = [name for name, parts in rows.items() if not parts]
    if idle:
        raise CompressionError(
            f"No gradient reached {idle[0]!r} (of {len(idle)} such blocks): the batches are empty, or the loss does not "
            "depend on it. Pass batches that use it, or another score."
        )
    return rows


def _activations(model: nn.Module, outs: dict[str, Block], batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(outs, 0)

    def gate(out: str, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.detach().flatten(0, -2)
        statistics = torch.stack([(flat != 0).sum(0).float(), flat.float().abs().sum(0)]).cpu()
        sums[out] = sums.get(out, torch.zeros_like(statistics)) + statistics
        counts[out] += len(flat)
        return inputs

    with _frozen(model, outs, gate), torch.no_grad():
        for batch in tqdm(batches, desc="score", unit="batch", leave=False, disable=None, delay=3):
            _forward(model, _on_device(model, batch))
    if not all(counts.values()):
        idle = next(out for out, n in counts.items() if not n)
        raise CompressionError(f"{outs[idle].name!r} never ran on these batches; pass batches that use it.")
    return {outs[out].name: fold_mean(total / counts[out], outs[out]) for out, total in sums.items()}


@contextmanager
def _frozen(model: nn.Module, outs: Iterable[str], gate: Callable[[str, torch.Tensor], torch.Tensor]):
    """Eval mode, no weight gradients, hooks on the output projections; all of it undone at the end."""
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)  # a forward with labels writes its guess here
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for out in outs:
            hook = model.get_submodule(out).register_forward_pre_hook(_gate_input(gate, out))
            stack.callback(hook.remove)
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True
            if hasattr(config, "problem_type"):
                config.problem_type = kind


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    try:
        return model(**batch)
    except Exception as error:  # a model may refuse a batch in any way
        raise CompressionError(
            f"{type(model).__name__} does not run on a calibration batch ({', '.join(batch)}): {type(error).__name__}: {error}"
        ) from error


def _gate_input(gate: Callable[[str, torch.Tensor], torch.Tensor], out: str) -> Callable[..., Any]:
    return lambda module, args: (gate(out, args[0]), *args[1:])


def _on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise CompressionError(f"Each batch must be a dict, as for model(**batch), got {type(batch).__name__}.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _loss(outputs: Any, batch: Mapping[str, Any], loss_fn: Callable[..., torch.Tensor] | None, score: str) -> torch.Tensor:
    loss = loss_fn(outputs, batch) if loss_fn is not None else getattr(outputs, "loss", None)
    if loss is None:
        raise CompressionError(
            f"score={score!r} needs a loss, and the model gave none: put 'labels' into the batches, or pass "
            "loss_fn(outputs, batch), or use score='activation' or 'magnitude'."
        )
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise CompressionError(f"The loss must be one number, got {getattr(loss, 'shape', type(loss).__name__)}.")
    if not bool(torch.isfinite(loss).all()):
        raise CompressionError(
            f"The loss of a batch is {loss.item()}, so scores from it mean nothing. Look at the batch (are all its labels "
            "ignored?); score='magnitude' needs no loss."
        )
    if not loss.requires_grad:
        raise CompressionError("The loss does not depend on any head or neuron that was to be scored; look at loss_fn.")
    return loss.sum()
