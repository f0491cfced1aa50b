"""A lottery ticket as data: which weights stay, and what they start from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..discover import discover
from ..edits import CompressionError, KeepHeads, shown
from ..files import replace_files
from ..fresh import from_config
from ..plan import Plan
from ..planners import heads_of, name_pattern
from ..sparsity import pack_bits, unpack_bits
from .held import unwrapped
from .select import count_units, plan_of
from .structured import masks_of

TICKET_FILE, START_FILE = "ticket.safetensors", "ticket_start.safetensors"
FORMAT = "hf_compress.ticket.1"


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sub-network: which weights stay, and the weights that it starts from (Frankle & Carbin 2019, arXiv:1803.03635).

    Args:
        masks (`Mapping[str, torch.Tensor]`): by parameter name, bool tensors of its shape: True stays. Of a structured ticket,
            the columns of output projections: a head or a neuron whose columns are zero does nothing.
        weights (`Mapping[str, torch.Tensor]`, *optional*): every parameter and saved buffer at step `step` of the dense
            training. None: a mask alone, which starts from what the model has.
        plan (`Plan`): of a structured ticket, the heads and neurons that stay; `apply_(model, ticket.plan)` makes the trained
            model small.
        step (`int`, defaults to 0): the optimizer step that `weights` are from.
        round (`int`, defaults to 0): how many times weights were removed.

    Raises:
        CompressionError: masks that are no bool tensors by name.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from hf_compress import Ticket
    >>> ticket = Ticket({"weight": torch.tensor([[True, False], [False, False]])})
    >>> ticket, ticket.sparsity
    (Ticket(1 of 4 weights in 1 tensor, mask alone), 0.75)
    >>> folder = tempfile.mkdtemp()
    >>> ticket.save(folder)
    >>> Ticket.load(folder).masks["weight"].tolist()
    [[True, False], [False, False]]

    ```
    """

    masks: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor] | None = None
    plan: Plan = field(default_factory=Plan)
    step: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        for what, tensors in (("masks", self.masks), ("weights", self.weights or {})):
            if not isinstance(tensors, Mapping) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
            ):
                raise CompressionError(f"Ticket {what} map parameter names to tensors, got {shown(tensors)}.")
        wrong = next((name for name, mask in self.masks.items() if mask.dtype != torch.bool), None)
        if wrong is not None:
            raise CompressionError(f"The mask of {wrong!r} must be a bool tensor (True stays), got {self.masks[wrong].dtype}.")
        if not self.masks:
            raise CompressionError("A ticket without masks is the dense model; train that as it is.")

    def __repr__(self) -> str:
        total = sum(mask.numel() for mask in self.masks.values())
        tensors = f"{len(self.masks)} tensor{'s' * (len(self.masks) != 1)}"
        start = "mask alone" if self.weights is None else f"from step {self.step}"
        return f"Ticket({sum(self.kept.values()):,} of {total:,} weights in {tensors}, {start})"

    @property
    def kept(self) -> dict[str, int]:
        """How many weights stay, by parameter."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of the masked parameters' weights that is removed."""
        return 1 - sum(self.kept.values()) / sum(mask.numel() for mask in self.masks.values())

    @property
    def digest(self) -> str:
        """The same for equal masks."""
        found = hashlib.sha256()
        for name, mask in sorted(self.masks.items()):
            found.update(f"{name} {tuple(mask.shape)}".encode())
            found.update(pack_bits(mask.cpu()).numpy().tobytes())
        return found.hexdigest()[:16]

    def save(self, folder: str | os.PathLike) -> None:
        """Write `ticket.safetensors` (one bit a weight) and, with weights, `ticket_start.safetensors` into a folder.

        Raises:
            CompressionError: the folder cannot be written; what was there before stays whole.
        """
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        about = {"format": FORMAT, "shapes": json.dumps(shapes), "plan": json.dumps(self.plan.to_dict(spans=True))}
        about |= {"step": str(self.step), "round": str(self.round)}
        files = {TICKET_FILE: dump_tensors({n: pack_bits(m.cpu()) for n, m in self.masks.items()}, about)}
        if self.weights is not None:
            files[START_FILE] = dump_tensors({n: w.detach().cpu().contiguous() for n, w in self.weights.items()})
        replace_files(folder, files, remove=() if START_FILE in files else (START_FILE,))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Ticket:
        """The ticket that `save` wrote into a folder.

        Raises:
            CompressionError: there is none, or it is damaged.
        """
        path = Path(folder) / TICKET_FILE
        packed, about = _read(path)
        try:
            shapes = json.loads(about["shapes"])
            masks = {name: unpack_bits(packed[name], tuple(shape)) for name, shape in shapes.items()}
            plan, step, turn = Plan.from_dict(json.loads(about["plan"])), int(about["step"]), int(about["round"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CompressionError(f"{path} is not a ticket that Ticket.save wrote, or it is damaged ({error!r}).") from error
        start = Path(folder) / START_FILE
        return cls(masks, _read(start)[0] if start.exists() else None, plan, step, turn)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CompressionError(f"No ticket to read at {path}: {error}. Ticket.save(folder) writes one.") from error


# --- weights ---------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters (tied ones once) and saved buffers (the statistics of batch norms), on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _state(model).items()}


def check_state(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are not those of this model, by name and shape."""
    own = _state(model)
    differ = sorted(own.keys() ^ weights.keys()) or [n for n, t in own.items() if t.shape != weights[n].shape]
    if differ:
        name = differ[0]
        mine, theirs = (str(tuple(t[name].shape)) if name in t else "absent" for t in (own, weights))
        raise CompressionError(
            f"The ticket is of another model than this {type(unwrapped(model)).__name__}: {name!r} is {theirs} there and "
            f"{mine} here. A mask alone (Ticket(masks)) fits wherever names and shapes of what it masks do."
        )


@torch.no_grad()
def set_state_(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put weights of `state_of` back in place; optimizers and wrappers keep what they hold."""
    check_state(model, weights)
    for name, tensor in _state(model).items():
        tensor.copy_(weights[name])


def write_state(folder: str | os.PathLike, weights: Mapping[str, torch.Tensor], step: int = 0) -> None:
    """Keep weights of `state_of` as a ticket's start."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    replace_files(folder, {START_FILE: dump_tensors(tensors, {"step": str(step)})})


def read_state(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], int]:
    """The weights that `write_state` wrote, and their step."""
    weights, about = _read(Path(folder) / START_FILE)
    return weights, int(about.get("step", 0))


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    inner = unwrapped(model)
    found: dict[str, torch.Tensor] = {name: p for name, p in inner.named_parameters()}
    for prefix, module in inner.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}


# --- the controls ----------------------------------------------------------------------------------------------------


def fresh_weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """New random weights, from the distributions that the model's class draws from: the control of "it is the mask alone".

    Raises:
        CompressionError: the model is no transformers model, so how it is initialised is not known.
    """
    inner = check_initialised(model)
    with torch.random.fork_rng():
        torch.manual_seed(_derived("reinit", seed))
        return state_of(from_config(inner.config, type(inner)))


def check_initialised(model: nn.Module) -> PreTrainedModel:
    """Refuse a model of which nobody knows how it is initialised."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise CompressionError(
            f"How a {type(inner).__name__} is initialised is not known. Draw its weights yourself and train the mask alone "
            "from them: LotteryTicketCallback(Ticket(ticket.masks))."
        )
    return inner


def random_ticket(ticket: Ticket, model: nn.Module, seed: int) -> Ticket:
    """As many weights in every tensor (heads and neurons in every block), chosen at random: the control of "which matters"."""
    generator = torch.Generator().manual_seed(_derived("random_mask", seed))

    def draw(total: int, kept: int) -> torch.Tensor:
        return torch.randperm(total, generator=generator)[:kept]

    if not ticket.plan.edits:
        masks = {}
        for name, mask in sorted(ticket.masks.items()):
            masks[name] = torch.zeros(mask.numel(), dtype=torch.bool)
            masks[name][draw(mask.numel(), int(mask.sum()))] = True
            masks[name] = masks[name].view(mask.shape)
        return Ticket(masks, ticket.weights, step=ticket.step, round=ticket.round)
    structure = discover(model)
    blocks = {block.name: block for block in (*structure.attentions, *structure.ffns)}
    heads, neurons = {}, {}
    for edit in ticket.plan:
        is_heads = isinstance(edit, KeepHeads)
        name, kept = (edit.attention, edit.heads) if is_heads else (edit.ffn, edit.neurons)  # type: ignore[union-attr]
        units = count_units(blocks[name])
        a_unit = blocks[name].num_heads // units if is_heads else 1  # type: ignore[union-attr]
        (heads if is_heads else neurons)[name] = sorted(draw(units, len(kept) // a_unit).tolist())
    plan = plan_of(structure, heads, neurons)
    return Ticket(masks_of(model, plan), ticket.weights, plan, ticket.step, ticket.round)


def _derived(what: str, seed: int) -> int:
    """A seed of its own: with the user's, a "new" initialisation would be the one that `set_seed(seed)` gave the model."""
    return int.from_bytes(hashlib.sha256(f"lottery ticket {what} {seed}".encode()).digest()[:4], "big")


# --- what is pruned --------------------------------------------------------------------------------------------------


def prunable(model: nn.Module, modules: str | None = None) -> list[str]:
    """The weights that are pruned: of Linear, Conv1D and convolution modules, each parameter once.

    Args:
        model (`nn.Module`): a model.
        modules (`str`, *optional*): a regular expression that is searched in module names. By default those inside the layers
            that `discover` finds; where it finds none (a ResNet), all but output heads and convolutions that read at most
            four channels. So what reads the input and what gives the answer stay dense.

    Raises:
        CompressionError: nothing matches.
    """
    inner = unwrapped(model)
    layers = tuple(f"{layer.name}." for layer in discover(inner).layers) if modules is None else ()
    heads = heads_of(inner) if modules is None else ()
    named = {name.replace("_orig_mod.", ""): module for name, module in inner.named_modules()}
    found = {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.Linear | Conv1D | _ConvNd) and _wanted(name, module, modules, layers, heads)
    }
    names, seen = [], set()
    for name, module in found.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.is_floating_point() and id(weight) not in seen:
            seen.add(id(weight))
            names.append(f"{name}.weight" if name else "weight")
    if not names:
        where = "in its layers" if modules is None else f"whose name matches {modules!r}"
        raise CompressionError(
            f"{type(inner).__name__} has no Linear, Conv1D or convolution {where} with a float weight; name some with "
            "modules= (a regular expression on the names of model.named_modules())."
        )
    return names


def _wanted(name: str, module: nn.Module, modules: str | None, layers: tuple[str, ...], heads: tuple[str, ...]) -> bool:
    if modules is not None:
        return re.search(name_pattern(modules, "modules"), name) is not None
    if layers:
        return name.startswith(layers)
    stem = isinstance(module, _ConvNd) and module.in_channels <= 4
    return not stem and not f"{name}.".startswith(heads)


def levels_of(sparsity: float | Sequence[float], rounds: int) -> list[float]:
    """The fraction that is gone after each round: every round removes the same share of what is left.

    `1 - (1 - sparsity)^(r / rounds)` after round `r`; a sequence is taken as it is.

    Example:

    ```python
    >>> from hf_compress.pruning.ticket import levels_of
    >>> [round(level, 3) for level in levels_of(0.875, 3)], levels_of([0.5, 0.9], 5)
    ([0.5, 0.75, 0.875], [0.5, 0.9])

    ```
    """
    if isinstance(sparsity, Sequence):
        return list(sparsity)
    return [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds + 1)]
