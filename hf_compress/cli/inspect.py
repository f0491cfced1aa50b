"""`hf-compress inspect`: what is in a model, what can be done to it, and what was done already. No weights are loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .arguments import add_common
from .models import check_weights, config_of, find, without_weights
from .output import table

DESCRIPTION = "What is in a model, what can be done to it, and what was done already. No weights are loaded."
EXAMPLES = """\
examples:
  hf-compress inspect distilbert/distilbert-base-uncased       an id on the Hub: only its config is downloaded
  hf-compress inspect runs/minilm-sst2-small                   a folder, compressed or not
  hf-compress inspect runs/minilm-sst2-small --all             every block in a line of its own
  hf-compress inspect gpt2 --json                              for programs
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect", help="what is in a model, and what can be cut", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="a Hub id, or the folder of a saved model")
    parser.add_argument("--all", action="store_true", help="one line for every block, not one for those that are alike")
    add_common(parser)
    parser.set_defaults(run=run, path=("inspect",))


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `inspect`."""
    name = find(args.model, "MODEL")
    config = config_of(name, "MODEL")
    model = without_weights(name, config, "MODEL")
    found = facts(name, config, model)
    if found["memory"]["files"] and not found["masked"]:
        check_weights(name, "MODEL")
    return _text(found, model, args.all), found


def facts(name: str, config: Any, model: Any) -> dict[str, Any]:
    """All that `inspect` tells, as JSON-ready data.

    Args:
        name (`str`): a Hub id or folder.
        config (`PretrainedConfig`): as it was read, with its record of compression.
        model (`nn.Module`): on any device, `meta` too.
    """
    from ..about import seen
    from ..discover import discover

    structure = discover(model)
    record, other, plan = _recorded(name, config)
    parts, dtype = _parts(model, structure), _dtype(model)
    files = [p for p in Path(name).glob("*.safetensors")] if Path(name).is_dir() else []
    return {
        "model": name,
        "class": type(model).__name__,
        "task": seen(model).get("task"),
        "dtype": str(dtype).removeprefix("torch."),
        "compressed": record is not None or bool(plan),
        "tier": "plugin" if record is not None else "stock" if plan else None,
        "quantized_with": other,
        "masked": record is not None and record.masks is not None,
        "plan": plan.to_dict(spans=True) if plan else None,
        "parameters": {"total": sum(parts.values()), **parts},
        "memory": {"weights": _bytes(model) if other is None else None, "files": sum(p.stat().st_size for p in files) or None},
        "attention": [
            {"name": a.name, "heads": a.num_heads, "key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim}
            for a in structure.attentions
        ],
        "ffn": [{"name": f.name, "neurons": f.size, "gated": f.gated} for f in structure.ffns],
        "layers": {stack: len(layers) for stack, layers in structure.stacks.items()},
        "convolutions": len(structure.convs),
        "embeddings": [{"name": e.name, "rows": e.num_embeddings, "width": e.dim} for e in structure.embeddings],
        "possible": _possible(model, structure, other),
    }


def _recorded(name: str, config: Any) -> tuple[Any, str | None, Any]:
    """The record of compression, the other method that the weights are quantized with, and the plan."""
    from ..loader import METHOD, HfCompressConfig
    from ..plan import PLAN_FILE, Plan

    found = getattr(config, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    if found is not None and found.get("quant_method") == METHOD:
        record = HfCompressConfig(**found)
        return record, (record.inner or {}).get("quant_method"), record.plan
    other = None if found is None else str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
    return None, other, Plan.load(name) if (Path(name) / PLAN_FILE).is_file() else Plan()


def _parts(model: Any, structure: Any) -> dict[str, int]:
    """Parameters of each part; one that several parts share counts in the first."""
    from ..measure import numbers_of

    below: list[tuple[str, Iterable[str]]] = [
        ("embeddings", [e.name for e in structure.embeddings]),
        ("attention", [part.module for a in structure.attentions for part in a.parts]),
        ("ffn", [part.module for f in structure.ffns for part in f.parts]),
        ("convolutions", [c.name for c in structure.convs]),
    ]
    modules = dict(model.named_modules())
    seen: set[int] = set()
    counts = {}
    for part, names in [*below, ("other", modules)]:
        numbers = {id(p): n for name in names for m in modules[name].modules() for p, n in numbers_of(m) if id(p) not in seen}
        seen |= numbers.keys()
        counts[part] = sum(numbers.values())
    return counts


def _dtype(model: Any) -> Any:
    import torch

    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _bytes(model: Any) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _possible(model: Any, structure: Any, other: str | None) -> dict[str, str | None]:
    """What could be done next; None: nothing of the kind. A text that begins with "no" is a reason."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from ..kinds import SEPARABLE, not_separable
    from ..quantization import is_quantized
    from ..words import count

    if other is not None:
        return dict.fromkeys(
            ("prune", "channels", "experts", "layers", "low_rank", "depthwise", "quantize"),
            f"no: quantized with {other} already",
        )
    modules = list(model.modules())
    integers = sum(is_quantized(m) for m in modules)
    linears = [m for m in modules if isinstance(m, torch.nn.Linear | Conv1D) and not is_quantized(m)]
    rows = [m for m in modules if isinstance(m, torch.nn.Embedding) and not is_quantized(m)]
    spatial = [
        m
        for m in modules
        if isinstance(m, torch.nn.Conv1d | torch.nn.Conv2d)
        and type(m) in SEPARABLE
        and m.in_channels > 4  # a stem's, and those that cut into patches, stay
        and m.kernel_size != m.stride
        and not_separable(m, 1) is None
    ]
    heads, neurons = sum(a.num_heads for a in structure.attentions), sum(f.size for f in structure.ffns)
    cut = ", ".join(
        f"{count(number, what)} in {count(len(blocks), 'block')}"
        for number, what, blocks in ((heads, "head", structure.attentions), (neurons, "neuron", structure.ffns))
        if blocks
    )
    stacks = [f"{len(v)} layers of {k}" for k, v in structure.stacks.items() if len(v) > 1]
    shared = {id(m.weight): m.weight for m in (*linears, *rows)}.values()  # what is tied is stored once
    weights = sum(weight.numel() * weight.element_size() for weight in shared)
    saved = sum(weight.numel() for weight in shared)
    whole, frozen = _bytes(model), "no: quantized weights cannot be cut" if integers else None
    smaller = ", ".join(f"{_size(whole - weights + saved * bits // 8)} at {bits} bits" for bits in (8, 4))
    return {
        "prune": frozen or cut or None,
        "channels": (frozen or _channels(model, structure)) if structure.convs else None,
        "experts": (frozen or _experts(structure)) if structure.experts else None,
        "layers": frozen or ", ".join(stacks) or None,
        "low_rank": frozen or (count(len(linears), "Linear layer") if linears else None),
        "depthwise": frozen or (count(len(spatial), "convolution") if spatial else None),
        "quantize": f"no: {count(integers, 'module is', 'modules are')} quantized already"
        if integers
        else f"{count(len(linears), 'Linear layer')} and {count(len(rows), 'embedding')}: about {smaller}"
        if saved
        else None,
        "exits": _exits(model, structure),
    }


