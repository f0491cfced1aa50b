"""`apply_` and `mask_`: the only place that changes a model's structure, and the same function at full shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel

from .cutting import Cut, Undo, Variant, cut_, is_plain_linear
from .discover import Attention, FeedForward, discover
from .layout import gates_of, layers_differ, merge, renamed, skeleton, stock_numbers, unrecorded
from .loader import HfCompressConfig, compression_of
from .modules import LockedLinear, gate_, is_gated, ungate_
from .plan import CompressionError, KeepHeads, KeepNeurons, Plan
from .probe import difference, owners_in, probing, tensors_in, tolerance
from .prove import prove
from .resolve import Resolved, resolve
from .stacks import config_numbers, config_parts, remove_layers_


class Mask:
    """What `mask_` returns: the mask is on until `.remove()`, or until the end of a `with` block."""

    def __init__(self, model: nn.Module, resolved: Resolved) -> None:
        self._gated: list[nn.Module] = []
        self._hooks: list[Any] = []
        for cut in resolved.cuts:
            module = model.get_submodule(cut.block.out)
            if "hfc_masks" not in module.__dict__:
                base = gate_(module).clone() if is_gated(module) else None  # a mask of a checkpoint or a training
                masks: dict[int | None, torch.Tensor | None] = {None: base}
                module.__dict__["hfc_masks"] = masks
            gate = gate_(module)
            module.__dict__["hfc_masks"][id(self)] = cut.gate().to(gate.device)
            _combine(module)
            self._gated.append(module)
        for path, kept in resolved.removed.items():
            for index, layer in enumerate(model.get_submodule(path).children()):
                if index not in kept:
                    self._hooks.append(layer.register_forward_hook(_skip, with_kwargs=True))

    def remove(self) -> None:
        """Take this mask off; what other masks hide stays hidden. A second call does nothing."""
        while self._gated:
            module = self._gated.pop()
            module.__dict__.get("hfc_masks", {}).pop(id(self), None)
            _combine(module)
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Mask:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _combine(module: nn.Module) -> None:
    """A gate is the product of all masks on it; without any, there is none."""
    masks = module.__dict__.get("hfc_masks")
    if masks is None or not is_gated(module):
        module.__dict__.pop("hfc_masks", None)
        return
    base = masks[None]
    others = [mask for key, mask in masks.items() if key is not None]
    if base is None and not others:
        ungate_(module)
    else:
        gate = gate_(module).fill_(1.0)
        for mask in ([] if base is None else [base]) + others:
            gate.mul_(mask.to(gate.device))
    if not others:
        del module.__dict__["hfc_masks"]


def _skip(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """A layer that is as if it were not there: its first output is its first input."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return type(output)([hidden, *output[1:]]) if type(output) in (tuple, list) else hidden


