"""A process that loads what another one saved and runs it: forked before the model to be saved exists."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")
NOT_COMPARED = ("attentions", "past_key_values", "loss", "cross_attentions", "hidden_states")


class Died(RuntimeError):
    """The reading process is no more, or did not answer in time."""


class Loader:
    """The process; one that dies is started again at the next question.

    One that is made before hf_compress is imported knows nothing of it (`runs=False`: it only loads).
    """

    def __init__(self, runs: bool, seconds: float = 60) -> None:
        self.runs, self.seconds = runs, seconds
        self._start()

    def _start(self) -> None:
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(other, self.runs), daemon=True)
        self.process.start()
        other.close()

    def ask(self, kind: str, folder: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The outputs of `kind.from_pretrained(folder)(**inputs)` there; RuntimeError with its message if it fails."""
        if not self.process.is_alive():
            if not self.runs:
                raise Died("the process without the plugin died before")
            self._start()
        torch.save(inputs, f"{folder}.inputs")
        self.pipe.send((kind, folder))
        try:
            if not self.pipe.poll(self.seconds):
                raise Died("no answer in time")
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise Died("it died") from None
        except Died:
            self.close()
            raise
        if answer is not None:
            raise RuntimeError(answer)
        return torch.load(f"{folder}.outputs", weights_only=True)

    def close(self) -> None:
        self.process.kill()
        self.process.join(5)


def outputs_of(model: Any, inputs: dict[str, Any], inside: Iterable[str] = ()) -> list[torch.Tensor]:
    """Every floating-point tensor that a model gives, in order, caches and attention maps left out; `inside`: and these modules."""
    torch.manual_seed(0)
    found: list[torch.Tensor] = []
    hooks = [model.get_submodule(n).register_forward_hook(lambda _m, _a, out: found.extend(flat(out))) for n in inside]
    try:
        with torch.no_grad():
            return flat(model(**inputs)) + found
    finally:
        for hook in hooks:
            hook.remove()


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with its numbers in float64."""
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach()] if value.is_floating_point() else []
    if hasattr(value, "items"):
        return [t for key, v in value.items() if key not in NOT_COMPARED for t in flat(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in flat(v)]
    return []


def far(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference over all outputs, each relative to its own largest value."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        if finite.any():
            a, b = a[finite].double(), b[finite].double()
            worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item())
    return worst


def serve(pipe: Any, runs: bool) -> None:
    import transformers

    torch.set_num_threads(1)
    while True:
        try:
            kind, folder = pipe.recv()
        except EOFError:
            return
        try:
            inputs = torch.load(f"{folder}.inputs", weights_only=True)
            model = getattr(transformers, kind).from_pretrained(folder)
            torch.save(outputs_of(model.eval(), inputs) if runs else [], f"{folder}.outputs")
            answer = None
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)
