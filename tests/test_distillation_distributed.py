"""Two processes take the step that one takes: losses and gradients of every task, projections too."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distilling import ALPHAS, CASES, gradient, trainer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
        "-m", "tests.distilling", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process(case, folder, tmp_path):
    t = trainer(tmp_path, case, **ALPHAS)
    one = gradient(t)
    scale = float(max(g.abs().max() for g in one.values()))
    for steps in (1, 2):
        found = [torch.load(folder / f"{case}-{steps}-{rank}.pt") for rank in (0, 1)]
        assert found[0]["gradient"].keys() == one.keys() and any(name.startswith("projections.") for name in one)
        for name, grad in one.items():
            assert torch.equal(found[0]["gradient"][name], found[1]["gradient"][name])
            torch.testing.assert_close(found[0]["gradient"][name], grad, rtol=2e-3, atol=scale * 2e-6)
        for name, value in found[0]["logs"].items():
            assert value == pytest.approx(t.state.log_history[0][name], rel=1e-4)
        assert {"loss", "loss_task", "loss_kd", "loss_cos"} == found[0]["logs"].keys()
