"""Tiny convolutional models for the tests of KeepChannels: a new family is one line in `CONVOLUTIONAL`."""

from __future__ import annotations

import random

import torch
import transformers as T

import hf_compress as hc

LEVIT = dict(
    image_size=32, hidden_sizes=[16, 24], num_attention_heads=[2, 3], key_dim=[8, 8], depths=[1, 1], mlp_ratio=[2, 2],
    attention_ratio=[2, 2], down_ops=[["Subsample", 8, 2, 4, 2, 2], [""]],
)  # fmt: skip
EFFICIENT = dict(
    num_labels=3, image_size=32, hidden_dim=128, width_coefficient=0.1, depth_coefficient=0.3, kernel_sizes=[3, 5],
    in_channels=[32, 24], out_channels=[24, 40], strides=[1, 2], num_block_repeats=[1, 4], expand_ratios=[2, 4],
    depthwise_padding=[],
)  # fmt: skip
WAV2VEC2 = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=(12, 16, 16), num_labels=3,
    conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    num_feat_extract_layers=3,
)  # fmt: skip

# name -> (class, config); layers of more kinds than depths, so that streams have several blocks
CONVOLUTIONAL = {
    "resnet": lambda: (T.ResNetForImageClassification, T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1])),
    "resnet_basic": lambda: (
        T.ResNetForImageClassification,
        T.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", downsample_in_first_stage=True
        ),
    ),
    "regnet_x": lambda: (
        T.RegNetForImageClassification,
        T.RegNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], groups_width=4, layer_type="x"),
    ),
    "regnet_y": lambda: (
        T.RegNetForImageClassification,
        T.RegNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], groups_width=4),
    ),
    "mobilenet_v1": lambda: (T.MobileNetV1ForImageClassification, T.MobileNetV1Config(depth_multiplier=0.1, image_size=32)),
    "mobilenet_v2": lambda: (T.MobileNetV2ForImageClassification, T.MobileNetV2Config(depth_multiplier=0.1, image_size=32)),
    "efficientnet": lambda: (T.EfficientNetForImageClassification, T.EfficientNetConfig(**EFFICIENT)),
    "poolformer": lambda: (
        T.PoolFormerForImageClassification,
        T.PoolFormerConfig(hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, layer_scale_init_value=0.5),
    ),
    "levit": lambda: (T.LevitForImageClassification, T.LevitConfig(**LEVIT)),
    "wav2vec2": lambda: (T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**WAV2VEC2)),
}


def build_convolutional(name: str, dtype: torch.dtype = torch.float32):
    """A model with no weight or statistic left at a trivial value, and a batch for it."""
    kind, config = CONVOLUTIONAL[name]()
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
            elif key.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    draw = torch.Generator().manual_seed(1)
    if name == "wav2vec2":
        return model, {"input_values": torch.randn(2, 800, generator=draw).to(dtype)}
    return model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=draw).to(dtype)}


def random_channels(model, seed: int = 0) -> hc.Plan:
    """Other channels in every set of channels that can be cut; as many in each group of a convolution in groups."""
    draw, edits = random.Random(seed), []
    for group in hc.channel_groups(model):
        if group.fixed or group.size < 2:
            continue
        groups = max([getattr(model.get_submodule(n), "groups", 1) for n in (*group.readers, group.name)])
        width = group.size // groups
        most = max(1, width - 1)
        count = draw.randint(1, most) if groups > 1 else draw.randint(max(1, width // 2), most)
        edits.append(
            hc.KeepChannels(group.name, [g * width + i for g in range(groups) for i in draw.sample(range(width), count)])
        )
    return hc.Plan(edits)


def zeroed(model, plan: hc.Plan) -> dict[str, torch.Tensor]:
    """A state dict in which whatever reads a channel that goes has zeros there: a mask made by hand, for groups of 1."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    groups = {group.name: group for group in hc.channel_groups(model)}
    for edit in plan:
        gone = [i for i in range(groups[edit.conv].size) if i not in edit.channels]
        for reader in groups[edit.conv].readers:
            module, weight = model.get_submodule(reader), state[f"{reader}.weight"]
            width = groups[edit.conv].size // getattr(module, "groups", 1)
            for channel in gone:
                rows = slice(None)
                if width != groups[edit.conv].size:
                    per_group = weight.shape[0] // module.groups
                    rows = slice(channel // width * per_group, (channel // width + 1) * per_group)
                weight[rows, channel % width] = 0
    return state
