"""How much a head or a neuron matters: one pure function a score, and the dict that lists them.

All scores see the same picture of a block: its output projection (the down projection of an FFN), whose input columns
belong to units (heads, kv groups or neurons), and a gate of one on every unit. To add a score, write one function and
list it in `SCORES`; the shared tests run over that dict.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """

    needs: str
    reduce: Callable[..., torch.Tensor]
    per_layer: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores


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


SCORES: dict[str, Score] = {
    "magnitude": Score("weight", magnitude),
    "taylor": Score("gradient", taylor),
    "gradient": Score("gradient", gradient, lambda s: s / s.norm().clamp_min(1e-12)),
    "activation": Score("activation", activation, lambda s: s / s.mean().clamp_min(1e-12)),
    "random": Score("seed", random),
}
