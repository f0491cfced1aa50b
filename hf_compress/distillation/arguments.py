"""What `DistillationTrainer` takes beside a Trainer's own arguments."""

import json
import math
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..plan import CompressionError
from .tasks import TASKS

KD_LOSSES = ("kl", "mse")


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` and the weights of the terms of the loss.

    `loss = alpha_task · L_task + alpha_kd · T² · KL(teacher ‖ student) + alpha_cos · (1 − cos(h_student, h_teacher))`

    The defaults are those with which DistilBERT distils *while fine-tuning* (`run_squad_w_distillation.py`: `alpha_ce` 0.5,
    `alpha_squad` 0.5, temperature 2; its `alpha_ce` is the distillation term, our `alpha_kd`). For *pre-training* a masked
    LM it used `alpha_task=2, alpha_kd=5, alpha_cos=1, temperature=2` (Sanh et al. 2019; `--alpha_ce 5 --alpha_mlm 2
    --alpha_cos 1` in its README). Hinton et al. (2015) found a considerably lower weight on the labels' term best.

    The weights are used as they are: none is rescaled where another term is absent (a batch without labels has no L_task).

    Args:
        alpha_task (`float`, defaults to 0.5): weight of the student's own loss on the labels.
        alpha_kd (`float`, defaults to 0.5): weight of the distance to the teacher's predictions.
        alpha_cos (`float`, defaults to 0.0): weight of the distance between hidden states. At 0 they are not computed.
        temperature (`float`, defaults to 2.0): T, which softens both distributions. Regression has none.
        kd_loss (`str`, defaults to `"kl"`): `"kl"`, or `"mse"` between logits (then without T).
        layer_map (`dict[int, int]`, *optional*): which hidden state of the student (0 is what enters the first layer, -1 what
            leaves the last) follows which of the teacher's. The last follows the last by default, as in DistilBERT's code.
            Of an encoder-decoder, the decoder's. On a command line, JSON: `'{"3": 6}'`.
        teacher_weights (`list[float]`, *optional*): one per teacher, scaled to sum to one; equal by default.
        distillation_task (`str`, *optional*): what the logits are, where the name of the class does not tell: `"rows"`,
            `"tokens"`, `"spans"`, `"masked_lm"`, `"causal_lm"` or `"seq2seq_lm"`.

    Raises:
        CompressionError: a weight below 0 or all of them 0, a temperature not above 0, an unknown loss or task, a layer map
            that does not map whole numbers.

    Example:

    ```python
    >>> from hf_compress.distillation import DistillationArguments
    >>> arguments = DistillationArguments("out", alpha_cos=1.0, layer_map={1: 2, 2: 4, 3: 6}, report_to=[])
    >>> arguments.alpha_kd, arguments.temperature, arguments.layer_map[3]
    (0.5, 2.0, 6)

    ```
    """

    alpha_task: float = field(default=0.5, metadata={"help": "Weight of the student's own loss on the labels."})
    alpha_kd: float = field(default=0.5, metadata={"help": "Weight of the distance to the teacher's predictions."})
    alpha_cos: float = field(default=0.0, metadata={"help": "Weight of the distance between hidden states."})
    temperature: float = field(default=2.0, metadata={"help": "Softens the distributions of teacher and student."})
    kd_loss: str = field(default="kl", metadata={"help": "'kl', or 'mse' between logits."})
    layer_map: dict | str | None = field(
        default=None, metadata={"help": "Hidden state of the student -> of the teacher, as JSON; the last by default."}
    )
    teacher_weights: list[float] | None = field(default=None, metadata={"help": "One weight per teacher."})
    distillation_task: str | None = field(
        default=None, metadata={"help": "What the logits are, where the class does not tell: rows, tokens, spans, ..."}
    )

    def __post_init__(self):
        for name in ("alpha_task", "alpha_kd", "alpha_cos"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise CompressionError(f"{name} is the weight of a term of the loss, 0 or more, got {value!r}.")
        if not self.alpha_task and not self.alpha_kd and not self.alpha_cos:
            raise CompressionError(
                "alpha_task, alpha_kd and alpha_cos are all 0: nothing is left of the loss. Set one above 0."
            )
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise CompressionError(f"temperature divides the logits and must be above 0, got {self.temperature!r}.")
        if self.kd_loss not in KD_LOSSES:
            raise CompressionError(f"Unknown kd_loss {self.kd_loss!r}. Known: {', '.join(KD_LOSSES)}.")
        tasks = dict.fromkeys(TASKS.values())
        task = self.distillation_task
        if task is not None and (not isinstance(task, str) or task not in tasks):
            raise CompressionError(f"Unknown distillation_task {task!r}. Known: {', '.join(tasks)}.")
        self.layer_map = _layer_map(self.layer_map)
        weights = self.teacher_weights
        if weights is not None and (
            not isinstance(weights, list | tuple) or not weights or not all(_is_number(w) and w > 0 for w in weights)
        ):
            raise CompressionError(f"teacher_weights is a list with a number above 0 for each teacher, got {weights!r}.")
        super().__post_init__()


@dataclass
class Seq2SeqDistillationArguments(DistillationArguments, Seq2SeqTrainingArguments):
    """`DistillationArguments` with what `Seq2SeqTrainer` takes (`predict_with_generate`, ...)."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layer_map(value: object) -> dict[int, int] | None:
    """A layer map as it was given, or as JSON made it (keys are text there)."""
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
        if value is None:
            raise CompressionError(f"layer_map is a dict or JSON such as '{{\"3\": 6}}', got {given!r}.")
    if value is None:
        return None
    try:
        pairs = {int(student): int(teacher) for student, teacher in value.items()}  # type: ignore[attr-defined]
        whole = all(str(k).strip() == str(int(k)) and type(v) is int for k, v in value.items())  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        pairs, whole = {}, False
    if not whole or not pairs:
        raise CompressionError(
            f"layer_map maps hidden states of the student to those of the teacher, such as {{1: 2, 2: 4}}, got {given!r}."
        )
    return pairs
