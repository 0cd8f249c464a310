"""The folder of a result store: its manifest, file names that stand for any name, and damage set aside.

Contract: what is made here is on the disk when the call returns. Of processes that make one store at once, one makes it
and the others find it. Nothing is deleted but temporary files that no write can still be using.

The manifest and the notes of version 2 carry digests of themselves. In a store of version 1 a note may have none, and the
manifest is guarded by the blocks, which name its digest.
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
_KEPT = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_STALE_S = 3600.0  # a temporary file of this age is no write in progress, which takes under a second
_LONGEST_NAME = 200


def file_name(name: str, kind: str) -> str:
    """A file name that stands for `name` alone on any file system: lower case, `/` as `+`, other bytes as `%xx`."""
    parts = ("+" if c == "/" else c if c in _KEPT else "".join(f"%{b:02x}" for b in c.encode()) for c in name)
    try:
        made = "".join(parts)
    except UnicodeEncodeError as error:
        raise SparsortError(f"the {kind} name {name!r} is not valid Unicode.") from error
    if made.startswith("."):
        made = f"%2e{made[1:]}"
    if not 0 < len(made) <= _LONGEST_NAME:
        raise SparsortError(
            f"the {kind} name {name!r} takes {len(made)} bytes as a file name; expected 1 to {_LONGEST_NAME}. "
            "Lower-case letters, digits, '-', '_', '.' and '/' take one each, other characters three or more."
        )
    return made


def name_of_file(name: str) -> str:
    """The name that `file_name` made this of."""
    return unquote(name.replace("+", "/"), errors="replace")


def as_json(value: Any, what: str) -> Any:
    """The value as JSON gives it back, so that a tuple equals the list that it becomes.

    Raises:
        SparsortError: it is none of JSON's, such as NaN or an object.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SparsortError(f"{what} is not made of JSON values ({error}).") from error


def listed(folder: Path) -> list[str]:
    """The names in a folder, in no order; none of one that is not there."""
    try:
        return os.listdir(folder)  # noqa: PTH208 (names, not paths: thousands of them)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise cannot_read(folder, error) from error


def cannot_read(path: Path, error: OSError) -> SparsortError:
    """The user-facing form of an error of the disk met while reading `path`."""
    return SparsortError(f"cannot read {path}: {error.strerror or error}.")


def set_aside(path: Path, what: str, reason: str) -> None:
    """Rename what cannot be read, so that it is neither met again nor lost."""
    aside = path.with_name(f"{path.name}.broken")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # another process has done so
    except OSError as failure:
        _LOG.warning(
            "%s: %s is damaged (%s) and left out; renaming it failed: %s.", path, what, reason, failure.strerror
        )
        return
    _LOG.warning("%s: %s is damaged (%s); set aside as %s, to be computed again.", path, what, reason, aside.name)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each entry synced to the disk."""
    try:
        if folder.is_dir():
            return
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from error


def clear_stale(folder: Path) -> None:
    """Remove what killed writers left half written, but nothing that one may be writing now."""
    for name in filter(_TEMPORARY.fullmatch, listed(folder)):
        with contextlib.suppress(OSError):
            if (folder / name).stat().st_mtime < time.time() - _STALE_S:
                (folder / name).unlink()


def open_manifest(folder: Path, identity: Mapping[str, Any], feature_names: Sequence[str]) -> dict[str, Any]:
    """Make a store in `folder`, or take up the one that is there, and give its manifest.

    Raises:
        SparsortError: the store is of another identity, the folder holds something else, or it cannot be written.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "identity": as_json(dict(identity), "the store's identity"),
        "feature_names": as_json(list(feature_names), "feature_names"),
    }
    if MANIFEST not in listed(folder):
        _create(folder, manifest)
    # Read back even where this process meant to make it: another that began at once may have been first.
    began = read_manifest(folder)
    _refuse_another(folder, began, manifest)
    return began


def recorded_identity(folder: Path) -> dict[str, Any]:
    """The identity of the store in `folder`; empty without a store.

    Raises:
        SparsortError: its manifest cannot be read.
    """
    return dict(read_manifest(folder)["identity"]) if MANIFEST in listed(folder) else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in `folder`: its `identity` and its `feature_names`.

    Raises:
        SparsortError: there is none, or it is damaged or of another version.
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
    """A note as it is written: with a digest, and with its place, so that another note cannot take it."""
    return seal({"group": group, "name": name, "note": value})


def open_note(found: Any, group: str, name: str, *, must_be_sealed: bool) -> Any:
    """The value in a note.

    Args:
        found: JSON as it was read.
        group, name: where it was read.
        must_be_sealed: False in a store of version 1, whose notes may be the bare value.

    Raises:
        ValueError: it is damaged, or belongs elsewhere.
    """
    is_bare = not isinstance(found, dict) or len(_NOTE_KEYS & found.keys()) < 2  # one flipped bit changes one key
    if is_bare and not must_be_sealed:
        return found
    if is_bare or not is_sealed(found) or (found.get("group"), found.get("name")) != (group, name):
        raise ValueError("its content has changed since it was written")
    return found.get("note")


def _create(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make a store; of processes that do so at once, one makes it and the others find it."""
    names = sorted(name for name in listed(folder) if name != LOCK and not _TEMPORARY.fullmatch(name))
    if names and not (folder / MANIFEST).exists():
        held = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise SparsortError(f"{folder} is no result store: it holds {held}, but no {MANIFEST}. Choose a new folder.")
    make_folder(folder)
    with locked(folder / LOCK, wait=True):
        if not (folder / MANIFEST).exists():
            write_sealed(folder / MANIFEST, manifest)


def _refuse_another(folder: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = ({**side["identity"], "feature_names": side["feature_names"]} for side in (began, now))

    def shown(side: Mapping[str, Any], key: str) -> str:
        return json.dumps(side[key], ensure_ascii=False, sort_keys=True) if key in side else "absent"

    lines = [(key, shown(before, key), shown(after, key)) for key in dict.fromkeys([*before, *after])]
    if changed := [f"{key}: {old} → {new}" for key, old, new in lines if old != new]:
        raise SparsortError(
            f"{folder} holds outcomes of another model or engine:\n  " + "\n  ".join(changed) + "\n"
            "Choose another folder, run with what began it, or delete it to compute them anew."
        )


_NOTE_KEYS = frozenset(("group", "name", "note", "digest"))
_RESTORE = (
    f"The outcomes in its blocks are whole: copy {MANIFEST} again from where this folder came from, or make it again "
    "with sparsort ablate in another folder."
)
