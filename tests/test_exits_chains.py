"""Exits in models that are no single list of like layers: stages, shared layers, two stacks, layers in several lists."""

import copy
import random

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.exits import check_options, collect_exits, exit_options, exits_off, resolve_exits, set_exits_, take_exit_losses
from hf_compress.exits.chain import _through
from hf_compress.probe import example_inputs
from tests.exiting import all_logits, expected, halves, run, spread_heads, without_dropout
from tests.sweep.build import build
from tests.trainers import trainer
from tests.zoo import TEXT

# type -> (class, how many layers, those that exits sit after, what the heads read)
MODELS = {
    "resnet": (T.ResNetForImageClassification, 8, [0, 3], "maps"),
    "convnext": (T.ConvNextForImageClassification, 8, [0, 3], "maps"),
    "swin": (T.SwinForImageClassification, 8, [1, 2], "mean"),
    "levit": (T.LevitForImageClassification, 16, [0, 5], "mean"),
    "mobilevit": (T.MobileViTForImageClassification, 7, [0, 4], "maps"),
    "albert": (T.AlbertForSequenceClassification, 3, [0, 1], "mean"),
    "funnel": (T.FunnelForSequenceClassification, 12, [1, 5], ["mean", "first"]),  # tokens are pooled after the fourth
    "xlm": (T.XLMForSequenceClassification, 3, [0, 1], "mean"),
    "bart": (T.BartForSequenceClassification, 6, [1, 3], ["mean", "last"]),
    "t5": (T.T5ForSequenceClassification, 6, [1, 4], ["mean", "last"]),
    "hgnet_v2": (T.HGNetV2ForImageClassification, 5, [0, 3], "maps"),
    # one list, but more than hidden states goes from layer to layer, or has several entries a row
    "bloom": (T.BloomForSequenceClassification, 3, [0, 1], "last"),
    "lilt": (T.LiltForSequenceClassification, 3, [0, 1], "mean"),
    "longformer": (T.LongformerForSequenceClassification, 3, [0, 1], "first"),  # pads to its window
}


def built(name, rows=6):
    model, _, _ = build(name, MODELS[name][0].__name__)
    batch = example_inputs(model, rows)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in norms:  # with the statistics of these images, so that random weights do not damp what differs between them
        module.momentum = 1.0
        module.train()
    if norms:
        run(model, batch)
    return model.eval(), batch


def steps_of(model):
    stack = exit_options(model)["stack"]
    return [[f"{stack}.{i}"] for i in range(len(model.get_submodule(stack)))] if isinstance(stack, str) else stack


