"""Every shipped recipe parses; those of texts run on a tiny model of their kind."""

from __future__ import annotations

import pytest

from hf_compress.recipe.reading import read_source
from hf_compress.recipe.schema import parse
from tests.recipe_models import WORLDS
from tests.recipe_runs import SHIPPED, check_shipped

PATHS = [path for path in SHIPPED if path.stem not in ("image-classification", "audio-classification", "text-generation")]


def test_a_recipe_is_shipped_for_every_task():
    assert [path.stem for path in SHIPPED] == sorted(WORLDS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    recipe = parse(*read_source(path))
    assert recipe.task == path.stem
    assert [step.name for step in recipe.steps][-2:] == ["quantize", "measure"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_shipped_recipes_run(path, tmp_path):
    check_shipped(path, tmp_path)
