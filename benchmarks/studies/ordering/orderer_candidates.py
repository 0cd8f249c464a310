"""The candidates of `orderer_search.py`: numbers that a model computes under each order, read from a study's store.

Only `Loader._ask` calls a model; it reads every demonstration as a query after the demonstrations before it. A family is a table
of candidates, each of which gives scores (O,) to the random orders. Tuning finds whether high or low scores are better.

Shapes: O random orders, P probe queries, Q test queries, L labels, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from sparsort.curriculum.ablation.recipe.ablation import Ablation, DemoSet
from sparsort.curriculum.ablation.recipe.task_data import TaskData
from sparsort.curriculum.ablation.recipe.texts import Texts
from sparsort.curriculum.ablation.store.order_notes import group_name, zero_shot_group
from sparsort.curriculum.ablation.store.store import Outcomes, OutcomeStore
from sparsort.curriculum.demos.criteria import label_criteria as labels
from sparsort.curriculum.demos.criteria.distributions import entropy, log_mean, log_softmax
from sparsort.curriculum.demos.criteria.ranking import mean_ranks
from sparsort.scoring.loading.demo_model import load_tokenizer

TASKS = ("trec", "mr", "sst5", "rte", "cb")
SHOTS = (4, 8)
# Methods that read each query under all orders: the mean of the probabilities over all orders, and the least label entropy.
TOGETHER = ("all orders together", "MDL")
PANELS = {"dev 4": 4, "dev 8": 8, "dev 16": 16, "dev 32": 32}

Floats = NDArray[np.float64]
Scores = dict[str, Floats]


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """Outcomes of P queries: (O, P, L) and (O, P, F) under every order, and (P, F) without demonstrations, NaN if unknown."""

    log_p: Floats
    features: Floats
    bare: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One demonstration set.

    Attributes:
        accuracy: (O,) accuracy on the test rows; `right` is (O, Q).
        test, dev, free, sampled: test rows, dev rows, content-free inputs, probes sampled from the model (or None).
        demos: (O, k, L) and (O, k, F) of each demonstration after those before it; None if it was not read.
        ranks: (O, k) rank of the demonstration at each place by sparsity, loss or length, each read without the others.
        named: gain in accuracy of the study's named orders.
    """

    task: str
    k: int
    seed: int
    right: NDArray[np.bool_]
    test: Panel
    dev: Panel
    dev_gold: NDArray[np.int64]
    free: Panel
    sampled: Panel | None
    demos: tuple[Floats, Floats] | None
    gold: NDArray[np.int64]
    demo_gold: NDArray[np.int64]
    ranks: dict[str, Floats]
    named: dict[str, float]
    prior: Floats

    @property
    def cell(self) -> tuple[str, int]:
        return self.task, self.k

    @property
    def dev_likelihood(self) -> Floats:
        """Log-likelihood of the dev rows' labels, (O,): a calibration may read it from other sets."""
        return labels.gold_log_likelihood(self.dev.log_p, self.dev_gold)

    @property
    def accuracy(self) -> Floats:
        mean: Floats = self.right.mean(axis=1)
        return mean


