"""Mixtures of experts: where they are, which experts may stay, and their router with some of its choices closed.

Names and shapes are hints, as in `discover`; `experts.experts_` proves what they say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .edits import CompressionError

# the module (or list) that chooses, and what modules and configs call the number of experts
ROUTER = re.compile(r"^(router|gate|gating|wg|classifier)$")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = ("top_k", "num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
# experts in groups, of which a router first chooses some: how many there are, and how many it chooses
GROUPS = ("num_group", "n_group", "num_expert_group")
GROUPS_CHOSEN = ("topk_group",)


@dataclass(frozen=True)
class Mixture:
    """Experts of which a router picks a few for every token. `name` is the smallest module that holds both."""

    name: str
    num_experts: int
    top_k: int | None  # experts per token; None where nothing says it
    size: int  # neurons per expert
    router: str = field(repr=False)  # the path of the parameter with one row per expert
    biases: tuple[str, ...] = field(default=(), repr=False)  # what is added to scores when experts are chosen
    children: str | None = field(default=None, repr=False)  # the list of experts, where they are modules of their own
    groups: int = field(default=1, repr=False)
    groups_chosen: int = field(default=1, repr=False)

    def check(self, kept: tuple[int, ...]) -> None:
        """Refuse to keep fewer experts than a token needs, or unequal numbers in the groups of which a router chooses.

        Example:

        ```python
        >>> from hf_compress.mixtures import Mixture
        >>> Mixture("mlp", 8, 2, 64, "mlp.gate.weight").check((0, 5))

        ```
        """
        what = f"KeepExperts({self.name!r})"
        if self.top_k is not None and len(kept) < self.top_k:
            raise CompressionError(
                f"{what} keeps {len(kept)} of {self.num_experts} experts, but every token needs {self.top_k}; keep at least "
                "so many."
            )
        if self.groups == 1:
            return
        size = self.num_experts // self.groups
        counts: dict[int, int] = {}
        for expert in kept:
            counts[expert // size] = counts.get(expert // size, 0) + 1
        most, least = max(counts.values()), 2 if self.biases else 1  # scores with a bias rank groups by their two best
        if min(counts.values()) < most or most < least or len(counts) < self.groups_chosen:
            found = ", ".join(f"group {g}: {n}" for g, n in sorted(counts.items()))
            raise CompressionError(
                f"{what} keeps {found}. Its router first chooses {self.groups_chosen} of {self.groups} groups of {size} "
                f"experts (experts 0-{size - 1}, ...): keep at least {self.groups_chosen} groups, and equally many experts, "
                f"{least} or more, in each that stays."
            )
        if self.top_k is not None and most * self.groups_chosen < self.top_k:
            raise CompressionError(
                f"{what} keeps {most} experts in each group; a token needs {self.top_k} from {self.groups_chosen} of them. "
                f"Keep at least {-(-self.top_k // self.groups_chosen)} in each."
            )

    def groups_kept(self, kept: tuple[int, ...]) -> int:
        """How many groups stay with these experts."""
        return len({expert // (self.num_experts // self.groups) for expert in kept})

    def gone(self, kept: tuple[int, ...]) -> torch.Tensor:
        """True for every expert that goes."""
        return ~torch.isin(torch.arange(self.num_experts), torch.tensor(kept))


def find_mixtures(modules: Mapping[str, nn.Module]) -> Iterator[Mixture]:
    """Every mixture among these modules (by path), from the shapes of experts and the names of routers."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in modules.items():
        count = _experts_in(name, module)
        if count is None or any(name.startswith(f"{holder}.") for holders in found.values() for holder in holders):
            continue
        place = _router_of(name, count, modules)
        if place is not None:
            found.setdefault(place, []).append(name)
    for (path, router), holders in found.items():
        count, hidden = modules[router.rpartition(".")[0]]._parameters[router.rpartition(".")[2]].shape  # type: ignore[union-attr]
        last = modules[holders[-1]]
        lists = isinstance(last, nn.ModuleList | nn.ModuleDict)
        place = router.rpartition(".")[0]
        levels = [modules[p] for p in _up(place, path)]
        levels += [m.config for p in _up(path, "") if hasattr(m := modules[p], "config")]  # type: ignore[misc]
        yield Mixture(
            path,
            count,
            _number(levels, CHOSEN) or _named_number(modules[p] for p in _up(place, path)),
            _neurons(last, count, hidden),
            router,
            tuple(_choosing_biases(path, count, place, holders, modules)),
            holders[-1] if lists else None,
            groups := _number(levels, GROUPS, _group_limited) or 1,
            (_number(levels, GROUPS_CHOSEN) or 1) if groups > 1 else 1,
        )


