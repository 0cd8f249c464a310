"""The folder of a plan: one `.npy` file an array, mapped and never loaded, and `plan.json`, written last.

Contract: each file is whole or absent, and a folder without `plan.json` is not a plan, whatever is in it. `plan.json` carries a
digest of itself and records every array with its size and digest (version 2). A plan is checked whole before any value of it is
used: one sequential read of its arrays, about a second for a gigabyte. Whoever maps a checked plan again, such as a worker
process, skips the check.

Version 1 recorded no digests of arrays. Its `fingerprint`, though, is a digest of the settings and of every array, so it is
computed again and compared. (The order alone could not be: it was sorted from float64 difficulties, and the folder keeps
float32.) Saving the same plan into such a folder adds the digests, once that check has passed. Reading never writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tokenize
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.loader.verification import noted_for_other_rows
from sparsort.errors import SparsortError
from sparsort.storage import integrity
from sparsort.storage.files import write_atomically
from sparsort.terminal.interrupts import held

FORMAT = "sparsort-curriculum"
VERSION = 2
_WITHOUT_DIGESTS = 1  # still read
_FILE = "plan.json"
AGAIN = "Delete {} and make the plan again with the command that made it, such as sparsort plan."
_AT_ONCE = 4  # files that are read for their digests; hashing lets other threads run
_LOG = logging.getLogger("sparsort")
# What NumPy raises for headers that it cannot read; it evaluates them as Python literals.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, tokenize.TokenError)

Arrays = Mapping[str, NDArray[Any]]


@held()
def write_plan(folder: Path, described: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a plan. The same plan is left as it is where it is there already; what is damaged of it is written again.

    Raises:
        SparsortError: the folder holds another plan, or the disk refuses.
    """
    if (folder / _FILE).exists():
        there = read_description(folder)
        if there["fingerprint"] != described["fingerprint"] or noted_for_other_rows(there["notes"], described["notes"]):
            raise SparsortError(f"{folder} already holds another plan. Choose another folder, or delete it.")
        try:
            read_plan(folder)
        except SparsortError as error:
            # A plan that is mapped from this very folder has the damage in memory.
            if fingerprint_of(described, arrays) != described["fingerprint"]:
                raise
            _LOG.warning("%s The plan is written again.", str(error).partition(". ")[0] + ".")
        else:
            # The same batches over the same rows, of which more may be known than an older sparsort noted.
            notes = json.loads(json.dumps({**there["notes"], **described["notes"]}))
            is_old = there["version"] == _WITHOUT_DIGESTS or notes != there["notes"]
            if is_old and os.access(folder, os.W_OK):
                _write_description(folder, {**{name: there[name] for name in described}, "notes": notes}, arrays)
            return
    elif folder.is_dir() and (
        others := sorted(path.name for path in folder.iterdir() if path.suffix not in (".npy", ".tmp"))
    ):
        raise SparsortError(
            f"{folder} holds other files, such as {others[0]}. A plan has a folder of its own: choose a new one."
        )
    for name, array in arrays.items():
        with write_atomically(folder / f"{name}.npy") as temporary, temporary.open("wb") as handle:
            np.save(handle, array, allow_pickle=False)
    _write_description(folder, described, arrays)


