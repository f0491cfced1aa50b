"""What a run refuses before and while it works, what it compares with, and what it makes of a folder that was damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from hf_compress import discover
from hf_compress.drawing import can_draw
from hf_compress.edits import CompressionError
from hf_compress.recipe import RecipeError, read_recipe, run_recipe
from hf_compress.recipe.digests import commit_of, digests
from hf_compress.recipe.finite import FiniteCallback, NotFinite, check_losses, check_weights, finite_outputs
from hf_compress.recipe.metrics import METRICS
from hf_compress.recipe.reading import read_source
from hf_compress.recipe.results import notes_on
from hf_compress.recipe.schema import parse
from hf_compress.recipe.shares import removes, smallest_share
from hf_compress.recipe.steps import Step
from hf_compress.recipe.training import arguments_for
from hf_compress.report import Report
from tests.recipe_models import sentence_similarity, text_classification

MEASURE = {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0, "length": 8}}
TUNE = {"finetune": {"epochs": 1, "learning_rate": 2e-3, "batch_size": 16}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return {**text_classification(tmp_path_factory.mktemp("world")), "metric": "accuracy"}


# --- trainings that diverge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wild", [{}, {"optim": "sgd", "max_grad_norm": 0}, {"optim": "sgd", "weight_decay": 1e6}])
def test_a_training_that_diverged_is_not_done(world, tmp_path, wild):
    wild = {"finetune": {"max_steps": 9, "learning_rate": 4e9, "save_steps": 1, "lr_scheduler_type": "constant", **wild}}
    recipe = {**world, "steps": [wild, {"quantize": {"bits": 8}}, MEASURE], "output": str(tmp_path / "out")}
    for _ in range(2):  # the second run goes on from nothing that the first left
        with pytest.raises(CompressionError, match="01-finetune failed: the training diverged: .* learning_rate is 4e[+]09"):
            run_recipe(recipe)
        there = {path.name for path in (tmp_path / "out" / "steps").iterdir()}
        assert "00-model" in there and "01-finetune" not in there
        assert not list((tmp_path / "out" / "steps").rglob("checkpoint-*"))
        assert not (tmp_path / "out" / "report.json").exists()


def test_a_model_whose_outputs_are_no_numbers_is_not_measured(world, tmp_path):
    shutil.copytree(world["model"], tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][40, 3] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    recipe = {**world, "model": str(tmp_path / "broken"), "steps": [TUNE, MEASURE], "output": str(tmp_path / "out")}
    with pytest.raises(CompressionError, match="00-model failed: the model gives NaN or infinite outputs"):
        run_recipe(recipe)


def test_what_is_no_number_is_seen():
    arguments = arguments_for({"learning_rate": 0.5}, "unused", 0, False)
    assert arguments.logging_nan_inf_filter is False  # or the log would hold other numbers
    state = T.TrainerState(global_step=3, max_steps=9)
    FiniteCallback().on_log(arguments, state, None, logs={"loss": 1.0, "grad_norm": math.nan, "epoch": 1})
    for name, value in (("loss", math.nan), ("train_loss", math.inf), ("exit_loss_1", math.nan)):
        with pytest.raises(NotFinite, match=f"{name} was {value} at step 3 of 9; learning_rate is 0.5"):
            FiniteCallback().on_log(arguments, state, None, logs={name: value})
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([-math.inf, 0.0]))
    check_weights(model, arguments, "now")
    model[1].running_var[0] = math.nan
    with pytest.raises(NotFinite, match=r"1\.running_var holds NaN now"):
        check_weights(model, arguments, "now")
    with torch.no_grad():
        model[0].weight[1, 1] = math.inf
    with pytest.raises(NotFinite, match=r"the weight 0\.weight is not finite now"):
        check_weights(model, arguments, "now")


@pytest.mark.parametrize(
    ("losses", "end", "kind", "refused"),
    [
        ([0.7, 90.0], 40.0, "classes", False),
        ([0.7, 101.0], 40.0, "classes", True),
        ([5.0, 499.0], 300.0, "loss", False),
        ([5.0, 501.0], 300.0, "loss", True),
        ([0.7], 101.0, "classes", True),  # too short a training for a second loss: the mean of all
        ([0.7, 101.0, 0.6], 200.0, "classes", False),
        ([0.7, 101.0], 40.0, "numbers", False),
    ],
)
def test_a_loss_that_exploded_is_a_training_that_diverged(losses, end, kind, refused, caplog):
    state = T.TrainerState(log_history=[*({"loss": loss} for loss in losses), {"train_loss": end}])
    arguments = arguments_for({}, "unused", 0, False)
    assert arguments.logging_first_step
    if refused:
        with pytest.raises(NotFinite, match=f"its loss rose from {losses[0]:g} to {[*losses[1:], end][0]:g}"):
            check_losses(state, arguments, kind)
    else:
        check_losses(state, arguments, kind)
    assert ("its loss rose" in caplog.text) == (kind == "numbers")


@pytest.mark.parametrize(("place", "refused"), [((0, 1), True), ((1, 2), False)])  # the third token of row 1 is padding
def test_outputs_at_padding_may_be_anything(place, refused):
    class Model(nn.Module):
        def forward(self, values, attention_mask):
            return (values,)

    values = torch.zeros(2, 3, 4)
    values[(*place, 0)] = math.nan
    model, mask = Model(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    if not refused:
        with finite_outputs(model, "it"):
            model(values, attention_mask=mask)
    else:
        with pytest.raises(NotFinite, match="it gives NaN"), finite_outputs(model, "it"):
            model(values, attention_mask=mask)
    assert not model._forward_hooks


def test_a_metric_that_is_no_number_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], compute=lambda found, wanted: math.nan))
    with pytest.raises(CompressionError, match="00-model failed: the accuracy of the model on .* is nan"):
        run_recipe({**world, "steps": [TUNE, MEASURE], "output": str(tmp_path / "out")})
    assert not list((tmp_path / "out" / "steps").glob("0*"))


# --- what the result is compared with --------------------------------------------------------------------------------


def test_a_new_head_that_learns_from_a_teacher_is_compared_with_the_teacher(world, tmp_path):
    teach = {**world, "steps": [{"finetune": {**TUNE["finetune"], "epochs": 3}}, MEASURE], "output": str(tmp_path / "teacher")}
    taught = run_recipe(teach)
    assert taught.about["against"] == "bert, with a new head"
    distil = {"distill": {**TUNE["finetune"], "teacher": str(tmp_path / "teacher"), "layers": 1}}
    recipe = {**world, "steps": [distil, {"quantize": {"bits": 8}}, MEASURE], "output": str(tmp_path / "out")}
    report = run_recipe(recipe)
    assert report.about["against"] == "teacher"
    assert [stage["name"] for stage in report.about["stages"]] == ["teacher", "distill", "quantize"]
    assert report.against is not None and report.against.metrics == taught.model.metrics
    assert report.against.parameters == taught.model.parameters == report.about["stages"][0]["parameters"]
    assert report.about["stages"][0]["metric"] == taught.model.metrics["accuracy"]
    assert any("The baseline is the teacher, teacher" in note for note in report.about["notes"])


def test_the_baseline_is_named(world, tmp_path):
    tuned = run_recipe(
        {**world, "steps": [TUNE, {"prune": {"heads": 0.5, "epochs": 1}}, MEASURE], "output": str(tmp_path / "a")}
    )
    assert tuned.about["against"] == "bert, fine-tuned"
    assert [stage["name"] for stage in tuned.about["stages"]] == ["finetune", "prune"]
    assert (
        "The compressed model was trained further than the baseline (prune), which is part of its metric."
        in tuned.about["notes"]
    )
    again = {
        **world,
        "model": str(tmp_path / "a"),
        "steps": [{"quantize": {"bits": 8}}, MEASURE],
        "output": str(tmp_path / "b"),
    }
    assert run_recipe(again).about["against"] == "a"


def test_notes_are_those_of_the_data_and_the_baseline():
    setup: Any = SimpleNamespace(data=SimpleNamespace(notes=["There is no test split."]))
    finetune, exits, quantize = Step("finetune", {}), Step("exits", {"after": [0]}), Step("quantize", {"bits": 8})
    assert notes_on(setup, [finetune], 0, None) == ["There is no test split."]
    assert notes_on(setup, [finetune, quantize], 1, None) == ["There is no test split."]
    assert "baseline (exits, finetune and exits)" in notes_on(setup, [quantize, exits, finetune, exits], 0, None)[1]
    assert "teacher, big-model" in notes_on(setup, [finetune], 0, "big-model")[1]
    assert setup.data.notes == ["There is no test split."]


# --- what decides whether a step runs again --------------------------------------------------------------------------


def test_a_model_of_the_hub_counts_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = {"model": "me/small", "task": "text-classification", "data": "d", "output": "o"}
    recipe = parse(
        *read_source({**text, "steps": [{"finetune": {}}, {"distill": {"teacher": "me/large"}}, {"quantize": {"bits": 8}}]})
    )
    setup: Any = SimpleNamespace(model="me/small", revision=None, data=SimpleNamespace(digest="x"))

    def at(**commits: str) -> list[str]:
        for name, commit in commits.items():
            repo = tmp_path / f"models--me--{name}"
            (repo / "refs").mkdir(parents=True, exist_ok=True)
            (repo / "refs" / "main").write_text(commit)
            (repo / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
            (repo / "snapshots" / commit / "config.json").write_text("{}")
            assert commit_of(f"me/{name}", None) == commit
        return digests(recipe, setup)

    first = at(small="a" * 40, large="b" * 40)
    assert at(small="a" * 40) == first
    moved = at(large="c" * 40)
    assert [one == two for one, two in zip(first, moved, strict=True)] == [True, True, False, False]
    assert not set(at(small="d" * 40)) & {*first, *moved}
    assert at(small="a" * 40, large="b" * 40) == first
    assert commit_of("me/unknown", "v1") == "v1" and commit_of("../no id", None) is None


# --- refused before any work -----------------------------------------------------------------------------------------

LINES = """\
model: {root}/bert
task: text-classification
data: {{path: {root}/texts, text: sentence, max_length: 16}}
metric: accuracy
steps:
  - finetune: {{epochs: 1}}
  - prune:
      heads: 0.5
  - quantize:
      bits: 8
  - measure: {{batch_sizes: [1]}}
