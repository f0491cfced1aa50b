"""A tiny config of any model type: its own default config, made small key by key."""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import CONFIG_MAPPING

from .overrides import DROP

WIDTH, HEADS, KV_HEADS, HEAD_DIM, NEURONS, LAYERS, VOCABULARY, POSITIONS = 64, 4, 2, 24, 80, 3, 99, 64

# (pattern of a key, small value); the first that matches is taken. None leaves the value alone.
RULES: tuple[tuple[str, Any], ...] = (
    (r"n_window|n_window_infer|conv_chunksize|keypoint_decoder_dim", None),
    (r"shape_size", 8),
    (r"coordinate_size", 12),
    (r"num_(bpe|wordpiece)_labels", 20),
    (r"mm_tokens_per_image", 4),
    (r"encoder_hidden_dim|decoder_hidden_dim|output_channels|(mask|fpn)_feature_size", WIDTH),
    (r"num_pos_feats", WIDTH // 2),
    (r"codebook_dim|vector_quantization_hidden_dimension|bottleneck_features|d_latents", WIDTH),
    (r"max_img_size", 64),
    (r"(num_|n_)?(expert_?groups?|group)|n_group|num_expert_group", 1),
    (r"topk_group", 1),
    (r"(num_|n_)?(experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|top_k|router_topk)", 2),
    (r"(.*_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_routed_experts|zero_expert_num", 4),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r".*(key_value|kv)_heads|kv_n_heads|.*num_kv_heads", KV_HEADS),
    (r"(q|o)_lora_rank", 40),
    (r"kv_lora_rank", 32),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_head_dim", 24),
    (r"rotary_dim", 8),
    (r"upsample_groups", WIDTH),
    (r"num_groups", 8),
    (r"v_head_dim", 16),
    (r"index_n_heads", 2),
    (r"index_head_dim", 16),
    (r"index_topk", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim", 8),
    (r"linear_num_heads", 4),
    (r"linear_head_dim", 16),
    (r"mamba_(n_heads|num_heads)", 16),
    (r"mamba_(d_head|head_dim)", 8),
    (r"mamba_d_ssm", 128),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r"mamba_n_groups|n_groups", 1),
    (r"(mamba_)?chunk_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"chunk_size_feed_forward|pretraining_tp|num_channels|.*in_chans|num_hidden_groups|inner_group_num", None),
    (
        r"num_encoder_blocks|num_stages|num_key_value_groups|cross_attention_frequency|spatial_merge_size|temporal_patch_size|merge_size|num_labels",
        None,
    ),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_kv_shared_layers", 1),
    (r"moe_layer_end_index", 2),
    (r"max_window_layers", 2),
    (r"_?sliding_window_pattern|global_attn_every_n_layers|decoder_sparse_step|encoder_sparse_step|no_rope_layer_interval", 2),
    (r"sliding_window|sliding_window_size|local_attention|attention_chunk_size|keep_window_size", 8),
    (r"attention_window", 8),
    (
        r".*(hidden|encoder|decoder|transformer|self_attn|text|vision|spatial|temporal|auxiliary|qformer|resampler|global|local)_"
        r"(layers|blocks|depth)|num_layers|n_layers?|layers|depth|num_block_?s|[lxr]_layers|num_attention_layers"
        r"|num_hidden_layers|num_attention_blocks|num_self_attends_per_block",
        LAYERS,
    ),
    (r"num_layers_per_stack", 2),
    (r".*_head_dim|head_dim|attention_head_size|d_kv|kv_channels|d_head|dim_head|head_size|cross_head_dim", HEAD_DIM),
    (
        r".*(attention_heads|n_heads?|num_heads|self_attention_heads|cross_attention_heads)|heads|encoder_heads|decoder_heads"
        r"|resampler_heads",
        HEADS,
    ),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|ffn_size|linear_units|mlp_dim|feedforward_dim|dim_feedforward"
        r"|feed_forward_hidden_size|intermediate_dim|mlp_hidden_size|ffn_inner_dim)(_mlp)?"
        r"|d_ff|dff|dim_ff|d_inner|n_inner|mlp_hidden_dim|hidden_dim|expert_hidden_size|moe_hidden_size",
        NEURONS,
    ),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?vocab(_size)?(_per_layer_input)?|vocab_size_.*|.*_vocab_size(_base)?", VOCABULARY),
    (r"vocab_offset", 60),
    (r"codebook_size|num_codebook_entries|num_embeddings|num_codevectors_per_group|num_centroids", 32),
    (r"codebook_dim|codevector_dim|proj_codevector_dim|classifier_proj_size|.*projection_dim|.*_proj_dim|latent_dim", 32),
    (r"word_embed_proj_dim", WIDTH),
    (r"max_2d_position_embeddings", 64),
    (
        r"(max_|n_)?(position|source|target|encoder_position|decoder_position)?_?(positions|position_embeddings)"
        r"|.*_position_embeddings|max_(source|target)_positions|n_ctx|block_size|max_seq_len|context_length",
        POSITIONS,
    ),
    (r".*(_token_id|_token_index|_token|_id|_idx|_index)", None),
    (r"num_queries|two_stage_num_proposals|num_query_tokens|query_length|n_latents|num_latents", 8),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_mel_bins|feature_size|n_mels|mel_bins|num_mel|mel_dim", 16),
    (r"out_hidden_size|output_hidden_size|embedding_size|pooler_hidden_size|text_hidden_size|vision_hidden_size", WIDTH),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|model_dim|emb_dim|dim|output_size|attention_hidden_size|hidden_channels"
        r"|embedding_dim|output_dim|dim_model|projection_size|condition_dim|pooler_output_size)",
        WIDTH,
    ),
    (r"image_size|img_size|crop_size|pretrain_image_size|resolution", 32),
    (r"patch_size", 8),
    (r"num_register_tokens|num_registers", 2),
    (r"num_frames", 4),
    (r"window_size", 4),
    (r"upsample_initial_channel", 32),
    (r"expert_capacity", 64),
    (r"relative_attention_num_buckets|num_buckets|rel_pos_bins|rel_2d_pos_bins", 8),
    (r"relative_attention_max_distance|max_rel_pos|max_rel_2d_pos", 16),
    (r"num_filters", 8),
    (r"image_embedding_size", 4),
    (r"input_size", 32),
    (r"latent_query_num", 6),
    (r"d_rel", 8),
    (r"rel_extent", 32),
)
SKIP = {"id2label", "label2id", "torch_dtype", "dtype", "transformers_version", "stage_names", "out_features"}
NONE = {
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
}  # what defaults leave open
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 2, "unk": 3, "sep": 2, "cls": 1, "mask": 3, "forced_eos": 2,
           "forced_bos": 1, "begin": 1}  # fmt: skip
