"""Distillation: every loss, gradient and count against another computation."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress import distillation as D
from hf_compress.distillation import losses
from hf_compress.distillation.projection import PROJECTIONS_FILE
from tests.distilling import ALPHAS, BERT, CASES, LLAMA, WIDE, collate, gradient, model, pair, reference, rows, trainer
from tests.trainers import fingerprint
from tests.zoo import FAMILIES, NO_LAYERS, build, outputs

HALF = {"task": ALPHAS["alpha_task"], "kd": ALPHAS["alpha_kd"], "cos": 0.0}
ALL = {**HALF, "cos": ALPHAS["alpha_cos"]}


def total(terms, alphas):
    return sum(alphas[name] * term for name, term in terms.items())


# --- losses ------------------------------------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("elements", [12, losses.CPU_ELEMENTS])  # two rows at a time, and all at once
def test_losses_are_their_formulas(elements, monkeypatch):
    monkeypatch.setattr(losses, "CPU_ELEMENTS", elements)
    draw = np.random.default_rng(0)
    s, a, b = draw.normal(size=(3, 4, 5)) * 3
    S, A, B = (torch.tensor(x) for x in (s, a, b))
    w, t = (0.25, 0.75), 3.0
    p, q = w[0] * softmax(a / t) + w[1] * softmax(b / t), softmax(s / t)
    got = losses.kl_divergence(S, [A, B], w, t)
    np.testing.assert_allclose(got, t**2 * (p * np.log(p / q)).sum(-1), rtol=1e-10)
    p, q = w[0] / (1 + np.exp(-a / t)) + w[1] / (1 + np.exp(-b / t)), 1 / (1 + np.exp(-s / t))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(losses.binary_kl_divergence(S, [A, B], w, t), t**2 * kl.mean(-1), rtol=1e-10)
    np.testing.assert_allclose(losses.squared_error(S, [A, B], w), ((s - w[0] * a - w[1] * b) ** 2).mean(-1), rtol=1e-10)
    cos = (s * a).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(a, axis=-1)
    np.testing.assert_allclose(losses.cosine_distance(S, A), 1 - cos, rtol=1e-10)
    exists = torch.tensor([True, True, False, True, False]).expand(4, 5)
    kept = [0, 1, 3]
    p, q = softmax(a[:, kept] / t), softmax(s[:, kept] / t)
    np.testing.assert_allclose(losses.kl_divergence(S, [A], (1.0,), t, exists), t**2 * (p * np.log(p / q)).sum(-1), rtol=1e-10)
    wanted = ((s - a)[:, kept] ** 2).mean(-1)
    np.testing.assert_allclose(losses.squared_error(S, [A], exists=exists), wanted, rtol=1e-10)


def test_the_gradient_keeps_its_size_and_is_finite_where_a_teacher_is_sure():
    s, a = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, dtype=torch.float64)
    losses.kl_divergence(s, [a], temperature=4.0).sum().backward()
    expected = 4.0 * (torch.softmax(s / 4, -1) - torch.softmax(a / 4, -1))  # T² · (1/T) (q − p)
    torch.testing.assert_close(s.grad, expected.detach())
    there = torch.tensor([[True, True, True, False, True], [True, False, True, True, False]])
    for loss in (
        lambda x: losses.kl_divergence(x, [a, a.flip(0)], (0.2, 0.8), 3.0, there),
        lambda x: losses.binary_kl_divergence(x, [a, a.flip(0)], (0.2, 0.8), 3.0),
        lambda x: losses.squared_error(x, [a, a.flip(0)], (0.2, 0.8), there),
    ):
        assert torch.autograd.gradcheck(loss, (s,))  # finite differences
    s = torch.randn(2, 5, requires_grad=True)
    sure = torch.full((2, 5), -1e9).index_fill(1, torch.tensor([1]), 1e9)
    exists = torch.tensor([[True, True, False, False, False]] * 2)
    for loss in (
        losses.kl_divergence(s, [sure]),
        losses.kl_divergence(s, [sure], exists=exists),
        losses.binary_kl_divergence(s, [sure]),
    ):
        s.grad = None
        loss.sum().backward()
        assert loss.isfinite().all() and s.grad.isfinite().all()
    assert losses.kl_divergence(torch.zeros(1, 2, dtype=torch.bfloat16), [torch.zeros(1, 2)]).dtype == torch.float32


# --- one optimizer step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_formula_whatever_the_accumulation(case, tmp_path):
    for steps in (1, 2, 4):
        t = trainer(tmp_path, case, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, **ALPHAS)
        found = gradient(t)
        log = t.state.log_history[0]
        if steps == 1:
            student, teacher = pair(case)
            layers = {len(student_states(case, student)) - 1: len(student_states(case, teacher)) - 1}
            assert t.layer_map == layers
            projections = copy.deepcopy(trainer(tmp_path, case, **ALPHAS).projections)
            assert len(projections) == 1
            terms = reference(case, student, [teacher], rows(case), ALL, layers=layers, projections=projections)
            total(terms, ALL).backward()
            expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            expected |= {f"projections.{n}": p.grad for n, p in projections.named_parameters()}
            scale = max(g.abs().max() for g in expected.values())
        assert {n for n, g in found.items() if g.abs().max() > 0} <= expected.keys() and expected.keys() <= found.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=2e-3, atol=float(scale) * 2e-6)
        for name, value in terms.items():
            assert log[f"loss_{name}"] == pytest.approx(value.item(), rel=1e-4)
        assert log["loss"] == pytest.approx(total(terms, ALL).item(), rel=1e-4)


def student_states(case, m):
    batch = collate(rows(case)[:2])
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "pixel_values", "attention_mask")}
    if case == "t5":
        return m(**batch, decoder_input_ids=batch["input_ids"], output_hidden_states=True).decoder_hidden_states
    return m(**batch, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    ("case", "options"),
    [("one_label", {"kd_loss": "mse"}), ("spans", {"kd_loss": "mse"}), ("llama", {"temperature": 5.0}),
     ("one_label", {"teacher_weights": [1.0, 3.0]}), ("many_labels", {"teacher_weights": [1.0, 3.0]})],
)  # fmt: skip
def test_other_losses_and_several_teachers(case, options, tmp_path):
    student, teacher = pair(case)
    kind, config, _, big = CASES[case]
    teachers = [teacher, model(kind, config(**big), 3)] if "teacher_weights" in options else [teacher]
    found = gradient(trainer(tmp_path, case, copy.deepcopy(student), teachers, alpha_task=0.7, alpha_kd=1.3, **options))
    weights = (0.25, 0.75) if len(teachers) > 1 else (1.0,)
    mse, temperature = "kd_loss" in options, options.get("temperature", 2.0)
    total(reference(case, student, teachers, rows(case), HALF, temperature, weights, mse), HALF).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-6)


def test_a_micro_batch_without_labels_counts_for_nothing_in_the_task(tmp_path):
    data = rows("tokens")
    data[3]["labels"] = torch.full_like(data[3]["labels"], -100)
    whole = gradient(trainer(tmp_path, "tokens", data=data, **ALPHAS))
    single = gradient(
        trainer(tmp_path, "tokens", data=data, per_device_train_batch_size=1, gradient_accumulation_steps=8, **ALPHAS)
    )
    for name, grad in whole.items():
        torch.testing.assert_close(single[name], grad, rtol=2e-3, atol=1e-6)


def test_without_labels_the_task_is_left_out_and_nothing_is_rescaled(tmp_path):
    student, teacher = pair("llama")
    data = [{"input_ids": row["input_ids"]} for row in rows("llama")]
    t = trainer(tmp_path, "llama", copy.deepcopy(student), teacher, data, alpha_task=0.7, alpha_kd=1.3)
    found = gradient(t)
    everything = [{**row, "labels": row["input_ids"]} for row in data]  # every next token counts
    terms = reference("llama", student, [teacher], everything, HALF)
    (1.3 * terms["kd"]).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-6)
    assert t.state.log_history[0]["loss"] == pytest.approx(1.3 * terms["kd"].item(), rel=1e-4)
    assert "loss_task" not in t.state.log_history[0]
    with pytest.raises(hc.CompressionError, match="no labels"):
        trainer(tmp_path, "llama", student, teacher, data, alpha_task=0.7, alpha_kd=0.0).train()


@pytest.mark.parametrize("how", ["smoothing", "function"])
def test_losses_of_the_user_are_scaled_as_the_heads_are(how, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.view(-1, 3), labels.view(-1))

    found = []
    for steps in (1, 4):
        more = {"label_smoothing_factor": 0.2} if how == "smoothing" else {}
        t = trainer(
            tmp_path, "tokens", per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, **ALPHAS, **more
        )
        t.compute_loss_func = loss if how == "function" else None
        found.append(gradient(t))
    plain = gradient(trainer(tmp_path, "tokens", **ALPHAS))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=2e-3, atol=2e-6)
        if how == "function":
            torch.testing.assert_close(grad, plain[name], rtol=2e-3, atol=2e-6)


def test_bert_teaches_distilbert_with_the_columns_that_only_it_takes(tmp_path):
    config = T.DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=40,
                                dropout=0, attention_dropout=0, seq_classif_dropout=0, num_labels=3)  # fmt: skip
    student, teacher = model(T.DistilBertForSequenceClassification, config, 1), pair("one_label")[1].bfloat16()
    data = [{**row, "token_type_ids": torch.arange(len(row["input_ids"])) % 2} for row in rows("one_label")]
    t = trainer(tmp_path, "one_label", copy.deepcopy(student), teacher, data, alpha_task=0.0, alpha_kd=1.0)
    t.train()
    t.evaluate()
    with torch.no_grad():
        batch = collate(data)
        told = teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits
        assert told.dtype == torch.bfloat16
        untold = teacher(batch["input_ids"], batch["attention_mask"]).logits
        mine = student(batch["input_ids"], batch["attention_mask"]).logits
        right, wrong = (losses.kl_divergence(mine, [x], temperature=2.0).mean().item() for x in (told, untold))
    assert t.state.log_history[0]["loss_kd"] == pytest.approx(right, rel=1e-3)
    assert abs(right - wrong) > 1e-2 * right
    assert next(teacher.parameters()).dtype == torch.bfloat16


# --- teachers and students stay apart ----------------------------------------------------------------------------


def test_one_forward_each_no_hidden_states_unless_asked_no_teacher_in_evaluation(tmp_path):
    student, teacher = pair("one_label")
    teacher.train()
    calls = {"student": [], "teacher": []}
    for name, m in (("student", student), ("teacher", teacher)):
        m.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: calls[name].append((m.training, torch.is_grad_enabled(), kwargs)),
            with_kwargs=True,
        )
    t = trainer(tmp_path, "one_label", student, teacher)
    before = fingerprint(teacher)
    assert not teacher.training and not calls["student"]
    teacher.train()
    t.train()
    assert len(calls["student"]) == len(calls["teacher"]) == 1
    assert calls["teacher"][0][:2] == (False, False)
    assert "output_hidden_states" not in calls["student"][0][2] and "output_hidden_states" not in calls["teacher"][0][2]
    assert "labels" not in calls["teacher"][0][2]
    metrics = t.evaluate()
    assert len(calls["teacher"]) == 1
    with torch.no_grad():
        batch = collate(rows("one_label"))
        assert metrics["eval_loss"] == pytest.approx(student.eval()(**batch).loss.item(), rel=1e-5)
        assert torch.equal(torch.tensor(t.predict(rows("one_label")).predictions), student(**batch).logits)
    assert fingerprint(teacher) == before and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("alpha_cos", [0.0, 1.0])
def test_a_teacher_with_exits_teaches_from_its_last_layer(alpha_cos, tmp_path):
    student, teacher = pair("one_label")
    plain = copy.deepcopy(teacher)
    hc.apply_(teacher, hc.Plan([hc.AddExits([0, 1], threshold=0.0)]))  # every row leaves at once
    found = [
        gradient(trainer(tmp_path, "one_label", copy.deepcopy(student), t, alpha_task=0.0, alpha_kd=1.0, alpha_cos=alpha_cos))
        for t in (teacher, plain)
    ]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], g) for n, g in found[1].items())
    with torch.no_grad():
        batch = {k: v for k, v in collate(rows("one_label")).items() if k != "labels"}
        assert not torch.allclose(teacher(**batch).logits, plain(**batch).logits)  # by itself it exits as before
    assert (hc.exit_layers(teacher) == 0).all()


def test_every_training_of_a_model_init_begins_with_its_own_projections(tmp_path):
    teacher, students = pair("one_label")[1], []

    def student():
        students.append(pair("one_label")[0])
        return students[-1]

    args = D.DistillationArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, alpha_cos=1.0, report_to=[], use_cpu=True,
                                   disable_tqdm=True, save_strategy="no")  # fmt: skip
    t = D.DistillationTrainer(
        None, args, teacher_model=teacher, model_init=student, train_dataset=rows("one_label"), data_collator=collate
    )
    start, found = fingerprint(t.projections), []
    for _ in range(2):
        t.train()
        found.append((fingerprint(t.model), fingerprint(t.projections)))
        assert t.model is students[-1] and t.teachers[0].student is t.model and t.teachers[0].model is teacher
    assert found[0] == found[1] and found[0][1] != start and len(students) == 3


def test_a_student_whose_inputs_cannot_be_made_is_asked_with_rows_of_the_data(tmp_path):
    """Multiple choice reads (rows, choices, tokens); the mean of the hidden states' distance is over all real tokens."""
    config = T.BertConfig(**BERT)
    student, teacher = (model(T.BertForMultipleChoice, config, seed) for seed in (1, 2))
    draw = torch.Generator().manual_seed(0)
    data = []
    for length in (6, 4, 5, 3):
        ids = torch.zeros(3, 6, dtype=torch.long)
        ids[:, :length] = torch.randint(5, 99, (3, length), generator=draw)
        data.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(length % 3)})
    t = trainer(tmp_path, None, copy.deepcopy(student), teacher, data, per_device_train_batch_size=2,
                gradient_accumulation_steps=2, **ALPHAS)  # fmt: skip
    assert t.layer_map == {2: 2}
    found = gradient(t)
    ids, labels = torch.stack([row["input_ids"] for row in data]), torch.stack([row["labels"] for row in data])
    mask = (ids != 0).long()
    s, told = (m(ids, mask, output_hidden_states=True) for m in (student, teacher))
    task = torch.nn.functional.cross_entropy(s.logits, labels)
    kd = 4 * torch.nn.functional.kl_div(
        (s.logits / 2).log_softmax(-1), (told.logits / 2).detach().softmax(-1), reduction="batchmean"
    )
    h, g = s.hidden_states[-1], told.hidden_states[-1].detach()
    cos = (1 - (h * g).sum(-1) / h.norm(dim=-1) / g.norm(dim=-1))[mask.view(12, 6) == 1].mean()
    (ALPHAS["alpha_task"] * task + ALPHAS["alpha_kd"] * kd + ALPHAS["alpha_cos"] * cos).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-6)
    assert t.state.log_history[0]["loss_cos"] == pytest.approx(cos.item(), rel=1e-4)
    with pytest.raises(hc.CompressionError, match="gave none on a small batch"):  # and without data there is nothing to ask
        D.DistillationTrainer(copy.deepcopy(student), t.args, teacher_model=teacher)


