"""timm's models through TimmWrapper: no config of transformers describes them, so all is found from the computation."""

import pytest
import torch
import transformers as T

import hf_compress as hc

pytest.importorskip("timm", reason="timm is not installed (it needs torchvision, which has no build for a CPU torch 2.13)")


def wrapped(architecture):
    model = T.TimmWrapperForImageClassification(T.TimmWrapperConfig(architecture=architecture, num_labels=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def half_of_the_channels(model):
    groups = [g for g in hc.channel_groups(model) if getattr(model.get_submodule(g.name), "groups", 1) in (1, g.size)]
    return hc.Plan([hc.KeepChannels(g.name, sorted({*range(0, g.size, 2), *g.fixed})) for g in groups])


def half_of_the_heads_and_neurons(model):
    structure = hc.discover(model)
    heads = [hc.KeepHeads(a.name, range(0, a.num_heads, 2)) for a in structure.attentions]
    return hc.Plan([*heads, *(hc.KeepNeurons(f.name, range(0, f.size, 2)) for f in structure.ffns)])


@pytest.mark.parametrize(
    ("architecture", "plan_of", "size"),
    [
        ("resnet10t", half_of_the_channels, 64),
        ("mobilenetv3_small_050", half_of_the_channels, 64),
        ("vit_tiny_patch16_224", half_of_the_heads_and_neurons, 224),
    ],
)
@torch.no_grad()
def test_cut_equals_mask_and_loads(architecture, plan_of, size, tmp_path):
    model = wrapped(architecture)
    plan = plan_of(model)
    batch = {"pixel_values": torch.randn(2, 3, size, size)}
    before = model(**batch).logits
    with hc.mask_(model, plan):
        masked = model(**batch).logits
    assert not torch.allclose(masked, before, atol=1e-3)
    cut = hc.apply_(model, plan)(**batch).logits
    torch.testing.assert_close(cut, masked, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**batch).logits, cut)
