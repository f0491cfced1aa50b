"""Another quantizer inside a compressed checkpoint: bitsandbytes or torchao on what pruning left.

A config has room for one quantization method. Ours stays outside: its record replays the layout, then the other method's
own quantizer, unchanged, converts the Linear layers of the small model, and `inner` in the record says which one it was.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_bitsandbytes_available, is_torchao_available

from .caches import host_caches_
from .edits import CompressionError
from .layout import finish_replayed
from .modules import lock_

INSTALLED = {"bitsandbytes": is_bitsandbytes_available, "torchao": is_torchao_available}
CONFIGS = {"bitsandbytes": BitsAndBytesConfig, "torchao": TorchAoConfig}


def with_quantizer(
    checkpoint: str | os.PathLike | PretrainedConfig, quantization_config: BitsAndBytesConfig | TorchAoConfig, **kwargs: Any
) -> PretrainedConfig:
    """The config with which `from_pretrained` loads a compressed checkpoint and quantizes it with another method.

    A quantized Linear computes `y = x Q(W)^T + b`. For 4-bit NF4, `Q(W) = absmax(block) * code[index]` over blocks of 64
    weights and 16 levels, the quantiles of a normal distribution (Dettmers et al., "QLoRA", 2023, section 3). The layout
    is replayed first, so `W` is what pruning left. These stay in float: modules outside the base model
    (classifiers, language model heads), exit heads, modules that were made low-rank or separable, and what the other
    config skips.

    Transformers drops a `quantization_config=` argument where the checkpoint has a record of its own, or refuses it; so it
    goes in with the config. A checkpoint in the *stock* tier has no record: pass `quantization_config=` as usual there.

    Args:
        checkpoint (`str`, path or `PretrainedConfig`): a compressed checkpoint in float, or its config.
        quantization_config (`BitsAndBytesConfig` or `TorchAoConfig`): what the Linear layers become.
        **kwargs: for `AutoConfig.from_pretrained` (`revision`, `token`, `num_labels`, ...).

    Returns:
        `PretrainedConfig`: for `config=` of `from_pretrained(checkpoint, config=...)`. What that returns is saved with
        `save_pretrained` as a compressed checkpoint, quantized, that loads with plain `from_pretrained`.

    Raises:
        CompressionError: another method, one whose package is not installed, a checkpoint that is not compressed, that is
            quantized already, or that comes from the middle of a training. From `from_pretrained`, before weights are read: no
            layer that the method converts; in 4 bit on a CPU, layers whose inputs are not a multiple of 64.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers import BertConfig, BertModel, BitsAndBytesConfig
    >>> from hf_compress import KeepNeurons, Plan, apply_
    >>> from hf_compress.inner import with_quantizer
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
    ... ))
    >>> folder = tempfile.mkdtemp()
    >>> apply_(model, Plan([KeepNeurons("encoder.layer.1", range(128))])).save_pretrained(folder)
    >>> try:
    ...     config = with_quantizer(folder, BitsAndBytesConfig(load_in_4bit=True))
    ...     loaded = BertModel.from_pretrained(folder, config=config)
    ...     print(type(loaded.encoder.layer[1].output.dense).__name__, loaded.encoder.layer[1].output.dense.in_features)
    ... except CompressionError as error:  # where bitsandbytes is not installed
    ...     print("Linear4bit 128" if "not installed" in str(error) else error)
    Linear4bit 128

    ```
    """
    name = _method(quantization_config)
    if name is None:
        raise CompressionError(
            "Inside a compressed checkpoint goes a BitsAndBytesConfig or a TorchAoConfig, got "
            f"{type(quantization_config).__name__}. For any other method prune into the stock tier (uniform=True), which takes "
            "every quantization_config."
        )
    if not isinstance(checkpoint, str | os.PathLike | PretrainedConfig):
        raise CompressionError(f"checkpoint is a folder, a Hub id or a config, got {type(checkpoint).__name__}.")
    _check_installed(name)
    if isinstance(quantization_config, BitsAndBytesConfig) and not quantization_config.is_quantizable():
        raise CompressionError("This BitsAndBytesConfig quantizes nothing: set load_in_4bit=True or load_in_8bit=True.")
    given = isinstance(checkpoint, PretrainedConfig)
    try:
        config = copy.deepcopy(checkpoint) if given else AutoConfig.from_pretrained(checkpoint, **kwargs)
    except (OSError, ValueError) as error:
        raise CompressionError(f"The config of {checkpoint} cannot be read: {error}") from error
    record: Any = getattr(config, "quantization_config", None)
    where = type(config).__name__ if given else str(checkpoint)
    if record is None:
        raise CompressionError(
            f"{where} is a stock checkpoint: any transformers loads it, and quantizes it while it does. Pass "
            "quantization_config=... to from_pretrained itself."
        )
    method = record.get("quant_method") if isinstance(record, dict) else record.quant_method
    if method == "hf_compress":
        record = AutoQuantizationConfig.from_dict(record) if isinstance(record, dict) else record
        method = record.inner and record.inner["quant_method"]
    if method is not None:
        raise CompressionError(
            f"{where} is quantized with {getattr(method, 'value', method)} already; quantizing twice loses more than once. "
            "Start from the pruned checkpoint in float."
        )
    before: Any = record
    _check_record(before, name)
    ordered = type(before)(before.plan_dict, before.layout_text, before.masks_dict)
    ordered.order = copy.deepcopy(quantization_config)
    config.quantization_config = ordered
    return config


def check_inner(inner: Any) -> None:
    """Refuse what no `with_quantizer` leads to; from a file, anything may come."""
    method = inner.get("quant_method") if isinstance(inner, dict) else None
    if method not in list(CONFIGS):
        raise CompressionError(
            f"The checkpoint says that its weights are quantized with {str(inner)[:80]!r}; this hf_compress knows "
            f"{', '.join(CONFIGS)}. Upgrade hf_compress."
        )


def around(outer: Any) -> HfQuantizer:
    """The other method's quantizer for a record with `inner` (the weights are in it) or `order` (they will be)."""
    record = outer.quantization_config
    name: Any = record.inner["quant_method"] if record.order is None else _method(record.order)
    _check_installed(name)
    _check_record(record, name)
    try:
        config = record.order or CONFIGS[name].from_dict(dict(record.inner))
    except Exception as error:  # their parser, on whatever the file says
        raise CompressionError(f"The checkpoint's {name} config cannot be read: {type(error).__name__}: {error}") from error
    kind = type(AutoHfQuantizer.from_config(config, pre_quantized=record.order is None))
    return type(f"HfCompress{kind.__name__}", (_Inside, kind), {})(outer, config)


class _Inside(HfQuantizer):
    """Comes before a quantizer of transformers in the class that `around` makes: replay first, then do as it does."""

    def __init__(self, outer: Any, config: Any) -> None:
        super().__init__(config, pre_quantized=outer.quantization_config.order is None)
        self.outer = outer
        self.record = outer.quantization_config
        self.lock: str | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.outer._process_model_before_weight_loading(model, **kwargs)
        super()._process_model_before_weight_loading(model, **kwargs)
        if getattr(self.quantization_config, "load_in_4bit", False):
            _check_blocks(model, kwargs.get("device_map"))
        for module in model.modules():
            # On CPUs with AVX512-BF16 a 4-bit layer is repacked when it is first evaluated: it takes outputs in 32s alone then,
            # passes no gradient on, and is not saved exactly.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if not self.pre_quantized:
            self._check_order(model)

    def _check_order(self, model: Any) -> None:
        """Refuse what the other method cannot convert, and see to it that plain transformers fails on what is saved."""
        method = _method(self.quantization_config)
        converted = [
            (module.weight.numel(), name)
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
            and self.param_needs_quantization(model, f"{name}.weight")
        ]
        if not converted:
            raise CompressionError(
                f"{method} would convert nothing in this {type(model).__name__}: it looks for Linear layers (bitsandbytes for "
                "GPT-2's Conv1D too) that are not skipped. Load the checkpoint without a quantizer, or skip fewer modules."
            )
        if method != "torchao":
            return  # bitsandbytes packs 4-bit weights, or keeps 8-bit ones in their cut shapes, under the original keys
        try:
            model.get_input_embeddings()
        except NotImplementedError as error:
            raise CompressionError(
                f"transformers' torchao quantizer needs get_input_embeddings(), which {type(model).__name__} does not have. "
                "Use a BitsAndBytesConfig, or hf_compress's own plan_quantization."
            ) from error
        if not self._is_loud(model):
            self.lock = min(converted)[1]
            self.modules_to_not_convert = [*self.modules_to_not_convert, self.lock]

    def _is_loud(self, model: Any) -> bool:
        """Whether a shape that cannot match stays under its key: torchao renames the weights that it converts."""
        modules = dict(model.named_modules())
        return any(
            entry.get("lock")
            or entry.get("kinds")
            or any(not self.param_needs_quantization(model, f"{name}.{key}") for key in entry.get("shapes", {}))
            for name, entry in self.record.layout["modules"].items()
            if name in modules
        )

    def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        names = set(HfQuantizer.get_modules_to_not_convert(model, *args, **kwargs))
        inside = {id(module) for module in model.base_model.modules()}
        entries = self.record.layout["modules"]
        prefix = f"{model.base_model_prefix}."
        for name, module in model.named_modules():
            entry = next((entries[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in entries), {})
            head = id(module) not in inside or ".exit_heads." in f".{name}."
            if hasattr(module, "weight") and (head or entry.get("lock") or entry.get("kinds")):
                names.add(name)
        return sorted(names)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        model = super().postprocess_model(model, **kwargs) or model
        finish_replayed(model, self.record.layout)
        host_caches_(model, self.record)
        if not self.pre_quantized:
            layout = copy.deepcopy(self.record.layout)
            if self.lock is not None:
                lock_(model.get_submodule(self.lock))
                layout["modules"].setdefault(self.lock, {})["lock"] = True
            inner = self.quantization_config.to_dict()
            skipped = "modules_to_not_convert" if "modules_to_not_convert" in inner else "llm_int8_skip_modules"
            inner[skipped] = list(self.modules_to_not_convert)  # type: ignore[attr-defined]
            inner = json.loads(json.dumps(inner))
            self.record = type(self.record)(self.record.plan_dict, layout, self.record.masks_dict, inner=inner)
        model.config.quantization_config = self.record
        # transformers cannot revert the reading of quantized weights, and need not: the state dict is as it is on disk
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(getattr(operation, "hf_quantizer", None) for operation in getattr(conversion, "operations", ()))
        ]
        return model

    def remove_quantization_config(self, model: Any) -> None:
        """After `model.dequantize()`: what is left is the pruned model in float, with its record."""
        super().remove_quantization_config(model)
        model.config.quantization_config = type(self.record)(
            self.record.plan_dict, self.record.layout_text, self.record.masks_dict
        )


def _method(config: Any) -> str | None:
    return next((name for name, kind in CONFIGS.items() if isinstance(config, kind)), None)


def _check_blocks(model: nn.Module, device_map: Any) -> None:
    """Refuse 4-bit layers whose rows are not whole blocks on a CPU: bitsandbytes 0.50 decodes many of them wrongly there."""
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if torch.accelerator.is_available() and "cpu" not in devices:
        return
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    wrong = [(n, m.in_features) for n, m in layers if m.in_features % (getattr(m.weight, "blocksize", None) or 64)]
    if wrong:
        shown = ", ".join(f"{name} ({size})" for name, size in wrong[:6])
        raise CompressionError(
            f"bitsandbytes' 4-bit layers are right on a CPU only where they take a multiple of 64 inputs; {len(wrong)} here do "
            f"not: {shown}{', ...' * (len(wrong) > 6)}. Prune with round_to=64, and heads so that their number times their "
            "size is a multiple of 64; or load on a GPU, or in 8 bit, or leave these layers in float "
            "(BitsAndBytesConfig(llm_int8_skip_modules=[...]))."
        )


def _check_installed(name: str) -> None:
    if not INSTALLED[name]():
        raise CompressionError(
            f"{name} is not installed (or is too old for this transformers), and these weights need it: pip install -U {name}."
        )


def _check_record(record: Any, name: str) -> None:
    if record.masks_dict is not None or record.layout.get("gates"):
        raise CompressionError(
            "This checkpoint is from the middle of a pruning and holds masks, which quantized layers do not have. Finish the "
            "training, or cut what is masked with apply_(model, plan), save, and quantize that."
        )
    ours = [
        n for n, entry in record.layout["modules"].items() if any(kind[0] == "quantized" for kind in entry.get("kinds", []))
    ]
    if ours:
        raise CompressionError(
            f"{len(ours)} modules of this checkpoint are quantized by hf_compress already ({ours[0]}, ...); {name} on top "
            "would quantize them twice. Start from the pruned checkpoint in float."
        )
