"""`LotteryTicketCallback`: train a sub-network, and nothing but it, in anybody's Trainer."""

from __future__ import annotations

import os
from typing import Any

from transformers import Trainer, TrainerCallback

from ..edits import CompressionError, shown
from ..host import (
    calling_trainer,
    guard,
    log_beside,
    refuse_drifting,
    refuse_sharded,
    restore_best,
    restore_what_stock_lost,
    resumed_from,
    unguard,
)
from ..refusals import check_adapters
from .callback import PruningCallback
from .held import Held, hold_
from .held import _checked as check_masks
from .select import check_seed
from .sparsity_callback import SparsityCallback
from .ticket import Ticket, check_state, fresh_weights, random_ticket, set_state_

CONTROLS = ("reinit", "random_mask")
STATE = "lottery_ticket"  # in trainer_state.json; no class of a callback is called so, or Trainer would build it from this


class LotteryTicketCallback(TrainerCallback):
    """Train a lottery ticket (Frankle & Carbin 2019, arXiv:1803.03635), or one of its controls, in anybody's Trainer.

    When training begins the model gets the ticket's starting weights, and `w = m * w` holds from then on: after every step of
    the optimizer what the mask `m` removes is exactly 0.0, its moments too. Everything else is the Trainer's own. Checkpoints,
    also of an interrupted training, are ordinary ones with zeros in them; resuming from one goes on with its weights.

    Find tickets with `find_ticket`. A ticket from there or from `Ticket.load` trains on other data, with other arguments, in
    another Trainer: where that is as good as dense, the ticket transfers (Morcos et al. 2019, arXiv:1906.02773).

    Args:
        ticket (`Ticket`, `str` or `os.PathLike`): which weights stay and where they start, or the folder of a saved one.
            A mask alone starts from what the model has.
        control (`str`, *optional*): `"reinit"`: the same mask, new weights from the model's own random initialisation.
            `"random_mask"`: the same start, as many weights in every tensor chosen at random.
        seed (`int`, defaults to 0): of the control.

    Raises:
        CompressionError: at construction, something that is no ticket, or an unknown control; when training begins, a ticket
            of another model, sharded weights (FSDP, DeepSpeed), adapters (PEFT), a second callback that masks weights, or a
            checkpoint that was trained with another mask.

    Example:

    ```python
    >>> import torch
    >>> from hf_compress import LotteryTicketCallback, Ticket
    >>> ticket = Ticket({"classifier.weight": torch.eye(2, dtype=torch.bool)})
    >>> LotteryTicketCallback(ticket, control="random_mask")
    LotteryTicketCallback(Ticket(2 of 4 weights in 1 tensor, mask alone), control='random_mask')

    ```
    """

    def __init__(self, ticket: Ticket | str | os.PathLike, control: str | None = None, *, seed: int = 0) -> None:
        if isinstance(ticket, str | os.PathLike):
            ticket = Ticket.load(ticket)
        if not isinstance(ticket, Ticket):
            raise CompressionError(f"ticket is a Ticket or the folder of one, got {shown(ticket)}; find_ticket makes them.")
        if control is not None and control not in CONTROLS:
            raise CompressionError(f"control is {' or '.join(map(repr, CONTROLS))}, or None; got {shown(control)}.")
        check_seed(seed)
        self.given, self.control, self.seed = ticket, control, seed
        self.ticket = ticket  # of a control with a random mask, that one, once training begins
        self._held: Held | None = None

    def __repr__(self) -> str:
        control = f", control={self.control!r}" if self.control else ""
        return f"LotteryTicketCallback({self.given!r}{control})"

    # --- events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if model is None:
            raise CompressionError("LotteryTicketCallback was given no model: add it to a Trainer.")
        trainer = calling_trainer()
        refuse_sharded(trainer, model, type(self).__name__)
        check_adapters(model)
        refuse_drifting(trainer, type(self).__name__)
        self._refuse_others(trainer)
        resumed = trainer is not None and resumed_from(trainer) is not None
        if trainer is not None:
            restore_what_stock_lost(trainer, model)
        self.ticket = random_ticket(self.given, model, self.seed) if self.control == "random_mask" else self.given
        begun = (state.stateful_callbacks or {}).get(STATE) if resumed else None
        if begun is not None and begun.get("masks") != self.ticket.digest:
            raise CompressionError(
                "The checkpoint was trained with another mask than this ticket's; resume with the ticket and the control that "
                "the run began with."
            )
        weights = None
        if begun is None:
            weights = fresh_weights(model, self.seed) if self.control == "reinit" else self.ticket.weights
            if weights is not None:
                check_state(model, weights)
        check_masks(model, self.ticket.masks)

        def enter() -> None:
            if self._held is not None:
                return
            if weights is not None:
                set_state_(model, weights)
            self._held = hold_(model, self.ticket.masks)
            if begun is None:
                _forget(optimizer)
                # whatever was best so far never felt the mask
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            state.stateful_callbacks[STATE] = {"masks": self.ticket.digest}
            found = {"weights_removed": round(self.ticket.sparsity, 6)}
            log_beside(trainer, {"round": self.ticket.round, **found} if self.ticket.round else found)

        if trainer is None:
            enter()
        else:
            guard(trainer, enter, self._abandon)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._held is not None:
            self._held.zero_()
            if optimizer is not None:
                self._held.still_(optimizer)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._held is None:
            return
        restore_best(args, state, model)
        self._held.zero_()
        self._abandon()

    def _refuse_others(self, trainer: Trainer | None) -> None:
        from ..quantization.callback import QuantizationCallback  # which looks for callbacks of this package too

        kinds = LotteryTicketCallback | PruningCallback | SparsityCallback | QuantizationCallback
        for other in [] if trainer is None else trainer.callback_handler.callbacks:
            if other is not self and isinstance(other, kinds):
                raise CompressionError(
                    f"A LotteryTicketCallback cannot share a training with a {type(other).__name__}: both change the same "
                    "weights. Train the ticket first, then compress what it became."
                )

    def _abandon(self) -> None:
        """Hold no longer; the zeros stay."""
        held, self._held = self._held, None
        if held is not None:
            held.release()
            trainer = calling_trainer()
            if trainer is not None:
                unguard(trainer)


def _forget(optimizer: Any) -> None:
    """The moments start anew, as in a training of its own."""
    while optimizer is not None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if optimizer is not None:
        optimizer.state.clear()
