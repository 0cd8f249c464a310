"""The user's cache folder: what is in it, how large it may grow, and how it is emptied.

    models/NAME/                   a converted model or tokenizer (`scoring.loading.conversions`)
    rows/CONTEXT/DIGEST.rows       what a model computed for rows (`scoring.store.row_cache`)

Contract: everything in the cache can be recomputed, so any entry may be removed at any time, even while other processes
use it. Each kind has a limit in bytes. `make_room` removes the entries of a kind that were used least recently until the rest
is within the limit; the time of last use is an entry's modification time. Entries are recognised by their names and
marker files, and nothing else is ever removed: SPARSORT_CACHE may name a folder that contains other files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sparsort.errors import SparsortError
from sparsort.storage.files import cache_folder

Kind = Literal["models", "rows"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Every converted model contains a file with one of these names.
MODEL_MARKS = ("sparsort-digests.json", "sparsort.json")
ROWS_SUFFIX = ".rows"

_DEFAULT_GB = {"models": 20.0, "rows": 1.0}
_DIGEST = re.compile(r"[0-9a-f]{32}")
# Names of entries that are being written or removed. One that has not changed for an hour belongs to a process that was killed.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}(\.tmp)?")
_LEFTOVER_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """An entry that can be removed: a folder in `models`, or a file in `rows`.

    Attributes:
        kind: the part of the cache that contains it.
        path: its file or folder.
        bytes: its size.
        used: the time of its last use, in seconds since the Unix epoch.
    """

    kind: Kind
    path: Path
    bytes: int
    used: float


def limit_of(kind: Kind) -> int:
    """The size limit for one kind of entry, in bytes: `$SPARSORT_CACHE_MODELS_GB` or `$SPARSORT_CACHE_ROWS_GB`.

    Raises:
        SparsortError: the variable does not hold a number of gigabytes.
    """
    variable = f"SPARSORT_CACHE_{kind.upper()}_GB"
    given = os.environ.get(variable) or str(_DEFAULT_GB[kind])
    try:
        # Without the upper bound, the conversion to bytes could overflow to infinity.
        limit = float(given)
        if 0 <= limit < 1e9:
            return int(limit * 10**9)
    except ValueError:
        pass
    raise SparsortError(f"{variable} is {given!r}; expected a number of gigabytes, such as {_DEFAULT_GB[kind]:g}.")


def entries(kind: Kind) -> list[CacheEntry]:
    """The entries of a kind, in no particular order; an entry that another process removes meanwhile is skipped."""
    present = []
    for path in _paths(kind):
        with contextlib.suppress(OSError):
            files = path.iterdir() if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files)
            present.append(CacheEntry(kind=kind, path=path, bytes=size, used=path.stat().st_mtime))
    return present


def mark_used(path: Path) -> None:
    """Record that an entry is used now; in a read-only cache this does nothing."""
    with contextlib.suppress(OSError):
        os.utime(path)


def make_room(kind: Kind, *, keep: Collection[Path] = ()) -> None:
    """Remove leftovers of killed processes, then the least recently used entries of a kind until the rest is within its limit.

    Args:
        kind: the part of the cache.
        keep: entries that are not removed, such as the one that was just written.
    """
    _remove_leftovers(kind)
    by_last_use = sorted(entries(kind), key=lambda entry: entry.used)
    total, limit = sum(entry.bytes for entry in by_last_use), limit_of(kind)
    for entry in by_last_use:
        if total <= limit:
            return
        # An entry in `keep` stays, but its size still counts.
        if entry.path not in keep:
            remove(entry.path)
            total -= entry.bytes


def clear() -> list[CacheEntry]:
    """Remove every entry, and return the removed entries.

    Raises:
        SparsortError: an entry cannot be removed.
    """
    removed = []
    for kind in KINDS:
        for entry in entries(kind):
            remove(entry.path)
            if entry.path.exists():
                raise SparsortError(f"cannot remove {entry.path}. Is the cache yours? Remove the rest by hand.")
            removed.append(entry)
        _remove_leftovers(kind)
    for folder in _contexts():
        with contextlib.suppress(OSError):
            folder.rmdir()
    return removed


def remove(path: Path) -> None:
    """Remove an entry; a folder is renamed first, so no other process sees it half removed."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            path.unlink()
            return
        aside = unused_name(path)
        # The rename is atomic, while deleting a folder is not.
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """A hidden name in the same folder that no other process chooses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def describe() -> dict[str, Any]:
    """The cache folder, and the number of entries, their total size and the limit for each kind, as JSON values."""
    by_kind = {kind: entries(kind) for kind in KINDS}
    return {
        "folder": str(cache_folder()),
        **{
            kind: {"entries": len(present), "bytes": sum(entry.bytes for entry in present), "limit": limit_of(kind)}
            for kind, present in by_kind.items()
        },
    }


def _paths(kind: Kind) -> Iterator[Path]:
    if kind == "models":
        for path in _inside(cache_folder() / "models"):
            if not path.name.startswith(".") and any((path / mark).is_file() for mark in MODEL_MARKS):
                yield path
        return
    for folder in _contexts():
        for path in _inside(folder):
            if path.suffix == ROWS_SUFFIX and _DIGEST.fullmatch(path.stem):
                yield path


def _contexts() -> list[Path]:
    return [path for path in _inside(cache_folder() / "rows") if _DIGEST.fullmatch(path.name)]


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _remove_leftovers(kind: Kind) -> None:
    folders = [cache_folder() / "models"] if kind == "models" else _contexts()
    for path in (path for folder in folders for path in _inside(folder) if _TEMPORARY.fullmatch(path.name)):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
