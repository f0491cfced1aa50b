"""SparsityCallback in plain Trainers: zeros held, the schedule's formula, nothing lost over a kill, small when it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from torch import nn

import hf_compress as hc
from hf_compress.pruning.sparsity_callback import MASKS_FILE
from hf_compress.sparse import is_sparse
from hf_compress.sparsity import matrix_of
from tests.trainers import Killer, rows, trainer
from tests.zoo import build, outputs

ROOT = Path(__file__).parent.parent
BATCH = {k: torch.stack([r[k] for r in rows(4)]) for k in ("input_ids", "attention_mask")}


def linears(model):
    """What is made sparse in BERT: the Linears inside its layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n}


class Watch(T.TrainerCallback):
    def __init__(self):
        self.zeros, self.weights = {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.zeros[state.global_step] = {n: (m.weight == 0) for n, m in linears(model).items()}


class Movement(T.TrainerCallback):
    """S = -sum of lr w dL/dw, added up here."""

    def __init__(self):
        self.scores = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        lr = optimizer.param_groups[0]["lr"]
        for name, module in linears(model).items():
            now = -lr * module.weight.detach() * module.weight.grad
            self.scores[name] = self.scores.get(name, 0) + now


@pytest.mark.parametrize(("score", "schedule", "scope"), [
    ("magnitude", "cubic", "layer"), ("magnitude", "linear", "global"), ("movement", "cubic", "row"), ("movement", "one_shot", "layer"),
])  # fmt: skip
def test_zeros_follow_the_schedule_and_hold_through_adamw(score, schedule, scope, tmp_path):
    prune = hc.SparsityCallback(0.6, score=score, schedule=schedule, start=0.25, end=0.75, every=1, scope=scope)
    watch = Watch()
    t = trainer(tmp_path, [prune, watch], weight_decay=0.1)
    before = sum(t_.nbytes for t_ in t.model.state_dict().values())
    t.train()
    share = {"one_shot": lambda p: 1.0, "linear": lambda p: p, "cubic": lambda p: 1 - (1 - p) ** 3}[schedule]
    for step in range(1, 13):
        zeros = watch.zeros[step]
        progress = 1.0 if schedule == "one_shot" else min(1.0, (step - 3) / 6)
        wanted = 0.0 if step < 3 else 0.6 * share(progress)
        total = sum(z.numel() for z in zeros.values())
        if scope == "global":
            assert sum(int(z.sum()) for z in zeros.values()) == round(wanted * total)
        for name, z in zeros.items():
            if scope == "layer":
                assert int(z.sum()) == round(wanted * z.numel()), (step, name)
            elif scope == "row":
                assert (z.sum(1) == round(wanted * z.shape[1])).all(), (step, name)
            if step > 1:
                assert not (watch.zeros[step - 1][name] & ~z).any()
    model = t.model
    assert all(is_sparse(m) and torch.equal(m.mask(), ~watch.zeros[12][n]) for n, m in linears(model).items())
    logged = [entry["weights_removed"] for entry in t.state.log_history if "weights_removed" in entry]
    assert logged == sorted(logged) and logged[-1] == pytest.approx(0.6, abs=0.01)
    t.save_model(str(tmp_path / "out"))
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(again, BATCH), outputs(model.eval(), BATCH))
    assert sum(t_.nbytes for t_ in again.state_dict().values()) < before
    assert prune.plan is not None and len(prune.plan) == len(linears(model))


