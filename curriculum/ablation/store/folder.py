"""The folder of a store: its manifest, file names for arbitrary names, and the handling of damaged files.

Contract: whatever is created here is on the disk when the call returns. If several processes create the same store at once, one
creates it and the others open it. The only files that are ever deleted are temporary ones that no process can still be writing.

The manifest and the notes of version 2 contain digests of themselves. In a store of version 1 a note may have none, and the
manifest is protected by the blocks, which contain its digest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sparsort.errors import SparsortError
from sparsort.storage.files import disk_error, sync
from sparsort.storage.integrity import check_seal, check_version, is_sealed, parse_own_json, seal, write_sealed
from sparsort.storage.locks import locked

MANIFEST = "store.json"
FORMAT = "sparsort-outcomes"
VERSION = 2
_UNSEALED = 1
LOCK = ".lock"

_LOG = logging.getLogger("sparsort")
_TEMPORARY = re.compile(r"\..+\.\d+(?:\.[0-9a-f]{32})?\.tmp")
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
# A write takes less than a second, so a temporary file of this age was abandoned.
_STALE_S = 3600.0
# File systems allow 255 bytes; this leaves room for the affixes of notes and temporary files.
_LONGEST_NAME = 200


def file_name(name: str, kind: str) -> str:
    """A unique file name for `name` on any file system: lower case, with `+` for `/` and `%xx` for other bytes."""
    # Capital letters are escaped too, because some file systems ignore case.
    parts = ("+" if c == "/" else c if c in _SAFE else "".join(f"%{b:02x}" for b in c.encode()) for c in name)
    try:
        escaped = "".join(parts)
    except UnicodeEncodeError as error:
        raise SparsortError(f"the {kind} name {name!r} is not valid Unicode.") from error
    # A leading dot would hide the file, or make "." and ".." out of a name.
    if escaped.startswith("."):
        escaped = f"%2e{escaped[1:]}"
    if not 0 < len(escaped) <= _LONGEST_NAME:
        raise SparsortError(
            f"the {kind} name {name!r} takes {len(escaped)} bytes as a file name; expected 1 to {_LONGEST_NAME}. "
            "Lower-case letters, digits, '-', '_', '.' and '/' take one each, other characters three or more."
        )
    return escaped


def name_of_file(name: str) -> str:
    """The inverse of `file_name`."""
    return unquote(name.replace("+", "/"), errors="replace")


def as_json(value: Any, noun: str) -> Any:
    """The value after a round trip through JSON, which turns tuples into lists. `noun` names it in the error.

    Raises:
        SparsortError: JSON cannot represent the value, for example NaN or an object.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SparsortError(f"{noun} is not made of JSON values ({error}).") from error


def listed(folder: Path) -> list[str]:
    """The names in a folder, in any order; [] if there is no folder."""
    try:
        return os.listdir(folder)  # noqa: PTH208 (names are enough; a folder may have thousands)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise cannot_read(folder, error) from error


def cannot_read(path: Path, error: OSError) -> SparsortError:
    """The error for users when the disk fails to read `path`."""
    return SparsortError(f"cannot read {path}: {error.strerror or error}.")


def set_aside(path: Path, noun: str, reason: str) -> None:
    """Rename a damaged file, so that it is not read again and not lost. `noun` names its content in the warning."""
    aside = path.with_name(f"{path.name}.broken")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # Another process has set it aside.
    except OSError as failure:
        _LOG.warning(
            "%s: %s is damaged (%s) and ignored; renaming it failed: %s.", path, noun, reason, failure.strerror
        )
        return
    _LOG.warning("%s: %s is damaged (%s); set aside as %s, to be computed again.", path, noun, reason, aside.name)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and sync each new entry to the disk."""
    try:
        if folder.is_dir():
            return
        # `mkdir(parents=True)` would not sync the entries of the parents, which a power cut could then lose.
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from error


def clear_stale(folder: Path) -> None:
    """Delete the temporary files of killed writers, but none that may still be written."""
    for name in filter(_TEMPORARY.fullmatch, listed(folder)):
        with contextlib.suppress(OSError):
            if (folder / name).stat().st_mtime < time.time() - _STALE_S:
                (folder / name).unlink()


def open_manifest(folder: Path, identity: Mapping[str, Any], feature_names: Sequence[str]) -> dict[str, Any]:
    """Create a store in `folder` or open the existing one, and return its manifest.

    Raises:
        SparsortError: the store has another identity, the folder contains something else, or it cannot be written.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "identity": as_json(dict(identity), "the store's identity"),
        "feature_names": as_json(list(feature_names), "feature_names"),
    }
    if MANIFEST not in listed(folder):
        _create(folder, manifest)
    # Read it even if this process tried to create it, because another process may have been faster.
    existing = read_manifest(folder)
    _refuse_another(folder, existing, manifest)
    return existing


