"""KeepVocabulary: what a model makes of tokens that stay does not change, whatever has a row for them; or it is refused."""

import copy

import pytest
import torch
import transformers as T
from packaging import version
from torch import nn

import hf_compress as hc
from hf_compress import surgery
from hf_compress.token_ids import renumbered
from tests import zoo
from tests.test_surgery import same, snapshot
from tests.zoo import IMAGE, build, sound

KEPT = (*range(8), *range(11, 95, 3), 98)  # 37 of 99
# two layers of each are enough for what has nothing to do with layers
TEXT, GQA, CLIP_TEXT = ({**config, "num_hidden_layers": 2} for config in (zoo.TEXT, zoo.GQA, zoo.CLIP_TEXT))
GPT2, T5 = {**zoo.GPT2, "n_layer": 2}, {**zoo.T5, "num_layers": 2}
SEQ2SEQ, WHISPER = ({**config, "encoder_layers": 2, "decoder_layers": 2} for config in (zoo.SEQ2SEQ, zoo.WHISPER))
NEW = {old: place for place, old in enumerate(KEPT)}
SIDES = dict(SEQ2SEQ, max_position_embeddings=40)
PER_LAYER = dict(
    GQA, vocab_size_per_layer_input=60, hidden_size_per_layer_input=8, laurel_rank=8, num_kv_shared_layers=0,
    activation_sparsity_pattern=None, layer_types=["full_attention"] * 2,
)  # fmt: skip
MODELS = {
    "bert tied": lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)),
    "roberta": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**TEXT)),
    "albert": lambda: T.AlbertForMaskedLM(T.AlbertConfig(embedding_size=32, **TEXT)),
    "electra": lambda: T.ElectraForMaskedLM(T.ElectraConfig(embedding_size=32, **TEXT)),
    "mobilebert": lambda: T.MobileBertForMaskedLM(  # half of its head has the tokens along its other dimension
        T.MobileBertConfig(**TEXT, embedding_size=32, intra_bottleneck_size=64)
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GQA)),
    # as wide as it has tokens, inside too
    "llama square": lambda: T.LlamaForCausalLM(T.LlamaConfig(**{**GQA, "hidden_size": 96, "vocab_size": 96})),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, ffn_dim=96, word_embed_proj_dim=64)
    ),
    "gemma3n": lambda: T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**PER_LAYER)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**SIDES)),
    "marian": lambda: T.MarianMTModel(
        T.MarianConfig(pad_token_id=98, decoder_start_token_id=98, eos_token_id=0, forced_eos_token_id=0, **SIDES)
    ),
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)),
}


