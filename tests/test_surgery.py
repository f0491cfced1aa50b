"""apply_ and mask_: exact or refused, and a refusal leaves the model as it was."""

import copy

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn.utils import parametrize, prune

import hf_compress as hc
from hf_compress import surgery
from hf_compress.discover import Part
from tests.zoo import GQA, TEXT, build, outputs, random_plan

Q = "model.layers.0.self_attn"


def snapshot(model):
    """Everything that a failed edit could have changed."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, type(m)) for n, m in model.named_modules()],
        {n: {k: v for k, v in vars(m).items() if type(v) in (int, float, bool, str)} for n, m in model.named_modules()},
        copy.deepcopy(model.config.to_dict()),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def same(one, other):
    return (
        one[1:] == other[1:] and one[0].keys() == other[0].keys() and all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    )


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([hc.KeepHeads(Q, [0, 1, 4])], r"names 4, but there are 4 heads at that point \(0-3\)"),
        ([hc.KeepHeads(Q, [0, 1]), hc.KeepHeads(Q, [2])], "names 2, but there are 2 heads"),
        ([hc.KeepHeads(Q, [0, 1, 2])], r"unequal numbers .* \(group 0: 2, group 1: 1\)"),
        ([hc.KeepNeurons("model.layers.0.mlp", [96])], "there are 96 neurons"),
        ([hc.KeepHeads("model.layers.0.self_atn", [0])], f"did you mean '{Q}'"),
        ([hc.KeepNeurons("model.layer.0.mlp", [0])], "did you mean 'model.layers.0.mlp'"),
        ([hc.KeepHeads("bert.encoder.layer.0.attention.self", [0])], "LlamaForCausalLM has no attention named"),
        ([hc.KeepLayers([0, 3])], "names 3, but there are 3 layers"),
        ([hc.KeepLayers([0], "encoder")], "No stack is named 'encoder'"),
        ([hc.KeepLayers([0, 1]), hc.KeepHeads("model.layers.2.self_attn", [0, 1])], "an earlier KeepLayers"),
        ([hc.KeepHeads(Q, [0, 1]), hc.KeepNeurons("model.layers.1.mlp", [500])], "there are 96 neurons"),
    ],
)
def test_refusals_change_nothing(edits, message):
    model, _ = build("llama")
    before = snapshot(model)
    for verb in (hc.apply_, hc.mask_):
        with pytest.raises(hc.CompressionError, match=message):
            verb(model, hc.Plan(edits))
        assert same(snapshot(model), before)


def test_several_stacks_must_be_named():
    model, _ = build("bart")
    with pytest.raises(hc.CompressionError, match=r"several stacks; name one: .*\['decoder', 'encoder'\]"):
        hc.apply_(model, hc.Plan([hc.KeepLayers([0])]))
    hc.apply_(model, hc.Plan([hc.KeepLayers([0, 2], "decoder")]))
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (3, 2)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (3, 2)


def test_edits_compose_as_they_would_one_after_the_other():
    """Names and indices of an edit refer to the model as the edits before it left it."""
    edits = [
        hc.KeepHeads("model.layers.2.self_attn", [2, 3]),
        hc.KeepLayers([1, 2]),
        hc.KeepNeurons("model.layers.1.mlp", range(10, 60)),  # was layer 2
        hc.KeepNeurons("model.layers.1.mlp", range(5, 20)),  # neurons 15-29 of the first numbering
        hc.KeepHeads("model.layers.1.self_attn", [1]),  # head 3
        hc.KeepHeads("model.layers.0.self_attn", [0, 1]),
    ]
    at_once, batch = build("llama")
    one_by_one = copy.deepcopy(at_once)
    weight = at_once.model.layers[2].mlp.up_proj.weight.detach().clone()
    query = at_once.model.layers[2].self_attn.q_proj.weight.detach().clone()
    with hc.mask_(at_once, hc.Plan(edits)):
        masked = outputs(at_once, batch)
    hc.apply_(at_once, hc.Plan(edits))
    for edit in edits:
        hc.apply_(one_by_one, hc.Plan([edit]))
    torch.testing.assert_close(outputs(at_once, batch), masked, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(at_once, batch), outputs(one_by_one, batch))
    assert torch.equal(at_once.model.layers[1].mlp.up_proj.weight, weight[15:30])
    assert torch.equal(at_once.model.layers[1].self_attn.q_proj.weight, query[48:64])
    assert [layer.self_attn.layer_idx for layer in at_once.model.layers] == [0, 1]
    assert at_once.config.quantization_config.plan == one_by_one.config.quantization_config.plan == hc.Plan(edits)


def test_equal_query_heads_in_every_group_is_exact_too(tmp_path):
    model, batch = build("llama")
    plan = hc.Plan([hc.KeepHeads(Q, [1, 2]), hc.KeepHeads("model.layers.1.self_attn", [2])])
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    first, second = (hc.discover(model).attentions[i] for i in (0, 1))
    assert (first.num_heads, first.num_key_value_heads) == (2, 2)
    assert (second.num_heads, second.num_key_value_heads) == (1, 1)


def test_names_work_with_and_without_the_base_prefix():
    task = T.BertForSequenceClassification(T.BertConfig(**TEXT)).eval()
    base = copy.deepcopy(task.bert)
    long, short = "bert.encoder.layer.0.attention.self", "encoder.layer.0.attention.self"
    hc.apply_(task, hc.Plan([hc.KeepHeads(short, [0, 3])]))
    hc.apply_(base, hc.Plan([hc.KeepHeads(long, [0, 3])]))
    assert torch.equal(
        task.bert.encoder.layer[0].attention.self.query.weight, base.encoder.layer[0].attention.self.query.weight
    )


def test_a_plan_that_keeps_everything_changes_nothing():
    model, _ = build("bert")
    before = snapshot(model)
    hc.apply_(model, hc.Plan([hc.KeepHeads("bert.encoder.layer.0.attention.self", range(4)), hc.KeepLayers(range(3))]))
    hc.apply_(model, hc.Plan())
    assert same(snapshot(model), before)


def test_a_failure_half_way_through_the_commit_is_undone(monkeypatch):
    for family in ("bert", "llama", "t5", "mpnet", "phi3", "swin", "modernbert"):
        model, batch = build(family)
        dense = outputs(model, batch)  # first: Swin changes attributes of its own while it runs
        before = snapshot(model)
        with monkeypatch.context() as patch:
            patch.setattr(surgery, "stamp_", lambda *a: (_ for _ in ()).throw(MemoryError("no memory")))
            with pytest.raises(MemoryError):
                hc.apply_(model, random_plan(model, ("heads", "neurons", "layers")))
        assert same(snapshot(model), before), family
        assert torch.equal(outputs(model, batch), dense), family


class Interleaved(T.LlamaPreTrainedModel):
    """A model with one fused projection whose rows lie as (dim, heads, 3): a layout that no rule here knows."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attn = OddAttention(config)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return T.modeling_outputs.BaseModelOutput(last_hidden_state=self.attn(self.embed_tokens(input_ids)))


class OddAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], -1, self.num_heads, 3).unbind(-1)
        q, k, v = (t.permute(0, 3, 1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.permute(0, 2, 1, 3).flatten(2))


def test_a_layout_that_no_rule_knows_is_found():
    model = Interleaved(T.LlamaConfig(**GQA)).eval()
    before, ids = copy.deepcopy(model.attn), {"input_ids": torch.randint(5, 99, (2, 10))}
    plan = hc.Plan([hc.KeepHeads("attn", [0, 2])])
    with hc.mask_(model, plan):
        masked = outputs(model, ids)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, ids), masked, atol=1e-5, rtol=1e-5)
    by_hand = before.qkv.weight.view(before.head_dim, 4, 3, -1)[:, [0, 2]].flatten(0, 2)
    assert torch.equal(model.attn.qkv.weight, by_hand)
    columns = [*range(before.head_dim), *range(2 * before.head_dim, 3 * before.head_dim)]
    assert torch.equal(model.attn.proj.weight, before.proj.weight[:, columns])


class Mixing(OddAttention):
    """A norm over all heads before the output projection: no head can go without changing the others."""

    def __init__(self, config):
        super().__init__(config)
        self.sub_norm = nn.LayerNorm(config.hidden_size)
        self.proj.register_forward_pre_hook(lambda module, args: (self.sub_norm(args[0]),))


