"""One selection: the rows that may be chosen, and the k rows that a selector chooses among them.

Contract: as in `demos.select`. These inputs of `Known` are read, in this order: difficulty, the query's difficulty, embeddings,
the query's embedding. Each is read only if the selector needs it, except that `own_similarity=False` reads the embeddings and the
query's embedding whenever they are known.

Shapes: N pool rows, M of them that may be chosen, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.known import Known
from sparsort.curriculum.demos.pool import similarity
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.leaks import Leak
from sparsort.curriculum.demos.select.candidates import Candidates, DemoSelectorEntry, SelectSettings
from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A pool row that could not be chosen, and why."""

    position: int
    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SelectedDemos:
    """The k demonstrations that were selected.

    Attributes:
        demos: copies of the rows, in the selector's order.
        indices: their positions in the pool.
        similarity: their similarity to the query, for the argument `similarity` of `order_demos`: BM25 if the selector compares
            words, or else the cosine if embeddings are known, or else None.
        excluded: the rows that could not be chosen.
        method: the selector's name.
        notes: duplicates among the demonstrations, one sentence each; they are kept.
    """

    demos: list[dict[str, Any]]
    indices: list[int]
    similarity: list[float] | None
    excluded: list[Excluded]
    method: str
    notes: list[str] = field(default_factory=list)


def select_rows(known: Known, selector: DemoSelectorEntry, k: int | None, settings: SelectSettings) -> SelectedDemos:
    """Choose k demonstrations.

    Args:
        known: the inputs for the pool and the query.
        selector: an entry of `SELECTORS`.
        k: number to choose; None for a selector whose rows the caller lists.
        settings: the other settings.

    Raises:
        SparsortError: as `select_demos`.
    """
    pool = known.pool
    k = _checked_k(k, selector, settings.ids)
    if not 0.0 <= settings.trade_off <= 1.0:
        raise SparsortError(
            f"trade_off is {settings.trade_off}; a number from 0 (all diversity) to 1 (all relevance) is needed."
        )
    # Missing inputs are reported before any input is computed, which may run a model over the whole pool.
    if missing := known.missing(selector.needs):
        raise SparsortError(
            f"the selection method {selector.name!r} needs {' and '.join(f'{name}=' for name in missing)}."
        )
    difficulty = known.difficulty.all if known.difficulty is not None and "scores" in selector.needs else None
    # A NaN would silently be put into the highest level.
    if "query_difficulty" in selector.needs and not np.isfinite(known.query_difficulty):
        raise SparsortError(
            f"query_difficulty is {known.query_difficulty}; the query could not be scored, so it has no level."
        )
    unit_ND, near_N = _similarity(known, selector, own_similarity=settings.own_similarity)
    excluded = _excluded(known, selector, unit_ND, difficulty, allow_leaks=settings.allow_leaks)
    rows = np.array([position for position in range(len(pool)) if position not in excluded], dtype=np.int64)
    if len(rows) < k:
        raise _too_few(k, len(pool), excluded)
    candidates = Candidates(
        known=known,
        rows=rows,
        excluded=excluded,
        k=k,
        settings=settings,
        near=_at(near_N, rows),
        unit=_at(unit_ND, rows),
    )
    # No function is called for k = 0, so that a selector may rely on at least one candidate.
    chosen = rows[selector.function(candidates)].tolist() if k else []
    demos = [dict(pool.rows[position]) for position in chosen]
    return SelectedDemos(
        demos=demos,
        indices=chosen,
        similarity=None if near_N is None else [float(near_N[position]) for position in chosen],
        excluded=[Excluded(position=at, id=pool.ids[at], reason=excluded[at]) for at in sorted(excluded)],
        method=selector.name,
        notes=duplicates(demos),
    )


def _similarity(
    known: Known, selector: DemoSelectorEntry, *, own_similarity: bool
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """The unit embeddings, (N, D), and the similarity to the query, (N,); each None if it is not read."""
    reads = selector.needs if own_similarity or selector.compares_words else {"embeddings", "query_embedding"}
    unit_ND = known.unit_embeddings if known.embeddings is not None and "embeddings" in reads else None
    if selector.compares_words:
        return unit_ND, known.word_scores
    if unit_ND is None or "query_embedding" not in reads or known.query_embedding is None:
        return unit_ND, None
    return unit_ND, similarity.cosine(known.query_embedding, unit_ND)


def _excluded(
    known: Known,
    selector: DemoSelectorEntry,
    unit_ND: NDArray[Any] | None,
    difficulty_N: NDArray[Any] | None,
    *,
    allow_leaks: bool,
) -> dict[int, str]:
    """The positions of the rows that cannot be chosen → why. A leak is reported before any other reason."""
    excluded: dict[int, str] = {}
    if known.query is not None and not allow_leaks:
        excluded |= {leak.demo: _leak_reason(leak) for leak in known.pool.leaks(known.inputs)}
    # Embeddings that are read for the reported similarity only may be NaN.
    if unit_ND is not None and "embeddings" in selector.needs:
        for position in np.flatnonzero(np.isnan(unit_ND).any(axis=1)).tolist():
            excluded.setdefault(position, "its embedding is zero or not finite")
    if difficulty_N is not None:
        for position in np.flatnonzero(np.isnan(difficulty_N)).tolist():
            excluded.setdefault(position, "it has no score (NaN)")
    return excluded


def _checked_k(k: int | None, selector: DemoSelectorEntry, ids: Sequence[Any] | None) -> int:
    if selector.names_rows:
        if ids is None:
            raise SparsortError(
                f"the selection method {selector.name!r} needs ids=, the ids of the demonstrations in their order."
            )
        if k is not None and k != len(ids):
            raise SparsortError(f"k is {k}, but ids= lists {len(ids)} demonstrations. Omit k, or make them agree.")
        return len(ids)
    if k is None or k < 0:
        raise SparsortError(f"k is {k}; pass the number of demonstrations to choose, 0 or more.")
    return int(k)


def _at(values: NDArray[Any] | None, rows: NDArray[np.int64]) -> NDArray[Any]:
    if values is None:
        return np.empty(0)
    # The same object if all rows may be chosen, so that the graph of vote-k is recognised and not computed again.
    return values if len(rows) == len(values) else values[rows]


def _leak_reason(leak: Leak) -> str:
    own, other = ("it", "the query") if leak.field is None else (f"its {leak.field!r}", "the query's")
    if leak.kind == "exact":
        return f"{own} is {other}{' itself' if leak.field is None else ''}"
    return f"{own} nearly is {other} (similarity {leak.similarity:.2f})"


def _too_few(k: int, count: int, excluded: dict[int, str]) -> SparsortError:
    # Without the similarity in brackets, so that rows excluded for the same reason are counted together.
    counts = Counter(reason.partition(" (")[0] for reason in excluded.values())
    why = "; ".join(f"{number} excluded because {reason}" for reason, number in counts.items())
    return SparsortError(
        f"{k} demonstrations were asked for, but only {count - len(excluded)} of the pool's {count} can be chosen"
        f"{f' ({why})' if why else ''}. Ask for fewer, or give a larger pool."
    )
