"""One model type, one edit: whether it is exact, by means that do not trust `apply_`."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import hf_compress as hc

from .build import NotBuilt, build
from .effective import float_form, without_rounding
from .load import Died, Loader, flat, outputs_of
from .plans import EDITS, plan_for
from .types import class_name

CLOSE = 1e-5  # of the largest output, fp32
ATTENTION = re.compile(r"Attention|Attn")
FEED_FORWARD = re.compile(r"MLP|Mlp|FeedForward|FFN|Intermediate|Experts$|MoE$|MoeBlock|SparseMoe")


class Wrong(Exception):
    """The edit is not exact; the message says what is not."""


def judge_type(kind: str, edits: list[str], loader: Loader, plain: Loader | None) -> Iterator[dict[str, Any]]:
    """A row for every edit. The model is built once for each class that the edits want."""
    built: dict[str | None, Any] = {}
    for edit in edits:
        start, before = time.perf_counter(), time.process_time()
        wanted = EDITS[edit][2]
        name = next((found for m in wanted if (found := class_name(kind, m))), None) if wanted else class_name(kind)
        if name is None:
            yield {
                "type": kind,
                "class": None,
                "edit": edit,
                "verdict": "nothing to cut",
                "details": {"no": wanted},
                "seconds": 0.0,
            }
            continue
        if name not in built:
            try:
                built[name] = build(kind, name)
            except NotBuilt as error:
                built[name] = str(error)
        row: dict[str, Any] = {"type": kind, "class": name, "edit": edit}
        if isinstance(built[name], str):
            row["verdict"] = f"not built: {built[name]}"
        else:
            model, inputs, variant = built[name]
            row.update(judge(model, inputs, edit, loader, plain), variant=variant)
        row["seconds"] = round(time.perf_counter() - start, 2)
        row["cpu"] = round(time.process_time() - before, 2)
        yield row


def judge(model: Any, inputs: dict[str, Any], edit: str, loader: Loader, plain: Loader | None) -> dict[str, Any]:
    details: dict[str, Any] = {}
    torch.manual_seed(0)
    try:
        plan = plan_for(edit, model)
    except hc.CompressionError as error:
        nothing = re.search(r"nothing|has no |None of", str(error))
        return {"verdict": "nothing to cut" if nothing else f"refused: {error}", "details": {"plan": str(error)[:200]}}
    except Exception as error:
        return {"verdict": f"wrong: making a plan raised {type(error).__name__}: {_line(error)}"}
    missed = unseen(model)
    if EDITS[edit][1] == "cut" and missed:
        details["unseen"] = missed
    if not plan.edits:
        signs = {"KeepHeads": ["attention"], "KeepNeurons": ["feed-forward"]}.get(edit, [])
        details["discover_missed"] = any(missed.get(sign) for sign in signs)
        return {"verdict": "nothing to cut", "details": details}
    try:
        {"cut": _cut, "kind": _kind, "exits": _exits}[EDITS[edit][1]](
            copy.deepcopy(model), model, plan, inputs, loader, plain, details
        )
        verdict = "exact"
    except hc.CompressionError as error:
        verdict = f"refused: {_line(error)}"
    except Wrong as error:
        verdict = f"wrong: {error}"
    except Exception as error:
        verdict = f"wrong: raised {type(error).__name__}: {_line(error)}"
        if not isinstance(error, RuntimeError):
            details["where"] = _where(error)
    return {"verdict": verdict, "details": details}


def _where(error: BaseException) -> str:
    trace, found = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/hf_compress/" in code.co_filename or "/sweep/" in code.co_filename:
            found = f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:400]


def other_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the same shapes, unlike those of `apply_`'s own proof; padded where that is possible."""
    from hf_compress.probe import quiet_run

    draw = torch.Generator().manual_seed(7)
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "mask" not in name and value.numel() > 4:
            found[name] = (torch.randn(value.shape, generator=draw) * value.std() + value.mean()).to(value.dtype)
        elif name in ("input_ids", "decoder_input_ids") and value.ndim == 2 and len(inputs) < 4:
            found[name] = value.flip(0)
            if "pixel_values" not in inputs:
                found[name] = value[:, torch.randperm(value.shape[1], generator=draw)]
        else:
            found[name] = value
    try:
        with quiet_run(model) as run:
            if set(inputs) == {"input_ids"} and "attention_mask" in inspect.signature(model.forward).parameters:
                masked = {**found, "attention_mask": torch.ones_like(found["input_ids"])}
                masked["attention_mask"][0, -3:] = 0
                try:
                    if all(torch.isfinite(t).all() for t in flat(run(masked))):
                        return masked
                except Exception:
                    pass
            run(found)
        return found
    except Exception:
        return inputs


