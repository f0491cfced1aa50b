"""What a report says about its model beside numbers: checked, and as far as it can be seen, filled in."""

from __future__ import annotations

import difflib
import json
import numbers
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from .discover import discover
from .edits import CompressionError
from .loader import HfCompressConfig

TIERS = ("stock", "plugin")
# what a report may say about its model, and of which type it must be; other names are kept as they are
ABOUT: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "repo_id": str,
    "base_model": str,
    "base_revision": str,
    "base_card": dict,
    "task": str,
    "dataset": dict,
    "metric": str,
    "seed": int,
    "versions": dict,
    "tier": str,
    "stages": list,
    "recipe": (str, dict),
    "pictures": list,
    "blocks": dict,
}


def check_about(about: Any) -> dict[str, Any]:
    """What a report says about its model, as plain data without what is None.

    Raises:
        CompressionError: it is no dict of names, JSON cannot hold it, a value has the wrong type, or a name is misspelt.
    """
    if about is None:
        return {}
    if not isinstance(about, Mapping) or not all(isinstance(key, str) for key in about):
        raise CompressionError(f"about must be a dict with any of {', '.join(ABOUT)}; got {about!r}.")
    about = {key: value for key, value in as_json(dict(about), "about").items() if value is not None}
    for key, value in about.items():
        kinds = ABOUT.get(key)
        near = difflib.get_close_matches(key, ABOUT, 1, 0.8) if kinds is None else []
        if near:
            raise CompressionError(f"about has no {key!r}; did you mean {near[0]!r}? Known: {', '.join(ABOUT)}.")
        if kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise CompressionError(f"about[{key!r}] must be of type {names}, got {value!r}.")
    if about.get("tier", "stock") not in TIERS:
        raise CompressionError(f"about['tier'] must be one of {', '.join(map(repr, TIERS))}, got {about['tier']!r}.")
    for stage in about.get("stages", ()):
        if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
            raise CompressionError(f"about['stages'] holds dicts with a 'name' (and metric, latency, ...), got {stage!r}.")
    return about


def as_json(value: Any, where: str) -> Any:
    """As JSON gives it back."""

    def convert(item: Any) -> Any:
        if isinstance(item, numbers.Integral):  # NumPy's
            return int(item)
        if isinstance(item, numbers.Real):
            return float(item)
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        raise TypeError(f"{type(item).__name__} ({item!r})")

    try:
        return json.loads(json.dumps(value, default=convert))
    except (TypeError, ValueError) as error:
        raise CompressionError(f"{where} must hold what JSON can: text, numbers, lists, dicts. Got {error}.") from None


# the Hub's names of tasks, by what a class of transformers is called
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}
SOUND = ("input_values", "input_features")


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    task = next((tag for ending, tag in TASKS.items() if name.endswith(ending)), None)
    sounds = getattr(model, "main_input_name", None) in SOUND
    if sounds and task == "text-classification":
        return "audio-classification"
    return "automatic-speech-recognition" if sounds and name.endswith("ForConditionalGeneration") else task


def seen(model: nn.Module, against: nn.Module | None = None) -> dict[str, Any]:
    """What can be seen of a model and its baseline, for `Report.about`: `measure` fills it in where the caller is silent.

    The task is read from the class of the model, the tier from its config; the base model and its revision are those of
    the baseline (or the model) where that was loaded from the Hub; the sizes of blocks are `discover`'s.

    Args:
        model (`nn.Module`): the model.
        against (`nn.Module`, *optional*): the one it was made from.

    Returns:
        `dict`: `versions`, and any of `task`, `tier`, `base_model`, `base_revision`, `blocks`.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForTokenClassification
    >>> from hf_compress.about import seen
    >>> config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    >>> facts = seen(BertForTokenClassification(config))
    >>> facts["task"], facts["tier"], facts["blocks"]["model"]["neurons"]
    ('token-classification', 'stock', {'bert.encoder.layer.0': 64})

    ```
    """
    from . import __version__

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_compress": __version__,
    }
    if "datasets" in sys.modules:
        versions["datasets"] = sys.modules["datasets"].__version__
    found: dict[str, Any] = {"task": _task(model), "versions": versions, "blocks": _blocks(model, against)}
    if isinstance(model, PreTrainedModel):
        record = getattr(model.config, "quantization_config", None)
        found["tier"] = "plugin" if isinstance(record, HfCompressConfig) else "stock"
    base = getattr(model if against is None else against, "config", None)
    name, commit = getattr(base, "_name_or_path", None), getattr(base, "_commit_hash", None)
    if name and commit and is_repo_id(name) and not os.path.isdir(name):  # only what came from the Hub has a commit
        found |= {"base_model": name, "base_revision": commit}
    return {key: value for key, value in found.items() if value is not None}


def is_repo_id(name: Any) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _blocks(model: nn.Module, against: nn.Module | None) -> dict[str, Any] | None:
    """Heads of every attention and neurons of every feed-forward block, of both."""
    sizes = {}
    for key, one in (("model", model), ("against", against)):
        structure = None if one is None else discover(one)
        if structure is not None and (structure.attentions or structure.ffns):
            heads = {block.name: block.num_heads for block in structure.attentions}
            sizes[key] = {"heads": heads, "neurons": {block.name: block.size for block in structure.ffns}}
    return sizes or None
