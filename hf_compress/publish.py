"""What a published folder holds beside the weights: plan, card, pictures, report. And what went wrong when pushing it."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,  # type: ignore[attr-defined]  # of whichever HTTP library the client has
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .about import seen, seen_in_config
from .edits import CompressionError
from .files import staged
from .loader import METHOD, HfCompressConfig
from .plan import PLAN_FILE, Plan
from .probe import owners_in
from .report import EVAL_FILE, REPORT_FILE, Report
from .sections import kept_by_hand, merge_card, readdressed, with_metadata

logger = logging.get_logger(__name__)

CARD_FILE, RECIPE_FILE, CONFIG_FILE = "README.md", "recipe.yaml", "config.json"
MODULES_FILE = "modules.json"  # of sentence-transformers
PICTURES = ("kept.png", "error.png", "stages.png")
FAMILY = "family.png"  # what `plot_family` drew there; only whoever did can draw it again, so it is never removed


class PushError(CompressionError):
    """A push that failed: what, the Hub's reason, and how to go on. `folder` is whole, and what was to be pushed.

    Args:
        message (`str`): the whole message.
        folder (`Path`): where everything is.
    """

    def __init__(self, message: str, folder: str | os.PathLike) -> None:
        super().__init__(message)
        self.folder = Path(folder)


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_of(model: nn.Module) -> Plan:
    """The edits that a model's config records; an empty plan where it records none (nothing done, or plain numbers say all)."""
    for _, owner in owners_in(model):
        plan = plan_of_config(owner.config)
        if plan is not None:
            return plan
    return Plan()