def test_projections_are_trained_checkpointed_and_never_in_the_student(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
                   logging_steps=4, alpha_cos=1.0, layer_map={1: 2, 2: 3})  # fmt: skip
    t = trainer(tmp_path / "a", "one_label", **options)
    start = copy.deepcopy(t.projections.state_dict())
    t.train()
    assert t.layer_map == {1: 2, 2: 3} and list(t.projections) == ["1", "2"]
    assert all(not torch.equal(v, start[k]) for k, v in t.projections.state_dict().items())
    t.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / PROJECTIONS_FILE).exists() and (tmp_path / "a/checkpoint-2" / PROJECTIONS_FILE).exists()
    stock = pair("one_label")[0].state_dict().keys()
    assert t.model.state_dict().keys() == stock
    for folder in ("out", "a/checkpoint-2"):
        loaded, info = T.BertForSequenceClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()) and loaded.state_dict().keys() == stock
    resumed = trainer(tmp_path / "b", "one_label", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert fingerprint(resumed.model) == fingerprint(t.model)
    assert fingerprint(resumed.projections) == fingerprint(t.projections)
    (tmp_path / "a/checkpoint-2" / PROJECTIONS_FILE).unlink()
    with pytest.raises(hc.CompressionError, match="cannot be read"):
        trainer(tmp_path / "c", "one_label", **options).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    (tmp_path / "a/checkpoint-2/optimizer.pt").unlink()  # as save_only_model leaves it: projections start anew
    t = trainer(tmp_path / "d", "one_label", **options)
    t.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert t.state.global_step == 4


@pytest.mark.parametrize("mixed", [{}, {"bf16": True}])
def test_best_model_evaluation_and_a_second_training_with_projections(mixed, tmp_path):
    t = trainer(
        tmp_path, "one_label", max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, alpha_cos=1.0,
        learning_rate=0.5, load_best_model_at_end=True, metric_for_best_model="loss", **mixed,
    )  # fmt: skip
    t.evaluate()
    t.train()
    stored = T.BertForSequenceClassification.from_pretrained(t.state.best_model_checkpoint)
    assert fingerprint(stored) == fingerprint(t.model)
    before = fingerprint(t.model)
    t.train()
    assert fingerprint(t.model) != before and t.model.state_dict().keys() == stored.state_dict().keys()


def test_logged_terms_are_means_since_the_last_log(tmp_path):
    t = trainer(
        tmp_path, "tokens", max_steps=4, logging_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, **ALPHAS
    )
    t.train()
    logs = [log for log in t.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(total({n: log[f"loss_{n}"] for n in ALL}, ALL), rel=1e-5)
    assert "loss_kd" not in t.state.log_history[-1]


@pytest.mark.parametrize("copied", [True, False])
def test_pruning_while_distilling(copied, tmp_path):
    """A copy of the teacher that has been pruned before, and a narrow student whose hidden states are projected."""
    student, teacher = pair("one_label")
    before, inputs = fingerprint(teacher), collate([{"input_ids": row["input_ids"]} for row in rows("one_label")])
    if copied:
        student = copy.deepcopy(teacher)
        hc.apply_(student, hc.plan_pruning(student, heads=0.25, score="magnitude"))
    neurons = sum(f.size for f in hc.discover(student).ffns)
    callback = hc.PruningCallback(heads=0.5, neurons=0.5, every=1)
    t = trainer(tmp_path, "one_label", student, teacher, callbacks=[callback], max_steps=6, alpha_cos=1.0, learning_rate=1e-3)
    assert len(t.projections) == (0 if copied else 1)
    t.train()
    assert sum(f.size for f in hc.discover(t.model).ffns) == neurons // 2 and fingerprint(teacher) == before
    t.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(loaded, inputs), outputs(t.model.eval(), inputs))
    narrow = fingerprint(t.model)
    t.train()  # on, without masks that are there already
    assert t.model.state_dict().keys() == loaded.state_dict().keys() and fingerprint(t.model) != narrow


def test_mixed_with_seq2seq_trainer(tmp_path):
    class Distil(D.DistillationMixin, T.Seq2SeqTrainer):
        pass

    student, teacher = pair("t5")
    t = trainer(
        tmp_path, "t5", copy.deepcopy(student), teacher, kind=Distil, arguments=D.Seq2SeqDistillationArguments, alpha_task=0.7,
        alpha_kd=1.3, predict_with_generate=True, generation_max_length=6, gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    found = gradient(t)
    total(reference("t5", student, [teacher], rows("t5"), HALF), HALF).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-5)
    predicted = t.predict(rows("t5")).predictions
    batch = collate(rows("t5"))
    with torch.no_grad():
        assert (
            predicted[:, :6]
            == t.model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6).numpy()
        ).all()


