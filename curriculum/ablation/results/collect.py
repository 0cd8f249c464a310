"""From the store to results: every arm of every cell as look-ups of (prefix, query) pairs, choosers and oracles included.

Contract: no model. A set counts once all of its random orders are in the store, and an arm where it is complete on every set
that counts; what is left out is said in the provenance ("incomplete"). Choosers see the dev rows or the sampled probes,
never a test label; "mdl" sees the test queries themselves, one by one, without their labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import Ablation, Unit, applies, probes_of, reads_losses, units
from sparsort.curriculum.ablation.recipe.task_data import Showing, TaskData
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.results.cells import Arm, ArmKind, Group, SetInfo
from sparsort.curriculum.ablation.results.results import Results
from sparsort.curriculum.ablation.store.keys import bare_group, group_name, loss_group
from sparsort.curriculum.ablation.store.order_notes import orders_of, showing_of, stored_orders
from sparsort.curriculum.ablation.store.outcomes import Outcomes
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
class _Read:
    """What one order said on a panel: (N, L) label scores, (N, F) features, N texts; (1 or N, C, L) on content-free inputs."""

    log_p: Floats
    features: Floats
    text: list[str] | None
    content_free: Floats | None


class _Set:
    """One demonstration set as the store has it."""

    def __init__(self, data: TaskData, texts: Texts, unit: Unit, store: OutcomeStore, ablation: Ablation) -> None:
        self.data, self.texts, self.unit = data, texts, unit
        self._ablation = ablation
        group = group_name(data.task, unit)
        note = stored_orders(store, group)
        self.note: Mapping[str, Any] = note or {}
        self.tokens: Mapping[str, Any] = store.get_note(group, "tokens") or {}
        probes = store.get_note(group, "probes") or {}
        # One is sampled behind every random order: those of a recipe with more or fewer orders are others.
        self.random = ablation.orders(unit.k, unit.seed)
        self.probes: Mapping[str, Any] = probes if probes.get("orders") == len(self.random) else {}
        self._outcomes: Outcomes = store.read(group)
        self._row = {pair: row for row, pair in enumerate(self._outcomes.pairs())}
        shown: Showing | None = None
        # Lengths are noted last: until then those in the store may be of another recipe.
        if note and len(self.tokens.get("demos", ())) == len(note["ids"]):
            shown = showing_of(note, data.pool_by_id, unit, data.test_texts)
        self.known = shown is not None
        if shown is not None:
            self.showing = shown
            self.named = orders_of(self.note, ablation, unit, data.test_texts)

    def test(self, order: Ints) -> _Read | None:
        """What was said to the test queries under an order, (1, k) or (Q, k); None when it is not all there."""
        free = self.data.task.content_free_texts() if not self.data.task.is_generation else []
        same = self.showing.fixed and len(order) == 1
        wanted, wanted_free = [], []
        for query, text in enumerate(self.data.test_texts):
            demos = self.showing.demos(query, order[0 if len(order) == 1 else query])
            if query == 0 or not same:
                chunks = self.texts.prefix(demos)
                wanted_free.append([self.texts.pair(chunks, self.texts.query(demos, asked)) for asked in free])
            wanted.append(self.texts.pair(chunks, self.texts.query(demos, text)))
        read = self._take(wanted)
        if read is None or not free:
            return read
        content_free = [self._take(pairs) for pairs in wanted_free]
        if any(one is None for one in content_free):
            return replace(read, content_free=None)
        return replace(read, content_free=np.stack([one.log_p for one in content_free if one is not None]))

    def panel(self, order: Ints, queries: Sequence[str]) -> _Read | None:
        """The same for other queries behind one order (k,) of a fixed set."""
        demos = self.showing.demos(0, order)
        chunks = self.texts.prefix(demos)
        return self._take([self.texts.pair(chunks, self.texts.query(demos, text)) for text in queries])

    def _take(self, pairs: Sequence[tuple[str, str]]) -> _Read | None:
        rows = [self._row.get(pair, -1) for pair in pairs]
        if min(rows, default=-1) < 0:
            return None
        found = self._outcomes
        log_p = found.log_p[rows].astype(np.float64)
        if self._ablation.label_score == "mean" and log_p.size:
            log_p = log_p / found.n_tokens[rows]
        text = [found.text[row] for row in rows] if found.text is not None else None
        return _Read(log_p=log_p, features=found.features[rows].astype(np.float64), text=text, content_free=None)

    def prefix_tokens(self) -> float:
        """Mean length of the demonstrations together, in tokens."""
        lengths = np.asarray(self.tokens["demos"], dtype=np.float64)
        return float(lengths[self.showing.of_query].sum(axis=1).mean())


class Collector:
    """Makes results of what a store holds for a recipe.

    Args:
        ablation: the recipe.
        store: its outcomes.
        tasks: the recipe's tasks with their rows, by name.
        tokenizer: that of the model whose outcomes they are.
    """

    def __init__(self, ablation: Ablation, store: OutcomeStore, tasks: Mapping[str, TaskData], tokenizer: Any) -> None:
        self._ablation, self._store, self._tasks = ablation, store, tasks
        self._texts = {name: Texts(data.task, tokenizer) for name, data in tasks.items()}
        self.incomplete: list[str] = []

    def results(self, provenance: Mapping[str, Any]) -> Results:
        """All cells that have at least one complete set.

        Raises:
            SparsortError: there is none.
        """
        groups = []
        for name in self._tasks:
            for selector in self._ablation.selectors:
                for k in self._ablation.shots:
                    groups += self._cells(name, selector, k)
        if not groups:
            raise SparsortError(
                "the store holds no complete demonstration set of this recipe. Run 'sparsort ablate' with it until one is done."
            )
        read = [*self._units(), *(bare_group(data.task) for data in self._tasks.values())]
        spent = [self._store.get_note(group, "spent") or {} for group in read]
        cost = {name: round(sum(note.get(name, 0) for note in spent), 1) for name in ("tokens", "seconds")}
        machines = sorted({name for note in spent if note for name in note.get("machines", ["not noted"])})
        known = {"machine": ", ".join(machines)} if machines else {}
        return Results(groups=groups, provenance={**provenance, **known, **cost, "incomplete": self.incomplete})

    def _units(self) -> list[str]:
        return [group_name(self._tasks[unit.task].task, unit) for unit in units(self._ablation)]

    def _cells(self, name: str, selector: str, k: int) -> list[Group]:
        """The cells of a task, selector and k: one a scoring rule."""
        sets = []
        for seed in self._ablation.seeds:
            unit = Unit(task=name, selector=selector, k=k, seed=seed)
            one = _Set(self._tasks[name], self._texts[name], unit, self._store, self._ablation)
            reads = [one.test(order[None]) for order in one.random] if one.known else []
            if reads and all(read is not None for read in reads):
                sets.append((one, [read for read in reads if read is not None]))
            else:
                self.incomplete.append(f"{name}, {selector}, k = {k}, set {seed}")
        if not sets:
            return []
        cells = []
        # Contextual calibration has nothing to divide out of what is written.
        rules = (False,) if self._tasks[name].task.is_generation else self._ablation.calibrated
        for rule in rules:
            if rule and not all(read.content_free is not None for _, reads in sets for read in reads):
                self.incomplete.append(f"{name}, {selector}, k = {k}: contextual calibration")
                continue
            cells.append(self._group(name, selector, k, rule, sets))
        return cells

    def _group(self, name: str, selector: str, k: int, rule: bool, sets: list[tuple[_Set, list[_Read]]]) -> Group:
        data = self._tasks[name]
        random = [
            self._arm(
                "random",
                "random",
                sets,
                [reads[r] for _, reads in sets],
                [one.random[r][None] for one, _ in sets],
                rule,
            )
            for r in range(len(sets[0][1]))
        ]
        arms = []
        for orderer in self._ablation.orderers:
            orders = [one.named[orderer] for one, _ in sets if orderer in one.named]
            ordered = [one for one, _ in sets if orderer in one.named]
            reads = [one.test(order) for one, order in zip(ordered, orders, strict=True)]
            found = [read for read in reads if read is not None and (read.content_free is not None or not rule)]
            if len(found) == len(sets):
                arms.append(self._arm(orderer, "named", sets, found, orders, rule))
            else:
                self.incomplete.append(f"{name}, {selector}, k = {k}: {orderer} on {len(found)} of {len(sets)} sets")
        for chooser in self._ablation.choosers:
            if applies(chooser, data.task, selector):
                try:
                    arm = self._chosen(chooser, data, sets, random, rule)
                except SparsortError as error:
                    # One criterion that cannot judge here must not cost the study its results.
                    self.incomplete.append(f"{name}, {selector}, k = {k}: {chooser} ({error})")
                    continue
                if arm is not None:
                    arms.append(arm)
                else:
                    self.incomplete.append(f"{name}, {selector}, k = {k}: {chooser}")
        correct_RS = np.stack([arm.accuracy for arm in random])
        for label, place in (("oracle_best", correct_RS.argmax(axis=0)), ("oracle_worst", correct_RS.argmin(axis=0))):
            arms.append(_pick(label, "oracle", random, place, np.zeros(len(sets))))
        infos = [self._info(one) for one, _ in sets]
        by_item = None
        if not sets[0][0].showing.fixed:
            by_item = [
                [[str(one.showing.rows[place]["id"]) for place in of_query] for of_query in one.showing.of_query]
                for one, _ in sets
            ]
        return Group(
            task=name,
            selector=selector,
            k=k,
            calibrated=rule,
            labels=data.task.label_names(),
            items=[str(row["id"]) for row in data.splits.test],
            gold=data.gold,
            sets=infos,
            random=random,
            arms=arms,
            demo_ids_of_item=by_item,
            demo_texts={str(row["id"]): data.task.demo_text(row) for one, _ in sets for row in one.showing.rows},
            item_texts=data.test_texts,
        )

    def _arm(
        self,
        name: str,
        kind: ArmKind,
        sets: list[tuple[_Set, list[_Read]]],
        reads: Sequence[_Read],
        orders: Sequence[Ints],
        rule: bool,
    ) -> Arm:
        data = sets[0][0].data
        log_p = np.stack([_scores(read, rule) for read in reads])
        if data.task.is_generation:
            correct = np.stack([self._judged(data, read) for read in reads])
            predicted = np.full(correct.shape, -1, dtype=np.int64)
        else:
            predicted = log_p.argmax(axis=2)
            correct = predicted == data.gold_index
        fixed = all(len(order) == 1 and one.showing.fixed for order, (one, _) in zip(orders, sets, strict=True))
        n = len(data.test_texts)
        # Content-free queries, each about as long as a query, are read once behind every prefix.
        free = next(len(read.content_free[0]) for read in reads if read.content_free is not None) if rule else 0
        tokens = [
            (one.prefix_tokens() + free * one.tokens["test"]) / (n if fixed else 1) + one.tokens["test"]
            for one, _ in sets
        ]
        same = all(len(order) == 1 for order in orders)
        return Arm(
            name=name,
            kind=kind,
            order=[order[0].tolist() for order in orders] if same else None,
            log_p=log_p,
            predicted=predicted,
            correct=correct,
            tokens=np.array(tokens),
            choosing_tokens=np.zeros(len(sets)),
            order_of_item=None
            if same
            else np.stack([np.broadcast_to(order, (n, order.shape[1])) for order in orders]).astype(np.int64),
        )

    def _judged(self, data: TaskData, read: _Read) -> NDArray[np.bool_]:
        judge = judge_of(data.task.judge)
        return np.array([judge(text, gold).correct for text, gold in zip(read.text or [], data.gold, strict=True)])

    def _chosen(
        self, name: str, data: TaskData, sets: list[tuple[_Set, list[_Read]]], random: list[Arm], rule: bool
    ) -> Arm | None:
        """The arm of a criterion: for each set the random order that it takes."""
        if reads_losses([name]):
            losses = [self._losses(one) for one, _ in sets]
            cheapest = [criterion(name).choose_by_query(Evidence(loss=loss)) for loss in losses if loss is not None]
            if len(cheapest) < len(sets):
                return None
            arm = self._chosen_by_query(name, sets, random, np.stack(cheapest))
            n = len(data.test_texts)
            prefix_S = np.array([one.prefix_tokens() for one, _ in sets])
            query_S = np.array([float(one.tokens["test"]) for one, _ in sets])
            # The losses are read once under every order; then each query is answered behind one of those that were chosen.
            chosen_S = np.array([len(np.unique(places)) for places in cheapest])
            free = len(sets[0][1][0].content_free[0]) if rule and sets[0][1][0].content_free is not None else 0
            return replace(
                arm,
                tokens=chosen_S * (prefix_S + free * query_S) / n + query_S,
                choosing_tokens=len(random) * (prefix_S + n * query_S),
            )
        if criterion(name).chooses != "order":
            asked = [Evidence(log_p=np.stack([_scores(read, rule) for read in reads], axis=1)) for _, reads in sets]
            return self._chosen_by_query(
                name, sets, random, np.stack(list(map(criterion(name).choose_by_query, asked)))
            )
        places, costs = [], []
        for one, reads in sets:
            found = self._evidence(name, one, reads, rule)
            if found is None:
                return None
            evidence, cost = found
            places.append(criterion(name).choose(evidence, seed=one.unit.seed).index)
            costs.append(cost)
        return _pick(name, "chosen", random, np.array(places), np.array(costs))

    def _evidence(self, name: str, one: _Set, reads: list[_Read], rule: bool) -> tuple[Evidence, float] | None:
        """What a criterion reads of a set, and the tokens that it costs."""
        kind = probes_of(name, sampled=self._ablation.sampled_probes)
        found = [read.content_free[0] for read in reads if read.content_free is not None]
        free = np.stack(found) if len(found) == len(reads) else None
        if kind == "none":
            # Content-free inputs alone, each about as long as a query.
            each = 0.0 if free is None else one.prefix_tokens() + free.shape[1] * float(one.tokens["test"])
            return Evidence(content_free=free), len(reads) * each
        sampled = kind == "sampled"
        queries = list(one.probes.get("texts", [])) if sampled else one.data.dev_texts
        panel = [one.panel(order, queries) for order in one.random] if queries else []
        if not panel or any(read is None for read in panel):
            return None
        asked = [
            replace(read, content_free=of_test.content_free)
            for read, of_test in zip(panel, reads, strict=True)
            if read is not None
        ]
        bare = None if sampled else self._bare(one.data)
        generated = one.data.task.is_generation
        gold = one.data.dev_gold
        log_p = np.stack([_scores(read, rule) for read in asked])
        if generated and not sampled:
            # Two pseudo-labels, wrong and right, so that "best on dev" reads what the judge said.
            judge = judge_of(one.data.task.judge)
            golds = [one.data.task.gold_text(row) for row in one.data.splits.dev]
            right = np.array(
                [[judge(text, g).correct for text, g in zip(read.text or [], golds, strict=True)] for read in asked]
            )
            log_p = np.log(np.stack([1.0 - 0.98 * right - 0.01, 0.98 * right + 0.01], axis=2))
            gold = np.ones(len(golds), dtype=np.int64)
        evidence = Evidence(
            log_p=log_p,
            gold=None if sampled else gold,
            prior=None if generated else one.data.label_counts,
            content_free=free,
            # Both sites' metrics stand before the entropy; those after the final norm are the later ones.
            features=np.stack([read.features[:, POST_NORM] for read in asked]),
            bare_features=bare,
            metrics=METRIC_NAMES,
        )
        length = one.probes.get("tokens", one.tokens["dev"]) if sampled else one.tokens["dev"]
        cost = len(one.random) * (one.prefix_tokens() + len(queries) * float(length))
        return evidence, cost + float(one.probes.get("sampling_tokens", 0.0) if sampled else 0.0)

    def _bare(self, data: TaskData) -> Floats | None:
        outcomes = self._store.read(bare_group(data.task))
        row = {pair: place for place, pair in enumerate(outcomes.pairs())}
        texts = self._texts[data.task.name]
        places = [row.get(texts.pair(texts.prefix([]), texts.query([], text)), -1) for text in data.dev_texts]
        if min(places, default=-1) < 0:
            return None
        return outcomes.features[places].astype(np.float64)[:, POST_NORM]

    def _losses(self, one: _Set) -> Floats | None:
        """(Q, R) loss on each test query's own tokens behind every random order."""
        outcomes = self._store.read(loss_group(one.data.task, one.unit))
        row = {pair: place for place, pair in enumerate(outcomes.pairs())}
        places = np.empty((len(one.data.test_texts), len(one.random)), dtype=np.int64)
        for query, text in enumerate(one.data.test_texts):
            for r, order in enumerate(one.random):
                demos = one.showing.demos(query, order)
                places[query, r] = row.get(
                    one.texts.own_pair(one.texts.prefix(demos), one.texts.query(demos, text)), -1
                )
        return -outcomes.log_p[places, 0].astype(np.float64) if places.min() >= 0 else None

    def _chosen_by_query(self, name: str, sets: list[tuple[_Set, list[_Read]]], random: list[Arm], choice: Ints) -> Arm:
        """Each test query takes a random order of its own, (S, Q)."""
        n = np.arange(choice.shape[1])
        orders = np.stack([one.random[choice[s]] for s, (one, _) in enumerate(sets)])
        # Under a random order a query costs what it costs its arm: all of them are asked.
        every = np.sum([arm.tokens for arm in random], axis=0)

        def of(name: str) -> NDArray[Any]:
            stacked = np.stack([getattr(arm, name) for arm in random])
            return np.stack([stacked[choice[s], s, n] for s in range(len(sets))])

        return Arm(
            name=name,
            kind="chosen",
            order=None,
            log_p=of("log_p"),
            predicted=of("predicted"),
            correct=of("correct"),
            tokens=every,
            choosing_tokens=np.zeros(len(sets)),
            order_of_item=orders,
        )

    def _info(self, one: _Set) -> SetInfo:
        demos = one.showing.demos(0, one.random[0])
        prompt = "".join(one.texts.prefix(demos)) + one.texts.query(demos, one.data.test_texts[0])
        fixed = one.showing.fixed
        return SetInfo(
            seed=one.unit.seed,
            demo_ids=list(one.note["ids"]) if fixed else [],
            demo_labels=list(one.note["labels"]) if fixed else [],
            demo_tokens=list(one.tokens["demos"]) if fixed else [],
            prompt=prompt,
        )


def _scores(read: _Read, rule: bool) -> Floats:
    """(N, L) scores of the labels under the group's rule."""
    if not rule or read.content_free is None:
        return read.log_p
    if len(read.content_free) == 1:
        return calibrate_contextually(read.log_p, read.content_free[0])
    return calibrate_contextually(read.log_p[:, None], read.content_free)[:, 0]


def _pick(name: str, kind: ArmKind, random: list[Arm], place_S: NDArray[Any], choosing: Floats) -> Arm:
    """The arm that takes random order `place_S[s]` under set s."""
    sets = range(len(place_S))

    def of(attribute: str) -> NDArray[Any]:
        return np.stack([getattr(random[place_S[s]], attribute)[s] for s in sets])

    orders = [random[place_S[s]].order for s in sets]
    return Arm(
        name=name,
        kind=kind,
        order=None if any(order is None for order in orders) else [order[s] for s, order in enumerate(orders) if order],
        log_p=of("log_p"),
        predicted=of("predicted"),
        correct=of("correct"),
        tokens=of("tokens"),
        choosing_tokens=choosing,
        order_of_item=None if random[0].order_of_item is None else of("order_of_item"),
    )
