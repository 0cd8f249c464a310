"""Attach an index branch to a transformers model, detach it, and load a checkpoint that has one.

Contract: the model is changed in place, and the library is not patched. The model keeps its class and gains a selector at each
sparse layer's `self_attn.index_branch`, hooks on the decoder and on those modules, a loss function, the attention
implementation "sparsort", `config.sparse_attention` (which `load_sparse` reads), and the state at `model.sparse_attention`.
`detach` removes all of it. A call that raises has changed nothing.

`save_pretrained` of a model with an index branch writes an ordinary checkpoint of the model's family. transformers reads it as
the dense model, and `load_sparse` reads it with the index branch. transformers loads the weights in both cases, so shards,
dtypes, device maps and conversions work as usual.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsort.attention.attention_function import register
from sparsort.attention.config import SparseAttentionConfig, SparseAttentionOptions
from sparsort.attention.selectors import SELECTORS
from sparsort.attention.selectors.base import Selector
from sparsort.attention.selectors.weights import LayerShape
from sparsort.attention.state import NAME, SparseAttention
from sparsort.errors import SparsortError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
# The part of a weight's name by which the weights of index branches are recognised in a checkpoint.
_BRANCH = ".index_branch."


def attach_index_branch(
    model: PreTrainedModel,
    config: SparseAttentionConfig | Mapping[str, Any] | None = None,
    **changes: Unpack[SparseAttentionOptions],
) -> PreTrainedModel:
    """Make layers of a causal language model sparse, in place. Their selectors start with fresh weights.

    Use it both on a model built from its configuration, to train from scratch, and on a dense checkpoint, to continue training
    from it. To read a checkpoint that already has an index branch, use `load_sparse`. `outputs.loss` is LM + λ·Σ_layers KL in
    training and LM in evaluation. `model.sparse_attention` holds the mode (warm-up or sparse), the budget, and the last
    losses. Layers with a sliding window stay dense.

    Args:
        model: a Llama, Qwen2, Qwen3, Mistral or Gemma 3 (text) model for causal language modelling, or an instance of a class
            derived from one. It gets its own copy of its configuration, so other models that share the object do not change.
        config: the settings, or a mapping of their names to values; None: the defaults of `SparseAttentionConfig`.
        changes: settings that override those of `config`.

    Returns:
        The same model.

    Raises:
        SparsortError: the model is not of a supported kind or has an index branch already, a layer cannot become sparse, or a
            setting is unknown or invalid.
    """
    if not isinstance(config, SparseAttentionConfig):
        config = SparseAttentionConfig.from_json({} if config is None else config)
    # Rebuild the configuration only if something changes. It was checked on construction, and one from a checkpoint may hold
    # settings that its selector does not read, which a second check would refuse.
    if changes:
        config = SparseAttentionConfig.from_json({**config.to_json(), **changes})
    # Everything that can fail comes first, so that an error leaves the model unchanged.
    layers = _sparse_layers(model, config)
    selectors = [make_selector(module=layer, config=config) for layer in layers]
    register()
    _take_own_config(model)
    dense_implementation = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    # A selector joins in the mode of its layer, because `model.eval()` may have been called before it existed.
    for layer, selector in zip(layers, selectors, strict=True):
        layer.index_branch = selector.train(layer.training)
    model.config.sparse_attention = config.to_json()
    state = SparseAttention(config, attn_implementation=dense_implementation)
    state.install(model, model.base_model, layers)
    # `Any` because mypy does not know the attribute on the model.
    untyped: Any = model
    untyped.sparse_attention = state
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the index branch in place, which leaves the dense model with its current weights.

    Returns:
        The same model.

    Raises:
        SparsortError: the model has no index branch.
    """
    state = getattr(model, "sparse_attention", None)
    if not isinstance(state, SparseAttention):
        raise SparsortError(
            f"{type(model).__name__} has no index branch to detach; expected a model that attach_index_branch returned."
        )
    state.remove(model)
    # A list, because deleting a submodule changes what `modules()` iterates over.
    for module in list(model.modules()):
        if isinstance(getattr(module, "index_branch", None), Selector):
            del module.index_branch
    model.set_attn_implementation(state.attn_implementation)
    del model.config.sparse_attention
    del model.sparse_attention
    return model


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


