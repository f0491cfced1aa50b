"""score='fisher' (rearrangement and tuned scales) and 'movement', by value, against numpy."""

import itertools

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.discover import discover
from hf_compress.pruning import measured, tuning
from hf_compress.pruning.scores import rearranged
from hf_compress.pruning.select import count_units, units_of
from hf_compress.pruning.surgeon import Moments
from hf_compress.pruning.tuning import scales
from tests.test_scores import labelled
from tests.trainers import trainer
from tests.zoo import build, outputs


def lost(rows, kept):
    """m' F m over the units that go, F = E d d'."""
    gone = [unit for unit in range(rows.shape[1]) if unit not in kept]
    fisher = rows.T @ rows / len(rows)
    return fisher[np.ix_(gone, gone)].sum()


def by_the_paper(rows, kept):
    """Kwon et al.'s own loop (prune/rearrange.py), written anew: add one that stays to those that go, take the best out."""
    gone = [unit for unit in range(rows.shape[1]) if unit not in kept]
    for unit in sorted(kept, key=lambda u: np.square(rows[:, u]).sum()):
        among = [*gone, unit]
        costs = [np.square(rows[:, [g for g in among if g != out]].sum(1)).sum() for out in among]
        del among[int(np.argmin(costs))]
        gone = among
    return sorted(set(range(rows.shape[1])) - set(gone))


@pytest.mark.parametrize("seed", range(20))
def test_rearrangement_is_the_papers_and_never_loses_more(seed):
    draw = np.random.default_rng(seed)
    units, samples = int(draw.integers(2, 9)), int(draw.integers(3, 30))
    rows = draw.normal(size=(samples, units)) @ draw.normal(size=(units, units))
    kept = sorted(np.argsort(-np.square(rows).mean(0))[: draw.integers(1, units)].tolist())
    found = rearranged(torch.from_numpy(rows), kept)
    assert found == by_the_paper(rows, kept) and len(found) == len(kept)
    best = min(lost(rows, c) for c in itertools.combinations(range(units), len(kept)))
    assert best - 1e-9 <= lost(rows, found) <= lost(rows, kept) + 1e-9


