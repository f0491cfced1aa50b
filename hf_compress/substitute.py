"""Edits that change what a module is: made in place, filled with the best values there are, and proved by running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .become import BECOME, Substitution, Tensors, entry_of, given_for, share_quantized
from .cutting import Undo
from .discover import nearest
from .edits import CompressionError, DepthwiseSeparable, LowRank, Quantize, Sparsify
from .fits import compose_kernels
from .kinds import not_separable
from .loader import host_quantized_
from .modules import LockedLinear, LowRankLinear, dense_weight, is_gated
from .probe import difference, owners_in, probing, tensors_in, tolerance
from .quantization import dequantized, is_quantized
from .refusals import check_weights
from .sparse import DENSE, is_sparse, not_sparsifiable, unsparse_


def substitute_(
    model: nn.Module,
    edits: Sequence[Substitution],
    tensors: Tensors | None,
    inputs: Mapping[str, Any] | None,
    undo: Undo,
) -> dict[str, dict[str, Any]]:
    """Change modules as these edits say, and show that the model is then what it should be.

    The proof runs the model on a small batch before and after, one module's weights at a time in float:

    - each new module, on what reaches it, computes what the old one does with the weights that the new one stands for
      (U V, the composed kernel, the decoded integers), to float precision;
    - with what the old modules gave in the place of what the new ones give, the model's outputs are what they were. That
      finds weights that something else than their module's forward reads, which names and classes cannot tell, and no
      choice inside the model (a router's, say) can fall the other way.

    Activations stay in float meanwhile; that their rounding is right is a matter of one module, and of its tests.

    Returns:
        what was changed, as `cutting.cut_` records it.

    Raises:
        CompressionError: a module is not there, cannot be changed so, is changed twice, is not reached by the proof, or
            the proof fails. `undo` then holds what to take back.
    """
    record: dict[str, dict[str, Any]] = {}
    changed: list[_Change] = []
    for _, owner in owners_in(model):
        undo.append(partial(host_quantized_, owner))
    modules = dict(model.named_modules())
    holders = weights_in(modules)
    with torch.inference_mode(False), torch.no_grad():
        for edit in tqdm(edits, desc="replace", unit="module", leave=False, disable=None, delay=3):
            name, module = find(model, edit.module, modules)
            tied = sharers(module, holders)
            _check(model, name, module, edit, tied)
            for other, sharer in [(name, module), *tied]:
                before = _State(sharer)
                undo.append(before.restore)
                if type(sharer) is LockedLinear:
                    sharer.__class__ = nn.Linear  # type: ignore[assignment]
                if is_sparse(sharer):  # integers hold the zeros, another mask replaces this one
                    unsparse_(sharer)
                kinds = [*sharer.__dict__.get("hfc_kinds", [])]
                if sharer is module or not isinstance(edit, Quantize):
                    kinds.append(BECOME[type(edit)](sharer, edit, given_for(edit, name, sharer, tensors)))
                else:
                    kinds.append(share_quantized(module, sharer, edit))
                sharer.__dict__["hfc_kinds"] = kinds
                record[other] = entry_of(sharer, kinds)
                changed.append((other, sharer, before, edit))
            holders |= weights_in({other: sharer for other, sharer in [(name, module), *tied]})
    _prove(model, changed, inputs)
    for _, owner in owners_in(model):
        host_quantized_(owner)
    return record


def find(model: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """One of the modules of a model by its name, with or without the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for option in (name, prefix + name, name.removeprefix(prefix)):
        if option in modules and option:
            return option, modules[option]
    raise CompressionError(
        f"{type(model).__name__} has no module named {name!r}{nearest(name, [n for n in modules if n])} Names are those of "
        "model.named_modules(), as the edits before this one left them."
    )


# --- refusals ----------------------------------------------------------------------------------------------------


def _check(model: nn.Module, name: str, module: Any, edit: Substitution, tied: list[tuple[str, nn.Module]]) -> None:
    what = type(edit).__name__
    check_weights(name, module)
    weight = module._parameters.get("weight")
    if weight is not None and (weight.is_meta or (weight.is_floating_point() and not bool(weight.isfinite().all()))):
        what_is = "is on the meta device and has no values" if weight.is_meta else "holds NaN or infinite values"
        raise CompressionError(f"The weight of {name!r} {what_is}; load the model again.")
    if "_exits" in module.__dict__:
        raise CompressionError(
            f"{name!r} is a layer that exits stand after; take them off (detach_exits_), then use {what}, then add them again."
        )
    if is_gated(module):
        raise CompressionError(f"{name!r} is masked; cut it first (apply_ with the plan of the mask), then use {what}.")
    if is_quantized(module):
        again = "quantized already" if isinstance(edit, Quantize) else "quantized, and integers have no better approximation"
        raise CompressionError(f"{name!r} is {again}: {what} must come first, once, or start from the float model.")
    if is_sparse(module) and isinstance(edit, LowRank | DepthwiseSeparable):
        raise CompressionError(f"{name!r} is sparse, and a product of thinner ones has no zeros; use {what} alone, or first.")
    if is_sparse(module) and isinstance(edit, Quantize) and edit.bits < 8:
        raise CompressionError(
            f"{name!r} is sparse, and the grids of {edit.bits} bits have no point at exactly zero, so its zeros would "
            "be lost. 8 bits keep them; or quantize alone."
        )
    if isinstance(edit, Sparsify):
        reason = not_sparsifiable(module) if type(module) is not LockedLinear else None
        if reason is not None:
            raise CompressionError(f"{name!r} cannot be made sparse: {reason}.")
    elif isinstance(edit, LowRank):
        if type(module) is LowRankLinear:
            raise CompressionError(
                f"{name!r} is low-rank already (rank {module.rank}); start from the dense model for another."
            )
        if type(module) not in (nn.Linear, Conv1D, LockedLinear):
            raise CompressionError(f"LowRank takes a Linear or Conv1D, and {name!r} is a {_kind(module)}.")
    elif isinstance(edit, DepthwiseSeparable):
        reason = not_separable(module, edit.multiplier)
        if reason:
            raise CompressionError(f"{name!r} cannot be made depthwise separable: {reason}.")
    elif DENSE.get(type(module), type(module)) not in (nn.Linear, Conv1D, LockedLinear, LowRankLinear, nn.Embedding):
        raise CompressionError(f"Quantize takes a Linear, Conv1D or Embedding, and {name!r} is a {_kind(module)}.")
    if tied and not (isinstance(edit, Quantize) and {type(m) for _, m in tied} <= {nn.Linear, nn.Embedding}):
        raise CompressionError(
            f"{name!r} shares its weight with {tied[0][0]!r}; {what} would separate them. Untie them first, or leave it out."
        )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


Holders = dict[int, list[tuple[str, nn.Module]]]


def weights_in(modules: Mapping[str, nn.Module]) -> Holders:
    """The modules that hold each weight, by the weight's `id`: to be asked many times (see `sharers`)."""
    holders: Holders = {}
    for name, module in modules.items():
        for weight in {id(p): p for p in module._parameters.values() if p is not None}:
            holders.setdefault(weight, []).append((name, module))
    return holders


def sharers(module: nn.Module, holders: Holders) -> list[tuple[str, nn.Module]]:
    """Other modules that hold a module's weight: an output head that is tied to the embedding."""
    weight = module._parameters.get("weight")
    return [] if weight is None else [(n, m) for n, m in holders.get(id(weight), ()) if m is not module]


# --- proof -------------------------------------------------------------------------------------------------------


class _State:
    """Everything that makes a module what it is, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.parameters = module, type(module), dict(module._parameters)
        self.values = {key: value for key, value in vars(module).items() if key != "_parameters"}

    def restore(self) -> None:
        parameters = self.module._parameters
        self.module.__class__ = self.kind
        self.module.__dict__.clear()
        self.module.__dict__.update(self.values, _parameters=parameters)
        parameters.clear()
        parameters.update(self.parameters)

    def compute(self, parameters: dict[str, nn.Parameter | None], *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the module that was there gives with these parameters; nobody else sees them."""
        shell: Any = object.__new__(self.kind)
        shell.__dict__.update(self.values, _parameters=parameters)
        return self.kind.forward(shell, *args, **kwargs)


_Change = tuple[str, nn.Module, _State, Substitution]


def effective(module: Any, before: _State) -> dict[str, nn.Parameter | None]:
    """The parameters under which the module that was there computes what the new one does."""
    if is_quantized(module):
        found = dequantized(module)
        if issubclass(before.kind, Conv1D):
            found = {**found, "weight": found["weight"].T}
    elif is_sparse(module):
        found = {"weight": module.weight.detach()}
    elif isinstance(module, LowRankLinear):
        weight = dense_weight(module)
        found = {"weight": weight.T if before.kind is Conv1D else weight}
    else:
        found = {"weight": compose_kernels(module.weight_depth, module.weight, module.groups, module.multiplier)}
    return {**before.parameters, **{k: nn.Parameter(v.contiguous(), requires_grad=False) for k, v in found.items()}}


@contextmanager
def _in_the_old_form(changed: list[_Change]) -> Iterator[None]:
    states = [_State(module) for _, module, _, _ in changed]
    try:
        for _, _, before, _ in changed:
            before.restore()
        yield
    finally:
        for after in states:
            after.restore()


@contextmanager
def _in_float(changed: list[_Change]) -> Iterator[None]:
    """Quantized modules with the activations in float, and nothing that they decode kept."""
    modules: list[Any] = [module for _, module, _, _ in changed if is_quantized(module)]
    before = [(module.activations, module.decode) for module in modules]
    try:
        for module in modules:
            module.activations, module.decode = None, "call"
        yield
    finally:
        for module, (activations, decode) in zip(modules, before, strict=True):
            module.activations, module.decode = activations, decode


def _prove(model: nn.Module, changed: list[_Change], inputs: Mapping[str, Any] | None) -> None:
    ran: set[str] = set()
    off: dict[str, float] = {}  # by module, of what is allowed

    def compare(name: str, before: _State) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            ran.add(name)
            meant = before.compute(effective(module, before), *args, **kwargs)
            off[name] = max(off.get(name, 0.0), difference(meant, output) / tolerance(meant.dtype))
            return before.compute(before.parameters, *args, **kwargs)

        return hook

    with ExitStack() as stack:
        with _in_the_old_form(changed):
            run = stack.enter_context(probing(model, inputs))
            expected = tensors_in(run())
        try:
            with _in_float(changed), ExitStack() as hooks:
                for name, module, before, _ in changed:  # first of all hooks: others may change what leaves the module
                    handle = module.register_forward_hook(compare(name, before), prepend=True, with_kwargs=True)
                    hooks.callback(handle.remove)
                got = tensors_in(run())
            for _, module, _, _ in changed:
                if is_quantized(module):
                    stack.callback(module.register_forward_hook(_forget).remove)
            run()  # and as it will run
        except Exception as error:  # whatever reads a weight that has another shape now
            raise CompressionError(
                f"Nothing was changed: with {changed[0][0]!r} (of {len(changed)} modules) replaced, {type(model).__name__} "
                f"fails with {type(error).__name__}: {error}. Something else than its forward reads its weight; leave it out."
            ) from error
    # of modules that share a weight, one that runs is enough
    used = {id(module._parameters["weight"]) for name, module, _, _ in changed if name in ran}
    idle = [name for name, module, _, _ in changed if id(module._parameters["weight"]) not in used]
    if idle:
        raise CompressionError(
            f"Nothing was changed: {idle[0]!r} (of {len(idle)}) did not run on the proof's inputs, so its replacement cannot "
            "be proved. (In a mixture of experts, edits before this one may have changed which experts run.) Pass inputs=... "
            "with a batch that uses it, or leave it out of the plan."
        )
    wrong = max(off, key=lambda name: off[name])
    if off[wrong] > 1:
        raise CompressionError(
            f"Nothing was changed: what takes the place of {wrong!r} is off by {off[wrong]:.1f} times what rounding in "
            "floating point explains; leave it out of the plan."
        )
    for (where, a), (_, b) in zip(expected, got, strict=True):
        allowed, worst = tolerance(a.dtype), difference(a, b)
        if worst > allowed:
            raise CompressionError(
                f"Nothing was changed: with {changed[0][0]!r} (of {len(changed)} modules) replaced, "
                f"{where or 'the output'} is off by {worst:.1e} of its largest value, more than {allowed:.0e}. Its weight is "
                "read by something else than its forward; leave it out of the plan."
            )


def _forget(module: Any, *_: Any) -> None:
    module._derived.clear()  # decoded weights of all modules at once are what quantizing is to save
