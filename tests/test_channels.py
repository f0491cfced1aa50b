"""KeepChannels over families of convolutional models: mask == cut == zeros by hand, save == load, loud without the plugin."""

import copy
import json

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn

import hf_compress as hc
from tests.convolutional import CONVOLUTIONAL, build_convolutional, random_channels, zeroed
from tests.zoo import outputs

RESNET = "resnet.encoder.stages.{}.layers.{}.layer.{}"


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_cut_equals_mask_and_load_equals_save(family, tmp_path, fresh, plain):
    model, batch = build_convolutional(family)
    plan = random_channels(model)
    assert len(plan) > 1 and hc.Plan.from_dict(json.loads(json.dumps(plan.to_dict(spans=True)))) == plan
    dense, parameters = outputs(model, batch), model.num_parameters()
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    assert torch.equal(outputs(model, batch), dense), "the mask left something behind"
    assert (masked - dense).abs().max() > 1e-3 * dense.abs().max(), "a plan without effect proves nothing"
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(zeroed(model, plan))
    torch.testing.assert_close(outputs(by_hand, batch), masked, atol=1e-6, rtol=1e-5)
    hc.apply_(model, plan)
    cut = outputs(model, batch)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    assert model.num_parameters() < parameters
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, batch)["logits"], cut)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)


def test_the_weights_that_stay_are_those_of_a_smaller_resnet_sliced_by_name():
    """A stream, a block and a stem, cut by hand into the state dict of a stock model that is so wide."""
    model, batch = build_convolutional("resnet_basic")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stem, last = [0, 2, 3, 5, 7], [1, 2, 3, 4, 8, 9, 12, 15, 14]
    first, second = (f"resnet.encoder.stages.{i}.layers." for i in (0, 1))
    hc.apply_(model, hc.Plan([
        hc.KeepChannels(name + "convolution", last if name.startswith(second) else stem)
        for name in ("resnet.embedder.embedder.", first + "0.shortcut.", first + "0.layer.0.", first + "1.layer.0.",
                     second + "0.layer.1.", second + "0.layer.0.")
    ]))  # fmt: skip
    sizes = dict(embedding_size=5, hidden_sizes=[5, 9], depths=[2, 1])
    config = T.ResNetConfig(**sizes, layer_type="basic", downsample_in_first_stage=True)
    kept = {name: stem if ".stages.0" in name or "embedder" in name else sorted(last) for name in state}
    small = T.ResNetForImageClassification(config).eval()
    sliced = {}
    for name, value in state.items():
        rows = kept[name]
        if name == "classifier.1.weight":
            sliced[name] = value[:, sorted(last)]
        elif name.startswith("classifier") or value.ndim == 0:
            sliced[name] = value
        elif value.ndim == 1:
            sliced[name] = value[rows]
        else:
            reads_stage_0 = ".stages.1" in name and (".shortcut." in name or ".layer.0." in name)
            columns = [0, 1, 2] if "embedder" in name else (stem if reads_stage_0 or ".stages.0" in name else sorted(last))
            sliced[name] = value[rows][:, columns]
    small.load_state_dict(sliced)
    torch.testing.assert_close(outputs(model, batch), outputs(small, batch), atol=1e-6, rtol=1e-6)


def test_which_channels_go_together():
    model, _ = build_convolutional("efficientnet")
    groups = {group.name: group for group in hc.channel_groups(model)}
    expansion = groups["efficientnet.encoder.blocks.1.expansion.expand_conv"]
    assert expansion.writers == tuple(
        f"efficientnet.encoder.blocks.1.{name}"
        for name in ("expansion.expand_conv", "depthwise_conv.depthwise_conv", "squeeze_excite.expand")
    )
    assert expansion.readers == (
        "efficientnet.encoder.blocks.1.squeeze_excite.reduce",
        "efficientnet.encoder.blocks.1.projection.project_conv",
    )
    model, _ = build_convolutional("resnet")
    groups = {group.name: group for group in hc.channel_groups(model)}
    stream = groups["resnet.encoder.stages.0.layers.0.shortcut.convolution"]
    assert stream.writers[1:] == (RESNET.format(0, 0, 2) + ".convolution", RESNET.format(0, 1, 2) + ".convolution")
    assert len(stream.readers) == 3 and stream.fixed == () and stream.reason is None
    assert {c.name for c in hc.discover(model).convs} == {n for g in groups.values() for n in g.writers}


