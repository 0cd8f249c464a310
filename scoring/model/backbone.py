"""Runs a causal language model's blocks over many rows and hands out states; the head is never computed here.

Contract: `Backbone.walk` yields `Piece`s that cover every token of every row once. Rows are padded on the right and no mask
is passed: causality keeps real tokens blind to the padding behind them, which leaves the fast attention path open and makes
a row's states independent of its batch mates (to rounding; measured in `benchmarks/speed/scoring.py`). A head that rows share is
run once and its keys and values gathered per row; a row longer than a chunk continues through the same cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsort.errors import SparsortError, first_line
from sparsort.scoring.loading.load import LoadedModel
from sparsort.scoring.model.batching import Limits, Plan, check_token_budget, plan
from sparsort.scoring.model.fingerprint import ModelFingerprint
from sparsort.scoring.model.kv_caches import CacheUse, Heads, probe_cache, rounding
from sparsort.scoring.model.sites import Site, blocks_of, find_site, norm_candidates

# The site that the head reads in a model without a final norm; see `Backbone.head_site`.
HEAD_INPUT = "head_input"
# Tokens of one row in one pass: longer rows continue chunk after chunk, so the mask is chunk × length, not length².
_CHUNK = 2048
# Tokens of one batch. On a CPU the activations should stay in the outer cache; on a GPU the matrix products want width.
_TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
# Keys and values kept for one batch, in batches' worth of tokens: a long shared head must not multiply memory.
_KEPT_BATCHES = 16
# Model types whose states are no function of the text alone, which texts as short as a probe do not show.
_NOT_OF_THE_TEXT = {"reformer": "Reformer hashes tokens into random buckets and pads texts to whole chunks"}
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

    Attributes:
        final_norm: the norm that makes the last hidden state; None for none.
        can_continue: rows may share a head through the model's cache; `can_step`: so may a text that is written.
        fingerprint: of a model that `mark_as_own` was called for; None for any other.

    Args:
        loaded: what `loading.load_model` gave.
        token_budget: most tokens of a batch, padding included; None for the device's default.

    Raises:
        SparsortError: not a causal decoder, an architecture that is not supported, or states that are not finite (the
            parameters at fault are named).
    """

    def __init__(self, loaded: LoadedModel, *, token_budget: int | None = None) -> None:
        self.loaded = loaded
        config = loaded.model.config
        self.config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        if reason := _NOT_OF_THE_TEXT.get(getattr(self.config, "model_type", "")):
            raise SparsortError(
                f"{loaded.name!r} is not supported: {reason}. Use another model, or a length or compression scorer."
            )
        self.decoder = decoder_of(loaded.model)
        self.device = next(loaded.model.parameters()).device
        self.hidden_size, n_layers, self._vocabulary = sizes_of(self.config, loaded.name)
        self.blocks = blocks_of(self.decoder, n_layers)
        check_token_budget(token_budget)
        self.token_budget = token_budget or _TOKEN_BUDGET.get(self.device.type, 4096)
        self._sites_seen: set[str] = set()
        self.final_norm, self._block_gives_states, cache = self._probe()
        self.can_continue, self.can_step = cache.gathers, cache.steps
        self.fingerprint: ModelFingerprint | None = None

    def mark_as_own(self) -> None:
        """Say that sparsort loaded the model by name and hands it to nobody who may have edited it, as `row_cache` requires.

        `fingerprint` then shows later edits, apart from those that no counter of torch's shows (see `model_fingerprint`).
        """
        self.fingerprint = ModelFingerprint(self.loaded.model)

    @property
    def max_length(self) -> int | None:
        """The context length that the model was configured for, in tokens; None when its config does not say."""
        value = getattr(self.config, "max_position_embeddings", None)
        return int(value) if value else None

    def site(self, name: str) -> Site:
        """Resolve a site by name (see `sites`), or `HEAD_INPUT`.

        Raises:
            SparsortError: no such site, or one that does not hold one state for each token.
        """
        if name == HEAD_INPUT:
            return self.head_site
        if name == "pre_norm" and not (self.final_norm or self._block_gives_states):
            return Site(name=name, module=self.decoder, reads="output")
        site = find_site(name, blocks=self.blocks, final_norm=self.final_norm, hidden_size=self.hidden_size)
        if name not in self._sites_seen:
            self._see(site)
            self._sites_seen.add(name)
        return site

    @torch.inference_mode()
    def _see(self, site: Site) -> None:
        """Read the site once: a model may use a block's modules in its own way, or not at all."""
        states, _ = self._forward(np.zeros((1, 2), dtype=np.int64), None, [site], keep=False)
        if site.name not in states:
            raise SparsortError(
                f"{self.loaded.name!r} does not use the module of site {site.name!r} ({type(site.module).__name__}). "
                f"{_other_site(site.name)}"
            )

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
            heads = Heads(caches, how.head_batches)
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
            shape = tuple(getattr(states, "shape", ()))
            if len(shape) == 2 and shape[0] == batch * width:
                # OPT flattens batch and tokens for its MLP.
                caught[name] = states.view(batch, width, -1)
            elif len(shape) != 3 or shape[:2] != (batch, width):
                raise SparsortError(
                    f"site {name!r} of {self.loaded.name!r} holds states of shape {shape}; expected (batch, tokens, width), here "
                    f"({batch}, {width}, …). {_other_site(name)}"
                )
        return caught, getattr(result, "past_key_values", None) if keep else None

    def _call(self, ids_BT: Tensor, cache: Any = None, *, keep: bool = False) -> Any:
        return self.decoder(
            input_ids=ids_BT.to(self.device), past_key_values=cache, use_cache=keep or cache is not None
        )

    @torch.inference_mode()
    def _probe(self) -> tuple[nn.Module | None, bool, CacheUse]:
        """Run a few tokens: the norm that makes the last hidden state, whether the last block gives a state for each token,
        and what the cache is good for.

        Raises:
            SparsortError: a model that does not run on token ids alone, states that are not finite, or tokens that see
                later ones.
        """
        name = self.loaded.name
        ids_BT = torch.arange(_PROBE, device=self.device).remainder(self._vocabulary)[None]
        candidates = norm_candidates(self.decoder, self.blocks)
        watched = [Site(name=str(key), module=module, reads="output") for key, module in enumerate(candidates)]
        last = Site(name="block", module=self.blocks[-1], reads="output")
        with self.catch([*watched, last]) as caught:
            whole_BTH = self._run_alone(lambda: self._call(ids_BT).last_hidden_state)
        if not torch.isfinite(whole_BTH).all():
            raise SparsortError(f"{name!r} computes states that are not finite. {_culprits(self.loaded.model)}")
        norms = [site.module for site in watched if _same(caught.get(site.name), whole_BTH)]
        shape = tuple(getattr(caught.get(last.name), "shape", ()))
        block_gives_states = shape in ((1, _PROBE, self.hidden_size), (_PROBE, self.hidden_size))
        half = _PROBE // 2
        changed = ids_BT.clone()
        changed[:, half:] = ids_BT[:, half:].flip(1)
        if not torch.allclose(
            self._call(changed).last_hidden_state[:, :half], whole_BTH[:, :half], rtol=0.0, atol=rounding(whole_BTH)
        ):
            raise SparsortError(
                f"{name!r} is not a causal decoder: its tokens see later ones. Use a causal language model."
            )
        self._check_wrapper(ids_BT, whole_BTH)
        return (norms[-1] if norms else None), block_gives_states, probe_cache(self.decoder, self.config, ids_BT)

    def _check_wrapper(self, ids_BT: Tensor, whole_BTH: Tensor) -> None:
        """See that the model's own forward pass runs the blocks on the token ids and nothing else."""
        model = self.loaded.model
        site = Site(name=HEAD_INPUT, module=self.decoder, reads="output")
        # Most of the time would go into logits that nothing reads.
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with self.catch([site]) as caught:
            self._run_alone(lambda: model(input_ids=ids_BT, use_cache=False, **few))
        theirs = caught.get(HEAD_INPUT)
        # Gemma 4 computes the last state alone where no more logits are kept.
        ours, same = whole_BTH[:, -1:], False
        if theirs is not None and theirs[:, -1:].shape == ours.shape:
            same = torch.allclose(theirs[:, -1:], ours, rtol=0.0, atol=rounding(whole_BTH))
        if not same:
            raise SparsortError(
                f"{self.loaded.name!r} ({type(model).__name__}) gives its blocks more than the token ids, so states "
                "read from the blocks would not be the model's own. Use a plain causal language model."
            )

    def _run_alone(self, run: Callable[[], Any]) -> Any:
        """What a pass over token ids returns.

        Raises:
            SparsortError: the model does not run on them.
        """
        try:
            return run()
        except Exception as error:  # a model that needs images, audio or another model's states says so in its own way
            raise SparsortError(
                f"{self.loaded.name!r} does not run on token ids alone ({first_line(error).rstrip('.')}). "
                "Use a causal language model of text."
            ) from error


