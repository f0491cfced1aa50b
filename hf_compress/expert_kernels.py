"""Experts of older checkpoints, with widths that the kernel which transformers multiplies them by does not take."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from .candidates import ROW, is_dispatched

logger = logging.get_logger(__name__)
BYTES = 16  # of a row, in whole numbers of which `grouped_mm` reads


def settle_kernels_(model: Any) -> None:
    """Let a model whose experts `grouped_mm` cannot multiply in its dtype use the loop over experts, and say so.

    `apply_` asks for widths that run in every dtype; versions before it took multiples of 4 in float32, and any where the model
    was set to another kernel, which no checkpoint says. A float32 model that will not run in half precision is told of.

    Args:
        model: a loaded model; only what its config says of its experts is changed.
    """
    widths: dict[int, torch.dtype] = {}
    for module in model.modules():
        down = module._parameters.get("down_proj")
        if down is None or down.ndim != 3 or not is_dispatched(module) or module.config._experts_implementation != "grouped_mm":
            continue
        width = down.shape[1 if module.is_transposed else 2]
        if width % ROW and down.is_floating_point():
            widths[width] = down.dtype
    if not widths:
        return
    fail = {width: dtype for width, dtype in widths.items() if width * dtype.itemsize % BYTES}
    neurons = ", ".join(map(str, sorted(fail or widths)))
    half = f"a multiple of {ROW} in half precision, of {BYTES // 4} in float32"
    if fail:
        model.set_experts_implementation("eager")
        logger.warning(
            f"Experts of this {type(model).__name__} have {neurons} neurons, which grouped_mm does not multiply in "
            f"{next(iter(fail.values()))} (it takes {half}). They are set to 'eager', a loop over experts: the same outputs, "
            "maybe slower."
        )
    else:
        logger.warning(
            f"Experts of this {type(model).__name__} have {neurons} neurons, which grouped_mm does not multiply in half "
            f"precision (it takes {half}). Before model.to(torch.bfloat16): model.set_experts_implementation('eager')."
        )
