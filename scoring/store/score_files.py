"""Scores as one file or one `datasets.Dataset`, written with a digest that is checked when they are read.

Contract: a Parquet file contains a seal (`parquet_seal`) and, in the metadata of its schema, the provenance. Next to a JSONL file
there is `NAME.provenance.json`, written last, with the size and digest of the rows. Files without digests, from earlier versions
or from other programs, are checked for consistency (`score_tables.find_problem`).

`datasets` writes a `Dataset` to disk, possibly after `map` or `select` changed it. Its description contains the provenance and a
digest of the table, and its fingerprint contains the same digest. While the two agree, the table must have this digest. After
`map` or `select`, the fingerprint is another one, and only the provenance can be checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsort.errors import SparsortError, first_line
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.store.score_tables import find_other_difficulty, find_problem
from sparsort.scoring.store.shard_files import UNREADABLE
from sparsort.storage.files import write_atomically
from sparsort.storage.integrity import check_file, is_sealed, parse_json, record_of, seal, write_sealed
from sparsort.storage.parquet_seal import add_seal, read_seal
from sparsort.terminal.interrupts import held

if TYPE_CHECKING:
    import datasets

_VERSION = 2
_METADATA = b"sparsort"
_AGAIN = "Copy it again, or score again (sparsort score)."
_FINGERPRINT = "sparsort-"


def write_parquet(table: pa.Table, provenance: Mapping[str, Any], path: Path) -> None:
    """Write one Parquet file, atomically; a `SparsortError` if the disk cannot be written."""
    metadata = {_METADATA: json.dumps(provenance, ensure_ascii=False).encode()}
    with write_atomically(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", write_page_checksum=True)
        add_seal(temporary, {"version": _VERSION, "rows": table.num_rows})


def read_parquet(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table of scores and its provenance; a `SparsortError` if the file is missing, damaged, or not Parquet."""
    try:
        is_whole = read_seal(path) is not None
        table = pq.read_table(path, partitioning=None)
        table.validate(full=True)
    except SparsortError as error:
        raise SparsortError(f"{error} {_AGAIN}") from error
    except UNREADABLE as error:
        raise SparsortError(f"{path} cannot be read as Parquet: {first_line(error).rstrip('.')}.") from error
    stored = (table.schema.metadata or {}).get(_METADATA)
    table = table.replace_schema_metadata(None)
    if stored is None:
        return table, unknown_origin(f"{path.name}, a Parquet file without provenance")
    provenance = _parse(stored, path)
    if not is_whole:
        refuse_implausible(table, provenance, path)
    return table, provenance


@held()
def write_jsonl(table: pa.Table, provenance: Mapping[str, Any], path: Path) -> None:
    """Write one JSON object per row, then the provenance in a file next to it. NaN is written as null, infinities as text."""
    with write_atomically(path) as temporary:
        with temporary.open("w", encoding="utf-8") as handle:
            for batch in table.to_batches(max_chunksize=1024):
                for row in batch.to_pylist():
                    row = {name: _to_json(value) for name, value in row.items()}
                    handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        record = record_of(temporary)
    write_sealed(provenance_file(path), {"version": _VERSION, "rows": record, "provenance": dict(provenance)})


def read_jsonl(path: Path) -> tuple[list[Mapping[str, Any]], dict[str, Any], bool]:
    """Read the rows, their provenance, and whether a digest shows that the rows are those that were written.

    Raises:
        SparsortError: the rows or the provenance are damaged, or they do not belong together.
    """
    file, is_whole = provenance_file(path), False
    try:
        provenance = _parse(file.read_bytes(), file)
    except FileNotFoundError:
        provenance = unknown_origin(f"{path.name} without {file.name}")
    except OSError as error:
        raise SparsortError(f"cannot read {file}: {error.strerror or error}.") from error
    # Provenance of version 0.1, without digests, has neither of these keys. One key is enough to tell, because a flipped bit
    # can change only one of them.
    if {"rows", "provenance"} & provenance.keys():
        if not is_sealed(provenance):
            raise SparsortError(f"{file} is damaged: its content has changed since it was written. {_AGAIN}")
        step = f"If you changed the rows on purpose, delete {file.name}: they are then read as rows of unknown origin."
        check_file(path, provenance["rows"], next_step=f"{_AGAIN} {step}")
        provenance, is_whole = _as_provenance(provenance["provenance"], file), True
    return [row.fields for row in open_rows(path).rows()], provenance, is_whole


