"""The folder of a plan: one `.npy` file per array, which is memory-mapped, and `plan.json`, which is written last.

Contract: each file is whole or absent, and a folder without `plan.json` is not a plan, whatever it contains. `plan.json` contains
a digest of itself and records every array with its size and digest (version 2). The whole plan is checked before any of its
values is used, which reads its arrays once, at about one second per gigabyte. A process that maps a checked plan again, such as
a worker, skips the check.

Version 1 did not record digests of arrays. Its `fingerprint` is a digest of the settings and of every array, so the check
computes it again and compares. (Sorting again would not do: the order came from float64 difficulties, and the folder stores
float32.) Saving the same plan into such a folder adds the digests after that check has passed. Reading never writes.
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

from sparsort.curriculum.loading.loader.verification import CONTENT, IDS, NAME, noted_for_other_rows
from sparsort.errors import SparsortError
from sparsort.storage import integrity
from sparsort.storage.files import write_atomically
from sparsort.terminal.interrupts import held

FORMAT = "sparsort-curriculum"
VERSION = 2
_WITHOUT_DIGESTS = 1  # still read
_FILE = "plan.json"
AGAIN = "Delete {} and make the plan again with the command that made it, such as sparsort plan."
_NOTE_TYPES: dict[str, type] = {
    **{NAME: str, IDS: dict, CONTENT: dict, "groups": list, "scores": dict, "revises": str},
    **dict.fromkeys(("unscored", "unused_scores", "cut", "below_batch"), int),
}
_AT_ONCE = 4  # threads that compute digests; hashing releases the GIL
_LOG = logging.getLogger("sparsort")
# The errors that NumPy raises for a damaged header, which it evaluates as a Python literal.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, tokenize.TokenError)

Arrays = Mapping[str, NDArray[Any]]


@held()
def write_plan(folder: Path, described: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a plan. If the folder already contains the same plan, only damaged files are written again.

    Raises:
        SparsortError: the folder contains another plan or other files, or the disk cannot be written.
    """
    if (folder / _FILE).exists():
        stored = read_description(folder)
        if stored["fingerprint"] != described["fingerprint"] or noted_for_other_rows(
            stored["notes"], described["notes"]
        ):
            raise SparsortError(f"{folder} already contains another plan. Choose another folder, or delete it.")
        try:
            read_plan(folder)
        except SparsortError as error:
            # If this plan is mapped from the same folder, its arrays in memory have the damage too.
            if fingerprint_of(described, arrays) != described["fingerprint"]:
                raise
            _LOG.warning("%s The plan is written again.", str(error).partition(". ")[0] + ".")
        else:
            # It is the same plan over the same rows, but this sparsort may note more about the rows than an older one did.
            # The round trip through JSON turns tuples into lists, like those in the stored notes.
            notes = json.loads(json.dumps({**stored["notes"], **described["notes"]}))
            is_old = stored["version"] == _WITHOUT_DIGESTS or notes != stored["notes"]
            if is_old and os.access(folder, os.W_OK):
                _write_description(folder, {**{name: stored[name] for name in described}, "notes": notes}, arrays)
            return
    elif folder.is_dir() and (
        others := sorted(path.name for path in folder.iterdir() if path.suffix not in (".npy", ".tmp"))
    ):
        raise SparsortError(
            f"{folder} contains other files, such as {others[0]}. A plan needs a folder of its own: choose a new one."
        )
    # The arrays come first and the description last. A kill in between leaves a folder that is not a plan.
    for name, array in arrays.items():
        with write_atomically(folder / f"{name}.npy") as temporary, temporary.open("wb") as handle:
            np.save(handle, array, allow_pickle=False)
    _write_description(folder, described, arrays)


def read_plan(folder: Path, *, check: bool = True) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what `write_plan` wrote, with the arrays memory-mapped.

    Args:
        folder: folder of the plan.
        check: compare every array with its digest; pass False only if this plan was checked before.

    Raises:
        SparsortError: the folder contains no plan, another version wrote it, or a file is missing or has changed.
    """
    described = read_description(folder)
    records = described.pop("arrays")
    has_digests = described["version"] != _WITHOUT_DIGESTS
    if has_digests and check:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda name: _check_array(folder, name, records[name]), records))
    kinds = {name: (record["dtype"], record["length"]) for name, record in records.items()} if has_digests else records
    arrays = {name: _map_array(folder / f"{name}.npy", *kind) for name, kind in kinds.items()}
    if check and not has_digests and fingerprint_of(described, arrays) != described["fingerprint"]:
        raise SparsortError(
            f"{folder} is damaged: its arrays have changed since they were written. {_next_step(folder)}"
        )
    del described["format"], described["version"], described[integrity.SEAL]
    return described, arrays


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON of a plan, after a check of its format, version and digest."""
    path = folder / _FILE
    try:
        description = integrity.parse_own_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SparsortError(
            f"{folder} contains no curriculum plan. Make one with: sparsort plan SCORES --out {folder}."
        ) from None
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {_next_step(folder)}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise SparsortError(f"{path} was not written by sparsort plan. {_next_step(folder)}")
    next_step = _next_step(folder)
    versions = (_WITHOUT_DIGESTS, VERSION)
    integrity.check_version(description.get("version"), versions, path, damaged=next_step, other=next_step)
    integrity.check_seal(description, path, next_step=next_step)
    with integrity.as_written(path, next_step=next_step):
        if not _is_possible(description):
            raise ValueError("its numbers cannot be those of a plan")
    return dict(description)


