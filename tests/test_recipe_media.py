"""Shipped recipes of images, sounds and language models run on a tiny model of their kind."""

from __future__ import annotations

import pytest

from tests.recipe_runs import SHIPPED, check_shipped

PATHS = [path for path in SHIPPED if path.stem in ("image-classification", "audio-classification", "text-generation")]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_shipped_recipes_run(path, tmp_path):
    check_shipped(path, tmp_path)
