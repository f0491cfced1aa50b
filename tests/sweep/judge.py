"""One model type, one edit: whether it is exact, by means that do not trust `apply_`."""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

import hf_compress as hc

from .build import NotBuilt, build
from .compare import Wrong, by_hand, in_double, line, other_inputs, same_bits
from .effective import float_form, without_rounding
from .idle import Call, idle_calls
from .load import Died, Loader, doubled, far, outputs_of
from .plans import EDITS, plan_for, special_ids
from .signs import unseen
from .types import class_name
from .use import generates, trains

CLOSE = 1e-5  # of the largest output, fp32


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
                model, inputs, variant = build(kind, name)
                built[name] = Subject(model, inputs), variant
            except NotBuilt as error:
                built[name] = str(error)
        row: dict[str, Any] = {"type": kind, "class": name, "edit": edit}
        if isinstance(built[name], str):
            row["verdict"] = f"not built: {built[name]}"
        else:
            subject, variant = built[name]
            row.update(judge(subject, edit, loader, plain), variant=variant)
        row["seconds"] = round(time.perf_counter() - start, 2)
        row["cpu"] = round(time.process_time() - before, 2)
        yield row


class Subject:
    """A model and inputs for it, and what is asked of them for every edit: found once."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs

    @cached_property
    def batch(self) -> dict[str, Any]:
        return other_inputs(self.model, self.inputs)

    @cached_property
    def before(self) -> list[torch.Tensor]:
        return outputs_of(self.model, self.batch)

    @cached_property
    def is_steady(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.before, outputs_of(self.model, self.batch), strict=True))

    @cached_property
    def unseen(self) -> dict[str, dict[str, int]]:
        return unseen(self.model)

    @cached_property
    def loads_whole(self) -> bool:
        """Whether the model, before anything was done to it, loads from what `save_pretrained` writes."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                copy.deepcopy(self.model).save_pretrained(folder)
                again = type(self.model).from_pretrained(folder).eval()
            except Exception:
                return False
            return same_bits(outputs_of(again, self.inputs), outputs_of(self.model, self.inputs))


class Dead(Exception):
    """Under the mask every output is constant (a ReLU at the end): nothing could be told by it."""


def judge(subject: Subject, edit: str, loader: Loader, plain: Loader | None, seed: int = 0) -> dict[str, Any]:
    model = subject.model
    details: dict[str, Any] = {}
    torch.manual_seed(0)
    try:
        plan = plan_for(edit, model, seed)
    except hc.CompressionError as error:
        nothing = re.search(r"nothing|has no |None of", str(error))
        return {"verdict": "nothing to cut" if nothing else f"refused: {error}", "details": {"plan": str(error)[:200]}}
    except Exception as error:
        return {"verdict": f"wrong: making a plan raised {type(error).__name__}: {line(error)}"}
    missed = subject.unseen
    if EDITS[edit][1] == "cut" and missed:
        details["unseen"] = missed
    if not plan.edits:
        signs = {"KeepHeads": ["attention"], "KeepNeurons": ["feed-forward"]}.get(edit, [])
        details["discover_missed"] = any(missed.get(sign) for sign in signs)
        return {"verdict": "nothing to cut", "details": details}
    try:
        JUDGES[EDITS[edit][1]](copy.deepcopy(model), subject, plan, loader, plain, details)
        verdict = "exact"
    except Dead:
        if seed < 4:
            return judge(subject, edit, loader, plain, seed + 1)
        verdict = "wrong: under every mask that was tried the outputs are constant, so nothing was shown"
    except hc.CompressionError as error:
        verdict = f"refused: {line(error)}"
    except Wrong as error:
        verdict = f"wrong: {error}"
        if "load" in verdict and not subject.loads_whole:
            verdict = "not built: what transformers itself saves of the whole model does not load again as it was"
    except Exception as error:
        verdict = f"wrong: raised {type(error).__name__}: {line(error)}"
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


def _cut(model: Any, subject: Subject, plan: hc.Plan, loader: Loader, plain: Loader | None, details: dict) -> None:
    dense, batch, before = subject.model, subject.batch, subject.before
    if not subject.is_steady:
        raise hc.CompressionError("(sweep) the forward gives something else each time")
    try:
        with hc.mask_(model, plan):
            masked = outputs_of(model, batch)
    except hc.CompressionError:
        raise
    except Exception as error:  # layers between which widths change: then nothing may be cut either
        details["mask"] = f"{type(error).__name__}: {line(error)}"
        masked = []
    if masked and not any(t.std() > 1e-7 for t in masked if t.numel() > 1):
        raise Dead
    hand = by_hand(copy.deepcopy(dense), plan)
    calls, alone = idle_calls(model, plan, lambda: outputs_of(model, batch))
    if calls:  # what this batch does not run
        with hc.mask_(model, plan):
            apart = {name: call(model) for name, call in calls.items()}
    if alone:
        details["cut and not compared"] = alone
    _apply(model, dense, plan, before, batch)
    cut = outputs_of(model, batch)
    if far(masked, before) == 0:
        raise Wrong("the plan has no effect, so nothing was shown")
    details["cut_mask"] = far(cut, masked)
    if hand is not None:
        details["cut_hand"] = far(cut, outputs_of(hand, batch))
    worst = max(details["cut_mask"], details.get("cut_hand", 0.0))
    if worst > CLOSE:
        details["cut_hand_double"] = in_double(model, dense, plan, hand, batch)
        if not details["cut_hand_double"] <= CLOSE / 10:
            raise Wrong(f"cut and mask differ by {worst:.1e} of the largest output")
    for name, call in calls.items():
        ways = {"mask": apart[name]} | ({} if hand is None else {"hand": call(hand)})
        details.setdefault("apart", {})[name] = max(far(call(model), other) for other in ways.values())
        if not details["apart"][name] <= CLOSE:
            raise Wrong(f"{name}, run by itself: cut and mask differ by {details['apart'][name]:.1e} of the largest output")
    _survives(model, cut, batch, loader, plain, details)
    if calls and subject.loads_whole:
        _survive_apart(model, calls)
    if plain is not None:
        generates(model, dense, plan, subject.inputs, details)
        trains(model, dense, plan, batch, details)


