"""A digest of a whole Parquet file, stored inside the file, so that every copy of the file can be checked.

Contract: `add_seal` inserts a block of JSON between the last page and the footer. Parquet readers locate the footer from the end
of the file and the pages by offsets in the footer, so they never read the block. `read_seal` returns the facts in the block only
if every other bit of the file is unchanged. It does not parse Parquet: checking 10,000 shards of 30 kB takes one second.

    PAR1 · pages · copy · "sparsort" · JSON · its length (4 bytes, little endian) · "sparsort" · footer · its length · PAR1

The copy is optional. It is the same table in a format that is faster to read, for files so small that opening Parquet takes most
of the time. The digest of the file covers the copy; the block also records its position and its own digest, which `read_copy`
checks.

The word "sparsort" is there twice, so a single flipped bit cannot turn a sealed file into one without a seal. A file without a
seal was written by an older sparsort or by another program, such as pyarrow from a table that was read from a sealed file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sparsort.errors import SparsortError
from sparsort.storage.integrity import digest_of_bytes, digest_of_file, is_sealed, parse_own_json, record_of, seal

_MAGIC = b"sparsort"
_PARQUET = b"PAR1"
# Bytes after the footer, and bytes of the block after its JSON: a length, then a magic word.
_TAIL = 4 + len(_PARQUET)
_END = 4 + len(_MAGIC)
_PIECE = 1 << 20


class DamagedError(SparsortError):
    """A file has changed since it was written. `reason` says how the damage was detected."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}.")
        self.reason = reason


def add_seal(path: Path, facts: Mapping[str, Any], *, copy: bytes = b"") -> None:
    """Insert a digest of a Parquet file, and `facts`, into the file.

    Args:
        path: a Parquet file without a seal that no process reads yet, such as a temporary file.
        facts: JSON values that `read_seal` returns.
        copy: bytes that `read_copy` returns; empty for none.

    Raises:
        OSError: the disk cannot be written.
        DamagedError: the file does not end as a Parquet file.
    """
    size = path.stat().st_size
    with path.open("rb+") as handle:
        footer = _footer(handle, size)
        if footer is None:
            raise DamagedError(path, "it does not end as a Parquet file")
        handle.seek(footer)
        tail = handle.read()
        values: dict[str, Any] = {"facts": dict(facts)}
        if copy:
            values["copy"] = {"begin": footer, "bytes": len(copy), "digest": digest_of_bytes(copy)}
            handle.seek(footer)
            # The digest covers the copy, so it is written, followed by the footer, before the digest is computed.
            handle.write(copy + tail)
            handle.flush()
        values["file"] = {"bytes": size + len(copy), "digest": digest_of_file(path)}
        # The footer moves to the end of the file; its own length field stays valid, because it does not count the block.
        block = _MAGIC + json.dumps(seal(values), ensure_ascii=False).encode()
        handle.seek(footer + len(copy))
        handle.write(block + len(block).to_bytes(4, "little") + _MAGIC + tail)


def read_seal(path: Path) -> dict[str, Any] | None:
    """The facts that a Parquet file was sealed with; None if it has no seal.

    Raises:
        DamagedError: the file has a seal, and a bit of the seal or of the rest of the file has changed.
        OSError: the file is missing, or the disk cannot read it.
    """
    return read_seal_and_record(path)[0]


def read_seal_and_record(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The result of `read_seal`, and the entry of the file in a manifest (`record_of`). A small file is read once for both."""
    with _opened(path) as handle:
        record = _record(handle.getvalue()) if isinstance(handle, io.BytesIO) else record_of(path)
        if (block := _find(handle)) is None:
            return None, record
        values, begin, footer, size = block
        file = {"bytes": size - (footer - begin), "digest": _digest_around(handle, begin, footer)} if values else None
    if file is None or values["file"] != file:
        raise DamagedError(path, "its content has changed since it was written")
    return dict(values["facts"]), record


def read_copy(path: Path) -> bytes | None:
    """The copy that was sealed into a Parquet file; None if the file has no copy, or the copy has changed.

    Only the copy and its record are checked. The rest of the file may be damaged.

    Raises:
        OSError: the file is missing, or the disk cannot read it.
    """
    with _opened(path) as handle:
        block = _find(handle)
        record = block[0].get("copy") if block is not None else None
        if record is None:
            return None
        handle.seek(record["begin"])
        copy = handle.read(record["bytes"])
    return copy if digest_of_bytes(copy) == record["digest"] else None


def _record(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "digest": digest_of_bytes(content)}


def _opened(path: Path) -> BinaryIO:
    """An open file; a small file is read into memory by one system call, instead of one call for each part."""
    handle = path.open("rb")
    if os.fstat(handle.fileno()).st_size > _PIECE:
        return handle
    with handle:
        return io.BytesIO(handle.read())


def _find(handle: BinaryIO) -> tuple[dict[str, Any], int, int, int] | None:
    """The values in the block (empty if they have changed), its begin and end, and the file's size; None without a block."""
    size = handle.seek(0, os.SEEK_END)
    footer = _footer(handle, size)
    if footer is None or footer < _END:
        return None
    handle.seek(footer - _END)
    end = handle.read(_END)
    begin = footer - _END - int.from_bytes(end[:4], "little")
    # A damaged length may point to before the beginning of the file.
    handle.seek(max(begin, 0))
    # One intact mark of two is enough to know that the file was sealed, and two are needed to trust the block.
    marks = handle.read(len(_MAGIC)), end[4:]
    if _MAGIC not in marks:
        return None
    values = _parse(handle.read(footer - _END - begin - len(_MAGIC))) if marks == (_MAGIC, _MAGIC) else {}
    return values, begin, footer, size


def _footer(handle: BinaryIO, size: int) -> int | None:
    """The offset of the footer; None if the file does not end as a Parquet file."""
    if size < len(_PARQUET) + _TAIL:
        return None
    handle.seek(size - _TAIL)
    tail = handle.read(_TAIL)
    begin = size - _TAIL - int.from_bytes(tail[:4], "little")
    return begin if tail[4:] == _PARQUET and begin >= len(_PARQUET) else None


def _parse(block: bytes) -> dict[str, Any]:
    """The values in a block; an empty dictionary if they have changed since they were sealed."""
    try:
        values = parse_own_json(block)
    except ValueError:
        return {}
    return values if isinstance(values, dict) and is_sealed(values) else {}


def _digest_around(handle: BinaryIO, begin: int, end: int) -> str:
    """The digest of the file without the bytes from `begin` to `end`, as it was before they were inserted."""
    state = hashlib.blake2b(digest_size=16)
    handle.seek(0)
    remaining = begin
    while remaining and (piece := handle.read(min(remaining, _PIECE))):
        state.update(piece)
        remaining -= len(piece)
    handle.seek(end)
    while piece := handle.read(_PIECE):
        state.update(piece)
    return state.hexdigest()
