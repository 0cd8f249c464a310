"""The criteria by label scores against their formulas in plain Python, by hand, and by the changes that must have no effect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drawn_scores import SHAPES, Floats, drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.demos.criteria import CRITERIA, Evidence
from sparsort.curriculum.demos.criteria import label_criteria as labels
from sparsort.curriculum.demos.criteria import mdl_and_cone as per_query
from sparsort.errors import SparsortError

# The formulas, one number at a time


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def shannon(p: list[float]) -> float:
    return sum(-x * math.log(x) for x in p if x > 0)


def globale(log_p: list[list[list[float]]]) -> list[float]:
    result = []
    for order in log_p:
        count = [0] * len(order[0])
        for row in order:
            count[row.index(max(row))] += 1
        result.append(shannon([c / len(order) for c in count]))
    return result


def locale(log_p: list[list[list[float]]]) -> list[float]:
    return [sum(shannon(softmax(row)) for row in order) / len(order) for order in log_p]


def pdo(log_p: list[list[list[float]]], prior: list[float] | None = None) -> list[float]:
    result = []
    for order in log_p:
        n_labels = len(order[0])
        prior_of = prior or [1 / n_labels] * n_labels
        mean = [sum(softmax(row)[at] for row in order) / len(order) for at in range(n_labels)]
        result.append(-sum(m * math.log(m / (q / sum(prior_of))) for m, q in zip(mean, prior_of, strict=True) if m > 0))
    return result


def best_on_dev(log_p: list[list[list[float]]], gold: list[int]) -> list[float]:
    return [sum(row.index(max(row)) == g for row, g in zip(order, gold, strict=True)) / len(gold) for order in log_p]


def likelihood(log_p: list[list[list[float]]], gold: list[int]) -> list[float]:
    return [sum(math.log(softmax(row)[g]) for row, g in zip(order, gold, strict=True)) / len(gold) for order in log_p]


@settings(max_examples=60)
@given(SHAPES)
def test_against_the_formulas(shape: tuple[int, int, int, int]) -> None:
    log_p = drawn(*shape)
    generator = np.random.default_rng(shape[3])
    gold = generator.integers(shape[2], size=shape[1]).tolist()
    prior = generator.uniform(0.1, 5.0, size=shape[2]).tolist()
    plain = log_p.tolist()
    assert labels.globale(log_p) == pytest.approx(globale(plain), abs=1e-12)
    assert labels.locale(log_p) == pytest.approx(locale(plain), abs=1e-12)
    assert labels.pdo(log_p) == pytest.approx(pdo(plain), abs=1e-12)
    assert labels.pdo(log_p, prior) == pytest.approx(pdo(plain, prior), abs=1e-12)
    assert labels.best_on_dev(log_p, gold) == pytest.approx(best_on_dev(plain, gold), abs=1e-12)
    assert labels.gold_log_likelihood(log_p, gold) == pytest.approx(likelihood(plain, gold), abs=1e-9)
    entropies = [[shannon(softmax(row)) for row in query] for query in plain]
    assert per_query.mdl(log_p).tolist() == [row.index(min(row)) for row in entropies]
    assert CRITERIA["mdl"].choose_by_query(Evidence(log_p=log_p)).tolist() == per_query.mdl(log_p).tolist()
    assert CRITERIA["cone"].choose_by_query(Evidence(loss=log_p[:, :, 0])).tolist() == log_p[:, :, 0].argmin(1).tolist()


EVERY: dict[str, Callable[[Any], Floats]] = {
    "globale": labels.globale,
    "locale": labels.locale,
    "pdo": labels.pdo,
    "mdl": per_query.mdl_scores,
}


@settings(max_examples=30)
@given(SHAPES, st.sampled_from(sorted(EVERY)))
def test_what_must_not_matter(shape: tuple[int, int, int, int], name: str) -> None:
    score, log_p, generator = EVERY[name], drawn(*shape), np.random.default_rng(shape[3] + 1)
    expected = score(log_p)
    constant = generator.normal(scale=100.0, size=log_p.shape[:2])[..., None]
    assert score(log_p + constant) == pytest.approx(expected, abs=1e-9)
    assert score(log_p[..., generator.permutation(shape[2])]) == pytest.approx(expected, abs=1e-12)
    by_order = generator.permutation(shape[0])
    assert (score(log_p[by_order]) == expected[by_order]).all()
    if name != "mdl":
        assert score(log_p[:, generator.permutation(shape[1])]) == pytest.approx(expected, abs=1e-12)
        assert score(np.concatenate([log_p, log_p], axis=1)) == pytest.approx(expected, abs=1e-12)


@given(SHAPES)
def test_which_label_is_which_changes_no_bit_of_globale(shape: tuple[int, int, int, int]) -> None:
    log_p = drawn(*shape)
    for order in itertools.permutations(range(shape[2])):
        assert (labels.globale(log_p[..., order]) == labels.globale(log_p)).all()


@given(SHAPES)
def test_pdo_with_a_uniform_prior_is_the_entropy_of_the_mean(shape: tuple[int, int, int, int]) -> None:
    log_p = drawn(*shape)
    mean = [[sum(column) / shape[1] for column in zip(*map(softmax, order), strict=True)] for order in log_p.tolist()]
    assert labels.pdo(log_p) == pytest.approx([shannon(m) - math.log(shape[2]) for m in mean], abs=1e-12)
    assert labels.pdo(log_p) == pytest.approx(labels.pdo(log_p, [7.0] * shape[2]), abs=1e-12)
    assert (labels.locale(log_p) <= labels.pdo(log_p) + math.log(shape[2]) + 1e-12).all()


def test_by_hand() -> None:
    always_first = [[-1.0, -9.0], [-2.0, -9.0], [-1.0, -9.0], [-1.0, -9.0]]
    half = [[-1.0, -9.0], [-9.0, -1.0], [-9.0, -1.0], [-1.0, -9.0]]
    unsure = [[-5.0, -5.0 - 1e-6]] * 4
    log_p = [always_first, half, unsure]
    assert labels.globale(log_p) == pytest.approx([0.0, math.log(2), 0.0])
    assert labels.locale(log_p).argmax() == 2
    assert labels.pdo(log_p)[1:] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert labels.pdo(log_p).argmin() == 0
    # KL((¾, ¼) ‖ (½, ½)), and the other way round, which is not it.
    one = [[[math.log(0.75), math.log(0.25)]]]
    assert labels.pdo(one) == pytest.approx([-(0.75 * math.log(1.5) + 0.25 * math.log(0.5))])
    assert labels.pdo(one)[0] != pytest.approx(-(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0)))
    assert labels.pdo(one, [3, 1]) == pytest.approx([0.0])
    assert labels.best_on_dev(log_p, [0, 1, 1, 1]) == pytest.approx([0.25, 0.75, 0.25])
    # The probabilities are averaged, not the logarithms.
    two = [[[math.log(0.9), math.log(0.1)], [math.log(0.1), math.log(0.9)]]]
    assert labels.pdo(two) == pytest.approx([0.0], abs=1e-12)


def test_far_from_zero_and_impossible_labels() -> None:
    far = np.array([[[-1000.0, -1001.0], [-5000.0, -1e6]]])
    near = far - far.max(axis=-1, keepdims=True)
    for score in EVERY.values():
        assert np.isfinite(score(far)).all()
        assert score(far) == pytest.approx(score(near))
    impossible = [[[-1.0, -math.inf], [-1.0, -1.0]]]
    assert labels.locale(impossible) == pytest.approx([math.log(2) / 2])
    assert labels.globale(impossible) == pytest.approx([0.0])
    assert labels.pdo([[[-1.0, -math.inf]]]) == pytest.approx([-math.log(2)])
    assert labels.gold_log_likelihood(far, [1, 0]) == pytest.approx([-(1 + math.log1p(math.exp(-1))) / 2])
    assert labels.gold_log_likelihood([[[-1.0, -math.inf]]], [1]).tolist() == [-math.inf]


@pytest.mark.parametrize(
    ("log_p", "message"),
    [
        ([[[-1.0], [-2.0]]], "single label"),
        (np.zeros((3, 0, 2)), "no probes"),
        (np.zeros((0, 3, 2)), "no orders"),
        (np.zeros((3, 2, 0)), "no labels"),
        (np.zeros((3, 2)), r"shape \(3, 2\); expected 3 axes: \(orders, probes, labels\)"),
        ([[[-1.0, math.nan]]], "nan at order 0, probe 0, label 1"),
        ([[[-1.0, math.inf]]], "inf at order 0"),
        ([[[-1.0, 0.0], [-math.inf, -math.inf]]], "every label at order 0, probe 1"),
        ([[[-1.0, 0.0], [-1.0]]], "array of numbers"),
        ([[["a", "b"]]], "array of numbers"),
    ],
)
@pytest.mark.parametrize("score", [labels.globale, labels.locale, labels.pdo])
def test_bad_scores(score: Callable[[Any], Floats], log_p: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        score(log_p)


@pytest.mark.parametrize("gold", [[0], [0, 2], [0, -1], [0, 0.5], [0, math.nan], []])
def test_bad_gold(gold: list[float]) -> None:
    with pytest.raises(SparsortError, match="gold"):
        labels.best_on_dev(np.zeros((1, 2, 2)), gold)


@pytest.mark.parametrize("prior", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_bad_prior(prior: list[float]) -> None:
    with pytest.raises(SparsortError, match="prior"):
        labels.pdo(np.zeros((1, 2, 2)), prior)
