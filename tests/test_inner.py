"""bitsandbytes and torchao inside a compressed checkpoint: pruned first, converted then, saved, loaded, trained on."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from torch import nn

import hf_compress as hc
from hf_compress import inner
from hf_compress.inner import with_quantizer
from hf_compress.loader import HfCompressConfig, compression_of
from hf_compress.modules import LockedLinear
from tests.trainers import rows, trainer
from tests.zoo import FAMILIES, build, outputs, random_plan

# QLoRA (Dettmers et al., 2023), appendix E
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def bnb4(**options):
    pytest.importorskip("bitsandbytes")
    return T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def bnb4_double():
    return bnb4(bnb_4bit_use_double_quant=True)


def bnb8():
    pytest.importorskip("bitsandbytes")
    return T.BitsAndBytesConfig(load_in_8bit=True)


def ao():
    quantization = pytest.importorskip("torchao.quantization")
    return T.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))


def ao_dynamic():
    quantization = pytest.importorskip("torchao.quantization")
    return T.TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig(version=2))


def nf4(weight):
    blocks = np.zeros(-(-weight.size // 64) * 64)
    blocks[: weight.size] = weight.reshape(-1)
    blocks = blocks.reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / np.maximum(scale, 1e-30)[..., None] - NF4).argmin(-1)
    return (NF4[nearest] * scale).reshape(-1)[: weight.size].reshape(weight.shape)


def int8(weight, levels):
    scale = np.abs(weight).max(1, keepdims=True) / levels
    return np.clip(np.round(weight / scale), -128, 127) * scale


FORMULAS = {bnb4: nf4, bnb8: lambda w: int8(w, 127), ao: lambda w: int8(w, 127.5), ao_dynamic: lambda w: int8(w, 127.5)}
METHODS = [bnb4, bnb4_double, bnb8, ao, ao_dynamic]


def pruned(folder, family="bert", edits=("heads", "neurons"), seed=3, dtype=torch.float32):
    """Uneven widths, and inputs in 64s where the family is one of those that 4 bit is tested with."""
    if family in WIDE:
        model, batch = wide(family, dtype)
        hc.apply_(model, uneven_plan(model))
    else:
        model, batch = build(family, dtype)
        hc.apply_(model, random_plan(model, edits, seed))
    model.save_pretrained(folder)
    return model, batch


WIDE = {
    "bert": dict(hidden_size=128, num_attention_heads=2, intermediate_size=256),
    "vit": dict(hidden_size=128, num_attention_heads=2, intermediate_size=256),
    "llama": dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=256),
}


def wide(family, dtype=torch.float32):
    """A tiny model with heads of 64."""
    kind, config, inputs = FAMILIES[family]()
    for key, value in WIDE[family].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return kind(config).to(dtype).eval(), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}


def uneven_plan(model, neurons=(64, 192, 128)):
    structure = hc.discover(model)
    first = structure.attentions[0]
    heads = hc.KeepHeads(first.name, range(first.groups, first.num_heads))  # the last group of two
    draw = torch.Generator().manual_seed(0)
    kept = [
        torch.randperm(f.size, generator=draw)[:n].sort().values.tolist() for f, n in zip(structure.ffns, neurons, strict=True)
    ]
    return hc.Plan([heads, *(hc.KeepNeurons(f.name, k) for f, k in zip(structure.ffns, kept, strict=True))])


def loaded(model, folder, method, **options):
    return type(model).from_pretrained(folder, config=with_quantizer(folder, method()), **options)


def converted(model):
    """The modules that another method made its own."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (type(module).__module__.startswith("bitsandbytes") or type(module.weight.data).__module__.startswith("torchao"))
    }


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", [bnb4, ao, bnb8])
def test_what_pruning_left_is_quantized_as_the_formula_says(method, family, tmp_path):
    model, batch = pruned(tmp_path, family)
    small = loaded(model, tmp_path, method)
    names = converted(small)
    assert len(names) >= 18 and {64, 128, 192} <= {module.in_features for module in names.values()}
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_(torch.from_numpy(FORMULAS[method](weight.double().numpy())))
    error = (outputs(small, batch) - outputs(model, batch)).norm() / outputs(model, batch).norm()
    # bitsandbytes rounds activations too at 8 bit; torchao's halves at the ends of its range go either way
    assert error < {bnb4: 1e-4, ao: 5e-3, bnb8: 3e-2}[method]


