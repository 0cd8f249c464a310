"""Runs an ablation: asks the model for every pair of prefix and query that is not in the store yet.

Contract: a unit is one demonstration set. Its orders are written down before it is run, its outcomes prefix by prefix, so a
killed run goes on where it was, a recipe with more orders asks for those alone, and several processes may share a store (each
takes the units that no other has claimed). Nothing is decided here: `collect` makes arms out of what is stored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import (
    RANDOM_SCORES,
    Ablation,
    Unit,
    applies,
    base_order,
    probes_of,
    reads_losses,
    units,
)
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, looks_at_query
from sparsort.curriculum.ablation.recipe.task_data import Showing, TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.run.answer_checks import check_answers
from sparsort.curriculum.ablation.run.context import check_context
from sparsort.curriculum.ablation.run.measured import PoolNumbers, UnitNumbers
from sparsort.curriculum.ablation.run.model import Engine
from sparsort.curriculum.ablation.run.probing import probes
from sparsort.curriculum.ablation.store.keys import bare_group, group_name, loss_group, neighbour_group
from sparsort.curriculum.ablation.store.order_notes import (
    check_note,
    holds_for,
    order_note,
    orders_of,
    stored_orders,
)
from sparsort.curriculum.ablation.store.outcomes import Outcomes
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.curriculum.demos.criteria import criterion
from sparsort.curriculum.demos.criteria.mdl_and_cone import NEIGHBOURS, cone_neighbours, mdl, organisations
from sparsort.curriculum.demos.order import is_reversed
from sparsort.errors import SparsortError
from sparsort.scoring.answers.generation import generate
from sparsort.terminal.interrupts import held

# Outcomes that are written at once, at least, where prefixes are many and their queries few.
_ROWS_OF_BLOCK = 64

Ask = tuple[tuple[str, ...], str]
Answer = Callable[[Task, Sequence[str], Sequence[str], Sequence[tuple[str, str]]], Outcomes]
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The orders of a unit, as they are noted in the store.

    Attributes:
        random: (R, k) permutations of each query's demonstrations.
        named: orderer to (1, k), or (Q, k) where it depends on the query.
    """

    random: NDArray[np.int64]
    named: dict[str, NDArray[np.int64]]