def _experts_in(name: str, module: nn.Module) -> int | None:
    """How many experts a module holds the weights of, if it looks as if it did."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        children = experts_of(module).values()
        shapes = {tuple((key, p.ndim) for key, p in child.named_parameters()) for child in children}  # neurons may have gone
        says_so = "expert" in name.rpartition(".")[2].lower()
        return len(children) if says_so and len(children) > 1 and len(shapes) == 1 else None
    tensors = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
    if isinstance(module, nn.modules.conv._ConvNd) or not tensors:
        return None
    stacked = {p.shape[0] for p in tensors if p.ndim == 3}
    if len(stacked) == 1:
        return next(iter(stacked)) if next(iter(stacked)) > 1 else None
    rows = {p.shape[0] for p in tensors if p.ndim == 2}
    count = _number([module], COUNTS)
    if len(tensors) > 1 and len(rows) == 1 and count and count > 1 and next(iter(rows)) > count:  # DBRX: one below the other
        return count if next(iter(rows)) % count == 0 else None
    return None


def experts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The experts in a list of them, by name: what has weights in it (NLLB keeps a dropout there as well)."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _router_of(holder: str, count: int, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The nearest module above some experts under which a router has a row for each, and the path of those rows."""
    path = holder
    while path:
        child, path = path.rpartition(".")[2], path.rpartition(".")[0]
        for name, module in modules.items():
            inside = name == path or name.startswith(f"{path}.") or not path
            if not inside or name == holder or name.startswith(f"{holder}."):
                continue
            local = name[len(path) :].strip(".").split(".")
            for key, p in module._parameters.items():
                if p is None or p.ndim != 2 or p.shape[0] != count or not p.is_floating_point():
                    continue
                if any(ROUTER.match(word) for word in local):
                    return path, f"{name}.{key}"
        if child.isdigit():  # the layer has been looked through
            return None
    return None


def _up(path: str, top: str) -> Iterator[str]:
    """A path and all above it, down to `top`."""
    while True:
        yield path
        if path == top or not path:
            return
        path = path.rpartition(".")[0]


def _group_limited(level: Any) -> bool:
    return getattr(level, "topk_method", None) != "greedy"  # DeepSeek-V2 has groups that it does not use


