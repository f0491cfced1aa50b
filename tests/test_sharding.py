"""Pruned checkpoints on transformers' own FSDP2, two processes on this machine (gloo)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from packaging.version import Version
from safetensors.torch import load_file

import hf_compress as hc
from tests.sharding import PLANS
from tests.zoo import build, random_plan


@pytest.mark.skipif(Version(T.__version__) < Version("5.23"), reason="this transformers cannot shard a model while it loads")
def test_a_pruned_checkpoint_is_sharded_run_trained_and_saved(tmp_path):
    for family in PLANS:
        model, _ = build(family)
        hc.apply_(model, random_plan(model, ("heads", "neurons"))).save_pretrained(tmp_path / family)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        + ["-m", "tests.sharding", str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("are sharded over processes (FSDP2") == 2 * len(PLANS), done.stdout  # what apply_ says there
    for family in PLANS:
        before, trained, alone = (
            load_file(tmp_path / f"{family}{end}" / "model.safetensors") for end in ("", "_trained", "_alone")
        )
        assert trained.keys() == alone.keys() == before.keys()
        assert all(torch.allclose(trained[key], alone[key], atol=1e-5) for key in alone)
        moved = sum(not torch.equal(trained[key], before[key]) for key in alone)
        assert moved > len(alone) / 2
        type(build(family)[0]).from_pretrained(tmp_path / f"{family}_trained")  # as any compressed checkpoint