PER_LAYER = re.compile(r"layers_block_type|.*layer_types|indexer_types|layer_rope_theta|no_rope_layers|block_types"
                       r"|activation_sparsity_pattern|intermediate_size|num_key_value_heads|num_attention_heads|.*_per_layer"
                       r"|attention_types|.*_by_layer|layer_.*|layers_.*")  # fmt: skip


def tiny_config(kind: str, variant: dict[str, Any] | None = None, override: dict[str, Any] | None = None) -> Any:
    """The default config of a model type, small. `variant` replaces values of `RULES`; `override` has the last word."""
    cls = CONFIG_MAPPING[kind]
    data = default_dict(kind)
    tokens: dict[str, int] = {}
    small = _shrunk(data, variant or {}, tokens)
    merge(small, override or {})
    small.pop("model_type", None)
    config = cls.from_dict(small)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def default_dict(kind: str) -> dict[str, Any]:
    cls: Any = CONFIG_MAPPING[kind]
    try:
        return cls().to_dict()
    except Exception:
        return cls(text_config={"hidden_size_per_layer_input": 0}).to_dict() if kind == "gemma4_assistant" else {}


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if value is DROP:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict) and not value.get("_replace"):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _shrunk(data: dict[str, Any], variant: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    chosen = _chosen_layers(data)
    known: dict[int, int] = {}
    for key, value in data.items():
        if type(value) is int and value >= 32:
            new = _number(key, value, variant, chosen)
            if new is not None and new != value:
                known.setdefault(value, new)
    for key, value in data.items():
        if key in SKIP or key.startswith("_name"):
            if key in ("dtype", "torch_dtype", "transformers_version"):
                continue
            small[key] = value
        elif isinstance(value, dict):
            if key in ("rope_parameters", "rope_scaling"):
                small[key] = _rope(value, variant, data)
            elif key == "per_layer_config":
                small[key] = {
                    str(new): {**_shrunk(value[old], {**variant, "head_dim": 32}, tokens)}
                    for new, i in enumerate(chosen or range(LAYERS))
                    if (old := next((k for k in value if int(k) == i), None)) is not None
                }
            elif key.endswith("config") or "model_type" in value or key in ("encoder", "decoder", "generator"):
                small[key] = _shrunk(value, variant, tokens)
            else:
                small[key] = value
        elif isinstance(value, list | tuple) and value:
            small[key] = _list(key, list(value), data, chosen, variant, tokens)
        elif value is None and key in NONE:
            small[key] = variant.get({"head_dim": "head_dim", "num_key_value_heads": "kv"}.get(key, ""), NONE[key])
        elif key.endswith("layerdrop"):  # a layer that is left out by chance would seem not to train
            small[key] = 0.0
        elif isinstance(value, bool) or value is None or isinstance(value, str | float):
            small[key] = value
        elif isinstance(value, int):
            small[key] = _token(key, value, tokens) if _is_token(key) else _number(key, value, variant, chosen)
            if small[key] is None:
                small[key] = known.get(value, value) if value > 512 else value
        else:
            small[key] = value
    if "spatial_merge_size" in small and small.get("window_size") == 4:
        small["window_size"] = 32
    if isinstance(small.get("image_grid_pinpoints"), list):
        small["image_grid_pinpoints"] = [[32, 64], [64, 32], [64, 64]]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small and "head_dim" in small:  # of multi-head latent attention: what is rotated
        small["head_dim"] = small["qk_rope_head_dim"]
    if isinstance(data.get("embed_dim"), int) and isinstance(
        data.get("depths"), list
    ):  # Swin: the width doubles in every stage
        size: Any = [64, 64] if isinstance(data.get("image_size"), list) else 64
        small.update(embed_dim=16, image_size=size)
        small.update({k: v for k, v in (("window_size", 2), ("patch_size", 4)) if isinstance(data.get(k), int)})
        if data.get("hidden_size") == data["embed_dim"] * 2 ** (len(data["depths"]) - 1):
            small["hidden_size"] = 16 * 2 ** (len(data["depths"]) - 1)
    if isinstance(data.get("downsampling_ratios"), list) and "encoder_hidden_size" in data:  # codecs: doubled with every ratio
        small["encoder_hidden_size"] = 8
        if "hidden_size" in data:
            small["hidden_size"] = 8 * 2 ** len(data["downsampling_ratios"])
    if "embed_dim_per_stage" in data:  # Hiera
        small.update(hidden_size=16, embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 4])
    if "backbone_channel_list" in data:
        small["backbone_channel_list"] = [128, 64, 32, 16]
    _stages(small, data)
    return small


