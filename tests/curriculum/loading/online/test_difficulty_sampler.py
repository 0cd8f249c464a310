"""DifficultySampler against scipy's Beta, hand calculations and a simulated policy, and under prefetching and resumes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsort import LengthScorer
from sparsort.curriculum.loading.online.difficulty_sampler import DifficultySampler
from sparsort.curriculum.loading.online.pass_rates import PassRatePrior
from sparsort.errors import SparsortError

Rollouts = Callable[[int, NDArray[np.int64]], NDArray[np.float64]]
N = 40


def _rewards(number: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rewards of four rollouts per row that depend on the number of the block, as those of a policy that changes."""
    rng = np.random.default_rng([7, number])
    return (rng.random(4 * len(rows)) < np.repeat((rows + 1) / (N + 1), 4)).astype(float)


def _train(
    sampler: DifficultySampler, blocks: int, *, ahead: int = 0, start: int = 0
) -> tuple[list[list[int]], dict[str, Any]]:
    """Train for some blocks with a loader that draws `ahead` blocks ahead; the blocks, and the state after the last one."""
    trained: list[list[int]] = []
    number = start
    while True:
        stream, queue = sampler.blocks(), []
        while True:
            queue += itertools.islice(stream, ahead + 1 - len(queue))
            if not queue:
                break
            rows = queue.pop(0)
            trained.append(rows.tolist())
            sampler.observe(np.repeat(rows, 4), _rewards(number, rows))
            number += 1
            if number - start == blocks:
                return trained, sampler.state_dict()


def _sampler(**options: Any) -> DifficultySampler:
    return DifficultySampler(np.arange(N)[::-1], **{"block": 4, "seed": 3, **options})


# The posterior and the weights


def test_the_posterior_is_that_of_a_hand_calculation() -> None:
    sampler = DifficultySampler(3, block=3, lag=0, half_life=2, floor=0)
    # Without a prior: Beta(1, 1), and equal weights.
    assert [each.tolist() for each in sampler.posterior()] == [[1.0] * 3, [1.0] * 3]
    (rows,) = list(sampler.blocks())
    sampler.observe([0, 0, 0, 0, 1, 1, 2], [1, 1, 1, 0, 0, 0.5, float("nan")])
    next(sampler.blocks())
    a, b = sampler.posterior()
    assert a.tolist() == [4.0, 1.5, 1.0]
    assert b.tolist() == [2.0, 2.5, 1.0]
    # Var of Bernoulli(p), p ~ Beta(a, b): E p(1 − p) = ab / ((a + b)(a + b + 1)).
    expected = np.array([8 / 42, 3.75 / 20, 1 / 6])
    assert sampler.weights() == pytest.approx(expected / expected.sum())
    assert sorted(rows.tolist()) == [0, 1, 2]
    # One epoch of one block later, and two epochs later, with a half-life of two epochs.
    sampler.observe([2], [1])
    next(sampler.blocks())
    a, b = sampler.posterior()
    assert a.tolist() == pytest.approx([1 + 3 * 0.75, 1 + 0.5 * 0.75, 2.0])
    sampler.observe([0], [0])
    next(sampler.blocks())
    a, b = sampler.posterior()
    assert (a[0], b[0]) == pytest.approx((1 + 3 * 0.5, 1 + 1 * 0.5 + 1))


@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=5), st.floats(0.05, 0.45), st.floats(0.55, 0.95))
@settings(max_examples=25, deadline=None)
def test_weights_are_those_of_scipys_beta(rates: list[float], low: float, high: float) -> None:
    rewards = np.array(rates)
    rows = np.arange(len(rewards))
    for target in ("variance", (low, high)):
        sampler = DifficultySampler(-rewards, block=len(rewards), lag=0, target=target, floor=0.25)
        next(sampler.blocks())
        sampler.observe(rows, rewards)
        next(sampler.blocks())
        beta = scipy.stats.beta(*sampler.posterior())
        variance = beta.mean() - beta.var() - beta.mean() ** 2
        weight = variance if target == "variance" else beta.cdf(high) - beta.cdf(low)
        expected = 0.25 / len(rewards) + 0.75 * weight / weight.sum()
        assert sampler.weights() == pytest.approx(expected)


