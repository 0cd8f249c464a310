"""MoBA's gate (arXiv 2502.13189): a block is worth what the query makes of its mean key. It has no weights and learns nothing.

    score of block n = query_t · mean of the keys in n · scale,   the query's own block taken in any case

Two things differ from the paper. It selects for each head; ours is one selection for a group, so the score is the mean of the
group's queries' (the same order of blocks as their sum). And it leaves the own block out of the ranking, of which it counts
as one of the k; so does ours for a fixed budget, but a budget by shares needs a number for it: the mean of its keys up to the
query, since the rest lies in the future. Keys are the layer's after rotary embedding, as in the paper's code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import Choice, LayerInputs, Selector
from sparsort.attention.selectors.chunks import (
    Scores,
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
        """Every group's query with the mean key of every block."""
        return 2 * shape.groups * shape.head_dim * visible_pairs(tokens) / sparse.block_size

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        if inputs.full:
            return Choice(selection=inputs.every_block(self.block_size))

        def scores_of(span: Span) -> Scores:
            return self._scores(inputs, span)

        cost = inputs.groups / self.block_size
        return Choice(selection=select_blocks(inputs, self.block_size, inputs.budget, scores_of, cost=cost))

    def _scores(self, inputs: LayerInputs, span: Span) -> Scores:
        queries = queries_of(inputs, span).mean(1) * inputs.scale
        keys = keys_of(inputs.key, span)
        means, own_means = pool_blocks(keys, self.block_size, "mean"), pool_own(keys, span, self.block_size, "mean")

        def scores(first: int, last: int) -> Tensor:
            own = own_blocks(span, first, last, self.block_size, queries.device)
            seen = means[:, : blocks_seen(span, last, self.block_size)]
            found = torch.einsum("gtd,gnd->gtn", queries[:, first:last], seen)
            own_scores = (queries[:, first:last] * own_means[:, first:last]).sum(-1)
            return with_own(found, own, own_scores)

        return scores
