"""Kill the processes of `sparsort score --workers 2` at random moments, and check that no row is lost, doubled or scored twice.

    python benchmarks/checks/killed_scoring.py --save

Each fault strikes as often as `--kills` says, in one folder that is run until it is complete:

- worker: SIGKILL to one of the two workers; the command itself has to finish the run.
- driver: SIGKILL to the command, which is started again.
- preemption: SIGTERM to the command, or to all of its processes, in turn; it is started again.
- two drivers: two commands on the folder at the same time, of which one is killed and started again.
- full disk: no file may be larger than half a KiB to 8 KiB, and shards are larger or smaller; then the limit is lifted.

At every fault, the finished shards are noted with their inode and time of writing. At the end they must be the same files, and
the folder must equal that of a run without faults, byte for byte. The times of the faults come from `--seed`, but the machine
decides what they hit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Report, add_output_options

from sparsort.scoring.store.scores import Scores

SHARD_ROWS = 16
# The longest random wait before a fault, in seconds, after the run has made progress.
_WAIT = 0.6

Stamps = dict[str, tuple[int, int]]


class Folder:
    """A score folder under faults, and what was finished at each of them."""

    def __init__(self, root: Path, name: str, rows: Path) -> None:
        self.out = root / name
        self.command = [sys.executable, "-m", "sparsort", "score", str(rows), "--scorer", "compression", "-p", "{text}"]
        self.command += ["--shard-rows", str(SHARD_ROWS), "--workers", "2", "--json", "--out", str(self.out)]
        self._finished: Stamps = {}
        self.rewritten = 0

    def start(self) -> subprocess.Popen[bytes]:
        # A session of its own, so that a signal can reach all of its processes.
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    def shards(self) -> Stamps:
        """The finished shards, with inode and time of writing."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for file in os.scandir(self.out):
                if file.name.startswith("shard-"):
                    found[file.name] = (file.stat().st_ino, file.stat().st_mtime_ns)
        return found

    def note(self) -> None:
        """Compare the finished shards with those of the last fault."""
        now = self.shards()
        self.rewritten += sum(now.get(name) != stamp for name, stamp in self._finished.items())
        self._finished = now

    def wait_for_progress(self, process: subprocess.Popen[bytes], rng: random.Random) -> bool:
        """Wait until a shard more is done, and a random time longer; whether the process still runs."""
        before = len(self.shards())
        while process.poll() is None and len(self.shards()) <= before:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, _WAIT))
        return process.poll() is None

    def finish(self) -> str:
        """Run the command until its end; returns what it wrote to stderr if it failed."""
        with self.start() as process:
            errors = process.stderr.read().decode(errors="replace") if process.stderr is not None else ""
        self.note()
        return errors if process.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20, help="how often each fault strikes")
    parser.add_argument("--shards", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    add_output_options(parser)
    arguments = parser.parse_args()
    kills, shards = (3, 500) if arguments.quick else (arguments.kills, arguments.shards)
    report, rng = Report("killed_scoring", torch.device("cpu")), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = _write_rows(root / "rows.jsonl", shards * SHARD_ROWS - 5, rng)
        undisturbed = Folder(root, "undisturbed", rows)
        if errors := undisturbed.finish():
            sys.exit(errors)
        for fault, strike in _FAULTS.items():
            folder = Folder(root, fault.replace(" ", "-"), rows)
            struck, problem = strike(folder, kills, rng)
            _add(report, fault, folder, undisturbed.out, struck, problem or folder.finish())
            shutil.rmtree(folder.out)
    report.finish(arguments)
    sys.exit(any(figure.holds is False for figure in report.figures.values()))


def _add(report: Report, fault: str, folder: Folder, expected: Path, struck: int, problem: str) -> None:
    ids, right = [], Scores.load(expected).ids
    with contextlib.suppress(Exception):
        ids = Scores.load(folder.out).ids
    wrong = len(set(right) - set(ids)) + len(ids) - len(set(ids))
    names = {file.name for place in (expected, folder.out) for file in place.iterdir()}
    differing = sum(_content(expected / name) != _content(folder.out / name) for name in names)
    report.add(f"{fault}: faults", struck, "", note=problem.strip()[-300:])
    report.add(f"{fault}: rows lost or doubled", wrong, "", floor=0, better="lower")
    report.add(f"{fault}: finished shards that were written again", folder.rewritten, "", floor=0, better="lower")
    report.add(f"{fault}: files that differ from an undisturbed run", differing, "", floor=0, better="lower")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _kill_workers(folder: Folder, kills: int, rng: random.Random) -> tuple[int, str]:
    struck = 0
    with folder.start() as process:
        while struck < kills and folder.wait_for_progress(process, rng):
            workers = [
                child
                for child in psutil.Process(process.pid).children()
                if "spawn_main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE
            ]
            folder.note()
            if workers:
                rng.choice(workers).kill()
                struck += 1
        errors = process.stderr.read().decode(errors="replace") if process.stderr is not None else ""
    return struck, errors if process.returncode else ""


def _kill_driver(folder: Folder, kills: int, rng: random.Random) -> tuple[int, str]:
    return _stop(folder, kills, rng, lambda process, _number: process.kill(), (-signal.SIGKILL,))


def _preempt(folder: Folder, kills: int, rng: random.Random) -> tuple[int, str]:
    def stop(process: subprocess.Popen[bytes], number: int) -> None:
        if number % 2:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()

    return _stop(folder, kills, rng, stop, (128 + signal.SIGTERM,))


def _stop(
    folder: Folder,
    kills: int,
    rng: random.Random,
    stop: Callable[[subprocess.Popen[bytes], int], None],
    codes: tuple[int, ...],
) -> tuple[int, str]:
    for number in range(kills):
        with folder.start() as process:
            if not folder.wait_for_progress(process, rng):
                return number, ""
            folder.note()
            stop(process, number)
            errors = process.stderr.read().decode(errors="replace") if process.stderr is not None else ""
        if process.returncode not in codes:
            return number, f"the command ended with {process.returncode}: {errors}"
    return kills, ""


def _two_drivers(folder: Folder, kills: int, rng: random.Random) -> tuple[int, str]:
    struck = 0
    with folder.start() as steady:
        while struck < kills and steady.poll() is None:
            with folder.start() as process:
                # The steady command makes progress too, so this one may be killed while it starts.
                if not folder.wait_for_progress(process, rng):
                    break
                folder.note()
                process.kill()
                struck += 1
        errors = steady.stderr.read().decode(errors="replace") if steady.stderr is not None else ""
    return struck, errors if steady.returncode else ""


def _fill_disk(folder: Folder, kills: int, rng: random.Random) -> tuple[int, str]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(kills):
        # A limit on the size of files gives the same error path as a full disk. It is lifted before the last run. The first
        # limits are too small for any shard, the later ones for some of them.
        limit = rng.choice([512, 2048, 4096, 1 << 13])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            process = folder.start()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with process:
            errors = process.stderr.read().decode(errors="replace") if process.stderr is not None else ""
        folder.note()
        if process.returncode != 2 or errors.count("\n") != 1:
            return number, f"the command ended with {process.returncode}: {errors}"
    return kills, ""


_FAULTS = {
    "worker": _kill_workers,
    "driver": _kill_driver,
    "preemption": _preempt,
    "two drivers": _two_drivers,
    "full disk": _fill_disk,
}


def _write_rows(path: Path, count: int, rng: random.Random) -> Path:
    lines = (
        json.dumps({"id": f"row-{number}", "text": " ".join(str(rng.random()) for _ in range(20))})
        for number in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
