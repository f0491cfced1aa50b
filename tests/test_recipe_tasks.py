"""Every shipped recipe parses; those of texts run on a tiny model of their kind."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from tokenizers.processors import TemplateProcessing

from hf_compress.recipe import run_recipe
from hf_compress.recipe.reading import read_source
from hf_compress.recipe.schema import parse
from tests.recipe_models import WORLDS, save_model, text_classification, tokenizer
from tests.recipe_runs import SHIPPED, check_shipped

PATHS = [path for path in SHIPPED if path.stem not in ("image-classification", "audio-classification", "text-generation")]


def test_a_recipe_is_shipped_for_every_task():
    assert [path.stem for path in SHIPPED] == sorted(WORLDS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    recipe = parse(*read_source(path))
    assert recipe.task == path.stem
    assert [step.name for step in recipe.steps][-2:] == ["quantize", "measure"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_shipped_recipes_run(path, tmp_path):
    check_shipped(path, tmp_path)


IDS = dict(vocab_size=65, d_model=32, pad_token_id=0, eos_token_id=4)
TWO_SIDED = {
    "t5": lambda: T.T5ForSequenceClassification(
        T.T5Config(**IDS, d_ff=64, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0)
    ),
    "bart": lambda: T.BartForSequenceClassification(
        T.BartConfig(
            **IDS,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            bos_token_id=2,
            decoder_start_token_id=4,
            max_position_embeddings=64,
        )
    ),
}


@pytest.mark.parametrize("family", TWO_SIDED)
def test_encoder_decoders_classify_at_the_end_of_text(family, tmp_path):
    """Proofs run on rows of the data: made-up tokens need not end as these models want it."""
    torch.manual_seed(0)
    ending = tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", 4)]
    )
    recipe = {**text_classification(tmp_path), "output": str(tmp_path / "out")}
    recipe["model"] = save_model(tmp_path / family, TWO_SIDED[family](), ending)
    recipe["steps"] = [
        {"finetune": {"max_steps": 2}},
        {"prune": {"neurons": 0.5, "max_steps": 2, "teacher": "previous"}},
        {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0}},
    ]
    report = run_recipe(recipe)
    neurons = report.about["blocks"]["model"]["neurons"].values()
    assert sum(neurons) == 4 * 64 // 2
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) == report.model.parameters
