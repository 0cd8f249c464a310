"""Queries that stand among their own demonstrations, exactly or nearly: an answer given away.

Contract: two texts leak when they are equal once folded (see `fingerprints.tokens`), or when the Jaccard similarity of
their word 3-shingles is at least 0.8. Short texts (under 32 tokens) that differ in their numbers or operators are
different questions however alike they look: "What is 2 + 3?" is not "What is 2 + 4?". Only input is compared, never
the constant words of a template nor the answer, and of several input fields every one must leak: two questions about
the same passage are two questions. (A pool that was not told its template asks for less, see `pool`.) One query, as in
`select_demos` and `build_prompt`, is compared with every text of the pool; only `find_leaks`, which takes many queries,
lets MinHash propose the pairs of a large set, and every near-duplicate it reports was verified on the shingles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.fingerprints import Fingerprints, fingerprints
from sparsort.curriculum.demos.pool.minhash import candidates, signatures
from sparsort.errors import SparsortError, unknown_choice

Kind = Literal["exact", "near"]
Search = Literal["auto", "direct", "minhash"]

NEAR = 0.8
SHORT_TOKENS = 32
# Up to here counting shared shingles is faster than signatures of every text; above, MinHash.
_DIRECT_PAIRS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A query that is among the demonstrations.

    Attributes:
        query: position of the query's text.
        demo: position of the demonstration's text.
        similarity: Jaccard similarity of their word 3-shingles; 1 for an exact leak.
        kind: "exact" (equal once folded) or "near".
        field: the one field that leaks, where the rest of the input does not; None where all of it does.
    """

    query: int
    demo: int
    similarity: float
    kind: Kind
    field: str | None = None


def find_leaks(
    query_texts: Sequence[str],
    pool_texts: Sequence[str],
    *,
    threshold: float = NEAR,
    search: Search = "auto",
    seed: int = 0,
) -> list[Leak]:
    """The pairs of a query and a pool text that are the same text or nearly so, ordered by query, then demonstration.

    Args:
        query_texts: the queries' input texts.
        pool_texts: the demonstrations' input texts.
        threshold: Jaccard similarity from which two texts are near-duplicates, in (0, 1].
        search: "direct" compares every pair; "minhash" only those that MinHash proposes, and misses about three
            near-duplicates in a million at a similarity of 0.8 (exact ones never); "auto" chooses by size.
        seed: of MinHash.

    Raises:
        SparsortError: unknown search, or a threshold outside (0, 1].
    """
    if search not in get_args(Search):
        raise unknown_choice("search", search, get_args(Search))
    if not 0.0 < threshold <= 1.0:
        raise SparsortError(f"the threshold is {threshold}; a Jaccard similarity above 0 and up to 1 is needed.")
    queries, pool = fingerprints(query_texts), fingerprints(pool_texts)
    if search == "direct" or (search == "auto" and len(queries) * len(pool) <= _DIRECT_PAIRS):
        found = [
            leak
            for query in range(len(queries))
            for leak in leaks_of([(queries, query, pool)], threshold=threshold, number=query)
        ]
    else:
        found = _by_minhash(queries, pool, threshold, seed)
    return found


def leaks_of(
    fields: Sequence[tuple[Fingerprints, int, Fingerprints]], *, threshold: float = NEAR, number: int = 0
) -> list[Leak]:
    """The pool rows that one query leaks into, in the pool's order.

    Args:
        fields: for every input field the fingerprints that hold the query's text, its index there, and the
            fingerprints of the pool's texts. A row leaks when every field that has text on either side does.
        threshold: as in `find_leaks`.
        number: the query's position, for the result.
    """
    if not fields:
        return []
    count = len(fields[0][2])
    similarity, leaks, exact = np.ones(count), np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    disagrees = np.zeros(count, dtype=bool)
    for queries, query, pool in fields:
        jaccard = pool.jaccard_with(queries.shingles_of(query))
        blank = (pool.n_tokens == 0) & (queries.n_tokens[query] == 0)
        same = (pool.exact == queries.exact[query]) & ~blank
        near = _is_near(queries, np.array([query]), pool, np.arange(count), jaccard, threshold)
        disagrees |= ~(same | near | blank)
        leaks |= same | near
        exact &= same | blank
        similarity = np.where(blank, similarity, np.minimum(similarity, jaccard))
    return [
        Leak(query=number, demo=demo, similarity=float(similarity[demo]), kind="exact" if exact[demo] else "near")
        for demo in np.flatnonzero(leaks & ~disagrees).tolist()
    ]


def _is_near(
    queries: Fingerprints,
    query_P: NDArray[np.int64],
    pool: Fingerprints,
    pool_P: NDArray[np.int64],
    jaccard_P: NDArray[np.float64],
    threshold: float,
) -> NDArray[np.bool_]:
    short = np.minimum(queries.n_tokens[query_P], pool.n_tokens[pool_P]) < SHORT_TOKENS
    # Only a replaced sign tells questions apart; an added one is as likely a number before the question.
    replaced = (queries.n_signs[query_P] == pool.n_signs[pool_P]) & (queries.signs[query_P] != pool.signs[pool_P])
    return np.asarray((jaccard_P >= threshold) & ~(short & replaced), dtype=np.bool_)


def _by_minhash(queries: Fingerprints, pool: Fingerprints, threshold: float, seed: int) -> list[Leak]:
    proposed = candidates(signatures(queries, seed=seed), signatures(pool, seed=seed))
    if not proposed:
        return []
    query_P, pool_P = np.array(proposed, dtype=np.int64).T
    same = (queries.exact[query_P] == pool.exact[pool_P]) & (pool.n_tokens[pool_P] > 0)
    jaccard = np.array([_jaccard(queries, query, pool, demo) for query, demo in proposed])
    near = _is_near(queries, query_P, pool, pool_P, jaccard, threshold)
    return [
        Leak(query=query, demo=demo, similarity=float(jaccard[place]), kind="exact" if same[place] else "near")
        for place, (query, demo) in enumerate(proposed)
        if same[place] or near[place]
    ]


def _jaccard(queries: Fingerprints, query: int, pool: Fingerprints, demo: int) -> float:
    left, right = queries.shingles_of(query), pool.shingles_of(demo)
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(len(left) + len(right) - shared, 1)
