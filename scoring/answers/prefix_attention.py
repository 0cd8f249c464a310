"""Attention of rows to a shared prefix and to themselves, and the keys and values of both.

Contract: the result is exact attention over the prefix and the row, as in Hydragen (arXiv 2402.05099) and cascade inference. It
is computed in two parts, to the shared prefix (one dense product for all rows) and to the row itself (with its own mask), which
are joined by their softmax sums. Sliding windows apply to both parts.

In `Tails`, the column of a token is its position after the prefix, independent of the other rows, so the mask of a row is plain
causality. Columns after the end of a row contain padding of the first pass, values of a row that has left, or zeros, and no query
sees them. A step writes one column per row, and rows are copied only when a row leaves the batch.

Shape suffixes: B rows, b rows of one pass, T tokens of a row, S its own keys, H heads, K heads of keys and values, G = H / K, D
head width, P tokens of the prefix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsort.scoring.model.fused import fused

Keys = tuple[Tensor, Tensor]

_IMPLEMENTATION = "sparsort_shared_prefix"
# The most attention scores of one product in memory. With twice as many and a mask, a score takes twice the time.
_SCORES_AT_ONCE = 2**22
# The `PrefixPass` that each thread is running: transformers calls `attend` with the model's tensors only.
_PASSED = threading.local()
# Arguments that transformers passes to attention functions and that have no effect on `attend`.
_HARMLESS = ("is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A shared beginning of texts: its ids, and the keys and values of every layer, (1, K, P, D) each."""

    ids: tuple[int, ...]
    layers: list[Keys]

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, length: int) -> Prefix:
        """Return the first `length` tokens, as a view of the same memory."""
        layers = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers]
        return Prefix(ids=self.ids[:length], layers=layers)


