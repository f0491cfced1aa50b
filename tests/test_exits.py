"""Early exits: what a row that leaves computes, what it costs the others, and what is refused."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
import transformers as T
from torch.nn import functional as F

import hf_compress as hc
from hf_compress.exits import (
    CRITERIA,
    attach_exits_,
    check_options,
    collect_exits,
    detach_exits_,
    exit_layers,
    exit_options,
    exits_off,
    resolve_exits,
    runtime,
    set_exits_,
)
from hf_compress.exits.heads import ExitHead
from hf_compress.exits.tune import simulate
from tests.exiting import (
    CLASSIFIERS,
    all_logits,
    batch_for,
    expected,
    halves,
    layer_rows,
    model_with_exits,
    plain_model,
    run,
    spread_heads,
)
from tests.zoo import GPT2, TEXT

# --- criteria -----------------------------------------------------------------------------------------------------


def test_criteria_by_value():
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 4, generator=draw) for _ in range(3)]
    p = np.exp(logits[-1].double().numpy())
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(CRITERIA["confidence"].score(logits), p.max(-1), rtol=1e-5)
    np.testing.assert_allclose(CRITERIA["entropy"].score(logits), -(p * np.log(p)).sum(-1), rtol=1e-4)
    classes = np.stack([x.argmax(-1).numpy() for x in logits])
    streak = [1 if c != b else 2 if b != a else 3 for a, b, c in classes.T]
    assert CRITERIA["patience"].score(logits).tolist() == streak and len(set(streak)) == 3
    # exactly the threshold stays
    assert not CRITERIA["entropy"].leaves(torch.tensor(0.5), 0.5) and not CRITERIA["confidence"].leaves(torch.tensor(0.5), 0.5)


@pytest.mark.parametrize("labels", [2, 3, 7, 151, 1000, 21843])
def test_thresholds_reach_both_ends(labels):
    """The surest row that there is stays at one end, the least sure leaves at the other."""
    sure = torch.zeros(1, labels)
    sure[0, 1] = 1e4
    uniform = torch.cat([torch.zeros(1, labels), torch.full((1, labels), 0.1), torch.full((1, labels), -3.7e3)])
    for name, nobody, everybody in (("confidence", 1.0, 0.0), ("entropy", 0.0, math.log(labels))):
        how = CRITERIA[name]
        assert not how.leaves(how.score([sure]), nobody).any() and how.leaves(how.score([sure]), everybody).all()
        assert not how.leaves(how.score([uniform]), nobody).any() and how.leaves(how.score([uniform]), everybody).all()
    np.testing.assert_allclose(CRITERIA["entropy"].score([uniform]), math.log(labels), rtol=1e-6)
    assert CRITERIA["confidence"].score([sure]).item() == 1.0 and CRITERIA["entropy"].score([sure]).item() == 0.0


@pytest.mark.parametrize(
    "criterion, bad",
    [
        ("confidence", (-0.1, 1.1, -1, "x", True, None, [0.5], [0.5, 0.5, 0.5], float("nan"))),
        ("entropy", (-0.1, math.log(3) + 0.1, "x", [0.1], float("inf"))),
        ("patience", (0, 4, 1.5, "x", [1, 1], True, float("inf"), float("nan"))),
    ],
)
def test_thresholds_without_meaning_are_refused(criterion, bad):
    model = model_with_exits(criterion=criterion)
    before = exit_options(model)
    for threshold in bad:
        if threshold is None:
            continue
        with pytest.raises(hc.CompressionError, match="threshold"):
            set_exits_(model, threshold=threshold)
        with pytest.raises(hc.CompressionError, match="threshold"):
            resolve_exits(plain_model(), (0, 1), criterion, threshold)
    assert exit_options(model) == before
    with pytest.raises(hc.CompressionError, match="Known: entropy"):
        set_exits_(model, criterion="margin", threshold=0.5)
    other = "entropy" if criterion != "entropy" else "confidence"
    with pytest.raises(hc.CompressionError, match="give both"):
        set_exits_(model, criterion=other)


# --- what rows that leave compute -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_family(name):
    plain = plain_model(name)
    batch = batch_for(plain)
    dense = run(plain, batch).logits
    model = plain_model(name)
    keys = list(model.state_dict())
    options = resolve_exits(model, [0, 1])
    assert options["pool"] == CLASSIFIERS[name][3]
    attach_exits_(model, options)
    spread_heads(model)
    assert [k for k in model.state_dict() if not k.startswith("exit_heads.")] == keys

    set_exits_(model, threshold=1.0)
    assert torch.equal(run(model, batch).logits, dense)  # nobody leaves: to the bit
    assert exit_layers(model).tolist() == [2] * 8 and layer_rows(model, batch) == [8, 8, 8]

    logits = all_logits(model, batch)
    assert torch.equal(logits[-1], dense)
    thresholds = halves(model, batch)
    set_exits_(model, threshold=thresholds)
    wanted, taken = expected(logits, thresholds)
    found = run(model, batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert exit_layers(model).tolist() == taken.tolist()
    left = [int((taken == i).sum()) for i in range(2)]
    assert left == [4, 2]
    assert layer_rows(model, batch) == [8, 8 - left[0], 8 - sum(left)]

    alone = [run(model, {k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(8)]
    torch.testing.assert_close(torch.cat(alone), found, atol=1e-5, rtol=1e-5)

    set_exits_(model, threshold=0.01)
    torch.testing.assert_close(run(model, batch).logits, logits[0], atol=1e-5, rtol=1e-5)
    assert layer_rows(model, batch) == [8, 0, 0]  # layers that nobody needs do not run

    with exits_off(model):
        assert torch.equal(run(model, batch).logits, dense)
    detach_exits_(model)
    assert torch.equal(run(model, batch).logits, dense)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert (
        not model._forward_hooks
        and not model._forward_pre_hooks
        and "_exits" not in str([m.__dict__.keys() for m in model.modules()])
    )


@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta_v2", "modernbert", "gpt2", "llama"])
def test_a_batch_as_large_as_anything_else(name):
    """Rows = tokens = heads, = twice the span of relative positions, = hidden size: no argument is taken for a batch."""
    for count, length in ((4, 4), (16, 16), (16, 5), (64, 3), (2, 2), (3, 3)):
        model = model_with_exits(name)
        batch = batch_for(model, count, length)
        logits, thresholds = all_logits(model, batch), halves(model, batch)
        set_exits_(model, threshold=thresholds)
        wanted, taken = expected(logits, thresholds)
        torch.testing.assert_close(run(model, batch).logits, wanted, atol=1e-5, rtol=1e-5)
        assert exit_layers(model).tolist() == taken.tolist() and 0 < int((taken == 0).sum()) < count


def test_arguments_that_are_per_row_only_sometimes():
    """The same model with position ids shared by all rows, then with each row's own; no padding, then some."""
    model = model_with_exits("llama")
    ids = batch_for(model, 6, 6)["input_ids"].clamp_min(5)
    shifted = torch.arange(6).repeat(6, 1) + torch.arange(6)[:, None]
    mask = (torch.arange(6) < torch.arange(1, 7)[:, None]).long()
    for more in ({}, {"position_ids": torch.arange(6)[None]}, {"position_ids": shifted}, {"attention_mask": mask}, {}):
        batch = {"input_ids": ids, **more}
        logits, thresholds = all_logits(model, batch), halves(model, batch)
        set_exits_(model, threshold=thresholds)
        torch.testing.assert_close(run(model, batch).logits, expected(logits, thresholds)[0], atol=1e-5, rtol=1e-5)
    assert {1, 0} == set(model._exits.steps.by_row.values())


