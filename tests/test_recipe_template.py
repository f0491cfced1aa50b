"""Templates of recipes: whatever one offers, `read_recipe` accepts once the data is filled in, line by line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers as T
import yaml

import hf_compress as hc
from hf_compress.recipe import read_recipe, recipe_template
from hf_compress.recipe.tasks import TASKS
from hf_compress.recipe.template import quoted, tasks_for
from hf_compress.yaml12 import Loader
from tests.recipe_models import WORLDS, save_model, tokenizer
from tests.zoo import FAMILIES, build

# what each family's template is for; the others say none of their own
DEFAULT = {
    **dict.fromkeys(("roberta", "t5", "t5_gated"), "token-classification"),
    "wav2vec2": "audio-classification",
    **dict.fromkeys(("vit", "dinov2", "dinov2_swiglu", "swin", "clip", "convnext"), "image-classification"),
    **dict.fromkeys(
        ("gpt2", "opt", "llama", "llama_multi_query", "mistral", "qwen3", "gemma3", "gpt_neox", "phi3"), "text-generation"
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, dict]:
    """Data of every task."""
    root = tmp_path_factory.mktemp("data")
    found = {}
    for task, make in WORLDS.items():
        (root / task).mkdir()
        found[task] = make(root / task)["data"]
    return found


def saved(family: str, folder: Path, task: str) -> str:
    model, _ = build(family)
    reads = TASKS[task].reads
    if reads == "text":
        processor = tokenizer()
        model.config.pad_token_id, model.config.eos_token_id = processor.pad_token_id, processor.eos_token_id
    elif reads == "image":
        processor = T.ViTImageProcessor(size={"height": 32, "width": 32})
    else:
        processor = T.Wav2Vec2FeatureExtractor(sampling_rate=8000)
    return save_model(folder / "model", model, processor)


def filled(text: str, data: dict, tmp_path: Path) -> dict:
    """The template's values, with data in place of what it leaves to the user."""
    values = yaml.load(text, Loader)
    length = {"max_length": values["data"]["max_length"]} if "max_length" in values["data"] else {}
    columns = {k: v for k, v in data.items() if k != "max_length"}
    return {**values, "data": {**columns, **length}, "output": str(tmp_path / "out")}


def uncommented(text: str) -> list[str]:
    """The template, each with one of the steps that it only mentions."""
    lines = text.splitlines()
    offered = [i for i, line in enumerate(lines) if re.match(r"  # - \w+: ", line)]
    return ["\n".join([*lines[:i], lines[i].replace("# ", "", 1), *lines[i + 1 :]]) for i in offered]


NONE = ("bart", "whisper")  # they write text, which recipes do not train
WITH_A_TASK = [family for family in FAMILIES if family not in NONE]


@pytest.mark.parametrize("family", WITH_A_TASK)
def test_what_a_template_offers_passes_the_check(family, data, tmp_path):
    task = DEFAULT.get(family, "text-classification")
    name = saved(family, tmp_path, task)
    text = recipe_template(name)
    assert yaml.load(text, Loader)["task"] == task
    for version in (text, *uncommented(text)):
        recipe = read_recipe(filled(version, data[task], tmp_path))
        assert recipe.steps[0].name == "finetune" and recipe.steps[-1].name == "measure"
    assert ("- prune: " in text) and ("exits:" in text) == (family in EXITS)


@pytest.mark.parametrize("family", NONE)
def test_a_model_of_no_task_is_refused(family, tmp_path):
    build(family)[0].save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match="is no model for any task of recipes; recipes train text-classification, "):
        recipe_template(tmp_path)


EXITS = (
    "bert", "distilbert", "electra", "mpnet", "deberta", "deberta_v2", "deberta_v2_unshared", "modernbert", "vit", "dinov2",
    "dinov2_swiglu", "clip",
)  # fmt: skip


def test_all_that_is_offered_fits_together(data, tmp_path):
    text = recipe_template(saved("bert", tmp_path, "text-classification"))
    every = re.sub(r"^  # (- \w+: )", r"  \1", text, flags=re.M)
    recipe = read_recipe(filled(every, data["text-classification"], tmp_path))
    assert [step.name for step in recipe.steps] == ["finetune", "prune", "distill", "exits", "quantize", "measure"]


TEXTS = ["text-classification", "token-classification", "sentence-similarity"]
FIT = {
    "bert": TEXTS,
    "llama": ["text-classification", "token-classification", "text-generation", "sentence-similarity"],
    "t5": ["token-classification"],
    "vit": ["image-classification"],
    "clip": ["image-classification"],
    "wav2vec2": ["audio-classification"],
}


@pytest.mark.parametrize("family", FIT)
def test_tasks_that_fit(family, data, tmp_path):
    """And each is a template that passes the check; the others are refused, with those that fit."""
    for task in FIT[family]:
        name = saved(family, tmp_path, task)
        assert tasks_for(T.AutoConfig.from_pretrained(name)) == FIT[family]
        read_recipe(filled(recipe_template(name, task), data[task], tmp_path))
    for task in TASKS.keys() - set(FIT[family]):
        with pytest.raises(hc.CompressionError, match=f"is no model for {task}; tasks that fit it: {FIT[family][0]}"):
            recipe_template(name, task)


SAID = {
    "bert": "",
    "t5": "  # trains T5ForTokenClassification, whose head is new; the head of T5ForConditionalGeneration is left out",
    "clip": "  # trains CLIPForImageClassification, whose head is new",
}


@pytest.mark.parametrize("family", SAID)
def test_what_is_trained_is_said(family, tmp_path):
    build(family)[0].save_pretrained(tmp_path)
    line = next(line for line in recipe_template(tmp_path).splitlines() if line.startswith("task:"))
    assert line.partition("classification")[2] == SAID[family]


def test_a_quantized_model_has_no_template(tmp_path):
    model, _ = build("bert")
    hc.apply_(model, hc.plan_quantization(model, bits=8)).save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match="is quantized: its weights are integers and cannot be trained"):
        recipe_template(tmp_path)


NASTY = (
    "plain", "it's", 'say "hi"', "a b", "key: value", "half # done", "größer 模型", "- item", "{x}", "[y]", "true", "No", "on",
    "3e-5", "12", "1_000", "0x1f", "~", "null", ".inf", "a\tb", "a\nb", "&anchor", "*alias", "!tag", "%percent", "@at", "`tick`",
    "after ", " before", "back\\slash", "\u00a0hard", "smile 🙂", "2024-01-01", "?", "|", ">", "=", "<<", "y",
)  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_a_path_reads_back_as_it_was(name, tmp_path):
    for text in (name, f"/runs/{name}/x"):
        line = f"model: {quoted(text)}\nnext: 1\n"
        assert yaml.load(line, Loader) == yaml.safe_load(line) == {"model": text, "next": 1}
    folder = tmp_path / name
    T.BertConfig(num_hidden_layers=1, architectures=["BertForTokenClassification"]).save_pretrained(folder)
    values = yaml.load(recipe_template(folder), Loader)
    assert (values["model"], values["output"]) == (str(folder), f"runs/{name}-small")
