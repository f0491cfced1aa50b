"""cut_tokenizer and plan_vocabulary: the same tokens for texts whose tokens stay, whatever the kind; every text still has some."""

import copy
import json
import random
from collections import Counter

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hf_compress as hc
from hf_compress.pieces import cut_pieces, fixed_ids, letters, parts_needed
from hf_compress.tokenizer import pieces_of
from tests.tokenizers import TOKENIZERS, texts
from tests.zoo import TEXT

WORDS = sorted({word for text in texts() for word in text.split()})


def some_tokens(tokenizer, seed, part=3):
    """A random set of tokens, and what the tokenizer needs beside it."""
    data = pieces_of(tokenizer)
    kept = {*fixed_ids(data), *tokenizer.all_special_ids, *letters(data)}
    kept |= set(random.Random(seed).sample(range(len(tokenizer)), len(tokenizer) // part))
    kept |= parts_needed(data, kept).keys()
    assert not parts_needed(data, kept), "what parts need are parts"
    return tuple(sorted(kept))


def samples(tokenizer, kept, seed, count=90):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(count)] + [
        tokenizer.decode(draw.choices(kept, k=draw.randint(2, 6))) for _ in range(count)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_of_kept_tokens_are_tokenized_as_before(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    kept = some_tokens(tokenizer, seed=1)
    before = tokenizer.get_vocab()
    cut = hc.cut_tokenizer(tokenizer, hc.Plan([hc.KeepVocabulary(kept)]))
    new = {old: place for place, old in enumerate(kept)}
    assert tokenizer.get_vocab() == before and type(cut) is type(tokenizer)
    assert cut.get_vocab() == {token: new[i] for token, i in before.items() if i in new}
    assert cut.special_tokens_map == tokenizer.special_tokens_map
    cut.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    kept_whole = lost = 0
    for text in samples(tokenizer, kept, seed=2):
        old, ids = tokenizer(text).input_ids, cut(text).input_ids
        assert again(text).input_ids == ids
        if set(old) <= set(kept):
            kept_whole += 1
            assert ids == [new[i] for i in old], text
            assert cut.convert_ids_to_tokens(ids) == tokenizer.convert_ids_to_tokens(old)
            assert cut.decode(ids) == tokenizer.decode(old)
        else:
            lost += 1
            assert set(ids) <= set(range(len(kept))) and len(ids) > 0
    assert kept_whole > 40 and lost > 20, "both kinds of text must have come up"
    pair, old_pair = cut("run", "walks"), tokenizer("run", "walks")  # what is put around texts has followed
    if set(old_pair.input_ids) <= set(kept):
        assert pair.input_ids == [new[i] for i in old_pair.input_ids]


def test_every_setting_of_the_tokenizer_stays():
    tokenizer = TOKENIZERS["llama3"]()
    tokenizer.chat_template = "{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer.padding_side, tokenizer.model_max_length, tokenizer.pad_token = "left", 77, "<|reserved|>"
    kept = some_tokens(tokenizer, seed=3)
    cut = hc.cut_tokenizer(tokenizer, kept)
    assert (cut.padding_side, cut.model_max_length, cut.name_or_path) == ("left", 77, tokenizer.name_or_path)
    assert cut.pad_token_id == kept.index(tokenizer.pad_token_id) == len(kept) - 1
    messages = [{"role": "user", "content": "ab"}]
    assert cut.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert cut(["a", "a b a b"], padding=True).input_ids[0][0] == cut.pad_token_id


def bpe(merges, extra=()):
    pieces = list(dict.fromkeys([*"abc", *extra, *("".join(pair) for pair in merges)]))
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_token_on_the_way_of_a_merge_must_stay():
    """a, b, c, ab, abc: abc comes from ab. Without ab it would not come out any more, so that is refused, and planned for."""
    tokenizer = bpe([("a", "b"), ("ab", "c")])
    assert tokenizer.tokenize("abc") == ["abc"]
    with pytest.raises(hc.CompressionError, match=r"1 tokens go that others need: without 'ab' \(3\), 'abc' \(4\).*\[3\]"):
        hc.cut_tokenizer(tokenizer, [0, 1, 2, 4])
    without = Tokenizer.from_str(json.dumps(cut_pieces(pieces_of(tokenizer), (0, 1, 2, 4))))
    assert without.encode("abc").tokens == ["a", "b", "c"], "the refusal would be needless"
    model = T.BertModel(T.BertConfig(**{**TEXT, "vocab_size": 5}))
    assert hc.plan_vocabulary(model, tokenizer, ["abc"]).edits[0].tokens == (0, 1, 2, 3, 4)


def test_of_two_ways_to_a_token_only_the_one_that_is_taken_is_needed():
    """abc by bc (an earlier merge) although ab could lead there too: ab may go, bc may not."""
    tokenizer = bpe([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")])
    vocab = tokenizer.get_vocab()
    kept = [vocab[piece] for piece in ("a", "b", "c", "bc", "abc")]
    cut = hc.cut_tokenizer(tokenizer, kept)
    for text in ("abc", "bc", "aabcc", "cabc"):
        assert cut.tokenize(text) == tokenizer.tokenize(text)
    with pytest.raises(hc.CompressionError, match="without 'bc'"):
        hc.cut_tokenizer(tokenizer, [vocab[piece] for piece in ("a", "b", "c", "ab", "abc")])


def unigram(pieces):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_piece_with_the_lowest_score_must_stay():
    """An unknown character costs ten less than the lowest score. Without q, an unknown a would beat three pieces of -10."""
    tokenizer = unigram([("ab", -10.0), ("cd", -10.0), ("ef", -10.0), ("bcdef", -1.0), ("q", -40.0)])
    assert tokenizer("abcdef").input_ids == [1, 2, 3]  # -30; an unknown a and bcdef: -50 - 1
    with pytest.raises(hc.CompressionError, match=r"without 'q' \(5\)"):
        hc.cut_tokenizer(tokenizer, [0, 1, 2, 3, 4])
    without = Tokenizer.from_str(json.dumps(cut_pieces(pieces_of(tokenizer), (0, 1, 2, 3, 4))))
    assert without.encode("abcdef").ids == [0, 4], "the refusal would be needless"  # -20 - 1
    assert hc.cut_tokenizer(tokenizer, [0, 1, 2, 3, 5])("abcdef").input_ids == [1, 2, 3]


def test_what_goes_makes_no_other_path_better():
    """Every subset of pieces that holds the best path has that path as its best."""
    draw = random.Random(0)
    strings = ["a", "b", "c", "ab", "bc", "ca", "abc", "bca", "cab", "aa"]
    for _ in range(10):
        tokenizer = unigram([(piece, -draw.choice([1.0, 2.0, 2.5, 4.0, 5.0])) for piece in strings])
        text = "".join(draw.choices("abc", k=9))
        best = tokenizer(text).input_ids
        kept = {0, *best, *draw.sample(range(1, 11), 4)}
        kept |= parts_needed(pieces_of(tokenizer), kept).keys()
        cut = hc.cut_tokenizer(tokenizer, sorted(kept))
        assert cut.tokenize(text) == tokenizer.convert_ids_to_tokens(best)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            [0, 1, 2, 3],
            r"cannot do without 1 tokens that go: 4 \('\[MASK\]', an added token|cannot do without .* 4 \('\[MASK\]'",
        ),
        (hc.Plan([hc.KeepHeads("a", [0])]), "has no KeepVocabulary"),
        (hc.Plan([hc.KeepVocabulary([0], "a"), hc.KeepVocabulary([0], "b")]), "several vocabularies"),
        ([0, 1, 2, 3, 4, "x"], "whole numbers, got 'x'"),
    ],
)
def test_cut_tokenizer_refuses(tokens, message):
    with pytest.raises(hc.CompressionError, match=message):
        hc.cut_tokenizer(TOKENIZERS["bert"](), tokens)


def test_kinds_that_are_not_known_are_refused():
    dropping = bpe([("a", "b")])
    dropping.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(hc.CompressionError, match=r"drops merges at random \(dropout=0.1\)"):
        hc.cut_tokenizer(dropping, [0, 1, 2, 3])
    with pytest.raises(hc.CompressionError, match="Only fast tokenizers"):
        hc.cut_tokenizer(T.ByT5Tokenizer(), [0])
    processor = type("Processor", (), {"tokenizer": TOKENIZERS["bert"]()})()
    with pytest.raises(hc.CompressionError, match=r"holds a BertTokenizer: give that one \(processor.tokenizer\)"):
        hc.cut_tokenizer(processor, [0])


def test_a_gap_in_the_ids_is_refused_and_rows_after_them_are_not():
    """A model has rows that no token uses: those between tokens would move the ids behind them, those at the end do not."""
    tokenizer = TOKENIZERS["bert"]()
    size = len(tokenizer)
    kept = [*range(size), size + 5]
    assert len(hc.cut_tokenizer(tokenizer, kept)) == size
    tokenizer.add_tokens(["<more>"])
    gap = [i for i in range(size + 1) if i != 40]
    assert hc.cut_tokenizer(tokenizer, gap).convert_tokens_to_ids("<more>") == size - 1


def test_cut_twice_is_cut_once():
    tokenizer = TOKENIZERS["gpt2"]()
    first = some_tokens(tokenizer, seed=4)
    once = hc.cut_tokenizer(tokenizer, first)
    second = some_tokens(once, seed=5)
    twice = hc.cut_tokenizer(tokenizer, hc.Plan([hc.KeepVocabulary(first), hc.KeepVocabulary(second)]))
    assert twice.get_vocab() == hc.cut_tokenizer(once, second).get_vocab()
    assert twice.tokenize("running over") == hc.cut_tokenizer(once, second).tokenize("running over")


# --- the planner -----------------------------------------------------------------------------------------------------


def bert_of(tokenizer, kind=T.BertModel, **more):
    torch.manual_seed(0)
    config = T.BertConfig(**{**TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 2}, **more)
    return kind(config).eval()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_plan_holds_what_texts_need_and_every_text_still_has_tokens(name):
    tokenizer = TOKENIZERS[name]()
    model = bert_of(tokenizer)
    seen = list(texts()[:6])
    plan = hc.plan_vocabulary(model, tokenizer, (text for text in seen))
    kept = set(plan.edits[0].tokens)
    used = {i for text in seen for i in tokenizer(text).input_ids}
    assert used | set(tokenizer.all_special_ids) <= kept and len(kept) < len(tokenizer)
    cut = hc.cut_tokenizer(tokenizer, plan)
    unknown = {cut.unk_token_id} if name not in ("gpt2", "clip") else set()
    for text in seen:
        assert cut.tokenize(text) == tokenizer.tokenize(text)
    for text in texts(40, seed=7):  # other texts, of the same characters: shorter pieces, nothing unknown that was not
        before, after = tokenizer(text).input_ids, cut(text).input_ids
        assert len(after) >= len(before)
        if tokenizer.unk_token_id not in before and name != "word_level":
            assert not unknown & set(after), text


def test_counts_keep_and_alphabet():
    tokenizer = TOKENIZERS["bert"]()
    model = bert_of(tokenizer)
    seen = list(texts())
    counts = Counter(i for text in seen for i in tokenizer(text).input_ids)
    data = pieces_of(tokenizer)
    always = {*fixed_ids(data), *tokenizer.all_special_ids}
    often = {i for i, n in counts.items() if n >= 30}
    assert 0 < len(often - always) < len(counts)
    plan = hc.plan_vocabulary(model, tokenizer, seen, min_count=30, alphabet=False)
    assert set(plan.edits[0].tokens) == often | always
    plan = hc.plan_vocabulary(model, tokenizer, seen, min_count=30)
    assert set(plan.edits[0].tokens) == often | always | letters(data)
    seldom = min(set(range(len(tokenizer))) - often - always - letters(data))
    word = tokenizer.convert_ids_to_tokens(seldom)
    for keep in ([seldom], [word]):
        more = hc.plan_vocabulary(model, tokenizer, seen, min_count=30, keep=keep)
        assert set(more.edits[0].tokens) == set(plan.edits[0].tokens) | {seldom}


def test_ids_that_the_model_names_stay():
    tokenizer = TOKENIZERS["word_level"]()
    model = bert_of(tokenizer, eos_token_id=150)
    kept = hc.plan_vocabulary(model, tokenizer, ["run"]).edits[0].tokens
    assert kept == tuple(sorted({*range(5), tokenizer.convert_tokens_to_ids("run"), 150}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "one text"}, "must be many texts"),
        ({"texts": [["a", "b"]]}, r"must hold texts, got \['a', 'b'\]"),
        ({"texts": [{"text": "a"}]}, r"Give one column: dataset\['text'\]"),
        ({"texts": []}, "holds no text"),
        ({"min_count": 0}, "min_count must be a whole number >= 1, got 0"),
        ({"alphabet": 1}, "alphabet must be True or False"),
        ({"keep": ["nosuch"]}, "keep names 'nosuch'"),
        ({"keep": "[MASK]"}, "keep must be a sequence"),
        ({"embedding": "nowhere"}, "'nowhere' names no vocabulary"),
    ],
)
def test_plan_vocabulary_refuses(options, message):
    tokenizer = TOKENIZERS["bert"]()
    with pytest.raises(hc.CompressionError, match=message):
        hc.plan_vocabulary(bert_of(tokenizer), tokenizer, **{"texts": ["run"], **options})


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(hc.CompressionError, match=r"gives ids up to 259, and the model has 99 tokens \(0-98\)"):
        hc.plan_vocabulary(T.BertModel(T.BertConfig(**TEXT)), TOKENIZERS["bert"](), ["run"])


