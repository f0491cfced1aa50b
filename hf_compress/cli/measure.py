"""`hf-compress measure`: parameters, bytes, work and time of a model, beside another that is timed in turn with it."""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arguments import DTYPES, Wrong, add_common, filled, one_of, whole
from .models import check_weights, class_of, config_of, find, load

logger = logging.getLogger(__name__)

DESCRIPTION = "Parameters, bytes, work and time of a model, beside another that is timed in turn with it."
EXAMPLES = """\
examples:
  hf-compress measure runs/minilm-sst2-small                                   alone
  hf-compress measure runs/minilm-sst2-small --against runs/minilm-sst2        and the speed-up, with its interval
  hf-compress measure OUT --against BASE --batch-sizes 1 8 32 --length 128 --threads 2
  hf-compress measure OUT --against BASE --json -o report.json                 the report, as data and as a file

The inputs are random, of the right kind; no task metric is computed (`hf-compress run` does that, on data). Into a report of
the same model that is there already, sizes and times are written anew; its metrics, data set and stages stay.
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "measure", help="size and speed, beside another model", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", metavar="OUT", help="the model: a folder, or a Hub id")
    parser.add_argument("--against", metavar="BASE", help="the model to compare with: a folder, or a Hub id")
    parser.add_argument(
        "--batch-sizes", metavar="ROWS", type=whole(1), nargs="+", help="default: those of the report in FILE, or 1 32"
    )
    parser.add_argument("--length", metavar="TOKENS", type=whole(1), help="tokens of every text; default: as in FILE, or 64")
    parser.add_argument("--repeats", metavar="N", type=whole(1), default=20, help="timed passes; default: 20")
    parser.add_argument("--warmup", metavar="N", type=whole(0), default=3, help="passes before them; default: 3")
    parser.add_argument("--threads", metavar="N", type=whole(1), help="of the CPU; default: what torch takes")
    parser.add_argument("--dtype", type=one_of(DTYPES), help=f"{', '.join(DTYPES)}; default: as OUT was saved")
    parser.add_argument("-o", "--output", metavar="FILE", type=filled, help="also save it, as report.json in a folder or .json")
    parser.add_argument("--overwrite", action="store_true", help="replace what FILE says already, also of another model")
    add_common(parser)
    parser.set_defaults(run=run, path=("measure",))


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `measure`."""
    import torch

    from ..measure import measure

    name = find(args.model, "OUT")
    base = None if args.against is None else find(args.against, "argument --against")
    _check_output(args.output)
    target = None if args.output is None else _target(args.output)
    earlier = None if target is None or args.overwrite else _earlier(target)
    if target is not None and earlier is not None and earlier.against is not None and base is None:
        base = _baseline(earlier, name, target)
    config = config_of(name, "OUT")
    base_config = None if base is None else config_of(base, "argument --against")
    kind = class_of(config)
    base_kind = None if base is None else _beside(kind, config, base_config, base)
    sizes, length = _conditions(args, earlier)
    _check_length(length, config, base_config)
    check_weights(name, "OUT")
    if base is not None:
        check_weights(base, "argument --against")
    dtype = "auto" if args.dtype is None else getattr(torch, args.dtype)
    model = load(name, "OUT", kind, dtype)
    dtype = model.dtype if args.dtype is None and model.dtype.is_floating_point else dtype
    against = None if base is None else load(base, "argument --against", base_kind, dtype)
    inputs = _inputs(model, max(sizes), length)
    threads = torch.get_num_threads()
    about, metrics, before = _kept(earlier, model, against, base, inputs, target)
    try:
        torch.set_num_threads(args.threads or threads)
        report = measure(
            model,
            inputs,
            against=against,
            metrics=metrics,
            metrics_against=before,
            repeats=args.repeats,
            warmup=args.warmup,
            batch_sizes=list(dict.fromkeys(sizes)),
            about=about,
        )
    finally:
        torch.set_num_threads(threads)
    if earlier is not None:
        report = _with_stages(report, earlier)
    if target is not None:
        report = _save(report, earlier, name, target)
    return str(report), report.to_dict()


def _conditions(args: argparse.Namespace, earlier: Any) -> tuple[list[int], int | None]:
    """Batch sizes and length: what was asked for, else those of the report that is renewed."""
    sizes = args.batch_sizes or (earlier and [timing.batch for timing in earlier.timings]) or [1, 32]
    shape = earlier.conditions.get("shapes", {}).get("input_ids") if earlier else None
    return sizes, args.length or (shape[1] if isinstance(shape, list) and len(shape) == 2 else None)


def _beside(kind: Any, config: Any, base_config: Any, given: str) -> Any:
    """The class to load the baseline with: its own where both are for one task, else the model's, with a new head.

    Raises:
        Wrong: the baseline is for another task, so no time of one says anything about the other.
    """
    base = class_of(base_config)
    task, other = _task(kind), _task(base)
    place = "argument --against"
    pretrained = other == "fill-mask" or base.__name__.endswith("ForPreTraining")  # as most bases are published
    if pretrained and task != other and config.model_type == base_config.model_type:
        return kind
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
    from ..probe import longest_text

    for config in configs:
        if length is not None and config is not None and length > (most := longest_text(config)):
            raise Wrong(f"argument --length: {length} tokens are more than {config.model_type} reads, {most}.")


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

    from ..probe import example_inputs, longest_text

    one = example_inputs(model, 1)
    if "input_ids" not in one:
        if length is not None:
            raise Wrong(f"argument --length: {type(model).__name__} reads no texts, but {', '.join(one)}.")
    else:
        ids = one["input_ids"]
        draw = torch.Generator().manual_seed(0)
        shape = (1, length or min(64, longest_text(model.config)))
        one["input_ids"] = torch.randint(int(ids.min()), int(ids.max()) + 1, shape, generator=draw)
    return {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in one.items()}