def rows_in_steps(model, batch):
    """How many rows each call of a step after the first layer ran on, in order."""
    seen = []
    names = dict.fromkeys(name for layer in steps_of(model)[1:] for name in layer)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, k: seen.append(len(a[0] if a else k["hidden_states"])), with_kwargs=True
        )
        for name in names
    ]
    run(model, batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_rows_leave_and_the_others_do_not_notice(name):
    _, depth, after, pool = MODELS[name]
    model, batch = built(name)
    count = 6
    dense = run(model, batch).logits
    classes, keys = {n: type(m) for n, m in model.named_modules()}, list(model.state_dict())
    hc.apply_(model, hc.Plan([hc.AddExits(after)]))
    options = exit_options(model)
    assert options["pool"] == pool and len(steps_of(model)) == depth == model._exits.depth
    spread_heads(model)
    set_exits_(model, threshold=1.0)
    assert torch.equal(run(model, batch).logits, dense)  # nobody leaves: to the bit
    assert hc.exit_layers(model).tolist() == [depth - 1] * count

    logits = all_logits(model, batch)
    assert torch.equal(logits[-1], dense)
    set_exits_(model, threshold=(thresholds := halves(model, batch)))
    wanted, taken = expected(logits, thresholds)
    found = run(model, batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    left = torch.tensor([*after, depth - 1])[taken]
    assert hc.exit_layers(model).tolist() == left.tolist() and len(set(left.tolist())) > 1
    # a step runs on the rows that have not left before it
    steps = [(i, step) for i, layer in enumerate(steps_of(model)) for step in layer]
    several = {step for i, step in steps if i == 0} & {step for i, step in steps if i > 0}  # one layer that runs again
    there = [int((left >= i).sum()) for i, step in steps if i > 0 or step in several]
    assert rows_in_steps(model, batch) == there

    set_exits_(model, threshold=0.01)
    torch.testing.assert_close(run(model, batch).logits, logits[0], atol=1e-5, rtol=1e-4)
    again = rows_in_steps(model, batch)
    assert again == [count] * len([i for i, step in steps if (i > 0 or step in several) and i <= after[0]])

    hc.detach_exits_(model)
    assert torch.equal(run(model, batch).logits, dense) and list(model.state_dict()) == keys
    assert {n: type(m) for n, m in model.named_modules()} == classes


def test_the_first_forward_gives_what_the_next_ones_do():
    """Also in what nobody reads, as an encoder's states of rows that left in it."""
    model, batch = built("t5")
    hc.apply_(model, hc.Plan([hc.AddExits([1, 4])]))
    hc.set_exits_(model, threshold=0.0)
    first, second = ({k: v for k, v in model(**batch).items() if isinstance(v, torch.Tensor)} for _ in range(2))
    assert "encoder_last_hidden_state" in first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_same_rows_in_other_batches():
    """One by one, and in a batch of another size: what was learned of tensors in one batch holds in the next."""
    for name in ("swin", "xlm", "bloom"):
        model, batch = built(name)
        hc.apply_(model, hc.Plan([hc.AddExits(MODELS[name][2])]))
        spread_heads(model)
        set_exits_(model, threshold=halves(model, batch))
        found = run(model, batch).logits
        for size in (1, 3, 4):
            parts = [run(model, {k: v[i : i + size] for k, v in batch.items()}).logits for i in range(0, 6, size)]
            torch.testing.assert_close(torch.cat(parts), found, atol=1e-5, rtol=1e-4)


def test_heads_on_feature_maps_by_value():
    model, batch = built("resnet")
    hc.apply_(model, hc.Plan([hc.AddExits([2])]))
    spread_heads(model)
    seen = []
    model.get_submodule(steps_of(model)[2][-1]).register_forward_hook(lambda m, a, o: seen.append(o.double().numpy()))
    logits = all_logits(model, batch)[0].numpy()
    head, pooled = model.exit_heads["2"], seen[0].mean((2, 3))
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + head.norm.eps)
    normed = normed * head.norm.weight.detach().numpy() + head.norm.bias.detach().numpy()
    np.testing.assert_allclose(logits, normed @ head.out.weight.detach().numpy().T + head.out.bias.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "albert", "bart"])
def test_saved_and_loaded(name, tmp_path, fresh, plain):
    model, batch = built(name)
    hc.apply_(model, hc.Plan([hc.AddExits(MODELS[name][2])]))
    spread_heads(model)
    set_exits_(model, threshold=halves(model, batch))
    found = run(model, batch).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert exit_options(loaded) == exit_options(model) and torch.equal(run(loaded.eval(), batch).logits, found)
    assert torch.equal(fresh.outputs(type(model).__name__, tmp_path, batch)["logits"], found)
    with pytest.raises(RuntimeError, match="size"):
        plain.outputs(type(model).__name__, tmp_path, batch)


def test_joint_training_reaches_every_exit():
    model, batch = built("convnext")
    hc.apply_(model, hc.Plan([hc.AddExits([0, 4], weights=(1.0, 2.0, 3.0))]))
    spread_heads(model)
    labels = torch.arange(6) % 2
    logits = all_logits(model, batch)
    losses = [torch.nn.functional.cross_entropy(one, labels).item() for one in logits]
    model.train()
    loss = model(**batch, labels=labels).loss
    assert loss.item() == pytest.approx((losses[0] + 2 * losses[1] + 3 * losses[2]) / 6, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.exit_heads.parameters())


