"""Models of several parts, tiny: `name -> (class, config, inputs)`, and which classes load one part from the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as T

from tests.zoo import GPT2, TEXT, WAV2VEC2, ids, pixels, sound

WORDS = dict(TEXT, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIGHT = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8)
LLAMA = dict(WORDS, num_key_value_heads=2, head_dim=16)
AUDIO = dict(
    hidden_size=64, patch_embeds_hidden_size=32, depths=[1, 1], num_attention_heads=[2, 4], spec_size=32, num_mel_bins=8, window_size=4,
    patch_size=4, patch_stride=[4, 4], num_hidden_layers=2, projection_dim=32,
)  # fmt: skip


def seeing(config: T.PreTrainedConfig, tokens: int, **more: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Words with the places that a picture takes."""
    words = ids(2, tokens + 6)
    words[:, 2 : 2 + tokens] = config.image_token_id
    return {"input_ids": words, "pixel_values": pixels(), **{key: make() for key, make in more.items()}}


def _clip_like(model: type, config: type, text: dict, sight: dict, **more):
    made = config(text_config=text, vision_config=sight, **more)
    return model, made, lambda: {"input_ids": ids(), "pixel_values": pixels()}


def _llava():
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SIGHT), text_config=T.LlamaConfig(**LLAMA), image_token_index=98, vision_feature_layer=-1,
    )  # fmt: skip
    return T.LlavaForConditionalGeneration, config, lambda: seeing(config, 16)


def _paligemma():
    config = T.PaliGemmaConfig(
        vision_config=dict(SIGHT, model_type="siglip_vision_model", projection_dim=64),
        text_config=dict(LLAMA, model_type="gemma"), projection_dim=64, image_token_index=98,
    )  # fmt: skip
    return (
        T.PaliGemmaForConditionalGeneration,
        config,
        lambda: seeing(config, 16, token_type_ids=lambda: torch.zeros(2, 22, dtype=torch.long)),
    )


def _gemma3():
    config = T.Gemma3Config(
        vision_config=dict(SIGHT, model_type="siglip_vision_model"), text_config=dict(LLAMA, sliding_window=8, query_pre_attn_scalar=16),
        mm_tokens_per_image=4, image_token_index=98,
    )  # fmt: skip
    return (
        T.Gemma3ForConditionalGeneration,
        config,
        lambda: seeing(config, 4, token_type_ids=lambda: torch.zeros(2, 10, dtype=torch.long)),
    )


def _qwen2_vl():
    config = T.Qwen2VLConfig(
        text_config=dict(WORDS, num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}),
        vision_config=dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2),
        image_token_id=98, video_token_id=97, vision_start_token_id=96, vision_end_token_id=95,
    )  # fmt: skip

    def inputs():
        words = ids(1, 10)
        words[:, 2:6] = 98
        return {"input_ids": words, "pixel_values": sound(8, 384).view(16, 384), "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": (words == 98).int()}  # fmt: skip

    return T.Qwen2VLForConditionalGeneration, config, inputs


def _pair(kind: type, make: Callable, one: T.PreTrainedConfig, other: T.PreTrainedConfig, inputs: Callable):
    config = make(one, other)
    for key in ("decoder_start_token_id", "pad_token_id"):
        setattr(config, key, 0)
    return kind, config, inputs


def _bert(**more) -> T.BertConfig:
    return T.BertConfig(**{**WORDS, **more})


COMPOSITES: dict[str, Callable[[], tuple]] = {
    "clip": lambda: _clip_like(T.CLIPModel, T.CLIPConfig, dict(WORDS, projection_dim=32), dict(SIGHT, projection_dim=32), projection_dim=32),
    "siglip": lambda: _clip_like(T.SiglipModel, T.SiglipConfig, dict(WORDS, projection_size=64), SIGHT),
    "chinese_clip": lambda: _clip_like(T.ChineseCLIPModel, T.ChineseCLIPConfig, WORDS, SIGHT, projection_dim=32),
    "altclip": lambda: _clip_like(T.AltCLIPModel, T.AltCLIPConfig, dict(WORDS, project_dim=32), SIGHT, projection_dim=32),
    "clipseg": lambda: _clip_like(T.CLIPSegModel, T.CLIPSegConfig, WORDS, SIGHT, projection_dim=32),
    "owlvit": lambda: _clip_like(T.OwlViTModel, T.OwlViTConfig, WORDS, SIGHT, projection_dim=32),
    "blip": lambda: _clip_like(
        T.BlipModel, T.BlipConfig, dict(WORDS, encoder_hidden_size=64, sep_token_id=2, is_decoder=False), SIGHT, projection_dim=32),
    "clap": lambda: (
        T.ClapModel, T.ClapConfig(text_config=WORDS, audio_config=AUDIO, projection_dim=32),
        lambda: {"input_ids": ids(), "input_features": sound(1, 64, 8), "is_longer": torch.tensor([[False], [False]])},
    ),
    "vision_text": lambda: _pair(
        T.VisionTextDualEncoderModel, T.VisionTextDualEncoderConfig.from_vision_text_configs, T.ViTConfig(**SIGHT), _bert(),
        lambda: {"input_ids": ids(), "pixel_values": pixels()},
    ),
    "vision_encoder_decoder": lambda: _pair(
        T.VisionEncoderDecoderModel, T.VisionEncoderDecoderConfig.from_encoder_decoder_configs, T.ViTConfig(**SIGHT),
        T.GPT2Config(**GPT2, is_decoder=True, add_cross_attention=True), lambda: {"pixel_values": pixels(), "decoder_input_ids": ids(2, 6)},
    ),
    "speech_encoder_decoder": lambda: _pair(
        T.SpeechEncoderDecoderModel, T.SpeechEncoderDecoderConfig.from_encoder_decoder_configs, T.Wav2Vec2Config(**WAV2VEC2),
        _bert(is_decoder=True, add_cross_attention=True), lambda: {"input_values": sound(2000), "decoder_input_ids": ids(2, 6)},
    ),
    "encoder_decoder": lambda: _pair(
        T.EncoderDecoderModel, T.EncoderDecoderConfig.from_encoder_decoder_configs, _bert(),
        _bert(is_decoder=True, add_cross_attention=True), lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 6)},
    ),
    "llava": _llava,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
}  # fmt: skip


def build_composite(name: str) -> tuple[T.PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny model of several parts with no weight left at a trivial value, and a batch for it."""
    kind, config, inputs = COMPOSITES[name]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, inputs()


# which classes load one part from the checkpoint of the whole, where stock transformers does: class -> (its path, its inputs)
WORDS_OF, SIGHT_OF = ("text_model", "input_ids"), ("vision_model", "pixel_values")
FROM_WHOLE: dict[str, dict[str, tuple[str, str]]] = {
    "clip": {
        "CLIPTextModel": WORDS_OF, "CLIPVisionModel": SIGHT_OF, "CLIPTextModelWithProjection": WORDS_OF,
        "CLIPVisionModelWithProjection": SIGHT_OF,
    },
    "siglip": {"SiglipTextModel": WORDS_OF, "SiglipVisionModel": SIGHT_OF},
    "clipseg": {"CLIPSegTextModel": WORDS_OF, "CLIPSegVisionModel": SIGHT_OF},
    "owlvit": {"OwlViTTextModel": WORDS_OF, "OwlViTVisionModel": SIGHT_OF},
    "clap": {"ClapTextModelWithProjection": WORDS_OF},
    "chinese_clip": {"ChineseCLIPVisionModel": SIGHT_OF},
    "qwen2_vl": {"Qwen2VLTextModel": ("model.language_model", "input_ids")},
}  # fmt: skip
