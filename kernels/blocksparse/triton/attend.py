"""Exact attention over a selection in Triton, the forward pass.

Contract: that of `ops.attend`, without gradients; the oracle is `reference.attend_ref`. A program holds one tile of (query, head)
rows of a group and goes through the union of the blocks that its queries chose (`unions.py`). It hides from each row the keys
that the row did not choose or cannot see. The softmax is computed online, in powers of two with float32 sums. Nothing is copied:
tensors are read by their strides, with 64-bit offsets. Only keys that some query of the tile can see are read, so padding may
hold any values. There are no atomics, so results are bitwise reproducible.

Trade-off: if queries of a tile choose different blocks, each of them pays for the others' blocks too. A tile never reads and
multiplies more than dense attention would, and the R heads of a group share one read of a block.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D head width, K slots, W block size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection
from sparsort.kernels.blocksparse.triton.launch import INTERPRETED, LOG2_E, check_triton, launch, matmul_precision
from sparsort.kernels.blocksparse.triton.unions import tile_rows, unions

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(LOG2_E)
# A position that no query reaches.
NEVER = tl.constexpr(2**31 - 1)


def attend_forward_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute exact attention over the selection, without a gradient.

    Args:
        query: (B, H, T, D) float16, bfloat16 or float32, D at most 256; any strides, here and below.
        key, value: (B, G, S, D) of the same dtype.
        selection, layout: the keys that each query attends to.
        scale: factor for the logits.
        bias: (B, G, T, K), added to the logits of a slot's keys.

    Returns:
        Output (B, H, T, D) with the strides of the query, and log-sum-exp (B, H, T) float32; 0 and −∞ for queries that see
        nothing.

    Raises:
        SparsortError: the kernel does not support the dtype or the width.
    """
    check_triton(query)
    B, H, T, D = query.shape
    G, K = key.shape[1], selection.blocks.shape[3]
    output = torch.zeros_like(query) if layout.tokens < B * T else torch.empty_like(query)
    lse = torch.full((B, H, T), -torch.inf, dtype=torch.float32, device=query.device)
    if not layout.tokens or not H:
        return output, lse
    if not K:
        return output.zero_(), lse
    plan = launch("forward", query, layout, heads=H // G, block_size=selection.block_size)
    union = unions(selection, layout, heads=H // G, rows=plan.rows, slots=bias is not None)
    with torch.cuda.device_of(query):
        _forward_kernel[(len(union.tiles), G)](
            # Without a bias, any tensor serves as the pointer that the kernel does not read.
            *(query, key, value, query if bias is None else bias, output, lse),
            *union,
            scale * LOG2_E,
            *(*query.stride(), *key.stride(), *value.stride()),
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            *(*output.stride(), *lse.stride()[:2]),
            *(union.block.shape[2], union.block.shape[1]),
            HEADS=H // G,
            WIDTH=D,
            PADDED=max(16, triton.next_power_of_2(D)),
            BLOCK_SIZE=selection.block_size,
            ROWS=plan.rows,
            KEYS=plan.keys,
            QUERIES=union.slot.shape[-1],
            HAS_BIAS=bias is not None,
            PRECISION=matmul_precision(query),
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    return output, lse


@triton.jit
def load_2d(ptr, rows, columns, stride_row, stride_column, seen, WIDTH: tl.constexpr):
    """Load [rows, columns] of a strided matrix, 0 for rows that are not `seen` and columns beyond the width."""
    pointers = ptr + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    mask = seen[:, None]
    if columns.shape[0] != WIDTH:
        mask = mask & (columns[None, :] < WIDTH)
    values = tl.load(pointers, mask=mask, other=0.0)
    if _INTERPRETED:
        # The interpreter computes with NumPy, which has no bfloat16 and sums float16 in float16.
        values = values.to(tl.float32)
    return values


@triton.jit
def store_2d(ptr, rows, columns, stride_row, stride_column, values, real, WIDTH: tl.constexpr):
    """Store [rows, columns] in the matrix's own dtype, except for rows that are not `real` and columns beyond the width."""
    pointers = ptr + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    mask = real[:, None]
    if columns.shape[0] != WIDTH:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_positions(block, number, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Return the positions of the keys in part `number` of a block; beyond the block, a position that no query reaches."""
    offset = number * KEYS + tl.arange(0, KEYS)
    position = block * BLOCK_SIZE + offset
    if BLOCK_SIZE % KEYS != 0:
        position = tl.where(offset < BLOCK_SIZE, position, NEVER)
    return position


@triton.jit
def chosen_bias(bias_ptr, slot_ptr, entry, query, member, stride_t, stride_k, QUERIES: tl.constexpr):
    """Return each row's slot for a union's entry, and its bias to base 2; both are 0 for rows that did not choose it."""
    slot = tl.load(slot_ptr + entry.to(tl.int64) * QUERIES + query, mask=member, other=0)
    pointers = bias_ptr + query.to(tl.int64) * stride_t + slot.to(tl.int64) * stride_k
    return slot, tl.load(pointers, mask=member, other=0.0).to(tl.float32) * _LOG2_E


# Arguments that depend on the length of a batch are not specialised, to avoid compiling again, unless wide loads require it.
@triton.jit(do_not_specialize=["longest", "union_groups", "lse_b", "lse_h", "bias_b", "bias_g", "bias_t", "bias_k"])
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, output_ptr, lse_ptr, tiles_ptr, block_ptr, members_ptr, slot_ptr,
    count_ptr,
    scale,
    query_b, query_h, query_t, query_d, key_b, key_g, key_s, key_d, value_b, value_g, value_s, value_d,
    bias_b, bias_g, bias_t, bias_k, output_b, output_h, output_t, output_d, lse_b, lse_h,
    longest, union_groups,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    row, first, key_start, in_tile, head, position, real = tile_rows(tiles_ptr + tile * 6, HEADS, ROWS)
    # If all groups share their blocks, there is a single union for them.
    place = tile * union_groups + tl.minimum(group, union_groups - 1)
    block_ptr += place * longest
    members_ptr += place * longest
    slot_ptr += place * longest * QUERIES
    bias_ptr += row * bias_b + group * bias_g + first.to(tl.int64) * bias_t
    column = tl.arange(0, PADDED)
    head = group * HEADS + head
    query_column = first + in_tile
    query_row = row * query_b + head * query_h + query_column.to(tl.int64) * query_t
    q = load_2d(query_ptr, query_row, column, 1, query_d, real, WIDTH)
    key_ptr += row * key_b + group * key_g + key_start.to(tl.int64) * key_s
    value_ptr += row * value_b + group * value_g + key_start.to(tl.int64) * value_s
    last = tl.max(tl.where(real, position, 0), 0)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    mixed = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    for step in range(0, tl.load(count_ptr + place) * PARTS):
        entry = step // PARTS
        block = tl.load(block_ptr + entry)
        key_position = key_positions(block, step - entry * PARTS, BLOCK_SIZE, KEYS)
        member = real & (((tl.load(members_ptr + entry) >> in_tile) & 1) != 0)
        k = load_2d(key_ptr, key_position, column, key_s, key_d, key_position <= last, WIDTH)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            _, bias = chosen_bias(bias_ptr, slot_ptr, entry, in_tile, member, bias_t, bias_k, QUERIES)
            logits += bias[:, None]
        limit = tl.where(member, position, -1)
        logits = tl.where(key_position[None, :] <= limit[:, None], logits, -float("inf"))
        # The online softmax: sums so far are relative to the old peak, and are rescaled to the new one.
        new_top = tl.maximum(top, tl.max(logits, 1))
        # If a row has not seen any key yet, its peak is −∞, and −∞ − (−∞) would be NaN.
        finite = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(logits - finite[:, None])
        rescale = tl.exp2(top - finite)
        total = total * rescale + tl.sum(weight, 1)
        v = load_2d(value_ptr, key_position, column, value_s, value_d, key_position <= last, WIDTH)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * rescale[:, None], input_precision=PRECISION)
        top = new_top

    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)[:, None]
    output_row = row * output_b + head * output_h + query_column.to(tl.int64) * output_t
    store_2d(output_ptr, output_row, column, 1, output_d, mixed, real, WIDTH)
    lse = (top + tl.log2(tl.where(empty, 1.0, total))) / _LOG2_E
    tl.store(lse_ptr + row * lse_b + head * lse_h + query_column, tl.where(empty, -float("inf"), lse), mask=real)
