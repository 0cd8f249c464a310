"""From text to a token tree: what queries share in front (segments), the query itself (a stem), and an answer a branch.

Contract: the ids along a path are those of the whole text, tokenised once. Pieces are tokenised apart only where that gives
the very same ids, which is checked at every border; where it does not (a tokenizer that merges across it) the text is
taken whole, which is slower and as right. An answer's tokens are counted from the first token in which the text of any
answer begins, so a token that straddles the border belongs to the answer, as in `prompts.Encoder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.scoring.prompts import Encoded, Encoder, Rendered

# Texts tokenised at once.
_AT_ONCE = 1024
# Queries that are kept with their ids.
_KEPT = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A query and its possible answers as ids.

    Attributes:
        stem: the query's ids behind the shared prefix.
        branches: L lists of ids, each an answer; empty lists never.
        whole: the stem holds the whole text in front too, because it cannot be cut at the prefix's end.
    """

    stem: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    whole: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens that a pass must run: no answer's last token."""
        return len(self.stem) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Queries as ids.

    Attributes:
        segments: ids of the parts of the prefix; empty where texts are taken whole.
        passages: each query with its answers.
    """

    segments: list[tuple[int, ...]]
    passages: list[Passage]

    def groups(self) -> Iterator[tuple[list[tuple[int, ...]], list[int]]]:
        """(segments, places): the queries behind the prefix, and those that hold it themselves."""
        cut = [place for place, passage in enumerate(self.passages) if self.segments and not passage.whole]
        taken = set(cut)
        whole = [place for place in range(len(self.passages)) if place not in taken]
        yield from (group for group in ((self.segments, cut), (list[tuple[int, ...]](), whole)) if group[1])

    def shared(self) -> Layout:
        """The same with what all queries behind the prefix begin with (a template's first words) made part of the prefix."""
        cut = [place for place, passage in enumerate(self.passages) if not passage.whole]
        if not self.segments or len(cut) < 2:
            return self
        stems = [self.passages[place].stem for place in cut]
        # A stem keeps its last token, whose state is wanted for every query.
        length = min(_common(stems), min(map(len, stems)) - 1)
        if length < 1:
            return self
        passages = [
            passage if passage.whole else replace(passage, stem=passage.stem[length:]) for passage in self.passages
        ]
        return Layout(segments=[*self.segments, stems[0][:length]], passages=passages)

    def answer_lengths(self, count: int) -> NDArray[np.int64]:
        """(Q, count) tokens of each answer."""
        lengths = [[len(branch) for branch in passage.branches] for passage in self.passages]
        return np.array(lengths, dtype=np.int64).reshape(len(lengths), count)


class TreeEncoder:
    """Cuts prompts into segments, stems and branches.

    Args:
        encoder: tokenises, and puts the special tokens in front.

    Tokenised borders are kept, up to a number, so that the queries of an ablation are not tokenised again under every order.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._alone: dict[str, list[int]] = {}
        self._tails: dict[tuple[str, str], tuple[int, ...] | None] = {}
        self._trees: dict[tuple[str, str, tuple[str, ...]], Passage | None] = {}

    def segments(self, chunks: Sequence[str]) -> list[tuple[int, ...]] | None:
        """Ids of each chunk of a prefix, special tokens in front of the first; None when it cannot be cut so.

        Args:
            chunks: texts that stand one behind the other.
        """
        if not chunks:
            return []
        if len(self._alone) + len(self._tails) > _KEPT:
            self.forget()
        segments = [tuple(self._ids(chunks[0]))]
        for left, right in itertools.pairwise(chunks):
            tail = self._tail(left, right)
            if tail is None:
                return None
            segments.append(tail)
        whole = self._encode("".join(chunks))
        return segments if [token for segment in segments for token in segment] == whole else None

    def passages(self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str]) -> list[Passage]:
        """Each query and its answers behind a prefix.

        Args:
            chunks: the prefix, as given to `segments`, which must not have returned None; or none, to take texts whole.
            queries: Q texts.
            answers: L texts; none for a stem alone.

        Raises:
            SparsortError: a query without tokens, an answer that adds none, or a text that is not Unicode.
        """
        left = chunks[-1] if chunks else ""
        key = tuple(answers)
        if len(self._trees) > _KEPT:
            self._trees.clear()
        # Whole prompts do not come again, and they are long.
        kept = self._trees if chunks else {}
        unknown = [query for query in dict.fromkeys(queries) if (left, query, key) not in kept]
        for start in range(0, len(unknown), _AT_ONCE):
            part = unknown[start : start + _AT_ONCE]
            for query, passage in zip(part, self._cut(left, part, key), strict=True):
                kept[left, query, key] = passage
        found = [kept[left, query, key] for query in queries]
        uncut = [place for place, passage in enumerate(found) if passage is None]
        if uncut:
            before = "".join(chunks)
            whole = self._cut("", [before + queries[place] for place in uncut], key)
            for place, passage in zip(uncut, whole, strict=True):
                if passage is None:
                    raise SparsortError(
                        f"the query {queries[place][:80]!r} has no tokens, so nothing predicts what follows. "
                        "Put some text before the answer."
                    )
                found[place] = Passage(stem=passage.stem, branches=passage.branches, whole=True)
        return [passage for passage in found if passage is not None]

    def forget(self) -> None:
        """Drop what is kept of prompts, whose demonstrations will not come again."""
        self._alone.clear()
        self._tails.clear()
        self._trees.clear()

    def _cut(self, left: str, queries: Sequence[str], answers: tuple[str, ...]) -> list[Passage | None]:
        """Stems and branches behind the ids of `left`; None for a query that does not part from it cleanly."""
        texts = answers or ("",)
        encoded = self._encoded(
            [Rendered(text=left + q + a, answer_start=len(left + q)) for q in queries for a in texts]
        )
        before = self._ids(left) if left else []
        cut: list[Passage | None] = []
        for number, query in enumerate(queries):
            paths = encoded[number * len(texts) : (number + 1) * len(texts)]
            if any(path.ids[: len(before)] != before for path in paths):
                cut.append(None)
                continue
            if not answers:
                stem = tuple(paths[0].ids[len(before) :])
                cut.append(Passage(stem=stem, branches=()) if stem else None)
                continue
            end = min(min(path.answer_start for path in paths), _common([path.ids for path in paths]))
            for path, answer in zip(paths, answers, strict=True):
                if len(path.ids) <= end or path.answer_start >= len(path.ids):
                    raise SparsortError(f"the answer {answer!r} adds no token to the query {query[:80]!r}.")
            if end <= len(before):
                # An answer that reaches into the prefix: nothing is left to predict it from.
                cut.append(None)
                continue
            cut.append(
                Passage(
                    stem=tuple(paths[0].ids[len(before) : end]), branches=tuple(tuple(path.ids[end:]) for path in paths)
                )
            )
        return cut

    def _tail(self, left: str, right: str) -> tuple[int, ...] | None:
        """Ids that `right` adds behind `left`, None when they do not part cleanly or there are none."""
        if (left, right) not in self._tails:
            both, before = self._encode(left + right), self._ids(left)
            clean = both[: len(before)] == before and len(both) > len(before)
            self._tails[left, right] = tuple(both[len(before) :]) if clean else None
        return self._tails[left, right]

    def _ids(self, text: str) -> list[int]:
        if text not in self._alone:
            self._alone[text] = self._encode(text)
        return self._alone[text]

    def _encode(self, text: str) -> list[int]:
        return self._encoded([Rendered(text=text, answer_start=len(text))])[0].ids

    def _encoded(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        try:
            return self._encoder.encode(rendered)
        except (TypeError, UnicodeEncodeError) as error:
            for item in rendered:
                if any("\ud800" <= letter <= "\udfff" for letter in item.text):
                    raise SparsortError(
                        f"the prompt that ends in {item.text[-80:]!r} holds half of a surrogate pair, which is no character. "
                        "Leave that row out, or repair its text."
                    ) from error
            raise


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many leading ids all rows share."""
    shortest = min(len(row) for row in rows)
    return next((place for place in range(shortest) if len({row[place] for row in rows}) > 1), shortest)
