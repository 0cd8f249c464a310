"""The alignment loss between attention and index scores, with its gradients, in Triton.

Contract: the interface is that of `cpu.align.align_forward`, the computation is in float32 whatever the tensors' dtype, and the
oracle is `reference.align_ref`. With P as the mean of the group's heads' probabilities over the selection (MSA,
arXiv 2606.13392), KL(P ‖ student) = Σ P (log P − log student), and the gradient of a score is student − P.

Keys are the outer loop. A program holds keys of one block and gathers the queries that chose it, from the reverse of the
selection. The products therefore fill their tiles, whatever the size of the group and however different the choices of adjacent
queries. Sums over the blocks of a query are written per slot and added afterwards in the order of slots, and a block's sum over
its queries is computed by one program. There are no atomics, so results are bitwise reproducible. Queries are processed in
chunks, which limits the intermediate results to about 256 MiB. If there are too few blocks to keep the GPU busy, the queries of
a chunk are split among programs.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D head width, I index width, K slots,
W block size, C queries of a chunk. `slots` counts each part of a block as a separate slot.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, reverse
from sparsort.kernels.blocksparse.triton.launch import (
    LOG2_E,
    Launch,
    align_launch,
    check_triton,
    matmul_precision,
    processors,
    shared_memory,
)
from sparsort.kernels.blocksparse.triton.segments import key_blocks, locate_block
from sparsort.kernels.blocksparse.triton.select import load_rows

# The maximum size in bytes of the results that a chunk writes per slot.
_CHUNK_BYTES = 256 << 20
_MOST_SPLITS = 8

_LOG2_E = tl.constexpr(LOG2_E)
# A position that no query reaches.
_NEVER = tl.constexpr(2**31 - 1)
# Gradients of scores are below 1, and mostly far below. This factor keeps them above the subnormal numbers of float16.
_GAIN = tl.constexpr(1024.0)
_TINY = tl.constexpr(1.1754943508222875e-38)


class Work(NamedTuple):
    """The queries of every block, divided by sub-ranges of query columns. A chunk has `splits` sub-ranges.

    Attributes:
        query, slot: those of `Reverse`.
        table: the result of `key_blocks`.
        bounds: (B · G · N, sub-ranges + 1) int64, the first entry in `query` of each block and sub-range.
        range: the number of query columns in a sub-range.
        splits: the number of sub-ranges in a chunk.
        blocks: N, the number of blocks in the row that has the most.
    """

    query: Tensor
    slot: Tensor
    table: Tensor
    bounds: Tensor
    range: int
    splits: int
    blocks: int

    def order(self, chunk: int) -> Tensor:
        """Return the chunk's (block, split) pairs by descending number of queries, so that the longest do not start last."""
        bounds = self.bounds[:, chunk * self.splits : (chunk + 1) * self.splits + 1]
        return bounds.diff().flatten().argsort(descending=True)


