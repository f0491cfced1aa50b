"""Second-order pruning of a small Llama against scores, at equal measured speed-up and without training. Writes JSON.

    python scripts/benchmark_llama.py --data ../shared/data/wikitext-2 --seeds 3 --speedups 1.5 2

Every seed trains a Llama on WikiText-2's validation text and keeps it in OUTPUT/dense-SEED. Then each way chooses which kv
groups and neurons stay, (a) as many of each block as `prune_to` chose, (b) the same share of every layer, found by timing. What
counts is the perplexity on the test text, pruned over dense; the speed-up is measured again for each, on one thread unless
--threads says otherwise. Conditions are in the JSON beside the numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import equal_speed
import torch
import transformers
import wikitext

import hf_compress as hc
from hf_compress.cutting import Block
from hf_compress.discover import Attention
from hf_compress.measure import conditions_of
from hf_compress.pruning.calibrate import Calibration
from hf_compress.pruning.compensate import compensated
from hf_compress.pruning.measured import derivatives, gates_of_blocks
from hf_compress.pruning.scores import SCORES
from hf_compress.pruning.select import count_units, fold, plan_of, weight_squares

Batches = list[dict[str, torch.Tensor]]
Sizes = Mapping[str, int]  # by block, units that stay
OURS = "second order (ours)"
MULTIPLE = 8  # of neurons, in uniform sizes


@torch.no_grad()
def wanda(model: Any, blocks: list[Block], batches: Batches) -> dict[str, torch.Tensor]:
    """`|W| * ||x||` (Wanda, Sun et al. 2023) summed over a unit's columns of the output projection."""
    squares: dict[str, Any] = {block.name: 0.0 for block in blocks}

    def see(block: Block) -> Callable[..., None]:
        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares[block.name] = squares[block.name] + inputs[0].float().square().flatten(0, -2).sum(0)

        return add

    hooks = [model.get_submodule(block.out).register_forward_pre_hook(see(block)) for block in blocks]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    norms = {name: value.sqrt() for name, value in squares.items()}
    weights = {block.name: model.get_submodule(block.out).weight.abs().sum(0) for block in blocks}
    return {block.name: fold(weights[block.name] * norms[block.name], block) for block in blocks}


def scores_of(model: Any, blocks: list[Block], batches: Batches) -> dict[str, dict[str, torch.Tensor]]:
    """By way: by block, one number a unit."""
    rows = derivatives(model, gates_of_blocks(blocks), batches, None, "taylor")
    return {
        "magnitude": {b.name: SCORES["magnitude"].reduce(weight_squares(model, b, {})) for b in blocks},
        "Taylor": {name: SCORES["taylor"].reduce(parts) for name, parts in rows.items()},
        "Wanda-structured": wanda(model, blocks, batches),
    }


def best_of(structure: Any, blocks: list[Block], scores: Mapping[str, torch.Tensor], sizes: Sizes) -> hc.Plan:
    """The plan that keeps the units of highest score, so many of each block."""
    kept = {b.name: sorted(scores[b.name].topk(sizes[b.name]).indices.tolist()) for b in blocks}
    attentions = {block.name for block in blocks if isinstance(block, Attention)}
    heads = {name: units for name, units in kept.items() if name in attentions}
    return plan_of(structure, heads, {name: units for name, units in kept.items() if name not in attentions})


def uniform(blocks: list[Block], groups: int, share: float) -> dict[str, int]:
    """So many kv groups of each layer, and neurons without this share."""
    sizes = {}
    for block in blocks:
        units = count_units(block)
        neurons = max(MULTIPLE, round((1 - share) * units / MULTIPLE) * MULTIPLE)
        sizes[block.name] = groups if isinstance(block, Attention) else min(units, neurons)
    return sizes


def uniform_at(asked: float, blocks: list[Block], most: int, small_of: Callable[[Sizes], Any], time_of: Any) -> dict[str, int]:
    """The uniform sizes of this speed-up whose shares of kv groups and neurons are nearest to each other.

    Kv groups are few, so one share for both would jump over the target: for every number of groups the neurons are searched.
    """
    found: list[tuple[float, dict[str, int]]] = []
    for groups in range(most, 0, -1):
        near = equal_speed.reach(lambda share, g=groups: small_of(uniform(blocks, g, share)), time_of, asked)
        if near.is_near(asked):
            found.append((abs(groups / most - (1 - near.share)), uniform(blocks, groups, near.share)))
            if len(found) > 1 and found[-1][0] > found[-2][0]:  # the shares part again
                break
    if not found:
        raise SystemExit(f"No uniform sizes came within {equal_speed.WITHIN:.0%} of {asked:g}x; is the machine busy?")
    return min(found, key=lambda pair: pair[0])[1]


