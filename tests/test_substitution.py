"""Low-rank and depthwise separable layers: the best fit there is, and the invariants over every family."""

import copy

import numpy as np
import pytest
import torch
import transformers as T
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.fits import best_kernels, best_rank, compose_kernels
from hf_compress.modules import LowRankLinear
from tests.zoo import FAMILIES, SEQ2SEQ, TEXT, build, outputs, random_plan

CONVOLUTIONS = {
    "resnet": lambda: T.ResNetForImageClassification(
        T.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=3)
    ),
    "regnet": lambda: T.RegNetForImageClassification(
        T.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, num_labels=3)
    ),
    "segformer": lambda: T.SegformerForImageClassification(
        T.SegformerConfig(
            hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 2], num_labels=3,
            sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
        )
    ),
    "whisper": lambda: build("whisper")[0],
}  # fmt: skip


def dense(module) -> np.ndarray:
    weight = module.weight.detach().double().numpy()
    return weight.T if isinstance(module, Conv1D) else weight


def truncated(weight: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def kind_of_linear(model) -> list[str]:
    layers = tuple(f"{x.name}." for x in hc.discover(model).layers)
    return [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and n.startswith(layers or ("",))]


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_is_the_truncated_svd_and_loads_equal(family, tmp_path, fresh, plain):
    model, batch = build(family)
    reference = copy.deepcopy(model)
    plan = hc.plan_low_rank(model, ratio=0.5)
    assert hc.Plan.from_dict(plan.to_dict()) == plan
    size = model.num_parameters()
    for edit in plan:
        module = reference.get_submodule(edit.module)
        best = truncated(dense(module), edit.rank)
        assert edit.rank == int(0.5 * best.size / sum(best.shape))
        module.weight.data.copy_(torch.tensor(best.T if isinstance(module, Conv1D) else best))
    before = outputs(model, batch)
    hc.apply_(model, plan)
    small = outputs(model, batch)
    assert (small - before).abs().max() > 1e-4, "a plan without effect proves nothing"
    torch.testing.assert_close(small, outputs(reference, batch), atol=2e-5, rtol=2e-5)
    assert model.num_parameters() < size
    model.save_pretrained(tmp_path)
    assert _same(fresh.outputs(type(model).__name__, tmp_path, batch), small)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)


def _same(found, expected) -> bool:
    return any(v.shape == expected.shape and torch.equal(v, expected) for v in found.values())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_batches_whiten_the_factors(family):
    """Independent check: least squares over the layer's real inputs, as numpy solves it, is not better."""
    model, batch = build(family)
    inputs: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(module, args):
            x = args[0].detach()
            if "attention_mask" in batch:
                x = x[batch["attention_mask"].bool()]
            inputs[name] = x.reshape(-1, x.shape[-1]).double().numpy()

        return hook

    plain_plan = hc.plan_low_rank(model, rank=6)
    hooks = [model.get_submodule(e.module).register_forward_pre_hook(keep(e.module)) for e in plain_plan]
    outputs(model, batch)
    for hook in hooks:
        hook.remove()
    plan = hc.plan_low_rank(model, [batch], rank=6)
    assert {e.module for e in plan} == {e.module for e in plain_plan} and all(e.given for e in plan)
    for edit in plan:
        weight, x = dense(model.get_submodule(edit.module)), inputs[edit.module]
        factors = [plan.tensors[f"{edit.module}.{k}"].double().numpy() for k in ("weight", "weight_in")]
        got = np.linalg.norm(x @ (weight - factors[0] @ factors[1]).T)
        # the best rank-r map on these inputs: projecting X W^T on its r leading right singular vectors
        y = x @ weight.T
        _, values, _ = np.linalg.svd(y, full_matrices=False)
        best = np.sqrt((values[6:] ** 2).sum())
        assert got <= best * 1.02 + 1e-3 * np.linalg.norm(y), edit.module
        plain_error = np.linalg.norm(x @ (weight - truncated(weight, 6)).T)
        assert got <= plain_error * 1.001
    hc.apply_(model, plan)
    first = plan.edits[0].module
    assert torch.equal(model.get_submodule(first).weight_in, plan.tensors[f"{first}.weight_in"])


def test_gram_matrices_in_several_passes_are_the_same(monkeypatch):
    model, batch = build("bert")
    once = hc.plan_low_rank(model, [batch], ratio=0.5)
    monkeypatch.setattr("hf_compress.grams.GRAM_BYTES", 1)
    assert hc.plan_low_rank(model, [batch], ratio=0.5) == once


