"""What every command prints of hostile data, and what it does where nothing can be printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sparsort.recipes.cli.app import app
from sparsort.recipes.cli.commands.score import ends
from sparsort.terminal.printing import printable

Run = Callable[..., Any]
EVIL = "[bold]\x1b]0;pwned\x07\x9b31m\u202e\u2066[/bold]"
COLUMN = "la\x9b31m\x1b\u202ebel"
OTHER = "co\x1b[31m[red]\u202elumn"
LABELS = ("no\u2066\x1b[1m[red]", "yes\x85\x00")
PROMPT = r"Review: {q}\nKind:"
SMALL = ["--device", "cpu", "--dtype", "float32"]


def _rows(n: int) -> list[dict[str, Any]]:
    words = ["bright", "late", "cold", "loud", "slow"]
    return [
        {
            "id": f"{EVIL}{at}",
            "q": f"{words[at % 5]} \x1b[2J[red]film[/red] number {at * at}\t",
            COLUMN: LABELS[at % 2],
            "level": at % 5,
            OTHER: EVIL,
        }
        for at in range(n)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name, and the names of the files in it, are hostile too."""
    made = tmp_path / "di\x1b[31m[bold]r\u202e"
    made.mkdir()
    _write(made / "few\x1b[2J.jsonl", _rows(4))
    _write(made / "rows\x1b[2J.jsonl", _rows(44))
    return made


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> list[str]:
    return ["--model", str(make_tiny_model("llama"))]


@pytest.fixture
def run(is_printed_safely: Callable[[str], bool]) -> Run:
    """Runs a command, and checks all that it prints."""

    def checked(*arguments: Any, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.exit_code, result.output, result.exception)
        assert is_printed_safely(result.stdout)
        assert is_printed_safely(result.stderr)
        return result

    return checked


def test_no_command_prints_a_control_character(run: Run, folder: Path, model: list[str]) -> None:
    few, rows, out = folder / "few\x1b[2J.jsonl", folder / "rows\x1b[2J.jsonl", folder / "out"
    score = ["score", few, "--scorer", "compression", "--prompt", "{q}"]
    shown = run(*score, "--out", out / "scores").stdout
    assert printable(EVIL)[:20] in shown
    assert "\\x1b[2J[red]film[/red]" in shown
    assert f"Scores: {printable(str(out))}" in shown
    found = json.loads(run(*score, "--json", "--out", out / "scores").stdout)
    assert found["provenance"]["source"] == str(few)
    asked = ["order", few, "--scorer", "compression", "-p", "{q}", "-a", f" {{{COLUMN}}}"]
    shown = run(*asked, "-q", "a \x1b[31mquery").stdout
    assert "a \\x1b[31mquery" in shown
    found = json.loads(run(*asked, "-q", "a \x1b[31mquery", "--json").stdout)
    assert found["prompt"].endswith("\n\na \x1b[31mquery")
    assert found["demonstrations"][0]["id"].startswith(EVIL)
    run("plan", out / "scores", "--batch-size", 2, "--data", few, "--show-groups", COLUMN, "--out", out / "plan")
    choose = ["choose", few, "-p", PROMPT, "--label", COLUMN, *model, *SMALL, "--criterion", "pdo_null"]
    assert printable(EVIL)[:20] in run(*choose, "--out", out / "chosen.jsonl").stdout
    calibrate = ["calibrate", rows, "-p", PROMPT, "--level", "level", "--sites", "pre_norm", "--poolings", "last"]
    run(*calibrate, "--outliers", "none", "--draws", 100, *model, *SMALL, "--out", out / "c.json")
    train = [
        "train",
        few,
        "--text",
        "{q}",
        "--model",
        "tiny",
        "--max-steps",
        1,
        "--batch-size",
        2,
        "--scores",
        out / "scores",
    ]
    run(*train, "--out", out / "train", "--cut-length", 16)
    run("env")


def test_an_ablation_and_its_report(
    run: Run, folder: Path, model: list[str], is_printed_safely: Callable[[str], bool]
) -> None:
    rows, out = folder / "rows\x1b[2J.jsonl", folder / "ablation"
    small = [
        "-k",
        2,
        "--sets",
        2,
        "--random-orders",
        2,
        "--dev-rows",
        4,
        "--test-rows",
        6,
        "--orderers",
        "length_ascending",
    ]
    ablate = ["ablate", rows, "-p", PROMPT, "--label", COLUMN, *small, "--choosers", "mdl", "--contextual", "off"]
    run(*ablate, *model, *SMALL, "--no-report", "--out", out, "--dry-run")
    run(*ablate, *model, *SMALL, "--no-report", "--out", out)
    shown = subprocess.run([sys.executable, "-m", "sparsort", "report", str(out)], capture_output=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert is_printed_safely(shown.stdout.decode())
    assert is_printed_safely(shown.stderr.decode())
    assert b".py:" not in shown.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", f"no{EVIL}.jsonl", "--prompt", "{q}"],
        ["score", "FEW", "--prompt", f"{{q}} {{{COLUMN}x}}"],
        ["score", "FEW", "--prompt", EVIL],
        ["score", "FEW", "--scorer", EVIL],
        ["score", "FEW", "--scorer", "column", "--column", EVIL],
        ["score", "FEW", f"--{EVIL}"],
        ["score", "FEW", EVIL],
        [EVIL],
        [f"--{EVIL}"],
        ["order", "FEW", "-q", "x", "-p", "{q}", "-a", "{q}", "--order", EVIL],
        ["choose", "FEW", "-p", "{q}", "--label", EVIL],
        ["calibrate", "FEW", "-p", "{q}", "--level", EVIL],
        ["ablate", "FEW", "-p", "{q}", "--label", EVIL],
        ["report", EVIL],
        ["plan", EVIL, "--batch-size", "2"],
        ["train", "FEW", "--text", f"{{{EVIL}}}", "--out", f"out{EVIL}"],
    ],
)
def test_no_error_prints_a_control_character(run: Run, arguments: list[str], folder: Path) -> None:
    few = str(folder / "few\x1b[2J.jsonl")
    errors = run(*(few if argument == "FEW" else argument for argument in arguments), code=2).stderr
    # Usage errors are in a box, which breaks them over lines.
    flat = "".join(errors.replace("│", "").split())
    assert "[bold]" in flat or "[red]" in flat


