"""Does a score carry difficulty, here: many candidates against one reference, and the verdict with its rule.

Contract: pure NumPy and SciPy; knows no model. A reference rises with difficulty. Everything is seeded; halves, draws and
permutations are drawn by the position of a row, so the same rows in another order give other draws.

The verdict, exactly. The rows are halved (seeded, alike in the reference). On each half the candidate of largest |ρ| is chosen,
with its sign, and its ρ times that sign is read on the other half; the held-out ρ is the mean of the two. Its interval is
the percentile bootstrap interval of that mean, each half drawn anew, with the two choices as they are. Its p is the share of
permutations of the reference (within the halves, choices made anew under each) whose held-out ρ is at least as large. ρ holds
when the interval lies above zero and p is at most (1 − level) / 2, the tail that the interval leaves there. Then:

| verdict | when |
| --- | --- |
| carries difficulty | ρ with length held fixed holds |
| carries length only | it does not, and plain ρ (its choices made by plain ρ) holds |
| carries nothing here | neither does |

The interval alone would let the two halves of one sample vouch for one another; the permutations know of that, and of how many
candidates there were to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from sparsort.errors import SparsortError
from sparsort.scoring.calibration.resampling import (
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

# Rows below which half of them say nothing, and rows that must differ from a reference's commonest value.
MIN_ROWS = 40
MIN_VARYING = 10
# A reference of at most as many values has these as its levels; any other is cut into `LEVELS` of equal size.
MAX_LEVELS = 10
LEVELS = 5
# Why there is no held-out ρ: plain, and with length held fixed.
_UNKNOWN = (
    "a candidate that one half chose does not vary on the other",
    "a candidate that one half chose does not vary on the other once length is held fixed",
)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A rank correlation of candidates chosen on one half and read on the other, the mean of both ways.

    Attributes:
        rho: positive where the sign found on one half is that of the other; NaN where a candidate that one half chose does not
            vary on the other.
        low: lower end of its bootstrap interval; NaN where there is none.
        high: upper end.
        p: share of permutations that do as well, choice included; NaN without ρ.
        chosen: the candidate chosen on each half.
        orientation: the sign of ρ there.
        holds: the interval lies above zero and p is at most (1 − level) / 2. Where all draws give the same ρ, that has to lie
            above zero.
        reason: why there is no ρ or no interval, "" where there are both.
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
    """Every candidate against one reference over all rows, (C,) each; `fixed_…` with length held fixed.

    Attributes:
        rho, low, high: Spearman's ρ and its bootstrap interval.
        p: of ρ, adjusted for how many were tried (step-down max-T over permutations).
        holm: the same by Holm's method from Student's t.
        of_levels: Pearson's r between the means of candidate and reference over the reference's levels: what the
            literature quotes, beside the per-example ρ.
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
    """What the candidates are to one reference.

    Attributes:
        n_rows: rows compared; `n_levels` of the reference.
        associations: every candidate.
        plain: held-out ρ; `fixed` with length held fixed.
        verdict: see the module.
        best: the candidate of largest |ρ| with length held fixed over all rows, and its sign there: what to use.
        orientation: +1 where a higher value is harder, else -1.
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
    """Compare every candidate with every reference of the same rows, and give each reference its verdict.

    Args:
        x_NC: candidates, finite, each varying.
        y_NR: references, finite, each rising with difficulty.
        lengths_NG: lengths in tokens; `group_C` is the one that is held fixed for each candidate.
        n_boot: bootstrap draws.
        n_perm: permutations; p is at least 1 / (n_perm + 1).
        level: coverage of the intervals.
        seed: of halves, draws and permutations.

    Raises:
        SparsortError: too few rows (`MIN_ROWS`), or a reference that hardly varies (`MIN_VARYING`).
    """
    for reference_N in y_NR.T:
        check_reference(reference_N)
    halves = np.random.SeedSequence(seed).spawn(y_NR.shape[1] + 2)
    whole = Design(x_NC, y_NR, lengths_NG, group_C)
    plain_RC, fixed_RC = whole.correlations()
    draws = []
    with progress("comparing", n_boot) as advance:
        for draw in whole.bootstrap(n_boot, np.random.default_rng(halves[0])):
            draws.append(np.stack(draw))
            advance(1)
    low, high = quantiles(np.stack(draws), level)
    permuted = whole.permutations(orders(len(x_NC), n_perm, np.random.default_rng(halves[1])))
    judgements = []
    for number, (y_N, source) in enumerate(zip(y_NR.T, halves[2:], strict=True)):
        levels_N = levels(y_N)
        associations = Associations(
            rho=plain_RC[number],
            low=low[0, number],
            high=high[0, number],
            p=step_down(plain_RC[number], permuted[0][:, number]),
            holm=holm(_student(plain_RC[number], len(y_N) - 2)),
            fixed_rho=fixed_RC[number],
            fixed_low=low[1, number],
            fixed_high=high[1, number],
            fixed_p=step_down(fixed_RC[number], permuted[1][:, number]),
            fixed_holm=holm(_student(fixed_RC[number], len(y_N) - 2 - DEGREE)),
            of_levels=_of_levels(x_NC, y_N, levels_N),
        )
        plain, fixed = hold_out(
            x_NC, y_N, lengths_NG, group_C, n_boot=n_boot, n_perm=n_perm, level=level, rng=np.random.default_rng(source)
        )
        best, sign = _largest(fixed_RC[number] if np.isfinite(fixed_RC[number]).any() else plain_RC[number])
        verdict: Verdict = "carries nothing here"
        if fixed.holds:
            verdict = "carries difficulty"
        elif plain.holds:
            verdict = "carries length only"
        judgements.append(
            Judgement(
                n_rows=len(y_N),
                n_levels=int(levels_N.max()) + 1,
                associations=associations,
                plain=plain,
                fixed=fixed,
                verdict=verdict,
                best=best,
                orientation=sign,
            )
        )
    return judgements


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
    """The held-out ρ of the best candidate: plain, and with length held fixed (see the module)."""
    parts = halve(y_N, rng)
    designs = [Design(x_NC[part], y_N[part, None], lengths_NG[part], group_C) for part in parts]
    observed = [design.correlations() for design in designs]
    permuted = [design.permutations(orders(design.n_rows, n_perm, rng)) for design in designs]
    found = []
    for kind in (0, 1):
        rho_2C = np.stack([pair[kind][0] for pair in observed])
        chosen, signs = zip(*(_largest(rho_C) for rho_C in rho_2C), strict=True)
        rho = float(np.mean([signs[0] * rho_2C[1, chosen[0]], signs[1] * rho_2C[0, chosen[1]]]))
        null_P = _held_out_under(np.stack([np.nan_to_num(pair[kind][:, 0]) for pair in permuted]))
        p = (1 + int((null_P >= rho - 1e-12).sum())) / (1 + n_perm) if np.isfinite(rho) else np.nan
        draws = np.zeros(n_boot)
        for other, candidate, sign in ((1, chosen[0], signs[0]), (0, chosen[1], signs[1])):
            part, columns = parts[other], [candidate]
            one = Design(x_NC[part][:, columns], y_N[part, None], lengths_NG[part], group_C[columns])
            draws += [sign * float(pair[kind][0, 0]) / 2 for pair in one.bootstrap(n_boot, rng)]
        low, high = (float(end[0]) for end in quantiles(draws[:, None], level))
        reason = missing_interval(draws, level) if np.isfinite(rho) else _UNKNOWN[kind]
        least = low if not reason else float(draws.min())
        holds = least > 0 and p <= (1 - level) / 2 + 1e-12
        found.append(
            HeldOut(rho=rho, low=low, high=high, p=p, chosen=chosen, orientation=signs, holds=holds, reason=reason)
        )
    return found[0], found[1]


def halve(y_N: Array, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two halves of the rows that are alike in `y_N`: of every two neighbours in its order, one goes to each by chance."""
    falling = np.lexsort((rng.random(len(y_N)), y_N))
    pairs = len(y_N) // 2
    swap = rng.integers(2, size=pairs)
    sides = np.empty(len(y_N), dtype=np.int64)
    sides[falling[0 : 2 * pairs : 2]], sides[falling[1 : 2 * pairs : 2]] = swap, 1 - swap
    sides[falling[2 * pairs :]] = rng.integers(2, size=len(y_N) - 2 * pairs)
    return np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)


