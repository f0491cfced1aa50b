"""A tokenizer cut to the tokens that a model keeps, and shown to give them as before."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .edits import CompressionError, KeepVocabulary, shown
from .pieces import cut_pieces, fixed_ids, parts_needed, read_pieces, vocab_of
from .plan import Plan

# files that hold the vocabulary once more, as another loader reads it
OTHER_FILES = re.compile(r"vocab\.(txt|json)|merges\.txt|.*\.model|added_tokens\.json|.*\.tiktoken|tekken\.json")
SETTINGS = ("name_or_path", "padding_side", "truncation_side", "model_max_length", "chat_template", "model_input_names")
MOST_TRIED = 4000  # tokens whose text is tried; a tokenizer's own tables decide, not how many


def cut_tokenizer(tokenizer: Any, tokens: Plan | KeepVocabulary | Sequence[int]) -> Any:
    """The tokenizer of a model with a smaller vocabulary: the same tokens for the same text, under their new ids.

    A text whose tokens all stay is tokenized as before, token for token. One that holds tokens that go falls back to pieces
    that stay: shorter ones, characters, bytes, or what the tokenizer has for the unknown.

    - WordPiece and WordLevel: the longest match (the word) stays the longest.
    - BPE: the merges that lead to tokens that stay are kept in their order; every token on the way must stay too.
    - Unigram: scores are kept, so the best path stays the best; of the pieces with the lowest score one must stay, since what
      is unknown is scored by it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer; not changed. Its text steps, chat template, special tokens,
            sides and lengths stay.
        tokens (`Plan`, `KeepVocabulary` or `Sequence[int]`): what stays: the plan that the model was cut with, or ids.

    Returns:
        a tokenizer of the same class.

    Raises:
        CompressionError: a slow tokenizer or one of another kind; an id that no token has, between others; a token that goes
            although others are built from it, or that is added, or unknown; a tokenizer that, loaded again, is not the same.

    Example:

    ```python
    >>> from transformers import BertTokenizer
    >>> from hf_compress import KeepVocabulary, Plan, cut_tokenizer
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b", "ab", "ba"]
    >>> tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    >>> small = cut_tokenizer(tokenizer, Plan([KeepVocabulary([0, 1, 2, 3, 4, 5, 6, 7, 8, 10])]))
    >>> tokenizer.tokenize("ba ab"), small.tokenize("ba ab")
    (['ba', 'ab'], ['ba', 'a', '##b'])
    >>> small("ba").input_ids, len(small)
    ([2, 9, 3], 10)

    ```
    """
    data = pieces_of(tokenizer)
    kept = _tokens(tokens)
    by_id = {index: token for token, index in vocab_of(data).items()}
    _check(tokenizer, data, kept, by_id)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in os.listdir(folder):
            if OTHER_FILES.fullmatch(name):
                os.remove(os.path.join(folder, name))
        small = cut_pieces(data, kept)
        _write(Path(folder), small, {old: place for place, old in enumerate(kept)})
        try:
            cut = type(tokenizer).from_pretrained(folder)
        except Exception as error:  # a class that builds its tables in a way of its own
            raise CompressionError(
                f"{type(tokenizer).__name__} cannot be built with {len(kept)} tokens: {type(error).__name__}: {error}"
            ) from error
    cut.init_kwargs["name_or_path"] = tokenizer.name_or_path
    for name in SETTINGS:  # what was set on the object, and is not saved
        if hasattr(tokenizer, name):
            setattr(cut, name, getattr(tokenizer, name))
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(tokenizer.backend_tokenizer, name) is not None:
            setattr(cut.backend_tokenizer, name, getattr(tokenizer.backend_tokenizer, name))
    _prove(tokenizer, cut, kept, by_id)
    return cut


def pieces_of(tokenizer: Any) -> dict[str, Any]:
    """The tables of a fast tokenizer.

    Raises:
        CompressionError: it is none, or of a kind that cannot be cut.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not isinstance(backend, Tokenizer):
        inner = getattr(tokenizer, "tokenizer", None)
        hint = (
            f"It holds a {type(inner).__name__}: give that one (processor.tokenizer)."
            if isinstance(inner, PreTrainedTokenizerBase)
            else "Only fast tokenizers (those of the tokenizers library) can be cut."
        )
        raise CompressionError(f"Expected a fast tokenizer, got {shown(type(tokenizer).__name__)}. {hint}")
    return read_pieces(backend.to_str())