def test_an_id_of_ten_megabytes_is_not_printed(run: Run, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", [{"id": "x" * 10_000_000, "q": "a"}, {"id": "y", "q": "b" * 10_000_000}])
    score = ["score", path, "--scorer", "compression", "--prompt", "{q}"]
    assert len(run(*score).output) < 1000
    again = _write(tmp_path / "again.jsonl", [{"id": "x" * 10_000_000, "q": "a"}] * 2)
    errors = run("score", again, "--scorer", "compression", "--prompt", "{q}", code=2).stderr
    assert len(errors) < 5000
    assert "--id-column" in errors


def test_scores_are_shown_with_their_texts_and_their_times(run: Run, tmp_path: Path) -> None:
    rows = [{"id": f"q{at}", "q": f"{at} is the question"} for at in range(12)]
    path = _write(tmp_path / "rows.jsonl", rows)
    prompt = r"Read this and answer in one word.\n{q}"
    shown = run("score", path, "--scorer", "random", "--prompt", prompt, "--out", tmp_path / "s")
    assert "tokens" not in shown.stdout
    assert "…" in shown.stdout
    assert "Read this and answer" not in shown.stdout
    for at in range(12):
        assert (f"  q{at} " in shown.stdout) == (f"  … {at} is the question\n" in shown.stdout)
    assert shown.stdout.count("question") == 10
    assert "12 of 12 rows scored in " in shown.stdout
    assert " s of loading." in shown.stdout
    assert shown.stderr == ""
    found = json.loads(run("score", path, "--scorer", "random", "--prompt", "{q}", "--json").stdout)
    assert found["seconds"] == pytest.approx(found["loading_seconds"] + found["scoring_seconds"], abs=0.002)


def test_equal_scores_are_reported_and_listed_as_people_count(run: Run, tmp_path: Path) -> None:
    rows = [{"id": f"q{at}", "q": "the same", "hard": 0.5} for at in range(12)]
    path = _write(tmp_path / "rows.jsonl", rows)
    shown = run("score", path, "--scorer", "column", "--column", "hard")
    listed = [line.split()[:2] for line in shown.stdout.splitlines() if line.split()[1:2] and line.split()[1][0] == "q"]
    assert listed == [["1", f"q{at}"] for at in (0, 1, 2, 3, 4, 7, 8, 9, 10, 11)]
    assert "note: all 12 scores are 0.5" in shown.stderr


def test_the_ends_are_those_of_a_full_sort() -> None:
    draw = np.random.default_rng(0)
    for n in (0, 1, 9, 10, 11, 40):
        difficulty = draw.integers(0, 4, n).astype(float)
        difficulty[draw.random(n) < 0.2] = np.nan
        ids = [f"{at:05d}" for at in draw.permutation(n)]
        ranked = sorted(np.flatnonzero(~np.isnan(difficulty)), key=lambda at: (difficulty[at], ids[at]))
        assert ends(difficulty, ids) == (ranked if len(ranked) <= 10 else [*ranked[:5], *ranked[-5:]])


def test_the_excerpt_is_the_demonstration_as_it_is_in_the_prompt(run: Run, tmp_path: Path) -> None:
    rows = [{"id": "a", "unread": "of no interest", "q": "How many?", "n": "five"}]
    path = _write(tmp_path / "rows.jsonl", rows)
    asked = ["order", path, "-p", r"Q: {q}\nA:", "-a", " {n}", "-q", "And now?", "--order", "given"]
    (demo,) = json.loads(run(*asked, "--json").stdout)["demonstrations"]
    assert demo["excerpt"] == "Q: How many? A: five"
    assert "difficulty" not in run(*asked).stdout


def test_a_budget_without_room_for_a_demonstration(run: Run, tmp_path: Path, model: list[str]) -> None:
    path = _write(tmp_path / "rows.jsonl", [{"q": "many words " * 20, "n": "five"}])
    asked = ["order", path, "-p", "{q}", "-a", " {n}", "-q", "Now?", "--order", "given", "--max-tokens", 20, *model]
    assert "(--allow-zero-shot)" in run(*asked, code=2).stderr
    assert "dropped" in run(*asked, "--allow-zero-shot").stdout
    found = json.loads(run(*asked, "--allow-zero-shot", "--json").stdout)
    assert found["prompt"] == "Now?"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "redirection", "code"),
    [
        ("--version", "> /dev/full", 1),
        ("score --help", "> /dev/full", 1),
        ("score FILE --scorer random", "> /dev/full", 1),
        ("score FILE --scorer random", ">&-", 1),
        ("--version", "> /dev/full 2> /dev/full", 1),
        # An error is reported as it is, and needs no stdout.
        ("report nowhere", "> /dev/full", 2),
    ],
)
def test_a_stdout_that_fails_is_one_message(arguments: str, redirection: str, code: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", [{"q": "a"}, {"q": "b"}])
    command = f"{sys.executable} -m sparsort {arguments.replace('FILE', str(path))} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (0 if "2>" in redirection else 1)
    assert done.stderr.startswith("sparsort: ") or "2>" in redirection
