"""What there is to judge, without hf_compress: the model types, a class for each, the edits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers.models.auto.modeling_auto as auto

from .overrides import CLASSES

EDITS_FILE = Path(__file__).parent.parent.parent / "hf_compress" / "edits.py"
# what they do is in plans.py; of those that are not there yet nothing is said
EDITS = tuple(
    edit
    for edit in (
        "KeepHeads", "KeepNeurons", "KeepLayers", "all three", "KeepChannels", "KeepExperts", "KeepVocabulary", "LowRank",
        "DepthwiseSeparable", "Sparsify", "Quantize 8 bit", "Quantize 4 bit", "AddExits",
    )
    if edit not in ("KeepChannels", "KeepExperts", "KeepVocabulary") or f"class {edit}:" in EDITS_FILE.read_text()
)  # fmt: skip
# the mappings in the order in which a class is taken: heads that give logits first
ORDER = (
    "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "MASKED_LM", "CAUSAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION", "CTC",
    "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION", "IMAGE_SEGMENTATION", "DEPTH_ESTIMATION", "ZERO_SHOT_OBJECT_DETECTION", "TIME_SERIES_PREDICTION",
    "QUESTION_ANSWERING", "TOKEN_CLASSIFICATION", "VISUAL_QUESTION_ANSWERING",
)  # fmt: skip


@functools.cache
def mappings() -> dict[str, dict[str, Any]]:
    found = {}
    for name in dir(auto):
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            short = name.removeprefix("MODEL_").removesuffix("_MAPPING_NAMES").removeprefix("FOR_")
            found["BASE" if name == "MODEL_MAPPING_NAMES" else short] = dict(getattr(auto, name))
    return found


@functools.cache
def types() -> tuple[str, ...]:
    """Every model type that an AutoModel class knows."""
    return tuple(sorted({kind for mapping in mappings().values() for kind in mapping}))


def class_name(kind: str, wanted: str | None = None) -> str | None:
    """The class that stands for a type; with `wanted`, that of one mapping."""
    if wanted is not None:
        name = mappings()[wanted].get(kind)
    elif kind in CLASSES:
        return CLASSES[kind]
    else:
        order = [*ORDER, "BASE", *(m for m in mappings() if m not in ORDER)]
        name = next((mappings()[m][kind] for m in order if kind in mappings()[m]), None)
    return name[0] if isinstance(name, tuple | list) else name
