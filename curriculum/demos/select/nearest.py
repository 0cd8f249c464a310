"""The rows that are nearest to the query, by shared words or by embeddings.

Contract: the nearest first, ties by position.
"""

from __future__ import annotations

from sparsort.curriculum.demos.pool import similarity
from sparsort.curriculum.demos.select.candidates import Candidates, Places


def select_nearest(candidates: Candidates) -> Places:
    """The k rows most similar to the query."""
    return similarity.nearest(candidates.near, candidates.k)
