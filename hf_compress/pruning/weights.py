"""Plans that make single weights zero: by magnitude, Wanda, SparseGPT, or at random."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm
from transformers.utils import logging

from ..discover import discover, nearest
from ..edits import CompressionError, Sparsify
from ..grams import GRAM_BYTES, checked_batches, measure_grams
from ..modules import LockedLinear, is_gated
from ..plan import Plan
from ..planners import HEADS, heads_of, in_use, loaded, name_pattern, nothing_to
from ..sparse import DENSE, MASK, SPARSE, not_sparsifiable
from ..sparsity import SCOPES, check_sparsity, choose_masks, from_matrix, matrix_of, pack_bits, read_pattern
from ..substitute import sharers, weights_in
from .calibrate import over_processes_, weights
from .sparsegpt import sparsegpt

logger = logging.get_logger(__name__)

SCORES = ("magnitude", "wanda", "sparsegpt", "random")


def plan_sparsity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    sparsity: float = 0.5,
    pattern: str | None = None,
    score: str = "magnitude",
    scope: str = "row",
    modules: str | None = None,
    seed: int = 0,
) -> Plan:
    r"""A plan that makes single weights of a model zero. Smaller files, no speed: dense kernels multiply zeros too.

    - `"magnitude"`: the smallest \|w\| go (Han et al. 2015).
    - `"wanda"`: the smallest \|w_ij\| \|x_j\|_2 go, with the norm of input j over all calibration rows (Sun et al. 2023).
    - `"sparsegpt"`: optimal brain surgeon column by column; the weights that stay make up for those that go (Frantar &
      Alistarh 2023; `pruning.sparsegpt`). Layers in order, later ones calibrated on the already sparse earlier ones: for
      every layer one pass over the batches, up to that layer.
    - `"random"`: the control for all of them.

    In a distributed run each process calibrates on its own batches, and the sums over all decide, on every rank alike.

    Args:
        model (`nn.Module`): a transformers model; looked at, not changed.
        batches (`Iterable[dict]`, *optional*): calibration batches, as for `model(**batch)`, for Wanda and SparseGPT; a few
            hundred rows are enough. Rows that an `attention_mask` hides are left out.
        sparsity (`float`, defaults to 0.5): the fraction of these modules' weights that goes, in (0, 1).
        pattern (`str`, *optional*): `"2:4"`, `"4:8"`, ...; `sparsity` is not looked at then.
        score (`str`, defaults to `"magnitude"`): as above.
        scope (`str`, defaults to `"row"`): weights compete within each output, as Wanda does; within each module (`"layer"`,
            as SparseGPT does); or all together (`"global"`, not with SparseGPT).
        modules (`str`, *optional*): a regular expression that is searched in module names. By default every Linear, Conv1D and
            convolution in the layers that `discover` finds: embeddings and heads stay dense, and depthwise convolutions.
        seed (`int`, defaults to 0): of `"random"`.

    Returns:
        `Plan`: one `Sparsify` per module, with its mask (and new weights) in the tensors where magnitude per row does not say.

    Raises:
        CompressionError: options that mean nothing, a score that needs batches without any, nothing that matches, a module
            that a pattern does not divide, batches that never reach a module, a module of which nothing would be left.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import apply_, plan_sparsity
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> batches = [{"input_ids": torch.arange(5, 29).view(4, 6)}]
    >>> plan = plan_sparsity(model, batches, pattern="2:4", score="wanda", modules="intermediate")
    >>> print(plan)
    Plan with 1 edit and 1 tensors (0.0 MB)
      Sparsify     encoder.layer.0.intermediate.dense  sparsity=0.5, pattern='2:4', given=True
    >>> apply_(model, plan).encoder.layer[0].intermediate.dense
    SparseLinear(in_features=32, out_features=64, bias=True, sparsity=0.5, pattern=2:4)

    ```
    """
    check_sparsity_options(sparsity, pattern, score, scope, SCORES)
    if score == "sparsegpt" and scope == "global":
        raise CompressionError("SparseGPT chooses module by module; use scope='row' or 'layer'.")
    if type(seed) is not int:
        raise CompressionError(f"seed must be a whole number, got {seed!r}.")
    if (batches is None) == (score in ("wanda", "sparsegpt")):
        needs = "needs calibration batches" if batches is None else "reads no batches; leave them out"
        raise CompressionError(f"score={score!r} {needs}.")
    model = loaded(model)
    found_batches = None if batches is None else checked_batches(batches)
    found = sparsifiable(model, pattern, modules, found_batches[0] if found_batches else None)
    if score == "sparsegpt":
        assert found_batches is not None
        made = _by_sparsegpt(model, found, found_batches, sparsity, pattern, scope)
        return _plan_of(found, {name: mask for name, (mask, _) in made.items()}, pattern, sparsity, scope, made)
    if score == "magnitude" and (scope == "row" or pattern is not None):
        return Plan(Sparsify(name, None if pattern else sparsity, pattern) for name in found)
    scores = dict(_scores(model, found, found_batches, score, seed))
    return _plan_of(found, choose_masks(scores, sparsity, scope, pattern), pattern, sparsity, scope)


def check_sparsity_options(sparsity: Any, pattern: Any, score: Any, scope: Any, scores: tuple[str, ...]) -> None:
    """Refuse what means nothing to any model."""
    if not isinstance(score, str) or score not in scores:
        raise CompressionError(f"Unknown score {score!r}{nearest(str(score), list(scores))} Known: {', '.join(scores)}.")
    if not isinstance(scope, str) or scope not in SCOPES:
        raise CompressionError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}.")
    check_sparsity(sparsity, pattern, scope)
    if pattern is None and not sparsity:
        raise CompressionError("sparsity=0 removes nothing; set it to a fraction above 0.")


def sparsifiable(
    model: nn.Module, pattern: str | None, modules: str | None, batch: Mapping[str, Any] | None
) -> dict[str, nn.Module]:
    """The modules that are made sparse, by name: those that match, or those in the layers that `discover` finds.

    Raises:
        CompressionError: nothing matches, or a module that was asked for cannot be made sparse, with the reason.
    """
    every = dict(model.named_modules())
    holders = weights_in(every)
    layers = tuple(f"{layer.name}." for layer in discover(model).layers)
    outside = heads_of(model)
    group = read_pattern(pattern)
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in every.items():
        if type(module) not in SPARSE and type(module) not in DENSE and type(module) is not LockedLinear:
            continue
        if modules is None:
            inside = name.startswith(layers) if layers else not (f"{name}.".startswith(outside) or re.search(HEADS, name))
            stem = not layers and isinstance(module, _ConvNd) and module.in_channels <= 4
            grouped = isinstance(module, _ConvNd) and module.groups > 1
            if not inside or stem or grouped or isinstance(module, nn.Embedding):
                continue
        elif not re.search(name_pattern(modules, "modules"), name):
            continue
        reason = None if type(module) is LockedLinear else not_sparsifiable(module)
        columns = matrix_of(module, module.weight).shape[1]  # type: ignore[arg-type]
        if is_gated(module):
            reason = "it is masked; cut it first"
        elif sharers(module, holders):
            reason = f"it shares its weight with {sharers(module, holders)[0][0]!r}"
        elif group is not None and columns % group[1]:
            reason = f"each of its outputs sums over {columns} weights, which do not divide into groups of {group[1]}"
        if reason is None:
            found[name] = module
        else:
            reasons[name] = reason
    if reasons and (modules is not None or not found):
        name, reason = next(iter(reasons.items()))
        raise CompressionError(f"{name!r} (of {len(reasons)}) cannot be made sparse: {reason}. Leave it out of modules=.")
    if not found:
        raise CompressionError(nothing_to(model, modules, "Linear, Conv1D or convolution that could be made sparse"))
    if reasons:
        name, reason = next(iter(reasons.items()))
        logger.warning(f"Left dense: {', '.join([*reasons][:6])}{', ...' * (len(reasons) > 6)} ({name}: {reason}).")
    return in_use(model, found, batch, "made sparse")


# --- scores ------------------------------------------------------------------------------------------------------


def _scores(
    model: nn.Module, found: Mapping[str, nn.Module], batches: Any, score: str, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """By module, a score for every weight, as `sparsity.matrix_of` turns it."""
    norms = _sums(model, found, batches, squares=True) if score == "wanda" else {}
    generator = torch.Generator().manual_seed(seed)
    for name, module in found.items():
        rows = matrix_of(module, module.weight.detach())  # type: ignore[union-attr,operator]
        if score == "random":
            yield name, torch.rand(rows.shape, generator=generator).to(rows.device)
        elif score == "wanda":
            yield name, wanda(rows, norms[name])
        else:
            yield name, rows.abs()


def wanda(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    r"""\|w_ij\| \|x_j\|_2 (Sun et al. 2023, arXiv:2306.11695): how much an output can lose with one weight.

    Args:
        weight (`torch.Tensor`): (out, in).
        squares (`torch.Tensor`): sum of `x_j^2` over calibration rows, (in,).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.weights import wanda
    >>> wanda(torch.tensor([[-3.0, 1.0]]), torch.tensor([1.0, 16.0]))
    tensor([[3., 4.]])

    ```
    """
    return weight.float().abs() * squares.float().sqrt()


def _sums(
    model: nn.Module, found: Mapping[str, Any], batches: list[Mapping[str, Any]], squares: bool
) -> dict[str, torch.Tensor]:
    """What each module reads, summed over the batches of all processes."""
    for name, module in found.items():
        what = "looks rows up" if isinstance(module, nn.Embedding) else "works in groups" if _groups(module) > 1 else None
        if what is not None:
            raise CompressionError(f"{name!r} {what}, so its inputs do not score its weights; use score='magnitude'.")
    sums = measure_grams(model, found, batches, squares, stop=not squares)  # a layer of many; the rest need not run
    for name, module in found.items():
        size = matrix_of(module, module.weight).shape[1]
        shape = (size,) if squares else (size, size)
        total = sums.get(name)
        total = torch.zeros(shape, device=module.weight.device) if total is None else total.clone()
        over_processes_(total)
        if not bool(total.any()) or not bool(total.isfinite().all()):
            what = "never reach it, or with zeros alone" if not bool(total.any()) else "give it inputs that are not finite"
            raise CompressionError(f"{name!r} cannot be scored: these batches {what}. Give others, or choose modules=...")
        sums[name] = total
    return sums


def _groups(module: Any) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


def _by_sparsegpt(
    model: nn.Module, found: Mapping[str, Any], batches: Any, sparsity: float, pattern: str | None, scope: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By module, its mask and its new weight, both as `matrix_of` turns them; layers in order."""
    layers = [f"{layer.name}." for layer in discover(model).layers]
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    new: dict[str, tuple[torch.Tensor, None]] = {}
    for names in tqdm(_in_order(found, layers), desc="sparsegpt", unit="layer", leave=False, disable=None, delay=3):
        with weights(model, new):
            grams = _sums(model, {name: found[name] for name in names}, batches, squares=False)
        for name in names:
            rows = matrix_of(found[name], found[name].weight.detach())
            made_here, mask = sparsegpt(rows, grams[name], sparsity, pattern, scope)
            made[name] = mask, made_here
            shaped = from_matrix(found[name], made_here, found[name].weight.shape)
            # `weights` takes (out, in), and turns it as the module has it
            new[name] = (made_here if shaped.ndim == 2 else shaped), None
    return made


