"""Tiny models with processors and data in folders, for recipes."""

from __future__ import annotations

import json
import os
import random
import wave
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TEXT = dict(SIZES, vocab_size=65, max_position_embeddings=40)
SPLITS = (("train", 96), ("validation", 24), ("test", 32))


def tokenizer() -> T.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(60))])}
    found = Tokenizer(models.WordLevel(words, "[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[EOS]"}
    return T.PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=40, **names)


def save_model(folder: Path, model: T.PreTrainedModel, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def words(draw: random.Random, count: int = 6) -> list[int]:
    return [draw.randrange(60) for _ in range(count)]


def said(numbers: list[int]) -> str:
    return " ".join(f"w{n}" for n in numbers)


def text_classification(root: Path, layers: int = 2) -> dict:
    """Is the first word above 30? As TSV files with a header, labels as words."""
    torch.manual_seed(0)
    config = T.BertConfig(**{**TEXT, "num_hidden_layers": layers}, pad_token_id=0)
    name = save_model(root / "bert", T.BertModel(config), tokenizer())
    draw, folder = random.Random(0), root / "texts"
    folder.mkdir()
    for split, count in SPLITS:
        rows = [words(draw) for _ in range(count)]
        lines = [f"{said(row)}\t{'high' if row[0] > 30 else 'low'}" for row in rows]
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    return {"model": name, "task": "text-classification", "data": {"path": str(folder), "max_length": 16}}


def token_classification(root: Path) -> dict:
    """Words above 30 are names; as JSON lines."""
    torch.manual_seed(0)
    name = save_model(root / "model", T.BertModel(T.BertConfig(**TEXT, pad_token_id=0)), tokenizer())
    draw, files = random.Random(0), {}
    for split, count in SPLITS:
        rows = [words(draw) for _ in range(count)]
        lines = [
            json.dumps({"tokens": [f"w{n}" for n in r], "ner_tags": ["B-NAME" if n > 30 else "O" for n in r]}) for r in rows
        ]
        files[split] = str(root / f"{split}.jsonl")
        Path(files[split]).write_text("\n".join(lines) + "\n")
    return {"model": name, "task": "token-classification", "data": {**files, "max_length": 16}}


def sentence_similarity(root: Path) -> dict:
    """Pairs score by how many words they share, from 0 to 5; as CSV."""
    torch.manual_seed(0)
    name = save_model(root / "model", T.BertModel(T.BertConfig(**TEXT, pad_token_id=0)), tokenizer())
    draw, folder = random.Random(0), root / "pairs"
    folder.mkdir()
    for split, count in SPLITS:
        lines = ["sentence1,sentence2,score"]
        for _ in range(count):
            left = words(draw, 5)
            same = draw.randrange(6)
            lines.append(f"{said(left)},{said(left[:same] + words(draw, 5 - same))},{same}.0")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return {"model": name, "task": "sentence-similarity", "data": {"path": str(folder), "max_length": 16}}


def image_classification(root: Path) -> dict:
    """Dark or bright; as a folder of images."""
    from PIL import Image

    torch.manual_seed(0)
    config = T.ViTConfig(**SIZES, image_size=16, patch_size=8)
    name = save_model(root / "model", T.ViTModel(config), T.ViTImageProcessor(size={"height": 16, "width": 16}))
    draw = np.random.default_rng(0)
    for split, count in SPLITS:
        for i in range(count):
            place = root / "images" / split / ("bright" if i % 2 else "dark")
            place.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 120, (16, 16, 3)) + 130 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return {"model": name, "task": "image-classification", "data": {"path": str(root / "images")}}


def text_generation(root: Path) -> dict:
    """Words that count up; as plain text."""
    torch.manual_seed(0)
    config = T.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0, eos_token_id=4, bos_token_id=2)
    name = save_model(root / "model", T.LlamaForCausalLM(config), tokenizer())
    draw, files = random.Random(0), {}
    for split, count in SPLITS:
        rows = [said([(start + i) % 60 for i in range(12)]) for start in words(draw, count)]
        files[split] = str(root / f"{split}.txt")
        Path(files[split]).write_text("\n\n".join(rows) + "\n")
    return {"model": name, "task": "text-generation", "data": {**files, "max_length": 16}}


def audio_classification(root: Path) -> dict:
    """Low or high tones; WAV files that a CSV names."""
    torch.manual_seed(0)
    config = T.Wav2Vec2Config(
        **SIZES, conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=3, classifier_proj_size=16, mask_time_prob=0.0,
    )  # fmt: skip
    extractor = T.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    name = save_model(root / "model", T.Wav2Vec2Model(config), extractor)
    draw, folder = np.random.default_rng(0), root / "sounds"
    folder.mkdir()
    for split, count in SPLITS:
        lines = ["file,label"]
        for i in range(count):
            high = i % 2
            times = np.arange(800) / 8000
            sound = np.sin(2 * np.pi * (1500 if high else 200) * times + draw.uniform(0, 6)) * 20000
            with wave.open(str(folder / f"{split}-{i}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(sound.astype("<i2").tobytes())
            lines.append(f"{split}-{i}.wav,{'high' if high else 'low'}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return {"model": name, "task": "audio-classification", "data": {"path": str(folder)}}


WORLDS = {
    "text-classification": text_classification,
    "token-classification": token_classification,
    "sentence-similarity": sentence_similarity,
    "image-classification": image_classification,
    "text-generation": text_generation,
    "audio-classification": audio_classification,
}
