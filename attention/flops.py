"""Formulas for the cost of attention: dense, and block-sparse including the cost of choosing blocks.

Contract: the functions count the floating-point operations (two per multiply-add) of the attention of one layer for one causal
sequence. As in the papers, projections, pooling, softmax and top-k are not counted, and a query sees N/2 keys on average. They
reproduce MSA's published figure (arXiv 2606.13392) for the forward pass: 28.4 times fewer operations at N = 2²⁰ with 64 heads,
4 groups, widths of 128, and 16 blocks of 128 keys.

The forward pass costs 4·H·D·N·k·W for attending, plus the cost of choosing:

    index_branch, lm_trained   G·I·N²                        every index query with every earlier index key
    moba                       G·D·N² / W                    every group's query with every block's mean
    seer                       G·I·N² / W                    the same with gates of width I
    nsa                        2·H·D·N² / W + 4·H·D·N·w·W    compressed scores and values, and a window of w blocks
    window, sink_window, random   0
    oracle                     H·D·N²                        dense scores

A training step has (2 + 5) / 2 times the matrix products of the forward pass, because the backward pass recomputes the scores.
Choosing has no backward pass, except for NSA's compressed and windowed attention. The selector's loss adds, for index_branch,
the heads' scores over the selection and the index scores with their two gradients; for seer, the dense scores and the gate
scores with their two gradients.

Legend: N tokens, H query heads, G groups, D head width, I index width, W block size, k blocks of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsort.attention.selectors import SELECTORS, SelectorKind
from sparsort.errors import SparsortError

# (2 + 5) / 2: two matrix products in the forward pass and five in the backward pass, one of them the recomputed scores.
_TRAINING = 3.5


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of a layer's attention.

    Attributes:
        heads, groups: H and G, the numbers of query heads and of key/value heads.
        head_dim: D, the width of queries, keys and values.
        index_dim: I, the width of index queries and keys, or of gates; 0 for a selector without them.

    Raises:
        SparsortError: a size is below 1, or `heads` is not a multiple of `groups`.
    """

    heads: int
    groups: int
    head_dim: int
    index_dim: int = 0

    def __post_init__(self) -> None:
        if min(self.heads, self.groups, self.head_dim) < 1 or self.index_dim < 0 or self.heads % self.groups:
            raise SparsortError(
                f"{self} is not a valid attention shape: heads must be a multiple of groups, and sizes 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class SparseShape:
    """The block-sparse part of a sparse layer.

    Attributes:
        selector: how blocks are chosen.
        block_size: W.
        blocks: k, the number of blocks per query; the mean over queries if it varies.
        window: w, the number of blocks in NSA's window.

    Raises:
        SparsortError: the selector is unknown, or a size is out of range.
    """

    selector: SelectorKind = "index_branch"
    block_size: int
    blocks: float
    window: int = 0

    def __post_init__(self) -> None:
        SELECTORS.check(self.selector)
        if self.block_size < 1 or self.blocks < 0 or self.window < 0:
            raise SparsortError(
                f"{self} is not a valid sparse shape: block_size must be 1 or more, and blocks and window 0 or more."
            )


def visible_pairs(tokens: int) -> float:
    """Return the number of pairs of a query and a visible key as the papers count them, N² / 2."""
    return tokens * tokens / 2


def dense_flops(shape: AttentionShape, tokens: int, *, training: bool = False) -> float:
    """Return the operations of dense attention: 2·H·D·N² for the forward pass."""
    return attending_flops(shape, visible_pairs(tokens), training)


def sparse_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, *, training: bool = False) -> float:
    """Return the operations of choosing blocks and of attending to them.

    As in the papers, a query is counted with k·W keys even if it sees fewer; the total is capped at that of a dense layer.
    """
    attending = attending_flops(shape, chosen_pairs(tokens, sparse), training)
    return choosing_flops(shape, tokens, sparse, training=training) + attending


def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, *, training: bool = False) -> float:
    """Return the operations that the selector adds to attending over its blocks."""
    return SELECTORS[sparse.selector].load().choosing_flops(shape, tokens, sparse, training)


def saving(shape: AttentionShape, tokens: int, sparse: SparseShape, *, training: bool = False) -> float:
    """Return dense operations divided by sparse operations; below 1 if choosing costs more than it saves."""
    return dense_flops(shape, tokens, training=training) / sparse_flops(shape, tokens, sparse, training=training)


def crossover(shape: AttentionShape, *, blocks: float, block_size: int) -> float:
    """Return the sequence length up to which an index branch costs more than it saves in the forward pass.

    N* = 2·k·W / (1 − G·I / (2·H·D)); infinite if the index branch always costs more.
    """
    # The index branch computes this share of the products of dense attention, whatever the length. From 1 on, nothing is saved.
    share = shape.groups * shape.index_dim / (2 * shape.heads * shape.head_dim)
    return 2 * blocks * block_size / (1 - share) if share < 1 else float("inf")


def attending_flops(shape: AttentionShape, pairs: float, training: bool) -> float:
    """Return the operations for the scores and weighted values of every head: 4·H·D per pair of a query and a key."""
    return 4 * shape.heads * shape.head_dim * pairs * (_TRAINING if training else 1)


def chosen_pairs(tokens: int, sparse: SparseShape) -> float:
    """Return the number of pairs of a query and a key in its k selected blocks."""
    return pairs_of(tokens, sparse.blocks * sparse.block_size)


def pairs_of(tokens: int, keys: float) -> float:
    """Return the number of pairs if each query reads `keys` keys, capped at the pairs of a dense layer."""
    return min(keys * tokens, visible_pairs(tokens))
