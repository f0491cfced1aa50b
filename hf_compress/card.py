"""The model card: what we tell people about a compressed model, rendered from its Plan and its Report alone."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .about import check_about, is_repo_id
from .edits import CompressionError, Quantize
from .plan import Plan
from .report import Cost, Report
from .sections import compose, merge_card
from .words import (
    AUTO,
    and_list,
    changes,
    code,
    count,
    digits,
    is_number,
    limits,
    milliseconds,
    one_line,
    size,
    table,
    techniques,
    timings_of,
    where,
)

__all__ = ["base_facts", "eval_results", "merge_card", "render_card"]

TEMPLATE = Path(__file__).parent / "templates" / "card.md"
INHERITED: dict[str, type | tuple[type, ...]] = {
    "license": str,
    "license_name": str,
    "license_link": str,
    "language": (str, list),
    "datasets": list,
    "pipeline_tag": str,
}
PICTURE_WORDS = {
    "kept.png": "Heads and neurons that each layer kept",
    "stages.png": "The metric against the latency, after every stage",
}
# what Trainer.evaluate reports beside metrics
NOT_METRICS = re.compile(r"(.*_)?(runtime|epoch|samples_per_second|steps_per_second|\w*_time)")
RECIPE_FILE = re.compile(r"[\w.-]+\.ya?ml")
LOCAL_FILE = re.compile(r".*\.(csv|tsv|jsonl?|parquet|arrow|txt|zip|gz)$", re.I)


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
    return compose(_metadata(plan, report, facts), dict(zip(sections[1::2], sections[2::2], strict=True)))


def base_facts(base_model: str, *, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """What a model made from this one inherits from its card: license, language, data sets and the task.

    Args:
        base_model (`str`): an id on the Hub, or a folder with a `README.md`.
        revision (`str`, *optional*): of the model on the Hub.
        token (`str`, *optional*): for the Hub.

    Returns:
        `dict`: any of `license`, `license_name`, `license_link`, `language`, `datasets`, `pipeline_tag`; empty where there is
        no card, or it is out of reach or cannot be read.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_compress.card import base_facts
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "README.md").write_text("---\\nlicense: mit\\nlanguage: en\\nwidget: []\\n---\\n# Base")
    >>> base_facts(str(folder))
    {'license': 'mit', 'language': 'en'}

    ```
    """
    try:
        if Path(base_model).is_dir():
            path = Path(base_model) / "README.md"
        else:
            path = Path(hf_hub_download(base_model, "README.md", revision=revision, token=token))
        data = metadata_load(path)
    # no such model or card, no right to see it, offline, a card that is no YAML: whatever it is, there is nothing to inherit
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ValueError, yaml.YAMLError):
        return {}
    facts = {key: (data or {}).get(key) for key in INHERITED}
    return {key: value for key, value in facts.items() if value and _fits(value, INHERITED[key])}


def eval_results(report: Report) -> dict[str, str]:
    """The main metric in the form of the Hub's benchmarks, as files: `{".eval_results/hf_compress.yaml": text}`.

    Only where the data set is such a benchmark, which its `task_id` in `report.about["dataset"]` says (and the Hub checks);
    empty otherwise. The card has every metric in its `model-index` anyway.

    Example:

    ```python
    >>> from hf_compress.card import eval_results
    >>> from hf_compress.report import Cost, Latency, Report
    >>> about = {"dataset": {"name": "Idavidrein/gpqa", "task_id": "gpqa_diamond"}}
    >>> cost = Cost(1, 1, 4, 1, Latency(1.0, 1.0, 1.0, 1), {"accuracy": 0.25})
    >>> report = Report(cost, None, None, None, None, {}, about=about)
    >>> print(eval_results(report)[".eval_results/hf_compress.yaml"])
    - dataset:
        id: Idavidrein/gpqa
        task_id: gpqa_diamond
      value: 0.25
    <BLANKLINE>

    ```
    """
    dataset, metrics = report.about.get("dataset", {}), _metrics(report.model, report.about)
    if not dataset.get("task_id") or not is_repo_id(dataset.get("name")) or not metrics:
        return {}
    known = {"id": dataset["name"], "task_id": dataset["task_id"]}
    revision = {"revision": dataset["revision"]} if dataset.get("revision") else {}
    entry = {"dataset": {**known, **revision}, "value": next(iter(metrics.values()))}
    return {".eval_results/hf_compress.yaml": yaml.safe_dump([entry], sort_keys=False)}


# --- the YAML --------------------------------------------------------------------------------------------------------


def _metadata(plan: Plan, report: Report | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    base = facts.get("base_model")
    base = base if is_repo_id(base) else None
    card = {k: v for k, v in facts.get("base_card", {}).items() if k in INHERITED and v and _fits(v, INHERITED[k])}
    link = card.get("license_link")
    if link and base and "://" not in link:  # the file lies in the base model's repository
        card["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    dataset, data_set = facts.get("dataset", {}), _data(facts)
    task = facts.get("task") or card.get("pipeline_tag")
    metrics = _metrics(report.model, facts) if report else {}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data_set,
            dataset_name=data_set.rpartition("/")[2],
            dataset_config=dataset.get("config"),
            dataset_split=dataset.get("split"),
            dataset_revision=dataset.get("revision"),
            metric_type=_metric_id(name),
            metric_value=value,
            metric_name=_metric_name(name, facts),
        )
        for name, value in metrics.items()
        if task and data_set and math.isfinite(value)
    ]
    own = [data_set] if data_set == dataset.get("name") and is_repo_id(data_set) and not LOCAL_FILE.match(data_set) else []
    tags = ["hf_compress", *techniques(plan, facts).values()]
    quantized = any(isinstance(edit, Quantize) for edit in plan)
    data = {
        "base_model": base,
        "base_model_relation": ("quantized" if quantized else "finetune") if base else None,
        **{key: card.get(key) for key in ("language", "license", "license_name", "license_link")},
        "library_name": "transformers",
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys([*own, *card.get("datasets", [])])) or None,
        "metrics": list(dict.fromkeys(_metric_id(name) for name in metrics if not name.endswith("loss"))) or None,
        "tags": tags,
    }
    named = ModelCardData(
        **data, eval_results=results or None, model_name=facts.get("repo_id", "").rpartition("/")[2] or _title(plan, facts)
    ).to_dict()
    named.pop("model_name", None)
    return {**{key: named[key] for key in data if key in named}, **{k: v for k, v in named.items() if k not in data}}


def _fits(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, list) or all(isinstance(word, str) for word in value))


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
    recipe = facts.get("recipe", "")
    file = recipe if isinstance(recipe, str) and RECIPE_FILE.fullmatch(recipe) else ""
    return {
        "title": one_line(_title(plan, facts)),
        "summary": _summary(plan, report, facts),
        "rows": _rows(report, facts) if report else [],
        "conditions": _conditions(report) if report else "",
        "pictures": [(name, PICTURE_WORDS[name]) for name in facts.get("pictures", ()) if name in PICTURE_WORDS],
        "changes": changes(plan),
        "stages": _stages(facts),
        "plan": str(Plan(plan.edits)) if len(plan) else "",
        "tier": facts.get("tier"),
        "auto": auto,
        "pipeline": facts["task"] if pipeline else "",
        "repo_id": re.sub(r'["\\\s]', "", facts.get("repo_id", "")) or "path-or-hub-id",
        "exits": any(type(edit).__name__ == "AddExits" for edit in plan),
        "recipe_file": file,
        "recipe": recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        "facts": _facts(facts),
        "limits": limits(plan, report),
    }


def _base(facts: Mapping[str, Any], link: bool = False) -> str:
    """The base model's name; of a folder only the last part, which tells nothing about whose computer it was."""
    base = facts.get("base_model", "")
    if link and is_repo_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return one_line(base.rstrip("/").replace("\\", "/").rpartition("/")[2])


def _title(plan: Plan, facts: Mapping[str, Any]) -> str:
    done = and_list(techniques(plan, facts))
    return facts.get("name") or ", ".join(filter(None, [_base(facts) or "A model", done]))


def _summary(plan: Plan, report: Report | None, facts: Mapping[str, Any]) -> str:
    done = and_list(techniques(plan, facts))
    task = f" for {facts['task'].replace('-', ' ')}" if facts.get("task") else ""
    base = f"{_base(facts, link=True)}{task}" if facts.get("base_model") else f"a model{task}"
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
    second = "Beside the model it was made from, measured in turn with it, it " if report.against else "It "
    return f"{first} {second}{', and '.join(said)}{_score(report, facts)}."


def _score(report: Report, facts: Mapping[str, Any]) -> str:
    metrics, before = _metrics(report.model, facts), _metrics(report.against, facts) if report.against else {}
    if not metrics:
        return ""
    name, value = next(iter(metrics.items()))
    against = f", where that one has {digits(before[name])}" if name in before else ""
    return f"; its {one_line(_metric_name(name, facts))}{_on(facts)} is {digits(value)}{against}"


def _data(facts: Mapping[str, Any]) -> str:
    """The data set's name; of a file or folder only the last part."""
    name = one_line(facts.get("dataset", {}).get("name") or "")
    return name if is_repo_id(name) and not LOCAL_FILE.match(name) else name.rstrip("/").rpartition("/")[2]


def _on(facts: Mapping[str, Any]) -> str:
    dataset, name = facts.get("dataset", {}), _data(facts)
    if not name:
        return ""
    name += f" ({one_line(dataset['config'])})" if dataset.get("config") else ""
    split = f", split `{one_line(dataset['split'])}`" if dataset.get("split") else ""
    return f" on {name}{split}" + (f" of {count(dataset['rows'], 'row')}" if type(dataset.get("rows")) is int else "")


def _rows(report: Report, facts: Mapping[str, Any]) -> list[list[str]]:
    """The table before and after; a column less where there is no baseline."""
    model, against, ratios = report.model, report.against, report.ratios
    rows = [["", *([_base(facts) or "before"] if against else []), "this model", *(["ratio"] if against else [])]]

    def add(name: str, before: str, after: str, ratio: str = "") -> None:
        rows.append([name, *([before] if against else []), after, *([ratio] if against else [])])

    others = _metrics(against, facts) if against else {}
    for name, value in _metrics(model, facts).items():
        add(_metric_name(name, facts), digits(others[name]) if name in others else "", digits(value))
    for key, name, unit in (
        ("parameters", "parameters", ""),
        ("parameters_encoder", "parameters without embeddings", ""),
        ("bytes", "size on disk", "B"),
        ("macs", "multiply-accumulates", ""),
    ):
        before = size(getattr(against, key), unit) if against else ""
        add(name, before, size(getattr(model, key), unit), f"{digits(ratios[key])}x" if key in ratios else "")
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


def _stages(facts: Mapping[str, Any]) -> list[list[str]]:
    """A table of the stages, with the columns that any of them has."""
    shows: dict[str, Callable[[Any], str]] = {
        "metric": digits,
        "latency": milliseconds,
        "parameters": size,
        "bytes": lambda value: size(value, "B"),
    }
    names = {"metric": _metric_name(facts.get("metric", "metric"), facts), "bytes": "size on disk"}
    known = [{k: v for k, v in stage.items() if k in shows and is_number(v, k)} for stage in facts.get("stages", ())]
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


# --- how things are written ------------------------------------------------------------------------------------------


def _metrics(cost: Cost, facts: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a model, the main one first, without what is none."""
    found = {name: value for name, value in cost.metrics.items() if not NOT_METRICS.fullmatch(name)}
    main = facts.get("metric")
    first = next((name for name in found if main and name in (main, f"eval_{main}", f"test_{main}")), None)
    return found if first is None else {first: found[first], **found}


def _metric_id(name: str) -> str:
    return re.sub(r"^(eval|test)_", "", name)


def _metric_name(name: str, facts: Mapping[str, Any]) -> str:
    pretty = facts.get("dataset", {}).get("metric_name")
    main = facts.get("metric")
    return pretty if pretty and main and _metric_id(name) == _metric_id(main) else _metric_id(name)