def _channels(model: Any, structure: Any) -> str | None:
    """As `channel_groups` sees it, which runs the model; here it has no weights, and attention may ask for numbers."""
    from ..channels import channel_groups
    from ..edits import CompressionError
    from ..words import count

    unknown = "perhaps: channel_groups(model) of the loaded model tells"
    if structure.attentions:
        return unknown
    try:
        free = [group.size - len(group.fixed) for group in channel_groups(model)]
    except CompressionError:
        return unknown
    return f"{count(sum(free), 'channel')} in {count(sum(map(bool, free)), 'set')}" if any(free) else None


def _experts(structure: Any) -> str:
    from ..words import count

    return f"{count(sum(m.num_experts for m in structure.experts), 'expert')} in {count(len(structure.experts), 'block')}"


def _exits(model: Any, structure: Any) -> str | None:
    """As `resolve_exits` sees it; a model without weights may not run, and is believed then."""
    from ..edits import CompressionError
    from ..exits.options import resolve_exits
    from ..probe import NoInputs

    depth = max((len(layers) for layers in structure.stacks.values()), default=0)
    try:
        stack = resolve_exits(model, [0])["stack"]
        depth = len(stack) if isinstance(stack, list) else len(model.get_submodule(stack))
    except NoInputs:
        if not type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
            return "no: only classifiers of texts and images have exits"
    except CompressionError as error:
        if "classification are offered" in str(error):
            return "no: only classifiers of texts and images have exits"
        return f"no: {str(error).split('; ')[-1].partition('. ')[0].rstrip('.')}"
    return "after layer 0" + (f" to {depth - 2}" if depth > 2 else "")


