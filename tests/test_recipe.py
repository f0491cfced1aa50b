"""Recipes that are wrong: each refused with file and line, before anything is written. And what reading makes of right ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as T
import yaml

import hf_compress as hc
from hf_compress.recipe import RecipeError, read_recipe, recipe_template, run_recipe
from hf_compress.recipe.metrics import find_metric
from hf_compress.recipe.reading import read_source
from hf_compress.recipe.schema import parse
from tests.recipe_models import SIZES, TEXT, save_model, text_classification, token_classification, tokenizer

GOOD = """\
model: {root}/bert
task: text-classification
data:
  path: {root}/texts
  text: sentence
  label: label
  max_length: 16
metric: accuracy
seed: 0
steps:
  - finetune: {{epochs: 1}}
  - prune: {{heads: 0.5, neurons: 0.5, epochs: 1, teacher: previous}}
  - quantize: {{bits: 8}}
  - measure: {{batch_sizes: [1, 4], length: 16}}
output: {root}/out
"""
STEPS = GOOD[GOOD.index("steps:") : GOOD.index("output:")]


def steps(*lines: str) -> tuple[str, str]:
    return STEPS, "steps:\n" + "".join(f"  - {line}\n" for line in lines)


TUNE = "finetune: {{epochs: 1}}"
# what is written instead of what, the line that is named, and what the message says
WRONG = {
    "unknown key": (("seed: 0", "sed: 0"), 9, "no 'sed'; did you mean 'seed'"),
    "unknown key in data": (("text: sentence", "txt: sentence"), 5, "no 'txt'; did you mean 'text'"),
    "unknown key in a step": (("heads: 0.5", "haeds: 0.5"), 12, "no 'haeds'; did you mean 'heads'"),
    "unknown key in model": (("model: {root}/bert", "model: {{name: {root}/bert}}"), 1, "model has no 'name'"),
    "unknown step": (("- prune:", "- purne:"), 12, "unknown step 'purne'; did you mean 'prune'"),
    "unknown task": (("task: text-classification", "task: text-clasification"), 2, "did you mean 'text-classification'"),
    "no model": (("model: {root}/bert\n", ""), 1, "needs model"),
    "no steps": ((STEPS, ""), 1, "needs steps"),
    "no output": (("output: {root}/out\n", ""), 1, "needs output"),
    "steps empty": ((STEPS, "steps: []\n"), 10, "steps is empty"),
    "steps null": ((STEPS, "steps:\n"), 10, "steps is a list"),
    "steps a mapping": ((STEPS, "steps:\n  prune: {{heads: 0.5}}\n"), 10, "steps is a list"),
    "two steps in one": (steps("prune: {{heads: 0.5}}\n    quantize: {{bits: 8}}"), 11, "prune, quantize at once"),
    "a step that is a number": (steps("3"), 11, "each step is one word"),
    "options that are a list": (steps("finetune: [1]"), 11, "options of finetune are a mapping"),
    "text for a number": (("heads: 0.5", "heads: half"), 12, "heads must be a number, got 'half'"),
    "number in quotes": (("bits: 8", 'bits: "8"'), 13, "bits must be a whole number, got '8'"),
    "fraction for a whole number": (("seed: 0", "seed: 0.5"), 9, "seed must be a whole number"),
    "boolean for a number": (("seed: 0", "seed: true"), 9, "seed must be a whole number"),
    "negative seed": (("seed: 0", "seed: -1"), 9, "between 0 and"),
    "number for a text": (("metric: accuracy", "metric: 3"), 8, "metric must be a text or a list"),
    "list for a column": (("text: sentence", "text: [sentence]"), 5, "text must be a text"),
    "sizes that are no list": (("[1, 4]", "4"), 14, "batch_sizes must be a list of whole numbers"),
    "sizes of zero": (("[1, 4]", "[0, 4]"), 14, "batch_sizes is a list of numbers of rows"),
    "empty model": (("model: {root}/bert", "model: ''"), 1, "model is empty"),
    "heads above one": (("heads: 0.5", "heads: 1.5"), 12, "heads"),
    "nothing to prune": (("heads: 0.5, neurons: 0.5, ", ""), 12, "prune removes nothing"),
    "unknown score": (("heads: 0.5,", "heads: 0.5, score: tailor,"), 12, "taylor"),
    "fisher while training": (("heads: 0.5,", "heads: 0.5, score: fisher,"), 12, "where no training follows"),
    "movement without training": (steps(TUNE, "prune: {{heads: 0.5, score: movement}}"), 12, "learned while training"),
    "tune while training": (("heads: 0.5,", "heads: 0.5, tune: true,"), 12, "tune is a word of pruning without training"),
    "channels while training": (("heads: 0.5,", "heads: 0.5, channels: 0.5,"), 12, "channels is a word of pruning without"),
    "unknown scope without training": (steps(TUNE, "prune: {{heads: 0.5, scope: all}}"), 12, "'global'"),
    "unknown schedule": (("heads: 0.5,", "heads: 0.5, schedule: cubik,"), 12, "cubic"),
    "schedule without training": (steps(TUNE, "prune: {{heads: 0.5, schedule: cubic}}"), 12, "add epochs"),
    "learning rate without training": (steps(TUNE, "quantize: {{bits: 8, learning_rate: 0.1}}"), 12, "add epochs"),
    "temperature without a teacher": (steps("finetune: {{epochs: 1}}", "prune: {{heads: 0.5, epochs: 1, alpha_kd: 0.1}}"), 12, "alpha_kd weighs a teacher"),
    "bits not offered": (("bits: 8", "bits: 5"), 13, "8, 4, 3, 2"),
    "no bits": (("{{bits: 8}}", "{{embeddings: true}}"), 13, "quantize needs bits"),
    "groups with 8 bits": (("bits: 8", "bits: 8, group_size: 32"), 13, "group_size"),
    "ratio and rank": (steps(TUNE, "low_rank: {{ratio: 0.5, rank: 3}}"), 12, "one of ratio"),
    "ratio of two": (steps(TUNE, "low_rank: {{ratio: 2.0}}"), 12, r"in \(0, 1\)"),
    "rank too high": (steps(TUNE, "low_rank: {{rank: 30}}"), 12, "rank=30 is too high"),
    "modules that are no pattern": (steps(TUNE, "low_rank: {{rank: 3, modules: '('}}"), 12, "regular expression"),
    "no convolution": (steps(TUNE, "depthwise: {{}}"), 12, "no convolution"),
    "epochs of zero": (("{{epochs: 1}}", "{{epochs: 0}}"), 11, "epochs must be above 0"),
    "steps below one": (("{{epochs: 1}}", "{{max_steps: -3}}"), 11, "max_steps must be 1 or more"),
    "learning rate below zero": (("{{epochs: 1}}", "{{learning_rate: -1.0}}"), 11, "learning_rate must be above 0"),
    "unknown learning rate schedule": (("{{epochs: 1}}", "{{lr_scheduler_type: cosin}}"), 11, "cosine"),
    "temperature of zero": (steps(TUNE, "distill: {{temperature: 0.0}}"), 12, "temperature"),
    "too many layers": (steps(TUNE, "distill: {{layers: 9}}"), 12, "2 layers"),
    "exits nowhere": (steps(TUNE, "exits: {{}}"), 12, "exits needs after"),
    "exits after the last layer": (steps(TUNE, "exits: {{after: [7]}}"), 12, "7"),
    "unknown criterion": (steps(TUNE, "exits: {{after: [0], criterion: sure}}"), 12, "confidence"),
    "threshold and tuning": (steps(TUNE, "exits: {{after: [0], threshold: 0.9, max_drop: 0.1}}"), 12, "leave one of them out"),
    "prune after quantize": (steps(TUNE, "quantize: {{bits: 8}}", "prune: {{heads: 0.5}}"), 13, "comes after quantize"),
    "train after quantize": (steps("quantize: {{bits: 8}}", TUNE), 12, "integers"),
    "two quantize": (steps(TUNE, "quantize: {{bits: 8}}", "quantize: {{bits: 4}}"), 13, "quantized already"),
    "layers after exits": (steps(TUNE, "exits: {{after: [0]}}", "distill: {{layers: 1}}"), 13, "put exits after it"),
    "two exits": (steps(TUNE, "exits: {{after: [0]}}", "exits: {{after: [0]}}"), 13, "name all layers in one step"),
    "low-rank twice": (steps(TUNE, "low_rank: {{ratio: 0.5}}", "low_rank: {{ratio: 0.5}}"), 13, "low-rank"),
    "measure first": (steps(TUNE, "measure: {{}}", "quantize: {{bits: 8}}"), 13, "measure is the last step"),
    "no finetune for the teacher": (steps("prune: {{heads: 0.5, epochs: 1, teacher: finetuned}}"), 11, "no finetune comes before"),
    "a teacher that is not there": (steps(TUNE, "distill: {{teacher: ./no-teacher}}"), 12, "cannot load the teacher"),
    "a head that knows nothing": (steps("prune: {{heads: 0.5}}"), 11, "no trained head"),
    "unknown metric": (("metric: accuracy", "metric: acuracy"), 8, "Unknown metric 'acuracy'; did you mean 'accuracy'"),
    "metric of another task": (("metric: accuracy", "metric: perplexity"), 8, "no metric for text-classification"),
    "second metric unknown": (("metric: accuracy", "metric: [accuracy, nonsuch]"), 8, "Unknown metric 'nonsuch'"),
    "no such model": (("model: {root}/bert", "model: {root}/bart"), 1, "cannot load the model"),
    "a folder without a model": (("model: {root}/bert", "model: {root}/texts"), 1, "no config.json"),
    "no such folder of data": (("path: {root}/texts", "path: {root}/text"), 4, "no file or folder"),
    "no such file": (("path: {root}/texts", "train: {root}/none.csv"), 4, "there is no file"),
    "a file of an unknown kind": (("path: {root}/texts", "train: {root}/bert/model.safetensors"), 4, "files end in .csv"),
    "nowhere to get data": (("  path: {root}/texts\n", ""), 3, "say where the data is"),
    "missing column": (("text: sentence", "text: sentense"), 5, "no column 'sentense'; did you mean 'sentence'"),
    "missing label": (("label: label", "label: labels"), 6, "no column 'labels'; did you mean 'label'"),
    "text as a label of numbers": (("metric: accuracy", "metric: spearman"), 6, "must hold numbers"),
    "labels that are not all": (("label: label", "label: label\n  labels: [high, mid]"), 7, "'low', which is not among"),
    "texts too long": (("max_length: 16", "max_length: 400"), 7, "at most 40 tokens"),
    "timing too long": (("length: 16}}", "length: 41}}"), 14, "at most 40 tokens"),
    "no words": (("max_length: 16", "max_length: 0"), 7, "too small"),
    "duplicate key": (("seed: 0", "seed: 0\nseed: 1"), 10, "'seed' is written twice"),
    "duplicate option": (("heads: 0.5,", "heads: 0.5, heads: 0.4,"), 12, "'heads' is written twice"),
    "a tab": (("  text: sentence", "\ttext: sentence"), 5, "tab"),
    "not YAML": (("seed: 0", "seed: [0"), None, "not YAML"),
    "a colon too many": (("seed: 0", "seed: 0: 1"), 9, "not YAML"),
    "an anchor": (("seed: 0", "seed: &a 0"), 9, "anchors"),
    "an alias bomb": (("seed: 0", "seed: &a [x, x]\nb: &b [*a, *a, *a]"), 9, "anchors"),
    "a python tag": (("seed: 0", "seed: !!python/object/apply:os.system ['true']"), 9, "tag"),
    "a list": ((GOOD, "- a\n- b\n"), 1, "a mapping"),
    "nothing at all": ((GOOD, "\n# nothing\n"), 1, "this file is empty"),
    "binary": ((GOOD, "\x00\x01"), 1, "not YAML"),
    "nested beyond sense": ((GOOD, "a: " + "[" * 5000), 1, "20 deep"),
    "output that is a file": (("output: {root}/out", "output: {root}/bert/config.json"), 15, "is a file"),
    "output below a file": (("output: {root}/out", "output: {root}/bert/config.json/x"), 15, "is a file"),
    "output of somebody else": (("output: {root}/out", "output: {root}/texts"), 15, "holds something else"),
    "push to no name": (("output: {root}/out", "output: {root}/out\npush: a/b/c"), 16, "no name of a repository"),
    "push without repo": (("output: {root}/out", "output: {root}/out\npush: {{private: true}}"), 16, "push needs repo"),
    "push in private?": (("output: {root}/out", "output: {root}/out\npush: {{repo: a/b, private: maybe}}"), 16, "private must be true or false"),
    "a huge seed": (("seed: 0", "seed: 1" + "0" * 30), 9, "seed is too large: 10+; the most is 4,294,967,295"),
    "a seed of thousands of digits": (("seed: 0", "seed: 1" + "0" * 5000), 9, "a number of 5,001 digits"),
    "a huge size in a list": (("[1, 4]", "[1, 1" + "0" * 30 + "]"), 14, "batch_sizes is too large"),
    "a huge size of data": (("max_length: 16", "max_train_samples: 1" + "0" * 30), 7, "max_train_samples is too large"),
    "a huge number of steps": (("{{epochs: 1}}", "{{max_steps: 1" + "0" * 30 + "}}"), 11, "max_steps is too large"),
    "no metric": (("metric: accuracy", "metric: []"), 8, "metric is empty"),
    "an empty metric": (("metric: accuracy", "metric: ''"), 8, "metric is empty"),
    "a metric twice": (("metric: accuracy", "metric: [matthews, matthews_correlation]"), 8, "each name once, got 'matthews_correlation'"),
    "a column that is not read": (("label: label", "label: label\n  image: x"), 7, "image would do nothing here: text-classification does not read it"),
    "seconds of a text": (("label: label", "label: label\n  max_seconds: 3.0"), 7, "max_seconds would do nothing here"),
    "endless seconds": (("label: label", "label: label\n  max_seconds: .inf"), 7, "must be a finite number"),
    "a configuration of files": (("label: label", "label: label\n  config: plain"), 7, "config would do nothing here"),
    "a revision of files": (("label: label", "label: label\n  revision: main"), 7, "revision would do nothing here"),
    "a revision of a folder": (("model: {root}/bert", "model: {{id: {root}/bert, revision: main}}"), 1, "revision would do nothing here"),
    "too few names of columns": (("label: label", "label: label\n  columns: [sentence]"), 7, "1 names and '.*.tsv' has 2 fields"),
    "names of columns that are there": (("label: label", "label: label\n  columns: [sentence, label]"), 7, "has these names in its first line"),
    "names of columns twice": (("label: label", "label: label\n  columns: [a, a]"), 7, "each name once"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    text_classification(root)
    return root


def written(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes(name, root, tmp_path, monkeypatch):
    (old, new), line, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    assert old in GOOD, "the table asks for something that is not in the recipe"
    text = GOOD.replace(old, new, 1)
    file = tmp_path / "recipe.yaml"
    file.write_text(text.format(root=root) if "{" in text else text)
    before = written(root)
    with pytest.raises(RecipeError) as refused:
        run_recipe(file)
    found = re.match(rf"{re.escape(str(file))}:(\d+): (.*)", str(refused.value), re.DOTALL)
    assert found, f"no place in {refused.value}"
    assert re.search(message, found[2]), refused.value
    assert line is None or int(found[1]) == line, refused.value
    assert "\n" not in found[2] and len(found[2]) < 700
    assert written(root) == before and sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


# every line that is wrong, and what is said there; what only follows from another mistake is not told
MANY = """\
modle: bert
task: text-clasification
data: {path: [1], txt: sentence, max_length: 1}
metric: [f1, f1]
seed: -1
steps:
  - finetune: {epohcs: 1, batch_size: many}
  - prune: {haeds: 0.5}
  - purne: {heads: 0.5}
  - quantize: {bits: 5}
  - distill: {teacher: finetuned}
