r"""How much the loss of each block counts, tuned on what the whole model then loses.

Losses of blocks are taken for a sum by the solver, which they are not: what one block loses, a later one may undo or make
worse. So each block's curve is multiplied by a weight of its own, and weights are sought for which the sizes that the solver
then picks lose least on data (Frantar and Alistarh 2022, *SPDY*, arXiv:2201.13096; so *ZipLM*): some weights are changed
at random, the solver picks, the model of these sizes is put together from a database and run, and what is better stays. A try
costs one forward pass over the rows; nothing is timed or calibrated in between.

The database holds the projection of every block for every size on the grid, as it makes up for what goes while all other
blocks are whole. (The plan is made afterwards, layer by layer, each on the ones before as they are cut.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..grams import real_tokens, spread
from ..modules import dense_weight
from ..probe import quiet_run
from .calibrate import Calibration, over_processes_, weights
from .predictions import Prediction, predictions_of
from .select import units_of

TRIES = 100
ROWS = 256  # examples in each process, in whole batches
STEP = 1.0  # standard deviation of the change of a weight's logarithm
MOST = 2 * 2**30  # bytes of a database that is held in memory
HELD = 2**29  # of what the dense model predicts: rows of logits over a vocabulary would fill any memory

Losses = Mapping[str, Mapping[int, float]]
# by block and size: the columns that stay, their weights (out, columns) in bfloat16, and the bias
Database = dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def tune(
    calibration: Calibration,
    database: Database,
    losses: Losses,
    solve: Callable[[Losses], dict[str, int] | None],
    tries: int = TRIES,
) -> dict[str, dict[int, float]]:
    """The losses, each block's times a weight with which the sizes that are solved for lose least on calibration data.

    Args:
        calibration (`Calibration`): of the dense model.
        database (`Database`): the projections at every size that `solve` may pick, but the whole one.
        losses (`dict`): by block and size.
        solve (`Callable`): losses -> sizes that meet the target, or None where none do.
        tries (`int`, defaults to 100): sizes that are run; those that were run before do not count.
    """
    now: dict[str, dict[int, float]] = {name: dict(of) for name, of in losses.items()}
    sizes = solve(now)
    if sizes is None or tries < 1 or len(now) < 2:
        return now
    run = Stitched(calibration, database)
    least = run.loss(sizes)
    logs, seen, draw = dict.fromkeys(now, 0.0), {tuple(sizes.values())}, random.Random(0)
    progress = tqdm(total=tries, desc="tune sizes", leave=False, disable=None, delay=3)
    for _ in range(20 * tries):  # most small changes pick the same sizes
        if len(seen) > tries:
            break
        others = dict(logs)
        for name in draw.sample(list(logs), min(len(logs), draw.randint(1, 3))):
            others[name] += draw.gauss(0.0, STEP)
        weighed = _weighed(losses, others)
        sizes = solve(weighed)
        if sizes is None or tuple(sizes.values()) in seen:
            continue
        seen.add(tuple(sizes.values()))
        loss = run.loss(sizes, least)
        progress.update()
        progress.set_postfix_str(f"loss {min(loss, least):.4g}")
        if is_less(loss, least):
            logs, now, least = others, weighed, loss
    progress.close()
    return now


def is_less(loss: float, least: float) -> bool:
    """By more than sums of float32 in another order differ, so that several processes choose as one does."""
    return loss < least * (1 - 1e-5)


def is_small(calibration: Calibration, grids: Mapping[str, Sequence[int]]) -> bool:
    """Whether the database of these sizes is one to hold in memory."""
    numbers = 0
    for block in calibration.blocks:
        units = units_of(block)
        width = len(units) // (int(units.max()) + 1)
        weight: Any = calibration.modules[block.out].weight
        numbers += weight.numel() // len(units) * width * sum(grids[block.name])
    return 2 * numbers <= MOST


def _weighed(losses: Losses, logs: Mapping[str, float]) -> dict[str, dict[int, float]]:
    scale = {name: float(torch.tensor(log).exp()) for name, log in logs.items()}
    return {name: {size: loss * scale[name] for size, loss in of.items()} for name, of in losses.items()}


def divergence(got: torch.Tensor, meant: torch.Tensor) -> float:
    """KL(softmax(meant) || softmax(got)), summed over rows (rows, classes).

    In float64: where little is lost, float32 rounds off more than sizes differ by. Some rows at a time, to stay small.
    """
    total, where = 0.0, "cpu" if got.device.type == "mps" else got.device  # which has no float64
    many = max(1, 2**24 // max(1, got.shape[-1]))
    for some, other in zip(got.split(many), meant.split(many), strict=True):
        new, old = (t.to(where, torch.float64).log_softmax(-1) for t in (some, other))
        total += float(F.kl_div(new, old, log_target=True, reduction="sum"))
    return total


class Stitched:
    """What a model loses against the dense one that it was when this was made: put together from a database, or as it is."""

    def __init__(self, calibration: Calibration, database: Database) -> None:
        self.calibration, self.database = calibration, database
        self.outs = {block.name: block.out for block in calibration.blocks}
        self.batches = [calibration.batches[i] for i in spread(calibration.batches, ROWS)]
        self.meant = [self._outputs(batch) for batch in self.batches]  # by batch and prediction
        # what the sum of losses of each prediction is divided by: rows, or what the outputs vary by
        self.of = torch.zeros(max(map(len, self.meant), default=0), dtype=torch.float64)
        for batch in self.meant:
            for i, (values, is_logits) in enumerate(batch):
                self.of[i] += len(values) if is_logits else float((values - values.mean(0)).square().sum())

    def loss(self, sizes: Mapping[str, int], most: float = float("inf")) -> float:
        """What is lost with these sizes; see `now`."""
        new: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for name, size in sizes.items():
            if (name, size) not in self.database:
                continue  # the whole block
            columns, weight, bias = self.database[name, size]
            full = torch.zeros_like(dense_weight(self.calibration.modules[self.outs[name]]))
            full[:, columns.to(full.device)] = weight.to(full)
            new[self.outs[name]] = (full, None if bias is None else bias.to(full))
        with weights(self.calibration.model, new):
            return self.now(most)

    def now(self, most: float = float("inf")) -> float:
        """The mean divergence of the model's predictions as it is now, or the error of other outputs per variance; their sum.

        Once it must be above `most`, no more rows are run, and it is infinite.
        """
        total = torch.zeros(2, len(self.of), dtype=torch.float64)
        total[1] = self.of
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        for batch, meant in zip(self.batches, self.meant, strict=True):
            for i, ((got, is_logits), (old, _)) in enumerate(zip(self._outputs(batch), meant, strict=True)):
                total[0, i] += divergence(got, old) if is_logits else float((got - old).square().sum())
            if alone and _mean(total) > most:  # sums only grow
                return float("inf")
        over_processes_(total)
        return _mean(total)

    @torch.no_grad()
    def _outputs(self, batch: Mapping[str, Any]) -> list[Prediction]:
        """Rows of what is predicted, without those of padding; of many classes, some rows, evenly taken."""
        batch = self.calibration.placed(batch)
        with quiet_run(self.calibration.model) as run:
            predictions = predictions_of(run(batch))
        mask = real_tokens(self.calibration.model, batch, is_decoder=True)
        found = []
        for prediction in predictions:
            rows = prediction.rows(mask)
            most = max(1, HELD // (4 * rows.shape[-1] * len(self.batches) * len(predictions)))
            if len(rows) > most:
                rows = rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
            found.append(Prediction(rows.float(), prediction.is_logits))
        return found


def _mean(total: torch.Tensor) -> float:
    return float((total[0] / total[1].clamp_min(1e-12)).sum())
