"""The score folder: one Parquet file a shard, written whole or not at all, under a manifest of the settings.

Contract: shard k holds rows k * shard_rows onward. It is done when `shard-0000k.parquet` is the file that was written and the
rows and settings that it was sealed with are the current ones; a damaged one is scored again. `manifest.json` holds what was
asked (`provenance`, `shard_rows`) and is made before the first shard, by exactly one of the processes that begin at once; the
others take up its run, or are refused where their settings differ. Which shards are done is read from the files, so that two
processes that score disjoint shards never write the same file; `finish` adds the list of shards when all are there, and every
process that gets to it writes the same list. Two processes on the same shard would do its work twice, but the file would be
whole.

Digests: each shard carries one of itself (`parquet_seal`), which is what a run that resumes checks, without parsing Parquet. The
manifest carries one of itself, and when the run is finished the size and digest of every shard; readers check these.
Version 1 of the format has no digests. Its shards are checked against what they imply (`unsealed`), each time they are used
until `finish` writes a manifest of version 2. Reading writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsort.errors import SparsortError
from sparsort.scoring.store import unsealed
from sparsort.scoring.store.shard_files import SCORE_AGAIN, column_names, read_shard, write_shard
from sparsort.storage.files import disk_error, write_atomically
from sparsort.storage.integrity import (
    check_file,
    check_seal,
    check_version,
    damage,
    digest_of_values,
    parse_own_json,
    record_of,
    seal,
    write_sealed,
)
from sparsort.storage.parquet_seal import DamagedError, read_seal_and_record

MANIFEST = "manifest.json"
FORMAT = "sparsort-scores"
VERSION = 2
_UNSEALED = 1
# Recorded, but no reason to refuse: they do not change a score, or the digests of the rows guard what they stand for.
NOT_COMPARED = ("environment", "source")

_SHARD = re.compile(r"shard-(\d{5,})\.parquet")
# The names that `write_atomically` and `_create` make.
_TEMPORARY = re.compile(r"\.(manifest\.json|shard-(\d{5,})\.parquet)\.(\d+)(?:\.[0-9a-f]{32})?\.tmp")


class ShardStore:
    """A score folder. Make one with `open` (to score into) or `complete` (to read).

    Attributes:
        folder: where it is.
        provenance: the settings in its manifest.
        shard_rows: rows a shard.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.provenance: dict[str, Any] = manifest["provenance"]
        self.shard_rows: int = manifest["shard_rows"]
        self._rows = int(manifest.get("rows", 0))
        self._sealed: bool = manifest["version"] != _UNSEALED
        self._listed: dict[int, dict[str, Any]] = {shard["index"]: shard for shard in manifest.get("shards", [])}
        # Shards that this process has checked or written, as the manifest is to list them.
        self._known: dict[int, dict[str, Any]] = {}
        self._whole: pa.Table | None = None
        self._anew = f"Choose another folder for the changed data, or delete {folder} to score it anew."
        self._settings = _settings_digest(self.provenance, self.shard_rows)

    @classmethod
    def open(
        cls, folder: Path, *, provenance: Mapping[str, Any], shard_rows: int, part: tuple[int, int] = (0, 1)
    ) -> ShardStore:
        """Make the folder, or take up the run that began in it.

        Args:
            folder: a folder that is new, empty, or holds a run with the same settings.
            provenance: JSON values; all but the keys `NOT_COMPARED` have to be those of the run that began.
            shard_rows: rows a shard, at least 1.
            part: (k, n) where this process writes the shards k, k + n, …; leftovers of those alone are cleared away.

        Raises:
            SparsortError: the settings differ, the folder is not ours, or it cannot be written.
        """
        if shard_rows < 1:
            raise SparsortError(f"shard_rows is {shard_rows}; expected at least 1.")
        manifest = seal(
            {"format": FORMAT, "version": VERSION, "shard_rows": shard_rows, "provenance": as_json(provenance)}
        )
        try:
            if not (folder / MANIFEST).exists():
                _refuse_foreign(folder)
            if not (folder / MANIFEST).exists():
                _create(folder / MANIFEST, manifest)
            else:
                _probe(folder)
            _clear(folder, part)
        except OSError as error:
            raise disk_error(folder, error) from error
        # Read back even where this process meant to make it: another that began at once may have been first.
        began = read_manifest(folder)
        _refuse_other_settings(folder, began, manifest)
        return cls(folder, began)

    @classmethod
    def complete(cls, folder: Path) -> ShardStore:
        """The finished run in `folder`.

        Raises:
            SparsortError: there is none, or it is not finished.
        """
        manifest = read_manifest(folder)
        store = cls(folder, manifest)
        if "shards" not in manifest:
            done = len(store.indices())
            raise SparsortError(
                f"the scores in {folder} are not complete ({done} shard(s) so far). Run the same command again."
            )
        present = {file.name for file in os.scandir(folder)}
        if missing := [shard["file"] for shard in manifest["shards"] if shard["file"] not in present]:
            raise SparsortError(f"{folder} lacks {', '.join(missing[:5])}. Run the command that made them again.")
        if store._sealed:
            for shard in manifest["shards"]:
                check_file(folder / shard["file"], shard["record"], next_step=SCORE_AGAIN)
        else:
            store._check_unsealed()
        return store

    def _check_unsealed(self) -> None:
        """Check a finished folder of version 1 as a whole, and each of its shards.

        Raises:
            SparsortError: something in it contradicts the rest.
        """
        rows = []
        for number, (index, shard) in enumerate(self._listed.items()):
            path = self.path(index)
            try:
                found = unsealed.check_shard(
                    path, settings=self._settings, shard_rows=self.shard_rows, provenance=self.provenance
                )
            except DamagedError as error:
                raise SparsortError(f"{error} {SCORE_AGAIN}") from error
            except FileNotFoundError as error:
                raise SparsortError(f"{path} is damaged: it is missing. {SCORE_AGAIN}") from error
            self._refuse_settings(path, found["settings"])
            listed = (number, path.name, shard.get("rows"), shard.get("digest"))
            if listed != (index, shard.get("file"), found["rows"], found["digest"]):
                raise SparsortError(f"{path} is not the shard that {MANIFEST} lists. {SCORE_AGAIN}")
            rows.append(found["rows"])
        if sum(rows) != self._rows or any(count != self.shard_rows for count in rows[:-1]):
            raise SparsortError(
                f"{self.folder} is damaged: its shards hold {sum(rows)} rows, and {MANIFEST} says {self._rows}."
            )

    def path(self, index: int) -> Path:
        """The file of shard `index`."""
        return self.folder / f"shard-{index:05d}.parquet"

    def indices(self) -> list[int]:
        """The shards that have a file, in order."""
        matches = (_SHARD.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def is_done(self, index: int, digest: str, note: Callable[[str], None]) -> bool:
        """Whether shard `index` is there, whole, and of the rows with this `rows_digest`; `note` is called with any damage.

        Raises:
            SparsortError: it is whole, but of other rows or other settings; or the disk cannot read it.
        """
        entry = self._entry(index, note)
        if entry is None:
            return False
        if entry["digest"] != digest:
            begin = index * self.shard_rows
            raise SparsortError(
                f"the data has changed since {self.path(index).name} was scored: rows {begin} to "
                f"{begin + entry['rows'] - 1} are not the ones in it. {self._anew}"
            )
        return True

    def write(self, index: int, table: pa.Table, digest: str) -> None:
        """Write shard `index`, durably: after this returns, no kill and no power cut loses it."""
        facts = {"index": index, "rows": table.num_rows, "digest": digest, "settings": self._settings}
        with write_atomically(self.path(index)) as temporary:
            write_shard(temporary, table, facts)
            record = record_of(temporary)
        self._known[index] = self._listing(facts, record)

    def refuse_beyond(self, total: int) -> None:
        """Refuse a folder with shards beyond the data.

        Raises:
            SparsortError: there are more shards than `total` rows fill.
        """
        expected, present = -(-total // self.shard_rows), self.indices()
        if present and present[-1] >= expected:
            raise SparsortError(
                f"the data has become shorter: {self.folder} holds scores up to {self.path(present[-1]).name}, "
                f"but {total} rows fill {expected} shard(s). {self._anew}"
            )

    def finish(self, total: int) -> bool:
        """List the shards in the manifest if all those of `total` rows are there, and say whether they are.

        Raises:
            SparsortError: a shard has other settings than the manifest, or cannot be read; see also `refuse_beyond`.
        """
        self.refuse_beyond(total)
        present = self.indices()
        if len(present) < -(-total // self.shard_rows):
            return False
        manifest = read_manifest(self.folder)
        # A damaged shard of another process counts as one that is not there: that process scores it again.
        entries = (self._known.get(index) or self._entry(index, lambda _sentence: None) for index in present)
        shards = [entry for entry in entries if entry is not None]
        if len(shards) < len(present):
            return False
        if manifest.get("shards") != shards:
            write_sealed(self.folder / MANIFEST, {**manifest, "version": VERSION, "rows": total, "shards": shards})
        return True

    @property
    def num_rows(self) -> int:
        """Rows in the finished run, 0 while it is not finished."""
        return self._rows

    @property
    def column_names(self) -> list[str]:
        """The columns of every shard."""
        return column_names(self.path(self._to_read()[0]))

    def select(self, columns: list[str]) -> pa.Table:
        """The named columns of all shards, in the order of the rows.

        Up to `_MOST_HELD` rows are read once, whole, and kept: opening many shards takes longer than reading them. Of more
        rows, only the named columns are read.
        """
        if self._whole is None and 0 < self._rows <= _MOST_HELD:
            self._whole = pa.concat_tables(self.tables()).combine_chunks()
        return self._whole.select(columns) if self._whole is not None else pa.concat_tables(self.tables(columns))

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The shards one after the other, without holding more than one."""
        for index in self._to_read():
            yield read_shard(self.path(index), columns)

    def _to_read(self) -> list[int]:
        """The shards that the manifest lists; of a run that is not finished, those that have a file."""
        return sorted(self._listed) or self.indices()

    def _entry(self, index: int, note: Callable[[str], None]) -> dict[str, Any] | None:
        """Shard `index` as the manifest lists it, once it is known to be the file that was written; None if it is not.

        Raises:
            SparsortError: it is whole, but of other settings; or the disk cannot read it.
        """
        path, listed = self.path(index), self._listed.get(index)
        try:
            if self._sealed and listed is not None and damage(path, listed["record"]) is None:
                self._known[index] = listed
                return listed
            facts, record = read_seal_and_record(path)
            facts = facts or self._unsealed_facts(path)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            note(f"{path.name} is damaged ({error.reason}); its rows are scored again.")
            return None
        except OSError as error:
            raise SparsortError(f"cannot read {path}: {error.strerror or error}.") from error
        self._refuse_settings(path, facts["settings"])
        if facts.get("index", index) != index:
            note(f"{path.name} holds the rows of shard {facts['index']}; its own are scored again.")
            return None
        self._known[index] = self._listing({**facts, "index": index}, record)
        return self._known[index]

    def _unsealed_facts(self, path: Path) -> dict[str, Any]:
        if self._sealed:
            raise DamagedError(path, "it is not a shard of scores as sparsort writes them")
        return unsealed.check_shard(
            path, settings=self._settings, shard_rows=self.shard_rows, provenance=self.provenance
        )

    def _listing(self, facts: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        file = self.path(facts["index"]).name
        return {
            "index": facts["index"],
            "file": file,
            "rows": facts["rows"],
            "digest": facts["digest"],
            "record": dict(record),
        }

    def _refuse_settings(self, path: Path, settings: str) -> None:
        if settings != self._settings:
            raise SparsortError(
                f"{path} was scored with other settings than {MANIFEST} next to it. "
                f"Delete {self.folder}, or choose another folder."
            )


def as_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as the manifest gives it back, so that a tuple equals the list that it becomes.

    Raises:
        SparsortError: a value is none of JSON's, such as NaN or an object.
    """
    try:
        return dict(json.loads(json.dumps(dict(provenance), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise SparsortError(
            f"the scorer's provenance is not made of JSON values ({error}). This is a fault of the scorer."
        ) from error


def _create(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest unless there is one: of processes that do so at once, one makes it, whole, and the rest none.

    Where the disk has no hard links, the file itself is opened exclusively: one process makes it there too, but a kill
    in the middle leaves a part of it, which `read_manifest` refuses. The first shard's write syncs the folder.
    """
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        _write_new(temporary, text)
        with contextlib.suppress(FileExistsError):
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:
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
    """The manifest of a score folder, finished or not.

    Raises:
        SparsortError: there is none, or it is damaged, of another version or of something else.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_own_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SparsortError(
            f"{folder} is no score folder: it has no {MANIFEST}. Make one with 'sparsort score FILE --out {folder}'."
        ) from error
    except (OSError, ValueError) as error:
        raise SparsortError(
            f"{path} cannot be read ({error}). Delete {folder} to score anew, or choose another folder."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SparsortError(f"{path} was not written by sparsort score. Choose another folder.")
    again = f"Delete {folder} to score again, or choose another folder."
    newer = "Update sparsort, or choose another folder."
    check_version(manifest.get("version"), (_UNSEALED, VERSION), path, damaged=again, other=newer)
    if manifest["version"] == VERSION:
        check_seal(manifest, path, next_step=again)
    if not _is_whole(manifest):
        raise SparsortError(
            f"{path} lacks the settings of the run. Delete {folder} to score anew, or choose another folder."
        )
    return manifest


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest holds what one must hold: version 1 has no digest, and a digest does not say who wrote the values."""
    shards, numbers = manifest.get("shards", []), [manifest.get("shard_rows"), manifest.get("rows", 0)]
    # What version 1 does not have is left to the checks of its shards.
    kinds = {"index": int, "file": str} if manifest["version"] == _UNSEALED else _SHARD_KINDS
    return (
        isinstance(manifest.get("provenance"), dict)
        and isinstance(manifest["provenance"].get("orientation", {}), dict)
        and all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) for shard in shards)
        and all(type(shard.get(name)) is kind for shard in shards for name, kind in kinds.items())
    )


def _refuse_foreign(folder: Path) -> None:
    """Shard files without a manifest count as foreign: nothing says what settings made them."""
    if folder.exists():
        names = sorted(child.name for child in folder.iterdir())
        foreign = [name for name in names if not _TEMPORARY.fullmatch(name)]
        if foreign and MANIFEST not in foreign:
            held = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise SparsortError(
                f"{folder} is no score folder: it holds {held}, but no {MANIFEST}. Choose a new folder."
            )


def _refuse_other_settings(folder: Path, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = ({"shard_rows": side["shard_rows"], **_compared(side["provenance"])} for side in (began, now))
    keys = dict.fromkeys([*before, *after])
    changed = [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if changed:
        raise SparsortError(
            f"{folder} holds scores made with other settings:\n  " + "\n  ".join(changed) + "\n"
            "Choose another folder (--out), run with the settings that began it, or delete it to score anew."
        )


def _probe(folder: Path) -> None:
    """Find out before any work, not after the first shard, that the folder cannot be written."""
    probe = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def _clear(folder: Path, part: tuple[int, int]) -> None:
    """Remove what killed runs left half written, but nothing that another process may be writing now."""
    for file in folder.iterdir():
        match = _TEMPORARY.fullmatch(file.name)
        if match is None or _alive(int(match[3])):
            continue
        if part[1] == 1 or (match[2] is not None and int(match[2]) % part[1] == part[0]):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()


def _alive(process: int) -> bool:
    if process == os.getpid() or sys.platform == "win32":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _settings_digest(provenance: Mapping[str, Any], shard_rows: int) -> str:
    return digest_of_values({"shard_rows": shard_rows, **_compared(provenance)})


def _compared(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_flat({key: value for key, value in provenance.items() if key not in NOT_COMPARED}))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `outliers.n`, so that a difference is named where it is."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key], ensure_ascii=False) if key in settings else "absent"
    # A fitted outlier rule is a list of hundreds of numbers.
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 20]}… ({len(text):,} characters)"


_ABSENT = object()
_MOST_SHOWN = 160
# Some 15 MB, which is more rows than 10,000 shards of a few rows have.
_MOST_HELD = 1 << 16
_SHARD_KINDS: Mapping[str, type] = {"index": int, "file": str, "rows": int, "digest": str, "record": dict}