output: 3
push: {repo: a/b/c, private: maybe}
"""
TOLD = [
    (1, "no 'modle'; did you mean 'model'"),
    (2, "unknown task 'text-clasification'"),
    (3, "no 'txt'"),
    (3, "path must be a text"),
    (3, "max_length is too small: 1"),
    (4, "metric must hold each name once"),
    (5, "seed must lie between"),
    (7, "no 'epohcs'"),
    (7, "batch_size must be a whole number, got 'many'"),
    (8, "no 'haeds'"),
    (9, "unknown step 'purne'"),
    (10, "8, 4, 3, 2"),
    (12, "output must be a text, got 3"),
    (13, "private must be true or false"),
    (13, "'a/b/c' is no name of a repository"),
]


def mistakes(file: Path, error: RecipeError) -> list[tuple[int, str]]:
    """Line and message of each; a message never goes over a line."""
    found = [re.fullmatch(rf"{re.escape(str(file))}:(\d+): (.*)", line) for line in str(error).split("\n")]
    assert all(found), error
    return [(int(one[1]), one[2]) for one in found if one]


def test_every_mistake_is_told_in_order(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(MANY)
    with pytest.raises(RecipeError) as refused:
        read_recipe(file)
    found = mistakes(file, refused.value)
    assert [line for line, _ in found] == [line for line, _ in TOLD], refused.value
    missing = [(told, wanted) for (_, told), (_, wanted) in zip(found, TOLD, strict=True) if wanted not in told]
    assert not missing


def test_a_wrong_model_does_not_hide_wrong_data(root, tmp_path):
    text = GOOD.replace("{root}/bert", "./no-model").replace("text: sentence", "text: sentense")
    file = write(tmp_path, text, root)
    with pytest.raises(RecipeError) as refused:
        read_recipe(file)
    (one, model), (five, column) = mistakes(file, refused.value)
    assert (one, five) == (1, 5) and "./no-model" in model and "no column 'sentense'" in column


def test_there_are_at_least_fifty():
    assert len(WRONG) >= 60


@pytest.mark.parametrize("recipe, place", [("no.yaml", "no.yaml:1: "), (".", ".:1: "), (3, "recipe:1: "), ({}, "recipe:1: ")])
def test_what_is_no_recipe_at_all(recipe, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as refused:
        run_recipe(recipe)
    assert str(refused.value).startswith(place)


def test_the_good_one_is_good(root, tmp_path):
    before = written(root)
    recipe = read_recipe(write(tmp_path, GOOD, root))
    assert [step.name for step in recipe.steps] == ["finetune", "prune", "quantize", "measure"]
    assert recipe.steps[1].options == {"heads": 0.5, "neurons": 0.5, "epochs": 1, "teacher": "previous"}
    assert recipe.data.text == "sentence" and recipe.output == f"{root}/out" and recipe.metric == ("accuracy",)
    assert written(root) == before


def write(folder: Path, text: str, root: Path) -> Path:
    (folder / "recipe.yaml").write_text(text.format(root=root))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    "text, value",
    [("3e-5", 3e-5), ("1.0e-4", 1e-4), ("no", "no"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("true", True), ("~", None),
     ("012", 12), ("1_000", "1_000"), ("'8'", "8"), (".5", 0.5)],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value, tmp_path):
    (tmp_path / "r.yaml").write_text(f"seed: {text}\n")
    found = read_source(tmp_path / "r.yaml")[0]["seed"]
    assert found == value and type(found) is type(value)


def test_a_dict_is_the_same_as_its_file(root, tmp_path):
    path = write(tmp_path, GOOD, root)
    assert parse(*read_source(yaml.safe_load(path.read_text()))) == parse(*read_source(path))
    odd = {"model": "3e-5", "task": "text-classification", "data": "no", "steps": [{"finetune": None}], "output": "true"}
    assert (parse(*read_source(odd)).model, parse(*read_source(odd)).output) == ("3e-5", "true")


@pytest.mark.parametrize("word, owner", [("schedule", hc.PruningCallback), ("decode", hc.QuantizationCallback)])
def test_words_are_the_arguments_of_the_classes(word, owner):
    import inspect

    from hf_compress.recipe.steps import STEPS

    step = {"schedule": "prune", "decode": "quantize"}[word]
    assert word in STEPS[step].words
    assert set(inspect.signature(owner).parameters) - {"inputs", "batches"} <= STEPS[step].words.keys()


def test_spans_of_tokens_without_labels_for_them_are_refused(tmp_path):
    world = token_classification(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"tokens": ["w1", "w2"], "ner_tags": ["O"]}\n{"tokens": ["w1"], "ner_tags": ["B-X"]}\n' * 20)
    recipe = {**world, "data": {"train": str(bad)}, "steps": [{"finetune": {}}], "output": str(tmp_path / "out")}
    with pytest.raises(RecipeError, match="has 2 tokens and 1 labels"):
        read_recipe(recipe)


# --- templates -------------------------------------------------------------------------------------------------------

MODELS = {
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)), "text-classification", ["prune", "quantize"]),
    "tags": (lambda: T.BertForTokenClassification(T.BertConfig(**TEXT)), "token-classification", ["prune", "quantize"]),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT)), "text-generation", ["prune", "quantize"]),
    "vit": (
        lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, image_size=16, patch_size=8)),
        "image-classification",
        ["prune", "quantize"],
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
        "image-classification",
        [],  # convolutions are not quantized, and the head stays
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_template_is_a_recipe(name, tmp_path):
    make, task, expected = MODELS[name]
    torch.manual_seed(0)
    folder = save_model(tmp_path / "model", make(), tokenizer())
    text = recipe_template(folder)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = parse(*read_source(tmp_path / "recipe.yaml"))
    assert (recipe.model, recipe.task) == (folder, task)
    assert [step.name for step in recipe.steps] == ["finetune", *expected, "measure"]
    assert all(len(line) < 120 for line in text.splitlines())


def test_a_template_that_is_filled_in_is_accepted(root, tmp_path):
    text = recipe_template(root / "bert", "text-classification")
    filled = text.replace("path/to/data", f"{root}/texts").replace("text: text ", "text: sentence ").replace("128", "16")
    filled = filled.replace("length: 64", "length: 16").replace("output: ", f"output: {tmp_path}/")
    (tmp_path / "recipe.yaml").write_text(filled)
    assert read_recipe(tmp_path / "recipe.yaml").task == "text-classification"


@pytest.mark.parametrize(
    "model, task, message", [("./none", None, "Cannot load the model"), ("./none", "sorting", "Unknown task")]
)
def test_no_template(model, task, message):
    with pytest.raises(hc.CompressionError, match=message):
        recipe_template(model, task)


def test_nothing_of_a_recipe_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("evil", "somebody"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("open('PWNED', 'w').close()\n")
    for metric in ("./evil", "evil", "somebody/evil", "../x"):
        with pytest.raises(hc.CompressionError, match="Unknown metric"):
            find_metric(metric, "classes", "text-classification")
    assert not (tmp_path / "PWNED").exists()


def test_models_that_cannot_do_what_is_asked(tmp_path):
    recipe = {**text_classification(tmp_path), "output": str(tmp_path / "out")}
    (tmp_path / "lines.txt").write_text("w1 w2 w3 w4\n" * 20)
    text = {
        "model": recipe["model"],
        "task": "text-generation",
        "data": {"train": str(tmp_path / "lines.txt"), "max_length": 8},
    }
    with pytest.raises(RecipeError, match="reads a text from both sides"):  # its perplexity would know the answers
        read_recipe({**text, "steps": [{"finetune": {"epochs": 1}}], "output": str(tmp_path / "out")})
    labels = {"id2label": {0: "HIGH", 1: "LOW"}, "label2id": {"HIGH": 0, "LOW": 1}}
    config = T.BertConfig(**TEXT, pad_token_id=0, **labels)
    upper = save_model(tmp_path / "upper", T.BertForSequenceClassification(config), tokenizer())
    read_recipe({**recipe, "model": upper, "steps": [{"quantize": {"bits": 8}}]})  # the same classes in the same order
    config = T.BertConfig(**TEXT, pad_token_id=0, id2label={0: "LOW", 1: "HIGH"}, label2id={"LOW": 0, "HIGH": 1})
    turned = save_model(tmp_path / "turned", T.BertForSequenceClassification(config), tokenizer())
    read_recipe({**recipe, "model": turned, "steps": [{"quantize": {"bits": 8}}]})  # or in another: see test_recipe_labels
    config = T.BertConfig(**TEXT, pad_token_id=0, id2label={0: "CAT", 1: "DOG"}, label2id={"CAT": 0, "DOG": 1})
    other = save_model(tmp_path / "other", T.BertForSequenceClassification(config), tokenizer())
    with pytest.raises(RecipeError, match="no trained head .* with these labels"):
        read_recipe({**recipe, "model": other, "steps": [{"quantize": {"bits": 8}}]})
    model = T.BertForSequenceClassification.from_pretrained(upper)
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    small = save_model(tmp_path / "small", model, tokenizer())
    with pytest.raises(RecipeError, match="is quantized: .* cannot be trained"):
        read_recipe({**recipe, "model": small, "steps": [{"finetune": {"epochs": 1}}]})


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"exits": {"after": [0], "epochs": 1, "max_drop": -1}}, "max_drop must be 0 or more"),
        ({"finetune": {"epochs": 1, "learning_rate": float("inf")}}, "learning_rate must be a finite number"),
        ({"finetune": {"epochs": float("inf")}}, "epochs must be a finite number"),
        ({"finetune": {"epochs": 1, "seed": -1}}, "seed must be 0 or more"),
    ],
)
def test_numbers_that_mean_nothing(tmp_path, step, message):
    recipe = {"model": "m", "task": "text-classification", "data": "d", "steps": [{"finetune": {"epochs": 1}}, step]}
    with pytest.raises(RecipeError, match=message):
        read_recipe({**recipe, "output": str(tmp_path / "out")})


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("text-generation", {"label": "l"}, "label would do nothing here: text-generation does not read it"),
        ("text-generation", {"labels": ["a", "b"]}, "labels would do nothing here"),
        ("sentence-similarity", {"labels": ["a", "b"]}, "labels would do nothing here"),
        ("sentence-similarity", {"label": ["a", "b"]}, "label is one column in sentence-similarity"),
        ("token-classification", {"text": "t"}, "its columns are tokens, label"),
        ("image-classification", {"max_length": 8}, "image-classification reads images"),
        ("audio-classification", {"max_length": 8, "image": "i"}, "max_length would do nothing .*\n.*image would do nothing"),
        ("audio-classification", {"max_seconds": 2.0, "audio": "a"}, None),
    ],
)
def test_words_of_data_that_a_task_does_not_read(task, words, message):
    recipe = {"model": "m", "task": task, "data": {"path": "d", **words}, "steps": [{"finetune": {"epochs": 1}}], "output": "o"}
    if message is None:
        assert parse(*read_source(recipe)).data.max_seconds == 2.0
        return
    with pytest.raises(RecipeError, match=message):
        parse(*read_source(recipe))
