"""What a model answers: log-probabilities of given answers behind a prompt, and what the query's last state looks like.

Contract: `log_p[q, l]` is the sum of the log-probabilities, in nats, of the tokens of answer l after prompt and query q, as a
plain forward pass over the whole text gives it (to 1e-3 in fp32). Which tokens are the answer's follows the rule "continuation"
(`token_tree`) from the prompt and that answer, so neither the other answers nor the other queries of a call change a number;
the features are those of the prompt's own last token. The prefix's keys and values are computed once, all answers of a query
share one stem, and the head runs at their positions alone.

Sources of the cost: OpenICL's perplexity inferencer runs |L| whole prompts a query; here a query costs its own tokens.
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
from sparsort.scoring.answers.prefix import Block, Prefix, PrefixReader
from sparsort.scoring.answers.token_tree import Layout, Passage, TreeEncoder
from sparsort.scoring.loading.load import LoadedModel
from sparsort.scoring.model.backbone import Backbone
from sparsort.scoring.model.head import Head
from sparsort.scoring.prompts.prompt import Encoder

# Positions whose states go through the head together.
_POSITIONS_AT_ONCE = 512

# Tokens of one batch of a compiled model on a CPU: it leaves less between the products for the cache to hold.
_COMPILED_BUDGET = 2048

SITES = ("pre_norm", "post_norm")
# Where the metrics of the state after the final norm stand among the features.
POST_NORM = slice(len(METRICS), 2 * len(METRICS))
FEATURES: tuple[str, ...] = (*(f"{site}/{metric}" for site in SITES for metric in METRICS), "entropy")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was read for Q queries and L answers.

    Attributes:
        log_p: (Q, L) summed log-probabilities in nats.
        n_tokens: (Q, L) scored tokens of each answer.
        features: (Q, F) of the query's last state, in the order of `FEATURES`: the metrics of sparsity at each site, and
            the entropy in nats of the next token; NaN where a state has no metric.
        tokens_read: tokens that were run for it, padding left out.
    """

    log_p: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    features: NDArray[np.float64]
    tokens_read: int


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Passages as one padded block: ids, positions behind the prefix, and who sees whom (None: all that stands before)."""

    ids_BT: Tensor
    offset_BT: Tensor | None
    visible_BTT: Tensor | None


class AnswerReader:
    """Reads answers with one loaded model.

    Args:
        loaded: the model.
        token_budget: tokens of one batch; None for the device's default.
        chat: texts come from a chat template, which puts the special tokens itself.
        compile: fuse the steps between matrix products (`fused`): faster, after half a minute of compiling.

    Raises:
        SparsortError: the model cannot be compiled here.
    """

    def __init__(
        self, loaded: LoadedModel, *, token_budget: int | None = None, chat: bool = False, compile: bool = False
    ) -> None:
        self.loaded = loaded
        if compile and token_budget is None and loaded.device.value.type == "cpu":
            token_budget = _COMPILED_BUDGET
        self.backbone = Backbone(loaded, token_budget=token_budget)
        self.reader = PrefixReader(self.backbone, sites=self.backbone.answer_sites, compile=compile)
        self.head = Head(loaded.model, self.backbone.config, loaded.name, compile=self.reader.compiled)
        self.encoder = Encoder(loaded.tokenizer, max_length=None, chat=chat)
        self.trees = TreeEncoder(self.encoder)

    @property
    def implementation(self) -> str:
        """How prompts are run, with the reason."""
        why_not = self.reader.why_not
        return f"whole prompts: {why_not}" if why_not else "queries after shared prefixes"

    def answers(self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str]) -> Answers:
        """Log-probabilities of every answer behind every query.

        Args:
            chunks: what stands in front of every query, in parts at whose borders other prefixes may part from it
                (instruction, demonstrations, each with its separator); none for no prefix.
            queries: Q texts, each joined to the prefix as it stands.
            answers: L texts, each joined to the query as it stands (begin it with a space where one belongs). Whitespace that
                ends a query is scored with the answer.

        Raises:
            SparsortError: an empty answer, no queries, or a prompt longer than the model's context.
        """
        if not queries:
            raise SparsortError("there are no queries to answer. Give at least one.")
        layout = self.lay_out(chunks, queries, answers).shared()
        before = self.reader.n_tokens
        if self.backbone.depends_on_length:
            # Of one stem the states differ with what follows it: the query and each of its answers are read by themselves.
            nothing, features = self._score(layout.of_queries(), 0)
            columns = [self._score(layout.of_answer(number), 1)[0] for number in range(len(answers))]
            log_p = np.concatenate([nothing, *columns], axis=1)
        else:
            log_p, features = self._score(layout, len(answers))
        return Answers(
            log_p=log_p,
            n_tokens=layout.answer_lengths(len(answers)),
            features=features,
            tokens_read=self.reader.n_tokens - before,
        )

    def continuations(
        self, chunks: Sequence[str], openings: Sequence[str], texts: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Loss on each query's own text after a prefix, as ConE takes it (arXiv 2401.12087).

        Scored is every token that holds a character of the text, and no whitespace in front of it.

        Args:
            chunks: as `answers`.
            openings: Q texts that stand between the prefix and what is scored: the template's words, or "" for none.
            texts: Q texts to score, each joined to its opening as it stands.

        Returns:
            (Q,) summed negative log-likelihoods in nats, and (Q,) tokens.

        Raises:
            SparsortError: as `answers`; or nothing stands before a text, so that its first token is predicted from nothing.
        """
        if len(openings) != len(texts):
            raise SparsortError(f"there are {len(openings)} openings and {len(texts)} texts; give one for each.")
        if not texts:
            raise SparsortError("there are no texts to score. Give at least one.")
        layout = None if any(openings) else self._lay_out_bare(chunks, texts)
        if layout is None:
            # The first token needs one before it: where no opening gives it, the last demonstration does.
            lead = "" if all(openings) or not chunks else chunks[-1]
            shared = chunks[: len(chunks) - bool(lead)]
            layout = self.lay_out(shared, [lead + opening for opening in openings], texts, own=True)
        return -self._score(layout, 1)[0][:, 0], layout.answer_lengths(1)[:, 0]

    def lay_out(
        self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str], *, own: bool = False, room: int = 0
    ) -> Layout:
        """Texts as ids: what queries share in front, and each one's own.

        Args:
            chunks, queries, answers: as `answers`; no answers for stems alone.
            own: there is one answer for each query, its own text.
            room: tokens that are to be written behind each query.

        Raises:
            SparsortError: as `answers`.
        """
        segments = self.trees.segments(chunks) if self.reader.why_not is None else None
        shared = list(chunks) if segments else []
        texts = list(queries) if segments or not chunks else ["".join(chunks) + query for query in queries]
        if own:
            passages = [
                self.trees.passages(shared, [text], [mine], own=True)[0]
                for text, mine in zip(texts, answers, strict=True)
            ]
        else:
            passages = self.trees.passages(shared, texts, answers)
        layout = Layout(segments=segments or [], passages=passages)
        self._check_length(layout, room)
        return layout

    def _lay_out_bare(self, chunks: Sequence[str], texts: Sequence[str]) -> Layout | None:
        """Texts right after a prefix, whose last token is every stem; None where there is no prefix that can be cut."""
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
        layout = Layout(segments=[*before, *([tuple(most)] if most else [])], passages=passages)
        self._check_length(layout, 0)
        return layout

    def _check_length(self, layout: Layout, room: int) -> None:
        limit = self.backbone.max_length
        if limit is None:
            return
        n_prefix = sum(map(len, layout.segments))
        for passage in layout.passages:
            length = (0 if passage.whole else n_prefix) + len(passage.stem) + room
            length += max(map(len, (passage.rest, *passage.branches)))
            if length > limit:
                written = f", and {room} more may be written" if room else ""
                fewer = ", or a smaller max_new_tokens" if room else ""
                raise SparsortError(
                    f"a prompt has {length - room} tokens, {n_prefix} of them demonstrations{written}; {self.loaded.name!r} was "
                    f"made for {limit}. Use fewer shots or shorter demonstrations{fewer}."
                )

    def _score(self, layout: Layout, n_answers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(Q, L) log-probabilities and (Q, F) features."""
        gathered = _Gathered(layout.passages, self.backbone.head_site.name)
        for segments, places in layout.groups():
            self._read(segments, layout.passages, places, gathered)
        return self._finish(gathered, n_answers)

    def _read(
        self,
        segments: Sequence[Sequence[int]],
        passages: Sequence[Passage],
        places: Sequence[int],
        gathered: _Gathered,
    ) -> None:
        """Gather the states of the rows `places`, all behind one prefix."""
        if self.reader.why_not is not None:
            self._read_whole(passages, places, gathered)
            return
        for rows, block in self.blocks(self.reader.prefix(segments), passages, places):
            gathered.take(rows, block.states)

    def blocks(
        self, prefix: Prefix, passages: Sequence[Passage], places: Sequence[int]
    ) -> Iterator[tuple[list[int], Block]]:
        """Run the passages `places` after a prefix, the longest first: which they are, and what the pass made of them."""
        order = sorted(places, key=lambda place: -passages[place].n_tokens)
        begin = 0
        while begin < len(order):
            rows = order[begin : begin + max(self.backbone.token_budget // passages[order[begin]].n_tokens, 1)]
            batch = _tree([passages[row] for row in rows], self.backbone.device)
            block = self.reader.read(prefix, batch.ids_BT, offset_BT=batch.offset_BT, visible_BTT=batch.visible_BTT)
            # Padding is not counted.
            self.reader.n_tokens -= batch.ids_BT.numel() - sum(passages[row].n_tokens for row in rows)
            yield rows, block
            begin += len(rows)

    def _read_whole(self, passages: Sequence[Passage], places: Sequence[int], gathered: _Gathered) -> None:
        """The same for a model that reads whole texts only: every answer is a text of its own."""
        texts = []
        for row in places:
            stem, chains = passages[row].stem, passages[row].chains
            begins = itertools.accumulate(map(len, chains), initial=len(stem))
            run = [(row, begin, [*stem, *chain]) for begin, chain in zip(begins, chains, strict=False) if chain]
            texts += run or [(row, len(stem), [*stem])]
        ids = [text for _, _, text in texts]
        # No shared head is cut into the tokens whose states are read.
        plan = self.backbone.plan(ids, max_depth=min(passages[row].first for row in places))
        for piece in self.backbone.walk(ids, plan, self.reader.sites):
            self.reader.n_tokens += int(piece.lengths.sum())
            if piece.is_head:
                continue
            for number, text in enumerate(piece.rows.tolist()):
                row, chain, _ = texts[text]
                length = len(passages[row].stem)
                for token in gathered.wanted[row]:
                    # Tokens of other chains are read in other texts.
                    at = (token if token < length else token - chain + length) - piece.start
                    if (token < length or token >= chain) and 0 <= at < piece.lengths[number]:
                        gathered.put(row, token, {site: block[number, at] for site, block in piece.states.items()})

    def _finish(self, gathered: _Gathered, n_answers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(Q, L) log-probabilities and (Q, F) features."""
        place = {key: number for number, key in enumerate(gathered.last)}
        last_NH = torch.stack(list(gathered.last.values()))
        normaliser_N, entropy_N = self._normalisers(last_NH)
        rows, answers, tokens, before = gathered.scored(place)
        log_p = np.zeros((len(gathered.ends), n_answers))
        if len(rows):
            np.add.at(log_p, (rows, answers), self._of_tokens(last_NH[before], tokens) - normaliser_N[before])
        ends = [place[row, end] for row, end in enumerate(gathered.ends)]
        states = {site: torch.stack(held) for site, held in gathered.sites.items()}
        return log_p, self._features(states, entropy_N[ends])

    def features(self, states: dict[str, Tensor]) -> NDArray[np.float64]:
        """(Q, F) features of states, site → (Q, width), in the order of `FEATURES`."""
        return self._features(states, self._normalisers(states[self.backbone.head_site.name])[1])

    def _features(self, states: dict[str, Tensor], entropy_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        features = np.full((len(entropy_Q), len(FEATURES)), np.nan)
        for site, states_QH in states.items():
            if site not in SITES:  # what the head reads, in a model without a final norm
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
    """States that the head and the metrics are to read: those before scored tokens, and those at the ends of queries.

    A state is known by its row and by which of the row's tokens it belongs to, in the order in which a pass runs them.

    Attributes:
        ends: each row's last token of the query.
        wanted: each row's tokens whose states are read.
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
        """Take copies of the states of one token."""
        # Copies: a view would keep the states of its whole batch.
        if token == self.ends[row]:
            for site, state in states.items():
                self.sites.setdefault(site, [state] * len(self.ends))[row] = state.clone()
        self.last[row, token] = states[self._head_site].clone()

    def take(self, rows: Sequence[int], states: dict[str, Tensor]) -> None:
        """Take what is wanted from a block of `_tree`."""
        for number, row in enumerate(rows):
            for token in self.wanted[row]:
                self.put(row, token, {site: block[number, token] for site, block in states.items()})

    def scored(
        self, place: dict[tuple[int, int], int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows, answers and tokens of all that is scored, and the places of the states that predict them."""
        columns = [
            (row, answer, token, place[row, before])
            for row, scored in enumerate(self._scored)
            for answer, before, token in scored
        ]
        array = np.array(columns, dtype=np.int64).reshape(-1, 4)
        return array[:, 0], array[:, 1], array[:, 2], array[:, 3]


def _tree(chosen: Sequence[Passage], device: torch.device) -> _Batch:
    """Stems, each with its chains after it, as rows of one block."""
    width = max(passage.n_tokens for passage in chosen)
    # Padded with the row's own last token: a padding token's embedding may be NaN, and 0 · NaN is NaN in attention.
    ids = np.array([passage.stem[-1] for passage in chosen], dtype=np.int64)[:, None].repeat(width, axis=1)
    # One chain a row needs no mask.
    plain = all(sum(map(bool, passage.chains)) <= 1 for passage in chosen)
    for number, passage in enumerate(chosen):
        flat = [*passage.stem, *(token for chain in passage.chains for token in chain)]
        ids[number, : len(flat)] = flat
    if plain:
        return _Batch(ids_BT=torch.from_numpy(ids).to(device), offset_BT=None, visible_BTT=None)
    offset = np.arange(width)[None].repeat(len(chosen), axis=0)
    visible = np.tril(np.ones((width, width), dtype=bool))[None].repeat(len(chosen), axis=0)
    for number, passage in enumerate(chosen):
        stem = len(passage.stem)
        at = stem
        for length in map(len, passage.chains):
            offset[number, at : at + length] = np.arange(stem, stem + length)
            visible[number, at : at + length, stem:at] = False
            at += length
    return _Batch(
        ids_BT=torch.from_numpy(ids).to(device),
        offset_BT=torch.from_numpy(offset).to(device),
        visible_BTT=torch.from_numpy(visible).to(device),
    )
