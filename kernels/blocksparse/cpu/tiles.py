"""The division of a selection into work for the CPU: chunks of queries, and in each chunk tiles of queries × keys.

Contract: a chunk is a run of queries of one sequence, for one group. Its entries are the (query, chosen block) pairs, ordered
by block and then by query. A tile has the entries of one block: the queries that chose it (gathered, or a slice if they are
adjacent) and the block's keys. If the queries of a chunk chose all blocks that they see, the chunk is a single wide tile. The
length of a chunk is limited so that its logits fit a fixed number of elements, so memory does not grow with the sequence.

Logits are to base 2, because exp2 takes a quarter of the time of exp, which is also 30 times slower when it underflows.

Legend: T queries of a chunk, E entries, R heads of a group, D width, W block size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Span
from sparsort.kernels.blocksparse.selection import Selection

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# The number of logits in a chunk: 16 MiB in float32.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """The product of a range of entries with the keys from `key` on.

    Attributes:
        start, end: the range of the chunk's entries, `end` excluded.
        key: the first key, counted in the sequence.
        masked: the number of entries, at the start of the range, that do not see all of the keys.
        query: (end − start,) int64, the entries' queries, ascending, counted in the chunk.
        side_by_side: the entries' queries as a slice, if they are adjacent; else None.
    """

    start: int
    end: int
    key: int
    masked: int
    query: Tensor
    side_by_side: slice | None

    def take(self, values: Tensor, out: Tensor) -> Tensor:
        """Return the tile's rows of `values` (T, C), as a view or gathered into the first rows of `out`."""
        if self.side_by_side is not None:
            return values[self.side_by_side]
        return torch.index_select(values, 0, self.query, out=out[: self.end - self.start])


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A run of queries of one sequence and one group.

    Attributes:
        columns: the queries' columns in the tensors.
        first: position of the first query among the sequence's keys.
        query: (E,) int64, the query of each entry, counted in the chunk.
        slot: (E,) int64, the slot of each entry in the query's row of the selection; None if the chunk is a single wide tile.
        width: the number of keys of every tile.
        tiles: the tiles in the order of their entries; a tile has at least one entry.
    """

    columns: slice
    first: int
    query: Tensor
    slot: Tensor | None
    width: int
    tiles: list[Tile]

    @property
    def queries(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def longest(self) -> int:
        """The number of entries of the longest tile."""
        return max((tile.end - tile.start for tile in self.tiles), default=0)

    def hide(self, tile: Tile, logits: Tensor, value: float) -> None:
        """Write `value` to the tile's `logits` (entries, heads, width) where a query does not see a key."""
        if not tile.masked:
            return
        # All queries of the chunk see the keys before the chunk's first query.
        left = max(self.first - tile.key, 0)
        position = torch.arange(tile.key + left, tile.key + self.width, device=logits.device)
        hidden = position > (self.first + tile.query[: tile.masked])[:, None]
        logits[: tile.masked, :, left:].masked_fill_(hidden[:, None], value)