def _cut(model: Any, dense: Any, plan: hc.Plan, inputs: Any, loader: Loader, plain: Loader | None, details: dict) -> None:
    batch = other_inputs(dense, inputs)
    before = outputs_of(model, batch)
    if not all(torch.equal(a, b) for a, b in zip(before, outputs_of(model, batch), strict=True)):
        raise hc.CompressionError("(sweep) the forward gives something else each time")
    with hc.mask_(model, plan):
        masked = outputs_of(model, batch)
    hand = by_hand(copy.deepcopy(dense), plan)
    try:
        hc.apply_(model, plan)
    except BaseException:
        _unchanged(model, dense, before, batch)
        raise
    cut = outputs_of(model, batch)
    if far(masked, before) == 0:
        raise Wrong("the plan has no effect, so nothing was shown")
    details["cut_mask"] = far(cut, masked)
    if hand is not None:
        details["cut_hand"] = far(cut, outputs_of(hand, batch))
    worst = max(details["cut_mask"], details.get("cut_hand", 0.0))
    if worst > CLOSE:
        details["cut_hand_double"] = _in_double(model, hand, batch)
        if not details["cut_hand_double"] <= CLOSE / 10:
            raise Wrong(f"cut and mask differ by {worst:.1e} of the largest output")
    _survives(model, cut, batch, loader, plain, details)
    if plain is not None:
        _generates(model, dense, plan, inputs, details)
        _trains(model, dense, plan, batch, details)


def _in_double(cut: Any, hand: Any, batch: dict) -> float:
    """What rounding alone may not explain: the difference in float64."""
    if hand is None:
        return float("inf")
    batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        return far(outputs_of(copy.deepcopy(cut).double(), batch), outputs_of(hand.double(), batch))
    except Exception:
        return float("inf")


def by_hand(model: Any, plan: hc.Plan) -> Any:
    """The masked model without hf_compress: the weights that read what goes are set to zero. None where a plan removes layers."""
    from transformers.pytorch_utils import Conv1D

    structure = hc.discover(model)
    blocks = {b.name: b for b in (*structure.attentions, *structure.ffns)}
    with torch.no_grad():
        for edit in plan:
            if not isinstance(edit, hc.KeepHeads | hc.KeepNeurons):
                return None
            block = blocks[edit.attention if isinstance(edit, hc.KeepHeads) else edit.ffn]
            out = model.get_submodule(block.out)
            weight = getattr(out, "weight", None)
            if weight is None or weight.ndim != 2:
                return None
            transposed = isinstance(out, Conv1D)
            kept = set(edit.heads if isinstance(edit, hc.KeepHeads) else edit.neurons)
            size = block.num_heads if isinstance(edit, hc.KeepHeads) else block.size
            each = weight.shape[0 if transposed else 1] // size
            for unit in set(range(size)) - kept:
                where = slice(unit * each, (unit + 1) * each)
                weight[where if transposed else (slice(None), where)] = 0
    return model


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


def _unchanged(model: Any, dense: Any, before: list[torch.Tensor], batch: dict) -> None:
    """All or nothing: after a refusal the model is what it was."""
    ours, theirs = model.state_dict(), dense.state_dict()
    if list(ours) != list(theirs) or any(v.shape != theirs[k].shape or not torch.equal(v, theirs[k]) for k, v in ours.items()):
        raise Wrong("a refused plan changed weights")
    if far(outputs_of(model, batch), before) != 0:
        raise Wrong("a refused plan changed what the model computes")


def _survives(model: Any, now: list[torch.Tensor], batch: dict, loader: Loader, plain: Loader | None, details: dict) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/model"
        model.save_pretrained(folder)
        stock = details["stock"] = getattr(model.config, "quantization_config", None) is None
        try:
            loaded = loader.ask(type(model).__name__, folder, batch)
        except (RuntimeError, Died) as error:
            raise Wrong(f"does not load: {_line(error)}") from None
        details["load_save"] = far(loaded, now)
        if not _same_bits(loaded, now):
            here = outputs_of(type(model).from_pretrained(folder).eval(), batch)
            details["load_here"] = "same bits as there" if _same_bits(loaded, here) else "other bits than there"
            if details["load_save"] > 1e-6 or not _same_bits(loaded, here):
                raise Wrong(
                    f"what is loaded differs by {details['load_save']:.1e} from what was saved ({details['load_here']})"
                )
        if plain is not None and not stock:
            try:
                plain.ask(type(model).__name__, folder, batch)
            except RuntimeError as error:
                details["plain"] = "fails" if not isinstance(error, Died) else "died"
            else:
                raise Wrong("transformers without the plugin loads it in silence")


def _same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and (torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in zip(one, other, strict=True)
    )


def _generates(model: Any, dense: Any, plan: hc.Plan, inputs: dict, details: dict) -> None:
    if not getattr(model, "can_generate", lambda: False)():
        return
    batch = {k: v for k, v in inputs.items() if not k.startswith("decoder") and k != "attention_mask"}
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)
    masked = copy.deepcopy(dense)
    try:
        torch.manual_seed(0)
        with hc.mask_(masked, plan):
            expected = masked.generate(**batch, **options)
    except Exception as error:
        details["generate"] = f"not even the whole model: {type(error).__name__}"
        return
    torch.manual_seed(0)
    got = model.generate(**batch, **options)
    one, other = (x if isinstance(x, torch.Tensor) else x[0] for x in (expected, got))
    if not torch.equal(one, other):
        raise Wrong("greedy generation is not that of the masked model")
    details["generate"] = "equal"


