"""Gini's sum Σ (2i − d − 1)·a_(i) of a row in registers, either exact by a sort or with a certified bound by a histogram.

The histogram has 256 bins over the bits of the float: 16 bins per octave, in the 16 octaves up to the row's largest coordinate.
Smaller coordinates go to bin 0. Every coordinate is weighted with the mean rank of its bin, so the histogram's sum T ignores
only the order within bins. For a bin with n coordinates, ranks r, mean rank m and width w, the ignored part is

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

BINS = tl.constexpr(256)
# With 16 bins per octave, the bin's number uses the 4 highest of the 23 mantissa bits, and 19 bits remain.
BIN_SHIFT = tl.constexpr(19)
OCTAVES_BELOW = tl.constexpr(15)
# The rounding error of float32 sums of up to 32768 terms, relative to d·Σa.
ROUNDING = tl.constexpr(2e-6)


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