output: {root}/out
"""
# what stands in the place of a line, and what the refusal of the (last) new line says
REFUSED = {
    "too few heads": ("      heads: 0.5", "      heads: 0.01", r"heads: 0\.01 removes nothing: 2 blocks have 4 heads each.*0\.063"),
    "too few heads of a layer": ("      heads: 0.5", "      scope: layer\n      heads: 0.1", r"smallest share .* is 0\.126"),
    "too few neurons": ("      heads: 0.5", "      round_to: 32\n      neurons: 0.001", "neurons: 0.001 removes nothing.*multiples of 32"),
    "unknown tracker": ("      bits: 8", "      bits: 8\n      epochs: 1\n      report_to: tensorbord", "report_to has no 'tensorbord'; did you mean 'tensorboard'"),
    "a tracker that is not installed": ("      bits: 8", "      bits: 8\n      epochs: 1\n      report_to: [comet_ml]", "comet_ml is not installed"),
    "all and one": ("      bits: 8", "      bits: 8\n      epochs: 1\n      report_to: [all, tensorboard]", "report_to has no 'all'"),
    "smoothing of one": ("{{epochs: 1}}", "{{epochs: 1, label_smoothing_factor: 1.0}}", r"label_smoothing_factor must lie in \[0, 1\)"),
    "smoothing below zero": ("{{epochs: 1}}", "{{epochs: 1, label_smoothing_factor: -0.1}}", r"must lie in \[0, 1\)"),
    "warmup below zero": ("{{epochs: 1}}", "{{epochs: 1, warmup_steps: -5}}", "warmup_steps must be 0 or more"),
    "decay below zero": ("{{epochs: 1}}", "{{epochs: 1, weight_decay: -0.1}}", "weight_decay must be 0 or more"),
    "beta of one": ("{{epochs: 1}}", "{{epochs: 1, adam_beta2: 1}}", r"adam_beta2 must lie in \[0, 1\)"),
    "epsilon of zero": ("{{epochs: 1}}", "{{epochs: 1, adam_epsilon: 0}}", "adam_epsilon must be above 0"),
    "clipping below zero": ("{{epochs: 1}}", "{{epochs: 1, max_grad_norm: -1}}", "max_grad_norm must be 0 or more"),
    "workers below zero": ("{{epochs: 1}}", "{{epochs: 1, dataloader_num_workers: -1}}", "dataloader_num_workers must be 0 or more"),
    "a seed too large": ("{{epochs: 1}}", "{{epochs: 1, seed: 4294967296}}", "seed is too large"),
    "unknown optimizer": ("{{epochs: 1}}", "{{epochs: 1, optim: adamw_troch}}", "optim has no 'adamw_troch'; did you mean 'adamw_torch'"),
    "an optimizer that is not installed": ("{{epochs: 1}}", "{{epochs: 1, optim: grokadamw}}", "optim: grokadamw cannot be used here"),
    "a schedule with numbers of its own": ("{{epochs: 1}}", "{{epochs: 1, lr_scheduler_type: cosine_with_min_lr}}", "lr_scheduler_type: cosine_with_min_lr cannot"),
    "push to a commit": ("output: {root}/out", "output: {root}/out\npush: {{repo: me/x, revision: %s}}" % ("a" * 40), "revision must be the name of a branch"),
    "push with no message": ("output: {root}/out", "output: {root}/out\npush:\n  repo: me/x\n  commit_message: ' '", "commit_message must be a text"),
    "a new head that is its own teacher": ("  - finetune: {{epochs: 1}}", "  - distill: {{epochs: 1, layers: 1}}", "the model itself, whose head is new"),
    "output in the model": ("output: {root}/out", "output: {root}/bert/out", "lies inside the folder of the model"),
    "output in the data": ("output: {root}/out", "output: {root}/texts/a/b", "lies inside the folder of the data"),
    "output where none can be": ("output: {root}/out", "output: /proc/out", "no folder can be made at '/proc/out'|cannot be written"),
    "output with a name too long": ("output: {root}/out", "output: {root}/" + "x" * 300, "no folder can be made at"),
}  # fmt: skip
if not torch.accelerator.is_available():
    REFUSED["fp16 without a GPU"] = ("{{epochs: 1}}", "{{epochs: 1, fp16: true}}", "fp16 needs a GPU")
    REFUSED["bf16 without a GPU"] = ("{{epochs: 1}}", "{{epochs: 1, bf16: true}}", "bf16 finds no GPU")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name, world, tmp_path, monkeypatch):
    old, new, message = REFUSED[name]
    root = Path(world["model"]).parent
    assert LINES.count(old) == 1
    text = LINES.replace(old, new).format(root=root)
    wrong = new.format(root=root).splitlines()[-1]
    line = next(i for i, written in enumerate(text.splitlines(), 1) if wrong in written)
    (tmp_path / "r.yaml").write_text(text)
    before = sorted(root.rglob("*"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_some")
    for refusing in (read_recipe, run_recipe):
        with pytest.raises(RecipeError, match=message) as error:
            refusing(tmp_path / "r.yaml")
        assert str(error.value).startswith(f"{tmp_path}/r.yaml:{line}: "), error.value
    assert sorted(root.rglob("*")) == before


def test_the_lines_are_right(world, tmp_path):
    (tmp_path / "r.yaml").write_text(LINES.format(root=Path(world["model"]).parent))
    read_recipe(tmp_path / "r.yaml")
    assert not (Path(world["model"]).parent / "out").exists()


@pytest.mark.parametrize("what", ["model", "texts", "teacher"])
def test_output_that_holds_what_is_read_is_refused(what, tmp_path):
    world = text_classification(tmp_path / "out" / "inner")
    (tmp_path / "out" / "steps").mkdir()
    (tmp_path / "out" / "steps" / "run.json").write_text("{}")  # as a run had been here
    away = tmp_path / "away"
    away.mkdir()
    steps: list = [TUNE]
    if what != "model":
        shutil.move(world["model"], away / "bert")
        world["model"] = str(away / "bert")
    if what == "teacher":
        shutil.move(world["data"]["path"], away / "texts")
        world["data"]["path"] = str(away / "texts")
        shutil.copytree(away / "bert", tmp_path / "out" / "teacher")
        steps.append({"distill": {"teacher": str(tmp_path / "out" / "teacher")}})
    expected = {"texts": "data"}.get(what, what)
    with pytest.raises(RecipeError, match=f"holds the folder of the {expected}"):
        read_recipe({**world, "steps": steps, "output": str(tmp_path / "out")})


def test_smoothing_of_numbers_is_refused(tmp_path, world):
    pairs = {**sentence_similarity(tmp_path), "output": str(tmp_path / "out")}
    with pytest.raises(RecipeError, match="label_smoothing_factor does not fit sentence-similarity that predicts numbers"):
        read_recipe({**pairs, "steps": [{"finetune": {"label_smoothing_factor": 0.1}}]})
    exits = [TUNE, {"exits": {"after": [0], "label_smoothing_factor": 0.1}}]
    with pytest.raises(RecipeError, match="does not fit the joint loss of exits"):
        read_recipe({**world, "steps": exits, "output": str(tmp_path / "out")})
    smooth = {"finetune": {"label_smoothing_factor": 0.1}}
    read_recipe({**world, "steps": [smooth], "output": str(tmp_path / "out")})


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [({"a": 12, "b": 12}, {}), ({"a": 12}, {"scope": "layer"}), ({"a": 64, "b": 128}, {"round_to": 32}), ({"a": 9, "b": 5}, {"uniform": True})],
)  # fmt: skip
def test_the_smallest_share_is_the_smallest(sizes, rules):
    least = smallest_share(sizes, rules)
    assert least is not None and removes(least, sizes, rules)
    assert not any(removes(share / 1000, sizes, rules) for share in range(round(least * 1000)))


def test_a_share_counts_groups_of_heads():
    from hf_compress.recipe.shares import check_share

    config = T.LlamaConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, intermediate_size=16
    )
    structure = discover(T.LlamaModel(config))
    with pytest.raises(CompressionError, match=r"3 blocks have 2 groups of heads each.* is 0\.084\."):  # 6 groups: above 1/12
        check_share(structure, {"heads": 0.05})
    check_share(structure, {"heads": 0.084})
    with pytest.raises(CompressionError, match="heads: 0.05 removes nothing"):  # whatever goes beside them
        check_share(structure, {"heads": 0.05, "neurons": 0.5})


# --- a folder that was damaged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    """A finished run: its recipe and report. Each test damages a copy."""
    out = tmp_path_factory.mktemp("done") / "out"
    recipe = {**world, "steps": [TUNE, {"quantize": {"bits": 8}}, MEASURE], "output": str(out)}
    return recipe, run_recipe(recipe)


@pytest.fixture
def copied(done, tmp_path):
    recipe, report = done
    shutil.copytree(recipe["output"], tmp_path / "out")
    return lambda: run_recipe(recipe, output=str(tmp_path / "out")), report, tmp_path / "out"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "weights cut short": ("steps/01-finetune/model.safetensors", cut),
    "weights of the same size": ("steps/01-finetune/model.safetensors", lambda p: p.write_bytes(b"x" * p.stat().st_size)),
    "no config": ("steps/01-finetune/config.json", os.remove),
    "config that is no JSON": ("steps/01-finetune/config.json", lambda p: p.write_text("{" * p.stat().st_size)),
    "no tokenizer": ("steps/01-finetune/tokenizer.json", os.remove),
    "what is known of it is no JSON": ("steps/01-finetune/step.json", lambda p: p.write_text("{")),
    "what is known of it is a list": ("steps/01-finetune/step.json", lambda p: p.write_text("[]")),
    "no metrics": ("steps/01-finetune/step.json", lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "metrics": 3}))),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_step_runs_again(name, copied, caplog):
    run, report, out = copied
    weights = load_file(out / "model.safetensors")
    place, damage = DAMAGE[name]
    damage(out / place)
    (out / "report.json").unlink()  # or nothing would be looked at
    first = (out / "steps" / "00-model" / "step.json").stat().st_mtime_ns
    again = run()
    assert "01-finetune is damaged" in caplog.text and "run again" in caplog.text
    assert (out / "steps" / "00-model" / "step.json").stat().st_mtime_ns == first
    assert again.model.metrics == report.model.metrics
    found = load_file(out / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("file", "damage"),
    [("model.safetensors", cut), ("report.json", lambda p: p.write_text("{")), ("config.json", lambda p: p.write_text("")), ("tokenizer.json", os.remove)],
)  # fmt: skip
def test_a_damaged_result_is_put_together_again(file, damage, copied, caplog):
    run, report, out = copied
    damage(out / file)
    assert run().model.metrics == report.model.metrics
    assert "is put together again" in caplog.text and "those steps run again" not in caplog.text
    caplog.clear()
    run()
    assert "again" not in caplog.text


def test_a_step_that_does_not_load_is_named(copied, monkeypatch):
    run, _, out = copied
    (out / "report.json").unlink()
    monkeypatch.setattr("hf_compress.recipe.run.damage", lambda folder, known: None)
    cut(out / "steps" / "02-quantize" / "model.safetensors")
    with pytest.raises(CompressionError, match="02-quantize cannot be loaded .*Remove that folder and run the recipe again"):
        run()


def test_what_a_killed_run_left_is_removed(copied):
    run, report, out = copied
    (out / ".hf_compress_abc").mkdir()
    (out / ".hf_compress_abc" / "model.safetensors").write_text("half")
    (out / "steps" / "run.part").write_text("{")
    (out / "steps" / ".01-exits").mkdir()
    (out / "notes.txt").write_text("mine")
    assert run() == report
    names = {path.name for path in (*out.iterdir(), *(out / "steps").iterdir())}
    assert not {".hf_compress_abc", "run.part", ".01-exits"} & names and "notes.txt" in names


@pytest.mark.parametrize(
    ("left", "refused"), [((), False), (("run.lock",), False), (("run.lock", "run.part"), False), (("x",), True)]
)
def test_a_run_that_was_killed_as_it_began_is_gone_on_from(left, refused, world, tmp_path):
    (tmp_path / "out" / "steps").mkdir(parents=True)
    for name in left:
        (tmp_path / "out" / "steps" / name).touch()
    recipe = {**world, "steps": [TUNE], "output": str(tmp_path / "out")}
    if refused:
        with pytest.raises(RecipeError, match="holds something else"):
            read_recipe(recipe)
    else:
        read_recipe(recipe)


def test_no_path_of_this_computer_is_published(done):
    recipe, report = done
    out = Path(recipe["output"])
    secret = str(Path(recipe["model"]).parent.parent).encode()
    published = [
        p for p in out.rglob("*") if p.is_file() and "steps" not in p.relative_to(out).parts and p.name != "recipe.yaml"
    ]
    published += list(out.glob("steps/*/step.json"))
    assert len(published) > 8
    assert [p.name for p in published if secret in p.read_bytes() or str(out.parent).encode() in p.read_bytes()] == []
    assert report.about["base_model"] == "./bert" and report.about["dataset"]["name"] == "./texts"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["model"] == recipe["model"]  # the user's own


def test_logs_of_a_training_outlive_its_checkpoints(world, tmp_path):
    pytest.importorskip("tensorboard", reason="the tracker that writes into the folder of the training")
    tune = {"finetune": {"max_steps": 2, "report_to": "tensorboard"}}
    run_recipe({**world, "steps": [tune, MEASURE], "output": str(tmp_path / "out")})
    assert len(list((tmp_path / "out" / "steps" / "runs" / "01-finetune").rglob("events.out.*"))) == 1


def test_where_it_was_pushed_is_in_the_report_that_is_returned(done, monkeypatch):
    recipe, report = done
    sent: list = []

    def push(folder, repo, **options):
        sent.append((folder, repo, options))
        return SimpleNamespace(pr_url=None, commit_url="https://hub/me/x/commit/1")

    monkeypatch.setattr("hf_compress.hub.push_folder", push)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_some")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me", "orgs": [{"name": "us"}]})
    with pytest.raises(RecipeError, match="'them/x' belongs to them, and this token to me"):
        run_recipe(recipe, push_to_hub="them/x")
    found = run_recipe(recipe, push_to_hub="me/x")
    assert found.about["published"] == {"repo": "me/x", "url": "https://hub/me/x/commit/1"}
    assert sent == [(Path(recipe["output"]), "me/x", {})]
    assert Report.load(recipe["output"]) == report and "published" not in report.about


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("prune", {"heads": 0.5, "epochs": 1, "teacher": "previous"}, "prune, distilled"),
        ("prune", {"heads": 0.5, "epochs": 1}, "prune"),
        ("quantize", {"bits": 8}, "quantize"),
        ("distill", {"layers": 1, "epochs": 1}, "distill"),
    ],
)
def test_a_stage_that_had_a_teacher_says_so(name, options, said):
    from hf_compress.recipe.results import stage_row
    from hf_compress.recipe.steps import Step
    from hf_compress.report import Cost, Latency
    from hf_compress.words import techniques

    cost = Cost(10, 5, 40, 7, Latency(0.5, 0.4, 0.6, 3))
    row = stage_row({"name": f"02-{name}", "metrics": {"accuracy": 0.75}}, "accuracy", cost, Step(name, options))
    assert row == {"name": said, "metric": 0.75, "latency": 0.5, "parameters": 10, "bytes": 40}
    assert ("distilled" in techniques([], {"stages": [row]})) == ("distil" in said)


def test_tries_without_a_target_and_without_training_are_refused(world, tmp_path):
    recipe = {**world, "steps": [{"prune": {"heads": 0.5, "tries": 3}}, MEASURE], "output": str(tmp_path / "out")}
    with pytest.raises(CompressionError, match="tries is a word of pruning while training"):
        run_recipe(recipe)


@pytest.mark.parametrize("training", [{}, {"max_steps": 8, "end": 0.8, "teacher": "previous", "restart_rate": True}])
def test_to_a_target(training, world, tmp_path):
    """With training and without: what is left is counted."""
    step = {"prune": {"parameters": 1.2, "tries": 3, **training}}
    recipe = {**world, "steps": [TUNE, step, MEASURE], "output": str(tmp_path / "out")}
    report = run_recipe(recipe)
    assert report.against is not None
    assert report.against.parameters / report.model.parameters >= 1.2
    saved = json.loads((tmp_path / "out" / "pruned.json").read_text())
    blocks = report.about["blocks"]["model"]
    assert saved["target"] == "parameters" and {n: left for n, (left, _) in saved["sizes"].items()} == {
        **blocks["heads"], **blocks["neurons"]
    }  # fmt: skip
    shown = ["kept.png", "error.png", "stages.png"] if can_draw() else []
    assert report.about.get("pictures", []) == shown and all((tmp_path / "out" / name).is_file() for name in shown)