def test_heads_that_a_norm_mixes_are_refused_with_that_reason():
    model = Interleaved(T.LlamaConfig(**GQA)).eval()
    model.attn = Mixing(T.LlamaConfig(**GQA)).eval()
    before = snapshot(model)
    with pytest.raises(hc.CompressionError, match=r"Cannot cut 'attn': .*a norm over all \('sub_norm'\)"):
        hc.apply_(model, hc.Plan([hc.KeepHeads("attn", [0, 2])]))
    assert same(snapshot(model), before)


def test_fused_layouts_are_told_apart_by_gradients_alone():
    """GPT-NeoX interleaves q, k and v by head, Phi-3 has them in blocks: no rule says which, both come out exact."""
    for family, interleaved in (("gpt_neox", True), ("phi3", False), ("gpt2", False)):
        model, _ = build(family)
        resolved = surgery.resolve(model, random_plan(model, ("heads",)))
        proved = surgery._prove_all(model, resolved, None)
        for cut in resolved.cuts:
            block = cut.block
            fused = next(part.module for part in block.parts if part.layout is None)
            (found,) = {
                tuple(part.owner.tolist())
                for part in proved[block.name].parts
                if part.module == fused and part.parameter == "weight"
            }
            heads = torch.arange(block.num_heads)
            # a key's rows are its head's; where heads share keys, these have numbers of their own
            keys = heads if block.groups == 1 else block.num_heads + torch.arange(block.num_key_value_heads)
            rows = heads.repeat_interleave(3) if interleaved else torch.cat([heads, keys, keys])
            assert list(found) == rows.repeat_interleave(block.head_dim).tolist()


def test_a_wrong_partner_is_put_right(monkeypatch):
    """If discover pairs a down projection with the wrong up projection, gradients find the one that feeds it."""
    model, _ = build("bert")
    found = hc.discover(model)
    wrong = tuple(
        type(f)(f.name, f.size, f.out, (Part(found.ffns[1].parts[0].module, 0, "n"), f.parts[1]), "bert.encoder")
        for f in found.ffns[:1]
    )
    monkeypatch.setattr("hf_compress.resolve.discover", lambda m: hc.Structure(found.attentions, wrong, found.layers, (), ()))
    batch, plan = build("bert")[1], hc.Plan([hc.KeepNeurons("bert.encoder.layer.0", range(50))])
    with hc.mask_(model, plan):
        masked = outputs(model, batch)
    hc.apply_(model, plan)
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    rows = [layer.intermediate.dense.weight.shape[0] for layer in model.bert.encoder.layer]
    assert rows == [50, 96, 96]


def test_weights_that_are_not_plain_are_refused():
    name = "bert.encoder.layer.0.attention.self"
    plan = hc.Plan([hc.KeepHeads(name, [0])])
    for spoil, message in (
        (lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()), "parametrized"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "torch.nn.utils.prune"),
    ):
        model, _ = build("bert")
        spoil(model.get_submodule(name).query)
        for verb in (hc.apply_, hc.mask_):
            with pytest.raises(hc.CompressionError, match=message):
                verb(model, plan)

    class Adapted(nn.Linear):
        pass

    model, _ = build("bert")
    model.get_submodule(name).value.__class__ = Adapted
    with pytest.raises(hc.CompressionError, match="Adapted, not a plain Linear"):
        hc.apply_(model, plan)


def test_weights_shared_between_blocks_are_refused():
    model, _ = build("bert")
    first, second = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[1].intermediate.dense
    second.weight = first.weight
    with pytest.raises(hc.CompressionError, match="is shared with"):
        hc.apply_(model, hc.Plan([hc.KeepNeurons("bert.encoder.layer.0", range(50))]))


