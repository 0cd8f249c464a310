"""The KV cache of a model: gathered for rows that share a head, and probed to find out whether it can continue a text.

Contract: a probe of a few tokens continues a text through the cache, and compares the states with those of the whole text. Some
models cut their cache to a window although they read whole texts without one. This would show only in texts longer than the
window, so the probe shortens sliding windows, in a copy of the modules that shares the weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The sliding window of a probe, in tokens. The first half of the probe is longer.
_WINDOW = 3
# Tokens that a probe continues one by one.
_STEPS = 2
# The errors of a model whose attention or cache cannot be continued or replaced. RuntimeError includes NotImplementedError.
CANNOT = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """The ways in which the cache of a model can be used.

    Attributes:
        gathers: rows can continue a shared head, several tokens at a time, with the same states as in the whole text.
        steps: a text can be continued token by token, with the same states; this may be True for any class of cache.
    """

    gathers: bool
    steps: bool


class Heads:
    """The keys and values of the shared heads.

    Args:
        caches: the cache after each batch of heads.
        batches: the numbers of the heads in each batch.
    """

    def __init__(self, caches: list[Any], batches: list[NDArray[np.int64]]) -> None:
        self._cache = _copy(caches[0])
        for number, layer in enumerate(self._cache.layers):
            parts = [cache.layers[number] for cache in caches]
            if getattr(layer, "keys", None) is not None:
                layer.keys = torch.cat([part.keys for part in parts])
                layer.values = torch.cat([part.values for part in parts])
        # Head number → its row in the concatenated tensors.
        self._place = np.argsort(np.concatenate(batches))

    def gather(self, heads: NDArray[np.int64], device: torch.device) -> Any:
        """A new cache whose row b has the keys and values of head `heads[b]`."""
        cache = _copy(self._cache)
        cache.batch_select_indices(torch.from_numpy(self._place[heads]).to(device))
        return cache


def rounding(states: Tensor) -> float:
    """The tolerance for states that are computed in two ways. A change of context has a much larger effect."""
    return 16 * torch.finfo(states.dtype).eps * float(states.abs().amax())


@torch.inference_mode()
def probe_cache(decoder: Any, config: Any, ids_BT: Tensor) -> CacheUse:
    """Find out how a cache can be used, by continuing the second half of a row after the first.

    Args:
        decoder: the stack of blocks; it is not changed.
        config: its configuration.
        ids_BT: one row of a few token ids.
    """
    decoder = _with_short_windows(decoder, config)
    whole_BTH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    head, tail = ids_BT.tensor_split(2, dim=1)

    def agrees(continue_: Callable[[Any], Tensor]) -> bool:
        try:
            ours = continue_(cache)
        except CANNOT:
            return False
        theirs = whole_BTH[:, head.shape[1] :][:, : ours.shape[1]]
        return torch.allclose(ours, theirs.expand_as(ours), rtol=0.0, atol=rounding(whole_BTH))

    def side_by_side(cache: Any) -> Tensor:
        rows = Heads([cache], [np.arange(1)]).gather(np.zeros(2, dtype=np.int64), head.device)
        states: Tensor = decoder(input_ids=tail.repeat(2, 1), past_key_values=rows, use_cache=True).last_hidden_state
        return states

    def one_by_one(cache: Any) -> Tensor:
        steps = [
            decoder(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
            for token in torch.split(tail[:, :_STEPS], 1, dim=1)
        ]
        return torch.cat(steps, dim=1)

    try:
        cache = getattr(decoder(input_ids=head, use_cache=True), "past_key_values", None)
    except CANNOT:
        return CacheUse(gathers=False, steps=False)
    # `one_by_one` changes the cache, so it must come last. `side_by_side` works on a copy.
    gathers = _can_be_gathered(cache) and agrees(side_by_side)
    return CacheUse(gathers=gathers, steps=cache is None or agrees(one_by_one))


def _can_be_gathered(cache: Any) -> bool:
    # `Heads` replaces the tensors of the layers. A subclass may keep other state, so the classes must match exactly.
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)


def _with_short_windows(decoder: Any, config: Any) -> Any:
    """A copy of the decoder with sliding windows of `_WINDOW` tokens, which shares the weights.

    The decoder itself is returned if it has no windows, or if its modules cannot be copied.
    """
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= _WINDOW:
        return decoder
    # `deepcopy` takes objects in its memo for copied already, so the weights are shared.
    weights = itertools.chain(decoder.parameters(), decoder.buffers())
    shared: dict[int, Any] = {id(weight): weight for weight in weights}
    try:
        copied = copy.deepcopy(decoder, shared)
    except (TypeError, RuntimeError, AttributeError, copy.Error):
        return decoder
    # The configuration was copied with the modules that hold it.
    if (short := shared.get(id(config))) is None:
        return decoder
    short.sliding_window = _WINDOW
    for module in copied.modules():
        if getattr(module, "sliding_window", None) == window:
            module.sliding_window = _WINDOW
    return copied


def _copy(cache: Any) -> Any:
    """A cache with the same tensors, whose layers can be assigned to without changing the original."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
