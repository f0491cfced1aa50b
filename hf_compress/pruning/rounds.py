"""`find_ticket`: train, prune, rewind, train again; one ordinary training a round."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, set_seed

from ..edits import CompressionError, shown
from ..files import replace_files
from ..host import first_rows, refuse_sharded
from ..plan import Plan
from ..probe import NoInputs
from ..refusals import check_adapters
from ..sparsity import check_sparsity
from .held import magnitude_masks, unwrapped
from .lottery import CONTROLS, LotteryTicketCallback
from .select import SCOPES, check_seed
from .start import KeepStart
from .structured import masks_of, remove_units
from .ticket import Ticket, check_initialised, levels_of, prunable, read_state, set_state_, state_of, write_state

ROWS_FILE, START, TRAINED = "lottery.json", "start", "trained"
DENSE, TICKET = "dense", "ticket"


@dataclass(frozen=True, eq=False)
class FoundTicket:
    """What `find_ticket` found.

    Args:
        ticket (`Ticket`): of the last round, with the weights it starts from.
        rows (`list[dict]`): one a training: `round`, `arm` (`"dense"`, `"ticket"`, `"reinit"` or `"random_mask"`), `asked`
            (what the round was to remove), `weights_removed`, `steps`, `metrics`.
        trainer (`Trainer`): of the last round's ticket, with the trained model.
    """

    ticket: Ticket
    rows: list[dict[str, Any]]
    trainer: Trainer = field(repr=False)

    @property
    def model(self) -> Any:
        """The model of the last round, trained, with exact zeros where weights were removed."""
        return self.trainer.model


@dataclass
class Search:
    """What was asked, checked, and where it stands. `options` are what a run that goes on must have too."""

    make_trainer: Callable[[], Trainer]
    options: dict[str, Any]
    inputs: Mapping[str, Any] | None
    on_row: Callable[[dict[str, Any]], None] | None
    output: Path = Path()
    rows: list[dict[str, Any]] = field(default_factory=list)
    made: list[Trainer] = field(default_factory=list)

    def done(self, turn: int, arm: str) -> bool:
        return any(row["round"] == turn and row["arm"] == arm for row in self.rows)

    def trainer(self) -> Trainer:
        trainer = self.make_trainer()
        if not isinstance(trainer, Trainer):
            raise CompressionError(f"make_trainer must return a Trainer, got {type(trainer).__name__}.")
        if any(trainer is other for other in self.made):
            raise CompressionError(
                "make_trainer returned the same Trainer twice, whose optimizer, schedule and callbacks are used up; make a new "
                "one in it: lambda: Trainer(make_model(), args, ...)."
            )
        self.made[:] = [trainer]
        return trainer

    def folder(self, turn: int) -> Path:
        return self.output / f"round-{turn}"


def find_ticket(
    make_trainer: Callable[[], Trainer],
    sparsity: float | Sequence[float] | None = None,
    *,
    heads: float = 0.0,
    neurons: float = 0.0,
    rounds: int = 5,
    rewind_to: int | float = 0,
    scope: str = "global",
    modules: str | None = None,
    controls: Sequence[str] = (),
    seed: int = 0,
    output: str | os.PathLike | None = None,
    inputs: Mapping[str, Any] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> FoundTicket:
    r"""Find a lottery ticket by iterative magnitude pruning with rewinding.

    Frankle & Carbin 2019, *The lottery ticket hypothesis* (arXiv:1803.03635); rewinding to step k: Frankle et al. 2020
    (arXiv:1912.05671):

    1. Train the dense model from its start `w_0` to the end `w_T`, and keep `w_k` on the way (`k = rewind_to`).
    2. Remove the weights of least \|w_T\| among those that are left: `1 - (1 - sparsity)^(r / rounds)` are gone after
       round `r`.
    3. Set what is left to `w_k` again, train from step `k` to `T` with the mask held, and go to 2.

    Each round is one whole `train()` of a Trainer that `make_trainer` makes anew, and not a share of one long `train()`. So
    what a Trainer means by a training holds in every round: the moments of the optimizer, the schedule with its warmup, the
    order of the data and dropout (by `args.seed`), early stopping and the best model begin again, and no word of
    `TrainingArguments` needs a second meaning. With `k > 0` a round resumes from the dense training's checkpoint at `k`, with
    moments anew: the learning rate and the data go on from where they stood there.

    What is finished is kept in `output` and not done again: an interrupted call goes on, also in the middle of a round if the
    Trainer saves checkpoints. `round` and `weights_removed` are logged where the Trainer logs, and the evaluation after
    every round, if there is an `eval_dataset`.

    Args:
        make_trainer (`Callable`): makes a Trainer of any class, with its model; called once a training. The first
            model's weights are the start of all of them. The Trainer's `output_dir` becomes a folder in `output`, and
            nothing is pushed.
        sparsity (`float` or a sequence of them): the fraction of single weights to remove, in (0, 1); a sequence gives that of
            every round, growing, instead of `rounds`.
        heads (`float`), neurons (`float`): instead of `sparsity`, the fraction of heads and of FFN neurons to remove, by the
            L2 norm of all their weights. `apply_(found.model, found.ticket.plan)` then makes the model small.
        rounds (`int`, defaults to 5): how often to prune.
        rewind_to (`int` or `float`, defaults to 0): the optimizer step to rewind to, or a share of a training, in (0, 1).
        scope (`str`, defaults to `"global"`): compare all weights, or those of each layer (`"layer"`).
        modules (`str`, *optional*): a regular expression on module names: whose weights are pruned. By default the Linear,
            Conv1D and convolution modules inside the layers; what reads the input and the output head stay dense.
        controls (`Sequence[str]`): `"reinit"` (the ticket's mask, new random weights, from step 0) and `"random_mask"` (the
            ticket's start, as many weights in every tensor at random), trained in every round as well.
        seed (`int`, defaults to 0): of the controls.
        output (`str` or `os.PathLike`, *optional*): where rounds are kept; the `output_dir` of the Trainer by default. The last
            ticket is saved there: `Ticket.load(output)`.
        inputs (`dict`, *optional*): for heads and neurons, a small batch for the proof of the cut; see `apply_`.
        on_row (`Callable`, *optional*): called with each row when its training is done, in the main process.

    Returns:
        a `FoundTicket`: `.ticket`, `.rows`, `.model`, `.trainer`.

    Raises:
        CompressionError: options that mean nothing; a folder with the rounds of other options; a model that cannot be masked
            (sharded weights, adapters, integers).

    Example:

    ```python
    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
    >>> from hf_compress import find_ticket
    >>> rows = [{"input_ids": torch.tensor([5, 6, i]), "labels": i % 2} for i in range(8)]
    >>> arguments = TrainingArguments(
    ...     tempfile.mkdtemp(), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
    ...     disable_tqdm=True,
    ... )
    >>> def make_trainer():
    ...     config = BertConfig(
    ...         vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ...     )
    ...     return Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows)
    >>> found = find_ticket(make_trainer, sparsity=0.75, rounds=2)  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    >>> found.ticket, [(row["arm"], row["weights_removed"]) for row in found.rows]
    (Ticket(2,048 of 8,192 weights in 6 tensors, from step 0), [('dense', 0.0), ('ticket', 0.5), ('ticket', 0.75)])

    ```
    """
    options = _checked(sparsity, heads, neurons, rounds, rewind_to, scope, modules, controls, seed)
    if not callable(make_trainer) or isinstance(make_trainer, nn.Module):  # a model is a function too
        raise CompressionError(
            f"make_trainer is a function that makes a Trainer, called once a training, got {type(make_trainer).__name__}: "
            "lambda: Trainer(make_model(), args, ...)."
        )
    search = Search(make_trainer, options, inputs, on_row)
    first = search.trainer()
    search.output = Path(first.args.output_dir or "." if output is None else output)
    search.rows = _rows_before(search)
    if not search.rows:
        _rehearse(search, first, controls)
    last, ticket, trainer = options["rounds"], None, None
    for turn in range(last + 1):
        if turn:
            ticket = _ticket(search, turn)
        for arm in (TICKET, *controls) if turn else (DENSE,):
            if search.done(turn, arm):
                continue
            trained = _train(search, turn, arm, ticket, first)
            first = None
            if arm == TICKET and turn == last:
                trainer = trained
    ticket = _ticket(search, last)
    if trainer is None:  # all was done before
        trainer = first or search.trainer()
        set_state_(trainer.model, read_state(search.output / TRAINED)[0])  # type: ignore[arg-type]
    return FoundTicket(ticket, search.rows, trainer)


def _rehearse(search: Search, trainer: Trainer, controls: Sequence[str]) -> None:
    """Refuse now what would fail after the dense training."""
    model: Any = unwrapped(trainer.model)
    refuse_sharded(trainer, model, "find_ticket")
    check_adapters(model)
    if "reinit" in controls:
        check_initialised(model)
    _next(search, trainer, 1, None)


# --- one training ----------------------------------------------------------------------------------------------------


def _train(search: Search, turn: int, arm: str, ticket: Ticket | None, made: Trainer | None) -> Trainer:
    trainer = made or search.trainer()
    folder = search.folder(turn) / arm
    trainer.args = copy.copy(trainer.args)  # the caller may make every Trainer with the same arguments
    trainer.args.output_dir, trainer.args.push_to_hub = str(folder), False
    start: str | None = None
    if ticket is None:
        trainer.add_callback(KeepStart(search.options["rewind_to"], search.output / START))
    else:
        control = arm if arm in CONTROLS else None
        trainer.add_callback(LotteryTicketCallback(ticket, control, seed=search.options["seed"] * 10_000 + turn))
        if ticket.step and arm != "reinit":  # new weights are of no step: they get the whole training
            start = str(search.output / START / "checkpoint")
    set_seed(trainer.args.seed)
    trained = trainer.train(resume_from_checkpoint=_last_checkpoint(folder) or start)
    metrics = {"train_loss": trained.training_loss, **(trainer.evaluate() if trainer.eval_dataset is not None else {})}
    if ticket is None or arm == TICKET:
        _keep(search, trainer, turn, ticket)
    row = {
        "round": turn,
        "arm": arm,
        "asked": _asked(search.options, turn),
        "weights_removed": 0.0 if ticket is None else ticket.sparsity,
        "steps": trainer.state.global_step - (ticket.step if ticket is not None and start else 0),
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, int | float) and not k.endswith(("_runtime", "_second"))},
    }
    search.rows.append(row)
    if trainer.args.should_save:
        text = json.dumps({"options": search.options, "rows": search.rows}, indent=1) + "\n"
        replace_files(search.output, {ROWS_FILE: text.encode()})
    trainer.accelerator.wait_for_everyone()
    if search.on_row is not None and trainer.is_world_process_zero():
        search.on_row(row)
    return trainer


def _keep(search: Search, trainer: Trainer, turn: int, ticket: Ticket | None) -> None:
    """Before the round counts as done: the mask of the next one, or what was trained."""
    options = search.options
    if turn == options["rounds"]:
        if trainer.args.should_save:
            write_state(search.output / TRAINED, state_of(trainer.model))  # type: ignore[arg-type]
        return
    trainer.accelerator.wait_for_everyone()  # the first process has written the start
    weights, step = read_state(search.output / START)
    found = _next(search, trainer, turn + 1, ticket)
    following = Ticket(found[0], weights, found[1], step, turn + 1)
    if trainer.args.should_save:
        Ticket(following.masks, None, following.plan, step, turn + 1).save(search.folder(turn + 1))
        if turn + 1 == options["rounds"]:
            following.save(search.output)


def _next(search: Search, trainer: Trainer, turn: int, before: Ticket | None) -> tuple[dict[str, Any], Plan]:
    """What stays in a round, by the weights that the round before has trained."""
    options, model = search.options, unwrapped(trainer.model)
    asked = _asked(options, turn)
    if options["sparsity"] is None:
        gone = before.plan if before else Plan()
        try:
            plan = remove_units(model, asked["heads"], asked["neurons"], gone, options["scope"], search.inputs)
        except NoInputs:
            search.inputs = first_rows(trainer) if search.inputs is None else None
            if search.inputs is None:
                raise
            plan = remove_units(model, asked["heads"], asked["neurons"], gone, options["scope"], search.inputs)
        if not plan.edits:
            raise CompressionError(f"Round {turn} is to remove {asked}, which is no whole unit of this model; ask for more.")
        return masks_of(model, plan), plan
    names = prunable(model, options["modules"])
    masks = magnitude_masks(model, names, asked, options["scope"], alive=before.masks if before else None)
    return {name: mask.cpu() for name, mask in masks.items()}, Plan()


def _ticket(search: Search, turn: int) -> Ticket:
    found = Ticket.load(search.folder(turn))
    weights, step = read_state(search.output / START)
    return Ticket(found.masks, weights, found.plan, step, turn)


def _asked(options: Mapping[str, Any], turn: int) -> Any:
    """What is to be gone after a round."""
    if options["sparsity"] is not None:
        return 0.0 if turn == 0 else options["sparsity"][turn - 1]
    return {what: 0.0 if turn == 0 else levels_of(options[what], options["rounds"])[turn - 1] for what in ("heads", "neurons")}


# --- options and what was done before ----------------------------------------------------------------------------------


def _rows_before(search: Search) -> list[dict[str, Any]]:
    path = search.output / ROWS_FILE
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        options, rows = found["options"], found["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressionError(f"{path} is damaged ({error!r}); remove {search.output} and begin again.") from error
    differ = sorted(name for name, value in search.options.items() if options.get(name) != value)
    if differ:
        raise CompressionError(
            f"{search.output} holds rounds with {differ[0]}={options.get(differ[0])!r}, and {search.options[differ[0]]!r} is "
            "asked for now. Name another output folder, or remove that one."
        )
    return rows


def _last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a training that was interrupted; its state is written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _checked(
    sparsity: Any, heads: Any, neurons: Any, rounds: Any, rewind_to: Any, scope: Any, modules: Any, controls: Any, seed: Any
):
    if type(rounds) is not int or rounds < 1:
        raise CompressionError(f"rounds is a whole number from 1, got {shown(rounds)}.")
    structured = {"heads": heads, "neurons": neurons}
    for name, value in structured.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise CompressionError(f"{name} is the fraction to remove and must lie in [0, 1), got {shown(value)}.")
    if (sparsity is None) == (not heads and not neurons):
        raise CompressionError("Give sparsity= (single weights), or heads= and neurons= (whole units), one of the two.")
    if sparsity is not None:
        levels: list[Any] = list(sparsity) if isinstance(sparsity, Sequence) and not isinstance(sparsity, str) else [sparsity]
        for level in levels:
            check_sparsity(level, None)
        if not levels or not levels[0] > 0 or any(a >= b for a, b in zip(levels, levels[1:], strict=False)):
            raise CompressionError(f"sparsity is a fraction above 0, or several that grow, got {shown(sparsity)}.")
        sparsity = levels if isinstance(sparsity, Sequence) else levels_of(sparsity, rounds)
        rounds = len(sparsity)
    if isinstance(rewind_to, bool) or not isinstance(rewind_to, int | float) or rewind_to < 0:
        raise CompressionError(f"rewind_to is a step from 0, or a share of a training in (0, 1), got {shown(rewind_to)}.")
    if isinstance(rewind_to, float) and rewind_to >= 1:
        raise CompressionError(f"rewind_to is a whole step, or a share of a training in (0, 1), got {rewind_to!r}.")
    if scope not in SCOPES:
        raise CompressionError(f"scope must be 'global' (compare all layers) or 'layer' (each alone), got {shown(scope)}.")
    if modules is not None and (not isinstance(modules, str) or sparsity is None):
        raise CompressionError(f"modules is a regular expression on module names and goes with sparsity, got {shown(modules)}.")
    if not isinstance(controls, Sequence) or isinstance(controls, str) or any(c not in CONTROLS for c in controls):
        raise CompressionError(f"controls are some of {', '.join(map(repr, CONTROLS))}, as a list; got {shown(controls)}.")
    check_seed(seed)
    options = {"sparsity": sparsity, **structured, "rounds": rounds, "rewind_to": rewind_to, "scope": scope, "modules": modules}
    return {**options, "seed": seed}
