"""`scoring.data.json_files`: arrays, lines and columns give the same rows; a single object is refused with advice."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import open_rows

DATA = Path(__file__).parents[2] / "data"
ROWS = [{"text": "a b c", "label": 1}, {"text": "d e", "label": 0}]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in open_rows(path).rows()]


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_columns_are_read_as_rows(indent: int | None, name: str, tmp_path: Path) -> None:
    columns = {"text": ["a b c", "d e"], "label": [1, 0]}
    assert rows_of(write(tmp_path / name, json.dumps(columns, indent=indent))) == ROWS
    frame = json.loads(pd.DataFrame(ROWS, index=[7, 3]).to_json())
    assert rows_of(write(tmp_path / name, json.dumps(frame, indent=indent))) == ROWS


def test_the_reported_files() -> None:
    assert rows_of(DATA / "columns_oriented.json") == ROWS
    with pytest.raises(
        SparsortError,
        match=r"one JSON object \(examples\).*jq -c '\.examples\[\]' \S*data/pretty_object\.json > "
        r"\S*data/pretty_object-rows\.jsonl$",
    ):
        open_rows(DATA / "pretty_object.json")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (json.loads(pd.DataFrame(ROWS).to_json(orient="split")), "the layout 'split' of pandas.*orient='records'"),
        (json.loads(pd.DataFrame(ROWS).to_json(orient="index")), "the layout 'index' of pandas"),
        ({"0": {"text": "a"}, "1": {"text": "b", "y": 1}}, "the layout 'index' of pandas"),
        (
            json.loads(pd.DataFrame(ROWS).to_json(orient="table")),
            r"Its list 'data' contains 2 objects.*jq -c '\.data\[\]'",
        ),
        ({"version": "1.1", "data": ROWS}, "Its list 'data' contains 2 objects"),
        ({"train": ROWS, "test": ROWS[:1]}, "Its list 'train' contains 2 objects"),
        ({"train": ROWS, "test": ROWS}, "contains 2 objects"),
        ({"a b": [ROWS[0]]}, r"""jq -c '\.\["a b"\]\[\]' \S*/a\.json"""),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_holds_rows_is_refused_with_the_way_to_them(
    value: dict[str, Any], message: str, indent: int | None, tmp_path: Path
) -> None:
    with pytest.raises(SparsortError, match=message):
        open_rows(write(tmp_path / "a.json", json.dumps(value, indent=indent)))


def test_one_object_on_one_line_is_a_row(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "tags": ["a", "b"]}
    for row in ({"text": "a", "id": 1}, chat, {"a": {"x": 1}, "b": {"x": 2}}, {"a": {"0": 1}, "b": [1]}, {}):
        assert rows_of(write(tmp_path / "a.json", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"id": ["a", "b"], "text": ["x"]}, r"different lengths: id has 2, text has 1\."),
        ({"id": ["a"], "text": []}, r"different lengths: id has 1, text has 0\."),
        ({"text": {"0": "a", "2": "b"}, "y": {"0": 1}}, r"different lengths: text has 2, y has 1\."),
        ({"text": {"0": "a"}, "y": {}}, r"different lengths: text has 1, y has 0\."),
        ({"text": {"0": "a", "2": "b"}, "y": {"0": 1, "1": 2}}, r"different indices: y has no value for '2'\."),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_columns_of_different_lengths_are_refused(
    value: dict[str, Any], message: str, indent: int | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.json", json.dumps(value, indent=indent))
    with pytest.raises(
        SparsortError, match=f"looks column-oriented, but its columns have {message}.*if the object is one row"
    ):
        open_rows(path)
    # The way out that the message names; an id is never a list.
    assert "id" in value or rows_of(write(path, json.dumps([value], indent=indent))) == [value]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n "text": "a"\n}',
            r"one JSON object \(text\), where rows are expected\. If it is a row, put it into a list",
        ),
        ('{\n "a": 1\n}\n{\n "a": 2\n}', r"not valid JSON \(Extra data at line 4, column 1\)"),
        ('{\n "a": oops\n}', "Expecting value at line 2, column 7"),
        ('{"a": oops}\n{"a": 1}', "line 1: not valid JSON"),
        ('[\n{"a": 1},\n{"a": oops}]', "Expecting value at line 3, column 7"),
        ("{\n}", "empty"),
    ],
)
def test_what_holds_no_rows_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=message):
        open_rows(write(tmp_path / "a.json", text)).count()


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(ROWS * 500).encode(), mtime=0)
    for content in (b"[{}]", whole[:-30], whole[:6], b""):
        (tmp_path / "a.json.gz").write_bytes(content)
        with pytest.raises(SparsortError, match=r"a\.json\.gz(, line \d+)? (cannot be read|has no rows)"):
            open_rows(tmp_path / "a.json.gz").count()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n "a": 1\n}\n',
            "line 1: not valid JSON.*over several lines.*jq -c . '/.*/my rows.jsonl' > '/.*/my rows-lines.jsonl'",
        ),
        ('{"a": 1}\n{"a": 2, "b"', "line 2: not valid JSON.*the file is cut off here"),
        ('[{"a": 1}]', "line 1 contains a list.*use the suffix .json"),
        ('[\n{"a": 1}\n]', "line 1: not valid JSON.*use the suffix .json"),
    ],
)
def test_json_lines_that_are_none_are_refused_with_what_they_are(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=message):
        open_rows(write(tmp_path / "my rows.jsonl", text)).count()


@pytest.mark.parametrize("name", ["it's.json", "a b/it's.json", "a b/it's.json.gz"])
def test_the_command_that_extracts_rows_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    write(path, json.dumps({"a b": ROWS, "n": 1}, indent=1))
    with pytest.raises(SparsortError) as caught:
        open_rows(path)
    command = str(caught.value).partition("extract them: ")[2]
    new = path.with_name("it's-rows.jsonl")
    assert [word for word in shlex.split(command) if word in (name, str(new))] == [name, str(new)]
    if shutil.which("jq") is None:
        pytest.skip("there is no jq")
    subprocess.run(["sh", "-c", command], check=True)
    assert rows_of(new) == ROWS