def read_plan(folder: Path, *, check: bool = True) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What `write_plan` was given, the arrays mapped.

    Args:
        folder: of the plan.
        check: compare every array with what was written; False only where this plan was checked before.

    Raises:
        SparsortError: no plan is there, another version wrote it, or a file is missing or has changed.
    """
    described = read_description(folder)
    records = described.pop("arrays")
    has_digests = described["version"] != _WITHOUT_DIGESTS
    if has_digests and check:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: _check_array(folder, name, records[name]), records))
    kinds = {name: (found["dtype"], found["length"]) for name, found in records.items()} if has_digests else records
    arrays = {name: _map_array(folder / f"{name}.npy", *kind) for name, kind in kinds.items()}
    if check and not has_digests and fingerprint_of(described, arrays) != described["fingerprint"]:
        raise SparsortError(f"{folder} is damaged: its arrays have changed since they were written. {_again(folder)}")
    del described["format"], described["version"], described[integrity.SEAL]
    return described, arrays


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON of a plan, checked for format, version and its own digest."""
    path = folder / _FILE
    try:
        found = integrity.parse_own_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SparsortError(
            f"{folder} holds no curriculum plan. Make one with: sparsort plan SCORES --out {folder}."
        ) from None
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {_again(folder)}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise SparsortError(f"{path} was not written by sparsort plan. {_again(folder)}")
    again = _again(folder)
    integrity.check_version(found.get("version"), (_WITHOUT_DIGESTS, VERSION), path, damaged=again, other=again)
    integrity.check_seal(found, path, next_step=_again(folder))
    with integrity.as_written(path, next_step=_again(folder)):
        if not _is_possible(found):
            raise ValueError("its numbers cannot be those of a plan")
    return dict(found)


def fingerprint_of(described: Mapping[str, Any], arrays: Arrays) -> str:
    """A digest of everything that decides a batch: settings, edges, revision, names of groups, and every array.

    Args:
        described: `settings` as JSON values, `n_rows`, `stage_edges`, `revision` and `notes`.
        arrays: by name.
    """
    found = hashlib.blake2b(digest_size=16)
    settings = json.dumps(described["settings"], sort_keys=True)
    edges, revision = described["stage_edges"], described["revision"]
    found.update(f"{settings}\n{described['n_rows']}\n{edges}\n{revision}".encode())
    found.update(json.dumps(described["notes"].get("groups")).encode())
    for name in sorted(arrays):
        found.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        found.update(np.ascontiguousarray(arrays[name]).data.cast("B"))
    return found.hexdigest()


def _write_description(folder: Path, described: Mapping[str, Any], arrays: Arrays) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        written = list(pool.map(lambda name: integrity.record_of(folder / f"{name}.npy"), arrays))
    records = {
        name: {"dtype": str(array.dtype), "length": len(array), **record}
        for (name, array), record in zip(arrays.items(), written, strict=True)
    }
    integrity.write_sealed(folder / _FILE, {"format": FORMAT, "version": VERSION, **described, "arrays": records})


def _again(folder: Path) -> str:
    return AGAIN.format(folder)


def _is_possible(found: Mapping[str, Any]) -> bool:
    """Whether a description has the types and sizes of one: a digest does not say who wrote the values."""
    counts = [found[name] for name in ("n_rows", "smallest_batch")]
    edges, places = found["stage_edges"], found["stage_places"]
    revision = found["revision"]
    return (
        all(type(number) is int for number in (*counts, *edges, *places, *(revision or {}).values()))
        and found["n_rows"] >= 1
        and min(len(edges), len(places)) >= 2
        and all(list(numbers) == sorted(numbers) and numbers[0] == 0 for numbers in (edges, places))
        and all(isinstance(found[name], dict) for name in ("settings", "notes", "arrays"))
        and (revision is None or revision.keys() == {"number", "epoch", "start"})
        and isinstance(found["fingerprint"], str)
        and (found["settings"].get("mode") == "pool" or edges[-1] <= found["n_rows"])
    )


def _check_array(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    integrity.check_file(folder / f"{name}.npy", record, next_step=_again(folder))


def _map_array(path: Path, dtype: str, length: int) -> NDArray[Any]:
    """A 1-D array of a known type and length, mapped read-only.

    Raises:
        SparsortError: it is missing or is another array.
    """
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except _UNREADABLE as error:
        raise SparsortError(f"{path} is missing or damaged ({error}). {_again(path.parent)}") from error
    if str(found.dtype) != dtype or found.shape != (length,):
        raise SparsortError(
            f"{path} is damaged: it holds {found.dtype} of shape {found.shape}, and the plan says {dtype} of ({length},). "
            f"{_again(path.parent)}"
        )
    return np.asarray(found)  # still mapped; slicing an np.memmap itself takes five times as long
