"""The kernels of `align.py`. A program holds keys of one block and goes through the queries that chose it.

Legend: H query heads, G groups, C queries of a chunk. `slots` counts each part of a block as a separate slot.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

from sparsort.kernels.blocksparse.triton.launch import LOG2_E
from sparsort.kernels.blocksparse.triton.select_kernel import load_rows

_LOG2_E = tl.constexpr(LOG2_E)
# A position that no query reaches.
_NEVER = tl.constexpr(2**31 - 1)
# Gradients of scores are below 1, and mostly far below. This factor keeps them above the subnormal numbers of float16.
_GAIN = tl.constexpr(1024.0)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _block_of(order_ptr, bounds_ptr, table_ptr, bounds_t, first, splits, groups, blocks):
    """Return a program's split, its block (row, group, first key column, number of keys, position of the first key), and the
    start and number of its entries."""
    work = tl.load(order_ptr + tl.program_id(0))
    number = work // splits
    split = work - number * splits
    bounds_ptr += number * bounds_t + first + split
    start = tl.load(bounds_ptr)
    total = (tl.load(bounds_ptr + 1) - start).to(tl.int32)
    row_and_group = number // blocks
    row = row_and_group // groups
    table_ptr += (row * blocks + number - row_and_group * blocks) * 3
    group = row_and_group - row * groups
    return split, row, group, tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), start, total


@triton.jit(
    do_not_specialize=["bounds_t", "first", "splits", "batch", "groups", "blocks", "queries", "start", "C", "slots"]
)
def lse_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    order_ptr,
    bounds_ptr,
    table_ptr,
    chooser_ptr,
    slot_ptr,
    position_ptr,
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_g,
    key_s,
    key_d,
    scale2,
    bounds_t,
    first,
    splits,
    batch,
    groups,
    blocks,
    queries,
    start,
    C,
    slots,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the log-sum-exp over the program's keys, for every head and (query, slot)."""
    split, row, group, first_key, keys, first_position, entries, total = _block_of(  # noqa: RUF059, `_` would be a variable
        order_ptr, bounds_ptr, table_ptr, bounds_t, first, splits, groups, blocks
    )
    if total == 0:
        return
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_block = offset < keys
    column = tl.arange(0, PADDED)
    at = tl.where(in_block, first_position + offset, _NEVER)
    key_ptr += row * key_b + group * key_g
    k = load_rows(key_ptr + (first_key + offset).to(tl.int64)[:, None] * key_s, in_block, column, key_d, WIDTH, True)
    query_ptr += row * query_b + group * HEADS * query_h
    for begin in range(0, total, ROWS):
        entry = begin + tl.arange(0, ROWS)
        real = entry < total
        chooser = tl.load(chooser_ptr + entries + entry, mask=real, other=0)
        slot = tl.load(slot_ptr + entries + entry, mask=real, other=0)
        position = tl.load(position_ptr + row * queries + chooser, mask=real, other=-1)
        seen = at[None, :] <= position[:, None]
        place = (row * groups + group) * HEADS * C + chooser - start
        place = place * slots + slot * tl.num_programs(1) + tl.program_id(1)
        head_ptr = query_ptr
        for head in range(HEADS):  # noqa: B007, Triton reads `_` as a variable
            q = load_rows(head_ptr + chooser[:, None] * query_t, real, column, query_d, WIDTH, True)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
            logits = tl.where(seen, logits, -float("inf"))
            top = tl.max(logits, 1)
            # If the query does not see any of these keys, the peak is −∞, and −∞ − (−∞) would be NaN.
            top = tl.where(top == -float("inf"), 0.0, top)
            lse = top + tl.log2(tl.sum(tl.exp2(logits - top[:, None]), 1))
            tl.store(lse_ptr + place, lse / _LOG2_E, mask=real)
            head_ptr += query_h
            place += C * slots


