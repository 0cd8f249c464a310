"""Generation with a cache that holds index keys is the uncached forward pass, token by token.

The oracle is that pass over the finished sequence, without a cache: its logits at every new token, and their best token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, StaticIndexedLayer

from sparsort.errors import SparsortError

Make = Callable[..., Any]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPT, NEW = 18, 9


def _uncached(model: Any, sequences: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of every token but the last."""
    with torch.no_grad():
        logits: Tensor = model(sequences, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1]


def _greedy(model: Any, prompt: Tensor, **kwargs: Any) -> Any:
    wishes = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(prompt, **{**wishes, **kwargs})


def _check(model: Any, found: Any, mask: Tensor | None = None) -> None:
    """That `found` is greedy over the uncached pass."""
    sequences = found.sequences
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, NEW), value=1)
    expected = _uncached(model, sequences, mask)[:, PROMPT - 1 :]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, **CLOSE)
    assert sequences[:, PROMPT:].tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("cache", ["none", "dynamic", "given", "static", "given static"])
def test_greedy(cache: str, family: str, sparse: Make, tokens: Make) -> None:
    model, prompt = sparse(family), tokens(2, PROMPT)
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "none": lambda: {"use_cache": False},
        "dynamic": lambda: {},
        "given": lambda: {"past_key_values": DynamicCache()},
        "static": lambda: {"cache_implementation": "static"},
        "given static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=PROMPT + NEW + 5)},
    }
    _check(model, _greedy(model, prompt, **kinds[cache]()))


@pytest.mark.parametrize("selector", ["moba", "seer", "nsa", "lm_trained", "window", "random"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_selector(selector: str, cache: str, sparse: Make, tokens: Make) -> None:
    model = sparse("qwen3", selector=selector)
    _check(model, _greedy(model, tokens(2, PROMPT), cache_implementation=cache))


@pytest.mark.parametrize("changes", [{"top_p": 0.5, "blocks": 4}, {"threshold": 0.2, "blocks": 4}, {"layers": [1]}])
def test_other_budgets_and_dense_layers(changes: dict[str, Any], sparse: Make, tokens: Make) -> None:
    model = sparse("llama", **changes)
    for cache in ("dynamic", "static"):
        _check(model, _greedy(model, tokens(2, PROMPT), cache_implementation=cache))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batches(cache: str, family: str, sparse: Make, tokens: Make) -> None:
    """Each row as if it were alone, and as the uncached pass has it."""
    model, prompt = sparse(family), tokens(3, PROMPT)
    mask = torch.ones_like(prompt)
    for row, padding in enumerate((0, 7, PROMPT - 1)):
        prompt[row, :padding], mask[row, :padding] = 0, 0
    found = _greedy(model, prompt, attention_mask=mask, cache_implementation=cache)
    _check(model, found, mask)
    alone = _greedy(model, prompt[1:2, 7:])
    assert found.sequences[1, PROMPT:].tolist() == alone.sequences[0, PROMPT - 7 :].tolist()


@pytest.mark.parametrize("static", [False, True])
def test_prefill_in_chunks(static: bool, sparse: Make, tokens: Make) -> None:
    model, ids = sparse("qwen3"), tokens(2, 25)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    found = []
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, 15), (15, 24)):
            found.append(model(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), _uncached(model, ids), **CLOSE)
    kind = StaticIndexedLayer if static else DynamicIndexedLayer
    assert [type(layer) for layer in cache.layers] == [kind] * 3
    assert cache.layers[0].indexer_keys.shape == (2, 40 if static else 24, 8)


def test_a_mask_as_wide_as_a_static_cache(sparse: Make, tokens: Make) -> None:
    """The mask may have columns for tokens that do not exist yet, with any values in them."""
    model, ids = sparse("qwen3"), tokens(2, 14)
    for future in (0, 1):
        cache, mask = StaticCache(config=model.config, max_cache_len=20), torch.full((2, 20), future)
        mask[:, :14], mask[1, :3] = 1, 0
        with torch.no_grad():
            found = [model(ids[:, :12], attention_mask=mask, past_key_values=cache).logits]
            found.append(model(ids[:, 12:13], attention_mask=mask, past_key_values=cache).logits)
        expected = _uncached(model, ids, mask[:, :14])
        torch.testing.assert_close(torch.cat(found, dim=1)[0], expected[0], **CLOSE)
        torch.testing.assert_close(torch.cat(found, dim=1)[1, 3:], expected[1, 3:], **CLOSE)


