"""What a model costs, measured: size, work, and time beside a baseline in the same run."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from .about import check_about, is_repo_id, seen
from .discover import discover
from .edits import CompressionError
from .probe import quiet_run
from .quantization import is_quantized
from .quantization.kernels import has_integer_kernels
from .report import Cost, Report, Timing
from .sparse import is_sparse
from .timing import latency_of, speedup_of, take_turns, wait

Metrics = Mapping[str, float] | Callable[[nn.Module], Mapping[str, float]] | None


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    against: nn.Module | None = None,
    metrics: Metrics = None,
    metrics_against: Metrics = None,
    repeats: int = 20,
    warmup: int = 3,
    batch_sizes: Iterable[int] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Report:
    """What a model costs on one batch, beside a baseline that is timed in turn with it.

    - *Parameters* in total and without embeddings (a small encoder is half embeddings); *bytes* as safetensors holds
      them, tied weights once.
    - *MACs*: half the operations that torch's own counter sees in one forward pass, attention included, and those of
      integer kernels.
    - *Latency*: median and quartiles over `repeats` forward passes after `warmup`; with a baseline, the two take turns,
      the order changing at random, and the speed-up is the median over pairs with a 95% bootstrap interval.
    - *What Amdahl's law allows*: the baseline's time `T` is split over its modules by timing hooks; a module that was
      cut keeps the share `r` of its work (MACs, a quarter where int8 multiplies int8; for attention itself, heads), one
      that was not keeps all:
      `T / sum(t_i * r_i)` (Amdahl 1967). The achieved speed-up usually lies below it; above, where a cut helps caches.

    Args:
        model (`nn.Module`): the model.
        inputs (`dict`): one batch, as for `model(**inputs)`; its shapes are part of the result.
        against (`nn.Module`, *optional*): the baseline.
        metrics (`dict` or `Callable`, *optional*): task metrics of the model, or a function from a model to them, which is
            then called for the baseline too.
        metrics_against (`dict`, *optional*): those of the baseline, where `metrics` is a dict.
        repeats (`int`, defaults to 20): timed passes of each model.
        warmup (`int`, defaults to 3): passes before them.
        batch_sizes (`Sequence[int]`, *optional*): also timed with so many rows, such as `(1, 32)`: those of `inputs`,
            repeated or cut, in every tensor whose first size is the batch's; `report.timings`.
        about (`dict`, *optional*): what the numbers are about, for the card: see `Report.about`. What can be seen is filled
            in: the base model and its revision where it came from the Hub, the task, the tier, the versions, and the
            sizes of blocks.

    Returns:
        `Report`: `print` it, `.save(folder)` it, or `.to_dict()`.

    Raises:
        CompressionError: inputs that are no batch, a count below one, or batch sizes where no tensor tells which dimension
            is the batch.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_compress import KeepNeurons, Plan, apply_, measure
    >>> config = BertConfig(
    ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... )
    >>> dense, small = BertModel(config), BertModel(config)
    >>> _ = apply_(small, Plan([KeepNeurons("encoder.layer.0", range(32))]))
    >>> report = measure(small, {"input_ids": torch.ones(2, 8, dtype=torch.long)}, against=dense, repeats=2)
    >>> report.against.parameters - report.model.parameters == 32 * (32 + 1) + 32 * 32
    True

    ```
    """
    if not isinstance(inputs, Mapping) or not inputs:
        raise CompressionError(f"inputs must be a batch as for model(**inputs), got {type(inputs).__name__}.")
    for name, value in (("model", model), ("against", against)):
        if not isinstance(value, nn.Module) and (name == "model" or value is not None):
            raise CompressionError(f"{name} must be a model (a torch.nn.Module), got {type(value).__name__}.")
    for name, value in (("metrics", metrics), ("metrics_against", metrics_against)):
        if value is not None and not callable(value) and not isinstance(value, Mapping):
            raise CompressionError(f"{name} must be a dict of numbers or a function that gives one, got {value!r}.")
    if type(repeats) is not int or type(warmup) is not int or repeats < 1 or warmup < 0:
        raise CompressionError(f"repeats must be a whole number >= 1 and warmup >= 0, got {repeats!r} and {warmup!r}.")
    from .exits import exit_options

    about = _told(check_about(about))
    batches = _batches(model, inputs, batch_sizes)
    models = [model] if against is None else [model, against]
    with ExitStack() as stack:
        quiet = [stack.enter_context(quiet_run(m, exits=True)) for m in models]
        runs = [_runner(run, m, inputs) for run, m in zip(quiet, models, strict=True)]
        others = {size: [_runner(r, m, b) for r, m in zip(quiet, models, strict=True)] for size, b in batches.items()}
        times = take_turns(runs, repeats, warmup)
        costs = [_cost(m, run, t) for m, run, t in zip(models, runs, times, strict=True)]
        speedup, interval = speedup_of(times)
        timings = [
            _timing(batches[size], model, times if batches[size] is inputs else take_turns(others[size], repeats, warmup))
            for size in batches
        ]
        skips = any(exit_options(one) is not None for one in models)  # where rows leave, layers are skipped: no bound holds
        allowed = None if against is None or skips else _allowed(model, against, runs[0], runs[1])
    found = [_metrics(metrics, model), _metrics(metrics_against or (metrics if callable(metrics) else None), against)]
    costs = [replace(cost, metrics=values) for cost, values in zip(costs, found, strict=False)]
    baseline = costs[1] if against is not None else None
    conditions = conditions_of(model, inputs)
    facts = seen(model, against)
    if "base_model" in about:  # a revision belongs to its own model
        facts.pop("base_revision", None)
    versions = {**facts["versions"], **about.get("versions", {})}
    about = {**facts, **about, "versions": versions, "weights": weights_digest(model)}
    return Report(costs[0], baseline, speedup, interval, allowed, conditions, tuple(timings), about)


def _told(about: dict[str, Any]) -> dict[str, Any]:
    """What the caller says; a folder as base model is written so that it does not read like an id on the Hub."""
    base = about.get("base_model", "")
    return {**about, "base_model": f"./{base}"} if is_repo_id(base) and os.path.isdir(base) else about


def _batches(model: nn.Module, inputs: Mapping[str, Any], sizes: Any) -> dict[int, Mapping[str, Any]]:
    """The inputs with so many rows, by their number; where they have so many, the inputs themselves."""
    if sizes is None:
        return {}
    if isinstance(sizes, str | bytes | Mapping) or not isinstance(sizes, Iterable):
        raise CompressionError(f"batch_sizes must be a sequence of whole numbers >= 1, such as (1, 32), got {sizes!r}.")
    sizes = list(sizes)
    if not all(type(size) is int and size >= 1 for size in sizes):
        raise CompressionError(f"batch_sizes must hold whole numbers >= 1, got {sizes!r}.")
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim}
    main = _main_input(model, tensors)
    first = {value.shape[0] for value in tensors.values()}
    if main is None and len(first) != 1 or 0 in first:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items()) or ", ".join(map(str, inputs))
        raise CompressionError(
            f"batch_sizes: cannot tell which dimension of the inputs is the batch ({shapes}). Give inputs whose tensors have "
            "their rows in the first dimension, or call measure once for each batch."
        )
    rows = next(iter(first)) if main is None else tensors[main].shape[0]
    repeated = {key for key, value in tensors.items() if value.shape[0] == rows}

    def with_rows(size: int) -> Mapping[str, Any]:
        index = torch.arange(size) % rows
        return {k: v.index_select(0, index.to(v.device)) if k in repeated else v for k, v in inputs.items()}

    return {size: inputs if size == rows else with_rows(size) for size in sizes}


def _main_input(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> str | None:
    name = getattr(model, "main_input_name", None)
    return name if name in tensors else None


def _timing(inputs: Mapping[str, Any], model: nn.Module, times: list[list[float]]) -> Timing:
    tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.ndim}
    main = tensors[_main_input(model, tensors) or next(iter(tensors))]
    found = [latency_of(t) for t in times]
    length = main.shape[1] if main.ndim == 2 else None
    return Timing(main.shape[0], length, found[0], found[1] if len(found) > 1 else None, *speedup_of(times))


def _runner(run: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    try:
        run(inputs)
    except Exception as error:  # a model may refuse a batch in any way
        raise CompressionError(
            f"{type(model).__name__} does not run on inputs ({_shapes(inputs)}): {type(error).__name__}: {error}"
        ) from error
    return lambda: run(inputs)


def _shapes(inputs: Mapping[str, Any]) -> str:
    shapes = {k: "x".join(map(str, v.shape)) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return ", ".join(f"{key} {shapes[key]}" if key in shapes else str(key) for key in inputs)


def _cost(model: nn.Module, run: Callable[[], Any], times: list[float]) -> Cost:
    unique = {id(p): n for module in model.modules() for p, n in numbers_of(module)}
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    stored: dict[Any, int] = {}
    made_anew = getattr(model, "_keys_to_ignore_on_save", None) or ()  # Marian's sinusoids are not in the file
    for tensor in _tensors(value for name, value in model.state_dict().items() if name not in made_anew):
        stored[(tensor.untyped_storage().data_ptr(), tensor.storage_offset())] = tensor.numel() * tensor.element_size()
    return Cost(
        parameters=sum(unique.values()),
        parameters_encoder=sum(n for i, n in unique.items() if i not in embedded),
        bytes=sum(stored.values()),
        macs=macs_of(model, run),
        latency=latency_of(times),
        nonzero=sum(unique.values()) - zeros if (zeros := zeros_in(model)) else None,
    )


def weights_digest(model: nn.Module) -> str:
    """A digest of all that is stored of a model, whatever its tensors are called: tells two of one size apart."""
    found = set()
    for tensor in _tensors(model.state_dict().values()):
        if tensor.device.type != "meta" and not tensor.is_quantized:
            plain = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
            found.add(hashlib.sha256(plain.numpy().data).hexdigest())
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those in a state dict: torch's own quantized layers keep them in tuples, beside a dtype, and torchao's in a tensor."""
    for value in values:
        if is_traceable_wrapper_subclass(value):
            yield from _tensors(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def numbers_of(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """A module's own parameters, with how many numbers of the model each holds: packed ones hold several a byte."""
    if not is_quantized(module):
        return [(p, p.numel()) for p in module.parameters(recurse=False)]
    shapes: dict[str, Any] = module._shapes()  # type: ignore[operator,assignment]
    found = {key: math.prod(shapes[key]) for key in shapes}
    return [(p, found.get(key, p.numel() if key == "bias" else 0)) for key, p in module._parameters.items() if p is not None]


def zeros_in(model: nn.Module) -> int:
    """How many weights masks hold at zero."""
    sparse: dict[int, Any] = {id(module._parameters["weight"]): module for module in model.modules() if is_sparse(module)}
    return sum(math.prod(module.hfc_shape) - module.hfc_kept for module in sparse.values())


def macs_of(model: nn.Module, run: Callable[[], Any]) -> int:
    """Multiply-accumulates of one forward pass."""
    integers = 0

    def count(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal integers
        rows = output.numel() // max(1, output.shape[-1])
        integers += rows * sum(math.prod(shape) for shape in module._shapes().values())

    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for module in model.modules():
            if _multiplies_integers(module):  # a kernel that the counter does not know
                stack.callback(module.register_forward_hook(count).remove)
        for parameter in model.parameters():
            if parameter.requires_grad:  # the counter hooks into the gradient of what a module is given, here of none
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        stack.enter_context(counter)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused CPU kernels are not known to it either
        run()
    return counter.get_total_flops() // 2 + integers


def _multiplies_integers(module: nn.Module) -> bool:
    on_cpu = all(p.device.type == "cpu" for p in module.parameters(recurse=False))
    return is_quantized(module) and getattr(module, "activations", None) is not None and on_cpu and has_integer_kernels()


def _allowed(model: nn.Module, against: nn.Module, run: Callable[[], Any], run_against: Callable[[], Any]) -> float:
    """Amdahl's ceiling, from where the baseline spends its time and what is left of each part's work."""
    spent, total = _time_by_module(against, run_against)
    work, work_before = _output_sizes(model, run), _output_sizes(against, run_against)
    heads = {a.name: a.num_heads for a in discover(model).attentions}
    heads_before = {a.name: a.num_heads for a in discover(against).attentions}
    saved = 0.0
    for name, seconds in spent.items():
        if name in heads_before and not _is_leaf(against, name):
            left = heads.get(name, 0) / heads_before[name]
        elif name in work_before and work_before[name]:
            left = work.get(name, 0) / work_before[name]
        else:
            continue
        saved += seconds * max(0.0, 1 - left)
    return total / max(total - saved, 1e-12)


def _is_leaf(model: nn.Module, name: str) -> bool:
    return not any(True for _ in model.get_submodule(name).children())


def _time_by_module(model: nn.Module, run: Callable[[], Any], rounds: int = 3) -> tuple[dict[str, float], float]:
    """Seconds in each module without its children, and in all; medians over rounds."""
    names = {module: name for name, module in model.named_modules()}
    own: dict[str, list[float]] = {}
    stack: list[list[float]] = []

    def before(module: nn.Module, args: Any) -> None:
        stack.append([time.perf_counter(), 0.0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        wait()
        start, inside = stack.pop()
        elapsed = time.perf_counter() - start
        now[names[module]] = now.get(names[module], 0.0) + elapsed - inside
        if stack:
            stack[-1][1] += elapsed

    hooks = [m.register_forward_pre_hook(before) for m in names] + [m.register_forward_hook(after) for m in names]
    totals = []
    try:
        for _ in range(rounds):
            now: dict[str, float] = {}
            run()
            totals.append(sum(now.values()))
            for name, seconds in now.items():
                own.setdefault(name, []).append(seconds)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: statistics.median(times) for name, times in own.items()}, statistics.median(totals)


def _output_sizes(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Work of every module without children: weights touched times positions for layers with weights, else outputs."""
    sizes: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if any(True for _ in module.children()):
            continue

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            tensor = output if isinstance(output, torch.Tensor) else None
            if tensor is None:
                return
            sizes[name] = sizes.get(name, 0.0) + tensor.numel() * _depth(module)

        hooks.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def _depth(module: nn.Module) -> float:
    """Multiplications per output of a module with weights, 1 for others."""
    weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    if isinstance(module, nn.Embedding) or not weights:
        return 1.0
    if is_quantized(module):
        shapes: list[Any] = list(module._shapes().values())  # type: ignore[operator]
        # VNNI multiplies four pairs of bytes where AVX-512 multiplies one of floats
        return sum(math.prod(shape) for shape in shapes) / shapes[-1][0] / (4 if _multiplies_integers(module) else 1)
    if isinstance(module, Conv1D):
        return float(weights[0].shape[0])
    return sum(p.numel() for p in weights) / weights[0].shape[0]


def _metrics(metrics: Metrics, model: nn.Module | None) -> dict[str, float]:
    if metrics is None or model is None:
        return {}
    values = metrics(model) if callable(metrics) else metrics
    try:
        return {str(name): float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CompressionError(f"metrics must give a dict of numbers, got {values!r}.") from error


def conditions_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    import transformers

    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = "cpu" if parameter is None else str(parameter.device)
    return {
        "hardware": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "shapes": {k: list(v.shape) for k, v in inputs.items() if isinstance(v, torch.Tensor)},
    }


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        if names:
            return f"{names[0]} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