class Loader:
    """Reads the complete demonstration sets in a study's store, which may be unfinished."""

    def __init__(self, store: Path, data: Path, read_demos: Path | None) -> None:
        self.store = OutcomeStore.existing(store)
        self.ablation = Ablation(tasks=TASKS, data=data)
        self.names = self.store.feature_names
        self.demos = None
        self._tokenizer = load_tokenizer(self.ablation.model)
        self._reader: Any = None
        if read_demos is not None:
            self.demos = OutcomeStore(read_demos, self.store.identity, feature_names=self.names)

    def cases(self) -> Iterable[Case]:
        for task in self.ablation.load_tasks():
            data: TaskData | None = None
            for seed, k in itertools.product(self.ablation.seeds, SHOTS):
                group = group_name(task, DemoSet(task=task.name, selector="random", k=k, seed=seed))
                if self.store.get_note(group, "tokens") is not None:
                    data = data or TaskData(task, self.ablation)
                    case = self._case(data, group, k, seed)
                    if case is not None:
                        yield case

    def _case(self, data: TaskData, group: str, k: int, seed: int) -> Case | None:
        task, texts, note = data.task, Texts(data.task, self._tokenizer), self.store.get_note(group, "orders")
        rows = {str(row["id"]): dict(row) for row in data.splits.pool}
        shown = [rows[name] for name in note["ids"]]
        orders = self.ablation.orders(k, seed)
        found, bare = (_Lookup(self.store.read(name)) for name in (group, zero_shot_group(task)))
        chunks = [texts.prefix([shown[place] for place in order]) for order in orders]
        free = task.content_free_texts()
        every = [*data.test_texts, *data.dev_texts, *free]

        def known(queries: Sequence[str]) -> bool:
            return all(texts.pair(prefix, text) in found.row for prefix in chunks for text in queries)

        if not known(every):
            # Some outcomes are missing, so the set is unfinished.
            return None

        def panel(queries: Sequence[str]) -> Panel:
            pairs = [[texts.pair(prefix, text) for text in queries] for prefix in chunks]
            alone = [bare.row.get(texts.pair((), text), -1) for text in queries]
            read = [found.rows(row) for row in pairs]
            return Panel(
                log_p=np.stack([found.outcomes.log_p[row] for row in read]).astype(np.float64),
                features=np.stack([found.outcomes.features[row] for row in read]).astype(np.float64),
                bare=np.where(np.array(alone)[:, None] < 0, np.nan, bare.outcomes.features[alone]).astype(np.float64),
            )

        sampled = (self.store.get_note(group, "probes") or {}).get("texts", [])
        test = panel(data.test_texts)
        right = test.log_p.argmax(axis=2) == data.gold_index
        named, ranks = {}, {}
        for name, order in note["named"].items():
            # A named order with several entries differs by query, and has no single accuracy per set.
            if len(order) == 1:
                prefix = texts.prefix([shown[place] for place in order[0]])
                log_p = found.outcomes.log_p[found.rows([texts.pair(prefix, text) for text in data.test_texts])]
                named[name] = float((log_p.argmax(axis=1) == data.gold_index).mean() - right.mean())
        for what, name in (
            ("sparsity", "dense_to_sparse"),
            ("loss", "perplexity_ascending"),
            ("length", "length_ascending"),
        ):
            if len(note["named"].get(name, [])) == 1:
                # The named order lists rows by rank; its inverse is the rank of each row, which is then put in each order.
                ranks[what] = np.argsort(np.array(note["named"][name][0])).astype(np.float64)[orders]
        gold = np.array([task.gold_index(row) for row in shown])[orders]
        return Case(
            task=task.name,
            k=k,
            seed=seed,
            right=right,
            test=test,
            dev=panel(data.dev_texts),
            dev_gold=data.dev_gold,
            free=panel(free),
            sampled=panel(sampled) if sampled and known(sampled) else None,
            demos=self._demos(data, texts, group, shown, orders),
            gold=data.gold_index,
            demo_gold=gold,
            ranks=ranks,
            named=named,
            prior=np.bincount([task.gold_index(row) for row in data.splits.pool]).astype(np.float64),
        )

    def _demos(
        self, data: TaskData, texts: Texts, group: str, shown: list[dict[str, Any]], orders: NDArray[np.int64]
    ) -> tuple[Floats, Floats] | None:
        if self.demos is None:
            return None
        wanted = [
            [
                (texts.prefix([shown[i] for i in order[:place]]), data.task.query_text(shown[order[place]]))
                for place in range(len(order))
            ]
            for order in orders.tolist()
        ]
        asks: dict[tuple[str, ...], dict[str, None]] = {}
        held = _Lookup(self.demos.read(group)).row
        for prefix, query in itertools.chain.from_iterable(wanted):
            if texts.pair(prefix, query) not in held:
                asks.setdefault(prefix, {})[query] = None
        # Only pairs that the folder lacks are sent to the model.
        if asks:
            self.demos.write(group, self._ask(data, texts, asks))
        found = _Lookup(self.demos.read(group))
        rows = np.array([found.rows([texts.pair(*ask) for ask in order]) for order in wanted])
        return found.outcomes.log_p[rows].astype(np.float64), found.outcomes.features[rows].astype(np.float64)

    def _ask(self, data: TaskData, texts: Texts, asks: dict[tuple[str, ...], dict[str, None]]) -> Outcomes:
        if self._reader is None:
            from sparsort.scoring.answers.reader import AnswerReader
            from sparsort.scoring.loading.load import load_model

            self._reader = AnswerReader(load_model(self.ablation.model))
        parts = []
        for prefix in sorted(asks):
            answers = self._reader.answers(prefix, list(asks[prefix]), data.task.label_texts())
            pairs = np.array([texts.pair(prefix, query) for query in asks[prefix]])
            parts.append((pairs[:, 0], pairs[:, 1], answers.log_p, answers.n_tokens, answers.features))
        columns = ("prefix", "query", "log_p", "n_tokens", "features")
        joined = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Outcomes(**dict(zip(columns, joined, strict=True)))


