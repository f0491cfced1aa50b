"""A model that is asked and never trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

from ..exits import exits_off
from .compatible import hidden_states, plain

# what a batch may hold that says what is right; a teacher is never told
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label", "shift_labels")
PREDICTIONS = ("logits", "start_logits", "end_logits")


class Teacher:
    """One teacher beside its student: in eval mode, without gradients, in its own dtype, outside every module tree.

    Args:
        model (`nn.Module`): the teacher.
        student (`nn.Module`): whose batches it is asked about.
        device (`torch.device`, *optional*): where to put it; None leaves it where it is.
    """

    def __init__(self, model: Any, student: Any, device: torch.device | None) -> None:
        self.model, self.student = model, plain(student)
        mine, any_name = _arguments(plain(model))
        his, _ = _arguments(self.student)
        self.only = mine - his - {*LABELS} if his else frozenset()
        # what the student takes as **kwargs (lengths of packed rows, say), a teacher with **kwargs takes too
        self._refused = his - mine if any_name else None
        self._names = mine
        self._caches = "use_cache" in mine
        model.eval()
        movable = getattr(model, "hf_device_map", None) is None
        if device is not None and movable and getattr(model, "quantization_method", None) != QuantizationMethod.BITS_AND_BYTES:
            model.to(device)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The student's batch as far as the teacher takes it, without labels, floating-point inputs in the teacher's dtype."""
        given = {name: value for name, value in batch.items() if name not in LABELS and self._takes(name)}
        labels = batch.get("labels")
        if labels is not None and given.get("decoder_input_ids") is None and "decoder_input_ids" in self._names:
            if hasattr(self.student, "prepare_decoder_input_ids_from_labels"):
                given["decoder_input_ids"] = self.student.prepare_decoder_input_ids_from_labels(labels=labels)
            else:  # Whisper shifts them in its forward only
                given["labels"] = labels
        if self._caches:
            given["use_cache"] = False
        dtype = getattr(self.model, "dtype", torch.float32)
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in given.items()
        }

    def _takes(self, name: str) -> bool:
        return name in self._names or (self._refused is not None and name not in self._refused)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], hidden: tuple[int, ...] = ()) -> tuple[dict[str, Any], dict[int, Any]]:
        """Its predictions, and those of its hidden states that are asked for."""
        if self.model.training:  # someone called train() on it since
            self.model.eval()
        with exits_off(self.model):  # its last layer teaches, not the exit that a row would leave at
            outputs = self.model(**self.inputs(batch), **({"output_hidden_states": True} if hidden else {}))
        predictions = {name: outputs[name] for name in PREDICTIONS if outputs.get(name) is not None}
        states = hidden_states(outputs, self.model) if hidden else ()
        return predictions, {index: states[index] for index in hidden}


def _arguments(model: nn.Module) -> tuple[frozenset[str], bool]:
    """The names that `forward` takes, and whether it takes others."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return frozenset(named), any(p.kind == p.VAR_KEYWORD for p in parameters)