class Run:
    """An ablation under way.

    Args:
        ablation: the recipe.
        engine: the model.
        store: where outcomes go.
    """

    def __init__(self, ablation: Ablation, engine: Engine, store: OutcomeStore) -> None:
        self._ablation, self._engine, self._store = ablation, engine, store
        self.tasks = {task.name: TaskData(task, ablation) for task in ablation.load_tasks()}
        self._texts = {name: Texts(data.task, engine.loaded.tokenizer) for name, data in self.tasks.items()}
        self._numbers = {name: PoolNumbers(data, engine) for name, data in self.tasks.items()}
        self.tokens_read = 0
        for data in self.tasks.values():
            if data.task.is_generation:
                data.notes += check_answers(data.task, data.splits, ablation)
            reader = engine.reader(data.task)
            check_context(ablation, data, self._texts[data.task.name], reader.encoder.count, reader.backbone.max_length)

    def all(self, advance: Advance | None = None) -> list[Unit]:
        """Run every unit that no other process holds; returns those that were left to others."""
        left = []
        for name in self.tasks:
            self.bare(name)
        for unit in units(self._ablation):
            if not self.unit(unit):
                left.append(unit)
            if advance is not None:
                advance(1)
        return left

    def bare(self, name: str) -> bool:
        """Ask the queries without demonstrations; False when another process holds them."""
        data = self.tasks[name]
        queries = [*data.test_texts, *data.dev_texts, *data.task.content_free_texts()]
        if data.task.is_generation:
            # An answer is dear, and only the states of dev rows are read, by some choosers.
            read = any("bare_features" in criterion(chooser).needs for chooser in self._ablation.choosers)
            queries = data.dev_texts if read else []
        group, texts = bare_group(data.task), self._texts[name]
        with self._store.claim(group) as ours:
            if ours:
                with self._spending(group):
                    self._ask(name, group, [(texts.prefix([]), texts.query([], text)) for text in queries])
        return ours

    def unit(self, unit: Unit) -> bool:
        """Run one unit; False when another process holds it."""
        data = self.tasks[unit.task]
        group = group_name(data.task, unit)
        with self._store.claim(group) as ours:
            if not ours:
                return False
            with self._spending(group):
                showing = self._showing(unit, group)
                if showing is None:
                    return False
                orders = self._orders(unit, group, showing)
                probes = self._probes(unit, group, showing, orders)
                self._ask(unit.task, group, list(self._asks(data, showing, orders, probes)))
                if reads_losses(name for name in self._ablation.choosers if applies(name, data.task, unit.selector)):
                    every = [
                        (query, showing.demos(query, order))
                        for order in orders.random
                        for query in range(len(data.test_texts))
                    ]
                    self._ask_losses(unit.task, loss_group(data.task, unit), every)
                self._note_tokens(unit.task, group, showing)
            self._engine.reader(data.task).trees.forget()
        return True

    def _asks(self, data: TaskData, showing: Showing, orders: Orders, probes: Sequence[str]) -> Iterator[Ask]:
        """Every pair that the unit's arms and choosers read."""
        free = data.task.content_free_texts() if not data.task.is_generation else []
        fixed = showing.fixed
        for order in orders.random:
            panel = [*data.dev_texts, *probes, *free] if fixed else []
            yield from self._panel(data, showing, order[None], panel)
        for order in orders.named.values():
            yield from self._panel(data, showing, order, free if fixed and len(order) == 1 else [])

    def _panel(
        self, data: TaskData, showing: Showing, order: NDArray[np.int64], others: Sequence[str]
    ) -> Iterator[Ask]:
        texts = self._texts[data.task.name]
        free = data.task.content_free_texts() if not data.task.is_generation else []
        same = showing.fixed and len(order) == 1
        for query, text in enumerate(data.test_texts):
            demos = showing.demos(query, order[0 if len(order) == 1 else query])
            chunks = texts.prefix(demos)
            # Contextual calibration asks nothing under the very same prompt; a prefix of one query has its own.
            for asked in [text] if same else [text, *free]:
                yield chunks, texts.query(demos, asked)
        if same and others:
            demos = showing.demos(0, order[0])
            chunks = texts.prefix(demos)
            for text in others:
                yield chunks, texts.query(demos, text)

    def _ask(self, name: str, group: str, asks: Iterable[Ask], answer: Answer | None = None) -> None:
        """Ask what the store does not know, prefix by prefix, those that begin alike together."""
        data, texts = self.tasks[name], self._texts[name]
        pair_of = texts.pair if answer is None else texts.own_pair
        by_pair = {pair_of(chunks, query): (chunks, query) for chunks, query in asks}
        missing: dict[tuple[str, ...], list[tuple[tuple[str, str], str]]] = {}
        for pair in self._store.missing(group, list(by_pair)):
            chunks, query = by_pair[pair]
            missing.setdefault(chunks, []).append((pair, query))
        waiting: list[Outcomes] = []
        try:
            for chunks in sorted(missing):
                pairs, queries = zip(*missing[chunks], strict=True)
                waiting.append((answer or self._answer)(data.task, chunks, queries, pairs))
                if sum(map(len, waiting)) >= _ROWS_OF_BLOCK:
                    self._write(group, waiting)
        finally:
            self._write(group, waiting)

    def _answer(
        self, task: Task, chunks: Sequence[str], queries: Sequence[str], pairs: Sequence[tuple[str, str]]
    ) -> Outcomes:
        reader = self._engine.reader(task)
        text = None
        if task.is_generation:
            written = generate(reader, chunks, queries, max_new_tokens=task.max_new_tokens, stop=task.stop)
            self.tokens_read += written.tokens_read + written.tokens_written
            log_p, n_tokens, features, text = np.empty((len(queries), 0)), None, written.features, written.texts
        else:
            found = reader.answers(chunks, queries, self._texts[task.name].answers)
            self.tokens_read += found.tokens_read
            log_p, n_tokens, features = found.log_p, found.n_tokens, found.features
        return _outcomes(pairs, log_p, n_tokens, features, text)

    def _probes(self, unit: Unit, group: str, showing: Showing, orders: Orders) -> list[str]:
        """Queries that the model has sampled behind the random orders, for the choosers that read such."""
        a, data = self._ablation, self.tasks[unit.task]
        wanted = [c for c in a.choosers if applies(c, data.task, unit.selector)]
        if not showing.fixed or not any(probes_of(c, sampled=a.sampled_probes) == "sampled" for c in wanted):
            return []
        note = self._store.get_note(group, "probes")
        if note is None or note["orders"] != len(orders.random):
            reader = self._engine.reader(data.task)
            note = probes(reader, self._texts[unit.task], showing, orders.random, unit.seed)
            self.tokens_read += note["sampling_tokens"]
            self._store.put_note(group, "probes", note | {"orders": len(orders.random)})
        return list(note["texts"])

    def _showing(self, unit: Unit, group: str) -> Showing | None:
        """The unit's demonstrations; None where another process reads what they are chosen by.

        What the model says of neighbours is kept, so that a unit that goes on asks nothing twice.
        """
        data, numbers = self.tasks[unit.task], self._numbers[unit.task]
        if unit.selector not in MODEL_SELECTORS:
            return data.show(unit, numbers)
        near_QN = data.nearest(unit, numbers, NEIGHBOURS)
        if MODEL_SELECTORS[unit.selector].model_scores == "labels":
            return data.shown(self._by_mdl(unit, group, near_QN))
        alone = neighbour_group(data.task, unit)
        # Units of the same seed and another k read the same losses.
        with self._store.claim(alone) as ours:
            return data.shown(self._by_cone(unit, alone, near_QN)) if ours else None

    def _by_cone(self, unit: Unit, group: str, near_QN: NDArray[np.int64]) -> NDArray[np.int64]:
        """TopK + ConE: (Q, k) neighbours behind which, each alone, a query's own text is least surprising."""
        shown = self._pool_rows(unit, near_QN[:, :, None])
        if not self._texts[unit.task].prefix(shown[0][1]):
            raise SparsortError(
                f"the task {unit.task!r} is in a chat template that leaves no query apart from its demonstrations, which "
                "'topk_cone' reads alone. Leave it out, or chat."
            )
        said = self._said(group, self._ask_losses(unit.task, group, shown))
        losses = -np.array([log_p[0] for log_p, _ in said]).reshape(near_QN.shape)
        return np.take_along_axis(near_QN, cone_neighbours(losses, unit.k), axis=1)

    def _by_mdl(self, unit: Unit, group: str, near_QN: NDArray[np.int64]) -> NDArray[np.int64]:
        """TopK + MDL: (Q, k), of some sets of each query's neighbours that under which the prediction is surest."""
        data, texts = self.tasks[unit.task], self._texts[unit.task]
        sets_QWk = organisations(near_QN, unit.k, unit.seed)
        asks = [
            (texts.prefix(demos), texts.query(demos, data.test_texts[query]))
            for query, demos in self._pool_rows(unit, sets_QWk)
        ]
        self._ask(unit.task, group, asks)
        said = self._said(group, [texts.pair(chunks, asked) for chunks, asked in asks])
        # Means over a label's tokens, as the authors have it, whatever the answers' own rule is.
        scores = np.array([log_p / n_tokens for log_p, n_tokens in said])
        best_Q = mdl(scores.reshape(*sets_QWk.shape[:2], -1))
        return sets_QWk[np.arange(len(best_Q)), best_Q]

    def _pool_rows(self, unit: Unit, sets_QWk: NDArray[np.int64]) -> list[tuple[int, list[Any]]]:
        """Every query's number with each of its sets, in order, by (Q, W, k) positions in the pool."""
        rows = self.tasks[unit.task].pool.rows
        return [(query, [rows[place] for place in one]) for query, sets in enumerate(sets_QWk.tolist()) for one in sets]

    def _said(
        self, group: str, pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """The labels' log-probabilities and lengths of each pair, (L,) each, from the store."""
        held = self._store.read(group)
        row = {pair: place for place, pair in enumerate(held.pairs())}
        return [(held.log_p[row[pair]].astype(np.float64), held.n_tokens[row[pair]]) for pair in pairs]

    def _ask_losses(self, name: str, group: str, shown: Sequence[tuple[int, list[Any]]]) -> list[tuple[str, str]]:
        """The loss on test queries' own tokens behind demonstrations (ConE, arXiv 2401.12087), into the store.

        Returns:
            The pair of each number of a test query and its demonstrations in `shown`.
        """
        data, texts = self.tasks[name], self._texts[name]
        asks = [(texts.prefix(demos), texts.query(demos, data.test_texts[query])) for query, demos in shown]
        # A chat template that cannot be cut leaves no query apart from its demonstrations.
        self._ask(name, group, [(chunks, asked) for chunks, asked in asks if chunks], self._lose)
        return [texts.own_pair(chunks, asked) for chunks, asked in asks]

    def _lose(
        self, task: Task, chunks: Sequence[str], queries: Sequence[str], pairs: Sequence[tuple[str, str]]
    ) -> Outcomes:
        reader = self._engine.reader(task)
        before = reader.reader.n_tokens
        losses, counts = reader.continuations(chunks, [""] * len(queries), queries)
        self.tokens_read += reader.reader.n_tokens - before
        features = np.full((len(pairs), len(self._engine.feature_names)), np.nan)
        return _outcomes(pairs, -losses[:, None], counts[:, None], features)

    @held()
    def _write(self, group: str, waiting: list[Outcomes]) -> None:
        if not waiting:
            return
        merged = Outcomes(
            **{
                name: np.concatenate([getattr(outcomes, name) for outcomes in waiting])
                for name in ("prefix", "query", "log_p", "n_tokens", "features")
            },
            text=None if waiting[0].text is None else [text for outcomes in waiting for text in outcomes.text or []],
        )
        waiting.clear()
        self._store.write(group, merged)

    def _orders(self, unit: Unit, group: str, showing: Showing) -> Orders:
        """The unit's orders, from its note as far as it has them."""
        data = self.tasks[unit.task]
        named: dict[str, NDArray[np.int64]] = {}
        if note := stored_orders(self._store, group):
            check_note(note, order_note(self._ablation, data.task, showing, {}, data.test_texts), group)
            named = orders_of(note, self._ablation, unit, data.test_texts)
        lacking = [name for name in self._ablation.orderers if name not in named]
        numbers = UnitNumbers(showing, self._numbers[unit.task])
        for name in lacking:
            drawn = base_order(name) == RANDOM_SCORES
            named[name] = _drawn_order(name, unit) if drawn else numbers.order(name, unit.seed)
        # A recipe with fewer test rows leaves what the note says of the others.
        if not note or lacking or looks_at_query(unit.selector) or not holds_for(note, data.test_texts):
            note = order_note(self._ablation, data.task, showing, named, data.test_texts)
            self._store.put_note(group, "orders", note)
        random = self._ablation.orders(unit.k, unit.seed)
        return Orders(random=random, named={name: named[name] for name in self._ablation.orderers})

    @contextlib.contextmanager
    def _spending(self, group: str) -> Iterator[None]:
        """What is read inside is noted as the group's cost, also where it is stopped."""
        start, before = time.perf_counter(), self.tokens_read
        try:
            yield
        finally:
            self._note_spent(group, self.tokens_read - before, time.perf_counter() - start)

    def _note_spent(self, group: str, tokens: int, seconds: float) -> None:
        """Add to what the group has cost over all runs, but for those that were killed outright, and on which machines."""
        if not tokens:
            return
        spent = self._store.get_note(group, "spent") or {"tokens": 0, "seconds": 0.0}
        machines = sorted({*spent.get("machines", []), self._engine.machine})
        total = {"tokens": spent["tokens"] + tokens, "seconds": spent["seconds"] + seconds, "machines": machines}
        self._store.put_note(group, "spent", total)

    def _note_tokens(self, name: str, group: str, showing: Showing) -> None:
        """Note lengths in tokens: of each demonstration, and on average of the queries of each kind."""
        data = self.tasks[name]
        encoder = self._engine.reader(data.task).encoder
        lead = encoder.count("")

        def mean(texts: Sequence[str]) -> float:
            return float(np.mean([encoder.count(text) - lead for text in texts])) if texts else 0.0

        demos = [encoder.count(data.task.demo_text(row) + data.task.separator) - lead for row in showing.rows]
        tokens = {"demos": demos, "test": mean(data.test_texts), "dev": mean(data.dev_texts)}
        self._store.put_note(group, "tokens", tokens)


def _drawn_order(orderer: str, unit: Unit) -> NDArray[np.int64]:
    """(1, k): the order by scores that mean nothing, drawn once for all queries."""
    order = np.random.default_rng([unit.seed, unit.k]).permutation(unit.k)
    return (order[::-1] if is_reversed(orderer) else order)[None].astype(np.int64)


def _outcomes(
    pairs: Sequence[tuple[str, str]],
    log_p: NDArray[np.float64],
    n_tokens: NDArray[np.int64] | None,
    features: NDArray[np.float64],
    text: list[str] | None = None,
) -> Outcomes:
    return Outcomes(
        prefix=np.array([pair[0] for pair in pairs]),
        query=np.array([pair[1] for pair in pairs]),
        log_p=log_p.astype(np.float32),
        n_tokens=np.empty(log_p.shape, np.int32) if n_tokens is None else n_tokens.astype(np.int32),
        features=features.astype(np.float32),
        text=text,
    )
