"""What a cut leaves in the config: numbers where those are enough, the layout that a loader needs otherwise."""

from __future__ import annotations

import copy
import gc
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .caches import host_caches_
from .conversions import come_back, name_
from .cutting import Undo
from .discover import discover
from .edits import AddExits, CompressionError
from .exits.runtime import CHANGED, exit_options
from .heads import ConfigView
from .layout import OWN, gates_of, layers_differ, merge, skeleton, stock_numbers, unrecorded
from .loader import HfCompressConfig, compression_of
from .masking import masks_in
from .modules import LockedLinear
from .parts import ModelPart, gathered, local_layout, named_as, parts_in, says_something, stamp_parts_
from .plan import Plan
from .stacks import config_parts


def _local(name: str, owner: str) -> str | None:
    if not owner:
        return name
    return name[len(owner) + 1 :] if name.startswith(f"{owner}.") else None


def own_configs_(model: nn.Module, undo: Undo) -> None:
    """Give a model configs of its own where another model was built from the same objects.

    `teacher, student = Model(config), Model(config)` share one: what a cut writes there (fewer layers, a record) would change
    what the teacher computes, and what its checkpoint says. Parts of one whole share on purpose (`whole.config.text_config`
    is the part's), and keep doing so.
    """
    held = [(m, key, value) for m in model.modules() for key, value in vars(m).items() if isinstance(value, PreTrainedConfig)]
    configs = {id(value): value for _, _, value in held}
    ours = Counter(2 * [id(value) for _, _, value in held])  # the module, and `held`
    ours.update(id(v._hfc_base) for m in model.modules() for v in vars(m).values() if isinstance(v, ConfigView))
    ours.update(id(value) for config in configs.values() for value in vars(config).values())
    # and `configs` and the argument: most models end here, since looking for others walks all objects of the process
    if all(sys.getrefcount(configs[key]) <= ours[key] + 2 for key in configs):
        return
    others = _holders(configs, {id(m) for m in model.modules()} | configs.keys())
    models = [other for other in others if isinstance(other, PreTrainedModel)]
    if not models or len(models) != len(others) or any(m is model for other in models for m in other.modules()):
        return
    memo: dict[int, Any] = {}
    for module, key, value in held:
        undo.append(lambda m=module, k=key, v=value: setattr(m, k, v))
        setattr(module, key, copy.deepcopy(value, memo))
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, ConfigView) and id(value._hfc_base) in configs:
                undo.append(lambda m=module, k=key, v=value: setattr(m, k, v))
                setattr(module, key, ConfigView(memo[id(value._hfc_base)], **value.hfc_values()))


def _holders(configs: Mapping[int, Any], known: set[int]) -> list[Any]:
    """The models and configs, beside the known ones, that hold one of these configs as it is."""
    holders = gc.get_referrers(*configs.values())
    holders += gc.get_referrers(*(holder for holder in holders if type(holder) is dict))  # an object's, or a user's
    kinds = PreTrainedModel, PreTrainedConfig
    found = {id(h): h for h in holders if issubclass(type(h), kinds) and id(h) not in known}
    return [h for h in found.values() if any(id(value) in configs for value in vars(h).values())]


def stamp_(
    owner: PreTrainedModel,
    name: str,
    plan: Plan,
    record: Mapping[str, Any],
    removed: Mapping[str, tuple[int, ...]],
    numbers_before: Mapping[str, Any],
    undo: Undo,
    exits: dict[str, Any] | None = None,
) -> None:
    """Write into the config what a loader needs: nothing but numbers where that is enough, the layout otherwise."""
    config = owner.config
    before = gathered(owner, compression_of(config), compression_of)
    mine = {_local(k, name): v for k, v in record.items() if _local(k, name) is not None}
    gone = {_local(k, name): v for k, v in removed.items() if _local(k, name) is not None}
    layout = merge(named_as(owner, before.layout) if before else None, mine, gone)  # type: ignore[arg-type]
    if exits is not None:
        layout["exits"] = exits
    elif "exits" in layout:  # thresholds may have been tuned since
        layout["exits"] = exit_options(owner)
    edits = (before.plan if before else Plan()) + plan
    state = dict(config.__dict__)

    def restore() -> None:
        config.__dict__.clear()
        config.__dict__.update(state)

    undo.append(restore)
    hidden = None
    if before is not None and before.masks is not None:  # from the middle of a training: what is not cut stays masked
        hidden, gates = masks_in(owner).to_dict(spans=True), gates_of(owner)
        layout = {**layout, "gates": gates}
        if not gates:
            hidden, layout = None, {k: v for k, v in layout.items() if k != "gates"}
    if gone:
        _follow_layers(owner, tuple(gone), undo)  # type: ignore[arg-type]
        _record_layers(owner, layout, gone, numbers_before, undo)  # type: ignore[arg-type]
    written, built = write_record(owner, layout, edits.to_dict(spans=True), hidden, undo)
    place = unrecorded(owner, written, built)
    if place is not None:
        why = (
            "its config would not build any model"
            if built is None and place.startswith("the config")
            else f"{place} would differ"
        )
        raise CompressionError(
            f"Nothing was changed: this cut of {type(owner).__name__} could not be saved so that it loads again ({why}). "
            "Leave the layers or blocks that it depends on out of the plan; if it is a module of your own in the "
            "place of what the config says, make a class that builds it."
        )