def test_a_static_cache_used_again(sparse: Make, tokens: Make) -> None:
    model = sparse()
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    for seed in (0, 1):
        _check(model, _greedy(model, tokens(2, PROMPT, seed=seed), past_key_values=cache))
        cache.reset()


def test_a_conversation_is_continued_from_its_cache(sparse: Make, tokens: Make) -> None:
    model, cache = sparse(), DynamicCache()
    first = _greedy(model, tokens(1, 7), past_key_values=cache).sequences
    prompt = torch.cat([first, tokens(1, PROMPT - first.shape[1], seed=5)], dim=1)
    _check(model, _greedy(model, prompt, past_key_values=cache))


def test_beam_search(sparse: Make, tokens: Make) -> None:
    """Reordered index keys: beams with a cache are those without."""
    model, prompt = sparse("qwen3"), tokens(2, PROMPT)
    wishes = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True}
    plain = _greedy(model, prompt, use_cache=False, **wishes)
    for cache in ("dynamic", "static"):
        cached = _greedy(model, prompt, cache_implementation=cache, **wishes)
        assert cached.sequences.tolist() == plain.sequences.tolist()
        torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, **CLOSE)
    assert plain.beam_indices.unique().numel() > 3


def test_assisted_generation(sparse: Make, dense: Make, tokens: Make) -> None:
    """Cropped index keys: what a dense assistant guesses wrongly leaves no trace."""
    model, prompt = sparse("llama"), tokens(1, PROMPT)
    cropped: list[int] = []
    kept = DynamicIndexedLayer.crop

    def crop(self: Any, count: int) -> None:
        cropped.append(count)
        kept(self, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicIndexedLayer, "crop", crop)
        found = _greedy(model, prompt, assistant_model=dense("llama"))
    assert any(cropped)
    _check(model, found)


def test_selected_and_repeated_rows(sparse: Make, tokens: Make) -> None:
    model, ids = sparse(), tokens(3, 20)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        found = model(ids[rows, 12:19], past_key_values=cache).logits
    torch.testing.assert_close(found, _uncached(model, ids[rows])[:, 12:], **CLOSE)


# What is refused


def test_a_cache_filled_without_index_keys(sparse: Make, dense: Make, tokens: Make) -> None:
    from sparsort.attention.attach import attach_index_branch

    model, ids = dense(), tokens(1, 9)
    cache, static = DynamicCache(), StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        model(ids[:, :5], past_key_values=static)
    attach_index_branch(model, block_size=4)
    for filled in (cache, static):
        with pytest.raises(SparsortError, match="layer 0 of the cache holds 5 tokens without index keys"):
            model(ids[:, 5:], past_key_values=filled)


@pytest.mark.parametrize("static", [True, False])
def test_a_cache_with_index_keys_of_another_make(static: bool, sparse: Make, dense: Make, tokens: Make) -> None:
    from sparsort.attention.attach import attach_index_branch, detach

    def filled(model: Any) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache()
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
        return cache

    ids = tokens(1, 9)
    for changes, maker in [({"index_dim": 16}, "IndexBranch of width 16"), ({"selector": "lm_trained"}, "LMTrained")]:
        with pytest.raises(SparsortError, match=f"layer 0 of the cache holds index keys of {maker}"):
            sparse()(ids[:, 5:], past_key_values=filled(sparse(**changes)))
    model = sparse()
    cache = filled(model)
    detach(model)
    with torch.no_grad():
        model(ids[:, 5:7], past_key_values=cache)
    attach_index_branch(model, block_size=4, index_dim=8)
    with pytest.raises(SparsortError, match="layer 0 of the cache holds 7 tokens but 5 index keys"):
        model(ids[:, 7:], past_key_values=cache)


def test_caches_that_cannot_hold_index_keys(sparse: Make, tokens: Make) -> None:
    class Other(DynamicLayer):
        pass

    model, ids = sparse(), tokens(1, 9)
    cache = DynamicCache(config=model.config)
    cache.layers[0] = Other()
    with pytest.raises(SparsortError, match="is a Other, which cannot hold index keys"):
        model(ids, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(SparsortError, match="offloaded cache"):
        model(ids, past_key_values=cache)
