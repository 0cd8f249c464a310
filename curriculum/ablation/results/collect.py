"""From the store to results: every arm of every cell, including criteria and oracles, as look-ups of (prefix, query) pairs.

Contract: no model. A set counts if the outcomes of all its random orders are stored, and an arm if its outcomes are stored for
every set that counts. Everything else is listed in the provenance as "incomplete". Criteria read the dev rows or the sampled
probes, and never a test label. "mdl" and "cone" read the test queries themselves, one by one, without their labels.

Shapes: S demonstration sets, Q test items, N queries, L labels, F features, C content-free queries, R random orders, k
demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import Ablation, DemoSet, applies, demo_sets, probes_of, reads_losses
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.results.cells import Arm, ArmKind, Cell, SetInfo
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.store.order_notes import (
    demos_of,
    group_name,
    loss_group,
    orders_of,
    stored_orders,
    zero_shot_group,
)
from sparsort.curriculum.ablation.store.outcomes import Outcomes, Pair
from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.curriculum.demos.criteria import Evidence, criterion
from sparsort.curriculum.demos.criteria.label_bias import calibrate_contextually
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.scoring.answers.judges import judge_of
from sparsort.scoring.answers.reader import POST_NORM

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Predictions:
    """The outcomes of N queries under one order.

    Attributes:
        log_p: (N, L) label scores, without contextual calibration.
        features: (N, F).
        text: N generated answers, or None.
        content_free: (1, C, L) label scores of content-free queries if all queries share a prefix, else (N, C, L); None if some
            are not stored.
    """

    log_p: Floats
    features: Floats
    text: list[str] | None
    content_free: Floats | None = None

    def scores(self, contextual: bool) -> Floats:
        """(N, L) label scores, with or without contextual calibration."""
        if not contextual or self.content_free is None:
            return self.log_p
        if len(self.content_free) == 1:
            return calibrate_contextually(self.log_p, self.content_free[0])
        return calibrate_contextually(self.log_p[:, None], self.content_free)[:, 0]


class _StoredSet:
    """One demonstration set with its stored outcomes.

    Attributes:
        random: (R, k) random orders.
        under_random: the predictions of the test queries under each random order; empty if the set is incomplete.
        set_demos, named: the demonstrations, and the orderers' orders; only present if the set is complete.
    """

    def __init__(
        self, data: TaskData, texts: Texts, demo_set: DemoSet, store: OutcomeStore, ablation: Ablation
    ) -> None:
        self.data, self.texts, self.demo_set = data, texts, demo_set
        self._ablation = ablation
        group = group_name(data.task, demo_set)
        self.random = ablation.orders(demo_set.k, demo_set.seed)
        self.note: Mapping[str, Any] = stored_orders(store, group) or {}
        self.tokens: Mapping[str, Any] = store.get_note(group, "tokens") or {}
        probes = store.get_note(group, "probes") or {}
        # One probe is sampled after each random order, so a recipe with another number of orders has different probes.
        self.probes: Mapping[str, Any] = probes if probes.get("orders") == len(self.random) else {}
        self._outcomes: Outcomes = store.read(group)
        self.under_random: list[_Predictions] = []
        # The note with the lengths is written last. If it does not match the note with the orders, the set was interrupted
        # under another recipe.
        if not self.note or len(self.tokens.get("demos", ())) != len(self.note["ids"]):
            return
        set_demos = demos_of(self.note, data.pool_by_id, demo_set, data.test_texts)
        if set_demos is None:
            return
        self.set_demos = set_demos
        self.named = orders_of(self.note, ablation, demo_set, data.test_texts)
        predictions = [self.test_predictions(order[None]) for order in self.random]
        stored = [one for one in predictions if one is not None]
        self.under_random = stored if len(stored) == len(predictions) else []

    @property
    def query_tokens(self) -> float:
        """The mean length of the test queries, in tokens."""
        return float(self.tokens["test"])

    @property
    def prefix_tokens(self) -> float:
        """The mean total length of a query's demonstrations, in tokens."""
        lengths = np.asarray(self.tokens["demos"], dtype=np.float64)
        return float(lengths[self.set_demos.of_query].sum(axis=1).mean())

    def test_predictions(self, order: Ints) -> _Predictions | None:
        """The outcomes of the test queries under an order, (1, k) or (Q, k); None if some are not stored."""
        shares_prefix = self.set_demos.fixed and len(order) == 1
        pairs, content_free_pairs = [], []
        for query, text in enumerate(self.data.test_texts):
            demos = self.set_demos.demos(query, order[0 if len(order) == 1 else query])
            chunks = self.texts.prefix(demos)
            # Queries that share a prefix also share its content-free pairs.
            if query == 0 or not shares_prefix:
                free = [self.texts.query(demos, free_text) for free_text in self.data.content_free_texts]
                content_free_pairs.append([self.texts.pair(chunks, free_query) for free_query in free])
            pairs.append(self.texts.pair(chunks, self.texts.query(demos, text)))
        predictions = self._look_up(pairs)
        if predictions is None or not self.data.content_free_texts:
            return predictions
        content_free = [self._look_up(of_prefix) for of_prefix in content_free_pairs]
        stored = [one.log_p for one in content_free if one is not None]
        return replace(predictions, content_free=np.stack(stored) if len(stored) == len(content_free) else None)

    def predictions(self, order: Ints, queries: Sequence[str]) -> _Predictions | None:
        """The outcomes of any queries under an order (k,) of a set that all queries share; None if some are not stored."""
        demos = self.set_demos.demos(0, order)
        chunks = self.texts.prefix(demos)
        return self._look_up([self.texts.pair(chunks, self.texts.query(demos, text)) for text in queries])

    def _look_up(self, pairs: Sequence[Pair]) -> _Predictions | None:
        outcomes = self._outcomes
        rows = [outcomes.row_of.get(pair, -1) for pair in pairs]
        if min(rows, default=-1) < 0:
            return None
        # Outcomes are stored in float32, but sums and differences are computed in float64.
        log_p = outcomes.log_p[rows].astype(np.float64)
        if self._ablation.label_score == "mean" and log_p.size:
            log_p = log_p / outcomes.n_tokens[rows]
        text = None if outcomes.text is None else [outcomes.text[row] for row in rows]
        return _Predictions(log_p=log_p, features=outcomes.features[rows].astype(np.float64), text=text)

    def info(self) -> SetInfo:
        """The description of the set in the results."""
        demos = self.set_demos.demos(0, self.random[0])
        prompt = "".join(self.texts.prefix(demos)) + self.texts.query(demos, self.data.test_texts[0])
        fixed = self.set_demos.fixed
        return SetInfo(
            seed=self.demo_set.seed,
            demo_ids=list(self.note["ids"]) if fixed else [],
            demo_labels=list(self.note["labels"]) if fixed else [],
            demo_tokens=list(self.tokens["demos"]) if fixed else [],
            prompt=prompt,
        )


