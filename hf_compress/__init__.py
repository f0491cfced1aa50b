"""Make any Hub model smaller and faster, in the Trainer you already have, and give it back to the Hub."""

from . import loader as _loader  # noqa: F401  registers the loader with transformers
from .discover import Structure, discover
from .plan import CompressionError, KeepHeads, KeepLayers, KeepNeurons, Plan
from .surgery import Mask, apply_, mask_

__version__ = "0.1.0"
