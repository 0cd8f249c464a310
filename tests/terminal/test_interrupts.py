"""`interrupts`, in processes of their own: each announces on stdout that it is in its work, and is then sent signals."""

from __future__ import annotations

import json
import resource
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from handshake import Child
from typer.testing import CliRunner

from sparsort.recipes.cli.app import app
from sparsort.recipes.train.loop import History
from sparsort.scoring.store.scores import Scores
from sparsort.terminal import interrupts

STOPS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
ROWS = [{"id": f"q{n}", "text": f"row {n} " * (n + 1)} for n in range(9)]

_PRELUDE = """
import os, signal, sys
from handshake import hold
from sparsort.terminal import interrupts
def announce(text):
    print(text, flush=True)
"""


def _process(code: str, *arguments: str) -> Child:
    return Child(_PRELUDE + code, *arguments, stderr=subprocess.PIPE, start_new_session=True)


def _end(process: Child) -> tuple[int, str, str]:
    out, errors = process.communicate()
    return process.returncode, out, errors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


# Waits within the second shard's write, before its bytes are on the disk.
_IN_A_WRITE = """
from sparsort.scoring.store import shards
plain = shards.write_shard
def write(path, table, facts):
    plain(path, table, facts)
    if facts["index"] == 1:
        hold("ready")
shards.write_shard = write
from sparsort.__main__ import main
main()
"""


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_the_write_under_way_is_finished_and_the_command_says_how_to_resume(
    number: signal.Signals, code: int, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "it's"
    command = ["score", str(file), "--scorer", "compression", "-p", "{text}", "--shard-rows", "2", "--out", str(out)]
    with _process(_IN_A_WRITE, *command) as process:
        assert process.line() == "ready"
        process.send_signal(number)
        process.go()
        returned, _, errors = _end(process)
    assert returned == code, errors
    assert f"interrupted by {number.name}. Finished work is kept in {out}" in errors
    assert f"run the same command again: {shlex.join(['sparsort', *command])}" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "shard-00000.parquet",
        "shard-00001.parquet",
        "workers",
    ]
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert CliRunner().invoke(app, command).exit_code == 0
    assert Scores.load(out).ids == [row["id"] for row in ROWS]
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())


# What each command needs to be invoked.
COMMANDS = {
    "score": ["rows.jsonl"],
    "status": ["scores"],
    "order": ["rows.jsonl", "-q", "x"],
    "choose": ["rows.jsonl"],
    "classify": ["rows.jsonl", "--out", "runs"],
    "calibrate": ["rows.jsonl"],
    "ablate": ["rows.jsonl", "--out", "runs"],
    "report": ["runs"],
    "plan": ["scores"],
    "train": ["rows.jsonl", "--out", "runs"],
    "env": [],
    "cache": [],
}

_IN_A_COMMAND = """
from sparsort.recipes.cli import option_conditions
option_conditions.check = lambda context: hold("ready")
from sparsort.__main__ import main
main()
"""


