"""Which int8 kernel is the fastest on this CPU, one linear layer at a time and in a whole encoder. Writes JSON and a table.

    python scripts/benchmark_kernels.py --output runs/kernels.json --table docs/int8.md

Everything is timed in turn, in rounds, and given as the median over rounds of (dense fp32 eager / candidate), so that a
machine that slows down for a while slows all alike. With one thread the clock is the thread's own time, which other work on
the machine does not enter; with several it is the wall clock, and the machine must be quiet. torchao and ONNX Runtime take
part where they are installed: `pip install torchao onnx onnxruntime onnxscript`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from sst2 import packaged_minilm
from torch import nn
from transformers import AutoModel

import hf_compress as hc
from hf_compress.quantization import quantize_

SHAPES = [(384, 384), (384, 1536), (1536, 384), (384, 192), (384, 771), (771, 384), (768, 384)]
ROWS = (2048, 64, 16)
BATCHES = ((32, 64), (1, 16))
TOKEN, TENSOR = "per token", "per tensor"
Run = Callable[..., torch.Tensor]
PAGE = """*Per token*: each row of activations has its own scale, so a row's result does not depend on what shares its batch.
*Per tensor*: one scale for the whole batch.

`hf_compress` quantizes each row with FBGEMM's byte kernel (one pass over memory; minimum and scale lie behind the row),
multiplies with oneDNN's unsigned x signed kernel, whose output is already scaled per channel, and finishes with two fused
multiply-adds (row scale and bias; row minimum). The other two per-token columns are the designs that were not taken: the same
product after separate steps (maximum, multiply, round, convert), and `torch._int_mm`, whose int32 output has to be read
again. With 16 rows a call costs more than the arithmetic, and there the fixed cost of oneDNN's operation shows: `_int_mm`
and everything in one C++ call (torch's and ONNX Runtime's per-tensor kernels) are ahead.

What to know:

- oneDNN's *signed* x signed form of the same operation falls back to a reference kernel (seconds for one layer), so rows
  are unsigned, from their minimum on. That also halves the step of what ReLU puts out, and nearly that of GELU.
- On a CPU without VNNI the product saturates in 16 bits (seen with `ONEDNN_MAX_CPU_ISA=AVX2` and `AVX512_CORE`;
  `torch._int_mm` is wrong there too). The kernel is asked at import; where it is not exact, and on GPUs (not tried), the
  decoded weights and the same rounded activations are multiplied in floating point: right, and no faster than dense.
- Infinities among the activations give NaN, as they may in a dense layer; a NaN is rounded like a number.
- Rounding is a step function: noise of 1e-7 on what MiniLM's embeddings put out moves its last hidden state by 4 to 5% of
  its norm, nearly as much as int8 itself does. Two right int8 implementations agree layer by layer (1e-6), not at the end
  of a network; eager against compiled is an example. The same code on the same input is the same to the bit, in any batch.
- Under `torch.compile` and `torch.export` the same integers go through `torch._int_mm` and fused steps, in one graph.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/kernels.json")
    parser.add_argument("--table", default=None, help="also write the markdown page")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes (needs a C++ compiler)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    result: dict[str, Any] = {"conditions": conditions(args.threads, args.rounds), "linear": [], "model": []}
    with torch.no_grad():
        for rows in ROWS:
            for size, out in SHAPES:
                x = torch.randn(rows, size)
                found = compare(linear_candidates(nn.Linear(size, out), args.threads), (x,), args.rounds, clock)
                result["linear"].append({"rows": rows, "in": size, "out": out, "candidates": found})
                show(f"{rows} x {size} -> {out}", found)
        for name, model in (("dense", minilm()), ("half pruned", half_pruned(minilm()))):
            for batch, length in BATCHES:
                ids = torch.randint(1000, 20000, (batch, length))
                found = compare(
                    model_candidates(model, ids, args.threads, not args.no_compile),
                    (ids, torch.ones_like(ids)),
                    args.rounds,
                    clock,
                )
                result["model"].append({"model": name, "batch": batch, "length": length, "candidates": found})
                show(f"MiniLM {name} {batch} x {length}", found)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1))
    page = markdown(result)
    print(page)
    if args.table:
        Path(args.table).parent.mkdir(parents=True, exist_ok=True)
        Path(args.table).write_text(page)


# --- timing ------------------------------------------------------------------------------------------------------


