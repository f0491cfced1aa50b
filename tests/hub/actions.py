"""What users of the Hub do, each in a process of its own (see `process.Process`). Arguments and results are JSON."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers as T
from huggingface_hub import HfApi, constants, hf_hub_download
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import hf_compress as hc
from hf_compress.hub import push_folder as _push_folder
from hf_compress.hub import push_to_hub as _push_to_hub
from tests.trainers import trainer
from tests.zoo import build

os.environ.pop("HF_HUB_OFFLINE", None)  # which `tests.trainers` sets for its processes; it was read before
torch.set_num_threads(1)
T.utils.logging.set_verbosity_error()
T.utils.logging.disable_progress_bar()


TEXTS = ["w5 w6 w7", "w90 w8"]


def model(family: str = "bert", seed: int = 0, cut: bool = True) -> T.PreTrainedModel:
    """A tiny model; cut so that its layers differ, which only the plugin loads."""
    found = build(family)[0].eval()
    torch.manual_seed(seed)
    found.classifier.weight.data.normal_()
    if cut:
        structure = hc.discover(found)
        first, last = structure.ffns[0], structure.ffns[-1]
        edits = [hc.KeepNeurons(first.name, range(24)), hc.KeepNeurons(last.name, range(40))]
        hc.apply_(found, hc.Plan([*edits, hc.KeepHeads(structure.attentions[0].name, [0, 2])]))
    return found


def tokenizer() -> T.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 99)}}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=40)


def inputs(family: str = "bert") -> dict[str, torch.Tensor]:
    return build(family)[1]


@torch.no_grad()
def logits(found: T.PreTrainedModel, family: str = "bert") -> list:
    """JSON keeps every bit of a float32."""
    return found.eval()(**inputs(family)).logits.tolist()


def measured(found: T.PreTrainedModel) -> hc.Report:
    return hc.measure(found, inputs(), against=model(cut=False), metrics={"accuracy": 0.75}, repeats=2, warmup=1)


def push(repo_id: str, family: str = "bert", seed: int = 0, whole: bool = False, **options: Any) -> dict[str, Any]:
    """`whole`: with tokenizer and report too."""
    found = model(family, seed)
    if whole:
        options.update(tokenizer=tokenizer(), report=measured(found))
    if options.pop("image_processor", False):
        options["processor"] = T.ViTImageProcessorPil(size={"height": 32, "width": 32})
    info = _push_to_hub(found, repo_id, **options)
    answer = {"oid": info.oid, "pr": info.pr_url, "logits": logits(found, family), "parameters": found.num_parameters()}
    if whole:
        answer["texts"] = T.pipeline("text-classification", model=found, tokenizer=tokenizer())(TEXTS)
    return answer


def push_folder(folder: str, repo_id: str, **options: Any) -> str:
    return _push_folder(folder, repo_id, **options).oid


def model_push(repo_id: str, **options: Any) -> list:
    found = model()
    found.push_to_hub(repo_id, **options)
    return logits(found)


def pull(repo_id: str, kind: str = "BertForSequenceClassification", family: str = "bert", **options: Any) -> dict[str, Any]:
    found = getattr(T, kind).from_pretrained(repo_id, **options)
    return {"logits": logits(found, family), "parameters": found.num_parameters()}


def classify(repo_id: str) -> list:
    return T.pipeline("text-classification", model=repo_id)(TEXTS)


def download(repo_id: str, path: str, **options: Any) -> str:
    return hf_hub_download(repo_id, path, **options)


def api(method: str, *, data: str | None = None, **options: Any) -> str:
    """Any method of `HfApi`; `data` is a file's content for `upload_file`."""
    if data is not None:
        options["path_or_fileobj"] = data.encode()
    return str(getattr(HfApi(), method)(**options))


def rows_of(repo_id: str, cache: str) -> list:
    import datasets

    return datasets.load_dataset(repo_id, split="train", cache_dir=cache).to_list()


def push_beside_another(repo_id: str, folder: str, path: str, data: str) -> None:
    """Somebody commits between our look at the repository and our commit."""
    ours = HfApi.create_commit

    def create_commit(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        HfApi.create_commit = ours  # type: ignore[method-assign]
        self.upload_file(path_or_fileobj=data.encode(), path_in_repo=path, repo_id=repo_id)
        return ours(self, *args, **kwargs)

    HfApi.create_commit = create_commit  # type: ignore[method-assign,assignment]
    try:
        _push_folder(folder, repo_id)
    finally:
        HfApi.create_commit = ours  # type: ignore[method-assign]


def save(folder: str, repo_id: str = "", **options: Any) -> None:
    """What a failed push leaves, for tests that push it again and again."""
    model().save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    assert Path(folder, "config.json").is_file()


def push_elsewhere(folder: str, repo_id: str, endpoint: str, token: str) -> None:
    """To another Hub than the process's own."""
    known = constants.ENDPOINT
    constants.ENDPOINT = endpoint
    try:
        _push_folder(folder, repo_id, token=token)
    finally:
        constants.ENDPOINT = known


class _Masked(T.TrainerCallback):
    """What the model says at the last checkpoint, before it is cut."""

    def on_save(self, args, state, control, model=None, **kwargs):
        self.logits, self.parameters = logits(model), model.num_parameters()
        model.train()


def train_and_push(
    folder: str, repo_id: str, kind: str = "CompressionTrainer", report: bool = False, late: bool = False, **card: Any
) -> dict[str, Any]:
    """`late`: nothing is pushed before the end."""
    masked = _Masked()
    saving = {"save_strategy": "steps", "save_steps": 6, "push_to_hub": not late, "hub_strategy": "every_save"}
    options = {"hub_model_id": repo_id, "hub_always_push": True, "max_steps": 12, **saving}
    callback = hc.PruningCallback(neurons=0.5, every=1)
    found = trainer(folder, [callback, masked], kind=getattr(hc, kind, None) or getattr(T, kind), **options)
    found.train()
    more = {"report": measured(found.model), **card} if report else card
    found.push_to_hub(**more)
    return {
        "logits": logits(found.model),
        "parameters": found.model.num_parameters(),
        "masked": masked.logits,
        "dense_parameters": masked.parameters,
    }


def push_output(folder: str, repo_id: str) -> None:
    """Another trainer of what the folder holds."""
    found = T.BertForSequenceClassification.from_pretrained(folder)
    trainer(folder, kind=hc.CompressionTrainer, model=found, hub_model_id=repo_id).push_to_hub()


class _Heard(logging.Handler):
    """What is said to the user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def push_and_listen(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    """`push_folder`, and the warnings of it."""
    heard, logger = _Heard(), logging.getLogger("hf_compress")
    logger.addHandler(heard)
    try:
        info = _push_folder(folder, repo_id, **options)
    finally:
        logger.removeHandler(heard)
    return {"oid": info.oid, "pr": info.pr_url, "said": heard.said}
