"""A checkpoint cut on disk is the one that is cut in memory, key by key and to the bit; and a cut needs little memory."""

import functools
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import hf_compress as hc
from hf_compress import later, paging, streaming
from hf_compress.cli import main
from tests.zoo import build, outputs, random_plan

MIXTURE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def everything_on_disk(monkeypatch):
    monkeypatch.setattr(streaming, "SMALL", 1024)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def both(model, plan: hc.Plan, tmp_path: Path, shards: str = "100KB") -> tuple[Path, Path]:
    """The folders that streaming and a process with all of it in memory write; they are compared here."""
    model.save_pretrained(tmp_path / "in", max_shard_size=shards)
    streamed = hc.apply_to_folder(tmp_path / "in", plan, tmp_path / "out", max_shard_size=shards)
    loaded = type(model).from_pretrained(tmp_path / "in")
    hc.apply_(loaded, plan).save_pretrained(tmp_path / "memory", max_shard_size=shards)
    one, other = tensors(streamed), tensors(tmp_path / "memory")
    assert one.keys() == other.keys()
    for key, value in other.items():
        assert one[key].dtype == value.dtype and torch.equal(one[key], value), key
    before = tensors(tmp_path / "in")
    assert any(key not in one or one[key].shape != value.shape for key, value in before.items())  # something was cut
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "memory")]
    assert configs[0] == configs[1]
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("out", "memory")]
    assert names[0] == names[1]
    return streamed, tmp_path / "memory"


@pytest.mark.parametrize(
    ("family", "edits"),
    [
        ("bert", ("heads", "neurons", "layers")),
        ("gpt2", ("heads", "neurons")),
        ("llama", ("heads", "neurons", "layers")),
        ("vit", ("heads", "neurons")),  # its keys on disk are not its names
        ("t5", ("heads", "neurons")),  # three weights are one
        ("gpt_neox", ("heads", "neurons")),
    ],
)
def test_equal_to_the_cut_in_memory(family, edits, tmp_path, fresh):
    model, batch = build(family, torch.bfloat16)
    streamed, memory = both(model, random_plan(model, edits), tmp_path)
    loaded = type(model).from_pretrained(memory)
    found = fresh.outputs(type(model).__name__, streamed, batch)
    assert any(value.dtype == torch.bfloat16 and torch.equal(value, outputs(loaded, batch)) for value in found.values())


@pytest.mark.parametrize(
    "model",
    [
        lambda: T.MixtralForCausalLM(T.MixtralConfig(**MIXTURE, num_local_experts=4)),
        lambda: T.Qwen3MoeForCausalLM(
            T.Qwen3MoeConfig(**MIXTURE, head_dim=8, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2)
        ),
    ],
)
def test_experts_that_transformers_merges_when_it_loads(model, tmp_path):
    model = model().bfloat16()
    experts = hc.Plan([hc.KeepExperts(m.name, [0, 1, 3]) for m in hc.discover(model).experts])
    streamed, _ = both(model, random_plan(model, ("heads",)) + experts, tmp_path)
    assert any(".experts.2." in key for key in tensors(streamed))  # and splits again when it saves
    assert not any(".experts.3." in key for key in tensors(streamed))


@pytest.mark.parametrize(("family", "bits"), [("gpt2", 8), ("gpt2", 4)])
def test_quantized_modules(family, bits, tmp_path):
    model, _ = build(family)
    plan = random_plan(model, ("neurons",))
    both(model, plan + hc.Plan(hc.plan_quantization(model, bits=bits).edits), tmp_path)


def test_a_compressed_checkpoint_is_cut_again(tmp_path):
    model, _ = build("bert")
    hc.apply_(model, random_plan(model, ("heads",)))
    both(model, random_plan(model, ("neurons", "layers"), seed=1), tmp_path)