@pytest.mark.parametrize(
    ("name", "kept", "grouped"),
    [
        ("0", range(4, 12), (8, 8, 2)),  # whole groups: what they write goes with them
        ("1", range(4, 12), (8, 8, 2)),  # and what they read
        ("0", [0, 2, 5, 6, 9, 10, 12, 13], (8, 16, 4)),  # other channels of each group
        ("1", [4, 5, 6, 8, 9, 11], (8, 6, 2)),  # both
    ],
)
def test_convolutions_in_groups(name, kept, grouped, fresh, tmp_path):
    model, batch = build_convolutional("regnet_y")
    middle = "regnet.encoder.stages.0.layers.0.layer.{}.convolution"
    plan = hc.Plan([hc.KeepChannels(middle.format(name), kept)])
    before = model.get_submodule(middle.format(1)).weight.detach().clone()
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    conv = model.get_submodule(middle.format(1))
    assert (conv.in_channels, conv.out_channels, conv.groups) == grouped
    if name == "0" and grouped[2] == 4:  # row 4 is the first of the second group, which keeps its inputs 1 and 2
        assert torch.equal(conv.weight[4], before[4][[1, 2]])
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, batch)["logits"], outputs(model, batch))


def test_unequal_groups_are_refused():
    model, batch = build_convolutional("regnet_x")
    before = outputs(model, batch)
    name = "regnet.encoder.stages.0.layers.0.layer.0.convolution"
    with pytest.raises(hc.CompressionError, match="4 groups of 4 inputs, of which 4, 4, 4, 3 would be left"):
        hc.apply_(model, hc.Plan([hc.KeepChannels(name, range(15))]))
    assert torch.equal(outputs(model, batch), before)


REFUSED = [
    ("poolformer", "poolformer.encoder.patch_embeddings.0.projection", "norm 'poolformer.encoder.block.0.0.before_norm' takes"),
    ("wav2vec2", "wav2vec2.feature_extractor.conv_layers.2.conv", "norm 'wav2vec2.feature_projection.layer_norm' takes"),
    ("levit", "levit.encoder.stages.0.layers.0.module.queries_keys_values.linear", "split at fixed places"),
    ("resnet", "resnet.embedder.embedder.normalization", "is a BatchNorm2d"),
    ("resnet", "resnet.embedder.convolution", "did you mean 'resnet.embedder.embedder.convolution'"),
]


@pytest.mark.parametrize(("family", "name", "why"), REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(family, name, why):
    model, batch = build_convolutional(family)
    before, config = outputs(model, batch), model.config.to_dict()
    for change in (hc.apply_, hc.mask_):
        with pytest.raises(hc.CompressionError, match=why):
            change(model, hc.Plan([hc.KeepChannels(name, [0, 1])]))
    assert torch.equal(outputs(model, batch), before) and model.config.to_dict() == config


def test_convnext_and_the_outputs_of_a_base_model():
    config = T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    for group in hc.channel_groups(T.ConvNextForImageClassification(config)):
        assert len(group.fixed) == group.size and "takes its statistics over them" in group.reason
    base = build_convolutional("resnet")[0].resnet
    groups = hc.channel_groups(base)
    assert [g.reason for g in groups if g.fixed] == ["they are the model's output 'last_hidden_state'"]
    name = groups[0].name
    assert hc.apply_(base, hc.Plan([hc.KeepChannels(name, [1, 3])])).get_submodule(name).out_channels == 2


def test_indices_out_of_range_and_edits_in_a_row(fresh, tmp_path):
    model, batch = build_convolutional("efficientnet")
    name = "efficientnet.encoder.blocks.1.expansion.expand_conv"
    size = model.get_submodule(name).out_channels
    with pytest.raises(hc.CompressionError, match=f"names {size}, but there are {size} channels"):
        hc.apply_(model, hc.Plan([hc.KeepChannels(name, [0, size])]))
    twice = hc.Plan([hc.KeepChannels(name, range(4, 14)), hc.KeepChannels(name, [0, 1, 9])])
    once, in_turn = build_convolutional("efficientnet")[0], build_convolutional("efficientnet")[0]
    hc.apply_(model, twice)
    hc.apply_(once, hc.Plan([hc.KeepChannels(name, [4, 5, 13])]))
    for edit in twice:
        hc.apply_(in_turn, hc.Plan([edit]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), once.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), in_turn.state_dict().values(), strict=True))
    in_turn.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, batch)["logits"], outputs(once, batch))


