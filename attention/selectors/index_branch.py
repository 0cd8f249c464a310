"""MSA's index branch (MiniMax Sparse Attention, arXiv 2606.13392): small queries and keys that learn to predict attention.

    Q_idx = sg(X)·Wq   one index query per group of heads              K_idx = sg(X)·Wk   one index key for all groups
    S_ts = Q_idx,t · K_idx,s / √I over visible keys,   block score = max of S over the block's visible keys
    L = mean over tokens and groups of KL(P ‖ softmax S) over the visible keys of the selected blocks

sg stops the gradient at the layer's input; without it, the paper's training diverged. The alignment loss therefore trains only
Wq and Wk, and the LM loss never reaches them. `kernels/blocksparse/ops.py` defines P, the selection and the loss.

Index queries and keys get an RMSNorm (`index_norm`) and the rotary embedding, like the main ones. If the index width differs
from the rotary width, this implementation differs from transformers' MSA (`minimax_m3_vl`), which cuts the cosines to
[..., :I]; `apply_rotary` explains why.

Legend: B batch, T query columns, S key columns, C hidden width, G groups, I index width, E rotary width.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.flops import AttentionShape, SparseShape, chosen_pairs, visible_pairs
from sparsort.attention.selectors.base import BlockChoice, LayerInputs, Selector
from sparsort.attention.selectors.weights import LayerShape, RMSNorm, apply_linear
from sparsort.kernels.blocksparse.ops import align, index_select


class IndexBranch(Selector):
    """The paper's selector. Its weights are Wq (G·I, C) and Wk (I, C) without bias, and two norms of width I."""

    def __init__(self, config: SparseAttentionConfig, shape: LayerShape) -> None:
        super().__init__(config.block_size)
        self.groups, self.width = shape.groups, config.index_dim or shape.width
        generator = shape.generator(config.seed)
        self.query_proj = shape.linear(shape.hidden, self.groups * self.width, generator=generator)
        self.key_proj = shape.linear(shape.hidden, self.width, generator=generator)
        normed = shape.normed if config.index_norm is None else config.index_norm
        self.query_norm: nn.Module = RMSNorm(self.width, shape) if normed else nn.Identity()
        self.key_norm: nn.Module = RMSNorm(self.width, shape) if normed else nn.Identity()

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        shape.check_index_width(config.index_dim)
        return cls(config, shape)

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Count every index query with every index key, and the loss in training.

        The loss needs the heads' scores over the selection, and three products of index queries and keys there: the scores,
        computed again, and their two gradients.
        """
        index, scores = 2 * shape.groups * shape.index_dim, 2 * shape.heads * shape.head_dim
        loss = (scores + 3 * index) * chosen_pairs(tokens, sparse) if training else 0
        return index * visible_pairs(tokens) + loss

    def index_keys(self, module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the index keys of the new tokens: (B, T, I)."""
        keys = self.key_norm(apply_linear(self.key_proj, hidden.detach()))
        return apply_rotary(keys[:, None], rotary)[:, 0]

    def index_queries(self, inputs: LayerInputs) -> Tensor:
        """Return the index queries: (B, G, T, I)."""
        queries = apply_linear(self.query_proj, inputs.hidden.detach())
        queries = self.query_norm(queries.reshape(*queries.shape[:2], self.groups, self.width))
        return apply_rotary(queries.transpose(1, 2), inputs.rotary)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        index_keys = require_index_keys(index_keys)
        queries = self.index_queries(inputs)
        if inputs.full:
            selection = inputs.every_block(self.block_size)
        else:
            selection = index_select(queries, index_keys, inputs.layout, inputs.budget, block_size=self.block_size)
        return BlockChoice(selection=selection, state=queries)

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: BlockChoice, lse: Tensor) -> Tensor | None:
        return align(
            inputs.query,
            inputs.key,
            choice.state,
            require_index_keys(index_keys),
            choice.selection,
            inputs.layout,
            scale=inputs.scale,
            lse=lse,
        )


def apply_rotary(states: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Apply the rotary embedding of a layer to states of another width.

    A table of width E holds E/2 angles twice, and coordinates i and i + E/2 are rotated by angle i (transformers' rotate-half).
    For I ≥ E, the first E coordinates are rotated, as in partial rotary embedding. For I < E, all coordinates are rotated, i
    with i + I/2, by I/2 of the angles at equal steps. Since base^(−2i/I) is every (E/I)-th of base^(−2i/E), these are the
    angles of a head of width I, from the shortest wavelength to the longest. Cutting the table to its first I columns instead
    would rotate the two coordinates of a pair by different angles and drop the long wavelengths.

    Args:
        states: (B, heads, T, I).
        rotary: cosines and sines, (B or 1, T, E) each; None: the states are returned unchanged.

    Returns:
        (B, heads, T, I) in the dtype of `states`.
    """
    if rotary is None:
        return states
    cosines, sines = (table[:, None] for table in rotary)
    angles = cosines.shape[-1] // 2
    half = min(states.shape[-1] // 2, angles)
    # Integer arithmetic picks the angles at equal steps; for I ≥ E, it picks all of them.
    picked = torch.arange(half, device=states.device) * angles // max(half, 1)
    cosines, sines = cosines[..., picked], sines[..., picked]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    rotated = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return torch.cat([rotated.to(states.dtype), rest], dim=-1)


def require_index_keys(index_keys: Tensor | None) -> Tensor:
    """Return the index keys as a tensor, for selectors whose `choose` and `loss` always receive them."""
    if index_keys is None:
        raise ValueError("index_keys is None; pass the tensor that the selector's index_keys method returned")
    return index_keys
