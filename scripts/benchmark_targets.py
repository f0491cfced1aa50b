"""`prune_family`: the speed-up that was asked beside the one that is achieved, timed anew. Writes JSON.

    python scripts/benchmark_targets.py --models minilm vit llama --batches 1 32 --speedups 1.5 2 3 5

A small encoder with real weights (all-MiniLM-L6-v2, 6 layers, 384 wide), a ViT and a Llama of the same width with random ones,
calibrated on random inputs: what is lost means nothing here, how long things take does. Every plan is applied to a copy, which
is timed in turn with the dense model until the 95% interval is within 1% to either side (or for MOST seconds), in runs that
`prune_family` has not seen.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import sst2
import torch
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import hf_compress as hc
from hf_compress.timing import steady_speedup

PAIRS = 20
CALIBRATION = 4  # batches of 32


def minilm(length: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(sst2.packaged_minilm(), num_labels=2)


def vit(length: int) -> Any:
    side = {"image_size": 112, "patch_size": 16}  # 49 patches
    return ViTForImageClassification(
        ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, num_labels=10, **side)
    )


def llama(length: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=6,
            intermediate_size=1024, max_position_embeddings=max(length, 64),
        )
    )  # fmt: skip


MODELS = {"minilm": minilm, "vit": vit, "llama": llama}


def batch_of(model: Any, rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size"):
        side = model.config.image_size
        return {"pixel_values": torch.randn(rows, 3, side, side, generator=draw)}
    ids = torch.randint(200, model.config.vocab_size, (rows, length), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0, 5.0])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=float, default=60.0, help="seconds that one model is timed")
    parser.add_argument("--output", default="runs/targets")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for name in args.models:
        torch.manual_seed(0)
        dense = MODELS[name](args.length).eval()
        data = [batch_of(dense, 32, args.length, seed) for seed in range(CALIBRATION)]
        for rows in args.batches:
            inputs = batch_of(dense, rows, args.length, CALIBRATION)
            wanted, family = sorted(args.speedups), []
            while wanted and not family:
                try:
                    family = hc.prune_family(dense, data, wanted, inputs=inputs)
                except hc.CompressionError as error:  # the largest is too much
                    print(f"{name}, batch {rows}: {error}", flush=True)
                    found.append({"model": name, "batch": rows, "asked": wanted.pop(), "refused": str(error)})
            for pruned in family:
                small = hc.apply_(copy.deepcopy(dense), pruned.plan)
                runs = [partial(m, **inputs) for m in (small, dense)]
                with torch.no_grad():
                    speedup, interval, pairs = steady_speedup(*runs, pairs=PAIRS, width=0.01, longest=args.most)
                row = {
                    "model": name,
                    "batch": rows,
                    "asked": pruned.asked,
                    "said": pruned.achieved,
                    "achieved": speedup,
                    "interval": list(interval),
                    "pairs": pairs,
                    "off": speedup / pruned.asked - 1,
                    "conditions": pruned.conditions,
                    "sizes": pruned.sizes,
                }
                found.append(row)
                print(json.dumps({k: v for k, v in row.items() if k not in ("conditions", "sizes")}), flush=True)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "targets.json").write_text(json.dumps({"runs": found, "arguments": vars(args)}, indent=1) + "\n")
    timed_rows = [row for row in found if "off" in row]
    within = sum(abs(row["off"]) <= 0.03 for row in timed_rows)
    print(f"{within} of {len(timed_rows)} within 3% of what was asked")


if __name__ == "__main__":
    main()
