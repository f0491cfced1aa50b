"""What calibration data says of each output projection, layer by layer, of a model as it is and as it will be cut.

A model is walked in *segments*: the layers of its stacks where one hands its hidden states to the next and nothing else
changes on the way (which a run shows), and the model as a whole for all other blocks. The calls of a segment are kept, so a
layer is run again without what lies before it. What is held at a time, of all batches: the hidden states that enter one layer
of the model as it is and as it is cut, what the stream has after each of its blocks, and whatever else the layers of its stack
are given (masks, position biases).

A projection of a model that is partly cut is asked to make up for what the layers before it have lost as well: its target is
what the *dense* model has where its output is added to the residual stream, less what the cut model has there without it.
Where that is (the input of a norm, the output of the layer) is found by moving the projection's output a little and looking
for what moves by the same. Where there is no such place the target is the dense projection's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..cutting import Block
from ..discover import Structure
from ..edits import CompressionError
from ..grams import real_rows, real_tokens, unlabelled
from ..modules import dense_weight
from ..probe import difference, quiet_run, tensors_in, tolerance
from .surgeon import Moments

NO_TOKENS = "The calibration batches hold no real token: their attention_mask is 0 everywhere. Give batches with some."

Call = tuple[tuple[Any, ...], dict[str, Any]]
Place = tuple[str, str]  # (module in the segment, "in" or "out")


class _Stop(Exception):
    """All that was wanted of a run has been seen."""


@dataclass
class Segment:
    """A part of a model that runs by itself: a layer, or (`path` "") the whole."""

    path: str
    blocks: list[Block]
    stack: str = ""
    index: int = 0
    places: dict[str, Place | None] = field(default_factory=dict)  # by block: where its output is in the residual stream


@contextmanager
def weights(model: nn.Module, new: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]) -> Iterator[None]:
    """The model with other weights in some projections, by their names; (out, in) and (out,)."""
    before = []
    for name, (weight, bias) in new.items():
        module: Any = model.get_submodule(name)
        before.append((module, module.weight.data, None if bias is None else module.bias.data))
        module.weight.data = weight.T if isinstance(module, Conv1D) else weight
        if bias is not None:
            module.bias.data = bias
    try:
        yield
    finally:
        for module, weight, bias in reversed(before):
            module.weight.data = weight
            if bias is not None:
                module.bias.data = bias


class Calibration:
    """Calibration batches, and what a model computes of them segment by segment.

    Args:
        model (`nn.Module`): the model; eval mode and no gradients while something runs.
        structure (`Structure`): of the model.
        blocks (`Sequence`): the blocks whose projections are looked at.
        batches (`Sequence[dict]`): as for `model(**batch)`; labels are not read.

    Raises:
        CompressionError: the model does not run on a batch, or a block never ran.
    """

    def __init__(self, model: nn.Module, structure: Structure, blocks: Sequence[Block], batches: Sequence[Mapping[str, Any]]):
        self.model, self.blocks = model, list(blocks)
        self.batches = [unlabelled(model, batch) for batch in batches]
        for is_decoder in (False, True):
            masks = [real_tokens(model, batch, is_decoder) for batch in self.batches]
            if masks and all(mask is not None and not bool(mask.any()) for mask in masks):
                raise CompressionError(NO_TOKENS)
        self.modules = dict(model.named_modules())
        self.segments = self._segments(structure)
        self.calls: dict[tuple[str, bool], list[list[Call]]] = {}  # of a stack, dense or cut: layer -> batch -> call
        self.now: dict[tuple[str, bool], list[torch.Tensor]] = {}  # hidden states that the next layer is given, by batch

    def leave_out(self, names: Sequence[str]) -> None:
        """Look no longer at some blocks."""
        self.blocks = [block for block in self.blocks if block.name not in names]
        for segment in self.segments:
            segment.blocks = [block for block in segment.blocks if block.name not in names]

    # --- segments ------------------------------------------------------------------------------------------------

    def _segments(self, structure: Structure) -> list[Segment]:
        stacks: dict[str, list[str]] = {}
        for layer in structure.layers:
            stacks.setdefault(layer.path, []).append(layer.name)
        runs: list[dict[str, list[tuple[Call, Any]]]] = []
        order: list[str] = []  # layers and projections, as they run

        def note(name: str, args: Any, kwargs: Any, output: Any) -> None:
            order.append(name)
            runs[-1].setdefault(name, []).append(((args, kwargs), output))

        layers = {name for names in stacks.values() for name in names}
        with ExitStack() as hooks:
            for name in layers:
                hook = self.modules[name].register_forward_hook(lambda _m, a, k, o, n=name: note(n, a, k, o), with_kwargs=True)
                hooks.callback(hook.remove)
            for block in self.blocks:
                hook = self.modules[block.out].register_forward_hook(lambda *_, n=block.out: order.append(n))
                hooks.callback(hook.remove)
            for batch in (self.batches[0], self.batches[-1]):
                runs.append({})
                self._forward(batch)
        missing = [block.name for block in self.blocks if block.out not in order]
        if missing:
            raise CompressionError(
                f"{missing[0]!r} (of {len(missing)} blocks) does not run on the calibration batches; pass batches that use it."
            )
        segments: list[Segment] = []
        left = sorted(self.blocks, key=lambda block: order.index(block.out))
        for path, names in stacks.items():
            if not self._is_chain(names, runs):
                continue
            for i, name in enumerate(names):
                mine = [block for block in left if block.out.startswith(f"{name}.")]
                segments.append(Segment(name, mine, path, i))
                left = [block for block in left if block not in mine]
        segments.sort(key=lambda segment: order.index(segment.path))
        return ([Segment("", left)] if left else []) + segments

    def _is_chain(self, names: list[str], runs: Sequence[Mapping[str, list[tuple[Call, Any]]]]) -> bool:
        """Whether every layer runs once, on what the one before gave, and run again one by one they give what they gave.

        Layers that tell each other something in another way (keys and values that they share) do not: what the last batch left
        behind is there for all.
        """
        if any(len(seen.get(name, ())) != 1 for seen in runs for name in names):
            return False
        hidden = [_hidden_in(seen[names[0]][0][0]) for seen in runs]
        if any(h is None for h in hidden):
            return False
        try:
            with quiet_run(self.model):
                for name in names:
                    for i, seen in enumerate(runs):
                        (call, output) = seen[name][0]
                        taken, given = _hidden_in(call), hidden[i]
                        if taken is None or given is None or taken.shape != given.shape or not torch.equal(taken, given):
                            return False
                        args, kwargs = _with_hidden(*_without_hidden(*call), given)
                        again, made = _hidden_of(self.modules[name](*args, **kwargs)), _hidden_of(output)
                        if again is None or made is None or difference(made, again) > tolerance(made.dtype):
                            return False
                        hidden[i] = made
        except Exception:  # a layer that does not run by itself
            return False
        return True

    # --- running -------------------------------------------------------------------------------------------------

    def placed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch where the model is."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def _forward(self, batch: Mapping[str, Any]) -> Any:
        batch = self.placed(batch)
        try:
            with quiet_run(self.model) as run:
                return run(batch)
        except (_Stop, CompressionError):
            raise
        except Exception as error:  # a model may refuse a batch in any way
            raise CompressionError(
                f"{type(self.model).__name__} does not run on a calibration batch ({', '.join(map(str, batch))}): "
                f"{type(error).__name__}: {error}"
            ) from error

    def begin(self, segment: Segment, cut: bool) -> None:
        """Before the first layer of a stack: run the model as it is now, and keep what its layers are given."""
        if not segment.path or segment.index:
            return
        names = [s.path for s in self.segments if s.stack == segment.stack]
        calls: list[list[Call]] = [[] for _ in names]
        with ExitStack() as hooks:
            for i, name in enumerate(names):
                hook = self.modules[name].register_forward_pre_hook(
                    lambda _m, a, k, i=i: calls[i].append(_without_hidden(a, k) if i else (a, k)), with_kwargs=True
                )
                hooks.callback(hook.remove)
            for batch in self.batches:
                self._forward(batch)
        self.calls[segment.stack, cut] = calls
        self.now[segment.stack, cut] = [_hidden_in(call) for call in calls[0]]  # type: ignore[misc]
        calls[0] = [_without_hidden(*call) for call in calls[0]]

    def share(self, segment: Segment) -> None:
        """As `begin`, for a cut model in which nothing has been cut yet."""
        if segment.path and not segment.index:
            self.calls[segment.stack, True] = self.calls[segment.stack, False]
            self.now[segment.stack, True] = list(self.now[segment.stack, False])

    def run(self, segment: Segment, cut: bool) -> Iterator[tuple[int, Any]]:
        """Run a segment on every batch: (batch, output), or None where it was stopped."""
        for i, batch in enumerate(self.batches):
            try:
                yield i, self._run_one(segment, cut, i, batch)
            except _Stop:
                yield i, None

    def _run_one(self, segment: Segment, cut: bool, i: int, batch: Mapping[str, Any]) -> Any:
        if not segment.path:
            return self._forward(batch)
        args, kwargs = self.calls[segment.stack, cut][segment.index][i]
        args, kwargs = _with_hidden(args, kwargs, self.now[segment.stack, cut][i])
        module = self.modules[segment.path]
        with quiet_run(self.model):  # eval mode, no gradients
            return module(*args, **kwargs)

    def advance(self, segment: Segment) -> None:
        """What this layer of the cut model gives is what the next one is given. (Of the dense model, see `targets`.)"""
        if segment.path and not self._is_last(segment):
            self.now[segment.stack, True] = [_hidden_of(output) for _, output in self.run(segment, True)]  # type: ignore[misc]

    def end(self, segment: Segment) -> None:
        """After the last layer of a stack: keep nothing of what its layers were given."""
        if segment.path and self._is_last(segment):
            for cut in (False, True):
                self.calls.pop((segment.stack, cut), None)
                self.now.pop((segment.stack, cut), None)

    def _is_last(self, segment: Segment) -> bool:
        return segment.index == max(s.index for s in self.segments if s.stack == segment.stack)

    # --- what is seen --------------------------------------------------------------------------------------------

    def rows(self, tensor: torch.Tensor, block: Block, batch: int) -> torch.Tensor:
        """A tensor as rows, without those of padding."""
        mask = real_tokens(self.model, self.batches[batch], "decoder" in block.name.split("."))
        return real_rows(tensor, mask)

    def place(self, segment: Segment, block: Block) -> Place | None:
        """Where the output of a block's projection is in the residual stream (see the module's docstring)."""
        if block.name not in segment.places:
            segment.places[block.name] = self._find_place(segment, block)
        return segment.places[block.name]

    def _find_place(self, segment: Segment, block: Block) -> Place | None:
        scope = self.modules[segment.path]
        own: list[torch.Tensor] = []
        seen: list[dict[Place, torch.Tensor]] = []
        moved: list[torch.Tensor] = []

        def move(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            own.append(output.detach().clone())
            if len(seen) == 1:
                return output
            # more than additions round off where the stream is large (in half precision, or with outliers)
            most = max((float(tensor.abs().max()) for tensor in seen[0].values()), default=0.0)
            rounding = 4 * torch.finfo(output.dtype).eps * (most if most < float("inf") else 0.0) / tight(output)
            amount = max(0.1 * float(output.float().std()), rounding, 1e-5)
            draw = torch.Generator().manual_seed(len(own))
            noise = (torch.randn(output.shape, generator=draw) * amount).to(output)
            moved.append(noise.float())
            return output + noise

        def tight(output: torch.Tensor) -> float:
            return 1e-3 if output.dtype == torch.float32 else 5e-2

        def note(name: str, side: str, value: Any) -> None:
            tensor = next((t for _, t in tensors_in(value)), None)
            if own and tensor is not None and tensor.shape == own[0].shape and (name, side) not in seen[-1]:
                seen[-1][name, side] = tensor.detach().clone()

        with ExitStack() as hooks:
            hooks.callback(self.modules[block.out].register_forward_hook(move).remove)
            for name, module in scope.named_modules():
                full = f"{segment.path}.{name}".strip(".") if name else segment.path
                if full == block.out:
                    continue
                pre = module.register_forward_pre_hook(
                    lambda _m, a, k, n=name: note(n, "in", a if a else list(k.values())), with_kwargs=True
                )
                hooks.callback(pre.remove)
                hooks.callback(module.register_forward_hook(lambda _m, _a, o, n=name: note(n, "out", o)).remove)
            for _ in range(2):
                seen.append({})
                own.clear()
                self._run_one(segment, False, 0, self.batches[0])
                if len(own) != 1:  # it runs several times: what is added where is not told apart
                    return None
                output = own[0]
        for place, tensor in seen[1].items():
            if place in seen[0]:
                step = tensor.float() - seen[0][place].float()
                if (step - moved[0]).abs().max() <= tight(output) * moved[0].abs().max() and not torch.equal(
                    seen[0][place], output
                ):
                    return place
        return None

    @contextmanager
    def watching(self, segment: Segment, block: Block, see: Callable[..., None], stop: bool) -> Iterator[None]:
        """`see(x, y, stream)` for every run of a block's projection: what enters, what leaves, what the stream then is."""
        place = self.place(segment, block)
        held: list[tuple[torch.Tensor, torch.Tensor]] = []

        def at_out(_module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if place is None:
                see(args[0], output, None)
                if stop and segment.path:  # in the whole model, others may call it again
                    raise _Stop
            else:
                held.append((args[0], output))

        def at_place(value: Any) -> None:
            tensor = next((t for _, t in tensors_in(value)), None)
            if held and tensor is not None and tensor.shape == held[0][1].shape:
                see(*held.pop(), tensor)
                if stop:
                    raise _Stop

        with ExitStack() as hooks:
            hooks.callback(self.modules[block.out].register_forward_hook(at_out).remove)
            if place is not None:
                module = self.modules[f"{segment.path}.{place[0]}".strip(".")]
                if place[1] == "in":
                    hook: Any = module.register_forward_pre_hook(
                        lambda _m, a, k: at_place(a if a else list(k.values())), with_kwargs=True
                    )
                else:
                    hook = module.register_forward_hook(lambda _m, _a, o: at_place(o))
                hooks.callback(hook.remove)
            yield

    def moments(self, segment: Segment, blocks: Sequence[Block]) -> dict[str, Moments]:
        """Of some blocks of a segment of the model as it is: what enters their projections, beside their own output.

        Once, for all blocks of a layer, as `targets`.
        """
        found: dict[str, Moments] = {}
        now = [0]

        def see(block: Block, x: torch.Tensor) -> None:
            module = self.modules[block.out]
            x = self.rows(x, block, now[0])
            moments = found.setdefault(block.name, Moments.empty(x.shape[1], len(dense_weight(module)), x.device))
            moments.add_inputs_(x)

        with ExitStack() as hooks:
            for block in blocks:
                hook = self.modules[block.out].register_forward_hook(lambda _m, a, _o, b=block: see(b, a[0]))
                hooks.callback(hook.remove)
            outputs = []
            for i, output in self.run(segment, False):
                now[0] = i + 1
                outputs.append(_hidden_of(output) if segment.path else None)
        if segment.path:
            self.now[segment.stack, False] = outputs  # type: ignore[assignment]
        for block in blocks:
            module: Any = self.modules[block.out]
            reduce_(found[block.name])
            found[block.name].of_own_output_(dense_weight(module), getattr(module, "bias", None))
        return found

    def targets(self, segment: Segment, blocks: Sequence[Block]) -> dict[str, list[torch.Tensor]]:
        """Of some blocks of a segment of the dense model: what the stream has where their output is added, by run.

        Once, for all blocks of a layer: the dense model goes on to the next one.
        """
        found: dict[str, list[torch.Tensor]] = {block.name: [] for block in blocks}
        for block in blocks:  # now: finding it runs the segment
            self.place(segment, block)
        with ExitStack() as stack:
            for block in blocks:
                see = lambda _x, y, s, n=block.name: found[n].append(y if s is None else s)  # noqa: E731
                stack.enter_context(self.watching(segment, block, see, stop=False))
            outputs = [_hidden_of(output) for _, output in self.run(segment, False)]
        if segment.path:
            self.now[segment.stack, False] = outputs  # type: ignore[assignment]
        return found

    def regression(self, segment: Segment, block: Block, targets: Sequence[torch.Tensor]) -> Moments:
        """Of one block of the model as it is cut now: what enters its projection, beside what should leave it."""
        module = self.modules[block.out]
        found: list[Moments] = []
        at = iter(targets)
        now = [0]

        def see(x: torch.Tensor, y: torch.Tensor, stream: torch.Tensor | None) -> None:
            meant = next(at)
            meant = meant if stream is None else meant.float() - (stream.float() - y.float())
            rows = self.rows(x, block, now[0])
            if not found:
                found.append(Moments.empty(rows.shape[1], len(dense_weight(module)), x.device))
            found[0].add_(rows, self.rows(meant, block, now[0]))

        with self.watching(segment, block, see, stop=True):
            for i, _ in self.run(segment, True):
                now[0] = i + 1
        reduce_(found[0])
        return found[0]


def reduce_(moments: Moments) -> None:
    """Sum over the processes of a distributed run: all then know what one would that had all rows."""
    sums = torch.tensor([moments.count, moments.tt], dtype=torch.float64)
    over_processes_(sums, moments.xx, moments.x, moments.tx, moments.t)
    moments.count, moments.tt = sums.tolist()
    if not moments.count:
        raise CompressionError(NO_TOKENS)


def over_processes_(*tensors: torch.Tensor) -> None:
    """Sum tensors over the processes of a distributed run, in place."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            there = tensor.cuda() if tensor.device.type == "cpu" and dist.get_backend() == "nccl" else tensor
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)


def of_the_first(function: Callable[[], Any]) -> Any:
    """What a function gives in the first process of a distributed run, for all of them; the others wait.

    For what is timed: times differ between processes, and all must cut alike. What fails there fails in every process, so
    that none waits for good.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return function()
    box: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as error:  # of any kind (out of memory, say): it is raised below, once the others know
            refused = isinstance(error, CompressionError)
            failed, box[1] = error, str(error) if refused else f"The first process failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    if box[1] is not None:
        raise CompressionError(box[1])
    return box[0]


def _hidden_in(call: Call) -> torch.Tensor | None:
    args, kwargs = call
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _hidden_of(output: Any) -> torch.Tensor | None:
    return next((tensor for _, tensor in tensors_in(output)), None)


def _without_hidden(args: Any, kwargs: Any) -> Call:
    return ((None, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "hidden_states": None})


def _with_hidden(args: Any, kwargs: Any, hidden: torch.Tensor) -> Call:
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
