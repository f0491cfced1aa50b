"""What a card says of a model: what its baseline is called, how it is loaded, what is noted about it."""

from dataclasses import replace

import pytest
import transformers as T

from hf_compress.about import seen_in_config
from hf_compress.card import render_card
from tests.test_card import LEFT, PLANS, REPORT

FINE = {**REPORT.about, "against": "MiniLM, fine-tuned | ours"}
STAGE = {"name": "quantized", "metric": 0.879, "latency": LEFT.median}


@pytest.mark.parametrize(
    ("about", "there", "absent"),
    [
        (FINE, ["|  | MiniLM, fine-tuned \\| ours | this model | ratio |", "Beside its baseline (MiniLM, fine-tuned | ours), measured in turn",
                "faster than its baseline (MiniLM, fine-tuned | ours) at batch 1 x 64 (1.03x)"], ["| before |", "made from at"]),
        ({**FINE, "stages": [*FINE["stages"], STAGE]}, ["| stage | Accuracy | latency, batch 1 x 64 | parameters |"], []),
        ({**FINE, "stages": [*FINE["stages"], {**STAGE, "latency": {"median": LEFT.median}}]}, ["latency, batch 1 x 64 | par"], []),
        ({**FINE, "stages": [STAGE, *FINE["stages"]]}, ["| stage | Accuracy | latency | parameters |"], []),
        ({**FINE, "notes": ["Tuned on the rows\nthat are measured.", " "]}, ["\n- Tuned on the rows that are measured.\n- It has"], []),
        ({**FINE, "library_name": "sentence-transformers", "task": "sentence-similarity", "auto_model": "AutoModel"},
         ["library_name: sentence-transformers\n", "\n- sentence-transformers\n", "import hf_compress  # registers the loader\n"
          'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("me/small")\n'],
         ["from transformers", "pipeline("]),
        ({**FINE, "library_name": "sentence-transformers", "tier": "stock"}, ["Plain sentence-transformers loads it"], ["import hf"]),
        ({**FINE, "auto_model": "AutoModelForMultipleChoice", "task": None}, ["transformers import AutoModelForMultipleChoice\n"],
         ["pipeline(", "AutoModel."]),
        ({**FINE, "auto_model": "DPRReader", "task": None}, ["import DPRReader\n", 'DPRReader.from_pretrained("me/small")'], ["Auto"]),
        ({**FINE, "auto_model": "MyModel", "task": None},
         ["# MyModel is not part of transformers: import it from where it is defined\n", 'MyModel.from_pretrained("me/small")'],
         ["from transformers"]),
        ({**FINE, "auto_model": "AutoModelForCTC", "task": "automatic-speech-recognition"},
         ["import AutoModelForCTC, pipeline\n", 'pipeline("automatic-speech-recognition", "me/small")'], []),
        ({"architecture": "BertForMultipleChoice", "tier": "plugin"},
         ["# BertForMultipleChoice, quantized\n", "This is a `BertForMultipleChoice`, quantized with"], []),
    ],
)  # fmt: skip
def test_what_a_card_says_of_a_model(about, there, absent):
    card = render_card(PLANS["Quantize"], replace(REPORT, about={k: v for k, v in about.items() if v is not None}))
    for words in there:
        assert words in card
    for words in absent:
        assert words not in card


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("BertForMultipleChoice", {"auto_model": "AutoModelForMultipleChoice"}),
        ("BertModel", {"auto_model": "AutoModel"}),
        ("T5ForConditionalGeneration", {"auto_model": "AutoModelForSeq2SeqLM"}),
        (
            "WhisperForConditionalGeneration",
            {"auto_model": "AutoModelForSpeechSeq2Seq", "task": "automatic-speech-recognition"},
        ),
        (
            "Wav2Vec2ForSequenceClassification",
            {"auto_model": "AutoModelForAudioClassification", "task": "audio-classification"},
        ),
        ("GPT2LMHeadModel", {"auto_model": "AutoModelForCausalLM", "task": "text-generation"}),
        ("GPT2DoubleHeadsModel", {"auto_model": "GPT2DoubleHeadsModel"}),
        ("ViTForImageClassification", {"auto_model": "AutoModelForImageClassification", "task": "image-classification"}),
    ],
)
def test_the_class_that_loads_a_model(model, expected):
    kind = getattr(T, model)
    config = {"architectures": [model], "model_type": kind.config_class.model_type}
    assert seen_in_config(config) == {"architecture": model, "tier": "stock", **expected}
    auto = getattr(T, expected["auto_model"])
    if auto is not kind:  # what transformers itself would make
        assert auto._model_mapping[kind.config_class] is kind


@pytest.mark.parametrize("config", [{}, {"architectures": "BertModel"}, {"architectures": [3]}, {"architectures": ["a b"]}])
def test_what_an_odd_config_tells(config):
    assert seen_in_config({"model_type": ["bert"], **config}) == {"tier": "stock"}
    record = {"quantization_config": {"quant_method": "hf_compress"}}
    assert seen_in_config({**config, **record}) == {"tier": "plugin"}
