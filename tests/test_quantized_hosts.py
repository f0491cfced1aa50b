"""Models with quantized modules among everything else that is done to models: cast, copied, resized, loaded in part, undone."""

import copy
import io
import json
import pickle

import pytest
import torch
import transformers as T
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.modules import LowRankLinear
from hf_compress.quantization import QuantizedEmbedding, dequantized, is_quantized
from hf_compress.quantization.to_float import dequantize_
from tests.zoo import TEXT, build, outputs, random_plan

OPTIONS = [{"bits": 8}, {"bits": 4}, {"bits": 4, "decode": "call"}]
TIED = ["gpt2", "t5"]


def quantized(family: str, **options):
    model, batch = build(family)
    return hc.apply_(model, hc.plan_quantization(model, **{"skip": None, "bits": 8, **options})), batch


def stored(model) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(model):
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(stored(model))
    return other


def by_tying(model):
    model = copy.deepcopy(model)
    model.tie_weights()
    return model


COPIES = [copy.deepcopy, by_pickle, by_torch_save, by_state_dict, by_tying]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["bert", *TIED])
def test_copies_compute_the_same_and_are_apart(family, options):
    model, batch = quantized(family, **options)
    before = outputs(model, batch)
    for make in COPIES:
        other = make(model)
        assert torch.equal(outputs(other, batch), before), make.__name__
        if family in TIED:
            assert other.get_output_embeddings().weight is other.get_input_embeddings().weight, make.__name__
        other.get_input_embeddings()._parameters["weight"].zero_()
        assert not torch.equal(outputs(other, batch), before) and torch.equal(outputs(model, batch), before), make.__name__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cast_model_holds_the_cast_scales(bits, dtype):
    """Integers stay; 8-bit scales are cast as the weights would have been; 4-bit ones are kept, whatever the model is."""
    model, batch = quantized("bert", bits=bits)
    integers = {n: m.weight.clone() for n, m in model.named_modules() if is_quantized(m)}
    meant = {n: dequantized(m)["weight"] for n, m in model.named_modules() if is_quantized(m)}
    model.to(dtype)
    assert model.dtype == dtype and outputs(model, batch).dtype == dtype
    for name, module in model.named_modules():
        if is_quantized(module):
            got = dequantized(module)["weight"]
            assert torch.equal(module.weight, integers[name]) and got.dtype == dtype
            bound = 2 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
            assert (got.double() - meant[name].double()).abs().max() <= bound * meant[name].abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_meta_device(bits):
    model, batch = quantized("bert", bits=bits)
    batch = {"input_ids": batch["input_ids"]}  # with a mask, transformers asks for values
    logits = outputs(model, batch)
    kept, buffers = stored(model), {k: v.clone() for k, v in model.named_buffers()}
    model.to("meta")
    assert outputs(model, {k: v.to("meta") for k, v in batch.items()}).shape == logits.shape
    with pytest.raises(hc.CompressionError, match="meta device"):
        model.dequantize()
    model.load_state_dict(kept, assign=True)
    for name, value in buffers.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = value
    assert torch.equal(outputs(model, batch), logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradient_checkpointing_changes_no_gradient(bits):
    def gradients(checkpointing: bool) -> dict:
        model, batch = quantized("bert", bits=bits)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and "bert.encoder.layer.0.attention.self.query.bias" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    assert max(g.abs().max() for g in plain.values()) > 1e-3


# --- resizing ----------------------------------------------------------------------------------------------------


def _bert_head(model):
    return hc.apply_(model, hc.plan_quantization(model, bits=8, modules="decoder", skip=None, embeddings=False))


RESIZED = {
    "embedding": lambda: quantized("bert")[0],
    "4 bits": lambda: quantized("bert", bits=4)[0],
    "tied": lambda: quantized("gpt2", bits=4)[0],
    "seq2seq": lambda: quantized("t5")[0],
    "the base model": lambda: quantized("bert")[0].bert,
    "a head alone": lambda: _bert_head(T.BertForMaskedLM(T.BertConfig(tie_word_embeddings=False, **TEXT))),
    "unpickled": lambda: by_pickle(quantized("bert")[0]),
}


@pytest.mark.parametrize("name", RESIZED)
def test_resizing_is_refused_before_anything_changes(name):
    model = RESIZED[name]()
    assert any(is_quantized(m) for m in model.modules())
    before, config = stored(model), model.config.to_dict()
    for wanted in ({"new_num_tokens": 120}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}):
        with pytest.raises(hc.CompressionError, match="Resize before quantizing"):
            model.resize_token_embeddings(**wanted)
    kept = model.resize_token_embeddings(99)  # what `len(tokenizer)` often is
    assert kept is model.get_input_embeddings() is model.resize_token_embeddings()
    after = stored(model)
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert model.config.to_dict() == config


