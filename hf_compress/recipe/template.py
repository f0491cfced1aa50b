"""A commented recipe for a given model, to begin from."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import yaml

from ..discover import discover, nearest
from ..edits import CompressionError, Quantize
from ..exits.options import resolve_exits
from ..probe import NoInputs, longest_text
from ..publish import plan_of_config
from .opening import _is_encoder, first_line
from .tasks import TASKS

DATA = {
    "text-classification": (
        "text: text                     # the column of texts; text_pair: a second one",
        "label: label",
    ),
    "token-classification": ("tokens: tokens                 # the column of lists of words", "label: ner_tags"),
    "image-classification": ("image: image                   # pictures, or paths of pictures", "label: label"),
    "text-generation": ("text: text", None),
    "sentence-similarity": ("text: sentence1\n  text_pair: sentence2", "label: score                   # numbers"),
    "audio-classification": ("audio: audio                   # sounds, or paths of WAV files", "label: label"),
}
MAIN_INPUTS = {"text": ("input_ids",), "image": ("pixel_values",), "audio": ("input_values",)}
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")  # that one YAML or the other takes for no text
METRIC = {
    "text-classification": "accuracy                    # or f1, matthews; for numbers: pearson, mse; any of `evaluate`",
    "token-classification": "f1                          # of whole spans, as seqeval; or accuracy",
    "image-classification": "accuracy                    # or f1, matthews; any of `evaluate`",
    "text-generation": "perplexity",
    "sentence-similarity": "spearman                    # or pearson, mse",
    "audio-classification": "accuracy                    # or f1, matthews; any of `evaluate`",
}


def recipe_template(model: str | os.PathLike, task: str | None = None) -> str:
    """A commented recipe for a model, as YAML text: its task and the steps that its structure allows.

    Args:
        model (`str` or `os.PathLike`): a Hub id or a folder. Its config is read, not its weights.
        task (`str`, *optional*): one of the tasks of recipes; by default what the model's head is for, else text (or
            image, audio) classification.

    Raises:
        CompressionError: no such model, no such task, one that this kind of model is not for, or a model whose weights are
            integers and cannot be trained.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers import BertConfig
    >>> from hf_compress.recipe import recipe_template
    >>> folder = tempfile.mkdtemp()
    >>> BertConfig(num_hidden_layers=2, architectures=["BertForTokenClassification"]).save_pretrained(folder)
    >>> print(recipe_template(folder).splitlines()[3])
    task: token-classification

    ```
    """
    from transformers import AutoConfig

    name = os.fspath(model)
    if task is not None and task not in TASKS:
        raise CompressionError(f"Unknown task {task!r}{nearest(task, list(TASKS))} Tasks: {', '.join(TASKS)}.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what a download or a parser raises
        raise CompressionError(f"Cannot load the model {name!r}: {first_line(error)}") from error
    if any(isinstance(edit, Quantize) for edit in plan_of_config(config) or ()):
        raise CompressionError(
            f"{name!r} is quantized: its weights are integers and cannot be trained. Begin with the float model, or save "
            "`model.dequantize()` first."
        )
    fitting = tasks_for(config)
    if not fitting or task not in (None, *fitting):
        told = f"tasks that fit it: {', '.join(fitting)}" if fitting else f"recipes train {', '.join(TASKS)}"
        raise CompressionError(f"{name!r} ({config.model_type}) is no model for {task or 'any task of recipes'}; {told}.")
    task = task or _task_of(config, fitting)
    column, label = DATA[task]
    reads = TASKS[task].reads
    longest = _longest(name, config) if reads == "text" else None
    last = os.path.basename(os.path.realpath(name) if os.path.isdir(name) else name.rstrip("/")) or "model"
    lines = [
        "# What is done, in order; the words under a step are the arguments of the class it stands for.",
        "# `hf-compress recipe check FILE` looks at everything; `hf-compress run FILE` does so too, then begins.",
        f"model: {quoted(name)}",
        f"task: {task}{_new_head(config, task)}",
        "data:",
        "  path: path/to/data             # a Hub id, a folder (train.csv, test.csv, ...; folders of images), or a file",
        "  # train: train.tsv             # or files one by one: CSV, TSV, JSON, Parquet, text",
        f"  {column}",
        *([f"  {label}"] if label else []),
        *([f"  max_length: {longest:<19}# tokens a text is cut to"] if longest else []),
        f"metric: {METRIC[task]}",
        "seed: 0",
        "steps:",
        *_steps(config, task, longest),
        f"output: {quoted(f'runs/{last}-small')}",
        "# push: me/my-model-small        # after `hf auth login`",
    ]
    return "\n".join(lines) + "\n"


def tasks_for(config: Any) -> list[str]:
    """The tasks of recipes that a model of this kind can be trained for."""
    several = getattr(config, "is_encoder_decoder", False)
    found = []
    for name, task in TASKS.items():
        kind = _class_for(config, name)
        inputs = getattr(kind, "main_input_name", "input_ids")
        if kind is None or inputs not in MAIN_INPUTS[task.reads]:
            continue
        # an encoder-decoder needs inputs of its own, or (as a classifier) texts that all end with one token; nothing here knows
        if several and name in ("text-classification", "sentence-similarity", "text-generation"):
            continue
        if name == "sentence-similarity" and hasattr(config, "vision_config"):
            continue
        if name == "text-generation" and getattr(config, "is_decoder", None) is False and _is_encoder(config):
            continue
        found.append(name)
    return found


def _class_for(config: Any, task: str) -> Any:
    """The class that a recipe of this task loads; None where transformers has none."""
    import transformers

    auto: Any = getattr(transformers, TASKS[task].auto)
    kind = auto._model_mapping.get(type(config), None)
    return kind[0] if isinstance(kind, tuple) else kind


def _new_head(config: Any, task: str) -> str:
    """What is trained, where it is not what the model was saved with."""
    saved, kind = (getattr(config, "architectures", None) or [""])[0], _class_for(config, task).__name__
    if (
        not saved
        or saved == kind
        or saved.endswith(TASKS[task].endings)
        or not TASKS[task].wanted
        or task == "sentence-similarity"
    ):
        return ""
    left = "" if saved.endswith("Model") else f"; the head of {saved} is left out"
    return f"  # trains {kind}, whose head is new{left}"


def _longest(name: str, config: Any) -> int:
    """Tokens that texts are cut to: 128, or what the model and its tokenizer allow."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    most = [128, longest_text(config), get_tokenizer_config(name).get("model_max_length")]
    return min(int(n) for n in most if isinstance(n, int | float) and n >= 2)


def _steps(config: Any, task: str, longest: int | None) -> list[str]:
    model = _without_weights(config, task)
    structure = None if model is None else discover(model)
    steps = ["  - finetune: {epochs: 2, learning_rate: 5.0e-5, batch_size: 32}"]
    cut = (
        [f"{what}: 0.5" for what, found in (("heads", structure.attentions), ("neurons", structure.ffns)) if found]
        if structure
        else []
    )
    if cut:
        steps.append(f"  - prune: {{{', '.join(cut)}, epochs: 1, teacher: previous}}   # the share that goes, while training")
    else:
        steps.append("  # no heads or neurons were found that could be pruned")
    count = min((len(layers) for layers in structure.stacks.values()), default=0) if structure else 0
    half = (count + 1) // 2
    if count > 2:
        steps.append("  # half of the layers, taught by the finetuned model:")
        steps.append(f"  # - distill: {{layers: {half}, epochs: 2, temperature: 2.0}}")
        if task in ("text-classification", "image-classification") and _can_exit(config, model):
            steps.append("  # sure rows leave early, at a point of the metric lost at most:")
            steps.append(f"  # - exits: {{after: [{half // 2 - 1}], epochs: 1, max_drop: 0.01}}")
    if not cut and task == "image-classification":
        steps.append("  # - depthwise: {epochs: 1}       # convolutions become depthwise separable")
    if structure is None or cut or structure.embeddings:
        steps.append("  - quantize: {bits: 8}            # 8, 4, 3 or 2; last, since nothing can be trained after it")
    length = f", length: {min(64, longest)}" if longest else ""
    steps.append(f"  - measure: {{batch_sizes: [1, 32]{length}}}")
    return steps


def _without_weights(config: Any, task: str) -> Any:
    import transformers

    auto: Any = getattr(transformers, TASKS[task].auto)
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception:  # not every model is made on the meta device, or from its config: the template does without
        return None


def _can_exit(config: Any, model: Any) -> bool:
    if getattr(config, "is_encoder_decoder", False):  # which of the stacks would leave early?
        return False
    try:
        resolve_exits(model, [0], pool="mean")
    except NoInputs:  # without weights it may not run; it is believed
        return True
    except CompressionError:
        return False
    return True


def _task_of(config: Any, fitting: list[str]) -> str:
    found = (getattr(config, "architectures", None) or [""])[0]
    for name in fitting:
        if name != "sentence-similarity" and found.endswith(TASKS[name].endings):
            return name
    preferred = ("text-classification", "image-classification", "audio-classification")
    return next((name for name in preferred if name in fitting), fitting[0])


def quoted(text: str) -> str:
    """A text as a value in YAML, read back as the same by YAML 1.1 and 1.2.

    ```python
    >>> from hf_compress.recipe.template import quoted
    >>> print(quoted("me/bert-small"), quoted("it's: #1"), quoted("3e5"), quoted("no"))
    me/bert-small 'it''s: #1' '3e5' 'no'

    ```
    """
    if re.fullmatch(r"[A-Za-z/][A-Za-z0-9/._-]*", text) and text.lower() not in WORDS:
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return yaml.dump(text, default_style='"', allow_unicode=True, width=1 << 20).rstrip("\n")
