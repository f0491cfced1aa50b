"""docs/families.json from the rows of a sweep, and docs/families.md from docs/families.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .types import EDITS

ROOT = Path(__file__).parent.parent.parent
JSON, PAGE = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"
SIGNS = {"exact": "✓", "refused": "r", "wrong": "**W**", "not built": "·", "nothing to cut": "–", "unseen": "**?**"}
LEGEND = (
    "✓ exact; r refused before anything changed, with the reason below; **W** wrong; – nothing to cut; "
    "**?** there is attention (a feed-forward block) by its class, and `discover` finds none; · not built"
)
# what is downloaded most, as far as it is known without the Hub: ten of each
MOST = {
    "encoders": "bert roberta distilbert xlm-roberta mpnet deberta-v2 electra albert modernbert camembert".split(),
    "decoders": "gpt2 llama qwen2 qwen3 mistral gemma3_text phi3 opt gpt_neox gpt_oss".split(),
    "vision": "vit clip resnet dinov2 siglip swin convnext detr segformer mobilenet_v2".split(),
    "speech": "wav2vec2 whisper hubert wavlm audio-spectrogram-transformer clap speecht5 wav2vec2-bert data2vec-audio unispeech-sat".split(),
}
Data = dict[str, Any]


def kind_of(verdict: str) -> str:
    return verdict.partition(":")[0]


def compact(rows: list[dict[str, Any]], old: Data | None = None) -> Data:
    """What is kept of the rows, those of `old` where there is no new one."""
    types: dict[str, Any] = {name: dict(entry) for name, entry in (old or {}).get("types", {}).items()}
    for row in rows:
        entry = types.setdefault(row["type"], {"class": row.get("class"), "verdicts": {}})
        details, verdict = row.get("details", {}), row["verdict"]
        entry["class"] = row.get("class") or entry["class"]
        entry["verdicts"][row["edit"]] = "unseen" if details.get("discover_missed") else verdict[:240]
        if row["edit"] in ("KeepHeads", "KeepNeurons"):
            unseen = {what: sorted(classes) for what, classes in details.get("unseen", {}).items()}
            entry.pop("unseen", None)
            if unseen:
                entry["unseen"] = unseen
    seconds = sum(row.get("cpu", row["seconds"]) for row in rows)
    conditions = {"state": rows[-1]["state"] if rows else "", "seconds of a processor": round(seconds)}
    return {"conditions": conditions, "types": dict(sorted(types.items()))}


def write(data: Data, path: Path = JSON) -> None:
    """One line a type, so that a change shows in a diff."""
    lines = [f"  {json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in data["types"].items()]
    text = '{"conditions": ' + json.dumps(data["conditions"]) + ',\n"types": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text)


def read(path: Path = JSON) -> Data:
    return json.loads(path.read_text())


def summary(data: Data) -> list[dict[str, Any]]:
    """Counts for every edit, and for heads and neurons together."""
    found = []
    for edit in EDITS:
        counts = Counter(kind_of(e["verdicts"][edit]) for e in data["types"].values() if edit in e["verdicts"])
        found.append(_line(edit, counts))
    both: Counter[str] = Counter()
    for entry in data["types"].values():
        kinds = [kind_of(entry["verdicts"].get(edit, "not built")) for edit in ("KeepHeads", "KeepNeurons")]
        worst = next((k for k in ("wrong", "not built", "unseen", "refused", "exact") if k in kinds), "nothing to cut")
        both[worst] += 1
    return [*found, _line("heads and neurons", both)]


def _line(name: str, counts: Counter[str]) -> dict[str, Any]:
    total, built = sum(counts.values()), sum(counts.values()) - counts["not built"]
    some = built - counts["nothing to cut"]
    share = f"{100 * counts['exact'] / some:.1f} %" if some else ""
    return {"edit": name, "types": total, "built": built, "something to cut": some,
            **{k: counts[k] for k in ("exact", "refused", "unseen", "wrong")}, "share exact": share}  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    head = list(lines[0])
    rows = [" | ".join(str(line[key]) for key in head) for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {row} |" for row in rows)])


def reason(verdict: str) -> str:
    """What refusals have in common: without names, numbers and shapes."""
    text = verdict.partition(": ")[2]
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", text)
    text = re.sub(r"\b[\w.]+\.\d+\.[\w.]+", "…", text)
    text = re.sub(r"-?\d[\d.,]*(e[-+]?\d+)?", "…", text)
    text = re.sub(r"(…[,;x\s\]\[\)\(]*)+…", "…", text)
    return text.replace("|", "/").replace("<", "&lt;")[:300]


def grouped(data: Data, edit: str, kind: str) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, entry in data["types"].items():
        verdict = entry["verdicts"].get(edit, "")
        if kind_of(verdict) == kind:
            groups.setdefault(reason(verdict), []).append(name)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def cells(data: Data, name: str) -> str:
    """A type's line of the table."""
    entry = data["types"][name]
    signs = [SIGNS.get(kind_of(entry["verdicts"].get(edit, "not built")), "") for edit in EDITS]
    return f"{entry['class']} | {' | '.join(signs)} |"


