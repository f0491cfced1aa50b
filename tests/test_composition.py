"""Edits of every family on the same weights, in every order that makes sense; the others are refused with the reason."""

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.resume import restore_weights
from tests.zoo import GPT2, GQA, build, ids, outputs, random_plan

CLASSIFIERS = {
    "bert": lambda: build("bert"),
    "vit": lambda: build("vit"),
    "gpt2": lambda: _decoder(T.GPT2ForSequenceClassification, T.GPT2Config(**GPT2, num_labels=3, pad_token_id=0)),
    "llama": lambda: _decoder(T.LlamaForSequenceClassification, T.LlamaConfig(**GQA, num_labels=3)),
}


def _decoder(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval(), {"input_ids": ids(4), "attention_mask": torch.ones(4, 10, dtype=torch.long)}


STEPS = {
    "prune": lambda model: random_plan(model, ("heads", "neurons")),
    "layers": lambda model: hc.Plan([hc.KeepLayers([0, 2])]),
    "low rank": lambda model: hc.plan_low_rank(model, ratio=0.6),
    "sparse": lambda model: hc.plan_sparsity(model, sparsity=0.5),
    "int8": lambda model: hc.plan_quantization(model, bits=8),
    "int4": lambda model: hc.plan_quantization(model, bits=4, group_size=16),
    "exits": lambda model: hc.Plan([hc.AddExits([0], threshold=0.6)]),
}
ORDERS = [
    ("prune", "low rank", "int8", "exits"),
    ("low rank", "prune", "int4", "exits"),
    ("exits", "prune", "low rank", "int8"),
    ("exits", "low rank", "int4"),
    ("prune", "exits", "int8"),
    ("layers", "prune", "int8"),
    ("prune", "int4", "layers"),
    ("low rank", "layers", "int8", "exits"),
    ("int8", "layers", "exits"),
    ("layers", "exits", "prune"),
    ("prune", "sparse", "layers", "int8", "exits"),
]


@pytest.mark.parametrize("order", ORDERS, ids=[" > ".join(o) for o in ORDERS])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_any_sensible_order(family, order, tmp_path, fresh, plain):
    """Step by step and as one plan the same model; another process loads it equal to the bit; plain transformers fails."""
    model, batch = CLASSIFIERS[family]()
    plan = hc.Plan()
    for name in order:
        step = STEPS[name](model)
        assert step.edits and hc.Plan.from_dict(step.to_dict()) == step
        if name == "prune":
            with hc.mask_(model, step):
                expected = outputs(model, batch)
        hc.apply_(model, step)
        if name == "exits":  # heads begin near zero; these are sure of some rows
            with torch.no_grad():
                model.exit_heads["0"].out.weight.mul_(40)
        if name == "prune":
            torch.testing.assert_close(outputs(model, batch), expected, atol=1e-5, rtol=1e-5)
        plan += step
    done = outputs(model, batch)
    in_one = CLASSIFIERS[family]()[0]
    torch.manual_seed(0)
    hc.apply_(in_one, plan)
    if "exits" in order:  # their heads begin at random
        in_one.exit_heads.load_state_dict(model.exit_heads.state_dict())
        assert (hc.exit_layers(model) == 0).any()
    torch.testing.assert_close(outputs(in_one, batch), done, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    found = fresh.outputs(type(model).__name__, tmp_path, batch)
    assert torch.equal(found["logits"], done)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)


SENSELESS = [
    ("int8", "prune", "not a plain Linear"),
    ("int4", "prune", "not a plain Linear"),
    ("int8", "low rank", "no Linear or Conv1D|quantized"),
    ("int8", "int4", "quantized already"),
    ("low rank", "low rank", "no Linear or Conv1D|low-rank already"),
    ("sparse", "prune", "Cut first, then Sparsify"),
    ("sparse", "low rank", "no Linear or Conv1D"),
    ("int8", "sparse", "no Linear|not a plain Linear|quantized"),
    ("exits", "layers", "remove layers first"),
    ("exits", "exits", "has exits already"),
]


@pytest.mark.parametrize(("first", "then", "message"), SENSELESS, ids=[f"{a} > {b}" for a, b, _ in SENSELESS])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_senseless_orders_are_refused_and_change_nothing(family, first, then, message):
    model, batch = CLASSIFIERS[family]()
    hc.apply_(model, STEPS[first](model))
    before, config = outputs(model, batch), model.config.to_dict()
    with pytest.raises(hc.CompressionError, match=message):
        hc.apply_(model, STEPS[then](model))
    assert torch.equal(outputs(model, batch), before) and model.config.to_dict() == config


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_failing_step_undoes_the_steps_before_it(family):
    model, batch = CLASSIFIERS[family]()
    before, config = outputs(model, batch), model.config.to_dict()
    kinds = [type(m) for m in model.modules()]
    plan = STEPS["prune"](model) + STEPS["int8"](model) + hc.Plan([hc.KeepHeads("nowhere", [0])])
    with pytest.raises(hc.CompressionError, match="nowhere"):
        hc.apply_(model, plan)
    assert torch.equal(outputs(model, batch), before) and model.config.to_dict() == config
    assert [type(m) for m in model.modules()] == kinds


def test_pipeline_with_everything(tmp_path):
    """`pipeline` on a model that was pruned, quantized and given exits."""
    model, batch = CLASSIFIERS["vit"]()
    for name in ("prune", "int8", "exits"):
        hc.apply_(model, STEPS[name](model))
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    from PIL import Image

    picture = Image.new("RGB", (32, 32), (200, 30, 90))
    pipe = T.pipeline("image-classification", model=str(tmp_path), device="cpu")
    scores = {row["label"]: row["score"] for row in pipe(picture)}
    pixels = pipe.image_processor(picture, return_tensors="pt")
    expected = model(**pixels).logits.softmax(-1)[0]
    for index, value in enumerate(expected.tolist()):
        assert scores[model.config.id2label[index]] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("dtype", "shards"), [("float32", "30KB"), ("bfloat16", "30KB"), ("bfloat16", "1GB")])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_dtypes_and_shards(family, dtype, shards, tmp_path, fresh):
    model, batch = CLASSIFIERS[family]()
    for parameter in model.parameters():  # buffers stay float32, as from_pretrained(dtype=...) leaves them
        parameter.data = parameter.data.to(getattr(torch, dtype))
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    for name in ("prune", "low rank", "int4", "exits"):
        hc.apply_(model, STEPS[name](model))
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "30KB")
    found = fresh.outputs(type(model).__name__, tmp_path, batch, dtype=dtype)["logits"]
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("step", ["low rank", "int8", "prune"])
def test_a_dense_model_with_exits_resumes_from_a_smaller_one(step, tmp_path):
    """The exit's lock on a dense model must not stand in the way of what the checkpoint's modules became."""
    model, batch = CLASSIFIERS["bert"]()
    hc.apply_(model, STEPS[step](model) + STEPS["exits"](model))
    model.save_pretrained(tmp_path)
    dense, _ = CLASSIFIERS["bert"]()
    hc.apply_(dense, STEPS["exits"](dense))
    restore_weights(dense, tmp_path)
    assert torch.equal(outputs(dense, batch), outputs(model, batch))
    dense.save_pretrained(tmp_path / "again")
    again = type(dense).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(outputs(again, batch), outputs(model, batch))
