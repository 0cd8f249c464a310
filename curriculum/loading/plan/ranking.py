"""Sort rows by difficulty, easiest first.

Contract: rows with equal difficulty are in the order of their ids; −inf and inf are valid values; rows whose difficulty is
NaN have no score, and `unscored` decides their position. If ids are given, the result does not depend on the order of the rows.

Trade-off: a difficulty and its row number are packed into one 64-bit integer and sorted as such, which is 20 times as fast as
a stable argsort and needs no memory except for the keys. Differences that only float64 can represent need a second pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.curriculum.loading.plan.settings import Unscored
from sparsort.errors import SparsortError
from sparsort.paths import spell
from sparsort.values import as_text, is_missing

Rows = NDArray[Any]

# The number of rows that are converted at a time, which bounds the memory for temporary arrays.
_CHUNK = 1 << 20
_LAST = np.uint32(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def row_type(n: int) -> type[np.unsignedinteger[Any]]:
    """The narrowest unsigned type that can represent row numbers below n."""
    return np.uint32 if n < 2**32 else np.uint64


def group_names(groups: Iterable[Any], field: str) -> list[str]:
    """The name of each row's group.

    Args:
        groups: the value that names the group of each row.
        field: the field that the values come from, for the error message.

    Raises:
        SparsortError: a group is missing, or has no text of its own.
    """
    values = list(groups)
    if absent := [place for place, value in enumerate(values) if is_missing(value)]:
        raise SparsortError(
            f"{len(absent)} of {len(values)} rows have no {field!r}, such as row {absent[0]}: every row needs a group."
        )
    return [as_text(value, field=spell([field]), where=f"row {place}") for place, value in enumerate(values)]


def by_id(ids: Sequence[str] | NDArray[Any]) -> Rows:
    """Row numbers in ascending order of their ids, (N,).

    Raises:
        SparsortError: an id occurs twice.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.array(ids)
    order = np.asarray(pc.sort_indices(column))
    ranked = column.take(pa.array(order))
    if len(ranked) > 1:
        equal = np.flatnonzero(np.asarray(pc.equal(ranked[1:], ranked[:-1]).to_pylist(), dtype=bool))
        if equal.size:
            raise SparsortError(
                f"{equal.size} ids occur more than once, such as {ranked[int(equal[0])].as_py()!r}: an id identifies one row. "
                "Give each row an id of its own, or omit ids to use positions."
            )
    return order.astype(row_type(len(order)))


def rank_rows(difficulty: ArrayLike, *, ids: Rows | None = None, unscored: Unscored = "last") -> Rows:
    """Sort rows by increasing difficulty.

    Args:
        difficulty: (N,) float32, float64 or integers; may be a memory map.
        ids: rows in the order of their ids (`by_id`); None if positions serve as ids.
        unscored: the position of rows with NaN: "first", or "last" for every other choice.

    Returns:
        (N,) unsigned row numbers; entry r is the row of rank r.

    Raises:
        SparsortError: difficulty is not one number per row.
    """
    values = np.asanyarray(difficulty)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise SparsortError(f"difficulty must be one number per row, (N,), not {values.dtype} of shape {values.shape}.")
    if ids is not None:
        values = values[ids]
    if len(values) >= 2**32:
        order: Rows = np.argsort(values, kind="stable")  # puts NaN last
    else:
        order = _sort_packed(values, unscored)
    return order if ids is None else ids[order]


def spread_groups(order: Rows, codes: NDArray[np.integer[Any]], n_groups: int) -> Rows:
    """Merge the groups so that every prefix contains each group in proportion: sort rows by their percentile in their group.

    Args:
        order: (N,) rows, easiest first.
        codes: (N,) group of each row, in [0, n_groups).
        n_groups: number of groups.
    """
    ranked = codes[order]
    percentile = np.empty(len(order))
    for group in range(n_groups):
        places = np.flatnonzero(ranked == group)
        # The offset of 0.5 puts rows in the middle of their share, so a small group does not always come first.
        percentile[places] = (np.arange(len(places)) + 0.5) / max(1, len(places))
    merged: Rows = order[np.argsort(percentile, kind="stable")]
    return merged


def _sort_packed(values: NDArray[Any], unscored: Unscored) -> Rows:
    n = len(values)
    keys = np.empty(n, dtype=np.uint64)
    exact = values.dtype.kind == "f"  # large integers can differ although their floats are equal
    # The fast path needs float32 to represent every value exactly. The first chunk with another value ends the
    # attempt.
    for begin in range(0, n if exact else 0, _CHUNK):
        chunk = values[begin : begin + _CHUNK]
        with np.errstate(over="ignore"):  # a value that overflows is not exact, and needs the second pass
            narrow = chunk.astype(np.float32)
        exact = exact and bool(np.all((narrow == chunk) | np.isnan(chunk)))
        if not exact:
            break
        bits = _ordered(narrow, np.uint32)
        # Rows without a score get the smallest or the largest key.
        bits[np.isnan(narrow)] = 0 if unscored == "first" else _LAST
        keys[begin : begin + _CHUNK] = (bits.astype(np.uint64) << _SHIFT) | np.arange(
            begin, begin + len(chunk), dtype=np.uint64
        )
    if exact:
        return _rows_of(keys)
    if values.dtype.kind == "f":
        bits = _ordered(values.astype(np.float64), np.uint64)
        bits[np.isnan(values)] = 0 if unscored == "first" else np.uint64(0xFFFFFFFFFFFFFFFF)
    else:
        # Flipping the sign bit maps signed integers to unsigned ones in the same order.
        sign = np.uint64(0 if values.dtype.kind == "u" else 1 << 63)
        bits = values.astype(np.uint64 if values.dtype.kind == "u" else np.int64).view(np.uint64) ^ sign
    # A radix sort with two digits of 32 bits, the least significant digit first. The second sort is stable with respect to the
    # first one, because its keys contain the places that the first sort assigned.
    places = np.arange(n, dtype=np.uint64)
    first = _rows_of(((bits & _LOW) << _SHIFT) | places)
    second = _rows_of((bits[first] & ~_LOW) | places)
    ordered: Rows = first[second]
    return ordered


def _rows_of(keys: NDArray[np.uint64]) -> Rows:
    # Sort in place and extract rows in chunks, so that no second array of 64-bit keys is needed.
    keys.sort()
    rows = np.empty(len(keys), dtype=np.uint32)
    for begin in range(0, len(keys), _CHUNK):
        rows[begin : begin + _CHUNK] = keys[begin : begin + _CHUNK] & _LOW
    return rows


def _ordered(values: NDArray[Any], unsigned: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """Unsigned integers that sort like the floats: the sign bit is set for positive numbers, all bits are inverted for others."""
    # Adding 0 turns −0 into 0, which it is equal to.
    values = values + values.dtype.type(0)
    bits = values.view(unsigned)
    sign = unsigned(1 << (8 * bits.itemsize - 1))
    ordered: NDArray[Any] = np.where(bits & sign, ~bits, bits | sign)
    return ordered
