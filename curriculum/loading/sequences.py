"""The sequence of rows of one pass.

Contract: every function returns a permutation of the order that it is given, as a pure function of it, the edges of the
stages and a key for each draw. `edges` (S + 1,) are places: stage s holds places edges[s] … edges[s + 1] − 1 of the
sequence, and a stage is never crossed by what happens inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.shuffling import permutation, permute

Rows = NDArray[Any]
Places = NDArray[np.int64]
KeyOf = Callable[[int], int]

_CHUNK = 1 << 20


def shuffled(order: Rows, key: int) -> Rows:
    """A plain shuffle."""
    sequence = np.empty_like(order)
    for begin in range(0, len(order), _CHUNK):
        end = min(len(order), begin + _CHUNK)
        sequence[begin:end] = order[permute(np.arange(begin, end), len(order), key)]
    return sequence


def staged(order: Rows, edges: Places, key_of_stage: KeyOf) -> Rows:
    """Shuffled within each stage, one after the other: baby steps without repetition (Bengio et al. 2009)."""
    parts = [shuffled(order[edges[s] : edges[s + 1]], key_of_stage(s)) for s in range(len(edges) - 1)]
    return np.concatenate(parts) if parts else order


def available(shares: NDArray[np.float64], edges: Places) -> Places:
    """How many of the easiest each stage draws from, (S,): ceil(share · N), and never fewer than must be shown by its end.

    Args:
        shares: (S,) pacing at each stage's first batch.
    """
    n = int(edges[-1])
    return np.maximum(np.minimum(n, np.ceil(shares * n - 1e-9)), edges[1:]).astype(np.int64)


def paced(order: Rows, edges: Places, limits: Places, key_of_stage: KeyOf) -> Rows:
    """Stage s draws without replacement from what is unseen among the first limits[s] of `order`, all alike likely.

    Time and memory are O(N): the chosen leave the pool, and its tail fills their places.
    """
    sequence, pool = np.empty_like(order), np.empty_like(order)
    held = arrived = 0
    for s, limit in enumerate(limits):
        new = order[arrived:limit]
        pool[held : held + len(new)] = new
        held, arrived = held + len(new), max(arrived, int(limit))
        size = int(edges[s + 1] - edges[s])
        chosen = permute(np.arange(size), held, key_of_stage(s)) if size else np.empty(0, dtype=np.int64)
        sequence[edges[s] : edges[s + 1]] = pool[chosen]
        held -= size
        holes = np.sort(chosen[chosen < held])
        keep = np.ones(size, dtype=bool)
        keep[chosen[chosen >= held] - held] = False
        pool[holes] = pool[held : held + size][keep]
    return sequence


def folded(order: Rows, folds: int) -> Rows:
    """order[k::folds] for k < folds, one after the other: as many short curricula."""
    return np.concatenate([order[k::folds] for k in range(folds)])


def interleaved(order: Rows, folds: int) -> Rows:
    """One row of each of `folds` equal levels in turn, each level from its own beginning."""
    n = len(order)
    starts = np.arange(folds + 1) * n // folds
    turns = np.arange(math.ceil(n / folds))
    places = starts[None, :-1] + turns[:, None]
    sequence: Rows = order[places[places < starts[None, 1:]]]
    return sequence


def warmed_up(sequence: Rows, until: int, key: int) -> Rows:
    """The first `until` places as they are, then the rest shuffled (arXiv 2506.11300, curriculum as a warm-up)."""
    return np.concatenate([sequence[:until], shuffled(sequence[until:], key)])


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
