"""Single weights of a sentence encoder zeroed in one shot: bytes on disk, and how far its embeddings move. Writes JSON.

    python scripts/benchmark_sparsity.py --data ../shared/data/sst2

No training and no labels. The embedding of a sentence is the mean of its tokens' hidden states; what is given is the mean over
SST-2's dev sentences of the cosine with the dense model's. Calibration: the first train sentences. Dense kernels gain no time,
which `--time` measures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import sst2
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

import hf_compress as hc


@torch.no_grad()
def embeddings(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over tokens, (sentences, width)."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def bytes_of(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA)
    parser.add_argument("--model", help="a folder or Hub id; by default all-MiniLM-L6-v2 out of a package")
    parser.add_argument("--sentences", type=int, default=256, help="of calibration (%(default)s)")
    parser.add_argument("--time", action="store_true", help="time 2:4 beside the dense model, batch 32, length 64")
    parser.add_argument("--output", default="runs/sparsity.json")
    args = parser.parse_args()
    sst2.need(args.data)
    source = args.model or sst2.packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = sst2.splits(args.data, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)

    def prepared(chosen: sst2.Rows) -> list[dict[str, torch.Tensor]]:
        chosen = sorted(chosen, key=lambda row: len(row["input_ids"]))
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in sst2.batches(chosen, 64, collate)]

    calibration, test = prepared(rows["train"][: args.sentences]), prepared(rows["dev"])
    dense = AutoModel.from_pretrained(source).eval()
    expected, size = embeddings(dense, test), bytes_of(dense)
    results: list[dict[str, Any]] = []
    for how in ({"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.7}):
        for score in ("random", "magnitude", "wanda", "sparsegpt"):
            model = AutoModel.from_pretrained(source).eval()
            start = time.perf_counter()
            batches = calibration if score in ("wanda", "sparsegpt") else None
            plan = hc.plan_sparsity(model, batches, score=score, **how)  # type: ignore[arg-type]
            planned = time.perf_counter() - start
            hc.apply_(model, plan)
            cosine = F.cosine_similarity(embeddings(model, test), expected).mean().item()
            results.append({**how, "score": score, "cosine": cosine, "bytes": bytes_of(model), "seconds": planned})
            print(json.dumps(results[-1]), flush=True)
            if args.time and how == {"pattern": "2:4"} and score == "magnitude":
                report = hc.measure(model, sst2.timing_batch(rows["test"], tokenizer), against=dense)
                results[-1]["report"] = report.to_dict()
                print(report, flush=True)
    conditions = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sentences": args.sentences,
        "dense_bytes": size,
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")
    print(json.dumps(conditions))


if __name__ == "__main__":
    main()
