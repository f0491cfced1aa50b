"""Scores and selection by value, against finite differences and numpy."""

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.discover import discover
from hf_compress.modules import gate_
from hf_compress.pruning import PLANNED
from hf_compress.pruning.measured import Gated, derivatives, gates_of_blocks
from hf_compress.pruning.planner import _measure
from hf_compress.pruning.select import count_units, select, units_of
from tests.zoo import FAMILIES, NO_HEADS, build

LABELLED = ("bert", "llama", "llama_multi_query", "gpt2", "albert", "vit", "bart")


def labelled(family, rows=2):
    model, batch = build(family)
    if family in ("llama", "llama_multi_query", "gpt2"):
        batch["labels"] = batch["input_ids"].clone()
    elif family == "bart":
        batch["labels"] = batch["decoder_input_ids"].clone()
    else:
        batch["labels"] = torch.tensor([0, 1])[:rows]
    return model, batch


def measured(model, batch, score, loss_fn=None):
    structure = discover(model)
    blocks = [*structure.attentions, *structure.ffns]
    return blocks, _measure(model, structure, blocks, [batch], score, loss_fn, 0)[0]


def square(outputs, batch):
    """A loss in float64 throughout: the models' own go through float32, where finite differences drown."""
    return outputs.logits.double().square().mean()


@pytest.mark.parametrize("family", LABELLED)
def test_gradient_scores_are_the_finite_differences_of_gates(family):
    """One row, so that the batch derivative is the sample's: score = |dL/dg|, Taylor its square."""
    model, batch = labelled(family)
    batch = {k: v[1:] for k, v in batch.items()}
    model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    blocks, gradient = measured(model, batch, "gradient", square)
    _, taylor = measured(model, batch, "taylor", square)
    for block in (blocks[0], blocks[-1]):
        gate = gate_(model.get_submodule(block.out)).double()
        model.get_submodule(block.out).hfc_gate = gate
        for unit in (0, count_units(block) - 1):
            losses = []
            for step in (2e-3, -2e-3):
                gate.fill_(1.0)
                gate[units_of(block) == unit] += step
                with torch.no_grad():
                    losses.append(square(model(**batch), batch).item())
            gate.fill_(1.0)
            slope = (losses[0] - losses[1]) / 4e-3
            assert gradient[block.name][unit].item() == pytest.approx(abs(slope), rel=1e-2, abs=2e-6)
            assert taylor[block.name][unit].item() == pytest.approx(slope**2, rel=2e-2, abs=1e-8)


def test_every_row_counts_by_itself():
    """Michel takes the absolute value per sample: two rows are the mean of each alone, not of their sum."""
    model, batch = labelled("bert")
    blocks, both = measured(model, batch, "gradient")
    alone = [measured(model, {k: v[i : i + 1] for k, v in batch.items()}, "gradient")[1] for i in (0, 1)]
    for block in blocks:
        expected = (alone[0][block.name] + alone[1][block.name]) / 2
        torch.testing.assert_close(both[block.name], expected, rtol=1e-3, atol=1e-6)


def opt(**more):
    """Its feed-forward blocks are given rows of tokens; its attentions are not."""
    torch.manual_seed(0)
    config = dict(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
        pad_token_id=1, dropout=0.0, **more,
    )  # fmt: skip
    ids = torch.randint(5, 99, (8, 10))
    mask = torch.ones_like(ids)
    ids[4:, -3:], mask[4:, -3:] = 1, 0
    model = T.OPTForSequenceClassification(T.OPTConfig(**config)).eval()
    return model, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1] * 4)}


def swin():
    """Its attentions are given windows: 16 of a picture, then 4."""
    torch.manual_seed(0)
    config = T.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    pictures = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1] * 2)}
    return T.SwinForImageClassification(config).eval(), pictures


@pytest.mark.parametrize("made", [opt, swin])
def test_rows_of_tokens_and_windows_count_with_their_sample(made):
    """A batch of rows says what the rows say alone, in every block."""
    model, batch = made()
    structure = discover(model)
    gates = gates_of_blocks([*structure.attentions, *structure.ffns])
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    together, alone = (derivatives(model, gates, batches, None, "taylor") for batches in ([batch], rows))
    for gate in gates:
        assert together[gate.name].shape == (len(rows), gate.count) and float(alone[gate.name].abs().max()) > 0
        torch.testing.assert_close(together[gate.name], alone[gate.name], rtol=1e-3, atol=1e-6)


