"""From difficulties to the arrays of a plan: the order, the rows at any place of an epoch, and the edges of batches.

Contract: pure functions of settings and arrays. `places` are positions in the sequence of one epoch, in [0, N);
`stage_places` (S + 1,) are the places where stages begin, followed by N.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading.plan import batches, sequences
from sparsort.curriculum.loading.plan.ranking import Rows, rank_rows, row_type, spread_groups
from sparsort.curriculum.loading.plan.settings import CurriculumSettings
from sparsort.curriculum.loading.plan.shuffling import key_of, permutation, permute

Arrays = dict[str, NDArray[Any]]
Places = NDArray[np.int64]
Spans = list[tuple[int, int]]


def base_order(
    difficulty: ArrayLike, settings: CurriculumSettings, ids: Rows | None, groups: NDArray[Any] | None
) -> Arrays:
    """The order of the rows before stages and pacing.

    Args:
        difficulty: (N,) difficulty of each row.
        settings: the settings of the plan.
        ids: (N,) rows in the order of their ids; None if the rows are already in that order.
        groups: (N,) group of each row, counted from 0, or None.

    Returns:
        `order` (N,), the rows from the beginning of the curriculum to its end; with quotas, sorted by group, and `group_edges`
        (G + 1,). Empty for schedules that do not use the difficulty.
    """
    n = len(np.asanyarray(difficulty))
    if settings.schedule in ("as_given", "shuffle"):
        return {}
    if settings.direction == "random":
        order = permutation(n, key_of(settings.seed, "random order"), dtype=row_type(n))
        order = order if ids is None else ids[order]
    else:
        order = rank_rows(difficulty, ids=ids, unscored=settings.unscored)
    n_groups = 0 if groups is None else int(groups.max()) + 1
    if groups is not None:
        # Without this, a group whose rows are all hard would not appear before the end of the curriculum.
        order = spread_groups(order, groups, n_groups)
    if settings.direction == "hard_to_easy":
        # The copy makes the order contiguous in memory, like that of every other direction.
        order = order[::-1].copy()
    if settings.quotas is None or groups is None:
        return {"order": order}
    # The sort is stable, so each group keeps its rows in the order of their difficulty.
    grouped = order[np.argsort(groups[order], kind="stable")]
    edges = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=n_groups))])
    return {"order": grouped, "group_edges": edges.astype(np.int64)}


def available(settings: CurriculumSettings, n: int, stage_places: Places, longest: int | None) -> Places | None:
    """The number of rows, from the beginning of the order, that are available.

    A plan stores these integers, so that drawing a batch only looks one up. A pool always offers enough rows for a batch:
    `batch_size` rows, or as many rows of length `longest` as fit in the token budget.

    Args:
        settings: the settings of the plan.
        n: N, number of rows.
        stage_places: (S + 1,) places where stages begin, followed by N.
        longest: tokens of the longest row; None without lengths.

    Returns:
        (K,) for the batches of a pool, or (S,) for the stages of one pass; None without pacing.
    """
    if settings.pacing is None:
        return None
    if settings.mode == "one_pass":
        return sequences.available(settings.pacing.share(stage_places[:-1], n), stage_places)
    steps = settings.steps or 0
    # Without the 1e-9, rounding could turn a share of exactly k rows into k + 1.
    wanted = np.ceil(settings.pacing.share(np.arange(steps), steps) * n - 1e-9)
    return np.clip(wanted, fewest(settings, n, longest), n).astype(np.int64)


def fewest(settings: CurriculumSettings, n: int, longest: int | None) -> int:
    """The number of rows in the smallest batch that a pool draws."""
    return min(n, settings.batch_size or (settings.token_budget or 0) // max(1, longest or 1))


def warm_place(settings: CurriculumSettings, n: int) -> int:
    """The first place after a warm-up, from which on the rows are shuffled."""
    return n if settings.warm_up is None else round(settings.warm_up * n)


def rows_at(
    settings: CurriculumSettings,
    places: Places,
    *,
    order: Rows | None,
    ids: Rows | None,
    stage_places: Places,
    limits: Places | None,
    epoch: int,
) -> Rows:
    """The rows at some places of an epoch, before rows of similar length are grouped.

    Args:
        settings: the settings of the plan.
        places: positions in the sequence of the epoch.
        order: the order from `base_order`; None for schedules that do not use the difficulty.
        ids: (N,) rows in the order of their ids; None if the rows are already in that order.
        stage_places: (S + 1,) places where stages begin, followed by N.
        limits: the limits from `available`; None without pacing.
        epoch: number of the epoch, from 0.
    """
    n, seed = int(stage_places[-1]), settings.seed
    if settings.schedule == "as_given":
        return places
    if settings.schedule == "shuffle" or order is None or (epoch > 0 and settings.later_epochs == "shuffle"):
        # The shuffle permutes ranks of ids and not row numbers, so it does not depend on the order of the rows in the
        # data.
        ranks = permute(places, n, key_of(seed, epoch, "shuffle"))
        return ranks if ids is None else ids[ranks]
    if settings.warm_up is not None:
        places = sequences.warmed_up(places, n, warm_place(settings, n), key_of(seed, epoch, "warm-up"))
    if settings.schedule == "folded":
        places = sequences.folded(places, n, settings.folds)
    elif settings.schedule == "interleaved":
        places = sequences.interleaved(places, n, settings.folds)
    elif settings.stages is not None:
        drawn_from = stage_places[1:] if limits is None else limits
        places = sequences.staged(places, stage_places, drawn_from, lambda s: key_of(seed, epoch, "stage", s))
    return order[places]


def cut(
    settings: CurriculumSettings, sequence: Rows, lengths: NDArray[Any], stage_places: Places
) -> tuple[Arrays, list[int], Spans]:
    """Cut the sequence of an epoch into batches by tokens, or into batches of packed sequences.

    No batch crosses the edge of a stage or the end of a warm-up.

    Args:
        settings: the settings of the plan.
        sequence: (N,) rows in the order of the epoch.
        lengths: (N,) tokens of each row of the data.
        stage_places: (S + 1,) places where stages begin, followed by N.

    Returns:
        Three things. The arrays: `sequence` (N,), the rows in the order of their batches; `batch_edges` (K + 1,), in items;
        and, with packing, `item_edges` (M + 1,), in places. The number of each stage's first batch, followed by K. And the
        spans (first, last) of batches that may change places from epoch to epoch.
    """
    warm = warm_place(settings, len(sequence))
    # `pieces` maps a place to the number of batches before it.
    rows, item_edges, batch_edges, pieces = [], [0], [0], {0: 0}
    # Each part between two of these places is cut on its own, so no batch can cross an edge.
    for first, last in itertools.pairwise(sorted({*stage_places.tolist(), warm})):
        part = sequence[first:last]
        if settings.group_by_length:
            # The batches of the token budget are not known yet. Group by batches of the typical size instead.
            size = max(1, (settings.token_budget or 0) // max(1, int(np.median(lengths[part]))))
            key = key_of(settings.seed, "lengths", first)
            part = sequences.like_lengths(part, lengths, batches.by_count(len(part), size), key)
        if settings.packing == "none":
            edges = batches.by_tokens(lengths[part], settings.token_budget or 0)
        else:
            capacity = settings.pack_length or 0
            if settings.packing == "best_fit":
                places, bins = batches.best_fit(lengths[part], capacity)
                part = part[places]
            else:
                bins = batches.next_fit(lengths[part], capacity)
            # The edges of a part begin with 0, which is the end of the previous part, so the first one is dropped.
            item_edges.extend((first + bins[1:]).tolist())
            edges = batches.by_count(len(bins) - 1, settings.batch_size or 1)
        rows.append(part)
        batch_edges.extend((batch_edges[-1] + edges[1:]).tolist())
        pieces[last] = len(batch_edges) - 1
    arrays = {"sequence": np.concatenate(rows), "batch_edges": np.array(batch_edges, dtype=np.int64)}
    if settings.packing != "none":
        arrays["item_edges"] = np.array(item_edges, dtype=np.int64)
    stage_edges = [pieces[place] for place in stage_places.tolist()]
    return arrays, stage_edges, _spans(settings, pieces, warm)


def _spans(settings: CurriculumSettings, pieces: dict[int, int], warm: int) -> Spans:
    """One span per stage until the warm-up ends, then one for the rest; a single span if later epochs are plain shuffles."""
    last = max(pieces.values())
    if settings.schedule == "shuffle" or settings.later_epochs == "shuffle":
        return [(0, last)]
    stages = [pieces[place] for place in sorted(pieces) if place <= warm] if settings.stages is not None else []
    spans = list(itertools.pairwise(stages))
    return [*spans, (pieces[warm], last)] if pieces[warm] < last else spans
