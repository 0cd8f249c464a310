"""The similarity of each pool row to a query: the cosine of embeddings, or BM25 of words.

Contract: a similarity is fp64 or the embeddings' own float type, one for each pool row. Higher is nearer, and ties rank by
position. A row without a usable embedding (not finite, or zero) has NaN, never a plausible number.

Shapes: N pool rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.fingerprints import tokens
from sparsort.errors import SparsortError
from sparsort.extras import need

Floats = NDArray[np.floating[Any]]

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def unit_rows(embeddings: Any, count: int | None = None, *, argument: str = "embeddings") -> Floats:
    """Embeddings scaled to unit length, (N, D); rows that are zero or not finite become NaN.

    Args:
        embeddings: (N, D) numbers; fp16 is widened to fp32.
        count: N, if the caller knows it.
        argument: the name of the caller's argument, for error messages.

    Raises:
        SparsortError: not an (N, D) array of numbers.
    """
    try:
        array = np.asarray(embeddings)
        floats: Floats = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    except (OverflowError, TypeError, ValueError) as error:
        raise SparsortError(f"{argument} must be an array of numbers of shape (N, D): {error}.") from error
    if floats.ndim != 2 or (count is not None and len(floats) != count) or floats.dtype.kind != "f":
        rows = "N" if count is None else count
        raise SparsortError(
            f"{argument} has shape {array.shape} and type {array.dtype}; floats of shape ({rows}, D) are needed."
        )
    # Scaling by the largest entry first keeps the squares of huge or tiny entries within the range of the float. A zero row
    # becomes 0 / 0 = NaN here.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scaled = floats / np.abs(floats).max(axis=1, keepdims=True, initial=0.0)
        unit: Floats = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    # One entry that is not finite makes the whole row unusable.
    unit[~np.isfinite(unit).all(axis=1)] = np.nan
    return unit


def cosine(query: Any, unit_ND: Floats) -> Floats:
    """The cosine similarity of a query embedding, (D,), to unit rows, (N, D): (N,), NaN for rows that are NaN.

    Raises:
        SparsortError: the widths differ, or the query's embedding is zero or not finite.
    """
    query_D = unit_rows(np.asarray(query)[None], argument="query_embedding")[0]
    if query_D.shape != unit_ND.shape[1:]:
        raise SparsortError(
            f"query_embedding has width {query_D.shape[0]}, but embeddings have width {unit_ND.shape[1]}. "
            "Embed the query and the pool with the same model."
        )
    if np.isnan(query_D).any():
        raise SparsortError(
            "query_embedding is zero or not finite, so it has no nearest rows. Embed a query that has text."
        )
    similarity_N: Floats = unit_ND @ query_D
    return similarity_N


def nearest(similarity_N: Floats, k: int) -> NDArray[np.int64]:
    """Positions of the k most similar rows, (k,), the nearest first; ties by position, and NaN last."""
    # A stable sort of the negated numbers gives ties to the earlier row.
    return np.argsort(-similarity_N, kind="stable")[:k].astype(np.int64)


class WordIndex:
    """BM25 over the words of N texts (Robertson and Zaragoza 2009), k1 = 1.5, b = 0.75.

    The idf is that of Lucene, ln(1 + (N − n + ½) / (n + ½)), because the original one of Okapi is negative for a word that
    occurs in more than half of the texts. Words are those of `fingerprints.tokens`: digits and operators count as words, and
    "2 + 3" finds "2+3".

    Args:
        texts: N texts.

    Raises:
        SparsortError: bm25s is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        bm25s = need("bm25s", "retrieval", "the selection method 'bm25'")
        words = [tokens(text) for text in texts]
        self._count = len(texts)
        self._index: Any = None
        # bm25s cannot index texts that have no words at all.
        if any(words):
            self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float64")
            self._index.index(words, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float64]:
        """The BM25 score of each text for a query, (N,); 0 if they share no word."""
        words = tokens(query)
        if self._index is None or not words:
            return np.zeros(self._count)
        return np.asarray(self._index.get_scores(words), dtype=np.float64)


def sentence_embeddings(texts: Sequence[str], model_name: str = SENTENCE_MODEL) -> NDArray[np.float32]:
    """The embeddings of texts by a sentence-transformers model, (N, D), of unit length.

    They are an alternative to the language model's own mean-pooled states, which the recipes use.

    Raises:
        SparsortError: sentence-transformers is not installed, or the model cannot be loaded.
    """
    library = need("sentence_transformers", "retrieval", "sentence embeddings")
    try:
        model = library.SentenceTransformer(model_name)
    except (OSError, ValueError) as error:
        raise SparsortError(
            f"the sentence embedder {model_name!r} cannot be loaded: {error}. Pass a folder, or another name."
        ) from error
    vectors = model.encode(list(texts), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)
