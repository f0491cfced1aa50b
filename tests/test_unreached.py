"""Blocks that a model's inputs do not reach: proved by themselves, or refused."""

import copy

import pytest
import torch
import transformers as T
from torch import nn

import hf_compress as hc
from hf_compress.probe import example_inputs, probing
from hf_compress.unreached import ways
from tests.test_surgery import same, snapshot
from tests.zoo import GQA

WIDTH = GQA["hidden_size"]
TEXT = {"input_ids": torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(3))}


def toy(make, seed=0):
    """Embeddings, and a block after them."""

    class Toy(T.LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.block = make()
            self.post_init()

        def forward(self, input_ids=None, **kwargs):
            return T.modeling_outputs.BaseModelOutput(last_hidden_state=self.block(self.embed_tokens(input_ids)))

    torch.manual_seed(seed)
    model = Toy(T.LlamaConfig(**GQA)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


class MLP(nn.Module):
    """A gated block whose projection holds a neuron's two rows side by side: a layout that no rule here knows."""

    def __init__(self, size=12):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 2 * size), nn.Linear(size, WIDTH)

    def forward(self, x):
        up, gate = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj(up * nn.functional.silu(gate))


class Mixture(nn.Module):
    """Every token goes to the first expert that is allowed; the others wait."""

    def __init__(self, experts, chosen):
        super().__init__()
        self.experts, self.chosen = nn.ModuleList(experts), chosen

    def forward(self, x):
        return x + self.experts[self.chosen](x)


def rows(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("chosen", (0, 2), ids=("the first is used", "the last is used"))
def test_experts_that_no_token_goes_to_are_cut_each_on_its_own(chosen):
    model = toy(lambda: Mixture([MLP() for _ in range(3)], chosen))
    before = copy.deepcopy(model.block.experts)
    kept = {0: [1, 2, 5, 7], 1: [0, 3, 11], 2: [4, 6, 8, 9, 10]}
    hc.apply_(model, hc.Plan([hc.KeepNeurons(f"block.experts.{i}", k) for i, k in kept.items()]))
    x = rows(2, 5)
    for i, k in kept.items():
        both = sorted([*(2 * n for n in k), *(2 * n + 1 for n in k)])  # by hand
        assert torch.equal(model.block.experts[i].gate_up_proj.weight, before[i].gate_up_proj.weight[both])
        assert torch.equal(model.block.experts[i].down_proj.weight, before[i].down_proj.weight[:, k])
        with torch.no_grad():
            gone = [n for n in range(12) if n not in k]
            before[i].down_proj.weight[:, gone] = 0
            torch.testing.assert_close(model.block.experts[i](x), before[i](x), atol=1e-6, rtol=1e-5)


class Centred(MLP):
    """The mean of all neurons is taken off each."""

    def forward(self, x):
        up, gate = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        inner = up * nn.functional.silu(gate)
        return self.down_proj(inner - inner.mean(-1, keepdim=True))


class Stubborn(MLP):
    """Its forward names its size."""

    def forward(self, x):
        up, gate = self.gate_up_proj(x).view(*x.shape[:-1], 12, 2).unbind(-1)
        return self.down_proj(up * nn.functional.silu(gate))


class Mixing(MLP):
    """A norm over all neurons."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        up, gate = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj(self.norm(up * nn.functional.silu(gate)))


class Crossed(MLP):
    """Its neurons are read in the reverse order: the mask of a neuron is not that of its number, which gradients see."""

    def forward(self, x):
        up, gate = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down_proj((up * nn.functional.silu(gate)).flip(-1))


@pytest.mark.parametrize(
    ("kind", "message"),
    ((Centred, "something that mixes them"), (Mixing, "a norm over all")),
)
def test_wrong_layouts_in_a_block_that_does_not_run_are_refused(kind, message):
    model = toy(lambda: Mixture([MLP(), kind()], 0))
    before, dense = snapshot(model), model(**TEXT).last_hidden_state
    with pytest.raises(hc.CompressionError, match=message):
        hc.apply_(model, hc.Plan([hc.KeepNeurons(f"block.experts.{i}", range(7)) for i in (0, 1)]))
    assert same(snapshot(model), before) and torch.equal(model(**TEXT).last_hidden_state, dense)


@pytest.mark.parametrize("kind", (Crossed, Stubborn))
def test_a_layout_of_its_own_in_a_block_that_does_not_run_is_found(kind):
    model = toy(lambda: Mixture([MLP(), kind()], 0))
    before = copy.deepcopy(model.block.experts[1])
    hc.apply_(model, hc.Plan([hc.KeepNeurons("block.experts.1", range(7))]))
    with torch.no_grad():
        before.down_proj.weight[:, 7:] = 0
        torch.testing.assert_close(model.block.experts[1](rows(2, 5)), before(rows(2, 5)), atol=1e-6, rtol=1e-5)
    first = 2 * 5 if kind is Crossed else 0  # neuron 0 of the one is the last that its projection makes
    assert torch.equal(model.block.experts[1].gate_up_proj.weight, before.gate_up_proj.weight[first:][: 2 * 7])


def test_weights_of_a_block_that_does_not_run_count():
    """Blocks that are built alike share what was found; each is compared with its own weights, those that do not run too."""
    model = toy(lambda: Mixture([MLP(), MLP()], 0))
    with torch.no_grad():
        model.block.experts[1].down_proj.weight[0, 0] = torch.nan
    with pytest.raises(hc.CompressionError, match=r"block\.experts\.1.*NaN"):
        hc.apply_(model, hc.Plan([hc.KeepNeurons(f"block.experts.{i}", range(7)) for i in (0, 1)]))
    assert model.block.experts[0].down_proj.in_features == 12


class Heads(nn.Module):
    """An attention, over itself or over something else."""

    num_heads, head_dim = 4, WIDTH // 4

    def __init__(self, takes="states"):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.full = takes == "full"

    def forward(self, hidden_states, encoder_hidden_states=None):
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.full and encoder_hidden_states is not None:  # this way alone reads a size that it names
            other = other[..., : self.k_proj.out_features]
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, x in ((self.q_proj, hidden_states), (self.k_proj, other), (self.v_proj, other))
        )
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Masked(Heads):
    def forward(self, hidden_states, attention_mask=None):
        return super().forward(hidden_states)


class Beside(nn.Module):
    """A block that runs, and one that does not."""

    def __init__(self, used, idle):
        super().__init__()
        self.used, self.idle = used, idle

    def forward(self, x):
        return x + self.used(x)


def test_an_attention_that_does_not_run_is_tried_with_an_encoder_and_without():
    model = toy(lambda: Beside(MLP(), Heads()))
    before = copy.deepcopy(model.block.idle)
    hc.apply_(model, hc.Plan([hc.KeepHeads("block.idle", [1, 3])]))
    with torch.no_grad():
        gone = [i for i in range(WIDTH) if i // before.head_dim in (0, 2)]
        before.out_proj.weight[:, gone] = 0
        for other in (None, rows(2, 7)):
            torch.testing.assert_close(model.block.idle(rows(2, 5), other), before(rows(2, 5), other), atol=1e-6, rtol=1e-5)
    assert model.block.idle.q_proj.out_features == WIDTH // 2

    model = toy(lambda: Beside(MLP(), Heads("full")))  # wrong only when it looks at an encoder
    before = snapshot(model)
    with pytest.raises(hc.CompressionError, match="block.idle"):
        hc.apply_(model, hc.Plan([hc.KeepHeads("block.idle", [1, 3])]))
    assert same(snapshot(model), before)


def test_an_attention_whose_mask_may_hold_a_bias_of_every_head_is_not_proved_alone():
    model = toy(lambda: Beside(MLP(), Masked()))
    before = snapshot(model)
    with pytest.raises(hc.CompressionError, match="did not run on the proof's inputs, and none are known for it alone"):
        hc.apply_(model, hc.Plan([hc.KeepHeads("block.idle", [1, 3])]))
    assert same(snapshot(model), before)
    model = toy(lambda: Beside(Masked(), Beside(MLP(), Masked())))  # one like it ran, but in another place of a layer
    with pytest.raises(hc.CompressionError, match="none are known for it alone"):
        hc.apply_(model, hc.Plan([hc.KeepHeads("block.idle.idle", [1, 3])]))


class Towers(T.LlamaPreTrainedModel):
    """Two models, of which the first alone runs."""

    def __init__(self, config):
        super().__init__(config)
        self.text = T.LlamaModel(T.LlamaConfig(**GQA))
        self.vision = T.ViTModel(
            T.ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=16
            )
        )
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return self.text(input_ids)


def test_a_tower_that_does_not_run_is_proved_as_a_model():
    torch.manual_seed(1)
    model = Towers(T.LlamaConfig(**GQA)).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = [b.name for b in hc.discover(model.vision).attentions]
    edits = [hc.KeepHeads(f"vision.{found[0]}", [0, 3]), hc.KeepHeads(f"vision.{found[1]}", [2])]
    edits += [hc.KeepNeurons(f"vision.{f.name}", range(0, 48, 1 + i)) for i, f in enumerate(hc.discover(model.vision).ffns, 1)]
    text = model.text.layers[0].mlp.down_proj.weight.shape[1]
    edits.append(hc.KeepNeurons("text.layers.0.mlp", range(text - 3)))
    plan = hc.Plan(edits)
    with torch.no_grad():
        with hc.mask_(model, plan):
            masked, said = model.vision(pixels).last_hidden_state, model(**TEXT).last_hidden_state
        dense = model.vision(pixels).last_hidden_state
        assert (dense - masked).abs().max() > 1e-3
        hc.apply_(model, plan)
        torch.testing.assert_close(model.vision(pixels).last_hidden_state, masked, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**TEXT).last_hidden_state, said, atol=1e-5, rtol=1e-5)


def test_inputs_for_one_tower_do_not_stand_in_the_way_of_the_other():
    """A part of a plan that the user's batch does not reach is proved on inputs that are made for it."""
    model = Towers(T.LlamaConfig(**GQA)).eval()
    names = []
    with probing(model, TEXT) as run:
        run()
        idle = [b for b in hc.discover(model).ffns if b.name.startswith("vision")]
        for way in ways(model, lambda: idle if not names else [], lambda scope: None):
            names.append(type(way.args[0]).__name__)  # the whole first; then what holds the blocks
    assert names == ["Towers"]
    hc.apply_(model, hc.Plan([hc.KeepNeurons(idle[0].name, range(9))]), inputs=TEXT)
    assert model.get_submodule(idle[0].out).in_features == 9


def test_cross_attention_without_an_encoder():
    """BERT as a decoder: its layers run, the cross-attention in them does not, and one plan cuts both."""
    config = T.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
                          is_decoder=True, add_cross_attention=True)  # fmt: skip
    torch.manual_seed(2)
    model = T.BertModel(config).eval()
    assert example_inputs(model).keys() == {"input_ids"}
    plan = hc.Plan([
        hc.KeepHeads("encoder.layer.0.attention.self", [0, 2]), hc.KeepHeads("encoder.layer.0.crossattention.self", [1, 2, 3]),
        hc.KeepNeurons("encoder.layer.0", range(20)),
    ])  # fmt: skip
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for inputs in (TEXT, {**TEXT, "encoder_hidden_states": states}):
            cut = copy.deepcopy(model)
            with hc.mask_(cut, plan):
                masked = cut(**inputs).last_hidden_state
            hc.apply_(cut, plan)
            torch.testing.assert_close(cut(**inputs).last_hidden_state, masked, atol=1e-5, rtol=1e-5)
            assert cut.encoder.layer[0].crossattention.self.query.out_features == 24


class Silent(Heads):
    """What MRA computes where its kernel is missing."""

    def forward(self, hidden_states):
        return self.out_proj(torch.zeros_like(hidden_states))


def test_heads_that_give_nothing_are_refused_with_that_reason():
    model = toy(lambda: Silent())
    before = snapshot(model)
    with pytest.raises(hc.CompressionError, match="all that its output projection 'block.out_proj' reads is zero"):
        hc.apply_(model, hc.Plan([hc.KeepHeads("block", [0, 2])]))
    assert same(snapshot(model), before)
