"""Refusals: modules whose weights are not simply theirs, found before anything is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from .cutting import Block, Cut, is_plain_linear
from .discover import FeedForward, Part
from .edits import CompressionError
from .loader import compression_of
from .masking import skip_layer
from .modules import is_gated
from .probe import owners_in, tensors_in
from .sparse import is_sparse


def check_foreign(model: nn.Module) -> None:
    """Refuse models whose weights another library has packed (bitsandbytes, torchao, ...) or that pack them, and adapters."""
    check_adapters(model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise CompressionError(
            f"The weights of this {type(model).__name__} are sharded over processes (FSDP2, tensor parallel), and rows of a "
            "shard are not rows of the weight. Cut it first, in one process: apply_, or apply_to_folder where it does not fit "
            "into memory. What that writes loads sharded as any checkpoint does: from_pretrained(..., distributed_config=...)."
        )
    for _, owner in owners_in(model):
        compression_of(owner.config)
    for module in model.modules():
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        if hasattr(module, "layers_are_rescaled") and every:
            raise CompressionError(
                f"{type(module).__name__} divides its own weights in place when it first evaluates (rescale_every={every}); "
                "what is saved after that is divided again when it is loaded, and integers cannot be. Load it with "
                "from_pretrained(..., rescale_every=0): the same function without that, which only keeps float16 from "
                "overflowing."
            )


def check_gradients(model: nn.Module, who: str) -> None:
    """Refuse to ask for gradients where there can be none; `torch.no_grad()` around is no hindrance."""
    if torch.is_inference_mode_enabled():
        raise CompressionError(f"{who} takes gradients, which torch.inference_mode() forbids: call it outside of that.")
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise CompressionError(
            f"{who} takes gradients, and {name!r} was made under torch.inference_mode(), which forbids them: make or load the "
            "model outside of that, or copy it (copy.deepcopy(model))."
        )


def check_weights(name: str, module: nn.Module) -> None:
    """Refuse a module whose weight is computed from something else."""
    if parametrize.is_parametrized(module):
        raise CompressionError(
            f"{name!r} is parametrized; its weight is computed and cannot be changed. Make it permanent first: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
        )
    if any(isinstance(h, prune.BasePruningMethod) for h in module._forward_pre_hooks.values()):
        raise CompressionError(
            f"{name!r} is masked by torch.nn.utils.prune; make that permanent first: "
            "torch.nn.utils.prune.remove(module, 'weight')."
        )


def check_dense(name: str, module: nn.Module) -> None:
    """Refuse to take rows or columns from a module of which single weights are held at zero."""
    if is_sparse(module):
        raise CompressionError(
            f"{name!r} is sparse, and its mask has a bit for every weight. Cut first, then Sparsify what is left."
        )


def check_modules(model: nn.Module, cuts: list[Cut]) -> None:
    """Refuse modules whose weights are not simply theirs."""
    modules = dict(model.named_modules())
    for cut in cuts:
        for part in cut.block.parts:
            check_part(modules, part)


def check_experts(cuts: list[Cut]) -> None:
    """Refuse numbers of neurons that the kernel of experts cannot multiply in every dtype."""
    for cut in cuts:
        block = cut.block
        if isinstance(block, FeedForward) and len(cut.kept) % block.multiple:
            raise CompressionError(
                f"KeepNeurons({block.name!r}) keeps {len(cut.kept)} neurons of every expert. transformers multiplies these "
                f"with torch's grouped_mm, which takes rows of 16 bytes: a multiple of {block.multiple} runs in every dtype (a "
                "checkpoint says neither the dtype nor the kernel that it will run with). Keep "
                f"{said_multiples(len(cut.kept), block.size, block.multiple)} (planners do so by themselves)."
            )


def said_multiples(count: int, size: int, multiple: int) -> str:
    """The allowed numbers nearest to one that is not.

    Example:

    ```python
    >>> from hf_compress.refusals import said_multiples
    >>> said_multiples(29, 48, 8), said_multiples(5, 48, 8), said_multiples(11, 12, 8)
    ('24 or 32', '8', '8 or all 12')

    ```
    """
    below, above = count // multiple * multiple, -(-count // multiple) * multiple
    return " or ".join([*([str(below)] if below else []), str(above) if above < size else f"all {size}"])


def check_part(modules: Mapping[str, nn.Module], part: Part) -> None:
    """Refuse a projection whose weight cannot be sliced."""
    module = modules[part.module]
    check_weights(part.module, module)
    check_dense(part.module, module)
    if isinstance(module, nn.Linear | Conv1D) and not is_plain_linear(module):
        raise CompressionError(
            f"{part.module!r} is a {type(module).__module__}.{type(module).__name__}, not a plain Linear, so its "
            "weight cannot be sliced. Cut before quantizing or adding adapters, or merge them first."
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse models with adapters: what is saved of them is the adapter alone."""
    for module in model.modules():
        if hasattr(module, "peft_config") or getattr(module, "_hf_peft_config_loaded", False):
            raise CompressionError(
                f"{type(module).__name__} carries adapters; saving it would save them and not the cut. Merge them first "
                "(merge_and_unload()), or cut the base model before adding any."
            )


