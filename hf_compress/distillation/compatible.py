"""Whether a student can learn from these teachers; what does not fit is refused before training is set up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..plan import CompressionError
from ..probe import NoInputs, quiet_run
from ..pruning.callback import PruningCallback
from ..pruning.sparsity_callback import SparsityCallback
from ..quantization import is_quantized
from ..quantization.callback import QuantizationCallback
from .arguments import DistillationArguments
from .tasks import LANGUAGE, task_of

# chances with which layers are skipped in training
LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def as_teachers(given: Any) -> tuple[nn.Module, ...]:
    """One teacher or several as a tuple; refused if they are not models."""
    if given is None:
        raise CompressionError(
            "DistillationTrainer needs teacher_model=, a model or a list of models. (With a callback that compresses in "
            "callbacks=, the model as it is teaches itself.)"
        )
    teachers = tuple(given) if isinstance(given, list | tuple | nn.ModuleList) else (given,)
    if not teachers:
        raise CompressionError("teacher_model is an empty list; give one model or several.")
    for teacher in teachers:
        if isinstance(teacher, str | os.PathLike):
            raise CompressionError(
                f"teacher_model={teacher!r} is a path, and only you know its class: pass the model, such as "
                f"AutoModelForSequenceClassification.from_pretrained({str(teacher)!r})."
            )
        if not isinstance(teacher, nn.Module) or getattr(teacher, "config", None) is None:
            raise CompressionError(f"A teacher is a transformers model (a module with a config), got {type(teacher).__name__}.")
    return teachers


def changes_weights(callback: Any) -> bool:
    """Whether a callback, or class of one, compresses the student while it learns."""
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, PruningCallback | SparsityCallback | QuantizationCallback)


def plain(model: Any) -> Any:
    """The model inside torch.compile or adapters: the one whose class and config tell what it does."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def check_pair(student: Any, teachers: Sequence[nn.Module], arguments: DistillationArguments) -> str | None:
    """Refuse teachers that this student cannot learn from; return what their logits are (see `TASKS`).

    Raises:
        CompressionError: a teacher that is the student or shares trainable weights with it, another kind of input, another
            vocabulary, other labels or the same in another order, another problem type or task, a number of weights that
            is not the number of teachers; a quantized student.
    """
    weights = arguments.teacher_weights
    if weights is not None and len(weights) != len(teachers):
        raise CompressionError(f"teacher_weights has {len(weights)} numbers for {len(teachers)} teachers; give one for each.")
    if getattr(plain(student), "config", None) is None:
        raise CompressionError(f"The student is a transformers model (a module with a config), got {type(student).__name__}.")
    adapted = hasattr(student, "peft_config") or getattr(student, "_hf_peft_config_loaded", False)
    quantized = next((name for name, module in student.named_modules() if is_quantized(module)), None)
    if quantized is not None and not adapted:  # adapters train beside integers
        raise CompressionError(
            f"The student is quantized ({quantized!r}), and integers do not train. Train the float model with a "
            "QuantizationCallback in this Trainer, or quantize it after training."
        )
    task = arguments.distillation_task or task_of(plain(student))
    if task is None and arguments.alpha_kd:
        raise CompressionError(
            f"Cannot tell from {type(plain(student)).__name__} what its logits are. Say so with distillation_task= "
            "('rows', 'tokens', 'spans', 'masked_lm', 'causal_lm', 'seq2seq_lm'), or set alpha_kd=0."
        )
    learning = {id(p) for p in student.parameters() if p.requires_grad}
    for i, teacher in enumerate(teachers):
        who = "The teacher" if len(teachers) == 1 else f"Teacher {i}"
        if plain(teacher) is plain(student):
            raise CompressionError(f"{who} is the student itself, which has nothing to learn from it; pass a copy.")
        if any(id(p) in learning for p in teacher.parameters()):
            raise CompressionError(f"{who} shares weights with the student and would change as it learns; pass a deepcopy.")
        _check(plain(student), plain(teacher), who, task, arguments)
    return task


