"""Plans have the effects that the literature reports on a small network: `curriculum_toys.py` with fewer seeds."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks" / "studies" / "curriculum")


@pytest.fixture(scope="module")
def toys() -> Iterator[Any]:
    sys.path.insert(0, BENCHMARKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("curriculum_toys")
    torch.set_num_threads(threads)
    sys.path.remove(BENCHMARKS)
    for name in ("curriculum_toys", "common"):
        sys.modules.pop(name, None)


def arms(toys: Any, *pacings: tuple[float, float]) -> tuple[Any, ...]:
    """Every order with these pacings only, which takes half of the time.

    They are the best of the benchmark's nine for one order each, on the tuning seeds of the test: the same pacings are chosen,
    and the numbers are those of all nine.
    """
    assert set(pacings) <= set(toys.PACINGS)
    return tuple(itertools.product(toys.ORDERS, pacings))


def test_with_flipped_labels_and_few_steps_a_curriculum_wins_and_anti_curriculum_is_worst(
    toys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys, "ARMS", arms(toys, (1.6, 0.4), (0.4, 0.2), (0.8, 0.8)))
    runs = [toys.run(seed, toys.SETTINGS[toys.SHORT]) for seed in range(18)]
    found = toys.compared(runs[:6], runs[6:])
    assert found["own_curriculum_over_random"].low > 0
    assert found["same_curriculum_over_random"].low > 0
    assert found["same_random_over_anti"].low > 10
    # What it goes by: the reference networks, which never saw the hidden labels, find the flipped rows.
    assert all(run.flips_found > 0.95 for run in runs)


@pytest.mark.slow
def test_on_clean_labels_with_a_full_budget_orders_are_within_a_point(
    toys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys, "ARMS", arms(toys, (0.4, 0.8), (0.8, 0.4), (0.8, 0.2)))
    # Not with fewer steps: at 400 the curriculum is a point below random order.
    runs = [toys.run(seed, toys.SETTINGS[toys.FULL]) for seed in range(5)]
    found = toys.compared(runs[:2], runs[2:])
    assert all(abs(one.mean) < toys.MARGIN for name, one in found.items() if name.startswith("own"))


def test_networks_side_by_side_train_as_they_would_alone(toys: Any) -> None:
    training, _, test = toys.split(0, 0.4)
    batches = np.random.default_rng(0).integers(0, toys.TRAIN, size=(3, 20, toys.BATCH))
    together = toys.forward(toys.train(training, batches, 1), test.inputs.expand(3, -1, -1))
    for number in range(3):
        alone = toys.forward(toys.train(training, batches[number : number + 1], 1), test.inputs[None])
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_curriculum_draws_from_the_easy_share_and_its_anti_curriculum_from_the_hard(toys: Any) -> None:
    difficulty = np.random.default_rng(0).permutation(toys.TRAIN).astype(float)
    a, b, steps = 1.6, 0.2, 50
    easy, hard = (toys.paced(difficulty, order, (a, b), steps, 0) for order in ("easy_to_hard", "hard_to_easy"))
    allowed = np.ceil(toys.TRAIN * (b + (1 - b) * np.arange(steps) / (a * steps)))
    assert (difficulty[easy].max(axis=1) < allowed).all()
    assert (difficulty[hard].min(axis=1) >= toys.TRAIN - allowed).all()
    assert easy.shape == hard.shape == (steps, toys.BATCH)
    assert difficulty[easy[-10:]].max() > difficulty[easy[:10]].max()


def test_labels_of_test_rows_are_kept_and_the_others_are_flipped_alike(toys: Any) -> None:
    clean, noisy = toys.split(3, 0.0), toys.split(3, 0.4)
    for before, after in zip(clean, noisy, strict=True):
        assert torch.equal(before.inputs, after.inputs)
        assert torch.equal(before.labels != after.labels, after.flipped)
    shares = [float(part.flipped.double().mean()) for part in noisy]
    assert shares[0] == pytest.approx(0.4, abs=0.06)
    assert shares[1] == pytest.approx(0.4, abs=0.1)
    assert shares[2] == 0
