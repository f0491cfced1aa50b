"""The edits: what is changed, one frozen dataclass each. No torch module is touched here."""

from __future__ import annotations

import operator
import reprlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MOST_UNITS = 1_000_000  # no layer is that wide; a hostile plan is
BITS = (8, 4, 3, 2)


class CompressionError(ValueError):
    """A refusal: what was got, what is allowed, what to do. Raised before anything has changed."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: Any) -> str:
    """What was got, for a message: short, however long or deeply nested it is.

    Example:

    ```python
    >>> from hf_compress.edits import shown
    >>> shown([[[[[]]]], "x"]), len(shown("x" * 1000))
    ("[[[[...]]], 'x']", 80)

    ```
    """
    return _SHORT.repr(value)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise CompressionError(f"{where} must be a module name as `discover` prints it, got {shown(value)}.")
    return value


def _indices(values: Any, where: str) -> tuple[int, ...]:
    """Sorted unique indices >= 0. Order has no meaning in what is kept, so two plans that keep the same compare equal."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise CompressionError(f"{where} must be a sequence of indices of what stays, got {shown(values)}.")
    indices = []
    for value in values:
        try:
            if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
                raise TypeError
            indices.append(operator.index(value))
        except TypeError:
            raise CompressionError(f"{where} must hold whole numbers, got {shown(value)}.") from None
    if not indices:
        raise CompressionError(f"{where} is empty: name at least one. (To remove a whole layer, use KeepLayers.)")
    if len(set(indices)) != len(indices):
        twice = sorted(index for index, count in Counter(indices).items() if count > 1)[:8]
        raise CompressionError(f"{where} names {twice} more than once; name each index that stays once.")
    if min(indices) < 0:
        raise CompressionError(f"{where} holds {min(indices)}; indices count from 0.")
    return tuple(sorted(indices))


@dataclass(frozen=True)
class KeepHeads:
    """Keep these query heads of one attention; the others, with their rows and columns, go.

    Args:
        attention (`str`): the attention's name, as `discover` gives it.
        heads (`Sequence[int]`): indices of the query heads that stay: whole key/value groups, or the same number of
            query heads in every group that stays.
        given (`bool`, defaults to `False`): the output projection becomes what is in the plan's tensors, as
            `"{attention}.out_weight"` (out, columns that stay) and `"{attention}.out_bias"`: second-order pruning computes
            them (`prune_to`).

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepHeads
    >>> KeepHeads("encoder.layer.0.attention.self", [3, 0])
    KeepHeads(attention='encoder.layer.0.attention.self', heads=(0, 3), given=False)

    ```
    """

    attention: str
    heads: tuple[int, ...]
    given: bool = False

    def __post_init__(self) -> None:
        _name(self.attention, "KeepHeads.attention")
        _choice(self.given, (False, True), f"KeepHeads({self.attention!r}).given")
        object.__setattr__(self, "heads", _indices(self.heads, f"KeepHeads({self.attention!r}).heads"))


@dataclass(frozen=True)
class KeepNeurons:
    """Keep these intermediate neurons of one feed-forward block.

    Args:
        ffn (`str`): the block's name, as `discover` gives it.
        neurons (`Sequence[int]`): indices of the neurons that stay.
        given (`bool`, defaults to `False`): as for `KeepHeads`, with `"{ffn}.out_weight"` and `"{ffn}.out_bias"`.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepNeurons
    >>> KeepNeurons("encoder.layer.0", range(3))
    KeepNeurons(ffn='encoder.layer.0', neurons=(0, 1, 2), given=False)

    ```
    """

    ffn: str
    neurons: tuple[int, ...]
    given: bool = False

    def __post_init__(self) -> None:
        _name(self.ffn, "KeepNeurons.ffn")
        _choice(self.given, (False, True), f"KeepNeurons({self.ffn!r}).given")
        object.__setattr__(self, "neurons", _indices(self.neurons, f"KeepNeurons({self.ffn!r}).neurons"))


