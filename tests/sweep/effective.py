"""The float form of a model whose modules became something else."""

from __future__ import annotations

from typing import Any

import hf_compress as hc


def float_form(dense: Any, model: Any, plan: hc.Plan) -> tuple[Any, float]:
    """(`dense` holding the weights that the new modules stand for, how far outputs may lie apart)."""
    raise NotImplementedError
