"""YAML that says the same to readers of 1.1 and 1.2."""

import math
from dataclasses import replace

import pytest
import yaml

import hf_compress as hc
from hf_compress.card import base_facts, merge_card, render_card
from hf_compress.yaml12 import dump, load
from tests.test_card import REPORT


def test_yaml_reads_the_same_in_1_1_and_1_2(tmp_path):
    """Norwegian is no falsehood, and a day no object; whoever reads it."""
    (tmp_path / "README.md").write_text(
        "---\nlanguage: no\nlicense: 3e5\nlicense_name: 2024-01-01\ndatasets: [on, 1:30]\n---\n"
    )
    found = base_facts(str(tmp_path))
    assert found == {"language": "no", "license_name": "2024-01-01", "datasets": ["on", "1:30"]}  # a license is no number
    facts = {"base_model": "me/base", "base_card": {**found, "license": "3e5"}, "dataset": {"name": "a/b", "config": "0o17"},
             "metric": "y"}  # fmt: skip
    card = render_card(hc.Plan(), replace(REPORT, about=facts))
    top = card.split("---\n")[1]
    assert yaml.safe_load(top) == load(top) and yaml.safe_load(top)["language"] == "no"
    assert yaml.safe_load(top)["license"] == "3e5" and yaml.safe_load(top)["datasets"] == ["a/b", "on", "1:30"]
    assert merge_card(card, card) == card and "language: 'no'" in merge_card("---\nlanguage: no\n---\n# By hand\n", card)


@pytest.mark.parametrize(
    "text",
    ["no", "Yes", "on", "~", "null", "", "1", "012", "089", "0o17", "0x1F", "1_000", "3e-5", "1.", ".5", ".inf", "1:30", "true",
     "2024-01-01", "2024-01-01T10:00:00Z", "=", "<<", "- a", "a: b", "#c", "[", "1e400", "a\nb", "é"],
)  # fmt: skip
def test_text_stays_text(text):
    written = dump({"a": text, text: [text]})
    assert load(written) == yaml.safe_load(written) == {"a": text, text: [text]}


@pytest.mark.parametrize("value", [3e-5, 1e20, -0.5, 10**20, True, None, [], {}, math.inf, [1, 2.5, "x"]])
def test_values_stay_values(value):
    written = dump({"a": value})
    assert load(written) == yaml.safe_load(written) == {"a": value}
    assert type(load(written)["a"]) is type(yaml.safe_load(written)["a"]) is type(value)
