"""A parser whose every refusal is one line that names the place and the nearest word, and the types of arguments."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

DTYPES = ("float32", "bfloat16", "float16")


class Wrong(Exception):
    """An argument that cannot be: exit code 2. Nothing was done.

    Args:
        message (`str`): one line, the place first (`argument --repeats: ...`, `MODEL: ...`).
        prog (`str`, *optional*): the command it was given to, where that is known.
    """

    def __init__(self, message: str, prog: str | None = None) -> None:
        super().__init__(message)
        self.prog = prog


class Failed(Exception):
    """The arguments were right and the work failed: exit code 1. The message says where things stand."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing.

    Example:

    ```python
    >>> from hf_compress.cli.arguments import did_you_mean
    >>> did_you_mean("inpsect", ["inspect", "run"]), did_you_mean("zzz", ["run"])
    ("; did you mean 'inspect'?", '')

    ```
    """
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse, with unknown words found before missing ones: a typo in an option is named as that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._check_words(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"got {' '.join(rest)!r}, which is one argument too many")
        return found, rest

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        raise Wrong(f"{message.rstrip('.')}{end} `{self.prog} --help` shows examples.", self.prog)

    def _check_words(self, words: Sequence[str]) -> None:
        """Options and commands that are not there. Behind a command, its own parser looks."""
        actions = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        for word in words:
            if word in ("--", "-h", "--help", "--version"):
                return
            if len(word) < 2 or word[0] != "-" or re.fullmatch(r"-\d.*", word):
                if not actions:
                    continue
                names = list(actions[0].choices)
                if word not in names:
                    self.error(f"no command {word!r}{did_you_mean(word, names) or '.'} Commands: {', '.join(names)}")
                return
            name = word.partition("=")[0]
            if name not in self._option_string_actions and not (word[1] != "-" and word[:2] in self._option_string_actions):
                self.error(f"no option {name!r}{did_you_mean(name, self._option_string_actions)}")
        if actions:
            self.error(f"which command? {', '.join(actions[0].choices)}")


def whole(least: int) -> Callable[[str], int]:
    """The type of a whole number from `least` on."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
        return int(text)

    return read


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """The type of a word out of these."""

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {text!r}{did_you_mean(text, known)}")
        return text

    return read


def filled(text: str) -> str:
    """The type of a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def repository(text: str) -> str:
    """The type of a name that a repository of the Hub can have."""
    part = r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    if not re.fullmatch(f"({part}/)?{part}", text) or len(text) > 96 or text.endswith(".git"):
        raise argparse.ArgumentTypeError(
            f"must be 'owner/name' or 'name' of letters, digits, '-', '_' and '.', such as me/minilm-small, got {text!r}"
        )
    return text


def add_common(parser: argparse.ArgumentParser, table: bool = True) -> None:
    """The options of every command."""
    if table:
        parser.add_argument("--json", action="store_true", help="print JSON instead, and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever fails")
