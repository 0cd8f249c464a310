"""Which process finished which shard: one append-only file for each process that works on a score folder.

Contract: the first line of a log names the process (`Owner`), and each further line describes a shard that it finished (`Done`).
Every line begins with a checksum, and a line without the right one, such as the last line of a killed process, is skipped. A log
spares opening each of 100,000 shards, and it may lack any of them: the shards themselves show what is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sparsort.scoring.store.claims import Owner, this_process
from sparsort.storage.files import disk_error

_PREFIX = "log-"


class Done(NamedTuple):
    """A finished shard. A line of a log is a list of these values, with no other list in it, because 100,000 are read at once.

    Attributes:
        shard: its number.
        rows: its number of rows.
        digest: the `rows_digest` of its rows.
        settings: the digest of the settings of the run.
        n_bytes: the size of its file.
        file_digest: the digest of its file.
        modified: the modification time of its file, in nanoseconds.
        unscored: the number of rows with each status other than "ok"; None if there are none.
        at: the wall time at which it was finished, in seconds since 1970; for display only.
    """

    shard: int
    rows: int
    digest: str
    settings: str
    n_bytes: int
    file_digest: str
    modified: int
    unscored: Mapping[str, int] | None
    at: float

    @property
    def record(self) -> dict[str, Any]:
        """Size and digest of its file, as in a manifest."""
        return {"bytes": self.n_bytes, "digest": self.file_digest}


class WorkLog:
    """The log of this process. Its file is created by the first shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        self._pid = os.getpid()

    def append(self, **values: Any) -> None:
        """Add a shard, by the attributes of `Done` except `at`.

        Raises:
            SparsortError: the disk cannot be written.
        """
        try:
            # A forked process writes a log of its own.
            if self._descriptor < 0 or self._pid != os.getpid():
                self._open()
            self._write(Done(**values, at=round(time.time(), 3)))
        except OSError as error:
            raise disk_error(self._folder, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        owner = this_process()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{_PREFIX}{owner.host}-{owner.pid}-{uuid.uuid4().hex[:8]}.jsonl"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._pid = owner.pid
        self._write(asdict(owner))

    def _write(self, values: Any) -> None:
        text = json.dumps(values).encode()
        os.write(self._descriptor, b"%08x %b\n" % (zlib.crc32(text), text))


def read_logs(folder: Path) -> Iterator[tuple[Owner, list[Done]]]:
    """Yield the processes that have logs in a folder, each with the shards that it finished, in that order."""
    for path in sorted(folder.glob(f"{_PREFIX}*.jsonl")):
        content = b""
        # Another process may have finished the run and removed the logs.
        with contextlib.suppress(OSError):
            content = path.read_bytes()
        whole = [line[9:] for line in content.splitlines() if line[:8] == b"%08x" % zlib.crc32(line[9:])]
        # Parsing all lines as one list takes half of the time of parsing each.
        first, *lines = json.loads(b"[%b]" % b",".join(whole)) or [None]
        owner = Owner.read(first)
        # A log of another version may have other values.
        if owner is not None and all(len(line) == len(Done._fields) for line in lines):
            yield owner, [Done._make(line) for line in lines]
