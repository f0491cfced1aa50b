"""Lottery tickets: exact counts, rewinding to the bit, zeros through AdamW, controls, resume, in Trainers of several kinds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors import safe_open

import hf_compress as hc
from hf_compress.pruning.ticket import fresh_weights, prunable, state_of
from tests.trainers import Killer, pictures, rows
from tests.zoo import IMAGE, TEXT, build, outputs

ROOT = Path(__file__).parent.parent
STEPS = 4


class Watch(T.TrainerCallback):
    """What a user's own callback sees: weights at the first step and after each, learning rates, moments, batches."""

    def __init__(self):
        self.first, self.after, self.rates, self.moments, self.batches = None, {}, [], [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if self.first is None:
            self.first = state_of(model)
            inner = getattr(optimizer, "optimizer", optimizer)
            self.moments = [s for s in inner.state.values() if s]
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = state_of(model)


def maker(folder, watches, family="bert", kind=T.Trainer, callbacks=lambda: [], **options):
    """A `make_trainer` that is honest about its model: another initialisation every time it is called."""

    def make():
        model = build(family)[0]
        if watches:  # the start must come from the first model, whatever later ones are
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.1 * len(watches))
        watches.append(Watch())
        arguments = T.TrainingArguments(
            str(folder), report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1,
            **{"save_strategy": "no", "max_steps": STEPS, "per_device_train_batch_size": 8, "logging_steps": 1, **options},
        )  # fmt: skip
        data = pictures() if family == "vit" else rows()
        trainer = kind(model, arguments, train_dataset=data, eval_dataset=data[:16], callbacks=[watches[-1], *callbacks()])
        seen, step = watches[-1].batches, trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            seen.append(next(iter(inputs.values())).double().sum().item())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        return trainer

    return make


def gone(ticket, weights):
    return torch.cat([weights[name][~mask] for name, mask in ticket.masks.items()])


@pytest.mark.parametrize("family", ["bert", "vit", "resnet"])
def test_counts_zeros_and_rewinding_are_exact(family, tmp_path):
    if family == "resnet":
        config = T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
        torch.manual_seed(0)
        watches = []
        plain = maker(tmp_path, watches, "vit")

        def make():
            trainer = plain()
            trainer.model = trainer.model_wrapped = T.ResNetForImageClassification(config)
            return trainer
    else:
        watches = []
        make = maker(tmp_path, watches, family)
    found = hc.find_ticket(make, 0.9, rounds=2)
    start, ticket = watches[0].first, found.ticket
    total = sum(start[name].numel() for name in ticket.masks)
    # after round r, (1 - 0.9)^(r / 2) of the weights are left
    assert [r["weights_removed"] for r in found.rows] == [
        0.0,
        round((1 - 0.1**0.5) * total) / total,
        round(0.9 * total) / total,
    ]
    for turn in (1, 2):
        held, seen = hc.Ticket.load(tmp_path / f"round-{turn}"), watches[turn]
        before = watches[turn - 1].after[STEPS]  # the weights that chose the mask: the largest stay, of those that were left
        alive = torch.cat([before[n][m].abs() for n, m in held.masks.items()])
        assert alive.min() >= gone(held, before).abs().max()
        for name, weight in seen.first.items():
            expected = start[name] * held.masks[name] if name in held.masks else start[name]
            assert torch.equal(weight, expected), name
        for step in range(1, STEPS + 1):
            assert not gone(held, seen.after[step]).any()
        trained = torch.cat([seen.after[STEPS][n][m] for n, m in held.masks.items()])
        assert (trained != 0).float().mean() > 0.99
    first, second = (hc.Ticket.load(tmp_path / f"round-{turn}").masks for turn in (1, 2))
    assert all(not bool((second[n] & ~first[n]).any()) for n in first)  # what is gone stays gone
    assert ticket.digest == hc.Ticket.load(tmp_path).digest and torch.equal(
        gone(ticket, state_of(found.model)), torch.zeros(sum(int((~m).sum()) for m in ticket.masks.values()))
    )


