"""Batches that a model may run on, made from the signature of its forward and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from .examples_other import besides, others
from .examples_seen import heard, seen

MOST_TRIED = 24
Batch = dict[str, torch.Tensor]


def candidates(model: nn.Module, rows: int = 2, length: int = 12) -> Iterator[Batch]:
    """Batches for a model, the likeliest first; whether it runs on one is for the caller to see.

    Token ids are drawn from the vocabulary without the special tokens that the config names; an image (or a sound) has as
    many placeholders among them as `get_image_features` (`get_audio_features`) gives vectors for it. Pixels, waveforms and
    spectrograms are drawn from a normal distribution, at the smallest size that the config allows. What a model can do
    without (boxes around objects, an encoder's output) comes last.
    """
    asked = Asked(model, rows, length)
    parts = [list(_some(make(asked))) for make in (seen, heard, others)]
    made: list[Batch] = []
    for choice in islice(product(*parts), MOST_TRIED):
        batch = {name: value for part in choice for name, value in part.items()}
        count = next((v.shape[0] for v in batch.values() if v.ndim > 1 and v.shape[0] in (1, rows)), rows)
        batch.update(asked.text(batch, count))
        if batch:
            made.append({name: asked.placed(value) for name, value in batch.items()})
            yield dict(made[-1])
    for batch in made[:4]:
        for more in besides(asked, batch):
            yield {**batch, **{name: asked.placed(value) for name, value in more.items()}}


def _some(made: Iterator[Batch]) -> Iterator[Batch]:
    """What was made; one empty batch where nothing was."""
    first = next(made, {})
    yield first
    yield from made


class Asked:
    """What the forward of a model takes, and the sizes that its config and its parts' configs name."""

    def __init__(self, model: nn.Module, rows: int, length: int) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        self.model: Any = model
        self.config: Any = getattr(model, "config", None)
        self.names = {p.name for p in parameters}
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        self.required = {p.name for p in parameters if p.default is p.empty and p.kind in plain}
        self.main = getattr(model, "main_input_name", "input_ids")
        self.rows, self.length = rows, length
        both = getattr(self.config, "is_encoder_decoder", False)  # BART's classifier reads its answer at the end of the text
        self.reads_the_end = both and type(model).__name__.endswith("ForSequenceClassification")
        self.draw = torch.Generator().manual_seed(0)
        self.configs = list(_configs(self.config))
        weights = [p for p in model.parameters() if p.is_floating_point()]
        self.device = weights[0].device if weights else torch.device("cpu")
        self.dtype = weights[0].dtype if weights else torch.float32

    def placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def size(self, name: str, default: Any = None, part: str = "") -> Any:
        """A value of the config or of its parts: of those whose name holds `part` first."""
        order = (
            sorted(self.configs, key=lambda named: not any(word in named[0] for word in part.split("|")))
            if part
            else self.configs
        )
        return next((value for _, c in order if (value := _value(c, name)) is not None), default)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw)

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.draw)

    def words(self, rows: int, length: int, vocabulary: int | None = None) -> torch.Tensor:
        """Token ids that no config calls special."""
        vocabulary = vocabulary or _vocabulary(self.model)
        special = {v for _, c in self.configs for name, value in vars(c).items() for v in ids_in(name, value)}
        allowed = [i for i in range(min(4, vocabulary - 1), min(vocabulary, 4000)) if i not in special] or [vocabulary - 1]
        if vocabulary > 4000:  # a large one has few special tokens, at its end as a rule
            return self.whole(4, vocabulary - 1000, rows, length)
        return torch.tensor(allowed)[self.whole(0, len(allowed), rows, length)]

    def text(self, batch: Batch, rows: int) -> Batch:
        """`input_ids` with the placeholders of what else is in a batch, `decoder_input_ids`, and what goes with every token."""
        found: Batch = {}
        takes = "input_ids" in self.names and "input_ids" not in batch
        if takes and (self.main == "input_ids" or self.main not in batch or "pixel_values" in batch):
            longest = self.size("max_position_embeddings", self.length + 4, "text")
            length = min(self.length, int(longest) - 4) if isinstance(longest, int) and longest > 4 else self.length
            ids = self.words(rows, max(length, 2))
            for name in ("image", "audio", "video"):
                ids = self._with_placeholders(ids, name, batch)
            if self.reads_the_end and isinstance(eos := self.size("eos_token_id"), int):
                ids[:, -1] = eos
            if (
                "grounding" in str(self.config.model_type) and _vocabulary(self.model) > 1029
            ):  # [CLS], words, ".", words, ".", [SEP]:
                ids[:, 0], ids[:, length // 2], ids[:, -2], ids[:, -1] = (
                    101,
                    1012,
                    1012,
                    102,
                )  # a token sees those of its phrase
            found["input_ids"] = ids
            if "mm_token_type_ids" in self.names and len(batch):
                marks = [self.size(f"{what}_token_id") for what in ("image", "video")]
                found["mm_token_type_ids"] = sum(  # type: ignore[assignment]
                    (ids == mark).long() * kind for kind, mark in enumerate(marks, 1) if isinstance(mark, int)
                )
            if "bbox" in self.names:
                found["bbox"] = self.boxes(*ids.shape)
            if "qformer_input_ids" in self.names:
                found["qformer_input_ids"] = self.words(rows, 6, self.size("vocab_size", None, "qformer"))
                found["qformer_attention_mask"] = torch.ones_like(found["qformer_input_ids"])
            if "image_attention_mask" in self.names and "pixel_values" in batch and batch["pixel_values"].ndim == 5:  # IDEFICS
                found["image_attention_mask"] = torch.ones(*ids.shape, batch["pixel_values"].shape[1], dtype=torch.long)
            if "image_embeds_position_mask" in self.names:  # KOSMOS-2: where the vectors of the image go
                queries = int(self.size("latent_query_num", 4))
                found["input_ids"] = self.words(rows, queries + length)
                found["image_embeds_position_mask"] = (torch.arange(queries + length) < queries).long().repeat(rows, 1)
            if "lang_ids" in self.names and getattr(self.config, "languages", None):
                found["lang_ids"] = torch.zeros(rows, dtype=torch.long)
        if "decoder_input_ids" in self.names and getattr(self.config, "is_encoder_decoder", True) and not self.reads_the_end:
            vocabulary = self.size("vocab_size", None, "decoder")
            ids = self.words(rows, 6, min(vocabulary, _vocabulary(self.model)) if vocabulary else None)
            if self.config.model_type == "dia":  # one token of each book at every place
                ids = self.whole(4, 30, rows, 6, int(self.size("num_channels", 9, "decoder")))
            elif self.size("num_codebooks", None, "decoder"):  # MusicGen: the books of a row below one another
                ids = self.words(rows * int(self.size("num_codebooks", 4, "decoder")), 6, vocabulary)
            found["decoder_input_ids"] = ids
        return found

    def boxes(self, rows: int, length: int) -> torch.Tensor:
        """Boxes (left, top, right, bottom) in whole thousandths, or what else the config calls a box."""
        most = min(int(self.size("max_2d_position_embeddings", 1000)), 1000)
        if self.size("dim_bbox"):  # Bros: eight numbers from 0 to 1
            return torch.rand(rows, length, 8, generator=self.draw)
        corner = self.whole(0, most // 2, rows, length, 2)
        boxes = torch.cat([corner, corner + self.whole(1, most // 2 - 1, rows, length, 2)], -1)
        return boxes / 1000 if self.config.model_type == "udop" else boxes

    def _with_placeholders(self, ids: torch.Tensor, what: str, batch: Batch) -> torch.Tensor:
        token = next((t for name in (f"{what}_token_id", f"{what}_token_index") if isinstance(t := self.size(name), int)), None)
        count = self.vectors(what, batch) if token is not None else 0
        if not count or token is None:
            return ids
        each = -(-count // ids.shape[0])
        marks = [self.size(f"{side}_{edge}_token_id") for edge in ("start", "end") for side in ("vision",)]
        around = [torch.full((ids.shape[0], 1), m) if isinstance(m, int) and what != "audio" else ids[:, :0] for m in marks]
        middle = torch.full((ids.shape[0], each), token)
        return torch.cat([ids[:, :1], around[0], middle, around[1], ids[:, 1:]], 1)

    def vectors(self, what: str, batch: Batch) -> int:
        """How many vectors the model puts in the place of tokens, for all rows together."""
        methods = [method for m in self.model.modules() if callable(method := getattr(m, f"get_{what}_features", None))]
        if not methods:
            return 0
        main = {"image": "pixel_values", "audio": "input_features", "video": "pixel_values_videos"}[what]
        # MiniCPM's whole hands on whatever it is given
        method = next((m for m in methods if main in inspect.signature(m).parameters), methods[0])
        taken = inspect.signature(method).parameters
        if main not in batch:
            return 0
        given = {name: self.placed(value) for name, value in batch.items()}
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        wanted = [n for n, p in taken.items() if p.default is p.empty and p.kind in plain and n not in given]
        given.update({name: self.size(name) for name in wanted})
        features = self._run(method, {name: value for name, value in given.items() if name in taken})
        if features is None:  # VideoLlama3 hands the rest on
            features = self._run(method, {name: v for name, v in given.items() if name in taken or name.startswith(what)})
        pooled = getattr(features, "pooler_output", features)
        features = getattr(features, "last_hidden_state", None) if pooled is None else pooled
        if features is None:
            return 0
        tensors = features if isinstance(features, tuple | list) else [features]
        return sum(t.numel() // t.shape[-1] for t in tensors if isinstance(t, torch.Tensor) and t.ndim)

    def _run(self, method: Any, given: Batch) -> Any:
        training = [m for m in self.model.modules() if m.training]
        try:
            self.model.eval()
            with torch.no_grad():
                return method(**given)
        except Exception:  # it will be seen when the model runs
            return None
        finally:
            for module in training:
                module.training = True


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a value of each layer, of which there is no common one
        return None


def ids_in(name: str, value: Any) -> list[int]:
    """The ids of tokens in a config's value, by its name."""
    if not name.endswith(("_id", "_index", "_ids", "_token")):
        return []
    return [v for v in (value if isinstance(value, tuple | list) else [value]) if type(v) is int]


def _configs(config: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """A config and the configs in it, each with its path: outer ones first."""
    if not hasattr(config, "to_dict") or depth > 3:
        return
    yield name, config
    inner = [(key, value) for key, value in vars(config).items() if hasattr(value, "to_dict") and value is not config]
    for key, value in inner:
        yield from _configs(value, f"{name}.{key}".strip("."), depth + 1)


def _vocabulary(model: nn.Module) -> int:
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # models of several parts have several
        embeddings = None
    if isinstance(embeddings, nn.Embedding):
        return embeddings.num_embeddings
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore
    return int(getattr(text, "vocab_size", None) or 2)  # type: ignore[arg-type]
