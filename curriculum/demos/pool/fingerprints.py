"""Texts as sets of word shingles: what two texts must share to be called duplicates.

Contract: `tokens` folds what does not change a question (Unicode form, case, spaces, sentence punctuation) and keeps
what does (digits, operators, brackets). Hashes are blake2b's, so they are the same in every process and everywhere.

Shapes: N texts, T tokens and S distinct shingles over all of them.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

SHINGLE_WORDS = 3

# Scripts written without spaces, where a run of letters is a sentence: there every character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")
_HYPHEN = re.compile(r"(?<=[^\W\d_])\s*-+\s*(?=[^\W\d_])")
_FACTORIAL = re.compile(r"(?<=[\d)])!")
_KEPT_PUNCTUATION = frozenset("*/%-#()[]{}\ue000")
_DROPPED_SYMBOLS = frozenset("$`´¨")
# NFKC would turn 10² into 102.
_SPELT_OUT = str.maketrans({"\u2212": "-", "\u2217": "*", **{chr(code): f"^{digit}" for digit, code in enumerate(
    (0x2070, 0xB9, 0xB2, 0xB3, 0x2074, 0x2075, 0x2076, 0x2077, 0x2078, 0x2079))}})  # fmt: skip
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def tokens(text: str) -> list[str]:
    """The words, numbers and operators of a text, folded; a text of punctuation alone gives its folded pieces.

    Folded: NFKC, case, spaces, hyphens inside words, and sentence punctuation. Kept as words of their own: signs of
    mathematics and currency other than the dollar (a LaTeX delimiter as often), brackets, "!" behind a number.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_SPELT_OUT)).casefold())
    folded = _FACTORIAL.sub("\ue000", _HYPHEN.sub(" ", folded))
    found: list[str] = _TOKEN.findall(folded)
    return [token for token in found if len(token) > 1 or _counts(token)] or folded.split()


@functools.lru_cache(maxsize=4096)
def _counts(character: str) -> bool:
    if character in _KEPT_PUNCTUATION:
        return True
    return not unicodedata.category(character).startswith("P") and character not in _DROPPED_SYMBOLS


def hash_text(text: str) -> int:
    """A 64-bit hash of a text, the same everywhere. Lone surrogates, which JSON can hold, are let through."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scramble(values: Hashes) -> Hashes:
    """Spread 64-bit values evenly (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprints:
    """What is compared of N texts.

    Attributes:
        shingles: (S,) hashes of the distinct word 3-shingles, text after text; a shorter text is one shingle.
        offsets: (N + 1,) where each text's shingles begin in `shingles`.
        exact: (N,) hash of all tokens in order; equal for texts that are equal once folded.
        n_tokens: (N,) tokens a text.
        signs: (N,) hash of the numbers (2, 2x) and operators in order.
        n_signs: (N,) how many those are.
    """

    shingles: Hashes
    offsets: NDArray[np.int64]
    exact: Hashes
    n_tokens: NDArray[np.int64]
    signs: Hashes
    n_signs: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.exact)

    def shingles_of(self, index: int) -> Hashes:
        """The distinct shingles of one text."""
        return self.shingles[self.offsets[index] : self.offsets[index + 1]]

    @property
    def n_shingles(self) -> NDArray[np.int64]:
        """Distinct shingles a text, (N,)."""
        return np.diff(self.offsets)

    @functools.cached_property
    def _inverted(self) -> tuple[Hashes, NDArray[np.int64]]:
        order = np.argsort(self.shingles, kind="stable")
        owners = np.repeat(np.arange(len(self)), self.n_shingles)
        return self.shingles[order], owners[order]

    def jaccard_with(self, shingles: Hashes) -> NDArray[np.float64]:
        """The Jaccard similarity of every text with one set of distinct shingles, (N,); 0 where both are empty."""
        by_hash, owners = self._inverted
        first, last = np.searchsorted(by_hash, shingles, "left"), np.searchsorted(by_hash, shingles, "right")
        hits = [owners[start:end] for start, end in zip(first.tolist(), last.tolist(), strict=True) if end > start]
        shared = np.bincount(np.concatenate(hits), minlength=len(self)) if hits else np.zeros(len(self), dtype=np.int64)
        union = self.n_shingles + len(shingles) - shared
        return np.asarray(shared / np.maximum(union, 1), dtype=np.float64)


def fingerprints(texts: Sequence[str]) -> Fingerprints:
    """Fingerprint N texts."""
    words = [tokens(text) for text in texts]
    signs = [[token for token in line if _is_sign(token)] for line in words]
    hash_of = {token: hash_text(token) for token in {token for line in words for token in line}}
    flat = np.array([hash_of[token] for line in words for token in line], dtype=np.uint64)
    n_tokens = np.array([len(line) for line in words], dtype=np.int64)
    shingles, offsets = _shingles(flat, n_tokens)
    return Fingerprints(
        shingles=shingles,
        offsets=offsets,
        exact=np.array([hash_text("\n".join(line)) for line in words], dtype=np.uint64),
        n_tokens=n_tokens,
        signs=np.array([hash_text("\n".join(line)) for line in signs], dtype=np.uint64),
        n_signs=np.array([len(line) for line in signs], dtype=np.int64),
    )


def _is_sign(token: str) -> bool:
    return token[0].isdigit() or (len(token) == 1 and unicodedata.category(token)[0] in "SPC")


def _shingles(flat_T: Hashes, n_tokens: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the distinct shingles of each text, and where each text's begin."""
    width = np.minimum(n_tokens, SHINGLE_WORDS)
    count = np.where(n_tokens > 0, n_tokens - width + 1, 0)
    owner = np.repeat(np.arange(len(n_tokens)), count)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(np.cumsum(n_tokens) - n_tokens, count) + within
    mixed = np.zeros(len(owner), dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        has = width[owner] > place
        # Scrambled with its place, so that the same words in another order are another shingle.
        mixed[has] += scramble(flat_T[start[has] + place] * _MIX[place])
    mixed = scramble(mixed)
    order = np.lexsort((mixed, owner))
    mixed, owner = mixed[order], owner[order]
    is_new = np.ones(len(mixed), dtype=bool)
    is_new[1:] = (mixed[1:] != mixed[:-1]) | (owner[1:] != owner[:-1])
    per_text = np.bincount(owner[is_new], minlength=len(n_tokens))
    return mixed[is_new], np.concatenate([[0], np.cumsum(per_text)]).astype(np.int64)