def test_the_list_of_commands_is_whole() -> None:
    assert {command.name or command.callback.__name__ for command in app.registered_commands if command.callback} == {
        *COMMANDS
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_the_code_of_the_signal(command: str) -> None:
    with _process(_IN_A_COMMAND, command, *COMMANDS[command]) as process:
        assert process.line() == "ready"
        process.send_signal(signal.SIGTERM)
        returned, out, errors = _end(process)
    assert returned == 143, errors
    assert (out, errors.count("\n")) == ("", 1)
    assert "interrupted by SIGTERM" in errors
    assert f"un the same command again: {shlex.join(['sparsort', command, *COMMANDS[command]])}" in errors
    assert ("Nothing was finished yet" in errors) == (command in ("ablate", "train"))


_IN_THE_PARSER = """
from sparsort.recipes.cli import app as cli
cli._Commands.make_context = lambda *arguments, **options: hold("ready")
from sparsort.__main__ import main
main()
"""


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_signal_while_the_arguments_are_read_is_one_sentence_and_its_code(number: signal.Signals, code: int) -> None:
    """typer turns an interrupt outside a command into exit code 130, whatever the signal, and prints nothing."""
    with _process(_IN_THE_PARSER, "env") as process:
        assert process.line() == "ready"
        process.send_signal(number)
        returned, out, errors = _end(process)
    assert (returned, out) == (code, "")
    assert errors == "sparsort: interrupted. Run the same command again.\n"


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    """As under nohup."""
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _IN_A_COMMAND.replace(
        'hold("ready")', '(hold("ready"), announce("still here"), sys.exit(0))'
    )
    with _process(code, "env") as process:
        assert process.line() == "ready"
        process.send_signal(signal.SIGHUP)
        process.go()
        returned, out, _ = _end(process)
    assert (returned, out) == (0, "still here\n")


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = "interrupts._SAME_REQUEST = 0.0\ninterrupts.handle_signals()\nwith interrupts.held():\n    hold('ready')"
    with _process(code) as process:
        assert process.line() == "ready"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        returned, _, errors = _end(process)
    assert returned in (-signal.SIGTERM, -signal.SIGHUP)
    assert errors == ""


def _run(code: str) -> tuple[int, str, str]:
    with _process("interrupts.handle_signals()\n" + code) as process:
        return _end(process)


def test_one_request_that_is_sent_twice_counts_once() -> None:
    """As `timeout` sends it: to the process, and to its group."""
    returned, out, errors = _run("""
interrupts._SAME_REQUEST = 1e9
try:
    with interrupts.held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        announce("written")
except interrupts.Interrupted as stop:
    announce(f"{stop} {interrupts.exit_code(stop)}")
""")
    assert out == "written\nSIGTERM 143\n"
    assert (returned, errors) == (0, "")


def test_an_interrupt_that_a_destructor_swallows_is_raised_again() -> None:
    returned, out, errors = _run("""
from sparsort.terminal.progress import progress
class Gone:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
try:
    with progress("work", 2) as advance:
        advance(1)
        Gone()
        announce("swallowed")
        advance(1)
        announce("not reached")
except interrupts.Interrupted:
    # Cleaning up is not interrupted again.
    interrupts.check()
    announce("raised")
""")
    assert out == "swallowed\nraised\n"
    assert (returned, errors) == (0, "")


def test_a_forked_child_has_the_former_handlers_and_a_group_of_its_own() -> None:
    returned, out, errors = _run("""
if os.fork() == 0:
    former = [signal.getsignal(number) for number in interrupts.SIGNALS]
    announce(former == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL])
    announce(os.getpgrp() == os.getpid())
    announce(interrupts.received())
    os._exit(0)
os.wait()
announce(signal.getsignal(signal.SIGTERM) is interrupts._on_signal)
""")
    assert out == "True\nTrue\nNone\nTrue\n"
    assert (returned, errors) == (0, "")


def test_a_library_call_does_not_take_over_signals() -> None:
    handlers = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.held():
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] == handlers
    interrupts.check()
    assert interrupts.received() is None


TRAIN = ["--text", "{text}", "--schedule", "shuffle", "--eval-share", "0", "--batch-size", "3", "--max-steps", "6"]

# Waits inside the third step.
_IN_A_STEP = """
from sparsort.recipes.train.loop import TextTrainer
plain = TextTrainer.training_step
def step(self, *arguments, **options):
    if self.state.global_step == 2:
        hold("ready")
    return plain(self, *arguments, **options)
TextTrainer.training_step = step
from sparsort.__main__ import main
main()
"""


def _train(file: Path, out: Path, *options: str) -> dict[str, Any]:
    command = ["train", str(file), *TRAIN, *options, "--out", str(out), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_training_stops_after_the_step_with_a_checkpoint(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with _process(_IN_A_STEP, "train", str(file), *TRAIN, "--out", str(out)) as process:
        assert process.line() == "ready"
        process.send_signal(signal.SIGTERM)
        process.go()
        returned, _, errors = _end(process)
    assert returned == 143, errors
    assert "SIGTERM: stopping after this step, with a checkpoint" in errors
    assert (
        f"kept in {out}. To resume from there, run the same command again: sparsort train {file} --text '{{text}}'"
        in errors
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert _train(file, out)["resumed"] == 3
    _train(file, tmp_path / "straight")
    assert (out / "history.jsonl").read_text() == (tmp_path / "straight" / "history.jsonl").read_text()


@pytest.mark.parametrize(
    ("limit", "cause"),
    [(100_000, "larger than this process may write"), (800_000, "could not write the whole of a file")],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    limit: int, cause: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first checkpoint no file may grow beyond the limit: the writers meet the errors that a full disk gives them.

    safetensors meets the first limit, PyTorch the second.
    """
    plain, before = History.on_save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_save(*arguments: Any, **options: Any) -> None:
        plain(*arguments, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    out = tmp_path / "run"
    command = ["train", str(file), *TRAIN, "--save-steps", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(History, "on_save", on_save)
        try:
            stopped = CliRunner().invoke(app, command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.exit_code == 2, stopped.output
    assert stopped.stderr.count("\n") == 1
    assert f"cannot write {out / 'checkpoints' / 'checkpoint-4'}: " in stopped.stderr
    assert cause in stopped.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert _train(file, out, "--save-steps", "2")["resumed"] == 2
