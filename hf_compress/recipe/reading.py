"""A recipe's text, read into plain values that remember which line each was written on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..edits import CompressionError
from ..yaml12 import Dumper, Loader

MOST_BYTES = 1 << 18
DEEPEST = 20
Key = tuple[str | int, ...]  # ("steps", 1, "prune", "heads")


class RecipeError(CompressionError):
    """A mistake in a recipe, or several, one a line. Each begins with `file:line: `; nothing has been trained or written."""

    key: Key = ()
    line: int = 1


@dataclass(frozen=True)
class Source:
    """Where a recipe comes from, and the lines of what is in it.

    Args:
        name (`str`): the file's path, or `"recipe"` for a dict.
        text (`str`): the recipe as YAML text.
        lines (`dict`): line numbers from 1, by the path of keys and indices.
        folder (`Path`, *optional*): of the file.
    """

    name: str
    text: str
    lines: Mapping[Key, int] = field(default_factory=dict)
    folder: Path | None = None

    def error(self, key: Key, message: str) -> RecipeError:
        """The mistake at a key, or at the nearest thing around it that has a line."""
        near = key
        while near and near not in self.lines:
            near = near[:-1]
        line = self.lines.get(near, 1)
        message = " ".join(message.splitlines())  # several mistakes are told one a line
        error = RecipeError(f"{self.name}:{line}: {message}")
        error.key, error.line = key, line
        return error


@contextmanager
def noting(mistakes: list[RecipeError]) -> Iterator[None]:
    """Put a mistake on the list and go on after the block, so that one mistake does not hide the next."""
    try:
        yield
    except RecipeError as error:
        mistakes.append(error)


def refuse(mistakes: Sequence[RecipeError]) -> None:
    """Raise what was noted, if anything was: as it is where there is one, else all in one, in the order of their lines.

    Of several mistakes at one place the first is told: the others follow from it.

    Raises:
        RecipeError: one line a mistake.

    Example:

    ```python
    >>> from hf_compress.recipe.reading import Source, refuse
    >>> source = Source("r.yaml", "", {("seed",): 2, ("task",): 1})
    >>> refuse([source.error(("seed",), "no seed."), source.error(("task",), "no task.")])
    Traceback (most recent call last):
    ...
    hf_compress.recipe.reading.RecipeError: r.yaml:1: no task.
    r.yaml:2: no seed.

    ```
    """
    first: dict[Any, RecipeError] = {}
    for i, mistake in enumerate(mistakes):
        first.setdefault(mistake.key or i, mistake)
    told = sorted(first.values(), key=lambda mistake: mistake.line)
    if len(told) == 1:
        raise told[0]
    if told:
        together = RecipeError("\n".join(map(str, told)))
        together.key, together.line = told[0].key, told[0].line
        raise together


def read_source(recipe: str | os.PathLike | Mapping[str, Any]) -> tuple[dict[str, Any], Source]:
    """The values of a recipe (file or dict), and their lines.

    Nothing in the text is ever executed: it is YAML without tags, anchors and aliases.

    Raises:
        RecipeError: no such file, not YAML, not a mapping, a key written twice, a tag, an anchor.

    Example:

    ```python
    >>> from hf_compress.recipe.reading import read_source
    >>> values, source = read_source({"model": "my/model", "steps": [{"prune": {"heads": 0.5}}]})
    >>> source.name, source.lines[("steps", 0, "prune", "heads")]
    ('recipe', 4)

    ```
    """
    if isinstance(recipe, Mapping):
        name, folder = "recipe", None
        try:
            text = yaml.dump(_plain(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        except (yaml.YAMLError, ValueError) as error:  # a number of thousands of digits is a ValueError
            reason = str(error).splitlines()[0]
            raise RecipeError(f"recipe:1: a recipe holds numbers, texts, lists and dicts alone ({reason}).") from None
    elif isinstance(recipe, str | os.PathLike):
        name, folder = os.fspath(recipe), Path(recipe).parent
        text = _text(Path(recipe))
    else:
        raise RecipeError(f"recipe:1: a recipe is the path of a YAML file or a dict, got {type(recipe).__name__}.")
    if "\t" in text and re.search(r"^ *\t", text, re.MULTILINE):
        line = next(i for i, t in enumerate(text.splitlines(), 1) if re.match(r" *\t", t))
        raise RecipeError(f"{name}:{line}: the line is indented with a tab, which YAML does not allow; use spaces.")
    lines: dict[Key, int] = {}
    try:
        _refuse_references(name, text)
        loader = Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = (error.problem or error.context or "not YAML").strip()
        raise RecipeError(f"{name}:{line}: this is not YAML: {problem}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}:1: this is not YAML: {str(error).splitlines()[0]}.") from None
    source = Source(name, text, lines, folder)
    if not isinstance(node, yaml.MappingNode):
        what = "empty" if node is None else f"a {'list' if isinstance(node, yaml.SequenceNode) else 'single value'}"
        raise RecipeError(f"{name}:1: a recipe is a mapping with model, task, data and steps; this file is {what}.")
    return _value(loader, node, (), source, lines), source


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise RecipeError(f"{path}:1: this is a folder; a recipe is a YAML file.")
        if path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"{path}:1: {path.stat().st_size:,} bytes are no recipe; the most is {MOST_BYTES:,}.")
        return path.read_text(encoding="utf-8-sig")
    except RecipeError:
        raise
    except FileNotFoundError:
        raise RecipeError(f"{path}:1: there is no such file; `hf-compress recipe init MODEL` writes one.") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}:1: this is not UTF-8 text (byte {error.start}); a recipe is a YAML file.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}:1: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _refuse_references(name: str, text: str) -> None:
    """Before anything is built: tags construct objects, and aliases multiply a few bytes into gigabytes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise RecipeError(f"{name}:{line}: lists in lists, {DEEPEST} deep and more, are no recipe.")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{name}:{line}: anchors and aliases (& and *) are not read in recipes; write the value out.")
        if getattr(event, "tag", None) and event.tag != "!":
            raise RecipeError(f"{name}:{line}: the tag {event.tag!r} is not read in recipes; write a plain value.")


def _value(loader: Loader, node: yaml.Node, key: Key, source: Source, lines: dict[Key, int]) -> Any:
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                raise RecipeError(f"{source.name}:{line}: a key must be a word, got a list or mapping.")
            name = name_node.value
            if name in found:
                raise RecipeError(f"{source.name}:{line}: {name!r} is written twice here; keep one of them.")
            lines[(*key, name)] = line
            found[name] = _value(loader, value_node, (*key, name), source, lines)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*key, i), source, lines) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    except ValueError:  # Python reads no number of thousands of digits
        raise source.error(key, f"a number of {len(node.value):,} digits is no number of a recipe.") from None


def _plain(value: Any) -> Any:
    """Tuples, paths and numpy numbers of a dict as YAML knows them."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