@pytest.mark.parametrize("when", ["proof", "end"])
def test_all_or_nothing(when, monkeypatch):
    """Ctrl-C in the middle leaves every tensor, number and the config as they were."""
    from hf_compress import channel_proof, surgery

    model, batch = build_convolutional("regnet_y")
    before = outputs(model, batch)
    tensors = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()]}
    numbers = {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()}
    config, calls = model.config.to_dict(), []
    plan = random_channels(model)

    def interrupt(*args, **kwargs):
        calls.append(args)
        if when == "end" or len(calls) == 2:  # the second comparison is that of the cut model
            raise KeyboardInterrupt

    monkeypatch.setattr(*((channel_proof, "_compare") if when == "proof" else (surgery, "stamp_")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        hc.apply_(model, plan)
    assert calls
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == tensors.keys() and all(after[n] is t for n, t in tensors.items())
    assert numbers == {n: {k: v for k, v in vars(m).items() if type(v) is int} for n, m in model.named_modules()}
    assert model.config.to_dict() == config and torch.equal(outputs(model, batch), before)


def test_masks_add_up_train_and_are_saved_as_zeros(tmp_path, plain):
    model, batch = build_convolutional("regnet_y")
    plan = random_channels(model)
    one, other = hc.Plan(plan.edits[:4]), hc.Plan(plan.edits[4:])
    with hc.mask_(model, plan):
        both = outputs(model, batch)
    dense = outputs(model, batch)
    first = hc.mask_(model, one)
    second = hc.mask_(model, other)
    assert torch.equal(outputs(model, batch), both)
    with pytest.raises(hc.CompressionError, match="is masked; remove that mask first"):
        hc.apply_(model, plan)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, batch), both)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(plain.outputs(type(model).__name__, tmp_path, batch)["logits"], both, atol=1e-6, rtol=1e-5)
    model(**batch)[0].square().sum().backward()
    expected = zeroed(twin, plan)
    for name, parameter in model.named_parameters():
        if name.endswith("convolution.weight"):
            assert bool((parameter.grad[(expected[name] == 0)] == 0).all())
    first.remove()
    with hc.mask_(build_convolutional("regnet_y")[0], other) as _, torch.no_grad():
        pass
    second.remove()
    assert torch.equal(outputs(model, batch), dense)
    assert [type(m) for m in model.modules()] == [type(m) for m in build_convolutional("regnet_y")[0].modules()]


def test_with_every_other_edit(tmp_path, fresh, plain):
    """Heads, neurons and channels in one plan; trained; then separable and low-rank; channels after those; then quantized."""
    model, batch = build_convolutional("wav2vec2")
    structure = hc.discover(model)
    conv = "wav2vec2.feature_extractor.conv_layers.{}.conv"
    plan = hc.Plan([hc.KeepHeads(structure.attentions[0].name, [1]), hc.KeepChannels(conv.format(0), range(1, 11))])
    plan += hc.Plan([hc.KeepNeurons(structure.ffns[-1].name, range(5, 20)), hc.KeepChannels(conv.format(1), range(3, 15))])
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "one")
    model = type(model).from_pretrained(tmp_path / "one", mask_time_prob=0.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(outputs(model, batch), masked)
    hc.apply_(model, hc.Plan([hc.DepthwiseSeparable(conv.format(1), 2), hc.LowRank("projector", 4)]))
    again = hc.Plan([hc.KeepChannels(conv.format(0), [1, 2, 4, 9]), hc.KeepChannels(conv.format(1), [0, 5, 11])])
    with hc.mask_(model, again):
        masked = outputs(model, batch)
        kernels = model.state_dict()[f"{conv.format(1)}.weight_depth"]
        assert (kernels.flatten(1) == 0).all(1).nonzero().flatten().tolist() == [0, 1, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]
    hc.apply_(model, again)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    separable = model.get_submodule(conv.format(1))
    assert (separable.in_channels, separable.out_channels, separable.multiplier) == (4, 3, 2)
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    done = outputs(model, batch)
    model.save_pretrained(tmp_path / "two")
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path / "two", batch)["logits"], done)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path / "two", batch)


