"""Computes log-probabilities of given answers after a prompt, and features of the state of the prompt's last token.

Contract: `log_p[q, l]` is the sum of the log-probabilities, in nats, of the tokens of answer l after the prefix and query q. It
equals that of a plain forward pass over the whole text (to 1e-3 in fp32). The rule "continuation" (`token_tree`) determines the
tokens of an answer from the prompt and that answer, so no number depends on the other answers or queries of a call. The features
are those of the last token of the prompt. The keys and values of the prefix are computed once, all answers of a query share one
stem, and the head runs only at the positions that predict scored tokens. A query thus costs its own tokens, where OpenICL's
perplexity inferencer runs |L| whole prompts per query.

Shape suffixes: Q queries, L answers, F features, N states, B rows and T tokens of a batch, H width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.backend import sparsity_rows
from sparsort.kernels.sparsity.metrics import METRICS
from sparsort.scoring.answers.prefix import Block, PrefixReader
from sparsort.scoring.answers.prefix_attention import Prefix
from sparsort.scoring.answers.token_tree import Passage, TokenTree, TreeEncoder
from sparsort.scoring.loading.load import LoadedModel
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.head import Head
from sparsort.scoring.prompts.prompt import Encoder

# The number of positions whose states go through the head together.
_POSITIONS_AT_ONCE = 512

# The default token budget of a compiled model on a CPU. It is larger than without compiling, because fused steps have fewer
# intermediate results that must fit into the processor's cache.
_COMPILED_BUDGET = 2048

SITES = ("pre_norm", "post_norm")
# The columns of `FEATURES` with the metrics of the state after the final norm.
POST_NORM = slice(len(METRICS), 2 * len(METRICS))
FEATURES: tuple[str, ...] = (*(f"{site}/{metric}" for site in SITES for metric in METRICS), "entropy")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The results for Q queries and L answers.

    Attributes:
        log_p: (Q, L) summed log-probabilities in nats.
        n_tokens: (Q, L) scored tokens of each answer.
        features: (Q, F) features of each query's last state, in the order of `FEATURES`: the sparsity metrics at each site,
            NaN where a state has none, and the entropy in nats of the next token.
        tokens_read: the number of tokens that were run, without padding.
    """

    log_p: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    features: NDArray[np.float64]
    tokens_read: int


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Passages as one padded block; for the attributes see `PrefixReader.read`."""

    ids_BT: Tensor
    offset_BT: Tensor | None
    visible_BTT: Tensor | None


class AnswerReader:
    """Scores answers with one loaded model.

    Args:
        loaded: the model.
        token_budget: tokens of one batch; None for the device's default.
        chat: whether texts come from a chat template, which adds the special tokens itself.
        compile: fuse the steps between matrix products (`fused`), which is faster after half a minute of compiling.

    Raises:
        SparsortError: the model cannot be compiled here.
    """

    def __init__(
        self, loaded: LoadedModel, *, token_budget: int | None = None, chat: bool = False, compile: bool = False
    ) -> None:
        self.loaded = loaded
        # A GPU has a larger default, which compiling does not change.
        if compile and token_budget is None and loaded.device.value.type == "cpu":
            token_budget = _COMPILED_BUDGET
        self.backbone = Backbone(loaded, token_budget=token_budget)
        self.reader = PrefixReader(self.backbone, sites=self.backbone.answer_sites, compile=compile)
        self.head = Head(loaded.model, self.backbone.config, loaded.name, compile=self.reader.compiled)
        self.encoder = Encoder(loaded.tokenizer, max_length=None, chat=chat)
        self.trees = TreeEncoder(self.encoder)

    @property
    def implementation(self) -> str:
        """How prompts are run, and the reason if they are run whole."""
        why_not = self.reader.why_not
        return f"whole prompts: {why_not}" if why_not else "queries after shared prefixes"

    def answers(self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str]) -> Answers:
        """Compute the log-probability of every answer after every query.

        Args:
            chunks: the prefix, the text before every query, split where other prefixes may diverge from it (instruction and
                demonstrations, each with its separator); empty for no prefix.
            queries: Q texts, each appended to the prefix unchanged.
            answers: L texts, each appended to the query unchanged; include the space at the beginning. Whitespace at the end of
                a query is scored with the answer.

        Raises:
            SparsortError: an empty answer, no queries, or a prompt longer than the model's context.
        """
        if not queries:
            raise SparsortError("there are no queries to answer. Give at least one.")
        tree = self.token_tree(chunks, queries, answers).shared()
        before = self.reader.n_tokens
        if self.backbone.depends_on_length:
            # The states of a stem depend on the length of the text, so the query and each answer are read separately.
            no_answers, features = self._score(tree.of_queries(), 0)
            columns = [self._score(tree.of_answer(number), 1)[0] for number in range(len(answers))]
            log_p = np.concatenate([no_answers, *columns], axis=1)
        else:
            log_p, features = self._score(tree, len(answers))
        return Answers(
            log_p=log_p,
            n_tokens=tree.answer_lengths(len(answers)),
            features=features,
            tokens_read=self.reader.n_tokens - before,
        )

    def continuations(
        self, chunks: Sequence[str], openings: Sequence[str], texts: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Compute the loss on each query's own text after a prefix, as ConE does (arXiv 2401.12087).

        Every token that contains a character of the text is scored, and no whitespace before the text.

        Args:
            chunks: see `answers`.
            openings: Q texts between the prefix and the scored text: the words of the template, or "" for none.
            texts: Q texts to score, each appended to its opening unchanged.

        Returns:
            (Q,) summed negative log-likelihoods in nats, and (Q,) numbers of scored tokens.

        Raises:
            SparsortError: see `answers`; or there is no token before a text, from which its first token could be predicted.
        """
        if len(openings) != len(texts):
            raise SparsortError(f"there are {len(openings)} openings and {len(texts)} texts; give one for each.")
        if not texts:
            raise SparsortError("there are no texts to score. Give at least one.")
        tree = None if any(openings) else self._bare_tree(chunks, texts)
        if tree is None:
            # The first scored token needs one before it. Without an opening, that is the last token of the last chunk.
            lead = "" if all(openings) or not chunks else chunks[-1]
            shared = chunks[: len(chunks) - bool(lead)]
            tree = self.token_tree(shared, [lead + opening for opening in openings], texts, own=True)
        return -self._score(tree, 1)[0][:, 0], tree.answer_lengths(1)[:, 0]

    def token_tree(
        self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str], *, own: bool = False, room: int = 0
    ) -> TokenTree:
        """Encode a prefix, queries and answers.

        Args:
            chunks, queries, answers: see `answers`; no answers for stems alone.
            own: whether there is one answer per query, the query's own text.
            room: tokens that will be generated after each query.

        Raises:
            SparsortError: see `answers`.
        """
        segments = self.trees.segments(chunks) if self.reader.why_not is None else None
        shared = list(chunks) if segments else []
        texts = list(queries) if segments or not chunks else ["".join(chunks) + query for query in queries]
        if own:
            passages = [
                self.trees.passages(shared, [text], [own_text], own=True)[0]
                for text, own_text in zip(texts, answers, strict=True)
            ]
        else:
            passages = self.trees.passages(shared, texts, answers)
        tree = TokenTree(segments=segments or [], passages=passages)
        self._check_length(tree, room)
        return tree

    def _bare_tree(self, chunks: Sequence[str], texts: Sequence[str]) -> TokenTree | None:
        """Encode texts that directly follow a prefix; None if there is no prefix, or if it cannot be tokenised in chunks.

        The last token of the prefix becomes the stem of every text, because its state predicts the first token of the text.
        """
        segments = self.trees.segments(chunks) if self.reader.why_not is None else None
        if not segments:
            return None
        *before, (*most, last) = segments
        passages = []
        for text, passage in zip(texts, self.trees.passages(chunks, texts, ()), strict=True):
            if passage.whole:
                (cut,) = self.trees.passages((), ["".join(chunks)], [text], own=True)
                passages.append(replace(cut, whole=True))
            else:
                passages.append(Passage(stem=(last,), branches=(passage.stem,), starts=(1,)))
        tree = TokenTree(segments=[*before, *([tuple(most)] if most else [])], passages=passages)
        self._check_length(tree, 0)
        return tree

    def _check_length(self, tree: TokenTree, room: int) -> None:
        limit = self.backbone.max_length
        if limit is None:
            return
        n_prefix = sum(map(len, tree.segments))
        for passage in tree.passages:
            length = (0 if passage.whole else n_prefix) + len(passage.stem) + room
            length += max(map(len, (passage.rest, *passage.branches)))
            if length > limit:
                written = f", and {room} more may be written" if room else ""
                fewer = ", or a smaller max_new_tokens" if room else ""
                raise SparsortError(
                    f"a prompt has {length - room} tokens, {n_prefix} of them demonstrations{written}; {self.loaded.name!r} was "
                    f"made for {limit}. Use fewer shots or shorter demonstrations{fewer}."
                )

    def _score(self, tree: TokenTree, n_answers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Run the queries and answers; returns log-probabilities, (Q, L), and features, (Q, F)."""
        gathered = _Gathered(tree.passages, self.backbone.head_site.name)
        for segments, places in tree.groups():
            self._read(segments, tree.passages, places, gathered)
        return self._finish(gathered, n_answers)

    def _read(
        self, segments: Sequence[Sequence[int]], passages: Sequence[Passage], places: Sequence[int], gathered: _Gathered
    ) -> None:
        """Gather the states of the passages `places`, which all follow one prefix."""
        if self.reader.why_not is not None:
            self._read_whole(passages, places, gathered)
            return
        for rows, block in self.blocks(self.reader.prefix(segments), passages, places):
            gathered.take(rows, block.states)

    def blocks(
        self, prefix: Prefix, passages: Sequence[Passage], places: Sequence[int]
    ) -> Iterator[tuple[list[int], Block]]:
        """Run the passages `places` after a prefix, the longest first; yields the places of a batch and its `Block`."""
        order = sorted(places, key=lambda place: -passages[place].n_tokens)
        begin = 0
        while begin < len(order):
            rows = order[begin : begin + max(self.backbone.token_budget // passages[order[begin]].n_tokens, 1)]
            batch = _padded_batch([passages[row] for row in rows], self.backbone.device)
            block = self.reader.read(prefix, batch.ids_BT, offset_BT=batch.offset_BT, visible_BTT=batch.visible_BTT)
            # `read` counts padding too, which is subtracted.
            self.reader.n_tokens -= batch.ids_BT.numel() - sum(passages[row].n_tokens for row in rows)
            yield rows, block
            begin += len(rows)

    def _read_whole(self, passages: Sequence[Passage], places: Sequence[int], gathered: _Gathered) -> None:
        """Gather the states with a model that reads whole texts only, where every answer is a separate text."""
        # (passage, index of the chain's first token among those of a pass, ids of stem and chain), one per text.
        texts = []
        for row in places:
            stem, chains = passages[row].stem, passages[row].chains
            # Passages number the tokens of all chains of a pass, and here each chain is in a text of its own.
            begins = itertools.accumulate(map(len, chains), initial=len(stem))
            run = [(row, begin, [*stem, *chain]) for begin, chain in zip(begins, chains, strict=False) if chain]
            texts += run or [(row, len(stem), [*stem])]
        ids = [text for _, _, text in texts]
        # A shared head must end before the first token whose state is read.
        plan = self.backbone.plan(ids, max_depth=min(passages[row].first for row in places))
        for piece in self.backbone.walk(ids, plan, self.reader.sites):
            self.reader.n_tokens += int(piece.lengths.sum())
            if piece.is_head:
                continue
            for number, text in enumerate(piece.rows.tolist()):
                row, chain, _ = texts[text]
                length = len(passages[row].stem)
                for token in gathered.wanted[row]:
                    # A token after the stem is in this text only if it is in this text's chain.
                    at = (token if token < length else token - chain + length) - piece.start
                    if (token < length or token >= chain) and 0 <= at < piece.lengths[number]:
                        gathered.put(row, token, {site: block[number, at] for site, block in piece.states.items()})

    def _finish(self, gathered: _Gathered, n_answers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Apply the head and the metrics to the gathered states; returns log-probabilities, (Q, L), and features, (Q, F)."""
        # One state can predict the first token of several answers, and goes through the head once.
        place = {key: number for number, key in enumerate(gathered.last)}
        last_NH = torch.stack(list(gathered.last.values()))
        normaliser_N, entropy_N = self._normalisers(last_NH)
        rows, answers, tokens, before = gathered.scored(place)
        log_p = np.zeros((len(gathered.ends), n_answers))
        if len(rows):
            # log p of a token is its logit minus the normaliser of its position, log Σ exp(logits).
            np.add.at(log_p, (rows, answers), self._of_tokens(last_NH[before], tokens) - normaliser_N[before])
        ends = [place[row, end] for row, end in enumerate(gathered.ends)]
        states = {site: torch.stack(rows) for site, rows in gathered.sites.items()}
        return log_p, self._features(states, entropy_N[ends])

    def features(self, states: dict[str, Tensor]) -> NDArray[np.float64]:
        """Compute the features of states, site → (Q, H); returns (Q, F) in the order of `FEATURES`."""
        return self._features(states, self._normalisers(states[self.backbone.head_site.name])[1])

    def _features(self, states: dict[str, Tensor], entropy_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        features = np.full((len(entropy_Q), len(FEATURES)), np.nan)
        for site, states_QH in states.items():
            # In a model without a final norm, the states that the head reads have another site and no metrics.
            if site not in SITES:
                continue
            start = SITES.index(site) * len(METRICS)
            features[:, start : start + len(METRICS)] = sparsity_rows(states_QH).values_NM.double().cpu().numpy()
        features[:, -1] = entropy_Q
        return features

    def _of_tokens(self, states_NH: Tensor, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        targets_N = torch.from_numpy(targets).to(states_NH.device)
        parts = zip(torch.split(states_NH, _POSITIONS_AT_ONCE), torch.split(targets_N, _POSITIONS_AT_ONCE), strict=True)
        logits = torch.cat([self.head.of_tokens(states, part) for states, part in parts])
        return np.asarray(logits.double().cpu().numpy())

    def _normalisers(self, states_NH: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        parts = [self.head.normalisers(part) for part in torch.split(states_NH, _POSITIONS_AT_ONCE)]
        return tuple(torch.cat(side).double().cpu().numpy() for side in zip(*parts, strict=True))  # type: ignore[return-value]


class _Gathered:
    """Collects the states for the head and the metrics: those of tokens before scored tokens, and of the ends of queries.

    A state is identified by (row, token): the number of its passage, and the index of its token among those of a pass.

    Attributes:
        ends: each row's last token of the query.
        wanted: each row's tokens whose states are needed, ascending.
        sites: site → each row's state of the last token of the query.
        last: (row, token) → the state that the head reads.
    """

    def __init__(self, passages: Sequence[Passage], head_site: str) -> None:
        self._head_site = head_site
        self.ends = [passage.end for passage in passages]
        self._scored = [list(passage.scored()) for passage in passages]
        self.wanted = [
            sorted({end, *(before for _, before, _ in scored)})
            for end, scored in zip(self.ends, self._scored, strict=True)
        ]
        self.sites: dict[str, list[Tensor]] = {}
        self.last: dict[tuple[int, int], Tensor] = {}

    def put(self, row: int, token: int, states: dict[str, Tensor]) -> None:
        """Copy the states of one token."""
        # A view would keep the states of its whole batch in memory.
        if token == self.ends[row]:
            for site, state in states.items():
                self.sites.setdefault(site, [state] * len(self.ends))[row] = state.clone()
        self.last[row, token] = states[self._head_site].clone()

    def take(self, rows: Sequence[int], states: dict[str, Tensor]) -> None:
        """Copy the wanted states of a batch that `_padded_batch` made."""
        for number, row in enumerate(rows):
            for token in self.wanted[row]:
                self.put(row, token, {site: block[number, token] for site, block in states.items()})

    def scored(
        self, place: dict[tuple[int, int], int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return row, answer and id of every scored token, and the place of the state that predicts it, (N,) each."""
        columns = [
            (row, answer, token, place[row, before])
            for row, scored in enumerate(self._scored)
            for answer, before, token in scored
        ]
        array = np.array(columns, dtype=np.int64).reshape(-1, 4)
        return array[:, 0], array[:, 1], array[:, 2], array[:, 3]


def _padded_batch(passages: Sequence[Passage], device: torch.device) -> _Batch:
    """Make one row per passage: its stem, followed by all of its chains."""
    width = max(passage.n_tokens for passage in passages)
    # The padding repeats a token of the row: the embedding of a padding token may be NaN, and 0 · NaN is NaN in attention.
    ids = np.array([passage.stem[-1] for passage in passages], dtype=np.int64)[:, None].repeat(width, axis=1)
    # With at most one chain per row, causality alone is the right mask.
    plain = all(sum(map(bool, passage.chains)) <= 1 for passage in passages)
    for number, passage in enumerate(passages):
        flat = [*passage.stem, *(token for chain in passage.chains for token in chain)]
        ids[number, : len(flat)] = flat
    if plain:
        return _Batch(ids_BT=torch.from_numpy(ids).to(device), offset_BT=None, visible_BTT=None)
    offset = np.arange(width)[None].repeat(len(passages), axis=0)
    visible = np.tril(np.ones((width, width), dtype=bool))[None].repeat(len(passages), axis=0)
    for number, passage in enumerate(passages):
        stem = len(passage.stem)
        begin = stem
        for length in map(len, passage.chains):
            # Every chain has the positions right after the stem, and does not see the chains before it.
            offset[number, begin : begin + length] = np.arange(stem, stem + length)
            visible[number, begin : begin + length, stem:begin] = False
            begin += length
    return _Batch(
        ids_BT=torch.from_numpy(ids).to(device),
        offset_BT=torch.from_numpy(offset).to(device),
        visible_BTT=torch.from_numpy(visible).to(device),
    )
