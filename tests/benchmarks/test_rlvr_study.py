"""The task and the arithmetic of the study of prompt selection for RL."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

ROOT = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    paths = [str(ROOT / "studies" / "rlvr"), str(ROOT)]
    sys.path[:0] = paths
    try:
        yield importlib.import_module("rlvr_study")
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in ("rlvr_study", "rlvr_task", "common"):
            sys.modules.pop(name, None)


def test_answers_are_reversed_prompts(study: Any) -> None:
    strings = study.make_strings(np.array([1, 3, 12]), np.random.default_rng(0))
    for prompt, answer, length in zip(strings.prompts, strings.answers, strings.lengths.tolist(), strict=True):
        digits = [token for token in prompt.tolist() if token < 10]
        assert len(digits) == length
        assert answer.tolist() == digits[::-1] + [10] * (12 - length)


def test_pass_rates_are_those_of_sampling(study: Any) -> None:
    policy = study.Policy(0, 1e-3)
    strings = study.make_strings(np.full(2, 1), np.random.default_rng(0))
    expected = policy.pass_rates(strings)
    many = strings.at(np.repeat([0, 1], 1000))
    answers, rewards = policy.answer(many, torch.Generator().manual_seed(0))
    assert ((answers == many.answers).all(1).numpy() == (rewards == 1)).all()
    assert rewards.reshape(2, 1000).mean(1) == pytest.approx(expected, abs=0.05)


def test_all_arms_use_the_same_number_of_rollouts(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "STEPS", 10)
    monkeypatch.setattr(study, "WARM_STEPS", 2)
    monkeypatch.setattr(study, "PROMPTS", 40)
    monkeypatch.setattr(study, "TEST_PER_LENGTH", 2)
    world = study.World(0)
    for arm in ("uniform", "prior", "sampler", "sampler_prior"):
        run = study.run_arm(arm, world)
        assert run["rollouts"] == 10 * 8 * 8
        assert len(run["test"]) == 10
        # The evaluations before the end of a pilot of 32 prompts see the warm policy.
        warm = float(world.warm.pass_rates(world.test).mean())
        assert [value == warm for value in run["test"][:4]] == [
            arm in ("prior", "sampler_prior") or n == 0 for n in range(4)
        ]


def test_differences_are_paired_over_seeds(study: Any) -> None:
    rng = np.random.default_rng(0)
    tests = {f"{seed}/{arm}": {"test": rng.random(10).tolist()} for seed in study.SEEDS for arm in study.ARMS}
    results = {"runs": tests}
    first, second = (
        np.array([100 * np.mean(tests[f"{seed}/{arm}"]["test"]) for seed in study.SEEDS]) for arm in study.PAIRS[0]
    )
    mean, low, high, p = study.differences(results, study.area)[0]
    oracle = scipy.stats.ttest_rel(first, second)
    interval = oracle.confidence_interval(0.95)
    assert (mean, low, high, p) == pytest.approx(((first - second).mean(), interval.low, interval.high, oracle.pvalue))
