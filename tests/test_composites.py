"""Models of several parts: the whole as ever; each part alone, from the whole's checkpoint and by itself; parts put together."""

import json

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.loader import compression_of
from hf_compress.parts import parts_in
from hf_compress.probe import tensors_in
from tests.composites import COMPOSITES, FROM_WHOLE, SIGHT, WORDS, build_composite
from tests.sweep.build import build as build_tiny
from tests.zoo import GPT2, build, ids, outputs, pixels, random_plan

LONG_AUDIO = "audio_model"  # CLAP's audio part is a Swin


def found(model, batch):
    with torch.no_grad():
        return tensors_in(model(**batch))


def equal(one, other):
    return len(one) == len(other) > 0 and all(n == m and torch.equal(a, b) for (n, a), (m, b) in zip(one, other, strict=True))


def cut(name, edits=("heads", "neurons")):
    model, batch = build_composite(name)
    plan = random_plan(model, edits)
    plan = hc.Plan([e for e in plan if not (isinstance(e, hc.KeepHeads) and e.attention.startswith(LONG_AUDIO))])
    with hc.mask_(model, plan):
        masked = found(model, batch)
    dense = found(model, batch)
    assert max((a - b).abs().max() for (_, a), (_, b) in zip(masked, dense, strict=True)) > 1e-5, "a plan without effect"
    hc.apply_(model, plan, inputs=batch)
    for (_, a), (_, b) in zip(found(model, batch), masked, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    return model, batch


def part_output(model, kind, path, key, batch):
    """What a class of one part must give, computed by the whole's own modules."""
    with torch.no_grad():
        output = model.get_submodule(path)(**{key: batch[key]})
        if not kind.endswith("WithProjection"):
            return "last_hidden_state", output.last_hidden_state
        if path == "text_model":
            return "text_embeds", model.text_projection(output.pooler_output)
        return "image_embeds", model.visual_projection(output.pooler_output)


# what the others show as well, in other words
SLOW = (
    "siglip", "chinese_clip", "altclip", "clipseg", "blip", "vision_text", "speech_encoder_decoder", "paligemma", "gemma3",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in COMPOSITES])
def test_the_whole_and_its_parts(name, tmp_path, fresh, plain):
    model, batch = cut(name)
    model.save_pretrained(tmp_path / "whole")
    again = fresh.outputs(type(model).__name__, tmp_path / "whole", batch)
    expected = dict(found(model, batch))
    shared = again.keys() & expected.keys()
    assert shared and all(torch.equal(again[key], expected[key]) for key in shared)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path / "whole", batch)

    parts = parts_in(model)
    assert len(parts) == 2
    for part in parts:  # every part saves itself
        part.module.save_pretrained(tmp_path / part.key)
        alone = type(part.module).from_pretrained(tmp_path / part.key)
        lost = {"embeddings.word_embeddings.weight"} if name == "chinese_clip" else set()  # stock redraws the pad row
        state = part.module.state_dict()
        assert all(torch.equal(tensor, alone.state_dict()[key]) for key, tensor in state.items() if key not in lost)

    for kind, (path, key) in FROM_WHOLE.get(name, {}).items():
        where, value = part_output(model, kind, path, key, batch)
        inputs = {key: batch[key]}
        assert torch.equal(fresh.outputs(kind, tmp_path / "whole", inputs)[where], value)
        with pytest.raises(RuntimeError, match="mismatch"):
            plain.outputs(kind, tmp_path / "whole", inputs)
        loaded = getattr(T, kind).from_pretrained(tmp_path / "whole").eval()
        hc.apply_(loaded, random_plan(loaded, ("neurons",), seed=3))  # an ordinary compressed model: cut again, saved again
        loaded.save_pretrained(tmp_path / kind)
        once = fresh.outputs(kind, tmp_path / kind, inputs)[where]
        with torch.no_grad():
            assert torch.equal(once, getattr(loaded(**inputs), where)) and not torch.equal(once, value)


def test_a_part_that_stock_transformers_would_draw_anew_is_refused(tmp_path):
    """LlamaModel does not find its weights in a LLaVA checkpoint, and stock transformers says so in a warning alone."""
    model, _ = cut("llava")
    model.save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match=r"lacks weights that were compressed.*save the part by itself"):
        T.LlamaModel.from_pretrained(tmp_path)


