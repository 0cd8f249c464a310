"""Whether a selection of blocks fits its layout, read number by number."""

from __future__ import annotations

import torch

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


def check_blocks(selection: Selection, layout: Layout) -> None:
    """Refuse numbers that no query of the layout may hold.

    Raises:
        SparsortError: a block above the query's own, a number below −1, one twice in a row, or one in a row of padding.
    """
    blocks = selection.blocks
    if (blocks.shape[0], blocks.shape[2]) != (layout.batch, layout.queries):
        raise SparsortError(
            f"the selection is of {blocks.shape[0]} rows of {blocks.shape[2]} queries and the layout of {layout.batch} of "
            f"{layout.queries}."
        )
    # Floor division takes padding's −1 to −1, so that nothing but −1 is allowed there.
    own = torch.div(layout.position(blocks.device), selection.block_size, rounding_mode="floor")
    wrong = (blocks < -1) | (blocks > own[:, None, :, None])
    ordered = blocks.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    for found, what in ((wrong, "is not a block that its query can see"), (twice, "is twice in its row")):
        if found.any():
            place = tuple(found.nonzero()[0].tolist())
            source = ordered[..., 1:] if found is twice else blocks
            raise SparsortError(f"block {int(source[place])} of (row, group, query) {place[:3]} {what}.")
