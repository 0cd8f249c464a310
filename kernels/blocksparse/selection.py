"""The blocks of keys that each query token sees, which is the interface between choosing and attending.

Contract: `blocks[b, g, t]` has the numbers of distinct key blocks, counted in the token's own sequence, for every head of
group g. Unused slots are −1 and may be anywhere in the row. A query sees the keys of these blocks up to its own position. A
query without blocks sees nothing: its output is 0 and its log-sum-exp is −∞. All slots of padding are −1.

Legend: B batch, G groups (key/value heads), T query columns, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout

# Keys are padded to whole blocks, so a block that is much larger than any sequence would waste memory.
LARGEST_BLOCK = 2**20


def check_block_size(given: object) -> None:
    """Check that a block size is a whole number from 1 to `LARGEST_BLOCK`.

    Raises:
        SparsortError: it is not.
    """
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= LARGEST_BLOCK:
        raise SparsortError(
            f"block_size is {given!r}; expected a whole number of keys from 1 to {LARGEST_BLOCK}, such as 128."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The key blocks of every query token.

    Attributes:
        blocks: (B, G, T, K) int32, distinct block numbers, −1 in unused slots.
        block_size: W, the number of keys in a block.

    Raises:
        SparsortError: the blocks have the wrong dtype or number of axes, or the block size is invalid.
    """

    blocks: Tensor
    block_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Tensor):
            raise SparsortError(
                f"selected blocks must be a torch tensor, got {type(self.blocks).__name__}. Convert them with torch.tensor."
            )
        if self.blocks.ndim != 4 or self.blocks.dtype != torch.int32:
            raise SparsortError(
                f"selected blocks are {self.blocks.dtype} of shape {tuple(self.blocks.shape)}; expected int32 of shape "
                "(batch, groups, queries, slots)."
            )
        check_block_size(self.block_size)

    @property
    def counts(self) -> Tensor:
        """The number of blocks of each query token: (B, G, T) int32."""
        return (self.blocks >= 0).sum(dim=-1, dtype=torch.int32)


def every_block(layout: Layout, groups: int, block_size: int, device: torch.device | str = "cpu") -> Selection:
    """Select every block of which a query sees at least one key, which gives full causal attention.

    Returns:
        Selection with K = blocks of the longest sequence.
    """
    check_block_size(block_size)
    own = torch.div(layout.position(device), block_size, rounding_mode="floor")
    numbers = torch.arange(layout.blocks(block_size), dtype=torch.int32, device=device)
    blocks = torch.where(numbers <= own[..., None], numbers, -1)
    return Selection(blocks=blocks[:, None].expand(-1, groups, -1, -1), block_size=block_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reverse:
    """The reverse of a selection: the queries that chose each block, in compressed-sparse-row form with E entries.

    Attributes:
        query: (E,) int64, query columns, ascending within a block.
        slot: (E,) int64, the slot in the query's row that has the block.
        start: (B · G · blocks + 1,) int64, the first entry of each (row, group, block). Blocks are numbered across the sequences
            of a row: `first_block` of the sequence plus the block's number in it.
        first_block: (n,), for each sequence of the layout, the number of its first block in its row.
        blocks: the number of blocks in the row that has the most.
    """

    query: Tensor
    slot: Tensor
    start: Tensor
    first_block: tuple[int, ...]
    blocks: int


def reverse(selection: Selection, layout: Layout) -> Reverse:
    """Return the queries of every block, to process keys block by block as in MSA's backward pass (arXiv 2606.13392)."""
    chosen = selection.blocks
    batch, groups, queries, slots = chosen.shape
    first_block, most = layout.first_blocks(selection.block_size)
    first = torch.tensor([*first_block, 0], dtype=torch.int64, device=chosen.device)
    # Padding has sequence number −1, which reads the extra 0 at the end. All of its slots are −1, so they are dropped below.
    shift = first[layout.span_of_query(chosen.device).long()]
    row = torch.arange(batch * groups, device=chosen.device).view(batch, groups, 1, 1) * most
    key = (row + shift[:, None, :, None] + chosen).flatten()
    used = (chosen >= 0).flatten().nonzero().flatten()
    # The flat indices of the used slots ascend with the query, and a stable sort keeps this order within a block.
    key, order = key[used].sort(stable=True)
    used = used[order]
    return Reverse(
        query=used // max(slots, 1) % max(queries, 1),
        slot=used % max(slots, 1),
        start=torch.searchsorted(key, torch.arange(batch * groups * most + 1, device=chosen.device)),
        first_block=first_block,
        blocks=most,
    )
