"""Wrong command lines: each ends with exit code 2 and one line that names the place, and nothing is written."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
import yaml

import hf_compress as hc
from hf_compress.cli import main
from tests.recipe_models import TEXT, text_classification
from tests.trainers import trainer
from tests.zoo import build

# the words, and what the line must name
WRONG = {
    # commands and options
    "no command": ("", "which command? inspect, run"),
    "no such command": ("inspekt bert", "no command 'inspekt'; did you mean 'inspect'"),
    "nothing like a command": ("42", "no command '42'. Commands: inspect"),
    "an option before a command": ("--jsn inspect bert", "no option '--jsn'"),
    "no recipe command": ("recipe", "which command? init, check, list, show"),
    "no such recipe command": ("recipe chekc good.yaml", "no command 'chekc'; did you mean 'check'"),
    "an option with a typo": ("measure small --agianst bert", "no option '--agianst'; did you mean '--against'"),
    "an option cut short": ("measure small --thread 1", "no option '--thread'; did you mean '--threads'"),
    "an option of another command": ("inspect bert --against small", "no option '--against'"),
    "a short option that is not there": ("inspect bert -x", "no option '-x'"),
    "a typo hides what is missing": ("push --privat", "no option '--privat'; did you mean '--private'"),
    "an option in a recipe command": ("recipe init bert --tsak x", "no option '--tsak'; did you mean '--task'"),
    "one argument too many": ("inspect bert vit", "'vit', which is one argument too many"),
    "one recipe too many": ("run good.yaml bad.yaml", "'bad.yaml', which is one argument too many"),
    "an argument missing": ("inspect", "required: MODEL"),
    "a repository missing": ("push small", "required: REPO"),
    "a value missing": ("measure small --against", "argument --against: expected one argument"),
    "values missing": ("measure small --batch-sizes", "argument --batch-sizes: expected at least one argument"),
    "a value for a flag": ("inspect bert --json=yes", "argument --json: ignored explicit argument 'yes'"),
    "json where no table is": ("recipe show text-classification --json", "no option '--json'"),
    # models
    "no folder, like one": ("inspect ./bret", "MODEL: there is no folder './bret'; did you mean 'bert'"),
    "no folder, like none": ("inspect ./zzzzzz", "MODEL: there is no folder './zzzzzz'"),
    "no absolute folder": ("inspect /no/such/folder", "MODEL: there is no folder '/no/such/folder'"),
    "an id that is no id": ("inspect a//b", "MODEL: there is no folder 'a//b'. A Hub id looks like owner/name"),
    "an id of three parts": ("inspect a/b/c", "MODEL: there is no folder 'a/b/c'"),
    "an id with spaces": ("inspect 'my model'", "MODEL: there is no folder 'my model'"),
    "an id that is not there": ("inspect nobody/nothing", "MODEL: there is no folder 'nobody/nothing' here"),
    "a name like a folder": ("inspect bret", "MODEL: there is no folder 'bret' here, and offline"),
    "an empty model": ("inspect ''", "MODEL: must be a Hub id or a folder"),
    "a model that is a file": ("inspect good.yaml", "MODEL: 'good.yaml' is a file"),
    "a folder without a model": ("inspect texts", "MODEL: the folder 'texts' holds no model: it has no config.json"),
    "a folder around models": ("inspect around", "1 folder in it do: inner"),
    "an adapter": ("inspect adapter", "MODEL: the folder 'adapter' holds an adapter; merge"),
    "a config that is no JSON": ("inspect broken", "MODEL: broken/config.json cannot be read"),
    "a config that is no JSON, measured": ("measure broken", "OUT: broken/config.json cannot be read"),
    "a config that is no JSON, pushed": ("push broken me/x", "broken/config.json cannot be read"),
    "a config that is a list": ("inspect listed", "MODEL: cannot load 'listed'"),
    "weights without a config": ("inspect bare", "MODEL: the folder 'bare' holds weights and no config.json: copy the one"),
    "weights without a config, pushed": ("push bare me/x", "FOLDER: the folder 'bare' holds weights and no config.json"),
    "truncated weights": ("inspect short", "MODEL: short/model.safetensors is truncated or damaged"),
    "truncated weights, measured": ("measure short", "OUT: short/model.safetensors is truncated or damaged"),
    "truncated weights, pushed": ("push short me/x", "short/model.safetensors is truncated or damaged"),
    "truncated weights as BASE": ("measure small --against short", "argument --against: short/model.safetensors is truncated"),
    "a shard missing": ("inspect sharded", "MODEL: sharded lacks model-00001-of-00002.safetensors"),
    "a shard missing, measured": ("measure sharded", "OUT: sharded lacks model-00001-of-00002.safetensors"),
    "a checkpoint with masks": ("measure masked", "OUT: 'masked' is from the middle of a training: its model is masked"),
    "a checkpoint with masks, pushed": ("push masked me/x", "masked is from the middle of a training"),
    "a checkpoint with masks as BASE": ("measure small --against masked", "argument --against: 'masked' is from the middle"),
    "a recipe's folder that is not finished": (
        "measure killed",
        "OUT: 'killed' is the output of a recipe that is not finished",
    ),
    "a recipe's folder that is not finished, inspected": ("inspect killed", "each finished step left is in killed/steps"),
    "a config of no model": ("inspect unknown", "MODEL: cannot load 'unknown'"),
    "a record that was changed": ("inspect tampered", "MODEL"),
    # measure
    "OUT without weights": ("measure unweighted", "OUT: unweighted has no weights (model.safetensors). Save"),
    "OUT that is no model": ("measure texts --against bert", "OUT: the folder 'texts' holds no model"),
    "BASE that is not there": ("measure small --against ./bret", "argument --against: there is no folder './bret'; did you"),
    "BASE of another task": ("measure small --against tokens", "argument --against: 'tokens' is a BertForTokenClassification"),
    "BASE that reads pictures": ("measure small --against vit", "argument --against: 'vit' is a ViTForImageClassification"),
    "a batch of nothing": ("measure small --batch-sizes 0", "argument --batch-sizes: must be a whole number >= 1, got '0'"),
    "a negative batch": ("measure small --batch-sizes 1 -4", "argument --batch-sizes: must be a whole number >= 1, got '-4'"),
    "a batch in words": ("measure small --batch-sizes many", "argument --batch-sizes: must be a whole number"),
    "a negative length": ("measure small --length -1", "argument --length: must be a whole number >= 1, got '-1'"),
    "a fraction of a repeat": ("measure small --repeats 1.5", "argument --repeats: must be a whole number >= 1, got '1.5'"),
    "no repeats": ("measure small --repeats 0", "argument --repeats: must be a whole number >= 1"),
    "no threads": ("measure small --threads 0", "argument --threads: must be a whole number >= 1"),
    "too many threads to count": ("measure small --threads 99999999999", "argument --threads: must be a whole number"),
    "a negative warmup": ("measure small --warmup -1", "argument --warmup: must be a whole number >= 0"),
    "no such dtype": ("measure small --dtype flaot32", "argument --dtype: must be one of float32, bfloat16, float16, got"),
    "longer than it reads": ("measure small --length 41", "argument --length: 41 tokens are more than bert reads, 40"),
    "the length of pictures": ("measure vit --length 8", "argument --length: ViTForImageClassification reads no texts"),
    "a report into a file": ("measure small -o good.yaml", "argument --output: 'good.yaml' is a file"),
    "a report into nowhere": ("measure small -o no/where/report.json", "argument --output: there is no folder 'no/where'"),
    "a report over a config": ("measure small -o small/config.json", "Not a report: expected what Report.to_dict() gives"),
    "a report over one of another model": (
        "measure tokens -o theirs.json",
        "argument --output: 'theirs.json' is the report of another",
    ),
    "a report over half of one": ("measure small -o half.json", "half.json is not a whole report"),
    "a report that would lose its baseline": (
        "measure small -o both.json",
        "compares with a baseline, and what it says of that",
    ),
    # recipes
    "no such recipe": ("run nope.yaml", "nope.yaml:1: there is no such file"),
    "a recipe that is a folder": ("run bert", "bert:1: "),
    "a wrong recipe": ("run bad.yaml", "bad.yaml:8: prune has no 'haeds'; did you mean 'heads'"),
    "a wrong recipe, checked": ("recipe check bad.yaml", "bad.yaml:8: prune has no 'haeds'; did you mean 'heads'"),
    "a recipe that is no text": ("recipe check bert/model.safetensors", "bert/model.safetensors:1: this is not UTF-8"),
    "output that is a file": ("run good.yaml --output bad.yaml", "argument --output: 'bad.yaml' is a file"),
    "output that is a file, checked": ("recipe check good.yaml --output bad.yaml", "argument --output: 'bad.yaml' is a file"),
    "output that is empty": ("run good.yaml --output ''", "argument --output: must not be empty"),
    "output that holds other things": ("run good.yaml --output texts", "'texts' holds something else"),
    "a push to no name": ("run good.yaml --push-to-hub me//x", "argument --push-to-hub: must be 'owner/name'"),
    "a push without a token": ("run good.yaml --push-to-hub me/x", "no token for the Hub"),
    "a template for no model": ("recipe init ./bret", "MODEL: there is no folder './bret'; did you mean 'bert'"),
    "a template over a file": ("recipe init bert -o good.yaml", "argument -o: 'good.yaml' is there already"),
    "a template into a folder": ("recipe init bert -o texts", "argument -o: 'texts' is a folder"),
    "a template into nowhere": ("recipe init bert -o no/where.yaml", "argument -o: there is no folder 'no'"),
    "a template for no task": (
        "recipe init bert --task text-clasification",
        "argument --task: unknown task 'text-clasification'; did you mean 'text-classification'",
    ),
    "a template for a task of other models": (
        "recipe init vit --task text-classification",
        "argument --task: 'vit' (vit) is no model for text-classification. Tasks that fit it: image-classification.",
    ),
    "a template for a task of no encoder": (
        "recipe init bert --task text-generation",
        "is no model for text-generation. Tasks that fit it: text-classification, token-classification, sentence-similarity.",
    ),
    "a template for a quantized model": ("recipe init int8", "'int8' is quantized: its weights are integers"),
    "a template for a damaged config": ("recipe init broken", "MODEL: broken/config.json cannot be read"),
    "no shipped recipe": ("recipe show text-clasification", "NAME: no recipe 'text-clasification' ships; did you mean 'text-"),
    # push and demo
    "a push of nothing": ("push ./bret me/x", "FOLDER: there is no folder './bret'; did you mean 'bert'"),
    "a push of an id": ("push nobody/nothing me/x", "FOLDER: there is no folder 'nobody/nothing'"),
    "a push of no model": ("push texts me/x", "FOLDER: the folder 'texts' holds no model"),
    "a push without weights": ("push unweighted me/x", "no weights"),
    "a push to a path": ("push small me/my/x", "argument REPO: must be 'owner/name'"),
    "a push to a name with dashes": ("push small me/--x", "argument REPO: must be 'owner/name'"),
    "a push to a commit": (f"push small me/x --revision {'0' * 40}", "revision must be the name of a branch"),
    "a push to no branch": ("push small me/x --revision ''", "argument --revision: must not be empty"),
    "an empty token": ("push small me/x --token ''", "argument --token: must not be empty"),
    "a demo into a file": ("demo --output good.yaml", "argument --output: 'good.yaml' is a file"),
    "a demo below a file": ("demo --output good.yaml/x", "argument --output: 'good.yaml' is a file"),
    "a demo among other things": ("demo --output texts", "argument --output: the folder 'texts' holds other things"),
    "a demo over another recipe": ("demo --output other", "argument --output: the folder 'other' holds other things"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Models, files that are none, and recipes."""
    root = tmp_path_factory.mktemp("world")
    recipe = text_classification(root)
    recipe |= {"steps": [{"finetune": {"epochs": 1}}, {"prune": {"heads": 0.5}}], "output": "out"}
    recipe = {"model": "bert", "task": recipe["task"], "data": "texts", **{k: recipe[k] for k in ("steps", "output")}}
    (root / "good.yaml").write_text(yaml.dump(recipe, sort_keys=False))
    (root / "bad.yaml").write_text(yaml.dump(recipe, sort_keys=False).replace("heads", "haeds"))
    torch.manual_seed(0)
    for name, kind in (("small", T.BertForSequenceClassification), ("tokens", T.BertForTokenClassification)):
        kind(T.BertConfig(**TEXT)).save_pretrained(root / name)
    build("vit")[0].save_pretrained(root / "vit")
    (root / "around" / "inner").mkdir(parents=True)
    (root / "around" / "inner" / "config.json").write_text("{}")
    record = {"quant_method": "hf_compress", "plan": None, "layout": '{"modules": {}}', "digest": "0" * 64}
    config = json.loads((root / "small" / "config.json").read_text())
    for name, file, text in (
        ("adapter", "adapter_config.json", "{}"),
        ("broken", "config.json", "{"),
        ("unknown", "config.json", '{"model_type": "no_such_model"}'),
        ("unweighted", "config.json", json.dumps(config)),
        ("tampered", "config.json", json.dumps({**config, "quantization_config": record})),
        ("listed", "config.json", "[]"),
        ("killed/steps", "run.json", "{}"),
        ("other", "recipe.yaml", "model: bert\n"),
    ):
        (root / name).mkdir(parents=True)
        (root / name / file).write_text(text)
    for name in ("short", "bare", "sharded", "int8"):
        shutil.copytree(root / "small", root / name)
    weights = (root / "short" / "model.safetensors").read_bytes()
    (root / "short" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "bare" / "config.json").unlink()
    (root / "sharded" / "model.safetensors").rename(root / "sharded" / "model-00002-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    model = T.BertForSequenceClassification.from_pretrained(root / "small")
    ids = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    hc.measure(model, ids, repeats=1, warmup=0).save(root / "theirs.json")
    hc.measure(model, ids, against=model, repeats=1, warmup=0).save(root / "both.json")
    (root / "half.json").write_text((root / "both.json").read_text()[:200])
    hc.apply_(model, hc.plan_quantization(model, bits=8)).save_pretrained(root / "int8")
    masked(root / "masked")
    return root


def masked(folder: Path) -> None:
    """A checkpoint from the middle of a training that prunes."""
    callback = hc.PruningCallback(heads=0.5, every=1, end=0.9)
    trainer(folder.parent / "training", [callback, Stop()], save_strategy="steps", save_steps=6).train()
    (folder.parent / "training" / "checkpoint-6").rename(folder)


class Stop(T.TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("line, named", WRONG.values(), ids=WRONG)
def test_wrong_command_lines(world, capsys, monkeypatch, line, named):
    monkeypatch.chdir(world)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = files(world)
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    assert named in err
    assert (code, out, err.count("\n"), err[-1]) == (2, "", 1, "\n")
    assert "Traceback" not in err and files(world) == before


def test_the_program_itself_says_the_same(world, tmp_path):
    """What only a process can show: the exit code, and one line of ours (torchao tells which of its libraries do not load)."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_compress", "measure", "small", "--against", "vit"], cwd=world, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    ours = done.stderr[done.stderr.index("hf-compress") :]
    assert ours.count("\n") == 1 and ours.startswith("hf-compress measure: argument --against: 'vit' is a ViT")
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    assert main(["inspect", "./bret", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("hf-compress inspect: MODEL: there is no folder")
