"""The model card: what we tell people about a compressed model, rendered from its Plan and its Report alone."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from .about import check_about
from .edits import CompressionError
from .metadata import SENTENCES, base_facts, base_of, data_of, eval_results, metadata_of, metric_name, metrics_of, title_of
from .plan import Plan
from .report import Report
from .sections import compose, merge_card
from .words import (
    AUTO,
    and_list,
    baseline,
    changes,
    code,
    count,
    digits,
    limits,
    milliseconds,
    one_line,
    size,
    stage_batch,
    table,
    techniques,
    timings_of,
    where,
)
from .yaml12 import dump

__all__ = ["base_facts", "eval_results", "merge_card", "render_card"]

TEMPLATE = Path(__file__).parent / "templates" / "card.md"
PICTURE_WORDS = {
    "kept.png": "What each block kept",
    "error.png": "What each block loses against what stays of it, and where it was cut",
    "family.png": "The dense model, the family that was pruned from it and others, against the speed-up",
    "stages.png": "The metric against the latency, after every stage",
}
RECIPE_FILE = re.compile(r"[\w.-]+\.ya?ml")
_MARK = f"section-{secrets.token_hex(8)}"


def render_card(plan: Plan, report: Report | None = None, *, about: Mapping[str, Any] | None = None) -> str:
    """The whole README.md of a compressed model: YAML that the Hub reads, and the text below it.

    Every number is in the report (rounded) or in the plan, so that one that was not measured cannot appear. What is not
    known is left out. Sections are marked, so that `merge_card` keeps what a person changes in them.

    Args:
        plan (`Plan`): what was done; an empty one where nothing was recorded.
        report (`Report`, *optional*): what was measured, and on what: see `Report.about`.
        about (`dict`, *optional*): the same facts as `report.about`, over those of the report, or where there is none.

    Returns:
        `str`: Markdown.

    Raises:
        CompressionError: the plan is no `Plan`, or the report no `Report`.

    Example:

    ```python
    >>> from hf_compress import KeepNeurons, Plan
    >>> from hf_compress.card import render_card
    >>> plan = Plan([KeepNeurons("bert.encoder.layer.0", range(48))])
    >>> card = render_card(plan, about={"base_model": "google-bert/bert-base-uncased", "tier": "plugin"})
    >>> print(card.split("---")[1])
    <BLANKLINE>
    base_model: google-bert/bert-base-uncased
    base_model_relation: finetune
    library_name: transformers
    tags:
    - hf_compress
    - pruning
    <BLANKLINE>
    >>> [line for line in card.splitlines() if line.startswith("- Feed")]
    ['- Feed-forward neurons: 1 block keeps 48 neurons.']

    ```
    """
    if not isinstance(plan, Plan):
        raise CompressionError(f"render_card takes the Plan of the model, got {type(plan).__name__}.")
    if report is not None and not isinstance(report, Report):
        raise CompressionError(f"render_card takes the Report that measure gives, got {type(report).__name__}.")
    facts = {**(report.about if report else {}), **check_about(about)}
    sections = re.split(rf"^{_MARK}: (\w+)\n", _template().render(**_values(plan, report, facts)), flags=re.M)
    return compose(metadata_of(plan, report, facts), dict(zip(sections[1::2], sections[2::2], strict=True)))


# --- the text --------------------------------------------------------------------------------------------------------


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.globals.update(table=table, code=code)
    # no value can look like the line that begins a section
    return environment.from_string(re.sub(r"^section(?=: )", _MARK, TEMPLATE.read_text(encoding="utf-8"), flags=re.M))


def _values(plan: Plan, report: Report | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    auto, pipeline = AUTO.get(facts.get("task", ""), ("AutoModel", False))
    known = facts.get("auto_model", auto)
    pipeline = pipeline and (known == auto or not auto)  # it loads the class that stands for its task
    recipe = facts.get("recipe", "")
    file = recipe if isinstance(recipe, str) and RECIPE_FILE.fullmatch(recipe) else ""
    return {
        "title": one_line(title_of(plan, facts)),
        "summary": _summary(plan, report, facts),
        "rows": _rows(report, facts) if report else [],
        "conditions": _conditions(report) if report else "",
        "pictures": [(name, PICTURE_WORDS[name]) for name in facts.get("pictures", ()) if name in PICTURE_WORDS],
        "changes": changes(plan),
        "stages": _stages(report, facts),
        "plan": str(Plan(plan.edits)) if len(plan) else "",
        "tier": facts.get("tier"),
        "auto": known,
        "foreign": bool(known) and known not in getattr(transformers, "__all__", ()),
        "sentences": facts.get("library_name") == SENTENCES,
        "library": facts.get("library_name", "transformers"),
        "pipeline": facts["task"] if pipeline else "",
        "repo_id": re.sub(r'["\\\s]', "", facts.get("repo_id", "")) or "path-or-hub-id",
        "exits": any(type(edit).__name__ == "AddExits" for edit in plan),
        "recipe_file": file,
        "recipe": recipe if isinstance(recipe, str) else dump(recipe),
        "facts": _facts(facts),
        "limits": limits(plan, report, facts),
    }


def _summary(plan: Plan, report: Report | None, facts: Mapping[str, Any]) -> str:
    done = and_list(techniques(plan, facts))
    task = f" for {one_line(facts['task'].replace('-', ' '))}" if facts.get("task") else ""
    what = f"a `{facts['architecture']}`" if facts.get("architecture") else "a model"
    base = f"{base_of(facts, link=True)}{task}" if facts.get("base_model") else f"{what}{task}"
    first = f"This is {base}, {done} with `hf_compress`." if done else f"This is {base}, published with `hf_compress`."
    if report is None:
        return first
    ratios = report.ratios
    if ratios.get("parameters") and ratios.get("bytes"):
        said = [f"has {digits(ratios['parameters'], 3)}x the parameters and {digits(ratios['bytes'], 3)}x the bytes"]
    else:
        said = [f"has {size(report.model.parameters)} parameters in {size(report.model.bytes, 'B')}"]
    timed = [f"{t.speedup:.2f}x as fast at {where(t)}" for t in report.timings or timings_of(report) if t.speedup is not None]
    if timed:
        said.append(f"runs {and_list(timed)}")
    second = f"Beside {baseline(facts)}, measured in turn with it, it " if report.against else "It "
    return f"{first} {second}{', and '.join(said)}{_score(report, facts)}."


def _score(report: Report, facts: Mapping[str, Any]) -> str:
    metrics, before = metrics_of(report.model, facts), metrics_of(report.against, facts) if report.against else {}
    if not metrics:
        return ""
    name, value = next(iter(metrics.items()))
    against = f", where that one has {digits(before[name])}" if name in before else ""
    return f"; its {one_line(metric_name(name, facts))}{_on(facts)} is {digits(value)}{against}"


def _on(facts: Mapping[str, Any]) -> str:
    dataset, name = facts.get("dataset", {}), data_of(facts)
    if not name:
        return ""
    name += f" ({one_line(dataset['config'])})" if dataset.get("config") else ""
    split = f", split `{one_line(dataset['split'])}`" if dataset.get("split") else ""
    return f" on {name}{split}" + (f" of {count(dataset['rows'], 'row')}" if type(dataset.get("rows")) is int else "")


def _rows(report: Report, facts: Mapping[str, Any]) -> list[list[str]]:
    """The table before and after; a column less where there is no baseline.

    What a baseline is called is what the report says: that it came from the base model does not make it that model.
    """
    model, against, ratios = report.model, report.against, report.ratios
    rows = [["", *([facts.get("against") or "before"] if against else []), "this model", *(["ratio"] if against else [])]]

    def add(name: str, before: str, after: str, ratio: str = "") -> None:
        rows.append([name, *([before] if against else []), after, *([ratio] if against else [])])

    others = metrics_of(against, facts) if against else {}
    for name, value in metrics_of(model, facts).items():
        add(metric_name(name, facts), digits(others[name]) if name in others else "", digits(value))
    for key, name, unit in (
        ("parameters", "parameters", ""),
        ("parameters_encoder", "parameters without embeddings", ""),
        ("nonzero", "parameters that are not zero", ""),
        ("bytes", "size on disk", "B"),
        ("macs", "multiply-accumulates", ""),
    ):
        before, after = ("" if v is None else size(v, unit) for v in (getattr(against, key, None), getattr(model, key)))
        if before or after:
            add(name, before, after, f"{digits(ratios[key])}x" if key in ratios else "")
    for t in timings_of(report):
        speed = "" if t.speedup is None else f"{t.speedup:.2f}x as fast"
        add(f"latency, {where(t)}", milliseconds(t.against) if t.against else "", milliseconds(t.model), speed)
    return rows


def _conditions(report: Report) -> str:
    """Where and how it was measured."""
    known = {k: v for k, v in report.conditions.items() if v is not None and v != ""}
    place = [f"on {one_line(known['hardware'])}"] if "hardware" in known else []
    place += [f"with {count(known['threads'], 'thread')}"] if type(known.get("threads")) is int else []
    place += [f"in {one_line(known['dtype'])}"] if known.get("dtype", "none") != "none" else []
    shapes = [f"`{one_line(k)}` {' x '.join(map(str, v))}" for k, v in known.get("shapes", {}).items() if v]
    used = [f"{name} {one_line(known[name])}" for name in ("torch", "transformers") if name in known]
    repeats = count(report.model.latency.repeats, "pass", "passes")
    text = f"Latency is the median (and quartiles) of {repeats}" + (" of each model, in turn" if report.against else "") + "."
    if place or used:
        text += f" Measured {' '.join([*place, *([f'by {and_list(used)}'] if used else [])])}."
    return text + (f" Counts are for inputs {and_list(shapes)}." if shapes else "")


def _stages(report: Report | None, facts: Mapping[str, Any]) -> list[list[str]]:
    """A table of the stages, with the columns that any of them has."""
    shows: dict[str, Callable[[Any], str]] = {
        "metric": digits,
        "latency": milliseconds,
        "parameters": size,
        "bytes": lambda value: size(value, "B"),
    }
    latency = ", ".join(filter(None, ["latency", stage_batch(report, facts)]))
    names = {"metric": metric_name(facts.get("metric", "metric"), facts), "latency": latency, "bytes": "size on disk"}
    known = [{k: v for k, v in stage.items() if k in shows and v is not None} for stage in facts.get("stages", ())]
    columns = [key for key in shows if any(key in stage for stage in known)]
    rows = [
        [stage["name"], *(shows[key](values[key]) if key in values else "" for key in columns)]
        for stage, values in zip(facts.get("stages", ()), known, strict=True)
    ]
    return [["stage", *(names.get(key, key) for key in columns)], *rows] if columns else []


def _facts(facts: Mapping[str, Any]) -> str:
    versions = [f"{one_line(name)} {one_line(version)}" for name, version in facts.get("versions", {}).items() if version]
    parts = [f"Seed {facts['seed']}"] if "seed" in facts else []
    if facts.get("base_model") and facts.get("base_revision"):
        parts.append(f"base model at revision `{one_line(facts['base_revision'])}`")
    parts += [f"with {and_list(versions)}"] if versions else []
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
