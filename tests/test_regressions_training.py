"""What readers of the first version broke: scores, trainers, saves. Each test was silently wrong, or a raw error."""

import errno
import logging
import os

import pytest
import torch
import transformers as T
from accelerate.utils import AutocastKwargs

import hf_compress as hc
from hf_compress import files
from hf_compress.modules import is_gated
from hf_compress.pruning.planner import _measure
from hf_compress.resume import restore_weights
from tests.trainers import rows, trainer
from tests.zoo import TEXT, build

BATCH = {k: torch.stack([r[k] for r in rows(4)]) for k in ("input_ids", "attention_mask")}
TINY = dict(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
FFN = "bert.encoder.layer.0"


def gated(model):
    return [n for n, m in model.named_modules() if is_gated(m)]


# --- scores -----------------------------------------------------------------------------------------------------------


def test_magnitudes_of_interleaved_projections():
    """GPT-NeoX: rows of head h lie together; a head without weights must score lowest."""
    model = T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**{**TEXT, "num_hidden_layers": 1})).eval()
    attention = model.gpt_neox.layers[0].attention
    with torch.no_grad():
        attention.query_key_value.weight.view(4, 48, 64)[2] = 0
        attention.dense.weight.view(64, 4, 16)[:, 2] *= 0.9
    structure = hc.discover(model)
    scores = _measure(model, structure, list(structure.attentions), None, "magnitude", None, 0)[0][
        "gpt_neox.layers.0.attention"
    ]
    qkv, out = attention.query_key_value.weight.detach().view(4, -1), attention.dense.weight.detach().view(64, 4, 16)
    torch.testing.assert_close(scores, (qkv.square().sum(1) + out.square().sum((0, 2))).sqrt())
    assert hc.plan_pruning(model, heads=0.25, score="magnitude").edits[0].heads == (0, 1, 3)