def _tokens(given: Any) -> tuple[int, ...]:
    """Ids that stay. Of several cuts, one after the other, the last speaks of the ids that the first ones gave."""
    if isinstance(given, KeepVocabulary):
        return given.tokens
    if not isinstance(given, Plan):
        return KeepVocabulary(given).tokens
    edits = [edit for edit in given.edits if isinstance(edit, KeepVocabulary)]
    if not edits:
        raise CompressionError("The plan has no KeepVocabulary, so the tokenizer stays as it is.")
    if len({edit.embedding for edit in edits}) > 1:
        raise CompressionError("The plan cuts several vocabularies; give the KeepVocabulary of this tokenizer.")
    kept = edits[0].tokens
    for edit in edits[1:]:
        if edit.tokens[-1] >= len(kept):
            raise CompressionError(f"KeepVocabulary names token {edit.tokens[-1]}, but there are {len(kept)} at that point.")
        kept = tuple(kept[i] for i in edit.tokens)
    return kept


def _check(tokenizer: Any, data: Mapping[str, Any], kept: tuple[int, ...], by_id: Mapping[int, str]) -> None:
    known = max(by_id)
    unnamed = [index for index in kept if index not in by_id and index < max((i for i in kept if i in by_id), default=known)]
    if unnamed:
        raise CompressionError(
            f"The tokenizer has no token {unnamed[0]} (of {len(unnamed)}), and has some after it; ids would have a gap there. "
            "Leave it out of the tokens."
        )
    there = set(kept)
    fixed = {**fixed_ids(data), **{index: "a special token" for index in tokenizer.all_special_ids}}
    gone = [index for index in sorted(fixed) if index not in there]
    if gone:
        said = ", ".join(f"{index} ({by_id.get(index)!r}, {fixed[index]})" for index in gone[:6])
        raise CompressionError(
            f"The tokenizer cannot do without {len(gone)} tokens that go: {said}{', ...' * (len(gone) > 6)}. Keep them "
            "(plan_vocabulary does)."
        )
    missing = parts_needed(data, kept)
    if missing:
        part, whole = next(iter(missing.items()))
        raise CompressionError(
            f"{len(missing)} tokens go that others need: without {by_id[part]!r} ({part}), {by_id[whole]!r} ({whole}) would "
            f"not be found as before. Keep them too (plan_vocabulary does): {shown(sorted(missing))}"
        )


def _write(folder: Path, small: Mapping[str, Any], new: Mapping[int, int]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(small, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    added = config.get("added_tokens_decoder")
    if added:
        config["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in added.items() if int(i) in new}
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def _prove(old: Any, cut: Any, kept: tuple[int, ...], by_id: Mapping[int, str]) -> None:
    """What the class made of the smaller tables: every token under its new id, and texts of kept tokens as before."""
    new = {index: place for place, index in enumerate(kept)}
    name = type(old).__name__
    vocab = cut.get_vocab()
    for index, place in new.items():
        if index in by_id and vocab.get(by_id[index]) != place:
            raise CompressionError(
                f"{name}, loaded again, gives {by_id[index]!r} the id {vocab.get(by_id[index])}, not {place}: its class places "
                "tokens itself. Its vocabulary cannot be cut."
            )
    if len(vocab) > len(kept):
        raise CompressionError(
            f"{name}, loaded again, has {len(vocab)} tokens and not {len(kept)}: its class adds some itself."
        )
    for key, value in old.special_tokens_map.items():
        if cut.special_tokens_map.get(key) != value:
            raise CompressionError(f"{name}, loaded again, has another {key}; its vocabulary cannot be cut.")
    draw = random.Random(0)
    ids = [index for index in kept if index in by_id]
    some = ids if len(ids) <= MOST_TRIED else sorted(draw.sample(ids, MOST_TRIED))
    texts = [old.decode([index]) for index in some]
    texts += [" ".join(draw.choices(texts, k=8)) for _ in range(50)] + [old.decode(draw.choices(ids, k=8)) for _ in range(50)]
    for text, before, after in zip(texts, _encoded(old, texts), _encoded(cut, texts), strict=True):
        if all(index in new for index in before) and [new[index] for index in before] != after:
            raise CompressionError(
                f"{name}, loaded again, makes {shown(cut.convert_ids_to_tokens(after))} of {text!r}, and not "
                f"{shown(old.convert_ids_to_tokens(before))} as before; its vocabulary cannot be cut."
            )


def _encoded(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    return tokenizer(list(texts), padding=False, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
