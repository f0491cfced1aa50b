"""Reports: what is saved is what is loaded, and what is no report is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import hf_compress as hc
from hf_compress.about import check_about
from hf_compress.pictures import draw_, kept_units, stage_points
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
    assert lines[0].split() == ["model", "against", "change"]
    assert lines[1].split() == ["parameters", "500", "1,000", "0.500x"]
    assert lines[6].split() == ["accuracy", "0.9100", "0.9200", "-0.0100"]  # not a ratio
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
        (
            json.dumps({**WHOLE, "model": {**WHOLE["model"], "macs": "many"}}),
            "report.model.macs must be a whole number, got 'many'",
        ),
        (
            json.dumps({**WHOLE, "model": {**WHOLE["model"], "bytes": True}}),
            "report.model.bytes must be a whole number, got 'True'",
        ),
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


# --- reports from strangers ------------------------------------------------------------------------------------------

RICH = replace(
    FULL,
    about={
        **FULL.about, "against": "base, fine-tuned", "architecture": "BertModel", "auto_model": "AutoModel", "metric": "accuracy",
        "library_name": "transformers", "task": "fill-mask", "repo_id": "me/small", "name": "small", "notes": ["One.", "Two."],
        "base_card": {"license": "mit", "language": ["no"]}, "pictures": ["kept.png"], "recipe": {"model": "m", "steps": []},
        "versions": {"torch": "2.13"}, "dataset": {"name": "a/b", "config": "c", "split": "test", "rows": 7, "metric_name": "Acc"},
        "stages": [{"name": "dense", "metric": 0.5, "latency": 0.1, "parameters": 5, "bytes": 20},
                   {"name": "pruned", "metric": 0.4, "latency": {"median": 0.002}}],
        "blocks": {"model": {"heads": {"a": 2}, "neurons": {"f": 8}}, "against": {"heads": {"a": 4}, "neurons": {"f": 16}}},
    },
)  # fmt: skip
NAN, INF = float("nan"), float("inf")


def put(path: tuple, value) -> dict:
    """The rich report's JSON with another value at a place."""
    data = json.loads(json.dumps(RICH.to_dict()))
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "metrics"), [0.5], "report.model.metrics must be a dict"),
        (("model", "metrics"), None, "report.model.metrics must be a dict"),
        (("model", "metrics", "accuracy"), "high", "report.model.metrics.accuracy must be a number"),
        (("model", "metrics", "accuracy"), True, "report.model.metrics.accuracy must be a number"),
        (("model", "metrics", "accuracy"), 10**400, "report.model.metrics.accuracy must be a number"),
        (("model", "metrics", "\ud800"), 0.5, "must hold what JSON can"),
        (("model", "latency"), "fast", "report.model.latency must be a dict"),
        (("model", "latency", "median"), NAN, "report.model.latency.median must be a number from 0"),
        (("model", "latency", "low"), -1.0, "report.model.latency.low must be a number from 0"),
        (("model", "latency", "high"), INF, "report.model.latency.high must be a number from 0"),
        (("model", "latency", "repeats"), 2.5, "report.model.latency.repeats must be a whole number"),
        (("model", "parameters"), 10**400, "report.model.parameters must be a number from 0"),
        (("model", "parameters"), -5, "report.model.parameters must be a number from 0"),
        (("against", "bytes"), NAN, "report.against.bytes must be a whole number"),
        (("against",), [], "report.against must be a dict"),
        (("speedup",), NAN, "report.speedup must be a number from 0"),
        (("speedup_interval",), ["a", "b"], r"report.speedup_interval\[0\] must be a number"),
        (("speedup_allowed",), {}, "report.speedup_allowed must be a number"),
        (("timings", 0), 3, r"report.timings\[0\] must be a dict"),
        (("timings", 0, "batch"), "one", r"report.timings\[0\].batch must be a whole number"),
        (("timings", 1, "length"), [8], r"report.timings\[1\].length must be a whole number"),
        (("conditions", "shapes"), [2, 8], r"conditions\['shapes'\] must be a dict"),
        (("conditions", "shapes", "input_ids"), 2, r"\['shapes'\]\['input_ids'\] must be a list of sizes"),
        (("conditions", "shapes", "input_ids"), [2, "x"], r"\['shapes'\]\['input_ids'\] must be a list of sizes"),
        (("conditions", "hardware"), {"cpu": 1}, r"conditions\['hardware'\] must be a text"),
        (("conditions", "threads"), "two", r"conditions\['threads'\] must be a whole number"),
        (("about",), [1], "report.about must be a dict"),
        (("about", "base_model"), 3, r"about\['base_model'\] must be of type str"),
        (("about", "seed"), 10**30, r"about\['seed'\] must be a whole number"),
        (("about", "dataset"), "sst2", r"about\['dataset'\] must be of type dict"),
        (("about", "dataset", "name"), ["a"], r"about\['dataset'\]\['name'\] must be a text"),
        (("about", "dataset", "rows"), "many", r"about\['dataset'\]\['rows'\] must be a whole number"),
        (("about", "versions", "torch"), [2, 13], r"about\['versions'\]\['torch'\] must be a text"),
        (("about", "stages"), {"dense": 1}, r"about\['stages'\] must be of type list"),
        (("about", "stages", 0), "dense", r"about\['stages'\] holds dicts with a 'name'"),
        (("about", "stages", 0, "metric"), "good", r"'dense': \['metric'\] must be a number"),
        (("about", "stages", 0, "latency"), NAN, r"'dense': \['latency'\] must be seconds"),
        (("about", "stages", 1, "latency"), {"mean": 1}, r"'pruned': \['latency'\] must be seconds"),
        (("about", "stages", 0, "bytes"), -1, r"'dense': \['bytes'\] must be a whole number"),
        (("about", "blocks"), [], r"about\['blocks'\] must be of type dict"),
        (("about", "blocks", "model"), [2], r"about\['blocks'\]\['model'\] must be a dict"),
        (("about", "blocks", "model", "heads"), [2], r"about\['blocks'\]\['model'\]\['heads'\] must be a dict"),
        (("about", "blocks", "model", "heads", "a"), "two", r"\['heads'\]\['a'\] must be a whole number"),
        (("about", "pictures"), [["kept.png"]], r"about\['pictures'\]\[0\] must be a text"),
        (("about", "notes"), [1], r"about\['notes'\]\[0\] must be a text"),
        (("about", "notes"), "One.", r"about\['notes'\] must be of type list"),
        (("about", "against"), {"name": "x"}, r"about\['against'\] must be of type str"),
        (("about", "auto_model"), 'x("y")\nimport os', r"about\['auto_model'\] must be the name of a class"),
        (("about", "library_name"), "keras", r"about\['library_name'\] must be one of 'transformers', 'sentence-transformers'"),
        (("about", "name"), "half a pair: \ud83d", "must hold what JSON can"),
        (("about", "mine"), json.loads("[" * 60 + "]" * 60), "40 deep and more"),
    ],
)  # fmt: skip
def test_a_malformed_report_is_refused_by_its_place(path, value, message, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(put(path, value)))
    with pytest.raises(hc.CompressionError, match=message) as caught:
        Report.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "report.json")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}", "\0"], ids=range(5))
