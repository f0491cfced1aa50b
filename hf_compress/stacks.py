"""Whole layers, removed: the stack itself, the indices that layers carry, and the numbers in the configs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .cutting import Undo
from .heads import ConfigView

# what a module calls its place in the stack
INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
# what configs call the number of layers: of the only stack, or of one side
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
DEPTH_OF = {
    "encoder": ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", *DEPTH),
    "decoder": ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
}
# lists with one value a layer whose names do not say so
PER_LAYER = ("depths", "attention_window")
# lists of the layers that something holds for, by number
INDICES = (
    "attn_layer_indices", "fullatt_block_indexes", "full_attn_idxs", "global_attn_indexes", "window_block_indices",
    "mlp_only_layers", "moe_layers", "hybrid_layer_ids", "cross_attention_layers", "deepstack_visual_indexes",
    "local_layer_ids",
)  # fmt: skip
# a module of the first layer that computes something for all layers, and the flag that says so: it must move along
CARRIED = (("relative_attention_bias", "has_relative_attention_bias"),)
# tables by the number of a layer, which the layer is called with: which of a shared block's adapters is its own (Zamba2)
BY_LAYER = ("layer_dic",)


def remove_layers_(model: nn.Module, removed: dict[str, tuple[int, ...]], undo: Undo) -> dict[str, dict[str, Any]]:
    """Keep these layers of these stacks, in place.

    Returns:
        the attributes that were changed, as `cutting.cut_` records them, under the names that layers have now.
    """
    record: dict[str, dict[str, Any]] = {}
    for path, kept in removed.items():
        stack = model.get_submodule(path)
        before = dict(stack._modules)
        undo.append(lambda stack=stack, before=before: _replace(stack, before))
        depth = len(before)
        if kept[0] != 0:
            carry_(before["0"], before[str(kept[0])], undo)
        _replace(stack, {str(new): before[str(old)] for new, old in enumerate(kept)})
        renumber_(stack, kept, undo)
        for new, old in enumerate(kept):
            for name, module in stack._modules[str(new)].named_modules():  # type: ignore[union-attr]
                for attribute in INDEX:
                    if type(getattr(module, attribute, None)) is int and getattr(module, attribute) == old != new:
                        undo.append(lambda m=module, a=attribute, v=old: setattr(m, a, v))
                        setattr(module, attribute, new)
                        full = f"{path}.{new}" + (f".{name}" if name else "")
                        record.setdefault(full, {}).setdefault("attributes", {})[attribute] = new
        parent = path.rpartition(".")[0]
        for attribute in DEPTH:  # DistilBERT's stack counts its layers itself
            owner = model.get_submodule(parent)
            if type(getattr(owner, attribute, None)) is int and getattr(owner, attribute) == depth:
                undo.append(lambda m=owner, a=attribute, d=depth: setattr(m, a, d))
                setattr(owner, attribute, len(kept))
                record.setdefault(parent, {}).setdefault("attributes", {})[attribute] = len(kept)
        for config, names in _configs(model, path):
            _count(config, names, path, depth, kept, undo)
    return record


def _replace(stack: nn.Module, entries: dict[str, Any]) -> None:
    stack._modules.clear()
    stack._modules.update(entries)


def renumber_(stack: nn.Module, kept: Sequence[int], undo: Undo) -> None:
    """Tables that modules of a stack look up by the number of their layer, by the numbers that layers have now."""
    for module in stack.modules():
        for attribute in BY_LAYER:
            table = vars(module).get(attribute)
            if isinstance(table, dict):
                undo.append(lambda m=module, a=attribute, t=table: setattr(m, a, t))
                setattr(module, attribute, {new: table[old] for new, old in enumerate(kept) if old in table})


def carry_(first: Any, new_first: Any, undo: Undo) -> None:
    """Move what only the first layer has, and every layer uses, to the layer that comes first now."""
    for (_, module), (_, target) in zip(first.named_modules(), new_first.named_modules(), strict=False):
        for child, flag in CARRIED:
            if getattr(module, flag, False) is True and getattr(target, flag, None) is False:

                def back(target=target, child=child, flag=flag) -> None:
                    del target._modules[child]
                    setattr(target, flag, False)

                undo.append(back)
                target._modules[child] = module._modules[child]
                setattr(target, flag, True)


def _configs(model: nn.Module, path: str) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every config that counts this stack, with the names that it may use for that."""
    names = dict(model.named_modules())
    side = next((word for word in reversed(path.split(".")) if word in DEPTH_OF), None)
    other = {"encoder": "decoder", "decoder": "encoder"}.get(side or "", "")
    # a config that both sides hang on counts each under its own name
    of_other = {id(base_config(m.config)) for n, m in names.items() if hasattr(m, "config") and other in n.split(".")}
    two_sided = any(isinstance(m, nn.ModuleList) and len(m) and other in n.split(".") for n, m in names.items())
    seen: set[int] = set()
    own = base_config(getattr(model, "config", None))
    for name, module in names.items():
        config = base_config(getattr(module, "config", None))
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        shared = side is not None and two_sided and (not name or id(config) in of_other)
        if not name or path == name or path.startswith(f"{name}.") or name.startswith(f"{path}."):
            yield config, DEPTH_OF[side] if shared and side else (*DEPTH, *DEPTH_OF.get(side or "", ()))
        elif side is not None and type(config) is type(own) and config is not own:
            # the other side's copy of the whole's config counts this side too, under its own names (ProphetNet's cache does)
            yield config, tuple(key for key in DEPTH_OF[side] if key not in DEPTH)
        else:
            continue
        seen.add(id(config))


