r"""Optimal brain surgeon on groups of columns: which to take out of a projection, and what the others become.

A projection `y = W x + b` loses columns of `W` in groups (a head's, a neuron's). What it then gives should be as close as it
can be to a target `t` in the mean over calibration rows,

    E |t - V x - c|^2 + damping |V - W|^2,    V zero in the columns that went.

With the second moments `H = E[x x'] + damping` and `T = E[t x'] + damping W` (centred where there is a bias, which then takes
up the means), the best `V` without a constraint is `T H^-1`, and taking a group `S` out of the best that there is costs

    tr(V_S (P_SS)^-1 V_S'),    V -= V_S (P_SS)^-1 P_S:,    P -= P_:S (P_SS)^-1 P_S:,    P = H^-1

(Hassibi and Stork 1993; row-wise: Frantar and Alistarh 2022, *Optimal brain compression*; on structures: Kurtic et al. 2023,
*ZipLM*, arXiv:2302.04089). One group at a time goes, the cheapest, so of two that say the same only one is lost.

The scores need no `V`, only `A = V' V`, which changes like `P`: each removal is a correction of low rank of both, gathered and
applied in blocks, as matrix products. What `V` is for one size is solved for when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..edits import CompressionError

BLOCK = 64  # removals whose corrections are applied together
ROUNDING = 1e-6  # of the mean of E[x^2]
TRIES = 8  # with ten times the damping each


@dataclass
class Moments:
    """What calibration rows say of one projection: counts and sums, so that those of several processes add up.

    Args:
        count: rows, or the sum of their weights.
        xx: sum of `x x'`, shape (in, in).
        x: sum of `x`, shape (in,).
        tx: sum of `t x'`, shape (out, in).
        t: sum of `t`, shape (out,).
        tt: sum of `|t|^2`.
    """

    count: float
    xx: torch.Tensor
    x: torch.Tensor
    tx: torch.Tensor
    t: torch.Tensor
    tt: float = 0.0

    @classmethod
    def empty(
        cls, inputs: int, outputs: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Moments:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(0.0, zeros(inputs, inputs), zeros(inputs), zeros(outputs, inputs), zeros(outputs))

    def add_(self, x: torch.Tensor, t: torch.Tensor) -> None:
        """More rows: x of shape (rows, in), t of shape (rows, out)."""
        x, t = x.to(self.xx.dtype), t.to(self.xx.dtype)
        self.add_inputs_(x)
        self.tx.addmm_(t.T, x)
        self.t += t.sum(0)
        self.tt += float(t.square().sum(dtype=torch.float64 if t.device.type != "mps" else None))

    def add_inputs_(self, x: torch.Tensor) -> None:
        """More rows of what enters, where the target follows from it (`of_own_output_`)."""
        x = x.to(self.xx.dtype)
        self.count += len(x)
        self.xx.addmm_(x.T, x)
        self.x += x.sum(0)

    def of_own_output_(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """The target is what the projection itself gives."""
        weight = weight.detach().to(self.xx)
        self.tx, self.t = weight @ self.xx, weight @ self.x
        if bias is not None:
            self.tx += bias.detach().to(self.xx)[:, None] * self.x
            self.t += bias.detach().to(self.xx) * self.count
        self.tt = float((weight * self.tx).sum()) + (0.0 if bias is None else float(self.t @ bias.detach().to(self.t)))


class Regression:
    """The least-squares problem of one projection: its best weights for any choice of columns.

    Args:
        moments (`Moments`): of the calibration rows.
        weight (`torch.Tensor`): W, shape (out, in): what the damping pulls to.
        bias (`torch.Tensor`, *optional*): b, shape (out,). Without one, nothing takes up a mean.
        damping (`float`, defaults to 0.01): as a fraction of the mean of the diagonal of `E[x x']`.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.surgeon import Moments, Regression, removals
    >>> _ = torch.manual_seed(0)
    >>> x, weight = torch.randn(64, 3), torch.randn(2, 3)
    >>> x[:, 2] = x[:, 0]  # two columns say the same
    >>> moments = Moments.empty(3, 2)
    >>> moments.add_(x, x @ weight.T)
    >>> regression = Regression(moments, weight, None, damping=1e-6)
    >>> order, errors = removals(regression, torch.arange(3))
    >>> order[0].item() in (0, 2), errors[1].item() < 1e-4 < errors[2].item()
    (True, True)
    >>> new, _ = regression.solve(order[1:].sort().values)
    >>> torch.allclose(x[:, order[1:].sort().values] @ new.T, x @ weight.T, atol=1e-3)
    True

    ```
    """

    def __init__(self, moments: Moments, weight: torch.Tensor, bias: torch.Tensor | None, damping: float = 0.01) -> None:
        n = max(moments.count, 1.0)
        where = "cpu" if moments.xx.device.type == "mps" else moments.xx.device  # which has no float64
        weight = weight.detach().to(where, torch.float64)
        second, cross, self.mean, self.target_mean = (
            sums.to(where, torch.float64) / n for sums in (moments.xx, moments.tx, moments.x, moments.t)
        )
        self.has_bias = bias is not None
        raw = second.diagonal().mean()
        if self.has_bias:
            second = second - self.mean[:, None] * self.mean
            cross = cross - self.target_mean[:, None] * self.mean
        # of what varies, but more than sums in float32 are off by: inputs may be constant (the first values of DETR's decoder)
        amount = torch.maximum(damping * second.diagonal().mean(), ROUNDING * raw).clamp_min(1e-20)
        for _ in range(TRIES):
            self.second = second + amount * torch.eye(len(second), dtype=torch.float64, device=second.device)
            self._factor, failed = torch.linalg.cholesky_ex(self.second)
            if not int(failed):
                break
            amount = 10 * amount
        else:
            raise CompressionError("What enters a projection on the calibration batches holds NaN or infinite values.")
        self._undamped, self._amount = cross, amount
        self.cross = cross + amount * weight
        spread = moments.tt / n - (float(self.target_mean.square().sum()) if self.has_bias else 0.0)
        self.variance = max(spread, 0.0)  # of the target, or its mean square where nothing takes up a mean

    def inverse(self) -> torch.Tensor:
        return torch.cholesky_inverse(self._factor)

    def solve(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The best weights on these columns alone, (out, columns), and the bias that belongs to them."""
        columns = columns.to(self.second.device)
        factor = torch.linalg.cholesky(self.second[columns][:, columns])
        weight = torch.cholesky_solve(self.cross[:, columns].T, factor).T
        bias = self.target_mean - weight @ self.mean[columns] if self.has_bias else None
        return weight.float(), None if bias is None else bias.float()

    def lost(self, columns: torch.Tensor, weight: torch.Tensor) -> float:
        """The share of the target's variance (mean square, without a bias) that these weights do not give, in [0, 1] or more.

            (E|t|^2 - 2 tr(V' E[t x']) + tr(V' V E[x x'])) / E|t|^2

        centred where there is a bias. What no weights could give any more, since what enters has changed, is in it.

        Args:
            columns (`torch.Tensor`): that are kept.
            weight (`torch.Tensor`): V on them, shape (out, columns).
        """
        columns = columns.to(self.second.device)
        weight = weight.to(self.second)
        second = self.second[columns][:, columns]
        got = ((weight @ second) * weight).sum() - self._amount * weight.square().sum()
        off = self.variance - 2 * float((weight * self._undamped[:, columns]).sum()) + float(got)
        return max(off, 0.0) / max(self.variance, 1e-20)


def removals(
    regression: Regression, units: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which units go, the cheapest first, and what it costs.

    Args:
        regression (`Regression`): of the projection.
        units (`torch.Tensor`): the unit of each column, shape (in,), from 0; equally many columns each.
        scale (`torch.Tensor`, *optional*): the weight of each output in the error, shape (out,); ones by default.

    Returns:
        (units in the order in which they go, all but none left out; errors of shape (units + 1,): the increase of the mean
        squared error when so many have gone, 0 for none).
    """
    count = int(units.max()) + 1
    columns = units.to(regression.second.device).argsort(stable=True)  # units side by side
    size = len(units) // count
    inverse = regression.inverse()
    best = regression.cross @ inverse
    scaled = best if scale is None else best * scale.to(best).sqrt()[:, None]
    inverse, products = inverse[columns][:, columns], scaled.T @ scaled
    products = products[columns][:, columns]
    order, costs = (_singles if size == 1 else _groups)(inverse, products, count)
    errors = torch.cat([torch.zeros(1, dtype=torch.float64), torch.tensor(costs, dtype=torch.float64).cumsum(0)])
    return torch.tensor(order), errors


def _singles(inverse: torch.Tensor, products: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """One column a unit. Corrections of `P` and `A` wait in `rows` until a block of them is full."""
    alive = torch.arange(count, device=inverse.device)
    gone = torch.zeros(count, dtype=torch.bool, device=inverse.device)
    order: list[int] = []
    costs: list[float] = []
    while len(order) < count:
        many = min(BLOCK, count - len(order))
        own, squares = inverse.diagonal().clone(), products.diagonal().clone()
        own[gone] = 1.0
        rows = inverse.new_zeros(many, len(alive))  # h of each removal
        pairs = inverse.new_zeros(many, len(alive))  # c of each: A -= c h' + h c'
        pivots = inverse.new_zeros(many)
        for i in range(many):
            at = int((squares / own).masked_fill_(gone, float("inf")).argmin())
            before = rows[:i, at]
            row = torch.addmv(inverse[at], rows[:i].T, pivots[:i] * before, alpha=-1)
            pair = torch.addmv(products[at], rows[:i].T, pairs[:i, at], alpha=-1).addmv_(pairs[:i].T, before, alpha=-1)
            pivot, cost = row[at].clone(), pair[at].clone()
            row /= pivot
            pair.sub_(row, alpha=0.5 * float(cost))
            order.append(int(alive[at]))
            costs.append(max(float(cost / pivot), 0.0))
            rows[i], pairs[i], pivots[i] = row, pair, pivot
            gone[at] = True
            own.addcmul_(row, row * pivot, value=-1)
            squares.addcmul_(pair, row, value=-2).clamp_min_(0)
            own[at] = 1.0
        inverse.addmm_(rows.T, pivots[:, None] * rows, alpha=-1)
        products.addmm_(pairs.T, rows, alpha=-1).addmm_(rows.T, pairs, alpha=-1)
        if int(gone.sum()) > 0.3 * len(alive):  # what is gone costs time until it is left out, and leaving out does too
            stay = (~gone).nonzero().flatten()
            inverse, products = (m.index_select(0, stay).index_select(1, stay) for m in (inverse, products))
            alive, gone = alive[stay], gone[stay]
    return order, costs


def _groups(inverse: torch.Tensor, products: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Several columns a unit: a head's, or those of a kv group."""
    size = len(inverse) // count
    alive = torch.arange(count, device=inverse.device)
    order: list[int] = []
    costs: list[float] = []
    while len(alive):
        n = len(alive)
        here = torch.arange(n, device=inverse.device)
        own = inverse.view(n, size, n, size)[here, :, here]
        squares = products.view(n, size, n, size)[here, :, here]
        scores = torch.linalg.solve(own, squares).diagonal(dim1=1, dim2=2).sum(1)
        at = int(scores.argmin())
        order.append(int(alive[at]))
        costs.append(max(float(scores[at]), 0.0))
        inside = torch.arange(at * size, (at + 1) * size, device=inverse.device)
        stay = torch.cat(
            [torch.arange(at * size, device=inverse.device), torch.arange((at + 1) * size, n * size, device=inverse.device)]
        )
        rows = torch.linalg.solve(own[at], inverse[inside][:, stay])
        cross = products[stay][:, inside] @ rows
        inverse = inverse[stay][:, stay] - inverse[stay][:, inside] @ rows
        products = products[stay][:, stay] - cross - cross.T + rows.T @ squares[at] @ rows
        alive = torch.cat([alive[:at], alive[at + 1 :]])
    return order, costs
