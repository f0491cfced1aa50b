"""Built-in metrics against scikit-learn's, scipy's, and a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from hf_compress.edits import CompressionError
from hf_compress.recipe.metrics import METRICS, find_metric, spans

DRAW = np.random.default_rng(0)
TWO = DRAW.integers(0, 2, 50), DRAW.integers(0, 2, 50)
MANY = DRAW.integers(0, 5, 50), DRAW.integers(0, 5, 50)
LABELS = DRAW.integers(0, 2, (50, 4)), DRAW.integers(0, 2, (50, 4))
NUMBERS = DRAW.normal(size=50), DRAW.normal(size=50)
TIES = DRAW.integers(0, 4, 50).astype(float), DRAW.integers(0, 4, 50).astype(float)

EXPECTED = [
    ("accuracy", MANY, sk.accuracy_score),
    ("accuracy", LABELS, sk.accuracy_score),
    ("f1", TWO, sk.f1_score),
    ("f1", MANY, lambda t, p: sk.f1_score(t, p, average="macro")),
    ("f1", LABELS, lambda t, p: sk.f1_score(t, p, average="macro")),
    ("matthews", TWO, sk.matthews_corrcoef),
    ("matthews", MANY, sk.matthews_corrcoef),
    ("pearson", NUMBERS, lambda t, p: stats.pearsonr(t, p).statistic),
    ("spearman", NUMBERS, lambda t, p: stats.spearmanr(t, p).statistic),
    ("spearman", TIES, lambda t, p: stats.spearmanr(t, p).statistic),
    ("mse", NUMBERS, sk.mean_squared_error),
]


@pytest.mark.parametrize("name, data, expected", EXPECTED)
def test_metrics_are_those_of_the_libraries(name, data, expected):
    found, there = data
    assert METRICS[name].compute(found, there) == pytest.approx(expected(there, found), abs=1e-12)


def test_f1_goes_by_the_classes_there_are_not_by_those_that_occur():
    found, there = TWO  # of rows that happen to have classes 0 and 1 alone
    assert find_metric("f1", "classes", "x", 2).compute(found, there) == pytest.approx(sk.f1_score(there, found))
    macro = sk.f1_score(there, found, average="macro")
    assert abs(macro - sk.f1_score(there, found)) > 1e-3
    assert find_metric("f1", "classes", "x", 3).compute(found, there) == pytest.approx(macro)


@pytest.mark.parametrize("name, data", [("matthews", TWO), ("pearson", NUMBERS), ("spearman", NUMBERS)])
def test_a_constant_answer_scores_nothing(name, data):
    assert METRICS[name].compute(np.zeros(50, data[0].dtype), data[1]) == 0.0


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("B-A B-A I-A", [("A", 0, 0), ("A", 1, 2)]),
        ("I-A I-B B-B", [("A", 0, 0), ("B", 1, 1), ("B", 2, 2)]),
        ("S-A B-B E-B I-B", [("A", 0, 0), ("B", 1, 2), ("B", 3, 3)]),
        ("O O", []),
        ("NOUN NOUN VERB", [("NOUN", 0, 1), ("VERB", 2, 2)]),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def test_span_f1_counts_whole_spans():
    metric = find_metric("seqeval", "tags", "token-classification")
    there = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    found = [["B-A", "O", "O", "B-B"], ["B-A", "B-A"]]  # B right, A cut short; the second A right, one too many
    assert metric.compute(found, there) == pytest.approx(2 * 2 / (4 + 3))
    assert find_metric("accuracy", "tags", "token-classification").compute(found, there) == pytest.approx(4 / 6)


def test_perplexity_is_the_exponential_of_the_loss():
    assert METRICS["perplexity"].compute(np.log(7.0), None) == pytest.approx(7.0)


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("perplexity", "classes", "no metric for x that predicts one class a row. Metrics that fit: accuracy, f1, matthews"),
        ("spearman", "tags", "a tag for every token"),
        ("blue", "loss", "Unknown metric 'blue'"),
        ("matthews", "labels", "several labels a row"),
    ],
)
def test_what_does_not_fit_is_refused(name, kind, message):
    with pytest.raises(CompressionError, match=message):
        find_metric(name, kind, "x")
