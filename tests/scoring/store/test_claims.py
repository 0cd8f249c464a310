"""`scoring.store.claims`: one process at a time, and when a dead one is replaced, by a clock that the test moves."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest
from handshake import Child

from sparsort.scoring.store import claims as module
from sparsort.scoring.store.claims import SILENT, Claims, Owner, read_claims, this_process

ELSEWHERE = Owner(host="other", machine="other boot", pid=1, start="1", since=0.0)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def abandon(claims: Claims, name: str) -> bool:
    """Claim a name and never release it, as a process does that dies; returns whether the claim was made."""
    return claims._take(name) is not None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_is_held_by_one_and_gone_after_its_block(tmp_path: Path) -> None:
    one, other = Claims(tmp_path / "c"), Claims(tmp_path / "c", owner=ELSEWHERE)
    with one.claimed("00012") as first, other.claimed("00012") as second, other.claimed("00013") as third:
        assert (first, second, third) == (True, False, True)
        assert names(tmp_path / "c") == ["claim-00012.0", "claim-00013.0"]
        (mine, theirs) = read_claims(tmp_path / "c")
        assert (mine.name, mine.owner, mine.state) == ("00012", this_process(), "alive")
        assert (theirs.owner, theirs.state) == (ELSEWHERE, "unknown")
    one.close()
    other.close()
    assert not (tmp_path / "c").exists()


def test_a_block_that_fails_releases_its_claim(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with pytest.raises(KeyError), claims.claimed("a"):
        raise KeyError("a")
    with claims.claimed("a") as again:
        assert again


def test_a_process_of_another_machine_is_dead_after_a_silence_by_the_own_clock(tmp_path: Path) -> None:
    clock = Clock()
    gone, observer = Claims(tmp_path, owner=ELSEWHERE), Claims(tmp_path, clock=clock)
    assert abandon(gone, "a")
    for _ in range(3):
        # Each look on its own proves nothing: only the time since the first one counts.
        with observer.claimed("a") as taken:
            assert not taken
    clock.now += SILENT - 1
    with observer.claimed("a") as taken:
        assert not taken
    gone.beat()
    clock.now += 2
    with observer.claimed("a") as taken:
        assert not taken, "it has just given a sign"
    clock.now += SILENT
    with observer.claimed("a") as taken:
        assert taken
        assert names(tmp_path) == ["claim-a.0", "claim-a.1"]
        assert [claim.owner for claim in read_claims(tmp_path)] == [this_process()]
    assert names(tmp_path) == []
    # Its process was only slow: what it does now harms nobody.
    gone.beat()
    gone._release("a", 0)
    assert names(tmp_path) == []


def test_a_clock_that_stops_or_jumps_back_takes_nothing_over(tmp_path: Path) -> None:
    clock = Clock()
    gone, observer = Claims(tmp_path, owner=ELSEWHERE), Claims(tmp_path, clock=clock)
    abandon(gone, "a")
    for moved in (0.0, -5 * SILENT, 1.0):
        clock.now += moved
        with observer.claimed("a") as taken:
            assert not taken


def test_of_several_observers_one_takes_over(tmp_path: Path) -> None:
    clock = Clock()
    abandon(Claims(tmp_path, owner=ELSEWHERE), "a")
    observers = [Claims(tmp_path, clock=clock, owner=dataclasses.replace(ELSEWHERE, pid=pid)) for pid in range(2, 5)]
    for observer in observers:
        assert not abandon(observer, "a")
    clock.now += SILENT
    assert [abandon(observer, "a") for observer in observers] == [True, False, False]


_CLAIMER = """
import sys
from pathlib import Path
from handshake import hold
from sparsort.scoring.store.claims import Claims
with Claims(Path(sys.argv[1])).claimed("a") as taken:
    hold(str(taken))
"""


def test_a_killed_process_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    clock = Clock()
    with Child(_CLAIMER, tmp_path) as child:
        assert child.line() == "True"
        with Claims(tmp_path, clock=clock).claimed("a") as taken:
            assert not taken
        child.kill()
        # It is a zombie until it is waited for, and dead nevertheless.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with Claims(tmp_path, clock=clock).claimed("a") as taken:
            assert taken
        child.wait()
    assert names(tmp_path) == []


def test_a_later_process_with_the_same_id_is_not_the_owner(tmp_path: Path) -> None:
    before = dataclasses.replace(this_process(), pid=os.getppid(), start="1")
    abandon(Claims(tmp_path, owner=before), "a")
    with Claims(tmp_path).claimed("a") as taken:
        assert taken


@pytest.mark.parametrize("content", [b"", b'{"host": "x"', b"[]", b'{"host": 1}', b"\xff"])
def test_a_claim_that_is_not_whole_is_dead_after_a_silence(content: bytes, tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "claim-a.0").write_bytes(content)
    (claim,) = read_claims(tmp_path)
    assert (claim.owner, claim.state) == (None, "unknown")
    observer = Claims(tmp_path, clock=clock)
    for wait, expected in ((0.0, False), (SILENT, True)):
        clock.now += wait
        with observer.claimed("a") as taken:
            assert taken is expected


def test_a_claim_that_this_process_forgot_is_replaced(tmp_path: Path) -> None:
    """An interrupt between the creation of a claim and its block, as in a notebook, leaves one that nobody releases."""
    claims = Claims(tmp_path)
    abandon(claims, "a")
    module._held_here.clear()
    with claims.claimed("a") as taken:
        assert taken


def test_the_first_does_the_work_and_the_others_wait_until_it_is_done(tmp_path: Path) -> None:
    done: list[str] = []
    looks = 0
    first, other = Claims(tmp_path, owner=ELSEWHERE), Claims(tmp_path, sleep=lambda _seconds: finish())
    block = first.first("manifest", lambda: bool(done))
    assert block.__enter__()

    def finish() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            done.append("manifest")
            block.__exit__(None, None, None)

    with other.first("manifest", lambda: bool(done)) as is_ours:
        assert not is_ours
    assert looks == 3


def test_a_thread_gives_signs_while_a_claim_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = threading.Event()
    real = Claims.beat

    def beat(self: Claims) -> None:
        real(self)
        changed.set()

    monkeypatch.setattr(module, "HEARTBEAT", 0.0)
    monkeypatch.setattr(Claims, "beat", beat)
    claims = Claims(tmp_path)
    with claims.claimed("a"):
        before = (tmp_path / "claim-a.0").read_bytes()
        changed.clear()
        changed.wait()
        after = (tmp_path / "claim-a.0").read_bytes()
        assert len(before) == len(after)
        assert before != after
        assert Owner.read(json.loads(after)) == this_process()
        # The thread ends by itself when no claim is held.
        thread = claims._thread
    claims.close()
    assert thread is not None
    assert not thread.is_alive()