def test_every_round_is_the_same_training_begun_anew(tmp_path):
    """Learning rates, batches and moments of all rounds; with everything kept, a round is the dense training to the bit."""
    watches = []
    found = hc.find_ticket(
        maker(tmp_path, watches, warmup_steps=2, max_steps=10, num_train_epochs=2), 0.5, rounds=2, controls=["reinit"]
    )
    dense = watches[0]
    assert len(dense.rates) == 10 and dense.rates[0] == 0.0 and max(dense.rates) == 1e-2
    for seen in watches[1:]:
        assert seen.rates == dense.rates and seen.batches == dense.batches and seen.moments == []
    names = list(found.ticket.masks)
    everything = hc.Ticket({n: torch.ones_like(m) for n, m in found.ticket.masks.items()}, found.ticket.weights)
    again = []
    trainer = maker(tmp_path, again, warmup_steps=2, max_steps=10, num_train_epochs=2)()
    trainer.add_callback(hc.LotteryTicketCallback(everything))
    T.set_seed(trainer.args.seed)
    trainer.train()
    assert all(torch.equal(again[0].after[10][n], w) for n, w in dense.after[10].items()) and names


def test_rewinding_to_a_step_goes_on_from_there(tmp_path):
    watches = []
    found = hc.find_ticket(
        maker(tmp_path, watches, warmup_steps=2, max_steps=12, save_strategy="steps", save_steps=2, save_total_limit=1),
        0.5, rounds=1, rewind_to=0.25, controls=["random_mask", "reinit"],
    )  # fmt: skip
    dense, ticket, random, fresh = watches
    assert found.ticket.step == 3 and [row["steps"] for row in found.rows] == [12, 9, 9, 12]
    for name, weight in dense.after[3].items():
        assert torch.equal(found.ticket.weights[name], weight)
        masked = weight * found.ticket.masks[name] if name in found.ticket.masks else weight
        assert torch.equal(ticket.first[name], masked)
    assert ticket.rates == random.rates == dense.rates[3:] and fresh.rates == dense.rates
    assert ticket.batches == dense.batches[3:] and ticket.moments == random.moments == []
    assert sorted(ticket.after) == list(range(4, 13))


def test_controls(tmp_path):
    watches = []
    found = hc.find_ticket(maker(tmp_path, watches), [0.8], controls=["reinit", "random_mask"], seed=7)
    assert [row["arm"] for row in found.rows] == ["dense", "ticket", "reinit", "random_mask"]
    dense, _, fresh, random = watches
    ticket = found.ticket
    # the same mask; other weights, also than those which set_seed(seed) would have given, from the same distribution
    T.set_seed(7)
    seeded = state_of(T.BertForSequenceClassification(build("bert")[0].config))
    for name, mask in ticket.masks.items():
        weight = fresh.first[name]
        assert torch.equal(weight != 0, mask)
        for other in (dense.first[name], seeded[name]):
            assert not torch.equal(weight[mask], other[mask])
        assert 0.015 < weight[mask].std() < 0.025  # BERT draws from N(0, 0.02)
        assert not fresh.after[STEPS][name][~mask].any()
    # as many weights in every tensor, elsewhere, from the same start
    differs = 0
    for name, mask in ticket.masks.items():
        weight = random.first[name]
        assert int((weight != 0).sum()) == int(mask.sum())
        assert torch.equal(weight, dense.first[name] * (weight != 0))
        differs += int(((weight != 0) != mask).sum())
    assert differs > 1000
    again = []
    hc.find_ticket(maker(tmp_path / "again", again), [0.8], controls=["reinit", "random_mask"], seed=7)
    assert all(
        torch.equal(a, b)
        for x, y in zip(watches, again, strict=True)
        for a, b in zip(x.first.values(), y.first.values(), strict=True)
    )


