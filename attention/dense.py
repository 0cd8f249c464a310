"""Attention for the layers that stay dense, computed by transformers' own SDPA attention.

Contract: the results are those of the model with `attn_implementation="sdpa"`. Sliding-window layers get their mask as
(B, 1, T, S). Layers with full attention get the same argument as sparse layers: None, or the padding (B, filled columns). If
SDPA needs a dense mask, it is built here, once per forward pass.

Legend: B batch, T query columns, S key columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    sdpa_mask,
)


def attend_dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    masks: dict[Any, Tensor | None],
    *,
    position_ids: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA over all keys that a query sees.

    Args:
        module: the attention module.
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        attention_mask: None, the padding (B, filled columns), or a complete mask (B, 1, T, S).
        masks: the dense masks built so far in this forward pass; a new one is added.
        position_ids: (B or 1, T), which separate packed sequences if there is no padding.
        kwargs: further arguments of transformers' `sdpa_attention_forward`.

    Returns:
        The output (B, T, H, D), and None in the place of the attention weights.
    """
    if attention_mask is None or attention_mask.ndim == 2:
        sizes = (query.shape[0], query.shape[2], key.shape[2])
        # The layers of a model split over several devices cannot share one mask.
        key_of_mask = (*sizes, query.device)
        if key_of_mask not in masks:
            masks[key_of_mask] = _dense_mask(attention_mask, position_ids, *sizes, query.device)
        attention_mask = masks[key_of_mask]
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_ids=position_ids, is_causal=True, **kwargs
    )
    return output, None


def _dense_mask(
    padding: Tensor | None, position_ids: Tensor | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Return (B, 1, T, S) bool, or None if SDPA's causal flag suffices."""
    sizes = {"batch_size": batch, "q_length": queries, "kv_length": keys, "device": device}
    mask: Tensor | None = None
    if padding is not None:
        # The queries are the last of the filled columns.
        mask = sdpa_mask(q_offset=padding.shape[1] - queries, attention_mask=padding.to(device), **sizes)
    elif position_ids is not None and queries == keys:
        position_ids = position_ids.to(device).expand(batch, -1)
        packed = find_packed_sequence_indices(position_ids)
        if packed is not None:
            sees = packed_sequence_compatibility_function(causal_mask_function, position_ids, packed)
            mask = sdpa_mask(mask_function=sees, allow_is_causal_skip=False, **sizes)
    return mask
