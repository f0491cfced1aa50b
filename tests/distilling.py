"""Students, teachers and rows of every task, the loss computed another way, and trainings. `torchrun -m tests.distilling`."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as T
from torch.nn import functional as F

from hf_compress import distillation as D
from tests.zoo import GPT2, GQA, IMAGE, T5, TEXT

DRAW = torch.Generator()
BERT = dict(
    TEXT, hidden_size=32, intermediate_size=48, num_hidden_layers=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0
)
WIDE = dict(BERT, hidden_size=48, num_hidden_layers=3)
LLAMA = dict(GQA, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SMALL_GPT2 = dict(GPT2, n_embd=32, n_inner=48, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
VIT = dict(IMAGE, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
SMALL_T5 = dict(T5, d_model=32, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0)


def model(kind: type, config: T.PreTrainedConfig, seed: int) -> T.PreTrainedModel:
    torch.manual_seed(seed)
    made = kind(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return made


# name -> (class, config, options of the student, options of the teacher)
CASES = {
    "one_label": (T.BertForSequenceClassification, T.BertConfig, dict(BERT, num_labels=3), dict(WIDE, num_labels=3)),
    "many_labels": (
        T.BertForSequenceClassification, T.BertConfig, dict(BERT, num_labels=3, problem_type="multi_label_classification"),
        dict(WIDE, num_labels=3, problem_type="multi_label_classification"),
    ),
    "regression": (T.BertForSequenceClassification, T.BertConfig, dict(BERT, num_labels=1), dict(WIDE, num_labels=1)),
    "tokens": (T.BertForTokenClassification, T.BertConfig, dict(BERT, num_labels=3), dict(WIDE, num_labels=3)),
    "spans": (T.BertForQuestionAnswering, T.BertConfig, BERT, WIDE),
    "image": (T.ViTForImageClassification, T.ViTConfig, dict(VIT, num_labels=3), dict(VIT, num_labels=3, hidden_size=48)),
    "masked_lm": (T.BertForMaskedLM, T.BertConfig, BERT, WIDE),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, LLAMA, dict(LLAMA, hidden_size=48, num_hidden_layers=3)),
    "gpt2": (T.GPT2LMHeadModel, T.GPT2Config, SMALL_GPT2, dict(SMALL_GPT2, n_embd=48)),
    "t5": (T.T5ForConditionalGeneration, T.T5Config, SMALL_T5, dict(SMALL_T5, d_model=48)),
}  # fmt: skip


def pair(case: str) -> tuple[T.PreTrainedModel, T.PreTrainedModel]:
    kind, config, student, teacher = CASES[case]
    return model(kind, config(**student), 1), model(kind, config(**teacher), 2)


def rows(case: str, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Rows of unequal lengths, some of whose labels are left out."""
    DRAW.manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(5, 99, (4 + (i * 5) % 7,), generator=DRAW)
        some = torch.rand(ids.shape, generator=DRAW) < 0.6
        some[1] = True
        row: dict[str, torch.Tensor] = {"input_ids": ids}
        if case == "image":
            row = {"pixel_values": torch.randn(3, 32, 32, generator=DRAW), "labels": torch.tensor(i % 3)}
        elif case == "one_label":
            row["labels"] = torch.tensor(i % 3)
        elif case == "many_labels":
            row["labels"] = torch.tensor([float(i % 2), float(i % 3 == 0), 1.0])
        elif case == "regression":
            row["labels"] = torch.tensor(float(i) - 3)
        elif case == "tokens":
            row["labels"] = torch.where(some, ids % 3, -100)
        elif case == "spans":
            # the head's own loss is over padding too, so it depends on how much there is: as much in every batch
            row["input_ids"] = torch.cat([ids, torch.zeros(10 - len(ids), dtype=torch.long)])
            row.update(start_positions=torch.tensor(i % 3), end_positions=torch.tensor(3))
        elif case == "t5":
            row["labels"] = torch.randint(5, 99, (2 + i % 4,), generator=DRAW)
        else:
            row["labels"] = torch.where(some, ids, -100)
        made.append(row)
    return made


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads ids with 0 under an attention mask, and labels of tokens with -100."""
    out = {}
    for key in batch[0]:
        values = [row[key] for row in batch]
        if key in ("input_ids", "token_type_ids") or (key == "labels" and values[0].dtype == torch.long and values[0].dim()):
            fill = -100 if key == "labels" else 0
            out[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        else:
            out[key] = torch.stack(values)
    if "input_ids" in out:
        out["attention_mask"] = (out["input_ids"] != 0).long()
    return out


def reference(case, student, teachers, data, alphas, temperature=2.0, weights=(1.0,), mse=False, layers=None, projections=None):
    """The loss of a whole batch, one unpadded row at a time: sums of plain formulas over plain counts."""
    sums, counts = dict.fromkeys(("task", "kd", "cos"), 0.0), dict.fromkeys(("task", "kd", "cos"), 0)
    for row in data:
        inputs = {k: v[None] for k, v in row.items() if k in ("input_ids", "pixel_values")}
        labels, real = row.get("labels"), slice(None)
        if case == "spans":
            real = row["input_ids"] != 0
            inputs["attention_mask"] = real.long()[None]
        if case == "t5":
            inputs["decoder_input_ids"] = torch.cat([torch.zeros(1, dtype=torch.long), labels[:-1]])[None]
        s = student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            ts = [teacher(**inputs, output_hidden_states=True) for teacher in teachers]
        if case == "spans":
            parts = [(s[n][0][None], [t[n][0][None] for t in ts], row[p][None])
                     for n, p in (("start_logits", "start_positions"), ("end_logits", "end_positions"))]  # fmt: skip
        else:
            parts = [(s.logits[0], [t.logits[0] for t in ts], labels)]
        for logits, theirs, wanted in parts:
            share = 1 / len(parts)
            if case in ("llama", "gpt2"):
                logits, theirs, wanted = logits[:-1], [t[:-1] for t in theirs], wanted[1:]
            if case == "regression":
                sums["task"] += (logits[0] - wanted) ** 2
                counts["task"] += 1
            elif case == "many_labels":
                sums["task"] += F.binary_cross_entropy_with_logits(logits, wanted)
                counts["task"] += 1
            else:
                logits = logits.reshape(-1, logits.shape[-1])
                theirs = [t.reshape(-1, t.shape[-1]) for t in theirs]
                wanted = wanted.reshape(-1)
                sums["task"] += share * F.cross_entropy(logits, wanted, reduction="sum")
                counts["task"] += share * int((wanted != -100).sum())
                if case == "spans":
                    logits, theirs = logits[:, real], [t[:, real] for t in theirs]
                elif case not in ("one_label", "image", "masked_lm"):
                    logits, theirs = logits[wanted != -100], [t[wanted != -100] for t in theirs]
            if case == "regression" or mse:
                target = sum(w * t for w, t in zip(weights, theirs, strict=True))
                sums["kd"] += share * (logits - target).square().mean(-1).sum()
                counts["kd"] += share * (logits.shape[0] if logits.dim() > 1 else 1)
            elif case == "many_labels":
                p = sum(w * torch.sigmoid(t / temperature) for w, t in zip(weights, theirs, strict=True))
                q = torch.sigmoid(logits / temperature)
                sums["kd"] += temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
                counts["kd"] += 1
            else:
                p = sum(w * torch.softmax(t / temperature, -1) for w, t in zip(weights, theirs, strict=True))
                q = torch.softmax(logits / temperature, -1)
                sums["kd"] += share * temperature**2 * F.kl_div(q.log(), p, reduction="sum")
                counts["kd"] += share * logits.shape[0]
        if layers:
            mine, their = (o.decoder_hidden_states if case == "t5" else o.hidden_states for o in (s, ts[0]))
            for i, j in layers.items():
                h, their_h = mine[i][0][real], their[j][0][real]
                h = projections[str(i)](h) if projections and str(i) in projections else h
                cos = (h * their_h).sum(-1) / (h.norm(dim=-1) * their_h.norm(dim=-1))
                tokens = 1 if case == "image" else len(cos)
                sums["cos"] = sums["cos"] + (1 - cos).sum() / len(layers) * (tokens / len(cos))
                counts["cos"] += tokens / len(layers)
    return {name: sums[name] / counts[name] for name in sums if alphas[name] and counts[name]}


def gradient(trainer) -> dict[str, torch.Tensor]:
    """What one optimizer step would use, from a whole `train()`."""
    found: dict[str, torch.Tensor] = {}

    class Look(T.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            found.update({f"projections.{n}": p.grad.clone() for n, p in trainer.projections.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    return found


def trainer(folder, case, student=None, teacher=None, data=None, kind=None, arguments=None, callbacks=(), **options):
    made = pair(case) if student is None or teacher is None else (student, teacher)
    student, teacher = student or made[0], teacher or made[1]
    options = {
        "max_steps": 1, "per_device_train_batch_size": 8, "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, **options,
    }  # fmt: skip
    data = rows(case) if data is None else data
    return (kind or D.DistillationTrainer)(
        student,
        (arguments or D.DistillationArguments)(str(folder), **options),
        teacher_model=teacher,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        callbacks=list(callbacks),
    )


ALPHAS = {"alpha_task": 0.7, "alpha_kd": 1.3, "alpha_cos": 0.4}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    for case in CASES:
        for steps in (1, 2):
            t = trainer(folder, case, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps, **ALPHAS)
            found = gradient(t)
            logs = {k: v for k, v in t.state.log_history[0].items() if k.startswith("loss")}
            torch.save({"gradient": found, "logs": logs}, f"{folder}/{case}-{steps}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