def test_bfloat16_and_what_stays_as_it_was():
    model, batch = build_convolutional("resnet", torch.bfloat16)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(torch.bfloat16) if buffer.is_floating_point() else buffer.data
    modules, grads = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    calls = []
    model.classifier[1].register_forward_hook(lambda *a: calls.append(a))
    hc.apply_(model, random_channels(model))
    assert all(modules[n] is m for n, m in model.named_modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {torch.bfloat16, torch.int64}
    calls.clear()
    assert outputs(model, batch).dtype == torch.bfloat16 and len(calls) == 1


def test_the_loader_refuses_what_no_cut_writes_and_what_is_missing(tmp_path):
    model, batch = build_convolutional("resnet")
    hc.apply_(model, random_channels(model))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("running_var"))
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hc.CompressionError, match=f"lacks weights that were compressed.*{lost}"):
        type(model).from_pretrained(tmp_path)
    layout = copy.deepcopy(model.config.quantization_config.layout)
    norm = next(entry["shapes"] for entry in layout["modules"].values() if "running_var" in entry.get("shapes", {}))
    norm["running_var"] = [1000]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"layout": json.dumps(layout), "digest": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hc.CompressionError, match=r"running_var the shape \[1000\], but this model has \["):
        type(model).from_pretrained(tmp_path)


def test_plan_pruning_takes_the_channels_with_the_smallest_weights():
    model, batch = build_convolutional("resnet")
    name = RESNET.format(0, 0, 0) + ".convolution"
    reader = RESNET.format(0, 0, 1) + ".convolution"
    with torch.no_grad():
        for channel in (1, 2):
            model.get_submodule(name).weight[channel] *= 1e-3
            model.get_submodule(reader).weight[:, channel] *= 1e-3
    plan = hc.plan_pruning(model, channels=0.5, score="magnitude", scope="layer")
    kept = {edit.conv: edit.channels for edit in plan}
    assert kept[name] == (0, 3) and {len(c) * 2 for c in kept.values()} == {4, 6, 8, 16, 24}
    one = model.get_submodule(name).weight.detach().double().square().sum((1, 2, 3))
    two = model.get_submodule(reader).weight.detach().double().square().sum((0, 2, 3))
    most = hc.plan_pruning(model, channels=0.75, score="magnitude", scope="layer")
    assert {e.conv: e.channels for e in most}[name] == (int((one + two).argmax()),)
    hc.apply_(model, plan)
    assert outputs(model, batch).isfinite().all()


@pytest.mark.parametrize("family", ["regnet_x", "levit"])
def test_planned_channels_fit_the_groups(family):
    model, batch = build_convolutional(family)
    parameters = model.num_parameters()
    plan = hc.plan_pruning(model, channels=0.5, score="random", seed=3)
    assert plan == hc.plan_pruning(model, channels=0.5, score="random", seed=3)
    taylor = hc.plan_pruning(model, [batch], channels=0.5, loss_fn=lambda out, _: out.logits.square().mean())
    hc.apply_(copy.deepcopy(model), taylor)
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    assert model.num_parameters() < 0.8 * parameters


def test_a_cut_model_costs_less_and_says_so():
    model, batch = build_convolutional("resnet_basic")
    dense = copy.deepcopy(model)
    name = RESNET.format(0, 0, 0) + ".convolution"
    hc.apply_(model, hc.Plan([hc.KeepChannels(name, [0, 1])]))
    report = hc.measure(model, batch, against=dense, repeats=1, warmup=0)
    positions = outputs(dense, batch).shape[0] * 4 * 4  # the first stage halves what the stem (stride 2) and the pooling left
    assert report.against.macs - report.model.macs == positions * 9 * (8 * 6 + 6 * 8)
    assert report.against.parameters - report.model.parameters == 9 * (8 * 6 + 6 * 8) + 2 * 6
    row = next(line for line in str(hc.discover(model)).splitlines() if name in line)
    assert row.split() == ["conv", name, "8", "->", "2,", "3x3"]
    assert str(hc.Plan([hc.KeepChannels(name, [0, 1, 5])])).splitlines()[1].split() == [
        "KeepChannels",
        name,
        "keep",
        "3:",
        "0-1",
        "5",
    ]


