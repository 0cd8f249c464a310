"""Decides whether a score carries difficulty: compares many candidates with a reference, and gives the verdict.

Contract: pure NumPy and SciPy, without a model. A reference rises with difficulty. Everything is seeded. Halves, draws and
permutations depend on the position of a row, so the same rows in another order give other draws.

The exact rule is as follows. The rows are split into two halves, at random but with similar values of the reference. On each
half, the candidate with the largest |ρ| is chosen, and its ρ on the other half is multiplied by the sign found on the first.
The held-out ρ is the mean of these two numbers. Its interval is the percentile bootstrap interval of that mean, where each half
is resampled and the two choices are kept. Its p is the share of permutations of the reference, within the halves and with new
choices, whose held-out ρ is at least as large. ρ *holds* if the interval is above zero and p is at most (1 − level) / 2, the
share of draws below the interval. Then:

| verdict | condition |
| --- | --- |
| carries difficulty | ρ with length held fixed holds |
| carries length only | it does not, but plain ρ holds (with candidates chosen by plain ρ) |
| carries nothing here | neither holds |

The interval alone would not suffice, because the two halves of one sample confirm each other. The permutations take this into
account, and also the number of candidates to choose from.

Shape suffixes: N rows, C candidates, R references, G kinds of length, L levels, P permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from sparsort.errors import SparsortError
from sparsort.scoring.calibration.correlation import (
    DEGREE,
    Array,
    Design,
    holm,
    missing_interval,
    orders,
    quantiles,
    step_down,
)
from sparsort.terminal.progress import progress

Verdict = Literal["carries difficulty", "carries length only", "carries nothing here"]

# The least number of rows, of which each half has to show something by itself.
MIN_ROWS = 40
# The least number of rows that must differ from the most common value of the reference.
MIN_VARYING = 10
# A reference with at most this many distinct values has them as its levels. Any other is cut into `LEVELS` groups of equal size.
MAX_LEVELS = 10
LEVELS = 5
# The reasons for a missing held-out ρ: plain, and with length held fixed.
_UNKNOWN = (
    "a candidate that one half chose does not vary on the other",
    "a candidate that one half chose does not vary on the other once length is held fixed",
)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out ρ: candidates are chosen on one half and measured on the other, and the two results are averaged.

    Attributes:
        rho: positive if the signs on both halves agree; NaN if a candidate that one half chose does not vary on the other.
        low, high: ends of its bootstrap interval; NaN if there is none.
        p: share of permutations, each with its own choices, whose held-out ρ is at least as large; NaN without ρ.
        chosen: the candidate chosen on each half.
        orientation: the sign of its ρ on that half.
        holds: whether the interval is above zero and p is at most (1 − level) / 2. If there is no interval, the smallest draw
            must be above zero instead.
        reason: why there is no ρ or no interval; "" if there are both.
    """

    rho: float
    low: float
    high: float
    p: float
    chosen: tuple[int, int]
    orientation: tuple[int, int]
    holds: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Associations:
    """The relation of every candidate to one reference over all rows, (C,) each; `fixed_…` with length held fixed.

    Attributes:
        rho, low, high: Spearman's ρ and its bootstrap interval.
        p: p-value of ρ, adjusted for the number of candidates by step-down max-T over permutations.
        holm: p-value of ρ from Student's t, adjusted by Holm's method.
        of_levels: Pearson's r between the means of candidate and reference over the levels of the reference, the number that
            the literature reports.
    """

    rho: Array
    low: Array
    high: Array
    p: Array
    holm: Array
    fixed_rho: Array
    fixed_low: Array
    fixed_high: Array
    fixed_p: Array
    fixed_holm: Array
    of_levels: Array


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The relation of the candidates to one reference.

    Attributes:
        n_rows: number of rows that were compared.
        n_levels: number of levels of the reference.
        associations: the numbers of every candidate.
        plain, fixed: held-out ρ, plain and with length held fixed.
        verdict: the verdict by the rule of this module.
        best: the candidate to use, with the largest |ρ| over all rows, length held fixed.
        orientation: +1 if higher values of that candidate are harder, else -1.
    """

    n_rows: int
    n_levels: int
    associations: Associations
    plain: HeldOut
    fixed: HeldOut
    verdict: Verdict
    best: int
    orientation: int


def judge(
    x_NC: Array,
    y_NR: Array,
    lengths_NG: Array,
    group_C: NDArray[np.int64],
    *,
    n_boot: int = 1000,
    n_perm: int = 999,
    level: float = 0.95,
    seed: int = 0,
) -> list[Judgement]:
    """Compare every candidate with every reference of the same rows; returns one judgement per reference.

    Args:
        x_NC: candidates, finite, each varying.
        y_NR: references, finite, each rising with difficulty.
        lengths_NG: lengths in tokens.
        group_C: the column of `lengths_NG` that is held fixed for each candidate.
        n_boot: number of bootstrap draws.
        n_perm: number of permutations; p is at least 1 / (n_perm + 1).
        level: coverage of the intervals.
        seed: seed for halves, draws and permutations.

    Raises:
        SparsortError: too few rows (`MIN_ROWS`), or a reference that hardly varies (`MIN_VARYING`).
    """
    for reference_N in y_NR.T:
        check_reference(reference_N)
    # One stream each for the draws, the permutations and every reference, so that a reference does not change the others.
    streams = [np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(y_NR.shape[1] + 2)]
    every = _associate(x_NC, y_NR, Design(x_NC, y_NR, lengths_NG, group_C), n_boot, n_perm, level, streams[:2])
    judgements = []
    for y_N, associations, rng in zip(y_NR.T, every, streams[2:], strict=True):
        plain, fixed = hold_out(x_NC, y_N, lengths_NG, group_C, n_boot=n_boot, n_perm=n_perm, level=level, rng=rng)
        # Without any variation once length is held fixed, the best candidate by plain ρ is named.
        known = np.isfinite(associations.fixed_rho).any()
        best, sign = _largest(associations.fixed_rho if known else associations.rho)
        verdict: Verdict = "carries nothing here"
        if fixed.holds:
            verdict = "carries difficulty"
        elif plain.holds:
            verdict = "carries length only"
        judgements.append(
            Judgement(
                n_rows=len(y_N),
                n_levels=int(levels(y_N).max()) + 1,
                associations=associations,
                plain=plain,
                fixed=fixed,
                verdict=verdict,
                best=best,
                orientation=sign,
            )
        )
    return judgements


def _associate(
    x_NC: Array,
    y_NR: Array,
    design: Design,
    n_boot: int,
    n_perm: int,
    level: float,
    rngs: Sequence[np.random.Generator],
) -> list[Associations]:
    """Compute the associations with every reference, from draws and permutations that the references share."""
    plain_RC, fixed_RC = design.correlations()
    draws = []
    with progress("comparing", n_boot) as advance:
        for draw in design.bootstrap(n_boot, rngs[0]):
            draws.append(np.stack(draw))
            advance(1)
    low, high = quantiles(np.stack(draws), level)
    plain_PRC, fixed_PRC = design.permutations(orders(len(x_NC), n_perm, rngs[1]))
    # The degrees of freedom of a correlation, and of one whose two sides lose a polynomial of `DEGREE` more.
    freedom = len(x_NC) - 2
    return [
        Associations(
            rho=plain_RC[number],
            low=low[0, number],
            high=high[0, number],
            p=step_down(plain_RC[number], plain_PRC[:, number]),
            holm=holm(_student(plain_RC[number], freedom)),
            fixed_rho=fixed_RC[number],
            fixed_low=low[1, number],
            fixed_high=high[1, number],
            fixed_p=step_down(fixed_RC[number], fixed_PRC[:, number]),
            fixed_holm=holm(_student(fixed_RC[number], freedom - DEGREE)),
            of_levels=_of_levels(x_NC, y_N, levels(y_N)),
        )
        for number, y_N in enumerate(y_NR.T)
    ]


def hold_out(
    x_NC: Array,
    y_N: Array,
    lengths_NG: Array,
    group_C: NDArray[np.int64],
    *,
    n_boot: int,
    n_perm: int,
    level: float,
    rng: np.random.Generator,
) -> tuple[HeldOut, HeldOut]:
    """Compute the held-out ρ of the best candidate, plain and with length held fixed, by the rule of this module."""
    parts = halve(y_N, rng)
    designs = [Design(x_NC[part], y_N[part, None], lengths_NG[part], group_C) for part in parts]
    observed = [design.correlations() for design in designs]
    permuted = [design.permutations(orders(design.n_rows, n_perm, rng)) for design in designs]
    results = []
    # `Design` returns the plain correlations first, and those with length held fixed second.
    for kind in (0, 1):
        rho_2C = np.stack([pair[kind][0] for pair in observed])
        chosen, signs = zip(*(_largest(rho_C) for rho_C in rho_2C), strict=True)
        rho = float(np.mean([signs[0] * rho_2C[1, chosen[0]], signs[1] * rho_2C[0, chosen[1]]]))
        # Where a candidate does not vary in a half, its permuted correlations are NaN; 0 cannot be chosen over another.
        null_P = _held_out_under(np.stack([np.nan_to_num(pair[kind][:, 0]) for pair in permuted]))
        # The observed order counts as one more permutation, so that p is never 0.
        p = (1 + int((null_P >= rho - 1e-12).sum())) / (1 + n_perm) if np.isfinite(rho) else np.nan
        # The mean of the two halves' draws, each with its own choice kept.
        draws = np.zeros(n_boot)
        for other, candidate, sign in ((1, chosen[0], signs[0]), (0, chosen[1], signs[1])):
            part, columns = parts[other], [candidate]
            design = Design(x_NC[part][:, columns], y_N[part, None], lengths_NG[part], group_C[columns])
            draws += [sign * float(pair[kind][0, 0]) / 2 for pair in design.bootstrap(n_boot, rng)]
        low, high = (float(end[0]) for end in quantiles(draws[:, None], level))
        reason = missing_interval(draws, level) if np.isfinite(rho) else _UNKNOWN[kind]
        least = low if not reason else float(draws.min())
        holds = least > 0 and p <= (1 - level) / 2 + 1e-12
        results.append(
            HeldOut(rho=rho, low=low, high=high, p=p, chosen=chosen, orientation=signs, holds=holds, reason=reason)
        )
    return results[0], results[1]


def halve(y_N: Array, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the rows into halves with similar `y_N`: of every two neighbours in its order, each half gets one at random."""
    # The random second key puts rows with equal values in random order.
    ascending = np.lexsort((rng.random(len(y_N)), y_N))
    pairs = len(y_N) // 2
    swap = rng.integers(2, size=pairs)
    sides = np.empty(len(y_N), dtype=np.int64)
    sides[ascending[0 : 2 * pairs : 2]], sides[ascending[1 : 2 * pairs : 2]] = swap, 1 - swap
    sides[ascending[2 * pairs :]] = rng.integers(2, size=len(y_N) - 2 * pairs)
    return np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)