def levels(y_N: Array) -> NDArray[np.int64]:
    """The level of each row, from 0: the values themselves where they are few, else five groups of equal size."""
    values, codes = np.unique(y_N, return_inverse=True)
    if len(values) > MAX_LEVELS:
        codes = np.minimum(((rankdata(y_N) - 0.5) * LEVELS / len(y_N)).astype(np.int64), LEVELS - 1)
        codes = np.unique(codes, return_inverse=True)[1]
    return codes.astype(np.int64)


def check_reference(y_N: Array) -> None:
    """Refuse a reference that has too little in it to compare with.

    Raises:
        SparsortError: too few rows, or too few that differ from the commonest value.
    """
    if len(y_N) < MIN_ROWS:
        raise SparsortError(
            f"{len(y_N)} rows can be compared; at least {MIN_ROWS} are needed, since half of them choose and the other half "
            "judge. Pass more rows."
        )
    varying = len(y_N) - int(np.unique(y_N, return_counts=True)[1].max())
    if varying < MIN_VARYING:
        what = "is the same in every row" if varying == 0 else f"differs in {varying} of {len(y_N)} rows only"
        raise SparsortError(
            f"it {what}; at least {MIN_VARYING} rows must differ. Pass rows on which it varies, or leave it out."
        )


def _held_out_under(rho_2PC: Array) -> Array:
    """(P,) the held-out ρ under every permutation, both choices made anew."""
    total = np.zeros(rho_2PC.shape[1])
    every = np.arange(rho_2PC.shape[1])
    for half in (0, 1):
        chosen = np.abs(rho_2PC[half]).argmax(axis=1)
        total += np.sign(rho_2PC[half][every, chosen]) * rho_2PC[1 - half][every, chosen] / 2
    return total