class Tails:
    """The keys and values of the tokens that B rows have after their shared prefix.

    Args:
        passes: for each pass over some of the rows: layer → keys and values (b, K, S, D), and the rows' lengths without padding.
        room: the most tokens that a row can have.
        rows: the number of rows of all passes together.

    Attributes:
        lengths_B: tokens of each row so far.
    """

    def __init__(self, passes: Iterable[tuple[dict[int, Keys], Sequence[int]]], room: int, rows: int) -> None:
        self._layers: dict[int, Keys] = {}
        lengths: list[int] = []
        for layers, pass_lengths in passes:
            begin = len(lengths)
            lengths += pass_lengths
            for number, new in layers.items():
                if number not in self._layers:
                    # Not `new_empty`: a masked column has weight 0 in the products, and 0 · NaN is NaN.
                    self._layers[number] = tuple(  # type: ignore[assignment]
                        part.new_zeros(rows, part.shape[1], room, part.shape[3]) for part in new
                    )
                for buffer, part in zip(self._layers[number], new, strict=True):
                    buffer[begin : begin + len(part), :, : part.shape[2]] = part
        device = next(iter(self._layers.values()))[0].device
        self.lengths_B = torch.tensor(lengths, device=device)
        self._n_rows, self._longest = rows, max(lengths)

    def __len__(self) -> int:
        return self._n_rows

    @property
    def width(self) -> int:
        """The number of columns that the next token of any row may see, including its own."""
        return self._longest + 1

    def put(self, layer: int, keys_BK1D: Tensor, values_BK1D: Tensor) -> Keys:
        """Write the next token of every row; returns all columns, (B, K, width, D)."""
        rows = torch.arange(self._n_rows, device=keys_BK1D.device)
        keys, values = (part[: self._n_rows] for part in self._layers[layer])
        keys[rows, :, self.lengths_B] = keys_BK1D[:, :, 0]
        values[rows, :, self.lengths_B] = values_BK1D[:, :, 0]
        # Columns beyond the longest row are not passed on, so that the products grow only with the tokens that there are.
        return keys[:, :, : self.width], values[:, :, : self.width]

    def advance(self) -> None:
        """Count one more token per row, after every layer has `put` its keys and values."""
        self.lengths_B = self.lengths_B + 1
        self._longest += 1

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows except these; returns the previous number of the row at each place.

        Rows from the end move into the places of dropped rows, which copies as few rows as possible.
        """
        stays = set(rows)
        count = len(stays)
        # A row below `count` that stays keeps its place; each hole below `count` is filled by a row from above it.
        order = list(range(count))
        holes = [place for place in order if place not in stays]
        movers = sorted(stays - set(order))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            for layers in self._layers.values():
                for part in layers:
                    part[holes, :, : self._longest] = part[movers, :, : self._longest]
        self.lengths_B = self.lengths_B[order]
        self._n_rows, self._longest = count, int(self.lengths_B.max())
        return order


@dataclass(kw_only=True)
class PrefixPass:
    """The state of one forward pass after a prefix, which `attend` reads in every layer.

    Attributes:
        query_BT, key_BS: positions of the queries and of the rows' own keys.
        visible_BTS: whether a query sees one of the rows' own keys, apart from a sliding window.
        tails: earlier tokens of the rows, for a pass over one more token; None for a pass over whole rows.
        fuse: whether the steps between matrix products run compiled.
        keys: layer → keys and values that the pass has computed, without `tails`.
        masks: sliding window → the result of `mask`, which the layers with this window share.
    """

    prefix: Prefix
    query_BT: Tensor
    key_BS: Tensor
    visible_BTS: Tensor
    tails: Tails | None = None
    fuse: bool = False
    keys: dict[int, Keys] = field(default_factory=dict)
    masks: dict[int | None, tuple[Tensor | None, Tensor | None, int]] = field(default_factory=dict)

    def mask(self, window: int | None) -> tuple[Tensor | None, Tensor | None, int]:
        """Return additive masks under a sliding window, and the first token P' of the prefix that any query sees.

        The masks are (B, T, P - P') for the prefix, None if all of it is visible, and (B, T, S) for the rows' own keys.
        """
        if window not in self.masks:
            own = self.visible_BTS
            begin, before = 0, None
            if window is not None:
                own = own & (self.query_BT[:, :, None] - self.key_BS[:, None, :] < window)
                # No query sees the tokens before `begin`, which are skipped.
                begin = min(max(int(self.query_BT.min()) - window + 1, 0), len(self.prefix))
                place_P = torch.arange(begin, len(self.prefix), device=own.device)
                seen = self.query_BT[:, :, None] - place_P < window
                before = None if bool(seen.all()) else _additive(seen)
            self.masks[window] = (before, _additive(own), begin)
        return self.masks[window]


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def attend(
    module: Any,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls for the pass that this thread is running; returns (B, T, H, D).

    Raises:
        NotImplementedError: the model uses something else that changes attention (a mask of its own, sinks, a cap, dropout).
    """
    unknown = [name for name, value in other.items() if value is not None and name not in _HARMLESS]
    # transformers makes no causal mask for an attention function that it does not know, so a mask has another purpose.
    unknown += [] if attention_mask is None else ["a mask of its own"]
    if dropout or unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout'}")
    current: PrefixPass = _PASSED.current
    B, H, T, D = query_BHTD.shape
    K = key_BKSD.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    before, own, begin = current.mask(sliding_window)
    # Heads that share keys are next to each other, so they can be split off as one dimension.
    grouped = query_BHTD.transpose(1, 2).reshape(B, T, K, H // K, D)
    out, top, total = _part(grouped, key_BKSD, value_BKSD, scale, own, current.fuse)
    if len(current.prefix) > begin:
        keys, values = current.prefix.layers[module.layer_idx]
        shared = _part(grouped, keys[:, :, begin:], values[:, :, begin:], scale, before, current.fuse)
        out = (fused(_join) if current.fuse else _join)(out, top, total, *shared)
    else:
        # No token of the prefix is within the window, or there is no prefix.
        out = out.div_(total.to(out.dtype))
    return out.reshape(B, T, H, D), None


def _join(out: Tensor, top: Tensor, total: Tensor, other_out: Tensor, other_top: Tensor, other_total: Tensor) -> Tensor:
    """Combine two results of `_part` to the softmax over all keys; the first part must contain each query's own key."""
    # A query always sees its own key, so `top` is finite, and neither factor is NaN if `other_top` is −∞.
    new_top = torch.maximum(top, other_top)
    factor, other_factor = (top - new_top).exp_(), (other_top - new_top).exp_()
    total = total * factor + other_total * other_factor
    out = out.mul_(factor.to(out.dtype)).add_(other_out.mul_(other_factor.to(out.dtype)))
    return out.div_(total.to(out.dtype))


def _weigh(scores: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the weights exp(score − largest score) in the dtype of the scores, and in fp32 the largest score and their sum.

    The products `scores` are (rows, K, B / rows, T, G, S), and the additive `mask` is (rows, 1, B / rows, T, 1, S).
    """
    scaled = scores.float().mul_(scale)
    if mask is not None:
        scaled += mask
    top = scaled.amax(dim=-1, keepdim=True)
    # If a query sees no key of this part, its largest score is −∞, and −∞ − (−∞) would be NaN. Clamped, all weights are 0.
    weights = scaled.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()
    return weights.to(scores.dtype), top, weights.sum(dim=-1, keepdim=True)


def _part(
    query_BTKGD: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to a part of the keys, without the softmax's division.

    `key` and `value` are (B, K, S, D), or (1, K, S, D) if all rows share them, and `mask` is (B, T, S). Returns the weighted sum
    of the values, (B, T, K, G, D), and the largest score and the sum of the weights, (B, T, K, G, 1) each.
    """
    B, T, K, G, D = query_BTKGD.shape
    S = key.shape[2]
    shared = len(key) == 1
    # If rows share their keys, blocks of rows are computed one after the other, to bound memory; for one row, of tokens.
    along = 0 if B > 1 else 1
    count = query_BTKGD.shape[along]
    if shared and (most := max(_SCORES_AT_ONCE * count // max(B * T * K * G * S, 1), 1)) < count:
        masks = [None] * count if mask is None else list(torch.split(mask, most, dim=along))
        results = [
            _part(query, key, value, scale, part, fuse)
            for query, part in zip(torch.split(query_BTKGD, most, dim=along), masks, strict=False)
        ]
        out, top, total = (torch.cat(parts, dim=along) for parts in zip(*results, strict=True))
        return out, top, total
    rows = 1 if shared else B
    # (rows · K, B/rows · T · G, D): one product for all queries that see the same keys.
    query = query_BTKGD.permute(2, 0, 1, 3, 4).reshape(K, rows, -1, D).transpose(0, 1).reshape(rows * K, -1, D)
    scores = torch.bmm(query, key.reshape(rows * K, S, D).transpose(1, 2)).view(rows, K, B // rows, T, G, S)
    seen = None if mask is None else mask.view(rows, 1, B // rows, T, 1, S)
    weights, top, total = (fused(_weigh) if fuse else _weigh)(scores, seen, scale)
    out = torch.bmm(weights.view(rows * K, -1, S), value.reshape(rows * K, S, D))

    def back(x: Tensor) -> Tensor:
        return x.view(rows, K, B // rows, T, G, -1).permute(0, 2, 3, 1, 4, 5).reshape(B, T, K, G, -1)

    return back(out), back(top), back(total)


@contextmanager
def attend_in(config: Any, current: PrefixPass) -> Iterator[None]:
    """Let a model with this configuration attend by `attend` in this thread, for one pass."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        # `attend` reads the thread's current pass, which dynamo would otherwise compile in as a constant.
        ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
    before = config._attn_implementation
    config._attn_implementation, _PASSED.current = _IMPLEMENTATION, current
    try:
        yield
    finally:
        config._attn_implementation = before
        del _PASSED.current
