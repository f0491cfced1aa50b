"""`apply_` and `mask_`: the only place that changes a model's structure, and the same function at full shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .become import Substitution, names_given
from .caches import warn_of_short_cache
from .channel_proof import channel_gates, channels_
from .compensation import compensations
from .cutting import Undo, Variant, cut_
from .discover import Part
from .edits import AddExits, CompressionError, KeepChannels, KeepExperts, KeepHeads, KeepVocabulary
from .elsewhere import check_elsewhere
from .exits.options import resolve_exits
from .exits.runtime import attach_exits_, detach_exits_
from .exits.trial import try_exits
from .experts import experts_, move_entries_
from .kinds import follow_ties_
from .later import Later
from .layer_proof import check_skipped, try_layers, uneven_layers
from .layout import joined, renamed
from .masking import Mask
from .plan import Plan
from .probe import NoInputs, owners_in, probing
from .prove import prove
from .record import own_configs_, stamp_
from .refusals import check_adapters, check_experts, check_foreign, check_masks, check_modules, why_not_proved
from .resolve import Resolved, resolve
from .stacks import config_numbers, remove_layers_
from .substitute import substitute_
from .vocabulary import vocabulary_

logger = logging.get_logger(__name__)


def mask_(model: nn.Module, plan: Plan, *, inputs: Mapping[str, Any] | None = None) -> Mask:
    """Simulate a plan exactly without changing a shape: the function that the model will have after `apply_`.

    Heads and neurons are multiplied by zero where they enter the output projection (the down projection), channels
    wherever they are summed over; layers that go are skipped; a router scores the experts that go with minus infinity. What
    is masked gets no gradient and cannot grow back. Nothing is computed faster. Several masks hide what any of them hides.
    `save_pretrained` under a mask writes the masked heads, neurons and channels as zeros; skipped layers and experts are
    written as they are. Where cuts bring weights along (`given=True`), the projections hold them until the mask is removed.

    Args:
        model (`nn.Module`): the model, changed in place until the mask is removed.
        plan (`Plan`): what would be cut.
        inputs (`dict`, *optional*): a small batch, read only where channels are masked (which go together is seen in a
            forward pass, see `apply_`) or layers that are not all alike (one that changes a width cannot be skipped).

    Returns:
        `Mask`: a handle with `.remove()`, also a context manager.

    Raises:
        CompressionError: the plan does not fit the model.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import KeepHeads, Plan, mask_
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... )).eval()
    >>> dense = model(torch.tensor([[5, 6, 7]])).last_hidden_state
    >>> with mask_(model, Plan([KeepHeads("encoder.layer.0.attention.self", [0, 2])])):
    ...     masked = model(torch.tensor([[5, 6, 7]])).last_hidden_state
    >>> torch.equal(dense, masked), torch.equal(dense, model(torch.tensor([[5, 6, 7]])).last_hidden_state)
    (False, True)

    ```
    """
    model = _unwrapped(model)
    check_foreign(model)
    edits = plan.edits if isinstance(plan, Plan) else ()
    channels = [edit for edit in edits if isinstance(edit, KeepChannels)]
    resolved = resolve(model, Plan(edit for edit in edits if edit not in channels) if channels else plan)
    check_modules(model, resolved.cuts)
    new = compensations(model, plan, resolved)
    resolved.gates = channel_gates(model, channels, inputs, resolved)
    uneven = uneven_layers(model, resolved)
    if uneven and not any(p.is_meta for p in model.parameters()):
        with suppress(NoInputs), probing(model, inputs) as run:  # without inputs, the layer says it when it runs
            check_skipped(model, uneven, run)
    return Mask(model, resolved, new)


def apply_(model: nn.Module, plan: Plan, *, inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Change a model as a plan says: in place, exact, all or nothing.

    Edits apply in order, each on what the ones before left; runs of cuts, and runs of replacements of one kind, are proved
    and made together. Every cut is proved before anything changes: each block is cut on a copy and compared with its mask (see
    `prove.prove`), removed layers are tried and compared with layers that are skipped, and the whole cut model with
    the whole masked one. What does not agree is refused. Dtype, device, `requires_grad`, module identity and names,
    hooks and tied weights stay. An optimizer that was made before holds the old parameters: make a new one.

    Modules that become something else (low-rank, separable, quantized) are proved by running the model against its old
    form holding the weights that the new modules stand for; exits, by sending one row out at the first. Until the last
    step is made the old weights are kept, and that proof decodes one module at a time.

    **Where the proof's inputs come from.** By default they are random and made from the model's config and the
    signature of its `forward` (`probe.example_inputs`: two rows of token ids, an image, a short waveform, from a fixed
    seed, without a mask). The weights in the structural proof are drawn anew, so the outcome does not hang on these
    inputs or on what the model has learned. A block that they do not reach (a tower without its images, an expert that
    no token is sent to) is proved by itself on inputs made for it, and refused where none are known (`unreached.ways`).
    A module around transformers models is proved by running those. A model that takes anything else needs `inputs`.

    Args:
        model (`nn.Module`): a transformers model, or a module around one (a SentenceTransformer).
        plan (`Plan`): the edits, in order. Names may be written with or without the prefix of the base model.
        inputs (`dict`, *optional*): a small batch for the proof, as for `model(**inputs)`.

    Returns:
        the same model. Its config records the plan, so `save_pretrained` writes what `from_pretrained` needs: a
        stock checkpoint where the config can say all that was changed, a compressed one otherwise.

    Raises:
        CompressionError: the plan does not fit the model, or a cut cannot be proved. Nothing has changed then.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import KeepHeads, KeepNeurons, Plan, apply_
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> plan = Plan([KeepHeads("encoder.layer.0.attention.self", [0, 2]), KeepNeurons("encoder.layer.1", range(40))])
    >>> _ = apply_(model, plan)
    >>> model.encoder.layer[0].attention.self.query, model.encoder.layer[1].intermediate.dense
    (Linear(in_features=32, out_features=16, bias=True), Linear(in_features=32, out_features=40, bias=True))

    ```
    """
    return change_(model, plan, inputs)


def change_(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, Any] | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> nn.Module:
    """`apply_`, with what makes the new weights running in a context: `streaming` has them written to files there."""
    outer, model = model, _unwrapped(model)
    if any(p.is_meta for p in model.parameters()):
        raise CompressionError("The model is on the meta device and has no weights to change; load it first.")
    check_foreign(model)
    steps = _steps(plan)
    undo = Later()
    try:
        own_configs_(model, undo)
        for step in steps:
            if isinstance(step.edits[0], Substitution):
                with within():
                    _substitute(model, step, inputs, undo)
            elif isinstance(step.edits[0], KeepChannels):
                _cut_channels(model, step, inputs, undo)
            elif isinstance(step.edits[0], AddExits):
                _add_exits(model, step, inputs, undo)
            elif isinstance(step.edits[0], KeepExperts):
                with within():
                    _experts(model, step, inputs, undo)
            elif isinstance(step.edits[0], KeepVocabulary):
                inputs = _keep_vocabulary(model, step, inputs, undo)
            else:
                undo.waits = step is steps[-1]  # what comes after a step needs its weights
                _cut(model, step, inputs, undo, within)
        place = undo.forgotten(model)
        if place is not None:
            raise RuntimeError(f"{place} was sliced by something else than cutting.cut_; nothing was changed.")
        with within():
            undo.make()
    except BaseException:
        while undo:
            undo.pop()()
        raise
    return outer


def _steps(plan: Plan) -> list[Plan]:
    """The plan in parts that are proved and made together: runs of cuts, runs of edits of one other kind."""
    if not isinstance(plan, Plan):
        raise CompressionError(f"Expected a Plan, got {type(plan).__name__}. Plan([KeepHeads(...), ...]) makes one.")
    _check_tensors(plan)

    def kind(edit: Any) -> type:
        own = Substitution | AddExits | KeepExperts | KeepChannels | KeepVocabulary
        return type(edit) if isinstance(edit, own) else KeepHeads

    return [Plan(run, plan.tensors) for _, run in groupby(plan.edits, kind)]


def _check_tensors(plan: Plan) -> None:
    used = {name for edit in plan.edits for name in names_given(edit)}
    extra = sorted((plan.tensors or {}).keys() - used)
    if extra:
        raise CompressionError(
            f"The plan carries tensors that none of its edits uses ({', '.join(extra[:4])}{', ...' * (len(extra) > 4)}): "
            "edits were taken out of it, or it was made by a later hf_compress."
        )


def _substitute(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None, undo: Undo) -> None:
    check_adapters(model)
    edits: Any = plan.edits
    record = substitute_(model, edits, plan.tensors, inputs, undo)
    for name, owner in owners_in(model):
        undo.append(partial(setattr, owner, "all_tied_weights_keys", dict(owner.all_tied_weights_keys)))
        follow_ties_(owner)
        if any(not name or touched.startswith(f"{name}.") for touched in record):
            stamp_(owner, name, Plan(edits), record, {}, {}, undo)


def _experts(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None, undo: Undo) -> None:
    check_adapters(model)
    record, moved = experts_(model, plan, inputs, undo)
    for name, owner in owners_in(model):
        mine = [touched for touched in record if not name or touched.startswith(f"{name}.")]
        if mine:
            local = {
                k[len(name) :].lstrip("."): v and v[len(name) :].lstrip(".") for k, v in moved.items() if k.startswith(name)
            }
            move_entries_(owner, local, undo)
            stamp_(owner, name, plan, record, {}, {}, undo)


def _cut_channels(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None, undo: Undo) -> None:
    edits: Any = plan.edits
    if any("exit_heads" in module._modules for module in model.modules()):
        raise CompressionError(
            "This model has early exits, whose heads read channels by number; cut channels first, then add exits "
            "(detach_exits_ takes them off)."
        )
    record = channels_(model, edits, inputs, undo)
    for name, owner in owners_in(model):
        if any(not name or touched.startswith(f"{name}.") for touched in record):
            stamp_(owner, name, Plan(edits), record, {}, {}, undo)


def _add_exits(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None, undo: Undo) -> None:
    check_adapters(model)
    owners = owners_in(model)
    if len(owners) != 1 or len(plan.edits) != 1:
        what = f"{len(owners)} transformers models" if len(owners) != 1 else f"{len(plan.edits)} AddExits at once"
        raise CompressionError(f"Exits go into one classifier, once, with all layers in `after`; got {what}.")
    name, owner = owners[0]
    edit: Any = plan.edits[0]
    lists: dict[str, Any] = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(edit).items()}
    options = resolve_exits(owner, **lists, inputs=None if name else inputs)
    undo.append(lambda: detach_exits_(owner))
    attach_exits_(owner, options)
    try_exits(owner, options, None if name else inputs)
    stamp_(owner, name, Plan([edit]), {}, {}, {}, undo, exits=options)


def _keep_vocabulary(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None, undo: Undo) -> Mapping[str, Any] | None:
    """Gives the inputs under their new ids, for the steps that follow."""
    check_adapters(model)
    for edit in plan.edits:
        assert isinstance(edit, KeepVocabulary)
        name, owner, record, inputs = vocabulary_(model, edit, inputs, undo)
        if record:
            stamp_(owner, name, Plan([edit]), record, {}, {}, undo)
    return inputs


def _cut(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, Any] | None,
    undo: Undo,
    within: Callable[[], AbstractContextManager[Any]],
    proved: Mapping[str, Variant] | None = None,
) -> None:
    resolved = resolve(model, plan)
    cuts, removed = resolved.cuts, resolved.removed
    new = compensations(model, plan, resolved)
    if not cuts and not removed and not new:
        return
    if removed and any("exit_heads" in module._modules for module in model.modules()):
        raise CompressionError(
            f"{', '.join(removed)} has early exits, which sit after layers by number; remove layers first, then add exits."
        )
    check_adapters(model)
    check_modules(model, cuts)
    check_masks(model, cuts)
    check_experts(cuts)
    touched = [cut.block.name for cut in cuts] + [one.block.name for one in new] + list(removed)
    owners = [(n, o) for n, o in owners_in(model) if not n or any(t.startswith(f"{n}.") for t in touched)]
    numbers = {name: config_numbers(owner) for name, owner in owners}
    if proved is None:
        proved = _prove_all(model, resolved, inputs)
    wide = [cut.block.name for cut in cuts if proved[cut.block.name].spread]
    if wide:
        logger.warning(
            f"Only the projections get smaller in {', '.join(wide[:4])}{', ...' * (len(wide) > 4)}: the forward cannot be told "
            "that there are fewer units, so what lies between them computes as before, with zeros."
        )
    with torch.inference_mode(False), torch.no_grad(), within():
        record: dict[str, Any] = {}
        for one in new:
            one.put(model.get_submodule(one.block.out), undo)
        for cut in cuts:
            for name, entry in cut_(model.get_submodule, cut, proved[cut.block.name], undo).items():
                record[renamed(name, removed) or name] = joined(record.get(renamed(name, removed) or name), entry)
        for name, entry in remove_layers_(model, removed, undo).items():
            record[name] = joined(record.get(name), entry)
    for name, owner in owners:
        stamp_(owner, name, Plan(plan.edits), record, removed, numbers[name], undo)
        if removed:
            warn_of_short_cache(owner)


def prove_plan(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None = None) -> dict[str, tuple[Part, ...]]:
    """Refuse what `apply_` would refuse, and change nothing either way.

    Returns:
        by block, the parts that were found to follow its units.
    """
    return {name: variant.parts for name, variant in prove_variants(model, plan, inputs).items()}


def prove_variants(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None = None) -> dict[str, Variant]:
    """As `prove_plan`, with all that was found of how each block is cut."""
    model = _unwrapped(model)
    check_foreign(model)
    resolved = resolve(model, plan)
    check_modules(model, resolved.cuts)
    check_experts(resolved.cuts)
    return _prove_all(model, resolved, inputs)


def rehearse(model: nn.Module, plan: Plan, proved: Mapping[str, Variant]) -> None:
    """Do all that `apply_` does with a plan of heads and neurons, and take it back: what it would refuse is refused now.

    No weight is sliced: shapes tell whether what is left can be saved and loaded.

    Args:
        model (`nn.Module`): the model; as it was when this returns or raises.
        plan (`Plan`): `KeepHeads` and `KeepNeurons` alone, without weights of their own.
        proved (`dict`): how each block is cut (`prove_variants`), so that nothing is proved again.

    Raises:
        CompressionError: as `apply_`.
    """
    model = _unwrapped(model)
    undo = Later()
    undo.waits = True
    try:
        own_configs_(model, undo)
        _cut(model, plan, None, undo, nullcontext, proved)
    finally:
        while undo:
            undo.pop()()


def _unwrapped(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CompressionError(f"Expected a model (a torch.nn.Module), got {type(model).__name__}; load it first.")
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    return inner if isinstance(inner, nn.Module) else model


# --- proof -------------------------------------------------------------------------------------------------------


def _prove_all(model: nn.Module, resolved: Resolved, inputs: Mapping[str, Any] | None) -> dict[str, Variant]:
    with torch.inference_mode(False), probing(model, inputs) as run:  # a proof takes gradients
        if resolved.removed:
            check_skipped(model, uneven_layers(model, resolved), run)
            try_layers(model, resolved, run)
        if not resolved.cuts:
            return {}
        try:
            proved = prove(model, resolved.cuts, run, lambda: Mask(model, resolved))
            check_elsewhere(model, resolved.cuts, proved, run, lambda: Mask(model, resolved))
            return proved
        except CompressionError:
            raise
        except Exception as error:  # whatever a model does on a copy of its part: no proof, so no cut
            raise CompressionError(why_not_proved(model, resolved.cuts, error)) from error
