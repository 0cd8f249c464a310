"""The gradients of keys and values of exact attention over a selection, in Triton, key block by key block.

Contract: a program holds keys of one block and gathers the rows of the queries that chose it, from the reverse of the selection
(MSA, arXiv 2606.13392). It processes them in chunks of (query, head) rows, which leaves no row idle for any size of a group.
Blocks with many queries are divided, and their partial sums are added in order (`segments.py`). `attend_backward.py` has the
equations and the gradients of the queries.

Legend: B batch, T query columns, H query heads, G groups, R = H/G, D head width, W block size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, reverse
from sparsort.kernels.blocksparse.triton.attend import load_2d, store_2d
from sparsort.kernels.blocksparse.triton.launch import LOG2_E, launch, matmul_precision, processors
from sparsort.kernels.blocksparse.triton.segments import key_blocks, longest_segment, segments

_LOG2_E = tl.constexpr(LOG2_E)


def key_gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of key and value, (B, G, S, D) each, 0 for keys that no query chose.

    Args:
        grad_output, query, key, value, selection, layout, scale, bias: as in `attend_backward_triton`.
        lse: (B, H, T) float32, the log-sum-exp of the forward pass.
        delta: (B, H, T) float32, contiguous, Σ_d dO·O of each row.
    """
    d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
    H, D = query.shape[1], query.shape[3]
    G, W = key.shape[1], selection.block_size
    plan = launch("key", query, layout, heads=H // G, block_size=W)
    chosen = reverse(selection, layout)
    work = segments(chosen, longest_segment(len(chosen.query), H // G, processors(query.device)))
    if not len(work.segments):
        return d_key, d_value
    table = key_blocks(layout, chosen.first_block, chosen.blocks, W, query.device)
    partial = torch.empty((max(work.partials, 1), 2, W, D), dtype=torch.float32, device=query.device)
    padded = max(16, triton.next_power_of_2(D))
    _key_kernel[(len(work.segments), triton.cdiv(W, plan.keys))](
        *(grad_output, query, key, value, lse, delta),
        query if bias is None else bias,
        *(d_key, d_value, partial),
        *(work.segments, table, chosen.query, chosen.slot, layout.position(query.device)),
        scale,
        scale * LOG2_E,
        *grad_output.stride(),
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *d_key.stride(),
        *d_value.stride(),
        *lse.stride(),
        *delta.stride()[:2],
        *((0, 0, 0, 0) if bias is None else bias.stride()),
        *(G, chosen.blocks, layout.queries),
        HEADS=H // G,
        WIDTH=D,
        PADDED=padded,
        BLOCK_SIZE=W,
        ROWS=plan.rows,
        KEYS=plan.keys,
        HAS_BIAS=bias is not None,
        PRECISION=matmul_precision(query),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if work.partials:
        _partials_kernel[(len(work.cut), triton.cdiv(W, 16))](
            *(partial, d_key, d_value, work.cut, table),
            *d_key.stride(),
            *d_value.stride(),
            *(G, chosen.blocks),
            WIDTH=D,
            PADDED=padded,
            BLOCK_SIZE=W,
            KEYS=16,
            num_warps=4,
        )
    return d_key, d_value


@triton.jit(
    do_not_specialize=[
        *("lse_b", "lse_h", "lse_t", "delta_b", "delta_h", "bias_b", "bias_g", "bias_t", "bias_k"),
        *("groups", "blocks", "queries"),
    ]
)
def _key_kernel(
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    delta_ptr,
    bias_ptr,
    d_key_ptr,
    d_value_ptr,
    partial_ptr,
    segments_ptr,
    table_ptr,
    chooser_ptr,
    slot_ptr,
    position_ptr,
    scale,
    scale2,
    grad_b,
    grad_h,
    grad_t,
    grad_d,
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_g,
    key_s,
    key_d,
    value_b,
    value_g,
    value_s,
    value_d,
    d_key_b,
    d_key_g,
    d_key_s,
    d_key_d,
    d_value_b,
    d_value_g,
    d_value_s,
    d_value_d,
    lse_b,
    lse_h,
    lse_t,
    delta_b,
    delta_h,
    bias_b,
    bias_g,
    bias_t,
    bias_k,
    groups,
    blocks,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    segments_ptr += tl.program_id(0).to(tl.int64) * 4
    row, group, first_key, keys, first_position = _key_block(tl.load(segments_ptr), table_ptr, groups, blocks)
    start = tl.load(segments_ptr + 1)
    total = (tl.load(segments_ptr + 2) - start).to(tl.int32) * HEADS
    partial = tl.load(segments_ptr + 3)
    chooser_ptr += start
    slot_ptr += start
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_block = offset < keys
    column = tl.arange(0, PADDED)
    at_key = first_key + offset
    k = load_2d(key_ptr + row * key_b + group * key_g, at_key, column, key_s, key_d, in_block, WIDTH)
    v = load_2d(value_ptr + row * value_b + group * value_g, at_key, column, value_s, value_d, in_block, WIDTH)
    at = tl.where(in_block, first_position + offset, 2**31 - 1)
    query_ptr += row * query_b + group * HEADS * query_h
    grad_ptr += row * grad_b + group * HEADS * grad_h
    lse_ptr += row * lse_b + group * HEADS * lse_h
    delta_ptr += row * delta_b + group * HEADS * delta_h
    bias_ptr += row * bias_b + group * bias_g
    position_ptr += row * queries

    d_key = tl.zeros([KEYS, PADDED], dtype=tl.float32)
    d_value = tl.zeros([KEYS, PADDED], dtype=tl.float32)
    for begin in range(0, total, ROWS):
        flat = begin + tl.arange(0, ROWS)
        real = flat < total
        entry = flat // HEADS
        head = (flat - entry * HEADS).to(tl.int64)
        chooser = tl.load(chooser_ptr + entry, mask=real, other=0)
        position = tl.load(position_ptr + chooser, mask=real, other=-1)
        q = load_2d(query_ptr, head * query_h + chooser * query_t, column, 1, query_d, real, WIDTH)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        if HAS_BIAS:
            slot = tl.load(slot_ptr + entry, mask=real, other=0)
            bias = tl.load(bias_ptr + chooser * bias_t + slot * bias_k, mask=real, other=0.0).to(tl.float32)
            logits += (bias * _LOG2_E)[None, :]
        lse = tl.load(lse_ptr + head * lse_h + chooser * lse_t, mask=real, other=0.0) * _LOG2_E
        lse = tl.where(lse == -float("inf"), 0.0, lse)
        logits = tl.where(at[:, None] <= position[None, :], logits, -float("inf"))
        weight = tl.exp2(logits - lse[None, :])
        grad = load_2d(grad_ptr, head * grad_h + chooser * grad_t, column, 1, grad_d, real, WIDTH)
        d_value = tl.dot(weight.to(grad.dtype), grad, d_value, input_precision=PRECISION)
        delta = tl.load(delta_ptr + head * delta_h + chooser, mask=real, other=0.0)
        d_logits = weight * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        d_key = tl.dot(d_logits.to(q.dtype), q, d_key, input_precision=PRECISION)

    d_key *= scale
    # A block with a single segment is written directly; the others write partial sums for `_partials_kernel`.
    if partial < 0:
        d_key_ptr += row * d_key_b + group * d_key_g
        store_2d(d_key_ptr, at_key, column, d_key_s, d_key_d, d_key, in_block, WIDTH)
        d_value_ptr += row * d_value_b + group * d_value_g
        store_2d(d_value_ptr, at_key, column, d_value_s, d_value_d, d_value, in_block, WIDTH)
    else:
        partial_ptr += partial * (2 * BLOCK_SIZE * WIDTH)
        store_2d(partial_ptr, offset, column, WIDTH, 1, d_key, in_block, WIDTH)
        store_2d(partial_ptr + BLOCK_SIZE * WIDTH, offset, column, WIDTH, 1, d_value, in_block, WIDTH)


@triton.jit
def _key_block(number, table_ptr, groups, blocks):
    """Return batch row, group, first key column, number of keys and first position of block `number` in `Reverse.start`."""
    row_and_group = number // blocks
    row = row_and_group // groups
    table_ptr += (row * blocks + number - row_and_group * blocks) * 3
    return row, row_and_group - row * groups, tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)


@triton.jit(do_not_specialize=["groups", "blocks"])
def _partials_kernel(
    partial_ptr,
    d_key_ptr,
    d_value_ptr,
    cut_ptr,
    table_ptr,
    d_key_b,
    d_key_g,
    d_key_s,
    d_key_d,
    d_value_b,
    d_value_g,
    d_value_s,
    d_value_d,
    groups,
    blocks,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    first = tl.load(cut_ptr + number * 2)
    count = tl.load(cut_ptr + number * 2 + 1)
    if count > 0:
        row, group, first_key, keys, _ = _key_block(number, table_ptr, groups, blocks)
        offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        column = tl.arange(0, PADDED)
        in_block = offset < keys
        d_key = tl.zeros([KEYS, PADDED], dtype=tl.float32)
        d_value = tl.zeros([KEYS, PADDED], dtype=tl.float32)
        for number_of_partial in range(0, count):
            at = partial_ptr + (first + number_of_partial) * (2 * BLOCK_SIZE * WIDTH)
            d_key += load_2d(at, offset, column, WIDTH, 1, in_block, WIDTH)
            d_value += load_2d(at + BLOCK_SIZE * WIDTH, offset, column, WIDTH, 1, in_block, WIDTH)
        at_key = first_key + offset
        store_2d(d_key_ptr + row * d_key_b + group * d_key_g, at_key, column, d_key_s, d_key_d, d_key, in_block, WIDTH)
        d_value_ptr += row * d_value_b + group * d_value_g
        store_2d(d_value_ptr, at_key, column, d_value_s, d_value_d, d_value, in_block, WIDTH)