# --- arguments and refusals --------------------------------------------------------------------------------------


def test_arguments_come_from_a_command_line_and_go_to_json(tmp_path):
    parse = T.HfArgumentParser(D.DistillationArguments)
    line = [
        "--output_dir",
        str(tmp_path),
        "--alpha_kd",
        "5",
        "--layer_map",
        '{"1": 2, "-1": -1}',
        "--teacher_weights",
        "1",
        "2",
    ]
    (args,) = parse.parse_args_into_dataclasses([*line, "--report_to", "none"])
    assert (args.alpha_kd, args.layer_map, args.teacher_weights) == (5.0, {1: 2, -1: -1}, [1.0, 2.0])
    stored = json.loads(args.to_json_string())
    assert stored["layer_map"] == {"1": 2, "-1": -1} and stored["alpha_task"] == args.to_dict()["alpha_task"] == 0.5
    assert D.DistillationArguments(str(tmp_path), layer_map=stored["layer_map"]).layer_map == args.layer_map


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_kd": -1}, "alpha_kd"), ({"alpha_task": float("nan")}, "alpha_task"), ({"temperature": 0}, "temperature"),
        ({"alpha_kd": 0, "alpha_task": 0}, "nothing is left"), ({"kd_loss": "l1"}, "Known: kl, mse"),
        ({"layer_map": {"a": 1}}, "layer_map"), ({"layer_map": "[1]"}, "layer_map"), ({"layer_map": {1: 1.5}}, "layer_map"),
        ({"teacher_weights": [1, 0]}, "teacher_weights"), ({"distillation_task": "poems"}, "Known: rows"),
    ],
)  # fmt: skip
def test_arguments_without_meaning_are_refused(options, message, tmp_path):
    with pytest.raises(hc.CompressionError, match=message):
        D.DistillationArguments(str(tmp_path), **options)


