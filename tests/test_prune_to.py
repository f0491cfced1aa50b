"""`prune_to` on every family: exact cuts with weights that make up for what goes, to a target that is met."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as T

import hf_compress as hc
from hf_compress import timing
from hf_compress.compensation import is_plain
from hf_compress.discover import discover
from hf_compress.pruning import latency, prices, target
from hf_compress.pruning.calibrate import Calibration, of_the_first
from hf_compress.pruning.compensate import compensated, curves, unit_counts
from hf_compress.pruning.latency import LatencyTable
from hf_compress.pruning.select import trial_plan
from hf_compress.pruning.sensitivity import sensitivities
from hf_compress.pruning.surgeon import Moments
from hf_compress.surgery import prove_variants
from tests.sweep.build import build as built
from tests.zoo import FAMILIES, build

CHAINS = {"bert": 3, "llama": 3, "gpt2": 3, "vit": 3, "t5": 6, "bart": 6}  # layers that are run one by one
SIZES = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)


def bert(**more):
    torch.manual_seed(0)
    model = T.BertForSequenceClassification(T.BertConfig(**SIZES, **more)).eval()
    with torch.no_grad():  # weights that do something: those of a new model hardly change what goes through
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def texts(count=4, rows=16, length=12):
    draw = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[: rows // 2, -4:] = 0
        batches.append({"input_ids": torch.randint(5, 99, (rows, length), generator=draw), "attention_mask": mask})
    return batches


def blocks_of(model):
    found = discover(model)
    return [b for b in (*found.attentions, *found.own_ffns) if b.consumer is None]


def half(blocks):
    return {name: max(1, count // 2) for name, count in unit_counts(blocks).items()}


def several(family):
    """The family's batch, and others of the same kind."""
    model, batch = build(family)
    draw = torch.Generator().manual_seed(2)
    batches = [batch]
    for _ in range(5):
        other = dict(batch)
        for key, value in batch.items():
            if value.is_floating_point():
                other[key] = torch.randn(value.shape, generator=draw)
            elif key.endswith("input_ids"):
                other[key] = torch.randint(5, 90, value.shape, generator=draw)
        batches.append(other)
    return model, batches


def first(outputs):
    return outputs.logits if "logits" in outputs else next(v for v in outputs.values() if isinstance(v, torch.Tensor))


DAILY = ("bert", "albert", "llama", "gpt2", "t5", "vit", "bart", "wav2vec2", "clip")  # the others are slow


def families():
    for name in FAMILIES:
        yield pytest.param(name, marks=() if name in DAILY else pytest.mark.slow)


@pytest.mark.parametrize("family", families())
def test_every_family_is_cut_as_it_is_masked(family, tmp_path):
    model, batches = several(family)
    blocks = [b for b in blocks_of(model) if is_plain(model.get_submodule(b.out))]
    if not blocks:
        pytest.skip("no block has a Linear of its own as output projection")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan, lost = compensated(Calibration(model, discover(model), blocks, batches), half(blocks))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert lost.keys() == {b.name for b in blocks}
    plan.save(tmp_path / "plan")
    assert hc.Plan.load(tmp_path / "plan") == plan
    with torch.no_grad():
        dense = first(model(**batches[0]))
        with hc.mask_(model, plan):
            masked = first(model(**batches[0]))
        assert torch.equal(first(model(**batches[0])), dense)
        hc.apply_(model, plan)
        cut = first(model(**batches[0]))
        assert (cut - masked).abs().max() <= 1e-5 * masked.abs().max() and not torch.equal(cut, dense)
        model.save_pretrained(tmp_path / "model")
        loaded = type(model).from_pretrained(tmp_path / "model").eval()
        assert torch.equal(first(loaded(**batches[0])), cut)


