"""Every public name called wrongly: one refusal that names the argument and what was got, before anything changes."""

import json

import pytest
import torch
import transformers as T

import hf_compress as hc
from hf_compress.plan import PLAN_FILE, TENSORS_FILE
from tests.exiting import batch_for, model_with_exits, plain_model

FFN, DENSE = "bert.encoder.layer.0", "bert.pooler.dense"
PLAN = hc.Plan([hc.KeepNeurons(FFN, [0, 1])])
NAN = float("nan")
BATCH = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
LABELLED = {**BATCH, "labels": torch.tensor([0, 1])}


def edits(*values):
    return {"format": 1, "edits": list(values)}


def exits_edit(**options):
    return edits({"edit": "AddExits", "after": [0, 1], **options})


def distilling(m, teacher, **options):
    arguments = hc.DistillationArguments("out", report_to=[], use_cpu=True, **options)
    return hc.DistillationTrainer(m, arguments, teacher_model=teacher)


def tune(e, batches=(LABELLED,), **options):
    return hc.tune_exits_(e, batches, **{"max_drop": 0.1, **options})


# (call on a classifier `m` and one with exits `e`, what the message says: the argument, what was got, ...)
CALLS = [
    # --- models
    (lambda m, e: hc.discover(None), "model", "NoneType"),
    (lambda m, e: hc.discover(m.config), "model", "BertConfig"),
    (lambda m, e: hc.apply_(None, PLAN), "model", "NoneType"),
    (lambda m, e: hc.apply_("bert", PLAN), "model", "str"),
    (lambda m, e: hc.apply_(type(m), PLAN), "model", "got type"),
    (lambda m, e: hc.mask_([m], PLAN), "model", "list"),
    (lambda m, e: hc.mask_(m.config, PLAN), "model", "BertConfig"),
    (lambda m, e: hc.Mask(m, PLAN), "mask_(model, plan)", "Plan"),
    (lambda m, e: hc.exit_layers(None), "model", "NoneType"),
    (lambda m, e: hc.exit_layers(m), "no exits"),
    (lambda m, e: hc.exit_layers(torch.nn.Sequential(e)), "no exits", "'0' has"),
    (lambda m, e: hc.exit_options(5), "model", "int"),
    (lambda m, e: hc.exit_options(m.config), "model", "BertConfig"),
    (lambda m, e: hc.set_exits_("e", threshold=0.5), "model", "str"),
    (lambda m, e: hc.set_exits_(m, threshold=0.5), "no exits"),
    (lambda m, e: hc.detach_exits_(None), "model", "NoneType"),
    (lambda m, e: hc.detach_exits_(m), "no exits"),
    (lambda m, e: tune([]), "model", "list"),
    (lambda m, e: tune(m), "no exits"),
    (lambda m, e: hc.measure("bert", BATCH), "model", "str"),
    (lambda m, e: hc.init_student(None, 2), "transformers model", "NoneType"),
    (lambda m, e: hc.init_student(torch.nn.Linear(2, 2), 2), "transformers model", "Linear"),
    (lambda m, e: hc.plan_low_rank(None, ratio=0.5), "model", "NoneType"),
    (lambda m, e: hc.plan_depthwise("resnet"), "model", "str"),
    (lambda m, e: hc.plan_quantization(5, bits=8), "model", "int"),
    (lambda m, e: hc.prune_to(m, [], speedup=2), "batches is empty", "few hundred"),
    (lambda m, e: hc.prune_family(m, [{}], 2), "sequence of numbers", "2"),
    (lambda m, e: hc.LatencyTable.load("no/such/table.json"), "no latency table", "no/such"),
    (lambda m, e: hc.plan_vocabulary(m, None, ["a"]), "fast tokenizer", "NoneType"),
    (lambda m, e: hc.plot_family([1], "family.png"), "sequence of what prune_to gives", "1"),
    (lambda m, e: hc.cut_tokenizer(m, [0, 1]), "fast tokenizer", "BertForSequenceClassification"),
    (lambda m, e: hc.channel_groups("resnet"), "model", "str"),
    (lambda m, e: hc.channel_groups(m.config), "model", "BertConfig"),
    (lambda m, e: hc.plan_experts(None, [], keep=1), "model", "None"),
    (lambda m, e: hc.plan_experts(m, [], keep=1), "no mixture of experts", "discover"),
    (lambda m, e: hc.from_config("bert"), "config", "got str"),
    (lambda m, e: hc.from_config(m.config, auto_class=5), "auto_class", "got 5"),
    (lambda m, e: hc.apply_to_folder("nowhere", hc.Plan(), "out"), "nowhere", "save_pretrained"),
    (lambda m, e: hc.apply_to_folder("nowhere", None, "out"), "Plan", "NoneType"),
    # --- apply_ and mask_
    (lambda m, e: hc.apply_(m, None), "Plan", "NoneType"),
    (lambda m, e: hc.apply_(m, [hc.KeepNeurons(FFN, [0])]), "Plan", "list"),
    (lambda m, e: hc.apply_(m, PLAN.to_dict()), "Plan", "dict"),
    (lambda m, e: hc.mask_(m, hc.KeepNeurons(FFN, [0])), "Plan", "KeepNeurons"),
    (lambda m, e: hc.mask_(m, hc.Plan([hc.AddExits([0])])), "AddExits", "cannot be masked"),
    (lambda m, e: hc.apply_(m, PLAN, inputs=5), "inputs", "int"),
    (lambda m, e: hc.apply_(m, PLAN, inputs={"pixels": torch.zeros(1)}), "inputs", "pixels"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.KeepHeads("nowhere", [0])])), "nowhere", "discover"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.KeepNeurons(FFN, [96])])), "96", "0-95"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.KeepLayers([3])])), "3", "0-2"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.KeepVocabulary([0, 99])])), "99", "0-98"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.KeepVocabulary([1, 2])])), "pad_token_id=0", "[0]"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.LowRank(DENSE, 900)])), "900", "31"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.DepthwiseSeparable(DENSE)])), "Conv2d", "Linear"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.Quantize("bert.encoder")])), "Linear", "BertEncoder"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.AddExits([2])])), "[2]", "0 to 1"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.AddExits([0, 1], threshold=[0.9])])), "thresholds", "2 exits", "got [0.9]"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.AddExits([0], "entropy", 5.0)])), "threshold", "1.0986", "got 5.0"),
    (lambda m, e: hc.apply_(e, hc.Plan([hc.AddExits([0])])), "exits already"),
    (lambda m, e: hc.apply_(m, hc.Plan([hc.AddExits([0]), hc.AddExits([1])])), "2 AddExits"),
    # --- exits: set and tune
    (lambda m, e: hc.set_exits_(e, threshold="0.5"), "threshold", "got '0.5'"),
    (lambda m, e: hc.set_exits_(e, threshold=[0.5]), "threshold", "got [0.5]"),
    (lambda m, e: hc.set_exits_(e, threshold=NAN), "threshold", "got nan"),
    (lambda m, e: hc.set_exits_(e, threshold=10**400), "threshold", "from 0"),
    (lambda m, e: hc.set_exits_(e, threshold=torch.tensor(0.5)), "threshold", "tensor"),
    (lambda m, e: hc.set_exits_(e, criterion=["entropy"], threshold=0.5), "criterion", "['entropy']"),
    (lambda m, e: hc.set_exits_(e, criterion="entropy"), "criterion", "give both"),
    (lambda m, e: hc.set_exits_(e, threshold=0.5, enabled=1), "enabled", "got 1"),
    (lambda m, e: tune(e, None), "batches", "got None"),
    (lambda m, e: tune(e, 5), "batches", "got 5"),
    (lambda m, e: tune(e, "data.csv"), "batches", "got 'data.csv'"),
    (lambda m, e: tune(e, LABELLED), "batches", "list"),
    (lambda m, e: tune(e, []), "batch", "No batch"),
    (lambda m, e: tune(e, [5]), "batches", "got 5"),
    (lambda m, e: tune(e, [BATCH]), "labels"),
    (lambda m, e: tune(e, [{"pixels": 1, "labels": torch.tensor([0])}]), "batches", "pixels"),
    (lambda m, e: tune(e, [{**BATCH, "labels": [0, 1]}]), "label", "list"),
    (lambda m, e: tune(e, [{**BATCH, "labels": torch.tensor([0])}]), "label", "(1,)", "(2,)"),
    (lambda m, e: tune(e, [{**BATCH, "labels": torch.tensor([0, 3])}]), "labels", "0 to 2", "got 3"),
    (lambda m, e: tune(e, [{**BATCH, "labels": torch.tensor([-100, -100])}]), "labels", "-100"),
    (lambda m, e: tune(e, max_drop="1%"), "max_drop", "got '1%'"),
    (lambda m, e: tune(e, max_drop=None), "max_drop", "mean_depth"),
    (lambda m, e: tune(e, mean_depth=0), "mean_depth", "got 0"),
    (lambda m, e: tune(e, mean_depth=True), "mean_depth", "got True"),
    (lambda m, e: tune(e, metric="accuracy"), "metric", "got 'accuracy'"),
    (lambda m, e: tune(e, metric=lambda logits: 1.0), "metric", "takes 1 positional argument"),
    (lambda m, e: tune(e, metric=lambda logits, labels: None), "metric", "NoneType"),
    (lambda m, e: tune(e, metric=lambda logits, labels: NAN), "metric", "gives nan"),
    # --- edits
    (lambda m, e: hc.KeepHeads(0, [0]), "attention", "got 0"),
    (lambda m, e: hc.KeepHeads("a", {"b": 1}), "heads", "got 'b'"),
    (lambda m, e: hc.KeepHeads("a", 3), "heads", "got 3"),
    (lambda m, e: hc.KeepNeurons("a", [NAN]), "neurons", "got nan"),
    (lambda m, e: hc.KeepChannels("a", [-1]), "channels", "-1"),
    (lambda m, e: hc.KeepExperts("a", "x"), "experts", "got 'x'"),
    (lambda m, e: hc.KeepNeurons("a", "x" * 10**6), "neurons", "xxx"),
    (lambda m, e: hc.KeepLayers(None), "layers", "got None"),
    (lambda m, e: hc.KeepLayers([0], 1), "stack", "got 1"),
    (lambda m, e: hc.KeepVocabulary({"a": 1}), "tokens", "got 'a'"),
    (lambda m, e: hc.KeepVocabulary([1, 1]), "tokens", "[1]"),
    (lambda m, e: hc.LowRank("a", "8"), "rank", "got '8'"),
    (lambda m, e: hc.LowRank("a", 0), "rank", ">= 1", "got 0"),
    (lambda m, e: hc.LowRank("a", 8, given=1), "given", "got 1"),
    (lambda m, e: hc.DepthwiseSeparable(["a"]), "module", "got ['a']"),
    (lambda m, e: hc.DepthwiseSeparable("a", True), "multiplier", "got True"),
    (lambda m, e: hc.Sparsify(5), "module", "got 5"),
    (lambda m, e: hc.Sparsify("a", True), "sparsity", "got True"),
    (lambda m, e: hc.Sparsify("a", NAN), "sparsity", "got nan"),
    (lambda m, e: hc.Sparsify("a", pattern=4), "pattern", "got 4"),
    (lambda m, e: hc.Sparsify("a", given="yes"), "given", "got 'yes'"),
    (lambda m, e: hc.Quantize("a", 5), "bits", "got 5"),
    (lambda m, e: hc.Quantize("a", [8]), "bits", "got [8]"),
    (lambda m, e: hc.Quantize("a", 4, 1), "group_size", "got 1"),
    (lambda m, e: hc.Quantize("a", 8, activations=True), "activations", "got True"),
    (lambda m, e: hc.Quantize("a", 4, decode=[]), "decode", "got []"),
    (lambda m, e: hc.AddExits(None), "after", "got None"),
    (lambda m, e: hc.AddExits([]), "after", "got []"),
    (lambda m, e: hc.AddExits(torch.tensor([True, False])), "after", "tensor(True)"),
    (lambda m, e: hc.AddExits([0], criterion=5), "criterion 5"),
    (lambda m, e: hc.AddExits([0], threshold="0.9"), "threshold", "got '0.9'"),
    (lambda m, e: hc.AddExits([0], threshold={"a": 1}), "threshold", "got {'a': 1}"),
    (lambda m, e: hc.AddExits([0, 1], threshold=[0.9, 0.9, 0.9]), "threshold", "got [0.9, 0.9, 0.9]"),
    (lambda m, e: hc.AddExits([0], "entropy", 10**400), "threshold", "ln(num_labels)"),
    (lambda m, e: hc.AddExits([0], "patience", 5), "threshold", "got 5"),
    (lambda m, e: hc.AddExits([1, 0], threshold=[0.9, 0.8]), "after", "upwards", "got [1, 0]"),
    (lambda m, e: hc.AddExits([0], pool="max"), "pool", "got 'max'"),
    (lambda m, e: hc.AddExits([0], distil=NAN), "distil", "got nan"),
    (lambda m, e: hc.AddExits([0], temperature=0), "temperature", "got 0"),
    (lambda m, e: hc.AddExits([0], temperature=10**400), "temperature"),
    (lambda m, e: hc.AddExits([0], weights=5), "weights", "got 5"),
    (lambda m, e: hc.AddExits([0], weights=None), "weights", "got None"),
    (lambda m, e: hc.AddExits([0], weights=torch.ones(2)), "weights", "tensor"),
    (lambda m, e: hc.AddExits([0], weights=torch.ones(2).numpy()), "weights", "array"),
    (lambda m, e: hc.AddExits([0], weights=[1, "a"]), "weights", "got [1, 'a']"),
    (lambda m, e: hc.AddExits([0], weights=[1]), "weights", "2 numbers", "got [1]"),
    # --- plans
    (lambda m, e: hc.Plan(5), "edits", "got 5"),
    (lambda m, e: hc.Plan("KeepHeads"), "edits", "got 'KeepHeads'"),
    (lambda m, e: hc.Plan([PLAN]), "edits", "Plan("),
    (lambda m, e: hc.Plan([], 5), "tensors", "got 5"),
    (lambda m, e: hc.Plan([], {"w": [1.0]}), "tensors", "'w'", "list"),
    (lambda m, e: hc.Plan([], {"w": torch.empty(2, device="meta")}), "tensors", "'w'", "meta"),
    (lambda m, e: hc.Plan([], {"w": torch.eye(2).to_sparse()}), "tensors", "'w'", "sparse"),
    (lambda m, e: PLAN + None, "Plan", "got None"),
    (lambda m, e: PLAN + [hc.KeepNeurons(FFN, [0])], "Plan", "KeepNeurons"),
    (lambda m, e: PLAN.to_dict(spans="yes"), "spans", "got 'yes'"),
    (lambda m, e: hc.Plan.from_dict(None), "edits", "got None"),
    (lambda m, e: hc.Plan.from_dict({"format": True, "edits": []}), "format True"),
    (lambda m, e: hc.Plan.from_dict({"format": ["1"], "edits": []}), "format ['1']"),
    (lambda m, e: hc.Plan.from_dict(edits(5)), "edit: 5"),
    (lambda m, e: hc.Plan.from_dict(edits({"edit": "LowRank", "module": "a", "rank": 2.0})), "rank", "got 2.0"),
    (lambda m, e: hc.Plan.from_dict(edits({"edit": "Quantize", "module": "a", "bits": "8"})), "bits", "got '8'"),
    (lambda m, e: hc.Plan.from_dict(exits_edit(threshold=NAN)), "threshold", "got nan"),
    (lambda m, e: hc.Plan.from_dict(exits_edit(weights=5)), "weights", "got 5"),
    (lambda m, e: hc.Plan.from_dict(exits_edit(pool=["mean"])), "pool", "got ['mean']"),
    (lambda m, e: hc.Plan.from_dict(edits(), 5), "tensors", "got 5"),
    (lambda m, e: hc.Plan.from_dict({**edits(), "tensors": {"sha256": "x"}}, {"w": 3}), "tensors", "'w'", "int"),
    (lambda m, e: hc.Plan.load(None), "folder", "got None"),
    (lambda m, e: hc.Plan.load(b"plans"), "folder", "b'plans'"),
    (lambda m, e: hc.Plan.load(""), "folder", "got ''"),
    (lambda m, e: hc.Plan.load("a\0b"), "folder", r"a\x00b"),
    (lambda m, e: hc.Plan.load("/nowhere/at/all"), "/nowhere/at/all", "No such file"),
    (lambda m, e: PLAN.save(5), "folder", "got 5"),
    (lambda m, e: PLAN.save(""), "folder", "got ''"),
    (lambda m, e: PLAN.save("a\0b"), "folder", r"a\x00b"),
    # --- planners
    (lambda m, e: hc.plan_low_rank(m), "ratio", "rank"),
    (lambda m, e: hc.plan_low_rank(m, ratio="half"), "ratio", "got 'half'"),
    (lambda m, e: hc.plan_low_rank(m, ratio=NAN), "ratio", "got nan"),
    (lambda m, e: hc.plan_low_rank(m, rank=[2]), "rank", "got [2]"),
    (lambda m, e: hc.plan_low_rank(m, 5, ratio=0.5), "batches", "int"),
    (lambda m, e: hc.plan_low_rank(m, [5], ratio=0.5), "batch", "int"),
    (lambda m, e: hc.plan_low_rank(m, ratio=0.5, modules=5), "modules", "got 5"),
    (lambda m, e: hc.plan_depthwise(m), "convolution", "BertForSequenceClassification"),
    (lambda m, e: hc.plan_sparsity("bert"), "model", "str"),
    (lambda m, e: hc.plan_sparsity(m, sparsity="half"), "sparsity", "got 'half'"),
    (lambda m, e: hc.plan_sparsity(m, sparsity=NAN), "sparsity", "got nan"),
    (lambda m, e: hc.plan_sparsity(m, pattern=(2, 4)), "pattern", "got (2, 4)"),
    (lambda m, e: hc.plan_sparsity(m, score=["wanda"]), "score", "wanda"),
    (lambda m, e: hc.plan_sparsity(m, scope=5), "scope", "got 5"),
    (lambda m, e: hc.plan_sparsity(m, 5, score="wanda"), "batches", "int"),
    (lambda m, e: hc.plan_sparsity(m, modules=5), "modules", "got 5"),
    (lambda m, e: hc.plan_sparsity(m, score="random", seed=0.5), "seed", "got 0.5"),
    (lambda m, e: hc.plan_quantization(m, bits=5), "bits", "got 5"),
    (lambda m, e: hc.plan_quantization(m, bits=None), "bits", "got None"),
    (lambda m, e: hc.plan_quantization(m, bits=8, embeddings="no"), "embeddings", "got 'no'"),
    (lambda m, e: hc.plan_quantization(m, bits=8, skip=["cls"]), "skip", "got ['cls']"),
    (lambda m, e: hc.plan_quantization(m, bits=4, group_size=True), "group_size", "got True"),
    (lambda m, e: hc.plan_quantization(m, bits=8, inputs=5), "inputs", "int"),
    (lambda m, e: hc.plan_pruning(m, heads="0.5"), "heads", "got '0.5'"),
    (lambda m, e: hc.plan_pruning(m, neurons=NAN), "neurons", "got nan"),
    (lambda m, e: hc.plan_pruning(m, heads=0.5, score=5), "score 5"),
    (lambda m, e: hc.plan_pruning(m, heads=0.5, scope=["layer"]), "scope", "got ['layer']"),
    (lambda m, e: hc.plan_pruning(m, heads=0.5, uniform=1), "uniform", "got 1"),
    (lambda m, e: hc.plan_pruning(m, heads=0.5, round_to=0), "round_to", "got 0"),
    (lambda m, e: hc.plan_pruning(m, 5, heads=0.5), "batches", "int"),
    (lambda m, e: hc.plan_pruning(m, heads=0.5, loss_fn="ce"), "loss_fn", "got 'ce'"),
    (lambda m, e: hc.plan_pruning(m, heads=0.5, score="random", seed=NAN), "seed", "got nan"),
    # --- measure, init_student, with_quantizer
    (lambda m, e: hc.measure(m, None), "inputs", "NoneType"),
    (lambda m, e: hc.measure(m, {"pixels": 1}), "inputs", "pixels"),
    (lambda m, e: hc.measure(m, BATCH, against=5), "against", "int"),
    (lambda m, e: hc.measure(m, BATCH, metrics=5), "metrics", "got 5"),
    (lambda m, e: hc.measure(m, BATCH, repeats=0), "repeats", "got 0"),
    (lambda m, e: hc.measure(m, BATCH, warmup=1.5), "warmup", "1.5"),
    (lambda m, e: hc.init_student(m, "2"), "layers", "got '2'"),
    (lambda m, e: hc.init_student(m, True), "layers", "got True"),
    (lambda m, e: hc.init_student(m, 4), "3 layers", "got 4"),
    (lambda m, e: hc.init_student(m, [0, 3]), "3 layers", "got 3"),
    (lambda m, e: hc.init_student(m, [2, 0]), "upwards", "[2, 0]"),
    (lambda m, e: hc.plan_pruning(None, heads=0.5), "model", "NoneType"),
    (lambda m, e: hc.plan_layers("bert", score="random"), "model", "str"),
    (lambda m, e: hc.plan_layers(m, [BATCH], layers=1.5), "layers", "got 1.5"),
    (lambda m, e: hc.plan_layers(m, score="block"), "score", "'block'"),
    (lambda m, e: hc.plan_pruning("bert", heads=0.5), "model", "str"),
    (lambda m, e: hc.DistillationArguments("out", distillation_task=[]), "distillation_task", "[]"),
    (lambda m, e: hc.with_quantizer(5, T.BitsAndBytesConfig(load_in_8bit=True)), "checkpoint", "int"),
    (lambda m, e: hc.init_student(m, {"decoder": 1}), "stack", "'decoder'"),
    (lambda m, e: hc.init_student(m, 2, inputs=5), "inputs", "int"),
    (lambda m, e: hc.with_quantizer("out", None), "TorchAoConfig", "NoneType"),
    (lambda m, e: hc.with_quantizer("out", "nf4"), "TorchAoConfig", "str"),
    # --- publishing
    (lambda m, e: hc.Report.load(5), "Report.load", "got 5"),
    (lambda m, e: hc.Report.load("nowhere"), "report", "nowhere"),
    (lambda m, e: hc.render_card(None), "Plan", "NoneType"),
    (lambda m, e: hc.render_card(PLAN, {"metric": 1}), "Report", "dict"),
    (lambda m, e: hc.dequantize_(m), "quantized", "nothing to dequantize"),
    (lambda m, e: hc.dequantize_(5), "model", "int"),
    (lambda m, e: hc.push_to_hub(5, "me/x"), "model", "int"),
    (lambda m, e: hc.push_to_hub(m, "me/x/y"), "me/x/y", "repo"),
    (lambda m, e: hc.push_to_hub(m, 5), "repo_id", "5"),
    (lambda m, e: hc.run_recipe(5), "recipe", "int"),
    (lambda m, e: hc.run_recipe("nowhere.yaml"), "nowhere.yaml:1", "no such file"),
    (lambda m, e: hc.run_recipe({"modle": "x"}), "modle", "did you mean 'model'"),
    # --- callbacks and trainers
    (lambda m, e: hc.EarlyExitCallback(1), "after", "got 1"),
    (lambda m, e: hc.EarlyExitCallback([0], "margin"), "criterion 'margin'"),
    (lambda m, e: hc.EarlyExitCallback([0], threshold="x"), "threshold", "got 'x'"),
    (lambda m, e: hc.EarlyExitCallback([0], threshold=NAN), "threshold", "got nan"),
    (lambda m, e: hc.EarlyExitCallback([0], pool=5), "pool", "got 5"),
    (lambda m, e: hc.EarlyExitCallback([0], distil=2), "distil", "got 2"),
    (lambda m, e: hc.EarlyExitCallback([0], weights=torch.ones(2)), "weights", "tensor"),
    (lambda m, e: hc.EarlyExitCallback([0], evaluate="yes"), "evaluate", "got 'yes'"),
    (lambda m, e: hc.EarlyExitCallback([0], inputs=5), "inputs", "got 5"),
    (lambda m, e: hc.PruningCallback(), "heads", "neurons"),
    (lambda m, e: hc.PruningCallback(heads=[0.5]), "heads", "got [0.5]"),
    (lambda m, e: hc.PruningCallback(0.5, start=0.9), "start", "got 0.9"),
    (lambda m, e: hc.PruningCallback(0.5, every=0.5), "every", "got 0.5"),
    (lambda m, e: hc.PruningCallback(0.5, smoothing=NAN), "smoothing", "got nan"),
    (lambda m, e: hc.PruningCallback(0.5, inputs=5), "inputs", "int"),
    (lambda m, e: hc.SparsityCallback("half"), "sparsity", "got 'half'"),
    (lambda m, e: hc.SparsityCallback(0.5, score=5), "score", "5"),
    (lambda m, e: hc.SparsityCallback(0.5, end=NAN), "end", "got 0.1 and nan"),
    (lambda m, e: hc.SparsityCallback(0.5, every=True), "every", "got True"),
    (lambda m, e: hc.SparsityCallback(0.5, inputs=5), "inputs", "int"),
    (lambda m, e: hc.find_ticket(m, 0.5), "make_trainer", "BertForSequenceClassification"),
    (lambda m, e: hc.find_ticket(list, NAN), "sparsity", "nan"),
    (lambda m, e: hc.find_ticket(list, 0.5), "make_trainer", "list"),
    (lambda m, e: hc.find_ticket(list, 0.5, rounds=2.0), "rounds", "2.0"),
    (lambda m, e: hc.find_ticket(list, 0.5, rewind_to="k"), "rewind_to", "'k'"),
    (lambda m, e: hc.find_ticket(list, 0.5, controls="reinit"), "controls", "'reinit'"),
    (lambda m, e: hc.find_ticket(list, heads="all"), "heads", "'all'"),
    (lambda m, e: hc.Ticket(3), "masks", "3"),
    (lambda m, e: hc.Ticket({"a": torch.ones(2)}), "'a'", "bool", "float32"),
    (lambda m, e: hc.Ticket.load("/nowhere/at/all"), "/nowhere/at/all", "No such file"),
    (lambda m, e: hc.LotteryTicketCallback(None), "ticket", "None"),
    (lambda m, e: hc.LotteryTicketCallback(hc.Ticket({"a": torch.tensor([True])}), "random"), "control", "'random'"),
    (lambda m, e: hc.QuantizationCallback("int8"), "bits", "got 'int8'"),
    (lambda m, e: hc.QuantizationCallback(4, group_size=1), "group_size", "got 1"),
    (lambda m, e: hc.QuantizationCallback(8, embeddings="no"), "embeddings", "'no'"),
    (lambda m, e: hc.QuantizationCallback(8, skip=5), "skip", "got 5"),
    (lambda m, e: hc.QuantizationCallback(8, inputs=5), "inputs", "int"),
    (lambda m, e: hc.QuantizationCallback(8, start=NAN), "start", "got nan"),
    (lambda m, e: hc.QuantizationCallback(8, freeze="late"), "freeze", "'late'"),
    (lambda m, e: hc.QuantizationCallback(8, every=0), "every", "got 0"),
    (lambda m, e: hc.DistillationArguments("out", alpha_kd=-1), "alpha_kd", "-1"),
    (lambda m, e: hc.DistillationArguments("out", temperature="hot"), "temperature", "got 'hot'"),
    (lambda m, e: hc.DistillationArguments("out", kd_loss=["kl"]), "kd_loss ['kl']"),
    (lambda m, e: hc.DistillationArguments("out", layer_map="{"), "layer_map", "got '{'"),
    (lambda m, e: hc.Seq2SeqDistillationArguments("out", teacher_weights=[0]), "teacher_weights", "got [0]"),
    (lambda m, e: hc.DistillationTrainer(m, T.TrainingArguments("out"), teacher_model=m), "args", "TrainingArguments"),
    (lambda m, e: distilling(m, None), "teacher_model"),
    (lambda m, e: distilling(m, "bert-base"), "teacher_model='bert-base'"),
    (lambda m, e: distilling(m, []), "teacher_model", "empty"),
    (lambda m, e: distilling(m, e, teacher_weights=[1.0, 1.0]), "teacher_weights", "2 numbers"),
    (lambda m, e: distilling(5, m), "student", "int"),
]


