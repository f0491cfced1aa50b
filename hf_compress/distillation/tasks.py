"""What a model predicts, and which rows or tokens of a batch count. Read from the class and the batch, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# how a class name ends, and what its logits are
TASKS = {
    "ForSequenceClassification": "rows",  # (rows, classes)
    "ForImageClassification": "rows",
    "ForImageClassificationWithTeacher": "rows",
    "ForVideoClassification": "rows",
    "ForAudioClassification": "rows",
    "ForMultipleChoice": "rows",
    "ForNextSentencePrediction": "rows",
    "ForTokenClassification": "tokens",  # (rows, tokens, classes)
    "ForQuestionAnswering": "spans",  # start and end: (rows, tokens) each
    "ForMaskedLM": "masked_lm",  # (rows, tokens, vocabulary)
    "ForCausalLM": "causal_lm",  # the same, one token ahead
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "seq2seq_lm",  # (rows, target tokens, vocabulary); causal_lm without an encoder
}
LANGUAGE = ("masked_lm", "causal_lm", "seq2seq_lm")


def task_of(model: nn.Module) -> str | None:
    """One of the values of `TASKS`, from the name of the model's class; None where it does not tell."""
    name = type(model).__name__
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    if task in ("causal_lm", "seq2seq_lm"):
        return "seq2seq_lm" if getattr(model.config, "is_encoder_decoder", False) else "causal_lm"
    return task


def real_tokens(inputs: Mapping[str, Any], decoder: bool = False) -> torch.Tensor | None:
    """Bool (rows, tokens), false at padding; None where the inputs are not tokens (images, sound).

    Of several choices a row, (rows · choices, tokens), as the model that reads them flattens them.

    `decoder`: of the target side of an encoder-decoder, where a label of -100 is padding too.
    """
    if decoder:
        mask, ids, labels = (inputs.get(key) for key in ("decoder_attention_mask", "decoder_input_ids", "labels"))
        found = [part for part in (None if mask is None else mask != 0, None if labels is None else labels != -100)
                 if part is not None]  # fmt: skip
        if found:
            return found[0] if len(found) == 1 else found[0] & found[1]
        return None if ids is None else torch.ones_like(ids, dtype=torch.bool)
    ids = inputs.get("input_ids")
    if ids is None and inputs.get("inputs_embeds") is not None:
        ids = inputs["inputs_embeds"][..., 0]
    mask = inputs.get("attention_mask")
    given = ids is not None and mask is not None and mask.shape == ids.shape
    if ids is None or not (ids.dim() == 2 or (ids.dim() == 3 and given)):
        return None
    return (mask != 0).flatten(0, -2) if given else torch.ones_like(ids, dtype=torch.bool)


def distilled_tokens(task: str, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Bool (rows, tokens): the positions whose logits are compared with the teacher's; None where rows count.

    Padding is always left out. Where there are labels, so is what they leave out (-100), except in a masked LM: there all
    real tokens count, masked or not, as in DistilBERT's code (its `restrict_ce_to_mask` is off). Position t of a causal LM
    counts if token t + 1 does, for that is what it predicts.
    """
    if task not in ("tokens", *LANGUAGE):
        return None
    labels = inputs.get("labels")
    if task == "seq2seq_lm":
        return real_tokens(inputs, decoder=True)
    mask = real_tokens(inputs)
    if mask is None or task == "masked_lm":
        return mask
    if task == "tokens":
        return mask if labels is None else mask & (labels != -100)
    if inputs.get("shift_labels") is not None:  # a collator without padding has shifted them already
        return mask & (inputs["shift_labels"] != -100)
    following = mask if labels is None else mask & (labels != -100)
    return mask & torch.cat([following[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def count_rows(inputs: Mapping[str, Any]) -> torch.Tensor:
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim())
    return torch.tensor(first.shape[0], device=first.device)


def count_labels(task: str, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What the mean in the student's own loss is taken over: labels that are not ignored, or rows."""
    labels = inputs.get("labels")
    if task == "spans" and inputs.get("start_positions") is not None:  # positions past the end are ignored
        length = next(inputs[key].shape[1] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
        return (inputs["start_positions"] < length).sum()
    if labels is None or labels.is_floating_point():
        return count_rows(inputs)
    if task == "causal_lm":
        shifted = inputs.get("shift_labels")
        labels = labels[..., 1:] if shifted is None else shifted
    return (labels != -100).sum()
