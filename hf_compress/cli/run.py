"""`hf-compress run`: do what a recipe says, from a model id to a folder that can be published; goes on after a kill."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import Failed, Wrong, add_common, filled, repository

DESCRIPTION = "Do what a recipe says, from a model id to a folder that can be published; goes on after a kill."
EXAMPLES = """\
examples:
  hf-compress run recipe.yaml
  hf-compress run recipe.yaml --output runs/second
  hf-compress run recipe.yaml --push-to-hub me/minilm-sst2-small

The recipe is checked whole before anything is trained. Interrupted, the same command goes on where it stood.
`hf-compress recipe init MODEL -o recipe.yaml` writes one to begin from.
"""

AGAIN = "What was finished is kept; the same command goes on from there."


def add(commands: Any) -> None:
    parser = commands.add_parser("run", help="do what a recipe says", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("--output", metavar="FOLDER", type=filled, help="instead of the recipe's own")
    parser.add_argument("--push-to-hub", metavar="REPO", type=repository, help="publish it there when it is done")
    add_common(parser)
    parser.set_defaults(run=run, path=("run",), live=True)


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `run`."""
    check_output(args.output)
    return run_checked(args.recipe, args.output, args.push_to_hub)


def check_output(output: str | None) -> None:
    """Refuse an --output that is no folder."""
    if output is not None:
        path = Path(output).expanduser()
        for place in (path, *path.parents):
            if place.exists() and not place.is_dir():
                raise Wrong(f"argument --output: {str(place)!r} is a file; it takes a folder.")


def run_checked(recipe: Any, output: str | None, push_to_hub: str | None = None) -> tuple[str, dict[str, Any]]:
    """Run a recipe; what fails after it was found whole is a failure of the work."""
    from safetensors import SafetensorError

    from ..edits import CompressionError
    from ..publish import PushError
    from ..recipe import RecipeError, run_recipe

    try:
        report = run_recipe(recipe, output=output, push_to_hub=push_to_hub)
    except (RecipeError, PushError):
        raise
    except CompressionError as error:
        raise Failed(str(error)) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(AGAIN) from error
    except SafetensorError as error:  # what it makes of a full disk
        raise Failed(f"Weights could not be written: {error}. Free some space, or choose another output. {AGAIN}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Failed(f"{where}{error.strerror or error}. {AGAIN}") from error
    published = report.about.get("published")
    text = f"{report}\npublished: {published['url']}" if published else str(report)
    return text, report.to_dict()
