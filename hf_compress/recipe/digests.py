"""What decides the outcome of each step, as one digest: a step whose digest is the same is not run again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import cached_file, extract_commit_hash

from .rows import digest_of, locate
from .schema import Recipe
from .tasks import Setup

FORMAT = 1
OWN_TEACHERS = ("finetuned", "previous")  # models that earlier steps made


def digests(recipe: Recipe, setup: Setup) -> list[str]:
    """Of what decides each step's outcome, from the model as given to the last step.

    Files of a folder count with their contents. A model or teacher of the Hub counts with its commit: where `main` has
    moved on, what was made from the old one is made again.
    """
    from .. import __version__

    data = recipe.as_data()
    begin = {
        "format": FORMAT,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "model": _contents(setup.model, setup.revision),
        "data": [data["data"], setup.data.digest],
        "task": data["task"],
        "seed": data["seed"],
    }
    found = []
    steps: list[Any] = []
    for step in [None, *(step for step in recipe.steps if step.name != "measure")]:
        if step is not None:
            tuned = {"mean_depth", "max_drop"} & step.options.keys()
            steps.append([step.name, step.options, data["metric"][:1] if tuned else None])
            if step.trains and step.teacher not in (None, *OWN_TEACHERS):
                path = locate(step.teacher, recipe.source)
                steps.append(_contents(str(path) if path.is_dir() else step.teacher, None))
        found.append(hashlib.sha256(json.dumps([begin, steps], sort_keys=True, default=str).encode()).hexdigest())
    return found


def _contents(model: str, revision: str | None) -> Any:
    return digest_of([model]) if Path(model).is_dir() else [model, revision, commit_of(model, revision)]


def commit_of(model: str, revision: str | None) -> str | None:
    """The commit of the Hub that a model's files are from; the cache's where the Hub is out of reach.

    Args:
        model (`str`): a Hub id.
        revision (`str`, *optional*): a branch, tag or commit.

    Returns:
        `str`: 40 hexadecimal digits; the revision itself where nothing is known of the model.
    """
    try:
        return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
    except (OSError, ValueError):
        return revision
