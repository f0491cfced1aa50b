"""What else reads the shapes of a cut model: placement, offload, compilers, checkpointing, caches, adapters, fresh weights."""

import copy
import functools
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.modules import dense_weight
from hf_compress.quantization import dequantized
from tests.composites import build_composite
from tests.zoo import GQA, build, ids, outputs, random_plan

FAMILIES = ("bert", "gpt2", "llama", "t5", "whisper", "vit")


def mostly_slow(families, *quick):
    """The suite runs for every change; the rest with `make test-all`."""
    return [pytest.param(f, marks=() if f in quick else pytest.mark.slow) for f in families]


@functools.cache
def cut(family):
    """A model with other heads and neurons in every layer, a batch, what it gives, and its checkpoint in small shards."""
    model, batch = build(family)
    hc.apply_(model, random_plan(model, ("heads", "neurons"), seed=1))
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name, max_shard_size="40KB")
    assert len(list(Path(folder.name).glob("*.safetensors"))) > 1
    return model, batch, outputs(model, batch), folder


# --- where weights lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "bert", "llama", "t5"))
def test_placed_and_offloaded(family, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, batch, expected, folder = cut(family)
    for place in ("cpu", "auto"):
        loaded = type(model).from_pretrained(folder.name, device_map=place).eval()
        assert torch.equal(outputs(loaded, batch), expected)
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    places = accelerate.infer_auto_device_map(model, {"cpu": half}, no_split_module_classes=model._no_split_modules)
    loaded = type(model).from_pretrained(folder.name, device_map=places, offload_folder=tmp_path).eval()
    assert "disk" in places.values() and any(p.is_meta for p in loaded.parameters())
    assert torch.equal(outputs(loaded, batch), expected)


# --- compilers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama"))
def test_compiled_as_one_graph(family):
    model, batch, expected, _ = cut(family)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(outputs(compiled, batch), expected, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "bert"))
def test_exported(family):
    model, batch, expected, _ = cut(family)
    batch = batch if family == "vit" else {**batch, "use_cache": False}
    if family == "bert":
        batch.pop("use_cache")
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs=batch, strict=False)
        again = program.module()(**batch)
    torch.testing.assert_close(again["logits"], expected, rtol=1e-6, atol=1e-6)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "bert", "llama", "t5"))
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, batch, _, _ = cut(family)
    gradients = []
    for checkpointing in (False, True):
        student = copy.deepcopy(model).train()
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        student.config.use_cache = False
        if checkpointing:
            student.gradient_checkpointing_enable()
        torch.manual_seed(0)
        student(**batch)[0].float().square().mean().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(tied, tmp_path, fresh):
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**GQA, tie_word_embeddings=tied)).eval()
    batch = {"input_ids": ids()}
    hc.apply_(model, random_plan(model, ("heads", "neurons", "layers")))
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs("LlamaForCausalLM", tmp_path, batch)["logits"], outputs(model, batch))
    for again in (T.LlamaForCausalLM.from_pretrained(tmp_path), hc.from_config(model.config, T.LlamaForCausalLM)):
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")]
    + [pytest.param(f, t, marks=pytest.mark.slow) for f, t in (("t5", "SEQ_2_SEQ_LM"), ("vit", None))],
)
def test_an_adapter_on_a_cut_model(family, task, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch, expected, folder = cut(family)
    labels = torch.tensor([0, 1]) if family in ("bert", "vit") else batch.get("decoder_input_ids", batch["input_ids"])
    base = type(model).from_pretrained(folder.name)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type=task)).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        tuned(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = outputs(tuned.eval(), batch)
    assert (trained - expected).abs().max() > 1e-2
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(type(model).from_pretrained(folder.name), tmp_path / "adapter").eval()
    assert torch.equal(outputs(again, batch), trained)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch), trained, rtol=1e-4, atol=1e-4)
    plan = random_plan(merged, ("neurons",), seed=3)  # what was merged is cut as any other
    with hc.mask_(merged, plan):
        masked = outputs(merged, batch)
    hc.apply_(merged, plan).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged, batch), masked, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "merged").eval(), batch), outputs(merged, batch))


# --- caches ------------------------------------------------------------------------------------------------------

