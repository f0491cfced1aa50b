"""Make any Hub model smaller and faster, in the Trainer you already have, and give it back to the Hub."""

from . import loader as _loader  # noqa: F401  registers the loader with transformers
from .discover import Structure, discover
from .edits import CompressionError, DepthwiseSeparable, KeepHeads, KeepLayers, KeepNeurons, LowRank, Quantize
from .masking import Mask
from .measure import Report, measure
from .plan import Plan
from .planners import plan_depthwise, plan_low_rank, plan_quantization
from .pruning import plan_pruning
from .pruning.callback import PruningCallback
from .surgery import apply_, mask_
from .trainer import CompressionTrainer

__all__ = [
    "CompressionError",
    "CompressionTrainer",
    "DepthwiseSeparable",
    "KeepHeads",
    "KeepLayers",
    "KeepNeurons",
    "LowRank",
    "Mask",
    "Plan",
    "PruningCallback",
    "Quantize",
    "Report",
    "Structure",
    "apply_",
    "discover",
    "mask_",
    "measure",
    "plan_depthwise",
    "plan_low_rank",
    "plan_pruning",
    "plan_quantization",
]

__version__ = "0.1.0"
