"""Native Sparse Attention (arXiv 2502.11089): queries attend to compressed keys and values, and this attention chooses blocks.

    compressed key of block n  = φ_k(keys of n), compressed value = φ_v(values of n), for each group
    p_cmp of head h            = softmax(query_h · compressed keys · scale) over the blocks that are entirely in the past
    selection                  = the blocks with the highest p_cmp, averaged over the group's heads, and always the query's own
    output                     = g_cmp · compressed attention + g_sel · attention over the selection + g_win · sliding window
    g                          = sigmoid(W·X + b), three numbers for each head

The LM loss is the only loss, and it trains φ and the gates through the mixture. Nothing is detached: the branches are part of
the model, and its queries, keys, values and hidden states get gradients through them.

This implementation differs from the paper as follows:

- Blocks do not overlap. The paper compresses 32 keys every 16 keys and sums the scores over blocks of 64 keys. Here each
  compressed block is also a block that can be selected, with W keys.
- The paper does not specify φ ("a learnable MLP with intra-block position encoding"). Here φ is the block's mean plus the mean
  of MLP(token + embedding of its position in the block). The MLP's last layer starts at 0, so φ starts as the mean.
- The three branches share the layer's keys and values; in the paper, each branch has its own.
- Only the query's own block is always selected, not the first block or the block before the query's own.
- The window covers whole blocks, the last ⌈blocks/2⌉ ones. This is the paper's ratio (a window of 512 keys for 16 blocks of 64).
- The gates start open for the selection and nearly closed for the other branches (sigmoid of 2 and −2), so a dense checkpoint
  starts close to its original function. For training from scratch, this is an arbitrary choice.

Every decoding step compresses the whole cache again; no result of φ is cached.

Legend: B batch, T query columns, H query heads, G groups, D head width, W block size; n queries, m keys, N blocks of a sequence
that are full.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.flops import AttentionShape, SparseShape, attending_flops, pairs_of, visible_pairs
from sparsort.attention.selectors.base import BlockChoice, LayerInputs, Selector
from sparsort.attention.selectors.chunks import (
    ScoreFunction,
    blocks_seen,
    in_blocks,
    positions,
    queries_of,
    select_blocks,
    wide,
)
from sparsort.attention.selectors.weights import LayerShape, apply_linear
from sparsort.kernels.blocksparse.layout import Span
from sparsort.kernels.blocksparse.ops import attend

_BRANCHES = 3
_OPEN, _SHUT = 2.0, -2.0


class Compression(nn.Module):
    """φ, which compresses each full block of a sequence's keys or values to one vector."""

    def __init__(self, block_size: int, shape: LayerShape, generator: torch.Generator) -> None:
        super().__init__()
        self.block_size = block_size
        self.place = shape.drawn(block_size, shape.width, spread=shape.spread, generator=generator)
        self.up = shape.linear(shape.width, shape.width, generator=generator, bias=True)
        # With zero weights in the last layer, φ starts as the mean.
        self.down = shape.linear(shape.width, shape.width, generator=generator, spread=0.0)

    def forward(self, states: Tensor) -> Tensor:
        """Compress (G, m, D) to (G, N, D), where N = ⌊m / W⌋."""
        full = states.shape[1] // self.block_size * self.block_size
        tokens = in_blocks(states[:, :full], self.block_size, 0.0)
        residual = apply_linear(self.down, nn.functional.gelu(apply_linear(self.up, tokens + self.place)))
        return (tokens + residual.to(tokens.dtype)).mean(-2)


