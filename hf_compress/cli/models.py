"""Models by the name that a person types: found, opened without their weights, loaded. Or refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .arguments import Failed, Wrong, did_you_mean


def find(text: str, place: str) -> str:
    """A name as `from_pretrained` takes it: the folder of a saved model, or what can be an id on the Hub.

    Args:
        text (`str`): as it was typed.
        place (`str`): the argument, for the message.

    Raises:
        Wrong: a file, a folder without a model, a path to nothing, or no name that the Hub could have.
    """
    from ..about import is_repo_id

    path = Path(text).expanduser()
    if not text.strip() or "\0" in text:
        raise Wrong(f"{place}: must be a Hub id or a folder of a saved model, got {text!r}.")
    if path.is_dir():
        if (path / "config.json").is_file():
            return os.fspath(path)
        if (path / "adapter_config.json").is_file():
            raise Wrong(f"{place}: the folder {text!r} holds an adapter; merge it into its model first (merge_and_unload).")
        if any(path.glob("*.safetensors")):
            raise Wrong(
                f"{place}: the folder {text!r} holds weights and no config.json: copy the one that belongs to them, or save "
                "the model again."
            )
        if (path / "steps" / "run.json").is_file():
            raise Wrong(
                f"{place}: {text!r} is the output of a recipe that is not finished: `hf-compress run` on that recipe goes "
                f"on; what each finished step left is in {os.path.join(text, 'steps')}."
            )
        inside = sorted(p.parent.name for p in path.glob("*/config.json"))
        hint = f" {len(inside)} folder{'s' * (len(inside) > 1)} in it do: {', '.join(inside[-3:])}." if inside else ""
        raise Wrong(f"{place}: the folder {text!r} holds no model: it has no config.json.{hint}")
    if path.exists():
        raise Wrong(f"{place}: {text!r} is a file; a model is a folder with a config.json, or a Hub id.")
    near = did_you_mean(path.name, _beside(path))
    parent = "" if str(path.parent) == "." else f"{path.parent}{os.sep}"
    near = near.replace("mean '", f"mean '{parent}")
    if near and parent or not is_repo_id(text) or text[0] in "./~" or text.count("/") > 1:
        raise Wrong(f"{place}: there is no folder {text!r}{near or '.'}{_no_id(text) if not near else ''}")
    return text


def _beside(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return []


def _no_id(text: str) -> str:
    from ..about import is_repo_id

    return " A Hub id looks like owner/name." if not is_repo_id(text) or text[0] == "." else ""


def config_of(name: str, place: str) -> Any:
    """The config of a model, from a folder or the Hub.

    Raises:
        Wrong: there is none, or it is no model that transformers knows.
        Failed: the Hub did not answer.
    """
    from transformers import AutoConfig

    from ..publish import record_in

    try:
        record_in(name)  # a file that is no JSON is named, and what to do about it
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what a download, a parser, or a config's own checks raise
        raise refused(error, name, place) from error


def refused(error: BaseException, name: str, place: str, cure: str = "") -> Exception:
    """What to raise where a model does not load; `cure` is what helps where files of a folder are at fault."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,  # type: ignore[attr-defined]  # of whichever HTTP library the client has
        RepositoryNotFoundError,
    )

    from ..edits import CompressionError

    kinds = list(_chain(error))
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")

    def among(*types: type) -> bool:
        return any(isinstance(e, types) for e in kinds)

    if isinstance(error, CompressionError):
        return Wrong(f"{place}: {error}")
    local = Path(name).is_dir()
    near = did_you_mean(Path(name).name, _beside(Path(name))) if "/" not in name else ""
    near = near or "."
    if among(GatedRepoError):
        return Wrong(f"{place}: {name!r} is gated: ask for access on its page on the Hub, then `hf auth login`.")
    if among(RepositoryNotFoundError):
        return Wrong(f"{place}: there is no folder {name!r} here, and no such model on the Hub that you may see{near}")
    if not local and constants.HF_HUB_OFFLINE:
        return Wrong(f"{place}: there is no folder {name!r} here, and offline (HF_HUB_OFFLINE), none in the cache{near}")
    if not local and isinstance(error, OSError) and "does not appear to have a file" in said:
        return Wrong(f"{place}: {name!r} on the Hub has no config.json or no weights: no model that transformers loads.")
    if not local and (among(HTTPError, ConnectionError, TimeoutError) or "couldn't connect" in said):
        if not among(EntryNotFoundError) or "couldn't connect" in said:
            return Failed(
                f"{place}: could not read {name!r}: no answer from {constants.ENDPOINT}. Nothing was done; try again."
            )
    if isinstance(error, MemoryError):
        return Failed(f"{place}: {name!r} does not fit into memory. Nothing was done.")
    return Wrong(f"{place}: cannot load {name!r}: {said[:300].rstrip('.')}.{cure if local else ''}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def class_of(config: Any) -> Any:
    """The class that a checkpoint was saved from; `AutoModel` where the config does not say."""
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, name, None) if name else None
    return found if isinstance(found, type) else transformers.AutoModel


def check_weights(name: str, place: str) -> None:
    """Refuse a folder whose weights are not all there, before anything is read from them.

    Raises:
        Wrong: names the file, and what to do.
    """
    from ..edits import CompressionError
    from ..publish import record_in
    from ..publishable import check_folder

    if not Path(name).is_dir():
        return
    record = record_in(name)
    if record is not None and record.masks is not None:
        raise Wrong(
            f"{place}: {name!r} is from the middle of a training: its model is masked, not yet small, and costs what the whole "
            "one costs. Let the training end (`hf-compress run` goes on where it stood), and take what it leaves."
        )
    try:
        check_folder(name)
    except CompressionError as error:
        raise Wrong(f"{place}: {error}") from error


def load(name: str, place: str, kind: Any, dtype: Any = "auto") -> Any:
    """A model with its weights.

    Raises:
        Wrong: its files are missing or damaged, or hold another model.
        Failed: the Hub did not answer, or memory is full.
    """
    try:
        return kind.from_pretrained(name, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # a checkpoint fails in many ways
        raise refused(error, name, place, " If its files are damaged, save the model again.") from error


def without_weights(name: str, config: Any, place: str) -> Any:
    """A model as it loads, compressed or not, on the meta device: its modules and their shapes, no memory and no download.

    Raises:
        Wrong: it can be built neither like that nor with its weights.
    """
    import copy

    import torch

    from ..layout import finish_replayed, replay_
    from ..loader import METHOD, HfCompressConfig

    config = copy.deepcopy(config)
    kind, found = class_of(config), getattr(config, "quantization_config", None)
    if found is not None:
        del config.quantization_config
    try:
        with torch.device("meta"):
            make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
            model = make(config, dtype=getattr(config, "dtype", None) or torch.float32)
        if isinstance(found, dict) and found.get("quant_method") == METHOD:
            record = HfCompressConfig(**found)
            replay_(model, record.layout)
            finish_replayed(model, {**record.layout, "gates": {}})
        return model.eval()
    except Exception:  # not every model is made on the meta device
        return load(name, place, kind)
