"""How much a head or a neuron matters: one pure function a score, and the dict that lists them.

All scores see the same picture of a block: its output projection (the down projection of an FFN), whose input columns
belong to units (heads, kv groups or neurons), and a gate of one on every unit. To add a score, write one function and
list it in `SCORES`; the shared tests run over that dict. Scores of whole layers are in `LAYER_SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Score:
    """One importance score.

    Args:
        needs (`str`): what is measured: `"gradient"` (derivatives of the loss by the gates), `"activation"` (what enters
            the output projection), `"weight"` (nothing but the weights) or `"seed"`.
        reduce (`Callable`): from what was measured to one number a unit; see each function.
        per_layer (`Callable`, *optional*): what makes the scores of different blocks comparable.
        arrange (`Callable`, *optional*): `(derivatives, kept) -> kept`: which units of a block stay, once it is known how many.
        tunes (`bool`, defaults to `False`): whether `plan_pruning` scales what stays unless it is told not to.
        sums (`bool`, defaults to `False`): while training, steps are added up and not averaged.
        only (`str`, *optional*): `"plan_pruning"` or `"PruningCallback"`, where one of them alone takes it.
    """

    needs: str
    reduce: Callable[..., torch.Tensor]
    per_layer: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores
    arrange: Callable[[torch.Tensor, Sequence[int]], list[int]] | None = None
    tunes: bool = False
    sums: bool = False
    only: str | None = None


def magnitude(squares: torch.Tensor) -> torch.Tensor:
    """L2 norm of all weights of a unit: its rows of the incoming projections and its columns of the outgoing one.

    `score_u = sqrt(sum_{w in u} w^2)` (group magnitude, e.g. Li et al. 2017, arXiv:1608.08710).

    Args:
        squares: sums of squared weights, shape (units,).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import magnitude
    >>> magnitude(torch.tensor([4.0, 9.0]))
    tensor([2., 3.])

    ```
    """
    return squares.sqrt()


def gradient(derivatives: torch.Tensor) -> torch.Tensor:
    """Expected sensitivity of the loss to a unit's gate: `E_x |dL(x)/dg_u|`.

    Michel, Levy & Neubig 2019, *Are sixteen heads really better than one?* (arXiv:1905.10650), eq. 2. As there, scores
    are divided by the L2 norm of their layer before layers are compared.

    Args:
        derivatives: one row a sample, `dL/dg`, shape (samples, units).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import gradient
    >>> gradient(torch.tensor([[1.0, -2.0], [-1.0, 0.0]]))
    tensor([1., 1.])

    ```
    """
    return derivatives.abs().mean(0)


def taylor(derivatives: torch.Tensor) -> torch.Tensor:
    """Expected squared change of the loss when a unit is removed, to first order: `E_x (dL(x)/dg_u)^2`.

    Molchanov et al. 2019, *Importance estimation for neural network pruning* (arXiv:1906.10771), eq. 8, with a gate on
    the unit's output: at `g = 1` the derivative by the gate is the sum of `w * dL/dw` over the unit's output weights.

    Args:
        derivatives: one row a sample, `dL/dg`, shape (samples, units).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import taylor
    >>> taylor(torch.tensor([[1.0, -2.0], [-1.0, 0.0]]))
    tensor([1., 2.])

    ```
    """
    return derivatives.square().mean(0)


def activation(statistics: torch.Tensor) -> torch.Tensor:
    """How often a unit is not zero; where the activation is smooth, and for heads, its mean magnitude.

    The count of non-zeros (Hu et al. 2016, *Network trimming*, arXiv:1607.03250, one minus their APoZ) says something
    only where the activation gives exact zeros (ReLU and kin). GELU, SiLU and attention never do: where fewer than one
    value in a thousand is zero in the whole block, the mean absolute value is taken instead. Divided by the mean of
    the layer before layers are compared.

    Args:
        statistics: row 0 the fraction of non-zeros, row 1 the mean absolute value, shape (2, units).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import activation
    >>> activation(torch.tensor([[0.5, 0.1], [3.0, 9.0]])), activation(torch.tensor([[1.0, 1.0], [3.0, 9.0]]))
    (tensor([0.5000, 0.1000]), tensor([3., 9.]))

    ```
    """
    often, large = statistics
    return often if often.mean() < 0.999 else large


def random(units: int, seed: int) -> torch.Tensor:
    """The control: uniform numbers from a seed.

    Example:

    ```python
    >>> from hf_compress.pruning.scores import random
    >>> random(3, seed=0)
    tensor([0.4963, 0.7682, 0.0885])

    ```
    """
    return torch.rand(units, generator=torch.Generator().manual_seed(seed))


def movement(derivatives: torch.Tensor) -> torch.Tensor:
    """How far training moves a unit's weights away from zero: `-sum_t dL_t/dg_u`, over the steps `t` of the training.

    Sanh, Wolf & Rush 2020, *Movement pruning* (arXiv:2005.07683), eq. 3: `-sum_t sum_{w in u} w * dL_t/dw`, here over the
    weights that the unit's gate multiplies. It is positive where a step of gradient descent makes the weights larger. At which
    rate is left out, as there: it would be the same factor for all.

    Args:
        derivatives: one row a step, `dL/dg`, shape (steps, units).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import movement
    >>> movement(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]))
    tensor([2.0000, 1.5000])

    ```
    """
    return -derivatives.sum(0)


def rearranged(derivatives: torch.Tensor, kept: Sequence[int]) -> list[int]:
    """As many units, chosen anew by how they matter together: exchanges that lower `(1 - m)' F (1 - m)`.

    `F = E_x d(x) d(x)'` with `d = dL/dg` is the Fisher information of a block's gates, `m` the mask: to second order, what the
    loss gains when units go (its gradient is taken for zero, as in a trained model). `taylor` is the diagonal of `F`, which
    sees two units that do the same as two that matter little. As in Kwon et al. 2022, *A fast post-training pruning framework
    for transformers* (arXiv:2204.09656), section 4.2 and their code: each unit that stays, the least important first, changes
    places with the one that went for which the sum is lowest, if it is lower than before.

    Args:
        derivatives: one row a sample, shape (samples, units).
        kept: units that stay, by another score.

    Returns:
        the units that stay, sorted: as many.

    Example: the first two units undo each other, so they go together.

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import rearranged
    >>> rearranged(torch.tensor([[3.0, -3.0, 2.0], [-4.0, 4.0, 1.0]]), kept=[0])
    [2]

    ```
    """
    rows = derivatives.T.double().contiguous()  # (units, samples)
    gone = [unit for unit in range(len(rows)) if unit not in set(kept)]
    if not gone:
        return sorted(kept)
    stays = set(kept)
    removed, squares = rows[gone], rows.square().sum(1)
    total = removed.sum(0)
    own = squares[gone]
    for unit in sorted(kept, key=lambda u: float(squares[u])):
        both = total + rows[unit]
        costs = own - 2 * removed @ both  # less |both|^2, the same for all
        best = int(costs.argmin())
        if float(both.square().sum() + costs[best]) < float(total.square().sum()) * (1 - 1e-9):
            stays ^= {unit, gone[best]}
            total = both - removed[best]
            gone[best], removed[best], own[best] = unit, rows[unit], squares[unit]
    return sorted(stays)


def block_influence(cosines: torch.Tensor) -> torch.Tensor:
    """How much layers turn the hidden states: `1 - E[cos(h_i, h_{i+1})]`, over tokens that are no padding.

    Men et al. 2024, *ShortGPT: layers in large language models are more redundant than you expect* (arXiv:2403.03853), eq. 1.

    Args:
        cosines: mean cosine of what enters and what leaves each layer, shape (layers,).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.scores import block_influence
    >>> block_influence(torch.tensor([0.5, 0.75]))
    tensor([0.5000, 0.2500])

    ```
    """
    return 1 - cosines


def last(layers: int) -> torch.Tensor:
    """The last layers go first, as where the top of a model is taken off (Sajjad et al. 2023, arXiv:2004.03844).

    Example:

    ```python
    >>> from hf_compress.pruning.scores import last
    >>> last(3)
    tensor([3., 2., 1.])

    ```
    """
    return torch.arange(layers, 0, -1).float()


SCORES: dict[str, Score] = {
    "magnitude": Score("weight", magnitude),
    "taylor": Score("gradient", taylor),
    "gradient": Score("gradient", gradient, lambda s: s / s.norm().clamp_min(1e-12)),
    "fisher": Score("gradient", taylor, arrange=rearranged, tunes=True, only="plan_pruning"),
    "movement": Score("gradient", movement, sums=True, only="PruningCallback"),
    "activation": Score("activation", activation, lambda s: s / s.mean().clamp_min(1e-12)),
    "random": Score("seed", random),
}
PLANNED = tuple(name for name, score in SCORES.items() if score.only != "PruningCallback")
TRAINED = tuple(name for name, score in SCORES.items() if score.only != "plan_pruning")

LAYER_SCORES: dict[str, Score] = {
    "block_influence": Score("hidden", block_influence),
    "magnitude": Score("weight", magnitude),
    "last": Score("number", last),
    "random": Score("seed", random),
}
