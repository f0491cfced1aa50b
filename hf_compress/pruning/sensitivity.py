r"""How much the outputs of a model change with the output of each block: what makes errors of different blocks comparable.

For a small change `d` of what a block's projection gives in one row (a token), the divergence of the model's predictions from
what they were is `1/2 d' F d`, with the Fisher information `F = E[g g']` and `g` the gradient of `v' z` for a random `v` whose
covariance is that of the predictions (Martens 2014, *New insights on the natural gradient method*):

    v = sqrt(p) e - p (sqrt(p)' e),    e = +-1,    cov(v) = diag(p) - p p',    p = softmax(z / 2)

The signs `e` are drawn; no labels are needed. Of `F` the diagonal in the mean over rows is kept, so that outputs and blocks
compare:

    s_o = sum over rows of g_o^2 / examples.

Outputs that are no logits are taken for means of a Gaussian. (Weighing each row by its own `F` as well was tried: on MiniLM and
SST-2 three times as many points were lost, since few rows are then left to fit weights to. Half by `F`, half evenly: 12% less
divergence at three times the speed, 34% more at twice.)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from ..edits import CompressionError
from ..grams import real_tokens, spread
from ..probe import quiet_run
from .calibrate import Calibration, over_processes_
from .predictions import predictions_of

ROWS = 256  # examples in each process
TEMPERATURE = 2.0  # of predictions, as in distillation: of one that is sure, nothing would be asked at all


def sensitivities(calibration: Calibration) -> dict[str, torch.Tensor]:
    """By block, the weight of each output of its projection, shape (out,): see the module's docstring.

    Blocks on which the outputs do not depend are left out (the last layer of a tower of which another one is read).

    One backward pass for each batch, of about 256 rows.
    """
    model = calibration.model
    squares: dict[str, torch.Tensor] = {}
    now, examples = [0], 0
    frozen = [p for p in model.parameters() if p.requires_grad]

    def watch(block: Any, output: Any) -> Any:
        output = output if output.requires_grad else output.detach().requires_grad_()

        def collect(grad: torch.Tensor) -> None:
            rows = calibration.rows(grad.detach().float(), block, now[0]).square()
            squares[block.name] = squares.get(block.name, 0) + rows.sum(0)  # type: ignore[operator]

        output.register_hook(collect)
        return output

    with ExitStack() as stack:
        run = stack.enter_context(quiet_run(model))
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for block in calibration.blocks:
            module = calibration.modules[block.out]
            stack.callback(module.register_forward_hook(lambda _m, _a, o, b=block: watch(b, o)).remove)
        stack.enter_context(torch.enable_grad())
        some = spread(calibration.batches, ROWS)
        for i in tqdm(some, desc="sensitivity", leave=False, disable=None, delay=3):
            batch = calibration.batches[i]
            now[0], examples = i, examples + len(_first(batch))
            try:
                outputs = run(calibration.placed(batch))
            except Exception as error:  # a model may refuse a batch in any way
                raise CompressionError(
                    f"{type(model).__name__} does not run on a calibration batch: {type(error).__name__}: {error}"
                ) from error
            projected(outputs, _draw_for(batch), real_tokens(model, batch, is_decoder=True)).backward()
    said = torch.tensor(float(examples), dtype=torch.float64)
    over_processes_(said, *squares.values())
    return {name: square / float(said) for name, square in squares.items() if bool((square > 0).any())}


def _first(batch: Mapping[str, Any]) -> torch.Tensor:
    return next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _draw_for(batch: Mapping[str, Any]) -> torch.Generator:
    """The same for a batch in whichever process, and in whichever turn."""
    content = _first(batch).detach().cpu().contiguous().flatten().view(torch.uint8)
    return torch.Generator().manual_seed(zlib.crc32(content.numpy().tobytes()))


def projected(outputs: Any, draw: torch.Generator, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`v' z` of the module's docstring, summed over the rows of all predictions, without those of padding.

    Args:
        outputs: of the model; see `predictions_of`.
        draw (`torch.Generator`): where signs come from.
        mask (`torch.Tensor`, *optional*): of real tokens, (batch, tokens).
    """
    total: torch.Tensor | None = None
    for prediction in predictions_of(outputs):
        rows = prediction.rows(mask).float()
        if not rows.requires_grad or not len(rows):
            continue
        if prediction.is_logits:
            root = (rows.detach() / TEMPERATURE).softmax(-1).sqrt()
            sign = (torch.randint(0, 2, root.shape, generator=draw, dtype=torch.int8) * 2 - 1).to(root)
            v = root * sign - root.square() * (root * sign).sum(-1, keepdim=True)
            own = (rows * v).sum()
        else:
            noise = torch.randn(rows.shape, generator=draw).to(rows.device)
            spread = rows.detach().std() if rows.numel() > 1 else rows.detach().abs().mean()
            own = (rows * noise / spread.clamp_min(1e-6)).sum()
        total = own if total is None else total + own
    if total is None:
        raise CompressionError("The model's outputs have no gradient, so nothing can be said of what they depend on.")
    return total
