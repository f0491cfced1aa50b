"""What a model says of gates on units, from a few batches: derivatives of the loss by them, and what they would multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..cutting import Block
from ..edits import CompressionError
from ..grams import real_rows, real_tokens, unlabelled
from ..probe import difference, tolerance
from .select import count_units, units_of

LossFn = Callable[[Any, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Gated:
    """Where gates on units would be: over the inputs of one module.

    Args:
        module (`str`): its name.
        units (`torch.Tensor`): the unit of each input column, -1 where there is none, shape (columns,).
        count (`int`): how many units there are.
        name (`str`): whose they are: what several modules say of the same units is added up.
        dim (`int`, defaults to -1): the dimension of the input along which columns lie.
    """

    module: str
    units: torch.Tensor
    count: int
    name: str
    dim: int = -1

    def fold(self, columns: torch.Tensor) -> torch.Tensor:
        """Sum over the columns of each unit: (..., columns) -> (..., units)."""
        own = self.units >= 0
        units, own = self.units[own].to(columns.device), own.to(columns.device)
        return columns.new_zeros(*columns.shape[:-1], self.count).index_add_(-1, units, columns[..., own])


def gates_of_blocks(blocks: Sequence[Block]) -> list[Gated]:
    return [Gated(block.out, units_of(block), count_units(block), block.name) for block in blocks]


def derivatives(
    model: nn.Module, gates: Sequence[Gated], batches: Iterable[Mapping[str, Any]], loss_fn: LossFn | None, score: str
) -> dict[str, torch.Tensor]:
    """`dL/dg` of every unit, by `Gated.name`, (samples, units), for the loss summed over the batch.

    A sample is a row of the batch. Where a module is given rows of something else (of tokens, of windows of a picture), those
    of a sample are added up; the whole batch is one sample where they are not shown to lie together (`_in_order`).
    """
    rows: dict[str, list[torch.Tensor]] = {gate.name: [] for gate in gates}
    now: dict[str, torch.Tensor] = {}
    ran: set[str] = set()
    samples = [0]
    ordered: set[str] | None = None

    def see(gate: Gated, inputs: torch.Tensor) -> torch.Tensor:
        ran.add(gate.module)
        # with all weights frozen, the graph starts at the first gate
        inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()

        def collect(grad: torch.Tensor) -> None:
            flat = (grad.detach() * inputs.detach()).float().movedim(gate.dim, -1)
            if flat.ndim > 2:
                flat = flat.flatten(1, -2).sum(1)
            if len(flat) != samples[0]:
                together = gate.module in (ordered or ()) and len(flat) % samples[0] == 0
                flat = flat.unflatten(0, (samples[0], -1)).sum(1) if together else flat.sum(0, keepdim=True)
            units = gate.fold(flat).cpu() * samples[0]  # the loss is a mean
            before = now.get(gate.name)  # a shared module runs many times
            if before is not None and before.shape != units.shape:
                raise CompressionError(
                    f"score={score!r} of {gate.module!r} cannot be told row by row: it is given {len(units)} rows where "
                    f"another call has {len(before)}. Use score='magnitude'."
                )
            now[gate.name] = units if before is None else before + units

        inputs.register_hook(collect)
        return inputs

    with _frozen(model, gates, see), torch.enable_grad():
        for batch in tqdm(batches, desc="score", unit="batch", leave=False, disable=None, delay=3):
            batch = _on_device(model, batch)
            samples[0] = _rows_of(batch)
            if ordered is None:
                ordered = _in_order(model, gates, batch)
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
    _all_ran(gates, ran)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def activations(model: nn.Module, gates: Sequence[Gated], batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Of what gates would multiply, by `Gated.name`: the share that is not zero, and the mean magnitude, (2, units).

    Over rows that no `attention_mask` hides.
    """
    sums = {gate.name: torch.zeros(2, gate.count) for gate in gates}
    counts = {gate.name: torch.zeros(gate.count) for gate in gates}
    ran: set[str] = set()
    now: list[Mapping[str, Any]] = [{}]
    ordered: set[str] | None = None

    def see(gate: Gated, inputs: torch.Tensor) -> torch.Tensor:
        if ordered is None:
            return inputs
        ran.add(gate.module)
        flat = inputs.detach().movedim(gate.dim, -1)
        mask = real_tokens(model, now[0], "decoder" in gate.module.split("."))
        if mask is not None and gate.module in (ordered or ()) and flat.shape[:-1] == (mask.numel(),):
            flat = flat.unflatten(0, mask.shape)
        flat = real_rows(flat, mask)
        statistics = torch.stack([(flat != 0).sum(0).float(), flat.float().abs().sum(0)])
        sums[gate.name] += gate.fold(statistics).cpu()
        counts[gate.name] += gate.fold(torch.full((flat.shape[1],), float(len(flat))))
        return inputs

    with _frozen(model, gates, see), torch.no_grad():
        for batch in tqdm(batches, desc="score", unit="batch", leave=False, disable=None, delay=3):
            batch = _on_device(model, batch)
            if ordered is None:
                ordered = _in_order(model, gates, batch)
            now[0] = unlabelled(model, batch)
            _forward(model, batch)
            now[0] = {}
    _all_ran(gates, ran)
    return {name: total / counts[name] for name, total in sums.items()}