def fingerprint_of(described: Mapping[str, Any], arrays: Arrays) -> str:
    """A digest of everything that determines a batch: settings, edges, revision, names of groups, and every array.

    Args:
        described: `settings` as JSON values, `n_rows`, `stage_edges`, `revision` and `notes`.
        arrays: name → array.
    """
    digest = hashlib.blake2b(digest_size=16)
    settings = json.dumps(described["settings"], sort_keys=True)
    edges, revision = described["stage_edges"], described["revision"]
    digest.update(f"{settings}\n{described['n_rows']}\n{edges}\n{revision}".encode())
    # The numbers of groups have a meaning only together with their names.
    digest.update(json.dumps(described["notes"].get("groups")).encode())
    for name in sorted(arrays):
        # Name, type and shape separate the arrays, so bytes cannot move from one array to the next unnoticed.
        digest.update(f"\n{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B"))
    return digest.hexdigest()


def _write_description(folder: Path, described: Mapping[str, Any], arrays: Arrays) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        written = list(pool.map(lambda name: integrity.record_of(folder / f"{name}.npy"), arrays))
    records = {
        name: {"dtype": str(array.dtype), "length": len(array), **record}
        for (name, array), record in zip(arrays.items(), written, strict=True)
    }
    integrity.write_sealed(folder / _FILE, {"format": FORMAT, "version": VERSION, **described, "arrays": records})


def _next_step(folder: Path) -> str:
    return AGAIN.format(folder)


def _is_possible(description: Mapping[str, Any]) -> bool:
    """Whether a description has valid types and sizes. The digest cannot show that, since another program may have written it."""
    # A missing key raises KeyError, which `as_written` reports as damage.
    counts = [description[name] for name in ("n_rows", "smallest_batch")]
    edges, places = description["stage_edges"], description["stage_places"]
    revision = description["revision"]
    return (
        # `type(…) is int` instead of isinstance, because True is an int too.
        all(type(number) is int for number in (*counts, *edges, *places, *(revision or {}).values()))
        and description["n_rows"] >= 1
        and min(len(edges), len(places)) >= 2
        and all(list(numbers) == sorted(numbers) and numbers[0] == 0 for numbers in (edges, places))
        and all(isinstance(description[name], dict) for name in ("settings", "notes", "arrays"))
        and (revision is None or revision.keys() == {"number", "epoch", "start"})
        and isinstance(description["fingerprint"], str)
        and _are_possible_notes(description["notes"], description["settings"])
        and description["arrays"].keys() >= _required_arrays(description["settings"])
        and (description["settings"].get("mode") == "pool" or edges[-1] <= description["n_rows"])
    )


def _required_arrays(settings: Mapping[str, Any]) -> set[str]:
    """The names of the arrays that a plan with these settings always has."""
    required = {"difficulty"}
    is_packed = settings.get("packing", "none") != "none"
    is_cut = is_packed or settings.get("token_budget") is not None
    if is_cut or settings.get("group_by_length"):
        required.add("lengths")
    if is_cut and settings.get("mode") != "pool":
        required |= {"sequence", "batch_edges"}
        if is_packed:
            required.add("item_edges")
    elif settings.get("schedule") not in ("as_given", "shuffle"):
        required.add("order")
    if settings.get("pacing") is not None:
        required.add("available")
    if settings.get("quotas") is not None:
        required.add("group_edges")
    return required


def _are_possible_notes(notes: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the notes have the types that `plan_curriculum` and `verification` write, and name every group of the quotas."""
    noted = {name: value for name, value in notes.items() if value is not None}
    rows = [noted[kind] for kind in (IDS, CONTENT) if noted.get(kind)]
    fields = noted[CONTENT]["fields"] if noted.get(CONTENT) else None
    return (
        all(isinstance(noted[name], kind) for name, kind in _NOTE_TYPES.items() if name in noted)
        and (not noted.get(IDS) or isinstance(noted[IDS]["column"], str))
        and (fields is None or (isinstance(fields, list) and all(isinstance(field, str) for field in fields)))
        and all(isinstance(note["digest"], str) for note in rows)
        and all(place.isdecimal() and isinstance(text, str) for note in rows for place, text in note["sample"].items())
        and all(isinstance(name, str) for name in noted.get("groups", ()))
        and set(settings.get("quotas") or ()) <= set(noted.get("groups", ()))
        and all(isinstance(origin, dict) for origin in noted.get("scores", {}).values())
    )


def _check_array(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    integrity.check_file(folder / f"{name}.npy", record, next_step=_next_step(folder))


def _map_array(path: Path, dtype: str, length: int) -> NDArray[Any]:
    """Map a 1-D array of a known type and length read-only.

    Raises:
        SparsortError: the file is missing, or its array has another type or shape.
    """
    try:
        # NumPy cannot map an array without elements.
        array: NDArray[Any] = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except _UNREADABLE as error:
        raise SparsortError(f"{path} is missing or damaged ({error}). {_next_step(path.parent)}") from error
    if str(array.dtype) != dtype or array.shape != (length,):
        raise SparsortError(
            f"{path} is damaged: it has {array.dtype} of shape {array.shape}, and the plan expects {dtype} of ({length},). "
            f"{_next_step(path.parent)}"
        )
    return np.asarray(array)  # still mapped; slicing an np.memmap directly takes five times as long