def levels(y_N: Array) -> NDArray[np.int64]:
    """Return the level of each row, from 0: one per distinct value if there are few, else five groups of equal size."""
    values, codes = np.unique(y_N, return_inverse=True)
    if len(values) > MAX_LEVELS:
        codes = np.minimum(((rankdata(y_N) - 0.5) * LEVELS / len(y_N)).astype(np.int64), LEVELS - 1)
        # Equal values share a group, which may leave others empty: number the groups without gaps.
        codes = np.unique(codes, return_inverse=True)[1]
    return codes.astype(np.int64)


def check_reference(y_N: Array) -> None:
    """Refuse a reference with too few rows or too little variation.

    Raises:
        SparsortError: fewer than `MIN_ROWS` rows, or fewer than `MIN_VARYING` that differ from the most common value.
    """
    if len(y_N) < MIN_ROWS:
        raise SparsortError(
            f"{len(y_N)} rows can be compared; at least {MIN_ROWS} are needed, since half of them choose and the other half "
            "judge. Pass more rows."
        )
    varying = len(y_N) - int(np.unique(y_N, return_counts=True)[1].max())
    if varying < MIN_VARYING:
        variation = "is the same in every row" if varying == 0 else f"differs in {varying} of {len(y_N)} rows only"
        raise SparsortError(
            f"it {variation}; at least {MIN_VARYING} rows must differ. Pass rows on which it varies, or omit it."
        )


