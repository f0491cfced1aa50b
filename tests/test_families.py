"""The invariants, over every family and every edit: mask == cut, save == load, plan == JSON, loud without the plugin."""

import copy

import pytest
import torch

import hf_compress as hc
from hf_compress.probe import example_inputs
from tests.zoo import FAMILIES, GENERATE, NO_HEADS, NO_LAYERS, build, outputs, random_plan

CASES = [
    (family, edits)
    for family in FAMILIES
    for edits in (("heads",), ("neurons",), ("layers",), ("heads", "neurons", "layers"))
    if not (family in NO_HEADS and edits == ("heads",)) and not (family in NO_LAYERS and edits == ("layers",))
]


@pytest.mark.parametrize(("family", "edits"), CASES, ids=[f"{f}-{'+'.join(e)}" for f, e in CASES])
def test_cut_equals_mask_and_load_equals_save(family, edits, tmp_path, fresh, plain):
    model, batch = build(family)
    plan = random_plan(model, edits)
    assert hc.Plan.from_dict(plan.to_dict()) == plan
    dense = outputs(model, batch)
    parameters = model.num_parameters()
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    assert torch.equal(outputs(model, batch), dense), "the mask left something behind"
    assert (masked - dense).abs().max() > 1e-4, "a plan without effect proves nothing"
    hc.apply_(model, plan)
    cut = outputs(model, batch)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    assert model.num_parameters() < parameters

    model.save_pretrained(tmp_path)
    again = fresh.outputs(type(model).__name__, tmp_path, batch)
    key = next(k for k, v in again.items() if v.shape == cut.shape and k in ("logits", "logits_per_image", "start_logits"))
    assert torch.equal(again[key], cut)
    if getattr(model.config, "quantization_config", None) is None:  # stock: plain transformers reads it, equal to the bit
        assert torch.equal(plain.outputs(type(model).__name__, tmp_path, batch)[key], cut)
    else:
        with pytest.raises(RuntimeError, match="mismatch"):
            plain.outputs(type(model).__name__, tmp_path, batch)


@pytest.mark.parametrize("family", GENERATE)
def test_generation_of_the_cut_model_is_that_of_the_masked_one(family):
    model, batch = build(family)
    plan = random_plan(model, ("heads", "neurons", "layers"), seed=1)
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder") and k != "attention_mask"}
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1)
    with hc.mask_(model, plan):
        expected = model.generate(**batch, **options)
    hc.apply_(model, plan)
    assert torch.equal(model.generate(**batch, **options), expected)
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("family", ["bert", "llama", "phi3", "t5", "mpnet", "vit"])
def test_a_cut_model_trains_and_is_cut_again(family, tmp_path, fresh):
    model, batch = build(family)
    hc.apply_(model, random_plan(model, ("heads", "neurons")))
    model.save_pretrained(tmp_path / "one")
    loaded = type(model).from_pretrained(tmp_path / "one")
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.01)
    loaded(**batch)[0].float().square().mean().backward()
    optimizer.step()
    loaded.eval()
    more = random_plan(loaded, ("neurons", "layers"), seed=2)
    with hc.mask_(loaded, more):
        masked = outputs(loaded, batch)
    hc.apply_(loaded, more)
    cut = outputs(loaded, batch)
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "two")
    again = fresh.outputs(type(model).__name__, tmp_path / "two", batch)
    assert any(v.shape == cut.shape and torch.equal(v, cut) for v in again.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_apply_keeps(family):
    """Dtype, requires_grad, module identity and names, hooks, tied weights."""
    model, batch = build(family, torch.bfloat16)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = dict(model.named_modules())
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    tied = _tied(model)
    calls = []
    out = (hc.discover(model).attentions or hc.discover(model).ffns)[0].out
    model.get_submodule(out).register_forward_hook(lambda *a: calls.append(a))
    hc.apply_(model, random_plan(model, ("heads", "neurons")))
    after = dict(model.named_modules())
    assert list(before) == list(after) and all(before[n] is after[n] for n in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert _tied(model) == tied
    calls.clear()
    outputs(model, batch)
    assert calls, "the hook on a cut module was lost"


def _tied(model):
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_discover_and_example_inputs_leave_the_model_alone(family):
    model, _ = build(family)
    weights = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    structure = hc.discover(model)
    assert len(str(structure).splitlines()) == 1 + len(structure.attentions) + len(structure.ffns) + len(
        structure.stacks
    ) + len(structure.experts) + len(structure.convs) + len(structure.embeddings)
    assert outputs(model, example_inputs(model)).isfinite().all()
    assert classes == [type(m) for m in model.modules()]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
