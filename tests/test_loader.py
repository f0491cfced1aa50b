"""One loader for every plan: any dtype, sharded, base classes, pipelines; loud when something is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.layout import gates_of
from hf_compress.loader import HfCompressConfig
from hf_compress.masking import masks_in
from tests.zoo import FAMILIES, GQA, TEXT, build, outputs, random_plan

GOLDEN = Path(__file__).parent / "golden"


def cut(family="bert", edits=("heads", "neurons"), dtype=torch.float32, seed=0):
    model, batch = build(family, dtype)
    return hc.apply_(model, random_plan(model, edits, seed)), batch


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mpnet", "phi3", "swin", "vit"])
@pytest.mark.parametrize(("dtype", "shards"), [("float32", "40KB"), ("bfloat16", "40KB"), ("bfloat16", "1GB")])
def test_dtypes_and_shards(family, dtype, shards, tmp_path, fresh):
    model, batch = cut(family, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "40KB")
    found = fresh.outputs(type(model).__name__, tmp_path, batch, dtype=dtype)
    expected = outputs(model, batch)
    assert any(v.dtype == expected.dtype and torch.equal(v, expected) for v in found.values())


@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("bert", "BertModel"),
        ("llama", "LlamaModel"),
        ("vit", "ViTModel"),
        ("modernbert", "ModernBertModel"),
        ("opt", "OPTModel"),
    ],
)
def test_the_base_model_loads_from_a_task_checkpoint_and_back(family, base, tmp_path, fresh):
    model, batch = cut(family, ("heads", "neurons", "layers"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.base_model.eval()(**batch).last_hidden_state
    assert torch.equal(fresh.outputs(base, tmp_path, batch)["last_hidden_state"], expected)
    assert torch.equal(fresh.outputs("AutoModel", tmp_path, batch)["last_hidden_state"], expected)
    T.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")  # the head is new, the body is not
    with torch.no_grad():
        assert torch.equal(again.base_model.eval()(**batch).last_hidden_state, expected)


def test_a_loaded_model_is_an_ordinary_one(tmp_path):
    model, batch = cut("bert")
    model.save_pretrained(tmp_path / "one")
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "two")
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "two", device_map="cpu")
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    assert next(loaded.half().parameters()).dtype == torch.float16
    assert next(loaded.to(torch.float64).parameters()).dtype == torch.float64
    T.Trainer(loaded.float(), T.TrainingArguments(str(tmp_path / "t"), use_cpu=True))


def test_pipelines(tmp_path):
    model, _ = cut("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film", "bad"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = T.BertTokenizer(str(tmp_path / "vocab.txt"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answer = T.pipeline("text-classification", model=str(tmp_path), top_k=None)("fine film")
    with torch.no_grad():
        expected = model(**tokenizer("fine film", return_tensors="pt")).logits.softmax(-1)[0]
    found = {d["label"]: d["score"] for d in (answer[0] if isinstance(answer[0], list) else answer)}
    assert found["LABEL_1"] == pytest.approx(expected[1].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("family", "heads", "stock"),
    [("llama", 0.5, True), ("qwen3", 0.5, True), ("vit", 0.5, True), ("phi3", 0.5, True), ("bert", 0.5, False)]
    + [(f, 0.0, True) for f in ("bert", "gpt2", "t5_gated", "opt", "bart", "whisper", "gpt_neox", "modernbert", "clip", "mistral")],
)  # fmt: skip
def test_uniform_cuts_stay_stock_where_the_config_can_say_it(family, heads, stock, tmp_path, plain):
    model, batch = build(family)
    plan = hc.plan_pruning(model, heads=heads, neurons=0.5, score="magnitude", uniform=True)
    hc.apply_(model, plan)
    model.save_pretrained(tmp_path)
    assert ("quantization_config" not in json.loads((tmp_path / "config.json").read_text())) == stock
    if stock:
        expected = outputs(model, batch)
        found = plain.outputs(type(model).__name__, tmp_path, batch)
        assert any(v.shape == expected.shape and torch.equal(v, expected) for v in found.values())
    else:
        with pytest.raises(RuntimeError, match="mismatch"):
            plain.outputs(type(model).__name__, tmp_path, batch)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_stock_then_further(family, tmp_path, fresh):
    """A checkpoint pruned to a stock shape, loaded, and cut again to one that is not."""
    model, batch = build(family)
    hc.apply_(model, hc.plan_pruning(model, neurons=0.5, score="magnitude", uniform=True))
    model.save_pretrained(tmp_path / "stock")
    loaded = type(model).from_pretrained(tmp_path / "stock")
    hc.apply_(loaded, random_plan(loaded, ("heads", "neurons", "layers"), seed=4))
    loaded.save_pretrained(tmp_path / "more")
    expected = outputs(loaded, batch)
    found = fresh.outputs(type(model).__name__, tmp_path / "more", batch)
    assert any(v.shape == expected.shape and torch.equal(v, expected) for v in found.values())


@pytest.mark.parametrize(
    ("family", "kept", "stack"), [("modernbert", [1, 2], None), ("swin", [1], "swin.encoder.layers.0.blocks")]
)
def test_layers_that_a_shorter_config_would_build_otherwise(family, kept, stack, tmp_path, fresh, plain):
    """ModernBERT's first layer has no norm, Swin's blocks take turns: which layers stayed must be known to load."""
    model, batch = build(family)
    plan = hc.Plan([hc.KeepLayers(kept, stack)])
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one")
    hc.apply_(again, random_plan(again, ("neurons",)))
    expected = outputs(again, batch)
    again.save_pretrained(tmp_path / "two")
    found = fresh.outputs(type(model).__name__, tmp_path / "two", batch)
    assert any(v.shape == expected.shape and torch.equal(v, expected) for v in found.values())
    for folder in ("one", "two"):
        with pytest.raises(RuntimeError, match="mismatch"):
            plain.outputs(type(model).__name__, tmp_path / folder, batch)


@pytest.mark.parametrize("folder", sorted(p.name for p in GOLDEN.iterdir()) if GOLDEN.is_dir() else [])
def test_golden_checkpoints_load_for_ever(folder, fresh):
    """Written once, by the version in the folder's name; whatever comes later must read them to the same logits."""
    record = json.loads((GOLDEN / folder / "expected.json").read_text())
    found = fresh.outputs(record["kind"], GOLDEN / folder, {"input_ids": torch.tensor(record["input_ids"])})
    allowed = record.get("tolerance", 1e-5)  # int8 on another CPU may round a few activations the other way
    torch.testing.assert_close(found["logits"], torch.tensor(record["logits"]), atol=allowed, rtol=allowed)


