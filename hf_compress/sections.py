"""Cards that a person edits and we write again: what is ours is marked and recognized, what is theirs stays."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

from .edits import CompressionError
from .yaml12 import dump, load

_SECTION = re.compile(
    r"^<!-- hf_compress:(?P<name>\w+) (?P<digest>[0-9a-f]{16}) -->\n(?P<text>.*?)^<!-- /hf_compress:(?P=name) -->$", re.M | re.S
)
_RECORD = re.compile(r"^<!-- hf_compress (?P<json>\{.*\}) -->\n?", re.M)
# how transformers' Trainer begins a card that nobody has looked at
_TRAINER = "<!-- This model card has been generated automatically according to the information the Trainer had access to."
# where our lines name the repository that a model is loaded from
_ADDRESS = re.compile(r'((?:from_pretrained|SentenceTransformer)\(|pipeline\("[^"\n]*", )"[^"\n]*"')


def compose(metadata: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    """A card of marked sections, and a last line that says what we wrote.

    A section is `<!-- hf_compress:NAME DIGEST -->`, its text, `<!-- /hf_compress:NAME -->`; the digest is of the text, so
    that one that a person edited is told from one that is still ours. The same is noted for every YAML key.

    Args:
        metadata (`dict`): what goes into the YAML at the top.
        sections (`dict`): Markdown by name, in order; empty ones are left out.

    Returns:
        `str`: the whole card.

    Example:

    ```python
    >>> from hf_compress.sections import compose
    >>> print(compose({"license": "mit"}, {"title": "# A model"}))
    ---
    license: mit
    ---
    <BLANKLINE>
    <!-- hf_compress:title 11e5cf33736e2afa -->
    # A model
    <!-- /hf_compress:title -->
    <BLANKLINE>
    <!-- hf_compress {"metadata":{"license":"6b53974263891131"},"sections":["title"]} -->
    <BLANKLINE>

    ```
    """
    texts = {name: _disarmed(text).strip("\n") + "\n" for name, text in sections.items() if text.strip()}
    blocks = [_block(name, _digest(text), text) for name, text in texts.items()]
    return _card(metadata, "\n\n".join([*blocks, _record({k: _noted(v) for k, v in metadata.items()}, texts)]) + "\n")


def merge_card(old: str, new: str) -> str:
    """A newly rendered card in place of an old one, with whatever a person wrote or changed in the old one.

    - A section of ours that was edited by hand stays as it is; one that was deleted stays away; the others are replaced.
      Text outside of our sections stays where it is.
    - A YAML key that was added or changed by hand stays; of a list (tags, data sets), what was added or taken away by hand.
    - A card that we did not write is kept below ours, or above where it has a title of its own; what it says in YAML
      counts as written by hand, unless the Trainer generated it. The empty form that `model.push_to_hub` leaves is replaced.

    Args:
        old (`str`): the card that is there, with any line ends.
        new (`str`): what `render_card` gives now.

    Returns:
        `str`: the card to publish, with the old one's line ends.

    Raises:
        CompressionError: the YAML at the top of the old card cannot be read, so that nothing in it could be kept.

    Example:

    ```python
    >>> from hf_compress.sections import compose, merge_card
    >>> old = compose({"license": "mit"}, {"title": "# A model", "use": "Load it."}).replace("Load it.", "Do not load it.")
    >>> merged = merge_card(old, compose({"license": "mit"}, {"title": "# A better model", "use": "Load it so."}))
    >>> "# A better model" in merged, "Do not load it." in merged, "Load it so." in merged
    (True, True, False)

    ```
    """
    ends = "\r\n" if "\r\n" in old else "\n"
    (theirs, body), (ours, fresh) = split_card(old, "old"), split_card(new, "new")
    noted, written = _recorded(body)
    record, names = _recorded(fresh)
    sections = {m["name"]: m for m in _SECTION.finditer(fresh)}
    foreign = noted is None and not _SECTION.search(body)
    generated = foreign and _TRAINER in body
    if generated:  # whoever wrote those values did not choose them; what lists hold is kept all the same
        noted = {key: _noted(value) for key, value in theirs.items() if not _is_words(value)}
    metadata = _merged(theirs, ours, noted or {}, keep=foreign)
    if not foreign:
        outside = _SECTION.sub("\0", _RECORD.sub("", fresh)).split("\0")  # what a person wrote into the new one
        more = [text.strip("\n") for text in outside if text.strip() and text.strip() not in body]
        parts = [_replaced(_RECORD.sub("", body), sections, written), *more]
    elif _is_empty_form(body):
        parts = [m[0] for m in sections.values()]
    elif not generated and re.match(r"\s*#\s", body):
        parts = [body, *(m[0] for name, m in sections.items() if name != "title")]
    else:
        parts = [*(m[0] for m in sections.values()), body]
    parts.append(_record(record or {}, dict.fromkeys([*names, *written])))
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
    return _card(metadata, text).replace("\n", ends)


def kept_by_hand(old: str, new: str) -> tuple[list[str], list[str]]:
    """What `merge_card` keeps of the old card, although something else is in the new one.

    Args:
        old, new (`str`): as for `merge_card`.

    Returns:
        `tuple[list[str], list[str]]`: the names of sections (and of YAML keys) that were edited or taken out in the old card
        and edited otherwise in the new one, whose text is lost; and of sections that were edited by hand in the old card,
        while what we write there has changed since.

    Example:

    ```python
    >>> from hf_compress.sections import compose, kept_by_hand
    >>> edited = compose({}, {"results": "0.8", "use": "Load it."}).replace("0.8", "About 0.8").replace("Load", "Do load")
    >>> kept_by_hand(edited, compose({}, {"results": "0.9", "use": "Load it."}))
    ([], ['results'])
    >>> kept_by_hand(edited, compose({}, {"results": "0.8", "use": "Load it."}).replace("Load", "Never load"))
    (['use'], [])

    ```
    """
    (theirs, body), (ours, fresh) = split_card(old, "old"), split_card(new, "new")
    (noted, written), (mine, _) = _recorded(body), _recorded(fresh)
    there, here = ({m["name"]: m for m in _SECTION.finditer(text)} for text in (body, fresh))
    lost, outdated = [], []
    for name, section in here.items():
        before, edited = there.get(name), _is_edited(section)
        if before is None:
            lost += [name] if edited and name in written else []
        elif _is_edited(before):
            if edited and _digest(before["text"]) != _digest(section["text"]):
                lost.append(name)
            elif before["digest"] != section["digest"]:
                outdated.append(name)
    for key in theirs.keys() & ours.keys() & (noted or {}).keys() & (mine or {}).keys():
        values = [_noted(theirs[key]), _noted(ours[key])]
        if not _is_words(values[0]) and values[0] not in (values[1], (noted or {})[key]) and values[1] != (mine or {})[key]:
            lost.append(f"{key} (YAML)")
    return lost, outdated


def readdressed(card: str, repo_id: str) -> str:
    """A card whose lines that load the model name this repository, unless a person edited that section.

    Args:
        card (`str`): with any line ends.
        repo_id (`str`): where the model is now.

    Returns:
        `str`: the card; as it was where it has no such section of ours.

    Example:

    ```python
    >>> from hf_compress.sections import compose, readdressed
    >>> card = compose({}, {"use": 'AutoModel.from_pretrained("out")'})
    >>> readdressed(card, "me/small") == compose({}, {"use": 'AutoModel.from_pretrained("me/small")'})
    True

    ```
    """
    ends = "\r\n" if "\r\n" in card else "\n"

    def renew(section: re.Match) -> str:
        if section["name"] != "use" or _is_edited(section):
            return section[0]
        text = _ADDRESS.sub(lambda call: f'{call[1]}"{repo_id}"', section["text"])
        return _block(section["name"], _digest(text), text)

    text = card.replace("\r\n", "\n")
    renewed = _SECTION.sub(renew, text)
    return card if renewed == text else renewed.replace("\n", ends)


def with_metadata(card: str, more: Mapping[str, Any]) -> str:
    """A card with more YAML: lists are added to, other values replaced, and empty ones left out.

    Args:
        card (`str`): any card.
        more (`dict`): such as `{"license": "mit", "tags": ["mine"]}`.

    Returns:
        `str`: the card.

    Example:

    ```python
    >>> from hf_compress.sections import with_metadata
    >>> with_metadata("---\\ntags: [a]\\n---\\n\\nText.", {"tags": "b", "language": "no", "license": None})
    "---\\ntags:\\n- a\\n- b\\nlanguage: 'no'\\n---\\n\\nText."

    ```
    """
    given = {name: value for name, value in more.items() if value}
    if not given:
        return card
    metadata, body = split_card(card, "new")
    for name, value in given.items():
        if isinstance(metadata.get(name), list):
            value = list(dict.fromkeys([*metadata[name], *([value] if isinstance(value, str) else value)]))
        metadata[name] = value
    return _card(metadata, body)


def _is_edited(section: re.Match) -> bool:
    return _digest(section["text"]) != section["digest"]


def _replaced(body: str, sections: Mapping[str, re.Match], written: list[str]) -> str:
    """The old body with our sections brought up to date, and new ones behind the one that comes before them."""
    present = {m["name"] for m in _SECTION.finditer(body)}

    def renew(old: re.Match) -> str:
        if _is_edited(old):
            return old[0]
        return sections[old["name"]][0] if old["name"] in sections else "\0"

    body = re.sub(r"\n*\0\n*", "\n\n", _SECTION.sub(renew, body))
    before = None
    for name, section in sections.items():
        if name not in present and name not in written:
            place = next((m.end() for m in _SECTION.finditer(body) if m["name"] == before), 0)
            start, end = body[:place].rstrip("\n"), body[place:].lstrip("\n")
            body = "\n\n".join(part for part in (start, section[0], end) if part)
        if any(m["name"] == name for m in _SECTION.finditer(body)):
            before = name
    return body


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any], noted: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """YAML of both, three ways: with what we noted last time as the common ancestor.

    `keep`: a key that is as it was noted and that we do not write any more stays.
    """
    merged: dict[str, Any] = {}
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        value: Any = theirs.get(key)
        mine: Any = ours.get(key)
        base: Any = noted.get(key)
        if key not in theirs:
            if key not in noted:  # else it was taken out by hand
                merged[key] = mine
        elif _is_words(value) and _is_words(mine):
            known = base if _is_words(base) else []
            stay = [word for word in mine if word in value or word not in known]
            merged[key] = list(dict.fromkeys([*stay, *(word for word in value if word not in known)]))
        elif base is not None and _noted(value) == base:
            if key in ours or keep:
                merged[key] = ours.get(key, value)
        else:
            scored = key != "model-index" or any(entry.get("results") for entry in value or () if isinstance(entry, dict))
            merged[key] = value if scored or key not in ours else mine
    return merged


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _noted(value: Any) -> Any:
    """What the record keeps of a value: lists of words themselves, so that they can be merged; else a digest."""
    if _is_words(value):
        return value
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError):  # keys of several types, a list that holds itself
        text = dump(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(text: str) -> str:
    """Of a section's text, whatever an editor did to line ends and blanks at the end of lines."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _block(name: str, digest: str, text: str) -> str:
    return f"<!-- hf_compress:{name} {digest} -->\n{text}<!-- /hf_compress:{name} -->"


