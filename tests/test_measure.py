"""measure: counts by arithmetic, times by what a clock would say of them."""

import copy
import json
import sys
import time
import warnings

import pytest
import torch
from torch import nn

import hf_compress as hc
from hf_compress.timing import bootstrap, take_turns
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


@pytest.mark.parametrize("library", ["torch", "torchao"])
def test_bytes_of_models_that_other_libraries_quantized(library):
    dense, batch = build("bert")
    linear = [m.weight.shape for m in dense.modules() if isinstance(m, nn.Linear)]
    model = copy.deepcopy(dense)
    if library == "torch":  # int8 for float, and a scale (4 bytes) and a zero point (8) a layer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        more = 12 * len(linear)
    else:  # a scale (4 bytes) and a zero point (1) a channel
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
        more = 5 * sum(outputs for outputs, _ in linear)
    expected = hc.measure(dense, batch, repeats=1).model.bytes - 3 * sum(a * b for a, b in linear) + more
    report = hc.measure(model, batch, against=dense, repeats=1)
    assert report.model.bytes == expected
    assert report.speedup > 0


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
    times = take_turns([lambda: time.sleep(0.002), lambda: time.sleep(0.006)], repeats=15, warmup=1)
    ratio = sorted(b / a for a, b in zip(*times, strict=True))[7]
    assert ratio == pytest.approx(3.0, rel=0.25)
    assert bootstrap([2.0] * 9) == (2.0, 2.0)


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
        ({"input": torch.zeros(2, 1)}, {"batch_sizes": 32}, r"a sequence of whole numbers >= 1, such as \(1, 32\), got 32"),
        ({"input": torch.zeros(2, 1)}, {"batch_sizes": [1, 0]}, r"whole numbers >= 1, got \[1, 0\]"),
        ({"input": torch.zeros(2, 1)}, {"batch_sizes": [True]}, "whole numbers >= 1"),
        ({"input": torch.tensor(1.0)}, {"batch_sizes": [1]}, "cannot tell which dimension of the inputs is the batch"),
        ({"a": torch.zeros(2, 1), "b": torch.zeros(3)}, {"batch_sizes": [1]}, r"is the batch \(a \(2, 1\), b \(3,\)\)"),
        ({"input": torch.zeros(2, 1)}, {"about": {"basemodel": "x"}}, "did you mean 'base_model'"),
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