def test_rearrangement_sees_what_the_diagonal_does_not():
    """Twins look harmless one by one; to remove both is what costs."""
    rows = np.random.default_rng(0).normal(size=(64, 4)) * [1.0, 1.0, 1.3, 1.4]
    rows[:, 1] = rows[:, 0]
    kept = [2, 3]
    found = rearranged(torch.from_numpy(rows), kept)
    assert len({0, 1} & set(found)) == 1
    assert lost(rows, found) == pytest.approx(min(lost(rows, c) for c in itertools.combinations(range(4), 2)))
    assert rearranged(torch.from_numpy(rows), range(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_scales_are_least_squares_on_the_outputs_of_each_unit(bias, damping):
    draw = np.random.default_rng(1)
    x, weight = draw.normal(size=(200, 8)), draw.normal(size=(5, 8))
    shift = draw.normal(size=5) if bias else np.zeros(5)
    target = x @ weight.T + shift + 0.3 * draw.normal(size=(200, 5))
    units = np.array([-1, -1, 0, 0, -1, -1, 1, 1])  # two of four heads with two columns each stay
    moments = Moments.empty(8, 5, dtype=torch.float64)
    moments.add_(torch.from_numpy(x), torch.from_numpy(target))
    given = torch.from_numpy(shift) if bias else None
    found = scales(moments, torch.from_numpy(weight), given, torch.from_numpy(units), damping)
    outs = np.stack([(x[:, units == u] @ weight[:, units == u].T).ravel() for u in (0, 1)], 1)  # a column a unit
    meant = (target - shift).ravel()
    amount = np.sqrt(damping * np.square(outs).sum(0).mean())
    rows = np.vstack([outs, amount * np.eye(2)])
    expected = np.linalg.lstsq(rows, np.append(meant, [amount, amount]), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_scale_out_of_bounds_leaves_all_of_a_block_at_one():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[0.1, 0.0], [0.0, 1.0]])
    for factor, expected in ((9.0, [9.0, 2.0]), (11.0, [1.0, 1.0])):
        moments = Moments.empty(2, 2)
        moments.add_(x, x @ (weight * torch.tensor([factor, 2.0])).T)
        assert scales(moments, weight, None, torch.arange(2), damping=0.0).tolist() == pytest.approx(expected)


def test_the_plan_keeps_as_many_as_taylor_and_what_the_full_fisher_says():
    model, batch = labelled("bert")
    batch = {k: v.repeat(4, *[1] * (v.ndim - 1)) for k, v in batch.items()}
    batch["input_ids"] = torch.randint(5, 99, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    options = dict(heads=0.5, neurons=0.5)
    taylor, fisher = (hc.plan_pruning(model, [batch], **options, score=score) for score in ("taylor", "fisher"))
    structure = discover(model)
    blocks = {b.name: b for b in (*structure.attentions, *structure.ffns)}
    rows = measured.derivatives(model, measured.gates_of_blocks(list(blocks.values())), [batch], None, "fisher")
    assert len(taylor) == len(fisher) > 3 and all(edit.given for edit in fisher)
    for one, other in zip(taylor, fisher, strict=True):
        name = getattr(one, "attention", getattr(one, "ffn", None))
        before, after = (list(getattr(edit, "heads", getattr(edit, "neurons", None))) for edit in (one, other))
        assert after == by_the_paper(rows[name].numpy().astype(float), before)
    assert hc.plan_pruning(model, [batch], **options, score="fisher", tune=False).tensors is None


def test_the_scales_in_a_plan_are_fitted_layer_by_layer_on_the_cut_model_without_padding():
    """The last FFN of a BERT: what the dense model has in front of the norm there, less what the cut one has without it."""
    model, batch = labelled("bert")
    plan = hc.plan_pruning(model, [batch], heads=0.5, neurons=0.5, score="fisher", scope="layer")
    name, edit = "bert.encoder.layer.2", plan.edits[-1]
    assert edit.ffn == name
    output = model.bert.encoder.layer[2].output
    seen = {}
    hooks = [
        output.dense.register_forward_hook(lambda _m, a, y: seen.update(x=a[0], y=y)),
        output.register_forward_pre_hook(lambda _m, a: seen.update(residual=a[1])),
    ]
    plain = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        model(**plain)
        dense = seen["y"] + seen["residual"]
        before = hc.Plan(plan.edits[:-1], {k: v for k, v in plan.tensors.items() if k != f"{name}.out_weight"})
        with hc.mask_(model, before):
            model(**plain)
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool()
    assert not real.all()
    x = seen["x"][real].double().numpy()
    target = (dense - seen["residual"])[real].double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (output.dense.weight, output.dense.bias))
    kept = list(edit.neurons)
    outs = np.stack([np.outer(x[:, n], weight[:, n]).ravel() for n in kept], 1) / np.sqrt(len(x))
    amount = np.sqrt(0.01 * np.square(outs).sum(0).mean())
    rows = np.vstack([outs, amount * np.eye(len(kept))])
    meant = np.append((target - bias).ravel() / np.sqrt(len(x)), np.full(len(kept), amount))
    expected = np.linalg.lstsq(rows, meant, rcond=None)[0]
    given = plan.tensors[f"{name}.out_weight"].double().numpy()
    np.testing.assert_allclose(given, weight[:, kept] * expected, rtol=2e-3, atol=1e-5)
    assert np.abs(expected - 1).max() > 0.05, "nothing was fitted"


@pytest.mark.parametrize("family", ["llama", "llama_multi_query", "gpt2", "bart", "albert", "vit"])
def test_fisher_plans_apply_and_leave_the_model_alone(family):
    model, batch = labelled(family)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    plan = hc.plan_pruning(model, [batch], heads=0.5, neurons=0.5, score="fisher")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert plan.tensors and hc.Plan.from_dict(plan.to_dict(), plan.tensors) == plan
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)


def test_any_score_can_be_tuned():
    model, batch = labelled("bert")
    plan = hc.plan_pruning(model, [batch], neurons=0.5, score="magnitude", tune=True)
    plain = hc.plan_pruning(model, neurons=0.5, score="magnitude")
    assert [e.neurons for e in plan] == [e.neurons for e in plain] and plan.tensors and not plain.tensors
    with pytest.raises(hc.CompressionError, match="tune=True fits scales on data"):
        hc.plan_pruning(model, neurons=0.5, score="magnitude", tune=True)
    with pytest.raises(hc.CompressionError, match="tune must be True or False, got 1"):
        hc.plan_pruning(model, neurons=0.5, score="magnitude", tune=1)


def test_blocks_that_are_not_scaled_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(tuning, "LIMIT", 0.5)  # no sensible scale lies within
    monkeypatch.setattr(tuning.logger, "warning", said.append)
    model, batch = labelled("bert")
    plan = hc.plan_pruning(model, [batch], neurons=0.5, score="fisher", scope="layer")
    assert len(said) == 1 and "bert.encoder.layer.0, bert.encoder.layer.1, bert.encoder.layer.2." in said[0]
    for layer, edit in zip(model.bert.encoder.layer, plan, strict=True):
        assert torch.equal(plan.tensors[f"{edit.ffn}.out_weight"], layer.output.dense.weight[:, list(edit.neurons)])