def plan_of_config(config: Any) -> Plan | None:
    """The edits that a config records, if it is one of ours."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        found = HfCompressConfig(**found)
    return found.plan if isinstance(found, HfCompressConfig) else None


def record_in(folder: str | os.PathLike) -> HfCompressConfig | None:
    """The compression record in a folder's `config.json`, if there is one.

    Raises:
        CompressionError: the file cannot be read, or the record is damaged or of a later version.
    """
    found = _config_in(folder).get("quantization_config")
    return HfCompressConfig(**found) if isinstance(found, dict) and found.get("quant_method") == METHOD else None


def _config_in(folder: str | os.PathLike) -> dict[str, Any]:
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CompressionError(f"{path} cannot be read ({error}); save the model again.") from error
    return config if isinstance(config, dict) else {}


def _facts_in(folder: Path) -> dict[str, Any]:
    """What the files of a saved model tell about it."""
    facts = seen_in_config(_config_in(folder)) if (folder / CONFIG_FILE).is_file() else {}
    return {**facts, **({"library_name": "sentence-transformers"} if (folder / MODULES_FILE).is_file() else {})}


def plan_in(folder: str | os.PathLike) -> Plan:
    """The plan of a saved model: what its config records, or the `compression_plan.json` beside it, or an empty one."""
    record = record_in(folder)
    whole = Plan.load(folder) if (Path(folder) / PLAN_FILE).is_file() else Plan()
    if record is None or {repr(edit) for edit in record.plan} <= {repr(edit) for edit in whole}:
        return whole  # a config records no KeepLayers, nor what plain numbers tell
    return record.plan


# --- the card --------------------------------------------------------------------------------------------------------


def write_card_(
    folder: str | os.PathLike,
    plan: Plan,
    report: Report | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    remote: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
) -> None:
    """Write a card, its pictures and the report into a folder; what a person changed in the card that was there stays.

    What is kept although something else would now be there, is said in a warning.

    Args:
        folder (`str` or `os.PathLike`): of the saved model.
        plan (`Plan`): what was done.
        report (`Report`, *optional*): what was measured. Without one the card has no numbers.
        about (`dict`, *optional*): facts beside those of the report: see `Report.about`.
        repo_id (`str`, *optional*): where the model goes, for the lines that tell how to load it.
        remote (`str`, *optional*): the card that is on the Hub now.
        metadata (`dict`, *optional*): more of the YAML at the top: `language`, `license`, `tags`, ... (lists are added to).
        token (`str` or `bool`, *optional*): to read the base model's card, whose license and languages are inherited.
    """
    from .card import base_facts, eval_results, render_card
    from .pictures import draw_, pruned_in

    folder = Path(folder)
    facts = {**_facts_in(folder), **(report.about if report else {}), **(about or {})}
    facts |= {"repo_id": repo_id} if repo_id else {}
    if facts.get("base_model") and "base_card" not in facts:
        local = facts["base_model"].startswith("./")  # a folder that was told so, wherever it lies
        facts["base_card"] = (
            None if local else base_facts(facts["base_model"], revision=facts.get("base_revision"), token=token) or None
        )
    facts = {key: value for key, value in facts.items() if value is not None}
    gone: list[str] = []
    with staged(folder, remove=gone) as stage:
        facts["pictures"] = draw_(stage, plan, report, facts, pruned_in(folder, plan))
        facts["pictures"] += [FAMILY] if (folder / FAMILY).is_file() else []
        if report is not None:
            report = replace(report, about=facts)
            report.save(stage)
            for name, text in eval_results(report).items():
                (stage / name).parent.mkdir(exist_ok=True)
                (stage / name).write_text(text)
        local = _text_of(folder / CARD_FILE)
        text, _ = _merged(local, with_metadata(render_card(plan, report, about=facts), metadata or {}))
        text, lost = _merged(remote, text)
        gone += [name for name in PICTURES if f"({name})" not in text]  # of an earlier card
        gone += [EVAL_FILE] if report is not None and (folder / EVAL_FILE).is_file() else []
        if lost:  # a Trainer publishes all of its folder but what begins so
            _put_aside(stage, folder, "_README.local", local, lost)
        _write_text(stage / CARD_FILE, text)


def merge_card_(folder: str | os.PathLike, remote: str | None, repo_id: str) -> None:
    """Make the card of a folder that of a repository: what a person changed in the one that is there is carried over.

    Where a section was edited here and there, the one that is there stays, and the card that was here is put aside.

    Args:
        folder (`str` or `os.PathLike`): of the saved model, with a card.
        remote (`str`, *optional*): the card that is on the Hub now.
        repo_id (`str`): the repository, which the lines that load the model then name.
    """
    folder = Path(folder)
    mine = _text_of(folder / CARD_FILE) or ""
    text, lost = _merged(remote, readdressed(mine, repo_id))
    report = Report.load(folder) if (folder / REPORT_FILE).is_file() else None
    moved = report is not None and report.about.get("repo_id", repo_id) != repo_id
    if text == mine and not moved:
        return
    with staged(folder) as stage:
        if lost:
            _put_aside(stage, folder, "README.local", mine, lost)
        if report is not None and moved:
            replace(report, about={**report.about, "repo_id": repo_id}).save(stage)
        _write_text(stage / CARD_FILE, text)


def _text_of(card: Path, name: str | None = None) -> str | None:
    """With the line ends that it has."""
    try:
        return card.read_bytes().decode("utf-8") if card.is_file() else None
    except UnicodeDecodeError as error:
        raise CompressionError(f"{name or card} is not UTF-8 text (byte {error.start}); correct it, or remove it.") from None


def _write_text(card: Path, text: str) -> None:
    card.write_bytes(text.encode("utf-8"))


def _merged(old: str | None, new: str) -> tuple[str, list[str]]:
    """The card to publish, and what of the new one a person wrote and is lost in it."""
    if old is None or old == new:
        return new, []
    lost, outdated = kept_by_hand(old, new)
    if outdated:
        logger.warning(f"{CARD_FILE}: kept as edited by hand, though what was measured changed: {', '.join(outdated)}.")
    return merge_card(old, new), lost


def _put_aside(stage: Path, folder: Path, name: str, card: str | None, lost: list[str]) -> None:
    number, file = 1, f"{name}.md"
    while (folder / file).exists():
        number, file = number + 1, f"{name}-{number + 1}.md"
    said = f"{CARD_FILE}: edited both in {folder} and on the Hub, whose text stays: {', '.join(lost)}."
    if card is not None:
        _write_text(stage / file, card)
        said += f" The card as it was in the folder is {folder / file}, which is not published; merge by hand what should stay."
    logger.warning(said)


def remote_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The card that a repository has now; None where it has none. Nothing goes into the user's cache."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision, local_dir=scratch))
            return _text_of(path, f"The {CARD_FILE} in {repo_id}")
        except EntryNotFoundError:
            return None


# --- failures --------------------------------------------------------------------------------------------------------


def push_command(
    folder: str | os.PathLike, repo_id: str, private: bool | None = None, revision: str | None = None, create_pr: bool = False
) -> str:
    """The command that pushes a folder that is whole."""
    words = ["hf-compress", "push", os.fspath(Path(folder).absolute()), repo_id]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    words += ["--create-pr"] if create_pr else []
    return shlex.join(words)


def reason(error: BaseException, repo_id: str) -> str:
    """Why the Hub, or the way to it, refused: its own words, and what to do about it."""
    http = next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)
    if any(isinstance(e, OfflineModeIsEnabled) for e in _chain(error)):
        return "offline mode is on: unset HF_HUB_OFFLINE"
    if http is None:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        lost = "" if isinstance(error, ValueError) else f" (no answer from {constants.ENDPOINT}?)"
        return f"{type(error).__name__}: {first}{lost}" if not isinstance(error, ValueError) else " ".join(str(error).split())
    status = http.response.status_code
    said = http.server_message or http.response.headers.get("X-Error-Message") or str(http).strip().splitlines()[0]
    owner = repo_id.split("/")[0]
    advice = {
        401: "check the token: `hf auth login`, the HF_TOKEN variable, or token=",
        403: f"the token may not write there: one with the write role of {owner} may, or create_pr=True (--create-pr)",
        404: "check the name and the revision, and that the token may see it",
        409: "somebody made it at the same time; run it again",
        412: "somebody committed in between; run it again, and their changes to the card are kept",
        429: "too many requests; wait a little",
    }.get(status)
    return f"{status}: {said.rstrip('.')}" + (f" ({advice})" if advice else "")


def push_failed(
    step: str,
    error: BaseException,
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> PushError:
    """What to raise when a step of a push has failed; the folder is whole."""
    command = push_command(folder, repo_id, private, revision, create_pr)
    return PushError(f"Could not {step}: {reason(error, repo_id)}. Everything is in {folder}; to go on: {command}", folder)


def is_refusal_of_hub(error: BaseException) -> bool:
    """Whether the Hub, or the way to it, is behind this error."""
    return any(isinstance(e, HTTPError | OfflineModeIsEnabled) for e in _chain(error))


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


# --- trainers --------------------------------------------------------------------------------------------------------

# stock's arguments that have a place in the YAML
METADATA = {"language": "language", "license": "license", "tags": "tags", "dataset": "datasets", "dataset_tags": "datasets"}


def card_in_(trainer: Trainer | None, plan: Plan | None) -> None:
    """From now on, `trainer.push_to_hub()` publishes with our card. For `on_push_begin` of callbacks that compress.

    Stock `Trainer.push_to_hub` announces itself to its callbacks, then calls `create_model_card`, which would write a card
    that does not say how to load the model. Nothing of transformers is changed: this one trainer gets another method, which
    also takes `report=` from `push_to_hub(report=...)`. Trainers that have our card already are left alone.

    Args:
        trainer (`Trainer`, *optional*): the one that pushes; None does nothing.
        plan (`Plan`, *optional*): what the callback did, for models whose config does not record it.
    """
    if trainer is None:
        return
    if plan:
        vars(trainer)["_hfc_plan"] = plan
    stock = trainer.create_model_card
    if "report" in inspect.signature(stock).parameters:
        return

    def create_model_card(*args: Any, report: Report | None = None, **kwargs: Any) -> None:
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        if not trainer_card_(trainer, given, report, vars(trainer).get("_hfc_plan")):
            stock(*args, **kwargs)

    vars(trainer)["create_model_card"] = create_model_card


def trainer_card_(
    trainer: Trainer,
    given: Mapping[str, Any],
    report: Report | None = None,
    plan: Plan | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> bool:
    """Write the card of a trainer's model into its output folder; False where it is not compressed (stock does better).

    Args:
        trainer (`Trainer`): it has saved its model there.
        given (`dict`): what stock's `create_model_card` was called with.
        report (`Report`, *optional*): for the numbers.
        plan (`Plan`, *optional*): for models whose config does not record one.
        token, revision (`str`, *optional*): of the push, where they are not the arguments' of the trainer.
    """
    if report is not None and not isinstance(report, Report):
        raise CompressionError(f"report is what hc.measure gives (a Report), got {type(report).__name__}.")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    plan = plan_of(model) or plan or Plan()
    if not plan and report is None:
        return False
    if not trainer.is_world_process_zero():
        return True
    if report is not None:
        from .publishable import check_report

        report = check_report(model, report)
    token = token or trainer.args.hub_token
    remote, repo_id = None, trainer.hub_model_id
    if repo_id is not None:
        try:
            remote = remote_card(HfApi(token=token, library_name=__package__), repo_id, revision or trainer.args.hub_revision)
        except RepositoryNotFoundError:  # a private one, and the token was given to push_to_hub, which stock keeps to itself
            logger.warning(
                f"The card that is in {repo_id} could not be read, so changes to it are not kept: set args.hub_token."
            )
    write_card_(
        trainer.args.output_dir or ".",
        plan,
        report,
        about=None if report else seen(model),
        repo_id=repo_id,
        remote=remote,
        metadata={METADATA[name]: value for name, value in given.items() if name in METADATA},
        token=token,
    )
    return True
