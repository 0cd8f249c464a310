"""What the adapters share: which demonstrations of a pool stand in a prompt, and in which order.

Contract: options are checked when they are made, before a framework starts. `DemoChooser.choose` gives positions in the
pool, so that every framework keeps its own objects. It makes a `Known` for each query, over one pool whose scores, embeddings
and word index are computed once, and leaves the rest to `Demonstrator`. No sparsort model is run here: scores come in made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.conditions import refuse_unread_fields
from sparsort.curriculum.demos.demonstrator import Demonstrator
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.order import READ_BY, Missing, default_order, order_entry, order_indices
from sparsort.curriculum.demos.pool.difficulty import DifficultyTable, ScoresLike, resolve
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.pool import DemoPool, Query
from sparsort.curriculum.demos.pool.rows import Row, TextOf, listed, name_of
from sparsort.curriculum.demos.select import DEFAULT_SELECTOR, DemoSelectorEntry
from sparsort.curriculum.demos.select import SELECTORS as DEMO_SELECTORS
from sparsort.errors import SparsortError, unknown_choice
from sparsort.registry import Registry
from sparsort.scoring.store.scores import Scores

_LOG = logging.getLogger("sparsort")

Embed = Callable[[list[str]], ArrayLike]

# A framework says how many demonstrations it wants, and has its own way to name them.
SELECTORS = Registry(DEMO_SELECTORS.kind, (entry for entry in DEMO_SELECTORS.values() if not entry.names_rows))


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """How demonstrations are chosen and ordered.

    Attributes:
        order: an order of `order_demos`, first to last; the last is next to the query. None for the hardest first.
        select: a selector of `select_demos`, except one by which the caller names the rows.
        scores: difficulties of the pool's rows: a score folder or file (read at once), a table of scores, a mapping
            from id, or one number a row of the pool.
        score_column: instead, the field of a row that holds its difficulty; higher is harder.
        query_difficulty: a function from the query to its difficulty by the same score, for a selector that needs it.
        embed: a function from N texts to (N, D), for the selectors by embedding and the orders by similarity. LangChain's
            `Embeddings.embed_documents` and a `dspy.Embedder` are such functions.
        label: the field that holds the label, for a selector that needs it; it is not compared to a query.
        prompt: a template whose fields are the input, which a query is compared and embedded by; see `select_demos`.
        text: a demonstration's text, for the orders by length; by default all its text fields but the id.
        seed: of whatever is drawn; None: the framework's own seed where it has one, else 0.
        missing: what happens to chosen rows without a score; see `order_demos`. "drop" gives fewer than were asked for.
        allow_leaks: let rows stand that are the query itself or nearly so.

    Raises:
        SparsortError: an unknown name, scores given twice or unreadable, something that the order or the selector needs and that
            is not given, or a setting that the order does not read.
    """

    order: str | None = None
    select: str = DEFAULT_SELECTOR
    scores: ScoresLike | str | Path | None = None
    score_column: str | None = None
    query_difficulty: Callable[[Query], float] | None = None
    embed: Embed | None = None
    label: str | None = None
    prompt: str | None = None
    text: TextOf | None = None
    seed: int | None = None
    missing: Missing = "error"
    allow_leaks: bool = False

    def __post_init__(self) -> None:
        selector = SELECTORS.check(self.select)
        if self.missing not in get_args(Missing):
            raise unknown_choice("treatment of missing scores", self.missing, get_args(Missing))
        if self.scores is not None and self.score_column is not None:
            raise SparsortError("scores= and score_column= both say how hard a demonstration is. Give one of them.")
        if isinstance(self.scores, str | Path):
            object.__setattr__(self, "scores", Scores.load(self.scores))
        refuse_unread_fields(self, READ_BY)
        kind = self.scores.kind if isinstance(self.scores, DifficultyTable) else None
        if self.order is None:
            object.__setattr__(self, "order", default_order(kind))
        # With nothing to order, this checks that the order exists and goes with the scores.
        order_indices(self.by_name, 0, difficulty=[] if self.has_scores else None, kind=kind, similarity=[], lengths=[])
        if self.by_similarity and self.embed is None and not selector.compares_words:
            by_words = " or ".join(repr(name) for name in SELECTORS.names(lambda entry: entry.compares_words))
            raise SparsortError(
                f"the order {self.order!r} needs embed=, a function from texts to embeddings, or select={by_words}."
            )
        given = {
            "scores": (self.has_scores, "scores= or score_column="),
            "embeddings": (self.embed is not None, "embed="),
            "query_difficulty": (self.query_difficulty is not None, "query_difficulty="),
            "label": (self.label is not None, "label="),
        }
        absent = [option for name, (is_given, option) in given.items() if name in selector.needs and not is_given]
        if absent:
            raise SparsortError(f"the selection method {self.select!r} needs {' and '.join(absent)}.")

    @property
    def by_name(self) -> str:
        """The order, the default's name where none was given."""
        return str(self.order)

    @property
    def selector(self) -> DemoSelectorEntry:
        """The entry of the selector."""
        return SELECTORS[self.select]

    @property
    def has_scores(self) -> bool:
        """Difficulties are given, in one form or the other."""
        return self.scores is not None or self.score_column is not None

    @property
    def by_similarity(self) -> bool:
        """The order is by similarity to the query."""
        return order_entry(self.by_name).ranks_by == "similarity"

    @property
    def by_query(self) -> bool:
        """The choice or the order depends on the query."""
        return self.selector.looks_at_query or self.by_similarity

    @property
    def by_embedding(self) -> bool:
        """The choice or the order reads embeddings."""
        return self.embed is not None and ("embeddings" in self.selector.needs or self.by_similarity)