def test_without_a_pilot_pass_rates_fall_with_the_rank() -> None:
    sampler = DifficultySampler([3.0, 1.0, float("nan"), 2.0, 2.0, 9.0])
    assert sampler.pass_rates() == pytest.approx([0.3, 0.9, 0.5, 0.6, 0.6, 0.1])


def test_scores_are_a_prior() -> None:
    rows = [{"id": str(n), "text": "a word " * (n + 1)} for n in range(5)]
    scores = LengthScorer().score(rows, prompt="{text}")
    sampler = DifficultySampler(scores)
    assert sampler.pass_rates() == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert (sampler.ids, sampler.id_column) == (list("01234"), "id")


def test_rows_are_drawn_in_proportion_to_their_weights() -> None:
    sampler = DifficultySampler([0.0, 1.0, 2.0, 3.0], block=2, lag=0, target=(0.0, 0.5), floor=0.1)
    expected = np.zeros((4, 4))
    w = sampler.weights()
    for first, second in itertools.permutations(range(4), 2):
        # The second row of a block is drawn from what is left.
        expected[first, second] = w[first] * w[second] / (1 - w[first])
    counts = np.zeros((4, 4))
    for _ in range(4000):
        for first, second in sampler.blocks():
            counts[first, second] += 1
    _, p = scipy.stats.chisquare(counts[expected > 0], (expected * counts.sum())[expected > 0])
    assert counts.sum() == 8000
    assert p > 0.001


def test_no_prompt_starves_above_the_floor() -> None:
    sampler = DifficultySampler(N, block=4, floor=0.2, half_life=None)
    for _ in range(600):
        rows = next(sampler.blocks())
        # Only row 0 is ever uncertain.
        sampler.observe(np.repeat(rows, 8), np.repeat(np.where(rows == 0, 0.5, 1.0), 8))
    assert sampler.weights().min() >= 0.2 / N
    assert sampler.weights()[0] > 10 * sampler.weights()[1:].max()


