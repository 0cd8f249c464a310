"""`sparsort report` as used by scripts and by people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from simulated_results import simulate
from typer.testing import CliRunner

from sparsort.curriculum.ablation.results.results import Results
from sparsort.errors import SparsortError
from sparsort.recipes.cli.commands.report import report
from sparsort.recipes.report import make_report, write_report

app = typer.Typer()
app.command()(report)


@pytest.fixture(scope="module")
def results() -> Results:
    return simulate(["mr"], shots=(2,), sets=3, orders=2, items=8, arms=["pdo"], calibrated=(False,))


@pytest.fixture
def folder(results: Results, tmp_path: Path) -> Path:
    """As `sparsort ablate --out` leaves it."""
    results.save(tmp_path / "study" / "results")
    return tmp_path / "study"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("inner", [".", "results", "results/results.json"])
def test_the_report_is_written_next_to_the_results(folder: Path, inner: str) -> None:
    result = run(folder / inner)
    assert result.exit_code == 0, result.output
    assert f"Report: {folder / 'report' / 'report.html'}" in result.stdout
    assert "mr:" in result.stdout
    assert {path.name for path in (folder / "report").iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
        "figures",
    }


def test_one_object_on_stdout(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--out", tmp_path / "out", "--figures", tmp_path / "paper", "--title", "A <b>", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["title"] == "A <b>"
    assert "demonstrations" not in found
    assert found["cells"][0]["arms"][0]["name"] == "pdo"
    assert found["files"][0] == str(tmp_path / "out" / "report.html")
    assert all(Path(name).is_file() for name in found["files"])
    assert (tmp_path / "paper" / "forest.pdf") in map(Path, found["files"])
    assert "A &lt;b&gt;" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_results_at_hand_need_a_folder(results: Results, tmp_path: Path) -> None:
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    with pytest.raises(SparsortError, match="pass out="):
        make_report(results)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"no results in .*Expected the folder of sparsort ablate --out"):
        make_report(tmp_path)


def test_a_report_written_again_replaces_its_files(folder: Path) -> None:
    page = write_report(folder)
    before = page.read_bytes()
    page.write_text("old", encoding="utf-8")
    assert write_report(folder) == page
    assert page.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "report").write_text("in the way", encoding="utf-8")
    with pytest.raises(SparsortError, match="cannot write"):
        write_report(folder)
