"""Make any Hub model smaller and faster, in the Trainer you already have, and give it back to the Hub."""

from . import loader as _loader  # noqa: F401  registers the loader with transformers
from .discover import Structure, discover
from .masking import Mask
from .measure import Report, measure
from .plan import CompressionError, KeepHeads, KeepLayers, KeepNeurons, Plan
from .pruning import plan_pruning
from .pruning.callback import PruningCallback
from .surgery import apply_, mask_
from .trainer import CompressionTrainer

__all__ = [
    "CompressionError",
    "CompressionTrainer",
    "KeepHeads",
    "KeepLayers",
    "KeepNeurons",
    "Mask",
    "Plan",
    "PruningCallback",
    "Report",
    "Structure",
    "apply_",
    "discover",
    "mask_",
    "measure",
    "plan_pruning",
]

__version__ = "0.1.0"
