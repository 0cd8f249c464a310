"""The shared part of the adapters: the choice and the order of a prompt's demonstrations.

Contract: options are checked when they are created, before a framework starts. `DemoChooser.choose` returns positions in the
pool, so every framework keeps its own objects. It makes a `Known` for each query, over one pool whose scores, embeddings and word
index are computed once, and `Demonstrator` does the rest. No model of sparsort runs here: scores are computed before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.prompts.types import PromptWriter
from sparsort.scoring.store.scores import Scores

_LOG = logging.getLogger("sparsort")

Embed = Callable[[list[str]], ArrayLike]

# A framework sets the number of demonstrations, and has its own way to name rows.
SELECTORS = Registry(DEMO_SELECTORS.kind, (entry for entry in DEMO_SELECTORS.values() if not entry.names_rows))


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """How demonstrations are chosen and ordered.

    Attributes:
        order: an order of `order_demos`, first to last; the last demonstration is next to the query. None for the hardest first.
        select: a selector of `select_demos`, except those by which the caller names rows.
        scores: difficulties of the pool's rows: a score folder or file (read immediately), a table of scores, a mapping from id,
            or one number per row of the pool.
        score_column: instead of `scores`, the field of a row with its difficulty; higher is harder.
        query_difficulty: a function from the query to its difficulty by the same score, for a selector that needs it.
        embed: a function from N texts to (N, D) embeddings, for the selectors by embedding and the orders by similarity.
            LangChain's `Embeddings.embed_documents` and a `dspy.Embedder` are such functions.
        label: the field with the label, for a selector that needs it; it is not compared with a query.
        prompt: a template, or a function from a row to its prompt; the fields that it reads are the input of a row, by which rows
            and queries are compared and embedded; see `select_demos`.
        text: a function from a demonstration to its text, for the orders by length; by default all text fields except the id, or
            with `prompt` its fields, the label and the answer.
        seed: seed for every random draw; None for the framework's own seed if it has one, otherwise 0.
        missing: what happens to chosen rows without a score; see `order_demos`. "drop" may give fewer demonstrations.
        allow_leaks: whether rows may be chosen that are the query itself, or nearly so.

    Raises:
        SparsortError: an unknown name, scores that are given twice or are unreadable, a missing input of the order or the
            selector, or a setting that the order does not read.
    """

    order: str | None = None
    select: str = DEFAULT_SELECTOR
    scores: ScoresLike | str | Path | None = None
    score_column: str | None = None
    query_difficulty: Callable[[Query], float] | None = None
    embed: Embed | None = None
    label: str | None = None
    prompt: str | PromptWriter | None = None
    text: TextOf | None = None
    seed: int | None = None
    missing: Missing = "error"
    allow_leaks: bool = False

    def __post_init__(self) -> None:
        selector = SELECTORS.check(self.select)
        if self.missing not in get_args(Missing):
            raise unknown_choice("treatment of missing scores", self.missing, get_args(Missing))
        if self.scores is not None and self.score_column is not None:
            raise SparsortError(
                "scores= and score_column= both give the difficulty of a demonstration. Give one of them."
            )
        if isinstance(self.scores, str | Path):
            # The dataclass is frozen, so resolved settings are set through `object`.
            object.__setattr__(self, "scores", Scores.load(self.scores))
        refuse_unread_fields(self, READ_BY)
        kind = self.scores.kind if isinstance(self.scores, DifficultyTable) else None
        if self.order is None:
            object.__setattr__(self, "order", default_order(kind))
        # This call orders nothing, but it checks that the order exists and accepts the scores.
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
        """The name of the order, which may be the default."""
        return str(self.order)

    @property
    def selector(self) -> DemoSelectorEntry:
        """The entry of the selector."""
        return SELECTORS[self.select]

    @property
    def has_scores(self) -> bool:
        """Whether difficulties are given, as scores or as a column."""
        return self.scores is not None or self.score_column is not None

    @property
    def by_similarity(self) -> bool:
        """Whether the order depends on the similarity to the query."""
        return order_entry(self.by_name).ranks_by == "similarity"

    @property
    def by_query(self) -> bool:
        """Whether the choice or the order depends on the query."""
        return self.selector.looks_at_query or self.by_similarity

    @property
    def by_embedding(self) -> bool:
        """Whether the choice or the order reads embeddings."""
        return self.embed is not None and ("embeddings" in self.selector.needs or self.by_similarity)


class DemoChooser:
    """A pool of demonstrations with its scores and embeddings, for many queries.

    Args:
        rows: N rows, in any form that `open_rows` reads.
        options: how to choose and order.
        held_out: rows that will be queries; pool rows that equal one of them, or nearly so, are never chosen, unless
            `options.allow_leaks`.

    Raises:
        SparsortError: a row has no score.
    """

    def __init__(self, rows: Any, options: DemoOptions, *, held_out: Any = ()) -> None:
        self.options = options
        all_rows = [dict(row) for row in rows_of(rows)]
        self._count = len(all_rows)
        if notes := duplicates(all_rows):
            _LOG.warning("the pool of demonstrations: %s", listed([note.removesuffix(".") for note in notes], most=2))
        difficulty = _difficulty(all_rows, options)
        pool = DemoPool(all_rows, prompt=options.prompt, label=options.label)
        queries = () if options.allow_leaks else rows_of(held_out)
        leaking = {leak.demo for query in queries for leak in pool.leaks(pool.input_of(query))}
        self._positions = np.array([at for at in range(len(all_rows)) if at not in leaking], dtype=np.int64)
        if leaking:
            pool = DemoPool((all_rows[at] for at in self._positions), prompt=options.prompt, label=options.label)
        self._pool = pool
        self._difficulty = None if difficulty is None else RowNumbers.of(difficulty[self._positions])
        self._embeddings = RowNumbers(len(pool), lambda at: self._embed([self._input(pool.rows[i]) for i in at]))
        text = options.text
        self._lengths = text and RowNumbers(len(pool), lambda at: [len(text(pool.rows[i])) for i in at])

    def choose(self, query: Query | None, k: int, *, seed: int = 0) -> list[int]:
        """Positions in the pool of k demonstrations, first to last.

        Args:
            query: the query; None if it is not known, so that only `held_out` is checked for leaks.
            k: the number of demonstrations.
            seed: the seed, unless the options have one.

        Raises:
            SparsortError: too few rows remain, or an input is missing; see `select_demos` and `order_demos`.
        """
        options = self.options
        seed = seed if options.seed is None else options.seed
        if k > len(self._positions) < self._count:
            raise SparsortError(
                f"{k} demonstrations were requested, but {self._count - len(self._positions)} of the pool's "
                f"{self._count} rows are in the held-out set too, exactly or nearly, and are excluded. Request fewer, "
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
        """What is known about the pool and a query; embeddings are included only if the selector or the order reads them."""
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
                f"embed= returned an array of shape {embeddings.shape} for {len(texts)} texts; expected one row per text, "
                f"shape ({len(texts)}, D)."
            )
        return embeddings

    def _input(self, query: Query) -> str:
        return "\n".join(self._pool.input_of(query).values())


def _difficulty(rows: Sequence[Row], options: DemoOptions) -> NDArray[np.float64] | None:
    """(N,) difficulties of the rows of the pool; None if the options give none."""
    if options.score_column is None:
        # A path was read when the options were created.
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
