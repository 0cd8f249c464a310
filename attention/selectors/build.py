"""Build the selector that a configuration names, for one layer."""

from __future__ import annotations

from torch import nn

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors import SELECTORS
from sparsort.attention.selectors.base import Selector
from sparsort.attention.selectors.weights import LayerShape
from sparsort.errors import SparsortError


def make_selector(module: nn.Module, config: SparseAttentionConfig) -> Selector:
    """Build the selector that `config` names for the attention module of one layer, on the module's device and in its dtype.

    The initial weights depend only on the configuration's seed and the layer's number, and drawing them does not change global
    random state. The module is not changed.

    Args:
        module: an attention module of transformers.
        config: the name and the sizes of the selector.

    Raises:
        SparsortError: the module is not of a supported kind, its number of heads is not a multiple of its groups, or the index
            width is left to the head width and that is odd.
    """
    shape = LayerShape.of(module)
    if shape.heads % shape.groups:
        raise SparsortError(
            f"layer {shape.layer} has {shape.heads} query heads and {shape.groups} key/value heads; expected the number of "
            "query heads to be a multiple of the number of key/value heads. Keep this layer dense."
        )
    selector: Selector = SELECTORS[config.selector].load().from_config(config, shape)
    return selector
