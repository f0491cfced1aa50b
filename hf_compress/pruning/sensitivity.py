r"""How much the outputs of a model change with the output of each block: what makes errors of different blocks comparable.

For a small change `d` of what a block's projection gives, the divergence of the model's predictions changes by
`1/2 E[(g' d)^2]`, with `g` the gradient of a drawn label's log-likelihood: the Fisher information, of which the diagonal is
taken, the mean over rows:

    s_o = rows per example * E[g_o^2],    y ~ p(. | x),  L = log p(y | x)

Labels are drawn from the model's own predictions, so none are needed (Martens 2014, *New insights on the natural
gradient method*; the *true*, not the empirical Fisher). Outputs that are no logits are taken for means of a Gaussian.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from tqdm.auto import tqdm

from ..edits import CompressionError
from ..probe import quiet_run, tensors_in
from .calibrate import Calibration

ROWS = 256  # examples


def sensitivities(calibration: Calibration, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """By block, the weight of each output of its projection, shape (out,): see the module's docstring.

    Args:
        calibration (`Calibration`): of the model; its first batches are used, one backward pass each.
        rows (`int`, defaults to 256): examples.
    """
    model = calibration.model
    squares: dict[str, torch.Tensor] = {}
    examples, now = 0, [0]
    frozen = [p for p in model.parameters() if p.requires_grad]

    def watch(name: str, block: Any, output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()

        def collect(grad: torch.Tensor) -> None:
            square = calibration.rows(grad.detach().float(), block, now[0]).square().sum(0)
            squares[name] = squares[name] + square if name in squares else square

        output.register_hook(collect)
        return output

    draw = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        run = stack.enter_context(quiet_run(model))
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for block in calibration.blocks:
            module = calibration.modules[block.out]
            hook = module.register_forward_hook(lambda _m, _a, out, b=block: watch(b.name, b, out))
            stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        for i, batch in enumerate(tqdm(calibration.batches, desc="sensitivity", leave=False, disable=None, delay=3)):
            now[0] = i
            try:
                outputs = run(calibration.placed(batch))
            except Exception as error:  # a model may refuse a batch in any way
                raise CompressionError(
                    f"{type(model).__name__} does not run on a calibration batch: {type(error).__name__}: {error}"
                ) from error
            likelihood(outputs, draw).backward()
            examples += next(len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim)
            if examples >= rows:
                break
    idle = [block.name for block in calibration.blocks if block.name not in squares]
    if idle:
        raise CompressionError(f"The outputs do not depend on {idle[0]!r} (of {len(idle)} such blocks) on these batches.")
    return {name: square / examples for name, square in squares.items()}


def likelihood(outputs: Any, draw: torch.Generator) -> torch.Tensor:
    """The log-likelihood of labels that are drawn from the outputs, summed over rows (up to what has no gradient)."""
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if isinstance(logits, torch.Tensor) and logits.shape[-1] > 1:
        with torch.no_grad():
            p = logits.detach().float().softmax(-1)
            label = torch.multinomial(p.flatten(0, -2).cpu(), 1, generator=draw).view(logits.shape[:-1]).to(logits.device)
        return logits.float().log_softmax(-1).gather(-1, label[..., None]).sum()
    value = next((t for _, t in tensors_in(outputs) if t.requires_grad), None)
    if value is None:
        raise CompressionError("The model's outputs have no gradient, so nothing can be said of what they depend on.")
    noise = torch.randn(value.shape, generator=draw).to(value.device)
    return (value.float() * noise / value.detach().float().std().clamp_min(1e-6)).sum()