def made(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.requires_grad or tensor.shape == (1, 99):
                tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def batch_for(model):
    """Ids of tokens that stay, and the same under their new ids."""
    draw = torch.Generator().manual_seed(3)
    some = torch.tensor(KEPT[3:-1])
    names = ["input_ids", "decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids"]
    old = {name: some[torch.randint(len(some), (2, 9), generator=draw)] for name in names}
    if model.main_input_name == "input_features":
        old["input_features"] = sound(8, 40)
        del old["input_ids"]
    return old, {k: v.apply_(NEW.__getitem__) if v.dtype == torch.long else v for k, v in copy.deepcopy(old).items()}


def hidden(output):
    return [t for key, value in output.items() if key.endswith("hidden_states") and value is not None for t in value]


def shorter_tables() -> None:
    if version.parse(T.__version__) < version.parse("5.21"):
        pytest.skip("transformers 5.20 looks Gemma3n's ids up beyond the end of its shorter table, so its model does not run")


@pytest.mark.parametrize("name", MODELS)
def test_kept_tokens_compute_as_before_and_plain_transformers_loads_the_rest(name, tmp_path, plain):
    if name == "gemma3n":
        shorter_tables()
    model = made(MODELS[name])
    kept = [token for token in KEPT if token < model.config.vocab_size]
    old, new = batch_for(model)
    with torch.no_grad():
        before = model(**old, output_hidden_states=True)
        rows = model.get_input_embeddings().weight[kept].clone()
        hc.apply_(model, hc.Plan([hc.KeepVocabulary(kept)]))
        after = model(**new, output_hidden_states=True)
    assert len(hidden(before)) >= 3
    assert all(torch.equal(a, b) for a, b in zip(hidden(before), hidden(after), strict=True))
    torch.testing.assert_close(after.logits, before.logits[..., kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, rows)
    assert not any(99 in p.shape for p in model.state_dict().values())
    model.save_pretrained(tmp_path)  # stock: plain transformers, in another process, loads it equal to the bit
    assert "quantization_config" not in model.config.to_dict()
    with torch.no_grad():
        assert torch.equal(plain.outputs(type(model).__name__, tmp_path, new)["logits"], model(**new).logits)


def test_tables_that_the_same_ids_are_looked_up_in_may_be_shorter():
    shorter_tables()
    model = made(MODELS["gemma3n"])
    rows = model.model.embed_tokens_per_layer.weight.clone()
    hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    assert torch.equal(model.model.embed_tokens_per_layer.weight, rows[[k for k in KEPT if k < 60]])
    assert (model.config.vocab_size, model.config.vocab_size_per_layer_input) == (len(KEPT), sum(k < 60 for k in KEPT))


def test_ids_follow_in_configs_and_modules(tmp_path):
    model = made(MODELS["marian"])
    model.generation_config.bad_words_ids = [[98], [5, 8], [5, 14]]
    model.generation_config.suppress_tokens = [8, 9, 11]
    hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (len(KEPT), len(KEPT))
    assert (model.config.pad_token_id, model.config.decoder_start_token_id, model.config.eos_token_id) == (36, 36, 0)
    assert (model.generation_config.pad_token_id, model.generation_config.forced_eos_token_id) == (36, 0)
    assert model.generation_config.bad_words_ids == [[36], [5, 9]]  # 8 is gone, and cannot be generated
    assert model.generation_config.suppress_tokens == [8]  # was 11
    assert model.model.encoder.embed_tokens.padding_idx == model.model.decoder.padding_idx == 36
    assert model.lm_head.out_features == model.model.shared.num_embeddings == len(KEPT)
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is model.model.shared.weight
    model.save_pretrained(tmp_path)
    assert T.GenerationConfig.from_pretrained(tmp_path).bad_words_ids == [[36], [5, 9]]
    assert T.MarianConfig.from_pretrained(tmp_path).pad_token_id == 36


def test_every_place_of_an_id():
    values = {
        "pad_token_id": 0, "eos_token_id": [7, 9], "image_token_index": 9, "forced_decoder_ids": [[1, 7], [2, None]],
        "lang_to_id": {"<|en|>": 7, "<|de|>": 3}, "sequence_bias": [[[7, 9], 0.5], [[3], -1.0]], "vocab_size": 10,
        "task_specific_params": {"sum": {"decoder_start_token_id": 9, "max_length": 9}}, "codebook_pad_token_id": 9,
        "begin_suppress_tokens": [3], "bos_token_id": 50256, "mask_token_id": None, "unk_token_id": -1, "mask_index": 7,
        "num_image_tokens": 9,
    }  # fmt: skip
    assert renumbered(values, {0: 0, 7: 1, 9: 2}, 10) == {
        "eos_token_id": [1, 2], "image_token_index": 2, "forced_decoder_ids": [[1, 1], [2, None]],
        "lang_to_id": {"<|en|>": 1}, "sequence_bias": [[[1, 2], 0.5]], "mask_index": 1, "begin_suppress_tokens": None,
        "task_specific_params": {"sum": {"decoder_start_token_id": 2, "max_length": 9}},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_generation_is_that_of_the_dense_model_among_the_tokens_that_stay(name):
    model = made(MODELS[name])
    old, new = batch_for(model)
    old, new = ({k: v for k, v in batch.items() if not k.startswith("decoder")} for batch in (old, new))
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    gone = [token for token in range(99) if token not in KEPT]
    expected = model.generate(**old, **options, suppress_tokens=gone)
    assert not torch.equal(expected, model.generate(**old, **options)), "nothing that goes would have come: no test"
    hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    assert torch.equal(model.generate(**new, **options), expected.apply_(NEW.__getitem__))


def test_training_goes_on_as_in_the_dense_model():
    """Rows of tokens that do not come up get no gradient: two steps on both give the same logits, to the bit."""
    dense, _ = build("bert")
    cut = hc.apply_(copy.deepcopy(dense), hc.Plan([hc.KeepVocabulary(KEPT)]))
    ids = torch.tensor(KEPT)[torch.arange(5, 25).view(2, 10)]
    found = []
    for model, batch in ((dense, ids), (cut, ids.clone().apply_(NEW.__getitem__))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(input_ids=batch, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model(input_ids=batch).logits)
    assert torch.equal(*found)
    assert not torch.equal(found[0], build("bert")[0](input_ids=ids).logits)


def test_twice_is_once_with_both():
    model = made(MODELS["gpt2"])
    once = hc.apply_(copy.deepcopy(model), hc.Plan([hc.KeepVocabulary([KEPT[i] for i in range(1, 36)])]))
    plan = hc.Plan([hc.KeepVocabulary(KEPT), hc.KeepVocabulary(range(1, 36))])
    assert hc.Plan.from_dict(plan.to_dict()) == hc.Plan.from_dict(plan.to_dict(spans=True)) == plan
    hc.apply_(model, plan)
    assert model.config.to_dict() == once.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), once.parameters(), strict=True))


def test_with_everything_else(tmp_path, fresh, plain):
    """Unequal heads and neurons, a low-rank head, int8 last: loads equal to the bit, and never without the plugin."""
    model = made(MODELS["llama"])
    old, new = batch_for(model)
    first = hc.Plan([hc.KeepHeads("model.layers.1.self_attn", [0, 1]), hc.KeepNeurons("model.layers.0.mlp", range(40))])
    first += hc.Plan([hc.LowRank("lm_head", 16), hc.Quantize("model.layers.1.mlp.down_proj")])
    before = hc.apply_(copy.deepcopy(model), first)(**old).logits[..., list(KEPT)]
    hc.apply_(model, first + hc.Plan([hc.KeepVocabulary(KEPT)]))
    torch.testing.assert_close(model(**new).logits, before, atol=1e-5, rtol=1e-5)
    assert tuple(model.lm_head.weight.shape) == (len(KEPT), 16) and model.lm_head.out_features == len(KEPT)
    hc.apply_(model, hc.Plan([hc.Quantize("model.embed_tokens"), hc.Quantize("lm_head")]))
    with torch.no_grad():
        done = model(**new).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs("LlamaForCausalLM", tmp_path, new)["logits"], done)
    assert [type(edit).__name__ for edit in model.config.quantization_config.plan][4] == "KeepVocabulary"
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs("LlamaForCausalLM", tmp_path, new)


