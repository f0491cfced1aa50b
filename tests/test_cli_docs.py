"""docs/recipes.md names every word that recipes know, with its type and default, as the code has them."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hf_compress import measure
from hf_compress.distillation import DistillationArguments
from hf_compress.exits.callback import EarlyExitCallback
from hf_compress.planners import plan_depthwise, plan_low_rank
from hf_compress.pruning import plan_pruning
from hf_compress.pruning.callback import PruningCallback
from hf_compress.quantization.callback import QuantizationCallback
from hf_compress.recipe.data import DataOptions
from hf_compress.recipe.metrics import METRICS, SAME, TAGS
from hf_compress.recipe.schema import PUSH, TOP
from hf_compress.recipe.steps import STEPS
from hf_compress.recipe.tasks import TASKS
from hf_compress.recipe.training import TRAINING, WORDS, arguments_for
from hf_compress.recipe.values import in_words
from hf_compress.recipe.words import distillation_words, training_words, words_of

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
OWNERS: dict[str, tuple[Any, ...]] = {
    "prune": (PruningCallback, plan_pruning),
    "quantize": (QuantizationCallback,),
    "low_rank": (plan_low_rank,),
    "depthwise": (plan_depthwise,),
    "exits": (EarlyExitCallback,),
    "measure": (measure,),
}
Table = dict[str, tuple[str, str]]  # word -> type and default


def shown(value: Any) -> str:
    """A default as the page writes it; nothing where leaving the word out means something of its own."""
    if value is inspect.Parameter.empty or value is MISSING:
        return "needed"
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    value = getattr(value, "value", value)
    return f"{value:g}" if isinstance(value, int | float) else f"`{value}`" if len(value) < 24 else "output heads"


def defaults_of(*sources: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source in reversed(sources):
        function = source.__init__ if inspect.isclass(source) else source
        found |= {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return found


def tables() -> dict[str, Table]:
    """The tables that the page must have, by the words of their headings."""
    hints = get_type_hints(DataOptions)
    found: dict[str, Table] = {
        "data": {field.name: (in_words(hints[field.name]), shown(field.default)) for field in fields(DataOptions)},
        "push": {word: (in_words(kind), "needed" if word == "repo" else "") for word, kind in PUSH.items()},
    }
    made = arguments_for({}, "unused", 0, False)
    left_out = {word: getattr(made, WORDS.get(word, word)) for word in TRAINING}
    left_out |= {"seed": None, "max_steps": None}  # the recipe's; by epochs
    found["training"] = {word: (in_words(kind), shown(left_out[word])) for word, kind in training_words().items()}
    given = {field.name: field.default for field in fields(DistillationArguments)}
    found["teacher"] = {word: (in_words(kind), shown(given[word])) for word, kind in distillation_words().items()}
    found["teacher"]["teacher"] = ("a text", "")
    for step, kind in STEPS.items():
        owners = OWNERS.get(step, ())
        theirs, defaults = words_of(*owners), defaults_of(*owners)
        own = [
            word for word in kind.words if word in theirs or not {word} & (found["training"].keys() | found["teacher"].keys())
        ]
        found[step] = {word: (in_words(kind.words[word]), shown(defaults.get(word))) for word in own}
    return found


def on_the_page() -> dict[str, Table]:
    found: dict[str, Table] = {}
    for part in re.split(r"^###? ", PAGE.read_text(), flags=re.M)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) \| ([^|]*?) \| [A-Za-z`\[0-9][^|]+\|$", part, re.M)
        name = re.match(r"`(\w+)`", part)
        if rows and name:
            found[name[1]] = {word: (kind.strip(), default.strip()) for word, kind, default in rows}
    return found


@pytest.mark.parametrize("name", [name for name, table in tables().items() if table])
def test_every_word_is_on_the_page(name):
    assert on_the_page().get(name) == tables()[name]


def test_the_tables_are_all_that_recipes_know():
    """What `tables` calls shared is shared: nothing that a step knows is in no table."""
    found = tables()
    for step, kind in STEPS.items():
        assert kind.words.keys() <= found[step].keys() | found["training"].keys() | found["teacher"].keys()


def test_tasks_metrics_steps_and_keys_are_named():
    text = PAGE.read_text()
    for word in (*TASKS, *METRICS, *TAGS, *SAME, *STEPS, *TOP):
        assert f"`{word}`" in text or f"`{word}:" in text, word


def test_the_readme_leads_there():
    assert "docs/recipes.md" in (PAGE.parent.parent / "README.md").read_text()
