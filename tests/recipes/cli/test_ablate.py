"""The command `sparsort ablate`: from a data file to tables, the cost in advance, and refusals before a model runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsort.recipes.cli.app import app

RUNNER = CliRunner()
SMALL = ["-k", "2", "--sets", "2", "--random-orders", "2", "--dev-rows", "4", "--device", "cpu", "--dtype", "float32"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    kinds = ["bright", "late", "cold", "loud", "slow"]
    rows = [{"text": f"the {kinds[n % 5]} film number {n * n}", "label": n % 2} for n in range(40)]
    return write(tmp_path / "reviews.jsonl", rows)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"q": f"{n} + {n}?", "steps": f"{n} and {n}\nmake {2 * n}", "sum": str(2 * n)} for n in range(40)]
    return write(tmp_path / "sums.jsonl", rows)


@pytest.fixture
def ablate(make_tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    def run(source: Path, *options: str, model: dict[str, Any] | None = None) -> Any:
        folder = make_tiny_model("llama", **(model or {}))
        return RUNNER.invoke(
            app, ["ablate", str(source), *SMALL, "--model", str(folder), "--out", str(tmp_path / "out"), *options]
        )

    return run


def asked(*more: str) -> list[str]:
    return ["--prompt", r"Review: {text}\nKind:", "--labels", "0=bad,1=good", "--orderers", "length_ascending", *more]


def test_the_cost_in_advance_then_a_run_then_results_from_the_store(
    ablate: Callable[..., Any], reviews: Path, tmp_path: Path
) -> None:
    options = asked("--choosers", "mdl,best_on_dev", "--contextual", "off", "--no-report")
    dry = ablate(reviews, *options, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    cost = json.loads(dry.stdout)
    assert not (tmp_path / "out").exists()
    assert (cost["sets"], cost["rows"][0]["k"]) == (2, 2)
    result = ablate(reviews, *options, "--dry-run")
    assert f"{cost['tokens']:,} tokens; as full prompts" in " ".join(result.stdout.split())
    done = ablate(reviews, *options, "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    # An estimate by mean lengths, and at most: not less than what was read, nor another order of magnitude.
    assert 0 < summary["tokens_read"] <= 1.1 * cost["tokens"] < 4 * summary["tokens_read"]
    assert {arm["name"] for arm in summary["cells"][0]["arms"]} >= {"length_ascending", "mdl", "best_on_dev"}
    again = ablate(reviews, *options, "--json", "--no-run")
    assert json.loads(again.stdout)["cells"] == summary["cells"]
    shown = ablate(reviews, *options)
    assert "length ascending" in shown.stdout
    assert "Results: " in shown.stdout


def test_a_note_on_the_data_is_reported_once(ablate: Callable[..., Any], reviews: Path) -> None:
    done = ablate(reviews, *asked("--choosers", "mdl", "--contextual", "off", "--no-report"))
    assert done.exit_code == 0, done.output
    assert " ".join(done.output.split()).count("training rows were set aside for it") == 1


def test_written_answers_of_several_lines(ablate: Callable[..., Any], sums: Path) -> None:
    task = ["--prompt", r"Q: {q}\nA:", "--answer", " {steps} #### {sum}", "--label", "sum", "--judge", "number"]
    few = ["--orderers", "given", "--choosers", "best_on_dev,pdo", "--no-report", "--json", "--test-rows", "3"]
    done = ablate(sums, *task, *few, "--max-new-tokens", "5")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["cells"][0]["labels"] == []
    assert any("pdo skipped: they read label scores" in note for note in summary["data_notes"])
    recipe = json.loads((Path(summary["out"]) / "recipe.json").read_text(encoding="utf-8"))
    # Worked answers have several lines, up to the next question.
    assert (recipe["tasks"][0]["stop"], recipe["tasks"][0]["max_new_tokens"]) == (["\nQ:"], 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answer", " {steps} #### {sum}", "--label", "steps"], "cannot read the gold answer"),
        (["--label", "sum"], "reads the number after '####'"),
        (
            ["--answer", " {steps} #### {sum}", "--label", "sum", "--stop", r"\n"],
            "would be judged wrong as they are shown and cut",
        ),
        (["--answer", " so {steps}", "--label", "sum", "--judge", "exact"], "The judge 'exact' reads"),
        (["--answer", " {steps} #### {sum}", "--label", "sum", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_answers_that_could_not_be_judged_are_reported_before_a_model_runs(
    options: list[str], message: str, ablate: Callable[..., Any], sums: Path, tmp_path: Path
) -> None:
    for more in ([], ["--dry-run"]):
        found = ablate(sums, "--prompt", r"Q: {q}\nA:", "--judge", "number", *options, *more)
        assert found.exit_code == 2
        assert message in " ".join(found.stderr.split())
        assert not (tmp_path / "out" / "results").exists()


def test_sets_chosen_by_label_entropy_need_labels(ablate: Callable[..., Any], sums: Path) -> None:
    found = ablate(
        sums, "--prompt", "{q}", "--label", "sum", "--judge", "exact", "--selectors", "topk_mdl", "--dry-run"
    )
    assert found.exit_code == 2
    assert "use 'topk_cone'" in " ".join(found.stderr.split())


def test_some_answers_that_hold_the_stop_are_noted(ablate: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"q": f"word {n}", "a": f"one {n}" + ("\ntwo" if n == 7 else "")} for n in range(40)]
    data = write(tmp_path / "words.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"q": f"other {n} apple", "a": "x"} for n in range(6)])
    dry = ablate(
        data, "--prompt", "Q: {q} A:", "--label", "a", "--judge", "exact", "--test", str(test), "--dry-run", "--json"
    )
    assert dry.exit_code == 0, dry.output
    warning = (
        "1 of 36 demonstrations of the task 'words' would be judged wrong as they are shown and cut at a stop string"
    )
    assert any(warning in note for note in json.loads(dry.stdout)["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop", "x"], "--stop x has no effect: labels are scored, and nothing is written"),
        (["--max-new-tokens", "4"], "--max-new-tokens 4 has no effect: labels are scored"),
        (["--contextual", "maybe"], "setting of contextual calibration"),
        (["-k", "two"], "whole numbers"),
        (["--choosers", "pdo_piror"], "pdo_prior"),
        (["--selectors", "bm52"], "bm25"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], message: str, ablate: Callable[..., Any], reviews: Path
) -> None:
    found = ablate(reviews, *asked(), *options)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_a_set_that_exceeds_the_context_is_refused_before_the_model_runs(
    ablate: Callable[..., Any], reviews: Path, tmp_path: Path
) -> None:
    found = ablate(reviews, *asked(), "-k", "2,16", model={"max_position_embeddings": 128})
    assert found.exit_code == 2
    message = " ".join(found.stderr.split())
    assert "with k = 16 (set 0), and" in message
    assert "Use fewer shots" in message
    assert not list((tmp_path / "out" / "store" / "groups").glob("*"))


def test_criteria_that_cannot_be_used_are_reported(ablate: Callable[..., Any], reviews: Path) -> None:
    dry = ablate(reviews, *asked("--selectors", "random,bm25", "--choosers", "pdo,mdl"), "--dry-run", "--json")
    (note,) = [note for note in json.loads(dry.stdout)["notes"] if "skipped: " in note]
    assert note.startswith("reviews, bm25: pdo skipped: these criteria choose one order for all queries")


def test_two_sets_of_a_model_that_gives_one_label(ablate: Callable[..., Any], tmp_path: Path) -> None:
    """One label is the beginning of another; two sets, eight rows: what is known is reported, and no number is invented."""
    films = Path(__file__).parents[2] / "data" / "lab_prefix.jsonl"
    options = [
        "--prompt",
        r"Review: {text}\nLabel:",
        "--orderers",
        "given,length_ascending,u_shape",
        "--choosers",
        "density",
    ]
    options += ["--test-rows", "8", "--contextual", "off", "--no-report"]
    done = ablate(films, *options)
    assert done.exit_code == 0, done.output
    assert (
        "k = 2: two demonstration sets allow no interval, so no orderer was tested; run sparsort ablate with --sets 3 or more"
        in done.stdout
    )
    for absurd in ("would have to exceed", "95 % interval +", "95 % interval −", "nan", "inf,"):
        assert absurd not in done.output
    written = RUNNER.invoke(app, ["report", str(tmp_path / "out")])
    assert written.exit_code == 0, written.output
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text(encoding="utf-8"))
    (cell,) = report["cells"]
    for arm in cell["arms"]:
        difference = arm["difference"]
        absent = [name for name, value in difference.items() if value is None]
        assert set(difference) - set(absent) == {"value", "reason"}
        if arm["kind"] != "oracle":
            assert difference["reason"] == "two demonstration sets allow no interval"
    as_json = json.loads(ablate(films, *options, "--no-run", "--no-report", "--json").stdout)
    assert as_json["cells"] == report["cells"]
    assert as_json["warnings"] == report["warnings"]
    for printed in (done.stdout, written.stdout):
        assert "two demonstration sets" in printed
        assert printed.startswith("Warning: ") == bool(report["warnings"])
        assert all(f"Warning: {one['text']}\n" in printed for one in report["warnings"])
