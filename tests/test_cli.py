"""The command line on right arguments: what it prints is what is there, and whatever happens has its exit code."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers as T
import yaml

import hf_compress as hc
from hf_compress.cli import main
from hf_compress.cli.program import COMMANDS, make_parser
from hf_compress.publish import PushError
from hf_compress.report import Report
from tests.recipe_models import TEXT, save_model, text_classification, tokenizer
from tests.zoo import build

ROOT = Path(__file__).parent.parent


def run(capsys, line: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(shlex.split(line)) == code, capsys.readouterr().err
    return capsys.readouterr()


def data(capsys, line: str):
    out, _ = run(capsys, f"{line} --json")
    return json.loads(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`base` (headless), `dense` (a classifier of it), `small` (cut, then 8 bits), and a recipe."""
    root = tmp_path_factory.mktemp("cli")
    recipe = text_classification(root)
    (root / "bert").rename(root / "base")
    torch.manual_seed(0)
    model = T.BertForSequenceClassification(T.BertConfig(**TEXT))
    save_model(root / "dense", model, tokenizer())
    attention = "bert.encoder.layer.0.attention.self"
    hc.apply_(model, hc.Plan([hc.KeepHeads(attention, [0, 2, 3]), hc.KeepNeurons("bert.encoder.layer.1", range(24))]))
    save_model(root / "cut", model, tokenizer())
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    save_model(root / "small", model, tokenizer())
    recipe |= {"model": "base", "data": {"path": "texts", "max_length": 16}, "output": "out"}
    recipe["steps"] = [
        {"finetune": {"max_steps": 2}},
        {"prune": {"neurons": 0.5, "max_steps": 2}},
        {"measure": {"batch_sizes": [1, 4], "length": 12, "repeats": 2, "warmup": 1}},
    ]
    (root / "recipe.yaml").write_text(yaml.dump(recipe, sort_keys=False))
    return root


@pytest.fixture(autouse=True)
def here(world, monkeypatch):
    monkeypatch.chdir(world)


# --- inspect ---------------------------------------------------------------------------------------------------------

FAMILIES = ("bert", "albert", "llama", "gpt2", "t5", "bart", "whisper", "wav2vec2", "vit", "swin", "clip", "convnext")


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_counts_what_the_loaded_model_has(capsys, tmp_path, family):
    """Without loading it: the model is built on no device."""
    model, _ = build(family)
    model.save_pretrained(tmp_path)
    found = data(capsys, f"inspect {tmp_path}")
    sizes = found["parameters"]
    assert found["class"] == type(model).__name__
    assert sizes["total"] == sum(p.numel() for p in model.parameters()) == sum(sizes.values()) - sizes["total"]
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.Conv2d)]
    assert found["convolutions"] == len(convolutions)
    assert found["memory"]["files"] == (tmp_path / "model.safetensors").stat().st_size
    rows = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    assert sizes["embeddings"] == sum(p.numel() for p in {id(m.weight): m.weight for m in rows}.values())
    assert (found["compressed"], found["plan"], found["tier"]) == (False, None, None)


