"""Pushing to a Hub and loading from it: real HTTP, the real client, each user a process with a cache of its own."""

from __future__ import annotations

import json
import re

import pytest
import transformers as T
from packaging.version import Version

import hf_compress as hc
from hf_compress.hub import push_folder, push_to_hub
from hf_compress.report import Report
from tests.hub import actions as A
from tests.hub.process import Failed

pytest_plugins = ["tests.hub.fixtures"]

WHOLE = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "report.json"}
OLD = Version(T.__version__) < Version("5.23")


def test_a_push_is_one_commit_and_loads_to_the_bit_elsewhere(hub, user, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: dense\nsteps:\n- prune: {heads: 0.5}\n")
    pushed = user("push", repo_id="alice/whole", whole=True, recipe=str(recipe))
    assert hub.store.history("alice/whole")[1:] == ["initial commit"]
    paths = set(hub.store.paths("alice/whole"))
    assert WHOLE | {"recipe.yaml"} <= paths <= WHOLE | {"recipe.yaml", ".gitattributes", "kept.png", "stages.png"}
    assert hub.store.read("alice/whole", "recipe.yaml") == recipe.read_bytes()
    report = Report.from_dict(json.loads(hub.store.read("alice/whole", "report.json")))
    assert report.model.parameters == pushed["parameters"] and report.model.metrics == {"accuracy": 0.75}
    card = hub.store.read("alice/whole", "README.md").decode()
    assert f"{pushed['parameters'] / 1e3:.3g}" in card and 'from_pretrained("alice/whole")' in card and "prune: {heads" in card

    found = user("pull", repo_id="alice/whole")
    assert found["logits"] == pushed["logits"] and found["parameters"] == pushed["parameters"]
    assert user("classify", repo_id="alice/whole") == pushed["texts"]


def test_a_push_again_replaces_the_weights_and_leaves_no_old_ones(hub, user):
    many = user("push", repo_id="alice/again", max_shard_size="100KB")
    shards = [path for path in hub.store.paths("alice/again") if re.fullmatch(r"model-\d+-of-\d+\.safetensors", path)]
    assert len(shards) >= 2 and "model.safetensors" not in hub.store.paths("alice/again")
    assert user("pull", repo_id="alice/again")["logits"] == many["logits"]
    one = user("push", repo_id="alice/again", seed=1)  # a loader prefers model.safetensors; a stale index would be left
    weights = [path for path in hub.store.paths("alice/again") if "safetensors" in path]
    assert weights == ["model.safetensors"] and one["logits"] != many["logits"]
    assert user("pull", repo_id="alice/again", force_download=True)["logits"] == one["logits"]
    back = user("push", repo_id="alice/again", max_shard_size="100KB")  # and here the old weights would be loaded
    assert "model.safetensors" not in hub.store.paths("alice/again")
    assert user("pull", repo_id="alice/again", force_download=True)["logits"] == back["logits"]
    commits = len(hub.store.history("alice/again"))
    user("push", repo_id="alice/again", max_shard_size="100KB")  # nothing has changed
    assert len(hub.store.history("alice/again")) == commits == 4


def test_an_image_model_goes_with_its_processor(hub, user):
    pushed = user("push", repo_id="alice/vit", family="vit", image_processor=True)
    assert json.loads(hub.store.read("alice/vit", "preprocessor_config.json"))["size"] == {"height": 32, "width": 32}
    found = user("pull", repo_id="alice/vit", kind="ViTForImageClassification", family="vit")
    assert found["logits"] == pushed["logits"]


def test_what_a_person_wrote_into_the_card_stays(hub, user):
    user("push", repo_id="alice/card", whole=True)
    card = hub.store.read("alice/card", "README.md").decode()
    edited = f"{card.rstrip()}\n\n## My notes\n\nTried on Tuesdays.\n"
    user("api", method="upload_file", data=edited, path_in_repo="README.md", repo_id="alice/card")
    user("push", repo_id="alice/card", whole=True, seed=1)
    assert "Tried on Tuesdays." in hub.store.read("alice/card", "README.md").decode()


@pytest.mark.skipif(OLD, reason="stock transformers 5.20 does not send from_pretrained's token= to the Hub")
def test_a_private_repository_is_for_those_with_a_token(hub, user):
    pushed = user("push", repo_id="alice/secret", private=True)
    assert hub.store.repos["models/alice/secret"]["private"]
    for token in (None, "hf_bob"):
        with pytest.raises(Failed, match="alice/secret is not a local folder and is not a valid model identifier"):
            user("pull", repo_id="alice/secret", token=token)
    assert user("pull", repo_id="alice/secret", token="hf_alice")["logits"] == pushed["logits"]
    user("push", repo_id="alice/open")
    commits = hub.store.history("alice/open")
    with pytest.raises(Failed, match="PushError: alice/open exists and is public, and private=True was asked for"):
        user("push", repo_id="alice/open", seed=1, private=True)
    assert hub.store.history("alice/open") == commits


@pytest.mark.skipif(OLD, reason="stock transformers 5.20 does not send from_pretrained's token= to the Hub")
def test_a_gated_repository_says_so(hub, user):
    pushed = user("push", repo_id="alice/gated")
    user("api", method="update_repo_settings", repo_id="alice/gated", gated="auto")
    for token, code in ((None, 401), ("hf_bob", 403)):
        with pytest.raises(Failed, match=rf"gated repo(.|\n)*{code}"):
            user("pull", repo_id="alice/gated", token=token)
    user("api", method="grant_access", repo_id="alice/gated", user="bob")
    assert user("pull", repo_id="alice/gated", token="hf_bob")["logits"] == pushed["logits"]


def test_branches_and_pull_requests(hub, user):
    main = user("push", repo_id="alice/refs")
    tried = user("push", repo_id="alice/refs", seed=1, revision="tried")  # made from main
    proposed = user("push", repo_id="alice/refs", seed=2, create_pr=True)
    assert proposed["pr"].endswith("/alice/refs/discussions/1") and len(hub.store.history("alice/refs")) == 2
    for revision, pushed in (("main", main), ("tried", tried), ("refs/pr/1", proposed), (tried["oid"], tried)):
        assert user("pull", repo_id="alice/refs", revision=revision)["logits"] == pushed["logits"]
    with pytest.raises(Failed, match="tired is not a valid git identifier"):
        user("pull", repo_id="alice/refs", revision="tired")
    with pytest.raises(Failed, match=r"PushError: Could not look at alice/refs at tired: 404: (.|\n)*tired(.|\n)*--create-pr"):
        user("push", repo_id="alice/refs", revision="tired", create_pr=True)
    assert set(hub.store.repos["models/alice/refs"]["refs"]) == {"main", "tried", "refs/pr/1"}


FAILURES = {  # what is asked -> what the message says
    "a token that is none": (dict(token="wrong"), "401: Invalid credentials.*hf auth login"),
    "a token that may only read": (dict(token="hf_alice.read", repo_id="alice/unwritable"), "403: .*rights.*write role"),
    "a repository of somebody else": (
        dict(repo_id="bob/theirs"),
        "403: You don't have the rights to write to bob/theirs.*create_pr",
    ),
    "a namespace of somebody else": (dict(repo_id="bob/new"), "403: You don't have the rights to create"),
    "a pull request of nobody": (dict(token=False, repo_id="bob/theirs", create_pr=True), "401: Invalid username"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_push_that_is_refused_says_why_and_leaves_a_whole_folder(name, hub, user, alice, tmp_path):
    options, message = FAILURES[name]
    options = {"repo_id": "alice/refused", **options}
    if "models/bob/theirs" not in hub.store.repos:
        hub.store.create("models", "bob/theirs", False, "bob")
    before = json.dumps(hub.store.repos)
    with pytest.raises(Failed, match=rf"PushError: Could not (.|\n)*{message}") as failed:
        user("push", **options, output=str(tmp_path / "out"))
    assert f"to go on: hf-compress push {tmp_path / 'out'} {options['repo_id']}" in failed.value.message
    assert json.dumps(hub.store.repos) == before
    kept = T.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert A.logits(kept) == A.logits(A.model())
    mine = f"alice/{name.replace(' ', '-')}"
    user("push_folder", folder=str(tmp_path / "out"), repo_id=mine)
    assert user("pull", repo_id=mine)["logits"] == A.logits(kept)


def test_a_pull_request_to_somebody_else(hub, user):
    hub.store.create("models", "bob/open", False, "bob")
    pushed = user("push", repo_id="bob/open", create_pr=True)
    assert hub.store.paths("bob/open") == [".gitattributes"]
    assert user("pull", repo_id="bob/open", revision="refs/pr/1")["logits"] == pushed["logits"]


def test_an_edit_in_between_is_not_lost(hub, user, tmp_path):
    user("push", repo_id="alice/race", output=str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "extra.txt").write_text("more")
    edit = {"repo_id": "alice/race", "folder": str(tmp_path), "path": "README.md", "data": f"{text}\n## Theirs\n\nNew.\n"}
    with pytest.raises(Failed, match="PushError: Could not commit to alice/race: 412: A commit has happened since"):
        user("push_beside_another", **edit)
    user("push_folder", repo_id="alice/race", folder=str(tmp_path))
    assert "extra.txt" in hub.store.paths("alice/race")
    assert "## Theirs" in hub.store.read("alice/race", "README.md").decode()


# --- refusals, before anything is written or sent ----------------------------------------------------------------


def _masked():
    found = A.model(cut=False)
    hc.mask_(found, hc.Plan([hc.KeepNeurons(hc.discover(found).ffns[0].name, range(8))]))
    return found


def _skipping():
    found = A.model(cut=False)
    hc.mask_(found, hc.Plan([hc.KeepLayers([0])]))
    return found


def _in_the_middle():
    from hf_compress.quantization.fake import fake_

    found = A.model(cut=False)
    fake_(found.classifier, 8, None, "token")
    return found


def _report(found=None):
    return hc.measure(found or A.model(cut=False), A.inputs(), repeats=1, warmup=0)


REFUSED = {
    "no model": (lambda: "me/x", {}, "takes a transformers model, got a str. Load one"),
    "a class": (lambda: T.BertModel, {}, "takes a transformers model, got the class BertModel"),
    "a wrapper": (lambda: A.torch.nn.Sequential(A.model()), {}, "It holds a BertForSequenceClassification: push that one"),
    "a mask": (_masked, {}, r"is masked, so the model is not finished: remove the mask \(Mask.remove\(\)\)"),
    "a mask over layers": (_skipping, {}, "is masked, so the model is not finished"),
    "fake quantization": (_in_the_middle, {}, "classifier is quantized in appearance only"),
    "meta": (lambda: A.model(cut=False).to("meta"), {}, "is on the meta device"),
    "no name": (A.model, {"repo_id": ""}, "repo_id must be 'owner/name'"),
    "a path": (A.model, {"repo_id": "a/b/c"}, "repo_id must be 'owner/name' or 'name' .* got 'a/b/c'"),
    "an address": (A.model, {"repo_id": "https://huggingface.co/me/x"}, "repo_id must be 'owner/name'"),
    "a number": (A.model, {"repo_id": 7}, "repo_id must be 'owner/name' .*got 7"),
    "a report of another model": (
        A.model,
        {"report": _report},
        r"of another model: it has [\d,]+ parameters, this one [\d,]+\.",
    ),
    "no report": (A.model, {"report": {"accuracy": 1}}, "report is what hc.measure gives .* got a dict"),
    "a tokenizer's name": (A.model, {"tokenizer": "bert-base"}, "tokenizer must be something with save_pretrained.* got a str"),
    "a model as processor": (A.model, {"processor": A.model}, "processor must be something with save_pretrained"),
    "private, in words": (A.model, {"private": "yes"}, "private is True or False, got 'yes'"),
    "create_pr, a number": (A.model, {"create_pr": 2}, "create_pr is True or False, got 2"),
    "a commit": (A.model, {"revision": "0" * 40}, "revision must be the name of a branch"),
    "a branch with a space": (A.model, {"revision": "my branch"}, "revision must be the name of a branch, got 'my branch'"),
    "an empty message": (A.model, {"commit_message": " "}, "commit_message must be a text"),
    "a token that is no text": (A.model, {"token": 5}, "token must be a text, True or False, got int"),
    "a recipe that is not there": (A.model, {"recipe": "none.yaml"}, "The recipe 'none.yaml' cannot be read .*No such file"),
    "a recipe that is a list": (A.model, {"recipe": [1]}, "recipe must be the path of a YAML file, or a dict"),
    "a plan that is another": (A.model, {"plan": hc.Plan([hc.KeepLayers([0])])}, "not what the model's config records"),
    "a plan that is a dict": (A.model, {"plan": {}}, "plan must be a Plan, got a dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_first(name, tmp_path):
    make, options, message = REFUSED[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with pytest.raises(hc.CompressionError, match=message) as refused:
        push_to_hub(make(), **{"repo_id": "alice/x", "output": tmp_path / "out", **options})
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_an_output_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(hc.CompressionError, match="output must be a new or empty folder, or one that holds a model"):
        push_to_hub(A.model(), "alice/x", output=tmp_path)
    with pytest.raises(hc.CompressionError, match="diary.txt is a file"):
        push_to_hub(A.model(), "alice/x", output=tmp_path / "diary.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "a config cut short": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "an index cut short": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        "The index of the weights",
    ),
    "weights cut short": (_truncate, "model.safetensors is truncated or damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_whole_is_refused(name, tmp_path):
    A.save(str(tmp_path))
    change, message = BROKEN[name]
    change(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(hc.CompressionError, match=message):
        push_folder(tmp_path, "alice/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_missing_shard_is_named(tmp_path):
    A.save(str(tmp_path), max_shard_size="100KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(hc.CompressionError, match=f"lacks {gone.name}"):
        push_folder(tmp_path, "alice/x")


def test_offline_is_said(tmp_path):
    A.save(str(tmp_path))  # tests themselves are offline
    with pytest.raises(hc.CompressionError, match="offline mode is on: unset HF_HUB_OFFLINE.*to go on: hf-compress push"):
        push_folder(tmp_path, "alice/x")


def test_what_a_training_leaves_stays_here(hub, user, tmp_path):
    A.save(str(tmp_path))
    for name in (
        "checkpoint-12/model.safetensors",
        "runs/events",
        ".env",
        "training_args.bin",
        "optimizer.pt",
        "_cache/x",
        "steps/00-model/model.safetensors",
        "extra/notes.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    user("push_folder", folder=str(tmp_path), repo_id="alice/left")
    paths = set(hub.store.paths("alice/left")) - {"kept.png"}  # drawn where matplotlib is installed
    assert paths == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "extra/notes.md",
    }
    assert "KeepNeurons" in hub.store.read("alice/left", "README.md").decode()