def refuse_implausible(table: pa.Table, provenance: Mapping[str, Any], path: Path) -> None:
    """Raise a `SparsortError` for a table without a digest that sparsort cannot have written with this provenance."""
    if problem := find_problem(table, provenance) or find_other_difficulty(table, provenance):
        raise SparsortError(f"{path} is damaged: {problem}. {_AGAIN}")


def to_dataset(table: pa.Table, provenance: Mapping[str, Any]) -> datasets.Dataset:
    """Convert the table to a `datasets.Dataset`."""
    import datasets

    digest = table_digest(table)
    sealed = seal({"version": _VERSION, "table": digest, "provenance": dict(provenance)})
    info = datasets.DatasetInfo(description=json.dumps({"sparsort": sealed}, ensure_ascii=False))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint=f"{_FINGERPRINT}{digest}")


def from_dataset(
    dataset: datasets.Dataset, *, name: str = "the dataset", fingerprint: str | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the provenance of a dataset that `to_dataset` returned, also after `map`, `select` or `save_to_disk`.

    Args:
        dataset: the dataset.
        name: the name of the dataset in error messages.
        fingerprint: the fingerprint that it was saved with, because loading changes it; None for the current one.

    Raises:
        SparsortError: the provenance is damaged, or the table is damaged and was not changed by `datasets`.
    """
    table = dataset.with_format("arrow")[:]
    try:
        record = parse_json(dataset.info.description)["sparsort"]
    except (ValueError, KeyError, TypeError):
        record = None
    full_fingerprint = fingerprint or str(dataset._fingerprint)
    digest = full_fingerprint.removeprefix(_FINGERPRINT)
    # The prefix is there as long as neither `map` nor `select` has changed the dataset.
    is_unchanged = digest != full_fingerprint
    if record is None and not is_unchanged:
        return table, unknown_origin("a dataset whose description has no provenance")
    # In version 0.1, without digests, the record was the provenance itself.
    if isinstance(record, dict) and not {"table", "provenance"} & record.keys() and not is_unchanged:
        return table, _as_provenance(record, name)
    if not isinstance(record, dict) or not is_sealed(record):
        raise SparsortError(f"{name} is damaged: its description has changed since it was written. {_AGAIN}")
    if is_unchanged and not digest == record.get("table") == table_digest(table):
        raise SparsortError(f"{name} is damaged: its rows have changed since they were written. {_AGAIN}")
    return table, _as_provenance(record.get("provenance"), name)


def load_dataset(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read a dataset of scores that `save_to_disk` wrote; a `SparsortError` if it is damaged or does not contain scores."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, datasets.Dataset):
            raise SparsortError(f"{folder} contains several datasets. Load one of its folders.")
        loaded.data.table.validate(full=True)
        state = parse_json((folder / "state.json").read_bytes())
        return from_dataset(loaded, name=str(folder), fingerprint=str(state["_fingerprint"]))
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
        raise SparsortError(
            f"{folder} cannot be read as a dataset of scores: {first_line(error).rstrip('.')}. {_AGAIN}"
        ) from error


def table_digest(table: pa.Table) -> str:
    """A 128-bit hash of the names and values of a table, as hexadecimal digits. It does not depend on the chunks."""
    state = hashlib.blake2b(digest_size=16)
    for field, column in zip(table.schema, table.columns, strict=True):
        state.update(f"{field.name!r} {len(column)} {column.null_count}".encode())
        for chunk in column.chunks:
            if pa.types.is_floating(field.type):
                state.update(chunk.to_numpy(zero_copy_only=False).astype("<f8").tobytes())
            else:
                state.update("".join(f"{value!r}," for value in chunk.to_pylist()).encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def provenance_file(path: Path) -> Path:
    """The file with the provenance of a JSONL file."""
    return path.with_name(f"{path.stem}.provenance.json")


def unknown_origin(source: str) -> dict[str, Any]:
    """The provenance of numbers without provenance."""
    return {"scorer": "unknown", "note": f"read from {source}; how these numbers were made is not known"}


def from_json(value: Any) -> float:
    """Convert a number that `write_jsonl` wrote."""
    return math.nan if value is None else float(value)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        provenance = parse_json(text)
    except ValueError as error:
        raise SparsortError(f"the provenance in {path} cannot be read ({error}). {_AGAIN}") from error
    return _as_provenance(provenance, path)


def _as_provenance(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("orientation", {}), dict):
        raise SparsortError(f"the provenance in {where} was not written by sparsort. {_AGAIN}")
    return value


def _to_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)
