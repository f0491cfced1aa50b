"""The shared table of model families: a new family is one line in `FAMILIES`. Every invariant runs over all of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import transformers as T

import hf_compress as hc
from tests.sweep.plans import heads as other_heads

TEXT = dict(
    vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, max_position_embeddings=40
)  # fmt: skip
GQA = dict(TEXT, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
IMAGE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8)
GPT2 = dict(vocab_size=99, n_embd=64, n_layer=3, n_head=4, n_inner=96, n_positions=40, bos_token_id=1, eos_token_id=2)
T5 = dict(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4, decoder_start_token_id=0)
SEQ2SEQ = dict(
    vocab_size=99, d_model=64, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96,
)  # fmt: skip
WHISPER = dict(
    SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None,
)  # fmt: skip
WAV2VEC2 = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, conv_dim=(32, 32, 32),
    conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    num_feat_extract_layers=3,
)  # fmt: skip
DEBERTA = dict(
    TEXT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
    position_biased_input=False,
)  # fmt: skip
CLIP_TEXT = dict(TEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def ids(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(0))


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def sound(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def text(model: type, config: T.PreTrainedConfig, **more):
    return model, config, lambda: {"input_ids": ids(), **{k: v() for k, v in more.items()}}


def image(model: type, config: T.PreTrainedConfig):
    return model, config, lambda: {"pixel_values": pixels()}


decoder = dict(decoder_input_ids=lambda: ids(2, 6))

# name -> (class, config, inputs). Heads, neurons and layers are found; nothing else has to be said.
FAMILIES: dict[str, Callable[[], tuple]] = {
    "bert": lambda: text(T.BertForSequenceClassification, T.BertConfig(**TEXT)),
    "roberta": lambda: text(T.RobertaForTokenClassification, T.RobertaConfig(**TEXT)),
    "distilbert": lambda: text(
        T.DistilBertForSequenceClassification,
        T.DistilBertConfig(vocab_size=99, dim=64, n_layers=3, n_heads=4, hidden_dim=96, max_position_embeddings=40),
    ),
    "electra": lambda: text(T.ElectraForSequenceClassification, T.ElectraConfig(embedding_size=32, **TEXT)),
    "albert": lambda: text(T.AlbertForSequenceClassification, T.AlbertConfig(embedding_size=32, **TEXT)),
    "mpnet": lambda: text(T.MPNetForSequenceClassification, T.MPNetConfig(**TEXT)),
    "deberta": lambda: text(
        T.DebertaForSequenceClassification, T.DebertaConfig(relative_attention=True, pos_att_type=["c2p", "p2c"], **TEXT)
    ),
    "deberta_v2": lambda: text(T.DebertaV2ForSequenceClassification, T.DebertaV2Config(share_att_key=True, **DEBERTA)),
    "deberta_v2_unshared": lambda: text(T.DebertaV2ForQuestionAnswering, T.DebertaV2Config(share_att_key=False, **DEBERTA)),
    "modernbert": lambda: text(
        T.ModernBertForSequenceClassification,
        T.ModernBertConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **TEXT),
    ),
    "gpt2": lambda: text(T.GPT2LMHeadModel, T.GPT2Config(**GPT2)),
    "opt": lambda: text(
        T.OPTForCausalLM,
        T.OPTConfig(
            vocab_size=99,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=96,
            word_embed_proj_dim=64,
            max_position_embeddings=40,
        ),
    ),
    "llama": lambda: text(T.LlamaForCausalLM, T.LlamaConfig(**GQA)),
    "llama_multi_query": lambda: text(T.LlamaForCausalLM, T.LlamaConfig(**{**GQA, "num_key_value_heads": 1})),
    "mistral": lambda: text(T.MistralForCausalLM, T.MistralConfig(**GQA)),
    "qwen3": lambda: text(T.Qwen3ForCausalLM, T.Qwen3Config(**GQA)),
    "gemma3": lambda: text(T.Gemma3ForCausalLM, T.Gemma3TextConfig(query_pre_attn_scalar=16, sliding_window=8, **GQA)),
    "gpt_neox": lambda: text(T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**TEXT)),
    "phi3": lambda: text(T.Phi3ForCausalLM, T.Phi3Config(**{k: v for k, v in GQA.items() if k != "head_dim"})),
    "t5": lambda: text(T.T5ForConditionalGeneration, T.T5Config(**T5), **decoder),
    "t5_gated": lambda: text(T.T5ForConditionalGeneration, T.T5Config(feed_forward_proj="gated-gelu", **T5), **decoder),
    "bart": lambda: text(T.BartForConditionalGeneration, T.BartConfig(max_position_embeddings=40, **SEQ2SEQ), **decoder),
    "whisper": lambda: (
        T.WhisperForConditionalGeneration,
        T.WhisperConfig(**WHISPER),
        lambda: {"input_features": sound(8, 40), "decoder_input_ids": ids(2, 6)},
    ),
    "wav2vec2": lambda: (
        T.Wav2Vec2ForSequenceClassification,
        T.Wav2Vec2Config(**WAV2VEC2),
        lambda: {"input_values": sound(2000)},
    ),
    "vit": lambda: image(T.ViTForImageClassification, T.ViTConfig(**IMAGE)),
    "dinov2": lambda: image(
        T.Dinov2ForImageClassification,
        T.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, mlp_ratio=2),
    ),
    "dinov2_swiglu": lambda: image(
        T.Dinov2ForImageClassification,
        T.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, mlp_ratio=2, use_swiglu_ffn=True),
    ),
    "swin": lambda: image(
        T.SwinForImageClassification,
        T.SwinConfig(image_size=32, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4),
    ),
    "clip": lambda: (
        T.CLIPModel,
        T.CLIPConfig(text_config=CLIP_TEXT, vision_config=IMAGE, projection_dim=32),
        lambda: {"input_ids": ids(), "pixel_values": pixels()},
    ),
    "convnext": lambda: image(
        T.ConvNextForImageClassification,
        T.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 3], num_stages=2, image_size=32, layer_scale_init_value=0.5),
    ),
}
# which edits a family has something for; everything else has all three
NO_HEADS = ("convnext",)
NO_LAYERS = ("albert",)  # one module runs for every layer
GENERATE = ("gpt2", "opt", "llama", "llama_multi_query", "qwen3", "gemma3", "gpt_neox", "phi3", "t5", "bart", "whisper")


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[T.PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny model with no weight left at a trivial value, and a batch for it."""
    kind, config, inputs = FAMILIES[name]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = inputs()
    if "input_ids" in batch and name not in ("clip",):
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -3:] = 0
        batch["attention_mask"] = mask
    for parameter in model.parameters():  # buffers stay float32, as from_pretrained(dtype=...) leaves them
        parameter.data = parameter.data.to(dtype)
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    for key in ("logits", "logits_per_image", "start_logits", "last_hidden_state"):
        if getattr(found, key, None) is not None:
            return getattr(found, key)
    raise AssertionError(f"no output to compare in {list(found)}")