def test_inspect_tells_the_sizes_that_the_config_gives(capsys):
    found = data(capsys, "inspect dense")
    heads, width, inner, layers = (
        TEXT[f"{k}"] for k in ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers")
    )
    block = {"heads": heads, "key_value_heads": heads, "head_dim": width // heads}
    assert [{k: v for k, v in a.items() if k != "name"} for a in found["attention"]] == [block] * layers
    assert [f["neurons"] for f in found["ffn"]] == [inner] * layers
    assert found["layers"] == {"encoder": layers} and found["task"] == "text-classification"
    assert found["parameters"]["attention"] == layers * 4 * (width * width + width)
    assert found["parameters"]["ffn"] == layers * (2 * width * inner + width + inner)
    assert found["memory"]["weights"] - 4 * found["parameters"]["total"] == 8 * 2 * TEXT["max_position_embeddings"]  # buffers
    assert found["possible"]["exits"] == "after layer 0"
    assert found["possible"]["prune"] == f"{layers * heads} heads in 2 blocks, {layers * inner} neurons in 2 blocks"


def test_inspect_counts_channels_and_experts(capsys, tmp_path):
    """A ResNet was said to have nothing that can be pruned."""
    config = T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
    T.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    possible = data(capsys, f"inspect {tmp_path / 'resnet'}")["possible"]
    # the stem; per stage, the stream and two narrow convolutions, a quarter as wide
    assert possible["channels"] == f"{8 + 16 + 4 + 4 + 32 + 8 + 8} channels in 7 sets"
    assert possible["prune"] is None and possible["experts"] is None
    config = T.MixtralConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        num_local_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    T.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    possible = data(capsys, f"inspect {tmp_path / 'mixtral'}")["possible"]
    assert possible["experts"] == "12 experts in 2 blocks" and possible["channels"] is None


def test_inspect_tells_what_was_done(capsys):
    found, dense = data(capsys, "inspect small"), data(capsys, "inspect dense")
    assert (found["compressed"], found["tier"], found["masked"]) == (True, "plugin", False)
    assert [a["heads"] for a in found["attention"]] == [3, 4] and [f["neurons"] for f in found["ffn"]] == [64, 24]
    width = TEXT["hidden_size"]
    gone = 4 * width * (width // 4) + 3 * (width // 4) + 40 * (2 * width + 1)  # a head, and forty neurons
    assert dense["parameters"]["total"] - found["parameters"]["total"] == gone
    assert hc.Plan.from_dict(found["plan"]).edits[:2] == (
        hc.KeepHeads("bert.encoder.layer.0.attention.self", [0, 2, 3]),
        hc.KeepNeurons("bert.encoder.layer.1", range(24)),
    )
    assert found["possible"]["prune"] == found["possible"]["low_rank"] == "no: quantized weights cannot be cut"
    text, _ = run(capsys, "inspect small")
    assert "compressed; plugin: `import hf_compress`" in text and "1 block keeps 3 heads." in text


def test_inspect_estimates_what_quantizing_gives(capsys):
    """Within a tenth, on tiny layers, whose scales weigh most."""
    words = data(capsys, "inspect cut")["possible"]["quantize"]
    about = float(re.search(r"about ([\d.]+) kB at 8 bits", words).group(1)) * 1e3
    assert about == pytest.approx(data(capsys, "inspect small")["memory"]["weights"], rel=0.1)


def test_inspect_knows_a_plan_beside_a_stock_model(capsys, tmp_path):
    model = T.BertForSequenceClassification(T.BertConfig(**TEXT))
    plan = hc.Plan([hc.KeepNeurons(f"bert.encoder.layer.{i}", range(32)) for i in range(2)])
    hc.apply_(model, plan).save_pretrained(tmp_path)
    assert data(capsys, f"inspect {tmp_path}")["compressed"] is False  # nothing on disk says so
    plan.save(tmp_path)
    found = data(capsys, f"inspect {tmp_path}")
    assert (found["tier"], hc.Plan.from_dict(found["plan"])) == ("stock", plan)


def test_inspect_writes_blocks_that_are_alike_on_one_line(capsys):
    text, err = run(capsys, "inspect dense")
    assert re.search(r"^attention +bert\.encoder\.layer\.\[0-1\]\.attention\.self +4 heads x 8$", text, re.M) and err == ""
    text, _ = run(capsys, "inspect small")
    assert re.search(r"^ffn +bert\.encoder\.layer\.1 +24 neurons$", text, re.M)
    text, _ = run(capsys, "inspect small --all")
    assert str(hc.discover(T.AutoModelForSequenceClassification.from_pretrained("small"))) in text


# --- measure ---------------------------------------------------------------------------------------------------------


def test_measure_is_the_report_of_both(capsys, tmp_path):
    threads = torch.get_num_threads()
    line = f"measure cut --against dense --batch-sizes 1 3 --length 9 --repeats 2 --warmup 0 --threads 2 -o {tmp_path}/r.json"
    out, err = run(capsys, f"{line} --json")
    found = json.loads(out)
    assert err == "" and torch.get_num_threads() == threads
    models = [T.AutoModelForSequenceClassification.from_pretrained(name) for name in ("cut", "dense")]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert [found["model"]["parameters"], found["against"]["parameters"]] == counts
    assert found["ratios"]["parameters"] == counts[0] / counts[1]
    assert [(t["batch"], t["length"], t["model"]["repeats"]) for t in found["timings"]] == [(1, 9, 2), (3, 9, 2)]
    assert found["conditions"]["shapes"] == {"input_ids": [3, 9]} and found["conditions"]["threads"] == 2
    assert Report.load(tmp_path / "r.json").to_dict() == found
    text, _ = run(capsys, "measure cut --batch-sizes 2 --repeats 1 --warmup 0")
    assert text.splitlines()[1].split() == ["parameters", f"{counts[0]:,}"] and "input_ids 2x40" in text


def test_measure_in_another_dtype(capsys):
    found = data(capsys, "measure cut --against dense --dtype bfloat16 --batch-sizes 1 --length 4 --repeats 1")
    whole = data(capsys, "measure cut --against dense --batch-sizes 1 --length 4 --repeats 1")
    assert found["conditions"]["dtype"] == "bfloat16" and whole["conditions"]["dtype"] == "float32"
    assert found["against"]["bytes"] * 2 == whole["against"]["bytes"] == 4 * whole["against"]["parameters"]


def test_measure_gives_a_headless_baseline_the_head(capsys):
    """A model that was fine-tuned from it has one, and costs the same."""
    found = data(capsys, "measure dense --against base --batch-sizes 1 --length 4 --repeats 1")
    assert found["ratios"] == dict.fromkeys(found["ratios"], 1.0)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_from_init_to_run(capsys, world):
    _, err = run(capsys, "recipe init dense -o begin.yaml")
    text = Path("begin.yaml").read_text()
    assert run(capsys, "recipe init dense")[0] == text and yaml.safe_load(text)["task"] == "text-classification"
    out, err = run(capsys, "recipe check recipe.yaml")
    assert (
        out.startswith("recipe.yaml: whole. base, text-classification, into out\n") and err == "" and not Path("out").exists()
    )
    assert [list(step) for step in data(capsys, "recipe check recipe.yaml")["steps"]] == [["finetune"], ["prune"], ["measure"]]

    out, err = run(capsys, "run recipe.yaml")
    assert out == f"{Report.load('out')}\n" and "01-finetune: begins\n" in err and "\r" not in err
    assert data(capsys, "run recipe.yaml") == Report.load("out").to_dict()  # stdout is JSON alone; nothing is done again
    found = data(capsys, "inspect out")
    assert sum(f["neurons"] for f in found["ffn"]) == 64 and found["plan"]["edits"]


def test_shipped_recipes_are_listed_and_shown(capsys):
    folder = ROOT / "hf_compress" / "recipes"
    assert [one["name"] for one in data(capsys, "recipe list")] == sorted(p.stem for p in folder.glob("*.yaml"))
    assert run(capsys, "recipe show token-classification")[0] == (folder / "token-classification.yaml").read_text()


def test_the_demo_is_a_whole_recipe_on_real_digits(capsys, tmp_path):
    from sklearn.datasets import load_digits

    from hf_compress.cli.demo import write

    target = load_digits().target
    found = data(capsys, f"recipe check {write(tmp_path)}")
    assert [next(iter(step)) for step in found["steps"]] == ["finetune", "prune", "quantize", "measure"]
    assert found["output"] == str(tmp_path / "model") and not Path(found["output"]).exists()
    counts = [len(list(tmp_path.glob(f"digits/*/{i}/*.png"))) for i in range(10)]
    assert counts == [int((target == i).sum()) for i in range(10)]


# --- exit codes ------------------------------------------------------------------------------------------------------

FAILURES = {
    "interrupted": (
        KeyboardInterrupt(),
        130,
        "hf-compress run: interrupted. What was finished is kept; the same command goes on",
    ),
    "no space": (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "out/x: No space left on device. What was"),
    "a step": (hc.CompressionError("01-prune failed: no."), 1, "hf-compress run: 01-prune failed: no."),
    "the Hub": (PushError("Could not commit. Everything is in out", "out"), 1, "hf-compress run: Could not commit."),
    "anything": (RuntimeError("one\ntwo"), 1, "hf-compress run: RuntimeError: one two. --debug shows where."),
}


@pytest.mark.parametrize("error, code, said", FAILURES.values(), ids=FAILURES)
def test_work_that_fails(capsys, monkeypatch, error, code, said):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_compress.recipe.run_recipe", fail)
    out, err = run(capsys, "run recipe.yaml", code)
    assert said in err and err.count("\n") == 1 and out == ""


def test_a_report_that_cannot_be_written_is_a_failure(capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_compress.files.tempfile.mkdtemp", full)
    _, err = run(capsys, "measure cut --batch-sizes 1 --length 4 --repeats 1 -o there.json", 1)
    assert "No space left on device" in err and err.count("\n") == 1


# --- help and imports ------------------------------------------------------------------------------------------------


def test_every_example_in_the_help_is_a_right_command_line(capsys):
    seen = 0
    for words in [[], *([name] for name in COMMANDS), *(["recipe", name] for name in ("init", "check", "show"))]:
        out, _ = run(capsys, shlex.join([*words, "--help"]))
        examples = re.findall(r"^  hf-compress (.+?)(?:  +.*| > .*)?$", out, re.M)
        assert examples, words
        for example in examples:
            args = make_parser().parse_args(shlex.split(example))
            assert list(args.path[: len(words)]) == words
        seen += len(examples)
    assert seen >= 25


def test_version(capsys):
    assert run(capsys, "--version")[0] == f"hf-compress {hc.__version__}\n"


OPTIONAL = (
    "bitsandbytes",
    "datasets",
    "evaluate",
    "matplotlib",
    "peft",
    "rich",
    "sentence_transformers",
    "sklearn",
    "torchao",
    "trl",
)


def test_importing_the_package_imports_nothing_optional():
    """But what transformers' own Trainer imports: `datasets`, where it is installed."""
    code = f"""
import sys
from transformers import Trainer
before = set(sys.modules)
import hf_compress, hf_compress.cli
hf_compress.cli.main(["--version"])
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [f"hf-compress {hc.__version__}", "[]"]


def test_optimum_cli_opens_the_command_without_importing_ours(capsys, monkeypatch):
    """With optimum's base class in the form that its plug-in point needs: `REGISTER_COMMANDS`, `COMMAND`, `parse_args`, `run`."""
    import argparse

    base = types.ModuleType("optimum.commands.base")

    class Base:
        def __init__(self, args):
            self.args = args

    base.BaseOptimumCLICommand, base.CommandInfo = Base, lambda **facts: types.SimpleNamespace(**facts)
    for name in ("optimum", "optimum.commands"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "optimum.commands.base", base)
    path = ROOT / "scripts/optimum_cli/optimum/commands/register/register_hf_compress.py"
    spec = importlib.util.spec_from_file_location("register_hf_compress", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (command,) = module.REGISTER_COMMANDS
    parser = argparse.ArgumentParser()
    command.parse_args(parser)
    args = parser.parse_args(["inspect", "dense", "--json"])
    with pytest.raises(SystemExit, match="0"):
        command(args).run()
    assert json.loads(capsys.readouterr().out)["model"] == "dense"
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    assert capsys.readouterr().out.startswith("usage: optimum-cli compress")
