"""Reports: what is saved is what is loaded, and what is no report is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import hf_compress as hc
from hf_compress.about import check_about
from hf_compress.report import Cost, Latency, Report, Timing

FAST, SLOW = Latency(0.002, 0.0015, 0.0031, 20), Latency(0.004, 0.0039, 0.0052, 20)
FULL = Report(
    Cost(500, 200, 1000, 4000, FAST, {"accuracy": 0.91}),
    Cost(1000, 800, 4000, 16000, SLOW, {"accuracy": 0.92}),
    2.0,
    (1.9, 2.1),
    3.5,
    {"hardware": "a CPU", "threads": 2, "dtype": "float32", "shapes": {"input_ids": (2, 8)}},
    (Timing(1, 8, FAST, SLOW, 2.0, (1.9, 2.1)), Timing(32, None, SLOW)),
    {"base_model": "me/base", "seed": 0, "dataset": {"name": "d", "rows": 7}, "tier": "plugin", "base_revision": None},
)
ALONE = Report(Cost(1, 1, 4, 0, FAST), None, None, None, None, {})


@pytest.mark.parametrize("report", [FULL, ALONE], ids=["full", "alone"])
def test_what_is_saved_is_what_is_loaded(report, tmp_path):
    assert Report.from_dict(report.to_dict()) == report
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    report.save(tmp_path / "folder")
    report.save(tmp_path / "one.json")
    assert Report.load(tmp_path / "folder") == Report.load(str(tmp_path / "one.json")) == report
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["report.json"]


def test_what_json_says():
    data = json.loads(json.dumps(FULL.to_dict()))
    assert data["ratios"] == {"parameters": 0.5, "parameters_encoder": 0.25, "bytes": 0.25, "macs": 0.25}
    assert data["timings"][0] == {
        "batch": 1,
        "length": 8,
        "model": {"median": 0.002, "low": 0.0015, "high": 0.0031, "repeats": 20},
        "against": {"median": 0.004, "low": 0.0039, "high": 0.0052, "repeats": 20},
        "speedup": 2.0,
        "speedup_interval": [1.9, 2.1],
    }
    assert data["about"] == {"base_model": "me/base", "seed": 0, "dataset": {"name": "d", "rows": 7}, "tier": "plugin"}
    assert ALONE.ratios == {}


def test_a_report_of_an_earlier_version_loads():
    """As 0.1.0 wrote them: no format, timings, about or ratios."""
    new = ("format", "timings", "about", "ratios")
    old = {key: value for key, value in FULL.to_dict().items() if key not in new}
    assert Report.from_dict(old) == replace(FULL, timings=(), about={})


def test_the_table():
    lines = str(FULL).splitlines()
    assert lines[0].split() == ["model", "against", "ratio"]
    assert lines[1].split() == ["parameters", "500", "1,000", "0.500"]
    assert lines[6].split() == ["accuracy", "0.9100", "0.9200", "0.989"]
    assert lines[7] == "speed-up 2.00x (95% interval 1.90-2.10); Amdahl's law allows 3.50x"
    assert lines[8].split("  ")[0] == "latency at batch" and lines[8].split()[-1] == "speed-up"
    assert lines[9].split() == "1 x 8 2.00 ms [1.50-3.10] 4.00 ms [3.90-5.20] 2.00x (1.90-2.10)".split()
    assert lines[10].split() == "32 4.00 ms [3.90-5.20]".split()
    assert lines[11] == "hardware a CPU; threads 2; dtype float32; input_ids 2x8"
    assert "against" not in str(ALONE) and "None" not in str(ALONE) + str(FULL)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    ALONE.save(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(hc.CompressionError, match="No space left on device. What was there before is untouched"):
        FULL.save(tmp_path)
    assert Report.load(tmp_path) == ALONE and len(list(tmp_path.iterdir())) == 1


WHOLE = FULL.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No report to read at .*report.json: No such file"),
        ("", "is not a whole report"),
        (json.dumps(WHOLE)[:-20], "is not a whole report"),
        ("[]", r"Not a report: expected what Report.to_dict\(\) gives, got '\[\]'"),
        ('{"edits": [], "format": 1}', "Not a report"),
        (json.dumps({**WHOLE, "format": 9}), "format 9; this hf_compress reads format 1. Upgrade"),
        (json.dumps({**WHOLE, "modle": 1}), "report takes model, against, .*; got .*modle"),
        (json.dumps({**WHOLE, "model": 3}), "report.model must be a dict, got '3'"),
        (json.dumps({**WHOLE, "model": {**WHOLE["model"], "macs": "many"}}), "report.model.macs must be a number, got 'many'"),
        (json.dumps({**WHOLE, "model": {**WHOLE["model"], "bytes": True}}), "report.model.bytes must be a number, got 'True'"),
        (json.dumps({**WHOLE, "timings": [{"batch": 1}]}), r"report.timings\[0\] takes batch, length, model"),
        (json.dumps({**WHOLE, "timings": 1}), "report.timings must be a list"),
        (json.dumps({**WHOLE, "speedup_interval": [1]}), "report.speedup_interval must be a list of 2"),
        (json.dumps({**WHOLE, "conditions": []}), "report.conditions must be a dict"),
        (json.dumps({**WHOLE, "about": {"tier": "gold"}}), r"about\['tier'\] must be one of 'stock', 'plugin', got 'gold'"),
    ],
)
def test_what_is_no_report_is_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(hc.CompressionError, match=message) as caught:
        Report.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", [None, 3, ""])
def test_what_is_no_path_is_refused(path):
    for verb in (FULL.save, Report.load):
        with pytest.raises(hc.CompressionError, match=re.escape(f"takes the path of a folder or a .json file, got {path!r}")):
            verb(path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ([], "about must be a dict with any of name, repo_id, base_model"),
        ({1: 2}, "about must be a dict"),
        ({"datset": {}}, "no 'datset'; did you mean 'dataset'"),
        ({"seed": "one"}, r"about\['seed'\] must be of type int, got 'one'"),
        ({"seed": True}, "must be of type int"),
        ({"recipe": 3}, "must be of type str or dict, got 3"),
        ({"dataset": object()}, "about must hold what JSON can"),
        ({"stages": [{"metric": 1}]}, "holds dicts with a 'name'"),
    ],
)
def test_what_cannot_be_said_about_a_model(about, message):
    with pytest.raises(hc.CompressionError, match=message):
        replace(FULL, about=about)


def test_what_is_said_becomes_plain(tmp_path):
    about = {"seed": np.int64(3), "stages": ({"name": "dense", "metric": np.float32(0.5)},), "mine": tmp_path, "task": None}
    assert check_about(about) == {"seed": 3, "stages": [{"name": "dense", "metric": 0.5}], "mine": str(tmp_path)}
