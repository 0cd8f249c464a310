"""The files of a score folder besides the shards: the manifest, and what the processes of an unfinished run share.

Contract: the manifest has the settings of a run and, once the run is finished, the list of its shards. `create_manifest` writes
it unless it exists, and of several processes that do so at the same time exactly one succeeds. `read_manifest` returns it
whole, or raises an error. Two manifests belong to the same run if everything in their provenance except `NOT_COMPARED` is
equal.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.storage.integrity import (
    check_seal,
    check_version,
    digest_of_values,
    parse_own_json,
    read_sealed,
    write_sealed,
)

MANIFEST = "manifest.json"
FORMAT = "sparsort-scores"
VERSION = 2
UNSEALED = 1
# Recorded, but not compared: the environment does not change a score, and the digests of the rows identify the source.
NOT_COMPARED = ("environment", "source")

# The folder inside a score folder that the processes of an unfinished run share: claims, logs, and the snapshot of the source.
WORKERS = "workers"
_SNAPSHOT = "rows.json"
_SHARD = re.compile(r"shard-(\d{5,})\.parquet")

_ABSENT = object()
_MAX_SHOWN = 160
_SHARD_KINDS: Mapping[str, type] = {"index": int, "file": str, "rows": int, "digest": str, "record": dict}


def as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as it will be read from the manifest; a `SparsortError` if a value is not a JSON value."""
    # JSON turns a tuple into a list, so the provenance is converted before it is compared.
    try:
        return dict(json.loads(json.dumps(dict(provenance), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise SparsortError(
            f"the scorer's provenance is not made of JSON values ({error}). This is a fault of the scorer."
        ) from error


def create_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest unless it exists. If several processes do so at the same time, exactly one of them creates it."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        _write_new(temporary, text)
        with contextlib.suppress(FileExistsError):
            try:
                # A rename would replace the manifest of another process. A link to an existing name fails. The folder is synced
                # when the first shard is written.
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:
                # The disk has no hard links. Opening the file exclusively also lets one process create it, but a process that is
                # killed here leaves an incomplete file, which `read_manifest` refuses.
                _write_new(path, text)
    finally:
        temporary.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as handle:
        try:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a score folder, finished or not.

    Raises:
        SparsortError: there is none, it is damaged, it has another version, or it is not the manifest of a score folder.
    """
    path = folder / MANIFEST
    again = f"Delete {folder} to score again, or choose another folder."
    try:
        manifest = parse_own_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SparsortError(
            f"{folder} is not a score folder: it has no {MANIFEST}. Make one with 'sparsort score FILE --out {folder}'."
        ) from error
    except (OSError, ValueError) as error:
        raise SparsortError(f"{path} cannot be read ({error}). {again}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SparsortError(f"{path} was not written by sparsort score. Choose another folder.")
    newer = "Update sparsort, or choose another folder."
    check_version(manifest.get("version"), (UNSEALED, VERSION), path, damaged=again, other=newer)
    if manifest["version"] == VERSION:
        check_seal(manifest, path, next_step=again)
    if not _is_whole(manifest):
        raise SparsortError(f"{path} lacks the settings of the run. {again}")
    return manifest


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has all keys, with values of the right types."""
    # The digest is not enough: version 1 has none, and any program can write one for other values.
    shards, numbers = manifest.get("shards", []), [manifest.get("shard_rows"), manifest.get("rows", 0)]
    # Version 1 need not list the rows and digests of its shards, which are checked one by one.
    kinds = {"index": int, "file": str} if manifest["version"] == UNSEALED else _SHARD_KINDS
    return (
        isinstance(manifest.get("provenance"), dict)
        and isinstance(manifest["provenance"].get("orientation", {}), dict)
        and all(type(number) is int and 0 <= number <= sys.maxsize for number in numbers)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) for shard in shards)
        and all(type(shard.get(name)) is kind for shard in shards for name, kind in kinds.items())
        # Only version 1 listed shards without their rows.
        and (
            "rows" not in kinds
            or "shards" not in manifest
            or sum(shard["rows"] for shard in shards) == manifest.get("rows")
        )
    )


def refuse_other_settings(folder: Path, existing: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise a `SparsortError` that names each setting in which two manifests differ."""
    before, after = ({"shard_rows": side["shard_rows"], **_compared(side["provenance"])} for side in (existing, new))
    keys = dict.fromkeys([*before, *after])
    changed = [
        f"{key}: {_value_text(before, key)} → {_value_text(after, key)}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if changed:
        raise SparsortError(
            f"{folder} contains scores made with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Choose another folder (--out), use the settings of the existing scores, or delete the folder to score again."
        )


def settings_digest(provenance: Mapping[str, Any], shard_rows: int) -> str:
    """The digest of everything in a manifest that can change a score."""
    return digest_of_values({"shard_rows": shard_rows, **_compared(provenance)})


def _compared(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_flat({key: value for key, value in provenance.items() if key not in NOT_COMPARED}))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings with names such as `outliers.n`, so that an error can name the exact difference."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _value_text(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key], ensure_ascii=False) if key in settings else "absent"
    # A fitted outlier rule is a list of hundreds of numbers.
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 20]}… ({len(text):,} characters)"


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards that have a file in a score folder, in ascending order."""
    with os.scandir(folder) as files:
        matches = [_SHARD.fullmatch(file.name) for file in files]
    return sorted(int(match[1]) for match in matches if match)


def has_shards(folder: Path) -> bool:
    """Whether at least one shard is in the folder."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as files:
        return any(_SHARD.fullmatch(file.name) for file in files)


def save_snapshot(folder: Path, snapshot: Mapping[str, Any]) -> None:
    """Store what is known of the source of a run; see `RowSource.snapshot`.

    A snapshot vouches for the rows of the shards that are scored after it, so a folder with shards keeps the one that it has.
    """
    if not has_shards(folder):
        write_sealed(folder / WORKERS / _SNAPSHOT, snapshot)


def load_snapshot(folder: Path) -> dict[str, Any] | None:
    """The snapshot of a run's source; None if there is none, or if it is damaged."""
    try:
        return read_sealed(folder / WORKERS / _SNAPSHOT, next_step="Delete it; it is made again.")
    except (FileNotFoundError, NotADirectoryError, SparsortError):
        return None
