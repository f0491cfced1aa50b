"""Where tickets start: the weights of one step of the dense training, kept while it runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..edits import CompressionError
from ..host import calling_trainer, restore_best, restore_what_stock_lost
from .ticket import START_FILE, state_of, write_state


class KeepStart(TrainerCallback):
    """In the dense training: keep the weights of the step to rewind to, and a checkpoint to begin at it again.

    Step 0 needs the weights alone. Step k needs where the learning rate and the order of the data stand, which is what a
    checkpoint of the Trainer holds; so one is saved at k, and copied before it is rotated away.
    """

    def __init__(self, rewind_to: int | float, folder: Path) -> None:
        self.rewind_to, self.folder, self.step = rewind_to, folder, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trainer = calling_trainer()
        if trainer is not None:
            restore_what_stock_lost(trainer, model)
        share = isinstance(self.rewind_to, float)
        self.step = round(self.rewind_to * state.max_steps) if share else int(self.rewind_to)
        if self.step >= state.max_steps:
            raise CompressionError(f"rewind_to={self.rewind_to!r} lies behind the {state.max_steps} steps of this training.")
        if self.step and (args.save_only_model or args.save_strategy == "best"):
            raise CompressionError(
                "Rewinding to a step above 0 needs a whole checkpoint there: save_only_model=False, and a save_strategy "
                "other than 'best'."
            )
        if state.global_step == 0:
            if self.step == 0:
                self._keep(args, model)
        elif state.global_step >= self.step:
            if self.step and not self._checkpoint.exists():
                self._copy(args)
            if not (self.folder / START_FILE).exists():
                raise CompressionError(
                    f"The dense training goes on after step {self.step}, whose weights are gone from {self.folder}. Remove "
                    f"{self.folder.parent} and begin again."
                )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.step and state.global_step == self.step:
            self._keep(args, model)
            control.should_save = True

    def on_train_end(self, args, state, control, model=None, **kwargs):
        restore_best(args, state, model)

    def on_save(self, args, state, control, **kwargs):
        if self.step and state.global_step == self.step:
            self._copy(args)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def _keep(self, args: Any, model: Any) -> None:
        if args.should_save:
            write_state(self.folder, state_of(model), self.step)

    def _copy(self, args: Any) -> None:
        made = Path(args.output_dir) / f"checkpoint-{self.step}"
        if args.should_save and made.exists():
            part = self.folder / "part"
            for old in (part, self._checkpoint):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(made, part)
            part.rename(self._checkpoint)
