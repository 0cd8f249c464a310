"""Is this the data that the state was written for? (Whether it is the data of the plan: `verification`.)

Contract: a fingerprint is the number of rows and a digest of each column over at most 16 rows at fixed places (the
first, the last, and evenly between); it costs 32 reads at any N and a change in other rows is not seen. It is about
values, not containers: lists, tuples, NumPy arrays and torch tensors of the same numbers are equal, so that a dataset
may change its output format, and floats are compared as float32. All missing values (None, NaN, …; see `sparsort.values`)
are equal, since a data library may turn one into the other. Objects other than numbers, strings, bytes, lists and mappings
count by the name of their type only.

Each row is read twice. A column that differs between the readings is drawn at random (augmentation), says nothing of
the data's identity and is left out. The global generators of torch, NumPy and `random` are put back afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from sparsort.errors import SparsortError
from sparsort.values import is_missing

Fingerprint = str | dict[str, Any]

MOST_ROWS = 16
MOST_COLUMNS = 12  # of a state, which is to stay below 1 KiB
_LONGEST_NAME = 24
_DIGEST_BYTES = 5
# Key of the digests that sparsort 0.1.0 wrote of columns with NaN, which it took for a value. States of it are compared with
# these; they are not written into states.
_WITH_NAN = "with_nan"


def fingerprint_of(dataset: Any, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """The fingerprint of a map-style dataset, as JSON values of at most 600 bytes.

    Args:
        dataset: with `len` and `[row]`. Examples that are mappings are digested column by column, others whole.
        columns: which columns; None for all. The first 12 by name are kept.

    Raises:
        SparsortError: a column is not there.
    """
    places = places_of(len(dataset))
    return {"rows": len(dataset), **_columns(lambda: [dataset[place] for place in places], columns)}


def places_of(n: int) -> list[int]:
    """The rows that stand for n: the first, the last, and evenly between, at most 16."""
    return sorted({i * (n - 1) // (MOST_ROWS - 1) for i in range(MOST_ROWS)}) if n else []


def fingerprint_of_stream(stream: Iterable[Any], n_rows: int) -> dict[str, Any]:
    """The same for data that is read from front to back: `n_rows`, and the first 16 rows only."""
    return {"rows": n_rows, **_columns(lambda: list(islice(stream, MOST_ROWS)), None)}


def as_saved(fingerprint: Fingerprint) -> Fingerprint:
    """What a state keeps of a fingerprint."""
    if isinstance(fingerprint, str):
        return fingerprint
    return {name: value for name, value in fingerprint.items() if name != _WITH_NAN}


def difference(saved: Any, current: Fingerprint) -> str | None:
    """How the data that a fingerprint was `saved` for differs from the current data; None where it does not.

    Columns that both have are compared, and there must be one, unless one of the two has none at all.
    """
    if isinstance(saved, str) or isinstance(current, str):
        return None if saved == current else f"it was saved as {_named(saved)} and this is {_named(current)}"
    if not isinstance(saved, Mapping) or saved.get("rows") != current["rows"]:
        rows = saved.get("rows") if isinstance(saved, Mapping) else saved
        return f"it had {rows} rows and this has {current['rows']}"
    before, now = saved.get("columns", {}), current["columns"]
    if before and now and not set(before) & set(now):
        return f"it had the columns {', '.join(before)} and this has {', '.join(now)}"
    with_nan = current.get(_WITH_NAN, {})
    changed = [name for name in now if name in before and before[name] not in (now[name], with_nan.get(name))]
    return f"other values in {', '.join(name or 'its examples' for name in changed)}" if changed else None


def _columns(read: Callable[[], list[Any]], columns: Sequence[str] | None) -> dict[str, dict[str, str]]:
    with random_state_put_back():
        examples = read()
        first, second = _digests(examples, columns), _digests(read(), columns)
        earlier = _digests(examples, columns, nan_is_a_value=True)
    stable = dict(sorted((name, digest) for name, digest in first.items() if second.get(name) == digest)[:MOST_COLUMNS])
    with_nan = {name: earlier[name] for name, digest in stable.items() if earlier[name] != digest}
    return {"columns": stable, **({_WITH_NAN: with_nan} if with_nan else {})}


def _named(fingerprint: Any) -> str:
    return f"fingerprint={fingerprint!r}" if isinstance(fingerprint, str) else "data without a name of its own"


def _digests(examples: list[Any], columns: Sequence[str] | None, *, nan_is_a_value: bool = False) -> dict[str, str]:
    if not all(isinstance(example, Mapping) for example in examples):
        return {"": _digest(examples, nan_is_a_value)}
    names = list(dict.fromkeys(name for example in examples for name in example))
    if columns is not None:
        if missing := [name for name in columns if examples and name not in names]:
            raise SparsortError(
                f"there is no column {missing[0]!r} to take a fingerprint of; the data has {', '.join(map(str, names))}."
            )
        names = list(columns)
    return {_short(str(name)): _digest([example.get(name) for example in examples], nan_is_a_value) for name in names}


def _short(name: str) -> str:
    return name if len(json.dumps(name)) - 2 <= _LONGEST_NAME else f"#{_digest(name)}"


def _digest(value: Any, nan_is_a_value: bool = False) -> str:
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in _canonical(value, nan_is_a_value):
        hashed.update(struct.pack("<q", len(part)) + part)
    return hashed.hexdigest()


def _canonical(value: Any, nan_is_a_value: bool) -> Iterator[bytes]:
    """The value as a sequence of bytes, each kind with its own first letter."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, without importing torch for it
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or (not nan_is_a_value and is_missing(value)):
        yield b"0"
    elif isinstance(value, bool):
        yield b"b1" if value else b"b0"
    elif isinstance(value, int):
        yield b"i%d" % value
    elif isinstance(value, float):
        yield b"f" + np.array([value]).astype(np.float32).tobytes()
    elif isinstance(value, str):
        yield b"s" + value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes | bytearray):
        yield b"y" + bytes(value)
    elif isinstance(value, Mapping):
        yield b"m%d" % len(value)
        for name in sorted(value, key=str):
            yield from _canonical(str(name), nan_is_a_value)
            yield from _canonical(value[name], nan_is_a_value)
    elif isinstance(value, list | tuple):
        yield b"l%d" % len(value)
        for item in value:
            yield from _canonical(item, nan_is_a_value)
    else:
        yield b"o" + type(value).__qualname__.encode()


@contextlib.contextmanager
def random_state_put_back() -> Iterator[None]:
    """Read a dataset without moving the global generators of torch, NumPy and `random`."""
    python, numpy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    tensor = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch:
            torch.set_rng_state(tensor)
