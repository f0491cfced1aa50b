"""Masks held through training, and how they are chosen, against numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from hf_compress import CompressionError
from hf_compress.pruning.held import hold_, magnitude_masks, random_masks
from hf_compress.sparsity import choose_masks, from_matrix, matrix_of, pack_bits, unpack_bits


def tiny_bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )


def weights_of(model):
    return [name for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_zeros_stay_exactly_zero_through_an_optimizer_with_momentum_and_decay(kind):
    model = tiny_bert()
    masks = magnitude_masks(model, weights_of(model), 0.7)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    model(torch.arange(8)[None]).last_hidden_state.square().sum().backward()
    optimizer.step()  # moments everywhere, before anything is masked
    held = hold_(model, masks, optimizer)
    identity = {name: id(p) for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(8)[None]).last_hidden_state[0, 0].square().sum().backward()
        optimizer.step()
        for name, mask in masks.items():
            gone = model.get_parameter(name)[~mask]
            assert (gone == 0).all() and not torch.signbit(gone).any(), name
            for value in optimizer.state[model.get_parameter(name)].values():
                assert value.ndim == 0 or (value[~mask] == 0).all()
    assert {name: id(p) for name, p in model.named_parameters()} == identity
    trained = {name: mask for name, mask in masks.items() if "pooler" not in name}
    assert all((model.get_parameter(name)[mask] != before[name][mask]).any() for name, mask in trained.items())
    held.release()
    model(torch.arange(8)[None]).last_hidden_state[0, 0].square().sum().backward()
    optimizer.step()
    assert any((model.get_parameter(name)[~mask] != 0).any() for name, mask in masks.items())


def test_nan_and_negative_weights_become_plus_zero():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[float("nan"), -1.0]])
    hold_(layer, {"weight": torch.zeros(1, 2, dtype=torch.bool)})
    assert layer.weight.tolist() == [[0.0, 0.0]] and not torch.signbit(layer.weight).any()


def test_names_are_found_through_wrappers():
    model = tiny_bert()
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0])
    name = "encoder.layer.0.output.dense.weight"
    wrapped = nn.DataParallel(torch.compile(model))
    held = hold_(wrapped, {name: torch.zeros(16, 32, dtype=torch.bool)})
    assert not model.encoder.layer[0].output.dense.weight.any() and held.sparsity == 1.0
    assert magnitude_masks(wrapped, [name], 0.5, "row")[name].sum(1).tolist() == [16] * 16


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.93])
def test_counts_and_choices_are_those_of_numpy(sparsity):
    model = tiny_bert()
    names = weights_of(model)
    flat = np.concatenate([np.abs(model.get_parameter(n).detach().numpy()).ravel() for n in names])
    removed = round(sparsity * flat.size)
    expected = np.ones(flat.size, bool)
    expected[np.argsort(flat, kind="stable")[:removed]] = False
    masks = magnitude_masks(model, names, sparsity, "global")
    assert (np.concatenate([masks[n].numpy().ravel() for n in names]) == expected).all()
    for name, mask in magnitude_masks(model, names, sparsity, "layer").items():
        weight = np.abs(model.get_parameter(name).detach().numpy())
        assert (~mask).sum() == round(sparsity * mask.numel())
        if removed:
            assert weight[~mask.numpy()].max() <= weight[mask.numpy()].min()
    for name, mask in magnitude_masks(model, names, sparsity, "row").items():
        assert ((~mask).sum(1) == round(sparsity * mask.shape[1])).all(), name


def test_ties_infinities_and_negative_scores_are_counted_exactly():
    torch.manual_seed(0)
    scores = {"a": torch.randint(-2, 3, (7, 9)).float(), "b": torch.randint(-2, 3, (3, 5)).float() * 0.5}
    scores["a"][0, :4] = -torch.inf
    scores["b"][0, 0] = torch.inf
    flat = torch.cat([s.flatten() for s in scores.values()]).numpy() + 0.0
    for sparsity in np.linspace(0, 0.99, 34):
        expected = np.ones(flat.size, bool)
        expected[np.argsort(flat, kind="stable")[: round(sparsity * flat.size)]] = False
        masks = choose_masks(scores, float(sparsity), "global")
        assert (np.concatenate([m.numpy().ravel() for m in masks.values()]) == expected).all(), sparsity


def test_what_is_gone_stays_gone_and_counts():
    model = tiny_bert()
    names = weights_of(model)
    first = random_masks(model, names, 0.3)
    second = magnitude_masks(model, names, 0.6, alive=first)
    assert all(not (second[n] & ~first[n]).any() for n in names)
    assert sum(int((~m).sum()) for m in second.values()) == round(0.6 * sum(m.numel() for m in second.values()))
    lower = magnitude_masks(model, names, 0.1, alive=first)
    assert all(torch.equal(lower[n], first[n]) for n in names)


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_n_of_m_runs_along_what_an_output_sums_over(pattern, kept, of):
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    name = "h.0.mlp.c_fc.weight"  # (in, out)
    mask = magnitude_masks(model, [name], 0.5, pattern=pattern)[name]
    groups = mask.T.reshape(-1, of)
    assert (groups.sum(1) == kept).all()
    weight = model.get_parameter(name).detach().abs().T.reshape(-1, of).numpy()
    assert (np.sort(weight, 1)[:, of - kept :] == np.sort(np.where(groups, weight, 0), 1)[:, of - kept :]).all()
    conv = nn.Conv2d(16, 4, 3)
    mask = magnitude_masks(conv, ["weight"], 0.5, pattern=pattern)["weight"]
    assert (mask.reshape(4, 16 // of, of, 3, 3).sum(2) == kept).all()


def test_matrices_and_bits_come_back():
    for module in (
        nn.Conv2d(3, 5, (2, 3)),
        nn.Linear(3, 5),
        GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1)).h[0].mlp.c_fc,
    ):
        weight = module.weight.detach()
        assert torch.equal(from_matrix(module, matrix_of(module, weight), weight.shape), weight)
    mask = torch.rand(7, 11) < 0.4
    packed = pack_bits(mask)
    assert packed.numpy().tobytes() == np.packbits(mask.numpy().ravel(), bitorder="little").tobytes()
    assert torch.equal(unpack_bits(packed, (7, 11)), mask)


def test_refusals():
    layer = nn.Linear(4, 4)
    ones = torch.ones(4, 4, dtype=torch.bool)
    for masks, message in (
        ({"wieght": ones}, "no parameter named 'wieght'"),
        ({"weight": ones.float()}, "must be a bool tensor"),
        ({"weight": ones[:2]}, r"is \(2, 4\), the parameter \(4, 4\)"),
        ([ones], "masks must be a dict"),
    ):
        with pytest.raises(CompressionError, match=message):
            hold_(layer, masks)
    with pytest.raises(CompressionError, match="meta device"):
        hold_(nn.Linear(4, 4, device="meta"), {"weight": ones})
    tied = nn.Sequential(layer, nn.Linear(4, 4))
    tied[1].weight = layer.weight
    with pytest.raises(CompressionError, match="are one parameter"):
        hold_(tied, {"0.weight": ones, "1.weight": ~ones})
    for options, message in (
        ({"sparsity": 1.0}, r"in \[0, 1\)"),
        ({"sparsity": 0.5, "scope": "model"}, "scope must be one of"),
        ({"sparsity": 0.5, "pattern": "4:2"}, "must be 'N:M'"),
        ({"sparsity": 0.5, "pattern": "2:3"}, "divide into groups of 3"),
    ):
        with pytest.raises(CompressionError, match=message):
            magnitude_masks(layer, ["weight"], **options)


def _hold_in_a_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 3))
    masks = magnitude_masks(model, ["weight"], 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    hold_(model, masks, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 6), 1.0 + rank + step)).square().sum().backward()
        optimizer.step()
    try:
        hold_(model, random_masks(model, ["weight"], 0.5, seed=rank))
        refused = ""
    except CompressionError as error:
        refused = str(error)
    torch.save((model.module.weight.detach(), masks["weight"], refused), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_same(tmp_path):
    torch.multiprocessing.spawn(_hold_in_a_process, args=(str(tmp_path),), nprocs=2)
    (one, mask, refused), (other, _, refused_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other) and (one[~mask] == 0).all() and (one[mask] != 0).all()
    assert "different masks" in refused and refused == refused_too