def test_a_mask_over_what_the_plan_keeps_is_not_lost_in_silence():
    model, batch = build("bert")
    name = "bert.encoder.layer.0.attention.self"
    mask = hc.mask_(model, hc.Plan([hc.KeepHeads(name, [0, 1])]))
    with pytest.raises(hc.CompressionError, match="is masked, and the plan keeps some of what the mask hides"):
        hc.apply_(model, hc.Plan([hc.KeepHeads(name, [1, 2])]))
    masked = outputs(model, batch)
    hc.apply_(model, hc.Plan([hc.KeepHeads(name, [0, 1])]))
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    mask.remove()
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)


def test_masks_nest_and_come_off_in_any_number():
    model, batch = build("gpt2")
    dense = outputs(model, batch)
    outer = hc.mask_(model, hc.Plan([hc.KeepNeurons("transformer.h.0.mlp", range(50))]))
    half = outputs(model, batch)
    with hc.mask_(model, hc.Plan([hc.KeepNeurons("transformer.h.0.mlp", range(20, 96)), hc.KeepLayers([0, 1])])):
        both = outputs(model, batch)
    assert torch.equal(outputs(model, batch), half) and not torch.equal(both, half)
    outer.remove()
    outer.remove()
    assert torch.equal(outputs(model, batch), dense)
    assert not any("hfc" in name for name, _ in model.named_buffers())


def test_a_masked_unit_gets_no_gradient():
    model, batch = build("bert")
    with hc.mask_(model, hc.Plan([hc.KeepNeurons("bert.encoder.layer.0", range(90))])):
        outputs_ = model(**batch, labels=torch.tensor([0, 1]))
        outputs_.loss.backward()
    layer = model.bert.encoder.layer[0]
    assert layer.intermediate.dense.weight.grad[90:].abs().max() == 0
    assert layer.output.dense.weight.grad[:, 90:].abs().max() == 0
    assert layer.output.dense.weight.grad[:, :90].abs().max() > 0


def test_the_proof_leaves_random_state_and_training_mode_alone():
    model, _ = build("bert")
    model.train()
    model.bert.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    hc.apply_(model, random_plan(model, ("heads", "neurons")))
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == modes


def test_inputs_of_your_own_where_none_can_be_made():
    class Renamed(T.BertModel):
        main_input_name = "token_sequence"

        def forward(self, token_sequence=None, **kwargs):
            return super().forward(input_ids=token_sequence, **kwargs)

    model = Renamed(T.BertConfig(**TEXT)).eval()
    plan = hc.Plan([hc.KeepNeurons("encoder.layer.0", range(9))])
    with pytest.raises(hc.CompressionError, match=r"main input is 'token_sequence'; pass inputs="):
        hc.apply_(model, plan)
    with pytest.raises(hc.CompressionError, match="does not run on the proof's inputs"):
        hc.apply_(model, plan, inputs={"token_sequence": torch.zeros(2, 2)})
    hc.apply_(model, plan, inputs={"token_sequence": torch.tensor([[5, 6]])})
    assert model.encoder.layer[0].output.dense.in_features == 9


def test_a_block_that_the_inputs_do_not_reach_is_proved_on_others():
    model, batch = build("clip")

    class TextOnly(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.whole, self.config = whole, whole.config

        def forward(self, input_ids):
            return self.whole.get_text_features(input_ids)

    wrapped = TextOnly(model)
    plan = hc.Plan([hc.KeepNeurons("whole.vision_model.encoder.layers.0.mlp", range(9))])
    with hc.mask_(wrapped, plan):
        masked = outputs(model, batch)
    hc.apply_(wrapped, plan, inputs={"input_ids": torch.tensor([[5, 6, 2]])})
    torch.testing.assert_close(outputs(model, batch), masked, atol=1e-5, rtol=1e-5)
    assert model.vision_model.encoder.layers[0].mlp.fc1.out_features == 9


def test_plans_with_tensors_that_nothing_uses_are_refused():
    model, _ = build("bert")
    plan = hc.Plan([hc.KeepNeurons("bert.encoder.layer.0", range(9))], {"w": torch.zeros(1)})
    with pytest.raises(hc.CompressionError, match="none of its edits uses"):
        hc.apply_(model, plan)
