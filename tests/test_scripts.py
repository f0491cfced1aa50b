"""The example scripts, by every launcher, on models and data made here: what they save and report, by value."""

import ast
import contextlib
import csv
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_compress as hc
from tests.trainers import fingerprint, rows
from tests.zoo import build

ROOT = Path(__file__).parent.parent
SCRIPTS = ("prune", "distill", "quantize", "early_exit")
CLASSES = ["low", "high"]
SHARED = "# --- the same in prune.py, distill.py, quantize.py and early_exit.py"


def words() -> T.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(5, 99))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=40,
    )  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two models and their data as a user has them: a CSV with columns of odd names, and folders of pictures."""
    folder = tmp_path_factory.mktemp("given")
    text, image = build("bert")[0], build("vit")[0]
    text.save_pretrained(folder / "bert")
    image.save_pretrained(folder / "vit")
    words().save_pretrained(folder / "bert")
    T.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    table = [(" ".join(f"w{int(i)}" for i in row["input_ids"]), CLASSES[int(row["labels"])]) for row in rows(96)]
    for name, part in (("train", table[:64]), ("dev", table[64:])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("words", "class"), *part])
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for name, brightness in (("dark", 60), ("light", 190)):
            (folder / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw.normal(brightness, 40, (32, 32, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / "pictures" / split / name / f"{i}.png")
    return folder


LAUNCHERS = {
    "python": (),
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "{port}"),
    "accelerate": (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "{port}",
    ),
}  # fmt: skip
COMMON = (
    "--use_cpu", "True", "--report_to", "none", "--measure_repeats", "2", "--save_strategy", "no", "--disable_tqdm", "True",
    "--max_steps", "6", "--learning_rate", "1e-3",
)  # fmt: skip


def launch(given, launcher, *arguments):
    """Python started as a user starts it, in the folder of the data."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, *(part.format(port=port) for part in LAUNCHERS[launcher]), *map(str, arguments)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(given / launcher),
    }  # fmt: skip
    return subprocess.run(command, cwd=given, capture_output=True, text=True, timeout=400, env=environment)


def work(jobs: str) -> None:
    """Run scripts one after the other in this process (imports are most of a run's time); `python -m tests.test_scripts`."""
    rank, evaluate = os.environ.get("RANK", "0"), hc.CompressionTrainer.evaluate

    for script, arguments, output in json.loads(Path(jobs).read_text()):

        def watched(trainer, *args, output=output, **kwargs):
            metrics = evaluate(trainer, *args, **kwargs)
            Path(output, f"rank{rank}.json").write_text(json.dumps(fingerprint(trainer.model)))  # the last one stays
            return metrics

        hc.CompressionTrainer.evaluate = watched
        sys.argv = [script, *arguments, "--output_dir", output, *COMMON]
        with open(f"{output}/rank{rank}.txt", "w") as printed, contextlib.redirect_stdout(printed):
            runpy.run_path(script, run_name="__main__")


MODEL = "--model_name_or_path"
TEXT = ("--train_file", "train.csv", "--validation_file", "dev.csv", "--text_column", "words", "--label_column", "class")
IMAGE = ("--dataset_name", "pictures")


def heads(model) -> int:
    return sum(a.num_heads for a in hc.discover(model).attentions)


def depth(model) -> int:
    return len(hc.discover(model).layers)


def bits(model) -> set[int]:
    return {edit.bits for edit in model.config.quantization_config.plan.edits}


