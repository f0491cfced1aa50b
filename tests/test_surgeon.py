"""Optimal brain surgeon on groups, against dense least squares with numpy; the solver against all choices there are."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.pruning.latency import LatencyTable, grid
from hf_compress.pruning.solver import solve
from hf_compress.pruning.surgeon import Moments, Regression, removals


def problem(width=12, outputs=5, rows=200, seed=0):
    """Correlated inputs with a mean, and targets that they explain in part."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=draw) @ torch.randn(width, width, generator=draw) + torch.randn(
        width, generator=draw
    )
    weight, bias = torch.randn(outputs, width, generator=draw), torch.randn(outputs, generator=draw)
    t = x @ weight.T + bias + 0.3 * torch.randn(rows, outputs, generator=draw)
    moments = Moments.empty(width, outputs, dtype=torch.float64)
    for part in (slice(0, 70), slice(70, rows)):
        moments.add_(x[part], t[part])
    return x.double().numpy(), t.double().numpy(), weight, bias, moments


def ridge(x, t, weight, columns, amount, bias):
    """min |t - V x - c|^2 / n + amount |V - W|^2 over all columns, V zero outside of `columns`, as one least-squares problem."""
    n, width = x.shape
    rows = np.concatenate([x[:, columns] / n**0.5, np.sqrt(amount) * np.eye(width)[:, columns]])
    targets = np.concatenate([t / n**0.5, np.sqrt(amount) * weight.double().numpy().T])
    if bias:
        rows = np.concatenate([rows, np.concatenate([np.full(n, n**-0.5), np.zeros(width)])[:, None]], 1)
    found = np.linalg.lstsq(rows, targets, rcond=None)[0]
    return found, float(((targets - rows @ found) ** 2).sum())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_each_removal_is_the_cheapest_and_costs_what_least_squares_says(size, bias, scaled):
    x, t, weight, b, moments = problem()
    damping = 0.02
    regression = Regression(moments, weight, b if bias else None, damping)
    units = torch.arange(12) // size
    units = units[torch.randperm(12, generator=torch.Generator().manual_seed(3))] if size > 1 else units  # not side by side
    scale = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1], dtype=torch.float64) if scaled else torch.ones(5, dtype=torch.float64)
    order, errors = removals(regression, units, scale if scaled else None)

    centred = x - x.mean(0) if bias else x
    amount = damping * (centred**2).mean(0).mean()
    root = scale.sqrt().numpy()

    def cost(kept):
        columns = [i for i in range(12) if int(units[i]) in kept]
        return ridge(x, t * root, weight * torch.from_numpy(root).float()[:, None], columns, amount, bias)[1]

    alive, before = set(range(12 // size)), cost(set(range(12 // size)))
    total = 0.0
    for step, unit in enumerate(order.tolist()):
        costs = {u: cost(alive - {u}) for u in alive}
        assert unit == min(costs, key=costs.__getitem__)
        total = costs[unit] - before
        assert errors[step + 1].item() == pytest.approx(total, rel=1e-6)
        alive.remove(unit)
    assert not alive and len(errors) == 12 // size + 1 and errors[0] == 0


@pytest.mark.parametrize("bias", [True, False])
def test_weights_on_some_columns_are_those_of_least_squares(bias):
    x, t, weight, b, moments = problem(seed=1)
    regression = Regression(moments, weight, b if bias else None, 0.01)
    columns = torch.tensor([0, 3, 4, 9])
    new, shift = regression.solve(columns)
    centred = x - x.mean(0) if bias else x
    found, _ = ridge(x, t, weight, columns.tolist(), 0.01 * (centred**2).mean(), bias)
    np.testing.assert_allclose(new.double().numpy(), found[:4].T, rtol=1e-5, atol=1e-6)
    if bias:
        np.testing.assert_allclose(shift.double().numpy(), found[4], rtol=1e-5, atol=1e-6)
    else:
        assert shift is None


def test_many_columns_go_in_blocks():
    """More than one block of corrections, and several times fewer columns in between: the last errors are still right."""
    x, t, weight, b, moments = problem(width=200, outputs=3, rows=900)
    regression = Regression(moments, weight, b, 0.01)
    order, errors = removals(regression, torch.arange(200))
    assert sorted(order.tolist()) == list(range(200))
    amount = 0.01 * ((x - x.mean(0)) ** 2).mean()
    base = ridge(x, t, weight, list(range(200)), amount, True)[1]
    for gone in (60, 64, 130, 199):
        kept = sorted(order[gone:].tolist())
        assert errors[gone].item() == pytest.approx(ridge(x, t, weight, kept, amount, True)[1] - base, rel=1e-6)


def test_of_two_columns_that_say_the_same_one_goes_for_nothing():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw)
    x[:, 2] = 2 * x[:, 0]
    weight = torch.tensor([[5.0, 0.1, 5.0, 0.3]])
    moments = Moments.empty(4, 1)
    moments.add_(x, x @ weight.T)
    order, errors = removals(Regression(moments, weight, None, 1e-7), torch.arange(4))
    assert order[0] in (0, 2) and errors[1] < 1e-3 and order[3] in (0, 2)


def test_a_constant_column_goes_into_the_bias():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 7.0
    weight, bias = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0.5])
    moments = Moments.empty(3, 1)
    moments.add_inputs_(x)
    moments.of_own_output_(weight, bias)
    regression = Regression(moments, weight, bias, 1e-6)
    order, errors = removals(regression, torch.arange(3))
    assert order[0] == 1 and errors[1] < 1e-3 < 0.5 < errors[2]
    new, shift = regression.solve(torch.tensor([0, 2]))
    torch.testing.assert_close(new, torch.tensor([[1.0, 3.0]]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(shift, torch.tensor([14.5]), atol=1e-3, rtol=1e-3)


def test_moments_of_several_processes_add_up():
    x, t, weight, bias, whole = problem()
    parts = [Moments.empty(12, 5, dtype=torch.float64) for _ in range(2)]
    parts[0].add_(torch.from_numpy(x[:50]), torch.from_numpy(t[:50]))
    parts[1].add_(torch.from_numpy(x[50:]), torch.from_numpy(t[50:]))
    for key in ("xx", "x", "tx", "t"):
        torch.testing.assert_close(getattr(parts[0], key) + getattr(parts[1], key), getattr(whole, key))
    assert parts[0].count + parts[1].count == whole.count == 200


# --- which sizes -------------------------------------------------------------------------------------------------


def test_the_solver_finds_the_best_of_all_choices():
    draw = np.random.default_rng(0)
    for _ in range(20):
        names = ["a", "b", "c", "d"]
        sizes = {n: [1, 2, 4, 7] for n in names}
        losses = {n: dict(zip(sizes[n], sorted(draw.random(4), reverse=True), strict=True)) for n in names}
        costs = {n: dict(zip(sizes[n], sorted(draw.integers(1, 50, 4).tolist()), strict=True)) for n in names}
        fixed = 10.0
        least = fixed + sum(min(c.values()) for c in costs.values())
        most = fixed + sum(max(c.values()) for c in costs.values())
        budget = least + 0.5 * (most - least)
        found = solve(losses, costs, budget, fixed)
        best = min(
            (sum(losses[n][s] for n, s in zip(names, choice, strict=True)), choice)
            for choice in itertools.product(*(sizes[n] for n in names))
            if fixed + sum(costs[n][s] for n, s in zip(names, choice, strict=True)) <= budget
        )
        spent = fixed + sum(costs[n][found[n]] for n in names)
        assert spent <= budget
        # costs are rounded up to 1/4000 of what may be spent: at worst as good as with that much less to spend
        tight = min(
            sum(losses[n][s] for n, s in zip(names, choice, strict=True))
            for choice in itertools.product(*(sizes[n] for n in names))
            if fixed + sum(costs[n][s] for n, s in zip(names, choice, strict=True)) <= budget - 4 * (budget - least) / 4000
        )
        assert best[0] <= sum(losses[n][found[n]] for n in names) <= tight


def test_a_budget_that_nothing_meets():
    with pytest.raises(hc.CompressionError, match="Nothing meets a cost of 1: .* 3 is left"):
        solve({"a": {1: 0.0}}, {"a": {1: 2.0}}, budget=1.0, fixed=1.0)
    assert solve({"a": {1: 0.5}}, {"a": {1: 2.0}}, budget=3.0, fixed=1.0) == {"a": 1}


def test_a_table_is_saved_and_read(tmp_path):
    table = LatencyTable({"threads": 2, "shapes": {"x": [1, 2]}}, 0.25, {"a": {1: 0.1, 8: 0.2}, "b": {4: 0.05}})
    table.save(tmp_path / "deep" / "table.json")
    assert LatencyTable.load(tmp_path / "deep" / "table.json") == table
    assert table.predict({"a": 1}) == pytest.approx(0.15) and table.predict({}) == 0.25
    for text in ("", "{}", json.dumps({"format": 1, "conditions": {}, "total": 1, "times": {"a": {}}}), '{"format": 9}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(hc.CompressionError, match="no latency table"):
            LatencyTable.load(tmp_path / "broken.json")
    with pytest.raises(hc.CompressionError, match="no latency table"):
        LatencyTable.load(tmp_path / "absent.json")


def test_sizes_that_are_timed():
    with torch.device("meta"):
        model = T.BertModel(T.BertConfig(hidden_size=64, num_attention_heads=64, intermediate_size=1536, num_hidden_layers=1))
        small = T.BertModel(T.BertConfig(hidden_size=6, num_attention_heads=1, intermediate_size=6, num_hidden_layers=1))
    found, other = hc.discover(model), hc.discover(small)
    sizes = grid(found.ffns[0])
    assert sizes[0] == 32 and sizes[-3:] == [1216, 1376, 1536] and len(sizes) < 32
    assert all(size % 32 == 0 for size in sizes) and sizes == sorted(set(sizes))
    assert grid(found.attentions[0]) == [4 * (i + 1) for i in range(16)]
    assert grid(other.ffns[0]) == [1, 2, 3, 4, 5, 6] and grid(other.attentions[0]) == [1]
