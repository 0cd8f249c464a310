"""Exact attention over a selection in Triton, the backward pass.

Contract: it computes the gradients of `attend.attend_forward_triton` from its output and log-sum-exp, by two kernels and without
atomics:

- Queries and bias: like the forward pass, a program processes a tile of (query, head) rows over the union of its blocks
  (`unions.py`). It also writes δ = Σ_d dO·O of each row, which the other kernel reads.
- Keys and values: a program holds keys of one block and gathers the rows of the queries that chose it, from the reverse of the
  selection (MSA, arXiv 2606.13392). Blocks with many queries are divided, and their partial sums are added in order
  (`segments.py`).

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
from sparsort.kernels.blocksparse.selection import Selection
from sparsort.kernels.blocksparse.triton.attend import chosen_bias, key_positions, load_2d, store_2d
from sparsort.kernels.blocksparse.triton.attend_backward_keys import key_gradients
from sparsort.kernels.blocksparse.triton.launch import LOG2_E, check_triton, launch, matmul_precision
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
            scale,
            scale * LOG2_E,
            *grad_output.stride(),
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *output.stride(),
            *d_query.stride(),
            *lse.stride(),
            *delta.stride()[:2],
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            *((0, 0, 0) if d_bias is None else d_bias.stride()[:3]),
            union.block.shape[2],
            union.block.shape[1],
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
        d_key, d_value = key_gradients(
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
    grad_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    bias_ptr,
    d_query_ptr,
    delta_ptr,
    d_bias_ptr,
    tiles_ptr,
    block_ptr,
    members_ptr,
    slot_ptr,
    count_ptr,
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
    output_b,
    output_h,
    output_t,
    output_d,
    d_query_b,
    d_query_h,
    d_query_t,
    d_query_d,
    lse_b,
    lse_h,
    lse_t,
    delta_b,
    delta_h,
    bias_b,
    bias_g,
    bias_t,
    bias_k,
    d_bias_b,
    d_bias_h,
    d_bias_t,
    longest,
    union_groups,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    at_query = (first + in_tile).to(tl.int64)
    query_row = row * query_b + head * query_h + at_query * query_t
    q = load_2d(query_ptr, query_row, column, 1, query_d, real, WIDTH)
    grad_row = row * grad_b + head * grad_h + at_query * grad_t
    grad = load_2d(grad_ptr, grad_row, column, 1, grad_d, real, WIDTH)
    output_row = row * output_b + head * output_h + at_query * output_t
    out = load_2d(output_ptr, output_row, column, 1, output_d, real, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row * delta_b + head * delta_h + at_query, delta, mask=real)
    lse = tl.load(lse_ptr + row * lse_b + head * lse_h + at_query * lse_t, mask=real, other=0.0) * _LOG2_E
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    d_bias_ptr += row * d_bias_b
    d_bias_row = head * d_bias_h + at_query * d_bias_t
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
        at = key_positions(block, part, BLOCK_SIZE, KEYS)
        member = real & (((tl.load(members_ptr + entry) >> in_tile) & 1) != 0)
        k = load_2d(key_ptr, at, column, key_s, key_d, at <= last, WIDTH)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if HAS_BIAS:
            slot, bias = chosen_bias(bias_ptr, slot_ptr, entry, in_tile, member, bias_t, bias_k, QUERIES)
            logits += bias[:, None]
        limit = tl.where(member, position, -1)
        logits = tl.where(at[None, :] <= limit[:, None], logits, -float("inf"))
        weight = tl.exp2(logits - lse[:, None])
        v = load_2d(value_ptr, at, column, value_s, value_d, at <= last, WIDTH)
        d_logits = weight * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if HAS_BIAS:
            # The sum over a block is stored again after each of its parts; after the last part it is complete.
            d_slot = tl.where(part == 0, 0.0, d_slot) + tl.sum(d_logits, 1)
            tl.store(d_bias_ptr + d_bias_row + slot.to(tl.int64), d_slot, mask=member)
        d_query = tl.dot(d_logits.to(k.dtype), k, d_query, input_precision=PRECISION)

    d_query_row = row * d_query_b + head * d_query_h + at_query * d_query_t
    store_2d(d_query_ptr, d_query_row, column, 1, d_query_d, d_query * scale, real, WIDTH)
