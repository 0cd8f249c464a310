"""What every selector answers: which blocks a layer attends to, and what it learns by.

Contract: a selector makes a `Selection`; one exact attention takes it, whatever made it. It sees a layer through
`LayerInputs` and keeps no state between calls, so that a pass may be run again (gradient checkpointing) or go on from a
cache and choose the same blocks. What a token selects depends on that token and those before it in its sequence only, and
not on where padding lies: queries, keys, values and index keys may hold anything there, NaN too.

Legend: B batch, T query columns, S key columns, C hidden width, H query heads, G groups (key/value heads), D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

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
    """What a layer has when it comes to choose.

    Attributes:
        module: the attention module, for its projections and its settings.
        hidden: (B, T, C), the layer's input.
        rotary: cosines and sines of the queries' positions, each (B or 1, T, rotary width), or None.
        query: (B, H, T, D), after norm and rotary embedding, with its gradient.
        key, value: (B, G, S, D), the same, with what the cache holds.
        layout: where the sequences lie.
        scale: of the attention's logits.
        full: warm-up: every block is to be selected.
        budget: how many blocks otherwise.
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
        """Full causal attention, as a selection."""
        return every_block(self.layout, self.groups, block_size, self.query.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What was chosen.

    Attributes:
        selection: the blocks of every query token and group.
        bias: (B, G, T, K), added to the logits of a slot's keys, for a selector that learns by the LM loss.
        state: what the selector wants back in `loss` and `mix`; nobody else reads it.
    """

    selection: Selection
    bias: Tensor | None = None
    state: Any = None


class Selector(nn.Module):
    """Chooses the blocks of one layer. Its weights live in the attention module, at `index_branch`.

    Attributes:
        block_size: W, keys of a block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    @classmethod
    def from_config(cls, config: SparseAttentionConfig, shape: LayerShape) -> Self:
        """The selector of one layer. A selector with weights overrides this.

        Args:
            config: its sizes and its seed.
            shape: the sizes of the layer's attention.

        Raises:
            SparsortError: sizes that the selector cannot have in this layer.
        """
        return cls(config.block_size)

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """The operations that choosing adds to attending, for one causal sequence; 0 unless a selector says more.

        Args:
            shape: the sizes of the layer's attention.
            tokens: N.
            sparse: what the sparse layer does.
            training: count a training step, and not the forward pass alone.
        """
        return 0.0

    def index_keys(self, module: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """What the selector keeps of each token, beside the layer's keys and values in a cache.

        Args:
            module: the attention module.
            hidden: (B, T, C), the layer's input; the selector detaches it.
            rotary: cosines and sines of these tokens' positions, or None.

        Returns:
            (B, T, width), or None where the selector needs nothing beyond keys and values.
        """
        return None

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        """The blocks of every query token; every block where `inputs.full`.

        Args:
            inputs: the layer.
            index_keys: (B, S, width), of all tokens that the keys stand for.
        """
        raise NotImplementedError

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: Choice, lse: Tensor) -> Tensor | None:
        """What the selector learns by: a scalar, the mean over tokens and groups, with a gradient to its own weights only.

        Args:
            inputs, index_keys: as in `choose`.
            choice: what `choose` gave.
            lse: (B, H, T), the log-sum-exp of the attention's logits over the selection.

        Returns:
            None where there is nothing to learn, or the LM loss is what teaches it.
        """
        return None

    def mix(self, inputs: LayerInputs, index_keys: Tensor | None, choice: Choice, output: Tensor) -> Tensor:
        """The layer's output (B, H, T, D) from the attention's over the selection; here that output itself."""
        return output