def test_rows_in_another_order_are_one_sample():
    """Tokens first, then flattened: no part of the rows belongs to one sample, so the batch is taken for one."""

    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)

        def forward(self, x, labels):
            hidden = self.up(x.transpose(0, 1).flatten(0, 1)).relu()
            out = self.down(hidden).unflatten(0, (x.shape[1], len(x))).mean((0, 2))
            return {"loss": (out - labels).square().mean()}

    torch.manual_seed(0)
    model, batch = Turned(), {"x": torch.randn(4, 6, 6), "labels": torch.randn(4)}
    gates = [Gated("down", torch.arange(8), 8, "down")]
    loss_fn = lambda outputs, batch: outputs["loss"]  # noqa: E731
    found = derivatives(model, gates, [batch], loss_fn, "taylor")["down"]
    alone = derivatives(model, gates, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)], loss_fn, "taylor")
    assert alone["down"].shape == (4, 8)
    torch.testing.assert_close(found, alone["down"].sum(0, keepdim=True))


@pytest.mark.parametrize("module", ["self_attn.out_proj", "fc2"])
def test_activation_does_not_count_padding(module):
    model, batch = opt(activation_function="gelu")
    seen = []
    hook = model.model.decoder.layers[0].get_submodule(module).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    real = seen[0].reshape(8, 10, -1)[batch["attention_mask"].bool()].abs()
    structure = discover(model)
    block = (structure.ffns if module == "fc2" else structure.attentions)[0]
    _, scores = measured(model, batch, "activation")
    expected = torch.stack([real[:, units_of(block) == unit].mean() for unit in range(count_units(block))])
    torch.testing.assert_close(scores[block.name], expected, rtol=1e-5, atol=1e-7)


def test_magnitude_is_the_norm_of_everything_that_goes():
    model, _ = build("llama")
    _, scores = measured(model, {}, "magnitude")
    attention = model.model.layers[0].self_attn
    weights = {n: getattr(attention, f"{n}_proj").weight.detach().numpy() for n in "qkvo"}
    for group in range(2):
        q, kv = slice(group * 32, group * 32 + 32), slice(group * 16, group * 16 + 16)
        squares = sum(np.square(w).sum() for w in (weights["q"][q], weights["k"][kv], weights["v"][kv], weights["o"][:, q]))
        assert scores["model.layers.0.self_attn"][group].item() == pytest.approx(np.sqrt(squares), rel=1e-5)
    mlp = model.model.layers[1].mlp
    up, gate, down = (getattr(mlp, f"{n}_proj").weight.detach().numpy() for n in ("up", "gate", "down"))
    expected = np.sqrt(np.square(up).sum(1) + np.square(gate).sum(1) + np.square(down).sum(0))
    np.testing.assert_allclose(scores["model.layers.1.mlp"].numpy(), expected, rtol=1e-5)


def test_activation_counts_nonzeros_of_relu_and_averages_gelu():
    model, batch = build("opt")  # ReLU
    seen = []
    hook = model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    _, scores = measured(model, batch, "activation")
    hook.remove()
    real = batch["attention_mask"].bool()
    flat = seen[-1].reshape(*real.shape, 96)[real].numpy()
    np.testing.assert_allclose(scores["model.decoder.layers.0"].numpy(), (flat != 0).mean(0), rtol=1e-5)
    model, batch = build("bert")  # GELU
    hook = model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    _, scores = measured(model, batch, "activation")
    hook.remove()
    np.testing.assert_allclose(
        scores["bert.encoder.layer.0"].numpy(), np.abs(seen[-1][batch["attention_mask"].bool()].numpy()).mean(0), rtol=1e-5
    )


@pytest.mark.parametrize("score", PLANNED)
@pytest.mark.parametrize("uniform", [False, True])
def test_every_score_removes_what_was_asked(score, uniform):
    model, batch = labelled("bert")
    plan = hc.plan_pruning(model, [batch], heads=0.5, neurons=0.75, score=score, uniform=uniform)
    heads = [len(e.heads) for e in plan.edits if isinstance(e, hc.KeepHeads)]
    neurons = [len(e.neurons) for e in plan.edits if isinstance(e, hc.KeepNeurons)]
    missing_heads, missing_neurons = 3 - len(heads), 3 - len(neurons)
    assert sum(heads) + 4 * missing_heads == 6 and sum(neurons) + 96 * missing_neurons == 72
    if uniform:
        assert set(heads) == {2} and set(neurons) == {24}
    hc.apply_(model, plan)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_HEADS])
