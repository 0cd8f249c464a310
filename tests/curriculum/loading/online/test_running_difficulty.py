"""The running difficulty: against a plain implementation, against cuts and shuffles of what comes in, and against the truth
of simulated training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.stats import spearmanr

from sparsort.curriculum.loading.online.running_difficulty import Observations, RunningDifficulty, standard_ranks
from sparsort.errors import SparsortError

Floats = NDArray[np.float64]


def observations(rows: Any, steps: Any, values: Any) -> Observations:
    return Observations(
        rows=np.asarray(rows, dtype=np.int64),
        steps=np.asarray(steps, dtype=np.int64),
        values=np.asarray(values, dtype=np.float64),
    )


def some(rng: np.random.Generator, n_rows: int, n_steps: int, batch: int) -> Observations:
    """Batches of distinct rows with a drifting level."""
    rows = [rng.choice(n_rows, rng.integers(1, batch + 1), replace=False) for _ in range(n_steps)]
    steps = np.repeat(np.arange(n_steps) * 2, [len(part) for part in rows])
    return observations(np.concatenate(rows), steps, 0.8 + 0.01 * rng.normal(size=len(steps)) - 1e-4 * steps)


def same_bits(a: RunningDifficulty, b: RunningDifficulty, step: int) -> bool:
    return a.difficulty(step).tobytes() == b.difficulty(step).tobytes() and all(
        left.tobytes() == right.tobytes()
        for left, right in zip(a._arrays().values(), b._arrays().values(), strict=True)
    )


# Against a plain implementation


def halved(x: float) -> float:
    whole = math.floor(x)
    return 0.5**whole * (1 - (x - whole) / 2)


def plainly(
    found: Observations,
    prior: Floats,
    step: int,
    *,
    decay: float,
    half_life: float,
    window: float,
    prior_weight: float,
    trust: float,
) -> list[float]:
    """The docstring of the module, read step by step, with everything that was ever seen at hand."""
    triples = sorted(zip(found.steps.tolist(), found.rows.tolist(), found.values.tolist(), strict=True))
    seen: list[list[float]] = []  # weight, value, prior
    of_row: dict[int, list[list[float]]] = {}  # step, weight, standardised value
    for now in sorted({when for when, _, _ in triples}):
        batch = [(row, value) for when, row, value in triples if when == now]
        for entry in seen:
            entry[0] *= halved(len(batch) / window)
        seen += [[1.0, value, float(prior[row])] for row, value in batch]
        weights, values, priors = (np.array(column) for column in zip(*seen, strict=True))
        mean, prior_mean = np.average(values, weights=weights), np.average(priors, weights=weights)
        deviation = math.sqrt(np.average((values - mean) ** 2, weights=weights))
        prior_variance = np.average((priors - prior_mean) ** 2, weights=weights)
        if deviation <= 1e-12 * abs(mean):
            continue
        for row, value in batch:
            z = min(4.0, max(-4.0, (value - mean) / deviation))
            brought = trust * prior_mean + math.sqrt(trust**2 * prior_variance + 1 - trust**2) * z
            past = of_row.setdefault(row, [])
            for entry in past:
                entry[1] *= decay * halved((now - past[-1][0]) / half_life)
            past.append([now, 1.0, brought])
    result = []
    for row, own in enumerate(prior):
        total, weight = prior_weight * own, prior_weight
        if past := of_row.get(row, []):
            left = halved((step - past[-1][0]) / half_life)
            total += sum(left * w * value for _, w, value in past)
            weight += sum(left * w for _, w, _ in past)
        result.append(total / weight)
    return result


@pytest.mark.parametrize("seed", range(4))
def test_it_follows_the_formula_of_the_docstring(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = some(rng, n_rows=30, n_steps=60, batch=8)
    given_prior = rng.normal(size=30)
    options = {"decay": 0.6, "window": 20.0, "prior_weight": 0.7}
    running = RunningDifficulty(30, prior=given_prior, half_life_steps=25, prior_trust=0.8, **options)
    running.fold(found)
    expected = plainly(found, standard_ranks(given_prior).astype(float), 130, half_life=25, trust=0.8, **options)
    np.testing.assert_allclose(running.difficulty(130), expected, atol=2e-6)


# However it comes in


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 7.5, 100.0]), st.booleans(), st.data())
def test_cuts_between_steps_and_the_order_of_arrival_change_no_bit(
    seed: int, half_life: float | None, has_prior: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    found = some(rng, n_rows=12, n_steps=15, batch=6)
    options: dict[str, Any] = {"prior": rng.normal(size=12) if has_prior else None, "half_life_steps": half_life}
    whole = RunningDifficulty(12, **options)
    whole.fold(found)

    cuts = sorted(data.draw(st.sets(st.integers(0, 30), max_size=6)))
    shuffled = rng.permutation(len(found))
    left = observations(found.rows[shuffled], found.steps[shuffled], found.values[shuffled])
    piecewise = RunningDifficulty(12, **options)
    for cut in cuts:
        part, left = left.split(cut)
        piecewise.fold(part)
    piecewise.fold(left)
    assert same_bits(whole, piecewise, 40)
    assert whole.next_step == piecewise.next_step == int(found.steps.max()) + 1


def test_a_row_observed_often_in_one_fold_is_averaged_in_the_order_of_steps() -> None:
    # 600 observations of one row: turns, not just firsts and seconds.
    rng = np.random.default_rng(0)
    steps = np.repeat(np.arange(600), 2)
    found = observations(np.tile([0, 1], 600), steps, rng.normal(size=1200))
    at_once, one_by_one = RunningDifficulty(3), RunningDifficulty(3)
    at_once.fold(found)
    for step in range(600):
        one_by_one.fold(found.split(step + 1)[0].split(step)[1])
    assert same_bits(at_once, one_by_one, 600)
    assert np.count_nonzero(at_once._weight) == 2


def test_a_step_is_folded_once_and_in_order() -> None:
    running = RunningDifficulty(4)
    running.fold(observations([0, 1], [5, 5], [1.0, 2.0]))
    with pytest.raises(SparsortError, match="Gather those of every rank first"):
        running.fold(observations([2], [5], [1.0]))
    with pytest.raises(SparsortError, match="pass that step or a later one"):
        running.difficulty(5)
    running.fold(observations([], [], []))
    assert running.next_step == 6


# Prior and age


def test_what_was_not_observed_has_its_prior_and_nothing_is_nan() -> None:
    prior = np.array([3.0, np.nan, -np.inf, 7.0, np.inf, 3.0])
    running = RunningDifficulty(6, prior=prior)
    unit = math.sqrt((5 * 5 - 1) / 12)
    expected = np.array([-0.5, 0.0, -2.0, 1.0, 2.0, -0.5]) / unit
    np.testing.assert_allclose(running.difficulty(0), expected, atol=1e-7)
    running.fold(observations([0, 3], [0, 0], [1.0, 2.0]))
    after = running.difficulty(10)
    assert np.isfinite(after).all()
    np.testing.assert_allclose(after[[1, 2, 4, 5]], expected[[1, 2, 4, 5]], atol=1e-7)
    assert RunningDifficulty(3).difficulty(0).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=20))
def test_standard_ranks_are_the_mean_ranks_of_scipy(values: list[float]) -> None:
    from scipy.stats import rankdata

    n = len(values)
    expected = (rankdata(values) - (n + 1) / 2) / math.sqrt((n * n - 1) / 12)
    np.testing.assert_allclose(standard_ranks(values), expected, atol=1e-6)


def test_an_old_observation_gives_way_to_the_prior_by_half_each_half_life() -> None:
    running = RunningDifficulty(2, half_life_steps=10)
    running.fold(observations([0, 1], [0, 0], [1.0, 3.0]))
    # One observation of −1 or 1 with a prior of 0: weight w makes w / (1 + w) of it.
    for age, weight in ((0, 1.0), (10, 0.5), (20, 0.25), (15, 0.375), (10**6, 0.0)):
        expected = weight / (1 + weight)
        if age:
            np.testing.assert_allclose(running.difficulty(age), [-expected, expected], atol=1e-7)
    forever = RunningDifficulty(2)
    forever.fold(observations([0, 1], [0, 0], [1.0, 3.0]))
    assert forever.difficulty(10**9).tolist() == [-0.5, 0.5]


def test_a_newer_observation_outweighs_an_older_one() -> None:
    running = RunningDifficulty(4, window=4)
    running.fold(observations([0, 1, 2, 3] * 2, [0] * 4 + [1] * 4, [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]))
    easy_then_hard, easy, hard_then_easy, hard = running.difficulty(2)
    assert easy < hard_then_easy < 0 < easy_then_hard < hard


def test_values_that_do_not_differ_say_nothing() -> None:
    running = RunningDifficulty(5, prior=np.arange(5))
    before = running.difficulty(0)
    running.fold(observations([0, 1, 2], [0, 0, 0], [0.7, 0.7, 0.7]))
    running.fold(observations([3], [1], [0.7]))
    assert running.difficulty(2).tobytes() == before.tobytes()
    assert not running._weight.any()


def test_an_outlier_does_not_dominate_the_average() -> None:
    rows = np.arange(200)
    running = RunningDifficulty(200)
    running.fold(observations(rows, np.zeros(200), np.where(rows == 7, 1e30, rows % 2)))
    assert np.abs(running.difficulty(1)).max() <= 4.0


# Against the truth of a simulated training


def sorted_order(_rng: np.random.Generator, prior: Floats, _progress: float, step: int) -> NDArray[np.int64]:
    return np.argsort(prior)[step * 32 : (step + 1) * 32]


def from_pool(rng: np.random.Generator, prior: Floats, progress: float, _step: int) -> NDArray[np.int64]:
    return rng.choice(np.argsort(prior)[: int(len(prior) * (0.2 + 0.8 * progress))], 32, replace=False)


# Least lead in Spearman's ρ over values standardised within each step alone, and over a mean of raw values. Negative: where the
# prior knows little of the truth, trusting it half costs something.
@pytest.mark.parametrize(
    ("order", "correlation", "over_standardised", "over_raw"),
    [
        (sorted_order, 0.9, 0.5, -0.02),
        (sorted_order, 0.6, 0.15, 0.01),
        (sorted_order, 0.3, -0.05, 0.01),
        (from_pool, 0.9, 0.1, 0.2),
        (from_pool, 0.6, -0.03, 0.2),
        (from_pool, 0.3, -0.13, 0.2),
    ],
)
def test_known_difficulty_is_recovered_under_a_known_drift(
    order: Callable[..., NDArray[np.int64]], correlation: float, over_standardised: float, over_raw: float
) -> None:
    n, n_batches, epochs = 2048, 64, 3
    rng = np.random.default_rng(1)
    truth = rng.normal(size=n)
    prior = correlation * truth + math.sqrt(1 - correlation**2) * rng.normal(size=n)
    running, standardised = RunningDifficulty(n, prior=prior), RunningDifficulty(n, window=1)
    total, count = np.zeros(n), np.zeros(n)
    for step in range(n_batches * epochs):
        k, done = step % n_batches, step / (n_batches * epochs)
        rows = order(rng, prior, k / n_batches, k)
        level, scale = -20 * math.exp(-4 * done) + 0.5 * math.sin(step / 50), 0.01 * (1 + 2 * done)
        values = 0.8 + scale * (level + truth[rows] + 0.7 * rng.normal(size=32))
        found = observations(rows, np.full(32, step), values)
        running.fold(found)
        standardised.fold(found)
        total[rows] += values
        count[rows] += 1
    seen = count > 0

    def agreement(difficulty: Floats) -> float:
        return float(spearmanr(difficulty[seen], truth[seen]).statistic)

    end = n_batches * epochs
    ours = agreement(running.difficulty(end))
    assert ours > agreement(prior) + 0.04
    assert ours > agreement(standardised.difficulty(end)) + over_standardised
    assert ours > agreement(total / np.maximum(count, 1)) + over_raw


# On disk


def test_a_saved_state_continues_bit_by_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    found = some(rng, n_rows=40, n_steps=50, batch=10)
    first, second = found.split(51)
    running = RunningDifficulty(40, prior=rng.normal(size=40), half_life_steps=30.5, fingerprint="plan-1")
    running.fold(first)
    running.save(tmp_path / "running.safetensors")
    again = RunningDifficulty.load(tmp_path / "running.safetensors", fingerprint="plan-1")
    assert same_bits(running, again, 60)
    running.fold(second)
    again.fold(second)
    assert same_bits(running, again, 200)
    assert again.next_step == running.next_step
    running.save(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "running.safetensors"]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "running.safetensors"
    RunningDifficulty(3, fingerprint="one").save(path)
    with pytest.raises(SparsortError, match="belongs to the plan 'one', not to 'two'"):
        RunningDifficulty.load(path, fingerprint="two")
    assert len(RunningDifficulty.load(path)) == 3
    with pytest.raises(SparsortError, match="cannot read"):
        RunningDifficulty.load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SparsortError, match="cannot read"):
        RunningDifficulty.load(path)
    save_file(
        {"a": np.zeros(1)}, str(path), metadata={"sparsort": '{"kind": "sparsort running difficulty", "version": 99}'}
    )
    with pytest.raises(SparsortError, match="version 99"):
        RunningDifficulty.load(path)
    save_file({"a": np.zeros(1)}, str(path))
    with pytest.raises(SparsortError, match="is 'another file'"):
        RunningDifficulty.load(path)


def _folded(path: Path) -> RunningDifficulty:
    running = RunningDifficulty(40, prior=np.arange(40.0), half_life_steps=30.5, fingerprint="plan-1")
    running.fold(some(np.random.default_rng(3), n_rows=40, n_steps=50, batch=10))
    running.save(path)
    return running


def _as_before(path: Path) -> None:
    """Turn a state into what version 1 wrote."""
    with safe_open(str(path), framework="numpy") as file:
        about = json.loads(file.metadata()["sparsort"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    del about["arrays"], about["digest"]
    save_file(arrays, str(path), metadata={"sparsort": json.dumps(about | {"version": 1})})


@pytest.mark.parametrize("version", [1, 2])
def test_damage_to_a_state_is_refused_or_changes_nothing(
    version: int, tmp_path: Path, damages: Callable[[Path], Iterator[str]]
) -> None:
    path = tmp_path / "running.safetensors"
    whole = _folded(path)
    if version == 1:
        _as_before(path)
    assert same_bits(RunningDifficulty.load(path), whole, 200)
    refused = 0
    for what in damages(path):
        try:
            again = RunningDifficulty.load(path)
        except SparsortError:
            refused += 1
        else:  # a space of the header; without digests, also a bit of a number
            assert version == 1 or same_bits(again, whole, 200), what
    assert refused > (5 if version == 1 else 15)


@pytest.mark.parametrize(
    ("name", "value"), [("seen", -1), ("seen", 10_000), ("weight", -1.0), ("value", math.nan), ("value", 1e30)]
)
def test_a_state_without_digests_is_held_to_what_is_possible(name: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "running.safetensors"
    _folded(path)
    _as_before(path)
    with safe_open(str(path), framework="numpy") as file:
        metadata, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    arrays[name][3] = value
    save_file(arrays, str(path), metadata=metadata)
    with pytest.raises(SparsortError, match=r"is damaged: .* Resume from another checkpoint"):
        RunningDifficulty.load(path)


def test_a_row_takes_sixteen_bytes() -> None:
    running = RunningDifficulty(1000, prior=np.arange(1000))
    assert sum(array.nbytes for array in running._arrays().values()) <= 16 * 1000 + 64


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_rows": 0}, "n_rows is 0"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"decay": math.nan}, "decay is nan"),
        ({"half_life_steps": 0}, "half_life_steps is 0"),
        ({"window": math.inf}, "window is inf"),
        ({"prior_weight": 0}, "prior_weight is 0"),
        ({"prior_trust": 1.5}, "prior_trust is 1.5"),
        ({"prior": [1.0, 2.0]}, r"shape \(2,\); expected one difficulty per row, \(3,\)"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        RunningDifficulty(**{"n_rows": 3, **options})


@pytest.mark.parametrize("rows", [[3], [-1]])
def test_rows_that_the_data_has_not_are_refused(rows: list[int]) -> None:
    with pytest.raises(SparsortError, match="the data has rows 0 to 2"):
        RunningDifficulty(3).fold(observations(rows, [0], [1.0]))


def test_observations_are_checked() -> None:
    with pytest.raises(SparsortError, match="of equal length"):
        observations([1, 2], [0], [1.0])
    with pytest.raises(SparsortError, match="NaN or infinite"):
        observations([1], [0], [np.nan])
    assert len(Observations.join([])) == 0
    joined = Observations.join([observations([2, 1], [3, 3], [0.5, 0.25]), observations([9], [1], [1.0])]).ordered()
    assert (joined.rows.tolist(), joined.steps.tolist(), joined.values.tolist()) == (
        [9, 1, 2],
        [1, 3, 3],
        [1.0, 0.25, 0.5],
    )


def test_it_needs_no_torch() -> None:
    code = "import sys, sparsort.curriculum.loading.online.running_difficulty\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