def test_eager_attention_and_positional_arguments():
    model = plain_model()
    model.set_attn_implementation("eager")
    attach_exits_(model, resolve_exits(model, [0, 1]))
    spread_heads(model)
    batch = batch_for(model)
    thresholds = halves(model, batch)
    set_exits_(model, threshold=thresholds)
    wanted, _ = expected(all_logits(model, batch), thresholds)
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(found.logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_real_run_is_what_the_simulation_says(criterion):
    model = model_with_exits(after=(0, 1), criterion=criterion)
    batch = batch_for(model, 24)
    logits = all_logits(model, batch)
    scores = torch.stack([CRITERIA[criterion].score(list(logits[: k + 1])) for k in range(2)])
    for threshold in {"patience": (1, 2, 3), "entropy": (0.0, 0.9, 1.0, 1.05), "confidence": (0.4, 0.5, 0.6, 1.0)}[criterion]:
        set_exits_(model, threshold=threshold)
        taken = simulate(scores, criterion, threshold)
        torch.testing.assert_close(run(model, batch).logits, logits[taken, torch.arange(24)], atol=1e-5, rtol=1e-5)
        assert exit_layers(model).tolist() == taken.tolist()


@pytest.mark.parametrize("pool", ["first", "mean", "last"])
def test_what_a_head_reads(pool):
    model = model_with_exits("gpt2", after=(1,), pool=pool)
    batch = batch_for(model)
    with exits_off(model):
        hidden = run(model, batch, output_hidden_states=True).hidden_states[2].double().numpy()
    head = model.exit_heads["1"]
    real = batch["attention_mask"].numpy()[:, :, None]
    last = real.sum((1, 2)) - 1
    pooled = {"first": hidden[:, 0], "last": hidden[np.arange(8), last], "mean": (hidden * real).sum(1) / real.sum(1)}[pool]
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + head.norm.eps)
    normed = normed * head.norm.weight.detach().numpy() + head.norm.bias.detach().numpy()
    wanted = normed @ head.out.weight.detach().double().numpy().T + head.out.bias.detach().numpy()
    np.testing.assert_allclose(all_logits(model, batch)[0].numpy(), wanted, atol=1e-4)


