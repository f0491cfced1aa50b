"""What enters Linear layers and convolutions over calibration batches: Gram matrices X^T X, or the sums of squares alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm

from .checks import shown
from .edits import CompressionError, LowRank
from .modules import width
from .probe import quiet_run

GRAM_BYTES = 2 << 30  # Gram matrices that are held at a time; more modules take more passes over the batches


def grams_of(
    model: nn.Module, found: Mapping[str, nn.Module], edits: list[LowRank], batches: list[Mapping[str, Any]]
) -> Iterator[tuple[LowRank, torch.Tensor]]:
    """The Gram matrix X^T X of the inputs of each module, as many at a time as fit into `GRAM_BYTES`."""
    pending = list(edits)
    while pending:
        chunk, size = [], 0
        while pending and (not chunk or size + 4 * width(found[pending[0].module], 1) ** 2 <= GRAM_BYTES):
            size += 4 * width(found[pending[0].module], 1) ** 2
            chunk.append(pending.pop(0))
        grams = measure_grams(model, {edit.module: found[edit.module] for edit in chunk}, batches)
        for edit in chunk:
            if edit.module not in grams:
                continue
            if not bool(grams[edit.module].any()):
                raise CompressionError(
                    f"The inputs of {edit.module!r} are all zero on these batches, or their attention_mask hides every row."
                )
            if not bool(torch.isfinite(grams[edit.module]).all()):
                raise CompressionError(f"The inputs of {edit.module!r} are not finite on these batches.")
            yield edit, grams[edit.module]


def checked_batches(batches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Batches as a list, or a refusal."""
    if isinstance(batches, str | Mapping | torch.Tensor) or not isinstance(batches, Iterable):
        raise CompressionError(f"batches must be a sequence of dicts, as for model(**batch), got {type(batches).__name__}.")
    found = list(batches)
    for batch in found:
        if not isinstance(batch, Mapping):
            raise CompressionError(f"A batch must be a dict, as for model(**batch), got {type(batch).__name__}.")
        _check_names(batch, "a batch")
    if not found:
        raise CompressionError("batches is empty; a few hundred rows are enough.")
    return found


def check_inputs(inputs: Mapping[str, Any] | None) -> None:
    """Refuse what is no batch, as for `model(**inputs)`; there may be none."""
    if inputs is None:
        return
    if not isinstance(inputs, Mapping):
        raise CompressionError(f"inputs must be a batch as for model(**inputs), got {type(inputs).__name__}.")
    _check_names(inputs, "inputs")


def _check_names(batch: Mapping[str, Any], what: str) -> None:
    """Refuse a batch that holds nothing, or something under what is no argument's name."""
    wrong = next((key for key in batch if not isinstance(key, str)), None)
    if wrong is not None or not batch:
        got = "nothing" if wrong is None else f"the key {shown(wrong)}"
        raise CompressionError(f"The keys of {what} are names of the model's arguments ('input_ids': ...), got {got}.")


def measure_grams(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: list[Mapping[str, Any]],
    squares: bool = False,
    stop: bool = False,
) -> dict[str, torch.Tensor]:
    """By module, X^T X of what it reads (a convolution: of its patches, in the order of `sparsity.matrix_of`).

    Rows that an `attention_mask` hides are left out. With `squares`, the diagonal alone, which takes no memory to speak of.
    Modules that no batch reaches are left out. `stop`: where each ran once in the first batch, run later ones only until all
    have.
    """
    grams: dict[str, torch.Tensor] = {}
    leader: dict[str, str] = {}  # query, key and value read one tensor: it is multiplied once
    last: list[Any] = [None, ""]
    masks: dict[str, torch.Tensor | None] = {}
    calls: list[str] = []  # of this batch
    enough = False

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            x = args[0]
            calls.append(name)
            own = isinstance(module, _ConvNd)
            owner = leader.setdefault(name, last[1] if x is last[0] and not own else name)
            last[:] = [None, ""] if own else [x, owner]
            if owner == name:
                add(name, module, x)
            if enough and len(calls) == len(modules):
                raise _Reached

        return before

    def add(name: str, module: nn.Module, x: torch.Tensor) -> None:
        mask = masks["decoder" if "decoder" in name.split(".") else "encoder"]
        rows = patches(module, x) if isinstance(module, _ConvNd) else real_rows(x, mask).float()
        if squares:
            grams[name] = grams.get(name, 0.0) + rows.square().sum(0)
        elif name in grams:
            grams[name].addmm_(rows.T, rows)
        else:
            grams[name] = rows.T @ rows

    with quiet_run(model) as run, ExitStack() as stack:

        def part(batch: Mapping[str, Any]) -> None:
            with suppress(_Reached):
                run(batch)

        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        for _ in run_batches(model, part, batches, masks, "calibrate"):
            enough = enough or (stop and sorted(calls) == sorted(modules))
            last[:] = [None, ""]
            calls.clear()
    return {name: grams[leader[name]] for name in modules if leader.get(name) in grams}