def _survive_apart(model: Any, calls: dict[str, Call]) -> None:
    """What the inputs do not run gives the same bits too when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    for name, call in calls.items():
        if not same_bits(call(loaded), call(model)):
            raise Wrong(f"{name}, run by itself: what is loaded differs from what was saved")


def _apply(model: Any, dense: Any, plan: hc.Plan, before: list[torch.Tensor], batch: dict) -> None:
    try:
        hc.apply_(model, plan)
    except BaseException:
        _unchanged(model, dense, before, batch)
        raise


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
            raise Wrong(f"does not load: {line(error)}") from None
        details["load_save"] = far(loaded, now)
        if not same_bits(loaded, now):
            here = outputs_of(type(model).from_pretrained(folder).eval(), batch)
            details["load_here"] = "same bits as there" if same_bits(loaded, here) else "other bits than there"
            if details["load_save"] > 1e-6 or not same_bits(loaded, here):
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


def _kind(model: Any, subject: Subject, plan: hc.Plan, loader: Loader, plain: Loader | None, details: dict) -> None:
    dense, batch, before = subject.model, subject.batch, subject.before
    _apply(model, dense, plan, before, batch)
    now = outputs_of(model, batch)
    inside = [e.module for e in plan] if far(now, before) == 0 else []  # CANINE's projection, which no class logit reads
    if inside and far(outputs_of(model, batch, inside), outputs_of(dense, batch, inside)) == 0:
        raise Wrong("the plan has no effect, so nothing was shown")
    form = outputs_of(float_form(copy.deepcopy(dense), model, plan), batch, inside)
    details["form"] = far(outputs_of(without_rounding(model), batch, inside), form)
    if details["form"] > 1e-4:
        wide = doubled(batch)
        double, other = without_rounding(model), float_form(copy.deepcopy(dense), model, plan)
        details["form_double"] = far(outputs_of(copy.deepcopy(double).double(), wide), outputs_of(other.double(), wide))
    if details["form"] > 1e-4 and not details["form_double"] <= CLOSE / 10:
        raise Wrong(f"differs by {details['form']:.1e} of the largest output from the float form with the same weights")
    _survives(model, now, batch, loader, plain, details)


def _exits(model: Any, subject: Subject, plan: hc.Plan, loader: Loader, plain: Loader | None, details: dict) -> None:
    """With a threshold that nobody reaches, nothing changes; with one that everybody does, the first layers alone give the answer."""
    dense, batch, before = subject.model, subject.batch, subject.before
    _apply(model, dense, plan, before, batch)
    hc.set_exits_(model, threshold=1.0)
    details["never"] = far(outputs_of(model, batch)[:1], before[:1])
    if details["never"] > CLOSE:
        raise Wrong(f"with exits that no row takes, outputs differ by {details['never']:.1e}")
    hc.set_exits_(model, threshold=0.0)
    _survives(model, outputs_of(model, batch), batch, loader, plain, details)
    hidden: list[torch.Tensor] = []
    options: Any = hc.exit_options(model)
    layers = options["stack"]
    if isinstance(layers, str):
        stack = next(s for s in hc.discover(dense).stacks.values() if layers in (s[0].path, s[0].stack))
        layers = [[layer.name] for layer in stack]
    for name in dict.fromkeys(name for layer in layers for name in layer):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, a, k: hidden.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    outputs_of(model, batch)
    details["layers"], details["ran"] = len(layers), len(hidden)
    details["rows in each layer"] = [t.shape[0] if t.numel() else 0 for t in hidden]
    if any(details["rows in each layer"][1:]):
        raise Wrong(f"rows that are all sure go on: {details['rows in each layer']}")


def _vocabulary(model: Any, subject: Subject, plan: hc.Plan, loader: Loader, plain: Loader | None, details: dict) -> None:
    """The logits of the tokens that stay, on texts of tokens that stay, are what they were."""
    dense, inputs = subject.model, subject.inputs
    kept = torch.tensor(next(iter(plan)).tokens)  # type: ignore[union-attr]
    size = dense.get_input_embeddings().num_embeddings
    special = special_ids(dense, size)
    plain_ids = torch.tensor([token for token in kept.tolist() if token not in special])
    batch, mapped = dict(inputs), dict(inputs)
    for name in ("input_ids", "decoder_input_ids"):
        if name in batch:  # ids that go are replaced by others, that mean nothing
            batch[name] = torch.where(torch.isin(batch[name], kept), batch[name], plain_ids[batch[name] % len(plain_ids)])
            mapped[name] = torch.searchsorted(kept, batch[name])
    before = outputs_of(model, batch)
    meant = [t[..., kept] if t.shape[-1] == size else t for t in before]
    _apply(model, dense, plan, before, batch)
    now = outputs_of(model, mapped)
    details["kept_logits"] = far(now, meant)
    if details["kept_logits"] > CLOSE:
        raise Wrong(f"the logits of what is kept differ by {details['kept_logits']:.1e}")
    _survives(model, now, mapped, loader, plain, details)


JUDGES = {"cut": _cut, "kind": _kind, "exits": _exits, "vocabulary": _vocabulary}
