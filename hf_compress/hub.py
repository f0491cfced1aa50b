"""Give a compressed model back to the Hub: weights, config, tokenizer, card, pictures, recipe and report in one commit."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn
from transformers.utils import logging
from transformers.utils.hub import PushToHubMixin

from .about import seen
from .edits import CompressionError
from .files import staged
from .pictures import PRUNED_FILE
from .plan import PLAN_FILE, Plan
from .publish import (
    CARD_FILE,
    FAMILY,
    PICTURES,
    RECIPE_FILE,
    PushError,
    merge_card_,
    plan_in,
    push_command,
    push_failed,
    record_in,
    remote_card,
    write_card_,
)
from .publishable import (
    WEIGHTS,
    check_arguments,
    check_folder,
    check_measured,
    check_model,
    check_output,
    check_plan,
    check_recipe,
    check_report,
    check_tokenizer,
    named,
)
from .report import EVAL_FILE, REPORT_FILE, Report

logger = logging.get_logger(__name__)

# what trainings leave beside a model: not the model, and (the pickles) nothing that others should open
LEFT_OUT = re.compile(
    r"[._].*|checkpoint-\d+|runs|__pycache__|optimizer\..*|scheduler\.pt|scaler\.pt|rng_state.*|trainer_state\.json"
    r"|training_args\.bin|README\.local(-\d+)?\.md|.*\.(tmp|part|pyc|log)"
)
STEPS = "steps"  # the models in between, of a recipe
EVAL_RESULTS = ".eval_results"  # hidden, and read by the Hub
# what transformers, sentence-transformers and the Hub know; the rest is named, since others will wonder too
KNOWN_FOLDERS = re.compile(r"\d+_\w+|onnx|openvino|\.eval_results")
OURS = (REPORT_FILE, RECIPE_FILE, PLAN_FILE, *PICTURES)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    report: Report | str | os.PathLike | None = None,
    recipe: str | os.PathLike | Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    output: str | os.PathLike | None = None,
    plan: Plan | None = None,
    max_shard_size: int | str = "50GB",
) -> CommitInfo:
    """Publish a compressed model: everything that it needs and a card that tells what was done, in one commit.

    The folder comes first: weights, config, tokenizer, card, pictures, recipe and report are saved into `output`, whole or
    not at all. Then one commit makes the repository hold that: nobody ever loads half of a push. Weight files (and pictures,
    recipes, reports) of an earlier push that are not in this one go in the same commit, since a loader may prefer them. What
    a person changed in the card on the Hub stays. Whatever fails, the folder is kept, and calling again, or the command in
    the message, goes on from there; files that are on the Hub already are not sent again.

    Args:
        model (`PreTrainedModel`): the model, compressed or not.
        repo_id (`str`): `"owner/name"`, or `"name"` for one of yours. Made if it does not exist.
        tokenizer, processor: whatever has `save_pretrained`: a tokenizer, an image processor, a feature extractor, ...
        report (`Report`, or the path of one, *optional*): what `measure` found, for the card; left out, the card has no
            numbers.
        recipe (path of a YAML file, or `dict`, *optional*): how to make the model again; becomes `recipe.yaml`.
        private (`bool`, *optional*): whether a new repository is private. True is refused where it exists and is public.
        revision (`str`, *optional*): a branch, made from main if it does not exist (as `model.push_to_hub` does).
        create_pr (`bool`, defaults to `False`): open a pull request, also in a repository of others.
        token (`str` or `bool`, *optional*): of the Hub; by default what `hf auth login` stored.
        commit_message (`str`, *optional*): of the commit.
        output (`str` or `os.PathLike`, *optional*): the folder: a new or empty one, or one that holds a model. By default a
            temporary one, which is removed when the push succeeded and kept when it failed.
        plan (`Plan`, *optional*): what was done, for models whose config does not say it (plain numbers changed); by default
            what the config records.
        max_shard_size (`int` or `str`, defaults to `"50GB"`): as for `save_pretrained`.

    Returns:
        `huggingface_hub.CommitInfo`: `commit_url`, `oid`, `pr_url`, ...

    Raises:
        CompressionError: before anything is written or sent: no transformers model, masks or fake quantization that are still
            on, adapters, weights on the meta device or sharded, a malformed `repo_id`, a report of another model, ...
        PushError: a `CompressionError` with a `folder`: the Hub or the way to it refused; says why and how to go on.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import KeepNeurons, Plan, mask_
    >>> from hf_compress.hub import push_to_hub
    >>> model = BertModel(BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> mask = mask_(model, Plan([KeepNeurons("encoder.layer.0", range(32))]))
    >>> push_to_hub(model, "me/small-bert")
    Traceback (most recent call last):
    ...
    hf_compress.checks.CompressionError: encoder.layer.0.output.dense is masked, so the model is not finished: remove the \
mask (Mask.remove()), or cut what it hides (apply_ with its plan), then push.

    ```
    """
    owner = check_model(model)
    check_arguments(repo_id, private, revision, create_pr, token, commit_message)
    for name, given in (("tokenizer", tokenizer), ("processor", processor)):
        if given is not None and (isinstance(given, nn.Module | type) or not isinstance(given, PushToHubMixin)):
            raise CompressionError(
                f"{name} must be something with save_pretrained (a tokenizer, a processor, ...), got {named(given)}."
            )
    check_tokenizer(owner, tokenizer, processor)
    plan = check_plan(owner, plan)
    report = check_report(owner, report)
    recipe_text = check_recipe(recipe)
    folder = Path(output) if output is not None else Path(tempfile.mkdtemp()) / repo_id.rpartition("/")[2]
    check_output(folder)
    try:
        with staged(folder, remove=_left_by_others(folder)) as stage:
            owner.save_pretrained(stage, max_shard_size=max_shard_size)
            for other in (tokenizer, processor):
                if other is not None:
                    other.save_pretrained(stage)
            if recipe_text is not None:
                (stage / RECIPE_FILE).write_text(recipe_text, encoding="utf-8")
            if plan and record_in(stage) is None:
                Plan(plan.edits).save(stage)  # the weights are in the model
            check_measured(stage, report)
            for name in (CARD_FILE, FAMILY, PRUNED_FILE):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, stage / name)
            about = {} if report else seen(owner)
            about |= {"recipe": recipe_text} if recipe_text else {}
            write_card_(stage, plan, report, about=about, repo_id=repo_id, token=token)
    except BaseException:
        if output is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    try:
        info = push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message or f"Upload {type(owner).__name__}, compressed by hf_compress",
        )
    except KeyboardInterrupt:
        command = push_command(folder, repo_id, private, revision, create_pr)
        logger.warning(f"Interrupted. Everything is in {folder}; to go on: {command}")
        raise
    if output is None:
        shutil.rmtree(folder.parent, ignore_errors=True)
    return info


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publish a saved model as it is, in one commit; see `push_to_hub`, whose second half this is.

    Checkpoints, logs, optimizer states, pickles of a training and hidden files stay behind; other subfolders are published, and
    named in a warning. A folder without a card gets one, from its plan and its `report.json`. The lines of a card that tell how
    to load the model name this repository, in the folder too, unless somebody edited them. A section that was edited both in
    the folder and on the Hub stays as on the Hub; the folder's card is then also in `README.local.md`, which is not published.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained`, a Trainer or a failed `push_to_hub` wrote.
        repo_id, private, revision, create_pr, token, commit_message: as for `push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        CompressionError: before anything is sent: no folder of a whole model, one from the middle of a training, or one with
            the report of another model.
        PushError: the Hub or the way to it refused.

    Example:

    ```python
    >>> from hf_compress.hub import push_folder
    >>> push_folder("no/such/folder", "me/model")
    Traceback (most recent call last):
    ...
    hf_compress.checks.CompressionError: 'no/such/folder' is no folder of a saved model: it has no config.json. Save one with \
model.save_pretrained(folder).

    ```
    """
    check_arguments(repo_id, private, revision, create_pr, token, commit_message)
    check_folder(folder)
    folder = Path(folder)
    report = Report.load(folder) if (folder / REPORT_FILE).is_file() else None
    check_measured(folder, report)
    inherits = report is not None and "base_model" in report.about and "base_card" not in report.about
    if inherits or not (folder / CARD_FILE).is_file():  # the base model's card may have been out of reach
        recipe = folder / RECIPE_FILE
        about = (
            {"recipe": recipe.read_text(encoding="utf-8")}
            if recipe.is_file() and not (report and report.about.get("recipe"))
            else {}
        )
        write_card_(folder, plan_in(folder), report, about=about, repo_id=repo_id, token=token)
    step = "reach the Hub"
    try:
        api = HfApi(token=token, library_name=__package__)
        step = f"make the repository {repo_id}"
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        step = f"look at {repo_id}"
        if private and not api.model_info(repo_id).private:
            raise PushError(
                f"{repo_id} exists and is public, and private=True was asked for. Make it private first (its settings on the "
                f'Hub, or HfApi().update_repo_settings("{repo_id}", private=True)), or push to another name. Nothing was sent; '
                f"everything is in {folder}.",
                folder,
            )
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            step = f"make the branch {revision}"
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        step = f"look at {repo_id}" + (f" at {revision}" if revision else "")
        there = api.model_info(repo_id, revision=revision)
        names = [file.rfilename for file in there.siblings or ()]
        remote = None
        if CARD_FILE in names:
            step = "read the card that is on the Hub"
            remote = remote_card(api, repo_id, there.sha)
        merge_card_(folder, remote, repo_id)
        files = _files(folder)
        stale = [name for name in names if name not in files and (WEIGHTS.fullmatch(name) or name in OURS or name == EVAL_FILE)]
        step = f"commit to {repo_id}"
        info = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, os.fspath(folder / name)) for name in files),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message or "Upload a model compressed by hf_compress",
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else there.sha,  # an edit of the card since then is not lost
        )
        if info.oid == there.sha:
            logger.warning(
                f"Nothing to push: {repo_id} at {revision or 'main'} holds all of {folder} already, so no commit was made"
                f"{' and no pull request opened' if create_pr else ''}."
            )
        return info
    except CompressionError:
        raise
    except Exception as error:  # the client, its transfer libraries and the network fail in many ways
        raise push_failed(step, error, folder, repo_id, private, revision, create_pr) from error


def _files(folder: Path) -> list[str]:
    """What of a folder is published, by name."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [
        name.as_posix()
        for name in names
        if name.parts[0] != STEPS and not any(LEFT_OUT.fullmatch(part) and part != EVAL_RESULTS for part in name.parts)
    ]
    others = Counter(name.split("/")[0] for name in found if "/" in name and not KNOWN_FOLDERS.fullmatch(name.split("/")[0]))
    if others:
        named_ones = ", ".join(f"{name} ({number} file{'s' * (number > 1)})" for name, number in others.items())
        logger.warning(f"All of {folder} is published, also its subfolders: {named_ones}.")
    return found


def _left_by_others(folder: Path) -> list[str]:
    """What an earlier save left in a folder that this one may not replace: other shards, a report without a successor."""
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [name for name in there if WEIGHTS.fullmatch(name) or name in OURS]