def _largest(rho_C: Array) -> tuple[int, int]:
    """The candidate of largest |ρ|, and its sign."""
    best = int(np.nan_to_num(np.abs(rho_C), nan=-1.0).argmax())
    return best, -1 if rho_C[best] < 0 else 1


def _student(rho_C: Array, freedom: int) -> Array:
    """Two-sided p of a correlation, from Student's t."""
    with np.errstate(divide="ignore"):
        size = np.abs(rho_C) * np.sqrt(freedom / np.maximum(1 - rho_C**2, 0))
    p: Array = 2 * student.sf(size, freedom)
    return p


def _of_levels(x_NC: Array, y_N: Array, levels_N: NDArray[np.int64]) -> Array:
    """(C,) Pearson's r of the level means; NaN with fewer than three levels."""
    count = int(levels_N.max()) + 1
    if count < 3:
        return np.full(x_NC.shape[1], np.nan)
    members = (levels_N[:, None] == np.arange(count)).astype(np.float64)
    # Standardised first: candidates of any scale, from shares to sums of magnitudes in the millions.
    spread = x_NC.std(axis=0)
    x_LC = members.T @ ((x_NC - x_NC.mean(axis=0)) / np.where(spread > 0, spread, 1.0)) / members.sum(axis=0)[:, None]
    y_L = members.T @ y_N / members.sum(axis=0)
    x_LC, y_L = x_LC - x_LC.mean(axis=0), y_L - y_L.mean()
    scale = np.sqrt(np.square(x_LC).sum(axis=0) * np.square(y_L).sum())
    r: Array = np.where(scale > 0, y_L @ x_LC / np.where(scale > 0, scale, 1.0), np.nan)
    return r