@pytest.mark.parametrize("family", CHAINS)
def test_layer_by_layer_is_as_the_model_as_a_whole(family, monkeypatch):
    """What is run layer by layer from kept calls says what full forwards say."""
    model, batches = several(family)
    blocks = blocks_of(model)
    chain = Calibration(model, discover(model), blocks, batches)
    assert len([s for s in chain.segments if s.path]) == CHAINS[family] and all(s.path or not s.blocks for s in chain.segments)
    plan, lost = compensated(chain, half(blocks))
    monkeypatch.setattr(Calibration, "_is_chain", staticmethod(lambda *_: False))
    whole = Calibration(model, discover(model), blocks, batches)
    assert [s.path for s in whole.segments] == [""]
    # the last place in the stream is found in the layer, or in what comes after it: the same tensor
    other, lost_there = compensated(whole, half(blocks))
    assert [vars(e) for e in plan] == [vars(e) for e in other]
    for name, tensor in plan.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], atol=2e-4, rtol=2e-3)
    assert lost == pytest.approx(lost_there, rel=1e-2, abs=1e-4)


def test_the_stream_is_found_where_outputs_are_added():
    places = {}
    for family in ("bert", "llama", "gpt2", "vit"):
        model, batches = several(family)
        calibration = Calibration(model, discover(model), blocks_of(model), batches)
        segment = calibration.segments[0]
        calibration.begin(segment, False)
        places[family] = [calibration.place(segment, block) for block in segment.blocks]
    assert places["bert"] == [("attention.output.LayerNorm", "in"), ("output.LayerNorm", "in")]
    assert places["llama"] == [("post_attention_layernorm", "in"), ("", "out")]
    assert places["gpt2"] == [("ln_2", "in"), ("", "out")]
    assert places["vit"] == [("layernorm_after", "in"), ("", "out")]


def test_moments_are_those_of_real_tokens():
    """Against what hooks see in a plain forward, with padding taken out by hand."""
    model, batches = bert(), texts()
    blocks = blocks_of(model)
    calibration = Calibration(model, discover(model), blocks, batches)
    for segment in calibration.segments:
        calibration.begin(segment, False)
        found = calibration.moments(segment, segment.blocks)
        for block in segment.blocks:
            seen = []
            module = model.get_submodule(block.out)
            hook = module.register_forward_hook(lambda m, a, o, seen=seen: seen.append((a[0], o)))
            rows = []
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
                    x, y = seen.pop()
                    real = batch["attention_mask"].bool()
                    rows.append((x[real], y[real]))
            hook.remove()
            x, y = (torch.cat(part).double() for part in zip(*rows, strict=True))
            assert found[block.name].count == len(x) == 4 * 16 * 10
            torch.testing.assert_close(found[block.name].xx.double(), x.T @ x, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found[block.name].tx.double(), y.T @ x, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found[block.name].t.double(), y.sum(0), rtol=1e-4, atol=1e-3)


def test_later_layers_make_up_for_earlier_ones():
    """On the calibration rows the last hidden states are nearer than with the same units cut uncompensated, and than with
    weights that make up for each block by itself."""
    for family in ("bert", "llama", "gpt2", "vit", "t5"):
        model, batches = several(family)
        blocks = blocks_of(model)
        plan, _ = compensated(Calibration(model, discover(model), blocks, batches), half(blocks))
        bare = hc.Plan([type(edit)(*list(vars(edit).values())[:2]) for edit in plan])

        def off(edits, model=model, batches=batches):
            total = 0.0
            with torch.no_grad():
                for batch in batches:
                    dense = first(model(**batch))
                    with hc.mask_(model, edits):
                        total += (first(model(**batch)) - dense).square().mean().item()
            return total

        assert off(plan) < 0.5 * off(bare), family


def test_sensitivity_against_finite_differences(monkeypatch):
    """With one row of one token, the gradient at a projection's output is that at its bias."""
    from hf_compress.pruning import sensitivity

    model = bert().double()
    batch = {"input_ids": torch.tensor([[7]])}
    monkeypatch.setattr(sensitivity, "projected", lambda out, draw, mask: out.logits.log_softmax(-1)[0, 1])
    blocks = blocks_of(model)
    found = sensitivities(Calibration(model, discover(model), blocks, [batch]))
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())
    for block in (blocks[0], blocks[-1]):
        bias = model.get_submodule(block.out).bias
        for i in (0, 17):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    bias[i] += step
                    ends.append(model(**batch).logits.log_softmax(-1)[0, 1].item())
                    bias[i] -= step
            slope = (ends[0] - ends[1]) / 2e-5
            assert found[block.name][i].item() == pytest.approx(slope**2, rel=1e-3)