def _in_order(found: Mapping[str, Any], layers: list[str]) -> list[list[str]]:
    """Modules layer by layer, as many of one at a time as fit into `GRAM_BYTES`."""
    chunks: list[list[str]] = []
    before, size = None, 0
    for name, module in found.items():
        layer = next((prefix for prefix in layers if name.startswith(prefix)), name)
        own = 4 * matrix_of(module, module.weight).shape[1] ** 2
        if layer != before or size + own > GRAM_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(name)
        before, size = layer, size + own
    return chunks


# --- the plan ----------------------------------------------------------------------------------------------------


def _plan_of(
    found: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor],
    pattern: str | None,
    sparsity: float,
    scope: str,
    made: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Plan:
    edits, tensors = [], {}
    shaped: Callable[[str, torch.Tensor], torch.Tensor] = lambda n, t: from_matrix(found[n], t, found[n].weight.shape)  # noqa: E731
    for name, mask in masks.items():
        edit, bits = edit_of(name, shaped(name, mask), pattern, sparsity if scope == "row" else None)
        if edit is None:
            continue
        edits.append(edit)
        tensors[f"{name}.{MASK}"] = bits
        if made is not None:
            tensors[f"{name}.weight"] = shaped(name, made[name][1])[shaped(name, mask)].cpu()
    return Plan(edits, tensors)


def edit_of(
    name: str, mask: torch.Tensor, pattern: str | None, sparsity: float | None = None
) -> tuple[Sparsify | None, torch.Tensor]:
    """The edit that holds a mask, and its bits for the plan's tensors; no edit where nothing goes.

    Raises:
        CompressionError: the mask keeps nothing.
    """
    kept = int(mask.sum())
    if not kept:
        raise CompressionError(
            f"Nothing would be left of {name!r}. Ask for a lower sparsity, compare weights within each output or module "
            "(scope='row' or 'layer'), or leave it out with modules=..."
        )
    if kept == mask.numel():
        return None, pack_bits(mask).cpu()
    share = None if pattern else round(1 - kept / mask.numel(), 4) if sparsity is None else sparsity
    return Sparsify(name, share or (None if pattern else 1e-4), pattern, given=True), pack_bits(mask.contiguous()).cpu()
