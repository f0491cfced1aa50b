"""What second-order pruning is told by its data: padding left out on both sides of a model, every prediction, any precision."""

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.discover import discover
from hf_compress.grams import unlabelled
from hf_compress.pruning import search
from hf_compress.pruning.calibrate import Calibration
from hf_compress.pruning.compensate import compensated, curves
from hf_compress.pruning.predictions import predictions_of
from hf_compress.pruning.search import Stitched
from hf_compress.pruning.sensitivity import projected, sensitivities
from hf_compress.pruning.surgeon import Moments, Regression
from tests.test_prune_to import SIZES, bert, blocks_of, half, texts
from tests.trainers import trainer

SEQ2SEQ = dict(
    vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=4,
)  # fmt: skip


def bart():
    torch.manual_seed(0)
    return T.BartForConditionalGeneration(T.BartConfig(max_position_embeddings=40, **SEQ2SEQ)).eval()


def whisper():
    torch.manual_seed(0)
    config = T.WhisperConfig(max_source_positions=20, max_target_positions=40, num_mel_bins=8, **SEQ2SEQ)
    return T.WhisperForConditionalGeneration(config).eval()


def m2m():
    torch.manual_seed(0)
    return T.M2M100ForConditionalGeneration(T.M2M100Config(max_position_embeddings=40, **SEQ2SEQ)).eval()


def t5():
    torch.manual_seed(0)
    config = T.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T.T5ForConditionalGeneration(config).eval()


def calibration(model, batches):
    return Calibration(model, discover(model), blocks_of(model), batches)


def padded_labels(rows=4, length=20, real=(4, 12, 20, 7)):
    labels = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(1))
    for row, count in zip(labels, real, strict=True):
        row[count:] = -100
    return labels


# --- padding -----------------------------------------------------------------------------------------------------


def test_padding_of_labels_is_padding_of_the_decoder():
    model, labels = bart(), padded_labels()
    batch = {"input_ids": torch.randint(5, 99, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long), "labels": labels}
    found = unlabelled(model, batch)
    assert found["decoder_attention_mask"].sum(1).tolist() == [4, 12, 20, 7] and "labels" not in found
    assert torch.equal(found["decoder_input_ids"][:, 1:][labels[:, :-1] != -100], labels[:, :-1][labels[:, :-1] != -100])
    moments = calibration(model, [batch])
    counts = {}
    for segment in moments.segments:
        moments.begin(segment, False)
        counts |= {name: m.count for name, m in moments.moments(segment, segment.blocks).items()}
    assert {count for name, count in counts.items() if "decoder" in name} == {4 + 12 + 20 + 7}
    assert {count for name, count in counts.items() if "encoder." in name} == {28}
    # -100 in front (a prompt) hides nothing: what comes after attends to it
    prompt = labels.clone()
    prompt[2, :5] = -100
    assert unlabelled(model, {**batch, "labels": prompt})["decoder_attention_mask"].sum(1).tolist() == [4, 12, 20, 7]
    own = {**batch, "decoder_attention_mask": torch.ones(4, 20, dtype=torch.long)}
    assert unlabelled(model, own)["decoder_attention_mask"] is own["decoder_attention_mask"]


def test_predictions_of_padding_count_neither_in_the_search_nor_in_sensitivities():
    model = t5()
    ids = torch.randint(5, 99, (4, 10), generator=torch.Generator().manual_seed(0))
    encoder, decoder = torch.ones(4, 10, dtype=torch.long), torch.ones(4, 10, dtype=torch.long)
    encoder[:, 3:], decoder[:, 2:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": encoder, "decoder_input_ids": ids}
    assert [len(p.values) for p in Stitched(calibration(model, [batch]), {}).meant[0]] == [40]
    batch["decoder_attention_mask"] = decoder
    assert [len(p.values) for p in Stitched(calibration(model, [batch]), {}).meant[0]] == [8]

    real = torch.randn(3, 4, 7, requires_grad=True)
    wide = torch.cat([real.detach(), torch.randn(3, 5, 7)], 1).requires_grad_()
    mask = torch.tensor([1] * 4 + [0] * 5).repeat(3, 1)
    for name in ("logits", "last_hidden_state"):
        projected({name: real}, torch.Generator().manual_seed(0)).backward()
        projected({name: wide}, torch.Generator().manual_seed(0), mask).backward()
        torch.testing.assert_close(wide.grad[:, :4], real.grad)
        assert not wide.grad[:, 4:].any() and real.grad.any()
        real.grad = wide.grad = None


def test_no_real_token_at_all_is_refused():
    model = bert()
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = {"input_ids": torch.randint(5, 99, (4, 8)), "attention_mask": torch.zeros(4, 8, dtype=torch.long)}
    with pytest.raises(hc.CompressionError, match="no real token"):
        hc.prune_to(model, [batch], parameters=1.1, tries=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- models of every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bart, whisper, m2m, t5])
