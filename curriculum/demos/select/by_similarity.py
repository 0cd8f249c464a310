"""Selection by similarity: near the query, or typical of the pool and unlike one another (MMR, k-DPP, vote-k).

Contract: the functions of the table take `Candidates`; the others are pure functions of arrays. Positions are returned in the
order in which they were chosen, the nearest first if only nearness counts. Ties go to the earlier position.

Shapes: N candidates, D embedding width, k chosen, G neighbours of each row in a graph.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.similarity import Floats, nearest
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.errors import SparsortError

# Rows for which the graph computes similarities at once, which bounds its memory to this number times N.
_BLOCK_ROWS = 1024
# A residual below this share of the largest counts as zero: the item is in the span of the chosen ones.
_SINGULAR = 1e-10
# The number of the query's nearest rows among which each selector chooses by default.
_MMR_FETCH = 20
_KDPP_FETCH = 100


def select_nearest(candidates: Candidates) -> Places:
    """The k rows most similar to the query, by shared words or by embeddings."""
    return nearest(candidates.near, candidates.k)


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

    # Excluded rows change with the query, but the graph of all rows does not and can be used again.
    is_whole = len(candidates.rows) == len(pool)
    return vote_k(pool.cached("graph", unit, graph, neighbours) if is_whole else graph(), candidates.k)


def mmr(relevance_N: Floats, unit_ND: Floats, k: int, *, trade_off: float = 0.5) -> NDArray[np.int64]:
    """Maximal marginal relevance (Carbonell and Goldstein 1998), (k,).

    Each step takes argmax λ·sim(query, d) − (1 − λ)·max sim(c, d) over the chosen c; the first step has no second term.

    Args:
        relevance_N: similarity of each candidate to the query.
        unit_ND: unit embeddings of the candidates.
        k: number to choose, at most N.
        trade_off: λ in [0, 1]; 1 gives the nearest neighbours.
    """
    redundancy_N = np.zeros(len(relevance_N))
    is_free_N = np.ones(len(relevance_N), dtype=bool)
    chosen: list[int] = []
    for step in range(k):
        gain_N = np.where(is_free_N, trade_off * relevance_N - (1.0 - trade_off) * redundancy_N, -np.inf)
        best = int(np.argmax(gain_N))
        chosen.append(best)
        is_free_N[best] = False
        to_best_N = unit_ND @ unit_ND[best]
        # Not the maximum with the initial zeros, which would hide negative similarities to the first choice.
        redundancy_N = to_best_N if step == 0 else np.maximum(redundancy_N, to_best_N)
    return np.array(chosen, dtype=np.int64)


def dpp_kernel(relevance_N: Floats, unit_ND: Floats, *, scale: float = 0.1) -> NDArray[np.float64]:
    """The kernel of CEIL (arXiv 2302.05698): relevance × similarity × relevance, (N, N), positive semi-definite.

    The similarity is (1 + cos) / 2. The relevance is exp((s − max s) / (2·scale)) with s = (1 + cos to the query) / 2. A smaller
    `scale` gives more weight to relevance and less to diversity.
    """
    shifted_N = (1.0 + relevance_N.astype(np.float64)) / 2.0
    # Subtracting the maximum only scales the kernel, which changes no choice, and keeps the exponentials from overflowing.
    weight_N = np.exp((shifted_N - shifted_N.max()) / (2.0 * scale))
    wide_ND = unit_ND.astype(np.float64)
    kernel_NN: NDArray[np.float64] = weight_N[:, None] * ((1.0 + wide_ND @ wide_ND.T) / 2.0) * weight_N[None, :]
    return kernel_NN


def dpp_map(kernel_NN: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The greedy MAP set of a determinantal point process, (k,) (Chen et al. 2018, arXiv 1709.05135, algorithm 1).

    Each step takes the item that increases the determinant of the kernel over the set the most. The Cholesky factor of the set
    grows by one row in each step, so that k items cost O(N·k²) instead of k determinants for each candidate.

    Raises:
        SparsortError: the candidates span fewer than k directions, so every set of k has determinant 0.
    """
    count = len(kernel_NN)
    factor_kN = np.zeros((k, count))
    # The factor by which each item would multiply the determinant of the set: a squared distance to the span of the set.
    residual_N = np.diag(kernel_NN).astype(np.float64)
    floor = _SINGULAR * float(residual_N.max(initial=0.0))
    chosen: list[int] = []
    for step in range(k):
        best = int(np.argmax(residual_N))
        # The negation also catches NaN.
        if not residual_N[best] > floor:
            raise SparsortError(
                f"k-DPP needs {k} different demonstrations, but the {count} candidates hold only {step} that differ from "
                "one another (duplicates?). Ask for fewer, raise fetch=, or use method 'mmr'."
            )
        row_N = (kernel_NN[best] - factor_kN[:step, best] @ factor_kN[:step]) / np.sqrt(residual_N[best])
        factor_kN[step] = row_N
        residual_N = residual_N - row_N**2
        chosen.append(best)
        # Rounding may leave the residuals of chosen items above 0.
        residual_N[chosen] = -np.inf
    return np.array(chosen, dtype=np.int64)


def neighbour_graph(unit_ND: Floats, neighbours: int) -> NDArray[np.int64]:
    """The `neighbours` nearest other rows of each row by cosine, (N, G), in any order; G is N − 1 if that is fewer."""
    # `sklearn.neighbors.NearestNeighbors` takes 1.4 times as long for 3000 rows, and other neighbours among duplicates.
    count = len(unit_ND)
    width = min(neighbours, count - 1)
    graph_NG = np.empty((count, width), dtype=np.int64)
    for start in range(0, count, _BLOCK_ROWS):
        distance_BN = -(unit_ND[start : start + _BLOCK_ROWS] @ unit_ND.T)
        # A row is not its own neighbour.
        own = np.arange(len(distance_BN))
        distance_BN[own, start + own] = np.inf
        if width:
            graph_NG[start : start + len(distance_BN)] = np.argpartition(distance_BN, width - 1, axis=1)[:, :width]
    return graph_NG


def vote_k(graph_NG: NDArray[np.int64], k: int, *, discount: float = 10.0) -> NDArray[np.int64]:
    """Fast vote-k (Su et al. 2022, arXiv 2209.01975): rows typical of the pool and unlike those already chosen, (k,).

    Each row votes for its neighbours. A row whose neighbours include c chosen rows has a vote of weight discount^−c, and a row
    that is chosen itself has none. Each step takes the row with the most votes. The second stage of the paper, which sorts the
    other rows by the confidence of a model, is not implemented.

    Args:
        graph_NG: the neighbours of each row, see `neighbour_graph`; 150 in the paper.
        k: number to choose, at most N.
        discount: ρ; 10 in the paper.
    """
    count = len(graph_NG)
    is_chosen = np.zeros(count, dtype=bool)
    chosen: list[int] = []
    for _ in range(k):
        # Votes of equal weight are counted before they are weighted: a sum of powers depends on the order of its terms, and its
        # rounding would break ties.
        level_N = is_chosen[graph_NG].sum(axis=1)
        n_levels = int(level_N.max(initial=0)) + 1
        ballots = (graph_NG * n_levels + level_N[:, None])[~is_chosen]
        counts = np.bincount(ballots.ravel(), minlength=count * n_levels).reshape(count, n_levels)
        votes_N = (counts * discount ** -np.arange(n_levels, dtype=np.float64)).sum(axis=1)
        best = int(np.argmax(np.where(is_chosen, -np.inf, votes_N)))
        is_chosen[best] = True
        chosen.append(best)
    return np.array(chosen, dtype=np.int64)
