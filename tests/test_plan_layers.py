"""plan_layers by value: block influence against numpy on output_hidden_states."""

import numpy as np
import pytest
import torch

import hf_compress as hc
from hf_compress.discover import discover
from hf_compress.pruning import LAYER_SCORES
from hf_compress.pruning.layers import _cosines
from tests.zoo import FAMILIES, NO_LAYERS, build, outputs


def cosine(one, other, mask=None):
    one, other = (x.detach().double().numpy() for x in (one, other))
    found = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    return found.mean() if mask is None else found[mask.numpy().astype(bool)].mean()


def influences(model, batches):
    return {name: 1 - found.numpy() for name, found in _cosines(model, discover(model).stacks, batches).items()}


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_block_influence_is_one_minus_the_cosine_of_hidden_states(family):
    model, batch = build(family)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    mask = batch.get("attention_mask")
    last = 2 if family == "llama" else 3  # its last hidden state is the one after the norm
    expected = [1 - cosine(hidden[i], hidden[i + 1], mask) for i in range(last)]
    (found,) = influences(model, [batch]).values()
    np.testing.assert_allclose(found[:last], expected, rtol=1e-4)
    whole = [1 - cosine(hidden[i], hidden[i + 1]) for i in range(last)]
    assert mask is None or not np.allclose(found[:last], whole, rtol=1e-3), "padding would not have shown"
    plan = hc.plan_layers(model, [batch], layers=1)
    assert plan == hc.Plan([hc.KeepLayers([i for i in range(3) if i != found.argmin()])])


def test_both_sides_of_an_encoder_decoder_and_rows_of_several_batches():
    model, batch = build("bart")
    batch["decoder_attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
    expected = {
        "encoder": [cosine(*found.encoder_hidden_states[i : i + 2], batch.get("attention_mask")) for i in range(3)],
        "decoder": [cosine(*found.decoder_hidden_states[i : i + 2], batch["decoder_attention_mask"]) for i in range(3)],
    }
    halves = [{k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1)]
    for name, values in influences(model, halves).items():
        np.testing.assert_allclose(values, 1 - np.array(expected[name]), rtol=1e-4)
    both = hc.plan_layers(model, halves, layers=1)
    assert [edit.stack for edit in both] == ["encoder", "decoder"]
    one = hc.plan_layers(model, halves, layers=2, stack="decoder")
    assert one.edits == (hc.KeepLayers([int(np.argmax(1 - np.array(expected["decoder"])))], "decoder"),)


def test_channels_first_are_compared_over_channels():
    model, batch = build("convnext")
    stage = model.convnext.encoder.stages[1].layers
    seen = []
    hook = stage[0].register_forward_hook(lambda _m, a, o: seen.append((a[0], o)))
    (name,) = [n for n, layers in discover(model).stacks.items() if layers[0].path.endswith("stages.1.layers")]
    found = influences(model, [batch])[name][0]
    hook.remove()
    before, after = (x.movedim(1, -1) for x in seen[-1])
    assert found == pytest.approx(1 - cosine(before, after), rel=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_LAYERS])
def test_every_family_loses_a_layer_exactly(family):
    model, batch = build(family)
    sizes = {name: len(found) for name, found in hc.discover(model).stacks.items()}
    plan = hc.plan_layers(model, [batch], layers=0.5)
    assert {e.stack or next(iter(sizes)): len(e.layers) for e in plan} == {n: s - round(s / 2) for n, s in sizes.items()}
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)


def test_scores_without_data():
    model, _ = build("bert")
    with torch.no_grad():
        for p in model.bert.encoder.layer[1].parameters():
            p.mul_(0.1)
    assert hc.plan_layers(model, layers=1, score="magnitude").edits == (hc.KeepLayers([0, 2]),)
    assert hc.plan_layers(model, layers=2, score="last").edits == (hc.KeepLayers([0]),)
    plans = [hc.plan_layers(model, layers=1, score="random", seed=s) for s in range(8)]
    assert plans[0] == hc.plan_layers(model, layers=1, score="random") and len({p.edits for p in plans}) > 1
    assert set(LAYER_SCORES) == {"block_influence", "magnitude", "last", "random"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=0), r"got 0\."),
        (dict(layers=1.0), r"in \(0, 1\), got 1.0"),
        (dict(layers=True), "got True"),
        (dict(layers=3), "would leave none of the 3"),
        (dict(layers=0.1), "less than one layer"),
        (dict(layers=1), "measured on data: pass batches"),
        (dict(layers=1, score="block"), "did you mean 'block_influence'"),
        (dict(layers=1, score="last", stack="decoder"), "No stack is named 'decoder'"),
        (dict(layers=1, score="last", stack=3), "got 3"),
        (dict(layers=1, score="random", seed=-1), "seed must be"),
    ],
)
def test_refused(options, message):
    with pytest.raises(hc.CompressionError, match=message):
        hc.plan_layers(build("bert")[0], **options)


def test_models_without_layers_are_refused():
    with pytest.raises(hc.CompressionError, match="no stack of layers"):
        hc.plan_layers(torch.nn.Linear(2, 2), layers=1, score="last")
