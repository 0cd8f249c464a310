"""Rows of text as they are written: which token comes next, what it reads as, and where the text ends.

Contract: a row's tokens follow from its own logits, the seed and its number, never from its batch mates. Its text is what the
tokenizer makes of all its tokens behind the prompt's, special tokens left out, cut where the first stop string begins; a
character that several tokens spell is read when it is whole. No model here.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsort.errors import SparsortError

# Tokens of the prompt that a text is decoded behind: some tokenizers drop a space at the beginning of what they decode.
_CONTEXT = 5
# Rows whose probabilities stand in memory in float64 at once.
_DRAWN_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only as many of the likeliest are drawn from; 0 for all.
        no_repeat_ngram: no run of as many tokens occurs twice, prompt included; 0 for no such rule.
        kept: ids that this rule spares, and that are not drawn but taken where one is the likeliest. With a template's words
            here, a hot sample keeps to the template ("allowed tokens" in the code of arXiv 2104.08786).
        seed: of the draws; every row has its own.

    Raises:
        SparsortError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    no_repeat_ngram: int = 0
    kept: frozenset[int] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SparsortError(
                f"temperature is {self.temperature}; expected a finite number, 0 for the likeliest token or more."
            )
        for name in ("top_k", "no_repeat_ngram", "seed"):
            if getattr(self, name) < 0:
                raise SparsortError(f"{name} is {getattr(self, name)}; it must be at least 0.")


class Writer:
    """Writes rows to their ends.

    Args:
        tokenizer: reads tokens as text.
        prompts: ids of each row's whole prompt.
        max_new_tokens: a row ends after as many tokens.
        stop: a row ends where one of these begins.
        end_ids: a row ends at these tokens, which are no text.
        sampling: how tokens are chosen.

    Raises:
        SparsortError: an empty stop string, or no room for a token.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        end_ids: Collection[int] = (),
        sampling: Sampling | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise SparsortError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed.")
        if isinstance(stop, str):
            raise SparsortError(f"stop is the text {stop!r}; give a list of stop strings, such as [{stop!r}].")
        if "" in stop:
            raise SparsortError("a stop string is empty, which would end every text before it begins. Take it out.")
        self._sampling = sampling or Sampling()
        self._stop, self._most = tuple(stop), max_new_tokens
        special = {int(token): str(text) for token, text in _specials(tokenizer).items()}
        self._silent = frozenset(special)
        # A special token is no text, so a stop string that is one is looked for by its id.
        self._ends = frozenset(end_ids) | {token for token, text in special.items() if text in self._stop}
        drawn = self._sampling.temperature > 0
        self._rows = [
            _Row(
                text=_Text(tokenizer, prompt[-_CONTEXT:]),
                ngrams=_Ngrams(prompt, self._sampling.no_repeat_ngram) if self._sampling.no_repeat_ngram else None,
                uniform=np.random.default_rng([self._sampling.seed, row]).random(max_new_tokens) if drawn else None,
            )
            for row, prompt in enumerate(prompts)
        ]

    @property
    def texts(self) -> list[str]:
        """What each row reads as so far."""
        return [row.text.text for row in self._rows]

    @property
    def ended(self) -> list[bool]:
        """Whether each row came to an end by itself."""
        return [row.ended for row in self._rows]

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each row so far, those of its stop string or its end included."""
        return [row.ids for row in self._rows]

    def is_done(self, row: int) -> bool:
        """Whether nothing is to be written to a row any more."""
        return self._rows[row].ended or len(self._rows[row].ids) >= self._most

    def write(self, rows: Sequence[int], logits_BV: Tensor) -> Tensor:
        """Choose the next token of each row and take it in; returns the tokens, (B,).

        Args:
            rows: numbers of the rows, none of them done.
            logits_BV: their fp32 logits; changed.

        Raises:
            SparsortError: logits that are not numbers.
        """
        likeliest, token_B = logits_BV.max(dim=1)
        if not torch.isfinite(likeliest).all():
            raise SparsortError(
                "the model computes logits that are not finite. Run it in bfloat16 or float32 (dtype='float32')."
            )
        if self._sampling.no_repeat_ngram:
            self._ban(rows, logits_BV)
            token_B = logits_BV.argmax(dim=1)
        if self._sampling.temperature:
            token_B = self._draw(rows, logits_BV, token_B)
        for row, token in zip(rows, token_B.tolist(), strict=True):
            self._take(self._rows[row], token)
        return token_B

    def _ban(self, rows: Sequence[int], logits_BV: Tensor) -> None:
        for number, row in enumerate(rows):
            ngrams = self._rows[row].ngrams
            banned = sorted(ngrams.would_repeat() - self._sampling.kept) if ngrams is not None else []
            if banned:
                logits_BV[number, banned] = -torch.inf

    def _draw(self, rows: Sequence[int], logits_BV: Tensor, likeliest_B: Tensor) -> Tensor:
        uniform = [float(self._rows[row].uniform[len(self._rows[row].ids)]) for row in rows]
        uniform_B = torch.tensor(uniform, dtype=torch.float64, device=logits_BV.device)
        token_B = torch.cat(
            [
                draw(logits, numbers, temperature=self._sampling.temperature, top_k=self._sampling.top_k)
                for logits, numbers in zip(
                    torch.split(logits_BV, _DRAWN_AT_ONCE), torch.split(uniform_B, _DRAWN_AT_ONCE), strict=True
                )
            ]
        )
        if self._sampling.kept:
            kept = torch.tensor(sorted(self._sampling.kept), device=token_B.device)
            token_B = torch.where(torch.isin(likeliest_B, kept), likeliest_B, token_B)
        return token_B

    def _take(self, row: _Row, token: int) -> None:
        row.ids.append(token)
        if row.ngrams is not None:
            row.ngrams.add(token)
        if token in self._ends:
            row.ended = True
        elif token not in self._silent:
            row.text.add(token)
        if row.ended or len(row.ids) >= self._most:
            row.text.finish()
        row.ended = row.text.cut(self._stop) or row.ended


def draw(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_k: int = 0) -> Tensor:
    """One token a row, (B,), by inverting the distribution function at `uniform_B`.

    Args:
        logits_BV: logits.
        uniform_B: numbers in [0, 1).
        temperature: above 0.
        top_k: draw among as many of the likeliest; 0 for all.
    """
    ids_BK = None
    if 0 < top_k < logits_BV.shape[1]:
        logits_BV, ids_BK = logits_BV.topk(top_k, dim=1)
    below_BV = (logits_BV.double() / temperature).softmax(dim=1).cumsum(dim=1)
    # Strictly above: a token of probability 0 in front is never drawn.
    place_B1 = torch.searchsorted(below_BV, uniform_B[:, None] * below_BV[:, -1:], right=True)
    place_B1 = place_B1.clamp(max=below_BV.shape[1] - 1)
    return (place_B1 if ids_BK is None else ids_BK.gather(1, place_B1))[:, 0]


@dataclass(kw_only=True)
class _Row:
    text: _Text
    ngrams: _Ngrams | None
    uniform: Any
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class _Text:
    """Tokens as text, in steps: what a few tokens add to those before them, read once their last character is whole."""

    def __init__(self, tokenizer: Any, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._begin, self._end = 0, len(self._ids)
        self._looked = 0
        self.text = ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._read(whole=False)

    def finish(self) -> None:
        """Read what is left, a broken character too."""
        self._read(whole=True)

    def cut(self, stop: Sequence[str]) -> bool:
        """Cut the text where a stop string begins; whether there was one."""
        first = max(self._looked - max(map(len, stop), default=0) + 1, 0)
        found = [place for text in stop if (place := self.text.find(text, first)) >= 0]
        self._looked = len(self.text)
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _read(self, *, whole: bool) -> None:
        if self._end == len(self._ids):
            return
        before, now = self._decode(self._ids[self._begin : self._end]), self._decode(self._ids[self._begin :])
        # A replacement character at the end may be the beginning of a character that goes on.
        if (now.endswith("\ufffd") and not whole) or len(now) <= len(before):
            return
        self.text += now[len(before) :]
        self._begin, self._end = self._end, len(self._ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Ngrams:
    """Which tokens followed which n - 1 others in a row of tokens."""

    def __init__(self, ids: Sequence[int], n: int) -> None:
        self._n = n
        self._last: list[int] = []
        self._followers: dict[tuple[int, ...], set[int]] = {}
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self._last) == self._n - 1:
            self._followers.setdefault(tuple(self._last), set()).add(token)
        self._last = [*self._last, token][-(self._n - 1) :] if self._n > 1 else []

    def would_repeat(self) -> set[int]:
        """The tokens that would make an n-gram that has been."""
        return self._followers.get(tuple(self._last), set())


def _specials(tokenizer: Any) -> dict[int, str]:
    """Special tokens by id, those that were added to the vocabulary too."""
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return found | {token: entry.content for token, entry in added.items() if entry.special}