def test_metrics_and_sparsity_are_logged_where_the_trainer_logs(tmp_path):
    logged = []

    class Log(T.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((args.output_dir, dict(logs)))

    found = hc.find_ticket(maker(tmp_path, [], callbacks=lambda: [Log()]), 0.75, rounds=2)
    for turn, removed in ((1, 0.5), (2, 0.75)):
        mine = [logs for folder, logs in logged if f"round-{turn}" in folder]
        assert {"round": turn, "weights_removed": removed}.items() <= mine[0].items()
        losses = [logs["eval_loss"] for logs in mine if "eval_loss" in logs]
        assert losses == [found.rows[turn]["metrics"]["eval_loss"]]
    model = found.model.eval()
    batch = {k: torch.stack([r[k] for r in rows()[:16]]) for k in rows(1)[0]}
    with torch.no_grad():
        assert found.rows[2]["metrics"]["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("family", "rewind"), [("vit", 0), ("bert", 2)])
def test_interrupted_and_resumed_it_ends_as_if_nothing_had_happened(family, rewind, tmp_path):
    """Stopped in the dense training, in a round and in a control; each call goes on where the last one stood.

    A ViT, since stock restores 8 of its 40 weights.
    """
    options = dict(max_steps=6, save_strategy="steps", save_steps=1)
    asked = dict(sparsity=0.75, rounds=2, rewind_to=rewind, controls=["random_mask"])
    whole = hc.find_ticket(maker(tmp_path / "whole", [], family, **options), **asked)
    stops = iter([4, 3, 2])  # those resumed are past the next stop, so it comes in the next training

    def stop():
        raise KeyboardInterrupt

    def once():
        step = next(stops, None)
        return [] if step is None else [Killer(step, stop)]

    for _ in range(3):
        made, watches = [], []
        with pytest.raises(KeyboardInterrupt):
            hc.find_ticket(
                maker(
                    tmp_path / "cut",
                    watches,
                    family,
                    callbacks=lambda made=made: made or made.extend(once()) or made,
                    **options,
                ),
                **asked,
            )
    resumed = hc.find_ticket(maker(tmp_path / "cut", [], family, **options), **asked)
    assert [{**r, "metrics": None} for r in whole.rows] == [{**r, "metrics": None} for r in resumed.rows]
    assert [r["metrics"]["eval_loss"] for r in whole.rows] == [r["metrics"]["eval_loss"] for r in resumed.rows]
    assert whole.ticket.digest == resumed.ticket.digest
    for name, weight in state_of(whole.model).items():
        assert torch.equal(weight, state_of(resumed.model)[name]), name
    # and once more: nothing is trained, the trained model is there
    calls = []
    again = hc.find_ticket(maker(tmp_path / "cut", calls, family, **options), **asked)
    assert len(calls) == 1 and calls[0].first is None and again.rows == resumed.rows
    assert all(torch.equal(w, state_of(again.model)[n]) for n, w in state_of(whole.model).items())
    with pytest.raises(hc.CompressionError, match="rounds=2, and 3 is"):
        hc.find_ticket(maker(tmp_path / "cut", [], family, **options), **{**asked, "rounds": 3})


def test_an_interrupted_round_leaves_a_usable_model(tmp_path):
    found = hc.find_ticket(maker(tmp_path, [], "vit"), [0.9])

    def fail():
        raise RuntimeError("stop")

    trainer = maker(tmp_path / "more", [], "vit", callbacks=lambda: [Killer(3, fail)], save_strategy="steps", save_steps=2)()
    trainer.add_callback(hc.LotteryTicketCallback(found.ticket))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert not gone(found.ticket, state_of(trainer.model)).any()
    assert not vars(trainer).get("_hfc_guards") and "_run_epoch" not in vars(trainer)
    loaded = T.ViTForImageClassification.from_pretrained(tmp_path / "more" / "checkpoint-2")
    assert not gone(found.ticket, state_of(loaded)).any()
    trainer.remove_callback(Killer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "more" / "checkpoint-2"))  # ViT: stock restores 8 of 40 weights
    assert not gone(found.ticket, state_of(trainer.model)).any()
    whole = maker(tmp_path / "whole", [], "vit")()
    whole.add_callback(hc.LotteryTicketCallback(found.ticket))
    whole.train()
    assert all(torch.equal(w, state_of(whole.model)[n]) for n, w in state_of(trainer.model).items())
    with pytest.raises(hc.CompressionError, match="another mask"):
        other = maker(tmp_path / "other", [], "vit")()
        other.add_callback(hc.LotteryTicketCallback(found.ticket, control="random_mask"))
        other.train(resume_from_checkpoint=str(tmp_path / "more" / "checkpoint-2"))


def test_the_best_model_is_a_masked_one(tmp_path):
    """The dense training's best model must not come back when a round rewinds to a step after it."""

    def make():
        trainer = maker(
            tmp_path, [], max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        )()  # fmt: skip
        value = iter(range(100, 0, -1))  # the first evaluation is the best
        trainer.compute_metrics = lambda p: {"score": next(value)}
        return trainer

    found = hc.find_ticket(make, [0.8], rewind_to=3)
    assert found.trainer.state.best_global_step == 4
    assert not gone(found.ticket, state_of(found.model)).any()


def test_a_trainer_that_makes_its_model_itself(tmp_path):
    """`model_init`: the model of `train()` is not the one that the Trainer was made with."""
    watches = []

    def make():
        watches.append(Watch())
        arguments = T.TrainingArguments(
            str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=len(watches)
        )
        return T.Trainer(args=arguments, model_init=lambda: build("bert")[0], train_dataset=rows(), callbacks=[watches[-1]])

    found = hc.find_ticket(make, 0.5, rounds=1)
    for name, weight in watches[1].first.items():
        assert torch.equal(weight, watches[0].first[name] * found.ticket.masks.get(name, torch.tensor(True))), name
    assert not gone(found.ticket, state_of(found.model)).any()


def test_sequence_to_sequence_and_a_mask_on_other_ground(tmp_path):
    model, batch = build("t5")
    data = [{"input_ids": batch["input_ids"][i % 2], "labels": batch["decoder_input_ids"][i % 2]} for i in range(16)]

    def make():
        arguments = T.Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, save_strategy="no", report_to=[], use_cpu=True,
            predict_with_generate=True, disable_tqdm=True, gradient_accumulation_steps=2, bf16=True,
        )  # fmt: skip
        return T.Seq2SeqTrainer(build("t5")[0], arguments, train_dataset=data, eval_dataset=data[:4])

    found = hc.find_ticket(make, 0.6, rounds=1, scope="layer", modules="SelfAttention")
    assert {n.split(".")[-3] for n in found.ticket.masks} == {"SelfAttention"} and len(found.ticket.masks) == 24
    for mask in found.ticket.masks.values():
        assert int(mask.sum()) == mask.numel() - round(0.6 * mask.numel())
    found.trainer.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert not gone(found.ticket, state_of(loaded)).any()
    # a mask alone starts from what the model has
    fresh = make()
    before = state_of(fresh.model)
    fresh.add_callback(hc.LotteryTicketCallback(hc.Ticket(found.ticket.masks)))
    watch = Watch()
    fresh.add_callback(watch)
    fresh.train()
    for name, weight in watch.first.items():
        assert torch.equal(weight, before[name] * found.ticket.masks.get(name, torch.tensor(True)))


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_heads_and_neurons(family, tmp_path):
    """A structured ticket is a plan; masked, the model computes what it computes when it is cut."""
    data = pictures() if family == "vit" else rows()
    if family == "llama":
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data]

    def make():
        arguments = T.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=8, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        return T.Trainer(build(family)[0], arguments, train_dataset=data)

    found = hc.find_ticket(make, heads=0.5, neurons=0.75, rounds=2, controls=["random_mask", "reinit"])
    before, plan = hc.Ticket.load(tmp_path / "round-1").plan, found.ticket.plan
    units = 2 if family == "llama" else 1  # heads of one key/value head go together

    def left(plan, kind, of, total):
        cut = {vars(e)[of]: len(vars(e)["heads" if kind is hc.KeepHeads else "neurons"]) for e in plan if isinstance(e, kind)}
        return sum(cut.get(b, n) for b, n in total.items())

    structure = hc.discover(make().model)
    heads, neurons = {a.name: a.num_heads for a in structure.attentions}, {f.name: f.size for f in structure.ffns}
    assert left(plan, hc.KeepHeads, "attention", heads) == 6 and left(plan, hc.KeepNeurons, "ffn", neurons) == 72
    assert left(before, hc.KeepHeads, "attention", heads) == units * (12 // units - round(12 // units * (1 - 0.5**0.5)))
    assert left(before, hc.KeepNeurons, "ffn", neurons) == 144
    for edit in plan:  # what is gone stays gone
        earlier = [e for e in before if type(e) is type(edit) and list(vars(e).values())[0] == list(vars(edit).values())[0]]
        assert not earlier or set(list(vars(edit).values())[1]) <= set(list(vars(earlier[0]).values())[1])
    batch = {k: torch.stack([r[k] for r in data[:4]]) for k in data[0] if k != "labels"}
    model = found.model.eval()
    held = outputs(model, batch)
    with hc.mask_(model, plan):
        torch.testing.assert_close(outputs(model, batch), held, atol=1e-6, rtol=1e-6)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), held, atol=1e-5, rtol=1e-5)
    assert sum(a.num_heads for a in hc.discover(model).attentions) == 6
    assert sum(f.size for f in hc.discover(model).ffns) == 72


