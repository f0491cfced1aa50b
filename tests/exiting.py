"""Small classifiers with early exits, and what they must give, for the tests of exits. `torchrun -m tests.exiting`."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers as T

import hf_compress as hc
from hf_compress.exits import (
    attach_exits_,
    collect_exits,
    exit_options,
    resolve_exits,
    set_exits_,
)
from tests.trainers import trainer
from tests.zoo import DEBERTA, GPT2, GQA, IMAGE, TEXT

LABELS = {"num_labels": 3}
MODERN = dict(TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
DISTIL = dict(vocab_size=99, dim=64, n_layers=3, n_heads=4, hidden_dim=96, max_position_embeddings=40)
DINO = {**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, "mlp_ratio": 2}

# name -> (class, config, what heads read by default)
CLASSIFIERS = {
    "bert": (T.BertForSequenceClassification, T.BertConfig, TEXT, "mean"),
    "roberta": (T.RobertaForSequenceClassification, T.RobertaConfig, TEXT, "mean"),
    "distilbert": (T.DistilBertForSequenceClassification, T.DistilBertConfig, DISTIL, "mean"),
    "electra": (T.ElectraForSequenceClassification, T.ElectraConfig, dict(TEXT, embedding_size=32), "mean"),
    "mpnet": (T.MPNetForSequenceClassification, T.MPNetConfig, TEXT, "mean"),
    "deberta_v2": (T.DebertaV2ForSequenceClassification, T.DebertaV2Config, dict(DEBERTA, share_att_key=True), "mean"),
    # this one has a convolution between its first layer and the second, over the layer's input and its output
    "deberta_v2_conv": (
        T.DebertaV2ForSequenceClassification, T.DebertaV2Config, dict(DEBERTA, conv_kernel_size=3, conv_act="gelu"), "mean",
    ),
    "modernbert": (T.ModernBertForSequenceClassification, T.ModernBertConfig, dict(MODERN, classifier_pooling="cls"), "mean"),
    "modernbert_mean": (T.ModernBertForSequenceClassification, T.ModernBertConfig, dict(MODERN, classifier_pooling="mean"), "mean"),
    "vit": (T.ViTForImageClassification, T.ViTConfig, IMAGE, "mean"),
    "dinov2": (T.Dinov2ForImageClassification, T.Dinov2Config, DINO, "mean"),
    # its layers give a list
    "openai_gpt": (
        T.OpenAIGPTForSequenceClassification, T.OpenAIGPTConfig, dict(vocab_size=99, n_embd=64, n_layer=3, n_head=4, pad_token_id=0),
        "last",
    ),
    "gpt2": (T.GPT2ForSequenceClassification, T.GPT2Config, dict(GPT2, pad_token_id=0), "last"),
    "llama": (T.LlamaForSequenceClassification, T.LlamaConfig, GQA, "last"),
}  # fmt: skip


def plain_model(name="bert", **options):
    kind, config, sizes, _ = CLASSIFIERS[name]
    torch.manual_seed(0)
    model = kind(config(**{**sizes, **LABELS, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def spread_heads(model, seed=0):
    """Heads that do not all say the same."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in model.exit_heads.values():
            head.out.weight.copy_(torch.randn(head.out.weight.shape, generator=draw) * 0.3)


def model_with_exits(name="bert", after=(0, 1), **options):
    model = plain_model(name)
    attach_exits_(model, resolve_exits(model, after, **options))
    spread_heads(model)
    return model


def batch_for(model, rows=8, length=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=draw)}
    ids = torch.randint(5, 99, (rows, length), generator=draw)
    real = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=draw)
    ids[~real] = model.config.pad_token_id or 0
    return {"input_ids": ids, "attention_mask": real.long()}


def run(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more)


def all_logits(model, batch):
    """(exits + 1, rows, C), all rows through all layers."""
    with collect_exits(model) as found:
        run(model, batch)
    return found[0]


def halves(model, batch):
    """A threshold for each exit at which half of the rows that are still there leave, with room on both sides."""
    scores, thresholds = torch.softmax(all_logits(model, batch)[:-1], -1).amax(-1), []
    for k in range(len(scores)):
        values = scores[k].sort().values
        middle = len(values) // 2
        while middle < len(values) - 1 and values[middle] - values[middle - 1] < 1e-5:  # equal rows leave together
            middle += 1
        thresholds.append((values[middle - 1] + values[middle]).item() / 2 if len(values) > 1 else 1.0)
        scores = scores[:, scores[k] <= thresholds[-1]]
    return thresholds


def expected(logits, thresholds):
    """What `confidence` must give, with numpy: (rows, C), and the exit of each row."""
    logits = logits.double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sure = p[:-1].max(-1) > np.array(thresholds)[:, None]
    taken = np.where(sure.any(0), sure.argmax(0), len(sure))
    return torch.tensor(logits[taken, np.arange(logits.shape[1])]).float(), torch.tensor(taken)


def layer_rows(model, batch):
    """How many rows each layer truly ran on."""
    seen = {}
    stack = model.get_submodule(exit_options(model)["stack"])
    handles = [
        layer.register_forward_pre_hook(
            lambda m, a, k, i=i: seen.__setitem__(i, len(a[0] if a else k["hidden_states"])), with_kwargs=True
        )
        for i, layer in enumerate(stack)
    ]
    run(model, batch)
    for handle in handles:
        handle.remove()
    return [seen.get(i, 0) for i in range(len(stack))]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


EVALUATED = {
    "input_ids": torch.randint(5, 99, (13, 10), generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.ones(13, 10, dtype=torch.long),
    "labels": torch.arange(13) % 2,
}


def joint_training(folder, rows):
    """Three steps of joint training on batches of 8 rows, `rows` of them in each process."""
    callback = hc.EarlyExitCallback([0, 1], threshold=0.6, distil=0.3)
    model = without_dropout(plain_model(num_labels=2))
    options = {"per_device_train_batch_size": rows, "max_steps": 3, "logging_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    t = trainer(folder, [callback], model=model, kind=hc.CompressionTrainer, **options)
    t.train()
    logs = {k: v for entry in t.state.log_history for k, v in entry.items() if k.endswith("loss") or k.startswith("exit_loss")}
    # 13 rows, of which no number of processes and no batch has an equal share
    t.eval_dataset = [{k: v[i] for k, v in EVALUATED.items()} for i in range(13)]
    set_exits_(t.model, threshold=halves(t.model.eval(), EVALUATED))
    return {"weights": dict(t.model.named_parameters()), "logs": logs, "metrics": t.evaluate(), "model": t.model}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = joint_training(sys.argv[1], 4)
    del found["model"]
    torch.save(found, f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
