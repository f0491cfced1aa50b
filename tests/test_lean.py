"""Lean copies: the products and the silent rows of a weight in bfloat16 are those of the same numbers in float32."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress import lean, memory, structural
from hf_compress.lean import Lean, NotLean, held


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_products_and_silent_rows(kind, monkeypatch):
    monkeypatch.setattr(memory, "SLAB", 10)  # several slabs
    torch.manual_seed(0)
    layer = kind(6, 9) if kind is nn.Linear else kind(9, 6)
    weight = held(layer.weight)
    x = torch.randn(2, 4, 6)
    x[..., 2] = 0.0
    x[1] = 0.0
    x.requires_grad_()
    above = torch.randn(2, 4, 9)
    above[..., 5] = 0.0
    above[0, :, 7] = 0.0  # only met by rows of x that are zero

    exact = weight.float().requires_grad_()
    bias = layer.bias.detach() + 1.0
    expected = x @ (exact.T if kind is nn.Linear else exact) + bias
    gradient, of_weight = torch.autograd.grad(expected, (x, exact), above)

    layer.weight, layer.bias = weight.requires_grad_(), nn.Parameter(bias)
    told: list = []
    weight.hfc_silent = told.append  # type: ignore[attr-defined]
    with Lean():
        got = layer(x)
    torch.testing.assert_close(got, expected)
    got.backward(above)
    torch.testing.assert_close(x.grad, gradient)
    assert weight.grad is None
    zero = of_weight == 0
    assert [rows.tolist() for rows in told[0]] == [zero.all(1).tolist(), zero.all(0).tolist()]
    assert sum(rows.sum() for rows in told[0]) == 3


def test_anything_else_is_not_lean():
    weight, x = held(nn.Parameter(torch.randn(3, 3))), torch.randn(2, 3)
    with Lean():
        assert weight.dtype == torch.float32 and weight.shape == (3, 3) and weight.is_floating_point()
        for wrong in (lambda: x @ weight, lambda: weight.T, lambda: weight * 2, lambda: F.linear(x.bfloat16(), weight)):
            with pytest.raises(NotLean):
                wrong()


def models():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
    torch.manual_seed(0)
    yield BertModel(BertConfig(**sizes)).eval()
    yield LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).bfloat16().eval()


@pytest.mark.parametrize("which", [0, 1])
def test_the_same_parts_are_found(which, monkeypatch):
    """Lean and float32 copies find the same rows of every block, and a lean copy it is."""
    model = list(models())[which]
    found = hc.discover(model)
    plan = hc.Plan([hc.KeepHeads(a.name, [0, 1]) for a in found.attentions])
    plan += hc.Plan([hc.KeepNeurons(f.name, range(0, f.size, 2)) for f in found.ffns])
    whole = hc.surgery.prove_plan(model, plan)  # too small to be held
    monkeypatch.setattr(lean, "LARGE", 0)
    real, ways = structural._prove_structure, []

    def noted(*args, lean):
        ways.append(lean)
        return real(*args, lean=lean)

    monkeypatch.setattr(structural, "_prove_structure", noted)
    held_parts = hc.surgery.prove_plan(model, plan)
    assert ways and all(ways)
    assert held_parts.keys() == whole.keys()
    for name, parts in whole.items():
        other = {(p.module, p.parameter, p.dim): p.owner.tolist() for p in held_parts[name]}
        assert {(p.module, p.parameter, p.dim): p.owner.tolist() for p in parts} == other


def test_a_forward_that_is_not_lean_is_proved_in_float32(monkeypatch):
    monkeypatch.setattr(lean, "LARGE", 0)
    model = list(models())[0]
    dense = model.encoder.layer[0].intermediate.dense
    monkeypatch.setattr(dense, "forward", lambda x: x @ dense.weight.T + dense.bias, raising=False)
    real, ways = structural._prove_structure, []

    def noted(*args, lean):
        ways.append(lean)
        return real(*args, lean=lean)

    monkeypatch.setattr(structural, "_prove_structure", noted)
    with pytest.raises(hc.CompressionError):  # a forward of another object: the copy would read the model's own weight
        hc.surgery.prove_plan(model, hc.Plan([hc.KeepNeurons("encoder.layer.0", range(40))]))
    assert ways[:2] == [True, False]