class DemoChooser:
    """A pool of demonstrations with its scores and embeddings, for many queries.

    Args:
        rows: N rows.
        options: how to choose and order.
        held_out: rows that will be asked; pool rows that are one of them or nearly so are never chosen, unless
            `options.allow_leaks`.

    Raises:
        SparsortError: a row has no score.
    """

    def __init__(self, rows: Iterable[Row], options: DemoOptions, *, held_out: Iterable[Row] = ()) -> None:
        self.options = options
        every = [dict(row) for row in rows]
        self._count = len(every)
        if notes := duplicates(every):
            _LOG.warning("the pool of demonstrations: %s", listed([note.removesuffix(".") for note in notes], most=2))
        difficulty = _difficulty(every, options)
        pool = DemoPool(every, prompt=options.prompt, label=options.label)
        asked = () if options.allow_leaks else held_out
        leaking = {leak.demo for query in asked for leak in pool.leaks(pool.input_of(query))}
        self._positions = np.array([at for at in range(len(every)) if at not in leaking], dtype=np.int64)
        self._pool = (
            DemoPool((every[at] for at in self._positions), prompt=options.prompt, label=options.label)
            if leaking
            else pool
        )
        held = self._pool
        self._difficulty = None if difficulty is None else RowNumbers.of(difficulty[self._positions])
        self._embeddings = RowNumbers(len(held), lambda at: self._embed([self._input(held.rows[i]) for i in at]))
        text = options.text
        self._lengths = text and RowNumbers(len(held), lambda at: [len(text(held.rows[i])) for i in at])

    def choose(self, query: Query | None, k: int, *, seed: int = 0) -> list[int]:
        """Positions in the pool of k demonstrations, first to last.

        Args:
            query: what will be asked, or None where it is not known; then nothing is checked for leaks but `held_out`.
            k: how many.
            seed: where the options name none.

        Raises:
            SparsortError: too few rows left, or an input is missing; see `select_demos` and `order_demos`.
        """
        options = self.options
        seed = seed if options.seed is None else options.seed
        if k > len(self._positions) < self._count:
            raise SparsortError(
                f"{k} demonstrations were asked for, but {self._count - len(self._positions)} of the pool's "
                f"{self._count} rows stand in the held-out set too, exactly or nearly, and are left out. Ask for fewer, "
                "or give a larger pool."
            )
        demonstrator = Demonstrator(
            selector=options.select,
            order=options.order,
            k=k,
            seed=seed,
            missing=options.missing,
            allow_leaks=options.allow_leaks,
        )
        return [int(self._positions[at]) for at in demonstrator.positions(self._known(query))]

    def _known(self, query: Query | None) -> Known:
        """What is known about the pool and a query, with embeddings only where the selector or the order reads them."""
        score, embeds = self.options.query_difficulty, self.options.by_embedding
        return Known(
            self._pool,
            query,
            difficulty=self._difficulty,
            embeddings=self._embeddings if embeds else None,
            query_difficulty=None if score is None or query is None else lambda: score(query),
            query_embedding=None if query is None or not embeds else lambda: self._embed([self._input(query)])[0],
            lengths=self._lengths,
        )

    def _embed(self, texts: list[str]) -> NDArray[Any]:
        embeddings = np.asarray(self.options.embed(texts) if self.options.embed else ())
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise SparsortError(
                f"embed= gave an array of shape {embeddings.shape} for {len(texts)} texts: one row for each was "
                f"expected, shape ({len(texts)}, D)."
            )
        return embeddings

    def _input(self, query: Query) -> str:
        return "\n".join(self._pool.input_of(query).values())


def _difficulty(rows: Sequence[Row], options: DemoOptions) -> NDArray[np.float64] | None:
    """The difficulty of every row of the pool, (N,), None where the options give none."""
    if options.score_column is None:
        # A path was read when the options were made.
        return None if options.scores is None else resolve(cast(ScoresLike, options.scores), rows).values
    column = options.score_column
    if absent := [position for position, row in enumerate(rows) if column not in row]:
        first = absent[0]
        raise SparsortError(
            f"{name_of(rows[first], first)} has no field {column!r}, which score_column= names (of {len(rows)} rows "
            f"{len(absent)} lack it); it has: {', '.join(map(str, rows[first]))}. A row without a score has null there."
        )
    values = [row[column] for row in rows]
    return resolve(values, rows, argument=f"the column {column!r}").values
