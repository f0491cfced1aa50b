"""scripts/lottery_ticket.py on pictures made here: rows, table and curves by value, resuming, and errors of one line."""

import json
import os
import re
import runpy
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "scripts" / "lottery_ticket.py")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for name, brightness in (("dark", 60), ("light", 190)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw.normal(brightness, 40, (20, 20, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    (folder.parent / "empty").mkdir(exist_ok=True)
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lottery_ticket.py", *map(str, arguments)])
    return runpy.run_path(SCRIPT, run_name="__main__")


@pytest.mark.parametrize("model", ["cnn", "vit"])
def test_every_arm_of_every_seed_is_written_tabled_and_drawn(model, pictures, tmp_path, monkeypatch, capsys):
    arguments = [
        "--model",
        model,
        "--dataset",
        pictures,
        "--image_size",
        16,
        "--output",
        tmp_path,
        "--epochs",
        1,
        "--batch_size",
        8,
    ]
    run(monkeypatch, *arguments, "--seeds", 0, "--sparsities", 0.9, 0.5)
    first = json.loads((tmp_path / f"lottery_ticket_{model}.json").read_text())
    capsys.readouterr()
    run(monkeypatch, *arguments, "--seeds", 0, 1, "--sparsities", 0.5, 0.9)  # seed 0 is done
    printed = capsys.readouterr().out
    assert f"{model} seed 0" not in printed and printed.count(f"{model} seed 1") == 7
    data = json.loads((tmp_path / f"lottery_ticket_{model}.json").read_text())
    assert data["rows"][:7] == first["rows"] and data["about"]["train_rows"] == 32 and data["about"]["test_rows"] == 16
    arms = [("dense", 0.0)] + [(arm, level) for level in (0.5, 0.9) for arm in ("ticket", "reinit", "random_mask")]
    assert [(r["seed"], r["arm"], r["sparsity"]) for r in data["rows"]] == [(seed, *arm) for seed in (0, 1) for arm in arms]
    assert all(r["steps"] == 4 and abs(r["weights_removed"] - r["sparsity"]) < 1e-3 for r in data["rows"])
    assert len({r["accuracy"] for r in data["rows"]} & {i / 16 for i in range(17)}) >= 1
    found = [r["accuracy"] for r in data["rows"] if r["arm"] == "ticket" and r["sparsity"] == 0.9]
    cell = f"{statistics.mean(found):.2%} ({min(found):.2%} - {max(found):.2%})"
    assert f"| 90.0% | {cell} |" in printed
    picture = np.asarray(Image.open(tmp_path / f"lottery_ticket_{model}.png").convert("RGB")).reshape(-1, 3)
    assert (picture == (0x2A, 0x6F, 0x97)).all(1).sum() > 50  # the ticket's curve is on it
    assert not os.listdir(pictures.parent / "empty")


WRONG = [
    (["--model", "bert"], "invalid choice: 'bert'"),
    (["--sparsities", "half"], "invalid float value: 'half'"),
    (["--sparsities", 0.5, 1.0], "--sparsities are fractions between 0 and 1"),
    (["--seeds", 1, 1], "--seeds are different whole numbers"),
    (["--seeds", -1], "--seeds"),
    (["--epochs", 0], "--epochs must be above 0, got 0"),
    (["--controls", "dense"], "invalid choice: 'dense'"),
    (["--mnist", "nowhere"], "No MNIST at nowhere. Skipped; give --dataset"),
    (["--mnist", "."], "has no IDX files of 10,000 images"),
    (["--image_size", 32], "--image_size goes with --dataset"),
    (["--dataset", "nowhere/nothing"], "Cannot load the data set 'nowhere/nothing'"),
    (["--dataset", "{pictures}", "--image_size", 18], "--image_size is a multiple of 4"),
    (["--dataset", "{pictures}", "--rewind_to", -1], "rewind_to is a step from 0"),
    (["--dataset", "{pictures}", "--rewind_to", 9999], "lies behind the"),
    (["--output", SCRIPT], "is a file; name a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_argument_is_one_line(arguments, message, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--output", tmp_path / "out", *(str(a).format(pictures=pictures) for a in arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1], lines[-3:]
    assert not any(re.search(r"Traceback|usage:", line) for line in lines)


def test_runs_of_other_conditions_are_not_mixed(pictures, tmp_path, monkeypatch, capsys):
    base = ["--dataset", pictures, "--image_size", 16, "--output", tmp_path, "--seeds", 0, "--sparsities", 0.5, "--controls"]
    run(monkeypatch, *base, "--epochs", 1)
    for more, message in ((["--epochs", 2], "holds runs with epochs 1.0, and now it is 2.0"), ([], "epochs")):
        with pytest.raises(SystemExit) as left:
            run(monkeypatch, *base, *more)
        assert left.value.code == 2 and message in capsys.readouterr().err
