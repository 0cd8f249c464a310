"""Reads many short texts behind one shared prefix: its keys and values are computed once, whatever follows it.

Contract: states equal those of the whole text, token for token, to rounding. Every layer attends in two parts, to the
shared prefix (one dense product for all rows) and to the row itself (a mask of its own), and the parts are joined by
their softmax sums: exact attention, as in Hydragen (arXiv 2402.05099) and cascade inference. Sliding windows hold in
both parts. Prefixes form a tree: orders of one set of demonstrations that begin alike share the states of what they
have in common.

A model whose attention cannot be replaced (`PrefixReader.why_not` says why) is left to `Backbone.walk`, which reads
whole texts.

Shapes: B rows, T tokens of a row, S its own keys, H heads, K heads of keys and values, G = H / K, D head width, P
tokens of the prefix.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsort.errors import SparsortError, first_line
from sparsort.scoring.answers.growing_kv import Keys, Tails
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.fused import FusedBlocks, cause_of, fused
from sparsort.scoring.model.kv_caches import CANNOT
from sparsort.scoring.model.sites import Site

_LOG = logging.getLogger("sparsort")
IMPLEMENTATION = "sparsort_shared_prefix"
# Keys and values of prefixes that are kept for those to come.
_KEPT_BYTES = 512 * 2**20
# Attention scores of one product that stand in memory at once: twice as many, with a mask, take twice the time a score.
_SCORES_AT_ONCE = 2**22
# Tokens of a prefix that are run at once: a long one must not take the square of its length in memory.
_EXTENDED_AT_ONCE = 2048
# Tokens from which on a compiled pass is the faster one; below, finding the right program takes longer than it saves.
_LEAST_FUSED = 256
# Rounding in bf16 moves the states of right models by 0.01 to 0.03 of their size; 64 steps of it would let half of it pass.
_MOST_GAP = 0.1
_PASSED = threading.local()
_LOCKING = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
# What attention functions are given besides that changes nothing here.
_HARMLESS = ("is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A shared beginning of texts: its ids, and every layer's keys and values, each (1, K, P, D)."""

    ids: tuple[int, ...]
    layers: list[Keys]

    def __len__(self) -> int:
        return len(self.ids)

    def head(self, length: int) -> Prefix:
        """The first `length` tokens of it; a view."""
        layers = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers]
        return Prefix(ids=self.ids[:length], layers=layers)


@dataclass(kw_only=True)
class _Pass:
    """What the attention of one forward pass needs besides its own queries, keys and values."""

    prefix: Prefix
    query_BT: Tensor
    key_BS: Tensor
    visible_BTS: Tensor
    tails: Tails | None = None
    fuse: bool = False
    keys: dict[int, Keys] = field(default_factory=dict)
    masks: dict[int | None, tuple[Tensor | None, Tensor | None, int]] = field(default_factory=dict)

    def mask(self, window: int | None) -> tuple[Tensor | None, Tensor | None, int]:
        """(B, T, P') and (B, T, S) additive masks under a sliding window, and where P' begins; None where all is seen."""
        if window not in self.masks:
            own = self.visible_BTS
            begin, before = 0, None
            if window is not None:
                own = own & (self.query_BT[:, :, None] - self.key_BS[:, None, :] < window)
                begin = min(max(int(self.query_BT.min()) - window + 1, 0), len(self.prefix))
                place_P = torch.arange(begin, len(self.prefix), device=own.device)
                seen = self.query_BT[:, :, None] - place_P < window
                before = None if bool(seen.all()) else _additive(seen)
            self.masks[window] = (before, _additive(own), begin)
        return self.masks[window]


