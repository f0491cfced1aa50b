"""Attentions and feed-forward blocks whose forward cannot be told of fewer units, or is told in its own way."""

import copy

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import hf_compress as hc
from hf_compress.heads import _attend
from hf_compress.layout import check
from hf_compress.pruning import plan_pruning
from tests.sweep.build import build

# type -> the edit; the projections that read what goes, with the columns that are zeroed by hand; the weights that go
HEAD = 16
CASES = {
    # four groups of heads, whatever their number: a forward that cannot be told of three
    "codegen": ("transformer.h.0.attn", [0, 1, 3], [("out_proj", 32, 48)], 4 * HEAD * 64),
    # torch's function is given the weights of the output projection; layer 0's bias, of all heads, is gated and handed on
    "wavlm": ("wavlm.encoder.layers.0.attention", [1, 3], [("out_proj", 0, 16), ("out_proj", 32, 48)], 2 * HEAD * (4 * 64 + 3)),
    # convolutions in four groups: a head a group; the groups that go had inputs of their own
    "squeezebert": (
        "transformer.encoder.layers.1.attention", [0, 2, 3], [("-post_attention.conv1d", 16, 32)], HEAD * (3 * 16 + 3 + 64),
    ),
    "ibert": ("ibert.encoder.layer.0.attention.self", [3], [("-output.dense", 0, 48)], 3 * HEAD * (4 * 64 + 3)),
    # two attentions share their scores: the words' heads go, and what the boxes' heads read of them stays
    "lilt": ("lilt.encoder.layer.0.attention.self", [0, 1, 2], [("-output.dense", 72, 96)], 24 * (96 + 1 + 96)),
    "longt5": ("encoder.block.0.layer.0.LocalSelfAttention", [1, 2], [("o", 0, 24), ("o", 72, 96)], 2 * 24 * 4 * 64),
    # a head is the difference of two attentions, over values of both halves
    "diffllama": ("model.layers.0.self_attn", [1], [("o_proj", 0, 48)], 48 * 2 * 64),
    # heads of convolutions beside those of attention, whose queries all of them read
    "convbert": ("convbert.encoder.layer.0.attention.self", [1, 2], [("-output.dense", 0, 16), ("-output.dense", 48, 64)], 0),
    # values, which the masks of all heads are made of, stay
    "doge": ("model.layers.0.self_attn", [0, 1], [("o_proj", 32, 64)], 32 * 2 * 64 + 16 * 64 + 32),
    "zaya": ("model.layers.1.self_attn", [2, 3], [("o_proj", 0, 48)], 0),
}  # fmt: skip


def outputs(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**inputs)
    return next(v for k, v in found.items() if torch.is_tensor(v) and v.is_floating_point() and k != "loss")


def size(model):
    return sum(p.numel() for p in model.parameters())


