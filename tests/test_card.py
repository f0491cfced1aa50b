"""Cards: the whole of one, what holds for all, and what a person wrote in them.

`python -m tests.test_card` renders the golden card again, after a change of the template; `--measure` makes its report anew.
"""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

import hf_compress as hc
from hf_compress.card import base_facts, merge_card, render_card
from hf_compress.edits import EDITS
from hf_compress.pictures import draw_, kept_units, stage_points
from hf_compress.plan import PLAN_FILE
from hf_compress.report import Cost, Latency, Report, Timing
from hf_compress.words import SENTENCES, TECHNIQUES, and_list, code, count, digits, size, table

GOLDEN = Path(__file__).parent / "golden_card"
CARDS = [GOLDEN, *sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/report.json"))]

ATTENTION, FFN, LINEAR = "encoder.layer.{}.attention.self", "encoder.layer.{}", "encoder.layer.{}.output.dense"
EDIT_OF = {
    "KeepHeads": hc.KeepHeads(ATTENTION.format(0), [0, 2, 3]),
    "KeepNeurons": hc.KeepNeurons(FFN.format(0), [7]),
    "KeepExperts": hc.KeepExperts("layers.0.mlp", [1, 4, 5]),
    "KeepChannels": hc.KeepChannels("stem.conv", [0, 5]),
    "KeepLayers": hc.KeepLayers([0, 1, 4]),
    "LowRank": hc.LowRank(LINEAR.format(0), 13),
    "DepthwiseSeparable": hc.DepthwiseSeparable("conv", 2),
    "Quantize": hc.Quantize(LINEAR.format(0)),
    "Sparsify": hc.Sparsify(LINEAR.format(0), pattern="2:4"),
    "AddExits": hc.AddExits([1]),
    "KeepVocabulary": hc.KeepVocabulary(range(9000)),
}
PLANS = {
    "empty": hc.Plan(),
    **{name: hc.Plan([edit]) for name, edit in EDIT_OF.items()},
    "many": hc.Plan(
        [
            *(hc.KeepHeads(ATTENTION.format(i), range(i + 1)) for i in range(3)),
            *(hc.KeepNeurons(FFN.format(i), range(1, 1500, i + 1)) for i in range(3)),
            hc.KeepLayers([0], stack="decoder"),
            *(hc.LowRank(LINEAR.format(i), 5 + i, given=True) for i in range(3)),
            *(hc.Quantize(LINEAR.format(i), bits=4, decode="call") for i in range(3)),
            hc.Quantize("embeddings", bits=2, group_size=16),
            hc.Quantize("pooler", activations="tensor"),
            hc.AddExits([0, 1], criterion="entropy"),
        ]
    ),
}
LEFT, FULL = Latency(0.00731234, 0.00712, 0.0075, 20), Latency(0.0203451, 0.0199, 0.0227, 20)
REPORT = Report(
    Cost(11_234_567, 5_423_111, 17_612_345, 345_678_912, LEFT, {"eval_loss": 0.3512, "eval_accuracy": 0.87912, "eval_runtime": 3.2}),
    Cost(22_713_216, 10_637_568, 90_911_744, 712_345_678, FULL, {"eval_loss": 0.3377, "eval_accuracy": 0.88022}),
    2.7823,
    (2.71, 2.85),
    3.4,
    {
        "hardware": "AMD EPYC (2 cores)", "threads": 1, "dtype": "float32", "torch": "2.13.0+cpu", "transformers": "5.23.0",
        "platform": "Linux", "shapes": {"input_ids": [8, 64], "attention_mask": [8, 64]},
    },
    (Timing(1, 64, LEFT, FULL, 1.0312, (1.0, 1.1)), Timing(32, 64, FULL, LEFT, 6.6123, (6.5, 6.7))),
    {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2", "base_revision": "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        "base_card": {"license": "other", "license_link": "LICENSE", "language": ["en"], "datasets": ["wikipedia"], "x": 1},
        "task": "text-classification", "metric": "accuracy", "seed": 0, "tier": "plugin", "repo_id": "me/small",
        "dataset": {"name": "stanfordnlp/sst2", "config": None, "split": "test", "rows": 1821, "metric_name": "Accuracy"},
        "versions": {"python": "3.11.7", "hf_compress": "0.1.0"},
        "recipe": "model: me/base\n\n\nsteps:\n  - distill: {temperature: 2}\n",
        "stages": [
            {"name": "dense", "metric": 0.88022, "latency": 0.0203451, "parameters": 22_713_216, "bytes": 90_911_744},
            {"name": "pruned", "metric": 0.87, "latency": {"median": 0.0099}, "parameters": 15_000_001, "bytes": None},
        ],
        "pictures": ["kept.png", "stages.png"],
    },
)  # fmt: skip
ALONE = Cost(640, 640, 2560, 0, LEFT)
REPORTS = {
    "full": REPORT,
    "none": None,
    "no baseline": replace(REPORT, against=None, speedup=None, speedup_interval=None, timings=(Timing(1, None, LEFT),)),
    "no metrics": replace(REPORT, model=replace(REPORT.model, metrics={}), against=replace(REPORT.against, metrics={})),
    "no about": replace(REPORT, about={}),
    "bare": Report(ALONE, None, None, None, None, {}),
    "stock": replace(REPORT, about={"tier": "stock", "task": "image-classification", "base_model": "/home/me/a b/vit"}),
    "one of each": replace(
        REPORT,
        model=replace(ALONE, metrics={"eval_f1": math.nan}),
        timings=(),
        conditions={"threads": 1, "shapes": {"x": [1]}, "dtype": "none"},
        about={"dataset": {"name": "data.csv", "rows": 1}, "metric": "f1", "task": "other", "stages": [{"name": "only"}]},
    ),
    "hostile": replace(
        REPORT,
        conditions={"hardware": "a | b\n---\n# c", "shapes": {"a|b": [2]}},
        about={
            "name": "x\n<!-- /hf_compress:title -->\n# y", "base_model": "../../etc", "repo_id": 'a"b\n/c', "seed": 0,
            "recipe": "```\n<!-- hf_compress:use 0123456789abcdef -->\n````\n", "dataset": {"name": "a|b", "split": "x`|y"},
            "stages": [{"name": "a|b", "metric": 0.5}, {"name": "\n# c", "latency": None}],
            "base_card": {"license": ["mit"], "language": [1], "datasets": "x"}, "task": "text-classification",
            "versions": {"a: b": "c\n---"},
        },
    ),
}  # fmt: skip


@pytest.fixture(params=[(p, r) for p in PLANS for r in REPORTS], ids=lambda pair: f"{pair[0]}-{pair[1]}")
def rendered(request):
    plan, report = PLANS[request.param[0]], REPORTS[request.param[1]]
    return plan, report, render_card(plan, report)


def body_of(card: str) -> str:
    """What people see: without the YAML, marks, code and the whole plan."""
    body = ModelCard(card, ignore_metadata_errors=True).text
    body = re.sub(r"^<!-- .* -->$", "", body, flags=re.M)
    return re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.M | re.S)