class _Reached(Exception):
    """All modules that were asked for have run."""


def patches(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """What each position of a convolution's output sums over: (rows * positions, kernel positions * input channels)."""
    x = x.float()
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    elif isinstance(conv.padding, str):
        x = F.pad(x, conv._reversed_padding_repeated_twice)
    else:
        x = F.pad(x, [n for size in reversed(conv.padding) for n in (size, size)])
    for dim, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
        x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x.movedim(1, -1).reshape(-1, torch.Size(conv.kernel_size).numel() * x.shape[1])


def spread(batches: Sequence[Mapping[str, Any]], rows: int) -> list[int]:
    """Which batches to take for about so many rows: evenly spaced, since people sort by length.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.grams import spread
    >>> spread([{"input_ids": torch.ones(64, 8)}] * 8, rows=256)
    [1, 3, 5, 7]

    ```
    """
    there = sum(next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 1) for batch in batches)
    count = min(len(batches), max(1, round(len(batches) * rows / max(there, 1))))
    return [int((i + 0.5) * len(batches) / count) for i in range(count)]


def real_rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A tensor as rows, (rows, columns), without those that a mask of its first two dimensions hides.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.grams import real_rows
    >>> real_rows(torch.arange(6.0).view(1, 3, 2), torch.tensor([[1, 0, 1]]))
    tensor([[0., 1.],
            [4., 5.]])

    ```
    """
    masked = mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
    return x[mask.to(x.device).bool()] if masked else x.reshape(-1, x.shape[-1])  # type: ignore[union-attr]


def unlabelled(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without its labels, with the decoder's inputs that a model makes of them when it is trained.

    Where the batch has none, the decoder's mask is 1 up to the last label that is not -100: what comes after is padding.

    Raises:
        CompressionError: the labels cannot be shifted, since the config names no token to start with.
    """
    found = {k: v for k, v in batch.items() if "label" not in str(k)}
    labels, config = batch.get("labels"), getattr(model, "config", None)
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2 or not getattr(config, "is_encoder_decoder", False):
        return found
    taken = inspect.signature(model.forward).parameters
    if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None and "decoder_input_ids" not in taken:
            return found
        try:
            found["decoder_input_ids"] = shift(labels=labels) if shift is not None else _shifted(config, labels)
        except (TypeError, ValueError, AttributeError) as error:
            raise CompressionError(
                f"{type(model).__name__} cannot make decoder_input_ids of the labels ({type(error).__name__}: {error}). Set "
                "config.decoder_start_token_id and config.pad_token_id, or give batches with decoder_input_ids."
            ) from error
    given = found.get("decoder_input_ids")
    has_mask = "decoder_attention_mask" in batch or "decoder_attention_mask" not in taken
    if not has_mask and isinstance(given, torch.Tensor) and given.shape == labels.shape:
        real = (labels != -100).long()
        if bool((real == 0).any()):
            found["decoder_attention_mask"] = real.flip(1).cummax(1).values.flip(1)
    return found


def _shifted(config: Any, labels: torch.Tensor) -> torch.Tensor:
    """Labels one to the right, behind the token that a decoder starts with: what models do that bring no method for it."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted if pad is None else shifted.masked_fill(shifted == -100, pad)


def real_tokens(model: nn.Module, batch: Mapping[str, Any], is_decoder: bool) -> torch.Tensor | None:
    """The mask (batch, tokens) of tokens that are no padding, on one side of a model; None where the batch has none."""
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    mask = batch.get("decoder_attention_mask" if two_sided and is_decoder else "attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def run_batches(
    model: nn.Module,
    run: Callable[..., Any],
    batches: list[Mapping[str, Any]],
    masks: dict[str, torch.Tensor | None],
    what: str,
) -> Iterator[None]:
    """Run a model on batches without their labels, one a turn; `masks` says, meanwhile, which tokens of each side are real."""
    device = next(model.parameters()).device
    for batch in tqdm(batches, desc=what, unit="batch", leave=False, disable=None, delay=3):
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in unlabelled(model, batch).items()}
        masks.update({side: real_tokens(model, batch, side == "decoder") for side in ("encoder", "decoder")})
        try:
            run(batch)
        except CompressionError:  # of who looks on
            raise
        except Exception as error:  # a model may refuse a batch in any way
            raise CompressionError(
                f"{type(model).__name__} does not run on a batch ({', '.join(map(str, batch))}): "
                f"{type(error).__name__}: {error}"
            ) from error
        yield
