"""Ids of tokens where configs name them: read, and renumbered when tokens go."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .cutting import Undo
from .edits import CompressionError

# keys that hold one id, or a list of ids, that the model or its generation needs
NEEDED = re.compile(r"(^|_)token_(id|ids|index|idx)$|^(pad|bos|eos|unk|mask)_index$|^(force_words_ids|forced_decoder_ids)$")
# keys of what must not be generated (what is gone cannot be), and of tables from words to ids
OF_NO_USE = re.compile(
    r"^(begin_)?suppress_tokens$|^bad_words_ids$|^sequence_bias$|^(lang|task)_to_id$|^text_decoder_lang_to_code_id$"
)
# ids of other vocabularies, in configs that hold the ids of text too
FOREIGN = re.compile(r"^(codebook|codec|speech|semantic|coarse)_|_codec_")


def needed_ids(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The ids in a config that a model cannot do without, each with the name of its key.

    Example:

    ```python
    >>> from hf_compress.token_ids import needed_ids
    >>> list(needed_ids({"pad_token_id": 0, "eos_token_id": [2, 7], "suppress_tokens": [3], "vocab_size": 9}))
    [('pad_token_id', 0), ('eos_token_id', 2), ('eos_token_id', 7)]

    ```
    """
    for key, value in values.items():
        if key == "task_specific_params" and isinstance(value, Mapping):
            for task in value.values():
                yield from needed_ids(task if isinstance(task, Mapping) else {})
        elif NEEDED.search(key) and not FOREIGN.search(key):
            yield from ((key, number) for number in _numbers(key, value))


def _numbers(key: str, value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif key == "forced_decoder_ids" and isinstance(value, list | tuple):  # pairs of a place and an id
        yield from (pair[1] for pair in value if isinstance(pair, list | tuple) and type(pair[-1]) is int)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers("", part)


def renumbered(values: Mapping[str, Any], new: Mapping[int, int], size: int) -> dict[str, Any]:
    """What changes in a config when tokens go.

    Args:
        values (`dict`): the config's own values.
        new (`dict[int, int]`): the new id of every token that stays, by its old one.
        size (`int`): how many tokens there were. Ids from there on name nothing, and stay as they are.

    Returns:
        the values that change, by key.

    Raises:
        CompressionError: an id that is needed goes.

    Example:

    ```python
    >>> from hf_compress.token_ids import renumbered
    >>> renumbered({"pad_token_id": 0, "eos_token_id": [2, 7], "suppress_tokens": [3, 7]}, {0: 0, 2: 1, 7: 2}, 9)
    {'eos_token_id': [1, 2], 'suppress_tokens': [2]}

    ```
    """
    gone = {(key, number) for key, number in needed_ids(values) if 0 <= number < size and number not in new}
    if gone:
        said = ", ".join(f"{key}={number}" for key, number in sorted(gone))
        raise CompressionError(
            f"KeepVocabulary drops tokens that the config names: {said}. Add them to its tokens: "
            f"{sorted({number for _, number in gone})}. (`plan_vocabulary` keeps them.)"
        )

    def one(number: int) -> int:
        return new.get(number, number) if number < size else number

    found: dict[str, Any] = {}
    for key, value in values.items():
        if key == "task_specific_params" and isinstance(value, Mapping):
            tasks = {k: {**v, **renumbered(v, new, size)} if isinstance(v, Mapping) else v for k, v in value.items()}
            changed: Any = tasks
        elif FOREIGN.search(key) or value is None:
            continue
        elif key == "forced_decoder_ids":
            changed = [[place, one(number)] if type(number) is int else [place, number] for place, number in value]
        elif NEEDED.search(key):
            changed = _mapped(value, one)
        elif OF_NO_USE.search(key):
            changed = _without(value, one, lambda number: number in new or not 0 <= number < size)
        else:
            continue
        if changed != value:
            found[key] = changed
    return found


def _mapped(value: Any, one: Callable[[int], int]) -> Any:
    if type(value) is int:
        return one(value)
    return type(value)(_mapped(part, one) for part in value) if isinstance(value, list | tuple) else value


def _without(value: Any, one: Callable[[int], int], stays: Callable[[int], bool]) -> Any:
    """A list of ids, of sequences of ids (with a bias each) or a table, without what holds a token that goes."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if all(map(stays, _numbers("", v if type(v) is int else k)))}
        return {_mapped(k, one): _mapped(v, one) for k, v in kept.items()}
    if not isinstance(value, list | tuple):
        return value
    parts = [part for part in value if all(map(stays, _numbers("", part)))]
    return type(value)(_mapped(part, one) for part in parts) or None


def renumber_(holder: Any, new: Mapping[int, int], size: int, undo: Undo) -> None:
    """Renumber the ids that a config (or generation config) holds, in place."""
    changes = renumbered(vars(holder), new, size)
    before = {key: vars(holder)[key] for key in changes}
    undo.append(lambda: vars(holder).update(before))
    vars(holder).update(changes)