def test_inputs_of_your_own_follow_from_step_to_step():
    """They are in the ids that the model has before the plan, whatever it drops first; tokens that go are replaced."""
    model, batch = build("llama")
    batch = {"input_ids": torch.tensor([[98, 9, 11, 8, 95, 17]])}  # 8, 9 and 95 go
    plan = hc.Plan([hc.KeepVocabulary(KEPT), hc.KeepNeurons("model.layers.0.mlp", range(50)), hc.KeepVocabulary(range(20))])
    hc.apply_(model, plan, inputs=batch)
    assert (model.config.vocab_size, model.model.layers[0].mlp.down_proj.in_features) == (20, 50)
    assert batch["input_ids"].tolist() == [[98, 9, 11, 8, 95, 17]]


class Deaf(T.LlamaForCausalLM):
    """Reads its tokens, and gives the same whatever they are."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = torch.zeros_like(out.logits)
        return out


def test_a_classifier_that_needs_its_end_of_text():
    """BART's reads the last end of text of each row, and makes the decoder's ids itself."""
    model = made(lambda: T.BartForSequenceClassification(T.BartConfig(**SIDES)))
    ids = torch.tensor([[0, 11, 14, 5, 2], [0, 98, 17, 2, 1]])
    with torch.no_grad():
        before = model(ids).logits
        hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
        assert torch.equal(model(ids.clone().apply_(NEW.__getitem__)).logits, before)


def test_beside_exits(tmp_path):
    model, batch = build("bert")
    new = {**batch, "input_ids": torch.tensor(KEPT)[torch.arange(5, 25).view(2, 10)]}
    hc.apply_(model, hc.Plan([hc.AddExits([0], threshold=0.34)]))
    with torch.no_grad():
        model.exit_heads["0"].out.weight.mul_(40)
        before = model(**new).logits
        left = hc.exit_layers(model).clone()
        hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
        after = model(**{**new, "input_ids": new["input_ids"].clone().apply_(NEW.__getitem__)}).logits
    assert (left == 0).any() and torch.equal(hc.exit_layers(model), left) and torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert T.BertForSequenceClassification.from_pretrained(tmp_path).config.vocab_size == len(KEPT)


def llava():
    vision = T.CLIPVisionConfig(**IMAGE)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=T.LlamaConfig(**GQA), vision_config=vision, image_token_id=98)
    )


def test_the_text_part_of_a_model_of_pictures_and_text():
    model = made(llava)
    ids = torch.tensor([[1, 11, *[98] * 16, 14, 17, 20]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    before = model(**batch).logits[..., list(KEPT)]
    for embedding, inputs in ((None, None), ("language_model", batch)):
        cut = hc.apply_(copy.deepcopy(model), hc.Plan([hc.KeepVocabulary(KEPT, embedding)]), inputs=inputs)
        after = cut(input_ids=ids.clone().apply_(NEW.__getitem__), pixel_values=batch["pixel_values"]).logits
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        assert (cut.config.image_token_id, cut.config.text_config.vocab_size) == (36, len(KEPT))


def two_sided():
    config = T.BertConfig(**{**TEXT, "vocab_size": 120}, is_decoder=True, add_cross_attention=True)
    return T.EncoderDecoderModel(T.EncoderDecoderConfig.from_encoder_decoder_configs(T.BertConfig(**TEXT), config))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_of_two_vocabularies_by_name(side):
    model = made(two_sided)
    old = {"input_ids": torch.tensor([[5, 11, 14, 7]]), "decoder_input_ids": torch.tensor([[11, 17, 6]])}
    before = model(**old).logits
    with pytest.raises(hc.CompressionError, match="has 2 vocabularies; name one: .*'encoder.embeddings.word_embeddings'"):
        hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT, side)]))
    name = "input_ids" if side == "encoder" else "decoder_input_ids"
    after = model(**{**old, name: old[name].clone().apply_(NEW.__getitem__)}).logits
    torch.testing.assert_close(after, before if side == "encoder" else before[..., list(KEPT)], atol=1e-5, rtol=1e-5)
    sizes = {"encoder": (len(KEPT), 120), "decoder": (99, len(KEPT))}[side]
    assert (model.config.encoder.vocab_size, model.config.decoder.vocab_size) == sizes


class Odd(T.LlamaForCausalLM):
    """Does something with ids themselves."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits + (input_ids % 7)[..., None]
        return out


