"""Tokens, removed: every tensor with one row a token, every size and id that goes with it, and the proof by running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .cutting import Undo
from .edits import CompressionError, KeepVocabulary
from .layout import skeleton
from .probe import NoInputs, difference, example_inputs, probing, tensors_in, tolerance
from .quantization import is_quantized
from .refusals import check_dense, check_weights
from .token_ids import renumber_
from .vocabularies import Vocabulary, held_in, holders_of, ids_needed, numbers_in, tensors_of, the_vocabulary, vocabularies


def vocabulary_(
    model: nn.Module, edit: KeepVocabulary, inputs: Mapping[str, Any] | None, undo: Undo
) -> tuple[str, PreTrainedModel, dict[str, dict[str, Any]], Mapping[str, Any] | None]:
    """Keep these tokens of a model, in place, and show that it computes with the new ids what it did with the old.

    The proof runs the model before, on ids that stay, and after, on their new ids, once on ordinary tokens and once with
    the special ones that the config names (padding, ends): outputs that have no side with one entry a token must be what
    they were, and those that have, what they were for the tokens that stay.

    Returns:
        the path of the transformers model that was cut, the model, what was changed, as `cutting.cut_` records it, and the
        inputs under their new ids (tokens that went, replaced), for the edits that follow.

    Raises:
        CompressionError: no such vocabulary, an id out of range, an id that goes and that a config names, weights that
            cannot be sliced (quantized, parametrized), or the proof fails. `undo` then holds what to take back.
    """
    one = the_vocabulary(model, edit.embedding)
    kept, size, owner = edit.tokens, one.size, one.owner
    if kept[-1] >= size:
        raise CompressionError(
            f"KeepVocabulary names token {kept[-1]}, but there are {size} tokens at that point (0-{size - 1})."
        )
    if len(kept) == size:
        return one.owner_name, owner, {}, inputs
    if not one.alone and len({id(config) for v in vocabularies(model) for _, config, _ in v.sizes}) == 1:
        raise CompressionError(
            f"{type(owner).__name__} has two vocabularies and one config, whose ids (pad_token_id, ...) are of both; one of "
            "them cannot be renumbered without the other."
        )
    _check(one)
    new = {old: place for place, old in enumerate(kept)}
    with torch.inference_mode(False), torch.no_grad():
        runner = one.owner if inputs is None else model
        batches = _batches(one, kept, inputs)
        batches, before = _run_before(runner, one, batches, given=inputs is not None)
        _check_that_tokens_matter(runner, one, *next(pair for pair in zip(batches, before, strict=True) if pair[1] is not None))
        record = _keep(one, kept, new, undo)
        after = _outputs(runner, one, batches, lambda ids: _renumbered(ids, new))
    _compare(before, after, kept, size)
    record = {f"{one.owner_name}.{name}".lstrip("."): entry for name, entry in record.items()}
    if inputs is not None:
        inputs = {**inputs, **_changed(one, batches[0], lambda ids: _renumbered(ids, new))}
    return one.owner_name, owner, record, inputs


def _check(one: Vocabulary) -> None:
    every = dict(tensors_of(one.owner))
    for name, dims in one.tensors.items():
        if name not in every:
            raise CompressionError(
                f"{name} has one row a token, and this {type(one.owner).__name__} has no such tensor any more."
            )
        module, _, _ = held_in(one.owner, name)
        path = name.rpartition(".")[0]
        if is_quantized(module):
            raise CompressionError(
                f"{path!r} is quantized, and its rows cannot be taken apart. KeepVocabulary comes first, then Quantize."
            )
        check_dense(path, module)
        check_weights(path, module)
        sizes = {vars(config)[key] for _, config, key in one.sizes}
        wrong = [every[name].shape[d] for d in dims if every[name].shape[d] not in sizes]
        if wrong:
            raise CompressionError(
                f"{name} has {wrong[0]} rows for {max(sizes)} tokens (it is padded, or holds other things too), so which to "
                "keep is not known here."
            )


def _keep(one: Vocabulary, kept: tuple[int, ...], new: Mapping[int, int], undo: Undo) -> dict[str, dict[str, Any]]:
    owner, size = one.owner, one.size
    for holder in holders_of(one):
        renumber_(holder, new, size, undo)
    for _, config, key in one.sizes:
        was = vars(config)[key]
        undo.append(partial(vars(config).__setitem__, key, was))
        vars(config)[key] = sum(token < was for token in kept)
    stock = skeleton(owner)
    if stock is None:
        raise CompressionError(
            f"Nothing was changed: {type(owner).__name__} cannot be built from its config with {len(kept)} tokens. An id in it "
            "may lie beyond them."
        )
    new_numbers = numbers_in(stock)
    sliced: dict[int, Any] = {}
    record: dict[str, dict[str, Any]] = {}
    for name, dims in one.tensors.items():
        module, key, holder = held_in(owner, name)
        old = holder[key]
        if id(old) not in sliced:
            tensor = old.detach()
            for dim in dims:
                rows = torch.tensor([token for token in kept if token < tensor.shape[dim]], device=old.device)
                tensor = tensor.index_select(dim, rows)
            tensor = tensor.contiguous()
            sliced[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        undo.append(partial(holder.__setitem__, key, old))
        holder[key] = sliced[id(old)]
        entry = record.setdefault(name.rpartition(".")[0], {})
        if "hfc_kinds" in vars(module):  # its shapes are in the layout already
            entry.setdefault("shapes", {})[key] = list(holder[key].shape)
    for name, module in owner.named_modules():
        for key, value in new_numbers.get(name, {}).items():
            was = one.numbers.get(name, {}).get(key)
            if was != value and was is not None and type(vars(module).get(key)) is int and vars(module)[key] == was:
                undo.append(partial(setattr, module, key, was))
                setattr(module, key, value)
                record.setdefault(name, {}).setdefault("attributes", {})[key] = value
    return record


# --- proof -------------------------------------------------------------------------------------------------------

Batch = dict[str, Any]


def _batches(one: Vocabulary, kept: tuple[int, ...], inputs: Mapping[str, Any] | None) -> list[Batch]:
    """Small batches of kept tokens: ordinary ones, and with the special ones that the config names."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise CompressionError(f"inputs must be a batch as for model(**inputs), got {type(inputs).__name__}.")
    given = inputs is not None
    batch = {k: v for k, v in inputs.items() if k != "labels"} if inputs is not None else example_inputs(one.owner)
    mine = [name for name in batch if name.endswith("input_ids") and _reads(one, name)]
    if not mine:
        raise NoInputs(
            f"{type(one.owner).__name__} gets no token ids of this vocabulary in the proof's inputs ({', '.join(batch)}); pass "
            "inputs=... with a small batch that has input_ids."
        )
    needed = ids_needed(one)
    plain = torch.tensor([token for token in kept if token not in needed.values()] or kept)
    draw = torch.Generator().manual_seed(0)

    def drawn(ids: torch.Tensor) -> torch.Tensor:
        some = plain[torch.randint(len(plain), ids.shape, generator=draw)].to(ids.device)
        if not given:
            return some
        stays = torch.isin(ids, torch.tensor(kept, device=ids.device))  # what the user gives may hold tokens that go
        return torch.where(stays, ids, some)

    first = {name: drawn(value) if name in mine else value for name, value in batch.items()}
    if given:
        return [first]
    begin, end, pad = (
        next((needed[f"{word}_token_id"] for word in words if f"{word}_token_id" in needed), None)
        for words in (("bos", "cls", "decoder_start"), ("eos", "sep"), ("pad",))
    )
    second = dict(first)
    for name in mine:
        ids = first[name].clone()
        if ids.ndim == 2 and ids.shape[1] > 3:
            for column, number in ((0, begin), (-2, end), (-1, pad)):
                if number is not None:
                    ids[:, column] = number
        second[name] = ids
    return [first, second]


