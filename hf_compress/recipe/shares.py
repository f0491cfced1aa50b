"""How small a share of heads or neurons still removes one: units are whole, and some are removed in groups alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..discover import Structure
from ..edits import CompressionError
from ..pruning.select import count_units, multiples_of, select


def check_share(structure: Structure, options: Mapping[str, Any]) -> None:
    """Refuse a share of heads or of neurons that removes none from a model, whatever its scores will be.

    Args:
        structure (`Structure`): of the model, as `discover` finds it.
        options (`dict`): of `plan_pruning`: `heads`, `neurons`, `scope`, `uniform`, `round_to`.

    Raises:
        CompressionError: nothing would be removed; the message tells the smallest share that removes something.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import discover
    >>> from hf_compress.recipe.shares import check_share
    >>> model = BertModel(BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=8))
    >>> check_share(discover(model), {"heads": 0.01})
    Traceback (most recent call last):
    ...
    hf_compress.checks.CompressionError: heads: 0.01 removes nothing: 2 blocks have 12 heads each, and a head goes whole. The \
smallest share that removes something is 0.021.

    ```
    """
    reasons = []
    for word, blocks in (("heads", structure.attentions), ("neurons", structure.own_ffns)):
        share, sizes = options.get(word, 0), {block.name: count_units(block) for block in blocks}
        if not share or not sizes:
            continue
        rules = {name: options[name] for name in ("scope", "uniform") if name in options}
        multiples = multiples_of(blocks, options.get("round_to"))  # of no heads
        rules["round_to"] = multiples
        if removes(share, sizes, rules):
            continue
        least = smallest_share(sizes, rules)
        counts = sorted(set(sizes.values()))
        grouped = word == "heads" and any(count_units(block) < block.num_heads for block in structure.attentions)
        unit = "group of heads" if grouped else word.removesuffix("s")
        units = "groups of heads" if grouped else word
        whole = (
            f"{units} are kept in multiples of {' or '.join(map(str, sorted({*multiples.values()})))}"
            if any(multiple > 1 for multiple in multiples.values())
            else f"a {unit} goes whole"
        )
        found = f"The smallest share that removes something is {least:g}." if least else f"No share of the {word} removes any."
        reasons.append(
            f"{word}: {share:g} removes nothing: {len(sizes)} {'blocks have' if len(sizes) > 1 else 'block has'} "
            f"{' or '.join(map(str, counts))} {units}{' each' if len(sizes) > 1 else ''}, and {whole}. {found}"
        )
    if reasons:
        raise CompressionError(" ".join(reasons))


def removes(share: float, sizes: Mapping[str, int], rules: Mapping[str, Any]) -> bool:
    """Whether some scores exist by which a share of these units removes one.

    Args:
        share (`float`): of all units, in [0, 1).
        sizes (`dict[str, int]`): units, by block.
        rules (`dict`): any of `scope`, `uniform`, `round_to`, as `select` takes them.

    ```python
    >>> from hf_compress.recipe.shares import removes
    >>> removes(0.05, {"a": 12, "b": 12}, {}), removes(0.02, {"a": 12, "b": 12}, {}), removes(0.1, {"a": 4}, {"scope": "layer"})
    (True, False, False)

    ```
    """
    # where blocks are ranked together, most goes from one of them when its scores are the lowest
    multiples = rules.get("round_to", 1)
    of = multiples if isinstance(multiples, Mapping) else {}
    for name in {(size, of.get(name)): name for name, size in sizes.items()}.values():
        scores = {other: torch.full((size,), float(other != name)) for other, size in sizes.items()}
        kept = select(scores, share, **rules)
        if any(len(units) < sizes[block] for block, units in kept.items()):
            return True
    return False


def smallest_share(sizes: Mapping[str, int], rules: Mapping[str, Any]) -> float | None:
    """The smallest share, in thousandths, that removes something; None where none does.

    ```python
    >>> from hf_compress.recipe.shares import smallest_share
    >>> smallest_share({"a": 12, "b": 12}, {"scope": "layer"}), smallest_share({"a": 1}, {})
    (0.042, None)

    ```
    """
    low, high = 0, 999
    if not removes(high / 1000, sizes, rules):
        return None
    while high - low > 1:  # a larger share never removes less
        middle = math.floor((low + high) / 2)
        low, high = (low, middle) if removes(middle / 1000, sizes, rules) else (middle, high)
    return high / 1000
