r"""How much the outputs of a model change with the output of each block: what makes errors of different blocks comparable.

For a small change `d` of what a block's projection gives in one row (a token), the divergence of the model's predictions from
what they were is `1/2 d' F d`, with the Fisher information `F = E[g g']` and `g` the gradient of `v' z` for a random `v` whose
covariance is that of the predictions (Martens 2014, *New insights on the natural gradient method*):

    v = sqrt(p) e - p (sqrt(p)' e),    e = +-1,    cov(v) = diag(p) - p p',    p = softmax(z / 2)

No labels are needed. Of `F` two things are kept: its diagonal in the mean over rows, so that outputs and blocks compare,

    s_o = sum over rows of g_o^2 / examples,

and its trace in each row over the mean of all rows: a token that the predictions do not depend on (all but the first of a
classifier's last layer) should not be asked for. Outputs that are no logits are taken for means of a Gaussian.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from ..edits import CompressionError
from ..probe import quiet_run, tensors_in
from .calibrate import Calibration, over_processes_

FLOOR = 0.1  # of how much a row counts, when the mean is 1: Fisher information is of small changes
TEMPERATURE = 2.0  # of predictions, as in distillation: of one that is sure, nothing would be asked at all


def sensitivities(calibration: Calibration) -> dict[str, torch.Tensor]:
    """By block, the weight of each output of its projection, shape (out,); how much rows count goes into the calibration.

    One backward pass for each batch. See the module's docstring.
    """
    model = calibration.model
    squares: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    by_row: dict[str, list[torch.Tensor]] = {}
    now = [0]
    frozen = [p for p in model.parameters() if p.requires_grad]

    def watch(block: Any, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()

        def collect(grad: torch.Tensor) -> None:
            square = grad.detach().float().square()
            rows = calibration.rows(square, block, now[0])
            squares[block.name] = squares.get(block.name, 0) + rows.sum(0)  # type: ignore[operator]
            counts[block.name] = counts.get(block.name, 0) + len(rows)
            by_row.setdefault(block.name, []).append(square.sum(-1))

        output.register_hook(collect)
        return output

    with ExitStack() as stack:
        run = stack.enter_context(quiet_run(model))
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for block in calibration.blocks:
            module = calibration.modules[block.out]
            stack.callback(module.register_forward_hook(lambda _m, _a, out, b=block: watch(b, out)).remove)
        stack.enter_context(torch.enable_grad())
        for i, batch in enumerate(tqdm(calibration.batches, desc="sensitivity", leave=False, disable=None, delay=3)):
            now[0] = i
            try:
                outputs = run(calibration.placed(batch))
            except Exception as error:  # a model may refuse a batch in any way
                raise CompressionError(
                    f"{type(model).__name__} does not run on a calibration batch: {type(error).__name__}: {error}"
                ) from error
            projected(outputs, _draw_for(batch)).backward()
    idle = [block.name for block in calibration.blocks if block.name not in squares]
    if idle:
        raise CompressionError(f"The outputs do not depend on {idle[0]!r} (of {len(idle)} such blocks) on these batches.")
    examples = float(
        sum(next(len(v) for v in b.values() if isinstance(v, torch.Tensor) and v.ndim) for b in calibration.batches)
    )
    for block in calibration.blocks:
        name, rows = block.name, by_row[block.name]
        said = torch.cat([squares[name].double(), squares[name].new_tensor([counts[name], examples], dtype=torch.float64)])
        over_processes_(said)
        total, count, all_examples = said[:-2], float(said[-2]), float(said[-1])
        squares[name] = (total / all_examples).float()
        if len(rows) == len(calibration.batches):  # a module that runs several times a forward has no rows of its own
            mean = max(float(total.sum()) / count, 1e-30)
            calibration.row_weights[name] = [FLOOR + (1 - FLOOR) * r / mean for r in rows]
    return squares


def _first(batch: Mapping[str, Any]) -> torch.Tensor:
    return next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _draw_for(batch: Mapping[str, Any]) -> torch.Generator:
    """The same for a batch in whichever process, and in whichever turn."""
    content = _first(batch).detach().cpu().contiguous().flatten().view(torch.uint8)
    return torch.Generator().manual_seed(zlib.crc32(content.numpy().tobytes()))


def projected(outputs: Any, draw: torch.Generator) -> torch.Tensor:
    """`v' z` of the module's docstring, summed over rows."""
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if isinstance(logits, torch.Tensor) and logits.shape[-1] > 1:
        root = (logits.detach().float() / TEMPERATURE).softmax(-1).sqrt()
        sign = torch.randint(0, 2, root.shape, generator=draw).to(root) * 2 - 1
        v = root * sign - root.square() * (root * sign).sum(-1, keepdim=True)
        return (logits.float() * v).sum()
    value = next((t for _, t in tensors_in(outputs) if t.requires_grad), None)
    if value is None:
        raise CompressionError("The model's outputs have no gradient, so nothing can be said of what they depend on.")
    noise = torch.randn(value.shape, generator=draw).to(value.device)
    return (value.float() * noise / value.detach().float().std().clamp_min(1e-6)).sum()