def write_record(
    owner: PreTrainedModel, layout: dict, plan: dict[str, Any], masks: dict[str, Any] | None, undo: Undo
) -> tuple[dict[str, Any] | None, nn.Module | None]:
    """Put a record into the config, or numbers alone where plain transformers then builds this model.

    Returns:
        (the layout if there is one, a skeleton that the config builds if one was made on the way).
    """
    config = owner.config
    stock, built = None, None
    # a config names no kinds of modules, layers, masks or exits
    if not (layout.get("layers") or masks or layout.get("exits") or any("kinds" in e for e in layout["modules"].values())):
        stock, built = stock_numbers(owner, discover(owner), layout["modules"])
    if stock is not None:
        config.__dict__.pop("quantization_config", None)
        if layout.get("names") == OWN:
            name_(owner, None, undo)
        stamp_parts_(owner, None, undo)
        parts = dict(config_parts(owner))
        for key, value in stock.items():
            part, _, attribute = key.rpartition(".")
            target = parts[part]
            was = target.__dict__.get(attribute)
            undo.append(lambda t=target, a=attribute, v=was: t.__dict__.__setitem__(a, v))
            setattr(target, attribute, value)
    else:
        for part in parts_in(owner):
            _lock_part(owner, layout, part, undo)
        if not _is_loud(layout):
            _lock(owner, layout, undo)
        _name(owner, layout, undo)
        config.quantization_config = HfCompressConfig(plan, layout, masks)
        stamp_parts_(owner, config.quantization_config, undo)
    written = layout if stock is None else None
    host_caches_(owner, None if stock is not None else config.quantization_config, undo)
    _unlock_others(owner, written, undo)
    return written, None if stock else built  # numbers that were written since make it another


def _name(owner: PreTrainedModel, layout: dict, undo: Undo) -> None:
    """Weights whose names on disk would not lead back are saved under the names that they have here; loaders are told."""
    if layout.get("names") == OWN or not come_back(owner):
        layout["names"] = OWN
        name_(owner, [], undo)


def _follow_layers(owner: PreTrainedModel, paths: tuple[str, ...], undo: Undo) -> None:
    """Layers that share weights (Zamba) are tied by their numbers, which are others now: as the config says, or refused."""
    inside = tuple(f"{path}." for path in paths)
    ours: dict[int, set[str]] = {}
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        ours.setdefault(id(parameter), set()).update([name] if name.startswith(inside) else [])
    mine = {frozenset(names) for names in ours.values() if len(names) > 1}
    if not mine and not any(name.startswith(inside) for name in owner.all_tied_weights_keys):
        return
    stock: Any = skeleton(owner)
    if stock is None:
        return  # which is told later
    theirs: dict[str, set[str]] = {}
    for target, source in stock.all_tied_weights_keys.items():
        if target.startswith(inside):
            theirs.setdefault(source, {source}).add(target)
    wrong = mine ^ {frozenset(names) for names in theirs.values()}
    if wrong:
        one, other, *_ = sorted(min(wrong, key=sorted))
        raise CompressionError(
            f"Cannot remove these layers of {', '.join(paths)} so that the model loads again, so nothing was changed: of the "
            f"layers that stay (counted anew), {one!r} and {other!r} would be one weight either here or in what the config "
            "builds, not in both: it ties layers by their place among those that share. Remove layers that share nothing, or "
            "the last of those that do."
        )
    parts = dict(stock.named_modules())
    for name, module in owner.named_modules():
        for key in ("_tied_weights_keys", "all_tied_weights_keys"):
            before = vars(module).get(key)
            if before:
                undo.append(lambda m=module, k=key, v=before: setattr(m, k, v))
                setattr(module, key, dict(vars(parts[name]).get(key) or {}))


