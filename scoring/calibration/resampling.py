"""Rank correlations of many candidate scores with a few references at once: with length held fixed, bootstrapped, permuted.

Contract: pure NumPy; knows no model. Every draw is a vector of case weights, shared by all candidates and references, and
ranks anew, as `correlation.spearman` does; the correlations of one draw are one matrix product. 470 candidates, 300 rows and
1000 draws take about 3 s on one core; time grows with rows × candidates × draws.

Length is held fixed along a curve: the correlation is that of what the ranks keep after a weighted least-squares fit on
polynomials of degree 1 to 5 in the rank of length. Degree 1 is the plain partial rank correlation, which is not enough
here: where score and reference both depend on length by the same bend (a saturating or U-shaped one), simulation has the
plain one call 8 to 10 of 10 empty data sets of 300 rows correlated; the curve brings that to the nominal rate, or near it
where the dependence is a jump.

Shape suffixes: N rows, C candidates, R references, G kinds of length, P permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

# Degree of the curve along which length is held fixed.
DEGREE = 5
# Relative size below which a direction or a norm is rounding.
_TINY = 1e-9
# Correlations that differ by less are one number: draws are in float32.
_EQUAL = 1e-5


class Ranks:
    """Mid-ranks of the columns of (N, C) numbers, under any case weights."""

    def __init__(self, x_NC: Array) -> None:
        n_rows, n_columns = x_NC.shape
        below, upto = np.empty((2, n_rows, n_columns), dtype=np.int64)
        for column, values in enumerate(x_NC.T):
            ordered = np.sort(values)
            below[:, column] = np.searchsorted(ordered, values, side="left")
            upto[:, column] = np.searchsorted(ordered, values, side="right")
        self.shape = x_NC.shape
        self._order = np.argsort(x_NC, axis=0, kind="stable")
        self._below = below * n_columns + np.arange(n_columns)
        self._upto = upto * n_columns + np.arange(n_columns)

    def under(self, weights_N: Array) -> Array:
        """(N, C) mid-ranks of the rows repeated by weight, over their number, centred: within ±1/2."""
        n_rows, n_columns = self.shape
        total = np.zeros((n_rows + 1, n_columns), dtype=weights_N.dtype)
        np.cumsum(weights_N[self._order], axis=0, out=total[1:])
        ranks: Array = total.ravel().take(self._below)
        ranks += total.ravel().take(self._upto)
        ranks *= 0.5 / total[-1, 0]
        ranks -= 0.5
        return ranks


class Design:
    """Candidates, references and lengths of the same rows, ranked once for all draws.

    Args:
        x_NC: candidates.
        y_NR: references.
        lengths_NG: lengths; `group_C` says which of them is held fixed for each candidate.
    """

    def __init__(self, x_NC: Array, y_NR: Array, lengths_NG: Array, group_C: NDArray[np.int64]) -> None:
        self.n_rows = len(x_NC)
        self._x, self._y, self._lengths = Ranks(x_NC), Ranks(y_NR), Ranks(lengths_NG)
        self._columns = [np.flatnonzero(group_C == group) for group in range(lengths_NG.shape[1])]

    def correlations(self, weights_N: Array | None = None) -> tuple[Array, Array]:
        """Rank correlations of every reference with every candidate: plain, and with length held fixed, (R, C) each.

        NaN where a side does not vary, or does not once length is held fixed.
        """
        weights = np.ones(self.n_rows) if weights_N is None else weights_N
        x_NC, y_NR = self._x.under(weights), self._y.under(weights)
        plain_RC = _cosines(y_NR, x_NC, weights)
        fixed_RC = np.empty_like(plain_RC)
        for columns, length_N in zip(self._columns, self._lengths.under(weights).T, strict=True):
            if not len(columns):
                continue
            basis = curve(length_N, weights)
            fixed_RC[:, columns] = _cosines(without(y_NR, basis, weights), x_NC[:, columns], weights, basis)
        return plain_RC, fixed_RC

    def bootstrap(self, n_boot: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        """`correlations` of `n_boot` samples of as many rows, drawn with replacement; in float32."""
        for _ in range(n_boot):
            draw = rng.integers(self.n_rows, size=self.n_rows)
            yield self.correlations(np.bincount(draw, minlength=self.n_rows).astype(np.float32))

    def permutations(self, orders_PN: NDArray[np.int64]) -> tuple[Array, Array]:
        """`correlations` after permuting the references against candidates and lengths: (P, R, C) each.

        With length held fixed, what is permuted is what the reference keeps beside its fit on length (Freedman and Lane
        1983), so that its dependence on length stays in every permutation.
        """
        ones = np.ones(self.n_rows)
        x_NC, y_NR = self._x.under(ones), self._y.under(ones)
        plain = _cosines(_permuted(y_NR, orders_PN), x_NC, ones)
        fixed = np.empty_like(plain)
        for columns, length_N in zip(self._columns, self._lengths.under(ones).T, strict=True):
            if not len(columns):
                continue
            basis = curve(length_N, ones)
            shuffled = without(_permuted(without(y_NR, basis, ones), orders_PN), basis, ones)
            fixed[:, columns] = _cosines(shuffled, x_NC[:, columns], ones, basis)
        shape = (len(orders_PN), y_NR.shape[1], x_NC.shape[1])
        return plain.reshape(shape), fixed.reshape(shape)


def curve(rank_N: Array, weights_N: Array, degree: int = DEGREE) -> Array:
    """(N, K) basis, orthonormal under the weights, of the polynomials of a rank within ±1/2, the constant included."""
    powers = np.polynomial.legendre.legvander(2 * rank_N.astype(np.float64), degree)
    values, vectors = np.linalg.eigh(powers.T @ (weights_N[:, None] * powers))
    # Where few lengths differ, fewer directions than degrees are there.
    kept = values > _TINY * values[-1]
    basis: Array = (powers @ (vectors[:, kept] / np.sqrt(values[kept]))).astype(rank_N.dtype)
    return basis


def without(y_NR: Array, basis_NK: Array, weights_N: Array) -> Array:
    """What is left of the columns after a weighted fit on the basis."""
    left: Array = y_NR - basis_NK @ (basis_NK.T @ (weights_N[:, None] * y_NR))
    return left


def _cosines(y_NR: Array, x_NC: Array, weights_N: Array, basis_NK: Array | None = None) -> Array:
    """Weighted correlations of centred columns, (R, C); with a basis, those of x without it (y is without it already)."""
    weighted_NC = weights_N[:, None] * x_NC
    x_norm = np.einsum("nc,nc->c", weighted_NC, x_NC)
    x_left = x_norm.copy()
    if basis_NK is not None:
        x_left -= np.square(basis_NK.T @ weighted_NC).sum(axis=0)
    y_left = np.einsum("n,nr,nr->r", weights_N, y_NR, y_NR)
    tiny = max(_TINY, 100 * float(np.finfo(x_NC.dtype).eps))
    # A rank column that varies has a weighted square of the order of the number of rows; less than that is rounding.
    whole = tiny * float(weights_N.sum())
    known = (y_left > whole)[:, None] & ((x_left > tiny * x_norm) & (x_norm > whole / len(weights_N)))[None, :]
    scale = np.sqrt(np.maximum(np.outer(y_left, x_left), np.finfo(x_NC.dtype).tiny))
    result: Array = np.where(known, (y_NR.T @ weighted_NC) / scale, np.nan)
    return result


def _permuted(y_NR: Array, orders_PN: NDArray[np.int64]) -> Array:
    """(N, P·R) the columns under every permutation."""
    return y_NR[orders_PN.T].reshape(len(y_NR), -1)


def orders(n_rows: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(count, n_rows) random permutations."""
    return rng.permuted(np.tile(np.arange(n_rows), (count, 1)), axis=1)