def _trains(model: Any, dense: Any, plan: hc.Plan, batch: dict, details: dict) -> None:
    """Two steps; what was cut moves, if it moves in the whole model."""
    try:
        moved = _two_steps(model, batch)
    except Exception as error:
        try:
            _two_steps(copy.deepcopy(dense), batch)
        except Exception:
            details["train"] = f"not even the whole model: {type(error).__name__}"
            return
        raise Wrong(f"does not train: {type(error).__name__}: {_line(error)}") from None
    if moved is None:
        details["train"] = "the loss is not finite"
        if _two_steps(copy.deepcopy(dense), batch) is not None:
            raise Wrong("the loss is not finite when it trains")
        return
    structure = hc.discover(model)
    still = [b.out for b in (*structure.attentions, *structure.ffns) if not moved.get(f"{b.out}.weight", True)]
    if still and len(moved) == sum(1 for _ in model.parameters()):
        whole = _two_steps(copy.deepcopy(dense), batch) or {}
        if not any(isinstance(e, hc.KeepLayers) for e in plan) and any(whole.get(f"{name}.weight", False) for name in still):
            raise Wrong(f"{still[0]} does not move when it trains")
    details["train"] = "ok"


def _two_steps(model: Any, batch: dict) -> dict[str, bool] | None:
    model.train()
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss: Any = sum(t.float().square().mean() for t in _with_grad(model(**batch)))
        loss.backward()
        if not torch.isfinite(loss):
            return None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}


def _with_grad(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() and value.requires_grad and torch.isfinite(value).all() else []
    if hasattr(value, "items"):
        return [t for key, v in value.items() if key != "past_key_values" for t in _with_grad(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _with_grad(v)]
    return []


def _kind(model: Any, dense: Any, plan: hc.Plan, inputs: Any, loader: Loader, plain: Loader | None, details: dict) -> None:
    batch = other_inputs(dense, inputs)
    before = outputs_of(model, batch)
    try:
        hc.apply_(model, plan)
    except BaseException:
        _unchanged(model, dense, before, batch)
        raise
    now = outputs_of(model, batch)
    if far(now, before) == 0:
        raise Wrong("the plan has no effect, so nothing was shown")
    form = outputs_of(float_form(copy.deepcopy(dense), model, plan), batch)
    details["form"] = far(outputs_of(without_rounding(model), batch), form)
    if details["form"] > 1e-4:
        raise Wrong(f"differs by {details['form']:.1e} of the largest output from the float form with the same weights")
    _survives(model, now, batch, loader, plain, details)


def _exits(model: Any, dense: Any, plan: hc.Plan, inputs: Any, loader: Loader, plain: Loader | None, details: dict) -> None:
    """With a threshold that nobody reaches, nothing changes; with one that everybody does, the first layers alone give the answer."""
    batch = other_inputs(dense, inputs)
    before = outputs_of(model, batch)
    try:
        hc.apply_(model, plan)
    except BaseException:
        _unchanged(model, dense, before, batch)
        raise
    hc.set_exits_(model, threshold=1.0)
    details["never"] = far(outputs_of(model, batch)[:1], before[:1])
    if details["never"] > CLOSE:
        raise Wrong(f"with exits that no row takes, outputs differ by {details['never']:.1e}")
    hc.set_exits_(model, threshold=0.0)
    _survives(model, outputs_of(model, batch), batch, loader, plain, details)
    hidden: list[torch.Tensor] = []
    options = hc.exit_options(model)
    stack = next(
        s for s in hc.discover(dense).stacks.values() if s[0].path == options["stack"] or s[0].stack == options["stack"]
    )
    for layer in stack:
        module = model.get_submodule(layer.name)
        module.register_forward_pre_hook(lambda m, a, k: hidden.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    outputs_of(model, batch)
    details["rows in each layer"] = [t.shape[0] if t.numel() else 0 for t in hidden]


def unseen(model: Any) -> dict[str, dict[str, int]]:
    """Classes in which a person sees attention or a feed-forward block and `discover` does not: the innermost modules."""
    structure = hc.discover(model)
    found: dict[str, dict[str, int]] = {}
    for what, pattern, blocks in (
        ("attention", ATTENTION, structure.attentions),
        ("feed-forward", FEED_FORWARD, structure.ffns),
    ):
        names = {part.module for b in blocks for part in b.parts} | {b.name for b in blocks}
        classes: dict[str, int] = {}
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if not pattern.search(type(module).__name__) or name == "" or isinstance(module, nn.ModuleList):
                continue
            weights = [p for p in module.parameters() if p.ndim >= 2]
            if len(weights) < (2 if what == "attention" else 1):
                continue
            inner = any(
                n.startswith(f"{name}.") and pattern.search(type(m).__name__) and sum(p.ndim >= 2 for p in m.parameters()) >= 2
                for n, m in modules.items()
            )
            if inner or any(n == name or n.startswith(f"{name}.") or name.startswith(f"{n}.") for n in names):
                continue
            classes[type(module).__name__] = classes.get(type(module).__name__, 0) + 1
        if classes:
            found[what] = classes
    return found