class _Lookup:
    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes = outcomes
        self.row = {pair: row for row, pair in enumerate(outcomes.pairs())}

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        return [self.row[pair] for pair in pairs]


# The families. Each candidate gives scores (O,), and tuning finds their sign.


def correlation(a: Floats, b: Floats) -> Floats:
    """Pearson's r along the last axis; 0 where one side is constant."""
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    # The tolerance treats a side that is constant up to rounding as constant.
    together = (a * b).sum(axis=-1)
    return np.divide(together, scale, out=np.zeros_like(together), where=scale > 1e-15)


def _level(panel: Panel, n: int | None = None) -> Scores:
    """Statistics over the queries of how dense the state is, (O, F)."""
    f = panel.features[:, :n]
    return {"mean": f.mean(axis=1), "median": np.median(f, axis=1), "rank": mean_ranks(f).mean(axis=1)}


def _against_bare(panel: Panel) -> Scores:
    f, bare = panel.features, panel.bare
    by_query = np.moveaxis(f, 1, 2)
    follows = correlation(rankdata(by_query, axis=2), np.broadcast_to(rankdata(bare.T, axis=1), by_query.shape))
    return {
        "gain": ((f - bare) / np.abs(bare)).mean(axis=1),
        "distance": np.abs(f - bare).mean(axis=1),
        "ranks queries as bare": follows,
    }


def _variation(panel: Panel) -> Scores:
    f = panel.features
    by_query = np.moveaxis(f, 1, 2)
    # The mean over all other orders, for each order.
    rest = (by_query.sum(axis=0, keepdims=True) - by_query) / (len(f) - 1)
    return {
        "sd": f.std(axis=1),
        "sd / mean": f.std(axis=1) / np.abs(f.mean(axis=1)),
        "lowest": f.min(axis=1),
        "highest": f.max(axis=1),
        "ranks queries as the other orders": correlation(by_query, rest),
        "distance to the median order": np.abs(by_query - np.median(by_query, axis=0)).mean(axis=2),
    }


def _by_feature(prefix: str, statistics: Scores, names: Sequence[str]) -> Scores:
    return {
        f"{prefix}{what} {name}": values[:, place]
        for what, values in statistics.items()
        for place, name in enumerate(names)
    }


def _split_entropy(scores: Scores) -> tuple[Scores, Scores]:
    sparsity = {name: values for name, values in scores.items() if not name.endswith(" entropy")}
    return sparsity, {name: values for name, values in scores.items() if name.endswith(" entropy")}


