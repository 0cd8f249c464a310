"""SeerAttention's gate (arXiv 2410.13276), which makes the attention of a model sparse after it was trained with dense attention.

The gate is computed for each query token, as in SeerAttention-R (arXiv 2506.08889). The caller freezes the model, and the gate
learns from the model's own dense attention map.

    gate key of block b    = W_k [max; min; mean of the block's keys]      for each group
    gate query of token t  = W_q [the group's queries, concatenated]       for each group
    score                  = rotated gate query · rotated gate key / √I
    truth                  = softmax(q·k·scale) over every visible key, max over each block, mean over the group's heads, then
                             divided by its sum over the blocks
    loss                   = mean over tokens and groups of KL(truth ‖ softmax of scores over the visible blocks)

Queries and keys are taken before the rotary embedding, because pooling over positions would average out the rotation. The gates
get their own rotary embedding. This implementation differs from the papers, or fills in what they do not specify, as follows:

- The gate's rotary embedding (base 10000) counts positions in blocks instead of tokens: a gate key has the number of its block,
  and a gate query the number of the block that contains the query.
- A query's own block is pooled up to the query itself, in the gate and in the truth, because later keys are in the future.
- Queries and keys are taken after the layer's own norm, if it has one, and the truth averages the heads of a group.
- The loss always computes the dense map, whatever is selected, in chunks of queries that are discarded after use. Its gradient,
  softmax(scores) − truth, is computed in the forward pass, so no chunk has to be stored for the backward pass.

Legend: B batch, T query columns, G groups, R heads of a group, D head width, I gate width; n queries and N blocks of a sequence;
t queries of a chunk, and the N' blocks that the last of them sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import BlockChoice, LayerInputs, Selector
from sparsort.attention.selectors.chunks import (
    Pooling,
    ScoreFunction,
    blocks_seen,
    chunks,
    dense_map,
    full_precision,
    in_blocks,
    keys_of,
    own_blocks,
    pool_blocks,
    pool_own,
    queries_of,
    select_blocks,
    tokens_and_groups,
    wide,
    with_own,
)
from sparsort.attention.selectors.index_branch import require_index_keys
from sparsort.attention.selectors.weights import LayerShape
from sparsort.kernels.blocksparse.layout import Span

_POOLS: tuple[Pooling, ...] = ("max", "min", "mean")
_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gates:
    """The gates of one sequence.

    Attributes:
        queries: (G, n, I), the gate queries.
        keys: (G, N, I), the gate keys of the blocks.
        own: (G, n, I), the gate key of each query's own block up to the query.
    """

    queries: Tensor
    keys: Tensor
    own: Tensor


class PooledGate(Selector):
    """SeerAttention's selector. Its weights are `query_weight` (G, I, R·D) and `key_weight` (G, I, 3·D)."""

    def __init__(self, config: SparseAttentionConfig, shape: LayerShape) -> None:
        super().__init__(config.block_size)
        self.groups, self.head_width = shape.groups, shape.width
        self.width = config.index_dim or shape.width
        generator = shape.generator(config.seed)
        # The input widths of the two weights, which read all queries of a group and the concatenated pools of its keys.
        joined, pooled = shape.heads // shape.groups * shape.width, len(_POOLS) * shape.width
        # Initialise the gates to preserve the scale of their inputs. The model's own initial spread is irrelevant for a gate
        # that is distilled from a trained, frozen model.
        self.query_weight = shape.drawn(shape.groups, self.width, joined, spread=joined**-0.5, generator=generator)
        self.key_weight = shape.drawn(shape.groups, self.width, pooled, spread=pooled**-0.5, generator=generator)

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        shape.check_index_width(config.index_dim)
        return cls(config, shape)

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Count the score of every gate query with every visible gate key.

        The loss adds the dense scores, a second computation of the gate scores, and the two gradients of the gate scores.
        """
        index, pairs = 2 * shape.groups * shape.index_dim, visible_pairs(tokens)
        by_block = pairs / sparse.block_size
        loss = 2 * shape.heads * shape.head_dim * pairs + 3 * index * by_block if training else 0
        return index * by_block + loss

    def index_keys(self, module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the layer's keys before the rotary embedding: (B, T, G·D)."""
        return _before_rotary(module, "k", hidden, self.head_width).flatten(2)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        queries = _before_rotary(inputs.module, "q", inputs.hidden, self.head_width)
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size), state=queries)

        def scores_of(span: Span) -> ScoreFunction:
            gates = self._gates(queries, require_index_keys(index_keys), span)

            def scores(first: int, last: int) -> Tensor:
                return self._scores(gates, span, first, last)

            return scores

        # The largest tensor is the scores, with one element for each group, query and block.
        cost = inputs.groups / self.block_size
        selection = select_blocks(inputs, self.block_size, inputs.budget, scores_of, cost=cost)
        return BlockChoice(selection=selection, state=queries)

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: BlockChoice, lse: Tensor) -> Tensor | None:
        device = inputs.query.device
        gradients = torch.is_grad_enabled()
        total = torch.zeros((), dtype=wide(inputs.query).dtype, device=device)
        with full_precision(device):
            for span in inputs.layout.spans:
                gates = self._gates(choice.state, require_index_keys(index_keys), span)
                parts = (gates.queries, gates.keys, gates.own)
                total = total + _Distilled.apply(*parts, self, inputs, span, gradients)  # type: ignore[no-untyped-call]
        return total / tokens_and_groups(inputs.layout, self.groups)

    def _gates(self, queries: Tensor, index_keys: Tensor, span: Span) -> _Gates:
        """Compute the gates of one sequence from queries (B, T, H, D) and index keys (B, S, G·D), both without gradient."""
        span_queries = wide(queries[span.row, span.query_start : span.query_start + span.queries])
        joined = span_queries.reshape(span.queries, self.groups, -1).transpose(0, 1)
        keys = keys_of(index_keys, span).reshape(span.keys, self.groups, -1).transpose(0, 1)
        # Weights are applied after pooling: max and min do not commute with a linear map.
        pooled = torch.cat([pool_blocks(keys, self.block_size, pooling) for pooling in _POOLS], dim=-1)
        pooled_own = torch.cat([pool_own(keys, span, self.block_size, pooling) for pooling in _POOLS], dim=-1)
        query_weight, key_weight = (weight.to(joined.dtype).mT for weight in (self.query_weight, self.key_weight))
        own = own_blocks(span, 0, span.queries, self.block_size, keys.device)
        return _Gates(
            queries=_apply_rotary(joined @ query_weight, own),
            keys=_apply_rotary(pooled @ key_weight, torch.arange(pooled.shape[1], device=keys.device)),
            own=_apply_rotary(pooled_own @ key_weight, own),
        )

    def _scores(self, gates: _Gates, span: Span, first: int, last: int) -> Tensor:
        """Return the scores (G, t, N'). Entries for blocks after a query's own have no meaning."""
        scale = 1 / math.sqrt(self.width)
        queries = gates.queries[:, first:last] * scale
        scores = queries @ gates.keys[:, : blocks_seen(span, last, self.block_size)].mT
        own = own_blocks(span, first, last, self.block_size, queries.device)
        return with_own(scores, own, (queries * gates.own[:, first:last]).sum(-1))

    def _truth(self, inputs: LayerInputs, queries: Tensor, keys: Tensor, span: Span, first: int, last: int) -> Tensor:
        """Return the target distribution over blocks: (G, t, N'), with sum 1 over N'."""
        probabilities = dense_map(queries[:, :, first:last], keys, span, first, last, inputs.scale)
        highest = in_blocks(probabilities[..., None], self.block_size, 0.0).amax((-2, -1)).mean(1)
        return highest / highest.sum(-1, keepdim=True)


