"""Two processes on this machine (gloo): ranks agree, sharding is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from packaging.version import Version

import hf_compress as hc
from tests.trainers import rows
from tests.zoo import outputs

ROOT = Path(__file__).parent.parent


def torchrun(action, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
        "-m", "tests.trainers", action, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_ranks_agree_on_plan_and_weights(tmp_path):
    done = torchrun("distributed", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"rank{rank}" / "result.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    structure = hc.discover(loaded)
    assert sum(a.num_heads for a in structure.attentions) == 6 and sum(f.size for f in structure.ffns) == 144
    assert loaded.config.quantization_config.plan == hc.Plan.from_dict(results[0]["plan"])
    assert outputs(loaded, {"input_ids": torch.stack([r["input_ids"] for r in rows(2)])}).isfinite().all()


@pytest.mark.skipif(Version(T.__version__) < Version("5.23"), reason="this transformers cannot shard a model while it loads")
def test_sharded_weights_are_refused_at_the_start(tmp_path):
    done = torchrun("fsdp", tmp_path)
    assert done.stdout.count("REFUSED PruningCallback does not work with weights that are sharded") == 2, done.stderr[-3000:]
