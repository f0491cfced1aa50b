"""Quantized models of every family: what they compute, what is stored, how they load, what is refused."""

import copy
import logging

import numpy as np
import pytest
import torch
import transformers as T
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.quantization import is_quantized
from tests.zoo import FAMILIES, GENERATE, GQA, TEXT, build, outputs


def symmetric(weight: np.ndarray) -> np.ndarray:
    """8 bits: per row, round to 127ths of the largest."""
    scale = (np.abs(weight).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.clip(np.round(weight / scale), -127, 127) * scale


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations: per token, 256 steps between its least and its largest value."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return low + torch.round((x - low) * (255 / (high - low + 1e-8))) * ((high - low) / 255)


def by_hand(model, plan) -> None:
    """Give a float model the weights, and the rounding of activations, that an int8 plan stands for."""
    done = set()
    for edit in plan:
        module = model.get_submodule(edit.module)
        if id(module.weight) not in done:
            done.add(id(module.weight))
            weight = module.weight.detach().numpy()
            weight = symmetric(weight.T).T if isinstance(module, Conv1D) else symmetric(weight)
            module.weight.data.copy_(torch.tensor(np.ascontiguousarray(weight)))
        if not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda m, args: (rounded(args[0]), *args[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_what_numpy_says_and_loads_equal(family, tmp_path, fresh, plain):
    model, batch = build(family)
    dense = outputs(model, batch)
    plan = hc.plan_quantization(model, bits=8)
    assert hc.Plan.from_dict(plan.to_dict()) == plan and plan.edits
    reference = copy.deepcopy(model)
    by_hand(reference, plan)
    hc.apply_(model, plan)
    small = outputs(model, batch)
    spread = dense.abs().max().item()
    # a rounding that falls the other way somewhere inside moves the output a little; a wrong scale moves it a lot
    assert (small - outputs(reference, batch)).abs().max() < 0.02 * spread
    assert 0 < (small - dense).abs().max() < 0.3 * spread
    model.save_pretrained(tmp_path)
    found = fresh.outputs(type(model).__name__, tmp_path, batch)
    assert any(v.shape == small.shape and torch.equal(v, small) for v in found.values())
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "t5", "bart", "vit", "whisper", "clip", "deberta_v2"])
def test_weight_only_is_the_decoded_model(family, bits, tmp_path, fresh, plain):
    from hf_compress.quantization import dequantized

    model, batch = build(family)
    reference = copy.deepcopy(model)
    hc.apply_(model, hc.plan_quantization(model, bits=bits, group_size=32))
    for name, module in model.named_modules():
        if is_quantized(module):
            target = reference.get_submodule(name)
            weight = dequantized(module)["weight"]
            target.weight.data.copy_(weight.T if isinstance(target, Conv1D) else weight)
    small = outputs(model, batch)
    torch.testing.assert_close(small, outputs(reference, batch), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    found = fresh.outputs(type(model).__name__, tmp_path, batch)
    assert any(v.shape == small.shape and torch.equal(v, small) for v in found.values())
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["gpt2", "t5", "whisper"])
def test_a_tied_head_stays_tied_and_is_stored_once(family, bits, tmp_path):
    model, batch = build(family)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    hc.apply_(model, hc.plan_quantization(model, bits=bits, group_size=None if bits == 8 else 32))
    tensors = [k for k in embedding._parameters if k.startswith("weight")]
    assert all(head._parameters[k] is embedding._parameters[k] for k in tensors) and len(tensors) == (2 if bits == 8 else 3)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = [k for k in file.keys() if file.get_tensor(k).shape == (1, *embedding.weight.shape)]  # noqa: SIM118
    assert len(stored) == 1
    again = type(model).from_pretrained(tmp_path).eval()
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert all(head._parameters[k] is embedding._parameters[k] for k in tensors)
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    again.save_pretrained(tmp_path / "again")
    third = type(model).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(outputs(third, batch), outputs(model, batch))


TIED_WITH_BIAS = {
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)),
    "distilbert": lambda: T.DistilBertForMaskedLM(
        T.DistilBertConfig(vocab_size=99, dim=64, n_layers=1, n_heads=4, hidden_dim=96)
    ),
    "modernbert": lambda: T.ModernBertForMaskedLM(T.ModernBertConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, **TEXT)),
    "deberta": lambda: T.DebertaForMaskedLM(T.DebertaConfig(**TEXT)),
}
ODD = {  # models that ask a weight for its shape or its dtype when they are built or loaded
    "swinv2": lambda: T.Swinv2ForImageClassification(
        T.Swinv2Config(image_size=32, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4)
    ),
    "chinese_clip": lambda: T.ChineseCLIPTextModel(T.ChineseCLIPTextConfig(**TEXT)),
    "funnel": lambda: T.FunnelForSequenceClassification(
        T.FunnelConfig(block_sizes=[1, 2], d_model=64, n_head=4, d_head=16, d_inner=96, vocab_size=99)
    ),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [*TIED_WITH_BIAS, *ODD])