def test_what_stays_in_float(tmp_path):
    model, _ = pruned(tmp_path)
    config = bnb4(llm_int8_skip_modules=["attention.self.query"])
    small = type(model).from_pretrained(tmp_path, config=with_quantizer(tmp_path, config))
    linears = {name for name, module in small.named_modules() if type(module) is nn.Linear}
    assert linears == {"classifier", *(f"bert.encoder.layer.{i}.attention.self.query" for i in range(3))}
    assert {"classifier", "attention.self.query"} <= set(small.config.quantization_config.inner["llm_int8_skip_modules"])


# --- save and load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_saved_and_loaded_in_a_fresh_process(family, method, tmp_path, fresh, plain):
    model, batch = pruned(tmp_path / "float", family)
    small = loaded(model, tmp_path / "float", method)
    expected = outputs(small, batch)  # before saving: bitsandbytes changes its weights where it runs, unless told not to
    small.save_pretrained(tmp_path / "small", max_shard_size="60KB")
    record = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "hf_compress"
    assert (
        record["inner"]["quant_method"]
        == small.quantization_method.value
        == small.hf_quantizer.quantization_config.quant_method
    )
    found = fresh.outputs(type(model).__name__, tmp_path / "small", batch)
    assert any(v.shape == expected.shape and torch.equal(v, expected) for v in found.values())
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path / "small", batch)


@pytest.mark.parametrize(
    ("family", "edits", "method"),
    [
        ("modernbert", ("layers",), ao),  # the lock of the float checkpoint stays
        ("modernbert", ("layers",), bnb8),
        ("t5", ("heads", "neurons", "layers"), bnb8),
        ("gpt2", ("heads", "neurons"), bnb8),
        ("gpt_neox", ("heads", "neurons"), ao),
        ("phi3", ("heads", "neurons"), ao),
    ],
)
def test_other_families_load_again_and_fail_without_the_plugin(family, edits, method, tmp_path, plain):
    model, batch = pruned(tmp_path / "float", family, edits, seed=0)
    small = loaded(model, tmp_path / "float", method)
    small.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(again, batch), outputs(small, batch))
    assert converted(again).keys() == converted(small).keys() != set()
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "twice"), batch), outputs(small, batch))
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path / "small", batch)


def test_torchao_leaves_one_small_layer_in_float_where_nothing_else_would_fail(tmp_path):
    model, _ = pruned(tmp_path, "llama")  # no biases, so every cut shape goes under another name
    small = loaded(model, tmp_path, ao)
    locked = [name for name, module in small.named_modules() if type(module) is LockedLinear]
    sizes = {name: m.weight.numel() for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"}
    assert len(locked) == 1 and sizes[locked[0]] == min(sizes.values())
    assert small.config.quantization_config.layout["modules"][locked[0]]["lock"]
    assert model.config.quantization_config.layout["modules"][locked[0]].get("lock") is None


@pytest.mark.parametrize("method", [bnb4, ao])
def test_low_rank_layers_stay_and_load(method, tmp_path):
    model, batch = wide("bert")
    name = "bert.encoder.layer.1.output.dense"
    hc.apply_(model, uneven_plan(model) + hc.Plan([hc.LowRank(name, 4)]))
    model.save_pretrained(tmp_path / "float")
    small = loaded(model, tmp_path / "float", method)
    assert torch.equal(small.get_submodule(name).weight, model.get_submodule(name).weight)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "small"), batch), outputs(small, batch))


@pytest.mark.parametrize("method", [bnb4, bnb8])  # with torchao it fails in transformers itself, uncompressed too
def test_the_base_model_loads_from_a_task_checkpoint(method, tmp_path):
    model, batch = pruned(tmp_path / "float", "llama", dtype=torch.bfloat16)
    small = loaded(model, tmp_path / "float", method)
    small.save_pretrained(tmp_path / "small")
    base = T.AutoModel.from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(base, batch), outputs(small.model, batch))


@pytest.mark.parametrize("method", [bnb4, bnb8])
def test_dequantized_it_is_the_pruned_model_again(method, tmp_path):
    model, batch = pruned(tmp_path / "float")
    small = loaded(model, tmp_path / "float", method)
    dense = small.dequantize()
    assert not dense.is_quantized and compression_of(dense.config).digest == model.config.quantization_config.digest
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "dense"), batch), outputs(dense, batch))


