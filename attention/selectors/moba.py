"""MoBA's gate (arXiv 2502.13189): the score of a block is the query's product with the block's mean key. It has no weights.

    score of block n = query_t · mean of the keys in n · scale;   the query's own block is always taken

There are two differences from the paper:

- The paper selects blocks for each head. Here the heads of a group share one selection, and the score is the mean over the
  group's queries, which ranks blocks like their sum.
- The paper gives the query's own block no score: it is always selected, and counts as one of the k blocks. A fixed budget does
  the same here. A budget by shares of the softmax (`threshold` or `top_p`) needs a score for it, which uses the mean of the
  block's keys up to the query, because later keys are in the future.

As in the paper's code, keys are taken after the rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import BlockChoice, LayerInputs, Selector
from sparsort.attention.selectors.chunks import (
    ScoreFunction,
    blocks_seen,
    keys_of,
    own_blocks,
    pool_blocks,
    pool_own,
    queries_of,
    select_blocks,
    with_own,
)
from sparsort.kernels.blocksparse.layout import Span


class MeanKeyGate(Selector):
    """MoBA's selector."""

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Count one product for each group and query token with the mean key of each visible block."""
        return 2 * shape.groups * shape.head_dim * visible_pairs(tokens) / sparse.block_size

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size))

        def scores_of(span: Span) -> ScoreFunction:
            return self._scores(inputs, span)

        # The largest tensor is the scores, with one element for each group, query and block.
        cost = inputs.groups / self.block_size
        return BlockChoice(selection=select_blocks(inputs, self.block_size, inputs.budget, scores_of, cost=cost))

    def _scores(self, inputs: LayerInputs, span: Span) -> ScoreFunction:
        # The product is linear in the query, so averaging the queries first gives the mean of the heads' scores.
        queries = queries_of(inputs, span).mean(1) * inputs.scale
        keys = keys_of(inputs.key, span)
        means, own_means = pool_blocks(keys, self.block_size, "mean"), pool_own(keys, span, self.block_size, "mean")

        def scores(first: int, last: int) -> Tensor:
            own = own_blocks(span, first, last, self.block_size, queries.device)
            seen = means[:, : blocks_seen(span, last, self.block_size)]
            block_scores = torch.einsum("gtd,gnd->gtn", queries[:, first:last], seen)
            own_scores = (queries[:, first:last] * own_means[:, first:last]).sum(-1)
            return with_own(block_scores, own, own_scores)

        return scores
