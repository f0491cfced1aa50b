"""What a loader needs: absolute shapes and attributes of every touched module; and whether it is needed at all.

Loading replays a layout alone. It knows no architecture and never looks for structure, so a checkpoint that was once
written loads whatever `discover` learns later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .checks import CompressionError, from_spans, spans_of
from .exits.options import check_options, stack_names
from .exits.runtime import attach_exits_
from .heads import HOW, ConfigView, HeadCount, narrow_, select_heads_
from .kinds import check_kinds, follow_ties_, make_
from .mixtures import COUNTS, GROUPS, experts_of, settle_counts_
from .modules import PLAIN, GatedParameter, LockedLinear, dense_weight, gate_, is_gated, lock_, plain_kind, width
from .quantization import is_quantized
from .sparse import is_sparse
from .stacks import carry_, config_parts, counts_layers, renumber_

Layout = dict[str, Any]
Start = Callable[[nn.Module, torch.Tensor], None]

# attributes that say nothing about the function in eval mode, or change while a model runs
PASSING = {"training", "gradient_checkpointing", "drop_prob", "drop_path", "p", "dropout", "layerdrop"}
# what configs call the number of heads and the width of the feed-forward blocks, per side where there are two
HEAD_KEYS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "{side}_attention_heads")
KV_KEYS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
OWN = "own"  # the checkpoint's weights have the names that they have in the model: no conversion
NEURON_KEYS = ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "{side}_ffn_dim")


# --- writing -----------------------------------------------------------------------------------------------------


def merge(old: Mapping[str, Any] | None, new: Mapping[str, Any], removed: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout after another cut. `new` names modules as they are called once `removed` has happened."""
    modules: dict[str, Any] = {}
    for name, entry in (old or {}).get("modules", {}).items():
        moved = renamed(name, removed)
        if moved is not None:
            modules[moved] = copy.deepcopy(entry)
    for name, entry in new.items():
        old_entry = modules.get(name)
        if old_entry and "kinds" in entry:  # shapes of another kind; and its own are lock enough
            old_entry = {k: v for k, v in old_entry.items() if k not in ("shapes", "lock")}
        modules[name] = joined(old_entry, entry)
    return {**{k: v for k, v in (old or {}).items() if k != "modules"}, "modules": modules}


