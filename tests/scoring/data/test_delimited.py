"""`delimited`: a delimiter is detected only if it is certain, and columns can be named for a file without a header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsort.curriculum.ablation.recipe.splits import read_rows
from sparsort.errors import SparsortError
from sparsort.recipes.ablate import find_source
from sparsort.recipes.cli.app import app
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.scorers.baselines import CompressionScorer


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1;5,2\n", [{"a": "1;5", "b": "2"}]),
        ("a;b\n1,5;2,5\n", [{"a": "1,5", "b": "2,5"}]),
        ('"a";"b"\r\n"1;2";"3"\r\n', [{"a": "1;2", "b": "3"}]),
        ("a\tb\n1,5\t2\n", [{"a": "1,5", "b": "2"}]),
        (
            "a;b\tc\n1;2\tx\n3;4\ty,z\n5\t6\n",
            [{"a;b": "1;2", "c": "x"}, {"a;b": "3;4", "c": "y,z"}, {"a;b": "5", "c": "6"}],
        ),
        ("text\nhello; you\n", [{"text": "hello; you"}]),
        ("text; more\nhello\nthere; a; b\n", [{"text; more": "hello"}, {"text; more": "there; a; b"}]),
        ("a;b\n", []),
    ],
)
def test_the_delimiter_is_detected_where_it_is_certain(text: str, rows: list[dict[str, str]], tmp_path: Path) -> None:
    source = open_rows(write(tmp_path / "a.csv", text))
    if not rows:
        with pytest.raises(SparsortError, match="has no rows"):
            source.count()
    else:
        assert [dict(row.fields) for row in source.rows()] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\tc\n1;2\t3\n", "do not show whether semicolons or tabs separate its cells.*Save it with commas"),
        ("a;b\n1;2;3\n4,5\n", "do not show whether semicolons separate its cells"),
    ],
)
def test_an_uncertain_delimiter_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=message):
        open_rows(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "1,x y\n2,z\n"), ("a.csv", "1;x y\n2;z\n"), ("a.tsv", "1\tx y\n2\tz\n"), ("a.csv", '1,"x y"\n\n2,z')],
)
def test_columns_can_be_named(name: str, text: str, tmp_path: Path) -> None:
    source = open_rows(write(tmp_path / name, text), columns=("n", "text"), id_column="n")
    assert [(row.id, dict(row.fields)) for row in source.rows()] == [
        ("1", {"n": "1", "text": "x y"}),
        ("2", {"n": "2", "text": "z"}),
    ]
    assert [row.id for row in source.rows(1)] == ["2"]
    scores = CompressionScorer().score(tmp_path / name, "{text}", columns=["n", "text"])
    assert len(scores) == 2


def test_named_columns_decide_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "1,5;2,5\n3,5;4,5\n")
    assert next(open_rows(path, columns=["a", "b"]).rows()).fields == {"a": "1,5", "b": "2,5"}


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "a,b\n1,2\n", ["a", "b"], r"its first line is the header a, b\. Do not pass columns \(--columns\)"),
        (
            "a.csv",
            "1,2\n1,2,3\n",
            ["a", "b"],
            r"line 2 has 3 values where columns \(--columns\) names 2 columns \(a, b\)",
        ),
        ("a.csv", "1,2\n", ["a"], "line 1 has 2 values"),
        ("a.csv", "1,2\n", ["a", "a"], "expected different non-empty names"),
        ("a.csv", "1,2\n", [], "expected different non-empty names"),
        ("a.csv", "1,2\n", "a,", "line 1 has 2 values"),
        ("a.jsonl", '{"a": 1}\n', ["a"], r"a\.jsonl already has column names\. Do not pass columns"),
        ("a.csv", None, ["a"], "there is no file"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    name: str, text: str | None, columns: list[str], message: str, tmp_path: Path
) -> None:
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(SparsortError, match=message):
        open_rows(tmp_path / name, columns=columns).count()


def test_rows_in_memory_have_names() -> None:
    with pytest.raises(SparsortError, match="list of 1 rows already has column names"):
        open_rows([{"a": 1}], columns=["a"])


def test_a_missing_column_of_a_file_without_a_header_is_explained(tmp_path: Path) -> None:
    source = open_rows(write(tmp_path / "a.csv", "1,hello\n2,you\n"))
    with pytest.raises(SparsortError, match=r"It has: 1, hello\. If the first line is not a header.*--columns a,b,c"):
        source.require(["text"])
    with pytest.raises(SparsortError, match=r"names the column 'x' twice.*--columns a,b,c"):
        open_rows(write(tmp_path / "b.csv", "x,x\n1,2\n")).count()


def test_commands_take_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "".join(f"{n},text of row {n * n}\n" for n in range(6)))
    words = ["score", str(path), "--scorer", "compression", "-p", "{text}", "--json"]
    assert CliRunner().invoke(app, words).exit_code == 2
    done = CliRunner().invoke(app, [*words, "--columns", "n, text"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 6


def test_a_task_has_the_columns_of_its_files(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "".join(f"text {n},{'yes' if n % 2 else 'no'}\n" for n in range(6)))
    source: dict[str, Any] = {"data": None, "test": None, "prompt": "{text}", "label": "label", "labels": None}
    task = find_source(str(path), **source, columns=("text", "label"))["tasks"][0]
    assert list(task.labels) == ["no", "yes"]
    rows = read_rows(task, None, "train")
    assert rows is not None
    assert rows[1] == {"text": "text 1", "label": "yes", "id": "train:1"}


def test_every_command_that_reads_rows_has_the_option() -> None:
    for command in ("score", "order", "choose", "calibrate", "ablate", "plan", "train"):
        assert "--columns" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
