"""Experts: removed exactly or refused, in every kind of mixture; saved, loaded, trained, planned."""

import copy
import pickle
import sys

import pytest
import torch
import transformers as T
from torch.nn import functional as F

import hf_compress as hc
from hf_compress.expert_plans import measure_experts
from hf_compress.mixtures import Mixture
from tests.mixing import FAMILIES, REFUSED, batch, build, logits, plan
from tests.zoo import random_plan

EXACT = [name for name in FAMILIES if name not in REFUSED]


# --- what a masked router means, computed by hand ----------------------------------------------------------------


def by_hand(block, hidden, kept, choose):
    """The sum of the chosen experts' outputs, one token and one expert at a time."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    scores = rows @ block.gate.weight.T
    out = torch.zeros_like(rows)
    for t, (row, score) in enumerate(zip(rows, scores, strict=True)):
        for expert, weight in choose(block, score, kept):
            gate, up = (row @ block.experts.gate_up_proj[expert].T).chunk(2)
            out[t] += weight * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
    return out.view_as(hidden)


def mixtral_choice(block, score, kept):
    best = sorted(kept, key=lambda e: -score[e])[:2]
    shares = torch.stack([score[e] for e in best]).softmax(0)
    return zip(best, shares, strict=True)


def qwen2_choice(block, score, kept):
    shares = torch.stack([score[e] for e in kept]).softmax(0)  # over all that stay, not renormalized over the two
    return sorted(zip(kept, shares, strict=True), key=lambda pair: -pair[1])[:2]


def deepseek_v3_choice(block, score, kept):
    share, rank = score.sigmoid(), score.sigmoid() + block.gate.e_score_correction_bias
    groups = [[e for e in kept if e // 4 == g] for g in range(2)]
    group = max(groups, key=lambda g: sum(sorted((rank[e] for e in g), reverse=True)[:2]))
    best = sorted(group, key=lambda e: -rank[e])[:2]
    total = sum(share[e] for e in best)
    return [(e, share[e] / total * block.gate.routed_scaling_factor) for e in best]


@pytest.mark.parametrize(
    ("family", "choose", "kept"),
    [("mixtral", mixtral_choice, (1, 2, 6)), ("qwen2_moe", qwen2_choice, (0, 3, 5, 7)), ("deepseek_v3", deepseek_v3_choice, (0, 3, 5, 6))],
)  # fmt: skip
def test_a_mixture_without_experts_is_what_the_paper_says_of_the_ones_that_stay(family, choose, kept):
    model, _ = build(family)
    name = "model.layers.1.mlp"
    dense = copy.deepcopy(model.get_submodule(name))
    hidden = torch.randn(2, 16, 32)
    cut_plan = hc.Plan([hc.KeepExperts(name, kept)])
    block = model.get_submodule(name)

    def routed(module):
        with torch.no_grad():
            out = module(hidden)
            if family == "qwen2_moe":
                rows = hidden.view(-1, 32)
                out = out - (dense.shared_expert_gate(rows).sigmoid() * dense.shared_expert(rows)).view_as(out)
            return out - dense.shared_experts(hidden) if family == "deepseek_v3" else out

    with torch.no_grad():
        expected = by_hand(dense, hidden, kept, choose)
    with hc.mask_(model, cut_plan):
        torch.testing.assert_close(routed(block), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(routed(block), routed(dense), atol=0, rtol=0)
    hc.apply_(model, cut_plan)
    torch.testing.assert_close(routed(block), expected, atol=1e-6, rtol=1e-4)
    index = torch.tensor(kept)
    assert torch.equal(block.gate.weight, dense.gate.weight[index])
    assert torch.equal(block.experts.down_proj, dense.experts.down_proj[index])


# --- the invariants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXACT)
def test_cut_equals_mask_and_load_equals_save(family, tmp_path, fresh, plain):
    model, inputs = build(family)
    cut_plan = plan(model)
    assert hc.Plan.from_dict(cut_plan.to_dict()) == hc.Plan.from_dict(cut_plan.to_dict(spans=True)) == cut_plan
    dense = logits(model, inputs)
    parameters = model.num_parameters()
    check_picks(family, model, inputs)
    with hc.mask_(model, cut_plan):
        masked = logits(model, inputs)
    assert torch.equal(logits(model, inputs), dense), "the mask left something behind"
    assert (masked - dense).abs().max() > 1e-3, "a plan without effect proves nothing"
    hc.apply_(model, cut_plan)
    cut = logits(model, inputs)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    assert model.num_parameters() < parameters
    assert {m.name: m.num_experts for m in hc.discover(model).experts} == {e.moe: len(e.experts) for e in cut_plan}

    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, inputs)["logits"], cut)
    if getattr(model.config, "quantization_config", None) is None:  # one mixture, so stock
        assert len(cut_plan) == 1
        assert torch.equal(plain.outputs(type(model).__name__, tmp_path, inputs)["logits"], cut)
    else:
        with pytest.raises(RuntimeError, match="mismatch"):
            plain.outputs(type(model).__name__, tmp_path, inputs)


def check_picks(family, model, inputs):
    """The planner sees what every router picks."""
    mixtures = hc.discover(model).experts
    frequency, weight = measure_experts(model, mixtures, [inputs])
    for mixture in mixtures:
        picks = frequency[mixture.name].sum().item()
        assert picks == pytest.approx(mixture.top_k) or (family == "switch_transformers" and 0 < picks <= 1)
        assert ((weight[mixture.name] > 0) == (frequency[mixture.name] > 0)).all()


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2_greedy", "dbrx", "switch_transformers", "aria_text"])
def test_equal_numbers_stay_stock(family, tmp_path, plain):
    model, inputs = build(family)
    hc.apply_(model, plan(model, uneven=False))
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path)
    assert torch.equal(plain.outputs(type(model).__name__, tmp_path, inputs)["logits"], logits(model, inputs))


def test_a_whole_group_of_experts_goes():
    model, inputs = build("deepseek_v3")
    cut_plan = hc.Plan([hc.KeepExperts(m.name, [4, 6, 7]) for m in hc.discover(model).experts])
    with hc.mask_(model, cut_plan):
        masked = logits(model, inputs)
    hc.apply_(model, cut_plan)
    torch.testing.assert_close(logits(model, inputs), masked, atol=1e-5, rtol=1e-5)
    assert (model.config.n_routed_experts, model.config.n_group) == (3, 1)
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba"])
def test_generation_is_that_of_the_masked_model(family):
    model, inputs = build(family)
    cut_plan = plan(model, seed=1)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1)
    with hc.mask_(model, cut_plan):
        expected = model.generate(input_ids=inputs["input_ids"], **options)
    assert not torch.equal(model.generate(input_ids=inputs["input_ids"], **options), expected)
    hc.apply_(model, cut_plan)
    assert torch.equal(model.generate(input_ids=inputs["input_ids"], **options), expected)


def test_every_implementation_of_experts_gives_the_masked_function():
    model, inputs = build("qwen3_moe")
    cut_plan = plan(model)
    with hc.mask_(model, cut_plan):
        expected = logits(model, inputs)
    hc.apply_(model, cut_plan)
    for how in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(how)
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "switch_transformers"])
def test_a_cut_model_trains_is_saved_and_is_cut_again(family, tmp_path, fresh):
    model, inputs = build(family)
    hc.apply_(model, plan(model))
    model.save_pretrained(tmp_path / "one")
    loaded = type(model).from_pretrained(tmp_path / "one").train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    losses, labels = [], inputs.get("decoder_input_ids", inputs["input_ids"]).clone(memory_format=torch.contiguous_format)
    for _ in range(3):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss = loaded(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    loaded.eval()
    more = hc.Plan(
        hc.KeepExperts(m.name, [0, m.num_experts - 1] if m.groups == 1 else [0, 1, m.num_experts - 2, m.num_experts - 1])
        for m in hc.discover(loaded).experts
    )
    with hc.mask_(loaded, more):
        masked = logits(loaded, inputs)
    hc.apply_(loaded, more)
    torch.testing.assert_close(logits(loaded, inputs), masked, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "two")
    found = fresh.outputs(type(model).__name__, tmp_path / "two", inputs)
    assert torch.equal(found["logits"], logits(loaded, inputs))


def test_the_base_model_loads_alone(tmp_path):
    model, inputs = build("mixtral")
    hc.apply_(model, plan(model))
    model.save_pretrained(tmp_path)
    base = T.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_with_heads_neurons_and_layers_in_one_plan(tmp_path, fresh):
    model, inputs = build("qwen2_moe")
    halves = hc.Plan(hc.KeepNeurons(ffn.name, range(0, ffn.size, 2)) for ffn in hc.discover(model).ffns)
    whole = random_plan(model, ("heads",)) + halves + plan(model) + hc.Plan([hc.KeepLayers([1])])
    whole += hc.Plan([hc.KeepExperts("model.layers.0.mlp", [0, 3])])  # of the layer that was the second
    with hc.mask_(model, whole):
        masked = logits(model, inputs)
    hc.apply_(model, whole)
    assert model.num_experts == 2
    cut = logits(model, inputs)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, inputs)["logits"], cut)


def test_experts_that_are_modules_take_their_own_cuts_along(tmp_path, fresh):
    """Switch: expert 5, with 7 neurons, moves up when others go, and its record with it; expert 2's goes with it."""
    model, inputs = build("switch_transformers")
    name = "encoder.block.1.layer.1.mlp"
    many = torch.randint(5, 99, (16, 24))
    neurons = hc.Plan([hc.KeepNeurons(f"{name}.experts.expert_{e}", range(5 + i)) for i, e in enumerate((1, 2, 5))])
    hc.apply_(model, neurons, inputs={"input_ids": many, "decoder_input_ids": many})
    experts = hc.Plan([hc.KeepExperts(name, [1, 4, 5, 6])])
    with hc.mask_(model, experts):
        masked = logits(model, inputs)
    hc.apply_(model, experts)
    widths = [expert.wi.out_features for expert in model.get_submodule(f"{name}.experts").values()]
    assert widths == [5, 24, 7, 24]
    cut = logits(model, inputs)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, inputs)["logits"], cut)