def test_a_config_in_memory_and_options_of_it(tmp_path):
    model, _ = pruned(tmp_path)
    config = with_quantizer(T.AutoConfig.from_pretrained(tmp_path), bnb4())
    assert config.quantization_config.order is not None and model.config.quantization_config.order is None
    assert with_quantizer(tmp_path, bnb4(), classifier_dropout=0.5).classifier_dropout == 0.5
    again = type(model).from_pretrained(tmp_path, config=model.config)  # a record in memory is not an order
    assert torch.equal(again.classifier.weight, model.classifier.weight) and not getattr(again, "is_quantized", False)


def test_records_without_an_inner_config_are_as_before():
    record = HfCompressConfig(None, {"modules": {}})
    assert set(record.to_dict()) == {"quant_method", "format", "plan", "layout", "digest"}
    inside = HfCompressConfig(None, {"modules": {}}, inner={"quant_method": "torchao", "quant_type": {}})
    assert inside.digest != record.digest
    changed = {**inside.to_dict(), "inner": {"quant_method": "torchao", "quant_type": {"default": 1}}}
    with pytest.raises(hc.CompressionError, match="digest differs"):
        HfCompressConfig(**changed)
    assert HfCompressConfig(**inside.to_dict()).digest == inside.digest


# --- QLoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_qlora_trains_on_a_pruned_model_and_its_adapter_loads(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = pruned(tmp_path / "float", family)
    loaded(model, tmp_path / "float", bnb4).save_pretrained(tmp_path / "small")
    base = type(model).from_pretrained(tmp_path / "small")
    weights = {n: m.weight.detach().clone() for n, m in converted(base).items()}
    tuned = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(base),
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS" if family == "bert" else "CAUSAL_LM"),
    )
    training = trainer(tmp_path / "t", model=tuned, eval_strategy="steps", eval_steps=4, learning_rate=1e-2)
    if family == "llama":
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
        training.train_dataset, training.eval_dataset = data, data[:16]
    training.train()
    losses = [entry["eval_loss"] for entry in training.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    moved = [p.abs().max() > 0 for n, p in tuned.named_parameters() if "lora_B" in n]
    assert len(moved) >= 17 and all(moved)  # they start at zero
    after = {n.replace(".base_layer", ""): m.weight for n, m in converted(base).items() if "lora" not in n}
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    training.save_model(tmp_path / "adapter")
    expected = outputs(tuned.eval(), batch)
    again = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "small"), tmp_path / "adapter").eval()
    assert torch.equal(outputs(again, batch), expected)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "adapter"), batch), expected)  # finds its base


def test_the_page_on_qlora_runs(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    page = (Path(__file__).parent.parent / "docs" / "qlora.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec("".join(re.findall(r"```py\n(.*?)```", page, re.DOTALL)), {})


def test_gradients_pass_through_layers_that_were_evaluated(tmp_path):
    """bitsandbytes repacks on CPUs with AVX512-BF16 when a model is evaluated, and passes no gradient on from then."""
    model, batch = pruned(tmp_path, "llama")
    ids = batch["input_ids"]
    found = []
    for evaluated in (False, True):
        small = loaded(model, tmp_path, bnb4)
        if evaluated:
            outputs(small.eval(), batch)
        embedded = small.get_input_embeddings()(ids).detach().requires_grad_()
        small.train()(inputs_embeds=embedded, labels=ids).loss.backward()
        found.append(embedded.grad)
    assert found[0].abs().max() > 0 and torch.equal(*found)


# --- refusals ----------------------------------------------------------------------------------------------------


def available(monkeypatch):
    for name in inner.INSTALLED:
        monkeypatch.setitem(inner.INSTALLED, name, lambda: True)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, T.FineGrainedFP8Config, "got FineGrainedFP8Config"),
        (None, T.BitsAndBytesConfig, "quantizes nothing"),
        ("stock", None, "stock checkpoint.*quantization_config"),
        ("ours", None, "quantized by hf_compress already.*bitsandbytes on top"),
        ("masks", None, "holds masks"),
        ("inner", None, "is quantized with bitsandbytes already"),
        ("other", None, "is quantized with bitsandbytes already"),
    ],
)
def test_what_is_refused_before_loading(change, config, message, tmp_path, monkeypatch):
    available(monkeypatch)
    model, _ = build("bert")
    if change != "stock":
        hc.apply_(model, random_plan(model, ("neurons",)))
    given = copy.deepcopy(model.config)
    record = getattr(given, "quantization_config", None)
    if change == "ours":
        layout = copy.deepcopy(record.layout)
        layout["modules"]["bert.pooler.dense"] = {"kinds": [["quantized", {"bits": 8}]]}
        given.quantization_config = HfCompressConfig(record.plan_dict, layout)
    elif change == "masks":
        masks = random_plan(model, ("heads",)).to_dict(spans=True)
        given.quantization_config = HfCompressConfig(record.plan_dict, record.layout, masks)
    elif change == "inner":
        given.quantization_config = HfCompressConfig(record.plan_dict, record.layout, inner={"quant_method": "bitsandbytes"})
    elif change == "other":
        given.quantization_config = T.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(hc.CompressionError, match=message):
        with_quantizer(given, config() if config else T.BitsAndBytesConfig(load_in_4bit=True))


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(inner.INSTALLED, "bitsandbytes", lambda: False)
    model, _ = pruned(tmp_path)
    with pytest.raises(hc.CompressionError, match="bitsandbytes is not installed.*pip install -U bitsandbytes"):
        with_quantizer(tmp_path, T.BitsAndBytesConfig(load_in_4bit=True))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    before = model.config.quantization_config
    inside = HfCompressConfig(before.plan_dict, before.layout, inner=T.BitsAndBytesConfig(load_in_8bit=True).to_dict())
    path.write_text(json.dumps({**config, "quantization_config": inside.to_dict()}))
    with pytest.raises(hc.CompressionError, match="bitsandbytes is not installed.*pip install -U bitsandbytes"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [{"quant_method": "gptq"}, {"quant_method": []}, {}, "torchao", 3])