def base_config(config: Any) -> Any:
    return config._hfc_base if isinstance(config, ConfigView) else config


def _count(config: Any, names: tuple[str, ...], path: str, depth: int, kept: tuple[int, ...], undo: Undo) -> None:
    values = vars(config)
    if len(values.get("stage_names") or ()) == depth + 1:
        _name_stages(config, kept, undo)
    counted = [values[name] for name in names if type(values.get(name)) is int]
    counts = depth in counted
    # of two sides that one config counts, lists that do not say whose they are hold for the encoder (LED's windows)
    others = "decoder_layers" in names and not set(names) & set(DEPTH)
    stage = next((int(word) for word in reversed(path.split(".")) if word.isdigit()), None)
    for name, value in list(values.items()):
        if name in names and type(value) is int and value == depth and stage is None:
            new: Any = len(kept)
        elif name == "depths" and stage is not None and isinstance(value, list | tuple) and stage < len(value):
            new = [len(kept) if i == stage else n for i, n in enumerate(value)]
        elif others and isinstance(value, list | tuple) and "decoder" not in name:
            continue
        elif is_indices(name) and isinstance(value, list | tuple) and stage is None:
            if not counts or not all(type(v) is int and 0 <= v < depth for v in value):
                continue
            new = [kept.index(v) for v in value if v in kept]
        elif isinstance(value, list | tuple) and counts_layers(name, value) and len(value) == depth and stage is None:
            if counted and not counts:  # the layers of another stack, as many by chance
                continue
            new = [value[i] for i in kept]
        else:
            continue
        undo.append(lambda c=config, n=name, v=value: c.__dict__.__setitem__(n, v))
        config.__dict__[name] = new


def is_indices(name: str) -> bool:
    """Whether a list in a config holds numbers of layers, and not one value for each."""
    return name in INDICES or ("layer" in name and bool({"indices", "indexes", "idxs", "idx", "ids"} & set(name.split("_"))))


def _name_stages(config: Any, kept: tuple[int, ...], undo: Undo) -> None:
    """A backbone's names for its layers, and those of its outputs that stay (the last layer where none does)."""
    before = {name: config.__dict__.get(name) for name in ("stage_names", "_out_features", "_out_indices")}
    undo.append(lambda: config.__dict__.update(before))
    old = before["_out_indices"] or [len(kept)]
    chosen = [i for i in old if i == 0] + [kept.index(i - 1) + 1 for i in old if i > 0 and i - 1 in kept]
    names = ["stem", *(f"stage{i + 1}" for i in range(len(kept)))]
    indices = chosen or [len(kept)]
    config.__dict__.update(stage_names=names, _out_indices=indices, _out_features=[names[i] for i in indices])


def config_numbers(model: nn.Module) -> dict[str, Any]:
    """The values of the model's config that removing layers may change: what a loader needs to build all layers."""
    from copy import deepcopy

    found: dict[str, Any] = {}
    for name, config in config_parts(model):
        for key, value in vars(config).items():
            if counts_layers(key, value):
                found[f"{name}.{key}".lstrip(".")] = deepcopy(value)
    return found


def counts_layers(key: str, value: Any) -> bool:
    """Whether a config value is one that removing layers may change."""
    if isinstance(value, list | tuple):
        return ("layer" in key or key in (*PER_LAYER, *INDICES)) and all(isinstance(v, str | int | float | None) for v in value)
    return type(value) is int and key in {*DEPTH, *DEPTH_OF["encoder"], *DEPTH_OF["decoder"]}


def config_parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's config, under "", and its sub-configs, by name."""
    config = getattr(model, "config", None)
    if config is None:
        return
    yield "", config
    for name in getattr(type(config), "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield name, getattr(config, name)
