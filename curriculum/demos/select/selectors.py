"""The rules of the selectors: which of the candidates are chosen.

Contract: the functions of the table take `Candidates` and return indices among its rows, in the order in which they were chosen;
the others are pure functions of arrays. There are three groups. The first does not read the texts. The second compares texts:
near the query, or typical of the pool and unlike one another (MMR, k-DPP, vote-k); ties go to the earlier position. The third
goes by difficulty, a number that rises from easy (dense) to hard (sparse), and never by a raw metric, of which a high value
could mean easy. `spread` returns positions from easy to hard. `difficulty_matched` returns the lower level first, except where
no row of a level remained and a row of another level took its place.

Shapes: N candidates, D embedding width, k chosen, G neighbours of each row in a graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.rows import listed
from sparsort.curriculum.demos.pool.similarity import Floats, nearest
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.errors import SparsortError, did_you_mean
from sparsort.values import as_text, is_missing

# Rows for which the graph computes similarities at once, which bounds its memory to this number times N.
_BLOCK_ROWS = 1024
# A residual below this share of the largest counts as zero: the item is in the span of the chosen ones.
_SINGULAR = 1e-10
# The number of the query's nearest rows among which each selector chooses by default.
_MMR_FETCH = 20
_KDPP_FETCH = 100


def select_random(candidates: Candidates) -> Places:
    """k rows, drawn at random from the seed."""
    order = np.random.default_rng(candidates.settings.seed).permutation(len(candidates.rows))
    return order[: candidates.k].astype(np.int64)


def select_first(candidates: Candidates) -> Places:
    """The first k rows."""
    return np.arange(candidates.k, dtype=np.int64)


def select_ids(candidates: Candidates) -> Places:
    """The rows with the given ids, in their order; ids are compared as text.

    Raises:
        SparsortError: an id is unknown, is listed twice, belongs to two rows, or belongs to an excluded row.
    """
    pool_ids = candidates.known.pool.ids
    names = [
        as_text(name, field="ids", where=f"item {item} of ids=")
        for item, name in enumerate(candidates.settings.ids or ())
    ]
    positions_of: dict[str, list[int]] = {}
    for position, name in enumerate(pool_ids):
        positions_of.setdefault(name, []).append(position)
    for name in names:
        if name not in positions_of:
            hint = did_you_mean(name, pool_ids)
            raise SparsortError(f"the pool of {len(pool_ids)} rows has no row with the id {name!r}.{hint}")
        if names.count(name) > 1:
            raise SparsortError(f"the id {name!r} is listed {names.count(name)} times; list each demonstration once.")
        if len(positions_of[name]) > 1:
            raise SparsortError(
                f"{len(positions_of[name])} rows of the pool have the id {name!r}, so it does not identify a row. "
                "Give each row an id of its own."
            )
        if positions_of[name][0] in candidates.excluded:
            raise SparsortError(
                f"the demonstration {name!r} cannot be chosen because {candidates.excluded[positions_of[name][0]]}. "
                "Remove it, or, if a query may be among its own demonstrations, pass allow_leaks=True."
            )
    # `rows` is ascending, so a search turns positions in the pool into indices among the candidates.
    return np.searchsorted(candidates.rows, [positions_of[name][0] for name in names]).astype(np.int64)


def select_balanced(candidates: Candidates) -> Places:
    """k rows with an equal share of each of the L labels of the pool.

    Each label gets k // L rows. The remaining rows go to labels drawn at random among those that have a row to spare. If there
    are more labels than k, k of them are drawn.

    Raises:
        SparsortError: a row has no label, or a label has too few rows for its share.
    """
    k, labels, field = candidates.k, candidates.known.labels, str(candidates.known.label)
    unlabelled = [str(position) for position, label in enumerate(labels) if is_missing(label)]
    if unlabelled:
        raise SparsortError(
            f"{len(unlabelled)} rows of the pool have no value in the label field {field!r}: {listed(unlabelled)} "
            "(positions from 0). Name the right field with label=, or remove those rows."
        )
    generator = np.random.default_rng(candidates.settings.seed)
    # All labels of the pool count, also one whose rows are all excluded, so that the shares do not depend on the query.
    members: dict[str | None, list[int]] = {label: [] for label in labels}
    for index, position in enumerate(candidates.rows.tolist()):
        members[labels[position]].append(index)
    share, remainder = divmod(k, len(members))
    too_few = [f"{label!r} ({len(rows)})" for label, rows in members.items() if len(rows) < share]
    spare = [label for label, rows in members.items() if len(rows) > share]
    if too_few or len(spare) < remainder:
        short = too_few or [f"{label!r} ({len(rows)})" for label, rows in members.items() if len(rows) <= share]
        raise SparsortError(
            f"{k} demonstrations over {len(members)} labels need {share}{' or more' if remainder else ''} of each, but "
            f"these labels have too few rows to choose from: {listed(short)}. "
            "Ask for fewer, or add rows of those labels."
        )
    extra = {spare[index] for index in generator.permutation(len(spare))[:remainder].tolist()}
    chosen: list[int] = []
    for label, rows in members.items():
        chosen += [rows[index] for index in generator.permutation(len(rows))[: share + (label in extra)].tolist()]
    # Shuffled, so that the rows of one label do not follow each other.
    return np.array(chosen, dtype=np.int64)[generator.permutation(k)]


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
    # `sklearn.neighbors.NearestNeighbors` returns other neighbours among duplicates, which would change stored selections.
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


def select_spread(candidates: Candidates) -> Places:
    """One row for each of k difficulty bins."""
    # Embeddings are optional for this selector, and `near` is empty without them.
    near = candidates.near if candidates.near.size else None
    return spread(candidates.difficulty, candidates.k, similarity_N=near, seed=candidates.settings.seed)


def select_difficulty_matched(candidates: Candidates) -> Places:
    """Rows near the query and of its own difficulty level or the next."""
    return difficulty_matched(
        candidates.difficulty,
        candidates.known.query_difficulty,
        candidates.near,
        candidates.k,
        levels=candidates.settings.n_levels,
        fetch=candidates.settings.fetch or 20,
    )


def level_edges(difficulty_N: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """The lowest difficulty of each level but the first, (levels − 1,), if N rows are divided into levels of equal size.

    Raises:
        SparsortError: fewer rows than levels.
    """
    count = len(difficulty_N)
    if levels < 1 or count < levels:
        raise SparsortError(
            f"{count} scored demonstrations cannot be divided into {levels} levels. Ask for fewer with n_levels=."
        )
    # The sizes of the levels differ by at most one row; the larger ones come first.
    parts = np.array_split(np.sort(difficulty_N), levels)
    return np.array([part[0] for part in parts[1:]], dtype=np.float64)


def levels_of(difficulty: NDArray[np.float64] | float, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """The level of each difficulty, from 1 (easiest) to len(edges) + 1. Equal difficulties have the same level."""
    # side="right" puts a difficulty that equals an edge into the higher level.
    return np.asarray(np.searchsorted(edges, difficulty, side="right") + 1, dtype=np.int64)


def spread(
    difficulty_N: NDArray[np.float64], k: int, *, similarity_N: Floats | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """One row from each of k equal difficulty bins, easy to hard (CDS, arXiv 2411.18126).

    Args:
        difficulty_N: difficulty of the pool.
        k: number of rows, at most N.
        similarity_N: similarity to the query. With it, each bin gives its nearest row; without it, a random one.
        seed: seed of the random choice.
    """
    generator = np.random.default_rng(seed)
    # Bins of equal size, not of equal width: a single outlier does not get a bin of its own.
    bins = np.array_split(np.argsort(difficulty_N, kind="stable"), k)
    if similarity_N is None:
        return np.array([generator.choice(members) for members in bins], dtype=np.int64)
    # The members of a bin are in the order of their difficulty. Sorting them gives ties of similarity to the earlier row.
    bins = [np.sort(members) for members in bins]
    return np.array([members[nearest(similarity_N[members], 1)[0]] for members in bins], dtype=np.int64)


def wanted_levels(level: int, levels: int, k: int) -> list[int]:
    """The levels that k demonstrations should have for a query of this level, in the order of the prompt.

    For k = 2 (arXiv 2603.03415): if the query's level is in the lowest third (level ≤ levels // 3), the same level and the next
    higher one; in the middle third, the same level twice; in the highest third, the next lower level and the same. For other k,
    ceil(k / 2) demonstrations have the query's own level and floor(k / 2) the other one. If there is no such other level, all
    have the query's own.
    """
    other = k // 2
    same = [level] * (k - other)
    if level <= levels // 3:
        return same + [min(level + 1, levels)] * other
    if level <= 2 * levels // 3:
        return [level] * k
    return [max(level - 1, 1)] * other + same


def difficulty_matched(
    difficulty_N: NDArray[np.float64],
    query_difficulty: float,
    similarity_N: Floats,
    k: int,
    *,
    levels: int = 5,
    fetch: int = 20,
) -> NDArray[np.int64]:
    """The selection rule of "Farther the Shift, Sparser the Representation" (arXiv 2603.03415) for one query, (k,).

    The pool is divided into levels of equal size by difficulty, and the query gets the level of its own difficulty. Among the
    `fetch` rows nearest to the query, each of the `wanted_levels` takes its nearest row. If a level has no row left, the nearest
    of the remaining rows takes its place.

    Args:
        difficulty_N: difficulty of the pool.
        query_difficulty: difficulty of the query by the same score.
        similarity_N: similarity of the pool to the query.
        k: number of rows, at most N.
        levels: number of levels; 5 in the paper.
        fetch: number of neighbours to choose from, at least k; 20 in the paper.

    Raises:
        SparsortError: fewer rows than levels.
    """
    edges = level_edges(difficulty_N, levels)
    query_level = int(levels_of(query_difficulty, edges))
    near = nearest(similarity_N, max(fetch, k)).tolist()
    level_of_near: dict[int, Any] = dict(zip(near, levels_of(difficulty_N[near], edges).tolist(), strict=True))
    chosen: list[int | None] = []
    for wanted in wanted_levels(query_level, levels, k):
        chosen.append(next((row for row in near if level_of_near[row] == wanted and row not in chosen), None))
    # Only now, so that a substitute never takes a row that a later level wants.
    remaining = iter([row for row in near if row not in chosen])
    return np.array([next(remaining) if row is None else row for row in chosen], dtype=np.int64)