def test_padding_on_the_left_reads_the_last_token():
    model = model_with_exits("llama", after=(0,))
    ids = torch.randint(5, 99, (4, 6))
    left, right = F.pad(ids, (3, 0)), F.pad(ids, (0, 3))
    masks = [F.pad(torch.ones_like(ids), pad) for pad in ((3, 0), (0, 3))]
    positions = F.pad(torch.arange(6).repeat(4, 1), (3, 0))
    one = all_logits(model, {"input_ids": left, "attention_mask": masks[0], "position_ids": positions})
    other = all_logits(model, {"input_ids": right, "attention_mask": masks[1]})
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# --- what a model gives ----------------------------------------------------------------------------------------------


def test_outputs_are_the_models_own(caplog):
    model = model_with_exits()
    batch = batch_for(model)
    set_exits_(model, threshold=halves(model, batch))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    out = run(model, batch, labels=labels)
    assert type(out).__name__ == "SequenceClassifierOutput" and list(out) == ["loss", "logits"]
    # the loss is that of the logits that are given, not of rows that left long ago
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    loss, logits = run(model, batch, labels=labels, return_dict=False)
    assert torch.equal(logits, out.logits) and torch.equal(loss, out.loss)
    (logits,) = run(model, batch, return_dict=False)
    assert torch.equal(logits, out.logits)
    # all states of all rows were asked for, so all rows run, and that is said
    full = run(model, batch, output_hidden_states=True)
    assert "No row leaves" in caplog.text
    assert len(full.hidden_states) == 4 and exit_layers(model).tolist() == [2] * 8
    with exits_off(model):
        assert torch.equal(run(model, batch).logits, full.logits)
    decoder = model_with_exits("gpt2", threshold=0.01)
    batch = batch_for(decoder)
    assert run(decoder, batch).past_key_values is None and exit_layers(decoder).tolist() == [0] * 8
    assert run(decoder, batch, use_cache=True).past_key_values is not None and exit_layers(decoder).tolist() == [2] * 8


