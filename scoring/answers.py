"""What a model answers: log-probabilities of given answers behind a prompt, and what the query's last state looks like.

Contract: `log_p[q, l]` is the sum of the log-probabilities, in nats, of the tokens of answer l behind prompt and query q, as a
plain forward pass over the whole text gives it (to 1e-3 in fp32). The prefix's keys and values are computed once, all answers
of a query hang on one stem, and the head runs at their positions alone.

Sources of the cost: OpenICL's perplexity inferencer runs |L| whole prompts a query; here a query costs its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.backend import sparsity_rows
from sparsort.kernels.sparsity.names import METRICS
from sparsort.scoring.backbone import Backbone
from sparsort.scoring.branches import Layout, Passage, TreeEncoder
from sparsort.scoring.heads import Head
from sparsort.scoring.loading import LoadedModel
from sparsort.scoring.prefixes import Block, Prefix, PrefixReader
from sparsort.scoring.prompts import Encoder

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
        n_tokens: (Q, L) tokens of each answer.
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
        sites = SITES if self.backbone.final_norm is not None else SITES[:1]
        self.reader = PrefixReader(self.backbone, sites=sites, compile=compile)
        self.head = Head(loaded.model, self.backbone.config, loaded.name, compile=self.reader.compiled)
        self.encoder = Encoder(loaded.tokenizer, max_length=None, chat=chat)
        self.trees = TreeEncoder(self.encoder)

    @property
    def implementation(self) -> str:
        """How prompts are run, with the reason."""
        why_not = self.reader.why_not
        return f"whole prompts: {why_not}" if why_not else "queries behind shared prefixes"

    def answers(self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str]) -> Answers:
        """Log-probabilities of every answer behind every query.

        Args:
            chunks: what stands in front of every query, in parts at whose borders other prefixes may part from it
                (instruction, demonstrations, each with its separator); none for no prefix.
            queries: Q texts, each joined to the prefix as it stands.
            answers: L texts, each joined to the query as it stands (begin it with a space where one belongs).

        Raises:
            SparsortError: an empty answer, no queries, or a prompt longer than the model's context.
        """
        if not queries:
            raise SparsortError("there are no queries to answer. Give at least one.")
        layout = self.lay_out(chunks, queries, answers).shared()
        before = self.reader.n_tokens
        gathered = _Gathered(layout.passages)
        for segments, places in layout.groups():
            self._read(segments, layout.passages, places, gathered)
        log_p, features = self._finish(gathered, len(answers))
        return Answers(
            log_p=log_p,
            n_tokens=layout.answer_lengths(len(answers)),
            features=features,
            tokens_read=self.reader.n_tokens - before,
        )

    def continuations(
        self, chunks: Sequence[str], openings: Sequence[str], texts: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Loss on each query's own text behind a prefix, as ConE takes it (arXiv 2401.12087).

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
        gathered = _Gathered(layout.passages)
        for segments, places in layout.groups():
            self._read(segments, layout.passages, places, gathered)
        return -self._finish(gathered, 1)[0][:, 0], layout.answer_lengths(1)[:, 0]

    def lay_out(
        self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str], *, own: bool = False, room: int = 0
    ) -> Layout:
        """Texts as ids: what queries share in front, and each one's own.

        Args:
            chunks, queries, answers: as `answers`; no answers for stems alone.
            own: there is one answer for each query, its own.
            room: tokens that are to be written behind each query.

        Raises:
            SparsortError: as `answers`.
        """
        segments = self.trees.segments(chunks) if self.reader.why_not is None else None
        shared = list(chunks) if segments else []
        texts = list(queries) if segments or not chunks else ["".join(chunks) + query for query in queries]
        if own:
            passages = [
                self.trees.passages(shared, [text], [mine])[0] for text, mine in zip(texts, answers, strict=True)
            ]
        else:
            passages = self.trees.passages(shared, texts, answers)
        layout = Layout(segments=segments or [], passages=passages)
        self._check_length(layout, room)
        return layout

    def _lay_out_bare(self, chunks: Sequence[str], texts: Sequence[str]) -> Layout | None:
        """Texts right behind a prefix, whose last token is every stem; None where there is no prefix that can be cut."""
        segments = self.trees.segments(chunks) if self.reader.why_not is None else None
        if not segments:
            return None
        *before, (*most, last) = segments
        passages = []
        for text, passage in zip(texts, self.trees.passages(chunks, texts, ()), strict=True):
            if passage.whole:
                (cut,) = self.trees.passages((), ["".join(chunks)], [text])
                passages.append(Passage(stem=cut.stem, branches=cut.branches, whole=True))
            else:
                passages.append(Passage(stem=(last,), branches=(passage.stem,)))
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
            length += max((len(branch) for branch in passage.branches), default=0)
            if length > limit:
                written = f", and {room} more may be written" if room else ""
                fewer = ", or a smaller max_new_tokens" if room else ""
                raise SparsortError(
                    f"a prompt has {length - room} tokens, {n_prefix} of them demonstrations{written}; {self.loaded.name!r} was "
                    f"made for {limit}. Use fewer shots or shorter demonstrations{fewer}."
                )

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
        """Run the passages `places` behind a prefix, the longest first: which they are, and what the pass made of them."""
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
        texts = [
            (row, answer, [*passages[row].stem, *branch[:-1]])
            for row in places
            for answer, branch in enumerate(passages[row].branches or ((0,),))
        ]
        ids = [text for _, _, text in texts]
        # No shared head is cut into a stem's last token, whose state is wanted for every row.
        plan = self.backbone.plan(ids, max_depth=min(len(passages[row].stem) for row in places) - 1)
        for piece in self.backbone.walk(ids, plan, self.reader.sites):
            self.reader.n_tokens += int(piece.lengths.sum())
            if piece.is_head:
                continue
            for number, text in enumerate(piece.rows.tolist()):
                row, answer, tokens = texts[text]
                first, last = len(passages[row].stem) - 1, len(tokens)
                begin, end = piece.start, piece.start + int(piece.lengths[number])
                for position in range(max(first, begin), min(last, end)):
                    found = {site: states[number, position - begin] for site, states in piece.states.items()}
                    gathered.put(row, answer, position - first, found)

    def _finish(self, gathered: _Gathered, n_answers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(Q, L) log-probabilities and (Q, F) features."""
        states = {site: torch.stack(rows) for site, rows in gathered.stems.items()}
        last = states.get("post_norm", states["pre_norm"])
        features, normaliser = self.features(states)
        log_p = np.zeros((len(last), n_answers))
        rows, answers, targets = gathered.first_tokens()
        if len(rows):
            np.add.at(log_p, (rows, answers), self._of_tokens(last[rows], targets) - normaliser[rows])
        if gathered.rest:
            rows, answers, targets = gathered.rest_tokens()
            rest = torch.stack([state for _, _, _, state in gathered.rest])
            np.add.at(log_p, (rows, answers), self._of_tokens(rest, targets) - self._normalisers(rest)[0])
        return log_p, features

    def features(self, states: dict[str, Tensor]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(Q, F) features of states, site → (Q, width), in the order of `FEATURES`; and (Q,) log sums of the softmax."""
        last = states.get("post_norm", states["pre_norm"])
        features = np.full((len(last), len(FEATURES)), np.nan)
        for site, states_QH in states.items():
            start = SITES.index(site) * len(METRICS)
            features[:, start : start + len(METRICS)] = sparsity_rows(states_QH).values_NM.double().cpu().numpy()
        normaliser, features[:, -1] = self._normalisers(last)
        return features, normaliser

    def _of_tokens(self, states_NH: Tensor, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        targets_N = torch.from_numpy(targets).to(states_NH.device)
        parts = zip(torch.split(states_NH, _POSITIONS_AT_ONCE), torch.split(targets_N, _POSITIONS_AT_ONCE), strict=True)
        logits = torch.cat([self.head.of_tokens(states, part) for states, part in parts])
        return np.asarray(logits.double().cpu().numpy())

    def _normalisers(self, states_NH: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        parts = [self.head.normalisers(part) for part in torch.split(states_NH, _POSITIONS_AT_ONCE)]
        return tuple(torch.cat(side).double().cpu().numpy() for side in zip(*parts, strict=True))  # type: ignore[return-value]


class _Gathered:
    """States that the head and the metrics are to read: the end of every stem, and the inner tokens of every answer."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = passages
        self.stems: dict[str, list[Tensor]] = {}
        self.rest: list[tuple[int, int, int, Tensor]] = []

    def put(self, row: int, answer: int, depth: int, states: dict[str, Tensor]) -> None:
        """Take copies of the states of one token, `depth` tokens behind the end of the stem."""
        # Copies: a view would keep the states of its whole batch.
        if depth == 0:
            for site, state in states.items():
                self.stems.setdefault(site, [state] * len(self._passages))[row] = state.clone()
        else:
            self.rest.append((row, answer, depth, states.get("post_norm", states["pre_norm"]).clone()))

    def take(self, rows: Sequence[int], states: dict[str, Tensor]) -> None:
        """Take what is wanted from a block of `_tree`."""
        for number, row in enumerate(rows):
            at = len(self._passages[row].stem)
            self.put(row, 0, 0, {site: block[number, at - 1] for site, block in states.items()})
            for answer, branch in enumerate(self._passages[row].branches):
                for depth in range(1, len(branch)):
                    self.put(row, answer, depth, {site: block[number, at] for site, block in states.items()})
                    at += 1

    def first_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows, answers and tokens of all that a stem's end predicts."""
        return _columns(
            (row, answer, branch[0])
            for row, passage in enumerate(self._passages)
            for answer, branch in enumerate(passage.branches)
        )

    def rest_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows, answers and tokens of all that `rest` predicts."""
        return _columns(
            (row, answer, self._passages[row].branches[answer][depth]) for row, answer, depth, _ in self.rest
        )


def _columns(
    rows: Iterable[tuple[int, int, int]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    array = np.array(list(rows), dtype=np.int64).reshape(-1, 3)
    return array[:, 0], array[:, 1], array[:, 2]


def _tree(chosen: Sequence[Passage], device: torch.device) -> _Batch:
    """Stems, each with its branches behind it, as rows of one block."""
    width = max(passage.n_tokens for passage in chosen)
    # Padded with the row's own last token: a padding token's embedding may be NaN, and 0 · NaN is NaN in attention.
    ids = np.array([passage.stem[-1] for passage in chosen], dtype=np.int64)[:, None].repeat(width, axis=1)
    # One chain a row needs no mask.
    plain = all(sum(len(branch) > 1 for branch in passage.branches) <= 1 for passage in chosen)
    for number, passage in enumerate(chosen):
        flat = [*passage.stem, *(token for branch in passage.branches for token in branch[:-1])]
        ids[number, : len(flat)] = flat
    if plain:
        return _Batch(ids_BT=torch.from_numpy(ids).to(device), offset_BT=None, visible_BTT=None)
    offset = np.arange(width)[None].repeat(len(chosen), axis=0)
    visible = np.tril(np.ones((width, width), dtype=bool))[None].repeat(len(chosen), axis=0)
    for number, passage in enumerate(chosen):
        stem = len(passage.stem)
        at = stem
        for branch in passage.branches:
            length = len(branch) - 1
            offset[number, at : at + length] = np.arange(stem, stem + length)
            visible[number, at : at + length, stem:at] = False
            at += length
    return _Batch(
        ids_BT=torch.from_numpy(ids).to(device),
        offset_BT=torch.from_numpy(offset).to(device),
        visible_BTT=torch.from_numpy(visible).to(device),
    )
