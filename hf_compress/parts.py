"""Models of several parts (CLIP, LLaVA, encoder-decoders): every part's own record, so that it loads by itself too.

The record of the whole says everything, under the names of the whole. Each sub-config says the same again of its own part,
under that part's names: `CLIPTextModel.from_pretrained(folder of a CLIPModel)` reads the sub-config alone. What was put
together from parts that were cut before has records in its sub-configs only; `gathered` makes one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .cutting import Undo
from .edits import CompressionError
from .exits.options import renamed_stack
from .layout import Layout, finder
from .stacks import base_config

# what an edit calls the module that it is about
TARGETS = ("attention", "ffn", "module", "conv", "moe", "stack")


@dataclass(frozen=True)
class ModelPart:
    """A transformers model inside another one, which one of its sub-configs describes."""

    path: str
    key: str
    module: PreTrainedModel
    config: Any


def parts_in(model: nn.Module) -> list[ModelPart]:
    """The parts of a model: for each sub-config, the outermost module that hangs on it, where there is one alone."""
    config = getattr(model, "config", None)
    found = []
    for key in getattr(type(config), "sub_configs", None) or {}:
        sub = getattr(config, key, None)
        if not isinstance(sub, PreTrainedConfig) or sub is config:
            continue
        mine: list[tuple[str, PreTrainedModel]] = []
        for name, module in model.named_modules():
            if name and isinstance(module, PreTrainedModel) and base_config(module.config) is sub:
                if not any(name.startswith(f"{outer}.") for outer, _ in mine):
                    mine.append((name, module))
        if len(mine) == 1:
            found.append(ModelPart(*mine[0][:1], key, mine[0][1], sub))
    return found


def stamp_parts_(model: nn.Module, record: Any, undo: Undo) -> None:
    """Write into each sub-config what a loader of that part alone needs; nothing where a stock model is that part.

    `record`: the whole's (an `HfCompressConfig`), or None where plain transformers builds the whole.
    """
    parts = parts_in(model)
    layout = None if record is None or not parts else named_as(model, record.layout)
    for part in parts:
        others = [other.path for other in parts if other is not part]
        local = None if layout is None else _local_record(record, layout, part, others, f"{model.base_model_prefix}.")
        values = vars(part.config)
        before = values.get("quantization_config")
        if before is None or _is_ours(before):
            undo.append(lambda v=values, b=before: _put(v, b))
            _put(values, local)
        stamp_parts_(part.module, local, undo)


def _put(values: dict[str, Any], record: Any) -> None:
    values.pop("quantization_config", None)
    if record is not None:
        values["quantization_config"] = record


def _is_ours(found: Any) -> bool:
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == "hf_compress"


def _under(name: str, path: str) -> str | None:
    """A name as the part at `path` calls it; None where it is not in it."""
    if name == path:
        return ""
    return name[len(path) + 1 :] if name.startswith(f"{path}.") else None


def _local_record(record: Any, whole: Layout, part: ModelPart, others: list[str], prefix: str) -> Any:
    layout = local_layout(whole, part, others)
    if not says_something(layout):
        return None
    masks = None if record.masks_dict is None else _local_plan(record.masks_dict, part.path, prefix)
    plan = _local_plan(record.plan_dict, part.path, prefix)
    return type(record)(plan, layout, masks)  # of a whole in another method's weights, a part alone is then refused


def local_layout(layout: Mapping[str, Any], part: ModelPart, others: list[str]) -> Layout:
    """The layout of one part, under its own names."""
    modules: dict[str, Any] = {}
    for name, entry in layout["modules"].items():
        local = _under(name, part.path)
        if local is not None:
            modules[local] = entry
        elif "kinds" in entry and not any(_under(name, other) is not None for other in others):
            modules[name] = entry  # a projection or a head beside the parts, which some classes of this part have too
    found: Layout = {"modules": modules, **{key: layout[key] for key in ("names",) if key in layout}}
    for key in ("layers", "gates"):
        inside = {_under(name, part.path): value for name, value in layout.get(key, {}).items()}
        inside.pop(None, None)
        if inside:
            found[key] = inside
    if "layers" in found:
        numbers = layout.get("numbers", {})
        found["numbers"] = {k[len(part.key) + 1 :]: v for k, v in numbers.items() if k.startswith(f"{part.key}.")}
    exits = layout.get("exits")
    if exits and (stack := renamed_stack(exits["stack"], lambda name: _under(name, part.path))):
        found["exits"] = {**exits, "stack": stack}
    return copy.deepcopy(found)


def says_something(layout: Mapping[str, Any]) -> bool:
    """Whether a layout is more than numbers that a stock model of the same config has as well."""
    return any(entry.keys() - {"attributes"} for entry in layout["modules"].values()) or any(
        layout.get(key) for key in ("layers", "gates", "exits")
    )


def _local_plan(plan: Mapping[str, Any], path: str, prefix: str) -> dict[str, Any]:
    edits = []
    for edit in plan["edits"]:
        key = next((k for k in TARGETS if k in edit), None)
        if key is None:
            continue
        target = edit[key]
        names = [] if target is None else [target, prefix + target, target.removeprefix(prefix)]
        local = next((found for name in names if (found := _under(name, path)) is not None), None)
        if local is not None:
            edits.append({**edit, key: local or None})
        elif key == "stack" and target is not None and target in path.split("."):
            edits.append({**edit, key: None})
    return {**{k: v for k, v in plan.items() if k != "tensors"}, "edits": edits}


# --- the other way -----------------------------------------------------------------------------------------------


def named_as(model: nn.Module, layout: Mapping[str, Any]) -> Layout:
    """A layout under this model's own names: one that came from a class with or without the base model's prefix."""
    find = finder(model)
    names = {id(module): name for name, module in model.named_modules()}

    def rename(name: str) -> str:
        module = find(name)
        return name if module is None else names[id(module)]

    found = dict(layout)
    for key in ("modules", "layers", "gates"):
        if key in layout:
            found[key] = {rename(name): value for name, value in layout[key].items()}
    if layout.get("exits"):
        found["exits"] = {**layout["exits"], "stack": renamed_stack(layout["exits"]["stack"], rename)}
    return found


def gathered(model: nn.Module, record: Any, read: Any) -> Any:
    """The record of a whole, with what the records of its parts say and it does not: parts that were cut by themselves.

    Args:
        model: the whole.
        record: its own (an `HfCompressConfig`), if any.
        read: gives the record of a config (`loader.compression_of`).
    """
    parts = parts_in(model)
    base = None if record is None else named_as(model, record.layout)
    changed = []
    for part in parts:
        own = read(part.config)
        if own is None:
            continue
        theirs = named_as(part.module, own.layout)
        others = [other.path for other in parts if other is not part]
        if base is None or _inside(local_layout(base, part, others)) != _inside(theirs):
            changed.append((part, own, theirs))
    if not changed:
        return record
    layout: Layout = {"modules": {}} if base is None else copy.deepcopy(base)
    edits = [] if record is None else list(record.plan_dict["edits"])
    masks = None if record is None or record.masks_dict is None else list(record.masks_dict["edits"])
    for part, own, theirs in changed:
        _check_part(part, own, theirs)
        inside = dict(part.module.named_modules())
        for key in ("modules", "layers", "gates"):
            kept = {name: value for name, value in layout.get(key, {}).items() if _under(name, part.path) is None}
            more = {name: value for name, value in theirs.get(key, {}).items() if name in inside}
            kept.update({f"{part.path}.{name}".rstrip("."): value for name, value in more.items()})
            if kept or key == "modules":
                layout[key] = kept
        if theirs.get("numbers"):
            layout["numbers"] = {**layout.get("numbers", {}), **{f"{part.key}.{k}": v for k, v in theirs["numbers"].items()}}
        edits = [e for e in edits if not _is_about(e, part.path)] + list(_in_the_whole(own.plan_dict["edits"], part.path))
        if own.masks_dict is not None:
            masks = [*(masks or []), *_in_the_whole(own.masks_dict["edits"], part.path)]
    kind = type(changed[0][1])
    plan = {**changed[0][1].plan_dict, "edits": edits}
    hidden = None if masks is None else {**changed[0][1].plan_dict, "edits": masks}
    return kind(copy.deepcopy(plan), layout, copy.deepcopy(hidden), inner=None if record is None else record.inner)


def _inside(layout: Mapping[str, Any]) -> dict[str, Any]:
    """What of a layout is about the part itself, in a form that can be compared."""
    modules = {n: e for n, e in layout["modules"].items() if e.keys() - {"attributes"}}
    return {"modules": modules, **{key: layout[key] for key in ("layers",) if layout.get(key)}}


def _is_about(edit: Mapping[str, Any], path: str) -> bool:
    return any(isinstance(edit.get(key), str) and _under(edit[key], path) is not None for key in TARGETS)


def _in_the_whole(edits: Iterable[Mapping[str, Any]], path: str) -> Iterator[dict[str, Any]]:
    for edit in edits:
        key = next((k for k in TARGETS if k in edit), None)
        if key is not None:
            yield {**edit, key: f"{path}.{edit[key]}" if edit[key] else path}


def _check_part(part: ModelPart, own: Any, theirs: Mapping[str, Any]) -> None:
    """Refuse what a whole cannot say of a part."""
    reason = None
    if own.inner is not None:
        reason = f"is quantized with {own.inner['quant_method']}. Put the float one together, then quantize the whole"
    elif theirs.get("exits"):
        reason = "has early exits, which leave only the model that they were added to. detach_exits_(part) first"
    elif any("." in key for key in theirs.get("numbers", {})):
        reason = "is itself made of parts whose layers were removed. Remove layers in the whole"
    if reason:
        raise CompressionError(f"The part {part.path!r} ({type(part.module).__name__}) {reason}.")
