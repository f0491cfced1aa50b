"""What a person wrote in a card stays when it is written again; what is ours is brought up to date."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import hf_compress as hc
from hf_compress.card import merge_card, render_card
from hf_compress.sections import compose, kept_by_hand, readdressed
from tests.test_card import PLANS, REPORT, REPORTS

OLD = render_card(PLANS["KeepHeads"], REPORT)
NEW = render_card(PLANS["Quantize"], replace(REPORT, model=replace(REPORT.model, metrics={"eval_accuracy": 0.7654})))
NAMES = ["title", "summary", "results", "pictures", "changes", "use", "reproduce", "limits"]


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_without_a_hand_the_new_card_replaces_the_old():
    assert merge_card(OLD, NEW) == NEW


def test_text_outside_of_sections_stays_where_it_is():
    mark = "<!-- /hf_compress:summary -->"
    old = OLD.replace(mark, mark + "\n\nBy me.\n\n\n\nFor you.") + "\n## License\n\nAsk me.\n"
    merged = merge_card(old, NEW)
    assert (
        merged.index("quantized with") < merged.index("By me.\n\n\n\nFor you.") < merged.index("0.7654", merged.index("By me."))
    )
    assert "## License\n\nAsk me." in merged and merged.count("hf_compress {") == 1
    assert merge_card(merged, NEW) == merged


@pytest.mark.parametrize("name", NAMES)
def test_a_section_that_was_edited_stays(name):
    def section(card):
        return re.search(rf"<!-- hf_compress:{name} .*?<!-- /hf_compress:{name} -->", card, re.S)[0]

    edited = section(OLD).replace("\n<!-- /", "\nI know better.\n<!-- /")
    merged = merge_card(OLD.replace(section(OLD), edited), NEW)
    assert section(merged) == edited
    for other in NAMES:
        if other != name:
            assert merged.count(f"<!-- hf_compress:{other} ") == 1
    assert merged.replace(edited, section(NEW)) == NEW
    assert merge_card(merged, OLD).replace(edited, section(OLD)) == OLD  # and again


def test_a_section_that_was_deleted_stays_away_and_new_ones_come_in():
    deleted = re.sub(r"<!-- hf_compress:limits .*?<!-- /hf_compress:limits -->\n+", "", OLD, flags=re.S)
    assert "What it does not do" not in merge_card(merge_card(deleted, NEW), OLD)
    bare = render_card(PLANS["KeepHeads"], REPORTS["no about"])
    merged = merge_card(bare, NEW)
    assert "How to reproduce" not in bare and merged[merged.index("<!--") :] == NEW[NEW.index("<!--") :]
    assert metadata_of(merged) == metadata_of(NEW)
    assert (
        merge_card(OLD, bare).replace(',"pictures"', "").replace(',"reproduce"', "").split("hf_compress {")[0]
        == bare.split("hf_compress {")[0]
    )


def test_yaml_is_merged_key_by_key():
    top, _, body = OLD.removeprefix("---\n").partition("---\n")
    data = yaml.safe_load(top)
    data["license"], data["widget"] = "mit", [{"text": "hello"}]
    del data["pipeline_tag"]
    data["tags"] = ["mine", "hf_compress", "pruning"]  # one added, `distillation` taken out
    merged = merge_card(f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n{body}", NEW)
    found = ModelCard(merged).data
    assert found.license == "mit" and found.widget == [{"text": "hello"}] and found.pipeline_tag is None
    assert found.base_model_relation == "quantized" and found.tags == ["hf_compress", "quantization", "mine"]
    assert found.eval_results[0].metric_value == 0.7654
    again = ModelCard(merge_card(merged, OLD)).data
    assert again.license == "mit" and again.pipeline_tag is None and again.tags == ["hf_compress", "pruning", "mine"]
    assert again.base_model_relation == "finetune"


def test_windows_line_ends():
    crlf = OLD.replace("\n", "\r\n")
    assert merge_card(crlf, NEW) == NEW.replace("\n", "\r\n")
    edited = crlf.replace("## What it does not do\r\n", "## What it does not do\r\n\r\nMuch.\r\n")
    merged = merge_card("\ufeff" + edited, NEW)
    assert (
        "Much.\r\n" in merged
        and "\n" not in merged.replace("\r\n", "")
        and ModelCard(merged).data.base_model_relation == "quantized"
    )


def test_a_card_that_the_hub_dumped_again_is_still_ours():
    """transformers' push_to_hub loads the card that is there and writes it back, with a tag more."""
    card = ModelCard(OLD)
    card.data.tags.append("trl")
    merged = merge_card(str(card), NEW)
    assert ModelCard(merged).data.tags == ["hf_compress", "distillation", "quantization", "trl"]
    assert merged[merged.index("<!--") :] == NEW[NEW.index("<!--") :]


def test_a_card_by_hand_keeps_its_place():
    hand = "---\nlicense: mit\ntags: [mine]\nmodel-index:\n- name: x\n  results: []\n---\n# My model\n\nI made it.\n"
    merged = merge_card(hand, NEW)
    found = ModelCard(merged).data
    assert found.license == "mit" and found.tags == ["hf_compress", "distillation", "quantization", "mine"]
    assert found.eval_results[0].metric_value == 0.7654
    assert merged.split("---\n")[2].startswith("\n# My model\n\nI made it.\n\n<!-- hf_compress:summary")
    assert "# all-MiniLM-L6-v2" not in merged and merge_card(merged, NEW) == merged
    assert merge_card("Just a line.", NEW) == NEW.replace("\n\n<!-- hf_compress {", "\n\nJust a line.\n\n<!-- hf_compress {")
    assert merge_card("", NEW) == NEW
    assert ModelCard(merge_card("---\nlicense: mit\n---\n", NEW)).data.license == "mit"


