"""Runs many short texts after one shared prefix, whose keys and values are computed once.

Contract: up to rounding, the states equal those of the whole text, token for token. `prefix_attention` replaces the attention of
the model. Prefixes form a tree: orders of the same demonstrations that begin alike share the keys and values of their common
part. A model whose attention cannot be replaced (`PrefixReader.why_not` gives the reason) must read whole texts, with
`Backbone.walk`.

Shape suffixes: B rows, T tokens of a row, S its own keys, K heads of keys and values, D head width.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsort.errors import SparsortError, first_line
from sparsort.scoring.answers.prefix_attention import Keys, Prefix, PrefixPass, Tails, attend_in
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.fused import FusedBlocks, cause_of
from sparsort.scoring.model.kv_caches import CANNOT
from sparsort.scoring.model.sites import Site

_LOG = logging.getLogger("sparsort")
# The most memory for keys and values of earlier prefixes, which later ones may begin with.
_KEPT_BYTES = 512 * 2**20
# The most tokens of a prefix in one pass. The memory for the scores of one pass grows with their square.
_EXTENDED_AT_ONCE = 2048
# The least tokens of a pass that runs compiled. For fewer, looking up the compiled program takes longer than it saves.
_LEAST_FUSED = 256
# Rounding in bf16 changes the states of correct models by 0.01 to 0.03 of their norm. The bound of 64 rounding steps, which other
# dtypes have, would be 0.5 in bf16.
_MOST_GAP = 0.1
# One lock per model, and the lock of this table.
_LOCKING = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class _Feed:
    """Takes the place of transformers' cache: stores the keys and values of the rows, which begin after the prefix."""

    is_compileable = False

    def __init__(self, current: PrefixPass) -> None:
        self._current = current

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any) -> Keys:
        if self._current.tails is not None:
            return self._current.tails.put(layer_idx, keys, values)
        self._current.keys[layer_idx] = (keys, values)
        return keys, values

    def get_seq_length(self, *_args: Any) -> int:
        return len(self._current.prefix)


def _lock_of(decoder: Any) -> Any:
    with _LOCKING:
        return _LOCKS.setdefault(decoder, threading.RLock())


def _gap(ours: Tensor, theirs: Tensor) -> float | None:
    """Return the norm of the difference over the norm of the states; None if rounding explains it."""
    gap = float((ours - theirs).float().norm() / theirs.float().norm())
    return None if gap <= min(64 * torch.finfo(theirs.dtype).eps, _MOST_GAP) else gap


@dataclass(frozen=True, kw_only=True)
class Block:
    """The results of a pass over rows after a prefix.

    Attributes:
        states: site → (B, T, width).
        layers: layer → keys and values of the rows' own tokens, (B, K, T, D) each.
    """

    states: dict[str, Tensor]
    layers: dict[int, Keys]


