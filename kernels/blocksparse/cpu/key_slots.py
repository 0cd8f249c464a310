"""A layout by places: the keys of every sequence laid out from a whole block on, and what a selection hides among them.

Contract: for the dense map of short sequences (`dense_map.py`), which is made of all rows at once: a block is W places in a row,
wherever padding or packing put its keys. Padding may hold anything: what is taken by `keys` and `rows` has 0 for
it, and gradients are given back as 0.

Legend: B batch, T query columns, S key columns, G groups, R heads of a group, K slots, W block size, N blocks of the row with
most, P = N · W places, t query columns at a time, s places that they see, X heads or groups, C any width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.cpu.tiles import LOG2E
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

# Query columns at a time, in whole blocks. Fewer skip more of what is in the future, in smaller products.
COLUMNS = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """Some query columns: which, how many blocks they see, and the first place that not all of them see."""

    columns: slice
    blocks: int
    tail: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """A layout by places.

    Attributes:
        layout: the layout.
        size: W.
        blocks: N.
        limit: (B or 1, T) int64: the place of each query's own key, −1 for padding.
        first_block: (B, T) int64: where the blocks of each query's sequence start; None where each is the only one of its row.
        source: (B, P) int64: the key column of each place, S where there is none. None, as is `padding`, where every row is one
            sequence of all columns.
        padding: (B, T) bool.
    """

    layout: Layout
    size: int
    blocks: int
    limit: Tensor
    first_block: Tensor | None
    source: Tensor | None
    padding: Tensor | None

    @classmethod
    def of(cls, layout: Layout, size: int, device: torch.device) -> Grid:
        columns, keys = layout.queries, layout.keys
        whole = len(layout.spans) == layout.batch and all(
            (span.queries, span.keys) == (columns, keys) for span in layout.spans
        )
        if whole:
            limit = torch.arange(keys - columns, keys, device=device)[None]
            return cls(
                layout=layout,
                size=size,
                blocks=-(-keys // size),
                limit=limit,
                first_block=None,
                source=None,
                padding=None,
            )
        first, blocks = first_blocks(layout, size)
        source = torch.full((layout.batch, blocks * size), keys)
        for span, start in zip(layout.spans, first, strict=True):
            source[span.row, start * size : start * size + span.keys] = torch.arange(
                span.key_start, span.key_start + span.keys
            )
        number = layout.span_of_query(device)
        padding = number < 0
        # Padding has the number −1, which reads the 0 at the end.
        first_block = torch.tensor([*first, 0], device=device)[number.long()]
        limit = (first_block * size + layout.position(device)).masked_fill_(padding, -1)
        return cls(
            layout=layout,
            size=size,
            blocks=blocks,
            limit=limit,
            first_block=first_block if any(first) else None,
            source=source.to(device),
            padding=padding,
        )

    def pieces(self) -> Iterator[Piece]:
        """Runs of query columns, without those that are padding throughout."""
        step = max(COLUMNS // self.size, 1) * self.size
        highest = self.limit.amax(dim=0).tolist()
        lowest = self.limit.where(self.limit >= 0, self.blocks * self.size).amin(dim=0).tolist()
        for start in range(0, self.layout.queries, step):
            columns = slice(start, min(start + step, self.layout.queries))
            seen = max(highest[columns]) + 1
            if seen:
                yield Piece(columns=columns, blocks=-(-seen // self.size), tail=min(lowest[columns]) + 1)

    def keys(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(B · X, P, C) of (B, X, S, C) `values`, 0 where a place has no key."""
        batch, heads, columns, width = values.shape
        if self.source is None:
            made = values.new_empty(batch, heads, self.blocks * self.size, width, dtype=dtype)
            made[:, :, :columns] = values
            made[:, :, columns:] = 0
        else:
            index = self.source.clamp(max=columns - 1)[:, None, :, None].expand(-1, heads, -1, width)
            made = values.gather(2, index).to(dtype)
            made = made.masked_fill_((self.source == columns)[:, None, :, None], 0)
        return made.flatten(0, 1)

    def key_gradient(self, gradient: Tensor, like: Tensor) -> Tensor:
        """The reverse of `keys`: (B, X, S, C) as `like`, 0 for padding."""
        batch, heads, columns, width = like.shape
        gradient = gradient.view(batch, heads, -1, width).to(like.dtype)
        if self.source is None:
            return gradient[:, :, :columns].contiguous()
        made = like.new_zeros(batch, heads, columns + 1, width)
        made.scatter_(2, self.source[:, None, :, None].expand_as(gradient), gradient)
        return made[:, :, :columns].contiguous()

    def rows(self, values: Tensor, piece: Piece, groups: int, dtype: torch.dtype) -> Tensor:
        """A copy of (B, X, T, C) `values` at the piece's columns, (B · groups, X / groups · t, C), 0 for padding."""
        taken = values[:, :, piece.columns]
        made = torch.empty(taken.shape, dtype=dtype, device=values.device).copy_(taken)
        if self.padding is not None:
            made.masked_fill_(self.padding[:, None, piece.columns, None], 0)
        return made.view(values.shape[0] * groups, -1, values.shape[3])

    def future(self, piece: Piece, hidden: float, dtype: torch.dtype) -> Tensor:
        """(B or 1, t, s − tail): `hidden` at the places from `tail` on that a query does not see, and else 0."""
        places = torch.arange(piece.tail, piece.blocks * self.size, device=self.limit.device)
        made = torch.zeros((), dtype=dtype, device=places.device)
        return torch.where(places > self.limit[:, piece.columns, None], hidden, made)

    def places_of(self, blocks: Tensor) -> tuple[Tensor, bool]:
        """The blocks (B, G, T, K) counted in their row, N in unused slots; and whether every query has all that it sees."""
        limit = self.limit[:, None, :, None]
        own = torch.div(limit, self.size, rounding_mode="floor")
        first = 0 if self.first_block is None else self.first_block[:, None, :, None]
        chosen = (blocks >= 0) & (blocks + first <= own)
        every = self.source is None and bool((chosen.sum(dim=-1) == own[..., 0] + 1).all())
        return (blocks + first).long().masked_fill_(~chosen, self.blocks), every


