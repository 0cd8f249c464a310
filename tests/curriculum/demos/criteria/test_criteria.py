"""Criteria for orders and sets against their formulas in plain Python, worked examples, and invariances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria import CRITERIA, Criterion, Evidence, criterion
from sparsort.curriculum.demos.criteria import density as states
from sparsort.curriculum.demos.criteria import label_criteria as labels
from sparsort.curriculum.demos.criteria import mdl_and_cone as per_query
from sparsort.curriculum.demos.criteria.ranking import choose, mean_ranks, rank_average
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRICS

Floats = NDArray[np.float64]
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))


def drawn(orders: int, probes: int, n_labels: int, seed: int, scale: float = 3.0) -> Floats:
    return np.random.default_rng(seed).normal(scale=scale, size=(orders, probes, n_labels)) - 20.0


# The formulas, one number at a time


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def shannon(p: list[float]) -> float:
    return sum(-x * math.log(x) for x in p if x > 0)


def globale(log_p: list[list[list[float]]]) -> list[float]:
    result = []
    for order in log_p:
        count = [0] * len(order[0])
        for row in order:
            count[row.index(max(row))] += 1
        result.append(shannon([c / len(order) for c in count]))
    return result


def locale(log_p: list[list[list[float]]]) -> list[float]:
    return [sum(shannon(softmax(row)) for row in order) / len(order) for order in log_p]


def pdo(log_p: list[list[list[float]]], prior: list[float] | None = None) -> list[float]:
    result = []
    for order in log_p:
        n_labels = len(order[0])
        prior_of = prior or [1 / n_labels] * n_labels
        mean = [sum(softmax(row)[at] for row in order) / len(order) for at in range(n_labels)]
        result.append(-sum(m * math.log(m / (q / sum(prior_of))) for m, q in zip(mean, prior_of, strict=True) if m > 0))
    return result


def best_on_dev(log_p: list[list[list[float]]], gold: list[int]) -> list[float]:
    return [sum(row.index(max(row)) == g for row, g in zip(order, gold, strict=True)) / len(gold) for order in log_p]


def likelihood(log_p: list[list[list[float]]], gold: list[int]) -> list[float]:
    return [sum(math.log(softmax(row)[g]) for row, g in zip(order, gold, strict=True)) / len(gold) for order in log_p]


@settings(max_examples=60)
@given(SHAPES)
def test_against_the_formulas(shape: tuple[int, int, int, int]) -> None:
    log_p = drawn(*shape)
    generator = np.random.default_rng(shape[3])
    gold = generator.integers(shape[2], size=shape[1]).tolist()
    prior = generator.uniform(0.1, 5.0, size=shape[2]).tolist()
    plain = log_p.tolist()
    assert labels.globale(log_p) == pytest.approx(globale(plain), abs=1e-12)
    assert labels.locale(log_p) == pytest.approx(locale(plain), abs=1e-12)
    assert labels.pdo(log_p) == pytest.approx(pdo(plain), abs=1e-12)
    assert labels.pdo(log_p, prior) == pytest.approx(pdo(plain, prior), abs=1e-12)
    assert labels.best_on_dev(log_p, gold) == pytest.approx(best_on_dev(plain, gold), abs=1e-12)
    assert labels.gold_log_likelihood(log_p, gold) == pytest.approx(likelihood(plain, gold), abs=1e-9)
    entropies = [[shannon(softmax(row)) for row in query] for query in plain]
    assert per_query.mdl(log_p).tolist() == [row.index(min(row)) for row in entropies]
    assert CRITERIA["mdl"].choose_by_query(Evidence(log_p=log_p)).tolist() == per_query.mdl(log_p).tolist()
    assert CRITERIA["cone"].choose_by_query(Evidence(loss=log_p[:, :, 0])).tolist() == log_p[:, :, 0].argmin(1).tolist()


EVERY: dict[str, Callable[[Any], Floats]] = {
    "globale": labels.globale,
    "locale": labels.locale,
    "pdo": labels.pdo,
    "mdl": per_query.mdl_scores,
}


@settings(max_examples=30)
@given(SHAPES, st.sampled_from(sorted(EVERY)))
def test_invariances(shape: tuple[int, int, int, int], name: str) -> None:
    score, log_p, generator = EVERY[name], drawn(*shape), np.random.default_rng(shape[3] + 1)
    expected = score(log_p)
    constant = generator.normal(scale=100.0, size=log_p.shape[:2])[..., None]
    assert score(log_p + constant) == pytest.approx(expected, abs=1e-9)
    assert score(log_p[..., generator.permutation(shape[2])]) == pytest.approx(expected, abs=1e-12)
    by_order = generator.permutation(shape[0])
    assert (score(log_p[by_order]) == expected[by_order]).all()
    if name != "mdl":
        assert score(log_p[:, generator.permutation(shape[1])]) == pytest.approx(expected, abs=1e-12)
        assert score(np.concatenate([log_p, log_p], axis=1)) == pytest.approx(expected, abs=1e-12)


@given(SHAPES)
def test_which_label_is_which_changes_no_bit_of_globale(shape: tuple[int, int, int, int]) -> None:
    log_p = drawn(*shape)
    for order in itertools.permutations(range(shape[2])):
        assert (labels.globale(log_p[..., order]) == labels.globale(log_p)).all()


@given(SHAPES)
def test_pdo_with_a_uniform_prior_is_the_entropy_of_the_mean(shape: tuple[int, int, int, int]) -> None:
    log_p = drawn(*shape)
    mean = [[sum(column) / shape[1] for column in zip(*map(softmax, order), strict=True)] for order in log_p.tolist()]
    assert labels.pdo(log_p) == pytest.approx([shannon(m) - math.log(shape[2]) for m in mean], abs=1e-12)
    assert labels.pdo(log_p) == pytest.approx(labels.pdo(log_p, [7.0] * shape[2]), abs=1e-12)
    assert (labels.locale(log_p) <= labels.pdo(log_p) + math.log(shape[2]) + 1e-12).all()


def test_by_hand() -> None:
    always_first = [[-1.0, -9.0], [-2.0, -9.0], [-1.0, -9.0], [-1.0, -9.0]]
    half = [[-1.0, -9.0], [-9.0, -1.0], [-9.0, -1.0], [-1.0, -9.0]]
    unsure = [[-5.0, -5.0 - 1e-6]] * 4
    log_p = [always_first, half, unsure]
    assert labels.globale(log_p) == pytest.approx([0.0, math.log(2), 0.0])
    assert labels.locale(log_p).argmax() == 2
    assert labels.pdo(log_p)[1:] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert labels.pdo(log_p).argmin() == 0
    # KL((¾, ¼) ‖ (½, ½)), and the other way round, which is not it.
    one = [[[math.log(0.75), math.log(0.25)]]]
    assert labels.pdo(one) == pytest.approx([-(0.75 * math.log(1.5) + 0.25 * math.log(0.5))])
    assert labels.pdo(one)[0] != pytest.approx(-(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0)))
    assert labels.pdo(one, [3, 1]) == pytest.approx([0.0])
    assert labels.best_on_dev(log_p, [0, 1, 1, 1]) == pytest.approx([0.25, 0.75, 0.25])
    # The probabilities are averaged, not the logarithms.
    two = [[[math.log(0.9), math.log(0.1)], [math.log(0.1), math.log(0.9)]]]
    assert labels.pdo(two) == pytest.approx([0.0], abs=1e-12)


def test_far_from_zero_and_impossible_labels() -> None:
    far = np.array([[[-1000.0, -1001.0], [-5000.0, -1e6]]])
    near = far - far.max(axis=-1, keepdims=True)
    for score in EVERY.values():
        assert np.isfinite(score(far)).all()
        assert score(far) == pytest.approx(score(near))
    impossible = [[[-1.0, -math.inf], [-1.0, -1.0]]]
    assert labels.locale(impossible) == pytest.approx([math.log(2) / 2])
    assert labels.globale(impossible) == pytest.approx([0.0])
    assert labels.pdo([[[-1.0, -math.inf]]]) == pytest.approx([-math.log(2)])
    assert labels.gold_log_likelihood(far, [1, 0]) == pytest.approx([-(1 + math.log1p(math.exp(-1))) / 2])
    assert labels.gold_log_likelihood([[[-1.0, -math.inf]]], [1]).tolist() == [-math.inf]


@pytest.mark.parametrize(
    ("log_p", "message"),
    [
        ([[[-1.0], [-2.0]]], "single label"),
        (np.zeros((3, 0, 2)), "no probes"),
        (np.zeros((0, 3, 2)), "no orders"),
        (np.zeros((3, 2, 0)), "no labels"),
        (np.zeros((3, 2)), r"shape \(3, 2\); expected 3 axes: \(orders, probes, labels\)"),
        ([[[-1.0, math.nan]]], "nan at order 0, probe 0, label 1"),
        ([[[-1.0, math.inf]]], "inf at order 0"),
        ([[[-1.0, 0.0], [-math.inf, -math.inf]]], "every label at order 0, probe 1"),
        ([[[-1.0, 0.0], [-1.0]]], "array of numbers"),
        ([[["a", "b"]]], "array of numbers"),
    ],
)
@pytest.mark.parametrize("score", [labels.globale, labels.locale, labels.pdo])
def test_bad_scores(score: Callable[[Any], Floats], log_p: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        score(log_p)


@pytest.mark.parametrize("gold", [[0], [0, 2], [0, -1], [0, 0.5], [0, math.nan], []])
def test_bad_gold(gold: list[float]) -> None:
    with pytest.raises(SparsortError, match="gold"):
        labels.best_on_dev(np.zeros((1, 2, 2)), gold)


@pytest.mark.parametrize("prior", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_bad_prior(prior: list[float]) -> None:
    with pytest.raises(SparsortError, match="prior"):
        labels.pdo(np.zeros((1, 2, 2)), prior)


# Density


@settings(max_examples=40)
@given(orders=st.integers(1, 5), probes=st.integers(1, 6), seed=st.integers(0, 10_000), higher=st.booleans())
def test_density_against_the_formulas(orders: int, probes: int, seed: int, higher: bool) -> None:
    generator, sign = np.random.default_rng(seed), 1 if higher else -1
    features = generator.integers(1, 6, size=(orders, probes)).astype(float)
    bare = generator.uniform(-3.0, -1.0, size=probes)
    mean = [sign * sum(row) / probes for row in features.tolist()]
    gain = [
        sign * sum((f - b) / abs(b) for f, b in zip(row, bare.tolist(), strict=True)) / probes
        for row in features.tolist()
    ]
    rank = []
    for order in range(orders):
        places = []
        for probe in range(probes):
            others = [sign * features[o, probe] for o in range(orders) if o != order]
            own = sign * features[order, probe]
            beaten = sum(other < own for other in others) + sum(other == own for other in others) / 2
            places.append(beaten / len(others) if others else 0.5)
        rank.append(sum(places) / probes)
    assert states.density(features, denser_is_higher=higher) == pytest.approx(mean)
    assert states.density_gain(features, bare, denser_is_higher=higher) == pytest.approx(gain)
    assert states.density_rank(features, denser_is_higher=higher) == pytest.approx(rank)


def test_a_probe_without_a_state_under_one_order_counts_under_none() -> None:
    features = np.array([[1.0, 5.0, 3.0], [2.0, np.nan, 1.0]])
    whole = features[:, [0, 2]]
    assert (states.density(features, denser_is_higher=True) == whole.mean(axis=1)).all()
    assert (states.density_rank(features, denser_is_higher=True) == [0.5, 0.5]).all()
    expected = states.density_gain(whole, [1.0, 2.0], denser_is_higher=False)
    assert (states.density_gain(features, [1.0, 1.0, 2.0], denser_is_higher=False) == expected).all()
    with pytest.raises(SparsortError, match="no probe with a value under each of the 2"):
        states.density([[1.0, np.nan], [np.nan, 1.0]], denser_is_higher=True)


def test_bad_density() -> None:
    with pytest.raises(SparsortError, match="no probes"):
        states.density(np.zeros((2, 0)), denser_is_higher=True)
    with pytest.raises(SparsortError, match="3 numbers for 2 probes"):
        states.density_gain(np.ones((2, 2)), np.ones(3), denser_is_higher=True)
    with pytest.raises(SparsortError, match="0 for probe 1"):
        states.density_gain(np.ones((2, 2)), [1.0, 0.0], denser_is_higher=True)


# A query's own demonstrations


def test_per_query_ties_go_to_the_first() -> None:
    sure, unsure = [0.0, -50.0], [0.0, 0.0]
    assert per_query.mdl([[unsure, sure, sure], [unsure, unsure, unsure]]).tolist() == [1, 0]
    # The same distribution up to which label is which and a constant: equal up to rounding.
    assert per_query.mdl([[[-0.3, -1.7, -2.0], [-2.1, -0.4, -1.8]]]).tolist() == [0]
    losses = [[2.0, 1.0, 1.0 - 1e-15], [1.0, 1.0, 1.0]]
    assert per_query.first_of_best(per_query.cone_scores(losses)).tolist() == [1, 0]


def test_cone_takes_the_cheapest_neighbours_cheapest_first() -> None:
    nll = [[3.0, 1.0, 2.0, 0.5], [1.0, 1.0, 0.0, 9.0]]
    assert per_query.cone_neighbours(nll, 2).tolist() == [[3, 1], [2, 0]]
    cheapest = per_query.first_of_best(per_query.cone_scores(nll))
    assert per_query.cone_neighbours(nll, 1)[:, 0].tolist() == cheapest.tolist()
    assert per_query.cone_neighbours(nll, 4).tolist() == [[3, 1, 2, 0], [2, 0, 1, 3]]
    for k in (0, 5):
        with pytest.raises(SparsortError, match=f"k is {k}.*1 to 4"):
            per_query.cone_neighbours(nll, k)


def test_bad_losses() -> None:
    with pytest.raises(SparsortError, match="nan for query 1, candidate 0"):
        per_query.cone_scores([[1.0, 2.0], [math.nan, 1.0]])
    with pytest.raises(SparsortError, match="no queries"):
        per_query.cone_scores(np.zeros((0, 3)))
    with pytest.raises(SparsortError, match="no sets"):
        per_query.mdl(np.zeros((2, 0, 3)))


# The choice


@given(st.lists(st.sampled_from([0.0, 0.5, 0.5 + 1e-14, 2.0, -math.inf]), min_size=1, max_size=8), st.integers(0, 50))
def test_choose_is_an_argmax_that_counts_its_ties(scores: list[float], seed: int) -> None:
    choice = choose(scores, seed=seed)
    rounded = [round(score, 9) if math.isfinite(score) else score for score in scores]
    assert rounded[choice.index] == max(rounded)
    assert choice.tied == choice.drawn == rounded.count(max(rounded))
    assert sorted(choice.ranking.tolist()) == list(range(len(scores)))
    assert [rounded[at] for at in choice.ranking] == sorted(rounded, reverse=True)
    assert choice.ranking[0] == choice.index
    assert (choice.ranking == choose(scores, seed=seed).ranking).all()


def test_ties_are_drawn_evenly_and_not_given_to_the_first() -> None:
    drawn_first = [choose([1.0, 0.0, 1.0, 1.0], seed=seed).index for seed in range(600)]
    counts = [drawn_first.count(at) for at in range(4)]
    assert counts[1] == 0
    assert all(150 < counts[at] < 250 for at in (0, 2, 3))


def test_a_second_score_breaks_ties_before_the_seed() -> None:
    choice = choose([1.0, 1.0, 0.0, 1.0], tiebreak=[0.1, 0.3, 9.0, 0.2])
    assert (choice.index, choice.tied, choice.drawn) == (1, 3, 1)
    assert choice.ranking.tolist() == [1, 3, 0, 2]
    half = {choose([1.0, 1.0, 1.0], tiebreak=[0.5, 0.5, 0.0], seed=seed).index for seed in range(20)}
    assert half == {0, 1}
    assert choose([1.0, 1.0, 1.0], tiebreak=[0.5, 0.5, 0.0]).drawn == 2


def test_the_draw_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    choose([1.0, 1.0])
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_bad_choices() -> None:
    with pytest.raises(SparsortError, match="no candidates"):
        choose([])
    with pytest.raises(SparsortError, match="NaN for candidate 1"):
        choose([1.0, math.nan])
    with pytest.raises(SparsortError, match="tiebreak has 1 numbers for 2"):
        choose([1.0, 1.0], tiebreak=[1.0])


def test_mean_ranks_and_their_average() -> None:
    assert mean_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == pytest.approx([2.5 / 3, 0.0, 2.5 / 3, 1 / 3])
    assert mean_ranks(np.array([7.0])).tolist() == [0.5]
    up, down = [1.0, 2.0, 30.0], [0.3, 0.2, 0.1]
    assert rank_average([up]) == pytest.approx([0.0, 0.5, 1.0])
    assert rank_average([up, down]) == pytest.approx([0.5, 0.5, 0.5])
    assert rank_average([up, down], weights=[1, -1]) == pytest.approx([0.0, 0.5, 1.0])
    assert rank_average([up, down], weights=[3, 1]) == pytest.approx([0.25, 0.5, 0.75])
    assert rank_average([[-math.inf, 0.0, 1e9]]) == pytest.approx([0.0, 0.5, 1.0])
    assert rank_average([[1.0, 1.0 + 1e-13]]) == pytest.approx([0.5, 0.5])


@given(SHAPES)
def test_rank_average_knows_no_unit(shape: tuple[int, int, int, int]) -> None:
    first, second = drawn(shape[0] + 1, 2, 2, shape[3])[:, :, 0].T
    expected = rank_average([first, second])
    assert rank_average([np.exp(first) * 1e6, second**3]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "weights", "message"),
    [
        ([], None, "no scores"),
        ([[1.0], [1.0, 2.0]], None, r"scores\[1\] has 2 numbers for 1"),
        ([[1.0], [math.nan]], None, r"scores\[1\] is NaN"),
        ([[1.0], [2.0]], [1.0], "weights"),
        ([[1.0], [2.0]], [0.0, 0.0], "not all 0"),
        ([[1.0], [2.0]], [math.inf, 1.0], "finite"),
    ],
)
def test_bad_rank_averages(scores: Any, weights: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        rank_average(scores, weights)


# The registry


def evidence(seed: int = 0, **changed: Any) -> Evidence:
    generator = np.random.default_rng(seed)
    held: dict[str, Any] = {
        "log_p": drawn(6, 8, 3, seed),
        "gold": generator.integers(3, size=8),
        "prior": [3, 2, 1],
        "content_free": drawn(6, 3, 3, seed + 1),
        "features": generator.uniform(0.1, 1.0, size=(6, 8, 3)),
        "bare_features": generator.uniform(0.1, 1.0, size=(8, 3)),
        "metrics": ("hoyer", "l0_relative", "l1"),
        "loss": generator.uniform(size=(6, 8)),
    }
    return Evidence(**{**held, **changed})


EXPECTED: dict[str, Callable[[Evidence], Floats]] = {
    "globale": lambda e: labels.globale(e.log_p),
    "locale": lambda e: labels.locale(e.log_p),
    "globale_unlabelled": lambda e: labels.globale(e.log_p),
    "locale_unlabelled": lambda e: labels.locale(e.log_p),
    "pdo": lambda e: labels.pdo(e.log_p),
    "pdo_prior": lambda e: labels.pdo(e.log_p, e.prior),
    "pdo_null": lambda e: labels.pdo(e.content_free),
    "best_on_dev": lambda e: labels.best_on_dev(e.log_p, e.gold),
    "best_on_dev_likelihood": lambda e: labels.gold_log_likelihood(e.log_p, e.gold),
    "density": lambda e: states.density(e.features[..., 1], denser_is_higher=True),
    "density_gain": lambda e: states.density_gain(e.features[..., 1], e.bare_features[:, 1], denser_is_higher=True),
    "density_rank": lambda e: states.density_rank(e.features[..., 1], denser_is_higher=True),
    "mdl": lambda e: per_query.mdl_scores(e.log_p),
    "cone": lambda e: -e.loss,
}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_is_its_function(name: str) -> None:
    assert criterion(name) is CRITERIA[name]
    assert CRITERIA[name].name == name
    assert CRITERIA[name].source
    assert (CRITERIA[name].scores(evidence()) == EXPECTED[name](evidence())).all()
    for need in CRITERIA[name].needs - {"sampled"}:
        with pytest.raises(SparsortError, match=f"{name!r} needs {need}, but the evidence holds"):
            CRITERIA[name].scores(evidence(**{need: None}))


@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name].chooses == "order"])
def test_every_order_criterion_chooses_its_best(name: str) -> None:
    scores = CRITERIA[name].scores(evidence(3))
    choice = CRITERIA[name].choose(evidence(3), seed=1)
    assert scores[choice.index] == pytest.approx(scores.max())


@pytest.mark.parametrize("name", CRITERIA)
def test_no_criterion_reads_more_than_it_says(name: str) -> None:
    entry = CRITERIA[name]
    fields = {"log_p", "gold", "prior", "content_free", "features", "bare_features", "loss"}
    bare = evidence(**dict.fromkeys(fields - entry.needs))
    assert (entry.scores(bare) == entry.scores(evidence())).all()
    if entry.chooses == "order":
        assert entry.choose(bare).index == entry.choose(evidence()).index


def test_best_on_dev_breaks_ties_by_likelihood() -> None:
    right = [[0.0, -1.0], [-1.0, 0.0]]
    surer = [[0.0, -2.0], [-2.0, 0.0]]
    wrong = [[-9.0, 0.0], [0.0, -9.0]]
    choice = CRITERIA["best_on_dev"].choose(Evidence(log_p=[right, wrong, surer], gold=[0, 1]))
    assert (choice.index, choice.tied, choice.drawn) == (2, 2, 1)
    assert choice.ranking.tolist() == [2, 0, 1]


def test_criteria_joined_by_their_ranks() -> None:
    joined, given_ = criterion("density + locale"), evidence(5)
    assert joined.name == "density+locale"
    assert joined.needs == {"features", "log_p", "sampled"}
    expected = rank_average([EXPECTED["density"](given_), EXPECTED["locale"](given_)])
    assert (joined.scores(given_) == expected).all()
    assert joined.choose(given_).index in np.flatnonzero(np.isclose(expected, expected.max()))
    with pytest.raises(SparsortError, match="only those that choose an order"):
        criterion("mdl+locale")
    with pytest.raises(SparsortError, match="Did you mean 'density'"):
        criterion("densty+locale")


def test_unknown_criteria_suggest_the_nearest() -> None:
    with pytest.raises(SparsortError, match=r"unknown criterion 'GlobalE\?'.*Did you mean 'globale'"):
        criterion("GlobalE?")
    with pytest.raises(SparsortError, match="unknown criterion ''"):
        criterion("")
    with pytest.raises(SparsortError, match="for every query, not an order"):
        CRITERIA["mdl"].choose(evidence())
    with pytest.raises(SparsortError, match="an order for all queries"):
        CRITERIA["pdo"].choose_by_query(evidence())


@pytest.mark.parametrize("metric", METRICS)
def test_density_knows_each_metric_s_direction(metric: str) -> None:
    features = np.array([[[0.1]], [[0.2]]])
    best = CRITERIA["density"].choose(Evidence(features=features, metrics=(metric,), metric=metric)).index
    assert best == (0 if METRICS[metric].higher_is_sparser else 1)


def test_density_of_a_metric_of_one_s_own() -> None:
    own = {"features": [[[0.1]], [[0.2]]], "metrics": ("mine",), "metric": "mine"}
    assert CRITERIA["density"].choose(Evidence(**own, denser_is_higher=False)).index == 0
    assert CRITERIA["density"].choose(Evidence(**own, denser_is_higher=True)).index == 1
    with pytest.raises(SparsortError, match="denser_is_higher="):
        CRITERIA["density"].scores(Evidence(**own))
    with pytest.raises(SparsortError, match="unknown metric 'l0_relativ'"):
        CRITERIA["density"].scores(evidence(metric="l0_relativ"))
    with pytest.raises(SparsortError, match="3 metrics, but 1 names"):
        CRITERIA["density"].scores(evidence(metrics=("hoyer",)))


def test_criteria_are_frozen() -> None:
    with pytest.raises(AttributeError):
        CRITERIA["pdo"].name = "x"  # type: ignore[misc]
    assert isinstance(CRITERIA["pdo"], Criterion)


def test_organisations_are_the_nearest_and_draws_of_all_neighbours() -> None:
    near = np.array([[9, 4, 7, 1, 3], [2, 8, 5, 0, 6]])
    sets = per_query.organisations(near, 3, seed=1, count=200)
    assert sets.shape == (2, 200, 3)
    for query in range(2):
        assert sets[query, 0].tolist() == near[query, :3].tolist()
        assert all(len(set(one)) == 3 and set(one) <= set(near[query].tolist()) for one in sets[query].tolist())
        # Every neighbour in every place, each about as often: 199 draws, 40 expected, sd 5.6.
        for place in range(3):
            counts = [int((sets[query, 1:, place] == one).sum()) for one in near[query]]
            assert min(counts) > 17
            assert max(counts) < 63
    np.testing.assert_array_equal(sets, per_query.organisations(near, 3, seed=1, count=200))
    assert (sets[:, 1:] != per_query.organisations(near, 3, seed=2, count=200)[:, 1:]).any()
    with pytest.raises(SparsortError, match="k is 6, but there are 5 neighbours"):
        per_query.organisations(near, 6, seed=0)