def test_the_random_direction_has_the_covariance_of_the_predictions():
    from hf_compress.pruning.sensitivity import projected

    z = torch.tensor([0.0, 2.0, 1.0])
    logits = z.repeat(40_000, 1).requires_grad_()
    projected({"logits": logits}, torch.Generator().manual_seed(0)).backward()
    p = np.exp(z.numpy() / 2) / np.exp(z.numpy() / 2).sum()
    v = logits.grad.double().numpy()
    np.testing.assert_allclose(v.T @ v / len(v), np.diag(p) - np.outer(p, p), atol=5e-3)
    np.testing.assert_allclose(v.sum(1), 0, atol=1e-5)


def test_a_projection_that_is_the_end_of_one_block_and_the_start_of_another():
    """DETR's boxes: three Linears in a row. And its decoder's first values are all the same: nothing there varies."""
    model, batch, _ = built("detr")
    blocks = blocks_of(model)
    ends, starts = {b.out for b in blocks}, {part.module for b in blocks for part in b.parts if part.dim == 0}
    assert ends & starts == {"bbox_predictor.layers.1"}
    batches = [batch, {**batch, "pixel_values": batch["pixel_values"].flip(0, 2)}]
    plan, _ = compensated(Calibration(model, discover(model), blocks, batches), half(blocks))
    with torch.no_grad():
        dense = model(**batch).pred_boxes
        with hc.mask_(model, plan):
            masked = model(**batch).pred_boxes
        cut = hc.apply_(model, plan)(**batch).pred_boxes
    torch.testing.assert_close(cut, masked, atol=1e-6, rtol=1e-5)
    assert (cut - dense).abs().max() < 0.05


def test_blocks_that_the_outputs_do_not_depend_on_stay_whole():
    """Llava reads the last layer of its images' tower but one."""
    model, batch, _ = built("llava")
    pruned = hc.prune_to(model, [batch, batch], parameters=1.1)
    assert not any("vision_tower" in name and "layers.2" in name for name in pruned.sizes)
    assert any(left < there for left, there in pruned.sizes.values())


def test_experts_stay_whole():
    model, batch, _ = built("switch_transformers")
    experts = discover(model).experts
    pruned = hc.prune_to(model, [batch, batch], parameters=1.1)
    assert experts and not any(name.startswith(f"{mixture.name}.") for name in pruned.sizes for mixture in experts)


def test_layers_that_talk_past_each_other_are_not_run_one_by_one():
    """What a layer leaves for a later one in an object that both hold is there of the last batch only."""
    model, batches = bert(), texts()
    shared = {}
    layers = model.bert.encoder.layer
    plain = type(layers[0]).forward

    def first_forward(self, hidden, *args, **kwargs):
        shared["first"] = hidden
        return plain(self, hidden, *args, **kwargs)

    def last_forward(self, hidden, *args, **kwargs):
        return plain(self, hidden + shared["first"], *args, **kwargs)

    layers[0].forward = first_forward.__get__(layers[0])
    layers[2].forward = last_forward.__get__(layers[2])
    calibration = Calibration(model, discover(model), blocks_of(model), batches)
    assert [segment.path for segment in calibration.segments] == [""]
    calibration = Calibration(bert(), discover(model), blocks_of(model), batches)
    assert len(calibration.segments) == 3


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["parameters", "bytes", "macs"])
def test_a_target_in_counts_is_met(what):
    model = bert()
    dense = copy.deepcopy(model)
    batches = texts()
    pruned = hc.prune_to(model, batches, **{what: 1.3})
    one, other = (hc.measure(m, batches[0], repeats=1, warmup=0).model for m in (dense, model))
    ratio = getattr(one, what) / getattr(other, what)
    assert ratio >= 1.3 and pruned.achieved == pytest.approx(ratio, rel=1e-6) and ratio < 1.3 * 1.1
    assert pruned.target == what and pruned.interval is None and pruned.asked == 1.3
    sizes = unit_counts(blocks_of(model))
    assert {name: left for name, (left, _) in pruned.sizes.items()} == sizes
    assert {name: there for name, (_, there) in pruned.sizes.items()} == unit_counts(blocks_of(dense))


