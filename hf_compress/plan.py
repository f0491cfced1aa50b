"""What will be changed, as data: frozen edits, and the `Plan` that orders them. No torch module is touched here."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

FORMAT = 1
PLAN_FILE = "compression_plan.json"
TENSORS_FILE = "compression_plan.safetensors"
MOST_UNITS = 1_000_000  # no layer is that wide; a hostile plan is


class CompressionError(ValueError):
    """A refusal: what was got, what is allowed, what to do. Raised before anything has changed."""


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise CompressionError(f"{where} must be a module name as `discover` prints it, got {value!r}.")
    return value


def _indices(values: Any, where: str) -> tuple[int, ...]:
    """Sorted unique indices >= 0. Order has no meaning in what is kept, so two plans that keep the same compare equal."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise CompressionError(f"{where} must be a sequence of indices of what stays, got {values!r}.")
    indices = []
    for value in values:
        try:
            if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
                raise TypeError
            indices.append(operator.index(value))
        except TypeError:
            raise CompressionError(f"{where} must hold whole numbers, got {value!r}.") from None
    if not indices:
        raise CompressionError(f"{where} is empty: at least one must stay. To remove a whole layer, use KeepLayers.")
    if len(set(indices)) != len(indices):
        twice = sorted(index for index, count in Counter(indices).items() if count > 1)[:8]
        raise CompressionError(f"{where} names {twice} more than once; name each index that stays once.")
    if min(indices) < 0:
        raise CompressionError(f"{where} holds {min(indices)}; indices count from 0.")
    return tuple(sorted(indices))


@dataclass(frozen=True)
class KeepHeads:
    """Keep these query heads of one attention; the others, with their rows and columns, go.

    Args:
        attention (`str`): the attention's name, as `discover` gives it.
        heads (`Sequence[int]`): indices of the query heads that stay: whole key/value groups, or the same number of
            query heads in every group that stays.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepHeads
    >>> KeepHeads("encoder.layer.0.attention.self", [3, 0])
    KeepHeads(attention='encoder.layer.0.attention.self', heads=(0, 3))

    ```
    """

    attention: str
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        _name(self.attention, "KeepHeads.attention")
        object.__setattr__(self, "heads", _indices(self.heads, f"KeepHeads({self.attention!r}).heads"))


@dataclass(frozen=True)
class KeepNeurons:
    """Keep these intermediate neurons of one feed-forward block.

    Args:
        ffn (`str`): the block's name, as `discover` gives it.
        neurons (`Sequence[int]`): indices of the neurons that stay.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepNeurons
    >>> KeepNeurons("encoder.layer.0", range(3))
    KeepNeurons(ffn='encoder.layer.0', neurons=(0, 1, 2))

    ```
    """

    ffn: str
    neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        _name(self.ffn, "KeepNeurons.ffn")
        object.__setattr__(self, "neurons", _indices(self.neurons, f"KeepNeurons({self.ffn!r}).neurons"))


@dataclass(frozen=True)
class KeepLayers:
    """Keep these layers of one stack; indices that layers carry (caches, layer types) are put right.

    Args:
        layers (`Sequence[int]`): indices of the layers that stay.
        stack (`str`, *optional*): which stack, where a model has several: `"encoder"`, `"decoder"`, or whatever
            `discover` prints. Leaving it out is refused there.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepLayers
    >>> KeepLayers([0, 2, 4])
    KeepLayers(layers=(0, 2, 4), stack=None)

    ```
    """

    layers: tuple[int, ...]
    stack: str | None = None

    def __post_init__(self) -> None:
        if self.stack is not None:
            _name(self.stack, "KeepLayers.stack")
        object.__setattr__(self, "layers", _indices(self.layers, "KeepLayers.layers"))


Edit = KeepHeads | KeepNeurons | KeepLayers
EDITS: dict[str, type] = {"KeepHeads": KeepHeads, "KeepNeurons": KeepNeurons, "KeepLayers": KeepLayers}