def state_of(model):
    """Everything that a call could change, comparable."""
    hooks = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    options = hc.exit_options(model), model.__dict__["_exits"].enabled if hc.exit_options(model) else None
    return hooks, weights, options, json.dumps(model.config.to_dict(), default=str, sort_keys=True)


@pytest.fixture(scope="module")
def models():
    return plain_model(), model_with_exits()


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_one_refusal_before_anything_changes(index, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, *words = CALLS[index]
    before = [state_of(model) for model in models]
    with pytest.raises(hc.CompressionError) as caught:
        call(*models)
    message = str(caught.value)
    assert all(word in message for word in words), (words, message)
    assert len(message) < 700 and [state_of(model) for model in models] == before
    assert not list(tmp_path.iterdir())


def test_what_would_change_is_seen():
    """The comparison above fails where a call does change something."""
    changes = [
        lambda model: hc.set_exits_(model, threshold=0.3),
        lambda model: hc.set_exits_(model, enabled=False),
        lambda model: hc.detach_exits_(model),
        lambda model: model.train(),
        lambda model: hc.mask_(model, PLAN),
        lambda model: setattr(model.config, "num_labels", 7),
        lambda model: model.classifier.weight.data.mul_(2),
    ]
    for change in changes:
        model = model_with_exits()
        before = state_of(model)
        assert state_of(model) == before
        change(model)
        assert state_of(model) != before


def test_every_public_name_is_called_wrongly():
    called = {name for call in (*(row[0] for row in CALLS), tune, distilling) for name in call.__code__.co_names}
    # errors, what `discover` and `find_ticket` give, and classes whose arguments are those of transformers
    not_called = {
        "CompressionError",
        "PushError",
        "RecipeError",
        "Structure",
        "ChannelGroup",
        "FoundTicket",
        "Pruned",
        "CompressionTrainer",
        "DistillationMixin",
    }
    assert set(hc.__all__) - called <= not_called, "a new public name comes with its wrong calls"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole plan"),
        (b"hello", "not a whole plan"),
        (b"\xff\xfe\x00\x80", "not a whole plan .*utf-8"),
        (b'{"format": 1, "edits": [', "not a whole plan"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"edits": ' * 50_000 + b"1" + b"}" * 50_000, "nested deeper"),
        (
            b'{"format": 1, "edits": [{"edit": "LowRank", "module": "a", "rank": ' + b"9" * 5000 + b"}]}",
            "not a whole plan|rank",
        ),
        (b"null", "edits.*None"),
        (b"[]", "edits.*\\[\\]"),
        (b'"plan"', "edits.*'plan'"),
        (b'{"format": 1, "edits": {}}', "edits"),
        (b'{"format": 2, "edits": []}', "format 2"),
        (b'{"format": 1, "edits": [null]}', "edit: None"),
        (b'{"format": 1, "edits": [{"edit": "AddExits", "after": [0], "threshold": NaN}]}', "threshold.*nan"),
        (b'{"format": 1, "edits": [{"edit": "AddExits", "after": "0-9999999"}]}', "0-9999999"),
        (b'{"format": 1, "edits": [], "tensors": 5}', TENSORS_FILE),
        (b'{"format": 1, "edits": [], "tensors": {"sha256": "x"}}', TENSORS_FILE),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else "",
)
def test_files_that_are_no_plans(content, message, tmp_path):
    (tmp_path / PLAN_FILE).write_bytes(content)
    with pytest.raises(hc.CompressionError, match=message) as caught:
        hc.Plan.load(tmp_path)
    assert len(str(caught.value)) < 700


def test_folders_where_files_should_be(tmp_path):
    (tmp_path / PLAN_FILE).mkdir()
    with pytest.raises(hc.CompressionError, match="Is a directory"):
        hc.Plan.load(tmp_path)
    (tmp_path / PLAN_FILE).rmdir()
    PLAN.save(tmp_path)
    with pytest.raises(hc.CompressionError, match="Not a directory"):
        hc.Plan.load(tmp_path / PLAN_FILE)
    hc.Plan([], {"w": torch.ones(1)}).save(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    (tmp_path / TENSORS_FILE).mkdir()
    with pytest.raises(hc.CompressionError, match="Is a directory"):
        hc.Plan.load(tmp_path)


def test_nothing_nests_deep_enough_to_get_through():
    """Python's own limit depends on where a call comes from; JSON that is parsed just below it must not break later."""
    nested: list = []
    for _ in range(900):
        nested = [nested]
    for data in ({"format": 1, "edits": nested}, {"format": nested, "edits": []}, exits_edit(weights=nested), nested):
        with pytest.raises(hc.CompressionError):
            hc.Plan.from_dict(data)


def test_right_arguments_that_look_wrong():
    assert hc.AddExits(torch.tensor([1, 0])).after == (0, 1) == hc.AddExits(i for i in range(2)).after
    assert hc.EarlyExitCallback(range(2)).after == [0, 1] == hc.EarlyExitCallback({1, 0}).after
    # of three layers the last has the model's own head: its threshold and weight are left out with it
    for numbers in ({"threshold": [0.9, 0.8, 0.7], "weights": [1, 2, 3, 4]}, {"threshold": [0.9, 0.8], "weights": [1, 2, 4]}):
        model = hc.apply_(plain_model(), hc.Plan([hc.AddExits([0, 1, 2], **numbers)]))
        options = hc.exit_options(model)
        assert (options["after"], options["threshold"], options["weights"]) == ([0, 1], [0.9, 0.8], [1.0, 2.0, 4.0])
    # rows without a label are left out
    model = model_with_exits()
    batch = {**batch_for(model), "labels": torch.arange(8) % 3}
    few = {name: value[:5] for name, value in batch.items()}
    found = tune(model, [few], mean_depth=2.0, max_drop=None)
    hidden = {**batch, "labels": torch.where(torch.arange(8) < 5, batch["labels"], -100)}
    assert tune(model, [hidden], mean_depth=2.0, max_drop=None) == found and found["full_metric"] * 5 % 1 == pytest.approx(0)
