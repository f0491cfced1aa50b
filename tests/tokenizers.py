"""Tiny tokenizers of every kind and of the real classes, trained here on a few sentences."""

from __future__ import annotations

import json
import random
from functools import cache

import transformers as T
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

STEMS = "run walk talk play work think read sing paint build teach learn move turn open close start help call ask".split()
ENDS = ["", "s", "ed", "er", "ing", "ings", "ness", "able", "ers"]
CORE = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()


@cache
def texts(count: int = 300, seed: int = 0) -> tuple[str, ...]:
    draw = random.Random(seed)
    words = [draw.choice(["un", "re", "over", ""]) + stem + end for stem in STEMS for end in ENDS] + [
        "naïve",
        "日本",
        "x2y",
        "!?",
    ]
    return tuple(" ".join(draw.choices(words, k=draw.randint(2, 8))) for _ in range(count))


def _model(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())["model"]


@cache
def _bpe(special: tuple[str, ...], size: int, suffix: str = "") -> dict:
    marks = {"end_of_word_suffix": suffix} if suffix else {}
    tokenizer = Tokenizer(models.BPE(**marks))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **marks,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return _model(tokenizer)


def _merges(model: dict) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in model["merges"]]


@cache
def _unigram(special: tuple[str, ...], unk: str) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=list(special), unk_token=unk, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return [tuple(piece) for piece in _model(tokenizer)["vocab"]]


def bert() -> T.PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=CORE, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return T.BertTokenizer(vocab=_model(tokenizer)["vocab"])


def gpt2() -> T.PreTrainedTokenizerBase:
    model = _bpe(("<|endoftext|>",), 420)
    return T.GPT2Tokenizer(vocab=model["vocab"], merges=_merges(model))


def roberta() -> T.PreTrainedTokenizerBase:
    model = _bpe(("<s>", "<pad>", "</s>", "<unk>"), 420)
    tokenizer = T.RobertaTokenizer(vocab={**model["vocab"], "<mask>": len(model["vocab"])}, merges=_merges(model))
    return tokenizer


def clip() -> T.PreTrainedTokenizerBase:
    model = _bpe((), 420, "</w>")
    vocab = model["vocab"]
    vocab = {**vocab, **{t: len(vocab) + i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>"])}}
    return T.CLIPTokenizer(vocab=vocab, merges=_merges(model))


def llama3() -> T.PreTrainedTokenizerBase:
    """Byte-level BPE that takes whole words from the vocabulary before it merges, special tokens last."""
    model = _bpe((), 420)
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=_merges(model), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|reserved|>"])
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def llama() -> T.PreTrainedTokenizerBase:
    """BPE in the way of sentencepiece: bytes for what has no letter, every pair that gives a token is a merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>", *bytes_]
    corpus = [text.replace("日本", "") for text in texts()]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    vocab = _model(tokenizer)["vocab"]
    merges = [
        (vocab[token], token[:i], token[i:])
        for token in vocab
        if token not in special
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    return T.LlamaTokenizer(vocab=vocab, merges=[(left, right) for _, left, right in sorted(merges)])


def bpe_of_parts() -> T.PreTrainedTokenizerBase:
    """BPE whose tokens inside a word carry a mark, as WordPiece's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=CORE, continuing_subword_prefix="##", show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def t5() -> T.PreTrainedTokenizerBase:
    return T.T5Tokenizer(vocab=_unigram(("<pad>", "</s>", "<unk>"), "<unk>"), extra_ids=3)


def xlm_roberta() -> T.PreTrainedTokenizerBase:
    pieces = _unigram(("<s>", "<pad>", "</s>", "<unk>"), "<unk>")
    return T.XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])


def albert() -> T.PreTrainedTokenizerBase:
    return T.AlbertTokenizer(vocab=_unigram(("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), "<unk>"))


def word_level() -> T.PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=260, special_tokens=CORE, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


TOKENIZERS = {
    made.__name__: made
    for made in (bert, gpt2, roberta, clip, llama3, llama, bpe_of_parts, t5, xlm_roberta, albert, word_level)
}