# --- the whole card --------------------------------------------------------------------------------------------------


def plan_beside(folder: Path) -> hc.Plan:
    file = folder / PLAN_FILE
    data = json.loads(file.read_text()) if file.is_file() else hc.Plan().to_dict()
    return hc.Plan.from_dict({key: value for key, value in data.items() if key != "tensors"})


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_report_and_plan_say(folder):
    assert (folder / "README.md").read_text() == render_card(plan_beside(folder), Report.load(folder))


def test_the_yaml_is_what_the_hub_reads(tmp_path):
    (tmp_path / "README.md").write_text(render_card(PLANS["Quantize"], REPORT))
    data = metadata_load(tmp_path / "README.md")
    index = data.pop("model-index")
    assert data == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_model_relation": "quantized",
        "language": ["en"],
        "license": "other",
        "license_link": "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/blob/main/LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "datasets": ["stanfordnlp/sst2", "wikipedia"],
        "metrics": ["accuracy"],
        "tags": ["hf_compress", "distillation", "quantization"],
    }
    name, results = model_index_to_eval_results(index)
    assert name == "small" and [(r.metric_type, r.metric_value) for r in results] == [("accuracy", 0.87912), ("loss", 0.3512)]
    assert {(r.task_type, r.dataset_type, r.dataset_split) for r in results} == {
        ("text-classification", "stanfordnlp/sst2", "test")
    }
    pruned = yaml.safe_load(render_card(PLANS["KeepHeads"], REPORT).split("---\n")[1])
    assert pruned["base_model_relation"] == "finetune" and pruned["tags"] == ["hf_compress", "pruning", "distillation"]


