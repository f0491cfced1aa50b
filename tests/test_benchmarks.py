"""What the benchmarks of pruning compute themselves: scores, sizes and the search for a speed-up, by value."""

import importlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def tiny() -> Any:
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("asked", [1.2, 2.0, 3.0])
def test_the_search_finds_the_share_whose_time_is_asked(asked, load):
    reach = load("equal_speed").reach
    near = reach(lambda share: share, lambda share: 1 / (1 - 0.9 * share), asked)
    assert near.is_near(asked) and abs(1 / (1 - 0.9 * near.share) / asked - 1) <= 0.03
    assert 1 / (1 - 0.9 * near.below) < asked


def test_where_sizes_are_coarse_the_nearest_is_returned_and_said_to_be_off(load):
    reach = load("equal_speed").reach
    times = {0: 1.0, 1: 1.3, 2: 1.9, 3: 3.5}  # speed-ups of four sizes; 1.6 lies between
    near = reach(lambda share: int(share * 4), times.__getitem__, 1.65)
    assert near.model == 2 and near.speedup == 1.9 and not near.is_near(1.65)
    assert int(near.below * 4) == 1  # from there a finer search can start


def test_wanda_is_the_sum_of_weight_times_norm_over_a_units_columns(load):
    model, batch = tiny(), {"input_ids": torch.arange(24).view(2, 12)}
    structure = hc.discover(model)
    blocks = [*structure.attentions, *structure.own_ffns]
    got = load("benchmark_llama").wanda(model, blocks, [batch, batch])
    for i, layer in enumerate(model.model.layers):
        for block, module, width in ((blocks[i], layer.self_attn.o_proj, 16), (blocks[2 + i], layer.mlp.down_proj, 1)):
            seen = []
            hook = module.register_forward_hook(lambda _m, inputs, _out, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                model(**batch)
            hook.remove()
            inputs = torch.cat([seen[0], seen[0]]).reshape(48, -1)  # two batches of 24 tokens
            column = [(module.weight[:, j].abs().sum() * inputs[:, j].norm()).item() for j in range(inputs.shape[1])]
            expected = [sum(column[u * width : (u + 1) * width]) for u in range(len(column) // width)]
            assert got[block.name].tolist() == pytest.approx(expected, rel=1e-4)


def test_the_best_units_stay_as_many_as_asked(load):
    llama, model = load("benchmark_llama"), tiny()
    structure = hc.discover(model)
    blocks = [*structure.attentions, *structure.own_ffns]
    sizes = llama.uniform(blocks, 1, 0.4)
    assert sizes == {block.name: 1 if block in structure.attentions else 16 for block in blocks}  # 14.4, a multiple of 8
    scores = {block.name: torch.arange(2.0 if block in structure.attentions else 24.0) for block in blocks}
    plan = llama.best_of(structure, blocks, scores, sizes)
    assert [edit.heads for edit in plan.edits[:2]] == [(2, 3)] * 2
    assert [edit.neurons for edit in plan.edits[2:]] == [tuple(range(8, 24))] * 2


def test_the_table_shows_means_and_every_seed(load):
    rows = [
        {"way": "Taylor", "sizes of": kind, "asked": 2.0, "ratio": ratio, "speedup": 2.01}
        for kind in ("prune_to", "uniform") for ratio in (1.5, 2.5)
    ]  # fmt: skip
    shown = load("benchmark_llama").table(rows, [2.0]).splitlines()
    assert shown[2] == "| Taylor | prune_to | 2.000 (1.500, 2.500) at 2.01x |" and len(shown) == 4


def test_perplexity_is_that_of_every_token_but_the_first(load):
    wikitext, model = load("wikitext"), tiny()
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(35 * 12).view(35, 12) % 50]  # more than one batch
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        log = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = torch.exp(-log.gather(-1, ids[:, 1:, None]).mean())
    assert wikitext.perplexity(model, rows) == pytest.approx(float(expected), rel=1e-4)
    assert wikitext.spread(rows, 5) == [rows[i] for i in (0, 7, 14, 21, 28)] and wikitext.spread(rows, None) == rows


@pytest.mark.parametrize("text", ["taylor", "taylor:wide", "obs:global", "taylor:global:all"])
def test_a_way_of_the_peer_that_is_none_is_refused(text, load):
    peers = load("benchmark_peers")
    with pytest.raises(Exception, match="is no way: give importance"):
        peers.way_of(text)
    assert peers.way_of("hessian:local:hidden") == {
        "name": "hessian:local:hidden", "importance": "hessian", "scope": "local", "hidden": True,
    }  # fmt: skip
    assert all(peers.way_of(way)["name"] == way for way in peers.WAYS)


def test_the_peers_summary_is_paired_with_ours(load):
    peers, np = load("benchmark_peers"), importlib.import_module("numpy")
    ours, theirs = np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 0, 0])
    lost = {(name, 2.0, "not trained"): [rows] for name, rows in ((peers.OURS, ours), ("taylor:global", theirs))}
    found = [{"way": n, "asked": a, "when": w, "achieved": 2.0, "kl": 0.1, "near": True} for n, a, w in lost]
    first, second = peers.summary(found, lost)
    assert (first["points lost"], first["more than ours"]) == (25.0, 0.0)
    assert (second["points lost"], second["more than ours"]) == (50.0, 25.0)
    assert "| 2, not trained | taylor:global | 2.00 | 50.00 (" in peers.table([first, second])


