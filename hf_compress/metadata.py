"""The YAML at the top of a model card: what the Hub reads, from a Plan, a Report and the base model's card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .about import is_repo_id
from .edits import CompressionError, Quantize
from .plan import Plan
from .report import EVAL_FILE, Cost, Report
from .sections import split_card
from .words import and_list, one_line, techniques
from .yaml12 import dump

INHERITED: dict[str, type | tuple[type, ...]] = {
    "license": str,
    "license_name": str,
    "license_link": str,
    "language": (str, list),
    "datasets": list,
    "pipeline_tag": str,
}
# what Trainer.evaluate reports beside metrics
NOT_METRICS = re.compile(r"(.*_)?(runtime|epoch|samples_per_second|steps_per_second|\w*_time)")
LOCAL_FILE = re.compile(r".*\.(csv|tsv|jsonl?|parquet|arrow|txt|zip|gz)$", re.I)
SENTENCES = "sentence-transformers"


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
        data, _ = split_card(path.read_text(encoding="utf-8"), "base model's")
    # no such model or card, no right to see it, offline, a card that is no YAML: whatever it is, there is nothing to inherit
    except (CompressionError, OSError, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ValueError):
        return {}
    facts = {key: data.get(key) for key in INHERITED}
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
    dataset, metrics = report.about.get("dataset", {}), metrics_of(report.model, report.about)
    value = next(iter(metrics.values()), math.nan)
    if not dataset.get("task_id") or not is_repo_id(dataset.get("name")) or not math.isfinite(value):
        return {}
    known = {"id": dataset["name"], "task_id": dataset["task_id"]}
    revision = {"revision": dataset["revision"]} if dataset.get("revision") else {}
    entry = {"dataset": {**known, **revision}, "value": value}
    return {EVAL_FILE: dump([entry])}


def metadata_of(plan: Plan, report: Report | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in the YAML at the top of a card.

    Args:
        plan (`Plan`): what was done.
        report (`Report`, *optional*): what was measured.
        facts (`dict`): what `Report.about` says, checked.

    Returns:
        `dict`: in the order in which it is written.
    """
    base = facts.get("base_model")
    base = base if is_repo_id(base) else None
    card = {k: v for k, v in facts.get("base_card", {}).items() if k in INHERITED and v and _fits(v, INHERITED[k])}
    link = card.get("license_link")
    if link and base and "://" not in link:  # the file lies in the base model's repository
        card["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    dataset, data_set = facts.get("dataset", {}), data_of(facts)
    task = facts.get("task") or card.get("pipeline_tag")
    metrics = metrics_of(report.model, facts) if report else {}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data_set,
            dataset_name=data_set.rpartition("/")[2],
            dataset_config=dataset.get("config"),
            dataset_split=dataset.get("split"),
            dataset_revision=dataset.get("revision"),
            metric_type=metric_id(name),
            metric_value=value,
            metric_name=metric_name(name, facts),
        )
        for name, value in metrics.items()
        if task and data_set and math.isfinite(value)
    ]
    own = [data_set] if data_set == dataset.get("name") and is_repo_id(data_set) and not LOCAL_FILE.match(data_set) else []
    library = facts.get("library_name", "transformers")
    tags = ["hf_compress", *([library] if library == SENTENCES else []), *techniques(plan, facts).values()]
    quantized = any(isinstance(edit, Quantize) for edit in plan)
    data = {
        "base_model": base,
        "base_model_relation": ("quantized" if quantized else "finetune") if base else None,
        **{key: card.get(key) for key in ("language", "license", "license_name", "license_link")},
        "library_name": library,
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys([*own, *card.get("datasets", [])])) or None,
        "metrics": list(dict.fromkeys(metric_id(name) for name in metrics if not name.endswith("loss"))) or None,
        "tags": tags,
    }
    named = ModelCardData(
        **data, eval_results=results or None, model_name=facts.get("repo_id", "").rpartition("/")[2] or title_of(plan, facts)
    ).to_dict()
    named.pop("model_name", None)
    return {**{key: named[key] for key in data if key in named}, **{k: v for k, v in named.items() if k not in data}}


def _fits(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, list) or all(isinstance(word, str) for word in value))


# --- what things are called ------------------------------------------------------------------------------------------


def base_of(facts: Mapping[str, Any], link: bool = False) -> str:
    """The base model's name; of a folder only the last part, which tells nothing about whose computer it was."""
    base = facts.get("base_model", "")
    if link and is_repo_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return one_line(base.rstrip("/").replace("\\", "/").rpartition("/")[2])


def title_of(plan: Plan, facts: Mapping[str, Any]) -> str:
    """The model's name, or what it is and what was done to it."""
    done = and_list(techniques(plan, facts))
    what = base_of(facts) or facts.get("architecture") or "A model"
    return facts.get("name") or ", ".join(filter(None, [what, done]))


def data_of(facts: Mapping[str, Any]) -> str:
    """The data set's name; of a file or folder only the last part."""
    name = one_line(facts.get("dataset", {}).get("name") or "")
    return name if is_repo_id(name) and not LOCAL_FILE.match(name) else name.rstrip("/").rpartition("/")[2]


def metrics_of(cost: Cost, facts: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a model, the main one first, without what is none."""
    found = {name: value for name, value in cost.metrics.items() if not NOT_METRICS.fullmatch(name)}
    main = facts.get("metric")
    first = next((name for name in found if main and name in (main, f"eval_{main}", f"test_{main}")), None)
    return found if first is None else {first: found[first], **found}


def metric_id(name: str) -> str:
    """A metric's name without the split that a Trainer puts before it."""
    return re.sub(r"^(eval|test)_", "", name)


def metric_name(name: str, facts: Mapping[str, Any]) -> str:
    """As people write it, where the data set says so."""
    pretty = facts.get("dataset", {}).get("metric_name")
    main = facts.get("metric")
    return pretty if pretty and main and metric_id(name) == metric_id(main) else metric_id(name)
