"""What a recipe's report says beside its numbers: of which model and data they are, and what to know about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .digests import commit_of
from .rows import locate
from .schema import Recipe
from .steps import Step
from .tasks import Setup

RECIPE_FILE = "recipe.yaml"


def about(
    recipe: Recipe, setup: Setup, name: str, metric: str, stages: list[dict[str, Any]], against: str, notes: list[str]
) -> dict[str, Any]:
    """`Report.about` of a recipe's result. Of a file or folder only the last part of its path is told.

    Args:
        recipe (`Recipe`), setup (`Setup`): what was run.
        name (`str`): what the result is called.
        metric (`str`): the main one.
        stages (`list[dict]`): see `stage_row`.
        against (`str`): what the baseline is called.
        notes (`list[str]`): whole sentences on what the numbers do not say.
    """
    from ..card import base_facts

    data = recipe.data
    place = data.path or getattr(data, setup.data.measured, None) or data.train
    local = Path(setup.model).is_dir()
    return {
        "name": name,
        "base_model": f"./{last_part(setup.model)}" if local else recipe.model,
        "base_revision": None if local else commit_of(setup.model, setup.revision),
        "base_card": base_facts(setup.model, revision=setup.revision) or None,
        "against": against,
        "task": recipe.task,
        "dataset": {
            "name": f"./{last_part(place)}" if place and locate(place, recipe.source).exists() else place,
            "config": data.config,
            "split": setup.data.measured,
            "rows": len(setup.data.splits["measured"]),
            "metric_name": metric,
        },
        "metric": metric,
        "seed": recipe.seed,
        "recipe": RECIPE_FILE,
        "stages": stages,
        "notes": notes or None,
    }


def last_part(name: str) -> str:
    """Of a path or Hub id: nobody need know where a folder lies on this computer.

    ```python
    >>> from hf_compress.recipe.results import last_part
    >>> last_part("/home/me/models/bert/"), last_part("sentence-transformers/all-MiniLM-L6-v2")
    ('bert', 'all-MiniLM-L6-v2')

    ```
    """
    path = Path(name).expanduser()
    return (path.resolve() if path.exists() else path).name


def notes_on(setup: Setup, steps: Sequence[Step], base: int, teacher: str | None) -> list[str]:
    """What to know about the baseline and the rows.

    Args:
        setup (`Setup`): its data's notes come first.
        steps (`list[Step]`): of the recipe, without `measure`.
        base (`int`): how many of them the baseline has behind it.
        teacher (`str`, *optional*): what the baseline is called, where that is a teacher.
    """
    notes = list(setup.data.notes)
    trained = [step.name for step in steps[base:] if step.trains]
    if teacher is not None:
        notes.append(f"The baseline is the teacher, {teacher}: the model itself began with a new head, which knew nothing.")
    elif trained and any(step.name != "finetune" for step in steps):
        names = " and ".join(filter(None, [", ".join(trained[:-1]), trained[-1]]))
        notes.append(f"The compressed model was trained further than the baseline ({names}), which is part of its metric.")
    return list(dict.fromkeys(notes))


def stage_row(known: Mapping[str, Any], metric: str, cost: Any, step: Step | None = None) -> dict[str, Any]:
    """A row of the card's table of stages: what a step left, and what that costs; a step that had a teacher says so."""
    name = known["name"].partition("-")[2]
    taught = step is not None and step.name != "distill" and step.trains and step.teacher is not None
    return {
        "name": f"{name}, distilled" if taught else name,
        "metric": known["metrics"][metric],
        "latency": cost.latency.median,
        "parameters": cost.parameters,
        "bytes": cost.bytes,
    }
