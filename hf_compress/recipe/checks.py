"""What is refused before a run begins, beside the mistakes that reading and opening a recipe find: hours would go into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from ..edits import CompressionError
from .digests import OWN_TEACHERS
from .folder import LOCK_FILE, RUN_FILE
from .rows import locate
from .schema import Recipe, guess, one_line
from .tasks import Setup


def check_output(recipe: Recipe) -> None:
    """Refuse a folder that is somebody else's, or that lies where the recipe reads from.

    Raises:
        RecipeError: with the line of `output`.
    """
    source = recipe.source
    try:
        path = Path(recipe.output).expanduser()
        for place in [path, *path.parents]:
            if place.exists() and not place.is_dir():
                raise source.error(("output",), f"{str(place)!r} is a file; output is a folder.")
            if place.exists():
                if not os.access(place, os.W_OK):
                    raise source.error(("output",), f"{str(place)!r} cannot be written.")
                break
        others = path.is_dir() and not _is_of_a_run(path)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a home that nobody knows
        if isinstance(error, CompressionError):
            raise
        raise source.error(("output",), _no_folder(recipe.output, error)) from None
    if others:
        raise source.error(
            ("output",),
            f"the folder {recipe.output!r} holds something else than a run of a recipe; name another, or empty it.",
        )
    here = path.resolve()
    for what, place in _read_from(recipe):
        there = place.resolve()
        if here == there or there in here.parents or here in there.parents:
            how = "is" if here == there else "lies inside" if there in here.parents else "holds"
            raise source.error(
                ("output",),
                f"output {recipe.output!r} {how} the folder of the {what} ({str(place)!r}), so every run would change what "
                "it is made from; name a folder outside of it.",
            )


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder is empty, or a run has worked in it; one that was killed at its very beginning too."""
    steps = folder / "steps"
    begun = steps.is_dir() and {path.name for path in steps.iterdir()} <= {LOCK_FILE, Path(RUN_FILE).stem + ".part"}
    return (steps / RUN_FILE).is_file() or not [path for path in folder.iterdir() if path != steps or not begun]


def _read_from(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The folders that a recipe reads, by what is in them."""
    named = [("model", recipe.model), ("data", recipe.data.path)]
    named += [("teacher", step.teacher) for step in recipe.steps if step.trains and step.teacher not in OWN_TEACHERS]
    for what, name in named:
        path = None if name is None else locate(name, recipe.source)
        if path is not None and path.is_dir():
            yield what, path


def try_output(recipe: Recipe) -> None:
    """Refuse a place where no folder can be made, by making it; what was made is gone again when this returns.

    Raises:
        RecipeError: with the line of `output`.
    """
    path = Path(recipe.output).expanduser()
    new = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".hf_compress_", dir=path))
    except (OSError, ValueError) as error:
        raise recipe.source.error(("output",), _no_folder(recipe.output, error)) from None
    finally:
        for place in new:
            with suppress(OSError, ValueError):
                place.rmdir()


def _no_folder(output: str, error: BaseException) -> str:
    return f"no folder can be made at {output!r} ({getattr(error, 'strerror', None) or error}); name another output."


def check_push_options(recipe: Recipe, push: Mapping[str, Any] | None) -> None:
    """Refuse before hours of work what could not be published after them."""
    from ..publishable import check_arguments

    if push is None:
        return
    private, revision, create_pr, message = (push.get(name) for name in ("private", "revision", "create_pr", "commit_message"))
    try:
        check_arguments(push["repo"], private, revision, bool(create_pr), None, message)
    except CompressionError as error:
        raise recipe.source.error(guess(("push",), push, str(error)), one_line(error)) from None


def check_owner(recipe: Recipe, mine: Mapping[str, str], known: Mapping[str, Any]) -> None:
    """Refuse the folder of a recipe for another model or task: what that one made would go.

    Args:
        recipe (`Recipe`): with its output.
        mine (`dict`): what it notes of itself.
        known (`dict`): what the run that is there noted of itself, if there is one.

    Raises:
        RecipeError: with the line of `output`.
    """
    other = [f"{name} {known[name]}" for name in mine if known.get(name, mine[name]) != mine[name]]
    if other:
        raise recipe.source.error(
            ("output",),
            f"the folder {recipe.output!r} holds a run of another recipe ({', '.join(other)}); name another, or remove it.",
        )


def check_token(recipe: Recipe, push: Mapping[str, Any] | None) -> None:
    import huggingface_hub

    if push is not None and not huggingface_hub.get_token():
        raise recipe.source.error(
            ("push",), "there is no token for the Hub: `hf auth login` first, or set HF_TOKEN, or leave push out."
        )
    if push is None:
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise recipe.source.error(
            ("push",), "offline mode is on, so nothing can be pushed: unset HF_HUB_OFFLINE, or leave push out."
        )
    try:
        me = huggingface_hub.HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise recipe.source.error(
                ("push",), "the Hub does not know this token: `hf auth login` again, set another HF_TOKEN, or leave push out."
            ) from error
        return
    except Exception:  # the way to the Hub may be open again when the training is done
        return
    owner = push["repo"].rpartition("/")[0]
    mine = [me.get("name"), *(org.get("name") for org in me.get("orgs") or [])]
    if owner and owner not in mine and not push.get("create_pr"):
        raise recipe.source.error(
            ("push",),
            f"{push['repo']!r} belongs to {owner}, and this token to {mine[0]}: name one of yours, or set create_pr: true.",
        )


def check_trainings(recipe: Recipe, setup: Setup) -> None:
    """Refuse trainings that cannot teach this model what is asked.

    A new head has nothing to learn from the model that it sits on. Labels are smoothed where the loss is one of classes; stock
    fails at the first step with others, or leaves them as they are.

    Raises:
        RecipeError: with the line of `teacher` or `label_smoothing_factor`.
    """
    first = recipe.steps[0]
    if setup.fresh and first.trains and first.teacher in OWN_TEACHERS:
        raise recipe.source.error(
            ("steps", 0, first.name, "teacher"),
            f"step 1, {first.name}: its teacher is the model itself, whose head is new and knows nothing; put finetune before "
            "it, or name a trained teacher (a folder or Hub id).",
        )
    for i, step in enumerate(recipe.steps):
        fits = setup.kind in ("classes", "tags", "loss") and step.name != "exits"
        if step.options.get("label_smoothing_factor") and not fits:
            what = "the joint loss of exits" if step.name == "exits" else f"{recipe.task} that predicts {setup.kind}"
            raise recipe.source.error(
                ("steps", i, step.name, "label_smoothing_factor"), f"label_smoothing_factor does not fit {what}; leave it out."
            )
