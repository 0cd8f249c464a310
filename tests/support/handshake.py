"""Python processes that a test starts, stops and kills in step with it: both halves wait for a state, never for a time.

A child announces a state as a line on its standard output and waits there for a line on its standard input. `die_in` ends a
process as SIGKILL does, at a function call counted from a known state, so a kill hits the same moment on every machine.

Nothing here has a time limit, because any limit is too short on some machine: `faulthandler_timeout` in pyproject.toml ends a
test that hangs. A child that waits sees the end of its standard input when the test process is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# The test's half

# A shell without job control starts its background jobs with SIGINT ignored, and nohup with SIGHUP; children inherit that, so a
# signal from a test would have no effect in a suite that runs in the background.
_HEED_SIGNALS = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


class Child(subprocess.Popen[str]):
    """A process that runs `code`, with pipes of lines, and heeds signals. Leaving the `with` block kills it if it still runs.

    Args:
        code: Python source; it may import this module.
        arguments: its `sys.argv[1:]`, as text.
        options: for `subprocess.Popen`; `env` is added to the test's environment.
    """

    def __init__(self, code: str, *arguments: object, env: dict[str, str] | None = None, **options: Any) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-P", "-c", _HEED_SIGNALS + code, *map(str, arguments)]
        super().__init__(
            command, text=True, bufsize=1, env={**os.environ, **search_path(), **(env or {})}, **{**pipes, **options}
        )

    def __exit__(self, *error: object) -> None:
        self.kill()
        super().__exit__(*error)

    def line(self) -> str:
        """The next line that the child prints; waits for it. Fails if the child ends before."""
        assert self.stdout is not None
        line = self.stdout.readline()
        assert line.endswith("\n"), f"the child ended with {self.wait()} before it announced its state: {line!r}"
        return line[:-1]

    def go(self) -> None:
        """Let a child continue that waits in `hold` or for a line."""
        assert self.stdin is not None
        self.stdin.write("go\n")
        self.stdin.flush()

    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL; waits for its end."""
        return self.wait() == -signal.SIGKILL


def search_path() -> dict[str, str]:
    """The environment under which a child can import this module."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])}


# The child's half


def hold(state: str) -> None:
    """Announce a state, and wait for the test to let this process continue."""
    print(state, flush=True)  # noqa: T201
    sys.stdin.readline()


def die() -> None:
    """End this process at once, as a kill from outside does: nothing is flushed and no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(calls: int) -> None:
    """End this process at the function call with this number, of Python or of C, that its main thread makes from now on."""
    left, process = calls, os.getpid()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if os.getpid() != process:  # forked since, as the workers of a DataLoader are
            sys.setprofile(None)
        elif event in ("call", "c_call"):
            left -= 1
            if left <= 0:
                die()

    sys.setprofile(count)