def test_resizing_goes_on_where_rows_are_in_float(tmp_path):
    model, batch = quantized("bert", embeddings=False)
    before = outputs(model, batch)
    model.resize_token_embeddings(120)
    assert torch.equal(outputs(model, batch), before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.get_input_embeddings().num_embeddings == 120 and torch.equal(outputs(again, batch), before)


# --- dequantize --------------------------------------------------------------------------------------------------


def weights_only(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if is_quantized(module):
            module.activations = None
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_dequantize_gives_the_decoded_model_as_a_stock_checkpoint(family, bits, tmp_path, plain):
    dense, batch = build(family)
    model = quantized(family, bits=bits)[0]
    decoded = {n: dequantized(m)["weight"] for n, m in model.named_modules() if is_quantized(m)}
    rounded, expected = outputs(model, batch), outputs(weights_only(model), batch)
    assert model.dequantize() is model
    found = outputs(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    if bits == 4:
        torch.testing.assert_close(found, rounded, atol=1e-6, rtol=1e-6)
    else:
        assert 0 < (found - rounded).abs().max() < 0.1 * found.abs().max()
    for name, module in model.named_modules():
        assert type(module) is type(dense.get_submodule(name)), name
        if name in decoded:
            assert torch.equal(module.weight, decoded[name].T if isinstance(module, Conv1D) else decoded[name]), name
            assert module.weight.requires_grad
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]  # tied ones once
    assert "quantization_config" not in model.config.to_dict()
    model.save_pretrained(tmp_path)
    found = plain.outputs(type(model).__name__, tmp_path, batch)
    assert any(v.shape == expected.shape and torch.equal(v, outputs(model, batch)) for v in found.values())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_dequantize_keeps_the_other_edits(family, bits, tmp_path, fresh, plain):
    """Cut, low rank, exits and bits; loaded; without the bits again; and everything once more."""
    model, batch = build(family)
    hc.apply_(model, random_plan(model, ("heads", "neurons", "layers")))
    hc.apply_(model, hc.plan_low_rank(model, ratio=0.5))
    if family == "bert":
        hc.apply_(model, hc.Plan([hc.AddExits([0], threshold=0.99)]))
    edits, dense = list(model.config.quantization_config.plan), copy.deepcopy(model)
    hc.apply_(model, hc.plan_quantization(model, bits=bits))
    model.save_pretrained(tmp_path / "small")
    model = type(model).from_pretrained(tmp_path / "small").eval()
    expected = outputs(weights_only(model), batch)
    model.dequantize()
    torch.testing.assert_close(outputs(model, batch), expected, atol=1e-6, rtol=1e-6)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert any(type(m) is LowRankLinear for m in model.modules())
    record = model.config.quantization_config
    assert list(record.plan) == edits and record.layout["modules"] == dense.config.quantization_config.layout["modules"]
    model.save_pretrained(tmp_path / "back")
    found = fresh.outputs(type(model).__name__, tmp_path / "back", batch)
    assert any(v.shape == expected.shape and torch.equal(v, outputs(model, batch)) for v in found.values())
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path / "back", batch)
    before = outputs(model, batch)
    hc.apply_(model, hc.plan_quantization(model, bits=8))  # as any model
    assert 0 < (outputs(model, batch) - before).abs().max() < 0.3 * before.abs().max()


def test_dequantized_models_are_resized_cut_and_cast(tmp_path):
    model, batch = quantized("gpt2")
    model.dequantize(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.float()
    before = outputs(model, batch)
    model.resize_token_embeddings(120)
    torch.testing.assert_close(outputs(model, batch)[..., :99], before)
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.shape[0] == 120
    cut = hc.Plan([hc.KeepNeurons("transformer.h.0.mlp", range(8))])
    with hc.mask_(model, cut):
        masked = outputs(model, batch)
    torch.testing.assert_close(outputs(hc.apply_(model, cut), batch), masked, atol=1e-5, rtol=1e-5)


def test_a_module_around_a_model_is_dequantized():
    model, batch = quantized("bert", bits=4)
    around = nn.ModuleDict({"inside": model})
    before = outputs(model, batch)
    assert dequantize_(around) is around and torch.equal(outputs(model, batch), before)
    assert not any(is_quantized(m) for m in around.modules()) and "quantization_config" not in model.config.to_dict()


NOT_BACK = [
    ("nothing quantized", lambda m: dequantize_(build("bert")[0]), hc.CompressionError, "nothing to dequantize"),
    ("an integer dtype", lambda m: m.dequantize(torch.int8), hc.CompressionError, "floating-point torch.dtype, got torch.int8"),
    ("a dtype as text", lambda m: m.dequantize("float16"), hc.CompressionError, "floating-point torch.dtype, got 'float16'"),
    ("no model", lambda m: dequantize_(5), hc.CompressionError, "Expected a model, got int"),
    ("a dense model", lambda m: build("bert")[0].dequantize(), ValueError, "first quantize your model"),
    ("twice", lambda m: m.dequantize().dequantize(), ValueError, "first quantize your model"),
]


@pytest.mark.parametrize(("act", "error", "message"), [r[1:] for r in NOT_BACK], ids=[r[0] for r in NOT_BACK])
def test_what_cannot_be_dequantized(act, error, message):
    with pytest.raises(error, match=message):
        act(quantized("bert")[0])


def test_a_failure_changes_nothing(monkeypatch):
    model, batch = quantized("gpt2", bits=4)
    before, record = outputs(model, batch), model.config.quantization_config
    ties = dict(model.all_tied_weights_keys)
    monkeypatch.setattr("hf_compress.quantization.to_float.unrecorded", lambda *_: "somewhere")
    with pytest.raises(hc.CompressionError, match="somewhere would differ"):
        model.dequantize()
    assert torch.equal(outputs(model, batch), before) and model.config.quantization_config is record
    assert model.all_tied_weights_keys == ties and model.lm_head.weight is model.transformer.wte.weight
    monkeypatch.undo()
    assert torch.equal(outputs(model.dequantize(), batch), before)


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path):
    """transformers forgets it where a model has a quantizer."""
    model, batch = quantized("bert")
    other = {key: value.clone() for key, value in model.state_dict().items()}
    other["classifier.bias"] += 1
    model.save_pretrained(tmp_path, state_dict=other)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch) + 1)


