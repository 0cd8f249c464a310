"""MMR, k-DPP and vote-k against their definitions computed the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.similarity import unit_rows
from sparsort.curriculum.demos.select import selectors
from sparsort.errors import SparsortError


def unit(count: int, width: int, seed: int) -> NDArray[np.float64]:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), trade_off=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_mmr_against_the_formula(seed: int, trade_off: float) -> None:
    rows, query = unit(12, 4, seed), unit(1, 4, seed + 1)[0]
    relevance = rows @ query
    chosen: list[int] = []
    for _ in range(6):
        gains = {
            at: trade_off * relevance[at] - (1 - trade_off) * max((rows[at] @ rows[c] for c in chosen), default=0.0)
            for at in range(12)
            if at not in chosen
        }
        chosen.append(max(gains, key=lambda at: (round(gains[at], 12), -at)))
    assert selectors.mmr(relevance, rows, 6, trade_off=trade_off).tolist() == chosen


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_greedy_dpp_takes_the_largest_determinant_at_every_step(seed: int) -> None:
    rows, query = unit(10, 6, seed), unit(1, 6, seed + 1)[0]
    kernel = selectors.dpp_kernel(rows @ query, rows)
    chosen = selectors.dpp_map(kernel, 5).tolist()
    for step in range(5):
        before = chosen[:step]
        best = max(np.linalg.det(kernel[np.ix_([*before, at], [*before, at])]) for at in range(10) if at not in before)
        ours = np.linalg.det(kernel[np.ix_(chosen[: step + 1], chosen[: step + 1])])
        assert ours == pytest.approx(best, rel=1e-9)


def test_dpp_kernel_is_ceil_s() -> None:
    rows, query = unit(5, 3, 0), unit(1, 3, 1)[0]
    kernel = selectors.dpp_kernel(rows @ query, rows, scale=0.1)
    score = [(1 + float(row @ query)) / 2 for row in rows]
    for i in range(5):
        for j in range(5):
            relevance = np.exp((score[i] - max(score)) / 0.2) * np.exp((score[j] - max(score)) / 0.2)
            assert kernel[i, j] == pytest.approx(relevance * (1 + float(rows[i] @ rows[j])) / 2)
    assert np.linalg.eigvalsh(kernel).min() > -1e-12


def test_dpp_refuses_more_than_the_candidates_span() -> None:
    rows = np.repeat(unit(2, 4, 0), 3, axis=0)
    kernel = selectors.dpp_kernel(rows @ rows[0], rows)
    assert sorted(place // 3 for place in selectors.dpp_map(kernel, 2).tolist()) == [0, 1]
    with pytest.raises(SparsortError, match="hold only 2"):
        selectors.dpp_map(kernel, 3)


def test_vote_k_by_hand() -> None:
    # On a circle, each row votes for its two nearest: 0, 1 and 2 form a cluster, 3, 4 and 5 another, and 6 is alone.
    degrees = np.array([0.0, 10.0, 21.0, 120.0, 130.0, 141.0, 250.0])
    rows = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    graph = [sorted(line) for line in selectors.neighbour_graph(rows, 2).tolist()]
    assert graph == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4], [0, 5]]
    # Votes at first: 0 has 3 (from 1, 2, 6), 5 has 3 (from 3, 4, 6), the rest 2 (6 none): 0 by position.
    # Then 1, 2 and 6 weigh 0.1 and 0 is out: 1: 0.1, 2: 0.1, 3: 2, 4: 2, 5: 2.1, so 5.
    # Then 3 and 4 weigh 0.1, 6 weighs 0.01, 5 is out: 1 and 2: 0.1, 3: 0.1, 4: 0.1, so 1 by position.
    assert selectors.vote_k(selectors.neighbour_graph(rows, 2), 3).tolist() == [0, 5, 1]


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_vote_k_against_the_formula(seed: int, k: int) -> None:
    rows = unit(12, 3, seed)
    near = [np.argsort(-(rows @ row), kind="stable").tolist() for row in rows]
    graph = [[other for other in line if other != at][:4] for at, line in enumerate(near)]
    chosen: list[int] = []
    for _ in range(k):
        votes = {
            u: sum(
                10.0 ** -sum(other in chosen for other in graph[v])
                for v in range(12)
                if v not in chosen and u in graph[v]
            )
            for u in range(12)
            if u not in chosen
        }
        chosen.append(max(votes, key=lambda u: (round(votes[u], 9), -u)))
    ours = selectors.vote_k(selectors.neighbour_graph(rows, 4), k).tolist()
    assert ours == chosen


def test_vote_k_of_fewer_rows_than_neighbours() -> None:
    assert sorted(selectors.vote_k(selectors.neighbour_graph(unit(3, 2, 0), 150), 3).tolist()) == [0, 1, 2]
    assert selectors.vote_k(selectors.neighbour_graph(unit(1, 2, 0), 150), 1).tolist() == [0]


def test_the_graph_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit(50, 8, 0)
    whole = np.sort(selectors.neighbour_graph(rows, 5), axis=1)
    monkeypatch.setattr(selectors, "_BLOCK_ROWS", 7)
    assert (np.sort(selectors.neighbour_graph(rows, 5), axis=1) == whole).all()


def test_unit_rows_at_the_ends_of_the_float_range() -> None:
    rows = unit_rows(np.array([[3e38, 4e38 / 2], [1e-40, 0.0], [0.0, 0.0], [np.nan, 1.0]], dtype=np.float32))
    assert np.linalg.norm(rows[:2], axis=1) == pytest.approx([1.0, 1.0])
    assert np.isnan(rows[2:]).all()
