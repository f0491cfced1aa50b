"""PruningCallback with a target: at each stage what `prune_to` does, in the gates of a model that trains on."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress import timing
from hf_compress.masking import masks_in
from hf_compress.modules import is_gated
from hf_compress.pruning import latency
from tests.test_prune_to import SIZES, bert, first, several, texts
from tests.trainers import Killer, fingerprint, trainer

WHOLE = {"start": 0.25, "end": 0.75, "every": 3}  # of 12 steps: stages at 6 and 9


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_without_learning_it_is_prune_to(family, tmp_path):
    """Learning rate 0, one shot: the trained model is what `prune_to` makes of the same batches."""
    model, batches = several(family) if family != "bert" else (bert(), texts())
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    model.eval()
    once = copy.deepcopy(model)
    pruned = hc.prune_to(once, batches, parameters=1.3, tries=10)
    prune = hc.PruningCallback(parameters=1.3, tries=10, method="obs", schedule="one_shot", batches=batches)
    if family in ("bert", "vit"):
        t = trainer(tmp_path, [prune], family, model=model, learning_rate=0.0, weight_decay=0.0, max_steps=3)
    else:
        data = [{"input_ids": row, "labels": row} for row in batches[0]["input_ids"]] * 4
        t = trainer(tmp_path, [prune], family, model=model, learning_rate=0.0, weight_decay=0.0, max_steps=3)
        t.train_dataset = data
    t.train()
    assert [type(e) for e in prune.plan] == [type(e) for e in pruned.plan]
    assert [vars(e) | {"given": True} for e in prune.plan] == [vars(e) for e in pruned.plan]
    assert prune.stages[-1]["sizes"] == pruned.sizes and prune.stages[-1]["achieved"] == pruned.achieved
    one, other = (first(m.eval()(**batches[0])) for m in (once, t.model))
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    assert count(t.model) == count(once)


def test_stages_go_by_the_same_factor_and_masks_only_grow(tmp_path):
    dense = count(bert())
    seen = {}

    class Watch(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            gates = {n: m.hfc_gate.clone() for n, m in model.named_modules() if is_gated(m)}
            small = copy.deepcopy(model)
            plan = masks_in(small)
            for module in small.modules():
                if is_gated(module):
                    hc.modules.ungate_(module)
            vars(small.config).pop("quantization_config", None)
            seen[state.global_step] = gates, count(hc.apply_(small, plan)) if plan.edits else count(small)

    prune = hc.PruningCallback(parameters=1.69, **WHOLE)
    t = trainer(tmp_path, [prune, Watch()], model=bert())
    assert repr(prune) == "PruningCallback(parameters=1.69, schedule='gradual')"
    t.train()
    sizes = {step: size for step, (_, size) in seen.items()}
    assert {sizes[step] for step in range(1, 6)} == {dense}
    # half of the way: the root of the factor; each is met, and by the next smaller size of one block at most
    for step, ratio in ((6, 1.69**0.5), (9, 1.69)):
        assert dense / ratio * 0.9 <= sizes[step] <= dense / ratio
    assert sizes[12] == sizes[9] == count(t.model)
    assert [round(stage["asked"], 6) for stage in prune.stages] == [1.3, 1.69]
    assert all(stage["achieved"] == dense / size for stage, size in zip(prune.stages, (sizes[6], sizes[9]), strict=True))
    for step in range(2, 13):
        assert all((seen[step - 1][0][n] >= gate).all() for n, gate in seen[step][0].items())
    logged = [entry["parameters"] for entry in t.state.log_history if "parameters" in entry]
    assert logged == [round(stage["achieved"], 4) for stage in prune.stages]


def test_a_stage_makes_up_for_what_it_removes(tmp_path):
    """Right after the last stage, the masked model is nearer to the one before than the same mask on its old weights."""
    batches = texts()
    before, after = {}, {}

    class Look(T.TrainerCallback):
        def __init__(self, into):
            self.into = into

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.into[state.global_step] = copy.deepcopy(model).eval()

    prune = hc.PruningCallback(parameters=1.5, schedule="one_shot", start=0.5, batches=batches)
    trainer(tmp_path, [Look(before), prune, Look(after)], model=bert()).train()
    old, new = before[6], after[6]
    with torch.no_grad():
        meant = torch.cat([old(**batch).logits for batch in batches])
        made_up = torch.cat([new(**batch).logits for batch in batches])
        with hc.mask_(old, masks_in(new)):
            masked = torch.cat([old(**batch).logits for batch in batches])
    assert (made_up - meant).square().mean() < 0.5 * (masked - meant).square().mean()


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(tmp_path):
    def run(folder, *more, **options):
        prune = hc.PruningCallback(parameters=1.69, **WHOLE)
        options = {"save_strategy": "steps", "save_steps": 4, **options}
        return prune, trainer(tmp_path / folder, [prune, *more], model=bert(), **options)

    whole, t = run("whole")
    t.train()

    def stop():
        raise KeyboardInterrupt

    _, broken = run("again", Killer(10, stop))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert not any(is_gated(m) for m in broken.model.modules())
    again, resumed = run("again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-8"))
    assert again.plan == whole.plan and again.stages == whole.stages
    assert fingerprint(resumed.model) == fingerprint(t.model)
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    other, _ = run("other")
    with pytest.raises(hc.CompressionError, match="pruned with parameters=1.69, this callback has 1.5"):
        other.options["parameters"] = 1.5
        trainer(tmp_path / "again", [other], model=loaded).train(str(tmp_path / "again" / "checkpoint-8"))


def test_a_speedup_is_timed_on_cut_copies(monkeypatch, tmp_path):
    """With a clock that counts what is computed, what each stage achieves is known."""

    monkeypatch.setattr(latency, "FOLDER", tmp_path / "tables")
    widths = []

    def take_turns(runs, rounds, warm):
        times = []
        for run in runs:
            work = [0.0]
            hooks = torch.nn.modules.module.register_module_forward_hook(
                lambda m, a, o, w=work: w.__setitem__(0, w[0] + m.weight.numel()) if isinstance(m, torch.nn.Linear) else None
            )
            run()
            hooks.remove()
            times.append([work[0]] * rounds)
        widths.append([own[0] for own in times])
        return times

    monkeypatch.setattr(latency, "take_turns", take_turns)
    monkeypatch.setattr(timing, "take_turns", take_turns)
    prune = hc.PruningCallback(speedup=1.5, inputs=texts()[0], **WHOLE)
    t = trainer(tmp_path, [prune], model=bert())
    dense = sum(m.weight.numel() for m in t.model.modules() if isinstance(m, torch.nn.Linear))
    t.train()
    small = sum(m.weight.numel() for m in t.model.modules() if isinstance(m, torch.nn.Linear))
    assert prune.stages[-1]["achieved"] == dense / small == pytest.approx(1.5, rel=0.03)
    assert widths[-1] == [small, dense]


def test_what_means_nothing_is_refused(tmp_path):
    for options, message in (
        (dict(speedup=3.0, heads=0.5), "not both"),
        (dict(speedup=3.0, macs=2.0), "exactly one of"),
        (dict(speedup=1.0), "above 1, got 1.0"),
        (dict(speedup=3.0, method="score"), "method must be 'obs' with a target"),
        (dict(heads=0.5, method="obs"), "method must be 'score' without a target"),
        (dict(heads=0.5, schedule="gradual"), "takes a target"),
        (dict(heads=0.5, batches=texts()), "give them with a target"),
        (dict(speedup=2.0, batches=[]), "batches is empty"),
        (dict(speedup=2.0, rows=0), "rows is a number"),
        (dict(speedup=2.0, schedule="gradul"), "did you mean 'gradual'"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.PruningCallback(**options)
    t = trainer(tmp_path, [hc.PruningCallback(parameters=50.0)], model=bert())
    before = fingerprint(t.model)
    with pytest.raises(hc.CompressionError, match="more than cutting heads and neurons can give"):
        t.train()
    assert fingerprint(t.model) == before and not any(is_gated(m) for m in t.model.modules())
    t = trainer(tmp_path, [hc.PruningCallback(parameters=1.5)], model=bert())
    t.train_dataset = (row for row in range(3))
    with pytest.raises(hc.CompressionError, match=r"PruningCallback\(batches"):
        t.train()


SHARED = """
    import os, sys
    import hf_compress as hc
    from tests.test_prune_to import bert
    from tests.trainers import report, trainer

    prune = hc.PruningCallback(parameters=1.5, start=0.25, end=0.75, every=3, rows=64, tries=20 if float(sys.argv[2]) else 0)
    t = trainer(sys.argv[1], [prune], model=bert(), per_device_train_batch_size=4, learning_rate=float(sys.argv[2]))
    t.train()
    report(f"{sys.argv[1]}/{os.environ['RANK']}", prune, t.model)
