"""A grid of key slots, in which every sequence starts at a block boundary, and the mask that a selection puts on it.

Contract: the grid is for the dense map of short sequences (`dense_map.py`), which is computed for all rows at once. Every block
has W adjacent key slots, whatever the positions of its keys in the tensors. Padding may hold any values: the results of `keys`
and `rows` have 0 for it, and its gradients are 0.

Legend: B batch, T query columns, S key columns, G groups, R heads of a group, K slots of a selection, W block size, N blocks of
the row that has the most, P = N · W key slots, t query columns at a time, s key slots that they see, X heads or groups, C any
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.cpu.tiles import LOG2E
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

# The number of query columns at a time, in whole blocks. Fewer columns skip more future keys but make the products smaller.
COLUMNS = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ColumnRun:
    """A run of query columns, the number of blocks that they see, and the first key slot that not all of them see."""

    columns: slice
    blocks: int
    tail: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """The key slots of a layout.

    Attributes:
        layout: the layout.
        size: W.
        blocks: N.
        limit: (B or 1, T) int64, the key slot of each query's own key, −1 for padding.
        first_block: (B, T) int64, the first block of each query's sequence in its row; None if every sequence starts at block 0.
        source: (B, P) int64, the key column of each key slot, S for empty slots. `source` and `padding` are None if every row
            is one sequence that fills all columns.
        padding: (B, T) bool, True for padding.
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
        # Without padding and packing, slots equal columns, and no table of indices is needed.
        whole = len(layout.spans) == layout.batch and all(
            (span.queries, span.keys) == (columns, keys) for span in layout.spans
        )
        if whole:
            limit = torch.arange(keys - columns, keys, device=device)[None]
            blocks = -(-keys // size)
            return cls(
                layout=layout, size=size, blocks=blocks, limit=limit, first_block=None, source=None, padding=None
            )
        first, blocks = layout.first_blocks(size)
        source = torch.full((layout.batch, blocks * size), keys)
        for span, start in zip(layout.spans, first, strict=True):
            columns_of_keys = torch.arange(span.key_start, span.key_start + span.keys)
            source[span.row, start * size : start * size + span.keys] = columns_of_keys
        number = layout.span_of_query(device)
        padding = number < 0
        # Padding has sequence number −1, which reads the extra 0 at the end.
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

    def column_runs(self) -> Iterator[ColumnRun]:
        """Yield runs of query columns, except those that are padding in every row."""
        step = max(COLUMNS // self.size, 1) * self.size
        # Moved to the host once, because the sizes of the runs are needed there.
        highest = self.limit.amax(dim=0).tolist()
        lowest = self.limit.where(self.limit >= 0, self.blocks * self.size).amin(dim=0).tolist()
        for start in range(0, self.layout.queries, step):
            columns = slice(start, min(start + step, self.layout.queries))
            seen = max(highest[columns]) + 1
            if seen:
                yield ColumnRun(columns=columns, blocks=-(-seen // self.size), tail=min(lowest[columns]) + 1)

    def keys(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy `values` (B, X, S, C) to key slots: (B · X, P, C), 0 in empty slots."""
        batch, heads, columns, width = values.shape
        if self.source is None:
            by_slot = values.new_empty(batch, heads, self.blocks * self.size, width, dtype=dtype)
            by_slot[:, :, :columns] = values
            by_slot[:, :, columns:] = 0
        else:
            index = self.source.clamp(max=columns - 1)[:, None, :, None].expand(-1, heads, -1, width)
            by_slot = values.gather(2, index).to(dtype)
            by_slot = by_slot.masked_fill_((self.source == columns)[:, None, :, None], 0)
        return by_slot.flatten(0, 1)

    def key_gradient(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Copy a gradient from key slots back to columns: (B, X, S, C) in the dtype of `like`, 0 for padding."""
        batch, heads, columns, width = like.shape
        gradient = gradient.view(batch, heads, -1, width).to(like.dtype)
        if self.source is None:
            return gradient[:, :, :columns].contiguous()
        # Empty slots scatter to the extra column S, which is dropped.
        by_column = like.new_zeros(batch, heads, columns + 1, width)
        by_column.scatter_(2, self.source[:, None, :, None].expand_as(gradient), gradient)
        return by_column[:, :, :columns].contiguous()

    def rows(self, values: Tensor, run: ColumnRun, groups: int, dtype: torch.dtype) -> Tensor:
        """Copy `values` (B, X, T, C) at the run's columns: (B · groups, X / groups · t, C), 0 for padding."""
        source = values[:, :, run.columns]
        rows = torch.empty(source.shape, dtype=dtype, device=values.device).copy_(source)
        if self.padding is not None:
            rows.masked_fill_(self.padding[:, None, run.columns, None], 0)
        return rows.view(values.shape[0] * groups, -1, values.shape[3])

    def future(self, run: ColumnRun, hidden: float, dtype: torch.dtype) -> Tensor:
        """Return (B or 1, t, s − tail), `hidden` for key slots from `tail` on that a query does not see, otherwise 0."""
        slots = torch.arange(run.tail, run.blocks * self.size, device=self.limit.device)
        zero = torch.zeros((), dtype=dtype, device=slots.device)
        return torch.where(slots > self.limit[:, run.columns, None], hidden, zero)

    def blocks_in_row(self, blocks: Tensor) -> tuple[Tensor, bool]:
        """Number the blocks (B, G, T, K) by their row, N in unused slots; also return whether all queries have all blocks."""
        limit = self.limit[:, None, :, None]
        own = torch.div(limit, self.size, rounding_mode="floor")
        first = 0 if self.first_block is None else self.first_block[:, None, :, None]
        chosen = (blocks >= 0) & (blocks + first <= own)
        # A run's mask over blocks is superfluous if every query chose all blocks that it sees, as in the warm-up.
        every = self.source is None and bool((chosen.sum(dim=-1) == own[..., 0] + 1).all())
        return (blocks + first).long().masked_fill_(~chosen, self.blocks), every


class SelectionMask:
    """The mask of a selection on the dense map, as numbers that are added to the logits.

    Attributes:
        places: (B, G, T, K), the selected blocks; see `Grid.blocks_in_row`.
    """

    def __init__(
        self, grid: Grid, selection: Selection, dtype: torch.dtype, hidden: float, bias: Tensor | None
    ) -> None:
        self._grid, self._hidden = grid, hidden
        blocks = selection.blocks
        self.row_blocks, every = grid.blocks_in_row(blocks)
        self._by_block: Tensor | None = None
        if bias is not None or not every:
            added = torch.zeros_like(self.row_blocks, dtype=dtype) if bias is None else bias.to(dtype) * LOG2E
            by_block = torch.full((*blocks.shape[:3], grid.blocks + 1), hidden, dtype=dtype, device=blocks.device)
            self._by_block = by_block.scatter_(-1, self.row_blocks, added)

    def add_to(self, logits: Tensor, run: ColumnRun) -> None:
        """Add the mask, and the bias if there is one, to the run's logits (B, G, R, t, s), in place."""
        future = self._grid.future(run, self._hidden, logits.dtype)[:, None]
        if self._by_block is None:
            logits[..., run.tail :] += future[:, :, None]
            return
        by_block = self._by_block[:, :, run.columns, : run.blocks, None]
        by_slot = by_block.expand(-1, -1, -1, -1, self._grid.size)
        # The copy makes room for `future`, which differs among the slots of a block.
        added = by_slot.clone(memory_format=torch.contiguous_format).flatten(3)
        added[..., run.tail :] += future
        logits += added[:, :, None]
