"""A plan read against a model: every name found, every index in range, all in the coordinates of the model as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .cutting import Cut
from .discover import Attention, Structure, discover, nearest
from .edits import CompressionError, KeepExperts, KeepHeads, KeepLayers, KeepNeurons
from .mixtures import Mixture
from .plan import Plan


@dataclass
class Resolved:
    """What stays of the model as it is now: heads and neurons by block name, layers by the path of their stack."""

    structure: Structure
    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    gates: dict[str, torch.Tensor] = field(default_factory=dict)  # of channels (`channels.Removal.gates`), by module
    experts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    given: dict[str, KeepHeads | KeepNeurons] = field(default_factory=dict)  # cuts that bring weights along

    @property
    def mixtures(self) -> list[tuple[Mixture, tuple[int, ...]]]:
        """Every mixture that loses experts and whose layer stays, with those that it keeps."""
        if not self.experts:
            return []
        found = [(mixture, self.experts[mixture.name]) for mixture in self.structure.experts if mixture.name in self.experts]
        return [(m, kept) for m, kept in found if len(kept) < m.num_experts and not self.is_gone(m.name)]

    @property
    def cuts(self) -> list[Cut]:
        """One cut per block that loses something and whose layer stays."""
        cuts: list[Cut] = []
        if not self.heads and not self.neurons:
            return cuts
        for attention in self.structure.attentions:
            kept = self.heads.get(attention.name)
            if kept is not None and len(kept) < attention.num_heads and not self.is_gone(attention.name):
                cuts.append(Cut(attention, kept, kept_groups(attention, kept)))
        for ffn in self.structure.ffns:
            kept = self.neurons.get(ffn.name)
            if kept is not None and len(kept) < ffn.size and not self.is_gone(ffn.name):
                cuts += [Cut(same, kept) for same in (ffn, *ffn.twins)]
        return cuts

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The layers that stay, of every stack that loses some."""
        sizes = {path: len([x for x in self.structure.layers if x.path == path]) for path in self.layers}
        return {path: kept for path, kept in self.layers.items() if len(kept) < sizes[path]}

    def is_gone(self, name: str) -> bool:
        return any(
            name.startswith(f"{path}.") and int(name[len(path) + 1 :].split(".")[0]) not in kept
            for path, kept in self.layers.items()
        )

    def original(self, name: str) -> str | None:
        """The name that a block had before layers were removed; None where its index is out of range now."""
        for path, kept in self.layers.items():
            if name.startswith(f"{path}."):
                index, _, rest = name[len(path) + 1 :].partition(".")
                if not index.isdigit() or int(index) >= len(kept):
                    return None
                return f"{path}.{kept[int(index)]}" + (f".{rest}" if rest else "")
        return name


def resolve(model: nn.Module, plan: Plan) -> Resolved:
    """Read a plan against a model, or refuse it; the model is not changed.

    Raises:
        CompressionError: a name that `discover` does not give, an index out of range, unequal query heads in the kept
            groups, a stack left out where there are several.
    """
    if not isinstance(plan, Plan):
        raise CompressionError(f"Expected a Plan, got {type(plan).__name__}. Plan([KeepHeads(...), ...]) makes one.")
    result = Resolved(discover(model))
    attentions = {a.name: a for a in result.structure.attentions}
    ffns = {f.name: f for f in result.structure.ffns}
    for edit in plan.edits:
        if isinstance(edit, KeepHeads):
            attention = attentions[_find(edit.attention, list(attentions), "attention", model, result)]
            now = result.heads.get(attention.name, tuple(range(attention.num_heads)))
            _in_range(edit.heads, len(now), f"KeepHeads({edit.attention!r})", "heads")
            kept = tuple(now[i] for i in edit.heads)
            kept_groups(attention, kept)
            result.heads[attention.name] = kept
            _note_given(result, attention.name, edit)
        elif isinstance(edit, KeepNeurons):
            ffn = ffns[_find(edit.ffn, list(ffns), "feed-forward block", model, result)]
            now = result.neurons.get(ffn.name, tuple(range(ffn.size)))
            _in_range(edit.neurons, len(now), f"KeepNeurons({edit.ffn!r})", "neurons")
            result.neurons[ffn.name] = tuple(now[i] for i in edit.neurons)
            _note_given(result, ffn.name, edit)
        elif isinstance(edit, KeepExperts):
            mixtures = {m.name: m for m in result.structure.experts}
            mixture = mixtures[_find(edit.moe, list(mixtures), "mixture of experts", model, result)]
            now = result.experts.get(mixture.name, tuple(range(mixture.num_experts)))
            _in_range(edit.experts, len(now), f"KeepExperts({edit.moe!r})", "experts")
            kept = tuple(now[i] for i in edit.experts)
            mixture.check(kept)
            result.experts[mixture.name] = kept
        elif isinstance(edit, KeepLayers):
            path = stack_path(edit.stack, result.structure)
            now = result.layers.get(path, tuple(range(sum(x.path == path for x in result.structure.layers))))
            _in_range(edit.layers, len(now), f"KeepLayers(stack={edit.stack!r})", "layers")
            result.layers[path] = tuple(now[i] for i in edit.layers)
        else:
            raise CompressionError(
                f"{type(edit).__name__} cannot be masked: a mask shows what heads, neurons and layers do. Try it on a copy of "
                "the model: apply_(copy.deepcopy(model), plan)."
            )
    return result


