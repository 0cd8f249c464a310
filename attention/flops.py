"""What attention costs by formula: dense, and block-sparse with the work of choosing counted.

Contract: floating-point operations of the attention of one layer and one causal sequence, a multiply-add as two. Projections,
pooling, softmax and top-k are left out, and a query is counted with N/2 keys on average, as in the papers. MSA's published
figure (arXiv 2606.13392) is the forward pass: at N = 2²⁰, 64 heads, 4 groups, widths 128, 16 blocks of 128: 28.4 times fewer.

Forward, on top of 4·H·D·N·k·W for attending:

    index_branch, lm_trained   G·I·N²                        every index query with every index key before it
    moba                       G·D·N² / W                    every group's query with every block's mean
    seer                       G·I·N² / W                    the same with gates of width I
    nsa                        2·H·D·N² / W + 4·H·D·N·w·W    compressed scores and values, and a window of w blocks
    window, sink_window, random   0
    oracle                     H·D·N²                        dense scores

A training step has (2 + 5) / 2 times the products of the forward pass, as scores are made again in the backward pass; choosing
has no backward pass, but for what NSA attends to. The selector's loss comes on top: for index_branch the heads' scores over the
selection once more, and the index scores with their two gradients; for seer the dense scores, and the gates' with theirs.

Legend: N tokens, H query heads, G groups, D head width, I index width, W block size, k blocks of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsort.attention.selectors import SELECTORS, SelectorKind
from sparsort.errors import SparsortError

_TRAINING = 3.5


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of a layer's attention.

    Attributes:
        heads, groups: query heads, and key/value heads.
        head_dim: of queries, keys and values.
        index_dim: of index queries and keys, or of gates; 0 for a selector without them.

    Raises:
        SparsortError: sizes that no attention has.
    """

    heads: int
    groups: int
    head_dim: int
    index_dim: int = 0

    def __post_init__(self) -> None:
        if min(self.heads, self.groups, self.head_dim) < 1 or self.index_dim < 0 or self.heads % self.groups:
            raise SparsortError(f"{self} is no attention: heads must be a multiple of groups, and sizes 1 or more.")


@dataclass(frozen=True, kw_only=True)
class SparseShape:
    """What a sparse layer does with it.

    Attributes:
        selector: how blocks are chosen.
        block_size: W.
        blocks: k; the mean over queries where it varies.
        window: w, of NSA.
    """

    selector: SelectorKind = "index_branch"
    block_size: int
    blocks: float
    window: int = 0

    def __post_init__(self) -> None:
        SELECTORS.check(self.selector)
        if self.block_size < 1 or self.blocks < 0 or self.window < 0:
            raise SparsortError(f"{self} is no sparse attention: block_size must be 1 or more, and counts not below 0.")


def visible_pairs(tokens: int) -> float:
    """Pairs of a query and a key it sees, as the papers count them: N² / 2."""
    return tokens * tokens / 2


def dense_flops(shape: AttentionShape, tokens: int, *, training: bool = False) -> float:
    """2·H·D·N² forward."""
    return attending_flops(shape, visible_pairs(tokens), training)


def sparse_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, *, training: bool = False) -> float:
    """Choosing and attending.

    A query is counted with k·W keys, as the papers do, also where it sees fewer; never with more than a dense layer has.
    """
    attending = attending_flops(shape, chosen_pairs(tokens, sparse), training)
    return choosing_flops(shape, tokens, sparse, training=training) + attending


def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, *, training: bool = False) -> float:
    """What the selector adds to attending over its blocks."""
    return SELECTORS[sparse.selector].load().choosing_flops(shape, tokens, sparse, training)


def saving(shape: AttentionShape, tokens: int, sparse: SparseShape, *, training: bool = False) -> float:
    """How many times fewer operations than dense attention; below 1 where choosing costs more than it saves."""
    return dense_flops(shape, tokens, training=training) / sparse_flops(shape, tokens, sparse, training=training)


def crossover(shape: AttentionShape, *, blocks: float, block_size: int) -> float:
    """N* = 2·k·W / (1 − G·I / (2·H·D)): the length up to which an index branch costs more than it saves, forward; infinite
    where it always does."""
    share = shape.groups * shape.index_dim / (2 * shape.heads * shape.head_dim)
    return 2 * blocks * block_size / (1 - share) if share < 1 else float("inf")


def attending_flops(shape: AttentionShape, pairs: float, training: bool) -> float:
    """Scores and weighted values of every head: 4·H·D for each pair of a query and a key."""
    return 4 * shape.heads * shape.head_dim * pairs * (_TRAINING if training else 1)


def chosen_pairs(tokens: int, sparse: SparseShape) -> float:
    """Pairs of a query and a key of its k selected blocks."""
    return pairs_of(tokens, sparse.blocks * sparse.block_size)


def pairs_of(tokens: int, keys: float) -> float:
    """Pairs of a query and a key when each query reads `keys` keys, and never more pairs than a dense layer has."""
    return min(keys * tokens, visible_pairs(tokens))
