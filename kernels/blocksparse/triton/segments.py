"""The division of key blocks into work for the gradients of keys and values: segments of the queries that chose each block.

Contract: a block that few queries chose is one segment, and its program writes the gradient directly. A block that many queries
chose (often the first block of a text) would delay the rest. It is divided into several segments, each of which writes a float32
partial sum, and the partial sums are added in order. The work is thus balanced without atomics, so results are reproducible.
Blocks that no query chose have no segment.

Legend: B batch, G groups, N blocks of the row that has the most, W block size.
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
from sparsort.kernels.blocksparse.selection import Reverse

# The intended number of programs per multiprocessor, and the number of rows per program below which dividing does not pay.
_PROGRAMS_OF_PROCESSOR = 8
_LEAST_ROWS = 2048


class Segments(NamedTuple):
    """The segments of all blocks.

    Attributes:
        segments: (n, 4) int64: the number of the (row, group, block) as in `Reverse.start`, the first entry in `Reverse.query`
            and the end of its entries, and the partial sum to write, −1 to write the gradient directly.
        partials: the number of partial sums.
        cut: (B · G · N, 2) int64, the first partial sum of each block and the number of its partial sums.
    """

    segments: Tensor
    partials: int
    cut: Tensor


def longest_segment(entries: int, heads: int, processors: int) -> int:
    """Return the maximum number of queries in a segment: an eighth of a multiprocessor's share, but at least `_LEAST_ROWS`
    rows."""
    return max(-(-_LEAST_ROWS // heads), -(-entries // (_PROGRAMS_OF_PROCESSOR * processors)))


def segments(reverse: Reverse, longest: int) -> Segments:
    """Divide the queries of each block into segments of at most `longest` queries. This reads two numbers from the device."""
    first, queries = reverse.start[:-1], reverse.start.diff()
    count = (queries + longest - 1) // longest
    partials = count.where(count > 1, 0)
    many, wide = torch.stack([count.sum(), partials.sum()]).tolist()
    block = torch.arange(len(count), device=count.device).repeat_interleave(count, output_size=many)
    number = torch.arange(many, device=count.device) - (count.cumsum(0) - count)[block]
    start = first[block] + number * longest
    end = torch.minimum(start + longest, reverse.start[1:][block])
    first_partial = partials.cumsum(0) - partials
    partial = torch.where(partials[block] > 0, first_partial[block] + number, -1)
    return Segments(
        segments=torch.stack([block, start, end, partial], dim=1),
        partials=wide,
        cut=torch.stack([first_partial, partials], dim=1),
    )


@functools.lru_cache(maxsize=16)
def key_blocks(
    layout: Layout, first_block: tuple[int, ...], most: int, block_size: int, device: torch.device
) -> Tensor:
    """Return first key column, number of keys and position of the first key of each block in its row: (B · N, 3) int32.

    Args:
        layout: the sequences.
        first_block, most: `Reverse.first_block` and `Reverse.blocks` of a selection over the layout.
        block_size: W.
        device: the device of the table.
    """
    row, _, _, key_start, keys = layout.table("cpu").long().unbind(1)
    count = (keys + block_size - 1) // block_size
    sequence = torch.arange(len(count)).repeat_interleave(count)
    position = (torch.arange(len(sequence)) - (count.cumsum(0) - count)[sequence]) * block_size
    number = torch.tensor(first_block, dtype=torch.int64)[sequence] + position // block_size
    table = torch.zeros(layout.batch * most, 3, dtype=torch.int32)
    columns = [key_start[sequence] + position, (keys[sequence] - position).clamp(max=block_size), position]
    table[row[sequence] * most + number] = torch.stack(columns, dim=1).int()
    return table.to(device)


@triton.jit
def locate_block(number, table_ptr, groups, blocks):
    """Read a row of `key_blocks`.

    Returns batch row, group, first key column, number of keys, and position of the first key of block `number` of
    `Reverse.start`.
    """
    row_and_group = number // blocks
    row = row_and_group // groups
    # All groups of a batch row have the same blocks, so the table has one row per batch row and block.
    table_ptr += (row * blocks + number - row_and_group * blocks) * 3
    return row, row_and_group - row * groups, tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
