"""CompressionTrainer: what stock Trainer 5.23 gets wrong for us, by value."""

import errno

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress import files
from tests.trainers import fingerprint, trainer
from tests.zoo import build, outputs, random_plan


def first_gradient(folder, kind, family, steps, size):
    t = trainer(
        folder, kind=kind, family=family, gradient_accumulation_steps=steps, per_device_train_batch_size=size, max_steps=1,
        max_grad_norm=0.0,
    )  # fmt: skip
    for module in t.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = {}

    class Look(T.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    t.add_callback(Look())
    t.train()
    return found


@pytest.mark.parametrize("family", ["bert", "vit", "modernbert"])
def test_the_gradient_does_not_depend_on_the_accumulation(family, tmp_path):
    """bert's and modernbert's heads average by themselves, vit's uses num_items_in_batch: both must come out the same."""
    one = first_gradient(tmp_path, hc.CompressionTrainer, family, 1, 8)
    for steps in (2, 4):
        many = first_gradient(tmp_path, hc.CompressionTrainer, family, steps, 8 // steps)
        for name, grad in one.items():
            torch.testing.assert_close(many[name], grad, rtol=1e-3, atol=1e-6)
    if family == "bert":  # the control: stock trains at four times the loss
        stock = first_gradient(tmp_path, T.Trainer, family, 4, 2)
        name = "classifier.weight"
        assert (stock[name].norm() / one[name].norm()).item() == pytest.approx(4.0, rel=1e-2)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_resume_and_best_model_restore_every_weight(family, tmp_path):
    saving = dict(save_strategy="steps", save_steps=3, max_steps=6)
    whole = trainer(tmp_path / "a", kind=hc.CompressionTrainer, family=family, **saving)
    whole.train()
    resumed = trainer(tmp_path / "b", kind=hc.CompressionTrainer, family=family, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert fingerprint(whole.model) == fingerprint(resumed.model)
    best = trainer(
        tmp_path / "c", kind=hc.CompressionTrainer, family=family, eval_strategy="steps", eval_steps=3, learning_rate=5.0,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **saving,
    )  # fmt: skip
    best.train()
    stored = type(best.model).from_pretrained(best.state.best_model_checkpoint)
    assert fingerprint(stored) == fingerprint(best.model)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_dense_model_resumes_from_a_pruned_checkpoint(uniform, tmp_path):
    small, batch = build("llama" if uniform else "bert")
    if uniform:  # stock: only config numbers differ
        small = T.AutoModelForSequenceClassification.from_config(small.config).eval()
        hc.apply_(small, hc.plan_pruning(small, heads=0.5, neurons=0.5, score="magnitude", uniform=True))
        assert not hasattr(small.config, "quantization_config")
    else:
        hc.apply_(small, random_plan(small, ("heads", "neurons")))
    saving = dict(save_strategy="steps", save_steps=3, max_steps=6)
    whole = trainer(tmp_path / "a", kind=hc.CompressionTrainer, model=small, **saving)
    whole.train()
    dense = build("bert")[0]
    if uniform:
        dense = T.AutoModelForSequenceClassification.from_config(build("llama")[0].config)
    resumed = trainer(tmp_path / "b", kind=hc.CompressionTrainer, model=dense, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert fingerprint(whole.model) == fingerprint(resumed.model)
    resumed.save_model(str(tmp_path / "out"))
    loaded = type(dense).from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, batch), outputs(resumed.model.eval(), batch))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    wider = T.BertForSequenceClassification(T.BertConfig(**{**build("bert")[0].config.to_dict(), "num_hidden_layers": 2}))
    t = trainer(tmp_path, kind=hc.CompressionTrainer, model=wider, max_steps=6)
    with pytest.raises(hc.CompressionError, match="does not fit this BertForSequenceClassification"):
        t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    t = trainer(tmp_path, kind=hc.CompressionTrainer)
    t.save_model(str(tmp_path / "out"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with torch.no_grad():
        t.model.classifier.weight.add_(1.0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(hc.CompressionError, match="No space left"):
        t.save_model(str(tmp_path / "out"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    monkeypatch.undo()
    t.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before["model.safetensors"]
