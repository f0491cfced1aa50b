"""Widths of experts: what planners choose, `apply_` takes and every dtype runs."""

import json
import logging
import math

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress import surgery
from hf_compress.modules import is_gated
from hf_compress.pruning import run
from hf_compress.pruning.select import select
from hf_compress.recipe.shares import check_share
from tests import mixing
from tests.trainers import trainer

WIDTHS = ("intermediate_size", "moe_intermediate_size", "intermediate_size_mlp", "shared_expert_intermediate_size", "d_ff")
MULTIPLIED = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "granitemoe",
    "aria_text",
)  # by grouped_mm
OTHERS = ("llama4", "dbrx", "jetmoe", "switch_transformers")


def build(name, width=48, dtype=torch.float32):
    """A tiny mixture all of whose feed-forward blocks have this width (or a multiple, where experts are shared)."""
    kind, config = mixing.FAMILIES[name]()
    for key in WIDTHS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, width)
    if name == "dbrx":
        config.ffn_config.ffn_hidden_size = width
    torch.manual_seed(0)
    return kind(config).to(dtype).eval()


def widths(model, multiplied=True):
    """Of blocks whose experts transformers multiplies with a kernel of its choice, or of all others."""
    found = {}
    for ffn in hc.discover(model).ffns:
        code = type(model.get_submodule(ffn.out)).forward.__code__
        if code.co_filename.endswith("integrations/moe.py") is multiplied:  # where transformers chooses
            found[ffn.name] = ffn.size
    return found


def train(model, folder, *callbacks, steps=4, **options):
    ids = mixing.batch(model)
    rows = [{k: v[i] for k, v in ids.items()} | {"labels": ids["input_ids"][i].clone()} for i in range(3)] * 4
    t = trainer(folder, callbacks, model=model, max_steps=steps, per_device_train_batch_size=2, **options)
    t.train_dataset, t.eval_dataset = rows, None
    return t


def runs_in_every_dtype(model, folder):
    inputs = mixing.batch(model)
    expected = mixing.logits(model.eval(), inputs)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(mixing.logits(loaded.eval(), inputs), expected)
    for half in (type(model).from_pretrained(folder, dtype=torch.bfloat16), loaded.to(torch.bfloat16)):
        found = mixing.logits(half.eval(), inputs).float()
        assert half.config._experts_implementation in ("grouped_mm", "eager") and torch.isfinite(found).all()
        assert (found - expected).abs().median() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("family", MULTIPLIED)
def test_planned_widths_are_taken_and_run_in_every_dtype(family, tmp_path):
    model = build(family)
    others = widths(model, multiplied=False)
    hc.apply_(model, hc.plan_pruning(model, neurons=0.3, score="magnitude", scope="layer"))
    assert set(widths(model).values()) == {32}  # 33.6 are to stay
    assert widths(model, multiplied=False) == {name: size - round(0.3 * size) for name, size in others.items()}
    runs_in_every_dtype(model, tmp_path)


