"""Selectors that learn nothing: what a trained one must beat, and the best that any could do.

- Window: the query's own block and the ones right before it, as many as the budget has slots.
- SinkWindow: the first block of the sequence, and a window with what is left (attention sinks: Xiao et al., arXiv 2309.17453).
- RandomBlocks: the own block and others at random, each set alike likely; from a hash of (seed, layer, group, position, block)
  and no generator, so that a recomputed or cached pass chooses the same, and padding or the batch row does not matter.
- Oracle: the blocks on which dense attention puts most of its probability, averaged over the group's heads. It costs a dense
  map (in chunks, never held whole), so it is a yardstick and no way to save work.

The first three have no scores to share out: whatever the budget, they take as many blocks as it allows at most.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import Choice, LayerInputs, Selector
from sparsort.attention.selectors.chunks import (
    Scores,
    blocks_seen,
    dense_map,
    in_blocks,
    keys_of,
    positions,
    queries_of,
    select_blocks,
)
from sparsort.attention.selectors.weights import LayerShape
from sparsort.kernels.blocksparse.budgets import FixedBudget
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.selection import Selection


class Window(Selector):
    """The last blocks."""

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        if inputs.full:
            return Choice(selection=inputs.every_block(self.block_size))
        return Choice(selection=window(inputs, self.block_size, inputs.budget.slots))


class SinkWindow(Selector):
    """The first block and the last ones."""

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        if inputs.full:
            return Choice(selection=inputs.every_block(self.block_size))
        selection = window(inputs, self.block_size, inputs.budget.slots)
        if selection.blocks.shape[-1] > 1:
            # The window's oldest block makes room; where the window reaches block 0 or less, nothing changes.
            selection.blocks[..., -1].clamp_(max=0)
        return Choice(selection=selection)


class RandomBlocks(Selector):
    """The own block and others at random."""

    def __init__(self, config: SparseAttentionConfig, shape: LayerShape) -> None:
        super().__init__(config.block_size)
        self.seed, self.layer = config.seed, shape.layer

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        return cls(config, shape)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        if inputs.full:
            return Choice(selection=inputs.every_block(self.block_size))
        device = inputs.query.device
        groups = torch.arange(inputs.groups, device=device)[:, None, None]

        def scores_of(span: Span) -> Scores:
            def scores(first: int, last: int) -> Tensor:
                place = positions(span, first, last, device)[:, None]
                blocks = torch.arange(blocks_seen(span, last, self.block_size), device=device)
                # float64 holds the 32 bits, so that ties are as rare as they are in the hash.
                return hashed(self.seed, self.layer, groups, place, blocks).double()

            return scores

        budget = FixedBudget(blocks=inputs.budget.slots)
        cost = 4 * inputs.groups / self.block_size
        return Choice(selection=select_blocks(inputs, self.block_size, budget, scores_of, cost=cost))


class Oracle(Selector):
    """The blocks that dense attention looks at most."""

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """The scores of dense attention."""
        return 2 * shape.heads * shape.head_dim * visible_pairs(tokens)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        if inputs.full:
            return Choice(selection=inputs.every_block(self.block_size))

        def scores_of(span: Span) -> Scores:
            queries, keys = queries_of(inputs, span), keys_of(inputs.key, span)

            def scores(first: int, last: int) -> Tensor:
                probabilities = dense_map(queries[:, :, first:last], keys, span, first, last, inputs.scale)
                mass = in_blocks(probabilities.mean(1)[..., None], self.block_size, 0.0).sum((-2, -1))
                # Of a logarithm the softmax that a budget takes its shares from is the mass itself.
                return mass.log()

            return scores

        cost = 3 * inputs.query.shape[1]
        return Choice(selection=select_blocks(inputs, self.block_size, inputs.budget, scores_of, cost=cost))


def window(inputs: LayerInputs, block_size: int, blocks: int) -> Selection:
    """The last `blocks` blocks up to each query's own."""
    layout: Layout = inputs.layout
    device = inputs.query.device
    own = torch.div(layout.position(device), block_size, rounding_mode="floor")
    back = torch.arange(min(blocks, layout.blocks(block_size)), dtype=torch.int32, device=device)
    found = (own[..., None] - back).clamp(min=-1)
    return Selection(blocks=found[:, None].expand(-1, inputs.groups, -1, -1).contiguous(), block_size=block_size)


def hashed(*numbers: int | Tensor) -> Tensor:
    """A number in [0, 2³²) from whole numbers, as if drawn at random; tensors broadcast.

    Every step multiplies less than 2³² by less than 2³¹, which int64 holds. The two rounds are a 32-bit finaliser whose every
    input bit flips each output bit with a chance near 1/2.
    """
    found: Tensor | int = 0x9E3779B9
    for number in numbers:
        found = (found ^ (number & 0xFFFFFFFF)) & 0xFFFFFFFF
        for _ in range(2):
            found = (((found >> 16) ^ found) * 0x45D9F3B) & 0xFFFFFFFF
        found = (found >> 16) ^ found
    return torch.as_tensor(found)
