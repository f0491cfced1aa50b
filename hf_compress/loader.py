"""How a compressed checkpoint loads: transformers' own registry of quantizers hands our config to us.

Importing `hf_compress` registers the method `"hf_compress"`. `from_pretrained` then builds the stock model on the meta
device, we replay the layout on it, and transformers fills in the weights. Without the import, plain transformers
fails on the shapes; it never loads something else.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .caches import host_caches_
from .conversions import name_
from .edits import CompressionError
from .expert_kernels import settle_kernels_
from .inner import around, check_inner
from .layout import OWN, check, finder, finish_replayed, replay_
from .parts import gathered, stamp_parts_
from .plan import Plan
from .quantization import is_quantized
from .sparse import is_sparse

METHOD = "hf_compress"
FORMAT = 1


class HfCompressConfig(QuantizationConfigMixin):
    """What `config.json` says about a compressed model: the edits (for people) and the layout (for the loader).

    Args:
        plan (`dict`): the edits that led here, as `Plan.to_dict()`.
        layout (`str` or `dict`): absolute shapes and attributes of every touched module, as JSON text: one string, because
            transformers copies and prints a config several times whenever a model loads.
        masks (`dict`, *optional*): of a checkpoint from the middle of a training: a plan that is masked, not yet cut.
        format (`int`): the format of this dict. Every later version reads it.
        digest (`str`, *optional*): of everything else here; checked when the checkpoint loads.
        inner (`dict`, *optional*): the config of the other quantization method that the weights are in (see `inner.py`).

    Raises:
        CompressionError: the dict was changed after it was written, or comes from a later version.
    """

    def __init__(
        self,
        plan: dict[str, Any] | None = None,
        layout: dict[str, Any] | str | None = None,
        masks: dict[str, Any] | None = None,
        format: int = FORMAT,
        digest: str | None = None,
        inner: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        unknown.pop("quant_method", None)
        if format != FORMAT or unknown:
            raise CompressionError(
                f"This checkpoint has compression format {format!r}{f' and {sorted(unknown)}' if unknown else ''}; this "
                f"hf_compress reads format {FORMAT}. Upgrade hf_compress."
            )
        self.format = format
        self.plan_dict = Plan().to_dict(spans=True) if plan is None else plan
        self.masks_dict = masks
        self.inner = inner
        self.of_part = False  # handed on for the whole, whose config has none
        self.order: Any = None  # a live config of another method that from_pretrained is to convert the weights to
        if inner is not None:
            check_inner(inner)
        self.layout_text = layout if isinstance(layout, str) else _dump(layout or {"modules": {}})
        try:
            self.layout = check(json.loads(self.layout_text))
        except ValueError as error:
            if isinstance(error, CompressionError):
                raise
            raise CompressionError(f"The checkpoint's compression layout is not whole: {error}.") from error
        content = _dump({"plan": self.plan_dict, "masks": masks}) + self.layout_text + ("" if inner is None else _dump(inner))
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        if digest is not None and digest != self.digest:
            raise CompressionError(
                "The compression record in config.json is not the one that was written (its digest differs): the file was "
                "edited or damaged. Download or save the checkpoint again."
            )

    @property
    def plan(self) -> Plan:
        return Plan.from_dict({k: v for k, v in self.plan_dict.items() if k != "tensors"})

    @property
    def masks(self) -> Plan | None:
        return None if self.masks_dict is None else Plan.from_dict(self.masks_dict)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)  # transformers asks configs in memory as it asks dicts

    def __deepcopy__(self, memo: dict) -> HfCompressConfig:
        return self  # a record is replaced, never changed; configs are copied several times whenever a model loads

    def to_dict(self) -> dict[str, Any]:
        data = {
            "quant_method": METHOD,
            "format": self.format,
            "plan": self.plan_dict,
            "layout": self.layout_text,
            "digest": self.digest,
        }
        if self.masks_dict is not None:
            data["masks"] = self.masks_dict
        if self.inner is not None:
            data["inner"] = self.inner
        return copy.deepcopy(data)


def _dump(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def compression_of(config: Any) -> HfCompressConfig | None:
    """The compression record of a model's config, if it has one.

    Raises:
        CompressionError: the weights are quantized with another method, alone or inside a compressed checkpoint.
    """
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        found = HfCompressConfig(**found)
    if isinstance(found, HfCompressConfig) and found.inner is not None:
        found = found.inner
    if found is None or isinstance(found, HfCompressConfig):
        return found
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
    method = getattr(method, "value", method)
    raise CompressionError(
        f"This model is quantized with {method}; cutting a quantized model is not offered. Cut it first, then quantize."
    )


def record_in(config: Any) -> HfCompressConfig | None:
    """The record that a config itself holds, whatever the weights are in; none where it is another method's."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        found = HfCompressConfig(**found)
    return found if isinstance(found, HfCompressConfig) else None


