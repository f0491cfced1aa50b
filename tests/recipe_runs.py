"""A shipped recipe on a tiny model of its kind, and its metric computed again by other means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
import yaml
from datasets import load_dataset

import hf_compress
from hf_compress.plan import Plan
from hf_compress.recipe import run_recipe
from hf_compress.report import Report
from tests.recipe_models import WORLDS

SHIPPED = sorted((Path(hf_compress.__file__).parent / "recipes").glob("*.yaml"))
# what tiny models need to learn in seconds, and what they must reach (a guess is at 0.5, 0 and 60)
LEARN = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "warmup_steps": 0}
REACHED = {
    "text-classification": 0.7,
    "token-classification": 0.6,
    "sentence-similarity": 0.5,
    "image-classification": 0.9,
    "text-generation": -20.0,
    "audio-classification": 0.9,
}


def shrunk(path: Path, root: Path) -> dict:
    """The shipped recipe with a tiny model and data in place of the Hub's."""
    root.mkdir()
    recipe = {**yaml.safe_load(path.read_text()), **WORLDS[path.stem](root), "output": str(root / "out")}
    for step in recipe["steps"]:
        ((name, options),) = step.items()
        if "epochs" in options:
            options |= LEARN
        if "round_to" in options:
            options["round_to"] = 8
        if name == "exits":
            options |= {"after": [0], "max_drop": 0.3}
        if name == "distill":
            options["layers"] = 1
        if name == "measure":
            options |= {"batch_sizes": [1, 4], "repeats": 2, "warmup": 1} | ({"length": 12} if "length" in options else {})
    return recipe


def check_shipped(path: Path, tmp_path: Path) -> None:
    """It runs, learns and compresses; what is in the folder is what was measured."""
    recipe = shrunk(path, tmp_path / "world")
    report = run_recipe(recipe)
    out = Path(recipe["output"])
    names = [next(iter(step)) for step in recipe["steps"]][:-1]
    assert sorted(p.name for p in (out / "steps").iterdir() if p.is_dir()) == [
        f"{i:02d}-{name}" for i, name in enumerate(["model", *names])
    ]
    about, metric = report.about, recipe["metric"]
    assert [stage["name"].partition(",")[0] for stage in about["stages"]] == names
    assert about["dataset"]["rows"] == (63 if metric == "perplexity" else 32)  # of text, lines, the empty ones too
    assert about["dataset"]["split"] == "test" and about["task"] == path.stem
    sign = -1 if metric == "perplexity" else 1
    assert sign * report.model.metrics[metric] > REACHED[path.stem], report
    assert report.model.bytes < 0.6 * report.against.bytes
    assert [timing.batch for timing in report.timings] == [1, 4]
    assert Report.load(out) == report
    assert {"README.md", "recipe.yaml", "compression_plan.json"} <= {p.name for p in out.iterdir()}
    kinds = {type(edit).__name__ for edit in Plan.load(out)}
    assert "Quantize" in kinds and ("KeepLayers" if "distill" in names else "KeepNeurons") in kinds
    assert again(path.stem, recipe, out) == pytest.approx(
        report.model.metrics[metric], rel=1e-6, abs=1e-6
    )  # float32, other batches


def again(task: str, recipe: dict, out: Path) -> float:
    """The metric of the published folder, by other means: transformers and numpy alone."""
    data = recipe["data"]
    if task == "image-classification":
        model, processor = T.AutoModelForImageClassification.from_pretrained(out), T.AutoImageProcessor.from_pretrained(out)
        rows = load_dataset(data["path"], split="test")
        with torch.no_grad():
            logits = model.eval()(**processor([row["image"] for row in rows], return_tensors="pt")).logits
        return float((logits.argmax(-1).numpy() == np.array(rows["label"])).mean())
    if task == "audio-classification":
        model, extractor = T.AutoModelForAudioClassification.from_pretrained(out), T.AutoFeatureExtractor.from_pretrained(out)
        from scipy.io import wavfile

        lines = [line.split(",") for line in (Path(data["path"]) / "test.csv").read_text().splitlines()[1:]]
        sounds = [wavfile.read(Path(data["path"]) / name)[1].astype(np.float32) / 32768 for name, _ in lines]
        with torch.no_grad():
            logits = model.eval()(**extractor(sounds, sampling_rate=8000, return_tensors="pt", padding=True)).logits
        guesses = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
        return float(np.mean([guess == label for guess, (_, label) in zip(guesses, lines, strict=True)]))
    tokenizer = T.AutoTokenizer.from_pretrained(out)
    if task == "text-classification":
        answers = T.pipeline("text-classification", model=str(out))
        lines = [line.split("\t") for line in (Path(data["path"]) / "test.tsv").read_text().splitlines()[1:]]
        return float(np.mean([answers(text)[0]["label"] == label for text, label in lines]))
    if task == "token-classification":
        model = T.AutoModelForTokenClassification.from_pretrained(out).eval()
        hits = found = there = 0
        for line in Path(data["test"]).read_text().splitlines():
            row = json.loads(line)
            with torch.no_grad():
                guess = model(**tokenizer(" ".join(row["tokens"]), return_tensors="pt")).logits[0].argmax(-1).tolist()
            tags = [model.config.id2label[i] for i in guess]
            found, there = found + tags.count("B-NAME"), there + row["ner_tags"].count("B-NAME")
            hits += sum(a == b == "B-NAME" for a, b in zip(tags, row["ner_tags"], strict=True))
        return 2 * hits / (found + there)
    if task == "sentence-similarity":
        from scipy.stats import spearmanr

        reason = "what SentenceTransformer loads is compared with what was measured"
        sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
        lines = [line.split(",") for line in (Path(data["path"]) / "test.csv").read_text().splitlines()[1:]]
        model = sentence_transformers.SentenceTransformer(str(out), device="cpu")
        left, right = (torch.nn.functional.normalize(torch.tensor(model.encode([r[i] for r in lines])), dim=-1) for i in (0, 1))
        return float(spearmanr((left * right).sum(-1), [float(r[2]) for r in lines]).statistic)
    model = T.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = []
    for line in Path(data["test"]).read_text().splitlines():
        ids += [*tokenizer(line, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] if line else []
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        return float(torch.exp(model(input_ids=blocks, labels=blocks).loss.double()))
