"""Trainers and models that push by themselves: what is on the Hub in the middle of a training, at its end, and its card."""

from __future__ import annotations

import json

import pytest

import hf_compress as hc
from hf_compress.report import Report
from tests.hub.process import Failed
from tests.trainers import trainer

pytest_plugins = ["tests.hub.fixtures"]


@pytest.mark.parametrize("kind", ["Trainer", "CompressionTrainer"])
def test_every_save_is_the_masked_model_and_the_end_the_small_one(kind, hub, user, tmp_path):
    repo_id = f"alice/training-{kind}"
    found = user("train_and_push", folder=str(tmp_path), repo_id=repo_id, kind=kind)
    history = hub.store.history(repo_id)
    assert history[0] == "End of training" and [m for m in history if m.startswith("Training in progress, step")]
    middle = next(
        sha for sha, commit in hub.store.repos[f"models/{repo_id}"]["commits"].items() if "step 12" in commit["message"]
    )
    config = json.loads(hub.store.read(repo_id, "config.json", middle))
    assert config["quantization_config"]["masks"]["edits"]
    masked = user("pull", repo_id=repo_id, revision=middle)
    assert masked["logits"] == found["masked"] and masked["parameters"] == found["dense_parameters"]
    small = user("pull", repo_id=repo_id)
    assert small["logits"] == found["logits"] and small["parameters"] == found["parameters"] < found["dense_parameters"]
    assert "optimizer.pt" not in hub.store.paths(repo_id)
    card = hub.store.read(repo_id, "README.md").decode()
    assert "hf_compress" in card and "KeepNeurons" in card and "alice/training" in card


def test_a_trainer_s_card_takes_numbers_and_stock_arguments(hub, user, tmp_path):
    found = user("train_and_push", folder=str(tmp_path), repo_id="alice/numbers", report=True, license="mit", tags=["mine"])
    card = hub.store.read("alice/numbers", "README.md").decode()
    assert (
        f"{found['parameters'] / 1e3:.3g}" in card and "license: mit" in card and "- mine" in card and "- hf_compress" in card
    )
    report = Report.from_dict(json.loads(hub.store.read("alice/numbers", "report.json")))
    assert report.model.parameters == found["parameters"]
    user("api", method="upload_file", data=f"{card}\n## Notes\n\nBy hand.\n", path_in_repo="README.md", repo_id="alice/numbers")
    user("push_output", folder=str(tmp_path), repo_id="alice/numbers")
    assert "By hand." in hub.store.read("alice/numbers", "README.md").decode()


def test_a_trainer_that_cannot_push_says_why(hub, user, tmp_path):
    with pytest.raises(
        Failed, match=r"PushError: Could not push to bob/mine: 403: (.|\n)*to go on: hf-compress push"
    ) as failed:
        user("train_and_push", folder=str(tmp_path), repo_id="bob/mine", late=True)
    assert str(tmp_path) in failed.value.message and (tmp_path / "model.safetensors").is_file()
    with pytest.raises(hc.CompressionError, match="report is what hc.measure gives"):
        trainer(tmp_path, kind=hc.CompressionTrainer).create_model_card(report="accuracy 0.9")


def test_a_trainer_of_a_model_that_is_not_compressed_writes_the_stock_card(tmp_path):
    trainer(tmp_path, kind=hc.CompressionTrainer).create_model_card(model_name="plain")
    card = (tmp_path / "README.md").read_text()
    assert "generated automatically according to the information the Trainer had access to" in card and "# plain" in card


def test_model_push_to_hub_loads_and_leaves_our_card_alone(hub, user):
    pushed = user("model_push", repo_id="alice/by-itself")
    assert user("pull", repo_id="alice/by-itself")["logits"] == pushed
    ours = user("push", repo_id="alice/then-ours")
    card = hub.store.read("alice/then-ours", "README.md").decode()
    user("model_push", repo_id="alice/then-ours")
    assert hub.store.read("alice/then-ours", "README.md").decode().split() == card.split()
    assert ours["oid"] in hub.store.repos["models/alice/then-ours"]["commits"]
    user("push", repo_id="alice/by-itself")  # and the other way round: the form that stock left is nobody's work
    card = hub.store.read("alice/by-itself", "README.md").decode()
    assert "KeepNeurons" in card and "[More Information Needed]" not in card
