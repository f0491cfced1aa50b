"""`main`: from words to a command, and from whatever happens to an exit code and one line."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from .arguments import Failed, Parser, Wrong
from .output import Quiet, say

DESCRIPTION = "Make any Hugging Face model smaller and faster, and publish it."
EXAMPLES = """\
examples:
  hf-compress inspect sentence-transformers/all-MiniLM-L6-v2    what is in a model, and what can be cut
  hf-compress recipe init google/vit-base-patch16-224 -o vit.yaml
  hf-compress recipe check vit.yaml                             every mistake, before anything is trained
  hf-compress run vit.yaml --push-to-hub me/vit-small           prune, distil, quantize, measure, publish
  hf-compress apply models/llama plans/half runs/llama-half    a checkpoint larger than memory, by a saved plan
  hf-compress measure runs/vit-small --against google/vit-base-patch16-224
  hf-compress push runs/vit-small me/vit-small --private
  hf-compress demo                                              all of it on a small model, offline

exit codes: 0 done; 1 the work failed; 2 a wrong argument or recipe, and nothing was done; 130 interrupted
"""
COMMANDS = ("inspect", "run", "apply", "measure", "recipe", "push", "demo")  # each a file beside this one, with `add(commands)`


def make_parser(prog: str = "hf-compress") -> Parser:
    """The whole command line; `args.run(args)` does what was asked."""
    from .. import __version__

    parser = Parser(prog, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"hf-compress {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever fails")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=Parser)
    for name in COMMANDS:
        import_module(f".{name}", __package__).add(commands)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "hf-compress") -> int:
    """Do what a command line says.

    Args:
        argv (`Sequence[str]`, *optional*): the words after the program's name; by default `sys.argv`'s.
        prog (`str`, defaults to `"hf-compress"`): what the program is called in its messages.

    Returns:
        `int`: 0 done; 1 the work failed; 2 a wrong argument, and nothing was done; 130 interrupted. In the last three cases
        one line on stderr says what, where, and how to go on.

    Example:

    ```python
    >>> from hf_compress.cli import main
    >>> main(["--version"])
    hf-compress 0.1.0
    0

    ```
    """
    words = list(sys.argv[1:] if argv is None else argv)
    place = prog
    try:
        args = make_parser(prog).parse_args(words)
        place = " ".join([prog, *args.path])
        _run(args)
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as error:
        where = " ".join(str(error).split()) or "Nothing was written."
        return _end(130, f"{place}: interrupted. {where}", words)
    except BaseException as error:
        return _end(*outcome(error, place), words)
    finally:
        say(sys.stdout)  # what argparse printed too
    return 0


def _run(args: object) -> None:
    work = getattr(args, "run")  # noqa: B009  argparse's namespaces have no types
    with Quiet(live=getattr(args, "live", False)), contextlib.redirect_stdout(sys.stderr):
        text, data = work(args)
    if getattr(args, "json", False):
        text = json.dumps(data, indent=1)
    say(sys.stdout, text if text.endswith("\n") or not text else f"{text}\n")


def outcome(error: BaseException, place: str) -> tuple[int, str]:
    """Exit code and line for what went wrong."""
    from ..edits import CompressionError
    from ..publish import PushError
    from ..recipe import RecipeError

    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    said = " ".join(filter(None, lines))
    if isinstance(error, RecipeError):  # a line for every mistake, each beginning with file and line
        return 2, "\n".join(filter(None, lines))
    if isinstance(error, Wrong):
        return 2, f"{error.prog or place}: {said}"
    if isinstance(error, CompressionError):
        failed = isinstance(error, PushError) or isinstance(error.__cause__, OSError)
        return 1 if failed else 2, f"{place}: {said}"
    if isinstance(error, Failed):
        return 1, f"{place}: {said}"
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else said
        return 1, f"{place}: {what}. Nothing else was changed."
    return 1, f"{place}: {type(error).__name__}: {said[:300] or 'no reason given'}. --debug shows where."


def _end(code: int, line: str, words: Sequence[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    say(sys.stderr, f"{line}\n")
    return code
