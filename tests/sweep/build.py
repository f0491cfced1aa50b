"""Every model type of the AutoModel mappings, tiny, with weights that hide nothing."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .load import doubled, far, flat, outputs_of
from .overrides import OVERRIDES, SKIPPED
from .shrink import tiny_config
from .types import class_name

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 16, "mrope": [2, 3, 3]},
    {"head_dim": 16, "kv": 4, "mrope": [2, 3, 3]},
    {"head_dim": 32, "mrope": [4, 6, 6]},
)


class NotBuilt(Exception):
    """Why a type cannot be built or run here."""


MOST = 6_000_000
WORST = 2e-5


def build(kind: str, name: str | None = None, seed: int = 0) -> tuple[PreTrainedModel, dict[str, torch.Tensor], int]:
    """(model in eval mode, inputs that it runs on, which of `VARIANTS`): the first of the variants that runs."""
    name = name or class_name(kind)
    if kind in SKIPPED:
        raise NotBuilt(SKIPPED[kind])
    cls = getattr(transformers, name or "", None)
    if cls is None:
        raise NotBuilt(f"transformers has no class {name}")
    first: Exception | None = None
    for number, variant in enumerate(VARIANTS):
        try:
            config = tiny_config(kind, variant, OVERRIDES.get(kind))
            with torch.device("meta"):
                try:
                    size = sum(p.numel() for p in cls(config).parameters())
                except Exception:
                    size = 0
            if size > MOST:
                raise NotBuilt(f"still {size:,} parameters when shrunk")
            torch.manual_seed(seed)
            model = cls(config).eval()
        except Exception as error:
            first = first or error
            if "requires" in str(error) and "library" in str(error):
                break
            continue
        try:
            return model, _filled(model, seed), number
        except Exception as error:
            error.hfc_stage = "run"  # type: ignore[attr-defined]
            first = first or error
    if isinstance(first, NotBuilt):
        raise first
    raise NotBuilt(f"{getattr(first, 'hfc_stage', 'build')}: {type(first).__name__}: {_short(first)}") from first


def _filled(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Weights under which the outputs are finite and say something (a ReLU at the end may hide all), and inputs."""
    from hf_compress.probe import example_inputs, quiet_run

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs: list[torch.Tensor] = []
    for scale, more in ((1.0, 0), (1.0, 1), (1.0, 2), (0.3, 3)):
        fill_(model, seed + more, scale)
        inputs = example_inputs(model)
        with quiet_run(model) as run:
            outputs = flat(run(inputs))
            try:
                run(inputs, cache=True)
            except Exception:  # some fail with the cache that they make by default: they are judged without
                for module in model.modules():
                    if hasattr(getattr(module, "config", None), "use_cache"):
                        module.config.use_cache = False  # type: ignore[union-attr]
        if outputs and all(torch.isfinite(t).any() for t in outputs) and any(t.std() > 1e-5 for t in outputs if t.numel() > 1):
            if scale < 1 or _rounding(model, inputs) < WORST:
                return inputs
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
    raise ValueError("the outputs are constant or not finite" if outputs else "there are no outputs of floats")


def _rounding(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """How far the outputs are from those in float64: where that is far (DAC with large latents), nothing can be compared."""
    try:
        return far(outputs_of(model, inputs), outputs_of(copy.deepcopy(model).double(), doubled(inputs)))
    except Exception:  # a forward that makes float32 itself
        return 0.0


def _short(error: Exception | None) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]


def fill_(model: PreTrainedModel, seed: int = 0, scale: float = 1.0) -> None:
    """Every weight drawn anew: what is left at zero or one would hide a wrong cut."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.requires_grad:  # tables of sines, which are not saved
                continue
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim >= 2:
                fan = max(parameter[0].numel(), 1) if parameter.ndim != 3 else parameter.shape[-1]
                noise *= min(0.7 / fan**0.5, 0.15)
            else:
                noise *= 0.1
            parameter.add_(noise.to(parameter.dtype) * scale)
