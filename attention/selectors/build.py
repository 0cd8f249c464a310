"""A configuration's selector for one layer."""

from __future__ import annotations

from torch import nn

from sparsort.attention.config import SparseAttentionConfig
from sparsort.attention.selectors import SELECTORS
from sparsort.attention.selectors.base import Selector
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
    selector: Selector = SELECTORS[config.selector].load().from_config(config, shape)
    return selector
