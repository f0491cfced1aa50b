"""`run_recipe`: from a recipe to a folder that can be published, step by step, going on where a kill left off."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..edits import CompressionError
from ..files import staged
from ..measure import measure
from ..pictures import PRUNED_FILE
from ..plan import PLAN_FILE, Plan
from ..report import REPORT_FILE, Report
from .checks import check_output, check_owner, check_push_options, check_token, check_trainings, try_output
from .digests import FORMAT, OWN_TEACHERS, digests
from .finite import NotFinite, finite_outputs
from .folder import (
    RUN_FILE,
    STEP_FILE,
    alone,
    clear,
    damage,
    damage_of_model,
    files_of,
    read_json,
    sizes_of,
    write_json,
)
from .metrics import Metric
from .opening import bars_where_seen, first_line, load_teacher, open_recipe, rehearse
from .reading import Source, read_source
from .results import RECIPE_FILE, about, last_part, notes_on, stage_row
from .schema import Recipe, check_push, parse
from .sentences import write_sentence_files
from .steps import STEPS, Stage, Step
from .tasks import Setup, predict

logger = logging.get_logger(__name__)


def read_recipe(recipe: str | os.PathLike | Mapping[str, Any], *, output: str | None = None) -> Recipe:
    """Read a recipe and find it whole: words, types, order, model, data, columns, metric, and each step on the model.

    Nothing is trained or written. The model and data are loaded (and downloaded, where they come from the Hub), and the
    steps are made on a copy with random scores, so that what `apply_` would refuse is refused here.

    Args:
        recipe (`str`, `os.PathLike` or `dict`): a YAML file, or the same as a dict.
        output (`str`, *optional*): instead of the recipe's own.

    Returns:
        `Recipe`

    Raises:
        RecipeError: every mistake, one a line; each begins with `file:line: `.

    Example:

    ```python
    >>> from hf_compress.recipe import read_recipe
    >>> read_recipe({"model": "m", "task": "text-classification", "data": "d", "steps": [{"prun": {}}], "output": "o"})
    Traceback (most recent call last):
    ...
    hf_compress.recipe.reading.RecipeError: recipe:5: unknown step 'prun'; did you mean 'prune'? Steps: finetune, prune, \
distill, quantize, low_rank, depthwise, exits, measure.

    ```
    """
    found = parse(*read_source(recipe), output)
    check_output(found)
    check_push_options(found, found.push)
    with bars_where_seen():
        setup, _ = open_recipe(found)
        check_trainings(found, setup)
        rehearse(found, setup)
        try_output(found)
    return found


def run_recipe(
    recipe: str | os.PathLike | Mapping[str, Any], *, output: str | None = None, push_to_hub: str | None = None
) -> Report:
    """Do what a recipe says: the same as its Python calls, checked before, and resumed after a kill.

    Every finished step is a checkpoint, `output/steps/NN-name`, that `AutoModel` loads; the next begins from it. A run that
    was killed goes on from the last checkpoint of the step it was in, and ends with the same plan and, on the same
    number of threads, the same weights. Steps whose recipe changed, and those after them, run again. `output` ends as a
    model folder with tokenizer or processor, `report.json`, `recipe.yaml`, the plan, and a card with its pictures.

    Args:
        recipe (`str`, `os.PathLike` or `dict`): a YAML file, or the same as a dict.
        output (`str`, *optional*): the folder, instead of the recipe's own.
        push_to_hub (`str`, *optional*): a repository to push to, instead of the recipe's own.

    Returns:
        `Report`: of the compressed model against the one before compression; also in `output/report.json`. After a push
            `about["published"]` holds the `repo` and the `url` of the commit or pull request; the file does not.

    Raises:
        RecipeError: a mistake in the recipe, before anything is trained or written.
        CompressionError: a step fails on what only training shows; its checkpoint and those before stay.
        PushError: the model is whole in `output`, and the Hub refused it.

    Example:

    ```python
    >>> from hf_compress.recipe import run_recipe
    >>> run_recipe("no-such-recipe.yaml")
    Traceback (most recent call last):
    ...
    hf_compress.recipe.reading.RecipeError: no-such-recipe.yaml:1: there is no such file; `hf-compress recipe init MODEL` \
writes one.

    ```
    """
    found = parse(*read_source(recipe), output)
    push = found.push
    if push_to_hub is not None:
        push = {**(push or {}), **check_push(push_to_hub, Source("push_to_hub", ""))}
    check_output(found)
    check_push_options(found, push)
    check_token(found, push)
    with bars_where_seen():
        setup, metrics = open_recipe(found)
        check_trainings(found, setup)
        run = Run(found, setup, metrics, push)
        check_owner(found, run.owner, run.known)
        if run.known.get("rehearsed") != run.digests[-1]:
            try_output(found)
            rehearse(found, setup)
        report = run.finish()
    if push is not None:
        from ..hub import push_folder

        options = {name: value for name, value in push.items() if name != "repo"}
        info = push_folder(run.output, push["repo"], **options)
        report.about["published"] = {"repo": push["repo"], "url": str(info.pr_url or info.commit_url)}
    return report


class Run:
    """One recipe in one folder."""

    def __init__(
        self, recipe: Recipe, setup: Setup, metrics: tuple[Metric, ...], push: Mapping[str, Any] | None = None
    ) -> None:
        self.recipe, self.setup, self.metrics, self.push = recipe, setup, metrics, push or {}
        self.output = Path(recipe.output).expanduser()
        self.steps = [step for step in recipe.steps if step.name != "measure"]
        self.digests = digests(recipe, setup)
        self.folders = [self.output / "steps" / "00-model"] + [
            self.output / "steps" / f"{i:02d}-{step.name}" for i, step in enumerate(self.steps, 1)
        ]
        self.known = read_json(self.output / "steps" / RUN_FILE)
        self.owner = {"model": last_part(setup.model), "task": recipe.task}  # by whichever path, here or elsewhere

    def finish(self) -> Report:
        """Run the steps that are not done, measure, and put the folder together."""
        whole = hashlib.sha256(f"{self.digests[-1]} {self.recipe.source.text}".encode()).hexdigest()
        (self.output / "steps").mkdir(parents=True, exist_ok=True)
        with alone(self.output):
            clear(self.output, [folder.name for folder in self.folders])
            return self._there(whole) or self._work(whole)

    def _there(self, whole: str) -> Report | None:
        """The report of a folder that holds what this recipe makes."""
        if self.known.get("done") != whole:
            return None
        missing = [name for name in [*self.known.get("files", []), REPORT_FILE] if not (self.output / name).is_file()]
        damaged = f"{missing[0]} is missing" if missing else damage_of_model(self.output)
        try:
            if damaged is None:
                report = Report.load(self.output)
                logger.info(f"{self.output} holds what this recipe makes; nothing is done again.")
                return report
        except CompressionError as error:
            damaged = str(error)
        logger.warning(f"{self.output} is damaged and is put together again: {damaged}")
        return None

    def _work(self, whole: str) -> Report:
        self._note(rehearsed=self.digests[-1], **self.owner)
        for note in self.setup.data.notes:
            logger.warning(note)
        for i in range(self._first_to_run(), len(self.folders)):
            self._run(i)
        report = self._measured()
        self._assemble(report)
        self._note(done=whole)
        return Report.load(self.output)  # the card added its pictures

    # --- steps -------------------------------------------------------------------------------------------------

    def _first_to_run(self) -> int:
        """The first step that is not there as this recipe makes it; what is there after it goes."""
        first, damaged = 0, None
        for folder, digest in zip(self.folders, self.digests, strict=True):
            known = read_json(folder / STEP_FILE)
            if known and known.get("digest") != digest or not folder.is_dir():
                break
            damaged = damage(folder, known)
            if damaged is not None:
                break
            first += 1
        stale = [f for f in sorted((self.output / "steps").glob("[0-9][0-9]-*")) if f not in self.folders[:first]]
        if stale:
            what = f"{', '.join(f.name for f in stale)} ran"
            why = f"{stale[0].name} is damaged ({damaged}) since {what}" if damaged else None
            logger.warning(
                f"{why or f'The recipe, its data or the versions changed since {what}'}: "
                f"{'that step runs' if len(stale) == 1 else 'those steps run'} again."
            )
        for folder in stale:
            shutil.rmtree(folder)
        return first

    def _run(self, i: int) -> None:
        scratch = self.output / "steps" / f".{self.folders[i].name}"
        if read_json(scratch / RUN_FILE).get("digest") != self.digests[i]:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / RUN_FILE).write_text(json.dumps({"digest": self.digests[i]}))
        name, made = self.folders[i].name, scratch / "made"
        logger.info(f"{name}: begins")
        try:
            if i == 0:
                model, plan = self.setup.load(), Plan()
            else:
                step = self.steps[i - 1]
                stage = Stage(self.setup, scratch / "training", self._teacher(i, step), self.metrics[0])
                model, plan = STEPS[step.name].run(step, self._load(i - 1), stage)
            shutil.rmtree(made, ignore_errors=True)
            self._save(model.to("cpu"), made)
            if (scratch / "training" / PRUNED_FILE).is_file():
                shutil.copyfile(scratch / "training" / PRUNED_FILE, made / PRUNED_FILE)
            model = self.setup.load(made)  # what is measured is what was saved
            scores = self._scores(model)
        except NotFinite as error:
            shutil.rmtree(scratch)  # its checkpoints led there, and would again
            raise CompressionError(self._failed(i, error)) from error
        except CompressionError as error:
            raise CompressionError(self._failed(i, error)) from error
        known = {"digest": self.digests[i], "name": name, "plan": _edits(plan), "metrics": scores, "files": sizes_of(made)}
        (made / STEP_FILE).write_text(json.dumps(known, indent=1))
        os.replace(made, self.folders[i])
        self._keep_logs(scratch / "training" / "runs", name)
        shutil.rmtree(scratch)
        logger.info(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))

    def _failed(self, i: int, error: CompressionError) -> str:
        rate = self.steps[i - 1].options.get("learning_rate") if i else None
        hint = (
            f" The step's learning_rate is {rate:g}; try a smaller one."
            if isinstance(error, NotFinite) and rate and "learning_rate" not in str(error)
            else ""
        )
        return (
            f"{self.folders[i].name} failed: {error}{hint} What was finished before it is in {self.output / 'steps'}; change "
            "the recipe and run it again."
        )

    def _keep_logs(self, logs: Path, name: str) -> None:
        """TensorBoard's files outlive the checkpoints that they lie beside."""
        kept = self.output / "steps" / "runs" / name
        if logs.is_dir():
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            os.replace(logs, kept)

    def _load(self, i: int) -> Any:
        """The model that a step left."""
        try:
            return self.setup.load(self.folders[i])
        except Exception as error:  # what a parser or a config's own checks raise
            raise CompressionError(
                f"{self.folders[i]} cannot be loaded ({first_line(error)}). Remove that folder and run the recipe again."
            ) from error

    def _save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        self.setup.processor.save_pretrained(folder)
        if self.setup.name == "sentence-similarity":
            write_sentence_files(folder, self.setup.model, self.setup.revision, self.setup.pooling)

    def _teacher(self, i: int, step: Step) -> Any:
        """What gives a step its teacher."""
        key = ("steps", self.recipe.steps.index(step), step.name, "teacher")

        def teacher(name: str) -> Any:
            if name == "previous":
                return self._load(i - 1)
            if name == "finetuned":
                return self._load(self._dense(i))
            return load_teacher(name, self.setup, self.recipe, key)

        return teacher

    def _first_teacher(self) -> str | None:
        """The teacher, named by folder or id, that gives a new head all that it knows."""
        first = self.steps[0] if self.setup.fresh and self.steps else None
        return None if first is None or first.name != "distill" or first.teacher in OWN_TEACHERS else first.teacher

    def _dense(self, before: int) -> int:
        """The last fine-tuned model before a step, else the first that knows anything."""
        tuned = [j for j in range(1, before) if self.steps[j - 1].name == "finetune"]
        return max(tuned, default=min(1, before - 1) if self._first_teacher() else 0)

    def _baseline(self) -> int:
        """What the result is compared with: the model that compression began from."""
        first = next((j for j, step in enumerate(self.steps, 1) if step.name != "finetune"), len(self.steps) + 1)
        return first - 1 if first <= len(self.steps) else 0

    def _scores(self, model: Any, who: str = "the model") -> dict[str, float]:
        with finite_outputs(model, who):
            found, wanted = predict(self.setup, model, "measured")
        scores = {metric.name: metric.compute(found, wanted) for metric in self.metrics}
        for name, score in scores.items():
            if not math.isfinite(score):
                raise NotFinite(f"the {name} of {who} on the rows that are measured is {score}, which says nothing.")
        return scores

    # --- the end -----------------------------------------------------------------------------------------------

    def _measured(self) -> Report:
        options = next((step.options for step in self.recipe.steps if step.name == "measure"), {})
        sizes = options.get("batch_sizes") or [1, 32]
        repeats = {name: options[name] for name in ("repeats", "warmup") if name in options}
        length = options.get("length") or min(64, self.setup.options.max_length or 64)
        batch = self.setup.timing_batch(max(sizes), length)
        known = [self._known(i) for i in range(len(self.folders))]
        base, last, main = self._baseline(), len(self.folders) - 1, self.metrics[0].name
        teacher = self._first_teacher()
        if teacher is None:
            dense, before, called = self._load(base), known[base], last_part(self.setup.model)
            called += ", fine-tuned" if base else ", with a new head" if self.setup.fresh else ""
        else:
            dense, called = self._teacher(1, self.steps[0])(teacher), last_part(teacher)
            before = {"name": f"00-{called}", "metrics": self._scores(dense, f"the teacher {called}")}
        stages = []
        for i in range(base, last):
            model, one = (dense, before) if i == base else (self._load(i), known[i])
            stages.append(stage_row(one, main, measure(model, batch, **repeats).model, self._step(i)))
        notes = notes_on(self.setup, self.steps, base, teacher and called)
        report = measure(
            self._load(last),
            batch,
            against=dense,
            metrics=known[last]["metrics"],
            metrics_against=before["metrics"],
            batch_sizes=tuple(sizes),
            about=about(self.recipe, self.setup, self._name(), main, stages, called, notes),
            **repeats,
        )
        report.about["stages"].append(stage_row(known[last], main, report.model, self._step(last)))
        return report

    def _step(self, i: int) -> Step | None:
        return self.steps[i - 1] if i else None

    def _name(self) -> str:
        """What the result is called: as its repository, else as its folder."""
        return self.push["repo"].rpartition("/")[2] if self.push else self.output.resolve().name

    def _known(self, i: int) -> dict[str, Any]:
        """What a step left of itself; its metrics are computed now where the recipe has come to ask for others."""
        path = self.folders[i] / STEP_FILE
        known = read_json(path)
        if list(known["metrics"]) != [metric.name for metric in self.metrics]:
            known["metrics"] = self._scores(self._load(i))
            draft = self.output / "steps" / "step.part"
            draft.write_text(json.dumps(known, indent=1))
            os.replace(draft, path)
        return known

    def plan(self) -> Plan:
        """All that was done, in order, without the tensors that it was done with."""
        plans = [read_json(folder / STEP_FILE)["plan"] for folder in self.folders]
        return sum((Plan.from_dict(plan) for plan in plans), Plan())

    def _assemble(self, report: Report) -> None:
        from ..publish import CARD_FILE, PICTURES, write_card_

        last, plan = self.folders[-1], self.plan()
        old = files_of(self.known.get("files", []), self.output)
        with staged(self.output, remove=old) as stage:
            shutil.copytree(last, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STEP_FILE))
            files = [str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()]
            (stage / RECIPE_FILE).write_text(self.recipe.source.text, encoding="utf-8")
            for folder in self.folders:  # what a step was pruned by, for the card
                if (folder / PRUNED_FILE).is_file():
                    shutil.copyfile(folder / PRUNED_FILE, stage / PRUNED_FILE)
            (stage / PLAN_FILE).write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
            if (self.output / CARD_FILE).is_file():
                shutil.copyfile(self.output / CARD_FILE, stage / CARD_FILE)
            # with the weights: after a kill in between, old numbers would lie beside them
            write_card_(stage, plan, report, repo_id=self.push.get("repo"))
            old += [name for name in PICTURES if (self.output / name).is_file() and not (stage / name).is_file()]
        self._note(files=files)

    def _note(self, **facts: Any) -> None:
        """Into `steps/run.json`."""
        self.known = {"format": FORMAT, **self.known, **facts}
        write_json(self.output / "steps" / RUN_FILE, self.known)


def _edits(plan: Plan) -> dict[str, Any]:
    """A plan without its tensors: they are in the model."""
    return {name: value for name, value in plan.to_dict().items() if name != "tensors"}
