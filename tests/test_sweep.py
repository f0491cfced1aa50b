"""docs/families.md: what it says of a few types is found again, it is what its data renders to, and nothing in it is wrong."""

import pytest

from tests.sweep import render
from tests.sweep.judge import judge_type
from tests.sweep.load import Loader
from tests.sweep.render import kind_of

# a layout each: fused and interleaved q/k/v, grouped heads, experts, shared bias, gated, convolutions, an encoder-decoder, two
# towers, placeholders for an image
SUBSET = {
    "bert": ["all three", "AddExits"],
    "gpt2": ["KeepHeads"],
    "gpt_neox": ["all three"],
    "llama": ["all three", "Quantize 8 bit"],
    "mixtral": ["KeepHeads", "KeepNeurons"],
    "phi3": ["KeepHeads"],
    "t5": ["KeepHeads"],
    "bart": ["KeepNeurons"],
    "vit": ["LowRank", "KeepHeads"],
    "resnet": ["DepthwiseSeparable"],
    "clip": ["all three"],
    "llava": ["KeepHeads"],
    "bitnet": ["KeepHeads"],
    "gpt_oss": ["AddExits"],
    "swin": ["KeepHeads", "AddExits"],
    "wavlm": ["KeepHeads"],
    "codegen": ["KeepHeads"],
    "csm": ["KeepHeads"],
}


@pytest.fixture(scope="module")
def other():
    """A process that loads what this one saves."""
    loader = Loader(runs=True)
    yield loader
    loader.close()


@pytest.mark.parametrize("kind", SUBSET)
def test_the_table_says_what_is_found(kind, other):
    noted = render.read()["types"][kind]["verdicts"]
    for row in judge_type(kind, SUBSET[kind], other, None):
        found, edit = kind_of(row["verdict"]), row["edit"]
        assert found == kind_of(noted[edit]), (
            f"{kind}, {edit}: {row['verdict']}, and docs/families.json says {noted[edit]}. "
            f"If that is right: python -m tests.sweep --types {kind}"
        )


def test_the_page_is_what_its_data_renders_to():
    assert render.PAGE.read_text() == render.render(render.read()), "python -m tests.sweep --render"


def test_nothing_is_wrong():
    wrong = {
        (name, edit)
        for name, entry in render.read()["types"].items()
        for edit, verdict in entry["verdicts"].items()
        if kind_of(verdict) == "wrong"
    }
    assert not wrong


def test_what_is_downloaded_most_is_exact():
    """Every edit that finds something there; what is not offered at all is a dash in the table."""
    types = render.read()["types"]
    found = {
        (name, edit): verdict
        for names in render.MOST.values()
        for name in names
        for edit, verdict in types[name]["verdicts"].items()
        if kind_of(verdict) not in ("exact", "nothing to cut")
    }
    assert not found
