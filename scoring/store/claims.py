"""Claims on names in a score folder, such as those of its shards: of several processes, one works on each.

Contract: `Claims.claimed(name)` yields True in one process at a time. A claim is a file that is created exclusively. It names
its process (`Owner`), and a thread raises the counter in it every few seconds, so that a dead process can be noticed:

- A process of this machine is dead if no process has its id and its start time.
- A process of another machine is dead if this one has seen the same bytes in its claim for `SILENT` seconds of its own
  monotonic clock. Clocks are never compared with each other, so they may differ, and jump.

The successor of a dead process creates the file of the next generation exclusively and leaves the old one in place, so of
several processes that notice the death, one takes over. Claims save work and do not protect the data: where they fail, for
example because a machine was suspended, two processes do the same work, and whoever uses claims must tolerate that.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparsort.storage.files import disk_error

# Seconds between two changes of a claim, and the seconds without a change after which a process of another machine is dead.
HEARTBEAT = 5.0
SILENT = 60.0
# Seconds between two looks at what another process has claimed.
POLL = 0.25
_PREFIX = "claim-"
# The claims that this process holds, in all folders.
_held_here: set[Path] = set()

State = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process, as others can recognise it.

    Attributes:
        host: the name of its machine.
        machine: the boot and the process namespace in which its id is valid; empty if the system does not report them.
        pid: its process id.
        start: its start, in clock ticks since the boot; empty if the system does not report it.
        since: the wall time at which it was first asked for, in seconds since 1970; for display only.
    """

    host: str
    machine: str
    pid: int
    start: str
    since: float

    @classmethod
    def read(cls, values: Any) -> Owner | None:
        """The owner in JSON values; None if they are not one, for example because the file was being written."""
        try:
            texts = {name: str(values[name]) for name in ("host", "machine", "start")}
            return cls(**texts, pid=int(values["pid"]), since=float(values["since"]))
        except (KeyError, TypeError, ValueError):
            return None

    def state(self) -> State:
        """Whether the process runs; "unknown" if it is on another machine, or if this system cannot tell."""
        this = this_process()
        if (self.host, self.machine) != (this.host, this.machine):
            return "unknown"
        started = _start_of(self.pid)
        if started:
            return "alive" if started == self.start else "dead"
        try:
            # On Windows, `os.kill` with 0 would interrupt the process.
            if os.name == "posix":
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except PermissionError:
            pass
        # The process exists, but it may be a later one with the same id. Under /proc it would have a start; a process that
        # has ended, and that its parent has not waited for yet, has none.
        return "dead" if this.start else "unknown"


def this_process() -> Owner:
    """This process."""
    # A fork inherits the cache, so the process id is part of its key.
    return _owner(os.getpid())


@functools.lru_cache(maxsize=1)
def _as_text(owner: Owner) -> str:
    # A claim is made for each shard, and may not take longer than the shard.
    return json.dumps(asdict(owner))


@functools.lru_cache(maxsize=1)
def _owner(pid: int) -> Owner:
    machine = ""
    with contextlib.suppress(OSError):
        # Containers on one machine may share a host name, but not the process ids.
        machine = (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
        )
    return Owner(host=socket.gethostname(), machine=machine, pid=pid, start=_start_of(pid), since=time.time())


