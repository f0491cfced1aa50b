"""Torch-Pruning on a BERT classifier, at a measured speed-up: what benchmark_peers.py runs where Torch-Pruning is installed.

    python scripts/torch_pruning_peer.py request.json

The request says what model, data and configurations; each pruned model is saved whole (`torch.save`) beside it, and answer.json
says how fast it was here. Kept out of the benchmark's own process, so that neither can change what the other runs on.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import equal_speed
import sst2
import torch
import torch_pruning as tp  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

IMPORTANCES = {
    "taylor": tp.importance.TaylorImportance,
    "hessian": tp.importance.HessianImportance,
    "magnitude": tp.importance.MagnitudeImportance,
    "lamp": tp.importance.LAMPImportance,
}
SCOPES = {"global": {"global_pruning": True}, "local": {}, "isomorphic": {"global_pruning": True, "isomorphic": True}}
ROUND_TO = 16  # what stays of neurons and of the residual stream: odd widths are slow


def attentions(model: Any) -> list[Any]:
    """The modules that hold query, key and value projections."""
    return [module for module in model.modules() if all(hasattr(module, name) for name in ("query", "key", "value"))]


def fill_gradients(model: Any, rows: sst2.Rows, collate: Any, importance: str) -> None:
    """What the scores read in `weight.grad`: the gradient of the mean loss, or the mean square of every sentence's.

    `HessianImportance.accumulate_grad` of 1.6.1 keeps the last sentence only (it looks for names among parameters), so the mean
    is made here.
    """
    model.zero_grad()
    if importance == "taylor":
        for batch in sst2.batches(rows, 32, collate):
            (model(**batch).loss * len(batch["labels"]) / len(rows)).backward()
    elif importance == "hessian":
        total = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
        for batch in sst2.batches(rows, 1, collate):
            model.zero_grad()
            model(**batch).loss.backward()
            for parameter, sum_of in total.items():
                if parameter.grad is not None:
                    sum_of += parameter.grad.square()
        for parameter, sum_of in total.items():
            parameter.grad = sum_of / len(rows)


def pruned(dense: Any, example: dict[str, torch.Tensor], way: dict[str, Any], ratio: float, head_ratio: float) -> Any:
    """A copy without this share of neurons (and of the residual stream, where `way` says so) and of heads.

    As in Torch-Pruning's own BERT example: whole heads go, not dimensions of heads, and the classifier's classes stay.
    """
    model = copy.deepcopy(dense)
    for parameter, there in zip(model.parameters(), dense.parameters(), strict=True):
        parameter.grad = None if there.grad is None else there.grad.clone()
    ignored = [model.classifier]
    if not way["hidden"]:  # what writes into the residual stream keeps its width
        layers = model.base_model.encoder.layer
        ignored += [model.base_model.embeddings, model.base_model.pooler]
        ignored += [out for layer in layers for out in (layer.attention.output.dense, layer.output.dense)]
    heads = {p: m.num_attention_heads for m in attentions(model) for p in (m.query, m.key, m.value)}
    pruner = tp.pruner.BasePruner(
        model, example, importance=IMPORTANCES[way["importance"]](), pruning_ratio=ratio, head_pruning_ratio=head_ratio,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, ignored_layers=ignored, round_to=ROUND_TO,
        output_transform=lambda out: out.logits.sum(), in_channel_groups={}, out_channel_groups={},  # its defaults are shared
        **SCOPES[way["scope"]],
    )  # fmt: skip
    pruner.step()
    model.zero_grad()
    for module in attentions(model):
        module.all_head_size = module.query.out_features
        module.num_attention_heads = module.all_head_size // module.attention_head_size
    return model.eval()


def sizes_of(model: Any) -> dict[str, list[int]]:
    layers = model.base_model.encoder.layer
    return {
        "hidden": [model.classifier.in_features],
        "heads": [module.num_attention_heads for module in attentions(model)],
        "neurons": [layer.intermediate.dense.out_features for layer in layers],
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Give the request that scripts/benchmark_peers.py wrote; run that one.")
    path = Path(sys.argv[1])
    request = json.loads(path.read_text())
    torch.set_num_threads(request["threads"])
    dense = AutoModelForSequenceClassification.from_pretrained(request["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    splits = sst2.splits(request["data"], tokenizer)
    rows = sorted(splits["train"][: request["sentences"]], key=lambda row: len(row["input_ids"]))
    inputs = sst2.timing_batch(splits["dev"], tokenizer, request["batch"], request["length"])
    example = {name: value[:2] for name, value in inputs.items()}
    beside = copy.deepcopy(dense)  # without gradients, as the pruned ones are timed

    def time_of(model: Any) -> float:
        return equal_speed.timed(beside, model, inputs)[0]

    answer = []
    for number, way in enumerate(request["ways"]):
        fill_gradients(dense, rows, DataCollatorWithPadding(tokenizer), way["importance"])
        for asked in request["speedups"]:

            def build(ratio: float, heads: float | None = None, way: dict[str, Any] = way) -> Any:
                return pruned(dense, example, way, ratio, ratio if heads is None else heads)

            near = equal_speed.reach(build, time_of, asked)
            if not near.is_near(asked):  # a head in every layer is a large step: fewer heads, and more of the rest
                low = near.below
                finer = equal_speed.reach(lambda ratio, low=low, build=build: build(ratio, low), time_of, asked, low)
                near = min((near, finer), key=lambda found: abs(found.speedup / asked - 1))
            file = path.with_name(f"way-{number}-{asked:g}.pt")
            torch.save(near.model, file)
            answer.append({
                **way, "asked": asked, "speedup there": near.speedup, "near": near.is_near(asked), "ratio": near.share,
                "sizes": sizes_of(near.model), "file": file.name,
            })  # fmt: skip
            print(json.dumps(answer[-1]), flush=True)
    path.with_name("answer.json").write_text(
        json.dumps({"version": version("torch-pruning"), "models": answer}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
