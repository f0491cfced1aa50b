"""A run that is killed, changed, or run again: what is there is used if it is what the recipe makes, and never else."""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_compress.edits import CompressionError
from hf_compress.plan import Plan
from hf_compress.recipe import run_recipe
from hf_compress.recipe.steps import STEPS as STEPS_KNOWN
from hf_compress.recipe.training import WHOLE, last_checkpoint
from tests.recipe_models import text_classification

TRAIN = {"max_steps": 6, "learning_rate": 2e-3, "batch_size": 16, "save_steps": 2}
STEPS = [
    {"finetune": TRAIN},
    {"prune": {**TRAIN, "heads": 0.5, "neurons": 0.5, "teacher": "previous", "every": 1}},
    {"low_rank": {"ratio": 0.6, "modules": "intermediate"}},
    {"exits": {**TRAIN, "after": [0], "max_drop": 0.2}},
    {"quantize": {**TRAIN, "bits": 4, "every": 2}},
    {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0, "length": 8}},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return {**text_classification(tmp_path_factory.mktemp("world")), "metric": "accuracy", "steps": STEPS}


class Child:
    """The run in a process of its own: forked, which saves the seconds of importing, with one thread as its parent."""

    def __init__(self, recipe: dict, output: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                run_recipe({**recipe, "output": str(output)})
                code = 0
            finally:
                os._exit(code)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None while it runs."""
        end = None if seconds is None else time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() >= end:
                return None
            else:
                time.sleep(0.005)
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def result(output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return Plan.load(output).to_dict(), load_file(output / "model.safetensors")


def same(a: tuple, b: tuple) -> None:
    assert a[0] == b[0] and len(a[0]["edits"]) > 5
    assert a[1].keys() == b[1].keys()
    differ = [name for name in a[1] if not torch.equal(a[1][name], b[1][name])]
    assert not differ


def progress(output: Path) -> set[str]:
    """The steps and the checkpoints of trainings that are there."""
    steps = output / "steps"
    return {
        p for pattern in ("0*", ".0*/training/checkpoint-*") for p in glob.glob(f"{steps}/{pattern}")
    }  # sees no folder vanish


def kill_at(child: Child, output: Path, wanted: int) -> None:
    """SIGKILL once `wanted` steps or checkpoints were begun that were not there."""
    seen, last = 0, progress(output)
    while child.wait(0) is None and seen < wanted:
        now = progress(output)
        seen += len(now - last)
        last = now
        time.sleep(0.001)
    child.kill()


def test_killed_again_and_again_it_ends_the_same(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    codes = []
    for wanted in (3, 6):  # within the first training, and later
        child = Child(world, killed)
        kill_at(child, killed, wanted)
        codes.append(child.code)
        assert not (killed / "report.json").exists()
    assert codes == [-signal.SIGKILL] * 2
    assert Child(world, killed).wait() == 0
    assert Child(world, whole).wait() == 0
    same(result(killed), result(whole))
    assert not [p for p in (killed / "steps").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_killed_at_twenty_random_moments(world, tmp_path):
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    begun = time.monotonic()
    assert Child(world, whole).wait() == 0
    seconds = time.monotonic() - begun
    kills = 0
    while kills < 20:
        child = Child(world, killed)
        if child.wait(draw.uniform(0.1, 0.7) * seconds) is None:
            child.kill()
            kills += 1
        else:
            assert child.code == 0
            same(result(killed), result(whole))
            shutil.rmtree(killed)
    assert Child(world, killed).wait() == 0
    same(result(killed), result(whole))


SHORT = [
    {"finetune": {"epochs": 1, "batch_size": 16}},
    {"prune": {"heads": 0.5, "score": "magnitude"}},
    {"quantize": {"bits": 8}},
    STEPS[-1],
]


def times(output: Path) -> dict[str, int]:
    return {p.name: (p / "model.safetensors").stat().st_mtime_ns for p in (output / "steps").glob("[0-9]*")}


def test_what_changed_runs_again_and_nothing_else(world, tmp_path, caplog):
    recipe = {**world, "steps": SHORT, "output": str(tmp_path / "out")}
    out = tmp_path / "out"
    first = run_recipe(recipe)
    before, files = times(out), (out / "model.safetensors").stat().st_mtime_ns
    assert run_recipe(recipe) == first and times(out) == before  # not even measured again
    assert (out / "model.safetensors").stat().st_mtime_ns == files

    changed = {**recipe, "steps": [SHORT[0], {"prune": {"heads": 0.25, "score": "magnitude"}}, *SHORT[2:]]}
    report = run_recipe(changed)
    after = times(out)
    assert {name for name in after if after[name] == before.get(name)} == {"00-model", "01-finetune"}
    assert "02-prune, 03-quantize ran: those steps run again" in caplog.text
    heads = report.about["blocks"]["model"]["heads"].values()
    assert sum(heads) == 6  # of 2 x 4, a quarter gone
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == changed

    caplog.clear()
    run_recipe({**changed, "metric": ["f1", "accuracy"]})  # measured again, not made again
    assert times(out) == after and "again" not in caplog.text
    shorter = run_recipe({**changed, "steps": [SHORT[0], SHORT[-1]]})
    assert sorted(times(out)) == ["00-model", "01-finetune"] and len(Plan.load(out)) == 0
    assert shorter.model.parameters == shorter.against.parameters

    data = Path(world["data"]["path"])
    (data / "train.tsv").write_text((data / "train.tsv").read_text() + "w31 w2\thigh\n")
    caplog.clear()
    run_recipe({**changed, "steps": [SHORT[0], SHORT[-1]]})
    assert "01-finetune ran" in caplog.text


def test_a_step_that_fails_leaves_those_before_it(world, tmp_path, monkeypatch):
    recipe = {**world, "steps": SHORT, "output": str(tmp_path / "out")}

    def broken(*_, **__):
        raise CompressionError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setitem(STEPS_KNOWN, "prune", replace(STEPS_KNOWN["prune"], run=broken))
        with pytest.raises(CompressionError, match="02-prune failed: The disk is full. What was finished before it is in"):
            run_recipe(recipe)
    assert sorted(times(tmp_path / "out")) == ["00-model", "01-finetune"]
    assert (tmp_path / "out" / "steps" / ".02-prune").is_dir()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    before = times(tmp_path / "out")["01-finetune"]
    run_recipe(recipe)
    assert times(tmp_path / "out")["01-finetune"] == before


def test_only_whole_checkpoints_before_the_end_are_resumed_from(tmp_path):
    def checkpoint(step: int, mark: str | None) -> None:
        (tmp_path / f"checkpoint-{step}").mkdir()
        if mark is not None:
            (tmp_path / f"checkpoint-{step}" / WHOLE).write_text(mark)

    assert last_checkpoint(tmp_path / "none") is None
    checkpoint(3, json.dumps({"step": 3, "of": 12}))
    checkpoint(6, json.dumps({"step": 6, "of": 12}))
    checkpoint(9, '{"step": 9,')  # the kill came within the mark
    checkpoint(10, None)  # or before it
    checkpoint(12, json.dumps({"step": 12, "of": 12}))  # from the end, Trainer would train a step more
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-3", "checkpoint-6"]


def test_two_runs_in_one_folder_are_refused_and_a_lost_file_is_made_again(world, tmp_path):
    import fcntl

    out = tmp_path / "out"
    recipe = {**world, "output": str(out)}
    report = run_recipe(recipe)
    with open(out / "steps" / "run.lock", "w") as file:  # as a run at work holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        (out / "model.safetensors").unlink()
        with pytest.raises(CompressionError, match="Another run is at work"):
            run_recipe(recipe)
    assert run_recipe(recipe).model.metrics == report.model.metrics
    assert (out / "model.safetensors").is_file()