def _run_before(runner: nn.Module, one: Vocabulary, batches: list[Batch], given: bool) -> tuple[list[Batch], list[Any]]:
    """What the model gives for these batches, or for the part of each that it runs on."""
    try:
        return batches, _outputs(runner, one, batches, lambda ids: ids)
    except NoInputs as error:
        first = error
    if not given:  # what reads pictures beside text reads text alone too; a classifier makes its decoder's ids itself
        for part in ("input_ids", "decoder_input_ids"), ("input_ids",):
            fewer = [{name: batch[name] for name in part if name in batch} for batch in batches]
            try:
                if fewer[0]:
                    return fewer, _outputs(runner, one, fewer, lambda ids: ids)
            except NoInputs:
                continue
    raise first


def _reads(one: Vocabulary, name: str) -> bool:
    if one.alone:
        return True
    side = "decoder" if any("decoder" in e.split(".") for e in one.embeddings) else "encoder"
    return name.startswith("decoder") == (side == "decoder")


def _changed(one: Vocabulary, batch: Batch, change: Callable[[Any], Any]) -> Batch:
    return {k: change(v) if k.endswith("input_ids") and _reads(one, k) else v for k, v in batch.items()}


def _renumbered(ids: torch.Tensor, new: Mapping[int, int]) -> torch.Tensor:
    return torch.tensor([new[number] for number in ids.flatten().tolist()], device=ids.device).view(ids.shape)