"""


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_two_processes_end_alike(rate, tmp_path):
    """Without learning, as one process would: dropout is another in each.

    Tuned sizes are the same in both, but not to the bit those of one: sums in another order round the database otherwise.
    """
    script = tmp_path / "shared.py"
    script.write_text(textwrap.dedent(SHARED))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    run += ["--rdzv_endpoint=localhost:0", str(script), str(tmp_path), str(rate)]
    here = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent.parent)}
    done = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False, env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = ((tmp_path / rank / "result.json").read_text() for rank in "01")
    assert one == other
    if not rate:
        prune = hc.PruningCallback(parameters=1.5, rows=64, tries=0, **WHOLE)
        trainer(tmp_path / "alone", [prune], model=bert(), learning_rate=rate).train()
        assert json.loads(one)["plan"] == prune.plan.to_dict()


def test_layers_in_a_bigger_model_than_its_base(tmp_path):
    """The plan's names and the recorded gates are those of the model that trains, heads and all."""
    model = T.BertForSequenceClassification(T.BertConfig(**SIZES))
    prune = hc.PruningCallback(macs=1.3, **WHOLE)
    t = trainer(tmp_path, [prune], model=model)
    t.train()
    t.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(**texts()[0]).logits, t.model.eval()(**texts()[0]).logits)


