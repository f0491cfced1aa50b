"""From scores to what stays: the units of a block, how many go, and which."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..cutting import Block, unit_columns
from ..discover import Attention, FeedForward, Part, Structure, nearest, owners
from ..edits import CompressionError, KeepHeads, KeepNeurons
from ..modules import dense_weight, is_gated
from ..plan import Plan
from .scores import PLANNED, SCORES, TRAINED

logger = logging.get_logger(__name__)

SCOPES = ("global", "layer")


def nothing_to_choose(model: nn.Module, structure: Structure, what: str) -> str:
    """What to say where planners find no heads or no neurons to choose from."""
    twins = [ffn.name for ffn in structure.ffns if ffn.twins]
    if what == "neurons" and twins:
        return (
            f"The only neurons of this {type(model).__name__} are in weights that several modules share ({twins[0]!r}); a "
            "planner leaves those alone. Name what stays: KeepNeurons."
        )
    small = next((ffn for ffn in structure.ffns if ffn.size <= ffn.multiple != 1), None)
    if what == "neurons" and small is not None:
        return (
            f"The experts of this {type(model).__name__} ({small.name!r}) have {small.size} neurons each, and their kernel "
            f"takes multiples of {small.multiple}: none can go. Remove whole experts (plan_experts)."
        )
    return f"{type(model).__name__} has no {what} that can be cut; see discover(model)."


def check_options(
    heads: float,
    neurons: float,
    score: str,
    scope: str,
    round_to: int | None,
    uniform: bool,
    channels: float = 0.0,
    training: bool = False,
) -> None:
    """Refuse options that mean nothing, with what is allowed; `training`: those of a `PruningCallback`."""
    for name, value in (("heads", heads), ("neurons", neurons), ("channels", channels)):
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value < 1:
            raise CompressionError(f"{name} is the fraction to remove and must lie in [0, 1), got {value!r}.")
    if not isinstance(score, str) or score not in SCORES:
        raise CompressionError(f"Unknown score {score!r}{nearest(score, list(SCORES))} Known: {', '.join(SCORES)}.")
    if training and score not in TRAINED:
        raise CompressionError(
            f"score={score!r} chooses and scales what stays where no training follows: use plan_pruning, or here one of "
            f"{', '.join(TRAINED)} ('taylor' is its diagonal)."
        )
    if not training and score not in PLANNED:
        raise CompressionError(
            f"score={score!r} is learned while training: use PruningCallback(score={score!r}), or here one of "
            f"{', '.join(PLANNED)}."
        )
    if scope not in SCOPES:
        raise CompressionError(f"scope must be 'global' (rank all layers together) or 'layer' (each alone), got {scope!r}.")
    if not isinstance(uniform, bool):
        raise CompressionError(f"uniform must be True or False, got {uniform!r}.")
    if round_to is not None and (not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1):
        raise CompressionError(f"round_to must be a whole number of neurons >= 1, got {round_to!r}.")


def multiples_of(blocks: Iterable[Block], round_to: int | None) -> dict[str, int]:
    """Of what each block's neurons that stay are a multiple, where they are rounded at all.

    `round_to`, or (None) what the block needs: 8 for experts that transformers multiplies by `grouped_mm`.

    Raises:
        CompressionError: `round_to` is no multiple of what a block needs.
    """
    ffns = [block for block in blocks if isinstance(block, FeedForward)]
    unfit = [ffn for ffn in ffns if (round_to or ffn.multiple) % ffn.multiple]
    if round_to is not None and unfit:
        need = unfit[0].multiple
        raise CompressionError(
            f"round_to={round_to} does not fit the experts in {unfit[0].name!r} ({len(unfit)} such blocks): their kernel takes "
            f"multiples of {need}. Use a multiple of {need} (round_to={-(-round_to // need) * need}), or leave round_to out: "
            "experts are then rounded to what they need, and nothing else is."
        )
    return {ffn.name: round_to or ffn.multiple for ffn in ffns}


def check_seed(seed: int) -> None:
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise CompressionError(f"seed must be a whole number in [0, 2**31), got {seed!r}.")


def check_measurable(model: nn.Module, blocks: Sequence[Block], score: str) -> None:
    """Refuse a score that is read where a projection is called, for blocks that call none."""
    bare = [b for b in blocks if b.consumer is not None and not isinstance(model.get_submodule(b.out), nn.Linear)]
    if bare and SCORES[score].needs in ("gradient", "activation"):
        raise CompressionError(
            f"score={score!r} is read from what enters a projection, and {bare[0].name!r} ({len(bare)} such blocks) hands its "
            "weights to a kernel (experts). Use score='magnitude', or leave these out (neurons=0)."
        )


def units_of(block: Block) -> torch.Tensor:
    """The unit of each input column of the output projection: a neuron, a kv group, or a head where all share one kv."""
    columns = owners("q", block) if isinstance(block, Attention) else unit_columns(block)
    if isinstance(block, Attention) and block.num_key_value_heads > 1:
        return columns // block.groups
    return columns


def count_units(block: Block) -> int:
    return int(units_of(block)[-1]) + 1


def unit_of(block: Block) -> str:
    """What the units of a block are called: `"heads"`, `"kv groups"` (of heads that share keys) or `"neurons"`."""
    if not isinstance(block, Attention):
        return "neurons"
    return "kv groups" if 1 < block.num_key_value_heads < block.num_heads else "heads"


def heads_of(block: Attention, units: Sequence[int]) -> list[int]:
    """The query heads of kept units."""
    if block.num_key_value_heads == 1:
        return list(units)
    return [u * block.groups + i for u in units for i in range(block.groups)]


def fold(columns: torch.Tensor, block: Block) -> torch.Tensor:
    """Sum over the columns of each unit: (..., columns) -> (..., units)."""
    units = units_of(block).to(columns.device)
    return columns.new_zeros(*columns.shape[:-1], count_units(block)).index_add_(-1, units, columns)


def fold_mean(columns: torch.Tensor, block: Block) -> torch.Tensor:
    """Mean over the columns of each unit."""
    return fold(columns, block) / (columns.shape[-1] / count_units(block))


def alive_units(model: nn.Module, block: Block) -> torch.Tensor:
    """The units of a block that no mask hides."""
    out = model.get_submodule(block.out)
    units = torch.ones(count_units(block), dtype=torch.bool)
    if is_gated(out):
        units[units_of(block)[out.hfc_gate.cpu() == 0]] = False  # type: ignore[operator,union-attr]
    return units


def trial_plan(model: nn.Module, structure: Structure, blocks: Sequence[Block]) -> Plan:
    """Every second unit of these blocks: a plan to prove that they can be cut, and how their units lie."""
    alive = {b.name: alive_units(model, b).nonzero().flatten().tolist() for b in blocks}
    half = {name: units[::2] for name, units in alive.items()}
    for name, multiple in multiples_of(blocks, None).items():
        if len(alive[name]) > multiple > 1:
            count = max(multiple, len(half[name]) // multiple * multiple)
            half[name] = half[name][:count] if count <= len(half[name]) else alive[name][:count]
    heads = {b.name: half[b.name] for b in blocks if isinstance(b, Attention)}
    return plan_of(structure, heads, {name: kept for name, kept in half.items() if name not in heads})


def weight_squares(model: nn.Module, block: Block, found: Mapping[str, tuple[Part, ...]]) -> torch.Tensor:
    """Sum of the squared weights of each unit, over every projection that would be cut with it: shape (units,).

    `found`: by block, the parts that follow its units (`surgery.prove_plan`), where names leave that open.
    """
    units = count_units(block)
    if isinstance(block, Attention):
        groups = block.groups if block.num_key_value_heads > 1 else 1
        # owner -> units: a query head belongs to one; a kv head to its group, or to all heads where they share it
        belongs = torch.zeros(block.num_heads + block.num_key_value_heads, units)
        belongs[torch.arange(block.num_heads), torch.arange(block.num_heads) // groups] = 1
        belongs[block.num_heads :] = torch.eye(units) if block.num_key_value_heads > 1 else 1
    else:
        belongs = torch.eye(units)  # a neuron is its own unit
    total = torch.zeros(units)
    for part in found.get(block.name, block.parts):
        if part.argument is not None:
            continue
        module = model.get_submodule(part.module)
        owner = owners(part.layout, block) if part.owner is None else part.owner  # type: ignore[arg-type]
        if isinstance(module, nn.Linear | Conv1D):
            if part.parameter not in (None, "weight", "weight_in"):
                continue
            dim = 1 - part.dim if part.parameter is not None and isinstance(module, Conv1D) else part.dim
            weight = dense_weight(module)
        else:
            bare = module._parameters.get(part.parameter or "weight")
            if bare is None or bare.ndim < 3:  # experts; not biases, norms and tables
                continue
            dim, weight = part.dim, bare
        squares = weight.detach().float().square().sum([d for d in range(weight.ndim) if d != dim]).cpu()
        own = owner >= 0
        per_owner = torch.zeros(len(belongs)).index_add_(0, owner[own], squares[own])
        total += per_owner @ belongs
    return total


def warn_if_off(
    what: str,
    asked: float,
    kept: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    multiples: Mapping[str, int] | None = None,
) -> None:
    """Say so where rounding, or the one unit that every block keeps, makes the result another than what was asked."""
    total = sum(sizes.values())
    removed = 1 - sum(len(units) for units in kept.values()) / total
    rounded = [m for name, m in (multiples or {}).items() if name in sizes and m > 1]
    if total and abs(removed - asked) > 0.02:
        logger.warning(
            f"{removed:.1%} of the {what} will go and not the {asked:.1%} that was asked: every block keeps at least one unit, "
            f"and units are whole ({', '.join(map(str, sorted(set(sizes.values()))))} a block)"
            + (f"; {len(rounded)} of the blocks keep a multiple of {' or '.join(map(str, set(rounded)))}." if rounded else ".")
        )


def select(
    scores: Mapping[str, torch.Tensor],
    fraction: float,
    *,
    scope: str = "global",
    uniform: bool = False,
    round_to: int | Mapping[str, int] = 1,
    alive: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, list[int]]:
    """Which units stay when a fraction of all goes, the lowest scores first.

    `uniform` and `scope="layer"` remove the same fraction of every block; `"global"` ranks all blocks together.
    At least one unit of each block stays, or `round_to` of them where that is more than one.

    Args:
        scores: by block, shape (units,).
        fraction: of all units, to be removed, in [0, 1).
        round_to: kept counts are rounded to a multiple of this, the nearest; by block where it is a dict. A block that loses
            nothing keeps what it has.
        alive: by block, a mask of the units that are still there; the others never come back.

    Returns:
        by block, the sorted units that stay.
    """
    alive = alive or {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    multiples = {name: round_to.get(name, 1) if isinstance(round_to, Mapping) else round_to for name in scores}
    ranked = {n: torch.where(alive[n], s.double().cpu(), -float("inf")) for n, s in scores.items()}
    counts: dict[str, int] = {}
    if uniform or scope == "layer":
        for name, s in ranked.items():
            counts[name] = len(s) - round(fraction * len(s))
    else:
        total = sum(len(s) for s in ranked.values())
        budget = round(fraction * total)
        floor = {n: min(len(s), max(1, multiples[n])) for n, s in ranked.items()}
        # the best `floor` units of a block are never candidates, so the budget is met wherever that is possible
        candidates = [
            (value, name)
            for name, s in ranked.items()
            for value in s.sort().values[: len(s) - floor[name]].tolist()
        ]  # fmt: skip
        candidates.sort(key=lambda pair: pair[0])
        counts = {name: len(s) for name, s in ranked.items()}
        for _, name in candidates[:budget]:
            counts[name] -= 1
    kept = {}
    for name, s in ranked.items():
        count = _rounded(counts[name], multiples[name], int(alive[name].sum()), len(s))
        kept[name] = sorted(s.argsort(descending=True, stable=True)[:count].tolist())
    return kept


def _rounded(count: int, multiple: int, there: int, size: int) -> int:
    """The multiple nearest to a count, at least one and no more than are there; all where none goes."""
    count = max(1, min(count, there))
    if multiple == 1 or count == size:
        return count
    near = max(multiple, round(count / multiple) * multiple)
    if near <= there:
        return near
    return size if there == size else there // multiple * multiple or there  # what is masked does not come back


def plan_of(structure: Structure, heads: Mapping[str, list[int]], neurons: Mapping[str, list[int]]) -> Plan:
    """The plan that keeps these units, without the blocks that keep everything."""
    edits: list[KeepHeads | KeepNeurons] = []
    for attention in structure.attentions:
        if attention.name in heads and len(heads[attention.name]) < count_units(attention):
            edits.append(KeepHeads(attention.name, tuple(heads_of(attention, heads[attention.name]))))
    for ffn in structure.ffns:
        if ffn.name in neurons and len(neurons[ffn.name]) < ffn.size:
            edits.append(KeepNeurons(ffn.name, tuple(neurons[ffn.name])))
    return Plan(edits)