# --- what must not load ------------------------------------------------------------------------------------------


def spoiled(tmp_path, change):
    model, _ = cut("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    record = config["quantization_config"]
    record["layout"] = json.loads(record["layout"])
    change(record)
    record["layout"] = json.dumps(record["layout"], sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(config))
    return tmp_path


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["layout"]["modules"][QUERY]["shapes"].update(weight=[32, 64]), "digest differs"),
        (lambda q: q["plan"]["edits"].pop(), "digest differs"),
        (lambda q: q["plan"].update(edits=[]), "digest differs"),
        (lambda q: q.update(format=99), "format 99"),
        (lambda q: q.update(surprise=1), "surprise"),
        (lambda q: (q.pop("digest"), q["layout"].pop("modules")), "has no 'modules'"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"][QUERY]["shapes"].update(weight=[10**9, 64])), "another architecture"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"][QUERY]["shapes"].update(weight=[0, 64])), "whole numbers > 0"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"][QUERY]["shapes"].update(nothing=[1])), "no such weight"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"][QUERY].update(code="import os")), "no hf_compress of this version"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"][QUERY].update(attributes={"__class__": 1})), "only whole numbers"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"][QUERY].update(attributes={"forward": 1})), "does not have"),
        (lambda q: (q.pop("digest"), q["layout"]["modules"].update({"bert.gone": {}})), "does not have: another model"),
        (lambda q: (q.pop("digest"), q["layout"].update(layers={"bert.encoder.layer": [7]})), "keeps layers"),
    ],
)  # fmt: skip
def test_a_changed_record_is_refused(change, message, tmp_path):
    with pytest.raises(hc.CompressionError, match=message):
        T.AutoModelForSequenceClassification.from_pretrained(spoiled(tmp_path, change))