class Hiding:
    """What a selection hides on the dense map, as a number to be added to the logits.

    Attributes:
        places: see `Grid.places_of`.
    """

    def __init__(
        self, grid: Grid, selection: Selection, dtype: torch.dtype, hidden: float, bias: Tensor | None
    ) -> None:
        self._grid, self._hidden = grid, hidden
        blocks = selection.blocks
        self.places, every = grid.places_of(blocks)
        self._by_block: Tensor | None = None
        if bias is not None or not every:
            added = torch.zeros_like(self.places, dtype=dtype) if bias is None else bias.to(dtype) * LOG2E
            by_block = torch.full((*blocks.shape[:3], grid.blocks + 1), hidden, dtype=dtype, device=blocks.device)
            self._by_block = by_block.scatter_(-1, self.places, added)

    def add_to(self, logits: Tensor, piece: Piece) -> None:
        """`logits` are (B, G, R, t, s)."""
        future = self._grid.future(piece, self._hidden, logits.dtype)[:, None]
        if self._by_block is None:
            logits[..., piece.tail :] += future[:, :, None]
            return
        by_block = self._by_block[:, :, piece.columns, : piece.blocks, None]
        by_place = by_block.expand(-1, -1, -1, -1, self._grid.size)
        added = by_place.clone(memory_format=torch.contiguous_format).flatten(3)
        added[..., piece.tail :] += future
        logits += added[:, :, None]


def first_blocks(layout: Layout, size: int) -> tuple[list[int], int]:
    """The number in its row of each sequence's first block, and N."""
    used = [0] * layout.batch
    first = []
    for span in layout.spans:
        first.append(used[span.row])
        used[span.row] += -(-span.keys // size)
    return first, max(used, default=0)
