"""The table of criteria: every criterion is its function, reads only what it needs, and chooses its best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drawn_scores import Floats, drawn

from sparsort.curriculum.demos.criteria import CRITERIA, Criterion, Evidence, criterion
from sparsort.curriculum.demos.criteria import density as states
from sparsort.curriculum.demos.criteria import label_criteria as labels
from sparsort.curriculum.demos.criteria import mdl_and_cone as per_query
from sparsort.curriculum.demos.criteria.ranking import rank_average
from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.metrics import METRICS


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