def test_a_decoder_is_not_masked_by_the_encoder():
    from hf_compress.grams import measure_grams

    model, batch = build("t5")
    batch["decoder_input_ids"] = batch["input_ids"].flip(1)  # as long as the input, half of which is padding
    batch["attention_mask"][:, 5:] = 0
    names = [n for n in kind_of_linear(model) if n.endswith("SelfAttention.q")]
    grams = measure_grams(model, {n: model.get_submodule(n) for n in names}, [batch])
    seen = {}
    for n in names:
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: seen.update({n: args[0].detach()}))
    outputs(model, batch)
    for n in names:
        x = seen[n] if "decoder" in n else seen[n][:, :5]
        x = x.reshape(-1, x.shape[-1]).numpy()
        np.testing.assert_allclose(grams[n].numpy(), x.T @ x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_random_projection_is_never_better_than_the_fit(rank):
    weight, x = torch.randn(12, 9).double(), torch.randn(40, 9).double()
    x[:, 0] *= 10
    u, v = best_rank(weight, rank, x.T @ x)
    error = (x @ (weight - u @ v).T).square().sum()
    for _ in range(20):
        other = v + 0.05 * torch.randn_like(v)
        y = torch.linalg.lstsq(x @ other.T, x @ weight.T).solution
        assert (x @ weight.T - x @ other.T @ y).square().sum() >= error * (1 - 1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("multiplier", [1, 2, 4])
def test_kernels_are_the_best_per_channel(groups, multiplier):
    weight = torch.randn(8, 6 // groups, 3, 3, dtype=torch.float64)
    depth, point = best_kernels(weight, groups, multiplier)
    got = compose_kernels(depth, point, groups, multiplier)
    expected = np.zeros(tuple(weight.shape))
    for g in range(groups):
        rows = slice(g * 8 // groups, (g + 1) * 8 // groups)
        for i in range(6 // groups):
            matrix = weight[rows, i].reshape(8 // groups, 9).numpy()
            expected[rows, i] = truncated(matrix, multiplier).reshape(-1, 3, 3)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-10)
    if multiplier == 8 // groups:
        torch.testing.assert_close(got, weight)


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_depthwise_is_the_composed_convolution_and_loads_equal(family, tmp_path, fresh, plain):
    model = CONVOLUTIONS[family]().eval()
    batch = build("whisper")[1] if family == "whisper" else {"pixel_values": torch.randn(2, 3, 32, 32)}
    reference = copy.deepcopy(model)
    chosen = "conv2" if family == "whisper" else None
    plan = hc.plan_depthwise(model, modules=chosen)
    for edit in plan:
        conv = reference.get_submodule(edit.module)
        w = conv.weight.detach()
        for g in range(conv.groups):
            rows = slice(g * w.shape[0] // conv.groups, (g + 1) * w.shape[0] // conv.groups)
            for i in range(w.shape[1]):
                matrix = w[rows, i].flatten(1).numpy()
                w[rows, i] = torch.tensor(truncated(matrix, 1)).view_as(w[rows, i])
    before = outputs(model, batch)
    hc.apply_(model, plan)
    small = outputs(model, batch)
    assert (small - before).abs().max() > 1e-5
    torch.testing.assert_close(small, outputs(reference, batch), atol=2e-5, rtol=2e-5)
    model.save_pretrained(tmp_path)
    assert _same(fresh.outputs(type(model).__name__, tmp_path, batch), small)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
def test_padding_stride_and_dilation_stay(conv, mode):
    from hf_compress.kinds import separable_

    layer = conv(6, 8, 3, stride=2, padding=2, dilation=2, padding_mode=mode)
    depth, point = best_kernels(layer.weight.detach(), 1, 2)
    x = torch.randn(2, 6, *([17] * (len(layer.kernel_size))))
    reference = copy.deepcopy(layer)
    reference.weight.data.copy_(compose_kernels(depth, point, 1, 2))
    separable_(layer, 2)
    layer.weight.data.copy_(point)
    layer.weight_depth.data.copy_(depth)
    torch.testing.assert_close(layer(x), reference(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit", "t5"])
def test_low_rank_then_heads_and_neurons(family, tmp_path, fresh):
    """An edit on a module that an earlier one replaced covers what replaced it."""
    model, batch = build(family)
    low = hc.plan_low_rank(model, ratio=0.6)
    cut = random_plan(model, ("heads", "neurons"))
    hc.apply_(model, low)
    with hc.mask_(model, cut):
        masked = outputs(model, batch)
    hc.apply_(model, cut)
    both = outputs(model, batch)
    torch.testing.assert_close(both, masked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert _same(fresh.outputs(type(model).__name__, tmp_path, batch), both)
    in_one = build(family)[0]
    hc.apply_(in_one, low + cut)
    torch.testing.assert_close(outputs(in_one, batch), both, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_layers_go_after_low_rank(family, tmp_path, fresh):
    model, batch = build(family)
    hc.apply_(model, hc.plan_low_rank(model, ratio=0.5) + hc.Plan([hc.KeepLayers([0, 2])]))
    small = outputs(model, batch)
    model.save_pretrained(tmp_path)
    assert _same(fresh.outputs(type(model).__name__, tmp_path, batch), small)


def test_low_rank_layers_train_in_a_trainer(tmp_path):
    from tests.trainers import trainer

    model = build("bert")[0]
    hc.apply_(model, hc.plan_low_rank(model, ratio=0.3))
    name = hc.plan_low_rank(build("bert")[0], ratio=0.3).edits[0].module
    before = copy.deepcopy(model.get_submodule(name))
    run = trainer(tmp_path, [hc.PruningCallback(heads=0.5, neurons=0.5)], model=model)
    run.train()
    after = model.get_submodule(name)
    assert not torch.equal(after.weight_in, before.weight_in) and after.weight_in.shape[1] == before.weight_in.shape[1]
    run.save_model(tmp_path / "out")
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = build("bert")[1]
    assert torch.equal(outputs(again, batch), outputs(model.eval(), batch))


REFUSED = [
    ("rank too high", lambda m: hc.plan_low_rank(m, rank=60), "rank=60 is too high for .* above 31"),
    ("rank in an edit", lambda m: hc.apply_(m, hc.Plan([hc.LowRank(QUERY, 32)])), "Rank 32 of a 64 x 64 weight saves nothing"),
    ("rank 0", lambda m: hc.LowRank(QUERY, 0), ">= 1.*got 0"),
    ("ratio and rank", lambda m: hc.plan_low_rank(m, rank=4, ratio=0.5), "exactly one of ratio and rank"),
    ("neither", lambda m: hc.plan_low_rank(m), "exactly one of ratio and rank"),
    ("ratio 1", lambda m: hc.plan_low_rank(m, ratio=1.0), "in \\(0, 1\\), got 1.0"),
    ("bad pattern", lambda m: hc.plan_low_rank(m, rank=4, modules="("), "regular expression"),
    ("nothing matches", lambda m: hc.plan_low_rank(m, rank=4, modules="zzz"), "no Linear or Conv1D"),
    ("no batches", lambda m: hc.plan_low_rank(m, [], rank=4), "batches is empty"),
    ("a dict of batches", lambda m: hc.plan_low_rank(m, {"input_ids": 1}, rank=4), "sequence of dicts"),
    ("no such module", lambda m: hc.apply_(m, hc.Plan([hc.LowRank("encoder.quary", 4)])), "no module named"),
    ("an embedding", lambda m: hc.apply_(m, hc.Plan([hc.LowRank("embeddings.word_embeddings", 4)])), "takes a Linear"),
    ("no convolution", lambda m: hc.plan_depthwise(m), "no convolution"),
    ("a linear", lambda m: hc.apply_(m, hc.Plan([hc.DepthwiseSeparable(QUERY)])), "only a plain Conv1d or Conv2d"),
    ("twice", lambda m: hc.apply_(m, hc.Plan([hc.LowRank(QUERY, 4), hc.LowRank(QUERY, 2)])), "low-rank already"),
    ("lost tensors", lambda m: hc.apply_(m, hc.Plan([hc.LowRank(QUERY, 4, given=True)])), "planned with tensors"),
    (
        "tensors of nobody",
        lambda m: hc.apply_(m, hc.Plan([hc.LowRank(QUERY, 4)], {"x": torch.ones(1)})),
        "none of its edits uses",
    ),
    (
        "factors for another shape",
        lambda m: hc.apply_(
            m, hc.Plan([hc.KeepHeads("bert.encoder.layer.0.attention.self", [0])]) + hc.plan_low_rank(m, [BATCH], rank=4)
        ),
        "apply those first",
    ),
    ("a mask of it", lambda m: hc.mask_(m, hc.Plan([hc.LowRank(QUERY, 4)])), "cannot be masked"),
]
QUERY = "bert.encoder.layer.0.attention.self.query"
BATCH = {"input_ids": torch.arange(5, 25).view(2, 10)}


@pytest.mark.parametrize(("act", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_and_nothing_changed(act, message):
    model, batch = build("bert")
    before, kinds = outputs(model, batch), [type(m) for m in model.modules()]
    config = model.config.to_dict()
    with pytest.raises(hc.CompressionError, match=message):
        act(model)
    assert torch.equal(outputs(model, batch), before) and [type(m) for m in model.modules()] == kinds
    assert model.config.to_dict() == config


def test_a_weight_that_something_else_reads_is_refused():
    """A module that multiplies by another one's weight, past its forward: the proof sees it."""
    model, batch = build("bert")
    layer = model.bert.encoder.layer[0].intermediate
    plain_forward = type(layer).forward

    class Peeking(type(layer)):
        def forward(self, x):
            return plain_forward(self, x) + self.dense.weight.sum()

    layer.__class__ = Peeking
    before = outputs(model, batch)
    with pytest.raises(hc.CompressionError, match="Its weight is read by something else|Something else than its forward"):
        hc.apply_(model, hc.Plan([hc.LowRank("bert.encoder.layer.0.intermediate.dense", 8)]))
    assert torch.equal(outputs(model, batch), before)


def test_tied_weights_are_not_separated():
    model = build("gpt2")[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(hc.CompressionError, match="shares its weight with 'transformer.wte'"):
        hc.apply_(model, hc.Plan([hc.LowRank("lm_head", 4)]))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_that_changes_itself_on_short_inputs_is_put_back():
    """BigBird switches to full attention, for good, when what it is given is too short for blocks."""
    config = T.BigBirdConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=512, block_size=8, num_random_blocks=2,
    )  # fmt: skip
    model = T.BigBirdForSequenceClassification(config).eval()
    ids = torch.arange(256).remainder(90)[None] + 5
    before, tree = model(input_ids=ids).logits, [id(m) for m in model.modules()]
    with pytest.raises(hc.CompressionError, match="Pass inputs="):
        hc.plan_quantization(model, bits=8)
    assert [id(m) for m in model.modules()] == tree and torch.equal(model(input_ids=ids).logits, before)
    hc.apply_(model, hc.plan_quantization(model, bits=8, inputs={"input_ids": ids}), inputs={"input_ids": ids})


BROKEN = [
    ("NaN factors", lambda m: hc.Plan([hc.LowRank(QUERY, 4, given=True)], _factors(float("nan"))), "holds NaN or infinite"),
    ("a scale too large", lambda m: hc.Plan(
        [hc.Quantize(QUERY, 4, 16, given=True)],
        {f"{QUERY}.weight_scale": torch.full((64, 4), 1e6), f"{QUERY}.weight_zero": torch.zeros(64, 4, dtype=torch.uint8)},
    ), "that torch.float16 cannot"),
]  # fmt: skip


def _factors(value):
    return {f"{QUERY}.weight": torch.full((64, 4), value), f"{QUERY}.weight_in": torch.ones(4, 64)}


@pytest.mark.parametrize(("plan", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_tensors_that_would_break_the_model_are_refused(plan, message):
    model, batch = build("bert")
    before = outputs(model, batch)
    with pytest.raises(hc.CompressionError, match=message):
        hc.apply_(model, plan(model))
    assert torch.equal(outputs(model, batch), before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [({}, "keys of a batch are names"), ({"input_ids": torch.full((2, 4), 500)}, "does not run on a batch"),
     ({"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.zeros(2, 4).long()}, "hides every row")],
)  # fmt: skip
def test_batches_that_do_not_calibrate_are_refused(batch, message):
    with pytest.raises(hc.CompressionError, match=message):
        hc.plan_low_rank(build("bert")[0], [batch], rank=4)


def test_meta_and_broken_weights_are_refused():
    with torch.device("meta"):
        empty = T.BertModel(T.BertConfig(**TEXT))
    with pytest.raises(hc.CompressionError, match="meta device"):
        hc.apply_(empty, hc.Plan([hc.LowRank("encoder.layer.0.output.dense", 4)]))
    model = build("bert")[0]
    model.get_submodule(QUERY).weight.data[0, 0] = float("nan")
    with pytest.raises(hc.CompressionError, match="holds NaN"):
        hc.apply_(model, hc.Plan([hc.LowRank(QUERY, 4)]))


def test_modules_that_do_not_run_are_left_out():
    """A decoder alone has cross-attention that nothing uses."""
    model = T.BartForCausalLM(T.BartConfig(max_position_embeddings=40, **SEQ2SEQ))
    plan = hc.plan_low_rank(model, ratio=0.5)
    assert plan.edits and not any("encoder_attn" in edit.module for edit in plan)
    hc.apply_(model, plan)


def test_what_else_reads_a_weight_is_said_by_the_planner():
    """WavLM hands its projections' weights to a function of torch."""
    small = dict(conv_dim=(32, 32, 32), conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_feat_extract_layers=3)
    config = T.WavLMConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, **small,
    )  # fmt: skip
    model = T.WavLMModel(config)
    for plan in (hc.plan_low_rank(model, ratio=0.5), hc.plan_quantization(model, bits=8)):
        assert plan.edits and not any(edit.module.endswith("_proj") for edit in plan)
        hc.apply_(copy.deepcopy(model), plan)
    with pytest.raises(hc.CompressionError, match="reads the weight of 'encoder.layers.0.attention.q_proj'"):
        hc.plan_low_rank(model, ratio=0.5, modules="q_proj")
    with pytest.raises(hc.CompressionError, match="'encoder.layers.0.attention.q_proj'.*something else than its own forward"):
        hc.plan_quantization(model, bits=8, modules="q_proj")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_runs_when_a_plan_is_made_runs_in_its_proof(seed):
    """A router sends tokens by numbers that the replacements change: the proof keeps the choices of the model as it was."""
    torch.manual_seed(seed)
    config = T.SwitchTransformersConfig(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, num_experts=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, expert_capacity=64,
    )  # fmt: skip
    model = T.SwitchTransformersForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    for plan in (hc.plan_low_rank(model, ratio=0.3), hc.plan_quantization(model, bits=2)):
        assert any("experts" in edit.module for edit in plan)
        hc.apply_(copy.deepcopy(model), plan)


def test_the_module_that_computes_something_else_is_named(monkeypatch):
    model, batch = build("bert")
    before = outputs(model, batch)
    wrong, right = model.get_submodule(QUERY.replace("0", "1")), LowRankLinear.forward
    monkeypatch.setattr(LowRankLinear, "forward", lambda self, x: right(self, x) + 0.01 * (self is wrong))
    with pytest.raises(hc.CompressionError, match=r"takes the place of '\S*layer.1.attention.self.query' is off by"):
        hc.apply_(model, hc.Plan([hc.LowRank(QUERY, 4), hc.LowRank(QUERY.replace("0", "1"), 4)]))
    assert torch.equal(outputs(model, batch), before)


def rwkv(**more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=64, num_hidden_layers=4, attention_hidden_size=64, intermediate_size=96)
    return T.RwkvForCausalLM(T.RwkvConfig(**sizes, context_length=64, **more)).eval()


@pytest.mark.parametrize(
    "act",
    [lambda m: hc.plan_low_rank(m, ratio=0.5), lambda m: hc.plan_quantization(m, bits=8),
     lambda m: hc.mask_(m, hc.Plan([hc.KeepLayers([0, 1])])), lambda m: hc.apply_(m, hc.Plan([hc.Quantize("blocks.0.attention.key")]))],
)  # fmt: skip
def test_weights_that_a_model_divides_in_place_are_refused(act):
    model = rwkv(rescale_every=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(hc.CompressionError, match=r"rescale_every=2.*from_pretrained\(..., rescale_every=0\)"):
        act(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("make", [lambda m: hc.plan_low_rank(m, ratio=0.9), lambda m: hc.plan_quantization(m, bits=8)])
def test_rwkv_without_rescaling(make, tmp_path):
    """What the refusal says to do is the same function, and is saved as it is."""
    rwkv(rescale_every=2).save_pretrained(tmp_path / "dense")
    ids = {"input_ids": BATCH["input_ids"]}
    rescaled = outputs(T.RwkvForCausalLM.from_pretrained(tmp_path / "dense").eval(), ids)
    model = T.RwkvForCausalLM.from_pretrained(tmp_path / "dense", rescale_every=0).eval()
    torch.testing.assert_close(outputs(model, ids), rescaled, atol=1e-3, rtol=1e-3)
    hc.apply_(model, make(model))
    small = outputs(model, ids)
    assert 0 < (small - rescaled).abs().max() < 2 * rescaled.abs().max()  # of random weights, thinner ones say something else
    model.save_pretrained(tmp_path / "small")
    again = T.RwkvForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(outputs(again, ids), small) and torch.equal(outputs(again, ids), small)  # and not once more divided


def test_heads_then_bits_in_umt5():
    config = T.UMT5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    model = T.UMT5EncoderModel(config).eval()
    hc.apply_(model, hc.Plan([hc.KeepHeads("encoder.block.0.layer.0.SelfAttention", [0, 2])]))
    ids = {"input_ids": torch.arange(5, 25).view(2, 10)}
    before = outputs(model, ids)
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    assert 0 < (outputs(model, ids) - before).abs().max() < 0.3 * before.abs().max()