def _note_given(result: Resolved, name: str, edit: KeepHeads | KeepNeurons) -> None:
    if name in result.given:
        raise CompressionError(
            f"{type(edit).__name__}({name!r}) comes twice, and the first was planned with weights for the units that stay "
            "after it. Make one plan for both (plan again on the model that the first one left)."
        )
    if edit.given:
        result.given[name] = edit


def kept_groups(attention: Attention, kept: tuple[int, ...]) -> tuple[int, ...]:
    """The kv heads that stay with these query heads; every one must keep equally many of its query heads."""
    counts: dict[int, int] = {}
    for head in kept:
        counts[head // attention.groups] = counts.get(head // attention.groups, 0) + 1
    if len(set(counts.values())) > 1:
        per_group = ", ".join(f"group {g}: {n}" for g, n in sorted(counts.items()))
        raise CompressionError(
            f"KeepHeads({attention.name!r}) keeps unequal numbers of query heads in its kv groups ({per_group}). Keep whole "
            f"groups of {attention.groups} (heads 0-{attention.groups - 1}, ...), or equally many in every group that stays."
        )
    return tuple(sorted(counts))


def _in_range(indices: tuple[int, ...], size: int, where: str, what: str) -> None:
    if indices[-1] >= size:
        raise CompressionError(f"{where} names {indices[-1]}, but there are {size} {what} at that point (0-{size - 1}).")


def _find(name: str, known: list[str], what: str, model: nn.Module, result: Resolved) -> str:
    """A block by its name, with or without the prefix of the base model, as the layers before it left it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    options = [name, name.removeprefix(prefix), prefix + name] if prefix != "." else [name]
    for option in options:
        original = result.original(option)
        if original in known:
            return original
    if any(result.original(option) is None for option in options):
        raise CompressionError(f"{name!r} is not there any more: an earlier KeepLayers of this plan left fewer layers.")
    if not known:
        raise CompressionError(
            f"{type(model).__name__} has no {what} that can be cut, so {name!r} cannot be; see discover(model)."
        )
    raise CompressionError(
        f"{type(model).__name__} has no {what} named {name!r}{nearest(name, known)} See discover(model) for all {len(known)}."
    )


def stack_path(name: str | None, structure: Structure) -> str:
    stacks = {short: layers[0].path for short, layers in structure.stacks.items()}
    if not stacks:
        raise CompressionError("This model has no stack of layers that KeepLayers could cut; see discover(model).")
    if name is None:
        if len(stacks) > 1:
            raise CompressionError(f"This model has several stacks; name one: KeepLayers(..., stack=...), of {sorted(stacks)}.")
        return next(iter(stacks.values()))
    if name in stacks:
        return stacks[name]
    matches = [p for p in stacks.values() if p == name or f".{name}." in f".{p}."]
    if len(matches) == 1:
        return matches[0]
    raise CompressionError(f"No stack is named {name!r}{nearest(name, list(stacks))} This model has {sorted(stacks)}.")
