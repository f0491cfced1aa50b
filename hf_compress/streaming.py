"""`apply_to_folder`: a checkpoint cut tensor by tensor, without the model ever being in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, modeling_utils

from .edits import AddExits, CompressionError, KeepVocabulary, shown
from .files import staged
from .paging import SMALL, Pages
from .plan import Plan
from .refusals import check_foreign
from .surgery import change_

INDEX = "model.safetensors.index.json"
# what belongs to a model and is neither weights nor config: tokenizers, processors, the modules of a SentenceTransformer
BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "spiece*",
    "chat_template*", "*processor_config.json", "additional_chat_templates/*", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*",
)  # fmt: skip


def apply_to_folder(
    folder: str | os.PathLike,
    plan: Plan,
    out: str | os.PathLike,
    *,
    max_shard_size: int | str = "1GB",
    inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Change a saved model as a plan says, from folder to folder, with a small part of it in memory at a time.

    What is written is, key by key and to the bit, what loading the folder, `apply_` and `save_pretrained` write. The weights
    are mapped from the files and read where they are used: by the proof, which runs the model on its real weights one module
    after the other, and by the cut. What is made anew (rows that stay, integers, experts that transformers merges when it
    loads) goes to files without a name in `out`, at most as much as the model has. So the memory that is needed is that of
    the proof, a copy of one block, or of one shard while it is written, whichever is more.

    Args:
        folder (path): what `save_pretrained` wrote: a `config.json` and safetensors files, in shards or not, compressed or not.
        plan (`Plan`): the edits, in order; what `apply_` takes but `AddExits`, `KeepVocabulary`.
        out (path): another folder. It is made, or its model replaced, when everything is on disk; it gets the tokenizer's and
            processor's files too.
        max_shard_size (`int` or `str`, defaults to `"1GB"`): of the files that are written.
        inputs (`dict`, *optional*): a small batch for the proof, as for `apply_`.

    Returns:
        `Path`: `out`.

    Raises:
        CompressionError: the folder holds no whole safetensors checkpoint of a class that transformers knows, lacks weights
            of its model, or the plan is refused as `apply_` refuses it. `out` is as it was then.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import KeepNeurons, Plan, apply_to_folder
    >>> folder, out = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ... )).save_pretrained(folder)
    >>> _ = apply_to_folder(folder, Plan([KeepNeurons("encoder.layer.1", range(40))]), out)
    >>> BertModel.from_pretrained(out).encoder.layer[1].intermediate.dense
    Linear(in_features=32, out_features=40, bias=True)

    ```
    """
    source, target = _folder(folder, "folder"), _folder(out, "out")
    if not isinstance(plan, Plan):
        raise CompressionError(f"Expected a Plan, got {type(plan).__name__}. Plan([KeepHeads(...), ...]) makes one.")
    if any(isinstance(edit, AddExits) for edit in plan):
        raise CompressionError(
            "Exits are drawn at random and then trained, so a folder is not enough: load the model, apply_ the exits, train."
        )
    if any(isinstance(edit, KeepVocabulary) for edit in plan):
        raise CompressionError(
            "KeepVocabulary renumbers tokens, and the tokenizer that lies beside the weights would not follow: load the model, "
            "apply_ that edit and cut the tokenizer; the rest of the plan can then be applied to the folder."
        )
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise CompressionError(
            f"out must be another folder than {source}, not in it, got {target}; the weights are read as it is written."
        )
    files = _weight_files(source)
    config = _config(source)
    kind = _class(config, source)
    fresh = not target.exists()
    try:
        with staged(target, remove=_stale(target)) as stage:
            pages = Pages(stage, SMALL)
            model = _open(kind, config, source, files, pages)
            check_foreign(model)
            with pages.releasing(model):
                change_(model, plan, inputs, pages.spooled)
            _check_unchanged(model, pages)
            pages.release()
            with torch.no_grad(), pages.spooled(), _one_shard(pages):
                model.save_pretrained(stage, max_shard_size=max_shard_size)
            _copy_beside(source, stage)
    except BaseException:
        if fresh and target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        raise
    return target


def _folder(path: Any, what: str) -> Path:
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise CompressionError(f"{what} must be the path of a folder, got {shown(path)}.")
    return Path(text)


def _weight_files(folder: Path) -> list[Path]:
    """The files with the weights; a refusal that says what is missing."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names if Path(name).name == name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompressionError(f"{index} is not a whole index; download or save the model again.") from error
        if len(files) != len(names):
            raise CompressionError(f"{index} names files outside of its folder.")
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if not files or (missing and not index.is_file()):
        found = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".h5", ".msgpack", ".gguf", ".safetensors"))
        raise CompressionError(
            f"There is no model.safetensors in {folder} ({', '.join(found[:3]) or 'no weights at all'}). Name the folder of a "
            "model that save_pretrained wrote; from other formats, load it and save it once."
        )
    if missing:
        raise CompressionError(f"{folder} lacks {len(missing)} of {len(files)} files ({missing[0]}); download it again.")
    return files


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except CompressionError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CompressionError(f"The config in {folder} cannot be read: {str(error).splitlines()[0]}") from error


def _class(config: Any, folder: Path) -> type[PreTrainedModel]:
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CompressionError(
            f"The config in {folder} names {shown(names)} as what saved it, and transformers has no such class. Load it with "
            "its own code, and use apply_."
        )
    return found


def _open(kind: type[PreTrainedModel], config: Any, folder: Path, files: list[Path], pages: Pages) -> PreTrainedModel:
    """The model over its files: transformers loads what `state_dict=` holds, and copies nothing that is right as it is."""
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights.update(pages.read(file))
    with _one_thread(), torch.no_grad(), pages.spooled():
        loaded: Any = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        found = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[what])
        if found:
            raise CompressionError(
                f"The weights in {folder} lack {found[0]} (of {len(found)}) of {kind.__name__}, or have another shape there, "
                "and nothing can make them up: it was damaged, or saved from another class. Download or save it again."
            )
    model.config.name_or_path = os.fspath(folder)
    if model.can_generate():
        model.generation_config = _generation(folder)
    return model.eval()


def _generation(folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Transformers converts in its own threads else, in which no mode of ours is on."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


@contextmanager
def _one_shard(pages: Pages) -> Iterator[None]:
    """Let go of what was read for a shard when transformers has written it."""
    write = getattr(modeling_utils, "safe_save_file", None)
    if write is None:  # only more memory
        yield
        return

    def written(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        pages.release()

    modeling_utils.safe_save_file = written  # type: ignore[attr-defined]
    try:
        yield
    finally:
        modeling_utils.safe_save_file = write  # type: ignore[attr-defined]


def _check_unchanged(model: nn.Module, pages: Pages) -> None:
    """What a model writes into its own weights while it runs would be lost when their pages are let go."""
    for name, parameter in model.named_parameters():
        if parameter._version and pages.is_read(parameter):
            raise CompressionError(
                f"{type(model).__name__} changes its weight {name} when it runs, and cannot be cut on disk: load it, apply_."
            )


def _stale(folder: Path) -> list[str]:
    """The weights of a model that was in a folder before."""
    return [p.name for p in folder.glob("*") if p.name == INDEX or (p.name.startswith("model") and p.suffix == ".safetensors")]


def _copy_beside(source: Path, stage: Path) -> None:
    for pattern in BESIDE:
        for path in source.glob(pattern):
            to = stage / path.relative_to(source)
            if path.is_file() and not to.exists():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