def bert(kind=T.BertForSequenceClassification, **options):
    return model(kind, T.BertConfig(**{**WIDE, **options}), 5)


def ordered(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


REFUSED = {
    "none": (dict, lambda s: None, {}, "needs teacher_model"),
    "path": (dict, lambda s: "bert-base", {}, "is a path"),
    "empty": (dict, lambda s: [], {}, "empty"),
    "no model": (dict, lambda s: torch.nn.Linear(2, 2), {}, "module with a config"),
    "itself": (dict, lambda s: s, {}, "the student itself"),
    "shared weights": (dict, lambda s: share(s), {}, "shares weights"),
    "vocabulary": (dict, lambda s: bert(vocab_size=100), {}, "vocabulary of 100 tokens and the student one of 99"),
    "labels": (dict, lambda s: bert(num_labels=3), {}, "3 labels and the student 2"),
    "order": (lambda: ordered("no", "yes"), lambda s: bert(**ordered("yes", "no")), {}, "another order"),
    "names": (lambda: ordered("no", "yes"), lambda s: bert(**ordered("bad", "good")), {}, "other labels"),
    "problem": (lambda: {"problem_type": "single_label_classification"},
                lambda s: bert(problem_type="multi_label_classification"), {}, "problem_type"),
    "modality": (dict, lambda s: pair("image")[1], {}, "reads 'pixel_values'"),
    "task": (dict, lambda s: bert(T.BertForTokenClassification), {}, "same AutoModelFor"),
    "weights": (dict, lambda s: bert(), {"teacher_weights": [1.0, 2.0]}, "2 numbers for 1 teachers"),
    "layers": (dict, lambda s: bert(), {"alpha_cos": 1.0, "layer_map": {3: 1}}, "hidden state 3 of the student, which has 3"),
    "teacher layers": (dict, lambda s: bert(), {"alpha_cos": 1.0, "layer_map": {1: -5}}, "hidden state -5 of the teacher, which has 4"),
    "twice": (dict, lambda s: bert(), {"alpha_cos": 1.0, "layer_map": {2: 1, -1: 2}}, "twice"),
}  # fmt: skip


def share(student):
    other = bert()
    other.bert.embeddings = student.bert.embeddings
    return other


@pytest.mark.parametrize("name", REFUSED)
def test_teachers_that_do_not_fit_are_refused(name, tmp_path):
    student, teacher, options, message = REFUSED[name]
    student = bert(**{**BERT, **student()})
    before = fingerprint(student)
    with pytest.raises(hc.CompressionError, match=message):
        D.DistillationTrainer(student, D.DistillationArguments(str(tmp_path), report_to=[], use_cpu=True, **options),
                              teacher_model=teacher(student), train_dataset=rows("one_label"))  # fmt: skip
    assert fingerprint(student) == before


def test_arguments_and_optimizers_that_do_not_fit_are_refused(tmp_path):
    student, teacher = pair("one_label")
    with pytest.raises(hc.CompressionError, match="must be DistillationArguments"):
        D.DistillationTrainer(student, T.TrainingArguments(str(tmp_path), report_to=[]), teacher_model=teacher)
    args = D.DistillationArguments(str(tmp_path), report_to=[], use_cpu=True, alpha_cos=1.0)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with pytest.raises(hc.CompressionError, match="optimizer that was given"):
        D.DistillationTrainer(student, args, teacher_model=teacher, optimizers=(optimizer, None))
    base = T.BertModel(T.BertConfig(**BERT))
    with pytest.raises(hc.CompressionError, match="distillation_task="):
        D.DistillationTrainer(base, args, teacher_model=T.BertModel(T.BertConfig(**BERT)))
    skipping = T.OPTForCausalLM(T.OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                                            word_embed_proj_dim=32, max_position_embeddings=40, layerdrop=0.1))  # fmt: skip
    with pytest.raises(hc.CompressionError, match="config.layerdrop = 0"):
        D.DistillationTrainer(skipping, args, teacher_model=pair("llama")[1])
    integers = pair("one_label")[0]
    hc.apply_(integers, hc.plan_quantization(integers, bits=8))
    with pytest.raises(hc.CompressionError, match="integers do not train"):
        D.DistillationTrainer(integers, args, teacher_model=teacher)
    assert D.DistillationTrainer(student, D.DistillationArguments(str(tmp_path), report_to=[]), teacher_model=integers)
    a_name_that_says_nothing = type("Mine", (T.BertForSequenceClassification,), {})
    args = D.DistillationArguments(str(tmp_path), report_to=[], use_cpu=True, distillation_task="rows")
    t = D.DistillationTrainer(a_name_that_says_nothing(student.config), args, teacher_model=teacher)
    assert t.distillation_task == "rows"