def one_seed(dense: Any, args: Any, batches: Batches, inputs: Any, test: wikitext.Rows, seed: int) -> list[dict[str, Any]]:
    structure = hc.discover(dense)
    blocks: list[Block] = [*structure.attentions, *structure.own_ffns]
    before = wikitext.perplexity(dense, test)
    scores = scores_of(dense, blocks, batches)
    start = time.perf_counter()
    family = hc.prune_family(dense, batches, args.speedups, inputs=inputs)
    seconds = time.perf_counter() - start
    found: list[dict[str, Any]] = []

    def note(asked: float, way: str, sizes_of: str, sizes: Sizes, plan: hc.Plan) -> None:
        small = hc.apply_(copy.deepcopy(dense), plan)
        speedup, interval = equal_speed.timed(dense, small, inputs, args.pairs)
        after = wikitext.perplexity(small, test)
        found.append({
            "seed": seed, "asked": asked, "way": way, "sizes of": sizes_of, "speedup": speedup, "interval": interval,
            "dense perplexity": before, "perplexity": after, "ratio": after / before, "sizes": dict(sizes),
        })  # fmt: skip
        print(json.dumps({k: v for k, v in found[-1].items() if k != "sizes"}), flush=True)

    def small_of(sizes: Sizes) -> Any:  # whichever units stay: to be timed
        return hc.apply_(copy.deepcopy(dense), best_of(structure, blocks, scores["magnitude"], sizes))

    for pruned in family:
        chosen = {name: left for name, (left, _) in pruned.sizes.items()}
        most = min(count_units(block) for block in structure.attentions)
        same = uniform_at(pruned.asked, blocks, most, small_of, lambda m: equal_speed.timed(dense, m, inputs)[0])
        for sizes_of, sizes in (("prune_to", chosen), ("uniform", same)):
            if sizes_of == "prune_to":
                plan = pruned.plan
            else:
                less = {block.name: same[block.name] for block in blocks if same[block.name] < count_units(block)}
                plan = compensated(Calibration(dense, structure, blocks, batches), less)[0]
            note(pruned.asked, OURS, sizes_of, sizes, plan)
            for way, values in scores.items():
                note(pruned.asked, way, sizes_of, sizes, best_of(structure, blocks, values, sizes))
    print(f"seed {seed}: dense perplexity {before:.1f}; the family took {seconds:.0f} s", flush=True)
    return found


def table(found: list[dict[str, Any]], speedups: list[float]) -> str:
    """Markdown: perplexity, pruned over dense; the mean over seeds, and each where there are several."""
    lines = [f"| way | sizes of | {' | '.join(f'{s:g}x' for s in speedups)} |", "|---|---|" + "---|" * len(speedups)]
    for sizes_of in ("prune_to", "uniform"):
        for way in dict.fromkeys(row["way"] for row in found):
            cells = []
            for asked in speedups:
                mine = [r for r in found if (r["way"], r["sizes of"], r["asked"]) == (way, sizes_of, asked)]
                each = f" ({', '.join(format(r['ratio'], '.3f') for r in mine)})" if len(mine) > 1 else ""
                cells.append(f"{fmean(r['ratio'] for r in mine):.3f}{each} at {fmean(r['speedup'] for r in mine):.2f}x")
            lines.append(f"| {way} | {sizes_of} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=wikitext.DATA, help="folder with valid.txt (to train on) and test.txt")
    parser.add_argument("--output", default="runs/llama")
    parser.add_argument("--seeds", type=int, default=3, help="models, each trained from its own start")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--words", type=int, default=2048, help="tokens of the vocabulary")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=4, help="kv heads")
    parser.add_argument("--neurons", type=int, default=688)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=256, help="of the training text, to calibrate on")
    parser.add_argument("--test-rows", type=int, default=None, help="of the test text; all by default")
    parser.add_argument("--batch", type=int, default=8, help="of the timing")
    parser.add_argument("--pairs", type=int, default=30, help="of timed passes for the speed-up that is reported")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    wikitext.need(args.data)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    tokenizer = wikitext.tokenizer_of(output / "tokenizer", args.data, args.words)
    train = wikitext.rows_of(Path(args.data) / "valid.txt", tokenizer, args.length)
    test = wikitext.spread(wikitext.rows_of(Path(args.data) / "test.txt", tokenizer, args.length), args.test_rows)
    batches = wikitext.batches(wikitext.spread(train, args.rows), 16)
    inputs = {"input_ids": wikitext.batches(test, args.batch)[0]["input_ids"]}
    found: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        dense = wikitext.llama(output / f"dense-{seed}", train, tokenizer, args, seed)
        found += one_seed(dense, args, batches, inputs, test, seed)
        conditions = {
            **conditions_of(dense, inputs), "test rows": len(test), "transformers": transformers.__version__,
            "hf_compress": hc.__version__, "load": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        result = {"conditions": conditions, "runs": found, "arguments": vars(args)}
        (output / "llama.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(table(found, args.speedups))


if __name__ == "__main__":
    main()
