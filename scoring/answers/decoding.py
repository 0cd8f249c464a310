"""Decoding of rows that are generated: chooses the next token, turns tokens into text, and detects where the text ends.

Contract: the tokens of a row depend on its own logits, the seed and its number, never on the other rows of the batch. Its text is
the tokenizer's decoding of all tokens after the prompt, without special tokens, cut where the first stop string begins. A
character that is spelled by several tokens is decoded when the last of them is there. This module runs no model.

Shape suffixes: B rows, V tokens of the vocabulary, K candidate tokens.
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

# The number of prompt tokens that are decoded together with a text: some tokenizers drop a space at the beginning.
_CONTEXT = 5
# The number of rows whose probabilities are in memory in float64 at the same time.
_DRAWN_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 always takes the most likely token.
        top_k: tokens are drawn from this many of the most likely ones; 0 for all.
        no_repeat_ngram: no sequence of this many tokens occurs twice, prompt included; 0 for no such rule.
        kept: ids that are exempt from `no_repeat_ngram`, and that are taken without a draw where one of them is the most
            likely token. With the words of a template here, a sample at high temperature follows the template ("allowed
            tokens" in the code of arXiv 2104.08786).
        seed: seed of the draws; each row draws by (seed, number of the row).

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
                f"temperature is {self.temperature}; expected a finite number of at least 0, which takes the most likely token."
            )
        for name in ("top_k", "no_repeat_ngram", "seed"):
            if getattr(self, name) < 0:
                raise SparsortError(f"{name} is {getattr(self, name)}; it must be at least 0.")


class Writer:
    """Continues rows token by token, from the logits that a caller computes, until each of them ends.

    Args:
        tokenizer: decodes tokens to text.
        prompts: ids of each row's whole prompt.
        max_new_tokens: a row ends after this many tokens.
        stop: a row ends where one of these strings begins.
        end_ids: a row ends at these tokens, which are not part of its text.
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
            raise SparsortError(f"stop is the text {stop!r}; pass a list of stop strings, such as [{stop!r}].")
        if "" in stop:
            raise SparsortError("a stop string is empty, which would end every text before it begins. Remove it.")
        self._sampling = sampling or Sampling()
        self._stop, self._most = tuple(stop), max_new_tokens
        special = {int(token): str(text) for token, text in _special_tokens(tokenizer).items()}
        self._silent = frozenset(special)
        # The text contains no special tokens, so a stop string that is one can only be detected by its id.
        self._ends = frozenset(end_ids) | {token for token, text in special.items() if text in self._stop}
        drawn = self._sampling.temperature > 0
        self._rows = [
            _WrittenRow(
                text=_Text(tokenizer, prompt[-_CONTEXT:]),
                ngrams=_Ngrams(prompt, self._sampling.no_repeat_ngram) if self._sampling.no_repeat_ngram else None,
                uniform=np.random.default_rng([self._sampling.seed, row]).random(max_new_tokens) if drawn else None,
            )
            for row, prompt in enumerate(prompts)
        ]

    @property
    def texts(self) -> list[str]:
        """The text of each row so far."""
        return [row.text.text for row in self._rows]

    @property
    def ended(self) -> list[bool]:
        """Whether each row ended at a stop string or an end token, and not at the limit."""
        return [row.ended for row in self._rows]

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each row so far, including those of its stop string and its end token."""
        return [row.ids for row in self._rows]

    def is_done(self, row: int) -> bool:
        """Whether a row is complete."""
        return self._rows[row].ended or len(self._rows[row].ids) >= self._most

    def write(self, rows: Sequence[int], logits_BV: Tensor) -> Tensor:
        """Choose the next token of each row and append it; returns the tokens, (B,).

        Args:
            rows: numbers of the rows, all of them incomplete.
            logits_BV: their fp32 logits, which are modified in place.

        Raises:
            SparsortError: logits that are not numbers.
        """
        # `max` propagates NaN, so the largest logit is finite only if no logit of the row is NaN or +∞.
        largest_B, token_B = logits_BV.max(dim=1)
        if not torch.isfinite(largest_B).all():
            raise SparsortError(
                "the model computes logits that are not finite. Run it in bfloat16 or float32 (dtype='float32')."
            )
        if self._sampling.no_repeat_ngram:
            self._ban(rows, logits_BV)
            token_B = logits_BV.argmax(dim=1)
        if self._sampling.temperature:
            token_B = self._draw(rows, logits_BV, token_B)
        for row, token in zip(rows, token_B.tolist(), strict=True):
            self._append(self._rows[row], token)
        return token_B

    def _ban(self, rows: Sequence[int], logits_BV: Tensor) -> None:
        for number, row in enumerate(rows):
            ngrams = self._rows[row].ngrams
            # Words of a template repeat in every demonstration, and are exempt.
            banned = sorted(ngrams.would_repeat() - self._sampling.kept) if ngrams is not None else []
            if banned:
                logits_BV[number, banned] = -torch.inf

    def _draw(self, rows: Sequence[int], logits_BV: Tensor, likeliest_B: Tensor) -> Tensor:
        # The numbers of a row are drawn in advance and used by position, whatever batch the row is in.
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

    def _append(self, row: _WrittenRow, token: int) -> None:
        row.ids.append(token)
        if row.ngrams is not None:
            row.ngrams.add(token)
        if token in self._ends:
            row.ended = True
        elif token not in self._silent:
            row.text.add(token)
        if row.ended or len(row.ids) >= self._most:
            row.text.finish()
        # After `finish`, because the text of the last tokens may complete a stop string.
        row.ended = row.text.cut(self._stop) or row.ended


def draw(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_k: int = 0) -> Tensor:
    """Draw one token per row, (B,), by inverting the cumulative distribution at `uniform_B`.

    Args:
        logits_BV: logits.
        uniform_B: numbers in [0, 1).
        temperature: a number above 0.
        top_k: draw from this many of the most likely tokens; 0 for all.
    """
    ids_BK = None
    if 0 < top_k < logits_BV.shape[1]:
        logits_BV, ids_BK = logits_BV.topk(top_k, dim=1)
    cumulative_BV = (logits_BV.double() / temperature).softmax(dim=1).cumsum(dim=1)
    # Rounding leaves the last sum near 1, so the number is scaled by it. `right=True` searches for a sum strictly above the
    # number: with ≥, a leading token of probability 0 would be drawn at 0.
    place_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)
    place_B1 = place_B1.clamp(max=cumulative_BV.shape[1] - 1)
    return (place_B1 if ids_BK is None else ids_BK.gather(1, place_B1))[:, 0]


@dataclass(kw_only=True)
class _WrittenRow:
    text: _Text
    ngrams: _Ngrams | None
    uniform: Any
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class _Text:
    """Incremental decoding: appends the text that new tokens add, as soon as their last character is complete."""

    def __init__(self, tokenizer: Any, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        # The tokens before `_end` are decoded; those from `_begin` are decoded again as context of the next ones.
        self._begin, self._end = 0, len(self._ids)
        self._searched = 0
        self.text = ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._decode_new(final=False)

    def finish(self) -> None:
        """Decode the remaining tokens, even if they end within a character."""
        self._decode_new(final=True)

    def cut(self, stop: Sequence[str]) -> bool:
        """Cut the text where the first stop string begins; returns whether there was one."""
        # A stop string may have begun in the part that was searched before.
        first = max(self._searched - max(map(len, stop), default=0) + 1, 0)
        places = [place for text in stop if (place := self.text.find(text, first)) >= 0]
        self._searched = len(self.text)
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def _decode_new(self, *, final: bool) -> None:
        if self._end == len(self._ids):
            return
        before, now = self._decode(self._ids[self._begin : self._end]), self._decode(self._ids[self._begin :])
        # A replacement character at the end may be the first bytes of a character that the next tokens complete.
        if (now.endswith("\ufffd") and not final) or len(now) <= len(before):
            return
        self.text += now[len(before) :]
        # The tokens just decoded are the context of the next ones: a decoder may drop a space before its first token.
        self._begin, self._end = self._end, len(self._ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Ngrams:
    """For every n - 1 consecutive tokens of a row, the tokens that have followed them."""

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
        """Return the next tokens that would repeat an n-gram."""
        return self._followers.get(tuple(self._last), set())


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens by id, including those that were added to the vocabulary."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return named | {token: entry.content for token, entry in added.items() if entry.special}
