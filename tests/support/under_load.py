"""Run tests several times on an overloaded machine, and report every failure.

    make test-under-load ARGS="tests/recipes/train/test_train.py -k killed"
    python tests/support/under_load.py --runs 5 --load 8 tests/scoring

With `--at-once`, the runs are the load of each other, which takes a third of the time and some 1.5 GB of memory a run.
Other arguments are pytest's. Exits with 1 if a run failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Ends with the process that started it, however that ended: the read returns at the end of standard input.
_BUSY = """
import sys, threading

def compute():
    while True:
        pass

threading.Thread(target=compute, daemon=True).start()
sys.stdin.read()
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Have `count` processes compute without end."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY], stdin=subprocess.PIPE))
            stack.callback(process.kill)
        yield


def one_by_one(command: list[str], runs: int, load: int) -> list[int]:
    """The numbers of the runs that failed, each of which had `load` busy processes next to it."""
    failed = []
    with busy_processes(load):
        for number in range(1, runs + 1):
            print(f"=== run {number} of {runs}, load {os.getloadavg()[0]:.1f}", flush=True)  # noqa: T201
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                failed.append(number)
    return failed


def at_once(command: list[str], runs: int) -> list[int]:
    """The numbers of the runs that failed, of runs in two processes each that all started at the same time."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [Path(folder) / str(number) for number in range(1, runs + 1)]
        processes = [
            subprocess.Popen([*command, "-n", "2", "--dist", "worksteal"], cwd=ROOT, stdout=file, stderr=file)
            for file in (stack.enter_context(log.open("w")) for log in logs)
        ]
        for process in processes:
            stack.callback(process.kill)
        codes = [process.wait() for process in processes]
        for number, (log, code) in enumerate(zip(logs, codes, strict=True), start=1):
            lines = log.read_text(errors="replace").splitlines()
            print(f"=== run {number} of {runs}", *(lines if code else lines[-1:]), sep="\n")  # noqa: T201
    return [number for number, code in enumerate(codes, start=1) if code]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how many times the tests are run")
    parser.add_argument(
        "--load", type=int, default=8, help="how many processes compute next to them; not with --at-once"
    )
    parser.add_argument("--at-once", action="store_true", help="run them at the same time, without other processes")
    options, arguments = parser.parse_known_args()
    command = [sys.executable, "-P", "-m", "pytest", "-q", *arguments]
    failed = at_once(command, options.runs) if options.at_once else one_by_one(command, options.runs, options.load)
    print(f"=== {len(failed)} of {options.runs} runs failed{': ' if failed else ''}{', '.join(map(str, failed))}")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
