"""Train a small model on what a large one says."""

from .arguments import DistillationArguments, Seq2SeqDistillationArguments
from .student import init_student
from .trainer import DistillationMixin, DistillationTrainer

__all__ = [
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
    "Seq2SeqDistillationArguments",
    "init_student",
]
