"""Recipes: a YAML file that is the same thing as the Python calls."""

from .reading import RecipeError
from .run import read_recipe, run_recipe
from .schema import Recipe
from .template import recipe_template

__all__ = ["Recipe", "RecipeError", "read_recipe", "recipe_template", "run_recipe"]