@pytest.mark.parametrize("family", OTHERS)
def test_experts_without_that_kernel_are_not_rounded(family):
    model = build(family)
    assert not widths(model)
    plan = hc.plan_pruning(model, neurons=0.3, score="magnitude", scope="layer")
    assert {len(edit.neurons) for edit in plan} == {34}
    if family != "switch_transformers":  # a list of experts: each is a block, and can have a width of its own
        hc.apply_(model, hc.plan_pruning(model, neurons=0.3, score="random"))
        return
    names = [ffn.name for ffn in hc.discover(model).ffns if ".experts." in ffn.name][:3]
    hc.apply_(model, hc.Plan([hc.KeepNeurons(name, range(count)) for name, count in zip(names, (5, 13, 44), strict=True)]))
    assert [f.size for f in hc.discover(model).ffns if f.name in names] == [5, 13, 44]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {}),
        ("mixtral", dict(schedule="one_shot", scope="layer")),
        ("mixtral", dict(neurons=0.9, start=0.0, end=1.0, every=1)),  # most goes on the way, and 8 must be left at the end
        ("gpt_oss", dict(score="random", end=1.0)),
        ("dbrx", {}),
    ],
)
def test_a_training_ends_with_widths_that_run(family, options, tmp_path, caplog):
    model = build(family)
    prune = hc.PruningCallback(**{"neurons": 0.3, "score": "magnitude", "every": 1, **options})
    t, seen = train(model, tmp_path / "run", prune), {}

    class Watch(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.update(logits=mixing.logits(model.eval(), mixing.batch(model)), mode=model.train())

    t.add_callback(Watch())
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("hf_compress"), "propagate", True)
        t.train()
    sizes = list((widths(model) or widths(model, multiplied=False)).values())
    removed = 1 - sum(sizes) / (48 * len(sizes))
    asked = options.get("neurons", 0.3)
    if family != "dbrx":
        assert all(size % 8 == 0 and size > 0 for size in sizes)
        if abs(removed - asked) > 0.02:
            assert f"{removed:.1%} of the neurons will go and not the {asked:.1%}" in caplog.text
            assert "2 of the blocks keep a multiple of 8" in caplog.text
    else:
        assert removed == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(mixing.logits(model.eval(), mixing.batch(model)), seen["logits"], atol=1e-5, rtol=1e-5)
    runs_in_every_dtype(model, tmp_path / "out")


def test_second_order_pruning_of_a_mixture_leaves_its_experts_and_runs(tmp_path):
    model = build("qwen2_moe")
    pruned = hc.prune_to(model, [mixing.batch(model)] * 2, parameters=1.02, tries=0)
    assert pruned.achieved >= 1.02 and set(widths(model).values()) == {48}
    runs_in_every_dtype(model, tmp_path)


def test_counts_are_rounded_to_the_nearest_multiple_and_never_come_back():
    scores = {"experts": torch.arange(48.0), "dense": torch.arange(48.0)}
    multiples = {"experts": 8, "dense": 1}
    kept = select(scores, 0.3, scope="layer", round_to=multiples)
    assert kept == {"experts": list(range(16, 48)), "dense": list(range(14, 48))}
    assert len(select(scores, 0.05, scope="layer", round_to=multiples)["experts"]) == 48  # 46 are nearest to all
    # what is gone stays gone, at every step of any schedule, and 8 are left
    alive = {name: torch.ones(48, dtype=torch.bool) for name in scores}
    draw = torch.Generator().manual_seed(0)
    for step in range(1, 21):
        noisy = {name: torch.rand(48, generator=draw) for name in scores}
        kept = select(noisy, 0.95 * (1 - (1 - step / 20) ** 3), round_to=multiples, alive=alive)
        assert len(kept["experts"]) % 8 == 0 and len(kept["experts"]) >= 8
        for name, units in kept.items():
            assert bool(alive[name][units].all())
            alive[name] = torch.zeros(48, dtype=torch.bool)
            alive[name][units] = True
    assert len(kept["experts"]) == 8


@pytest.mark.parametrize("round_to", [1, 4, 12])
def test_a_multiple_that_experts_cannot_have_is_refused_at_once(round_to, tmp_path):
    model = build("mixtral")
    before = {name: p for name, p in model.named_parameters()}
    words = f"round_to={round_to} does not fit the experts.*multiples of 8.*round_to={-(-round_to // 8) * 8}"
    with pytest.raises(hc.CompressionError, match=words):
        hc.plan_pruning(model, neurons=0.3, score="magnitude", round_to=round_to)
    with pytest.raises(hc.CompressionError, match=words):
        train(model, tmp_path, hc.PruningCallback(neurons=0.3, score="magnitude", round_to=round_to)).train()
    with pytest.raises(hc.CompressionError, match=words):
        check_share(hc.discover(model), {"neurons": 0.3, "round_to": round_to})
    assert all(before[name] is p for name, p in model.named_parameters()) and not any(map(is_gated, model.modules()))
    assert {len(edit.neurons) for edit in hc.plan_pruning(model, neurons=0.3, score="magnitude", round_to=16)} == {32}
    hc.plan_pruning(model, heads=0.5, score="magnitude", round_to=round_to)  # of heads alone


