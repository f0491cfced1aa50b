"""Which channels of a model are one, seen in the operations that a forward pass is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .channel_labels import Field, Grouped, Labels, narrowed, present, support

Rule = Callable[["Trace", str, tuple, dict, Any], list[list[Field]]]


class Trace(TorchDispatchMode):
    """Follows channels through everything that torch computes while it is on: `with Trace(model) as trace: run()`.

    Every index of every dimension of every parameter and buffer has a label, and each operation of torch's core set says what
    becomes of them: a convolution or a product *joins* the labels that it sums over (its inputs' with those of its weight's
    columns) and hands on those of its rows; what works element by element (activations, scales, additions, batch norm in eval
    mode) joins the labels that meet; what moves elements (views, permutations, concatenations, slices) moves the labels in the
    same way, by running on them. So a residual stream is one set of channels because additions joined it, and a flattened
    map's columns belong to their channel because they were moved there; no name is asked. The idea is that of dependency
    graphs (Fang et al., "DepGraph", 2023), per element instead of per layer.

    What is not separable by channel *freezes* the labels, with a reason: a norm, a softmax or a mean over channels, a product
    of two activations, an input or an output of the model, a tensor that has no such channels, a weight that is
    computed, and every operation that has no rule here.

    It can prove that nothing else in *this* pass depends on a channel: all that is computed passes by. It cannot see a branch
    that did not run, sizes that Python code keeps (a `view` with the old width), or what other kernels do inside of one
    operation. So `channel_cuts` runs every cut model beside its mask before it lets it be.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = Labels(model)
        self.weights: Any = WeakTensorKeyDictionary()  # parameters and buffers, and what is but another view of one
        for tensor in list(self.labels.fields):
            self.weights[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(self.of(tensor) for tensor in tensors):
            name = func._schema.name.split("::")[1].removesuffix("_")
            rule = RULES.get(name) or (_elementwise if torch.Tag.pointwise in func.tags else _unknown)
            results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            try:
                found = rule(self, name, args, kwargs, results)
            except Exception:  # an operation used in a way that its rule does not know (complex numbers): not followed
                found = _unknown(self, name, args, kwargs, results)
            for tensor, fields in zip(results, found, strict=False):
                self.labels.fields[tensor] = fields
                if rule in (_move, _same) and args[0] in self.weights:
                    self.weights[tensor] = True
        return result

    def of(self, tensor: Any) -> list[Field]:
        return self.labels.fields.get(tensor, []) if isinstance(tensor, torch.Tensor) else []

    def freeze(self, tensor: Any, reason: str, dims: set[int] | None = None) -> list[Field]:
        """Freeze the labels along some dimensions (all by default); the fields that are left."""
        left = []
        for field in self.of(tensor):
            if dims is None or support(field) & dims:
                self.labels.freeze(field, reason)
            else:
                left.append(field)
        return left

    def along(self, tensor: torch.Tensor, dim: int, reason: str) -> Field | None:
        """The labels along one dimension; a field that mixes it with others is frozen."""
        found = [field for field in self.of(tensor) if support(field) & {dim % tensor.ndim}]
        if len(found) == 1 and support(found[0]) == {dim % tensor.ndim}:
            return found[0].flatten()
        for field in found:
            self.labels.freeze(field, reason)
        return None

    def name(self, *tensors: Any) -> str:
        """The module whose parameter is among these, quoted, to be named in a reason."""
        for tensor in tensors:
            for field in self.of(tensor):
                if int(field.max()) >= 0:
                    return f"{self.labels.block_of(int(field.max())).module!r}"
        return "the model"

    def contract(self, sides: list[tuple[torch.Tensor, Field | None]], what: str) -> None:
        """Sum over a dimension that has these labels in these two tensors."""
        labelled = present(labels for _, labels in sides)
        weights = [(tensor, labels) for tensor, labels in sides if tensor in self.weights]
        if len(labelled) < 2:
            for lone in labelled:
                where = self.labels.block_of(int(lone.max())).module
                self.labels.freeze(lone, f"{what} near {where!r} sums over them and something that has no such channels")
            return
        self.labels.join(*labelled)
        block = self.labels.whole(labelled[[t in self.weights for t, _ in sides].index(True)]) if len(weights) == 1 else None
        if block is None:
            self.labels.freeze(labelled[0], f"{what} multiplies two activations, or a weight that is computed")
        else:
            self.labels.reads[block.start] = block


def _place(labels: Field | None, ndim: int, dim: int) -> list[Field]:
    if labels is None:
        return []
    return [labels.view([len(labels) if d == dim % ndim else 1 for d in range(ndim)])]


# --- one rule per operation: (trace, name, arguments, keyword arguments, results) -> fields of each result ----------------


def _unknown(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    where = trace.name(*tensors)
    for tensor in tensors:
        trace.freeze(tensor, f"an operation that is not followed ({name}, near {where}) works on them")
    return [[] for _ in results]


def _nothing(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    return [[] for _ in results]  # the values are not used


def _same(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    return [list(trace.of(args[0])) for _ in results]


def _elementwise(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    if not results:
        return []
    ndim = max(result.ndim for result in results)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    aligned = [((1,) * (ndim - t.ndim) + tuple(t.shape), [f[(None,) * (ndim - f.ndim)] for f in trace.of(t)]) for t in tensors]
    merged: list[Field] = []
    for _, fields in aligned:
        for field in fields:
            touching = [other for other in merged if support(other) & support(field)]
            for other in touching:
                trace.labels.join(other, field)
                merged = [m for m in merged if m is not other]
                one, two = torch.broadcast_tensors(other, field)
                field = torch.where(one >= 0, one, two)
            merged.append(field)
    for shape, fields in aligned:
        there = set().union(*map(support, fields)) if fields else set()
        for field in merged:
            if any(shape[d] > 1 and d not in there for d in support(field)):
                trace.labels.freeze(field, "they meet, element by element, a tensor that has no such channels")
    return [list(merged) for _ in results]


def _move(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    """Do to the labels what is done to the tensor."""
    tensor = args[0]
    moved: list[list[Field]] = [[] for _ in results]
    if name == "split_with_sizes":
        trace.freeze(
            tensor, "they are split at fixed places", {(args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.ndim}
        )
    for field in trace.of(tensor):
        full = field.expand(tensor.shape)
        if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            parts = [full.reshape(results[0].shape)]
        else:
            out = getattr(torch.ops.aten, name)(full, *args[1:], **{k: v for k, v in kwargs.items() if k == "dim"})
            parts = list(out) if isinstance(out, tuple | list) else [out]
        for fields, part in zip(moved, parts, strict=True):
            small = narrowed(part)
            if small is None:
                trace.labels.freeze(part, f"some are taken by their number ({name})")
            else:
                fields.append(small)
    return moved


def _index(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensor, indices = args[0], args[1:]
    if name == "index":
        dims = {d for d, index in enumerate(indices[0]) if index is not None}
    else:  # select, index_select
        dims = {indices[0] % tensor.ndim}
    left = trace.freeze(tensor, f"some are taken by their number ({name})", dims)
    found = []
    for field in left:
        out = getattr(torch.ops.aten, name)(field.expand(tensor.shape), *indices)
        found.append(narrowed(out))
    return [present(found)]


def _concatenate(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensors = [t for t in args[0] if t.ndim and t.numel()]
    where = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    ndim = results[0].ndim
    dim = where % ndim
    found: list[Field] = []
    if name == "stack":
        opened = [[f.unsqueeze(dim) for f in trace.of(t)] for t in tensors]
    else:
        opened = [list(trace.of(t)) for t in tensors]
        sides = []
        for tensor, fields in zip(tensors, opened, strict=True):
            own = next((f for f in fields if support(f) == {dim}), None)
            sides.append(torch.full([tensor.shape[dim]], -1) if own is None else own.flatten())
        joined = torch.cat(sides)
        if bool((joined >= 0).any()):
            found += _place(joined, ndim, dim)
    for fields in opened:  # along the others they must agree, since what is concatenated must have one width there
        for field in fields:
            if dim in support(field) and support(field) != {dim}:
                trace.labels.freeze(field, "a concatenation mixes them with other dimensions")
    rest = [[f for f in fields if dim not in support(f)] for fields in opened]
    for field in [f for fields in rest for f in fields]:
        match = next((f for f in found if support(f) & support(field)), None)
        if match is None:
            found.append(field)
        elif match is not field:
            trace.labels.join(match, field)
        if not all(any(support(f) & support(field) for f in fields) for fields in rest):
            trace.labels.freeze(field, "they are concatenated beside a tensor that has no such channels")
    return [found]


def _pad(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensor, pads = args[0], args[1]
    padded = {tensor.ndim - 1 - i // 2 for i, p in enumerate(pads) if p}
    return [trace.freeze(tensor, "they are padded", padded)]


def _reduce(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensor = args[0]
    if any(isinstance(a, torch.Tensor) for a in args[1:]):  # the larger of two
        return _elementwise(trace, name, args, kwargs, results)
    dims = next((a for a in args[1:] if isinstance(a, list | tuple)), None)
    if dims is None:
        single = None if "norm" in name else next((a for a in args[1:] if type(a) is int), None)
        dims = kwargs.get("dim", single)
    every = dims is None or dims == []
    listed: list[int] = [dims] if type(dims) is int else list(dims or ())
    gone = set(range(tensor.ndim)) if every else {d % tensor.ndim for d in listed}
    left = trace.freeze(tensor, f"a reduction over channels ({name}) mixes them", gone)
    if results[0].ndim != tensor.ndim:
        left = [f.squeeze(sorted(gone)) for f in left]
    return [list(left) for _ in results]


def _over_a_dimension(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensor = args[0]
    dim = next((a for a in args[1:] if type(a) is int), kwargs.get("dim", -1))
    trace.freeze(tensor, f"{name.strip('_')} runs over them", {dim % tensor.ndim})
    return [list(trace.of(tensor)) for _ in results]


def _spatial(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    tensor = args[0]
    count = next(n for n in (3, 2, 1) if f"{n}d" in name)
    dims = set(range(tensor.ndim - count, tensor.ndim))
    return [trace.freeze(tensor, f"{name} runs over them", dims) for _ in results]


def _embedding(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    columns = trace.along(args[0], 1, "")
    trace.freeze(args[0], "they are rows of an embedding", {0})
    return [_place(columns, results[0].ndim, -1)]


def _convolution(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    x, weight, bias, *_, transposed, _, groups = args[:9]
    labels, where = trace.labels, trace.name(weight)
    trace.freeze(x, f"the convolution {where} runs over them", set(range(x.ndim)) - {1})
    inputs = trace.along(x, 1, f"the convolution {where} runs over them and others at once")
    sides = [trace.along(weight, d, f"the weight of {where} is computed") for d in (0, 1)]
    outputs, columns = sides[::-1] if transposed else sides
    if groups == 1:
        contracted = weight.shape[0 if transposed else 1]
        if contracted > 1:
            trace.contract([(x, inputs), (weight, columns)], "a convolution")
    elif transposed:
        for side in present((inputs, *sides)):
            labels.freeze(side, f"{where} is a transposed convolution in groups")
        outputs = None
    elif weight.shape[1] == 1:  # depthwise: not a sum over channels, each goes its own way
        _join_or_freeze(
            labels, outputs, None if inputs is None else inputs.repeat_interleave(weight.shape[0] // groups),
            f"the depthwise convolution {where} reads what has no such channels",
        )  # fmt: skip
    else:
        block = None if outputs is None else labels.whole(outputs)
        if block is None or outputs is None or weight not in trace.weights:
            for side in present((inputs, *sides)):
                labels.freeze(side, f"the weight of a convolution in groups near {where} is computed")
        else:
            own = labels.inputs_of(block.module, x.shape[1])
            _join_or_freeze(labels, own, inputs, f"the convolution {where} reads what has no such channels")
            found = Grouped(block.module, groups, own.numpy(), outputs.numpy())
            if not any(g.module == block.module for g in labels.grouped):
                labels.grouped.append(found)
            labels.reads[int(own[0])] = labels.block_of(int(own[0]))
    for side in present((outputs,)):
        labels.used.add(labels.block_of(int(side[0])).start)
        _join_or_freeze(
            labels, side, trace.along(bias, 0, "") if bias is not None else side, f"the bias of {where} is computed"
        )
    return [_place(outputs, results[0].ndim, 1)]


def _join_or_freeze(labels: Labels, one: Field | None, other: Field | None, reason: str) -> None:
    if one is not None and other is not None:
        labels.join(one, other)
    else:
        for side in present((one, other)):
            labels.freeze(side, reason)


def _product(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    bias, a, b = args[:3] if name in ("addmm", "baddbmm", "addmv") else (None, *args[:2])
    mixed = "a product mixes them with others"
    if max(a.ndim, b.ndim) == 3:
        for side in (a, b):
            trace.freeze(side, "they are the batches of a product (attention heads, say)", {0})
    if a.shape[-1] > 1:
        trace.contract([(a, trace.along(a, -1, mixed)), (b, trace.along(b, -2 if b.ndim > 1 else 0, mixed))], "a product")
    found = _place(trace.along(a, -2, mixed), results[0].ndim, -2) if a.ndim > 1 and b.ndim > 1 else []
    columns = trace.along(b, -1, mixed) if b.ndim > 1 else None
    if columns is not None:
        trace.labels.used.add(trace.labels.block_of(int(columns[0])).start)
    if bias is not None:
        _join_or_freeze(trace.labels, columns, trace.along(bias, -1, mixed), "a product adds what has no such channels")
    return [found + _place(columns, results[0].ndim, -1)]


def _batch_norm(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    x, vectors = args[0], [t for t in args[1:5] if isinstance(t, torch.Tensor)]
    own = args[5] is True or not isinstance(args[3], torch.Tensor) or name == "_batch_norm_with_update"
    if own:
        trace.freeze(x, f"the batch norm {trace.name(*vectors)} takes its statistics over them", set(range(x.ndim)) - {1})
    channels = trace.along(x, 1, "a batch norm mixes them with others")
    for vector in vectors:
        _join_or_freeze(
            trace.labels, channels, trace.along(vector, 0, ""), f"the batch norm {trace.name(*vectors)} has other channels"
        )
    return [_place(channels, x.ndim, 1)] + [[] for _ in results[1:]]


def _layer_norm(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    x, shape, *vectors = args[:4]
    over = set(range(x.ndim - len(shape), x.ndim))
    reason = f"the norm {trace.name(*vectors)} takes its statistics over them"
    trace.freeze(x, reason, over)
    return _elementwise(trace, name, (x, *vectors), {}, results[:1]) + [[] for _ in results[1:]]


def _group_norm(trace: Trace, name: str, args: tuple, kwargs: dict, results: list) -> list[list[Field]]:
    x, weight, bias, _, channels, _, groups = args[:7]
    vectors = [t for t in (weight, bias) if t is not None]
    reason = f"the norm {trace.name(*vectors)} takes its statistics over them"
    trace.freeze(x, reason, set(range(x.ndim)) - ({1} if groups == channels else set()))
    found = trace.along(x, 1, reason)
    for vector in vectors:
        _join_or_freeze(trace.labels, found, trace.along(vector, 0, reason), reason)
    return [_place(found, x.ndim, 1)] + [[] for _ in results[1:]]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("detach", "alias", "lift_fresh", "_to_copy", "clone", "contiguous", "dropout", "native_dropout"), _same),
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze",
         "slice", "split", "split_with_sizes", "unbind", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle",
         "unfold", "view_as_real"), _move,
    ),
    **dict.fromkeys(("select", "index", "index_select"), _index),
    **dict.fromkeys(("cat", "stack"), _concatenate),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
                     "replication_pad2d"), _pad),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod", "norm", "linalg_vector_norm", "any",
         "all", "logsumexp", "argmax", "argmin"), _reduce,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "cumprod"), _over_a_dimension),
    **dict.fromkeys(
        ("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
         "avg_pool3d", "_adaptive_avg_pool2d",
         "_adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
         "_upsample_nearest_exact2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
         "_upsample_bicubic2d_aa", "upsample_linear1d"), _spatial,
    ),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"), _product),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                     "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"), _batch_norm),
    **dict.fromkeys(
        ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full",
         "new_empty", "_local_scalar_dense", "sym_size", "is_nonzero", "equal", "_assert_async"), _nothing,
    ),
    "convolution": _convolution, "embedding": _embedding, "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm, "native_group_norm": _group_norm,
    **dict.fromkeys(("_prelu_kernel", "copy", "masked_fill", "hardswish", "silu", "mish", "lerp", "where"), _elementwise),
}  # fmt: skip
