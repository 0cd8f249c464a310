"""Tiles of query rows, and the union of the blocks that the rows of each tile chose, which the query-side kernels go through.

Contract: the rows of a sequence are its (query, head of the group) pairs, ordered by query: row f is head f mod R of query
f // R. A tile of `rows` rows therefore has no idle row for any size of the group. A tile is within one sequence. Its union lists,
in ascending order, every block that one of its queries chose and can see, with the queries that chose it as the bits of an
int64. A tile therefore has at most 64 queries. An entry of a union takes 12 bytes, so the memory is comparable to that of the
selection.

Legend: B batch, T query columns, G groups, R heads of a group, K slots, W block size, U entries of the longest possible union.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

MAX_QUERIES = 64

# The numbers of blocks and slots that are compared at a time.
_BLOCKS_AT_ONCE = 128
_SLOTS_AT_ONCE = 16


class Unions(NamedTuple):
    """The tiles of a layout and, for each tile and group, its union.

    Attributes:
        tiles: (n, 6) int32: batch row, column of the first query, its position, the sequence's first key column, the head of
            the tile's first row, and the number of rows.
        block: (n, G, U) int32, ascending block numbers; only the first `length` are written.
        members: (n, G, U) int64, bit i is set if query i of the tile chose the block.
        slot: (n, G, U, queries of a tile) int16 or int32, the query's slot with the block, −1 if it did not choose it; a single
            element if slots were not requested.
        length: (n, G) int32, the number of blocks in the union.
    """

    tiles: Tensor
    block: Tensor
    members: Tensor
    slot: Tensor
    length: Tensor


def queries_of_tile(rows: int, heads: int) -> int:
    """Return the maximum number of queries in a tile of `rows` rows, with `heads` rows per query."""
    # A tile may start and end within a query's heads if the number of rows is not a multiple of `heads`.
    return rows // heads if rows % heads == 0 else (rows - 1) // heads + 2


@functools.lru_cache(maxsize=16)
def query_tiles(layout: Layout, heads: int, rows: int, device: torch.device) -> Tensor:
    """Return `Unions.tiles` for groups of `heads` heads, in descending order, since the last tiles see the most keys."""
    row, query_start, queries, key_start, keys = layout.table("cpu").unbind(1)
    count = (queries * heads + rows - 1) // rows
    sequence = torch.arange(len(count)).repeat_interleave(count)
    number = torch.arange(len(sequence)) - (count.cumsum(0) - count)[sequence]
    first_row = number * rows
    first = first_row // heads
    columns = [
        row[sequence],
        query_start[sequence] + first,
        (keys - queries)[sequence] + first,
        key_start[sequence],
        first_row - first * heads,
        (queries[sequence] * heads - first_row).clamp(max=rows),
    ]
    return torch.stack(columns, dim=1).to(torch.int32).flip(0).contiguous().to(device)


def unions(selection: Selection, layout: Layout, *, heads: int, rows: int, slots: bool) -> Unions:
    """Compute the union of each tile.

    Args:
        selection: the blocks; those that a query cannot see are skipped.
        layout: the sequences.
        heads: R.
        rows: the number of rows in a tile, which must have at most 64 queries.
        slots: whether to compute `Unions.slot`.
    """
    blocks = selection.blocks
    device = blocks.device
    tiles = query_tiles(layout, heads, rows, device)
    # If all groups share their blocks (stride 0, as in `every_block`), they share one union.
    groups = 1 if blocks.stride(1) == 0 else blocks.shape[1]
    K, queries = blocks.shape[3], queries_of_tile(rows, heads)
    longest = max(1, min(queries * K, layout.blocks(selection.block_size)))
    shape = (len(tiles), groups, longest)
    union = Unions(
        tiles=tiles,
        block=torch.empty(shape, dtype=torch.int32, device=device),
        members=torch.empty(shape, dtype=torch.int64, device=device),
        slot=torch.empty(
            (*shape, queries) if slots else 1, dtype=torch.int16 if K < 2**15 else torch.int32, device=device
        ),
        length=torch.empty(shape[:2], dtype=torch.int32, device=device),
    )
    if not len(tiles):
        return union
    with torch.cuda.device_of(blocks):
        _unions_kernel[(len(tiles), groups)](
            blocks,
            tiles,
            union.block,
            union.members,
            union.slot,
            union.length,
            *blocks.stride(),
            K,
            longest,
            HEADS=heads,
            BLOCK_SIZE=selection.block_size,
            QUERIES=queries,
            BLOCKS=_BLOCKS_AT_ONCE,
            SLOTS=min(_SLOTS_AT_ONCE, triton.next_power_of_2(max(K, 1))),
            HAS_SLOT=slots,
            num_warps=2,
        )
    return union


@triton.jit
def tile_rows(tile_ptr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's batch row, first query column and first key column, and for each row its query in the tile, its head,
    its position, and whether the row exists."""
    row = tl.load(tile_ptr).to(tl.int64)
    column = tl.load(tile_ptr + 1)
    position = tl.load(tile_ptr + 2)
    key_start = tl.load(tile_ptr + 3)
    flat = tl.load(tile_ptr + 4) + tl.arange(0, ROWS)
    real = tl.arange(0, ROWS) < tl.load(tile_ptr + 5)
    query = flat // HEADS
    return row, column, key_start, query, flat - query * HEADS, position + query, real