def test_models_that_look_at_their_weights(name, bits, tmp_path):
    """A tied head with a bias, which transformers pads to the rows of the weight; tables rebuilt in a part's dtype; ..."""
    torch.manual_seed(0)
    model = {**TIED_WITH_BIAS, **ODD}[name]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "swinv2" else {"input_ids": torch.arange(5, 25).view(2, 10)}
    hc.apply_(model, hc.plan_quantization(model, bits=bits))
    model.save_pretrained(tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one").eval()
    again.save_pretrained(tmp_path / "two")
    third = type(model).from_pretrained(tmp_path / "two").eval()
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    assert torch.equal(outputs(third, batch), outputs(model, batch))
    if name in TIED_WITH_BIAS:
        bias = model.get_output_embeddings().bias.clone()
        model.tie_weights()
        assert torch.equal(model.get_output_embeddings().bias, bias) and bias.shape == (99,)


def test_a_quantized_base_model_loads_under_a_tied_head(tmp_path):
    """The head was not in the checkpoint: it takes the embedding's integers."""
    base = build("gpt2")[0].transformer
    hc.apply_(base, hc.plan_quantization(base, bits=8))
    base.save_pretrained(tmp_path)
    model = T.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        hidden = model.transformer(ids).last_hidden_state
        from hf_compress.quantization import dequantized

        expected = hidden @ dequantized(model.transformer.wte)["weight"].T
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_training_through_an_activation_in_place(bits):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(inplace=True))
    from hf_compress.quantization import quantize_

    quantize_(model[0], bits=bits)
    x = torch.randn(2, 3, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("family", GENERATE)
def test_generation(family):
    """A cached step sees one token at a time: per-token rounding gives it what the whole sequence gave."""
    model, batch = build(family)
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder") and k != "attention_mask"}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    cached = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), cached)


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_a_row_never_depends_on_its_batch_mates(family):
    model, batch = build(family)
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    together = outputs(model, batch)
    for i in range(len(together)):
        alone = outputs(model, {k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(alone[0], together[i], atol=2e-3, rtol=2e-3)
    loud = {k: v.clone() for k, v in batch.items()}
    key = model.main_input_name
    loud[key][1] = loud[key][1] * 50 if loud[key].is_floating_point() else loud[key][1].flip(0)
    assert torch.equal(outputs(model, loud)[0], together[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_half_precision_models(bits, dtype, tmp_path):
    model, batch = build("bert", dtype)
    dense = outputs(model, batch)
    hc.apply_(model, hc.plan_quantization(model, bits=bits))
    small = outputs(model, batch)
    assert small.dtype == dtype and (small - dense).abs().max() < 0.5 * dense.abs().max()
    model.save_pretrained(tmp_path)
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.dtype == dtype and torch.equal(outputs(again, batch), small)
    as_float = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert outputs(as_float, batch).dtype == torch.float32


@pytest.mark.parametrize(("bits", "embeddings", "least"), [(8, True, 3.5), (4, True, 5.5), (4, False, 1.3)])
def test_bytes_on_disk(bits, embeddings, least, tmp_path):
    """Integers are stored packed: a fraction of the float file, embeddings included only if asked for."""
    config = T.BertConfig(vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    model = T.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "dense")
    hc.apply_(model, hc.plan_quantization(model, bits=bits, embeddings=embeddings))
    model.save_pretrained(tmp_path / "small")
    before, after = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("dense", "small"))
    assert before / after > least
    assert (type(model.bert.embeddings.word_embeddings) is nn.Embedding) is not embeddings


def test_what_stays_in_full_precision_is_said(caplog):
    model = build("bert")[0]
    with caplog.at_level(logging.WARNING):
        logging.getLogger("hf_compress").propagate = True
        plan = hc.plan_quantization(model, bits=8)
    assert "classifier" not in {e.module for e in plan}
    everything = hc.plan_quantization(model, bits=8, skip=None)
    assert "classifier" in {e.module for e in everything}
    some = hc.plan_quantization(model, bits=8, skip="attention|embeddings|classifier|pooler", embeddings=True)
    assert all("intermediate" in e.module or "output.dense" in e.module for e in some) and len(some) == 6
    assert all("embeddings" not in e.module for e in hc.plan_quantization(model, bits=8, embeddings=False))


@pytest.mark.parametrize(
    ("kind", "config", "heads"),
    [
        (T.DistilBertForMaskedLM, T.DistilBertConfig(vocab_size=99, dim=64, n_layers=1, n_heads=4, hidden_dim=96), "vocab_"),
        (T.DeiTForImageClassificationWithTeacher, T.DeiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, image_size=32, patch_size=8), "classifier"),
        (T.ElectraForMaskedLM, T.ElectraConfig(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=96), "generator_"),
    ],
)  # fmt: skip
def test_heads_are_what_lies_outside_the_base_model(kind, config, heads):
    plan = hc.plan_quantization(kind(config), bits=8)
    assert plan.edits and not any(heads in edit.module for edit in plan)


def test_experts_that_stay_in_float_are_said(caplog):
    config = T.MixtralConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("hf_compress.planners")
    logger.addHandler(handler)
    try:
        hc.plan_quantization(T.MixtralForCausalLM(config), bits=8)
    finally:
        logger.removeHandler(handler)
    (said,) = [r for r in records if r.startswith("Left in full precision")]
    share = float(said.split("%")[0].split()[-1])
    assert share > 50 and "experts" in said


def test_decoded_once_or_at_each_use(tmp_path):
    model, batch = build("bert")
    call = copy.deepcopy(model)
    hc.apply_(model, hc.plan_quantization(model, bits=4))
    hc.apply_(call, hc.plan_quantization(call, bits=4, decode="call"))
    assert torch.equal(outputs(call, batch), outputs(model, batch))
    dense = call.bert.encoder.layer[0].output.dense
    assert dense.decode == "call" and not dense._derived and model.bert.encoder.layer[0].output.dense._derived
    call.save_pretrained(tmp_path)
    again = type(call).from_pretrained(tmp_path)
    assert again.bert.encoder.layer[0].output.dense.decode == "call"


def test_given_scales_are_used_and_must_fit():
    model, batch = build("bert")
    name = "bert.encoder.layer.0.output.dense"
    scale = torch.full((64, 1), 0.01)
    plan = hc.Plan([hc.Quantize(name, 8, given=True)], {f"{name}.weight_scale": scale})
    wrong = hc.Plan([hc.Quantize(name, 8, given=True)], {f"{name}.weight_scale": scale[:5]})
    before = outputs(model, batch)
    with pytest.raises(hc.CompressionError, match="must have shape"):
        hc.apply_(model, wrong)
    assert torch.equal(outputs(model, batch), before)
    hc.apply_(model, plan)
    assert torch.equal(model.get_submodule(name).weight_scale, scale)


WORDS = "bert.embeddings.word_embeddings"
REFUSED = [
    ("5 bits", lambda m: hc.plan_quantization(m, bits=5), "one of 8, 4, 3, 2, got 5"),
    ("bits as text", lambda m: hc.plan_quantization(m, bits="8"), "one of 8, 4, 3, 2"),
    ("groups with 8 bits", lambda m: hc.plan_quantization(m, bits=8, group_size=32), "leave group_size out"),
    ("group of 1", lambda m: hc.plan_quantization(m, bits=4, group_size=1), ">= 2.*got 1"),
    ("activations at 4 bits", lambda m: hc.plan_quantization(m, bits=4, activations="token"), "must be one of 'none'"),
    ("unknown activations", lambda m: hc.plan_quantization(m, bits=8, activations="row"), "'token', 'tensor', 'none'"),
    ("unknown decode", lambda m: hc.plan_quantization(m, bits=4, decode="later"), "'load', 'call'"),
    ("bad skip", lambda m: hc.plan_quantization(m, bits=8, skip="("), "regular expression"),
    ("all skipped", lambda m: hc.plan_quantization(m, bits=8, skip=".*"), "outside skip"),
    ("skip 5", lambda m: hc.plan_quantization(m, bits=8, skip=5), "skip must be a regular expression .*, got 5"),
    ("bad modules", lambda m: hc.plan_quantization(m, bits=8, modules="["), "modules must be a regular expression"),
    ("modules of nobody", lambda m: hc.plan_quantization(m, bits=8, modules="zzz"), "whose name matches 'zzz'"),
    ("a list of modules", lambda m: hc.plan_quantization(m, bits=8, modules=["query"]), "as text, got \\['query'\\]"),
    ("modules that are a head", lambda m: hc.plan_quantization(m, bits=8, modules="classifier"), "pass skip=None"),
    (
        "only embeddings, without",
        lambda m: hc.plan_quantization(m, bits=8, modules="embeddings", embeddings=False),
        "no Linear",
    ),
    ("inputs 5", lambda m: hc.plan_quantization(m, bits=8, inputs=5), "inputs must be a batch"),
    ("a layer norm", lambda m: hc.apply_(m, hc.Plan([hc.Quantize("bert.embeddings.LayerNorm")])), "takes a Linear"),
    ("twice in a plan", lambda m: hc.apply_(m, hc.Plan([hc.Quantize(WORDS), hc.Quantize(WORDS)])), "quantized already"),
]


@pytest.mark.parametrize(("act", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_and_nothing_changed(act, message):
    model, batch = build("bert")
    before, config = outputs(model, batch), model.config.to_dict()
    with pytest.raises(hc.CompressionError, match=message):
        act(model)
    assert torch.equal(outputs(model, batch), before) and model.config.to_dict() == config


def test_only_these_modules():
    model, _ = build("bert")
    names = {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    chosen = {edit.module for edit in hc.plan_quantization(model, bits=8, modules="query|word_embeddings|pooler")}
    assert chosen == {n for n in names if n.endswith(("query", "word_embeddings", "pooler.dense"))} and len(chosen) == 5
    both = {edit.module for edit in hc.plan_quantization(model, bits=8, modules=r"\.query$", skip="layer.1")}
    assert both == {n for n in names if n.endswith("query") and "layer.1" not in n} and len(both) == 2
    assert [e.module for e in hc.plan_quantization(model, bits=8, modules="classifier", skip=None)] == ["classifier"]
    hc.apply_(model, hc.plan_quantization(model, bits=8, modules="query"))

    assert {n for n, m in model.named_modules() if is_quantized(m)} == {n for n in names if n.endswith("query")}


@pytest.mark.parametrize("family", ["gemma3", "bart"])
def test_a_head_that_is_tied_to_what_cannot_be_quantized_stays(family):
    """Their embeddings scale what they look up, by a class of their own."""
    model, batch = build(family)
    before = outputs(model, batch)
    plan = hc.plan_quantization(model, bits=8, skip=None)
    assert plan.edits and "lm_head" not in {edit.module for edit in plan}
    hc.apply_(model, plan)
    assert type(model.lm_head) is nn.Linear and 0 < (outputs(model, batch) - before).abs().max() < 0.3 * before.abs().max()
    with pytest.raises(hc.CompressionError, match="'lm_head'.*shares its weight"):
        hc.plan_quantization(build(family)[0], bits=8, skip=None, modules="lm_head")


@pytest.mark.parametrize("bits", [8, 4])
def test_the_proof_leaves_no_decoded_weights_behind(bits):
    from hf_compress.quantization import is_quantized

    model, _ = build("bert")
    hc.apply_(model, hc.plan_quantization(model, bits=bits))
    modules = [m for m in model.modules() if is_quantized(m)]
    assert modules and not any(m._derived for m in modules)
    assert {(m.activations, m.decode) for m in modules} <= {("token" if bits == 8 else None, "load"), (None, "load")}


def test_quantizing_twice_is_refused():
    model, batch = build("bert")
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    before = outputs(model, batch)
    with pytest.raises(hc.CompressionError, match="quantized already"):
        hc.plan_quantization(model, bits=4)
    assert torch.equal(outputs(model, batch), before)


def test_a_head_tied_to_an_embedding_that_stays_in_float_stays_too():
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**GQA, "tie_word_embeddings": True})).eval()
    hc.apply_(model, hc.plan_quantization(model, bits=8, embeddings=False, skip=None))
    assert type(model.model.embed_tokens) is torch.nn.Embedding and type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert is_quantized(model.model.layers[0].mlp.up_proj)


def test_factors_of_a_planned_module_are_not_told_as_left(caplog):
    model = build("bert")[0]
    hc.apply_(model, hc.plan_low_rank(model, ratio=0.5))
    with caplog.at_level(logging.WARNING):
        hc.plan_quantization(model, bits=8)
    assert "attention.self" not in caplog.text and "output.dense" not in caplog.text


def test_the_base_model_of_a_checkpoint_whose_head_alone_was_changed(tmp_path):
    torch.manual_seed(0)
    config = T.BertConfig(**{**build("bert")[0].config.to_dict(), "num_labels": 32})
    model = T.BertForSequenceClassification(config).eval()
    hc.apply_(model, hc.plan_low_rank(model, ratio=0.5, modules="^classifier$"))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = T.AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(base(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    with pytest.raises(hc.CompressionError, match="another architecture. Load it with BertForSequenceClassification"):
        T.GPT2Model.from_pretrained(tmp_path)
