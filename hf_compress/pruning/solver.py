"""Which size each block should have: the least that is lost for a cost that must be met."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..edits import CompressionError

STEPS = 4000  # into which the cost is divided


def solve(
    losses: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]], budget: float, fixed: float = 0.0
) -> dict[str, int]:
    r"""The sizes that lose the least in sum and cost no more than the budget, by dynamic programming.

        min sum_b loss_b(s_b)   with   fixed + sum_b cost_b(s_b) <= budget

    Costs are rounded up to 1/4000 of what may be spent, so the budget is never exceeded (Kurtic et al. 2023, *ZipLM*, after
    SPDY, Frantar and Alistarh 2022).

    Args:
        losses (`dict`): by block and size, what is lost; sums over blocks.
        costs (`dict`): by block and size, seconds, MACs, parameters or bytes.
        budget (`float`): the most that all may cost.
        fixed (`float`, defaults to 0.0): what does not depend on the sizes.

    Returns:
        the size of each block.

    Raises:
        CompressionError: the smallest sizes cost more than the budget.

    Example:

    ```python
    >>> from hf_compress.pruning.solver import solve
    >>> losses = {"a": {2: 0.0, 1: 5.0}, "b": {2: 0.0, 1: 1.0}}
    >>> costs = {"a": {2: 2.0, 1: 1.0}, "b": {2: 2.0, 1: 1.0}}
    >>> solve(losses, costs, budget=3.0)
    {'a': 2, 'b': 1}

    ```
    """
    least = fixed + sum(min(of.values()) for of in costs.values())
    if least > budget:
        raise CompressionError(
            f"Nothing meets a cost of {budget:.4g}: with every block as small as it can be, {least:.4g} is left. Ask for less."
        )
    # what is spent above the cheapest size of each block
    room = budget - least
    unit = room / STEPS if room > 0 else 1.0
    best = np.zeros(STEPS + 1)  # least loss with at most so many steps spent
    chosen: list[tuple[str, list[int], np.ndarray]] = []
    for name, loss in losses.items():
        sizes = sorted(loss)
        floor = min(costs[name].values())
        table = np.full((len(sizes), STEPS + 1), np.inf)
        for i, size in enumerate(sizes):
            steps = int(np.ceil(round((costs[name][size] - floor) / unit, 9)))
            if steps <= STEPS:
                table[i, steps:] = best[: STEPS + 1 - steps] + loss[size]
        which = table.argmin(0)
        best = table[which, np.arange(STEPS + 1)]
        chosen.append((name, sizes, which))
    left, result = STEPS, {}
    for name, sizes, which in reversed(chosen):
        size = sizes[which[left]]
        result[name] = size
        left -= int(np.ceil(round((costs[name][size] - min(costs[name].values())) / unit, 9)))
    return {name: result[name] for name in losses}
