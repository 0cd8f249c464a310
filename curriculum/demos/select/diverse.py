"""Demonstrations that are near the query or typical of the pool, and unlike one another: MMR, k-DPP, vote-k.

Contract: the functions of the table take `Candidates`, the others are pure functions of arrays. Positions come back in the
order of choice; ties go to the earlier position.

Shapes: N candidates, D embedding width, k chosen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.similarity import Floats
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.errors import SparsortError

_BLOCK_ROWS = 1024
_SINGULAR = 1e-10
# Neighbours of the query among which a selector looks, unless the caller says otherwise.
_MMR_FETCH = 20
_KDPP_FETCH = 100


def select_mmr(candidates: Candidates) -> Places:
    """Rows near the query and unlike one another, by maximal marginal relevance."""
    top = candidates.nearest(_MMR_FETCH)
    near, unit = candidates.near[top], candidates.unit[top]
    return top[mmr(near, unit, candidates.k, trade_off=candidates.settings.trade_off)]


def select_kdpp(candidates: Candidates) -> Places:
    """Rows near the query and unlike one another, by a determinantal point process."""
    top = candidates.nearest(_KDPP_FETCH)
    return top[dpp_map(dpp_kernel(candidates.near[top], candidates.unit[top]), candidates.k)]


def select_vote_k(candidates: Candidates) -> Places:
    """Rows typical of the pool and unlike one another."""
    pool, unit, neighbours = candidates.known.pool, candidates.unit, candidates.settings.neighbours

    def graph() -> Places:
        return neighbour_graph(unit, neighbours)

    # Excluded rows change with the query; the graph of all rows does not.
    is_whole = len(candidates.rows) == len(pool)
    return vote_k_of(pool.kept("graph", unit, graph, neighbours) if is_whole else graph(), candidates.k)


def mmr(relevance_N: Floats, unit_ND: Floats, k: int, *, trade_off: float = 0.5) -> NDArray[np.int64]:
    """Maximal marginal relevance (Carbonell and Goldstein 1998).

    Each step takes argmax λ·sim(query, d) − (1 − λ)·max over the chosen c of sim(c, d); the first has no second term.

    Args:
        relevance_N: similarity of each candidate to the query.
        unit_ND: unit embeddings of the candidates.
        k: how many, at most N.
        trade_off: λ in [0, 1]; 1 is nearest-neighbour selection.
    """
    redundancy = np.zeros(len(relevance_N))
    free = np.ones(len(relevance_N), dtype=bool)
    chosen: list[int] = []
    for step in range(k):
        gain = np.where(free, trade_off * relevance_N - (1.0 - trade_off) * redundancy, -np.inf)
        best = int(np.argmax(gain))
        chosen.append(best)
        free[best] = False
        to_best = unit_ND @ unit_ND[best]
        redundancy = to_best if step == 0 else np.maximum(redundancy, to_best)
    return np.array(chosen, dtype=np.int64)


def dpp_kernel(relevance_N: Floats, unit_ND: Floats, *, scale: float = 0.1) -> NDArray[np.float64]:
    """CEIL's kernel (arXiv 2302.05698): relevance × similarity × relevance, (N, N), positive semi-definite.

    Similarity is (1 + cos) / 2; relevance is exp((s − max s) / (2·scale)) of s = (1 + cos to the query) / 2. A smaller
    `scale` gives relevance more weight against diversity.
    """
    shifted = (1.0 + relevance_N.astype(np.float64)) / 2.0
    weight = np.exp((shifted - shifted.max()) / (2.0 * scale))
    wide = unit_ND.astype(np.float64)
    kernel: NDArray[np.float64] = weight[:, None] * ((1.0 + wide @ wide.T) / 2.0) * weight[None, :]
    return kernel


def dpp_map(kernel_NN: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The greedy MAP set of a determinantal point process (Chen et al. 2018, arXiv 1709.05135, algorithm 1).

    Each step takes the item that raises det(kernel over the set) most. The rows of the set's Cholesky factor are
    extended one by one, so k items cost O(N·k²) rather than k determinants for every candidate.

    Raises:
        SparsortError: the candidates span fewer than k directions, so every set of k has determinant 0.
    """
    count = len(kernel_NN)
    factor_kN = np.zeros((k, count))
    residual = np.diag(kernel_NN).astype(np.float64)
    floor = _SINGULAR * float(residual.max(initial=0.0))
    chosen: list[int] = []
    for step in range(k):
        best = int(np.argmax(residual))
        if not residual[best] > floor:
            raise SparsortError(
                f"k-DPP was asked for {k} demonstrations, but the {count} candidates hold only {step} that differ from "
                "one another (duplicates?). Ask for fewer, raise fetch=, or use method 'mmr'."
            )
        row = (kernel_NN[best] - factor_kN[:step, best] @ factor_kN[:step]) / np.sqrt(residual[best])
        factor_kN[step] = row
        residual = residual - row**2
        chosen.append(best)
        residual[chosen] = -np.inf
    return np.array(chosen, dtype=np.int64)


def neighbour_graph(unit_ND: Floats, neighbours: int) -> NDArray[np.int64]:
    """The `neighbours` nearest other rows of every row by cosine, (N, min(neighbours, N − 1)), in no promised order."""
    count = len(unit_ND)
    width = min(neighbours, count - 1)
    graph = np.empty((count, width), dtype=np.int64)
    for start in range(0, count, _BLOCK_ROWS):
        distance = -(unit_ND[start : start + _BLOCK_ROWS] @ unit_ND.T)
        own = np.arange(len(distance))
        distance[own, start + own] = np.inf
        if width:
            graph[start : start + len(distance)] = np.argpartition(distance, width - 1, axis=1)[:, :width]
    return graph


def vote_k(unit_ND: Floats, k: int, *, neighbours: int = 150, discount: float = 10.0) -> NDArray[np.int64]:
    """Fast vote-k (Su et al. 2022, arXiv 2209.01975): typical of the pool, unlike those already chosen.

    Every row votes for its nearest neighbours. Each step takes the u not yet chosen with the highest
    Σ over unchosen v that vote for u of discount^−(how many of v's neighbours are chosen).
    The paper's second stage, which sorts the rest by a model's confidence, needs a model and is not here.

    Args:
        unit_ND: unit embeddings of the pool.
        k: how many, at most N.
        neighbours: out-degree of the graph; 150 in the paper.
        discount: ρ; 10 in the paper.
    """
    return vote_k_of(neighbour_graph(unit_ND, neighbours), k, discount=discount)


def vote_k_of(graph: NDArray[np.int64], k: int, *, discount: float = 10.0) -> NDArray[np.int64]:
    """`vote_k` of a pool whose `neighbour_graph` is known."""
    count = len(graph)
    is_chosen = np.zeros(count, dtype=bool)
    chosen: list[int] = []
    for _ in range(k):
        # Counted by level first: sums of powers added in another order would break ties by rounding.
        level = is_chosen[graph].sum(axis=1)
        n_levels = int(level.max(initial=0)) + 1
        ballots = (graph * n_levels + level[:, None])[~is_chosen]
        counts = np.bincount(ballots.ravel(), minlength=count * n_levels).reshape(count, n_levels)
        votes = (counts * discount ** -np.arange(n_levels, dtype=np.float64)).sum(axis=1)
        best = int(np.argmax(np.where(is_chosen, -np.inf, votes)))
        is_chosen[best] = True
        chosen.append(best)
    return np.array(chosen, dtype=np.int64)
