"""Keys and values that a model keeps: gathered for rows that share a head, and whether texts may be continued through them.

Contract: a probe of a few tokens compares text continued through the model's cache with the whole text. Sliding windows are
shortened for it, in a copy of the modules that shares the weights: some models cut their cache to a window that whole texts
do not have, which would show only in texts longer than the window.
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

# The windows of a probe, in tokens; it continues after more.
_WINDOW = 3
# Tokens that a probe writes one by one.
_STEPS = 2
# What a model raises if its attention or cache is not of the kind that is continued or replaced here. RuntimeError includes
# NotImplementedError.
CANNOT = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError)


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
    # Gathering copies, so the steps after it may change the cache.
    gathers = _can_be_gathered(cache) and agrees(side_by_side)
    return CacheUse(gathers=gathers, steps=cache is None or agrees(one_by_one))


def _can_be_gathered(cache: Any) -> bool:
    from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)


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
