"""measure: counts by arithmetic, times by what a clock would say of them."""

import json
import time

import pytest
import torch
from torch import nn

import hf_compress as hc
from hf_compress.measure import _bootstrap, _take_turns
from tests.zoo import build, random_plan


def test_counts_are_those_of_the_architecture():
    model, batch = build("bert")
    report = hc.measure(model, batch, repeats=2)
    rows, length = batch["input_ids"].shape
    # per layer: 4 projections and 2 FFN matrices per token, scores and mixing per pair of tokens; pooler and head per row
    layer = length * (4 * 64 * 64 + 2 * 64 * 96) + 2 * length * length * 64
    assert report.model.macs == rows * (3 * layer + 64 * 64 + 64 * 2)
    assert report.model.parameters == sum(p.numel() for p in model.parameters())
    embeddings = (99 + 40 + 2) * 64
    assert report.model.parameters - report.model.parameters_encoder == embeddings
    stored = sum(p.numel() * 4 for p in model.parameters())
    assert report.model.bytes == pytest.approx(stored, rel=0.01)


def test_bytes_are_those_of_the_file(tmp_path):
    for family in ("bert", "gpt2", "t5", "llama"):  # tied and untied
        model, batch = build(family)
        hc.apply_(model, random_plan(model, ("heads", "neurons")))
        model.save_pretrained(tmp_path / family)
        file = (tmp_path / family / "model.safetensors").stat().st_size
        assert hc.measure(model, batch, repeats=1).model.bytes == pytest.approx(file, rel=0.12)
        assert hc.measure(model, batch, repeats=1).model.bytes <= file


def test_against_takes_turns_and_reports_a_ratio():
    dense, batch = build("bert")
    small, _ = build("bert")
    hc.apply_(small, random_plan(small, ("heads", "neurons", "layers")))
    report = hc.measure(small, batch, against=dense, repeats=5, metrics={"accuracy": 0.5}, metrics_against={"accuracy": 1})
    low, high = report.speedup_interval
    assert low <= report.speedup <= high and report.speedup_allowed > 1
    assert report.model.macs < report.against.macs and report.model.bytes < report.against.bytes
    assert report.model.metrics == {"accuracy": 0.5} and report.against.metrics == {"accuracy": 1.0}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    text = str(report)
    for word in ("MACs", "encoder only", "Amdahl", "threads", "input_ids 2x10", "accuracy", f"{report.speedup:.2f}x"):
        assert word in text


def test_a_known_ratio_is_found():
    times = _take_turns([lambda: time.sleep(0.002), lambda: time.sleep(0.006)], repeats=15, warmup=1)
    ratio = sorted(b / a for a, b in zip(*times, strict=True))[7]
    assert ratio == pytest.approx(3.0, rel=0.25)
    assert _bootstrap([2.0] * 9) == (2.0, 2.0)


class Slow(nn.Module):
    """Three quarters of its time in one module that can be cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.rest = nn.Linear(8, width), nn.Linear(width, 8), Wait(0.002)
        self.work = Wait(0.006 * width / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.down(self.work(self.up(x))))


class Wait(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def test_amdahl_allows_what_the_rest_leaves():
    """Half of three quarters goes: 8 ms become 5."""
    report = hc.measure(Slow(32), {"x": torch.zeros(2, 8)}, against=Slow(64), repeats=5)
    assert report.speedup_allowed == pytest.approx(8 / 5, rel=0.1)
    assert report.speedup == pytest.approx(8 / 5, rel=0.15)


def test_metrics_may_be_a_function_and_the_model_is_left_alone():
    model, batch = build("vit")
    model.train()
    report = hc.measure(model, batch, against=model, metrics=lambda m: {"layers": len(m.vit.layers)}, repeats=1)
    assert report.model.metrics == report.against.metrics == {"layers": 3.0}
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({}, {}, "must be a batch"),
        ([1], {}, "got list"),
        ({"x": torch.zeros(1)}, {"repeats": 0}, "repeats must be a whole number >= 1"),
    ],
)
def test_refusals(inputs, options, message):
    with pytest.raises(hc.CompressionError, match=message):
        hc.measure(nn.Linear(1, 1), inputs, **options)


@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 8, "activations": "tensor"}, {"bits": 4}, {"bits": 2, "decode": "call"}]
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_quantized_model_has_the_numbers_and_the_work_of_the_float_one(family, options):
    dense, batch = build(family)
    small = build(family)[0]
    hc.apply_(small, hc.plan_quantization(small, **options))
    report = hc.measure(small, batch, against=dense, repeats=1, warmup=0)
    assert report.model.parameters == report.against.parameters
    assert report.model.parameters_encoder == report.against.parameters_encoder
    assert report.model.macs == report.against.macs
    assert report.model.bytes < report.against.bytes / 2


def test_work_of_low_rank_layers():
    dense, batch = build("bert")
    small = build("bert")[0]
    plan = hc.plan_low_rank(small, rank=4)
    saved = sum(
        4 * sum(small.get_submodule(e.module).weight.shape) - small.get_submodule(e.module).weight.numel() for e in plan
    )
    hc.apply_(small, plan)
    report = hc.measure(small, batch, against=dense, repeats=1, warmup=0)
    assert report.model.parameters - report.against.parameters == saved
    assert report.model.macs - report.against.macs == saved * batch["input_ids"].numel()
    quantized = build("bert")[0]
    hc.apply_(quantized, plan + hc.Plan([hc.Quantize(e.module) for e in plan]))
    again = hc.measure(quantized, batch, repeats=1, warmup=0)
    assert (again.model.parameters, again.model.macs) == (report.model.parameters, report.model.macs)


def test_exits_are_on_while_they_are_measured():
    dense, batch = build("bert")
    small = build("bert")[0]
    hc.apply_(small, hc.Plan([hc.AddExits([0], threshold=0.5)]))  # of two classes one has that much: all leave
    report = hc.measure(small, batch, against=dense, repeats=1, warmup=0)
    assert report.model.macs < report.against.macs / 2
