"""Runs a causal language model's blocks over many rows and hands out states; the head is never computed here.

Contract: `Backbone.walk` yields `Piece`s that cover every token of every row once. Rows are padded on the right and no mask
is passed: causality keeps real tokens blind to the padding behind them, which leaves the fast attention path open and makes
a row's states independent of its batch mates (to rounding; measured in `benchmarks/scoring.py`). A head that rows share is run
once and its keys and values gathered per row; a row longer than a chunk continues through the same cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsort.errors import SparsortError
from sparsort.scoring.batching import Limits, Plan, check_token_budget, plan
from sparsort.scoring.loading import LoadedModel
from sparsort.scoring.sites import Site, blocks_of, find_site, norm_candidates

# The site that the head reads in a model without a final norm; see `Backbone.head_site`.
HEAD_INPUT = "head_input"
# Tokens of one row in one pass: longer rows continue chunk after chunk, so the mask is chunk × length, not length².
_CHUNK = 2048
# Tokens of one batch. On a CPU the activations should stay in the outer cache; on a GPU the matrix products want width.
_TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
# Keys and values kept for one batch, in batches' worth of tokens: a long shared head must not multiply memory.
_KEPT_BATCHES = 16
# Rotary embeddings whose frequencies follow the longest position in the batch: a row's mates would change it.
_LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """States of one pass.

    Attributes:
        rows: (B,) which rows (or, with `is_head`, which heads) these are.
        start: position of the first token in its row.
        lengths: (B,) real tokens of each row in this piece; what lies behind is padding.
        states: site → (B, T, width).
        is_head: the piece belongs to a shared head (`Plan.heads`).
    """

    rows: NDArray[np.int64]
    start: int
    lengths: NDArray[np.int64]
    states: dict[str, Tensor]
    is_head: bool = False


class Backbone:
    """The blocks of a loaded model, with its sites resolved.

    Args:
        loaded: what `loading.load_model` gave.
        token_budget: most tokens of a batch, padding included; None for the device's default.

    Raises:
        SparsortError: not a causal decoder, or its states are not finite (the parameters at fault are named).
    """

    def __init__(self, loaded: LoadedModel, *, token_budget: int | None = None) -> None:
        self.loaded = loaded
        config = loaded.model.config
        self.config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        self.decoder = decoder_of(loaded.model)
        self.device = next(loaded.model.parameters()).device
        self.hidden_size = int(self.config.hidden_size)
        self.blocks = blocks_of(self.decoder, int(self.config.num_hidden_layers))
        check_token_budget(token_budget)
        self.token_budget = token_budget or _TOKEN_BUDGET.get(self.device.type, 4096)
        self.final_norm, self.can_continue = self._probe()

    @property
    def max_length(self) -> int | None:
        """The context length that the model was configured for, in tokens; None when its config does not say."""
        value = getattr(self.config, "max_position_embeddings", None)
        return int(value) if value else None

    def site(self, name: str) -> Site:
        """Resolve a site by name (see `sites`), or `HEAD_INPUT`."""
        if name == HEAD_INPUT:
            return self.head_site
        return find_site(name, blocks=self.blocks, final_norm=self.final_norm, hidden_size=self.hidden_size)

    @property
    def head_site(self) -> Site:
        """Where the states are that the head reads: `post_norm`, or what the decoder returns if that is no norm's output.

        Without a final norm that is the last block's output, and for a few models (OPT 350M) a projection of it.
        """
        if self.final_norm is not None:
            return self.site("post_norm")
        return Site(name=HEAD_INPUT, module=self.decoder, reads="output")

    @property
    def answer_sites(self) -> tuple[str, str]:
        """The names of the sites that answers are read at: `pre_norm`, and the one that the head reads."""
        return "pre_norm", self.head_site.name

    def width(self, site: Site) -> int:
        """Number of dimensions of a site's states."""
        if site.reads == "output" or site.module is self.final_norm:
            return self.hidden_size
        weight = next(site.module.parameters())
        return int(weight.numel() // self.hidden_size)

    def plan(self, ids: Sequence[Sequence[int]], *, max_depth: int | None = None) -> Plan:
        """The plan by which `walk` will run these rows; `max_depth` limits a shared head (None: as long as it pays)."""
        depth = _CHUNK if max_depth is None else min(max_depth, _CHUNK)
        limits = Limits(
            tokens=self.token_budget,
            kept=_KEPT_BATCHES * self.token_budget,
            depth=depth if self.can_continue else 0,
            alone_over=self._alone_over(),
        )
        return plan(ids, limits)

    @torch.inference_mode()
    def walk(self, ids: Sequence[Sequence[int]], how: Plan, sites: Sequence[Site]) -> Iterator[Piece]:
        """Run every row by the plan and yield its states at the sites.

        Args:
            ids: token ids of every row, each at least one token.
            how: the plan of these very rows.
            sites: where to read.
        """
        heads = None
        if how.depth:
            caches = []
            for rows in how.head_batches:
                states, cache = self._forward(how.heads[rows], None, sites, keep=True)
                caches.append(cache)
                yield Piece(rows=rows, start=0, lengths=np.full(len(rows), how.depth), states=states, is_head=True)
            heads = _Heads(caches, how.head_batches)
        for rows in how.batches:
            shared = heads is not None and how.head_of[rows[0]] >= 0
            cache = heads.gather(how.head_of[rows], self.device) if heads is not None and shared else None
            skip = how.depth if shared else 0
            if self._alone_over() is not None:
                # Dynamic rotary embeddings keep the frequencies of the longest row so far until a short one comes.
                self._call(torch.tensor([[ids[rows[0]][0]]]))
            for offset, lengths, chunk, more in _chunks([ids[row][skip:] for row in rows], self.chunk):
                states, cache = self._forward(chunk, cache, sites, keep=more)
                yield Piece(rows=rows, start=skip + offset, lengths=lengths, states=states)

    @property
    def chunk(self) -> int | None:
        """Most tokens of a row in one pass; None when this model can only run a row whole."""
        return _CHUNK if self.can_continue and self._alone_over() is None else None

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's state depends on how long the whole text is (some rotary embeddings)."""
        return self._alone_over() is not None

    def _alone_over(self) -> int | None:
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        if not any(part.get("rope_type") in _LENGTH_DEPENDENT_ROPE for part in kinds):
            return None
        lengths = [part.get("original_max_position_embeddings") for part in kinds]
        return min([int(length) for length in [*lengths, self.max_length] if length], default=0)

    @contextmanager
    def catch(self, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
        """Catch the states at the sites, as the modules hand them over, from the passes within the block."""
        caught: dict[str, Tensor] = {}
        handles = [_hook(site, caught) for site in sites]
        try:
            yield caught
        finally:
            for handle in handles:
                handle.remove()

    def _forward(
        self, ids_BT: NDArray[np.int64], cache: Any, sites: Sequence[Site], *, keep: bool
    ) -> tuple[dict[str, Tensor], Any]:
        with self.catch(sites) as caught:
            result = self._call(torch.from_numpy(np.ascontiguousarray(ids_BT)), cache, keep=keep)
        batch, width = ids_BT.shape
        for name, states in caught.items():
            if states.dim() == 2 and len(states) == batch * width:
                # OPT flattens batch and tokens for its MLP.
                caught[name] = states.view(batch, width, -1)
            elif states.dim() != 3:
                raise SparsortError(
                    f"site {name!r} holds states of shape {tuple(states.shape)}; expected (batch, tokens, width). Use 'pre_norm'."
                )
        return caught, getattr(result, "past_key_values", None) if keep else None

    def _call(self, ids_BT: Tensor, cache: Any = None, *, keep: bool = False) -> Any:
        return self.decoder(
            input_ids=ids_BT.to(self.device), past_key_values=cache, use_cache=keep or cache is not None
        )

    @torch.inference_mode()
    def _probe(self) -> tuple[nn.Module | None, bool]:
        """Run a few tokens: the norm that makes the last hidden state, and whether a row may go on from a cache.

        Raises:
            SparsortError: states that are not finite, or tokens that see later ones.
        """
        name = self.loaded.name
        ids_BT = torch.arange(_PROBE, device=self.device).remainder(int(self.config.vocab_size))[None]
        candidates = norm_candidates(self.decoder, self.blocks)
        outputs: dict[int, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _module, _args, out, key=key: outputs.__setitem__(key, out))
            for key, module in enumerate(candidates)
        ]
        try:
            whole_BTH = self._call(ids_BT).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        if not torch.isfinite(whole_BTH).all():
            raise SparsortError(f"{name!r} computes states that are not finite. {_culprits(self.loaded.model)}")
        norms = [module for key, module in enumerate(candidates) if key in outputs and _same(outputs[key], whole_BTH)]
        half = _PROBE // 2
        changed = ids_BT.clone()
        changed[:, half:] = ids_BT[:, half:].flip(1)
        tolerance = _tolerance(whole_BTH)
        if not torch.allclose(
            self._call(changed).last_hidden_state[:, :half], whole_BTH[:, :half], rtol=0.0, atol=tolerance
        ):
            raise SparsortError(
                f"{name!r} is not a causal decoder: its tokens see later ones. Use a causal language model."
            )
        return (norms[-1] if norms else None), self._continues(ids_BT, whole_BTH, tolerance)

    def _continues(self, ids_BT: Tensor, whole_BTH: Tensor, tolerance: float) -> bool:
        """Whether the cache is of a kind that can be gathered, and head and tail through it give what the whole gives."""
        from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        half = _PROBE // 2
        cache = getattr(self._call(ids_BT[:, :half], keep=True), "past_key_values", None)
        plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
        if cache is None or type(cache) is not DynamicCache or not all(type(layer) in plain for layer in cache.layers):
            return False
        gathered = _Heads([cache], [np.arange(1)]).gather(np.zeros(2, dtype=np.int64), self.device)
        tails = self._call(ids_BT[:, half:].repeat(2, 1), gathered).last_hidden_state
        return torch.allclose(tails, whole_BTH[:, half:].expand_as(tails), rtol=0.0, atol=tolerance)


# Tokens of the probe: two halves of four.
_PROBE = 8


def decoder_of(model: Any) -> Any:
    """The stack of blocks below the head, also within a multimodal wrapper."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # Some classes name themselves; their blocks are one attribute further.
    return model.model if decoder is model and isinstance(getattr(model, "model", None), nn.Module) else decoder


def _same(output: Any, last: Tensor) -> bool:
    return (
        isinstance(output, Tensor) and output.numel() == last.numel() and torch.equal(output.reshape(last.shape), last)
    )


def _tolerance(states: Tensor) -> float:
    """How far two ways to compute one state may lie apart: rounding of the dtype, well below what other context changes."""
    return 16 * torch.finfo(states.dtype).eps * float(states.abs().amax())


class _Heads:
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


def _copy(cache: Any) -> Any:
    """A cache of the same tensors whose layers can be assigned to without touching the original."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _chunks(
    tails: list[Sequence[int]], most: int | None
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], bool]]:
    """(offset, real lengths, padded ids, whether more follows) of a batch, at most `most` tokens wide."""
    lengths = np.array([len(tail) for tail in tails], dtype=np.int64)
    longest = int(lengths.max())
    step = most or longest
    for offset in range(0, longest, step):
        width = min(step, longest - offset)
        # Padded with the row's own last token: a padding token's embedding may be NaN, and 0 · NaN is NaN in attention.
        chunk = np.array([tail[-1] for tail in tails], dtype=np.int64)[:, None].repeat(width, axis=1)
        for row, tail in enumerate(tails):
            part = tail[offset : offset + width]
            chunk[row, : len(part)] = part
        yield offset, np.clip(lengths - offset, 0, width), chunk, offset + width < longest


def _hook(site: Site, caught: dict[str, Tensor]) -> Any:
    def keep_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught[site.name] = args[0] if args else next(iter(kwargs.values()))

    def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
        # A block returns a tensor, or a tuple or list of which it is the first; the decoder returns an output object.
        output = getattr(output, "last_hidden_state", output)
        caught[site.name] = output[0] if isinstance(output, tuple | list) else output

    if site.reads == "input":
        return site.module.register_forward_pre_hook(keep_input, with_kwargs=True)
    return site.module.register_forward_hook(keep_output)


def _culprits(model: nn.Module) -> str:
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if not bad:
        return "Its weights are finite, so the arithmetic overflows: try dtype='float32' (--dtype float32)."
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"Weights with NaN or infinity: {', '.join(bad[:3])}{more}. Copy or download the checkpoint again."
