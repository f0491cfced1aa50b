"""What readers of the publishing parts found, each once."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.edits import CompressionError
from hf_compress.exits import exit_options
from hf_compress.files import staged
from hf_compress.measure import weights_digest
from hf_compress.recipe import RecipeError, run_recipe
from hf_compress.recipe.data import DataOptions, open_data
from hf_compress.recipe.labels import find_labels
from hf_compress.recipe.reading import Source
from hf_compress.recipe.sentences import pooling_of
from hf_compress.recipe.tasks import TASKS
from tests.recipe_models import TEXT, text_classification, tokenizer
from tests.zoo import build

SOURCE = Source("r.yaml", "")


def test_a_save_that_fails_while_files_move_loses_none(tmp_path, monkeypatch):
    (tmp_path / "1_Pooling").mkdir()
    old = {"1_Pooling/config.json": "old", "model.safetensors": "old"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    real = Path.mkdir

    def full(self, *args, **kwargs):
        if ".hf_compress_kept_" in str(self) and self.name == "1_Pooling":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(CompressionError, match="untouched"), staged(tmp_path) as stage:
        real(stage / "1_Pooling")
        for name in old:
            (stage / name).write_text("new")
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == old


def data_of(folder, rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = DataOptions(train=str(path), test=str(path), **options)
    return open_data(given, TASKS["text-classification"].columns, SOURCE, 0), given


@pytest.mark.parametrize("values, message", [([5, 500], "2 classes numbered up to 500"), ([1, 2], None), ([0, 1], None)])
def test_classes_that_are_numbered_with_gaps(values, message, tmp_path):
    data, options = data_of(tmp_path, [{"text": "w1", "label": v} for v in values])
    if message is not None:
        with pytest.raises(RecipeError, match=message):
            find_labels(data, options, "any", [], SOURCE)
        return
    assert find_labels(data, options, "any", [], SOURCE).names == tuple(map(str, range(max(values) + 1)))
    assert any("of 0 there are no rows" in note for note in data.notes) == (0 not in values)


def test_numbers_do_not_take_the_first_names_of_a_larger_head(tmp_path):
    data, options = data_of(tmp_path, [{"text": "w1", "label": v} for v in (0, 1)])
    with pytest.raises(RecipeError, match="head has 3 classes.*say labels"):
        find_labels(data, options, "any", ["negative", "neutral", "positive"], SOURCE)


def test_pairs_are_found_by_their_usual_names(tmp_path):
    rows = [{"sentence1": "w1", "sentence2": "w2", "label": v} for v in (0, 1)]
    assert data_of(tmp_path, rows)[0].columns == {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
    assert "text_pair" not in data_of(tmp_path, rows, text="sentence1")[0].columns  # what is named is all that is read


@pytest.mark.parametrize(
    "more, options, message",
    [
        (["Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        ([], {"pooling_mode_lasttoken": True}, "lasttoken"),
        ([], {"pooling_mode_mean_tokens": True}, None),
    ],
)
def test_sentences_are_pooled_as_the_model_pools_them_or_not_at_all(more, options, message, tmp_path):
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": i, "path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(options))
    if message is None:
        assert pooling_of(str(tmp_path), None) == "mean"
    else:
        with pytest.raises(CompressionError, match=message):
            pooling_of(str(tmp_path), None)


def test_weights_of_one_size_are_told_apart(tmp_path):
    from hf_compress.cli import main

    model, batch = build("bert")
    report = hc.measure(model, batch, metrics={"accuracy": 0.75}, repeats=1)
    assert report.about["weights"] == weights_digest(copy.deepcopy(model))
    report.save(tmp_path)
    model.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    quick = ["--batch-sizes", "1", "--repeats", "1", "--warmup", "0", "-o", str(tmp_path)]
    assert main(["measure", str(tmp_path / "other"), *quick]) == 2
    assert hc.Report.load(tmp_path) == report
    assert main(["measure", str(tmp_path / "same"), *quick]) == 0
    assert hc.Report.load(tmp_path).model.metrics == {"accuracy": 0.75}


def test_a_run_that_ends_before_its_card_leaves_the_old_model_with_its_old_numbers(tmp_path, monkeypatch):
    end = {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0, "length": 8}}
    recipe = {**text_classification(tmp_path), "output": str(tmp_path / "out"), "steps": [{"finetune": {"max_steps": 2}}, end]}
    run_recipe(recipe)
    names = ("model.safetensors", "report.json", "README.md", "recipe.yaml")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    changed = {**recipe, "steps": [{"finetune": {"max_steps": 3}}, end]}
    with monkeypatch.context() as patch:
        patch.setattr("hf_compress.publish.write_card_", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(changed)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == before
    run_recipe(changed)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_the_plan_tells_the_threshold_that_was_found(tmp_path):
    steps = [
        {"finetune": {"max_steps": 4}},
        {"exits": {"after": [0], "max_steps": 4, "mean_depth": 1.5}},
        {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0, "length": 8}},
    ]
    report = run_recipe({**text_classification(tmp_path), "output": str(tmp_path / "out"), "steps": steps})
    assert report.speedup_allowed is None  # layers are skipped: no law of Amdahl's holds
    model = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    used = exit_options(model)["threshold"]
    (edit,) = hc.Plan.load(tmp_path / "out")
    assert edit.threshold == used != 0.9  # 0.9 is what it begins with
    assert f"threshold={edit.threshold}"[:15] in (tmp_path / "out" / "README.md").read_text()


def test_a_language_model_is_a_baseline_for_its_classifier(tmp_path, capsys):
    from hf_compress.cli import main

    config = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    T.BertForMaskedLM(T.BertConfig(**config)).save_pretrained(tmp_path / "base")
    T.BertForSequenceClassification(T.BertConfig(**config)).save_pretrained(tmp_path / "classifier")
    T.BertForTokenClassification(T.BertConfig(**config)).save_pretrained(tmp_path / "tagger")
    quick = ["--batch-sizes", "1", "--repeats", "1", "--warmup", "0", "--length", "8", "--json"]
    assert main(["measure", str(tmp_path / "classifier"), "--against", str(tmp_path / "base"), *quick]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"]["parameters"] == data["against"]["parameters"]  # both with the classifier's head
    assert main(["measure", str(tmp_path / "classifier"), "--against", str(tmp_path / "tagger"), *quick]) == 2


def test_a_recipe_for_another_model_does_not_take_a_finished_run(tmp_path):
    end = {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0, "length": 8}}
    recipe = {**text_classification(tmp_path), "output": str(tmp_path / "out"), "steps": [{"finetune": {"max_steps": 2}}, end]}
    report = run_recipe(recipe)
    T.BertModel(T.BertConfig(**TEXT, pad_token_id=0)).save_pretrained(tmp_path / "second")
    tokenizer().save_pretrained(tmp_path / "second")
    with pytest.raises(RecipeError, match="holds a run of another recipe .model .*bert"):
        run_recipe({**recipe, "model": str(tmp_path / "second")})
    assert hc.Report.load(tmp_path / "out") == report


def test_a_report_is_renewed_under_its_own_conditions(tmp_path):
    from hf_compress.cli import main

    model, batch = build("bert")
    model.save_pretrained(tmp_path)
    short = {name: value[:1, :6] for name, value in batch.items()}
    hc.measure(model, short, batch_sizes=(1, 3), repeats=1).save(tmp_path)
    assert main(["measure", str(tmp_path), "--repeats", "1", "--warmup", "0", "-o", str(tmp_path)]) == 0
    report = hc.Report.load(tmp_path)
    assert [(timing.batch, timing.length) for timing in report.timings] == [(1, 6), (3, 6)]
