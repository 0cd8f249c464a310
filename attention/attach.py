"""An index branch for a model of transformers, and its removal.

Contract: in place and without patching the library. The model keeps its class; what is added are a selector at each sparse
layer's `self_attn.index_branch`, hooks on the decoder and on those modules, the loss function, the attention implementation
"sparsort", `config.sparse_attention` (what `load_sparse` reads), and the state at `model.sparse_attention`. `detach` takes it
all away again. Either the whole is attached or nothing is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn
from transformers import PreTrainedModel

from sparsort.attention.attention_function import register
from sparsort.attention.config import SparseAttentionConfig, SparseAttentionOptions
from sparsort.attention.selectors.base import Selector
from sparsort.attention.selectors.build import make_selector
from sparsort.attention.state import NAME, SparseAttention
from sparsort.errors import SparsortError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")


def attach_index_branch(
    model: PreTrainedModel,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    **changes: Unpack[SparseAttentionOptions],
) -> PreTrainedModel:
    """Make layers of a causal language model sparse, in place. Their selectors start with fresh weights.

    The same call serves a model made from its configuration, to train from scratch, and a dense checkpoint, to go on from it;
    `load_sparse` reads a checkpoint that has an index branch already. In training `outputs.loss` is LM + λ·Σ_layers KL, in
    evaluation LM. `model.sparse_attention` holds the mode (warm-up or sparse), the budget, and the last losses. Layers with a
    sliding window stay as they are.

    Args:
        model: Llama, Qwen2, Qwen3, Mistral or Gemma 3 (text) for causal language modelling, or of a class derived from one. Its
            configuration becomes a copy: other models made with the same object stay as they are.
        config: what is attached, or a table of its fields; the defaults of `SparseAttentionConfig` unless given.
        changes: fields of the configuration, over those of `config`.

    Returns:
        The same model.

    Raises:
        SparsortError: a model of another kind, one that has an index branch, a layer that cannot become sparse, or an unknown
            or invalid setting.
    """
    if not isinstance(config, SparseAttentionConfig):
        config = SparseAttentionConfig.from_json({} if config is None else config)
    # A configuration without changes was checked when it was made; one of a checkpoint may hold settings that are not read.
    if changes:
        config = SparseAttentionConfig.from_json({**config.to_json(), **changes})
    layers = _sparse_layers(model, config)
    selectors = [make_selector(module=layer, config=config) for layer in layers]
    register()
    _take_own_config(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    for layer, selector in zip(layers, selectors, strict=True):
        layer.index_branch = selector.train(layer.training)
    model.config.sparse_attention = config.to_json()
    state = SparseAttention(config, attn_implementation=before)
    state.install(model, model.base_model, layers)
    # Any: modules take attributes.
    found: Any = model
    found.sparse_attention = state
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the index branch away again, in place: the dense model as it was, with the weights that it has now.

    Raises:
        SparsortError: the model has none.
    """
    state = getattr(model, "sparse_attention", None)
    if not isinstance(state, SparseAttention):
        raise SparsortError(f"{type(model).__name__} has no index branch to detach.")
    state.remove(model)
    for module in list(model.modules()):
        if isinstance(getattr(module, "index_branch", None), Selector):
            del module.index_branch
    model.set_attn_implementation(state.attn_implementation)
    del model.config.sparse_attention
    del model.sparse_attention
    return model


def _take_own_config(model: Any) -> None:
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _sparse_layers(model: Any, config: SparseAttentionConfig) -> list[Any]:
    """The attention modules that become sparse."""
    if isinstance(getattr(model, "sparse_attention", None), SparseAttention):
        raise SparsortError(
            f"this {type(model).__name__} has an index branch already. To attach another, call "
            "detach(model) of sparsort.attention.attach first."
        )
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in FAMILIES and isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        raise SparsortError(
            f"{type(model).__name__} wraps a model of type {family!r}. Attach the index branch to that model, before it is "
            "wrapped."
        )
    # What the hooks take hold of; a decoder alone has no head, and a classifier another one.
    causal = isinstance(model, PreTrainedModel) and model.base_model is not model and hasattr(model, "lm_head")
    if family not in FAMILIES or not causal:
        raise SparsortError(
            f"{type(model).__name__} (model type {family!r}) cannot be given an index branch. Expected a causal language "
            f"model, as AutoModelForCausalLM makes it, of one of the types {', '.join(FAMILIES)}."
        )
    if getattr(model.config, "use_bidirectional_attention", False) or not getattr(model.config, "is_causal", True):
        raise SparsortError(f"this {type(model).__name__} attends in both directions; sparse attention is causal.")
    modules = [layer.self_attn for layer in model.base_model.layers]
    sliding = [_slides(model.config, number) for number in range(len(modules))]
    numbers = config.layers
    if numbers is None:
        numbers = tuple(number for number, slides in enumerate(sliding) if not slides)
        if not numbers:
            raise SparsortError(
                f"every layer of this {type(model).__name__} has a sliding window, so none can become sparse. Where the "
                "window is not wanted, set sliding_window to None in its configuration before the model is made."
            )
    for number in numbers:
        if number >= len(modules):
            raise SparsortError(f"layers names layer {number}, and this model has {len(modules)}, numbered from 0.")
        if sliding[number]:
            raise SparsortError(
                f"layer {number} has a sliding window and cannot become sparse. Leave it out of layers."
            )
        _check_module(modules[number], number)
    return [modules[number] for number in numbers]


def _slides(config: Any, layer: int) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return bool(types[layer] != "full_attention")
    return getattr(config, "sliding_window", None) is not None


def _check_module(module: Any, number: int) -> None:
    """Refuse what the attention function could not see later."""
    wanted = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "num_key_value_groups", "layer_idx")
    missing = [name for name in wanted if not hasattr(module, name)]
    if missing:
        raise SparsortError(
            f"the attention of layer {number}, a {type(module).__name__}, has no {', '.join(missing)}; expected attention with "
            "grouped heads as Llama has it."
        )
    if getattr(module, "attn_logit_softcapping", None) is not None:
        raise SparsortError(f"layer {number} softcaps its attention logits, which sparse attention does not do.")
    if getattr(module, "sinks", None) is not None:
        raise SparsortError(f"layer {number} has attention sinks, which sparse attention does not have.")
