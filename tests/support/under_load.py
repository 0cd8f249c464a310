"""Run tests several times while the machine has too much to do, and report every failure.

    make test-under-load ARGS="tests/recipes/test_train.py -k killed"
    python tests/support/under_load.py --runs 5 --load 8 tests/scoring

Arguments that are not `--runs` or `--load` are pytest's. Exits with 1 if a run failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how many times the tests are run")
    parser.add_argument("--load", type=int, default=8, help="how many processes compute next to them")
    options, arguments = parser.parse_known_args()
    root = Path(__file__).parents[2]
    failed = []
    with busy_processes(options.load):
        for number in range(1, options.runs + 1):
            print(f"=== run {number} of {options.runs}, load {os.getloadavg()[0]:.1f}", flush=True)  # noqa: T201
            command = [sys.executable, "-P", "-m", "pytest", "-q", *arguments]
            if subprocess.run(command, cwd=root, check=False).returncode:
                failed.append(number)
    print(f"=== {len(failed)} of {options.runs} runs failed{': ' if failed else ''}{', '.join(map(str, failed))}")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
