"""PruningCallback in plain Trainers: exact masks, small at the end, nothing lost on the way."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.modules import is_gated
from tests.trainers import Killer, fingerprint, pictures, rows, trainer
from tests.zoo import build, outputs

ROOT = Path(__file__).parent.parent
BATCH = {k: torch.stack([r[k] for r in rows(4)]) for k in ("input_ids", "attention_mask")}


def callback(**options):
    return hc.PruningCallback(**{"heads": 0.5, "neurons": 0.5, "every": 1, **options})


def gates(model):
    return {n: m.hfc_gate for n, m in model.named_modules() if is_gated(m)}


class Watch(T.TrainerCallback):
    """What a user's own callback sees after each step."""

    def __init__(self, look):
        self.look, self.seen = look, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = self.look(model)


@pytest.mark.parametrize("score", hc.pruning.TRAINED)
@pytest.mark.parametrize("schedule", hc.pruning.schedules.SCHEDULES)
def test_masks_while_training_and_small_at_the_end(score, schedule, tmp_path):
    prune = callback(score=score, schedule=schedule, start=0.25, end=0.75)
    watch = Watch(lambda m: {n: g.clone() for n, g in gates(m).items()})
    t = trainer(tmp_path, [prune, watch])
    dense = t.model.num_parameters()
    t.train()
    # steps 3 to 9 are the schedule; heads and neurons follow its formula, each step only adds to the mask
    share = {"one_shot": lambda p: 1.0, "linear": lambda p: p, "cubic": lambda p: 1 - (1 - p) ** 3}[schedule]
    for step in range(1, 13):
        masked = sum(int((g == 0).sum()) for n, g in watch.seen[step].items() if "attention" in n) // 16
        progress = 0.0 if step < 3 else 1.0 if schedule == "one_shot" else min(1.0, (step - 3) / 6)
        assert masked == (0 if step < 3 else round(0.5 * share(progress) * 12)), (step, masked)
        if step > 1:
            assert all((watch.seen[step - 1][n] >= g).all() for n, g in watch.seen[step].items())
    structure = hc.discover(t.model)
    assert sum(a.num_heads for a in structure.attentions) == 6 and sum(f.size for f in structure.ffns) == 144
    assert t.model.num_parameters() < dense and not gates(t.model)
    assert {"heads_removed", "neurons_removed"} <= {k for entry in t.state.log_history for k in entry}
    t.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, BATCH), outputs(t.model.eval(), BATCH))


def test_the_cut_is_the_masked_model(tmp_path):
    watch = Watch(lambda m: outputs(m.eval(), BATCH))
    t = trainer(tmp_path, [callback(), watch])
    t.train()
    torch.testing.assert_close(outputs(t.model.eval(), BATCH), watch.seen[12], atol=1e-5, rtol=1e-5)


def test_scores_are_those_of_the_optimizer_steps_whatever_the_accumulation(tmp_path):
    """8 rows at once, or 2 four times: the same gradient, so the same scores and the same plan."""
    scores = []
    for size, steps in ((8, 1), (2, 4)):
        prune = callback(start=0.9, end=1.0)
        t = trainer(
            tmp_path, [prune], kind=hc.CompressionTrainer, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=3, max_grad_norm=0.0,
        )  # fmt: skip
        t.model.config.hidden_dropout_prob = 0
        for module in t.model.modules():
            if isinstance(module, torch.nn.Dropout) or hasattr(module, "attention_dropout"):
                module.p = 0.0
        t.model.eval()
        t.model.train = lambda mode=True, model=t.model: model  # no dropout: only the accumulation may differ
        run = {}
        t.add_callback(Watch(lambda m, run=run, prune=prune: run.update(prune._run.scores if prune._run else {})))
        t.train()
        scores.append((run, prune.plan))
    for name, score in scores[0][0].items():
        torch.testing.assert_close(score, scores[1][0][name], rtol=2e-2, atol=1e-9)
    assert scores[0][1] == scores[1][1]


def test_a_checkpoint_from_the_middle_is_the_masked_model(tmp_path, fresh, plain):
    watch = Watch(lambda m: (outputs(m.eval(), BATCH), m.train())[0])
    t = trainer(tmp_path, [callback(), watch], save_strategy="steps", save_steps=4)
    t.train()
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        found = fresh.outputs("BertForSequenceClassification", folder, BATCH)["logits"]
        assert torch.equal(found, watch.seen[step])
        # the saved weights are the gated ones, so even plain transformers reads the masked function
        assert torch.equal(plain.outputs("BertForSequenceClassification", folder, BATCH)["logits"], found)
        loaded = T.AutoModelForSequenceClassification.from_pretrained(folder)
        masks = loaded.config.quantization_config.masks
        assert gates(loaded) and sum(len(e.heads) for e in masks.edits if isinstance(e, hc.KeepHeads)) < 12
        hc.apply_(loaded, masks)
        torch.testing.assert_close(outputs(loaded, BATCH), found, atol=1e-5, rtol=1e-5)
        assert loaded.config.quantization_config.masks is None
        loaded.save_pretrained(tmp_path / "cut")
        again = fresh.outputs("BertForSequenceClassification", tmp_path / "cut", BATCH)["logits"]
        assert torch.equal(again, outputs(loaded, BATCH))


