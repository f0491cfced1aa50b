"""How commands end that are cut short: nobody reads their output any more, or Ctrl-C. And what `demo` writes where."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import transformers as T
import yaml

from hf_compress.cli import demo, main
from hf_compress.cli.output import Quiet
from hf_compress.recipe import RecipeError
from hf_compress.yaml12 import Loader
from tests.recipe_models import TEXT


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    T.BertForSequenceClassification(T.BertConfig(**TEXT)).save_pretrained("small")
    return tmp_path


@pytest.fixture
def closed(monkeypatch):
    """`closed("stdout")`: a pipe in its place whose reader has gone."""
    streams = []

    def close(name: str):
        read, write = os.pipe()
        os.close(read)
        streams.append(open(write, "w"))  # noqa: SIM115
        monkeypatch.setattr(sys, name, streams[-1])

    yield close
    monkeypatch.undo()
    for stream in streams:
        stream.close()  # what Python does at exit; a write that fails now would be printed there


LINES = {
    "inspect small --all": 0,
    "inspect small --json": 0,
    "measure small --batch-sizes 1 --length 4 --repeats 1 --warmup 0": 0,
    "recipe init small": 0,
    "recipe list": 0,
    "recipe show text-classification": 0,
    "--help": 0,
    "run --help": 0,
    "--version": 0,
    "inspect ./smll": 2,
    "run none.yaml": 2,
}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("line, code", LINES.items(), ids=LINES)
def test_a_closed_pipe_is_no_error(closed, capfd, stream, line, code):
    closed(stream)
    assert main(line.split()) == code
    assert "Traceback" not in capfd.readouterr().err


def test_work_goes_on_when_nobody_reads_the_log(closed):
    import logging

    closed("stderr")
    with Quiet(live=True):
        for i in range(3):
            logging.getLogger("hf_compress").warning("line %d", i)


INTERRUPTED = {
    "measure": (
        "measure small", "hf_compress.cli.measure.load", "hf-compress measure: interrupted. Nothing was written.",
    ),
    "inspect": ("inspect small", "hf_compress.cli.inspect.facts", "hf-compress inspect: interrupted. Nothing was written."),
    "check": (
        "recipe check r.yaml", "hf_compress.recipe.read_recipe", "hf-compress recipe check: interrupted. Nothing was written.",
    ),
    "run": (
        "run r.yaml", "hf_compress.recipe.run_recipe",
        "hf-compress run: interrupted. What was finished is kept; the same command goes on from there.",
    ),
    "demo": (
        "demo --output d", "hf_compress.cli.demo.write",
        "hf-compress demo: interrupted. What was finished is kept; the same command goes on from there.",
    ),
    "push": (
        "push small me/x", "hf_compress.hub.push_folder",
        "hf-compress push: interrupted. small is whole, and me/x is as it was; the same command goes on.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line, function, said", INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_says_where_things_stand(capsys, monkeypatch, line, function, said):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, stop)
    assert main(line.split()) == 130
    assert capsys.readouterr() == ("", f"{said}\n")


def test_every_mistake_of_a_recipe_is_a_line(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RecipeError("r.yaml:1: no model.\nr.yaml:7: no such\n  step.")

    monkeypatch.setattr("hf_compress.recipe.read_recipe", refuse)
    assert main(["recipe", "check", "r.yaml"]) == 2
    assert capsys.readouterr().err == "r.yaml:1: no model.\nr.yaml:7: no such\nstep.\n"


# --- demo ------------------------------------------------------------------------------------------------------------

NASTY = 'it\'s a "día": #1, {x} [y]'


def test_a_demo_goes_on_in_its_own_folder_alone(world, capsys, monkeypatch):
    """In a folder with a name that YAML would misread, and in one of another demo."""
    monkeypatch.setattr(demo, "run_checked", lambda recipe, output: (f"ran {recipe}", {}))
    for _ in range(2):
        assert main(["demo", "--output", NASTY]) == 0
        assert f"ran {NASTY}/recipe.yaml" in capsys.readouterr().out
    values = yaml.load((world / NASTY / "recipe.yaml").read_text(encoding="utf-8"), Loader)
    assert (values["model"], values["data"]["path"], values["output"]) == ("vit", "digits", f"{NASTY}/model")
    (world / NASTY / "vit" / "model.safetensors").unlink()  # as a kill would leave it
    assert main(["demo", "--output", NASTY]) == 0 and (world / NASTY / "vit" / "model.safetensors").is_file()
    (world / "mine").mkdir()
    (world / "mine" / "notes.txt").write_text("mine")
    assert main(["demo", "--output", "mine"]) == 2
    assert [path.name for path in (world / "mine").iterdir()] == ["notes.txt"]


def test_a_demo_does_not_take_a_vit_of_the_working_directory(world, monkeypatch):
    (world / "vit").mkdir()
    folder = world / "demo"
    recipe = yaml.load(demo.write(folder).read_text(), Loader)
    assert (recipe["model"], recipe["data"]["path"]) == (str(folder / "vit"), str(folder / "digits"))
