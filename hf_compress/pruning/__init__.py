"""Which heads, neurons and layers matter, and plans that keep those."""

from .layers import plan_layers
from .planner import plan_pruning
from .scores import LAYER_SCORES, PLANNED, SCORES, TRAINED, Score

__all__ = ["LAYER_SCORES", "PLANNED", "SCORES", "TRAINED", "Score", "plan_layers", "plan_pruning"]
