"""What goes wrong on the way: connections that are cut, at every request of a push in turn; servers that die and come back."""

from __future__ import annotations

import hashlib
import os

import pytest

from tests.hub import actions as A
from tests.hub import serve
from tests.hub.process import Failed

pytest_plugins = ["tests.hub.fixtures"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is saved whole, with its card."""
    path = tmp_path_factory.mktemp("whole")
    A.save(str(path), max_shard_size="200KB")
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def is_whole(hub, repo_id, folder):
    """Whether main holds what the folder does; anything between that and nothing is an error."""
    if f"models/{repo_id}" not in hub.store.repos:
        return False
    paths = [path for path in hub.store.paths(repo_id) if path != ".gitattributes"]
    if not paths:
        return False
    assert {path: hub.store.read(repo_id, path) for path in paths} == content(folder)
    return True


def requests_of_a_push(hub, push, repo_id):
    """What an undisturbed push of something new asks for."""
    begin = len(hub.requests)
    push(repo_id)
    return [f"{method} {path}" for method, path, _ in hub.requests[begin:]]


@pytest.mark.parametrize("down", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_push_cut_at_every_request_is_whole_when_run_again(how, down, hub, user, folder):
    """Before the server acted, or after (only its answer is lost); main is never half-written."""
    recovered = failures = 0
    for number in range(100):
        repo_id = f"alice/cut-{how}-{down}-{number}"
        hub.cut(number, how, down=down)
        try:
            user("push_folder", folder=str(folder), repo_id=repo_id)
            failed = False  # the client tried again by itself, or the push makes fewer requests
        except Failed as error:
            assert "PushError: Could not" in str(error) and "to go on: hf-compress push" in error.message
            failed = True
        reached = hub.heal()
        whole = is_whole(hub, repo_id, folder)
        assert whole or failed
        if not reached:
            break
        failures += failed
        user("push_folder", folder=str(folder), repo_id=repo_id)
        assert is_whole(hub, repo_id, folder)
        assert len(hub.store.history(repo_id)) == 2  # nothing twice
        recovered += 1
    shards = sum(name.startswith("model-") for name in content(folder))
    asked = requests_of_a_push(
        hub, lambda repo: user("push_folder", folder=str(folder), repo_id=repo), f"alice/whole-{how}-{down}"
    )
    assert recovered == len(asked) and sum("PUT /_lfs/" in line for line in asked) == shards
    assert failures >= (recovered if down and how == "before" else 4)


def test_a_second_push_cut_at_every_request_leaves_the_first_or_the_second(hub, user, folder, tmp_path):
    """A repository that is in use: whoever loads from it meanwhile gets a model that is whole."""
    A.save(str(tmp_path))
    user("push_folder", folder=str(tmp_path), repo_id="alice/in-use")
    first = {path: hub.store.read("alice/in-use", path) for path in hub.store.paths("alice/in-use")}
    cuts = 0
    for number in range(100):
        hub.cut(number, down=True)
        try:
            user("push_folder", folder=str(folder), repo_id="alice/in-use")
        except Failed:
            cuts += 1
        if not hub.heal():
            break
        assert {path: hub.store.read("alice/in-use", path) for path in hub.store.paths("alice/in-use")} == first
    assert cuts >= 10
    assert {n: hub.store.read("alice/in-use", n) for n in content(folder)} == content(folder)
    assert "model.safetensors" not in hub.store.paths("alice/in-use") and len(hub.store.history("alice/in-use")) == 3


@pytest.mark.parametrize(
    ("options", "ref", "asks"),
    [
        ({"revision": "tried"}, "tried", "/branch/tried"),
        ({"create_pr": True}, "refs/pr/1", "create_pr=1"),
        ({"private": True}, "main", "/commit/main"),
    ],
    ids=["a branch", "a pull request", "private"],
)
def test_every_other_kind_of_push_is_cut_at_every_request(options, ref, asks, hub, user, folder):
    name = "alice/kind-" + "-".join(options)
    tried: list[str] = []
    for number in range(100):
        repo_id = f"{name}-{number}"
        hub.cut(number, down=True)
        begin = len(hub.requests)
        try:
            user("push_folder", folder=str(folder), repo_id=repo_id, **options)
        except Failed as error:
            assert "PushError: Could not" in str(error) and "to go on: hf-compress push" in error.message
        if not hub.heal():
            tried = [path for _, path, _ in hub.requests[begin:]]
            break
        user("push_folder", folder=str(folder), repo_id=repo_id, **options)
        made = {path: hub.store.read(repo_id, path, ref) for path in hub.store.paths(repo_id, ref) if path != ".gitattributes"}
        assert made == content(folder) and len(hub.store.history(repo_id, ref)) == 2
        assert hub.store.repos[f"models/{repo_id}"]["private"] == ("private" in options)
        assert ref == "main" or hub.store.paths(repo_id) == [".gitattributes"]  # main is as it was
        assert set(hub.store.repos[f"models/{repo_id}"]["refs"]) == {"main", ref}
    assert len(tried) == number >= 9 and any(asks in path for path in tried)


def test_call_again_after_a_cut(hub, user, tmp_path):
    """`push_to_hub` itself, from the model, into the same folder."""
    hub.cut(0, only="/commit/", down=True)
    with pytest.raises(Failed, match="PushError: Could not commit to alice/again-whole"):
        user("push", repo_id="alice/again-whole", whole=True, output=str(tmp_path))
    hub.heal()
    before = content(tmp_path)
    pushed = user("push", repo_id="alice/again-whole", whole=True, output=str(tmp_path))
    same = ("model.safetensors", "config.json", "tokenizer.json")
    assert all(before[name] == hub.store.read("alice/again-whole", name) for name in same)
    assert user("pull", repo_id="alice/again-whole")["logits"] == pushed["logits"]


def test_a_server_that_died_comes_back_with_what_it_had(tmp_path, alice, folder):
    first = serve(tmp_path)
    try:
        environment = {"endpoint": first.endpoint, "token": "hf_alice", "folder": str(folder)}
        alice.call("tests.hub.actions", "push_elsewhere", repo_id="alice/kept", **environment)
        kept = content(folder)
        first.cut(0, only="/commit/", down=True)
        with pytest.raises(Failed):
            alice.call("tests.hub.actions", "push_elsewhere", repo_id="alice/lost", **environment)
    finally:
        first.stop()
    with serve(tmp_path, first.port) as second:
        assert {name: second.store.read("alice/kept", name) for name in kept} == kept
        assert not is_whole(second, "alice/lost", folder)
        alice.call("tests.hub.actions", "push_elsewhere", repo_id="alice/lost", **environment)
        assert is_whole(second, "alice/lost", folder)


def test_every_part_of_a_large_file_is_cut_once(tmp_path, alice, folder):
    """They go up beside each other, so each is cut by its name, and the request that puts them together too."""
    with serve(tmp_path, part_size=90_000) as hub:

        def push(repo_id):
            where = {"endpoint": hub.endpoint, "token": "hf_alice", "folder": str(folder)}
            alice.call("tests.hub.actions", "push_elsewhere", repo_id=repo_id, **where)

        uploads = [line.split("alice/parts")[1] for line in requests_of_a_push(hub, push, "alice/parts") if " /_lfs/" in line]
        parts = [name for name in uploads if name.count("/") == 2]
        assert len(parts) >= 4 and len(uploads) > len(parts)
        for i, name in enumerate(uploads):
            repo_id = f"alice/part-{i}"
            before = sum(part.startswith(f"{name}/") for part in parts)  # what puts them together is asked for after them
            hub.cut(before, only=f"{repo_id}{name}", down=True)
            with pytest.raises(Failed, match="PushError: Could not commit to"):
                push(repo_id)
            assert hub.heal() and not is_whole(hub, repo_id, folder)
            push(repo_id)
            assert is_whole(hub, repo_id, folder) and len(hub.store.history(repo_id)) == 2


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, user, tmp_path):
    data = os.urandom(1 << 20) * 21  # the client keeps what it has in pieces of 10 MiB
    (tmp_path / "big.bin").write_bytes(data)
    user("api", method="create_repo", repo_id="alice/big")
    user("api", method="upload_file", path_or_fileobj=str(tmp_path / "big.bin"), path_in_repo="big.bin", repo_id="alice/big")
    hub.cut(1, "midway", only="/resolve/main/big.bin")  # the first is the client's HEAD
    begin = len(hub.requests)
    path = user("download", repo_id="alice/big", path="big.bin")
    assert hub.heal()
    assert hashlib.sha256(open(path, "rb").read()).digest() == hashlib.sha256(data).digest()
    ranges = [given for _, at, given in hub.requests[begin:] if at.endswith("big.bin") and given]
    assert ranges == ["bytes=10485760-"]


def test_a_data_set_loads_from_the_hub(hub, user, tmp_path):
    pytest.importorskip("datasets")
    user("api", method="create_repo", repo_id="alice/rows", repo_type="dataset")
    data = "text,label\ngood,1\nbad,0\n"
    user("api", method="upload_file", data=data, path_in_repo="train.csv", repo_id="alice/rows", repo_type="dataset")
    assert user("rows_of", repo_id="alice/rows", cache=str(tmp_path)) == [
        {"text": "good", "label": 1},
        {"text": "bad", "label": 0},
    ]
