"""From difficulties to the arrays of a plan: the order, the sequence of an epoch, and where its batches are cut.

Contract: pure functions of settings and arrays. `places` are positions in the sequence of one epoch, in [0, N);
`stage_places` (S + 1,) are those where stages begin, N at the end.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading import batches, sequences
from sparsort.curriculum.loading.ranking import Rows, rank_rows, row_type, spread_groups
from sparsort.curriculum.loading.settings import CurriculumSettings
from sparsort.curriculum.loading.shuffling import key_of, permutation

Arrays = dict[str, NDArray[Any]]
Places = NDArray[np.int64]


def base_order(
    difficulty: ArrayLike, settings: CurriculumSettings, ids: Rows | None, groups: NDArray[Any] | None
) -> Arrays:
    """The rows from the beginning of the curriculum to its end, `order` (N,), and `group_edges` (G + 1,) with quotas.

    Args:
        difficulty: (N,) by row.
        ids: rows in the order of their ids, None where that is the order of the rows.
        groups: (N,) group of each row, from 0, or None.
    """
    n = len(np.asanyarray(difficulty))
    if settings.schedule == "as_given":
        return {}
    if settings.schedule == "shuffle":
        order = np.arange(n, dtype=row_type(n)) if ids is None else ids
    elif settings.direction == "random":
        order = permutation(n, key_of(settings.seed, "random order"), dtype=row_type(n))
        order = order if ids is None else ids[order]
    else:
        order = rank_rows(difficulty, ids=ids, unscored=settings.unscored)
    n_groups = 0 if groups is None else int(groups.max()) + 1
    if groups is not None and settings.schedule != "shuffle":
        order = spread_groups(order, groups, n_groups)
    if settings.direction == "hard_to_easy":
        order = order[::-1].copy()
    if settings.quotas is None or groups is None:
        return {"order": order}
    grouped = order[np.argsort(groups[order], kind="stable")]
    edges = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=n_groups))])
    return {"order": grouped, "group_edges": edges.astype(np.int64)}


def changes_with_epoch(settings: CurriculumSettings) -> bool:
    """Whether a later epoch has another sequence than the first."""
    return (
        settings.schedule == "shuffle"
        or settings.stages is not None
        or settings.warm_up is not None
        or settings.later_epochs == "shuffle"
    )


def available(settings: CurriculumSettings, n: int, stage_places: Places) -> Places | None:
    """How many of the first rows of the order may be shown: by each batch of a pool, (K,), by each stage of one pass, (S,).

    A plan keeps these whole numbers, so that drawing a batch looks one up.
    """
    if settings.pacing is None:
        return None
    if settings.mode == "one_pass":
        return sequences.available(settings.pacing.share(stage_places[:-1], n), stage_places)
    steps = settings.steps or 0
    least = min(n, settings.batch_size or 1)
    held = np.ceil(settings.pacing.share(np.arange(steps), steps) * n - 1e-9)
    return np.clip(held, least, n).astype(np.int64)


def one_pass(
    settings: CurriculumSettings,
    order: Rows,
    *,
    ids: Rows | None,
    stage_places: Places,
    limits: Places | None,
    epoch: int,
    lengths: NDArray[Any] | None = None,
    batch_places: Places | None = None,
) -> Rows:
    """The sequence of rows of an epoch, (N,).

    Args:
        limits: (S,) rows that each stage may show (`available`); None without pacing.
        lengths: (N,) by row; with `group_by_length`.
        batch_places: (K + 1,) where batches by count begin; None where batches are cut from the sequence.
    """
    n, seed = len(order), settings.seed
    if settings.schedule == "shuffle" or (epoch > 0 and settings.later_epochs == "shuffle"):
        rows = ids if ids is not None else np.arange(n, dtype=row_type(n))
        return sequences.shuffled(rows, key_of(seed, epoch, "shuffle"))
    if settings.schedule == "folded":
        sequence = sequences.folded(order, settings.folds)
    elif settings.schedule == "interleaved":
        sequence = sequences.interleaved(order, settings.folds)
    elif settings.stages is None:
        sequence = order
    elif limits is None:
        sequence = sequences.staged(order, stage_places, lambda s: key_of(seed, epoch, "stage", s))
    else:
        sequence = sequences.paced(order, stage_places, limits, lambda s: key_of(seed, epoch, "stage", s))
    if settings.warm_up is not None:
        sequence = sequences.warmed_up(sequence, warm_place(settings, n), key_of(seed, epoch, "warm-up"))
    if settings.group_by_length and lengths is not None:
        for s in range(len(stage_places) - 1):
            first, last = int(stage_places[s]), int(stage_places[s + 1])
            size = (
                max(1, (settings.token_budget or 0) // max(1, int(np.median(lengths)))) if batch_places is None else 0
            )
            edges = (
                batches.by_count(last - first, size)
                if batch_places is None
                else batch_places[(batch_places >= first) & (batch_places <= last)] - first
            )
            key = key_of(seed, epoch, "lengths", s)
            sequence[first:last] = sequences.like_lengths(sequence[first:last], lengths, edges, key)
    return sequence


def warm_place(settings: CurriculumSettings, n: int) -> int:
    """The first place that a warm-up leaves to chance."""
    return n if settings.warm_up is None else round(settings.warm_up * n)


def cut(
    settings: CurriculumSettings, sequence: Rows, lengths: NDArray[Any], stage_places: Places
) -> tuple[Arrays, list[int]]:
    """Batches by tokens, or of packed sequences; none crosses the edge of a stage.

    Returns:
        `sequence` (N,), the rows in the order of their batches; `batch_edges` (K + 1,) over items; `item_edges` (M + 1,)
        over places, when packed. And the number of each stage's first batch, K at the end.
    """
    rows, item_edges, batch_edges, stage_edges = [], [0], [0], [0]
    for first, last in itertools.pairwise(stage_places.tolist()):
        part = sequence[first:last]
        if settings.packing == "none":
            items = len(part)
            edges = batches.by_tokens(lengths[part], settings.token_budget or 0)
        else:
            capacity = settings.pack_length or 0
            if settings.packing == "best_fit":
                places, bins = batches.best_fit(lengths[part], capacity)
                part = part[places]
            else:
                bins = batches.next_fit(lengths[part], capacity)
            items = len(bins) - 1
            item_edges.extend((first + bins[1:]).tolist())
            edges = batches.by_count(items, settings.batch_size or 1)
        rows.append(part)
        done = batch_edges[-1]
        batch_edges.extend((done + edges[1:]).tolist())
        stage_edges.append(len(batch_edges) - 1)
    arrays = {"sequence": np.concatenate(rows), "batch_edges": np.array(batch_edges, dtype=np.int64)}
    if settings.packing != "none":
        arrays["item_edges"] = np.array(item_edges, dtype=np.int64)
    return arrays, stage_edges