def test_a_random_structured_mask_keeps_as_many_in_each_block():
    from hf_compress.pruning.structured import masks_of
    from hf_compress.pruning.ticket import random_ticket

    model = build("llama")[0]
    names = [a.name for a in hc.discover(model).attentions], [f.name for f in hc.discover(model).ffns]
    plan = hc.Plan([hc.KeepHeads(names[0][0], [0, 1]), hc.KeepNeurons(names[1][2], range(10))])
    drawn = [random_ticket(hc.Ticket(masks_of(model, plan), plan=plan), model, seed).plan for seed in range(8)]
    for found in drawn:
        assert [list(vars(e).values())[0] for e in found] == [names[0][0], names[1][2]]
        assert found.edits[0].heads in ((0, 1), (2, 3)) and len(found.edits[1].neurons) == 10
    assert {p.edits[0].heads for p in drawn} == {(0, 1), (2, 3)}


def test_a_ticket_on_disk_is_one_bit_a_weight(tmp_path):
    draw = torch.Generator().manual_seed(0)
    masks = {"a.weight": torch.rand(7, 5, generator=draw) > 0.5, "b.weight": torch.rand(64, 64, generator=draw) > 0.9}
    ticket = hc.Ticket(masks, {"a.weight": torch.randn(7, 5)}, hc.Plan([hc.KeepNeurons("f", [1, 2])]), 3, 2)
    ticket.save(tmp_path)
    with safe_open(tmp_path / "ticket.safetensors", "pt") as file:
        assert file.get_tensor("b.weight").shape == (512,) and file.get_tensor("b.weight").dtype == torch.uint8
    loaded = hc.Ticket.load(tmp_path)
    assert all(torch.equal(loaded.masks[n], m) for n, m in masks.items()) and loaded.digest == ticket.digest
    assert torch.equal(loaded.weights["a.weight"], ticket.weights["a.weight"])
    assert (loaded.plan, loaded.step, loaded.round) == (ticket.plan, 3, 2)
    hc.Ticket(masks).save(tmp_path)
    assert hc.Ticket.load(tmp_path).weights is None
    (tmp_path / "ticket.safetensors").write_bytes(b"nothing")
    with pytest.raises(hc.CompressionError, match="No ticket to read"):
        hc.Ticket.load(tmp_path)