def _start_of(pid: int) -> str:
    """The start of a process in clock ticks since the boot; empty if it has ended, or on a system without /proc."""
    try:
        # The second field is the name of the program in parentheses, which may itself contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim that a process has made and not released.

    Attributes:
        name: what it has claimed.
        owner: the process; None if the file is not complete.
        state: whether the process runs.
        changed: the time of the file system at which the claim last changed, in seconds since 1970; for display only.
    """

    name: str
    owner: Owner | None
    state: State
    changed: float


class Claims:
    """The claims in one folder, as one process sees them.

    Args:
        folder: the folder of the claims. It is made for the first claim.
        owner: the process that claims.
        clock: a monotonic clock, in seconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        owner: Owner | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = folder
        self._owner = owner
        self._clock, self._sleep = clock, sleep
        self._held: set[Path] = set()
        self._beats = 0
        # The content of other claims, and when it was first seen.
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Claim a name while the block runs. Yields False, immediately, if another process that is not dead has claimed it.

        Raises:
            SparsortError: the folder cannot be written.
        """
        try:
            generation = self._take(name)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        if generation is None:
            yield False
            return
        try:
            yield True
        finally:
            self._release(name, generation)

    @contextlib.contextmanager
    def first(self, name: str, is_done: Callable[[], bool]) -> Iterator[bool]:
        """Yield True in the one process that has to do something, and False in the others, once it is done.

        Args:
            name: the name to claim; if its process dies before it is done, another one takes over.
            is_done: whether it is done.
        """
        while not is_done():
            with self.claimed(name) as is_ours:
                # It may have been done between the first look and the claim.
                if is_ours and not is_done():
                    yield True
                    return
            self.pause()
        yield False

    def pause(self) -> None:
        """Wait before another look at the claims of other processes."""
        self._sleep(POLL)

    def beat(self) -> None:
        """Change the claims of this process, which shows the others that it runs; a thread calls this."""
        with self._lock:
            self._beats += 1
            for path in self._held:
                # A claim that cannot be written looks dead at the worst, and then the work is done twice.
                with contextlib.suppress(OSError), path.open("r+b") as handle:
                    handle.write(self._content())

    def close(self) -> None:
        """End the thread, and remove the folder if nothing is left in it."""
        self._closed.set()
        if (thread := self._thread) is not None:
            thread.join()
            self._thread = None
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _take(self, name: str) -> int | None:
        """Create the claim, and return its generation; None if another process has claimed the name."""
        generation = 0
        while not self._create(path := self._path(name, generation)):
            if not self._is_dead(path):
                return None
            generation += 1
        self._start_thread()
        return generation

    def _create(self, path: Path) -> bool:
        with self._lock:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:
                # Another process that has found everything done may remove the folder between the two calls.
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.write(descriptor, self._content())
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
            self._held.add(path)
            _held_here.add(path)
        return True

    def _release(self, name: str, generation: int) -> None:
        with self._lock:
            self._held.discard(self._path(name, generation))
            _held_here.discard(self._path(name, generation))
        for earlier in range(generation + 1):
            # If the file cannot be removed, its process will have ended by the time that somebody looks at it.
            with contextlib.suppress(OSError):
                self._path(name, earlier).unlink()

    def _is_dead(self, path: Path) -> bool:
        """Whether the process that made a claim of another one is dead, by the rule of the module."""
        try:
            content = path.read_bytes()
        except OSError:
            # It was released just now, which the caller notices when it looks again.
            return False
        owner = _owner_in(content)
        if owner is not None and (state := owner.state()) != "unknown":
            # An interrupt between the creation of a claim and its block leaves a claim of this process that nobody releases.
            is_forgotten = owner == this_process() and path not in _held_here
            return state == "dead" or is_forgotten
        seen = self._seen.get(path)
        if seen is None or seen[0] != content:
            self._seen[path] = (content, self._clock())
            return False
        return self._clock() - seen[1] >= SILENT

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{_PREFIX}{name}.{generation}"

    def _content(self) -> bytes:
        # The counter has a fixed width, so that each content replaces the one before it completely.
        return f'{_as_text(self._owner or this_process())[:-1]}, "beats": "{self._beats:012d}"}}'.encode()

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._closed.clear()
                self._thread = threading.Thread(target=self._run, name="sparsort claims", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            with self._lock:
                # The thread of an object that nobody has closed ends by itself.
                if not self._held:
                    self._thread = None
                    return
            self.beat()


def read_claims(folder: Path) -> list[Claim]:
    """The claims in a folder, sorted by name, of each name the one of the latest generation."""
    latest: dict[str, tuple[int, Path]] = {}
    for path in folder.glob(f"{_PREFIX}*.*"):
        name, _, generation = path.name.removeprefix(_PREFIX).rpartition(".")
        if generation.isdecimal() and int(generation) >= latest.get(name, (0, path))[0]:
            latest[name] = (int(generation), path)
    claims = []
    for name, (_, path) in sorted(latest.items()):
        # A claim that is gone was released in the meantime.
        with contextlib.suppress(OSError):
            owner, changed = _owner_in(path.read_bytes()), path.stat().st_mtime
            claims.append(Claim(name=name, owner=owner, state=owner.state() if owner else "unknown", changed=changed))
    return claims


def _owner_in(content: bytes) -> Owner | None:
    try:
        return Owner.read(json.loads(content))
    except ValueError:
        return None