def _demo_states(case: Case, names: Sequence[str]) -> Scores:
    """The features of the demonstrations, each after those before it, so that only the prefix is read."""
    if case.demos is None:
        return {}
    f = case.demos[1]
    places = np.broadcast_to(np.arange(case.k, dtype=np.float64), (len(f), f.shape[2], case.k))
    statistics = {
        "last": f[:, -1],
        "mean after the first": f[:, 1:].mean(axis=1),
        "slope": correlation(np.moveaxis(f, 1, 2), places),
        "last − mean": f[:, -1] - f[:, 1:].mean(axis=1),
    }
    return _by_feature("demos in place, ", statistics, names)


def _demo_labels(case: Case) -> Scores:
    if case.demos is None:
        return {}
    log_p = case.demos[0]
    gold = np.take_along_axis(log_softmax(log_p), case.demo_gold[..., None], axis=2)[..., 0]
    return {
        "demos in place, log-likelihood after the first": gold[:, 1:].mean(axis=1),
        "demos in place, log-likelihood of the last": gold[:, -1],
        "demos in place, entropy of the labels": entropy(log_softmax(log_p))[:, 1:].mean(axis=1),
        "demos in place, PDO": labels.pdo(log_p[:, 1:]),
    }


def _alone(case: Case) -> Scores:
    """The places of sparse, hard or long demonstrations, each read alone, so that an order needs no call of the model."""
    place = np.arange(case.k, dtype=np.float64)
    ends = np.abs(place - place.mean())
    scores = {}
    for what, rank in case.ranks.items():
        scores |= {
            f"{what} alone rises": correlation(rank, np.broadcast_to(place, rank.shape)),
            f"{what} alone, last": rank[:, -1],
            f"{what} alone, first": rank[:, 0],
            f"{what} alone, at the ends": correlation(rank, np.broadcast_to(ends, rank.shape)),
        }
    return scores


def _readout(case: Case, panel: Panel, prefix: str) -> Scores:
    """Statistics of the label log-probabilities; these need a label set."""
    log_p = panel.log_p
    normal = log_softmax(log_p)
    # The probability that the model gives to all labels together.
    mass = np.log(np.exp(log_p).sum(axis=2))
    top = np.sort(normal, axis=2)
    mean = normal.mean(axis=1)
    # Without the mean over queries, which is the bias of an order for a label.
    centred = normal - mean[:, None]
    vote = centred.mean(axis=0).argmax(axis=1)
    scores = {
        "mass of the labels": mass.mean(axis=1),
        "margin": (top[..., -1] - top[..., -2]).mean(axis=1),
        "mutual information": entropy(log_mean(normal, axis=1)) - entropy(normal).mean(axis=1),
        "variance over queries": normal.var(axis=1).mean(axis=1),
        "bias": mean.var(axis=1),
        "agrees with itself centred": (normal.argmax(axis=2) == centred.argmax(axis=2)).mean(axis=1),
        "agrees with the centred vote": (normal.argmax(axis=2) == vote).mean(axis=1),
    }
    return {f"{prefix}{name}": values for name, values in scores.items()}