def _record_layers(
    owner: PreTrainedModel, layout: dict, gone: Mapping[str, tuple[int, ...]], numbers: Mapping[str, Any], undo: Undo
) -> None:
    """Where the layers that stay are not what a shorter config builds, say which of the base model's they are."""
    known = layout.get("layers", {})
    stock = skeleton(owner)
    if not known and stock is not None and layers_differ(owner, stock, tuple(gone), layout["modules"]) is None:
        return
    kept = {path: [known[path][i] for i in now] if path in known else list(now) for path, now in gone.items()}
    layout["layers"] = {**known, **kept}
    layout.setdefault("numbers", {k: v for k, v in numbers.items() if _value(owner, k) != v})


def _value(owner: PreTrainedModel, key: str) -> Any:
    part, _, attribute = key.rpartition(".")
    return vars(dict(config_parts(owner))[part]).get(attribute)


def _unlock_others(owner: PreTrainedModel, layout: Mapping[str, Any] | None, undo: Undo) -> None:
    """Locks of an earlier record that this one does not need any more."""
    modules = (layout or {}).get("modules", {})
    for name, module in owner.named_modules():
        if type(module) is LockedLinear and not modules.get(name, {}).get("lock"):
            undo.append(lambda m=module: setattr(m, "__class__", LockedLinear))
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _is_loud(layout: Mapping[str, Any]) -> bool:
    """Whether some weight has a shape that plain transformers does not take."""
    return any("shapes" in entry or entry.get("lock") for entry in layout["modules"].values())


def _lock_part(owner: PreTrainedModel, layout: dict, part: ModelPart, undo: Undo) -> None:
    """A part that was changed in no shape of its own gets a lock of its own: it can be loaded alone."""
    local = local_layout(layout, part, [other.path for other in parts_in(owner) if other.path != part.path])
    inside = {"modules": {n: e for n, e in local["modules"].items() if n in dict(part.module.named_modules())}}
    if says_something({**local, **inside}) and not local.get("gates") and not _is_loud(inside):
        _lock(owner, layout, undo, tuple(f"{part.path}.{path}" for path in local.get("layers", {})) or (part.path,))
    for deeper in parts_in(part.module):
        _lock_part(owner, layout, replace(deeper, path=f"{part.path}.{deeper.path}"), undo)


def _lock(owner: PreTrainedModel, layout: dict, undo: Undo, inside: tuple[str, ...] = ()) -> None:
    """Nothing in this checkpoint has another shape, so one weight gets one on disk: it must not load without us."""
    inside = inside or tuple(layout.get("layers", {})) or ("",)
    structure = discover(owner)
    outs = {block.out for block in (*structure.attentions, *structure.ffns)}  # those carry gates
    stock = skeleton(owner)
    theirs = {} if stock is None else dict(stock.named_modules())
    plain = [n for n, m in owner.named_modules() if n not in outs and type(m) in (nn.Linear, LockedLinear)]
    there = [n for n in plain if n in theirs]  # what transformers alone has no place for is no lock (SAM 3's last layer)

    def within(names: list[str]) -> list[str]:
        return [name for name in names if any(not p or name.startswith(f"{p}.") for p in inside)]

    name = next(iter([*within(there), *there, *within(plain)]), None)
    if name is None:
        raise CompressionError(f"{type(owner).__name__} has no Linear that could mark the checkpoint as compressed.")
    module = owner.get_submodule(name)
    if type(module) is nn.Linear:
        undo.append(lambda: setattr(module, "__class__", nn.Linear))
        module.__class__ = LockedLinear
    layout["modules"].setdefault(name, {})["lock"] = True


def record_exits_(model: PreTrainedModel) -> None:
    """Write the criterion and thresholds that a model's exits have now into its config, so that they are saved.

    Where they were taken off, so are their edit and options; a record that then says nothing goes too.
    """
    record, options = getattr(model.config, "quantization_config", None), exit_options(model)
    if not isinstance(record, HfCompressConfig) or "exits" not in record.layout:
        return
    if options is not None:
        layout = {**record.layout, "exits": options}
        model.config.quantization_config = HfCompressConfig(record.plan_dict, layout, record.masks_dict, inner=record.inner)
        stamp_parts_(model, model.config.quantization_config, [])
        return
    layout = copy.deepcopy({key: value for key, value in record.layout.items() if key != "exits"})
    edits = [edit for edit in record.plan_dict["edits"] if edit["edit"] != AddExits.__name__]
    plan = {**record.plan_dict, "edits": edits}
    if record.inner is None:
        write_record(model, layout, plan, record.masks_dict, [])
    else:  # another method's weights are not asked for their shapes, and lock the checkpoint anyway
        model.config.quantization_config = HfCompressConfig(plan, layout, record.masks_dict, inner=record.inner)


CHANGED.append(record_exits_)  # type: ignore[arg-type]