def step_down(observed_C: Array, permuted_PC: Array) -> Array:
    """p-values of |observed|, adjusted for how many were tried: step-down max-T (Westfall and Young 1993, algorithm 2.8).

    Args:
        observed_C: statistics; a NaN has the p-value NaN.
        permuted_PC: the same under every permutation.
    """
    known = np.flatnonzero(np.isfinite(observed_C))
    falling = known[np.argsort(-np.abs(observed_C[known]), kind="stable")]
    sizes = np.abs(np.nan_to_num(permuted_PC[:, falling]))
    # Each candidate competes with itself and all that follow the reference less.
    largest = np.maximum.accumulate(sizes[:, ::-1], axis=1)[:, ::-1]
    reached = (largest >= np.abs(observed_C[falling]) - _TINY).sum(axis=0)
    adjusted = np.full(len(observed_C), np.nan)
    adjusted[falling] = np.maximum.accumulate((1 + reached) / (1 + len(permuted_PC)))
    return adjusted


def holm(p_C: Array) -> Array:
    """Holm's (1979) adjusted p-values; NaN stays NaN and does not count."""
    known = np.flatnonzero(np.isfinite(p_C))
    rising = known[np.argsort(p_C[known], kind="stable")]
    adjusted = np.full(len(p_C), np.nan)
    adjusted[rising] = np.minimum(1.0, np.maximum.accumulate(p_C[rising] * np.arange(len(rising), 0, -1)))
    return adjusted


def quantiles(draws: Array, level: float) -> tuple[Array, Array]:
    """Percentile interval along the first axis; NaN where there is none (see `missing_interval`)."""
    ends = np.full((2, *draws.shape[1:]), np.nan)
    finite = np.isfinite(draws)
    width = np.where(finite, draws, -np.inf).max(axis=0) - np.where(finite, draws, np.inf).min(axis=0)
    known = (finite.mean(axis=0) >= level) & (width > _EQUAL)
    ends[:, known] = np.nanquantile(draws[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends[0], ends[1]


def missing_interval(draws_B: Array, level: float) -> str:
    """Why the draws of one statistic give no interval, in a clause; "" where they do.

    A draw without a value (a side that does not vary in it) belongs to neither tail: if there are more of them than the interval
    excludes, its ends are unknown. Draws that are all equal do not show how far other samples would differ.
    """
    finite = np.isfinite(draws_B)
    if finite.mean() < level:
        return f"in {int((~finite).sum())} of {len(draws_B)} draws of the rows one side does not vary"
    if np.ptp(draws_B[finite]) <= _EQUAL:
        return "all draws of the rows give the same number"
    return ""
