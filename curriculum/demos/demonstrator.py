"""Selects demonstrations for a query, orders them, and assembles the prompt.

Contract: the tables list what a selector or an order needs. An input that the selector lacks is refused by name before anything
is computed; one that only the order lacks, before the prompt is assembled. Every line of a prompt leads back to its row:
`Demonstration.indices` are positions in the pool, first to last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.known import Known, Positions
from sparsort.curriculum.demos.order import Missing, default_order, order_entry, order_indices
from sparsort.curriculum.demos.prompt import Assembled, Drop, assemble
from sparsort.curriculum.demos.select import DEFAULT_SELECTOR, SELECTORS, Selection, SelectorEntry
from sparsort.curriculum.demos.select.candidates import SelectSettings
from sparsort.curriculum.demos.select.selection import select_rows
from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """The form of a prompt: the arguments of `assemble` that say how it is written, under the same names."""

    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    system: str | None = None
    separator: str = "\n\n"
    chat: bool = False
    max_tokens: int | None = None
    drop: Drop = "farthest"
    allow_zero_shot: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstration:
    """Demonstrations in their order, and the prompt.

    Attributes:
        rows: copies of the rows, first to last.
        indices: their positions in the pool.
        prompt: the prompt.
        notes: which rows could not be chosen, what a budget dropped, and duplicates in the prompt, one sentence each.
    """

    rows: list[dict[str, Any]]
    indices: list[int]
    prompt: Assembled
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Demonstrator:
    """How demonstrations are selected, ordered and put into a prompt.

    Attributes:
        selector: a name in `SELECTORS`.
        order: a name in `ORDERS`, or "reverse:NAME"; None for the hardest first.
        k: how many; None for all rows with the default selector, and for a selector by which the caller names the rows.
        seed: seed for every random draw.
        ids: the ids of the rows to show; with these and the default selector, rows are selected by id.
        missing: what happens to rows whose difficulty or similarity is NaN, as in `order_demos`.
        allow_leaks: allow rows that are the query itself or nearly so, in the selection and in the prompt.
        own_similarity: the orders by similarity compute their own, by the embeddings of the rows chosen. By default they
            rank by the similarity that the selector computed over the pool, which may be one of words.
        form: the form of the prompt, for `demonstrate`.

    Raises:
        SparsortError: an unknown selector or order.
    """

    selector: str = DEFAULT_SELECTOR
    order: str | None = None
    k: int | None = None
    seed: int = 0
    ids: Sequence[Any] | None = None
    missing: Missing = "error"
    allow_leaks: bool = False
    own_similarity: bool = False
    form: PromptForm = PromptForm()

    def __post_init__(self) -> None:
        entry = SELECTORS.check(self.selector)
        if self.order is not None:
            order_entry(self.order)
        if self.ids is not None and not entry.names_rows and self.selector != DEFAULT_SELECTOR:
            raise SparsortError(f"ids were given, and select is {self.selector!r}. Pass one of the two.")

    @property
    def selector_entry(self) -> SelectorEntry:
        """The entry of the selector, which is the one by id where ids are given."""
        return SELECTORS[self.selector if self.ids is None else SELECTORS.needing("ids")[0]]

    def demonstrate(self, known: Known, *, tokenizer: Any = None) -> Demonstration:
        """Select, order and assemble.

        Args:
            known: the pool, the query, and their numbers.
            tokenizer: as in `assemble`.

        Raises:
            SparsortError: as `select_demos`, `order_demos` and `assemble`.
        """
        return self.present(known, self.choose(known), tokenizer=tokenizer)

    def positions(self, known: Known) -> list[int]:
        """Select and order: positions in the pool, first to last.

        Raises:
            SparsortError: as `select_demos` and `order_demos`.
        """
        return self._arranged(known, self.choose(known))

    def choose(self, known: Known) -> Selection:
        """The demonstrations, in the selector's order.

        Raises:
            SparsortError: as `select_demos`.
        """
        if self.k is None and self.ids is None and self.selector == DEFAULT_SELECTOR:
            demos = [dict(row) for row in known.pool.rows]
            every = list(range(len(demos)))
            return Selection(demos=demos, indices=every, similarity=None, excluded=[], method=self.selector)
        settings = SelectSettings(
            seed=self.seed, ids=self.ids, allow_leaks=self.allow_leaks, own_similarity=self.own_similarity
        )
        return select_rows(known, self.selector_entry, self.k, settings)

    def arrange(
        self, known: Known, positions: Positions, *, similarity: Sequence[float] | None = None
    ) -> NDArray[np.int64]:
        """The order of the prompt: n places among the positions, first to last.

        Args:
            known: the pool, the query, and their numbers.
            positions: n positions in the pool.
            similarity: (n,) their similarity to the query; by default what is known of it.

        Raises:
            SparsortError: as `order_demos`.
        """
        order = default_order(known.kind) if self.order is None else self.order
        needs = order_entry(order).needs
        near = similarity if similarity is not None or "similarity" not in needs else known.similarity_at(positions)
        difficulty = known.difficulty.at(positions) if known.difficulty is not None and "scores" in needs else None
        return order_indices(
            order,
            len(positions),
            difficulty=difficulty,
            kind=known.kind,
            similarity=near,
            lengths=known.lengths.at(positions) if "lengths" in needs else None,
            seed=self.seed,
            missing=self.missing,
            names=[known.pool.ids[position] for position in positions],
        )

    def present(self, known: Known, selection: Selection, *, tokenizer: Any = None) -> Demonstration:
        """Order what `choose` selected, and assemble the prompt.

        Raises:
            SparsortError: as `order_demos` and `assemble`.
        """
        if known.query is None:
            raise SparsortError("a prompt ends with the query, and none is known. Give Known its query=.")
        indices = self._arranged(known, selection)
        rows = [dict(known.pool.rows[position]) for position in indices]
        prompt = assemble(rows, known.query, tokenizer=tokenizer, allow_leaks=self.allow_leaks, **vars(self.form))
        excluded = [f"left out {row.id}: {row.reason}" for row in selection.excluded]
        notes = [*excluded, *([prompt.report] if prompt.dropped else []), *prompt.notes]
        return Demonstration(rows=rows, indices=indices, prompt=prompt, notes=notes)

    def _arranged(self, known: Known, selection: Selection) -> list[int]:
        similarity = None if self.own_similarity else selection.similarity
        places = self.arrange(known, selection.indices, similarity=similarity)
        return [selection.indices[place] for place in places]
