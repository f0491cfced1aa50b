"""Folders that are pushed as they are: whose report it is, where the card says to load from, what a person wrote, what else lies there."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.hub import push_folder, push_to_hub
from hf_compress.publish import merge_card_, write_card_
from hf_compress.publishable import check_measured, tensor_bytes
from hf_compress.report import Report
from tests.hub import actions as A
from tests.zoo import build

pytest_plugins = ["tests.hub.fixtures"]


def measured(model, family="bert"):
    return hc.measure(model, build(family)[1], repeats=1, warmup=0)


# --- the report is of the model that is there ----------------------------------------------------------------------------


def low_rank(model):
    return hc.apply_(model, hc.plan_low_rank(model, ratio=0.5))


def quantized(bits):
    return lambda model: hc.apply_(model, hc.plan_quantization(model, bits=bits, skip=None))


EDITED = {
    "dense": lambda model: model,
    "8 bits": quantized(8),
    "4 bits": quantized(4),
    "low rank": low_rank,
    "low rank in 8 bits": lambda model: quantized(8)(low_rank(model)),
    "bf16": lambda model: model.to(torch.bfloat16),
}
FAMILIES = ["bert", "gpt2", "llama", "t5", "bart", "vit", "whisper", "convnext"]  # tied heads among them
CASES = [(e, f) for e in EDITED for f in FAMILIES if e != "low rank in 8 bits" or f == "bert"]


@pytest.mark.parametrize(("edit", "family"), CASES)
def test_a_report_has_the_bytes_that_its_model_is_saved_in(edit, family, tmp_path):
    model = EDITED[edit](build(family)[0].eval())
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in build(family)[1].items()}
    report = hc.measure(model, batch, repeats=1, warmup=0)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert tensor_bytes(tmp_path / "whole") == tensor_bytes(tmp_path / "shards") == report.model.bytes
    loaded = type(model).from_pretrained(tmp_path / "whole")
    assert hc.measure(loaded, batch, repeats=1, warmup=0).model.bytes == report.model.bytes


def test_a_model_that_is_not_saved_whole_is_not_taken_for_another(tmp_path):
    """Marian's sinusoids are made anew, so its bytes do not tell."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 64))}
    config = T.MarianConfig(
        vocab_size=99, d_model=32, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, **sizes
    )
    model = T.MarianMTModel(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 10)[None]
    report = hc.measure(model, {"input_ids": ids, "decoder_input_ids": ids}, repeats=1, warmup=0)
    check_measured(tmp_path, report)
    check_measured(tmp_path, None)


def test_exits_are_counted_too(tmp_path):
    model = hc.apply_(build("bert")[0].eval(), hc.Plan([hc.AddExits([0])]))
    model.save_pretrained(tmp_path)
    assert tensor_bytes(tmp_path) == measured(model).model.bytes > measured(build("bert")[0].eval()).model.bytes