def test_gradients_flow_through_rows_that_left():
    model = model_with_exits(threshold=0.01, pool="first").requires_grad_(True)
    batch = batch_for(model)
    thresholds = halves(model, batch)
    set_exits_(model, threshold=thresholds)
    model(**batch).logits.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with collect_exits(model) as kept:  # detached, so the same is computed by hand
        run(model, batch)
    _, taken = expected(kept[0], thresholds)
    set_exits_(model, threshold=1.0)
    outs = []
    stack = model.get_submodule(exit_options(model)["stack"])
    handles = [layer.register_forward_hook(lambda m, a, o: outs.append(o)) for layer in stack]
    final = model(**batch).logits
    for handle in handles:
        handle.remove()
    every = torch.stack([model.exit_heads["0"](outs[0]), model.exit_heads["1"](outs[1]), final])
    every[taken, torch.arange(8)].sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_copies_are_independent():
    model = model_with_exits(threshold=0.01)
    batch = batch_for(model)
    layer = model.get_submodule(exit_options(model)["stack"])[0]
    memo: dict = {}
    alone = copy.deepcopy(layer, memo)
    assert sum(isinstance(m, torch.nn.Module) for m in memo.values()) == len(list(layer.modules()))  # not the model
    hidden = torch.randn(2, 3, 64)
    torch.testing.assert_close(alone(hidden), layer(hidden))
    twin = copy.deepcopy(model)
    set_exits_(twin, threshold=1.0)
    with torch.no_grad():
        twin.exit_heads["0"].out.bias += 5.0
    assert exit_options(model)["threshold"] == 0.01 and run(model, batch).logits.shape == (8, 3)
    assert exit_layers(model).tolist() == [0] * 8
    run(twin, batch)
    assert exit_layers(twin).tolist() == [2] * 8 and exit_layers(model).tolist() == [0] * 8
    before = run(twin, batch).logits
    detach_exits_(model)
    assert torch.equal(run(twin, batch).logits, before) and twin._forward_hooks and not model._forward_hooks
    detach_exits_(twin)
    assert torch.equal(run(twin, batch).logits, run(model, batch).logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_pickles_are_whole_and_independent(name, tmp_path, monkeypatch):
    model = model_with_exits(name, threshold=0.0)
    batch = batch_for(model)
    thresholds = halves(model, batch)
    set_exits_(model, threshold=thresholds)
    wanted, kinds = run(model, batch).logits, [type(m).__qualname__ for m in model.modules()]
    torch.save(model, tmp_path / "model.pt")
    written = [pickle.dumps(model, protocol) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)]
    monkeypatch.setattr(runtime, "EXITING", {})  # as in a process that has attached no exits yet
    twins = [*map(pickle.loads, written), torch.load(tmp_path / "model.pt", weights_only=False)]
    for twin in twins:
        assert torch.equal(run(twin, batch).logits, wanted) and [type(m).__qualname__ for m in twin.modules()] == kinds
        set_exits_(twin, threshold=1.0)
        run(twin, batch)
        assert exit_layers(twin).tolist() == [2] * 8 and exit_options(model)["threshold"] == thresholds
        detach_exits_(twin)
        assert {type(m) for m in twin.modules()} == {type(m) for m in plain_model(name).modules()}
    assert torch.equal(run(model, batch).logits, wanted)


def test_a_forward_that_fails_leaves_nothing_behind():
    model = model_with_exits(threshold=0.01)
    with pytest.raises(IndexError):
        run(model, {"input_ids": torch.tensor([[500]])})
    assert model._exits.now is None
    assert run(model, batch_for(model)).logits.shape == (8, 3)


