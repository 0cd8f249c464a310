"""A seeded permutation of n items, any part of which can be computed without the rest.

Contract: `permute(places, n, key)` is a permutation of [0, n) that depends on (n, key) only. It is the same in every version of
NumPy and on every machine, which a resume requires and which NumPy does not promise for the methods of its generators. For
more than 1024 items it needs no memory of size n.

Method: a generalised Feistel network over a grid of a × b ≥ n cells with cycle walking (Black & Rogaway 2002, "Ciphers
with arbitrary finite domains", method 3), whose round function is the finaliser of SplitMix64 (Steele, Lea & Flood
2014). A small n is shuffled by sorting hashed keys instead, because a network shuffles only a few items poorly.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Places = NDArray[np.int64]

SORTED_UP_TO = 1024
CHUNK = 1 << 13
_ROUNDS = 6
_SHIFT = np.uint64(32)


def key_of(*parts: int | str) -> int:
    """A 64-bit key from everything that identifies a draw, such as the seed, the epoch, its purpose and its number."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int) -> float:
    """A number in [0, 1) from a key."""
    # The upper 53 bits, as many as a float64 represents exactly.
    return (key >> 11) / (1 << 53)


def uniforms(n: int, key: int) -> NDArray[np.float64]:
    """n numbers in [0, 1) from a key, (n,)."""
    hashed = _mix(np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
    return np.asarray((hashed >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def permute(places: ArrayLike, n: int, key: int) -> Places:
    """Apply the permutation of [0, n) with this key to `places`; the result has the same shape, int64."""
    shape = np.shape(places)
    given = np.asarray(places, dtype=np.uint64).reshape(-1)
    if n <= SORTED_UP_TO:
        hashed = _mix(np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
        return np.argsort(hashed, kind="stable")[given.astype(np.int64)].reshape(shape)
    # A nearly square grid with at least n cells, of which few are beyond n.
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(key))
    # Chunks keep the temporaries in a core's cache, which is two to three times as fast.
    result = np.empty(given.shape, dtype=np.uint64)
    for begin in range(0, given.size, CHUNK):
        result[begin : begin + CHUNK] = _network(given[begin : begin + CHUNK], rows, columns, keys)
    # Cycle walking: a cell beyond n is permuted again until it is in range. Fewer than one cell in √n needs it.
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _network(result[outside], rows, columns, keys)
    return result.astype(np.int64).reshape(shape)


def permutation(n: int, key: int, *, dtype: Any = np.int64) -> NDArray[Any]:
    """The whole permutation, (n,)."""
    result = np.empty(n, dtype=dtype)
    for begin in range(0, n, CHUNK):
        end = min(n, begin + CHUNK)
        result[begin:end] = permute(np.arange(begin, end, dtype=np.uint64), n, key)
    return result


def _network(cells: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    left, right = np.divmod(cells, np.uint64(columns))
    # Each round changes one half by a hash of the other, which is invertible whatever the hash is.
    for number, round_key in enumerate(keys):
        if number % 2:
            _add(right, _mix(left ^ round_key), columns)
        else:
            _add(left, _mix(right ^ round_key), rows)
    left *= np.uint64(columns)
    left += right
    return left


def _add(half: NDArray[np.uint64], hashed: NDArray[np.uint64], size: int) -> None:
    """half = (half + hashed) modulo `size` < 2³², in place; a multiplication instead of a division maps the hash into range."""
    modulus = np.uint64(size)
    hashed >>= _SHIFT
    hashed *= modulus
    hashed >>= _SHIFT
    half += hashed
    # If half is below the modulus, the subtraction wraps around to a huge number, so the smaller of the two is the remainder.
    np.subtract(half, modulus, out=hashed)
    np.minimum(half, hashed, out=half)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