def near(one, other):
    return torch.allclose(one, other, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("kind", CASES)
def test_heads_go_as_if_nothing_read_them(kind, tmp_path, fresh):
    name, kept, gone, weights = CASES[kind]
    model, inputs, _ = build(kind)
    hand, dense = copy.deepcopy(model), outputs(model, inputs)
    for path, first, last in gone:
        above = name.rpartition(".")[0]
        with torch.no_grad():
            hand.get_submodule(f"{above}.{path[1:]}" if path.startswith("-") else f"{name}.{path}").weight[:, first:last] = 0
    before = size(model)
    hc.apply_(model, hc.Plan([hc.KeepHeads(name, kept)]))
    now = outputs(model, inputs)
    assert near(now, outputs(hand, inputs)) and not near(now, dense)
    assert before - size(model) == weights if weights else size(model) < before
    model.save_pretrained(tmp_path)
    loaded = fresh.outputs(type(model).__name__, tmp_path, inputs)
    assert any(torch.equal(tensor, now) for tensor in loaded.values() if tensor.shape == now.shape)


def test_spread_heads_are_cut_again_and_train(tmp_path, plain):
    """What is gone is gone from what is left; zeros stand in the places of both."""
    model, inputs, _ = build("codegen")
    hand, name = copy.deepcopy(model), "transformer.h.1.attn"
    for kept in ([0, 2, 3], [0, 2]):  # the second time of three: the first and the last
        hc.apply_(model, hc.Plan([hc.KeepHeads(name, kept)]))
    attention = {a.name: a for a in hc.discover(model).attentions}[name]
    assert (attention.num_heads, attention.head_dim) == (2, HEAD)
    with torch.no_grad():
        hand.get_submodule(f"{name}.out_proj").weight[:, 16:48] = 0
    assert near(outputs(model, inputs), outputs(hand, inputs))
    out = model.get_submodule(f"{name}.out_proj")
    assert out.weight.shape == (64, 32) and model.get_submodule(f"{name}.qkv_proj").weight.shape == (96, 64)
    for it in (model, hand):
        it.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    columns = hand.get_submodule(f"{name}.out_proj").weight.grad[:, [*range(16), *range(48, 64)]]
    assert torch.allclose(out.weight.grad, columns, atol=1e-6 * float(columns.abs().max()) + 1e-7)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        plain.outputs(type(model).__name__, tmp_path, inputs)


def test_neurons_of_a_statistic_over_all_and_of_experts_in_rows():
    """Gemma 3n's gates are compared with all gates, so these stay; DBRX's experts lie below one another in one matrix."""
    for kind, name, out, less in (
        ("gemma3n_text", "model.layers.0.mlp", "down_proj", 2 * 20 * 64),
        ("dbrx", "transformer.blocks.0.ffn.experts.mlp", None, 3 * 4 * 20 * 64),
        ("swiftformer", "swiftformer.encoder.network.0.blocks.1.linear", "fc2", None),
    ):
        model, inputs, _ = build(kind)
        ffn = {f.name: f for f in hc.discover(model).ffns}[name] if less else hc.discover(model).ffns[-1]
        name, hand, before = ffn.name, copy.deepcopy(model), size(model)
        kept = [n for n in range(ffn.size) if n % (ffn.size // 20) or n // (ffn.size // 20) >= 20]
        gone = [n for n in range(ffn.size) if n not in kept]
        with torch.no_grad():
            if out is None:
                hand.get_submodule(name).w2.view(4, ffn.size, -1)[:, gone] = 0
            else:
                hand.get_submodule(f"{name}.{out}").weight[:, gone] = 0
        hc.apply_(model, hc.Plan([hc.KeepNeurons(name, kept)]))
        assert near(outputs(model, inputs), outputs(hand, inputs)), kind
        assert before - size(model) == less if less else size(model) < before


def test_heads_of_experts_share_their_keys():
    """JetMoE: a head goes from every expert, and its keys and values with it."""
    model, inputs, _ = build("jetmoe")
    hand, before = copy.deepcopy(model), size(model)
    with torch.no_grad():
        hand.model.layers[0].self_attention.experts.output_linear.weight[:, :, :24] = 0
    hc.apply_(model, hc.Plan([hc.KeepHeads("model.layers.0.self_attention", [1])]))
    assert near(outputs(model, inputs), outputs(hand, inputs))
    assert before - size(model) == 24 * (4 * 64 * 2 + 2 * 64)  # four experts' rows and columns; keys and values


@pytest.mark.parametrize(
    "heads",
    [
        {"how": "spread", "keep": "0-64", "arguments": [["spread", 0, 64]]},  # a column that the projection does not have
        {"how": "input", "keep": [0, 1], "arguments": [["input", 0, 64]]},  # the form of other kinds
        {"how": "spread", "keep": "0-3"},
        {"how": "spread", "keep": "3-", "arguments": [["spread", 0, 64]]},
        {"how": "spread", "keep": "1 1 2", "arguments": [["spread", 0, 64]]},
        {"how": "spread", "keep": "", "arguments": [["spread", 0, 64]]},
        {"how": "spread", "keep": "0-3", "arguments": [["input", 0, 64]]},
        {"how": "spread", "keep": "0-3", "arguments": None},
        {"how": "interface", "keep": "0-3"},
    ],
)
def test_what_no_version_writes_is_refused(heads):
    whole = {"how": "spread", "keep": "0-63", "arguments": [["spread", 0, 64]]}
    assert check({"modules": {"q": {"heads": whole}}})
    with pytest.raises(hc.CompressionError):
        check({"modules": {"q": {"heads": heads}}})


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])

    def forward(self, hidden):
        return self.layers[1](torch.tanh(self.layers[0](hidden)))


class BoxesMLP(Boxes):
    pass


class Twins(PreTrainedModel):
    """One head's weights in three modules, of which one never runs: as in RT-DETR."""

    config_class = PretrainedConfig
    _tied_weights_keys = {"second": "first", "third": "first"}

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second, self.third = BoxesMLP(), BoxesMLP(), BoxesMLP()
        self.other = BoxesMLP()
        self.post_init()

    def forward(self, hidden_states):
        return (self.second(self.first(hidden_states)) + self.other(hidden_states),)


def test_the_same_weights_in_several_modules_are_cut_once():
    torch.manual_seed(0)
    model = Twins(PretrainedConfig())
    for twin in (model.second, model.third):
        for mine, first in zip(twin.layers, model.first.layers, strict=True):
            mine.weight, mine.bias = first.weight, first.bias
    hidden = torch.randn(3, 5, 8)
    assert [f.name for f in hc.discover(model).ffns] == ["first.layers", "other.layers"]
    hand = copy.deepcopy(model)
    with torch.no_grad():
        hand.first.layers[1].weight[:, [2, 7]] = 0
    kept = [n for n in range(12) if n not in (2, 7)]
    inputs = {"hidden_states": hidden}
    plan = hc.Plan([hc.KeepNeurons("first.layers", kept)])
    with torch.no_grad(), hc.mask_(model, plan):
        assert torch.allclose(model(hidden)[0], hand(hidden)[0], atol=1e-6)
    hc.apply_(model, plan, inputs=inputs)
    assert torch.allclose(model(hidden)[0], hand(hidden)[0], atol=1e-6)
    for i in (0, 1):  # still one parameter
        assert model.first.layers[i].weight is model.second.layers[i].weight is model.third.layers[i].weight
    assert model.third.layers[0].weight.shape == (10, 8) and model.other.layers[0].weight.shape == (12, 8)


def test_planners_leave_twins_alone():
    model = Twins(PretrainedConfig())
    model.second.layers, model.third.layers = nn.ModuleList(model.first.layers), nn.ModuleList(model.first.layers)
    for twin in (model.second, model.third):
        for i in (0, 1):
            twin.layers[i] = nn.Linear(8, 12) if i == 0 else nn.Linear(12, 8)
            twin.layers[i].weight, twin.layers[i].bias = model.first.layers[i].weight, model.first.layers[i].bias
    assert [edit.ffn for edit in plan_pruning(model, neurons=0.5, score="magnitude")] == ["other.layers"]


def test_attention_of_some_heads_is_torchs():
    """Half of the heads are torch's own result where the output projection reads nothing of the others."""
    torch.manual_seed(0)
    length, rows, heads, dim = 5, 2, 4, 3
    width = heads * dim
    x, mask = torch.randn(length, rows, width), torch.randn(rows * heads, length, length)
    padding = torch.zeros(rows, length, dtype=torch.bool)
    padding[1, -2:] = True
    w = {f"{n}_proj_weight": torch.randn(width, width) for n in "qkv"}
    b, out, bias = torch.randn(3 * width), torch.randn(width, width), torch.randn(width)
    keep = [1, 3]
    columns = [h * dim + i for h in keep for i in range(dim)]
    zeroed = torch.zeros_like(out)
    zeroed[:, columns] = out[:, columns]
    common = dict(key_padding_mask=padding, attn_mask=mask, use_separate_proj_weight=True)
    whole, _ = nn.functional.multi_head_attention_forward(
        x, x, x, width, heads, torch.empty(0), b, None, None, False, 0.0, zeroed, bias, False, **common, **w
    )
    few = {name: weight[columns] for name, weight in w.items()}
    b_few = b.view(3, width)[:, columns].flatten()
    some, shares = _attend(
        keep, x, x, x, width, heads, None, b_few, None, None, False, 0.0, out[:, columns], bias, False, **common, **few
    )
    assert torch.allclose(some, whole, atol=1e-5) and torch.allclose(shares.sum(-1), torch.ones(rows, length), atol=1e-6)


def test_what_is_taken_back_leaves_nothing_behind(monkeypatch):
    """A cut that is stopped half-way: the projections that chose their inputs choose no more."""
    model, _, _ = build("codegen")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    monkeypatch.setattr("hf_compress.surgery.stamp_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hc.apply_(model, hc.Plan([hc.KeepHeads("transformer.h.0.attn", [0, 1, 3])]))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {n: set(v) for n, v in before.items()}
