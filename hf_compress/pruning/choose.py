"""The sizes that meet a target, tuned on what the whole model loses, and the plan for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from ..surgery import mask_
from .calibrate import Calibration
from .compensate import compensated
from .prices import Prices
from .search import Database, Losses, Stitched, is_less, tune
from .select import count_units


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        sizes (`dict[str, int]`): by block, units that stay.
        achieved (`float`): how many times faster or smaller.
        interval (`tuple[float, float]`, *optional*): 95%, of a measured speed-up.
        plan (`Plan`): the cuts, with the weights that belong to them.
        lost (`dict[str, float]`): by block that is cut, the share of what its output should vary by that is lost.
    """

    sizes: dict[str, int]
    achieved: float
    interval: Any
    plan: Plan
    lost: dict[str, float]


def choose(
    calibration: Calibration,
    prices: Prices,
    losses: Losses,
    database: Database | None,
    ratio: float,
    tries: int,
    damping: float,
    rough: bool = False,
) -> Choice:
    """By the losses as they are, or tuned on the whole model, whichever plan then loses less.

    Args:
        calibration (`Calibration`): of the model that is cut, as it is.
        prices (`Prices`): what sizes cost.
        losses (`dict`): by block and size, what is lost.
        database (`Database`, *optional*): projections at every size; without it nothing is tuned.
        ratio (`float`): the target, how many times faster or smaller.
        tries (`int`): sizes that are run.
        damping (`float`): how strongly new weights are held to the old ones.
        rough (`bool`, defaults to `False`): a target on the way to another: one model is timed, and not for long.
    """

    def plan_of(sizes: Mapping[str, int]) -> tuple[Plan, dict[str, float]]:
        less = {b.name: sizes[b.name] for b in calibration.blocks if sizes[b.name] < count_units(b)}
        return compensated(calibration, less, damping)

    made: dict[tuple[int, ...], tuple[Plan, dict[str, float]]] = {}
    if database is not None and tries:
        first, *_ = prices.fit(losses, ratio, rough=True)  # also says how far the costs are off
        tuned = tune(calibration, database, losses, lambda of: prices.sizes(of, ratio), tries)
        other = prices.sizes(tuned, ratio)
        if other is not None and other != first:
            # the database says of other layers what they were before anything was cut, so the plans themselves are compared
            run = Stitched(calibration, database)
            found = []
            for sizes in (first, other):
                made[tuple(sizes.values())] = plan, _ = plan_of(sizes)
                with mask_(calibration.model, plan):
                    found.append(run.now())
            losses = tuned if is_less(found[1], found[0]) else losses
    sizes, achieved, interval = prices.fit(losses, ratio, rough)
    return Choice(sizes, achieved, interval, *(made.get(tuple(sizes.values())) or plan_of(sizes)))