def test_the_dense_model_teaches_by_default(tmp_path):
    from tests.trainers import rows

    args = hc.DistillationArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        logging_steps=1,
    )  # fmt: skip
    model = bert()
    batch, dense = texts()[0], fingerprint(model)
    meant = copy.deepcopy(model)(**batch).logits
    prune = hc.PruningCallback(parameters=1.3, start=0.25, end=0.5)
    t = hc.DistillationTrainer(model, args, train_dataset=rows(), callbacks=[prune])
    t.train()
    [teacher] = t.teachers
    assert torch.equal(teacher.model(**batch).logits, meant) and fingerprint(teacher.model) == dense != fingerprint(model)
    assert prune.stages[-1]["achieved"] >= 1.3
    lost = [entry["loss_kd"] for entry in t.state.log_history if "loss_kd" in entry]
    assert len(lost) == 4 and max(lost) > 0, t.state.log_history
    sparse = hc.DistillationTrainer(bert(), args, train_dataset=rows(), callbacks=[hc.SparsityCallback(0.5)])
    assert fingerprint(sparse.teachers[0].model) == dense
    with pytest.raises(hc.CompressionError, match="teacher_model=, a model"):
        hc.DistillationTrainer(bert(), args, train_dataset=rows())


@pytest.mark.parametrize("resumed", [False, True])
def test_the_learning_rate_begins_anew_at_every_stage(resumed, tmp_path):
    """Linear decay over 12 steps, from 1e-3; stages after 6 and 9: what is left is run over from the top each time."""

    def run(folder, *more):
        prune = hc.PruningCallback(parameters=1.69, restart_rate=True, tries=0, **WHOLE)
        return trainer(tmp_path / folder, [prune, *more], model=bert(), learning_rate=1e-3, lr_scheduler_type="linear",
                       warmup_steps=0, logging_steps=1, save_strategy="steps", save_steps=7)  # fmt: skip

    t = run("whole")
    if resumed:

        def stop():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run("killed", Killer(8, stop)).train()
        t = run("killed")
        t.train(resume_from_checkpoint=True)
    else:
        t.train()
    rates = [entry["learning_rate"] for entry in t.state.log_history if "learning_rate" in entry]
    # of the step that was taken: t - 1 steps before it
    first, second, third = (
        [1 - s / 12 for s in range(6)],
        [1 - s / 6 for s in range(3)],
        [1 - s / 3 for s in range(3)],
    )
    assert rates == pytest.approx([1e-3 * rate for rate in first + second + third])


def test_without_a_target_it_begins_anew_at_full_sparsity_and_only_where_it_can(tmp_path):
    prune = hc.PruningCallback(heads=0.5, restart_rate=True, start=0.1, end=0.5)
    t = trainer(
        tmp_path, [prune], model=bert(), learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0, logging_steps=1
    )
    t.train()
    rates = [entry["learning_rate"] for entry in t.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3 * (1 - s / 12) for s in range(6)] + [1e-3 * (1 - s / 6) for s in range(6)])
    assert t.lr_scheduler is not None
    prune = hc.PruningCallback(heads=0.5, restart_rate=True)
    t = trainer(tmp_path, [prune], model=bert(), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    before = fingerprint(t.model)
    with pytest.raises(hc.CompressionError, match="function of the step .*, got ReduceLROnPlateau"):
        t.train()
    assert fingerprint(t.model) == before and not any(is_gated(m) for m in t.model.modules())
    for wrong in (1, "yes"):
        with pytest.raises(hc.CompressionError, match="restart_rate must be True or False"):
            hc.PruningCallback(heads=0.5, restart_rate=wrong)
