"""Early exits: heads on inner layers, rows that are sure leave, joint training, thresholds from validation data."""

# The loader attaches exits, so nothing here may import it: `EarlyExitCallback` is in exits.callback, `tune_exits_` in
# exits.tune, and both in `hf_compress`.
from .criteria import CRITERIA
from .options import check_options, resolve_exits
from .runtime import (
    attach_exits_,
    collect_exits,
    detach_exits_,
    exit_layers,
    exit_options,
    exits_off,
    set_exits_,
    take_exit_losses,
)

__all__ = [
    "CRITERIA",
    "attach_exits_",
    "check_options",
    "collect_exits",
    "detach_exits_",
    "exit_layers",
    "exit_options",
    "exits_off",
    "resolve_exits",
    "set_exits_",
    "take_exit_losses",
]