def test_every_edit_inside_a_part(tmp_path, fresh):
    model, batch = cut("clip")
    hc.apply_(model, hc.Plan([
        hc.LowRank("text_model.encoder.layers.0.mlp.fc1", 5), hc.LowRank("text_projection", 6),
        hc.Quantize("text_model.embeddings.token_embedding", 8), hc.Quantize("text_projection", 8),
        hc.Quantize("vision_model.encoder.layers.0.self_attn.q_proj", 4),
    ]))  # fmt: skip
    model.save_pretrained(tmp_path / "whole")
    for kind, (path, key) in FROM_WHOLE["clip"].items():
        where, value = part_output(model, kind, path, key, batch)
        assert torch.equal(fresh.outputs(kind, tmp_path / "whole", {key: batch[key]})[where], value)
    record = compression_of(T.CLIPTextModel.from_pretrained(tmp_path / "whole").config)
    named = [getattr(e, "module", None) or getattr(e, "ffn", None) or getattr(e, "attention", None) for e in record.plan]
    assert "encoder.layers.0.mlp.fc1" in named and "embeddings.token_embedding" in named
    assert all(name.startswith(("encoder.", "embeddings.")) for name in named)
    hc.dequantize_(model)
    model.save_pretrained(tmp_path / "float")
    where, value = part_output(model, "CLIPTextModel", "text_model", "input_ids", batch)
    assert torch.equal(fresh.outputs("CLIPTextModel", tmp_path / "float", {"input_ids": batch["input_ids"]})[where], value)


def test_layers_of_a_part_that_a_shorter_config_would_build_otherwise(tmp_path):
    """ModernBERT's first layer has no norm. The decoder's shapes are loud; the encoder, alone, must be so too."""
    encoder = T.ModernBertModel(T.ModernBertConfig(**{**WORDS, "num_hidden_layers": 3}, cls_token_id=1, sep_token_id=2))
    decoder = T.BertLMHeadModel(T.BertConfig(**WORDS, is_decoder=True, add_cross_attention=True))
    model = T.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.pad_token_id, model.config.decoder_start_token_id = 0, 1
    batch = {"input_ids": ids(), "decoder_input_ids": ids(2, 6)}
    hc.apply_(
        model, hc.Plan([hc.KeepLayers([1, 2], "encoder.layers"), hc.KeepNeurons("decoder.bert.encoder.layer.0", range(40))])
    )
    model.save_pretrained(tmp_path / "whole")
    assert equal(found(model, batch), found(T.EncoderDecoderModel.from_pretrained(tmp_path / "whole").eval(), batch))
    model.encoder.save_pretrained(tmp_path / "encoder")
    own = {"input_ids": batch["input_ids"]}
    for folder, options in (("encoder", {}), ("whole", {"key_mapping": {"^encoder.": ""}})):
        alone = T.ModernBertModel.from_pretrained(tmp_path / folder, **options).eval()
        assert equal(found(model.encoder, own), found(alone, own))
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):  # what plain transformers sees
        T.ModernBertModel.from_pretrained(tmp_path / "encoder")


def test_parts_that_a_config_can_describe_stay_stock(tmp_path, plain):
    model, batch = build_composite("clip")
    hc.apply_(model, hc.plan_pruning(model, heads=0.0, neurons=0.5, score="magnitude", uniform=True))
    model.save_pretrained(tmp_path)
    assert "hf_compress" not in (tmp_path / "config.json").read_text()
    for kind, (path, key) in FROM_WHOLE["clip"].items():
        where, value = part_output(model, kind, path, key, batch)
        assert torch.equal(plain.outputs(kind, tmp_path, {key: batch[key]})[where], value)


def test_a_part_that_was_not_cut_loads_without_the_plugin(tmp_path, plain):
    model, batch = build_composite("clip")
    hc.apply_(model, hc.Plan([hc.KeepNeurons("vision_model.encoder.layers.0.mlp", range(50))]))
    model.save_pretrained(tmp_path)
    where, value = part_output(model, "CLIPTextModel", "text_model", "input_ids", batch)
    assert torch.equal(plain.outputs("CLIPTextModel", tmp_path, {"input_ids": batch["input_ids"]})[where], value)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs("CLIPVisionModel", tmp_path, {"pixel_values": batch["pixel_values"]})


# --- parts put together ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Folders of a ViT and a BERT that were cut, and of a GPT-2 that was not."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pruned")
    vit, bert = T.ViTModel(T.ViTConfig(**SIGHT)), T.BertModel(T.BertConfig(**WORDS))
    hc.apply_(vit, random_plan(vit, ("heads", "neurons"))).save_pretrained(folder / "vit")
    hc.apply_(bert, random_plan(bert, ("heads", "neurons", "layers"))).save_pretrained(folder / "bert")
    T.GPT2LMHeadModel(T.GPT2Config(**GPT2, is_decoder=True, add_cross_attention=True)).save_pretrained(folder / "gpt2")
    return folder


