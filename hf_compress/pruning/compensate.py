"""Second-order pruning to given sizes: what to keep of each block, and the weights that make up for the rest."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..compensation import is_plain, names_given
from ..cutting import Block
from ..discover import Attention, Structure
from ..edits import CompressionError, KeepHeads, KeepNeurons
from ..modules import dense_weight
from ..plan import Plan
from .calibrate import Calibration, weights
from .search import Database
from .select import heads_of, units_of
from .sensitivity import sensitivities
from .surgeon import Moments, Regression, removals

logger = logging.get_logger(__name__)

DAMPING = 0.01


@dataclass(frozen=True)
class Curve:
    """What a block loses by size: `errors[k]`, with k units gone, as a share of the mean square of its output."""

    units: int
    errors: torch.Tensor

    def at(self, sizes: Iterable[int]) -> dict[int, float]:
        """What is lost with these sizes, as far as there are so many units."""
        return {size: float(self.errors[self.units - size]) for size in sizes if size <= self.units}

    def shares(self, sizes: Iterable[int]) -> list[list[float]]:
        """Pairs of (units that stay, share of the loss without any), the smallest first: JSON-ready.

        Example:

        ```python
        >>> import torch
        >>> from hf_compress.pruning.compensate import Curve
        >>> Curve(3, torch.tensor([0.0, 1.0, 2.0, 8.0])).shares([3, 1])
        [[1, 0.25], [3, 0.0]]

        ```
        """
        whole = float(self.errors[-1]) or 1.0
        return [[size, error / whole] for size, error in sorted(self.at(sizes).items())]


def has_own_weights(model: nn.Module, structure: Structure, block: Block) -> bool:
    """Whether a block's output projection can be given other weights: a Linear that nothing else uses.

    Experts cannot: they are given the tokens that a router sends them, which are others once a layer before is cut.
    """
    experts = tuple(f"{mixture.name}." for mixture in structure.experts)
    return (
        block.consumer is None
        and not getattr(block, "twins", ())
        and is_plain(model.get_submodule(block.out))
        and not (experts and f"{block.name}.".startswith(experts))
    )


def curves(
    calibration: Calibration,
    damping: float = DAMPING,
    scales: Mapping[str, torch.Tensor] | None = None,
    grids: Mapping[str, Sequence[int]] | None = None,
    database: Database | None = None,
) -> dict[str, Curve]:
    """Every block of the dense model at every size, in one pass over its layers.

    Args:
        calibration (`Calibration`): of the model.
        damping (`float`, defaults to 0.01): see `Regression`.
        scales (`dict[str, torch.Tensor]`, *optional*): by block, the weight of each output, (out,); without, errors are
            divided by the mean square of the block's output.
        grids (`dict[str, Sequence[int]]`, *optional*): by block, sizes for which the projection itself is wanted.
        database (`Database`, *optional*): where these projections go.
    """
    found: dict[str, Curve] = {}
    for segment in tqdm(calibration.segments, desc="curves", unit="layer", leave=False, disable=None, delay=3):
        calibration.begin(segment, False)
        groups = [segment.blocks] if segment.path else [[block] for block in segment.blocks]
        for moments in (calibration.moments(segment, group) for group in groups):
            for block in segment.blocks:
                if block.name not in moments:
                    continue
                module: Any = calibration.modules[block.out]
                bias = getattr(module, "bias", None)
                regression = Regression(moments[block.name], dense_weight(module), bias, damping)
                scale = None if scales is None else scales[block.name]
                order, errors = removals(regression, units_of(block), scale)
                for size in (grids or {}).get(block.name, ()):
                    if database is not None and 0 < size < len(order):
                        columns = torch.isin(units_of(block), order[len(order) - size :]).nonzero().flatten()
                        weight, shift = regression.solve(columns)
                        database[block.name, size] = columns, weight.to(torch.bfloat16).cpu(), shift
                if scale is None:
                    errors = errors / errors[-1].clamp_min(1e-12)
                found[block.name] = Curve(len(errors) - 1, errors)
        calibration.end(segment)
    return found


def losses_of(
    calibration: Calibration,
    damping: float = DAMPING,
    grids: Mapping[str, Sequence[int]] | None = None,
    database: Database | None = None,
) -> dict[str, Curve]:
    """Every block's `Curve`, weighed by how much the outputs depend on it; blocks on which they do not are left out."""
    scales = sensitivities(calibration)
    idle = [block.name for block in calibration.blocks if block.name not in scales]
    if len(idle) == len(calibration.blocks):
        raise CompressionError(
            f"What this {type(calibration.model).__name__} predicts on the calibration batches depends on none of its "
            f"{len(idle)} blocks, so nothing can be said of what they are worth. Give batches on which it does."
        )
    if idle:
        logger.warning(f"The outputs do not depend on {', '.join(idle[:4])}{', ...' * (len(idle) > 4)}: left whole.")
        calibration.leave_out(idle)
    return curves(calibration, damping, scales, grids, database)


