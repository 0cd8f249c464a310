"""Which demonstrations to show: k rows of a pool, with or without a query.

Contract: `SELECTORS` lists the selectors. Each returns exactly k rows or raises, with how many were left and why. Rows that are
the query itself or nearly so are excluded, and so are rows for which the selector has no embedding or score;
`Selection.excluded` lists them. Rows come back in the selector's own order (nearest first, or easy to hard); `order_demos` puts
them in the prompt's. No selector runs a model: embeddings and scores come in as arrays. To add one, write a file with a
function from `Candidates` to places, and add an entry here and its name to `SelectorName`.

Shapes: N pool rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from sparsort.conditions import Table, among, refuse_unread_arguments
from sparsort.curriculum.demos.known import Column, Known
from sparsort.curriculum.demos.pool.difficulty import ScoresLike, resolve
from sparsort.curriculum.demos.pool.pool import DemoPool, Query
from sparsort.curriculum.demos.pool.rows import Row, TextOf
from sparsort.curriculum.demos.select.by_difficulty import select_difficulty_matched, select_spread
from sparsort.curriculum.demos.select.candidates import Candidates, SelectorEntry, SelectSettings
from sparsort.curriculum.demos.select.diverse import select_kdpp, select_mmr, select_vote_k
from sparsort.curriculum.demos.select.named import select_balanced, select_first, select_ids, select_random
from sparsort.curriculum.demos.select.nearest import select_nearest
from sparsort.curriculum.demos.select.selection import Excluded, Selection, select_rows
from sparsort.errors import SparsortError
from sparsort.registry import Registry

__all__ = [
    "DEFAULT_SELECTOR",
    "SELECTORS",
    "Candidates",
    "Excluded",
    "Selection",
    "SelectorEntry",
    "SelectorName",
    "select_demos",
]

SelectorName = Literal[
    "random",
    "ids",
    "first",
    "balanced",
    "bm25",
    "knn",
    "mmr",
    "kdpp",
    "vote_k",
    "spread",
    "difficulty_matched",
]
DEFAULT_SELECTOR: SelectorName = "random"
_NEAR = frozenset({"embeddings", "query_embedding"})

SELECTORS = Registry(
    "selection method",
    (
        SelectorEntry(
            name="random",
            help="rows drawn by the seed",
            source="baseline",
            function=select_random,
            is_seeded=True,
        ),
        SelectorEntry(
            name="ids",
            help="the rows of the ids given, in that order",
            source="the caller",
            needs=frozenset({"ids"}),
            function=select_ids,
        ),
        SelectorEntry(
            name="first",
            help="the first k rows",
            source="baseline",
            function=select_first,
        ),
        SelectorEntry(
            name="balanced",
            help="as many rows of each label as k allows, drawn by the seed",
            source="stratified sampling",
            needs=frozenset({"label"}),
            aliases=("stratified",),
            function=select_balanced,
            is_seeded=True,
        ),
        SelectorEntry(
            name="bm25",
            help="the rows that share most words with the query; rows that share none come last, by position",
            source="Robertson and Zaragoza 2009",
            needs=frozenset({"query"}),
            aliases=("bm25_okapi",),
            function=select_nearest,
        ),
        SelectorEntry(
            name="knn",
            help="the rows nearest to the query by cosine",
            source="KATE, arXiv 2101.06804",
            needs=_NEAR,
            aliases=("topk", "top_k", "kate", "nearest", "similarity"),
            function=select_nearest,
        ),
        SelectorEntry(
            name="mmr",
            help="near the query and unlike one another, among the `fetch` nearest (20)",
            source="maximal marginal relevance, Carbonell and Goldstein 1998",
            needs=_NEAR,
            reads=frozenset({"trade_off", "fetch"}),
            function=select_mmr,
        ),
        SelectorEntry(
            name="kdpp",
            help="the same as mmr by a determinantal point process, among the `fetch` nearest (100)",
            source="CEIL, arXiv 2302.05698",
            needs=_NEAR,
            reads=frozenset({"fetch"}),
            aliases=("dpp", "k_dpp", "ceil"),
            function=select_kdpp,
        ),
        SelectorEntry(
            name="vote_k",
            help="typical of the pool and unlike one another; needs no query",
            source="fast vote-k, arXiv 2209.01975",
            needs=frozenset({"embeddings"}),
            reads=frozenset({"neighbours"}),
            aliases=("votek",),
            function=select_vote_k,
        ),
        SelectorEntry(
            name="spread",
            help=(
                "one row for each difficulty bin, easy to hard: the nearest of each bin where embeddings of pool and query are "
                "given, else one drawn by the seed"
            ),
            source="CDS, arXiv 2411.18126",
            needs=frozenset({"scores"}),
            aliases=("cds",),
            function=select_spread,
            is_seeded=True,
        ),
        SelectorEntry(
            name="difficulty_matched",
            help="near the query and of its own difficulty level or the next",
            source="arXiv 2603.03415",
            needs=_NEAR | {"scores", "query_difficulty"},
            reads=frozenset({"fetch", "n_levels"}),
            function=select_difficulty_matched,
        ),
    ),
)

# The selectors that read a setting; see `sparsort.conditions`. Numbers of the rows and a seed may be given to any selector.
READ_BY: Table = {
    "ids": (among("method", SELECTORS.needing("ids"), of=SELECTORS),),
    **{
        name: (among("method", SELECTORS.reading(name), of=SELECTORS),)
        for name in ("trade_off", "fetch", "n_levels", "neighbours")
    },
}


def select_demos(
    pool: DemoPool | Iterable[Row],
    query: Query | None,
    k: int | None = None,
    *,
    method: str = DEFAULT_SELECTOR,
    seed: int = 0,
    ids: Sequence[Any] | None = None,
    label: str | None = None,
    scores: ScoresLike | None = None,
    query_difficulty: float | None = None,
    embeddings: Any = None,
    query_embedding: Any = None,
    prompt: str | None = None,
    text: TextOf | None = None,
    allow_leaks: bool = False,
    trade_off: float = 0.5,
    fetch: int | None = None,
    n_levels: int = 5,
    neighbours: int = 150,
) -> Selection:
    """Choose k demonstrations from a pool. `SELECTORS` lists the selectors, what each needs, and its source.

    Args:
        pool: the rows, or a `DemoPool`, which keeps from one query to the next what it computes of the rows, and of
            embeddings and scores that are the same objects: unit rows, difficulty, and the graph of "vote_k" where no
            row is left out.
        query: the row that is to be answered, or its bare text; None where the selector needs none, and then nothing is
            checked for leaks.
        k: how many; may be left out for "ids".
        method: a name in `SELECTORS`.
        seed: seed for every random draw.
        ids: for "ids".
        label: the field that holds the label, for "balanced".
        scores: a table of scores, a mapping from id, or N numbers; for "spread" and "difficulty_matched".
        query_difficulty: the query's difficulty by the same score, for "difficulty_matched".
        embeddings: (N, D), in the pool's order.
        query_embedding: (D,).
        prompt: the prompt template: its fields are what the query is compared by. `text`: instead, a function from a
            row to that text. By default the text fields that query and pool share, without id, label and answer; any
            one of three words or more that is the query's then makes a row a leak, as nothing says which is the question.
        allow_leaks: keep rows that are the query itself or nearly so.
        trade_off: λ of "mmr"; 1 is all relevance.
        fetch: how many neighbours "mmr", "kdpp" and "difficulty_matched" look at; never less than k.
        n_levels: how many levels "difficulty_matched" cuts the pool into.
        neighbours: out-degree of the graph of "vote_k".

    Raises:
        SparsortError: unknown method, a missing input (named), a setting that the selector does not read, or fewer rows left than
            asked for.
    """
    selector = SELECTORS.check(method)
    read = {"ids": ids, "trade_off": trade_off, "fetch": fetch, "n_levels": n_levels, "neighbours": neighbours}
    refuse_unread_arguments(select_demos, READ_BY, {"method": method, **read})
    rows = _as_pool(pool, prompt, text, label)
    difficulty = None
    if scores is not None and "scores" in selector.needs:
        difficulty = rows.kept("difficulty", scores, lambda: Column.of(resolve(scores, rows.rows).values))
    known = Known(
        rows,
        query,
        label=label,
        difficulty=difficulty,
        embeddings=None if embeddings is None else Column.of(embeddings),
        query_difficulty=None if query_difficulty is None else lambda: query_difficulty,
        query_embedding=None if query_embedding is None else lambda: query_embedding,
    )
    settings = SelectSettings(
        seed=seed,
        ids=ids,
        allow_leaks=allow_leaks,
        trade_off=trade_off,
        fetch=fetch,
        n_levels=n_levels,
        neighbours=neighbours,
    )
    return select_rows(known, selector, k, settings)


def _as_pool(pool: DemoPool | Iterable[Row], prompt: str | None, text: TextOf | None, label: str | None) -> DemoPool:
    if not isinstance(pool, DemoPool):
        return DemoPool(pool, prompt=prompt, text=text, label=label)
    if prompt is not None or text is not None:
        raise SparsortError(
            "the pool is a DemoPool, which already knows what a query is compared by: give prompt= or text= to it."
        )
    return pool
