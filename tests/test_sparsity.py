"""Single weights: masks against numpy, SparseGPT against dense least squares, checkpoints to the bit and to the byte."""

import os

import numpy as np
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.grams import measure_grams, patches
from hf_compress.pruning.sparsegpt import sparsegpt
from hf_compress.resume import restore_weights
from hf_compress.sparse import is_sparse, sparsify_
from hf_compress.sparsity import matrix_of, pack_bits
from tests.sweep.build import build as built
from tests.trainers import trainer
from tests.zoo import build, outputs

FAMILIES = ("bert", "gpt2", "llama", "t5", "vit", "convnext", "deberta", "phi3", "clip")


def sparse_in(model):
    return {name: module for name, module in model.named_modules() if is_sparse(module)}


def rows_of(module):
    return matrix_of(module, module.weight.detach()).numpy()


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_what_draws_new_weights_by_two_axes_is_not_asked_to(tmp_path):
    """xLSTM's `_init_weights` reads how wide a weight is; while a checkpoint is read, ours is a vector."""
    model, batch, _ = built("xlstm")
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.5), inputs=batch)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert len(sparse_in(again)) == len(sparse_in(model)) > 0
    assert torch.equal(outputs(again, batch), outputs(model.eval(), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_process_loads_it_to_the_bit_and_plain_transformers_fails(family, tmp_path, fresh, plain):
    model, batch = build(family)
    dense = {name: rows_of(m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | Conv1D)}
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.6))
    sparse = sparse_in(model)
    assert len(sparse) >= 4
    for name, module in sparse.items():
        before, now = dense[name], rows_of(module)
        gone = round(0.6 * before.shape[1])
        threshold = np.sort(np.abs(before), 1)[:, gone : gone + 1]
        assert ((now == 0).sum(1) == gone).all() and (now == np.where(np.abs(before) >= threshold, before, 0)).all(), name
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = fresh.outputs(type(model).__name__, tmp_path, batch)
    key = next(k for k in ("logits", "logits_per_image", "last_hidden_state") if k in found)
    assert torch.equal(found[key], expected)
    with pytest.raises(RuntimeError, match="mismatch"):
        plain.outputs(type(model).__name__, tmp_path, batch)
    again = type(model).from_pretrained(tmp_path)
    assert {n: torch.equal(m.weight, sparse[n].weight) and torch.equal(m.mask(), sparse[n].mask()) for n, m in sparse_in(again).items()} == dict.fromkeys(sparse, True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("how", "left"), [({"sparsity": 0.75}, 0.25), ({"pattern": "2:4"}, 0.5)])