@triton.jit(
    do_not_specialize=[
        "bounds_t",
        "first",
        "splits",
        "batch",
        "groups",
        "blocks",
        "queries",
        "start",
        "C",
        "slots",
        "S",
    ]
)
def align_kernel(
    query_ptr,
    key_ptr,
    index_query_ptr,
    index_key_ptr,
    lse_ptr,
    student_ptr,
    kl_ptr,
    d_slot_ptr,
    d_key_ptr,
    order_ptr,
    bounds_ptr,
    table_ptr,
    chooser_ptr,
    slot_ptr,
    position_ptr,
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_g,
    key_s,
    key_d,
    index_query_b,
    index_query_g,
    index_query_t,
    index_query_i,
    index_key_b,
    index_key_s,
    index_key_i,
    lse_b,
    lse_h,
    lse_t,
    scale2,
    index_scale2,
    index_scale,
    S,
    bounds_t,
    first,
    splits,
    batch,
    groups,
    blocks,
    queries,
    start,
    C,
    slots,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    INDEX_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    split, row, group, first_key, keys, first_position, entries, total = _block_of(
        order_ptr, bounds_ptr, table_ptr, bounds_t, first, splits, groups, blocks
    )
    if total == 0:
        return
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_block = offset < keys
    column = tl.arange(0, PADDED)
    index_column = tl.arange(0, INDEX_PADDED)
    at = tl.where(in_block, first_position + offset, _NEVER)
    at_key = (first_key + offset).to(tl.int64)
    key_ptr += row * key_b + group * key_g
    k = load_rows(key_ptr + at_key[:, None] * key_s, in_block, column, key_d, WIDTH, True)
    index_key_ptr += row * index_key_b
    index_k = load_rows(
        index_key_ptr + at_key[:, None] * index_key_s, in_block, index_column, index_key_i, INDEX_WIDTH, True
    )
    query_ptr += row * query_b + group * HEADS * query_h
    index_query_ptr += row * index_query_b + group * index_query_g
    lse_ptr += row * lse_b + group * HEADS * lse_h
    student_ptr += (row * groups + group) * C
    kl_ptr += (row * groups + group) * C * slots
    d_slot_ptr += (row * groups + group) * C * slots * INDEX_WIDTH
    d_key = tl.zeros([KEYS, INDEX_PADDED], dtype=tl.float32)
    for begin in range(0, total, ROWS):
        entry = begin + tl.arange(0, ROWS)
        real = entry < total
        chooser = tl.load(chooser_ptr + entries + entry, mask=real, other=0)
        slot = tl.load(slot_ptr + entries + entry, mask=real, other=0)
        position = tl.load(position_ptr + row * queries + chooser, mask=real, other=-1)
        in_chunk = tl.where(real, chooser - start, 0)
        seen = at[:, None] <= position[None, :]
        teacher = tl.zeros([KEYS, ROWS], dtype=tl.float32)
        head_ptr = query_ptr
        head_lse_ptr = lse_ptr
        for head in range(HEADS):  # noqa: B007, Triton reads `_` as a variable
            q = load_rows(head_ptr + chooser[:, None] * query_t, real, column, query_d, WIDTH, True)
            lse = tl.load(head_lse_ptr + in_chunk * lse_t, mask=real, other=0.0) * _LOG2_E
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
            teacher += tl.exp2(logits - lse[None, :])
            head_ptr += query_h
            head_lse_ptr += lse_h
        teacher = tl.where(seen, teacher * (1.0 / HEADS), 0.0)

        index_q_ptrs = index_query_ptr + chooser[:, None] * index_query_t
        index_q = load_rows(index_q_ptrs, real, index_column, index_query_i, INDEX_WIDTH, True)
        student_lse = tl.load(student_ptr + in_chunk, mask=real, other=0.0) * _LOG2_E
        student = tl.dot(index_k, tl.trans(index_q), input_precision=PRECISION) * index_scale2 - student_lse[None, :]
        # Define 0 · log 0 = 0; the clamp keeps the logarithm finite.
        terms = tl.where(teacher > 0.0, teacher * (tl.log2(tl.maximum(teacher, _TINY)) - student), 0.0)
        # Indices within one group of a chunk fit into 32 bits.
        place = (in_chunk * slots + slot * tl.num_programs(1) + tl.program_id(1)).to(tl.int32)
        tl.store(kl_ptr + place, tl.sum(terms, 0) / _LOG2_E, mask=real)
        if GRADIENTS:
            d_score = tl.where(seen, tl.exp2(student) - teacher, 0.0)
            d_score = (d_score * _GAIN).to(index_q.dtype)
            d_query = tl.dot(tl.trans(d_score), index_k, input_precision=PRECISION) * (index_scale / _GAIN)
            pointers = d_slot_ptr + place[:, None] * INDEX_WIDTH + index_column[None, :]
            tl.store(pointers, d_query, mask=real[:, None] & (index_column[None, :] < INDEX_WIDTH))
            d_key = tl.dot(d_score, index_q, d_key, input_precision=PRECISION)
    if GRADIENTS:
        place = ((split * batch + row) * groups + group) * S + at_key
        pointers = d_key_ptr + place[:, None] * INDEX_WIDTH + index_column[None, :]
        written = in_block[:, None] & (index_column[None, :] < INDEX_WIDTH)
        # Adding without atomics is safe: chunks run one after another, and no other program of this chunk writes to these keys
        # of this split.
        tl.store(pointers, tl.load(pointers, mask=written, other=0.0) + d_key * (index_scale / _GAIN), mask=written)
