"""Encodes queries as token trees: the texts before all queries are segments, a query is a stem, and each answer is a branch.

Contract: the ids along a path are those of the whole text, tokenised at once. Parts of a text are tokenised separately only if
that gives exactly the same ids, which is checked at every border. If it does not, because the tokenizer merges across the border,
the text is encoded as a whole, which is slower and equally correct.

The rule "continuation" defines the tokens of an answer. Whitespace at the end of the prompt moves to the answer. The prompt and
prompt + answer are tokenised, and the tokens of the answer are those of the second text from the first token that differs. Where
no token merges across the boundary, this equals `_encode_pair` of lm-evaluation-harness. The tokens of an answer thus depend only
on the prompt and that answer: answers may diverge from the prompt at different tokens and still share one pass.

A query's own text (`own=True`) is scored from the first token that contains one of its characters, as in `prompts.Encoder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError
from sparsort.scoring.prompts.prompt import Encoded, Encoder, Rendered

# The name of the rule above. It is part of the key of stored outcomes, for queries to which the rule makes a difference.
RULE = "continuation"
# The least number of characters of the prefix, in whole chunks, that a query is tokenised with. A chunk may be a part of a word
# ("x'" + "v" before "ed"), and the text before that part determines how the word is split into tokens.
_CONTEXT = 32
# The number of texts that are tokenised in one call.
_AT_ONCE = 1024
# The most texts, and the most queries, whose ids are kept.
_KEPT = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """The ids of a query and its possible answers. A pass runs the stem, then chains that each see the stem and themselves.

    Attributes:
        stem: the ids after the shared prefix that are common to the query and all of its answers; never empty.
        branches: L tuples of ids that follow the stem in the text of each answer; none is empty.
        starts: L indices into stem + branch, at least 1: the first scored token of each answer.
        rest: the ids that follow the stem in the query alone, which exist if an answer merges with the query's last tokens.
        whole: whether the stem includes the text of the prefix, because the text cannot be split at the end of the prefix.
    """

    stem: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()
    whole: bool = False

    @property
    def chains(self) -> list[tuple[int, ...]]:
        """The ids that a pass runs after the stem: the rest of the query, then each branch without its last token."""
        return [self.rest, *(branch[:-1] for branch in self.branches)]

    @property
    def n_tokens(self) -> int:
        """The number of tokens that a pass runs. Nothing is predicted from an answer's last token, so it is not run."""
        return len(self.stem) + sum(map(len, self.chains))

    @property
    def end(self) -> int:
        """The index of the query's last token among the tokens that a pass runs."""
        return len(self.stem) + len(self.rest) - 1

    @property
    def first(self) -> int:
        """The index of the first token whose state is read."""
        return min([len(self.stem) - 1, *(start - 1 for start in self.starts)])

    def scored(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number of the answer, index of the predicting token among those of the pass, predicted id) per scored token."""
        stem, begin = len(self.stem), len(self.stem) + len(self.rest)
        for answer, (branch, start) in enumerate(zip(self.branches, self.starts, strict=True)):
            for index in range(start, stem + len(branch)):
                # The token before is in the stem, or in this answer's chain, which begins at `begin` in the pass.
                before = index - 1 if index <= stem else begin + index - 1 - stem
                yield answer, before, self.stem[index] if index < stem else branch[index - stem]
            begin += len(branch) - 1


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """Queries after a shared prefix, encoded.

    Attributes:
        segments: ids of the parts of the prefix; empty if every passage includes its whole text.
        passages: each query with its answers.
    """

    segments: list[tuple[int, ...]]
    passages: list[Passage]

    def groups(self) -> Iterator[tuple[list[tuple[int, ...]], list[int]]]:
        """Yield (segments, places): the queries that follow the prefix, then those that include its text themselves."""
        # Without segments there is no prefix, and every passage has its whole text in the stem.
        cut = [place for place, passage in enumerate(self.passages) if self.segments and not passage.whole]
        taken = set(cut)
        whole = [place for place in range(len(self.passages)) if place not in taken]
        yield from (group for group in ((self.segments, cut), (list[tuple[int, ...]](), whole)) if group[1])

    def shared(self) -> TokenTree:
        """Move the tokens that all queries begin with, such as a template's first words, to the end of the prefix."""
        cut = [place for place, passage in enumerate(self.passages) if not passage.whole]
        if not self.segments or len(cut) < 2:
            return self
        stems = [self.passages[place].stem for place in cut]
        # A prefix stores keys and values but no states, so a stem keeps all tokens whose states are read.
        length = min(_common(stems), *(self.passages[place].first for place in cut))
        if length < 1:
            return self
        passages = [passage if passage.whole else _without(passage, length) for passage in self.passages]
        return TokenTree(segments=[*self.segments, stems[0][:length]], passages=passages)

    def of_queries(self) -> TokenTree:
        """Return the queries without their answers."""
        passages = [replace(p, stem=p.stem + p.rest, rest=(), branches=(), starts=()) for p in self.passages]
        return replace(self, passages=passages)

    def of_answer(self, answer: int) -> TokenTree:
        """Return the queries with one answer each, and without `Passage.rest`."""
        passages = [
            replace(p, rest=(), branches=(p.branches[answer],), starts=(p.starts[answer],)) for p in self.passages
        ]
        return replace(self, passages=passages)

    def answer_lengths(self, count: int) -> NDArray[np.int64]:
        """Return the number of scored tokens of each answer, (Q, count)."""
        lengths = [
            [
                len(passage.stem) + len(branch) - start
                for branch, start in zip(passage.branches, passage.starts, strict=True)
            ]
            for passage in self.passages
        ]
        return np.array(lengths, dtype=np.int64).reshape(len(lengths), count)