def test_a_share_that_rounds_to_nothing_is_told(tmp_path):
    model = build("mixtral")
    least = 5 / 96  # of one block, the other keeps all: 43 are nearer to 40 than to 48
    with pytest.raises(hc.CompressionError, match="kept in multiples of 8. The smallest share that removes something is 0.0"):
        check_share(hc.discover(model), {"neurons": 0.02})
    check_share(hc.discover(model), {"neurons": math.ceil(least * 1000) / 1000})
    with pytest.raises(hc.CompressionError, match=r"have 8 neurons each.*none can go.*plan_experts"):
        hc.plan_pruning(build("mixtral", 8), neurons=0.5, score="magnitude")


@pytest.mark.parametrize("kernel", ["grouped_mm", "eager", "batched_mm"])
def test_apply_asks_for_what_every_dtype_and_kernel_runs(kernel):
    """Neither is in a checkpoint: one that was cut in float32, or under another kernel, is loaded with any."""
    model = build("mixtral")
    model.set_experts_implementation(kernel)
    name, before = next(iter(widths(model))), model.state_dict()
    for count, allowed in ((44, "40 or all 48"), (29, "24 or 32"), (5, "Keep 8 ")):
        with pytest.raises(hc.CompressionError, match=f"keeps {count} neurons of every expert.*multiple of 8.*{allowed}"):
            hc.apply_(model, hc.Plan([hc.KeepNeurons(name, range(count))]))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with hc.mask_(model, hc.Plan([hc.KeepNeurons(name, range(44))])):  # a mask changes no shape
        mixing.logits(model, mixing.batch(model))
    hc.apply_(model, hc.Plan([hc.KeepNeurons(name, range(40))]))


@pytest.mark.parametrize(("width", "single"), [(44, "grouped_mm"), (42, "eager")])
def test_a_checkpoint_of_an_earlier_version_loads_and_runs(width, single, tmp_path, monkeypatch, caplog):
    model, inputs = build("mixtral"), mixing.batch(build("mixtral"))
    monkeypatch.setattr(surgery, "check_experts", lambda cuts: None)  # as it was then: any width, under another kernel
    model.set_experts_implementation("eager")
    first, second = widths(model)
    hc.apply_(model, hc.Plan([hc.KeepNeurons(first, range(width)), hc.KeepNeurons(second, range(40))]))
    monkeypatch.undo()
    monkeypatch.setattr(logging.getLogger("hf_compress"), "propagate", True)
    model.save_pretrained(tmp_path)
    expected = mixing.logits(model, inputs)
    for dtype, kernel in ((torch.float32, single), (torch.bfloat16, "eager")):
        caplog.clear()
        loaded = T.MixtralForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.config._experts_implementation == kernel and f"have {width} neurons" in caplog.text
        assert ("set to 'eager'" if kernel == "eager" else "Before model.to(torch.bfloat16)") in caplog.text
        found = mixing.logits(loaded, inputs)
        assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    caplog.clear()
    loaded = T.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert loaded.config._experts_implementation == "batched_mm" and "neurons" not in caplog.text
    hc.apply_(loaded, hc.plan_pruning(loaded, neurons=0.3, score="magnitude"))  # what is cut again runs everywhere
    assert all(size % 8 == 0 for size in widths(loaded).values())


def test_what_the_end_would_refuse_is_refused_before_training(tmp_path):
    model = build("mixtral")
    name = next(iter(widths(model)))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    mask = hc.mask_(model, hc.Plan([hc.KeepNeurons(name, range(5))]))  # fewer than the kernel takes
    t = train(model, tmp_path, hc.PruningCallback(neurons=0.3, score="magnitude"))
    with pytest.raises(hc.CompressionError, match="keeps 5 neurons of every expert"):
        t.train()
    assert t.state.global_step == 0
    mask.remove()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
