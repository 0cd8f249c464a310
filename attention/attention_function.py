"""The attention function and the mask function that are registered with transformers as "sparsort".

Contract: the mask function passes the padding on as (B, filled columns), or returns None if every row is one sequence whose
queries are its last keys. It builds a (B, 1, T, S) mask for sliding-window layers only. The attention function runs
choose → attend → mix → loss for a module with an index branch. It raises an error for everything that it cannot honour: masks
with another pattern, dropout, softcapping, and sinks. Any other module gets transformers' own SDPA attention, with the results
of `attn_implementation="sdpa"`. If SDPA needs a dense mask, the mask is built once per forward pass.

Legend: B batch, T query columns, S key columns, H query heads, G groups (key/value heads), D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    sdpa_mask,
)

from sparsort.attention.selectors.base import LayerInputs, Selector
from sparsort.attention.state import NAME, ModuleInputs, Pass
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.ops import attend
from sparsort.kernels.eager import in_eager


def register() -> None:
    """Register `attn_implementation="sparsort"` with transformers. Repeated calls have no further effect."""
    AttentionInterface.register(NAME, attend_layer)
    AttentionMaskInterface.register(NAME, padding_or_mask)


def padding_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the padding for layers with full attention, and the complete mask for sliding-window layers.

    The arguments are those of transformers' mask interface; `local_size` is given for sliding-window layers only.

    Returns:
        For full attention, None or (B, q_offset + T) bool over the columns filled so far, False at padding; for sliding-window
        layers, (B, 1, T, S).

    Raises:
        SparsortError: the pattern is not causal, or the padding mask does not cover the cache.
    """
    if local_size is not None:
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        mask: Tensor | None = sdpa_mask(
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            **sizes,
            **kwargs,
        )
        return mask
    if use_vmap or allow_is_bidirectional_skip is not None:
        raise SparsortError(
            "sparse attention is causal, but the model requests another mask (a bidirectional one, or one with its own mask "
            "function). Use a causal model without a custom mask function."
        )
    filled = int(q_offset) + q_length
    if attention_mask is None:
        # None suffices if the queries are all of the keys, or only the last one. SDPA's causal flag would misalign any other
        # number of queries, and a static cache has unfilled columns, so these cases need a mask.
        is_plain = filled == kv_length and (q_length in (1, filled))
        return None if is_plain else torch.ones(batch_size, filled, dtype=torch.bool, device=kwargs.get("device"))
    if attention_mask.shape[-1] < filled:
        raise SparsortError(
            f"the attention mask covers {attention_mask.shape[-1]} tokens; expected {filled}: those in the cache and the "
            f"{q_length} new ones. Extend the mask to the cached tokens."
        )
    # The columns after the filled ones are slots of a static cache that no token has reached yet.
    return attention_mask[:, :filled]


@in_eager
def attend_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    sparsort_pass: Pass | None = None,
    sparsort_layer: ModuleInputs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of any layer, sparse or dense, of a model with an index branch.

    Args:
        module: the attention module.
        query: (B, H, T, D).
        key, value: (B, G, S, D), including the cached tokens.
        attention_mask: the result of `padding_or_mask`.
        scaling: factor for the logits; None: 1/√D.
        position_ids: (B or 1, T).
        sparsort_pass, sparsort_layer: arguments that the hooks of `state.py` add.
        kwargs: dropout, sliding_window, and other arguments of the model.

    Returns:
        The output (B, T, H, D), and None in the place of the attention weights.

    Raises:
        SparsortError: the model requests a feature that sparse layers do not have, or the hooks did not run.
    """
    branch: Any = getattr(module, "index_branch", None)
    if branch is None:
        masks = {} if sparsort_pass is None else sparsort_pass.dense_masks
        return attend_dense(
            module, query, key, value, attention_mask, masks, scaling=scaling, position_ids=position_ids, **kwargs
        )
    if sparsort_pass is None or sparsort_layer is None:
        raise SparsortError(
            "a layer with an index branch was called outside its model's decoder, whose hook prepares the layer's inputs. Call "
            "the model that was passed to attach_index_branch, or its decoder."
        )
    _check_features(attention_mask, kwargs)
    batch, _, queries, width = query.shape
    layout = sparsort_pass.layout(attention_mask, position_ids, batch, queries, key.shape[2])
    inputs = LayerInputs(
        module=module,
        hidden=sparsort_layer.hidden,
        rotary=sparsort_layer.rotary,
        query=query,
        key=key,
        value=value,
        layout=layout,
        scale=width**-0.5 if scaling is None else scaling,
        full=sparsort_pass.full,
        budget=sparsort_pass.budget,
    )
    output = _attend_sparse(module, branch, inputs, sparsort_layer.index_keys, sparsort_pass)
    return output.transpose(1, 2).contiguous(), None


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
        module, query, key, value: as in `attend_layer`.
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
        # Positions separate packed sequences only without a cache: a cache keeps a row as one sequence.
        position_ids = position_ids.to(device).expand(batch, -1)
        packed = find_packed_sequence_indices(position_ids)
        if packed is not None:
            sees = packed_sequence_compatibility_function(causal_mask_function, position_ids, packed)
            mask = sdpa_mask(mask_function=sees, allow_is_causal_skip=False, **sizes)
    return mask


def _attend_sparse(
    module: Any, branch: Selector, inputs: LayerInputs, index_keys: Tensor | None, forward_pass: Pass
) -> Tensor:
    """Return the output (B, H, T, D) of a sparse layer, which in training carries the selector's loss."""
    choice = branch.choose(inputs, index_keys)
    output, lse = attend(
        inputs.query,
        inputs.key,
        inputs.value,
        choice.selection,
        inputs.layout,
        scale=inputs.scale,
        bias=choice.bias,
    )
    output = branch.mix(inputs, index_keys, choice, output)
    for observe in forward_pass.observers:
        with torch.no_grad():
            observe(module.layer_idx, inputs, choice)
    # Evaluation needs no loss of the selector. `module.training` is checked instead of gradients, because the first forward pass
    # under reentrant checkpointing runs without them.
    if not module.training:
        return output
    loss = branch.loss(inputs, index_keys, choice, lse)
    return output if loss is None else forward_pass.losses.attach_to(output, loss, module.layer_idx)


def _check_features(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse masks and features that block-sparse attention does not support."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise SparsortError(
            f"the attention mask has shape {tuple(attention_mask.shape)}; a sparse layer takes padding only, as (batch, tokens). "
            "To separate packed sequences, pass position_ids and no mask."
        )
    if kwargs.get("output_attentions"):
        raise SparsortError("a sparse layer has no attention weights to return. Do not pass output_attentions.")
    if kwargs.get("dropout"):
        raise SparsortError(
            f"the model drops out {kwargs['dropout']} of its attention weights in training, which block-sparse attention "
            "does not support. Set attention_dropout to 0 in the configuration before the model is built."
        )
    features = {"softcap": "softcapping", "s_aux": "attention sinks", "sliding_window": "a sliding window"}
    for name, feature in features.items():
        if kwargs.get(name) is not None:
            raise SparsortError(
                f"the model requests {feature} ({name}) in a sparse layer, which does not support it. Keep this layer dense: "
                "do not name it in layers."
            )
