"""Quantization: grids and rounding, packed storage, quantized modules, integer kernels."""

from .grids import dequantize, fake_quantize, fake_quantize_rows, find_grid, quantize
from .modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRank,
    dequantized,
    is_quantized,
    options_of,
    quantize_,
    quantized_,
)
from .packing import pack, unpack

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedLowRank",
    "dequantize",
    "dequantized",
    "fake_quantize",
    "fake_quantize_rows",
    "find_grid",
    "is_quantized",
    "options_of",
    "pack",
    "quantize",
    "quantize_",
    "quantized_",
    "unpack",
]
