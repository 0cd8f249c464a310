"""`encodings`: UTF-16 and UTF-32 give the rows of the same text in UTF-8; other encodings are refused with advice."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sparsort.errors import SparsortError
from sparsort.scoring.data import readers
from sparsort.scoring.data.rows import open_rows

DATA = Path(__file__).parents[2] / "data"
ROWS = [{"id": f"q{n}", "text": f"{n} „ü“ 😀\u2028\x85"} for n in range(11)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_byte_order_mark_says_how_a_file_is_encoded(
    encoding: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "STRIDE", 4)  # a late start skips
    text = LINES
    if name == "a.json":
        text = json.dumps(ROWS, indent=1)
    elif name == "a.csv":
        text = "id,text\r\n" + "".join(f'{row["id"]},"{row["text"]}"\r\n' for row in ROWS)
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    raw = (mark + text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    source = open_rows(tmp_path / name)
    assert [dict(row.fields) for row in source.rows()] == ROWS
    for start in (3, 4, 9, 11):
        assert [dict(row.fields) for row in source.rows(start)] == ROWS[start:]


def test_the_reported_file_is_read() -> None:
    assert [dict(row.fields) for row in open_rows(DATA / "utf16.jsonl").rows()] == [{"id": "a", "text": "one two"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "\ufeff{}\n".encode("utf-16-le") + b"\x00",
            "line 2 is not valid UTF-16-LE .truncated data.*restore it, or save",
        ),
        ("\ufeff{}\n".encode("utf-16-le") + b"\x00\xd8a\x00", "line 2 is not valid UTF-16-LE .illegal"),
        (b"\xff\xfe\0\0\xff\xff\xff\xff", "line 1 is not valid UTF-32-LE"),
        (b"\xff\xfe\0", "line 1 is not valid UTF-16-LE .truncated data."),
        ("\ufeff{}\n{}\n{".encode("utf-16-be") + b"\xd8\0\0\n", "line 3 is not valid UTF-16-BE"),
        (b'{"a": "\0"}', "line 1 contains NUL bytes.*UTF-16 without a byte order mark"),
        ('{"a": 1}'.encode("utf-16-le"), "line 1 contains NUL bytes"),
    ],
)
def test_text_that_breaks_off_or_holds_nul_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SparsortError, match=message):
        open_rows(tmp_path / "a.jsonl").count()


def test_nul_in_a_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("a,b\n1,2\n".encode("utf-16-be"))
    with pytest.raises(SparsortError, match="line 1 contains NUL bytes"):
        open_rows(tmp_path / "a.csv").count()


@pytest.mark.parametrize("name", ["my file.jsonl", "a b/my file.jsonl.gz", "a b/my file.json"])
@pytest.mark.parametrize(
    ("encoding", "option"), [("cp1252", "WINDOWS-1252"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")]
)
def test_the_advice_for_another_encoding_works(
    name: str, encoding: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    text = '{"b": "x"}\n{"a": "„ü“ 長文"}\n'.replace(" 長文" if encoding == "cp1252" else "", "")
    raw = (f"[{text.rstrip()}]".replace("\n", ",\n") if name.endswith(".json") else text).encode(encoding)
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(SparsortError, match=r"is not valid UTF-8|line 1 contains NUL bytes") as caught:
        open_rows(name).count()
    if shutil.which("iconv") is None:
        pytest.skip("there is no iconv")
    before, _, command = str(caught.value).rpartition("iconv ")
    assert command.startswith(f"-f {option} ")
    command = f"{before.rpartition(': ')[2]}iconv {command}"
    subprocess.run(["sh", "-c", command], check=True)
    new = Path(name).with_name(f"my file-utf8.{'json' if name.endswith('.json') else 'jsonl'}")
    assert [row.fields for row in open_rows(new).rows()] == [
        {"b": "x"},
        {"a": "„ü“" if encoding == "cp1252" else "„ü“ 長文"},
    ]
