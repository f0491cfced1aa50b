"""Early exits trained in plain Trainers, their thresholds, and their checkpoints."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as T
from torch.nn import functional as F

import hf_compress as hc
from hf_compress.exits import (
    CRITERIA,
    attach_exits_,
    detach_exits_,
    exit_layers,
    exit_options,
    exits_off,
    set_exits_,
    take_exit_losses,
)
from hf_compress.exits.callback import EarlyExitCallback
from hf_compress.exits.runtime import CHANGED
from hf_compress.exits.tune import tune_exits_
from hf_compress.modules import is_gated
from tests.exiting import (
    all_logits,
    batch_for,
    expected,
    halves,
    model_with_exits,
    plain_model,
    run,
    spread_heads,
    without_dropout,
)
from tests.trainers import Killer, rows, trainer
from tests.zoo import build, outputs

# --- training --------------------------------------------------------------------------------------------------------


def by_hand(model, batch, labels, weights, distil=0.0, temperature=2.0, scale=1.0):
    """The joint loss from the papers' formulas, in float64 with numpy; heads and layers as they are."""
    logits = all_logits(model.eval(), batch).double().numpy()

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    ce = [-log_softmax(x)[np.arange(len(labels)), labels].mean() for x in logits]
    t = log_softmax(logits[-1] / temperature)
    kl = [temperature**2 * (np.exp(t) * (t - log_softmax(x / temperature))).sum(-1).mean() for x in logits[:-1]]
    each = [scale * ((1 - distil) * c + distil * k) for c, k in zip(ce[:-1], kl, strict=True)] + [scale * ce[-1]]
    return float(np.dot(weights, each) / np.sum(weights)), ce


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "openai_gpt", "llama", "deberta_v2", "modernbert"])
def test_joint_loss_by_value(name):
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    for weights, numbers in (("depth", [1, 2, 3]), ("equal", [1, 1, 1]), ([0.5, 0.0, 2.0], [0.5, 0.0, 2.0])):
        for distil in (0.0, 0.3):
            model = without_dropout(model_with_exits(name, weights=weights, distil=distil, temperature=3.0))
            batch = batch_for(model)
            wanted, ce = by_hand(model, batch, labels.numpy(), numbers, distil, 3.0)
            model.train()
            out = model(**batch, labels=labels)
            assert out.loss.item() == pytest.approx(wanted, rel=1e-4), (weights, distil)
            assert model(**batch, labels=labels, return_dict=False)[0].item() == pytest.approx(wanted, rel=1e-4)
            seen = take_exit_losses(model)
            assert list(seen) == ["exit_loss_0", "exit_loss_1", "final_loss"]
            np.testing.assert_allclose([v.item() for v in seen.values()], ce, rtol=1e-4)
            assert take_exit_losses(model) == {}


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_exits_are_scaled_as_the_models_own_loss(name):
    """ViT divides the sum over the batch by num_items_in_batch; BERT and Llama average whatever it is."""
    model = without_dropout(model_with_exits(name))
    batch, labels = batch_for(model), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    scale = {"bert": 1.0, "vit": 8 / 32, "llama": 1.0}[name]
    with exits_off(model):
        loss = [run(model, batch, labels=labels, **more).loss.item() for more in ({"num_items_in_batch": 32}, {})]
    assert loss[0] / loss[1] == pytest.approx(scale, rel=1e-4)
    wanted, _ = by_hand(model, batch, labels.numpy(), [1, 2, 3], scale=scale)
    model.train()
    for _ in range(2):
        found = model(**batch, labels=labels, num_items_in_batch=torch.tensor(32)).loss.item()
        assert found == pytest.approx(wanted, rel=1e-4)


def test_distillation_does_not_teach_the_teacher():
    model = without_dropout(model_with_exits(distil=1.0, weights=[1.0, 1.0, 0.0])).train()
    batch, labels = batch_for(model), torch.zeros(8, dtype=torch.long)
    model(**batch, labels=labels).loss.backward()
    assert model.classifier.weight.grad.abs().sum() == 0
    assert model.exit_heads["0"].out.weight.grad.abs().sum() > 0


