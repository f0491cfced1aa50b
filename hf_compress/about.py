"""What a report says about its model beside numbers: checked, and as far as it can be seen, filled in."""

from __future__ import annotations

import difflib
import json
import numbers
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .discover import discover
from .edits import CompressionError
from .loader import METHOD, HfCompressConfig

TIERS = ("stock", "plugin")
LIBRARIES = ("transformers", "sentence-transformers")
# what a report may say about its model, and of which type it must be; other names are kept as they are
ABOUT: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "repo_id": str,
    "base_model": str,
    "base_revision": str,
    "base_card": dict,
    "against": str,
    "architecture": str,
    "auto_model": str,
    "library_name": str,
    "task": str,
    "dataset": dict,
    "metric": str,
    "seed": int,
    "versions": dict,
    "tier": str,
    "stages": list,
    "notes": list,
    "recipe": (str, dict),
    "pictures": list,
    "blocks": dict,
    "weights": str,
}
LARGEST = 10**24  # no count, size or time is larger
DEEPEST = 40


def is_count(value: Any) -> bool:
    """Whether this is a whole number that something can have."""
    return type(value) is int and 0 <= value < LARGEST


def is_score(value: Any) -> bool:
    """Whether this is a number that a metric can have; that of a training that diverged is nan or infinite."""
    return type(value) is float or (type(value) is int and -LARGEST < value < LARGEST)


def is_time(value: Any) -> bool:
    """Whether this is a time in seconds, or a latency as `Report.to_dict` writes it."""
    value = value.get("median") if isinstance(value, Mapping) else value
    return type(value) in (int, float) and 0 <= value < LARGEST


TEXT, DICT, COUNT, SCORE, TIME = (
    "a text",
    "a dict",
    "a whole number of 0 or more",
    "a number",
    "seconds, or a dict with 'median'",
)
FITS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str),
    DICT: lambda value: isinstance(value, Mapping),
    COUNT: is_count,
    SCORE: is_score,
    TIME: is_time,
}
DATASET = {**dict.fromkeys(("name", "config", "split", "revision", "metric_name", "task_id"), TEXT), "rows": COUNT}
STAGE = {"name": TEXT, "metric": SCORE, "latency": TIME, "parameters": COUNT, "bytes": COUNT}
CONDITIONS = {
    **dict.fromkeys(("hardware", "device", "dtype", "torch", "transformers", "platform"), TEXT),
    "threads": COUNT,
    "shapes": DICT,
}


