"""Which rows of which parameters belong to which head or neuron, found from the computation itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .edits import CompressionError
from .memory import give_back
from .probe import tensors_in

SHARED, DEAD = -1, -2  # owners of rows that several units use, or that no gradient reached
DRAWS = 24  # at most; a unit that a draw of the weights leaves dead (ReLU) is met by another

Place = tuple[str, str, int]  # (module, parameter, dimension)
ARGUMENT = "<argument>"


def coupled(
    module: nn.Module,
    gate: torch.Tensor,
    units: torch.Tensor,
    run: Callable[[], Any],
    redraw: Callable[[int], None],
    arguments: Mapping[str, torch.Tensor] | None = None,
) -> dict[Place, torch.Tensor]:
    r"""The unit that each row of each parameter in a module belongs to, whatever names and shapes suggest.

    A unit (a head, a neuron) is what one gate hides: columns of the projection that reads it. Row `i` of a parameter,
    along some dimension, belongs to unit `u` if the module's output stops depending on it exactly when `u` is hidden:

        dL/dw_i = 0  <=>  g_u = 0,    L a random projection of the output

    Gradients through a hidden column are products with an exact zero, so "stops" means 0.0 and needs no tolerance. For n
    units, `2 ceil(log2 n)` passes suffice: pass (b, v) hides all units whose number has v as its bit b, so the passes in
    which a row's gradient vanishes spell its unit. A row whose gradient vanishes in neither pass of a bit is used by
    several units (a norm over all heads, a key that query heads share) and stays.

    It sees every path from a parameter to the output *of this module*: fused and interleaved projections, gates, sinks,
    position tables, expert tensors, depthwise convolutions, batch norms. It cannot see what leaves the module another way
    (a cache that a later layer reads), sizes that the forward takes from attributes, and what its inputs do not reach; for
    those there is the comparison of the cut with its mask (`prove.prove`), which follows.

    Args:
        module: a copy that may be run, differentiated and drawn anew.
        gate: the gate (columns,) on the projection that reads the units; changed in place, all ones at the end.
        units: the unit of each column, shape (columns,), from 0.
        run: runs the module and gives its outputs.
        redraw: draws all weights anew, from a seed.
        arguments: float tensors that `run` gives to the module, by name, leaves: their rows are looked at like a parameter's
            (a position bias that is computed outside), under the module name `ARGUMENT`.

    Returns:
        by (module, parameter or buffer, dimension), for every dimension along which some row belongs to one unit: a tensor with
        the owner of each row, `SHARED` (-1) for rows that several units use or none.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from hf_compress.coupling import coupled
    >>> from hf_compress.modules import gate_
    >>> ffn = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
    >>> x = torch.randn(8, 4)
    >>> found = coupled(ffn, gate_(ffn[2]), torch.arange(3), lambda: ffn(x), lambda seed: None)
    >>> {place: owner.tolist() for place, owner in found.items()}
    {('0', 'weight', 0): [0, 1, 2], ('0', 'bias', 0): [0, 1, 2], ('2', 'weight', 1): [0, 1, 2]}

    ```
    """
    owners: dict[Place, torch.Tensor] = {}
    count, silent, steady = int(units.max()) + 1, -1, 0
    for seed in range(DRAWS):
        redraw(seed)
        for place, owner in _one_draw(module, gate, units, count, run, arguments or {}).items():
            before = owners.get(place)
            owners[place] = owner if before is None else _both(before, owner)
        following = {place: o for place, o in owners.items() if bool((o >= 0).any())}
        before, silent = silent, sum(int((o == DEAD).sum()) for place, o in following.items() if place[1] != "bias")
        # at least twice: a ReLU may be silent just when one head is hidden, but not so for the same head again
        steady = steady + 1 if silent == before else 0
        if seed and following and (silent == 0 or (steady > 5 and seed > 12)):
            break
    found = {place: owner for place, owner in owners.items() if bool((owner >= 0).any())}
    for (name, key, dim), owner in owners.items():  # what is multiplied by zeros (a decoder's first values): as its bias
        bias = found.get((name, "bias", 0))
        out = 1 if isinstance(module.get_submodule(name) if name != ARGUMENT else None, Conv1D) else 0
        if key == "weight" and dim == out and bias is not None and len(bias) == len(owner) and bool((owner == DEAD).all()):
            found[name, key, dim] = bias
    for (name, key, dim), owner in list(found.items()):
        dead = owner == DEAD
        rows = [found.get((name, "weight", d)) for d in (0, 1)]  # a Conv1D has its outputs last
        sibling = next((o for o in rows if o is not None and len(o) == len(owner)), None)
        if bool(dead.any()) and key == "bias" and sibling is not None:
            owner = torch.where(dead, sibling, owner)  # a key's bias moves all scores alike: softmax does not see it
        found[name, key, dim] = owner
    for name, key, dim in [place for place in found if place[1] == "bias" and place[0] != ARGUMENT]:
        out = 1 if isinstance(module.get_submodule(name), Conv1D) else 0
        weight = owners.get((name, "weight", out))
        if weight is not None and len(weight) == len(found[name, key, dim]) and bool((weight == SHARED).all()):
            del found[name, key, dim]  # a key's bias: softmax does not see it, and what is left of its gradient may be 0
    reads = [owner for owner in found.values() if len(owner) == len(units) and bool((owner == units.cpu()).any())]
    if reads and any(bool((owner == DEAD).any()) for owner in reads):
        dead = int(max((owner == DEAD).sum() for owner in reads))
        raise CompressionError(
            f"{dead} of {count} units are silent on the proof's inputs whatever the weights are, so what belongs to them "
            "cannot be found. Pass inputs=... with a larger batch."
        )
    alike = {place: torch.bincount(owner[owner >= 0], minlength=count) for place, owner in found.items()}
    # each unit has as many rows as any other; or none, where units are of two kinds (ConvBERT: attention and convolution)
    whole = {place for place, rows in alike.items() if _is_even(rows)}
    return {place: owner.where(owner >= 0, SHARED) for place, owner in found.items() if place in whole}


def _is_even(rows: torch.Tensor) -> bool:
    some = rows[rows > 0]
    return bool((some == some[0]).all()) and (len(some) == len(rows) or (len(some) > 1 and int(some[0]) > 1))


def _both(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What two draws say: a row that is dead in one is as the other says; where they differ, it is shared."""
    agreed = torch.where(one == other, one, torch.full_like(one, SHARED))
    return torch.where(one == DEAD, other, torch.where(other == DEAD, one, agreed))


def _one_draw(
    module: nn.Module,
    gate: torch.Tensor,
    units: torch.Tensor,
    count: int,
    run: Callable[[], Any],
    arguments: Mapping[str, torch.Tensor],
) -> dict[Place, torch.Tensor]:
    bits = max(1, (count - 1).bit_length())
    units = units.to(gate.device)
    silent: dict[Place, list[torch.Tensor]] = {}  # one row a pass: where the gradient is 0
    with ExitStack() as stack, torch.enable_grad():
        seen: dict[Place, torch.Tensor] = {}
        shapes = _watch(module, seen, stack)
        for key, tensor in arguments.items():
            shapes |= _note(tensor, (ARGUMENT, key), seen, stack)
        for bit in range(bits):
            for value in (0, 1):
                gate.copy_(((units >> bit) & 1) != value)
                seen.clear()
                give_back()
                draw = torch.Generator().manual_seed(1)
                outputs = [tensor for _, tensor in tensors_in(run()) if tensor.requires_grad]
                projected = [torch.randn(t.shape, generator=draw).to(t.device, t.dtype) for t in outputs]
                if outputs:
                    torch.autograd.backward(outputs, projected)
                for place, size in shapes.items():
                    nothing = torch.ones(size, dtype=torch.bool, device=gate.device)
                    silent.setdefault(place, []).append(seen.get(place, nothing))
        gate.fill_(1.0)
    return {place: _spell(torch.stack(rows), count).cpu() for place, rows in silent.items()}


def _watch(module: nn.Module, seen: dict[Place, torch.Tensor], stack: ExitStack) -> dict[Place, int]:
    """Let every float parameter and buffer note where its gradient is zero, and keep no gradient."""
    shapes: dict[Place, int] = {}
    known: set[int] = set()
    for name, part in module.named_modules():
        places: tuple[Any, ...] = (part._parameters, part._buffers)
        for kind in places:
            for key, tensor in kind.items():
                if tensor is None or not tensor.is_floating_point() or not tensor.ndim or id(tensor) in known:
                    continue
                if key in ("hfc_gate", "hfc_active") or (
                    kind is part._buffers and isinstance(part, nn.modules.batchnorm._BatchNorm)
                ):
                    continue  # running statistics have no gradient; they follow the weight
                if kind is part._buffers:
                    leaf = tensor.detach().clone().requires_grad_()
                    stack.callback(kind.__setitem__, key, tensor)
                    kind[key] = leaf
                else:
                    leaf = tensor.requires_grad_()
                    stack.callback(tensor.requires_grad_, False)
                known.add(id(tensor))
                shapes |= _note(leaf, (name, key), seen, stack)
    return shapes


def _note(leaf: torch.Tensor, where: tuple[str, str], seen: dict[Place, torch.Tensor], stack: ExitStack) -> dict[Place, int]:
    places: list[Place] = [(*where, dim) for dim in range(leaf.ndim) if leaf.shape[dim] > 1]

    def note(leaf: torch.Tensor) -> None:
        if leaf.grad is None:  # a product of a lean copy, which has told where it would be zero
            return
        zero = leaf.grad == 0
        leaf.grad = None
        others = [[d for d in range(zero.ndim) if d != dim] for dim in range(zero.ndim)]
        note_rows([zero.all(dim=dims) if dims else zero for dims in others])

    def note_rows(silent: list[torch.Tensor]) -> None:
        for place in places:
            rows = silent[place[2]]
            seen[place] = seen[place] & rows if place in seen else rows

    stack.callback(leaf.register_post_accumulate_grad_hook(note).remove)
    leaf.hfc_silent = note_rows  # type: ignore[attr-defined]  # a weight of a lean copy gets no gradient
    stack.callback(delattr, leaf, "hfc_silent")
    return {place: leaf.shape[place[2]] for place in places}


def _spell(silent: torch.Tensor, count: int) -> torch.Tensor:
    """From where gradients vanish, (2 bits, rows), the unit of each row."""
    off = silent.view(-1, 2, silent.shape[-1])  # (bits, value that was hidden, rows)
    unit = torch.zeros(silent.shape[-1], dtype=torch.long, device=silent.device)
    for bit in range(len(off)):
        unit |= off[bit, 1].long() << bit
    mixed = (~off[:, 0] & ~off[:, 1]).any(0)
    dead = (off[:, 0] & off[:, 1]).any(0)
    unit = unit.where(~mixed & (unit < count), SHARED)
    return unit.where(~dead | mixed, DEAD)
