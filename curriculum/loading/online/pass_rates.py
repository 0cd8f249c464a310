"""The prior of a prompt's pass rate, calibrated from scores (NumPy, scikit-learn).

Contract: `PassRatePrior` maps a difficulty to the mean of a Beta distribution. One strength, in rollouts, says how much that mean
counts against observed rewards. Both come from a pilot: the pass rates of some prompts, each over a few rollouts.

The mean is a logistic curve of the difficulty. Isotonic regression, the alternative, gives a pilot of tens of prompts pass rates
of exactly 0 and 1, and ties most prompts. The strength maximises the beta-binomial likelihood of the pilot, so a score that
predicts poorly, or a curve of the wrong shape, yields a weak prior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.errors import SparsortError

Floats = NDArray[np.float64]

# A prior stronger than 50 rollouts would hold against all that a policy learns; one below 0.1 is no prior.
_WEAKEST, _STRONGEST = 0.1, 50.0


@dataclass(frozen=True, kw_only=True)
class PassRatePrior:
    """The prior pass rate of a prompt of difficulty d: Beta(s·m, s·(1 − m)) with m = 1 / (1 + exp(−(intercept + slope·d))).

    Attributes:
        intercept, slope: the coefficients of the curve; the slope is negative if harder prompts pass less often.
        strength: s, the number of rollouts that the prior is worth.
        unscored: m of a prompt without a difficulty, which is the mean pass rate of the pilot.
    """

    intercept: float
    slope: float
    strength: float
    unscored: float

    @classmethod
    def fit(cls, difficulty: ArrayLike, pass_rates: ArrayLike, rollouts: ArrayLike) -> PassRatePrior:
        """Calibrate the prior on a pilot of n prompts; prompts whose difficulty is NaN are skipped.

        Args:
            difficulty: (n,) difficulty of each prompt, on the scale of the prompts that will be trained on.
            pass_rates: (n,) mean reward of each prompt, in [0, 1].
            rollouts: number of rollouts that each pass rate is the mean of, one number or (n,).

        Raises:
            SparsortError: the arrays do not fit together, a value is out of range, or the pilot has fewer than two scored
                prompts, or no prompt with two rollouts, without which no strength can be estimated.
        """
        from scipy.optimize import minimize_scalar
        from scipy.special import betaln, expit
        from sklearn.linear_model import LogisticRegression

        d_N, rate_N, count_N = _checked_pilot(difficulty, pass_rates, rollouts)
        centre, scale = float(d_N.mean()), float(d_N.std()) or 1.0
        passes_N = rate_N * count_N
        # Every prompt stands for its passes and its failures. Half a pass and half a failure at the mean difficulty keep the
        # curve away from 0 and 1 if all rollouts of the pilot agree.
        z_N = np.append((d_N - centre) / scale, 0.0)
        weights = np.concatenate([passes_N, [0.5], count_N - passes_N, [0.5]])
        labels = np.repeat([1, 0], len(z_N))
        # The default penalty bounds the slope where the pilot separates easy from hard prompts perfectly.
        model = LogisticRegression().fit(np.concatenate([z_N, z_N])[:, None], labels, sample_weight=weights)
        slope, intercept = float(model.coef_[0, 0]), float(model.intercept_[0])
        mean_N = np.clip(expit(intercept + slope * z_N[:-1]), 1e-6, 1 - 1e-6)

        def loss(log_strength: float) -> float:
            a_N, b_N = np.exp(log_strength) * mean_N, np.exp(log_strength) * (1 - mean_N)
            return -float((betaln(a_N + passes_N, b_N + count_N - passes_N) - betaln(a_N, b_N)).sum())

        best = minimize_scalar(loss, bounds=(np.log(_WEAKEST), np.log(_STRONGEST)), method="bounded")
        return cls(
            intercept=intercept - slope * centre / scale,
            slope=slope / scale,
            strength=float(np.exp(best.x)),
            unscored=float((passes_N.sum() + 0.5) / (count_N.sum() + 1)),
        )

    def means(self, difficulty: ArrayLike) -> Floats:
        """The prior pass rate of each prompt, (N,)."""
        from scipy.special import expit

        d_N = np.asarray(difficulty, dtype=np.float64)
        means: Floats = np.where(np.isnan(d_N), self.unscored, expit(self.intercept + self.slope * np.nan_to_num(d_N)))
        return np.clip(means, 1e-6, 1 - 1e-6)


def _checked_pilot(difficulty: ArrayLike, pass_rates: ArrayLike, rollouts: ArrayLike) -> tuple[Floats, Floats, Floats]:
    d_N, rate_N = np.asarray(difficulty, dtype=np.float64), np.asarray(pass_rates, dtype=np.float64)
    if d_N.ndim != 1 or d_N.shape != rate_N.shape:
        raise SparsortError(
            f"fit got {d_N.shape} scores and {rate_N.shape} pass rates; expected one of each per prompt."
        )
    if not ((rate_N >= 0) & (rate_N <= 1)).all():
        raise SparsortError("a pass rate is not in [0, 1]; pass the mean reward of each prompt's rollouts.")
    count_N = np.asarray(rollouts, dtype=np.float64)
    if count_N.shape not in ((), d_N.shape) or not (count_N >= 1).all():
        raise SparsortError(
            "rollouts must be the number of rollouts of each pass rate, at least 1: one number, or one per prompt."
        )
    scored = np.isfinite(d_N)
    count_N = np.broadcast_to(count_N, d_N.shape)[scored]
    if scored.sum() < 2 or count_N.max() < 2:
        raise SparsortError(
            f"the pilot has {scored.sum()} scored prompts with at most {count_N.max(initial=0):g} rollouts each; a prior needs "
            "at least two prompts, and one with two rollouts. Some tens of prompts with 4 to 8 rollouts are a good pilot."
        )
    return d_N[scored], rate_N[scored], count_N
