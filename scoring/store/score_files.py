"""Scores as one file or one `datasets.Dataset`: written with a digest, and checked against it when they are read.

Contract: a Parquet file carries a seal (`parquet_seal`) and, in the metadata of its schema, the provenance. JSONL has
`NAME.provenance.json` next to it, written last, with the size and digest of the rows. Files that were written before there were
digests, or that another program wrote from ours, are checked against what they imply (`unsealed`).

A `Dataset` is written to disk by `datasets`, and `map` or `select` may change it before that. Its description carries the
provenance with a digest of the table, and its fingerprint that digest: while the two agree the table has to have it. Once
`map` or `select` gave it another fingerprint, only the provenance can be checked.
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

from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.store.unsealed import UNREADABLE, find_other_difficulty, find_problem
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
    """Write one Parquet file, atomically.

    Raises:
        SparsortError: the disk refuses.
    """
    metadata = {_METADATA: json.dumps(provenance, ensure_ascii=False).encode()}
    with write_atomically(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", write_page_checksum=True)
        add_seal(temporary, {"version": _VERSION, "rows": table.num_rows})


def read_parquet(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A table of scores and its provenance.

    Raises:
        SparsortError: the file is missing, damaged, or not Parquet.
    """
    try:
        is_whole = read_seal(path) is not None
        table = pq.read_table(path, partitioning=None)
        table.validate(full=True)
    except SparsortError as error:
        raise SparsortError(f"{error} {_AGAIN}") from error
    except UNREADABLE as error:
        raise SparsortError(f"{path} cannot be read as Parquet: {_first_line(error)}.") from error
    kept = (table.schema.metadata or {}).get(_METADATA)
    table = table.replace_schema_metadata(None)
    if kept is None:
        return table, unknown_origin(f"{path.name}, a Parquet file that holds no provenance")
    provenance = _parse(kept, path)
    if not is_whole:
        refuse_implausible(table, provenance, path)
    return table, provenance


@held()
def write_jsonl(table: pa.Table, provenance: Mapping[str, Any], path: Path) -> None:
    """Write one JSON object a row, then the provenance next to it. NaN is null, an infinity is a text.

    Raises:
        SparsortError: the disk refuses.
    """
    with write_atomically(path) as temporary:
        with temporary.open("w", encoding="utf-8") as handle:
            for batch in table.to_batches(max_chunksize=1024):
                for row in batch.to_pylist():
                    row = {name: _to_json(value) for name, value in row.items()}
                    handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        record = record_of(temporary)
    write_sealed(provenance_file(path), {"version": _VERSION, "rows": record, "provenance": dict(provenance)})


def read_jsonl(path: Path) -> tuple[list[Mapping[str, Any]], dict[str, Any], bool]:
    """The rows, their provenance, and whether they are known to be those that were written.

    Raises:
        SparsortError: the rows or the provenance are damaged, or they do not belong together.
    """
    kept, is_whole = provenance_file(path), False
    try:
        found = _parse(kept.read_bytes(), kept)
    except FileNotFoundError:
        found = unknown_origin(f"{path.name} without {kept.name}")
    except OSError as error:
        raise SparsortError(f"cannot read {kept}: {error.strerror or error}.") from error
    # Provenance of before there were digests has neither name; one flipped bit leaves the other.
    if {"rows", "provenance"} & found.keys():
        if not is_sealed(found):
            raise SparsortError(f"{kept} is damaged: its content has changed since it was written. {_AGAIN}")
        step = f"If you changed the rows on purpose, delete {kept.name}: they are then read as rows of unknown origin."
        check_file(path, found["rows"], next_step=f"{_AGAIN} {step}")
        found, is_whole = _as_provenance(found["provenance"], kept), True
    return [row.fields for row in open_rows(path).rows()], found, is_whole


def refuse_implausible(table: pa.Table, provenance: Mapping[str, Any], path: Path) -> None:
    """Refuse a table without a digest that sparsort cannot have written with this provenance.

    Raises:
        SparsortError: they contradict each other.
    """
    if problem := find_problem(table, provenance) or find_other_difficulty(table, provenance):
        raise SparsortError(f"{path} is damaged: {problem}. {_AGAIN}")


def to_dataset(table: pa.Table, provenance: Mapping[str, Any]) -> datasets.Dataset:
    """A `datasets.Dataset` of the table."""
    import datasets

    digest = table_digest(table)
    sealed = seal({"version": _VERSION, "table": digest, "provenance": dict(provenance)})
    info = datasets.DatasetInfo(description=json.dumps({"sparsort": sealed}, ensure_ascii=False))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint=f"{_FINGERPRINT}{digest}")


def from_dataset(
    dataset: datasets.Dataset, *, name: str = "the dataset", fingerprint: str | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the provenance of what `to_dataset` gave, also after `map`, `select` or `save_to_disk`.

    Args:
        dataset: the dataset.
        name: what errors call it.
        fingerprint: the one that it was saved with, since loading gives it another; None for its own.

    Raises:
        SparsortError: the provenance is damaged, or the table is although it was not changed by `datasets`.
    """
    table = dataset.with_format("arrow")[:]
    try:
        found = parse_json(dataset.info.description)["sparsort"]
    except (ValueError, KeyError, TypeError):
        found = None
    given = fingerprint or str(dataset._fingerprint)
    unchanged = given.removeprefix(_FINGERPRINT)
    is_ours = unchanged != given
    if found is None and not is_ours:
        return table, unknown_origin("a dataset whose description holds no provenance")
    # Before there were digests, the provenance itself was kept under this name.
    if isinstance(found, dict) and not {"table", "provenance"} & found.keys() and not is_ours:
        return table, _as_provenance(found, name)
    if not isinstance(found, dict) or not is_sealed(found):
        raise SparsortError(f"{name} is damaged: its description has changed since it was written. {_AGAIN}")
    if is_ours and not unchanged == found.get("table") == table_digest(table):
        raise SparsortError(f"{name} is damaged: its rows have changed since they were written. {_AGAIN}")
    return table, _as_provenance(found.get("provenance"), name)


def load_dataset(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the provenance of a dataset of scores that `save_to_disk` wrote.

    Raises:
        SparsortError: it is damaged, or it is not a dataset of scores.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, datasets.Dataset):
            raise SparsortError(f"{folder} holds several datasets. Load one of its folders.")
        loaded.data.table.validate(full=True)
        state = parse_json((folder / "state.json").read_bytes())
        return from_dataset(loaded, name=str(folder), fingerprint=str(state["_fingerprint"]))
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
        raise SparsortError(
            f"{folder} cannot be read as a dataset of scores: {_first_line(error)}. {_AGAIN}"
        ) from error


def table_digest(table: pa.Table) -> str:
    """128 bits over the names and values of a table, as hexadecimal digits; NaN is one value."""
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
    """Where the provenance of a JSONL file is kept."""
    return path.with_name(f"{path.stem}.provenance.json")


def unknown_origin(what: str) -> dict[str, Any]:
    """The provenance of numbers that came without one."""
    return {"scorer": "unknown", "note": f"read from {what}; how these numbers were made is not known"}


def from_json(value: Any) -> float:
    """A number as `write_jsonl` wrote it."""
    return math.nan if value is None else float(value)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise SparsortError(f"the provenance in {path} cannot be read ({error}). {_AGAIN}") from error
    return _as_provenance(found, path)


def _as_provenance(found: Any, where: object) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("orientation", {}), dict):
        raise SparsortError(f"the provenance in {where} is not what sparsort writes. {_AGAIN}")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _to_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)
