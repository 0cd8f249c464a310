"""The sequence of one pass, place by place: which rank of the order stands at which place of an epoch.

Contract: every function maps places in [0, n) to different ranks in [0, n), as a pure function of its arguments, for any
part of the places in time and memory of that part, so that nothing of the size of the data is made for an epoch and no
place costs more than another. `edges` (S + 1,) are places, from 0 to n: stage s holds places edges[s] … edges[s + 1] − 1.
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
    """How many of the easiest each stage draws from, (S,): ceil(share · n), and never fewer than must be shown by its end.

    Args:
        shares: (S,) pacing at each stage's first place.
    """
    n = int(edges[-1])
    return np.maximum(np.minimum(n, np.ceil(shares * n - 1e-9)), edges[1:]).astype(np.int64)


def staged(places: Places, edges: Places, limits: Places, key_of_stage: KeyOf) -> Places:
    """Stage s draws without replacement from what is unseen among the first limits[s] ranks, all alike likely.

    With limits = edges[1:] that is a shuffle inside each stage: baby steps without repetition (Bengio et al. 2009).

    Method: the pool of a stage is what the one before left, in the order of its permutation, then what is new. So a drawn
    thing is new, or stands at a known place behind what the stage before showed of its own pool, and is followed back.
    """
    sizes = np.diff(edges)
    arrived = np.maximum.accumulate(limits)
    pool = arrived - edges[:-1]
    if not places.size:
        return places
    first, last = int(places[0]), int(places[-1])
    lowest, highest = (int(s) - 1 for s in np.searchsorted(edges, (first, last), side="right"))
    if np.array_equal(pool[lowest : highest + 1], sizes[lowest : highest + 1]) and bool((np.diff(places) == 1).all()):
        # A run of places in stages that leave nothing behind, as most are: no need to ask of each place where it belongs.
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
    for s in range(highest, -1, -1):
        here = np.flatnonzero(stage == s)
        if not here.size:
            continue
        drawn = permute(position[here], int(pool[s]), key_of_stage(s))
        left, before = (int(pool[s - 1] - sizes[s - 1]), int(arrived[s - 1])) if s else (0, 0)
        if not left:
            drawn += before
            ranks[here] = drawn
            continue
        is_new = drawn >= left
        ranks[here[is_new]] = drawn[is_new] - left + before
        older = here[~is_new]
        stage[older] = s - 1
        position[older] = drawn[~is_new] + sizes[s - 1]
    return ranks


def folded(places: Places, n: int, folds: int) -> Places:
    """Ranks k, k + folds, k + 2·folds, … for each k < folds, one after the other: as many short curricula."""
    starts = np.concatenate([[0], np.cumsum((n - np.arange(folds) + folds - 1) // folds)])
    fold = np.searchsorted(starts, places, side="right") - 1
    found: Places = fold + folds * (places - starts[fold])
    return found


def interleaved(places: Places, n: int, folds: int) -> Places:
    """One rank of each of `folds` equal levels in turn, each level from its own beginning."""
    starts = np.arange(folds + 1) * n // folds
    turns = n // folds
    turn, level = np.divmod(places, folds)
    # Levels differ by at most one: the longer ones have one more turn.
    longer = np.flatnonzero(np.diff(starts) > turns)
    last = places >= turns * folds
    level[last] = longer[places[last] - turns * folds]
    turn[last] = turns
    found: Places = starts[level] + turn
    return found


def warmed_up(places: Places, n: int, until: int, key: int) -> Places:
    """Places before `until` as they are, the rest shuffled (arXiv 2506.11300, a curriculum as a warm-up)."""
    moved = places.copy()
    late = places >= until
    moved[late] = until + permute(places[late] - until, n - until, key)
    return moved


def like_lengths(sequence: Rows, lengths: NDArray[Any], batch_edges: Places, key: int, *, window: int = 50) -> Rows:
    """The rows of one stage, put together by length: sorted within windows of that many batches, batches then shuffled.

    Args:
        sequence: (n,) rows of the stage, shuffled.
        lengths: (N,) tokens of each row of the data.
        batch_edges: (K + 1,) places of the stage's batches, from 0 to n.
    """
    n_batches = len(batch_edges) - 1
    ordered = np.empty_like(sequence)
    for begin in range(0, n_batches, window):
        first, last = batch_edges[begin], batch_edges[min(n_batches, begin + window)]
        part = sequence[first:last]
        ordered[first:last] = part[np.argsort(lengths[part], kind="stable")]
    # Batches differ in size, so they are laid down anew: the places of the k-th batch of the new order, in turn.
    turn = permutation(n_batches, key)
    places = np.concatenate([np.arange(batch_edges[k], batch_edges[k + 1]) for k in turn])
    mixed = np.empty_like(ordered)
    mixed[places] = ordered
    return mixed
