"""Mode and budget by step."""

from __future__ import annotations

from typing import Any

import pytest

from sparsort.attention.training.schedule import SparseSchedule
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import FixedBudget, ThresholdBudget, TopPBudget


def test_without_settings_it_is_sparse_from_the_first_step() -> None:
    final = FixedBudget(blocks=3)
    assert [SparseSchedule().full(step) for step in range(3)] == [False] * 3
    assert all(SparseSchedule().budget(step, final) is final for step in range(3))


def test_after_the_warm_up_the_budget_goes_from_the_start_to_the_configured_one() -> None:
    schedule = SparseSchedule(warmup_steps=2, start=10, anneal_steps=4)
    assert [schedule.full(step) for step in range(4)] == [True, True, False, False]
    blocks = [schedule.budget(step, FixedBudget(blocks=2)).slots for step in range(9)]
    assert blocks == [10, 10, 10, 8, 6, 4, 2, 2, 2]
    upward = [SparseSchedule(start=1, anneal_steps=3).budget(step, FixedBudget(blocks=4)).slots for step in range(5)]
    assert upward == [1, 2, 3, 4, 4]


def test_shares_go_the_same_way_and_end_exactly() -> None:
    schedule = SparseSchedule(start=0.5, anneal_steps=2)
    threshold = ThresholdBudget(threshold=0.1, most=7)
    assert schedule.budget(0, threshold) == ThresholdBudget(threshold=0.5, most=7)
    assert schedule.budget(1, threshold) == ThresholdBudget(threshold=0.3, most=7)
    assert schedule.budget(2, threshold) is threshold
    assert schedule.budget(1, TopPBudget(p=1.0, most=7)) == TopPBudget(p=0.75, most=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps is .*; expected a whole number"),
        ({"warmup_steps": True}, "warmup_steps is .*; expected a whole number"),
        ({"anneal_steps": 1.5, "start": 3}, "anneal_steps is .*; expected a whole number"),
        ({"start": 4}, "belong together"),
        ({"anneal_steps": 4}, "belong together"),
        ({"start": 0, "anneal_steps": 4}, "start is .*; expected a number above 0"),
        ({"start": float("nan"), "anneal_steps": 4}, "start is .*; expected a number above 0"),
        ({"start": "8", "anneal_steps": 4}, "start is .*; expected a number above 0"),
    ],
)
def test_an_impossible_schedule_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        SparseSchedule(**settings)


def test_a_start_that_does_not_fit_the_budget_is_refused() -> None:
    with pytest.raises(SparsortError, match="not a number of blocks"):
        SparseSchedule(start=0.5, anneal_steps=4).budget(0, FixedBudget(blocks=4))
    with pytest.raises(SparsortError, match="threshold"):
        SparseSchedule(start=4, anneal_steps=4).budget(0, ThresholdBudget(threshold=0.1, most=4))