def _stages(small: dict[str, Any], data: dict[str, Any]) -> None:
    """What a backbone gives: of stages as many as there were, of layers the first ones."""
    indices = data.get("out_indices") or data.get("_out_indices")
    for name in ("out_indices", "out_features", "stage_names", "_out_indices", "_out_features"):
        small.pop(name, None)
    if not indices:
        return
    layers = next((key for key in ("num_hidden_layers", "depth") if isinstance(data.get(key), int)), None)
    if any(key in data for key in ("depths", "stage_num_blocks", "num_stages")) or not layers:
        small["out_indices"] = list(indices)
    else:
        small[layers] = max(LAYERS, len(indices))
        small["out_indices"] = [small[layers]] if len(indices) == 1 else list(range(1, len(indices) + 1))


def _rope(value: dict[str, Any], variant: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    if value and all(isinstance(v, dict) for v in value.values()):
        return {key: _rope(v, variant, data) for key, v in value.items()}
    value = dict(value)
    if (
        "mrope_section" in value or value and MROPE.fullmatch(str(data.get("model_type")))
    ):  # they sum to half of what is rotated
        head_dim = variant.get("head_dim", HEAD_DIM) if "head_dim" in data else WIDTH // HEADS
        half, count = int(head_dim * value.get("partial_rotary_factor", 1)) // 2, len(value.get("mrope_section", "hwt"))
        value["mrope_section"] = [half - (count - 1) * (half // count), *[half // count] * (count - 1)]
    if "original_max_position_embeddings" in value:
        value["original_max_position_embeddings"] = POSITIONS // 2
    return value


MROPE = re.compile(  # their default is in the code of the model
    r"(cohere_compass|cosmos3_(edge|omni)|ernie4_5_vl_moe|glm4v|glm4v_moe|glm46v|glmga|glm_image|glm_ocr|hunyuan_vl|paddleocr_vl"
    r"|qwen(2|2_5|3)_vl(_moe)?|qwen2_5_omni\w*|qwen3_5(_moe)?|qwen3_omni_moe\w*|qwen4_exp)(_text)?"
)


def _is_token(key: str) -> bool:
    return bool(re.search(r"(_token_id|_token_index|_token_ids|_start_id|_end_id|_bos_id|_eos_id|_id)$", key)) or key in (
        "image_token", "video_token", "bos_index", "eos_index", "pad_index", "unk_index", "mask_index", "image_patch_id",
    )  # fmt: skip


def _token(key: str, value: int, tokens: dict[str, int]) -> int:
    if value < 0:
        return value
    name = re.sub(r"_(token_id|token_index|token|id|index)$", "", key)
    if name in SPECIAL:
        return SPECIAL[name]
    if name not in tokens:
        tokens[name] = VOCABULARY - 1 - len(tokens)
    return tokens[name]


def _number(key: str, value: int, variant: dict[str, Any], chosen: list[int] | None) -> int | None:
    for pattern, small in RULES:
        if re.fullmatch(pattern, key):
            if small == LAYERS and chosen and not re.match(r"(encoder|decoder)_", key):
                return len(chosen)
            if small is None or value == 0:
                return value
            if (
                isinstance(small, int)
                and small > value
                and key not in ("head_dim", "v_head_dim")
                and small not in (KV_HEADS, LAYERS)
            ):
                return value
            return variant.get({HEAD_DIM: "head_dim", KV_HEADS: "kv"}.get(small, ""), small)
    return channels(value) if key.endswith("channels") and value >= 8 else None


def _layer_count(data: dict[str, Any]) -> int | None:
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"):
        if isinstance(data.get(key), int):
            return data[key]
    return None


def _chosen_layers(data: dict[str, Any]) -> list[int] | None:
    """Which of the default layers stay: together they show every kind of layer, three at least."""
    count = _layer_count(data)
    lists = [v for k, v in data.items() if isinstance(v, list) and v and PER_LAYER.fullmatch(k) and len(v) == count]
    if not count or not lists:
        return None
    seen: dict[tuple, int] = {}
    for index, row in enumerate(zip(*(map(str, v) for v in lists), strict=True)):
        seen.setdefault(row, index)
    chosen = sorted(seen.values())[:6]
    for index in range(count):
        if len(chosen) >= LAYERS:
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def _list(key: str, value: list, data: dict[str, Any], chosen: list[int] | None, variant: dict, tokens: dict) -> list:
    if _is_token(key) and all(isinstance(v, int) for v in value):
        return [_token(key, value[0], tokens)]
    if chosen and len(value) == _layer_count(data) and PER_LAYER.fullmatch(key):
        value = [value[i] for i in chosen]
    if key in ("depths", "stage_num_blocks", "num_block_repeats", "blocks_per_stage"):
        return [min(v, 2) for v in value]
    if key == "decoder_in_channels":
        return [WIDTH for _ in value]
    if key == "backbone_feature_sizes":
        return [[8, 8], [4, 4], [2, 2]]
    if key == "global_attention_blocks":
        return [4]
    if key in ("global_attn_indexes", "deepstack_visual_indexes", "fullatt_block_indexes"):
        return [1]
    if key in ("image_size",):
        return [32 for _ in value]
    if key in ("num_heads", "num_attention_heads", "num_attention_heads_per_stage") and all(isinstance(v, int) for v in value):
        return [1 << (min(v, HEADS).bit_length() - 1) for v in value]
    if key in ("intermediate_size",):
        return [NEURONS for _ in value]
    return value if LEFT.search(key) else _channels(value, bool(CHANNELS.search(key)))


LEFT = re.compile(
    r"subsampling_conv_channels|kernel|stride|pad|patch|window|dilat|ratio|scale|rate|factor|indic|index|expan|repeat|tubelet|grid|idx|lags"
)
CHANNELS = re.compile(r"channel|dim|hidden_sizes|width|filters|feature_sizes|units")


def channels(value: int) -> int:
    """A width of a convolution, small; equal widths stay equal."""
    return max(8, -(-value // 16 // 8) * 8) if value <= 1024 else 64 + 16 * (value // 1024)


def _channels(value: Any, all_of_them: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_channels(v, all_of_them) for v in value]
    return channels(value) if type(value) is int and value >= (8 if all_of_them else 64) else value
