"""Plans that change what modules are: low-rank, depthwise separable, quantized. The model is looked at, never changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .discover import discover
from .edits import CompressionError, DepthwiseSeparable, LowRank, Quantize
from .fits import best_rank
from .grams import checked_batches, grams_of
from .kinds import SEPARABLE, largest_rank, not_separable
from .modules import LockedLinear, LowRankLinear, dense_weight, is_gated, width
from .plan import Plan
from .probe import NoInputs, probing, use_of_weights
from .quantization import is_quantized
from .refusals import check_foreign
from .sparse import DENSE, is_sparse
from .substitute import sharers, weights_in

logger = logging.get_logger(__name__)

# what stays in full precision unless asked for: the heads that make a model's outputs. That is everything outside the base
# model, its output embeddings, and, for models that are their own base model (T5), these names
HEADS = (
    r"(^|\.)(classifier|classification_head|pre_classifier|score|lm_head|embed_out|qa_outputs|cls|head|heads|\w+_head|\w+_projector"
    r"|exit_heads)(\.|$)"
)


def plan_low_rank(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    modules: str | None = None,
) -> Plan:
    r"""A plan that replaces Linear layers by two thinner ones.

    Without batches, by the truncated SVD of each weight, made when the plan is applied. With batches, by the factors
    that lose least of the layer's *outputs* on them: W is whitened by the Gram matrix of the layer's inputs before the
    SVD (SVD-LLM, Wang et al. 2024; formula in `fits.best_rank`); those factors travel in the plan's tensors. Both heal in
    any Trainer.

    Args:
        model (`nn.Module`): a transformers model.
        batches (`Iterable[dict]`, *optional*): calibration batches, as for `model(**batch)`; a few hundred rows are
            enough. Rows that an `attention_mask` hides are left out.
        ratio (`float`, *optional*): the fraction of each module's weights that *stays*, in (0, 1):
            rank = ratio * in * out / (in + out), at least 1.
        rank (`int`, *optional*): the same rank for all modules. Exactly one of `ratio` and `rank`.
        modules (`str`, *optional*): a regular expression that is searched in module names. By default every Linear (and
            Conv1D) in the layers that `discover` finds: no heads, no poolers.

    Returns:
        `Plan`: one `LowRank` per module, with its factors if batches were given.

    Raises:
        CompressionError: not exactly one of `ratio` and `rank`, a rank at which the factors would be larger than the weight,
            nothing that matches, batches that never reach a module.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import apply_, plan_low_rank
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> plan = plan_low_rank(model, [{"input_ids": torch.arange(5, 29).view(4, 6)}], ratio=0.5, modules="intermediate")
    >>> print(plan)
    Plan with 1 edit and 2 tensors (0.0 MB)
      LowRank      encoder.layer.0.intermediate.dense  rank=10, given=True
    >>> apply_(model, plan).encoder.layer[0].intermediate.dense
    LowRankLinear(in_features=32, out_features=64, bias=True, rank=10)

    ```
    """
    if (ratio is None) == (rank is None):
        raise CompressionError(f"Give exactly one of ratio and rank, got ratio={ratio!r} and rank={rank!r}.")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1):
        raise CompressionError(f"ratio is the fraction of a module's weights that stays, in (0, 1), got {ratio!r}.")
    model = loaded(model)
    layers = tuple(f"{layer.name}." for layer in discover(model).layers)
    modules_in = dict(model.named_modules())
    holders = weights_in(modules_in)
    found = {
        name: module
        for name, module in modules_in.items()
        if type(module) in (nn.Linear, Conv1D, LockedLinear)
        and (
            re.search(name_pattern(modules, "modules"), name) if modules is not None else name.startswith(layers) or not layers
        )
    }
    tied = {name: others[0][0] for name, module in found.items() if (others := sharers(module, holders))}
    found = {name: module for name, module in found.items() if name not in tied}
    if tied:
        name = min(tied)
        told = f"{name!r} (of {len(tied)}) shares its weight with {tied[name]!r}, which would not follow"
        if not found:
            raise CompressionError(f"Nothing can be made low-rank: {told}. Untie them first, or choose others with modules=.")
        logger.warning(f"Left as they are: {told}.")
    if not found:
        raise CompressionError(nothing_to(model, modules, "Linear or Conv1D that could be made low-rank"))
    if batches is not None:
        batches = checked_batches(batches)
    found = in_use(model, found, batches[0] if batches else None, "made low-rank")
    edits = []
    for name, module in found.items():
        out, inner = width(module, 0), width(module, 1)
        chosen: Any = rank if ratio is None else max(1, int(ratio * out * inner / (out + inner)))
        most = largest_rank(out, inner)
        if ratio is not None and (most < 1 or chosen > most):  # a gate of one output: nothing to gain
            continue
        if type(chosen) is int and chosen > most:
            raise CompressionError(
                f"rank={chosen} is too high for {name!r} ({out} x {inner}): above {most} the factors are larger than the "
                "weight. Lower it, or choose the modules with modules=..."
            )
        edits.append(LowRank(name, chosen, given=batches is not None))  # type: ignore[arg-type]
    if batches is None:
        return Plan(edits)
    tensors: dict[str, torch.Tensor] = {}
    grams = grams_of(model, found, edits, batches)
    for edit, gram in tqdm(grams, desc="factorise", total=len(edits), leave=False, disable=None, delay=3):
        outer, inner = best_rank(dense_weight(found[edit.module]).detach(), edit.rank, gram)
        tensors[f"{edit.module}.weight"], tensors[f"{edit.module}.weight_in"] = outer.cpu(), inner.cpu()
    reached = [edit for edit in edits if f"{edit.module}.weight" in tensors]
    if not reached:
        raise CompressionError(f"No batch reaches {edits[0].module!r} (of {len(edits)}); give batches that use them.")
    if len(reached) < len(edits):
        logger.warning(f"Left as they are, since no batch reaches them: {len(edits) - len(reached)} of {len(edits)} modules.")
    return Plan(reached, tensors)


def plan_depthwise(model: nn.Module, *, modules: str | None = None, multiplier: int = 1) -> Plan:
    """A plan that replaces convolutions by depthwise separable ones, started from their weights.

    Args:
        model (`nn.Module`): a transformers model with convolutions (`Conv1d`, `Conv2d`) whose kernel is over one position.
        modules (`str`, *optional*): a regular expression that is searched in module names. By default every convolution
            that gets smaller, but no stem: none that reads four channels or fewer, or that cuts the input into patches.
        multiplier (`int`, defaults to 1): kernels per input channel; each more fits better and costs more.

    Returns:
        `Plan`: one `DepthwiseSeparable` per convolution.

    Raises:
        CompressionError: nothing can be replaced, with the reason.

    Example:

    ```python
    >>> from transformers import ResNetConfig, ResNetModel
    >>> from hf_compress import plan_depthwise
    >>> config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    >>> print(plan_depthwise(ResNetModel(config), modules="stages.0"))
    Plan with 2 edits
      DepthwiseSeparable encoder.stages.0.layers.0.layer.0.convolution  multiplier=1
      DepthwiseSeparable encoder.stages.0.layers.0.layer.1.convolution  multiplier=1

    ```
    """
    model = loaded(model)
    reasons: dict[str, str] = {}
    edits = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv1d | nn.Conv2d):
            continue
        if modules is None:
            stem = module.in_channels <= 4 or tuple(module.kernel_size) == tuple(module.stride)
            if stem or type(module) not in SEPARABLE:
                continue
        elif not re.search(name_pattern(modules, "modules"), name):
            continue
        edit = DepthwiseSeparable(name, multiplier)
        reason = not_separable(module, multiplier)
        if reason is None:
            edits.append(edit)
        else:
            reasons[name] = reason
    if not edits and reasons:
        name, reason = next(iter(reasons.items()))
        raise CompressionError(f"None of {len(reasons)} convolutions can be made depthwise separable; {name!r}: {reason}.")
    if not edits:
        raise CompressionError(nothing_to(model, modules, "convolution that could be made depthwise separable"))
    return Plan(edits)


def plan_quantization(
    model: nn.Module,
    *,
    bits: int,
    embeddings: bool = True,
    skip: str | None = HEADS,
    modules: str | None = None,
    group_size: int | None = None,
    activations: str | None = None,
    decode: str = "load",
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan that stores every Linear, Conv1D and (by default) Embedding of a model in few bits. See `Quantize`.

    One forward pass finds the modules that run: a weight that something else than its own module reads (CLIP asks its
    position embeddings for their number) stays as it is. An output head that is tied to the embedding stays tied: both
    hold the same integers.

    Args:
        model (`nn.Module`): a transformers model.
        bits (`int`): 8 (integer arithmetic for Linear layers), or 4, 3, 2 (weights alone, in groups).
        embeddings (`bool`, defaults to `True`): embeddings too; they are half of a small encoder.
        skip (`str`, *optional*): a regular expression that is searched in module names: what stays in full precision. By
            default the output heads, where rounding costs most: what lies outside the base model, the output embeddings,
            and the names in `planners.HEADS`. `None` skips nothing.
        modules (`str`, *optional*): a regular expression that is searched in module names: only these, less those in `skip`
            and, with `embeddings=False`, embeddings.
        group_size (`int`, *optional*): weights that share a scale below 8 bits; 64 if left out.
        activations (`str`, *optional*): with 8 bits `"token"` (if left out), `"tensor"` or `"none"`.
        decode (`str`, defaults to `"load"`): below 8 bits, unpack the weights once (`"load"`) or at every use (`"call"`).
        inputs (`dict`, *optional*): a small batch for that pass, where none can be made from the config.

    Returns:
        `Plan`: one `Quantize` per module.

    Raises:
        CompressionError: options that mean nothing, a model that is quantized already, nothing that matches, or nothing of it
            that can be quantized (with the reason).

    Example:

    ```python
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_compress import plan_quantization
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> plan = plan_quantization(model, bits=8)
    >>> len(plan), plan.edits[0]  # doctest: +ELLIPSIS
    (10, Quantize(module='bert.embeddings.word_embeddings', bits=8, ...))

    ```
    """
    check_choice(embeddings, skip, modules, inputs)
    Quantize("any", bits, group_size, activations, decode)  # refuses now what each edit would
    model = loaded(model)
    _refuse_quantized(model)
    kinds = (nn.Linear, Conv1D, LockedLinear, LowRankLinear, *((nn.Embedding,) if embeddings else ()))
    candidates: dict[str, Any] = {name: m for name, m in model.named_modules() if DENSE.get(type(m), type(m)) in kinds}
    if modules is not None:
        candidates = {name: module for name, module in candidates.items() if re.search(modules, name)}
    what = "Linear or Embedding" if embeddings else "Linear"
    if not candidates:
        raise CompressionError(nothing_to(model, modules, what))
    with probing(model, inputs) as run:
        ran, read = use_of_weights(candidates, run)
    used = {id(module.weight) for name, module in candidates.items() if name in ran}
    held = {id(module.weight) for name, module in candidates.items() if name in read}
    heads = heads_of(model) if skip == HEADS else ()
    edits, seen = [], set()
    reasons: dict[str, str] = {}  # why a candidate stays as it is
    holders = weights_in(dict(model.named_modules()))
    for name, module in candidates.items():
        tied = sharers(module, holders)
        if (skip is not None and re.search(skip, name)) or f"{name}.".startswith(heads):
            reasons[name] = (
                "output heads are left in full precision; pass skip=None"
                if skip == HEADS
                else f"it is not outside skip={skip!r}; leave skip= out, or pass None"
            )
        elif id(module.weight) in held:
            reasons[name] = "something else than its own forward reads its weight"
        elif id(module.weight) not in used:
            reasons[name] = "it does not run on the inputs that were made for it; pass inputs="
        elif is_gated(module):
            reasons[name] = "it is masked; cut it first"
        elif is_sparse(module) and bits < 8:
            reasons[name] = f"it is sparse, and grids of {bits} bits have no point at exactly zero (8 bits have)"
        elif not {type(m) for _, m in tied} <= {nn.Linear, nn.Embedding}:
            reasons[name] = f"it shares its weight with {tied[0][0]!r}, which cannot be quantized"
        elif not embeddings and any(isinstance(other, nn.Embedding) for _, other in tied):
            reasons[name] = "it shares its weight with an embedding, and embeddings=False"
        elif id(module.weight) not in seen:
            seen.add(id(module.weight))
            edits.append(Quantize(name, bits, group_size, activations, decode))
    if not edits:
        name, reason = next(iter(reasons.items()))
        where = "" if modules is None else f" whose name matches {modules!r}"
        raise CompressionError(
            f"{type(model).__name__} has no {what}{where} that can be quantized. {name!r} (of {len(reasons)}) stays: {reason}."
        )
    _tell_what_stays(model, seen)
    return Plan(edits)


def check_choice(embeddings: Any, skip: Any, modules: Any, inputs: Any) -> None:
    """Refuse what no choice of modules to quantize is."""
    if not isinstance(embeddings, bool):
        raise CompressionError(f"embeddings must be True or False, got {embeddings!r}.")
    for text, where in ((skip, "skip"), (modules, "modules")):
        if text is not None:
            name_pattern(text, where)
    if inputs is not None and (not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs)):
        raise CompressionError(f"inputs must be a batch as for model(**inputs), got {type(inputs).__name__}.")


# --- shared ------------------------------------------------------------------------------------------------------


def loaded(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CompressionError(f"Expected a model, got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)  # torch.compile
    if any(p.is_meta for p in model.parameters()):
        raise CompressionError("The model is on the meta device and has no weights; load it first.")
    check_foreign(model)
    return model


def name_pattern(text: Any, where: str) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise CompressionError(f"{where} must be a regular expression on module names, as text, got {text!r}.")
    try:
        return re.compile(text)
    except re.error as error:
        raise CompressionError(f"{where} must be a regular expression on module names, got {text!r} ({error}).") from error


def nothing_to(model: nn.Module, modules: str | None, what: str) -> str:
    where = "" if modules is None else f" whose name matches {modules!r}"
    return f"{type(model).__name__} has no {what}{where}; names are those of model.named_modules()."


def heads_of(model: Any) -> tuple[str, ...]:
    """Prefixes of what lies outside the base model, and of the output embeddings."""
    base = getattr(model, "base_model", model)
    outside = [] if base is model else [f"{n}." for n, m in model.named_children() if m is not base]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [n for n, m in model.named_modules() if output is not None and m is output]
    return tuple(f"{name}." for name in names) + tuple(outside)


def _tell_what_stays(model: nn.Module, planned: set[int]) -> None:
    """Say which weights keep their precision, and how many of all they are."""
    left: dict[str, int] = {}
    total = 0
    for name, module in model.named_modules():
        for weight in {id(p): p for p in module._parameters.values() if p is not None and p.ndim > 1}.values():
            total += weight.numel()
            own: Any = getattr(module, "weight", None)  # of two factors, the plan names the module once
            if id(weight) not in planned and id(own) not in planned:
                left[name] = left.get(name, 0) + weight.numel()
    if left and total:
        most = sorted(left, key=lambda name: -left[name])
        more = f" and {len(most) - 6} more" * (len(most) > 6)
        share = sum(left.values()) / total
        logger.warning(f"Left in full precision, {share:.1%} of the weights: {', '.join(most[:6])}{more}.")


def in_use(model: nn.Module, found: dict[str, nn.Module], batch: Mapping[str, Any] | None, what: str) -> dict[str, nn.Module]:
    """Without those that do not run, or whose weight something else reads, as far as these (or made) inputs can tell."""
    try:
        with probing(model, batch) as run:
            ran, read = use_of_weights(found, run)
    except NoInputs:
        return found  # `apply_` will be given inputs, and tells
    free = {name: module for name, module in found.items() if name not in read}
    if not free:
        raise CompressionError(
            f"Something else than its own forward reads the weight of {next(iter(found))!r} (of {len(found)} that match), so "
            f"it cannot be {what}. Choose others with modules=..."
        )
    kept = {name: module for name, module in free.items() if name in ran}
    if not kept:
        return free  # nor do made inputs reach any: `apply_` is given some, or tells
    if len(kept) < len(found):
        left = [name for name in found if name not in kept]
        logger.warning(f"Left as they are, since they do not run or something else reads their weight: {', '.join(left[:6])}.")
    return kept


def _refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_quantized(module):
            raise CompressionError(
                f"{name!r} is quantized already; quantizing twice loses more than once. Start from the float model."
            )