# (block, what enters its projection beside what should leave it) -> units that stay, weights on their columns, bias
Solve = Callable[[Block, Moments], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def compensated(calibration: Calibration, sizes: Mapping[str, int], damping: float = DAMPING) -> tuple[Plan, dict[str, float]]:
    """The plan that leaves each block so many units, with the weights of its projections.

    Returns:
        (the plan, by block the share of what its output should vary by that is lost, with what layers before have lost).
    """
    lost: dict[str, float] = {}

    def solve(block: Block, moments: Moments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        module: Any = calibration.modules[block.out]
        regression = Regression(moments, dense_weight(module), getattr(module, "bias", None), damping)
        units = units_of(block)
        order, _ = removals(regression, units)
        kept = order[len(order) - sizes[block.name] :].sort().values
        columns = torch.isin(units, kept).nonzero().flatten()
        weight, shift = regression.solve(columns)
        lost[block.name] = regression.lost(columns, weight)
        return kept, weight, shift

    return layer_by_layer(calibration, sizes, solve, "prune"), lost


def layer_by_layer(calibration: Calibration, names: Container[str], solve: Solve, what: str) -> Plan:
    """The plan of what `solve` leaves of these blocks, with their new weights.

    Layers in order: what later ones are calibrated on is the model as it is cut by then.
    """
    model, new = calibration.model, {}
    edits: dict[str, KeepHeads | KeepNeurons] = {}
    tensors: dict[str, torch.Tensor] = {}
    for segment in tqdm(calibration.segments, desc=what, unit="layer", leave=False, disable=None, delay=3):
        calibration.begin(segment, False)
        with weights(model, new):
            calibration.begin(segment, True) if new else calibration.share(segment)
        mine = [block for block in segment.blocks if block.name in names]
        for group in [mine] if segment.path else [[block] for block in mine]:
            targets = calibration.targets(segment, group)
            for block in group:
                with weights(model, new):
                    moments = calibration.regression(segment, block, targets.pop(block.name))
                kept, weight, shift = solve(block, moments)
                module: Any = calibration.modules[block.out]
                columns = torch.isin(units_of(block), kept).nonzero().flatten()
                full = torch.zeros_like(dense_weight(module))
                full[:, columns.to(full.device)] = weight.to(full)
                new[block.out] = (full, None if shift is None else shift.to(full))
                edits[block.name] = _edit(block, kept)
                given = names_given(edits[block.name])
                tensors[given[0]] = weight.to(full).cpu()
                if shift is not None:
                    tensors[given[1]] = shift.to(full).cpu()
        with weights(model, new):
            calibration.advance(segment)
        calibration.end(segment)
    apart = [b.name for s in calibration.segments for b in s.blocks if b.name in names and s.places.get(b.name) is None]
    if apart:
        logger.warning_once(
            f"{len(apart)} of {len(edits)} blocks make up for what goes in them alone, not for the layers before: what they "
            f"give is not added to the hidden states as it is ({', '.join(apart[:4])}{', ...' * (len(apart) > 4)})."
        )
    return Plan([edits[block.name] for block in calibration.blocks if block.name in edits], tensors)


def _edit(block: Block, kept: torch.Tensor) -> KeepHeads | KeepNeurons:
    if isinstance(block, Attention):
        return KeepHeads(block.name, tuple(heads_of(block, kept.tolist())), given=True)
    return KeepNeurons(block.name, tuple(kept.tolist()), given=True)


def unit_counts(blocks: Sequence[Block]) -> dict[str, int]:
    """How many units each block has: heads, kv groups or neurons."""
    return {block.name: int(units_of(block)[-1]) + 1 for block in blocks}
