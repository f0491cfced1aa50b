"""Early exits in a model: attached in place, rows that are sure leave the batch, losses of all exits joined in training.

Each layer's class is swapped for a subclass of the same name, in place, so that names, state dict keys, hooks, recorded
outputs and `_no_split_modules` stay. The layers share one `Exits` object with the model; what belongs to one forward pass
(`leaving.Pass`) hangs on it from the model's forward pre-hook to its forward hook. Nothing refers to the model, so a copy
of a layer stays small and a copy of the model is independent.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..edits import CompressionError, shown
from .criteria import check_criterion, check_threshold
from .heads import ExitHead
from .hooks import Exits, begin, end
from .leaving import Steps
from .options import check_options, each_exit


class _ExitingLayer:
    """A layer that lets the pass of the moment, if there is one, decide which rows it sees.

    `__call__` and not `forward`: gradient checkpointing wraps `forward` and would run an exit twice.
    """

    _exits: Exits
    _exit_places: tuple[int, ...]  # where it stands among the steps of all layers: once, or each time that it runs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = self._exits.now
        if now is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return now.step(self._exit_places, super().__call__, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # this class is found under no name, so what is written is the class that it was made from
        _, _, *state = super().__reduce_ex__(max(2, protocol))  # type: ignore[misc]
        return (_blank, (PLAIN[type(self)],), *state)


EXITING: dict[type, type] = {}  # a layer's class -> its subclass that exits
PLAIN: dict[type, type] = {}


def _exiting(cls: type) -> type:
    if cls not in EXITING:
        EXITING[cls] = type(cls.__name__, (_ExitingLayer, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        EXITING[cls].__qualname__ = cls.__qualname__
        PLAIN[EXITING[cls]] = cls
    return EXITING[cls]


def _blank(cls: type) -> Any:
    """A layer that exits, with nothing in it: what a copy or a pickle begins with."""
    return object.__new__(_exiting(cls))


# Called with a model whose options have changed, or whose exits are gone: what writes them into its config adds itself here
# (it lies a level above).
CHANGED: list[Callable[[nn.Module], None]] = []


# --- attach and detach -------------------------------------------------------------------------------------------


def attach_exits_(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Put exit heads after some layers of a model, in place. Works on the meta device, where the heads stay empty.

    From then on, in eval mode, a row leaves the batch after the first exit that is sure of it; later layers run on fewer
    rows, and are skipped when none is left. The output is the model's own, with the logits of the exit in the rows that
    left. Exits that are never taken give the plain model's output to the bit. In training mode all rows go through all
    layers, and when labels are given the loss is the joint loss of all exits:

    `L = sum_k w_k ((1 - d) CE_k + d T^2 KL(final || exit_k)) + w_final L_final`, `sum w = 1`, with `d` = `distil`.

    Nobody leaves in a forward that asks for more than logits (`output_hidden_states`, `output_attentions`, a cache).

    Args:
        model (`nn.Module`): a transformers model for sequence or image classification.
        options (`dict`): JSON-ready, as `resolve_exits` makes them: `stack` (the list of layers, or of each layer the modules
            that it runs), `after`, `num_labels`, `hidden_size` and `pool` (for all exits, or one for each), `criterion`,
            `threshold`, `distil`, `temperature`, `weights`.

    Raises:
        CompressionError: an option means nothing, a layer is not there, or the model has exits already.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_compress.exits import attach_exits_, exit_layers, resolve_exits
    >>> _ = torch.manual_seed(0)
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    ... )).eval()
    >>> attach_exits_(model, resolve_exits(model, after=[0, 1], criterion="confidence", threshold=0.4))
    >>> logits = model(torch.tensor([[5, 6, 7], [8, 9, 10]])).logits  # of two classes, one always has p >= 0.5
    >>> exit_layers(model)
    tensor([0, 0])

    ```
    """
    options = check_options(options)
    if "_exits" in model.__dict__ or hasattr(model, "exit_heads"):
        raise CompressionError(f"This {type(model).__name__} has exits already; detach_exits_(model) takes them off.")
    modules, steps = steps_of(model, options)
    first = next((p for module in modules for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        raise CompressionError(f"{options['stack']!r} has no floating-point parameter that says which dtype its exits have.")
    depth = len(steps.ends)
    known = {id(module) for module in modules}
    around = tuple(
        name for name, outer in model.named_modules()
        if isinstance(outer, GradientCheckpointingLayer) and any(m is not outer and id(m) in known for m in outer.modules())
    )  # fmt: skip
    state = Exits(options, depth, steps, tuple(inspect.signature(model.forward).parameters), around)
    sizes, pools = (each_exit(options, key) for key in ("hidden_size", "pool"))
    with torch.device(first.device):
        heads = {
            str(i): ExitHead(size, options["num_labels"], how)
            for i, size, how in zip(options["after"], sizes, pools, strict=True)
        }
    std = getattr(getattr(model, "config", None), "initializer_range", None) or 0.02
    for head in heads.values():
        nn.init.normal_(head.out.weight, std=std)
        nn.init.zeros_(head.out.bias)
    model.exit_heads = nn.ModuleDict(heads).to(first.dtype).train(model.training)
    model.__dict__["_exits"] = state
    for module in dict.fromkeys(modules):
        places = tuple(place for place, other in enumerate(modules) if other is module)
        module.__dict__.update(_exits=state, _exit_places=places)
        module.__class__ = _exiting(type(module))
    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True, always_call=True)


def detach_exits_(model: nn.Module) -> None:
    """Take heads, hooks and class swaps off again: the model that was there before.

    The exits leave the model's compression record too, and a record that holds nothing else leaves its config: what is then
    saved is the checkpoint that the model would have given without exits.

    Args:
        model (`PreTrainedModel`): a model with exits, changed in place.

    Raises:
        CompressionError: the model has no exits.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> import hf_compress as hc
    >>> model = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> _ = hc.apply_(model, hc.Plan([hc.AddExits([0, 1])]))
    >>> hasattr(model.config, "quantization_config"), list(model.exit_heads)
    (True, ['0', '1'])
    >>> hc.detach_exits_(model)
    >>> hasattr(model.config, "quantization_config"), hasattr(model, "exit_heads")
    (False, False)

    ```
    """
    model = exiting(model)
    state = _state(model)
    for layer in model.modules():
        if layer.__dict__.get("_exits") is state and type(layer) in PLAIN:
            layer.__class__ = PLAIN[type(layer)]
            del layer.__dict__["_exits"], layer.__dict__["_exit_places"]
    del model.__dict__["_exits"], model.exit_heads
    # by function: the handles of a copied model refer to the original's hooks
    for hooks, name in ((model._forward_pre_hooks, "_forward_pre_hooks"), (model._forward_hooks, "_forward_hooks")):
        for key in [key for key, hook in hooks.items() if hook in (begin, end)]:
            del hooks[key]
            for flags in (f"{name}_with_kwargs", f"{name}_always_called"):
                getattr(model, flags, {}).pop(key, None)
    for changed in CHANGED:
        changed(model)


def steps_of(model: nn.Module, options: Mapping[str, Any]) -> tuple[list[nn.Module], Steps]:
    """The modules that the layers run, one for each step; what is known of them as steps.

    Raises:
        CompressionError: they are not in this model, or are too few.
    """
    stack, last = options["stack"], options["after"][-1]
    if isinstance(stack, str):
        try:
            layers = model.get_submodule(stack)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise CompressionError(
                f"{stack!r} is no list of layers in this {type(model).__name__}; discover(model) prints its stacks."
            )
        if len({id(layer) for layer in layers}) != len(layers):
            raise CompressionError(f"Layers of {stack!r} are shared; an exit would sit after several of them.")
        modules, steps = list(layers), Steps([""] * len(layers), {i: i for i in range(len(layers))})
    else:
        names = [name for layer in stack for name in layer]
        known = dict(model.named_modules())
        missing = next((name for name in names if name not in known), None)
        if missing is not None:
            raise CompressionError(
                f"{missing!r}, a part of a layer that exits were to sit after, is not in this {type(model).__name__}."
            )
        modules, at = [known[name] for name in names], -1
        steps = Steps(names, {(at := at + len(layer)): i for i, layer in enumerate(stack)})
    if last >= len(steps.ends) - 1:
        raise CompressionError(
            f"Exits after layers {options['after']}: {_shown(stack)} has {len(steps.ends)} layers, so an exit can sit after "
            f"layer 0 to {len(steps.ends) - 2} (the last layer has the model's own head)."
        )
    return modules, steps


def _shown(stack: Any) -> str:
    return repr(stack) if isinstance(stack, str) else f"the model ({stack[0][-1]} to {stack[-1][-1]})"


# --- read and change ---------------------------------------------------------------------------------------------


def exiting(model: Any) -> Any:
    """The model that would have the exits: the one inside torch.compile; refused if it is no model."""
    if not isinstance(model, nn.Module):
        raise CompressionError(f"Expected a model (a torch.nn.Module) with exits, got {type(model).__name__}.")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _state(model: Any) -> Exits:
    model = exiting(model)
    state = model.__dict__.get("_exits")
    if state is None:
        inside = next((name for name, module in model.named_modules() if "exit_heads" in module._modules), None)
        do = f"its part {inside!r} has: pass that" if inside else "add some with AddExits or EarlyExitCallback"
        raise CompressionError(f"This {type(model).__name__} has no exits; {do}.")
    return state


def exit_options(model: nn.Module) -> dict[str, Any] | None:
    """The options of a model's exits as they are now, JSON-ready (`attach_exits_` takes them); None where it has none.

    Raises:
        CompressionError: it is no model.
    """
    state = exiting(model).__dict__.get("_exits")
    return None if state is None else copy.deepcopy(state.options)


def exit_layers(model: nn.Module) -> torch.Tensor:
    """The layer after which each row of the last forward pass left: (rows,), the last layer's index if it never did.

    Raises:
        CompressionError: the model has no exits, or has not run yet.
    """
    left = _state(model).left
    if left is None:
        raise CompressionError("No forward pass to report on: run the model first.")
    return left


def set_exits_(
    model: nn.Module,
    *,
    criterion: str | None = None,
    threshold: float | list[float] | None = None,
    enabled: bool | None = None,
) -> None:
    """Change when rows leave; what is not given stays. Criterion and threshold are saved with the model.

    Args:
        criterion (`str`, *optional*): `"entropy"`, `"confidence"` or `"patience"`; needs a `threshold` of its own.
        threshold (`float` or `list`, *optional*): for all exits, or one for each.
        enabled (`bool`, *optional*): whether rows leave at all. Not saved: a loaded model's exits are on.

    Raises:
        CompressionError: a value means nothing, or the model has no exits.
    """
    model = exiting(model)
    state = _state(model)
    options = dict(state.options)
    if criterion is not None and criterion != options["criterion"]:
        options["criterion"] = check_criterion(criterion)
        if threshold is None:
            raise CompressionError(
                f"A threshold of {state.options['criterion']!r} means nothing to criterion={criterion!r}; give both."
            )
    if threshold is not None:
        sizes = options["num_labels"], len(options["after"])
        options["threshold"] = check_threshold(options["criterion"], threshold, *sizes)
    if enabled is not None and not isinstance(enabled, bool):
        raise CompressionError(f"enabled is True or False, got {shown(enabled)}.")
    state.enabled = state.enabled if enabled is None else enabled
    _change(model, state, options)


def replace_options_(model: nn.Module, changed: Mapping[str, Any]) -> None:
    """Change options that say how exits are trained (`distil`, `temperature`, `weights`)."""
    state = _state(model)
    _change(model, state, check_options({**state.options, **changed}))


def _change(model: nn.Module, state: Exits, options: dict[str, Any]) -> None:
    if options != state.options:
        state.options = options
        for changed in CHANGED:
            changed(model)


@contextmanager
def exits_off(model: nn.Module) -> Iterator[None]:
    """No row leaves, and no loss is joined, in any module of `model` while this is open. Does nothing without exits."""
    states = [m.__dict__["_exits"] for m in model.modules() if "exit_heads" in m._modules and "_exits" in m.__dict__]
    before = [state.muted for state in states]
    try:
        for state in states:
            state.muted = True
        yield
    finally:
        for state, muted in zip(states, before, strict=True):
            state.muted = muted


@contextmanager
def collect_exits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that gets, from each forward pass, the logits of every exit and of the final layer: (exits + 1, rows, C).

    All rows go through all layers meanwhile.
    """
    state = _state(model)
    before, state.collected = state.collected, []
    try:
        yield state.collected
    finally:
        state.collected = before


def take_exit_losses(model: nn.Module) -> dict[str, torch.Tensor]:
    """Mean cross-entropy of each exit (`exit_loss_<layer>`) and of the final layer since the last call; empty if none.

    Over the batches in which its layer ran; not a number where there was none.
    """
    state = _state(model)
    state.reached = None
    if state.loss_sum is None:
        return {}
    names = [f"exit_loss_{i}" for i in state.options["after"]] + ["final_loss"]
    means = state.loss_sum / state.loss_count  # not a number where no batch had labels
    state.loss_sum, state.loss_count = None, 0
    return dict(zip(names, means, strict=True))