def made_up(model, per=0.01, rest=0.1):
    """A table in which every unit of an attention takes 8 times as long as a neuron."""
    counts = unit_counts(blocks_of(model))
    times = {}
    for block in blocks_of(model):
        each = per * (8 if block in discover(model).attentions else 1)
        times[block.name] = {size: each * size for size in latency.grid(block)}
    return LatencyTable({"hardware": "elsewhere"}, rest + sum(times[name][count] for name, count in counts.items()), times)


def test_a_table_of_another_device():
    model = bert()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = made_up(model)
    family = hc.prune_family(model, texts(), [1.2, 1.8, 2.5], table=table)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for pruned, asked in zip(family, (1.2, 1.8, 2.5), strict=True):
        predicted = table.total / table.predict({name: left for name, (left, _) in pruned.sizes.items()})
        assert pruned.asked == asked <= predicted == pytest.approx(pruned.achieved)
        assert pruned.conditions == {"hardware": "elsewhere"}
        small = hc.apply_(copy.deepcopy(model), pruned.plan)
        assert unit_counts(blocks_of(small)) == {name: left for name, (left, _) in pruned.sizes.items()}
    left = [sum(left for left, _ in pruned.sizes.values()) for pruned in family]
    assert left == sorted(left, reverse=True)


def test_the_budget_is_corrected_until_what_is_measured_is_what_was_asked(monkeypatch):
    """A clock that says what a table does not know: half of the time is spent where no cut helps."""
    model = bert()
    tries = []

    def clock(runs, repeats, warmup):
        counts = []
        for run in runs:
            seen = []
            hooks = [
                module.register_forward_hook(lambda m, a, o, seen=seen: seen.append(m.weight.numel()))
                for other in (model, *tries)
                for module in other.modules()
                if isinstance(module, torch.nn.Linear)
            ]
            run()
            for hook in hooks:
                hook.remove()
            counts.append(sum(seen))
        full = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        return [[(count + full) / full * (1 + 1e-4 * (i % 3)) for i in range(repeats)] for count in counts]

    shrunk = latency.shrunk

    def note(module, path, sizes, proved):
        small = shrunk(module, path, sizes, proved)
        tries.append(small)
        return small

    monkeypatch.setattr(timing, "take_turns", clock)
    monkeypatch.setattr(prices, "shrunk", note)
    table = made_up(model, rest=0.0)
    monkeypatch.setattr(prices, "latency_table", lambda *args, **kwargs: table)
    pruned = hc.prune_to(model, texts(), speedup=1.4)
    assert len(tries) > 1 and abs(pruned.achieved / 1.4 - 1) <= prices.WITHIN
    assert pruned.interval[0] <= pruned.achieved <= pruned.interval[1]


def test_what_was_timed_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "FOLDER", tmp_path)
    model, batches = bert(), texts()
    blocks = blocks_of(model)
    proved = prove_variants(model, trial_plan(model, discover(model), blocks), batches[0])
    calls = []
    turns = latency.take_turns
    monkeypatch.setattr(latency, "take_turns", lambda *args: (calls.append(len(args[0])), turns(*args))[1])
    table = latency.latency_table(model, batches[0], blocks, proved, repeats=1)
    # the model; the three attentions are alike, and so are the feed-forward blocks
    assert calls == [1, 4, len(latency.grid(blocks[-1]))]
    assert {name: sorted(times) for name, times in table.times.items()} == {b.name: latency.grid(b) for b in blocks}
    assert table.times[blocks[0].name] is not table.times[blocks[-1].name] and table.conditions["shapes"]["input_ids"] == [
        16,
        12,
    ]
    monkeypatch.setattr(latency, "DRIFT", float("inf"))
    again = latency.latency_table(model, batches[0], blocks, proved, repeats=1)
    assert len(calls) == 4 and again == table  # the model alone
    monkeypatch.setattr(latency, "DRIFT", -1.0)
    latency.latency_table(model, batches[0], blocks, proved, repeats=1)
    assert len(calls) == 7
    torn = next(tmp_path.glob("*.json"))
    torn.write_text(torn.read_text()[:40])
    assert (
        set(latency.latency_table(model, batches[0], blocks, proved, repeats=1).times) == set(table.times) and len(calls) == 10
    )
    shorter = {key: value[:, :6] for key, value in batches[0].items()}
    latency.latency_table(model, shorter, blocks, proved, repeats=1)
    assert len(calls) == 13 and len(list(tmp_path.glob("*.json"))) == 2