def test_bfloat16_keeps_its_dtype_and_loads_to_the_bit(tmp_path):
    model, inputs = build("mixtral", torch.bfloat16)
    hc.apply_(model, plan(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), inputs), logits(model, inputs))


# --- masks -------------------------------------------------------------------------------------------------------


def test_masks_add_up_and_copies_keep_them():
    model, inputs = build("minimax_m2")
    name = "model.layers.0.mlp"
    dense = logits(model, inputs)
    with hc.mask_(model, hc.Plan([hc.KeepExperts(name, [0, 1, 2, 4])])):
        both = logits(model, inputs)
    first = hc.mask_(model, hc.Plan([hc.KeepExperts(name, range(6))]))
    second = hc.mask_(model, hc.Plan([hc.KeepExperts(name, [0, 1, 2, 4, 6])]))
    assert torch.equal(logits(model, inputs), both)
    assert torch.equal(logits(copy.deepcopy(model), inputs), both)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), both)
    with pytest.raises(hc.CompressionError, match="masked"):
        hc.apply_(model, hc.Plan([hc.KeepExperts(name, [0, 1])]))
    first.remove()
    second.remove()
    assert torch.equal(logits(model, inputs), dense)


def test_a_forward_that_fails_leaves_no_mask_behind():
    model, inputs = build("mixtral")
    with hc.mask_(model, plan(model)):
        experts = model.model.layers[0].mlp.experts
        handle = experts.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, inputs)
        handle.remove()
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        assert F.linear(torch.ones(1, 32), router.weight).isfinite().all()