# --- what holds for every card ---------------------------------------------------------------------------------------


def test_every_card_is_whole(rendered):
    plan, report, card = rendered
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData) and data.library_name == "transformers" and data.tags[0] == "hf_compress"
    assert ("base_model_relation" in data.to_dict()) == ("base_model" in data.to_dict())
    body = body_of(card).replace("`pip install -c constraints.txt -e .`", "a command")
    for word in ("None", "  |  |", "{{", "{%", "()", " ,", " .", "``."):
        assert word not in body.replace("|  |", "")
    assert "\n\n\n\n" not in card.replace(code_of(report), "")
    assert not re.search(r"(?<![\d.,])1 (rows|heads|blocks|layers|modules|passes|threads|convolutions|edits|neurons)\b", body)
    assert not re.search(r"(?<![\d.,])[02-9] (row|head|block|layer|module|pass|thread|convolution|edit|neuron)\b", body)
    assert body.count("\n# ") + body.startswith("# ") == 1
    for heading, text in re.findall(r"^## (.*)\n+(.*)", body, re.M):
        assert text and not text.startswith("#"), f"{heading} is empty"
    for line in re.findall(r"^\|.*\|$", body, re.M):
        assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5, 6)
    assert merge_card(card, card) == card
    assert re.search(
        "import hf_compress" if not report or report.about.get("tier") != "stock" else "Plain transformers loads", body + card
    )


def code_of(report: Report | None) -> str:
    return str(report.about.get("recipe", "")).strip("\n") if report else ""


