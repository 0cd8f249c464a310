"""Selectors without weights: baselines that a trained selector must beat, and an upper bound.

- Window: the query's own block and the blocks right before it, one for each slot of the budget.
- SinkWindow: the first block of the sequence, and a window in the remaining slots (attention sinks: Xiao et al.,
  arXiv 2309.17453).
- RandomBlocks: the own block and a random set of others, all sets equally likely. The choice comes from a hash of (seed, layer,
  group, position, block) instead of a generator, so a recomputed or cached pass chooses the same blocks, and padding and the
  batch row have no influence.
- Oracle: the blocks with the most dense attention probability, averaged over the group's heads. It computes the dense map (in
  chunks, never as a whole), so it is a reference and saves no work.

The first three have no scores, so a budget by threshold or top-p has no shares to go by: they always take the maximum number of
blocks that the budget allows.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import BlockChoice, LayerInputs, Selector
from sparsort.attention.selectors.chunks import (
    ScoreFunction,
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
from sparsort.kernels.blocksparse.layout import Span


class Window(Selector):
    """The last blocks."""

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size))
        return BlockChoice(selection=inputs.last_blocks(self.block_size, inputs.budget.slots))


class SinkWindow(Selector):
    """The first block and the last ones."""

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size))
        selection = inputs.last_blocks(self.block_size, inputs.budget.slots)
        if selection.blocks.shape[-1] > 1:
            # Block 0 replaces the window's oldest block. If the window reaches block 0 (or ends in unused slots, −1), the
            # clamp changes nothing.
            selection.blocks[..., -1].clamp_(max=0)
        return BlockChoice(selection=selection)


class RandomBlocks(Selector):
    """The own block and random other blocks."""

    def __init__(self, config: SparseAttentionConfig, shape: LayerShape) -> None:
        super().__init__(config.block_size)
        self.seed, self.layer = config.seed, shape.layer

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        return cls(config, shape)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size))
        device = inputs.query.device
        groups = torch.arange(inputs.groups, device=device)[:, None, None]

        def scores_of(span: Span) -> ScoreFunction:
            def scores(first: int, last: int) -> Tensor:
                queries = positions(span, first, last, device)[:, None]
                blocks = torch.arange(blocks_seen(span, last, self.block_size), device=device)
                # float64 represents all 32 bits exactly; float32 would round them and create ties.
                return hashed(self.seed, self.layer, groups, queries, blocks).double()

            return scores

        # Hashes are not probabilities, so shares of a softmax over them would mean nothing.
        budget = FixedBudget(blocks=inputs.budget.slots)
        cost = 4 * inputs.groups / self.block_size
        return BlockChoice(selection=select_blocks(inputs, self.block_size, budget, scores_of, cost=cost))


class Oracle(Selector):
    """The blocks with the most dense attention."""

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Count the scores of dense attention."""
        return 2 * shape.heads * shape.head_dim * visible_pairs(tokens)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size))

        def scores_of(span: Span) -> ScoreFunction:
            queries, keys = queries_of(inputs, span), keys_of(inputs.key, span)

            def scores(first: int, last: int) -> Tensor:
                probabilities = dense_map(queries[:, :, first:last], keys, span, first, last, inputs.scale)
                mass = in_blocks(probabilities.mean(1)[..., None], self.block_size, 0.0).sum((-2, -1))
                # A budget takes its shares from a softmax over the scores. The softmax of log(mass) is the mass itself.
                return mass.log()

            return scores

        cost = 3 * inputs.query.shape[1]
        return BlockChoice(selection=select_blocks(inputs, self.block_size, inputs.budget, scores_of, cost=cost))


def hashed(*numbers: int | Tensor) -> Tensor:
    """Hash whole numbers to a pseudo-random number in [0, 2³²); tensors broadcast.

    Each number is mixed in by two rounds of a 32-bit finaliser, in which each input bit flips each output bit with a
    probability near 1/2.
    """
    state: Tensor | int = 0x9E3779B9
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFF)) & 0xFFFFFFFF
        for _ in range(2):
            # The factors are below 2³² and 2³¹, so the product fits into int64.
            state = (((state >> 16) ^ state) * 0x45D9F3B) & 0xFFFFFFFF
        state = (state >> 16) ^ state
    return torch.as_tensor(state)
