"""What may be published: a model that is finished, a folder that is whole, arguments that mean something."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .edits import CompressionError
from .masking import skip_layer
from .measure import numbers_of
from .modules import is_gated
from .plan import Plan
from .publish import CARD_FILE, CONFIG_FILE, plan_of, record_in
from .quantization.fake import is_fake
from .refusals import check_adapters
from .report import REPORT_FILE, Report
from .yaml12 import dump

WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
STAGED = ".hf_compress_"  # what a save that was killed leaves


def check_model(model: Any) -> PreTrainedModel:
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    if not isinstance(inner, PreTrainedModel):
        held = (
            next((m for m in inner.modules() if isinstance(m, PreTrainedModel)), None) if isinstance(inner, nn.Module) else None
        )
        hint = f"It holds a {type(held).__name__}: push that one." if held is not None else "Load one with from_pretrained."
        if hasattr(model, "push_to_hub") and hasattr(model, "model") and hasattr(model, "args"):
            hint = "A Trainer has a push_to_hub of its own; or give trainer.model."
        raise CompressionError(f"push_to_hub takes a transformers model, got {named(model)}. {hint}")
    check_adapters(inner)
    for name, module in inner.named_modules():
        if is_gated(module) or "hfc_masks" in vars(module) or skip_layer in module._forward_hooks.values():
            raise CompressionError(
                f"{name} is masked, so the model is not finished: remove the mask (Mask.remove()), or cut what it hides "
                "(apply_ with its plan), then push."
            )
        if is_fake(module):
            raise CompressionError(
                f"{name} is quantized in appearance only: a QuantizationCallback is in the middle of its training. Push when "
                "train() has returned."
            )
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        if tensor.is_meta:
            raise CompressionError(f"{name} has no values (it is on the meta device): load the model's weights first.")
        if isinstance(tensor, DTensor):
            raise CompressionError(f"{name} is sharded over processes: save the model, load it in one process and push that.")
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        raise CompressionError(
            f"Push in one process only; this is rank {dist.get_rank()}: `if trainer.is_world_process_zero():`"
        )
    return inner


def check_arguments(repo_id: Any, private: Any, revision: Any, create_pr: Any, token: Any, commit_message: Any) -> None:
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError
        validate_repo_id(repo_id)
    except HFValidationError:
        raise CompressionError(
            f"repo_id must be 'owner/name' or 'name' of letters, digits, '-', '_' and '.' (at most 96, none of '-', '.' at the "
            f"ends, no '--' or '..'), got {repo_id!r}."
        ) from None
    for name, value in (("private", private), ("create_pr", create_pr)):
        if not isinstance(value, bool) and not (name == "private" and value is None):
            raise CompressionError(f"{name} is True or False, got {value!r}.")
    for name, value in (("revision", revision), ("commit_message", commit_message)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise CompressionError(f"{name} must be a text, got {value!r}.")
    if revision is not None and (COMMIT.fullmatch(revision) or re.search(r"[\s~^:?*\[\\]|\.\.|^[-/]|/$", revision)):
        raise CompressionError(f"revision must be the name of a branch, got {revision!r}; commits and tags do not move.")
    if token is not None and not isinstance(token, str | bool):
        raise CompressionError(f"token must be a text, True or False, got {type(token).__name__}.")


def check_tokenizer(model: PreTrainedModel, *given: Any) -> None:
    """Refuse a tokenizer whose own tokens (not those that were added to it) have ids which the model does not have."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # models of several parts
        return
    for one in given:
        tokenizer = getattr(one, "tokenizer", one)  # of a processor
        if isinstance(rows, int) and isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer: Any = tokenizer
            own = tokenizer.get_vocab().items() - tokenizer.get_added_vocab().items()
            _check_ids(max((index for _, index in own), default=0), rows, "The tokenizer")


def _check_ids(most: int, rows: int, what: str) -> None:
    if most >= rows:
        raise CompressionError(
            f"{what} gives ids up to {most}, and the model has {rows} tokens (0-{rows - 1}), so texts would fail: it is not "
            "that of this model. Where its vocabulary was cut: tokenizer = hc.cut_tokenizer(tokenizer, plan), and save that."
        )


def _check_tokenizer_in(path: Path) -> None:
    """The same for a folder: what `tokenizer.json` numbers, and the rows that `config.json` names."""
    file = path / "tokenizer.json"
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        added = {token["id"] for token in data.get("added_tokens") or ()}
        vocab = data.get("model", {}).get("vocab") or {}
        ids = set(range(len(vocab)) if isinstance(vocab, list) else vocab.values()) - added
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # whatever is wrong with it, loading will tell
        return
    if type(rows) is int and ids:
        _check_ids(max(ids), rows, str(file))


