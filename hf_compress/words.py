"""How a card says things: numbers, and what a plan did and what it leaves undone, in sentences."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .checks import spans_of
from .edits import (
    AddExits,
    DepthwiseSeparable,
    Edit,
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
from .report import Latency, Report, Timing

# how an edit reads after "a model, ...", and the Hub's tag for it
TECHNIQUES: dict[type, tuple[str, str]] = {
    KeepHeads: ("pruned", "pruning"),
    KeepNeurons: ("pruned", "pruning"),
    KeepExperts: ("pruned", "pruning"),
    KeepChannels: ("pruned", "pruning"),
    KeepLayers: ("pruned", "pruning"),
    KeepVocabulary: ("given a smaller vocabulary", "vocabulary-trimming"),
    LowRank: ("made low-rank", "low-rank"),
    DepthwiseSeparable: ("made depthwise separable", "depthwise-separable"),
    Sparsify: ("made sparse", "sparsity"),
    Quantize: ("quantized", "quantization"),
    AddExits: ("given early exits", "early-exit"),
}
# the classes that load the Hub's tasks, and whether `pipeline` knows them
AUTO = {
    "text-classification": ("AutoModelForSequenceClassification", True),
    "zero-shot-classification": ("AutoModelForSequenceClassification", True),
    "token-classification": ("AutoModelForTokenClassification", True),
    "question-answering": ("AutoModelForQuestionAnswering", False),
    "fill-mask": ("AutoModelForMaskedLM", True),
    "text-generation": ("AutoModelForCausalLM", True),
    "summarization": ("AutoModelForSeq2SeqLM", False),
    "translation": ("AutoModelForSeq2SeqLM", False),
    "image-classification": ("AutoModelForImageClassification", True),
    "image-segmentation": ("AutoModelForSemanticSegmentation", True),
    "object-detection": ("AutoModelForObjectDetection", True),
    "audio-classification": ("AutoModelForAudioClassification", True),
    "automatic-speech-recognition": ("", True),  # one of several classes
    "feature-extraction": ("AutoModel", True),
}
DISTILLED = ("distilled", "distillation")
SAME_SPEED = 1.1  # what is below is not called faster
STEP = re.compile(r"^[ \t]*(- *)?distill\b", re.M)


def techniques(edits: Iterable[Edit], about: Mapping[str, Any]) -> dict[str, str]:
    """What was done, as participles in the order of `TECHNIQUES`, and the tag of each. Distillation leaves no edit."""
    kinds = {type(edit) for edit in edits}
    found = dict(words for kind, words in TECHNIQUES.items() if kind in kinds)
    recipe = about.get("recipe", "")
    names = [stage["name"] for stage in about.get("stages", ())]
    if any(re.search(r"\bdistil(l|led|lation|ling)?\b", name.lower()) for name in names) or (
        STEP.search(recipe) if isinstance(recipe, str) else '"distill"' in json.dumps(recipe)
    ):
        cut = {k: v for k, v in found.items() if k == "pruned"}
        found = {**cut, DISTILLED[0]: DISTILLED[1], **found}
    return found


def changes(edits: Iterable[Edit]) -> list[str]:
    """What a plan did, a sentence for every kind of edit. Of several cuts of one block, the last is what stays.

    Example:

    ```python
    >>> from hf_compress import KeepHeads, LowRank
    >>> from hf_compress.words import changes
    >>> changes([KeepHeads("a", [0, 1]), KeepHeads("b", [0]), LowRank("c", 8)])
    ['Attention heads: 2 blocks keep 1 to 2 heads each.', 'Low rank: 1 layer is a product of two thinner ones, of rank 8.']

    ```
    """
    said: list[str] = []
    for kind in dict.fromkeys(type(edit) for edit in edits):
        same = [edit for edit in edits if type(edit) is kind]
        said += SENTENCES[kind](same) if kind in SENTENCES else [f"{kind.__name__}: {count(len(same), 'edit')}."]
    return said


def _heads(edits: list[Any]) -> list[str]:
    return [f"Attention heads: {_kept({e.attention: len(e.heads) for e in edits}, 'head')}."]


def _neurons(edits: list[Any]) -> list[str]:
    return [f"Feed-forward neurons: {_kept({e.ffn: len(e.neurons) for e in edits}, 'neuron')}."]


def _experts(edits: list[Any]) -> list[str]:
    return [f"Experts: {_kept({e.moe: len(e.experts) for e in edits}, 'expert', 'mixture')}."]


def _channels(edits: list[Any]) -> list[str]:
    return [f"Channels: {_kept({e.conv: len(e.channels) for e in edits}, 'channel', 'group')}."]


def _kept(sizes: Mapping[str, int], unit: str, block: str = "block") -> str:
    verb, each = ("keeps", "") if len(sizes) == 1 else ("keep", " each")
    low, high = min(sizes.values()), max(sizes.values())
    return f"{count(len(sizes), block)} {verb} {count(low, unit) if low == high else f'{low:,} to {high:,} {unit}s'}{each}"


def _layers(edits: list[Any]) -> list[str]:
    return [
        f"Layers: {count(len(e.layers), 'layer')} of {f'`{e.stack}`' if e.stack else 'the stack'} "
        f"{'stays' if len(e.layers) == 1 else 'stay'}, {_spans(e.layers)}, counted from 0."
        for e in edits
    ]


def _vocabulary(edits: list[Any]) -> list[str]:
    last = {e.embedding: len(e.tokens) for e in edits}
    return [
        f"Vocabulary: {count(n, 'token')} {'stays' if n == 1 else 'stay'}{f' in `{e}`' if e else ''}." for e, n in last.items()
    ]


def _spans(indices: tuple[int, ...]) -> str:
    return spans_of(indices).replace(" ", ", ")


def _low_rank(edits: list[Any]) -> list[str]:
    ranks = sorted({e.rank for e in edits})
    ranks = f"{ranks[0]:,}" if len(ranks) == 1 else f"{ranks[0]:,} to {ranks[-1]:,}"
    what = "is a product" if len(edits) == 1 else "are products"
    fitted = "" if not all(e.given for e in edits) else ", fitted to the planner's inputs"
    return [f"Low rank: {count(len(edits), 'layer')} {what} of two thinner ones, of rank {ranks}{fitted}."]


def _depthwise(edits: list[Any]) -> list[str]:
    most = max(e.multiplier for e in edits)
    what = "is" if len(edits) == 1 else "are"
    kernels = "one kernel" if most == 1 else f"up to {most} kernels"
    return [f"Convolutions: {count(len(edits), 'convolution')} {what} split into {kernels} per channel and a pointwise one."]


def _sparsify(edits: list[Any]) -> list[str]:
    last = {e.module: e for e in edits}.values()
    patterns = {e.pattern for e in last if e.pattern}
    shares = sorted({e.sparsity for e in last})
    share = digits(shares[0]) if len(shares) == 1 else f"{digits(shares[0])} to {digits(shares[-1])}"
    which = f" ({and_list(sorted(patterns))}: so many of every group of neighbours stay)" if patterns else ""
    return [f"Single weights: a fraction of {share} of those of {count(len(last), 'module')} is zero{which}."]


def _quantize(edits: list[Any]) -> list[str]:
    groups: dict[tuple, int] = {}
    for edit in {e.module: e for e in edits}.values():
        key = (edit.bits, edit.group_size, edit.activations, edit.decode)
        groups[key] = groups.get(key, 0) + 1
    return [
        f"Quantization: {count(number, 'module')} {'is' if number == 1 else 'are'} stored in {bits} bits, "
        + (f"in groups of {group:,}" if group else "one scale per output channel")
        + ACTIVATIONS[activations].format(bits=bits)
        + (", unpacked whenever used" if decode == "call" else "")
        + "."
        for (bits, group, activations, decode), number in groups.items()
    ] + ["Not quantized: biases, norms and every layer that the plan below does not list; they stay in floating point."]


def _exits(edits: list[Any]) -> list[str]:
    return [
        f"Early exits: {count(len(e.after), 'classifier')} after layer{'s' * (len(e.after) != 1)} {_spans(e.after)}, counted "
        f"from 0; rows that are sure by {e.criterion} leave there."
        for e in edits[-1:]
    ]


ACTIVATIONS = {
    "none": ", weights alone",
    "token": ", and activations rounded to {bits} bits while it runs, each token by its own range",
    "tensor": ", and activations rounded to {bits} bits while it runs, all tokens by one range",
}
SENTENCES: dict[type, Callable[[list[Any]], list[str]]] = {
    KeepHeads: _heads,
    KeepNeurons: _neurons,
    KeepExperts: _experts,
    KeepChannels: _channels,
    KeepLayers: _layers,
    KeepVocabulary: _vocabulary,
    LowRank: _low_rank,
    DepthwiseSeparable: _depthwise,
    Sparsify: _sparsify,
    Quantize: _quantize,
    AddExits: _exits,
}


def limits(edits: Iterable[Edit], report: Report | None, about: Mapping[str, Any]) -> list[str]:
    """What the model does not do, from what was done to it, what was measured, and what is noted about it."""
    quantized = [edit for edit in edits if isinstance(edit, Quantize)]
    said: list[str] = []
    if any(isinstance(edit, Sparsify) for edit in edits):
        said.append("Its zeros make the file smaller and gain no time: dense kernels multiply zeros as they do any number.")
    if any(edit.activations == "none" for edit in quantized):
        said.append("Weights that are quantized alone take less space and no less time: they are multiplied in floating point.")
    if any(edit.decode == "call" for edit in quantized):
        said.append("Weights that are unpacked whenever they are used save memory and cost time.")
    if any(edit.activations != "none" for edit in quantized):
        said.append(
            "Integers are multiplied as integers on CPUs whose kernels can. Elsewhere, on GPUs too, the same values are "
            "computed in floating point: smaller, not faster."
        )
    if any(isinstance(edit, AddExits) for edit in edits):
        said.append("How much time early exits save depends on the inputs; the latencies above are those of one batch.")
    if report is None:
        said.append("Nothing was measured for this card: neither its quality nor its speed is known from it.")
    else:
        slow = [t for t in timings_of(report) if t.speedup is not None and t.speedup < SAME_SPEED]
        if slow:
            found = and_list(f"{where(t)} ({t.speedup:.2f}x)" for t in slow)
            said.append(f"It was not, or hardly, faster than {baseline(about)} at {found}.")
        if report.against is None:
            said.append("No other model was timed beside it, so nothing here says how much faster it is.")
        if not report.model.metrics:
            said.append("Its quality on a task was not measured for this card.")
        said.append("The latencies are those of one machine; on others they, and what they gain, will differ.")
    said += [one_line(note) for note in about.get("notes", ()) if note.strip()]
    said.append(
        "It has the limits and biases of the model it was made from. Compression can add to them, most of all on inputs unlike "
        "those that it was trained and measured on."
    )
    return said


# --- numbers and text ------------------------------------------------------------------------------------------------


def timings_of(report: Report) -> list[Timing]:
    """Every batch size that was timed, the measured batch itself first where no timing repeats it."""
    if any(timing.model == report.model.latency for timing in report.timings):
        return list(report.timings)
    shape = next((s for s in report.conditions.get("shapes", {}).values() if s), [0])
    length = shape[1] if len(shape) == 2 else None
    against = report.against.latency if report.against else None
    own = Timing(shape[0], length, report.model.latency, against, report.speedup, report.speedup_interval)
    return [own, *report.timings]


def stage_batch(report: Report | None, about: Mapping[str, Any]) -> str:
    """The batch at which the stages were timed: that at which the last of them, which is the model, is in the report.

    Args:
        report (`Report`, *optional*): what was measured.
        about (`dict`): with `stages`.

    Returns:
        `str`: such as `"batch 32 x 64"`; empty where the report does not tell.
    """
    last = next((stage.get("latency") for stage in reversed(about.get("stages", ()))), None)
    seconds = last.get("median") if isinstance(last, Mapping) else last
    found = [t for t in (timings_of(report) if report else ()) if t.batch and t.model.median == seconds]
    return where(found[0]) if found else ""


def baseline(about: Mapping[str, Any]) -> str:
    """What the model was measured beside, in a sentence."""
    return f"its baseline ({one_line(about['against'])})" if about.get("against") else "the model it was made from"


def where(timing: Timing) -> str:
    """`batch 32 x 64`, as far as it is known."""
    return (f"batch {timing.batch}" if timing.batch else "one batch") + (f" x {timing.length}" if timing.length else "")


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 head`, `2 heads`, `1,234 rows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def and_list(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def digits(value: float, significant: int = 4) -> str:
    """So many significant digits; zeros at the end are left out, and there is no exponent where people write none."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e15:
        return f"{value:.{significant}g}"
    places = significant - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(places, 12)}f}".rstrip("0").rstrip(".") if places > 0 else f"{value:,.0f}"


def size(value: float, unit: str = "") -> str:
    """`90.9 MB`, `10.8 M`, `640`."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.1f} {letter}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def milliseconds(value: Latency | Mapping[str, Any] | float) -> str:
    """A latency, or the seconds that a stage gives; with its quartiles where they are known."""
    if isinstance(value, Latency):
        return f"{digits(value.median * 1e3)} ms ({digits(value.low * 1e3)}-{digits(value.high * 1e3)})"
    seconds = value.get("median", math.nan) if isinstance(value, Mapping) else value
    return f"{digits(seconds * 1e3)} ms"


def one_line(value: Any) -> str:
    """Text from outside, on one line."""
    return " ".join(str(value).split())


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|".join(["", "---", *["---:"] * (len(rows[0]) - 1), ""]), *lines[1:]])


def code(text: str, language: str) -> str:
    """A fenced block, by a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"
