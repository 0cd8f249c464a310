"""`sparsort.storage.parquet_seal`: other readers see the same table, and no bit of the file can change unnoticed."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from sparsort.errors import SparsortError
from sparsort.storage.integrity import read_sealed, write_sealed
from sparsort.storage.parquet_seal import DamagedError, add_seal, read_seal

TABLE = pa.table({"id": [f"q{n}" for n in range(20)], "value": [n / 3 for n in range(20)]})
FACTS = {"index": 3, "digest": "ab", "text": "é\n"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, compression="zstd")
    add_seal(path, FACTS)
    return path


def test_the_facts_come_back_and_other_readers_see_no_difference(path: Path) -> None:
    assert read_seal(path) == FACTS
    assert pq.read_table(path).equals(TABLE)
    assert pyarrow.dataset.dataset(path).to_table().equals(TABLE)
    assert TABLE.equals(
        datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent)).data.table.combine_chunks()
    )
    import pandas

    assert pandas.read_parquet(path).equals(TABLE.to_pandas())


def test_every_flipped_bit_is_found(path: Path) -> None:
    """All bits where the seal and the footer are found, and one of each third byte elsewhere."""
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    begin = whole.index(b"sparsort{")
    marks = {*range(begin, begin + 9), *range(footer - 12, footer), *range(len(whole) - 8, len(whole))}
    for byte in sorted(marks | set(range(0, len(whole), 3))):
        for bit in range(8) if byte in marks else (byte % 8,):
            content = bytearray(whole)
            content[byte] ^= 1 << bit
            path.write_bytes(content)
            try:
                found = read_seal(path)
            except DamagedError:
                continue
            # Only a file that no longer ends as Parquet may seem to have no seal.
            assert found is None, (byte, bit)
            with pytest.raises((pa.ArrowException, OSError)):
                pq.read_table(path)


@pytest.mark.parametrize("length", [0, 3, 11, 12, 400, -30, -1])
def test_a_truncated_file_has_no_seal_and_is_no_parquet(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    assert read_seal(path) is None
    with pytest.raises((pa.ArrowException, OSError)):
        pq.read_table(path)


def test_files_of_others_have_no_seal(tmp_path: Path, path: Path) -> None:
    pq.write_table(pq.read_table(path), tmp_path / "b.parquet")
    assert read_seal(tmp_path / "b.parquet") is None
    (tmp_path / "c.parquet").write_text("no Parquet at all")
    assert read_seal(tmp_path / "c.parquet") is None
    with pytest.raises(DamagedError, match="does not end as a Parquet file"):
        add_seal(tmp_path / "c.parquet", {})


def test_sealed_json_comes_back_or_is_refused(tmp_path: Path) -> None:
    path, values = tmp_path / "a.json", {"version": 2, "list": [1, 2.5, None, "é"], "inner": {"b": 1, "a": True}}
    write_sealed(path, values)
    assert read_sealed(path, next_step="Again.") == values
    whole = path.read_bytes()
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
        try:
            found = read_sealed(path, next_step="Again.")
        except SparsortError:
            continue
        assert found == values, byte  # white space
    for text in ("[1]", '{"version": 2}', "{", ""):
        path.write_text(text)
        with pytest.raises(SparsortError, match="Again"):
            read_sealed(path, next_step="Again.")
