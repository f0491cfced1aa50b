"""Two processes train the exits that one would: weights, logged losses, and the depth of an evaluation."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_compress.exits import exit_layers
from tests.exiting import EVALUATED, joint_training, plain_model, run

ROOT = Path(__file__).parent.parent


def test_two_processes_train_the_exits_that_one_would(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
        "-m", "tests.exiting", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    alone = joint_training(tmp_path / "alone", 8)
    before = dict(plain_model(num_labels=2).named_parameters())
    assert {"exit_loss_0", "exit_loss_1", "final_loss", "loss"} <= ranks[0]["logs"].keys()
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], weight, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(alone["weights"]["classifier.weight"], before["classifier.weight"])
    for name in ("exit_loss_0", "exit_loss_1", "final_loss", "loss"):
        assert ranks[0]["logs"][name] == pytest.approx(alone["logs"][name], rel=1e-3)
    # each row counts once, also those that fill up the last batch of a process
    for rank in ranks:
        assert rank["metrics"]["eval_mean_exit_depth"] == pytest.approx(alone["metrics"]["eval_mean_exit_depth"])
    run(alone["model"], EVALUATED)
    depths = exit_layers(alone["model"]) + 1
    assert alone["metrics"]["eval_mean_exit_depth"] == pytest.approx(depths.double().mean().item())
    filled = torch.cat([depths, depths[:3]])
    assert filled.double().mean().item() != pytest.approx(depths.double().mean().item())
