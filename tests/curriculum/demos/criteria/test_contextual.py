"""Contextual calibration against W = diag(p_cf)^-1 in plain probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.label_bias import calibrate_contextually, content_free_prior
from sparsort.errors import SparsortError

Floats = NDArray[np.float64]
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5), st.integers(0, 10_000))


def drawn(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(scale=2.0, size=shape) - 3.0


def by_matrix(log_p_QL: Floats, content_free_CL: Floats, average: str) -> Floats:
    """W p + b as the paper writes it; its authors' code for "raw"."""
    p = np.exp(log_p_QL)
    p = p / p.sum(axis=1, keepdims=True)
    p_cf = np.exp(content_free_CL)
    if average == "normalised":
        p_cf = p_cf / p_cf.sum(axis=1, keepdims=True)
    p_cf = p_cf.mean(axis=0)
    p_cf = p_cf / p_cf.sum()
    return np.stack([np.linalg.inv(np.diag(p_cf)) @ row for row in p])


@settings(max_examples=50)
@given(SIZES, st.sampled_from(["normalised", "raw"]))
def test_against_the_matrix(sizes: tuple[int, int, int, int], average: Any) -> None:
    queries, inputs, n_labels, seed = sizes
    log_p, content_free = drawn(queries, n_labels, seed=seed), drawn(inputs, n_labels, seed=seed + 1)
    expected = by_matrix(log_p, content_free, average)
    scores = calibrate_contextually(log_p, content_free, average=average)
    assert np.exp(scores) == pytest.approx(expected, rel=1e-9)
    assert (scores.argmax(axis=1) == expected.argmax(axis=1)).all()


@settings(max_examples=30)
@given(SIZES)
def test_invariances(sizes: tuple[int, int, int, int]) -> None:
    queries, inputs, n_labels, seed = sizes
    log_p, content_free = drawn(queries, n_labels, seed=seed), drawn(inputs, n_labels, seed=seed + 1)
    expected = calibrate_contextually(log_p, content_free)
    generator = np.random.default_rng(seed)
    moved = calibrate_contextually(
        log_p + generator.normal(scale=50, size=(queries, 1)),
        content_free + generator.normal(scale=50, size=(inputs, 1)),
    )
    assert moved == pytest.approx(expected, abs=1e-9)
    other = generator.permutation(n_labels)
    assert calibrate_contextually(log_p[:, other], content_free[:, other]) == pytest.approx(
        expected[:, other], abs=1e-12
    )
    assert calibrate_contextually(log_p, content_free[generator.permutation(inputs)]) == pytest.approx(
        expected, abs=1e-12
    )
    raw = calibrate_contextually(log_p, content_free[:1], average="raw")
    assert raw == pytest.approx(calibrate_contextually(log_p, content_free[:1]), abs=1e-12)


def test_a_content_free_input_comes_out_even() -> None:
    alone = drawn(1, 4, seed=0)
    assert calibrate_contextually(alone, alone) == pytest.approx(np.zeros((1, 4)), abs=1e-12)
    assert np.exp(content_free_prior(alone)).sum() == pytest.approx(1.0)


def test_the_paper_s_example() -> None:
    # Section 5: "N/A" scores 61.8 % positive; a query at 60 % is then negative, one at 63 % positive.
    content_free = np.log([[0.618, 0.382]])
    queries = np.log([[0.60, 0.40], [0.63, 0.37]])
    assert calibrate_contextually(queries, content_free).argmax(axis=1).tolist() == [1, 0]


def test_the_two_averages_differ_where_an_input_makes_all_labels_improbable() -> None:
    content_free = np.log([[0.4, 0.1], [1e-6, 9e-6]])
    assert np.exp(content_free_prior(content_free)) == pytest.approx([(0.8 + 0.1) / 2, (0.2 + 0.9) / 2])
    raw = np.exp(content_free_prior(content_free, average="raw"))
    assert raw == pytest.approx([0.400001 / 0.50001, 0.100009 / 0.50001])


def test_one_order_at_a_time_or_all_at_once() -> None:
    log_p, content_free = drawn(2, 3, 5, 4, seed=1), drawn(2, 3, 2, 4, seed=2)
    together = calibrate_contextually(log_p, content_free)
    assert together.shape == log_p.shape
    for at in np.ndindex(2, 3):
        assert together[at] == pytest.approx(calibrate_contextually(log_p[at], content_free[at]))
    shared = calibrate_contextually(log_p, content_free[0, 0])
    assert shared[1, 2] == pytest.approx(calibrate_contextually(log_p[1, 2], content_free[0, 0]))


def test_far_from_zero() -> None:
    scores = calibrate_contextually([[-1000.0, -1001.0]], [[-3000.0, -2000.0]])
    assert scores[0, 0] - scores[0, 1] == pytest.approx(1001.0)
    scores = calibrate_contextually([[-1000.0, -1001.0]], [[-3000.0, -3000.0], [-9000.0, -9000.0]], average="raw")
    assert scores[0, 0] - scores[0, 1] == pytest.approx(1.0)
    impossible = calibrate_contextually([[0.0, -math.inf]], [[0.0, 0.0], [0.0, -math.inf]])
    assert impossible[0, 1] == -math.inf
    assert impossible[0, 0] == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize(
    ("log_p", "content_free", "message"),
    [
        (np.zeros((2, 1)), np.zeros((2, 1)), "single label"),
        (np.zeros((2, 3)), np.zeros((2, 4)), r"\(2, 3\), but content_free \(2, 4\)"),
        (np.zeros((5, 2, 3)), np.zeros((4, 2, 3)), "must be the same"),
        (np.zeros((2, 3)), np.zeros((4, 2, 3)), "must be the same"),
        (np.zeros((2, 3)), np.zeros((0, 3)), "no content-free inputs"),
        (np.zeros((2, 3)), np.zeros(3), "expected 2 axes"),
        (np.zeros((2, 2)), [[0.0, -math.inf]], "gives label 1"),
        (np.zeros((2, 2)), [[0.0, math.nan]], "content_free is nan at content-free input 0, label 1"),
        (np.zeros((2, 2)), [[0.0, 1.0], [0.0]], "array of numbers"),
    ],
)
def test_bad_input(log_p: Any, content_free: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        calibrate_contextually(log_p, content_free)


def test_unknown_average() -> None:
    with pytest.raises(SparsortError, match="Did you mean 'normalised'"):
        calibrate_contextually(np.zeros((1, 2)), np.zeros((1, 2)), average="normalized")  # type: ignore[arg-type]
