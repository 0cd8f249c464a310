"""Digests of the files that sparsort writes and later trusts: recorded when written, checked before use.

Contract: a manifest is a JSON object that lists files with their sizes and digests and contains a digest of itself (`seal`). It
is written last. A reader checks the seal (`check_seal`), then each file that it uses (`check_file`), before it reads a value. A
change of any single bit in a listed file, or in a value of the manifest, is therefore reported before the value is used.

The digests guard against damage (disks, copies, kills), not against an attacker, who could write a new manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.storage.files import write_json

SEAL = "digest"
_BITS = 128
# Bytes that are read at a time.
_PIECE = 1 << 20


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does, but raise a ValueError also for nesting that is too deep for Python.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_own_json(text: str | bytes) -> Any:
    """Parse JSON that sparsort wrote: as `parse_json`, but refuse NaN and infinities, which sparsort never writes.

    Raises:
        ValueError: the text is not JSON that sparsort writes.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return _OWN_DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text}, which is not finite")
    return number


# One decoder for all files: `json.loads` makes a new one in every call with options, and a folder may have 10,000 seals.
_OWN_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


@contextlib.contextmanager
def as_written(path: Path | str, *, next_step: str) -> Iterator[None]:
    """Turn errors about values of unexpected types inside the block into an error that names the file.

    A digest shows that values have not changed, not that this version of sparsort wrote them. The block should only read.

    Args:
        path: the file, for the error message.
        next_step: the last sentence of the error message.

    Raises:
        SparsortError: a value is missing, or has another type than sparsort writes.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # The text of a KeyError is only the key.
        what = f"{reason} is missing" if isinstance(error, KeyError) else reason
        raise SparsortError(f"{path} is not what sparsort writes ({what}). {next_step}") from error


def digest_of_bytes(content: bytes) -> str:
    """BLAKE2b of `content`, 128 bits as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=_BITS // 8).hexdigest()


def digest_of_file(path: Path) -> str:
    """BLAKE2b of the whole file, 128 bits as 32 hexadecimal digits; the file is read in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.blake2b(digest_size=_BITS // 8)
    # `hashlib.file_digest` allocates a buffer, which takes longer than reading a small file.
    with path.open("rb", buffering=0) as handle:
        while piece := handle.read(_PIECE):
            state.update(piece)
    return state.hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest: `{"bytes": size, "digest": …}`.

    Raises:
        OSError: the file cannot be read.
    """
    return {"bytes": path.stat().st_size, "digest": digest_of_file(path)}


def damage(path: Path, record: Mapping[str, Any]) -> str | None:
    """A description of how the file differs from its record; None if it is the recorded file.

    Raises:
        OSError: the file exists, but the disk cannot read it.
    """
    try:
        size = path.stat().st_size
        if size != record.get("bytes"):
            return f"it has {size} bytes, and {record.get('bytes')} were written"
        # The size is compared first, so that a large truncated file is detected without reading it.
        return None if digest_of_file(path) == record.get("digest") else "its content has changed since it was written"
    except (FileNotFoundError, NotADirectoryError):
        return "it is missing"


def check_file(path: Path, record: Mapping[str, Any], *, next_step: str) -> None:
    """Refuse a file that is not the recorded one.

    Args:
        path: the file.
        record: the record that `record_of` returned.
        next_step: the last sentence of the error message, such as "Make the plan again with sparsort plan."

    Raises:
        SparsortError: the file is missing, has another size or other content, or cannot be read.
    """
    try:
        problem = damage(path, record)
    except OSError as error:
        raise SparsortError(f"cannot read {path}: {error.strerror or error}. {next_step}") from error
    if problem:
        raise SparsortError(f"{path} is damaged: {problem}. {next_step}")


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add a digest of the values under the key "digest".

    Args:
        values: JSON values; an earlier seal among them is replaced.
    """
    plain = {name: value for name, value in values.items() if name != SEAL}
    return {**plain, SEAL: digest_of_values(plain)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether the values contain the seal that matches them."""
    return values.get(SEAL) == digest_of_values({name: value for name, value in values.items() if name != SEAL})


def check_version(version: Any, readable: Sequence[int], name: Path | str, *, damaged: str, other: str) -> None:
    """Refuse a format version that this sparsort does not read.

    Args:
        version: the value that was read as the version; None if there is none.
        readable: the versions that this sparsort reads, ascending.
        name: the file or object that has the version, for the error message.
        damaged: the last sentence of the error message if no sparsort can have written this version.
        other: the last sentence of the error message for a version that another sparsort wrote.

    Raises:
        SparsortError: the version is not one of `readable`.
    """
    # `type` and not `isinstance`, because True is an instance of int.
    if type(version) is not int or version < 1:
        what = (
            "it has no format version"
            if version is None
            else f"its format version is {version!r}, not a whole number above 0"
        )
        raise SparsortError(f"{name} is damaged: {what}. {damaged}")
    if version not in readable:
        reads = " and ".join(map(str, readable))
        raise SparsortError(f"{name} has format version {version}; this sparsort reads {reads}. {other}")


def check_seal(values: Mapping[str, Any], path: Path, *, next_step: str) -> None:
    """Refuse values whose seal is missing or belongs to other values.

    Args:
        values: the object that was read from `path`.
        path: the file, for the error message.
        next_step: the last sentence of the error message.

    Raises:
        SparsortError: the seal does not match.
    """
    if not is_sealed(values):
        raise SparsortError(f"{path} is damaged: its content has changed since it was written. {next_step}")


def digest_of_values(values: Any) -> str:
    """A digest of JSON values that does not depend on the order of keys."""
    # ASCII escapes and sorted keys make the text, and so the digest, the same for equal values.
    return digest_of_bytes(json.dumps(values, sort_keys=True).encode())


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values with their seal, atomically.

    Raises:
        SparsortError: the disk cannot be written.
    """
    write_json(path, seal(values))


def read_sealed(path: Path, *, next_step: str) -> dict[str, Any]:
    """Read the values that `write_sealed` wrote.

    Args:
        path: the file.
        next_step: the last sentence of the error message.

    Raises:
        FileNotFoundError: the file does not exist.
        SparsortError: the file is damaged, has no seal, or cannot be read.
    """
    try:
        values = parse_own_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {next_step}") from error
    if not isinstance(values, dict):
        raise SparsortError(f"{path} is not what sparsort writes. {next_step}")
    check_seal(values, path, next_step=next_step)
    return {name: value for name, value in values.items() if name != SEAL}
