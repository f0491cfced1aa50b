"""Make any Hub model smaller and faster, in the Trainer you already have, and give it back to the Hub."""

import logging as _logging
import sys as _sys

if _sys.argv[0] == "-m" or _sys.argv[0].replace("\\", "/").rpartition("/")[2].startswith("hf-compress"):
    # our command line answers in one line; these tell, while transformers imports them, which of their kernels are missing
    for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        _logging.getLogger(_name).setLevel(_logging.ERROR)

from . import loader as _loader  # noqa: F401  registers the loader with transformers
from .card import render_card
from .channels import ChannelGroup, channel_groups
from .discover import Structure, discover
from .distillation import (
    DistillationArguments,
    DistillationMixin,
    DistillationTrainer,
    Seq2SeqDistillationArguments,
    init_student,
)
from .edits import (
    AddExits,
    CompressionError,
    DepthwiseSeparable,
    KeepChannels,
    KeepExperts,
    KeepHeads,
    KeepLayers,
    KeepNeurons,
    KeepVocabulary,
    LowRank,
    Quantize,
    Sparsify,
)
from .exits import detach_exits_, exit_layers, exit_options, set_exits_
from .exits.callback import EarlyExitCallback
from .exits.tune import tune_exits_
from .expert_plans import plan_experts
from .fresh import from_config
from .hub import push_to_hub
from .inner import with_quantizer
from .masking import Mask
from .measure import measure
from .plan import Plan
from .planners import plan_depthwise, plan_low_rank, plan_quantization
from .pruning import plan_layers, plan_pruning
from .pruning.callback import PruningCallback
from .pruning.latency import LatencyTable
from .pruning.lottery import LotteryTicketCallback
from .pruning.plots import plot_family
from .pruning.rounds import FoundTicket, find_ticket
from .pruning.sparsity_callback import SparsityCallback
from .pruning.target import Pruned, prune_family, prune_to
from .pruning.ticket import Ticket
from .pruning.weights import plan_sparsity
from .publish import PushError
from .quantization.callback import QuantizationCallback
from .quantization.to_float import dequantize_
from .recipe import RecipeError, run_recipe
from .report import Report
from .streaming import apply_to_folder
from .surgery import apply_, mask_
from .tokenizer import cut_tokenizer
from .trainer import CompressionTrainer
from .vocabulary_plan import plan_vocabulary

__all__ = [
    "AddExits",
    "ChannelGroup",
    "CompressionError",
    "CompressionTrainer",
    "DepthwiseSeparable",
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
    "EarlyExitCallback",
    "FoundTicket",
    "KeepChannels",
    "KeepExperts",
    "KeepHeads",
    "KeepLayers",
    "KeepNeurons",
    "KeepVocabulary",
    "LatencyTable",
    "LotteryTicketCallback",
    "LowRank",
    "Mask",
    "Plan",
    "Pruned",
    "PruningCallback",
    "PushError",
    "QuantizationCallback",
    "Quantize",
    "RecipeError",
    "Report",
    "Seq2SeqDistillationArguments",
    "Sparsify",
    "SparsityCallback",
    "Structure",
    "Ticket",
    "apply_",
    "apply_to_folder",
    "channel_groups",
    "cut_tokenizer",
    "dequantize_",
    "detach_exits_",
    "discover",
    "exit_layers",
    "exit_options",
    "find_ticket",
    "from_config",
    "init_student",
    "mask_",
    "measure",
    "plan_depthwise",
    "plan_experts",
    "plan_layers",
    "plan_low_rank",
    "plan_pruning",
    "plan_quantization",
    "plan_sparsity",
    "plan_vocabulary",
    "plot_family",
    "prune_family",
    "prune_to",
    "push_to_hub",
    "render_card",
    "run_recipe",
    "set_exits_",
    "tune_exits_",
    "with_quantizer",
]

__version__ = "0.1.0"