def test_a_report_of_the_same_model_in_another_dtype_is_refused_before_anything_is_written(tmp_path):
    report = measured(A.model())
    with pytest.raises(hc.CompressionError, match="or of this one in another dtype"):
        push_to_hub(A.model().to(torch.bfloat16), "alice/x", report=report, output=tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("shard", [None, "100KB"])
def test_a_report_that_another_model_left_is_refused(shard, tmp_path):
    A.save(str(tmp_path), **({"max_shard_size": shard} if shard else {}))
    dense = measured(A.model(cut=False))
    dense.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    held = sum(p.numel() * 4 for p in A.model().state_dict().values() if p.is_floating_point())
    with pytest.raises(
        hc.CompressionError, match=rf"{dense.model.bytes:,} bytes of weights, and the saved ones have {held:,}\. Measure"
    ):
        push_folder(tmp_path, "alice/x")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    measured(A.model()).save(tmp_path)
    with pytest.raises(hc.CompressionError, match="offline mode is on"):  # it goes as far as the Hub
        push_folder(tmp_path, "alice/x")


# --- a card for another repository ---------------------------------------------------------------------------------------


def test_a_folder_that_is_pushed_elsewhere_says_how_to_load_it_from_there(hub, user, tmp_path):
    user("push", repo_id="alice/here", whole=True, output=str(tmp_path))
    local = tmp_path / "README.md"
    assert local.read_text().count('"alice/here"') == 2
    user("push_folder", folder=str(tmp_path), repo_id="there")  # of alice
    card = hub.store.read("alice/there", "README.md").decode()
    assert card == local.read_text() and card.count('"alice/there"') == 2 and '"alice/here"' not in card
    assert json.loads(hub.store.read("alice/there", "report.json"))["about"]["repo_id"] == "alice/there"
    assert Report.load(tmp_path).about["repo_id"] == "alice/there"
    assert hub.store.read("alice/here", "README.md").decode().count('"alice/here"') == 2
    edited = card.replace('model = AutoModelForSequenceClassification.from_pretrained("alice/there")', 'mine("alice/there")')
    local.write_text(edited)
    user("push_folder", folder=str(tmp_path), repo_id="alice/third")
    assert hub.store.read("alice/third", "README.md").decode() == edited == local.read_text()  # a person's word


# --- what a person wrote, here and there -----------------------------------------------------------------------------


def section(card, name):
    return re.search(rf"<!-- hf_compress:{name} .*?<!-- /hf_compress:{name} -->", card, re.S)[0]


def test_a_section_edited_here_and_there_is_lost_in_neither(hub, user, tmp_path):
    user("push", repo_id="alice/both", whole=True, output=str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    theirs = card.replace("## What it does not do\n", "## What it does not do\n\n- Theirs.\n")
    mine = card.replace("## What it does not do\n", "## What it does not do\n\n- Mine.\n").replace(
        "## What was done\n", "## Done\n"
    )
    user("api", method="upload_file", data=theirs, path_in_repo="README.md", repo_id="alice/both")
    (tmp_path / "README.md").write_text(mine)
    said = user("push_and_listen", folder=str(tmp_path), repo_id="alice/both")["said"]
    pushed = hub.store.read("alice/both", "README.md").decode()
    assert section(pushed, "limits") == section(theirs, "limits") and section(pushed, "changes") == section(mine, "changes")
    assert (tmp_path / "README.md").read_text() == pushed and (tmp_path / "README.local.md").read_text() == mine
    assert len(said) == 1 and "on the Hub, whose text stays: limits." in said[0] and "README.local.md" in said[0]
    assert "README.local.md" not in hub.store.paths("alice/both")
    again = user("push_and_listen", folder=str(tmp_path), repo_id="alice/both")
    assert [line for line in again["said"] if "whose text stays" in line] == []
    (tmp_path / "README.md").write_text(mine)
    user("push_folder", folder=str(tmp_path), repo_id="alice/both")
    assert (tmp_path / "README.local-2.md").read_text() == mine  # nothing that was put aside is overwritten
    assert not [path for path in hub.store.paths("alice/both") if "local" in path]


def test_a_kept_section_whose_numbers_changed_is_named(tmp_path, caplog):
    A.save(str(tmp_path))
    plan, report = hc.Plan(), measured(A.model())
    write_card_(tmp_path, plan, report)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Before and after", "## My numbers").replace("## How to load it", "## Loading"))
    write_card_(tmp_path, plan, report)
    assert "kept as edited" not in caplog.text
    write_card_(tmp_path, plan, replace(report, model=replace(report.model, macs=report.model.macs * 3)))
    assert "README.md: kept as edited by hand, though what was measured changed: results." in caplog.text
    assert "## My numbers" in path.read_text() and "## Loading" in path.read_text()


def test_a_trainer_s_card_that_was_edited_here_and_there_is_put_aside_too(tmp_path, caplog):
    A.save(str(tmp_path))
    write_card_(tmp_path, hc.Plan())
    path = tmp_path / "README.md"
    card = path.read_text()
    theirs, mine = (card.replace("## How to load it", f"## Loading, {whose} way") for whose in ("their", "my"))
    path.write_text(mine)
    write_card_(tmp_path, hc.Plan(), remote=theirs)
    assert "my way" not in path.read_text() and "their way" in path.read_text()
    assert (tmp_path / "_README.local.md").read_text() == mine and "whose text stays: use." in caplog.text


def test_a_card_that_is_no_text_is_not_overwritten(tmp_path):
    A.save(str(tmp_path))
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    for write in (lambda: write_card_(tmp_path, hc.Plan()), lambda: merge_card_(tmp_path, None, "me/x")):
        with pytest.raises(hc.CompressionError, match="README.md is not UTF-8 text"):
            write()
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"


# --- what a plain push says of its model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "auto"),
    [
        (T.BertForMultipleChoice, "bert", "AutoModelForMultipleChoice"),
        (T.T5ForConditionalGeneration, "t5", "AutoModelForSeq2SeqLM"),
        (T.BertModel, "bert", "AutoModel"),
    ],
)
def test_a_plain_folder_gets_the_class_that_loads_it(kind, config, auto, tmp_path):
    kind(build(config)[0].config).save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match="offline mode is on"):
        push_folder(tmp_path, "me/plain")
    card = (tmp_path / "README.md").read_text()
    assert f'model = {auto}.from_pretrained("me/plain")' in card and f"from transformers import {auto}\n" in card
    assert f"# {kind.__name__}\n" in card and f"This is a `{kind.__name__}`, published with" in card
    assert "Plain transformers loads it" in card


