"""Plans that keep the experts that a model's router picks on the user's batches. The model is looked at, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .discover import discover
from .edits import CompressionError, KeepExperts, shown
from .grams import checked_batches, run_batches
from .mixtures import Mixture
from .plan import Plan
from .probe import quiet_run

SCORES = ("frequency", "weight")
SCOPES = ("layer", "global")


def plan_experts(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    keep: int | float,
    score: str = "frequency",
    scope: str = "layer",
) -> Plan:
    r"""A plan that keeps the experts which the router uses most on these batches.

    `"frequency"`: the share of tokens for which the router picks expert e, `1/T sum_t [e in top-k(t)]`; `"weight"`: its weight
    in them, `1/T sum_t w_e(t)`, zero where it is not picked. Both are the counts that SEER-MoE prunes by (Muzio et al. 2024:
    heavy hitters, hard and soft); Lu et al. 2024 ("Not All Experts are Equal") compare their search with frequency.

    Args:
        model (`nn.Module`): a transformers model with mixtures of experts.
        batches (`Iterable[dict]`): as for `model(**batch)`; a few hundred rows. Tokens that an `attention_mask` hides are
            left out.
        keep (`int` or `float`): experts that stay: so many in every mixture, or this share of them, in (0, 1). Never fewer than
            a token needs; where the router first chooses groups, equally many in each group.
        score (`str`, defaults to `"frequency"`): or `"weight"`.
        scope (`str`, defaults to `"layer"`): the same number in every mixture, which plain transformers can load;
            `"global"`: a share of all experts of the model, more of them in layers that spread their tokens.

    Returns:
        `Plan`: one `KeepExperts` per mixture that loses some.

    Raises:
        CompressionError: no mixture, options that mean nothing, a mixture that no batch reaches or whose picks cannot be seen.

    Example:

    ```python
    >>> import torch
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from hf_compress import apply_, plan_experts
    >>> model = MixtralForCausalLM(MixtralConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    ...     intermediate_size=24, num_local_experts=8, num_experts_per_tok=2,
    ... )).eval()
    >>> plan = plan_experts(model, [{"input_ids": torch.arange(5, 85).view(4, 20)}], keep=0.5)
    >>> len(plan.edits[0].experts), apply_(model, plan).config.num_local_experts
    (4, 4)

    ```
    """
    if score not in SCORES or scope not in SCOPES:
        raise CompressionError(f"score is one of {SCORES} and scope one of {SCOPES}, got {shown(score)} and {shown(scope)}.")
    share = isinstance(keep, float) and 0 < keep < 1
    if not share and (type(keep) is not int or keep < 1):
        raise CompressionError(f"keep is a number of experts (1 or more) or a share of them in (0, 1), got {shown(keep)}.")
    if not isinstance(model, nn.Module):
        raise CompressionError(f"plan_experts takes a model, got {shown(model)}.")
    mixtures = discover(model).experts
    if not mixtures:
        raise CompressionError(f"{type(model).__name__} has no mixture of experts; see discover(model).")
    if scope == "global" and not share:
        raise CompressionError(f"scope='global' keeps a share of all experts, in (0, 1); got keep={shown(keep)}.")
    if scope == "global" and any(mixture.groups > 1 for mixture in mixtures):
        raise CompressionError("Routers that first choose groups need equally many experts in each: use scope='layer'.")
    used = measure_experts(model, mixtures, checked_batches(batches))[SCORES.index(score)]
    if scope == "global":
        kept = _over_all(mixtures, used, float(keep))
    else:
        kept = {m.name: _in_one(m, used[m.name], max(1, round(keep * m.num_experts)) if share else int(keep)) for m in mixtures}
    return Plan([KeepExperts(m.name, kept[m.name]) for m in mixtures if len(kept[m.name]) < m.num_experts])


def _in_one(mixture: Mixture, used: torch.Tensor, number: int) -> tuple[int, ...]:
    """The experts of one mixture that are used most, equally many of each group."""
    per = max(number, mixture.top_k or 1)
    if mixture.groups > 1:
        per = max(round(number / mixture.groups), 2 if mixture.biases else 1, -(-(mixture.top_k or 1) // mixture.groups_chosen))
    size = mixture.num_experts // mixture.groups
    best = used.view(mixture.groups, size).topk(min(per, size), dim=1).indices
    return tuple(sorted((best + size * torch.arange(mixture.groups)[:, None]).flatten().tolist()))


def _over_all(mixtures: tuple[Mixture, ...], used: Mapping[str, torch.Tensor], keep: float) -> dict[str, tuple[int, ...]]:
    """The experts that are used most of all mixtures together, and those that a token needs in each."""
    kept = {m.name: set(_in_one(m, used[m.name], 1)) for m in mixtures}
    left = round(keep * sum(m.num_experts for m in mixtures)) - sum(map(len, kept.values()))
    others = [(-used[m.name][e].item(), m.name, e) for m in mixtures for e in range(m.num_experts) if e not in kept[m.name]]
    for _, name, expert in sorted(others)[: max(left, 0)]:
        kept[name].add(expert)
    return {name: tuple(sorted(experts)) for name, experts in kept.items()}


def measure_experts(
    model: nn.Module, mixtures: Iterable[Mixture], batches: list[Mapping[str, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """How often each expert of each mixture is picked, per token, and its mean weight per token.

    Returns:
        two dicts from the names of mixtures to (experts,) tensors. The first adds up to the number of experts per token.
    """
    mixtures = list(mixtures)
    picked = {m.name: torch.zeros(m.num_experts, dtype=torch.float64) for m in mixtures}
    weighed = {m.name: torch.zeros(m.num_experts, dtype=torch.float64) for m in mixtures}
    tokens = dict.fromkeys(picked, 0)
    masks: dict[str, torch.Tensor | None] = {}

    def see(mixture: Mixture, values: Any) -> bool:
        found = picks_in(mixture, values)
        if found is None:
            return False
        index, weight = found
        mask = masks["decoder" if "decoder" in mixture.name.split(".") else "encoder"]
        if mask is not None and mask.numel() == len(index):
            rows = mask.flatten().bool().to(index.device)
            index, weight = index[rows], weight[rows]
        flat = index.flatten().cpu()
        used = flat >= 0
        picked[mixture.name] += torch.bincount(flat[used], minlength=mixture.num_experts)
        weighed[mixture.name].index_add_(0, flat[used], weight.flatten().cpu().double()[used])
        tokens[mixture.name] += len(index)
        return True

    def after(mixture: Mixture, module: nn.Module, args: Any, output: Any) -> None:
        done[mixture.name] = see(mixture, output if isinstance(output, tuple) else (output,))

    def before(mixture: Mixture, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not done.get(mixture.name):
            done[mixture.name] = see(mixture, (*args, *kwargs.values()))

    done: dict[str, bool] = {}
    handles = []
    try:
        for mixture in mixtures:
            router = mixture.router[len(mixture.name) :].lstrip(".").partition(".")[0]
            for name, child in model.get_submodule(mixture.name).named_children():
                if name == router:
                    handles.append(child.register_forward_hook(partial(after, mixture)))
                elif "expert" in name:
                    handles.append(child.register_forward_pre_hook(partial(before, mixture), with_kwargs=True))
        with quiet_run(model) as run:
            for _ in run_batches(model, run, batches, masks, "count experts"):
                done.clear()
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, number in tokens.items() if not number]
    if unseen:
        raise CompressionError(
            f"No batch showed which experts {unseen[0]!r} picks (of {len(tokens)} mixtures): none reaches it, or its router "
            "says it in a way that is not known here. Give other batches, or write KeepExperts by hand."
        )
    return tuple({name: total[name] / tokens[name] for name in total} for total in (picked, weighed))  # type: ignore[return-value]


def picks_in(mixture: Mixture, values: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which experts each token goes to (-1: to none) and with what weight, from what a router gives or experts get.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.expert_plans import picks_in
    >>> from hf_compress.mixtures import Mixture
    >>> mixture = Mixture("mlp", 4, 2, 64, "mlp.gate.weight")
    >>> picks_in(mixture, (torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]])))
    (tensor([[3, 1]]), tensor([[0.7500, 0.2500]]))

    ```
    """
    count, top_k = mixture.num_experts, mixture.top_k or 1
    tensors = [v.detach() for v in values if isinstance(v, torch.Tensor)]
    whole = [t for t in tensors if not t.is_floating_point() and t.ndim > 1 and t.numel()]
    real = [t for t in tensors if t.is_floating_point()]
    for index in whole:  # most: the chosen, and their weights
        weight = next((t for t in real if t.shape == index.shape), None)
        if index.shape[-1] == top_k and weight is not None and int(index.max()) < count and int(index.min()) >= 0:
            return index.reshape(-1, top_k), weight.reshape(-1, top_k)
    for index in whole:  # Switch: a one at the chosen, none where its capacity is used up
        weight = next((t for t in real if t.shape == (*index.shape[:-1], 1)), None)
        if index.shape[-1] == count and weight is not None and top_k == 1 and set(index.sum(-1).unique().tolist()) <= {0, 1}:
            rows = index.reshape(-1, count)
            chosen = torch.where(rows.sum(-1) > 0, rows.argmax(-1), -1)
            return chosen[:, None], weight.reshape(-1, 1)
    for weight in real:  # Llama 4: zero for all that are not chosen
        if weight.shape[-1] == count and bool(((weight != 0).sum(-1) == top_k).all()):
            rows = weight.reshape(-1, count)
            return rows.topk(top_k, dim=-1).indices, rows.topk(top_k, dim=-1).values
    sizes = next((v for v in values if isinstance(v, list) and len(v) == count and all(type(n) is int for n in v)), None)
    for scores in real if sizes is not None else ():  # JetMoe: how many tokens each gets, and the scores
        if scores.shape[-1] == count:
            best = scores.reshape(-1, count).topk(top_k, dim=-1)
            if torch.bincount(best.indices.flatten(), minlength=count).tolist() == sizes:
                return best.indices, best.values.softmax(-1)
    return None
