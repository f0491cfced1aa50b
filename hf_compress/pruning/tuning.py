r"""Scales for what stays: least-squares mask tuning (Kwon et al. 2022, arXiv:2204.09656, section 4.3).

A projection `y = sum_u W_u x_u + b` keeps some units `u` (the columns of a head, of a neuron), each with a scale:

    min_s  E |t - b - sum_u s_u W_u x_u|^2 + damping |s - 1|^2,

`t` what the layer of the dense model has where the projection's output is added, less what is there without it (see
`calibrate`): layer by layer, those before as they are cut by then. With the moments that `calibrate` collects,

    G_uv = sum over columns c of u, d of v of (W'W)_cd E[x x']_cd,    h_u = sum over c of u of W_c' (E[t x'] - b E[x]')_c

and `s = 1 + (G + damping)^-1 (h - G 1)`. The scales go into the columns of W, so the cut model has nothing new to compute.
A block of which a scale lies outside [-10, 10] keeps ones, as in the paper (where that ends the tuning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..compensation import name_of
from ..cutting import Block
from ..discover import Structure
from ..modules import dense_weight
from ..plan import Plan
from .calibrate import Calibration, of_the_first
from .compensate import DAMPING, has_own_weights, layer_by_layer
from .select import units_of
from .surgeon import Moments

logger = logging.get_logger(__name__)

LIMIT = 10.0


def scales(
    moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None, units: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """The scales that bring a projection closest to its target.

    Args:
        moments (`Moments`): of all its inputs, beside the target.
        weight (`torch.Tensor`): W, shape (out, in).
        bias (`torch.Tensor`, *optional*): b, shape (out,), which stays as it is.
        units (`torch.Tensor`): the unit of each column from 0, -1 for those that go, shape (in,).
        damping (`float`, defaults to 0.01): how strongly scales are held to 1, as a fraction of the mean of the diagonal of G.

    Returns:
        one scale a unit; ones where one would lie outside [-10, 10].

    Example: of two neurons that give the same one goes, and the other does the work of both.

    ```python
    >>> import torch
    >>> from hf_compress.pruning.surgeon import Moments
    >>> from hf_compress.pruning.tuning import scales
    >>> x, weight = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.5, 0.5]])
    >>> moments = Moments.empty(2, 1)
    >>> moments.add_(x, x @ weight.T)
    >>> scales(moments, weight, None, torch.tensor([0, -1]), damping=0.0)
    tensor([2.])

    ```
    """
    columns = (units >= 0).nonzero().flatten()
    owner, count = units[columns], int(units.max()) + 1
    where = "cpu" if moments.xx.device.type == "mps" else moments.xx.device  # which has no float64
    columns, owner, n = columns.to(where), owner.to(where), max(moments.count, 1.0)
    kept = weight.detach().to(where, torch.float64)[:, columns]
    second = moments.xx.to(where)[columns][:, columns].double() / n
    cross = moments.tx.to(where)[:, columns].double() / n
    if bias is not None:
        cross = cross - bias.detach().to(where, torch.float64)[:, None] * (moments.x.to(where)[columns].double() / n)
    pairs = second * (kept.T @ kept)
    gram = pairs.new_zeros(count, len(columns)).index_add_(0, owner, pairs)
    gram = gram.new_zeros(count, count).index_add_(1, owner, gram)
    meant = gram.new_zeros(count).index_add_(0, owner, (kept * cross).sum(0))
    amount = (damping * gram.diagonal().mean()).clamp_min(1e-20)
    held = gram + amount * torch.eye(count, dtype=gram.dtype, device=gram.device)
    step = torch.linalg.lstsq(held.cpu(), (meant - gram.sum(1)).cpu()[:, None]).solution[:, 0]
    found = 1 + step
    fits = bool(torch.isfinite(found).all()) and float(found.abs().max()) <= LIMIT
    return (found if fits else torch.ones_like(found)).float()


def tuned(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    kept: Mapping[str, Sequence[int]],
    batches: Sequence[Mapping[str, Any]],
    damping: float = DAMPING,
) -> Plan:
    """The same cuts, with the scales of what stays in their weights (`given=True`).

    Blocks whose output projection is no Linear of their own (experts, weights that others share) keep theirs, and are named.
    In several processes the cuts are the first one's, and each fits on its share of the batches.

    Args:
        plan (`Plan`): of `KeepHeads` and `KeepNeurons`.
        kept (`dict`): by block, the units that stay.
        batches (`Sequence[dict]`): as for `model(**batch)`; labels are not read.
    """
    kept, plan = of_the_first(lambda: (kept, plan))
    edited = {name: edit for edit in plan if (name := name_of(edit)) is not None}
    blocks: list[Block] = [block for block in (*structure.attentions, *structure.ffns) if block.name in edited]
    able = [block for block in blocks if has_own_weights(model, structure, block)]
    if len(able) < len(blocks):
        left = [block.name for block in blocks if block not in able]
        logger.warning(
            f"Not tuned, without a Linear of their own at the end: {', '.join(left[:4])}{', ...' * (len(left) > 4)}."
        )
    if not able:
        return plan
    calibration = Calibration(model, structure, able, batches)
    beyond: list[str] = []

    def solve(block: Block, moments: Moments) -> tuple[torch.Tensor, torch.Tensor, None]:
        module: Any = calibration.modules[block.out]
        weight, stay = dense_weight(module), torch.tensor(kept[block.name])
        number = torch.full((int(units_of(block)[-1]) + 1,), -1)
        number[stay] = torch.arange(len(stay))
        units = number[units_of(block)]
        found = scales(moments, weight, getattr(module, "bias", None), units, damping)
        if bool((found == 1).all()):
            beyond.append(block.name)
        own = units[units >= 0]
        return stay, weight[:, (units >= 0).to(weight.device)].detach().float() * found[own].to(weight.device), None

    done = layer_by_layer(calibration, edited, solve, "tune")
    if beyond:
        logger.warning(
            f"Not scaled, since a scale would lie outside [-{LIMIT:g}, {LIMIT:g}] (more batches help, or removing less): "
            f"{', '.join(beyond[:4])}{', ...' * (len(beyond) > 4)}."
        )
    new = {name_of(edit): edit for edit in done}
    return Plan([new.get(name, edit) for name, edit in edited.items()], done.tensors)
