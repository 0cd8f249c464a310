"""The manifest of a folder: one sealed file, written last, that lists every other file with its size and digest.

Contract: a folder is intact if its manifest is intact and every listed file is unchanged. Files that are added later are not
damage. The listed files are on the disk (fsync) before the manifest is.

Cost: writing and checking each read every byte once, at about 1 GB/s per file, with up to eight files at a time.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError, first_line
from sparsort.storage import integrity
from sparsort.storage.files import sync

FILE = "sparsort-manifest.json"
FORMAT, VERSION = "sparsort-manifest", 1
# Threads are enough to read files in parallel, since reading and hashing release the interpreter lock.
_AT_ONCE = 8
_UNREADABLE_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError, OSError)


def write_manifest(folder: Path, *, skip: Collection[str] = ()) -> None:
    """Write the manifest of every file in a folder and its subfolders.

    Args:
        folder: a folder in which every process has written and closed its files.
        skip: names of files that are not listed because they may be removed later.

    Raises:
        SparsortError: a file cannot be read, or the manifest cannot be written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if not path.name.startswith((FILE, f".{FILE}.")) and path.name not in skip]
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            records = list(pool.map(_sync_and_record, paths))
        # A new file is only durable once the entry in its folder is on the disk too.
        for inner in {path.parent for path in paths}:
            sync(inner)
    except OSError as error:
        raise SparsortError(
            f"cannot write the manifest of {error.filename or folder}: {error.strerror or error}."
        ) from error
    files = {path.relative_to(folder).as_posix(): record for path, record in zip(paths, records, strict=True)}
    integrity.write_sealed(folder / FILE, {"format": FORMAT, "version": VERSION, "files": files})


def damage_in(folder: Path) -> str | None:
    """A description of the damage in a folder; None if it has a manifest and every listed file is intact."""
    try:
        manifest = integrity.parse_own_json((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {FILE}"
    except (OSError, ValueError) as error:
        return f"{FILE} cannot be read ({error})"
    format_version = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if format_version != (FORMAT, VERSION):
        return (
            f"{FILE} is version {format_version[1]!r} of {format_version[0]!r}, "
            f"and this sparsort reads version {VERSION} of {FORMAT!r}"
        )
    if not integrity.is_sealed(manifest):
        return f"the content of {FILE} has changed since it was written"
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        listed = manifest.get("files")
        if not isinstance(listed, dict) or not all(isinstance(record, dict) for record in listed.values()):
            return f"{FILE} does not list files"
        problems = pool.map(lambda item: _damage(folder, *item), listed.items())
        return next(filter(None, problems), None)


def unreadable_in(folder: Path) -> str | None:
    """A description of the damage that can be detected in a folder without a manifest; None if none is.

    JSON must parse, the header of a safetensors file must fit its size, and each record in a file of torch.save must
    match its CRC.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if problem := _unreadable(path):
            return f"{path.relative_to(folder)} cannot be read ({problem})"
    return None


def _unreadable(path: Path) -> str | None:
    if path.suffix == ".json":
        try:
            integrity.parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return first_line(error)
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            # Opening the file parses its header and checks the offsets against the size.
            with safe_open(str(path), framework="numpy"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            return first_line(error)
    elif path.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(path) as records:
                broken = records.testzip()
        except _UNREADABLE_ZIP as error:
            return first_line(error)
        return broken and f"the record {broken} has changed"
    return None


def _damage(folder: Path, name: str, record: dict[str, Any]) -> str | None:
    try:
        problem = integrity.damage(folder / name, record)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return problem and f"{name} is not as it was written: {problem}"


def _sync_and_record(path: Path) -> dict[str, Any]:
    # The file must be on the disk before a manifest says that it is complete.
    sync(path)
    return integrity.record_of(path)