def test_a_pruned_encoder_in_a_new_whole(pruned, tmp_path, fresh, plain):
    model = T.VisionEncoderDecoderModel.from_encoder_decoder_pretrained(pruned / "vit", pruned / "gpt2").eval()
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    batch = {"pixel_values": pixels(), "decoder_input_ids": ids(2, 6)}
    model.save_pretrained(tmp_path / "one")
    logits = outputs(model, batch)
    assert torch.equal(fresh.outputs("VisionEncoderDecoderModel", tmp_path / "one", batch)["logits"], logits)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs("VisionEncoderDecoderModel", tmp_path / "one", batch)
    for name, whole in (("two", model), ("three", type(model).from_pretrained(tmp_path / "one").eval())):  # and cut further
        hc.apply_(whole, random_plan(whole, ("neurons",), seed=3), inputs=batch)
        whole.save_pretrained(tmp_path / name)
        again = fresh.outputs("VisionEncoderDecoderModel", tmp_path / name, batch)["logits"]
        assert torch.equal(again, outputs(whole, batch)) and not torch.equal(again, logits)


def test_two_pruned_parts_in_a_new_whole(pruned, tmp_path):
    model = T.VisionTextDualEncoderModel.from_vision_text_pretrained(pruned / "vit", pruned / "bert").eval()
    batch = {"input_ids": ids(), "pixel_values": pixels()}
    model.save_pretrained(tmp_path)
    loaded = T.VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    assert equal(found(model, batch), found(loaded, batch))
    assert {e.attention.split(".")[0] for e in compression_of(loaded.config).plan if isinstance(e, hc.KeepHeads)} == {
        "text_model", "vision_model",
    }  # fmt: skip


def test_parts_that_are_cut_by_themselves(tmp_path):
    model, batch = build_composite("clip")
    hc.apply_(model.text_model, random_plan(model.text_model, ("heads", "neurons")))
    model.save_pretrained(tmp_path / "one")
    assert equal(found(model, batch), found(T.CLIPModel.from_pretrained(tmp_path / "one").eval(), batch))
    hc.apply_(model, random_plan(model, ("neurons",), seed=5))
    hc.apply_(model.vision_model, random_plan(model.vision_model, ("neurons", "heads"), seed=6))
    hc.apply_(model, random_plan(model, ("neurons",), seed=7))
    model.save_pretrained(tmp_path / "two")
    assert equal(found(model, batch), found(T.CLIPModel.from_pretrained(tmp_path / "two").eval(), batch))
    assert len(compression_of(model.config).plan) == 4 + 4 + 4 + 4


def test_what_cannot_be_put_together_is_refused(tmp_path):
    part, _ = build("bert")
    hc.apply_(part, hc.Plan([hc.AddExits([0])]))
    part.save_pretrained(tmp_path / "exits")
    base = T.BertModel.from_pretrained(tmp_path / "exits")
    whole = T.VisionTextDualEncoderModel(vision_model=T.ViTModel(T.ViTConfig(**SIGHT)), text_model=base)
    with pytest.raises(hc.CompressionError, match=r"'text_model'.*detach_exits_"):
        hc.apply_(whole, hc.Plan([hc.KeepNeurons("vision_model.layers.0.mlp", range(40))]))


def test_a_refused_cut_leaves_the_records_of_parts_alone(monkeypatch):
    model, _ = build_composite("clip")
    hc.apply_(model, random_plan(model, ("neurons",)))
    before = [part.config.quantization_config for part in parts_in(model)]
    monkeypatch.setattr("hf_compress.record.unrecorded", lambda *_: "somewhere")
    with pytest.raises(hc.CompressionError, match="could not be saved"):
        hc.apply_(model, random_plan(model, ("neurons",), seed=2))
    assert [part.config.quantization_config for part in parts_in(model)] == before


@pytest.mark.parametrize(("family", "base"), [("llama", "LlamaModel"), ("bert", "BertModel")])
def test_a_base_model_is_cut_again_under_its_own_names(family, base, tmp_path):
    model, batch = build(family)
    hc.apply_(model, random_plan(model, ("heads", "neurons"))).save_pretrained(tmp_path / "task")
    loaded = getattr(T, base).from_pretrained(tmp_path / "task").eval()
    hc.apply_(loaded, random_plan(loaded, ("neurons",), seed=4)).save_pretrained(tmp_path / "base")
    assert torch.equal(outputs(type(loaded).from_pretrained(tmp_path / "base").eval(), batch), outputs(loaded, batch))


@pytest.mark.skipif(not hasattr(T, "Tipsv2DptForSemanticSegmentation"), reason="this transformers has no TIPSv2")
def test_what_is_changed_beside_the_parts_alone_belongs_to_the_whole(tmp_path, fresh):
    """A neck's convolutions are of no part; the record of the backbone, whose name is the prefix, says the same as the whole's."""
    model, batch, _ = build_tiny("tipsv2_dpt", "Tipsv2DptForSemanticSegmentation")
    hc.apply_(model, hc.Plan([hc.DepthwiseSeparable(f"neck.convs.{i}") for i in range(4)]))
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, batch)["logits"], expected)
