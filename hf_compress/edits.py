"""The edits: what is changed, one frozen dataclass each. No torch module is touched here."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import CompressionError, check_choice, check_count, check_indices, check_name, shown
from .sparsity import check_sparsity, read_pattern

BITS = (8, 4, 3, 2)


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
        check_name(self.attention, "KeepHeads.attention")
        check_choice(self.given, (False, True), f"KeepHeads({self.attention!r}).given")
        object.__setattr__(self, "heads", check_indices(self.heads, f"KeepHeads({self.attention!r}).heads"))


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
        check_name(self.ffn, "KeepNeurons.ffn")
        check_choice(self.given, (False, True), f"KeepNeurons({self.ffn!r}).given")
        object.__setattr__(self, "neurons", check_indices(self.neurons, f"KeepNeurons({self.ffn!r}).neurons"))


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
        check_name(self.moe, "KeepExperts.moe")
        object.__setattr__(self, "experts", check_indices(self.experts, f"KeepExperts({self.moe!r}).experts"))


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
        check_name(self.conv, "KeepChannels.conv")
        object.__setattr__(self, "channels", check_indices(self.channels, f"KeepChannels({self.conv!r}).channels"))


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
            check_name(self.stack, "KeepLayers.stack")
        object.__setattr__(self, "layers", check_indices(self.layers, "KeepLayers.layers"))


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
        check_name(self.module, "LowRank.module")
        check_count(self.rank, f"LowRank({self.module!r}).rank")
        check_choice(self.given, (False, True), f"LowRank({self.module!r}).given")


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
        check_name(self.module, "DepthwiseSeparable.module")
        check_count(self.multiplier, f"DepthwiseSeparable({self.module!r}).multiplier")


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
        check_name(self.module, "Quantize.module")
        if type(self.bits) is not int or self.bits not in BITS:
            raise CompressionError(f"{where}.bits must be one of {', '.join(map(str, BITS))}, got {shown(self.bits)}.")
        if self.bits == 8 and self.group_size is not None:
            raise CompressionError(f"{where}: 8 bits have one scale per output channel; leave group_size out.")
        if self.bits < 8:
            if self.group_size is None:
                object.__setattr__(self, "group_size", 64)
            check_count(self.group_size, f"{where}.group_size", 2)
        if self.activations is None:
            object.__setattr__(self, "activations", "token" if self.bits == 8 else "none")
        check_choice(self.activations, ("token", "tensor", "none") if self.bits == 8 else ("none",), f"{where}.activations")
        check_choice(self.decode, ("load", "call"), f"{where}.decode")
        check_choice(self.given, (False, True), f"{where}.given")


@dataclass(frozen=True)
class Sparsify:
    """Make single weights of one module zero and keep them so: unstructured, or N of every M neighbours.

    The module computes as before, with zeros; dense kernels multiply them too, so no time is gained. What is saved is a bit
    for each weight, and the weights that stay: `n / 8 + (1 - sparsity) * n * b` bytes for n weights of b bytes. (Below a
    sparsity of 1 / (8 b), 3% in float32, that is more than dense.)

    Args:
        module (`str`): the name of a Linear, Conv1D, convolution or Embedding.
        sparsity (`float`, *optional*): the fraction that is zero, in (0, 1); 0.5 if left out, what the pattern says with one.
        pattern (`str`, *optional*): `"2:4"`, `"4:8"`, ...: of every 4 (8) neighbours along what an output sums over, at most 2
            (4) stay. Of a convolution, neighbours are input channels.
        given (`bool`, defaults to `False`): which weights stay is in the plan's tensors, as bits in `"{module}.weight_mask"`
            (`sparsity.pack_bits`), and what they become, where that changes, in `"{module}.weight"`. If not given, those of
            each output that are largest stay.

    Raises:
        CompressionError: a fraction or a pattern that means nothing, or two that contradict each other.

    Example:

    ```python
    >>> from hf_compress import Sparsify
    >>> Sparsify("encoder.layer.0.output.dense", pattern="2:4")
    Sparsify(module='encoder.layer.0.output.dense', sparsity=0.5, pattern='2:4', given=False)

    ```
    """

    module: str
    sparsity: float | None = None
    pattern: str | None = None
    given: bool = False

    def __post_init__(self) -> None:
        where = f"Sparsify({self.module!r})"
        check_name(self.module, "Sparsify.module")
        group = read_pattern(self.pattern, f"{where}.pattern")
        of_pattern = 0.5 if group is None else 1 - group[0] / group[1]
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", of_pattern)
        check_sparsity(self.sparsity, self.pattern)
        if not self.sparsity:
            raise CompressionError(f"{where}.sparsity is 0, which changes nothing; leave the module out.")
        if group is not None and self.sparsity != of_pattern:
            raise CompressionError(
                f"{where}: {self.pattern} leaves a sparsity of {of_pattern:g}, got sparsity={self.sparsity!r}; leave it out."
            )
        object.__setattr__(self, "sparsity", float(self.sparsity))  # type: ignore[arg-type]
        check_choice(self.given, (False, True), f"{where}.given")


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
            check_name(self.embedding, "KeepVocabulary.embedding")
        object.__setattr__(self, "tokens", check_indices(self.tokens, "KeepVocabulary.tokens"))


Edit = (
    KeepHeads
    | KeepNeurons
    | KeepExperts
    | KeepChannels
    | KeepLayers
    | LowRank
    | DepthwiseSeparable
    | Quantize
    | Sparsify
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
        Sparsify,
        AddExits,
        KeepVocabulary,
    )
}