def test_movement_removes_what_moved_least(tmp_path):
    movement, watch = Movement(), Watch()
    prune = hc.SparsityCallback(0.5, score="movement", schedule="one_shot", start=0.5)
    t = trainer(tmp_path, [movement, prune, watch], max_steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    seen = {}

    class Keep(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                seen.update({n: s.clone() for n, s in movement.scores.items()})

    t.add_callback(Keep())
    t.train()
    for name, zeros in watch.zeros[3].items():
        scores = seen[name].flatten()
        assert int(zeros.sum()) == scores.numel() // 2
        assert scores[zeros.flatten()].max() <= scores[~zeros.flatten()].min(), name


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_n_of_m_is_reached_step_by_step(pattern, tmp_path):
    kept, of = map(int, pattern.split(":"))
    watch = Watch()
    t = trainer(tmp_path, [hc.SparsityCallback(pattern=pattern, schedule="linear", start=0.25, end=0.75, every=1), watch])
    t.train()
    for step in range(3, 13):
        for name, zeros in watch.zeros[step].items():
            groups = zeros.reshape(-1, of).sum(1)
            assert groups.max() <= of - kept
            assert int(zeros.sum()) == round(min(1.0, (step - 3) / 6) * kept / of * zeros.numel()), (step, name)
    for module in linears(t.model).values():
        assert (matrix_of(module, module.mask()).reshape(-1, of).sum(1) == kept).all() and module.hfc_pattern == pattern


@pytest.mark.parametrize("score", ["magnitude", "movement"])
def test_resumed_after_a_kill_it_ends_as_the_uninterrupted_run(score, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    run = (
        "import sys, hf_compress as hc; from tests.trainers import *; "
        f"trainer(sys.argv[1], [hc.SparsityCallback(0.5, score={score!r}, every=1), Killer(6)], **{options!r}).train()"
    )
    done = subprocess.run([sys.executable, "-c", run, str(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    middle = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "checkpoint-4")
    share = 1 - (1 - (4 - 1) / 5) ** 3  # the checkpoint holds the zeros of its step, in dense weights
    for name, module in linears(middle).items():
        assert int((module.weight == 0).sum()) == round(0.5 * share * module.weight.numel()), name
    resumed = trainer(tmp_path / "a", [hc.SparsityCallback(0.5, score=score, every=1)], **options)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "b", [hc.SparsityCallback(0.5, score=score, every=1)], **options)
    whole.train()
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.model.state_dict().items())
    other = trainer(tmp_path / "a", [hc.SparsityCallback(0.7, score=score, every=1)], **options)
    with pytest.raises(hc.CompressionError, match="sparsity=0.5, this callback has 0.7"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert (tmp_path / "a" / "checkpoint-4" / MASKS_FILE).is_file()


def test_an_interrupted_training_leaves_a_usable_model(tmp_path):
    def stop():
        raise KeyboardInterrupt

    t = trainer(tmp_path, [hc.SparsityCallback(0.5, schedule="one_shot"), Killer(6, stop)])
    with pytest.raises(KeyboardInterrupt):
        t.train()
    assert not any(is_sparse(m) for m in t.model.modules())
    assert all(int((m.weight == 0).sum()) == m.weight.numel() // 2 for m in linears(t.model).values())
    assert not any(p._backward_hooks for p in t.model.parameters())
    t.model.save_pretrained(tmp_path / "out")
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(again, BATCH), outputs(t.model.eval(), BATCH))
    assert "quantization_config" not in again.config.to_dict()


def test_the_best_model_is_one_of_full_sparsity(tmp_path):
    t = trainer(
        tmp_path, [hc.SparsityCallback(0.5, end=0.5)], eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    t.train()
    assert t.state.best_global_step >= 6
    assert all(int((m.weight == 0).sum()) == m.weight.numel() // 2 for m in linears(t.model).values())


def test_weights_that_are_sparse_train_on_and_get_sparser(tmp_path):
    model, _ = build("bert")
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.3))
    before = {n: m.mask() for n, m in linears(model).items()}
    trainer(tmp_path, [], model=model, weight_decay=0.1).train()  # no callback: the modules hold their zeros themselves
    assert all(not m.weight[~before[n]].any() for n, m in linears(model).items())
    trainer(tmp_path, [hc.SparsityCallback(0.6)], model=model).train()
    for name, module in linears(model).items():
        assert not (module.mask() & ~before[name]).any()
        assert int((~module.mask()).sum()) == round(0.6 * module.weight.numel())


def test_other_trainers_and_mixed_precision(tmp_path):
    t = trainer(tmp_path, [hc.SparsityCallback(0.5, score="movement")], bf16=True, gradient_accumulation_steps=2)
    t.train()
    assert all(int((m.weight == 0).sum()) == m.weight.numel() // 2 for m in linears(t.model).values())
    teacher, _ = build("bert")
    student, _ = build("bert")
    t = hc.DistillationTrainer(
        student,
        hc.DistillationArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True),
        teacher_model=teacher,
        train_dataset=rows(),
        callbacks=[hc.SparsityCallback(pattern="2:4", schedule="one_shot")],
    )
    t.train()
    assert all(is_sparse(m) for m in linears(t.model).values())
    assert not any(is_sparse(m) for m in teacher.modules())


def test_refusals(tmp_path):
    for options, message in (
        ({"sparsity": 1.0}, r"in \[0, 1\)"),
        ({"score": "movment"}, "Unknown score"),
        ({"schedule": "cube"}, "Unknown schedule"),
        ({"start": 0.9, "end": 0.1}, "0 <= start <= end"),
        ({"every": 0}, "every is a number"),
        ({"modules": "("}, "regular expression"),
        ({"inputs": [1]}, "inputs must be a batch"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.SparsityCallback(**options)
    sparse = hc.SparsityCallback(0.5)
    for other in (hc.PruningCallback(heads=0.5), hc.QuantizationCallback(8), hc.SparsityCallback(0.5)):
        with pytest.raises(hc.CompressionError, match="cannot share a training"):
            trainer(tmp_path, [sparse, other]).train()
    with pytest.raises(hc.CompressionError, match="cannot share a training"):
        trainer(tmp_path, [hc.QuantizationCallback(8), sparse]).train()
    frozen, _ = build("bert")
    frozen.bert.requires_grad_(False)
    with pytest.raises(hc.CompressionError, match="which is frozen"):
        trainer(tmp_path, [hc.SparsityCallback(score="movement")], model=frozen).train()
    with pytest.raises(hc.CompressionError, match="leaves nothing of"):
        trainer(tmp_path, [hc.SparsityCallback(0.999, scope="row")]).train()
