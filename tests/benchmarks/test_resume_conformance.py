"""Our own loader and trainer pass the conformance suite for resuming, and the suite notices what it must."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "checks" / "resume_conformance"


@pytest.fixture(scope="module")
def suite() -> Iterator[Any]:
    names = ("conformance", "loaders", "trainers")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _random_state_put_back() -> Iterator[None]:
    """Trainer seeds the global generators on purpose."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def test_our_loader_passes_every_case(suite: Any) -> None:
    conformance = suite["conformance"]
    results = conformance.check([suite["loaders"].SparsortLoader()])
    assert results.failures() == []
    assert len(results.outcomes["`CurriculumLoader`"]) == len(conformance.CASES)


def test_our_trainer_passes_cases_in_one_process(suite: Any) -> None:
    conformance = suite["conformance"]
    cases = [case for case in conformance.CASES if case.name in ("later epoch", "epoch boundary", "packing")]
    results = conformance.check([suite["trainers"].SparsortTrainer()], cases)
    assert results.failures() == []
    assert len(results.outcomes["`CurriculumTrainer`"]) == 3


def test_each_criterion_is_noticed(suite: Any) -> None:
    conformance = suite["conformance"]
    # Three epochs of two batches each.
    whole = [[0, 1], [2, 3], [1, 2], [3, 0], [3, 2], [1, 0]]
    assert conformance.compare(whole, whole[:3], whole[3:]).passed
    assert conformance.compare(whole, whole[:3], [[0, 3], *whole[4:]]).broken == ("order",)
    assert conformance.compare(whole, whole[:3], [[2, 0], *whole[4:]]).broken == ("order", "repeated", "lost")
    assert conformance.compare(whole, whole[:3], [[3], *whole[4:]]).broken == ("order", "lost")
    # At a boundary, the epoch that repeats an earlier one has all ids, in another order.
    assert conformance.compare(whole, whole[:2], whole[:2] + whole[4:]).broken == ("order",)
    # An epoch later, only the order can tell.
    assert conformance.compare(whole, whole[:3], [whole[3], *whole[:2]]).broken == ("order",)


def test_the_error_of_a_system_is_its_outcome(suite: Any) -> None:
    conformance = suite["conformance"]

    class Failing:
        name, packages, supports = "failing", (), conformance.PLAIN

        def run(self, setup: Any, *, stop: int | None = None, state: Any = None) -> Any:
            if state is not None:
                raise KeyError("position")
            return [[0]] * (6 if stop is None else stop), {}

    results = conformance.check([Failing()])
    assert set(results.outcomes["failing"]) == conformance.PLAIN
    assert {outcome.error for outcome in results.outcomes["failing"].values()} == {"KeyError: 'position'"}