def test_an_unknown_inner_config_in_a_file_is_refused(value):
    with pytest.raises(hc.CompressionError, match="knows bitsandbytes, torchao"):
        HfCompressConfig(None, {"modules": {}}, inner=value)


def test_an_inner_config_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    available(monkeypatch)
    model, _ = pruned(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    before = model.config.quantization_config
    for value in ({"quant_method": "torchao", "quant_type": {}}, {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}):
        record = HfCompressConfig(before.plan_dict, before.layout, inner=value)
        path.write_text(json.dumps({**config, "quantization_config": record.to_dict()}))
        with pytest.raises(hc.CompressionError, match="config cannot be read"):
            type(model).from_pretrained(tmp_path)


def test_a_quantized_model_cannot_be_cut(tmp_path):
    model, batch = pruned(tmp_path)
    small = loaded(model, tmp_path, bnb4)
    before = outputs(small, batch)
    with pytest.raises(hc.CompressionError, match="quantized with bitsandbytes"):
        compression_of(small.config)
    for edit in (hc.Quantize("bert.embeddings.word_embeddings", 8), hc.LowRank("bert.encoder.layer.1.output.dense", 4)):
        with pytest.raises(hc.CompressionError):
            hc.apply_(small, hc.Plan([edit]))
    assert torch.equal(outputs(small, batch), before) and small.config.quantization_config.inner is not None


def test_4_bit_on_a_cpu_takes_inputs_in_64s(tmp_path, monkeypatch):
    """bitsandbytes decodes others wrongly there, and says nothing; a GPU takes any."""
    bnb4()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    model, _ = wide("bert")
    hc.apply_(model, uneven_plan(model, neurons=(64, 80, 128))).save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match=r"1 here do not: bert.encoder.layer.1.output.dense \(80\).*round_to=64"):
        loaded(model, tmp_path, bnb4)
    config = bnb4(llm_int8_skip_modules=["layer.1.output.dense"])
    small = type(model).from_pretrained(tmp_path, config=with_quantizer(tmp_path, config))
    kinds = {i: type(small.bert.encoder.layer[i].output.dense).__name__ for i in range(3)}
    assert kinds == {0: "Linear4bit", 1: "Linear", 2: "Linear4bit"}


def test_models_that_a_method_cannot_convert_are_refused(tmp_path):
    model, _ = pruned(tmp_path / "gpt2", "gpt2")
    with pytest.raises(hc.CompressionError, match="torchao would convert nothing in this GPT2LMHeadModel"):
        loaded(model, tmp_path / "gpt2", ao)
    model, _ = pruned(tmp_path / "wav2vec2", "wav2vec2", ("neurons",))
    with pytest.raises(hc.CompressionError, match="get_input_embeddings"):
        loaded(model, tmp_path / "wav2vec2", ao)
