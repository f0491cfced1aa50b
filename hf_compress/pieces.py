"""What is in a `tokenizer.json`: which tokens its algorithm cannot do without, and the same file for fewer tokens."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .edits import CompressionError

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
METASPACE = "▁"
PROCESSORS = ("ByteLevel", "Sequence", "TemplateProcessing", "BertProcessing", "RobertaProcessing")


def read_pieces(text: str) -> dict[str, Any]:
    """A `tokenizer.json`, or a refusal of what is not known here.

    Raises:
        CompressionError: a model of another kind or with dropout, or a post-processor that may hold ids where nobody looks.
    """
    data = json.loads(text)
    model = data["model"]
    kind = model.get("type") or ("Unigram" if isinstance(model.get("vocab"), list) else None)  # older files leave it out
    if kind not in KINDS:
        raise CompressionError(f"The tokenizer is of the kind {kind!r}; those of the kinds {', '.join(KINDS)} can be cut.")
    model["type"] = kind
    if model.get("dropout"):
        raise CompressionError(
            f"The tokenizer drops merges at random (dropout={model['dropout']}), so no text has tokens of its own. Switch that "
            "off first: tokenizer.backend_tokenizer.model.dropout = None."
        )
    for step in _processors(data.get("post_processor")):
        if step.get("type") not in PROCESSORS:
            raise CompressionError(
                f"The tokenizer has a post-processor {step.get('type')!r}, whose ids are not known here; those known are "
                f"{', '.join(PROCESSORS)}."
            )
    return data


def _processors(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is not None:
        yield step
        for inner in step.get("processors", ()):
            yield from _processors(inner)


def vocab_of(data: Mapping[str, Any]) -> dict[str, int]:
    """Every token by its text, added ones too.

    Example:

    ```python
    >>> from hf_compress.pieces import vocab_of
    >>> model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    >>> vocab_of({"model": model, "added_tokens": [{"content": "<x>", "id": 2}]})
    {'<unk>': 0, 'a': 1, '<x>': 2}

    ```
    """
    return {**_model_vocab(data), **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}


def _model_vocab(data: Mapping[str, Any]) -> dict[str, int]:
    vocab = data["model"]["vocab"]
    return {piece[0]: index for index, piece in enumerate(vocab)} if isinstance(vocab, list) else vocab


def is_byte_level(data: Mapping[str, Any]) -> bool:
    """Whether the letters of the model are bytes, so that no text lacks one."""
    text = json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
    return '"ByteLevel"' in text


def fixed_ids(data: Mapping[str, Any]) -> dict[int, str]:
    """The ids that every cut keeps, each with the reason: added tokens, the unknown one, and what stands for bytes."""
    vocab, model = _model_vocab(data), data["model"]
    found: dict[int, str] = {}
    if model["type"] == "BPE" and is_byte_level(data):
        found |= {i: "a byte" for t, i in vocab.items() if len(_bare(model, t)) == 1}
    if model.get("byte_fallback"):
        found |= {i: "a byte" for t, i in vocab.items() if BYTE.fullmatch(t)}
    if METASPACE in vocab:
        found[vocab[METASPACE]] = "the space"
    unknown = model.get("unk_id") if model["type"] == "Unigram" else vocab.get(model.get("unk_token"))
    if unknown is not None:
        found[unknown] = "what is unknown"
    for step in _processors(data.get("post_processor")):
        found |= {i: "put around a text" for i in _ids_in(step)}
    return found | {token["id"]: "an added token" for token in data.get("added_tokens") or ()}


def letters(data: Mapping[str, Any]) -> set[int]:
    """Single characters, where nothing else can spell them: without one, a text that has it holds something unknown.

    Where bytes can stand for any character, and where words are whole, there are none.
    """
    model, vocab = data["model"], _model_vocab(data)
    bytes_there = is_byte_level(data) or (model.get("byte_fallback") and sum(map(bool, map(BYTE.fullmatch, vocab))) == 256)
    if model["type"] == "WordLevel" or bytes_there:
        return set()
    return {i for t, i in vocab.items() if len(_bare(model, t)) == 1}


def _bare(model: Mapping[str, Any], token: str) -> str:
    """A token without the marks of where in a word it stands."""
    for mark in (model.get("continuing_subword_prefix"), METASPACE if model["type"] != "BPE" else None):
        if mark and token.startswith(mark) and token != mark:
            token = token[len(mark) :]
    suffix = model.get("end_of_word_suffix")
    return token[: -len(suffix)] if suffix and token.endswith(suffix) and token != suffix else token


# --- what a token needs to be reached ------------------------------------------------------------------------------


def parts_needed(data: Mapping[str, Any], kept: Iterable[int]) -> dict[int, int]:
    """Tokens without which some of `kept` would not come out of a text any more, each with one that needs it.

    - WordPiece takes the longest token that fits: fewer tokens change nothing where that one stays. WordLevel has no parts.
    - BPE builds a token by merges. Those inside a token run as if it stood alone (no merge crosses its ends, or it would not
      have come out), so merging its letters alone gives every token on the way.
    - Unigram takes the best path: what goes makes no other path better. But a character that no path covers costs ten less
      than the lowest score of all, so one piece with the lowest score has to stay.
    """
    model, vocab = data["model"], _model_vocab(data)
    kept = set(kept)
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        lowest = min(scores)
        if any(scores[i] == lowest for i in kept if i < len(scores)):
            return {}
        return {scores.index(lowest): min(kept)}
    if model["type"] != "BPE":
        return {}
    ranks = _ranks(model)
    found: dict[int, int] = {}
    for token, index in vocab.items():
        if index in kept:
            for part in steps_to(token, ranks, vocab, model) or ():
                if vocab[part] not in kept:
                    found.setdefault(vocab[part], index)
    return found


def _ranks(model: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks[_pair(merge)] = rank  # of two that are the same, the later counts, as in the library's map
    return ranks


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def steps_to(
    token: str, ranks: Mapping[tuple[str, str], int], vocab: Mapping[str, int], model: Mapping[str, Any]
) -> set[str] | None:
    """Every token that BPE goes through from single letters to `token`; None where merges do not lead there.

    Example:

    ```python
    >>> from hf_compress.pieces import steps_to
    >>> vocab = {token: i for i, token in enumerate(["a", "b", "c", "bc", "abc", "ab"])}
    >>> sorted(steps_to("abc", {("b", "c"): 0, ("a", "bc"): 1, ("a", "b"): 2}, vocab, {}))
    ['a', 'abc', 'b', 'bc', 'c']
    >>> steps_to("abc", {("a", "b"): 0, ("b", "c"): 1, ("a", "bc"): 2}, vocab, {}) is None
    True

    ```
    """
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix)
    last = bool(suffix) and token.endswith(suffix)
    text = token[len(prefix) if inside else 0 : len(token) - len(suffix) if last else None]
    symbols = [(prefix if inside or i else "") + letter for i, letter in enumerate(text)]
    if not symbols:
        return None
    symbols[-1] += suffix if last else ""
    if any(symbol not in vocab for symbol in symbols):
        return None
    seen = set(symbols)
    while len(symbols) > 1:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
        if not pairs:
            return None
        _, place = min(pairs)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1][len(prefix) :]]
        if symbols[place] not in vocab:
            return None
        seen.add(symbols[place])
    return seen


# --- the same for fewer tokens -----------------------------------------------------------------------------------


def cut_pieces(data: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """The `tokenizer.json` of these tokens, each with its place among them as its new id.

    Example:

    ```python
    >>> from hf_compress.pieces import cut_pieces
    >>> bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}, "merges": [["a", "b"], ["b", "c"]]}
    >>> cut_pieces({"model": bpe, "added_tokens": []}, (0, 1, 2, 4))["model"]
    {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'c': 2, 'bc': 3}, 'merges': [['b', 'c']]}

    ```
    """
    new = {old: place for place, old in enumerate(kept)}
    data = copy.deepcopy(dict(data))
    model = data["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    if model["type"] == "BPE":
        there, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""

        def stays(left: str, right: str) -> bool:
            return left in there and right in there and left + right[len(prefix) :] in there

        model["merges"] = [merge for merge in model["merges"] if stays(*_pair(merge))]
    data["added_tokens"] = [{**token, "id": new[token["id"]]} for token in data.get("added_tokens") or () if token["id"] in new]
    for step in _processors(data.get("post_processor")):
        for key in ("sep", "cls"):
            if step["type"] in ("BertProcessing", "RobertaProcessing"):
                step[key] = [step[key][0], new[step[key][1]]]
        for special in step.get("special_tokens", {}).values() if step["type"] == "TemplateProcessing" else ():
            special["ids"] = [new[index] for index in special["ids"]]
    if data.get("padding") and data["padding"].get("pad_id") in new:
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    return data


def _ids_in(step: Mapping[str, Any]) -> list[int]:
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        return [step[key][1] for key in ("sep", "cls")]
    return [index for special in step.get("special_tokens", {}).values() for index in special["ids"]]