def align_forward_triton(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    index_scale: float,
    lse: Tensor | None = None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute KL(P ‖ student) of every token and group.

    Args:
        query: (B, H, T, D), float16, bfloat16 or float32; any strides, here and below. D and I are at most 256.
        key: (B, G, S, D).
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection, layout: the support of both distributions.
        scale, index_scale: factors for the attention logits and for the index scores.
        lse: (B, H, T), the log-sum-exp from `attend_forward_triton` without a bias; None: it is computed here.
        gradients: whether to compute the gradients of rows.sum().

    Returns:
        Rows (B, G, T) float32, 0 for padding and for tokens that see nothing, and the gradients, or None: that of index_query
        in its dtype, that of index_key in float32, in which sums over many tokens stay in range.

    Raises:
        SparsortError: the kernels do not support a dtype or a width.
    """
    check_triton(query)
    check_triton(index_query)
    B, H, T, _ = query.shape
    G, S, width = index_query.shape[1], *index_key.shape[1:]
    K, W = selection.blocks.shape[3], selection.block_size
    rows = torch.zeros((B, G, T), dtype=torch.float32, device=query.device)
    d_query = torch.zeros_like(index_query) if gradients else None
    if not layout.tokens or not K or not H:
        return rows, d_query, torch.zeros_like(index_key, dtype=torch.float32) if gradients else None
    plan = align_launch(query, index_query, W, shared_memory(query.device))
    slots = K * triton.cdiv(W, plan.keys)
    # A slot of a query needs its gradient (I floats), or without gradients the log-sum-exp of each head and two more.
    work = _work(selection, layout, slots * (width if gradients else H // G + 2))
    # One gradient per split, since the splits of a block run at the same time and may not write to the same keys.
    d_key = torch.zeros((work.splits, B, G, S, width) if gradients else (1,), dtype=torch.float32, device=query.device)
    if lse is not None:
        lse = lse.float()
    for chunk, start in enumerate(range(0, T, work.range * work.splits)):
        C = min(work.range * work.splits, T - start)
        part = slice(start, start + C)
        with torch.cuda.device_of(query):
            launches = _ChunkLaunches(work, plan, selection, layout, chunk, start, C, slots)
            # All groups share one head of index keys, which the expanded view presents as one per group.
            student_lse = launches.lse(index_query, index_key[:, None].expand(B, G, S, width), index_scale)
            head_lse = launches.lse(query, key, scale) if lse is None else lse[:, :, part]
            tensors = (query, key, index_query, index_key, head_lse, student_lse)
            kl_by_slot, d_query_by_slot = launches.align(tensors, d_key, scale, index_scale, gradients)
        # Each program wrote its own slots, so these sums have a fixed order, which atomics would not.
        rows[:, :, part] = kl_by_slot.sum(-1)
        if d_query is not None:
            d_query[:, :, part] = d_query_by_slot.sum(-2).to(d_query.dtype)
    return rows, d_query, d_key.sum(dim=(0, 2)) if gradients else None


class _ChunkLaunches(NamedTuple):
    """The kernel launches of one chunk, which has C query columns from `start` on."""

    work: Work
    plan: Launch
    selection: Selection
    layout: Layout
    chunk: int
    start: int
    C: int
    slots: int

    def lse(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Return the log-sum-exp (B, H, C) float32 over the selection of query (B, H, T, D) with key (B, G, S, D)."""
        B, H = query.shape[:2]
        by_slot = torch.full((B, H, self.C, self.slots), -torch.inf, device=query.device)
        lse_kernel[self._grid()](
            *(query, key, by_slot),
            *self._work_tensors(query),
            *(*query.stride(), *key.stride(), scale * LOG2_E),
            *self._sizes(H // key.shape[1]),
            **self._constants(query),
        )
        return by_slot.logsumexp(-1)

    def align(
        self, tensors: tuple[Tensor, ...], d_key: Tensor, scale: float, index_scale: float, gradients: bool
    ) -> tuple[Tensor, Tensor]:
        """Return each slot's part of KL (B, G, C, slots) and of the query gradient (B, G, C, slots, I); add to `d_key`.

        Args:
            tensors: query, key, index_query and index_key, then the log-sum-exps of the heads and of the student.
        """
        query, key, index_query, index_key, lse, _ = tensors
        B, G, _, width = index_query.shape
        kl = torch.zeros((B, G, self.C, self.slots), device=query.device)
        d_slot = torch.zeros((*kl.shape, width) if gradients else (1,), device=query.device)
        align_kernel[self._grid()](
            *(*tensors, kl, d_slot, d_key),
            *self._work_tensors(query),
            *(stride for tensor in (query, key, index_query, index_key, lse) for stride in tensor.stride()),
            *(scale * LOG2_E, index_scale * LOG2_E, index_scale, self.layout.keys),
            *self._sizes(query.shape[1] // G),
            INDEX_WIDTH=width,
            INDEX_PADDED=max(16, triton.next_power_of_2(width)),
            GRADIENTS=gradients,
            **self._constants(query),
        )
        return kl, d_slot

    def _grid(self) -> tuple[int, int]:
        return len(self.work.bounds) * self.work.splits, triton.cdiv(self.selection.block_size, self.plan.keys)

    def _work_tensors(self, query: Tensor) -> tuple[Tensor, ...]:
        """Return the kernels' arguments from `order_ptr` to `position_ptr`, in order."""
        work = self.work
        position = self.layout.position(query.device)
        return work.order(self.chunk), work.bounds, work.table, work.query, work.slot, position

    def _sizes(self, heads: int) -> tuple[int, ...]:
        """Return the kernels' arguments from `bounds_t` to HEADS, in order."""
        work, (batch, groups) = self.work, self.selection.blocks.shape[:2]
        of_work = (work.bounds.shape[1], self.chunk * work.splits, work.splits)
        return *of_work, batch, groups, work.blocks, self.layout.queries, self.start, self.C, self.slots, heads

    def _constants(self, query: Tensor) -> dict[str, object]:
        return {
            "WIDTH": query.shape[3],
            # tl.dot needs at least 16 columns, and a tile's sizes are powers of two.
            "PADDED": max(16, triton.next_power_of_2(query.shape[3])),
            "BLOCK_SIZE": self.selection.block_size,
            "ROWS": self.plan.rows,
            "KEYS": self.plan.keys,
            "PRECISION": matmul_precision(query),
            "num_warps": self.plan.warps,
            "num_stages": self.plan.stages,
        }


def _work(selection: Selection, layout: Layout, floats: int) -> Work:
    """Reverse a selection and divide it into chunks, each query of which writes `floats` float32, up to `_CHUNK_BYTES`."""
    batch, groups, queries, slots = selection.blocks.shape
    device = selection.blocks.device
    chosen = reverse(selection, layout)
    splits = max(1, min(_MOST_SPLITS, 4 * processors(device) // (batch * groups * slots)))
    columns = max(1, min(queries, _CHUNK_BYTES // (4 * batch * groups * floats)))
    columns = triton.cdiv(columns, splits)
    edges = torch.arange(0, triton.cdiv(queries, columns * splits) * splits + 1, device=device) * columns
    blocks = torch.arange(len(chosen.start) - 1, device=device)
    of_block = blocks.repeat_interleave(chosen.start.diff(), output_size=len(chosen.query))
    # (block, query) as one number, which ascends over the entries, so that one search finds every edge of every block.
    edge_of_block = blocks[:, None] * queries + edges.clamp(max=queries)
    bounds = torch.searchsorted(of_block * queries + chosen.query, edge_of_block)
    table = key_blocks(layout, chosen.first_block, chosen.blocks, selection.block_size, device)
    return Work(chosen.query, chosen.slot, table, bounds, columns, splits, chosen.blocks)


@triton.jit
def _block_of(order_ptr, bounds_ptr, table_ptr, bounds_t, first, splits, groups, blocks):
    """Return a program's split, its block (row, group, first key column, number of keys, position of the first key), and the
    start and number of its entries."""
    # `order_ptr` has (block, split) pairs as one number, the longest work first.
    work = tl.load(order_ptr + tl.program_id(0))
    number = work // splits
    split = work - number * splits
    bounds_ptr += number * bounds_t + first + split
    start = tl.load(bounds_ptr)
    total = (tl.load(bounds_ptr + 1) - start).to(tl.int32)
    row, group, first_key, keys, first_position = locate_block(number, table_ptr, groups, blocks)
    return split, row, group, first_key, keys, first_position, start, total


@triton.jit(
    do_not_specialize=["bounds_t", "first", "splits", "batch", "groups", "blocks", "queries", "start", "C", "slots"]
)
def lse_kernel(
    query_ptr, key_ptr, lse_ptr, order_ptr, bounds_ptr, table_ptr, chooser_ptr, slot_ptr, position_ptr,
    query_b, query_h, query_t, query_d, key_b, key_g, key_s, key_d,
    scale2, bounds_t, first, splits, batch, groups, blocks, queries, start, C, slots,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp over the program's keys, for every head and (query, slot)."""
    split, row, group, first_key, keys, first_position, entries, total = _block_of(  # noqa: RUF059, `_` would be a variable
        order_ptr, bounds_ptr, table_ptr, bounds_t, first, splits, groups, blocks
    )
    if total == 0:
        return
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_block = offset < keys
    column = tl.arange(0, PADDED)
    key_position = tl.where(in_block, first_position + offset, _NEVER)
    key_ptr += row * key_b + group * key_g
    k = load_rows(key_ptr + (first_key + offset).to(tl.int64)[:, None] * key_s, in_block, column, key_d, WIDTH, True)
    query_ptr += row * query_b + group * HEADS * query_h
    for begin in range(0, total, ROWS):
        entry = begin + tl.arange(0, ROWS)
        real = entry < total
        chooser = tl.load(chooser_ptr + entries + entry, mask=real, other=0)
        slot = tl.load(slot_ptr + entries + entry, mask=real, other=0)
        position = tl.load(position_ptr + row * queries + chooser, mask=real, other=-1)
        seen = key_position[None, :] <= position[:, None]
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
        *("bounds_t", "first", "splits", "batch", "groups", "blocks", "queries", "start", "C", "slots", "S"),
    ]
)
def align_kernel(
    query_ptr, key_ptr, index_query_ptr, index_key_ptr, lse_ptr, student_ptr, kl_ptr, d_slot_ptr, d_key_ptr,
    order_ptr, bounds_ptr, table_ptr, chooser_ptr, slot_ptr, position_ptr,
    query_b, query_h, query_t, query_d, key_b, key_g, key_s, key_d,
    index_query_b, index_query_g, index_query_t, index_query_i, index_key_b, index_key_s, index_key_i,
    lse_b, lse_h, lse_t,
    scale2, index_scale2, index_scale, S, bounds_t, first, splits, batch, groups, blocks, queries, start, C, slots,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, INDEX_WIDTH: tl.constexpr,
    INDEX_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    split, row, group, first_key, keys, first_position, entries, total = _block_of(
        order_ptr, bounds_ptr, table_ptr, bounds_t, first, splits, groups, blocks
    )
    if total == 0:
        return
    offset = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    in_block = offset < keys
    column = tl.arange(0, PADDED)
    index_column = tl.arange(0, INDEX_PADDED)
    key_position = tl.where(in_block, first_position + offset, _NEVER)
    key_column = (first_key + offset).to(tl.int64)
    key_ptr += row * key_b + group * key_g
    k = load_rows(key_ptr + key_column[:, None] * key_s, in_block, column, key_d, WIDTH, True)
    index_key_ptr += row * index_key_b
    index_k = load_rows(
        index_key_ptr + key_column[:, None] * index_key_s, in_block, index_column, index_key_i, INDEX_WIDTH, True
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
        seen = key_position[:, None] <= position[None, :]
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
        place = ((split * batch + row) * groups + group) * S + key_column
        pointers = d_key_ptr + place[:, None] * INDEX_WIDTH + index_column[None, :]
        written = in_block[:, None] & (index_column[None, :] < INDEX_WIDTH)
        # Adding without atomics is safe: chunks run one after another, and no other program of this chunk writes to these keys
        # of this split.
        tl.store(pointers, tl.load(pointers, mask=written, other=0.0) + d_key * (index_scale / _GAIN), mask=written)
