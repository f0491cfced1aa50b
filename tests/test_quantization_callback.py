"""`QuantizationCallback`: training with rounded weights ends in the model that was trained."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.kinds import low_rank_
from hf_compress.quantization import dequantized, is_quantized, quantize_
from hf_compress.quantization.fake import fake_, is_fake, observe_, unfake_
from hf_compress.substitute import sharers, weights_in
from tests.trainers import Killer, fingerprint, rows, trainer
from tests.zoo import build, outputs


class Recorder(T.TrainerCallback):
    """What the model computes when training ends, before the callback after it makes it real."""

    def __init__(self, batch) -> None:
        self.batch = batch

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.rounding = any(is_fake(m) for m in model.modules())
        training = model.training
        self.outputs = outputs(model.eval(), self.batch)
        model.train(training)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_quantized_model_is_the_one_that_was_trained(family, bits, tmp_path, fresh):
    batch = build(family)[1]
    recorder, callback = Recorder(batch), hc.QuantizationCallback(bits, every=2)
    run = trainer(tmp_path, [recorder, callback], family)
    before = outputs(run.model.eval(), batch)
    run.train()
    assert recorder.rounding and not any(is_fake(m) for m in run.model.modules())
    assert {n for n, m in run.model.named_modules() if is_quantized(m)} == {e.module for e in callback.plan}
    after = outputs(run.model.eval(), batch)
    assert (after - before).abs().max() > 1e-2, "nothing was trained"
    assert (after - recorder.outputs).abs().max() <= 1e-3 * max(1.0, after.abs().max().item())
    run.save_model(tmp_path / "out")
    found = fresh.outputs(type(run.model).__name__, tmp_path / "out", batch)
    assert torch.equal(found["logits"], after)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_rounded_model_computes_what_the_quantized_one_does(family):
    """Conv1D, grouped-query attention, a head tied to the embedding; without a Trainer."""
    model, batch = build(family)
    plan = hc.plan_quantization(model, bits=4, group_size=32)
    real = copy.deepcopy(model)
    hc.apply_(real, plan)
    holders = weights_in(dict(model.named_modules()))
    for edit in plan:
        module = model.get_submodule(edit.module)
        for one in [module, *(m for _, m in sharers(module, holders))]:
            fake_(one, 4, 32, None)
            observe_(one)
    torch.testing.assert_close(outputs(model, batch), outputs(real, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_is_that_of_the_rounded_weight(bits):
    layer = torch.nn.Linear(16, 8)
    x, y = torch.randn(5, 16), torch.randn(5, 8)
    weight = layer.weight
    fake_(layer, bits, None if bits == 8 else 8, None)
    observe_(layer)
    rounded = layer(torch.eye(16)).detach().T - layer.bias.detach()[:, None]
    assert (rounded - weight).abs().max() > 1e-4
    (layer(x) - y).square().sum().backward()
    expected = 2 * (x @ rounded.T + layer.bias.detach() - y).T @ x
    torch.testing.assert_close(weight.grad, expected, atol=1e-4, rtol=1e-4)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"] and layer.state_dict()["weight"] is not rounded
    unfake_(layer)
    assert layer.weight is weight and type(layer) is torch.nn.Linear


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_a_rounded_low_rank_layer_evaluates_by_the_kernel(activations):
    """Without gradients a rounded module is the quantized one to the bit; with them, up to the order of sums."""
    layer = torch.nn.Linear(24, 16)
    low_rank_(layer, 5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    real, x = copy.deepcopy(layer), torch.randn(6, 24)
    quantize_(real, bits=8, activations=activations)
    fake_(layer, 8, None, activations)
    observe_(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), real(x))
        torch.testing.assert_close(layer(x), layer(x.requires_grad_()), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x), real(x), atol=1e-4, rtol=1e-4)
    before = layer(x).detach()
    with torch.no_grad():
        layer._parameters["weight"].mul_(2)  # an optimizer's step
        assert not torch.equal(layer(x), before)


def test_scales_follow_the_weights_until_they_are_frozen(tmp_path):
    seen = []

    class Watch(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            module = model.bert.encoder.layer[0].output.dense
            seen.append(module.hfc_fake["scales"]["weight"][0].clone())

    callback = hc.QuantizationCallback(8, every=2, freeze=0.5)
    trainer(tmp_path, [callback, Watch()], max_steps=12).train()
    moved = [not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [i % 2 == 0 for i in range(5)] + [False] * 6
    assert torch.equal(callback.plan.tensors["bert.encoder.layer.0.output.dense.weight_scale"], seen[-1])


def test_with_a_teacher(tmp_path):
    """Quantization-aware distillation: at two bits it comes closer to the float model than rounding it does."""
    teacher = build("bert")[0]
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer(tmp_path, model=teacher, max_steps=40).train()
    student, rounded = copy.deepcopy(teacher), copy.deepcopy(teacher)
    hc.apply_(rounded, hc.plan_quantization(rounded, bits=2))
    run = trainer(
        tmp_path,
        [hc.QuantizationCallback(2)],
        model=student,
        kind=lambda *a, **k: hc.DistillationTrainer(*a, teacher_model=teacher, **k),
        arguments=hc.DistillationArguments,
        alpha_task=0.0,
        alpha_kd=1.0,
        max_steps=60,
    )
    run.train()
    batch = {k: torch.stack([row[k] for row in rows()]) for k in ("input_ids", "attention_mask")}
    target = outputs(teacher.eval(), batch)

    def distance(model) -> float:
        return (outputs(model.eval(), batch) - target).square().mean().item()

    assert distance(student) < 0.7 * distance(rounded)


def test_gradient_accumulation_and_embeddings_train(tmp_path):
    callback = hc.QuantizationCallback(8)
    run = trainer(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=4)
    words = run.model.bert.embeddings.word_embeddings.weight.detach().clone()
    run.train()
    now = dequantized(run.model.bert.embeddings.word_embeddings)["weight"]
    assert (now - words).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [T.Trainer, hc.CompressionTrainer])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_resume_is_exact(family, kind, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}

    def stop():
        raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole", [hc.QuantizationCallback(4, every=3)], family, kind, **saving)
    whole.train()
    cut = trainer(tmp_path / "cut", [hc.QuantizationCallback(4, every=3), Killer(6, stop)], family, kind, **saving)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert not any(is_fake(m) for m in cut.model.modules()), "a failed training left rounding behind"
    again = trainer(tmp_path / "cut", [hc.QuantizationCallback(4, every=3)], family, kind, **saving)
    again.train(resume_from_checkpoint=True)
    assert fingerprint(again.model) == fingerprint(whole.model)


def test_a_middle_checkpoint_is_an_ordinary_model(tmp_path, plain):
    run = trainer(tmp_path, [hc.QuantizationCallback(4)], save_strategy="steps", save_steps=4)
    run.train()
    batch = build("bert")[1]
    assert plain.outputs("BertForSequenceClassification", tmp_path / "checkpoint-4", batch)["logits"].isfinite().all()


class Logits(T.TrainerCallback):
    """The model's outputs on a batch at each evaluation."""

    def __init__(self, batch) -> None:
        self.batch, self.seen = batch, {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = outputs(model.eval(), self.batch)
        model.train()


EVERY_4 = dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True)