def test_a_truncated_layout_is_refused(tmp_path):
    spoiled(tmp_path, lambda q: q.pop("digest"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layout"] = config["quantization_config"]["layout"][:-5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hc.CompressionError, match="layout is not whole"):
        T.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_truncated_weight_file_is_named(tmp_path):
    model, _ = cut("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-10], whole[:100], b""):
        path.write_bytes(data)
        with pytest.raises(hc.CompressionError, match="model.safetensors is truncated"):
            type(model).from_pretrained(tmp_path)


def test_a_plan_for_another_architecture_is_refused(tmp_path):
    model, _ = cut("bert")
    model.save_pretrained(tmp_path / "bert")
    other = T.LlamaForCausalLM(T.LlamaConfig(**GQA))
    other.save_pretrained(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    config["quantization_config"] = json.loads((tmp_path / "bert" / "config.json").read_text())["quantization_config"]
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    loaded = None
    with pytest.raises(ValueError, match="another"):
        loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert loaded is None


def test_the_record_is_not_an_order(tmp_path):
    model = T.BertModel(T.BertConfig(**TEXT))
    model.save_pretrained(tmp_path)
    record = HfCompressConfig()
    with pytest.raises(hc.CompressionError, match="apply_"):
        T.BertModel.from_pretrained(tmp_path, quantization_config=record)


def test_a_quantized_model_is_refused():
    model, _ = build("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(hc.CompressionError, match="quantized with bitsandbytes"):
        hc.apply_(model, random_plan(model, ("heads",)))
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 64


def test_loading_does_not_depend_on_discover(tmp_path, monkeypatch):
    model, batch = cut("swin")
    model.save_pretrained(tmp_path)

    def gone(*_):
        raise AssertionError("the loader looked for structure")

    for module in ("resolve", "record", "masking"):
        monkeypatch.setattr(f"hf_compress.{module}.discover", gone)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path), batch), outputs(model, batch))


def write_golden():
    """Run once per plan format: python -c "from tests.test_loader import write_golden; write_golden()"."""
    for family, masked in (("bert", False), ("llama", False), ("bert", True)):
        folder = GOLDEN / f"{family}{'-masked' * masked}-{hc.__version__}"
        shutil.rmtree(folder, ignore_errors=True)
        kind, config, _ = FAMILIES[family]()
        for key, value in dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=40).items():
            setattr(config, key, value)
        if family == "llama":
            config.head_dim = 4
        torch.manual_seed(0)
        model = kind(config).eval()
        plan = random_plan(model, ("heads", "neurons"), seed=7)
        if masked:  # as PruningCallback records it in the middle of a training
            hc.mask_(model, plan)
            layout = {"modules": {}, "gates": gates_of(model)}
            model.config.quantization_config = HfCompressConfig(None, layout, masks_in(model).to_dict(spans=True))
        else:
            hc.apply_(model, plan)
        model.save_pretrained(folder)
        ids = torch.tensor([[5, 6, 7, 8, 30]])
        record = {"kind": kind.__name__, "input_ids": ids.tolist(), "logits": outputs(model, {"input_ids": ids}).tolist()}
        (folder / "expected.json").write_text(json.dumps(record) + "\n")


def write_golden_kinds():
    """Run once, as `write_golden`: heads and neurons cut, a low-rank layer, 4 and 8 bits, an exit."""
    folder = GOLDEN / f"bert-kinds-{hc.__version__}"
    shutil.rmtree(folder, ignore_errors=True)
    model, batch = build("bert")
    layer = "bert.encoder.layer.1"
    plan = random_plan(model, ("heads", "neurons")) + hc.Plan(
        [
            hc.LowRank(f"{layer}.intermediate.dense", 9),
            hc.Quantize(f"{layer}.intermediate.dense", 8),
            hc.Quantize("bert.embeddings.word_embeddings", 4),
            hc.Quantize("bert.encoder.layer.0.output.dense", 3, group_size=16),
            hc.Quantize("bert.encoder.layer.2.output.dense", 8, activations="tensor"),
            hc.AddExits([0], threshold=0.55),
        ]
    )
    hc.apply_(model, plan)
    with torch.no_grad():
        model.exit_heads["0"].out.weight.mul_(40)
    model.save_pretrained(folder)
    record = {"kind": type(model).__name__, "input_ids": batch["input_ids"].tolist(), "tolerance": 0.02}
    record["logits"] = outputs(model, {"input_ids": batch["input_ids"]}).tolist()
    (folder / "expected.json").write_text(json.dumps(record))