# script, arguments, what the saved model must be: of 12 heads and 288 neurons in 3 layers of random models
CASES = {
    "prune text": ("prune", (MODEL, "bert", *TEXT), lambda m: heads(m) == 6 and m.config.id2label == {0: "high", 1: "low"}),
    "prune images": ("prune", (MODEL, "vit", *IMAGE, "--heads", 0.25), lambda m: heads(m) == 9),
    "distil text": (
        "distill", ("--teacher_name_or_path", "bert", "--layers", 2, "--heads", 0.5, *TEXT),
        lambda m: depth(m) == 2 and heads(m) == 4,
    ),
    "distil images": ("distill", ("--teacher_name_or_path", "vit", "--layers", 1, *IMAGE), lambda m: depth(m) == 1),
    "quantize text": ("quantize", (MODEL, "bert", "--bits", 4, *TEXT), lambda m: bits(m) == {4}),
    "quantize images": ("quantize", (MODEL, "vit", "--bits", 8, "--do_train", *IMAGE), lambda m: bits(m) == {8}),
    "exits of text": (
        "early_exit", (MODEL, "bert", "--mean_depth", 3, *TEXT), lambda m: hc.exit_options(m)["after"] == [0, 1],
    ),
    "exits of images": (
        "early_exit", (MODEL, "vit", "--after", 1, "--mean_depth", 2, *IMAGE),
        lambda m: hc.exit_options(m)["after"] == [1],
    ),
    "prune text, torchrun": ("prune", (MODEL, "bert", *TEXT), lambda m: heads(m) == 6),
    "exits of images, torchrun": (
        "early_exit", (MODEL, "vit", "--after", 0, 1, "--mean_depth", 3, *IMAGE),
        lambda m: hc.exit_options(m)["after"] == [0, 1],
    ),
    "prune images, accelerate": ("prune", (MODEL, "vit", *IMAGE), lambda m: heads(m) == 6),
    "exits of text, accelerate": (
        "early_exit", (MODEL, "bert", "--after", 0, "--mean_depth", 3, *TEXT),
        lambda m: hc.exit_options(m)["after"] == [0],
    ),
    "distil text, accelerate": (
        "distill", ("--teacher_name_or_path", "bert", "--layers", 2, *TEXT), lambda m: depth(m) == 2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(given, tmp_path_factory):
    """The folder of each case, after one job a launcher."""
    outputs = {name: tmp_path_factory.mktemp("out") for name in CASES}
    jobs = {launcher: {} for launcher in LAUNCHERS}
    for name, (script, arguments, _) in CASES.items():
        launcher = name.partition(", ")[2] or "python"
        jobs[launcher][name] = [str(ROOT / "scripts" / f"{script}.py"), [*map(str, arguments)], str(outputs[name])]

    def start(launcher):
        listed = given / f"{launcher}.json"
        listed.write_text(json.dumps(list(jobs[launcher].values())))
        return launch(given, launcher, "-m", "tests.test_scripts", listed)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, LAUNCHERS):
            # a process that stops takes the others down, with pages of traces
            assert done.returncode == 0, done.stderr[-16000:]
    return outputs


def evaluated(given, model, image):
    """The accuracy on the rows that were held out, computed here."""
    if image:
        processor = T.AutoImageProcessor.from_pretrained(given / "vit")
        files = sorted((given / "pictures" / "test").glob("*/*.png"))
        batch = processor([Image.open(file) for file in files], return_tensors="pt")
        labels = torch.tensor([["dark", "light"].index(file.parent.name) for file in files])
    else:
        with open(given / "dev.csv", newline="") as file:
            texts, names = zip(*list(csv.reader(file))[1:], strict=True)
        batch = words()(list(texts), padding=True, return_tensors="pt")
        labels = torch.tensor([sorted(CLASSES).index(name) for name in names])
    with torch.no_grad():
        return float((model(**batch).logits.argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_was_asked_for_measured_and_printed(name, given, results):
    output = results[name]
    printed = (output / "rank0.txt").read_text()
    image = "images" in name
    kind = T.AutoModelForImageClassification if image else T.AutoModelForSequenceClassification
    model = kind.from_pretrained(output).eval()
    assert CASES[name][2](model)
    assert "loaded again: logits differ by at most 0.0e+00" in printed
    # the report: printed once, and of this model
    report = json.loads((output / "report.json").read_text())
    dense = kind.from_pretrained(given / ("vit" if image else "bert"))
    assert printed.count("bytes on disk") == 1
    assert report["against"]["parameters"] == dense.num_parameters()
    assert str(hc.Report.load(output)) in printed
    if bits_of := [m for m in model.modules() if hasattr(m, "bits")]:
        assert report["model"]["bytes"] < 0.4 * report["against"]["bytes"] and bits_of
    else:
        assert report["model"]["parameters"] == model.num_parameters()
    accuracy = json.loads((output / "eval_results.json").read_text())["eval_accuracy"]
    assert report["model"]["metrics"] == {"accuracy": accuracy}
    if "exits" not in name:  # they evaluate on the half that did not tune
        assert accuracy == pytest.approx(evaluated(given, model, image))
        assert report["against"]["metrics"]["accuracy"] == pytest.approx(evaluated(given, dense.eval(), image))
    # what it was measured on
    data = report["about"]["dataset"]
    split, rows = ("test", 16) if image else ("validation", 32)
    split, rows = (f"half of {split}", rows // 2) if "exits" in name else (split, rows)
    assert data == {
        "name": "./pictures" if image else "./dev.csv", "split": split, "rows": rows, "metric_name": "accuracy",
    }  # fmt: skip
    # its tokenizer or image processor came along
    (T.AutoImageProcessor if image else T.AutoTokenizer).from_pretrained(output)


@pytest.mark.parametrize("name", [name for name in CASES if ", " in name])
def test_two_processes_end_with_the_same_model(name, results):
    output = results[name]
    assert (output / "rank1.txt").read_text().count("bytes on disk") == 0  # one process reports
    first, second = (json.loads((output / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    kind = T.AutoModelForImageClassification if "images" in name else T.AutoModelForSequenceClassification
    assert first == fingerprint(kind.from_pretrained(output))


# script, arguments, what the one line says
WRONG = [
    ("prune", (), "--model_name_or_path"),
    ("prune", (MODEL, "bert"), "--dataset_name (Hub id or folder) or --train_file"),
    ("prune", (MODEL, "bert", *TEXT, *IMAGE), "--dataset_name (Hub id or folder) or --train_file"),
    ("prune", (MODEL, "bert", *TEXT, "--haeds", 0.5), "--haeds"),
    ("prune", (MODEL, "bert", *TEXT, "--heads", 1.5), "[0, 1)"),
    ("prune", (MODEL, "bert", *TEXT, "--score", "tailor"), "did you mean 'taylor'"),
    ("prune", (MODEL, "bert", *TEXT, "--task", "sound"), "--task is text or image, got 'sound'"),
    ("prune", (MODEL, "bert", *TEXT, "--max_train_samples", 0), "--max_train_samples is a number from 1, got 0"),
    ("prune", (MODEL, "bert", "--train_file", "none.csv"), "none.csv"),
    ("prune", (MODEL, "bert", "--train_file", "bert/config.yaml"), "no CSV, TSV, JSON, JSON lines or Parquet"),
    ("prune", (MODEL, "bert", "--dataset_name", "nobody/nothing"), "Cannot load the data"),
    (
        "prune",
        (MODEL, "bert", *IMAGE, "--validation_split", "valid"),
        "No split 'valid' (--validation_split); there are train, test",
    ),
    (
        "prune",
        (MODEL, "bert", *TEXT[:4], "--text_column", "wodrs"),
        "No column 'wodrs' (--text_column); there are words, class",
    ),
    ("prune", (MODEL, "bert", *TEXT[:4]), "Say --label_column; there are words, class"),
    ("prune", (MODEL, "bert", "--train_file", "odd.csv", "--label_column", "a"), "Say --text_column; there are a, b, c"),
    ("prune", (MODEL, "bert", "--train_file", "odd.csv", "--text_column", "b", "--label_column", "c"), "classes and no gaps"),
    ("prune", (MODEL, "bert", "--train_file", "odd.csv", "--text_column", "c", "--label_column", "a"), "rows without a text"),
    ("prune", (MODEL, "nowhere", *TEXT), "Cannot load 'nowhere' as a classifier of texts"),
    ("prune", (MODEL, "bert", *IMAGE), "Cannot load 'bert' as a classifier of images"),
    ("quantize", (MODEL, "bert", *TEXT, "--bits", 5), "bits"),
    ("quantize", (MODEL, "bert", "--train_file", "three.csv"), "has no head for 3 classes (a, b, c)"),
    ("distill", ("--teacher_name_or_path", "bert", *TEXT), "Which student?"),
    ("distill", ("--teacher_name_or_path", "bert", "--layers", 9, *TEXT), "9"),
    ("distill", ("--teacher_name_or_path", "bert", "--layers", 1, "--alpha_kd", -1, *TEXT), "alpha_kd"),
    ("distill", ("--teacher_name_or_path", "bert", "--layers", 1, "--train_file", "three.csv"), "nothing to teach"),
    ("early_exit", (MODEL, "bert", *TEXT, "--criterion", "sure"), "Unknown exit criterion 'sure'"),
    ("early_exit", (MODEL, "bert", *TEXT, "--after", 99), "99"),
    ("early_exit", (MODEL, "bert", *TEXT, "--mean_depth", 0.5), "mean_depth"),
    ("prune", (MODEL, "bert", *TEXT, "--heads", "nan"), "nan"),
    ("prune", (MODEL, "./bret", *TEXT), "Cannot load './bret' as a classifier of texts: there is no such folder."),
    ("prune", (MODEL, "bert", *TEXT, "--num_train_epochs", 0), "--num_train_epochs must be above 0, got 0"),
    ("prune", (MODEL, "bert", *TEXT, "--per_device_train_batch_size", 0), "--per_device_train_batch_size must be above 0"),
    ("quantize", (MODEL, "bert", *TEXT, "--gradient_accumulation_steps", -1), "--gradient_accumulation_steps must be above 0"),
    ("prune", (MODEL, "bert", *TEXT, "--heads", "half"), "invalid float value: 'half'"),
    ("prune", (MODEL, "bert", *TEXT, "--start", 2), "start and end are fractions"),
    ("prune", (MODEL, "bert", *TEXT, "--lr_scheduler_type", "cosin"), "lr_scheduler_type"),
    ("prune", (MODEL, "bert", *TEXT[:2], *TEXT[4:], "--validation_file", "none.csv"), "none.csv"),
    ("prune", (MODEL, "bert", "--train_file", "one.csv"), "One row is too few to hold some out"),
    ("prune", (MODEL, "bert", "--train_file", "empty.csv"), "Cannot load the data"),
    ("prune", (MODEL, "pictures", *TEXT), "Cannot load 'pictures' as a classifier of texts"),
    ("prune", (MODEL, "vit", *TEXT), "Cannot load 'vit' as a classifier of texts"),
    (
        "prune",
        (MODEL, "vit", *TEXT[:4], "--image_column", "words", "--label_column", "class"),
        "Column 'words' (--image_column) holds no images that can be opened",
    ),
    ("prune", (MODEL, "bert", *IMAGE, "--task", "text", "--text_column", "image"), "Column 'image' has rows without a text"),
    (
        "prune",
        (MODEL, "bert", "--train_file", "other.csv", "--validation_file", "three.csv"),
        "holds c, no class of the training",
    ),
    ("distill", ("--teacher_name_or_path", "bert", "--layers", 1, "--temperature", 0, *TEXT), "temperature"),
    ("distill", ("--teacher_name_or_path", "none", "--layers", 1, *TEXT), "Cannot load 'none' as a classifier of texts"),
    ("distill", ("--teacher_name_or_path", "bert", "--layers", 1, "--student_name_or_path", "bert", *TEXT), "does not go with"),
    ("quantize", (MODEL, "bert", *TEXT, "--bits", 8, "--group_size", 32), "group_size"),
    ("quantize", (MODEL, "bert", *TEXT, "--skip", "("), "regular expression"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), WRONG, ids=lambda value: None)
def test_a_wrong_argument_is_one_line(script, arguments, message, given, tmp_path, monkeypatch, capfd):
    (given / "odd.csv").write_text("a,b,c\nx,one,\ny,two,w7\nx,three,w8\n")
    (given / "one.csv").write_text("text,label\nw7,a\n")
    (given / "empty.csv").write_text("")
    (given / "other.csv").write_text("text,label\n" + "w7,a\nw8,b\n" * 4)
    (given / "three.csv").write_text("text,label\n" + "w7,a\nw8,b\nw9,c\n" * 4)
    monkeypatch.chdir(given)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--output_dir", str(tmp_path / "out"), *COMMON])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert left.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert message in lines[-1] and "error: " in lines[-1], lines[-3:]
    assert not any(re.search(r"Traceback|usage:|examples/s|it/s", line) for line in lines)
    assert not (tmp_path / "out" / "model.safetensors").exists()


ELSEWHERE = {
    "output that is a file": (["--model_name_or_path", "bert", "--output_dir", "dev.csv"], "--output_dir 'dev.csv' is a file"),
    "a file of options that is a list": (["list.json"], "error: "),
    "a file of options with a typo": (["typo.json"], "haeds"),
    "a file of options that is none": (["broken.json"], "error: "),
    "a file of options that is not there": (["none.json"], "none.json"),
}


@pytest.mark.parametrize(("arguments", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_wrong_output_or_file_of_options_is_one_line(arguments, message, given, monkeypatch, capfd):
    options = {"model_name_or_path": "bert", "train_file": "train.csv", "output_dir": "out", "haeds": 0.5}
    for name, text in (("list", "[]"), ("typo", json.dumps(options)), ("broken", "{")):
        (given / f"{name}.json").write_text(text)
    before = (given / "dev.csv").read_bytes()
    monkeypatch.chdir(given)
    more = [*TEXT, *COMMON] if len(arguments) > 1 else []
    monkeypatch.setattr(sys, "argv", ["prune", *arguments, *more])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / "prune.py"), run_name="__main__")
    lines = capfd.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and message in lines[-1] and lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines) and (given / "dev.csv").read_bytes() == before


# names of the head, of the data; names afterwards, index of the data's first class, whether the head is new, what is said
NAMES = {
    "none": (["LABEL_0", "LABEL_1"], ["high", "low"], ["high", "low"], 0, False, ""),
    "the same in another order": (["LOW", "HIGH"], ["high", "low"], ["LOW", "HIGH"], 1, False, ""),
    "others": (["neg", "pos"], ["high", "low"], ["high", "low"], 0, False, "was trained for neg, pos; here they are high, low"),
    "numbers in the data": (["neg", "pos"], [0, 1], ["neg", "pos"], 0, False, ""),
    "another number": (["neg", "mid", "pos"], ["high", "low"], ["high", "low"], 0, True, ""),
}


@pytest.mark.parametrize(("head", "names", "after", "first", "new", "said"), NAMES.values(), ids=NAMES)
def test_names_of_classes(head, names, after, first, new, said, tmp_path, capfd):
    """As run_glue.py: by name where the head knows the names; else the head takes those of the data, and it is said."""
    model = build("bert")[0]
    config = T.BertConfig(
        **{**model.config.to_dict(), "id2label": dict(enumerate(head)), "label2id": {n: i for i, n in enumerate(head)}}
    )
    T.BertForSequenceClassification(config).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    script = runpy.run_path(str(ROOT / "scripts" / "prune.py"), run_name="script")
    model, processor, is_new = script["load_model"](str(tmp_path), "main", "text", names)
    assert [model.config.id2label[i] for i in range(len(after))] == after and is_new == new
    assert model.config.label2id == {name: i for i, name in enumerate(after)}
    arguments = script["DataArguments"](train_file="x.csv", task="text", text_column="text", label_column="label", max_length=9)
    rows = script["datasets"].Dataset.from_dict({"text": ["w7", "w8"], "label": names})
    encoded = script["encode"](rows, None, arguments, names, model, processor, 0)
    assert encoded["labels"] == [first, 1 - first]
    err = capfd.readouterr().err
    assert said in err and ("note: " in err) == bool(said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_scripts_share_is_the_same(script):
    """One file each, so the part that reads data is there four times: it must not drift apart."""

    def shared(name):
        text = (ROOT / "scripts" / f"{name}.py").read_text()
        return text[text.index(SHARED) : text.index("# --- until here")]

    assert shared(script) == shared("prune")
    functions = {node.name for node in ast.parse(shared(script)).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"DataArguments", "load_data", "encode", "report_on"} <= functions


if __name__ == "__main__":
    work(sys.argv[1])