def test_what_lies_beside_the_weights_comes_along_and_an_old_model_goes(tmp_path):
    model, _ = build("bert")
    model.save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "vocab.txt", "optimizer.pt", "README.md"):
        (tmp_path / "in" / name).write_text(name)
    build("llama")[0].save_pretrained(tmp_path / "out", max_shard_size="20KB")
    hc.apply_to_folder(tmp_path / "in", random_plan(model, ("heads",)), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    # generation_config.json belongs to the model that was there; nothing reads it with a classifier
    assert names - {"generation_config.json"} == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.pooler.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def damage_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-8])


def damage_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MyOwnBert"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "no model.safetensors .*pytorch_model.bin",
        ),
        (damage_missing, "lack bert.pooler.dense.weight"),
        (damage_truncated, "truncated"),
        (damage_class, "MyOwnBert.* has no such class"),
        (lambda folder: (folder / "config.json").write_text("{"), "config in .* cannot be read"),
    ],
)
def test_what_is_damaged_is_refused_and_nothing_written(damage, message, tmp_path):
    model, _ = build("bert")
    model.save_pretrained(tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(hc.CompressionError, match=message):
        hc.apply_to_folder(tmp_path / "in", random_plan(model, ("heads",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_and_refused_plans_leave_the_folder_that_was_there(tmp_path, monkeypatch):
    model, _ = build("bert")
    model.save_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out")
    before = files(tmp_path)
    plan = random_plan(model, ("heads",))
    for wrong, message in [
        (("in", hc.Plan([hc.KeepHeads("nowhere", [0])]), "out"), "no attention named 'nowhere'"),
        (("in", hc.Plan([hc.AddExits([0])]), "out"), "load the model, apply_ the exits"),
        (("in", hc.Plan([hc.KeepVocabulary(range(50))]), "out"), "the tokenizer that lies beside"),
        (("in", [hc.KeepHeads("x", [0])], "out"), "Expected a Plan, got list"),
        (("in", plan, "in"), "another folder"),
        (("in", plan, "in/small"), "another folder"),
        (("nothing", plan, "out"), "no model.safetensors"),
    ]:
        with pytest.raises(hc.CompressionError, match=message):
            hc.apply_to_folder(tmp_path / wrong[0], wrong[1], tmp_path / wrong[2])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_copy_beside", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hc.apply_to_folder(tmp_path / "in", plan, tmp_path / "out")
    assert files(tmp_path) == before


def test_a_weight_that_a_model_writes_to_is_refused(tmp_path, monkeypatch):
    model, _ = build("llama")
    model.save_pretrained(tmp_path / "in")
    forward = T.LlamaForCausalLM.forward

    @functools.wraps(forward)
    def writes(self, *args, **kwargs):
        with torch.no_grad():
            self.lm_head.weight.mul_(1.0)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(T.LlamaForCausalLM, "forward", writes)
    with pytest.raises(hc.CompressionError, match="changes its weight lm_head.weight when it runs"):
        hc.apply_to_folder(tmp_path / "in", random_plan(model, ("neurons",)), tmp_path / "out")


def test_the_command(tmp_path, capsys):
    model, _ = build("bert")
    model.save_pretrained(tmp_path / "in")
    plan = random_plan(model, ("heads", "neurons"))
    plan.save(tmp_path / "plan")
    words = [str(tmp_path / "in"), str(tmp_path / "plan"), str(tmp_path / "out")]
    assert main(["apply", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["before"]["numbers"] == sum(p.numel() for p in model.parameters())
    hc.apply_(model, plan)
    assert said["after"]["numbers"] == sum(p.numel() for p in model.parameters())
    assert main(["apply", words[0], str(tmp_path / "in"), words[2]]) == 2
    assert "PLAN: No plan to read" in capsys.readouterr().err
    assert main(["apply", "me/nowhere", words[1], words[2]]) == 2
    assert "hf download" in capsys.readouterr().err


# --- what it takes -----------------------------------------------------------------------------------------------

PEAK = """
import sys, torch, transformers
torch.set_num_threads(1)
import hf_compress as hc
from hf_compress.memory import give_back
def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
config = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
              vocab_size=60000, tie_word_embeddings=False)
model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**config), dtype=torch.bfloat16)
found = hc.discover(model)
plan = hc.Plan([hc.KeepHeads(a.name, range(0, a.num_heads, 2)) for a in found.attentions]
               + [hc.KeepNeurons(f.name, range(0, f.size, 2)) for f in found.ffns])
model.save_pretrained(sys.argv[1] + "/in", max_shard_size="10MB")
size = sum(p.nbytes for p in model.parameters())
hc.apply_(model, plan)  # what libraries load late is there
del model
give_back()
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
hc.apply_to_folder(sys.argv[1] + "/in", plan, sys.argv[1] + "/out", max_shard_size="10MB")
print(size, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
def test_a_folder_is_cut_in_less_memory_than_its_model(tmp_path):
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert peak < 0.9 * size  # one shard is one of two tables, which is 45 of 100


def test_whole_weights_go_one_by_one_when_slices_are_made(monkeypatch):
    model, _ = build("bert")
    plan = random_plan(model, ("heads", "neurons"))
    sliced, whole, alive = later.sliced, [], []

    def count(tensor, *args):
        if tensor.is_leaf and not whole:  # all slices are planned
            whole.extend(weakref.ref(t) for t in waiting[0]._whole.values())
        alive.append(sum(t() is not None for t in whole))
        return sliced(tensor, *args)

    make, waiting = later.Later.make, []

    def watched(undo):
        waiting.append(undo)
        monkeypatch.setattr(later, "sliced", count)
        make(undo)

    monkeypatch.setattr(later.Later, "make", watched)
    hc.apply_(model, plan)
    # q, k, v, out of 4 layers (weights and biases), up and down projections; the ones that were sliced are not there any more
    assert len(whole) == len(alive) and alive == list(range(len(whole), 0, -1)) and len(whole) > 20


def test_an_interrupt_waits_until_the_cut_is_whole(monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell that runs this in the background has it ignored
    model, batch = build("bert")
    plan = random_plan(model, ("heads", "neurons"))
    with hc.mask_(model, plan):
        expected = outputs(model, batch)
    sliced, made = later.sliced, []

    def slow(*args):
        made.append(True)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return sliced(*args)

    monkeypatch.setattr(later, "sliced", slow)
    with pytest.raises(KeyboardInterrupt, match="is whole"):
        hc.apply_(model, plan)
    assert torch.allclose(outputs(model, batch), expected, atol=1e-5) and len(made) > 3
    assert signal.getsignal(signal.SIGINT) is before


def test_without_room_for_the_first_slice_nothing_has_changed(monkeypatch):
    model, _ = build("bert")
    before = {name: parameter for name, parameter in model.named_parameters()}
    config = model.config.to_dict()

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(later, "sliced", full)
    with pytest.raises(MemoryError):
        hc.apply_(model, random_plan(model, ("heads", "neurons", "layers")))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is parameter for name, parameter in before.items())
    assert model.config.to_dict() == config


def test_files_without_a_name_go_with_their_tensors(tmp_path):
    pages = paging.Pages(tmp_path, small=0)
    weight = torch.arange(6.0).view(2, 3)
    with pages.spooled():
        double, rows, same = weight * 2, weight.index_select(1, torch.tensor([0, 2])), weight.view(3, 2)
        double += 1  # in place: in the file
    assert pages.maps == 2 and same.data_ptr() == weight.data_ptr()
    pages.release()
    assert torch.equal(double, torch.tensor([[1.0, 3, 5], [7, 9, 11]])) and torch.equal(rows, torch.tensor([[0.0, 2], [3, 5]]))
    assert not list(tmp_path.iterdir())
    del double, rows
    assert pages.maps == 0
