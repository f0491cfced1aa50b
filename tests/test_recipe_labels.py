"""What labels become: several a row, in the order of the model's own head, and what is assumed about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from datasets import ClassLabel, Dataset, Features, Value

from hf_compress.recipe import RecipeError, read_recipe
from hf_compress.recipe.data import DataOptions, open_data
from hf_compress.recipe.labels import Labels, find_labels
from hf_compress.recipe.opening import open_recipe
from hf_compress.recipe.reading import Source
from hf_compress.recipe.tasks import TASKS, predict
from tests.recipe_models import TEXT, save_model, tokenizer

SOURCE = Source("r.yaml", "")


def found(folder: Path, values: list, known: tuple[str, ...] = (), wanted: str = "any", **options) -> tuple[Labels, list[str]]:
    """The labels of a JSON file that is trained and measured on, and the notes."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i}", "label": v}) + "\n" for i, v in enumerate(values)))
    given = DataOptions(train=str(path), test=str(path), **options)
    data = open_data(given, TASKS["text-classification"].columns, SOURCE, 0)
    return find_labels(data, given, wanted, list(known), SOURCE), data.notes


SETS = [[0], [0, 2], [1], []]  # numbers of the classes that a row has
SEVERAL = {
    # name: (the column, options, names, a value, what a model takes)
    "fractions": ([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], {}, "012", [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]),
    "fractions that are sets in looks": ([[0.0, 1.0], [1.0, 0.0]], {}, "01", [1.0, 0.0], [1.0, 0.0]),
    "whole numbers": ([[0, 1, 1], [1, 0, 0]], {}, "012", [0, 1, 1], [0.0, 1.0, 1.0]),
    "truth values": ([[True, False], [False, False]], {}, "01", [True, False], [1.0, 0.0]),
    "named": ([[0, 1, 1], [1, 0, 0]], {"labels": ["x", "y", "z"]}, "xyz", [1, 0, 1], [1.0, 0.0, 1.0]),
    "sets of numbers": (SETS, {}, "012", [2, 0], [1.0, 0.0, 1.0]),
    "sets of two numbers of two": ([[0, 1], [1, 0], [0], [1]], {}, "01", [1], [0.0, 1.0]),
    "sets of one length": ([[0, 1], [1, 0], [0, 2]], {}, "012", [0, 2], [1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_labels_a_row(name, tmp_path):
    values, options, names, value, encoded = SEVERAL[name]
    labels, _ = found(tmp_path, values * 6, **options)
    assert (labels.kind, labels.names, labels.encode(value)) == ("labels", tuple(names), encoded)


def test_vectors_of_labels_reach_the_model(tmp_path):
    torch.manual_seed(0)
    model = save_model(tmp_path / "bert", T.BertModel(T.BertConfig(**TEXT, pad_token_id=0)), tokenizer())
    rows = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    lines = [json.dumps({"text": f"w{i}", "label": rows[i % 3]}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl"), "labels": ["a", "b", "c"]}
    recipe = {"model": model, "task": "text-classification", "data": data, "steps": [{"finetune": {"epochs": 1}}]}
    setup, metrics = open_recipe(read_recipe({**recipe, "output": str(tmp_path / "out")}))
    batch = next(setup.batches("measured", 3))
    assert batch["labels"].tolist() == rows and metrics[0].name == "f1"
    loaded = setup.load().eval()
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    output = loaded(**batch)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, torch.tensor(rows))
    assert torch.allclose(output.loss, wanted)


HEADS = {
    # name: (the column, the head's classes, names, {value: what a model takes}, what the notes say)
    "other case": (["neg", "pos"], ("POS", "NEG"), ("POS", "NEG"), {"neg": 1, "pos": 0}, ""),
    "other order": (["a", "b", "c"], ("c", "a", "b"), ("c", "a", "b"), {"a": 1, "b": 2, "c": 0}, ""),
    "nothing in common": (["a", "b"], ("x", "y"), ("a", "b"), {"a": 0, "b": 1}, ""),
    "without names": (["neg", "pos"], ("LABEL_0", "LABEL_1"), ("neg", "pos"), {"neg": 0, "pos": 1}, "0: neg, 1: pos"),
    "of numbers": ([0, 1], ("NEG", "POS"), ("NEG", "POS"), {0: 0, 1: 1}, "labels are numbers, .* 0: NEG, 1: POS"),
    "of numbers, without names": ([0, 1], ("LABEL_0", "LABEL_1"), ("LABEL_0", "LABEL_1"), {0: 0, 1: 1}, ""),
    "of vectors": ([[1, 0, 0], [0, 1, 1]], ("x", "y", "z"), ("x", "y", "z"), {}, "0: x, 1: y, 2: z"),
}


@pytest.mark.parametrize("name", HEADS)
def test_labels_are_those_of_the_head_by_name(name, tmp_path):
    values, known, names, codes, note = HEADS[name]
    labels, notes = found(tmp_path, values * 8, known)
    assert labels.names == names
    assert {value: labels.encode(value) for value in codes} == codes
    if note:
        (said,) = notes
        assert re.search(note, said)
    else:
        assert notes == []


def test_names_given_for_numbers_are_looked_up_in_the_head(tmp_path):
    labels, notes = found(tmp_path, [0, 1] * 8, ("POSITIVE", "NEGATIVE"), labels=["negative", "positive"])
    assert [labels.encode(0), labels.encode(1)] == [1, 0] and labels.names == ("POSITIVE", "NEGATIVE") and notes == []
    labels, _ = found(tmp_path, [[0, 1, 1], [1, 0, 0]] * 8, ("c", "b", "a"), labels=["a", "b", "c"])
    assert labels.encode([1, 0, 0]) == [0.0, 0.0, 1.0] and labels.names == ("c", "b", "a")


def test_columns_of_labels_are_looked_up_in_the_head(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,rude,kind\n" + "".join(f"w{i},{i % 2},{int(i % 3 == 0)}\n" for i in range(12)))
    options = DataOptions(train=str(path), test=str(path), label=["rude", "kind"])
    data = open_data(options, TASKS["text-classification"].columns, SOURCE, 0)
    labels = find_labels(data, options, "any", ["kind", "rude"], SOURCE)
    assert labels.names == ("kind", "rude") and labels.encode([1, 0]) == [0.0, 1.0]


def test_tags_are_those_of_the_head_by_name(tmp_path):
    labels, _ = found(tmp_path, [["o", "b-x"], ["b-x"]] * 8, ("B-X", "O"), wanted="tags")
    assert (labels.kind, labels.names) == ("tags", ("B-X", "O")) and labels.encode(["o", "b-x", "o"]) == [1, 0, 1]


def test_a_head_that_answers_by_its_own_names_is_right(tmp_path):
    """The data has [negative, positive], the head {0: POSITIVE, 1: NEGATIVE}, and it answers POSITIVE always."""
    head = {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    model = T.BertForSequenceClassification(T.BertConfig(**TEXT, pad_token_id=0, **head))
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([1.0, -1.0])
    name = save_model(tmp_path / "bert", model, tokenizer())
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = {"text": [f"w{i}" for i in range(20)], "label": [0] * 15 + [1] * 5}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    data = {"train": str(tmp_path / "rows.parquet"), "test": str(tmp_path / "rows.parquet")}
    recipe = {"model": name, "task": "text-classification", "data": data, "steps": [{"quantize": {"bits": 8}}]}
    setup, (metric,) = open_recipe(read_recipe({**recipe, "output": str(tmp_path / "out")}))
    assert not setup.fresh and [setup.labels.encode(0), setup.labels.encode(1)] == [1, 0]
    loaded = setup.load()
    assert metric.compute(*predict(setup, loaded, "measured")) == 5 / 20
    assert loaded.config.id2label == head["id2label"]


REFUSED = {
    "a vector that is longer": (
        [[0.0, 1.0], [1.0, 0.0, 1.0]],
        {},
        r"a row of 'train' has 3 numbers in 'label', not 2",
    ),
    "half of a label": ([[0.0, 0.5], [1.0, 0.0]], {}, r"are 0 or 1 each; a row of 'train' has 0.5"),
    "names for places": ([[0, 1, 1], [1, 0, 0]], {"labels": ["a", "b"]}, "2 names for the 3 numbers of each row"),
    "a hole in a list": ([["a", None], ["b"]], {}, "has a hole"),
    "one class of words": (["a"], {}, r"one class alone in 'label' \(a\)"),
    "one class of numbers": ([1], {}, r"one class alone in 'label' \(1\)"),
    "one truth": ([True], {}, r"one class alone in 'label' \(true\)"),
    "one number": ([0.5], {}, "all have 0.5 in 'label'; there is nothing to learn"),
    "the same set": ([["a", "b"], ["b", "a"]], {}, "all have the same labels"),
    "vectors of two that look like sets": ([[0, 1], [1, 0]], {}, r"all have the same labels .* write 1\.0 and 0\.0"),
    "the same vector": ([[1.0, 0.0]], {}, "all have the same labels"),
    "no label at all": ([[], []], {}, "nothing to learn|must hold"),
    "lists of lists": ([[["a"]], [["b"]]], {}, "labels or lists of labels"),
    "names for numbers": ([0.5, 1.5], {"labels": ["a", "b"]}, "labels would do nothing here"),
    "too few names": ([0, 1, 2], {"labels": ["a", "b"]}, "2 names for 3 classes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_labels_that_cannot_be(name, tmp_path):
    values, options, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        found(tmp_path, values * 10, **options)


@pytest.mark.parametrize("values", [[0, 1], ["a", "b"]])
def test_a_name_without_rows_is_noted(values, tmp_path):
    labels, notes = found(tmp_path, values * 8, labels=["a", "b", "c"])
    assert labels.names == ("a", "b", "c")
    assert notes == ["3 classes are named and the rows hold 2: no row has c."]