def test_without_data_both_leave_with_a_reason(load, tmp_path, monkeypatch):
    for name in ("benchmark_llama", "benchmark_peers"):
        monkeypatch.setattr("sys.argv", [name, "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)])
        with pytest.raises(SystemExit, match=r"No .* at .*nowhere.*Skipped"):
            load(name).main()


def test_the_llama_benchmark_from_text_to_table(load, tmp_path, monkeypatch, capsys):
    words = "the lobster is a crab of the sea and the crab is no lobster . ".split()
    draw = torch.Generator().manual_seed(0)
    for name in ("valid", "test"):
        text = " ".join(words[int(i)] for i in torch.randint(len(words), (4000,), generator=draw))
        (tmp_path / f"{name}.txt").write_text(text)
    llama = load("benchmark_llama")
    monkeypatch.setattr(llama.equal_speed, "timed", lambda dense, small, inputs, pairs=1: (counted(dense, small), (1.0, 3.0)))
    family = llama.hc.prune_family
    stand_in = types.SimpleNamespace(
        **{**vars(hc), "prune_family": lambda *a, inputs: by_parameters(family, *a, inputs=inputs)}
    )
    monkeypatch.setattr(llama, "hc", stand_in)
    options = {
        "data": tmp_path, "output": tmp_path / "out", "seeds": 1, "speedups": 1.5, "epochs": 1, "words": 300, "layers": 2,
        "hidden": 32, "heads": 4, "groups": 2, "neurons": 64, "length": 16, "rows": 8, "test-rows": 8, "batch": 2, "pairs": 3,
    }  # fmt: skip
    monkeypatch.setattr("sys.argv", ["x", *(str(x) for k, v in options.items() for x in (f"--{k}", v))])
    llama.main()
    written = json.loads((tmp_path / "out" / "llama.json").read_text())
    assert {(run["way"], run["sizes of"]) for run in written["runs"]} == {
        (way, kind)
        for way in (llama.OURS, "magnitude", "Taylor", "Wanda-structured") for kind in ("prune_to", "uniform")
    }  # fmt: skip
    for run in written["runs"]:
        assert run["ratio"] == pytest.approx(run["perplexity"] / run["dense perplexity"])
    same = [run for run in written["runs"] if run["sizes of"] == "uniform"]
    assert all(run["sizes"] == same[0]["sizes"] for run in same) and len(set(same[0]["sizes"].values())) == 2
    assert "| Wanda-structured | uniform |" in capsys.readouterr().out


def counted(dense, small):
    """In place of a clock: how many times fewer parameters the layers have."""
    count = [sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, small)]
    return count[0] / count[1]


def by_parameters(family, model, batches, speedups, inputs):
    from hf_compress.pruning.latency import LatencyTable, grid

    structure = hc.discover(model)
    blocks = [*structure.attentions, *structure.own_ffns]
    times = {block.name: {size: size / max(grid(block)) for size in grid(block)} for block in blocks}
    return family(model, batches, speedups, table=LatencyTable({}, float(len(blocks)), times))


def test_times_of_known_shares_are_fitted_and_predicted_by_them(load):
    """Made of removals and moments alone, with nothing for forwards: the shares come back, none below 0."""
    scaling = load("benchmark_scaling")
    shapes = [(256, 1024, 3, 2e6), (384, 1536, 3, 5e6), (512, 2048, 6, 2e7), (768, 3072, 3, 2e7), (384, 1536, 6, 1e7)]
    works = np.array([scaling.work(*shape, 1000) for shape in shapes])
    cubes, products = (3 * (256.0**3 + 1024.0**3), 1000 * 3 * (256 * 512 + 1024 * 1280))
    assert works[0].tolist() == [cubes, products, 2e9]
    meant = np.array([2e-10, 3e-11, 0.0])
    shares = scaling.fit(works, works @ meant)
    assert shares == pytest.approx(meant, rel=1e-6, abs=1e-15)
    assert scaling.fit(works, works @ np.array([2e-10, -1e-12, 0.0])).min() >= 0


def test_scaling_of_small_models(load, tmp_path, monkeypatch, capsys):
    scaling = load("benchmark_scaling")

    def here(run: list[str], **_: Any) -> Any:  # and not in a process of its own
        options = dict(zip(run[5::2], run[6::2], strict=True))
        row = scaling.one(*map(int, run[3:5]), *(int(options[f"--{name}"]) for name in ("rows", "length", "threads")))
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(row))

    monkeypatch.setattr(scaling.subprocess, "run", here)
    argv = ["benchmark_scaling.py", "--widths", "64", "128", "--depths", "1", "2", "--check", "128x2", "--rows", "8"]
    monkeypatch.setattr("sys.argv", [*argv, "--length", "8", "--threads", "1", "--output", str(tmp_path)])
    scaling.main()
    data = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["is checked"] for row in data["models"]] == [False, False, False, True]
    one = data["models"][0]
    # sizes 32 .. 224 of 256 neurons, and no whole block: 64 outputs in bfloat16; the one head is whole
    assert one["database MiB"] == pytest.approx(sum(range(32, 256, 32)) * 64 * 2 / 2**20, abs=1e-3) and one["tokens"] == 64
    again = np.dot(data["shares"]["one plan"], scaling.work(64, 256, 1, one["parameters"], 64))
    assert one["fitted"]["one plan"] == pytest.approx(again)
    assert "extrapolated" in capsys.readouterr().out
