"""The independent oracle of the sparsity metrics, and the rows that every implementation must get right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch


def _plain_metrics(row: np.ndarray, tau: float = 1.0) -> dict[str, float]:
    """Each metric of one row in float64 as its definition reads, sharing no code or formula with the library."""
    from scipy import stats

    h = np.asarray(row, dtype=np.float64)
    a = np.abs(h)
    d = len(a)
    unit = a / a.max()
    energy = unit**2
    descending, descending_energy = np.sort(unit)[::-1], np.sort(energy)[::-1]
    metrics = {}
    for percent in (1, 5, 10):
        k = max(1, percent * d // 100)
        metrics[f"top{percent}_energy"] = descending_energy[:k].sum() / energy.sum()
        metrics[f"top{percent}_magnitude"] = descending[:k].sum() / unit.sum()
    if len(set(a)) == 1:
        metrics["l0_relative"] = 0.0
    else:
        metrics["l0_relative"] = float(np.mean(unit > unit.mean() + unit.std(ddof=1)))
    metrics["l0_absolute"] = float(np.mean(a > tau))
    l1, l2 = np.linalg.norm(unit, 1), np.linalg.norm(unit, 2)
    metrics["hoyer"] = (np.sqrt(d) - l1 / l2) / (np.sqrt(d) - 1) if d > 1 else 0.0
    # Gini as half the relative mean difference: ranks by scipy, with ties sharing their mean rank.
    ranks = stats.rankdata(unit)
    metrics["gini"] = 2 * (ranks * unit).sum() / (d * unit.sum()) - (d + 1) / d
    metrics["effective_rank_magnitude"] = np.exp(stats.entropy(unit)) / d
    metrics["effective_rank_energy"] = np.exp(stats.entropy(energy)) / d
    metrics["l1"] = a.sum()
    return metrics


def _rows(d: int) -> dict[str, np.ndarray]:
    """Rows of width `d` by kind."""
    random = np.random.default_rng(d)
    massive = random.standard_normal(d)
    massive[random.integers(d, size=max(1, d // 800))] *= 3000.0
    one_hot = np.zeros(d)
    one_hot[d // 2] = -3.0
    return {
        "gaussian": random.standard_normal(d),
        "cauchy": random.standard_cauchy(d),
        "lognormal": random.lognormal(0.0, 2.0, d) * random.choice([-1.0, 1.0], d),
        "tied": random.integers(-3, 4, d) + np.where(np.arange(d) == 0, 2.0, 0.0),
        "constant": np.full(d, 0.1),
        "one_hot": one_hot,
        "massive": massive,
        "half_zero": np.where(np.arange(d) % 2 == 0, random.standard_normal(d), 0.0),
        "huge": random.standard_normal(d) * 1e30,
        "tiny": random.standard_normal(d) * 1e-30,
    }


@pytest.fixture(scope="session")
def plain_metrics() -> Callable[..., dict[str, float]]:
    return _plain_metrics


@pytest.fixture(scope="session")
def make_rows() -> Callable[[int], dict[str, np.ndarray]]:
    return _rows


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """Normal random numbers of a shape, from a generator with the same seed in each test."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