@pytest.mark.parametrize("add", [False, True], ids=["constructor", "add_callback"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_gate_behind(error, add, tmp_path):
    def fail():
        raise error("stop")

    prune = callback()
    t = trainer(tmp_path, [] if add else [prune])
    for extra in ([prune] if add else []) + [Killer(8, fail)]:
        t.add_callback(extra)
    t.model.config.problem_type = "single_label_classification"  # which the first loss would set
    config = t.model.config.to_dict()
    with pytest.raises(error, match="stop"):
        t.train()
    assert not gates(t.model) and not hasattr(t.model.config, "quantization_config")
    assert t.model.config.to_dict() == config and t.model.bert.encoder.layer[0].attention.self.query.out_features == 64
    t.remove_callback(Killer)
    t.train()
    assert prune.plan is not None and not gates(t.model)


def test_only_evaluations_at_full_sparsity_count(tmp_path):
    """Metrics that get worse all the time: the best one is the first at full sparsity, not the first of all."""
    prune = callback(start=0.1, end=0.5)
    value = iter(range(100, 0, -1))
    t = trainer(
        tmp_path, [prune], save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, max_steps=12,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    t.compute_metrics = lambda p: {"score": next(value)}
    watch = Watch(lambda m: (outputs(m.eval(), BATCH), m.train())[0])
    t.add_callback(watch)
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-6")  # full at step 6 of 12
    torch.testing.assert_close(outputs(t.model.eval(), BATCH), watch.seen[6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=2),
        dict(bf16=True),
        dict(gradient_checkpointing=True),
        dict(torch_compile=True, torch_compile_backend="aot_eager"),
        dict(eval_strategy="steps", eval_steps=3),
        dict(restore_callback_states_from_checkpoint=True),
        dict(auto_find_batch_size=True),
    ],
    ids=lambda o: next(iter(o)),
)
def test_works_with(options, tmp_path):
    prune = callback()
    watch = Watch(lambda m: None)
    t = trainer(tmp_path, [prune, watch], **options)
    if "torch_compile" in options:
        t.evaluate()  # graphs from before the gates
    t.train()
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 6
    assert torch.isfinite(torch.tensor([e["loss"] for e in t.state.log_history if "loss" in e])).all()
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.remove_callback(hc.PruningCallback)
    t.train()  # heals further: every weight moves, so the optimizer holds the new ones
    frozen = [n for n, p in t.model.named_parameters() if torch.equal(p, before[n])]
    assert all("key.bias" in n or "position" in n or "token_type" in n or "word" in n for n in frozen), frozen


def test_compiled_evaluation_in_the_middle_is_masked(tmp_path):
    prune = callback(start=0.1, end=0.3)
    found = {}

    class Compare(T.TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            with torch.no_grad():
                losses = [model.eval()(**{k: torch.stack([r[k] for r in rows()[:16]]) for k in rows(1)[0]}).loss.item()]
            found[state.global_step] = (metrics["eval_loss"], losses[0])

    t = trainer(
        tmp_path, [prune, Compare()], torch_compile=True, torch_compile_backend="aot_eager", eval_strategy="steps", eval_steps=6,
        per_device_eval_batch_size=16,
    )  # fmt: skip
    t.evaluate()  # graphs from before the gates must not be used with them
    found.clear()
    t.train()
    for compiled, eager in found.values():
        assert compiled == pytest.approx(eager, rel=1e-4)
    after = t.evaluate()["eval_loss"]
    assert after == pytest.approx(found[12][0], rel=1e-4)


def test_a_vision_model_resumes_exactly_in_a_plain_trainer(tmp_path):
    """Stock Trainer leaves most of ViT's weights unrestored; the callback must not inherit that."""
    saving = dict(save_strategy="steps", save_steps=4)
    whole = trainer(tmp_path / "a", [callback()], family="vit", **saving)
    whole.train()
    resumed = trainer(tmp_path / "b", [callback()], family="vit", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert fingerprint(whole.model) == fingerprint(resumed.model)
    images = {"pixel_values": torch.stack([r["pixel_values"] for r in pictures(2)])}
    assert torch.equal(outputs(whole.model.eval(), images), outputs(resumed.model.eval(), images))


def test_best_model_of_a_vision_model_in_a_plain_trainer(tmp_path):
    value = iter(range(100, 0, -1))
    t = trainer(
        tmp_path, [callback()], family="vit", save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    t.compute_metrics = lambda p: {"score": next(value)}
    images = {"pixel_values": torch.stack([r["pixel_values"] for r in pictures(2)])}
    watch = Watch(lambda m: (outputs(m.eval(), images), m.train())[0])
    t.add_callback(watch)
    t.train()
    assert t.state.best_global_step == 6
    torch.testing.assert_close(outputs(t.model.eval(), images), watch.seen[6], atol=1e-5, rtol=1e-5)


def test_the_callback_joins_the_resume_of_a_dense_run(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    prune = callback(start=0.5, end=0.8)
    t = trainer(tmp_path, [prune], save_strategy="steps", save_steps=4)
    t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 6
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["PruningCallback"]["attributes"]["saved"]["scores"]


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "Trainer"), pytest.param("vit", "CompressionTrainer", marks=pytest.mark.slow)]
)
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(family, kind, tmp_path):
    def run(action, folder):
        command = [sys.executable, "-m", "tests.trainers", action, str(tmp_path / folder), family, kind]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert run("whole", "whole").returncode == 0
    assert run("killed", "killed").returncode == -signal.SIGKILL
    resumed = run("resumed", "killed")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    whole, again = (json.loads((tmp_path / f / "result.json").read_text()) for f in ("whole", "killed"))
    assert whole == again


def test_sequence_to_sequence(tmp_path):
    model, batch = build("t5")
    data = [
        {"input_ids": batch["input_ids"][i % 2], "labels": batch["decoder_input_ids"][i % 2]} for i in range(16)
    ]  # fmt: skip
    arguments = T.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True,
        predict_with_generate=True, disable_tqdm=True,
    )  # fmt: skip
    prune = callback()
    t = T.Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[prune])
    t.train()
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 18  # of 36: 9 attentions of 4
    t.evaluate()
    t.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, batch), outputs(t.model.eval(), batch))