def check_masks(model: nn.Module, cuts: list[Cut]) -> None:
    """Refuse to cut under a mask that hides what the plan keeps: it would be lost with the columns around it."""
    for name, layer in model.named_modules():
        if skip_layer in layer._forward_hooks.values():
            raise CompressionError(f"The layer {name!r} is masked; remove that mask first (Mask.remove()), then cut.")
    for cut in cuts:
        module = model.get_submodule(cut.block.out)
        if is_gated(module) and bool(((module.hfc_gate == 0) & (cut.gate().to(module.hfc_gate.device) == 1)).any()):  # type: ignore
            raise CompressionError(
                f"{cut.block.name!r} is masked, and the plan keeps some of what the mask hides. Remove the mask first "
                "(Mask.remove()), or put everything that is masked into the plan."
            )


def check_sharing(modules: Mapping[str, nn.Module], block: Block, parts: Iterable[Part]) -> None:
    """Refuse weights that another module uses as well: cutting one would untie or break the other.

    Not those of its twins, which are cut alike.
    """
    alike = {part.module for twin in block.twins for part in twin.parts} if isinstance(block, FeedForward) else set()
    for part in parts:
        if part.argument is not None:
            continue
        module = modules[part.module]
        keys = ("weight", "weight_in", "bias") if part.parameter is None else (part.parameter,)
        for key in keys:
            tensor = module._parameters.get(key)
            if tensor is None:
                continue
            users = [n for n, m in modules.items() if m is not module and any(p is tensor for p in m._parameters.values())]
            users = [name for name in users if name not in alike]
            if users:
                raise CompressionError(
                    f"{part.module}.{key} is shared with {users}; cutting it for {block.name!r} would change them too. "
                    "Untie them first, or leave it out of the plan."
                )


def why_not_proved(model: nn.Module, cuts: list[Cut], error: Exception) -> str:
    """Where a model fails when blocks of it are cut, and what to do: the innermost of its modules that was running then."""
    names = {id(module): name for name, module in model.named_modules()}
    place, trace = "", error.__traceback__
    while trace is not None:
        place = names.get(id(trace.tb_frame.f_locals.get("self")), place)
        trace = trace.tb_next
    blocks = [cut.block.name for cut in cuts]
    what = f"{', '.join(map(repr, blocks[:4]))}{', ...' * (len(blocks) > 4)}"
    shared = next((n for m in model.modules() if (n := getattr(getattr(m, "config", None), "num_kv_shared_layers", 0))), 0)
    reads = f" (num_kv_shared_layers={shared}: the last layers read the keys and values of earlier ones)" if shared else ""
    return (
        f"Cannot prove the cut of {what} in this {type(model).__name__}, so nothing was changed: {place or 'it'} "
        f"then fails with {type(error).__name__}: {str(error).rstrip('.')}. Usually it reads something that is made for "
        f"several layers at their full size, a position bias or keys and values{reads}. Leave the blocks that make or read it "
        "out of the plan."
    )


class Unreached(CompressionError):
    """A block did not run when the module around it did."""


def check_read(out: nn.Module, block: Block, run: Callable[[], Any]) -> None:
    """Refuse a block whose output projection does not run when `run` does, or reads nothing but zeros."""
    read: list[torch.Tensor] = []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        read.extend(tensor for _, tensor in tensors_in((*args, *kwargs.values()))[:1] if tensor.numel())

    handle = out.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if not read and block.consumer is None:  # weights that another module reads may be used without it
        raise Unreached(
            f"Cannot prove a cut of {block.name!r}: it did not run when the module around it did. "
            "Pass inputs=... with a batch that uses it, or leave it out of the plan."
        )
    if read and not any(bool(tensor.any()) for tensor in read):
        raise CompressionError(
            f"Cannot prove a cut of {block.name!r}: all that its output projection {block.out!r} reads is zero, whatever the "
            "weights are. If transformers computes it with a kernel that is not on this machine (MRA's), cut it where it is; "
            "else leave it out of the plan."
        )