# --- checkpoints that lack something -----------------------------------------------------------------------------

QUERY, OUT = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"


def _edits(model, *plans):
    for plan in plans:
        hc.apply_(model, plan(model))
    return model


def _bert(*plans):
    return lambda: _edits(build("bert")[0], *plans)


def _convolutions():
    config = T.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    model = T.ResNetForImageClassification(config)
    return _edits(model, lambda m: hc.plan_depthwise(m, modules="stages.0"))


CUT = lambda m: random_plan(m, ("heads", "neurons"))  # noqa: E731
LOW = lambda m: hc.plan_low_rank(m, ratio=0.5)  # noqa: E731
INT8 = lambda m: hc.plan_quantization(m, bits=8)  # noqa: E731
INT4 = lambda m: hc.plan_quantization(m, bits=4)  # noqa: E731
LACKING = [
    ("int8 scale", _bert(INT8), f"{QUERY}.weight_scale"),
    ("int8 weight", _bert(INT8), f"{QUERY}.weight"),
    ("int8 bias", _bert(INT8), f"{QUERY}.bias"),
    ("int8 embedding", _bert(INT8), "bert.embeddings.word_embeddings.weight_scale"),
    ("packed", _bert(INT4), f"{QUERY}.weight"),
    ("zero points", _bert(INT4), f"{QUERY}.weight_zero"),
    ("a tied scale", lambda: quantized("gpt2")[0], "transformer.wte.weight_scale"),
    ("cut", _bert(CUT), f"{OUT}.weight"),
    ("outer factor", _bert(LOW), f"{OUT}.weight"),
    ("inner factor", _bert(LOW), f"{OUT}.weight_in"),
    ("low rank and bits", _bert(LOW, INT8), f"{OUT}.weight_in_scale"),
    ("kernels", _convolutions, "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight_depth"),
    ("exits", _bert(lambda m: hc.Plan([hc.AddExits([0, 1])])), "exit_heads.1.out.weight"),
]