def _check(student: Any, teacher: Any, who: str, task: str | None, arguments: DistillationArguments) -> None:
    mine, theirs = getattr(student, "main_input_name", None), getattr(teacher, "main_input_name", None)
    if mine != theirs:
        raise CompressionError(f"{who} reads {theirs!r} and the student {mine!r}; both must read the same batch.")
    if mine == "input_ids" or task in LANGUAGE:
        mine, theirs = _vocabulary(student), _vocabulary(teacher)
        if mine != theirs:
            raise CompressionError(
                f"{who} has a vocabulary of {theirs} tokens and the student one of {mine}: the same ids would mean other "
                "words. Use a student with the teacher's tokenizer."
            )
    if not arguments.alpha_kd:
        return
    other = arguments.distillation_task or task_of(teacher)
    if other != task:
        raise CompressionError(
            f"{who} ({type(teacher).__name__}) does not predict what the student ({type(student).__name__}) predicts: "
            f"{other} and {task}. Load both with the same AutoModelFor class."
        )
    if task not in ("rows", "tokens") or not has_labels(student):
        return
    mine, theirs = student.config.num_labels, teacher.config.num_labels
    if mine != theirs:
        raise CompressionError(f"{who} has {theirs} labels and the student {mine}; build it with num_labels={theirs}.")
    ours, other = _names(student), _names(teacher)
    if ours and other and ours != other:
        same = "the same labels in another order" if sorted(ours) == sorted(other) else "other labels"
        raise CompressionError(
            f"{who} has {same}: {other}, the student {ours}. Give the student the teacher's id2label and label2id, and "
            "data that is labelled so."
        )
    mine, theirs = student.config.problem_type, teacher.config.problem_type
    if mine and theirs and mine != theirs:
        raise CompressionError(
            f"{who} was trained for {theirs!r} and the student's config says {mine!r}; make problem_type agree."
        )


def has_labels(model: Any) -> bool:
    """Whether the outputs of a classifier are its config's labels, and not the choices of a batch."""
    return not type(model).__name__.endswith(("MultipleChoice", "NextSentencePrediction"))


def _vocabulary(model: Any) -> int | None:
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(text, "vocab_size", None)


def _names(model: Any) -> list[str] | None:
    """The names of the labels in order, in lower case; None where they are the LABEL_0, LABEL_1 of a config without names."""
    names = [str(name).lower() for _, name in sorted((model.config.id2label or {}).items())]
    return None if names == [f"label_{i}" for i in range(len(names))] else names


def hidden_states(outputs: Mapping[str, Any], model: Any) -> tuple[torch.Tensor, ...]:
    """The hidden states in an output; of an encoder-decoder, its decoder's."""
    return outputs[hidden_key(model)]


def hidden_key(model: Any) -> str:
    return "decoder_hidden_states" if getattr(plain(model).config, "is_encoder_decoder", False) else "hidden_states"


def match_layers(
    student: Any, teacher: Any, layer_map: dict[int, int] | None, batches: Sequence[Mapping[str, Any]]
) -> tuple[dict[int, int], dict[int, tuple[int, int]]]:
    """The layer map with indices from 0, and the two widths of every pair that differs.

    Both models run once on a small batch (the student's inputs, then the teacher's), since configs do not tell the widths.

    Raises:
        NoInputs: a model does not run on its batch.
        CompressionError: an index out of range, hidden states that are not (rows, tokens, width), other numbers of tokens, a
            student with LayerDrop.
    """
    layer_map = {-1: -1} if layer_map is None else layer_map
    dropped = next((n for n in LAYER_DROP if (getattr(plain(student).config, n, None) or 0) > 0), None)
    if dropped is not None:
        raise CompressionError(
            f"alpha_cos compares hidden states by their layer, but the student leaves layers out at random while it trains "
            f"(config.{dropped}). Set student.config.{dropped} = 0, or alpha_cos=0."
        )
    states = []
    for who, model, batch in (("student", student, batches[0]), ("teacher", teacher, batches[1])):
        try:
            with quiet_run(model) as run:
                states.append(hidden_states(run({**batch, "output_hidden_states": True}), model))
        except Exception as error:  # a model may refuse an input in any way
            raise NoInputs(
                f"alpha_cos compares hidden states, but the {who} ({type(plain(model)).__name__}) gave none on a small batch: "
                f"{type(error).__name__}: {error}. Set alpha_cos=0."
            ) from error
    found: dict[int, int] = {}
    widths: dict[int, tuple[int, int]] = {}
    for pair in layer_map.items():
        for who, index, all_states in zip(("student", "teacher"), pair, states, strict=True):
            if not -len(all_states) <= index < len(all_states):
                raise CompressionError(
                    f"layer_map names hidden state {index} of the {who}, which has {len(all_states)} (0 is what enters the "
                    f"first layer, {len(all_states) - 1} or -1 what leaves the last)."
                )
        index, other = pair[0] % len(states[0]), pair[1] % len(states[1])
        one, two = states[0][index], states[1][other]
        if index in found:
            raise CompressionError(f"layer_map names hidden state {index} of the student twice ({layer_map}).")
        if one.dim() != 3 or one.shape[:-1] != two.shape[:-1]:
            raise CompressionError(
                f"Hidden state {index} of the student is {tuple(one.shape)} and {other} of the teacher {tuple(two.shape)}; "
                "they must be (rows, tokens, width) with the same rows and tokens. Choose others in layer_map, or set "
                "alpha_cos=0."
            )
        found[index] = other
        if one.shape[-1] != two.shape[-1]:
            widths[index] = (one.shape[-1], two.shape[-1])
    return found, widths
