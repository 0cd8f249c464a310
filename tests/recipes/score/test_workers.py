"""`recipes.score.workers`: processes that share a folder give the table of one, whoever is killed and whenever."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import run
from handshake import Child

from sparsort.errors import SparsortError
from sparsort.recipes.score import workers as module
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.score import score_file
from sparsort.scoring.model.spec import ModelSpec
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.store.scores import Scores

ROWS = [{"id": f"q{n}", "question": f"{n} apples" + " and Rome" * (n % 7)} for n in range(60)]
PROMPT = PromptSpec("Question: {question}\nAnswer:")
PLAIN = ScorerConfig(scorer="compression")
OPTIONS: dict[str, Any] = {"prompt": PROMPT, "shard_rows": 8}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_workers_give_the_folder_of_one_process(
    file: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = ModelSpec(str(make_tiny_model("llama")), dtype="float32", device="cpu")
    scorer = ScorerConfig(model=model, outliers="drop:3")
    score_file(file, scorer=scorer, out=tmp_path / "one", **OPTIONS)
    report = score_file(file, scorer=scorer, out=tmp_path / "several", workers=3, **OPTIONS)
    assert report.scores.ids == [row["id"] for row in ROWS]
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


def kill_when(monkeypatch: pytest.MonkeyPatch, condition: Callable[[int, int], bool]) -> list[int]:
    """Kill a worker when it is given a shard, if `condition` holds for the number of shards given before, and for the shard."""
    real, given, killed = module._Worker.give, [], []

    def give(self: module._Worker, index: int) -> None:
        real(self, index)
        if condition(len(given), index):
            os.kill(self.process.pid or 0, signal.SIGKILL)
            killed.append(index)
        given.append(index)

    monkeypatch.setattr(module._Worker, "give", give)
    return killed


def test_the_shard_of_a_killed_worker_is_scored_by_another(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed = kill_when(monkeypatch, lambda number, _index: number in (1, 4, 5))
    report = score_file(file, scorer=PLAIN, out=tmp_path / "out", workers=2, **OPTIONS)
    assert len(killed) == 3
    notes = [record.message for record in caplog.records]
    assert len(notes) == 3
    assert notes[0] == f"a worker process was ended by signal 9 (SIGKILL); another one scores shard {killed[0]}."
    assert report.scores.ids == [row["id"] for row in ROWS]
    score_file(file, scorer=PLAIN, out=tmp_path / "one", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_shard_that_kills_every_worker_ends_the_run_in_one_sentence(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed = kill_when(patch, lambda _number, index: index == 3)
        with pytest.raises(SparsortError) as caught:
            score_file(file, scorer=PLAIN, out=tmp_path / "out", workers=2, **OPTIONS)
    assert killed == [3, 3, 3]
    message = str(caught.value)
    assert message.startswith(
        "shard 3 (from row 24 on) ended 3 worker processes, the last one by signal 9 (SIGKILL). If the memory was full"
    )
    assert f"Finished shards are kept in {tmp_path / 'out'}" in message
    assert score_file(file, scorer=PLAIN, out=tmp_path / "out", **OPTIONS).scores.ids == [row["id"] for row in ROWS]


def test_a_mistake_that_a_worker_meets_is_one_sentence(
    file: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_tiny_model("llama"), model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    command = ["score", file, "-p", "{question}", "-m", model, "--out", tmp_path / "out", "--workers", "2"]
    errors = run(*command, code=2).stderr
    assert errors.startswith(f"sparsort: cannot load the model '{model}'")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_fault_of_a_worker_is_raised_with_its_traceback(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Worker, "give", lambda self, index: self.send("no number"))
    with pytest.raises(RuntimeError, match=r"a worker process failed:\nTraceback(.|\n)*ValueError"):
        score_file(file, scorer=PLAIN, out=tmp_path / "out", workers=2, **OPTIONS)


# A command whose process announces the ids of its workers, and waits, when the first shard is done.
_COMMAND = """
import sys
from handshake import hold
from sparsort.recipes.score import workers
plain = workers.Workers._receive
held = False
def receive(self, *arguments):
    global held
    ended = plain(self, *arguments)
    if not held and any(kind == "scored" for kind, _ in ended):
        held = True
        hold(" ".join(str(worker.process.pid) for worker in self._workers))
    return ended
workers.Workers._receive = receive
if __name__ == "__main__":
    from sparsort.__main__ import main
    main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_the_workers_end_with_their_parent(number: signal.Signals, code: int, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["score", file, "-p", "{question}", "--scorer", "compression", "--shard-rows", 2, "--workers", 2]
    with Child(_COMMAND, *command, "--out", out, stderr=subprocess.PIPE, start_new_session=True) as process:
        workers = [psutil.Process(int(pid)) for pid in process.line().split()]
        assert len(workers) == 2
        process.send_signal(number)
        if number != signal.SIGKILL:
            process.go()
        _, errors = process.communicate()
        assert process.returncode == code, errors
        for worker in workers:
            # A worker that is gone already has no process to wait for.
            worker.wait()
    assert "Traceback" not in errors
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert 0 < len(done) < 30
    run(*command, "--out", out)
    assert Scores.load(out).ids == [row["id"] for row in ROWS]
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}.items()


def test_two_commands_share_a_folder(file: Path, tmp_path: Path) -> None:
    command = ["score", file, "-p", "{question}", "--scorer", "compression", "--shard-rows", 2, "--json"]
    with (
        Child(_COMMAND, *command, "--workers", 2, "--out", tmp_path / "out") as one,
        Child(_COMMAND, *command, "--workers", 2, "--out", tmp_path / "out") as other,
    ):
        assert one.line()
        one.go()
        # The other one may find nothing left to score, and then announces nothing.
        other.go()
        summaries = [json.loads(process.communicate()[0].splitlines()[-1]) for process in (one, other)]
    assert [summary["rows"] for summary in summaries] == [60, 60]
    run(*command, "--out", tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_devices_are_taken_in_turn(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str]] = []

    class StopError(Exception):
        pass

    class Recorded:
        def __init__(self, place: int, job: Any, threads: int) -> None:
            made.append((place, job.scorer.model.device))
            if place == 2:
                raise StopError

        def __getattr__(self, name: str) -> Any:
            raise StopError

    monkeypatch.setattr(module, "_Worker", Recorded)
    with pytest.raises(StopError):
        run_devices(file, tmp_path / "out")
    assert made[:3] == [(0, "cuda:0"), (1, "cpu"), (2, "cuda:0")]


def run_devices(file: Path, out: Path) -> None:
    score_file(file, scorer=ScorerConfig(), out=out, workers=3, devices=["cuda:0", "cpu"], **OPTIONS)
