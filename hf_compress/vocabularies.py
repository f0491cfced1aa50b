"""The vocabularies of a model: which tensors have one row a token, which numbers count them, which configs hold their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .discover import nearest
from .edits import CompressionError
from .layout import skeleton
from .probe import owners_in
from .token_ids import needed_ids

# what configs call the number of tokens (not of token types, entities, codebooks, ...)
SIZES = ("vocab_size", "n_words", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input")
# a second table that the same ids are looked up in, where it is shorter than the first: later ids do not look there
SHORTER = ("vocab_size_per_layer_input",)


@dataclass
class Vocabulary:
    """One vocabulary of a model: the numbers in its configs that say how large it is, and what has one row a token."""

    owner_name: str
    owner: PreTrainedModel
    sizes: list[tuple[str, Any, str]]  # (path of the config part, the config, the key)
    tensors: dict[str, tuple[int, ...]]  # "module.key" -> the dimensions that count tokens
    numbers: dict[str, dict[str, int]]  # what the modules of the stock model hold, by module
    alone: bool = True
    embeddings: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return max(vars(config)[key] for _, config, key in self.sizes)

    @property
    def has_head(self) -> bool:
        """Whether the logits are over these tokens."""
        try:
            head = self.owner.get_output_embeddings()
        except (NotImplementedError, AttributeError):  # models of several parts
            return False
        names = {name for name, module in self.owner.named_modules() if module is head}
        return any(name.rpartition(".")[0] in names for name in self.tensors)


def vocabularies(model: nn.Module) -> list[Vocabulary]:
    """The vocabularies of a model, found by asking its own classes: what changes its shape when the config names another size.

    No size is compared with another, so a hidden size that equals the number of tokens is no trap. Tables that hold the
    same weight, by identity, are of one vocabulary.
    """
    found: list[Vocabulary] = []
    for name, owner in owners_in(model):
        stock = skeleton(owner)
        if stock is None:
            continue
        mine: list[Vocabulary] = []
        for part, config in configs_of(owner.config):
            for key in SIZES:
                size = vars(config).get(key)
                if type(size) is not int or size < 2:
                    continue
                tensors = _moved(owner, stock, config, key, size)
                same = [v for v in mine if _overlap(v, tensors) or (key in SHORTER and v.sizes[0][1] is config)]
                if not tensors and not same:
                    continue
                for other in same[1:]:
                    mine.remove(other)
                    tensors |= other.tensors
                    same[0].sizes += other.sizes
                if same:
                    same[0].sizes.append((part, config, key))
                    same[0].tensors.update(tensors)
                else:
                    mine.append(Vocabulary(name, owner, [(part, config, key)], tensors, numbers_in(stock)))
        for one in mine:
            one.embeddings = [n.rpartition(".")[0] for n in one.tensors if _is_embedding(owner, n)]
        found += [one for one in mine if one.embeddings]
    for one in found:
        one.alone = len(found) == 1
        if one.alone:  # the same number elsewhere: Marian's of the decoder, that of a config around the text's
            known = {(id(config), key) for _, config, key in one.sizes}
            one.sizes += [
                (path, config, key)
                for path, config in _around(one)
                for key in SIZES
                if vars(config).get(key) == one.size and (id(config), key) not in known
            ]
    return found


def _around(one: Vocabulary) -> list[tuple[str, Any]]:
    """The configs that name the size of a vocabulary, and those around them."""
    paths = [path for path, _, _ in one.sizes]
    return [
        (path, config)
        for path, config in configs_of(one.owner.config)
        if any(not path or mine == path or mine.startswith(f"{path}.") for mine in paths)
    ]


def configs_of(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A config and the configs inside it, by their paths."""
    yield name, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value, f"{name}.{key}".lstrip("."))


def _moved(owner: PreTrainedModel, stock: nn.Module, config: Any, key: str, size: int) -> dict[str, tuple[int, ...]]:
    """The dimensions that change when a config names one token more (which no id in it can mind)."""
    vars(config)[key] = size + 1
    try:
        other = skeleton(owner)
    finally:
        vars(config)[key] = size
    if other is None:
        return {}
    before, after = dict(tensors_of(stock)), dict(tensors_of(other))
    found = {}
    for name, tensor in before.items():
        if name in after and tensor.ndim == after[name].ndim:
            dims = tuple(d for d in range(tensor.ndim) if tensor.shape[d] != after[name].shape[d])
            if dims:
                found[name] = dims
    return found


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{key}".lstrip("."), tensor