@dataclass(frozen=True)
class KeepExperts:
    """Keep these experts of one mixture: the model is then the one whose router never picks the others.

    Args:
        moe (`str`): the mixture's name, as `discover` gives it.
        experts (`Sequence[int]`): indices of the experts that stay, at least as many as a token needs; where a router first
            chooses groups of experts, equally many in every group that stays.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepExperts
    >>> KeepExperts("model.layers.0.mlp", [6, 0, 1])
    KeepExperts(moe='model.layers.0.mlp', experts=(0, 1, 6))

    ```
    """

    moe: str
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        _name(self.moe, "KeepExperts.moe")
        object.__setattr__(self, "experts", _indices(self.experts, f"KeepExperts({self.moe!r}).experts"))


@dataclass(frozen=True)
class KeepChannels:
    """Keep these output channels of one convolution; the others go everywhere: in all that writes, follows or reads them.

    Which parameters those are is seen in a forward pass: norms, depthwise convolutions and squeeze-excite follow, the
    convolutions of a residual stream lose the same channels, and every convolution or Linear that sums over them loses
    columns. See `channel_groups`.

    Args:
        conv (`str`): the name of a convolution that writes them (or of a Linear, before a batch norm say).
        channels (`Sequence[int]`): indices of its output channels that stay. Where a convolution works in groups (RegNet),
            whole groups, or equally many in every group that stays.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepChannels
    >>> KeepChannels("resnet.embedder.embedder.convolution", range(3))
    KeepChannels(conv='resnet.embedder.embedder.convolution', channels=(0, 1, 2))

    ```
    """

    conv: str
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        _name(self.conv, "KeepChannels.conv")
        object.__setattr__(self, "channels", _indices(self.channels, f"KeepChannels({self.conv!r}).channels"))


@dataclass(frozen=True)
class KeepLayers:
    """Keep these layers of one stack; indices that layers carry (caches, layer types) are put right.

    Args:
        layers (`Sequence[int]`): indices of the layers that stay.
        stack (`str`, *optional*): which stack, where a model has several: `"encoder"`, `"decoder"`, or whatever
            `discover` prints. Leaving it out is refused there.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepLayers
    >>> KeepLayers([0, 2, 4])
    KeepLayers(layers=(0, 2, 4), stack=None)

    ```
    """

    layers: tuple[int, ...]
    stack: str | None = None

    def __post_init__(self) -> None:
        if self.stack is not None:
            _name(self.stack, "KeepLayers.stack")
        object.__setattr__(self, "layers", _indices(self.layers, "KeepLayers.layers"))


