"""From text to a token tree: what queries share in front (segments), the query itself (a stem), and an answer a branch.

Contract: the ids along a path are those of the whole text, tokenised once. Pieces are tokenised apart only where that gives
the very same ids, which is checked at every border; where it does not (a tokenizer that merges across it) the text is
taken whole, which is slower and as right.

The rule "continuation" says which tokens are an answer's. Whitespace at the end of the prompt moves to the answer; prompt and
prompt + answer are tokenised, and the answer's tokens are those of the second from the first one in which it differs from the
first. Where no token merges across the boundary, this is `_encode_pair` of lm-evaluation-harness. An answer's tokens thus
depend on the prompt and on that answer alone: answers may part from the prompt at different places and still share one pass.

A query's own text (`own=True`) is scored from the first token that holds one of its characters, as in `prompts.Encoder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.scoring.prompts.prompt import Encoded, Encoder, Rendered

# The name of the rule above; stored outcomes of queries for which it matters are filed under it.
RULE = "continuation"
# Characters of the prefix, in whole chunks, with which a query is tokenised: a chunk may be a part of a word ("x'" + "v" before
# "ed"), and the text before that part decides how the word is cut.
_CONTEXT = 32
# Texts tokenised at once.
_AT_ONCE = 1024
# Queries that are kept with their ids.
_KEPT = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A query and its possible answers as ids. A pass runs the stem, then chains that see the stem and themselves.

    Attributes:
        stem: ids after the shared prefix that the query and all of its answers begin with; never empty.
        branches: L tuples of ids, what each answer's text adds to the stem; never empty.
        starts: L indices into stem + branch, at least 1: the first token of each answer that is scored.
        rest: what the query alone adds to the stem, where an answer merges with the query's last tokens.
        whole: the stem holds the whole text in front too, because it cannot be cut at the prefix's end.
    """

    stem: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()
    whole: bool = False

    @property
    def chains(self) -> list[tuple[int, ...]]:
        """What a pass runs after the stem: the rest of the query, then each answer without its last token."""
        return [self.rest, *(branch[:-1] for branch in self.branches)]

    @property
    def n_tokens(self) -> int:
        """Tokens that a pass must run: no answer's last token."""
        return len(self.stem) + sum(map(len, self.chains))

    @property
    def end(self) -> int:
        """Which of the tokens that a pass runs, in their order, is the query's last."""
        return len(self.stem) + len(self.rest) - 1

    @property
    def first(self) -> int:
        """The first of these tokens whose state is read."""
        return min([len(self.stem) - 1, *(start - 1 for start in self.starts)])

    def scored(self) -> Iterator[tuple[int, int, int]]:
        """(answer, which of the tokens that a pass runs predicts, the token it predicts), for every scored token."""
        stem, begin = len(self.stem), len(self.stem) + len(self.rest)
        for answer, (branch, start) in enumerate(zip(self.branches, self.starts, strict=True)):
            for index in range(start, stem + len(branch)):
                before = index - 1 if index <= stem else begin + index - 1 - stem
                yield answer, before, self.stem[index] if index < stem else branch[index - stem]
            begin += len(branch) - 1


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
        # A stem keeps the tokens whose states are read.
        length = min(_common(stems), *(self.passages[place].first for place in cut))
        if length < 1:
            return self
        passages = [passage if passage.whole else _without(passage, length) for passage in self.passages]
        return Layout(segments=[*self.segments, stems[0][:length]], passages=passages)

    def of_queries(self) -> Layout:
        """The queries without their answers."""
        passages = [replace(p, stem=p.stem + p.rest, rest=(), branches=(), starts=()) for p in self.passages]
        return replace(self, passages=passages)

    def of_answer(self, answer: int) -> Layout:
        """One answer of each query, without what the query alone adds to the stem."""
        passages = [
            replace(p, rest=(), branches=(p.branches[answer],), starts=(p.starts[answer],)) for p in self.passages
        ]
        return replace(self, passages=passages)

    def answer_lengths(self, count: int) -> NDArray[np.int64]:
        """(Q, count) scored tokens of each answer."""
        lengths = [
            [
                len(passage.stem) + len(branch) - start
                for branch, start in zip(passage.branches, passage.starts, strict=True)
            ]
            for passage in self.passages
        ]
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
        self._trees: dict[tuple[str, str, tuple[str, ...], bool], Passage | None] = {}

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

    def passages(
        self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str], *, own: bool = False
    ) -> list[Passage]:
        """Each query and its answers after a prefix.

        Args:
            chunks: the prefix, as given to `segments`, which must not have returned None; or none, to take texts whole.
            queries: Q texts.
            answers: L texts; none for a stem alone.
            own: the answers are the queries' own texts, of which every token that holds a character is scored and no other.

        Raises:
            SparsortError: a query without tokens, an answer that adds none, or a text that is not Unicode.
        """
        left = _end_of(chunks)
        key = (tuple(answers), own)
        if len(self._trees) > _KEPT:
            self._trees.clear()
        # Whole prompts do not come again, and they are long.
        kept = self._trees if chunks else {}
        unknown = [query for query in dict.fromkeys(queries) if (left, query, *key) not in kept]
        for start in range(0, len(unknown), _AT_ONCE):
            part = unknown[start : start + _AT_ONCE]
            for query, passage in zip(part, self._cut(left, part, *key), strict=True):
                kept[left, query, *key] = passage
        found = [kept[left, query, *key] for query in queries]
        uncut = [place for place, passage in enumerate(found) if passage is None]
        if uncut:
            before = "".join(chunks)
            whole = self._cut("", [before + queries[place] for place in uncut], *key)
            for place, passage in zip(uncut, whole, strict=True):
                if passage is None:
                    raise SparsortError(
                        f"the query {queries[place][:80]!r} has no tokens of its own, so nothing predicts what follows. "
                        "Put some text before the answer."
                    )
                found[place] = replace(passage, whole=True)
        return [passage for passage in found if passage is not None]

    def forget(self) -> None:
        """Drop what is kept of prompts, whose demonstrations will not come again."""
        self._alone.clear()
        self._tails.clear()
        self._trees.clear()

    def _cut(self, left: str, queries: Sequence[str], answers: tuple[str, ...], own: bool) -> list[Passage | None]:
        """Stems and branches behind the ids of `left`; None for a query that does not part from it cleanly."""
        prompts = [left + query for query in queries]
        paths = self._encoded(
            [Rendered(text=text + a, answer_start=len(text if own else text + a)) for text in prompts for a in answers]
        )
        texts = [] if own else list(dict.fromkeys([*prompts, *(text.rstrip() for text in prompts if answers)]))
        ids_of = {
            text: item.ids for text, item in zip(texts, self._encoded([_bare(text) for text in texts]), strict=True)
        }
        before = self._ids(left) if left else []
        cut: list[Passage | None] = []
        for number, (query, text) in enumerate(zip(queries, prompts, strict=True)):
            mine = paths[number * len(answers) : (number + 1) * len(answers)]
            if own:
                starts = [path.answer_start for path in mine]
                asked = mine[0].ids[: starts[0]]
            else:
                starts = [_common([ids_of[text.rstrip()], path.ids]) for path in mine]
                asked = ids_of[text]
            for path, start, answer in zip(mine, starts, answers, strict=True):
                if start >= len(path.ids) or path.ids == asked[: len(path.ids)]:
                    raise SparsortError(f"the answer {answer!r} adds no token to the query {query[:80]!r}.")
            cut.append(_passage(before, asked, [path.ids for path in mine], starts))
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
        return self._encoded([_bare(text)])[0].ids

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