def test_meta_device_then_weights():
    """What the loader does: modules first, with nothing in them, and everything comes from the state dict."""
    model = model_with_exits(threshold=0.5)
    with torch.device("meta"):
        shell = T.BertForSequenceClassification(model.config)
    attach_exits_(shell, exit_options(model))
    assert all(p.is_meta for p in shell.exit_heads.parameters()) and not list(shell.exit_heads.buffers())
    loaded = copy.deepcopy(model)
    detach_exits_(loaded)
    attach_exits_(loaded, exit_options(model))
    assert shell.state_dict().keys() == loaded.state_dict().keys()
    loaded.load_state_dict(model.state_dict())
    batch = batch_for(model)
    assert torch.equal(run(loaded, batch).logits, run(model, batch).logits)


def test_dtype_follows_the_model():
    model = plain_model().bfloat16()
    attach_exits_(model, resolve_exits(model, [0], threshold=0.01))
    assert {p.dtype for p in model.exit_heads.parameters()} == {torch.bfloat16}
    assert run(model, batch_for(model)).logits.dtype == torch.bfloat16
    assert exit_layers(model).tolist() == [0] * 8


def test_pipeline(tmp_path):
    model = model_with_exits(threshold=0.01)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    tokenizer = T.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    pipe = T.pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    texts = ["good bad", "bad", "good good good"]
    found = pipe(texts)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    scores = torch.softmax(all_logits(model, encoded)[0], -1).amax(-1)  # everything leaves at the first exit
    np.testing.assert_allclose([f["score"] for f in found], scores, rtol=1e-4)


def test_a_head_alone():
    head = ExitHead(4, 3, "mean")
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0], [0.2] * 5])
    torch.testing.assert_close(head(hidden, mask)[0], head(hidden[:1, :2])[0])
    torch.testing.assert_close(head(hidden, mask)[1], head(hidden[1:])[0])
    with pytest.raises(hc.CompressionError, match="attention mask"):
        head(hidden, mask[:, :3])


# --- refusals --------------------------------------------------------------------------------------------------------


def refused_models():
    text = dict(TEXT)
    yield "tokens", T.BertForTokenClassification(T.BertConfig(**text)), "one row of 2 class logits"
    yield "answers", T.BertForQuestionAnswering(T.BertConfig(**text)), "no logits"
    yield "no head", T.BertModel(T.BertConfig(**text)), "no logits"
    yield "generation", T.GPT2LMHeadModel(T.GPT2Config(**GPT2)), "one row of 2 class logits"
    yield "regression", T.BertForSequenceClassification(T.BertConfig(num_labels=1, **text)), "Regression"
    many = T.BertConfig(problem_type="multi_label_classification", **text)
    yield "many labels", T.BertForSequenceClassification(many), "multi_label"
    yield "no layers", torch.nn.Linear(2, 2), "transformers model"


def test_models_that_cannot_have_exits_are_refused():
    for what, model, message in refused_models():
        before = {n: type(m) for n, m in model.named_modules()}
        with pytest.raises(hc.CompressionError, match=message):
            resolve_exits(model, [0])
        assert {n: type(m) for n, m in model.named_modules()} == before, what


