"""Gini's sum Σ (2i − d − 1)·a_(i) of a row in registers: exact by a sort, or within a certified bound by a histogram.

The histogram has 256 bins of the float's bits, 16 to an octave, in the 16 octaves up to the row's largest coordinate;
what is smaller falls into bin 0. Every coordinate takes the mean rank of its bin, so the histogram's sum T errs only by
the order inside bins, which for a bin of n coordinates, r their ranks, m its mean rank and w its width, adds

    0 ≤ Σ 2(r − m)·a ≤ w·Σ_(r > m) 2(r − m) = w·⌊n²/4⌋,

not negative because a rises with r (Chebyshev), and largest when the upper half of the ranks stands at the bin's upper
edge and the lower half at its lower one. In bin 0, where w can exceed what is there, it is also at most (n − 1)·(the
bin's mass), as 2(r − m) ≤ n − 1. Exact zeros add nothing and are counted apart. So the truth lies in [T, T + s], s the
sum of these, the value is T + s/2 and the bound s/2, both over d·Σa: about 1e-4 for a Gaussian row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

BINS = tl.constexpr(256)
# 16 bins to an octave leave 23 − 4 bits of the mantissa below the bin's number.
BIN_SHIFT = tl.constexpr(19)
OCTAVES_BELOW = tl.constexpr(15)
# What float32 sums of up to 32768 terms can lose, relative to d·Σa.
ROUNDING = tl.constexpr(2e-6)


@triton.jit
def gini_exact(a, d, total, BLOCK: tl.constexpr):
    """Gini of [BLOCK] magnitudes that are zero beyond the row: the zeros sort first, so ranks start BLOCK − d later."""
    rank = tl.arange(0, BLOCK) + 1 - (BLOCK - d)
    return tl.sum(tl.sort(a) * (2 * rank - d - 1).to(tl.float32), 0) / (d.to(tl.float32) * total)


@triton.jit
def gini_binned(a, d, total, BLOCK: tl.constexpr):
    """Gini of [BLOCK] magnitudes that are zero beyond the row, and the bound on its error."""
    bits = a.to(tl.int32, bitcast=True)
    base = (tl.max(bits, 0) & 0x7F800000) - (OCTAVES_BELOW << 23)
    bin_of = tl.minimum(tl.maximum((bits - base) >> BIN_SHIFT, 0), BINS - 1)

    number = tl.arange(0, BINS)
    zeros = tl.sum((bits == 0).to(tl.int32), 0)
    n = tl.histogram(bin_of, BINS) - tl.where(number == 0, zeros, 0)
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
