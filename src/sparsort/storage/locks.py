"""A lock file between processes on one machine. It is advisory, and the kernel releases it when its process ends.

Contract: `locked` yields whether the lock is held. On a file system without locks it yields True and warns, because doing work
twice is better than not doing it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sparsort.storage.files import disk_error

_LOG = logging.getLogger("sparsort")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file while the block runs.

    Args:
        path: the lock file, which is created if it does not exist.
        wait: wait until the lock is free; otherwise return immediately.

    Yields:
        Whether the lock is held; always True with `wait`.

    Raises:
        SparsortError: the lock file cannot be written.
    """
    try:
        # The file is not removed afterwards: a waiting process would then hold the lock of a file that no other can open.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield _take(path, descriptor, wait)
    finally:
        # Unlock before closing: a forked child may share the descriptor, and closing alone would leave the lock with it.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _take(path: Path, descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise disk_error(path, error) from error
        _LOG.warning("%s: this file system does not support locks; two processes may do the same work.", path)
    return True