class _Feed:
    """Stands in for a cache: tells where the rows begin and keeps what they add."""

    is_compileable = False

    def __init__(self, now: _Pass) -> None:
        self._now = now

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Keys:
        if self._now.tails is not None:
            return self._now.tails.put(layer_idx, keys, values)
        self._now.keys[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, *_args: Any) -> int:
        return len(self._now.prefix)


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
    """transformers' attention interface, for the pass that this thread has under way; returns (B, T, H, D).

    Raises:
        NotImplementedError: the model asks for something that changes its attention (a mask of its own, sinks, a cap, dropout).
    """
    unknown = [name for name, value in other.items() if value is not None and name not in _HARMLESS]
    # transformers makes no mask for an attention that it does not know, so one that is there holds more than causality.
    unknown += [] if attention_mask is None else ["a mask of its own"]
    if dropout or unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout'}")
    now: _Pass = _PASSED.now
    B, H, T, D = query_BHTD.shape
    K = key_BKSD.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    before, own, begin = now.mask(sliding_window)
    grouped = query_BHTD.transpose(1, 2).reshape(B, T, K, H // K, D)
    out, top, total = _part(grouped, key_BKSD, value_BKSD, scale, own, now.fuse)
    if len(now.prefix) > begin:
        keys, values = now.prefix.layers[module.layer_idx]
        shared = _part(grouped, keys[:, :, begin:], values[:, :, begin:], scale, before, now.fuse)
        out = (fused(_join) if now.fuse else _join)(out, top, total, *shared)
    else:
        out = out.div_(total.to(out.dtype))
    return out.reshape(B, T, H, D), None


def _join(out: Tensor, top: Tensor, total: Tensor, other_out: Tensor, other_top: Tensor, other_total: Tensor) -> Tensor:
    """The softmax over two parts of the keys from what `_part` made of each; the first holds the row itself."""
    # The row itself is always seen, so `top` is finite and neither weight is NaN.
    new_top = torch.maximum(top, other_top)
    mine, theirs = (top - new_top).exp_(), (other_top - new_top).exp_()
    total = total * mine + other_total * theirs
    out = out.mul_(mine.to(out.dtype)).add_(other_out.mul_(theirs.to(out.dtype)))
    return out.div_(total.to(out.dtype))


def _weigh(scores: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score − largest) in the scores' dtype, the largest scaled score and the sum of the weights, both fp32.

    `scores` is (rows, K, B / rows, T, G, S), `mask` (rows, 1, B / rows, T, 1, S).
    """
    scaled = scores.float().mul_(scale)
    if mask is not None:
        scaled += mask
    top = scaled.amax(dim=-1, keepdim=True)
    # A query that sees none of these keys weighs them with zero instead of NaN.
    weights = scaled.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()
    return weights.to(scores.dtype), top, weights.sum(dim=-1, keepdim=True)


def _part(
    query_BTKGD: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, fuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-weighted sum before its division, (B, T, K, G, D), the largest score and the sum of weights, (B, T, K, G, 1).

    `key` and `value` are (B, K, S, D), or (1, K, S, D) where all rows share them.
    """
    B, T, K, G, D = query_BTKGD.shape
    S = key.shape[2]
    shared = len(key) == 1
    # Rows that share their keys are taken in parts, and so are the tokens of a single row.
    along = 0 if B > 1 else 1
    count = query_BTKGD.shape[along]
    if shared and (most := max(_SCORES_AT_ONCE * count // max(B * T * K * G * S, 1), 1)) < count:
        masks = [None] * count if mask is None else list(torch.split(mask, most, dim=along))
        done = [
            _part(query, key, value, scale, part, fuse)
            for query, part in zip(torch.split(query_BTKGD, most, dim=along), masks, strict=False)
        ]
        out, top, total = (torch.cat(parts, dim=along) for parts in zip(*done, strict=True))
        return out, top, total
    rows = 1 if shared else B
    # (rows · K, B/rows · T · G, D): all queries that see the same keys in one product.
    query = query_BTKGD.permute(2, 0, 1, 3, 4).reshape(K, rows, -1, D).transpose(0, 1).reshape(rows * K, -1, D)
    scores = torch.bmm(query, key.reshape(rows * K, S, D).transpose(1, 2)).view(rows, K, B // rows, T, G, S)
    seen = None if mask is None else mask.view(rows, 1, B // rows, T, 1, S)
    weights, top, total = (fused(_weigh) if fuse else _weigh)(scores, seen, scale)
    out = torch.bmm(weights.view(rows * K, -1, S), value.reshape(rows * K, S, D))

    def back(x: Tensor) -> Tensor:
        return x.view(rows, K, B // rows, T, G, -1).permute(0, 2, 3, 1, 4, 5).reshape(B, T, K, G, -1)

    return back(out), back(top), back(total)


def _lock_of(decoder: Any) -> Any:
    with _LOCKING:
        return _LOCKS.setdefault(decoder, threading.RLock())


def _gap(ours: Tensor, theirs: Tensor) -> float | None:
    """How far states lie apart, as a share of their size, where it is more than rounding; else None."""
    gap = float((ours - theirs).float().norm() / theirs.float().norm())
    return None if gap <= min(64 * torch.finfo(theirs.dtype).eps, _MOST_GAP) else gap


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows that continue a prefix, and what a pass made of them.

    Attributes:
        states: site → (B, T, width).
        layers: every layer's keys and values of the rows' own tokens, each (B, K, T, D).
    """

    states: dict[str, Tensor]
    layers: dict[int, Keys]


class PrefixReader:
    """Runs a backbone after shared prefixes.

    Args:
        backbone: the model.
        sites: names of the sites whose states are read.
        kept_bytes: memory for prefixes that may be wanted again.
        compile: fuse the steps between matrix products (`fused`), for long runs.

    Raises:
        SparsortError: the model cannot be compiled here.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        sites: Sequence[str] = ("pre_norm", "post_norm"),
        kept_bytes: int = _KEPT_BYTES,
        compile: bool = False,
    ) -> None:
        self.backbone = backbone
        self.sites: list[Site] = [backbone.site(name) for name in sites]
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._kept_bytes = kept_bytes
        self.n_tokens = 0
        self.n_fused_tokens = 0
        self.bytes_per_token = 0
        self._windows: set[int | None] = set()
        self._fused: FusedBlocks | None = None
        self.why_not = self._probe()
        if compile and self.why_not is None:
            self._compile()
        elif compile:
            _LOG.warning("%s is not compiled: %s.", backbone.loaded.name, self.why_not)

    @property
    def compiled(self) -> bool:
        """Whether the blocks are compiled."""
        return self._fused is not None

    def prefix(self, segments: Sequence[Sequence[int]]) -> Prefix:
        """The prefix that these segments make together; what an earlier one has in common with it is not run again.

        Args:
            segments: token ids, first to last; sharing is looked for at their borders.
        """
        ids = tuple(token for segment in segments for token in segment)
        ends = np.cumsum([len(segment) for segment in segments]).tolist()
        known: Prefix | None = None
        for end in reversed(ends):
            if (known := self._kept.get(ids[:end])) is not None:
                self._kept.move_to_end(ids[:end])
                break
        known = known or Prefix(ids=(), layers=[])
        if len(known) < len(ids):
            while len(known) < len(ids):
                known = self._extend(known, ids[: len(known) + _EXTENDED_AT_ONCE])
            for end in ends:
                self._kept.setdefault(ids[:end], known.head(end))
                self._kept.move_to_end(ids[:end])
            self._shrink()
        return known

    def _shrink(self) -> None:
        # Heads of one prefix are views of the same memory: it is counted once.
        def held() -> int:
            stores = {
                keys.untyped_storage().data_ptr(): 2 * keys.untyped_storage().nbytes() * len(prefix.layers)
                for prefix in self._kept.values()
                for keys, _ in prefix.layers[:1]
            }
            return sum(stores.values())

        while len(self._kept) > 1 and held() > self._kept_bytes:
            self._kept.popitem(last=False)

    def _extend(self, parent: Prefix, ids: tuple[int, ...]) -> Prefix:
        own = torch.tensor([ids[len(parent) :]], device=self.backbone.device)
        block = self.read(parent, own, sites=())
        layers = []
        for number in range(len(self.backbone.blocks)):
            keys, values = block.layers[number]
            if len(parent):
                before = parent.layers[number]
                keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
            layers.append((keys, values))
        return Prefix(ids=ids, layers=layers)

    @torch.inference_mode()
    def read(
        self,
        prefix: Prefix,
        ids_BT: Tensor,
        *,
        offset_BT: Tensor | None = None,
        visible_BTT: Tensor | None = None,
        sites: Sequence[Site] | None = None,
    ) -> Block:
        """Run rows after a prefix.

        Args:
            prefix: what stands before every row.
            ids_BT: the rows' token ids, padded in any way that `visible_BTT` hides (behind a row's end causality does).
            offset_BT: position of each token behind the prefix; None for 0, 1, 2, …
            visible_BTT: which of the row's tokens each token sees, itself at least; None for all up to itself.
            sites: where to read; None for those of the reader.
        """
        B, T = ids_BT.shape
        device = ids_BT.device
        offset = torch.arange(T, device=device).expand(B, T) if offset_BT is None else offset_BT
        position = offset + len(prefix)
        visible = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(B, T, T)
        if visible_BTT is not None:
            visible = visible_BTT
        now = _Pass(prefix=prefix, query_BT=position, key_BS=position, visible_BTS=visible)
        states = self._run(ids_BT, position, now, self.sites if sites is None else sites)
        return Block(states=states, layers=now.keys)

    @torch.inference_mode()
    def step(
        self, prefix: Prefix, tails: Tails, token_B: Tensor, *, sites: Sequence[Site] | None = None
    ) -> dict[str, Tensor]:
        """States, site → (B, 1, width), of one more token a row; the tails take it in.

        Args:
            prefix: what stands before every row.
            tails: what stands between the prefix and these tokens.
            token_B: the tokens.
            sites: where to read; None for those of the reader.
        """
        column_S = torch.arange(tails.width, device=token_B.device)
        position = (tails.lengths_B + len(prefix))[:, None]
        now = _Pass(
            prefix=prefix,
            query_BT=position,
            key_BS=(column_S + len(prefix)).expand(len(tails), -1),
            visible_BTS=column_S <= tails.lengths_B[:, None, None],
            tails=tails,
        )
        states = self._run(token_B[:, None], position, now, self.sites if sites is None else sites)
        tails.advance()
        return states

    def _run(self, ids_BT: Tensor, position_BT: Tensor, now: _Pass, sites: Sequence[Site]) -> dict[str, Tensor]:
        fused_blocks = self._fused if ids_BT.numel() >= _LEAST_FUSED else None
        now.fuse = fused_blocks is not None
        blocks = nullcontext() if fused_blocks is None else fused_blocks.in_place()
        # A pass changes the model's configuration and its blocks: two at once would leave each other's behind.
        with _lock_of(self.backbone.decoder), self._own_attention(now), self.backbone.catch(sites) as caught, blocks:
            self.backbone.decoder(
                input_ids=ids_BT, position_ids=position_BT, past_key_values=_Feed(now), use_cache=True
            )
        self.n_tokens += ids_BT.numel()
        self.n_fused_tokens += ids_BT.numel() if now.fuse else 0
        self._windows |= now.masks.keys()
        return caught

    @contextmanager
    def _own_attention(self, now: _Pass) -> Iterator[None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            # It reads what this thread has under way, which a compiler must not take for a constant.
            ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
        config = self.backbone.config
        usual = config._attn_implementation
        config._attn_implementation, _PASSED.now = IMPLEMENTATION, now
        try:
            yield
        finally:
            config._attn_implementation = usual
            del _PASSED.now

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """Why this model must read whole texts; None when prefixes give what the whole gives."""
        backbone = self.backbone
        if not backbone.can_continue:
            return "its cache cannot be continued"
        if backbone.chunk is None:
            return "its rotary embeddings depend on the length of the text"
        whole, cut = self._probe_ids()
        n = whole.shape[1]
        site = backbone.site("pre_norm")
        try:
            with backbone.catch([site]) as caught:
                backbone.decoder(input_ids=whole, use_cache=False)
            prefix = self._extend(Prefix(ids=(), layers=[]), tuple(whole[0, :cut].tolist()))
            self.bytes_per_token = sum(keys.nbytes + values.nbytes for keys, values in prefix.layers) // cut
            ours = self._read_twice(prefix, whole[:, cut:], site)
        except CANNOT as error:
            return f"its attention cannot be replaced ({type(error).__name__}: {first_line(error)[:120]})"
        theirs = caught[site.name].view(2, n, -1)[:, cut:].repeat(1, 2, 1)
        if (gap := _gap(ours.reshape(theirs.shape), theirs)) is not None:
            return f"states after a prefix differ from those of the whole text (by {gap:.1e} of their size)"
        return self._unseen_window()

    def _read_twice(self, prefix: Prefix, ids_BT: Tensor, site: Site) -> Tensor:
        """(B, 2 T, width) states of rows that are there twice, one after the other, and do not see each other.

        Both halves have the same positions, so a model that counts positions by itself gives other states in the second.
        """
        T = ids_BT.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).tril()
        offset = torch.arange(T, device=ids_BT.device).repeat(2).expand(len(ids_BT), -1)
        nothing = torch.zeros_like(causal)
        visible = torch.cat([torch.cat([causal, nothing], dim=1), torch.cat([nothing, causal], dim=1)])
        visible = visible.expand(len(ids_BT), -1, -1)
        block = self.read(prefix, ids_BT.repeat(1, 2), offset_BT=offset, visible_BTT=visible, sites=[site])
        return block.states[site.name]

    def _probe_ids(self) -> tuple[Tensor, int]:
        """(2, n) token ids, the same up to a place, and that place."""
        window = getattr(self.backbone.config, "sliding_window", None) or 0
        # Long enough that a short window cuts through both parts; a long one is held by the arithmetic of `_Pass.mask`.
        n = 24 if not 0 < window < 24 else 2 * window + 8
        size, cut = int(self.backbone.config.vocab_size), n // 2
        whole = (torch.arange(2 * n, device=self.backbone.device).view(2, n) * 7 + 3).remainder(size)
        whole[1, :cut] = whole[0, :cut]
        return whole, cut

    @torch.inference_mode()
    def _compile(self) -> None:
        """Compile the blocks, and see on a probe that they compute what they did.

        Raises:
            SparsortError: they cannot be compiled, or do not.
        """
        whole, cut = self._probe_ids()
        site, name = self.backbone.site("pre_norm"), self.backbone.loaded.name
        prefix = self._extend(Prefix(ids=(), layers=[]), tuple(whole[0, :cut].tolist()))
        rows = whole[:, cut:].repeat(-(-_LEAST_FUSED // (whole.numel() - 2 * cut)), 1)
        plain = self.read(prefix, rows, sites=[site]).states[site.name]
        self._fused = FusedBlocks(list(self.backbone.blocks))
        try:
            ours = self.read(prefix, rows, sites=[site]).states[site.name]
        except (RuntimeError, OSError) as error:
            raise SparsortError(
                f"the model {name!r} cannot be compiled here: {cause_of(error)}. Leave compile out."
            ) from error
        if (gap := _gap(ours, plain)) is not None:
            raise SparsortError(
                f"the model {name!r} computes other states when compiled (by {gap:.1e} of their size). Leave compile out."
            )

    def _unseen_window(self) -> str | None:
        """Why a window that is longer than the probe would be missed: some models put it into their masks alone."""
        config = self.backbone.config
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if "chunked_attention" in (kinds or ()):
            return "its layers attend within chunks"
        slides = bool(window) if kinds is None else "sliding_attention" in kinds
        if slides and window not in self._windows:
            return f"its sliding window of {window} tokens is not told to the attention"
        return None
