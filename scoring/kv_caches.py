"""Keys and values that a model keeps: gathered for rows that share a head, and whether texts may be continued through them.

Contract: a probe of a few tokens compares text continued through the model's cache with the whole text. Sliding windows are
shortened for it, in a copy of the modules that shares the weights: some models cut their cache to a window that whole texts
do not have, which would show only in texts longer than the window.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The windows of a probe, in tokens; it continues after more.
_WINDOW = 3
# What a model raises if it cannot be continued, or not in this way. RuntimeError includes NotImplementedError.
_CANNOT = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """What a model's cache is good for.

    Attributes:
        gathers: rows may share a head and continue it, several tokens at once, and have the states of the whole text.
        steps: so may a text that is written token by token; True too for a cache that is not of transformers' common kind.
    """

    gathers: bool
    steps: bool


class Heads:
    """Keys and values of the shared heads, gathered for the rows of a batch."""

    def __init__(self, caches: list[Any], batches: list[NDArray[np.int64]]) -> None:
        self._cache = _copy(caches[0])
        for number, layer in enumerate(self._cache.layers):
            parts = [cache.layers[number] for cache in caches]
            if getattr(layer, "keys", None) is not None:
                layer.keys = torch.cat([part.keys for part in parts])
                layer.values = torch.cat([part.values for part in parts])
        self._place = np.argsort(np.concatenate(batches))

    def gather(self, heads: NDArray[np.int64], device: torch.device) -> Any:
        """A cache whose row b holds the keys and values of head `heads[b]`; the one it is taken from stays as it is."""
        cache = _copy(self._cache)
        cache.batch_select_indices(torch.from_numpy(self._place[heads]).to(device))
        return cache


def rounding(states: Tensor) -> float:
    """How far two ways to compute one state may lie apart: rounding of the dtype, well below what other context changes."""
    return 16 * torch.finfo(states.dtype).eps * float(states.abs().amax())


@torch.inference_mode()
def probe_cache(decoder: Any, config: Any, ids_BT: Tensor) -> CacheUse:
    """Continue the second half of a row after the first.

    Args:
        decoder: the stack of blocks; it is left as it is.
        config: its configuration.
        ids_BT: one row of a few token ids.
    """
    decoder = _with_short_windows(decoder, config)
    whole_BTH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    half = ids_BT.shape[1] // 2
    head, tail, expected = ids_BT[:, :half], ids_BT[:, half:], whole_BTH[:, half:]
    return CacheUse(gathers=_gathers(decoder, head, tail, expected), steps=_steps(decoder, head, tail, expected))


def _gathers(decoder: Any, head: Tensor, tail: Tensor, expected: Tensor) -> bool:
    """Whether the cache is of a kind that can be gathered, and two rows through it have the expected states."""
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        cache = getattr(decoder(input_ids=head, use_cache=True), "past_key_values", None)
        plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
        if cache is None or type(cache) is not DynamicCache or not all(type(layer) in plain for layer in cache.layers):
            return False
        gathered = Heads([cache], [np.arange(1)]).gather(np.zeros(2, dtype=np.int64), head.device)
        ours = decoder(input_ids=tail.repeat(2, 1), past_key_values=gathered, use_cache=True).last_hidden_state
    except _CANNOT:
        return False
    return torch.allclose(ours, expected.expand_as(ours), rtol=0.0, atol=rounding(expected))


def _steps(decoder: Any, head: Tensor, tail: Tensor, expected: Tensor) -> bool:
    """Whether tokens that follow one by one have the expected states."""
    try:
        cache = getattr(decoder(input_ids=head, use_cache=True), "past_key_values", None)
        if cache is None:
            return True
        steps = []
        for token in torch.split(tail, 1, dim=1):
            steps.append(decoder(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state)
        ours = torch.cat(steps, dim=1)
    except _CANNOT:
        return False
    return torch.allclose(ours, expected, rtol=0.0, atol=rounding(expected))


def _with_short_windows(decoder: Any, config: Any) -> Any:
    """The decoder with sliding windows of `_WINDOW` tokens: a copy that shares the weights.

    The decoder itself if it has no windows, or if its modules cannot be copied.
    """
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= _WINDOW:
        return decoder
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
    """A cache of the same tensors whose layers can be assigned to without touching the original."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