def test_what_is_masked_gets_no_gradient_also_when_checkpointed():
    model, inputs = build("mixtral")
    model.train()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    with hc.mask_(model, hc.Plan([hc.KeepExperts("model.layers.0.mlp", [1, 4, 5])])):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    block = model.model.layers[0].mlp
    for gradient in (block.gate.weight.grad, block.experts.gate_up_proj.grad, block.experts.down_proj.grad):
        assert gradient.flatten(1).any(1).tolist() == [e in (1, 4, 5) for e in range(8)]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kept", "said"),
    [
        ("mixtral", [3], "every token needs 2"),
        ("mixtral", [0, 8], "there are 8 experts"),
        ("deepseek_v3", [0, 1, 2, 4, 5], "equally many experts"),
        ("deepseek_v3", [0, 4], "2 or more"),
        ("deepseek_v2", [0, 4], "a token needs 2 from 1"),
        ("nllb_moe", range(4), "does not follow its row of the router|is never used"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_changes(family, kept, said):
    model, _ = build(family)
    before = copy.deepcopy(model.state_dict())
    name = hc.discover(model).experts[0].name
    with pytest.raises(hc.CompressionError, match=said):
        hc.apply_(model, hc.Plan([hc.KeepExperts(name, kept)]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hc.discover(model).experts[0].num_experts == 8


def test_a_wrong_name_is_told_the_nearest():
    model, _ = build("mixtral")
    with pytest.raises(hc.CompressionError, match=r"no mixture of experts named .* did you mean 'model.layers.1.mlp'"):
        hc.apply_(model, hc.Plan([hc.KeepExperts("model.layers.1.moe", [0, 1])]))


@pytest.mark.parametrize("what", [ValueError, KeyboardInterrupt])
def test_an_error_on_the_way_puts_everything_back(what, monkeypatch):
    model, inputs = build("deepseek_v3")
    before, sizes = logits(model, inputs), {n: p.shape for n, p in model.state_dict().items()}

    def fail(*_, **__):
        raise what("on the way")

    monkeypatch.setattr("hf_compress.surgery.stamp_", fail)
    with pytest.raises(what):
        hc.apply_(model, plan(model))
    assert {n: p.shape for n, p in model.state_dict().items()} == sizes
    assert torch.equal(logits(model, inputs), before)
    assert model.config.n_routed_experts == model.model.layers[0].mlp.gate.num_experts == 8


def test_a_router_that_a_name_misleads_about_is_refused(monkeypatch):
    """Whatever `discover` says, a weight that does not follow the router's rows is not cut."""
    model, _ = build("mixtral")
    found = hc.discover(model)
    wrong = [Mixture(m.name, 8, 2, 24, m.router.replace("gate.weight", "experts.down_proj")) for m in found.experts]
    monkeypatch.setattr(sys.modules["hf_compress.discover"], "find_mixtures", lambda modules: iter(wrong))
    with pytest.raises(hc.CompressionError, match="exactly, so nothing was changed"):
        hc.apply_(model, hc.Plan([hc.KeepExperts(wrong[0].name, [0, 1, 2])]))


def test_a_table_that_sends_tokens_to_experts_is_refused():
    """A router whose choice is not its scores' (DeepSeek-V4's hash layers) still picks what goes."""

    class Hashed(T.models.mixtral.modeling_mixtral.MixtralTopKRouter):
        def forward(self, hidden_states):
            scores, weights, index = super().forward(hidden_states)
            fixed = torch.arange(index.numel()).view_as(index) % 8
            return scores, scores.sigmoid().gather(1, fixed), fixed

    model, _ = build("mixtral")
    model.model.layers[0].mlp.gate.__class__ = Hashed
    with pytest.raises(hc.CompressionError, match="exactly, so nothing was changed: without them it fails"):
        hc.apply_(model, hc.Plan([hc.KeepExperts("model.layers.0.mlp", [0, 1, 2])]))


# --- the loss that balances experts ------------------------------------------------------------------------------


def test_the_balancing_loss_counts_the_experts_that_stay():
    model, inputs = build("mixtral")
    hc.apply_(model, plan(model, uneven=False))
    assert model.num_experts == 5
    found = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    shares = torch.stack([scores.softmax(-1) for scores in found.router_logits])  # (layers, tokens, experts)
    picked = torch.zeros_like(shares).scatter_(-1, shares.topk(2, -1).indices, 1.0)
    expected = 5 * (picked.mean((0, 1)) * shares.mean((0, 1))).sum()
    torch.testing.assert_close(found.aux_loss, expected)


def test_the_balancing_loss_of_unequal_layers_is_refused_also_after_loading(tmp_path):
    model, inputs = build("mixtral")
    hc.apply_(model, plan(model))
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path)):
        with pytest.raises(hc.CompressionError, match="unequal numbers of experts"):
            one(**inputs, output_router_logits=True)
        assert one(**inputs).logits.isfinite().all()
    last = hc.discover(model).experts[0]
    hc.apply_(model, hc.Plan([hc.KeepExperts(last.name, range(4))]))  # as many as in the other layer
    assert model(**inputs, output_router_logits=True).aux_loss > 0


# --- the planner -------------------------------------------------------------------------------------------------


def test_experts_are_counted_as_the_router_picks_them():
    model, inputs = build("mixtral")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -5:] = 0
    inputs["attention_mask"] = mask
    seen = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, inputs)
    handle.remove()
    scores = seen[0][mask.bool()] @ model.model.layers[1].mlp.gate.weight.T
    best = scores.topk(2, -1)
    weights = torch.zeros_like(scores).scatter_(-1, best.indices, best.values.softmax(-1))
    frequency, weight = measure_experts(model, hc.discover(model).experts, [inputs, inputs])
    torch.testing.assert_close(frequency["model.layers.1.mlp"].float(), (weights > 0).float().mean(0))
    torch.testing.assert_close(weight["model.layers.1.mlp"].float(), weights.mean(0))
    for score, used in (("frequency", frequency), ("weight", weight)):
        for edit in hc.plan_experts(model, [inputs], keep=3, score=score):
            gone = set(range(8)) - set(edit.experts)
            assert len(edit.experts) == 3 and used[edit.moe][list(edit.experts)].min() >= used[edit.moe][list(gone)].max()


