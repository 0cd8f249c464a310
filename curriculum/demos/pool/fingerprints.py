"""Texts as sets of word shingles, by which near-duplicates are found.

Contract: `tokens` folds whatever does not change a question (Unicode form, case, spaces, sentence punctuation) and keeps whatever
does (digits, operators, brackets). Hashes come from blake2b, so they are the same in every process and on every machine.

Shapes: N texts; T tokens, U shingles and S distinct shingles over all texts.
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

# Thai, Lao, Burmese, Khmer, Chinese and Japanese are written without spaces, so a run of letters would be a whole sentence:
# every character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")
# A hyphen between letters, as in "well-known" or where a line was broken. Between digits it is a minus sign.
_HYPHEN = re.compile(r"(?<=[^\W\d_])\s*-+\s*(?=[^\W\d_])")
# "5!" and "(n + 1)!" are factorials, while "Stop!" is punctuation. A factorial is replaced by a private character, which is kept.
_FACTORIAL = re.compile(r"(?<=[\d)])!")
_KEPT_PUNCTUATION = frozenset("*/%-#()[]{}\ue000")
_DROPPED_SYMBOLS = frozenset("$`´¨")
# NFKC would turn 10² into 102, so superscripts are spelt out as 10^2 first. Two signs of mathematics get their ASCII form.
_SPELT_OUT = str.maketrans({"\u2212": "-", "\u2217": "*", **{chr(code): f"^{digit}" for digit, code in enumerate(
    (0x2070, 0xB9, 0xB2, 0xB3, 0x2074, 0x2075, 0x2076, 0x2077, 0x2078, 0x2079))}})  # fmt: skip
# Odd multipliers with well mixed bits, from splitmix64 and xxHash: one for each place in a shingle.
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def tokens(text: str) -> list[str]:
    """The folded words, numbers and operators of a text; a text that is only punctuation gives its folded pieces.

    Folding normalises the Unicode form (NFKC), the case and spaces, and removes hyphens inside words and sentence punctuation.
    Brackets, "!" after a number, and signs of mathematics and currency are words of their own, except for the dollar, which is
    just as often a delimiter of LaTeX.
    """
    # Folding the case can undo the normal form, so the text is normalised again.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_SPELT_OUT)).casefold())
    folded = _FACTORIAL.sub("\ue000", _HYPHEN.sub(" ", folded))
    pieces: list[str] = _TOKEN.findall(folded)
    return [piece for piece in pieces if len(piece) > 1 or _is_kept(piece)] or folded.split()


@functools.lru_cache(maxsize=4096)
def _is_kept(character: str) -> bool:
    if character in _KEPT_PUNCTUATION:
        return True
    return not unicodedata.category(character).startswith("P") and character not in _DROPPED_SYMBOLS


def hash_text(text: str) -> int:
    """A 64-bit hash of a text, which is the same on every machine."""
    # Valid JSON can contain lone surrogates, which plain UTF-8 refuses.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scramble(values: Hashes) -> Hashes:
    """Spread 64-bit values evenly, by the finaliser of splitmix64, a bijection."""
    # The products wrap around modulo 2⁶⁴ as intended; NumPy does not warn about arrays of integers.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprints:
    """The hashes of N texts by which they are compared.

    Attributes:
        shingles: (S,) hashes of the distinct word 3-shingles, text after text; a shorter text is one shingle.
        offsets: (N + 1,) offset in `shingles` at which each text begins, and S.
        exact: (N,) hash of all tokens in their order; equal if the texts are equal once folded.
        n_tokens: (N,) number of tokens.
        signs: (N,) hash of the numbers (2, 2x) and operators in their order.
        n_signs: (N,) number of numbers and operators.
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
        """The number of distinct shingles of each text, (N,)."""
        return np.diff(self.offsets)

    @functools.cached_property
    def _inverted(self) -> tuple[Hashes, NDArray[np.int64]]:
        """The shingles of all texts in ascending order of their hashes, (S,), and the text that each belongs to, (S,)."""
        order = np.argsort(self.shingles, kind="stable")
        owners = np.repeat(np.arange(len(self)), self.n_shingles)
        return self.shingles[order], owners[order]

    def jaccard_with(self, shingles: Hashes) -> NDArray[np.float64]:
        """The Jaccard similarity of each text to a text with these distinct shingles, (N,); 0 if both are empty."""
        by_hash, owners = self._inverted
        first, last = np.searchsorted(by_hash, shingles, "left"), np.searchsorted(by_hash, shingles, "right")
        hits = [owners[start:end] for start, end in zip(first.tolist(), last.tolist(), strict=True) if end > start]
        # Each shingle occurs once on either side, so counting the owners of the shared ones gives the intersections.
        shared = np.bincount(np.concatenate(hits), minlength=len(self)) if hits else np.zeros(len(self), dtype=np.int64)
        union = self.n_shingles + len(shingles) - shared
        return np.asarray(shared / np.maximum(union, 1), dtype=np.float64)