def check_plan(model: PreTrainedModel, plan: Any) -> Plan:
    if plan is not None and not isinstance(plan, Plan):
        raise CompressionError(f"plan must be a Plan, got {named(plan)}.")
    recorded = plan_of(model)
    if recorded and plan is not None and plan.edits != recorded.edits:
        raise CompressionError("plan is not what the model's config records; leave it out, and the record is taken.")
    return recorded or plan or Plan()


def check_report(model: PreTrainedModel, report: Any) -> Report | None:
    if isinstance(report, str | os.PathLike):
        report = Report.load(report)
    if report is None:
        return None
    if not isinstance(report, Report):
        raise CompressionError(f"report is what hc.measure gives (a Report), or the path of one, got {named(report)}.")
    mine = sum({id(p): count for module in model.modules() for p, count in numbers_of(module)}.values())
    if report.model.parameters != mine:
        raise CompressionError(
            f"The report is of another model: it has {report.model.parameters:,} parameters, this one {mine:,}. Measure this "
            "one: hc.measure(model, batch, against=dense)."
        )
    return report


def check_measured(folder: Path, report: Report | None) -> None:
    """Refuse a report that another model left in a folder: numbers of one model under the name of another."""
    held = None if report is None else tensor_bytes(folder)
    if report is not None and held not in (None, report.model.bytes) and not _leaves_weights_out(folder):
        raise CompressionError(
            f"The report is of another model, or of this one in another dtype: it was measured with {report.model.bytes:,} "
            f"bytes of weights, and the saved ones have {held:,}. Measure this model again (hf-compress measure FOLDER -o "
            f"FOLDER), or leave the report out: remove {REPORT_FILE} from the folder, and the {CARD_FILE} that shows it."
        )


def _leaves_weights_out(folder: Path) -> bool:
    """Whether transformers saves less of such a model than it has (Marian's sinusoids), so that bytes do not tell."""
    names = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("architectures")
    try:
        kinds = [getattr(transformers, str(name), None) for name in names or ()]
    except (ImportError, RuntimeError, TypeError):  # of a class whose packages are not installed
        return False
    return any(getattr(kind, "_keys_to_ignore_on_save", None) for kind in kinds)


def tensor_bytes(folder: Path) -> int | None:
    """Bytes of all tensors of a saved model, as the headers of its safetensors files tell; None for a model in pickles."""
    names = [name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).is_file()]
    if not names:
        return None
    if names[0].endswith(".json"):
        names = sorted(set(json.loads((folder / names[0]).read_text())["weight_map"].values()))
    held = 0
    for name in names:
        with open(folder / name, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        held += sum(
            end - begin for key, entry in header.items() if key != "__metadata__" for begin, end in [entry["data_offsets"]]
        )
    return held


def check_recipe(recipe: Any) -> str | None:
    if recipe is None:
        return None
    if isinstance(recipe, Mapping):
        try:
            return dump(dict(recipe))
        except yaml.YAMLError as error:
            raise CompressionError(f"recipe holds something that YAML cannot: {error}.") from error
    if not isinstance(recipe, str | os.PathLike):
        raise CompressionError(f"recipe must be the path of a YAML file, or a dict, got {named(recipe)}.")
    try:
        return Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompressionError(f"The recipe {os.fspath(recipe)!r} cannot be read ({error}).") from error


def check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CompressionError(f"output must be a folder, and {folder} is a file.")
    others = [path for path in folder.iterdir() if not path.name.startswith(STAGED)] if folder.is_dir() else []
    if others and not (folder / CONFIG_FILE).is_file():
        raise CompressionError(
            f"output must be a new or empty folder, or one that holds a model: {folder} holds other things, and all of a "
            "folder is published."
        )


def check_folder(folder: Any) -> None:
    if not isinstance(folder, str | os.PathLike) or not (Path(folder) / CONFIG_FILE).is_file():
        raise CompressionError(
            f"{folder!r} is no folder of a saved model: it has no {CONFIG_FILE}. Save one with model.save_pretrained(folder)."
        )
    path = Path(folder)
    record = record_in(path)
    if record is not None and record.masks is not None:
        raise CompressionError(
            f"{path} is from the middle of a training: its model is masked, not yet small. Push what the training ends with."
        )
    weights = [file for file in path.iterdir() if WEIGHTS.fullmatch(file.name)]
    try:
        indices = [json.loads(file.read_text())["weight_map"] for file in weights if file.suffix == ".json"]
        shards = {shard for index in indices for shard in index.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressionError(f"The index of the weights in {path} cannot be read ({error}). Save the model again.") from error
    _check_tokenizer_in(path)
    missing = sorted(shards - {file.name for file in weights})
    if missing:
        raise CompressionError(
            f"{path} lacks {missing[0]} (and {len(missing) - 1} more), which its index names. Save it again."
        )
    if not weights:
        raise CompressionError(f"{path} has no weights (model.safetensors). Save the model with model.save_pretrained(folder).")
    for file in weights:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise CompressionError(f"{file} is truncated or damaged ({error}). Save the model again.") from error


def named(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"
