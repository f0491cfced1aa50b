"""A student cut out of its teacher: some layers, the embeddings and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel

from ..discover import discover, nearest
from ..edits import CompressionError, KeepLayers
from ..plan import Plan
from ..quantization import is_quantized
from ..surgery import apply_


def init_student(
    teacher: PreTrainedModel,
    layers: int | Sequence[int] | Mapping[str, int | Sequence[int]],
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Any:
    """A new model of the teacher's class with some of its layers, and copies of its embeddings and its head.

    As DistilBERT was begun, "taking one layer out of two" (Sanh et al. 2019, section 2). A number k of n layers takes the
    evenly spaced ones `floor(i · n / k)`, i = 0 … k − 1: layers 0, 2, 4 for 3 of 6. (DistilBERT's own script took
    0, 2, 4, 7, 9, 11 for 6 of 12, not 0, 2, 4, 6, 8, 10: pass the list if you want that.) Layers that are left out are
    never copied. The student shares no weight with the teacher, all its weights train, and the teacher stays as it was.

    Args:
        teacher (`PreTrainedModel`): any model whose layers `discover` finds, also a pruned one.
        layers (`int`, `Sequence[int]` or `dict`): how many layers, or which, counted from 0. A model with several stacks
            takes a number for each of them, or a dict such as `{"encoder": 6, "decoder": 3}`; stacks that the dict does not
            name stay whole.
        inputs (`dict`, *optional*): a small batch for the proof that removing layers is skipping them (see `apply_`).

    Returns:
        `PreTrainedModel`: the student. Its config says how many layers it has, so it saves as a stock checkpoint (that of a
        pruned teacher as a compressed one).

    Raises:
        CompressionError: more layers than there are, none, one twice; a list for several stacks; a model whose layers
            cannot be removed exactly; a quantized teacher.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_compress.distillation import init_student
    >>> teacher = BertForSequenceClassification(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> student = init_student(teacher, 3)
    >>> student.config.num_hidden_layers
    3
    >>> import torch
    >>> [torch.equal(a.output.dense.weight, teacher.bert.encoder.layer[i].output.dense.weight)
    ...  for a, i in zip(student.bert.encoder.layer, (0, 2, 4))]
    [True, True, True]

    ```
    """
    if not isinstance(teacher, PreTrainedModel):
        raise CompressionError(f"init_student takes a transformers model, got {type(teacher).__name__}; load it first.")
    if getattr(teacher, "is_quantized", False) or any(is_quantized(module) for module in teacher.modules()):
        raise CompressionError("This teacher is quantized, and its copy could not be trained. Load it in full precision.")
    found = discover(teacher)
    stacks = {name: stack[0].path for name, stack in found.stacks.items()}
    depths = {name: len(stack) for name, stack in found.stacks.items()}
    edits = [KeepLayers(kept, stack) for stack, kept in _chosen(layers, depths).items() if len(kept) < depths[stack]]
    shared: dict[int, Any] = {}
    for edit in edits:
        stack = teacher.get_submodule(stacks[edit.stack])  # type: ignore[index]
        for index, layer in enumerate(stack.children()):
            # left where it is, and never copied; but what the first layer holds for all may move to another
            if index and index not in edit.layers:
                shared[id(layer)] = layer
    student = deepcopy(teacher, shared)
    if edits:
        apply_(student, Plan(edits), inputs=inputs)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student


def _chosen(layers: Any, depths: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The layers that stay, in every stack that is named."""
    if not depths:
        raise CompressionError("This model has no stack of layers to choose from; see discover(model).")
    if not isinstance(layers, Mapping):
        if type(layers) is not int and len(depths) > 1:
            raise CompressionError(
                f"This model has several stacks ({', '.join(depths)}): give a number for all of them, or a dict such as "
                f"{{{next(iter(depths))!r}: {layers!r}}}."
            )
        layers = dict.fromkeys(depths, layers)
    chosen = {}
    for stack, wanted in layers.items():
        if stack not in depths:
            raise CompressionError(
                f"No stack is named {stack!r}{nearest(str(stack), list(depths))} It has {', '.join(depths)}."
            )
        depth = depths[stack]
        if type(wanted) is int:
            if not 1 <= wanted <= depth:
                raise CompressionError(f"{stack} has {depth} layers; a student takes 1 to {depth} of them, got {wanted}.")
            chosen[stack] = tuple(i * depth // wanted for i in range(wanted))
        else:
            if not isinstance(wanted, Sequence | range) or isinstance(wanted, str):
                raise CompressionError(f"layers is a number of layers or a list of their indices, got {wanted!r}.")
            chosen[stack] = KeepLayers(tuple(wanted)).layers
            if tuple(wanted) != chosen[stack]:
                raise CompressionError(f"layers stay in their order, so their indices count upwards, got {list(wanted)}.")
            if chosen[stack][-1] >= depth:
                raise CompressionError(f"{stack} has {depth} layers (0-{depth - 1}), got {chosen[stack][-1]}.")
    return chosen