# Tokens of the probe: two halves of four.
_PROBE = 8


def decoder_of(model: Any) -> Any:
    """The stack of blocks below the head, also within a multimodal wrapper."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        # ModernBERT's decoder gives the matrix of its head.
        decoder = model.base_model
    # Some classes name themselves; their blocks are one attribute further.
    return model.model if decoder is model and isinstance(getattr(model, "model", None), nn.Module) else decoder


def sizes_of(config: Any, name: str) -> tuple[int, int, int]:
    """Width, number of blocks and vocabulary of a language model.

    Raises:
        SparsortError: the configuration lacks one of them.
    """
    sizes = {key: getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    if missing := [key for key, size in sizes.items() if not isinstance(size, int)]:
        raise SparsortError(
            f"the configuration of {name!r} ({type(config).__name__}) has no {missing[0]}, so this architecture is not "
            "supported. Use another model, or a length or compression scorer."
        )
    return sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]  # type: ignore[return-value]


def _other_site(name: str) -> str:
    """What to do instead of reading at this site."""
    return "Use another model, or a length or compression scorer." if name == "pre_norm" else "Use 'pre_norm'."


def _same(output: Any, last: Tensor) -> bool:
    return (
        isinstance(output, Tensor) and output.numel() == last.numel() and torch.equal(output.reshape(last.shape), last)
    )


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
