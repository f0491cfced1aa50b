"""`hf-compress recipe`: write, check, list and show recipes."""

from __future__ import annotations

import argparse
import os
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from .arguments import Parser, Wrong, add_common, did_you_mean, filled
from .models import config_of, find
from .output import table
from .run import check_output

DESCRIPTION = "Write, check, list and show recipes."
EXAMPLES = """\
examples:
  hf-compress recipe init distilbert/distilbert-base-uncased -o recipe.yaml    a commented one for a model
  hf-compress recipe check recipe.yaml                                         every mistake, with file and line
  hf-compress recipe list                                                      the ones that ship
  hf-compress recipe show text-classification > recipe.yaml
"""
INIT = """\
examples:
  hf-compress recipe init distilbert/distilbert-base-uncased
  hf-compress recipe init google/vit-base-patch16-224 -o vit.yaml
  hf-compress recipe init bert-base-cased --task token-classification
"""
CHECK = """\
examples:
  hf-compress recipe check recipe.yaml
  hf-compress recipe check recipe.yaml --output runs/second --json

Words, types, order, model, data, columns and metric are looked at, and every step is tried on the model without training.
"""
SHOW = """\
examples:
  hf-compress recipe show image-classification
  hf-compress recipe show text-classification > recipe.yaml
"""


def add(commands: Any) -> None:
    group = commands.add_parser("recipe", help="write, check, list and show recipes", description=DESCRIPTION, epilog=EXAMPLES)
    group.add_argument("--debug", action="store_true", help="show the traceback of whatever fails")
    verbs = group.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=Parser)

    init = verbs.add_parser("init", help="a commented recipe for a model", description="A recipe to begin from.", epilog=INIT)
    init.add_argument("model", metavar="MODEL", help="a Hub id or a folder; its config is read, not its weights")
    init.add_argument("--task", type=filled, help="such as text-classification; default: what the model's head is for")
    init.add_argument("-o", "--output", metavar="FILE", type=filled, help="a new file; default: print it")
    add_common(init, table=False)
    init.set_defaults(run=run_init, path=("recipe", "init"))

    check = verbs.add_parser("check", help="find every mistake", description="Is a recipe whole?", epilog=CHECK)
    check.add_argument("recipe", metavar="FILE", help="a YAML file")
    check.add_argument("--output", metavar="FOLDER", type=filled, help="instead of the recipe's own")
    add_common(check)
    check.set_defaults(run=run_check, path=("recipe", "check"))

    listing = verbs.add_parser("list", help="the recipes that ship", description="The recipes that ship.")
    add_common(listing)
    listing.set_defaults(run=run_list, path=("recipe", "list"))

    show = verbs.add_parser("show", help="print a recipe that ships", description="Print a recipe that ships.", epilog=SHOW)
    show.add_argument("name", metavar="NAME", help="as `hf-compress recipe list` prints it")
    add_common(show, table=False)
    show.set_defaults(run=run_show, path=("recipe", "show"))


def run_init(args: argparse.Namespace) -> tuple[str, Any]:
    """Write a recipe for a model; a file that is there is never overwritten."""
    from ..recipe import recipe_template

    path = None if args.output is None else Path(args.output).expanduser()
    if path is not None and path.exists():
        what = "a folder; give the name of a file" if path.is_dir() else "there already; give another name"
        raise Wrong(f"argument -o: {args.output!r} is {what}.")
    if path is not None and not path.parent.is_dir():
        raise Wrong(f"argument -o: there is no folder {os.fspath(path.parent)!r} to write into.")
    from ..recipe.tasks import TASKS
    from ..recipe.template import tasks_for

    if args.task is not None and args.task not in TASKS:
        raise Wrong(
            f"argument --task: unknown task {args.task!r}{did_you_mean(args.task, TASKS) or '.'} Tasks: {', '.join(TASKS)}."
        )
    name = find(args.model, "MODEL")
    config = config_of(name, "MODEL")
    fitting = tasks_for(config)
    if args.task is not None and args.task not in fitting:
        raise Wrong(
            f"argument --task: {args.model!r} ({config.model_type}) is no model for {args.task}. Tasks that fit it: "
            f"{', '.join(fitting) or 'none'}."
        )
    text = recipe_template(name, args.task)
    if path is None:
        return text, None
    path.write_text(text, encoding="utf-8")
    return f"{args.output}: fill in the data, then `hf-compress recipe check {shlex.quote(str(args.output))}`", None


def run_check(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Find a recipe whole, or name its first mistake."""
    from ..recipe import read_recipe

    check_output(args.output)
    found = read_recipe(args.recipe, output=args.output)
    rows = [("", "step", "options")]
    rows += [
        (str(i), step.name, ", ".join(f"{name}: {value}" for name, value in step.options.items()) or "-")
        for i, step in enumerate(found.steps, 1)
    ]
    text = f"{args.recipe}: whole. {found.model}, {found.task}, into {found.output}\n{table(rows)}"
    return text, {"recipe": args.recipe, "whole": True, "output": found.output, "push": found.push, **found.as_data()}


def shipped() -> dict[str, str]:
    """The recipes that ship: text by name."""
    folder = resources.files(__name__.partition(".")[0]) / "recipes"
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".yaml")
    }


def run_list(args: argparse.Namespace) -> tuple[str, list[dict[str, str]]]:
    """The recipes that ship, with the first line of each."""
    found = [{"name": name, "about": text.splitlines()[0].lstrip("# ")} for name, text in shipped().items()]
    return table([("name", "about"), *((one["name"], one["about"]) for one in found)]), found


def run_show(args: argparse.Namespace) -> tuple[str, Any]:
    """The text of a recipe that ships."""
    known = shipped()
    if args.name not in known:
        near = did_you_mean(args.name, known) or "."
        raise Wrong(f"NAME: no recipe {args.name!r} ships{near} Recipes: {', '.join(known)}.")
    return known[args.name], None
