"""The classifier that sits after a layer, and the tokens that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..edits import CompressionError

# "maps": of feature maps whose channels come first, the mean over all places
POOLS = ("first", "mean", "last", "maps")


class ExitHead(nn.Module):
    """LayerNorm and Linear on one pooled vector a row: `W norm(pool(h)) + b`.

    The norm lets one head serve post-norm encoders and the residual stream of pre-norm models (ViT, GPT-2, Llama), whose
    scale grows with depth. A pooler (dense + tanh, as in DeeBERT) would add hidden_size squared parameters to every exit;
    PABEE's plain Linear is this head without the norm.

    Args:
        hidden_size (`int`): width of the layer's output.
        num_labels (`int`): number of classes.
        pool (`str`): `"first"` token, `"mean"` of the real tokens (or of all places, where the width comes last), or `"last"`
            real token; `"maps"`: mean over all places of feature maps (rows, width, ...).

    Example:

    ```python
    >>> import torch
    >>> from hf_compress.exits.heads import ExitHead
    >>> head = ExitHead(4, 3, "first")
    >>> hidden = torch.randn(2, 5, 4)
    >>> torch.equal(head(hidden), head.out(head.norm(hidden[:, 0])))
    True

    ```
    """

    def __init__(self, hidden_size: int, num_labels: int, pool: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, num_labels)
        self.pool = pool

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden` (rows, tokens, hidden_size), `tokens` as `tokens_to_read` gives them -> logits (rows, num_labels)."""
        pooled = pool(hidden, self.pool, tokens)
        return self.out(self.norm(pooled.to(self.out.weight.dtype)))


def pool(hidden: torch.Tensor, how: str, tokens: torch.Tensor | None) -> torch.Tensor:
    """One vector a row. `tokens`: for `"last"` its position, for `"mean"` weights (rows, tokens); None: no padding."""
    if how == "maps":
        return hidden.flatten(2).mean(-1)
    if how == "mean" and hidden.ndim > 3:
        return hidden.flatten(1, -2).mean(1)
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        if tokens is None:
            return hidden[:, -1]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), tokens.to(hidden.device)]
    if tokens is None:
        return hidden.mean(1)
    if tokens.shape != hidden.shape[:2]:
        raise CompressionError(
            f"pool='mean' cannot tell which positions are real: the attention mask is {tuple(tokens.shape)}, the layers see "
            f"{tuple(hidden.shape[:2])}. Attach the exits with pool='first' or 'last', or pass no attention_mask."
        )
    return torch.bmm(tokens.to(hidden.device, hidden.dtype)[:, None], hidden)[:, 0]


def tokens_to_read(config: Any, how: str, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """What `pool` needs to know about padding, from the model's inputs: as the model classes themselves do.

    `"last"` is the rightmost token that is not `pad_token_id` (`GPT2ForSequenceClassification` and its like), or the last
    position where there is no pad token or no token ids. `"mean"` is over the tokens of the attention mask.
    """
    if how == "last":
        ids, pad = inputs.get("input_ids"), getattr(config.get_text_config(), "pad_token_id", None)
        if ids is None or pad is None:
            return None
        positions = torch.arange(ids.shape[-1], device=ids.device, dtype=torch.int32)
        return (positions * (ids != pad)).argmax(-1)
    mask = inputs.get("attention_mask") if how == "mean" else None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    real = mask.float()
    return real / real.sum(1, keepdim=True).clamp_min(1)
