"""Reader of `.json` files: an array of rows, JSON lines, or columns; see `readers.Reader` for its contract.

Contract: an array is read into memory, and so is an object of columns as `Dataset.to_dict` or `DataFrame.to_json` writes it. An
object that is neither a row on one line nor columns is refused; if it contains rows, the message has a command to extract them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.scoring.data.encodings import nul_bytes, shell_command, wrong_encoding
from sparsort.scoring.data.readers import JsonLines, Lines, Reader, SequenceReader, is_unfinished, parse_json

# The keys of a turn of a conversation, in the two layouts that data sets use.
_TURN_KEYS = ({"role", "content"}, {"from", "value"})
_AS_LINES = "frame.to_json('rows.jsonl', orient='records', lines=True)"


def json_reader(path: Path) -> Reader:
    """The rows of a `.json` file; a `SparsortError` if it is not JSON, or is one object that is neither a row nor columns."""
    lines = JsonLines(path)
    with lines.opened() as handle:
        units = lines.split(Lines(handle, lines.name, 0, 0))
        first = next(units, None)
        head = first[1][0].strip() if first else b""
        is_last = next(units, None) is None
    if head.startswith(b"["):
        return SequenceReader(lines.name, _parse_whole(lines))
    if not head.startswith(b"{"):
        return lines
    # Many tools write JSON lines under this suffix, so several objects, each on a line of its own, are rows.
    on_one_line = not is_unfinished(head.decode("utf-8", "replace"))
    if on_one_line and not is_last:
        return lines
    if on_one_line:
        try:
            value = json.loads(head)
        except (ValueError, RecursionError):
            return lines  # the reader of lines reports the mistake with its place
    else:
        value = _parse_whole(lines)
    rows = _rows_of(value, path, on_one_line=on_one_line)
    return lines if rows is None else SequenceReader(lines.name, rows)


def _parse_whole(lines: JsonLines) -> Any:
    raw = lines.read()
    if b"\0" in raw:
        raise nul_bytes(lines.name, raw.count(b"\n", 0, raw.index(b"\0")) + 1, raw, 0)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise wrong_encoding(lines.name, line, error.start, raw[error.start]) from error
    return parse_json(text, lines.name)


def _rows_of(value: Mapping[str, Any], path: Path, *, on_one_line: bool) -> list[dict[str, Any]] | None:
    """The rows of the only object in a file; None if the object itself is a row, like a line of a JSON lines file."""
    values = list(value.values())
    lists_of_objects = [name for name, inner in value.items() if _is_rows(inner)]
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        raise SparsortError(f"{path} has the layout 'split' of pandas. Write one row on each line: {_AS_LINES}.")
    has_turns = any(
        all(any(keys <= item.keys() for keys in _TURN_KEYS) for item in value[name]) for name in lists_of_objects
    )
    if values and all(isinstance(inner, list) for inner in values) and len(lists_of_objects) < len(values):
        if len({len(column) for column in values}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*values, strict=True)]
        # A conversation and a list of another length, such as tags, are one row.
        if not (on_one_line and has_turns):
            raise _uneven(value, path)
    # The layout that `DataFrame.to_json` writes by default: {column: {index: value}}.
    if any(values) and all(isinstance(inner, dict) for inner in values):
        if _are_numbers(value):
            raise SparsortError(f"{path} has the layout 'index' of pandas. Write one row on each line: {_AS_LINES}.")
        if all(map(_are_numbers, values)):
            if any(column.keys() != values[0].keys() for column in values):
                raise _uneven(value, path)
            return [{name: column[row] for name, column in value.items()} for row in values[0]]
    if on_one_line and (has_turns or not lists_of_objects):
        return None
    raise _one_object(value, lists_of_objects, path)


def _uneven(columns: Mapping[str, Any], path: Path) -> SparsortError:
    """The error for columns (lists or `{index: value}`) that do not all have one value for each row."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        difference = "lengths: " + ", ".join(f"{name} has {length}" for name, length in list(lengths.items())[:8])
    else:
        rows = next(iter(columns.values()))
        name, row = next((name, row) for name, column in columns.items() for row in rows if row not in column)
        difference = f"indices: {name} has no value for {row!r}"
    return SparsortError(
        f"{path} looks column-oriented, but its columns have different {difference}. Give every column one value for each row, "
        "or, if the object is one row, put it into a list: [{…}]."
    )


def _one_object(value: Mapping[str, Any], lists_of_objects: list[str], path: Path) -> SparsortError:
    fields = ", ".join(list(value)[:8]) + (", …" if len(value) > 8 else "")
    problem = f"{path} is one JSON object ({fields or 'empty'}), where rows are expected."
    if not lists_of_objects:
        return SparsortError(f"{problem} If it is a row, put it into a list: [{{…}}].")
    name = max(lists_of_objects, key=lambda each: len(value[each]))
    # jq accepts any name as a JSON text in brackets, but only identifiers after a dot.
    filter_ = f".{name}[]" if name.isidentifier() and name.isascii() else f".[{json.dumps(name)}][]"
    command = shell_command(path, f"jq -c {shlex.quote(filter_)}", "-rows.jsonl")
    count = len(value[name])
    return SparsortError(
        f"{problem} Its list {name!r} contains {count} object{'s' if count != 1 else ''}; if these are the rows, extract them: "
        f"{command}"
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _are_numbers(names: Mapping[str, Any]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)
