"""How far a student is from its teachers: one number per row or token, from logits or hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.function
from torch.nn import functional as F

# logits in work at a time: what stays in a processor's cache, and what a GPU has memory for
CPU_ELEMENTS, ELEMENTS = 2**18, 2**26


def kl_divergence(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    weights: Sequence[float] = (1.0,),
    temperature: float = 1.0,
    exists: torch.Tensor | None = None,
) -> torch.Tensor:
    """`T² · KL(p ‖ q)` over the last dimension, with `q = softmax(student / T)` and `p` what the teachers say.

    `p = Σ_k w_k · softmax(teacher_k / T)`: teachers are averaged as distributions, not as logits. The factor T² keeps the
    size of the gradient when T changes (Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", 2.1).

    Args:
        student (`torch.Tensor`): logits (..., classes).
        teachers (`Sequence[torch.Tensor]`): logits of each teacher, shaped as the student's.
        weights (`Sequence[float]`, defaults to `(1.0,)`): of each teacher; they sum to one.
        temperature (`float`, defaults to 1.0): T.
        exists (`torch.Tensor`, *optional*): bool (..., classes); classes that are false are left out on both sides.

    Returns:
        `torch.Tensor` (...): one divergence per row or token, at least in float32.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.distillation.losses import kl_divergence
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()  # 1/2 1/2 against 3/4 1/4
    >>> kl_divergence(student, [teacher])  # 3/4 log(3/2) + 1/4 log(1/2)
    tensor([0.1308])

    ```
    """
    return _KLDivergence.apply(student, temperature, weights, exists, *teachers)


class _KLDivergence(torch.autograd.Function):
    """Some rows at a time, with the gradient `T (q − p)` taken along.

    Over a vocabulary the terms are as large as all logits, in float32; this keeps one such tensor and not six.
    """

    @staticmethod
    def forward(ctx, student, temperature, weights, exists, *teachers):  # type: ignore[override]
        flat, others = student.reshape(-1, student.shape[-1]), [t.reshape(-1, student.shape[-1]) for t in teachers]
        exists = None if exists is None else exists.expand(student.shape).reshape(flat.shape)
        divergence = flat.new_empty(flat.shape[0], dtype=torch.promote_types(flat.dtype, torch.float32))
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        rows = max(1, (CPU_ELEMENTS if flat.device.type == "cpu" else ELEMENTS) // flat.shape[1])
        for some in (slice(begin, begin + rows) for begin in range(0, len(flat), rows)):
            there = None if exists is None else exists[some]
            q = _log_softmax(flat[some], temperature, there)
            log_p = _mixture([_log_softmax(logits[some], temperature, there) for logits in others], weights)
            p = log_p.exp()
            divergence[some] = log_p.sub_(q).mul_(p).sum(-1) * temperature**2
            if gradient is not None:
                gradient[some] = q.exp_().sub_(p).mul_(temperature)
        ctx.save_for_backward(gradient)
        return divergence.view(student.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        weighted = gradient * upstream.reshape(-1, 1).to(gradient.dtype)
        return weighted.view(*upstream.shape, -1), None, None, None, *[None] * (len(ctx.needs_input_grad) - 4)


def binary_kl_divergence(
    student: torch.Tensor, teachers: Sequence[torch.Tensor], weights: Sequence[float] = (1.0,), temperature: float = 1.0
) -> torch.Tensor:
    """`T² · KL(p ‖ q)` of one Bernoulli distribution per label, averaged over the labels (as `BCEWithLogitsLoss` does).

    `q = sigmoid(student / T)` and `p = Σ_k w_k · sigmoid(teacher_k / T)`.

    Args:
        student (`torch.Tensor`): logits (..., labels).
        teachers (`Sequence[torch.Tensor]`): logits of each teacher, shaped as the student's.
        weights (`Sequence[float]`, defaults to `(1.0,)`): of each teacher; they sum to one.
        temperature (`float`, defaults to 1.0): T.

    Returns:
        `torch.Tensor` (...): one number per row, at least in float32.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.distillation.losses import binary_kl_divergence
    >>> teacher = torch.tensor([[3.0]]).log()  # sigmoid: 3/4
    >>> binary_kl_divergence(torch.zeros(1, 1), [teacher])
    tensor([0.1308])

    ```
    """
    student = _wide(student) / temperature
    with torch.no_grad():
        softened = [_wide(logits) / temperature for logits in teachers]
        yes, no = (_mixture([F.logsigmoid(sign * logits) for logits in softened], weights) for sign in (1, -1))
    divergence = yes.exp() * (yes - F.logsigmoid(student)) + no.exp() * (no - F.logsigmoid(-student))
    return divergence.mean(-1) * temperature**2


def squared_error(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    weights: Sequence[float] = (1.0,),
    exists: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mean_c (student_c − Σ_k w_k · teacher_kc)²` over the last dimension. No temperature.

    For regression, and on logits as an alternative to the divergence (Ba & Caruana 2014, "Do Deep Nets Really Need to be
    Deep?"), which is what Hinton's loss becomes at high temperature.

    Args:
        student (`torch.Tensor`): predictions or logits (..., outputs).
        teachers (`Sequence[torch.Tensor]`): of each teacher, shaped as the student's.
        weights (`Sequence[float]`, defaults to `(1.0,)`): of each teacher; they sum to one.
        exists (`torch.Tensor`, *optional*): bool (..., outputs); outputs that are false are left out of the mean.

    Returns:
        `torch.Tensor` (...): one number per row or token, at least in float32.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.distillation.losses import squared_error
    >>> squared_error(torch.tensor([[1.0, 2.0]]), [torch.tensor([[1.0, 4.0]])])
    tensor([2.])

    ```
    """
    with torch.no_grad():
        target = sum(weight * _wide(logits) for weight, logits in zip(weights, teachers, strict=True))
    error = (_wide(student) - target).square()
    if exists is None:
        return error.mean(-1)
    return torch.where(exists, error, 0.0).sum(-1) / exists.sum(-1).clamp_min(1)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """`1 − cos(student, teacher)` over the last dimension (Sanh et al. 2019, "DistilBERT", section 2).

    Args:
        student (`torch.Tensor`): hidden states (..., width).
        teacher (`torch.Tensor`): hidden states (..., width).

    Returns:
        `torch.Tensor` (...): one number per token, at least in float32.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.distillation.losses import cosine_distance
    >>> cosine_distance(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])).abs()
    tensor([1., 0.])

    ```
    """
    return 1 - F.cosine_similarity(_wide(student), _wide(teacher), dim=-1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_softmax(logits: torch.Tensor, temperature: float, exists: torch.Tensor | None) -> torch.Tensor:
    logits = _wide(logits) / temperature
    if exists is not None:  # not -inf, whose difference is not a number
        logits = logits.masked_fill(~exists, torch.finfo(logits.dtype).min)
    return F.log_softmax(logits, -1)


def _mixture(log_probabilities: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`log Σ_k w_k p_k`"""
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    stacked = torch.stack(log_probabilities)
    shares = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).log()
    return torch.logsumexp(stacked + shares.view(-1, *[1] * (stacked.dim() - 1)), 0)
