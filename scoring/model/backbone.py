"""Runs the blocks of a causal language model over many rows and yields their states. It never computes the head.

Contract: `Backbone.walk` yields `StateChunk`s, which together contain every token of every row once. Rows are padded on the
right, and no mask is passed: in a causal model, real tokens do not see the padding after them. This allows the fast attention
path, and the states of a row do not depend on the other rows of its batch (up to rounding, see `benchmarks/speed/scoring.py`). A
prefix that rows share (a "shared head") is run once, and its keys and values are gathered for each row. A row that is longer
than a chunk is continued through the same cache.
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
# Tokens of one row in one pass. Longer rows are run in chunks, so that the mask has chunk × length entries and not length².
_CHUNK = 2048
# Tokens of one batch. On a CPU, the activations should fit into the last-level cache; a GPU needs wide matrix products.
_TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
# Limit of the keys and values of one batch, in multiples of the token budget. It bounds the memory for a long shared head.
_KEPT_BATCHES = 16
# Tokens of the probe: two halves of four.
_PROBE = 8
# Model types whose states do not depend on the text alone. A text as short as the probe does not reveal this.
_NOT_OF_THE_TEXT = {"reformer": "Reformer hashes tokens into random buckets and pads texts to whole chunks"}
# Rotary embeddings whose frequencies depend on the longest position in the batch, so that other rows would change a row's states.
_LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")


@dataclass(frozen=True, kw_only=True)
class StateChunk:
    """The states of one forward pass.

    Attributes:
        rows: (B,) row numbers or, with `is_head`, numbers of shared heads.
        start: position of the first token in its row.
        lengths: (B,) number of real tokens of each row; the tokens after them are padding.
        states: site → (B, T, width).
        is_head: the rows are shared heads (`Plan.heads`).
    """

    rows: NDArray[np.int64]
    start: int
    lengths: NDArray[np.int64]
    states: dict[str, Tensor]
    is_head: bool = False


class Backbone:
    """The blocks of a loaded model.

    Attributes:
        final_norm: the norm whose output is the last hidden state; None if there is none.
        can_continue: rows can continue a shared head through the cache of the model.
        can_step: a text that is generated token by token can do so.
        fingerprint: the fingerprint of the model, if `mark_as_own` was called; otherwise None.

    Args:
        loaded: a model that `loading.load_model` returned.
        token_budget: the largest number of tokens in a batch, including padding; None for the default of the device.

    Raises:
        SparsortError: the model is not a causal decoder, its architecture is not supported, or its states are not finite (the
            message names the parameters at fault).
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
        self._checked_sites: set[str] = set()
        self.final_norm, self._block_gives_states, cache = self._probe()
        self.can_continue, self.can_step = cache.gathers, cache.steps
        self.fingerprint: ModelFingerprint | None = None

    def mark_as_own(self) -> None:
        """Declare that sparsort loaded this model by its name and has not passed it to other code, as `row_cache` requires.

        `fingerprint` then reveals later edits, except for those that torch does not count (see `fingerprint`).
        """
        self.fingerprint = ModelFingerprint(self.loaded.model)

    @property
    def max_length(self) -> int | None:
        """The context length in the configuration of the model, in tokens; None if it has none."""
        value = getattr(self.config, "max_position_embeddings", None)
        return int(value) if value else None

    def site(self, name: str) -> Site:
        """Find a site by its name (see `sites`) or `HEAD_INPUT`; a `SparsortError` if it does not have one state per token."""
        if name == HEAD_INPUT:
            return self.head_site
        if name == "pre_norm" and not (self.final_norm or self._block_gives_states):
            return Site(name=name, module=self.decoder, reads="output")
        site = find_site(name, blocks=self.blocks, final_norm=self.final_norm, hidden_size=self.hidden_size)
        if name not in self._checked_sites:
            self._check_site(site)
            self._checked_sites.add(name)
        return site

    @torch.inference_mode()
    def _check_site(self, site: Site) -> None:
        # A model may use the modules of a block in its own way, or not at all, so the site is read once.
        states, _ = self._forward(np.zeros((1, 2), dtype=np.int64), None, [site], keep=False)
        if site.name not in states:
            raise SparsortError(
                f"{self.loaded.name!r} does not use the module of site {site.name!r} ({type(site.module).__name__}). "
                f"{_other_site(site.name)}"
            )

    @property
    def head_site(self) -> Site:
        """The site of the states that the head reads.

        This is `post_norm` or, without a final norm, the output of the decoder. The latter is the output of the last block, or
        for a few models (OPT 350M) a projection of it.
        """
        if self.final_norm is not None:
            return self.site("post_norm")
        return Site(name=HEAD_INPUT, module=self.decoder, reads="output")

    @property
    def answer_sites(self) -> tuple[str, str]:
        """The names of the two sites where answers are read: `pre_norm`, and the site that the head reads."""
        return "pre_norm", self.head_site.name

    def width(self, site: Site) -> int:
        """The number of dimensions of the states at a site."""
        if site.reads == "output" or site.module is self.final_norm:
            return self.hidden_size
        # The input of a down projection, whose weight has the shape (width, hidden size) or its transpose.
        weight = next(site.module.parameters())
        return int(weight.numel() // self.hidden_size)

    def plan(self, ids: Sequence[Sequence[int]], *, max_depth: int | None = None) -> Plan:
        """Plan how `walk` runs these rows. `max_depth` limits the tokens of a shared head; None for no additional limit."""
        depth = _CHUNK if max_depth is None else min(max_depth, _CHUNK)
        limits = Limits(
            tokens=self.token_budget,
            kept=_KEPT_BATCHES * self.token_budget,
            depth=depth if self.can_continue else 0,
            alone_over=self._alone_over(),
        )
        return plan(ids, limits)

    @torch.inference_mode()
    def walk(self, ids: Sequence[Sequence[int]], plan: Plan, sites: Sequence[Site]) -> Iterator[StateChunk]:
        """Run every row and yield its states at the sites.

        Args:
            ids: token ids of every row, each at least one token.
            plan: the result of `plan` for the same rows.
            sites: the sites to read.
        """
        heads = None
        if plan.depth:
            caches = []
            for rows in plan.head_batches:
                states, cache = self._forward(plan.heads[rows], None, sites, keep=True)
                caches.append(cache)
                lengths = np.full(len(rows), plan.depth)
                yield StateChunk(rows=rows, start=0, lengths=lengths, states=states, is_head=True)
            heads = Heads(caches, plan.head_batches)
        for rows in plan.batches:
            shared = heads is not None and plan.head_of[rows[0]] >= 0
            cache = heads.gather(plan.head_of[rows], self.device) if heads is not None and shared else None
            skip = plan.depth if shared else 0
            if self._alone_over() is not None:
                # Dynamic rotary embeddings keep the frequencies of the longest row so far until they see a short row. A pass
                # over one token resets them.
                self._call(torch.tensor([[ids[rows[0]][0]]]))
            for offset, lengths, chunk, more in _chunks([ids[row][skip:] for row in rows], self.chunk):
                states, cache = self._forward(chunk, cache, sites, keep=more)
                yield StateChunk(rows=rows, start=skip + offset, lengths=lengths, states=states)

    @property
    def chunk(self) -> int | None:
        """The largest number of tokens of a row in one pass; None if this model can only run a row as a whole."""
        return _CHUNK if self.can_continue and self._alone_over() is None else None

    @property
    def depends_on_length(self) -> bool:
        """Whether the state of a token depends on the length of the whole text (some rotary embeddings)."""
        return self._alone_over() is not None

    def _alone_over(self) -> int | None:
        """The length above which a row must run alone, because its rotary embeddings change with the length; None if never."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
        if not any(part.get("rope_type") in _LENGTH_DEPENDENT_ROPE for part in kinds):
            return None
        # "longrope" changes its frequencies above the original context length, "dynamic" above the configured one. The smaller of
        # the two is safe for both.
        lengths = [part.get("original_max_position_embeddings") for part in kinds]
        return min([int(length) for length in [*lengths, self.max_length] if length], default=0)

    @contextmanager
    def catch(self, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
        """Record the states at the sites in all passes within the `with` block, as the modules pass them on."""
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
                    f"site {name!r} of {self.loaded.name!r} has states of shape {shape}; expected (batch, tokens, width), here "
                    f"({batch}, {width}, …). {_other_site(name)}"
                )
        return caught, getattr(result, "past_key_values", None) if keep else None

    def _call(self, ids_BT: Tensor, cache: Any = None, *, keep: bool = False) -> Any:
        return self.decoder(
            input_ids=ids_BT.to(self.device), past_key_values=cache, use_cache=keep or cache is not None
        )

    @torch.inference_mode()
    def _probe(self) -> tuple[nn.Module | None, bool, CacheUse]:
        """Run a few tokens to find out how the model works.

        Returns:
            The norm whose output is the last hidden state, whether the last block returns one state per token, and the uses of
            the cache.

        Raises:
            SparsortError: the model does not run on token ids alone, its states are not finite, or tokens see later tokens.
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
        # The final norm is the one whose output is the last hidden state, bit for bit.
        norms = [site.module for site in watched if _same(caught.get(site.name), whole_BTH)]
        shape = tuple(getattr(caught.get(last.name), "shape", ()))
        block_gives_states = shape in ((1, _PROBE, self.hidden_size), (_PROBE, self.hidden_size))
        # In a causal model, reversing the second half leaves the states of the first half unchanged.
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
        """Check that the forward pass of the model itself gives its blocks the token ids and nothing else."""
        model = self.loaded.model
        site = Site(name=HEAD_INPUT, module=self.decoder, reads="output")
        # The logits are not needed, and would take most of the time.
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with self.catch([site]) as caught:
            self._run_alone(lambda: model(input_ids=ids_BT, use_cache=False, **few))
        theirs = caught.get(HEAD_INPUT)
        # Only the last state is compared, because with `logits_to_keep=1` Gemma 4 computes no other.
        ours, same = whole_BTH[:, -1:], False
        if theirs is not None and theirs[:, -1:].shape == ours.shape:
            same = torch.allclose(theirs[:, -1:], ours, rtol=0.0, atol=rounding(whole_BTH))
        if not same:
            raise SparsortError(
                f"{self.loaded.name!r} ({type(model).__name__}) passes more than the token ids to its blocks, so the states "
                "of its blocks would differ from those of the model. Use a plain causal language model."
            )

    def _run_alone(self, run: Callable[[], Any]) -> Any:
        """Call a pass over token ids, and raise a `SparsortError` if the model does not run on them."""
        try:
            return run()
        except Exception as error:  # a model that needs images, audio or other states can raise any error
            raise SparsortError(
                f"{self.loaded.name!r} does not run on token ids alone ({first_line(error).rstrip('.')}). "
                "Use a causal language model of text."
            ) from error


def decoder_of(model: Any) -> Any:
    """The stack of blocks below the head, also if it is inside a multimodal wrapper."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        # ModernBERT returns the matrix of its head as its decoder.
        decoder = model.base_model
    # Some classes return themselves as their decoder. Their blocks are then in the attribute `model`.
    return model.model if decoder is model and isinstance(getattr(model, "model", None), nn.Module) else decoder


def sizes_of(config: Any, name: str) -> tuple[int, int, int]:
    """The hidden size, number of blocks and vocabulary size of a model; a `SparsortError` if its configuration lacks one."""
    sizes = {key: getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers", "vocab_size")}
    if missing := [key for key, size in sizes.items() if not isinstance(size, int)]:
        raise SparsortError(
            f"the configuration of {name!r} ({type(config).__name__}) has no {missing[0]}, so this architecture is not "
            "supported. Use another model, or a length or compression scorer."
        )
    return sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]  # type: ignore[return-value]


def _other_site(name: str) -> str:
    """The next step for a user whose model does not have this site."""
    return "Use another model, or a length or compression scorer." if name == "pre_norm" else "Use 'pre_norm'."


def _same(output: Any, last: Tensor) -> bool:
    return (
        isinstance(output, Tensor) and output.numel() == last.numel() and torch.equal(output.reshape(last.shape), last)
    )


def _chunks(
    tails: list[Sequence[int]], most: int | None
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], bool]]:
    """Yield (offset, real lengths (B,), padded ids (B, T), whether more follows) of a batch, with T at most `most`."""
    lengths = np.array([len(tail) for tail in tails], dtype=np.int64)
    longest = int(lengths.max())
    step = most or longest
    for offset in range(0, longest, step):
        width = min(step, longest - offset)
        # Each row is padded with its own last token. The embedding of a padding token may be NaN, and 0 · NaN in attention is
        # NaN.
        chunk = np.array([tail[-1] for tail in tails], dtype=np.int64)[:, None].repeat(width, axis=1)
        for row, tail in enumerate(tails):
            part = tail[offset : offset + width]
            chunk[row, : len(part)] = part
        yield offset, np.clip(lengths - offset, 0, width), chunk, offset + width < longest


def _hook(site: Site, caught: dict[str, Tensor]) -> Any:
    def keep_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught[site.name] = args[0] if args else next(iter(kwargs.values()))

    def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
        # A block returns its states alone, or as the first element of a tuple or list. The decoder returns an output object.
        output = getattr(output, "last_hidden_state", output)
        caught[site.name] = output[0] if isinstance(output, tuple | list) else output

    if site.reads == "input":
        return site.module.register_forward_pre_hook(keep_input, with_kwargs=True)
    return site.module.register_forward_hook(keep_output)


def _culprits(model: nn.Module) -> str:
    """The cause of states that are not finite, and the next step."""
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if not bad:
        return "Its weights are finite, so the arithmetic overflows: try dtype='float32' (--dtype float32)."
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"Weights with NaN or infinity: {', '.join(bad[:3])}{more}. Copy or download the checkpoint again."
