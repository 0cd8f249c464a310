"""The sequence of one pass: the rank in the order for each place of an epoch.

Contract: every function maps distinct places in [0, n) to distinct ranks in [0, n) and is a pure function of its arguments. Time
and memory are proportional to the number of places passed, so an epoch never needs an array of the size of the data. `edges`
(S + 1,) are places, from 0 to n: stage s has the places edges[s] … edges[s + 1] − 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.plan.shuffling import permutation, permute

Rows = NDArray[Any]
Places = NDArray[np.int64]
KeyOf = Callable[[int], int]


def available(shares: NDArray[np.float64], edges: Places) -> Places:
    """The number of easiest ranks that each stage draws from, (S,): ceil(share · n), or all ranks shown by its end if more.

    Args:
        shares: (S,) share of the pacing at the first place of each stage.
        edges: (S + 1,) places where stages begin, followed by n.
    """
    n = int(edges[-1])
    # Without the 1e-9, rounding could turn a share of exactly k ranks into k + 1.
    return np.maximum(np.minimum(n, np.ceil(shares * n - 1e-9)), edges[1:]).astype(np.int64)


def staged(places: Places, edges: Places, limits: Places, key_of_stage: KeyOf) -> Places:
    """Stage s draws uniformly, without replacement, from the unseen ranks among the first limits[s].

    With limits = edges[1:] that is a shuffle inside each stage: baby steps without repetition (Bengio et al. 2009).

    Method: the pool of a stage is the ranks that the previous stage left over, in the order of its permutation, followed by the
    new ranks. A drawn rank is therefore either new, or it is at a known position of the previous stage's permutation, after the
    ranks that stage showed. In the second case the position is followed back, stage by stage, until the rank is new.

    Args:
        places: places in [0, n).
        edges: (S + 1,) places where stages begin, followed by n.
        limits: (S,) number of easiest ranks that each stage draws from.
        key_of_stage: maps a stage to the key of its permutation.
    """
    sizes = np.diff(edges)
    # The ranks that have become available by each stage; those shown before it are no longer in its pool.
    arrived = np.maximum.accumulate(limits)
    pool = arrived - edges[:-1]
    if not places.size:
        return places
    first, last = int(places[0]), int(places[-1])
    lowest, highest = (int(s) - 1 for s in np.searchsorted(edges, (first, last), side="right"))
    if np.array_equal(pool[lowest : highest + 1], sizes[lowest : highest + 1]) and bool((np.diff(places) == 1).all()):
        # The common case is a run of consecutive places in stages that show their whole pool. Each stage is then a plain
        # permutation, and no place needs a search for its stage.
        cuts = np.clip(edges[lowest : highest + 2], first, last + 1)
        parts = [
            permute(np.arange(begin - edges[s], end - edges[s]), int(sizes[s]), key_of_stage(s)) + edges[s]
            for s, begin, end in zip(range(lowest, highest + 1), cuts[:-1], cuts[1:], strict=True)
        ]
        return np.concatenate(parts)
    highest = int(np.searchsorted(edges, places.max(), side="right")) - 1
    stage = np.searchsorted(edges, places, side="right") - 1
    position = places - edges[stage]
    ranks = np.empty_like(places)
    # Stages are processed from the last to the first, because a leftover refers to the previous stage.
    for s in range(highest, -1, -1):
        here = np.flatnonzero(stage == s)
        if not here.size:
            continue
        drawn = permute(position[here], int(pool[s]), key_of_stage(s))
        # The first `left` positions of the pool are the leftovers of stage s − 1; the new ranks follow.
        left, before = (int(pool[s - 1] - sizes[s - 1]), int(arrived[s - 1])) if s else (0, 0)
        if not left:
            drawn += before
            ranks[here] = drawn
            continue
        # Positions below `left` are leftovers, which the next iteration follows back to stage s − 1.
        is_new = drawn >= left
        ranks[here[is_new]] = drawn[is_new] - left + before
        older = here[~is_new]
        stage[older] = s - 1
        position[older] = drawn[~is_new] + sizes[s - 1]
    return ranks


def folded(places: Places, n: int, folds: int) -> Places:
    """Ranks k, k + folds, k + 2·folds, … for each k < folds in turn: `folds` short curricula, one after the other."""
    # starts[k] is the place of the first rank of fold k, which has ⌈(n − k) / folds⌉ ranks.
    starts = np.concatenate([[0], np.cumsum((n - np.arange(folds) + folds - 1) // folds)])
    fold = np.searchsorted(starts, places, side="right") - 1
    ranks: Places = fold + folds * (places - starts[fold])
    return ranks


def interleaved(places: Places, n: int, folds: int) -> Places:
    """One rank from each of `folds` equal levels in turn, each level easiest first."""
    starts = np.arange(folds + 1) * n // folds
    turns = n // folds
    turn, level = np.divmod(places, folds)
    # Level sizes differ by at most one: the longer levels have one turn more.
    longer = np.flatnonzero(np.diff(starts) > turns)
    last = places >= turns * folds
    level[last] = longer[places[last] - turns * folds]
    turn[last] = turns
    ranks: Places = starts[level] + turn
    return ranks


def warmed_up(places: Places, n: int, until: int, key: int) -> Places:
    """Keep the places before `until` and shuffle the rest (arXiv 2506.11300, a curriculum as a warm-up)."""
    moved = places.copy()
    late = places >= until
    moved[late] = until + permute(places[late] - until, n - until, key)
    return moved


def like_lengths(sequence: Rows, lengths: NDArray[Any], batch_edges: Places, key: int, *, window: int = 50) -> Rows:
    """Group the rows of one stage by length: sort them within windows of batches, then shuffle the batches.

    Args:
        sequence: (n,) rows of the stage, shuffled.
        lengths: (N,) tokens of each row of the data.
        batch_edges: (K + 1,) edges of the stage's batches, from 0 to n.
        key: key of the permutation of the batches.
        window: number of batches in a window.
    """
    n_batches = len(batch_edges) - 1
    ordered = np.empty_like(sequence)
    for begin in range(0, n_batches, window):
        first, last = batch_edges[begin], batch_edges[min(n_batches, begin + window)]
        part = sequence[first:last]
        ordered[first:last] = part[np.argsort(lengths[part], kind="stable")]
    # Batches differ in size, so swapping two of them would move all rows in between. Instead, write the sorted rows to the
    # places of the batches in their permuted order.
    turn = permutation(n_batches, key)
    places = np.concatenate([np.arange(batch_edges[k], batch_edges[k + 1]) for k in turn])
    mixed = np.empty_like(ordered)
    mixed[places] = ordered
    return mixed
