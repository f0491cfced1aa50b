"""The callbacks in trainers that other people wrote, and metrics in their trackers."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

import hf_compress as hc
from hf_compress.host import refuse_drifting
from hf_compress.modules import is_gated
from tests.trainers import rows, trainer
from tests.zoo import build, outputs

ROOT = Path(__file__).parent.parent
WHY = "tests of other people's trainers; see docs/trainers.md for the versions they ran with"


def words() -> T.PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 99))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", model_max_length=40,
    )  # fmt: skip


TEXTS = [" ".join(f"w{int(i)}" for i in row["input_ids"]) for row in rows()]
PRUNE = dict(heads=0.5, neurons=0.5, every=1)


def options(folder, **more):
    return {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "logging_steps": 4, "disable_tqdm": True, **more,
    }  # fmt: skip


def heads(model) -> int:
    return sum(a.num_heads for a in hc.discover(model).attentions)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


# --- TRL ---------------------------------------------------------------------------------------------------------------


def sft(folder, callback, **more):
    trl = pytest.importorskip("trl", reason=WHY)
    datasets = pytest.importorskip("datasets", reason=WHY)
    arguments = trl.SFTConfig(**options(folder), bf16=False, max_length=16, **more.pop("arguments", {}))
    return trl.SFTTrainer(
        build("llama")[0],
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=words(),
        callbacks=[callback],
        **more,
    )


@pytest.mark.parametrize("arguments", [{}, {"packing": True, "gradient_checkpointing": False}], ids=["padded", "packed"])
def test_sft_trainer_prunes(arguments, tmp_path, fresh):
    callback = hc.PruningCallback(**PRUNE)
    t = sft(tmp_path, callback, arguments=arguments)
    t.train()
    t.save_model(str(tmp_path / "out"))
    assert heads(t.model) == 6 and sum(f.size for f in hc.discover(t.model).ffns) == 144
    assert t.model.config.quantization_config.plan == callback.plan
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    found = fresh.outputs("AutoModelForCausalLM", tmp_path / "out", batch)["logits"]
    assert torch.equal(found, outputs(t.model.eval(), batch))
    # TRL's own averages are those of the steps since its last line, not of what our line left over
    lines = [line for line in t.state.log_history if "loss" in line]
    assert lines and all("entropy" in line for line in lines)
    assert not any("entropy" in line for line in t.state.log_history if "heads_removed" in line)


def test_sft_trainer_quantizes(tmp_path, fresh):
    t = sft(tmp_path, hc.QuantizationCallback(4, every=2))
    t.train()
    t.save_model(str(tmp_path / "out"))
    assert {edit.bits for edit in t.model.config.quantization_config.plan.edits} == {4}
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    found = fresh.outputs("AutoModelForCausalLM", tmp_path / "out", batch)["logits"]
    assert torch.equal(found, outputs(t.model.eval(), batch))


def test_sft_trainer_with_adapters_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason=WHY)
    t = sft(tmp_path, hc.PruningCallback(**PRUNE), peft_config=peft.LoraConfig(r=4, target_modules="all-linear"))
    before = state(t.model)
    with pytest.raises(hc.CompressionError, match=r"carries adapters.*merge_and_unload"):
        t.train()
    assert same(t.model, before)


def test_sft_trainer_cannot_train_exits(tmp_path):
    with pytest.raises(hc.CompressionError, match="generation are not"):
        sft(tmp_path, hc.EarlyExitCallback(after=[0]))


# --- sentence-transformers ---------------------------------------------------------------------------------------------


def embedder(folder, callback, **more):
    st = pytest.importorskip("sentence_transformers", reason=WHY)
    datasets = pytest.importorskip("datasets", reason=WHY)
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=WHY)
    torch.manual_seed(0)
    T.BertModel(build("bert")[0].config).save_pretrained(folder / "base")
    words().save_pretrained(folder / "base")
    model = st.SentenceTransformer(str(folder / "base"), device="cpu")
    pairs = {"sentence1": TEXTS[:32], "sentence2": TEXTS[32:], "score": [float(i % 2) for i in range(32)]}
    return st.SentenceTransformerTrainer(
        model,
        args=st.SentenceTransformerTrainingArguments(**options(folder / "runs", **more)),
        train_dataset=datasets.Dataset.from_dict(pairs),
        eval_dataset=datasets.Dataset.from_dict(pairs),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[callback],
    )


EMBED = """
import sys, numpy, torch, hf_compress
from sentence_transformers import SentenceTransformer
torch.set_num_threads(1)
for folder in sys.argv[1:3]:
    numpy.save(folder + ".npy", SentenceTransformer(folder, device="cpu").encode(sys.argv[3:]))