def clip_text():
    """Its end of text is the largest id where the config says 2, as old checkpoints do; else the id that it names."""
    return T.CLIPTextModel(T.CLIPTextConfig(**{**CLIP_TEXT, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 2}))


REFUSED = {
    "dropped": (MODELS["roberta"], lambda m: hc.KeepVocabulary(range(1, 50)), r"names: bos_token_id=0\. Add them .*\[0\]"),
    "range": (MODELS["gpt2"], lambda m: hc.KeepVocabulary([1, 2, 99]), r"names token 99, but there are 99 .*\(0-98\)"),
    "ids used otherwise": (lambda: Odd(T.LlamaConfig(**GQA)), lambda m: hc.KeepVocabulary(KEPT), "logits is off by"),
    "tokens that do not matter": (lambda: Deaf(T.LlamaConfig(**GQA)), lambda m: hc.KeepVocabulary(KEPT), "does not depend on its tokens"),
    "the meaning of 2": (clip_text, lambda m: hc.KeepVocabulary([1, 2, *range(5, 60)]), "with the tokens renumbered"),
    # positions are counted from the padding's id
    "padding moves": (
        lambda: T.RobertaModel(T.RobertaConfig(bos_token_id=None, **TEXT)),
        lambda m: hc.KeepVocabulary(range(1, 60)),
        "last_hidden_state is off by",
    ),
    "two in one config": (
        lambda: T.FSMTForConditionalGeneration(
            T.FSMTConfig(langs=["en", "de"], src_vocab_size=99, tgt_vocab_size=80, **{k: v for k, v in SIDES.items() if k != "vocab_size"})
        ),
        lambda m: hc.KeepVocabulary(range(60), "decoder"),
        "two vocabularies and one config",
    ),
    "no words": (lambda: T.ViTModel(T.ViTConfig(**IMAGE)), lambda m: hc.KeepVocabulary([0]), "has no vocabulary"),
    "wrong name": (MODELS["gpt2"], lambda m: hc.KeepVocabulary(KEPT, "wpe"), "names no vocabulary of GPT2LMHeadModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case):
    make, edit, message = REFUSED[case]
    model = made(make)
    before, generation = snapshot(model), copy.deepcopy(vars(getattr(model, "generation_config", None) or nn.Identity()))
    with pytest.raises(hc.CompressionError, match=message):
        hc.apply_(model, hc.Plan([edit(model)]))
    assert same(snapshot(model), before)
    assert str(vars(getattr(model, "generation_config", None) or nn.Identity())) == str(generation)


def test_quantized_embeddings_come_after_and_masks_are_none():
    model = made(MODELS["gpt2"])
    with pytest.raises(hc.CompressionError, match="KeepVocabulary cannot be masked"):
        hc.mask_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    hc.apply_(model, hc.Plan([hc.Quantize("transformer.wte")]))
    with pytest.raises(hc.CompressionError, match=r"'transformer.wte' is quantized.* KeepVocabulary comes first"):
        hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))


def test_a_failure_at_the_end_is_undone(monkeypatch):
    model = made(MODELS["marian"])
    before, generation = snapshot(model), model.generation_config.to_dict()
    ties = [model.lm_head.weight is model.model.shared.weight]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "stamp_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    assert same(snapshot(model), before) and model.generation_config.to_dict() == generation
    assert ties == [model.lm_head.weight is model.model.shared.weight]


def test_what_is_kept_of_a_parameter():
    """Dtype, requires_grad, identity of modules; keeping every token changes nothing."""
    model = made(MODELS["llama"]).to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    before = dict(model.named_modules())
    config = model.config.to_dict()
    hc.apply_(model, hc.Plan([hc.KeepVocabulary(range(99))]))
    assert model.config.to_dict() == config
    hc.apply_(model, hc.Plan([hc.KeepVocabulary(KEPT)]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(module is before[name] for name, module in model.named_modules())
