"""What a stack of layers is, and that removing layers is exact, survives saving, or is refused with the reason."""

import copy
import itertools
import logging

import pytest
import torch
import transformers as T

import hf_compress as hc
from tests.sweep.build import build, fill_
from tests.zoo import ids, outputs

ZAMBA2 = dict(
    vocab_size=99, hidden_size=64, num_attention_heads=8, num_key_value_heads=8, attention_head_dim=16, intermediate_size=96,
    mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=1, mamba_headdim=16, chunk_size=8, adapter_rank=8,
)  # fmt: skip


def zamba2(kinds: str, blocks: int = 1):
    names = [{"m": "mamba", "h": "hybrid"}[kind] for kind in kinds]
    config = T.Zamba2Config(**ZAMBA2, num_hidden_layers=len(kinds), num_mem_blocks=blocks, layers_block_type=names)
    torch.manual_seed(0)
    model = T.Zamba2ForCausalLM(config).eval()
    fill_(model)
    return model


def without(model, kept, batch):
    """The logits without some layers, each of them replaced by a module that gives back what it is given."""

    class Pass(torch.nn.Module):
        def forward(self, hidden, *_, **__):
            return hidden

    double = copy.deepcopy(model)
    stack = double.get_submodule(next(iter(hc.discover(model).stacks.values()))[0].path)
    for index in range(len(stack)):
        if index not in kept:
            stack[index] = Pass()
    with torch.no_grad():
        return double(**batch, use_cache=False).logits


def test_adapters_that_a_shared_block_holds_by_layer_are_no_stack():
    stacks = hc.discover(zamba2("mhmh")).stacks
    assert {name: [layer.name for layer in stack] for name, stack in stacks.items()} == {
        "model.layers": [f"model.layers.{i}" for i in range(4)]
    }


@pytest.mark.parametrize(
    ("kind", "stacks"),
    [
        ("sam", {"vision_encoder.layers", "mask_decoder.transformer.layers"}),  # not output_hypernetworks_mlps
        ("rt_detr", {"model.encoder.aifi.0.layers", "model.decoder.layers"}),  # not bbox_embed
    ],
)
def test_heads_that_stand_side_by_side_are_no_stack(kind, stacks):
    assert {layer.path for layer in hc.discover(build(kind)[0]).layers} == stacks


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_layers_of_mixers_alone_are_a_stack(kind, tmp_path):
    model, batch, _ = build(kind)
    assert {layer.path for layer in hc.discover(model).layers} == {"backbone.layers"}
    expected = without(model, (0, 2), batch)
    cut = hc.apply_(model, hc.Plan([hc.KeepLayers((0, 2))]))
    torch.testing.assert_close(outputs(cut, batch), expected, atol=1e-5, rtol=1e-5)
    assert [m.layer_idx for m in cut.backbone.layers] == [0, 1] and cut.config.num_hidden_layers == 2
    cut.save_pretrained(tmp_path)
    again = type(cut).from_pretrained(tmp_path).eval()
    assert again.config.to_dict().get("quantization_config") is None
    assert torch.equal(outputs(again, batch), outputs(cut, batch))
    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(**batch, **options), again.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize(("kinds", "blocks"), [("mhmh", 1), ("hhmh", 2)])
def test_every_set_of_zamba2_layers_is_exact_and_loads_or_is_refused(kinds, blocks, tmp_path):
    model, batch = zamba2(kinds, blocks), {"input_ids": ids()}
    before, found = outputs(model, batch), {"exact": [], "refused": []}
    for kept in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in (1, 2, 3)):
        double = copy.deepcopy(model)
        try:
            hc.apply_(double, hc.Plan([hc.KeepLayers(kept)]))
        except hc.CompressionError:
            assert torch.equal(outputs(double, batch), before)
            found["refused"].append(kept)
            continue
        torch.testing.assert_close(outputs(double, batch), without(model, kept, batch), atol=1e-5, rtol=1e-5)
        double.save_pretrained(tmp_path / str(kept))
        again = type(double).from_pretrained(tmp_path / str(kept)).eval()
        assert torch.equal(outputs(again, batch), outputs(double, batch)), kept
        found["exact"].append(kept)
    # without attention no cache counts tokens; of blocks a b . a, a config that is shorter ties the last to another one
    assert found["refused"] == ([(0,), (2,), (0, 2)] if blocks == 1 else [(2,), (0, 3), (0, 2, 3)])


