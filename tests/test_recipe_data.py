"""Data of recipes as people have it: which rows, columns, labels and splits come out."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from hf_compress.recipe import RecipeError
from hf_compress.recipe.data import DataOptions, open_data
from hf_compress.recipe.labels import find_labels
from hf_compress.recipe.reading import Source
from hf_compress.recipe.sounds import read_sound
from hf_compress.recipe.tasks import TASKS

SOURCE = Source("r.yaml", "")
COLUMNS = TASKS["text-classification"].columns


def opened(task: str = "text-classification", tunes: bool = False, **options):
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return open_data(DataOptions(**options), TASKS[task].columns, SOURCE, 0, tunes=tunes)


def lines(folder: Path, name: str, rows: list[str]) -> Path:
    (folder / name).write_text("\n".join(rows) + "\n")
    return folder / name


def test_tsv_keeps_quotes_and_takes_names_of_columns(tmp_path):
    rows = [f'a "lone quote {i}\t{i % 2}' for i in range(20)]
    data = opened(path=lines(tmp_path, "rows.tsv", rows), columns=["text", "label"])
    texts = {*data.splits["train"]["text"], *data.splits["measured"]["text"]}
    assert texts == {f'a "lone quote {i}' for i in range(20)}
    assert data.measured == "train, 10% held out" and len(data.splits["measured"]) == 2


def test_folders_of_split_files(tmp_path):
    for name, count in (("train", 12), ("dev", 5), ("test", 3)):
        lines(tmp_path, f"{name}.csv", ["sentence,label", *(f"{name} {i},{i % 2}" for i in range(count))])
    data = opened(path=tmp_path, tunes=True)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 12, "validation": 5, "measured": 3}
    assert data.measured == "test" and data.columns == {"text": "sentence", "label": "label"}
    few = opened(path=tmp_path, tunes=True, max_train_samples=4, max_eval_samples=2)
    assert {name: len(rows) for name, rows in few.splits.items()} == {"train": 4, "validation": 2, "measured": 2}
    assert list(few.splits["train"]) == list(opened(path=tmp_path, max_train_samples=4).splits["train"])


@pytest.mark.parametrize("hidden", ["-1", None])
def test_splits_without_labels_are_not_measured(hidden, tmp_path):
    for name in ("train", "validation"):
        lines(tmp_path, f"{name}.csv", ["text,label", *(f"{i},{i % 2}" for i in range(12))])
    lines(tmp_path, "test.csv", ["text,label", "a,-1"] if hidden else ["text", "a"])
    data = opened(path=tmp_path)
    assert data.measured == "validation"
    assert data.notes == [
        "The test split has no labels and is not used.",
        "There is no test split: the validation split is measured.",
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "disk"])
def test_other_files(suffix, tmp_path):
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(12)], "label": [i % 3 for i in range(12)]})
    if suffix == "disk":
        DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "d")
        data = opened(path=tmp_path / "d")
    else:
        path = tmp_path / f"rows.{suffix}"
        rows.to_parquet(path) if suffix == "parquet" else rows.to_json(path)
        data = opened(train=path, test=path)
    assert data.measured == "test" and sorted(data.splits["measured"]["label"]) == sorted(i % 3 for i in range(12))


LABELS = {
    "words": (["no", "yes"] * 6, {}, ("classes", ("no", "yes")), "yes", 1),
    "whole numbers": ([0, 1, 2] * 4, {}, ("classes", ("0", "1", "2")), 2, 2),
    "named": ([0, 1] * 6, {"labels": ["bad", "good"]}, ("classes", ("bad", "good")), 1, 1),
    "names in another order": (["bad", "good"] * 6, {"labels": ["good", "bad"]}, ("classes", ("good", "bad")), "bad", 1),
    "truth": ([True, False] * 6, {}, ("classes", ("false", "true")), True, 1),
    "truth, named": ([True, False] * 6, {"labels": ["no", "yes"]}, ("classes", ("no", "yes")), True, 1),
    "numbers": ([0.5, 1.5, 9.0] * 4, {}, ("numbers", ()), 9.0, 9.0),
    "several": ([["a"], ["a", "b"], []] * 4, {}, ("labels", ("a", "b")), ["b"], [0.0, 1.0]),
}


@pytest.mark.parametrize("name", LABELS)
def test_what_labels_are(name, tmp_path):
    values, options, expected, value, encoded = LABELS[name]
    path = lines(tmp_path, "rows.jsonl", [json.dumps({"text": "t", "label": v}) for v in values])
    data = opened(train=path, test=path, **options)
    labels = find_labels(data, DataOptions(**options), "any", [], SOURCE)
    assert (labels.kind, labels.names) == expected and labels.encode(value) == encoded


def test_a_trained_heads_order_is_kept(tmp_path):
    path = lines(tmp_path, "rows.csv", ["text,label", *(f"{i},{'pos' if i % 2 else 'neg'}" for i in range(12))])
    data = opened(train=path, test=path)
    assert find_labels(data, DataOptions(), "any", ["pos", "neg"], SOURCE).names == ("pos", "neg")
    assert find_labels(data, DataOptions(), "any", ["LABEL_0", "LABEL_1"], SOURCE).names == ("neg", "pos")


def test_scores_of_pairs_are_scaled_to_one(tmp_path):
    path = lines(tmp_path, "p.csv", ["sentence1,sentence2,score", *(f"a,b,{i % 6}.0" for i in range(12))])
    data = opened("sentence-similarity", train=path, test=path)
    assert find_labels(data, DataOptions(), "numbers", [], SOURCE).encode(2.5) == 2.5  # a regression keeps its scale
    labels = find_labels(data, DataOptions(), "scores", [], SOURCE)
    assert labels.scale == 5.0 and labels.encode(2.5) == 0.5


WRONG = {
    "ragged": ("rows.csv", ["text,label", "a,1", "b,1,2,3"], {}, "cannot read"),
    "empty": ("rows.csv", ["text,label"], {}, "no rows"),
    "a hole": ("rows.csv", ["text,label", *["a,1"] * 12, ",0"], {}, "1 of 13 train rows have nothing in the column 'text'"),
    "not JSON": ("rows.json", ["{"], {}, "cannot read"),
    "not Parquet": ("rows.parquet", ["hello"], {}, "cannot read"),
    "fewer names than fields": (
        "rows.csv",
        ["a,1,x"] * 12,
        {"columns": ["text", "label"]},
        "2 names and 'rows.csv' has 3 fields",
    ),
    "more names than fields": (
        "rows.tsv",
        ["a\t1"] * 12,
        {"columns": ["text", "label", "more"]},
        "3 names and 'rows.tsv' has 2",
    ),
    "names that are there": ("rows.csv", ["text,label", "a,1"], {"columns": ["text", "label"]}, "in its first line already"),
    "a row with more fields": ("rows.csv", ["text,label", *["x,a,1"] * 12], {}, "has 2 names in its first line and 3 fields"),
    "two files to train on": ("rows.csv", ["text,label", "a,1"], {"train": "rows.csv"}, "leave one of the two out"),
    "too few": ("rows.csv", ["text,label", "a,1", "b,0"], {}, "too few to hold some out"),
    "columns of a JSON file": ("rows.json", ['{"text": "a"}'], {"columns": ["a"]}, "names its columns itself"),
    "which column?": ("rows.csv", ["x,label", *["a,1"] * 12], {}, "which column holds the text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_refused(name, tmp_path):
    file, rows, options, message = WRONG[name]
    with pytest.raises(RecipeError, match=message):
        opened(path=lines(tmp_path, file, rows), **options)


TUNING = {
    # name: (split files, whether a step tunes, what is measured, what is tuned on, rows to train, measure and tune on)
    "train": (["train"], True, "train, 10% held out", "train, another 10% held out", (32, 4, 4)),
    "train, nothing tuned": (["train"], False, "train, 10% held out", "", (36, 4, 0)),
    "train and validation": (["train", "dev"], True, "validation", "train, 10% held out", (36, 12, 4)),
    "train and validation, nothing tuned": (["train", "dev"], False, "validation", "", (40, 12, 0)),
    "train and test": (["train", "test"], True, "test", "train, 10% held out", (36, 12, 4)),
    "train and test, nothing tuned": (["train", "test"], False, "test", "", (40, 12, 0)),
    "all": (["train", "dev", "test"], True, "test", "validation", (40, 12, 12)),
}


@pytest.mark.parametrize("name", TUNING)
def test_the_rows_that_tune_are_not_those_that_are_measured(name, tmp_path):
    files, tunes, measured, tuned, sizes = TUNING[name]
    for file in files:
        lines(tmp_path, f"{file}.csv", ["text,label", *(f"{file} {i},{i % 2}" for i in range(40 if file == "train" else 12))])
    data = open_data(DataOptions(path=str(tmp_path)), COLUMNS, SOURCE, 0, tunes=tunes)
    assert (data.measured, data.tuned) == (measured, tuned)
    texts = [
        set(data.splits[split]["text"]) if split in data.splits else set() for split in ("train", "measured", "validation")
    ]
    assert tuple(map(len, texts)) == sizes
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    held = [note for note in data.notes if "held out of the training rows" in note]
    assert len(held) == measured.startswith("train") + tuned.startswith("train")
    assert not [note for note in held if not re.search(r"\b4 (more )?rows \(10%\)", note)]


def test_one_file_for_validation_and_test_is_not_tuned_on(tmp_path):
    for name, count in (("train", 40), ("test", 12)):
        lines(tmp_path, f"{name}.csv", ["text,label", *(f"{name} {i},{i % 2}" for i in range(count))])
    test = str(tmp_path / "test.csv")
    options = DataOptions(train=str(tmp_path / "train.csv"), validation=test, test=test)
    data = open_data(options, COLUMNS, SOURCE, 0, tunes=True)
    assert (data.measured, data.tuned) == ("test", "train, 10% held out")
    assert not set(data.splits["validation"]["text"]) & set(data.splits["measured"]["text"])


def test_what_rows_are_held_out_is_part_of_the_digest(tmp_path):
    path = str(lines(tmp_path, "rows.csv", ["text,label", *(f"{i},{i % 2}" for i in range(40))]))
    digests = {open_data(DataOptions(path=path), COLUMNS, SOURCE, 0, tunes=tunes).digest for tunes in (False, True)}
    assert len(digests) == 2


def pictures(folder: Path, count: int = 20) -> Path:
    for i in range(count):
        Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    return lines(folder, "rows.csv", ["image,label", *(f"{i}.png,{i % 2}" for i in range(count))])


def test_files_that_rows_name_are_data(tmp_path):
    path = pictures(tmp_path)
    first = opened("image-classification", path=path).digest
    assert opened("image-classification", path=path).digest == first
    Image.fromarray(np.full((4, 4, 3), 77, np.uint8)).save(tmp_path / "19.png")  # of the same size
    changed = opened("image-classification", path=path).digest
    assert changed != first
    (tmp_path / "3.png").unlink()
    with pytest.raises(RecipeError, match=r"1 of 20 files that the train rows name in 'image' are not there, '.*/3\.png'"):
        opened("image-classification", path=path)


@pytest.mark.parametrize("splits", [True, False])
def test_folders_of_sounds_need_no_decoder(splits, tmp_path):
    for split, count in (("train", 12), ("test", 4)) if splits else (("", 20),):
        for i in range(count):
            place = tmp_path / split / ("high" if i % 4 == 0 else "low")
            place.mkdir(parents=True, exist_ok=True)
            with wave.open(str(place / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(np.full(80, 300 * i, "<i2").tobytes())
    data = opened("audio-classification", path=tmp_path)
    assert data.measured == ("test" if splits else "train, 10% held out")
    assert {name: len(rows) for name, rows in data.splits.items()} == (
        {"train": 12, "measured": 4} if splits else {"train": 18, "measured": 2}
    )
    names = data.splits["train"].features["label"].names
    assert names == ["high", "low"]
    for row in [*data.splits["train"], *data.splits["measured"]]:
        number = int(Path(row["audio"]).stem)
        assert names[row["label"]] == ("high" if number % 4 == 0 else "low")
        sound = read_sound(row["audio"], data.folders["train"], 8000)
        assert np.allclose(sound, 300 * number / 2**15) and len(sound) == 80


def test_sounds_that_cannot_be_read_here_name_the_package(tmp_path, monkeypatch):
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "a.mp3").write_bytes(b"ID3")
    monkeypatch.setattr("hf_compress.recipe.rows.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="'low.a.mp3' is no WAV file; reading it needs the package soundfile"):
        opened("audio-classification", path=tmp_path)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_of_every_width(width, channels, tmp_path):
    wanted = np.sin(np.linspace(0, 20, 400)) * 0.5
    whole = np.round(wanted * 2 ** (8 * width - 1)).astype(np.int64)
    raw = b"".join(int(v + 128 if width == 1 else v).to_bytes(width, "little", signed=width > 1) * channels for v in whole)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(raw)
    found = read_sound("a.wav", str(tmp_path), 8000)
    assert found.shape == (400,) and np.abs(found - wanted).max() <= 1 / 2 ** (8 * width - 1) + 1e-6
    half = read_sound({"bytes": (tmp_path / "a.wav").read_bytes(), "path": "x"}, "", 4000, seconds=0.025)
    assert half.shape == (100,) and np.abs(half[10:-10] - wanted[:200:2][10:-10]).max() < 0.02