def compare(
    candidates: dict[str, tuple[str, Run]], inputs: tuple[torch.Tensor, ...], rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Median milliseconds, the median ratio to the first of the same round, and the error relative to the first."""
    for _, run in candidates.values():
        for _ in range(3):
            run(*inputs)
    expected = next(iter(candidates.values()))[1](*inputs)
    start = clock()
    expected = next(iter(candidates.values()))[1](*inputs)
    repeats = max(1, int(2e-3 / max(clock() - start, 1e-6)))  # a round of a small layer is several calls
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (_, run) in candidates.items():
            run(*inputs)  # the one before may have left the caches to others
            start = clock()
            for _ in range(repeats):
                run(*inputs)
            times[name].append((clock() - start) / repeats)
    first = torch.tensor(next(iter(times.values())))
    return {
        name: {
            "activations": candidates[name][0],
            "milliseconds": torch.tensor(seconds).median().item() * 1e3,
            "speedup": (first / torch.tensor(seconds)).median().item(),
            "error": ((candidates[name][1](*inputs) - expected).norm() / expected.norm()).item(),
        }
        for name, seconds in times.items()
    }


# --- one linear layer --------------------------------------------------------------------------------------------


def linear_candidates(layer: nn.Linear, threads: int) -> dict[str, tuple[str, Run]]:
    assert layer.bias is not None
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    integers = (layer.weight / scale).round().to(torch.int8)

    def int_mm(x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(1, keepdim=True) / 127
        product = torch._int_mm((x / step).round_().to(torch.int8), integers.t())  # type: ignore[attr-defined]
        return product * scale.t() * step + layer.bias

    blocks = torch.ops.onednn.qlinear_prepack(integers, None)
    flat, points = scale.flatten(), torch.zeros(len(scale), dtype=torch.int32)

    def onednn_rows(x: torch.Tensor) -> torch.Tensor:
        step = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_()).div_(127)
        rows = x.mul(step.reciprocal()).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, blocks, flat, points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(step).add_(layer.bias)

    found: dict[str, tuple[str, Run]] = {"dense fp32": ("-", layer)}
    for activations, semantics in (("token", TOKEN), ("tensor", TENSOR)):
        ours = copy.deepcopy(layer)
        quantize_(ours, bits=8, activations=activations)
        found[f"hf_compress, {semantics}"] = semantics, ours
    found["torch._int_mm, separate steps"] = TOKEN, int_mm
    found["oneDNN u8 x s8, separate steps"] = TOKEN, onednn_rows
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {nn.Linear}, torch.qint8)
    found["torch quantize_dynamic"] = TENSOR, dynamic
    if installed("torchao"):
        found["torchao, eager"] = TOKEN, torchao_quantized(nn.Sequential(copy.deepcopy(layer)))
    if installed("onnxruntime") and installed("onnx"):
        found["ONNX Runtime dynamic"] = TENSOR, onnx_linear(layer, threads)
    return found


def onnx_linear(layer: nn.Linear, threads: int) -> Run:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = [
        numpy_helper.from_array(layer.weight.detach().t().contiguous().numpy(), "w"),
        numpy_helper.from_array(layer.bias.detach().numpy(), "b"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    sides = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])]
        for name, size in (("x", layer.in_features), ("y", layer.out_features))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "linear", *sides, tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/model.onnx")
        return onnx_dynamic(folder, threads)


# --- a whole encoder ---------------------------------------------------------------------------------------------


def minilm() -> nn.Module:
    return AutoModel.from_pretrained(packaged_minilm()).eval()


def half_pruned(model: nn.Module) -> nn.Module:
    """Half of the heads and of the neurons, any half: only shapes matter here."""
    structure = hc.discover(model)
    edits: list[Any] = [hc.KeepHeads(a.name, range(a.num_heads // 2)) for a in structure.attentions]
    hc.apply_(model, hc.Plan([*edits, *(hc.KeepNeurons(f.name, range(f.size // 2)) for f in structure.ffns)]))
    return model


def model_candidates(model: nn.Module, ids: torch.Tensor, threads: int, compiles: bool) -> dict[str, tuple[str, Run]]:
    def run_of(module: Any) -> Run:
        return lambda ids, mask: module(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[misc]

    models: dict[str, tuple[str, Any]] = {"dense fp32": ("-", model)}
    for activations, semantics in (("token", TOKEN), ("tensor", TENSOR)):
        ours = copy.deepcopy(model)
        for module in list(ours.modules()):
            if type(module) in (nn.Linear, nn.Embedding):
                quantize_(module, bits=8, activations=activations)
        models[f"hf_compress, {semantics}"] = semantics, ours
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    models["torch quantize_dynamic"] = TENSOR, dynamic
    if installed("torchao"):
        models["torchao, eager"] = TOKEN, torchao_quantized(copy.deepcopy(model))
    if compiles:
        torch._dynamo.reset()
        for name in ("dense fp32", f"hf_compress, {TOKEN}", "torchao, eager"):
            if name in models:
                semantics, module = models[name]
                models[f"{name.removesuffix(', eager')}, compiled"] = semantics, torch.compile(copy.deepcopy(module))
    found = {name: (semantics, run_of(module)) for name, (semantics, module) in models.items()}
    if installed("onnxruntime") and installed("onnx") and installed("onnxscript"):
        found["ONNX Runtime fp32"], found["ONNX Runtime dynamic"] = onnx_models(model, ids, threads)
    return found


def torchao_quantized(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    torchao_quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def onnx_models(model: nn.Module, ids: torch.Tensor, threads: int) -> tuple[tuple[str, Run], tuple[str, Run]]:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    with tempfile.TemporaryDirectory() as folder:
        inputs = (ids, torch.ones_like(ids))
        torch.onnx.export(Plain(), inputs, f"{folder}/model.onnx", dynamo=True, external_data=False, verbose=False)
        return ("-", onnx_run(f"{folder}/model.onnx", threads)), (TENSOR, onnx_dynamic(folder, threads))


def onnx_dynamic(folder: str, threads: int) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(f"{folder}/model.onnx", f"{folder}/int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    return onnx_run(f"{folder}/int8.onnx", threads)


def onnx_run(path: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads disturb the others
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


# --- the page ----------------------------------------------------------------------------------------------------


def installed(package: str) -> bool:
    try:
        version(package)
        return True
    except PackageNotFoundError:
        return False


def conditions(threads: int, rounds: int) -> dict[str, Any]:
    packages = ("torch", "transformers", "torchao", "onnxruntime")
    missing = [p for p in packages if not installed(p)]
    for package in missing:
        print(f"{package} is not installed: skipped", file=sys.stderr)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor(),
        "vnni": [flag for flag in flags if "vnni" in flag],
        "threads": threads,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in packages if p not in missing},
        "skipped": missing,
    }


def show(title: str, found: dict[str, Any]) -> None:
    print(f"{title:<28}", "  ".join(f"{name} {row['speedup']:.2f}" for name, row in found.items()), flush=True)


def markdown(result: dict[str, Any]) -> str:
    told = result["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    skipped = f" Not installed, so left out: {', '.join(told['skipped'])}." if told["skipped"] else ""
    lines = [
        "# int8 on the CPU: what was measured",
        "",
        f"Written by `scripts/benchmark_kernels.py` on {told['cpu']} ({', '.join(told['vnni'])}), "
        f"{'1 thread (time of the thread)' if told['threads'] == 1 else str(told['threads']) + ' threads (wall clock)'}, "
        f"load average {told['load']}, {versions}, Python {told['python']}. Numbers are speed-ups over dense fp32 in eager "
        f"PyTorch: the median over {told['rounds']} rounds, in each of which everything ran in turn.{skipped}",
        "",
        PAGE,
        "## One linear layer (rows x in → out)",
        "",
    ]
    lines += table([(f"{r['rows']} x {r['in']} → {r['out']}", r["candidates"]) for r in result["linear"]])
    lines += ["", "## A whole encoder (all-MiniLM-L6-v2, batch x length)", ""]
    lines += table([(f"{r['model']} {r['batch']} x {r['length']}", r["candidates"]) for r in result["model"]])
    lines += [
        "",
        "Errors are relative, of the layer's output or of the last hidden state (on random tokens) to dense fp32. Embeddings "
        "are int8 in ours only. torchao's and ONNX Runtime's integers are theirs; compiled models are inductor's.",
        "",
    ]
    return "\n".join(lines)


def table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line for each shape, a column for each candidate; the first column is the baseline's time."""
    names = list(rows[0][1])
    first = rows[0][1]
    lines = [f"| | {names[0]} | " + " | ".join(names[1:]) + " |", "|---|" + "---|" * len(names)]
    lines.append("| *activations* | | " + " | ".join(first[name]["activations"] for name in names[1:]) + " |")
    for title, found in rows:
        cells = [f"{found[name]['speedup']:.2f}" for name in names[1:]]
        lines.append(f"| {title} | {found[names[0]]['milliseconds']:.3g} ms | " + " | ".join(cells) + " |")
    lines.append(f"| *error, {rows[0][0]}* | | " + " | ".join(f"{first[name]['error']:.4f}" for name in names[1:]) + " |")
    return lines


if __name__ == "__main__":
    main()