def random_plan(model: torch.nn.Module, edits: tuple[str, ...], seed: int = 0) -> hc.Plan:
    """Different heads, neurons and layers in every block, the counts too."""
    draw, structure, chosen = random.Random(seed), hc.discover(model), []
    if "heads" in edits:
        chosen += other_heads(model, draw)
    if "neurons" in edits:
        for f in structure.ffns:
            chosen.append(hc.KeepNeurons(f.name, sorted(draw.sample(range(f.size), draw.randint(f.size // 4, f.size - 3)))))
    if "experts" in edits:
        for i, m in enumerate(structure.experts):
            size = m.num_experts // m.groups
            least = -(-(m.top_k or 1) // m.groups_chosen) if m.groups == 1 else max(2, -(-(m.top_k or 1) // m.groups_chosen))
            number = max(least, size - 2 - i % 2)
            kept = [g * size + e for g in range(m.groups) for e in draw.sample(range(size), min(number, size))]
            chosen.append(hc.KeepExperts(m.name, kept))
    if "layers" in edits:
        for name, layers in structure.stacks.items():
            if len(layers) > 1:
                kept = sorted(draw.sample(range(len(layers)), len(layers) - 1))
                chosen.append(hc.KeepLayers(kept, name))
    return hc.Plan(chosen)