def fingerprints(texts: Sequence[str]) -> Fingerprints:
    """The fingerprints of N texts."""
    words = [tokens(text) for text in texts]
    signs = [[token for token in line if _is_sign(token)] for line in words]
    # Tokens repeat, so each distinct token is hashed once.
    hash_of = {token: hash_text(token) for token in {token for line in words for token in line}}
    hashes_T = np.array([hash_of[token] for line in words for token in line], dtype=np.uint64)
    n_tokens = np.array([len(line) for line in words], dtype=np.int64)
    shingles, offsets = _shingles(hashes_T, n_tokens)
    return Fingerprints(
        shingles=shingles,
        offsets=offsets,
        exact=np.array([hash_text("\n".join(line)) for line in words], dtype=np.uint64),
        n_tokens=n_tokens,
        signs=np.array([hash_text("\n".join(line)) for line in signs], dtype=np.uint64),
        n_signs=np.array([len(line) for line in signs], dtype=np.int64),
    )


def _is_sign(token: str) -> bool:
    """Whether a token is a number or an operator: it starts with a digit, or is a single symbol or punctuation mark."""
    return token[0].isdigit() or (len(token) == 1 and unicodedata.category(token)[0] in "SPC")


def _shingles(hashes_T: Hashes, n_tokens: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the distinct shingles, text after text, (S,), and their offsets, (N + 1,)."""
    width_N = np.minimum(n_tokens, SHINGLE_WORDS)
    count_N = np.where(n_tokens > 0, n_tokens - width_N + 1, 0)
    owner_U = np.repeat(np.arange(len(n_tokens)), count_N)
    # A shingle starts at the first token of its text plus its number within the text.
    within_U = np.arange(len(owner_U)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    start_U = np.repeat(np.cumsum(n_tokens) - n_tokens, count_N) + within_U
    mixed_U = np.zeros(len(owner_U), dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        has_word_U = width_N[owner_U] > place
        # Each place has its own multiplier, so that the same words in another order are another shingle.
        mixed_U[has_word_U] += scramble(hashes_T[start_U[has_word_U] + place] * _MIX[place])
    mixed_U = scramble(mixed_U)
    order = np.lexsort((mixed_U, owner_U))
    mixed_U, owner_U = mixed_U[order], owner_U[order]
    # Sorted by text, then by hash: a shingle is a repetition if both equal those of the shingle before it.
    is_new_U = np.ones(len(mixed_U), dtype=bool)
    is_new_U[1:] = (mixed_U[1:] != mixed_U[:-1]) | (owner_U[1:] != owner_U[:-1])
    per_text = np.bincount(owner_U[is_new_U], minlength=len(n_tokens))
    return mixed_U[is_new_U], np.concatenate([[0], np.cumsum(per_text)]).astype(np.int64)