def _number(levels: list[Any], names: tuple[str, ...], holds: Any = None) -> int | None:
    for level in levels:
        if holds is not None and not holds(level):
            return None
        for name in names:
            value = getattr(level, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _named_number(routers: Iterator[nn.Module]) -> int | None:
    found = [match for m in routers if (match := re.search(r"Top(\d+)", type(m).__name__))]
    return int(found[0][1]) if found else None


def _neurons(holder: nn.Module, count: int, hidden: int) -> int:
    """The inner width of the widest expert, from the last of its weights, which leads back to the hidden width."""
    if isinstance(holder, nn.ModuleList | nn.ModuleDict):
        linears = [[m for m in expert.modules() if isinstance(m, nn.Linear)] for expert in experts_of(holder).values()]
        return max((found[-1].in_features for found in linears if found), default=0)
    last = [p for p in holder._parameters.values() if p is not None and p.ndim > 1 and (p.ndim == 3 or p.shape[0] > count)][-1]
    if last.ndim == 2:
        return last.shape[0] // count
    return last.shape[2] if last.shape[1] == hidden else last.shape[1]


def _choosing_biases(path: str, count: int, router: str, holders: list[str], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for name, module in modules.items():
        inside = name == path or name.startswith(f"{path}.") or not path
        if not inside or any(name == holder or name.startswith(f"{holder}.") for holder in holders):
            continue
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point() or tensor.numel() != count or max(tensor.shape) != count:
                    continue
                if "bias" in key and not (name == router and key == "bias"):  # that one is in the scores already
                    yield f"{name}.{key}".lstrip(".")


# --- masks -------------------------------------------------------------------------------------------------------

PRODUCTS = ("linear", "matmul", "mm", "addmm", "__matmul__", "bmm")


class _Closing(TorchFunctionMode):
    """While a router runs: minus infinity for the experts that are closed, as score and as what is added to scores."""

    def __init__(self, gone: torch.Tensor, module: nn.Module, router: str, biases: tuple[str, ...]) -> None:
        super().__init__()
        self.gone, self.module, self.router, self.biases = gone, module, router, biases
        self.casts: list[torch.Tensor] = []  # what the router's weight was cast to

    def _close(self, value: Any, biases: list[Any]) -> Any:
        if any(value is bias for bias in biases):
            return value.masked_fill(self.gone.to(value.device).view(value.shape), float("-inf"))
        return value

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.biases:  # looked up at every use: weights that are offloaded come when their module runs
            biases = [_at(self.module, path) for path in self.biases]
            args = tuple(self._close(value, biases) for value in args)
            kwargs = {key: self._close(value, biases) for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        router = _at(self.module, self.router)
        if not isinstance(out, torch.Tensor) or not any(
            v is w for v in (*args, *kwargs.values()) for w in (router, *self.casts)
        ):
            return out
        if func.__name__ in PRODUCTS:
            if out.shape[-1:] == self.gone.shape:
                return out.masked_fill(self.gone.to(out.device), float("-inf"))
        elif out.numel() == router.numel():  # type: ignore[union-attr]
            self.casts.append(out)
        return out


def _at(module: nn.Module, path: str) -> torch.Tensor | None:
    """The parameter or buffer at a path."""
    *words, key = path.split(".")
    for word in words:
        module = module._modules[word]  # type: ignore[assignment]
    found = module._parameters.get(key)
    return module._buffers.get(key) if found is None else found


class ClosedExperts:
    """Two hooks: around the module that they sit on, the router never picks the experts that are closed.

    `router` and `biases` are paths from that module. Nothing here refers to the module itself, so copies of it are
    closed as well.
    """

    def __init__(self, gone: torch.Tensor, router: str, biases: tuple[str, ...]) -> None:
        self.gone, self.router, self.biases = gone, router, biases
        self.entered: list[_Closing] = []

    def before(self, module: nn.Module, args: Any) -> None:
        mode = _Closing(self.gone, module, self.router, self.biases)
        mode.__enter__()
        self.entered.append(mode)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


def close_(mixture: Mixture, module: nn.Module, kept: tuple[int, ...]) -> list[Any]:
    """Hide from the router of a mixture (this module) all experts but these; gives handles whose `remove` opens them again.

    On the mixture and on the child that holds its router: JetMoe's mixture of attentions is never called itself.
    """
    handles: list[Any] = []
    prefix = f"{mixture.name}." if mixture.name else ""
    router = mixture.router[len(prefix) :]
    biases = tuple(name[len(prefix) :] for name in mixture.biases)
    child = router.partition(".")[0]
    places: list[tuple[nn.Module, str]] = [(module, "")]
    if child in module._modules:
        places.append((module._modules[child], f"{child}."))  # type: ignore[arg-type]
    for place, local in places:
        inside = tuple(name[len(local) :] for name in biases if name.startswith(local))
        hooks = ClosedExperts(mixture.gone(kept), router[len(local) :], inside)
        handles.append(place.register_forward_pre_hook(hooks.before))
        handles.append(place.register_forward_hook(hooks.after, prepend=True, always_call=True))
    return handles


def is_closed(module: nn.Module) -> bool:
    """Whether experts of this mixture are masked."""
    return any(isinstance(getattr(hook, "__self__", None), ClosedExperts) for hook in module._forward_pre_hooks.values())


# --- what models know of their mixtures --------------------------------------------------------------------------


def settle_counts_(model: nn.Module, undo: list[Any] | None = None) -> None:
    """Tell the models in a module how many experts their mixtures have now, for the loss that balances them.

    That loss adds up the scores of all layers, expert by expert. Where layers have unequal numbers it means nothing: asking
    for it (`output_router_logits`) is refused then.
    """
    for owner in model.modules():
        names = [n for n in COUNTS if type(vars(owner).get(n)) is int] if isinstance(owner, PreTrainedModel) else []
        if not names:
            continue
        inside = [m for m in owner.modules() if not isinstance(m, PreTrainedModel)]
        counts = {vars(m)[n] for m in inside for n in COUNTS if type(vars(m).get(n)) is int}
        if not counts:
            continue
        hooks = dict(owner._forward_pre_hooks), dict(owner._forward_pre_hooks_with_kwargs)
        before = {name: vars(owner)[name] for name in names}
        for name in names:
            setattr(owner, name, max(counts))
        for key in [k for k, hook in owner._forward_pre_hooks.items() if hook is _refuse_to_balance]:
            del owner._forward_pre_hooks[key], owner._forward_pre_hooks_with_kwargs[key]
        if len(counts) > 1:
            owner.register_forward_pre_hook(_refuse_to_balance, with_kwargs=True)
        if undo is not None:
            undo.append(lambda owner=owner, hooks=hooks, before=before: _restore(owner, hooks, before))


def _restore(owner: nn.Module, hooks: tuple[dict, dict], numbers: dict[str, int]) -> None:
    for name, value in numbers.items():
        setattr(owner, name, value)
    for now, then in zip((owner._forward_pre_hooks, owner._forward_pre_hooks_with_kwargs), hooks, strict=True):
        now.clear()
        now.update(then)


def _refuse_to_balance(owner: Any, args: Any, kwargs: Any) -> None:
    asked = kwargs.get("output_router_logits")
    if asked is None:
        asked = getattr(owner.config, "output_router_logits", False)
    if asked:
        raise CompressionError(
            f"The layers of this {type(owner).__name__} keep unequal numbers of experts, so the loss that balances them "
            "(output_router_logits=True) is not defined. Leave it off, or keep equally many experts in all layers."
        )