def test_what_is_pruned_by_default_and_by_name():
    bert = T.BertForSequenceClassification(T.BertConfig(**TEXT))
    assert len(prunable(bert)) == 18 and all(n.startswith("bert.encoder.layer.") for n in prunable(bert))
    assert prunable(bert, "classifier") == ["classifier.weight"]
    vit = T.ViTForImageClassification(T.ViTConfig(**IMAGE))
    assert len(prunable(vit)) == 18 and not any("patch" in n or "classifier" in n for n in prunable(vit))
    resnet = T.ResNetForImageClassification(
        T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    assert len(prunable(resnet)) == 5 and all("encoder" in n for n in prunable(resnet))
    with pytest.raises(hc.CompressionError, match="no Linear, Conv1D or convolution whose name matches 'nothing'"):
        prunable(bert, "nothing")


MASK = {"classifier.weight": torch.ones(2, 64, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "Give sparsity="),
        (dict(sparsity=0.5, heads=0.5), "Give sparsity="),
        (dict(sparsity=1.0), r"\[0, 1\)"),
        (dict(sparsity=0.0), "above 0"),
        (dict(sparsity=[0.9, 0.5]), "several that grow"),
        (dict(sparsity="half"), "sparsity"),
        (dict(heads=1.0), r"\[0, 1\)"),
        (dict(sparsity=0.5, rounds=0), "rounds"),
        (dict(sparsity=0.5, rewind_to=-1), "rewind_to"),
        (dict(sparsity=0.5, rewind_to=1.5), "rewind_to"),
        (dict(sparsity=0.5, scope="model"), "scope"),
        (dict(sparsity=0.5, controls="reinit"), "controls"),
        (dict(sparsity=0.5, controls=["again"]), "controls"),
        (dict(heads=0.5, modules="query"), "modules"),
        (dict(sparsity=0.5, seed=-1), "seed"),
    ],
)  # fmt: skip
def test_refused_options(options, message, tmp_path):
    with pytest.raises(hc.CompressionError, match=message):
        hc.find_ticket(lambda: pytest.fail("nothing is made"), output=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_refused(tmp_path):
    with pytest.raises(hc.CompressionError, match="ticket is a Ticket"):
        hc.LotteryTicketCallback(3)
    with pytest.raises(hc.CompressionError, match="'reinit' or 'random_mask'"):
        hc.LotteryTicketCallback(hc.Ticket(MASK), control="random")
    with pytest.raises(hc.CompressionError, match="No ticket to read"):
        hc.LotteryTicketCallback(tmp_path / "none")
    with pytest.raises(hc.CompressionError, match="dense model"):
        hc.Ticket({})
    with pytest.raises(hc.CompressionError, match="bool tensor"):
        hc.Ticket({"a": torch.ones(2)})
    with pytest.raises(hc.CompressionError, match="must return a Trainer"):
        hc.find_ticket(lambda: None, 0.5, output=tmp_path)
    one = maker(tmp_path, [])()
    with pytest.raises(hc.CompressionError, match="same Trainer twice"):
        hc.find_ticket(lambda: one, 0.5)
    with pytest.raises(hc.CompressionError, match="behind the 4 steps"):
        hc.find_ticket(maker(tmp_path / "late", []), 0.5, rewind_to=4)
    with pytest.raises(hc.CompressionError, match="save_only_model"):
        hc.find_ticket(maker(tmp_path / "only", [], save_only_model=True), 0.5, rewind_to=2)
    with pytest.raises(hc.CompressionError, match="other than 'best'"):
        best = dict(save_strategy="best", eval_strategy="steps", metric_for_best_model="loss")
        hc.find_ticket(maker(tmp_path / "best", [], **best), 0.5, rewind_to=2)
    module = torch.nn.Module()
    module.config = None
    with pytest.raises(hc.CompressionError, match="How a Module is initialised"):
        fresh_weights(module, 0)


@pytest.mark.parametrize(
    ("ticket", "message"),
    [
        (hc.Ticket({"nowhere.weight": torch.ones(2, 2, dtype=torch.bool)}), "no parameter named 'nowhere.weight'"),
        (hc.Ticket({"classifier.weight": torch.ones(2, 2, dtype=torch.bool)}), r"\(2, 2\)"),
        (hc.Ticket(MASK, {"classifier.weight": torch.ones(2, 64)}), "of another model"),
    ],
)
def test_a_ticket_of_another_model_is_refused_before_anything_changes(ticket, message, tmp_path):
    trainer = maker(tmp_path, [])()
    before = state_of(trainer.model)
    trainer.add_callback(hc.LotteryTicketCallback(ticket))
    with pytest.raises(hc.CompressionError, match=message):
        trainer.train()
    assert all(torch.equal(w, before[n]) for n, w in state_of(trainer.model).items())


@pytest.mark.parametrize(
    "other",
    [
        lambda: hc.PruningCallback(heads=0.5),
        lambda: hc.SparsityCallback(0.5),
        lambda: hc.LotteryTicketCallback(hc.Ticket(MASK)),
    ],
)
def test_a_second_callback_that_masks_is_refused(other, tmp_path):
    trainer = maker(tmp_path, [], callbacks=lambda: [other()])()
    trainer.add_callback(hc.LotteryTicketCallback(hc.Ticket(MASK)))
    with pytest.raises(hc.CompressionError, match="cannot share a training with a "):
        trainer.train()


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("bert")[0], peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    trainer = T.Trainer(
        model, T.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1), train_dataset=rows()
    )
    trainer.add_callback(hc.LotteryTicketCallback(hc.Ticket(MASK)))
    with pytest.raises(hc.CompressionError, match="adapters"):
        trainer.train()


def test_two_processes_find_the_same_ticket(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    done = subprocess.run(
        [*command, "-m", "tests.test_lottery", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two and one["removed"] == [0.0, 0.5, 0.5]


if __name__ == "__main__":
    import os

    folder = Path(sys.argv[1])
    found = hc.find_ticket(maker(folder, []), 0.5, rounds=1, controls=["random_mask"])
    text = {"digest": found.ticket.digest, "removed": [r["weights_removed"] for r in found.rows]}
    text["weights"] = {n: w.double().sum().item() for n, w in state_of(found.model).items()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(text))
