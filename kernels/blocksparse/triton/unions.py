"""Tiles of query rows, and the union of the blocks that the rows of each tile chose: what the query-side kernels go through.

Contract: the rows of a sequence are its (query, head of the group) pairs, queries first, so that a tile of `rows` of them has
no idle row whatever the group's size: row f is head f mod R of query f // R. A tile lies within one sequence. Its union lists
every block that one of its queries chose and can see, ascending, each with the queries that chose it as the bits of an int64,
which is why a tile has at most 64 queries. Memory is that of the selection: 12 bytes for each entry of a union.

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

# Blocks and slots that are compared at a time.
_BLOCKS_AT_ONCE = 128
_SLOTS_AT_ONCE = 16


class Unions(NamedTuple):
    """The tiles of a layout and, for each tile and group, its union.

    Attributes:
        tiles: (n, 6) int32: batch row, column of the first query, its position, the sequence's first key column, the head of
            the tile's first row, and how many rows it has.
        block: (n, G, U) int32, ascending; only the first `length` are written.
        members: (n, G, U) int64: bit i says that query i of the tile chose the block.
        slot: (n, G, U, queries of a tile) int16 or int32, the slot in which the query holds the block, −1 if it does not; one
            element where it was not asked for.
        length: (n, G) int32.
    """

    tiles: Tensor
    block: Tensor
    members: Tensor
    slot: Tensor
    length: Tensor


def queries_of_tile(rows: int, heads: int) -> int:
    """The most queries that a tile of `rows` rows can touch with `heads` heads to a query."""
    return rows // heads if rows % heads == 0 else (rows - 1) // heads + 2


@functools.lru_cache(maxsize=16)
def query_tiles(layout: Layout, heads: int, rows: int, device: torch.device) -> Tensor:
    """`Unions.tiles` of a layout whose groups have `heads` heads. The last tiles of a sequence, which see most, come first."""
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
    """The union of each tile.

    Args:
        selection: over the layout; slots beyond what a query can see are left out.
        layout: the sequences.
        heads: R.
        rows: of a tile; it must touch no more than 64 queries.
        slots: whether `Unions.slot` is wanted.
    """
    blocks = selection.blocks
    device = blocks.device
    tiles = query_tiles(layout, heads, rows, device)
    # Every block for every group is one list for all of them; so are a mask's or a window's blocks.
    groups = 1 if blocks.stride(1) == 0 else blocks.shape[1]
    K, queries = blocks.shape[3], queries_of_tile(rows, heads)
    longest = max(1, min(queries * K, layout.blocks(selection.block_size)))
    shape = (len(tiles), groups, longest)
    found = Unions(
        tiles=tiles,
        block=torch.empty(shape, dtype=torch.int32, device=device),
        members=torch.empty(shape, dtype=torch.int64, device=device),
        slot=torch.empty(
            (*shape, queries) if slots else 1, dtype=torch.int16 if K < 2**15 else torch.int32, device=device
        ),
        length=torch.empty(shape[:2], dtype=torch.int32, device=device),
    )
    if not len(tiles):
        return found
    with torch.cuda.device_of(blocks):
        _unions_kernel[(len(tiles), groups)](
            blocks,
            tiles,
            found.block,
            found.members,
            found.slot,
            found.length,
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
    return found


@triton.jit
def tile_rows(tile_ptr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """A tile's rows: (batch row, column of the first query, first key column) and of each row its query and head in the tile,
    its position, and whether it is one."""
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
    blocks_ptr,
    tiles_ptr,
    block_ptr,
    members_ptr,
    slot_ptr,
    count_ptr,
    stride_b,
    stride_g,
    stride_t,
    stride_k,
    K,
    longest,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SLOT: tl.constexpr,
):
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
        found = members != 0
        entry = filled + tl.cumsum(found.to(tl.int32), 0) - 1
        # A selection that names a block twice cannot push the list past its end: members of a union are distinct.
        tl.store(block_ptr + entry, number, mask=found)
        tl.store(members_ptr + entry, members, mask=found)
        if HAS_SLOT:
            for query in range(0, queries):
                slot = _slot_of(blocks_ptr + query * stride_t, number, stride_k, K, BLOCKS, SLOTS)
                into = slot_ptr + entry.to(tl.int64) * QUERIES + query
                tl.store(into, slot.to(slot_ptr.dtype.element_ty), mask=found)
        filled += tl.sum(found.to(tl.int32), 0)
    tl.store(count_ptr + place, filled)


@triton.jit
def _slot_of(row_ptr, number, stride_k, K, BLOCKS: tl.constexpr, SLOTS: tl.constexpr):
    """The slot of a query's row in which each of the block numbers stands, −1 where none does."""
    found = tl.full([BLOCKS], -1, tl.int32)
    for start in range(0, K, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        chosen = tl.load(row_ptr + slot.to(tl.int64) * stride_k, mask=slot < K, other=-1)
        hit = tl.where(chosen[:, None] == number[None, :], slot[:, None], -1)
        found = tl.maximum(found, tl.max(hit, 0))
    return found