def test_the_file_is_as_small_as_the_formula_says(how, left, dtype, tmp_path):
    model, _ = build("bert", dtype)
    model.save_pretrained(tmp_path / "dense")
    hc.apply_(model, hc.plan_sparsity(model, **how))
    model.save_pretrained(tmp_path / "sparse")
    size = dtype.itemsize
    numbers = sum(m.weight.numel() for m in sparse_in(model).values())
    saved = numbers * size - (numbers // 8 + 4 * len(sparse_in(model)) + left * numbers * size)
    sizes = {name: _tensor_bytes(tmp_path / name) for name in ("dense", "sparse")}
    assert sizes["dense"] - sizes["sparse"] == saved
    again = type(model).from_pretrained(tmp_path / "sparse", dtype=dtype)
    assert all(m.weight.dtype == dtype and m.weight_mask.dtype == torch.uint8 for m in sparse_in(again).values())
    assert torch.equal(again.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)


def _tensor_bytes(folder):
    """What is in the file after its header."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        return os.path.getsize(path) - 8 - int.from_bytes(file.read(8), "little")


def test_zeros_that_stay_are_weights():
    """Zero is a value that a kept weight may have: the bits say what stays, not the values."""
    model, batch = build("bert")
    hc.apply_(model, hc.Plan([hc.Sparsify("bert.pooler.dense", 0.5)]))
    layer = model.bert.pooler.dense
    with torch.no_grad():
        layer.weight[layer.mask()] = 0.0
    assert layer.state_dict()["weight"].shape == (layer.hfc_kept,)
    other, _ = build("bert")
    hc.apply_(other, hc.Plan([hc.Sparsify("bert.pooler.dense", 0.5)]))
    other.load_state_dict(model.state_dict())
    assert not other.bert.pooler.dense.weight.any() and torch.equal(outputs(other, batch), outputs(model, batch))


def test_embeddings_and_convolutions(tmp_path):
    model, batch = build("convnext")
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    hc.apply_(model, hc.Plan([hc.Sparsify(name, 0.4) for name in convs]))
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "convs")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "convs").eval(), batch), expected)
    model, batch = build("deberta")
    hc.apply_(model, hc.Plan([hc.Sparsify("deberta.embeddings.word_embeddings", 0.4)]))
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "rows")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "rows").eval(), batch), expected)


def test_gradients_of_what_is_masked_are_zero_and_weight_decay_leaves_it_there():
    model, batch = build("gpt2")
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = {name: m.weight.detach().clone() for name, m in sparse_in(model).items()}
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, module in sparse_in(model).items():
        assert not module.weight[~module.mask()].any() and not torch.equal(module.weight, before[name]), name
    model.state_dict()
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(hc.CompressionError, match="have been written to"):
        model.state_dict()


def test_a_config_alone_builds_a_fresh_one():
    model, batch = build("gpt2")
    hc.apply_(model, hc.plan_sparsity(model, pattern="2:4", modules=r"c_fc|c_proj"))
    fresh = hc.from_config(model.config, type(model))
    for name, module in sparse_in(model).items():
        other = fresh.get_submodule(name)
        assert other.hfc_kept == module.hfc_kept and other.weight.shape == module.weight.shape
        groups = matrix_of(other, other.mask()).reshape(-1, 4).sum(1)
        assert (groups == 2).all() and 0.005 < other.weight[other.mask()].std() < 0.1
    outputs(fresh, batch)


# --- composition -------------------------------------------------------------------------------------------------


def test_after_cuts_and_before_eight_bits_zeros_stay_zero(tmp_path):
    model, batch = build("bert")
    attention, ffn = hc.discover(model).attentions[0], hc.discover(model).ffns[1]
    hc.apply_(model, hc.Plan([hc.KeepHeads(attention.name, [0, 2]), hc.KeepNeurons(ffn.name, range(0, ffn.size, 2))]))
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.5))
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "cut")
    again = type(model).from_pretrained(tmp_path / "cut").eval()
    assert torch.equal(outputs(again, batch), expected)
    hc.apply_(again, hc.Plan([hc.KeepLayers([0, 2])]))
    masks = {name: m.mask() for name, m in sparse_in(again).items()}
    hc.apply_(again, hc.Plan([hc.Quantize(name) for name in masks]))
    for name, mask in masks.items():
        integers = again.get_submodule(name).weight
        assert integers.dtype == torch.int8 and not integers[~mask].any() and integers[mask].any(), name
    expected = outputs(again, batch)
    again.save_pretrained(tmp_path / "small")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "small").eval(), batch), expected)


def test_a_second_mask_replaces_the_first_and_layers_may_go(tmp_path):
    model, batch = build("llama")
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.3))
    first = {name: m.mask() for name, m in sparse_in(model).items()}
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.6))
    assert all(not (m.mask() & ~first[name]).any() for name, m in sparse_in(model).items())
    hc.apply_(model, hc.Plan([hc.KeepLayers([0, 2])]))
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), batch), expected)
    assert model.config.quantization_config.plan.edits[-1] == hc.KeepLayers([0, 2])


def test_what_comes_after_is_refused_and_changes_nothing():
    model, batch = build("bert")
    structure = hc.discover(model)
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.5))
    before, config = outputs(model, batch), model.config.to_dict()
    name = "bert.encoder.layer.0.output.dense"
    for edit, message in (
        (hc.KeepNeurons(structure.ffns[0].name, [0, 1]), "Cut first, then Sparsify"),
        (hc.KeepHeads(structure.attentions[0].name, [0]), "Cut first, then Sparsify"),
        (hc.LowRank(name, 2), "is sparse"),
        (hc.Quantize(name, 4), "no point at exactly zero"),
        (hc.Sparsify("bert.embeddings.LayerNorm", 0.5), "not a plain Linear"),
        (hc.Sparsify(name, 0.999), "keeps 0 weights"),
        (hc.Sparsify(name, 0.5, given=True), "does not carry"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.apply_(model, hc.Plan([edit]))
        assert torch.equal(outputs(model, batch), before) and model.config.to_dict() == config
    tied, _ = build("gpt2")
    with pytest.raises(hc.CompressionError, match="shares its weight"):
        hc.apply_(tied, hc.Plan([hc.Sparsify("transformer.wte", 0.5)]))


def test_masks_that_are_not_what_the_plan_says_are_refused():
    model, _ = build("bert")
    name = "bert.pooler.dense"
    rows = model.bert.pooler.dense.weight
    half = torch.arange(rows.numel()).reshape(rows.shape) % 2 == 0
    values = torch.ones(rows.numel() // 2)
    for edit, tensors, message in (
        (hc.Sparsify(name, 0.25, given=True), {"weight_mask": pack_bits(half)}, "removes 0.5"),
        (hc.Sparsify(name, 0.5, given=True), {"weight_mask": pack_bits(half)[1:]}, "take uint8"),
        (hc.Sparsify(name, pattern="1:4", given=True), {"weight_mask": pack_bits(half)}, "is not 1:4"),
        (hc.Sparsify(name, 0.5, given=True), {"weight_mask": pack_bits(half), "weight": values[1:]}, "keeps"),
        (hc.Sparsify(name, 0.5, given=True), {"weight_mask": pack_bits(half), "weight": values * torch.nan}, "NaN"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.apply_(model, hc.Plan([edit], {f"{name}.{key}": value for key, value in tensors.items()}))
    assert not sparse_in(model)


@pytest.mark.parametrize("how", [{"sparsity": 0}, {"sparsity": 1.0}, {"pattern": "4:4"}, {"pattern": "2:4", "sparsity": 0.3}])
def test_edits_that_mean_nothing_are_refused(how):
    with pytest.raises(hc.CompressionError):
        hc.Sparsify("any", **how)


def test_a_dense_model_resumes_from_a_sparse_checkpoint(tmp_path):
    model, batch = build("bert")
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.5))
    model.save_pretrained(tmp_path)
    other, _ = build("bert")
    restore_weights(other, tmp_path)
    assert torch.equal(outputs(other, batch), outputs(model, batch))
    assert len(sparse_in(other)) == len(sparse_in(model))
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(2)
    restore_weights(other, tmp_path)
    assert torch.equal(outputs(other, batch), outputs(model, batch))


# --- scores ------------------------------------------------------------------------------------------------------


def _inputs_of(model, name, batches):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append((args[0].detach(), None)))
    masks = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            masks.append(batch["attention_mask"].bool())
    hook.remove()
    return torch.cat([x[mask] for (x, _), mask in zip(seen, masks, strict=True)]).double().numpy()


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_wanda_is_weight_times_input_norm(family, pattern):
    model, batch = build(family)
    name = {"bert": "bert.encoder.layer.1.intermediate.dense", "gpt2": "transformer.h.1.mlp.c_fc"}[family]
    batches = [batch, {k: v.flip(0) for k, v in batch.items()}]
    x = _inputs_of(model, name, batches)
    weight = rows_of(model.get_submodule(name))
    score = np.abs(weight) * np.sqrt((x**2).sum(0))
    hc.apply_(model, hc.plan_sparsity(model, batches, sparsity=0.5, pattern=pattern, score="wanda"))
    kept = rows_of(model.get_submodule(name)) != 0
    size = weight.shape[1] if pattern is None else int(pattern[-1])
    groups = score.reshape(-1, size)
    expected = np.ones(groups.shape, bool)
    np.put_along_axis(expected, np.argsort(groups, 1)[:, : size // 2], False, 1)
    assert (kept == expected.reshape(kept.shape)).all()


def test_patches_of_convolutions_are_what_they_sum_over():
    torch.manual_seed(0)
    for conv in (
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.Conv2d(4, 5, (3, 2), dilation=2, padding="same"),
        nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
    ):
        x = torch.randn(2, 4, 9, 8)
        y = patches(conv, x) @ matrix_of(conv, conv.weight).T + conv.bias
        expected = conv(x).movedim(1, -1).reshape(-1, 5)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def _columns_by_least_squares(weight, hessian, mask):
    """Each row, column by column: what stays is the best given all that lies to its left. Dense solves, in numpy."""
    done = np.zeros_like(weight)
    for r, row in enumerate(weight):
        for j in range(len(row)):
            left, free = slice(0, j), slice(j, len(row))
            off = done[r, left] - row[left]
            best = row[free] - np.linalg.solve(hessian[free, free], hessian[free, left] @ off) if j else row[free]
            done[r, j] = best[0] if mask[r, j] else 0.0
    return done


@pytest.mark.parametrize(("pattern", "scope"), [(None, "row"), (None, "layer"), ("2:4", "row"), ("4:8", "row")])
@pytest.mark.parametrize("block", [8, 128])
def test_sparsegpt_is_least_squares_column_by_column(pattern, scope, block):
    torch.manual_seed(0)
    x = torch.randn(200, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    weight = torch.randn(7, 24, dtype=torch.float64)
    new, mask = sparsegpt(weight, x.T @ x, 0.55, pattern, scope, block=block)
    hessian = (x.T @ x).numpy()
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(24)
    expected = _columns_by_least_squares(weight.numpy(), hessian, mask.numpy())
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert (new == 0).equal(~mask)
    if pattern:
        kept, of = map(int, pattern.split(":"))
        assert (mask.reshape(-1, of).sum(1) == kept).all()
    elif scope == "row":
        assert ((~mask).sum(1) == round(0.55 * 24)).all()
    else:
        assert (~mask).sum() == round(0.55 * 7 * 24)
    # one block is chosen by w_j^2 / U_jj^2 before anything has moved
    if pattern is None and scope == "row" and block == 128:
        upper = np.linalg.cholesky(np.linalg.inv(hessian)).T  # U with U' U = H^-1
        score = weight.numpy() ** 2 / np.diag(upper) ** 2
        gone = np.argsort(score, 1, kind="stable")[:, : round(0.55 * 24)]
        assert all(set(np.flatnonzero(~m)) == set(g) for m, g in zip(mask.numpy(), gone, strict=True))


def test_sparsegpt_loses_less_of_the_outputs_than_wanda_and_magnitude():
    errors = {}
    for score in ("random", "magnitude", "wanda", "sparsegpt"):
        model, batch = build("bert")
        dense = outputs(model, batch)
        torch.manual_seed(1)
        batches = [{"input_ids": torch.randint(5, 99, (16, 10))} for _ in range(4)]
        given = batches if score in ("wanda", "sparsegpt") else None
        plan = hc.plan_sparsity(model, given, sparsity=0.6, score=score)
        assert hc.Plan.from_dict(plan.to_dict(), plan.tensors) == plan
        name = "bert.encoder.layer.0.attention.self.query"
        before = rows_of(model.get_submodule(name))
        gram = measure_grams(model, {name: model.get_submodule(name)}, batches)[name].double().numpy()
        hc.apply_(model, plan)
        off = rows_of(model.get_submodule(name)) - before
        errors[score] = np.trace(off @ gram @ off.T)
        assert not torch.equal(outputs(model, batch), dense)
    assert errors["sparsegpt"] < errors["wanda"] < errors["random"] and errors["sparsegpt"] < errors["magnitude"]


def test_scopes_count_over_modules_layers_or_rows():
    model, _ = build("vit")
    for scope in ("row", "layer", "global"):
        plan = hc.plan_sparsity(model, sparsity=0.37, scope=scope)
        copy, _ = build("vit")
        hc.apply_(copy, plan)
        sparse = sparse_in(copy)
        total = sum(m.weight.numel() for m in sparse.values())
        if scope == "global":
            assert sum(int((m.weight == 0).sum()) for m in sparse.values()) == round(0.37 * total)
            assert len({m.hfc_kept / m.weight.numel() for m in sparse.values()}) > 4
        for module in sparse.values() if scope != "global" else ():
            rows = rows_of(module)
            if scope == "row":
                assert ((rows == 0).sum(1) == round(0.37 * rows.shape[1])).all()
            else:
                assert (rows == 0).sum() == round(0.37 * rows.size)
    a, b = (hc.plan_sparsity(model, score="random", seed=seed) for seed in (1, 1))
    assert a == b != hc.plan_sparsity(model, score="random", seed=2)


def test_planner_refusals():
    model, batch = build("bert")
    for options, message in (
        ({"score": "wnada"}, "Unknown score 'wnada'. Did you mean 'wanda'|Unknown score"),
        ({"score": "wanda"}, "needs calibration batches"),
        ({"batches": [batch]}, "reads no batches"),
        ({"sparsity": 0}, "removes nothing"),
        ({"pattern": "3:2"}, "N:M"),
        ({"scope": "all"}, "scope must be"),
        ({"modules": "nowhere"}, "has no Linear"),
        ({"pattern": "3:5", "modules": "pooler"}, "do not divide into groups of 5"),
        ({"batches": [batch], "score": "sparsegpt", "scope": "global"}, "module by module"),
        ({"batches": [batch], "score": "wanda", "modules": "word_embeddings"}, "looks rows up"),
    ):
        with pytest.raises(hc.CompressionError, match=message):
            hc.plan_sparsity(model, **options)
    plan = hc.plan_sparsity(model, sparsity=0.5)
    assert {e.module.split(".")[1] for e in plan} == {"encoder"}  # no embeddings, pooler or classifier


def test_what_a_sparse_layer_computes_is_the_masked_product():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    mask = torch.rand(4, 6) > 0.5
    expected = F.linear(x, layer.weight * mask, layer.bias)
    sparsify_(layer, mask)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


# --- what people are told ----------------------------------------------------------------------------------------


def test_the_report_counts_what_is_not_zero_and_the_card_says_that_it_gains_no_time(tmp_path):
    model, batch = build("bert")
    dense, _ = build("bert")
    plan = hc.plan_sparsity(model, sparsity=0.75)
    hc.apply_(model, plan)
    report = hc.measure(model, batch, against=dense, repeats=3)
    gone = sum(round(0.75 * m.weight.numel()) for m in sparse_in(model).values())
    assert report.model.nonzero == report.model.parameters - gone and report.against.nonzero is None
    assert "not zero" in str(report) and hc.Report.from_dict(report.to_dict()) == report
    model.save_pretrained(tmp_path)
    assert report.model.bytes == _tensor_bytes(tmp_path)
    card = hc.render_card(plan, report)
    assert "a fraction of 0.75 of those of 18 modules is zero" in card and "gain no time" in card
    assert "parameters that are not zero" in card and "made sparse" in card
    assert "not zero" not in str(hc.measure(dense, batch, repeats=3))


# --- what is damaged, or does not fit ----------------------------------------------------------------------------


def test_damaged_checkpoints_are_refused(tmp_path):
    model, _ = build("bert")
    name = "bert.encoder.layer.0.output.dense"
    hc.apply_(model, hc.Plan([hc.Sparsify(name, 0.5)]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bits = tensors.pop(f"{name}.weight_mask")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hc.CompressionError, match="weight_mask"):
        type(model).from_pretrained(tmp_path)
    bits[0] ^= 3 if bits[0] & 3 in (1, 2) else 5 if bits[0] & 5 in (1, 4) else 9  # two places change, the number may not
    save_file({**tensors, f"{name}.weight_mask": bits}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hc.CompressionError, match="missing or damaged"):
        type(model).from_pretrained(tmp_path)


def test_a_weight_that_is_fetched_as_it_lies_on_disk_is_used_so():
    """What accelerate's offloading to disk puts into a module, one at a time."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    sparsify_(layer, torch.rand(4, 6) > 0.5)
    with torch.no_grad():
        expected = layer(x)
        layer._parameters["weight"] = nn.Parameter(layer.state_dict()["weight"])
        assert layer.weight.ndim == 1 and torch.equal(layer(x), expected)
        layer.settle_()
        assert layer.weight.shape == (4, 6) and torch.equal(layer(x), expected)


def test_channels_and_experts_are_cut_first():
    resnet = T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1])).eval()
    stream = hc.channel_groups(resnet)[1].name
    hc.apply_(resnet, hc.plan_sparsity(resnet, sparsity=0.5))
    with pytest.raises(hc.CompressionError, match="Cut first"):
        hc.apply_(resnet, hc.Plan([hc.KeepChannels(stream, range(12))]))
    resnet.state_dict()