@pytest.mark.parametrize("kind", [T.Trainer, hc.CompressionTrainer])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_best_model_is_what_was_evaluated_then(family, kind, tmp_path):
    """Weights and scales of the checkpoint that was best, also where stock Trainer restores only some weights (ViT)."""
    logits = Logits(build(family)[1])
    options = {**EVERY_4, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first is worst, so "best"
    run = trainer(tmp_path, [logits, hc.QuantizationCallback(4, every=3)], family, kind, **options)
    run.train()
    best = run.state.best_global_step
    assert best < 12
    now = outputs(run.model.eval(), logits.batch)
    torch.testing.assert_close(now, logits.seen[best], atol=1e-5, rtol=1e-5)
    assert (now - logits.seen[12]).abs().max() > 1e-3


def test_rounding_begins_at_start_and_what_was_best_before_does_not_count(tmp_path):
    rounding = {}

    class Watch(T.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            rounding[state.global_step] = any(is_fake(m) for m in model.modules())

    callback = hc.QuantizationCallback(2, start=0.5)
    options = {**EVERY_4, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(tmp_path, [callback, Watch()], **options)
    run.train()
    assert [step for step, on in rounding.items() if on] == [6, 7, 8, 9, 10, 11]
    assert run.state.best_global_step in (8, 12)


def test_frozen_scales_stay_frozen_after_resume(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}

    def stop():
        raise KeyboardInterrupt

    whole = hc.QuantizationCallback(8, every=1, freeze=0.3)
    trainer(tmp_path / "whole", [whole], **saving).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", [hc.QuantizationCallback(8, every=1, freeze=0.3), Killer(9, stop)], **saving).train()
    again = hc.QuantizationCallback(8, every=1, freeze=0.3)
    trainer(tmp_path / "cut", [again], **saving).train(resume_from_checkpoint=True)
    assert again.plan == whole.plan


@pytest.mark.parametrize(
    ("options", "message"), [(dict(bits=2), "bits=4, this callback has 2"), (dict(bits=4, skip=None), "no scale for")]
)
def test_resuming_with_other_options_is_refused_before_training(options, message, tmp_path):
    run = trainer(tmp_path, [hc.QuantizationCallback(4)], save_strategy="steps", save_steps=4)
    run.train()
    again = trainer(tmp_path, [hc.QuantizationCallback(**options)], max_steps=20)
    before = fingerprint(again.model)
    with pytest.raises(hc.CompressionError, match=message):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert not any(is_fake(m) for m in again.model.modules()) and before.keys() == fingerprint(again.model).keys()


def test_training_twice_makes_a_new_optimizer(tmp_path):
    """What the first optimizer held is gone: the second training must move what is left to train."""
    run = trainer(tmp_path, [hc.QuantizationCallback(8, skip="classifier|query")])
    run.train()
    before = run.model.classifier.weight.detach().clone(), run.model.bert.encoder.layer[0].attention.self.query.weight.clone()
    run.callback_handler.callbacks = [c for c in run.callback_handler.callbacks if not isinstance(c, hc.QuantizationCallback)]
    run.train()
    assert not torch.equal(run.model.classifier.weight, before[0])
    assert not torch.equal(run.model.bert.encoder.layer[0].attention.self.query.weight, before[1])


def test_a_rounded_model_can_be_pickled_and_its_weights_written(tmp_path):
    model, batch = build("bert")
    for edit in hc.plan_quantization(model, bits=4):
        fake_(model.get_submodule(edit.module), 4, 64, None)
        observe_(model.get_submodule(edit.module))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight.data.zero_()
    assert not query._parameters["weight"].any() and query.weight is query._parameters["weight"]


def test_two_processes_agree(tmp_path):
    code = "from tests.trainers import *; main('quantized', sys.argv[1])"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python", sys.executable]
    subprocess.run([*command, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=300)
    import json

    one, two = (json.loads((tmp_path / f"rank{i}" / "result.json").read_text()) for i in (0, 1))
    assert one == two


REFUSED = [
    ("5 bits", dict(bits=5), "one of 8, 4, 3, 2"),
    ("start after freeze", dict(bits=8, start=0.5, freeze=0.2), "0 <= start <= freeze <= 1"),
    ("every 0", dict(bits=8, every=0), "steps >= 1"),
    ("group with 8", dict(bits=8, group_size=4), "leave group_size out"),
    ("skip 5", dict(bits=8, skip=5), "skip must be a regular expression .*, got 5"),
    ("bad skip", dict(bits=8, skip="("), "skip must be a regular expression"),
    ("modules 5", dict(bits=8, modules=5), "modules must be a regular expression .*, got 5"),
    ("embeddings 5", dict(bits=8, embeddings=5), "True or False, got 5"),
    ("inputs 5", dict(bits=8, inputs=5), "inputs must be a batch"),
    ("freeze nan", dict(bits=8, freeze=float("nan")), "0 <= start <= freeze <= 1"),
    ("every true", dict(bits=8, every=True), "steps >= 1, got True"),
]


@pytest.mark.parametrize(("options", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_at_construction(options, message):
    with pytest.raises(hc.CompressionError, match=message):
        hc.QuantizationCallback(**options)


def test_only_these_modules_are_trained_rounded_and_end_quantized(tmp_path):
    callback = hc.QuantizationCallback(4, modules=r"query$|word_embeddings", skip="layer.1")
    run = trainer(tmp_path, [callback], max_steps=2)
    run.train()
    found = {name for name, module in run.model.named_modules() if is_quantized(module)}
    layers = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 2)]
    assert found == {"bert.embeddings.word_embeddings", *layers} == {edit.module for edit in callback.plan}


def test_modules_that_match_nothing_are_refused_before_training(tmp_path):
    run = trainer(tmp_path, [hc.QuantizationCallback(8, modules="zzz")])
    before = fingerprint(run.model)
    with pytest.raises(hc.CompressionError, match="matches 'zzz'"):
        run.train()
    assert fingerprint(run.model) == before


class Mine(hc.PruningCallback):
    pass


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", [hc.PruningCallback, Mine])
def test_not_beside_pruning(order, kind, tmp_path):
    callbacks = [kind(heads=0.5), hc.QuantizationCallback(8)][:: 1 - 2 * order]
    run = trainer(tmp_path, callbacks)
    before = fingerprint(run.model)
    with pytest.raises(hc.CompressionError, match="Train twice: prune first"):
        run.train()
    assert fingerprint(run.model) == before and not any(is_fake(m) for m in run.model.modules())


def test_a_quantized_model_is_refused(tmp_path):
    model = build("bert")[0]
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    with pytest.raises(hc.CompressionError, match="quantized already"):
        trainer(tmp_path, [hc.QuantizationCallback(8)], model=model).train()


def test_a_training_that_ends_before_rounding_began_says_so(tmp_path, caplog):
    class Stop(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    t = trainer(tmp_path, [hc.QuantizationCallback(4, start=0.8), Stop()])
    with caplog.at_level("WARNING"):
        t.train()
    assert "ended before rounding began" in caplog.text
    assert any(is_quantized(module) for module in t.model.modules())
