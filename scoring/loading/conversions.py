"""Converted models in the user's cache: each in a folder of its own that is whole or absent, and checked before it is used.

Contract: `install` fills a folder under another name, lists every file with its digest, and renames it, so that a folder under
its own name is complete. One process converts at a time (a lock), and the others then find the folder done; where there are no
locks several may convert, and one folder stays. `is_intact` compares every file with its digest before the first use in a
process (about 1 GB/s), so a damaged folder is found and converted again. The cache is bounded (`sparsort.storage.cache`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsort.errors import SparsortError
from sparsort.storage.cache import limit_of, make_room, remove, unused_name
from sparsort.storage.files import cache_folder, disk_error, sync
from sparsort.storage.integrity import damage, read_sealed, record_of, write_sealed
from sparsort.storage.locks import locked

DIGESTS = "sparsort-digests.json"
# Folders that this process has checked, with the sizes and times that their files had.
_CHECKED: dict[Path, dict[str, tuple[int, int]]] = {}


def models_folder() -> Path:
    """Where converted models are."""
    return cache_folder() / "models"


def is_intact(folder: Path) -> bool:
    """Whether the folder is complete, and every file in it is the one that was written."""
    try:
        stamps = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
        if stamps == _CHECKED.get(folder):
            return True
        listed = read_sealed(folder / DIGESTS, next_step="")["files"]
        if any(damage(folder / name, listed[name]) for name in listed):
            return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SparsortError):
        return False
    _CHECKED[folder] = stamps
    return True


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process converts into this folder.

    Raises:
        SparsortError: the cache cannot be written.
    """
    locks = cache_folder() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(locks, error) from error
    with locked(locks / f"{folder.name}.lock", wait=True):
        yield


def install(folder: Path, fill: Callable[[Path], None], *, is_whole: Callable[[Path], bool] = is_intact) -> None:
    """Make the folder, and remove others where the cache is too large then.

    Args:
        folder: in `models_folder()`; a damaged one of this name is replaced.
        fill: writes the files into a folder that it is given.
        is_whole: tells a folder that another process made from a damaged one.

    Raises:
        SparsortError: the disk refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = unused_name(folder)
        temporary.mkdir()
        try:
            fill(temporary)
            write_digests(temporary)
            _put_in_place(temporary, folder, is_whole)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    make_room("models", keep={folder})


def write_digests(folder: Path) -> None:
    """List every file of a folder with size and digest; the files are on the disk (fsync) before the list is.

    Raises:
        OSError, SparsortError: the disk refuses.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != DIGESTS)
    for path in (*files, folder):
        sync(path)
    write_sealed(folder / DIGESTS, {"files": {path.name: record_of(path) for path in files}})


def no_room_for(size: int) -> str | None:
    """Why a converted model of `size` bytes cannot be kept, in words; None if it can."""
    limit = limit_of("models")
    if size > limit:
        return (
            f"converted it takes {size / 1e9:.1f} GB, and the cache holds at most {limit / 1e9:g} GB of models "
            "(SPARSORT_CACHE_MODELS_GB)"
        )
    folder = models_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return (
        None if size < free else f"converted it takes {size / 1e9:.1f} GB, and {existing} has {free / 1e9:.1f} GB free"
    )


def _put_in_place(temporary: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename `temporary` to `folder`; when another process was first, its folder stays."""
    for _attempt in range(2):
        try:
            temporary.rename(folder)
        except OSError:
            if is_whole(folder):
                return
            if not folder.exists():
                raise
            # What is there is damaged.
            remove(folder)
        else:
            sync(folder.parent)
            return
    raise SparsortError(
        f"cannot put the converted model at {folder}: something keeps writing there. Remove it and try again."
    )
