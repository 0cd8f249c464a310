"""Does a score rise with a known difficulty: Spearman's rank correlation with an interval, and with a third quantity held fixed.

Contract: pure NumPy and SciPy; knows no model. Intervals are percentile bootstrap intervals over examples, seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from sparsort.errors import SparsortError
from sparsort.scoring.calibration.resampling import missing_interval, quantiles

# Relative size of a sum of squares below which it is rounding.
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A rank correlation. `low` and `high` bound the interval at `level`; `n` counts the examples used.

    Where the draws give no interval (see `resampling.missing_interval`), both ends are NaN and `reason` says why.
    """

    rho: float
    low: float
    high: float
    n: int
    level: float = 0.95
    reason: str = ""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if self.reason:
            return f"ρ = {self.rho:+.2f}, no interval: {self.reason}"
        return f"ρ = {self.rho:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def spearman(
    x: ArrayLike,
    y: ArrayLike,
    *,
    fixed: ArrayLike | None = None,
    level: float = 0.95,
    n_boot: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Spearman's ρ of `x` and `y`, partial in ranks when `fixed` is given.

    Args:
        x: (n,) numbers; pairs with a NaN on any side are left out.
        y: (n,) numbers.
        fixed: (n,) numbers held fixed (for example length): the correlation of the ranks' residuals after a linear fit
            on its ranks, which is the partial rank correlation.
        level: coverage of the interval.
        n_boot: bootstrap draws; each draw ranks anew.
        seed: of the bootstrap.

    Raises:
        SparsortError: fewer than 4 usable pairs, or a side that does not vary, or does not once `fixed` is held fixed.
    """
    columns = [np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)]
    if fixed is not None:
        columns.append(np.asarray(fixed, dtype=np.float64))
    if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
        raise SparsortError(
            f"correlation of shapes {[column.shape for column in columns]}; expected equal one-dimensional lengths."
        )
    data = np.stack(columns, axis=1)
    data = data[np.isfinite(data).all(axis=1)]
    if len(data) < 4 or any(np.ptp(data[:, side]) == 0 for side in (0, 1)):
        raise SparsortError(
            f"a rank correlation needs at least 4 pairs that vary on both sides; {len(data)} finite pairs were given."
        )
    rho = _partial(data)
    if np.isnan(rho):
        raise SparsortError(
            f"nothing is left of one side of {len(data)} pairs once the third quantity is held fixed, which decides its ranks. "
            "Leave fixed= out, or hold something else fixed."
        )
    rng = np.random.default_rng(seed)
    draws = np.array([_partial(data[rng.integers(len(data), size=len(data))]) for _ in range(n_boot)])
    low, high = (float(end[0]) for end in quantiles(draws[:, None], level))
    reason = missing_interval(draws, level)
    return Correlation(rho=rho, low=low, high=high, n=len(data), level=level, reason=reason)


def _partial(data_NC: NDArray[np.float64]) -> float:
    ranks = rankdata(data_NC, axis=0)
    ranks -= ranks.mean(axis=0)
    # Ranks are halves of whole numbers; what a fit leaves of them below this is rounding.
    tiny = _TINY * (ranks[:, :2] ** 2).sum(axis=0)
    if ranks.shape[1] == 3:
        norm = (ranks[:, 2] ** 2).sum()
        if norm > 0:
            ranks[:, :2] -= np.outer(ranks[:, 2], ranks[:, 2] @ ranks[:, :2]) / norm
    x, y = ranks[:, 0], ranks[:, 1]
    left = np.array([x @ x, y @ y])
    return float(x @ y / np.sqrt(left.prod())) if (left > tiny).all() else float("nan")