def test_the_posterior_mean_converges_to_the_pass_rate() -> None:
    rates = np.linspace(0.02, 0.98, N)
    sampler = DifficultySampler(np.random.default_rng(0).normal(size=N), block=8, half_life=None)
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(4):
        for _ in range(50 * 5):
            rows = next(sampler.blocks())
            sampler.observe(np.repeat(rows, 8), rng.random(64) < np.repeat(rates[rows], 8))
        errors.append(np.abs(sampler.pass_rates() - rates).max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_old_evidence_gives_way_to_a_policy_that_learned() -> None:
    def after_learning(half_life: float | None) -> float:
        sampler = DifficultySampler(4, block=4, half_life=half_life)
        for number in range(40):
            rows = next(sampler.blocks())
            sampler.observe(rows, np.full(4, float(number >= 30)))
        return float(sampler.pass_rates().mean())

    assert after_learning(3.0) > 0.65 > 0.35 > after_learning(None)


# The prior


def test_fit_finds_the_curve_and_the_strength_that_made_a_pilot() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(5, 2, size=4000)
    mean = 1 / (1 + np.exp(-(4 - 0.8 * difficulty)))
    rates = rng.binomial(8, rng.beta(6 * mean, 6 * (1 - mean))) / 8
    prior = PassRatePrior.fit(difficulty, rates, 8)
    assert (prior.intercept, prior.slope) == pytest.approx((4, -0.8), rel=0.05)
    assert prior.strength == pytest.approx(6, rel=0.15)
    # The oracle of the likelihood: no strength of a grid is better.
    m, k = prior.means(difficulty), np.round(rates * 8)
    likelihood = {
        s: scipy.stats.betabinom(8, s * m, s * (1 - m)).logpmf(k).sum() for s in (1, 3, prior.strength, 9, 20)
    }
    assert max(likelihood, key=lambda s: likelihood[s]) == prior.strength


def test_a_score_that_says_nothing_gives_a_flat_and_weak_prior() -> None:
    rng = np.random.default_rng(0)
    rates = rng.binomial(8, rng.beta(0.5, 0.5, size=500)) / 8
    prior = PassRatePrior.fit(rng.normal(size=500), rates, 8)
    assert np.ptp(prior.means([-2.0, 2.0])) < 0.15
    assert prior.strength < 2


def test_a_pilot_that_always_passes_leaves_room_for_failures() -> None:
    sampler = DifficultySampler([1.0, 2.0, 3.0]).fit([1.0, 2.0], [1.0, 1.0], rollouts=[4, 4])
    assert ((sampler.pass_rates() > 0.8) & (sampler.pass_rates() < 1)).all()


def test_prompts_without_a_score_get_the_mean_of_the_pilot() -> None:
    sampler = DifficultySampler([1.0, float("nan")]).fit([1, 2, float("nan")], [1, 0.5, 0], rollouts=4)
    assert sampler.pass_rates()[1] == pytest.approx((6 + 0.5) / (8 + 1))


@pytest.mark.parametrize(
    ("pilot", "message"),
    [
        (([1, 2], [0.5], 4), "one of each per prompt"),
        (([1, 2], [0.5, 1.5], 4), r"not in \[0, 1\]"),
        (([1, 2], [0.5, 1], 0), "at least 1"),
        (([1, 2], [0.5, 1], 1), "one with two rollouts"),
        (([1, float("nan")], [0.5, 1], 8), "at least two prompts"),
    ],
)
def test_a_pilot_that_cannot_be_fitted_is_refused(pilot: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        DifficultySampler([1.0, 2.0]).fit(*pilot[:2], rollouts=pilot[2])


# Draws


def test_draws_do_not_depend_on_how_far_a_loader_draws_ahead() -> None:
    runs = [_train(_sampler(lag=3), 35, ahead=ahead)[0] for ahead in range(4)]
    assert all(run == runs[0] for run in runs)
    assert all(len(set(block)) == 4 for block in runs[0])


def test_a_loader_that_draws_too_far_ahead_is_refused() -> None:
    with pytest.raises(SparsortError, match=r"3 blocks were drawn before .* block 0 .* lag=2"):
        _train(_sampler(lag=2), 5, ahead=3)


@given(st.integers(1, 34), st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_a_resume_after_any_block_draws_the_rest(stop: int, before: int, after: int) -> None:
    whole, _ = _train(_sampler(lag=2), 35)
    first, state = _train(_sampler(lag=2), stop, ahead=before)
    resumed = _sampler(lag=2)
    resumed.load_state_dict(state)
    rest, _ = _train(resumed, 35 - stop, ahead=after, start=stop)
    assert first + rest == whole


def test_a_state_contains_the_calibrated_prior() -> None:
    fitted = _sampler().fit([0.0, 20.0, 39.0], [1.0, 0.5, 0.0], rollouts=8)
    whole, _ = _train(fitted, 20)
    again = _sampler().fit([0.0, 20.0, 39.0], [1.0, 0.5, 0.0], rollouts=8)
    _, state = _train(again, 7)
    resumed = _sampler()
    resumed.load_state_dict(state)
    assert _train(resumed, 13, start=7)[0] == whole[7:]
    assert resumed.strength == fitted.strength


def test_the_order_in_which_ranks_deliver_rewards_has_no_effect() -> None:
    one, other = _sampler(lag=0), _sampler(lag=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = next(one.blocks())
        assert rows.tolist() == next(other.blocks()).tolist()
        many, rewards = np.repeat(rows, 8), rng.random(32)
        shuffled = rng.permutation(32)
        one.observe(many, rewards)
        other.observe(many[shuffled], rewards[shuffled])
    assert [a.tobytes() for a in one.posterior()] == [a.tobytes() for a in other.posterior()]


def test_without_rewards_it_is_a_plain_sampler_that_resumes() -> None:
    sampler = _sampler(block=1)
    whole = [*sampler, *sampler]
    assert len(sampler) == N
    assert len(whole) == 2 * N
    for stop in (1, N - 1, N, N + 5):
        before = _sampler(block=1)
        stream = itertools.chain(before, before)
        head = list(itertools.islice(stream, stop))
        after = _sampler(block=1)
        after.load_state_dict(before.state_dict())
        rest = list(after) + (list(after) if stop < N else [])
        assert head + rest == whole


def test_no_global_random_state_is_used() -> None:
    state = np.random.get_state()
    _train(_sampler(), 12)
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(state, after, strict=True))


def test_set_epoch_skips_nothing_where_a_trainer_calls_it() -> None:
    plain, called = _sampler(), _sampler()
    for epoch in range(3):
        called.set_epoch(epoch)
        assert list(called) == list(plain)
        called.set_epoch(epoch)
    called.set_epoch(7)
    assert called.epoch == 7
    assert len(list(called)) == len(called)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": N + 1}, "block is 41"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"half_life": 0}, "half_life is 0"),
        ({"target": (0.8, 0.2)}, "target is"),
        ({"target": "band"}, "target is 'band'"),
        ({"target": ("a", "b")}, "target is"),
        ({"floor": "a"}, "floor is 'a'"),
        ({"half_life": "1"}, "half_life is '1'"),
        ({"lag": -1}, "lag is -1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        _sampler(**options)


def test_observations_that_cannot_belong_to_a_block_are_refused() -> None:
    sampler = _sampler()
    with pytest.raises(SparsortError, match="more often than blocks were drawn"):
        sampler.observe([0], [1])
    rows = next(sampler.blocks())
    stranger = int(np.setdiff1d(np.arange(N), rows)[0])
    with pytest.raises(SparsortError, match=f"row {stranger} is not one of block 0"):
        sampler.observe([stranger], [1])
    with pytest.raises(SparsortError, match="a reward is 2"):
        sampler.observe(rows, [0, 1, 2, 0])
    with pytest.raises(SparsortError, match=r"a reward is 1\.0000001;"):
        sampler.observe(rows, [0, 1, 1.0000001, 0])
    with pytest.raises(SparsortError, match="4 rows and 1 rewards"):
        sampler.observe(rows, [0])
    with pytest.raises(SparsortError, match="fit must come before"):
        sampler.fit([1, 2], [0, 1], rollouts=2)


def test_states_of_another_sampler_are_refused() -> None:
    state = _sampler().state_dict()
    with pytest.raises(SparsortError, match=r"other settings \(floor 0.1 → 0.2\)"):
        _sampler(floor=0.2).load_state_dict(state)
    with pytest.raises(SparsortError, match="40 prompts and this sampler 41"):
        DifficultySampler(41, block=4, seed=3).load_state_dict(state)
    for wrong in ({}, None, {"version": 1}):
        with pytest.raises(SparsortError, match="not a whole state"):
            _sampler().load_state_dict(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [["a"], {"a": 1}, True, 0, None])
def test_a_prior_without_numbers_is_refused(wrong: Any) -> None:
    with pytest.raises(SparsortError, match="expected scores, one difficulty per prompt, or the number of prompts"):
        DifficultySampler(wrong)


def test_a_resume_keeps_the_lag_of_the_state_if_training_draws_no_further_ahead() -> None:
    def configured(lag: int) -> DifficultySampler:
        sampler = _sampler()
        sampler.configure(lag=lag)
        return sampler

    whole, _ = _train(configured(3), 35, ahead=3)
    _, state = _train(configured(3), 7, ahead=3)
    fewer = configured(1)
    fewer.load_state_dict(state)
    assert fewer.lag == 3
    assert _train(fewer, 28, ahead=1, start=7)[0] == whole[7:]
    with pytest.raises(SparsortError, match=r"written with lag=3, and training now draws 4 blocks ahead.*workers"):
        configured(4).load_state_dict(state)
    with pytest.raises(SparsortError, match="lag 3 → 5"):
        _sampler(lag=5).load_state_dict(state)


def test_a_block_is_filled_up_if_too_few_prompts_are_in_the_band() -> None:
    sampler = DifficultySampler(6, block=4, lag=0, floor=0, target=(0.999999, 1.0), half_life=None)
    first = next(sampler.blocks())
    sampler.observe(np.repeat(first, 2000), np.zeros(8000))
    second = next(sampler.blocks())
    # The two others come first.
    assert set(second[:2].tolist()) == set(range(6)) - set(first.tolist())
    assert len(set(second.tolist())) == 4