def numbers_in(value) -> list[float]:
    """Every number of a JSON value, and those that its texts hold."""
    if isinstance(value, dict):
        return [n for pair in value.items() for part in pair for n in numbers_in(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers_in(part)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", value)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def made_up(card: str, known: list[float]) -> list[str]:
    """Numbers that are none of the known ones, rounded and in any usual unit."""
    text = re.sub(r"\S*(/|`)\S*|\b[a-z_]+ \d+(\.\d+){2}\S*", "", body_of(card))  # names, paths and versions
    found = []
    for token in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text):
        value, places = float(token.replace(",", "")), len(token.partition(".")[2])
        near = 0.5 * 10**-places * (1 + 1e-9) if places else 0.5
        if not any(abs(n * scale - value) <= near for n in known for scale in (1, 1e3, 1e-3, 1e-6, 1e-9)):
            found.append(token)
    return found


def numbers_of(plan: hc.Plan, report: Report | None) -> list[float]:
    """What may stand in a card: the report's numbers, and the plan's with how many of each kind it has."""
    edits = plan.to_dict()["edits"]
    kinds = [sum(e["edit"] == name for e in edits) for name in EDITS]
    kept = [float(len(v)) for e in edits for v in e.values() if isinstance(v, list)]
    alike = {key: sum(str(e.get(key)) == str(v) for e in edits) for e in edits for key, v in e.items() if key == "bits"}
    modules = [float(sum(e.get("bits") == bits for e in edits)) for bits in (8, 4, 3, 2)]
    return [
        *(numbers_in(report.to_dict()) if report else []),
        *numbers_in(edits),
        *kinds,
        *kept,
        *alike.values(),
        *modules,
        0.0,
    ]


def test_no_number_is_made_up(rendered):
    plan, report, card = rendered
    known = numbers_of(plan, report)
    assert made_up(card, known) == []
    assert made_up(card.replace("What it does not do", "What it does not do\n\nIt is 77.7531x as fast."), known) == ["77.7531"]


def test_every_edit_has_words():
    assert set(EDITS.values()) == set(TECHNIQUES) == set(SENTENCES) == {type(edit) for edit in EDIT_OF.values()}


@pytest.mark.parametrize(
    ("plan", "report", "there", "absent"),
    [
        ("empty", "none", ["published with `hf_compress`", "Nothing was measured"], ["What was done", "Before and after"]),
        ("KeepHeads", "full", ["Attention heads: 1 block keeps 3 heads.", "# all-MiniLM-L6-v2, pruned and distilled"], []),
        ("KeepChannels", "full", ["Channels: 1 group keeps 2 channels.", "# all-MiniLM-L6-v2, pruned and distilled"], []),
        ("KeepLayers", "full", ["Layers: 3 layers of the stack stay, 0-1, 4, counted from 0."], ["quantized"]),
        ("LowRank", "full", ["Low rank: 1 layer is a product of two thinner ones, of rank 13."], ["fitted"]),
        ("DepthwiseSeparable", "full", ["1 convolution is split into up to 2 kernels per channel"], []),
        ("Quantize", "full", ["1 module is stored in 8 bits, one scale", "multiplied as integers on CPUs"], ["weights alone"]),
        ("KeepVocabulary", "full", ["Vocabulary: 9,000 tokens stay.", "distilled and given a smaller vocabulary"], []),
        ("AddExits", "full", ["1 classifier after layer 1, counted from 0", "exit_layers(model)", "depends on the inputs"], []),
        ("many", "full", ["3 modules are stored in 4 bits, in groups of 64, weights alone, unpacked whenever used."], []),
        ("many", "full", ["1 to 3 heads each", "500 to 1,499 neurons each", "less space and no less time"], []),
        ("many", "full", ["2 classifiers after layers 0-1", "of rank 5 to 7, fitted to the planner's inputs"], []),
        ("Quantize", "full", ["not, or hardly, faster than the model it was made from at batch 1 x 64 (1.03x)."], ["6.61x)."]),
        ("Quantize", "full", ["| Accuracy | 0.8802 | 0.8791 |  |", "| size on disk | 90.9 MB | 17.6 MB | 0.1937x |"], []),
        ("Quantize", "full", ["| latency, batch 32 x 64 | 7.312 ms (7.12-7.5) | 20.35 ms (19.9-22.7) | 6.61x as fast |"], []),
        ("Quantize", "full", ["Accuracy on stanfordnlp/sst2, split `test` of 1,821 rows is 0.8791, where that one has 0.8802"], []),
        ("Quantize", "full", ["| dense | 0.8802 | 20.35 ms | 22.7 M | 90.9 MB |", "| pruned | 0.87 | 9.9 ms | 15.0 M |  |"], []),
        ("Quantize", "full", ["on AMD EPYC (2 cores) with 1 thread in float32 by torch 2.13.0+cpu"], ["eval_", "runtime", "3.2"]),
        ("Quantize", "full", ['pipeline("text-classification", "me/small")', "![What each block kept", "size mismatch"], []),
        ("Quantize", "full", ["Seed 0; base model at revision `c9745ed1d9f2", "with python 3.11.7 and hf_compress 0.1.0."], []),
        ("KeepHeads", "stock", ["# vit, pruned", "AutoModelForImageClassification"], ["/home/me", "import hf_compress  #"]),
        ("KeepHeads", "no baseline", ["has 11.2 M parameters in 17.6 MB", "No other model was timed"], ["| ratio", "x as fast"]),
        ("KeepHeads", "no metrics", ["Its quality on a task was not measured"], ["its Accuracy", "model-index"]),
        ("KeepHeads", "no about", ["This is a model, pruned with `hf_compress`.", "Where `config.json` names"], ["How to reproduce"]),
        ("KeepHeads", "bare", ["has 640 parameters in 2.6 kB"], ["How to reproduce", "Measured"]),
        ("KeepHeads", "one of each", ["its f1 on data.csv of 1 row is nan", "with 1 thread."], ["model-index"]),
        ("Quantize", "full", ["| before | this model |", "Beside the model it was made from, measured in turn"], ["| all-Mini"]),
        ("Quantize", "full", ["biases, norms and every layer that the plan below does not list; they stay in floating point"], []),
        ("KeepHeads", "full", ["To get the plugin: `pip install -c constraints.txt -e .`"], ["floating point"]),
        ("KeepHeads", "stock", ["Plain transformers loads it"], ["pip install"]),
        ("KeepHeads", "hostile", ["`````yaml", "| a\\|b | 0.5 |"], ["\n# y", "\n# c", "\n---\n# c"]),
    ],
)  # fmt: skip
def test_what_a_card_says(plan, report, there, absent):
    card = render_card(PLANS[plan], REPORTS[report])
    for words in there:
        assert words in card
    for words in absent:
        assert words not in card


def test_files_and_folders_are_named_without_their_path():
    about = {
        **REPORT.about,
        "recipe": "recipe.yaml",
        "dataset": {"name": "/home/me/my data/sst2.tsv"},
        "base_model": "/home/me/bert",
    }
    card = render_card(PLANS["Quantize"], replace(REPORT, about=about))
    assert "/home/me" not in card and "its accuracy on sst2.tsv is 0.8791" in card and "This is bert for" in card
    assert "[recipe.yaml](recipe.yaml): `hf-compress run recipe.yaml`." in card and "```yaml" not in card
    results = ModelCard(card).data.eval_results
    assert {r.dataset_type for r in results} == {"sst2.tsv"} and metadata_load_text(card)["datasets"] == ["wikipedia"]


def metadata_load_text(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_facts_without_a_report():
    card = render_card(hc.Plan(), about={"base_model": "me/base", "base_card": {"pipeline_tag": "fill-mask", "license": "mit"}})
    assert ModelCard(card).data.to_dict() == {
        "base_model": "me/base", "base_model_relation": "finetune", "license": "mit", "library_name": "transformers",
        "pipeline_tag": "fill-mask", "tags": ["hf_compress"],
    }  # fmt: skip


@pytest.mark.parametrize(("plan", "report"), [(None, REPORT), ([], None), (hc.Plan(), {"model": 1})])
def test_what_no_card_is_made_of(plan, report):
    with pytest.raises(hc.CompressionError, match="render_card takes the (Plan|Report)"):
        render_card(plan, report)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("# no YAML", {}),
        ("---\na: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: mit\nlanguage: [en, 1]\ndatasets: x\ntags: [a]\n---\n", {"license": "mit"}),
        ("---\nlanguage: [en, de]\ndatasets: [x]\npipeline_tag: fill-mask\n---\n",
         {"language": ["en", "de"], "datasets": ["x"], "pipeline_tag": "fill-mask"}),
    ],
)  # fmt: skip
def test_what_is_inherited(text, found, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_facts(str(tmp_path)) == found
    assert base_facts("nobody/such-a-model") == base_facts("not an id at all!") == {}  # offline


# --- pictures and words ----------------------------------------------------------------------------------------------


def test_what_is_drawn():
    blocks = {"model": {"heads": {"a": 2, "b": 4}, "neurons": {"f": 8, "g": 9}},
              "against": {"heads": {"a": 4, "b": 4, "c": 4}, "neurons": {"f": 10, "g": 11, "h": 12}}}  # fmt: skip
    plan = PLANS["KeepHeads"] + PLANS["KeepNeurons"]
    assert kept_units(plan, {"blocks": blocks}) == {
        "heads": {"a": (2, 4), "b": (4, 4)},
        "neurons": {"f": (8, 10), "g": (9, 11)},
    }
    assert [list(of.values()) for of in kept_units(plan, {}).values()] == [[(3, None)], [(1, None)]]
    assert kept_units(PLANS["Quantize"], {"blocks": blocks}) == {}
    assert stage_points(REPORT.about) == [("dense", pytest.approx(20.3451), 0.88022), ("pruned", pytest.approx(9.9), 0.87)]
    assert stage_points({"stages": REPORT.about["stages"][:1]}) == []


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    report = replace(REPORT, about={k: v for k, v in REPORT.about.items() if k != "pictures"})
    assert draw_(tmp_path, PLANS["KeepHeads"], report) == report.about["pictures"] == ["kept.png", "stages.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in report.about["pictures"])
    before = [(tmp_path / name).read_bytes() for name in report.about["pictures"]]
    draw_(tmp_path, PLANS["KeepHeads"], report)
    assert before == [(tmp_path / name).read_bytes() for name in report.about["pictures"]]  # the same to the byte
    assert "![The metric" in render_card(PLANS["KeepHeads"], report)
    assert draw_(tmp_path / "none", hc.Plan(), REPORTS["bare"]) == [] and not (tmp_path / "none").exists()


def test_without_matplotlib_a_card_shows_none(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.drawing.find_spec", lambda name: None)
    report = replace(REPORT)
    assert draw_(tmp_path, PLANS["KeepHeads"], report) == [] == list(tmp_path.iterdir())
    assert "![" not in render_card(PLANS["KeepHeads"], report) and "![" in render_card(PLANS["KeepHeads"], REPORT)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (digits(0.88022), "0.8802"), (digits(0.5), "0.5"), (digits(123456.7), "123,457"), (digits(0.00012345), "0.0001234"),
        (digits(0.0), "0"), (digits(-1.5), "-1.5"), (digits(math.inf), "inf"), (digits(99999), "99,999"), (digits(0.6774, 3), "0.677"),
        (size(640), "640"), (size(640, "B"), "640 B"), (size(90_911_744, "B"), "90.9 MB"), (size(1.24e9), "1.2 G"),
        (count(1, "pass", "passes"), "1 pass"), (count(1821, "row"), "1,821 rows"), (count(0, "head"), "0 heads"),
        (and_list([]), ""), (and_list("a"), "a"), (and_list("abc"), "a, b and c"),
        (table([["", "a|b"], ["x\ny", ""]]), "|  | a\\|b |\n|---|---:|\n| x y |  |"),
        (code("a\n```\n", "yaml"), "````yaml\na\n```\n````"),
    ],
)  # fmt: skip
def test_how_things_are_written(said, expected):
    assert said == expected


def write_golden(measure: bool = False) -> None:
    """The sample: a tiny BERT that was really pruned, quantized and measured; its report is only made anew if asked."""
    if measure:
        from tests.zoo import build

        dense, batch = build("bert")
        small, _ = build("bert")
        plan = hc.plan_pruning(small, [{**batch, "labels": batch["input_ids"][:, 0] % 2}], heads=0.5, neurons=0.5)
        hc.apply_(small, plan)
        truth = batch["input_ids"][:, 0] % 2

        def accuracy(model):
            return {"accuracy": float((model.eval()(**batch).logits.argmax(-1) == truth).float().mean())}

        quantize = hc.plan_quantization(small, bits=8)
        hc.apply_(small, quantize)
        about = {
            "base_model": "./tiny-random-bert", "against": "tiny-random-bert", "seed": 0, "metric": "accuracy",
            "dataset": {"name": "random tokens", "rows": 2},
        }  # fmt: skip
        report = hc.measure(small, batch, against=dense, batch_sizes=(1, 32), metrics=accuracy, about=about)
        report.save(GOLDEN)
        (plan + quantize).save(GOLDEN)
    (GOLDEN / "README.md").write_text(render_card(plan_beside(GOLDEN), Report.load(GOLDEN)))


def test_no_value_can_begin_a_section(tmp_path):
    report = Report.load(GOLDEN)
    about = {**report.about, "recipe": "model: x\nsection: results\nEVERYTHING IS BETTER\nsection: use\npip install evil\n"}
    card = render_card(hc.Plan.load(GOLDEN), replace(report, about=about))
    assert card.index("EVERYTHING IS BETTER") > card.index("hf_compress:reproduce")
    sections = {m: card.index(f"<!-- hf_compress:{m} ") for m in ("results", "use", "reproduce")}
    assert sections["results"] < sections["use"] < sections["reproduce"] < card.index("pip install evil")


if __name__ == "__main__":
    write_golden("--measure" in sys.argv)