def test_what_is_hardly_json_is_refused(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(hc.CompressionError, match="report"):
        Report.load(tmp_path)


def places(value, path=()):
    """Every place in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


ODD = [None, True, -1, 1.5, NAN, 1e300, 10**30, "x", "$\\frac{", "\0", [], {}, [[1]], [None], {"a": {"b": 1}}, {"name": 1}]


def test_whatever_a_report_holds_it_is_refused_or_shown():
    """No odd value anywhere in it ends in anything else."""
    plan, shown, refused = hc.Plan([hc.KeepHeads("a", [0, 1]), hc.Quantize("b")]), 0, 0
    for place in [*places(RICH.to_dict()), *(("model", "metrics", name) for name in ("", "a|b", "eval_")), ("about", "more")]:
        for value in ODD:
            try:
                report = Report.from_dict(put(place, value))
            except hc.CompressionError:
                refused += 1
                continue
            assert hc.render_card(plan, report).startswith("---\n") and str(report)
            kept_units(plan, report.about), stage_points(report.about)
            shown += 1
    assert refused > 900 and shown > 200


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("about", "stages", 0, "metric"), NAN),
        (("about", "stages", 0, "metric"), 1e300),
        (("about", "stages", 0, "latency"), 1e20),
        (("about", "stages", 0, "name"), "$\\frac{\0\n"),
        (("about", "metric"), "$\\alpha{"),
        (("about", "dataset", "metric_name"), "$\\alpha{"),
        (("about", "blocks", "model", "heads", "a"), 10**20),
        (("about", "blocks", "model", "heads"), {}),
        (("about", "blocks"), {"model": {"heads": {"a": 0}}}),
    ],
)
def test_odd_values_are_drawn(place, value, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_(tmp_path, hc.Plan([hc.KeepHeads("a", [0, 1])]), Report.from_dict(put(place, value)))