class CompressedBranch(Selector):
    """NSA's selector, and its mixture of three branches."""

    def __init__(self, config: SparseAttentionConfig, shape: LayerShape) -> None:
        super().__init__(config.block_size)
        self.window = -(-config.blocks // 2)
        generator = shape.generator(config.seed)
        self.key_compression = Compression(config.block_size, shape, generator)
        self.value_compression = Compression(config.block_size, shape, generator)
        self.gates = shape.linear(shape.hidden, _BRANCHES * shape.heads, generator=generator, bias=True)
        # In the order of the branches: compressed, selected, window.
        start = torch.tensor([_SHUT, _OPEN, _SHUT], dtype=shape.dtype, device=shape.device)
        self.gates.bias = nn.Parameter(start.repeat(shape.heads))

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        return cls(config, shape)

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Count attention over the compressed keys and over the window."""
        by_block = visible_pairs(tokens) / sparse.block_size
        near = pairs_of(tokens, sparse.window * sparse.block_size)
        return attending_flops(shape, by_block, training) + attending_flops(shape, near, training)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        # Compressed here, with gradients, because `mix` attends to the same keys.
        compressed = [self.key_compression(_rows_of(inputs.key, span)) for span in inputs.layout.spans]
        if inputs.full:
            return BlockChoice(selection=inputs.every_block(self.block_size), state=compressed)
        keys_of_span = dict(zip(inputs.layout.spans, compressed, strict=True))

        def scores_of(span: Span) -> ScoreFunction:
            return self._scores(inputs, span, wide(keys_of_span[span].detach()))

        cost = 3 * inputs.query.shape[1] / self.block_size
        selection = select_blocks(inputs, self.block_size, inputs.budget, scores_of, cost=cost)
        return BlockChoice(selection=selection, state=compressed)

    def mix(self, inputs: LayerInputs, index_keys: Tensor | None, choice: BlockChoice, output: Tensor) -> Tensor:
        compressed = torch.zeros_like(output)
        for span, keys in zip(inputs.layout.spans, choice.state, strict=True):
            columns = slice(span.query_start, span.query_start + span.queries)
            values = self.value_compression(_rows_of(inputs.value, span))
            attended = self._attend_compressed(inputs.query[span.row, :, columns], keys, values, span, inputs.scale)
            compressed[span.row, :, columns] = attended.to(output.dtype)
        # The window is a selection too, so the same kernel computes its attention.
        window = inputs.last_blocks(self.block_size, self.window)
        windowed, _ = attend(inputs.query, inputs.key, inputs.value, window, inputs.layout, scale=inputs.scale)
        gates = apply_linear(self.gates, inputs.hidden).sigmoid().to(output.dtype)
        # (B, T, H·3) → three of (B, H, T, 1)
        compressed_gate, selection_gate, window_gate = (
            gates.reshape(*gates.shape[:2], output.shape[1], _BRANCHES).transpose(1, 2)[..., None, :].unbind(-1)
        )
        return compressed_gate * compressed + selection_gate * output + window_gate * windowed

    def _scores(self, inputs: LayerInputs, span: Span, compressed: Tensor) -> ScoreFunction:
        queries = queries_of(inputs, span) * inputs.scale

        def scores(first: int, last: int) -> Tensor:
            past = self._is_past(compressed.shape[1], span, first, last, queries.device)
            logits = torch.einsum("grtd,gnd->grtn", queries[:, :, first:last], compressed)
            share = logits.masked_fill(~past, -torch.inf).softmax(-1).mean(1)
            # A budget takes its shares from a softmax over the scores. The softmax of log(share) is the share itself. A query
            # in the first block sees no complete block, so its shares are NaN, but it can only choose its own block anyway.
            block_scores = share.new_full((*share.shape[:2], blocks_seen(span, last, self.block_size)), -torch.inf)
            full_blocks = min(share.shape[-1], block_scores.shape[-1])
            block_scores[..., :full_blocks] = share[..., :full_blocks].log()
            return block_scores

        return scores

    def _attend_compressed(self, query: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float) -> Tensor:
        """Attend from query (H, n, D) to compressed keys and values (G, N, D): (H, n, D), 0 if no block is entirely past."""
        past = self._is_past(keys.shape[1], span, 0, span.queries, query.device)
        # Append a key with value 0, visible only to queries that see no other key, because an empty softmax row would give
        # NaN.
        seen = torch.cat([past, ~past.any(-1, keepdim=True)], dim=-1)
        heads = query.shape[0] // keys.shape[0]
        keys, values = (
            nn.functional.pad(states, (0, 0, 0, 1)).to(query.dtype).repeat_interleave(heads, 0)
            for states in (keys, values)
        )
        return nn.functional.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=seen, scale=scale
        )[0]

    def _is_past(self, blocks: int, span: Span, first: int, last: int, device: torch.device) -> Tensor:
        """Return (t, blocks) bool, True for the blocks whose last key the query sees."""
        ends = (torch.arange(blocks, device=device) + 1) * self.block_size - 1
        return ends <= positions(span, first, last, device)[:, None]


def _rows_of(states: Tensor, span: Span) -> Tensor:
    """Return the part (G, m, D) of (B, G, S, D) that belongs to one sequence."""
    return states[span.row, :, span.key_start : span.key_start + span.keys]