# --- a report that is there already ----------------------------------------------------------------------------------


def _target(output: str) -> Path:
    """The file that `Report.save` writes for this name."""
    from ..report import REPORT_FILE

    path = Path(output).expanduser()
    return path if path.suffix == ".json" and not path.is_dir() else path / REPORT_FILE


def _earlier(target: Path) -> Any:
    from ..edits import CompressionError
    from ..report import Report

    if not target.exists():
        return None
    try:
        return Report.load(target)
    except CompressionError as error:
        raise Wrong(f"argument --output: {error} Give another name, or --overwrite.") from error


def _baseline(earlier: Any, name: str, target: Path) -> str:
    """The step of a recipe that an earlier report compares with, where the model's folder still has it.

    Raises:
        Wrong: it is not there, so that what the report says of it could neither be measured again nor stay.
    """
    for folder in sorted(Path(name).glob("steps/[0-9][0-9]-*")):
        try:
            known = json.loads((folder / "step.json").read_text())["metrics"]
            numbers = sum(_numbers_in(file) for file in folder.glob("*.safetensors"))
        except (OSError, ValueError, KeyError, TypeError):  # a step that is not whole
            continue
        if known == earlier.against.metrics and numbers == earlier.against.bytes:
            logger.warning(f"Measured beside {folder}, as before.")
            return os.fspath(folder)
    raise Wrong(
        f"argument --output: {os.fspath(target)!r} compares with a baseline, and what it says of that would be lost: give "
        "--against BASE too, another name, or --overwrite."
    )


def _numbers_in(file: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _kept(earlier: Any, model: Any, against: Any, base: str | None, inputs: Any, target: Path | None) -> tuple[Any, Any, Any]:
    """What the new report takes over: facts, metrics of the model, metrics of the baseline.

    Raises:
        Wrong: the report that is there is of another model.
    """
    from ..card import base_facts
    from ..exits import exit_options
    from ..measure import measure

    told: dict[str, Any] = {} if base is None else {"base_model": base, "against": base}
    if base is not None and Path(base).is_dir():  # no path of this computer goes into a report
        local = Path(base).resolve().name
        told = {"base_model": f"./{local}", "against": local, "base_card": base_facts(base) or None}
    if earlier is None:
        return told, None, None
    now = measure(model, inputs, against=against, repeats=1, warmup=0)
    here, there = now.conditions["shapes"], earlier.conditions.get("shapes", {})
    # how much work exits leave depends on the rows
    counted = all(there.get(k) == v for k, v in here.items()) and not any(
        exit_options(one) for one in (model, against) if one is not None
    )
    keys = ("parameters", "parameters_encoder", "bytes", *(("macs",) if counted else ()))

    def sizes(cost: Any) -> list[int]:
        return [getattr(cost, key) for key in keys]

    if sizes(now.model) != sizes(earlier.model):
        said = [f"{cost.parameters:,} parameters in {cost.bytes:,} bytes" for cost in (earlier.model, now.model)]
        said = said if said[0] != said[1] else [f"{cost.macs:,} multiply-accumulates" for cost in (earlier.model, now.model)]
        raise Wrong(
            f"argument --output: {os.fspath(target or '')!r} is the report of another model, of {said[0]}, and OUT has "
            f"{said[1]}. Give another name, or --overwrite."
        )
    told_then = earlier.about.get("weights")
    if told_then is not None and told_then != now.about["weights"]:
        raise Wrong(
            f"argument --output: {os.fspath(target or '')!r} is the report of other weights than OUT's, of the same size. Give "
            "another name, or --overwrite."
        )
    about = {k: v for k, v in earlier.about.items() if k not in ("blocks", "weights")}  # which are seen anew
    about = about if "base_model" in about else {**told, **about}  # an earlier one knows what the baseline was
    if against is None:
        return about, earlier.model.metrics, None
    if earlier.against is not None and sizes(now.against) == sizes(earlier.against):
        return about, earlier.model.metrics, earlier.against.metrics
    if earlier.against is not None:
        logger.warning(f"BASE is another model than the baseline in {target}, whose metrics are left out.")
    return {**about, "against": told["against"]}, earlier.model.metrics, None


def _with_stages(report: Any, earlier: Any) -> Any:
    """The report with the stages of the earlier one; their latencies only where the conditions are the same."""
    stages = [dict(stage) for stage in report.about.get("stages", ())]
    if earlier.conditions != report.conditions and any([stage.pop("latency", None) for stage in stages]):
        logger.warning("The latencies of the stages were measured under other conditions and are left out.")
    if stages and stages[-1].get("bytes") == report.model.bytes:  # the last is the model itself
        stages[-1]["latency"] = report.model.latency.median
    return replace(report, about={**report.about, "stages": stages} if stages else report.about)


def _save(report: Any, earlier: Any, name: str, target: Path) -> Any:
    """Write the report; and the card anew that tells its numbers, where it lies beside it."""
    from ..plan import PLAN_FILE, Plan
    from ..publish import CARD_FILE, plan_in, write_card_
    from ..report import REPORT_FILE, Report

    folder = target.parent
    own = target.name == REPORT_FILE and Path(name).is_dir() and folder.resolve() == Path(name).resolve()
    if earlier is not None and own and (folder / CARD_FILE).is_file():
        plan = Plan.load(folder) if (folder / PLAN_FILE).is_file() else plan_in(folder)
        write_card_(folder, plan, report)
    else:
        report.save(target)
    return Report.load(target)
