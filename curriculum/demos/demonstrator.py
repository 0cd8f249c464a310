"""Selects demonstrations for a query, orders them, and assembles the prompt.

Contract: the tables state what a selector or an order needs. If an input of the selector is missing, it is refused by name before
anything is computed; if only an input of the order is missing, before the prompt is assembled. Every demonstration in a prompt
can be traced to its row: `Demonstration.indices` are positions in the pool, first to last.

Shapes: n positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.known import Known, Positions
from sparsort.curriculum.demos.order import Missing, default_order, order_entry, order_indices
from sparsort.curriculum.demos.prompt import Assembled, PromptForm, assemble
from sparsort.curriculum.demos.select import DEFAULT_SELECTOR, SELECTORS, DemoSelectorEntry, SelectedDemos
from sparsort.curriculum.demos.select.candidates import SelectSettings
from sparsort.curriculum.demos.select.selection import select_rows
from sparsort.errors import SparsortError


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstration:
    """Demonstrations in their order, and the prompt.

    Attributes:
        rows: copies of the rows, first to last.
        indices: their positions in the pool.
        prompt: the prompt.
        notes: rows that could not be chosen, demonstrations that the budget dropped, and duplicates, one sentence each.
    """

    rows: list[dict[str, Any]]
    indices: list[int]
    prompt: Assembled
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Demonstrator:
    """A way to select demonstrations, order them and write the prompt.

    Attributes:
        selector: a name in `SELECTORS`.
        order: a name in `ORDERS`, or "reverse:NAME"; None for the hardest first.
        k: number of demonstrations. None means all rows if the selector is the default; a selector by id needs no number.
        seed: seed for every random draw.
        ids: the ids of the rows to show; with these and the default selector, rows are selected by id.
        missing: treatment of rows whose difficulty or similarity is NaN, as in `order_demos`.
        allow_leaks: allow rows that are the query itself or nearly so, in the selection and in the prompt.
        own_similarity: the orders by similarity compute the cosine of the chosen rows' embeddings. By default they use the
            similarity that the selector computed over the pool, which may be that of words.
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
    form: PromptForm = field(default_factory=PromptForm)

    def __post_init__(self) -> None:
        # Names are checked here, before the caller loads a model for the inputs.
        entry = SELECTORS.check(self.selector)
        if self.order is not None:
            order_entry(self.order)
        if self.ids is not None and not entry.names_rows and self.selector != DEFAULT_SELECTOR:
            raise SparsortError(f"ids were given, and select is {self.selector!r}. Pass one of the two.")

    @property
    def selector_entry(self) -> DemoSelectorEntry:
        """The entry of the selector; if ids are given, the selector by id."""
        # No file but that of the table may contain the name of an entry, so the selector by id is found by what it needs.
        return SELECTORS[self.selector if self.ids is None else SELECTORS.needing("ids")[0]]

    def positions(self, known: Known) -> list[int]:
        """Select and order: positions in the pool, first to last.

        Raises:
            SparsortError: as `select_demos` and `order_demos`.
        """
        return self._arranged(known, self.choose(known))

    def choose(self, known: Known) -> SelectedDemos:
        """Select: the demonstrations in the selector's order.

        Raises:
            SparsortError: as `select_demos`.
        """
        if self.k is None and self.ids is None and self.selector == DEFAULT_SELECTOR:
            # All rows, in their own order: the default selector would shuffle them.
            demos = [dict(row) for row in known.pool.rows]
            indices = list(range(len(demos)))
            return SelectedDemos(demos=demos, indices=indices, similarity=None, excluded=[], method=self.selector)
        settings = SelectSettings(
            seed=self.seed, ids=self.ids, allow_leaks=self.allow_leaks, own_similarity=self.own_similarity
        )
        return select_rows(known, self.selector_entry, self.k, settings)

    def arrange(
        self, known: Known, positions: Positions, *, similarity: Sequence[float] | None = None
    ) -> NDArray[np.int64]:
        """The order of the prompt: indices into `positions`, (n,), first to last.

        Args:
            known: the inputs.
            positions: n positions in the pool.
            similarity: (n,) similarities to the query; by default those that are known.

        Raises:
            SparsortError: as `order_demos`.
        """
        order = default_order(known.kind) if self.order is None else self.order
        needs = order_entry(order).needs
        # Each input is read only if the order needs it, since reading it may run a model.
        near = known.similarity_at(positions) if similarity is None and "similarity" in needs else similarity
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

    def demonstrate(
        self, known: Known, selection: SelectedDemos | None = None, *, tokenizer: Any = None
    ) -> Demonstration:
        """Select, order and assemble.

        Args:
            known: the inputs.
            selection: the result of `choose`, if the caller has it.
            tokenizer: as in `assemble`.

        Raises:
            SparsortError: as `select_demos`, `order_demos` and `assemble`.
        """
        if known.query is None:
            raise SparsortError("a prompt ends with the query, and none is known. Pass query= to Known.")
        if selection is None:
            selection = self.choose(known)
        indices = self._arranged(known, selection)
        rows = [dict(known.pool.rows[position]) for position in indices]
        prompt = assemble(rows, known.query, tokenizer=tokenizer, allow_leaks=self.allow_leaks, **vars(self.form))
        excluded = [f"excluded {row.id}: {row.reason}" for row in selection.excluded]
        # The report of a prompt without drops says nothing that needs attention.
        notes = [*excluded, *([prompt.report] if prompt.dropped else []), *prompt.notes]
        return Demonstration(rows=rows, indices=indices, prompt=prompt, notes=notes)

    def _arranged(self, known: Known, selection: SelectedDemos) -> list[int]:
        # None makes `arrange` compute the similarity from the embeddings of the chosen rows.
        similarity = None if self.own_similarity else selection.similarity
        order = self.arrange(known, selection.indices, similarity=similarity)
        return [selection.indices[place] for place in order]
