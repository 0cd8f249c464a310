"""`scoring.data.columnar`: unusual types, damaged files and row groups larger than what may be held at a time."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.prompts.prompt import Prompt

DAY = datetime.date(2024, 2, 29)
UNUSUAL = {
    "dictionary": (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
    "large": (pa.array(["a", "ü"], pa.large_string()), ["a", "ü"]),
    "view": (
        pa.array(["a", "a long text that is not inlined"], pa.string_view()),
        ["a", "a long text that is not inlined"],
    ),
    "decimal": (pa.array([Decimal("1.50"), None], pa.decimal128(10, 2)), [Decimal("1.50"), None]),
    "nothing": (pa.nulls(2), [None, None]),
    "day": (pa.array([DAY, None]), [DAY, None]),
    "nested": (pa.array([{"a": [1, None]}, None]), [{"a": [1, None]}, None]),
    "half": (pa.array([1.5, 2.5], pa.float16()), [1.5, 2.5]),
    "big": (pa.array([2**64 - 1, 0], pa.uint64()), [2**64 - 1, 0]),
}


def save(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_types_keep_their_values(name: str, suffix: str, tmp_path: Path) -> None:
    if (name, suffix) == ("view", ".parquet"):
        pytest.skip("Parquet has no views")
    column, values = UNUSUAL[name]
    rows = list(open_rows(save(pa.table({"x": column}), tmp_path / f"a{suffix}")).rows())
    assert [row.fields["x"] for row in rows] == values


def test_unusual_types_are_read_as_text_or_refused(tmp_path: Path) -> None:
    table = pa.table({name: column for name, (column, _) in UNUSUAL.items() if name != "view"})
    source = open_rows(save(table, tmp_path / "a.parquet"))
    prompt = Prompt.of("{dictionary} {large} {decimal} {day} {big}")
    source.require(prompt.fields, prompt)
    assert (
        prompt.render(next(source.rows()).fields, where="row 0", tokenizer=None).text == f"a a 1.50 {DAY} {2**64 - 1}"
    )
    nested = Prompt.of("{nested}")
    with pytest.raises(SparsortError, match=r"has a dictionary in the field 'nested'.*\{nested\.a\[0\]\}"):
        source.require(nested.fields, nested)


@pytest.mark.parametrize(
    ("column", "suffix"),
    [
        (pa.array([0, 2**62], pa.timestamp("s")), ".arrow"),
        (pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False), ".parquet"),
    ],
)
def test_values_that_python_does_not_have_name_their_column(column: Any, suffix: str, tmp_path: Path) -> None:
    source = open_rows(save(pa.table({"n": [1, 2], "x": column}), tmp_path / f"a{suffix}"))
    message = rf"a\{suffix}, column 'x' \({re.escape(str(column.type))}.*Convert the column to text, or remove it"
    with pytest.raises(SparsortError, match=message):
        list(source.rows())


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_refused(suffix: str, tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    for source in (table, save(table, tmp_path / f"a{suffix}")):
        with pytest.raises(SparsortError, match="has two columns with the name 'a'"):
            open_rows(source)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_file_that_is_cut_off_is_refused(suffix: str, tmp_path: Path) -> None:
    path = save(pa.table({"x": [f"text {n}" for n in range(3000)]}), tmp_path / f"a{suffix}")
    content = path.read_bytes()
    for size in (0, 3, 12, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:size])
        with pytest.raises(SparsortError, match=rf"a\{suffix} (cannot be read as|has no rows)"):
            list(open_rows(path).rows())


def test_offsets_outside_of_an_arrow_file_are_not_followed(tmp_path: Path) -> None:
    path = save(pa.table({"x": ["text"] * 4}), tmp_path / "a.arrow")
    content = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12, 16))
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + (2**30).to_bytes(4, "little") + offsets[12:]))
    with pytest.raises(SparsortError, match="cannot be read as"):
        list(open_rows(path).rows())


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"x": 1}]).save_to_disk(str(folder))
    for content in ("{", "null", '{"_data_files": 1}', '{"_data_files": [{"filename": "none.arrow"}]}'):
        (folder / "state.json").write_text(content)
        with pytest.raises(SparsortError, match=r"cannot be read as a saved dataset.*Save it again"):
            open_rows(folder)


def test_a_row_group_is_never_held_as_a_whole(tmp_path: Path) -> None:
    """One row group of 24 MB that cannot be compressed, in pages of 256 KB."""
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    table = pa.table({"n": range(12_000), "text": [rng.bytes(1000).hex() for _ in range(12_000)]})
    pq.write_table(table, path, use_dictionary=False, compression="none", data_page_size=1 << 18)
    assert pq.read_metadata(path).num_row_groups == 1
    size = path.stat().st_size
    del table
    before, peak, read = pa.total_allocated_bytes(), 0, 0
    for number, row in enumerate(open_rows(path).rows()):
        read += len(row.fields["text"])
        if number % 100 == 0:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert read == 24_000_000
    assert 0 < peak < size / 2
