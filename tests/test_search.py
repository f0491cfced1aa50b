"""Weights of blocks' losses, tuned on what the model loses, against what is computed by hand."""

import copy

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.discover import discover
from hf_compress.pruning import search, solver
from hf_compress.pruning.calibrate import Calibration
from hf_compress.pruning.compensate import losses_of
from hf_compress.pruning.latency import grid
from hf_compress.pruning.select import count_units
from tests.test_prune_to import bert, blocks_of, first, made_up, several, texts


def database_of(model, batches):
    calibration = Calibration(model, discover(model), blocks_of(model), batches)
    grids = {block.name: grid(block) for block in calibration.blocks}
    database: search.Database = {}
    found = losses_of(calibration, 0.01, grids, database)
    return calibration, database, {name: curve.at(grids[name]) for name, curve in found.items()}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_is_put_together_is_the_model_with_these_projections(family):
    """Against a mask by hand: columns that go are zero, those that stay and the bias are the database's."""
    model, batches = (bert(), texts()) if family == "bert" else several(family)
    calibration, database, losses = database_of(model, batches)
    sizes = {name: sorted(of)[len(of) // 2] for name, of in losses.items()}
    found = search.Stitched(calibration, database).loss(sizes)
    assert found > 0
    double = copy.deepcopy(model)
    for block in blocks_of(model):
        if sizes[block.name] == count_units(block):
            continue
        columns, weight, bias = database[block.name, sizes[block.name]]
        module = double.get_submodule(block.out)
        full = torch.zeros_like(module.weight if isinstance(module, torch.nn.Linear) else module.weight.T)
        full[:, columns] = weight.float()
        module.weight.data = full if isinstance(module, torch.nn.Linear) else full.T.contiguous()
        if bias is not None:
            module.bias.data = bias
    sums = [0.0, 0.0]
    with torch.no_grad():
        for batch in batches:
            meant, got = first(model(**batch)).double(), first(double(**batch)).double()
            if "attention_mask" in batch and meant.ndim == 3:
                meant, got = meant[batch["attention_mask"].bool()], got[batch["attention_mask"].bool()]
            meant, got = meant.flatten(0, -2), got.flatten(0, -2)
            if "logits" in model(**batch):
                p = meant.softmax(-1)
                sums[0] += float((p * (p.log() - got.log_softmax(-1))).sum())
                sums[1] += len(p)
            else:
                sums[0] += float((meant - got).square().sum())
                sums[1] += float((meant - meant.mean(0)).square().sum())
    assert found == pytest.approx(sums[0] / sums[1], rel=2e-3)
    whole = {name: max(of) for name, of in losses.items()}
    assert search.Stitched(calibration, database).loss(whole) == pytest.approx(0.0, abs=1e-6)


def test_better_sizes_are_found_where_the_losses_of_blocks_mislead():
    """Losses that say of every attention that it matters ten thousand times as much as it does."""
    model = bert()
    calibration, database, losses = database_of(model, texts())
    misled = {
        name: {size: loss * 1e4 ** (i % 2 == 0) for size, loss in of.items()} for i, (name, of) in enumerate(losses.items())
    }
    table = made_up(model)

    def solve(of):
        fixed = table.total - sum(times[max(times)] for times in table.times.values())
        return solver.solve(of, {name: table.times[name] for name in of}, table.total / 2, fixed)

    run = search.Stitched(calibration, database)
    before, after = solve(misled), solve(search.tune(calibration, database, misled, solve, 40))
    assert run.loss(after) < 0.8 * run.loss(before)
    assert solve(search.tune(calibration, database, misled, solve, 0)) == before
    assert solve(search.tune(calibration, database, misled, solve, 40)) == after  # the same each time
    assert search.tune(calibration, database, misled, lambda of: None, 5) == misled


def test_the_model_is_left_as_it_was_and_the_target_is_met():
    model = bert()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = made_up(model)
    ways = [hc.prune_family(model, texts(), [1.8], table=table, tries=tries)[0] for tries in (0, 30)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lost = []
    for pruned in ways:
        assert table.total / table.predict({name: left for name, (left, _) in pruned.sizes.items()}) >= 1.8
        small = hc.apply_(copy.deepcopy(model), pruned.plan)
        with torch.no_grad():
            pairs = [(model(**b).logits.log_softmax(-1), small(**b).logits.log_softmax(-1)) for b in texts()]
        lost.append(sum(float((p.exp() * (p - q)).sum()) for p, q in pairs))
    assert lost[1] <= lost[0]


def test_a_database_that_would_be_too_large_is_not_made(monkeypatch):
    model = bert()
    calibration = Calibration(model, discover(model), blocks_of(model), texts())
    grids = {block.name: grid(block) for block in calibration.blocks}
    heads, neurons = (sum(grids[name]) for name in ("bert.encoder.layer.0.attention.self", "bert.encoder.layer.0"))
    numbers = 3 * 32 * (8 * heads + neurons)  # outputs x columns
    monkeypatch.setattr(search, "MOST", 2 * numbers)
    assert search.is_small(calibration, grids)
    monkeypatch.setattr(search, "MOST", 2 * numbers - 1)
    assert not search.is_small(calibration, grids)
    monkeypatch.setattr(hc.pruning.choose, "tune", lambda *_: pytest.fail("there is no database"))
    hc.prune_family(model, texts(), [1.8], table=made_up(model))


def test_refused():
    model = T.BertModel(T.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64))
    for tries in (-1, True, 2.5, "many"):
        with pytest.raises(hc.CompressionError, match="tries is how many"):
            hc.prune_to(model, texts(), parameters=1.2, tries=tries)