class Collector:
    """Computes the results of a recipe from a store.

    Args:
        ablation: the recipe.
        store: the outcomes.
        tasks: the recipe's tasks with their rows, by name.
        tokenizer: the tokenizer of the model whose outcomes are in the store.
    """

    def __init__(self, ablation: Ablation, store: OutcomeStore, tasks: Mapping[str, TaskData], tokenizer: Any) -> None:
        self._ablation, self._store, self._tasks = ablation, store, tasks
        self._texts = {name: Texts(data.task, tokenizer) for name, data in tasks.items()}
        self.incomplete: list[str] = []

    def results(self, provenance: Mapping[str, Any]) -> Results:
        """All cells that have at least one complete set.

        Raises:
            SparsortError: there is no such cell.
        """
        cells = []
        for name in self._tasks:
            for selector in self._ablation.selectors:
                for k in self._ablation.shots:
                    cells += self.cells(name, selector, k)
        if not cells:
            raise SparsortError(
                "the store has no complete demonstration set of this recipe. Run 'sparsort ablate' with it until one is done."
            )
        groups = [group_name(self._tasks[demo_set.task].task, demo_set) for demo_set in demo_sets(self._ablation)]
        groups += [zero_shot_group(data.task) for data in self._tasks.values()]
        spent = [self._store.get_note(group, "spent") or {} for group in groups]
        cost = {name: round(sum(note.get(name, 0) for note in spent), 1) for name in ("tokens", "seconds")}
        # Costs noted by an earlier version have no machine.
        machines = sorted({name for note in spent if note for name in note.get("machines", ["not noted"])})
        known = {"machine": ", ".join(machines)} if machines else {}
        return Results(cells=cells, provenance={**provenance, **known, **cost, "incomplete": self.incomplete})

    def cells(self, name: str, selector: str, k: int) -> list[Cell]:
        """The cells of a task, selector and k, without and with contextual calibration."""
        sets = []
        for seed in self._ablation.seeds:
            demo_set = DemoSet(task=name, selector=selector, k=k, seed=seed)
            stored = _StoredSet(self._tasks[name], self._texts[name], demo_set, self._store, self._ablation)
            if stored.under_random:
                sets.append(stored)
            else:
                self.incomplete.append(f"{name}, {selector}, k = {k}, set {seed}")
        if not sets:
            return []
        cells = []
        # Contextual calibration corrects label scores, which generated answers do not have.
        for contextual in (False,) if self._tasks[name].task.is_generation else self._ablation.calibrated:
            if contextual and any(one.content_free is None for stored in sets for one in stored.under_random):
                self.incomplete.append(f"{name}, {selector}, k = {k}: contextual calibration")
                continue
            cells.append(self._cell(name, selector, k, contextual, sets))
        return cells

    def _cell(self, name: str, selector: str, k: int, contextual: bool, sets: Sequence[_StoredSet]) -> Cell:
        data = self._tasks[name]
        random = [
            self._arm(
                "random",
                "random",
                sets,
                [stored.under_random[r] for stored in sets],
                [stored.random[r][None] for stored in sets],
                contextual,
            )
            for r in range(len(sets[0].random))
        ]
        arms = [
            *self._orderer_arms(f"{name}, {selector}, k = {k}", contextual, sets),
            *self._criterion_arms(f"{name}, {selector}, k = {k}", selector, contextual, sets, random),
        ]
        # Ties go to the first random order, for both oracles.
        correct_RS = np.stack([arm.accuracy for arm in random])
        no_cost = np.zeros(len(sets))
        arms.append(_pick("oracle_best", "oracle", random, correct_RS.argmax(axis=0), no_cost))
        arms.append(_pick("oracle_worst", "oracle", random, correct_RS.argmin(axis=0), no_cost))
        by_item = None
        if not sets[0].set_demos.fixed:
            by_item = [
                [[str(demos.rows[place]["id"]) for place in places] for places in demos.of_query]
                for demos in (stored.set_demos for stored in sets)
            ]
        return Cell(
            task=name,
            selector=selector,
            k=k,
            contextual=contextual,
            labels=data.task.label_names(),
            items=[str(row["id"]) for row in data.splits.test],
            gold=data.gold,
            sets=[stored.info() for stored in sets],
            random=random,
            arms=arms,
            demo_ids_of_item=by_item,
            demo_texts={str(row["id"]): data.task.demo_text(row) for stored in sets for row in stored.set_demos.rows},
            item_texts=data.test_texts,
        )

    def _orderer_arms(self, where: str, contextual: bool, sets: Sequence[_StoredSet]) -> list[Arm]:
        """The arms of the orderers that are complete on every set."""
        arms = []
        for orderer in self._ablation.orderers:
            ordered = [stored for stored in sets if orderer in stored.named]
            orders = [stored.named[orderer] for stored in ordered]
            predictions = [stored.test_predictions(order) for stored, order in zip(ordered, orders, strict=True)]
            usable = [
                one for one in predictions if one is not None and (one.content_free is not None or not contextual)
            ]
            if len(usable) == len(sets):
                arms.append(self._arm(orderer, "named", sets, usable, orders, contextual))
            else:
                self.incomplete.append(f"{where}: {orderer} on {len(usable)} of {len(sets)} sets")
        return arms

    def _criterion_arms(
        self, where: str, selector: str, contextual: bool, sets: Sequence[_StoredSet], random: list[Arm]
    ) -> list[Arm]:
        """The arms of the criteria whose evidence is complete on every set."""
        arms = []
        for name in self._ablation.choosers:
            if not applies(name, sets[0].data.task, selector):
                continue
            try:
                arm = self._criterion_arm(name, sets, random, contextual)
            except SparsortError as error:
                # A criterion that fails on this data must not cost the study its other results.
                self.incomplete.append(f"{where}: {name} ({error})")
                continue
            if arm is None:
                self.incomplete.append(f"{where}: {name}")
            else:
                arms.append(arm)
        return arms

    def _arm(
        self,
        name: str,
        kind: ArmKind,
        sets: Sequence[_StoredSet],
        predictions: Sequence[_Predictions],
        orders: Sequence[Ints],
        contextual: bool,
    ) -> Arm:
        data = sets[0].data
        log_p = np.stack([one.scores(contextual) for one in predictions])
        if data.task.is_generation:
            correct = np.stack([_judge(data, one.text, data.gold) for one in predictions])
            predicted = np.full(correct.shape, -1, dtype=np.int64)
        else:
            predicted = log_p.argmax(axis=2)
            correct = predicted == data.gold_index
        n_items = len(data.test_texts)
        shares_order = all(len(order) == 1 for order in orders)
        shares_prefix = shares_order and all(stored.set_demos.fixed for stored in sets)
        n_content_free = len(data.content_free_texts) if contextual else 0
        # A content-free query is about as long as a test query. The prefix and its content-free queries are read only
        # once for all queries that share the prefix.
        tokens = [
            (stored.prefix_tokens + n_content_free * stored.query_tokens) / (n_items if shares_prefix else 1)
            + stored.query_tokens
            for stored in sets
        ]
        by_item = None
        if not shares_order:
            by_item = np.stack([np.broadcast_to(order, (n_items, order.shape[1])) for order in orders])
        return Arm(
            name=name,
            kind=kind,
            order=[order[0].tolist() for order in orders] if shares_order else None,
            log_p=log_p,
            predicted=predicted,
            correct=correct,
            tokens=np.array(tokens),
            choosing_tokens=np.zeros(len(sets)),
            order_of_item=by_item,
        )

    def _criterion_arm(self, name: str, sets: Sequence[_StoredSet], random: list[Arm], contextual: bool) -> Arm | None:
        """The arm of a criterion, which takes one of the random orders of each set; None if its evidence is incomplete."""
        if reads_losses([name]):
            losses = [self._losses(stored) for stored in sets]
            choices = [criterion(name).choose_by_query(Evidence(loss=loss)) for loss in losses if loss is not None]
            if len(choices) < len(sets):
                return None
            arm = _pick_by_query(name, sets, random, np.stack(choices))
            n_items = len(sets[0].data.test_texts)
            prefix_S = np.array([stored.prefix_tokens for stored in sets])
            query_S = np.array([stored.query_tokens for stored in sets])
            # The losses are read under every random order. Answers are then read only under those that some query chose.
            n_orders_S = np.array([len(np.unique(choice)) for choice in choices])
            n_content_free = len(sets[0].data.content_free_texts) if contextual else 0
            return replace(
                arm,
                tokens=n_orders_S * (prefix_S + n_content_free * query_S) / n_items + query_S,
                choosing_tokens=len(random) * (prefix_S + n_items * query_S),
            )
        if criterion(name).chooses != "order":
            # (Q, R, L) for each set: the random orders are the candidates of each query.
            by_set = [np.stack([one.scores(contextual) for one in stored.under_random], axis=1) for stored in sets]
            choice_SQ = np.stack([criterion(name).choose_by_query(Evidence(log_p=log_p)) for log_p in by_set])
            return _pick_by_query(name, sets, random, choice_SQ)
        places, costs = [], []
        for stored in sets:
            gathered = self._evidence(name, stored, contextual)
            if gathered is None:
                return None
            evidence, cost = gathered
            places.append(criterion(name).choose(evidence, seed=stored.demo_set.seed).index)
            costs.append(cost)
        return _pick(name, "chosen", random, np.array(places), np.array(costs))

    def _evidence(self, name: str, stored: _StoredSet, contextual: bool) -> tuple[Evidence, float] | None:
        """What a criterion reads of a set, and its cost in tokens; None if something is not stored."""
        kind = probes_of(name, sampled=self._ablation.sampled_probes)
        scores = [one.content_free[0] for one in stored.under_random if one.content_free is not None]
        content_free = np.stack(scores) if len(scores) == len(stored.random) else None
        if kind == "none":
            # The criterion reads content-free queries only, each about as long as a test query.
            cost = 0.0 if content_free is None else stored.prefix_tokens + content_free.shape[1] * stored.query_tokens
            return Evidence(content_free=content_free), len(stored.random) * cost
        data, sampled = stored.data, kind == "sampled"
        queries = list(stored.probes.get("texts", [])) if sampled else data.dev_texts
        predictions = [stored.predictions(order, queries) for order in stored.random] if queries else []
        probes = [
            replace(one, content_free=of_test.content_free)
            for one, of_test in zip(predictions, stored.under_random, strict=False)
            if one is not None
        ]
        if len(probes) < len(stored.random):
            return None
        gold = data.dev_gold
        log_p_RNL = np.stack([one.scores(contextual) for one in probes])
        if data.task.is_generation and not sampled:
            # Generated answers become two pseudo-labels, wrong and right, so "best_on_dev" can read the judge's verdicts. The
            # probabilities 0.01 and 0.99 keep the logarithms finite.
            golds = [data.task.gold_text(row) for row in data.splits.dev]
            right_RN = np.array([_judge(data, one.text, golds) for one in probes])
            log_p_RNL = np.log(np.stack([1.0 - 0.98 * right_RN - 0.01, 0.98 * right_RN + 0.01], axis=2))
            gold = np.ones(len(golds), dtype=np.int64)
        evidence = Evidence(
            log_p=log_p_RNL,
            gold=None if sampled else gold,
            prior=None if data.task.is_generation else data.label_counts,
            content_free=content_free,
            # Features begin with the metrics of both sites; criteria read the state after the final norm.
            features=np.stack([one.features[:, POST_NORM] for one in probes]),
            bare_features=None if sampled else self._zero_shot_features(data),
            metrics=METRIC_NAMES,
        )
        dev_tokens = float(stored.tokens["dev"])
        query_tokens = float(stored.probes.get("tokens", dev_tokens)) if sampled else dev_tokens
        cost = len(stored.random) * (stored.prefix_tokens + len(queries) * query_tokens)
        return evidence, cost + float(stored.probes.get("sampling_tokens", 0.0) if sampled else 0.0)

    def _zero_shot_features(self, data: TaskData) -> Floats | None:
        """(N, F) features of the dev rows without demonstrations; None if some are not stored."""
        outcomes = self._store.read(zero_shot_group(data.task))
        texts = self._texts[data.task.name]
        pairs = [texts.pair(texts.prefix([]), texts.query([], text)) for text in data.dev_texts]
        rows = [outcomes.row_of.get(pair, -1) for pair in pairs]
        if min(rows, default=-1) < 0:
            return None
        return outcomes.features[rows].astype(np.float64)[:, POST_NORM]

    def _losses(self, stored: _StoredSet) -> Floats | None:
        """(Q, R) loss of each test query's own tokens under every random order; None if some are not stored."""
        outcomes = self._store.read(loss_group(stored.data.task, stored.demo_set))
        rows_QR = np.empty((len(stored.data.test_texts), len(stored.random)), dtype=np.int64)
        for query, text in enumerate(stored.data.test_texts):
            for r, order in enumerate(stored.random):
                demos = stored.set_demos.demos(query, order)
                pair = stored.texts.own_pair(stored.texts.prefix(demos), stored.texts.query(demos, text))
                rows_QR[query, r] = outcomes.row_of.get(pair, -1)
        return -outcomes.log_p[rows_QR, 0].astype(np.float64) if rows_QR.min() >= 0 else None