# --- init_student ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*NO_LAYERS, "clip", "llama_multi_query", "dinov2_swiglu")])
def test_students_are_the_teacher_without_some_layers(family, tmp_path):
    teacher, batch = build(family)
    teacher.requires_grad_(False)
    before, dense = fingerprint(teacher), outputs(teacher, batch)
    layers = 1 if family in ("swin", "convnext") else 2
    student = D.init_student(teacher, layers).eval()
    assert fingerprint(teacher) == before and torch.equal(outputs(teacher, batch), dense)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    plan = hc.Plan([hc.KeepLayers([i * len(s) // layers for i in range(layers)], name)
                    for name, s in hc.discover(teacher).stacks.items() if len(s) > layers])  # fmt: skip
    with hc.mask_(teacher, plan):
        torch.testing.assert_close(outputs(student, batch), outputs(teacher, batch))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config or family in ("swin", "modernbert", "mpnet")
    assert torch.equal(outputs(type(teacher).from_pretrained(tmp_path), batch), outputs(student, batch))


def test_which_layers_and_a_pruned_teacher():
    teacher = model(T.LlamaForCausalLM, T.LlamaConfig(**{**LLAMA, "num_hidden_layers": 6}), 1)
    for wanted, kept in (
        (3, (0, 2, 4)),
        (4, (0, 1, 3, 4)),
        (1, (0,)),
        (6, tuple(range(6))),
        ([1, 5], (1, 5)),
        ({"model.layers": 2}, (0, 3)),
    ):
        student = D.init_student(teacher, wanted)
        assert student.config.num_hidden_layers == len(kept)
        for mine, index in zip(student.model.layers, kept, strict=True):
            assert torch.equal(mine.mlp.up_proj.weight, teacher.model.layers[index].mlp.up_proj.weight)
    hc.apply_(
        teacher, hc.Plan([hc.KeepNeurons("model.layers.2.mlp", range(20)), hc.KeepHeads("model.layers.0.self_attn", [0])])
    )
    student = D.init_student(teacher, [0, 2])
    ids = torch.arange(5, 25).view(2, 10)
    with hc.mask_(teacher, hc.Plan([hc.KeepLayers([0, 2])])):
        torch.testing.assert_close(outputs(student, {"input_ids": ids}), outputs(teacher, {"input_ids": ids}))
    t5 = D.init_student(build("t5")[0], {"encoder": 2, "decoder": [0, 2]})
    assert (t5.config.num_layers, t5.config.num_decoder_layers) == (2, 2)
    bias = build("t5")[0].encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, bias)


def test_a_student_without_the_first_layer_shares_nothing():
    teacher, batch = build("t5")
    student = D.init_student(teacher, {"encoder": [1, 2], "decoder": [1, 2]})
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    plan = hc.Plan([hc.KeepLayers([1, 2], "encoder"), hc.KeepLayers([1, 2], "decoder")])
    with hc.mask_(teacher, plan):
        torch.testing.assert_close(outputs(student.eval(), batch), outputs(teacher, batch))


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("bert", 4, "has 3 layers"), ("bert", 0, "has 3 layers"), ("bert", [0, 0], "more than once"), ("bert", [0, 3], r"0-2\), got 3"),
        ("bert", [], "at least one|none"), ("bert", "two", "number of layers or a list"), ("bert", True, "number of layers or a list"),
        ("t5", [0, 1], "several stacks"), ("t5", {"enc": 1}, "No stack is named"), ("albert", 2, "stack of layers|layers"),
    ],
)  # fmt: skip
def test_students_that_cannot_be_are_refused(family, layers, message):
    teacher = build(family)[0]
    before = fingerprint(teacher)
    with pytest.raises(hc.CompressionError, match=message):
        D.init_student(teacher, layers)
    assert fingerprint(teacher) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_teacher_gives_no_student(bits):
    teacher = build("bert")[0]
    hc.apply_(teacher, hc.plan_quantization(teacher, bits=bits, embeddings=False))
    with pytest.raises(hc.CompressionError, match="full precision"):
        D.init_student(teacher, 2)