def held_in(owner: nn.Module, name: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """The module, the key and the dict of a tensor."""
    path, _, key = name.rpartition(".")
    module: Any = owner.get_submodule(path)
    return module, key, module._parameters if key in module._parameters else module._buffers


def _is_embedding(owner: nn.Module, name: str) -> bool:
    try:
        module, key, _ = held_in(owner, name)
    except AttributeError:
        return False
    return isinstance(module, nn.Embedding) and key == "weight"


def _overlap(one: Vocabulary, tensors: Mapping[str, Any]) -> bool:
    def held(names: Mapping[str, Any]) -> set[int]:
        every = dict(tensors_of(one.owner))
        return {id(every[name]) for name in names if name in every}

    return bool(held(one.tensors) & held(tensors))


def the_vocabulary(model: nn.Module, embedding: str | None = None) -> Vocabulary:
    """The model's vocabulary, or the one that is named.

    Raises:
        CompressionError: there is none, there are several, or none with that name.
    """
    found = vocabularies(model)
    if not found and any(skeleton(owner) is None for _, owner in owners_in(model)):
        raise CompressionError(
            f"What has one row a token in this {type(model).__name__} cannot be found: its config does not build its class."
        )
    if not found:
        raise CompressionError(
            f"{type(model).__name__} has no vocabulary that KeepVocabulary could cut: no token embedding whose number of rows "
            f"its config names ({', '.join(SIZES[:3])}, ...)."
        )
    names = [[f"{one.owner_name}.{e}".lstrip(".") for e in one.embeddings] for one in found]
    if embedding is None:
        if len(found) > 1:
            raise CompressionError(
                f"{type(model).__name__} has {len(found)} vocabularies; name one: KeepVocabulary(..., embedding=...), of "
                f"{', '.join(repr(of[0]) for of in names)}."
            )
        return found[0]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name in (embedding, prefix + embedding, embedding.removeprefix(prefix)):
        for inside in (False, True):
            chosen = [
                one
                for one, of in zip(found, names, strict=True)
                if any(e == name or e.startswith(f"{name}.") or (inside and f".{name}." in f".{e}.") for e in of)
            ]
            if len(chosen) == 1:
                return chosen[0]
    every = [e for of in names for e in of]
    raise CompressionError(
        f"{embedding!r} names no vocabulary of {type(model).__name__}{nearest(embedding, every)} Its token embeddings: "
        f"{', '.join(map(repr, every))}."
    )


def ids_needed(one: Vocabulary) -> dict[str, int]:
    """The ids that must stay, by the names that the configs have for them (with the id, where one name has several)."""
    found: dict[str, int] = {}
    for holder in holders_of(one):
        for key, number in needed_ids(vars(holder)):
            if 0 <= number < one.size:
                found[key if found.get(key, number) == number else f"{key} {number}"] = number
    return found


def holders_of(one: Vocabulary) -> list[Any]:
    """The configs and generation configs that hold ids of this vocabulary."""
    mine = [id(config) for _, config, _ in one.sizes]
    around = [id(config) for _, config in _around(one)]
    paths = [path for path, _, _ in one.sizes]
    found = []
    for path, config in configs_of(one.owner.config):
        others = any(type(vars(config).get(key)) is int for key in SIZES)  # of a vocabulary that is not this one
        inside = one.alone or any(not p or path.startswith(f"{p}.") for p in paths)
        # of several vocabularies, a config around them holds the ids of what the model writes
        outside = id(config) in around and (one.alone or one.has_head)
        if id(config) in mine or outside or (inside and not others):
            found.append(config)
    for name, module in one.owner.named_modules():
        generation = getattr(module, "generation_config", None)
        writes = one.has_head if not name else any(e.startswith(f"{name}.") for e in one.embeddings)
        if generation is not None and (one.alone or writes) and not any(generation is f for f in found):
            found.append(generation)
    return found


def numbers_in(stock: nn.Module) -> dict[str, dict[str, int]]:
    """The whole numbers that modules hold (padding_idx, num_embeddings, ...), by module."""
    return {
        name: {key: value for key, value in vars(module).items() if type(value) is int}
        for name, module in stock.named_modules()
    }
