"""A selection cut into pieces of work for the CPU: chunks of queries, and in each the tiles of queries × keys to be multiplied.

Contract: a chunk is a run of queries of one sequence, for one group. Its entries are the (query, chosen block) pairs, ordered
by block and then by query, and a tile is the entries of one block: the queries that chose it (gathered, or a plain slice where
they lie side by side) times the block's keys. A chunk whose queries see all that they may is one tile as wide as they see.
A chunk is as long as lets its logits fit a fixed number of elements, so memory does not grow with the sequence.

Logits here are to base 2: exp2 takes a quarter of the time of exp, which moreover is 30 times slower where it underflows.

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
# Logits of a chunk: 16 MiB in float32.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Entries `start` to `end` times the keys from `key` on.

    Attributes:
        start, end: of the chunk's entries.
        key: the first key, counted in the sequence.
        masked: how many of the entries, the first ones, do not see all of the keys.
        query: (end − start,) int64, the entries' queries, ascending, counted in the chunk.
        side_by_side: the same as a slice, where they are.
    """

    start: int
    end: int
    key: int
    masked: int
    query: Tensor
    side_by_side: slice | None

    def take(self, values: Tensor, out: Tensor) -> Tensor:
        """The tile's rows of (T, C) `values`: a view, or gathered into the first rows of `out`."""
        if self.side_by_side is not None:
            return values[self.side_by_side]
        return torch.index_select(values, 0, self.query, out=out[: self.end - self.start])


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A run of queries of one sequence and one group.

    Attributes:
        columns: the queries' columns in the tensors.
        first: position of the first query among the sequence's keys.
        query: (E,) int64, of each entry, counted in the chunk.
        slot: (E,) int64, of each entry in its selection's row; None where the chunk is one tile over many blocks.
        width: keys of every tile.
        tiles: in the order of entries, none empty.
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
        """Entries of the longest tile."""
        return max((tile.end - tile.start for tile in self.tiles), default=0)

    def hide(self, tile: Tile, logits: Tensor, value: float) -> None:
        """Write `value` where a query does not see a key; `logits` are the tile's, (entries, heads, width)."""
        if not tile.masked:
            return
        # What lies before the chunk's first query is seen by all of it.
        left = max(self.first - tile.key, 0)
        position = torch.arange(tile.key + left, tile.key + self.width, device=logits.device)
        hidden = position > (self.first + tile.query[: tile.masked])[:, None]
        logits[: tile.masked, :, left:].masked_fill_(hidden[:, None], value)


def chunks(selection: Selection, span: Span, group: int, heads: int, *, merge: bool = True) -> Iterator[Chunk]:
    """The chunks of one sequence and one group, from its first query to its last.

    Args:
        heads: R, the heads that each query has logits for.
        merge: whether a chunk that sees everything may become one tile, which has no slots.
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
    """How many queries, the first of them at position `first`, times what the last of them sees, fit into so many elements.

    At least one, and whole blocks where it is more than one.
    """
    count = (math.isqrt(first * first + 4 * elements) - first) // 2
    return max(count // size * size or count, 1)


def _one_tile(columns: slice, first: int, size: int, device: torch.device) -> Chunk:
    queries = columns.stop - columns.start
    query = torch.arange(queries, device=device)
    tile = Tile(start=0, end=queries, key=0, masked=queries, query=query, side_by_side=slice(0, queries))
    width = -(-(first + queries) // size) * size
    return Chunk(columns=columns, first=first, query=query, slot=None, width=width, tiles=[tile])


def _tile_by_block(blocks: Tensor, chosen: Tensor, columns: slice, first: int, size: int) -> Chunk:
    queries, slots = blocks.shape
    place = chosen.flatten().nonzero().flatten()
    query = torch.div(place, max(slots, 1), rounding_mode="floor")
    # (block, query) as one number: a query has a block once, so the order is total.
    entry, order = (blocks.flatten()[place] * queries + query).sort()
    query, slot = query[order], (place % max(slots, 1))[order]
    numbers = torch.arange((first + queries - 1) // size + 2, device=blocks.device)
    starts = torch.searchsorted(entry, numbers * queries)
    # A query stands in block n, and does not see all of it, while its position is below (n + 1) · W.
    inside = ((numbers + 1) * size - first).clamp(0, queries)
    masked = torch.searchsorted(entry, numbers * queries + inside) - starts
    edges, within, found = starts.tolist(), masked.tolist(), query.tolist()
    tiles = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        if start == end:
            continue
        low, high = found[start], found[end - 1] + 1
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
    """(E, R, width) of queries (T, R·D) times keys (blocks · W, D), `hidden` where a query does not see a key."""
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
    """total (T, R·D) at the tile's queries += left (entries · R, width) @ right (width, D)."""
    if tile.side_by_side is not None:
        total[tile.side_by_side].view(-1, right.shape[1]).addmm_(left, right)
        return
    made = buffer[: tile.end - tile.start]
    torch.mm(left, right, out=made.view(-1, right.shape[1]))
    total.index_add_(0, tile.query, made)


def peak_and_sum(logits: Tensor, query: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Softmax over the entries of each query, as far as it goes in place: the sums are still to be divided by.

    Args:
        logits: (E, R, width) to base 2; become 2^(logits − peak).
        query: (E,), of each entry.
        queries: T.

    Returns:
        Peak and sum, each (T, R); −∞ and 0 for a query without entries.
    """
    entries, heads, width = logits.shape
    highest = logits.amax(dim=-1) if width else logits.new_empty(entries, heads)
    peak = logits.new_full((queries, heads), -torch.inf)
    peak.scatter_reduce_(0, query[:, None].expand(-1, heads), highest, "amax")
    # A query whose every slot has a bias of −∞ sees nothing: its logits less a finite number stay −∞.
    logits.sub_(peak.clamp_min(torch.finfo(peak.dtype).min)[query][..., None]).exp2_()
    # A product with ones, because sums along short rows are slow.
    sums = torch.mv(logits.view(-1, width), logits.new_ones(width)).view(entries, heads)
    return peak, torch.zeros_like(peak).index_add_(0, query, sums)


class Scratch:
    """Buffers by name that grow and are used again: fresh memory costs its page faults."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._made: dict[str, Tensor] = {}
        self._device, self._dtype = device, dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        elements = math.prod(shape)
        made = self._made.get(name)
        if made is None or made.numel() < elements:
            made = self._made[name] = torch.empty(elements, device=self._device, dtype=self._dtype)
        return made[:elements].view(shape)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of_heads(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of (R, T, D) `values` as (T, R·D): what a query's heads hold lies together, to be gathered as one row."""
    heads, queries, width = values.shape
    copied = torch.empty(queries, heads, width, dtype=dtype, device=values.device)
    return copied.copy_(values.transpose(0, 1)).view(queries, heads * width)


def keys_of_span(values: Tensor, span: Span, block_size: int, dtype: torch.dtype) -> Tensor:
    """A copy of the sequence's rows of (S, C) `values`, (blocks · W, C), zero after its last key."""
    padded = values.new_zeros(-(-span.keys // block_size) * block_size, values.shape[1], dtype=dtype)
    padded[: span.keys] = values[span.key_start : span.key_start + span.keys]
    return padded
