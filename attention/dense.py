"""The layers that stay dense: what transformers' own SDPA attention computes.

Contract: the numbers are those of the model with `attn_implementation="sdpa"`. Sliding-window layers are handed their mask as
(B, 1, T, S). Full layers share what sparse layers are handed, None or the padding (B, columns filled), and the dense mask is
made of it here, once in a forward pass, where SDPA cannot do without.

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
    made: dict[Any, Tensor | None],
    *,
    position_ids: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA over all that a query sees.

    Args:
        module: the attention module.
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        attention_mask: None, the padding (B, columns filled), or a finished mask (B, 1, T, S).
        made: the dense masks of this forward pass so far.
        position_ids: (B or 1, T); of packed sequences, where there is no padding.
        kwargs: what transformers' `sdpa_attention_forward` takes besides.
    """
    if attention_mask is None or attention_mask.ndim == 2:
        sizes = (query.shape[0], query.shape[2], key.shape[2])
        place = (*sizes, query.device)
        if place not in made:
            made[place] = _dense_mask(attention_mask, position_ids, *sizes, query.device)
        attention_mask = made[place]
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_ids=position_ids, is_causal=True, **kwargs
    )
    return output, None


def _dense_mask(
    padding: Tensor | None, position_ids: Tensor | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    sizes = {"batch_size": batch, "q_length": queries, "kv_length": keys, "device": device}
    mask: Tensor | None = None
    if padding is not None:
        mask = sdpa_mask(q_offset=padding.shape[1] - queries, attention_mask=padding.to(device), **sizes)
    elif position_ids is not None and queries == keys:
        position_ids = position_ids.to(device).expand(batch, -1)
        packed = find_packed_sequence_indices(position_ids)
        if packed is not None:
            sees = packed_sequence_compatibility_function(causal_mask_function, position_ids, packed)
            mask = sdpa_mask(mask_function=sees, allow_is_causal_skip=False, **sizes)
    return mask
