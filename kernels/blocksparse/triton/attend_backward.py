"""Exact attention over a selection in Triton, the backward pass.

Contract: it computes the gradients of `attend.attend_forward_triton` from its output and log-sum-exp, by two kernels and without
atomics:

- Queries and bias: like the forward pass, a program processes a tile of (query, head) rows over the union of its blocks
  (`unions.py`). It also writes δ = Σ_d dO·O of each row, which the other kernel reads.
- Keys and values: a program holds keys of one block and gathers the rows of the queries that chose it, from the reverse of the
  selection (MSA, arXiv 2606.13392). It processes them in chunks of (query, head) rows, which leaves no row idle for any size of
  a group. Blocks with many queries are divided, and their partial sums are added in order (`segments.py`).

With P = exp(scale · q·k + bias − lse): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − δ), dQ = scale · dS K, dK = scale · dSᵀ Q, and dbias is
dS summed over a slot's keys and the group's heads (FlashAttention-2, arXiv 2307.08691, algorithm 2).

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D head width, K slots, W block size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, reverse
from sparsort.kernels.blocksparse.triton.attend import NEVER, chosen_bias, key_positions, load_2d, store_2d
from sparsort.kernels.blocksparse.triton.launch import LOG2_E, check_triton, launch, matmul_precision, processors
from sparsort.kernels.blocksparse.triton.segments import key_blocks, locate_block, longest_segment, segments
from sparsort.kernels.blocksparse.triton.unions import tile_rows, unions

_LOG2_E = tl.constexpr(LOG2_E)


def attend_backward_triton(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of the attention's inputs.

    Args:
        grad_output: (B, H, T, D), the gradient of the output; any strides, here and below. Padding may hold any values.
        query, key, value, selection, layout, scale, bias: the arguments of the forward pass.
        output, lse: the results of the forward pass.

    Returns:
        The gradients of query, key, value and bias (None without a bias), in their dtypes; 0 for padding and for keys that no
        query sees.

    Raises:
        SparsortError: the kernels do not support the dtype or the width.
    """
    check_triton(query)
    B, H, T, D = query.shape
    G, K = key.shape[1], selection.blocks.shape[3]
    d_query = torch.zeros_like(query) if layout.tokens < B * T else torch.empty_like(query)
    # One gradient per head, because the heads of a group may be in different tiles; they are added below.
    d_bias = None if bias is None else torch.zeros((B, H, T, K), dtype=torch.float32, device=query.device)
    if not (layout.tokens and H and K):
        nothing = None if bias is None else torch.zeros_like(bias)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), nothing
    delta = torch.empty((B, H, T), dtype=torch.float32, device=query.device)
    plan = launch("query", query, layout, heads=H // G, block_size=selection.block_size)
    union = unions(selection, layout, heads=H // G, rows=plan.rows, slots=bias is not None)
    with torch.cuda.device_of(query):
        _query_kernel[(len(union.tiles), G)](
            *(grad_output, query, key, value, output, lse),
            query if bias is None else bias,
            *(d_query, delta),
            delta if d_bias is None else d_bias,
            *union,
            *(scale, scale * LOG2_E),
            *(*grad_output.stride(), *query.stride(), *key.stride(), *value.stride(), *output.stride()),
            *(*d_query.stride(), *lse.stride(), *delta.stride()[:2]),
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            *((0, 0, 0) if d_bias is None else d_bias.stride()[:3]),
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
        d_key, d_value = _key_gradients(
            grad_output, query, key, value, lse, delta, selection, layout, scale=scale, bias=bias
        )
    if bias is None or d_bias is None:
        return d_query, d_key, d_value, None
    return d_query, d_key, d_value, d_bias.view(B, G, -1, T, K).sum(2).to(bias.dtype)


@triton.jit(
    do_not_specialize=[
        *("lse_b", "lse_h", "lse_t", "delta_b", "delta_h", "bias_b", "bias_g", "bias_t", "bias_k"),
        *("d_bias_b", "d_bias_h", "d_bias_t", "longest", "union_groups"),
    ]
)
def _query_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, bias_ptr, d_query_ptr, delta_ptr, d_bias_ptr,
    tiles_ptr, block_ptr, members_ptr, slot_ptr, count_ptr,
    scale, scale2,
    grad_b, grad_h, grad_t, grad_d, query_b, query_h, query_t, query_d, key_b, key_g, key_s, key_d,
    value_b, value_g, value_s, value_d, output_b, output_h, output_t, output_d,
    d_query_b, d_query_h, d_query_t, d_query_d, lse_b, lse_h, lse_t, delta_b, delta_h,
    bias_b, bias_g, bias_t, bias_k, d_bias_b, d_bias_h, d_bias_t,
    longest, union_groups,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    row, first, key_start, in_tile, head, position, real = tile_rows(tiles_ptr + tile * 6, HEADS, ROWS)
    place = tile * union_groups + tl.minimum(group, union_groups - 1)
    block_ptr += place * longest
    members_ptr += place * longest
    slot_ptr += place * longest * QUERIES
    bias_ptr += row * bias_b + group * bias_g + first.to(tl.int64) * bias_t
    column = tl.arange(0, PADDED)
    head = group * HEADS + head
    query_column = (first + in_tile).to(tl.int64)
    query_row = row * query_b + head * query_h + query_column * query_t
    q = load_2d(query_ptr, query_row, column, 1, query_d, real, WIDTH)
    grad_row = row * grad_b + head * grad_h + query_column * grad_t
    grad = load_2d(grad_ptr, grad_row, column, 1, grad_d, real, WIDTH)
    output_row = row * output_b + head * output_h + query_column * output_t
    out = load_2d(output_ptr, output_row, column, 1, output_d, real, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row * delta_b + head * delta_h + query_column, delta, mask=real)
    lse = tl.load(lse_ptr + row * lse_b + head * lse_h + query_column * lse_t, mask=real, other=0.0) * _LOG2_E
    # A row that sees nothing has weights 2^(−∞ − 0) = 0 instead of NaN.
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    d_bias_ptr += row * d_bias_b
    d_bias_row = head * d_bias_h + query_column * d_bias_t
    key_ptr += row * key_b + group * key_g + key_start.to(tl.int64) * key_s
    value_ptr += row * value_b + group * value_g + key_start.to(tl.int64) * value_s
    last = tl.max(tl.where(real, position, 0), 0)

    d_query = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    d_slot = tl.zeros([ROWS], dtype=tl.float32)
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    for step in range(0, tl.load(count_ptr + place) * PARTS):
        entry = step // PARTS
        part = step - entry * PARTS
        block = tl.load(block_ptr + entry)
        key_position = key_positions(block, part, BLOCK_SIZE, KEYS)
        member = real & (((tl.load(members_ptr + entry) >> in_tile) & 1) != 0)
        k = load_2d(key_ptr, key_position, column, key_s, key_d, key_position <= last, WIDTH)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if HAS_BIAS:
            slot, bias = chosen_bias(bias_ptr, slot_ptr, entry, in_tile, member, bias_t, bias_k, QUERIES)
            logits += bias[:, None]
        limit = tl.where(member, position, -1)
        logits = tl.where(key_position[None, :] <= limit[:, None], logits, -float("inf"))
        weight = tl.exp2(logits - lse[:, None])
        v = load_2d(value_ptr, key_position, column, value_s, value_d, key_position <= last, WIDTH)
        d_logits = weight * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if HAS_BIAS:
            # The sum over a block is stored again after each of its parts; after the last part it is complete.
            d_slot = tl.where(part == 0, 0.0, d_slot) + tl.sum(d_logits, 1)
            tl.store(d_bias_ptr + d_bias_row + slot.to(tl.int64), d_slot, mask=member)
        d_query = tl.dot(d_logits.to(k.dtype), k, d_query, input_precision=PRECISION)

    d_query_row = row * d_query_b + head * d_query_h + query_column * d_query_t
    store_2d(d_query_ptr, d_query_row, column, 1, d_query_d, d_query * scale, real, WIDTH)


def _key_gradients(
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
        *(scale, scale * LOG2_E),
        *(*grad_output.stride(), *query.stride(), *key.stride(), *value.stride()),
        *(*d_key.stride(), *d_value.stride(), *lse.stride(), *delta.stride()[:2]),
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
            *(*d_key.stride(), *d_value.stride(), G, chosen.blocks),
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
    grad_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, bias_ptr, d_key_ptr, d_value_ptr, partial_ptr,
    segments_ptr, table_ptr, chooser_ptr, slot_ptr, position_ptr,
    scale, scale2,
    grad_b, grad_h, grad_t, grad_d, query_b, query_h, query_t, query_d, key_b, key_g, key_s, key_d,
    value_b, value_g, value_s, value_d, d_key_b, d_key_g, d_key_s, d_key_d,
    d_value_b, d_value_g, d_value_s, d_value_d, lse_b, lse_h, lse_t, delta_b, delta_h,
    bias_b, bias_g, bias_t, bias_k,
    groups, blocks, queries,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segments_ptr += tl.program_id(0).to(tl.int64) * 4
    row, group, first_key, keys, first_position = locate_block(tl.load(segments_ptr), table_ptr, groups, blocks)
    start = tl.load(segments_ptr + 1)
    total = (tl.load(segments_ptr + 2) - start).to(tl.int32) * HEADS
    partial = tl.load(segments_ptr + 3)
    chooser_ptr += start
    slot_ptr += start
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_block = offset < keys
    column = tl.arange(0, PADDED)
    key_column = first_key + offset
    k = load_2d(key_ptr + row * key_b + group * key_g, key_column, column, key_s, key_d, in_block, WIDTH)
    v = load_2d(value_ptr + row * value_b + group * value_g, key_column, column, value_s, value_d, in_block, WIDTH)
    key_position = tl.where(in_block, first_position + offset, NEVER)
    query_ptr += row * query_b + group * HEADS * query_h
    grad_ptr += row * grad_b + group * HEADS * grad_h
    lse_ptr += row * lse_b + group * HEADS * lse_h
    delta_ptr += row * delta_b + group * HEADS * delta_h
    bias_ptr += row * bias_b + group * bias_g
    position_ptr += row * queries

    d_key = tl.zeros([KEYS, PADDED], dtype=tl.float32)
    d_value = tl.zeros([KEYS, PADDED], dtype=tl.float32)
    for begin in range(0, total, ROWS):
        # A row is a (query, head) pair, so that a group with few heads fills its tile with more queries.
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
        logits = tl.where(key_position[:, None] <= position[None, :], logits, -float("inf"))
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
        store_2d(d_key_ptr, key_column, column, d_key_s, d_key_d, d_key, in_block, WIDTH)
        d_value_ptr += row * d_value_b + group * d_value_g
        store_2d(d_value_ptr, key_column, column, d_value_s, d_value_d, d_value, in_block, WIDTH)
    else:
        partial_ptr += partial * (2 * BLOCK_SIZE * WIDTH)
        store_2d(partial_ptr, offset, column, WIDTH, 1, d_key, in_block, WIDTH)
        store_2d(partial_ptr + BLOCK_SIZE * WIDTH, offset, column, WIDTH, 1, d_value, in_block, WIDTH)


@triton.jit(do_not_specialize=["groups", "blocks"])
def _partials_kernel(
    partial_ptr, d_key_ptr, d_value_ptr, cut_ptr, table_ptr,
    d_key_b, d_key_g, d_key_s, d_key_d, d_value_b, d_value_g, d_value_s, d_value_d,
    groups, blocks,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    first = tl.load(cut_ptr + number * 2)
    count = tl.load(cut_ptr + number * 2 + 1)
    if count > 0:
        row, group, first_key, keys, _ = locate_block(number, table_ptr, groups, blocks)
        offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        column = tl.arange(0, PADDED)
        in_block = offset < keys
        d_key = tl.zeros([KEYS, PADDED], dtype=tl.float32)
        d_value = tl.zeros([KEYS, PADDED], dtype=tl.float32)
        # In the order of the segments, so that the rounding of the sum is reproducible.
        partial_ptr += first * (2 * BLOCK_SIZE * WIDTH)
        for partial in range(0, count):  # noqa: B007, Triton reads `_` as a variable
            d_key += load_2d(partial_ptr, offset, column, WIDTH, 1, in_block, WIDTH)
            d_value += load_2d(partial_ptr + BLOCK_SIZE * WIDTH, offset, column, WIDTH, 1, in_block, WIDTH)
            partial_ptr += 2 * BLOCK_SIZE * WIDTH
        key_column = first_key + offset
        store_2d(
            d_key_ptr + row * d_key_b + group * d_key_g, key_column, column, d_key_s, d_key_d, d_key, in_block, WIDTH
        )
        d_value_ptr += row * d_value_b + group * d_value_g
        store_2d(d_value_ptr, key_column, column, d_value_s, d_value_d, d_value, in_block, WIDTH)
