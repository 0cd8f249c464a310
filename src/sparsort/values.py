"""Values of rows: whether a value is missing, whether it has a text, and how to look up a field.

Contract: all code that tests for a missing value calls `is_missing`, and all code that writes a value into a prompt, a label, an
id or an excerpt calls `as_text`. NaN counts as missing in every form that data libraries give it. A list or a dictionary has
no text of its own; the error suggests the path to the part that was probably meant. Only keys of mappings and items of
sequences are looked up, never attributes. Neither pandas nor torch is imported.
"""

from __future__ import annotations

import datetime
import sys
import uuid
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Number
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError, did_you_mean
from sparsort.paths import is_index, parse_field, spell

# Kinds of NumPy scalars that have a text: booleans, numbers, times and text, but not bytes, objects and records.
_NUMPY_TEXT = "biufcmMU"
_TEXT = (str, Number, datetime.date, datetime.time, datetime.timedelta, uuid.UUID)
_BYTES = (bytes, bytearray, memoryview)
_EXAMPLE_DEPTH = 4


def is_missing(value: Any) -> bool:
    """Whether a value is missing: None, NaN (Python, NumPy, Decimal, a 0-d tensor), NaT, `pandas.NA` or a masked element."""
    if value is None:
        return True
    # Most values are text or whole numbers, which are never missing.
    if isinstance(value, (str, int)):
        return False
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, (float, complex, np.number, np.datetime64)):
        # Only NaN and NaT differ from themselves.
        return bool(value != value)
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and (isinstance(value, np.ma.core.MaskedConstant) or is_missing(value[()]))
    if _is_scalar_tensor(value):
        return bool((value != value).item())
    # A value of pandas exists only if its library was imported, so a look into `sys.modules` is enough.
    pandas = sys.modules.get("pandas")
    return pandas is not None and (value is getattr(pandas, "NA", None) or value is getattr(pandas, "NaT", None))


def missing_name(value: Any) -> str:
    """The name of a missing value in a message."""
    if value is None:
        return "null"
    return "NaN (a missing value)" if isinstance(value, (float, np.number)) else f"{value} (a missing value)"


def has_text(value: Any) -> bool:
    """Whether a value that is not missing has a text of its own: text, numbers, booleans, dates and times, UUIDs."""
    if isinstance(value, np.generic):
        return value.dtype.kind in _NUMPY_TEXT
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and has_text(value[()])
    return isinstance(value, _TEXT) or _is_scalar_tensor(value)


def as_text(value: Any, *, field: str, where: str, way_out: str = "") -> str:
    """The text of a value that is not missing, as `str` writes it.

    Args:
        value: the value.
        field: the field that the value was read from, in the notation of `sparsort.paths`.
        where: the name of the row in an error message, such as "row 'q7'".
        way_out: a sentence about an alternative, at the end of the error message.

    Raises:
        SparsortError: the value has no text of its own.
    """
    # The common case comes first, since every field of every prompt passes here.
    if type(value) is str:
        return value
    if not has_text(value):
        raise not_text(value, field=field, where=where, way_out=way_out)
    try:
        # `str` of a tensor would be its notation, "tensor(2.5)".
        return str(value.item() if _is_scalar_tensor(value) else scalar(value))
    except ValueError as error:  # Python converts integers of at most 4300 digits to text
        raise SparsortError(f"{where} has a value in the field {field!r} that has no text: {error}.") from error


def scalar(value: Any) -> Any:
    """The element of a 0-d array; any other value unchanged."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def not_text(value: Any, *, field: str, where: str, way_out: str = "") -> SparsortError:
    """The error for a value that has no text of its own, with the path to a part that has one."""
    part = _example(value, field)
    step = f"Name the part that you want, such as {{{part}}}" if part else "Put its text into a column of its own"
    return SparsortError(
        f"{where} has {kind_of(value)} in the field {field!r}, which has no text of its own. {step}.{way_out and f' {way_out}'}"
    )


def missing_field(field: str, row: Mapping[str, Any], where: str, *, in_template: bool = False) -> SparsortError:
    """The error for a row that lacks the column of `field`, with the nearest column name, or that has no value there.

    Args:
        field: the field.
        row: the row that lacks it.
        where: the name of the row in the message.
        in_template: whether the field was written in braces, which may have been meant literally.
    """
    column, *steps = parse_field(field)
    if column in row:
        value = value_at(row, field, where=where)
        what = "no value" if steps and value is None else missing_name(value)
        return SparsortError(f"{where} has {what} in the field {field!r}. Give it a value, or remove the row.")
    names = [str(name) for name in row]
    hint = did_you_mean(column, names)
    if in_template and not hint:
        hint = f" If the braces are meant literally, double them: {{{{{field}}}}}."
    # The path is also the name of a column, which needs brackets because of its dots.
    if steps and (plain := next((name for name in names if name == field), None)):
        hint = f" For the column {plain!r} write {{{spell([plain])}}}: a dot outside brackets begins a path."
    return SparsortError(f"{where} has no field {column!r}.{hint} It has: {', '.join(names) or 'no fields'}.")


def value_at(row: Mapping[str, Any], field: str, *, where: str) -> Any:
    """The value at a field of a row; None if the path into the column leads to no value.

    A key that a dictionary lacks counts as null, because a table fills in keys that a JSON line may omit.

    Raises:
        SparsortError: the row lacks the column, or a step of the path does not fit the value that it is applied to.
    """
    column, *steps = parse_field(field)
    if column not in row:
        raise missing_field(field, row, where)
    value = row[column]
    for depth, step in enumerate(steps):
        if is_missing(value):
            return None
        value = _inside(value, step, spell([column, *steps[:depth]]), where)
    return value


def text_at(row: Mapping[str, Any], field: str, *, where: str, way_out: str = "") -> str:
    """The text at a field of a row; `way_out` as in `as_text`.

    Raises:
        SparsortError: as for `value_at`; or the value is missing, or has no text of its own.
    """
    value = value_at(row, field, where=where)
    if is_missing(value):
        raise missing_field(field, row, where)
    return as_text(value, field=field, where=where, way_out=way_out)


def text_if_any(row: Mapping[str, Any], field: str, *, where: str, way_out: str = "") -> str | None:
    """The text at a field of a row; None if the row has no such column, or no value there.

    Raises:
        SparsortError: the value has no text of its own, or a step of the path does not fit.
    """
    if parse_field(field)[0] not in row or is_missing(value_at(row, field, where=where)):
        return None
    return text_at(row, field, where=where, way_out=way_out)


def put(row: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A copy of a row with another value at a field; dictionaries and lists along the path are copied, or created."""
    column, *steps = parse_field(field)
    return {**row, column: _put(row.get(column), steps, value)}