def _count(value: Any, where: str, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= MOST_UNITS:
        raise CompressionError(f"{where} must be a whole number >= {least} and at most {MOST_UNITS:,}, got {shown(value)}.")
    return value


def _choice(value: Any, allowed: tuple, where: str) -> Any:
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise CompressionError(f"{where} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.")
    return value


@dataclass(frozen=True)
class LowRank:
    """Replace a Linear (or Conv1D) by two thinner ones: y = U (V x) + b, with U of shape (out, rank) and V (rank, in).

    U V is the best approximation of the weight in the Frobenius norm, its truncated SVD (Eckart and Young 1936), or
    whatever a planner computed and put into the plan's tensors (`plan_low_rank` with batches).

    Args:
        module (`str`): the Linear's name in the model.
        rank (`int`): inner width; `rank * (in + out)` must be less than `in * out`.
        given (`bool`, defaults to `False`): the factors are in the plan's tensors, as `"{module}.weight"` (U) and
            `"{module}.weight_in"` (V).

    Raises:
        CompressionError: the rank is no whole number above 0.

    Example:

    ```python
    >>> from hf_compress import LowRank
    >>> LowRank("encoder.layer.0.output.dense", 64)
    LowRank(module='encoder.layer.0.output.dense', rank=64, given=False)

    ```
    """

    module: str
    rank: int
    given: bool = False

    def __post_init__(self) -> None:
        _name(self.module, "LowRank.module")
        _count(self.rank, f"LowRank({self.module!r}).rank")
        _choice(self.given, (False, True), f"LowRank({self.module!r}).given")


@dataclass(frozen=True)
class DepthwiseSeparable:
    """Replace a convolution by one per channel and a 1x1 convolution that mixes them (MobileNet, Howard et al. 2017).

    Started from the trained weights: for each input channel, the matrix (out, kernel positions) is approximated by its
    `multiplier` largest singular triplets, which is the best fit there is with that many kernels a channel.

    Args:
        module (`str`): the convolution's name: a `Conv1d` or `Conv2d` with a kernel over one position.
        multiplier (`int`, defaults to 1): kernels per input channel. MobileNet has 1; each more fits better and costs more
            (on a CPU much more: torch has no fast kernel for several).

    Raises:
        CompressionError: the multiplier is no whole number above 0.

    Example:

    ```python
    >>> from hf_compress import DepthwiseSeparable
    >>> DepthwiseSeparable("resnet.encoder.stages.0.layers.0.layer.0.convolution")
    DepthwiseSeparable(module='resnet.encoder.stages.0.layers.0.layer.0.convolution', multiplier=1)

    ```
    """

    module: str
    multiplier: int = 1

    def __post_init__(self) -> None:
        _name(self.module, "DepthwiseSeparable.module")
        _count(self.multiplier, f"DepthwiseSeparable({self.module!r}).multiplier")


@dataclass(frozen=True)
class Quantize:
    """Store the weights of one Linear, Conv1D or Embedding in few bits; with 8, compute in integers too.

    - 8 bits: one scale per output channel (per row of an embedding), weights in [-127, 127]. A Linear's activations are
      rounded to 8 bits while it runs, each token by its own range, so that no row depends on what is beside it in
      the batch (`activations="token"`), or all by one (`"tensor"`), or not at all (`"none"`).
    - 4 bits and fewer: weights alone, in groups along the input, each with the scale and zero point that leave the least
      squared error. They are unpacked once, at the first use (`decode="load"`: dense speed, dense memory), or whenever
      they are used (`"call"`: small memory, slower).

    Args:
        module (`str`): the module's name. One that was made low-rank has both its factors quantized.
        bits (`int`, defaults to 8): 8, 4, 3 or 2.
        group_size (`int`, *optional*): weights that share a scale, below 8 bits; 64 if left out. The last group of a row is
            shorter where it does not divide.
        activations (`str`, *optional*): `"token"`, `"tensor"` or `"none"`; left out, `"token"` with 8 bits and `"none"` below.
        decode (`str`, defaults to `"load"`): `"load"` or `"call"`.
        given (`bool`, defaults to `False`): scales (and zero points) are in the plan's tensors, as
            `"{module}.weight_scale"`: what a training with fake quantization ended with.

    Raises:
        CompressionError: bits that are not offered, a group size with 8 bits, quantized activations below 8.

    Example:

    ```python
    >>> from hf_compress import Quantize
    >>> Quantize("pooler.dense", bits=4)
    Quantize(module='pooler.dense', bits=4, group_size=64, activations='none', decode='load', given=False)

    ```
    """

    module: str
    bits: int = 8
    group_size: int | None = None
    activations: str | None = None
    decode: str = "load"
    given: bool = False

    def __post_init__(self) -> None:
        where = f"Quantize({self.module!r})"
        _name(self.module, "Quantize.module")
        if type(self.bits) is not int or self.bits not in BITS:
            raise CompressionError(f"{where}.bits must be one of {', '.join(map(str, BITS))}, got {shown(self.bits)}.")
        if self.bits == 8 and self.group_size is not None:
            raise CompressionError(f"{where}: 8 bits have one scale per output channel; leave group_size out.")
        if self.bits < 8:
            if self.group_size is None:
                object.__setattr__(self, "group_size", 64)
            _count(self.group_size, f"{where}.group_size", 2)
        if self.activations is None:
            object.__setattr__(self, "activations", "token" if self.bits == 8 else "none")
        _choice(self.activations, ("token", "tensor", "none") if self.bits == 8 else ("none",), f"{where}.activations")
        _choice(self.decode, ("load", "call"), f"{where}.decode")
        _choice(self.given, (False, True), f"{where}.given")


@dataclass(frozen=True)
class AddExits:
    """Put classifier heads after some layers of a classifier; rows that one is sure of leave the batch there.

    Args:
        after (`Sequence[int]`): layers that an exit sits after, from 0. The last has the model's own head and gets none.
        criterion (`str`, defaults to `"confidence"`): `"confidence"` (largest probability), `"entropy"` (DeeBERT, Xin et al.
            2020) or `"patience"` (PABEE, Zhou et al. 2020); see `hf_compress.exits.CRITERIA`.
        threshold (`float` or `Sequence[float]`, *optional*): for all exits, or one for each layer in `after`, which counts
            upwards then. A default per criterion; `tune_exits_` finds one that fits.
        pool (`str`, *optional*): what heads read: `"first"`, `"mean"` or `"last"` token. If left out, the last token where
            the model's own head reads that, else the mean of the real tokens.
        distil (`float`, defaults to 0.0): weight of self-distillation from the last layer while training, in [0, 1].
        temperature (`float`, defaults to 2.0): of self-distillation.
        weights (`str` or `Sequence[float]`, defaults to `"depth"`): how the losses of exits are weighted while training:
            `"depth"`, `"equal"`, or one for each layer in `after` and, last, one for the final layer.

    Raises:
        CompressionError: an index is negative, named twice or not a whole number; an option means nothing to any model.

    Example:

    ```python
    >>> from hf_compress import AddExits
    >>> AddExits([1, 2], threshold=0.8).after
    (1, 2)

    ```
    """

    after: tuple[int, ...]
    criterion: str = "confidence"
    threshold: float | tuple[float, ...] | None = None
    pool: str | None = None
    distil: float = 0.0
    temperature: float = 2.0
    weights: str | tuple[float, ...] = "depth"

    def __post_init__(self) -> None:
        from .exits.options import check_edit  # here, since what it checks with is refused with this file's error

        object.__setattr__(self, "after", tuple(check_edit(**vars(self))))
        for name in ("threshold", "weights"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class KeepVocabulary:
    """Keep these tokens: their rows of the token embedding, of the output head, and of whatever else has one row a token.

    A token's new id is its place among those that stay, in order: of `(0, 5, 9)`, token 9 becomes 2. The ids in the configs
    follow; the tokenizer is cut to match by `cut_tokenizer`.

    Args:
        tokens (`Sequence[int]`): ids of the tokens that stay.
        embedding (`str`, *optional*): which vocabulary, where a model has several: the name of its token embedding, or of
            the sub-model that holds it (`"decoder"`).

    Raises:
        CompressionError: an id is negative, named twice or not a whole number, or none is left.

    Example:

    ```python
    >>> from hf_compress import KeepVocabulary
    >>> KeepVocabulary([9, 0, 5])
    KeepVocabulary(tokens=(0, 5, 9), embedding=None)

    ```
    """

    tokens: tuple[int, ...]
    embedding: str | None = None

    def __post_init__(self) -> None:
        if self.embedding is not None:
            _name(self.embedding, "KeepVocabulary.embedding")
        object.__setattr__(self, "tokens", _indices(self.tokens, "KeepVocabulary.tokens"))


Edit = (
    KeepHeads
    | KeepNeurons
    | KeepExperts
    | KeepChannels
    | KeepLayers
    | LowRank
    | DepthwiseSeparable
    | Quantize
    | AddExits
    | KeepVocabulary
)
EDITS: dict[str, type] = {
    edit.__name__: edit
    for edit in (
        KeepHeads,
        KeepNeurons,
        KeepExperts,
        KeepChannels,
        KeepLayers,
        LowRank,
        DepthwiseSeparable,
        Quantize,
        AddExits,
        KeepVocabulary,
    )
}


def spans_of(indices: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` -> `"0-2 5"`."""
    parts, start = [], 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            first, last = indices[start], indices[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return " ".join(parts)


def from_spans(text: str) -> list[int]:
    """The inverse of `spans_of`."""
    indices: list[int] = []
    for part in text.split():
        first, dash, last = part.partition("-")
        if (
            dash
            and not last
            or not first.isdecimal()
            or not (last or first).isdecimal()
            or int(last or first) - int(first) > MOST_UNITS
        ):
            raise CompressionError(f"{part!r} is no span of indices such as '3' or '0-7'.")
        indices.extend(range(int(first), int(last or first) + 1))
        if len(indices) > MOST_UNITS:
            raise CompressionError(f"More than {MOST_UNITS:,} indices in one edit; no layer is that wide.")
    return indices