class Sums(T.TrainerCallback):
    """-sum over steps of sum(w * dL/dw), by neuron and head, as a user would add it up."""

    def __init__(self):
        self.neurons, self.heads, self.steps, self.found = np.zeros(96), np.zeros(4), 0, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layer = model.bert.encoder.layer[1]
        for total, dense in (("neurons", layer.output.dense), ("heads", layer.attention.output.dense)):
            product = (dense.weight * dense.weight.grad).detach().double().numpy().sum(0)
            setattr(self, total, getattr(self, total) - product.reshape(len(getattr(self, total)), -1).sum(1))
        self.steps += 1


def test_movement_is_the_sum_over_steps_of_gradient_times_weight(tmp_path):
    prune = hc.PruningCallback(heads=0.5, neurons=0.5, score="movement", start=1.0, end=1.0)
    sums = Sums()
    run = {}

    class Look(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run.update({k: v.clone() for k, v in prune._run.scores.items()})

    t = trainer(tmp_path, [prune, sums, Look()], max_steps=4, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant")
    t.train()
    assert sums.steps == 4
    np.testing.assert_allclose(run["bert.encoder.layer.1"].numpy(), sums.neurons, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(run["bert.encoder.layer.1.attention.self"].numpy(), sums.heads, rtol=1e-4, atol=1e-8)
    best = {e.ffn: e.neurons for e in prune.plan if isinstance(e, hc.KeepNeurons)}
    kept = best["bert.encoder.layer.1"]
    assert set(kept) == set(np.argsort(-sums.neurons)[: len(kept)].tolist())


def test_each_score_is_refused_where_it_has_no_meaning():
    model, batch = labelled("bert")
    with pytest.raises(hc.CompressionError, match=r"learned while training: use PruningCallback\(score='movement'\)"):
        hc.plan_pruning(model, [batch], heads=0.5, score="movement")
    with pytest.raises(hc.CompressionError, match="where no training follows: use plan_pruning"):
        hc.PruningCallback(heads=0.5, score="fisher")


@pytest.mark.parametrize("score", ["taylor", "gradient"])
def test_scores_of_channels_are_the_finite_differences_of_what_reads_them(score):
    from tests.convolutional import build_convolutional

    model, batch = build_convolutional("resnet_basic")
    model.double()
    batch = {k: v[1:].double() for k, v in batch.items()}

    def square(outputs, _):
        return outputs.logits.square().mean()

    plan = hc.plan_pruning(model, [batch], channels=0.5, score=score, scope="layer", loss_fn=square)
    kept = {edit.conv: edit.channels for edit in plan}
    for group in hc.channel_groups(model)[:2]:  # the stream, which many read, and the inside of a block
        slopes = []
        for channel in range(group.size):
            losses = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    before = {}
                    for reader in group.readers:
                        weight = model.get_submodule(reader).weight
                        before[reader] = weight.clone()
                        weight[:, channel] *= 1 + step
                    losses.append(square(model(**batch), batch).item())
                    for reader, weight in before.items():
                        model.get_submodule(reader).weight.copy_(weight)
            slopes.append(abs(losses[0] - losses[1]) / 2e-4)
        assert set(kept[group.name]) == set(np.argsort(slopes)[group.size // 2 :].tolist())
    hc.apply_(model, plan, inputs=batch)


def test_activations_of_channels_are_what_their_readers_are_given():
    from tests.convolutional import build_convolutional

    model, batch = build_convolutional("resnet_basic")
    group = next(g for g in hc.channel_groups(model) if len(g.readers) == 1)
    (reader,) = group.readers
    seen = []
    hook = model.get_submodule(reader).register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach()))
    plan = hc.plan_pruning(model, [batch], channels=0.5, score="activation", scope="layer")
    hook.remove()
    often = (seen[-1].numpy() != 0).mean((0, 2, 3))  # ReLU
    kept = {edit.conv: edit.channels for edit in plan}[group.name]
    assert set(kept) == set(np.argsort(often)[-len(kept) :].tolist())
    with pytest.raises(hc.CompressionError, match="Channels are scored by .*taylor.*not by 'fisher'"):
        hc.plan_pruning(model, [batch], channels=0.5, score="fisher")
    with pytest.raises(hc.CompressionError, match="measured on data: pass batches"):
        hc.plan_pruning(model, channels=0.5, score="taylor")


def test_units_of_a_block_are_counted_as_they_are():
    model, _ = build("llama")
    block = discover(model).attentions[0]
    assert measured.gates_of_blocks([block])[0].count == count_units(block) == int(units_of(block).max()) + 1
