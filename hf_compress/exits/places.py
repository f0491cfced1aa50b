"""Where exits can sit in a model, what its layers give there, and what heads should read of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..discover import Layer, discover
from ..edits import CompressionError
from ..probe import NoInputs, example_inputs, quiet_run
from .chain import find_chain
from .heads import tokens_to_read
from .leaving import main_of
from .rows import more_rows
from .trees import mapped


@dataclass
class Places:
    stack: str | list[list[str]]  # the list of layers, or of each layer the modules that it runs
    shapes: list[torch.Size]  # of the hidden states after each layer
    sides: list[int]  # 0, or 1 for the layers of the decoder of two
    reads: str  # "last" where the model's own head reads the last real token alone, else "mean"
    tokens: list[bool] | None  # whether each layer sees one entry for each token; None where there are no token ids

    @property
    def depth(self) -> int:
        return len(self.shapes)


def simple_stack(model: PreTrainedModel) -> tuple[Layer, ...]:
    """The one list of layers that the model has; empty if it has several, or none, or runs its layers more than once.

    A list in an entry of another one is a stage, and not all that there is.
    """
    stacks = discover(model).stacks
    layers = next(iter(stacks.values())) if len(stacks) == 1 else ()
    if any(any(word.isdigit() for word in layer.path.split(".")) for layer in layers):
        return ()
    told = getattr(model.config, "num_hidden_layers", len(layers))
    return () if isinstance(told, int) and told > len(layers) else layers


def find_places(model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> Places:
    """Run a model on a small batch, and see after which of its modules an exit can sit.

    Raises:
        CompressionError: it is no classifier of rows, or there is no such place.
        NoInputs: there are no inputs that it runs on.
    """
    try:
        return _places(model, inputs)
    except CompressionError:
        raise
    except Exception as error:  # a model may refuse an input in any way
        raise NoInputs(
            f"{type(model).__name__} does not run on small inputs ({type(error).__name__}: {error}); pass inputs=... (a batch "
            "that it runs on)."
        ) from error


def _places(model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> Places:
    name, labels = type(model).__name__, model.config.num_labels  # type: ignore[union-attr]
    layers = simple_stack(model)
    stack: Any = layers[0].path if layers else []
    names = [layer.name for layer in layers]
    batch = small_batch(model, inputs)
    shapes, gradient, logits = _run(model, names, batch)
    rows = rows_of(model, batch)
    if not isinstance(logits, torch.Tensor) or logits.shape != (rows, labels):
        got = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else "no logits"
        raise CompressionError(
            f"Exits need a model that gives one row of {labels} class logits for each input; {name} gives {got} for {rows} "
            "rows. Sequence and image classification are offered; token classification, question answering, multiple choice "
            "and generation are not."
        )
    sides = [0] * len(names)
    if len(shapes) != len(names) or len(set(shapes)) != 1 or len(shapes[0]) != 3 or shapes[0][0] != rows:
        chain = find_chain(model, batch, longer_batch(model, batch))
        one_list, stack, shapes, sides = shapes, chain.layers, chain.shapes, chain.sides
        if len(stack) < 2 and chain.passed_by:
            raise CompressionError(
                f"{name} calls the forward of its layers ({chain.passed_by}, ...) and not the layers, so that nothing can "
                "stand between them; exits are not offered."
            )
        if len(stack) < 2 and rows in (seen := {shape[1] for shape in one_list if len(shape) == 3}) and len(seen) == 1:
            raise CompressionError(
                f"The layers of {name} give {tuple(one_list[0])} for {rows} rows: the batch does not come first there, and "
                "exits are not offered."
            )
        if len(stack) < 2:
            raise CompressionError(
                f"{name} has no layers that an exit could sit after: an exit needs a place, where an entry of a list of "
                "modules ends, at which all that the model has made of its input passes in one tensor; exits are not offered."
            )
        _, gradient, _ = _run(model, [step for layer in stack for step in layer], batch)
    return Places(stack, shapes, sides, _reads(model, gradient, batch), _sees_tokens(model, stack, shapes, batch))


def small_batch(model: Any, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What exits are tried on."""
    return {k: v for k, v in (example_inputs(model) if inputs is None else inputs).items() if k != "labels"}


