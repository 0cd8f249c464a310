"""The sparsity metrics of rows in Triton, which computes every metric of a row from a single read.

Contract: see `checks.py`; the oracle is `torch_rows.py`. One program holds one row of up to 32768 coordinates in registers and
computes in float32 whatever the input dtype, which keeps every metric within 1e-5 of float64. Rows are addressed by token number
and strides with 64-bit offsets, so a (B, T, H) tensor is never copied. Each row is first multiplied by the power of two that
brings its largest coordinate into [1, 2), so rows of magnitude 1e30 or 1e-30 stay in range. Only `l1`, which is in the states'
own units, can overflow. The results of a row do not depend on other rows and are bitwise reproducible, since there are no
atomics.

Trade-off: a row is read once, but about 90 instructions per coordinate are executed (half of them in `triton_order.py`).
Arithmetic is therefore the bottleneck for 16-bit states, not memory. Gini is the most expensive metric: the exact version needs
a bitonic sort (about 330 more instructions), the binned version a histogram (about 70 more). These numbers were counted in the
machine code for sm_90 and have not been timed on a GPU.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.sparsity.checks import (
    MAX_TRITON_WIDTH,
    FinalNorm,
    GiniMethod,
    RowMetrics,
    as_batches,
    check_arguments,
    check_states,
)
from sparsort.kernels.sparsity.metrics import METRIC_NAMES
from sparsort.kernels.sparsity.torch_rows import sparsity_rows_ref
from sparsort.kernels.sparsity.triton_order import count_above, fast_log2, gini_binned, gini_exact, top_sums

# The number of low mantissa bits that are zero in every value of the dtype after conversion to float32. The top-k search skips
# them.
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}

_N_METRICS = tl.constexpr(len(METRIC_NAMES))
# The columns that the kernel writes. A kernel can only read global variables that are constexpr.
_TOP1_ENERGY = tl.constexpr(METRIC_NAMES.index("top1_energy"))
_TOP5_ENERGY = tl.constexpr(METRIC_NAMES.index("top5_energy"))
_TOP10_ENERGY = tl.constexpr(METRIC_NAMES.index("top10_energy"))
_TOP1_MAGNITUDE = tl.constexpr(METRIC_NAMES.index("top1_magnitude"))
_TOP5_MAGNITUDE = tl.constexpr(METRIC_NAMES.index("top5_magnitude"))
_TOP10_MAGNITUDE = tl.constexpr(METRIC_NAMES.index("top10_magnitude"))
_L0_RELATIVE = tl.constexpr(METRIC_NAMES.index("l0_relative"))
_L0_ABSOLUTE = tl.constexpr(METRIC_NAMES.index("l0_absolute"))
_HOYER = tl.constexpr(METRIC_NAMES.index("hoyer"))
_GINI = tl.constexpr(METRIC_NAMES.index("gini"))
_EFFECTIVE_RANK_MAGNITUDE = tl.constexpr(METRIC_NAMES.index("effective_rank_magnitude"))
_EFFECTIVE_RANK_ENERGY = tl.constexpr(METRIC_NAMES.index("effective_rank_energy"))
_L1 = tl.constexpr(METRIC_NAMES.index("l1"))
_WRITTEN = (
    *(_TOP1_ENERGY, _TOP5_ENERGY, _TOP10_ENERGY, _TOP1_MAGNITUDE, _TOP5_MAGNITUDE, _TOP10_MAGNITUDE),
    *(_L0_RELATIVE, _L0_ABSOLUTE, _HOYER, _GINI, _EFFECTIVE_RANK_MAGNITUDE, _EFFECTIVE_RANK_ENERGY, _L1),
)
# The columns that the kernel does not write, which the reference computes.
_OTHERS = sorted(set(range(len(METRIC_NAMES))) - {column.value for column in _WRITTEN})
_INFINITY_BITS = tl.constexpr(0x7F800000)
_SIGNLESS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & _SIGNLESS


@triton.jit
def _scale_of(bits):
    """Return the power of two that brings the float with these bits into [1, 2), and its inverse."""
    # The clamp keeps both powers of two normal. At the ends of the range, the scaled float is only near [1, 2).
    exponent = tl.minimum(tl.maximum(bits >> 23, 2), 252)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _share(part, whole):
    return tl.minimum(tl.maximum(part / whole, 0.0), 1.0)


@triton.jit
def _effective_rank(total, sum_x_log2_x, width):
    return tl.minimum(tl.maximum(tl.exp2(tl.log2(total) - sum_x_log2_x / total) / width, 1.0 / width), 1.0)


@triton.jit
def _measure(
    c, live, d, unit, valid, l0_threshold,
    values_ptr, reason_ptr, bound_ptr,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, GINI: tl.constexpr,
):  # fmt: skip
    """Compute and store every metric of one row at one site.

    Args:
        c: [BLOCK] float32 coordinates, zero if not `live`; the state is c·unit.
        live: [BLOCK] bool, whether the coordinate is part of the row.
        d: the number of live coordinates, an int32 scalar.
        unit: a positive float32 scalar.
        valid: whether the row exists and is not already known to have a coordinate that is not finite.
        SHIFT: the number of low bits that are zero in every coordinate.
        GINI: 0 none, 1 exact, 2 binned.
    """
    bits = _magnitude_bits(c)
    top = tl.max(bits, 0)
    finite = (top < _INFINITY_BITS) & valid
    good = finite & (top > 0)
    scale, unscale = _scale_of(top)
    a = bits.to(tl.float32, bitcast=True) * scale
    width = d.to(tl.float32)

    e = a * a
    total = tl.sum(a, 0)
    energy = tl.sum(e, 0)
    # Define 0·log 0 = 0: the smallest normal number keeps the logarithm finite.
    log_a = fast_log2(tl.maximum(a, 1.1754943508222875e-38))
    rank_magnitude = _effective_rank(total, tl.sum(a * log_a, 0), width)
    rank_energy = _effective_rank(energy, 2.0 * tl.sum(e * log_a, 0), width)

    mean = total / width
    # Σ (a − mean)² = Σ a² − Σ a · mean, which needs no second pass over the row.
    square = energy - total * mean
    varies = d > 1
    if square * 64.0 < energy:
        # The difference of nearly equal sums has lost digits, so sum the squared deviations instead. Also detect constant rows
        # here: no value is above the mean, but the rounded mean may be slightly below that value.
        deviation = tl.where(live, a - mean, 0.0)
        square = tl.sum(deviation * deviation, 0)
        varies = tl.min(tl.where(live, bits, _SIGNLESS), 0) < top
    std = tl.sqrt(square / tl.maximum(width - 1.0, 1.0))
    l0_relative = tl.where(varies, count_above(a, mean + std), 0).to(tl.float32) / width
    # Without a norm, the unit is 1 and both sides are scaled by the same power of two, so the comparison is exact.
    l0_absolute = count_above(a, l0_threshold / unit * scale).to(tl.float32) / width

    root = tl.sqrt(width)
    hoyer = tl.where(d > 1, (root - total / tl.sqrt(energy)) / tl.maximum(root - 1.0, 0.25), 0.0)
    magnitude1, energy1, magnitude5, energy5, magnitude10, energy10 = top_sums(a, d, mean, SHIFT)

    nan = float("nan")
    gini = total * nan
    if GINI == 1:
        gini = gini_exact(a, d, total, BLOCK)
    if GINI == 2:
        gini, bound = gini_binned(a, d, total, BLOCK)
        tl.store(bound_ptr, tl.where(good, bound, nan))
    if GINI != 0:
        gini = tl.minimum(tl.maximum(gini, 0.0), 1.0)

    tl.store(values_ptr + _TOP1_ENERGY, tl.where(good, _share(energy1, energy), nan))
    tl.store(values_ptr + _TOP5_ENERGY, tl.where(good, _share(energy5, energy), nan))
    tl.store(values_ptr + _TOP10_ENERGY, tl.where(good, _share(energy10, energy), nan))
    tl.store(values_ptr + _TOP1_MAGNITUDE, tl.where(good, _share(magnitude1, total), nan))
    tl.store(values_ptr + _TOP5_MAGNITUDE, tl.where(good, _share(magnitude5, total), nan))
    tl.store(values_ptr + _TOP10_MAGNITUDE, tl.where(good, _share(magnitude10, total), nan))
    tl.store(values_ptr + _L0_RELATIVE, tl.where(good, l0_relative, nan))
    tl.store(values_ptr + _L0_ABSOLUTE, tl.where(good, l0_absolute, nan))
    tl.store(values_ptr + _HOYER, tl.where(good, tl.minimum(tl.maximum(hoyer, 0.0), 1.0), nan))
    tl.store(values_ptr + _GINI, tl.where(good, gini, nan))
    tl.store(values_ptr + _EFFECTIVE_RANK_MAGNITUDE, tl.where(good, rank_magnitude, nan))
    tl.store(values_ptr + _EFFECTIVE_RANK_ENERGY, tl.where(good, rank_energy, nan))
    tl.store(values_ptr + _L1, tl.where(good, total * unscale * unit, nan))
    # The codes of `metrics.ROW_REASONS`: 1 zero, 2 not finite.
    tl.store(reason_ptr, tl.where(finite, tl.where(top > 0, 0, 1), 2).to(tl.int8))


# Arguments that change from batch to batch are not specialised, because a compilation takes 15 to 25 seconds with the exact
# Gini. Strides stay specialised, since wide loads require that they are multiples of 16. They are multiples of the model's
# width: if that is a multiple of 16, there is one variant of the kernel, otherwise there are two.
@triton.jit(do_not_specialize=["N", "tokens", "T"], do_not_specialize_on_alignment=["index_ptr"])
def _rows_kernel(
    states_ptr, index_ptr, scale_ptr, weight_ptr, values_ptr, reason_ptr, bound_ptr,
    N, tokens, T,
    stride_b, stride_t, stride_h,
    l0_threshold, eps, offset,
    H: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr, GINI: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row
    if HAS_INDEX:
        token = tl.load(index_ptr + row).to(tl.int64)
    # An index on the GPU is not checked on the host. A token that does not exist is read as token 0, and `valid` makes its
    # metrics NaN.
    valid = (token >= 0) & (token < tokens)
    token = tl.where(valid, token, 0)
    b = token // T
    t = token - b * T
    column = tl.arange(0, BLOCK)
    inside = column < H
    x_ptr = states_ptr + b * stride_b + t * stride_t + column.to(tl.int64) * stride_h
    # Upcast immediately, so that nothing is computed in 16 bits, neither on the GPU nor in the interpreter.
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)

    live = inside
    c = x
    d = tl.full((), H, tl.int32)
    if HAS_SCALE:
        dim_scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
        live = dim_scale != 0.0
        c = tl.where(live, x * dim_scale, 0.0)
        d = tl.sum(live.to(tl.int32), 0)
    _measure(
        c, live, d, 1.0, valid, l0_threshold,
        values_ptr + row * _N_METRICS, reason_ptr + row, bound_ptr + row, BLOCK, SHIFT, GINI,
    )  # fmt: skip
    if HAS_NORM:
        top = tl.max(_magnitude_bits(x), 0)
        scale, unscale = _scale_of(top)
        scaled = x * scale
        mean_square = tl.sum(scaled * scaled, 0) / H
        # Compute 1 / sqrt(mean(x²) + eps) / scale in two ways, each of which keeps its factors in the range of float32: one
        # for rows of ordinary or large magnitude, and one for tiny rows, in which eps dominates. The boundary is 2⁴⁰.
        large = 1.0 / tl.sqrt(mean_square + (eps * scale) * scale)
        small = unscale / tl.sqrt(mean_square * unscale * unscale + eps)
        unit = tl.where((scale > 1099511627776.0) & (eps > 0.0), small, large)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0) + offset
        c = tl.where(inside, scaled * weight, 0.0)
        if HAS_SCALE:
            dim_scale = tl.load(scale_ptr + H + column, mask=inside, other=0.0)
            live = dim_scale != 0.0
            c = tl.where(live, c * dim_scale, 0.0)
            d = tl.sum(live.to(tl.int32), 0)
        # The norm's products may have any low bits, so no bits can be skipped (SHIFT = 0).
        _measure(
            c, live, d, unit, valid & (top < _INFINITY_BITS), l0_threshold,
            values_ptr + (N + row) * _N_METRICS, reason_ptr + N + row, bound_ptr + N + row, BLOCK, 0, GINI,
        )  # fmt: skip


def sparsity_rows_triton(
    states: Tensor,
    index: Tensor | None = None,
    *,
    dim_scale: Tensor | None = None,
    norm: FinalNorm | None = None,
    l0_threshold: float = 1.0,
    gini: GiniMethod = "exact",
) -> RowMetrics:
    """Compute every metric of the chosen rows, without a gradient.

    The arguments are those of `sparsity_rows_ref`, for states of float16, bfloat16 or float32 with H at most 32768.

    Returns:
        RowMetrics in float32: values (N, M) and reasons (N,); with `norm`, (2, N, M) and (2, N).

    Raises:
        SparsortError: an argument does not fit (see `checks.check_arguments`), or the states are float64 or too wide for the
            kernel.
    """
    check_states(states)
    check_arguments(states, index, dim_scale, norm, l0_threshold, gini)
    H = states.shape[-1]
    if states.dtype not in _ZERO_BITS or H > MAX_TRITON_WIDTH:
        raise SparsortError(
            f"the Triton kernel takes float16, bfloat16 or float32 rows of width up to {MAX_TRITON_WIDTH}, "
            f"got {states.dtype} of width {H}. Use sparsity_rows, which falls back to the torch reference."
        )
    states = states.detach()
    states_BTH = as_batches(states)
    tokens = states.shape[:-1].numel()
    N = tokens if index is None else index.numel()
    if N and not tokens:
        raise SparsortError(
            f"index names {N} tokens, but states of shape {tuple(states.shape)} have no tokens. Pass an empty index."
        )
    sites = 1 if norm is None else 2
    values_SNM = states.new_empty((sites, N, len(METRIC_NAMES)), dtype=torch.float32)
    reason_SN = states.new_empty((sites, N), dtype=torch.int8)
    bound_SN = states.new_empty((sites, N) if gini == "binned" else (1,), dtype=torch.float32)
    if N:
        block = max(128, triton.next_power_of_2(H))
        scaled = dim_scale is not None
        # Triton launches on the current device, even if the tensors are on another one.
        with torch.cuda.device_of(states):
            # Where an optional tensor is missing, any tensor serves as the pointer that the kernel does not read.
            _rows_kernel[(N,)](
                states_BTH,
                index.to(states.device).contiguous() if index is not None else reason_SN,
                dim_scale.float().expand(sites, H).contiguous() if dim_scale is not None else values_SNM,
                norm.weight.float().contiguous() if norm is not None else values_SNM,
                *(values_SNM, reason_SN, bound_SN),
                *(N, tokens, states_BTH.shape[1]),
                *states_BTH.stride(),
                _float32_not_above(l0_threshold),
                *((0.0, 0.0) if norm is None else (norm.eps, norm.offset)),
                H=H,
                BLOCK=block,
                SHIFT=0 if scaled else _ZERO_BITS[states.dtype],
                GINI=("none", "exact", "binned").index(gini),
                HAS_INDEX=index is not None,
                HAS_SCALE=scaled,
                HAS_NORM=norm is not None,
                num_warps=_warps(block),
            )
        if _OTHERS:
            # The kernel has marked tokens that do not exist. The reference would fail on them, so it reads token 0 instead.
            valid_N = index if index is None else torch.where((index >= 0) & (index < tokens), index, 0)
            reference = sparsity_rows_ref(
                states, valid_N, dim_scale=dim_scale, norm=norm, l0_threshold=l0_threshold, gini=gini
            )
            other_SNM = reference.values_NM.reshape(values_SNM.shape)[..., _OTHERS]
            values_SNM[..., _OTHERS] = other_SNM.masked_fill((reason_SN != 0)[..., None], torch.nan)
    bound = bound_SN if gini == "binned" else None
    if norm is None:
        return RowMetrics(values_SNM[0], reason_SN[0], None if bound is None else bound[0])
    return RowMetrics(values_SNM, reason_SN, bound)


def _warps(block: int) -> int:
    """Return the warps per row: 32 coordinates per thread, which fit its registers, so one warp for up to 1024 coordinates."""
    return max(1, min(32, block // 1024))


def _float32_not_above(value: float) -> float:
    """Return the largest float32 that is not above `value`, which compares with every float32 as `value` does."""
    limit = torch.finfo(torch.float32).max
    if value > limit:
        return limit
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    if rounded > value:
        return float(torch.nextafter(torch.tensor(rounded), torch.tensor(-math.inf)))
    return rounded
