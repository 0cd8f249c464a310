"""`sparsort classify`: predictions, results, and mistakes in one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from sparsort.recipes.classify.classify import classify
from sparsort.recipes.classify.spec import ClassifySpec

ROWS = [
    {"id": f"r{i}", "text": f"word {i} {'good' if i % 3 else 'bad'}", "label": "pos" if i % 3 else "neg"}
    for i in range(30)
]
PROMPT = ("--prompt", "Review: {text}\nSentiment:", "-k", 4)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model())


def test_predictions_and_results_are_written(file: Path, model: str, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", ROWS[20:])
    result = run("classify", file, "--test", test, "-m", model, *PROMPT, "--out", tmp_path / "out", "--json")
    summary = json.loads(result.stdout)
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predictions] == [row["id"] for row in ROWS[20:]]
    assert [row["gold"] for row in predictions] == [row["label"] for row in ROWS[20:]]
    right = sum(row["predicted"] == row["gold"] for row in predictions)
    assert summary["measures"]["accuracy"] == right / 10
    assert sum(row["rows"] for row in summary["classes"]) == 10
    assert len(summary["worst_errors"]) == 10 - right
    assert all(sum(row["probabilities"].values()) == pytest.approx(1.0) for row in predictions)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["measures"]["accuracy"] == summary["measures"]["accuracy"]
    assert saved["provenance"]["model"] == model


def test_without_test_rows_a_part_of_the_file_is_held_out(file: Path, model: str) -> None:
    result = run("classify", file, "-m", model, *PROMPT)
    assert "on 6 rows" in " ".join(result.stdout.split())
    assert "balanced accuracy" in result.stdout


def test_held_out_rows_keep_their_ids(file: Path, model: str, tmp_path: Path) -> None:
    run("classify", file, "-m", model, *PROMPT, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    labels = {row["id"]: row["label"] for row in ROWS}
    assert all(labels[row["id"]] == row["gold"] for row in map(json.loads, lines))


def test_rows_that_the_prompt_shows_are_reported(file: Path, model: str) -> None:
    stderr = run("classify", file, "--test", file, "-m", model, *PROMPT).stderr
    assert "of the 30 rows to classify are, or nearly are, demonstrations" in " ".join(stderr.split())


def test_rows_without_labels_are_predicted(file: Path, model: str, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [{"text": row["text"]} for row in ROWS[:5]])
    result = run("classify", file, "--test", test, "-m", model, *PROMPT, "--prior", "pos=0.9,neg=0.1")
    assert "rows predicted" in result.stdout
    assert "accuracy 1" not in result.stdout


def test_a_file_as_the_folder_of_the_results_is_refused_before_a_model_is_loaded(file: Path) -> None:
    stderr = run("classify", file, "-m", "/no/model", *PROMPT, "--out", file, code=2).stderr
    assert "is a file; the results are a folder" in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "lable"), "Did you mean 'label'"),
        (("--prior", "pos=x"), "write class=share"),
        (("--prior", "unifrom"), "expected one of uniform"),
        (("--select", "knn"), "All rows share one prompt"),
        (("--labels", "pos=good"), ""),
        (("-k", 90), "k is 90"),
    ],
)
def test_mistakes(file: Path, model: str, options: tuple[Any, ...], message: str) -> None:
    if not message:
        assert run("classify", file, "-m", model, *PROMPT, *options, "--json").exit_code == 0
        return
    assert message in " ".join(run("classify", file, "-m", model, *PROMPT, *options, code=2).stderr.split())


def test_labels_of_test_rows_that_no_training_row_has_are_refused(file: Path, model: str, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [{"text": "a", "label": "neutral"}])
    stderr = run("classify", file, "--test", test, "-m", model, *PROMPT, code=2).stderr
    assert "the label 'neutral', which no training row has: neg, pos" in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("label", "form"),
    [
        ("meta.label", lambda label: {"meta": {"label": label}}),
        ("[label]", lambda label: {"label": label}),
        ("[a.b]", lambda label: {"a.b": label}),
    ],
)
def test_no_spelling_of_the_label_leaks_into_the_default_prompt(
    label: str, form: Callable[[str], dict[str, Any]], model: str
) -> None:
    words = ("alpha", "beta")
    rows = [{"text": f"word {i}", **form(words[i % 2])} for i in range(30)]
    result = classify(rows, rows[20:], model=model, prompt=None, settings=ClassifySpec(label=label, k=4))
    assert result.texts == [f"text: word {i}\nlabel:" for i in range(20, 30)]
    assert result.gold is not None
    assert result.gold.tolist() == [i % 2 for i in range(20, 30)]
