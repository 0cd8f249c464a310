"""Which demonstrations to show: k rows of a pool, with or without a query.

Contract: `SELECTORS` lists the selectors. Each returns exactly k rows or raises, with how many were left and why. Rows that are
the query itself or nearly so are excluded, and so are rows for which the selector has no embedding or score;
`Selection.excluded` lists them. Rows come back in the selector's own order (nearest first, or easy to hard); `order_demos` puts
them in the prompt's. No selector runs a model: embeddings and scores come in as arrays. To add one, write a file with a
function from `Candidates` to places, and add an entry here and its name to `SelectorName`.

Shapes: N pool rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsort.conditions import Table, among, refuse_unread_arguments
from sparsort.curriculum.demos import similarity
from sparsort.curriculum.demos.difficulty import ScoresLike, resolve
from sparsort.curriculum.demos.duplicates import duplicates
from sparsort.curriculum.demos.leaks import Leak
from sparsort.curriculum.demos.pool import DemoPool, InputTexts, Query
from sparsort.curriculum.demos.rows import Row, TextOf
from sparsort.curriculum.demos.select.by_difficulty import select_difficulty_matched, select_spread
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.curriculum.demos.select.diverse import select_kdpp, select_mmr, select_vote_k
from sparsort.curriculum.demos.select.named import select_balanced, select_first, select_ids, select_random
from sparsort.curriculum.demos.select.nearest import select_nearest
from sparsort.errors import SparsortError
from sparsort.registry import Entry, Registry

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
_OF_QUERY = frozenset({"query", "query_embedding", "query_difficulty"})


@dataclass(frozen=True, kw_only=True)
class SelectorEntry(Entry):
    """One selector. `needs` names the arguments of `select_demos` that it cannot do without, `reads` the settings that it reads.

    Attributes:
        function: from the rows that may be chosen to places among them.
        is_seeded: whether a seed changes what it chooses.
    """

    function: Callable[[Candidates], Places]
    is_seeded: bool = False

    @property
    def looks_at_query(self) -> bool:
        """Whether it chooses for each query, rather than one set for all."""
        return not self.needs.isdisjoint(_OF_QUERY)

    @property
    def compares_words(self) -> bool:
        """Whether similarity is that of words, and not of embeddings."""
        return "query" in self.needs

    @property
    def names_rows(self) -> bool:
        """Whether the caller names the rows, and with them how many."""
        return "ids" in self.needs


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
            help="the same by a determinantal point process, among the `fetch` nearest (100)",
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
    shop = _as_pool(pool, prompt, text, label)
    label = label or shop.label
    wanted = _how_many(k, selector, ids)
    if not 0.0 <= trade_off <= 1.0:
        raise SparsortError(
            f"trade_off is {trade_off}; a number from 0 (all diversity) to 1 (all relevance) is needed."
        )
    _need(
        selector,
        {
            "query": query,
            "embeddings": embeddings,
            "query_embedding": query_embedding,
            "scores": scores,
            "query_difficulty": query_difficulty,
            "label": label,
        },
    )
    if query_difficulty is not None and not np.isfinite(query_difficulty):
        raise SparsortError(
            f"query_difficulty is {query_difficulty}; the query could not be scored, so it has no level."
        )

    inputs = None if query is None or (allow_leaks and not selector.compares_words) else shop.input_of(query)
    unit = (
        None
        if embeddings is None
        else shop.kept("unit", embeddings, lambda: similarity.unit_rows(embeddings, len(shop)))
    )
    near = _nearness(selector, shop, inputs, unit, query_embedding)
    difficulty = (
        shop.kept("difficulty", scores, lambda: resolve(scores, shop.rows).values)
        if scores is not None and "scores" in selector.needs
        else None
    )

    excluded: dict[int, str] = {}
    if inputs is not None and not allow_leaks:
        excluded |= {leak.demo: _leak_reason(leak) for leak in shop.leaks(inputs)}
    if unit is not None and "embeddings" in selector.needs:
        for position in np.flatnonzero(np.isnan(unit).any(axis=1)).tolist():
            excluded.setdefault(position, "its embedding is zero or not finite")
    if difficulty is not None:
        for position in np.flatnonzero(np.isnan(difficulty)).tolist():
            excluded.setdefault(position, "it has no score (NaN)")
    rows = np.array([position for position in range(len(shop)) if position not in excluded], dtype=np.int64)
    if len(rows) < wanted:
        raise _too_few(wanted, len(shop), excluded)

    candidates = Candidates(
        pool=shop,
        rows=rows,
        k=wanted,
        seed=seed,
        excluded=excluded,
        ids=tuple(ids or ()),
        label=label or "",
        near=_at(near, rows),
        unit=_at(unit, rows),
        difficulty=_at(difficulty, rows),
        query_difficulty=float("nan") if query_difficulty is None else float(query_difficulty),
        trade_off=trade_off,
        fetch=fetch,
        n_levels=n_levels,
        neighbours=neighbours,
    )
    chosen = rows[selector.function(candidates)].tolist() if wanted else []
    demos = [dict(shop.rows[position]) for position in chosen]
    return Selection(
        demos=demos,
        indices=chosen,
        similarity=None if near is None else [float(near[position]) for position in chosen],
        excluded=[Excluded(position=at, id=shop.ids[at], reason=excluded[at]) for at in sorted(excluded)],
        method=method,
        notes=duplicates(demos),
    )


def _as_pool(pool: DemoPool | Iterable[Row], prompt: str | None, text: TextOf | None, label: str | None) -> DemoPool:
    if not isinstance(pool, DemoPool):
        return DemoPool(pool, prompt=prompt, text=text, label=label)
    if prompt is not None or text is not None:
        raise SparsortError(
            "the pool is a DemoPool, which already knows what a query is compared by: give prompt= or text= to it."
        )
    return pool


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


def _need(selector: SelectorEntry, inputs: dict[str, object]) -> None:
    absent = [name for name, value in inputs.items() if name in selector.needs and value is None]
    if absent:
        raise SparsortError(
            f"the selection method {selector.name!r} needs {' and '.join(f'{name}=' for name in absent)}."
        )


def _nearness(
    selector: SelectorEntry, pool: DemoPool, inputs: InputTexts | None, unit: NDArray[Any] | None, query_embedding: Any
) -> NDArray[Any] | None:
    if selector.compares_words and inputs is not None:
        scores: NDArray[Any] = pool.word_scores(inputs)
        return scores
    if unit is not None and query_embedding is not None:
        return similarity.cosine(query_embedding, unit)
    return None


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