class Wiring(nn.Module):
    """What no family above has, in one: concatenation, shuffled channels, several kernels a channel, a transposed
    convolution, a norm of each channel, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.norm = nn.GroupNorm(10, 10)
        self.depth = nn.Conv2d(10, 20, 3, groups=10)
        self.scale = nn.Parameter(torch.randn(20, 1, 1))
        self.up = nn.ConvTranspose2d(20, 5, 2)
        self.act = nn.PReLU(5)
        self.head = nn.Linear(5 * 5 * 5, 2)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # shuffled
        x = self.depth(self.norm(x)) * self.scale
        return self.head(self.act(self.up(x)).flatten(1))


def test_concatenated_shuffled_and_flattened_channels():
    torch.manual_seed(0)
    model, x = Wiring().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.norm.weight.normal_()
        model.norm.bias.normal_()
        groups = {group.name: group for group in hc.channel_groups(model, {"x": x})}
        assert {n: (g.writers, g.readers) for n, g in groups.items()} == {
            "a": (("a",), ("up",)), "b": (("b",), ("up",)), "up": (("up",), ("head",)),
        }  # fmt: skip
        # the shuffled order is a0 b1 a1 b2 a2 b3 a3 b4 b0 b5, two kernels each. With a0, a2 and b0, b2 it would be another one
        with pytest.raises(hc.CompressionError, match="differs from its mask"):
            hc.apply_(model, hc.Plan([hc.KeepChannels("a", [0, 2]), hc.KeepChannels("b", [0, 2])]), inputs={"x": x})
        plan = hc.Plan([hc.KeepChannels("a", [0, 2]), hc.KeepChannels("b", [1, 3]), hc.KeepChannels("up", [1, 4])])
        kept = [0, 1, 2, 3, 8, 9, 10, 11]  # by hand
        hidden = model.depth(model.norm(_shuffled(torch.cat([model.a(x), model.b(x)], 1)))) * model.scale
        up = nn.functional.conv_transpose2d(hidden[:, kept], model.up.weight[kept], model.up.bias)
        up = nn.functional.prelu(up, model.act.weight)
        columns = model.head.weight.view(2, 5, 25)[:, [1, 4]].flatten(1)
        expected = nn.functional.linear(up[:, [1, 4]].flatten(1), columns, model.head.bias)
        with hc.mask_(model, plan, inputs={"x": x}):
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
            assert bool((model.state_dict()["up.weight"][[4, 5]] == 0).all())
        hc.apply_(model, plan, inputs={"x": x})
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert (model.norm.num_groups, model.depth.groups, model.depth.out_channels, model.up.in_channels) == (4, 4, 8, 8)
    assert model.scale.shape == (8, 1, 1) and model.head.in_features == 50


def _shuffled(x):
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Odd(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.between = between
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


ODD = {
    "softmax": (lambda m, h: h.softmax(1), "softmax runs over them"),
    "mean": (lambda m, h: h * h.mean(1, keepdim=True), r"reduction over channels \(mean\)"),
    "norm": (lambda m, h: nn.functional.normalize(h), "reduction over channels"),
    "a constant": (lambda m, h: h * torch.arange(4.0).view(1, 4, 1, 1), "has no such channels"),
    "one of them": (lambda m, h: h + h[:, 1:2] * h[:, 2].unsqueeze(1), "taken by their number"),
    "a fixed order": (lambda m, h: h[:, torch.tensor([3, 1, 2, 0])], "taken by their number"),
    "a gram matrix": (lambda m, h: (h.flatten(2) @ h.flatten(2).transpose(1, 2) @ h.flatten(2)).view_as(h), "not followed|product"),
    "fft": (lambda m, h: torch.fft.fft(h, dim=1).real, "not followed"),
    "a computed weight": (lambda m, h: torch.einsum("bchw,dc->bdhw", h, m.table.softmax(0)), "runs over them|computed"),
    "a bare weight": (lambda m, h: torch.einsum("bchw,dc->bdhw", h, m.table), "no plain convolution or Linear"),
    "a view": (lambda m, h: h.view(2, 2, 2, 8, 8).flip(1).reshape(2, 4, 8, 8), r"fails with RuntimeError: shape .* is invalid"),
    "a slice": (lambda m, h: torch.cat([h[:, :2].relu(), h[:, 2:]], 1), "differs from its mask"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_channels_that_something_else_sees_are_refused(what):
    torch.manual_seed(0)
    between, why = ODD[what]
    model, x = Odd(between).eval(), torch.randn(2, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(hc.CompressionError, match=why):
        hc.apply_(model, hc.Plan([hc.KeepChannels("first", [1, 2, 3])]), inputs={"x": x})
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())
    assert (model.first.out_channels, model.second.in_channels) == (4, 4)


def test_what_is_shared_or_did_not_run_is_refused():
    model, x = Odd(lambda m, h: h).eval(), torch.randn(2, 3, 8, 8)
    model.third = nn.Conv2d(3, 4, 3)
    with pytest.raises(hc.CompressionError, match="'third': it did not run"):
        hc.apply_(model, hc.Plan([hc.KeepChannels("third", [1])]), inputs={"x": x})
    model.third.weight = model.first.weight
    with pytest.raises(hc.CompressionError, match="'first.weight' is shared with 'third.weight'"):
        hc.apply_(model, hc.Plan([hc.KeepChannels("first", [1])]), inputs={"x": x})
