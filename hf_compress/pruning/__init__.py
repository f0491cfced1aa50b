"""Which heads and neurons matter, and plans that keep those."""

from .planner import plan_pruning
from .scores import SCORES, Score

__all__ = ["SCORES", "Score", "plan_pruning"]