def test_planning_few_bits_leaves_sparse_modules_alone_and_training_for_them_is_refused(tmp_path):
    model, _ = build("bert")
    hc.apply_(model, hc.plan_sparsity(model, sparsity=0.5, modules="intermediate"))
    sparse = set(sparse_in(model))
    assert not sparse & {e.module for e in hc.plan_quantization(model, bits=4)}
    assert sparse <= {e.module for e in hc.plan_quantization(model, bits=8)}
    with pytest.raises(hc.CompressionError, match="is sparse, and grids of 4 bits"):
        hc.plan_quantization(model, bits=4, modules="intermediate")
    with pytest.raises(hc.CompressionError, match="would let its zeros grow"):
        trainer(tmp_path, [hc.QuantizationCallback(8)], model=model).train()
    hc.apply_(model, hc.plan_quantization(model, bits=8))
    model.dequantize()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert int((weight == 0).sum()) >= weight.numel() // 2


def _plan_in_a_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    hc.plan_sparsity(build("bert")[0], _calibration()[rank::2], score="sparsegpt", modules="layer.0").save(f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def _calibration():
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 99, (8, 10), generator=draw)} for _ in range(4)]


def test_two_processes_plan_what_one_would(tmp_path):
    torch.multiprocessing.spawn(_plan_in_a_process, args=(str(tmp_path),), nprocs=2)
    one, other = hc.Plan.load(tmp_path / "0"), hc.Plan.load(tmp_path / "1")
    alone = hc.plan_sparsity(build("bert")[0], _calibration(), score="sparsegpt", modules="layer.0")
    assert one == other and one.edits == alone.edits
    for key, value in alone.tensors.items():
        torch.testing.assert_close(one.tensors[key], value, atol=1e-4, rtol=1e-4)
