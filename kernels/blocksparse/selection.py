"""Which blocks of keys each query token may see: the one contract between choosing and attending.

Contract: `blocks[b, g, t]` lists the numbers of distinct key blocks, counted in the token's own sequence, for every head of
group g; −1 stands in slots that are not used, anywhere in the row. A query sees the keys of these blocks up to its own
position; a row without any sees nothing: its output is 0 and its log-sum-exp −∞. Rows of padding hold −1 throughout.

Legend: B batch, G groups (key/value heads), T query columns, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout

# Keys are padded to a whole block: far above any sequence this would be memory for nothing.
LARGEST_BLOCK = 2**20


def check_block_size(given: object) -> None:
    """A whole number from 1 to `LARGEST_BLOCK`.

    Raises:
        SparsortError: it is none.
    """
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= LARGEST_BLOCK:
        raise SparsortError(
            f"block_size is {given!r}; expected a whole number of keys from 1 to {LARGEST_BLOCK}, such as 128."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Key blocks of every query token.

    Attributes:
        blocks: (B, G, T, K) int32, distinct, −1 in slots that are not used.
        block_size: keys of a block.

    Raises:
        SparsortError: another dtype or shape, or a block size that is none (`check_block_size`).
    """

    blocks: Tensor
    block_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Tensor):
            raise SparsortError(f"selected blocks must be a torch tensor, got {type(self.blocks).__name__}.")
        if self.blocks.ndim != 4 or self.blocks.dtype != torch.int32:
            raise SparsortError(
                f"selected blocks are {self.blocks.dtype} of shape {tuple(self.blocks.shape)}; expected int32 of shape "
                "(batch, groups, queries, slots)."
            )
        check_block_size(self.block_size)

    @property
    def counts(self) -> Tensor:
        """(B, G, T) int32: blocks of each query token."""
        return (self.blocks >= 0).sum(dim=-1, dtype=torch.int32)


def every_block(layout: Layout, groups: int, block_size: int, device: torch.device | str = "cpu") -> Selection:
    """Every block that a query can see, at least in part: full causal attention. K is the longest sequence's blocks."""
    check_block_size(block_size)
    own = torch.div(layout.position(device), block_size, rounding_mode="floor")
    numbers = torch.arange(layout.blocks(block_size), dtype=torch.int32, device=device)
    blocks = torch.where(numbers <= own[..., None], numbers, -1)
    return Selection(blocks=blocks[:, None].expand(-1, groups, -1, -1), block_size=block_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reverse:
    """The queries that chose each block: the reverse of a selection, in compressed rows.

    Attributes:
        query: (E,) int64: query columns, ascending within a block.
        slot: (E,) int64: the slot of that query's row in which the block stands.
        start: (B · G · blocks + 1,) int64: where the queries of (row, group, block) start; a block is numbered across the
            sequences of its row, by `first_block` of its sequence and its number there.
        first_block: (n,) of each sequence in the layout, the number of its first block in its row.
        blocks: of the row with most.
    """

    query: Tensor
    slot: Tensor
    start: Tensor
    first_block: tuple[int, ...]
    blocks: int


def reverse(selection: Selection, layout: Layout) -> Reverse:
    """The queries of every block, for going through the keys block by block (MSA, arXiv 2606.13392, its backward pass)."""
    chosen = selection.blocks
    batch, groups, queries, slots = chosen.shape
    next_block = [0] * layout.batch
    first_block = []
    for span in layout.spans:
        first_block.append(next_block[span.row])
        next_block[span.row] += -(-span.keys // selection.block_size)
    most = max(next_block, default=0)
    first = torch.tensor([*first_block, 0], dtype=torch.int64, device=chosen.device)
    # Padding has span −1, which reads the 0 at the end; its slots are all −1 and fall out.
    shift = first[layout.span_of_query(chosen.device).long()]
    row = torch.arange(batch * groups, device=chosen.device).view(batch, groups, 1, 1) * most
    key = (row + shift[:, None, :, None] + chosen).flatten()
    place = (chosen >= 0).flatten().nonzero().flatten()
    # Places ascend with queries, and a stable sort keeps them so within a block.
    key, order = key[place].sort(stable=True)
    place = place[order]
    return Reverse(
        query=place // max(slots, 1) % max(queries, 1),
        slot=place % max(slots, 1),
        start=torch.searchsorted(key, torch.arange(batch * groups * most + 1, device=chosen.device)),
        first_block=tuple(first_block),
        blocks=most,
    )