def _record(metadata: Mapping[str, Any], sections: Any) -> str:
    text = json.dumps({"metadata": dict(metadata), "sections": list(sections)}, separators=(",", ":"))
    return f"<!-- hf_compress {text.replace('--', '-' + chr(92) + 'u002d').replace('>', chr(92) + 'u003e')} -->"


def _recorded(body: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What we noted of the YAML, and the sections that we wrote, if the line that says so is still there."""
    found = _RECORD.search(body)
    try:
        data = json.loads(found["json"]) if found else None
    except ValueError:  # edited: then nothing is known to be ours, and everything stays
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("metadata"), dict) or not _is_words(data.get("sections")):
        return None, []
    return data["metadata"], data["sections"]


def _disarmed(text: str) -> str:
    """A value that looks like one of our marks must not become one."""
    return re.sub(r"<!--(?=\s*/?hf_compress\b)", "<! --", text.replace("\r\n", "\n"))


def split_card(card: str, which: str) -> tuple[dict[str, Any], str]:
    """The YAML at the top of a card, and its body, with Unix line ends.

    Args:
        card (`str`): any card.
        which (`str`): what messages call it: "old", "new".

    Raises:
        CompressionError: the YAML cannot be read, or is no mapping.

    Example:

    ```python
    >>> from hf_compress.sections import split_card
    >>> split_card("---\\nlanguage: no\\n---\\n# A model", "old")
    ({'language': 'no'}, '# A model')

    ```
    """
    card = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        return {}, card
    try:
        metadata = load(found[2])
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise CompressionError(f"The YAML at the top of the {which} card cannot be read ({place}); correct it first.") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise CompressionError(f"The YAML at the top of the {which} card must be a mapping, got {str(metadata)[:80]!r}.")
    return metadata or {}, card[found.end() :]


def _is_empty_form(body: str) -> bool:
    """The form that transformers' `model.push_to_hub` leaves where there was no card, as nobody has filled it in."""
    description = re.search(
        r"^This is the model card of a .* transformers model that has been pushed on the Hub\..*$", body, re.M
    )
    if description is None:
        return False
    from huggingface_hub import ModelCardData

    form = ModelCard.from_template(ModelCardData(), model_description=description[0])
    return form.text.split() == body.split()


def _card(metadata: Mapping[str, Any], body: str) -> str:
    top = f"---\n{dump(dict(metadata)).strip()}\n---\n\n" if metadata else ""
    return top + body.lstrip("\n")