def test_cards_of_transformers_itself():
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
        "This model card has been automatically generated."
    )
    form = ModelCard.from_template(ModelCardData(tags=["a"], library_name="transformers"), model_description=description)
    merged = merge_card(str(form), NEW)
    assert "More Information Needed" not in merged and ModelCard(merged).data.tags == [
        "hf_compress",
        "distillation",
        "quantization",
        "a",
    ]
    filled = str(form).replace("## Uses", "## Uses\n\nEverything.")
    assert "Everything." in merge_card(filled, NEW) and "quantized with" in merge_card(filled, NEW)
    trainer = (
        "---\nlibrary_name: transformers\nlicense: apache-2.0\nbase_model: /tmp/out\ntags:\n- generated_from_trainer\n---\n\n"
        "<!-- This model card has been generated automatically according to the information the Trainer had access to. You\n"
        "should probably proofread and complete it, then remove this comment. -->\n\n# out\n\n- learning_rate: 5e-05\n"
    )
    merged = merge_card(trainer, NEW)
    found = ModelCard(merged).data
    assert found.base_model == "sentence-transformers/all-MiniLM-L6-v2" and found.license == "other"
    assert "generated_from_trainer" in found.tags
    assert merged.index("What it does not do") < merged.index("- learning_rate: 5e-05") and merge_card(merged, NEW) == merged


@pytest.mark.parametrize("top", ["a: [", "- a"])
def test_a_card_whose_yaml_is_broken_is_not_overwritten(top):
    with pytest.raises(hc.CompressionError, match="The YAML at the top of the old card"):
        merge_card(f"---\n{top}\n---\n# Mine\n", NEW)


def test_a_record_that_was_edited_makes_everything_theirs():
    merged = merge_card(OLD.replace('{"metadata"', '{"metadat"'), NEW)
    assert ModelCard(merged).data.base_model_relation == "finetune" and "1 module is stored in 8 bits" in merged


def test_values_cannot_pass_for_our_marks():
    text = "<!-- hf_compress:b 0123456789abcdef -->\nx\n<!-- /hf_compress:b -->\n<!-- /hf_compress:a -->\nforged"
    card = compose({"tags": ["--> <!-- hf_compress {}"]}, {"a": text})
    assert merge_card(card, compose({}, {"a": "new"})) == compose({}, {"a": "new"})


def test_what_was_written_into_the_new_card_stays_too():
    old = compose({"license": "mit"}, {"title": "# A", "use": "Load it."})
    new = old.replace(
        "Load it.\n<!-- /hf_compress:use -->", "Load it.\n<!-- /hf_compress:use -->\n\n## Intended use\n\nFor tests."
    )
    assert new != old
    merged = merge_card(old, new)
    assert "## Intended use\n\nFor tests." in merged and merged.count("Intended use") == 1
    assert merge_card(merged, merged).count("Intended use") == 1


EDITED = {  # section, and what a person made of it
    "here": lambda card: card.replace("## What was done", "## Done here"),
    "there": lambda card: card.replace("## What was done", "## Done there"),
    "other": lambda card: card.replace("## How to load it", "## Loading"),
    "gone": lambda card: re.sub(r"<!-- hf_compress:changes .*?<!-- /hf_compress:changes -->\n+", "", card, flags=re.S),
    "mit": lambda card: card.replace("license: other", "license: mit"),
    "bsd": lambda card: card.replace("license: other", "license: bsd"),
    "none": lambda card: card,
}


@pytest.mark.parametrize(
    ("there", "here", "lost"),
    [
        ("there", "here", ["changes"]),
        ("gone", "here", ["changes"]),
        ("mit", "bsd", ["license (YAML)"]),
        ("there", "there", []),
        ("there", "other", []),
        ("there", "none", []),
        ("none", "here", []),
        ("gone", "none", []),
        ("mit", "none", []),
        ("none", "bsd", []),
        ("mit", "mit", []),
    ],
)
def test_what_is_lost_where_two_edited(there, here, lost):
    assert EDITED[here](OLD) != OLD or here == "none"
    assert kept_by_hand(EDITED[there](OLD), EDITED[here](OLD)) == (lost, [])


def test_what_is_kept_though_it_changed():
    old = EDITED["other"](EDITED["there"](OLD))
    assert kept_by_hand(old, NEW) == ([], ["changes"])  # how to load it has not changed
    assert kept_by_hand("# By hand\n", NEW) == ([], [])


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_only_our_own_lines_name_another_repository(ends):
    card = OLD.replace("\n", ends)
    moved = readdressed(card, "you/large")
    assert moved.count('"you/large"') == 2 and '"me/small"' not in moved and ends in moved
    assert readdressed(moved, "me/small") == card and merge_card(card, moved) == moved  # unedited: ours to bring up to date
    edited = card.replace("## How to load it", "## Loading")
    assert readdressed(edited, "you/large") == edited
    assert readdressed('# Mine\r\n\nx.from_pretrained("a")\n', "you/large") == '# Mine\r\n\nx.from_pretrained("a")\n'