"""


def test_a_sentence_transformer_is_small_and_embeds_the_same(tmp_path):
    kept = {}
    for name, callback in (("pruned", hc.PruningCallback(**PRUNE)), ("int8", hc.QuantizationCallback(8, every=2))):
        t = embedder(tmp_path, callback)
        dense = t.model.encode(TEXTS[:4])
        t.train()
        t.save_model(str(tmp_path / name))
        kept[name] = t.model.encode(TEXTS[:4])
        assert np.abs(kept[name] - dense).max() > 1e-3  # it learned, so equality below says something
    assert heads(type(t.model)(str(tmp_path / "pruned"), device="cpu")) == 6
    assert len(callback.plan.edits) == 3 + 3 * 6 + 1  # embeddings, layers, pooler
    command = [sys.executable, "-c", EMBED, str(tmp_path / "pruned"), str(tmp_path / "int8"), *TEXTS[:4]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, vectors in kept.items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), vectors)


def test_a_sentence_transformer_resumes_and_loads_the_best(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    whole = embedder(tmp_path / "a", hc.PruningCallback(**PRUNE), **saving)
    whole.train()
    again = embedder(tmp_path / "b", hc.PruningCallback(**PRUNE), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "runs" / "checkpoint-4"))
    assert np.array_equal(whole.model.encode(TEXTS[:4]), again.model.encode(TEXTS[:4]))
    # the middle of the training is the masked model, with every unit's gate
    st = pytest.importorskip("sentence_transformers", reason=WHY)
    middle = st.SentenceTransformer(str(tmp_path / "a" / "runs" / "checkpoint-6"), device="cpu")
    gates = {name: m.hfc_gate for name, m in middle.named_modules() if is_gated(m)}
    assert sum(int((gate == 0).sum()) for name, gate in gates.items() if "attention" in name) == 6 * 16
    seen = {}

    class Watch(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = best.model.encode(TEXTS[:4])
            best.model.train()

    value = iter(range(100, 0, -1))
    more = dict(load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True)
    best = embedder(tmp_path / "c", hc.PruningCallback(**PRUNE), **saving, **more)
    best.add_callback(Watch())
    evaluate = best.evaluate
    best.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_score": next(value)}
    best.train()
    assert best.state.best_global_step == 4  # the first at full sparsity, since the metric falls
    np.testing.assert_allclose(best.model.encode(TEXTS[:4]), seen[4], atol=1e-5)


def test_embeddings_have_no_exits(tmp_path):
    with pytest.raises(hc.CompressionError, match="no logits"):
        embedder(tmp_path, hc.EarlyExitCallback(after=[0]))


# --- transformers' own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "callback", [hc.PruningCallback(**PRUNE), hc.QuantizationCallback(8, every=2)], ids=lambda c: type(c).__name__
)
def test_seq2seq_trainer_generates_with_what_it_saves(callback, tmp_path):
    model, batch = build("t5")
    data = [{"input_ids": batch["input_ids"][i % 2], "labels": batch["decoder_input_ids"][i % 2]} for i in range(32)]
    arguments = T.Seq2SeqTrainingArguments(**options(tmp_path, predict_with_generate=True, generation_max_length=8))
    t = T.Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[callback])
    t.train()
    t.save_model(str(tmp_path / "out"))
    loaded = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    predicted = torch.tensor(t.predict(data[:2]).predictions)
    assert torch.equal(outputs(loaded, batch), outputs(t.model.eval(), batch))
    ids = torch.stack([row["input_ids"] for row in data[:2]])
    found = loaded.generate(input_ids=ids, max_length=8)
    assert torch.equal(found, predicted[:, : found.shape[1]])
    if isinstance(callback, hc.PruningCallback):
        assert heads(loaded) == 18  # of 9 attentions with 4
    else:
        assert "encoder.block.0.layer.0.SelfAttention.q" in {edit.module for edit in callback.plan.edits}


# --- PEFT --------------------------------------------------------------------------------------------------------------

CALLBACKS = {
    "prune": lambda: hc.PruningCallback(**PRUNE),
    "quantize": lambda: hc.QuantizationCallback(8, every=2),
    "exits": lambda: hc.EarlyExitCallback(after=[0]),
}


def adapted():
    peft = pytest.importorskip("peft", reason=WHY)
    return peft.get_peft_model(build("bert")[0], peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))


@pytest.mark.parametrize("name", CALLBACKS)
def test_adapters_are_refused_before_anything_changes(name, tmp_path):
    model = adapted()
    before = state(model)
    with pytest.raises(hc.CompressionError, match=r"carries adapters.*merge_and_unload"):
        trainer(tmp_path, [CALLBACKS[name]()], model=model, report_to=[]).train()
    assert same(model, before)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_merged_model_is_compressed(name, tmp_path, fresh):
    model, batch = adapted(), build("bert")[1]
    trainer(tmp_path, model=model).train()
    tuned = outputs(model.eval(), batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged.eval(), batch), tuned, atol=1e-5, rtol=1e-5)
    merged.requires_grad_(True)  # PEFT leaves what it adapted frozen
    callback = CALLBACKS[name]()
    t = trainer(tmp_path, [callback], model=merged)
    t.train()
    t.save_model(str(tmp_path / "out"))
    found = fresh.outputs("AutoModelForSequenceClassification", tmp_path / "out", batch)["logits"]
    assert torch.equal(found, outputs(t.model.eval(), batch)) and not torch.equal(found, tuned)
    assert {"prune": lambda: heads(merged) == 6, "quantize": lambda: len(callback.plan.edits) == 22, "exits": lambda: True}[
        name
    ]()


# --- several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "evaluated", "refused"), [(2, True, True), (2, False, False), (1, True, False)])
def test_processes_that_would_drift_apart_are_refused(processes, evaluated, refused, tmp_path):
    """transformers wraps nothing in DistributedDataParallel once accelerate has prepared the model for an evaluation."""
    t = trainer(tmp_path)
    if evaluated:
        t.evaluate()  # which marks the model, here as in several processes
    told = SimpleNamespace(
        args=SimpleNamespace(world_size=processes), model=t.model, model_wrapped=t.model_wrapped, is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )  # fmt: skip
    with pytest.raises(hc.CompressionError, match="gradients are not averaged") if refused else nullcontext():
        refuse_drifting(told, "PruningCallback")


@pytest.mark.parametrize("example", re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), re.S))
def test_the_examples_of_the_documentation_run(example, tmp_path, monkeypatch):
    """Each with models and data of its own, made here under the names that the page uses."""
    for package in re.findall(r"^from (\w+) import", example, re.M):
        pytest.importorskip(package, reason=WHY)
    datasets = pytest.importorskip("datasets", reason=WHY)
    monkeypatch.chdir(tmp_path)
    build("llama")[0].save_pretrained("my-llm")
    T.BertModel(build("bert")[0].config).save_pretrained("my-encoder")
    build("bert")[0].save_pretrained("my-classifier")
    build("t5")[0].save_pretrained("my-t5")
    for folder in ("my-llm", "my-encoder", "my-classifier", "my-t5"):
        words().save_pretrained(folder)
    pairs = {"sentence1": TEXTS[:32], "sentence2": TEXTS[32:], "score": [float(i % 2) for i in range(32)]}
    ids = [row["input_ids"].tolist() for row in rows(32)]
    names = {
        "texts": datasets.Dataset.from_dict({"text": TEXTS}),
        "pairs": datasets.Dataset.from_dict(pairs),
        "sentences": TEXTS[:4],
        "rows": rows(32),
        "translations": [{"input_ids": torch.tensor(x), "labels": torch.tensor(x)} for x in ids],
        "options": {key: value for key, value in options("runs").items() if key not in ("output_dir", "report_to")},
    }
    exec(example, names)


# --- trackers ----------------------------------------------------------------------------------------------------------


def logged(history, key):
    return [(line["step"], line[key]) for line in history if key in line]


def test_tensorboard_gets_what_the_callbacks_log(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason=WHY)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    both = [hc.PruningCallback(**PRUNE), hc.EarlyExitCallback(after=[0])]
    t = trainer(tmp_path / "run", both, report_to=["tensorboard"])
    t.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for key in ("heads_removed", "neurons_removed", "loss", "exit_loss_0", "final_loss"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        expected = logged(t.state.log_history, key)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    assert logged(t.state.log_history, "heads_removed")[-1][1] == 0.5


TRACK = """
import sys
import hf_compress as hc
from tests.trainers import trainer

t = trainer(sys.argv[1], [hc.PruningCallback(heads=0.5, every=1)], report_to=["trackio"], project="small", run_name="first")
t.train()
from trackio.sqlite_storage import SQLiteStorage
steps = [(line["step"], line["heads_removed"]) for line in t.state.log_history if "heads_removed" in line]
found = [(line["train/global_step"] if "train/global_step" in line else line["step"], line["train/heads_removed"])
         for line in SQLiteStorage.get_logs("small", "first") if "train/heads_removed" in line]
assert [value for _, value in found] == [value for _, value in steps] and steps[-1][1] == 0.5, (found, steps)
"""


@pytest.mark.slow
def test_trackio_gets_what_the_callbacks_log(tmp_path):
    pytest.importorskip("trackio", reason=WHY)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "board"), "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", TRACK, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "board").glob("small*"))
