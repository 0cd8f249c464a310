"""One decoding step against a long cache: the attention alone, and a small Llama with transformers' caches.

The caches are filled with random keys and values, because prefilling 64K tokens is not measured here. A dynamic cache appends by
copying all its content, in dense and sparse models alike; a static cache writes in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sparse_attention_report import SparseReport
from sparse_attention_setting import Inputs, Setting, choose, make_inputs
from sparse_attention_timing import Clock, in_turns, phases_in_words, ratio, total
from torch import Tensor

from sparsort.kernels.blocksparse.ops import attend

_LAYERS, _VOCABULARY = 2, 256


def add_decoding(
    report: SparseReport,
    setting: Setting,
    tokens: int,
    rounds: int,
    floor: float | None,
    *,
    batch: int = 1,
    make_clock: Callable[[], Clock] = Clock,
    suffix: str = "",
    **place: Any,
) -> None:
    """Add index scores over all cached index keys, top-k and attention, against SDPA of one query in its faster form."""
    inputs = make_inputs(setting, tokens, queries=1, batch=batch, **place)
    forms: dict[str, Callable[[Clock], object]] = {
        "shared": partial(_dense, inputs, rows=False),
        "rows": partial(_dense, inputs, rows=True),
    }
    with torch.no_grad():
        steps = {**forms, "sparse": partial(_sparse, inputs, setting)}
        kept = in_turns(steps, rounds, warm=2, make_clock=make_clock)
    # The faster form of the baseline, by its best time.
    best = min(forms, key=lambda form: min(total(phases).wall for phases in kept[form]))
    found = ratio(kept[best], kept["sparse"])
    note = f"{found}; {setting.words}; {phases_in_words(kept['sparse'])}; dense: {best}"
    report.add(f"decode_{tokens}_{setting}{suffix}", found.median, "x", floor=floor, note=note)


def _dense(inputs: Inputs, clock: Clock, *, rows: bool) -> Tensor:
    query = inputs.query
    if rows:
        # The heads of a group are the rows of one product, so that each key is read once.
        batch, heads, _, width = query.shape
        query = query.reshape(batch, inputs.key.shape[1], -1, width)
        with clock("forward"):
            return F.scaled_dot_product_attention(query, inputs.key, inputs.value).view(batch, heads, 1, width)
    with clock("forward"):
        return F.scaled_dot_product_attention(query, inputs.key, inputs.value, enable_gqa=True)


def _sparse(inputs: Inputs, setting: Setting, clock: Clock) -> Tensor:
    with clock("choose"):
        selection = choose(inputs, setting)
    with clock("attend"):
        return attend(inputs.query, inputs.key, inputs.value, selection, inputs.layout)[0]


def add_model_decoding(report: SparseReport, setting: Setting, tokens: int, rounds: int) -> None:
    """Add a decoding step of a whole model, from embedding to logits, with either cache, and the part of appending in it."""
    models = {"dense": _model(setting), "sparse": _attach(_model(setting), setting)}
    for kind in ("static", "dynamic"):
        # The static cache needs room for every step of the run.
        caches = {name: _filled(model, setting, tokens, 4 * rounds + 8, kind) for name, model in models.items()}
        steps: dict[str, Callable[[Clock], object]] = {
            name: partial(_model_step, model, caches[name], tokens) for name, model in models.items()
        }
        for name, cache in caches.items():
            steps[f"appending_{name}"] = partial(_append, cache, setting)
        with torch.no_grad():
            kept = in_turns(steps, rounds, warm=1)
        found = ratio(kept["dense"], kept["sparse"])
        appending = ", ".join(f"{name} {phases_in_words(kept[f'appending_{name}'])}" for name in models)
        note = f"{found}; {_LAYERS} layers, {setting.words}; of which the cache: {appending}"
        report.add(f"decode_{tokens}_llama_{kind}_cache", found.median, "x", note=note)


def _model(setting: Setting) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=_LAYERS,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.groups,
        head_dim=setting.head_dim,
        # Rotary embeddings have no table, so the largest position costs nothing.
        max_position_embeddings=1 << 18,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _attach(model: Any, setting: Setting) -> Any:
    import sparsort

    changes = {"block_size": setting.block_size, "blocks": setting.blocks, "index_dim": setting.index_dim}
    return sparsort.attach_index_branch(model, **changes)


def _filled(model: Any, setting: Setting, tokens: int, room: int, kind: str) -> Any:
    """A cache of `tokens` random keys and values, and of index keys if the model has an index branch."""
    from transformers import DynamicCache, StaticCache

    from sparsort.attention.cache import keep_index_keys

    sparse = hasattr(model, "sparse_attention")
    length = tokens + room
    cache: Any = (
        StaticCache(model.config, max_cache_len=length) if kind == "static" else DynamicCache(config=model.config)
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(_LAYERS):
        if sparse:
            index_keys = torch.randn(1, tokens, setting.index_dim, generator=generator)
            # Random index keys are enough: decoding takes the same time whatever is selected.
            keep_index_keys(cache, number, index_keys, selector="IndexBranch")
        shape = (1, setting.groups, tokens, setting.head_dim)
        cache.layers[number].update(*(torch.randn(shape, generator=generator) for _ in range(2)))
    return cache


def _model_step(model: Any, cache: Any, tokens: int, clock: Clock) -> Tensor:
    token = torch.tensor([[tokens % _VOCABULARY]])
    with clock("step"):
        logits: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    return logits


def _append(cache: Any, setting: Setting, clock: Clock) -> None:
    """Append one token in every layer."""
    states = torch.zeros(1, setting.groups, 1, setting.head_dim)
    # Zeros, because only the time of the copy is measured.
    index_keys = torch.zeros(1, 1, setting.index_dim)
    with clock("appends in"):
        for layer in cache.layers:
            if hasattr(layer, "update_indexer"):
                layer.update_indexer(index_keys)
            layer.update(states, states)
