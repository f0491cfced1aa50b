"""Learned projections of a student's hidden states to the teacher's width: trained with the student, never part of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import nn
from transformers.trainer import OPTIMIZER_NAME

from ..files import replace_files
from ..plan import CompressionError
from .compatible import hidden_key

PROJECTIONS_FILE = "distillation_projections.safetensors"


def make_projections(widths: Mapping[int, tuple[int, int]], like: nn.Module, seed: int) -> nn.ModuleDict:
    """A Linear for every hidden state whose width differs from the teacher's, by its index."""
    like_this = next(p for p in like.parameters() if p.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = {str(index): nn.Linear(student, teacher) for index, (student, teacher) in sorted(widths.items())}
    return nn.ModuleDict(made).to(like_this.device, like_this.dtype)


class ProjectedStudent(nn.Module):
    """A student whose hidden states come out in the teacher's width: what DistributedDataParallel and the optimizer see.

    The projections run inside this forward, since a gradient that DistributedDataParallel does not expect from its forward
    is not averaged. The student knows nothing of it: its own modules, its `state_dict` and its checkpoints have no
    projection.
    """

    def __init__(self, student: nn.Module, projections: nn.ModuleDict) -> None:
        super().__init__()
        self.student, self.projections = student, projections
        self.key = hidden_key(student)

    def _get_name(self) -> str:  # Trainer chooses its label smoothing by this
        return self.student._get_name()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.student(*args, **kwargs)
        states = outputs.get(self.key)
        if states is not None:
            named = {int(index): projection for index, projection in self.projections.items()}
            outputs[self.key] = tuple(named[i](state) if i in named else state for i, state in enumerate(states))
        return outputs


def save_projections(projections: nn.ModuleDict, folder: str | os.PathLike) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in projections.state_dict().items()}
    replace_files(folder, {PROJECTIONS_FILE: dump_tensors(tensors)})


def load_projections(projections: nn.ModuleDict, folder: str | os.PathLike) -> None:
    """Put back what `save_projections` wrote into a checkpoint.

    Raises:
        CompressionError: the checkpoint has none, or those of another layer map.
    """
    path = Path(folder) / PROJECTIONS_FILE
    if not path.exists() and not (Path(folder) / OPTIMIZER_NAME).exists():
        return  # save_only_model: everything but the student starts anew
    try:
        tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CompressionError(
            f"{path} cannot be read ({error}): the checkpoint was not written by a distillation whose hidden states differ in "
            "width. Resume with the models and the layer_map that the run began with."
        ) from error
    mine = {name: tuple(tensor.shape) for name, tensor in projections.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if mine != theirs:
        raise CompressionError(
            f"{path} has the projections {theirs}, this run {mine}; resume with the same models and layer_map."
        )
    projections.load_state_dict(tensors)
