"""Models that transformers saves under other names than it loads them with: a compressed weight must find its way back."""

import pytest
import torch
import transformers

import hf_compress as hc
from hf_compress.conversions import come_back
from tests.sweep.build import build
from tests.sweep.load import outputs_of
from tests.sweep.plans import plan_for


def stored(folder) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def needs(name):
    return pytest.mark.skipif(not hasattr(transformers, name), reason=f"this transformers has no {name}")


@needs("HrmTextForCausalLM")
def test_what_is_fused_on_disk_may_have_a_locked_part(tmp_path, fresh, plain):
    """HRM's q, k, v and gate are one matrix on disk; the weight that marks a checkpoint has a dimension more."""
    model, inputs, _ = build("hrm_text")
    assert come_back(model)
    hc.apply_(model, plan_for("KeepLayers", model))
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert stored(tmp_path) == set(model.state_dict())
    assert torch.equal(fresh.outputs("HrmTextForCausalLM", tmp_path, inputs)["logits"], expected)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs("HrmTextForCausalLM", tmp_path, inputs)
    # what was loaded is cut again, and saved again
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hc.apply_(again, plan_for("KeepNeurons", again))
    again.save_pretrained(tmp_path / "more")
    loaded = fresh.outputs("HrmTextForCausalLM", tmp_path / "more", inputs)["logits"]
    assert torch.equal(loaded, again.eval()(**inputs).logits)


@needs("Inkling2ForCausalLM")
@pytest.mark.parametrize("edit", ["LowRank", "Quantize 4 bit"])
def test_two_tensors_in_the_place_of_one_that_is_renamed(edit, tmp_path, fresh):
    model, inputs, _ = build("inkling2_text")
    hc.apply_(model, plan_for(edit, model))
    assert model.config.quantization_config.layout["names"] == "own"
    model.save_pretrained(tmp_path)
    expected = outputs_of(model, inputs)[0]
    assert torch.equal(fresh.outputs("Inkling2ForCausalLM", tmp_path, inputs)["logits"], expected)


def test_stock_names_are_kept_where_they_lead_back(tmp_path):
    """Experts, which are single modules on disk and one tensor here."""
    model, _, _ = build("mixtral")
    assert come_back(model)
    hc.apply_(model, plan_for("KeepNeurons", model))
    assert "names" not in model.config.quantization_config.layout
    model.save_pretrained(tmp_path)
    assert any(name.endswith("experts.0.w1.weight") for name in stored(tmp_path))


@needs("Inkling2ForCausalLM")
def test_what_is_made_of_a_record_is_saved_alike(tmp_path):
    """A model that is built from the config, and the base model alone."""
    model, inputs, _ = build("inkling2_text")
    hc.apply_(model, plan_for("LowRank", model))
    built = hc.from_config(model.config)
    built.save_pretrained(tmp_path / "built")
    loaded = type(built).from_pretrained(tmp_path / "built")
    assert all(torch.equal(a, b) for a, b in zip(built.state_dict().values(), loaded.state_dict().values(), strict=True))
    model.model.save_pretrained(tmp_path / "base")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@needs("Sam3LiteTextTextModel")
def test_what_marks_a_checkpoint_is_a_weight_that_plain_transformers_looks_for(tmp_path, fresh, plain):
    """SAM 3's text model makes its last layer of convolutions: a shorter stock model has no attention where this one has."""
    model, inputs, _ = build("sam3_lite_text_text_model")
    hc.apply_(model, hc.Plan([hc.KeepLayers([0, 1], "layers")]))
    model.save_pretrained(tmp_path)
    expected = outputs_of(model, inputs)[0]
    assert torch.equal(fresh.outputs("Sam3LiteTextTextModel", tmp_path, inputs)["last_hidden_state"], expected)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs("Sam3LiteTextTextModel", tmp_path, inputs)
