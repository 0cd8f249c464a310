"""The order statistics of a row in registers: the sums of its k largest coordinates, and Gini's sum.

The k largest coordinates are found by a search for a threshold instead of a sort. Non-negative floats order as their bits do.
Let n(t) be the number of coordinates whose bits are at least t. The search maintains lo and hi with n(lo) ≥ k > n(hi) and
narrows the interval. It ends when n(lo) = k, in which case the k largest are those with bits of at least lo, or when
hi = lo + 1, in which case lo is the k-th largest and the remaining ones are ties: the sum is then that of the coordinates with
bits of at least hi, plus (k − n(hi)) times the value of lo. Both results are exact, whatever thresholds were tried.

The next threshold is where the logarithm of the count, interpolated linearly between lo and hi, reaches log k. After the first
few steps, every fourth step bisects the interval of bits instead, which bounds the number of steps. The searches for the three
values of k share one loop. In a simulation with d = 4096, the number of steps until all three end was 7 (fp32) or 5 (bf16) for
Gaussian rows, 9 or 7 with massive activations, and 18 or 14 for Cauchy rows; bisection alone takes 31 or 15.

Gini's sum Σ (2i − d − 1)·a_(i) is either exact by a sort, or has a certified bound by a histogram. The histogram has 256 bins
over the bits of the float: 16 bins per octave, in the 16 octaves up to the row's largest coordinate. Smaller coordinates go to
bin 0. Every coordinate is weighted with the mean rank of its bin, so the histogram's sum T ignores only the order within bins.
For a bin with n coordinates, ranks r, mean rank m and width w, the ignored part is

    0 ≤ Σ 2(r − m)·a ≤ w·Σ_(r > m) 2(r − m) = w·⌊n²/4⌋.

It is not negative because a increases with r (Chebyshev's sum inequality). It is largest if the upper half of the ranks is at
the bin's upper edge and the lower half at its lower edge. In bin 0, w may be much larger than the coordinates, so the bound
(n − 1)·(the bin's mass) is used if it is smaller; it holds because 2(r − m) ≤ n − 1. Exact zeros add nothing and are counted
separately. With s as the sum of these bounds, the exact sum is in [T, T + s]. The returned value is T + s/2 and its error bound
s/2, both divided by d·Σa. For a Gaussian row, the bound is about 1e-4.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Triton's interpreter does not support libdevice.
_FAST_LOG = tl.constexpr(not triton.knobs.runtime.interpret)

BINS = tl.constexpr(256)
# With 16 bins per octave, the bin's number uses the 4 highest of the 23 mantissa bits, and 19 bits remain.
BIN_SHIFT = tl.constexpr(19)
OCTAVES_BELOW = tl.constexpr(15)
# The rounding error of float32 sums of up to 32768 terms, relative to d·Σa.
ROUNDING = tl.constexpr(2e-6)


@triton.jit
def fast_log2(x):
    """Compute log2 by the special function unit (relative error up to 2⁻²²) in one instruction; tl.log2 takes 17."""
    if _FAST_LOG:  # noqa: SIM108, Triton folds the statement, not the expression
        y = libdevice.fast_log2f(x)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _count(bits, least):
    """Count the bits, as non-negative integers, that are at least `least`."""
    # The sign bit of least − 1 − bits is 1 exactly if bits ≥ least.
    return tl.sum((least - 1 - bits).to(tl.uint32, bitcast=True) >> 31, 0).to(tl.int32)


@triton.jit
def count_above(a, limit):
    """Count the float32 magnitudes that are above `limit`, which must not be negative."""
    return _count(a.to(tl.int32, bitcast=True), limit.to(tl.int32, bitcast=True) + 1)


@triton.jit
def _threshold(lo, hi, n_lo, n_hi, k, first, step, SHIFT: tl.constexpr):
    """Return the next threshold, strictly between lo and hi; if they are adjacent, lo itself, which changes nothing."""
    low = (lo << SHIFT).to(tl.float32, bitcast=True)
    high = (hi << SHIFT).to(tl.float32, bitcast=True)
    log_lo = fast_log2(n_lo.to(tl.float32))
    log_hi = fast_log2(tl.maximum(n_hi.to(tl.float32), 0.5))
    # The count falls roughly exponentially with the value, so its logarithm is interpolated and not the count itself.
    secant = low + (high - low) * ((log_lo - fast_log2(k.to(tl.float32))) / (log_lo - log_hi))
    key = secant.to(tl.int32, bitcast=True) >> SHIFT
    # A secant alone can creep along one end of the interval, so every fourth step bisects.
    key = tl.where((step % 4 == 3) & (step > 4), lo + ((hi - lo) >> 1), key)
    key = tl.where(step == 0, first, key)
    return tl.minimum(tl.maximum(key, lo + 1), hi - 1)


@triton.jit
def _narrow(lo, hi, n_lo, n_hi, k, key, n):
    """Replace lo or hi by the threshold `key`, at or above which there are n coordinates."""
    enough = n >= k
    return (
        tl.where(enough, key, lo),
        tl.where(enough, hi, key),
        tl.where(enough, n, n_lo),
        tl.where(enough, n_hi, n),
    )


@triton.jit
def _sums_above(a, bits, lo, hi, n_lo, n_hi, k, SHIFT: tl.constexpr):
    """Sum the k largest of `a`, and their squares, after the search has ended."""
    cut = tl.where(n_lo == k, lo, hi)
    tied = tl.where(n_lo == k, 0, k - n_hi).to(tl.float32)
    value = (lo << SHIFT).to(tl.float32, bitcast=True)
    above = tl.where(bits >= cut << SHIFT, a, 0.0)
    return tl.sum(above, 0) + tied * value, tl.sum(above * above, 0) + tied * value * value


@triton.jit
def top_sums(a, d, mean, SHIFT: tl.constexpr):
    """Sum the largest 1 %, 5 % and 10 % of a row, and their squares; magnitude and energy for each share.

    Args:
        a: [BLOCK] float32 magnitudes, zero beyond the row.
        d: the row's width, an int32 scalar.
        mean: the mean of `a` over the row, which gives the first thresholds.
        SHIFT: the number of low bits that are zero in every coordinate (16 for values from bfloat16).
    """
    bits = a.to(tl.int32, bitcast=True)
    k1 = tl.maximum(d // 100, 1)
    k5 = tl.maximum(d * 5 // 100, 1)
    k10 = tl.maximum(d * 10 // 100, 1)
    lo1 = d * 0
    lo5 = d * 0
    lo10 = d * 0
    hi1 = (tl.max(bits, 0) >> SHIFT) + 1
    hi5 = hi1
    hi10 = hi1
    at1 = d
    at5 = d
    at10 = d
    over1 = d * 0
    over5 = d * 0
    over10 = d * 0
    # Start at the quantiles of |x| for a Gaussian row, as multiples of its mean.
    first1 = (mean * 3.23).to(tl.int32, bitcast=True) >> SHIFT
    first5 = (mean * 2.46).to(tl.int32, bitcast=True) >> SHIFT
    first10 = (mean * 2.06).to(tl.int32, bitcast=True) >> SHIFT
    step = d * 0
    searching = (hi1 > 1) & (d > 0)
    while searching:
        key1 = _threshold(lo1, hi1, at1, over1, k1, first1, step, SHIFT)
        key5 = _threshold(lo5, hi5, at5, over5, k5, first5, step, SHIFT)
        key10 = _threshold(lo10, hi10, at10, over10, k10, first10, step, SHIFT)
        n1 = _count(bits, key1 << SHIFT)
        n5 = _count(bits, key5 << SHIFT)
        n10 = _count(bits, key10 << SHIFT)
        lo1, hi1, at1, over1 = _narrow(lo1, hi1, at1, over1, k1, key1, n1)
        lo5, hi5, at5, over5 = _narrow(lo5, hi5, at5, over5, k5, key5, n5)
        lo10, hi10, at10, over10 = _narrow(lo10, hi10, at10, over10, k10, key10, n10)
        step += 1
        open1 = (hi1 - lo1 > 1) & (at1 != k1)
        open5 = (hi5 - lo5 > 1) & (at5 != k5)
        open10 = (hi10 - lo10 > 1) & (at10 != k10)
        searching = open1 | open5 | open10
    magnitude1, energy1 = _sums_above(a, bits, lo1, hi1, at1, over1, k1, SHIFT)
    magnitude5, energy5 = _sums_above(a, bits, lo5, hi5, at5, over5, k5, SHIFT)
    magnitude10, energy10 = _sums_above(a, bits, lo10, hi10, at10, over10, k10, SHIFT)
    return magnitude1, energy1, magnitude5, energy5, magnitude10, energy10


@triton.jit
def gini_exact(a, d, total, BLOCK: tl.constexpr):
    """Compute the Gini index of [BLOCK] magnitudes that are zero beyond the row's width d."""
    # The BLOCK − d padding zeros sort first, so the rank within the row is smaller by that number.
    rank = tl.arange(0, BLOCK) + 1 - (BLOCK - d)
    return tl.sum(tl.sort(a) * (2 * rank - d - 1).to(tl.float32), 0) / (d.to(tl.float32) * total)