def _judge(data: TaskData, answers: Sequence[str] | None, golds: Sequence[str]) -> NDArray[np.bool_]:
    """(N,) whether each generated answer is right."""
    judge = judge_of(data.task.judge)
    return np.array([judge(answer, gold).correct for answer, gold in zip(answers or [], golds, strict=True)])


def _pick(name: str, kind: ArmKind, random: list[Arm], place_S: NDArray[Any], choosing_tokens: Floats) -> Arm:
    """The arm that takes the random order `place_S[s]` of each set s."""

    def pick(attribute: str) -> NDArray[Any]:
        values: NDArray[Any] = np.stack([getattr(arm, attribute) for arm in random])[place_S, np.arange(len(place_S))]
        return values

    orders = [random[place].order for place in place_S]
    return Arm(
        name=name,
        kind=kind,
        order=None if any(order is None for order in orders) else [order[s] for s, order in enumerate(orders) if order],
        log_p=pick("log_p"),
        predicted=pick("predicted"),
        correct=pick("correct"),
        tokens=pick("tokens"),
        choosing_tokens=choosing_tokens,
        order_of_item=None if random[0].order_of_item is None else pick("order_of_item"),
    )


def _pick_by_query(name: str, sets: Sequence[_StoredSet], random: list[Arm], choice_SQ: Ints) -> Arm:
    """The arm that takes the random order `choice_SQ[s, q]` of set s for each test query q."""
    n_sets, n_items = choice_SQ.shape

    def pick(attribute: str) -> NDArray[Any]:
        values = np.stack([getattr(arm, attribute) for arm in random])
        return values[choice_SQ, np.arange(n_sets)[:, None], np.arange(n_items)]

    return Arm(
        name=name,
        kind="chosen",
        order=None,
        log_p=pick("log_p"),
        predicted=pick("predicted"),
        correct=pick("correct"),
        # To choose, the query is answered under every random order.
        tokens=np.sum([arm.tokens for arm in random], axis=0),
        choosing_tokens=np.zeros(n_sets),
        order_of_item=np.stack([stored.random[choice_SQ[s]] for s, stored in enumerate(sets)]),
    )
