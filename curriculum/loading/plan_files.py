"""The folder of a plan: `plan.json`, written last, and one `.npy` file an array, mapped and never loaded.

Contract: each file is whole or absent. A folder without `plan.json` is no plan, whatever lies in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.verification import noted_for_other_rows
from sparsort.errors import SparsortError
from sparsort.files import write_atomically, write_json

FORMAT = "sparsort-curriculum"
VERSION = 1
_FILE = "plan.json"


def write_plan(folder: Path, described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a plan, or leave the same one as it is.

    Raises:
        SparsortError: the folder holds another plan, or the disk refuses.
    """
    shapes = {name: [str(array.dtype), len(array)] for name, array in arrays.items()}
    whole: dict[str, Any] = {"format": FORMAT, "version": VERSION, **described, "arrays": shapes}
    if (folder / _FILE).exists():
        there = read_description(folder)
        if there["fingerprint"] != described["fingerprint"] or noted_for_other_rows(there["notes"], described["notes"]):
            raise SparsortError(f"{folder} already holds another plan. Choose another folder, or delete it.")
        # The same batches over the same rows, of which more may be known than an older sparsort noted.
        whole["notes"] = {**there["notes"], **described["notes"]}
        if json.loads(json.dumps(whole["notes"])) != there["notes"] and os.access(folder, os.W_OK):
            write_json(folder / _FILE, {**whole, "digest": _digest(whole)})
        return
    if folder.is_dir() and (
        others := sorted(path.name for path in folder.iterdir() if path.suffix not in (".npy", ".tmp"))
    ):
        raise SparsortError(
            f"{folder} holds other files, such as {others[0]}. A plan has a folder of its own: choose a new one."
        )
    for name, array in arrays.items():
        _write_array(folder / f"{name}.npy", array)
    write_json(folder / _FILE, {**whole, "digest": _digest(whole)})


def read_plan(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What `write_plan` was given, the arrays mapped.

    Raises:
        SparsortError: no plan is there, another version wrote it, or a file is missing or has another length.
    """
    found = read_description(folder)
    arrays = {name: _map_array(folder / f"{name}.npy", *shape) for name, shape in found.pop("arrays").items()}
    del found["format"], found["version"], found["digest"]
    return found, arrays


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON of a plan, checked for format and version."""
    path = folder / _FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SparsortError(
            f"{folder} holds no curriculum plan. Make one with: sparsort plan SCORES --out {folder}."
        ) from None
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). Make the plan again with sparsort plan.") from error
    given = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
    if given != (FORMAT, VERSION):
        raise SparsortError(
            f"{path} is version {given[1]!r} of {given[0]!r}, and this sparsort reads version {VERSION} of {FORMAT!r}. "
            "Make the plan again with sparsort plan."
        )
    if found.get("digest") != _digest({name: value for name, value in found.items() if name != "digest"}):
        raise SparsortError(f"{path} was changed after it was written. Make the plan again with sparsort plan.")
    return dict(found)


def _digest(described: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_array(path: Path, array: NDArray[Any]) -> None:
    """One array as .npy, whole or not at all."""
    with write_atomically(path) as temporary, temporary.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)


def _map_array(path: Path, dtype: str, length: int) -> NDArray[Any]:
    """A 1-D array of a known type and length, mapped read-only.

    Raises:
        SparsortError: it is missing or is another array.
    """
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SparsortError(
            f"{path} is missing or damaged ({error}). Make the plan again with sparsort plan."
        ) from error
    if str(found.dtype) != dtype or found.shape != (length,):
        raise SparsortError(
            f"{path} holds {found.dtype} of shape {found.shape}, and the plan says {dtype} of ({length},). "
            "Make the plan again with sparsort plan."
        )
    return np.asarray(found)  # still mapped; slicing an np.memmap itself takes five times as long