def test_batches_as_a_trainer_collates_them(make):
    """Labels alone: what the decoder is given is made of them as the model does in training."""
    model, labels = make(), padded_labels()
    speech = make is whisper
    given = {"input_features": torch.randn(4, 8, 40)} if speech else {"input_ids": torch.randint(5, 99, (4, 7))}
    with torch.no_grad():
        trained = model(**given, labels=labels).logits
        ours = model(**unlabelled(model, {**given, "labels": labels})).logits
    real = labels != -100
    torch.testing.assert_close(ours[real], trained[real], rtol=1e-4, atol=1e-5)
    pruned = hc.prune_to(model, [{**given, "labels": labels}], parameters=1.05, tries=0)
    assert pruned.achieved >= 1.05


def test_labels_that_cannot_be_shifted_are_refused_by_name():
    model = m2m()
    model.config.decoder_start_token_id = None
    with pytest.raises(hc.CompressionError, match=r"decoder_input_ids of the labels .*decoder_start_token_id"):
        hc.prune_to(model, [{"input_ids": torch.randint(5, 99, (4, 7)), "labels": padded_labels()}], parameters=1.05)


def test_a_model_for_which_no_inputs_can_be_made_takes_the_first_batch():
    class Odd(T.PreTrainedModel):
        config_class = T.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.encoder = T.BertModel(config).encoder
            self.post_init()

        def forward(self, things, **kwargs):
            return {"logits": self.encoder(things * 1.0).last_hidden_state}

    torch.manual_seed(0)
    model = Odd(T.BertConfig(**SIZES)).eval()
    pruned = hc.prune_to(model, [{"things": torch.randn(8, 6, 32)}], parameters=1.2, tries=0)
    assert pruned.achieved >= 1.2


def test_all_that_is_predicted_counts():
    torch.manual_seed(0)
    model = T.BertForQuestionAnswering(T.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        model.qa_outputs.weight[0] = 0.0  # where a span starts is said by nothing
    batch = {"input_ids": torch.randint(5, 99, (4, 8))}
    assert len(sensitivities(calibration(model, [batch]))) == len(blocks_of(model))
    assert [p.is_logits for p in predictions_of(model(**batch))] == [True, True]
    with torch.no_grad():
        model.qa_outputs.weight[1] = 0.0
    assert sensitivities(calibration(model, [batch])) == {}
    with pytest.raises(hc.CompressionError, match="depends on none of its 6 blocks"):
        hc.prune_to(model, [batch], parameters=1.1)

    maps = predictions_of({"logits": torch.randn(2, 5, 3, 4), "pred_boxes": torch.rand(2, 6, 4)})
    assert [(tuple(p.rows(None).shape), p.is_logits) for p in maps] == [((24, 5), True), ((12, 4), False)]
    assert torch.equal(maps[0].rows(None)[1], maps[0].values[0, 0, 1])


def test_losses_of_several_predictions_add_up():
    """By numpy: the divergence of the start, and of the end, in the mean over rows."""
    torch.manual_seed(0)
    model = T.BertForQuestionAnswering(T.BertConfig(**SIZES)).eval()
    batches = [{"input_ids": torch.randint(5, 99, (4, 8))} for _ in range(2)]
    run = Stitched(calibration(model, batches), {})

    def logits():
        with torch.no_grad():
            outputs = [model(**batch) for batch in batches]
        return [torch.cat([getattr(o, f"{side}_logits") for o in outputs]).double().numpy() for side in ("start", "end")]

    old = logits()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(-1.0)
    expected = 0.0
    for before, now in zip(old, logits(), strict=True):
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (before, now))
        expected += (p * np.log(p / q)).sum(-1).mean()
    assert run.now() == pytest.approx(expected, rel=1e-4) and expected > 0
    assert run.now(most=expected / 4) == float("inf")


def test_what_the_dense_model_predicts_is_held_within_bounds(monkeypatch):
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).eval()
    batches = [{"input_ids": torch.randint(5, 99, (4, 16))} for _ in range(2)]
    monkeypatch.setattr(search, "HELD", 4 * 99 * 2 * 10)
    run = Stitched(calibration(model, batches), {})
    assert [len(p.values) for batch in run.meant for p in batch] == [10, 10] and run.of.tolist() == [20.0]
    with torch.no_grad():
        rows = model(**batches[0]).logits.flatten(0, 1)
    torch.testing.assert_close(run.meant[0][0].values, rows[torch.linspace(0, 63, 10).long()])


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stream_is_found_in_half_precision(dtype):
    model = bert().to(dtype)
    found = calibration(model, [{"input_ids": torch.randint(5, 99, (4, 8))}])
    for segment in found.segments:
        found.begin(segment, False)
        assert all(found.place(segment, block) is not None for block in segment.blocks)
        found.targets(segment, segment.blocks)


