"""A pruned model whose weights lie sharded over two processes. `torchrun -m tests.sharding FOLDER`."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.distributed.tensor import DTensor

import hf_compress as hc
from tests.zoo import build, outputs, random_plan

BERT = {"bert.encoder.layer.*": "free_full_weight", "bert.embeddings": "free_full_weight"}
PLANS = {"llama": None, "bert": BERT}  # transformers has one for Llama


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """One step of gradient descent on the mean square of the logits."""
    model(**batch).logits.pow(2).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def main(folder: str) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    for family, plan in PLANS.items():
        kind, batch = type(build(family)[0]), build(family)[1]
        source = f"{folder}/{family}"
        sharded = kind.from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2, fsdp_plan=plan)).eval()
        whole = kind.from_pretrained(source).eval()
        local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in sharded.parameters())
        assert local < 0.7 * sum(p.numel() for p in whole.parameters()), local
        off = (outputs(sharded, batch) - outputs(whole, batch)).abs().max().item()
        assert off < 1e-5, off
        step(sharded, batch)
        step(whole, batch)
        sharded.save_pretrained(f"{folder}/{family}_trained")
        if os.environ["RANK"] == "0":
            whole.save_pretrained(f"{folder}/{family}_alone")
        try:
            hc.apply_(sharded, random_plan(whole, ("heads",), seed=1))
        except hc.CompressionError as error:
            print(f"{family} {off:.1e} REFUSED {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
