"""The interface of selectors, which choose the blocks that a layer attends to and define the loss that trains the choice.

Contract: a selector returns a `Selection`, and the same exact attention uses it for every selector. A selector sees a layer
through `LayerInputs` and keeps no state between calls, so a pass that is run again (gradient checkpointing) or continues from
a cache chooses the same blocks. The blocks of a token depend only on that token and the earlier ones of its sequence. They do
not depend on the position of padding, where queries, keys, values and index keys may hold any value, including NaN.

Legend: B batch, T query and S key columns of the padded batch, C hidden width, H query heads, G groups (key/value heads), D head
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from sparsort.kernels.blocksparse.budgets import Budget
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, every_block

if TYPE_CHECKING:
    from sparsort.attention.config import SparseAttentionConfig
    from sparsort.attention.flops import AttentionShape, SparseShape
    from sparsort.attention.selectors.weights import LayerShape


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerInputs:
    """The tensors and settings from which a selector chooses the blocks of a layer.

    Attributes:
        module: the attention module, for its projections and its settings.
        hidden: (B, T, C), the layer's input.
        rotary: cosines and sines of the queries' positions, each (B or 1, T, rotary width), or None.
        query: (B, H, T, D), after norm and rotary embedding, attached to the graph.
        key, value: (B, G, S, D), the same, including the cached tokens.
        layout: the position of each sequence in the batch.
        scale: factor for the attention logits.
        full: whether every block must be selected (warm-up).
        budget: number of blocks per query token if not `full`.
    """

    module: nn.Module
    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    query: Tensor
    key: Tensor
    value: Tensor
    layout: Layout
    scale: float
    full: bool
    budget: Budget

    @property
    def groups(self) -> int:
        return int(self.key.shape[1])

    def every_block(self, block_size: int) -> Selection:
        """Return full causal attention as a selection."""
        return every_block(self.layout, self.groups, block_size, self.query.device)

    def last_blocks(self, block_size: int, blocks: int) -> Selection:
        """Select the last `blocks` blocks up to and including each query's own, newest first."""
        device = self.query.device
        # Padding has the position −1, which floor division keeps, so that all of its slots are −1.
        own_BT = torch.div(self.layout.position(device), block_size, rounding_mode="floor")
        back_K = torch.arange(min(blocks, self.layout.blocks(block_size)), dtype=torch.int32, device=device)
        chosen_BTK = (own_BT[..., None] - back_K).clamp(min=-1)
        # `contiguous` copies, because `SinkWindow` writes into the result, and expanded groups would share memory.
        blocks_BGTK = chosen_BTK[:, None].expand(-1, self.groups, -1, -1).contiguous()
        return Selection(blocks=blocks_BGTK, block_size=block_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockChoice:
    """The blocks that a selector chose.

    Attributes:
        selection: the blocks of every query token and group.
        bias: (B, G, T, K), one value for each of the K slots of `selection`, added to the logits of all keys of the block in
            that slot. Through it, the LM loss trains the selector. None for a selector that is trained otherwise.
        state: data that `choose` passes to `loss` and `mix` of the same selector; no other code reads it.
    """

    selection: Selection
    bias: Tensor | None = None
    state: Any = None


class Selector(nn.Module):
    """Base class of selectors, each of which chooses the blocks of one layer.

    A selector is the submodule `index_branch` of its attention module, so its weights are saved with the model.

    Attributes:
        block_size: W, the number of keys in a block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        """Build the selector of one layer. A selector with weights overrides this.

        Args:
            config: the selector's sizes and its seed.
            shape: the sizes of the layer's attention.

        Raises:
            SparsortError: the selector cannot have the configured sizes in this layer.
        """
        return cls(config.block_size)

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Return the floating-point operations of choosing blocks, in addition to those of the attention itself.

        They are for one causal sequence, and 0 unless overridden.

        Args:
            shape: the sizes of the layer's attention.
            tokens: N, the length of the sequence.
            sparse: the selector, block size and budget.
            training: whether to count a training step instead of the forward pass alone.
        """
        return 0.0

    def index_keys(self, module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Return one index key per token: the vector that is cached together with the token's key and value.

        Args:
            module: the attention module.
            hidden: (B, T, C), the layer's input; the selector detaches it.
            rotary: cosines and sines of these tokens' positions, or None.

        Returns:
            (B, T, width), or None if the selector needs only keys and values.
        """
        return None

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        """Choose the blocks of every query token, or every block if `inputs.full`.

        Args:
            inputs: the layer's tensors and settings.
            index_keys: (B, S, width), the index keys of the same tokens as `inputs.key`; None if the selector has none.
        """
        raise NotImplementedError

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: BlockChoice, lse: Tensor) -> Tensor | None:
        """Return the loss that trains the selector.

        Args:
            inputs, index_keys: as in `choose`.
            choice: the result of `choose`.
            lse: (B, H, T), the log-sum-exp of the attention's logits over the selection.

        Returns:
            A scalar, the mean over tokens and groups, with a gradient to the selector's own weights only. None if the selector
            has no weights or the LM loss trains them.
        """
        return None

    def mix(self, inputs: LayerInputs, index_keys: Tensor | None, choice: BlockChoice, output: Tensor) -> Tensor:
        """Return the layer's output (B, H, T, D), given attention over the selection; unchanged unless overridden.

        Args:
            inputs, index_keys, choice: as in `loss`.
            output: (B, H, T, D), the attention over the selection.
        """
        return output