def chunks(selection: Selection, span: Span, group: int, heads: int, *, merge: bool = True) -> Iterator[Chunk]:
    """Yield the chunks of one sequence and one group, from its first query to its last.

    Args:
        selection: the blocks.
        span: the sequence.
        group: the group.
        heads: R, the number of heads that each query has logits for.
        merge: whether a chunk whose queries chose all visible blocks may become a single tile, which has no slots.
    """
    size, slots = selection.block_size, selection.blocks.shape[3]
    blocks = selection.blocks[span.row, group, span.query_start : span.query_start + span.queries].long()
    position = torch.arange(span.keys - span.queries, span.keys, device=blocks.device)
    own = torch.div(position, size, rounding_mode="floor")
    chosen = (blocks >= 0) & (blocks <= own[:, None])
    sees_all = chosen.sum(dim=1) == own + 1
    by_block = CHUNK_ELEMENTS // (heads * max(slots * size, 1))
    start = 0
    while start < span.queries:
        first = span.keys - span.queries + start
        count = fitting_queries(first, CHUNK_ELEMENTS // heads, size)
        stop = min(start + count, span.queries)
        merged = merge and bool(sees_all[start:stop].all())
        if not merged:
            stop = min(start + max(count, by_block), span.queries)
        columns = slice(span.query_start + start, span.query_start + stop)
        if merged:
            yield _one_tile(columns, first, size, blocks.device)
        else:
            yield _tile_by_block(blocks[start:stop], chosen[start:stop], columns, first, size)
        start = stop


def fitting_queries(first: int, elements: int, size: int) -> int:
    """Return how many queries from position `first` on fit into `elements` logits, if each has the width that the last one sees.

    The result is at least 1, and a multiple of `size` if that many fit.
    """
    # The largest n with n · (first + n) ≤ elements.
    count = (math.isqrt(first * first + 4 * elements) - first) // 2
    return max(count // size * size or count, 1)


def _one_tile(columns: slice, first: int, size: int, device: torch.device) -> Chunk:
    """Return a chunk with a single tile, for queries that chose all blocks that they see."""
    queries = columns.stop - columns.start
    query = torch.arange(queries, device=device)
    tile = Tile(start=0, end=queries, key=0, masked=queries, query=query, side_by_side=slice(0, queries))
    width = -(-(first + queries) // size) * size
    return Chunk(columns=columns, first=first, query=query, slot=None, width=width, tiles=[tile])


def _tile_by_block(blocks: Tensor, chosen: Tensor, columns: slice, first: int, size: int) -> Chunk:
    """Return a chunk with one tile for each block that was chosen."""
    queries, slots = blocks.shape
    used = chosen.flatten().nonzero().flatten()
    query = torch.div(used, max(slots, 1), rounding_mode="floor")
    # Sort by (block, query) as one number. A query has a block at most once, so the order is unique.
    entry, order = (blocks.flatten()[used] * queries + query).sort()
    query, slot = query[order], (used % max(slots, 1))[order]
    numbers = torch.arange((first + queries - 1) // size + 2, device=blocks.device)
    starts = torch.searchsorted(entry, numbers * queries)
    # Queries at positions below (n + 1) · W do not see all of block n (except for the last position, where masking changes
    # nothing). They are the block's first entries, since entries are ordered by query.
    inside = ((numbers + 1) * size - first).clamp(0, queries)
    masked = torch.searchsorted(entry, numbers * queries + inside) - starts
    edges, within, query_list = starts.tolist(), masked.tolist(), query.tolist()
    tiles = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        if start == end:
            continue
        low, high = query_list[start], query_list[end - 1] + 1
        side_by_side = slice(low, high) if high - low == end - start else None
        tile = Tile(
            start=start,
            end=end,
            key=number * size,
            masked=within[number],
            query=query[start:end],
            side_by_side=side_by_side,
        )
        tiles.append(tile)
    return Chunk(columns=columns, first=first, query=query, slot=slot, width=size, tiles=tiles)


def chunk_logits(
    queries: Tensor, keys: Tensor, chunk: Chunk, hidden: float, scratch: Scratch, *, name: str = "logits"
) -> Tensor:
    """Return the logits (E, R, width) of queries (T, R·D) and keys (blocks · W, D), `hidden` where a key is not visible."""
    width = keys.shape[1]
    heads = queries.shape[1] // width
    logits = scratch(name, chunk.query.numel(), heads, chunk.width)
    gathered = scratch("gathered", chunk.longest, heads * width)
    for tile in chunk.tiles:
        block, part = keys[tile.key : tile.key + chunk.width], logits[tile.start : tile.end]
        torch.mm(tile.take(queries, gathered).view(-1, width), block.T, out=part.view(-1, chunk.width))
        chunk.hide(tile, part, hidden)
    return logits


def add_product(total: Tensor, tile: Tile, left: Tensor, right: Tensor, buffer: Tensor) -> None:
    """Add left (entries · R, width) @ right (width, D) to `total` (T, R·D) at the tile's queries."""
    if tile.side_by_side is not None:
        total[tile.side_by_side].view(-1, right.shape[1]).addmm_(left, right)
        return
    product = buffer[: tile.end - tile.start]
    torch.mm(left, right, out=product.view(-1, right.shape[1]))
    total.index_add_(0, tile.query, product)


def peak_and_sum(logits: Tensor, query: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Replace logits by 2^(logits − peak), in place, with the peak over all entries of a query.

    Dividing by the returned sum gives the softmax.

    Args:
        logits: (E, R, width) to base 2.
        query: (E,), the query of each entry.
        queries: T.

    Returns:
        Peak and sum, each (T, R); −∞ and 0 for a query without entries.
    """
    entries, heads, width = logits.shape
    highest = logits.amax(dim=-1) if width else logits.new_empty(entries, heads)
    peak = logits.new_full((queries, heads), -torch.inf)
    peak.scatter_reduce_(0, query[:, None].expand(-1, heads), highest, "amax")
    # If a bias of −∞ hides all slots of a query, its peak is −∞. The clamp makes it finite, so that its logits stay −∞ instead
    # of becoming NaN.
    logits.sub_(peak.clamp_min(torch.finfo(peak.dtype).min)[query][..., None]).exp2_()
    # A product with ones is used because torch sums along short rows slowly.
    sums = torch.mv(logits.view(-1, width), logits.new_ones(width)).view(entries, heads)
    return peak, torch.zeros_like(peak).index_add_(0, query, sums)


class Scratch:
    """Named buffers that grow and are reused, because newly allocated memory costs page faults."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._device, self._dtype = device, dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < elements:
            buffer = self._buffers[name] = torch.empty(elements, device=self._device, dtype=self._dtype)
        return buffer[:elements].view(shape)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of_heads(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy `values` (R, T, D) to (T, R·D), so that all heads of a query are gathered as one row."""
    heads, queries, width = values.shape
    copied = torch.empty(queries, heads, width, dtype=dtype, device=values.device)
    return copied.copy_(values.transpose(0, 1)).view(queries, heads * width)


def keys_of_span(values: Tensor, span: Span, block_size: int, dtype: torch.dtype) -> Tensor:
    """Copy the sequence's rows of `values` (S, C) to (blocks · W, C), 0 after its last key."""
    padded = values.new_zeros(-(-span.keys // block_size) * block_size, values.shape[1], dtype=dtype)
    padded[: span.keys] = values[span.key_start : span.key_start + span.keys]
    return padded