def test_layers_that_would_be_tied_to_others_are_refused():
    with pytest.raises(hc.CompressionError, match=r"loads again.*layers\.0\.shared.*layers\.2\.shared.*the last of those"):
        hc.apply_(zamba2("hhmh", 2), hc.Plan([hc.KeepLayers((0, 2, 3))]))


def test_a_decoder_deeper_than_its_cache_is_refused_before_anything_changes(tmp_path):
    model, batch, _ = build("prophetnet")
    before = outputs(model, batch)
    with pytest.raises(hc.CompressionError, match="cache as deep as the config says of the encoder.*at least as many layers"):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0], "encoder")]))
    assert torch.equal(outputs(model, batch), before)
    hc.apply_(model, hc.Plan([hc.KeepLayers([0, 2], "encoder"), hc.KeepLayers([1], "decoder")]))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    sides = [again.config, again.prophetnet.encoder.config, again.prophetnet.decoder.config]
    here = [model.config, model.prophetnet.encoder.config, model.prophetnet.decoder.config]
    counts = [[(c.num_encoder_layers, c.num_decoder_layers) for c in configs] for configs in (sides, here)]
    assert counts[0] == counts[1] == [(2, 1)] * 3


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "longt5", "switch_transformers", "udop"])
def test_what_will_not_generate_says_so(kind, caplog):
    model, batch, _ = build(kind)
    with caplog.at_level(logging.WARNING):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0], "encoder")]))
    assert "will fail with an IndexError" in caplog.text and type(model).__name__ in caplog.text
    batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    with pytest.raises(IndexError):
        model.generate(**batch, max_new_tokens=3)
    assert model.generate(**batch, max_new_tokens=3, use_cache=False).shape[0] == 2


def test_where_the_decoder_has_its_cache_nothing_is_said(caplog):
    model, batch, _ = build("bart")
    with caplog.at_level(logging.WARNING):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0], "encoder")]))
    assert "IndexError" not in caplog.text
    model.generate(batch["input_ids"], max_new_tokens=3)


@pytest.mark.parametrize("verb", [hc.mask_, hc.apply_])
def test_a_layer_that_changes_shapes_is_refused_by_name(verb):
    model, batch, _ = build("hiera")
    before = outputs(model, batch)
    stack = "hiera.encoder.stages.1.layers"
    with pytest.raises(hc.CompressionError, match=rf"'{stack}\.0' cannot be removed.*\(2, 256, 16\) into \(2, 64, 32\)"):
        verb(model, hc.Plan([hc.KeepLayers([1], stack)]))
    assert torch.equal(outputs(model, batch), before)


def test_refusals_of_layers_and_heads_say_what_others_read():
    config = T.Gemma3nTextConfig(
        vocab_size=99, vocab_size_per_layer_input=99, hidden_size=64, hidden_size_per_layer_input=8, intermediate_size=80,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, laurel_rank=8,
        sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    model = T.Gemma3nForCausalLM(config).eval()
    with pytest.raises(hc.CompressionError, match="hidden_size_per_layer_input.*Leave KeepLayers out"):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0, 1])]))
    first, reader = "model.layers.0.self_attn", "model.layers.2.self_attn"
    with pytest.raises(hc.CompressionError, match=f"cut of '{first}'.*{reader} then fails.*num_kv_shared_layers=2.*Leave"):
        hc.apply_(model, hc.Plan([hc.KeepHeads(first, [0, 1])]))
    config = T.UdopConfig(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, image_size=32, patch_size=8,
        max_2d_position_embeddings=64,
    )  # fmt: skip
    names = [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    with pytest.raises(hc.CompressionError, match=f"cut of '{names[0]}'.*{names[1]} then fails.*position bias.*Leave"):
        hc.apply_(T.UdopEncoderModel(config).eval(), hc.Plan([hc.KeepHeads(names[0], [0, 1])]))


def test_a_stack_keeps_a_layer_that_counts_tokens():
    model, _, _ = build("nemotron_h")
    with pytest.raises(hc.CompressionError, match=r"counts tokens.*Keep at least one.*model\.layers\.2\.mixer"):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0, 1, 3])]))