def check_about(about: Any) -> dict[str, Any]:
    """What a report says about its model, as plain data without what is None.

    Raises:
        CompressionError: it is no dict of names, JSON cannot hold it, a value has a wrong type or shape, or a name is misspelt.
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
            raise CompressionError(f"about[{key!r}] must be of type {names}, got {_short(value)}.")
    for key, known in (("tier", TIERS), ("library_name", LIBRARIES)):
        if about.get(key, known[0]) not in known:
            raise CompressionError(f"about[{key!r}] must be one of {', '.join(map(repr, known))}, got {about[key]!r}.")
    for key in ("architecture", "auto_model"):  # they stand in code that people run
        if not about.get(key, "x").isidentifier():
            raise CompressionError(f"about[{key!r}] must be the name of a class, got {_short(about[key])}.")
    _check(COUNT, abs(about.get("seed", 0)), "about['seed']")
    _check_fields(DATASET, about.get("dataset", {}), "about['dataset']")
    _check_fields(dict.fromkeys(about.get("versions", {}), TEXT), about.get("versions", {}), "about['versions']")
    for key in ("notes", "pictures"):
        for i, text in enumerate(about.get(key, ())):
            _check(TEXT, text, f"about[{key!r}][{i}]")
    for stage in about.get("stages", ()):
        if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
            raise CompressionError(
                f"about['stages'] holds dicts with a 'name' (and metric, latency, ...), got {_short(stage)}."
            )
        _check_fields(STAGE, stage, f"about['stages'] of {stage['name']!r}: ")
    for which, sizes in about.get("blocks", {}).items():
        where = f"about['blocks'][{which!r}]"
        _check(DICT, sizes, where)
        for what, counts in sizes.items():
            _check(DICT, counts, f"{where}[{what!r}]")
            for name, number in counts.items():
                _check(COUNT, number, f"{where}[{what!r}][{name!r}]")
    return about


def check_conditions(conditions: Any) -> dict[str, Any]:
    """Where and how a report was measured, as plain data.

    Raises:
        CompressionError: it is no dict that JSON can hold, or what cards show of it has the wrong type or shape.
    """
    where = "Report.conditions"
    _check(DICT, conditions, where)
    found = as_json(dict(conditions), where)
    _check_fields(CONDITIONS, found, where)
    for name, shape in (found.get("shapes") or {}).items():
        if not isinstance(shape, list) or not all(is_count(size) for size in shape):
            raise CompressionError(f"{where}['shapes'][{name!r}] must be a list of sizes, got {_short(shape)}.")
    return {key: value for key, value in found.items() if key != "shapes" or value is not None}


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
        text = json.dumps(value, default=convert, ensure_ascii=False)
        text.encode()  # half of a surrogate pair is no text that a file can hold
        found = json.loads(text)
    except (TypeError, ValueError) as error:
        raise CompressionError(f"{where} must hold what JSON can: text, numbers, lists, dicts. Got {error}.") from None
    except RecursionError:
        raise CompressionError(TOO_DEEP.format(where)) from None
    inside = [found]
    for _ in range(DEEPEST):
        held = [one.values() if isinstance(one, dict) else one for one in inside if isinstance(one, dict | list)]
        inside = [part for parts in held for part in parts]
    if inside:
        raise CompressionError(TOO_DEEP.format(where))
    return found


TOO_DEEP = f"{{}} holds lists and dicts in each other, {DEEPEST} deep and more: that is no report."


def _check_fields(fields: Mapping[str, str], values: Mapping[str, Any], where: str) -> None:
    for name, what in fields.items():
        if values.get(name) is not None:
            _check(what, values[name], f"{where}[{name!r}]")


def _check(what: str, value: Any, where: str) -> None:
    if not FITS[what](value):
        raise CompressionError(f"{where} must be {what}, got {_short(value)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


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
HEARING = ("AutoModelForAudioClassification", "AutoModelForCTC", "AutoModelForSpeechSeq2Seq")
# what they load is better named by another class, where another has it too
LAST = ("AutoModelForMultimodalLM", "AutoModelForPreTraining", "AutoBackbone")


def _task(name: str, sounds: bool = False) -> str | None:
    task = next((tag for ending, tag in TASKS.items() if name.endswith(ending)), None)
    if sounds and task == "text-classification":
        return "audio-classification"
    return "automatic-speech-recognition" if sounds and name.endswith("ForConditionalGeneration") else task


def auto_class(architecture: str, model_type: str | None) -> str:
    """The Auto class that loads exactly this class, or the class's own name where none does.

    Args:
        architecture (`str`): a class's name, as in `config.architectures`.
        model_type (`str`, *optional*): of its config.

    Returns:
        `str`: a class of transformers, if the class itself is one.

    Example:

    ```python
    >>> from hf_compress.about import auto_class
    >>> auto_class("BertForMultipleChoice", "bert"), auto_class("BertModel", "bert"), auto_class("BertLMHeadModel", "bert")
    ('AutoModelForMultipleChoice', 'AutoModel', 'AutoModelForCausalLM')
    >>> auto_class("DPRReader", "dpr")
    'DPRReader'

    ```
    """
    fitting = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        known = getattr(mapping, "_model_mapping", {}).get(model_type, ()) if isinstance(auto, type) else ()
        if architecture in ((known,) if isinstance(known, str) else known) and hasattr(transformers, name):
            fitting.append(name)
    return min(fitting, key=lambda name: (name != "AutoModel", name in LAST, fitting.index(name)), default=architecture)


def seen(model: nn.Module, against: nn.Module | None = None) -> dict[str, Any]:
    """What can be seen of a model and its baseline, for `Report.about`: `measure` fills it in where the caller is silent.

    The task is read from the class of the model, the tier from its config; the base model and its revision are those of
    the baseline (or the model) where that was loaded from the Hub; the sizes of blocks are `discover`'s.

    Args:
        model (`nn.Module`): the model.
        against (`nn.Module`, *optional*): the one it was made from.

    Returns:
        `dict`: `versions`, and any of `architecture`, `auto_model`, `task`, `tier`, `base_model`, `base_revision`, `blocks`.

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
    name = type(model).__name__
    sounds = getattr(model, "main_input_name", None) in SOUND
    found: dict[str, Any] = {"task": _task(name, sounds), "versions": versions, "blocks": _blocks(model, against)}
    if isinstance(model, PreTrainedModel):
        record = getattr(model.config, "quantization_config", None)
        found["tier"] = "plugin" if isinstance(record, HfCompressConfig) else "stock"
        found |= {"architecture": name, "auto_model": auto_class(name, model.config.model_type)}
    base = getattr(model if against is None else against, "config", None)
    base_name, commit = getattr(base, "_name_or_path", None), getattr(base, "_commit_hash", None)
    if (
        base_name and commit and is_repo_id(base_name) and not os.path.isdir(base_name)
    ):  # only what came from the Hub has a commit
        found |= {"base_model": base_name, "base_revision": commit}
    return {key: value for key, value in found.items() if value is not None}


def seen_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved model's `config.json` tells, for its card.

    Args:
        config (`dict`): what the file holds.

    Returns:
        `dict`: `tier`, and any of `architecture`, `auto_model`, `task`.

    Example:

    ```python
    >>> from hf_compress.about import seen_in_config
    >>> seen_in_config({"architectures": ["ViTForImageClassification"], "model_type": "vit"})["auto_model"]
    'AutoModelForImageClassification'

    ```
    """
    record, names = config.get("quantization_config"), config.get("architectures")
    ours = isinstance(record, Mapping) and record.get("quant_method") == METHOD
    found: dict[str, Any] = {"tier": "plugin" if ours else "stock"}
    kind = config.get("model_type")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if isinstance(name, str) and name.isidentifier():
        auto = auto_class(name, kind if isinstance(kind, str) else None)
        task = _task(name, auto in HEARING)
        found |= {"architecture": name, "auto_model": auto, **({"task": task} if task else {})}
    return found


def is_repo_id(name: Any) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _blocks(model: nn.Module, against: nn.Module | None) -> dict[str, Any] | None:
    """Heads of every attention, neurons of every feed-forward block, channels of every convolution, layers of every stack."""
    sizes = {}
    for key, one in (("model", model), ("against", against)):
        structure = None if one is None else discover(one)
        if structure is not None and (structure.attentions or structure.ffns or structure.channels):
            heads = {block.name: block.num_heads for block in structure.attentions}
            sizes[key] = {"heads": heads, "neurons": {block.name: block.size for block in structure.ffns}}
            channels = {conv.name: conv.out_channels for conv in structure.channels}
            stacks = {stack[0].path: len(stack) for stack in structure.stacks.values()}
            sizes[key] |= {k: v for k, v in (("channels", channels), ("layers", stacks)) if v}
    return sizes or None