@triton.jit(do_not_specialize=["stride_b", "stride_g", "stride_t", "K", "longest"])
def _unions_kernel(
    blocks_ptr, tiles_ptr, block_ptr, members_ptr, slot_ptr, count_ptr,
    stride_b, stride_g, stride_t, stride_k,
    K, longest,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
    HAS_SLOT: tl.constexpr,
):  # fmt: skip
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 6
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    block_ptr += place * longest
    members_ptr += place * longest
    slot_ptr += place * longest * QUERIES
    row = tl.load(tile_ptr).to(tl.int64)
    column = tl.load(tile_ptr + 1).to(tl.int64)
    position = tl.load(tile_ptr + 2)
    queries = (tl.load(tile_ptr + 4) + tl.load(tile_ptr + 5) - 1) // HEADS + 1
    blocks_ptr += row * stride_b + tl.program_id(1).to(tl.int64) * stride_g + column * stride_t

    last = (position + queries - 1) // BLOCK_SIZE
    filled = last * 0
    for start in range(0, last + 1, BLOCKS):
        number = start + tl.arange(0, BLOCKS)
        members = tl.zeros([BLOCKS], dtype=tl.int64)
        for query in range(0, queries):
            own = (position + query) // BLOCK_SIZE
            slot = _slot_of(blocks_ptr + query * stride_t, number, stride_k, K, BLOCKS, SLOTS)
            chosen = (slot >= 0) & (number <= own)
            members |= chosen.to(tl.int64) << query
        is_chosen = members != 0
        entry = filled + tl.cumsum(is_chosen.to(tl.int32), 0) - 1
        # The entries of a union are distinct, so even a selection that names a block twice cannot write past the list's end.
        tl.store(block_ptr + entry, number, mask=is_chosen)
        tl.store(members_ptr + entry, members, mask=is_chosen)
        if HAS_SLOT:
            for query in range(0, queries):
                slot = _slot_of(blocks_ptr + query * stride_t, number, stride_k, K, BLOCKS, SLOTS)
                into = slot_ptr + entry.to(tl.int64) * QUERIES + query
                tl.store(into, slot.to(slot_ptr.dtype.element_ty), mask=is_chosen)
        filled += tl.sum(is_chosen.to(tl.int32), 0)
    tl.store(count_ptr + place, filled)


@triton.jit
def _slot_of(row_ptr, number, stride_k, K, BLOCKS: tl.constexpr, SLOTS: tl.constexpr):
    """Return the slot of a query's row that has each of the block numbers, −1 if there is none."""
    result = tl.full([BLOCKS], -1, tl.int32)
    for start in range(0, K, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        chosen = tl.load(row_ptr + slot.to(tl.int64) * stride_k, mask=slot < K, other=-1)
        hit = tl.where(chosen[:, None] == number[None, :], slot[:, None], -1)
        result = tl.maximum(result, tl.max(hit, 0))
    return result
