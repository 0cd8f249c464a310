"""The helpers with which tests wait and count (`tests/support`)."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from forks import ForkServer
from handshake import Child
from work import count_calls

_LOOP = "import itertools\nfrom handshake import die_in\ndie_in({calls})\nfor n in itertools.count():\n    print(n, flush=True)\n"


def test_a_child_waits_at_its_state_until_it_is_released() -> None:
    with Child("from handshake import hold\nhold('here')\nprint('done')") as child:
        assert child.line() == "here"
        child.go()
        assert child.line() == "done"
        assert child.wait() == 0


def test_a_child_that_ends_before_its_state_is_a_failure() -> None:
    with Child("raise SystemExit(3)") as child, pytest.raises(AssertionError, match="ended with 3 before"):
        child.line()


def test_a_child_heeds_an_interrupt_that_the_tests_ignore() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Child("from handshake import hold\nhold('here')", stderr=subprocess.DEVNULL) as child:
            assert child.line() == "here"
            child.send_signal(signal.SIGINT)
            assert child.wait() == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("calls", [40, 400])
def test_a_process_dies_at_the_same_call_each_time(calls: int) -> None:
    code = _LOOP.format(calls=calls)
    printed = []
    for _ in range(2):
        with Child(code) as child:
            assert child.stdout is not None
            printed.append(child.stdout.read())
            assert child.was_killed()
    assert printed[0] == printed[1]
    assert calls // 4 < printed[0].count("\n") <= calls


def test_calls_are_counted() -> None:
    def work(n: int) -> None:
        for _ in range(n):
            abs(-1)

    assert count_calls(lambda: work(500)) - count_calls(lambda: work(100)) == 400


def test_forks_have_their_own_output_arguments_and_end(forks: ForkServer, tmp_path: Path) -> None:
    code = "import os, sys\nprint(sys.argv[1], os.environ.get('NAME'))\nsys.exit(int(sys.argv[1]))"
    kill = ("from handshake import die; die()", [], {})
    failing = ("raise ValueError('why')", [], {})
    codes = forks.run(tmp_path / "job", (code, [0], {"NAME": "a"}), (code, [7], {"NAME": "b"}), kill, failing)
    assert codes == [0, 7, -signal.SIGKILL, 1]
    assert [(tmp_path / f"job-{n}.out").read_text() for n in range(2)] == ["0 a\n", "7 b\n"]
    assert "ValueError: why" in (tmp_path / "job-3.err").read_text()
