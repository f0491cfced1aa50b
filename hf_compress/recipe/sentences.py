"""What sentence-transformers needs beside a model, so that `SentenceTransformer(folder)` loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..edits import CompressionError

FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
    "*_Normalize/*",
)


def sentence_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a model's sentence-transformers files, from the Hub's cache too; None where it has none."""
    path = Path(model)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
        except Exception:  # out of reach: the mean of the tokens is what sentence-transformers takes then, too
            return None
    return path if (path / "modules.json").is_file() else None


def pooling_of(model: str, revision: str | None) -> str:
    """`"cls"` where the model's own files say so, else `"mean"`."""
    folder = sentence_folder(model, revision)
    found = sorted(folder.glob("*_Pooling/config.json")) if folder is not None else []
    options: dict[str, Any] = json.loads(found[0].read_text()) if found else {}
    modules = json.loads((folder / "modules.json").read_text()) if folder is not None else []
    kinds = {module["type"].rpartition(".")[2] for module in modules} - {"Transformer", "Pooling", "Normalize"}
    if kinds:
        raise CompressionError(
            f"Recipes train no {', '.join(sorted(kinds))} module of sentence-transformers, and this model has one."
        )
    on = {name for name, value in options.items() if name.startswith("pooling_mode_") and value is True}
    mode = options.get("pooling_mode") or "+".join(sorted(on)) or "pooling_mode_mean_tokens"
    if mode not in ("cls", "mean", "pooling_mode_cls_token", "pooling_mode_mean_tokens"):
        raise CompressionError(f"Recipes pool by cls or mean, and this model by {mode}.")
    return "cls" if "cls" in mode else "mean"


def write_sentence_files(folder: Path, model: str, revision: str | None, pooling: str) -> None:
    """Copy the base model's files. Where it has none there is nothing to write: the mean is the library's default."""
    base = sentence_folder(model, revision)
    for pattern in FILES if base is not None else ():
        for path in base.glob(pattern):  # type: ignore[union-attr]
            target = folder / path.relative_to(base)  # type: ignore[arg-type]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