@pytest.mark.parametrize("how", [dict(), dict(gradient_accumulation_steps=4), dict(gradient_checkpointing=True)])
def test_activation_is_a_mean_over_forward_passes(how, tmp_path):
    model = T.OPTForSequenceClassification(
        T.OPTConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
            pad_token_id=0, dropout=0.0,
        )
    )  # fmt: skip
    prune, seen = hc.PruningCallback(neurons=0.5, score="activation", start=0.9, end=1.0), []

    class Look(T.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.extend(s[0].mean().item() for s in prune._run.scores.values())

    size = 8 // how.get("gradient_accumulation_steps", 1)
    t = trainer(
        tmp_path, [prune, Look()], model=model, max_steps=2, per_device_train_batch_size=size, learning_rate=1e-9,
        max_grad_norm=0.0, **how,
    )  # fmt: skip
    t.train()
    assert all(0.2 < fraction < 0.8 for fraction in seen), seen  # fractions of non-zeros after a ReLU


def test_losses_that_are_no_number_give_no_plan():
    model, batch = build("bert")
    with pytest.raises(hc.CompressionError, match="scores from it mean nothing"):
        hc.plan_pruning(model, [{**batch, "labels": torch.tensor([-100, -100])}], heads=0.5)
    with pytest.raises(hc.CompressionError, match="does not run on a calibration batch"):
        hc.plan_pruning(model, [{"input_ids": torch.tensor([[1000]]), "labels": torch.tensor([0])}], heads=0.5)
    with pytest.raises(hc.CompressionError, match="meta"):
        hc.plan_pruning(model.to("meta"), heads=0.5, score="magnitude")


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage()


@pytest.fixture
def heard():
    handler = Heard()
    T.utils.logging.set_verbosity_warning()
    loggers = [logging.getLogger(f"transformers.{n}") for n in ("",)] + [logging.getLogger("hf_compress")]
    for name in ("hf_compress.pruning.select", "hf_compress.pruning.callback"):
        loggers.append(T.utils.logging.get_logger(name))
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
    T.utils.logging.set_verbosity_error()


def test_a_fraction_that_cannot_be_met_is_told(heard):
    model, _ = build("llama")  # 2 kv groups a layer
    assert len(hc.plan_pruning(model, heads=0.9, score="magnitude").edits) == 3
    assert "50.0% of the heads will go and not the 90.0% that was asked" in heard.text


def test_training_that_ends_early_is_told(heard, tmp_path):
    class Early(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    t = trainer(tmp_path, [hc.PruningCallback(heads=0.5, start=0.1, end=0.9), Early()])
    t.train()
    assert "ended before the schedule reached full sparsity" in heard.text
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 6


# --- trainers ---------------------------------------------------------------------------------------------------------


def test_a_callback_that_refuses_to_train_leaves_no_gate(tmp_path):
    class Refuse(T.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise RuntimeError("no")

    t = trainer(tmp_path, [hc.PruningCallback(heads=0.5), Refuse()])
    with pytest.raises(RuntimeError, match="no"):
        t.train()
    assert not gated(t.model)
    for callback in (Refuse, hc.PruningCallback):
        t.remove_callback(callback)
    t.train()
    assert not gated(t.model) and hc.discover(t.model).attentions[0].num_heads == 4


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    """`auto_find_batch_size` starts the loop again after an error: our gates go, and come back."""
    left = [True]

    class Full(T.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6 and left:
                left.pop()
                raise RuntimeError("CUDA out of memory.")

    t = trainer(tmp_path, [hc.PruningCallback(heads=0.5, neurons=0.5, every=1), Full()], auto_find_batch_size=True)
    t.train()
    assert not left and not gated(t.model)
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 6


def test_the_users_optimizer_is_kept(tmp_path):
    t = trainer(tmp_path, [hc.PruningCallback(heads=0.5, every=1)])
    sgd = torch.optim.SGD(t.model.parameters(), lr=0.1, momentum=0.9)
    t.optimizer = sgd
    t.train()
    held = {id(p) for group in sgd.param_groups for p in group["params"]}
    assert held == {id(p) for p in t.model.parameters()}
    t.remove_callback(hc.PruningCallback)
    t.train()
    assert isinstance(getattr(t.optimizer, "optimizer", t.optimizer), torch.optim.SGD)


def test_saving_leaves_other_files_alone_and_rolls_back(tmp_path, monkeypatch):
    t = trainer(tmp_path, kind=hc.CompressionTrainer)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model_ema.safetensors").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("stale shard")
    t.save_model(str(folder))
    assert (folder / "model_ema.safetensors").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with torch.no_grad():
        t.model.classifier.weight.add_(1.0)
    t.model.config.id2label = {0: "no", 1: "yes"}
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(hc.CompressionError, match="Input/output error"):
        t.save_model(str(folder))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_loss_scaling_asks_again_where_a_batch_cannot_tell(tmp_path):
    model, _ = build("llama")
    t = trainer(tmp_path, kind=hc.CompressionTrainer, model=model)
    ids = torch.arange(5, 15)[None]
    assert t._uses_num_items({"input_ids": ids, "labels": torch.full_like(ids, -100)}) is None
    assert t._uses_num_items({"input_ids": ids, "labels": ids}) is True
    t = trainer(tmp_path, kind=hc.CompressionTrainer)
    assert t._uses_num_items({"input_ids": ids, "labels": torch.tensor([1])}) is False


def test_weights_that_a_checkpoint_lacks_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = build("bert")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(hc.CompressionError, match="has no 'bert.encoder.layer.1.output.dense.weight'"):
        restore_weights(model, tmp_path)


def test_resume_from_a_path_restores_renamed_weights_too(tmp_path):
    saving = dict(family="vit", save_strategy="steps", save_steps=4, max_steps=8)
    whole = trainer(tmp_path / "a", [hc.PruningCallback(heads=0.5, every=1)], **saving)
    whole.train()
    again = trainer(tmp_path / "b", [hc.PruningCallback(heads=0.5, every=1)], **saving)
    again.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-4")
    for (name, p), (_, q) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("callback", [hc.PruningCallback(neurons=0.5, every=1), hc.SparsityCallback(0.5, every=1)])
def test_steps_at_which_masks_move_tell_their_loss(callback, tmp_path):
    t = trainer(tmp_path, [callback], max_steps=10, logging_steps=1)
    t.train()
    told = [entry["step"] for entry in t.state.log_history if "loss" in entry]
    removed = [entry for entry in t.state.log_history if {"weights_removed", "neurons_removed"} & entry.keys()]
    assert told == list(range(1, 11)) and len(removed) == 5


@pytest.mark.parametrize("unscaled", ["clipped", "for its norm", "by the step"])
@pytest.mark.parametrize("kind", [hc.PruningCallback, hc.SparsityCallback])
def test_movement_is_that_of_gradients_without_the_loss_scale(kind, unscaled, tmp_path, monkeypatch):
    """A scaler as float16 training has one; who divides by its scale, and when, differs between releases of transformers."""
    if unscaled == "by the step":
        monkeypatch.setattr(T.Trainer, "_get_grad_norm", lambda self, model, grad_norm=None: 0.0, raising=False)
    scores = []
    for scale in (None, 256.0):
        many = dict(heads=0.5, neurons=0.5) if kind is hc.PruningCallback else dict(sparsity=0.5)
        prune, seen = kind(**many, score="movement", start=0.9, end=1.0), {}

        class Look(T.TrainerCallback):
            def on_step_end(self, args, state, control, prune=prune, seen=seen, **kwargs):
                if prune._run is not None and state.global_step == 3:
                    found = prune._run.scores if isinstance(prune, hc.PruningCallback) else prune._run.moved
                    seen.update({name: score.clone() for name, score in found.items()})

        t = trainer(tmp_path, [prune, Look()], max_steps=4, max_grad_norm=1e9 if unscaled == "clipped" else 0.0)
        if scale is not None:
            t.accelerator.scaler, t.accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
            t.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # then numbers are the same
            monkeypatch.setattr(type(t.accelerator), "mixed_precision", property(lambda self: "fp16"))
        t.train()
        scores.append(seen)
    assert scores[0]
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=1e-3, atol=1e-3 * float(score.abs().max()))


@pytest.mark.parametrize("inputs", [{"zz": torch.zeros(1)}, {"input_ids": torch.tensor([[500]])}])
def test_inputs_of_the_user_are_used_or_refused(inputs, tmp_path):
    t = trainer(tmp_path, [hc.PruningCallback(heads=0.5, inputs=inputs)])
    with pytest.raises(hc.CompressionError, match="does not run on the proof's inputs"):
        t.train()


def test_what_a_mask_hides_before_training_goes_first(tmp_path):
    model, _ = build("bert")
    name = "bert.encoder.layer.0.attention.self"
    hc.mask_(model, hc.Plan([hc.KeepHeads(name, [1, 3])]))
    prune = hc.PruningCallback(heads=0.5, every=1)
    t = trainer(tmp_path, [prune], model=model)
    t.train()
    kept = [e.heads for e in prune.plan.edits if e.attention == name][0]
    assert set(kept) <= {1, 3}
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 6


def test_fused_projections_of_a_masked_model_are_scored(tmp_path):
    """How GPT-2's c_attn lies is proved with units that the mask leaves, whichever those are."""
    model, _ = build("gpt2")
    hc.mask_(model, hc.Plan([hc.KeepHeads("transformer.h.0.attn", [1, 3])]))
    plan = hc.plan_pruning(model, heads=0.5, score="magnitude")
    assert sum(4 - len(e.heads) for e in plan.edits) == 6