def test_a_layer_that_runs_many_times_is_trained_in_a_trainer(tmp_path):
    model = T.AlbertForSequenceClassification(T.AlbertConfig(**dict(TEXT, num_hidden_layers=3, embedding_size=16)))
    t = trainer(tmp_path, [hc.EarlyExitCallback([0, 1], threshold=0.01)], model=model, max_steps=2, logging_steps=1)
    before = {n: p.detach().clone() for n, p in t.model.exit_heads.named_parameters()}
    t.train()
    assert all(not torch.equal(p, before[n]) for n, p in t.model.exit_heads.named_parameters())
    assert any("exit_loss_1" in entry for entry in t.state.log_history)
    t.eval_dataset = t.train_dataset
    assert t.evaluate()["eval_mean_exit_depth"] == 1.0


def test_gradients_of_rows_that_left_early():
    """What is handed on in the place of rows that left must not make gradients that are no numbers."""
    model, batch = built("convnext")
    hc.apply_(model, hc.Plan([hc.AddExits([0, 4])]))
    spread_heads(model)
    set_exits_(model, threshold=halves(model, batch))
    model(**batch).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.exit_heads["0"].out.weight.grad.any() and model.classifier.weight.grad.any()


def test_thresholds_are_tuned_on_stages():
    model, batch = built("swin", 16)
    hc.apply_(model, hc.Plan([hc.AddExits([0, 3])]))
    spread_heads(model)
    found = hc.tune_exits_(model, [{**batch, "labels": torch.arange(16) % 2}], mean_depth=5.0)
    run(model, batch)
    assert (hc.exit_layers(model) + 1).double().mean().item() == pytest.approx(found["mean_depth"]) and found["mean_depth"] <= 5


def test_caches_that_nobody_asked_for_are_not_handed_on():
    """XLM makes one by default; of rows that left it would lack entries."""
    model, batch = built("xlm")
    hc.apply_(model, hc.Plan([hc.AddExits([0])]))
    set_exits_(model, threshold=0.01)
    out = run(model, batch)
    assert not any(isinstance(value, T.Cache) for value in out.values())


def test_what_every_path_passes_through():
    """Counting paths finds the dominators: against taking each node out and walking the graph."""
    draw = random.Random(0)
    for _ in range(20):
        leaf = torch.ones(2, requires_grad=True)
        values = [leaf * 2.0]
        for _ in range(12):
            parts = draw.sample(values[-3:], min(len(values), draw.choice([1, 1, 2])))
            values.append(sum(parts[1:], parts[0]) + (0.0 if len(parts) > 1 else 1.0))
        root = (values[-1] * 3.0).grad_fn
        nodes = [value.grad_fn for value in values]

        def reaches(without, root=root, leaf=leaf):
            stack, seen = [root], {without}
            while stack:
                node = stack.pop()
                if node is None or node in seen:
                    continue
                if getattr(node, "variable", None) is leaf:
                    return True
                seen.add(node)
                stack += [follower for follower, _ in node.next_functions]
            return False

        under = set()
        stack = [root]
        while stack:
            node = stack.pop()
            if node is not None and node not in under:
                under.add(node)
                stack += [follower for follower, _ in node.next_functions]
        wanted = [0 if node in under and not reaches(node) else None for node in nodes]
        assert list(_through(root, nodes, [leaf])) == wanted and 0 in wanted


