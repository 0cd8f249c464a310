"""Runs an ablation: queries the model for every pair of prefix and query that the store lacks.

Contract: the unit of work is one demonstration set. Its orders are stored before it runs, and its outcomes prefix by prefix. A
killed run therefore resumes where it stopped, a recipe with more orders runs only those, and several processes may share a store:
each takes the sets that no other process has claimed. Arms are made later, from the stored outcomes (`results.collect`).

Shapes: Q test queries, N neighbours, W candidate sets of a query, k demonstrations, L labels, P pairs.
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
    DemoSet,
    applies,
    base_order,
    demo_sets,
    probes_of,
    reads_losses,
)
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, looks_at_query
from sparsort.curriculum.ablation.recipe.task_data import SetDemos, TaskData
from sparsort.curriculum.ablation.recipe.tasks import Task
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.run.checks import check_answers, check_context
from sparsort.curriculum.ablation.run.model import Engine, PoolNumbers, SetNumbers
from sparsort.curriculum.ablation.run.probing import probes
from sparsort.curriculum.ablation.store.order_notes import (
    check_note,
    group_name,
    holds_for,
    loss_group,
    neighbour_group,
    order_note,
    orders_of,
    stored_orders,
    zero_shot_group,
)
from sparsort.curriculum.ablation.store.outcomes import Outcomes, Pair
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.curriculum.demos.criteria import criterion
from sparsort.curriculum.demos.criteria.mdl_and_cone import NEIGHBOURS, cone_neighbours, mdl, organisations
from sparsort.curriculum.demos.order import is_reversed
from sparsort.errors import SparsortError
from sparsort.scoring.answers.generation import generate
from sparsort.terminal.interrupts import held

# A block is written once this many outcomes are waiting, so that many prefixes with few queries do not make many small files.
_ROWS_OF_BLOCK = 64

# The two parts of a prompt: the chunks of its prefix, and the query.
PrefixAndQuery = tuple[tuple[str, ...], str]
Predict = Callable[[Task, Sequence[str], Sequence[str], Sequence[Pair]], Outcomes]
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The orders of a set, as stored in its note.

    Attributes:
        random: (R, k) permutations of each query's demonstrations.
        named: orderer → (1, k), or (Q, k) if it depends on the query.
    """

    random: NDArray[np.int64]
    named: dict[str, NDArray[np.int64]]