class PrefixReader:
    """Runs a model after shared prefixes.

    Args:
        backbone: the model.
        sites: names of the sites whose states are read.
        kept_bytes: memory for keys and values of prefixes that may be needed again.
        compile: fuse the steps between matrix products (`fused`), for long runs.

    Attributes:
        n_tokens: tokens that were run so far; `n_fused_tokens` of them compiled.
        bytes_per_token: memory for the keys and values of one token in all layers.
        why_not: why this model cannot share prefixes; None if it can.

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
        """Return the prefix that these segments form together; segments shared with an earlier prefix are not run again.

        Args:
            segments: token ids, first to last. Two prefixes can share any number of whole segments.
        """
        ids = tuple(token for segment in segments for token in segment)
        ends = np.cumsum([len(segment) for segment in segments]).tolist()
        known: Prefix | None = None
        # The longest known beginning is looked for first.
        for end in reversed(ends):
            if (known := self._kept.get(ids[:end])) is not None:
                self._kept.move_to_end(ids[:end])
                break
        known = known or Prefix(ids=(), layers=[])
        if len(known) < len(ids):
            while len(known) < len(ids):
                known = self._extend(known, ids[: len(known) + _EXTENDED_AT_ONCE])
            # Every border is a key of its own, so that another prefix can begin with any number of these segments.
            for end in ends:
                self._kept.setdefault(ids[:end], known.head(end))
                self._kept.move_to_end(ids[:end])
            self._shrink()
        return known

    def _shrink(self) -> None:
        # Heads of one prefix are views of the same memory, which must be counted once.
        def used_bytes() -> int:
            stores = {
                keys.untyped_storage().data_ptr(): 2 * keys.untyped_storage().nbytes() * len(prefix.layers)
                for prefix in self._kept.values()
                for keys, _ in prefix.layers[:1]
            }
            return sum(stores.values())

        # The last prefix is kept even if it is larger than the limit, because it is about to be used.
        while len(self._kept) > 1 and used_bytes() > self._kept_bytes:
            self._kept.popitem(last=False)

    def _extend(self, parent: Prefix, ids: tuple[int, ...]) -> Prefix:
        own = torch.tensor([ids[len(parent) :]], device=self.backbone.device)
        block = self.read(parent, own, sites=())
        layers = []
        for number in range(len(self.backbone.blocks)):
            # The pass computed only the new tokens, which follow those of the parent.
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
            prefix: the prefix of every row.
            ids_BT: the token ids of the rows. `visible_BTT` must hide padding; after the end of a row, causality does.
            offset_BT: position of each token relative to the end of the prefix; None for 0, 1, 2, …
            visible_BTT: whether a token sees another token of the row, always true for itself; None for causality.
            sites: the sites to read; None for those of the reader.
        """
        B, T = ids_BT.shape
        device = ids_BT.device
        offset = torch.arange(T, device=device).expand(B, T) if offset_BT is None else offset_BT
        position = offset + len(prefix)
        visible = torch.ones(T, T, dtype=torch.bool, device=device).tril().expand(B, T, T)
        if visible_BTT is not None:
            visible = visible_BTT
        current = PrefixPass(prefix=prefix, query_BT=position, key_BS=position, visible_BTS=visible)
        states = self._run(ids_BT, position, current, self.sites if sites is None else sites)
        return Block(states=states, layers=current.keys)

    @torch.inference_mode()
    def step(
        self, prefix: Prefix, tails: Tails, token_B: Tensor, *, sites: Sequence[Site] | None = None
    ) -> dict[str, Tensor]:
        """Run one more token per row and append it to the tails; returns its states, site → (B, 1, width).

        Args:
            prefix: the prefix of every row.
            tails: the tokens of the rows so far.
            token_B: the new tokens.
            sites: the sites to read; None for those of the reader.
        """
        column_S = torch.arange(tails.width, device=token_B.device)
        position = (tails.lengths_B + len(prefix))[:, None]
        current = PrefixPass(
            prefix=prefix,
            query_BT=position,
            key_BS=(column_S + len(prefix)).expand(len(tails), -1),
            visible_BTS=column_S <= tails.lengths_B[:, None, None],
            tails=tails,
        )
        states = self._run(token_B[:, None], position, current, self.sites if sites is None else sites)
        tails.advance()
        return states

    def _run(
        self, ids_BT: Tensor, position_BT: Tensor, current: PrefixPass, sites: Sequence[Site]
    ) -> dict[str, Tensor]:
        fused_blocks = self._fused if ids_BT.numel() >= _LEAST_FUSED else None
        current.fuse = fused_blocks is not None
        blocks = nullcontext() if fused_blocks is None else fused_blocks.in_place()
        # A pass replaces the model's attention and blocks, and restores them at its end. Of two passes at the same time, one
        # would restore the replacements of the other.
        with (
            _lock_of(self.backbone.decoder),
            attend_in(self.backbone.config, current),
            self.backbone.catch(sites) as caught,
            blocks,
        ):
            self.backbone.decoder(
                input_ids=ids_BT, position_ids=position_BT, past_key_values=_Feed(current), use_cache=True
            )
        self.n_tokens += ids_BT.numel()
        self.n_fused_tokens += ids_BT.numel() if current.fuse else 0
        # Remembers the sliding windows that layers passed to `attend`, for `_unseen_window`.
        self._windows |= current.masks.keys()
        return caught

    @torch.inference_mode()
    def _probe(self) -> str | None:
        """Compare states after a prefix with those of the whole text; returns why prefixes cannot be shared, or None."""
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
        # Some modules see batch and tokens as one dimension, hence the view.
        theirs = caught[site.name].view(2, n, -1)[:, cut:].repeat(1, 2, 1)
        if (gap := _gap(ours.reshape(theirs.shape), theirs)) is not None:
            return f"states after a prefix differ from those of the whole text (by {gap:.1e} of their size)"
        return self._unseen_window()

    def _read_twice(self, prefix: Prefix, ids_BT: Tensor, site: Site) -> Tensor:
        """Run rows of which each contains its text twice, where the copies have the same positions and do not see each other.

        A model that ignores the given positions and counts tokens itself computes other states for the second copy.

        Returns:
            (B, 2 T, width) states.
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
        """Return the token ids of two texts with a common beginning, (2, n), and the length of the beginning."""
        window = getattr(self.backbone.config, "sliding_window", None) or 0
        # The texts are so long that a short window ends within both parts. For a long one, `PrefixPass.mask` is relied on.
        n = 24 if not 0 < window < 24 else 2 * window + 8
        size, cut = int(self.backbone.config.vocab_size), n // 2
        whole = (torch.arange(2 * n, device=self.backbone.device).view(2, n) * 7 + 3).remainder(size)
        whole[1, :cut] = whole[0, :cut]
        return whole, cut

    @torch.inference_mode()
    def _compile(self) -> None:
        """Compile the blocks, and check on a probe that they compute the same states as before.

        Raises:
            SparsortError: they cannot be compiled, or compute other states.
        """
        whole, cut = self._probe_ids()
        site, name = self.backbone.site("pre_norm"), self.backbone.loaded.name
        prefix = self._extend(Prefix(ids=(), layers=[]), tuple(whole[0, :cut].tolist()))
        # As many copies as it takes to reach the size from which passes run compiled.
        rows = whole[:, cut:].repeat(-(-_LEAST_FUSED // (whole.numel() - 2 * cut)), 1)
        plain = self.read(prefix, rows, sites=[site]).states[site.name]
        self._fused = FusedBlocks(list(self.backbone.blocks))
        try:
            ours = self.read(prefix, rows, sites=[site]).states[site.name]
        except (RuntimeError, OSError) as error:
            raise SparsortError(
                f"the model {name!r} cannot be compiled here: {cause_of(error)}. Omit compile."
            ) from error
        if (gap := _gap(ours, plain)) is not None:
            raise SparsortError(
                f"the model {name!r} computes other states when compiled (by {gap:.1e} of their size). Omit compile."
            )

    def _unseen_window(self) -> str | None:
        """Return why a window that is longer than the probe would be ignored, or None: some models have it in masks only."""
        config = self.backbone.config
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if "chunked_attention" in (kinds or ()):
            return "its layers attend within chunks"
        slides = bool(window) if kinds is None else "sliding_attention" in kinds
        if slides and window not in self._windows:
            return f"its sliding window of {window} tokens is not passed to the attention"
        return None