def joined(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """One module's entry after another change to it: what is new replaces what was said before."""
    entry = dict(old or {})
    for key, value in new.items():
        entry[key] = {**entry.get(key, {}), **value} if isinstance(value, dict) else value
    return entry


def renamed(name: str, removed: Mapping[str, tuple[int, ...]]) -> str | None:
    """A module's name after layers went; None where it went with them."""
    for path, kept in removed.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            if int(index) not in kept:
                return None
            return f"{path}.{kept.index(int(index))}" + (f".{rest}" if rest else "")
    return name


def skeleton(model: nn.Module, numbers: Mapping[str, Any] | None = None) -> nn.Module | None:
    """The stock model that plain transformers builds from a config, without memory; None where it cannot be built.

    The config goes through its dict and back, as it does on disk, so what it computes or checks on the way is in it.

    `numbers`: values that replace those of the config, `"key"` or `"part.key"`.
    """
    try:
        with ExitStack() as stack:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            for context in type(model).get_init_context(dtype, False, False, None):  # type: ignore[attr-defined]
                stack.enter_context(context)
            return type(model)(with_numbers(model.config, numbers))  # type: ignore[arg-type]
    except Exception:  # a config that its model refuses (heads that do not divide the hidden size): not stock
        return None


def with_numbers(config: Any, numbers: Mapping[str, Any] | None) -> Any:
    """A config as it is on disk, without its record, with other values under `"key"` or `"part.key"`."""
    data = config.to_dict()
    data.pop("quantization_config", None)
    for name, value in (numbers or {}).items():
        part, _, key = name.rpartition(".")
        (data[part] if part else data)[key] = value
    return type(config).from_dict(data)


def unrecorded(model: nn.Module, layout: Layout | None, stock: nn.Module | None = None) -> str | None:
    """The first place where what a config records is not the model that it is in; None where loading would be right.

    `stock`: a skeleton that was built from the config as it is; it is changed here.
    """
    stock = stock or skeleton(model)
    if stock is None:
        return "the config, which does not build this model again"
    if layout is not None:
        replay_(stock, layout)
    locked = {name for name, entry in (layout or {"modules": {}})["modules"].items() if entry.get("lock")}
    theirs = dict(stock.named_modules())
    ours = dict(model.named_modules())
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or not _same_kind(ours[name], theirs[name]):
            return name
        if getattr(ours[name], "hfc_heads", None) != getattr(theirs[name], "hfc_heads", None):
            return name
        for key, tensor in theirs[name]._buffers.items():
            held = ours[name]._buffers.get(key)
            if key not in ours[name]._non_persistent_buffers_set and tensor is not None and held is not None:
                if held.shape != tensor.shape:
                    return f"{name}.{key}"
        for key, tensor in theirs[name]._parameters.items():
            mine = ours[name]._parameters[key]
            leading = (name in locked and key == "weight") or (
                is_quantized(ours[name]) and tensor is not None and tensor.ndim == 3
            )
            shape = tensor is not None and tensor.shape[1:] if leading else tensor is not None and tensor.shape
            if tensor is not None and is_sparse(theirs[name]) and key == "weight":  # a vector until it is filled
                shape = theirs[name].hfc_shape if len(tensor) == ours[name].hfc_kept else None
            if mine is not None and mine.shape != shape:
                return f"{name}.{key}"
    return None


def differs(model: nn.Module, stock: nn.Module, exact: set[str]) -> str | None:
    """The first place where a model is not what its config builds, None if nowhere.

    Classes and shapes are compared everywhere, numbers on the modules named in `exact`: elsewhere some models change
    theirs while they run.
    """
    theirs = dict(stock.named_modules())
    missing = theirs.keys() - dict(model.named_modules()).keys()
    if missing:
        return min(missing)
    for name, module in model.named_modules():
        other = theirs.get(name)
        if other is None or not _same_kind(module, other) or hasattr(module, "hfc_heads"):
            return name
        for tensors in ("_parameters", "_buffers"):
            for key, tensor in getattr(other, tensors).items():
                ours = getattr(module, tensors).get(key)
                if (tensor is None) != (ours is None) or (tensor is not None and tensor.shape != ours.shape):
                    return f"{name}.{key}"
        if name in exact:
            place = _number_that_differs(module, other, ())
            if place is not None:
                return f"{name}.{place}"
    return None


def _same_kind(module: nn.Module, other: nn.Module) -> bool:
    kind = nn.Linear if isinstance(module, LockedLinear) else plain_kind(module)
    mine = {k for k, v in module._parameters.items() if v is not None}
    # by name: torch makes a new class for every parametrized module
    return kind.__name__ == type(other).__name__ and mine == {k for k, v in other._parameters.items() if v is not None}


def _number_that_differs(module: nn.Module, other: nn.Module, ignore: Iterable[str]) -> str | None:
    for key, value in vars(other).items():
        if isinstance(value, bool | int | float | str) and key not in PASSING and not key.startswith("_"):
            if key not in ignore and getattr(module, key, None) != value:
                return key
    return None


def layers_differ(model: nn.Module, stock: nn.Module, paths: tuple[str, ...], touched: Mapping[str, Any]) -> str | None:
    """Whether the layers that stay are those that a config with fewer layers builds, apart from what was recorded."""
    theirs = dict(stock.named_modules())
    missing = theirs.keys() - dict(model.named_modules()).keys()
    if missing:
        return min(missing)
    for name, module in model.named_modules():
        if not any(name == path or name.startswith(f"{path}.") for path in paths):
            continue
        if name not in theirs or not _same_kind(module, theirs[name]):
            return name
        place = _number_that_differs(module, theirs[name], touched.get(name, {}).get("attributes", {}))
        if place is not None:
            return f"{name}.{place}"
    return None


def stock_numbers(model: nn.Module, structure: Any, touched: Iterable[str]) -> tuple[dict[str, Any] | None, nn.Module | None]:
    """The config values under which plain transformers builds this model, or None: what makes a checkpoint *stock*.

    Returns:
        (those values, the skeleton that the config builds as it is).

    A guess (one size in all blocks of a config, written under the names that configs use) that is then checked: a
    skeleton built from it must have every shape and every number of the model.
    """
    numbers: dict[str, Any] = {}
    parts = dict(config_parts(model))
    for part, config in parts.items():
        mine = [b for b in (*structure.attentions, *structure.ffns) if _part_of(model, b.name, parts) == part]
        heads = [b for b in mine if hasattr(b, "head_dim")]
        ffns = [b for b in mine if not hasattr(b, "head_dim")]
        for blocks, keys, values in (
            (heads, HEAD_KEYS, [b.num_heads for b in heads]),
            (heads, KV_KEYS, [b.num_key_value_heads for b in heads]),
            (ffns, NEURON_KEYS, [b.size for b in ffns]),
        ):
            sides = {"decoder" if "decoder" in b.name.split(".") else "encoder" for b in blocks}
            for key in keys:
                for side in sides if "{side}" in key else ("",):
                    name = key.format(side=side)
                    if name not in vars(config):
                        continue
                    of_side = [
                        v for b, v in zip(blocks, values, strict=True)
                        if not side or ("decoder" in b.name.split(".")) == (side == "decoder")
                    ]  # fmt: skip
                    if isinstance(vars(config)[name], int | None) and len(set(of_side)) == 1:
                        numbers[f"{part}.{name}".lstrip(".")] = of_side[0]
        heads_changed = bool(heads) and heads[0].num_heads != vars(config).get(
            "num_attention_heads", heads[0].num_heads if heads else 0
        )
        fixed = (
            getattr(getattr(type(config), "head_dim", None), "fset", config) is None
        )  # Falcon computes it; told, it logs an error
        if len({b.head_dim for b in heads}) == 1 and ("head_dim" in vars(config) or heads_changed and not fixed):
            numbers[f"{part}.head_dim".lstrip(".")] = heads[0].head_dim  # read by many models, stored by few
    of_mixtures = _mixture_numbers(structure.experts, parts)
    every, mixtures = (
        {k: v for k, v in found.items() if vars(parts[k.rpartition(".")[0]]).get(k.rpartition(".")[2]) != v}
        for found in ({**numbers, **of_mixtures}, of_mixtures)
    )
    candidates: list[dict[str, Any]] = [every]
    if mixtures:  # shared experts look like blocks of their own, whose width has no name; groups may be there and not be used
        flat = {k: v for k, v in mixtures.items() if k.rpartition(".")[2] not in GROUPS}
        candidates += [mixtures, flat, {k: v for k, v in every.items() if k in flat or k not in mixtures}]
    blocks = (*structure.attentions, *structure.ffns)
    exact = {*touched, *(b.name for b in blocks), *(part.module for b in blocks for part in b.parts)}
    plain = skeleton(model)
    if plain is not None and differs(model, plain, exact) is None:
        return {}, plain
    for i, candidate in enumerate(candidates):
        if candidate and candidate not in candidates[:i]:
            stock = skeleton(model, candidate)
            if stock is not None and differs(model, stock, exact) is None:
                return candidate, plain
    return None, plain


def _mixture_numbers(mixtures: Iterable[Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """What configs call the number of experts and of their groups, where all mixtures have the same."""
    numbers = {}
    for keys, values in (
        (COUNTS, {mixture.num_experts for mixture in mixtures}),
        (GROUPS, {mixture.groups for mixture in mixtures}),
    ):
        for part, config in parts.items() if len(values) == 1 else ():
            found = [key for key in keys if type(vars(config).get(key)) is int]
            numbers |= {f"{part}.{key}".lstrip("."): next(iter(values)) for key in found}
    return numbers


def _part_of(model: nn.Module, name: str, parts: dict[str, Any]) -> str:
    """Which sub-config describes a block: that of the nearest module above it that has one."""
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        base = config._hfc_base if isinstance(config, ConfigView) else config
        for part, known in parts.items():
            if part and base is known:
                return part
        if not name:
            return ""
        name = name.rpartition(".")[0]


# --- reading -----------------------------------------------------------------------------------------------------


def check(layout: Any) -> Layout:
    """A layout as it came from a file, or a refusal: only known keys, of the types that this package writes."""
    kinds = {
        "shapes": dict,
        "attributes": dict,
        "config": dict,
        "heads": dict,
        "lock": bool,
        "kinds": list,
        "divides": dict,
        "narrow": list,
        "children": int,
    }
    if not isinstance(layout, dict) or not isinstance(layout.get("modules"), dict):
        raise CompressionError("The checkpoint's compression layout is not whole: it has no 'modules'.")
    for key, kind in (("layers", list), ("gates", str)):
        part = layout.get(key, {})
        if not isinstance(part, dict) or not all(isinstance(value, kind) for value in part.values()):
            raise CompressionError(f"The checkpoint's compression layout has {key} {str(part)[:60]!r}; a dict was expected.")
    numbers = layout.get("numbers", {})
    if not isinstance(numbers, dict) or not all(counts_layers(k.rpartition(".")[2], v) for k, v in numbers.items()):
        raise CompressionError(
            f"The checkpoint's compression layout sets {str(numbers)[:80]!r}, which are no numbers of layers."
        )
    if "exits" in layout:
        layout["exits"] = check_options(layout["exits"])
    if layout.get("names", OWN) != OWN:
        raise CompressionError(f"The checkpoint's compression layout has names {layout['names']!r}; {OWN!r} was expected.")
    unknown = set(layout) - {"modules", "layers", "numbers", "gates", "exits", "names"}
    if unknown:
        raise CompressionError(f"The checkpoint's compression layout has unknown parts {sorted(unknown)}; upgrade hf_compress.")
    for name, entry in layout["modules"].items():
        if not isinstance(entry, dict):
            raise CompressionError(f"The layout's entry for {name!r} is not a dict.")
        for key, value in entry.items():
            if key not in kinds or not isinstance(value, kinds[key]):
                raise CompressionError(
                    f"The layout says {key!r}: {value!r} for {name!r}, which no hf_compress of this version writes."
                )
        check_kinds(entry.get("kinds", []), name)
        for key, shape in entry.get("shapes", {}).items():
            if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
                raise CompressionError(
                    f"The layout gives {name}.{key} the shape {shape!r}; shapes are lists of whole numbers > 0."
                )
        for key in ("attributes", "config"):
            for attribute, value in entry.get(key, {}).items():
                if type(value) is not int or attribute.startswith("_"):
                    raise CompressionError(f"The layout sets {name}.{attribute} to {value!r}; only whole numbers can be set.")
        if [type(n) for n in entry.get("narrow", [1, 1])] != [int, int]:
            raise CompressionError(f"The layout narrows {name!r} by {entry['narrow']!r}; two widths were expected.")
        for attribute, full in entry.get("divides", {}).items():
            if [type(n) for n in full] != [int, int] or min(full) < 1 or attribute not in entry.get("attributes", {}):
                raise CompressionError(f"The layout says that {name}.{attribute} divides {full!r}; two widths were expected.")
        heads = entry.get("heads")
        if heads is not None and (
            heads.get("how") not in HOW
            or not isinstance(heads.get("arguments", []), list)
            or not all(map(_is_argument, heads.get("arguments", [])))
            or not (_is_spread if heads["how"] in ("spread", "input") else _is_chosen)(heads)
        ):
            raise CompressionError(f"The layout selects heads {heads!r} in {name!r}; a list of indices was expected.")
    return layout


def _is_spread(heads: dict[str, Any]) -> bool:
    """Whether what stays are columns of the full width, each once, in their order."""
    arguments, kept = heads.get("arguments", []), heads.get("keep")
    if len(arguments) != 1 or arguments[0][0] != heads["how"] or not isinstance(kept, str):
        return False
    columns = list(from_spans(kept))
    return bool(columns) and columns == sorted(set(columns)) and 0 <= columns[0] and columns[-1] < arguments[0][2]


def _is_chosen(heads: dict[str, Any]) -> bool:
    kept = heads.get("keep")
    return isinstance(kept, list) and all(type(head) is int and head >= 0 for head in kept)


def _is_argument(argument: Any) -> bool:
    """(name, dimension, heads) as `heads.select_heads_` takes them."""
    kinds = [type(value) for value in argument] if isinstance(argument, list) else []
    return kinds == [str, int, int] and argument[0].isidentifier() and argument[1] >= 0 and argument[2] > 0


def _is_base_of_checkpoint(model: Any, layout: Layout) -> bool:
    """Whether a model is the base of the one that was saved, and nothing but what lies outside of it (a head) was changed."""
    prefix = getattr(model, "base_model_prefix", "")
    names = getattr(getattr(model, "config", None), "architectures", None) or [""]
    saved = getattr(transformers, names[0], None)
    is_base = getattr(model, "base_model", None) is model and prefix and getattr(saved, "base_model_prefix", None) == prefix
    return bool(is_base) and not any(name.startswith(f"{prefix}.") for name in layout["modules"])


def replay_(model: nn.Module, layout: Layout, start: Start | None = None, base: nn.Module | None = None) -> None:
    """Give a model (on any device, `meta` too) the shapes and attributes of a layout. Weights are not filled.

    `start`: for a model that no checkpoint fills. Weights then keep the first rows and columns of what they hold, and of a
    module that becomes something else it gets the module and the weight (out, in) that it had. `base`: the model to take
    layers from, in the place of one without memory.

    Raises:
        CompressionError: the layout belongs to another architecture, or asks for what a cut cannot do.
    """
    layers = layout.get("layers", {})
    if layers:
        _pick_layers(model, layers, skeleton(model, layout.get("numbers", {})) if base is None else base)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    find = finder(model)
    exits, late = layout.get("exits"), False  # late: of layers that become another kind of module themselves
    if exits:
        modules = dict(model.named_modules())
        names = stack_names(exits["stack"])
        if all(name in modules for name in names):
            late = any(
                "kinds" in entry and (name in names or name.rpartition(".")[0] == exits["stack"])
                for name, entry in layout["modules"].items()
            )
            if not late:
                attach_exits_(model, exits)
        elif prefix == "." or not all(name.removeprefix(prefix) in modules for name in names):  # the base alone has no exits
            raise CompressionError(
                f"The checkpoint has exits in {names[-1]!r}, which {type(model).__name__} does not have: another model."
            )
    found = {name: find(name) for name in layout["modules"]}
    if found and not any(found.values()) and not _is_base_of_checkpoint(model, layout):
        whole = ", ".join(getattr(getattr(model, "config", None), "architectures", None) or ["the class that saved it"])
        raise CompressionError(
            f"None of the modules that this checkpoint cuts ({next(iter(found))}, ...) is in {type(model).__name__}: the "
            f"plan is for another architecture. Load it with {whole}."
        )
    # the default-device mode that from_pretrained is in costs more per tensor than the tensors; we name every device
    with torch._C.DisableTorchFunction():
        for name, entry in layout["modules"].items():
            module = found[name]
            if module is not None:
                _replay_module(name, module, entry, start)
            elif "kinds" not in entry and (name.startswith(prefix) or prefix == "."):
                raise CompressionError(
                    f"The checkpoint cuts {name!r}, which {type(model).__name__} does not have: another model."
                )  # any other is a head that this class does not carry
    if exits and late:
        attach_exits_(model, exits)
    if any("kinds" in entry for entry in layout["modules"].values()):
        follow_ties_(model)
    settle_counts_(model)


def _replay_module(name: str, module: nn.Module, entry: Mapping[str, Any], start: Start | None) -> None:
    dense = None if start is None or not entry.get("kinds") else dense_weight(module).detach()
    make_(module, entry.get("kinds", []))
    shapes = entry.get("shapes", {})
    if entry.get("lock"):
        shapes = {**shapes, "weight": [1, *shapes.get("weight", module.weight.shape)]}  # type: ignore[misc]
    if "children" in entry:
        _keep_first(name, module, entry["children"])
    for key, shape in shapes.items():
        place: Any = module._buffers if key in module._buffers else module._parameters  # statistics of batch norms
        old = place.get(key)
        full = None if old is None else ([1, *old.shape] if entry.get("lock") and key == "weight" else list(old.shape))
        if old is None or full is None or len(full) != len(shape) or any(n > m for n, m in zip(shape, full, strict=True)):
            raise CompressionError(
                f"The checkpoint gives {name}.{key} the shape {list(shape)}, but this model has "
                f"{'no such weight' if full is None else f'{full}'}: the plan is for another architecture."
            )
        if start is None:
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
        else:
            new = old.detach().view(full)[tuple(slice(n) for n in shape)].clone()
        place[key] = nn.Parameter(new, requires_grad=old.requires_grad) if place is module._parameters else new
    for key, value in entry.get("attributes", {}).items():
        if type(getattr(module, key, None)) is not int:
            raise CompressionError(f"The checkpoint sets {name}.{key}, which this model does not have: another architecture.")
        setattr(module, key, value)
    for key, full in entry.get("divides", {}).items():
        setattr(module, key, HeadCount(getattr(module, key), *full))
    if entry.get("narrow"):
        narrow_(module, *entry["narrow"])
    if entry.get("config"):
        module.config = ConfigView(module.config, **entry["config"])  # type: ignore[assignment]
    if entry.get("heads"):
        kept = entry["heads"]["keep"]
        kept = list(from_spans(kept)) if isinstance(kept, str) else kept
        select_heads_(module, entry["heads"]["how"], kept, entry["heads"].get("arguments"))
    if start is not None and dense is not None:
        start(module, dense)


def _keep_first(name: str, module: nn.Module, count: int) -> None:
    """A list of experts, all of one shape: which of them stayed is in the weights alone."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or not 0 < count <= len(experts_of(module)):
        raise CompressionError(f"The checkpoint keeps {count} modules of {name!r}, which this model does not have.")
    for child in list(experts_of(module))[count:]:
        del module._modules[child]


def finish_replayed(model: nn.Module, layout: Layout) -> None:
    """After the weights are in: give locked modules their real shape back, and put gates on."""
    locked = [name for name, entry in layout["modules"].items() if entry.get("lock")]
    if any("kinds" in entry for entry in layout["modules"].values()):
        for module in model.modules():
            if is_quantized(module) or is_sparse(module):  # what no checkpoint filled; what it held as a vector
                module.settle_()  # type: ignore[operator]
    if not locked and not layout.get("gates"):
        return
    find = finder(model)
    for name in locked:
        module = find(name)
        if isinstance(module, nn.Linear) and module.weight.ndim == 3:
            module.weight = nn.Parameter(module.weight.detach()[0], requires_grad=module.weight.requires_grad)
            lock_(module)
    for name, text in layout.get("gates", {}).items():
        module = find(name)
        if module is None:
            continue
        of, _, columns = text.rpartition(":")
        kept, consumer = from_spans(columns), _consumer(module, of)
        if consumer is not None:
            size = module._parameters[consumer[0]].shape[consumer[1]]  # type: ignore[union-attr]
        else:
            size = width(module, 1) if not of and type(module) in (*PLAIN, *PLAIN.values()) else 0
        if not kept or max(kept) >= size:
            raise CompressionError(f"The checkpoint masks inputs of {name!r} that this model does not have.")
        gate = gate_(module, consumer=consumer).zero_()
        gate[torch.tensor(kept, device=gate.device)] = 1.0


def _consumer(module: nn.Module, text: str) -> tuple[str, int] | None:
    """The parameter that reads what is masked, and its dimension, where a record names them."""
    name, _, dim = text.partition(" ")
    parameter = module._parameters.get(name)
    if parameter is None or not dim.isdecimal() or int(dim) >= parameter.ndim:
        return None
    return name, int(dim)


def gates_of(model: nn.Module) -> dict[str, str]:
    """Which inputs of which projections are not masked, for every projection that masks some: a layout's `gates`.

    Of experts, and of a model's own kind of Linear, which parameter reads them comes first: `"down_proj 2: 0-7 16"`.
    """
    found = {}
    for name, module in model.named_modules():
        if is_gated(module) and bool((module.hfc_gate == 0).any()):  # type: ignore[union-attr]
            found[name] = spans_of(tuple(module.hfc_gate.nonzero().flatten().tolist()))  # type: ignore[operator,union-attr]
            if isinstance(module, GatedParameter):
                found[name] = f"{module.hfc_consumer[0]} {module.hfc_consumer[1]}: {found[name]}"
    return found


def finder(model: nn.Module | None) -> Callable[[str], nn.Module | None]:
    """Finds modules by name, with or without the prefix of the base model: `AutoModel` loads task checkpoints, and back.

    Last, inside the one transformers model that a class of a part is around (`OwlViTTextModel` around its transformer).
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {} if model is None else dict(model.named_modules())
    within = [name for name, child in (model or nn.Module()).named_children() if isinstance(child, PreTrainedModel)]
    inner = f"{within[0]}." if len(within) == 1 else prefix

    def find(name: str) -> nn.Module | None:
        return next((modules[n] for n in (name, name.removeprefix(prefix), prefix + name, inner + name) if n in modules), None)

    return find


def _pick_layers(model: nn.Module, layers: Mapping[str, Any], base: nn.Module | None) -> None:
    """Of all layers that the base model has, take those that stayed: layers are not all alike."""
    find, find_in_base = finder(model), finder(base)
    for path, kept in layers.items():
        ours: Any = find(path)
        theirs: Any = find_in_base(path)
        lists = isinstance(ours, nn.ModuleList) and isinstance(theirs, nn.ModuleList)
        if not lists or not all(type(i) is int and 0 <= i < len(theirs) for i in kept):
            raise CompressionError(f"The checkpoint keeps layers {kept!r} of {path!r}, which this model does not have.")
        device = next((p.device for p in ours.parameters()), torch.device("meta"))
        layers_of_base = list(theirs)
        if kept and kept[0] != 0:
            carry_(layers_of_base[0], layers_of_base[kept[0]], [])
        empty = any(p.is_meta for layer in layers_of_base for p in layer.parameters())
        chosen = [layers_of_base[old] for old in kept]
        entries = {str(new): layer.to_empty(device=device) if empty else layer for new, layer in enumerate(chosen)}
        ours._modules.clear()
        ours._modules.update(entries)
        renumber_(ours, kept, [])
