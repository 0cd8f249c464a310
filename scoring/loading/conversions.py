"""Converted models in the user's cache. The folder of a model is complete or absent, and is checked before it is used.

Contract: `install` fills a folder under a temporary name, lists every file with its digest, and renames the folder, so that a
folder under its final name is complete. A lock lets one process convert at a time; the others then use its folder. On a disk
without locks several processes may convert, and one of the folders is kept. Before the first use in a process, `is_intact`
compares every file with its digest (about 1 GB/s), so that a damaged folder is noticed and converted again. The size of the cache
is bounded (`sparsort.storage.cache`).
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
# The folders that this process has checked, with the sizes and times of their files.
_CHECKED: dict[Path, dict[str, tuple[int, int]]] = {}


def models_folder() -> Path:
    """The folder of the converted models."""
    return cache_folder() / "models"


def is_intact(folder: Path) -> bool:
    """Whether the folder is complete, and every file is unchanged since it was written."""
    try:
        stamps = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
        if stamps == _CHECKED.get(folder):
            return True
        records = read_sealed(folder / DIGESTS, next_step="")["files"]
        if any(damage(folder / name, records[name]) for name in records):
            return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SparsortError):
        return False
    _CHECKED[folder] = stamps
    return True


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process converts to this folder, or raise a `SparsortError` if the cache cannot be written."""
    locks = cache_folder() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(locks, error) from error
    with locked(locks / f"{folder.name}.lock", wait=True):
        yield


def install(folder: Path, fill: Callable[[Path], None], *, is_whole: Callable[[Path], bool] = is_intact) -> None:
    """Create a folder of converted files, and remove older folders if the cache is then too large.

    Args:
        folder: a path in `models_folder()`; a damaged folder of this name is replaced.
        fill: writes the files to the folder that it is called with.
        is_whole: distinguishes a complete folder, which another process has just installed, from a damaged one.

    Raises:
        SparsortError: the disk cannot be written.
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
    """List every file of a folder with its size and digest."""
    # The files must be on the disk before the list that declares them complete.
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != DIGESTS)
    for path in (*files, folder):
        sync(path)
    write_sealed(folder / DIGESTS, {"files": {path.name: record_of(path) for path in files}})


def no_room_for(size: int) -> str | None:
    """The reason why a converted model of `size` bytes cannot be cached, as a clause; None if it can."""
    limit = limit_of("models")
    needed = f"the converted model takes {size / 1e9:.1f} GB"
    if size > limit:
        return f"{needed}, and the cache is limited to {limit / 1e9:g} GB of models (SPARSORT_CACHE_MODELS_GB)"
    folder = models_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return None if size < free else f"{needed}, and {existing} has {free / 1e9:.1f} GB free"


def _put_in_place(temporary: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename `temporary` to `folder`. If another process was faster, its folder is kept."""
    for _attempt in range(2):
        try:
            temporary.rename(folder)
        except OSError:
            if is_whole(folder):
                return
            if not folder.exists():
                raise
            # The existing folder is damaged.
            remove(folder)
        else:
            sync(folder.parent)
            return
    raise SparsortError(
        f"cannot move the converted model to {folder}: another program keeps writing there. Remove it and try again."
    )