def without(row: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy of a row without the value at a field.

    A dictionary that is left empty is removed too. An item of a list becomes None, so that the others keep their places.
    """
    column, *steps = parse_field(field)
    left = _without(row.get(column), steps)
    return {
        name: left if name == column else value for name, value in row.items() if name != column or left is not None
    }


def number_array(values: Any) -> NDArray[np.float64]:
    """The values as float64, with NaN for missing values; an array keeps its shape.

    Raises:
        TypeError, ValueError: a value is not a number.
    """
    # Such values may contain pandas.NA, which NumPy cannot convert to a number.
    if isinstance(values, (list, tuple)) or getattr(getattr(values, "dtype", None), "kind", "") == "O":
        values = [np.nan if is_missing(value) else value for value in values]
    return np.asarray(values, dtype=np.float64)


def row_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """Build a row that has each text at its field.

    Args:
        texts: field → text.

    Raises:
        SparsortError: no such row exists, because one of the fields is inside another.
    """
    row: dict[str, Any] = {}
    for field, text in texts.items():
        row = put(row, field, text)
    # A later field may have replaced an earlier one, such as "a" and "a.b".
    for field, text in texts.items():
        if value_at(row, field, where="the row") != text:
            raise SparsortError(
                f"the fields {', '.join(texts)} overlap at {field!r}, so their texts cannot be given one by one. "
                "Pass a whole row, as a mapping."
            )
    return row


def kind_of(value: Any) -> str:
    """The kind of a value, for messages."""
    if isinstance(value, Mapping):
        return "a dictionary"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, _BYTES) or (isinstance(value, np.generic) and value.dtype.kind == "S"):
        return "bytes"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, (set, frozenset)):
        return "a set"
    if isinstance(value, Number):
        return "a number"
    return f"an object of the type {type(value).__name__}"


def is_list(value: Any) -> bool:
    """Whether a value is a sequence of items and not a text, bytes or a scalar."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, *_BYTES))


def _inside(value: Any, step: str, field: str, where: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    if is_list(value):
        if not is_index(step):
            raise SparsortError(
                f"{where} has {kind_of(value)} in the field {field!r}, and a list has no key {step!r}. "
                f"Index the list first, such as {{{field}[0].{step}}}."
            )
        place = int(step)
        return value[place] if -len(value) <= place < len(value) else None
    raise SparsortError(
        f"{where} has {kind_of(value)} in the field {field!r}, which has no part {step!r}. Only dictionaries and lists "
        f"have parts; write {{{field}}} for the whole value."
    )


def _put(old: Any, steps: Sequence[str], value: Any) -> Any:
    if not steps:
        return value
    step, *rest = steps
    if isinstance(old, Mapping) or not is_index(step):
        parts = dict(old) if isinstance(old, Mapping) else {}
        return {**parts, step: _put(parts.get(step), rest, value)}
    items, place = list(old) if is_list(old) else [], int(step)
    # Extend the list so that the index exists; a negative index counts from the end.
    items += [None] * (max(place + 1, -place) - len(items))
    items[place] = _put(items[place], rest, value)
    return items


def _without(old: Any, steps: Sequence[str]) -> Any:
    """The value without the part to which the steps lead; None if nothing is left."""
    if not steps:
        return None
    step, *rest = steps
    if isinstance(old, Mapping):
        left = _without(old.get(step), rest)
        return {
            name: left if name == step else part for name, part in old.items() if name != step or left is not None
        } or None
    if is_list(old) and is_index(step) and -len(old) <= int(step) < len(old):
        items = list(old)
        items[int(step)] = _without(items[int(step)], rest)
        return items
    return old


def _example(value: Any, field: str) -> str | None:
    """The field of the first part of a value that has a text; None if no such part is within a few steps."""
    parts: list[str | int] = list(parse_field(field))
    for _ in range(_EXAMPLE_DEPTH):
        step: str | int | None
        if isinstance(value, Mapping):
            step = next((key for key in ("content", "value", "text") if key in value), None) or next(
                (key for key in value if isinstance(key, str)), None
            )
        else:
            step = 0 if is_list(value) and len(value) else None
        if step is None:
            return None
        parts.append(step)
        value = value[step]
        if not is_missing(value) and has_text(value):
            return spell(parts)
    return None


def _is_scalar_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.dim() == 0
