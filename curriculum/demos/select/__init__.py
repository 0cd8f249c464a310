"""Selection of demonstrations: k rows of a pool, with or without a query.

Contract: `SELECTORS` lists the selectors. Each returns exactly k rows, or raises an error that says how many rows could be chosen
and why not more. Rows that are the query itself or nearly so are excluded, and so are rows without the embedding or score that
the selector needs; `SelectedDemos.excluded` lists them. Rows are returned in the selector's own order (the nearest first, or easy
to hard); `order_demos` arranges them for the prompt. No selector runs a model: the caller passes embeddings and scores as arrays.
To add a selector, write a file with a function from `Candidates` to indices, and add an entry here and its name to
`SelectorName`.

Shapes: N pool rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sparsort.conditions import Table, among, refuse_unread_arguments
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.pool.difficulty import ScoresLike, resolve
from sparsort.curriculum.demos.pool.pool import DemoPool, Query
from sparsort.curriculum.demos.pool.rows import TextOf
from sparsort.curriculum.demos.select.candidates import Candidates, DemoSelectorEntry, SelectSettings
from sparsort.curriculum.demos.select.selection import Excluded, SelectedDemos, select_rows
from sparsort.curriculum.demos.select.selectors import (
    select_balanced,
    select_difficulty_matched,
    select_first,
    select_ids,
    select_kdpp,
    select_mmr,
    select_nearest,
    select_random,
    select_spread,
    select_vote_k,
)
from sparsort.errors import SparsortError
from sparsort.registry import Registry
from sparsort.scoring.prompts.types import PromptWriter

__all__ = [
    "DEFAULT_SELECTOR",
    "SELECTORS",
    "SHARED_PROMPT_SELECTORS",
    "Candidates",
    "DemoSelectorEntry",
    "Excluded",
    "SelectedDemos",
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
# The inputs of a cosine similarity to the query.
_NEAR = frozenset({"embeddings", "query_embedding"})

SELECTORS = Registry(
    "selection method",
    (
        # Selectors that do not compare texts.
        DemoSelectorEntry(
            name="random",
            help="rows drawn at random from the seed",
            source="baseline",
            function=select_random,
            is_seeded=True,
        ),
        DemoSelectorEntry(
            name="ids",
            help="the rows with the given ids, in their order",
            source="the caller",
            needs=frozenset({"ids"}),
            function=select_ids,
        ),
        DemoSelectorEntry(
            name="first",
            help="the first k rows",
            source="baseline",
            function=select_first,
        ),
        DemoSelectorEntry(
            name="balanced",
            help="an equal share of each label, drawn at random from the seed",
            source="stratified sampling",
            needs=frozenset({"label"}),
            aliases=("stratified",),
            function=select_balanced,
            is_seeded=True,
        ),
        # Selectors by similarity to the query or among the rows.
        DemoSelectorEntry(
            name="bm25",
            help="the rows that share most words with the query; rows that share none come last, by position",
            source="Robertson and Zaragoza 2009",
            needs=frozenset({"query"}),
            aliases=("bm25_okapi",),
            function=select_nearest,
        ),
        DemoSelectorEntry(
            name="knn",
            help="the rows nearest to the query by cosine",
            source="KATE, arXiv 2101.06804",
            needs=_NEAR,
            aliases=("topk", "top_k", "kate", "nearest", "similarity"),
            function=select_nearest,
        ),
        DemoSelectorEntry(
            name="mmr",
            help="rows near the query and unlike one another, among the `fetch` nearest (20)",
            source="maximal marginal relevance, Carbonell and Goldstein 1998",
            needs=_NEAR,
            reads=frozenset({"trade_off", "fetch"}),
            function=select_mmr,
        ),
        DemoSelectorEntry(
            name="kdpp",
            help="the same as mmr by a determinantal point process, among the `fetch` nearest (100)",
            source="CEIL, arXiv 2302.05698",
            needs=_NEAR,
            reads=frozenset({"fetch"}),
            aliases=("dpp", "k_dpp", "ceil"),
            function=select_kdpp,
        ),
        DemoSelectorEntry(
            name="vote_k",
            help="rows typical of the pool and unlike one another; needs no query",
            source="fast vote-k, arXiv 2209.01975",
            needs=frozenset({"embeddings"}),
            reads=frozenset({"neighbours"}),
            aliases=("votek",),
            function=select_vote_k,
        ),
        # Selectors by difficulty.
        DemoSelectorEntry(
            name="spread",
            help=(
                "one row of each difficulty bin, easy to hard: the nearest if embeddings of the pool and the query are given, "
                "or else one drawn at random from the seed"
            ),
            source="CDS, arXiv 2411.18126",
            needs=frozenset({"scores"}),
            aliases=("cds",),
            function=select_spread,
            is_seeded=True,
        ),
        DemoSelectorEntry(
            name="difficulty_matched",
            help="rows near the query and of its own difficulty level or the next",
            source="arXiv 2603.03415",
            needs=_NEAR | {"scores", "query_difficulty"},
            reads=frozenset({"fetch", "n_levels"}),
            function=select_difficulty_matched,
        ),
    ),
)

# The conditions under which a selector reads a setting; see `sparsort.conditions`. Scores, embeddings and a seed are not checked:
# they may be passed to a selector that does not read them.
READ_BY: Table = {
    "ids": (among("method", SELECTORS.needing("ids"), of=SELECTORS),),
    **{
        name: (among("method", SELECTORS.reading(name), of=SELECTORS),)
        for name in ("trade_off", "fetch", "n_levels", "neighbours")
    },
}
# The selectors that read only the rows and their labels. All queries can therefore share one prompt.
SHARED_PROMPT_SELECTORS = Registry(SELECTORS.kind, (entry for entry in SELECTORS.values() if entry.needs <= {"label"}))


def select_demos(
    pool: Any,
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
    prompt: str | PromptWriter | None = None,
    text: TextOf | None = None,
    allow_leaks: bool = False,
    trade_off: float = 0.5,
    fetch: int | None = None,
    n_levels: int = 5,
    neighbours: int = 150,
) -> SelectedDemos:
    """Choose k demonstrations from a pool. `SELECTORS` lists the selectors, what each needs, and its source.

    Args:
        pool: the rows, in any form that `open_rows` reads, or a `DemoPool`, which keeps results from one query to the next.
        query: the row to be answered, or its bare text. None if the selector needs no query; leaks are then not checked.
        k: number of demonstrations; may be omitted for "ids".
        method: a name in `SELECTORS`.
        seed: seed for every random draw.
        ids: the ids of the rows, for "ids".
        label: the field that contains the label, for "balanced".
        scores: a table of scores, a mapping from id, or N numbers; for "spread" and "difficulty_matched".
        query_difficulty: the query's difficulty by the same score, for "difficulty_matched".
        embeddings: (N, D), in the pool's order.
        query_embedding: (D,).
        prompt: the prompt template, or a function that writes it; rows are compared with the query by the fields that it reads.
        text: alternatively, a function from a row to the text by which it is compared. Without either, see `DemoPool`.
        allow_leaks: allow rows that are the query itself or nearly so.
        trade_off: λ of "mmr"; 1 considers relevance only.
        fetch: number of neighbours among which "mmr", "kdpp" and "difficulty_matched" choose; at least k.
        n_levels: number of levels into which "difficulty_matched" divides the pool.
        neighbours: neighbours of each row in the graph of "vote_k".

    Raises:
        SparsortError: an unknown method, a missing input, a setting that the selector does not read, or too few rows.
    """
    selector = SELECTORS.check(method)
    own: Any = {"ids": ids, "trade_off": trade_off, "fetch": fetch, "n_levels": n_levels, "neighbours": neighbours}
    refuse_unread_arguments(select_demos, READ_BY, {"method": method, **own})
    rows = _as_pool(pool, prompt, text, label)
    known = Known(
        rows,
        query,
        label=label,
        difficulty=_difficulty(rows, scores, selector),
        embeddings=None if embeddings is None else RowNumbers.of(embeddings),
        query_difficulty=None if query_difficulty is None else lambda: query_difficulty,
        query_embedding=None if query_embedding is None else lambda: query_embedding,
    )
    return select_rows(known, selector, k, SelectSettings(seed=seed, allow_leaks=allow_leaks, **own))


def _difficulty(pool: DemoPool, scores: ScoresLike | None, selector: DemoSelectorEntry) -> RowNumbers | None:
    # Scores that the selector does not read are not checked, so that one call can pass the same inputs to every selector.
    if scores is None or "scores" not in selector.needs:
        return None
    return pool.cached("difficulty", scores, lambda: RowNumbers.of(resolve(scores, pool.rows).values))


def _as_pool(pool: Any, prompt: str | PromptWriter | None, text: TextOf | None, label: str | None) -> DemoPool:
    if not isinstance(pool, DemoPool):
        return DemoPool(pool, prompt=prompt, text=text, label=label)
    if prompt is not None or text is not None:
        raise SparsortError(
            "the pool is a DemoPool, which was made with its own way to compare rows: pass prompt= or text= to DemoPool."
        )
    return pool
