"""A configuration's selector for one layer."""

from __future__ import annotations

from torch import nn

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors.index_branch import IndexBranch
from sparsort.attention.selectors.interface import Selector
from sparsort.attention.selectors.lm_trained import LMTrainedBranch
from sparsort.attention.selectors.moba import MeanKeyGate
from sparsort.attention.selectors.nsa import CompressedBranch
from sparsort.attention.selectors.plain import Oracle, RandomBlocks, SinkWindow, Window
from sparsort.attention.selectors.seer import PooledGate
from sparsort.attention.selectors.weights import LayerShape
from sparsort.errors import SparsortError


def make_selector(module: nn.Module, config: SparseAttentionConfig) -> Selector:
    """The selector that `config` names, for the attention module of one layer, on the module's device and in its dtype.

    Its first weights depend on the configuration's seed and the layer's number alone, and are drawn without touching global
    random state. The module is not changed.

    Args:
        module: an attention module of transformers.
        config: which selector, and its sizes.

    Raises:
        SparsortError: a module of another make, heads that are not a multiple of the groups, or an odd head width where the
            index width is left to it.
    """
    shape = LayerShape.of(module)
    if shape.heads % shape.groups:
        raise SparsortError(
            f"layer {shape.layer} has {shape.heads} query heads and {shape.groups} key/value heads; selectors need the first "
            "to be a multiple of the second."
        )
    match config.selector:
        case "index_branch" | "lm_trained" | "seer":
            if config.index_dim is None and shape.width % 2:
                raise SparsortError(
                    f"layer {shape.layer} has heads of width {shape.width}, and rotary pairs need an even index width. "
                    f"Give one, such as index_dim={shape.width + 1}."
                )
            learned = {"index_branch": IndexBranch, "lm_trained": LMTrainedBranch, "seer": PooledGate}
            return learned[config.selector](config, shape)
        case "nsa":
            return CompressedBranch(config, shape)
        case "random":
            return RandomBlocks(config, shape)
        case "moba":
            return MeanKeyGate(config.block_size)
        case "window":
            return Window(config.block_size)
        case "sink_window":
            return SinkWindow(config.block_size)
        case "oracle":
            return Oracle(config.block_size)