def spans_of(indices: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` -> `"0-2 5"`."""
    parts, start = [], 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            first, last = indices[start], indices[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return " ".join(parts)


def from_spans(text: str) -> list[int]:
    """The inverse of `spans_of`."""
    indices: list[int] = []
    for part in text.split():
        first, dash, last = part.partition("-")
        if (
            dash
            and not last
            or not first.isdecimal()
            or not (last or first).isdecimal()
            or int(last or first) - int(first) > MOST_UNITS
        ):
            raise CompressionError(f"{part!r} is no span of indices such as '3' or '0-7'.")
        indices.extend(range(int(first), int(last or first) + 1))
        if len(indices) > MOST_UNITS:
            raise CompressionError(f"More than {MOST_UNITS:,} indices in one edit; no layer is that wide.")
    return indices


def _shortened(text: str) -> str:
    return text if len(text) <= 56 else text[:40].rsplit(" ", 1)[0] + f" ... {text.replace('-', ' ').rsplit(' ', 1)[1]}"


class Plan:
    """An ordered, frozen tuple of edits, and the tensors that a planner computed for them, if any.

    Names and indices of an edit refer to the model as the edits before it left it, so plans concatenate with `+`.

    Args:
        edits (`Sequence`): `KeepHeads`, `KeepNeurons` and `KeepLayers`, in the order in which they apply.
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
        if not isinstance(edits, Iterable) or (tensors is not None and not isinstance(tensors, Mapping)):
            raise CompressionError(
                f"Plan takes a sequence of edits and a dict of tensors, got {edits!r} and {type(tensors).__name__}."
            )
        edits = tuple(edits)
        for edit in edits:
            if not isinstance(edit, tuple(EDITS.values())):
                raise CompressionError(f"A plan is made of edits ({', '.join(EDITS)}), got {edit!r}.")
        for name, tensor in (tensors or {}).items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CompressionError(f"Plan.tensors maps names to tensors, got {name!r}: {type(tensor).__name__}.")
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
            return NotImplemented
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
        rows = []
        for edit in self.edits:
            target, kept = (getattr(edit, f.name) for f in fields(edit))
            if isinstance(edit, KeepLayers):
                target, kept = edit.stack or "the stack", edit.layers
            rows.append((type(edit).__name__, target, f"keep {len(kept)}: {_shortened(spans_of(kept))}"))
        width = max((len(target) for _, target, _ in rows), default=0)
        head = f"Plan with {len(rows)} edit{'s' * (len(rows) != 1)}"
        if self.tensors:
            size = sum(t.numel() * t.element_size() for t in self.tensors.values())
            head += f" and {len(self.tensors)} tensors ({size / 1e6:.1f} MB)"
        return "\n".join([head, *(f"  {name:<12} {target:<{width}}  {kept}" for name, target, kept in rows)])

    def to_dict(self, spans: bool = False) -> dict[str, Any]:
        """A JSON-ready dict; of the tensors, only a digest. `Plan.from_dict` is its inverse.

        `spans`: write indices as `"0-2 5"` and not as lists, which is shorter and, in a config, much faster to load.
        """
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
            raise CompressionError(f"Not a plan: expected a dict with a list of 'edits', got {str(data)[:80]!r}.")
        unknown = sorted(str(key) for key in set(data) - {"format", "edits", "tensors"})
        if unknown:
            raise CompressionError(f"A plan has 'format', 'edits' and 'tensors', got also {unknown}.")
        if data.get("format") != FORMAT:
            raise CompressionError(
                f"This plan has format {data.get('format')!r}; this hf_compress reads format {FORMAT}. Upgrade hf_compress."
            )
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

        if not isinstance(folder, str | os.PathLike):
            raise CompressionError(f"Plan.save takes the path of a folder, got {folder!r}.")
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
        if not isinstance(folder, str | os.PathLike):
            raise CompressionError(f"Plan.load takes the path of a folder, got {folder!r}.")
        path = Path(folder) / PLAN_FILE
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise CompressionError(f"No plan to read at {path}: {error.strerror}. Plan.save(folder) writes one.") from error
        except ValueError as error:
            raise CompressionError(f"{path} is not a whole plan ({error}); save it again.") from error
        tensors = None
        if isinstance(data, dict) and data.get("tensors"):
            try:
                tensors = load_tensors((Path(folder) / TENSORS_FILE).read_bytes())
            except (OSError, SafetensorError) as error:
                raise CompressionError(f"{TENSORS_FILE}, which belongs to {path}, cannot be read: {error}.") from error
        return cls.from_dict(data, tensors)


def edit_to_dict(edit: Edit, spans: bool = False) -> dict[str, Any]:
    data: dict[str, Any] = {"edit": type(edit).__name__}
    for field in fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, tuple):
            value = spans_of(value) if spans else list(value)
        data[field.name] = value
    return data


def edit_from_dict(data: Any) -> Edit:
    name = data.get("edit") if isinstance(data, Mapping) else None
    kind = EDITS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CompressionError(f"Not an edit: {str(data)[:80]!r}. Known edits: {', '.join(EDITS)}.")
    values = {name: value for name, value in data.items() if name != "edit"}
    names = {field.name for field in fields(kind)}
    if values.keys() != names:
        raise CompressionError(f"{data['edit']} takes {sorted(names)}, got {sorted(values)}.")
    for name in ("heads", "neurons", "layers"):
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
