"""Files that are either whole or absent.

Contract: `write_atomically` yields a temporary path in the target's folder. On success the file is fsynced and renamed over
the target, and the folder is fsynced. A kill or a power cut therefore leaves the old file or the new one, never a part. On
failure the temporary file is removed. Disk errors become a `SparsortError` that names the path. A symlink is kept, and the
file that it points to is replaced. A target that is not a regular file (a device, a pipe, /dev/stdout) is never replaced: the
finished bytes are written to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.terminal.interrupts import held

_STREAMS = (Path("/dev"), Path("/dev/fd"))
# Errors of file systems that cannot sync a folder, or a file that is open for reading only.
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP}
_ADVICE = {
    errno.ENOSPC: "the disk is full; free some room and run the same command again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some room and run the same command again, finished work is kept",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f); raise the limit and run the same command again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you can write to",
    errno.EPERM: "permission denied; choose a folder that you can write to",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder",
    errno.EEXIST: "a file of that name is in the way; choose another folder",
}


def write_failure(error: Exception, path: Path) -> OSError | None:
    """The disk error that made a library fail to write below `path`; None if it is an error of another kind.

    safetensors puts the error number of the system into its text. PyTorch reports that a file is shorter than it should be.
    """
    if isinstance(error, OSError):
        return error
    if number := _RUST.search(str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if not any(mark in str(error) for mark in _TORCH):
        return None
    with contextlib.suppress(OSError):
        # PyTorch does not report the reason, so look whether the disk is almost full.
        disk = os.statvfs(path if path.exists() else path.parent)
        if disk.f_bavail * disk.f_frsize < _ALMOST_FULL:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(errno.EIO, "PyTorch could not write the whole of a file; the disk or its quota may be full")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn disk errors inside the block, including those of safetensors and PyTorch, into an error that names `path`.

    Raises:
        SparsortError: see `disk_error`.
    """
    try:
        yield
    except SparsortError:
        raise
    except Exception as error:
        if (failure := write_failure(error, path)) is None:
            raise
        raise disk_error(path, failure) from error


# Marks in the text of a library's error, which is not an OSError, that show that a file could not be written.
_RUST = re.compile(r"\(os error (\d+)\)")
_TORCH = ("inline_container.cc", "PytorchStreamWriter")
_ALMOST_FULL = 1 << 20
_LONG = 100  # items from which on a list is written one item per line


def is_full(error: OSError) -> bool:
    """Whether the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(path: Path, error: OSError) -> SparsortError:
    """The user-facing form of an error that occurred while writing `path`."""
    return SparsortError(f"cannot write {path}: {_ADVICE.get(error.errno or 0, error.strerror or str(error))}.")


@contextlib.contextmanager
def write_atomically(path: Path, *, hold: bool = True) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, its file durably becomes `path`.

    Args:
        path: the file to write.
        hold: whether a signal that asks the process to stop waits until the file is written. Pass False for a block that
            takes long: there the signal discards the temporary file.

    Raises:
        SparsortError: the disk is full or read-only, or permission is denied.
    """
    if not path.name or path.is_dir():
        raise SparsortError(f"cannot write {path}: it is a folder. Give the name of a file.")
    is_stream = _is_stream(path)
    target = Path(tempfile.gettempdir(), path.name) if is_stream else Path(os.path.realpath(path))
    # The temporary file is in the folder of the target, because a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    with held() if hold else contextlib.nullcontext():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if is_stream:
                _send(temporary, path)
                return
            # The content must be on the disk before the rename, otherwise a power cut could leave an empty target.
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(target)
            sync(target.parent)
        except OSError as error:
            raise disk_error(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether a path names a device, a pipe, or a file that some process has open, such as /dev/stdout."""
    # Not everything below /dev is a stream: /dev/shm contains regular files.
    folder = path.absolute().parent
    return folder in _STREAMS or folder.is_relative_to("/proc") or (path.exists() and not path.is_file())


def _send(source: Path, target: Path) -> None:
    # The target is opened for appending, so a file that stdout was redirected to keeps its content.
    with source.open("rb") as reader, target.open("ab", buffering=0) as writer:
        shutil.copyfileobj(reader, writer)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically and durably; a long list at the top level has one item per line."""
    with write_atomically(path) as temporary:
        # UTF-8 cannot encode half of a surrogate pair; it is written as its JSON escape.
        temporary.write_text(_indented(value) + "\n", encoding="utf-8", errors="backslashreplace")


def _indented(value: Any) -> str:
    options: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value) or not value:
        return json.dumps(value, indent=2, **options)
    parts = []
    for name, part in value.items():
        if isinstance(part, list) and len(part) >= _LONG:
            # `indent` makes Python use its JSON encoder that is not written in C and takes ten times as long.
            items = ",\n    ".join(json.dumps(item, **options) for item in part)
            text = f"[\n    {items}\n  ]"
        else:
            # Line breaks inside strings are escaped, so every newline here belongs to the layout.
            text = json.dumps(part, indent=2, **options).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(name, **options)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def cache_folder() -> Path:
    """The folder for data that can be recomputed: `$SPARSORT_CACHE`, else `sparsort` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if given := os.environ.get("SPARSORT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsort"


def sync(path: Path) -> None:
    """Force a file or a folder onto the disk (fsync), if its file system supports that.

    Raises:
        OSError: the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
