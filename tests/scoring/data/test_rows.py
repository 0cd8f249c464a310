"""`scoring.data.rows` (with its readers): every format gives the same rows, and every mistake is named with its place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.scoring.data import columnar, readers
from sparsort.scoring.data import rows as sources
from sparsort.scoring.data.digests import digest_of
from sparsort.scoring.data.rows import open_rows

ROWS = [{"id": f"q{i:02d}", "question": f"What is {i} + {i}? „ü“", "answer": str(2 * i)} for i in range(23)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Any:
    """`rows` in the form `kind`."""
    table = pa.Table.from_pylist(rows)
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    delimited = [[row[name] for name in rows[0]] for row in rows]
    match kind:
        case "list":
            return rows
        case "table":
            return table
        case "jsonl":
            path.write_text(lines, encoding="utf-8")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case "lines.json":
            path.write_text("\ufeff\n" + lines, encoding="utf-8")
        case "csv" | "tsv":
            mark = "," if kind == "csv" else "\t"
            path.write_text("\n".join(mark.join(row) for row in [list(rows[0]), *delimited]), encoding="utf-8")
        case "parquet":
            pq.write_table(table, path, row_group_size=5)
        case "folder":
            path.mkdir()
            for part in range(3):
                pq.write_table(table.slice(part * 10, 10), path / f"train-{part:05d}-of-00003.parquet")
        case "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=4)
        case "file.arrow":
            with pa.ipc.new_file(path, table.schema) as stream:
                stream.write_table(table)
        case "dataset" | "saved" | "selected":
            import datasets

            dataset = datasets.Dataset.from_list(rows)
            if kind == "dataset":
                return dataset
            if kind == "selected":
                return datasets.Dataset.from_list(list(reversed(rows))).select(range(len(rows) - 1, -1, -1))
            dataset.save_to_disk(str(path))
    return path


KINDS = ["list", "table", "jsonl", "jsonl.gz", "json", "lines.json", "csv", "tsv", "parquet", "folder", "arrow"]
KINDS += ["file.arrow", "dataset", "saved", "selected"]


@pytest.mark.parametrize("stride", [1024, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_rows(
    kind: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "STRIDE", stride)
    monkeypatch.setattr(columnar, "STRIDE", stride)
    source = open_rows(make(kind, tmp_path, ROWS))
    rows = list(source.rows())
    assert source.count() == len(ROWS)
    assert source.id_column == "id"
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.id for row in rows] == [row["id"] for row in ROWS]
    assert [row.position for row in rows] == list(range(len(ROWS)))
    assert [row.digest for row in rows] == [digest_of(row) for row in ROWS]
    for start in (0, 1, 4, 10, 11, 22, 23, 30):
        assert list(source.rows(start)) == rows[start:]
    for n in (1, 3, 22, 23, 100):
        sample = source.sample(n)
        assert len(sample) == min(n, 23)
        assert sample == [rows[row.position] for row in sample]


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(), min_size=1, max_size=30),
    blanks=st.lists(st.integers(0, 30)),
    starts=st.lists(st.integers(0, 31), min_size=1, max_size=4),
    stride=st.integers(1, 7),
)
def test_a_late_start_is_the_rest_of_the_file(
    texts: list[str], blanks: list[int], starts: list[int], stride: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("late") / "rows.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass") for text in texts]
    for blank in blanks:
        lines.insert(min(blank, len(lines)), b"  \r")
    path.write_bytes(b"\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "STRIDE", stride)
        source = open_rows(path)
        everything = list(source.rows())
        assert [row.fields["text"] for row in everything] == texts
        for start in starts:
            assert list(source.rows(start)) == everything[start:]


def test_skipping_parses_nothing_that_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_rows(write_lines(tmp_path / "rows.jsonl", [{"q": i} for i in range(3000)]))
    source.count()
    parsed = []
    real = readers.parse_json
    monkeypatch.setattr(readers, "parse_json", lambda text, where: parsed.append(where) or real(text, where))
    assert next(source.rows(2500)).fields == {"q": 2500}
    assert len(parsed) == 1


def test_ids_come_from_the_column_that_is_named_or_else_are_positions(tmp_path: Path) -> None:
    rows = [{"key": 7, "q": "a"}, {"key": 8, "q": "b"}]
    assert [row.id for row in open_rows(rows).rows()] == ["0", "1"]
    assert open_rows(rows).id_column is None
    for kind in ("list", "jsonl", "parquet"):
        assert [row.id for row in open_rows(make(kind, tmp_path, rows), id_column="key").rows()] == ["7", "8"]
    with pytest.raises(SparsortError, match=r"no field 'kye'.* Did you mean 'key'\? The fields are: key, q"):
        open_rows(make("parquet", tmp_path, rows), id_column="kye").count()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}, {"q": 1}], r"row 1: there is no field 'id' \(the first row has one"),
        ([{"id": "a"}, {"id": None}], "row 1: the id field 'id' is null"),
        ([{"id": "a"}, {"id": [1]}], "row 1: the id field 'id' contains a list"),
        ([{"id": "a"}, {"id": "\ud800"}], "is not valid text"),
        ([{"id": "a"}, {"id": "b"}, {"id": "a"}, {"id": "b"}], "the id 'a' occurs twice, at row 0 and row 2"),
        ([{"id": 1}, {"id": "1"}], "the id '1' occurs twice, at row 0 and row 1"),
        ([{"q": 1}, "text"], "item 1 is a text, not a dict"),
        ([{"q": 1}, {2: 1}], "item 1 is a dict, not a dict with text keys"),
        ([], "has no rows"),
    ],
)
def test_bad_rows_are_named(rows: list[Any], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        list(open_rows(rows).rows())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "dataset"])
def test_a_duplicate_id_is_found_before_the_first_row(kind: str, tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[4], "answer": "other"}]
    place = {"jsonl": r"row 4 \(line 5\) and row 23 \(line 24\)", "csv": r"row 4 \(line 6\) and row 23 \(line 25\)"}
    with pytest.raises(SparsortError, match=f"'q04' occurs twice, at {place.get(kind, 'row 4 and row 23')}"):
        next(open_rows(make(kind, tmp_path, rows)).rows())


def test_equal_hashes_of_different_ids_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hash", lambda _text: 5, raising=False)
    assert open_rows([{"id": "a"}, {"id": "b"}, {"id": "c"}]).count() == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n\n{"q": "\xe9"}\n', r"line 3: byte 0xe9 at offset 17 is not valid UTF-8.*iconv"),
        ("a.csv", b"q,r\n1,2\n3,\xff\n", r"line 3: byte 0xff at offset 10 is not valid UTF-8"),
        ("a.json", b'[{"q": 1},\n {"q": "\xe9"}]', r"line 2: byte 0xe9 at offset 19 is not valid UTF-8"),
        ("a.jsonl", b'{"q": 1}\n{"q": 2, oops}\n', r"line 2: not valid JSON .* at column 10\): .*oops"),
        ("a.jsonl", b'{"q": 1}\n{"q": "cut', r"line 2: not valid JSON .*Unterminated"),
        ("a.jsonl", b'{"q": 1}\n[1, 2]\n', "line 2 contains a list, not a JSON object"),
        ("a.jsonl", b'{"q": 1}\nnull\n', "line 2 contains null, not a JSON object"),
        ("a.jsonl", b'{"q": 1}\n{"q": ' + b"1" * 5000 + b"}", "line 2: JSON that cannot be read"),
        ("a.jsonl", b'{"q": 1}\n{"q": ' + b"[" * 200000, "line 2: (JSON that cannot be read|not valid JSON)"),
        ("a.jsonl", b"\n  \n", "has no rows"),
        ("a.jsonl", b"", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'[{"q": 1}, 3]', "item 1 is a number"),
        ("a.json", b'[{"q": 1},', "not valid JSON"),
        ("a.csv", b"q,r\n", "has no rows"),
        ("a.csv", b"q,q\n1,2\n", "names the column 'q' twice"),
        ("a.csv", b"q,r\n1,2\n1,2,3\n", r"line 3 has 3 values where the header names 2 columns \(q, r\)"),
        ("a.csv", b'q,r\n1,2\n3,"open\n', "line 3: not valid delimited text"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"q": 1}\n' * 1000, mtime=0)[:-20],
            r"line \d+ cannot be read .*Restore the file",
        ),
        ("a.jsonl.gz", b'{"q": 1}\n', "cannot be read: Not a gzipped file"),
        ("a.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("a.arrow", b"not really", "cannot be read as Arrow"),
        ("a.xlsx", b"", r"unsupported file extension '.xlsx'; expected one of .jsonl"),
        ("rows", b"", "unsupported file extension ''; expected one of .jsonl"),
        ("a.parquet.gz", b"", "unsupported file extension '.gz'; expected one of .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SparsortError, match=message) as caught:
        list(open_rows(path).rows())
    assert str(path) in str(caught.value)


def test_nan_infinities_and_long_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": NaN}\n{"x": -Infinity}\n')
    values = [row.fields["x"] for row in open_rows(tmp_path / "a.jsonl").rows()]
    assert np.isnan(values[0])
    assert values[1] == -np.inf
    (tmp_path / "a.csv").write_text('q,r\n"one\ntwo",' + "x" * 300_000 + "\n\n3,4\n")
    rows = list(open_rows(tmp_path / "a.csv").rows())
    assert rows[0].fields["q"] == "one\ntwo"
    assert len(rows[0].fields["r"]) == 300_000
    assert rows[1].fields == {"q": "3", "r": "4"}


def test_a_missing_path_suggests_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(SparsortError, match=r"there is no file .*Did you mean .*train\.jsonl\?"):
        open_rows(tmp_path / "trian.jsonl")
    with pytest.raises(SparsortError, match="There is no folder"):
        open_rows(tmp_path / "none" / "train.jsonl")
    with pytest.raises(SparsortError, match="hub:owner/name:split"):
        open_rows(tmp_path / "gsm8k")


def test_a_folder_has_to_be_one_split(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match="without Parquet files"):
        open_rows(tmp_path)
    for split in ("test", "train"):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(SparsortError, match=r"several splits \(test, train\)"):
        open_rows(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    source = open_rows(path)
    source.count()
    write_lines(path, ROWS[:5])
    with pytest.raises(SparsortError, match="was changed while it was being read"):
        list(source.rows())


def test_data_with_several_splits_is_refused(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    with pytest.raises(SparsortError, match=r"DatasetDict.*one of its splits: dataset\['train'\], dataset\['test'\]"):
        open_rows(datasets.DatasetDict(train=dataset, test=dataset))
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(SparsortError, match=r"several splits. Pass one of them: .*dict/train"):
        open_rows(tmp_path / "dict")


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.jsonl"])
def test_an_impossible_path_is_not_a_file(name: str) -> None:
    with pytest.raises(SparsortError, match="there is no file"):
        open_rows(name)


def test_a_dataset_is_read_as_stored_unless_it_has_a_transform() -> None:
    import datasets

    plain = datasets.Dataset.from_list(ROWS)
    plain.set_format("numpy", columns=["answer"])
    assert list(open_rows(plain).rows())[3].fields == ROWS[3]
    lower = datasets.Dataset.from_list(ROWS).with_transform(lambda batch: {"q": [q.lower() for q in batch["question"]]})
    assert next(open_rows(lower).rows(2)).fields == {"q": ROWS[2]["question"].lower()}
    image = datasets.Dataset.from_list([{"image": {"bytes": b"\x89PNG\xff", "path": None}}])
    row = next(open_rows(image.cast_column("image", datasets.Image())).rows())
    assert row.fields["image"]["bytes"] == b"\x89PNG\xff"


def test_a_digest_is_of_the_content_and_of_nothing_else() -> None:
    row = {"b": [1, 2.5, None], "a": {"y": "ü", "x": float("nan")}}
    same = {"a": {"x": float("nan"), "y": "ü"}, "b": [1, 2.5, None], "absent": None}
    assert digest_of(row) == digest_of(same)
    assert len(digest_of(row)) == 32
    others = [{}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": b"1"}, {"a": b"2"}, {"a": "\ud800"}, {"a": {1: 2, "b": 3}}]
    others += [{"a": np.arange(3)}, {"a": np.float32(7)}, {"a": {1, 2}}, {"a": object}]
    assert len({digest_of(other) for other in others}) == len(others)
    assert digest_of({"a": np.arange(3)}) == digest_of({"a": [0, 1, 2]})
    image = SimpleNamespace(tobytes=lambda: b"pixels", size=(1, 6))
    assert digest_of({"a": image}) == digest_of({"a": SimpleNamespace(tobytes=lambda: b"pixels", size=(1, 6))})


def test_a_digest_is_the_same_in_every_process() -> None:
    code = (
        "import sys; from sparsort.scoring.data.digests import digest_of\n"
        "class Thing: pass\n"
        "print(digest_of({'s': {'a', 'b', 'c'}, 'o': Thing(), 'f': 0.1, 'd': {2: 'x', 'k': b'y'}}))\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        seen.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(seen) == 1
    assert seen.pop().splitlines()[1] == "[]"
