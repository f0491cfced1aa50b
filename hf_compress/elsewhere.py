"""Whether a forward of a user's own reads the weights of a block outside of it, where the proof of blocks does not look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .cutting import Cut, Variant
from .edits import CompressionError
from .probe import difference, tensors_in, tolerance

KNOWN = ("transformers", "torch", "hf_compress")  # whose forwards are swept type by type (docs/families.md)


def check_elsewhere(
    model: nn.Module,
    cuts: list[Cut],
    proved: Mapping[str, Variant],
    run: Callable[[], list[Any]],
    masked: Callable[[], Any],
) -> None:
    """Refuse blocks whose weights are read from outside: a penalty on them, a projection that the model calls once more.

    `prove` puts a cut copy in the place of a block; what reads the block's weights past it still sees them whole then,
    and would not once they are cut. So a model with code of its own runs once more under its mask, and every weight that will
    be cut is NaN (a number seen as a tensor, which takes no memory) wherever its block does not run.

    Raises:
        CompressionError: some output follows them. It names the first such block.
    """
    if all(type(module).__module__.partition(".")[0] in KNOWN for module in model.modules()):
        return
    with masked():
        calls: Counter[str] = Counter()
        with ExitStack() as hooks:
            for cut in cuts:
                scope = model.get_submodule(cut.block.scope)
                count = lambda *_args, name=cut.block.name: calls.update([name])  # noqa: E731
                hooks.callback(scope.register_forward_pre_hook(count).remove)
            expected = tensors_in(run())
        seen = [cut for cut in cuts if calls[cut.block.name]]  # no hook sees a block that is run past its module
        if not seen or _same(model, seen, proved, run, expected):
            return
        for cut in seen:
            if not _same(model, [cut], proved, run, expected):
                raise CompressionError(
                    f"Nothing was changed: the forward of this {type(model).__name__} reads weights of {cut.block.name!r} "
                    f"outside of {cut.block.scope!r} too, where a cut would change them. Leave that block out of the plan."
                )


def _same(
    model: nn.Module, cuts: list[Cut], proved: Mapping[str, Variant], run: Callable[[], list[Any]], expected: list[Any]
) -> bool:
    with ExitStack() as stack:
        for cut in cuts:
            _hide(model, cut, proved[cut.block.name], stack)
        try:
            got = tensors_in(run())
        except Exception:  # what fails on NaN has read them
            return False
    same = zip(expected, got, strict=False)
    return len(expected) == len(got) and all(difference(a, b) <= tolerance(a.dtype) for (_, a), (_, b) in same)


def _hide(model: nn.Module, cut: Cut, variant: Variant, stack: ExitStack) -> None:
    """Make what will be cut NaN until the stack closes, but for while the block runs."""
    whole: dict[tuple[nn.Module, str], nn.Parameter] = {}
    for part in variant.parts:
        module = model.get_submodule(part.module)
        names = [part.parameter] if part.parameter else ["weight", "bias"][: 1 + (part.dim == 0)]
        for name in names:
            tensor = module._parameters.get(name)
            if part.argument is None and tensor is not None and tensor.is_floating_point():
                whole[module, name] = tensor
    nan = {at: nn.Parameter(t.new_tensor(float("nan")).expand(t.shape), requires_grad=False) for at, t in whole.items()}
    depth = [0]

    def put(values: Mapping[tuple[nn.Module, str], nn.Parameter]) -> None:
        for (module, name), value in values.items():
            module._parameters[name] = value

    def enter(*_args: Any) -> None:
        depth[0] += 1
        put(whole)

    def leave(*_args: Any) -> None:
        depth[0] -= 1
        if not depth[0]:
            put(nan)

    scope = model.get_submodule(cut.block.scope)
    stack.callback(put, whole)
    stack.callback(scope.register_forward_pre_hook(enter, prepend=True).remove)
    stack.callback(scope.register_forward_hook(leave, always_call=True).remove)
    with torch.no_grad():
        put(nan)