def test_what_cannot_have_exits_says_why():
    squeeze = T.SqueezeBertForSequenceClassification(T.SqueezeBertConfig(embedding_size=64, **TEXT)).eval()
    with pytest.raises(hc.CompressionError, match="calls the forward of its layers"):
        resolve_exits(squeeze, [0])
    xlnet = T.XLNetForSequenceClassification(T.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=2, d_inner=48)).eval()
    with pytest.raises(hc.CompressionError, match="does not come first"):
        resolve_exits(xlnet, [0])
    model, _ = built("resnet")
    with pytest.raises(hc.CompressionError, match="reads one token"):
        resolve_exits(model, [0], pool="last")
    with pytest.raises(hc.CompressionError, match="0 to 6"):
        resolve_exits(model, [7])
    good = resolve_exits(model, [0, 3])
    for wrong, message in (
        ({"stack": []}, "of each layer"), ({"stack": [["a"], []]}, "of each layer"), ({"stack": [[1]]}, "of each layer"),
        ({"hidden_size": [8]}, "for each"), ({"hidden_size": [8, "x"]}, "whole number"), ({"pool": ["maps"]}, "for each"),
        ({"pool": ["maps", "x"]}, "one of"),
    ):  # fmt: skip
        with pytest.raises(hc.CompressionError, match=message):
            check_options({**good, **wrong})
    with pytest.raises(hc.CompressionError, match="nowhere"):
        hc.exits.attach_exits_(model, {**good, "stack": [["nowhere"], *good["stack"][1:]]})
    hc.apply_(model, hc.Plan([hc.AddExits([0])]))
    group = hc.channel_groups(model)[0]
    with pytest.raises(hc.CompressionError, match="cut channels first"):
        hc.apply_(model, hc.Plan([hc.KeepChannels(group.name, range(group.size - 1))]))
    with exits_off(model):
        assert run(model, example_inputs(model)).logits.shape == (2, 2)


