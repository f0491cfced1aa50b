"""Hostile and careless input: one clear refusal each, before anything changes."""

import json

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.modules import is_gated
from tests.trainers import rows
from tests.zoo import GQA, build

BATCH = {k: torch.stack([r[k] for r in rows(4)]) for k in ("input_ids", "attention_mask")}
TINY = dict(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
FFN = "bert.encoder.layer.0"


def gated(model):
    return [n for n, m in model.named_modules() if is_gated(m)]


def test_adapters_are_merged_first():
    model, _ = build("bert")
    model.peft_config = {}
    with pytest.raises(hc.CompressionError, match="carries adapters"):
        hc.apply_(model, hc.Plan([hc.KeepNeurons(FFN, range(9))]))


@pytest.mark.parametrize("text", ["0-999999999", "0-", "-3", "a", "5-4 0-5000 0-5000"])
def test_hostile_spans_are_refused_at_once(text):
    record = {"format": 1, "edits": [{"edit": "KeepNeurons", "ffn": "x", "neurons": text}]}
    with pytest.raises(hc.CompressionError):
        hc.Plan.from_dict(record)


@pytest.mark.parametrize(
    "part",
    [{"layers": [1]}, {"layers": {"x": 3}}, {"gates": {"x": 1}}, {"numbers": {"architectures": ["x"]}}, {"numbers": [1]}],
    ids=str,
)
def test_hostile_layouts_are_refused(part):
    with pytest.raises(hc.CompressionError, match="layout"):
        hc.loader.HfCompressConfig(layout=json.dumps({"modules": {}, **part}))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: hc.PruningCallback(heads=0.5, score=["taylor"]),
        lambda m: hc.PruningCallback(heads=0.5, schedule=["cubic"]),
        lambda m: hc.PruningCallback(heads=0.5, start="0.1"),
        lambda m: hc.PruningCallback(heads=0.5, smoothing=None),
        lambda m: hc.PruningCallback(heads=0.5, every=True),
        lambda m: hc.PruningCallback(heads=0.5, uniform="no"),
        lambda m: hc.PruningCallback(heads=0.5, seed=1.5),
        lambda m: hc.Plan(5),
        lambda m: hc.Plan(None),
        lambda m: hc.Plan([], tensors=5),
        lambda m: hc.Plan.load(None),
        lambda m: hc.Plan().save(None),
        lambda m: hc.Plan.from_dict({"format": 1, "edits": [{"edit": []}]}),
        lambda m: hc.KeepHeads("a", torch.tensor([False, True])),
        lambda m: hc.KeepHeads("a", torch.tensor(3)),
        lambda m: hc.apply_(m, [hc.KeepNeurons(FFN, [0])]),
        lambda m: hc.apply_(m, hc.Plan([hc.KeepNeurons(FFN, [0])]), inputs=5),
        lambda m: hc.apply_(m, hc.Plan([hc.KeepNeurons(FFN, [0])]), inputs={1: torch.zeros(1)}),
        lambda m: hc.PruningCallback(heads=0.5, inputs=5),
        lambda m: hc.plan_pruning(m, heads=0.5, score="random", uniform="yes"),
        lambda m: hc.plan_pruning(m, [{"input_ids": [[5, 6]], "labels": [0]}], heads=0.5),
        lambda m: hc.plan_pruning(m, 5, heads=0.5),
        lambda m: hc.plan_pruning(m, [], heads=0.5, loss_fn=5),
        lambda m: hc.plan_pruning(m, heads=0.5, score="random", seed="a"),
        lambda m: hc.plan_pruning(m, heads=0.5, score=[]),
        lambda m: hc.discover(5),
        lambda m: hc.measure(None, {"x": torch.zeros(1)}),
        lambda m: hc.measure(m, {"input_ids": torch.tensor([[5]])}, against=5),
        lambda m: hc.measure(m, {"input_ids": torch.tensor([[5]])}, metrics=5),
        lambda m: hc.measure(m, {"input_ids": torch.tensor([[5]])}, metrics=lambda m: 0.5),
        lambda m: hc.measure(m, {"input_ids": torch.tensor([[5]])}, repeats="3"),
        lambda m: hc.measure(m, {"nothing": torch.tensor([[5]])}),
    ],
)
def test_careless_arguments_get_one_clear_refusal(call):
    with pytest.raises(hc.CompressionError):
        call(build("bert")[0])


def test_grouped_query_config_with_fewer_heads_is_stock_only_if_it_builds():
    model = T.LlamaForCausalLM(T.LlamaConfig(**GQA)).eval()
    hc.apply_(model, hc.plan_pruning(model, heads=0.5, score="magnitude", uniform=True))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 16)


def test_a_diverged_training_is_named_as_the_reason():
    model, _ = build("bert")
    with torch.no_grad():
        model.get_submodule(FFN).intermediate.dense.weight[0, 0] = float("nan")
    with pytest.raises(hc.CompressionError, match="intermediate.dense.weight holds NaN or infinities"):
        hc.apply_(model, hc.Plan([hc.KeepNeurons(FFN, [0, 1])]))


def test_planning_leaves_the_config_alone():
    model = T.BertForSequenceClassification(build("bert")[0].config)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}
    hc.plan_pruning(model, [batch], neurons=0.5, score="taylor")
    assert model.config.problem_type is None  # transformers' own forward writes its guess there