def _rows_of(batch: Mapping[str, Any]) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 1)


def _in_order(model: nn.Module, gates: Sequence[Gated], batch: Mapping[str, Any]) -> set[str]:
    """The modules that are given several rows for each of the batch (tokens, windows), those of one beside each other.

    Seen from the first two rows of the batch, in both orders: what a module is given must change places by halves.
    """
    many = _rows_of(batch)
    if many < 2:
        return set()
    seen: list[dict[str, list[torch.Tensor]]] = []

    def note(name: str) -> Callable[..., None]:
        def before(_module: nn.Module, args: Any) -> None:
            if len(args[0]) != 2:
                seen[-1].setdefault(name, []).append(args[0].detach())

        return before

    with ExitStack() as stack, torch.no_grad():
        for gate in gates:
            stack.callback(model.get_submodule(gate.module).register_forward_pre_hook(note(gate.module)).remove)
        for rows in ([0, 1], [1, 0]):
            seen.append({})
            try:
                model(
                    **{k: v[rows] if isinstance(v, torch.Tensor) and v.ndim and len(v) == many else v for k, v in batch.items()}
                )
            except Exception:  # of inputs that are not one row each (patches of all pictures) two cannot be taken
                return set()

    def swapped(one: torch.Tensor, other: torch.Tensor) -> bool:
        halves = one.shape == other.shape and len(one) % 2 == 0
        return halves and difference(torch.cat(one.chunk(2)[::-1]), other) <= tolerance(one.dtype)

    return {
        name
        for name, calls in seen[0].items()
        if len(calls) == len(seen[1].get(name, ())) and all(map(swapped, calls, seen[1][name]))
    }


def _all_ran(gates: Sequence[Gated], ran: set[str]) -> None:
    idle = next((gate for gate in gates if gate.module not in ran), None)
    if idle is not None:
        raise CompressionError(f"{idle.name!r} never ran on these batches ({idle.module!r}); pass batches that use it.")


@contextmanager
def _frozen(model: nn.Module, gates: Sequence[Gated], see: Callable[[Gated, torch.Tensor], torch.Tensor]):
    """Eval mode, no weight gradients, hooks where gates would be; all of it undone at the end."""
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)  # a forward with labels writes its guess here
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for gate in gates:
            hook = model.get_submodule(gate.module).register_forward_pre_hook(_seen_by(see, gate))
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


def _seen_by(see: Callable[[Gated, torch.Tensor], torch.Tensor], gate: Gated) -> Callable[..., Any]:
    return lambda module, args: (see(gate, args[0]), *args[1:])


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    try:
        return model(**batch)
    except Exception as error:  # a model may refuse a batch in any way
        raise CompressionError(
            f"{type(model).__name__} does not run on a calibration batch ({', '.join(map(str, batch))}): "
            f"{type(error).__name__}: {error}"
        ) from error


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