@triton.jit
def gini_binned(a, d, total, BLOCK: tl.constexpr):
    """Compute the Gini index of [BLOCK] magnitudes that are zero beyond the row's width d, and its error bound."""
    # The bits of non-negative floats order as the floats do, so bins over the bits are bins over the values.
    bits = a.to(tl.int32, bitcast=True)
    base = (tl.max(bits, 0) & 0x7F800000) - (OCTAVES_BELOW << 23)
    bin_of = tl.minimum(tl.maximum((bits - base) >> BIN_SHIFT, 0), BINS - 1)

    number = tl.arange(0, BINS)
    zeros = tl.sum((bits == 0).to(tl.int32), 0)
    n = tl.histogram(bin_of, BINS) - tl.where(number == 0, zeros, 0)
    # The number of coordinates that rank below the bin: those in lower bins, and the row's own zeros without the padding.
    before = tl.cumsum(n, 0) - n + (zeros - (BLOCK - d))
    weight = (2 * before + n - d).to(tl.float32)
    mass_ranked = tl.sum(a * tl.gather(weight, bin_of, 0), 0)

    upper = (base + ((number + 1) << BIN_SHIFT)).to(tl.float32, bitcast=True)
    lower = (base + (number << BIN_SHIFT)).to(tl.float32, bitcast=True)
    width = upper - tl.where(number == 0, 0.0, lower)
    slack = ((n * n) >> 2).to(tl.float32) * width
    mass_low = tl.sum(tl.where(bin_of == 0, a, 0.0), 0)
    slack = tl.where(number == 0, tl.minimum(slack, tl.maximum(n - 1, 0).to(tl.float32) * mass_low), slack)
    half = tl.sum(slack, 0) * 0.5
    whole = d.to(tl.float32) * total
    return (mass_ranked + half) / whole, half / whole + ROUNDING
