"""What will be changed, as data: frozen edits, and the `Plan` that orders them. No torch module is touched here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from .checks import MOST_UNITS, CompressionError, from_spans, shown, spans_of
from .edits import EDITS, Edit

FORMAT = 1
PLAN_FILE = "compression_plan.json"
TENSORS_FILE = "compression_plan.safetensors"


def _shortened(text: str) -> str:
    return text if len(text) <= 56 else text[:40].rsplit(" ", 1)[0] + f" ... {text.replace('-', ' ').rsplit(' ', 1)[1]}"


class Plan:
    """An ordered, frozen tuple of edits, and the tensors that a planner computed for them, if any.

    Names and indices of an edit refer to the model as the edits before it left it, so plans concatenate with `+`.

    Args:
        edits (`Sequence`): edits (`KeepHeads`, `LowRank`, `Quantize`, ...), in the order in which they apply.
        tensors (`dict[str, torch.Tensor]`, *optional*): weights that belong to the edits. They are saved beside the
            JSON as safetensors, with their digest in it; a plan whose tensors are missing or changed is refused.

    Raises:
        CompressionError: something in `edits` is not an edit, or a tensor has no name.

    Example:

    ```python
    >>> from hf_compress import KeepHeads, KeepLayers, Plan
    >>> plan = Plan([KeepHeads("encoder.layer.0.attention.self", [0, 1, 2, 7])]) + Plan([KeepLayers([0, 1])])
    >>> print(plan)
    Plan with 2 edits
      KeepHeads    encoder.layer.0.attention.self  keep 4: 0-2 7
      KeepLayers   the stack                       keep 2: 0-1
    >>> Plan.from_dict(plan.to_dict()) == plan
    True

    ```
    """

    __slots__ = ("edits", "tensors")
    edits: tuple[Edit, ...]
    tensors: dict[str, torch.Tensor] | None

    def __init__(self, edits: Iterable[Edit] = (), tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        if not isinstance(edits, Iterable) or isinstance(edits, str | bytes | Mapping):
            raise CompressionError(f"Plan takes a sequence of edits ({', '.join(EDITS)}), got {shown(edits)}.")
        edits = tuple(edits)
        for edit in edits:
            if not isinstance(edit, tuple(EDITS.values())):
                raise CompressionError(f"A plan is made of edits ({', '.join(EDITS)}), got {shown(edit)}.")
        _check_tensors(tensors)
        object.__setattr__(self, "edits", edits)
        object.__setattr__(self, "tensors", dict(tensors) if tensors else None)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A Plan is frozen: build a new one instead of setting {name!r}.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("A Plan is frozen.")

    def __reduce__(self):
        return Plan, (self.edits, self.tensors)

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self):
        return iter(self.edits)

    def __add__(self, other: Plan) -> Plan:
        if not isinstance(other, Plan):
            raise CompressionError(f"A Plan adds up with a Plan, got {shown(other)}. Plan([...]) makes one of edits.")
        mine, theirs = self.tensors or {}, other.tensors or {}
        both = sorted(mine.keys() & theirs.keys())
        if both:
            raise CompressionError(f"Both plans carry a tensor named {both[0]!r}; rename it in one of them.")
        return Plan(self.edits + other.edits, {**mine, **theirs})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        mine, theirs = self.tensors or {}, other.tensors or {}
        return (
            self.edits == other.edits
            and mine.keys() == theirs.keys()
            and all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)
        )

    def __hash__(self) -> int:
        return hash(self.edits)

    def __repr__(self) -> str:
        tensors = f", tensors={sorted(self.tensors)}" if self.tensors else ""
        return f"Plan({list(self.edits)!r}{tensors})"

    def __str__(self) -> str:
        rows = [(type(edit).__name__, *_row(edit)) for edit in self.edits]
        names, width = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        head = f"Plan with {len(rows)} edit{'s' * (len(rows) != 1)}"
        if self.tensors:
            size = sum(t.numel() * t.element_size() for t in self.tensors.values())
            head += f" and {len(self.tensors)} tensors ({size / 1e6:.1f} MB)"
        return "\n".join([head, *(f"  {name:<{max(names, 12)}} {target:<{width}}  {what}" for name, target, what in rows)])

    def to_dict(self, spans: bool = False) -> dict[str, Any]:
        """A JSON-ready dict; of the tensors, only a digest. `Plan.from_dict` is its inverse.

        `spans`: write indices as `"0-2 5"` and not as lists, which is shorter and, in a config, much faster to load.
        """
        if not isinstance(spans, bool):
            raise CompressionError(f"spans must be True or False, got {shown(spans)}.")
        data: dict[str, Any] = {"format": FORMAT, "edits": [edit_to_dict(edit, spans) for edit in self.edits]}
        if self.tensors:
            data["tensors"] = {"names": sorted(self.tensors), "sha256": _digest(self.tensors)}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> Plan:
        """The plan that `to_dict` wrote; `tensors` must be the ones whose digest it holds.

        Raises:
            CompressionError: the dict is not a plan, comes from a later format, or its tensors are missing or changed.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("edits"), list):
            raise CompressionError(f"Not a plan: expected a dict with a list of 'edits', got {shown(data)}.")
        unknown = sorted(str(key) for key in set(data) - {"format", "edits", "tensors"})
        if unknown:
            raise CompressionError(f"A plan has 'format', 'edits' and 'tensors', got also {shown(unknown)}.")
        if data.get("format") != FORMAT or isinstance(data["format"], bool):
            raise CompressionError(
                f"This plan has format {shown(data.get('format'))}; this hf_compress reads format {FORMAT}. "
                "Upgrade hf_compress."
            )
        _check_tensors(tensors)
        if data.get("tensors"):
            if not tensors:
                raise CompressionError(
                    f"This plan was computed with weights ({TENSORS_FILE}), which are missing; "
                    "without them the edits would be applied uncompensated. Load it with Plan.load(folder)."
                )
            if not isinstance(data["tensors"], Mapping) or _digest(tensors) != data["tensors"].get("sha256"):
                raise CompressionError("The plan's tensors are not the ones that it was saved with (their digest differs).")
        elif tensors:
            raise CompressionError("This plan was saved without tensors, but tensors were given; drop them.")
        edits, total = [], 0
        for edit in data["edits"]:
            edits.append(edit_from_dict(edit))
            total += sum(len(value) for value in vars(edits[-1]).values() if isinstance(value, tuple))
            if total > 10 * MOST_UNITS:
                raise CompressionError(f"More than {10 * MOST_UNITS:,} indices in one plan; no model is that large.")
        return cls(edits, tensors)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `compression_plan.json` (and `.safetensors`) into a folder, whole or not at all.

        Raises:
            CompressionError: the folder cannot be written; a plan that was there before stays whole.
        """
        from .files import replace_files

        folder = _folder(folder, "Plan.save")
        files = {PLAN_FILE: (json.dumps(self.to_dict(), indent=1) + "\n").encode()}
        if self.tensors:
            files[TENSORS_FILE] = dump_tensors({k: v.detach().cpu().contiguous() for k, v in self.tensors.items()})
        replace_files(folder, files, remove=() if self.tensors else (TENSORS_FILE,))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Plan:
        """The plan that `save` wrote into a folder.

        Raises:
            CompressionError: there is none, or it is truncated or changed.
        """
        folder = _folder(folder, "Plan.load")
        path = folder / PLAN_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CompressionError(f"No plan to read at {path}: {error.strerror}. Plan.save(folder) writes one.") from error
        except RecursionError as error:
            raise CompressionError(f"{path} is not a plan: it is nested deeper than any plan is.") from error
        except ValueError as error:
            raise CompressionError(f"{path} is not a whole plan ({error}); save it again.") from error
        tensors = None
        if isinstance(data, dict) and data.get("tensors"):
            try:
                tensors = load_tensors((folder / TENSORS_FILE).read_bytes())
            except (OSError, SafetensorError) as error:
                raise CompressionError(f"{TENSORS_FILE}, which belongs to {path}, cannot be read: {error}.") from error
        return cls.from_dict(data, tensors)


def _folder(folder: Any, who: str) -> Path:
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise CompressionError(f"{who} takes the path of a folder, got {shown(folder)}.")
    return Path(path)


def _check_tensors(tensors: Any) -> None:
    if tensors is not None and not isinstance(tensors, Mapping):
        raise CompressionError(f"Plan.tensors maps names to tensors, got {shown(tensors)}.")
    for name, tensor in (tensors or {}).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CompressionError(f"Plan.tensors maps names to tensors, got {shown(name)}: {type(tensor).__name__}.")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device and holds nothing" if tensor.is_meta else f"laid out as {tensor.layout}"
            raise CompressionError(f"Plan.tensors[{name!r}] is {kind}; a plan takes dense tensors with values.")


def _row(edit: Edit) -> tuple[str, str]:
    """(what is edited, how), for people."""
    first, *others = ((field, getattr(edit, field.name)) for field in fields(edit))
    if isinstance(first[1], tuple):  # KeepLayers, AddExits, KeepVocabulary
        where = next((name for name in ("embedding", "stack") if hasattr(edit, name)), "stack")
        target = getattr(edit, where, None) or f"the {where}"
        kept, others = first[1], [pair for pair in others if pair[0].name != where]
    else:
        target, kept = first[1], others.pop(0)[1] if isinstance(others[0][1], tuple) else None
    words = [f"{field.name}={value!r}" for field, value in others if field.default is MISSING or value != field.default]
    if not words and kept is None and others:
        words = [f"{others[0][0].name}={others[0][1]!r}"]
    if kept is not None:
        verb = "after" if type(edit).__name__ == "AddExits" else f"keep {len(kept)}:"
        words.insert(0, f"{verb} {_shortened(spans_of(kept))}")
    return target, ", ".join(words)


def edit_to_dict(edit: Edit, spans: bool = False) -> dict[str, Any]:
    data: dict[str, Any] = {"edit": type(edit).__name__}
    for field in fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, tuple):
            indices = all(type(v) is int for v in value)
            value = spans_of(value) if spans and indices else list(value)  # type: ignore[arg-type]
        data[field.name] = value
    return data


def edit_from_dict(data: Any) -> Edit:
    name = data.get("edit") if isinstance(data, Mapping) else None
    kind = EDITS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CompressionError(f"Not an edit: {shown(data)}. Known edits: {', '.join(EDITS)}.")
    values = {name: value for name, value in data.items() if name != "edit"}
    names = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not needed <= values.keys() <= names:
        raise CompressionError(f"{data['edit']} takes {sorted(names)}, got {shown(sorted(map(str, values)))}.")
    for name in ("heads", "neurons", "experts", "channels", "layers", "after", "tokens"):
        if isinstance(values.get(name), str):
            values[name] = from_spans(values[name])
    return kind(**values)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
