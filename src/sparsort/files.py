"""Files that are either whole or absent.

Contract: `write_atomically` yields a temporary path in the target's folder; on success the file is fsynced and renamed
over the target and the folder is fsynced, so that a kill or a power cut leaves the old file or the new one, never a
part. On failure the temporary file is removed. Errors of the disk become a `SparsortError` that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some room and run the same command again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some room and run the same command again, finished work is kept",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you can write to",
    errno.EPERM: "permission denied; choose a folder that you can write to",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder",
    errno.EEXIST: "a file of that name is in the way; choose another folder",
}


def disk_error(path: Path, error: OSError) -> SparsortError:
    """The user-facing form of an error met while writing `path`."""
    return SparsortError(f"cannot write {path}: {_ADVICE.get(error.errno or 0, error.strerror or str(error))}.")


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error it becomes `path`, durably.

    Raises:
        SparsortError: the disk is full, read-only or not ours.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically and durably."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def cache_folder() -> Path:
    """Where sparsort keeps what it can make again: `$SPARSORT_CACHE`, else `sparsort` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if given := os.environ.get("SPARSORT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsort"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
