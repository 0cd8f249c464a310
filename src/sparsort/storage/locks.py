"""A lock file between processes on one machine: advisory, and dropped by the kernel with the process that holds it.

Contract: `locked` tells whether the lock is held. Where the file system knows no locks it says yes and warns, since work done
twice is better than work not done.
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
    """Hold the lock file while the block runs, and say whether it is held: with `wait` always."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield _take(path, descriptor, wait)
    finally:
        # Before the close: a forked child may share the lock, and would keep it.
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
        _LOG.warning("%s: this file system knows no locks; two processes may do the same work.", path)
    return True