def test_bad_options_are_refused_before_anything_changes():
    model = plain_model()
    for after, message in (
        ([2], "0 to 1"), ([7], "0 to 1"), ([], "once"), ([0, 0], "once"), ([-1], "once"), ("01", "list of layers"),
        ([0.5], "once"), ([True], "once"), (1, "list of layers"),
    ):  # fmt: skip
        with pytest.raises(hc.CompressionError, match=message):
            resolve_exits(model, after)
    for wrong, message in (
        ({"distil": 1.5}, "distil"), ({"temperature": 0}, "temperature"), ({"weights": [1.0]}, "weights"),
        ({"weights": "x"}, "weights"), ({"weights": [0, 0, 0]}, "weights"), ({"pool": "max"}, "pool"), ({"criterion": "x"}, "Known"),
    ):  # fmt: skip
        with pytest.raises(hc.CompressionError, match=message):
            resolve_exits(model, [0, 1], **wrong)
    good = resolve_exits(model, [0, 1])
    for wrong, message in (
        ({"stack": "bert.nowhere"}, "no list of layers"), ({"stack": "bert.encoder"}, "no list of layers"), ({"after": [2]}, "0 to 1"),
        ({"num_labels": 1}, "num_labels"), ({"hidden_size": "64"}, "hidden_size"), ({"extra": 1}, "extra"), ({"stack": 3}, "stack"),
    ):  # fmt: skip
        with pytest.raises(hc.CompressionError, match=message):
            attach_exits_(model, {**good, **wrong})
    assert not hasattr(model, "exit_heads") and not model._forward_hooks
    assert check_options(json.loads(json.dumps(good))) == good
    with pytest.raises(hc.CompressionError, match="has no exits"):
        set_exits_(model, enabled=True)
    assert exit_options(model) is None
    attach_exits_(model, good)
    with pytest.raises(hc.CompressionError, match="already"):
        attach_exits_(model, good)
    with pytest.raises(hc.CompressionError, match="run the model first"):
        exit_layers(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_model_writes_between_its_layers_is_seen(mode):
    model = model_with_exits()
    encoder, batch = model.bert.encoder, batch_for(model)

    def forward(hidden_states, attention_mask=None, **kwargs):
        for layer in encoder.layer:
            out = layer(hidden_states, attention_mask)
            hidden_states = out[0] if isinstance(out, tuple) else out
            hidden_states[:, :4].mul_(torch.linspace(-2, 2, 4)[None, :, None])
        return T.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    encoder.forward = forward
    set_exits_(model, threshold=(thresholds := halves(model, batch)))
    wanted, taken = expected(all_logits(model, batch), thresholds)
    with mode():
        found = model(**batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert exit_layers(model).tolist() == taken.tolist() and len(set(taken.tolist())) == 3


def test_layers_that_run_twice_and_packed_rows_are_refused():
    model = model_with_exits(threshold=1.0)
    stack = model.get_submodule(exit_options(model)["stack"])
    stack.append(stack[0])
    with pytest.raises(hc.CompressionError, match="ran twice"):
        run(model, batch_for(model))
    model = model_with_exits("llama")
    with pytest.raises(hc.CompressionError, match="packs several"):
        run(model, batch_for(model), cu_seq_lens_q=torch.tensor([0, 4]))


class _Mixing(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden - hidden.mean(0, keepdim=True))


class _OneMore(torch.nn.Module):
    """Tells its layer how many rows there are in a tensor of another shape."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *args, **kwargs):
        return self.inner(hidden, *args, **kwargs), torch.zeros(len(hidden) + 1)


def test_models_whose_layers_cannot_run_on_fewer_rows_are_refused():
    """Found by trying, before anything is kept: rows that read each other, tensors whose rows cannot be told apart."""
    for change, message in (
        (lambda layer: setattr(layer.intermediate, "dense", _Mixing(layer.intermediate.dense)), "come out otherwise"),
        (None, "cannot be told apart"),
    ):
        model = plain_model("bert")
        stack = model.bert.encoder.layer
        if change:
            change(stack[1])
        else:
            stack[1] = _OneMore(stack[1])
            stack[2].register_forward_pre_hook(
                lambda m, args: (args[0][0] if isinstance(args[0], tuple) else args[0], *args[1:])
            )
        classes, record = [type(m) for m in model.modules()], model.config.to_dict()
        with pytest.raises(hc.CompressionError, match=f"none were added: .*{message}"):
            hc.apply_(model, hc.Plan([hc.AddExits([0])]))
        assert [type(m) for m in model.modules()] == classes and model.config.to_dict() == record
        assert "exit_heads" not in model._modules and not model._forward_hooks


class _Masked(torch.nn.Module):
    """A layer that takes its mask in another form."""

    def __init__(self, inner, mask):
        super().__init__()
        self.inner, self.mask = inner, mask

    def forward(self, hidden, mask=None):
        return self.inner(hidden, self.mask(mask, len(hidden)))


def _bert_with_masks(form):
    """BERT whose layers are given the padding of all rows once for each of two heads: heads first, rows first, or not at all."""
    model, kept = plain_model("bert"), []
    encoder = model.bert.encoder
    undo = {
        "heads first": lambda mask, rows: mask[:rows],
        "rows first": lambda mask, rows: mask[::2],
        "outside": lambda mask, rows: kept[0][:rows],
    }[form]
    for i, layer in enumerate(encoder.layer):
        encoder.layer[i] = _Masked(layer, undo)

    def forward(hidden_states, attention_mask=None, **kwargs):
        if attention_mask is None:
            attention_mask = hidden_states.new_zeros(len(hidden_states), 1, 1, hidden_states.shape[1])
        else:
            attention_mask = torch.where(attention_mask[:, :, :1], 0.0, -1e4)
        kept[:] = [attention_mask]
        mask = attention_mask.repeat(2, 1, 1, 1) if form == "heads first" else attention_mask.repeat_interleave(2, 0)
        for layer in encoder.layer:
            hidden_states = layer(hidden_states, *([] if form == "outside" else [mask]))
            hidden_states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        return T.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    encoder.forward = forward
    return model


def test_each_row_keeps_its_own_mask():
    """Masks of rows without padding are all equal and tell nothing; exits are tried with other padding in each row."""
    for form, message in (("heads first", "cannot be told apart"), ("outside", "come out otherwise")):
        model = _bert_with_masks(form)
        with pytest.raises(hc.CompressionError, match=f"none were added: .*{message}"):
            hc.apply_(model, hc.Plan([hc.AddExits([0])]))
    good, bad = _bert_with_masks("rows first"), _bert_with_masks("heads first")
    batch = batch_for(good)
    whole = {"input_ids": batch["input_ids"].clamp_min(5), "attention_mask": torch.ones_like(batch["input_ids"])}
    for model in (good, bad):
        attach_exits_(model, resolve_exits(model, [0, 1]))
        spread_heads(model)
    for model, one in ((good, whole), (good, batch), (bad, whole)):  # without padding first
        set_exits_(model, threshold=(thresholds := halves(model, one)))
        wanted, taken = expected(all_logits(model, one), thresholds)
        torch.testing.assert_close(run(model, one).logits, wanted, atol=1e-5, rtol=1e-5)
        assert exit_layers(model).tolist() == taken.tolist() and len(set(taken.tolist())) == 3
    with pytest.raises(hc.CompressionError, match="cannot be told apart"):
        set_exits_(bad, threshold=halves(bad, batch))
        run(bad, batch)
    # a ninth row, the first once more, fits both orders of two heads where rows 0, 1 and 7 have no padding; the others tell
    few = {**whole, "attention_mask": torch.ones_like(whole["attention_mask"])}
    for row in (2, 3, 4, 5, 6):
        few["attention_mask"][row, row:] = 0
    for form in ("rows first", "heads first"):
        model = _bert_with_masks(form)
        attach_exits_(model, resolve_exits(model, [0, 1]))
        spread_heads(model)
        set_exits_(model, threshold=(thresholds := halves(model, few)))
        if form == "heads first":
            with pytest.raises(hc.CompressionError, match="cannot be told apart"):
                run(model, few)
        else:
            wanted, _ = expected(all_logits(model, few), thresholds)
            torch.testing.assert_close(run(model, few).logits, wanted, atol=1e-5, rtol=1e-5)


def test_exits_are_added_without_gradients():
    model = plain_model("bert")
    with torch.no_grad():
        hc.apply_(model, hc.Plan([hc.AddExits([0])]))
    assert hc.exit_options(model)["pool"] in ("first", "mean")