def test_a_folder_of_sentence_transformers(tmp_path):
    models = pytest.importorskip("sentence_transformers.models")
    from sentence_transformers import SentenceTransformer

    T.BertModel(build("bert")[0].config).save_pretrained(tmp_path / "bert")
    A.tokenizer().save_pretrained(tmp_path / "bert")
    words = models.Transformer(str(tmp_path / "bert"))
    folder = tmp_path / "sentences"
    SentenceTransformer(modules=[words, models.Pooling(32)]).save_pretrained(str(folder), create_model_card=False)
    with pytest.raises(hc.CompressionError, match="offline mode is on"):
        push_folder(folder, "me/sentences")
    card = (folder / "README.md").read_text()
    assert "library_name: sentence-transformers\n" in card and "\n- sentence-transformers\n" in card
    assert 'model = SentenceTransformer("me/sentences")' in card and "AutoModel" not in card.replace("AutoModel'", "")


# --- what is pushed, and what is said of it --------------------------------------------------------------------------


def test_a_push_of_nothing_new_says_so(hub, user, tmp_path):
    A.save(str(tmp_path))
    first = user("push_and_listen", folder=str(tmp_path), repo_id="alice/same")
    assert first["said"] == []
    for options, more in (({}, ""), ({"create_pr": True}, " and no pull request opened")):
        found = user("push_and_listen", folder=str(tmp_path), repo_id="alice/same", **options)
        expected = f"Nothing to push: alice/same at main holds all of {tmp_path} already, so no commit was made{more}."
        assert found == {"oid": first["oid"], "pr": None, "said": [expected]}
    assert len(hub.store.history("alice/same")) == 2


def test_subfolders_are_named_and_what_a_killed_save_left_stays_here(hub, user, tmp_path):
    A.save(str(tmp_path))
    names = ["1_Pooling/config.json", "onnx/model.onnx", "openvino/model.xml", "data/a.csv", "data/more/b.csv", "notes/x.md",
             ".hf_compress_a1b2/model.safetensors", "README.local.md", "README.local-2.md", ".cache/x"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    said = user("push_and_listen", folder=str(tmp_path), repo_id="alice/folders")["said"]
    assert said == [f"All of {tmp_path} is published, also its subfolders: data (2 files), notes (1 file)."]
    paths = hub.store.paths("alice/folders")
    assert set(names[:6]) <= set(paths) and not set(names[6:]) & set(paths)


def test_a_folder_with_nothing_but_a_killed_save_is_an_empty_one(hub, user, tmp_path):
    (tmp_path / ".hf_compress_a1b2").mkdir()
    user("push", repo_id="alice/after-a-kill", output=str(tmp_path))
    assert "model.safetensors" in hub.store.paths("alice/after-a-kill")
