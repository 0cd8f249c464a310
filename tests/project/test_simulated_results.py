"""Simulated results have the effects that they claim."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_results import ARMS, TASKS, simulate

from sparsort.errors import SparsortError


def test_an_arm_gains_its_stated_effect() -> None:
    effects = {"globale": 0.1, "u_shape": -0.05, "random_scores": 0.0}
    results = simulate(["sst5", "trec"], shots=(4,), sets=150, orders=6, items=600, arms=list(effects), effects=effects)
    for group in results.cells:
        base_SQ = group.random_correct.mean(axis=0)
        for arm in group.arms:
            gain_SQ = arm.correct - base_SQ
            error = np.sqrt(sum(gain_SQ.mean(axis=axis).var(ddof=1) / gain_SQ.shape[1 - axis] for axis in (0, 1)))
            assert abs(gain_SQ.mean() - effects[arm.name] * TASKS[group.task].scale) < 4 * error, (
                group.title,
                arm.name,
            )


def test_oracles_are_the_best_and_the_worst_of_the_random_orders() -> None:
    (group,) = simulate(["mr"], shots=(2,), sets=4, orders=5, items=20, calibrated=(False,)).cells
    accuracy_RS = group.random_correct.mean(axis=2)
    np.testing.assert_array_equal(group.arm("oracle_best").accuracy, accuracy_RS.max(axis=0))
    np.testing.assert_array_equal(group.arm("oracle_worst").accuracy, accuracy_RS.min(axis=0))


def test_equal_arguments_give_equal_results_and_calibration_shares_sets_and_items() -> None:
    one, two, other = (
        simulate(["cb"], shots=(2,), sets=2, orders=2, items=99, arms=["pdo"], seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.cells[0].arms[0].log_p, two.cells[0].arms[0].log_p)
    assert not np.array_equal(one.cells[0].arms[0].log_p, other.cells[0].arms[0].log_p)
    off, on = one.cells
    assert (off.sets, off.items, off.gold) == (on.sets, on.items, on.gold)
    assert len(off.items) == 56


def test_predictions_are_the_labels_of_highest_score() -> None:
    (group,) = simulate(["trec"], shots=(2,), sets=2, orders=2, items=30, arms=list(ARMS), calibrated=(True,)).cells
    for arm in (*group.random, *group.arms):
        np.testing.assert_array_equal(arm.predicted, arm.log_p.argmax(axis=2))
        np.testing.assert_allclose(np.exp(arm.log_p).sum(axis=2), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tasks": ["mrr"]}, "Did you mean 'mr'"), ({"arms": ["pda"]}, "Did you mean 'pdo'"), ({"sets": 0}, "at least 1")],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        simulate(**arguments)  # type: ignore[arg-type]
