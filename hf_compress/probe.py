"""Small inputs that any model runs on, and outputs made comparable: what a proof needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .edits import CompressionError
from .examples import candidates

# never compared: their shape follows the heads (the experts), or they are only there for the next call
NOT_COMPARED = (
    "attentions", "past_key_values", "loss", "cross_attentions", "hidden_states",
    "router_logits", "encoder_router_logits", "decoder_router_logits", "aux_loss",
)  # fmt: skip


NO_LIMIT = 10**9


class NoInputs(CompressionError):
    """The proof has no inputs that this model runs on."""


def longest_text(config: Any) -> int:
    """Tokens that a model reads at most; `NO_LIMIT` where its config names none.

    RoBERTa and its like count positions from the row after the padding's, so that tables have rows which no text reaches:
    that is seen in the tables themselves, of a model without weights.

    Example:

    ```python
    >>> from transformers import BertConfig, RobertaConfig, XLNetConfig
    >>> from hf_compress.probe import NO_LIMIT, longest_text
    >>> longest_text(BertConfig()), longest_text(RobertaConfig(max_position_embeddings=514))
    (512, 512)
    >>> longest_text(XLNetConfig()) == NO_LIMIT
    True

    ```
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:  # XLNet's is -1
        return NO_LIMIT
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception:  # not every model is made on the meta device, or from its config: then its tables are not seen
        return known
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name.rpartition(".")[2]]
    rows = [table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None]
    return min([known, *rows])


def example_inputs(model: nn.Module, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Random inputs from a fixed seed that a model runs on, made from the signature of `forward` and the sizes in the config.

    Of the batches that `examples.candidates` makes, the first that the model runs on. Text alone is not tried, nor is
    anything on a model without weights: there the likeliest is taken.

    Raises:
        NoInputs: the model takes something that this function does not know; pass inputs of your own.

    Example:

    ```python
    >>> from transformers import ViTConfig, ViTModel
    >>> from hf_compress.probe import example_inputs
    >>> model = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16))
    >>> {name: tuple(value.shape) for name, value in example_inputs(model).items()}
    {'pixel_values': (2, 3, 32, 32)}

    ```
    """
    likeliest = None
    for batch in candidates(model, rows, length):
        likeliest = likeliest or batch
        if batch.keys() <= {"input_ids", "decoder_input_ids"} or any(p.is_meta for p in model.parameters()):
            return likeliest
        try:
            with quiet_run(model) as run:
                run(batch)
        except Exception:  # a model may refuse an input in any way; who runs it on the likeliest sees how
            continue
        return batch
    if likeliest is None:
        raise NoInputs(
            f"No example inputs for {type(model).__name__}, whose main input is "
            f"{getattr(model, 'main_input_name', 'input_ids')!r}; pass inputs=... (a small batch, as for model(**inputs))."
        )
    return likeliest


@contextmanager
def quiet_run(model: nn.Module, exits: bool = False) -> Iterator[Callable[..., Any]]:
    """A function that runs the model without leaving a trace: eval mode, no gradients, random state kept.

    Early exits are off unless `exits`: all rows go through all layers.

    `run(inputs)` runs without a cache (one that a model fills would be filled twice by a proof); `run(inputs, cache=True)`
    as the model does by default.
    """
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs: dict[int, Any] = {
        id(config): config for config in found if hasattr(config, "__dict__") and "use_cache" in vars(config)
    }
    names = inspect.signature(model.forward).parameters

    def run(inputs: Mapping[str, Any], cache: bool = False) -> Any:
        extra = {} if cache or "use_cache" not in names or "use_cache" in inputs else {"use_cache": False}
        before = {key: config.use_cache for key, config in configs.items()}
        torch.default_generator.manual_seed(0)
        try:
            for config in configs.values() if not cache else ():
                config.use_cache = False
            return model(**inputs, **extra)
        finally:
            for key, config in configs.items():
                config.use_cache = before[key]

    states = [] if exits else [m.__dict__["_exits"] for m in model.modules() if "exit_heads" in m._modules]
    muted = [state.muted for state in states]
    model.eval()
    try:
        for state in states:
            state.muted = True
        with torch.random.fork_rng(devices), torch.no_grad():
            yield run
    finally:
        for module in training:
            module.training = True
        for state, before in zip(states, muted, strict=True):
            state.muted = before


@contextmanager
def probing(model: nn.Module, inputs: Mapping[str, Any] | None) -> Iterator[Callable[..., list[Any]]]:
    """A function `run(cache=False)` that runs a model on the proof's inputs, and gives a list of its outputs.

    With `inputs`, the model itself runs on them. Without, every transformers model that it is or holds runs on inputs made
    for it, so that a module around one (a SentenceTransformer, say) needs none; tokens once as they are, once with padding.

    Raises:
        NoInputs: there are no inputs, or the model does not run on them.
    """
    if inputs is not None and (not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs)):
        raise CompressionError(f"inputs must be a batch as for model(**inputs), got {type(inputs).__name__}.")
    if inputs is not None:
        parts: list[tuple[nn.Module, dict[str, Any]]] = [(model, {k: v for k, v in inputs.items() if k != "labels"})]
    else:
        parts = [(owner, example_inputs(owner)) for _, owner in owners_in(model)]
    if not parts:
        raise NoInputs(
            f"{type(model).__name__} holds no transformers model to make inputs for; pass inputs=... (a small batch)."
        )
    with ExitStack() as stack:
        # after model.compile() a compiler would trace the proof itself, for a minute
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        runs = [(stack.enter_context(quiet_run(part)), batch) for part, batch in parts]

        def run(cache: bool = False) -> list[Any]:
            return [run_part(batch, cache) for run_part, batch in runs]

        trees = [(module, dict(module._modules), _settings(module)) for module in model.modules()]
        try:
            run()
        except Exception as error:  # a model may refuse an input in any way
            names = ", ".join(name for _, batch in parts for name in batch)
            raise NoInputs(
                f"{type(model).__name__} does not run on the proof's inputs ({names}): {type(error).__name__}: {error}. "
                "Pass inputs=... with a small batch that it runs on."
            ) from error
        for part, batch in list(parts) if inputs is None else ():
            padded = _padded(part, batch)
            if padded is None:
                continue
            with suppress(Exception), quiet_run(part) as run_part:  # where the model takes no such mask, there is none to prove
                run_part(padded)
                runs.append((stack.enter_context(quiet_run(part)), padded))
        if any(module._modules != children for module, children, _ in trees):  # BigBird, on inputs that are too short
            for module, children, settings in trees:
                module._modules.clear()
                module._modules.update(children)
                module.__dict__.update(settings)
            raise NoInputs(
                f"{type(model).__name__} replaced modules of its own when it ran on the proof's inputs (too short for its kind "
                "of attention, say); they were put back. Pass inputs=... with a batch like those that it will see."
            )
        yield run


def _padded(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same tokens with the end of the last row hidden: attention takes other ways under a mask."""
    ids = batch.get("input_ids")
    names = inspect.signature(model.forward).parameters
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or "attention_mask" not in names or "attention_mask" in batch:
        return None
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] - ids.shape[1] // 3 :] = 0
    return {**batch, "attention_mask": mask}


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, str | int | float | bool)}


