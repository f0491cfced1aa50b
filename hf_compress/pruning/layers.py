"""`plan_layers`: which whole layers to remove."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ..discover import Layer, discover, nearest
from ..edits import CompressionError, KeepLayers, shown
from ..grams import checked_batches, run_batches
from ..plan import Plan
from ..probe import quiet_run, tensors_in
from ..refusals import check_foreign
from ..resolve import stack_path
from .scores import LAYER_SCORES
from .select import check_seed


def plan_layers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    layers: int | float = 0.25,
    score: str = "block_influence",
    stack: str | None = None,
    seed: int = 0,
) -> Plan:
    """A plan that removes the layers which do least. The model is not changed.

    Whether a layer can go exactly is not looked at here: `apply_` proves it, and refuses those that cannot (a layer whose keys
    and values others share, say).

    Args:
        model (`nn.Module`): a transformers model.
        batches (`Iterable[dict]`, *optional*): for `"block_influence"`, as for `model(**batch)`; labels are not needed. Rows
            that an `attention_mask` hides are left out.
        layers (`int` or `float`, defaults to 0.25): how many layers to *remove* from each stack, or the fraction of them, in
            (0, 1). At least one stays.
        score (`str`, defaults to `"block_influence"`): how much a layer turns the hidden states (`1 - E[cos(h_i, h_(i+1))]`,
            ShortGPT, Men et al. 2024), `"magnitude"` (L2 norm of its weights), `"last"` (the last go first) or `"random"`;
            formulas in `hf_compress.pruning.scores`.
        stack (`str`, *optional*): one stack (`"encoder"`, `"decoder"`, or what `discover` prints); all by default, each for
            itself.
        seed (`int`, defaults to 0): of `"random"`.

    Returns:
        `Plan`: one `KeepLayers` for each stack that loses some.

    Raises:
        CompressionError: options that mean nothing, no such stack, nothing to remove, no batches for a score that needs them,
            or a layer that does not run on them or gives something of another shape than it takes.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import apply_, plan_layers
    >>> _ = torch.manual_seed(0)
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> plan = plan_layers(model, [{"input_ids": torch.arange(5, 29).view(4, 6)}], layers=0.5)
    >>> len(plan.edits[0].layers), apply_(model, plan).config.num_hidden_layers
    (2, 2)

    ```
    """
    share = isinstance(layers, float) and 0 < layers < 1
    if not share and (type(layers) is not int or layers < 1):
        raise CompressionError(
            f"layers is a number of layers to remove (1 or more) or the fraction of them, in (0, 1), got {shown(layers)}."
        )
    if not isinstance(score, str) or score not in LAYER_SCORES:
        raise CompressionError(
            f"Unknown score {shown(score)}{nearest(score, list(LAYER_SCORES))} Known: {', '.join(LAYER_SCORES)}."
        )
    if stack is not None and not isinstance(stack, str):
        raise CompressionError(f"stack is the name of a stack of layers, as discover(model) prints it, got {shown(stack)}.")
    check_seed(seed)
    if not isinstance(model, nn.Module):
        raise CompressionError(f"model must be a model (a torch.nn.Module), got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)  # torch.compile
    check_foreign(model)
    structure = discover(model)
    how = LAYER_SCORES[score]
    if how.needs in ("weight", "hidden") and any(p.is_meta for p in model.parameters()):
        raise CompressionError("The model is on the meta device and has no weights to score; load it first.")
    path = stack_path(stack, structure) if stack is not None or not structure.layers else None  # which refuses
    chosen = {name: found for name, found in structure.stacks.items() if path is None or found[0].path == path}
    sizes = {name: len(found) for name, found in chosen.items()}
    going = {name: min(round(layers * size), size - 1) if share else int(layers) for name, size in sizes.items()}
    few = [name for name, size in sizes.items() if going[name] >= size]
    if few:
        raise CompressionError(
            f"layers={layers} would leave none of the {sizes[few[0]]} in {few[0]!r}; at least one stays. Name one stack "
            f"(stack=, of {', '.join(structure.stacks)}) or a fraction."
        )
    if not any(going.values()):
        counts = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise CompressionError(f"layers={layers} of so few ({counts}) is less than one layer; give a number, such as layers=1.")
    chosen = {name: found for name, found in chosen.items() if going[name]}
    cosines: dict[str, torch.Tensor] = {}
    if how.needs == "hidden":
        if batches is None:
            raise CompressionError(f"score={score!r} is measured on data: pass batches, or use 'magnitude' or 'last'.")
        cosines = _cosines(model, chosen, checked_batches(batches))
    edits = []
    for number, (name, found) in enumerate(chosen.items()):
        if how.needs == "weight":
            values = how.reduce(torch.tensor([_squares(model.get_submodule(layer.name)) for layer in found]))
        elif how.needs == "seed":
            values = how.reduce(len(found), seed=seed * 100_003 + number)
        else:
            values = how.reduce(cosines[name] if how.needs == "hidden" else len(found))
        if not bool(torch.isfinite(values).all()):
            raise CompressionError(f"The scores of {name!r} are not finite; the weights or the batches hold NaN or infinity.")
        gone = set(values.argsort(stable=True)[: going[name]].tolist())
        kept = tuple(i for i in range(len(found)) if i not in gone)
        edits.append(KeepLayers(kept, None if len(structure.stacks) == 1 else name))
    return Plan(edits)


def _squares(layer: nn.Module) -> float:
    return sum(float(p.detach().double().square().sum()) for p in layer.parameters())


def _cosines(
    model: nn.Module, stacks: Mapping[str, tuple[Layer, ...]], batches: list[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """The mean cosine of what enters and what leaves each layer, by stack, (layers,)."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    entered: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor | None] = {}

    def enter(name: str, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor):
            entered[name] = hidden.detach().clone()  # a layer may add to it in place

    def leave(name: str, module: nn.Module, output: Any) -> None:
        before, after = entered.pop(name, None), next((t for _, t in tensors_in(output)), None)
        if before is None or after is None or before.shape != after.shape:
            raise CompressionError(
                f"{name!r} gives {_shape(after)} for {_shape(before)}, so it is no step of hidden states and cannot be left "
                "out. Name another stack (stack=), or what stays: KeepLayers."
            )
        if before.ndim > 3 and _channels_first(module, before.shape[1]):
            before, after = before.movedim(1, -1), after.movedim(1, -1)
        found = F.cosine_similarity(before.float(), after.float(), dim=-1)
        mask = masks["decoder" if "decoder" in name.split(".") else "encoder"]
        if mask is not None and mask.shape == found.shape:
            found = found[mask.to(found.device).bool()]
        sums[name] = sums.get(name, 0.0) + float(found.double().sum())
        counts[name] = counts.get(name, 0) + found.numel()

    with quiet_run(model) as run, ExitStack() as hooks:
        for layer in (layer for found in stacks.values() for layer in found):
            module = model.get_submodule(layer.name)
            before = module.register_forward_pre_hook(lambda _m, a, k, n=layer.name: enter(n, a, k), with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(lambda m, _a, o, n=layer.name: leave(n, m, o)).remove)
        for _ in run_batches(model, run, batches, masks, "score layers"):
            entered.clear()
    idle = next((layer.name for found in stacks.values() for layer in found if not counts.get(layer.name)), None)
    if idle is not None:
        raise CompressionError(
            f"{idle!r} does not run on these batches, or their attention_mask hides every row; pass batches that use it, or "
            "name another stack (stack=)."
        )
    return {name: torch.tensor([sums[x.name] / counts[x.name] for x in found]) for name, found in stacks.items()}


def _channels_first(layer: nn.Module, size: int) -> bool:
    return any(isinstance(module, _ConvNd) and module.in_channels == size for module in layer.modules())


def _shape(tensor: torch.Tensor | None) -> str:
    return "no hidden states" if tensor is None else f"shape {tuple(tensor.shape)}"