def test_shared_weights_are_left_as_they_are_and_named(caplog):
    model = zamba2("mhmh")
    with caplog.at_level(logging.WARNING):
        low, sparse = hc.plan_low_rank(model, ratio=0.5), hc.plan_sparsity(model, sparsity=0.5)
    assert {edit.module.split(".")[3] for plan in (low, sparse) for edit in plan} == {"mamba", "mamba_decoder", "linear"}
    assert "shares its weight" in caplog.text and "Left dense" in caplog.text
    with pytest.raises(hc.CompressionError, match="layers.1.*shares its weight with.*layers.3"):
        hc.plan_low_rank(model, ratio=0.5, modules="shared_transformer")
    name = "model.layers.0.mamba.in_proj"
    with pytest.raises(hc.CompressionError, match=f"'{name}': Rank 60 .* saves nothing.*Lower"):
        hc.apply_(model, hc.Plan([hc.LowRank(name, 60)]))


def same_when_loaded(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "cut")
    loaded = type(model).from_pretrained(tmp_path / "cut").eval()
    with torch.no_grad():
        return torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_lists_of_another_stack_stay_as_they_are(tmp_path):
    """Mllama's global layers are as many as the layers of the other transformer that its images are read from."""
    torch.manual_seed(0)
    vision = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_global_layers=2, attention_heads=4, image_size=32,
        patch_size=8, max_num_tiles=2, intermediate_layers_indices=[0, 2], vision_output_dim=192,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    text = dict(
        vocab_size=120, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        cross_attention_layers=[1, 3], rope_parameters={"rope_type": "default", "rope_theta": 1e4}, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = T.MllamaConfig(text_config=text, vision_config=vision, image_token_index=100)
    model = T.MllamaForConditionalGeneration(config).eval()
    hc.apply_(model, hc.Plan([hc.KeepLayers([1], "model.vision_model.global_transformer.layers")]))
    assert model.config.vision_config.intermediate_layers_indices == [0, 2]
    one = torch.ones(1, 4, dtype=torch.long)
    batch = dict(
        pixel_values=torch.randn(1, 1, 2, 3, 32, 32), aspect_ratio_ids=torch.tensor([[2]]), attention_mask=one,
        aspect_ratio_mask=torch.ones(1, 1, 2, dtype=torch.long), input_ids=torch.tensor([[1, 100, 5, 6]]),
        cross_attention_mask=torch.ones(1, 4, 1, 2, dtype=torch.long),
    )  # fmt: skip
    assert same_when_loaded(model, batch, tmp_path)


@pytest.mark.parametrize("kept", [[0, 1], [1, 3], [0, 1, 2]])
def test_windows_of_leds_encoder_are_not_its_decoders(kept, tmp_path):
    torch.manual_seed(0)
    config = T.LEDConfig(
        vocab_size=99, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, attention_window=[4, 8, 4, 8],
    )  # fmt: skip
    model = T.LEDForConditionalGeneration(config).eval()
    hc.apply_(model, hc.Plan([hc.KeepLayers(kept, "led.decoder.layers")]))
    assert model.config.attention_window == [4, 8, 4, 8] and model.config.decoder_layers == len(kept)
    assert same_when_loaded(model, {"input_ids": torch.randint(5, 99, (2, 16))}, tmp_path)
    hc.apply_(model, hc.Plan([hc.KeepLayers([1, 2], "led.encoder.layers")]))
    assert model.config.attention_window == [8, 4]
    assert same_when_loaded(model, {"input_ids": torch.randint(5, 99, (2, 16))}, tmp_path)


def test_kinds_that_follow_from_numbers_are_named():
    torch.manual_seed(0)
    config = T.JambaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    model = T.JambaForCausalLM(config).eval()
    with pytest.raises(hc.CompressionError, match=r"attn_layer_period=2.*kind that this rule gives"):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0, 1, 3])]))


def test_a_config_that_builds_nothing_is_said_to():
    """Stock Zamba cannot tie the one hybrid layer that is left."""
    model, _, _ = build("zamba")
    assert model.config.layers_block_type[1] == "hybrid" and "hybrid" in model.config.layers_block_type[2:]
    with pytest.raises(hc.CompressionError, match="its config would not build any model"):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0, 1])]))
