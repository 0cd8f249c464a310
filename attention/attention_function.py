"""The attention function and the mask function that are registered with transformers as "sparsort".

Contract: the mask function hands the padding on as (B, columns filled), or None where every row is one sequence of queries
behind all keys; (B, 1, T, S) is made for sliding-window layers only. The attention function sends a module with an index
branch through choose → attend → mix → loss, and any other to SDPA. What it cannot honour it refuses: masks of another
pattern, dropout, softcapping, sinks.

Legend: B batch, T query columns, S key columns, H query heads, G groups (key/value heads), D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from sparsort.attention.dense import attend_dense
from sparsort.attention.selectors.base import LayerInputs, Selector
from sparsort.attention.state import NAME, Given, Pass
from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.ops import attend
from sparsort.kernels.eager import in_eager


def register() -> None:
    """Make `attn_implementation="sparsort"` known to transformers; once or many times."""
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
    """What full layers need of the mask; for sliding layers, the mask.

    Returns:
        None; or (B, q_offset + T) bool, the columns filled so far, False where they are padding; or (B, 1, T, S).

    Raises:
        SparsortError: a pattern other than causal, or a padding mask that does not cover the cache.
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
            "sparse attention is causal, and the model asks for another mask (bidirectional, or one with a function of its own)."
        )
    filled = int(q_offset) + q_length
    if attention_mask is None:
        behind_all = filled == kv_length and (q_length in (1, filled))
        return None if behind_all else torch.ones(batch_size, filled, dtype=torch.bool, device=kwargs.get("device"))
    if attention_mask.shape[-1] < filled:
        raise SparsortError(
            f"the attention mask covers {attention_mask.shape[-1]} tokens; expected {filled}: those in the cache and the "
            f"{q_length} new ones."
        )
    # Columns after the filled ones are a static cache's future.
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
    sparsort_layer: Given | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of every layer of a model with an index branch.

    Args:
        module: the attention module.
        query: (B, H, T, D).
        key, value: (B, G, S, D), with what the cache holds.
        attention_mask: what `padding_or_mask` gave.
        scaling: of the logits; 1/√D where the model gives none.
        position_ids: (B or 1, T).
        sparsort_pass, sparsort_layer: from the hooks.
        kwargs: dropout, sliding_window, and whatever else the model sends.

    Returns:
        (B, T, H, D), and None where eager attention returns its weights.

    Raises:
        SparsortError: the model wants of its sparse layers what they do not have, or the hooks did not run.
    """
    branch: Any = getattr(module, "index_branch", None)
    if branch is None:
        made = {} if sparsort_pass is None else sparsort_pass.dense_masks
        return attend_dense(
            module, query, key, value, attention_mask, made, scaling=scaling, position_ids=position_ids, **kwargs
        )
    if sparsort_pass is None or sparsort_layer is None:
        raise SparsortError(
            "a layer with an index branch was called outside its model's decoder, so that nothing was prepared for it. Call the "
            "model that attach_index_branch was given, or its decoder."
        )
    _check_wishes(attention_mask, kwargs)
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


def _attend_sparse(module: Any, branch: Selector, inputs: LayerInputs, index_keys: Tensor | None, made: Pass) -> Tensor:
    """(B, H, T, D)."""
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
    for observe in made.observers:
        with torch.no_grad():
            observe(module.layer_idx, inputs, choice)
    if not module.training:
        return output
    loss = branch.loss(inputs, index_keys, choice, lse)
    return output if loss is None else made.carrier.carry(output, loss, module.layer_idx)


def _check_wishes(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise SparsortError(
            f"the attention mask has shape {tuple(attention_mask.shape)}; a sparse layer takes padding only, as (batch, tokens). "
            "Separate packed sequences by position_ids instead, without a mask."
        )
    if kwargs.get("output_attentions"):
        raise SparsortError("a sparse layer has no attention weights to return. Leave output_attentions out.")
    if kwargs.get("dropout"):
        raise SparsortError(
            f"the model drops out {kwargs['dropout']} of its attention weights in training, which block-sparse attention "
            "does not do. Set attention_dropout to 0 in its configuration before the model is made."
        )
    wishes = {"softcap": "softcapping", "s_aux": "attention sinks", "sliding_window": "a sliding window"}
    for name, wish in wishes.items():
        if kwargs.get(name) is not None:
            raise SparsortError(f"a sparse layer is asked for {wish}, which it does not have. Leave this layer dense.")
