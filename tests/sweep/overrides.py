"""What the rules of `shrink` cannot know about a type."""

from __future__ import annotations

from typing import Any

DROP = object()  # a key that goes

# type -> class, where the first mapping would give one that is no good
CLASSES: dict[str, str] = {
    "sapiens2": "Sapiens2Model",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}

_SERIES: dict[str, Any] = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 2,
                           "distribution_output": "normal", "feature_size": DROP}  # fmt: skip
_EFFICIENT: dict[str, Any] = {"in_channels": [32, 16, 24, 40, 80, 112, 192], "out_channels": [16, 24, 40, 80, 112, 192, 320],
                         "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}  # fmt: skip
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]}
_COMPASS: dict[str, Any] = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}, "head_dim": 24}
_IMAGE_TOKENS: dict[str, Any] = {
    f"IMGIMG{str(i).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z": 50 + i for i in range(32)
}
# a backbone of transformers' own in the place of timm's
_RESNET: dict[str, Any] = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
                           "layer_type": "bottleneck", "features_only": DROP, "backbone": DROP}  # fmt: skip
_LAST = {"backbone_config": {**_RESNET, "out_features": ["stage4"], "out_indices": [4]}}
_LAST_THREE = {"backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"], "out_indices": [2, 3, 4]}}
# type -> values that replace those of the shrunk config
OVERRIDES: dict[str, dict[str, Any]] = {
    "detr": _LAST,
    "conditional_detr": _LAST,
    "dab-detr": _LAST,
    "table-transformer": _LAST,
    "deformable_detr": _LAST_THREE,
    "autoformer": {**_SERIES, "moving_average": 5},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "attention_layers": DROP, "window_size": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "granite_speech5_ctc": {"context_size": 8, "encoder_config": {"context_size": 8}},
    "granite_speech5_encoder": {"context_size": 8},
    "lw_detr_vit": {"num_windows": 4, "image_size": 32, "num_windows_side": 2},
    "lw_detr": {"backbone_config": {"num_windows": 4, "image_size": 32, "num_windows_side": 2}},
    "mistral_large4_text": {"kv_source_layers": DROP},
    "mistral_large4": {"text_config": {"kv_source_layers": DROP}},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "efficientloftr": {"hidden_size": 256},
    "deepseek_v4": {"o_groups": 2},
    "grounding-dino": {"text_config": {"vocab_size": 1100}},
    "mm-grounding-dino": {"text_config": {"vocab_size": 1100}},
    "pvt": {"image_size": 64},  # with 32, every stage has one key, which no query can choose
    "pvt_v2": {"image_size": 64},
    "videoprism_vision_model": {"image_size": 36},
    "d_fine": {"head_dim": DROP},
    "deimv2": {"head_dim": DROP},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 20},
    "lilt": {"hidden_size": 96},
    "llama4": {"vision_config": {"intermediate_size": 256}},
    "llama4_vision_model": {"intermediate_size": 256},
    "mllama": {"vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192}},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "tvp": {"visual_prompt_size": 8},
    "chameleon": {
        "image_token_id": 90,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
        "vocabulary_map": {"<image>": 90, **_IMAGE_TOKENS},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "florence2": {"vision_config": {"projection_dim": 64}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "mask2former": {"feature_size": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "nemo_speechlm": {"audio_config": {"chunk_right_context": 2, "chunk_left_context": 2}},
    "neomme": {"head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "text_config": {"hidden_size_per_layer_input": 0}},
    "efficientnet": _EFFICIENT,
    "align": {
        "vision_config": {**_EFFICIENT, "hidden_dim": 160},
        "projection_dim": 160,
        "text_config": {"projection_dim": 160},
    },
    "align_vision_model": _EFFICIENT,
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "bros": {"dim_bbox_sinusoid_emb_2d": DROP, "dim_bbox_sinusoid_emb_1d": DROP, "dim_bbox_projection": DROP},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24},
    "dots3_note": {"text_config": {"num_key_value_heads": 4, "head_dim": 24}},
    "instructblip": {"image_token_index": 95},
    "instructblipvideo": {"video_token_index": 95},
    "blip-2": {"image_token_index": 95},
    "minicpm_ocr": {"image_token_id": 95, "insert_layer_id": 1},
    "minicpmv4_6": {"image_token_id": 95, "insert_layer_id": 1},
    "minicpmv4_7": {"image_token_id": 95, "insert_layer_id": 1},
    "minicpm_ocr_vision": {"insert_layer_id": 1},
    "minicpmv4_6_vision": {"insert_layer_id": 1},
    "minicpmv4_7_vision": {"insert_layer_id": 1},
    "phi4_multimodal": {"audio_config": {"input_size": 80}},
    "mpnet": {"relative_attention_num_buckets": 32},
    "owlvit": {"projection_dim": 64, "text_config": {"projection_dim": 64}, "vision_config": {"projection_dim": 64}},
    "owlv2": {"projection_dim": 64, "text_config": {"projection_dim": 64}, "vision_config": {"projection_dim": 64}},
    "levit": {"hidden_sizes": [32, 48, 64], "image_size": 64, "key_dim": [8, 8, 8], "patch_size": 16, "down_ops": DROP},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "clvp": {"text_config": {"hidden_size": 128}, "speech_config": {"hidden_size": 128}},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "janus": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
        "vision_config": {"projection_dim": 64},
    },
    "clap": {
        "audio_config": {
            "patch_embeds_hidden_size": 16,
            "hidden_size": 128,
            "spec_size": 64,
            "window_size": 2,
            "num_mel_bins": 32,
        }
    },
    "vibevoice_acoustic_tokenizer": {"num_filters": 2, "encoder_config": {"num_filters": 2}},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xclip": {"projection_dim": 64, "text_config": {"projection_dim": 64}, "vision_config": {"projection_dim": 64}},
    "paligemma": {"projection_dim": 64, "vision_config": {"projection_dim": 64}},
    "colpali": {"vlm_config": {"projection_dim": 64, "vision_config": {"projection_dim": 64}}},
    "mobilevitv2": {"image_size": 64},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 80}},
    "udop": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "swin2sr": {"patch_size": 1, "image_size": 16, "window_size": 4},
    "sam2": {"prompt_encoder_config": {"patch_size": 16, "image_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "pp_lcnet": {"stem_channels": 16, "scale": 0.5},
    "pp_lcnet_v3": {"scale": 0.5},
    "univnet": {"model_hidden_channels": 8, "kernel_predictor_hidden_channels": 8},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4, 4]},
    "mistral4": {"qk_rope_head_dim": 8, "head_dim": 8, "rope_parameters": {"partial_rotary_factor": 1.0}},
    "muse_glimmer": {"vision_config": {"hidden_size": 16}},
    "vitmatte": {"backbone_config": {"patch_size": 16, "image_size": 32}},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": DROP},
    "zamba2": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": DROP},
        **{
            "adapter_rank": 8,
            "attention_hidden_size": DROP,
            "num_key_value_heads": 4,
            "attention_head_dim": 32,
            "mamba_headdim": 16,
            "n_mamba_heads": 8,
        },
    },
    "reformer": {"axial_pos_embds_dim": [24, 40], "axial_pos_shape": [4, 8], "attention_head_size": 16},
}
# type -> why it is not built at all
SKIPPED: dict[str, str] = {}