def test_the_stream_is_found_where_it_is_large():
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 300.0
    found = calibration(model, [{"input_ids": torch.randint(5, 99, (4, 8))}])
    for segment in found.segments:
        found.begin(segment, False)
        assert all(found.place(segment, block) is not None for block in segment.blocks)
        found.targets(segment, segment.blocks)


def test_blocks_that_cannot_make_up_for_others_are_named(caplog, monkeypatch):
    model = bert()
    monkeypatch.setattr(Calibration, "_find_place", lambda *_: None)
    T.logging.enable_propagation()
    compensated(calibration(model, texts(1)), half(blocks_of(model)))
    assert "6 of 6 blocks make up for what goes in them alone" in caplog.text


# --- what is lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_lost_is_of_what_the_output_should_vary_by(bias):
    """By numpy, on rows whose target no weights can give: most of the loss was there before anything went."""
    draw = np.random.default_rng(0)
    x, noise = draw.normal(size=(300, 6)) + 1.0, draw.normal(size=(300, 4))
    weight, shift = draw.normal(size=(4, 6)), draw.normal(size=4)
    target = x @ weight.T + shift + 5.0 * noise
    moments = Moments.empty(6, 4, dtype=torch.float64)
    moments.add_(torch.tensor(x[:100]), torch.tensor(target[:100]))
    moments.add_(torch.tensor(x[100:]), torch.tensor(target[100:]))
    regression = Regression(moments, torch.tensor(weight), torch.tensor(shift) if bias else None, damping=0.05)
    columns = torch.tensor([0, 2, 3])
    new, c = regression.solve(columns)
    off = target - x[:, columns] @ new.double().numpy().T - (c.double().numpy() if c is not None else 0.0)
    of = target - target.mean(0) if bias else target
    assert regression.lost(columns, new) == pytest.approx((off**2).sum() / (of**2).sum(), rel=1e-5)


def test_what_is_lost_of_its_own_output():
    """A dense projection that keeps everything loses nothing; the target's spread is that of what it gives."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(200, 5) + 1, torch.randn(3, 5), torch.randn(3)
    moments = Moments.empty(5, 3)
    moments.add_inputs_(x)
    moments.of_own_output_(weight, bias)
    out = (x @ weight.T + bias).double().numpy()
    assert moments.tt == pytest.approx((out**2).sum(), rel=1e-5)
    regression = Regression(moments, weight, bias, damping=1e-9)
    assert regression.variance == pytest.approx(((out - out.mean(0)) ** 2).sum(1).mean(), rel=1e-4)
    assert regression.lost(torch.arange(5), weight) < 1e-5


def test_nothing_is_held_of_a_stack_that_is_through():
    found = calibration(bert(), texts(2))
    curves(found)
    assert not found.calls and not found.now
    compensated(found, half(found.blocks))
    assert not found.calls and not found.now


# --- stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.5, 1.9])
def test_stages_go_on_where_one_group_of_heads_is_left(ratio, tmp_path):
    """Of two groups one is left after some stage: what is counted must still be groups, not the heads of the one."""
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(
        T.LlamaConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            intermediate_size=48,
        )
    )  # fmt: skip
    dense = sum(p.numel() for p in model.parameters())
    prune = hc.PruningCallback(parameters=ratio, rows=16, tries=2, start=0.2, end=0.8, every=2)
    t = trainer(tmp_path, [prune], model=model)
    t.train_dataset = [{"input_ids": row, "labels": row} for row in torch.randint(5, 99, (32, 10))]
    t.train()
    small = sum(p.numel() for p in t.model.parameters())
    assert prune.stages[-1]["achieved"] == dense / small >= ratio
    sizes = prune.stages[-1]["sizes"]
    assert all(sizes[f"model.layers.{i}.self_attn"][1] == 2 for i in (0, 1))
    assert any(sizes[f"model.layers.{i}.self_attn"][0] == 1 for i in (0, 1))
    heads = {a.name: (a.num_heads, a.num_key_value_heads) for a in hc.discover(t.model).attentions}
    assert heads == {name: (2 * groups, groups) for name, (groups, _) in sizes.items() if "attn" in name}
