"""`hf-compress measure -o` into a report that is there: sizes and times are new, what else it says stays."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
import yaml

import hf_compress as hc
from hf_compress.cli import main
from hf_compress.report import Report
from tests.recipe_models import TEXT, text_classification

QUICK = "--batch-sizes 1 3 --length 9 --repeats 2 --warmup 0"
ABOUT = {
    "name": "small-one",
    "base_model": "someone/bert",
    "base_card": {"license": "mit"},
    "dataset": {"name": "someone/texts", "split": "test", "rows": 120, "metric_name": "accuracy"},
    "metric": "accuracy",
    "seed": 3,
    "recipe": "recipe.yaml",
    "notes": ["Tuned on other rows."],
    "stages": [
        {"name": "finetune", "metric": 0.875, "latency": 5.0, "parameters": 7, "bytes": 28},
        {"name": "prune", "metric": 0.75, "latency": 4.0},
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A dense model, a small one of it, another with wider blocks, and the report of the first two."""
    root = tmp_path_factory.mktemp("measured")
    torch.manual_seed(0)
    dense = T.BertForSequenceClassification(T.BertConfig(**TEXT)).eval()
    dense.save_pretrained(root / "dense")
    T.BertForSequenceClassification(T.BertConfig(**{**TEXT, "intermediate_size": 96})).save_pretrained(root / "wide")
    small = T.BertForSequenceClassification.from_pretrained(root / "dense")
    hc.apply_(small, hc.Plan([hc.KeepNeurons("bert.encoder.layer.1", range(24))])).save_pretrained(root / "small")
    return root


@pytest.fixture
def earlier(world, tmp_path, monkeypatch):
    """The path of a report that a recipe may have left, and the report."""
    monkeypatch.chdir(world)
    small, dense = (T.BertForSequenceClassification.from_pretrained(name).eval() for name in ("small", "dense"))
    report = hc.measure(
        small,
        {"input_ids": torch.ones(3, 9, dtype=torch.long)},
        against=dense,
        metrics={"accuracy": 0.75},
        metrics_against={"accuracy": 0.875},
        repeats=1,
        about=ABOUT,
    )
    stages = [ABOUT["stages"][0], {**ABOUT["stages"][1], "bytes": report.model.bytes}]
    report = replace(report, about={**report.about, "stages": stages})
    report.save(tmp_path / "report.json")
    return tmp_path / "report.json", report


def run(capsys, line: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(shlex.split(line)) == code, capsys.readouterr().err
    return capsys.readouterr()


def test_what_was_not_measured_again_stays(earlier, capsys):
    path, old = earlier
    out, err = run(capsys, f"measure small --against dense -o {path.parent} --threads 1 --json {QUICK}")
    new = Report.load(path)
    assert json.loads(out) == new.to_dict()
    assert (new.model.metrics, new.against.metrics) == ({"accuracy": 0.75}, {"accuracy": 0.875})
    for name in ("name", "base_model", "base_card", "dataset", "metric", "seed", "recipe", "notes"):
        assert new.about[name] == ABOUT[name]
    assert (new.model.parameters, new.model.macs) == (old.model.parameters, old.model.macs)  # the same shapes
    assert [t.batch for t in new.timings] == [1, 3] and old.timings == () and new.model.latency.repeats == 2
    first, last = new.about["stages"]
    assert (first["latency"], last["latency"]) == (5.0, new.model.latency.median)  # the conditions are the same
    assert first["metric"] == 0.875 and "note" not in err


def test_latencies_of_other_conditions_do_not_stay(earlier, capsys):
    path, old = earlier
    _, err = run(capsys, f"measure small --against dense -o {path} --batch-sizes 2 --length 5 --repeats 1 --warmup 0")
    new = Report.load(path)
    assert [stage.get("latency") for stage in new.about["stages"]] == [None, new.model.latency.median]
    assert new.conditions["shapes"] == {"input_ids": [2, 5]} and new.model.macs < old.model.macs
    assert "note: The latencies of the stages were measured under other conditions and are left out." in err


def test_another_baseline_is_named_and_brings_no_metrics(earlier, capsys):
    path, _ = earlier
    _, err = run(capsys, f"measure small --against wide -o {path} {QUICK}")
    new = Report.load(path)
    assert (new.model.metrics, new.against.metrics) == ({"accuracy": 0.75}, {})
    assert (new.about["base_model"], new.about["against"]) == ("someone/bert", "wide")
    assert "BASE is another model than the baseline" in err


REFUSED = {
    "another model": ("measure wide --against dense", "is the report of another model, of "),
    "no baseline": ("measure small", "compares with a baseline, and what it says of that would be lost: give --against"),
    "another type of number": ("measure small --against dense --dtype bfloat16", "is the report of another model, of "),
}


@pytest.mark.parametrize("line, said", REFUSED.values(), ids=REFUSED)
def test_a_report_of_something_else_is_kept(earlier, capsys, line, said):
    path, _ = earlier
    before = path.read_bytes()
    out, err = run(capsys, f"{line} -o {path} {QUICK}", 2)
    assert said in err and out == "" and err.count("\n") == 1 and path.read_bytes() == before
    run(capsys, f"{line} -o {path} --overwrite {QUICK}")
    new = Report.load(path)
    assert new.model.metrics == {} and "dataset" not in new.about and "stages" not in new.about


def test_a_baseline_that_is_a_folder_is_told_without_its_path(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    (world / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# dense\n")
    run(capsys, f"measure small --against {world}/dense -o {tmp_path} {QUICK}")
    about = Report.load(tmp_path).about
    assert about["base_model"] == "./dense" and about["base_card"]["license"] == "mit"
    assert str(world) not in (tmp_path / "report.json").read_text()


def test_the_report_of_a_recipe_is_measured_beside_the_same_step(tmp_path, monkeypatch, capsys):
    """And the card tells the new numbers, while what a person wrote into it stays."""
    monkeypatch.chdir(tmp_path)
    recipe = {**text_classification(tmp_path), "output": "out"}
    train = {"max_steps": 2, "batch_size": 4}
    recipe["steps"] = [
        {"finetune": train},
        {"prune": {"neurons": 0.5, **train}},
        {"measure": {"batch_sizes": [1], "length": 8, "repeats": 1, "warmup": 0}},
    ]
    Path("recipe.yaml").write_text(yaml.dump(recipe))
    run(capsys, "run recipe.yaml")
    old, card = Report.load("out"), Path("out/README.md").read_text()
    Path("out/README.md").write_text(card.replace("## What it does not do\n", "## What it does not do\n\nMy own words.\n"))
    _, err = run(capsys, f"measure out -o out {QUICK}")
    new = Report.load("out")
    assert "note: Measured beside out/steps/01-finetune, as before." in err
    assert (new.model.metrics, new.against.metrics) == (old.model.metrics, old.against.metrics)
    assert new.about["dataset"] == old.about["dataset"] and new.speedup is not None
    assert [t.batch for t in new.timings] == [1, 3]
    text = Path("out/README.md").read_text()
    assert "batch 3" in text and "batch 3" not in card and "My own words." in text