# --- text ------------------------------------------------------------------------------------------------------------


def _text(found: dict[str, Any], model: Any, everything: bool) -> str:
    from ..discover import discover

    total, memory = found["parameters"]["total"], found["memory"]
    sizes = [f", {_size(memory[key])} in {word}" for key, word in (("weights", "memory"), ("files", "files")) if memory[key]]
    task = f" ({found['task']})" if found["task"] else ""
    lines = [
        f"{found['model']}: {found['class']}{task}",
        f"{total:,} parameters, {found['dtype']}{''.join(sizes)}",
        _state(found),
        "",
        table(
            [("part", "parameters", "share")]
            + [(k, f"{n:,}", f"{n / total:.1%}") for k, n in found["parameters"].items() if n and k != "total"],
            right=(1, 2),
        ),
        "",
        _blocks(str(discover(model)), everything),
        "",
        table([("can be done", "with")] + [(k.replace("_", "-"), v or "no: nothing of the kind") for k, v in _rows(found)]),
    ]
    if found["plan"]:
        lines += ["", "what was done", *(f"  {sentence}" for sentence in _sentences(found))]
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    return list(found["possible"].items())


def _sentences(found: dict[str, Any]) -> list[str]:
    from ..plan import Plan
    from ..words import changes

    return changes(Plan.from_dict({k: v for k, v in found["plan"].items() if k != "tensors"}).edits)


def _state(found: dict[str, Any]) -> str:
    if found["quantized_with"]:
        return f"quantized with {found['quantized_with']}"
    if not found["compressed"]:
        return "not compressed by hf_compress"
    if found["masked"]:
        return "masked, not yet small: from the middle of a training; plugin: `import hf_compress` before from_pretrained"
    if found["tier"] == "stock":
        return "compressed; stock: plain transformers loads it"
    return "compressed; plugin: `import hf_compress` before from_pretrained"


def _size(count: int) -> str:
    from ..words import size

    return size(count, "B")


def _blocks(text: str, everything: bool) -> str:
    """discover's table; of blocks that differ in a number of their names alone, one line."""
    if everything:
        return text
    from ..checks import spans_of

    rows = [re.split(r" {2,}", line, maxsplit=2) for line in text.splitlines()]
    rows = [row + [""] * (3 - len(row)) for row in rows]
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        shape = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", row[1])
        groups.setdefault((row[0], shape, row[2]), []).append(row)
    merged = []
    for (what, shape, size), same in groups.items():
        numbers = [re.findall(r"(?<=\.)\d+(?=\.|$)", row[1]) for row in same]
        columns = list(zip(*numbers, strict=True))
        vary = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if len(same) == 1 or len(vary) != 1:
            merged += same
            continue
        filled = [column[0] for column in columns]
        filled[vary[0]] = f"[{spans_of(tuple(sorted(int(n) for n in columns[vary[0]]))).replace(' ', ',')}]"
        pieces = shape.split("#")
        name = "".join(piece + word for piece, word in zip(pieces, [*filled, ""], strict=True))
        merged.append([what, name, size])
    return table(merged)
