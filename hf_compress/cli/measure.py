"""`hf-compress measure`: parameters, bytes, work and time of a model, beside another that is timed in turn with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import DTYPES, Wrong, add_common, filled, one_of, whole
from .models import class_of, config_of, find, load

DESCRIPTION = "Parameters, bytes, work and time of a model, beside another that is timed in turn with it."
EXAMPLES = """\
examples:
  hf-compress measure runs/minilm-sst2-small                                   alone
  hf-compress measure runs/minilm-sst2-small --against runs/minilm-sst2        and the speed-up, with its interval
  hf-compress measure OUT --against BASE --batch-sizes 1 8 32 --length 128 --threads 2
  hf-compress measure OUT --against BASE --json -o report.json                 the report, as data and as a file

The inputs are random, of the right kind; no task metric is computed (`hf-compress run` does that, on data).
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "measure", help="size and speed, beside another model", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", metavar="OUT", help="the model: a folder, or a Hub id")
    parser.add_argument("--against", metavar="BASE", help="the model to compare with: a folder, or a Hub id")
    parser.add_argument("--batch-sizes", metavar="ROWS", type=whole(1), nargs="+", default=[1, 32], help="default: 1 32")
    parser.add_argument("--length", metavar="TOKENS", type=whole(1), help="tokens of every text; default: 64")
    parser.add_argument("--repeats", metavar="N", type=whole(1), default=20, help="timed passes; default: 20")
    parser.add_argument("--warmup", metavar="N", type=whole(0), default=3, help="passes before them; default: 3")
    parser.add_argument("--threads", metavar="N", type=whole(1), help="of the CPU; default: what torch takes")
    parser.add_argument("--dtype", type=one_of(DTYPES), help=f"{', '.join(DTYPES)}; default: as OUT was saved")
    parser.add_argument("-o", "--output", metavar="FILE", type=filled, help="also save it, as report.json in a folder or .json")
    add_common(parser)
    parser.set_defaults(run=run, path=("measure",))


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `measure`."""
    import torch

    from ..measure import measure

    name = find(args.model, "OUT")
    base = None if args.against is None else find(args.against, "argument --against")
    _check_output(args.output)
    config = config_of(name, "OUT")
    base_config = None if base is None else config_of(base, "argument --against")
    kind = class_of(config)
    base_kind = None if base is None else _beside(kind, config, base_config, base)
    _check_length(args.length, config, base_config)
    dtype = "auto" if args.dtype is None else getattr(torch, args.dtype)
    model = load(name, "OUT", kind, dtype)
    dtype = model.dtype if args.dtype is None and model.dtype.is_floating_point else dtype
    against = None if base is None else load(base, "argument --against", base_kind, dtype)
    inputs = _inputs(model, max(args.batch_sizes), args.length)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        report = measure(
            model,
            inputs,
            against=against,
            repeats=args.repeats,
            warmup=args.warmup,
            batch_sizes=list(dict.fromkeys(args.batch_sizes)),
            about=None if base is None else {"base_model": base},
        )
    finally:
        torch.set_num_threads(threads)
    if args.output is not None:
        report.save(Path(args.output).expanduser())
    return str(report), report.to_dict()


def _beside(kind: Any, config: Any, base_config: Any, given: str) -> Any:
    """The class to load the baseline with: its own where both are for one task, else the model's, with a new head.

    Raises:
        Wrong: the baseline is for another task, so no time of one says anything about the other.
    """
    base = class_of(base_config)
    task, other = _task(kind), _task(base)
    place = "argument --against"
    if task is not None and other is not None and task != other:
        raise Wrong(f"{place}: {given!r} is a {base.__name__} ({other}), and OUT a {kind.__name__} ({task}): another task.")
    if getattr(base, "main_input_name", "input_ids") != getattr(kind, "main_input_name", "input_ids"):
        raise Wrong(f"{place}: {given!r} ({base.__name__}) reads other inputs than OUT ({kind.__name__}): another task.")
    if task == other:
        return base
    if config.model_type != base_config.model_type:
        raise Wrong(
            f"{place}: {given!r} is a {base.__name__}, and OUT a {kind.__name__} of another architecture, of which one has a "
            f"head and the other has none. Give a {task or 'headless'} model."
        )
    return kind


def _task(kind: Any) -> str | None:
    from ..about import TASKS

    return next((tag for ending, tag in TASKS.items() if kind.__name__.endswith(ending)), None)


def _check_length(length: int | None, *configs: Any) -> None:
    for config in configs:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        most = getattr(text, "max_position_embeddings", None)
        offset = 2 if getattr(text, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
        if length is not None and isinstance(most, int) and length > most - offset > 0:
            raise Wrong(f"argument --length: {length} tokens are more than {config.model_type} reads, {most - offset}.")


def _check_output(output: str | None) -> None:
    from pathlib import Path

    if output is None:
        return
    path = Path(output).expanduser()
    if path.is_file() and path.suffix != ".json":
        raise Wrong(f"argument --output: {output!r} is a file; give a folder, or a name that ends in .json.")
    if not path.parent.is_dir():
        raise Wrong(f"argument --output: there is no folder {str(path.parent)!r} to write into.")


def _inputs(model: Any, rows: int, length: int | None) -> dict[str, Any]:
    """So many rows of random inputs; texts of so many tokens, or as long as the model reads."""
    import torch

    from ..probe import example_inputs

    one = example_inputs(model, 1)
    if "input_ids" not in one:
        if length is not None:
            raise Wrong(f"argument --length: {type(model).__name__} reads no texts, but {', '.join(one)}.")
    else:
        text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        most = getattr(text, "max_position_embeddings", None)
        longest = most - 2 if isinstance(most, int) and most > 4 else 64
        ids = one["input_ids"]
        draw = torch.Generator().manual_seed(0)
        shape = (1, length or min(64, longest))
        one["input_ids"] = torch.randint(int(ids.min()), int(ids.max()) + 1, shape, generator=draw)
    return {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in one.items()}