def test_a_share_of_all_experts_leaves_every_layer_what_a_token_needs():
    model, inputs = build("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2:] = 0  # two experts do everything
        model.model.layers[0].mlp.gate.weight[:2] *= 10
    edits = {e.moe: e.experts for e in hc.plan_experts(model, [inputs], keep=0.5, scope="global")}
    assert sum(map(len, edits.values())) == 8 and min(map(len, edits.values())) >= 2
    used = measure_experts(model, hc.discover(model).experts, [inputs])[0]
    assert all(set(used[name].topk(2).indices.tolist()) <= set(kept) for name, kept in edits.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(keep=0.0), "keep is"),
        (dict(keep=True), "keep is"),
        (dict(keep=1.0), "keep is"),
        (dict(keep=2, scope="global"), "a share of all experts"),
        (dict(keep=2, score="entropy"), "score is one of"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    model, inputs = build("mixtral")
    with pytest.raises(hc.CompressionError, match=said):
        hc.plan_experts(model, [inputs], **options)
    assert batch(model)["input_ids"].shape == inputs["input_ids"].shape


def test_a_dense_model_has_no_experts_to_plan():
    model = T.BertModel(
        T.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    )
    assert hc.discover(model).experts == ()
    with pytest.raises(hc.CompressionError, match="no mixture of experts"):
        hc.plan_experts(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], keep=2)
