"""Leaks: queries that are among their own demonstrations, exactly or nearly, so that the prompt contains the answer.

Contract: two texts leak if they are equal once folded (see `fingerprints.tokens`), or if the Jaccard similarity of their word
3-shingles is at least 0.8. Short texts (under 32 tokens) that differ in their numbers or operators are different questions
however similar they look: "What is 2 + 3?" is not "What is 2 + 4?". Only input is compared, never the fixed words of a template
and never the answer. If there are several input fields, all of them must leak, because two questions about the same passage are
two questions. (A pool without a template requires less, see `pool`.) One query, as in `select_demos` and `build_prompt`, is
compared with every text of the pool. Only `find_leaks`, which takes many queries, lets MinHash propose the pairs of a large
set, and it verifies every proposed near-duplicate on the shingles.

MinHash: the share of equal entries in two signatures is an unbiased estimate of the Jaccard similarity of two shingle sets
(Broder 1997). With 32 bands of 5 entries, three in a million pairs of similarity 0.8 are missed, and 7 % of the pairs of
similarity 0.3 are proposed. Signatures are seeded and are the same on every machine.

Shapes: Q queries, N pool texts, P pairs, H hashes of a signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.fingerprints import Fingerprints, Hashes, fingerprints, scramble
from sparsort.errors import SparsortError, unknown_choice

Kind = Literal["exact", "near"]
Search = Literal["auto", "direct", "minhash"]

NEAR = 0.8
SHORT_TOKENS = 32
# Up to this number of pairs, it is faster to count shared shingles than to compute a signature of every text.
_DIRECT_PAIRS = 50_000_000
_BANDS, _BAND_HASHES = 32, 5
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A query that is among the demonstrations.

    Attributes:
        query: position of the query.
        demo: position of the demonstration.
        similarity: Jaccard similarity of their word 3-shingles; 1 for an exact leak.
        kind: "exact" (equal once folded) or "near".
        field: the field that leaks, if the rest of the input does not; None if all of it does.
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
    """The pairs of a query and a pool text that are the same text or nearly so, ordered by query, then by demonstration.

    Args:
        query_texts: input texts of the queries.
        pool_texts: input texts of the demonstrations.
        threshold: the Jaccard similarity from which two texts are near-duplicates, in (0, 1].
        search: "direct" compares every pair. "minhash" compares only the pairs that MinHash proposes; it misses no exact leak,
            and about three in a million near-duplicates of similarity 0.8. "auto" chooses by size.
        seed: seed of MinHash.

    Raises:
        SparsortError: an unknown search, or a threshold outside (0, 1].
    """
    if search not in get_args(Search):
        raise unknown_choice("search", search, get_args(Search))
    if not 0.0 < threshold <= 1.0:
        raise SparsortError(f"the threshold is {threshold}; a Jaccard similarity above 0 and up to 1 is needed.")
    queries, pool = fingerprints(query_texts), fingerprints(pool_texts)
    if search == "minhash" or (search == "auto" and len(queries) * len(pool) > _DIRECT_PAIRS):
        return _leaks_by_minhash(queries, pool, threshold, seed)
    return [
        leak
        for query in range(len(queries))
        for leak in leaks_of([(queries, query, pool)], threshold=threshold, number=query)
    ]


def leaks_of(
    fields: Sequence[tuple[Fingerprints, int, Fingerprints]], *, threshold: float = NEAR, number: int = 0
) -> list[Leak]:
    """The leaks of one query, in the order of the pool.

    Args:
        fields: for every input field, the fingerprints that contain the query's text, its index in them, and the fingerprints
            of the pool's texts. A row leaks if every field leaks in which the row or the query has text.
        threshold: as in `find_leaks`.
        number: position of the query, for the result.
    """
    if not fields:
        return []
    count = len(fields[0][2])
    similarity_N, leaks_N = np.ones(count), np.zeros(count, dtype=bool)
    exact_N, disagrees_N = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    for queries, query, pool in fields:
        jaccard_N = pool.jaccard_with(queries.shingles_of(query))
        # A field that is empty on both sides is no evidence, neither for a leak nor against one.
        blank_N = (pool.n_tokens == 0) & (queries.n_tokens[query] == 0)
        same_N = (pool.exact == queries.exact[query]) & ~blank_N
        near_N = _is_near(queries, np.array([query]), pool, np.arange(count), jaccard_N, threshold)
        disagrees_N |= ~(same_N | near_N | blank_N)
        leaks_N |= same_N | near_N
        exact_N &= same_N | blank_N
        # The least similar field decides how similar the whole input is.
        similarity_N = np.where(blank_N, similarity_N, np.minimum(similarity_N, jaccard_N))
    return [
        Leak(query=number, demo=demo, similarity=float(similarity_N[demo]), kind="exact" if exact_N[demo] else "near")
        for demo in np.flatnonzero(leaks_N & ~disagrees_N).tolist()
    ]


def _is_near(
    queries: Fingerprints,
    query_P: NDArray[np.int64],
    pool: Fingerprints,
    pool_P: NDArray[np.int64],
    jaccard_P: NDArray[np.float64],
    threshold: float,
) -> NDArray[np.bool_]:
    short_P = np.minimum(queries.n_tokens[query_P], pool.n_tokens[pool_P]) < SHORT_TOKENS
    # Only a replaced number or operator makes another question. An added one is often just the number of the question.
    replaced_P = (queries.n_signs[query_P] == pool.n_signs[pool_P]) & (queries.signs[query_P] != pool.signs[pool_P])
    return np.asarray((jaccard_P >= threshold) & ~(short_P & replaced_P), dtype=np.bool_)


def _leaks_by_minhash(queries: Fingerprints, pool: Fingerprints, threshold: float, seed: int) -> list[Leak]:
    pairs = _candidate_pairs(signatures(queries, seed=seed), signatures(pool, seed=seed))
    if not pairs:
        return []
    query_P, pool_P = np.array(pairs, dtype=np.int64).T
    same_P = (queries.exact[query_P] == pool.exact[pool_P]) & (pool.n_tokens[pool_P] > 0)
    jaccard_P = np.array([_jaccard(queries.shingles_of(query), pool.shingles_of(demo)) for query, demo in pairs])
    near_P = _is_near(queries, query_P, pool, pool_P, jaccard_P, threshold)
    return [
        Leak(query=query, demo=demo, similarity=float(jaccard_P[pair]), kind="exact" if same_P[pair] else "near")
        for pair, (query, demo) in enumerate(pairs)
        if same_P[pair] or near_P[pair]
    ]


def signatures(prints: Fingerprints, n_hashes: int = _BANDS * _BAND_HASHES, *, seed: int = 0) -> Hashes:
    """MinHash signatures, (N, H); all entries of a text without shingles are the largest value."""
    keys_H = np.random.default_rng(seed).integers(0, 2**64, size=n_hashes, dtype=np.uint64)
    has_any_N = prints.n_shingles > 0
    # `reduceat` takes the minimum from one start to the next, so texts without shingles must not have a start.
    starts = prints.offsets[:-1][has_any_N]
    signature_NH = np.full((len(prints), n_hashes), _EMPTY, dtype=np.uint64)
    if starts.size:
        for column, key in enumerate(keys_H):
            signature_NH[has_any_N, column] = np.minimum.reduceat(scramble(prints.shingles ^ key), starts)
    return signature_NH


def _candidate_pairs(queries_QH: Hashes, pool_NH: Hashes) -> list[tuple[int, int]]:
    """The pairs (query, pool row) whose signatures agree on a whole band, in ascending order."""
    pairs: set[tuple[int, int]] = set()
    for start in range(0, _BANDS * _BAND_HASHES, _BAND_HASHES):
        band = slice(start, start + _BAND_HASHES)
        query_keys, pool_keys = _band_keys(queries_QH[:, band]), _band_keys(pool_NH[:, band])
        order = np.argsort(query_keys, kind="stable")
        first = np.searchsorted(query_keys[order], pool_keys, "left")
        last = np.searchsorted(query_keys[order], pool_keys, "right")
        for row in np.flatnonzero(last > first).tolist():
            pairs.update((query, row) for query in order[first[row] : last[row]].tolist())
    return sorted(pairs)


def _band_keys(band_NH: Hashes) -> NDArray[np.uint64]:
    """One key for each row of a band. Two keys that collide only cost a verification."""
    keys_N = np.zeros(len(band_NH), dtype=np.uint64)
    for column in range(band_NH.shape[1]):
        keys_N = scramble(keys_N ^ band_NH[:, column])
    return keys_N


def _jaccard(left: Hashes, right: Hashes) -> float:
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(len(left) + len(right) - shared, 1)
