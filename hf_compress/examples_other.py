"""Inputs that are neither text nor image nor sound: time series, states, features of regions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Batch = dict[str, torch.Tensor]


def others(asked: Any) -> Iterator[Batch]:
    """What a few kinds of models take, by the name of their main input."""
    names, rows, config = asked.names, asked.rows, asked.config
    if asked.main == "past_values" or "past_values" in names:
        yield from _series(asked)
    if asked.main == "states":  # DecisionTransformer
        steps = 5
        yield {
            "states": asked.normal(rows, steps, config.state_dim), "actions": asked.normal(rows, steps, config.act_dim),
            "rewards": asked.normal(rows, steps, 1), "returns_to_go": asked.normal(rows, steps, 1),
            "timesteps": torch.arange(steps).repeat(rows, 1), "attention_mask": torch.ones(rows, steps, dtype=torch.long),
        }  # fmt: skip
    if "visual_feats" in names:  # LXMERT
        yield {"visual_feats": asked.normal(rows, 5, config.visual_feat_dim), "visual_pos": asked.normal(rows, 5, 4)}
    if asked.main == "flattened_patches" or "flattened_patches" in names:  # Pix2Struct: row and column, then the pixels
        patch, channels = int(asked.size("patch_size", 16, "vision")), int(asked.size("num_channels", 3, "vision"))
        width = int(asked.size("patch_embed_hidden_size", channels * patch * patch, "vision"))
        where = torch.stack(torch.meshgrid(torch.arange(1, 4), torch.arange(1, 4), indexing="ij"), -1).view(1, 9, 2)
        for size in dict.fromkeys([channels * patch * patch, width]):
            yield {"flattened_patches": torch.cat([where.float().repeat(rows, 1, 1), asked.normal(rows, 9, size)], -1)}
    if "query_embeds" in names and "query_embeds" in asked.required:  # the Q-Former of BLIP-2
        batch = {"query_embeds": asked.normal(rows, 6, config.hidden_size)}
        width = getattr(config, "encoder_hidden_size", None)
        yield {**batch, "encoder_hidden_states": asked.normal(rows, 5, width)} if width else batch
    if asked.main == "inputs_embeds":
        yield {"inputs_embeds": asked.normal(rows, asked.length, int(asked.size("hidden_size", 8)))}
    if asked.main == "noise_embeds":
        width = int(asked.size("hidden_size", 8))
        yield {"noise_embeds": asked.normal(rows, 6, width), "context_hidden_states": asked.normal(rows, 6, width)}
    if {"hidden_states", "mask"} <= asked.required and asked.size("input_size"):  # the sounds of Phi-4
        frames = 64
        sound = asked.normal(rows, frames, int(asked.size("input_size")))
        yield {"hidden_states": sound, "mask": torch.ones(rows, frames, dtype=torch.bool)}
    if "task_inputs" in asked.required:  # OneFormer
        yield {
            "task_inputs": asked.whole(
                1, int(asked.size("text_encoder_vocab_size", 90)), rows, int(asked.size("task_seq_len", 77))
            )
        }
    if "protein_input_ids" in names:  # Evolla
        chain = asked.words(rows, 8, asked.size("vocab_size", None, "protein"))
        yield {"protein_input_ids": chain, "protein_attention_mask": torch.ones_like(chain)}
    if "images_per_sample" in names:
        yield {"images_per_sample": torch.ones(rows, dtype=torch.long)}
    if asked.main == "inputs" and "input_values" not in names and "inputs" in asked.required:  # Perceiver
        yield {"inputs": asked.normal(rows, 8, int(asked.size("d_model", 8)))}


def besides(asked: Any, batch: Batch) -> Iterator[Batch]:
    """What a model can do without, and some of its modules only run with."""
    names, rows = asked.names, next(iter(batch.values())).shape[0]
    if "encoder_hidden_states" in names and "encoder_hidden_states" not in batch and "decoder_input_ids" not in names:
        width = next((w for n in ("cross_attention_hidden_size", "encoder_hidden_size") if (w := asked.size(n))), None)
        yield {"encoder_hidden_states": asked.normal(rows, 5, int(width or asked.size("hidden_size", 8)))}
    if "input_boxes" in names and "input_boxes_labels" in names:  # SAM 3: middle, width and height, as shares of the image
        boxes = 0.2 + 0.4 * torch.rand(rows, 2, 4, generator=asked.draw)
        yield {"input_boxes": boxes, "input_boxes_labels": torch.ones(rows, 2, dtype=torch.long)}


def _series(asked: Any) -> Iterator[Batch]:
    config, rows = asked.config, asked.rows
    past = int(asked.size("context_length", 32))
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = int(asked.size("num_input_channels", 0))
    if "past_time_features" in asked.names:
        features = int(getattr(config, "num_time_features", 0) or 0)
        ahead = int(config.prediction_length)
        batch = {
            "past_values": asked.normal(rows, past + lags), "past_observed_mask": torch.ones(rows, past + lags),
            "past_time_features": asked.normal(rows, past + lags, features), "future_values": asked.normal(rows, ahead),
            "future_time_features": asked.normal(rows, ahead, features),
        }  # fmt: skip
        yield batch
    elif channels:
        yield {"past_values": asked.normal(rows, past, channels)}
    else:
        yield {"past_values": asked.normal(rows, past)}