def render(data: Data) -> str:
    lines = [
        "# Model types and edits",
        "",
        "Every model type that an AutoModel class of transformers knows, built tiny from its own config, with random weights, and",
        "every edit tried on it: a random plan with other heads and neurons in every layer; masked, masked by hand, and cut compared",
        "(1e-5 of the largest output); saved, and loaded in another process, equal to the bit; two steps of training; greedy",
        "generation compared where there is any. What a model's inputs do not run (an expert that no token is sent to, a head that",
        "only training uses) is compared by itself, on inputs of its own. For edits that replace modules, the float form with the same",
        "weights is what is compared.",
        "",
        "This page is rendered: `python -m tests.sweep` makes it again (about half an hour on two cores), and",
        "`python -m tests.sweep --render` renders it from `docs/families.json`.",
        "",
        f"State of the code and versions: {data['conditions']['state']}. "
        f"{data['conditions']['seconds of a processor']} seconds of one core.",
        "",
        table(summary(data)),
        "",
        "*Share exact* is of the types that have something to cut by an independent sign: what `discover` does not see counts.",
        "",
        f"{LEGEND}.",
        "",
        "## What is downloaded most",
        "",
        "Ten architectures of each kind, as far as that is known without the Hub.",
        "",
        "| kind | type | class | " + " | ".join(EDITS) + " |",
        "|---|---|---|" + "---|" * len(EDITS),
        *(f"| {group} | {name} | {cells(data, name)}" for group, names in MOST.items() for name in names),
        "",
        "## All",
        "",
        "| type | class | " + " | ".join(EDITS) + " |",
        "|---|---|" + "---|" * len(EDITS),
    ]
    for name, entry in data["types"].items():
        if all(kind_of(v) == "not built" for v in entry["verdicts"].values()):
            continue
        lines.append(f"| {name} | {cells(data, name)}")
    for kind, title in (("wrong", "Wrong"), ("refused", "Refused")):
        lines += ["", f"## {title}", ""]
        some = False
        for edit in EDITS:
            for text, names in grouped(data, edit, kind):
                some = True
                lines.append(f"- {edit}, {len(names)}: {text}: {', '.join(names)}")
        if not some:
            lines.append("Nothing.")
    lines += ["", "## Seen by its class name, and not by `discover`", ""]
    unseen: dict[tuple[str, str], list[str]] = {}
    for name, entry in data["types"].items():
        for what, classes in entry.get("unseen", {}).items():
            for cls in classes:
                unseen.setdefault((what, cls), []).append(name)
    lines += [f"- {what}, {cls}: {', '.join(names)}" for (what, cls), names in sorted(unseen.items())] or ["Nothing."]
    lines += ["", "## Not built", ""]
    for text, names in grouped(data, EDITS[0], "not built"):
        lines.append(f"- {len(names)}: {text}: {', '.join(names)}")
    return "\n".join(lines) + "\n"