# --- model and tokenizer together ------------------------------------------------------------------------------------


def test_a_pipeline_gives_what_it_gave(tmp_path):
    tokenizer = TOKENIZERS["bert"]()
    model = bert_of(tokenizer, T.BertForMaskedLM)
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"text": list(texts()[:20])})["text"]
    text = "[MASK] " + texts()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    plan = hc.plan_vocabulary(model, tokenizer, column)
    kept = plan.edits[0].tokens
    targets = [tokenizer.convert_ids_to_tokens(i) for i in kept[10:20]]
    expected = T.pipeline("fill-mask", model=copy.deepcopy(model), tokenizer=tokenizer)(text, targets=targets)
    hc.apply_(model, plan).save_pretrained(tmp_path)
    hc.cut_tokenizer(tokenizer, plan).save_pretrained(tmp_path)
    found = T.pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path))(text, targets=targets)
    assert [row["token_str"] for row in found] == [row["token_str"] for row in expected]
    assert [kept[row["token"]] for row in found] == [row["token"] for row in expected]
    share = sum(row["score"] for row in found) / sum(row["score"] for row in expected)  # of what is left, all a little more
    assert share > 1
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(share * other["score"], rel=1e-4)


def test_sentence_transformers_give_the_same_vectors(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    tokenizer = TOKENIZERS["bert"]()
    bert_of(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = st.SentenceTransformer(str(tmp_path / "base"), device="cpu")
    seen = list(texts()[:8])
    expected = model.encode(seen, convert_to_tensor=True)
    plan = hc.plan_vocabulary(model, model.tokenizer, seen)
    assert len(plan.edits[0].tokens) < len(tokenizer)
    hc.apply_(model, plan)
    model[0].processor = hc.cut_tokenizer(model.tokenizer, plan)
    assert torch.equal(model.encode(seen, convert_to_tensor=True), expected)
    model.save(str(tmp_path / "small"))
    again = st.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert torch.equal(again.encode(seen, convert_to_tensor=True), expected)
    assert len(again.tokenizer) == again[0].auto_model.config.vocab_size == len(plan.edits[0].tokens)


def test_a_push_refuses_the_tokenizer_of_the_whole_vocabulary(tmp_path):
    tokenizer = TOKENIZERS["bert"]()
    model = bert_of(tokenizer)
    plan = hc.plan_vocabulary(model, tokenizer, list(texts()[:8]))
    hc.apply_(model, plan)
    message = (
        rf"gives ids up to 259, and the model has {len(plan.edits[0].tokens)} tokens .*hc.cut_tokenizer\(tokenizer, plan\)"
    )
    with pytest.raises(hc.CompressionError, match=message):
        hc.push_to_hub(model, "me/small", tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match=message):
        hc.hub.push_folder(tmp_path, "me/small")
    hc.cut_tokenizer(tokenizer, plan).save_pretrained(tmp_path)
    with pytest.raises(hc.CompressionError, match="offline mode is on"):  # it gets as far as the network
        hc.hub.push_folder(tmp_path, "me/small")