def families(case: Case, names: Sequence[str]) -> dict[str, Scores]:
    """All candidates of all families, (O,) each; only "read-out" needs a label set."""
    sizes: Scores = {}
    for label, n in PANELS.items():
        sizes |= _by_feature(f"{label}, ", _level(case.dev, n), names)
    level, level_entropy = _split_entropy(sizes)
    bare, bare_entropy = _split_entropy(_by_feature("dev 32, ", _against_bare(case.dev), names))
    varied, varied_entropy = _split_entropy(_by_feature("dev 32, ", _variation(case.dev), names))
    free_all = {**_level(case.free), **_against_bare(case.free), **_variation(case.free)}
    free, free_entropy = _split_entropy(_by_feature("free, ", free_all, names))
    drawn = {} if case.sampled is None else {**_level(case.sampled), **_variation(case.sampled)}
    sampled, sampled_entropy = _split_entropy(_by_feature("sampled, ", drawn, names))
    in_place, in_place_entropy = _split_entropy(_demo_states(case, names))
    return {
        "density": level,
        "density against bare": bare,
        "density's variation": varied,
        "next-token entropy": {**level_entropy, **bare_entropy, **varied_entropy},
        "content-free, density": free,
        "content-free, next-token entropy": free_entropy,
        "sampled probes, density": sampled,
        "sampled probes, next-token entropy": sampled_entropy,
        "demonstrations in place, density": in_place,
        "demonstrations in place, next-token entropy": in_place_entropy,
        "demonstrations alone": _alone(case),
        "read-out": {
            **_readout(case, case.dev, "dev 32, "),
            **_readout(case, case.free, "free, "),
            **_demo_labels(case),
        },
    }


def baselines(case: Case, names: Sequence[str]) -> Scores:
    """The baselines on the dev rows, of which the first reads labels, and the first density that the library had."""
    dev, likelihood = case.dev.log_p, case.dev_likelihood
    sampled = (
        {}
        if case.sampled is None
        else {
            "GlobalE, sampled probes": labels.globale(case.sampled.log_p),
            "LocalE, sampled probes": labels.locale(case.sampled.log_p),
        }
    )
    return {
        **sampled,
        "best on dev (32 labels)": labels.best_on_dev(dev, case.dev_gold) + 1e-6 * likelihood,
        "GlobalE, unlabelled": labels.globale(dev),
        "LocalE, unlabelled": labels.locale(dev),
        "PDO, unlabelled": labels.pdo(dev),
        "PDO with the pool's prior": labels.pdo(dev, case.prior),
        "PDO, content-free": labels.pdo(case.free.log_p),
        "density of before": case.dev.features[..., list(names).index("post_norm/l0_relative")].mean(axis=1),
    }


def joined(found: dict[str, Floats], basis: Scores) -> dict[str, Scores]:
    """Mean ranks of two winners, or of a winner and a baseline, and winners that halve the orders before a baseline decides."""
    ranked = {name: mean_ranks(values) for name, values in {**found, **basis}.items()}
    ours = list(found)
    mean, pruned, with_labels = {}, {}, {}
    for a, b in itertools.combinations(ours, 2):
        mean[f"{a} + {b}"] = ranked[a] + ranked[b]
    for a, b in itertools.product(ours, [name for name in basis if "labels" not in name and "density" not in name]):
        with_labels[f"{a} + {b}"] = ranked[a] + ranked[b]
        kept = ranked[a] >= np.median(ranked[a])
        pruned[f"{b} among the better half by {a}"] = ranked[b] + 2.0 * kept
    return {"two of ours": mean, "ours with a baseline": with_labels, "ours prunes, a baseline decides": pruned}


def by_query(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Gain if every test query takes the order of its own most extreme state, plain or centred within each order."""
    found = {}
    features = {name: case.test.features[..., place] for place, name in enumerate(names)}
    features["label entropy (MDL)"] = entropy(log_softmax(case.test.log_p))
    for name, values in features.items():
        centred = (values - values.mean(axis=1, keepdims=True)) / (values.std(axis=1, keepdims=True) + 1e-12)
        for how, scores in (("plain", values), ("centred", centred)):
            for what, chosen in (("lowest", scores.argmin(axis=0)), ("highest", scores.argmax(axis=0))):
                right = case.right[chosen, np.arange(case.right.shape[1])]
                found[f"{what} {name}, {how}"] = float(right.mean() - case.right.mean())
    probability = np.exp(log_softmax(case.test.log_p)).mean(axis=0)
    found["all orders together"] = float((probability.argmax(axis=1) == case.gold).mean() - case.right.mean())
    found["MDL"] = found.pop("lowest label entropy (MDL), plain")
    return found
