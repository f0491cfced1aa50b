"""What a recipe's model says about itself: how much it reads, in which dtype it is, which rows are left for its exits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as T

from hf_compress.recipe import RecipeError, read_recipe
from hf_compress.recipe.opening import open_recipe
from tests.recipe_models import TEXT, save_model, text_classification, tokenizer

MODELS = {
    # name: (class, config, tokens it reads of 40 positions)
    "bert": (T.BertModel, T.BertConfig(**TEXT, pad_token_id=0), 40),
    "roberta": (T.RobertaModel, T.RobertaConfig(**TEXT, pad_token_id=1), 38),
    "camembert": (T.CamembertModel, T.CamembertConfig(**TEXT, pad_token_id=1), 38),
    "xlm-roberta": (T.XLMRobertaModel, T.XLMRobertaConfig(**TEXT, pad_token_id=3), 36),
    "mpnet": (T.MPNetModel, T.MPNetConfig(**TEXT), 38),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_as_many_tokens_as_it_has_positions_for(name, tmp_path):
    kind, config, most = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    reader = tokenizer()
    reader.model_max_length = int(1e30)  # nothing is said
    ids = torch.full((1, most), 10)
    model(input_ids=ids)  # as it is
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 10))
    recipe = text_classification(tmp_path)
    recipe |= {"model": save_model(tmp_path / "model", model, reader), "steps": [{"finetune": {"epochs": 1}}]}
    recipe |= {"output": str(tmp_path / "out")}
    recipe["data"]["max_length"] = most
    assert read_recipe(recipe).data.max_length == most
    recipe["data"]["max_length"] = most + 1
    with pytest.raises(RecipeError, match=f"max_length is {most + 1}, and this model reads at most {most} tokens"):
        read_recipe(recipe)
    del recipe["data"]["max_length"]
    setup, _ = open_recipe(read_recipe(recipe))
    assert setup.options.max_length == most


def notes(recipe: dict, folder) -> list[str]:
    setup, _ = open_recipe(read_recipe({**recipe, "output": str(folder / "out")}))
    setup.load()
    return setup.data.notes


def test_a_float16_model_is_said_to_become_float32(tmp_path):
    recipe = {**text_classification(tmp_path), "steps": [{"finetune": {"epochs": 1}}]}
    assert notes(recipe, tmp_path) == []
    half = T.BertModel(T.BertConfig(**TEXT, pad_token_id=0)).half()
    recipe["model"] = save_model(tmp_path / "half", half, tokenizer())
    assert notes(recipe, tmp_path) == ["The model given is in half precision; it was trained, measured and saved in float32."]


@pytest.mark.parametrize("tuning", [{"max_drop": 0.1}, {"mean_depth": 1.5}, {"threshold": 0.9}, {"max_drop": None}])
def test_rows_are_held_out_for_exits_that_are_tuned(tuning, tmp_path):
    recipe = text_classification(tmp_path)
    (tmp_path / "texts" / "test.tsv").unlink()
    steps = [{"finetune": {"epochs": 1}}, {"exits": {"after": [0], "epochs": 1, **tuning}}]
    setup, _ = open_recipe(read_recipe({**recipe, "steps": steps, "output": str(tmp_path / "out")}))
    tunes = tuning.get("max_drop", tuning.get("mean_depth")) is not None
    assert setup.data.measured == "validation"
    assert setup.data.tuned == ("train, 10% held out" if tunes else "")
    assert len(setup.data.splits["train"]) == (86 if tunes else 96)  # of 96, a tenth is 9.6


def test_f1_of_two_classes_says_of_which(tmp_path):
    recipe = {**text_classification(tmp_path), "metric": "f1", "steps": [{"finetune": {"epochs": 1}}]}
    assert notes(recipe, tmp_path) == ["F1 is that of the class 'low'."]


def test_f1_of_three_classes_is_a_mean_whichever_are_measured(tmp_path):
    recipe = {**text_classification(tmp_path), "metric": "f1", "steps": [{"finetune": {"epochs": 1}}]}
    train = tmp_path / "texts" / "train.tsv"
    train.write_text(train.read_text() + "w1 w2\tmiddle\n")  # the test rows have high and low alone
    _, (metric,) = open_recipe(read_recipe({**recipe, "output": str(tmp_path / "out")}))
    found, there = np.array([1, 1, 0, 0]), np.array([1, 1, 1, 0])
    assert metric.compute(found, there) == pytest.approx((2 * 2 / 5 + 2 / 3) / 2)  # class 1: 4 of 5; class 0: 2 of 3
