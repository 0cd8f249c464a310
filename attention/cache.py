"""Index keys in the caches of transformers.

Contract: a token's index key is stored with its key and value, in transformers' own indexed layers (`DynamicIndexedLayer`,
`StaticIndexedLayer`). Reordering (beam search), cropping (assisted generation), selecting and resetting therefore treat all
three alike. transformers creates a cache with plain layers, because the model's configuration still describes a dense model.
The first time that an attention layer runs, its empty plain cache layer is replaced by an indexed one.
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
        cache: the cache of the whole model, before the keys and values of the new tokens are added.
        layer: number of the attention layer, from 0.
        index_keys: (B, T, width), the index keys of the new tokens.
        selector: name of the selector that computed them; a cache holds the index keys of one selector.

    Returns:
        (B, S, width), the index keys of all tokens, the new ones last; for a static cache, all of its columns, filled or not.

    Raises:
        SparsortError: the cache was filled without index keys or with those of another selector, or its kind cannot hold
            index keys.
    """
    if getattr(cache, "offloading", False):
        raise SparsortError(
            "the cache is offloaded, and an offloaded cache does not move index keys back to the device before they are needed. "
            "Use a dynamic or static cache that stays on the device."
        )
    # transformers appends the layers of a dynamic cache when their keys first arrive, which is after their index keys.
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    cache_layer = cache.layers[layer]
    if not isinstance(cache_layer, DynamicIndexedLayer | StaticIndexedLayer):
        cache_layer = cache.layers[layer] = _indexed(cache_layer, layer)
    _check_index_keys(cache_layer, layer, f"{selector} of width {index_keys.shape[-1]}")
    all_index_keys: Tensor = cache_layer.update_indexer(index_keys)
    return all_index_keys


def _check_index_keys(cache_layer: Any, layer: int, maker: str) -> None:
    """Refuse a cache layer whose index keys do not cover all of its tokens, or come from a selector other than `maker`."""
    if not cache_layer.is_indexer_initialized:
        cache_layer.sparsort_maker = maker
    stored_maker = getattr(cache_layer, "sparsort_maker", "another model")
    if stored_maker != maker:
        raise SparsortError(
            f"layer {layer} of the cache holds index keys of {stored_maker}, but the model computes those of {maker}. Start "
            "with a new cache."
        )
    # A static cache keeps its counts in tensors, and a compiled model cannot branch on their values.
    if torch.compiler.is_compiling():
        return
    # Index keys are appended before keys and values, so both counts exclude the new tokens here.
    indexed = 0
    if cache_layer.is_indexer_initialized:
        static = isinstance(cache_layer, StaticIndexedLayer)
        indexed = int(cache_layer.indexer_cumulative_length) if static else cache_layer.indexer_keys.shape[1]
    filled = int(cache_layer.get_seq_length())
    if indexed != filled:
        raise SparsortError(
            f"layer {layer} of the cache holds {filled} tokens but {indexed} index keys; expected one for each token. Some "
            "tokens were added while the index branch was detached. Start with a new cache."
        )


def _indexed(cache_layer: Any, layer: int) -> DynamicIndexedLayer | StaticIndexedLayer:
    """Return an indexed cache layer to replace an empty plain one."""
    if type(cache_layer) not in (DynamicLayer, StaticLayer):
        raise SparsortError(
            f"layer {layer} of the cache is a {type(cache_layer).__name__}, which cannot hold index keys. Use a DynamicCache "
            'or a StaticCache (cache_implementation="dynamic" or "static").'
        )
    filled = int(cache_layer.get_seq_length())
    if filled:
        raise SparsortError(
            f"layer {layer} of the cache holds {filled} tokens without index keys: it was filled before the index branch was "
            "attached, or by another model. Start with a new cache."
        )
    if isinstance(cache_layer, StaticLayer):
        return StaticIndexedLayer(max_cache_len=cache_layer.max_cache_len)
    return DynamicIndexedLayer()