class Clock:
    """Time that passes only where a model says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Rows(nn.Module):
    """So many seconds a row, and a record of what it was given."""

    main_input_name = "x"

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self.seconds, self.clock, self.seen = seconds, clock, []

    def forward(self, x: torch.Tensor, mask: torch.Tensor, table: torch.Tensor, flag: bool) -> torch.Tensor:
        self.seen.append((x, mask, table, flag))
        self.clock.now += self.seconds * len(x)
        return x


def test_other_batch_sizes_are_the_rows_again(monkeypatch):
    clock = Clock()
    for module in ("timing", "measure"):
        monkeypatch.setattr(sys.modules[f"hf_compress.{module}"], "time", clock)  # `measure` is also the function's name
    inputs = {"x": torch.arange(6).view(2, 3), "mask": torch.tensor([0, 1]), "table": torch.arange(5), "flag": True}
    model, dense = Rows(0.5, clock), Rows(1.5, clock)
    report = hc.measure(model, inputs, against=dense, repeats=5, warmup=0, batch_sizes=(1, 2, 5))
    assert [(t.batch, t.length, t.model.median, t.against.median) for t in report.timings] == [
        (1, 3, 0.5, 1.5),
        (2, 3, 1.0, 3.0),
        (5, 3, 2.5, 7.5),
    ]
    assert all(t.speedup == 3 and t.speedup_interval == (3, 3) and t.model.repeats == 5 for t in report.timings)
    assert len([x for x, *_ in model.seen if len(x) == 5]) == 1 + 5  # a trial, then timed
    assert report.timings[1].model == report.model.latency
    given = {len(x): (x.tolist(), mask.tolist(), table.tolist(), flag) for x, mask, table, flag in model.seen}
    assert given == {
        1: ([[0, 1, 2]], [0], [0, 1, 2, 3, 4], True),
        2: ([[0, 1, 2], [3, 4, 5]], [0, 1], [0, 1, 2, 3, 4], True),
        5: ([[0, 1, 2], [3, 4, 5]] * 2 + [[0, 1, 2]], [0, 1, 0, 1, 0], [0, 1, 2, 3, 4], True),
    }
    assert "5 x 3" in str(report)
    alone = hc.measure(model, inputs, repeats=1, warmup=0, batch_sizes=[1])
    assert alone.timings[0].against is alone.timings[0].speedup is None


def test_a_batch_size_that_does_not_run_is_refused_before_anything_is_timed():
    class Two(Rows):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x)
            if len(x) != 2:
                raise RuntimeError("two rows only")
            return x

    model = Two(0, Clock())
    with pytest.raises(hc.CompressionError, match="Two does not run on inputs .x 7x3.: RuntimeError: two rows only"):
        hc.measure(model, {"x": torch.zeros(2, 3)}, repeats=50, batch_sizes=[7])
    assert len(model.seen) == 2


def test_images_have_no_length():
    model, batch = build("vit")
    report = hc.measure(model, batch, repeats=1, warmup=0, batch_sizes=[3])
    assert (report.timings[0].batch, report.timings[0].length) == (3, None)


def test_what_can_be_seen_is_said():
    dense, batch = build("bert")
    small, _ = build("bert")
    hc.apply_(
        small,
        hc.Plan([hc.KeepHeads("bert.encoder.layer.1.attention.self", [0]), hc.KeepNeurons("bert.encoder.layer.0", [1, 2])]),
    )
    dense.config._name_or_path, dense.config._commit_hash = "me/base", "0123abc"
    about = hc.measure(small, batch, against=dense, repeats=1, warmup=0, about={"seed": 3, "versions": {"mine": "7"}}).about
    assert (about["base_model"], about["base_revision"], about["task"]) == ("me/base", "0123abc", "text-classification")
    assert (about["tier"], about["seed"], about["versions"]["mine"]) == ("plugin", 3, "7")
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["hf_compress"] == hc.__version__
    heads = about["blocks"]["model"]["heads"]
    assert list(heads.values()) == [4, 1, 4] and list(about["blocks"]["against"]["heads"].values()) == [4, 4, 4]
    assert about["blocks"]["model"]["neurons"]["bert.encoder.layer.0"] == 2
    told = hc.measure(dense, batch, repeats=1, warmup=0, about={"base_model": "you/other", "task": "other"}).about
    assert (told["base_model"], told["task"], told["tier"], "base_revision" in told) == ("you/other", "other", "stock", False)


def test_a_folder_is_not_taken_for_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").mkdir()
    options = dict(repeats=1, warmup=0)
    assert (
        hc.measure(nn.Linear(1, 1), {"input": torch.zeros(1, 1)}, about={"base_model": "dense"}, **options).about["base_model"]
        == "./dense"
    )


def test_a_module_that_is_given_a_weight_is_counted():
    """DeBERTa hands its position embeddings to a Linear, and torch's counter then looks for their gradient."""
    model, batch = build("deberta")
    frozen = next(model.parameters()).requires_grad_(False)
    rows, length = batch["input_ids"].shape
    positions = 2 * length
    per_row = length * (4 * 64 * 64 + 2 * 64 * 96) + 2 * length * length * 64 + 2 * length * positions * 64
    expected = 3 * (rows * per_row + 2 * positions * 64 * 64) + rows * (64 * 64 + 64 * 2)
    assert hc.measure(model, batch, repeats=1, warmup=0).model.macs == expected
    assert all(p.requires_grad is (p is not frozen) for p in model.parameters())