@pytest.mark.parametrize(("make", "key"), [row[1:] for row in LACKING], ids=[row[0] for row in LACKING])
def test_a_checkpoint_that_lacks_what_was_compressed_is_refused(make, key, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    kind = type(model)
    kind.from_pretrained(tmp_path)  # whole, it loads
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != key}, tmp_path / "model.safetensors", {"format": "pt"})
    assert key in weights
    with pytest.raises(hc.CompressionError, match=rf"lacks weights that were compressed.*{key}"):
        kind.from_pretrained(tmp_path)


def test_a_wrong_shape_is_refused(tmp_path):
    """transformers 5.20 takes any shape where a model has a quantizer."""
    _bert(CUT)().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.weight"] = torch.ones(5, 64)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, hc.CompressionError), match="classifier.weight|ignore_mismatched_sizes"):
        T.BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("plans", [(CUT,), (CUT, INT8), (LOW, INT4)], ids=["cut", "int8", "low rank, 4 bits"])
def test_what_transformers_itself_makes_is_made(plans, tmp_path):
    """A new head on an encoder, a pooler that the checkpoint did not have, other labels."""
    model = _edits(T.BertModel(T.BertConfig(**TEXT)), *plans)
    model.save_pretrained(tmp_path)
    ids = {"input_ids": torch.arange(5, 25).view(2, 10)}
    head = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4).eval()
    assert outputs(head, ids).shape == (2, 4) and torch.equal(outputs(head.bert, ids), outputs(model.eval(), ids))
    assert 0 < head.classifier.weight.std() < 0.1 and not head.classifier.bias.any()
    tokens = _edits(T.BertForTokenClassification(T.BertConfig(**TEXT)), *plans)  # has no pooler
    tokens.save_pretrained(tmp_path / "tokens")
    pooled = T.BertModel.from_pretrained(tmp_path / "tokens").eval()
    assert 0 < pooled.pooler.dense.weight.std() < 0.1
    seven = dict(num_labels=7, ignore_mismatched_sizes=True)
    if Version(T.__version__) < Version("5.23"):  # where shapes are not looked at in the presence of a quantizer
        with pytest.raises(hc.CompressionError, match=r"classifier.weight \(2, 64\), not \(7, 64\)"):
            T.BertForTokenClassification.from_pretrained(tmp_path / "tokens", **seven)
    else:
        labels = T.BertForTokenClassification.from_pretrained(tmp_path / "tokens", **seven)
        assert labels.classifier.weight.shape == (7, 64)


def test_shards_are_whole_together(tmp_path):
    model, batch = quantized("bert")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), batch), outputs(model, batch))
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
