"""Key blocks cut into pieces of work for the gradients of keys and values: segments of the queries that chose each block.

Contract: a block that few queries chose is one segment, and its program writes the gradient itself. One that many chose (the
first block of a text may be everyone's) would hold up the rest, so it is cut, each segment writes a float32 partial sum, and
the partials are added in order: the work is balanced and no atomic makes two runs differ. Blocks that nobody chose have none.

Legend: B batch, G groups, N blocks of the row with most, W block size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Reverse

# A row's share of a program below which cutting further would not pay: programs to a multiprocessor, and rows to a program.
_PROGRAMS_OF_PROCESSOR = 8
_LEAST_ROWS = 2048


class Segments(NamedTuple):
    """Pieces of work.

    Attributes:
        segments: (n, 4) int64: number of the (row, group, block) as in `Reverse.start`, first and end of its entries in
            `Reverse.query`, and the partial sum to write, −1 for the gradient itself.
        partials: how many partial sums there are.
        cut: (B · G · N, 2) int64: of each block its first partial sum and how many it has.
    """

    segments: Tensor
    partials: int
    cut: Tensor


def longest_segment(entries: int, heads: int, processors: int) -> int:
    """Queries of the longest segment: an eighth of a multiprocessor's share, but enough to be worth a program."""
    return max(-(-_LEAST_ROWS // heads), -(-entries // (_PROGRAMS_OF_PROCESSOR * processors)))


def segments(reverse: Reverse, longest: int) -> Segments:
    """Cut the queries of each block into segments of at most `longest`. It reads two numbers from the device."""
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
    """(B · N, 3) int32, by the blocks' numbers in their rows: first key column, keys, position of the first key.

    Args:
        layout: the sequences.
        first_block, most: `Reverse.first_block` and `Reverse.blocks` of a selection over the layout.
        block_size: W.
        device: where the table goes.
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