def _outputs(runner: nn.Module, one: Vocabulary, batches: list[Batch], change: Callable[[Any], Any]) -> list[Any]:
    """What the model gives for each batch; None where it does not run on one (without, or with, special tokens)."""
    ran: list[str] = []
    found: list[Any] = []
    failed: NoInputs | None = None
    with ExitStack() as hooks:
        for name in one.embeddings:
            hook = one.owner.get_submodule(name).register_forward_hook(lambda *_, n=name: ran.append(n))
            hooks.callback(hook.remove)
        for batch in batches:
            try:
                with probing(runner, _changed(one, batch, change)) as run:
                    found.append(tensors_in(run()))
            except NoInputs as error:
                found.append(None)
                failed = error
    if failed is not None and not any(found):
        raise failed
    if not ran:
        raise CompressionError(
            f"Nothing was changed: {one.embeddings[0]!r} did not run on the proof's inputs, so the cut cannot be proved. Pass "
            "inputs=... with a batch that uses it."
        )
    return found


def _check_that_tokens_matter(runner: nn.Module, one: Vocabulary, batch: Batch, before: list[Any]) -> None:
    """A proof by outputs that are the same whatever the tokens are would be none."""
    turned = _changed(one, batch, lambda ids: ids.flip(-1))
    try:
        with probing(runner, turned) as run:
            other = tensors_in(run())
    except NoInputs:  # so their order matters
        return
    alike = all(torch.equal(turned[name], batch[name]) for name in batch if name.endswith("input_ids"))
    if not alike and all(difference(a, b) == 0.0 for (_, a), (_, b) in zip(before, other, strict=True)):
        raise CompressionError(
            f"Nothing was changed: what {type(runner).__name__} gives does not depend on its tokens, so nothing can be proved."
        )


def _compare(before: list[Any], after: list[Any], kept: tuple[int, ...], size: int) -> None:
    for expected, got in zip(before, after, strict=True):
        if expected is None:
            continue
        if got is None or len(got) != len(expected):
            raise CompressionError(
                "Nothing was changed: without the tokens that go, the model does not run on its special tokens any more."
            )
        for (where, a), (_, b) in zip(expected, got, strict=True):
            for dim in range(a.ndim):
                if a.shape[dim] == size and dim < b.ndim and b.shape[dim] == len(kept):
                    a = a.index_select(dim, torch.tensor(kept, device=a.device))
            worst = difference(a, b)
            if worst > tolerance(a.dtype):
                raise CompressionError(
                    f"Nothing was changed: with the tokens renumbered, {where or 'the output'} is off by {worst:.1e} of its "
                    f"largest value, more than {tolerance(a.dtype):.0e}. The model does something with ids (or their order) "
                    "that is not known here."
                )