class TreeEncoder:
    """Encodes prompts as segments, stems and branches.

    The ids of recent texts are kept, so that an ablation does not tokenise its queries again for every order.

    Args:
        encoder: tokenises texts and adds the special tokens at the beginning.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._alone: dict[str, list[int]] = {}
        self._tails: dict[tuple[str, str], tuple[int, ...] | None] = {}
        self._trees: dict[tuple[str, str, tuple[str, ...], bool], Passage | None] = {}

    def segments(self, chunks: Sequence[str]) -> list[tuple[int, ...]] | None:
        """Return the ids of each chunk of a prefix, special tokens before the first; None if tokens merge across a border."""
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
        # Each border was checked with its two neighbours alone, so the text as a whole is checked once too.
        whole = self._encode("".join(chunks))
        return segments if [token for segment in segments for token in segment] == whole else None

    def passages(
        self, chunks: Sequence[str], queries: Sequence[str], answers: Sequence[str], *, own: bool = False
    ) -> list[Passage]:
        """Encode each query and its answers after a prefix.

        Args:
            chunks: the prefix, for which `segments` must not have returned None; empty to encode whole texts.
            queries: Q texts.
            answers: L texts; empty for stems alone.
            own: whether an answer is the query's own text, of which exactly the tokens that contain its characters are scored.

        Raises:
            SparsortError: a query without tokens, an answer that adds none, or a text that is not Unicode.
        """
        left = _end_of(chunks)
        key = (tuple(answers), own)
        if len(self._trees) > _KEPT:
            self._trees.clear()
        # Whole prompts are long, and the same one rarely comes again, so they are not kept.
        kept = self._trees if chunks else {}
        unknown = [query for query in dict.fromkeys(queries) if (left, query, *key) not in kept]
        for start in range(0, len(unknown), _AT_ONCE):
            part = unknown[start : start + _AT_ONCE]
            for query, passage in zip(part, self._cut(left, part, *key), strict=True):
                kept[left, query, *key] = passage
        passages = [kept[left, query, *key] for query in queries]
        # Queries that merge with the prefix are encoded again, as whole texts.
        uncut = [place for place, passage in enumerate(passages) if passage is None]
        if uncut:
            before = "".join(chunks)
            whole = self._cut("", [before + queries[place] for place in uncut], *key)
            for place, passage in zip(uncut, whole, strict=True):
                if passage is None:
                    raise SparsortError(
                        f"the query {queries[place][:80]!r} has no tokens of its own, so nothing predicts what follows. "
                        "Put some text before the answer."
                    )
                passages[place] = replace(passage, whole=True)
        return [passage for passage in passages if passage is not None]

    def forget(self) -> None:
        """Drop the ids that are kept, for example when other demonstrations follow."""
        self._alone.clear()
        self._tails.clear()
        self._trees.clear()

    def _cut(self, left: str, queries: Sequence[str], answers: tuple[str, ...], own: bool) -> list[Passage | None]:
        """Encode queries after the text `left`; None for a query whose tokens merge with it."""
        prompts = [left + query for query in queries]
        paths = self._encoded(
            [Rendered(text=text + a, answer_start=len(text if own else text + a)) for text in prompts for a in answers]
        )
        # Stripped prompts decide where answers begin, because whitespace at the end of a prompt moves to the answer.
        texts = [] if own else list(dict.fromkeys([*prompts, *(text.rstrip() for text in prompts if answers)]))
        ids_of = {
            text: item.ids for text, item in zip(texts, self._encoded([_bare(text) for text in texts]), strict=True)
        }
        before = self._ids(left) if left else []
        cut: list[Passage | None] = []
        for number, (query, text) in enumerate(zip(queries, prompts, strict=True)):
            branches = paths[number * len(answers) : (number + 1) * len(answers)]
            if own:
                starts = [branch.answer_start for branch in branches]
                query_ids = branches[0].ids[: starts[0]]
            else:
                starts = [_common([ids_of[text.rstrip()], branch.ids]) for branch in branches]
                query_ids = ids_of[text]
            for branch, start, answer in zip(branches, starts, answers, strict=True):
                if start >= len(branch.ids) or branch.ids == query_ids[: len(branch.ids)]:
                    raise SparsortError(f"the answer {answer!r} adds no token to the query {query[:80]!r}.")
            cut.append(_passage(before, query_ids, [branch.ids for branch in branches], starts))
        return cut

    def _tail(self, left: str, right: str) -> tuple[int, ...] | None:
        """Return the ids that `right` adds after `left`; None if there are none, or if tokens merge across the border."""
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
                        f"the prompt that ends in {item.text[-80:]!r} contains half of a surrogate pair, which is not a "
                        "character. Remove that row, or repair its text."
                    ) from error
            raise


def moves_boundary(encoder: Encoder, query: str, answers: Sequence[str]) -> bool:
    """Whether the rule "continuation" makes a difference for a query.

    It does if the query ends in whitespace, or if an answer merges with its last tokens. Otherwise the tokens of an answer are
    those after the query's own, under any rule. The decision depends on the text of the query alone, not on the prefix.
    """
    if not query or query != query.rstrip():
        return True
    own, *paths = (item.ids for item in encoder.encode([_bare(query + text) for text in ("", *answers)]))
    return any(path[: len(own)] != own for path in paths)


def _passage(before: list[int], query: list[int], paths: Sequence[list[int]], starts: Sequence[int]) -> Passage | None:
    """Build a passage from the ids of whole texts: `query` with the prefix `before` it, and each path with an answer after both.

    The result is None if a text does not begin with the ids of the prefix, or has no token after them to predict from.
    """
    rows, cut = [query, *paths], len(before)
    end = _common(rows)
    # A prefix stores keys and values but no states, so the token before the first scored one must be in the stem.
    if any(row[:cut] != before for row in rows) or min([end, *starts]) <= cut:
        return None
    return Passage(
        stem=tuple(query[cut:end]),
        branches=tuple(tuple(path[end:]) for path in paths),
        starts=tuple(start - cut for start in starts),
        rest=tuple(query[end:]),
    )


def _without(passage: Passage, length: int) -> Passage:
    """Return the passage without the first tokens of its stem, which have become part of the prefix."""
    starts = tuple(start - length for start in passage.starts)
    return replace(passage, stem=passage.stem[length:], starts=starts)


def _end_of(chunks: Sequence[str]) -> str:
    """Return the text of the last chunks: as few as have `_CONTEXT` characters together."""
    end = ""
    for chunk in reversed(chunks):
        end = chunk + end
        if len(end) >= _CONTEXT:
            break
    return end


def _bare(text: str) -> Rendered:
    return Rendered(text=text, answer_start=len(text))


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of leading ids that all rows share."""
    shortest = min(len(row) for row in rows)
    return next((place for place in range(shortest) if len({row[place] for row in rows}) > 1), shortest)
