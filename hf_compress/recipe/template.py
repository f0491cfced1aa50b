"""A commented recipe for a given model, to begin from."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..discover import discover, nearest
from ..edits import CompressionError
from .opening import first_line
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
        CompressionError: no such model, or no such task.

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
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # what a download or a parser raises
        raise CompressionError(f"Cannot load the model {name!r}: {first_line(error)}") from error
    task = task or _task_of(config)
    column, label = DATA[task]
    reads = TASKS[task].reads
    known = getattr(config, "max_position_embeddings", None)
    longest = min(128, known) if isinstance(known, int) and known > 0 else 128
    lines = [
        "# What is done, in order; the words under a step are the arguments of the class it stands for.",
        "# `hf-compress recipe check FILE` looks at everything; `hf-compress run FILE` does so too, then begins.",
        f"model: {_quoted(name)}",
        f"task: {task}",
        "data:",
        "  path: path/to/data             # a Hub id, a folder (train.csv, test.csv, ...; folders of images), or a file",
        "  # train: train.tsv             # or files one by one: CSV, TSV, JSON, Parquet, text",
        f"  {column}",
        *([f"  {label}"] if label else []),
        *([f"  max_length: {longest:<19}# tokens a text is cut to"] if reads == "text" else []),
        f"metric: {METRIC[task]}",
        "seed: 0",
        "steps:",
        *_steps(config, task),
        f"output: runs/{os.path.basename(name.rstrip('/')) or 'model'}-small",
        "# push: me/my-model-small        # after `hf auth login`",
    ]
    return "\n".join(lines) + "\n"


def _steps(config: Any, task: str) -> list[str]:
    structure = _structure(config, task)
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
    if structure and len(structure.layers) > 2:
        count = len(structure.layers)
        steps.append("  # half of the layers, taught by the finetuned model:")
        steps.append(f"  # - distill: {{layers: {(count + 1) // 2}, epochs: 2, temperature: 2.0}}")
        if task in ("text-classification", "image-classification"):
            steps.append("  # sure rows leave early, at a point of the metric lost at most:")
            steps.append(f"  # - exits: {{after: [{count // 2 - 1}], epochs: 1, max_drop: 0.01}}")
    if not cut and task == "image-classification":
        steps.append("  # - depthwise: {epochs: 1}       # convolutions become depthwise separable")
    steps.append("  - quantize: {bits: 8}            # 8, 4, 3 or 2; last, since nothing can be trained after it")
    length = ", length: 64" if TASKS[task].reads == "text" else ""
    steps.append(f"  - measure: {{batch_sizes: [1, 32]{length}}}")
    return steps


def _structure(config: Any, task: str) -> Any:
    import transformers

    auto: Any = getattr(transformers, TASKS[task].auto)
    try:
        with torch.device("meta"):
            return discover(auto.from_config(config))
    except Exception:  # not every model is made on the meta device, or from its config: the template does without
        return None


def _task_of(config: Any) -> str:
    found = (getattr(config, "architectures", None) or [""])[0]
    sounds = any(hasattr(config, name) for name in ("feat_extract_norm", "num_mel_bins", "conv_stride"))
    for name, task in TASKS.items():
        if task.reads in ("image", "text") and name != "sentence-similarity" and found.endswith(task.endings) and not sounds:
            return name
    if sounds:
        return "audio-classification"
    return "image-classification" if hasattr(config, "image_size") or hasattr(config, "num_channels") else "text-classification"


def _quoted(name: str) -> str:
    plain = all(c.isalnum() or c in "/._-~" for c in name) and not name.startswith(("~", "-", "."))
    return name if plain else "'" + name.replace("'", "''") + "'"