class _Distilled(torch.autograd.Function):
    """The sum of KL(truth ‖ gate) over one sequence's tokens and groups, with its gradient for the gates."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_queries: Tensor,
        gate_keys: Tensor,
        gate_own: Tensor,
        selector: PooledGate,
        inputs: LayerInputs,
        span: Span,
        gradients: bool,
    ) -> Tensor:
        gates = _Gates(queries=gate_queries, keys=gate_keys, own=gate_own)
        queries, keys = queries_of(inputs, span), keys_of(inputs.key, span)
        total = gate_queries.new_zeros(())
        d_queries, d_keys, d_own = (torch.zeros_like(gate) for gate in (gate_queries, gate_keys, gate_own))
        scale = 1 / math.sqrt(selector.width)
        for first, last in chunks(span, 3 * inputs.query.shape[1]):
            own = own_blocks(span, first, last, selector.block_size, keys.device)
            truth = selector._truth(inputs, queries, keys, span, first, last)
            scores = selector._scores(gates, span, first, last)
            blocks = torch.arange(scores.shape[-1], device=keys.device)
            log_student = scores.masked_fill(blocks > own[:, None], -torch.inf).log_softmax(-1)
            # The truth is 0 for blocks that a query does not see, where the gate's log is −∞: mask it, since 0 · ∞ is NaN.
            total += (torch.xlogy(truth, truth) - truth * log_student.masked_fill(truth == 0, 0.0)).sum()
            if gradients:
                # The score of the query's own block comes from `gates.own` instead of `gates.keys`, so its gradient goes there.
                d_scores = (log_student.exp() - truth) * scale
                d_own_scores = d_scores.gather(-1, own.expand(scores.shape[:-1])[..., None])
                d_others = d_scores.masked_fill(blocks == own[:, None], 0.0)
                seen = slice(0, scores.shape[-1])
                d_queries[:, first:last] = d_others @ gate_keys[:, seen] + d_own_scores * gate_own[:, first:last]
                d_keys[:, seen] += d_others.mT @ gate_queries[:, first:last]
                d_own[:, first:last] = d_own_scores * gate_queries[:, first:last]
        if gradients:
            ctx.save_for_backward(d_queries, d_keys, d_own)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is a scalar, so its incoming gradient only scales those that the forward pass computed.
        return *(gradient * grad for gradient in ctx.saved_tensors), None, None, None, None


def _before_rotary(module: nn.Module, which: str, hidden: Tensor, width: int) -> Tensor:
    """Return a layer's queries ("q") or keys ("k") before the rotary embedding: (B, T, heads, D), without gradient."""
    projection, norm = getattr(module, f"{which}_proj"), getattr(module, f"{which}_norm", None)
    with torch.no_grad():
        states: Tensor = projection(hidden)
        by_head = states.reshape(*states.shape[:2], states.shape[-1] // width, width)
        if norm is None:
            return by_head
        if norm.weight.shape[-1] == width:
            return norm(by_head)  # type: ignore[no-any-return]
        # OLMo 2 has one norm over all heads together.
        return norm(states).reshape(by_head.shape)  # type: ignore[no-any-return]


def _apply_rotary(gates: Tensor, blocks: Tensor) -> Tensor:
    """Apply the rotary embedding to gates (…, x, I) at block numbers `blocks` (x,)."""
    half = gates.shape[-1] // 2
    frequencies = _BASE ** (-torch.arange(half, dtype=gates.dtype, device=gates.device) / half)
    angles = blocks[:, None] * frequencies
    first, second = gates[..., :half], gates[..., half:]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