class AblationRunner:
    """Runs the demonstration sets of an ablation, and stores the outcomes.

    Args:
        ablation: the recipe.
        engine: the model.
        store: the store of the outcomes.

    Raises:
        SparsortError: the data does not fit a task, its answers cannot be judged, or its prompts are too long for the model.
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

    def run_all(self, advance: Advance | None = None) -> list[DemoSet]:
        """Run every set that no other process has claimed, and return the others."""
        claimed = []
        # Zero-shot outcomes come first, so that a study that is stopped early has them.
        for name in self.tasks:
            self.run_zero_shot(name)
        for demo_set in demo_sets(self._ablation):
            if not self.run_set(demo_set):
                claimed.append(demo_set)
            if advance is not None:
                advance(1)
        return claimed

    def run_zero_shot(self, name: str) -> bool:
        """Run a task's queries without demonstrations. False if another process has claimed them."""
        data = self.tasks[name]
        queries = [*data.test_texts, *data.dev_texts, *data.content_free_texts]
        if data.task.is_generation:
            # Generation is expensive, and of its zero-shot outcomes only the features of dev rows are ever read.
            is_read = any("bare_features" in criterion(c).needs for c in self._ablation.choosers)
            queries = data.dev_texts if is_read else []
        group, texts = zero_shot_group(data.task), self._texts[name]
        with self._store.claim(group) as ours:
            if ours:
                with self._recording_cost(group):
                    self._run_missing(name, group, [(texts.prefix([]), texts.query([], text)) for text in queries])
        return ours

    def run_set(self, demo_set: DemoSet) -> bool:
        """Run one demonstration set. False if another process has claimed it."""
        name, data = demo_set.task, self.tasks[demo_set.task]
        group = group_name(data.task, demo_set)
        with self._store.claim(group) as ours:
            if not ours:
                return False
            with self._recording_cost(group):
                set_demos = self._draw(demo_set, group)
                if set_demos is None:
                    return False
                orders = self._orders(demo_set, group, set_demos)
                sampled = self._sampled_probes(demo_set, group, set_demos, orders)
                self._run_missing(name, group, self._required_pairs(data, set_demos, orders, sampled))
                if reads_losses(c for c in self._ablation.choosers if applies(c, data.task, demo_set.selector)):
                    queries = range(len(data.test_texts))
                    prompts = [(query, set_demos.demos(query, order)) for order in orders.random for query in queries]
                    self._run_losses(name, loss_group(data.task, demo_set), prompts)
                # This note marks the set as complete, so it is written last.
                self._note_tokens(name, group, set_demos)
            # The keys and values of this set's prefixes are of no use to the next set.
            self._engine.reader(data.task).trees.forget()
        return True

    def _required_pairs(
        self, data: TaskData, set_demos: SetDemos, orders: Orders, sampled: Sequence[str]
    ) -> Iterator[PrefixAndQuery]:
        """Every prompt that the arms of a set read."""
        for order in orders.random:
            # Criteria read further queries only if all queries share the set.
            others = [*data.dev_texts, *sampled, *data.content_free_texts] if set_demos.fixed else []
            yield from self._pairs_under_order(data, set_demos, order[None], others)
        for order in orders.named.values():
            yield from self._pairs_under_order(data, set_demos, order, data.content_free_texts)

    def _pairs_under_order(
        self, data: TaskData, set_demos: SetDemos, order: NDArray[np.int64], others: Sequence[str]
    ) -> Iterator[PrefixAndQuery]:
        """The test queries under an order, (1, k) or (Q, k), and `others` if all queries share one prefix."""
        texts = self._texts[data.task.name]
        shares_prefix = set_demos.fixed and len(order) == 1
        for query, text in enumerate(data.test_texts):
            demos = set_demos.demos(query, order[0 if len(order) == 1 else query])
            chunks = texts.prefix(demos)
            # Contextual calibration compares under the very same prefix, so a prefix of one query has its own content-free pairs.
            for own in [text] if shares_prefix else [text, *data.content_free_texts]:
                yield chunks, texts.query(demos, own)
        if shares_prefix and others:
            demos = set_demos.demos(0, order[0])
            chunks = texts.prefix(demos)
            for text in others:
                yield chunks, texts.query(demos, text)

    def _run_missing(
        self, name: str, group: str, prompts: Iterable[PrefixAndQuery], predict: Predict | None = None
    ) -> None:
        """Query the model for the prompts whose outcomes the group lacks, prefix by prefix."""
        data, texts = self.tasks[name], self._texts[name]
        pair_of = texts.pair if predict is None else texts.own_pair
        by_pair = {pair_of(chunks, query): (chunks, query) for chunks, query in prompts}
        missing: dict[tuple[str, ...], list[tuple[Pair, str]]] = {}
        for pair in self._store.missing(group, list(by_pair)):
            chunks, query = by_pair[pair]
            missing.setdefault(chunks, []).append((pair, query))
        waiting: list[Outcomes] = []
        try:
            # Sorted prefixes with the same beginning follow each other, so the reader's tree still has their keys and values.
            for chunks in sorted(missing):
                pairs, queries = zip(*missing[chunks], strict=True)
                waiting.append((predict or self._predict_answers)(data.task, chunks, queries, pairs))
                if sum(map(len, waiting)) >= _ROWS_OF_BLOCK:
                    self._write(group, waiting)
        finally:
            # An interrupt keeps what has been computed.
            self._write(group, waiting)

    def _predict_answers(
        self, task: Task, chunks: Sequence[str], queries: Sequence[str], pairs: Sequence[Pair]
    ) -> Outcomes:
        """The outcomes of queries after one prefix: scores of the labels, or generated text."""
        reader = self._engine.reader(task)
        if task.is_generation:
            generated = generate(reader, chunks, queries, max_new_tokens=task.max_new_tokens, stop=task.stop)
            self.tokens_read += generated.tokens_read + generated.tokens_written
            return _outcomes(pairs, np.empty((len(queries), 0)), None, generated.features, generated.texts)
        scored = reader.answers(chunks, queries, self._texts[task.name].answers)
        self.tokens_read += scored.tokens_read
        return _outcomes(pairs, scored.log_p, scored.n_tokens, scored.features)

    def _score_continuations(
        self, task: Task, chunks: Sequence[str], queries: Sequence[str], pairs: Sequence[Pair]
    ) -> Outcomes:
        """The log-probability of each query's own text after one prefix, as outcomes with one label."""
        reader = self._engine.reader(task)
        before = reader.reader.n_tokens
        losses, counts = reader.continuations(chunks, [""] * len(queries), queries)
        self.tokens_read += reader.reader.n_tokens - before
        features = np.full((len(pairs), len(self._engine.feature_names)), np.nan)
        return _outcomes(pairs, -losses[:, None], counts[:, None], features)

    def _sampled_probes(self, demo_set: DemoSet, group: str, set_demos: SetDemos, orders: Orders) -> list[str]:
        """The probes sampled from the model after the random orders; [] if no criterion reads them."""
        ablation, data = self._ablation, self.tasks[demo_set.task]
        usable = [name for name in ablation.choosers if applies(name, data.task, demo_set.selector)]
        if not set_demos.fixed or all(probes_of(c, sampled=ablation.sampled_probes) != "sampled" for c in usable):
            return []
        note = self._store.get_note(group, "probes")
        # There is one probe for each random order, so another number of orders needs other probes.
        if note is None or note["orders"] != len(orders.random):
            reader = self._engine.reader(data.task)
            note = probes(reader, self._texts[demo_set.task], set_demos, orders.random, demo_set.seed)
            self.tokens_read += note["sampling_tokens"]
            self._store.put_note(group, "probes", note | {"orders": len(orders.random)})
        return list(note["texts"])

    def _draw(self, demo_set: DemoSet, group: str) -> SetDemos | None:
        """The set's demonstrations; None if another process is computing what they are chosen by.

        Outcomes about neighbours are stored, so a set that is resumed does not compute them again.
        """
        data, numbers = self.tasks[demo_set.task], self._numbers[demo_set.task]
        if demo_set.selector not in MODEL_SELECTORS:
            return data.draw(demo_set, numbers)
        near_QN = data.nearest(demo_set, numbers, NEIGHBOURS)
        if MODEL_SELECTORS[demo_set.selector].model_scores == "labels":
            return data.demos_at(self._by_mdl(demo_set, group, near_QN))
        neighbours = neighbour_group(data.task, demo_set)
        # Sets with the same seed and another k read the same losses, so these have a group and a claim of their own.
        with self._store.claim(neighbours) as ours:
            return data.demos_at(self._by_cone(demo_set, neighbours, near_QN)) if ours else None

    def _by_cone(self, demo_set: DemoSet, group: str, near_QN: NDArray[np.int64]) -> NDArray[np.int64]:
        """TopK + ConE: the (Q, k) neighbours after which, each alone, a query's own text has the lowest loss."""
        single = self._pool_rows(demo_set, near_QN[:, :, None])
        if not self._texts[demo_set.task].prefix(single[0][1]):
            raise SparsortError(
                f"the chat template of the task {demo_set.task!r} cannot be cut between demonstrations and query, but "
                f"{demo_set.selector!r} reads the query alone. Omit this selector, or chat."
            )
        stored = self._stored_label_scores(group, self._run_losses(demo_set.task, group, single))
        losses_QN = -np.array([log_p[0] for log_p, _ in stored]).reshape(near_QN.shape)
        return np.take_along_axis(near_QN, cone_neighbours(losses_QN, demo_set.k), axis=1)

    def _by_mdl(self, demo_set: DemoSet, group: str, near_QN: NDArray[np.int64]) -> NDArray[np.int64]:
        """TopK + MDL: of W sets of each query's neighbours, the one with the most certain prediction, (Q, k)."""
        data, texts = self.tasks[demo_set.task], self._texts[demo_set.task]
        sets_QWk = organisations(near_QN, demo_set.k, demo_set.seed)
        prompts = [
            (texts.prefix(demos), texts.query(demos, data.test_texts[query]))
            for query, demos in self._pool_rows(demo_set, sets_QWk)
        ]
        self._run_missing(demo_set.task, group, prompts)
        stored = self._stored_label_scores(group, [texts.pair(chunks, query) for chunks, query in prompts])
        # The method is defined with means over a label's tokens, whatever `label_score` is.
        scores = np.array([log_p / n_tokens for log_p, n_tokens in stored])
        best_Q = mdl(scores.reshape(*sets_QWk.shape[:2], -1))
        return sets_QWk[np.arange(len(best_Q)), best_Q]

    def _pool_rows(self, demo_set: DemoSet, sets_QWk: NDArray[np.int64]) -> list[tuple[int, list[Any]]]:
        """(query, demonstrations) for each of the W sets of each query, from (Q, W, k) positions in the pool."""
        rows = self.tasks[demo_set.task].pool.rows
        return [
            (query, [rows[position] for position in positions])
            for query, candidates in enumerate(sets_QWk.tolist())
            for positions in candidates
        ]

    def _stored_label_scores(
        self, group: str, pairs: Sequence[Pair]
    ) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Each pair's log-probabilities and lengths of the labels, (L,) each, from the store."""
        outcomes = self._store.read(group)
        rows = [outcomes.row_of[pair] for pair in pairs]
        return [(outcomes.log_p[row].astype(np.float64), outcomes.n_tokens[row]) for row in rows]

    def _run_losses(self, name: str, group: str, prompts: Sequence[tuple[int, list[Any]]]) -> list[Pair]:
        """Store the losses of test queries' own tokens after demonstrations (ConE, arXiv 2401.12087).

        Args:
            name: the task.
            group: the group of the losses.
            prompts: the numbers of test queries, each with its demonstrations.

        Returns:
            The pair of each prompt.
        """
        data, texts = self.tasks[name], self._texts[name]
        parts = [(texts.prefix(demos), texts.query(demos, data.test_texts[query])) for query, demos in prompts]
        # Without a prefix, the query is the whole prompt and has no loss of its own: the chat template cannot be cut.
        self._run_missing(name, group, [part for part in parts if part[0]], self._score_continuations)
        return [texts.own_pair(chunks, query) for chunks, query in parts]

    @held()
    def _write(self, group: str, waiting: list[Outcomes]) -> None:
        """Write the waiting outcomes as one block, and clear the list."""
        if not waiting:
            return
        # One block per call. `held` delays an interrupt, so that outcomes are not cleared without being written.
        merged = Outcomes(
            **{
                name: np.concatenate([getattr(outcomes, name) for outcomes in waiting])
                for name in ("prefix", "query", "log_p", "n_tokens", "features")
            },
            text=None if waiting[0].text is None else [text for outcomes in waiting for text in outcomes.text or []],
        )
        waiting.clear()
        self._store.write(group, merged)

    def _orders(self, demo_set: DemoSet, group: str, set_demos: SetDemos) -> Orders:
        """The set's orders: those in its note that are valid for this recipe, and new ones for the rest."""
        data = self.tasks[demo_set.task]
        named: dict[str, NDArray[np.int64]] = {}
        if note := stored_orders(self._store, group):
            check_note(note, order_note(self._ablation, data.task, set_demos, {}, data.test_texts), group)
            named = orders_of(note, self._ablation, demo_set, data.test_texts)
        new = [name for name in self._ablation.orderers if name not in named]
        numbers = SetNumbers(set_demos, self._numbers[demo_set.task])
        for name in new:
            is_drawn = base_order(name) == RANDOM_SCORES
            named[name] = _drawn_order(name, demo_set) if is_drawn else numbers.order(name, demo_set.seed)
        # A recipe with fewer test rows must not shorten a note that is also valid for more of them.
        if not note or new or looks_at_query(demo_set.selector) or not holds_for(note, data.test_texts):
            note = order_note(self._ablation, data.task, set_demos, named, data.test_texts)
            self._store.put_note(group, "orders", note)
        random = self._ablation.orders(demo_set.k, demo_set.seed)
        return Orders(random=random, named={name: named[name] for name in self._ablation.orderers})

    @contextlib.contextmanager
    def _recording_cost(self, group: str) -> Iterator[None]:
        """Add the tokens and seconds of the block to the group's cost, also if the block is interrupted."""
        start, before = time.perf_counter(), self.tokens_read
        try:
            yield
        finally:
            self._add_cost(group, self.tokens_read - before, time.perf_counter() - start)

    def _add_cost(self, group: str, tokens: int, seconds: float) -> None:
        """Add to the note of what a group has cost over all runs, except those that were killed, and on which machines."""
        if not tokens:
            return
        spent = self._store.get_note(group, "spent") or {"tokens": 0, "seconds": 0.0}
        machines = sorted({*spent.get("machines", []), self._engine.machine})
        total = {"tokens": spent["tokens"] + tokens, "seconds": spent["seconds"] + seconds, "machines": machines}
        self._store.put_note(group, "spent", total)

    def _note_tokens(self, name: str, group: str, set_demos: SetDemos) -> None:
        """Note lengths in tokens: of each demonstration, and the mean of the test and dev queries."""
        data = self.tasks[name]
        encoder = self._engine.reader(data.task).encoder
        # Tokens that the tokenizer adds to every text, such as BOS.
        special = encoder.count("")

        def mean(texts: Sequence[str]) -> float:
            return float(np.mean([encoder.count(text) - special for text in texts])) if texts else 0.0

        demos = [encoder.count(data.task.demo_text(row) + data.task.separator) - special for row in set_demos.rows]
        tokens = {"demos": demos, "test": mean(data.test_texts), "dev": mean(data.dev_texts)}
        self._store.put_note(group, "tokens", tokens)


def _drawn_order(orderer: str, demo_set: DemoSet) -> NDArray[np.int64]:
    """(1, k): the order by random scores, drawn once for all queries."""
    order = np.random.default_rng([demo_set.seed, demo_set.k]).permutation(demo_set.k)
    return (order[::-1] if is_reversed(orderer) else order)[None].astype(np.int64)


def _outcomes(
    pairs: Sequence[Pair],
    log_p_PL: NDArray[np.float64],
    n_tokens_PL: NDArray[np.int64] | None,
    features_PF: NDArray[np.float64],
    text: list[str] | None = None,
) -> Outcomes:
    # Generated answers have L = 0, so the empty array has no values.
    n_tokens = np.empty(log_p_PL.shape, np.int32) if n_tokens_PL is None else n_tokens_PL.astype(np.int32)
    return Outcomes(
        prefix=np.array([prefix for prefix, _ in pairs]),
        query=np.array([query for _, query in pairs]),
        log_p=log_p_PL.astype(np.float32),
        n_tokens=n_tokens,
        features=features_PF.astype(np.float32),
        text=text,
    )