HYBRID = dict(GQA, num_hidden_layers=4)
TURNS = ["sliding_attention", "full_attention"] * 2
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
MIXED = {
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**HYBRID, sliding_window=6, query_pre_attn_scalar=16)),
    "gemma3": lambda: T.Gemma3ForCausalLM(
        T.Gemma3TextConfig(**HYBRID, sliding_window=6, query_pre_attn_scalar=16, layer_types=TURNS)
    ),
    "qwen3_next": lambda: T.Qwen3NextForCausalLM(T.Qwen3NextConfig(
        **HYBRID, **LINEAR, layer_types=["linear_attention", "full_attention"] * 2, moe_intermediate_size=32, num_experts=4,
        shared_expert_intermediate_size=32, num_experts_per_tok=2,
    )),
    "bamba": lambda: T.BambaForCausalLM(T.BambaConfig(
        **{k: v for k, v in HYBRID.items() if k != "head_dim"}, attn_layer_indices=[1, 3], mamba_n_heads=8, mamba_d_head=16,
        mamba_n_groups=1, mamba_d_state=16, mamba_expand=2,
    )),
    "lfm2": lambda: T.Lfm2ForCausalLM(T.Lfm2Config(
        **{k: v for k, v in HYBRID.items() if k != "head_dim"}, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
    )),
}  # fmt: skip


def written(model, batch, **options):
    """What greedy generation writes, and the logits of each step."""
    with torch.no_grad():
        made = model.generate(
            **batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
    return made.sequences, torch.stack(made.logits, 1)


@pytest.mark.parametrize("kept", [pytest.param([0, 3], marks=pytest.mark.slow), [1, 2, 3]])
@pytest.mark.parametrize("name", mostly_slow(MIXED, "gemma3", "qwen3_next", "bamba"))
def test_layers_of_several_kinds_keep_their_caches(name, kept, tmp_path):
    """The text is longer than the window. Reference: the dense model with the layers skipped, without any cache."""
    torch.manual_seed(0)
    model = MIXED[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch, plan = {"input_ids": ids(2, 10)}, hc.Plan([hc.KeepLayers(kept)])
    with hc.mask_(model, plan):
        text, logits = written(model, batch, use_cache=False)
    hc.apply_(model, plan).save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path).eval()):
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            got, steps = written(one, batch, **options)
            assert torch.equal(got, text)
            torch.testing.assert_close(steps, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", mostly_slow(("llama", "gpt2", "gemma3"), "llama"))
def test_caches_of_layers_with_different_heads(family):
    """Chunked prefill makes a static cache before the first keys: its shape must not come from the config."""
    model, batch = build(family)
    plan = random_plan(model, ("heads", "neurons"), seed=1)
    batch = {"input_ids": batch["input_ids"]}
    with hc.mask_(model, plan):
        text, logits = written(model, batch, use_cache=False)
    hc.apply_(model, plan)
    assert len({a.num_key_value_heads for a in hc.discover(model).attentions}) > 1
    static = {"cache_implementation": "static", "disable_compile": True}
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for one, options in (
        (model, static),
        (model, {**static, "prefill_chunk_size": 4}),
        (copied, {**static, "prefill_chunk_size": 4}),
    ):
        got, steps = written(one, batch, **options)
        assert torch.equal(got, text)
        torch.testing.assert_close(steps, logits, atol=1e-5, rtol=1e-5)
    beams = [
        model.generate(**batch, num_beams=3, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*beams)
    one = {"input_ids": batch["input_ids"][:1]}
    assisted = build(family)[0].generate(**one, max_new_tokens=6, do_sample=False, assistant_model=model)
    assert torch.equal(assisted, build(family)[0].generate(**one, max_new_tokens=6, do_sample=False))


def test_one_paged_cache_for_all_layers_is_refused(tmp_path):
    model, _, _, folder = cut("llama")
    for one in (model, type(model).from_pretrained(folder.name)):
        with pytest.raises(hc.CompressionError, match="Continuous batching"):
            one.generate_batch([[5, 6, 7]])
    narrow, _ = build("llama")
    hc.apply_(narrow, random_plan(narrow, ("neurons",)))
    assert "generate_batch" not in vars(narrow)


# --- from_config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", mostly_slow([*FAMILIES, "modernbert", "swin", "wav2vec2", "mpnet"], "bert", "gpt2", "t5", "modernbert")
)
def test_a_fresh_model_of_the_compressed_architecture(family, tmp_path):
    model, batch = build(family)
    hc.apply_(model, random_plan(model, ("heads", "neurons", "layers"))).save_pretrained(tmp_path / "small")
    config = T.AutoConfig.from_pretrained(tmp_path / "small")
    torch.manual_seed(7)
    fresh = hc.from_config(config)
    assert type(fresh) is type(model) and fresh.training
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    assert (outputs(fresh.eval(), batch) - outputs(model, batch)).abs().max() > 1e-3
    config.__dict__.pop("quantization_config")
    torch.manual_seed(7)
    stock = dict(type(model)._from_config(config).named_parameters())
    for name, parameter in fresh.named_parameters():  # drawn as stock draws
        if parameter.numel() > 500:
            torch.testing.assert_close(parameter.std(), stock[name].std(), rtol=0.2, atol=1e-6)
    equal = [name for name, parameter in fresh.named_parameters() if parameter.shape == stock[name].shape]
    assert family in ("modernbert", "swin") or all(torch.equal(fresh.get_parameter(n), stock[n]) for n in equal)

    optimizer = torch.optim.SGD(fresh.train().parameters(), lr=0.1)
    fresh(**batch)[0].float().square().mean().backward()
    optimizer.step()
    fresh.eval().save_pretrained(tmp_path / "fresh")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "fresh").eval(), batch), outputs(fresh, batch))


