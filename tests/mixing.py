"""Tiny models with mixtures of experts, one of each kind of router that transformers has."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import transformers as T

import hf_compress as hc

BASE = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LOCAL = dict(BASE, num_local_experts=8, num_experts_per_tok=2)
EXPERTS = dict(BASE, num_experts=8, num_experts_per_tok=2)
HEADS = dict(head_dim=8)
GROUPED = dict(
    BASE, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=2,
    topk_group=1,
)  # fmt: skip
SWITCH = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=8,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
NLLB = dict(
    vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=24, num_experts=8, encoder_sparse_step=2, decoder_sparse_step=2, decoder_start_token_id=2,
)  # fmt: skip
DBRX = dict(
    vocab_size=99, d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
    attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
    ffn_config=dict(hidden_size=32, ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2, moe_normalize_expert_weights=1.0),
)  # fmt: skip
JAMBA = dict(
    EXPERTS, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
    mamba_dt_rank=4, use_mamba_kernels=False,
)  # fmt: skip
GEMMA = dict(
    BASE, head_dim=8, global_head_dim=8, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=16,
    hidden_size_per_layer_input=0, vocab_size_per_layer_input=99, num_kv_shared_layers=0,
)  # fmt: skip

FAMILIES: dict[str, Callable[[], tuple[type, T.PreTrainedConfig]]] = {
    "mixtral": lambda: (T.MixtralForCausalLM, T.MixtralConfig(**LOCAL)),
    "qwen2_moe": lambda: (
        T.Qwen2MoeForCausalLM,
        T.Qwen2MoeConfig(**EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    ),
    "qwen3_moe": lambda: (T.Qwen3MoeForCausalLM, T.Qwen3MoeConfig(**EXPERTS, **HEADS, moe_intermediate_size=16)),
    "olmoe": lambda: (T.OlmoeForCausalLM, T.OlmoeConfig(**EXPERTS)),
    "gpt_oss": lambda: (T.GptOssForCausalLM, T.GptOssConfig(**LOCAL, **HEADS, sliding_window=8)),
    "deepseek_v2": lambda: (T.DeepseekV2ForCausalLM, T.DeepseekV2Config(**GROUPED, topk_method="group_limited_greedy")),
    "deepseek_v2_greedy": lambda: (T.DeepseekV2ForCausalLM, T.DeepseekV2Config(**GROUPED, topk_method="greedy")),
    "deepseek_v3": lambda: (T.DeepseekV3ForCausalLM, T.DeepseekV3Config(**GROUPED)),
    "granitemoe": lambda: (T.GraniteMoeForCausalLM, T.GraniteMoeConfig(**LOCAL)),
    "phimoe": lambda: (T.PhimoeForCausalLM, T.PhimoeConfig(**LOCAL)),
    "llama4": lambda: (
        T.Llama4ForCausalLM,
        T.Llama4TextConfig(**LOCAL, **HEADS, intermediate_size_mlp=24, interleave_moe_layer_step=1),
    ),
    "jamba": lambda: (T.JambaForCausalLM, T.JambaConfig(**JAMBA)),
    "switch_transformers": lambda: (T.SwitchTransformersForConditionalGeneration, T.SwitchTransformersConfig(**SWITCH)),
    "dbrx": lambda: (T.DbrxForCausalLM, T.DbrxConfig(**DBRX)),
    "jetmoe": lambda: (
        T.JetMoeForCausalLM,
        T.JetMoeConfig(**{k: v for k, v in LOCAL.items() if k != "num_attention_heads"}, kv_channels=8),
    ),
    "ernie4_5_moe": lambda: (
        T.Ernie4_5_MoeForCausalLM,
        T.Ernie4_5_MoeConfig(**BASE, moe_num_experts=8, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0),
    ),
    "aria_text": lambda: (T.AriaTextForCausalLM, T.AriaTextConfig(**BASE, moe_num_experts=8, moe_topk=2)),
    "glm4_moe": lambda: (
        T.Glm4MoeForCausalLM,
        T.Glm4MoeConfig(
            **BASE,
            **HEADS,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=16,
            first_k_dense_replace=0,
        ),
    ),  # fmt: skip
    "minimax_m2": lambda: (T.MiniMaxM2ForCausalLM, T.MiniMaxM2Config(**LOCAL, **HEADS)),
    "afmoe": lambda: (
        T.AfmoeForCausalLM,
        T.AfmoeConfig(**EXPERTS, **HEADS, moe_intermediate_size=16, num_dense_layers=1, num_shared_experts=1),
    ),
    "gemma4_text": lambda: (T.Gemma4ForCausalLM, T.Gemma4TextConfig(**GEMMA)),
    "nllb_moe": lambda: (T.NllbMoeForConditionalGeneration, T.NllbMoeConfig(**NLLB)),
}
REFUSED = ("nllb_moe",)  # transformers 5.23 computes two of its experts, whatever the router says
# of the newer ones, not every version that we support has each
FAMILIES = {name: make for name, make in FAMILIES.items() if name != "gemma4_text" or hasattr(T, "Gemma4TextConfig")}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[T.PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny model with no weight, and no bias of a router, left at a trivial value, and a batch for it."""
    kind, config = FAMILIES[name]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in model.named_buffers():
            if "bias" in key:
                buffer.add_(torch.randn_like(buffer) * 0.05)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model, batch(model)


def batch(model: T.PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {})}


def plan(model: torch.nn.Module, uneven: bool = True, seed: int = 0) -> hc.Plan:
    """Other experts in every mixture, and other numbers of them if `uneven`."""
    draw, edits = random.Random(seed), []
    for i, mixture in enumerate(hc.discover(model).experts):
        size = mixture.num_experts // mixture.groups
        number = (3 if mixture.groups > 1 else 5) - (i % 2 if uneven else 0)
        kept = [g * size + e for g in range(mixture.groups) for e in draw.sample(range(size), min(number, size))]
        edits.append(hc.KeepExperts(mixture.name, kept))
    return hc.Plan(edits)


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits
