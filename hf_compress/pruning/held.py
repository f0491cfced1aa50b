"""Masks that are held while a model trains: what is masked is exactly 0.0 after every step of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..discover import nearest
from ..edits import CompressionError, shown
from ..sparsity import Masks, check_sparsity, choose_masks, from_matrix, matrix_of


class Held:
    """Masks on a model's parameters, held: `zero_` makes what is masked 0.0 again, and is called after each optimizer step.

    What is masked gets no gradient, so that clipping by norm sees what is left alone. Parameters stay what they are (identity,
    shape, `requires_grad`), so optimizers, wrappers and checkpoints stay valid. Masks follow a parameter to another device.
    See `hold_`.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self._handles: list[Any] = []
        self._quiet: list[Any] = []  # hooks on gradients
        self._gone: dict[str, torch.Tensor] = {}  # True: masked, which is what filling wants
        self.set_(masks)

    @property
    def masks(self) -> Masks:
        """By parameter, as given: True stays."""
        return {name: ~gone for name, gone in self._gone.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of the held parameters' weights that is masked.

        Example:

        ```python
        >>> import torch
        >>> from hf_compress.pruning.held import hold_
        >>> layer = torch.nn.Linear(2, 2)
        >>> hold_(layer, {"weight": torch.tensor([[True, True], [True, False]])}).sparsity
        0.25

        ```
        """
        total = sum(gone.numel() for gone in self._gone.values())
        return sum(int(gone.sum()) for gone in self._gone.values()) / total if total else 0.0

    def set_(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Hold these masks instead; what they remove is zeroed now. What was zero and may grow again starts from zero."""
        parameters = _checked(self.model, masks)
        self._gone = {name: ~mask.to(parameters[name].device) for name, mask in masks.items()}
        self._unhook()
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                self._quiet.append(parameter.register_hook(partial(self._masked, name)))
        self.zero_()

    def _masked(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        return grad if grad.is_sparse else grad.masked_fill(self._gone[name].to(grad.device), 0)

    def _unhook(self) -> None:
        while self._quiet:
            self._quiet.pop().remove()

    @torch.no_grad()
    def zero_(self) -> None:
        """Make what is masked exactly 0.0, in place."""
        parameters = parameters_of(self.model, self._gone)
        for name, parameter in parameters.items():
            gone = self._gone[name]
            if gone.device != parameter.device:
                gone = self._gone[name] = gone.to(parameter.device)
            parameter.masked_fill_(gone, 0.0)  # a product would leave -0.0, and NaN

    @torch.no_grad()
    def still_(self, optimizer: Any) -> None:
        """Zero an optimizer's moments where a weight is masked, so that one which grows again starts at rest."""
        states = _inner(optimizer).state
        for name, parameter in parameters_of(self.model, self._gone).items():
            for value in states.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(self._gone[name].to(value.device), 0)

    def follow(self, optimizer: Any) -> None:
        """Zero after every step of this optimizer, weights and moments. In a callback, `on_optimizer_step`."""

        def after(stepped: Any, *_: Any) -> None:
            self.zero_()
            self.still_(stepped)

        self._handles.append(_inner(optimizer).register_step_post_hook(after))

    def release(self) -> None:
        """Hold no longer. The zeros stay, and may grow from the next step on. A second call does nothing."""
        self._unhook()
        while self._handles:
            self._handles.pop().remove()


def hold_(model: nn.Module, masks: Mapping[str, torch.Tensor], optimizer: Any = None) -> Held:
    """Zero what masks remove, now and after every step of an optimizer, in place and exactly.

    Every process of a distributed training must call it with the same masks (which magnitude of the same weights, or a
    seed, gives); other masks on one rank are refused on all of them. With averaged gradients the weights then stay equal.

    Args:
        model (`nn.Module`): the model, also in DistributedDataParallel or `torch.compile`.
        masks (`Mapping[str, torch.Tensor]`): by parameter name (without wrappers), bool tensors of its shape: True stays.
        optimizer (*optional*): zero after each of its steps, its moments too. Without one, call `zero_` after each step.

    Returns:
        a `Held`: `.zero_()`, `.set_(masks)`, `.masks`, `.sparsity`, `.release()`.

    Raises:
        CompressionError: a parameter is not there, is no float, is sharded (FSDP, DeepSpeed ZeRO-3, tensor parallel) or on the
            meta device; a mask has another shape or is not bool; masks differ between tied names or between processes.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.held import hold_
    >>> layer = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    >>> held = hold_(layer, {"weight": torch.tensor([[True, False], [False, True]])}, optimizer)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> (layer.weight == 0).tolist()
    [[False, True], [True, False]]

    ```
    """
    held = Held(model, masks)
    if optimizer is not None:
        held.follow(optimizer)
    return held


# --- by name -----------------------------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, DataParallel and `torch.compile`, in any order."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
            model = model._orig_mod
        else:
            return model


def parameters_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters by their names without wrappers (also of compiled parts inside); tied ones under each of their names."""
    named = unwrapped(model).named_parameters(remove_duplicate=False)
    found = {name.replace("_orig_mod.", ""): parameter for name, parameter in named}
    if names is None:
        return found
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise CompressionError(
            f"{type(unwrapped(model)).__name__} has no parameter named {shown(missing)}"
            f"{nearest(str(missing), list(found))} Names are those of model.named_parameters(), without wrappers."
        )
    return {name: found[name] for name in names}


def _checked(model: nn.Module, masks: Any) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise CompressionError(f"Expected a model (a torch.nn.Module), got {type(model).__name__}.")
    if not isinstance(masks, Mapping):
        raise CompressionError(f"masks must be a dict of parameter names and bool tensors, got {type(masks).__name__}.")
    parameters = parameters_of(model, masks)
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        mask = masks[name]
        _check_whole(name, parameter)
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            what = f"a tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise CompressionError(f"The mask of {name!r} must be a bool tensor (True stays), got {what}.")
        if mask.shape != parameter.shape:
            raise CompressionError(f"The mask of {name!r} is {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}.")
        twin = first.setdefault(id(parameter), name)
        if twin != name and not torch.equal(mask.cpu(), masks[twin].cpu()):
            raise CompressionError(
                f"{name!r} and {twin!r} are one parameter (tied) and have different masks; give one of them."
            )
    _check_ranks(masks)
    return parameters


def _check_whole(name: str, parameter: Any) -> None:
    if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
        raise CompressionError(
            f"{name!r} is sharded over processes (FSDP, DeepSpeed, tensor parallel), and masks are held on whole weights. Use "
            "DistributedDataParallel, or make it sparse first (apply_), then train sharded without masks."
        )
    if parameter.is_meta:
        raise CompressionError(f"{name!r} is on the meta device and has no values; load the model first.")
    if not parameter.is_floating_point():
        raise CompressionError(f"{name!r} holds {parameter.dtype}: only float weights can be masked (is it quantized?).")


def _check_ranks(masks: Mapping[str, torch.Tensor]) -> None:
    """Every process must hold the same masks, or their weights drift apart without a word."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    mine = [(name, int(mask.sum()), _digest(mask)) for name, mask in sorted(masks.items())]
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    if any(other != theirs[0] for other in theirs):
        raise CompressionError(
            "The processes were given different masks: make them from the same weights, or from one seed, on every rank."
        )


def _digest(mask: torch.Tensor) -> int:
    """A sum over the places that stay, each weighted by its own number: equal masks give equal ones."""
    places = mask.flatten().nonzero().flatten()
    return int(((places + 1) * 2654435761 % 4294967291).sum())


def _inner(optimizer: Any) -> Any:
    """The torch optimizer inside Accelerate's."""
    while not isinstance(getattr(optimizer, "state", None), Mapping) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


# --- masks of weights --------------------------------------------------------------------------------------------


def magnitude_masks(
    model: nn.Module,
    names: Iterable[str],
    sparsity: float,
    scope: str = "global",
    pattern: str | None = None,
    alive: Mapping[str, torch.Tensor] | None = None,
) -> Masks:
    r"""Masks that remove the weights of least \|w\| (Han et al. 2015, arXiv:1506.02626).

    Args:
        model (`nn.Module`): whose weights are looked at.
        names (`Iterable[str]`): of parameters.
        sparsity (`float`): the fraction of these weights that goes, in [0, 1), those that are gone already among them.
        scope (`str`, defaults to `"global"`): compare all, `"layer"` by layer, or each output alone (`"row"`).
        pattern (`str`, *optional*): `"2:4"`, say; sparsity and scope are not looked at then.
        alive (`Mapping[str, torch.Tensor]`, *optional*): masks from before; what they removed stays gone.

    Returns:
        by name, a bool tensor of the parameter's shape: True stays.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.held import magnitude_masks
    >>> layer = torch.nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]))
    >>> magnitude_masks(layer, ["weight"], 0.5)["weight"].tolist()
    [[False, True], [True, False]]

    ```
    """
    weights = _distinct(model, names)
    return masks_by(model, {name: p.detach().abs() for name, p in weights.items()}, sparsity, scope, pattern, alive)


def random_masks(
    model: nn.Module,
    names: Iterable[str],
    sparsity: float,
    scope: str = "global",
    pattern: str | None = None,
    alive: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> Masks:
    """Masks that remove weights at random: the control for every score. Arguments as for `magnitude_masks`.

    The same on every process and every device: drawn on the CPU, from a generator of their own.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.pruning.held import random_masks
    >>> int(random_masks(torch.nn.Linear(8, 8), ["weight"], 0.75)["weight"].sum())
    16

    ```
    """
    generator = torch.Generator().manual_seed(seed)
    weights = _distinct(model, names)
    drawn = {name: torch.rand(p.shape, generator=generator).to(p.device) for name, p in weights.items()}
    return masks_by(model, drawn, sparsity, scope, pattern, alive)


def masks_by(
    model: nn.Module,
    scores: Mapping[str, torch.Tensor],
    sparsity: float,
    scope: str = "global",
    pattern: str | None = None,
    alive: Mapping[str, torch.Tensor] | None = None,
) -> Masks:
    """Masks from scores of the parameters' own shapes, whatever they are; see `magnitude_masks`."""
    check_sparsity(sparsity, pattern, scope)
    inner = unwrapped(model)
    modules = {name.replace("_orig_mod.", ""): module for name, module in inner.named_modules(remove_duplicate=False)}
    owners = {name: modules.get(name.rpartition(".")[0]) for name in scores}
    matrices = {}
    for name, score in scores.items():
        score = score.float()
        if alive is not None and name in alive:
            score = score.masked_fill(~alive[name].to(score.device), -torch.inf)
        matrices[name] = matrix_of(owners[name], score)
    masks = {
        name: from_matrix(owners[name], mask, scores[name].shape).contiguous()
        for name, mask in choose_masks(matrices, sparsity, scope, pattern).items()
    }
    if alive is not None:  # a lower sparsity than before brings nothing back
        masks = {name: mask & alive[name].to(mask.device) if name in alive else mask for name, mask in masks.items()}
    return masks


def _distinct(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters by name, each once: a tied one would count twice."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in parameters_of(model, list(names)).items():
        _check_whole(name, parameter)
        if not any(parameter is other for other in found.values()):
            found[name] = parameter
    return found
