"""A plan is data: identity through JSON and disk, and a refusal for everything that is not one."""

import errno
import json

import pytest
import torch

import hf_compress as hc
from hf_compress import files
from hf_compress.plan import PLAN_FILE, TENSORS_FILE

PLAN = hc.Plan(
    [hc.KeepHeads("a.self", [5, 0, 2]), hc.KeepNeurons("a", range(3)), hc.KeepLayers((0, 2)), hc.KeepLayers([1], "decoder")]
)
TOKENS = hc.Plan([hc.KeepVocabulary([7, 0, 1]), hc.KeepVocabulary(range(3), "decoder")])
WITH_TENSORS = hc.Plan(PLAN.edits, {"w": torch.arange(6.0).view(2, 3), "s": torch.tensor([1, 2], dtype=torch.int8)})


@pytest.mark.parametrize("plan", [hc.Plan(), PLAN, TOKENS, WITH_TENSORS], ids=["empty", "edits", "tokens", "tensors"])
def test_disk_and_json_are_the_identity(plan, tmp_path):
    plan.save(tmp_path)
    assert hc.Plan.load(tmp_path) == plan
    for spans in (False, True):
        assert hc.Plan.from_dict(json.loads(json.dumps(plan.to_dict(spans))), plan.tensors) == plan


def test_order_inside_an_edit_has_no_meaning_and_order_of_edits_has():
    assert hc.KeepHeads("x", [2, 0]) == hc.KeepHeads("x", (0, 2))
    assert hc.KeepHeads("x", torch.tensor([2, 0])) == hc.KeepHeads("x", (0, 2))
    assert hc.Plan(PLAN.edits[::-1]) != PLAN
    assert PLAN + hc.Plan() == PLAN and (PLAN + PLAN).edits == PLAN.edits * 2


def test_a_plan_is_frozen_and_hashable():
    with pytest.raises(AttributeError):
        PLAN.edits = ()
    with pytest.raises(AttributeError):
        PLAN.edits[0].heads = (1,)
    assert len({PLAN, hc.Plan(PLAN.edits)}) == 1


def test_print_names_every_edit_with_what_stays():
    lines = str(WITH_TENSORS).splitlines()
    assert lines[0] == "Plan with 4 edits and 2 tensors (0.0 MB)"
    assert lines[1].split() == ["KeepHeads", "a.self", "keep", "3:", "0", "2", "5"]
    assert lines[4].split() == ["KeepLayers", "decoder", "keep", "1:", "1"]
    assert [line.split() for line in str(TOKENS).splitlines()[1:]] == [
        ["KeepVocabulary", "the", "embedding", "keep", "3:", "0-1", "7"],
        ["KeepVocabulary", "decoder", "keep", "3:", "0-2"],
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hc.KeepHeads("x", []), "is empty"),
        (lambda: hc.KeepHeads("x", [1, 1]), r"names \[1\] more than once"),
        (lambda: hc.KeepHeads("x", [-1]), "count from 0"),
        (lambda: hc.KeepHeads("x", [0.5]), "whole numbers, got 0.5"),
        (lambda: hc.KeepHeads("x", [True]), "whole numbers, got True"),
        (lambda: hc.KeepHeads("x", "01"), "sequence of indices"),
        (lambda: hc.KeepHeads("x", 3), "sequence of indices"),
        (lambda: hc.KeepHeads(None, [0]), "module name"),
        (lambda: hc.KeepNeurons("", [0]), "module name"),
        (lambda: hc.KeepLayers([]), "is empty"),
        (lambda: hc.KeepLayers([0], stack=1), "module name"),
        (lambda: hc.KeepVocabulary([]), "is empty"),
        (lambda: hc.KeepVocabulary([0], 5), "module name"),
        (lambda: hc.Plan(["x"]), "A plan is made of edits"),
        (lambda: hc.Plan((), {"w": 3}), "names to tensors"),
        (lambda: WITH_TENSORS + WITH_TENSORS, "Both plans carry a tensor named 's'"),
        (lambda: hc.Plan.from_dict([]), "Not a plan"),
        (lambda: hc.Plan.from_dict({"format": 99, "edits": []}), "format 99"),
        (lambda: hc.Plan.from_dict({"format": 1, "edits": [], "more": 1}), "got also"),
        (lambda: hc.Plan.from_dict({"format": 1, "edits": [{"edit": "Explode"}]}), "Known edits: KeepHeads"),
        (lambda: hc.Plan.from_dict({"format": 1, "edits": [{"edit": "KeepHeads", "heads": [1]}]}), "takes"),
        (lambda: hc.Plan.from_dict(WITH_TENSORS.to_dict()), "missing"),
        (lambda: hc.Plan.from_dict(WITH_TENSORS.to_dict(), {"w": torch.zeros(2, 3)}), "digest differs"),
        (lambda: hc.Plan.from_dict(PLAN.to_dict(), {"w": torch.zeros(1)}), "without tensors"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(hc.CompressionError, match=message):
        make()


def test_a_truncated_or_changed_plan_is_refused(tmp_path):
    with pytest.raises(hc.CompressionError, match="No plan to read"):
        hc.Plan.load(tmp_path)
    WITH_TENSORS.save(tmp_path)
    whole = (tmp_path / TENSORS_FILE).read_bytes()
    (tmp_path / TENSORS_FILE).write_bytes(whole[:-3])
    with pytest.raises(hc.CompressionError, match="cannot be read"):
        hc.Plan.load(tmp_path)
    (tmp_path / TENSORS_FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(hc.CompressionError, match="digest differs"):
        hc.Plan.load(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    with pytest.raises(hc.CompressionError, match="cannot be read"):
        hc.Plan.load(tmp_path)
    text = (tmp_path / PLAN_FILE).read_text()
    (tmp_path / PLAN_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(hc.CompressionError, match="not a whole plan"):
        hc.Plan.load(tmp_path)


def test_a_full_disk_leaves_the_plan_that_was_there(tmp_path, monkeypatch):
    PLAN.save(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(hc.CompressionError, match="No space left"):
        WITH_TENSORS.save(tmp_path)
    assert hc.Plan.load(tmp_path) == PLAN
    assert sorted(p.name for p in tmp_path.iterdir()) == [PLAN_FILE]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(hc.CompressionError, match="Could not write into"):
        PLAN.save(tmp_path / "file" / "inside")