def _held_out_under(rho_2PC: Array) -> Array:
    """Return the held-out ρ under every permutation, (P,), with the candidates chosen again for each."""
    total = np.zeros(rho_2PC.shape[1])
    every = np.arange(rho_2PC.shape[1])
    for half in (0, 1):
        chosen = np.abs(rho_2PC[half]).argmax(axis=1)
        total += np.sign(rho_2PC[half][every, chosen]) * rho_2PC[1 - half][every, chosen] / 2
    return total


def _largest(rho_C: Array) -> tuple[int, int]:
    """Return the candidate with the largest |ρ|, and the sign of its ρ."""
    best = int(np.nan_to_num(np.abs(rho_C), nan=-1.0).argmax())
    return best, -1 if rho_C[best] < 0 else 1


def _student(rho_C: Array, freedom: int) -> Array:
    """Return the two-sided p of a correlation with these degrees of freedom, from Student's t."""
    with np.errstate(divide="ignore"):
        size = np.abs(rho_C) * np.sqrt(freedom / np.maximum(1 - rho_C**2, 0))
    p: Array = 2 * student.sf(size, freedom)
    return p


def _of_levels(x_NC: Array, y_N: Array, levels_N: NDArray[np.int64]) -> Array:
    """Return Pearson's r of the means over levels, (C,); NaN with fewer than three levels."""
    count = int(levels_N.max()) + 1
    if count < 3:
        return np.full(x_NC.shape[1], np.nan)
    members = (levels_N[:, None] == np.arange(count)).astype(np.float64)
    # Standardised first, because candidates range from shares to sums of magnitudes in the millions.
    spread = x_NC.std(axis=0)
    x_LC = members.T @ ((x_NC - x_NC.mean(axis=0)) / np.where(spread > 0, spread, 1.0)) / members.sum(axis=0)[:, None]
    y_L = members.T @ y_N / members.sum(axis=0)
    x_LC, y_L = x_LC - x_LC.mean(axis=0), y_L - y_L.mean()
    scale = np.sqrt(np.square(x_LC).sum(axis=0) * np.square(y_L).sum())
    r: Array = np.where(scale > 0, y_L @ x_LC / np.where(scale > 0, scale, 1.0), np.nan)
    return r