def recorded_identity(folder: Path) -> dict[str, Any]:
    """The identity of the store in `folder`; empty if there is no store.

    Raises:
        SparsortError: its manifest cannot be read.
    """
    return dict(read_manifest(folder)["identity"]) if MANIFEST in listed(folder) else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in `folder`, with its `identity` and `feature_names`.

    Raises:
        SparsortError: there is none, it is damaged, or its version is unknown.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_own_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SparsortError(
            f"{folder} is no result store: it has no {MANIFEST}. Make one with sparsort ablate."
        ) from error
    except ValueError as error:
        raise SparsortError(f"{path} cannot be read ({error}). Delete {folder}, or choose another folder.") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SparsortError(f"{path} was not written by sparsort ablate. Choose another folder.")
    newer = "Update sparsort, or choose another folder."
    check_version(manifest.get("version"), (_UNSEALED, VERSION), path, damaged=_RESTORE, other=newer)
    if manifest["version"] == VERSION:
        check_seal(manifest, path, next_step=_RESTORE)
    if not isinstance(manifest.get("identity"), dict) or not isinstance(manifest.get("feature_names"), list):
        raise SparsortError(f"{path} lacks what its outcomes depend on. Delete {folder}, or choose another folder.")
    return manifest


def sealed_note(group: str, name: str, value: Any) -> dict[str, Any]:
    """A note as it is written: with a digest, and with its group and name, so that a misplaced file is detected."""
    return seal({"group": group, "name": name, "note": value})


def open_note(content: Any, group: str, name: str, *, must_be_sealed: bool) -> Any:
    """The value in a note.

    Args:
        content: the JSON in the file.
        group, name: the place of the file.
        must_be_sealed: False for a store of version 1, whose notes may be bare values.

    Raises:
        ValueError: the note is damaged, or was written for another place.
    """
    # One flipped bit changes at most one key, so a sealed note never looks like a bare one.
    is_bare = not isinstance(content, dict) or len(_NOTE_KEYS & content.keys()) < 2
    if is_bare and not must_be_sealed:
        return content
    if is_bare or not is_sealed(content) or (content.get("group"), content.get("name")) != (group, name):
        raise ValueError("its content has changed since it was written")
    return content.get("note")


def _create(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Create a store, unless another process does so first."""
    # Another process may be creating the store at this moment, so its lock and temporary files are accepted.
    names = sorted(name for name in listed(folder) if name != LOCK and not _TEMPORARY.fullmatch(name))
    if names and not (folder / MANIFEST).exists():
        contents = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise SparsortError(
            f"{folder} is no result store: it contains {contents}, but no {MANIFEST}. Choose a new folder."
        )
    make_folder(folder)
    with locked(folder / LOCK, wait=True):
        if not (folder / MANIFEST).exists():
            write_sealed(folder / MANIFEST, manifest)


def _refuse_another(folder: Path, existing: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise an error that lists the differences, if the store was created for another model or engine."""
    before, after = ({**side["identity"], "feature_names": side["feature_names"]} for side in (existing, requested))

    def text_of(side: Mapping[str, Any], key: str) -> str:
        return json.dumps(side[key], ensure_ascii=False, sort_keys=True) if key in side else "absent"

    lines = [(key, text_of(before, key), text_of(after, key)) for key in dict.fromkeys([*before, *after])]
    if changed := [f"{key}: {old} → {new}" for key, old, new in lines if old != new]:
        raise SparsortError(
            f"{folder} contains outcomes of another model or engine:\n  " + "\n  ".join(changed) + "\n"
            "Choose another folder, use the same model and engine, or delete the folder to compute all outcomes again."
        )


_NOTE_KEYS = frozenset(("group", "name", "note", "digest"))
_RESTORE = (
    f"The outcomes in its blocks are intact: copy {MANIFEST} again from where this folder came from, or create it again "
    "with sparsort ablate in another folder."
)