def test_a_pruned_model_is_pruned_further_in_the_trainer(tmp_path, fresh):
    model, _ = build("bert")
    hc.apply_(model, hc.plan_pruning(model, heads=0.25, neurons=0.25, score="magnitude"))
    model.save_pretrained(tmp_path / "first")
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    watch = Watch(lambda m: (outputs(m.eval(), BATCH), m.train())[0])
    prune = callback()
    t = trainer(tmp_path, [prune, watch], model=loaded, save_strategy="steps", save_steps=8)
    t.train()
    middle = fresh.outputs("BertForSequenceClassification", tmp_path / "checkpoint-8", BATCH)["logits"]
    assert torch.equal(middle, watch.seen[8])
    t.save_model(str(tmp_path / "out"))
    found = fresh.outputs("BertForSequenceClassification", tmp_path / "out", BATCH)["logits"]
    assert torch.equal(found, outputs(t.model.eval(), BATCH))
    assert t.model.config.quantization_config.plan == model.config.quantization_config.plan + prune.plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=0.0, neurons=0.0), "removes nothing"),
        (dict(heads=1.0), r"\[0, 1\)"),
        (dict(schedule="cubik"), "did you mean 'cubic'"),
        (dict(score="tailor"), "did you mean 'taylor'"),
        (dict(start=0.6, end=0.5), "0 <= start <= end <= 1"),
        (dict(every=0), "every"),
        (dict(smoothing=1.0), "smoothing"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(hc.CompressionError, match=message):
        callback(**options)


def test_refused_when_training_begins(tmp_path):
    t = trainer(tmp_path, [callback(), type("Another", (hc.PruningCallback,), {})(heads=0.5)])
    with pytest.raises(hc.CompressionError, match="Two PruningCallbacks"):
        t.train()
    t = trainer(tmp_path, [callback()])
    for parameter in t.model.bert.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(hc.CompressionError, match="is frozen"):
        t.train()
    t = trainer(tmp_path, [callback()], model=build("convnext")[0])
    with pytest.raises(hc.CompressionError, match="has no heads"):
        t.train()


def test_a_second_training_says_that_it_prunes_again(tmp_path, caplog):
    t = trainer(tmp_path, [callback()])
    t.train()
    assert "has cut a model already" not in caplog.text
    with caplog.at_level("WARNING"):
        t.train()
    assert "has cut a model already" in caplog.text
    assert sum(a.num_heads for a in hc.discover(t.model).attentions) == 3  # half of what half of twelve left
