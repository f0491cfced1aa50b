"""Inputs made for a proof: what is in them, and that models of many kinds run on them."""

import inspect

import pytest
import torch
import transformers as T

from hf_compress.probe import NoInputs, example_inputs, quiet_run
from tests.sweep.overrides import OVERRIDES
from tests.sweep.shrink import tiny_config
from tests.sweep.types import class_name


def tiny(kind):
    torch.manual_seed(0)
    return getattr(T, class_name(kind) or "")(tiny_config(kind, {"head_dim": 16}, OVERRIDES.get(kind))).eval()


def runs(model, batch):
    with quiet_run(model) as run:
        return run(batch)


@pytest.mark.parametrize(
    ("kind", "images", "each"),
    [
        ("llava", 2, 16),  # 32 x 32 pixels in patches of 8 x 8
        ("qwen2_vl", 2, 4),  # 4 x 4 patches, merged 2 x 2
        ("gemma3", 2, 4),  # mm_tokens_per_image
    ],
)
def test_an_image_has_as_many_placeholders_as_it_has_vectors(kind, images, each):
    model = tiny(kind)
    batch = example_inputs(model)
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    assert (batch["input_ids"] == token).sum(1).tolist() == [each] * images
    assert torch.isfinite(runs(model, batch).logits).all()


def test_text_is_drawn_without_special_tokens():
    model = tiny("llava")
    ids = example_inputs(model)["input_ids"]
    config = model.config.get_text_config()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) is None or not (ids == getattr(config, name)).any()


def test_a_classifier_that_reads_the_end_of_the_text_gets_one():
    config = tiny_config("bart")
    model = T.BartForSequenceClassification(config).eval()
    batch = example_inputs(model)
    assert set(batch) == {"input_ids"} and (batch["input_ids"] == config.eos_token_id).sum(1).tolist() == [1, 1]
    assert runs(model, batch).logits.shape == (2, config.num_labels)


def test_boxes_have_their_corners_in_order():
    model = tiny("layoutlm")
    batch = example_inputs(model)
    left, top, right, bottom = batch["bbox"].unbind(-1)
    assert (left < right).all() and (top < bottom).all() and batch["bbox"].max() < model.config.max_2d_position_embeddings


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qwen2_vl", {"pixel_values": (32, 3 * 2 * 8 * 8), "image_grid_thw": (2, 3), "input_ids": (2, 18)}),
        ("idefics3", {"pixel_values": (2, 1, 3, 32, 32)}),
        ("siglip2", {"spatial_shapes": (2, 2)}),
        ("videomae", {"pixel_values": (1, 4, 3, 32, 32)}),
        ("parakeet_ctc", {"input_features": (2, 64, 16)}),
        ("encodec", {"input_values": (2, 1, 4000)}),
        ("lxmert", {"visual_pos": (2, 5, 4)}),
        ("decision_transformer", {"states": (2, 5, 17)}),
        ("time_series_transformer", {"past_values": (2, 19)}),
    ],
)
def test_models_of_other_kinds_run(kind, expected):
    model = tiny(kind)
    batch = example_inputs(model)
    assert {name: tuple(batch[name].shape) for name in expected} == expected
    assert batch.keys() <= set(inspect.signature(model.forward).parameters)
    runs(model, batch)


def test_nothing_is_made_for_a_model_that_takes_something_else():
    class Odd(T.BertModel):
        main_input_name = "graph"

        def forward(self, graph):
            return graph

    with pytest.raises(NoInputs, match="main input is 'graph'; pass inputs="):
        example_inputs(Odd(tiny_config("bert")))
