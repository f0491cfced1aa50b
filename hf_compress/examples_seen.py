"""Images and sounds for a proof, in the forms in which models take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Batch = dict[str, torch.Tensor]


def seen(asked: Any) -> Iterator[Batch]:
    """Pixels, in every form that the names in forward allow."""
    names = asked.names
    if not {"pixel_values", "pixel_values_videos", "hidden_states"} & names or _without(asked, "vision_config"):
        return
    grid = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in names), None)
    if grid:
        yield from _patches(asked, grid, "pixel_values" if "pixel_values" in names else "hidden_states")
        return
    if "pixel_values" not in names:
        if asked.main == "pixel_values_videos":
            yield {"pixel_values_videos": asked.normal(1, *_frames(asked), *_image(asked))}
        return
    channels, height, width = _image(asked)
    rows = asked.rows if height * width <= 64 * 64 or "input_ids" in names else 1
    plain = {"pixel_values": asked.normal(rows, channels, height, width)}
    patch = _first(asked.size("patch_size", 8, "vision"))
    if "prompt_pixel_values" in names:
        yield {
            **plain,
            "prompt_pixel_values": asked.normal(rows, channels, height, width),
            "prompt_masks": asked.normal(rows, channels, height, width),
        }
    if "high_res_pixel_values" in names:  # DeepSeek-VL: two towers, two sizes
        yield {
            **plain,
            "high_res_pixel_values": asked.normal(rows, channels, *_square(asked.size("image_size", 64, "high_res"))),
        }
    if "spatial_shapes" in names:
        side = max(2, int(int(asked.size("num_patches", 16, "vision")) ** 0.5) // 2 * 2)
        ones = torch.ones(rows, side * side, dtype=torch.long)
        shapes = torch.tensor([[side, side]] * rows)
        for width in (channels * patch * patch, patch):
            yield {
                "pixel_values": asked.normal(rows, side * side, width), "spatial_shapes": shapes, "pixel_attention_mask": ones,
            }  # fmt: skip
    if "target_sizes" in names:
        yield {
            "pixel_values": asked.normal(1, channels, patch, rows * 16 * patch),
            "target_sizes": torch.tensor([[4, 4]] * rows, dtype=torch.int32),
        }
    if "pixel_position_ids" in names or "image_position_ids" in names:
        name = "pixel_position_ids" if "pixel_position_ids" in names else "image_position_ids"
        grid_of = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).view(1, 36, 2)
        yield {
            "pixel_values": torch.rand(rows, 36, channels * patch * patch, generator=asked.draw),
            name: grid_of.repeat(rows, 1, 1),
        }
    if "aspect_ratio_ids" in names:
        tiles = int(asked.size("max_num_tiles", 4))
        yield {
            "pixel_values": asked.normal(rows, 1, tiles, channels, height, width),
            "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(rows, 1, tiles, dtype=torch.long),
        }
    if "image_sizes" in names:
        pinpoints = asked.size("image_grid_pinpoints")
        sizes = torch.tensor([[height, width]] * rows)
        if pinpoints:
            for tiles in (3, 2, 5, 4):
                yield {"pixel_values": asked.normal(rows, tiles, channels, height, width), "image_sizes": sizes}
        yield {**plain, "image_sizes": sizes}
    if asked.size("num_frames") and "input_ids" not in names:
        yield {"pixel_values": asked.normal(1, *_frames(asked), *_image(asked))}
    yield plain
    yield {"pixel_values": plain["pixel_values"][:1]}
    frames = int(asked.size("num_frames", 0) or 0)
    for count in dict.fromkeys([frames, 1, 2]):
        if count:
            yield {"pixel_values": asked.normal(rows, count, channels, height, width)}


def _without(asked: Any, part: str) -> bool:
    """Whether a config says that the model has no such part."""
    return part in vars(asked.config) and getattr(asked.config, part) is None


def _square(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _first(value: Any) -> int:
    return int(value if isinstance(value, int | float) else value[-1])


def _image(asked: Any) -> tuple[int, int, int]:
    channels = asked.size("num_channels", None, "vision|image") or asked.size("in_channels", None, "vision|image") or 3
    size = asked.size("image_size", None, "vision|image|encoder|backbone") or asked.size("img_size")
    size = (
        size or asked.size("resolution", None, "vq") or (asked.size("input_size") if "bbox" in asked.names else None) or 64
    )  # LayoutLMv3
    if asked.config.model_type == "tvp":
        size = asked.config.max_img_size
    timm = getattr(getattr(asked.model, "timm_model", None), "default_cfg", None) or {}
    if timm.get("fixed_input_size"):  # a ViT of timm's, which no config of transformers describes
        channels, *size = timm["input_size"]
    return int(channels) if isinstance(channels, int) else 3, *_square(size)


def _frames(asked: Any) -> tuple[int]:
    return (int(asked.size("num_frames", None) or asked.size("frames_per_clip", 4)),)


def _patches(asked: Any, grid: str, name: str) -> Iterator[Batch]:
    """Patches of all images in one row each, and how many there are of them (time, height, width): Qwen2-VL and its kin."""
    merge = _first(asked.size("spatial_merge_size", None, "vision") or asked.size("merge_size", None, "vision") or asked.size(
        "merge_kernel_size", 2, "vision"
    ))  # fmt: skip
    patch = _first(asked.size("patch_size", 14, "vision"))
    time = int(asked.size("temporal_patch_size", None, "vision") or asked.size("patch_temporal", 1, "vision"))
    channels = int(asked.size("in_channels", None, "vision") or asked.size("num_channels", None, "vision") or 3)
    images = asked.rows if "input_ids" in asked.names else 1
    side = 2 * merge
    shape = torch.tensor([[side, side] if grid == "image_grid_hw" else [1, side, side]] * images)
    more: Batch = {n: torch.tensor([merge] * images) for n in ("merge_sizes", "image_merge_sizes") if n in asked.names}
    count = images * side * side
    widths = [(channels * time * patch * patch,), (channels * patch * patch,), (channels, patch, patch)]
    widths += [(time, channels, patch, patch), (int(asked.size("hidden_size", 8, "vision")),)]
    for width in dict.fromkeys(widths):
        yield {name: asked.normal(count, *width), grid: shape, **more}
    for width in dict.fromkeys(widths):
        yield {name: asked.normal(images, side * side, *width), grid: shape, **more}


def heard(asked: Any) -> Iterator[Batch]:
    """A waveform or a spectrogram."""
    names, main, rows = asked.names, asked.main, asked.rows
    if main == "input_values" or (main == "inputs" and "input_values" in names):
        bins, longest = asked.size("num_mel_bins"), asked.size("max_length")
        if bins and longest and main == "input_values" and asked.config.model_type.startswith("audio-spec"):
            yield {"input_values": asked.normal(rows, longest, bins)}
        else:
            yield {"input_values": asked.normal(rows, 4000)}
            yield {"input_values": asked.normal(rows, 1, 4000)}
            yield {"input_values": asked.normal(rows, 1, 3840)}
    elif (main == "input_features" or "input_features" in names) and not _without(asked, "audio_config"):
        yield from _spectrograms(asked)
    elif main == "audio_mel":
        frames, bins = 64, int(asked.size("input_feat_size", 128))
        yield {"audio_mel": asked.normal(1, frames, bins), "audio_mel_mask": torch.zeros(1, frames, dtype=torch.bool)}


def _spectrograms(asked: Any) -> Iterator[Batch]:
    names = asked.names
    sizes = (
        "num_mel_bins",
        "feature_projection_input_dim",
        "n_mels",
        "input_feat_per_channel",
        "input_feat_size",
        "feature_size",
        "num_chroma",
    )
    known = [asked.size(name, None, "audio|encoder|speech") for name in (*sizes, "input_size", "input_dim")]
    bins = list(dict.fromkeys(int(v) for v in known if isinstance(v, int) and v > 1)) or [80, 128]
    longest = asked.size("max_source_positions", None, "audio|encoder") or 50
    if "is_longer" in names:  # CLAP: an image of the sound
        side, bins_of = int(asked.size("spec_size", 256)), int(asked.size("num_mel_bins", 64))
        sound = asked.normal(asked.rows, 1, side * (side // bins_of), bins_of)
        yield {"input_features": sound, "is_longer": torch.zeros(asked.rows, 1, dtype=torch.bool)}
    mask = next((n for n in ("input_features_mask", "feature_attention_mask") if n in names), None)
    rows = asked.rows if asked.size("input_feat_per_channel") or "max_source_positions" not in vars(asked.config) else 1
    for count in bins[:3]:
        forms = [(count, 2 * longest), (64, count)] if not asked.size("input_feat_per_channel") else [(64, count), (count, 64)]
        if asked.config.model_type in ("fun_asr_nano_encoder", "seamless_m4t", "seamless_m4t_v2", "wav2vec2-bert"):
            forms.reverse()
        for form in (*forms, (count, 64)):
            batch: Batch = {"input_features": asked.normal(rows, *form)}
            frames = form[1] if form[0] == count else form[0]
            if mask:
                batch[mask] = torch.ones(rows, frames, dtype=torch.long)
            if "audio_feature_lengths" in names:
                batch["audio_feature_lengths"] = torch.tensor([frames] * rows)
            yield batch