def of_a_part(config: Any) -> HfCompressConfig | None:
    """A record that one of a config's sub-configs holds, marked as such."""
    subs = [getattr(config, key, None) for key in getattr(type(config), "sub_configs", None) or {}]
    found = copy.copy(next((found for sub in subs if (found := record_in(sub)) is not None), None))
    if found is not None:
        found.of_part = True
    return found


def of_the_whole(model: Any, record: HfCompressConfig) -> HfCompressConfig:
    """The record of a model whose config has none: transformers then hands us that of one of its parts."""
    return gathered(model, None, record_in) if record.of_part else record


def _find_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers looks for a quantizer with; it does not look into the sub-configs, where parts have their records."""
    if getattr(config, "quantization_config", None) is None and quantization_config is None:
        found = of_a_part(config)
        if found is not None:
            config.quantization_config = found  # until the model is there, and `of_the_whole` can say what is whose
    return _their_quantizer(config, quantization_config, *args, **kwargs)


class HfCompressQuantizer(HfQuantizer):
    """Replays the layout before the weights are read, and leaves an ordinary model behind.

    Where another method's weights are inside, or asked for, that method's quantizer does the rest (`inner.around`).
    """

    quantization_config: HfCompressConfig
    requires_calibration = False

    def __new__(cls, quantization_config: HfCompressConfig | None = None, **kwargs: Any) -> Any:
        plain = super().__new__(cls)  # without a config where it is copied
        if quantization_config is None or (quantization_config.inner is None and quantization_config.order is None):
            return plain
        HfQuantizer.__init__(plain, quantization_config, **kwargs)
        return around(plain)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """The `state_dict=` that `save_pretrained` was called with: of a model with a quantizer, it takes what this gives."""
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        return (None if caller is None else caller.f_locals.get("state_dict")), {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `model.dequantize()` calls."""
        from .quantization.to_float import dequantize_  # needs what this module holds

        return dequantize_(model, dtype)

    def _convert_model_for_quantization(self, model: Any) -> None:
        pass  # swaps experts for other methods' kernels

    def update_parallel_plan(self, *args: Any) -> None:
        pass  # our weights have no second name

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        return [] if self.quantization_config.layout.get("names") == OWN else weight_conversions

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CompressionError("HfCompressConfig is a record, not an order: cut a loaded model with apply_(model, plan).")
        _check_files(checkpoint_files)
        self.quantization_config = of_the_whole(model, self.quantization_config)
        replay_(model, self.quantization_config.layout)
        for module in model.modules():
            if is_quantized(module) or is_sparse(module):
                # nothing can be drawn for integers, or as wide as a vector is; `_check_filled` tells what is missing
                module._is_hf_initialized = True
        find = finder(model)
        for name, entry in self.quantization_config.layout["modules"].items():
            locked = find(name) if entry.get("lock") else None
            if locked is not None:
                vars(locked)["_is_hf_initialized"] = True  # Funnel would count two axes
            block = find(name.rpartition(".")[0]) if entry.keys() & {"children", "kinds"} else None
            # Switch would draw as many experts as the config says, Nemotron's upsampler the taps of a convolution that it had
            if block is None or isinstance(block, PreTrainedModel):
                continue
            if "children" in entry or not (block._parameters or block._buffers):
                vars(block)["_is_hf_initialized"] = True
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Leave an ordinary model behind: half(), Trainer and save_pretrained treat quantized ones differently."""
        model.config.quantization_config = self.quantization_config
        stamp_parts_(model, self.quantization_config, [])
        _check_filled(model, self.quantization_config.layout, self.shapes)
        finish_replayed(model, self.quantization_config.layout)
        model.is_quantized = False
        for name in ("hf_quantizer", "quantization_method"):
            model.__dict__.pop(name, None)
        host_quantized_(model)
        host_caches_(model, self.quantization_config)
        settle_kernels_(model)
        if self.quantization_config.layout.get("names") == OWN:
            name_(model, [])  # parts that are saved by themselves too
        return model


def host_quantized_(model: Any) -> None:
    """Let a transformers model with quantized modules answer `dequantize()` and refuse to resize them; another, neither."""
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if any(is_quantized(module) for module in model.modules()):
        if not isinstance(vars(model).get("hf_quantizer"), HfCompressQuantizer):
            model.hf_quantizer = HfCompressQuantizer(HfCompressConfig())  # the record is in the model's config
    elif isinstance(vars(model).get("hf_quantizer"), HfCompressQuantizer):
        del model.hf_quantizer
    for module in modules:
        if any(is_quantized(rows) for rows in _token_rows(module)):
            vars(module)["_get_resized_embeddings"] = _refuse_to_resize
        elif vars(module).get("_get_resized_embeddings") is _refuse_to_resize:
            del vars(module)["_get_resized_embeddings"]


def _token_rows(model: PreTrainedModel) -> list[Any]:
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):  # models of several parts, or without words
            continue
    return [module for module in found if isinstance(module, nn.Module)]


def _refuse_to_resize(
    old_embeddings: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> Any:
    """In the place of the method that `resize_token_embeddings` begins with (a function, so that models can be pickled)."""
    rows = old_embeddings.weight.shape[0]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows:
        raise CompressionError(
            f"The embeddings (or the output head) are quantized and cannot be resized from {rows} to {wanted} rows; nothing "
            "was changed. Resize before quantizing; or model.dequantize(), resize, train the new rows, and quantize again."
        )
    return old_embeddings


def _check_filled(model: Any, layout: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a checkpoint without weights that the record says were compressed: transformers would draw them, or leave them."""
    find = finder(model)
    changed = {id(find(n)): e for n, e in layout["modules"].items() if e.keys() & {"shapes", "kinds", "lock"}}
    marked = any(getattr(buffer, "_is_hf_initialized", False) for buffer in model.buffers())  # not by every transformers
    for name, entry in layout["modules"].items():
        experts = find(name) if "children" in entry else None
        changed |= {} if experts is None else {id(module): {} for module in experts.modules() if id(module) not in changed}
    missing, other = [], []
    for name, module in model.named_modules():
        exits = f".{name}.".startswith(".exit_heads.") and "exits" in layout
        cut = changed.get(id(module), {}).get("shapes", {}) if marked else {}
        statistics = [(key, buffer) for key, buffer in module._buffers.items() if key in cut]
        for key, parameter in [*module._parameters.items(), *statistics]:
            if parameter is None or parameter.is_meta:  # offloaded to disk
                continue
            full, filled = f"{name}.{key}".lstrip("."), getattr(parameter, "_is_hf_initialized", False)
            if not filled and (id(module) in changed or is_quantized(module) or exits):
                missing.append(full)
            elif full in shapes and parameter.shape not in (shapes[full], shapes[full][1:]):  # transformers 5.20 takes any
                other.append(f"{full} {tuple(parameter.shape)}, not {tuple(shapes[full])}")
    for names, what, hint in (
        (
            missing,
            "lacks weights that were compressed, which nothing can make up",
            "Of a model of several parts, load the whole and save the part by itself (whole.part.save_pretrained). Else it was "
            "damaged",
        ),
        (
            other,
            "holds weights of other shapes",
            "This transformers cannot ignore that in a compressed checkpoint: it was damaged",
        ),
    ):
        if names:
            shown = ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
            raise CompressionError(
                f"The checkpoint {what}: {shown}. {hint}, or saved from another model than {type(model).__name__}; download or "
                "save it again."
            )


def _check_files(files: Any) -> None:
    """A truncated safetensors file, named; the library itself says only that a header is wrong."""
    for file in files if isinstance(files, list | tuple) else [files] if files else []:
        path = Path(file)
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        with path.open("rb") as opened:
            head = opened.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else None
            header = opened.read(size) if size is not None and size <= path.stat().st_size else b""
        try:
            entries = json.loads(header)
            end = max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            end = None
        if end is None or size is None or path.stat().st_size != 8 + size + end:
            raise CompressionError(
                f"{path} is truncated or damaged ({path.stat().st_size:,} bytes). Download or save it again."
            )


_modeling: Any = modeling_utils
_their_quantizer = _modeling.get_hf_quantizer
if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
    _modeling.get_hf_quantizer = _find_quantizer
    register_quantization_config(METHOD)(HfCompressConfig)
    register_quantizer(METHOD)(HfCompressQuantizer)
