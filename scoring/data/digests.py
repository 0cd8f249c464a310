"""Digests of rows, and the samples that are drawn by them.

Contract: a digest depends on the content of a row alone, not on the process, the machine, or the form in which the row was
given. Every score folder and plan stores such digests, so they never change.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from sparsort.values import is_missing

# The name of the sampling rule, which is stored with everything that was fitted on a sample. A record without it is from an
# earlier version, which took evenly spaced rows, so that the result depended on the order of the rows.
SAMPLING = "distinct rows by digest"
SAMPLE_ROWS = 256
# The hash is keyed, so that a sample is independent of any other choice that is made by the digests of rows.
_SAMPLE_KEY = b"sparsort sample"

Item = TypeVar("Item")


def rows_digest(rows: Iterable[tuple[str, str]]) -> str:
    """A 128-bit hash of the (id, digest) pairs of consecutive rows, as hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for name, digest in rows:
        # The length marks where an id ends; otherwise different sequences could be hashed as the same text.
        state.update(f"{len(name)}:{name}{digest}".encode())
    return state.hexdigest()


def digest_of(fields: Mapping[str, Any], content: Collection[str] | None = None) -> str:
    """The hash of a row: 128 bits of BLAKE2b of its JSON with sorted keys, as 32 hexadecimal digits.

    Args:
        fields: the row.
        content: the fields that the hash covers; None for all.

    A missing value (null, NaN, …) is hashed like an absent field, because a table fills in nulls for fields that a JSON line
    may lack. Bytes, arrays and images are hashed by their content.
    """
    present = {
        key: value for key, value in fields.items() if (content is None or key in content) and not is_missing(value)
    }
    try:
        text = _ENCODER.encode(present)
    except TypeError:  # nested keys that are not text, or keys of several types, which cannot be sorted
        text = _ENCODER.encode(_text_keys(present))
    # Half of a surrogate pair is encoded as it is, because a row with one must have a digest too.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def sample_by_digest(rows: Iterable[tuple[str, Item]], n: int) -> list[Item]:
    """Sample the `n` rows whose digests have the smallest keyed hashes, in the order of these hashes.

    The sample is a function of the set of digests. Rows with equal digests count as one, of which the first is returned, so
    neither the order of the rows nor the number of copies changes the sample.

    Args:
        rows: (digest, row) pairs. They are read once, and at most `n` are in memory at a time.
        n: sample size; if there are fewer different rows, all of them are returned.
    """
    sample: dict[int, Item] = {}
    # A heap of negated keys, because heapq pops the smallest number and the largest key is the next one to drop.
    negated: list[int] = []
    for digest, row in rows:
        key = int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=16, key=_SAMPLE_KEY).digest(), "big")
        if key in sample:
            continue
        if len(sample) < n:
            heapq.heappush(negated, -key)
        elif key < -negated[0]:
            del sample[-heapq.heapreplace(negated, -key)]
        else:
            continue
        sample[key] = row
    return [sample[key] for key in sorted(sample)]


def _plain(value: Any) -> Any:
    """A value that JSON cannot represent, in a JSON form that is the same in every process."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"bytes:{hashlib.blake2b(value, digest_size=16).hexdigest()}"
    if callable(to_list := getattr(value, "tolist", None)):  # arrays and numbers of NumPy, tensors of torch
        return to_list()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        # The iteration order of a set of texts changes with the hash seed of the process.
        return sorted(map(str, value))
    if callable(to_bytes := getattr(value, "tobytes", None)):  # images
        return [type(value).__name__, getattr(value, "size", None), _plain(to_bytes())]
    # The default text of an object contains its address, which differs between processes.
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _text_keys(inner) for key, inner in value.items()}
    return [_text_keys(inner) for inner in value] if isinstance(value, (list, tuple)) else value


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=_plain)
