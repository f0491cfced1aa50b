"""The families x edits table for every family of the tests, as Markdown or JSON.

`exact`: what the edit promises holds (cut == mask; or the model equals its float form with the weights that the new modules
stand for, int8 activations within a few roundings), and another process loads the checkpoint equal to the bit.

python scripts/families.py            # prints the table
python scripts/families.py --json     # one row per family and edit
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

import hf_compress as hc
from tests.reader import Reader
from tests.zoo import FAMILIES, NO_HEADS, NO_LAYERS, build, outputs, random_plan

EDITS = {
    "KeepHeads": ("heads",),
    "KeepNeurons": ("neurons",),
    "KeepLayers": ("layers",),
    "all three": ("heads", "neurons", "layers"),
    "LowRank": lambda model: hc.plan_low_rank(model, ratio=0.5),
    "Quantize, 8 bit": lambda model: hc.plan_quantization(model, bits=8),
    "Quantize, 4 bit": lambda model: hc.plan_quantization(model, bits=4),
}


def judge_kinds(family: str, make, reader: Reader) -> dict:
    """`apply_` itself compares with the float form (`substitute`); here the comparison with the reader's is added."""
    model, batch = build(family)
    dense = outputs(model, batch)
    try:
        changed = outputs(hc.apply_(model, make(model)), batch)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = reader.outputs(type(model).__name__, folder, batch)
        equal = any(v.shape == changed.shape and torch.equal(v, changed) for v in found.values())
    except hc.CompressionError as error:
        return {"verdict": f"refused: {error}"}
    moved = (changed - dense).abs().max().item()
    return {"verdict": "exact" if equal and moved > 0 else "wrong", "moved": moved, "loads_equal": equal, "stock": False}


def judge(family: str, edits, reader: Reader) -> dict:
    if callable(edits):
        return judge_kinds(family, edits, reader)
    model, batch = build(family)
    plan = random_plan(model, edits)
    if not plan.edits or (family in NO_LAYERS and edits == ("layers",)) or (family in NO_HEADS and edits == ("heads",)):
        return {"verdict": "nothing to cut"}
    try:
        with hc.mask_(model, plan):
            masked = outputs(model, batch)
        cut = outputs(hc.apply_(model, plan), batch)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = reader.outputs(type(model).__name__, folder, batch)
        equal = any(v.shape == cut.shape and torch.equal(v, cut) for v in found.values())
    except hc.CompressionError as error:
        return {"verdict": f"refused: {error}"}
    difference = (masked - cut).abs().max().item()
    stock = getattr(model.config, "quantization_config", None) is None
    exact = difference <= 1e-5 * max(1.0, masked.abs().max().item()) and equal
    return {"verdict": "exact" if exact else "wrong", "mask_minus_cut": difference, "loads_equal": equal, "stock": stock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON rows instead of a table")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with Reader(plugin=True) as reader:
        for family in args.families:
            rows.append({"family": family, **{name: judge(family, edits, reader) for name, edits in EDITS.items()}})
    if args.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print("| family | " + " | ".join(EDITS) + " |\n|---|" + "---|" * len(EDITS))
        for row in rows:
            cells = [f"{r['verdict']}{' (stock)' if r.get('stock') else ''}" for r in (row[name] for name in EDITS)]
            print(f"| {row['family']} | " + " | ".join(cells) + " |")
    verdicts = [row[name]["verdict"] for row in rows for name in EDITS]
    judged = [v for v in verdicts if v != "nothing to cut"]
    print(
        f"\n{judged.count('exact')} of {len(judged)} exact, {judged.count('wrong')} wrong, {len(rows)} families",
        file=sys.stderr,
    )
    sys.exit(0 if all(v == "exact" for v in judged) else 1)


if __name__ == "__main__":
    main()
