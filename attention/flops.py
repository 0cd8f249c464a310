"""What attention costs by formula: dense, and block-sparse with the work of choosing counted.

Contract: floating-point operations of the attention of one layer and one causal sequence, a multiply-add as two; projections,
softmax and top-k are left out, as in the papers. Forward: scores and weighted values. Training: forward and backward, whose
scores are made again (7 products of scores' size where the forward pass has 2), and the alignment loss. MSA's published figure
(arXiv 2606.13392) is the forward one: at N = 2²⁰, 64 heads, 4 groups, widths 128, 16 blocks of 128: 28.4 times fewer.

Legend: N tokens, H query heads, G groups, D head width, I index width, W block size, k blocks of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsort.errors import SparsortError

_TRAINING = 3.5  # products of a training step for each product of the forward pass: (2 + 5) / 2


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of a layer's attention: query heads, groups (key/value heads), head width, index width."""

    heads: int
    groups: int
    head_dim: int
    index_dim: int

    def __post_init__(self) -> None:
        if min(self.heads, self.groups, self.head_dim) < 1 or self.index_dim < 0 or self.heads % self.groups:
            raise SparsortError(f"{self} is no attention: heads must be a multiple of groups, and sizes 1 or more.")


def visible_pairs(tokens: int) -> float:
    """Pairs of a query and a key it sees, as the papers count them: N² / 2."""
    return tokens * tokens / 2


def dense_flops(shape: AttentionShape, tokens: int, *, training: bool = False) -> float:
    """2·H·D·N² forward."""
    forward = 4 * shape.heads * shape.head_dim * visible_pairs(tokens)
    return forward * (_TRAINING if training else 1)


def index_flops(shape: AttentionShape, tokens: int) -> float:
    """G·I·N²: every index query with every index key before it. Choosing has no backward pass over all pairs."""
    return 2 * shape.groups * shape.index_dim * visible_pairs(tokens)


def sparse_flops(
    shape: AttentionShape, tokens: int, *, blocks: float, block_size: int, training: bool = False, aligned: bool = True
) -> float:
    """G·I·N² + 4·H·D·N·k·W forward.

    Args:
        blocks: k, the mean over queries where it varies.
        training: forward and backward; with `aligned`, also the alignment loss over the selection: the heads' scores once
            more, and the index scores with their two gradients.

    A query is counted with k·W keys, as the papers do, also where it sees fewer; never with more than a dense layer has.
    """
    keys = min(blocks * block_size * tokens, visible_pairs(tokens))
    attention = 4 * shape.heads * shape.head_dim * keys
    if not training:
        return index_flops(shape, tokens) + attention
    alignment = (2 * shape.heads * shape.head_dim + 6 * shape.groups * shape.index_dim) * keys if aligned else 0.0
    return index_flops(shape, tokens) + attention * _TRAINING + alignment


def saving(shape: AttentionShape, tokens: int, *, blocks: float, block_size: int, training: bool = False) -> float:
    """How many times fewer operations than dense attention."""
    return dense_flops(shape, tokens, training=training) / sparse_flops(
        shape, tokens, blocks=blocks, block_size=block_size, training=training
    )


def crossover(shape: AttentionShape, *, blocks: float, block_size: int) -> float:
    """N* = 2·k·W / (1 − G·I / (2·H·D)): below this length choosing costs more than it saves; infinite where it always does."""
    share = shape.groups * shape.index_dim / (2 * shape.heads * shape.head_dim)
    return 2 * blocks * block_size / (1 - share) if share < 1 else float("inf")