def test_a_checkpoint_from_the_middle_of_a_training_is_the_masked_mixture(family, tmp_path):
    def prune():
        return hc.PruningCallback(neurons=0.3, score="magnitude", start=0.0, end=0.9, every=1)

    seen = {}

    class Watch(T.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = mixing.logits(model.eval(), mixing.batch(model))
            model.train()

    whole = train(build(family), tmp_path, prune(), Watch(), steps=6, save_strategy="steps", save_steps=4)
    whole.train()
    loaded = type(whole.model).from_pretrained(tmp_path / "checkpoint-4").eval()
    assert any(is_gated(module) for module in loaded.modules())
    torch.testing.assert_close(mixing.logits(loaded, mixing.batch(loaded)), seen[4], atol=1e-6, rtol=1e-6)
    hc.apply_(loaded, loaded.config.quantization_config.masks)
    torch.testing.assert_close(mixing.logits(loaded, mixing.batch(loaded)), seen[4], atol=1e-5, rtol=1e-5)
    again = train(build(family), tmp_path, prune(), steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert hc.discover(again.model).ffns == hc.discover(whole.model).ffns
    assert torch.equal(*(mixing.logits(t.model.eval(), mixing.batch(t.model)) for t in (again, whole)))


def test_the_best_model_of_a_mixture_is_cut(tmp_path):
    prune = hc.PruningCallback(neurons=0.3, score="magnitude", start=0.0, end=0.3, every=1)
    often = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    t = train(build("mixtral"), tmp_path, prune, steps=6, greater_is_better=True, metric_for_best_model="loss", **often)
    t.eval_dataset = t.train_dataset[:2]
    t.train()
    best = T.MixtralForCausalLM.from_pretrained(t.state.best_model_checkpoint).eval()
    inputs = mixing.batch(best)
    torch.testing.assert_close(mixing.logits(t.model.eval(), inputs), mixing.logits(best, inputs), atol=1e-5, rtol=1e-5)
    assert all(size % 8 == 0 and size < 48 for size in widths(t.model).values())


def test_a_training_whose_cut_is_refused_is_not_lost(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise hc.CompressionError("No.")

    monkeypatch.setattr(run, "apply_", refuse)
    t = train(build("mixtral"), tmp_path, hc.PruningCallback(neurons=0.3, score="magnitude"))
    with pytest.raises(hc.CompressionError, match=r"No\. The training is not lost: .*masked"):
        t.train()
    monkeypatch.undo()
    inputs, model = mixing.batch(t.model), T.MixtralForCausalLM.from_pretrained(tmp_path / "masked").eval()
    expected = mixing.logits(t.model.eval(), inputs)
    assert any(is_gated(module) for module in t.model.modules())
    torch.testing.assert_close(mixing.logits(model, inputs), expected, atol=1e-6, rtol=1e-6)
    hc.apply_(model, model.config.quantization_config.masks)
    torch.testing.assert_close(mixing.logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert all(size % 8 == 0 and size < 48 for size in widths(model).values())


def test_masks_of_an_earlier_version_are_rounded_when_training_goes_on(tmp_path, monkeypatch):
    def prune():
        return hc.PruningCallback(neurons=0.3, score="magnitude", start=0.0, end=0.3, every=1)

    with monkeypatch.context() as earlier:
        earlier.setattr(run, "multiples_of", lambda blocks, round_to: {})
        earlier.setattr(run, "rehearse", lambda *_: None)
        earlier.setattr(run.PruningRun, "_likely", lambda self: run.trial_plan(self.model, self.structure, self.blocks))
        t = train(build("mixtral"), tmp_path, prune(), steps=6, save_strategy="steps", save_steps=3)
        with pytest.raises(hc.CompressionError, match="multiple of 8"):
            t.train()
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["PruningCallback"]
    assert saved["attributes"]["saved"]["is_full"] and any(
        len(units) % 8 for units in saved["attributes"]["saved"]["alive"].values()
    )
    saved["args"]["round_to"] = saved["attributes"]["saved"]["options"]["round_to"] = 1  # its default then
    path.write_text(json.dumps(state))
    model = build("mixtral")
    train(model, tmp_path, prune(), steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(size % 8 == 0 and size < 48 for size in widths(model).values())