def owners_in(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The outermost transformers models in a module, with their paths: a model itself, or what a wrapper holds."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(not n or name.startswith(f"{n}.") for n, _ in found):
            found.append((name, module))
    return found


def tensors_in(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """The floating-point tensors in an output, by name; attention maps and caches left out."""
    if isinstance(value, torch.Tensor):
        return [(name, value)] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for key, v in value.items() if key not in NOT_COMPARED for t in tensors_in(v, f"{name}.{key}".strip("."))]
    if isinstance(value, tuple | list):
        return [t for i, v in enumerate(value) for t in tensors_in(v, f"{name}[{i}]")]
    return []


def map_tensors(value: Any, f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `f` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, f) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, f) for v in value)
    if type(value) is dict:
        return {key: map_tensors(v, f) for key, v in value.items()}
    return value


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinite where shapes differ or only one side is finite."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.float(), other.float()
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)):
        return float("inf")
    one, other = one[finite], other[finite]
    if not one.numel():
        return 0.0
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-6)).item()


def tolerance(dtype: torch.dtype) -> float:
    """How far two exact computations in another order may lie apart, relative to the largest value."""
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}.get(dtype, 1e-4)


class _Watched(torch.Tensor):
    """A weight that remembers what was asked of it."""

    hfc_read: set[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        asked = getattr(getattr(func, "__self__", None), "__name__", "") if func.__name__ == "__get__" else func.__name__
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, _Watched):
                value.hfc_read.add(asked)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def use_of_weights(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """Run a model, and see whose forward runs, and whose weight something else than its own forward reads.

    Asking for a weight's device is no reading, nor for its dtype where int8 is known to be special: T5 does that to cast
    what it hands to a Linear.
    """
    ran: set[str] = set()
    seen: dict[str, set[str]] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            weight = module._parameters["weight"]
            assert weight is not None
            watched: Any = weight.detach().as_subclass(_Watched)
            seen[name] = watched.hfc_read = set()

            def enter(m: nn.Module, *_: Any, name: str = name, weight: Any = weight) -> None:
                ran.add(name)
                m._parameters["weight"] = weight

            def leave(m: nn.Module, *_: Any, watched: Any = watched) -> None:
                m._parameters["weight"] = watched

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            stack.callback(module._parameters.__setitem__, "weight", weight)
            module._parameters["weight"] = watched  # type: ignore[assignment]
        run()
    harmless = {"device", "requires_grad", "is_meta"}
    return ran, {name for name, asked in seen.items() if asked - harmless - ({"dtype"} if _knows_int8(name) else set())}


def _knows_int8(name: str) -> bool:
    return name.rpartition(".")[2] in ("wo", "fc2")  # T5 and its kin: `if ...weight.dtype != torch.int8`
