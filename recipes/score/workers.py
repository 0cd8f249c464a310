"""Local processes that score the shards of a job together.

Contract: each process loads the model once, and its weights are mapped from their files, so the machine holds them once. The
parent gives out one shard at a time, so slower workers get fewer. A worker that is killed is replaced, and its shard is scored
again; a shard that ends `_MOST_DEATHS` workers ends the run. When the parent ends, for whatever reason, its workers end too: at
once if the parent can still stop them, otherwise after their current shard. Finished shards are kept.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from sparsort.errors import SparsortError
from sparsort.recipes.score.job import ScoreJob

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

# The workers that one shard may end, and those that may end one after the other without finishing a shard.
_MOST_DEATHS = 3
# Seconds that a worker has to end after SIGTERM before it is killed, and between two looks at shards that others have claimed.
_GRACE = 10.0
_POLL = 0.25
# Seconds between two reports of a worker's progress.
_REPORT = 0.1


class Workers:
    """Processes that score shards of a job, as a context manager that ends them.

    Args:
        job: a job with a folder, whose rows have been checked.
        count: number of processes.
        devices: the devices of the processes, in turn; empty for the device of the job.
        note: called with a sentence that the user should know of.
    """

    def __init__(
        self,
        job: ScoreJob,
        count: int,
        *,
        devices: Sequence[str] = (),
        note: Callable[[str], None] = lambda _sentence: None,
    ) -> None:
        self._job, self._note = job, note
        self._devices = devices
        self._count = count
        self._threads = max(1, usable_cores() // count)
        self._workers: list[_Worker] = []
        self._deaths: Counter[int | None] = Counter()
        self._can_begin = False

    def __enter__(self) -> Workers:
        try:
            for place in range(self._count):
                self._start(place)
        except BaseException:
            self._end(self._workers)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(self._workers, at_once=kind is not None)

    def begin(self, most: int) -> None:
        """Let the workers open the folder, and return when the first one has done so.

        Args:
            most: the number of workers that there is work for, which is known only now; the others are ended.

        Raises:
            SparsortError: a worker failed, or was killed too often.
        """
        self._can_begin = True
        self._end(self._workers[max(most, 1) :])
        for worker in self._workers:
            worker.send(_BEGIN)
        while not any(worker.is_ready for worker in self._workers):
            self._receive(None)

    def run(self, numbers: Iterable[int], advance: Callable[[int], None] = lambda _count: None) -> Counter[str]:
        """Return when these shards are done.

        Args:
            numbers: the numbers of the shards.
            advance: called with a number of rows whenever they are done; with a negative one if a killed worker had counted them.

        Returns:
            The number of shards that were scored, and that were kept.

        Raises:
            SparsortError: a worker failed, or one shard was lost too often.
        """
        waiting, claimed = deque(numbers), deque[int]()
        outcomes: Counter[str] = Counter()
        while waiting or claimed or any(worker.index is not None for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.is_ready and worker.index is None:
                    worker.give(waiting.popleft())
            is_idle = not waiting and claimed and all(worker.index is None for worker in self._workers)
            for kind, value in self._receive(_POLL if is_idle else None, advance):
                if kind == "claimed":
                    claimed.append(value)
                elif kind == "lost":
                    waiting.appendleft(value)
                else:
                    outcomes[kind] += 1
            # Shards that another process has claimed are looked at again when there is nothing else to do.
            if is_idle:
                waiting, claimed = claimed, deque()
        return outcomes

    def _receive(
        self, timeout: float | None, advance: Callable[[int], None] = lambda _count: None
    ) -> list[tuple[str, int]]:
        """Wait for messages; returns the shards that ended, each with what became of it."""
        ended = []
        for pipe in wait([worker.pipe for worker in self._workers], timeout):
            worker = next(one for one in self._workers if one.pipe is pipe)
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, OSError):
                advance(-worker.rows)
                if (index := self._replace(worker)) is not None:
                    ended.append(("lost", index))
                continue
            if kind == "rows":
                worker.rows += value
                advance(value)
            elif kind == "ready":
                worker.is_ready = True
            elif kind == "note":
                self._note(value)
            elif kind == "error":
                raise SparsortError(value)
            elif kind == "fault":
                raise RuntimeError(f"a worker process failed:\n{value}")
            else:
                worker.index, worker.rows = None, 0
                # Only starts that fail in a row show that no worker can start.
                del self._deaths[None]
                ended.append((kind, value))
        # An interrupt may have been lost in a callback.
        advance(0)
        return ended

    def _start(self, place: int) -> None:
        device = self._devices[place % len(self._devices)] if self._devices else None
        worker = _Worker(place, self._job.on(device), self._threads)
        if self._can_begin:
            worker.send(_BEGIN)
        self._workers.append(worker)

    def _replace(self, worker: _Worker) -> int | None:
        """Start another process in place of one that has ended; returns the shard that it was scoring."""
        worker.process.join()
        self._workers.remove(worker)
        worker.pipe.close()
        self._deaths[worker.index] += 1
        code = worker.process.exitcode or 0
        cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        if worker.index is None:
            event = f"{_MOST_DEATHS} worker processes in a row ended while they had no shard"
            successor = "another one is started in its place"
        else:
            begin = worker.index * self._job.shard_rows
            event = f"shard {worker.index} (from row {begin} on) ended {_MOST_DEATHS} worker processes"
            successor = f"another one scores shard {worker.index}"
        if self._deaths[worker.index] >= _MOST_DEATHS:
            advice = "If the memory was full, use fewer workers (--workers) or a smaller token_budget (--token-budget)."
            if worker.index is None and code > 0:
                advice = "The reason is on stderr. In a script, make the call under if __name__ == '__main__'."
            raise SparsortError(
                f"{event}, the last one by {cause}. {advice} Finished shards are kept in {self._job.out}; run the same command "
                "again."
            )
        self._note(f"a worker process was ended by {cause}; {successor}.")
        self._start(worker.place)
        return worker.index

    def _end(self, workers: Sequence[_Worker], *, at_once: bool = True) -> None:
        """End some processes: at once by SIGTERM, otherwise by letting them return."""
        for worker in workers:
            if at_once:
                worker.process.terminate()
            worker.pipe.close()
        deadline = time.monotonic() + _GRACE
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
        self._workers = [worker for worker in self._workers if worker not in workers]


class _Worker:
    """One process, with what the parent knows of it."""

    def __init__(self, place: int, job: ScoreJob, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.place = place
        self.pipe, other_end = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_work, args=(job, threads, other_end), name=f"sparsort worker {place}", daemon=True
        )
        self.process.start()
        # The process holds the only other end now, so the pipe ends with it.
        other_end.close()
        self.is_ready = False
        self.index: int | None = None
        self.rows = 0

    def give(self, index: int) -> None:
        """Let it score a shard."""
        self.index, self.rows = index, 0
        self.send(index)

    def send(self, message: Any) -> None:
        # The end of the process is noticed where messages are received.
        with contextlib.suppress(OSError):
            self.pipe.send(message)


_BEGIN = "begin"


def usable_cores() -> int:
    """The number of cores that this process may use."""
    # macOS does not report an affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(job: ScoreJob, threads: int, pipe: Connection) -> None:
    """Score the shards whose numbers arrive, until the pipe ends. This runs in a process of its own."""
    from sparsort.terminal.interrupts import SIGNALS, handle_signals

    # Ctrl-C reaches all processes of a terminal. The parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # This is read when the tokenizers are imported.
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    # The parent has asked for the end by a signal, or has ended itself.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, ConnectionResetError, EOFError):
        try:
            # SIGTERM unwinds the stack, which releases the claim.
            handle_signals()
            _score_numbers(job, threads, pipe)
        except SparsortError as error:
            _tell(pipe, "error", str(error))
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise
        except Exception:  # noqa: BLE001 (the parent raises it)
            _tell(pipe, "fault", traceback.format_exc())
    # From here on a signal has nothing to unwind.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _score_numbers(job: ScoreJob, threads: int, pipe: Connection) -> None:
    logging.getLogger("sparsort").addHandler(_PipeHandler(pipe))
    # The rows are opened later, which changes no prompt here: a function, which depends on them, is refused with workers.
    scorer = job.load(job.prompt.read())
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(min(threads, torch.get_num_threads()))
    if pipe.recv() != _BEGIN:
        return
    source, _ = job.open()
    report = _Progress(pipe)
    with job.begin(scorer, source) as shards:
        pipe.send(("ready", 0))
        while True:
            try:
                index = pipe.recv()
            except EOFError:
                return
            outcome = shards.score_shard(index, report.advance)
            report.send()
            pipe.send((outcome, index))


def _tell(pipe: Connection, kind: str, text: str) -> None:
    with contextlib.suppress(OSError):
        pipe.send((kind, text))


class _Progress:
    """Sends the progress of a worker to the parent, at most every `_REPORT` seconds."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._rows = 0
        self._sent = time.monotonic()

    def advance(self, rows: int) -> None:
        """Count some rows."""
        self._rows += rows
        if time.monotonic() - self._sent >= _REPORT:
            self.send()

    def send(self) -> None:
        """Send what has been counted."""
        if self._rows:
            self._pipe.send(("rows", self._rows))
        self._rows, self._sent = 0, time.monotonic()


class _PipeHandler(logging.Handler):
    """Sends the warnings of sparsort to the parent, which shows them."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        _tell(self._pipe, "note", record.getMessage())