def mask_(model: nn.Module, plan: Plan) -> Mask:
    """Simulate a plan exactly without changing a shape: the function that the model will have after `apply_`.

    Heads and neurons are multiplied by zero where they enter the output projection (the down projection); layers that
    go are skipped. What is masked gets no gradient and cannot grow back. Nothing is computed faster. Several masks hide
    what any of them hides. `save_pretrained` under a mask writes the masked heads and neurons as zeros; skipped layers are
    written as they are.

    Args:
        model (`nn.Module`): the model, changed in place until the mask is removed.
        plan (`Plan`): what would be cut.

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
    resolved = resolve(model, plan)
    _check_modules(model, resolved.cuts)
    return Mask(model, resolved)


def apply_(model: nn.Module, plan: Plan, *, inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Cut a model to what a plan keeps: in place, exact, all or nothing.

    Every cut is proved before anything changes: each block is cut on a copy and compared with its mask (see
    `prove.prove`), removed layers are tried and compared with layers that are skipped, and the whole cut model with
    the whole masked one. What does not agree is refused. Dtype, device, `requires_grad`, module identity and names,
    hooks and tied weights stay. An optimizer that was made before holds the old parameters: make a new one.

    **Where the proof's inputs come from.** By default they are random and made from the model's config and the
    signature of its `forward` (`probe.example_inputs`: two rows of token ids, an image, a short waveform, from a fixed
    seed, without a mask). The weights in the structural proof are drawn anew, so the outcome does not hang on these
    inputs or on what the model has learned; but a block that they do not reach cannot be proved, and is refused.
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
    outer, model = model, _unwrapped(model)
    resolved = resolve(model, plan)
    cuts, removed = resolved.cuts, resolved.removed
    if plan.tensors:
        raise CompressionError(
            f"The plan carries tensors ({', '.join(sorted(plan.tensors))}), but none of its edits uses any; "
            "it was made by a later hf_compress."
        )
    if not cuts and not removed:
        return outer
    _check_adapters(model)
    _check_modules(model, cuts)
    _check_masks(model, cuts)
    _check_sharing(model, cuts)
    touched = [cut.block.name for cut in cuts] + list(removed)
    owners = [(n, o) for n, o in owners_in(model) if not n or any(t.startswith(f"{n}.") for t in touched)]
    numbers = {name: config_numbers(owner) for name, owner in owners}
    undo: Undo = []
    try:
        proved = _prove_all(model, resolved, inputs)
        with torch.inference_mode(False), torch.no_grad():
            record: dict[str, Any] = {}
            for cut in cuts:
                for name, entry in cut_(model.get_submodule, cut, proved[cut.block.name], undo).items():
                    record[renamed(name, removed) or name] = _joined(record.get(renamed(name, removed) or name), entry)
            for name, entry in remove_layers_(model, removed, undo).items():
                record[name] = _joined(record.get(name), entry)
        for name, owner in owners:
            _stamp(owner, name, plan, record, removed, numbers[name], undo)
    except BaseException:
        while undo:
            undo.pop()()
        raise
    return outer


def prove_plan(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None = None) -> None:
    """Refuse what `apply_` would refuse, and change nothing either way."""
    model = _unwrapped(model)
    resolved = resolve(model, plan)
    _check_modules(model, resolved.cuts)
    _check_sharing(model, resolved.cuts)
    _prove_all(model, resolved, inputs)


def proved_layouts(model: nn.Module, blocks: Sequence[Attention | FeedForward]) -> dict[str, str]:
    """How the units of fused projections lie, by the path of the projection, found by proving a cut of each block."""
    unclear = [block for block in blocks if any(len(part.layouts) > 1 for part in block.parts)]
    edits: list[KeepHeads | KeepNeurons] = []
    for block in unclear:
        if isinstance(block, Attention):
            whole = block.num_key_value_heads // 2 * block.groups or block.num_heads // 2
            edits.append(KeepHeads(block.name, tuple(range(max(1, whole)))))
        else:
            edits.append(KeepNeurons(block.name, tuple(range(max(1, block.size // 2)))))
    if not edits:
        return {}
    return {
        module: layout
        for v in _prove_all(model, resolve(model, Plan(edits)), None).values()
        for module, layout in v.layouts.items()
    }


def masks_in(owner: PreTrainedModel) -> Plan:
    """What the gates of a model hide, as a plan in the model's own numbering."""
    edits: list[KeepHeads | KeepNeurons] = []
    structure = discover(owner)
    for block in (*structure.attentions, *structure.ffns):
        module = owner.get_submodule(block.out)
        if is_gated(module) and bool((module.hfc_gate == 0).any()):  # type: ignore[union-attr]
            columns = module.hfc_gate.nonzero().flatten()  # type: ignore[operator]
            if isinstance(block, Attention):
                edits.append(KeepHeads(block.name, tuple((columns // block.head_dim).unique().tolist())))
            else:
                edits.append(KeepNeurons(block.name, tuple(columns.tolist())))
    return Plan(edits)


def _joined(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(old or {})
    for key, value in new.items():
        joined[key] = {**joined.get(key, {}), **value} if isinstance(value, dict) else value
    return joined


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    return inner if isinstance(inner, nn.Module) else model


# --- refusals ----------------------------------------------------------------------------------------------------


def _check_modules(model: nn.Module, cuts: list[Cut]) -> None:
    """Refuse modules whose weights are not simply theirs."""
    for cut in cuts:
        for part in cut.block.parts:
            module = model.get_submodule(part.module)
            if parametrize.is_parametrized(module):
                raise CompressionError(
                    f"{part.module!r} is parametrized; its weight is computed and cannot be cut. Make it permanent first: "
                    "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
                )
            if any(isinstance(h, prune.BasePruningMethod) for h in module._forward_pre_hooks.values()):
                raise CompressionError(
                    f"{part.module!r} is masked by torch.nn.utils.prune; make that permanent first: "
                    "torch.nn.utils.prune.remove(module, 'weight')."
                )
            if part.parameter is None and not is_plain_linear(module):
                raise CompressionError(
                    f"{part.module!r} is a {type(module).__module__}.{type(module).__name__}, not a plain Linear, so its "
                    "weight cannot be sliced. Cut before quantizing or adding adapters, or merge them first."
                )


def _check_adapters(model: nn.Module) -> None:
    """Refuse models with adapters: what is saved of them is the adapter alone."""
    for module in model.modules():
        if hasattr(module, "peft_config") or getattr(module, "_hf_peft_config_loaded", False):
            raise CompressionError(
                f"{type(module).__name__} carries adapters; saving it would save them and not the cut. Merge them first "
                "(merge_and_unload()), or cut the base model before adding any."
            )


def _check_masks(model: nn.Module, cuts: list[Cut]) -> None:
    """Refuse to cut under a mask that hides what the plan keeps: it would be lost with the columns around it."""
    for name, layer in model.named_modules():
        if _skip in layer._forward_hooks.values():
            raise CompressionError(f"The layer {name!r} is masked; remove that mask first (Mask.remove()), then cut.")
    for cut in cuts:
        module = model.get_submodule(cut.block.out)
        if is_gated(module) and bool(((module.hfc_gate == 0) & (cut.gate().to(module.hfc_gate.device) == 1)).any()):  # type: ignore
            raise CompressionError(
                f"{cut.block.name!r} is masked, and the plan keeps some of what the mask hides. Remove the mask first "
                "(Mask.remove()), or put everything that is masked into the plan."
            )


def _check_sharing(model: nn.Module, cuts: list[Cut]) -> None:
    """Refuse weights that another module uses as well: cutting one would untie or break the other."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for cut in cuts:
        for part in cut.block.parts:
            module = model.get_submodule(part.module)
            for key, parameter in module.named_parameters(recurse=False):
                places = {id(model.get_submodule(n.rpartition(".")[0])) for n in users.get(id(parameter), [])}
                if len(places) > 1 and (part.parameter is None or key == part.parameter):
                    raise CompressionError(
                        f"{part.module}.{key} is shared with {sorted(users[id(parameter)])}; cutting it for "
                        f"{cut.block.name!r} would change them too. Untie them first, or leave it out of the plan."
                    )


# --- proof -------------------------------------------------------------------------------------------------------


def _prove_all(model: nn.Module, resolved: Resolved, inputs: Mapping[str, Any] | None) -> dict[str, Variant]:
    with probing(model, inputs) as run:
        if resolved.removed:
            _try_layers(model, resolved, run)
        if not resolved.cuts:
            return {}
        try:
            return prove(model, resolved.cuts, run, lambda: Mask(model, resolved))
        except CompressionError:
            raise
        except Exception as error:  # whatever a model does on a copy of its part: no proof, so no cut
            raise CompressionError(
                f"Cannot prove the cut of this {type(model).__name__}, so nothing was changed: {type(error).__name__}: {error}"
            ) from error


def _try_layers(model: nn.Module, resolved: Resolved, run: Callable[..., list[Any]]) -> None:
    """Remove the layers, run, put them back: it must be the function in which they are skipped, with a cache and without."""
    skipped = Resolved(resolved.structure, layers=resolved.layers)
    reason = ""
    undo: Undo = []
    try:
        with Mask(model, skipped):
            expected = tensors_in(run())
        remove_layers_(model, resolved.removed, undo)
        for cache in (False, True):
            got = tensors_in(run(cache))
            if len(got) != len(expected) or any(
                difference(a, b) > tolerance(a.dtype) for (_, a), (_, b) in zip(expected, got, strict=True)
            ):
                reason = "removing them gives another function than skipping them"
    except Exception as error:  # layers that others depend on break a forward in any way
        reason = f"without them it fails with {type(error).__name__}: {error}"
    finally:
        while undo:
            undo.pop()()
    if reason:
        raise CompressionError(
            f"Cannot remove these layers of {', '.join(resolved.removed)} exactly, so nothing was changed: {reason}. "
            "Keep the layers that others depend on (usually the first)."
        )


# --- the record --------------------------------------------------------------------------------------------------


def _local(name: str, owner: str) -> str | None:
    if not owner:
        return name
    return name[len(owner) + 1 :] if name.startswith(f"{owner}.") else None


def _stamp(
    owner: PreTrainedModel,
    name: str,
    plan: Plan,
    record: Mapping[str, Any],
    removed: Mapping[str, tuple[int, ...]],
    numbers_before: Mapping[str, Any],
    undo: Undo,
) -> None:
    """Write into the config what a loader needs: nothing but numbers where that is enough, the layout otherwise."""
    config = owner.config
    before = compression_of(config)
    mine = {_local(k, name): v for k, v in record.items() if _local(k, name) is not None}
    gone = {_local(k, name): v for k, v in removed.items() if _local(k, name) is not None}
    layout = merge(before.layout if before else None, mine, gone)  # type: ignore[arg-type]
    edits = (before.plan if before else Plan()) + plan
    state = dict(config.__dict__)

    def restore() -> None:
        config.__dict__.clear()
        config.__dict__.update(state)

    undo.append(restore)
    masks = None
    if before is not None and before.masks is not None:  # from the middle of a training: what is not cut stays masked
        masks, gates = masks_in(owner), gates_of(owner)
        layout = {**layout, "gates": gates}
        if not gates:
            masks, layout = None, {k: v for k, v in layout.items() if k != "gates"}
    if gone:
        _record_layers(owner, layout, gone, numbers_before, undo)  # type: ignore[arg-type]
    structure = discover(owner)
    stock = None if layout.get("layers") or masks else stock_numbers(owner, structure, layout["modules"])
    if stock is not None:
        layout = None
        config.__dict__.pop("quantization_config", None)
        parts = dict(config_parts(owner))
        for key, value in stock.items():
            part, _, attribute = key.rpartition(".")
            target = parts[part]
            was = target.__dict__.get(attribute)
            undo.append(lambda t=target, a=attribute, v=was: t.__dict__.__setitem__(a, v))
            setattr(target, attribute, value)
    else:
        if not any("shapes" in entry for entry in layout["modules"].values()):
            _lock(owner, layout, undo)
        hidden = None if masks is None else masks.to_dict(spans=True)
        config.quantization_config = HfCompressConfig(plan=edits.to_dict(spans=True), layout=layout, masks=hidden)
    place = unrecorded(owner, layout)
    if place is not None:
        raise CompressionError(
            f"Nothing was changed: this cut of {type(owner).__name__} could not be saved so that it loads again ({place} would "
            "differ). Leave the layers or blocks that it depends on out of the plan."
        )


def _record_layers(
    owner: PreTrainedModel, layout: dict, gone: Mapping[str, tuple[int, ...]], numbers: Mapping[str, Any], undo: Undo
) -> None:
    """Where the layers that stay are not what a shorter config builds, say which of the base model's they are."""
    known = layout.get("layers", {})
    stock = skeleton(owner)
    if not known and stock is not None and layers_differ(owner, stock, tuple(gone), layout["modules"]) is None:
        return
    kept = {path: [known[path][i] for i in now] if path in known else list(now) for path, now in gone.items()}
    layout["layers"] = {**known, **kept}
    layout.setdefault("numbers", {k: v for k, v in numbers.items() if _value(owner, k) != v})


def _value(owner: PreTrainedModel, key: str) -> Any:
    part, _, attribute = key.rpartition(".")
    return vars(dict(config_parts(owner))[part]).get(attribute)


def _lock(owner: PreTrainedModel, layout: dict, undo: Undo) -> None:
    """Nothing in this checkpoint has another shape, so one weight gets one on disk: it must not load without us."""
    inside = tuple(layout.get("layers", {})) or ("",)
    structure = discover(owner)
    outs = {block.out for block in (*structure.attentions, *structure.ffns)}  # those carry gates
    for name, module in owner.named_modules():
        if (
            name not in outs
            and type(module) in (nn.Linear, LockedLinear)
            and any(not p or name.startswith(f"{p}.") for p in inside)
        ):
            if type(module) is nn.Linear:
                undo.append(lambda m=module: setattr(m, "__class__", nn.Linear))
                module.__class__ = LockedLinear
            layout["modules"].setdefault(name, {})["lock"] = True
            return
    raise CompressionError(f"{type(owner).__name__} has no Linear that could mark the checkpoint as compressed.")
