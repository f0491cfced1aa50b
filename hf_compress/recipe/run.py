"""`run_recipe`: from a recipe to a folder that can be published, step by step, going on where a kill left off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging
from transformers.utils.hub import cached_file, extract_commit_hash

from ..edits import CompressionError
from ..files import staged
from ..measure import measure
from ..plan import PLAN_FILE, Plan
from ..report import REPORT_FILE, Report
from .data import digest_of, locate
from .metrics import Metric
from .opening import bars_where_seen, load_teacher, open_recipe, rehearse
from .reading import Source, read_source
from .schema import Recipe, check_push, parse
from .sentences import write_sentence_files
from .steps import STEPS, Stage, Step
from .tasks import Setup, predict

logger = logging.get_logger(__name__)

STEP_FILE, RUN_FILE, RECIPE_FILE = "step.json", "run.json", "recipe.yaml"
FORMAT = 1


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
        RecipeError: the first mistake; the message begins with `file:line: `.

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
    _check_output(found)
    with bars_where_seen():
        setup, _ = open_recipe(found)
        rehearse(found, setup)
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
        `Report`: of the compressed model against the one before compression; also in `output/report.json`.

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
    _check_output(found)
    _check_token(found, push)
    with bars_where_seen():
        setup, metrics = open_recipe(found)
        run = Run(found, setup, metrics, push)
        if run.known.get("rehearsed") != run.digests[-1]:
            rehearse(found, setup)
        report = run.finish()
    if push is not None:
        from ..hub import push_folder

        options = {name: value for name, value in push.items() if name != "repo"}
        push_folder(run.output, push["repo"], **options)
    return report


class Run:
    """One recipe in one folder."""

    def __init__(
        self, recipe: Recipe, setup: Setup, metrics: tuple[Metric, ...], push: Mapping[str, Any] | None = None
    ) -> None:
        self.recipe, self.setup, self.metrics, self.push = recipe, setup, metrics, push or {}
        self.output = Path(recipe.output).expanduser()
        self.steps = [step for step in recipe.steps if step.name != "measure"]
        self.digests = _digests(recipe, setup)
        self.folders = [self.output / "steps" / "00-model"] + [
            self.output / "steps" / f"{i:02d}-{step.name}" for i, step in enumerate(self.steps, 1)
        ]
        self.known = _json(self.output / "steps" / RUN_FILE)

    def finish(self) -> Report:
        """Run the steps that are not done, measure, and put the folder together."""
        whole = hashlib.sha256(f"{self.digests[-1]} {self.recipe.source.text}".encode()).hexdigest()
        made = [*self.known.get("files", []), REPORT_FILE]
        if self.known.get("done") == whole and all((self.output / name).is_file() for name in made):
            logger.info(f"{self.output} holds what this recipe makes; nothing is done again.")
            return Report.load(self.output)
        (self.output / "steps").mkdir(parents=True, exist_ok=True)
        with _alone(self.output):
            return self._work(whole)

    def _work(self, whole: str) -> Report:
        self._note(rehearsed=self.digests[-1])
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
        first = 0
        for folder, digest in zip(self.folders, self.digests, strict=True):
            if _json(folder / STEP_FILE).get("digest") != digest:
                break
            first += 1
        stale = [f for f in sorted((self.output / "steps").glob("[0-9][0-9]-*")) if f not in self.folders[:first]]
        if stale:
            logger.warning(
                f"The recipe, its data or the versions changed since {', '.join(f.name for f in stale)} ran: "
                f"{'that step runs' if len(stale) == 1 else 'those steps run'} again."
            )
        for folder in stale:
            shutil.rmtree(folder)
        return first

    def _run(self, i: int) -> None:
        scratch = self.output / "steps" / f".{self.folders[i].name}"
        if _json(scratch / RUN_FILE).get("digest") != self.digests[i]:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            (scratch / RUN_FILE).write_text(json.dumps({"digest": self.digests[i]}))
        name = self.folders[i].name
        logger.info(f"{name}: begins")
        try:
            if i == 0:
                model, plan = self.setup.load(), Plan()
            else:
                step = self.steps[i - 1]
                stage = Stage(self.setup, scratch / "training", self._teacher(i, step), self.metrics[0])
                model, plan = STEPS[step.name].run(step, self.setup.load(self.folders[i - 1]), stage)
        except CompressionError as error:
            raise CompressionError(
                f"{name} failed: {error} What was finished before it is in {self.output / 'steps'}; change the recipe and "
                "run it again."
            ) from error
        made = scratch / "made"
        shutil.rmtree(made, ignore_errors=True)
        self._save(model.to("cpu"), made)
        model = self.setup.load(made)  # what is measured is what was saved
        scores = self._scores(model)
        (made / STEP_FILE).write_text(
            json.dumps({"digest": self.digests[i], "name": name, "plan": _edits(plan), "metrics": scores}, indent=1)
        )
        os.replace(made, self.folders[i])
        shutil.rmtree(scratch)
        logger.info(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))

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
                return self.setup.load(self.folders[i - 1])
            if name == "finetuned":
                return self.setup.load(self.folders[self._dense(i)])
            return load_teacher(name, self.setup, self.recipe, key)

        return teacher

    def _dense(self, before: int) -> int:
        """The last fine-tuned model before a step, else the model as it was given."""
        return max((j for j in range(1, before) if self.steps[j - 1].name == "finetune"), default=0)

    def _baseline(self) -> int:
        """What the result is compared with: the model that compression began from."""
        first = next((j for j, step in enumerate(self.steps, 1) if step.name != "finetune"), len(self.steps) + 1)
        return first - 1 if first <= len(self.steps) else 0

    def _scores(self, model: Any) -> dict[str, float]:
        found, wanted = predict(self.setup, model, "measured")
        return {metric.name: metric.compute(found, wanted) for metric in self.metrics}

    # --- the end -----------------------------------------------------------------------------------------------

    def _measured(self) -> Report:
        options = next((step.options for step in self.recipe.steps if step.name == "measure"), {})
        sizes = options.get("batch_sizes") or [1, 32]
        repeats = {name: options[name] for name in ("repeats", "warmup") if name in options}
        length = options.get("length") or min(64, self.setup.options.max_length or 64)
        batch = self.setup.timing_batch(max(sizes), length)
        known = [self._known(i) for i in range(len(self.folders))]
        base = self._baseline()
        dense = self.setup.load(self.folders[base])
        stages = []
        main = self.metrics[0].name
        for i in range(base, len(self.folders) - 1):
            cost = measure(self.setup.load(self.folders[i]), batch, **repeats).model
            stages.append(_stage(known[i], main, cost))
        last = len(self.folders) - 1
        report = measure(
            self.setup.load(self.folders[last]),
            batch,
            against=dense,
            metrics=known[last]["metrics"],
            metrics_against=known[base]["metrics"],
            batch_sizes=tuple(sizes),
            about=self._about(stages),
            **repeats,
        )
        report.about["stages"].append(_stage(known[last], main, report.model))
        return report

    def _known(self, i: int) -> dict[str, Any]:
        """What a step left of itself; its metrics are computed now where the recipe has come to ask for others."""
        path = self.folders[i] / STEP_FILE
        known = _json(path)
        names = [metric.name for metric in self.metrics]
        if list(known["metrics"]) != names:
            known["metrics"] = self._scores(self.setup.load(self.folders[i]))
            draft = self.output / "steps" / "step.part"
            draft.write_text(json.dumps(known, indent=1))
            os.replace(draft, path)
        return known

    def _about(self, stages: list[dict[str, Any]]) -> dict[str, Any]:
        from ..card import base_facts

        data = self.recipe.data
        name = data.path or getattr(data, self.setup.data.measured, None) or data.train
        local = Path(self.setup.model).is_dir()
        facts = base_facts(self.setup.model, revision=self.setup.revision)
        return {
            "name": self.output.name,
            "base_model": f"./{Path(self.setup.model).name}" if local else self.recipe.model,
            "base_revision": None if local else _commit_of(self.setup.model, self.setup.revision),
            "base_card": facts or None,
            "task": self.recipe.task,
            "dataset": {
                "name": f"./{Path(name).name}" if name and locate(name, self.recipe.source).exists() else name,
                "config": data.config,
                "split": self.setup.data.measured,
                "rows": len(self.setup.data.splits["measured"]),
                "metric_name": self.metrics[0].name,
            },
            "metric": self.metrics[0].name,
            "seed": self.recipe.seed,
            "recipe": RECIPE_FILE,
            "stages": stages,
        }

    def plan(self) -> Plan:
        """All that was done, in order, without the tensors that it was done with."""
        plans = [_json(folder / STEP_FILE)["plan"] for folder in self.folders]
        return sum((Plan.from_dict(plan) for plan in plans), Plan())

    def _assemble(self, report: Report) -> None:
        from ..publish import write_card_

        last, plan = self.folders[-1], self.plan()
        old = _files_of(self.known.get("files", []), self.output)
        with staged(self.output, remove=old) as stage:
            shutil.copytree(last, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STEP_FILE))
            files = [str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()]
            (stage / RECIPE_FILE).write_text(self.recipe.source.text, encoding="utf-8")
            (stage / PLAN_FILE).write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
        self._note(files=files)
        write_card_(self.output, plan, report, repo_id=self.push.get("repo"))

    def _note(self, **facts: Any) -> None:
        """Into `steps/run.json`, whole or not at all."""
        self.known = {"format": FORMAT, **self.known, **facts}
        path = self.output / "steps" / RUN_FILE
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(self.known, indent=1))
        os.replace(draft, path)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Refuse a second run in a folder: each would remove what the other is making."""
    with open(output / "steps" / "run.lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except ImportError:  # not on Windows
            pass
        except OSError:
            raise CompressionError(f"Another run is at work in {output}; wait for it, or name another output.") from None
        yield


def _commit_of(model: str, revision: str | None) -> str | None:
    """The commit of the Hub that a model's files are from."""
    try:
        return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
    except OSError:
        return revision


def _stage(known: Mapping[str, Any], metric: str, cost: Any) -> dict[str, Any]:
    return {
        "name": known["name"][3:],
        "metric": known["metrics"][metric],
        "latency": cost.latency.median,
        "parameters": cost.parameters,
        "bytes": cost.bytes,
    }


def _edits(plan: Plan) -> dict[str, Any]:
    """A plan without its tensors: they are in the model."""
    return {name: value for name, value in plan.to_dict().items() if name != "tensors"}


def _files_of(names: list[str], folder: Path) -> list[str]:
    """Files that an earlier run left, none outside the folder."""
    return [
        name for name in names if (folder / name).is_file() and not Path(name).is_absolute() and ".." not in Path(name).parts
    ]


def _digests(recipe: Recipe, setup: Setup) -> list[str]:
    """Of what decides each step's outcome, from the model as given to the last step."""
    from .. import __version__

    data = recipe.as_data()
    begin = {
        "format": FORMAT,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "model": digest_of([setup.model]) if Path(setup.model).is_dir() else [data["model"], data["revision"]],
        "data": [data["data"], setup.data.digest],
        "task": data["task"],
        "seed": data["seed"],
    }
    found = []
    steps: list[Any] = []
    for step in [None, *(step for step in recipe.steps if step.name != "measure")]:
        if step is not None:
            tuned = {"mean_depth", "max_drop"} & step.options.keys()
            teacher = locate(step.teacher, recipe.source) if step.teacher not in (None, "finetuned", "previous") else None
            steps.append([step.name, step.options, data["metric"][:1] if tuned else None])
            if teacher is not None and teacher.is_dir():
                steps.append(digest_of([teacher]))
        found.append(hashlib.sha256(json.dumps([begin, steps], sort_keys=True, default=str).encode()).hexdigest())
    return found


def _check_output(recipe: Recipe) -> None:
    """Refuse a folder that is somebody else's."""
    path, source = Path(recipe.output).expanduser(), recipe.source
    for place in [path, *path.parents]:
        if place.exists() and not place.is_dir():
            raise source.error(("output",), f"{str(place)!r} is a file; output is a folder.")
        if place.exists():
            if not os.access(place, os.W_OK):
                raise source.error(("output",), f"{str(place)!r} cannot be written.")
            break
    if path.is_dir() and any(path.iterdir()) and not (path / "steps" / RUN_FILE).is_file():
        raise source.error(
            ("output",),
            f"the folder {recipe.output!r} holds something else than a run of a recipe; name another, or empty it.",
        )


def _check_token(recipe: Recipe, push: Mapping[str, Any] | None) -> None:
    """Refuse before hours of work what could not be published after them."""
    import huggingface_hub

    if push is not None and not huggingface_hub.get_token():
        raise recipe.source.error(
            ("push",), "there is no token for the Hub: `hf auth login` first, or set HF_TOKEN, or leave push out."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