def longer_batch(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with more rows that the model runs on."""
    for more, _ in more_rows(batch, rows_of(model, batch)):
        try:
            with quiet_run(model) as run:
                run(more)
        except Exception:  # it packs pictures of all rows, say
            continue
        return more
    return dict(batch)


def rows_of(model: Any, batch: Mapping[str, Any]) -> int:
    """How many rows a batch has."""
    named = [batch.get(name) for name in ("input_ids", getattr(model, "main_input_name", "input_ids"))]
    return next(v.shape[0] for v in (*named, *batch.values()) if isinstance(v, torch.Tensor) and v.ndim)


def _run(model: nn.Module, names: list[str], batch: Mapping[str, Any]) -> tuple[list[torch.Size], Any, Any]:
    """The shapes of what modules give, the gradient of the logits by what the last gives, and the logits."""
    shapes: list[torch.Size] = []
    last: list[torch.Tensor] = []
    calls: dict[str, int] = {name: names.count(name) for name in names}

    def tap(name: str) -> Any:
        def hook(module: nn.Module, args: Any, outputs: Any) -> Any:
            hidden = main_of(outputs)
            shapes.append(hidden.shape)
            calls[name] -= 1
            if name != names[-1] or calls[name]:
                return outputs
            last[:] = [hidden.detach().requires_grad_()]
            given = last[0].clone()  # a model may write into what a layer gave
            return mapped(outputs, lambda path, tensor: given if tensor is hidden else tensor)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(tap(name)) for name in calls]
    try:
        with quiet_run(model) as run, torch.inference_mode(False), torch.enable_grad():
            logits = getattr(run(batch), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    gradient = None
    if last and isinstance(logits, torch.Tensor) and logits.grad_fn is not None:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), last[0], allow_unused=True)
    return shapes, gradient, logits


def _reads(model: PreTrainedModel, gradient: torch.Tensor | None, batch: Mapping[str, Any]) -> str:
    """ "last" where the logits have a gradient by one token of each row alone, and that is the last real one."""
    if gradient is None or gradient.is_meta or gradient.ndim != 3 or gradient.shape[1] < 2:
        return "mean"
    read = gradient.abs().sum(-1) > 0
    positions = tokens_to_read(model.config, "last", batch)
    last = torch.full((len(read),), read.shape[1] - 1) if positions is None else positions.clamp_max(read.shape[1] - 1).cpu()
    one = nn.functional.one_hot(last.long(), read.shape[1]).bool()
    return "last" if torch.equal(read.cpu(), one) else "mean"


def _sees_tokens(model: PreTrainedModel, stack: Any, shapes: list[torch.Size], batch: Mapping[str, Any]) -> list[bool] | None:
    """Whether each layer sees as many positions as there are token ids: also with one token fewer (a window may just fit)."""
    ids = batch.get("input_ids", batch.get(getattr(model, "main_input_name", "input_ids")))
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return None
    count = ids.shape[1]
    found = [len(shape) == 3 and shape[1] == count for shape in shapes]
    if count > 1 and any(found):
        fewer = {
            k: v[:, 1:] if isinstance(v, torch.Tensor) and v.ndim > 1 and v.shape[1] == count else v for k, v in batch.items()
        }
        names = (
            [f"{stack}.{i}" for i in range(len(shapes))] if isinstance(stack, str) else [s for layer in stack for s in layer]
        )
        try:
            again, _, _ = _run(model, names, fewer)
        except Exception:  # a text of that length may not be allowed: then what was seen must do
            return found
        ends = range(len(shapes)) if isinstance(stack, str) else _ends(stack)
        found = [same and again[end][1] == count - 1 for same, end in zip(found, ends, strict=True)]
    return found


def _ends(stack: list[list[str]]) -> list[int]:
    found, at = [], -1
    for layer in stack:
        at += len(layer)
        found.append(at)
    return found


def what_heads_read(places: Places, after: list[int], pool: str | None) -> tuple[list[str], list[int]]:
    """For each exit, how it pools (as asked, or what suits the model), and the width of what it reads.

    Raises:
        CompressionError: feature maps have no first or last token, or it cannot be seen where their width lies.
    """
    maps = [shape for shape in places.shapes if len(shape) > 3]
    first = sum(_channels_first(shape) is True for shape in maps) >= sum(_channels_first(shape) is False for shape in maps)
    pools, sizes = [], []
    for index in after:
        shape = places.shapes[index]
        if len(shape) > 3:
            if pool in ("first", "last"):
                raise CompressionError(
                    f"pool={pool!r} reads one token; layer {index} gives feature maps of shape {tuple(shape)}. Use 'mean'."
                )
            if all(_channels_first(one) is None for one in maps):
                raise CompressionError(
                    f"The layers give feature maps of shape {tuple(shape)}, of which it cannot be told where the channels lie; "
                    "pass inputs=... with square images of another size."
                )
            how = "maps" if first else "mean"
        elif pool == "maps":
            raise CompressionError(
                f"pool='maps' reads feature maps (rows, channels, height, width); layer {index} gives {tuple(shape)}. "
                "Use 'mean'."
            )
        elif pool is not None:
            how = pool
        elif places.reads == "last" and places.sides[index] == max(places.sides):
            how = "last"
        else:
            how = "mean" if places.tokens is None or places.tokens[index] else "first"
        pools.append(how)
        sizes.append(shape[1] if how == "maps" else shape[-1])
    return pools, sizes


def _channels_first(shape: torch.Size) -> bool | None:
    """Of (rows, ...) feature maps of square images: whether the width comes before height and width; None if all are equal."""
    if shape[-1] == shape[-2] != shape[1]:
        return True
    return False if shape[1] == shape[2] != shape[-1] else None