def load_sparse(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model that `save_pretrained` wrote with its index branch.

    Args:
        folder: a folder, or another source that `from_pretrained` takes.
        kwargs: arguments of `AutoModelForCausalLM.from_pretrained` (dtype, device_map, …).

    Returns:
        The model with its index branch, as an instance of its family's own class.

    Raises:
        SparsortError: the checkpoint has no index branch, an incomplete one, or one that does not match its configuration.
    """
    for name in ("attn_implementation", "output_loading_info", "ignore_mismatched_sizes"):
        if name in kwargs:
            raise SparsortError(f"load_sparse does not take {name}, because it sets the value itself. Do not pass it.")
    model_config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder)
    settings = getattr(model_config, "sparse_attention", None)
    if settings is None:
        raise SparsortError(
            f"{folder} has no index branch: its configuration has no sparse_attention. Load it with AutoModelForCausalLM and "
            "pass the model to sparsort.attach_index_branch."
        )
    config = SparseAttentionConfig.from_json(settings, stored=True)
    # transformers has no public function that returns the class which AutoModelForCausalLM would instantiate.
    family: Any = AutoModelForCausalLM._model_mapping[type(model_config)]
    # Mismatched sizes are not an error for transformers here, so that the error below can name index_dim and the selector.
    model, report = _with_branch(family, config).from_pretrained(
        folder, config=model_config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_report(report, folder, config)
    # From here on the model is an ordinary member of its family, which pickles, saves and deep-copies as such.
    model.__class__ = family
    loaded: PreTrainedModel = model
    return loaded


def _with_branch(family: Any, config: SparseAttentionConfig) -> Any:
    """Return a subclass of the family's class whose models have an index branch before their weights are loaded."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, *args, **kwargs)
        attach_index_branch(self, config)

    # transformers inspects the class's name and the source of its module, so both must be those of the family.
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__init__": make}
    return type(family.__name__, (family,), names)


def _check_report(report: dict[str, Any], folder: str | Path, config: SparseAttentionConfig) -> None:
    """Refuse weights with the wrong shape, an incomplete index branch, and weights that would not be used."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise SparsortError(
            f"{name} in {folder} has shape {tuple(stored)}, but its configuration says {tuple(expected)} ({len(mismatched)} such "
            "weights). The shapes of an index branch depend on index_dim and the selector: set sparse_attention in "
            "config.json to the values that the model was saved with."
        )
    # Weights outside the index branch are left to transformers, which warns about them as for any other checkpoint.
    if unused := sorted(name for name in report["unexpected_keys"] if _BRANCH in name):
        raise SparsortError(
            f"{folder} has {len(unused)} weights of an index branch, such as {unused[0]}, that the requested configuration "
            f"has no place for: {_describe(folder, config)}. Request the settings it was saved with. To start a new index branch "
            "from the dense weights, load the model with AutoModelForCausalLM and call sparsort.attach_index_branch."
        )
    if missing := sorted(name for name in report["missing_keys"] if _BRANCH in name):
        raise SparsortError(
            f"{folder} lacks {len(missing)} weights of the index branch that its configuration describes, such as {missing[0]}. "
            "To start from the dense weights, load the model with AutoModelForCausalLM and call sparsort.attach_index_branch."
        )


def _describe(folder: str | Path, config: SparseAttentionConfig) -> str:
    """Return the settings that determine the weights, each with the saved value if that differs."""
    saved = getattr(AutoConfig.from_pretrained(folder), "sparse_attention", None)
    saved_config = SparseAttentionConfig.from_json(saved, stored=True) if saved else config
    parts = []
    for name in ("selector", "index_dim", "index_norm", "layers"):
        requested, stored = getattr(config, name), getattr(saved_config, name)
        parts.append(f"{name}={requested!r}" + (f" (saved with {stored!r})" if stored != requested else ""))
    return ", ".join(parts)


def _take_own_config(model: Any) -> None:
    """Give the model and its modules a copy of the configuration, which other models may share."""
    shared, own = model.config, copy.deepcopy(model.config)
    # Modules refer to the same configuration object, and some read it in every forward pass.
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _sparse_layers(model: Any, config: SparseAttentionConfig) -> list[Any]:
    """Return the attention modules that become sparse."""
    if isinstance(getattr(model, "sparse_attention", None), SparseAttention):
        raise SparsortError(
            f"this {type(model).__name__} has an index branch already. To attach another one, call "
            "sparsort.attention.attach.detach(model) first."
        )
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in FAMILIES and isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        raise SparsortError(
            f"{type(model).__name__} wraps a model of type {family!r}. Attach the index branch to the inner model before it "
            "is wrapped."
        )
    # The hooks need a decoder and an LM head: a bare decoder has no head, and a classifier has a different one.
    causal = isinstance(model, PreTrainedModel) and model.base_model is not model and hasattr(model, "lm_head")
    if family not in FAMILIES or not causal:
        raise SparsortError(
            f"{type(model).__name__} (model type {family!r}) cannot be given an index branch. Expected a causal language "
            f"model, as AutoModelForCausalLM loads it, of one of the types {', '.join(FAMILIES)}."
        )
    if getattr(model.config, "use_bidirectional_attention", False) or not getattr(model.config, "is_causal", True):
        raise SparsortError(
            f"this {type(model).__name__} attends in both directions, but sparse attention is causal. Use a causal model."
        )
    modules = [layer.self_attn for layer in model.base_model.layers]
    sliding = [_slides(model.config, number) for number in range(len(modules))]
    numbers = config.layers
    if numbers is None:
        numbers = tuple(number for number, slides in enumerate(sliding) if not slides)
        if not numbers:
            raise SparsortError(
                f"every layer of this {type(model).__name__} has a sliding window, so no layer can become sparse. If you do "
                "not need the window, set sliding_window to None in the configuration before the model is built."
            )
    for number in numbers:
        if number >= len(modules):
            raise SparsortError(
                f"layers names layer {number}, but this model has {len(modules)} layers; expected numbers from 0 to "
                f"{len(modules) - 1}."
            )
        if sliding[number]:
            raise SparsortError(f"layer {number} has a sliding window and cannot become sparse. Remove it from layers.")
        _check_module(modules[number], number)
    return [modules[number] for number in numbers]


def _slides(config: Any, layer: int) -> bool:
    """Whether a layer has a sliding window."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return bool(types[layer] != "full_attention")
    return getattr(config, "sliding_window", None) is not None


def _check_module(module: Any, number: int) -> None:
    """Refuse modules with features that the attention function could not detect later."""
    required = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "num_key_value_groups", "layer_idx")
    missing = [name for name in required if not hasattr(module, name)]
    if missing:
        raise SparsortError(
            f"the attention of layer {number}, a {type(module).__name__}, has no {', '.join(missing)}; expected grouped-query "
            "attention like Llama's. Remove the layer from layers."
        )
    if getattr(module, "attn_logit_softcapping", None) is not None:
        raise SparsortError(
            f"layer {number} softcaps its attention logits, which sparse attention does not support. Remove it from layers."
        )
    if getattr(module, "sinks", None) is not None:
        raise SparsortError(
            f"layer {number} has attention sinks, which sparse attention does not support. Remove it from layers."
        )