def test_planning_leaves_the_model_alone_and_its_plan_applies(family):
    model, batch = build(family)
    model.train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    trainable = [p.requires_grad for p in model.parameters()]
    plan = hc.plan_pruning(
        model, [batch], heads=0.5, neurons=0.5, loss_fn=lambda out, _: out[0].float().square().mean()
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n.endswith(("dense", "o_proj", "fc2")))
    hc.apply_(model, plan)


def test_important_units_are_kept():
    """Neurons whose output is multiplied by ten matter more, by every score that looks at the model."""
    for score in ("magnitude", "taylor", "gradient", "activation"):
        model, batch = labelled("bert")
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                layer.intermediate.dense.weight[:24] *= 10
                layer.intermediate.dense.bias[:24] += 10
                layer.output.dense.weight[:, :24] *= 10
        plan = hc.plan_pruning(model, [batch], neurons=0.75, score=score, scope="layer")
        for edit in plan.edits:
            assert len(set(edit.neurons) & set(range(24))) >= 20, score


def test_select_by_hand():
    scores = {"a": torch.tensor([1.0, 5.0, 3.0, 0.5]), "b": torch.tensor([9.0, 0.1, 8.0, 0.2])}
    assert select(scores, 0.5) == {"a": [1, 2], "b": [0, 2]}
    assert select(scores, 0.625) == {"a": [1], "b": [0, 2]}
    assert select(scores, 0.9) == {"a": [1], "b": [0]}  # one of each stays
    assert select(scores, 0.5, scope="layer") == {"a": [1, 2], "b": [0, 2]}
    assert select(scores, 0.25, uniform=True) == {"a": [0, 1, 2], "b": [0, 2, 3]}
    assert select(scores, 0.25, round_to=2) == {"a": [0, 1, 2, 3], "b": [0, 2]}
    alive = {"a": torch.tensor([True, False, True, True]), "b": torch.ones(4, dtype=torch.bool)}
    assert select(scores, 0.25, alive=alive) == {"a": [0, 2, 3], "b": [0, 2, 3]}
    assert select(scores, 0.125, alive=alive, round_to=2) == {"a": [0, 2], "b": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=1.0), r"\[0, 1\), got 1.0"),
        (dict(heads=-0.1), r"\[0, 1\), got -0.1"),
        (dict(neurons="half"), "got 'half'"),
        (dict(neurons=float("nan")), "got nan"),
        (dict(heads=0.5, score="tailor"), "did you mean 'taylor'"),
        (dict(heads=0.5, scope="all"), "'global'"),
        (dict(neurons=0.5, round_to=0), "round_to"),
        (dict(heads=0.5), "score='taylor' is measured on data: pass batches"),
    ],
)
def test_refused_options(options, message):
    model, _ = build("bert")
    with pytest.raises(hc.CompressionError, match=message):
        hc.plan_pruning(model, **options)


def test_no_loss_no_heads_no_batches():
    model, batch = build("bert")
    with pytest.raises(hc.CompressionError, match="put 'labels' into the batches"):
        hc.plan_pruning(model, [batch], heads=0.5)
    with pytest.raises(hc.CompressionError, match="must be one number"):
        hc.plan_pruning(model, [batch], heads=0.5, loss_fn=lambda out, _: out.logits)
    with pytest.raises(hc.CompressionError, match="batches are empty"):
        hc.plan_pruning(model, [], heads=0.5)
    with pytest.raises(hc.CompressionError, match="Each batch must be a dict"):
        hc.plan_pruning(model, [[1]], heads=0.5)
    with pytest.raises(hc.CompressionError, match="has no heads that can be cut"):
        hc.plan_pruning(build("convnext")[0], heads=0.5, score="magnitude")
    assert hc.plan_pruning(model) == hc.Plan()


def test_random_is_a_control_with_a_seed():
    model = T.BertModel(build("bert")[0].config)
    plans = [hc.plan_pruning(model, heads=0.5, neurons=0.5, score="random", seed=s) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
