"""What is drawn, where, and from which numbers: kept units, error against size, a family against its speed-up."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.about import seen
from hf_compress.discover import discover
from hf_compress.drawing import Bar, Line, Point, error_figure, family_figure, kept_figure
from hf_compress.hub import push_folder
from hf_compress.pictures import draw_, error_lines, kept_units, pruned_in
from hf_compress.pruning.calibrate import Calibration
from hf_compress.pruning.latency import grid
from hf_compress.pruning.plots import family_points
from hf_compress.pruning.sensitivity import sensitivities
from hf_compress.pruning.staged import StagedRun
from hf_compress.publish import write_card_
from tests.test_prune_to import bert, blocks_of, texts
from tests.trainers import trainer
from tests.zoo import build

HEADS, NEURONS = "bert.encoder.layer.{}.attention.self", "bert.encoder.layer.{}"


def drawn_bars(axis):
    """(grey, blue) bars of a panel: {place: height}."""
    found = {}
    for container in axis.containers:
        found[container.get_label()] = {round(b.get_x() + b.get_width() / 2): b.get_height() for b in container}
    return found.get("before", {}), found["kept"]


# --- kept units ------------------------------------------------------------------------------------------------------


def test_bars_are_shares_with_counts_written_in_and_what_there_was_behind():
    pytest.importorskip("matplotlib")
    heads, neurons = [Bar("0", 3, 12), Bar("1", 12, 12)], [Bar("0", 1024, 4096), Bar("1", 0, 4096)]
    figure = kept_figure({"heads": heads, "neurons": neurons, "channels": [Bar("a", 7, None), Bar("b", 2, 9)]})
    one, two, three = figure.axes
    assert drawn_bars(one) == ({0: 1.0, 1: 1.0}, {0: 0.25, 1: 1.0}) and drawn_bars(two) == ({0: 1.0, 1: 1.0}, {0: 0.25, 1: 0.0})
    assert drawn_bars(three) == ({1: 9.0}, {0: 7.0, 1: 2.0})  # counts, where a share is not known of all
    assert [[t.get_text() for t in axis.texts] for axis in figure.axes] == [["3", "12"], ["1,024", "0"], ["7", "2"]]
    assert [axis.get_ylabel() for axis in figure.axes] == ["heads kept", "neurons kept", "channels kept"]
    assert [t.get_text() for t in three.get_xticklabels()] == ["a", "b"]


@pytest.mark.parametrize("layers", [6, 80])
def test_numbers_do_not_lie_on_each_other(layers):
    pytest.importorskip("matplotlib")
    draw = np.random.default_rng(0)
    sizes = {"heads": 64, "neurons": 28672}
    panels = {w: [Bar(str(i), int(draw.integers(1, n)), n) for i in range(layers)] for w, n in sizes.items()}
    figure = kept_figure(panels)
    figure.canvas.draw()
    for axis in figure.axes:
        assert len(axis.texts) == layers
        for texts_ in (axis.texts, axis.get_xticklabels()):
            boxes = [text.get_window_extent() for text in texts_]
            assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
            assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def family(name):
    torch.manual_seed(0)
    if name == "resnet":
        return T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1])).eval()
    return build(name)[0].eval()


PLANS = {
    "bert": [hc.KeepHeads(HEADS.format(2), [0, 1]), hc.KeepNeurons(NEURONS.format(0), range(5))],
    "llama": [hc.KeepHeads("model.layers.0.self_attn", [0, 1]), hc.KeepLayers([0, 2])],
    "t5": [hc.KeepLayers([1], "decoder"), hc.KeepHeads("decoder.block.0.layer.1.EncDecAttention", [0, 2])],
    "resnet": [hc.KeepChannels("resnet.encoder.stages.0.layers.0.shortcut.convolution", range(12))],
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_drawn_of_a_real_model_is_what_it_has(name):
    """With a baseline known, every block of the dense model against that of the cut one; layers that went have none."""
    dense, model = family(name), family(name)
    edits = PLANS[name]
    if name != "resnet":
        known = {b.name for b in discover(dense).attentions}
        edits = [e if not isinstance(e, hc.KeepHeads) or e.attention in known else None for e in edits]
        assert None not in edits, sorted(known)
    plan = hc.Plan(edits)
    hc.apply_(model, plan)
    found = kept_units(plan, seen(model, dense))
    if name == "bert":
        expected = {HEADS.format(i): (2 if i == 2 else 4, 4) for i in range(3)}
        assert found["heads"] == expected
        size = discover(dense).ffns[0].size
        assert found["neurons"] == {NEURONS.format(i): (5 if i == 0 else size, size) for i in range(3)}
        assert found.keys() == {"heads", "neurons"}
    elif name == "llama":
        heads = discover(dense).attentions[0].num_heads
        assert [now for now, _ in found["heads"].values()] == [2, 0, heads] and found["layers: model.layers"] == {
            "0": (1, 1), "1": (0, 1), "2": (1, 1)
        }  # fmt: skip
        assert [now for now, was in found["neurons"].values()] == [
            was if i != 1 else 0 for i, (_, was) in enumerate(found["neurons"].values())
        ]
    elif name == "t5":
        layers = len(discover(dense).stacks["decoder"])
        assert found["layers: decoder.block"] == {str(i): (int(i == 1), 1) for i in range(layers)}
        assert found["heads"]["decoder.block.1.layer.1.EncDecAttention"] == (2, 4)
        assert found["heads"]["decoder.block.0.layer.1.EncDecAttention"] == (0, 4)
        assert found["heads"]["encoder.block.0.layer.0.SelfAttention"] == (4, 4)
    else:
        before = {c.name: c.out_channels for c in discover(dense).channels}
        after = {c.name: c.out_channels for c in discover(model).channels}
        assert found == {"channels": {n: (after[n], before[n]) for n in before}}
        assert sum(now < was for now, was in found["channels"].values()) == 3  # all that write the stream
    alone = kept_units(plan, {})  # and from the plan alone, what it says
    if name == "bert":
        assert alone == {"heads": {HEADS.format(2): (2, None)}, "neurons": {NEURONS.format(0): (5, None)}}
    if name == "t5":
        assert alone["heads"] == {"decoder.block.1.layer.1.EncDecAttention": (2, None)}


@pytest.mark.parametrize(
    ("edits", "blocks", "expected"),
    [
        # an edit of a layer that a later one removes; two edits of one block; a second KeepLayers counts in what the first left
        ([hc.KeepHeads("m.0", [0]), hc.KeepHeads("m.3", [0, 1]), hc.KeepLayers([1, 3], "m"), hc.KeepHeads("m.1", [0]), hc.KeepLayers([1], "m")],
         {}, {"heads": {"m.3": (1, None)}, "layers, up to the last that is known: m": {"0": (0, 1), "1": (0, 1), "2": (0, 1), "3": (1, 1)}}),
        # the plan has names without the prefix of the task's model
        ([hc.KeepLayers([1], "enc.layer"), hc.KeepHeads("enc.layer.0", [0])],
         {"model": {"heads": {"bert.enc.layer.0": 1}}, "against": {"heads": {"bert.enc.layer.0": 4, "bert.enc.layer.1": 4}, "layers": {"bert.enc.layer": 2}}},
         {"heads": {"bert.enc.layer.0": (0, 4), "bert.enc.layer.1": (1, 4)}, "layers: bert.enc.layer": {"0": (0, 1), "1": (1, 1)}}),
        # a baseline that is called otherwise: the block in the same place; with fewer layers, only where all are of one size
        ([hc.KeepHeads("a.0", [0])], {"model": {"heads": {"a.0": 1, "a.1": 3}}, "against": {"heads": {"b.0": 4, "b.1": 6}}}, {"heads": {"a.0": (1, 4), "a.1": (3, 6)}}),
        ([hc.KeepHeads("a.0", [0])], {"model": {"heads": {"a.0": 1}}, "against": {"heads": {"b.0": 4, "b.1": 6}}}, {"heads": {"a.0": (1, None)}}),
        ([hc.KeepHeads("a.0", [0])], {"model": {"heads": {"a.0": 1}}, "against": {"heads": {"b.0": 4, "b.1": 4}}}, {"heads": {"a.0": (1, 4)}}),
        # no baseline: the sizes of all blocks, of what was cut
        ([hc.KeepHeads("a.0", [0])], {"model": {"heads": {"a.0": 1, "a.1": 3}, "neurons": {"f": 9}}}, {"heads": {"a.0": (1, None), "a.1": (3, None)}}),
        # layers alone
        ([hc.KeepLayers([0, 1])], {"model": {"heads": {"a.0": 4, "a.1": 4}}, "against": {"heads": {"a.0": 4, "a.1": 4, "a.2": 4}, "layers": {"a": 3}}},
         {"heads": {"a.0": (4, 4), "a.1": (4, 4), "a.2": (0, 4)}, "layers: a": {"0": (1, 1), "1": (1, 1), "2": (0, 1)}}),
        ([hc.KeepLayers([10**6])], {}, {}),
        ([hc.Quantize("a", 8)], {"model": {"heads": {"a": 1}}, "against": {"heads": {"a": 4}}}, {}),
    ],
)  # fmt: skip
def test_blocks_are_found_where_they_were(edits, blocks, expected):
    assert kept_units(hc.Plan(edits), {"blocks": blocks}) == expected


# --- error against size ----------------------------------------------------------------------------------------------


def test_lines_and_marks_are_the_numbers():
    pytest.importorskip("matplotlib")
    units = {"a.0": "heads", "a.1": "heads", "f.0": "neurons"}
    sizes, curves = {"a.0": [2, 4], "a.1": [4, 4], "f.0": [32, 64]}, {n: [[2, 0.5], [4, 0.0]] for n in ("a.0", "a.1")}
    lines = error_lines(units, sizes, {**curves, "f.0": [[16, 0.75], [64, 0.0]]})
    assert lines["neurons"] == [Line("0", [(0.25, 0.75), (1.0, 0.0)], None)]  # its size is not on the grid: no mark
    figure = error_figure(lines)
    heads, neurons = figure.axes[:2]
    assert [line.get_xydata().tolist() for line in heads.lines] == [
        [[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5]], [[0.5, 0.5], [1.0, 0.0]], [[1.0, 0.0]],
    ]  # fmt: skip
    assert [line.get_xydata().tolist() for line in neurons.lines] == [[[0.25, 0.75], [1.0, 0.0]]]
    assert heads.get_xlabel() == "heads that stay" and len(error_figure({"heads": lines["heads"] * 40}).axes[0].lines) == 160


def test_curves_are_what_the_best_weights_lose(tmp_path):
    """Against least squares on the rows that hooks see, greedily over heads, outputs weighed by their sensitivity."""
    model, batches = bert(), texts()
    structure = discover(model)
    attention, dense = structure.attentions[1], model.bert.encoder.layer[1].attention.output.dense
    scale = sensitivities(Calibration(model, structure, blocks_of(model), batches))[attention.name].double().numpy()
    seen_rows = []
    hook = dense.register_forward_hook(lambda _m, args, _o: seen_rows.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    x = torch.cat([r[b["attention_mask"].bool()] for r, b in zip(seen_rows, batches, strict=True)]).double().numpy()
    w = dense.weight.detach().double().numpy()
    x = x - x.mean(0)
    pull = np.sqrt(0.01 * (x**2).mean(0).mean() * len(x))
    rows, goal = np.concatenate([x, pull * np.eye(x.shape[1])]), np.concatenate([x @ w.T, pull * w.T])

    def lost(heads):
        columns = [h * 8 + i for h in heads for i in range(8)]
        best = np.linalg.lstsq(rows[:, columns], goal, rcond=None)[0] if columns else np.zeros((0, 32))
        return float((((goal - rows[:, columns] @ best) ** 2) * scale).sum() / len(x))

    heads, expected = [0, 1, 2, 3], [0.0]
    while heads:
        heads = min(([h for h in heads if h != gone] for gone in heads), key=lost)
        expected.append(lost(heads))
    pruned = hc.prune_to(copy.deepcopy(model), batches, parameters=1.4)
    assert pruned.units == {b.name: "heads" if b in structure.attentions else "neurons" for b in blocks_of(model)}
    assert pruned.curves.keys() == pruned.sizes.keys() == pruned.units.keys()
    assert pruned.curves[attention.name] == [
        [left, pytest.approx(expected[4 - left] / expected[4], rel=1e-3, abs=1e-9)] for left in (1, 2, 3, 4)
    ]
    for block in blocks_of(model):
        assert [size for size, _ in pruned.curves[block.name]] == grid(block)
        assert pruned.sizes[block.name][0] in grid(block) and pruned.curves[block.name][-1][1] == 0.0

    pruned.save(tmp_path)
    saved = json.loads((tmp_path / "pruned.json").read_text())
    assert saved == json.loads(json.dumps(pruned.to_dict())) and saved["curves"] == pruned.curves
    assert hc.Plan.load(tmp_path) == pruned.plan and pruned_in(tmp_path, pruned.plan) == saved
    assert pruned_in(tmp_path, hc.Plan(pruned.plan.edits[1:])) is None and pruned_in(tmp_path / "none", pruned.plan) is None
    names = {p.name for p in tmp_path.iterdir()}
    assert names >= {"kept.png", "error.png"} or not hc.pictures.can_draw()
    before = {name: (tmp_path / name).read_bytes() for name in names}
    pruned.save(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in names}  # the same to the byte
    marks = error_lines(pruned.units, pruned.sizes, pruned.curves)["heads"]
    left, there = pruned.sizes[attention.name]
    assert marks[1].chosen == (left / there, dict(pruned.curves[attention.name])[left])
    assert kept_units(pruned.plan, {}, saved) == {
        what: {n: tuple(s) for n, s in pruned.sizes.items() if pruned.units[n] == what} for what in ("heads", "neurons")
    }


def test_grouped_heads_are_counted_as_groups(tmp_path):
    model, batch = build("llama")
    attention = discover(model).attentions[0]
    assert 1 < attention.num_key_value_heads < attention.num_heads
    pruned = hc.prune_to(model, [batch], parameters=1.2)
    assert pruned.units[attention.name] == "kv groups"
    assert {there for name, (_, there) in pruned.sizes.items() if pruned.units[name] == "kv groups"} == {
        attention.num_key_value_heads
    }
    kinds = kept_units(pruned.plan, {}, json.loads(json.dumps(pruned.to_dict())))
    assert kinds.keys() == {"kv groups", "neurons"}
    assert kinds["kv groups"][attention.name] == tuple(pruned.sizes[attention.name])


def test_without_matplotlib_there_is_json_and_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.drawing.find_spec", lambda name: None)
    said = []
    monkeypatch.setattr("hf_compress.pictures.logger.warning_once", said.append)
    (tmp_path / "kept.png").write_bytes(b"of an earlier run")
    hc.prune_to(bert(), texts(), parameters=1.2).save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert said == ["matplotlib is not installed: pruned.json is written without its pictures (kept.png, error.png)."]
    with pytest.raises(hc.CompressionError, match="which is not installed: pip install matplotlib"):
        hc.plot_family(FAMILY, tmp_path / "family.png")


# --- a family --------------------------------------------------------------------------------------------------------


def member(achieved, interval=(0.0, 9.0), lost=0.5, target="speedup", threads=2):
    conditions = {"threads": threads, "dtype": "float32", "shapes": {"input_ids": [32, 64]}}
    return hc.Pruned(hc.Plan(), target, achieved, achieved, interval, {"a": [1, 2], "b": [2, 2]}, {"a": lost}, conditions, 1.0)


FAMILY = [member(2.0, (1.9, 2.2), 0.25), member(1.5, (1.4, 1.55), 0.125)]


def test_a_family_is_drawn_against_what_was_measured():
    pytest.importorskip("matplotlib")
    points, dense, peers = family_points(
        FAMILY, [(0.8, 0.78, 0.83), 0.85], 0.9, {"Torch-Pruning": [(2.0, 0.7), (1.5, (0.75, 0.7, 0.8))], "x": [(2, 0.6)]}
    )
    assert points == [Point(2.0, 0.8, (1.9, 2.2), (0.78, 0.83)), Point(1.5, 0.85, (1.4, 1.55), None)]
    assert dense == Point(1.0, 0.9) and peers["x"] == [Point(2.0, 0.6)]
    axis = family_figure(dense, points, peers, ["speed-up", "accuracy"]).axes[0]
    bars = {c.get_label(): c for c in axis.containers}
    assert list(bars) == ["dense", "pruned", "Torch-Pruning", "x"]
    assert bars["dense"][0].get_xydata().tolist() == [[1.0, 0.9]]
    assert bars["pruned"][0].get_xydata().tolist() == [[1.5, 0.85], [2.0, 0.8]]
    across, along = ([segment.tolist() for segment in one.get_segments()] for one in bars["pruned"][2])
    assert np.allclose(across, [[[1.4, 0.85], [1.55, 0.85]], [[1.9, 0.8], [2.2, 0.8]]])
    assert np.allclose(along, [[[1.5, 0.85], [1.5, 0.85]], [[2.0, 0.78], [2.0, 0.83]]])
    assert bars["Torch-Pruning"][0].get_xydata().tolist() == [[1.5, 0.75], [2.0, 0.7]]
    assert len({bar[0].get_marker() for bar in bars.values()}) == 3  # dense and family are dots, others are not
    assert [line.get_ydata() for line in axis.lines if line.get_label() == "_dense"] == [[0.9, 0.9]]


def test_without_accuracies_a_family_shows_what_it_lost(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    points, dense, peers = family_points(FAMILY)
    assert [p.y for p in points] == [0.125, 0.0625] and dense == Point(1.0, 0.0) and not peers  # over both blocks
    seen_labels = []
    draw = family_figure
    monkeypatch.setattr("hf_compress.pruning.plots.family_figure", lambda *a, **k: (seen_labels.append(a[3]), draw(*a, **k))[1])
    hc.plot_family(FAMILY, tmp_path / "new" / "one.png")
    hc.plot_family([member(2.0, None, target="macs")], tmp_path / "new" / "two.png", accuracies=[0.5], dense=0.6, label="F1")
    hc.plot_family([member(2.0, None)], tmp_path / "new" / "one.png")
    hc.plot_family([*FAMILY, member(3.0, threads=1)], tmp_path / "new" / "one.png")
    assert seen_labels == [
        ["speed-up, batch 32 x 64, 2 threads, float32", "lost of the blocks' outputs (mean)"],
        ["times fewer multiply-accumulates", "F1"],
        ["speed-up, predicted from a table of times, batch 32 x 64, 2 threads, float32", "lost of the blocks' outputs (mean)"],
        ["speed-up", "lost of the blocks' outputs (mean)"],  # measured in several places
    ]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"one.png", "two.png"}
    before = (tmp_path / "new" / "one.png").read_bytes()
    hc.plot_family([*FAMILY, member(3.0, threads=1)], tmp_path / "new" / "one.png")
    assert before.startswith(b"\x89PNG") and before == (tmp_path / "new" / "one.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"family": []}, r"family must be a sequence of what prune_to gives \(Pruned\), got \[\]"),
        ({"family": FAMILY[0]}, "family must be a sequence"),
        ({"family": [*FAMILY, member(2.0, None, target="macs")]}, "one target and one way to reach it, got macs, speedup"),
        ({"family": [*FAMILY, member(2.0, None)]}, "got speed-ups that were measured and others that a table predicted"),
        ({"path": "family.svg"}, r"path must be that of a .png file, got 'family.svg'"),
        ({"dense": 0.9}, r"give those of the family as well \(accuracies=\)"),
        ({"peers": {"x": [(2, 0.5)]}}, r"give those of the family as well \(accuracies=\)"),
        ({"accuracies": [0.9, 0.8]}, "dense must be the accuracy of the dense model"),
        ({"accuracies": [0.9], "dense": 0.9}, "accuracies must be one for each of the family, in its order: got 1, for 2"),
        ({"accuracies": 0.9, "dense": 0.9}, "got float, for 2 models"),
        ({"accuracies": [0.9, float("nan")], "dense": 0.9}, "accuracies holds nan at 1.5"),
        ({"accuracies": [0.9, (0.8, 0.9, 1.0)], "dense": 0.9}, r"an accuracy a number, or \(number, low, high\)"),
        ({"accuracies": [0.9, 0.8], "dense": "high"}, "dense holds 'high'"),
        ({"accuracies": [0.9, 0.8], "dense": 0.9, "peers": [(2, 0.5)]}, "peers must be a dict of names and pairs"),
        ({"accuracies": [0.9, 0.8], "dense": 0.9, "peers": {"x": (2, 0.5)}}, r"peers\['x'\] must be a sequence of pairs"),
        ({"accuracies": [0.9, 0.8], "dense": 0.9, "peers": {"x": [(-2, 0.5)]}}, r"peers\['x'\] holds 0.5 at -2"),
        ({"accuracies": [0.9, 0.8], "dense": 0.9, "label": ""}, "label is what accuracies measure"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hc.CompressionError, match=said):
        hc.plot_family(**{"family": FAMILY, "path": "family.png", **arguments})
    assert not list(tmp_path.iterdir())


# --- on the card -----------------------------------------------------------------------------------------------------


def test_the_card_of_a_pruned_model_shows_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model = bert()
    pruned = hc.prune_to(model, texts(), parameters=1.3)
    model.save_pretrained(tmp_path)
    pruned.save(tmp_path)
    hc.plot_family([pruned], tmp_path / "family.png")
    drawn = []
    monkeypatch.setattr("hf_compress.pictures.kept_figure", lambda panels: (drawn.append(panels), kept_figure(panels))[1])
    with pytest.raises(hc.PushError):  # offline; the card is written before
        push_folder(tmp_path, "me/small")
    card = (tmp_path / "README.md").read_text()
    names = [line.split("](")[1].rstrip(")") for line in card.splitlines() if line.startswith("![")]
    assert names == ["kept.png", "error.png", "family.png"] and all((tmp_path / name).is_file() for name in names)
    assert {what: [(b.now, b.was) for b in bars] for what, bars in drawn[0].items()} == {
        what: [tuple(s) for n, s in pruned.sizes.items() if pruned.units[n] == what] for what in ("heads", "neurons")
    }
    # the file of another model: its sizes and its curves are not shown
    data = json.loads((tmp_path / "pruned.json").read_text())
    data["plan"]["edits"] = data["plan"]["edits"][1:]
    (tmp_path / "pruned.json").write_text(json.dumps(data))
    write_card_(tmp_path, pruned.plan)
    card = (tmp_path / "README.md").read_text()
    assert "(kept.png)" in card and "(error.png)" not in card and not (tmp_path / "error.png").exists()
    assert [b.was for b in drawn[1]["heads"]] == [None] * len(drawn[1]["heads"])
    for broken in ("{", json.dumps({**data, "sizes": {"a": [5, 4]}}), json.dumps({**data, "curves": {"a": 1}})):
        (tmp_path / "pruned.json").write_text(broken)
        with pytest.raises(hc.CompressionError, match="is not what Pruned.save writes .*: remove it, or save it again"):
            write_card_(tmp_path, pruned.plan)


def test_a_card_without_a_report_knows_the_sizes_of_its_model(tmp_path):
    pytest.importorskip("matplotlib")
    model = family("bert")
    plan = hc.Plan(PLANS["bert"])
    hc.apply_(model, plan)
    assert draw_(tmp_path, plan, None, seen(model)) == ["kept.png"]
    assert kept_units(plan, seen(model))["heads"] == {HEADS.format(i): (2 if i == 2 else 4, None) for i in range(3)}


# --- in a run folder -------------------------------------------------------------------------------------------------


def test_a_training_to_a_target_leaves_its_pictures(tmp_path):
    prune = hc.PruningCallback(parameters=1.69, start=0.25, end=0.75, every=3)
    t = trainer(tmp_path / "run", [prune], model=bert())
    t.train()
    saved = json.loads((tmp_path / "run" / "pruned.json").read_text())
    last = prune.stages[-1]
    assert saved["stages"] == json.loads(json.dumps(prune.stages)) and len(prune.stages) == 2
    assert {key: saved[key] for key in ("target", "asked", "achieved", "sizes", "curves")} == {"target": "parameters", **{
        key: last[key] for key in ("asked", "achieved", "sizes", "curves")}}  # fmt: skip
    assert pruned_in(tmp_path / "run", prune.plan) == saved
    now = {b.name: b for b in blocks_of(t.model)}
    for name, (left, _) in last["sizes"].items():
        there = prune.stages[0]["sizes"][name][0]  # when the last stage began
        assert left == getattr(now[name], "num_heads", None) or left == getattr(now[name], "size", None)
        assert [size for size, _ in last["curves"][name]] == [size for size in grid(blocks_dense()[name]) if size <= there]
        assert dict(last["curves"][name]).get(there, 0.0) == 0.0 and left in dict(last["curves"][name])
    if hc.pictures.can_draw():
        assert all((tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG") for name in ("kept.png", "error.png"))


def blocks_dense():
    return {b.name: b for b in blocks_of(bert())}


class Done(StagedRun):
    """A run that has nothing left to do."""

    is_full, stages, trainer, model = True, [{"asked": 2.0}], None, None

    def __init__(self, save):
        self.save, self.undo = save, lambda: None

    def warn_if_off(self):
        pass

    def cut(self, optimizer):
        return hc.Plan([hc.KeepHeads("a", [0])])


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_writes_and_a_full_disk_does_not_lose_a_training(first, tmp_path, monkeypatch):
    written, said = [], []

    def save(folder, plan):
        written.append((folder, plan))
        raise hc.CompressionError("Could not write into run: no space left.")

    monkeypatch.setattr("hf_compress.pruning.callback.logger.warning", said.append)
    prune = hc.PruningCallback(parameters=1.3)
    prune._run = Done(save)
    args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=False)
    prune.on_train_end(args, T.TrainerState(is_world_process_zero=first), None)
    assert prune.plan.edits == (hc.KeepHeads("a", [0]),) and prune.stages == [{"asked": 2.0}]
    assert written == ([(str(tmp_path), prune.plan)] if first else [])
    assert said == (["Could not write into run: no space left."] if first else [])
