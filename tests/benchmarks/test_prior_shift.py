"""The shift test of PDO's priors: its resampling, its losses, BBSE, and the section that is written from it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsort.curriculum.demos.criteria.distributions import log_softmax

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "studies" / "ordering"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts' modules. Their folder is on the path while they are imported, as it does for a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("prior_shift", "prior_shift_estimators", "prior_shift_page")
        return SimpleNamespace(**{name.removeprefix("prior_"): importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


def case(task: str = "mr", seed: int = 0, k: int = 4) -> Any:
    """A demonstration set of three labels whose test rows 2 of 60 have the last; order 1 of 4 is the best one."""
    rng = np.random.default_rng(seed)
    gold, dev_gold = np.repeat([0, 1, 2], [40, 18, 2]), np.arange(32) % 3

    def scores(of: Any) -> Any:
        return rng.normal(size=(4, len(of), 3)) + np.array([1.0, 4.0, 0.0, 1.0])[:, None, None] * np.eye(3)[of]

    test = SimpleNamespace(log_p=scores(gold))
    return SimpleNamespace(
        task=task,
        seed=seed,
        k=k,
        cell=(task, k),
        gold=gold,
        dev_gold=dev_gold,
        prior=np.array([50.0, 30.0, 20.0]),
        test=test,
        dev=SimpleNamespace(log_p=scores(dev_gold)),
        right=test.log_p.argmax(axis=2) == gold,
    )


def test_a_label_gets_80_percent_and_the_others_keep_their_proportions(scripts: Any) -> None:
    np.testing.assert_allclose(scripts.shift.shifted(np.array([0.5, 0.3, 0.2]), 2), [0.125, 0.075, 0.8])
    assert len(scripts.shift.shifts(3)) == 7


def test_rows_repeat_only_where_a_label_has_too_few(scripts: Any) -> None:
    gold = np.repeat([0, 1], [100, 3])
    rows = scripts.shift.draw(gold, np.arange(103), np.array([0.5, 0.5]), 40, np.random.default_rng(0))
    assert len(rows) == 40
    of_first = rows[gold[rows] == 0]
    assert len(set(of_first.tolist())) == len(of_first)
    # A label without rows takes none.
    rows = scripts.shift.draw(gold[:100], np.arange(100), np.array([0.2, 0.8]), 30, np.random.default_rng(0))
    assert len(rows) == 30


def test_parts_are_disjoint_and_have_every_label(scripts: Any) -> None:
    gold = np.repeat([0, 1], [20, 4])
    parts = scripts.shift.thirds(gold, np.random.default_rng(1))
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    assert all(set(gold[part].tolist()) == {0, 1} for part in parts)


def test_samples_have_the_shares_of_their_shift(scripts: Any) -> None:
    one, shift = case(), scripts.shift.Shift
    every = log_softmax(np.concatenate([one.test.log_p, one.dev.log_p], axis=1))
    for kind, pool, target in (
        ("none", [0.5, 0.3, 0.2], [2 / 3, 0.3, 1 / 30]),
        ("pool", [0.125, 0.075, 0.8], [2 / 3, 0.3, 1 / 30]),
        ("queries", [0.5, 0.3, 0.2], [0.2 * 40 / 58, 0.2 * 18 / 58, 0.8]),
    ):
        (sample,) = scripts.shift.samples(one, shift(kind, 2 if kind != "none" else -1), 1, from_pool=False)
        np.testing.assert_allclose(sample.pool, pool)
        np.testing.assert_allclose(sample.target, target)
        assert sample.queries.shape == (4, 32, 3)
        assert sample.labelled.shape == (4, 64, 3)
        # Even by label as far as the pool allows, and the scores belong to the labels.
        assert np.bincount(sample.gold).min() >= 20
        known = {tuple(row) for row in every[1].tolist()}
        assert {tuple(row) for row in sample.labelled[1].tolist()} <= known
        assert (sample.labelled[1].argmax(axis=1) == sample.gold).mean() > 0.9
        # The held-out accuracy is a mean of the labels' accuracies at the queries' shares.
        assert ((sample.accuracy >= 0) & (sample.accuracy <= 1)).all()
        assert sample.accuracy.argmax() == 1
    same = [next(scripts.shift.samples(one, shift("queries", 1), 1, from_pool=False)) for _ in range(2)]
    np.testing.assert_array_equal(same[0].queries, same[1].queries)


def test_losses_are_against_the_better_of_the_two_by_their_means(scripts: Any) -> None:
    shift = scripts.shift.Shift("pool", 0)
    found = {
        ("mr", 0, shift): {"uniform": np.array([1.0]), "pool": np.array([4.0]), "ours": np.array([2.0])},
        ("mr", 1, shift): {"uniform": np.array([5.0]), "pool": np.array([0.0]), "ours": np.array([2.5])},
        ("mr", 0, scripts.shift.Shift("none")): {"uniform": np.array([9.0]), "pool": np.array([9.0])},
    }
    lost = scripts.shift.losses(found)
    assert set(lost) == {("mr", 0, shift), ("mr", 1, shift)}
    assert [float(lost["mr", seed, shift]["ours"][0]) for seed in (0, 1)] == [-1.0, 2.5]
    assert float(lost["mr", 1, shift]["uniform"][0]) == 0.0


@pytest.mark.parametrize("true", [(0.2, 0.8), (0.5, 0.5), (0.9, 0.1)])
def test_bbse_recovers_shares(scripts: Any, true: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    gold, asked = np.arange(2000) % 2, rng.choice(2, size=2000, p=true)
    labelled, queries = (
        log_softmax(rng.normal(size=(2, 2000, 2)) + 4 * np.eye(2)[of] + [1, 0]) for of in (gold, asked)
    )
    found = scripts.shift_estimators.shares_by_bbse(queries, labelled, gold)
    assert found.sum() == pytest.approx(1.0)
    # The ridge draws the estimate towards uniform.
    np.testing.assert_allclose(found, true, atol=0.05)
    # Without rows of a label it cannot be told from the mean; without any difference all is uniform.
    flat = np.full((2, 100, 2), np.log(0.5))
    np.testing.assert_allclose(scripts.shift_estimators.shares_by_bbse(flat, flat, gold[:100]), [0.5, 0.5])


def test_the_nearest_point_of_the_simplex(scripts: Any) -> None:
    to_simplex = scripts.shift_estimators.to_simplex
    np.testing.assert_allclose(to_simplex(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])
    np.testing.assert_allclose(to_simplex(np.array([2.0, 0.0])), [1.0, 0.0])
    np.testing.assert_allclose(to_simplex(np.array([0.9, 0.5])), [0.7, 0.3])


def test_the_page_has_every_prior_and_the_default_is_bold(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scripts.shift, "RESAMPLES", 1)
    monkeypatch.setattr(scripts.shift, "TASKS", ("mr",))
    monkeypatch.setattr(scripts.shift, "TUNED", 1)
    names = ("uniform", "pool", "estimated (EM)", "BBSE", "LocalE")
    monkeypatch.setattr(scripts.shift, "ESTIMATES", {name: scripts.shift.ESTIMATES[name] for name in names[2:4]})
    cases = [case(seed=seed) for seed in range(4)]
    some = {name: scripts.shift.ORDERERS[name] for name in names}
    whole = {
        "protocol": {"sets": 4, "resamples": 1, "queries": 32, "labelled_rows": 64, "seeds_for_tuning": 1},
        "queries": scripts.shift.table(scripts.shift.gains(cases, some, from_pool=False)),
        "pool_rows": scripts.shift.table(scripts.shift.gains(cases, scripts.shift.FROM_POOL, from_pool=True)),
        "error_of_shares": scripts.shift.errors(cases),
        "machine": {"cpu": "a CPU", "cores": 2},
        "command": "python benchmarks/studies/ordering/prior_shift.py",
    }
    (tmp_path / "found.json").write_text(json.dumps(whole), encoding="utf-8")
    text = scripts.shift_page.section(tmp_path / "found.json")
    assert text.startswith("## Which prior\n")
    assert "| **estimated (EM)** |" in text
    assert "| **uniform and pool, averaged** |" in text
    assert all(f"| {name} |" in text.replace("**", "") for name in names)
    # Against the better of the two, for every shift by itself, neither can win.
    for name in ("uniform", "pool"):
        assert whole["queries"][name]["loss"][0] >= 0