def test_fresh_kinds_exits_and_parts(tmp_path):
    model, batch = build("bert")
    layer = "bert.encoder.layer.1"
    hc.apply_(model, random_plan(model, ("heads", "neurons")) + hc.Plan([
        hc.LowRank(f"{layer}.intermediate.dense", 9), hc.LowRank(f"{layer}.attention.self.query", 9),
        hc.Quantize(f"{layer}.intermediate.dense", 8), hc.Quantize("bert.embeddings.word_embeddings", 4), hc.AddExits([0], threshold=0.55),
    ]))  # fmt: skip
    fresh = hc.from_config(model.config, T.AutoModelForSequenceClassification).eval()
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    both = dequantized(fresh.get_submodule(f"{layer}.intermediate.dense"))
    rows = dequantized(fresh.bert.embeddings.word_embeddings)["weight"]
    for weight in (
        both["weight"] @ both["weight_in"],
        dense_weight(fresh.get_submodule(f"{layer}.attention.self.query")),
        rows,
    ):
        assert weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    fresh.save_pretrained(tmp_path)
    again = T.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert list(again.exit_heads) == ["0"] and torch.equal(outputs(again, batch), outputs(fresh, batch))

    whole, batch = build_composite("clip")
    hc.apply_(whole, random_plan(whole, ("heads", "neurons")))
    fresh = hc.from_config(whole.config, T.CLIPModel)
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {n: p.shape for n, p in whole.state_dict().items()}
    alone = hc.from_config(whole.config.text_config, T.CLIPTextModel)
    assert {n: p.shape for n, p in alone.state_dict().items()} == {n: p.shape for n, p in whole.text_model.state_dict().items()}


def test_a_tied_head_of_integers_stays_tied_when_fresh():
    model, _ = build("gpt2")
    hc.apply_(model, hc.Plan([hc.Quantize("transformer.wte", 8)]))
    fresh = hc.from_config(model.config, T.GPT2LMHeadModel)
    for key in ("weight", "weight_scale"):
        assert getattr(fresh.lm_head, key) is getattr(fresh.transformer.wte, key)


def test_a_config_without_a_record_and_what_is_no_config():
    _, batch = build("bert")
    torch.manual_seed(3)
    stock = T.BertModel._from_config(build("bert")[0].config)
    torch.manual_seed(3)
    fresh = hc.from_config(build("bert")[0].config, T.BertModel)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in stock.state_dict().items())
    with pytest.raises(hc.CompressionError, match="takes the config"):
        hc.from_config("a/folder")
    with pytest.raises(hc.CompressionError, match="auto_class"):
        hc.from_config(stock.config, "BertModel")
