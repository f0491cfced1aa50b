"""The command line against a Hub: real HTTP, each user a process with a cache of its own."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.recipe_models import text_classification

pytest_plugins = ["tests.hub.fixtures"]


@pytest.fixture
def cli(alice, reader):
    """`cli("push ...")` as alice, or `as_=reader`; gives what was printed, the exit code checked."""

    def call(*words: str, code: int = 0, as_=alice) -> dict[str, str]:
        found = as_.call("tests.cli_runs", "cli", words=list(words))
        assert found["code"] == code and "Traceback" not in found["err"], found
        return found

    return call


@pytest.fixture(scope="module")
def folder(alice, tmp_path_factory) -> str:
    """A compressed model, saved."""
    path = str(tmp_path_factory.mktemp("saved") / "model")
    alice.call("tests.hub.actions", "save", folder=path)
    return path


def test_push_then_inspect_elsewhere(hub, cli, user, reader, folder):
    said = json.loads(cli("push", folder, "alice/cli", "--private", "--json")["out"])
    assert said["repo"] == "alice/cli" and said["commit_url"] == f"{hub.endpoint}/alice/cli/commit/{said['oid']}"
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.store.paths("alice/cli"))
    found = cli("inspect", "alice/cli", code=2, as_=reader)["err"]  # private
    assert "there is no folder 'alice/cli' here, and no such model on the Hub that you may see" in found

    assert cli("push", folder, "alice/open", "--message", "from the command line")["out"].startswith(hub.endpoint)
    assert hub.store.history("alice/open")[0] == "from the command line"
    before = len(hub.requests)
    found = json.loads(cli("inspect", "alice/open", "--json", as_=reader)["out"])
    assert not any("safetensors" in path for _, path, _ in hub.requests[before:])  # no weights are downloaded
    assert found["tier"] == "plugin" and found["parameters"]["total"] == user("pull", repo_id="alice/open")["parameters"]


def test_push_to_a_branch_or_as_a_pull_request(hub, cli, folder):
    cli("push", folder, "alice/branched")
    cli("push", folder, "alice/branched", "--revision", "int8")
    assert hub.store.paths("alice/branched", "int8") == hub.store.paths("alice/branched")
    said = json.loads(cli("push", folder, "alice/asked", "--create-pr", "--json")["out"])
    assert said["pr_url"].endswith("/discussions/1") and "model.safetensors" not in hub.store.paths("alice/asked")
    assert "model.safetensors" in hub.store.paths("alice/asked", "refs/pr/1")


REFUSED = {
    "someone else's": (("bob/theirs",), "bob/theirs: 403"),
    "no such token": (("alice/x", "--token", "nonsense"), "401"),
}


@pytest.mark.parametrize("words, said", REFUSED.values(), ids=REFUSED)
def test_a_push_that_the_hub_refuses(cli, folder, words, said):
    found = cli("push", folder, *words, code=1)
    assert said in found["err"] and f"Everything is in {folder}; to go on: hf-compress push" in found["err"]
    assert found["err"].count("\n") == 1 and found["out"] == ""


def test_a_hub_that_does_not_answer(hub, cli, folder):
    hub.cut(0, down=True)
    try:
        pushed, looked = cli("push", folder, "alice/y", code=1), cli("inspect", "alice/never-seen", code=1)
    finally:
        hub.heal()
    assert pushed["err"].count("\n") == looked["err"].count("\n") == 1
    assert "Everything is in" in pushed["err"] and f"no answer from {hub.endpoint}" in looked["err"]


def test_a_model_that_is_not_on_the_hub(cli):
    found = cli("measure", "alice/nothing", code=2)["err"]
    assert "OUT: there is no folder 'alice/nothing' here, and no such model" in found and found.count("\n") == 1


def test_run_tells_where_it_published(hub, cli, tmp_path):
    """The commit's address in the text, and in the data; pushed again, a pull request's."""
    recipe = {**text_classification(tmp_path), "output": str(tmp_path / "out")}
    recipe["steps"] = [{"finetune": {"max_steps": 1}}, {"measure": {"batch_sizes": [1], "repeats": 1, "warmup": 0}}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.dump(recipe))
    said = cli("run", str(path), "--push-to-hub", "alice/run")["out"].splitlines()[-1]
    commit, _ = hub.store.commit(hub.store.repo("models", "alice/run", "alice"), "main")
    assert said == f"published: {hub.endpoint}/alice/run/commit/{commit}"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["about"]["name"] == "run"
    path.write_text(yaml.dump({**recipe, "push": {"repo": "alice/run", "create_pr": True}}))
    found = json.loads(cli("run", str(path), "--json")["out"])
    assert found["about"]["published"] == {"repo": "alice/run", "url": f"{hub.endpoint}/alice/run/discussions/1"}
    assert "published" not in json.loads((tmp_path / "out" / "report.json").read_text())["about"]
