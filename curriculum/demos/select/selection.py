"""One selection: which rows may be chosen, and the k that a selector chooses among them.

Contract: as `demos.select`. What is read of `Known`, in this order: difficulty, the query's difficulty, embeddings, the query's
embedding; each only where the selector needs it, but for embeddings with `own_similarity=False`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.known import Known
from sparsort.curriculum.demos.pool import similarity
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.leaks import Leak
from sparsort.curriculum.demos.select.candidates import Candidates, SelectorEntry, SelectSettings
from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A pool row that could not be chosen: its position, its id and a sentence."""

    position: int
    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen demonstrations.

    Attributes:
        demos: copies of the k rows, in the selector's order.
        indices: their positions in the pool.
        similarity: their similarity to the query (BM25 for a selector that compares words, else cosine where embeddings were
            given), or None;
            `order_demos(selection.demos, order="similarity_ascending", similarity=selection.similarity)` takes it.
        excluded: the rows that could not be chosen, with reasons.
        method: the selector's name.
        notes: duplicates among them, one sentence each; they are kept.
    """

    demos: list[dict[str, Any]]
    indices: list[int]
    similarity: list[float] | None
    excluded: list[Excluded]
    method: str
    notes: list[str] = field(default_factory=list)


def select_rows(known: Known, selector: SelectorEntry, k: int | None, settings: SelectSettings) -> Selection:
    """Choose k demonstrations.

    Args:
        known: the pool, the query, and their numbers.
        selector: an entry of `SELECTORS`.
        k: how many; None for a selector by which the caller names the rows.
        settings: the other settings.

    Raises:
        SparsortError: as `select_demos`.
    """
    pool = known.pool
    wanted = _how_many(k, selector, settings.ids)
    if not 0.0 <= settings.trade_off <= 1.0:
        raise SparsortError(
            f"trade_off is {settings.trade_off}; a number from 0 (all diversity) to 1 (all relevance) is needed."
        )
    if absent := known.lacks(selector.needs):
        raise SparsortError(
            f"the selection method {selector.name!r} needs {' and '.join(f'{name}=' for name in absent)}."
        )
    difficulty = known.difficulty.all if known.difficulty is not None and "scores" in selector.needs else None
    if "query_difficulty" in selector.needs and not np.isfinite(known.query_difficulty):
        raise SparsortError(
            f"query_difficulty is {known.query_difficulty}; the query could not be scored, so it has no level."
        )
    unit, near = _nearness(known, selector, own_similarity=settings.own_similarity)
    excluded = _excluded(known, selector, unit, difficulty, allow_leaks=settings.allow_leaks)
    rows = np.array([position for position in range(len(pool)) if position not in excluded], dtype=np.int64)
    if len(rows) < wanted:
        raise _too_few(wanted, len(pool), excluded)
    candidates = Candidates(
        known=known,
        rows=rows,
        excluded=excluded,
        k=wanted,
        settings=settings,
        near=_at(near, rows),
        unit=_at(unit, rows),
    )
    chosen = rows[selector.function(candidates)].tolist() if wanted else []
    demos = [dict(pool.rows[position]) for position in chosen]
    return Selection(
        demos=demos,
        indices=chosen,
        similarity=None if near is None else [float(near[position]) for position in chosen],
        excluded=[Excluded(position=at, id=pool.ids[at], reason=excluded[at]) for at in sorted(excluded)],
        method=selector.name,
        notes=duplicates(demos),
    )


def _nearness(
    known: Known, selector: SelectorEntry, *, own_similarity: bool
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """The unit embeddings (N, D) and the similarity to the query (N,), each None where it is not read."""
    reads = {"embeddings", "query_embedding"} & (
        selector.needs if own_similarity or selector.compares_words else {"embeddings", "query_embedding"}
    )
    unit = known.unit_embeddings if known.embeddings is not None and "embeddings" in reads else None
    if selector.compares_words:
        return unit, known.word_scores
    if unit is None or "query_embedding" not in reads or known.query_embedding is None:
        return unit, None
    return unit, similarity.cosine(known.query_embedding, unit)


def _excluded(
    known: Known,
    selector: SelectorEntry,
    unit: NDArray[Any] | None,
    difficulty: NDArray[Any] | None,
    *,
    allow_leaks: bool,
) -> dict[int, str]:
    """The positions of the rows that cannot be chosen, with reasons."""
    excluded: dict[int, str] = {}
    if known.query is not None and not allow_leaks:
        excluded |= {leak.demo: _leak_reason(leak) for leak in known.pool.leaks(known.inputs)}
    if unit is not None and "embeddings" in selector.needs:
        for position in np.flatnonzero(np.isnan(unit).any(axis=1)).tolist():
            excluded.setdefault(position, "its embedding is zero or not finite")
    if difficulty is not None:
        for position in np.flatnonzero(np.isnan(difficulty)).tolist():
            excluded.setdefault(position, "it has no score (NaN)")
    return excluded


def _how_many(k: int | None, selector: SelectorEntry, ids: Sequence[Any] | None) -> int:
    if selector.names_rows:
        if ids is None:
            raise SparsortError(
                f"the selection method {selector.name!r} needs ids=, the ids of the demonstrations in the order wanted."
            )
        if k is not None and k != len(ids):
            raise SparsortError(f"k is {k}, but ids= names {len(ids)} demonstrations. Leave k out, or make them agree.")
        return len(ids)
    if k is None or k < 0:
        raise SparsortError(f"k is {k}; say how many demonstrations to choose, 0 or more.")
    return int(k)


def _at(values: NDArray[Any] | None, rows: NDArray[np.int64]) -> NDArray[Any]:
    if values is None:
        return np.empty(0)
    return values if len(rows) == len(values) else values[rows]


def _leak_reason(leak: Leak) -> str:
    what, whose = ("it", "the query") if leak.field is None else (f"its {leak.field!r}", "the query's")
    if leak.kind == "exact":
        return f"{what} is {whose}{' itself' if leak.field is None else ''}"
    return f"{what} nearly is {whose} (similarity {leak.similarity:.2f})"


def _too_few(k: int, count: int, excluded: dict[int, str]) -> SparsortError:
    reasons: dict[str, int] = {}
    for reason in excluded.values():
        short = reason.partition(" (")[0]
        reasons[short] = reasons.get(short, 0) + 1
    why = "; ".join(f"{number} left out because {reason}" for reason, number in reasons.items())
    return SparsortError(
        f"{k} demonstrations were asked for, but only {count - len(excluded)} of the pool's {count} can be chosen"
        f"{f' ({why})' if why else ''}. Ask for fewer, or give a larger pool."
    )