def moves_boundary(encoder: Encoder, query: str, answers: Sequence[str]) -> bool:
    """Whether the rule matters for a query: whitespace ends it, or an answer merges with its last tokens.

    Everywhere else an answer's tokens are those that follow the query's own, under any rule. Decided from the query's own text,
    whatever the prefix.
    """
    if not query or query != query.rstrip():
        return True
    own, *paths = (item.ids for item in encoder.encode([_bare(query + text) for text in ("", *answers)]))
    return any(path[: len(own)] != own for path in paths)


def _passage(before: list[int], query: list[int], paths: Sequence[list[int]], starts: Sequence[int]) -> Passage | None:
    """A passage of whole texts' ids, of which `before` are the prefix's; None where something is not the prefix's to predict."""
    rows, cut = [query, *paths], len(before)
    end = _common(rows)
    # The state before the first scored token must be the row's own: a prefix keeps keys and values alone.
    if any(row[:cut] != before for row in rows) or min([end, *starts]) <= cut:
        return None
    return Passage(
        stem=tuple(query[cut:end]),
        branches=tuple(tuple(path[end:]) for path in paths),
        starts=tuple(start - cut for start in starts),
        rest=tuple(query[end:]),
    )


def _without(passage: Passage, length: int) -> Passage:
    """A passage whose stem's first tokens have become part of the prefix."""
    starts = tuple(start - length for start in passage.starts)
    return replace(passage, stem=passage.stem[length:], starts=starts)


def _end_of(chunks: Sequence[str]) -> str:
    """The last chunks, as many as hold `_CONTEXT` characters."""
    end = ""
    for chunk in reversed(chunks):
        end = chunk + end
        if len(end) >= _CONTEXT:
            break
    return end


def _bare(text: str) -> Rendered:
    return Rendered(text=text, answer_start=len(text))


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many leading ids all rows share."""
    shortest = min(len(row) for row in rows)
    return next((place for place in range(shortest) if len({row[place] for row in rows}) > 1), shortest)