def test_labels_that_are_no_classes_are_refused():
    model = model_with_exits().train()
    with pytest.raises(hc.CompressionError, match="class label a row"):
        model.config.problem_type = None
        model(**batch_for(model), labels=torch.rand(8, 3))
    weighted = model_with_exits().train()
    forward = weighted.forward

    def louder(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.loss = 3 * out.loss
        return out

    weighted.forward = louder
    with pytest.raises(hc.CompressionError, match="not the mean cross-entropy"):
        weighted(**batch_for(weighted), labels=torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = without_dropout(model_with_exits()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch_for(model), labels=torch.arange(8) % 3).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        losses = take_exit_losses(model)
        assert len(losses) == 3 and model._exits.loss_count == 0
    assert grads[0].keys() == grads[1].keys() and "exit_heads.0.out.weight" in grads[0]
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def exits(**options):
    return EarlyExitCallback(**{"after": [0, 1], "threshold": 0.6, **options})


def test_callback_trains_every_exit(tmp_path):
    callback = exits()
    t = trainer(tmp_path, [callback], max_steps=60, learning_rate=2e-3)
    before = {n: p.clone() for n, p in t.model.named_parameters()}
    assert any("exit_heads" in n for n in before) and t.optimizer is None
    t.train()
    assert all(not torch.equal(before[n], p) for n, p in t.model.exit_heads.named_parameters(prefix="exit_heads"))
    logged = [entry for entry in t.state.log_history if "exit_loss_0" in entry]
    assert len(logged) == 15 and list(logged[0])[:3] == ["exit_loss_0", "exit_loss_1", "final_loss"]
    joint = [entry["loss"] for entry in t.state.log_history if "loss" in entry]
    # what is optimised is the weighted mean of what is logged
    for entry, loss in zip(logged, joint, strict=True):
        parts = entry["exit_loss_0"] + 2 * entry["exit_loss_1"] + 3 * entry["final_loss"]
        assert loss == pytest.approx(parts / 6, abs=2e-3)
    assert logged[-1]["exit_loss_0"] < 0.5 < logged[0]["exit_loss_0"]
    # on again: most rows leave early, and rightly
    batch = {k: torch.stack([r[k] for r in rows(64)]) for k in ("input_ids", "attention_mask", "labels")}
    labels = batch.pop("labels")
    found = run(t.model.eval(), batch).logits
    assert (found.argmax(-1) == labels).float().mean() > 0.9 and (exit_layers(t.model) < 2).float().mean() > 0.5


@pytest.mark.parametrize("evaluate", [False, True])
def test_evaluation_while_training_is_the_full_models_unless_asked(evaluate, tmp_path):
    seen = []

    class Watch(T.TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            seen.append(exit_layers(model).tolist())

    t = trainer(tmp_path, [exits(evaluate=evaluate, threshold=0.01), Watch()], eval_strategy="steps", eval_steps=6)
    t.train()
    assert len(seen) == 2 and all(set(s) == ({0} if evaluate else {2}) for s in seen)
    t.evaluate()
    assert set(seen[-1]) == {0}


class Logged(T.TrainerCallback):
    """What a reporting integration is given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_the_mean_depth_of_an_evaluation_is_among_its_metrics(tmp_path):
    """13 rows in batches of 5: the mean over rows, not over batches; each row runs once."""
    logged, forwards = Logged(), []
    t = trainer(tmp_path, [logged, exits()], model=plain_model(num_labels=2), per_device_eval_batch_size=5)
    spread_heads(t.model)
    data = rows(13)
    batch = {k: torch.stack([r[k] for r in data]) for k in ("input_ids", "attention_mask")}
    thresholds = halves(t.model.eval(), batch)
    _, taken = expected(all_logits(t.model, batch), thresholds)
    depths = taken.double().numpy() + 1  # exits after layers 0 and 1 of three
    wanted = depths.mean()
    assert wanted != pytest.approx(np.mean([depths[:5].mean(), depths[5:10].mean(), depths[10:].mean()]))
    t.model.register_forward_hook(lambda *_: forwards.append(1))
    for enabled, depth in ((True, wanted), (False, 3.0)):
        set_exits_(t.model, threshold=thresholds, enabled=enabled)
        metrics = t.evaluate(data)
        assert metrics["eval_mean_exit_depth"] == pytest.approx(depth) and logged.seen[-1]["eval_mean_exit_depth"] == approx(
            depth
        )
        assert t.state.log_history[-1]["eval_mean_exit_depth"] == approx(depth) and "eval_loss" in metrics
    assert len(forwards) == 6
    set_exits_(t.model, enabled=True)
    assert t.predict(data).metrics["test_mean_exit_depth"] == approx(wanted)
    both = t.evaluate({"one": data[:5], "other": data})
    assert both["eval_one_mean_exit_depth"] == approx(depths[:5].mean()) and both["eval_other_mean_exit_depth"] == approx(
        wanted
    )
    # an evaluation that broke off leaves nothing behind, nor do exits that are taken off
    with pytest.raises(KeyError):
        t.evaluate([*data[:10], {"input_ids": data[0]["input_ids"]}, {}])
    assert t.evaluate(data, metric_key_prefix="dev")["dev_mean_exit_depth"] == approx(wanted)
    hc.detach_exits_(t.model)
    assert not any("depth" in name for name in t.evaluate(data))


def approx(value):
    return pytest.approx(value, abs=1e-9)


def test_the_mean_depth_can_choose_the_best_model(tmp_path):
    t = trainer(
        tmp_path, [exits(evaluate=True, threshold=0.6)], max_steps=6, learning_rate=2e-3, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="mean_exit_depth",
        greater_is_better=False,
    )  # fmt: skip
    t.train()
    depths = [entry["eval_mean_exit_depth"] for entry in t.state.log_history if "eval_mean_exit_depth" in entry]
    assert len(depths) == 3 and t.state.best_metric == min(depths)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_resuming_is_the_uninterrupted_run(options, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6, "logging_strategy": "no", **options}
    whole = trainer(tmp_path / "a", [exits()], **saving)
    whole.train()
    again = trainer(tmp_path / "b", [exits()], **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert not torch.equal(again.model.exit_heads["0"].out.bias, torch.zeros(2))


def test_the_callback_refuses(tmp_path):
    t = trainer(tmp_path)
    t.add_callback(exits())
    with pytest.raises(hc.CompressionError, match="callbacks="):
        t.train()
    with pytest.raises(hc.CompressionError, match="Two EarlyExitCallbacks"):
        trainer(tmp_path, [exits(), exits()])
    with pytest.raises(hc.CompressionError, match="0 to 1"):
        trainer(tmp_path, [exits(after=[2])])
    with pytest.raises(hc.CompressionError, match="label_smoothing"):
        trainer(tmp_path, [exits()], label_smoothing_factor=0.1).train()
    t = trainer(tmp_path, [exits()])
    t.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    with pytest.raises(hc.CompressionError, match="compute_loss_func"):
        t.train()

    class Own(T.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            out = model(**inputs)
            loss = F.cross_entropy(out.logits, labels)
            return (loss, out) if return_outputs else loss

    t = trainer(tmp_path, [exits()], kind=Own)
    before = {n: p.clone() for n, p in t.model.named_parameters()}
    with pytest.raises(hc.CompressionError, match="No loss reached the exits"):
        t.train()
    assert all(torch.equal(before[n], p) for n, p in t.model.named_parameters())
    model = model_with_exits(after=(0,))
    with pytest.raises(hc.CompressionError, match="already"):
        trainer(tmp_path, [exits()], model=model)
    arguments = T.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(hc.CompressionError, match="model_init"):
        T.Trainer(model_init=lambda: plain_model(), args=arguments, callbacks=[exits()])
    dense = plain_model()
    with pytest.raises(hc.CompressionError, match="optimizer"):
        T.Trainer(dense, arguments, callbacks=[exits()], optimizers=(torch.optim.SGD(dense.parameters(), 0.1), None))


def test_a_model_that_has_exits_trains_on(tmp_path):
    model = model_with_exits()
    bias = model.exit_heads["0"].out.weight.clone()
    t = trainer(tmp_path, [exits(criterion="entropy", threshold=0.3, distil=0.5)], model=model, max_steps=1)
    assert torch.equal(model.exit_heads["0"].out.weight, bias)
    options = exit_options(t.model)
    assert (options["criterion"], options["threshold"], options["distil"]) == ("entropy", 0.3, 0.5)


def test_a_batch_without_labels_teaches_nothing(tmp_path):
    """A first micro-batch whose labels are all -100 tells neither a loss nor how the model scales it."""
    nobody, some = torch.full((8,), -100), torch.tensor([0, -100, 2, 0, 1, -100, 0, 1])
    for name in ("bert", "vit"):
        for more in ({}, {"num_items_in_batch": torch.tensor(6)}):
            model = without_dropout(model_with_exits(name, distil=0.3)).train()
            batch, twin = batch_for(model), copy.deepcopy(model)
            model(**batch, labels=nobody, **more).loss.backward()
            assert all(p.grad is None or not p.grad.any() for p in model.parameters()), (name, more)
            loss = model(**batch, labels=some, **more).loss
            assert loss.isfinite() and torch.equal(loss, twin(**batch, labels=some, **more).loss)
            seen, wanted = take_exit_losses(model), take_exit_losses(twin)  # a mean over the batch that had labels
            assert seen.keys() == wanted.keys() and all(torch.equal(seen[k], wanted[k]) for k in wanted)
    model = model_with_exits(threshold=0.0)
    stock = plain_model()
    assert run(model, batch_for(model), labels=nobody).loss.isnan() and run(stock, batch_for(stock), labels=nobody).loss.isnan()


class Ctrl(T.TrainerCallback):
    """Stops a training from inside a forward pass, after an evaluation."""

    def __init__(self):
        self.stopped = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        layer = model.bert.encoder.layer[1].output

        def stop(module, inputs):
            self.stopped.append(model._exits.enabled)
            handle.remove()
            raise KeyboardInterrupt

        handle = layer.register_forward_pre_hook(stop)


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_training_leaves_exits_as_they_were(before, tmp_path):
    model = hc.apply_(plain_model("bert"), hc.Plan([hc.AddExits((0, 1), threshold=0.0)]))
    spread_heads(model)
    set_exits_(model, enabled=before)
    prune, ctrl = hc.PruningCallback(heads=0.5), Ctrl()
    data = [{**row, "labels": row["labels"] * 2} for row in rows(16)]
    for callbacks in ([exits(threshold=0.0), ctrl], [prune, exits(threshold=0.0), ctrl], [exits(threshold=0.0), prune, ctrl]):
        t = trainer(tmp_path, callbacks, model=model, eval_strategy="steps", eval_steps=2)
        t.train_dataset, t.eval_dataset = data, data
        with pytest.raises(KeyboardInterrupt):
            t.train()
        assert model._exits.enabled is before and model._exits.now is None and not ctrl.stopped.pop()
        assert not any(is_gated(module) for module in model.modules()) and "_hfc_guards" not in vars(t)
        run(model.eval(), batch_for(model))
        assert exit_layers(model).tolist() == [0 if before else 2] * 8
    fresh_model = trainer(tmp_path, [exits(), Killer(2, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        fresh_model.train()
    assert fresh_model.model._exits.enabled  # as exits that were just added are


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_best_model_of_a_stock_trainer_is_whole(order, pruned, tmp_path):
    """ViT's weights are saved under other names than they have in memory, and the best is not the last."""
    callbacks = [exits(), *([hc.PruningCallback(neurons=0.5, start=0.0, end=0.1, every=1)] if pruned else [])][::order]
    t = trainer(
        tmp_path, callbacks, "vit", max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_falling", greater_is_better=True,
    )  # fmt: skip
    t.compute_metrics = lambda prediction: {"falling": -t.state.global_step}
    t.train()
    assert t.state.best_global_step == 2 and t.state.global_step == 6
    best = type(t.model).from_pretrained(t.state.best_model_checkpoint).eval()
    batch = batch_for(t.model)
    with exits_off(best), exits_off(t.model):
        expected_logits = run(best, batch).logits
        found = run(t.model.eval(), batch).logits
    torch.testing.assert_close(found, expected_logits, atol=1e-5, rtol=1e-5)
    assert sum(f.size for f in hc.discover(t.model).ffns) == (144 if pruned else 288)
    if not pruned:
        wanted = dict(best.named_parameters())
        assert all(torch.equal(p, wanted[n]) for n, p in t.model.named_parameters())


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_tuned_thresholds_keep_what_they_promise(criterion, tmp_path):
    t = trainer(tmp_path, [exits()], max_steps=60, learning_rate=2e-3)
    t.train()
    model = t.model.eval()
    set_exits_(model, criterion=criterion, threshold=1 if criterion == "patience" else 0.5)
    data = rows(64)
    batches = [{k: torch.stack([r[k] for r in data[i : i + 8]]) for k in data[0]} for i in range(0, 64, 8)]

    def measured():
        logits, left = [], []
        for batch in batches:
            logits.append(run(model, {k: v for k, v in batch.items() if k != "labels"}).logits)
            left.append(exit_layers(model))
        right = torch.cat(logits).argmax(-1) == torch.stack([r["labels"] for r in data])
        return right.double().mean().item(), (torch.cat(left) + 1).double().mean().item()

    with exits_off(model):
        full = measured()[0]
    found = tune_exits_(model, batches, max_drop=0.05)
    assert found["full_metric"] == pytest.approx(full)
    assert exit_options(model)["threshold"] == found["threshold"] and found["metric"] >= full - 0.05 - 1e-9
    assert not [r for r in found["table"] if r["metric"] >= full - 0.05 - 1e-9 and r["mean_depth"] < found["mean_depth"] - 1e-9]
    for row in found["table"][:: max(1, len(found["table"]) // 8)]:  # what was simulated is what happens
        set_exits_(model, threshold=row["threshold"])
        assert measured() == pytest.approx((row["metric"], row["mean_depth"]))
    depths = [row["mean_depth"] for row in found["table"]]
    assert depths == sorted(depths, reverse=True) and depths[-1] == 1.0
    assert depths[0] == 3.0  # nobody leaves
    bound = sum(depths) / len(depths)
    found = tune_exits_(model, iter(batches), mean_depth=bound)
    assert found["mean_depth"] == max(d for d in depths if d <= bound)
    by_loss = tune_exits_(model, batches, mean_depth=3.0, metric=lambda x, y: -F.cross_entropy(x, y).item())
    assert by_loss["full_metric"] < 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_both_ends_of_the_thresholds_are_tried(criterion):
    """Rows that are as sure and as unsure as a float can be: thresholds reach "nobody leaves" and "all leave" with them."""
    model = model_with_exits(criterion=criterion)
    batch = {**batch_for(model), "labels": torch.arange(8) % 3}
    for scale in (0.0, 1.0, 1e4):
        with torch.no_grad():
            for head in model.exit_heads.values():
                head.out.weight.mul_(scale / head.out.weight.norm().clamp_min(1e-9))
                head.out.bias.fill_(0.7)
        found = tune_exits_(model, [batch], max_drop=1.0)["table"]
        assert (found[0]["mean_depth"], found[-1]["mean_depth"]) == (3.0, 1.0), scale
        for row, layer in ((found[0], 2), (found[-1], 0)):
            set_exits_(model, threshold=row["threshold"])
            run(model, batch_for(model))
            assert exit_layers(model).tolist() == [layer] * 8
        spread_heads(model)


def test_tuning_refuses():
    model = model_with_exits()
    batch = {**batch_for(model), "labels": torch.arange(8) % 3}
    for batches, options, message in (
        ([batch], {}, "Say what may be lost"), ([batch], {"mean_depth": 0.5}, "from 1"), ([batch], {"max_drop": -1}, "from 0"),
        ([batch], {"max_drop": "x"}, "from 0"), ([], {"max_drop": 0.1}, "No batch"), (batch, {"max_drop": 0.1}, "into a list"),
        ([batch_for(model)], {"max_drop": 0.1}, "labels"),
    ):  # fmt: skip
        before = exit_options(model)
        with pytest.raises(hc.CompressionError, match=message):
            tune_exits_(model, batches, **options)
        assert exit_options(model) == before
    calls = iter(range(1000))
    with pytest.raises(
        hc.CompressionError, match="No threshold meets"
    ):  # a metric that falls with every call; the last is the full model's
        tune_exits_(model, [batch], max_drop=0.0, metric=lambda x, y: float(next(calls)))
    with pytest.raises(hc.CompressionError, match="no exits to tune"):
        tune_exits_(plain_model(), [batch], max_drop=0.1)


# --- with pruning ----------------------------------------------------------------------------------------------------


def test_gates_inside_layers_and_exits_do_not_disturb_each_other():
    plan = hc.Plan(
        [hc.KeepHeads("bert.encoder.layer.1.attention.self", [0, 2]), hc.KeepNeurons("bert.encoder.layer.0", range(40))]
    )
    model = model_with_exits()
    batch = batch_for(model)
    with hc.mask_(model, plan):
        logits, thresholds = all_logits(model, batch), halves(model, batch)
        set_exits_(model, threshold=thresholds)
        masked = run(model, batch).logits
        torch.testing.assert_close(masked, expected(logits, thresholds)[0], atol=1e-5, rtol=1e-5)
    options = exit_options(model)
    heads = model.exit_heads.state_dict()
    detach_exits_(model)
    hc.apply_(model, plan)
    attach_exits_(model, options)
    model.exit_heads.load_state_dict(heads)
    torch.testing.assert_close(run(model, batch).logits, masked, atol=1e-5, rtol=1e-5)


# --- taken off again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_a_model_without_its_exits_is_the_stock_model_again(family, tmp_path, plain):
    model = plain_model(family)
    batch = batch_for(model)
    dense = run(model, batch).logits
    plain_model(family).save_pretrained(tmp_path / "never")
    kinds = {n: type(m) for n, m in model.named_modules()}
    hc.apply_(model, hc.Plan([hc.AddExits([0, 1], threshold=0.0)]))
    model.save_pretrained(tmp_path / "exits")
    for held in (model, type(model).from_pretrained(tmp_path / "exits").eval()):
        assert not torch.equal(run(held, batch).logits, dense)
        hc.detach_exits_(held)
        assert torch.equal(run(held, batch).logits, dense) and {n: type(m) for n, m in held.named_modules()} == kinds
        held.save_pretrained(tmp_path / "stock")
        configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("stock", "never")]
        assert configs[0] == configs[1]
        assert torch.equal(plain.outputs(type(model).__name__, tmp_path / "stock", batch)["logits"], dense)
        assert torch.equal(run(type(model).from_pretrained(tmp_path / "stock").eval(), batch).logits, dense)


def test_what_else_was_recorded_stays_recorded(tmp_path, plain):
    exits_plan = hc.Plan([hc.AddExits([0, 1], threshold=0.0)])
    uniform = hc.Plan([hc.KeepNeurons(f"bert.encoder.layer.{i}", range(40)) for i in range(3)])
    uneven = hc.Plan([hc.KeepHeads("bert.encoder.layer.1.attention.self", [0, 2])])
    for plan, stock in ((uniform, True), (uneven, False)):
        for steps in ((plan, exits_plan), (exits_plan, plan)):
            model, alone = plain_model(), plain_model()
            batch = batch_for(model)
            wanted = run(hc.apply_(alone, plan), batch).logits
            for step in steps:
                hc.apply_(model, step)
            hc.detach_exits_(model)
            record = getattr(model.config, "quantization_config", None)
            assert (record is None) is stock and (stock or (record.plan == plan and "exits" not in record.layout))
            assert torch.equal(run(model, batch).logits, wanted)
            model.save_pretrained(tmp_path / "out")
            assert torch.equal(run(type(model).from_pretrained(tmp_path / "out").eval(), batch).logits, wanted)
            if stock:
                assert torch.equal(plain.outputs(type(model).__name__, tmp_path / "out", batch)["logits"], wanted)
    # and it takes other edits
    hc.apply_(model, hc.plan_quantization(model, bits=4))
    hc.apply_(model, exits_plan)
    hc.detach_exits_(model)
    model.save_pretrained(tmp_path / "int4")
    again = type(model).from_pretrained(tmp_path / "int4").eval()
    assert torch.equal(outputs(again, batch), outputs(model, batch)) and exit_options(again) is None
    model = plain_model()
    hc.apply_(model, exits_plan)
    hc.detach_exits_(model)
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "int8").eval(), batch), outputs(model, batch))


# --- in checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_checkpoints_of_a_training_load_and_resume(family, tmp_path, fresh):
    """ViT's weights are saved under other names than they have in memory, which stock Trainer does not restore."""
    saving = {"save_strategy": "steps", "save_steps": 6, "logging_strategy": "no", "learning_rate": 2e-3}
    whole = trainer(tmp_path / "a", [exits()], family, **saving)
    whole.train()
    again = trainer(tmp_path / "b", [exits()], family, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    kind = type(whole.model)
    loaded = kind.from_pretrained(tmp_path / "a" / "checkpoint-12").eval()
    assert exit_options(loaded) == exit_options(whole.model)
    batch = batch_for(loaded)
    wanted = run(whole.model.eval(), batch).logits
    assert torch.equal(run(loaded, batch).logits, wanted)
    assert torch.equal(fresh.outputs(kind.__name__, tmp_path / "a" / "checkpoint-12", batch)["logits"], wanted)
    thresholds = halves(loaded, batch)
    for model in (loaded, whole.model):
        set_exits_(model, threshold=thresholds)
    assert torch.equal(run(loaded, batch).logits, run(whole.model, batch).logits)
    assert exit_layers(loaded).tolist() == exit_layers(whole.model).tolist() and len(set(exit_layers(loaded).tolist())) == 3


@pytest.mark.parametrize("order", [1, -1])
def test_pruning_and_exits_in_one_training(order, tmp_path):
    prune = hc.PruningCallback(heads=0.5, neurons=0.5, every=1)
    t = trainer(tmp_path, [prune, exits()][::order], max_steps=40, learning_rate=2e-3)
    t.train()
    model = t.model.eval()
    structure = hc.discover(model)
    assert sum(a.num_heads for a in structure.attentions) == 6 and sum(f.size for f in structure.ffns) == 144
    batch = {k: torch.stack([r[k] for r in rows(32)]) for k in ("input_ids", "attention_mask")}
    logits, thresholds = all_logits(model, batch), halves(model, batch)
    set_exits_(model, threshold=thresholds)
    wanted, taken = expected(logits, thresholds)
    torch.testing.assert_close(run(model, batch).logits, wanted, atol=1e-5, rtol=1e-5)
    assert exit_layers(model).tolist() == taken.tolist() and set(taken.tolist()) == {0, 1, 2}
    t.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    set_exits_(loaded, threshold=thresholds)
    assert torch.equal(run(loaded, batch).logits, run(model, batch).logits)


def test_whoever_records_options_is_told_of_changes():
    model, seen = model_with_exits(), []
    CHANGED.append(lambda m: seen.append(exit_options(m)["threshold"]))
    try:
        set_exits_(model, threshold=0.7)
        set_exits_(model, enabled=False)
        set_exits_(model, criterion="patience", threshold=2)
    finally:
        CHANGED.pop()
    assert seen == [0.7, 2]


def test_the_readme_of_the_issue(tmp_path):
    """Prune, distil and train exits in one training, with an exit asked for after the last layer too."""
    import hf_compress as hc

    teacher, batch = build("bert")
    student = hc.init_student(teacher, layers=3)
    run = trainer(
        tmp_path,
        [hc.PruningCallback(heads=0.5, neurons=0.5), hc.EarlyExitCallback(after=(1, 2))],
        model=student,
        kind=lambda *a, **k: hc.DistillationTrainer(*a, teacher_model=teacher, **k),
        arguments=hc.DistillationArguments,
        temperature=2.0,
    )
    run.train()
    assert list(student.exit_heads) == ["1"] and hc.exit_options(student)["after"] == [1]
    assert sum(a.num_heads for a in hc.discover(student).attentions) == 6
    hc.apply_(student, hc.plan_low_rank(student, ratio=0.5) + hc.plan_quantization(student, bits=8, embeddings=True))
    run.save_model(tmp_path / "out")
    again = type(student).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(**batch).logits, student.eval()(**batch).logits)
    assert torch.equal(hc.exit_layers(again), hc.exit_layers(student))