def test_a_measured_speedup(monkeypatch, tmp_path):
    """On the real clock, loosely: a wide model, cut to be 1.5 times faster, is faster."""
    monkeypatch.setattr(latency, "FOLDER", tmp_path)
    torch.manual_seed(0)
    config = T.BertConfig(vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024)
    model = T.BertForSequenceClassification(config).eval()
    dense = copy.deepcopy(model)
    batches = texts(count=2, rows=16, length=48)
    pruned = hc.prune_to(model, batches, speedup=1.5)
    assert pruned.asked == 1.5 and pruned.achieved > 1.1 and pruned.conditions["shapes"]["input_ids"] == [16, 48]
    assert hc.measure(model, batches[0], against=dense, repeats=9).speedup > 1.1
    pruned.save(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "pruned.json").read_text())
    assert told["asked"] == 1.5 and told["sizes"] == pruned.sizes and hc.Plan.load(tmp_path / "out") == pruned.plan
    assert "speedup: asked 1.50, achieved" in str(pruned)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_wrong_arguments_say_what_is_allowed():
    model, batches = bert(), texts(count=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for arguments, message in (
        ({}, "exactly one of speedup, macs, parameters, bytes, got none"),
        ({"speedup": 2, "macs": 2}, "got speedup, macs"),
        ({"speedup": 1}, "a number above 1, got 1"),
        ({"speedup": True}, "a number above 1, got True"),
        ({"macs": "2"}, "a number above 1, got '2'"),
        ({"parameters": float("inf")}, "a number above 1"),
        ({"parameters": 1.5, "damping": 0}, "damping must be a number above 0"),
        ({"parameters": 1.5, "table": made_up(model)}, "table is a LatencyTable, for a speed-up"),
        ({"speedup": 1.5, "table": {}}, "table is a LatencyTable"),
        ({"parameters": 1.5, "heads": False, "neurons": False}, "no heads or neurons"),
        ({"parameters": 50}, "is more than cutting heads and neurons can give here: about"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.prune_to(model, batches, **arguments)
    for wrong in ([], {}, "x", [1], [{"nothing": torch.ones(1)}]):
        with pytest.raises(hc.CompressionError):
            hc.prune_to(model, wrong, parameters=1.2)
    other = T.BertModel(T.BertConfig(**{**SIZES, "intermediate_size": 48}))
    with pytest.raises(hc.CompressionError, match="latency table is of another model"):
        hc.prune_to(model, batches, speedup=1.2, table=made_up(other))
    for wrong in (2.0, [], "23", [0.5]):
        with pytest.raises(hc.CompressionError):
            hc.prune_family(model, batches, wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_wrong_inputs_say_what_is_allowed():
    model, batches = bert(), texts(count=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lists = {"input_ids": [[5, 6, 7]]}
    for arguments, message in (
        ({"parameters": 1.2, "heads": "no"}, "heads must be True or False .* got 'no'"),
        ({"parameters": 1.2, "neurons": 0.5}, "neurons must be True or False .* got 0.5"),
        ({"macs": 1.2, "inputs": {"foo": torch.ones(2, 3)}}, r"does not run on inputs \(foo\): ValueError"),
        ({"macs": 1.2, "inputs": lists}, r"does not run on inputs \(input_ids\): AttributeError"),
        ({"speedup": 1.2, "inputs": lists}, r"does not run on inputs \(input_ids\): AttributeError"),
        ({"macs": 1.2, "inputs": {3: torch.ones(2, 3)}}, "The keys of inputs are names .* got the key 3"),
        ({"macs": 1.2, "inputs": {}}, "The keys of inputs are names .* got nothing"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.prune_to(model, batches, **arguments)
    for wrong in ({3: torch.ones(2, 3)}, {}):
        with pytest.raises(hc.CompressionError, match="The keys of a batch are names of the model's arguments"):
            hc.prune_to(model, [*batches, wrong], parameters=1.2)
    with pytest.raises(hc.CompressionError, match=r"does not run on a calibration batch \(input_ids\): AttributeError"):
        hc.prune_to(model, [lists], parameters=1.2)
    with pytest.raises(hc.CompressionError, match=r"does not run on a calibration batch \(3\): TypeError"):
        hc.plan_pruning(model, [{3: torch.ones(2, 3)}], heads=0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_where_there_are_no_gradients_or_nothing_goes():
    model, batches = bert(), texts(count=1)
    with pytest.raises(hc.CompressionError, match=r"prune_to takes gradients, which torch.inference_mode\(\) forbids"):
        with torch.inference_mode():
            hc.prune_to(model, batches, parameters=1.2)
    with torch.inference_mode():
        made = bert()
    with pytest.raises(hc.CompressionError, match="was made under torch.inference_mode"):
        hc.prune_to(made, batches, parameters=1.2)
    hc.prune_to(copy.deepcopy(made), batches, parameters=1.1, tries=0)
    with torch.no_grad():
        hc.prune_to(model, batches, parameters=1.1, tries=0)
    narrow = T.BertModel(T.BertConfig(**{**SIZES, "num_attention_heads": 1}))
    with pytest.raises(hc.CompressionError, match="Every block of this BertModel that could be cut has a single head"):
        hc.prune_to(narrow, batches, parameters=1.1, neurons=False)


def test_tables_that_cannot_be_right():
    name = "bert.encoder.layer.0"
    for total, times, message in (
        (float("nan"), {name: {64: 1.0}}, "The time of the whole model in a LatencyTable must be seconds above 0, got nan"),
        (0, {name: {64: 1.0}}, "seconds above 0, got 0"),
        (True, {name: {64: 1.0}}, "seconds above 0, got True"),
        (2.0, {name: {64: 1.5, 8: -0.5}}, f"The time of '{name}' at size 8 in a LatencyTable .* got -0.5"),
        (2.0, {name: {64: float("inf")}}, "at size 64 .* got inf"),
        (2.0, {name: {64: "1"}}, "at size 64 .* got '1'"),
        (2.0, {name: {}}, f"The times of '{name}' must be a dict of seconds by size"),
        (2.0, {}, "at least one block"),
        (2.0, [1], "at least one block"),
        (2.0, {3: {64: 1.0}}, "must be a module name"),
        (2.0, {name: {64: 1.5, 0: 1.0}}, f"A size of '{name}' must be a whole number >= 1 .* got 0"),
        (2.0, {name: {64.0: 1.5}}, "must be a whole number"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            LatencyTable({}, total, times)
    model, batches = bert(), texts(count=1)
    whole = {f"bert.encoder.layer.{i}": {64: 1.0, 8: 0.1} for i in range(3)}
    with pytest.raises(hc.CompressionError, match="predicts -0.7 seconds, of 2.* cannot save more than the whole model"):
        hc.prune_to(model, batches, speedup=1.5, heads=False, table=LatencyTable({}, 2.0, whole))
    # 4 / (4 - 3 * 0.9) = 3.08, and not one more
    table = LatencyTable({}, 4.0, whole)
    assert hc.prune_family(model, batches, [3.07], heads=False, table=table)[0].achieved == pytest.approx(4 / 1.3)
    with pytest.raises(hc.CompressionError, match=r"speedup=3.1 is more than .* about 3.08 at most"):
        hc.prune_to(model, batches, speedup=3.1, heads=False, table=table)


def test_all_targets_of_a_family_are_looked_at_before_the_first_plan(monkeypatch):
    model, batches = bert(), texts(count=1)
    monkeypatch.setattr(target, "losses_of", lambda *_: pytest.fail("calibrated already"))
    with pytest.raises(hc.CompressionError, match="speedup=40 is more than"):
        hc.prune_family(model, batches, [1.2, 40, 1.5], table=made_up(model))
    with pytest.raises(hc.CompressionError, match="parameters=50 is more than"):
        hc.prune_to(model, batches, parameters=50)


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(latency, "FOLDER", tmp_path / "file" / "latency")
    told = []
    monkeypatch.setattr(latency.logger, "warning", told.append)
    model, batches = bert(), texts(count=1)
    blocks = [block for block in blocks_of(model) if block in discover(model).attentions]
    proved = prove_variants(model, trial_plan(model, discover(model), blocks), batches[0])
    table = latency.latency_table(model, batches[0], blocks, proved, repeats=1)
    assert set(table.times) == {block.name for block in blocks}
    assert len(told) == 1 and "not kept for another run. Could not write into" in told[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 80 GiB"), hc.CompressionError("too much was asked")])
def test_what_fails_in_the_first_process_fails_in_all(error, monkeypatch):
    sent, rank = [], [0]

    def broadcast(box, src):
        if rank[0] == src:
            sent[:] = box
        else:
            box[:] = sent

    def fail():
        raise error

    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "get_rank", lambda: rank[0])
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    with pytest.raises(type(error)) as first:
        of_the_first(fail)
    assert first.value is error
    rank[0] = 1
    message = "The first process failed: OutOfMemoryError: of 80 GiB" if "GiB" in str(error) else "^too much was asked$"
    with pytest.raises(hc.CompressionError, match=message):
        of_the_first(lambda: pytest.fail("the first alone does it"))


def test_cuts_that_bring_weights_along():
    model = bert()
    name, batch = "bert.encoder.layer.0", texts(1)[0]
    new = {f"{name}.out_weight": torch.randn(32, 20), f"{name}.out_bias": torch.randn(32)}
    plan = hc.Plan([hc.KeepNeurons(name, range(3, 23), given=True)], new)
    for broken, message in (
        (hc.Plan(plan.edits), "planned with tensors .* which this plan does not carry"),
        (hc.Plan([hc.KeepNeurons(name, range(20))], new), "tensors that none of its edits uses"),
        (hc.Plan([hc.KeepNeurons(name, range(19), given=True)], new), r"shape \(32, 20\) .* \(32, 19\) were expected"),
        (hc.Plan([*plan.edits, hc.KeepNeurons(name, range(5))], new), "comes twice"),
        (hc.Plan(plan.edits, {**new, f"{name}.out_weight": torch.full((32, 20), torch.nan)}), "NaN"),
        (hc.Plan(plan.edits, {**new, f"{name}.out_bias": torch.randn(31)}), r"a bias of shape \(31,\)"),
    ):
        for do in (hc.apply_, hc.mask_):
            if "none of its" in message and do is hc.mask_:
                continue
            with pytest.raises(hc.CompressionError, match=message):
                do(model, broken)
    with pytest.raises(hc.CompressionError, match="given must be one of"):
        hc.KeepNeurons(name, [1], given="yes")
    hc.apply_(model, plan)
    out = model.get_submodule(f"{name}.output.dense")
    assert torch.equal(out.weight, new[f"{name}.out_weight"]) and torch.equal(out.bias, new[f"{name}.out_bias"])
    assert out.weight.requires_grad and out.in_features == 20
    model(**batch, labels=torch.zeros(16, dtype=torch.long)).loss.backward()
    assert out.weight.grad.abs().sum() > 0


def test_layers_go_after_cuts_that_bring_weights():
    model, batches = bert(), texts()
    dense = copy.deepcopy(model)
    blocks = [block for block in blocks_of(model) if "layer.2" in block.name]
    plan, _ = compensated(Calibration(model, discover(model), blocks, batches), half(blocks))
    both = plan + hc.Plan([hc.KeepLayers([0, 2])])
    hc.apply_(model, both)
    with torch.no_grad(), hc.mask_(dense, both):
        torch.testing.assert_close(model(**batches[0]).logits, dense(**batches[0]).logits)


# --- processes ---------------------------------------------------------------------------------------------------

SHARED = """
    import sys, torch, torch.distributed as dist
    import hf_compress as hc
    from hf_compress.pruning.calibrate import Calibration
    from hf_compress.pruning.compensate import compensated
    from hf_compress.pruning.sensitivity import sensitivities
    from tests.test_prune_to import bert, texts, blocks_of, half, made_up

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, batches = bert(), texts()
    blocks = blocks_of(model)
    calibration = Calibration(model, hc.discover(model), blocks, batches[rank::2])
    scales = sensitivities(calibration)
    plan, _ = compensated(calibration, half(blocks))
    torch.save(scales, f"{sys.argv[1]}/{rank}.pt")
    family = hc.prune_family(model, batches[rank::2], [1.5], table=made_up(model, rest=0.1 + 2 * rank))  # clocks differ
    family[0].plan.save(f"{sys.argv[1]}/family-{rank}")
    plan.save(f"{sys.argv[1]}/{rank}")
"""


def test_two_processes_find_what_one_does(tmp_path):
    model, batches = bert(), texts()
    blocks = blocks_of(model)
    calibration = Calibration(model, discover(model), blocks, batches)
    scales = sensitivities(calibration)
    plan, _ = compensated(calibration, half(blocks))
    script = tmp_path / "shared.py"
    script.write_text(textwrap.dedent(SHARED))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    run += ["--rdzv_endpoint=localhost:0", str(script), str(tmp_path)]
    here = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent.parent)}
    done = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False, env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = hc.Plan.load(tmp_path / "0"), hc.Plan.load(tmp_path / "1")
    assert one == other and one.edits == plan.edits
    assert hc.Plan.load(tmp_path / "family-0") == hc.Plan.load(tmp_path / "family-1")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), scales, rtol=1e-4, atol=1e-9)
    for name, tensor in plan.tensors.items():
        torch.testing.assert_close(one.tensors[name], tensor, atol=1e-3, rtol=1e-3)


def test_curves_fall_with_size():
    model, batches = bert(), texts()
    blocks = blocks_of(model)
    calibration = Calibration(model, discover(model), blocks, batches)
    found = curves(calibration)
    for block in blocks:
        errors = found[block.name].errors
        assert len(errors) == unit_counts([block])[block.name] + 1 and errors[0] == 0 and errors[-1] == 1
        assert bool((errors.diff() >= 0).all())
    assert isinstance(Moments.empty(2, 3), Moments)


def test_a_table_that_promises_too_little_is_not_believed(monkeypatch, tmp_path):
    """What the smallest sizes give is timed before a speed-up is refused; what they do not give is refused."""
    monkeypatch.setattr(latency, "FOLDER", tmp_path)
    model, batches = bert(), texts()
    pessimist = made_up(model, rest=100.0)  # as if nearly all of the time were spent elsewhere
    monkeypatch.setattr(prices, "latency_table", lambda *args, **kwargs: pessimist)
    dense = sum(p.numel() for p in model.parameters())

    def take_turns(runs, rounds, warm):
        """As long as a model has parameters."""
        return [[float(counts.pop(0))] * rounds for _ in runs]

    shrink, counts = prices.shrunk, []

    def note(*args):
        small = shrink(*args)
        counts.extend([sum(p.numel() for p in small.parameters()), dense])
        return small

    monkeypatch.setattr(prices, "shrunk", note)
    monkeypatch.setattr(timing, "take_turns", take_turns)
    monkeypatch.setattr(prices, "LONGEST", 0.0)
    pruned = hc.prune_to(copy.deepcopy(model), batches, speedup=1.5)
    assert pruned.achieved == pytest.approx(1.5, rel=prices.WITHIN)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(hc.CompressionError) as refused:
        hc.prune_to(model, batches, speedup=9.0)
    least = copy.deepcopy(model)
    heads = [hc.KeepHeads(a.name, [0]) for a in discover(least).attentions]
    hc.apply_(least, hc.Plan([*heads, *(hc.KeepNeurons(f.name, range(min(latency.grid(f)))) for f in discover(least).ffns)]))
    most = dense / sum(p.numel() for p in least.parameters())
    assert f"speedup=9 is more than cutting heads and neurons can give here: about {most:.2f} at most" in str(refused.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