def test_layers_that_are_dropped_at_random_leave_the_joint_loss():
    """What was reached is counted by layer, and weighs one together; exits that were not reached learn nothing."""
    config = T.Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(4, 4), conv_kernel=(4, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4, layerdrop=0.5,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, num_labels=3, classifier_proj_size=8,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.Wav2Vec2ForSequenceClassification(config).eval()
    hc.apply_(model, hc.Plan([hc.AddExits([0, 2], weights=(1.0, 2.0, 3.0))]))
    spread_heads(model)
    said, labels, cases, sums = {}, torch.tensor([0, 1, 2, 0]), set(), [[], []]
    for index, head in model.exit_heads.items():
        head.register_forward_hook(lambda m, args, out, index=index: said.__setitem__(int(index), out.detach()))
    model.train()
    for seed in range(12):
        said.clear()
        model.zero_grad()
        torch.manual_seed(seed)
        np.random.seed(seed)
        out = model(torch.randn(4, 800), labels=labels)
        ce = {
            i: torch.nn.functional.cross_entropy(x.double(), labels).item() for i, x in {**said, 3: out.logits.detach()}.items()
        }
        weights = {i: w for i, w in {0: 1, 2: 2, 3: 3}.items() if i in ce}
        assert out.loss.item() == pytest.approx(sum(w * ce[i] for i, w in weights.items()) / sum(weights.values()), rel=1e-4)
        out.loss.backward()
        assert {int(i) for i, head in model.exit_heads.items() if head.out.weight.grad is not None} == set(said)
        cases.add(tuple(said))
        for k, i in enumerate((0, 2)):
            sums[k] += [ce[i]] if i in said else []
    assert cases == {(), (0,), (2,), (0, 2)}
    seen = take_exit_losses(model)
    for k, i in enumerate((0, 2)):
        assert seen[f"exit_loss_{i}"].item() == pytest.approx(np.mean(sums[k]), rel=1e-4)
    with pytest.raises(hc.CompressionError, match="did not run"), collect_exits(model):
        for _ in range(20):
            model(torch.randn(4, 800))


def test_an_encoder_that_does_not_run_has_no_exits_in_the_loss():
    model, batch = built("bart")
    hc.apply_(model, hc.Plan([hc.AddExits([1, 4], weights=(1.0, 2.0, 3.0))]))
    spread_heads(model)
    labels = torch.arange(6) % 2
    ce = [torch.nn.functional.cross_entropy(one, labels).item() for one in all_logits(model, batch)]
    with torch.no_grad(), exits_off(model):
        encoded = model.model.encoder(batch["input_ids"])[0]
    for module in without_dropout(model).train().modules():
        for name in {"dropout", "activation_dropout"} & module.__dict__.keys():
            setattr(module, name, 0.0)
    for more, wanted in (
        ({}, (ce[0] + 2 * ce[1] + 3 * ce[2]) / 6),
        ({"encoder_outputs": (encoded,)}, (2 * ce[1] + 3 * ce[2]) / 5),
    ):
        assert model(**batch, **more, labels=labels).loss.item() == pytest.approx(wanted, rel=1e-4)
    seen = take_exit_losses(model)
    np.testing.assert_allclose([v.item() for v in seen.values()], ce, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_exits_inside_what_is_checkpointed_are_not_trained(reentrant):
    """Swin's stages are run again in the backward pass, with the blocks that have exits; refused before a step is made."""
    model, batch = built("swin", 4)
    hc.apply_(model, hc.Plan([hc.AddExits([0, 1])]))
    labels = torch.arange(4) % 2
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(hc.CompressionError, match="runs '.*layers.0' again"):
        model(**batch, labels=labels)
    model.eval()
    spread_heads(model)
    set_exits_(model, threshold=0.01)
    assert torch.equal(run(model, batch).logits.argmax(-1), all_logits(model, batch)[0].argmax(-1))  # eval checkpoints nothing
    model.train().gradient_checkpointing_disable()
    model(**batch, labels=labels).loss.backward()
    assert all(head.out.weight.grad.any() for head in model.exit_heads.values())


def test_a_models_own_checkpoint_is_no_silent_loss_of_gradients():
    model, batch = built("resnet", 4)
    hc.apply_(model, hc.Plan([hc.AddExits([0])]))
    stage = model.resnet.encoder.stages[0]
    inner = stage.forward
    stage.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=True)
    with pytest.raises(hc.CompressionError, match="runs without gradients"):
        model.train()(**batch, labels=torch.arange(4) % 2)


def test_what_belongs_to_a_row_that_left_is_said():
    """Longformer is told by one flag whether any row has a global token: it fails in a layer that no longer sees that row."""
    model, batch = built("longformer")
    hc.apply_(model, hc.Plan([hc.AddExits([0])]))
    model.exit_heads["0"].register_forward_hook(lambda m, args, out: torch.eye(6, 2) * 1e4 if len(out) == 6 else out)
    set_exits_(model, threshold=0.9)
    everywhere = torch.zeros_like(batch["input_ids"])
    everywhere[0, 0] = 1
    with pytest.raises(hc.CompressionError, match="does not run on .* of 6 rows without the others") as error:
        run(model, {**batch, "global_attention_mask": everywhere})
    assert error.value.__cause__ is not None and model._exits.now is None


def test_maps_are_not_read_of_text():
    model, _ = built("xlm")
    with pytest.raises(hc.CompressionError, match="reads feature maps"):
        resolve_exits(model, [0], pool="maps")


class _Linears(T.PreTrainedModel):
    """Layers that are each one Linear."""

    config_class = T.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.emb = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        torch.nn.init.normal_(module.weight, std=0.3)

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.emb(input_ids)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return T.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


@pytest.mark.parametrize("edit", [hc.LowRank("layers.0", 4), hc.Quantize("layers.1")])
def test_layers_that_became_another_kind(edit, tmp_path):
    torch.manual_seed(0)
    model = _Linears(T.BertConfig(**TEXT, num_labels=3)).eval()
    batch = {"input_ids": torch.randint(5, 99, (8, 6))}
    late = copy.deepcopy(model)
    hc.apply_(model, hc.Plan([edit]))
    hc.apply_(model, hc.Plan([hc.AddExits([0, 1])]))
    spread_heads(model)
    set_exits_(model, threshold=halves(model, batch))
    found = run(model, batch).logits
    left = hc.exit_layers(model).tolist()
    model.save_pretrained(tmp_path)
    loaded = _Linears.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, batch).logits, found) and hc.exit_layers(loaded).tolist() == left and len(set(left)) == 3
    hc.apply_(late, hc.Plan([hc.AddExits([0, 1])]))
    before = run(late, batch).logits
    with pytest.raises(hc.CompressionError, match="a layer that exits stand after"):
        hc.apply_(late, hc.Plan([edit]))
    assert torch.equal(run(late, batch).logits, before)
