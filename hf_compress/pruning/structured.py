"""Structured tickets: heads and neurons by magnitude, as masks on the columns of output projections and as a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..cutting import Block
from ..discover import Attention, discover
from ..edits import CompressionError, KeepHeads
from ..modules import factor
from ..plan import Plan
from ..sparsity import Masks
from ..surgery import prove_plan
from .scores import magnitude
from .select import count_units, nothing_to_choose, plan_of, select, trial_plan, units_of, weight_squares


def blocks_of(model: nn.Module, heads: float, neurons: float) -> list[Block]:
    """The blocks that are pruned, with an output projection of their own.

    Raises:
        CompressionError: there is none of a kind that is asked for.
    """
    structure = discover(model)
    blocks: list[Block] = []
    for what, asked, found in (("heads", heads, structure.attentions), ("neurons", neurons, structure.own_ffns)):
        if asked:
            own = [block for block in found if block.consumer is None]
            if not own:
                raise CompressionError(nothing_to_choose(model, structure, what))
            blocks += own
    return blocks


def remove_units(
    model: nn.Module,
    heads: float,
    neurons: float,
    before: Plan,
    scope: str = "global",
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that keeps the heads and neurons of largest magnitude; what is gone in `before` never comes back.

    The magnitude of a unit is the L2 norm of all weights that would be cut with it (Li et al. 2017). What the plan cuts is
    proved on a trial first, so that a ticket which cannot be cut is refused before it is trained.
    """
    structure, blocks = discover(model), blocks_of(model, heads, neurons)
    found = prove_plan(model, trial_plan(model, structure, blocks), inputs)
    gone = {vars(e)["attention" if isinstance(e, KeepHeads) else "ffn"]: e for e in before}
    kept: dict[str, dict[str, list[int]]] = {"heads": {}, "neurons": {}}
    for kind, what, asked in ((True, "heads", heads), (False, "neurons", neurons)):
        mine = [block for block in blocks if isinstance(block, Attention) is kind]
        if not mine:
            continue
        scores = {block.name: magnitude(weight_squares(model, block, found)) for block in mine}
        alive = {}
        for block in mine:
            alive[block.name] = torch.ones(count_units(block), dtype=torch.bool)
            if block.name in gone:
                stays = set(vars(gone[block.name])[what])
                groups = block.num_heads // count_units(block) if isinstance(block, Attention) else 1
                alive[block.name] = torch.tensor([u * groups in stays for u in range(count_units(block))])
        kept[what] = select(scores, asked, scope=scope, alive=alive)
    return plan_of(structure, kept["heads"], kept["neurons"])


def masks_of(model: nn.Module, plan: Plan) -> Masks:
    """The plan as masks on the output projections of all blocks of its kinds: the columns of what stays."""
    structure = discover(model)
    kept = {vars(e)["attention" if isinstance(e, KeepHeads) else "ffn"]: e for e in plan}
    kinds = {isinstance(e, KeepHeads) for e in plan}
    masks = {}
    for block in (*structure.attentions, *structure.own_ffns):
        is_heads = isinstance(block, Attention)
        if is_heads not in kinds or block.consumer is not None:
            continue
        stays = torch.ones(block.num_heads if isinstance(block, Attention) else block.size, dtype=torch.bool)
        if block.name in kept:
            stays[:] = False
            stays[list(vars(kept[block.name])["heads" if is_heads else "neurons"])] = True
        columns = stays
        if isinstance(block, Attention):
            columns = stays[units_of(block) * (block.num_heads // count_units(block))]
        out = model.get_submodule(block.out)
        name, dim = factor(out, 1)
        weight = out.get_parameter(name)
        shape = [1] * weight.ndim
        shape[dim] = -1
        masks[f"{block.out}.{name}"] = columns.view(shape).expand(weight.shape).clone()
    return masks
