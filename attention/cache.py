"""Index keys in the caches of transformers.

Contract: what a selector keeps of a token lies beside the token's key and value, in transformers' own indexed layers
(`DynamicIndexedLayer`, `StaticIndexedLayer`), so that reordering (beam search), cropping (assisted generation), selecting and
resetting treat all three alike. A cache comes with plain layers, because the configuration is that of a dense model: an empty
one is exchanged for its indexed kind when its attention layer is first reached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, StaticIndexedLayer, StaticLayer

from sparsort.errors import SparsortError


def keep_index_keys(cache: Cache, layer: int, index_keys: Tensor, *, selector: str) -> Tensor:
    """Append the index keys of new tokens.

    Args:
        cache: of the whole model; its keys and values have not been updated yet.
        layer: number of the attention layer.
        index_keys: (B, T, width), of the new tokens.
        selector: what made them; a cache keeps those of one selector.

    Returns:
        (B, S, width): those of all tokens, the new ones last; of a static cache all of its columns, filled or not.

    Raises:
        SparsortError: the cache was filled without index keys or with another selector's, or is of a kind that cannot hold
            them.
    """
    if getattr(cache, "offloading", False):
        raise SparsortError(
            "an offloaded cache does not move index keys in time. Use a dynamic or static cache that stays on the device."
        )
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[layer]
    if not isinstance(held, DynamicIndexedLayer | StaticIndexedLayer):
        held = cache.layers[layer] = _indexed(held, layer)
    _check_held(held, layer, f"{selector} of width {index_keys.shape[-1]}")
    kept: Tensor = held.update_indexer(index_keys)
    return kept


def _check_held(held: Any, layer: int, maker: str) -> None:
    """Refuse index keys that `maker` did not make, or that some of the layer's tokens lack."""
    if not held.is_indexer_initialized:
        held.sparsort_maker = maker
    found = getattr(held, "sparsort_maker", "another model")
    if found != maker:
        raise SparsortError(
            f"layer {layer} of the cache holds index keys of {found}, and the model's are of {maker}. Start with a new cache."
        )
    # A static cache counts in tensors, which a compiled model cannot compare.
    if torch.compiler.is_compiling():
        return
    indexed = 0
    if held.is_indexer_initialized:
        static = isinstance(held, StaticIndexedLayer)
        indexed = int(held.indexer_cumulative_length) if static else held.indexer_keys.shape[1]
    filled = int(held.get_seq_length())
    if indexed != filled:
        raise SparsortError(
            f"layer {layer} of the cache holds {filled} tokens and index keys of {indexed}: the model was without its index "
            "branch in between. Start with a new cache."
        )


def _indexed(held: Any, layer: int) -> DynamicIndexedLayer | StaticIndexedLayer:
    """The indexed kind of an empty plain layer."""
    if type(held) not in (DynamicLayer, StaticLayer):
        raise SparsortError(
            f"layer {layer} of the cache is a {type(held).__name__}, which cannot hold index keys. Use a DynamicCache or a "
            'StaticCache (cache_implementation="dynamic" or "static").'
        )
    filled = int(held.get_seq_length())
    if filled:
        raise SparsortError(
            f"layer {layer} of the cache holds {filled} tokens without index keys: it was filled before the index branch was "
            "attached, or by another model. Start with an empty cache."
        )
    if isinstance(held, StaticLayer):
        return StaticIndexedLayer(max_cache_len=held.max_cache_len)
    return DynamicIndexedLayer()
