"""MSA's index branch (MiniMax Sparse Attention, arXiv 2606.13392): small queries and keys that learn where attention goes.

    Q_idx = sg(X)·Wq   one index query for each group of heads         K_idx = sg(X)·Wk   one index key for all
    S_ts = Q_idx,t · K_idx,s / √I over visible keys,   block score = max of S over the block's visible keys
    L = mean over tokens and groups of KL(P ‖ softmax S) over the visible keys of the selected blocks

sg stops the gradient at the layer's input (without it the paper's training diverged), so that the alignment loss teaches Wq,
Wk and nothing else, and the LM loss never reaches them. P, the selection and the loss are `kernels/blocksparse/ops.py`'s.

Index queries and keys get what the main ones get: RMSNorm (`index_norm`) and the rotary embedding. Where the index width is
not the rotary width, ours differs from transformers' MSA (`minimax_m3_vl`), which cuts cosines to [..., :I]: see `turn`.

Legend: B batch, T query columns, S key columns, C hidden width, G groups, I index width, E rotary width.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.flops import AttentionShape, SparseShape, chosen_pairs, visible_pairs
from sparsort.attention.selectors.base import Choice, LayerInputs, Selector
from sparsort.attention.selectors.weights import LayerShape, RMSNorm, apply_linear
from sparsort.kernels.blocksparse.ops import align, index_select


class IndexBranch(Selector):
    """The paper's selector; its weights are Wq (G·I, C) and Wk (I, C) without bias, and two norms of width I."""

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
        """Every index query with every index key; in training also the heads' scores over the selection, and three
        products of index queries and keys there: the scores again and their two gradients."""
        index, scores = 2 * shape.groups * shape.index_dim, 2 * shape.heads * shape.head_dim
        loss = (scores + 3 * index) * chosen_pairs(tokens, sparse) if training else 0
        return index * visible_pairs(tokens) + loss

    def index_keys(self, module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, I)."""
        keys = self.key_norm(apply_linear(self.key_proj, hidden.detach()))
        return turn(keys[:, None], rotary)[:, 0]

    def index_queries(self, inputs: LayerInputs) -> Tensor:
        """(B, G, T, I)."""
        queries = apply_linear(self.query_proj, inputs.hidden.detach())
        queries = self.query_norm(queries.reshape(*queries.shape[:2], self.groups, self.width))
        return turn(queries.transpose(1, 2), inputs.rotary)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        index_keys = given(index_keys)
        queries = self.index_queries(inputs)
        if inputs.full:
            selection = inputs.every_block(self.block_size)
        else:
            selection = index_select(queries, index_keys, inputs.layout, inputs.budget, block_size=self.block_size)
        return Choice(selection=selection, state=queries)

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: Choice, lse: Tensor) -> Tensor | None:
        return align(
            inputs.query,
            inputs.key,
            choice.state,
            given(index_keys),
            choice.selection,
            inputs.layout,
            scale=inputs.scale,
            lse=lse,
        )


def turn(states: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """The rotary embedding of a layer, on states of another width.

    A table of width E holds E/2 angles twice, and coordinates i and i + E/2 turn by angle i (transformers' rotate-half). States
    of width I ≥ E turn in their first E coordinates, as in partial rotary embedding. Narrower ones turn in all, i with i + I/2,
    by I/2 of the angles at equal steps: base^(−2i/I) is every (E/I)-th of base^(−2i/E), so that this is the table of a head of
    width I, from the shortest wave to the longest. Cutting the table to its first I columns would pair coordinates whose
    angles are not the same and drop the long waves.

    Args:
        states: (B, heads, T, I).
        rotary: cosines and sines, (B or 1, T, E) each; None: the states as they are.
    """
    if rotary is None:
        return states
    cosines, sines = (table[:, None] for table in rotary)
    angles = cosines.shape[-1] // 2
    half = min(states.shape[-1] // 2, angles)
    picked = torch.arange(half, device=states.device) * angles // max(half, 1)
    cosines, sines = cosines[..., picked], sines[..., picked]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return torch.cat([turned.to(states.dtype), rest], dim=-1)


def given(index_keys: Tensor | None) -> Tensor:
    """The index keys of a selector that makes them, which `choose` and `loss` are therefore given."""
    if index_keys is None:
        raise ValueError("choose and loss want the tensor that index_keys made")
    return index_keys
