"""Which tokens a user's texts need: counted, and completed by what the tokenizer and the model cannot do without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .edits import CompressionError, KeepVocabulary, shown
from .pieces import fixed_ids, letters, parts_needed, vocab_of
from .plan import Plan
from .tokenizer import pieces_of
from .vocabularies import ids_needed, the_vocabulary

AT_ONCE = 1000  # texts


def plan_vocabulary(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    keep: Iterable[int | str] = (),
    min_count: int = 1,
    alphabet: bool = True,
    embedding: str | None = None,
) -> Plan:
    """A plan that keeps the tokens which the tokenizer makes of your texts, and those that it and the model need.

    These stay whatever the texts hold: special and added tokens, the ids that the model's configs name, bytes; single
    characters, where no bytes can spell them (`alphabet`); and what tokens that stay are built from (BPE: every token on the
    way of their merges; Unigram: one piece with the lowest score). So every text can still be tokenized.

    Apply it to the model with `apply_`, and to the tokenizer with `cut_tokenizer`; save both.

    Args:
        model (`nn.Module`): the model. Looked at, not changed.
        tokenizer (`PreTrainedTokenizerBase`): its fast tokenizer.
        texts (`Iterable[str]`): texts like those that the model will see: a list, a generator, a column of a dataset
            (`dataset["text"]`). An encoder-decoder needs what it writes, too.
        keep (`Iterable[int | str]`): more tokens to keep, by id or by their text in the vocabulary.
        min_count (`int`, defaults to 1): tokens that come up less often go.
        alphabet (`bool`, defaults to `True`): keep single characters that the texts do not hold. False makes texts with
            others hold something unknown; for a tokenizer of many scripts it saves thousands of rows.
        embedding (`str`, *optional*): which vocabulary, where the model has several; as in `KeepVocabulary`.

    Returns:
        `Plan`: one `KeepVocabulary`.

    Raises:
        CompressionError: no texts, a text that is none, a tokenizer that is slow or gives ids that the model does not have,
            a token in `keep` that is not there.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel, BertTokenizer
    >>> from hf_compress import apply_, cut_tokenizer, plan_vocabulary
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b", "ab", "ba", "abba"]
    >>> tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    >>> model = BertModel(BertConfig(
    ...     vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    ... ))
    >>> plan = plan_vocabulary(model, tokenizer, ["abba ba", "ba"])
    >>> print(plan)
    Plan with 1 edit
      KeepVocabulary the embedding  keep 11: 0-8 10-11
    >>> apply_(model, plan).embeddings.word_embeddings, len(cut_tokenizer(tokenizer, plan))
    (Embedding(11, 32, padding_idx=0), 11)

    ```
    """
    if type(min_count) is not int or min_count < 1:
        raise CompressionError(f"min_count must be a whole number >= 1, got {shown(min_count)}.")
    if not isinstance(alphabet, bool):
        raise CompressionError(f"alphabet must be True or False, got {shown(alphabet)}.")
    data = pieces_of(tokenizer)
    vocabulary = the_vocabulary(model, embedding)
    by_text = vocab_of(data)
    counts = _counts(tokenizer, texts)
    most = max(*counts, *by_text.values())
    if most >= vocabulary.size:
        raise CompressionError(
            f"The tokenizer gives ids up to {most}, and the model has {vocabulary.size} tokens (0-{vocabulary.size - 1}): it "
            "is the tokenizer of another model."
        )
    kept = {index for index, count in counts.items() if count >= min_count}
    kept |= {
        *fixed_ids(data),
        *tokenizer.all_special_ids,
        *ids_needed(vocabulary).values(),
        *_named(keep, by_text, vocabulary.size),
    }
    if alphabet:
        kept |= letters(data)
    while True:
        more = parts_needed(data, kept)
        if not more:
            return Plan([KeepVocabulary(tuple(kept), embedding)])
        kept |= more.keys()


def _named(keep: Any, by_text: Mapping[str, int], size: int) -> list[int]:
    if isinstance(keep, str | bytes) or not isinstance(keep, Iterable):
        raise CompressionError(f"keep must be a sequence of token ids or texts, got {shown(keep)}.")
    found = []
    for token in keep:
        index = by_text.get(token) if isinstance(token, str) else token
        if type(index) is not int or not 0 <= index < size:
            raise CompressionError(f"keep names {shown(token)}, which is no token of this tokenizer and model.")
        found.append(index)
    return found


def _counts(tokenizer: Any, texts: Any) -> Counter[int]:
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise CompressionError(f"texts must be many texts (a list, a column of a dataset), got {shown(texts)}.")
    counts: Counter[int] = Counter()
    total = len(texts) if hasattr(texts, "__len__") else None  # type: ignore[arg-type]
    with tqdm(total=total, desc="count tokens", unit="text", leave=False, disable=None, delay=3) as progress:
        for batch in _batched(texts):
            encoded = tokenizer(batch, padding=False, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
            counts.update(chain.from_iterable(encoded))
            progress.update(len(batch))
    if not counts:
        raise CompressionError("texts holds no text, so no token would be known to be used.")
    return counts


def _batched(texts: Iterable[Any]) -> Iterator[list[str]]:
    rows = iter(texts)
    while batch := list(islice(rows, AT_ONCE)):
        for text in batch:
            if not isinstance(text, str):
                hint = " Give one column: dataset['text']." if isinstance(text, Mapping) else ""
                raise CompressionError(f"texts must hold texts, got {shown(text)}.{hint}")
        yield batch
